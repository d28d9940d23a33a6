//! HTML pages from templates.

/// Text as HTML shows it, also within quotes.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Puts HTML in the place of each `{{key}}` of a template. Values are not searched for keys.
pub fn fill(template: &str, values: &[(&str, &str)]) -> String {
    let mut page = String::with_capacity(template.len());
    let mut rest = template;
    while let Some((before, behind)) = rest.split_once("{{") {
        let (key, after) = behind
            .split_once("}}")
            .expect("templates of ours close their keys");
        let (_, value) = (values.iter())
            .find(|(name, _)| *name == key)
            .expect("templates of ours have only keys that are filled");
        page.push_str(before);
        page.push_str(value);
        rest = after;
    }
    page.push_str(rest);
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stay_text() {
        let evil = escape("</script> & \"{{b}}\" '");
        assert_eq!(evil, "&lt;/script&gt; &amp; &quot;{{b}}&quot; &#39;");
        assert_eq!(
            fill("<i>{{a}}</i>{{b}}", &[("a", &evil), ("b", "B")]),
            format!("<i>{evil}</i>B")
        );
    }
}
