//! Narrates a recorded video into a file.

use std::{ffi::OsString, io, path::Path};

use anyhow::{Context, Result, bail};
use gst::{ClockTime, prelude::*};

use crate::{
    arguments::{Burn, Narrate, Outputs},
    captions::lines,
    input::Input,
    output::{Format, Output, Target, default_path},
    progress::Progress,
    properties::Properties,
    run::{End, Ending, Run},
    units::clock,
    writers::{self, Ended, Writer},
};

/// A model that knows more than test pictures.
const SUGGESTED: &str = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct";

/// Narrates each input in turn. One that fails does not keep the others from their turn.
///
/// # Errors
///
/// An input can't be narrated.
pub fn narrate(arguments: &Narrate, properties: &Properties) -> Result<End> {
    let inputs = &arguments.inputs;
    if inputs.len() > 1
        && arguments
            .outputs
            .output
            .as_ref()
            .is_some_and(|output| output != "-")
    {
        bail!(
            "-o names one file, and there are {} inputs; leave it out, or narrate them one by one",
            inputs.len()
        );
    }
    let mut failed = 0;
    let mut demo = false;
    let mut end = End::Whole;
    for name in inputs {
        if inputs.len() > 1 {
            eprintln!("{}:", crate::input::shown(name));
        }
        match narrate_one(name, &arguments.outputs, properties, &mut demo) {
            Ok(End::Whole) => (),
            Ok(interrupted) => {
                end = interrupted;
                break;
            }
            Err(error) if inputs.len() == 1 => return Err(error),
            Err(error) => {
                eprintln!("error: {error:#}");
                failed += 1;
            }
        }
    }
    if demo {
        suggest(properties);
    }
    if failed > 0 {
        bail!("{failed} of {} inputs could not be narrated", inputs.len());
    }
    Ok(end)
}

fn narrate_one(
    name: &OsString,
    outputs: &Outputs,
    properties: &Properties,
    demo: &mut bool,
) -> Result<End> {
    use Format::{Html, Jsonl, Mkv, Mp4, Srt, Txt, Vtt};
    let possible = [Mkv, Mp4, Vtt, Srt, Jsonl, Html, Txt];
    let target = match &outputs.output {
        Some(output) => Some(Target::choose(output, outputs.format, &possible)?),
        None => None,
    };
    let copies = match &target {
        Some(Target::File(_, format)) => format.copies(),
        Some(Target::Stdout(_)) => false,
        None => outputs.format.is_none_or(Format::copies),
    };
    // Without a name for the output a pipe is only read aloud.
    let input = Input::open(name, copies && !(target.is_none() && name == "-"))?;
    let target = match target {
        Some(target) => target,
        None => default_target(&input, outputs.format),
    };
    let (output, format) = match target {
        Target::Stdout(format) => (None, format),
        Target::File(path, format) => {
            if format.copies() && input.is_live() {
                bail!(
                    "{}: a live stream can't be copied while it is watched; name an output of text (-o out.vtt), \
                     draw the captions (vlmnarrate burn), or watch it (vlmnarrate live)",
                    input.name
                );
            }
            (
                Some(Output::create(&path, &[&input], outputs.force)?),
                format,
            )
        }
    };
    let model = model_name(properties);
    let mut progress = Progress::new(outputs.quiet);
    let prints = output.is_some() && !outputs.quiet;
    let writer = writers::writer(format, output, &input, &model, |line| {
        progress.say(&format!("note: {line}"))
    })?;
    run(
        &input,
        writer,
        "vlmnarrate",
        properties,
        prints,
        &mut progress,
        demo,
    )
}

