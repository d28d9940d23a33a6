//! The elements, as a process.

use std::{
    collections::BTreeMap,
    io::BufRead,
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use gst::prelude::*;
use gstvlmnarrate::Caption;
use serde_json::{Value, json};

use crate::{Result, processor_time};

/// What the bus of all pipelines said.
#[derive(Default)]
struct Heard {
    /// Captions of each element.
    captions: Vec<usize>,
    /// Time since the start of the measurement and latency of each caption, in seconds.
    latencies: Vec<(f64, f64)>,
    /// Age of the last frame when its caption came, in seconds.
    ages: Vec<f64>,
    problems: usize,
    first_problem: Option<String>,
}

struct Line {
    pipeline: gst::Pipeline,
    element: gst::Element,
}

impl Drop for Line {
    fn drop(&mut self) {
        let _ = self.pipeline.set_state(gst::State::Null);
    }
}

type Shared = Arc<(Mutex<(Instant, Heard)>, Condvar)>;

/// Source of moving pictures that no other element has.
fn source(number: usize) -> String {
    let colour = |step: usize| 0xff00_0000 | ((number * step + 0x30_4050) % 0x100_0000);
    match number % 3 {
        0 => format!("pattern=smpte horizontal-speed={}", number + 1),
        1 => format!(
            "pattern=ball motion=sweep foreground-color={} background-color={}",
            colour(0x1_2345),
            colour(0x5_4321)
        ),
        _ => format!(
            "pattern=zone-plate kx2={} ky2=8 kt={}",
            number % 20 + 2,
            number + 1
        ),
    }
}

fn line(number: usize, settings: &Value, shared: &Shared) -> Result<Line> {
    let name = settings["element"].as_str().ok_or("no element")?;
    let fps = &settings["fps"];
    let pipeline = gst::parse::launch(&format!(
        "videotestsrc is-live=true {} ! video/x-raw,format=I420,width=320,height=240,framerate={fps}/1
         ! {name} name=element ! fakesink sync=false",
        source(number)
    ))?
    .downcast::<gst::Pipeline>()
    .map_err(|_| "no pipeline")?;
    let element = pipeline.by_name("element").ok_or("no element")?;
    if name == "vlmnarrate" {
        element.set_property_from_str("mode", "live");
        let interval = settings["interval_ns"].as_u64().ok_or("no interval")?;
        element.set_property("interval", gst::ClockTime::from_nseconds(interval));
        for name in ["endpoint", "model"] {
            element.set_property(name, settings[name].as_str());
        }
        for property in settings["properties"].as_array().into_iter().flatten() {
            let (name, value) = property
                .as_str()
                .and_then(|property| property.split_once('='))
                .ok_or("a property needs a value")?;
            element.set_property_from_str(name, value);
        }
    }
    let (shared, clock_of) = (shared.clone(), pipeline.downgrade());
    let bus = pipeline.bus().ok_or("no bus")?;
    bus.set_sync_handler(move |_, message| {
        let problem = match message.view() {
            gst::MessageView::Element(_) => {
                let caption = message.structure().map(Caption::try_from);
                if let Some(Ok(caption)) = caption {
                    let now = clock_of.upgrade().and_then(|p| p.current_running_time());
                    let age = now.zip(caption.stamp.running_time);
                    let age = age.map(|(now, then)| now.saturating_sub(then).seconds_f64());
                    let mut guard = shared.0.lock().unwrap();
                    let (began, heard) = &mut *guard;
                    heard.captions[number] += 1;
                    let at = began.elapsed().as_secs_f64();
                    heard
                        .latencies
                        .push((at, caption.cost.latency.as_secs_f64()));
                    heard.ages.extend(age);
                    shared.1.notify_all();
                }
                None
            }
            gst::MessageView::Error(error) => {
                Some(format!("{}: {:?}", error.error(), error.debug()))
            }
            gst::MessageView::Warning(warning) => {
                Some(format!("{}: {:?}", warning.error(), warning.debug()))
            }
            _ => None,
        };
        if let Some(problem) = problem {
            let heard = &mut shared.0.lock().unwrap().1;
            heard.problems += 1;
            heard.first_problem.get_or_insert(problem);
        }
        gst::BusSyncReply::Drop
    });
    Ok(Line { pipeline, element })
}

/// Sums of the counters of all elements' `stats`.
fn counters(lines: &[Line]) -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::new();
    for line in lines {
        if line.element.find_property("stats").is_none() {
            break;
        }
        let stats = line.element.property::<gst::Structure>("stats");
        for name in stats.fields().filter(|name| !name.contains("-p")) {
            if let Ok(count) = stats.get::<u64>(name.as_str()) {
                *sums.entry(name.to_string()).or_default() += count;
            }
        }
    }
    sums
}

