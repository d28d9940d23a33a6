//! The files of a checkpoint that hold its chat template and special tokens, in the order in which transformers looks
//! for them.

use std::path::PathBuf;

use serde_json::Value;

use crate::{
    error::{Error, Result},
    files::source::{PROCESSOR_CONFIG, Source},
    text::chat_template::SpecialTokens,
};

/// The template of every published checkpoint, for models that come without one.
pub(crate) const PUBLISHED: &str = include_str!("../../models/demo/chat_template.jinja");

const TEMPLATE: &str = "chat_template.jinja";
const LEGACY: &str = "chat_template.json";
const ADDITIONAL: &str = "additional_chat_templates";
const DEFAULT: &str = "default";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";

/// Special tokens with a name of their own in every tokenizer.
const SPECIAL_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// Files that the template and its special tokens may come from.
pub(crate) const FILES: [&str; 5] = [
    TEMPLATE,
    "additional_chat_templates/default.jinja",
    LEGACY,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
];

/// Whether a file of a repository is one of its additional templates.
#[cfg(feature = "hub")]
pub(crate) fn is_additional(file: &str) -> bool {
    let name = file
        .strip_prefix(ADDITIONAL)
        .and_then(|f| f.strip_prefix('/'));
    name.is_some_and(|name| !name.contains('/') && name.ends_with(".jinja"))
}

/// Reads the template and returns it with its path; of several, the one named `default`.
///
/// In the order of `ProcessorMixin.get_processor_dict`
/// ([`processing_utils.py`](https://github.com/huggingface/transformers/blob/main/src/transformers/processing_utils.py)),
/// then from the tokenizer's configuration, then [`PUBLISHED`].
pub(crate) fn chat_template(source: &Source) -> Result<(String, PathBuf)> {
    let others = additional_names(source);
    if source.open(LEGACY)?.is_some() && !others.is_empty() {
        return Err(Error::file(
            &source.path(LEGACY),
            format!("can't be combined with templates in {ADDITIONAL}"),
            format!("Save its template as {TEMPLATE}, and remove it"),
        ));
    }
    for name in [PROCESSOR_CONFIG, LEGACY] {
        if let Some(found) = in_json(source, name)? {
            return Ok(found);
        }
    }
    let additional = format!("{ADDITIONAL}/{DEFAULT}.jinja");
    for name in [TEMPLATE, &additional] {
        if let Some(bytes) = source.read(name)? {
            let path = source.path(name);
            let template = String::from_utf8(bytes);
            return match template {
                Ok(template) => Ok((template, path)),
                Err(e) => Err(Error::file(&path, e, "Save it as UTF-8")),
            };
        }
    }
    if !others.is_empty() {
        return Err(Error::file(
            &source.path(ADDITIONAL),
            no_default(&others),
            NAME_IT,
        ));
    }
    match in_json(source, TOKENIZER_CONFIG)? {
        Some(found) => Ok(found),
        None => Ok((PUBLISHED.into(), source.path(TEMPLATE))),
    }
}

fn in_json(source: &Source, name: &str) -> Result<Option<(String, PathBuf)>> {
    let json = source.read_json(name)?;
    let found = json.as_ref().and_then(|json| json.get("chat_template"));
    let path = source.path(name);
    let template = found.map(parse_key).transpose();
    let template = template.map_err(|reason| Error::file(&path, reason, NAME_IT))?;
    Ok(template.flatten().map(|template| (template, path)))
}

/// The template of a `chat_template` key: a text, or several with names as an object or a list.
fn parse_key(templates: &Value) -> Result<Option<String>, String> {
    let of_list = |template: &Value| {
        let text = |key| template.get(key)?.as_str().map(str::to_owned);
        Some((text("name")?, text("template")?))
    };
    let templates: Vec<_> = match templates {
        Value::Null => return Ok(None),
        Value::String(template) => return Ok(Some(template.clone())),
        Value::Object(templates) => {
            let templates = templates.iter();
            templates
                .filter_map(|(name, template)| Some((name.clone(), template.as_str()?.to_owned())))
                .collect()
        }
        Value::Array(templates) => templates.iter().filter_map(of_list).collect(),
        _ => return Err("has a `chat_template` that is not a string".into()),
    };
    choose(templates)
}

/// The template named `default` of (name, template) pairs; `None` if there are no pairs.
pub(crate) fn choose(mut templates: Vec<(String, String)>) -> Result<Option<String>, String> {
    let default = templates.iter().position(|(name, _)| name == DEFAULT);
    match default {
        Some(default) => Ok(Some(templates.swap_remove(default).1)),
        None if templates.is_empty() => Ok(None),
        None => {
            let names: Vec<_> = templates.into_iter().map(|(name, _)| name).collect();
            Err(no_default(&names))
        }
    }
}

fn no_default(names: &[String]) -> String {
    format!(
        "has chat templates and none is named `{DEFAULT}`: {}",
        names.join(", ")
    )
}

const NAME_IT: &str = "Name the one to use `default`, or put it into chat_template.jinja";

