//! The text pad: captions as timed text beside the video.

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard},
};

use gst::{ClockTime, prelude::*};

use crate::{
    caption::Caption,
    output::playhead::Moment,
    output::{
        encoding::{self, TextCue},
        merged::{Merged, Piece},
        push_watch::PushWatch,
        timeline::{Cue, Timeline, frame_end, late_cue},
    },
    properties::lossy,
};

pub(crate) const NAME: &str = "text_src";

const UTF8: &str = "utf8";
/// For those to whom < and & are markup: WebVTT, where webvttenc writes text as it comes.
const MARKUP: &str = "pango-markup";

/// The text pad's template: plain text unless someone wants markup.
pub(crate) fn caps() -> gst::Caps {
    gst::Caps::builder("text/x-raw")
        .field("format", gst::List::new([UTF8, MARKUP]))
        .build()
}

/// Says what text comes, as the pad's peer wants it. Until then the pad is open to whoever takes either.
fn negotiate(pad: &gst::Pad) {
    let [utf8, markup] = [UTF8, MARKUP].map(|format| {
        let caps = gst::Caps::builder("text/x-raw");
        caps.field("format", format).build()
    });
    let takes = |caps: &gst::Caps| !pad.peer_query_caps(Some(caps)).is_empty();
    let caps = match !takes(&utf8) && takes(&markup) {
        true => markup,
        false => utf8,
    };
    pad.push_event(gst::event::Caps::new(&caps));
}

fn wants_markup(pad: &gst::Pad) -> bool {
    let caps = pad.current_caps();
    let format = caps
        .as_ref()
        .and_then(|caps| caps.structure(0)?.get::<&str>("format").ok());
    format == Some(MARKUP)
}

/// The pad, if somebody requested it, and what it has to tell whoever links to it.
///
/// Everything is pushed from the video's streaming thread, before the frame it belongs to and with
/// no lock held.
#[derive(Debug, Default)]
pub(crate) struct TextPad(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    pad: Option<gst::Pad>,
    stream_start: Option<gst::Event>,
    segment: Option<gst::Event>,
    cues: Cues,
    axis: Axis,
    /// Of this pad and of the video's source pad.
    flows: gst_base::UniqueFlowCombiner,
}

/// Where what has been played is in the stream, whichever way it is played.
///
/// Cues are laid out on what has been played, which only grows: so they neither overlap nor leave holes,
/// backwards or where timestamps jump.
#[derive(Clone, Copy, Debug, Default)]
struct Axis {
    reverse: bool,
    /// When the last frame began, and where in the stream that was: at its end if it is played backwards.
    elapsed: ClockTime,
    position: ClockTime,
}

impl Axis {
    fn set(&mut self, moment: &Moment, duration: Option<ClockTime>) {
        self.elapsed = moment.elapsed;
        self.position = match self.reverse {
            true => frame_end(moment.position, duration),
            false => moment.position,
        };
    }

    fn in_stream(&self, span: Range<ClockTime>) -> Range<ClockTime> {
        match self.reverse {
            true => self.position_at(span.end)..self.position_at(span.start),
            false => self.position_at(span.start)..self.position_at(span.end),
        }
    }

    fn position_at(&self, elapsed: ClockTime) -> ClockTime {
        moved(self.position, self.elapsed, elapsed, self.reverse)
    }

    /// What had been played where a caption's frames begin.
    fn about(&self, caption: &Caption) -> Option<ClockTime> {
        let stamp = &caption.stamp;
        let position = match self.reverse {
            true => frame_end(stamp.timestamp?, stamp.duration),
            false => stamp.first_timestamp?,
        };
        Some(moved(self.elapsed, self.position, position, self.reverse))
    }
}

/// `time` moved by as much as it is from `from` to `to`, or by as much the other way.
fn moved(time: ClockTime, from: ClockTime, to: ClockTime, back: bool) -> ClockTime {
    match (to >= from) != back {
        true => time.saturating_add(to.absdiff(from)),
        false => time.saturating_sub(to.absdiff(from)),
    }
}

/// How captions become cues.
#[derive(Debug)]
enum Cues {
    /// Each is pushed before the frame it starts with.
    Ahead(Timeline),
    /// Each is pushed when it has ended (`merge-captions`).
    Merged(Merged),
}

impl Default for Cues {
    fn default() -> Self {
        Self::Ahead(Timeline::default())
    }
}

impl Cues {
    fn start_over(&mut self) {
        match self {
            Self::Ahead(timeline) => *timeline = Timeline::default(),
            Self::Merged(merged) => *merged = Merged::default(),
        }
    }

