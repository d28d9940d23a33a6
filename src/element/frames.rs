//! The way of a frame through the element.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use gst::{ClockTime, glib, prelude::*, subclass::prelude::*};
use gst_base::prelude::*;

use crate::{
    caption::{FrameStamp, Trigger},
    element::{
        enums::Mode,
        imp::VlmNarrate,
        model::LoadedModel,
        requests::DescribeRequest,
        settings::Settings,
        stream::{FrameInfo, has_picture},
    },
    input::{
        clip::ClipFrame,
        sampler::{DueFrame, SamplerSettings},
    },
    log::CAT,
    output::{encoding, text_pad::CurrentCaption},
    worker::{Job, Worker},
};
use vlmnarrate_engine::{ImageSize, Picture};
use vlmnarrate_mailbox::{Refused, Wait};

/// A frame scaled to one size, for all requests about it.
#[derive(Clone)]
struct ScaledPicture {
    picture: Result<Arc<Picture>, glib::BoolError>,
    /// Time that the scaling took.
    scaling: Duration,
}

/// Why a frame is described.
enum FrameRequest {
    Interval(DueFrame),
    DescribeNow(DescribeRequest),
}

impl VlmNarrate {
    /// Processes a frame. Only its metadata is changed.
    pub(crate) fn frame(
        &self,
        buffer: &mut gst::BufferRef,
    ) -> Result<gst::FlowSuccess, gst::FlowError> {
        let Some(model) = self.model() else {
            return Err(gst::FlowError::Flushing);
        };
        let live = self.is_live();
        let frame = self.advance(buffer, &model, live);
        let is_requested =
            self.requests.has_pending() && (!live || model.worker.has_room_for_request());
        if (frame.due.is_some() || is_requested) && has_picture(buffer) {
            match self.describe(buffer, &frame, &model, live) {
                // The worker has failed and posted an error: live video goes on without captions.
                Err(Refused::WorkerFailed) if live => (),
                Err(Refused::WorkerFailed) => return Err(gst::FlowError::Error),
                Err(Refused::Flushing) => {
                    // The flush may have reset the requests before this frame took one.
                    self.requests.retry_all();
                    return Err(gst::FlowError::Flushing);
                }
                Ok(()) => (),
            }
        }

        let (attach, lifetime) = {
            let settings = self.settings.lock().unwrap();
            (settings.attach_meta, settings.lifetime())
        };
        let current = self.caption_at(frame.time.map(|time| time.elapsed), lifetime);
        if attach {
            match &current {
                Some(CurrentCaption { caption, .. }) => {
                    if let Err(error) = encoding::attach(caption, buffer) {
                        gst::warning!(CAT, imp = self, "Can't add a meta to this buffer: {error}");
                    }
                }
                None => encoding::detach(|| self.element_name(), buffer),
            }
        }
        match frame.timing {
            Some(timing) => self.text.frame(timing, current),
            None => Ok(gst::FlowSuccess::Ok),
        }
    }

    /// The caption that is current at this playback time. Drops a caption that has expired.
    fn caption_at(
        &self,
        elapsed: Option<ClockTime>,
        lifetime: ClockTime,
    ) -> Option<CurrentCaption> {
        let caption = self.current_caption()?;
        let Some(elapsed) = elapsed else {
            return Some(CurrentCaption {
                caption,
                expires_at: ClockTime::MAX,
            });
        };
        let since = self.stream.current_since(caption.sequence, elapsed);
        let expires_at = since.saturating_add(lifetime);
        if elapsed >= expires_at {
            self.expire(caption.sequence);
            return None;
        }
        Some(CurrentCaption {
            caption,
            expires_at,
        })
    }

    /// Whether the stream is live. Upstream is queried on the streaming thread, once per caps or segment.
    fn is_live(&self) -> bool {
        if let Some(live) = self.stream.is_live() {
            return live;
        }
        let mode = self.settings.lock().unwrap().mode;
        let live = match mode {
            Mode::Live => true,
            Mode::Recorded => false,
            Mode::Auto => {
                let mut query = gst::query::Latency::new();
                self.obj().sink_pad().peer_query(&mut query) && query.result().0
            }
        };
        let mode = if live { "live" } else { "recorded" };
        gst::debug!(CAT, imp = self, "This is a {mode} stream");
        self.stream.set_live(live);
        live
    }

    /// Advances the stream to a frame, and decides whether it is due.
    fn advance(&self, buffer: &gst::BufferRef, model: &LoadedModel, live: bool) -> FrameInfo {
        let settings = {
            let settings = self.settings.lock().unwrap();
            let phase = match live && settings.is_remote() {
                true => self.phase.0,
                false => 0.0,
            };
            SamplerSettings {
                phase,
                ..settings.sampler
            }
        };
        let is_wanted = !live || model.worker.wants_frame();
        let number = self.stats.frames.increment();
        self.stream
            .advance(buffer, number, &settings, live, is_wanted)
    }

