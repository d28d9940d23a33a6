//! Abuse of whole pipelines in orders that nobody thought of, drawn at random and so many rounds of each as the
//! variable `TORTURE` says, or a few. A failure names its round, which is the seed of what was drawn:
//!
//! ```sh
//! TORTURE=1000 cargo test --release --test torture
//! ```

use std::{
    thread,
    time::{Duration, Instant},
};

use crate::common::{Fake, Pipeline, engine::wait_for, harness_with, ms, narrator};
use fastrand::Rng;
use gst::{ClockTime, prelude::*};
use gst_video::{VideoFormat, VideoInfo};
use gstvlmnarrate::{SmolVlmLoader, VlmNarrate};

fn rounds(few: u64) -> u64 {
    let many = std::env::var("TORTURE").ok();
    many.map_or(few, |many| many.parse().expect("TORTURE is a number"))
}

fn pause(rng: &mut Rng, ms: u64) {
    thread::sleep(Duration::from_micros(rng.u64(0..1000 * ms)));
}

/// To stop asks for no more than that the other threads get to run.
#[track_caller]
fn quickly(round: u64, what: &str, act: impl FnOnce()) {
    let start = Instant::now();
    act();
    let took = start.elapsed();
    assert!(
        took < Duration::from_secs(5),
        "round {round}: {what} took {took:?}"
    );
}

/// One that takes up to so many milliseconds to load and for a caption, and may not listen.
fn moody(rng: &mut Rng, ms: u64) -> Fake {
    let fake = Fake::slow(Duration::from_micros(rng.u64(0..1000 * ms)));
    fake.plan().load_time = Duration::from_micros(rng.u64(0..1000 * ms));
    fake.plan().word_time = Duration::from_micros(rng.u64(0..300));
    fake.plan().ignores_cancel = rng.u8(0..4) == 0;
    fake
}

#[test]
fn states_in_any_order() {
    for round in 0..rounds(30) {
        let rng = &mut Rng::with_seed(round);
        let fake = moody(rng, 40);
        let live = rng.bool();
        let factory = rng.choice(["vlmnarrate", "vlmnarrateoverlay"]).unwrap();
        let mut line = format!(
            "videotestsrc is-live={live} ! video/x-raw,width=64,height=48,framerate=100/1
             ! {factory} name=n interval=0 partial-captions={} n.src ! queue ! fakesink async=false",
            rng.bool()
        );
        if rng.bool() {
            line += " n.text_src ! queue ! fakesink async=false";
        }
        let pipeline = Pipeline::new(&line, &fake);
        if rng.u8(0..4) == 0 {
            pipeline.narrator.set_engine_loader(SmolVlmLoader);
        }
        for _ in 0..rng.usize(2..16) {
            use gst::State::{Null, Paused, Playing, Ready};
            let state = rng.choice([Null, Ready, Paused, Playing]).unwrap();
            quickly(round, "a state change", || {
                pipeline.pipeline.set_state(state).unwrap();
            });
            if rng.u8(0..3) == 0 {
                pipeline.pipeline.state(crate::common::TIMEOUT).0.unwrap();
            }
            if rng.u8(0..3) == 0 {
                pipeline.narrator.describe_now(None, Some(3));
            }
            pause(rng, 8);
        }
        pipeline.log.heard();
        pipeline.play();
        let heard = pipeline
            .log
            .wait(|heard| !heard.captions.is_empty() || !heard.errors.is_empty());
        assert!(heard.errors.is_empty(), "round {round}: {heard:#?}");
        quickly(round, "the way down", || drop(pipeline));
        wait_for(|| fake.engines() == 0);
    }
}

#[test]
fn seeks_of_every_kind() {
    let rng = &mut Rng::with_seed(1);
    let fake = Fake::slow(Duration::from_millis(2));
    let pipeline = crate::common::sought(&fake);
    for round in 0..rounds(100) {
        let rate = *rng.choice(&[1.0, 1.0, 2.0, 0.5, -1.0, -2.0]).unwrap();
        let mut flags = gst::SeekFlags::ACCURATE;
        // Others wait for the segment before, which may be endless.
        flags |= gst::SeekFlags::FLUSH;
        if rng.bool() {
            flags |= gst::SeekFlags::SEGMENT;
        }
        if rng.bool() {
            flags |= gst::SeekFlags::TRICKMODE;
        }
        let start = ms(rng.u64(0..50_000));
        let stop = start + ms(rng.u64(1..1000));
        quickly(round, "a seek", || {
            let set = gst::SeekType::Set;
            pipeline
                .pipeline
                .seek(rate, flags, set, start, set, stop)
                .unwrap();
        });
        if rng.u8(0..4) == 0 {
            pipeline.narrator.set_property("frames", rng.u32(1..4));
        }
        pause(rng, 6);
    }
    pipeline.narrator.set_property("frames", 1u32);
    crate::common::ends_normally(&pipeline, &fake, 5);
}

