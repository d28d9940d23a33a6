//! Settings that no frame can be described with: an ERROR when the model is loaded, a WARNING a frame when they come
//! later.

use std::{fs, path::Path};

use crate::common::{Fake, Heard, Pipeline};
use gst::prelude::*;
use gstvlmnarrate::SmolVlmLoader;
use tempfile::TempDir;

const LINE: &str = "videotestsrc num-buffers=2 ! video/x-raw,width=64,height=48,framerate=1/1
                    ! vlmnarrate name=n image-size=64 max-tokens=2 ! fakesink";

/// The demo model with another chat template.
fn with_template(template: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    for file in fs::read_dir(demo).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
    }
    fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    folder
}

fn pipeline(line: &str, model: Option<&TempDir>) -> Pipeline {
    let pipeline = Pipeline::new(line, &Fake::new());
    pipeline.narrator.set_engine_loader(SmolVlmLoader);
    if let Some(model) = model {
        pipeline
            .narrator
            .set_property("model", model.path().to_str());
    }
    pipeline
}

/// One ERROR of this class, no WARNING and no caption.
#[track_caller]
fn is_one_error(heard: &Heard, class: gst::ResourceError, words: &[&str]) {
    assert_eq!(heard.texts(), [""; 0]);
    assert_eq!(
        (heard.errors.len(), heard.warnings.len()),
        (1, 0),
        "{heard:#?}"
    );
    let (error, source) = &heard.errors[0];
    println!("{error}");
    assert_eq!(source, "n");
    assert!(error.matches(class), "{error:?}");
    for word in words {
        assert!(error.message().contains(word), "{word}: {error}");
    }
    assert!(!error.message().contains('\n'), "{error}");
    assert_eq!(heard.progress.last().unwrap().0, gst::ProgressType::Error);
}

/// Sets it before the model is loaded, and behind the first caption. Gives what the former is heard of.
#[track_caller]
fn early_and_late(model: Option<&TempDir>, property: &str, value: &str, words: &[&str]) -> Heard {
    let late = pipeline(LINE, model);
    late.narrator.set_property_from_str("mode", "recorded");
    let entry = late.narrator.static_pad("sink").unwrap();
    let narrator = late.narrator.downgrade();
    let (property_, value_) = (property.to_owned(), value.to_owned());
    entry.add_probe(gst::PadProbeType::BUFFER, move |_, info| {
        if info.buffer().unwrap().pts() > Some(gst::ClockTime::ZERO) {
            let narrator = narrator.upgrade().unwrap();
            narrator.set_property_from_str(&property_, &value_);
        }
        gst::PadProbeReturn::Ok
    });
    let heard = late.run_to_eos();
    assert_eq!(
        (heard.captions.len(), heard.warnings.len()),
        (1, 1),
        "{heard:#?}"
    );
    for word in words {
        assert!(
            heard.warnings[0].contains(word),
            "{word}: {:?}",
            heard.warnings
        );
    }

    let early = pipeline(LINE, model);
    early.narrator.set_property_from_str(property, value);
    early.run()
}

#[test]
fn choices_that_can_not_be_written() {
    let words = ["choices: ", "`<end_of_utterance>`", "can't be written"];
    let heard = early_and_late(None, "choices", "yes|<end_of_utterance>", &words);
    is_one_error(&heard, gst::ResourceError::Settings, &words);
}

#[test]
fn a_picture_in_a_prompt() {
    for property in ["prompt", "system-prompt"] {
        let words = [
            &*format!("{property}: "),
            "`is <image> one?`",
            "the placeholder of a picture; leave it out",
        ];
        let heard = early_and_late(None, property, "is <image> one?", &words);
        is_one_error(&heard, gst::ResourceError::Settings, &words);
    }
    // Other special tokens may stand there.
    let odd = pipeline(LINE, None);
    odd.narrator
        .set_property("prompt", "<end_of_utterance><|im_start|>");
    assert_eq!(odd.run_to_eos().captions.len(), 2);
}

