//! Where a checkpoint has its chat template and the tokens that go into it, in transformers' order.

use std::path::PathBuf;

use serde_json::Value;

use super::{
    super::{Error, Result, Source, source::PROCESSOR_CONFIG},
    SpecialTokens,
};

/// For folders that come without one: the demo model has the template of every published checkpoint.
pub(in super::super) const PUBLISHED: &str =
    include_str!("../../../models/demo/chat_template.jinja");

const TEMPLATE: &str = "chat_template.jinja";
const ADDITIONAL: &str = "additional_chat_templates";
const DEFAULT: &str = "default";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";

/// As tokenizers name them.
const SPECIAL_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// What the template and its tokens may be from.
pub(in super::super) const FILES: [&str; 5] = [
    TEMPLATE,
    "additional_chat_templates/default.jinja",
    "chat_template.json",
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
];

/// The template that is named `default` where there are several, and its file.
pub(in super::super) fn chat_template(source: &Source) -> Result<(String, PathBuf)> {
    for name in [PROCESSOR_CONFIG, "chat_template.json"] {
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
    let others = additional_names(source);
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
    let json = source.json(name)?;
    let found = json.as_ref().and_then(|json| json.get("chat_template"));
    let path = source.path(name);
    let template = found.map(named).transpose();
    let template = template.map_err(|reason| Error::file(&path, reason, NAME_IT))?;
    Ok(template.flatten().map(|template| (template, path)))
}

/// A template, or several by name, as a dict or as a list.
fn named(templates: &Value) -> Result<Option<String>, String> {
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
        _ => return Err("has a `chat_template` that is no text".into()),
    };
    choose(templates)
}

/// The template to take of several; `None` of none.
pub(in super::super) fn choose(
    mut templates: Vec<(String, String)>,
) -> Result<Option<String>, String> {
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

/// Of the tokenizer's configuration, or of the older file of their own.
pub(in super::super) fn special_tokens(source: &Source) -> Result<SpecialTokens> {
    let config = source.json(TOKENIZER_CONFIG)?.unwrap_or_default();
    let map = match config.get("added_tokens_decoder") {
        Some(_) => Value::Null,
        None => source.json(SPECIAL_TOKENS_MAP)?.unwrap_or_default(),
    };
    let token = |name: &str| {
        let token = [&map, &config]
            .into_iter()
            .find_map(|json| json.get(name))?;
        // As it is, or with how it is looked for.
        let token = token.as_str().or_else(|| token.get("content")?.as_str())?;
        Some((name.to_owned(), token.to_owned()))
    };
    Ok(SPECIAL_TOKENS.into_iter().filter_map(token).collect())
}
