//! Flushes, segments and `describe-now` requests.

use std::{
    sync::{Mutex, mpsc},
    thread,
    time::Duration,
};

use crate::common::{Fake, Item, Pipeline, engine::wait_for, harness, ms, spy};
use gst::{ClockTime, prelude::*};
use gstvlmnarrate::{VlmNarrate, caption::Trigger};

const CAPS: &str = "video/x-raw,format=GRAY8,width=8,height=8,framerate=10/1";

fn frame(at: u64) -> gst::Buffer {
    crate::common::buffer(64, 0, ms(at))
}

fn describe_now(narrator: &VlmNarrate, prompt: Option<&str>, max_tokens: u32) -> u32 {
    narrator.emit_by_name("describe-now", &[&prompt, &max_tokens])
}

fn describe_now_event() -> gst::structure::Builder {
    gst::Structure::builder("vlmnarrate-describe-now")
}

#[test]
fn describe_now_describes_the_next_frame_with_what_it_was_given() {
    let fake = Fake::new();
    let (mut harness, narrator, log) = harness(&fake, CAPS);
    narrator.set_property("scene-threshold", 1.0);
    harness.push(frame(0)).unwrap();
    assert_eq!(describe_now(&narrator, None, 0), 1);
    assert_eq!(narrator.describe_now(Some("Who?"), Some(3)), Some(2));
    harness.push(frame(100)).unwrap();
    harness.push(frame(200)).unwrap();

    let heard = log.heard();
    let captions: Vec<_> = heard
        .captions
        .iter()
        .map(|c| {
            (
                c.stamp.frame,
                c.stamp.trigger,
                c.stamp.request_id,
                c.prompt.as_str(),
            )
        })
        .collect();
    // Recorded: two questions, one frame.
    let expected = [
        (
            0,
            Trigger::Interval,
            0,
            "Describe this frame in one sentence.",
        ),
        (1, Trigger::Request, 1, "Describe this frame in detail."),
        (1, Trigger::Request, 2, "Who?"),
    ];
    assert_eq!(captions, expected);
    let tokens: Vec<_> = fake
        .requests()
        .iter()
        .map(|request| request.max_tokens)
        .collect();
    assert_eq!(tokens, [20, 50, 3]);
}

#[test]
fn a_frame_may_be_due_and_asked_about() {
    let (mut harness, narrator, log) = harness(&Fake::new(), CAPS);
    assert_eq!(describe_now(&narrator, None, 0), 1);
    harness.push(frame(0)).unwrap();
    let heard = log.heard();
    let triggers: Vec<_> = heard.captions.iter().map(|c| c.stamp.trigger).collect();
    assert_eq!(triggers, [Trigger::Interval, Trigger::Request]);
}

#[test]
fn a_question_may_come_as_an_event_from_either_side() {
    let fake = Fake::new();
    let (mut harness, narrator, log) = harness(&fake, CAPS);
    let text = narrator.request_pad_simple("text_src").unwrap();
    harness.push(frame(0)).unwrap();
    let passed = spy(&narrator.static_pad("src").unwrap());

    let named = describe_now_event()
        .field("prompt", "Up?")
        .field("max-tokens", 5u32)
        .build();
    assert!(harness.push_upstream_event(gst::event::CustomUpstream::new(named)));
    let plain = describe_now_event().build();
    assert!(harness.push_event(gst::event::CustomDownstream::new(plain.clone())));
    let signed = describe_now_event()
        .field("prompt", "Text?")
        .field("max-tokens", 6i32)
        .build();
    assert!(text.send_event(gst::event::CustomUpstream::new(signed)));
    harness.push(frame(100)).unwrap();

    let heard = log.heard();
    let prompts: Vec<_> = heard.captions[1..]
        .iter()
        .map(|c| c.prompt.as_str())
        .collect();
    assert_eq!(prompts, ["Up?", "Describe this frame in detail.", "Text?"]);
    let tokens: Vec<_> = fake.requests()[1..]
        .iter()
        .map(|request| request.max_tokens)
        .collect();
    assert_eq!(tokens, [5, 50, 6]);
    // It was for us; other events are for those downstream.
    let other = gst::event::CustomDownstream::new(gst::Structure::new_empty("other"));
    assert!(harness.push_event(other));
    let custom = Item::Event(gst::EventType::CustomDownstream);
    assert_eq!(
        passed
            .lock()
            .unwrap()
            .iter()
            .filter(|item| **item == custom)
            .count(),
        1
    );
}