const PARTS: &str = "{% for m in messages %}{% for c in m.content %}\
    {{ '<image>' if c.type == 'image' else c.text }}{% endfor %}{% endfor %}";

#[test]
fn a_system_prompt_that_the_template_refuses() {
    let raises =
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}";
    let model = with_template(&format!("{raises}{PARTS}"));
    let words = [
        "chat_template.jinja",
        "no system role",
        "unset system-prompt",
    ];
    let heard = early_and_late(Some(&model), "system-prompt", "Be brief.", &words);
    is_one_error(&heard, gst::ResourceError::OpenRead, &words);
    // Without one it is a model as any other, with the empty string for one too.
    let without = pipeline(LINE, Some(&model));
    without.narrator.set_property("system-prompt", "");
    assert_eq!(without.run_to_eos().captions.len(), 2);
}

#[test]
fn pictures_that_the_template_leaves_out() {
    let first = "{% set ns = namespace(seen=false) %}{% for c in messages[-1].content %}{% if c.type == 'text' %}\
        {{ c.text }}{% elif not ns.seen %}<image>{% set ns.seen = true %}{% endif %}{% endfor %}";
    let model = with_template(first);
    let clips = pipeline(
        "videotestsrc num-buffers=8 ! video/x-raw,width=64,height=48,framerate=8/1
         ! vlmnarrate name=n max-tokens=2 frames=4 ! fakesink",
        Some(&model),
    );
    let words = [
        "chat_template.jinja",
        "writes 1 times `<image>` for 4 pictures",
    ];
    is_one_error(&clips.run(), gst::ResourceError::OpenRead, &words);
    assert_eq!(pipeline(LINE, Some(&model)).run_to_eos().captions.len(), 2);
}

#[test]
fn more_tokens_than_the_model_has_positions() {
    let words = ["4000 of the answer exceed the model's", "Lower frames"];
    let heard = early_and_late(None, "max-tokens", "4000", &words);
    is_one_error(&heard, gst::ResourceError::Settings, &words);
    // Choices are as long as they are.
    let choices = pipeline(LINE, None);
    choices.narrator.set_property("max-tokens", 4000u32);
    choices.narrator.set_property("choices", "yes|no");
    assert_eq!(choices.run_to_eos().captions.len(), 2);

    let clips = pipeline(
        "videotestsrc num-buffers=64 ! video/x-raw,width=32,height=32
         ! vlmnarrate name=n frames=64 interval=0 ! fakesink",
        None,
    );
    let words = ["2048. Lower frames"];
    is_one_error(&clips.run(), gst::ResourceError::Settings, &words);
}

/// The model needs no other state than READY to be loaded anew.
#[test]
fn a_setting_that_is_corrected_is_taken() {
    let corrected = pipeline(LINE, None);
    let narrator = &corrected.narrator;
    narrator.set_property("choices", "yes|<end_of_utterance>");
    corrected.reach(gst::State::Ready);
    let heard = corrected.log.wait(|heard| !heard.errors.is_empty());
    assert!(
        heard.errors[0].0.message().starts_with("choices: "),
        "{heard:#?}"
    );
    narrator.set_property("choices", "yes|no");
    let heard = corrected.run_to_eos();
    assert_eq!(
        (heard.captions.len(), heard.errors.len()),
        (2, 0),
        "{heard:#?}"
    );
}

/// What only describe-now asks is told of when it asks.
#[test]
fn a_detail_prompt_is_not_looked_at() {
    let detail = pipeline(LINE, None);
    detail
        .narrator
        .set_property("detail-prompt", "is <image> one?");
    detail.reach(gst::State::Ready);
    detail.narrator.describe_now(None, None).unwrap();
    let heard = detail.run_to_eos();
    assert_eq!(
        (heard.captions.len(), heard.warnings.len()),
        (2, 1),
        "{heard:#?}"
    );
}