    /// Submits the frame for all that want it described: a complete clip, and requests. A recorded frame waits until it
    /// is described.
    fn describe(
        &self,
        buffer: &gst::BufferRef,
        frame: &FrameInfo,
        model: &LoadedModel,
        live: bool,
    ) -> Result<(), Refused> {
        let worker = &model.worker;
        worker.check()?;
        if !live && worker.checkpoint().is_none() {
            worker.wait_loaded()?;
        }
        let settings = self.settings.lock().unwrap().clone();
        // Unknown while the model is being downloaded. Live frames would be old by the end of the download, so they are
        // skipped; requests stay pending.
        let Some(size) = model.picture_size(settings.image_size) else {
            return Ok(());
        };
        // The worker has room for one requested live frame; recorded ones are submitted one after the other.
        let room = match live {
            true => usize::from(worker.has_room_for_request()),
            false => usize::MAX,
        };
        let requests = std::iter::from_fn(|| self.requests.take_next()).take(room);
        let requests = (frame.due.map(FrameRequest::Interval).into_iter())
            .chain(requests.map(FrameRequest::DescribeNow))
            .collect::<Vec<_>>();

        let elapsed = frame.time.map(|time| time.elapsed);
        let urgency = settings.urgency(live);
        let sampled_at = Instant::now();
        let mut scaled: [Option<ScaledPicture>; 2] = [None, None];
        for request in requests {
            let (stamp, mut request_settings) = match &request {
                FrameRequest::Interval(_) => (frame.stamp, settings.interval_request_settings()),
                FrameRequest::DescribeNow(request) => {
                    let stamp = FrameStamp {
                        trigger: Trigger::Request,
                        request_id: request.id,
                        ..frame.stamp
                    };
                    let prompt = request.prompt_settings(&settings.detail);
                    (stamp, settings.request_settings(&prompt))
                }
            };
            request_settings.whole_frames |= size == ImageSize::Whole;
            let size = match request_settings.whole_frames {
                true => ImageSize::Whole,
                false => size,
            };
            let scaled = scaled[usize::from(size == ImageSize::Whole)].get_or_insert_with(|| {
                let start = Instant::now();
                let memory = worker.take_spare_memory();
                ScaledPicture {
                    picture: self.stream.picture(buffer, size, memory).map(Arc::new),
                    scaling: start.elapsed(),
                }
            });
            let scaling = scaled.scaling;
            let picture = match &scaled.picture {
                Ok(picture) => picture.clone(),
                Err(error) => {
                    self.warn_frame_failed(&stamp, error);
                    continue;
                }
            };
            let job = |pictures, clip, stamp| Job {
                pictures,
                clip,
                stamp,
                settings: request_settings,
                sampled_at,
                scaling,
                urgency,
            };
            match request {
                FrameRequest::Interval(due) => {
                    let clip_frame = ClipFrame {
                        picture,
                        stamp,
                        position: stamp.timestamp.or(frame.time.map(|time| time.position)),
                        elapsed,
                        slot: due.slot,
                    };
                    let interval = settings.sampler.interval;
                    let Some(sampled) = self.stream.add_to_clip(clip_frame, due, interval) else {
                        continue;
                    };
                    let clip = (settings.sampler.frames > 1).then_some(sampled.clip);
                    let job = job(sampled.pictures, clip, sampled.stamp);
                    if !self.submit_if_changed(job, elapsed, &settings, worker)? {
                        continue;
                    }
                }
                FrameRequest::DescribeNow(_) => {
                    self.stats.sampled.increment();
                    worker.submit_request(job(vec![picture], None, stamp))?;
                }
            }
            if !live && let Wait::Refused(refused) = worker.wait_idle(None) {
                return Err(refused);
            }
        }
        Ok(())
    }

    /// Submits a job, unless its pictures are unchanged. Returns whether it was submitted.
    fn submit_if_changed(
        &self,
        mut job: Job,
        elapsed: Option<ClockTime>,
        settings: &Settings,
        worker: &Worker,
    ) -> Result<bool, Refused> {
        let threshold = settings.sampler.scene_threshold;
        let trigger = self
            .stream
            .detect_scene(&job.pictures, elapsed, &job.settings, threshold);
        match trigger {
            Some(trigger) => job.stamp.trigger = trigger,
            None => {
                self.stats.unchanged.increment();
                // The current caption is still true.
                self.stream.renew_current();
                return Ok(false);
            }
        }
        self.stats.sampled.increment();
        if worker.submit_newest(job)? {
            self.stats.dropped.increment();
        }
        Ok(true)
    }

    /// Describes a recording to its end before another stream or segment begins.
    pub(crate) fn finish_recorded(&self) {
        if self.stream.is_recorded() {
            self.drain();
            let interval = self.settings.lock().unwrap().sampler.interval;
            self.text.finish(self.current_caption().as_ref(), interval);
        }
    }

    /// Waits for captions in progress, at most `drain-timeout`, before an event that ends the stream is forwarded. A
    /// recorded clip that has begun is described with the frames that it has.
    pub(crate) fn drain(&self) {
        let settings = self.settings.lock().unwrap().clone();
        let timeout = settings.drain_timeout;
        let Some(model) = self.model().filter(|_| !timeout.is_zero()) else {
            return;
        };
        // A live clip that is not complete is dropped.
        let rest = self.stream.finish_clip(settings.sampler.interval);
        if let Some(sampled) = rest.filter(|_| self.stream.is_recorded()) {
            let job = Job {
                pictures: sampled.pictures,
                clip: Some(sampled.clip),
                stamp: sampled.stamp,
                settings: settings.interval_request_settings(),
                sampled_at: Instant::now(),
                scaling: Duration::ZERO,
                urgency: settings.urgency(false),
            };
            // Refused while flushing or after an error that was posted.
            let _ = self.submit_if_changed(job, None, &settings, &model.worker);
        }
        if model.worker.wait_idle(Some(timeout.into())) == Wait::TimedOut {
            gst::warning!(
                CAT,
                imp = self,
                "A caption took longer than drain-timeout ({timeout})"
            );
        }
    }
}