    fn frame(&mut self, place: Place, current: Option<Current>, axis: &Axis) -> Vec<Piece> {
        let Place {
            moment,
            duration,
            cue,
        } = place;
        let elapsed = moment.elapsed;
        match self {
            Self::Merged(merged) => {
                let about = |c: &Current| axis.about(&c.caption).unwrap_or(elapsed);
                let current = current.as_ref().map(|c| (&c.caption, c.until, about(c)));
                merged.frame(elapsed, duration, current)
            }
            Self::Ahead(timeline) => {
                let cue = match (cue, &current) {
                    (Cue::Until(end), Some(current)) => Cue::Until(end.min(current.until)),
                    _ => cue,
                };
                let sequence = current.as_ref().map(|c| c.caption.sequence);
                let items = timeline.frame(elapsed, duration, sequence, cue);
                let text = items.text.zip(current);
                let text = text.map(|(span, current)| Piece::Text(span, current.caption));
                items.gap.map(Piece::Gap).into_iter().chain(text).collect()
            }
        }
    }

    /// What is held back ends here.
    fn finish(&mut self) -> Vec<Piece> {
        match self {
            Self::Merged(merged) => Vec::from_iter(merged.finish()),
            Self::Ahead(_) => Vec::new(),
        }
    }

    fn end(&mut self, caption: Option<&Arc<Caption>>, interval: ClockTime) -> Vec<Piece> {
        let length = late_cue(interval);
        match self {
            Self::Merged(merged) => merged.end(caption, length),
            Self::Ahead(timeline) => {
                let span = timeline.end(caption.map(|caption| caption.sequence), length);
                let text = span.zip(caption);
                text.map(|(span, caption)| Piece::Text(span, caption.clone()))
                    .into_iter()
                    .collect()
            }
        }
    }
}

/// One frame's place in the timeline.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) moment: Moment,
    pub(crate) duration: Option<ClockTime>,
    pub(crate) cue: Cue,
}

/// The caption that is current on a frame.
#[derive(Clone, Debug)]
pub(crate) struct Current {
    pub(crate) caption: Arc<Caption>,
    /// What will have been played when it ceases to be, if no other comes.
    pub(crate) until: ClockTime,
}

impl State {
    /// In the time of the stream.
    fn lay_out(&mut self, pieces: impl FnOnce(&mut Cues, &Axis) -> Vec<Piece>) -> Vec<Piece> {
        let axis = self.axis;
        let mut pieces = pieces(&mut self.cues, &axis);
        for piece in &mut pieces {
            let (Piece::Gap(span) | Piece::Text(span, _)) = piece;
            *span = axis.in_stream(span.clone());
        }
        pieces
    }

    fn finish(&mut self) -> Vec<Piece> {
        self.lay_out(|cues, _| cues.finish())
    }
}

impl TextPad {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn pad(&self) -> Option<gst::Pad> {
        self.lock().pad.clone()
    }

    /// Takes an active pad; `false` if there is one already.
    pub(crate) fn add(&self, pad: &gst::Pad, video: &gst::Pad) -> bool {
        let mut state = self.lock();
        if state.pad.is_some() {
            return false;
        }
        state.flows.add_pad(video);
        state.flows.add_pad(pad);
        state.cues.start_over();
        state.pad = Some(pad.clone());
        true
    }

    pub(crate) fn remove(&self, pad: &gst::Pad) {
        let mut state = self.lock();
        if state.pad.take_if(|taken| taken == pad).is_some() {
            state.flows.clear();
        }
    }

    /// Forgets the stream, not the pad.
    pub(crate) fn reset(&self) {
        let mut state = self.lock();
        state.stream_start = None;
        state.segment = None;
        state.cues.start_over();
    }

    /// Whether captions are merged from here on.
    pub(crate) fn set_merge(&self, merge: bool) {
        self.lock().cues = match merge {
            true => Cues::Merged(Merged::default()),
            false => Cues::default(),
        };
    }

    /// A new stream begins: ours is named after the video's and the element, and in the same group.
    pub(crate) fn stream_start(&self, video: &gst::event::StreamStart, element: &str) {
        self.finish_cue();
        let id = format!("{}/text/{element}", stream_id(video));
        let event = gst::event::StreamStart::builder(&id)
            .group_id_if_some(video.group_id())
            .flags(gst::StreamFlags::SPARSE)
            .seqnum(video.seqnum())
            .build();
        let pad = {
            let mut state = self.lock();
            state.stream_start = Some(event.clone());
            state.pad.clone()
        };
        if let Some(pad) = pad {
            pad.push_event(event);
            pad.check_reconfigure();
            negotiate(&pad);
        }
    }

    /// A pad that was requested while the stream runs hears first what the stream is.
    fn introduce(&self, pad: &gst::Pad) {
        let (stream_start, segment) = {
            let state = self.lock();
            (state.stream_start.clone(), state.segment.clone())
        };
        let Some(stream_start) = stream_start else {
            return;
        };
        let is_new = pad.sticky_event::<gst::event::StreamStart>(0).is_none();
        if is_new {
            pad.push_event(stream_start);
        }
        // Linked anew, perhaps to someone who wants other text.
        if pad.check_reconfigure() || is_new {
            negotiate(pad);
        }
        if let Some(segment) = segment.filter(|_| is_new) {
            pad.push_event(segment);
        }
    }

