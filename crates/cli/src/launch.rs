//! Runs any pipeline with a narrator in it, as `gst-launch-1.0` does, and prints its captions.

use std::{cell::RefCell, ffi::OsString};

use anyhow::{Result, anyhow};
use gst::prelude::*;

use crate::{
    arguments::Launch,
    output::{Format, Output, Target},
    progress::Progress,
    run::{End, Ending, Run},
    writers::{Ended, TextWriter, Writer},
};

/// Runs the pipeline until its end.
///
/// # Errors
///
/// The pipeline can't be made, or an element fails.
pub fn launch(arguments: &Launch) -> Result<End> {
    let outputs = &arguments.outputs;
    let output = outputs.output.clone().unwrap_or_else(|| "-".into());
    let target = Target::choose(&output, outputs.format, &[Format::Txt, Format::Jsonl])?;
    let (output, format) = match target {
        Target::Stdout(format) => (None, format),
        Target::File(path, format) => (Some(Output::create(&path, &[], outputs.force)?), format),
    };
    let pipeline = pipeline(&arguments.pipeline)?;
    // Without a file, being quiet leaves nothing to write.
    let silent = outputs.quiet && output.is_none();
    let writer = RefCell::new(TextWriter::new(format, output));
    let mut progress = Progress::new(outputs.quiet);
    let mut run = Run::new(pipeline, &mut progress, None, Ending::AfterStream);
    let end = run.run(
        |caption, message| match silent {
            true => Ok(()),
            false => writer.borrow_mut().caption(caption, message),
        },
        || Ok(()),
    );
    if !outputs.quiet && run.captions > 0 {
        eprintln!(
            "{}",
            run.summary(if matches!(end, Ok(End::Whole)) {
                "Narrated"
            } else {
                "Stopped after"
            })
        );
    }
    let end = end?;
    let ended = Ended {
        early: end != End::Whole,
        failed: false,
        position: run.position,
        model: run.model.clone().unwrap_or_default(),
    };
    Box::new(writer.into_inner()).finish(&ended, &mut |_| ())?;
    Ok(end)
}

/// The pipeline that `gst-launch-1.0` would make of these words.
fn pipeline(words: &[OsString]) -> Result<gst::Pipeline> {
    let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
    let words: Vec<_> = words.iter().map(AsRef::as_ref).collect();
    let element = gst::parse::launchv(&words).map_err(|error| {
        let hint = match error.kind::<gst::ParseError>() {
            Some(gst::ParseError::NoSuchElement) => {
                "; install its plugin, or name its folder in GST_PLUGIN_PATH"
            }
            _ => "",
        };
        anyhow!("{}{hint}", error.message())
    })?;
    Ok(element.downcast::<gst::Pipeline>().or_else(|element| {
        let pipeline = gst::Pipeline::new();
        pipeline.add(&element).map(|()| pipeline)
    })?)
}
