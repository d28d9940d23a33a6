//! Python as chat templates use it and minijinja lacks it: methods of its types, filters and functions.

use std::fmt::Write;

use minijinja::{
    Environment, Error, ErrorKind, State, Value,
    value::{Kwargs, Rest, ValueKind, from_args},
};
use minijinja_contrib::pycompat;

pub(crate) fn add_to(environment: &mut Environment<'_>) {
    minijinja_contrib::add_to_environment(environment);
    // Debugging aids, whose output grows with the square of their input.
    environment.remove_filter("pprint");
    environment.remove_global("debug");
    environment.set_unknown_method_callback(method);
    environment.add_filter("tojson", tojson);
    environment.add_filter("center", |text: &str, width: Option<usize>| {
        pad(text, width.unwrap_or(80), ' ', Side::Both)
    });
    environment.add_filter("wordcount", |text: &str| text.split_whitespace().count());
    environment.add_filter("truncate", truncate);
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_test("sequence", |value: &Value| {
        use ValueKind::{Map, Seq, String};
        matches!(value.kind(), Seq | Map | String)
    });
    environment.add_test("iterable", |value: &Value| {
        !value.is_none() && value.try_iter().is_ok()
    });
    environment.add_test("callable", |value: &Value| {
        // Of the values that templates get, only functions are plain.
        value.kind() == ValueKind::Plain
    });
    environment.add_function("dict", dict);
    environment.add_function(
        "raise_exception",
        |message: &Value| -> Result<Value, Error> {
            Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("it raises: {message}"),
            ))
        },
    );
    environment.add_function("strftime_now", strftime_now);
}

fn invalid(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.into())
}

/// The local time by a format of Python's `strftime`.
fn strftime_now(format: &str) -> Result<String, Error> {
    let now = jiff::Zoned::now();
    let text = jiff::fmt::strtime::format(format, &now);
    text.map_err(|e| invalid(format!("strftime_now('{format}'): {e}")))
}

/// Jinja's `default`; that of minijinja takes no keyword arguments.
fn default(value: &Value, args: Rest<Value>, keywords: Kwargs) -> Result<Value, Error> {
    let argument = |place: usize, name: &str| -> Result<Option<Value>, Error> {
        let by_name: Option<Value> = keywords.get(name)?;
        Ok(args.get(place).cloned().or(by_name))
    };
    let other = argument(0, "default_value")?.unwrap_or_else(|| "".into());
    let falsy_too = argument(1, "boolean")?.is_some_and(|v| v.is_true());
    keywords.assert_all_used()?;
    match value.is_undefined() || falsy_too && !value.is_true() {
        true => Ok(other),
        false => Ok(value.clone()),
    }
}

/// Python's `dict`; that of minijinja takes no pairs.
fn dict(args: Rest<Value>, keywords: Kwargs) -> Result<Value, Error> {
    let mut items: Vec<(Value, Value)> = Vec::new();
    for arg in args.iter() {
        for item in arg.try_iter()? {
            match arg.kind() {
                ValueKind::Map => items.push((item.clone(), arg.get_item(&item)?)),
                _ => items.push((item.get_item(&0.into())?, item.get_item(&1.into())?)),
            }
        }
    }
    for name in keywords.args() {
        items.push((name.into(), keywords.get(name)?));
    }
    Ok(Value::from_pairs(items))
}

/// Parameters that Python's methods take by keyword, in positional order.
const KEYWORDS: [(&str, &[&str]); 3] = [
    ("split", &["sep", "maxsplit"]),
    ("rsplit", &["sep", "maxsplit"]),
    ("splitlines", &["keepends"]),
];

fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let (args, keywords): (Rest<Value>, Kwargs) = from_args(args)?;
    let mut args = args.0;
    if let Some((_, names)) = KEYWORDS.iter().find(|(name, _)| *name == method) {
        for (place, name) in names.iter().enumerate().skip(args.len()) {
            if keywords.has(name) {
                args.resize(place, Value::from(()));
                args.push(keywords.get(name)?);
            }
        }
        keywords.assert_all_used()?;
    } else if method != "format" {
        keywords.assert_all_used()?;
    } else if keywords.args().next().is_some() {
        args.push(keywords.into());
    }
    let known = match value.kind() {
        ValueKind::String => string(value.as_str().unwrap_or_default(), method, &args)?,
        ValueKind::Map if method == "copy" => Some(value.clone()),
        ValueKind::Seq => sequence(value, method, &args)?,
        _ => None,
    };
    match known {
        Some(result) => Ok(result),
        None => pycompat::unknown_method_callback(state, value, method, &args),
    }
}

enum Side {
    Left,
    Right,
    Both,
}

/// Pads a text. As in Python, a centred text gets the odd character on the left if both lengths are odd.
fn pad(text: &str, width: usize, fill: char, side: Side) -> Result<String, Error> {
    // No rendered prompt may be longer.
    if width > super::MAX_ADDED {
        return Err(invalid(format!("a text of {width} characters is too long")));
    }
    let len = text.chars().count();
    let missing = width.saturating_sub(len);
    let left = match side {
        Side::Left => missing,
        Side::Right => 0,
        Side::Both => missing / 2 + (missing & width & 1),
    };
    let fill = |count| std::iter::repeat_n(fill, count);
    let text = fill(left).chain(text.chars()).chain(fill(missing - left));
    Ok(text.collect())
}

/// Jinja's `truncate`, which keeps texts that are longer by up to `leeway` characters.
fn truncate(text: &str, args: Rest<Value>, keywords: Kwargs) -> Result<String, Error> {
    let argument = |place: usize, name: &str| -> Result<Option<Value>, Error> {
        let by_name: Option<Value> = keywords.get(name)?;
        Ok(args.get(place).cloned().or(by_name))
    };
    let number = |value: Option<Value>, default| value.map_or(Ok(default), usize::try_from);
    let length = number(argument(0, "length")?, 255)?;
    let inside_words = argument(1, "killwords")?.is_some_and(|v| v.is_true());
    let end = argument(2, "end")?.map_or("...".into(), |end| end.to_string());
    let leeway = number(argument(3, "leeway")?, 5)?;
    keywords.assert_all_used()?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text.into());
    }
    let kept = length.saturating_sub(end.chars().count());
    let kept: String = text.chars().take(kept).collect();
    let kept = match kept.rsplit_once(' ') {
        Some((words, _)) if !inside_words => words,
        _ => &kept,
    };
    Ok(format!("{kept}{end}"))
}