/// Draws the captions into the video.
///
/// # Errors
///
/// The input can't be narrated.
pub fn burn(arguments: &Burn, properties: &Properties) -> Result<End> {
    let outputs = &arguments.outputs;
    let target = match &outputs.output {
        Some(output) => Some(Target::choose(
            output,
            outputs.format,
            &[Format::Mp4, Format::Mkv],
        )?),
        None => None,
    };
    let input = Input::open(&arguments.input, true)?;
    let (path, format) = match target {
        Some(Target::File(path, format)) => (path, format),
        Some(Target::Stdout(_)) => {
            bail!("-o -: a video can't be written to standard output; name a file")
        }
        None => {
            let base = input.path.as_deref().unwrap_or(Path::new("video"));
            (default_path(base, ".burnt.mp4"), Format::Mp4)
        }
    };
    let output = Output::create(&path, &[&input], outputs.force)?;
    let mut progress = Progress::new(outputs.quiet);
    let writer = writers::burner(format, output, &input, |line| {
        progress.say(&format!("note: {line}"))
    })?;
    let mut demo = false;
    let end = run(
        &input,
        writer,
        "vlmnarrateoverlay",
        properties,
        !outputs.quiet,
        &mut progress,
        &mut demo,
    )?;
    if demo {
        suggest(properties);
    }
    Ok(end)
}

/// Where a narration goes if nothing was said: beside a video, to standard output for what is no file or no video.
fn default_target(input: &Input, format: Option<Format>) -> Target {
    let path = match &input.path {
        Some(path) => path.clone(),
        None => match input
            .location
            .as_ref()
            .and_then(|location| location.to_str())
        {
            // The last part of a URL, in this folder.
            Some(url) if url.contains("://") => {
                let path = url.split(['?', '#']).next().unwrap_or_default();
                path.rsplit('/')
                    .next()
                    .filter(|name| !name.is_empty())
                    .unwrap_or("video")
                    .into()
            }
            _ => return Target::Stdout(format.unwrap_or(Format::Txt)),
        },
    };
    if format.is_none() && (input.is_still() || input.is_live()) {
        return Target::Stdout(Format::Txt);
    }
    let format = format.unwrap_or(Format::Mkv);
    let suffix = clap::ValueEnum::to_possible_value(&format)
        .map_or_else(String::new, |value| value.get_name().to_owned());
    Target::File(default_path(&path, &format!(".narrated.{suffix}")), format)
}

/// The model, before it has said its own name.
fn model_name(properties: &Properties) -> String {
    properties
        .text("model")
        .map_or_else(|| "demo".to_owned(), |model| lines::one_line(&model))
}

/// Describes the input and makes the output whole.
fn run(
    input: &Input,
    mut writer: Box<dyn Writer>,
    element: &str,
    properties: &Properties,
    prints: bool,
    progress: &mut Progress,
    demo: &mut bool,
) -> Result<End> {
    let pipeline = pipeline(input, element, &writer.launch(), properties)?;
    writer.connect(&pipeline)?;
    let length = input.probe.as_ref().and_then(|probe| probe.video_length());
    let mut run = Run::new(pipeline, progress, length, Ending::AfterCaption);
    let shared = std::cell::RefCell::new(&mut writer);
    let result = run.run(
        |caption, message| {
            if prints && !caption.partial {
                use io::Write;
                let mut out = io::stdout().lock();
                writeln!(out, "{}", lines::line(caption))?;
                out.flush()?;
            }
            shared.borrow_mut().caption(caption, message)
        },
        || shared.borrow_mut().check(),
    );
    *demo |= run
        .model
        .as_deref()
        .is_some_and(|model| model == "demo" || model.starts_with("demo "));
    let ended = Ended {
        early: !matches!(result, Ok(End::Whole)),
        position: run.position,
        model: run.model.clone().unwrap_or_else(|| model_name(properties)),
    };
    let captions = run.captions;
    let summary = |verb: &str| run.summary(verb);
    let mut wait = |position: ClockTime| {
        let _ = position;
    };
    match result {
        Ok(end) if captions > 0 || end == End::Whole => {
            let verb = if ended.early {
                "Stopped after"
            } else {
                "Narrated"
            };
            let line = summary(verb);
            let written = writer.finish(&ended, &mut wait)?;
            eprintln!("{line}");
            if end == End::Whole
                && let Some(promised) = length
                && let Some(short) = cut_short(input, ended.position, promised)
            {
                eprintln!("warning: {short}");
            }
            if captions == 0 {
                bail!("{}: no frame of it could be described", input.name);
            }
            if let Some(name) = written {
                eprintln!("Wrote {name}");
            }
            Ok(end)
        }
        Ok(end) => Ok(end),
        Err(error) => {
            // What is there is kept, if nothing else has its name.
            let error = error.context(input.name.clone());
            if captions == 0 {
                return Err(writer_error(writer, &ended, error));
            }
            eprintln!("{}", summary("Stopped after"));
            match writer.finish(&ended, &mut wait) {
                Ok(Some(name)) => {
                    Err(error.context(format!("{name} ends at {}", clock(ended.position))))
                }
                Ok(None) => Err(error),
                Err(reason) => Err(reason),
            }
        }
    }
}

