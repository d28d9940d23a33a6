//! Text and video together in muxers and players, in both directions of playback.

use std::{
    sync::mpsc::channel,
    time::{Duration, Instant},
};

use crate::common::{Fake, Item, Items, Pipeline, harness, ms, spy};
use gst::{ClockTime, prelude::*};

const CAPS: &str = "video/x-raw,format=GRAY8,width=8,height=8,framerate=10/1";

fn frame(at: u64) -> gst::Buffer {
    let mut buffer = crate::common::buffer(64, 0, ms(at));
    buffer.get_mut().unwrap().set_duration(ms(100));
    buffer
}

/// Start and end of each cue and gap in milliseconds, and whether it is a cue.
fn spans(items: &Items) -> Vec<(u64, u64, bool)> {
    let items = items.lock().unwrap();
    let spans = items.iter().filter_map(|item| {
        let (start, duration, is_cue) = match item {
            Item::Gap(start, duration) => (*start, *duration, false),
            Item::Buffer { pts, duration, .. } => ((*pts)?, *duration, true),
            Item::Event(_) => return None,
        };
        Some((
            start.mseconds(),
            (start + duration.unwrap()).mseconds(),
            is_cue,
        ))
    });
    spans.collect()
}

fn cues(items: &Items) -> Vec<(u64, u64)> {
    let cues = spans(items).into_iter().filter(|(.., is_cue)| *is_cue);
    cues.map(|(start, end, _)| (start, end)).collect()
}

fn sink(text: &gst::Pad) -> gst::Pad {
    let sink = gst::Pad::builder(gst::PadDirection::Sink)
        .chain_function(|_, _, _| Ok(gst::FlowSuccess::Ok))
        .event_function(|_, _, _| true)
        .build();
    sink.set_active(true).unwrap();
    text.link(&sink).unwrap();
    sink
}

/// What the text pad says of three seconds that are played at a rate from their end or start.
fn played(rate: f64, merge: bool, live: bool) -> Items {
    let fake = Fake::new();
    let narrator = crate::common::narrator(&fake);
    narrator.set_property("merge-captions", merge);
    let (mut harness, log) = crate::common::harness_with(&narrator, CAPS);
    if live {
        narrator.set_property_from_str("mode", "live");
    }
    let text = narrator.request_pad_simple("text_src").unwrap();
    let _sink = sink(&text);
    let mut segment = gst::FormattedSegment::<ClockTime>::new();
    segment.set_rate(rate);
    segment.set_stop(ms(3000));
    harness.push_event(gst::event::Segment::new(&segment));
    let items = spy(&text);
    for i in 0..30 {
        fake.plan().text = Some(format!("{}", i / 10));
        let number = if rate < 0.0 { 29 - i } else { i };
        harness.push(frame(100 * number)).unwrap();
        if live && i % 10 == 0 {
            log.wait(|heard| !heard.captions.is_empty());
        }
    }
    harness.push_event(gst::event::Eos::new());
    items
}

#[test]
fn a_caption_is_one_cue_at_any_rate() {
    for merge in [false, true] {
        for rate in [0.5, 1.0, 4.0] {
            let cues = cues(&played(rate, merge, false));
            assert_eq!(cues, [(0, 1000), (1000, 2000), (2000, 3000)], "{rate}");
        }
        for rate in [-0.5, -1.0, -4.0] {
            let cues = cues(&played(rate, merge, false));
            assert_eq!(cues, [(2000, 3000), (1000, 2000), (0, 1000)], "{rate}");
        }
    }
}

#[test]
fn backwards_each_cue_ends_where_the_one_before_started() {
    for (merge, live) in [(false, false), (true, false), (false, true), (true, true)] {
        let spans = spans(&played(-1.0, merge, live));
        // A gap of no length only says up to where.
        let spans = spans.into_iter().filter(|(start, end, _)| start < end);
        let spans = Vec::from_iter(spans);
        for pair in spans.windows(2) {
            assert_eq!(pair[1].1, pair[0].0, "{merge} {live}: {spans:?}");
        }
        let cues = spans.iter().filter(|(.., is_cue)| *is_cue).count();
        let most = if live && !merge { 6 } else { 3 };
        assert!((3..=most).contains(&cues), "{merge} {live}: {spans:?}");
    }
}

#[test]
fn where_timestamps_loop_or_stand_still_there_is_one_cue_a_caption_too() {
    let looped: fn(u64) -> u64 = |i| i % 9;
    for pts in [looped, |_| 0] {
        let (mut harness, narrator, log) = harness(&Fake::new(), CAPS);
        let text = narrator.request_pad_simple("text_src").unwrap();
        let _sink = sink(&text);
        let items = spy(&text);
        for i in 0..100 {
            harness.push(frame(100 * pts(i))).unwrap();
        }
        assert_eq!(cues(&items).len(), log.heard().captions.len());
    }
}