fn string(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let padded = |side| {
        let (width, fill): (usize, Option<char>) = from_args(args)?;
        pad(text, width, fill.unwrap_or(' '), side)
    };
    let place = |found: Option<usize>| match found {
        Some(at) => Ok(Value::from(text[..at].chars().count())),
        None => Err(invalid("substring not found")),
    };
    let three = |found: Option<(&str, &str)>, others: [&str; 3]| {
        let parts = match found {
            Some((before, after)) => [before, args[0].as_str().unwrap_or_default(), after],
            None => others,
        };
        Value::from(minijinja::value::Tuple::from(parts.map(Value::from)))
    };
    let separator = || -> Result<&str, Error> {
        let (separator,): (&str,) = from_args(args)?;
        match separator {
            "" => Err(invalid("empty separator")),
            separator => Ok(separator),
        }
    };
    Ok(Some(match method {
        "split" => {
            let (separator, max): (Option<&str>, Option<i64>) = from_args(args)?;
            let max = max.and_then(|max| usize::try_from(max).ok());
            split(text, separator, max)?
        }
        "rsplit" => {
            let (separator, max): (Option<&str>, Option<i64>) = from_args(args)?;
            match max.and_then(|max| usize::try_from(max).ok()) {
                Some(max) => rsplit(text, separator, max)?,
                None => split(text, separator, None)?,
            }
        }
        "partition" => three(text.split_once(separator()?), [text, "", ""]),
        "rpartition" => three(text.rsplit_once(separator()?), ["", "", text]),
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            text.strip_prefix(prefix).unwrap_or(text).into()
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            text.strip_suffix(suffix).unwrap_or(text).into()
        }
        "swapcase" => {
            let () = from_args(args)?;
            let swap = |c: char| match c.is_uppercase() {
                true => c.to_lowercase().collect::<String>(),
                false => c.to_uppercase().collect(),
            };
            text.chars().map(swap).collect::<String>().into()
        }
        "title" => {
            let () = from_args(args)?;
            let mut inside = false;
            let title = text.chars().flat_map(|c| {
                let cased: Vec<char> = match std::mem::replace(&mut inside, c.is_alphabetic()) {
                    true => c.to_lowercase().collect(),
                    false => c.to_uppercase().collect(),
                };
                cased
            });
            title.collect::<String>().into()
        }
        "casefold" => {
            let () = from_args(args)?;
            text.to_lowercase().replace('ß', "ss").into()
        }
        "index" => place(text.find(from_args::<(&str,)>(args)?.0))?,
        "rindex" => place(text.rfind(from_args::<(&str,)>(args)?.0))?,
        "ljust" => padded(Side::Right)?.into(),
        "rjust" => padded(Side::Left)?.into(),
        "center" => padded(Side::Both)?.into(),
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
            let sign = &text[..text.len() - digits.len()];
            let digits = pad(digits, width.saturating_sub(sign.len()), '0', Side::Left)?;
            format!("{sign}{digits}").into()
        }
        "isdecimal" => {
            let () = from_args(args)?;
            (!text.is_empty() && text.chars().all(|c| c.is_ascii_digit())).into()
        }
        "istitle" => {
            let () = from_args(args)?;
            is_title(text).into()
        }
        _ => return Ok(None),
    }))
}

/// Python's `str.split`: at white space or at a separator, at most `max` times.
fn split(text: &str, separator: Option<&str>, max: Option<usize>) -> Result<Value, Error> {
    let parts = max.map_or(usize::MAX, |max| max.saturating_add(1));
    let Some(separator) = separator else {
        let mut found = Vec::new();
        let mut rest = text.trim_start();
        while !rest.is_empty() {
            let end = match found.len() + 1 < parts {
                true => rest.find(char::is_whitespace).unwrap_or(rest.len()),
                // The last part keeps its inner white space.
                false => rest.len(),
            };
            found.push(&rest[..end]);
            rest = rest[end..].trim_start();
        }
        return Ok(found.into_iter().collect());
    };
    match separator {
        "" => Err(invalid("empty separator")),
        separator => Ok(text.splitn(parts, separator).collect()),
    }
}

/// Python's `str.rsplit`.
fn rsplit(text: &str, separator: Option<&str>, max: usize) -> Result<Value, Error> {
    let mut found = Vec::new();
    match separator {
        Some("") => return Err(invalid("empty separator")),
        Some(separator) => found.extend(text.rsplitn(max.saturating_add(1), separator)),
        None => {
            let mut rest = text.trim_end();
            while !rest.is_empty() {
                let space = match found.len() < max {
                    true => rest.char_indices().rev().find(|(_, c)| c.is_whitespace()),
                    false => None,
                };
                let start = space.map_or(0, |(at, c)| at + c.len_utf8());
                found.push(&rest[start..]);
                rest = rest[..start].trim_end();
            }
        }
    }
    Ok(found.into_iter().rev().collect())
}

/// Python's `str.istitle`: whether the first letter of each word, and no other, is a capital.
fn is_title(text: &str) -> bool {
    let mut inside = false;
    let mut cased = false;
    for c in text.chars() {
        if c.is_uppercase() && inside || c.is_lowercase() && !inside {
            return false;
        }
        inside = c.is_alphabetic();
        cased |= inside;
    }
    cased
}

fn sequence(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    match method {
        "copy" => {
            let () = from_args(args)?;
            Ok(Some(value.clone()))
        }
        "index" => {
            let (item,): (&Value,) = from_args(args)?;
            match value.try_iter()?.position(|other| other == *item) {
                Some(at) => Ok(Some(at.into())),
                None => Err(invalid(format!("{item} is not in list"))),
            }
        }
        _ => Ok(None),
    }
}

