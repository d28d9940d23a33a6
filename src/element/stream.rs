//! The way of a frame through the element.

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use gst::{ClockTime, glib, prelude::*, subclass::prelude::*};
use gst_base::prelude::*;

use crate::{
    caption::{FrameStamp, Trigger},
    element::{
        imp::VlmNarrate,
        narration::Loaded,
        requests::Request,
        settings::{Mode, Settings},
    },
    input::{
        clip::{Shot, Shots, Taken},
        downscale::Downscaler,
        sampler::{Due, Pace, Sampler},
        scene::Scene,
    },
    log::CAT,
    output::{
        encoding,
        playhead::{Moment, Playhead},
        text_pad::{Current, Place},
        timeline::{Cue, frame_end},
    },
    prompt::{PictureSize, Question},
    worker::worker::{Job, Narrator},
};
use vlmnarrate_engine::Picture;
use vlmnarrate_mailbox::{Refused, Wait};

/// Timestamps that leap by less are out of order.
const LEAST_LEAP: ClockTime = ClockTime::from_nseconds(1);

/// What the streaming thread knows of the stream.
///
/// While it streams nobody else takes the lock; it is not held while a frame waits, nor while
/// anything is pushed or posted.
#[derive(Default)]
pub(crate) struct Stream {
    state: Mutex<State>,
    /// The next picture counts as new; set from the worker too.
    scene_forgotten: AtomicBool,
}

