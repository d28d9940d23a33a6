//! Nothing of ours outlives its pipeline. Alone in its binary, because the tracer is told of by
//! the environment before GStreamer starts.

mod common;

use std::time::Duration;

use common::{Fake, Pipeline, engine::wait_for};
use gst::prelude::*;

#[test]
fn nothing_leaks() {
    const TYPES: &str = "GstVlmNarrate,GstVlmNarrateOverlay,GstTextOverlay,GstPipeline,GstPad,GstBuffer,GstEvent,GstMessage";
    // SAFETY: no other thread runs yet.
    unsafe { std::env::set_var("GST_TRACERS", format!("leaks(filters=\"{TYPES}\")")) };
    common::init();
    let tracers = gst::active_tracers();
    let leaks = tracers
        .iter()
        .find(|t| t.type_().name() == "GstLeaksTracer")
        .unwrap();

    let fake = Fake::slow(Duration::from_millis(5));
    for (live, factory) in [
        (false, "vlmnarrate"),
        (true, "vlmnarrate"),
        (false, "vlmnarrateoverlay"),
        (true, "vlmnarrateoverlay"),
    ] {
        let pipeline = Pipeline::new(
            &format!(
                "videotestsrc is-live={live} num-buffers=20 ! video/x-raw,framerate=50/1
                 ! {factory} name=n interval=0 partial-captions=true
                 n.src ! queue ! fakesink n.text_src ! queue ! fakesink"
            ),
            &fake,
        );
        let heard = pipeline.run_to_eos();
        assert!(!heard.captions.is_empty());
    }
    // And one that is left in the middle of everything.
    let deaf = Fake::slow(Duration::from_millis(300));
    deaf.plan().deaf = true;
    let pipeline = Pipeline::new(
        "videotestsrc ! video/x-raw,framerate=50/1 ! vlmnarrate name=n n.src ! queue ! fakesink
         n.text_src ! queue ! fakesink async=false",
        &deaf,
    );
    pipeline.play();
    deaf.wait_asked(1);
    pipeline
        .narrator
        .emit_by_name::<u32>("describe-now", &[&None::<String>, &0u32]);
    drop(pipeline);

    wait_for(|| fake.engines() + deaf.engines() == 0);
    let alive = leaks.emit_by_name::<gst::Structure>("get-live-objects", &[]);
    let alive = alive.get::<gst::List>("live-objects-list").unwrap();
    let alive: Vec<_> = alive.iter().map(|object| format!("{object:?}")).collect();
    assert!(alive.is_empty(), "{alive:#?}");
}
