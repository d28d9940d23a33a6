//! The text pad: captions as timed text beside the video.

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard},
};

use gst::{ClockTime, prelude::*};

use crate::{
    caption::Caption,
    output::{
        cue_merger::{CueMerger, TextItem},
        encoding::{self, TextCue},
        playback_clock::FrameTime,
        push_watch::PushWatch,
        timeline::{CueLength, Timeline, final_cue_length, frame_end},
    },
    properties::lossy,
};

pub(crate) const NAME: &str = "text_src";

const UTF8: &str = "utf8";
/// For encoders that write text unescaped into a format with markup, as webvttenc does.
const MARKUP: &str = "pango-markup";

/// Caps of the pad template: plain text, unless downstream wants markup.
pub(crate) fn caps() -> gst::Caps {
    gst::Caps::builder("text/x-raw")
        .field("format", gst::List::new([UTF8, MARKUP]))
        .build()
}

/// Sets the caps that the pad's peer takes.
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

/// The request pad for text, and the sticky events of its stream.
///
/// Everything is pushed from the video's streaming thread, before the frame that it belongs to and with no lock held.
#[derive(Debug, Default)]
pub(crate) struct TextPad(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    pad: Option<gst::Pad>,
    stream_start: Option<gst::Event>,
    segment: Option<gst::Event>,
    cues: CueLayout,
    time_map: TimeMap,
    /// Combines the flows of this pad and of the video's source pad.
    flows: gst_base::UniqueFlowCombiner,
}

/// Maps playback time to positions in the stream, in either direction of playback.
///
/// Cues are laid out in playback time, which only grows, so that they neither overlap nor leave holes when a stream is
/// played backwards or its timestamps jump.
#[derive(Clone, Copy, Debug, Default)]
struct TimeMap {
    reverse: bool,
    /// Playback time at which the last frame began.
    elapsed: ClockTime,
    /// Position of that time in the stream: the end of the frame when played backwards.
    position: ClockTime,
}

impl TimeMap {
    fn set(&mut self, time: &FrameTime, duration: Option<ClockTime>) {
        self.elapsed = time.elapsed;
        self.position = match self.reverse {
            true => frame_end(time.position, duration),
            false => time.position,
        };
    }

    fn stream_span(&self, span: Range<ClockTime>) -> Range<ClockTime> {
        match self.reverse {
            true => self.position_at(span.end)..self.position_at(span.start),
            false => self.position_at(span.start)..self.position_at(span.end),
        }
    }

    fn position_at(&self, elapsed: ClockTime) -> ClockTime {
        shift(self.position, self.elapsed, elapsed, self.reverse)
    }

    /// Playback time at which the frames of a caption begin.
    fn caption_start(&self, caption: &Caption) -> Option<ClockTime> {
        let stamp = &caption.stamp;
        let position = match self.reverse {
            true => frame_end(stamp.timestamp?, stamp.duration),
            false => stamp.first_timestamp?,
        };
        Some(shift(self.elapsed, self.position, position, self.reverse))
    }
}

/// `time` plus the distance from `from` to `to`, or minus it if `back`.
fn shift(time: ClockTime, from: ClockTime, to: ClockTime, back: bool) -> ClockTime {
    match (to >= from) != back {
        true => time.saturating_add(to.absdiff(from)),
        false => time.saturating_sub(to.absdiff(from)),
    }
}

/// Layout of captions as cues.
#[derive(Debug)]
enum CueLayout {
    /// Each cue is pushed before the frame that it starts with.
    Immediate(Timeline),
    /// Each cue is pushed when it has ended (`merge-captions`).
    Merged(CueMerger),
}

impl Default for CueLayout {
    fn default() -> Self {
        Self::Immediate(Timeline::default())
    }
}

impl CueLayout {
    fn reset(&mut self) {
        match self {
            Self::Immediate(timeline) => *timeline = Timeline::default(),
            Self::Merged(merger) => *merger = CueMerger::default(),
        }
    }

