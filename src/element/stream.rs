//! The state of the video stream.

use std::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicBool, Ordering},
};

use gst::{ClockTime, glib, prelude::*};

use crate::{
    caption::{FrameStamp, Trigger},
    input::{
        clip::{ClipBuilder, ClipFrame, SampledClip},
        downscale::{Downscaler, Target},
        sampler::{DueFrame, Sampler, SamplerSettings},
        scene::SceneDetector,
    },
    output::{
        playback_clock::{FrameTime, PlaybackClock},
        text_pad::FrameTiming,
        timeline::{CueLength, frame_end},
    },
    prompt::RequestSettings,
};
use vlmnarrate_engine::{ImageSize, Picture};

/// Timestamps that jump by less are out of order.
const MIN_JUMP: ClockTime = ClockTime::from_nseconds(1);

/// The state of the stream that the streaming thread owns.
///
/// While data flows no other thread takes the lock. The lock is not held while a frame waits for its caption, nor
/// while anything is pushed or posted.
#[derive(Default)]
pub(crate) struct Stream {
    state: Mutex<State>,
    /// Makes the next picture count as new; set from the worker's thread too.
    reset_scene: AtomicBool,
}

#[derive(Default)]
struct State {
    info: Option<gst_video::VideoInfo>,
    segment: gst::FormattedSegment<ClockTime>,
    /// The segment as received; `None` before the first of the stream.
    received_segment: Option<gst::Segment>,
    /// The last answer to the LATENCY query.
    is_live: Option<bool>,
    /// Whether the answer may have changed.
    query_live: bool,
    clock: PlaybackClock,
    sampler: Sampler,
    clip: ClipBuilder,
    scene: SceneDetector,
    /// Sequence number of the current caption, and the playback time from which its lifetime counts.
    current_since: Option<(u64, ClockTime)>,
    /// For small pictures and for whole frames; each is made for the first frame that needs it.
    downscalers: [Option<Downscaler>; 2],
}

/// What the stream's state makes of a frame.
pub(crate) struct FrameInfo {
    /// `None` if the time of the frame is unknown.
    pub(crate) time: Option<FrameTime>,
    /// `None` for frames that are not on the text pad's timeline.
    pub(crate) timing: Option<FrameTiming>,
    pub(crate) due: Option<DueFrame>,
    pub(crate) stamp: FrameStamp,
}

impl Stream {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn reset(&self) {
        *self.lock() = State::default();
    }

    pub(crate) fn set_info(&self, info: gst_video::VideoInfo) {
        let mut state = self.lock();
        state.info = Some(info);
        state.query_live = true;
        state.downscalers = [None, None];
    }

    /// Whether a segment differs from the current one. Sources may send the same segment again, for example with every
    /// change of tags or caps, which means nothing.
    pub(crate) fn is_new_segment(&self, segment: &gst::Segment) -> bool {
        let state = self.lock();
        state.received_segment.as_ref().is_none_or(|received| {
            // The position is that of the sender.
            let mut segment = segment.clone();
            segment.format() != received.format() || {
                segment.set_position(received.position());
                segment != *received
            }
        })
    }

    pub(crate) fn set_segment(&self, segment: &gst::Segment) {
        let mut state = self.lock();
        state.received_segment = Some(segment.clone());
        // Buffers in other formats have no times to convert.
        state.segment = segment
            .downcast_ref::<ClockTime>()
            .cloned()
            .unwrap_or_default();
        state.query_live = true;
        let State { clock, segment, .. } = &mut *state;
        clock.segment(segment);
        state.sampler = Sampler::default();
        state.clip.clear();
    }

    /// Whether there is a segment in time format.
    pub(crate) fn is_in_time(&self) -> bool {
        let state = self.lock();
        let segment = state.received_segment.as_ref();
        segment.is_some_and(|segment| segment.format() == gst::Format::Time)
    }

    pub(crate) fn stream_time(&self, pts: Option<ClockTime>) -> Option<ClockTime> {
        self.lock().segment.to_stream_time(pts)
    }

    /// Advances over a GAP event.
    pub(crate) fn gap(
        &self,
        position: ClockTime,
        duration: Option<ClockTime>,
    ) -> Option<FrameTiming> {
        let time = self.lock().clock.advance(Some(position), duration)?;
        Some(FrameTiming {
            time,
            duration,
            cue: CueLength::Until(time.elapsed),
        })
    }

    /// Advances to a frame, and decides whether it is due.
    pub(crate) fn advance(
        &self,
        buffer: &gst::BufferRef,
        frame: u64,
        settings: &SamplerSettings,
        is_live: bool,
        is_wanted: bool,
    ) -> FrameInfo {
        let pts = buffer.pts();
        let mut state = self.lock();
        let State {
            info,
            segment,
            clock,
            sampler,
            ..
        } = &mut *state;

        let duration = buffer.duration().or(info.as_ref().and_then(frame_period));
        let time = clock.advance(pts, duration);
        let elapsed = time.map(|time| time.elapsed);
        let is_inside = is_inside(segment, pts, duration);
        if time.is_some_and(|time| time.jump_size >= settings.interval.max(MIN_JUMP)) {
            // Another scene, which is described at once.
            *sampler = Sampler::default();
        }
        let due = match is_inside && has_picture(buffer) {
            true => sampler.sample(elapsed, settings, is_wanted),
            false => None,
        };
        let timing = time.filter(|_| is_inside).map(|time| {
            let end = frame_end(time.elapsed, duration);
            let cue = match is_live {
                true => CueLength::Slice(settings.interval),
                false => CueLength::Until(sampler.next_clip_end(time.elapsed, end, settings)),
            };
            FrameTiming {
                time,
                duration,
                cue,
            }
        });
        FrameInfo {
            time,
            timing,
            due,
            stamp: FrameStamp {
                timestamp: pts,
                stream_time: segment.to_stream_time(pts),
                running_time: segment.to_running_time(pts),
                duration: buffer.duration(),
                first_timestamp: pts,
                frames: 1,
                frame,
                trigger: Trigger::Interval,
                request_id: 0,
            },
        }
    }

