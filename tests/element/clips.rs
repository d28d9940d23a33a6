//! Clips: several frames that are described together.

use std::time::Duration;

use crate::common::{
    Fake, Item, Pipeline, engine::wait_for, harness, harness_with, ms, narrator, spy,
};
use gst::{ClockTime, prelude::*};
use gstvlmnarrate::caption::Trigger;

const CAPS: &str = "video/x-raw,format=GRAY8,width=32,height=32,framerate=10/1";

/// A grey frame at a time.
fn grey(level: u8, at: u64) -> gst::Buffer {
    crate::common::buffer(32 * 32, level, ms(at))
}

/// First and last timestamp and number of frames of each clip, in milliseconds.
fn spans(heard: &crate::common::Heard) -> Vec<(u64, u64, u32)> {
    let span = |caption: &gstvlmnarrate::Caption| {
        let stamp = &caption.stamp;
        let [first, last] =
            [stamp.first_timestamp, stamp.timestamp].map(|time| time.unwrap().mseconds());
        (first, last, stamp.frames)
    };
    heard.captions.iter().map(span).collect()
}

fn pipeline(properties: &str, frames: u32, fake: &Fake) -> Pipeline {
    Pipeline::new(
        &format!(
            "videotestsrc pattern=ball num-buffers={frames} ! video/x-raw,framerate=10/1
             ! vlmnarrate name=n {properties} ! fakesink name=sink"
        ),
        fake,
    )
}

#[test]
fn frames_are_spread_over_the_interval_and_the_rest_is_described_at_the_end() {
    let fake = Fake::new();
    let pipeline = pipeline("frames=4", 22, &fake);
    let passed = spy(&pipeline.element("sink").static_pad("sink").unwrap());
    let heard = pipeline.run_to_eos();
    assert_eq!(
        spans(&heard),
        [(0, 800, 4), (1000, 1800, 4), (2000, 2000, 1)]
    );
    assert!(heard.warnings.is_empty(), "{:?}", heard.warnings);
    let requests = fake.requests();
    let clip = requests[1].clip.as_ref().unwrap();
    let times = [0, 300, 500, 800].map(Duration::from_millis);
    assert_eq!(
        (clip.times.as_slice(), clip.duration),
        (times.as_slice(), Duration::from_secs(1))
    );
    let pictures = requests.iter().map(|request| request.pictures);
    assert_eq!(Vec::from_iter(pictures), [4, 4, 1]);
    assert_eq!(requests[0].prompt, "Describe this video in one sentence.");
    assert_eq!(heard.captions[0].prompt, requests[0].prompt);
    // The end of the stream comes after its last caption.
    assert!(matches!(
        passed.lock().unwrap().last(),
        Some(Item::Event(gst::EventType::Eos))
    ));
}

#[test]
fn interval_zero_is_frames_in_a_row_and_every_nth_counts_clips() {
    for (properties, expected) in [
        (
            "frames=3 interval=0",
            vec![(0, 200, 3), (300, 500, 3), (600, 700, 2)],
        ),
        (
            "frames=2 interval=0 every-nth=2",
            vec![(0, 100, 2), (400, 500, 2)],
        ),
        (
            "frames=2 interval=400000000",
            vec![(0, 200, 2), (400, 600, 2)],
        ),
        // More than there are: each of them.
        (
            "frames=4 interval=200000000",
            vec![(0, 300, 4), (400, 700, 4)],
        ),
    ] {
        let heard = pipeline(properties, 8, &Fake::new()).run_to_eos();
        assert_eq!(spans(&heard), expected, "{properties}");
    }
}

#[test]
fn who_asks_is_asked_for() {
    let fake = Fake::new();
    let pipeline = pipeline("frames=2 prompt=Whither? image-splitting=true", 10, &fake);
    pipeline.reach(gst::State::Ready);
    let id = pipeline.narrator.describe_now(None, None).unwrap();
    let heard = pipeline.run_to_eos();
    let captions = heard
        .captions
        .iter()
        .map(|c| (c.stamp.request_id, c.stamp.frames));
    // The request was for the frame that came then, in the middle of a clip.
    assert_eq!(Vec::from_iter(captions), [(id, 1), (0, 2)]);
    let requests = fake.requests();
    assert_eq!(requests[0].clip, None);
    assert_eq!(requests[0].prompt, "Describe this frame in detail.");
    assert_eq!(
        (requests[1].prompt.as_str(), requests[1].splitting),
        ("Whither?", false)
    );
}

#[test]
fn one_changed_frame_makes_a_clip_worth_describing() {
    let element = narrator(&Fake::new());
    element.set_property("frames", 2u32);
    element.set_property("interval", ms(200));
    element.set_property("scene-threshold", 0.1);
    let (mut harness, log) = harness_with(&element, CAPS);
    let levels = [100, 100, 100, 100, 200, 100, 100, 100];
    for (level, at) in levels.into_iter().zip((0..).step_by(100)) {
        harness.push_and_pull(grey(level, at)).unwrap();
    }
    let heard = log.heard();
    let clips = heard
        .captions
        .iter()
        .map(|c| (c.stamp.frame, c.stamp.trigger));
    assert_eq!(
        Vec::from_iter(clips),
        [(1, Trigger::Interval), (5, Trigger::Scene)]
    );
    let stats = element.property::<gst::Structure>("stats");
    assert_eq!(stats.get::<u64>("unchanged"), Ok(2));
}

