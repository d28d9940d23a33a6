//! Recorded mode: every due frame has its caption, however long it takes.

use std::time::Duration;

use crate::common::{Fake, Heard, Pipeline, harness, ms};
use gst::{ClockTime, prelude::*};
use gstvlmnarrate::{Caption, caption::Trigger};

/// What must be the same from run to run: all but the clock's part.
fn essence(heard: &Heard) -> Vec<String> {
    let strip = |caption: &Caption| {
        let mut caption = caption.clone();
        caption.arrival_time = None;
        caption.cost = Default::default();
        format!("{caption:?}")
    };
    heard.captions.iter().map(strip).collect()
}

fn seconds(range: std::ops::Range<u64>) -> Vec<ClockTime> {
    range.map(ClockTime::from_seconds).collect()
}

#[test]
fn two_runs_are_byte_identical_and_complete() {
    // A file, so that the timestamps are a demuxer's.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("film.mkv");
    let file = file.to_str().unwrap();
    crate::common::init();
    let record = gst::parse::launch(&format!(
        "videotestsrc pattern=blink num-buffers=250 ! video/x-raw,width=64,height=48,framerate=25/1
         ! jpegenc ! matroskamux ! filesink location={file}"
    ))
    .unwrap();
    record.set_state(gst::State::Playing).unwrap();
    let bus = record.bus().unwrap();
    let wanted = [gst::MessageType::Eos, gst::MessageType::Error];
    let end = bus
        .timed_pop_filtered(crate::common::TIMEOUT, &wanted)
        .unwrap();
    assert_eq!(end.type_(), gst::MessageType::Eos);
    record.set_state(gst::State::Null).unwrap();

    let run = |caption| {
        let fake = Fake::slow(Duration::from_millis(caption));
        Pipeline::new(
            &format!(
                "filesrc location={file} ! matroskademux ! jpegdec ! vlmnarrate name=n ! fakesink"
            ),
            &fake,
        )
        .run_to_eos()
    };
    let (quick, slow) = (run(0), run(20));
    assert_eq!(essence(&quick), essence(&slow));
    assert_eq!(quick.timestamps(), seconds(0..10));
    let texts: std::collections::BTreeSet<_> = quick.texts().into_iter().collect();
    assert_eq!(texts.len(), 2, "one for black, one for white");
}

#[test]
fn the_same_element_starts_over() {
    let fake = Fake::new();
    let pipeline = Pipeline::new(
        "videotestsrc pattern=ball num-buffers=30 ! video/x-raw,framerate=10/1
         ! vlmnarrate name=n ! fakesink",
        &fake,
    );
    let runs = [(); 2].map(|()| pipeline.run_to_eos());
    assert_eq!(runs[0].captions.len(), 3);
    assert_eq!(essence(&runs[0]), essence(&runs[1]));
}

#[test]
fn the_first_frame_waits_for_the_model() {
    let fake = Fake::new();
    fake.plan().load_time = Duration::from_millis(300);
    let pipeline = Pipeline::new(
        "videotestsrc num-buffers=3 ! video/x-raw,framerate=1/1 ! vlmnarrate name=n ! fakesink",
        &fake,
    );
    assert_eq!(pipeline.run_to_eos().timestamps(), seconds(0..3));
}

#[test]
fn interval_zero_is_every_frame_and_every_nth_thins_out() {
    for (interval, nth, due) in [
        (0, 1, vec![0, 100, 200, 300, 400, 500, 600, 700]),
        (0, 3, vec![0, 300, 600]),
        (200, 1, vec![0, 200, 400, 600]),
        (200, 3, vec![0, 600]),
        (250, 1, vec![0, 300, 500]),
    ] {
        let pipeline = Pipeline::new(
            &format!(
                "videotestsrc num-buffers=8 ! video/x-raw,framerate=10/1
                 ! vlmnarrate name=n interval={} every-nth={nth} ! fakesink",
                interval * 1_000_000
            ),
            &Fake::new(),
        );
        let due: Vec<_> = due.into_iter().map(ms).collect();
        assert_eq!(
            pipeline.run_to_eos().timestamps(),
            due,
            "{interval} ms, every {nth}"
        );
    }
}

