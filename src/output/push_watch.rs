//! Warns of a text pad that blocks the video.

use gst::{ClockTime, prelude::*};

use crate::log::CAT;

/// Far longer than a push that does not block.
const TIMEOUT: ClockTime = ClockTime::from_seconds(3);

/// Watches a push. Posts a WARNING if the push has not returned after some seconds in PLAYING: it blocks the video.
pub(crate) struct PushWatch(gst::PeriodicClockId);

impl PushWatch {
    pub(crate) fn new(pad: &gst::Pad) -> Self {
        let pad = pad.downgrade();
        Self::calling(TIMEOUT, move || {
            let Some(pad) = pad.upgrade() else {
                return false;
            };
            let element = pad.parent_element();
            let element = element.filter(|e| e.current_state() == gst::State::Playing);
            if let Some(element) = &element {
                warn(element, &pad);
            }
            element.is_some()
        })
    }

    /// Calls `look` after each `timeout` until it returns true.
    fn calling(timeout: ClockTime, look: impl Fn() -> bool + Send + 'static) -> Self {
        let clock = gst::SystemClock::obtain();
        let id = clock.new_periodic_id(clock.time() + timeout, timeout);
        // The id holds the closure, which must not hold the id.
        let _ = id.wait_async(move |_, _, id| {
            if look() {
                id.unschedule();
            }
        });
        Self(id)
    }
}

impl Drop for PushWatch {
    fn drop(&mut self) {
        self.0.unschedule();
    }
}

fn warn(element: &gst::Element, pad: &gst::Pad) {
    gst::debug!(CAT, obj = pad, "A push is blocked");
    gst::element_warning!(
        element,
        gst::StreamError::Failed,
        (
            "The pad {} is blocked, and so is the video. Put a queue behind each source pad. In front of a muxer, \
             the queues of the text and of the encoded video must have no limits: queue max-size-time=0 \
             max-size-bytes=0 max-size-buffers=0",
            pad.name()
        )
    );
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, mpsc},
        thread,
        time::{Duration, Instant},
    };

    use super::*;

    #[test]
    fn a_watch_looks_until_it_has_seen_and_leaves_nothing_behind() {
        gst::init().unwrap();
        let (looked, looks) = mpsc::channel();
        let held = Arc::new(());
        let kept = held.clone();
        let watch = PushWatch::calling(ClockTime::from_mseconds(5), move || {
            let _ = &kept;
            looked.send(()).is_err()
        });
        for _ in 0..3 {
            looks.recv_timeout(Duration::from_secs(10)).unwrap();
        }
        drop(watch);
        // The clock's thread may be looking.
        let begun = Instant::now();
        while Arc::strong_count(&held) > 1 {
            assert!(
                begun.elapsed() < Duration::from_secs(10),
                "it was never freed"
            );
            thread::sleep(Duration::from_millis(1));
        }
    }
}