#[test]
fn a_flush_and_a_new_number_of_frames_begin_a_clip_anew() {
    let element = narrator(&Fake::new());
    element.set_property("frames", 3u32);
    element.set_property("interval", ClockTime::ZERO);
    let (mut harness, log) = harness_with(&element, CAPS);
    let push = |harness: &mut gst_check::Harness, times: std::ops::Range<u64>| {
        for at in times {
            harness.push_and_pull(grey(0, 100 * at)).unwrap();
        }
    };
    push(&mut harness, 0..2);
    harness.push_event(gst::event::FlushStart::new());
    harness.push_event(gst::event::FlushStop::new(false));
    let segment = gst::FormattedSegment::<ClockTime>::new();
    harness.push_event(gst::event::Segment::new(&segment));
    push(&mut harness, 10..13);
    push(&mut harness, 20..22);
    // What was meant for a clip of three makes one of two.
    element.set_property("frames", 2u32);
    push(&mut harness, 30..34);
    assert_eq!(
        spans(&log.heard()),
        [(1000, 1200, 3), (2000, 3000, 3), (3100, 3200, 2)]
    );
}

#[test]
fn backwards_clips_are_oldest_first_still() {
    let fake = Fake::new();
    let element = narrator(&fake);
    element.set_property("frames", 3u32);
    element.set_property("interval", ClockTime::ZERO);
    let (mut harness, log) = harness_with(&element, CAPS);
    for at in [900, 800, 700] {
        harness.push_and_pull(grey((at / 10) as u8, at)).unwrap();
    }
    assert_eq!(spans(&log.heard()), [(700, 700, 3)]);
    let clip = fake.requests().remove(0).clip.unwrap();
    assert_eq!(clip.times, [0, 100, 200].map(Duration::from_millis));
    // The fake tells of the last picture.
    let said = element.property::<String>("caption");
    assert_eq!(said, "mean colour [90, 90, 90]");
}

#[test]
fn merged_cues_begin_with_the_clip() {
    let element = narrator(&Fake::new());
    element.set_property("frames", 2u32);
    element.set_property("interval", ms(400));
    element.set_property("merge-captions", true);
    let text = element.request_pad_simple("text_src").unwrap();
    let items = spy(&text);
    let (mut harness, _log) = harness_with(&element, CAPS);
    for (level, at) in [0, 0, 0, 0, 100, 100, 100, 100]
        .into_iter()
        .zip((0..).step_by(100))
    {
        harness.push_and_pull(grey(level, at)).unwrap();
    }
    harness.push_event(gst::event::Eos::new());
    let items = items.lock().unwrap();
    let cues = items.iter().filter_map(|item| match item {
        Item::Buffer { pts, duration, .. } => {
            let start = pts.unwrap();
            Some((start.mseconds(), (start + duration.unwrap()).mseconds()))
        }
        _ => None,
    });
    // The second is about what is seen from 400 on, though it was ready at 600.
    assert_eq!(Vec::from_iter(cues), [(200, 400), (400, 800)]);
}

#[test]
fn live_nothing_waits_and_the_newest_clip_wins() {
    let fake = Fake::slow(Duration::from_millis(500));
    let pipeline = Pipeline::new(
        "videotestsrc is-live=true num-buffers=60 ! video/x-raw,width=64,height=48,framerate=60/1
         ! vlmnarrate name=n frames=3 interval=100000000 ! fakesink name=sink sync=false",
        &fake,
    );
    let passed = spy(&pipeline.element("sink").static_pad("sink").unwrap());
    let start = std::time::Instant::now();
    pipeline.play();
    wait_for(|| {
        passed
            .lock()
            .unwrap()
            .iter()
            .filter(|i| matches!(i, Item::Buffer { .. }))
            .count()
            == 60
    });
    // A second of video, while a caption takes half of one: it would take five if it waited.
    assert!(start.elapsed() < Duration::from_secs(3));
    let heard = pipeline.log.wait(|heard| heard.eos);
    assert!(heard.captions.len() >= 2);
    for (first, last, frames) in spans(&heard) {
        assert_eq!(frames, 3);
        assert!((66..=84).contains(&(last - first)), "{first} to {last}");
    }
    let stats = pipeline.narrator.property::<gst::Structure>("stats");
    assert!(stats.get::<u64>("dropped").unwrap() >= 5, "{stats}");
}

#[test]
fn a_picture_alone_is_no_clip() {
    let fake = Fake::new();
    let (mut harness, _element, log) = harness(&fake, CAPS);
    harness.push_and_pull(grey(0, 100)).unwrap();
    assert_eq!(spans(&log.heard()), [(100, 100, 1)]);
    assert_eq!(fake.requests().remove(0).clip, None);
}
