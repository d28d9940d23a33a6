//! Warns of a text pad that blocks the video.

use gst::{ClockTime, prelude::*};

use crate::log::CAT;

/// Far longer than a push that does not block.
const TIMEOUT: ClockTime = ClockTime::from_seconds(3);

/// Watches a push. Posts a WARNING if the push has not returned after some seconds in PLAYING: it blocks the video.
pub(crate) struct PushWatch(gst::PeriodicClockId);

impl PushWatch {
    pub(crate) fn new(pad: &gst::Pad) -> Self {
        let clock = gst::SystemClock::obtain();
        let id = clock.new_periodic_id(clock.time() + TIMEOUT, TIMEOUT);
        let (watched, pad) = (id.clone(), pad.downgrade());
        let _ = id.wait_async(move |_, _, _| {
            if let Some(pad) = pad.upgrade()
                && let Some(element) = pad.parent_element()
                && element.current_state() == gst::State::Playing
            {
                watched.unschedule();
                warn(&element, &pad);
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
