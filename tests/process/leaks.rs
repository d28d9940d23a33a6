//! Nothing outlives its pipeline. The leaks tracer is set in the environment before GStreamer starts.

use std::time::Duration;

use crate::common::{Fake, Pipeline, engine::wait_for, leaks};
use gst::prelude::*;

#[test]
fn nothing_leaks() {
    const TYPES: &str = "GstElement,GstPad,GstBus,GstBuffer,GstMemory,GstEvent,GstMessage,GstQuery";
    // SAFETY: no other thread runs yet.
    unsafe { std::env::set_var("GST_TRACERS", format!("leaks(filters=\"{TYPES}\")")) };
    let element = crate::common::narrator(&Fake::new());
    let alive = leaks::alive();
    let told = |name| alive.iter().any(|object| object.contains(name));
    assert!(told("GstVlmNarrate") && told("GstPad"), "{alive:#?}");
    drop(element);

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
    deaf.plan().ignores_cancel = true;
    let pipeline = Pipeline::new(
        "videotestsrc ! video/x-raw,framerate=50/1 ! vlmnarrate name=n n.src ! queue ! fakesink
         n.text_src ! queue ! fakesink async=false",
        &deaf,
    );
    pipeline.play();
    deaf.wait_requests(1);
    pipeline
        .narrator
        .emit_by_name::<u32>("describe-now", &[&None::<String>, &0u32]);
    drop(pipeline);

    wait_for(|| fake.engines() + deaf.engines() == 0);
    wait_for(|| leaks::alive().is_empty());
}