    /// The last answer to the LATENCY query, unless it may have changed.
    pub(crate) fn is_live(&self) -> Option<bool> {
        let state = self.lock();
        state.is_live.filter(|_| !state.query_live)
    }

    pub(crate) fn set_live(&self, is_live: bool) {
        let mut state = self.lock();
        state.is_live = Some(is_live);
        state.query_live = false;
    }

    /// Whether the frames so far were those of a recording.
    pub(crate) fn is_recorded(&self) -> bool {
        self.lock().is_live == Some(false)
    }

    /// Playback time from which the lifetime of the caption with this sequence number counts: that of the first frame
    /// on which it is current.
    pub(crate) fn current_since(&self, sequence: u64, elapsed: ClockTime) -> ClockTime {
        let mut state = self.lock();
        let since = state
            .current_since
            .filter(|(current, _)| *current == sequence);
        let since = since.unwrap_or((sequence, elapsed));
        state.current_since.insert(since).1
    }

    /// Lets the lifetime of the current caption count anew.
    pub(crate) fn renew_current(&self) {
        self.lock().current_since = None;
    }

    /// Makes the next picture count as new.
    pub(crate) fn forget_scene(&self) {
        self.reset_scene.store(true, Ordering::Relaxed);
    }

    /// Decides whether to describe these pictures, and why.
    pub(crate) fn detect_scene(
        &self,
        pictures: &[Arc<Picture>],
        elapsed: Option<ClockTime>,
        settings: &RequestSettings,
        threshold: f64,
    ) -> Option<Trigger> {
        let mut state = self.lock();
        if self.reset_scene.swap(false, Ordering::Relaxed) {
            state.scene.reset();
        }
        state.scene.detect(pictures, elapsed, settings, threshold)
    }

    /// Forgets what came before a flush or a new stream.
    pub(crate) fn start_over(&self) {
        self.forget_scene();
        let mut state = self.lock();
        state.received_segment = None;
        state.sampler = Sampler::default();
        state.clip.clear();
    }

    /// Adds a frame to its clip. Returns the clip when it is complete.
    pub(crate) fn add_to_clip(
        &self,
        frame: ClipFrame,
        due: DueFrame,
        interval: ClockTime,
    ) -> Option<SampledClip> {
        let clip = &mut self.lock().clip;
        if due.is_first {
            clip.clear();
        }
        clip.push(frame);
        due.is_last.then(|| clip.finish(interval))?
    }

    /// Completes the clip in progress with the frames that it has.
    pub(crate) fn finish_clip(&self, interval: ClockTime) -> Option<SampledClip> {
        self.lock().clip.finish(interval)
    }

    /// Scales a frame to a picture of this size, in memory that is reused.
    pub(crate) fn picture(
        &self,
        buffer: &gst::BufferRef,
        size: ImageSize,
        memory: Vec<u8>,
    ) -> Result<Picture, glib::BoolError> {
        let mut state = self.lock();
        let State {
            info, downscalers, ..
        } = &mut *state;
        let info = info.as_ref().ok_or_else(|| glib::bool_error!("no caps"))?;
        let slot = &mut downscalers[usize::from(size == ImageSize::Whole)];
        let target = match size {
            ImageSize::Square(side) => Target::Exact(side, side),
            ImageSize::LongestEdge(pixels) => Target::LongestEdge(pixels),
            ImageSize::Whole => Target::Exact(info.width(), info.height()),
        };
        let downscaler = match slot.take_if(|downscaler| downscaler.target() == target) {
            Some(downscaler) => downscaler,
            None => Downscaler::new(info, target)?,
        };
        slot.insert(downscaler).picture(buffer, memory)
    }
}

/// `None` if the frame rate is variable, 0/1.
fn frame_period(info: &gst_video::VideoInfo) -> Option<ClockTime> {
    let rate = info.fps();
    let frames = u64::try_from(rate.numer()).ok().filter(|n| *n > 0)?;
    ClockTime::SECOND.mul_div_floor(u64::try_from(rate.denom()).ok()?, frames)
}

/// Whether a frame is inside the segment: a frame that is not shown is not described either.
fn is_inside(
    segment: &gst::FormattedSegment<ClockTime>,
    pts: Option<ClockTime>,
    duration: Option<ClockTime>,
) -> bool {
    pts.is_none_or(|pts| {
        let end = duration.map(|duration| pts.saturating_add(duration));
        segment.clip(pts, end).is_some()
    })
}

/// Whether a buffer has a picture. The GAP flag says nothing: elements that repeat a frame set it on a buffer with the
/// whole picture.
pub(crate) fn has_picture(buffer: &gst::BufferRef) -> bool {
    buffer.size() > 0
}
