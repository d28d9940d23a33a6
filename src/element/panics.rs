//! A panic hook that writes panics of this library's threads to the GStreamer log.

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    panic::{self, PanicHookInfo},
    sync::Once,
    thread,
};

use crate::log::CAT;
use vlmnarrate_engine::threads;

/// Installs the hook, once. The worker catches such panics and posts an ERROR, so a message on stderr would be noise.
///
/// There is one hook per copy of the standard library. A plugin that is loaded has its own copy. A plugin that is linked
/// into an application shares the application's: for all other threads the previous hook is called, and a hook that the
/// application installs later replaces this one.
pub(crate) fn install_panic_hook() {
    static ONCE: Once = Once::new();
    // A panicking thread must not touch the hook; the next load installs it.
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
