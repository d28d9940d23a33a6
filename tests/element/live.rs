//! Live mode: no buffer is held, lost or late; the newest frame wins.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::common::{Fake, Pipeline, engine::wait_for, harness, ms, spy, stat};
use gst::{ClockTime, prelude::*};
use gstvlmnarrate::SmolVlmLoader;

/// The proof asked for: a model that needs 2 s, a source that gives 60 frames of 1080p a second.
#[test]
fn two_seconds_a_caption_cost_1080p60_nothing() {
    let fake = Fake::slow(Duration::from_secs(2));
    let pipeline = Pipeline::new(
        // NV12 all black: what a busy machine can make in time.
        "videotestsrc is-live=true pattern=black num-buffers=300
         ! video/x-raw,format=NV12,width=1920,height=1080,framerate=60/1
         ! vlmnarrate name=n interval=500000000 ! fakesink name=sink",
        &fake,
    );
    // How long the element keeps a buffer, at most.
    let entered = Arc::new(AtomicU64::new(0));
    let longest = Arc::new(AtomicU64::new(0));
    let start = Instant::now();
    let (sink, src) = (
        pipeline.narrator.static_pad("sink").unwrap(),
        pipeline.narrator.static_pad("src").unwrap(),
    );
    let now = move || start.elapsed().as_micros() as u64;
    sink.add_probe(gst::PadProbeType::BUFFER, {
        let entered = entered.clone();
        move |_, _| {
            entered.store(now(), Ordering::SeqCst);
            gst::PadProbeReturn::Ok
        }
    });
    src.add_probe(gst::PadProbeType::BUFFER, {
        let longest = longest.clone();
        move |_, _| {
            longest.fetch_max(now() - entered.load(Ordering::SeqCst), Ordering::SeqCst);
            gst::PadProbeReturn::Ok
        }
    });
    let passed = spy(&src);

    pipeline.play();
    fake.wait_requests(1);
    let latency = |pad: &gst::Pad| {
        let mut query = gst::query::Latency::new();
        assert!(pad.query(&mut query));
        query.result()
    };
    let without = latency(&sink.peer().unwrap());
    assert!(without.0, "a live source");
    assert_eq!(latency(&src), without);

    let heard = pipeline
        .log
        .wait(|heard| heard.eos || !heard.errors.is_empty());
    assert!(heard.eos, "{:?}", heard.errors);
    let buffers = passed
        .lock()
        .unwrap()
        .iter()
        .filter(|item| matches!(item, crate::common::Item::Buffer { .. }))
        .count();
    assert_eq!(buffers, 300);
    assert_eq!(stat(&pipeline.narrator, "frames"), 300);
    let longest = Duration::from_micros(longest.load(Ordering::SeqCst));
    assert!(
        longest < Duration::from_millis(400),
        "a buffer was held for {longest:?}"
    );

    // Newest wins: every two seconds the frame of the last half second; at EOS the last of all.
    let timestamps = heard.timestamps();
    let [first, second, third, last] = timestamps[..] else {
        panic!("{timestamps:?}");
    };
    for gap in [second - first, third - second] {
        assert!((ms(1400)..ms(2600)).contains(&gap), "{timestamps:?}");
    }
    assert_eq!(last - first, ms(4500));
    assert_eq!(stat(&pipeline.narrator, "sampled"), 10);
    assert_eq!(stat(&pipeline.narrator, "dropped"), 6);
    for caption in &heard.captions {
        let waited = caption.arrival_time.unwrap() - caption.stamp.running_time.unwrap();
        assert!(waited >= ms(2000), "{waited}");
        assert!(waited.absdiff(ClockTime::try_from(caption.cost.latency).unwrap()) < ms(200));
    }
}

#[test]
fn auto_asks_upstream() {
    for live in [false, true] {
        let fake = Fake::slow(Duration::from_millis(200));
        let pipeline = Pipeline::new(
            &format!(
                "videotestsrc is-live={live} num-buffers=5 ! video/x-raw,framerate=20/1
                 ! vlmnarrate name=n interval=0 ! fakesink"
            ),
            &fake,
        );
        let heard = pipeline.run_to_eos();
        match live {
            true => assert!(heard.captions.len() < 5),
            false => assert_eq!(heard.captions.len(), 5),
        }
    }
}

