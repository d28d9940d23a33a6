//! Streams with odd timestamps, gaps and damaged pictures are captioned as far as they can be.

use crate::common::{Fake, Heard, Item, Log, Pipeline, harness, ms, spy};
use gst::{BufferFlags, ClockTime, prelude::*};

pub(crate) const CAPS: &str = "video/x-raw,format=GRAY8,width=8,height=8,framerate=10/1";
const UNTIMED: &str = "video/x-raw,format=GRAY8,width=8,height=8,framerate=0/1";
const DAY: ClockTime = ClockTime::from_seconds(24 * 60 * 60);

/// A harness in this mode, with what its text pad gives.
pub(crate) fn with_text(
    mode: &str,
    caps: &str,
) -> (
    gst_check::Harness,
    gstvlmnarrate::VlmNarrate,
    Log,
    crate::common::Items,
) {
    let element = crate::common::narrator(&Fake::new());
    let text = element.request_pad_simple("text_src").unwrap();
    let items = spy(&text);
    let (harness, log) = crate::common::harness_with(&element, caps);
    element.set_property_from_str("mode", mode);
    (harness, element, log, items)
}

/// Pushes a buffer and takes the same.
#[track_caller]
pub(crate) fn pass(harness: &mut gst_check::Harness, buffer: gst::Buffer) {
    let (pts, flags) = (buffer.pts(), buffer.flags());
    let out = harness.push_and_pull(buffer).unwrap();
    assert_eq!((out.pts(), out.flags()), (pts, flags));
}

/// Hears enough, and no complaint.
#[track_caller]
fn hear(log: &Log, enough: impl Fn(&Heard) -> bool) -> Heard {
    let heard = log.wait(enough);
    assert_eq!(
        (heard.errors.len(), heard.warnings.len()),
        (0, 0),
        "{heard:#?}"
    );
    heard
}

fn captioned(heard: &Heard) -> bool {
    !heard.captions.is_empty()
}

#[test]
fn times_that_jump_by_days() {
    for mode in ["live", "recorded"] {
        let (mut harness, _narrator, log, items) = with_text(mode, CAPS);
        let jumps = [
            ClockTime::ZERO,
            DAY,
            365 * DAY,
            365 * DAY + ClockTime::SECOND,
            DAY,
            DAY - ClockTime::SECOND,
            ClockTime::ZERO,
            ClockTime::from_nseconds(u64::MAX - 1),
            ms(500),
        ];
        for at in jumps {
            pass(&mut harness, crate::common::buffer(64, 0, at));
            assert_eq!(hear(&log, captioned).timestamps(), [at]);
        }
        // A gap is one gap, however long.
        let items = items.lock().unwrap().len();
        assert!(items < 3 * jumps.len(), "{mode}: {items}");
    }
}

/// GStreamer's clocks never go back: one that is set back stands still.
#[test]
fn a_clock_that_jumps() {
    let fake = Fake::new();
    let pipeline = Pipeline::new(
        &format!(
            "appsrc name=src is-live=true do-timestamp=true format=time caps={CAPS}
             ! vlmnarrate name=n ! fakesink async=false"
        ),
        &fake,
    );
    let clock = gst::glib::Object::new::<gst::SystemClock>();
    let jump = |hours: i64| {
        let internal = clock.internal_time();
        let time = internal
            .nseconds()
            .checked_add_signed(hours * 3_600_000_000_000);
        let external = ClockTime::from_nseconds(time.unwrap_or(0));
        clock.set_calibration(internal, external, 1, 1);
    };
    pipeline.pipeline.use_clock(Some(&clock));
    pipeline.reach(gst::State::Playing);
    let source = pipeline.element("src");
    let push = || {
        let flow = source
            .emit_by_name::<gst::FlowReturn>("push-buffer", &[&crate::common::buffer(64, 0, None)]);
        assert_eq!(flow, gst::FlowReturn::Ok);
    };
    push();
    let first = pipeline.log.wait(captioned).captions.remove(0);
    jump(1);
    push();
    let second = pipeline.log.wait(captioned).captions.remove(0);
    let hour = ClockTime::from_seconds(3600);
    for time in [
        |c: &gstvlmnarrate::Caption| c.stamp.timestamp,
        |c: &gstvlmnarrate::Caption| c.arrival_time,
    ] {
        assert!(time(&second).unwrap() >= time(&first).unwrap() + hour);
    }
    // Nothing is latency that the clock only says.
    assert!(second.cost.latency < std::time::Duration::from_secs(60));
    jump(-1);
    push();
    pipeline.narrator.describe_now(None, None).unwrap();
    push();
    let heard = pipeline.log.wait(captioned);
    assert_eq!(heard.captions[0].stamp.request_id, 1);
    jump(3);
    push();
    let heard = pipeline.log.wait(captioned);
    assert!(heard.captions[0].stamp.timestamp.unwrap() > 2 * hour);
    assert_eq!((heard.errors.len(), heard.warnings.len()), (0, 0));
    assert_eq!(fake.requests().len(), 4);
}

