//! Chat templates of models: where they are found, and what they refuse.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::common::gguf::{TEXT, changed};
use candle_core::quantized::gguf_file::Value;
use gst::prelude::*;
use vlmnarrate_smolvlm::{Checkpoint, Source};

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo")
}

/// What a model's files get wrong is told of once, before the first frame, by the name of the file.
#[test]
fn a_chat_template_that_fails_is_an_error_at_load() {
    crate::common::init();
    for (template, says) in [
        ("{% if %}", "does not parse"),
        ("{{ messages[0].gone.away }}", "fails"),
        (
            "{{ raise_exception('not with pictures') }}",
            "not with pictures",
        ),
        ("{{ messages[0].role }}", "writes 0 times `<image>`"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
        for file in std::fs::read_dir(demo).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
        }
        std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
        let narrator = gst::ElementFactory::make("vlmnarrate")
            .property("model", folder.path().to_str().unwrap())
            .build()
            .unwrap();
        let log = crate::common::Log::of(&narrator);
        assert!(narrator.set_state(gst::State::Ready).is_err());
        let heard = log.heard();
        let error = heard.errors[0].0.to_string();
        assert!(
            error.contains("chat_template.jinja") && error.contains(says),
            "{error}"
        );
        assert_eq!((heard.errors.len(), heard.warnings.len()), (1, 0));
        narrator.set_state(gst::State::Null).unwrap();
    }
}

/// A template that says which it is.
fn raises(what: &str) -> String {
    format!("{{{{ raise_exception('this is {what}') }}}}")
}

#[test]
fn a_gguf_file_may_name_its_templates() {
    const KEY: &str = "tokenizer.chat_template";
    for (templates, says) in [
        (
            &[("", "the one"), (".default", "another")][..],
            "this is the one",
        ),
        (
            &[(".rag", "for documents"), (".default", "the default")],
            "this is the default",
        ),
        (
            &[(".rag", "for documents"), (".tool_use", "for tools")],
            "none is named `default`: rag, tool_use",
        ),
    ] {
        let folder = changed(|text, _| {
            text.metadata.remove(KEY).unwrap();
            for (name, what) in templates {
                text.set(&format!("{KEY}{name}"), Value::String(raises(what)));
            }
        });
        let source = Source::parse(Some(folder.path().as_os_str()), None).unwrap();
        let error = Checkpoint::open(&source).unwrap_err().to_string();
        assert!(error.contains(TEXT) && error.contains(says), "{error}");
    }
}

/// Those that are not there are no errors: the others tests of downloads have none of them.
#[cfg(feature = "hub")]
#[test]
fn named_templates_are_downloaded() {
    for (names, file, says) in [
        (
            &["default", "tool_use"][..],
            "additional_chat_templates/default.jinja",
            "this is default",
        ),
        (
            &["rag", "tool_use"],
            "additional_chat_templates",
            "none is named `default`: rag, tool_use",
        ),
    ] {
        let mut files = std::collections::BTreeMap::new();
        for file in fs::read_dir(demo()).unwrap() {
            let file = file.unwrap();
            let name = file.file_name().into_string().unwrap();
            files.insert(name, fs::read(file.path()).unwrap());
        }
        files.remove("chat_template.jinja").unwrap();
        for name in names {
            let file = format!("additional_chat_templates/{name}.jinja");
            files.insert(file, raises(name).into_bytes());
        }
        files.insert(
            "additional_chat_templates/more/a.jinja".into(),
            b"a".to_vec(),
        );
        let hub = crate::common::hub::Hub::start(files);
        let home = tempfile::tempdir().unwrap();
        // SAFETY: alone in its process.
        unsafe {
            std::env::set_var("HF_HOME", home.path());
            std::env::set_var("HF_ENDPOINT", hub.endpoint());
        }
        let narrator = crate::common::narrator(&crate::common::Fake::new());
        narrator.set_engine_loader(gstvlmnarrate::SmolVlmLoader);
        narrator.set_property("model", crate::common::hub::ID);
        let log = crate::common::Log::of(&narrator);
        narrator.set_state(gst::State::Ready).unwrap();
        let heard = log.wait(|heard| !heard.errors.is_empty());
        let error = heard.errors[0].0.to_string();
        assert!(error.contains(file) && error.contains(says), "{error}");
        assert!(
            hub.requests()
                .iter()
                .all(|request| !request.path.contains("more/"))
        );
        narrator.set_state(gst::State::Null).unwrap();
    }
}