    pub(crate) fn segment(&self, video: &gst::event::Segment) {
        self.finish_cue();
        let segment = video.segment();
        let time = gst::FormattedSegment::<ClockTime>::new();
        let segment = match segment.downcast_ref::<ClockTime>() {
            Some(segment) => segment,
            // Text has no bytes or frames to count.
            None => &time,
        };
        let event = gst::event::Segment::builder(segment)
            .seqnum(video.seqnum())
            .build();
        let pad = {
            let mut state = self.lock();
            state.segment = Some(event.clone());
            state.cues.start_over();
            state.axis.reverse = segment.rate() < 0.0;
            state.pad.clone()
        };
        if let Some(pad) = pad {
            pad.push_event(event);
        }
    }

    /// Passes on an event of the video stream as it is.
    pub(crate) fn forward(&self, event: &gst::Event) {
        match event.type_() {
            gst::EventType::FlushStop => self.lock().cues.start_over(),
            gst::EventType::SegmentDone => self.finish_cue(),
            _ => (),
        }
        if let Some(pad) = self.pad() {
            pad.push_event(event.clone());
        }
    }

    /// Fills the timeline up to a frame that is about to be pushed, with the current caption from
    /// there on.
    pub(crate) fn frame(
        &self,
        place: Place,
        current: Option<Current>,
    ) -> Result<gst::FlowSuccess, gst::FlowError> {
        let current = current.filter(|current| !current.caption.text.is_empty());
        self.push(|state| {
            let mut pieces = Vec::new();
            if place.moment.jumped {
                // It can't end behind the jump.
                pieces = state.finish();
            }
            state.axis.set(&place.moment, place.duration);
            pieces.extend(state.lay_out(|cues, axis| cues.frame(place, current, axis)));
            pieces
        })
    }

    /// The video has a gap.
    pub(crate) fn gap(&self, place: Place) {
        let _ = self.frame(place, None);
    }

    /// What comes next has other times.
    fn finish_cue(&self) {
        let _ = self.push(State::finish);
    }

    /// Whether somebody takes the text.
    pub(crate) fn is_linked(&self) -> bool {
        self.pad().is_some_and(|pad| pad.is_linked())
    }

    /// What comes next is another recording; a caption that came too late for any frame is shown after the
    /// last.
    pub(crate) fn finish(&self, caption: Option<&Arc<Caption>>, interval: ClockTime) {
        let caption = caption.filter(|caption| !caption.text.is_empty());
        let _ = self.push(|state| state.lay_out(|cues, _| cues.end(caption, interval)));
    }

    /// The stream ends; a caption that came too late for any frame is shown after the last.
    pub(crate) fn eos(
        &self,
        event: &gst::Event,
        caption: Option<&Arc<Caption>>,
        interval: ClockTime,
    ) {
        self.finish(caption, interval);
        if let Some(pad) = self.pad() {
            pad.push_event(event.clone());
        }
    }

    fn push(
        &self,
        pieces: impl FnOnce(&mut State) -> Vec<Piece>,
    ) -> Result<gst::FlowSuccess, gst::FlowError> {
        let (pad, pieces) = {
            let mut state = self.lock();
            let Some(pad) = state.pad.clone() else {
                return Ok(gst::FlowSuccess::Ok);
            };
            (pad, pieces(&mut state))
        };
        self.introduce(&pad);
        for piece in pieces {
            match piece {
                Piece::Gap(span) => push_gap(&pad, span),
                Piece::Text(span, caption) => {
                    self.push_text(&pad, &caption, span)?;
                }
            }
        }
        Ok(gst::FlowSuccess::Ok)
    }

    /// What both pads together answer: the video goes on where the text is not linked or has
    /// ended.
    fn push_text(
        &self,
        pad: &gst::Pad,
        caption: &Caption,
        span: Range<ClockTime>,
    ) -> Result<gst::FlowSuccess, gst::FlowError> {
        let mut cue = TextCue::new(caption, span);
        if wants_markup(pad) {
            cue.text = encoding::markup(&cue.text);
        }
        let mut buffer = gst::Buffer::from(cue);
        // It says who made it, too; without it the text is still the text.
        let _ = encoding::attach(caption, buffer.make_mut());
        let flow = {
            let _watch = PushWatch::new(pad);
            pad.push(buffer)
        };
        let mut state = self.lock();
        if state.pad.as_ref() != Some(pad) {
            // Released meanwhile: what it said is of no interest.
            return Ok(gst::FlowSuccess::Ok);
        }
        state.flows.update_pad_flow(pad, flow)
    }
}

fn push_gap(pad: &gst::Pad, span: Range<ClockTime>) {
    let gap = gst::event::Gap::builder(span.start)
        .duration(span.end.saturating_sub(span.start))
        .build();
    pad.push_event(gap);
}

/// Whatever bytes it is made of.
fn stream_id(event: &gst::event::StreamStart) -> String {
    let id = event.structure().and_then(|s| s.value("stream-id").ok());
    id.map_or_else(String::new, |id| lossy(id))
}