    fn frame(
        &mut self,
        timing: FrameTiming,
        current: Option<CurrentCaption>,
        time_map: &TimeMap,
    ) -> Vec<TextItem> {
        let FrameTiming {
            time,
            duration,
            cue,
        } = timing;
        let elapsed = time.elapsed;
        match self {
            Self::Merged(merger) => {
                let start =
                    |c: &CurrentCaption| time_map.caption_start(&c.caption).unwrap_or(elapsed);
                let current = current
                    .as_ref()
                    .map(|c| (&c.caption, c.expires_at, start(c)));
                merger.frame(elapsed, duration, current)
            }
            Self::Immediate(timeline) => {
                let cue = match (cue, &current) {
                    (CueLength::Until(end), Some(current)) => {
                        CueLength::Until(end.min(current.expires_at))
                    }
                    _ => cue,
                };
                let sequence = current.as_ref().map(|c| c.caption.sequence);
                let items = timeline.frame(elapsed, duration, sequence, cue);
                let cue = items.cue.zip(current);
                let cue = cue.map(|(span, current)| TextItem::Cue(span, current.caption));
                (items.gap.map(TextItem::Gap).into_iter())
                    .chain(cue)
                    .collect()
            }
        }
    }

    /// Ends a cue that is held back.
    fn finish(&mut self) -> Vec<TextItem> {
        match self {
            Self::Merged(merger) => Vec::from_iter(merger.finish()),
            Self::Immediate(_) => Vec::new(),
        }
    }

    /// Ends the stream. A caption that came too late for any frame is shown after the last.
    fn end(&mut self, caption: Option<&Arc<Caption>>, interval: ClockTime) -> Vec<TextItem> {
        let length = final_cue_length(interval);
        match self {
            Self::Merged(merger) => merger.end(caption, length),
            Self::Immediate(timeline) => {
                let span = timeline.end(caption.map(|caption| caption.sequence), length);
                let cue = span.zip(caption);
                cue.map(|(span, caption)| TextItem::Cue(span, caption.clone()))
                    .into_iter()
                    .collect()
            }
        }
    }
}

/// Time of a frame, and length of a cue that starts with it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FrameTiming {
    pub(crate) time: FrameTime,
    pub(crate) duration: Option<ClockTime>,
    pub(crate) cue: CueLength,
}

/// The caption that is current on a frame.
#[derive(Clone, Debug)]
pub(crate) struct CurrentCaption {
    pub(crate) caption: Arc<Caption>,
    /// Playback time at which the caption expires, if no other replaces it.
    pub(crate) expires_at: ClockTime,
}

impl State {
    /// Items of the layout, mapped to positions in the stream.
    fn lay_out(
        &mut self,
        items: impl FnOnce(&mut CueLayout, &TimeMap) -> Vec<TextItem>,
    ) -> Vec<TextItem> {
        let time_map = self.time_map;
        let mut items = items(&mut self.cues, &time_map);
        for item in &mut items {
            let (TextItem::Gap(span) | TextItem::Cue(span, _)) = item;
            *span = time_map.stream_span(span.clone());
        }
        items
    }