#[derive(Default)]
struct State {
    info: Option<gst_video::VideoInfo>,
    segment: gst::FormattedSegment<ClockTime>,
    /// As it came; `None` before the stream's first.
    received_segment: Option<gst::Segment>,
    /// What upstream said last.
    live: Option<bool>,
    /// Upstream may say something else from the next buffer on.
    ask_live: bool,
    playhead: Playhead,
    sampler: Sampler,
    shots: Shots,
    scene: Scene,
    /// Number of the current caption, and what had been played when its time began to count.
    shown: Option<(u64, ClockTime)>,
    /// For small pictures and for whole ones; each made for the first frame that needs it.
    downscalers: [Option<Downscaler>; 2],
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
        state.ask_live = true;
        state.downscalers = [None, None];
    }

    /// Whether a segment differs from the one that is played. Sources may send one again, with every change of
    /// tags or caps for instance, which means nothing.
    pub(crate) fn is_new_segment(&self, segment: &gst::Segment) -> bool {
        let state = self.lock();
        state.received_segment.as_ref().is_none_or(|received| {
            // Where the sender is in it is the sender's business.
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
        // Buffers of other formats have no times to speak of.
        state.segment = segment
            .downcast_ref::<ClockTime>()
            .cloned()
            .unwrap_or_default();
        state.ask_live = true;
        let State {
            playhead, segment, ..
        } = &mut *state;
        playhead.segment(segment);
        state.sampler = Sampler::default();
        state.shots.clear();
    }

    /// Whether there is a segment, and in time.
    pub(crate) fn is_in_time(&self) -> bool {
        let state = self.lock();
        let segment = state.received_segment.as_ref();
        segment.is_some_and(|segment| segment.format() == gst::Format::Time)
    }

    pub(crate) fn stream_time(&self, pts: Option<ClockTime>) -> Option<ClockTime> {
        self.lock().segment.to_stream_time(pts)
    }

    /// A stretch without a frame is played.
    pub(crate) fn gap(&self, position: ClockTime, duration: Option<ClockTime>) -> Option<Place> {
        let moment = self.lock().playhead.advance(Some(position), duration)?;
        Some(Place {
            moment,
            duration,
            cue: Cue::Until(moment.elapsed),
        })
    }

    pub(crate) fn forget_scene(&self) {
        self.scene_forgotten.store(true, Ordering::Relaxed);
    }

    /// What was seen before has nothing to do with what comes.
    pub(crate) fn start_over(&self) {
        self.forget_scene();
        let mut state = self.lock();
        state.received_segment = None;
        state.sampler = Sampler::default();
        state.shots.clear();
    }

    /// Adds a frame to its clip; gives the clip when it is whole.
    fn take(&self, shot: Shot, due: Due, pace: &Pace) -> Option<Taken> {
        let shots = &mut self.lock().shots;
        if due.is_first {
            shots.clear();
        }
        shots.add(shot);
        due.is_last.then(|| shots.take(pace.interval))?
    }

    /// Whether the frames so far were those of a recording.
    fn is_recorded(&self) -> bool {
        self.lock().live == Some(false)
    }

    /// The clip that has begun.
    fn take_rest(&self, interval: ClockTime) -> Option<Taken> {
        self.lock().shots.take(interval)
    }
}

impl State {
    /// A frame as a picture of this size.
    fn picture(
        &mut self,
        buffer: &gst::BufferRef,
        size: PictureSize,
        memory: Vec<u8>,
    ) -> Result<Picture, glib::BoolError> {
        let info = self.info.as_ref();
        let info = info.ok_or_else(|| glib::bool_error!("no caps"))?;
        let slot = &mut self.downscalers[usize::from(size == PictureSize::Whole)];
        let size = match size {
            PictureSize::Square(side) => (side, side),
            PictureSize::Whole => (info.width(), info.height()),
        };
        let downscaler = match slot.take_if(|downscaler| downscaler.size() == size) {
            Some(downscaler) => downscaler,
            None => Downscaler::new(info, size)?,
        };
        slot.insert(downscaler).picture(buffer, memory)
    }
}

/// A frame's picture, made once for all who ask for one of its size.
#[derive(Clone)]
struct Scaled {
    picture: Result<Arc<Picture>, glib::BoolError>,
    /// How long it took.
    scaling: Duration,
}

/// A frame's turn, or the lack of it.
struct Turn {
    /// Where the frame stands, if that can be told.
    moment: Option<Moment>,
    /// Where it stands on the text pad's timeline.
    place: Option<Place>,
    due: Option<Due>,
    stamp: FrameStamp,
}

/// Why a frame is wanted.
enum Ask {
    Turn(Due),
    Request(Request),
}

impl VlmNarrate {
    /// A frame comes through. Only its metadata is touched.
    pub(crate) fn frame(
        &self,
        buffer: &mut gst::BufferRef,
    ) -> Result<gst::FlowSuccess, gst::FlowError> {
        let Some(loaded) = self.loaded() else {
            return Err(gst::FlowError::Flushing);
        };
        let live = self.is_live();
        let turn = self.turn(buffer, &loaded, live);
        let wanted = self.requests.is_waiting() && (!live || loaded.narrator.has_room());
        if (turn.due.is_some() || wanted) && has_picture(buffer) {
            match self.describe(buffer, &turn, &loaded, live) {
                // The worker is gone and has said why: live video goes on without it.
                Err(Refused::Dead) if live => (),
                Err(Refused::Dead) => return Err(gst::FlowError::Error),
                Err(Refused::Flushing) => {
                    // The flush may have looked for requests before this frame took one.
                    self.requests.ask_again();
                    return Err(gst::FlowError::Flushing);
                }
                Ok(()) => (),
            }
        }

        let (attach, lifetime) = {
            let settings = self.settings.lock().unwrap();
            (settings.attach_meta, settings.lifetime())
        };
        let current = self.current_at(turn.moment.map(|moment| moment.elapsed), lifetime);
        if attach {
            match &current {
                Some(Current { caption, .. }) => {
                    if let Err(error) = encoding::attach(caption, buffer) {
                        gst::warning!(CAT, imp = self, "No meta on this buffer: {error}");
                    }
                }
                None => encoding::detach(|| self.element_name(), buffer),
            }
        }
        match turn.place {
            Some(place) => self.text.frame(place, current),
            None => Ok(gst::FlowSuccess::Ok),
        }
    }

    /// The caption that is current at a frame; one whose time is up goes.
    fn current_at(&self, elapsed: Option<ClockTime>, lifetime: ClockTime) -> Option<Current> {
        let caption = self.current()?;
        let Some(elapsed) = elapsed else {
            let until = ClockTime::MAX;
            return Some(Current { caption, until });
        };
        let since = {
            let mut stream = self.stream.lock();
            let counting = stream
                .shown
                .filter(|(sequence, _)| *sequence == caption.sequence);
            let counting = counting.unwrap_or((caption.sequence, elapsed));
            stream.shown.insert(counting).1
        };
        let until = since.saturating_add(lifetime);
        if elapsed >= until {
            self.expire(caption.sequence);
            return None;
        }
        Some(Current { caption, until })
    }

    /// Upstream is asked once per caps or segment, on the streaming thread.
    fn is_live(&self) -> bool {
        {
            let state = self.stream.lock();
            if let Some(live) = state.live.filter(|_| !state.ask_live) {
                return live;
            }
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
        let word = if live { "live" } else { "recorded" };
        gst::debug!(CAT, imp = self, "This is a {word} stream");
        let mut state = self.stream.lock();
        state.live = Some(live);
        state.ask_live = false;
        live
    }

    /// Sees whether it is this frame's turn.
    fn turn(&self, buffer: &gst::BufferRef, loaded: &Loaded, live: bool) -> Turn {
        let pace = self.settings.lock().unwrap().pace;
        let free = !live || loaded.narrator.is_idle();
        let pts = buffer.pts();
        let mut stream = self.stream.lock();
        let State {
            info,
            segment,
            playhead,
            sampler,
            ..
        } = &mut *stream;

        let period = info.as_ref().and_then(frame_period);
        let duration = buffer.duration().or(period);
        let moment = playhead.advance(pts, duration);
        let elapsed = moment.map(|moment| moment.elapsed);
        let inside = is_inside(segment, pts, duration);
        if moment.is_some_and(|moment| moment.leap >= pace.interval.max(LEAST_LEAP)) {
            // Another scene, which is worth a look at once.
            *sampler = Sampler::default();
        }
        let due = match inside && has_picture(buffer) {
            true => sampler.due(elapsed, &pace, free),
            false => None,
        };
        let place = moment.filter(|_| inside).map(|moment| {
            let elapsed = moment.elapsed;
            let cue = if live {
                Cue::Slice(pace.interval)
            } else {
                Cue::Until(sampler.next_whole(elapsed, frame_end(elapsed, duration), &pace))
            };
            Place {
                moment,
                duration,
                cue,
            }
        });
        Turn {
            moment,
            place,
            due,
            stamp: FrameStamp {
                timestamp: pts,
                stream_time: segment.to_stream_time(pts),
                running_time: segment.to_running_time(pts),
                duration: buffer.duration(),
                first_timestamp: pts,
                frames: 1,
                frame: self.stats.frames.add_one(),
                trigger: Trigger::Interval,
                request_id: 0,
            },
        }
    }

    /// Takes a frame for all who want it. A clip that is whole and a request go to the worker; if
    /// recorded, the frame stays until they are described.
    fn describe(
        &self,
        buffer: &gst::BufferRef,
        turn: &Turn,
        loaded: &Loaded,
        live: bool,
    ) -> Result<(), Refused> {
        let narrator = &loaded.narrator;
        narrator.check()?;
        if !live && narrator.checkpoint().is_none() {
            narrator.wait_loaded()?;
        }
        let settings = self.settings.lock().unwrap().clone();
        // Of a model that is still being downloaded; live video doesn't wait for that, nor do its
        // frames: by then they are old. A request does.
        let Some(size) = loaded.picture_size(settings.image_size) else {
            return Ok(());
        };
        // The worker has room for one live frame that was asked about; recorded ones wait in turn.
        let room = match live {
            true => usize::from(narrator.has_room()),
            false => usize::MAX,
        };
        let requests = std::iter::from_fn(|| self.requests.next()).take(room);
        let asks = (turn.due.map(Ask::Turn).into_iter())
            .chain(requests.map(Ask::Request))
            .collect::<Vec<_>>();

        let elapsed = turn.moment.map(|moment| moment.elapsed);
        let sampled_at = Instant::now();
        let mut scaled: [Option<Scaled>; 2] = [None, None];
        for ask in asks {
            let (stamp, mut question) = match &ask {
                Ask::Turn(_) => (turn.stamp, settings.turns_question()),
                Ask::Request(request) => {
                    let stamp = FrameStamp {
                        trigger: Trigger::Request,
                        request_id: request.id,
                        ..turn.stamp
                    };
                    (stamp, settings.question(&request.asking(&settings.detail)))
                }
            };
            question.whole_frames |= size == PictureSize::Whole;
            let size = match question.whole_frames {
                true => PictureSize::Whole,
                false => size,
            };
            let scaled = scaled[usize::from(size == PictureSize::Whole)].get_or_insert_with(|| {
                let start = Instant::now();
                let picture = self.stream.lock().picture(buffer, size, narrator.spare());
                Scaled {
                    picture: picture.map(Arc::new),
                    scaling: start.elapsed(),
                }
            });
            let scaling = scaled.scaling;
            let picture = match &scaled.picture {
                Ok(picture) => picture.clone(),
                Err(error) => {
                    self.not_described(&stamp, error);
                    continue;
                }
            };
            let job = |pictures, clip, stamp| Job {
                pictures,
                clip,
                stamp,
                question,
                sampled_at,
                scaling,
            };
            match ask {
                Ask::Turn(due) => {
                    let shot = Shot {
                        picture,
                        stamp,
                        position: stamp.timestamp.or(turn.moment.map(|m| m.position)),
                        elapsed,
                        slot: due.slot,
                    };
                    let Some(taken) = self.stream.take(shot, due, &settings.pace) else {
                        continue;
                    };
                    let clip = (settings.pace.frames > 1).then_some(taken.clip);
                    let job = job(taken.pictures, clip, taken.stamp);
                    if !self.submit(job, elapsed, &settings, narrator)? {
                        continue;
                    }
                }
                Ask::Request(_) => {
                    self.stats.sampled.add_one();
                    narrator.ask(job(vec![picture], None, stamp))?;
                }
            }
            if !live && let Wait::Refused(refused) = narrator.wait_idle(None) {
                return Err(refused);
            }
        }
        Ok(())
    }

    /// Hands the worker what is worth describing. Says whether it was.
    fn submit(
        &self,
        mut job: Job,
        elapsed: Option<ClockTime>,
        settings: &Settings,
        narrator: &Narrator,
    ) -> Result<bool, Refused> {
        let threshold = settings.pace.scene_threshold;
        match self.judge(&job.pictures, elapsed, &job.question, threshold) {
            Some(trigger) => job.stamp.trigger = trigger,
            None => {
                self.stats.unchanged.add_one();
                // What was said is still true: its time starts anew.
                self.stream.lock().shown = None;
                return Ok(false);
            }
        }
        self.stats.sampled.add_one();
        if narrator.submit(job)? {
            self.stats.dropped.add_one();
        }
        Ok(true)
    }

    fn judge(
        &self,
        pictures: &[Arc<Picture>],
        elapsed: Option<ClockTime>,
        question: &Question,
        threshold: f64,
    ) -> Option<Trigger> {
        let mut stream = self.stream.lock();
        if self.stream.scene_forgotten.swap(false, Ordering::Relaxed) {
            stream.scene.forget();
        }
        stream.scene.judge(pictures, elapsed, question, threshold)
    }

    /// What comes next has nothing to do with what came: recorded, what came is described to its end.
    pub(crate) fn finish_recorded(&self) {
        if self.stream.is_recorded() {
            self.drain();
            let interval = self.settings.lock().unwrap().pace.interval;
            self.text.finish(self.current().as_ref(), interval);
        }
    }

    /// Waits for captions under way, at most `drain-timeout`, before an event that ends the
    /// stream goes on. A recorded clip that has begun is described as far as it has come.
    pub(crate) fn drain(&self) {
        let settings = self.settings.lock().unwrap().clone();
        let timeout = settings.drain_timeout;
        let Some(loaded) = self.loaded().filter(|_| !timeout.is_zero()) else {
            return;
        };
        // What live video loses is lost.
        let rest = self.stream.take_rest(settings.pace.interval);
        if let Some(taken) = rest.filter(|_| self.stream.is_recorded()) {
            let job = Job {
                pictures: taken.pictures,
                clip: Some(taken.clip),
                stamp: taken.stamp,
                question: settings.turns_question(),
                sampled_at: Instant::now(),
                scaling: Duration::ZERO,
            };
            // Refused, it is flushed or has failed, and that was said.
            let _ = self.submit(job, None, &settings, &loaded.narrator);
        }
        if loaded.narrator.wait_idle(Some(timeout.into())) == Wait::TimedOut {
            gst::warning!(
                CAT,
                imp = self,
                "A caption took longer than drain-timeout {timeout}"
            );
        }
    }
}

/// `None` where the frame rate is variable, 0/1.
fn frame_period(info: &gst_video::VideoInfo) -> Option<ClockTime> {
    let rate = info.fps();
    let frames = u64::try_from(rate.numer()).ok().filter(|n| *n > 0)?;
    ClockTime::SECOND.mul_div_floor(u64::try_from(rate.denom()).ok()?, frames)
}

/// Frames that the segment leaves out are shown to nobody and described to nobody.
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

/// Whatever its flags say: those who repeat a frame flag it as a gap, with the whole picture in it.
fn has_picture(buffer: &gst::BufferRef) -> bool {
    buffer.size() > 0
}