const CAPS: &str = "video/x-raw,format=GRAY8,width=8,height=8,framerate=10/1";

fn frame(ms_: u64) -> gst::Buffer {
    crate::common::buffer(64, 0, ms(ms_))
}

#[test]
fn frames_pass_while_the_model_loads_and_the_newest_is_kept() {
    let fake = Fake::new();
    fake.plan().load_time = Duration::from_millis(300);
    let (mut harness, element, log) = harness(&fake, CAPS);
    element.set_property_from_str("mode", "live");
    element.set_property("interval", ms(100));
    for i in 0..10 {
        harness.push_and_pull(frame(100 * i)).unwrap();
    }
    let heard = log.wait(|heard| !heard.captions.is_empty());
    assert_eq!(heard.timestamps(), [ms(900)]);
    assert_eq!(stat(&element, "dropped"), 9);
}

#[test]
fn interval_zero_samples_when_the_worker_is_free() {
    let fake = Fake::slow(Duration::from_millis(100));
    let (mut harness, narrator, log) = live_harness(&fake);
    narrator.set_property("interval", 0u64);
    let mut heard = Vec::new();
    for i in 0..30 {
        harness.push_and_pull(frame(100 * i)).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        heard.extend(log.heard().captions);
    }
    assert!((2..12).contains(&heard.len()), "{} captions", heard.len());
    assert_eq!(stat(&narrator, "dropped"), 0);
}

/// With many elements on one model a turn is a long time coming. The caption is of what is there when it comes.
#[test]
fn a_frame_that_waits_for_its_turn_is_replaced_as_it_ages() {
    let fake = Fake::new();
    fake.plan().turn_time = Duration::from_secs(1);
    let (mut harness, narrator, log) = live_harness(&fake);
    narrator.set_property("interval", 0u64);
    let mut pushed = 0;
    let heard = loop {
        harness.push_and_pull(frame(10 * pushed)).unwrap();
        std::thread::sleep(Duration::from_millis(10));
        pushed += 1;
        let heard = log.heard();
        if !heard.captions.is_empty() {
            break heard;
        }
    };
    let replaced = stat(&narrator, "dropped");
    assert!((1..=4).contains(&replaced), "{replaced} replaced");
    let described = heard.timestamps()[0];
    assert!(described > ms(0), "the first one of {pushed}");
}

fn live_harness(
    fake: &Fake,
) -> (
    gst_check::Harness,
    gstvlmnarrate::VlmNarrate,
    crate::common::Log,
) {
    let (harness, narrator, log) = harness(fake, CAPS);
    // In READY at the latest, says the property; the harness has played already, but no buffer
    // has come.
    narrator.set_property_from_str("mode", "live");
    // A worker that still loads would make the first frame wait.
    log.wait(|heard| {
        heard
            .progress
            .iter()
            .any(|(type_, _)| *type_ == gst::ProgressType::Complete)
    });
    (harness, narrator, log)
}

#[test]
fn eos_waits_for_the_caption_under_way() {
    let fake = Fake::slow(Duration::from_millis(300));
    let (mut harness, _narrator, log) = live_harness(&fake);
    harness.push(frame(0)).unwrap();
    harness.push(frame(1000)).unwrap();
    assert_eq!(log.heard().captions, []);
    harness.push_event(gst::event::Eos::new());
    // Both: the one under way and the one in the slot.
    assert_eq!(log.heard().timestamps().last(), Some(&ms(1000)));
}

#[test]
fn eos_does_not_wait_for_longer_than_it_may() {
    for timeout in [0, 100] {
        let fake = Fake::slow(Duration::from_secs(20));
        let (mut harness, narrator, log) = live_harness(&fake);
        narrator.set_property("drain-timeout", ms(timeout));
        harness.push(frame(0)).unwrap();
        let start = Instant::now();
        harness.push_event(gst::event::Eos::new());
        let took = start.elapsed();
        let timeout = Duration::from_millis(timeout);
        assert!(
            (timeout..timeout + Duration::from_secs(2)).contains(&took),
            "{took:?}"
        );
        assert_eq!(log.heard().captions, []);
    }
}

