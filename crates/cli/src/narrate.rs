//! Narrates a recorded video into a file.

use std::{
    cell::RefCell,
    ffi::OsString,
    io::{self, Write},
    path::Path,
};

use anyhow::{Result, anyhow, bail};
use gst::ClockTime;

use crate::{
    arguments::{Burn, Narrate, Outputs},
    captions::lines,
    ffmpeg,
    input::{Input, said},
    output::{Format, Output, Target, default_path},
    pipeline,
    probe::{self, Probe},
    progress::Progress,
    properties::Properties,
    run::{End, Ending, Run},
    units::clock,
    writers::{self, Ended, Writer},
};

/// A model that knows more than test pictures.
pub const SUGGESTED: &str = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct";

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
    if demo && !arguments.outputs.quiet {
        suggest("vlmnarrate", properties);
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
    let mut input = Input::open(name, copies && !(target.is_none() && name == "-"))?;
    let target = match target {
        Some(target) => target,
        None => default_target(&input, outputs.format)?,
    };
    let (output, format) = match target {
        Target::Stdout(format) => (None, format),
        Target::File(path, format) => {
            if format.copies() && input.is_live() {
                bail!(
                    "{}: a live stream can't be copied; name an output of text (-o out.vtt), or watch it \
                     (vlmnarrate live)",
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
    input.share_times()?;
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
    let mut input = Input::open(&arguments.input, true)?;
    if input.is_live() {
        bail!(
            "{}: a live stream can't be copied; watch it with its captions (vlmnarrate live)",
            input.name
        );
    }
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
    input.share_times()?;
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
    if demo && !arguments.outputs.quiet {
        suggest("vlmnarrate", properties);
    }
    Ok(end)
}

/// Where a narration goes if nothing was said: beside a video, to standard output for what is no file or no video.
fn default_target(input: &Input, format: Option<Format>) -> Result<Target> {
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
            _ => {
                let format = format.unwrap_or(Format::Txt);
                if format.needs_name() {
                    bail!("{}: name the output with -o", input.name);
                }
                return Ok(Target::Stdout(format));
            }
        },
    };
    if format.is_none() && (input.is_still() || input.is_live()) {
        return Ok(Target::Stdout(Format::Txt));
    }
    let format = format.unwrap_or(match input.probe.as_ref().is_some_and(Probe::is_turned) {
        // Older versions of FFmpeg can't write into Matroska that a phone lay on its side.
        true if !ffmpeg::matroska_can_turn() => Format::Mp4,
        _ => Format::Mkv,
    });
    let suffix = clap::ValueEnum::to_possible_value(&format)
        .map_or_else(String::new, |value| value.get_name().to_owned());
    Ok(Target::File(
        default_path(&path, &format!(".narrated.{suffix}")),
        format,
    ))
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
    let pipeline = pipeline::recorded(input, element, &writer.launch(), properties)?;
    writer.connect(&pipeline)?;
    let length = input.probe.as_ref().and_then(Probe::video_end);
    let mut run = Run::new(pipeline, progress, length, Ending::AfterCaption);
    let shared = RefCell::new(&mut writer);
    let result = run.run(
        |caption, message| {
            if prints && !caption.partial {
                print_line(&lines::line(caption))?;
            }
            shared.borrow_mut().caption(caption, message)
        },
        || shared.borrow_mut().check(),
    );
    *demo |= run.has_demo_model();
    let ended = Ended {
        early: !matches!(result, Ok(End::Whole)),
        failed: result.is_err(),
        position: run.position,
        model: run.model.clone().unwrap_or_else(|| model_name(properties)),
    };
    let summary = run.summary(if ended.early {
        "Stopped after"
    } else {
        "Narrated"
    });
    let (captions, input_failed) = (run.captions, run.input_failed);
    let mut copying = |position: ClockTime| {
        progress.show(|| format!("Copying the rest  {}", clock(position)));
    };
    let end = match result {
        Ok(End::Interrupted(_)) if captions == 0 => return result,
        Ok(end) => end,
        Err(error) => {
            let error = match &input.unreadable {
                Some(reason) if captions == 0 => anyhow!("{reason}"),
                _ if captions == 0 && input_failed => {
                    let text = format!("{error:#}");
                    anyhow!("{text}; {}", probe::remedy(&text))
                }
                _ => error,
            };
            let error = error.context(input.name.clone());
            if captions > 0 {
                eprintln!("{summary}");
            } else if !broken_pipe(&error) {
                return Err(error);
            }
            // What is there is kept. If FFmpeg has closed the pipe, it says why.
            return match writer.finish(&ended, &mut copying) {
                Ok(Some(name)) => {
                    Err(error.context(format!("{name} ends at {}", clock(ended.position))))
                }
                Ok(None) => Err(error),
                Err(reason) => Err(reason),
            };
        }
    };
    let written = writer.finish(&ended, &mut copying)?;
    progress.clear();
    if captions == 0 {
        bail!("{}: no frame of it could be described", input.name);
    }
    if prints {
        eprintln!("{summary}");
    }
    if !ended.early
        && let Some(warning) = cut_short(input, ended.position, length)
    {
        eprintln!("warning: {warning}");
    }
    if let Some(name) = written
        && prints
    {
        eprintln!("Wrote {name}");
    }
    Ok(end)
}

/// Prints a line at once, for whoever reads along.
fn print_line(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .map_err(on_stdout)
}

/// An error that says where it happened.
pub fn on_stdout(error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("standard output: {}", said(&error)))
}

/// Whether a pipe has no reader any more, by what the system or an element says.
fn broken_pipe(error: &anyhow::Error) -> bool {
    format!("{error:#}").to_lowercase().contains("broken pipe")
}

/// Says so if the file is shorter than it says, or the video ends before the end that the file promises.
fn cut_short(input: &Input, position: ClockTime, promised: Option<ClockTime>) -> Option<String> {
    if input.lacks_its_end() {
        return Some(format!("{}: the file is cut short", input.name));
    }
    if input.lacks_segments() {
        return Some(format!(
            "{}: segments of the playlist are missing",
            input.name
        ));
    }
    let promised = promised?;
    // The last frame of a slow video begins long before its end.
    let frame_time = input.probe.as_ref()?.video()?.frame_time();
    let late = promised.saturating_sub(position);
    let slack = 500 * ClockTime::MSECOND + 2 * frame_time.unwrap_or(ClockTime::SECOND);
    (late > slack).then(|| {
        format!(
            "{}: the video ends at {} although the file says {}: it is cut short or damaged",
            input.name,
            clock(position),
            clock(promised)
        )
    })
}

/// Says once what to do for real captions.
pub fn suggest(command: &str, properties: &Properties) {
    if !properties.has("model") {
        eprintln!(
            "These captions are from the demo model, which only knows test pictures. For real captions:\n  \
             {command} --model {SUGGESTED}"
        );
    }
}
