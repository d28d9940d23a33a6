//! Timestamps that loop, stand still, are missing or run backwards.

use crate::common::{Fake, Heard, engine::wait_for, harness, ms};
use gst::{ClockTime, prelude::*};
use gstvlmnarrate::{Caption, VlmNarrate};

const CAPS: &str = "video/x-raw,format=GRAY8,width=8,height=8,framerate=10/1";

fn frame(pts: impl Into<Option<ClockTime>>) -> gst::Buffer {
    crate::common::buffer(64, 0, pts)
}

/// What is said of a stream of frames that last 100 ms, with these timestamps.
fn said(pts: impl IntoIterator<Item = Option<u64>>) -> Heard {
    let (mut harness, _narrator, log) = harness(&Fake::new(), CAPS);
    for pts in pts {
        harness.push(frame(pts.map(ms))).unwrap();
    }
    log.heard()
}

/// Numbers of the frames that were described.
fn frames(heard: &Heard) -> Vec<u64> {
    heard.captions.iter().map(|c| c.stamp.frame).collect()
}

#[test]
fn loops_keep_the_pace_however_long_they_are() {
    for length in [1, 3, 9, 20, 50] {
        let heard = said((0..100).map(|i| Some(i % length * 100)));
        let frames = frames(&heard);
        assert!((9..=11).contains(&frames.len()), "{length}: {frames:?}");
        let steps = frames.windows(2).map(|pair| pair[1] - pair[0]);
        assert!(steps.max() <= Some(13), "{length}: {frames:?}");
    }
}

#[test]
fn timestamps_that_stand_still_do_not_silence_it() {
    let heard = said((0..100).map(|_| Some(5000)));
    assert_eq!(heard.captions.len(), 10);
    // Nor where nobody says how long a frame lasts.
    let caps = "video/x-raw,format=GRAY8,width=8,height=8,framerate=0/1";
    let (mut harness, _narrator, log) = harness(&Fake::new(), caps);
    for _ in 0..100 {
        harness.push(frame(ms(5000))).unwrap();
    }
    assert_eq!(log.heard().captions.len(), 4, "40 ms a frame");
}

#[test]
fn missing_timestamps_continue_from_the_last() {
    for first in [0, 3] {
        let some = |i: u64| (i % 10 == first).then_some(100_000 + i * 100);
        let heard = said((0..30).map(some));
        assert_eq!(frames(&heard), [0, 10, 20]);
    }
}

#[test]
fn the_pace_is_that_of_the_stream_in_either_direction() {
    let (mut harness, _narrator, log) = harness(&Fake::new(), CAPS);
    harness.push_event(segment(-1.0));
    for i in (0..35).rev() {
        harness.push(frame(ms(100 * i))).unwrap();
    }
    let timestamps = log.heard().timestamps();
    assert_eq!(timestamps, [ms(3400), ms(2400), ms(1400), ms(400)]);
}

fn segment(rate: f64) -> gst::Event {
    let mut segment = gst::FormattedSegment::<ClockTime>::new();
    segment.set_rate(rate);
    segment.set_stop(ms(60_000));
    gst::event::Segment::new(&segment)
}

#[test]
fn a_segment_that_comes_again_means_nothing() {
    let (mut harness, _narrator, log) = harness(&Fake::new(), CAPS);
    for i in 0..30 {
        harness.push(frame(ms(100 * i))).unwrap();
        let mut segment = gst::FormattedSegment::<ClockTime>::new();
        segment.set_position(ms(100 * i));
        harness.push_event(gst::event::Segment::new(&segment));
    }
    assert_eq!(frames(&log.heard()), [0, 10, 20]);
    // Of another stream it is another segment.
    harness.push_event(gst::event::StreamStart::new("another"));
    harness.push_event(gst::event::Segment::new(
        &gst::FormattedSegment::<ClockTime>::new(),
    ));
    harness.push(frame(ms(3000))).unwrap();
    assert_eq!(frames(&log.heard()), [30]);
}