#[test]
fn a_flush_ends_the_wait_of_eos() {
    let fake = Fake::slow(Duration::from_secs(20));
    let (mut harness, narrator, _log) = live_harness(&fake);
    harness.push(frame(0)).unwrap();
    fake.wait_requests(1);
    let sink = narrator.static_pad("sink").unwrap();
    let flush = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        sink.send_event(gst::event::FlushStart::new());
    });
    let start = Instant::now();
    harness.push_event(gst::event::Eos::new());
    assert!(start.elapsed() < Duration::from_secs(3));
    flush.join().unwrap();
    wait_for(|| fake.cancelled() == 1);
}

#[test]
fn a_cut_is_described_at_once() {
    let (mut harness, narrator, log) = live_harness(&Fake::new());
    narrator.set_property("scene-threshold", 0.05);
    narrator.set_property("interval", ClockTime::ZERO);
    let mut number = 0;
    let mut push = |grey| {
        harness
            .push(crate::common::buffer(64, grey, ms(20 * number)))
            .unwrap();
        std::thread::sleep(Duration::from_millis(5));
        number += 1;
        number
    };
    // The worker may not be free yet.
    while stat(&narrator, "captions") == 0 {
        push(0);
    }
    log.wait(|heard| heard.captions.len() == 1);
    for _ in 0..15 {
        push(0);
    }
    let cut = push(200) - 1;
    for _ in 0..15 {
        push(200);
    }
    let captions = log.wait(|heard| !heard.captions.is_empty()).captions;
    let frames: Vec<_> = captions.iter().map(|c| c.stamp.frame).collect();
    assert_eq!(frames, [cut]);
    // And that was all.
    assert_eq!(stat(&narrator, "sampled"), 2);
}

#[test]
fn unchanged_pictures_stay_out_of_the_slot() {
    let (mut harness, narrator, log) = live_harness(&Fake::new());
    narrator.set_property("scene-threshold", 0.05);
    for (second, grey) in [(0, 0), (1, 0), (2, 200), (3, 200)] {
        harness
            .push(crate::common::buffer(
                64,
                grey,
                ClockTime::from_seconds(second),
            ))
            .unwrap();
        std::thread::sleep(Duration::from_millis(30));
    }
    let frames: Vec<_> = log.heard().captions.iter().map(|c| c.stamp.frame).collect();
    assert_eq!(frames, [0, 2]);
}

/// Nice values of the model's threads.
#[cfg(target_os = "linux")]
fn nice_values() -> Vec<u32> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let stats = tasks.filter_map(|task| {
        // It may have ended by now.
        let stat = std::fs::read_to_string(task.ok()?.path().join("stat")).ok()?;
        let (name, fields) = stat.rsplit_once(')')?;
        let is_ours = name.contains("(vlmnarrate");
        is_ours.then(|| fields.split_whitespace().nth(16).unwrap().parse().unwrap())
    });
    stats.collect()
}

/// So that a decoder keeps its rate.
#[cfg(target_os = "linux")]
#[test]
fn the_models_threads_give_way() {
    let pipeline = Pipeline::new(
        "videotestsrc num-buffers=1 ! vlmnarrate name=n nice=3 ! fakesink",
        &Fake::new(),
    );
    pipeline.narrator.set_engine_loader(SmolVlmLoader);
    // Not down to NULL: the threads would be on their way out.
    pipeline.play();
    let heard = pipeline.log.wait(|heard| heard.eos);
    assert_eq!(heard.captions.len(), 1);
    let values = nice_values();
    // The worker and at least one for the arithmetic.
    assert!(values.len() >= 2, "{values:?}");
    assert!(values.iter().all(|nice| *nice == 3), "{values:?}");
}