#[test]
fn a_question_has_priority_over_the_newest_frame_when_live() {
    let fake = Fake::slow(Duration::from_millis(100));
    let (mut harness, narrator, log) = harness(&fake, CAPS);
    narrator.set_property_from_str("mode", "live");
    harness.push(frame(0)).unwrap();
    fake.wait_requests(1);
    assert_eq!(describe_now(&narrator, None, 0), 1);
    assert_eq!(describe_now(&narrator, None, 0), 2);
    for second in 1..4 {
        harness.push(frame(1000 * second)).unwrap();
    }
    wait_for(|| fake.requests().len() == 2);
    harness.push(frame(4000)).unwrap();
    harness.push_event(gst::event::Eos::new());
    let heard = log.heard();
    let captions: Vec<_> = heard
        .captions
        .iter()
        .map(|c| (c.stamp.frame, c.stamp.request_id))
        .collect();
    assert_eq!(captions, [(0, 0), (1, 1), (4, 2), (4, 0)]);
}

#[test]
fn a_question_is_refused_in_null_and_when_too_many_wait() {
    let narrator = crate::common::narrator(&Fake::new());
    assert_eq!(describe_now(&narrator, None, 0), 0);
    let event = gst::event::CustomUpstream::new(describe_now_event().build());
    assert!(!narrator.static_pad("src").unwrap().send_event(event));

    let (_harness, narrator, _log) = harness(&Fake::new(), CAPS);
    for id in 1..=64 {
        assert_eq!(describe_now(&narrator, None, 0), id);
    }
    assert_eq!(describe_now(&narrator, None, 0), 0);
}

/// Live, one frame described, and an engine that will be busy with the next for longer than any test.
fn narrated_then_slow(
    fake: &Fake,
) -> (
    gst_check::Harness,
    gstvlmnarrate::VlmNarrate,
    crate::common::Log,
) {
    let (mut harness, narrator, log) = harness(fake, CAPS);
    narrator.set_property_from_str("mode", "live");
    harness.push(frame(0)).unwrap();
    log.wait(|heard| heard.captions.len() == 1);
    fake.plan().caption_time = Duration::from_secs(20);
    (harness, narrator, log)
}

#[test]
fn a_flush_cancels_forgets_the_caption_and_asks_again() {
    let fake = Fake::new();
    let (mut harness, narrator, log) = narrated_then_slow(&fake);
    describe_now(&narrator, Some("Who?"), 0);
    harness.push(frame(100)).unwrap();
    fake.wait_requests(2);
    assert!(narrator.property::<Option<String>>("caption").is_some());

    harness.push_event(gst::event::FlushStart::new());
    assert!(narrator.property::<Option<String>>("caption").is_none());
    wait_for(|| fake.cancelled() == 1);
    fake.plan().caption_time = Duration::from_millis(100);
    harness.push_event(gst::event::FlushStop::new(true));
    let segment = gst::FormattedSegment::<ClockTime>::new();
    harness.push_event(gst::event::Segment::new(&segment));
    while harness.try_pull().is_some() {}
    harness.push(frame(5000)).unwrap();
    let buffer = harness.pull().unwrap();
    assert!(gstvlmnarrate::Caption::try_from(buffer.as_ref()).is_err());

    let heard = log.wait(|heard| heard.captions.len() == 2);
    let mut captions: Vec<_> = heard
        .captions
        .iter()
        .map(|c| (c.prompt.as_str(), c.stamp.timestamp, c.stamp.request_id))
        .collect();
    captions.sort();
    let prompt = "Describe this frame in one sentence.";
    assert_eq!(
        captions,
        [(prompt, Some(ms(5000)), 0), ("Who?", Some(ms(5000)), 1)]
    );
    assert_eq!(fake.loads().len(), 1, "the model stays loaded");
}