/// transformers' `tojson`, which is Python's `json.dumps`: the prompt must be the one that the model was trained on.
fn tojson(value: &Value, args: Rest<Value>, keywords: Kwargs) -> Result<String, Error> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let argument = |place: usize| -> Result<Value, Error> {
        let by_name: Option<Value> = keywords.get(names[place])?;
        let argument = args.get(place).cloned().or(by_name);
        Ok(argument.unwrap_or_default())
    };
    let indent = argument(1)?;
    let indent = match indent.as_str() {
        Some(text) => Some(text.to_owned()),
        None if indent.is_none() || indent.is_undefined() => None,
        // Python takes a negative indent as none.
        None => Some(" ".repeat(i64::try_from(indent)?.clamp(0, 64) as usize)),
    };
    let separators = argument(2)?;
    let (item_separator, key_separator) = match separators.is_none() || separators.is_undefined() {
        true if indent.is_some() => (",".into(), ": ".into()),
        true => (", ".into(), ": ".into()),
        false => {
            let separator = |at: usize| separators.get_item(&at.into()).map(|s| s.to_string());
            (separator(0)?, separator(1)?)
        }
    };
    let mut json = JsonWriter {
        ensure_ascii: argument(0)?.is_true(),
        sort_keys: argument(3)?.is_true(),
        indent,
        item_separator,
        key_separator,
        text: String::new(),
    };
    keywords.assert_all_used()?;
    json.write(value, 0)?;
    Ok(json.text)
}

/// Writes a value as `json.dumps` does.
struct JsonWriter {
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    text: String,
}

impl JsonWriter {
    /// About Python's recursion limit.
    const MAX_DEPTH: usize = 900;

    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        // A longer text could be no prompt.
        if depth > Self::MAX_DEPTH || self.text.len() > 64 * super::MAX_ADDED {
            return Err(invalid("tojson: the value is too deep or too long"));
        }
        match value.kind() {
            ValueKind::None => self.text.push_str("null"),
            ValueKind::Bool if value.is_true() => self.text.push_str("true"),
            ValueKind::Bool => self.text.push_str("false"),
            // minijinja writes numbers as Python does.
            ValueKind::Number => {
                let _ = write!(self.text, "{value}");
            }
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.map(|item| (None, item));
                self.items(('[', ']'), items, depth)?;
            }
            ValueKind::Map => {
                let mut items = Vec::new();
                for key in value.try_iter()? {
                    let item = value.get_item(&key)?;
                    items.push((Some(key), item));
                }
                if self.sort_keys {
                    items.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.items(('{', '}'), items.into_iter(), depth)?;
            }
            kind => return Err(invalid(format!("tojson: {kind} is not JSON"))),
        }
        Ok(())
    }

    fn items(
        &mut self,
        (open, close): (char, char),
        items: impl Iterator<Item = (Option<Value>, Value)>,
        depth: usize,
    ) -> Result<(), Error> {
        self.text.push(open);
        let mut is_empty = true;
        for (key, item) in items {
            if !std::mem::take(&mut is_empty) {
                self.text.push_str(&self.item_separator);
            }
            self.line(depth + 1);
            if let Some(key) = key {
                match key.kind() {
                    ValueKind::String => self.write(&key, depth + 1)?,
                    _ => {
                        self.text.push('"');
                        self.write(&key, depth + 1)?;
                        self.text.push('"');
                    }
                }
                self.text.push_str(&self.key_separator);
            }
            self.write(&item, depth + 1)?;
        }
        if !is_empty {
            self.line(depth);
        }
        self.text.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.text.push('\n');
            self.text
                .extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }

    fn string(&mut self, text: &str) {
        let quoted = serde_json::Value::from(text).to_string();
        if !self.ensure_ascii {
            return self.text.push_str(&quoted);
        }
        for c in quoted.chars() {
            match c.is_ascii() {
                true => self.text.push(c),
                false => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.text, "\\u{unit:04x}");
                    }
                }
            }
        }
    }
}