#[test]
fn a_still_picture_is_described_once_and_every_half_minute() {
    let caps = "video/x-raw,format=GRAY8,width=32,height=32,framerate=1/1";
    let (mut harness, narrator, log) = harness(&Fake::new(), caps);
    narrator.set_property("scene-threshold", 0.1);
    let grey = |second| match second {
        0..5 => 100,
        5..10 => 110,
        10.. => 150u8,
    };
    for second in 0..45 {
        let frame = crate::common::buffer(32 * 32, grey(second), ClockTime::from_seconds(second));
        harness.push_and_pull(frame).unwrap();
    }
    let heard = log.heard();
    let captions: Vec<_> = heard
        .captions
        .iter()
        .map(|c| (c.stamp.frame, c.stamp.trigger))
        .collect();
    let expected = [
        (0, Trigger::Interval),
        (10, Trigger::Scene),
        (40, Trigger::Interval),
    ];
    assert_eq!(captions, expected);
    let stats = narrator.property::<gst::Structure>("stats");
    assert_eq!(stats.get::<u64>("frames"), Ok(45));
    assert_eq!(stats.get::<u64>("sampled"), Ok(3));
    assert_eq!(stats.get::<u64>("unchanged"), Ok(42));
    // A new question deserves an answer.
    narrator.set_property("prompt", "Who?");
    for second in 45..47 {
        let frame = crate::common::buffer(32 * 32, 150, ClockTime::from_seconds(second));
        harness.push_and_pull(frame).unwrap();
    }
    assert_eq!(log.heard().timestamps(), seconds(45..46));
}

#[test]
fn a_failed_caption_is_a_warning_and_the_next_frame_is_described() {
    let fake = Fake::new();
    fake.plan().fails_at = Some(1);
    let pipeline = Pipeline::new(
        "videotestsrc num-buffers=4 ! video/x-raw,framerate=1/1 ! vlmnarrate name=n ! fakesink",
        &fake,
    );
    let heard = pipeline.run_to_eos();
    let expected = [0, 2, 3].map(ClockTime::from_seconds);
    assert_eq!(heard.timestamps(), expected);
    assert_eq!(
        heard.warnings,
        ["Frame at 0:00:01.000000000 was not described: failed as planned"]
    );
    let stats = pipeline.narrator.property::<gst::Structure>("stats");
    assert_eq!(stats.get::<u64>("errors"), Ok(1));
    assert_eq!(stats.get::<u64>("captions"), Ok(3));
}

#[test]
fn settings_may_change_between_frames() {
    let fake = Fake::new();
    let caps = "video/x-raw,format=GRAY8,width=32,height=32,framerate=1/1";
    let (mut harness, narrator, log) = harness(&fake, caps);
    let mut push = |second| {
        let frame = crate::common::buffer(32 * 32, 0, ClockTime::from_seconds(second));
        harness.push_and_pull(frame).unwrap();
    };
    push(0);
    narrator.set_property("prompt", "Who?");
    narrator.set_property("system-prompt", "Be brief.");
    narrator.set_property("image-size", 64u32);
    narrator.set_property("max-tokens", 7u32);
    narrator.set_property("temperature", 0.5);
    narrator.set_property("top-p", 0.9);
    narrator.set_property("top-k", 40u32);
    narrator.set_property("repetition-penalty", 1.25);
    narrator.set_property("seed", 99u64);
    push(1);
    // Refused, with the remedy; the old value stays.
    narrator.set_property("image-size", 65u32);
    assert_eq!(narrator.property::<u32>("image-size"), 64);
    push(2);
    narrator.set_property("prompt", None::<String>);
    narrator.set_property("system-prompt", "");
    narrator.set_property("image-size", 0u32);
    push(3);

    let heard = log.heard();
    assert_eq!(
        heard.warnings,
        ["image-size: 65 is no multiple of 4; take 64"]
    );
    let prompts: Vec<_> = heard.captions.iter().map(|c| c.prompt.as_str()).collect();
    assert_eq!(
        prompts,
        ["Describe this frame in one sentence.", "Who?", "Who?", ""]
    );
    let requests = fake.requests();
    let sides: Vec<_> = requests.iter().map(|request| request.side).collect();
    assert_eq!(sides, [32, 64, 64, 32]);
    assert_eq!(
        (requests[0].system.as_deref(), requests[0].max_tokens),
        (None, 20)
    );
    assert_eq!(requests[0].sampling, Default::default());
    assert_eq!(
        (requests[1].system.as_deref(), requests[1].max_tokens),
        (Some("Be brief."), 7)
    );
    let sampling = requests[1].sampling;
    assert_eq!(
        (sampling.temperature, sampling.top_p, sampling.top_k),
        (0.5, 0.9, 40)
    );
    assert_eq!((sampling.repetition_penalty, sampling.seed), (1.25, 99));
    assert_eq!(requests[3].system, None);
}