#[test]
fn flush_start_frees_a_recorded_frame_at_once() {
    let fake = Fake::slow(Duration::from_secs(20));
    let (mut harness, narrator, log) = harness(&fake, CAPS);
    let sink = narrator.static_pad("sink").unwrap();
    let flush = thread::spawn({
        let fake = fake.clone();
        move || {
            fake.wait_requests(1);
            sink.send_event(gst::event::FlushStart::new());
        }
    });
    assert_eq!(harness.push(frame(0)), Err(gst::FlowError::Flushing));
    flush.join().unwrap();
    wait_for(|| fake.cancelled() == 1);
    let heard = log.heard();
    assert_eq!((heard.captions.len(), heard.warnings.len()), (0, 0));
}

#[test]
fn no_caption_comes_behind_flush_start() {
    let (mut harness, narrator, log) = harness(&Fake::new(), CAPS);
    narrator.set_property_from_str("mode", "live");
    let (spoken, speaks) = mpsc::channel();
    let spoken = Mutex::new(Some(spoken));
    let sink = narrator.static_pad("sink").unwrap();
    // The worker is about to post its caption when the flush begins.
    narrator.connect_notify(Some("caption"), move |_, _| {
        let Some(spoken) = spoken.lock().unwrap().take() else {
            return;
        };
        spoken.send(()).unwrap();
        wait_for(|| sink.pad_flags().contains(gst::PadFlags::FLUSHING));
        thread::sleep(Duration::from_millis(10));
    });
    harness.push(frame(0)).unwrap();
    speaks.recv_timeout(crate::common::TIMEOUT.into()).unwrap();
    harness.push_event(gst::event::FlushStart::new());
    assert_eq!(log.heard().captions.len(), 1, "it is waited for");
    assert!(narrator.property::<Option<String>>("caption").is_none());
}

#[test]
fn a_storm_of_seeks_ends_normally() {
    let fake = Fake::slow(Duration::from_millis(3));
    let pipeline = crate::common::sought(&fake);
    for i in 0..80u64 {
        let flags = gst::SeekFlags::FLUSH | gst::SeekFlags::ACCURATE;
        pipeline
            .pipeline
            .seek_simple(flags, ClockTime::from_seconds(i * 7 % 50))
            .unwrap();
        thread::sleep(Duration::from_millis(i % 5));
    }
    crate::common::ends_normally(&pipeline, &fake, 25);
}

#[test]
fn reverse_playback_is_described_too() {
    let fake = Fake::new();
    let pipeline = Pipeline::new(
        "videotestsrc ! video/x-raw,framerate=10/1 ! vlmnarrate name=n ! fakesink",
        &fake,
    );
    pipeline.reach(gst::State::Paused);
    pipeline.log.heard();
    let (start, stop) = (ClockTime::ZERO, ClockTime::from_seconds(3));
    let set = gst::SeekType::Set;
    let flags = gst::SeekFlags::FLUSH | gst::SeekFlags::ACCURATE;
    pipeline
        .pipeline
        .seek(-1.0, flags, set, start, set, stop)
        .unwrap();
    let heard = pipeline.run_to_eos();
    let timestamps = heard.timestamps();
    assert!((3..=5).contains(&timestamps.len()), "{timestamps:?}");
    assert!(timestamps.is_sorted_by(|a, b| a > b), "{timestamps:?}");
    assert!(heard.captions.is_sorted_by_key(|c| c.stamp.running_time));
}