    fn finish(&mut self) -> Vec<TextItem> {
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

    /// Takes an active pad. Returns `false` if there is one already.
    pub(crate) fn add(&self, pad: &gst::Pad, video: &gst::Pad) -> bool {
        let mut state = self.lock();
        if state.pad.is_some() {
            return false;
        }
        state.flows.add_pad(video);
        state.flows.add_pad(pad);
        state.cues.reset();
        state.pad = Some(pad.clone());
        true
    }

    /// Releases the pad.
    pub(crate) fn remove(&self, pad: &gst::Pad) {
        let mut state = self.lock();
        if state.pad.take_if(|taken| taken == pad).is_some() {
            state.flows.clear();
        }
    }

    /// Forgets the stream, but not the pad.
    pub(crate) fn reset(&self) {
        let mut state = self.lock();
        state.stream_start = None;
        state.segment = None;
        state.cues.reset();
    }

    /// Sets whether captions are merged from now on.
    pub(crate) fn set_merge(&self, merge: bool) {
        self.lock().cues = match merge {
            true => CueLayout::Merged(CueMerger::default()),
            false => CueLayout::default(),
        };
    }

    /// Begins a stream, in the video's group and with an id made of the video's and the element's name.
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

    /// Pushes sticky events on a pad that was requested or linked while the stream runs.
    fn push_sticky_events(&self, pad: &gst::Pad) {
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
        // Perhaps linked to a peer that wants other caps.
        if pad.check_reconfigure() || is_new {
            negotiate(pad);
        }
        if let Some(segment) = segment.filter(|_| is_new) {
            pad.push_event(segment);
        }
    }

    /// Begins a segment.
    pub(crate) fn segment(&self, video: &gst::event::Segment) {
        self.finish_cue();
        let segment = video.segment();
        let time = gst::FormattedSegment::<ClockTime>::new();
        let segment = match segment.downcast_ref::<ClockTime>() {
            Some(segment) => segment,
            // Text can't follow a segment in bytes or frames.
            None => &time,
        };
        let event = gst::event::Segment::builder(segment)
            .seqnum(video.seqnum())
            .build();
        let pad = {
            let mut state = self.lock();
            state.segment = Some(event.clone());
            state.cues.reset();
            state.time_map.reverse = segment.rate() < 0.0;
            state.pad.clone()
        };
        if let Some(pad) = pad {
            pad.push_event(event);
        }
    }

    /// Forwards an event of the video stream.
    pub(crate) fn forward(&self, event: &gst::Event) {
        match event.type_() {
            gst::EventType::FlushStop => self.lock().cues.reset(),
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
        timing: FrameTiming,
        current: Option<CurrentCaption>,
    ) -> Result<gst::FlowSuccess, gst::FlowError> {
        let current = current.filter(|current| !current.caption.text.is_empty());
        self.push(|state| {
            let mut items = Vec::new();
            if timing.time.jumped {
                // A cue must not extend over the jump.
                items = state.finish();
            }
            state.time_map.set(&timing.time, timing.duration);
            items.extend(state.lay_out(|cues, time_map| cues.frame(timing, current, time_map)));
            items
        })
    }

    /// Fills the timeline with a gap of the video.
    pub(crate) fn gap(&self, timing: FrameTiming) {
        let _ = self.frame(timing, None);
    }

    /// Ends a cue that is held back, before the times change.
    fn finish_cue(&self) {
        let _ = self.push(State::finish);
    }

    /// Whether the pad is linked.
    pub(crate) fn is_linked(&self) -> bool {
        self.pad().is_some_and(|pad| pad.is_linked())
    }

    /// Ends a recording, before another one begins. A caption that came too late for any frame is shown after the last.
    pub(crate) fn finish(&self, caption: Option<&Arc<Caption>>, interval: ClockTime) {
        let caption = caption.filter(|caption| !caption.text.is_empty());
        let _ = self.push(|state| state.lay_out(|cues, _| cues.end(caption, interval)));
    }

    /// Ends the stream. A caption that came too late for any frame is shown after the last.
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
        items: impl FnOnce(&mut State) -> Vec<TextItem>,
    ) -> Result<gst::FlowSuccess, gst::FlowError> {
        let (pad, items) = {
            let mut state = self.lock();
            let Some(pad) = state.pad.clone() else {
                return Ok(gst::FlowSuccess::Ok);
            };
            (pad, items(&mut state))
        };
        self.push_sticky_events(&pad);
        for item in items {
            match item {
                TextItem::Gap(span) => push_gap(&pad, span),
                TextItem::Cue(span, caption) => {
                    self.push_text(&pad, &caption, span)?;
                }
            }
        }
        Ok(gst::FlowSuccess::Ok)
    }

    /// Pushes a cue. Returns the combined flow of both pads: the video goes on if the text is not linked or has ended.
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
        // The text is of use without a meta too.
        let _ = encoding::attach(caption, buffer.make_mut());
        let flow = {
            let _watch = PushWatch::new(pad);
            pad.push(buffer)
        };
        let mut state = self.lock();
        if state.pad.as_ref() != Some(pad) {
            // The pad was released meanwhile, so its flow doesn't count.
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

/// The stream id, which need not be UTF-8.
fn stream_id(event: &gst::event::StreamStart) -> String {
    let id = event.structure().and_then(|s| s.value("stream-id").ok());
    id.map_or_else(String::new, |id| lossy(id))
}