/// A buffer that fits the caps or not, at some time or none.
fn any_buffer(rng: &mut Rng, info: &VideoInfo) -> (gst::Buffer, bool) {
    let is_short = rng.u8(0..8) == 0;
    let size = if is_short {
        rng.usize(1..info.size())
    } else {
        info.size()
    };
    let mut buffer = gst::Buffer::from_mut_slice(vec![rng.u8(..); size]);
    let fresh = buffer.get_mut().unwrap();
    match rng.u8(0..8) {
        0 => (),
        1 => fresh.set_pts(ClockTime::from_nseconds(rng.u64(..u64::MAX / 2))),
        _ => fresh.set_pts(ms(rng.u64(..10_000))),
    }
    if rng.bool() {
        fresh.set_duration(ms(rng.u64(..100)));
    }
    (buffer, is_short)
}

#[test]
fn caps_and_times_in_any_order() {
    crate::common::init();
    let formats: Vec<_> = VideoFormat::iter_raw().collect();
    for round in 0..rounds(10) {
        let rng = &mut Rng::with_seed(round);
        let fake = Fake::new();
        let element = narrator(&fake);
        element.set_property("interval", ClockTime::ZERO);
        let (mut harness, log) = harness_with(&element, "video/x-raw,format=RGB,width=8,height=8");
        let (mut good, mut short) = (0, 0);
        for _ in 0..40 {
            let side = |rng: &mut Rng| rng.u32(1..90);
            let format = *rng.choice(&formats).unwrap();
            let info = VideoInfo::builder(format, side(rng), side(rng))
                .fps(gst::Fraction::new(rng.i32(0..90), rng.i32(1..5)))
                .par(gst::Fraction::new(rng.i32(1..5), rng.i32(1..5)))
                .build();
            let Ok(info) = info else { continue };
            harness.set_src_caps(info.to_caps().unwrap());
            for _ in 0..rng.u8(0..4) {
                let (buffer, is_short) = any_buffer(rng, &info);
                let bytes = buffer.map_readable().unwrap().to_vec();
                let out = harness.push_and_pull(buffer).unwrap();
                assert_eq!(
                    out.map_readable().unwrap().as_slice(),
                    bytes,
                    "round {round}"
                );
                match is_short {
                    true => short += 1,
                    false => good += 1,
                }
            }
        }
        let heard = log.heard();
        assert!(heard.errors.is_empty(), "round {round}: {heard:#?}");
        assert_eq!(
            heard.captions.len(),
            good,
            "round {round}: {:?}",
            heard.warnings
        );
        assert_eq!(
            heard.warnings.len(),
            short,
            "round {round}: {:?}",
            heard.warnings
        );
    }
}

#[test]
fn live_caps_change_while_a_caption_is_under_way() {
    let fake = Fake::slow(Duration::from_millis(3));
    let line = "videotestsrc is-live=true ! capsfilter name=caps ! vlmnarrate name=n interval=0
                n.src ! queue ! fakesink async=false n.text_src ! queue ! fakesink async=false";
    let pipeline = Pipeline::new(line, &fake);
    let rng = &mut Rng::with_seed(3);
    let caps = |rng: &mut Rng| {
        let format = rng
            .choice(["RGB", "NV12", "YUY2", "GRAY8", "v210", "ARGB64"])
            .unwrap();
        let (width, height) = (rng.i32(1..200), rng.i32(1..200));
        let caps = format!(
            "video/x-raw,format={format},width={width},height={height},framerate={}/1",
            rng.i32(30..200)
        );
        caps.parse::<gst::Caps>().unwrap()
    };
    pipeline.element("caps").set_property("caps", caps(rng));
    pipeline.reach(gst::State::Playing);
    for _ in 0..rounds(60) {
        pipeline.element("caps").set_property("caps", caps(rng));
        pause(rng, 20);
    }
    let heard = pipeline.log.wait(|heard| heard.captions.len() > 10);
    assert!(
        heard.errors.is_empty() && heard.warnings.is_empty(),
        "{heard:#?}"
    );
}