fn additional_names(source: &Source) -> Vec<String> {
    let Source::Folder(folder) = source else {
        return Vec::new();
    };
    let files = folder.join(ADDITIONAL).read_dir();
    let files = files
        .into_iter()
        .flatten()
        .flatten()
        .map(|file| file.path());
    let files = files.filter(|path| path.extension().is_some_and(|e| e == "jinja"));
    let mut names: Vec<_> = files
        .filter_map(|path| Some(path.file_stem()?.to_string_lossy().into_owned()))
        .collect();
    names.sort();
    names
}

/// Reads the special tokens by the names that transformers 5 gives them in templates (`special_tokens_map`).
///
/// From `tokenizer_config.json` or the older `special_tokens_map.json`: those of [`SPECIAL_TOKENS`], keys that end in
/// `_token`, and `extra_special_tokens` if an object. Tokens without a name are left out.
pub(crate) fn special_tokens(source: &Source) -> Result<SpecialTokens> {
    let config = source.read_json(TOKENIZER_CONFIG)?.unwrap_or_default();
    let map = match config.get("added_tokens_decoder") {
        Some(_) => Value::Null,
        None => source.read_json(SPECIAL_TOKENS_MAP)?.unwrap_or_default(),
    };
    let is_standard = |name: &str| SPECIAL_TOKENS.contains(&name);
    let mut tokens = SpecialTokens::new();
    // Later files override earlier ones.
    for (json, must_be_typed) in [(&map, false), (&config, true)] {
        let own = json.as_object().into_iter().flatten();
        let own = own.filter(|(name, token)| {
            let is_token = token.is_string() || !must_be_typed || token["__type"] == "AddedToken";
            name.ends_with("_token") && !is_standard(name) && is_token
        });
        tokens.extend(own.filter_map(named_token));
    }
    for name in SPECIAL_TOKENS {
        let found = [&map, &config].into_iter().find_map(|json| json.get(name));
        tokens.extend(found.and_then(|token| named_token((name, token))));
    }
    for json in [&config, &map] {
        let extra = json.get("extra_special_tokens").and_then(Value::as_object);
        tokens.extend(extra.into_iter().flatten().filter_map(named_token));
    }
    Ok(tokens)
}