#[test]
fn frames_outside_of_the_segment_are_nobodys_business() {
    let (mut harness, _narrator, log) = harness(&Fake::new(), CAPS);
    let mut segment = gst::FormattedSegment::<ClockTime>::new();
    segment.set_start(ms(2000));
    segment.set_stop(ms(4000));
    harness.push_event(gst::event::Segment::new(&segment));
    for second in 0..6 {
        harness.push(frame(1000 * second + 500)).unwrap();
    }
    assert_eq!(log.heard().timestamps(), [ms(2500), ms(3500)]);
    assert_eq!(harness.buffers_received(), 6);
}

#[test]
fn a_new_segment_starts_a_new_grid() {
    let (mut harness, _narrator, log) = harness(&Fake::new(), CAPS);
    for at in [0, 900, 1000] {
        harness.push(frame(at)).unwrap();
    }
    let mut segment = gst::FormattedSegment::<ClockTime>::new();
    segment.set_base(ms(1100));
    harness.push_event(gst::event::Segment::new(&segment));
    for at in [1500, 2000, 2500] {
        harness.push(frame(at)).unwrap();
    }
    assert_eq!(
        log.heard().timestamps(),
        [ms(0), ms(1000), ms(1500), ms(2500)]
    );
}

#[test]
fn a_segment_in_bytes_is_a_stream_without_times() {
    let (mut harness, _narrator, log) = harness(&Fake::new(), CAPS);
    let segment = gst::FormattedSegment::<gst::format::Bytes>::new();
    harness.push_event(gst::event::Segment::new(&segment));
    for _ in 0..11 {
        harness.push(crate::common::buffer(64, 0, None)).unwrap();
    }
    let heard = log.heard();
    let frames: Vec<_> = heard.captions.iter().map(|c| c.stamp.frame).collect();
    assert_eq!(frames, [0, 10]);
    assert_eq!(heard.captions[0].stamp.running_time, None);
}

#[test]
fn another_stream_does_not_inherit_the_caption() {
    let fake = Fake::new();
    let (mut harness, narrator, _log) = narrated_then_slow(&fake);
    harness.push(frame(1000)).unwrap();
    fake.wait_requests(2);
    harness.push_event(gst::event::StreamStart::new("another"));
    wait_for(|| fake.cancelled() == 1);
    assert!(narrator.property::<Option<String>>("caption").is_none());
}

#[test]
fn video_events_and_queries_go_through() {
    let (mut harness, narrator, _log) = harness(&Fake::new(), CAPS);
    let src = narrator.static_pad("src").unwrap();
    let passed = spy(&src);
    harness.push_event(gst::event::Gap::builder(ms(0)).duration(ms(100)).build());
    harness.push_event(gst::event::SegmentDone::new(ms(100)));
    harness.push_event(gst::event::Eos::new());
    use gst::EventType::{Eos, SegmentDone};
    let expected = [
        Item::Gap(ms(0), Some(ms(100))),
        Item::Event(SegmentDone),
        Item::Event(Eos),
    ];
    assert_eq!(*passed.lock().unwrap(), expected);
    assert!(harness.push_upstream_event(gst::event::Reconfigure::new()));
}

/// Whoever waits for an answer hears that none will come.
#[test]
fn a_request_at_the_end_of_the_stream_is_not_forgotten() {
    let (mut harness, narrator, log) = harness(&Fake::new(), CAPS);
    harness.push_and_pull(frame(0)).unwrap();
    let id = describe_now(&narrator, None, 0);
    harness.push_event(gst::event::Eos::new());
    let warnings = log.heard().warnings;
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(
        warnings[0].contains(&format!("describe-now {id} ")),
        "{warnings:?}"
    );
    // And may still be answered.
    harness.push_event(gst::event::FlushStart::new());
    harness.push_event(gst::event::FlushStop::new(true));
    let segment = gst::FormattedSegment::<gst::ClockTime>::new();
    harness.push_event(gst::event::Segment::new(&segment));
    harness.push_and_pull(frame(0)).unwrap();
    let heard = log.heard();
    assert!(
        heard
            .captions
            .iter()
            .any(|caption| caption.stamp.request_id == id)
    );
}
