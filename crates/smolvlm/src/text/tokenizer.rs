//! `tokenizer.json`, checked before the `tokenizers` crate parses it.
//!
//! The crate panics on components that don't parse, on merges into missing tokens and on words shorter than their
//! `continuing_subword_prefix`. Components that no SmolVLM has are refused.

use serde_json::Value;
use tokenizers::Tokenizer;

/// Checks and parses a `tokenizer.json`. The error is a reason without the file's name.
pub(crate) fn from_json(json: &[u8]) -> Result<Tokenizer, String> {
    let json: Value = serde_json::from_slice(json).map_err(|e| e.to_string())?;
    for key in ["normalizer", "pre_tokenizer", "post_processor", "decoder"] {
        check_component(key, &json[key])?;
    }
    check_model(&json["model"])?;
    // Not the file's bytes: of a duplicate key, `tokenizers` might take the value that was not checked.
    Tokenizer::from_bytes(json.to_string()).map_err(|e| e.to_string())
}

fn check_component(key: &str, component: &Value) -> Result<(), String> {
    let lists = match component["type"].as_str() {
        None if component.is_null() => return Ok(()),
        Some("ByteLevel" | "Digits") => return Ok(()),
        Some("TemplateProcessing") => return check_template(component),
        Some("Sequence") => ["pretokenizers", "processors", "decoders"],
        kind => {
            return Err(format!(
                "has a `{key}` of the type `{}`, which no SmolVLM has",
                kind.unwrap_or("none")
            ));
        }
    };
    let components = lists.iter().filter_map(|list| component[*list].as_array());
    components
        .flatten()
        .try_for_each(|component| check_component(key, component))
}

/// Checks that a `TemplateProcessing` takes one text and knows its special tokens.
fn check_template(template: &Value) -> Result<(), String> {
    let is_known = |piece: &Value| {
        let special = piece["SpecialToken"]["id"].as_str();
        piece["Sequence"]["id"] == "A"
            || special.is_some_and(|id| template["special_tokens"].get(id).is_some())
    };
    let pieces = template["single"].as_array();
    match pieces.into_iter().flatten().find(|piece| !is_known(piece)) {
        Some(piece) => Err(format!(
            "has `{piece}` in its template, which is not defined"
        )),
        None => Ok(()),
    }
}

fn check_model(model: &Value) -> Result<(), String> {
    let kind = model["type"].as_str().unwrap_or("none");
    if kind != "BPE" || !model["continuing_subword_prefix"].is_null() {
        return Err(format!(
            "has a model of the type `{kind}`, not SmolVLM's `BPE` without a `continuing_subword_prefix`"
        ));
    }
    let is_token = |token: &str| model["vocab"].get(token).is_some();
    let merges = model["merges"].as_array();
    merges.into_iter().flatten().try_for_each(|merge| {
        // Pairs since tokenizers 0.20, lines before.
        let pair = match merge {
            Value::Array(pair) => match &pair[..] {
                [Value::String(left), Value::String(right)] => Some((&left[..], &right[..])),
                _ => None,
            },
            Value::String(line) if line.starts_with("#version") => return Ok(()),
            Value::String(line) => line.split_once(' '),
            _ => None,
        };
        let (left, right) =
            pair.ok_or_else(|| format!("has the merge `{merge}`, which is not a pair of tokens"))?;
        check_merge(left, right, is_token)
    })
}

/// Checks that the merge of two tokens is a token.
pub(crate) fn check_merge(
    left: &str,
    right: &str,
    is_token: impl FnOnce(&str) -> bool,
) -> Result<(), String> {
    match is_token(&format!("{left}{right}")) {
        true => Ok(()),
        false => Err(format!(
            "merges `{left}` and `{right}` into a token that does not exist"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BPE: &str = r#"{"type":"BPE","vocab":{"a":0,"b":1,"ab":2},"merges":[["a","b"]]}"#;

    fn parse(parts: &str, model: &str) -> Result<Tokenizer, String> {
        let json = format!(r#"{{"version":"1.0","added_tokens":[],{parts}"model":{model}}}"#);
        from_json(json.as_bytes())
    }

    #[test]
    fn merges_are_of_tokens_into_tokens() {
        for merges in [
            r#"[["a","b"]]"#,
            r#"["a b"]"#,
            r##"["#version: 0.2","a b"]"##,
        ] {
            parse("", &BPE.replace(r#"[["a","b"]]"#, merges)).unwrap();
        }
        for (model, says) in [
            (BPE.replace(r#","ab":2"#, ""), "merges `a` and `b`"),
            (BPE.replace(r#"[["a","b"]]"#, r#"["ab"]"#), "`\"ab\"`"),
            (BPE.replace("BPE", "WordLevel"), "`WordLevel`"),
            (
                BPE.replace("vocab", r###"continuing_subword_prefix":"##","vocab"###),
                "continuing_subword_prefix",
            ),
        ] {
            let error = parse("", &model).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn parts_that_no_smolvlm_has_are_not_read() {
        let level = r#"{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true}"#;
        let decoder = format!(r#""decoder":{level},"#);
        parse(&decoder, BPE).unwrap();
        for parts in [
            r#""normalizer":{"type":"Precompiled","precompiled_charsmap":""},"#,
            r#""pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Split"}]},"#,
            r#""decoder":7,"#,
        ] {
            let error = parse(parts, BPE).unwrap_err();
            assert!(error.contains("which no SmolVLM has"), "{error}");
        }
        let template = |piece: &str| {
            let pieces = format!(r#"[{piece},{{"Sequence":{{"id":"A","type_id":0}}}}]"#);
            let special = r#"{"a":{"id":"a","ids":[0],"tokens":["a"]}}"#;
            let template = format!(
                r#""post_processor":{{"type":"TemplateProcessing","single":{pieces},"pair":[],"special_tokens":{special}}},"#
            );
            parse(&template, BPE)
        };
        let tokenizer = template(r#"{"SpecialToken":{"id":"a","type_id":0}}"#).unwrap();
        assert_eq!(tokenizer.encode("ab", true).unwrap().get_ids(), [0, 2]);
        for piece in [
            r#"{"SpecialToken":{"id":"x","type_id":0}}"#,
            r#"{"Sequence":{"id":"B","type_id":1}}"#,
        ] {
            let error = template(piece).unwrap_err();
            assert!(error.contains("in its template"), "{error}");
        }
        // In what is not UTF-8, `tokenizers` looks for a decoder all the same.
        let mut json = format!(r#"{{"version":"1.0",{decoder}"model":{BPE}}}"#).into_bytes();
        let at = json.iter().position(|&b| b == b'L').unwrap();
        json[at] = 0xff;
        assert!(from_json(&json).is_err());
        let twice = format!(r#""normalizer":{{"type":"Precompiled"}},"normalizer":null,{decoder}"#);
        parse(&twice, BPE).unwrap();
    }
}