/// A token given as text or as an `AddedToken` object.
fn named_token((name, token): (impl Into<String>, &Value)) -> Option<(String, String)> {
    let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
    Some((name.into(), text.into()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    /// A folder with these files.
    fn folder(files: &[(&str, &str)]) -> (tempfile::TempDir, Source) {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let source = Source::Folder(folder.path().into());
        (folder, source)
    }

    const JINJA: (&str, &str) = (TEMPLATE, "of jinja");
    const NAMED: (&str, &str) = ("additional_chat_templates/default.jinja", "named");
    const TOOLS: (&str, &str) = ("additional_chat_templates/tool_use.jinja", "tools");
    const OLD: (&str, &str) = (LEGACY, r#"{"chat_template": "legacy"}"#);
    const PROCESSOR: (&str, &str) = (PROCESSOR_CONFIG, r#"{"chat_template": "processor"}"#);
    const NO_TEMPLATE: (&str, &str) = (PROCESSOR_CONFIG, r#"{"chat_template": null}"#);
    const TOKENIZER: (&str, &str) = (TOKENIZER_CONFIG, r#"{"chat_template": "tokenizer"}"#);

    /// The order of `ProcessorMixin.get_processor_dict`, then the tokenizer's configuration.
    #[test]
    fn a_template_is_looked_for_in_transformers_order() {
        for (files, template, file) in [
            (
                &[PROCESSOR, OLD, JINJA, TOKENIZER][..],
                "processor",
                PROCESSOR_CONFIG,
            ),
            (&[PROCESSOR, NAMED], "processor", PROCESSOR_CONFIG),
            (&[NO_TEMPLATE, OLD, JINJA, TOKENIZER], "legacy", LEGACY),
            (&[JINJA, NAMED, TOKENIZER], "of jinja", TEMPLATE),
            (&[JINJA, TOOLS], "of jinja", TEMPLATE),
            (&[NAMED, TOOLS, TOKENIZER], "named", NAMED.0),
            (
                &[("additional_chat_templates/README.md", "none"), TOKENIZER],
                "tokenizer",
                TOKENIZER_CONFIG,
            ),
            (&[TOKENIZER], "tokenizer", TOKENIZER_CONFIG),
            (&[NO_TEMPLATE], PUBLISHED, TEMPLATE),
            (&[], PUBLISHED, TEMPLATE),
        ] {
            let (folder, source) = folder(files);
            let expected = (template.to_owned(), folder.path().join(file));
            assert_eq!(chat_template(&source).unwrap(), expected, "{files:?}");
        }
    }

    #[test]
    fn of_several_templates_it_is_the_default() {
        let of = |templates: Value| {
            let json = json!({"chat_template": templates}).to_string();
            let (_folder, source) = folder(&[(PROCESSOR_CONFIG, &json)]);
            let found = chat_template(&source).map(|(template, _)| template);
            found.map_err(|error| error.to_string())
        };
        for templates in [
            json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]),
            json!({"tool_use": "t", "default": "d"}),
        ] {
            assert_eq!(of(templates).as_deref(), Ok("d"));
        }
        assert_eq!(of(json!([])).as_deref(), Ok(PUBLISHED));
        for templates in [
            json!([{"name": "tool_use", "template": "t"}, {"name": "rag", "template": "r"}]),
            json!({"tool_use": "t", "rag": "r"}),
        ] {
            let error = of(templates).unwrap_err();
            for word in [
                PROCESSOR_CONFIG,
                "none is named `default`",
                "tool_use",
                "rag",
                NAME_IT,
            ] {
                assert!(error.contains(word), "{word}: {error}");
            }
        }
        let error = of(json!(7)).unwrap_err();
        assert!(
            error.contains("a `chat_template` that is not a string"),
            "{error}"
        );
    }

    #[test]
    fn templates_that_leave_the_choice_open_are_refused() {
        for (files, words) in [
            (
                &[TOOLS, TOKENIZER][..],
                &[ADDITIONAL, "none is named `default`: tool_use", NAME_IT][..],
            ),
            (
                &[OLD, NAMED],
                &[
                    LEGACY,
                    "can't be combined",
                    "Save its template as chat_template.jinja",
                ],
            ),
            (&[PROCESSOR, OLD, TOOLS], &[LEGACY, "can't be combined"]),
        ] {
            let (_folder, source) = folder(files);
            let error = chat_template(&source).unwrap_err().to_string();
            for word in words {
                assert!(error.contains(word), "{word}: {error}");
            }
        }
        let (folder, source) = folder(&[]);
        fs::write(folder.path().join(TEMPLATE), b"caf\xe9").unwrap();
        let error = chat_template(&source).unwrap_err().to_string();
        assert!(
            error.contains(TEMPLATE) && error.contains("Save it as UTF-8"),
            "{error}"
        );
    }

    /// `AutoTokenizer.from_pretrained(folder).special_tokens_map` of transformers 5.24 gave each of these.
    #[test]
    fn special_tokens_have_the_names_of_transformers() {
        let typed = |token| json!({"__type": "AddedToken", "content": token});
        let untyped = |token| json!({"content": token, "lstrip": false});
        for (config, map, expected) in [
            (
                json!({"bos_token": "<s>", "pad_token": null, "sep_token": typed("<sep>"), "add_bos_token": true}),
                Value::Null,
                json!({"bos_token": "<s>", "sep_token": "<sep>"}),
            ),
            (
                json!({"additional_special_tokens": ["<image>"], "extra_special_tokens": ["<x>"]}),
                Value::Null,
                json!({}),
            ),
            (
                json!({"image_token": "<image>", "tile_token": typed("<tile>"), "no_token": untyped("<no>"), "other": "x"}),
                Value::Null,
                json!({"image_token": "<image>", "tile_token": "<tile>"}),
            ),
            (
                json!({"extra_special_tokens": {"image_token": "<image>", "boi": "<boi>", "typed": typed("<t>")}}),
                Value::Null,
                json!({"image_token": "<image>", "boi": "<boi>", "typed": "<t>"}),
            ),
            (
                json!({"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}),
                json!({"bos_token": untyped("<map>"), "pad_token": null, "image_token": untyped("<image>")}),
                json!({"bos_token": "<map>", "eos_token": "</s>", "image_token": "<image>"}),
            ),
            (
                json!({"image_token": "<image>"}),
                json!({"image_token": "<map>"}),
                json!({"image_token": "<image>"}),
            ),
            (
                json!({"extra_special_tokens": {"a_token": "<a>", "b": "<b>"}}),
                json!({"extra_special_tokens": {"b": "<map>", "c": "<c>"}}),
                json!({"a_token": "<a>", "b": "<map>", "c": "<c>"}),
            ),
            (
                json!({"bos_token": "<s>", "extra_special_tokens": {"bos_token": "<extra>"}}),
                Value::Null,
                json!({"bos_token": "<extra>"}),
            ),
            (
                json!({"added_tokens_decoder": {}, "bos_token": "<s>"}),
                json!({"bos_token": "<map>", "image_token": "<image>"}),
                json!({"bos_token": "<s>"}),
            ),
            (
                Value::Null,
                json!({"eos_token": "</s>"}),
                json!({"eos_token": "</s>"}),
            ),
        ] {
            let (config_json, map_json) = (config.to_string(), map.to_string());
            let files = [
                (TOKENIZER_CONFIG, &*config_json),
                (SPECIAL_TOKENS_MAP, &map_json),
            ];
            let files = files.into_iter().filter(|(_, json)| *json != "null");
            let (_folder, source) = folder(&Vec::from_iter(files));
            let tokens = serde_json::to_value(special_tokens(&source).unwrap()).unwrap();
            assert_eq!(tokens, expected, "{config} {map}");
        }
    }
}
