//! Objects that a test leaks, if `GST_TRACERS=leaks` is set, as in `tools/test.sh`.

use std::{
    mem::ManuallyDrop,
    thread,
    time::{Duration, Instant},
};

use gst::prelude::*;

/// Workers that don't listen let go of what they hold a little later.
const TIMEOUT: Duration = Duration::from_secs(10);

fn tracer() -> Option<gst::Tracer> {
    let mut tracers = gst::active_tracers().into_iter();
    tracers.find(|tracer| tracer.type_().name() == "GstLeaksTracer")
}

/// Ends this process in failure if something is alive when it is to end.
pub fn watch() {
    if tracer().is_some() {
        #[expect(unsafe_code, reason = "atexit")]
        // SAFETY: the function doesn't unwind, and uses what is there until the process has ended.
        let refused = unsafe { libc::atexit(at_exit) };
        assert_eq!(refused, 0);
    }
}

extern "C" fn at_exit() {
    let end = Instant::now() + TIMEOUT;
    let alive = loop {
        let alive = alive();
        if alive.is_empty() || Instant::now() > end {
            break alive;
        }
        thread::sleep(Duration::from_millis(5));
    };
    if !alive.is_empty() {
        eprintln!("leaked: {alive:#?}");
        std::process::abort();
    }
}

/// What is watched and lives.
pub fn alive() -> Vec<String> {
    let Some(tracer) = tracer() else {
        return Vec::new();
    };
    // Its references are stolen from whoever has them, and no business of ours to free.
    let alive = tracer.emit_by_name::<gst::Structure>("get-live-objects", &[]);
    let alive = ManuallyDrop::new(alive);
    let alive = alive.get::<gst::List>("live-objects-list").unwrap();
    alive.iter().map(|object| format!("{object:?}")).collect()
}