#[test]
fn narrators_come_and_go_behind_a_tee() {
    let fake = Fake::slow(Duration::from_millis(3));
    let pipeline = Pipeline::new(
        "videotestsrc is-live=true ! video/x-raw,width=64,height=48,framerate=100/1
         ! tee name=t allow-not-linked=true t. ! queue ! vlmnarrate name=n interval=0 ! fakesink",
        &fake,
    );
    pipeline.reach(gst::State::Playing);
    let tee = pipeline.element("t");
    let add = || {
        let branch = gst::parse::bin_from_description(
            "queue ! vlmnarrate name=b interval=0 ! fakesink async=false",
            true,
        );
        let branch = branch.unwrap();
        let narrator = branch.by_name("b").and_downcast::<VlmNarrate>().unwrap();
        narrator.set_engine_loader(fake.clone());
        pipeline.pipeline.add(&branch).unwrap();
        // One that does not run yet would tell the tee that all is flushing.
        branch.sync_state_with_parent().unwrap();
        let pad = tee.request_pad_simple("src_%u").unwrap();
        pad.link(&branch.static_pad("sink").unwrap()).unwrap();
        (branch, pad)
    };
    let remove = |(branch, pad): (gst::Bin, gst::Pad), round| {
        // Whatever it is doing.
        pad.unlink(&branch.static_pad("sink").unwrap()).unwrap();
        tee.release_request_pad(&pad);
        quickly(round, "to take it out", || {
            branch.set_state(gst::State::Null).unwrap();
        });
        pipeline.pipeline.remove(&branch).unwrap();
    };
    let rng = &mut Rng::with_seed(4);
    let mut branches = vec![add(), add()];
    for round in 0..rounds(40) {
        pause(rng, 15);
        remove(branches.swap_remove(rng.usize(0..2)), round);
        branches.push(add());
    }
    let by = |heard: &crate::common::Heard| heard.captions.len() > 20;
    let heard = pipeline.log.wait(by);
    assert!(
        heard.errors.is_empty() && heard.warnings.is_empty(),
        "{heard:#?}"
    );
    drop((branches, pipeline));
    wait_for(|| fake.engines() == 0);
}

#[test]
fn dropped_while_it_loads() {
    let rng = &mut Rng::with_seed(5);
    let fake = Fake::new();
    fake.plan().load_time = Duration::from_millis(20);
    for round in 0..rounds(40) {
        let element = narrator(&fake);
        if rng.bool() {
            element.set_engine_loader(SmolVlmLoader);
        }
        element.set_state(gst::State::Paused).unwrap();
        pause(rng, 25);
        quickly(round, "to drop it", || {
            element.set_state(gst::State::Null).unwrap();
            drop(element);
        });
    }
    wait_for(|| fake.engines() == 0);
}

/// Each property that may change while it plays, again and again, and a real model.
#[test]
fn settings_and_questions_in_any_order() {
    let pipeline = Pipeline::new(
        "videotestsrc pattern=ball ! video/x-raw,width=160,height=120,framerate=30/1
         ! vlmnarrate name=n interval=100000000 n.src ! queue ! fakesink name=sink
         n.text_src ! queue ! fakesink async=false",
        &Fake::new(),
    );
    pipeline.narrator.set_engine_loader(SmolVlmLoader);
    pipeline.reach(gst::State::Playing);
    let narrator = &pipeline.narrator;
    let rng = &mut Rng::with_seed(6);
    for _ in 0..rounds(100) {
        match rng.u8(0..14) {
            0 => narrator.set_property("interval", ms(rng.u64(0..300))),
            1 => narrator.set_property("frames", rng.u32(1..5)),
            2 => narrator.set_property("every-nth", rng.u32(1..4)),
            3 => narrator.set_property("scene-threshold", rng.f64() / 10.0),
            4 => narrator.set_property("max-tokens", rng.u32(1..30)),
            5 => narrator.set_property("prompt", rng.choice(["", "What?", "Ünïcode 🎥 <image"])),
            6 => narrator.set_property(
                "choices",
                rng.choice([None, Some("yes|no"), Some("a|aa")]).unwrap(),
            ),
            7 => narrator.set_property("temperature", rng.f64() * 2.0),
            8 => narrator.set_property(
                "image-size",
                *rng.choice(&[0, 64, 128, 256]).unwrap() as u32,
            ),
            9 => narrator.set_property("image-splitting", rng.u8(0..8) == 0),
            10 => narrator.set_property("partial-captions", rng.bool()),
            11 => {
                narrator.set_property("stop-strings", rng.choice([None, Some("ball|e")]).unwrap())
            }
            12 => narrator.set_property(
                "system-prompt",
                rng.choice([None, Some("Be brief.")]).unwrap(),
            ),
            _ => {
                narrator.describe_now(None, Some(rng.u32(1..10)));
            }
        }
        pause(rng, 20);
    }
    pipeline.log.heard();
    narrator.set_property("image-splitting", false);
    narrator.set_property("frames", 1u32);
    let heard = pipeline.log.wait(|heard| heard.captions.len() > 5);
    assert!(
        heard.errors.is_empty() && heard.warnings.is_empty(),
        "{heard:#?}"
    );
}