/// Number after a word in `/proc/self/status`.
fn status(word: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(word));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

/// CPU time of the whole machine, in seconds.
fn machine_time() -> f64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields = stat
        .lines()
        .next()
        .into_iter()
        .flat_map(str::split_whitespace);
    // In ticks of 10 ms: user, nice and system, without idle and waiting, then interrupts.
    let ticks: Vec<f64> = fields
        .skip(1)
        .filter_map(|field| field.parse().ok())
        .collect();
    let busy = [0, 1, 2, 5, 6].iter().filter_map(|field| ticks.get(*field));
    busy.sum::<f64>() / 100.0
}

/// Starts all, says `null` when each has its first caption, then answers `begin` and `report`.
pub fn run(settings: &str) -> Result<()> {
    let settings: Value = serde_json::from_str(settings)?;
    gst::init()?;
    gstvlmnarrate::plugin_register_static()?;
    let elements = settings["elements"].as_u64().ok_or("no elements")? as usize;
    let empty = || Heard {
        captions: vec![0; elements],
        ..Heard::default()
    };
    let shared = Shared::new((Mutex::new((Instant::now(), empty())), Condvar::new()));
    let lines = (0..elements).map(|number| line(number, &settings, &shared));
    let lines: Vec<Line> = lines.collect::<Result<_>>()?;
    let started = |result: std::result::Result<_, gst::StateChangeError>| {
        let problem = || shared.0.lock().unwrap().1.first_problem.clone();
        result.map_err(|error| problem().unwrap_or_else(|| error.to_string()))
    };
    for line in &lines {
        started(line.pipeline.set_state(gst::State::Playing))?;
    }
    for line in &lines {
        started(line.pipeline.state(gst::ClockTime::from_seconds(60)).0)?;
    }
    if settings["element"] == "vlmnarrate" {
        let guard = shared.0.lock().unwrap();
        let (guard, timeout) = shared
            .1
            .wait_timeout_while(guard, Duration::from_secs(120), |(_, heard)| {
                heard.captions.contains(&0)
            })
            .unwrap();
        if timeout.timed_out() {
            let silent = guard.1.captions.iter().filter(|count| **count == 0).count();
            return Err(format!(
                "{silent} of {elements} elements said nothing in 120 s; {:?}",
                guard.1.first_problem
            )
            .into());
        }
    }
    println!("null");

    let mut before = (Instant::now(), processor_time(), BTreeMap::new(), 0.0);
    for ask in std::io::stdin().lock().lines() {
        if ask? == "begin" {
            before = (
                Instant::now(),
                processor_time(),
                counters(&lines),
                machine_time(),
            );
            *shared.0.lock().unwrap() = (before.0, empty());
            println!("null");
            continue;
        }
        let cpu = processor_time() - before.1;
        let heard = std::mem::replace(&mut shared.0.lock().unwrap().1, empty());
        let mut counters = counters(&lines);
        for (name, count) in &mut counters {
            *count = count.saturating_sub(before.2.get(name).copied().unwrap_or(0));
        }
        let report = json!({
            "seconds": before.0.elapsed().as_secs_f64(),
            "cpu": cpu,
            "machine_cpu": machine_time() - before.3,
            "rss": status("VmRSS:") * 1024,
            "threads": status("Threads:"),
            "captions": heard.captions,
            "latencies": heard.latencies,
            "ages": heard.ages,
            "counters": counters,
            "problems": heard.problems,
            "first_problem": heard.first_problem,
        });
        println!("{report}");
    }
    Ok(())
}
