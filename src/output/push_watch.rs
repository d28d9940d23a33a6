//! Tells of text that nobody takes.

use gst::{ClockTime, prelude::*};

use crate::log::CAT;

/// What takes text at once, or behind a queue, is long done.
const TIMEOUT: ClockTime = ClockTime::from_seconds(3);

/// Posts a WARNING if it is still there after some seconds in PLAYING: the push that it watches is blocked, and
/// with it the video.
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
            "Nobody takes the captions of {}, and the video waits. Put a queue behind each pad; in front of a \
             muxer, one without limits behind the text and behind the encoded video: queue max-size-time=0 \
             max-size-bytes=0 max-size-buffers=0",
            pad.name()
        )
    );
}
