//! Waits for a word in the captions of a video, and then requests a detailed caption of the same moment.
//!
//! ```sh
//! cargo run --example watch -- [URI WORD [MODEL]]
//! ```
//!
//! Without arguments it plays a test pattern.

use std::{env, error::Error, process::ExitCode};

use gst::prelude::*;
use gstvlmnarrate::{Caption, VlmNarrate};

const USAGE: &str = "watch [URI WORD [MODEL]]";

/// Builds the pipeline, and returns its narrator too.
fn build(
    uri: Option<&str>,
    model: Option<&str>,
) -> Result<(gst::Pipeline, VlmNarrate), Box<dyn Error>> {
    let screen = ["DISPLAY", "WAYLAND_DISPLAY"]
        .into_iter()
        .any(|name| env::var_os(name).is_some());
    // In real time, so that the picture is still about the same when the request comes.
    let sink = if screen {
        "autovideosink"
    } else {
        "fakesink sync=true"
    };
    let source = match uri {
        Some(_) => "uridecodebin name=source",
        None => "videotestsrc pattern=ball num-buffers=90 ! video/x-raw,framerate=30/1",
    };
    let description =
        format!("{source} ! videoconvert ! vlmnarrate name=narrator ! videoconvert ! {sink}");
    let pipeline = gst::parse::launch(&description)?;
    let pipeline = pipeline
        .downcast::<gst::Pipeline>()
        .map_err(|_| "not a pipeline")?;
    if let Some(source) = pipeline.by_name("source") {
        source.set_property("uri", uri);
    }
    let narrator = pipeline
        .by_name("narrator")
        .and_downcast::<VlmNarrate>()
        .ok_or("no narrator")?;
    narrator.set_property("model", model);
    Ok((pipeline, narrator))
}

/// Plays the video to its end.
fn watch(
    pipeline: &gst::Pipeline,
    narrator: &VlmNarrate,
    word: &str,
) -> Result<(), Box<dyn Error>> {
    let mut seen = false;
    let bus = pipeline.bus().ok_or("no bus")?;
    for message in bus.iter_timed(gst::ClockTime::NONE) {
        let caption = match message.view() {
            gst::MessageView::Element(element) => element.structure().map(Caption::try_from),
            gst::MessageView::Eos(_) => break,
            gst::MessageView::Error(error) => return Err(error.error().into()),
            _ => None,
        };
        let Some(Ok(caption)) = caption else { continue };
        let time = caption.stamp.stream_time.unwrap_or_default().nseconds() as f64 / 1e9;
        if caption.stamp.request_id != 0 {
            println!(
                "{time:7.2} s  answer {}: {}",
                caption.stamp.request_id, caption.text
            );
            continue;
        }
        println!("{time:7.2} s  {}", caption.text);
        let was_seen = std::mem::replace(&mut seen, says(&caption.text, word));
        if seen && !was_seen {
            // None stands for the properties detail-prompt and detail-max-tokens.
            let request = narrator
                .describe_now(None, None)
                .ok_or("too many requests wait")?;
            println!("{time:7.2} s  *** {word} *** request {request}");
        }
    }
    Ok(())
}

fn says(text: &str, word: &str) -> bool {
    let word = word.to_lowercase();
    text.split(|c: char| !c.is_alphanumeric())
        .any(|said| said.to_lowercase() == word)
}

fn run(uri: Option<&str>, word: &str, model: Option<&str>) -> Result<(), Box<dyn Error>> {
    gst::init()?;
    gstvlmnarrate::plugin_register_static()?;
    let (pipeline, narrator) = build(uri, model)?;
    // The reason of a failure is on the bus.
    let _ = pipeline.set_state(gst::State::Playing);
    let watched = watch(&pipeline, &narrator, word);
    pipeline.set_state(gst::State::Null)?;
    watched.map_err(|error| format!("{}: {error}", uri.unwrap_or("test picture")).into())
}

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let done = match arguments[..] {
        [] => run(None, "ball", None),
        [uri, word] => run(Some(uri), word, None),
        [uri, word, model] => run(Some(uri), word, Some(model)),
        _ => Err(format!("usage: {USAGE}").into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("watch: {error}");
            ExitCode::FAILURE
        }
    }
}
