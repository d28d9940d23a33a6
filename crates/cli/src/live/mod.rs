//! Shows live video with its captions.

use std::{cell::RefCell, env};

use anyhow::{Context, Result};
use gst::{ClockTime, prelude::*};
use gstvlmnarrate::Caption;

use crate::{
    arguments::Live,
    narrate::suggest,
    output::{Format, Output, Target},
    progress::Progress,
    properties::Properties,
    run::{End, Ending, Run},
    serve::serve_live,
    units::clock,
    writers::{Ended, TextWriter, Writer},
};

pub mod source;

use source::Source;

/// How much later than its time a frame is shown: what reading, converting and drawing may take.
const DELAY: ClockTime = ClockTime::from_mseconds(100);

/// Frames that the window has no time for are dropped: it shows the newest.
const QUEUE: &str = "queue leaky=downstream max-size-buffers=3 max-size-bytes=0 max-size-time=0";

/// Shows a source in a window, and prints its captions, until it ends or somebody has seen enough.
///
/// # Errors
///
/// There is no such source, or its stream fails.
pub fn live(arguments: &Live, properties: &Properties) -> Result<End> {
    let outputs = &arguments.outputs;
    let output = outputs.output.clone().unwrap_or_else(|| "-".into());
    let target = Target::choose(&output, outputs.format, &[Format::Txt, Format::Jsonl])?;
    let source = Source::open(arguments.source.as_deref())?;
    if let Some(address) = &arguments.serve {
        let narrator = "vlmnarrate name=narrator mode=live partial-captions=true";
        let build = |rest: &str| pipeline(&source, &format!("{narrator} ! {rest}"), properties);
        return serve_live(&source.name, address, outputs.quiet, build);
    }
    let (output, format) = match target {
        Target::Stdout(format) => (None, format),
        Target::File(path, format) => (Some(Output::create(&path, &[], outputs.force)?), format),
    };
    let mut progress = Progress::new(outputs.quiet);
    let no_window = why_no_window();
    if let Some(why) = &no_window
        && !outputs.quiet
    {
        progress.say(&format!(
            "There is no screen ({why}): captions are printed only. A web page shows the picture too: --serve"
        ));
    }
    let pipeline = pipeline(&source, &rest(no_window.is_none()), properties)?;
    if !outputs.quiet {
        progress.say(&format!("Watching {}; Ctrl-C ends it", source.name));
    }
    let silent = outputs.quiet && output.is_none();
    // The words so far are for the window; people need not read the same again and again.
    let wants_partial = properties.has("partial-captions");
    let is_wanted = |caption: &Caption| {
        !silent
            && (wants_partial || !caption.partial)
            && (format != Format::Txt || !caption.repeated)
    };
    let writer = RefCell::new(TextWriter::new(format, output));
    let mut run = Run::new(pipeline, &mut progress, source.length(), Ending::Now);
    let end = run.run(
        |caption, message| match is_wanted(caption) {
            true => writer.borrow_mut().caption(caption, message),
            false => Ok(()),
        },
        || Ok(()),
    );
    if !outputs.quiet {
        eprintln!("Watched {}  {}", clock(run.position), run.counted());
    }
    let ended = Ended {
        early: !matches!(end, Ok(End::Whole)),
        failed: end.is_err(),
        position: run.position,
        model: run.model.clone().unwrap_or_default(),
    };
    if run.captions > 0 {
        Box::new(writer.into_inner()).finish(&ended, &mut |_| ())?;
    }
    if run.has_demo_model()
        && !outputs.quiet
        && arguments.source.as_deref() != Some("test".as_ref())
    {
        suggest("vlmnarrate live", properties);
    }
    let end = end.with_context(|| match run.position {
        ClockTime::ZERO => source.name.clone(),
        position => format!("{}: broke off after {}", source.name, clock(position)),
    })?;
    if end == End::Whole && source.is_live && !run.window_closed {
        eprintln!("{}: the stream has ended", source.name);
    }
    Ok(end)
}

/// Why no window can be shown, if that is so.
fn why_no_window() -> Option<String> {
    if cfg!(target_os = "macos") {
        return None;
    }
    let set = |name| env::var(name).ok().filter(|value| !value.is_empty());
    // Looked at first: where there is no display, autovideosink tries DirectFB, which crashes.
    let opens = |factory| {
        gst::ElementFactory::make(factory)
            .build()
            .is_ok_and(|sink| {
                let opens = sink.set_state(gst::State::Ready).is_ok();
                let _ = sink.set_state(gst::State::Null);
                opens
            })
    };
    let displays = [
        ("WAYLAND_DISPLAY", "waylandsink"),
        ("DISPLAY", "ximagesink"),
    ];
    let mut why = "DISPLAY and WAYLAND_DISPLAY are not set".to_owned();
    for (name, sink) in displays {
        match set(name) {
            Some(_) if opens(sink) => return None,
            Some(value) => why = format!("{name}={value} can't be opened"),
            None => (),
        }
    }
    Some(why)
}

/// What follows the source: a window, or the narrator alone.
fn rest(has_window: bool) -> String {
    let narrator = "name=narrator mode=live partial-captions=true";
    match has_window {
        true => format!(
            "vlmnarrateoverlay {narrator} ! {QUEUE} ! videoconvert ! autovideosink ts-offset={}",
            DELAY.nseconds()
        ),
        false => format!("vlmnarrate {narrator} ! fakesink"),
    }
}

/// From the source to an element named `narrator`, and what follows it.
fn pipeline(source: &Source, rest: &str, properties: &Properties) -> Result<gst::Pipeline> {
    let pipeline = source.pipeline(rest)?;
    let narrator = pipeline.by_name("narrator").context("no narrator")?;
    properties.apply(&narrator);
    Ok(pipeline)
}