#[test]
fn live_cues_last_half_a_second_at_most() {
    let items = played(1.0, false, true);
    let cues = cues(&items);
    assert!(cues.len() >= 5, "{cues:?}");
    assert!(
        cues.iter().all(|(start, end)| end - start <= 500),
        "{cues:?}"
    );
}

/// Whoever links while the stream runs gets the text that it takes.
#[test]
fn text_is_what_its_taker_wants_whenever_it_is_linked() {
    let pipeline = Pipeline::new(
        "videotestsrc is-live=true ! video/x-raw,width=64,height=48,framerate=20/1
         ! vlmnarrate name=n interval=50000000 ! fakesink",
        &Fake::new(),
    );
    pipeline.reach(gst::State::Playing);
    pipeline.log.wait(|heard| !heard.captions.is_empty());
    let text = pipeline.narrator.request_pad_simple("text_src").unwrap();
    for format in ["pango-markup", "utf8", "pango-markup"] {
        let bin = gst::parse::bin_from_description(
            &format!("capsfilter caps=text/x-raw,format={format} ! fakesink name=s async=false"),
            true,
        )
        .unwrap();
        pipeline.pipeline.add(&bin).unwrap();
        bin.sync_state_with_parent().unwrap();
        let taker = bin.static_pad("sink").unwrap();
        text.link(&taker).unwrap();
        let (told, hears) = channel();
        let sink = bin.by_name("s").unwrap().static_pad("sink").unwrap();
        sink.add_probe(gst::PadProbeType::BUFFER, move |pad, _| {
            let _ = told.send(pad.current_caps());
            gst::PadProbeReturn::Ok
        });
        let caps = hears.recv_timeout(crate::common::TIMEOUT.into()).unwrap();
        let caps = caps.unwrap();
        assert_eq!(caps.structure(0).unwrap().get("format"), Ok(format));
        text.unlink(&taker).unwrap();
        bin.set_state(gst::State::Null).unwrap();
        pipeline.pipeline.remove(&bin).unwrap();
    }
    assert_eq!(pipeline.log.heard().errors.len(), 0);
}

#[test]
fn text_that_nobody_takes_is_a_warning() {
    let pipeline = Pipeline::new(
        "videotestsrc is-live=true ! video/x-raw,width=64,height=48,framerate=20/1
         ! vlmnarrate name=n interval=50000000 ! fakesink",
        &Fake::new(),
    );
    let text = pipeline.narrator.request_pad_simple("text_src").unwrap();
    let (told, hears) = channel::<()>();
    let hears = std::sync::Mutex::new(hears);
    let sink = gst::Pad::builder(gst::PadDirection::Sink)
        .chain_function(move |_, _, _| {
            let _ = hears.lock().unwrap().recv();
            Ok(gst::FlowSuccess::Ok)
        })
        .event_function(|_, _, _| true)
        .build();
    sink.set_active(true).unwrap();
    text.link(&sink).unwrap();
    pipeline.play();
    let heard = pipeline.log.wait(|heard| !heard.warnings.is_empty());
    assert!(
        heard.warnings[0].contains("text_src") && heard.warnings[0].contains("queue max-size-time"),
        "{heard:#?}"
    );
    drop(told);
}

/// Sizes change, encoders look ahead, and muxers wait: all of it ends.
#[test]
fn a_muxer_is_never_waited_for_in_vain() {
    const FREE: &str = "queue max-size-time=0 max-size-bytes=0 max-size-buffers=0";
    for (merge, way) in [
        (false, format!("x264enc ! {FREE}")),
        (true, format!("x264enc ! {FREE}")),
        // The query for memory that comes with another size goes through this queue.
        (
            false,
            format!("{FREE} ! videoscale ! video/x-raw,width=64,height=48 ! x264enc"),
        ),
        (
            true,
            format!("{FREE} ! videoscale ! video/x-raw,width=64,height=48 ! x264enc"),
        ),
    ] {
        let pipeline = Pipeline::new(
            &format!(
                "videotestsrc num-buffers=60 ! video/x-raw,width=64,height=48,framerate=25/1 ! c.
                 videotestsrc num-buffers=60 ! video/x-raw,width={},height=72,framerate=25/1 ! c.
                 concat name=c ! vlmnarrate name=n interval=1500000000 merge-captions={merge}
                 n.src ! {way} ! m.  n.text_src ! {FREE} ! m.
                 mp4mux name=m ! fakesink name=f",
                // An encoder that gets other sizes has to tell the muxer, which can't take it.
                if way.starts_with("x264enc") { 64 } else { 96 }
            )
            .replace(
                "height=72",
                if way.starts_with("x264enc") {
                    "height=48"
                } else {
                    "height=72"
                },
            ),
            &Fake::new(),
        );
        let start = Instant::now();
        let heard = pipeline.run_to_eos();
        assert_eq!(heard.warnings, [""; 0]);
        assert!(start.elapsed() < Duration::from(crate::common::TIMEOUT));
    }
}