#[test]
fn without_any_times_there_are_captions_and_no_timed_text() {
    for mode in ["live", "recorded"] {
        let (mut harness, narrator, log, items) = with_text(mode, UNTIMED);
        let mut captions = Vec::new();
        // Live, a frame is described if the worker has nothing to do.
        while captions.len() < 3 {
            pass(&mut harness, crate::common::buffer(64, 0, None));
            let heard = log.heard();
            assert_eq!((heard.errors.len(), heard.warnings.len()), (0, 0));
            captions.extend(heard.captions);
            std::thread::yield_now();
        }
        assert!(captions.iter().all(|c| c.stamp.timestamp.is_none()));
        narrator.describe_now(None, None).unwrap();
        let answered = |heard: &Heard| heard.captions.iter().any(|c| c.stamp.request_id > 0);
        pass(&mut harness, crate::common::buffer(64, 0, None));
        hear(&log, answered);
        let items = items.lock().unwrap();
        assert!(
            items.iter().all(|item| matches!(item, Item::Event(_))),
            "{items:?}"
        );
    }
}

#[test]
fn a_question_waits_for_the_picture_behind_a_gap() {
    for mode in ["live", "recorded"] {
        let (mut harness, narrator, log, _) = with_text(mode, CAPS);
        pass(&mut harness, crate::common::buffer(64, 0, ms(0)));
        hear(&log, captioned);
        narrator.describe_now(None, None).unwrap();
        let mut gap = crate::common::buffer(0, 0, ms(100));
        gap.get_mut().unwrap().set_flags(BufferFlags::GAP);
        pass(&mut harness, gap);
        assert!(harness.push_event(gst::event::Gap::new(ms(200), None)));
        assert!(harness.push_event(gst::event::Gap::new(ms(300), ms(100))));
        pass(&mut harness, crate::common::buffer(64, 0, ms(400)));
        let caption = &hear(&log, captioned).captions[0].stamp;
        assert_eq!((caption.request_id, caption.timestamp), (1, Some(ms(400))));
        let mut gaps = 0;
        while let Some(event) = harness.try_pull_event() {
            gaps += usize::from(event.type_() == gst::EventType::Gap);
        }
        assert_eq!(gaps, 2);
    }
}

/// A decoder that flags what it could not decode has something to show all the same.
#[test]
fn damaged_pictures_are_described_as_they_are() {
    let (mut harness, _narrator, log) = harness(&Fake::new(), CAPS);
    let damages = [
        BufferFlags::CORRUPTED,
        BufferFlags::DISCONT,
        BufferFlags::DROPPABLE,
    ];
    for (second, flags) in (0..).zip(damages) {
        let mut buffer = crate::common::buffer(64, 0, ClockTime::from_seconds(second));
        buffer.get_mut().unwrap().set_flags(flags);
        pass(&mut harness, buffer);
        hear(&log, captioned);
    }
}

#[test]
fn a_buffer_that_is_shorter_than_its_caps_say_is_one_warning() {
    let huge = "video/x-raw,format=GRAY8,width=32767,height=32767,framerate=10/1";
    for (mode, caps, split) in [
        ("live", CAPS, false),
        ("recorded", CAPS, true),
        ("live", huge, true),
        ("recorded", huge, false),
    ] {
        let (mut harness, narrator, log, _) = with_text(mode, caps);
        narrator.set_property("image-splitting", split);
        let warned = |heard: &Heard| !heard.warnings.is_empty();
        for second in 0..3 {
            let at = ClockTime::from_seconds(second);
            pass(&mut harness, crate::common::buffer(60, 0, at));
            let heard = log.wait(warned);
            assert_eq!((heard.captions.len(), heard.warnings.len()), (0, 1));
        }
        harness.set_src_caps_str(CAPS);
        let whole = crate::common::buffer(64, 0, ClockTime::from_seconds(3));
        pass(&mut harness, whole);
        hear(&log, captioned);
    }
}
