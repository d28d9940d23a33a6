//! Waiting for a socket, a signal or a point in time, whichever comes first.

use std::{
    os::fd::AsFd,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

/// The peer has closed its side.
#[cfg(target_os = "linux")]
pub const CLOSED: PollFlags = PollFlags::RDHUP;
#[cfg(not(target_os = "linux"))]
pub const CLOSED: PollFlags = PollFlags::HUP;

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// The first descriptor.
    First,
    /// The second descriptor.
    Second,
    /// The time.
    Time,
}

/// Waits until `until` (`None`: forever), until `flags` or an error are there for `first`, or `second` can be read.
///
/// Timers of `poll` are exact to 0.1 ms; those of socket timeouts are as coarse as the kernel's tick.
pub fn wait(
    first: &impl AsFd,
    flags: PollFlags,
    second: Option<&dyn AsFd>,
    until: Option<Instant>,
) -> Woken {
    let mut fds = vec![PollFd::new(first, flags)];
    fds.extend(second.map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)));
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        match poll(&mut fds, left.map(timespec).as_ref()) {
            Err(Errno::INTR) => {}
            Err(_) => return Woken::First,
            Ok(_) if !fds[0].revents().is_empty() => return Woken::First,
            Ok(_) if fds.get(1).is_some_and(|fd| !fd.revents().is_empty()) => {
                return Woken::Second;
            }
            Ok(_) => {
                if until.is_some_and(|until| Instant::now() >= until) {
                    return Woken::Time;
                }
            }
        }
    }
}

fn timespec(time: Duration) -> Timespec {
    // A year at most: everything longer is forever.
    let time = time.min(Duration::from_secs(365 * 86_400));
    Timespec {
        tv_sec: time.as_secs() as _,
        tv_nsec: time.subsec_nanos() as _,
    }
}
