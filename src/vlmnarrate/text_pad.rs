//! The text pad: captions as timed text beside the video.

use std::{
    ops::Range,
    sync::{Mutex, MutexGuard},
};

use gst::{ClockTime, prelude::*};

use super::{
    faces::TextCue,
    timeline::{Cue, Timeline},
};
use crate::caption::Caption;

pub(super) const NAME: &str = "text_src";

pub(super) fn caps() -> gst::Caps {
    gst::Caps::builder("text/x-raw")
        .field("format", "utf8")
        .build()
}

/// The pad, if somebody requested it, and what it has to tell whoever links to it.
///
/// Everything is pushed from the video's streaming thread, before the frame it belongs to and with
/// no lock held.
#[derive(Debug, Default)]
pub(super) struct TextPad(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    pad: Option<gst::Pad>,
    stream_start: Option<gst::Event>,
    segment: Option<gst::Event>,
    timeline: Timeline,
    /// Of this pad and of the video's source pad.
    flows: gst_base::UniqueFlowCombiner,
}

/// One frame's place in the timeline.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) position: ClockTime,
    pub(super) duration: Option<ClockTime>,
    pub(super) cue: Cue,
}

impl TextPad {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn pad(&self) -> Option<gst::Pad> {
        self.lock().pad.clone()
    }

    /// Takes an active pad; `false` if there is one already.
    ///
    /// Events that came before are stored as sticky ones: GStreamer sends them ahead of the first
    /// item, from the streaming thread.
    pub(super) fn add(&self, pad: &gst::Pad, video: &gst::Pad) -> bool {
        let mut state = self.lock();
        if state.pad.is_some() {
            return false;
        }
        if let Some(stream_start) = &state.stream_start {
            let _ = pad.store_sticky_event(stream_start);
            let _ = pad.store_sticky_event(&gst::event::Caps::new(&caps()));
        }
        if let Some(segment) = &state.segment {
            let _ = pad.store_sticky_event(segment);
        }
        state.flows.add_pad(video);
        state.flows.add_pad(pad);
        state.timeline = Timeline::default();
        state.pad = Some(pad.clone());
        true
    }

    pub(super) fn remove(&self, pad: &gst::Pad) {
        let mut state = self.lock();
        if state.pad.take_if(|taken| taken == pad).is_some() {
            state.flows.clear();
        }
    }

    /// Forgets the stream, not the pad.
    pub(super) fn reset(&self) {
        let mut state = self.lock();
        state.stream_start = None;
        state.segment = None;
        state.timeline = Timeline::default();
    }

    /// A new stream begins: ours is named after the video's and in the same group.
    pub(super) fn stream_start(&self, video: &gst::event::StreamStart) {
        let event = gst::event::StreamStart::builder(&format!("{}/text", video.stream_id()))
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
            pad.push_event(gst::event::Caps::new(&caps()));
        }
    }

    pub(super) fn segment(&self, video: &gst::event::Segment) {
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
            state.timeline = Timeline::default();
            state.pad.clone()
        };
        if let Some(pad) = pad {
            pad.push_event(event);
        }
    }

    /// Passes on an event of the video stream as it is.
    pub(super) fn forward(&self, event: &gst::Event) {
        if event.type_() == gst::EventType::FlushStop {
            self.lock().timeline = Timeline::default();
        }
        if let Some(pad) = self.pad() {
            pad.push_event(event.clone());
        }
    }

    /// Fills the timeline up to a frame that is about to be pushed, with `caption` from there on.
    pub(super) fn frame(
        &self,
        place: Place,
        caption: Option<&Caption>,
    ) -> Result<gst::FlowSuccess, gst::FlowError> {
        let caption = caption.filter(|caption| !caption.text.is_empty());
        let (pad, items) = {
            let mut state = self.lock();
            let Some(pad) = state.pad.clone() else {
                return Ok(gst::FlowSuccess::Ok);
            };
            let sequence = caption.map(|caption| caption.sequence);
            let items = (state.timeline).frame(place.position, place.duration, sequence, place.cue);
            (pad, items)
        };
        if let Some(gap) = items.gap {
            push_gap(&pad, gap);
        }
        match caption.zip(items.text) {
            Some((caption, span)) => self.push_text(&pad, caption, span),
            None => Ok(gst::FlowSuccess::Ok),
        }
    }

    /// The video has a gap.
    pub(super) fn gap(&self, position: ClockTime, duration: Option<ClockTime>) {
        let cue = Cue::Until(position);
        let _ = self.frame(
            Place {
                position,
                duration,
                cue,
            },
            None,
        );
    }

    /// The stream ends; a caption that came too late for any frame is shown after the last.
    pub(super) fn eos(&self, event: &gst::Event, caption: Option<&Caption>, interval: ClockTime) {
        let caption = caption.filter(|caption| !caption.text.is_empty());
        let (pad, span) = {
            let mut state = self.lock();
            let Some(pad) = state.pad.clone() else {
                return;
            };
            let span = (state.timeline).end(caption.map(|caption| caption.sequence), interval);
            (pad, span)
        };
        if let Some((caption, span)) = caption.zip(span) {
            let _ = self.push_text(&pad, caption, span);
        }
        pad.push_event(event.clone());
    }

    /// What both pads together answer: the video goes on where the text is not linked or has
    /// ended.
    fn push_text(
        &self,
        pad: &gst::Pad,
        caption: &Caption,
        span: Range<ClockTime>,
    ) -> Result<gst::FlowSuccess, gst::FlowError> {
        let flow = pad.push(gst::Buffer::from(TextCue::new(caption, span)));
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
