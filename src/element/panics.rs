//! Panics of our threads are told in the GStreamer log, and nowhere else.

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    panic::{self, PanicHookInfo},
    sync::Once,
    thread,
};

use crate::log::CAT;
use vlmnarrate_engine::threads;

/// Such a panic is caught and comes as an ERROR; what Rust prints of it on stderr besides is noise.
///
/// There is one hook per copy of the standard library. A plugin that is loaded has a copy of its own,
/// and so the hook of no other Rust code in the process. Where it is linked with an application they
/// share one: all threads but ours are left to the hook that was there, and a hook that the application
/// sets later has its way with ours too.
pub(crate) fn go_to_the_log() {
    static ONCE: Once = Once::new();
    // A thread that panics must not touch the hook; the next model will find another.
    if thread::panicking() {
        return;
    }
    ONCE.call_once(|| {
        let others = panic::take_hook();
        panic::set_hook(Box::new(move |panic| match threads::is_own() {
            true => log(panic),
            false => others(panic),
        }));
    });
}

fn log(panic: &PanicHookInfo<'_>) {
    let backtrace = Backtrace::capture();
    let backtrace = match backtrace.status() {
        BacktraceStatus::Captured => format!("\n{backtrace}"),
        _ => String::new(),
    };
    gst::error!(CAT, "{panic}{backtrace}");
}