/// A recorded clip that has begun, and what the frames of it that came are said to be after an event.
fn clip_before(event: gst::Event) -> Vec<(Option<ClockTime>, u32)> {
    let (mut harness, narrator, log) = harness(&Fake::new(), CAPS);
    narrator.set_property("frames", 4u32);
    for i in 0..6 {
        harness.push(frame(ms(100 * i))).unwrap();
    }
    assert_eq!(log.heard().captions.len(), 0);
    harness.push_event(event);
    let stamps = log.heard().captions.into_iter().map(|c| c.stamp);
    stamps
        .map(|stamp| (stamp.timestamp, stamp.frames))
        .collect()
}

#[test]
fn whatever_ends_a_recording_a_clip_that_has_begun_is_described() {
    crate::common::init();
    let expected = [(Some(ms(500)), 3)];
    for event in [
        gst::event::Eos::new(),
        gst::event::SegmentDone::new(ms(600)),
        gst::event::StreamStart::new("another"),
        segment(1.0),
    ] {
        let name = event.type_();
        assert_eq!(clip_before(event), expected, "{name}");
    }
    // A flush throws away.
    assert_eq!(clip_before(gst::event::FlushStart::new()), []);
}

/// As videorate and intervideosrc flag the frames that they repeat.
fn repeated(at: u64) -> gst::Buffer {
    let mut buffer = frame(ms(at));
    let flags = gst::BufferFlags::GAP;
    buffer.get_mut().unwrap().set_flags(flags);
    buffer
}

#[test]
fn a_repeated_frame_is_a_frame() {
    let (mut harness, narrator, log) = harness(&Fake::new(), CAPS);
    for i in 0..30 {
        harness.push(repeated(100 * i)).unwrap();
    }
    assert_eq!(frames(&log.heard()), [0, 10, 20]);
    let id = narrator.describe_now(None, None);
    harness.push(repeated(2950)).unwrap();
    assert_eq!(log.heard().captions[0].stamp.request_id, id.unwrap());
    // A picture that is not there can't be described.
    harness.push(crate::common::buffer(0, 0, ms(9000))).unwrap();
    assert_eq!(log.heard().captions.len(), 0);
}

#[test]
fn a_still_picture_that_is_repeated_is_described_every_half_minute() {
    let (mut harness, narrator, log) = harness(&Fake::new(), CAPS);
    narrator.set_property("scene-threshold", 0.02);
    for i in 0..650 {
        harness.push(repeated(100 * i)).unwrap();
    }
    assert_eq!(frames(&log.heard()), [0, 300, 600]);
}

/// Live, with one caption that is the only one to come.
fn captioned_once(at: u64, rate: f64) -> (gst_check::Harness, VlmNarrate) {
    let fake = Fake::new();
    let (mut harness, narrator, log) = harness(&fake, CAPS);
    narrator.set_property_from_str("mode", "live");
    narrator.set_property("expire", ms(1000));
    harness.push_event(segment(rate));
    harness.push(frame(ms(at))).unwrap();
    log.wait(|heard| heard.captions.len() == 1);
    fake.plan().fails_with = Some(gstvlmnarrate::engine::ErrorKind::Failed);
    narrator.set_property("interval", ClockTime::from_seconds(3600));
    (harness, narrator)
}

#[test]
fn a_caption_expires_in_either_direction_and_in_loops() {
    let backwards: fn(u64) -> u64 = |i| 50_000 - 100 * i;
    let forwards: fn(u64) -> u64 = |i| 100 * i;
    let looped: fn(u64) -> u64 = |i| i % 5 * 100;
    for (rate, pts) in [(-1.0, backwards), (1.0, forwards), (1.0, looped)] {
        let (mut harness, narrator) = captioned_once(pts(0), rate);
        let mut last = None;
        for i in 1..20 {
            while harness.try_pull().is_some() {}
            harness.push(frame(ms(pts(i)))).unwrap();
            let buffer = harness.pull().unwrap();
            if Caption::try_from(buffer.as_ref()).is_ok() {
                last = Some(i);
            }
        }
        // The caption may be ready while the frame that it describes is still here.
        assert!(matches!(last, Some(9 | 10)), "rate {rate}: {last:?}");
        wait_for(|| narrator.property::<Option<String>>("caption").is_none());
    }
}