/// A pipe that broke is not the reason: that is why FFmpeg ended.
fn writer_error(writer: Box<dyn Writer>, ended: &Ended, error: anyhow::Error) -> anyhow::Error {
    let broken = format!("{error:#}").contains("Broken pipe");
    match broken.then(|| writer.finish(ended, &mut |_| ())) {
        Some(Err(reason)) => reason,
        _ => error,
    }
}

/// Says so if the video ends before the end that the file promises.
fn cut_short(input: &Input, position: ClockTime, promised: ClockTime) -> Option<String> {
    let probe = input.probe.as_ref()?;
    let promised = promised + probe.video_offset();
    // The last frame of a slow video begins long before its end.
    let frame = probe.video()?.frame_time().unwrap_or(ClockTime::SECOND);
    let late = promised.saturating_sub(position);
    (late > ClockTime::SECOND + 2 * frame && late > promised / 50).then(|| {
        format!(
            "{}: the video ends at {} although the file says {}: it is cut short or damaged",
            input.name,
            clock(position),
            clock(promised)
        )
    })
}

/// Says once what to do for real captions.
fn suggest(properties: &Properties) {
    if !properties.has("model") {
        eprintln!(
            "These captions are from the demo model, which only knows test pictures. For real captions:\n  \
             vlmnarrate --model {SUGGESTED} FILE"
        );
    }
}

/// From the input to the narrator and what follows it.
fn pipeline(
    input: &Input,
    element: &str,
    rest: &str,
    properties: &Properties,
) -> Result<gst::Pipeline> {
    // Phones lie on their side and say so. What is seen must be upright for the model.
    let upright = "videoconvert ! videoflip video-direction=auto";
    let merge = if element == "vlmnarrate" {
        "merge-captions=true"
    } else {
        ""
    };
    let description = format!(
        "uridecodebin name=in expose-all-streams=false caps=video/x-raw(ANY) \
         in. ! {upright} name=first ! identity name=clock single-segment=true \
         ! {element} name=narrator mode=recorded {merge} ! {rest}"
    );
    let pipeline = gst::parse::launch(&description)
        .with_context(|| "a GStreamer element is missing; install gstreamer1.0-plugins-good and gstreamer1.0-libav")?
        .downcast::<gst::Pipeline>()
        .map_err(|_| anyhow::anyhow!("not a pipeline"))?;
    let source = pipeline.by_name("in").context("no source")?;
    source.set_property("uri", &input.uri);
    let narrator = pipeline.by_name("narrator").context("no narrator")?;
    properties.apply(&narrator);
    let clock = pipeline
        .by_name("clock")
        .and_then(|clock| clock.static_pad("src"))
        .context("no clock")?;
    let offset = input
        .probe
        .as_ref()
        .map(|probe| probe.video_offset())
        .unwrap_or_default();
    start_at(&clock, offset);
    Ok(pipeline)
}

/// Moves the times of all frames so that the first one's is that in the file, as players count it.
fn start_at(pad: &gst::Pad, offset: ClockTime) {
    let first = std::sync::OnceLock::new();
    pad.add_probe(gst::PadProbeType::BUFFER, move |_, info| {
        if let Some(gst::PadProbeData::Buffer(buffer)) = &mut info.data {
            let Some(pts) = buffer.pts() else {
                return gst::PadProbeReturn::Ok;
            };
            let first = *first.get_or_init(|| pts);
            if first != offset {
                buffer
                    .make_mut()
                    .set_pts(pts.saturating_sub(first) + offset);
            }
        }
        gst::PadProbeReturn::Ok
    });
}
