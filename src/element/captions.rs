//! Captions and failures that reach the element.

use std::sync::Arc;

use gst::{prelude::*, subclass::prelude::*};

use crate::{
    caption::{Caption, FrameStamp},
    element::imp::VlmNarrate,
    log::CAT,
    properties::lossy,
    worker::CaptionUpdate,
};
use vlmnarrate_engine::Error;
use vlmnarrate_mailbox::Epoch;

impl VlmNarrate {
    pub(crate) fn current_caption(&self) -> Option<Arc<Caption>> {
        self.captions.lock().unwrap().current()
    }

    /// The caption to draw on the frame that goes out: the partial one, or else the current one.
    #[cfg(feature = "overlay")]
    pub(crate) fn caption_to_draw(&self) -> Option<Arc<Caption>> {
        self.captions.lock().unwrap().latest()
    }

    /// Drops the caption of this sequence number, if it is still current.
    pub(crate) fn expire(&self, sequence: u64) {
        let expired = self.captions.lock().unwrap().expire(sequence);
        if expired {
            gst::debug!(CAT, imp = self, "Caption {sequence} has expired");
            self.obj().notify("caption");
        }
    }

    pub(crate) fn on_caption(&self, update: CaptionUpdate) {
        let CaptionUpdate {
            mut caption,
            epoch,
            queue,
        } = update;
        caption.arrival_time = self.running_time();
        caption.element = self.element_name();
        let stored = self.captions.lock().unwrap().update(caption, epoch);
        let Some(caption) = stored else {
            return;
        };
        if !caption.partial {
            self.requests.complete(caption.stamp.request_id);
            self.stats.record(&caption, queue);
            log(self, &caption, queue);
            self.obj().notify("caption");
        }
        if self.settings.lock().unwrap().should_post(&caption) {
            let message = gst::message::Element::builder(caption.as_ref().into())
                .src(&*self.obj())
                .build();
            // Fails without a bus, which is no error.
            let _ = self.obj().post_message(message);
        }
    }

    pub(crate) fn on_frame_failed(&self, epoch: Epoch, stamp: &FrameStamp, error: &Error) {
        let is_current = self.captions.lock().unwrap().fail(epoch);
        if is_current {
            self.warn_frame_failed(stamp, error);
        }
    }

    /// Counts a live frame that the server did not answer. Only requests are told of one by one.
    pub(crate) fn on_frame_unanswered(&self, epoch: Epoch, stamp: &FrameStamp, error: &Error) {
        if !self.captions.lock().unwrap().fail(epoch) {
            return;
        }
        match stamp.request_id {
            0 => {
                self.stats.unanswered.increment();
                self.stream.forget_scene();
            }
            _ => self.warn_frame_failed(stamp, error),
        }
    }

    /// Posts the WARNING of a frame without a caption; the stream goes on.
    pub(crate) fn warn_frame_failed(&self, stamp: &FrameStamp, error: &dyn std::fmt::Display) {
        self.stats.errors.increment();
        self.requests.complete(stamp.request_id);
        self.stream.forget_scene();
        gst::element_imp_warning!(
            self,
            gst::StreamError::Failed,
            (
                "Frame at {} was not described: {error}",
                stamp.timestamp.display()
            )
        );
    }

    /// The element name in captions: that of the bin around the element, if there is one.
    pub(crate) fn element_name(&self) -> String {
        let bin = self.bin.lock().unwrap().upgrade();
        let element = bin.unwrap_or_else(|| self.obj().clone().upcast());
        lossy(&element.property_value("name"))
    }

    /// The running time now.
    fn running_time(&self) -> Option<gst::ClockTime> {
        let element = self.obj();
        // Below PLAYING the clock may run, but the base time is not of this run.
        match element.current_state() {
            gst::State::Playing => element.current_running_time(),
            _ => element.start_time(),
        }
    }
}

fn log(imp: &VlmNarrate, caption: &Caption, queue: std::time::Duration) {
    let cost = &caption.cost;
    let ms = |duration: std::time::Duration| duration.as_secs_f64() * 1e3;
    gst::info!(
        CAT,
        imp = imp,
        "timestamp={} latency_ms={:.1} queue_ms={:.1} preprocess_ms={:.1} vision_ms={:.1} \
         prefill_ms={:.1} decode_ms={:.1} tokens={} trigger={} text={:?}",
        caption.stamp.timestamp.display(),
        ms(cost.latency),
        ms(queue),
        ms(cost.preprocess),
        ms(cost.vision),
        ms(cost.prefill),
        ms(cost.decode),
        caption.tokens,
        caption.stamp.trigger,
        caption.text,
    );
}
