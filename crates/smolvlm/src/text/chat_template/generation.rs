//! The statement `{% generation %}`, with which transformers marks the assistant's text and which minijinja lacks.

/// Replaces each `{% generation %}` … `{% endgeneration %}` by `{% with %}` … `{% endwith %}`, which does nothing either
/// and keeps lines, white space and scopes.
pub(crate) fn without_generation(template: &str) -> String {
    let mut written = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find('{') {
        let (before, tag) = rest.split_at(start);
        written.push_str(before);
        let len = match tag.as_bytes().get(1) {
            Some(b'#') => tag.find("#}").map_or(tag.len(), |end| end + 2),
            Some(b'{') => expression(tag, "}}"),
            Some(b'%') => match name(tag) {
                "raw" => raw(tag),
                _ => expression(tag, "%}"),
            },
            _ => 1,
        };
        let (tag, others) = tag.split_at(len);
        match name(tag) {
            generation @ ("generation" | "endgeneration") => {
                let with = generation.replace("generation", "with");
                written.push_str(&tag.replacen(generation, &with, 1));
            }
            _ => written.push_str(tag),
        }
        rest = others;
    }
    written.push_str(rest);
    written
}

/// Name of the statement at the start of `tag`, or empty.
fn name(tag: &str) -> &str {
    let Some(inside) = tag.strip_prefix("{%") else {
        return "";
    };
    let inside = inside.strip_prefix(['-', '+']).unwrap_or(inside);
    let inside = inside.trim_start();
    let end = inside.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    &inside[..end.unwrap_or(inside.len())]
}

/// Length of a tag that ends with `close`, outside of strings and brackets.
fn expression(tag: &str, close: &str) -> usize {
    let mut chars = tag.char_indices().skip(2);
    let mut open = 0usize;
    let mut quote = None;
    while let Some((at, c)) = chars.next() {
        match (quote, c) {
            (Some(_), '\\') => drop(chars.next()),
            (Some(quoted), _) if quoted == c => quote = None,
            (Some(_), _) => (),
            (None, '"' | '\'') => quote = Some(c),
            (None, _) if open == 0 && tag[at..].starts_with(close) => return at + close.len(),
            (None, '{' | '[' | '(') => open += 1,
            (None, '}' | ']' | ')') => open = open.saturating_sub(1),
            (None, _) => (),
        }
    }
    tag.len()
}

/// Length of a block from `{% raw %}` to `{% endraw %}`.
fn raw(tag: &str) -> usize {
    let ends = tag.match_indices("{%");
    let mut ends = ends.filter(|(at, _)| name(&tag[*at..]) == "endraw");
    match ends.next() {
        Some((at, _)) => at + expression(&tag[at..], "%}"),
        None => tag.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_tags_change() {
        for (template, expected) in [
            (
                "a{% generation %}b{% endgeneration %}c",
                "a{% with %}b{% endwith %}c",
            ),
            (
                "{%-generation-%}{%+\n endgeneration +%}",
                "{%-with-%}{%+\n endwith +%}",
            ),
            (
                "{# {% generation %} #}{%generation%}",
                "{# {% generation %} #}{%with%}",
            ),
            (
                "{%raw%}{% generation %}{%- endraw -%}{% generation %}",
                "{%raw%}{% generation %}{%- endraw -%}{% with %}",
            ),
        ] {
            assert_eq!(without_generation(template), expected);
        }
        for same in [
            "{{ '{% generation %}' }}",
            "{{ {'a': {'b': \"it's {% generation %}\"}} }}",
            "{% if x == '%}{% generation %}' %}",
            "{{ 'a\\'{% generation %}' }}",
            "{% generations %}{% set generation = 1 %}{ % generation % }{",
            "{% raw %}{% generation %}",
            "{# {% generation %}",
            "{{ 'é{%",
            "{%",
        ] {
            assert_eq!(without_generation(same), same);
        }
    }
}
