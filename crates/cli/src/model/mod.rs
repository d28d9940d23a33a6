//! Downloads a model, checks it, and measures it on this machine: through the element, as in any pipeline.

use std::{
    fs, io,
    num::NonZero,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use gst::prelude::*;

use crate::{
    arguments::{Model, Report},
    narrate::SUGGESTED,
    progress::Progress,
    properties::Properties,
    run::{End, Ending, Run},
};

mod frames;
mod measure;
mod report;

use frames::Frames;
use measure::Measurement;

/// What is set so that each frame is described, and each caption told of.
pub const FIXED: [&str; 10] = [
    "mode",
    "interval",
    "every-nth",
    "scene-threshold",
    "expire",
    "merge-captions",
    "post-messages",
    "post-repeated",
    "attach-meta",
    "partial-captions",
];

/// Downloads the model if it is not here, describes pictures with it, and prints what that took.
///
/// # Errors
///
/// There is no such model, or it can't be downloaded, loaded or run.
pub fn model(arguments: &Model, properties: &Properties) -> Result<End> {
    let mut progress = Progress::new(arguments.quiet);
    let frames = Frames::new()?;
    let before = memory("VmRSS:");
    let pipeline = gst::parse::launch(&format!(
        "appsrc name=in format=time caps={} ! vlmnarrate name=narrator mode=recorded interval=0 attach-meta=false \
         ! fakesink",
        frames::CAPS
    ))?
    .downcast::<gst::Pipeline>()
    .map_err(|_| anyhow!("not a pipeline"))?;
    let narrator = pipeline.by_name("narrator").context("no narrator")?;
    if let Some(model) = &arguments.model {
        narrator.set_property("model", PathBuf::from(model));
    }
    properties.apply(&narrator);
    let source = (pipeline.by_name("in"))
        .and_then(|source| source.downcast::<gst_app::AppSrc>().ok())
        .context("no source")?;
    let times = watch(&pipeline)?;
    let mut measurement = Measurement::new(arguments, narrator.clone(), source, frames);
    measurement.start()?;
    let mut run = Run::new(pipeline, &mut progress, None, Ending::Now);
    let mut held = None;
    let end = run.run(
        |caption, _| {
            // As long as there is a model: at the end it is gone.
            held.get_or_insert_with(|| narrator.property::<gst::Structure>("stats"));
            measurement
                .caption(caption)
                .map_err(|error| io::Error::other(format!("{error:#}")))
        },
        || Ok(()),
    )?;
    if end != End::Whole {
        return Ok(end);
    }
    let machine = report::Machine {
        processor: processor(),
        cores: thread::available_parallelism().map_or(1, NonZero::get),
        // Of all that was ever in memory, the most that was there at once.
        peak_memory: memory("VmHWM:"),
        memory_before: before,
        times: *times.lock().unwrap_or_else(PoisonError::into_inner),
    };
    let report = report::Report::new(&machine, &held.context("no caption")?, measurement)?;
    match arguments.format {
        Report::Txt => print!("{}", report.text()),
        Report::Json => println!("{}", report.json()),
    }
    if run.has_demo_model() && arguments.model.is_none() && !arguments.quiet {
        eprintln!(
            "This is the demo model, which only knows test pictures. To measure a real one, name it:\n  \
             vlmnarrate model {SUGGESTED}"
        );
    }
    Ok(end)
}

/// How long it took until there was a model.
#[derive(Clone, Copy, Debug, Default)]
struct Times {
    /// `None` if it was here already.
    download: Option<Duration>,
    load: Option<Duration>,
}

/// Takes the times when they are, and not when somebody reads the messages.
fn watch(pipeline: &gst::Pipeline) -> Result<Arc<Mutex<Times>>> {
    let times = Arc::new(Mutex::new(Times::default()));
    let began = Mutex::new(Instant::now());
    pipeline.bus().context("no bus")?.set_sync_handler({
        let times = times.clone();
        move |_, message| {
            if let gst::MessageView::Progress(progress) = message.view() {
                let mut times = times.lock().unwrap_or_else(PoisonError::into_inner);
                let mut began = began.lock().unwrap_or_else(PoisonError::into_inner);
                match (progress.get().0, progress.get().1) {
                    (gst::ProgressType::Start, _) => *began = Instant::now(),
                    (gst::ProgressType::Complete, "download-model") => {
                        times.download = Some(began.elapsed());
                    }
                    (gst::ProgressType::Complete, "load-model") => {
                        times.load = Some(began.elapsed());
                    }
                    _ => (),
                }
            }
            gst::BusSyncReply::Pass
        }
    });
    Ok(times)
}

/// A line of what Linux says of this process, in bytes.
fn memory(name: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kilobytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(1024 * kilobytes)
}

/// The name of the processor, which may not be what the model runs on.
fn processor() -> Option<String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").ok()?;
    let mut lines = cpuinfo.lines();
    let line = lines.find(|line| line.starts_with("model name"))?;
    Some(line.split_once(": ")?.1.trim().to_owned())
}
