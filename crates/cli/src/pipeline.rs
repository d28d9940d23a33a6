//! From the input to the narrator and what follows it.

use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, anyhow};
use gst::{ClockTime, glib, prelude::*};

use crate::{input::Input, properties::Properties};

/// Makes a pipeline of a recorded input, the element that narrates it, and `rest`, written as for `gst-launch-1.0`.
///
/// # Errors
///
/// An element is not installed.
pub fn recorded(
    input: &Input,
    element: &str,
    rest: &str,
    properties: &Properties,
) -> Result<gst::Pipeline> {
    // Phones lie on their side and say so. What is seen must be upright for the model.
    let description = format!(
        "uridecodebin name=in in. ! videoconvert name=decoded ! videoflip name=upright video-direction=auto \
         ! {element} name=narrator mode=recorded ! {rest}"
    );
    let pipeline = gst::parse::launch(&description)
        .map_err(|error| {
            anyhow!(
                "{}; install gstreamer1.0-plugins-good, gstreamer1.0-plugins-bad, gstreamer1.0-plugins-ugly and \
                 gstreamer1.0-libav",
                error.message()
            )
        })?
        .downcast::<gst::Pipeline>()
        .map_err(|_| anyhow!("not a pipeline"))?;
    let named = |name| pipeline.by_name(name).with_context(|| format!("no {name}"));
    let source = named("in")?;
    source.set_property("uri", &input.uri);
    only_video(&source, &named("decoded")?);
    let narrator = named("narrator")?;
    if element == "vlmnarrate" {
        narrator.set_property("merge-captions", true);
    }
    properties.apply(&narrator);
    let upright = named("upright")?.static_pad("src").context("no pad")?;
    let offset = input.probe.as_ref().map(|probe| probe.video_offset());
    count_from(&upright, offset.unwrap_or_default());
    Ok(pipeline)
}

/// Keeps sound and subtitles from being decoded, and makes an input without video an error.
pub fn only_video(source: &gst::Element, decoded: &gst::Element) {
    source.connect("autoplug-continue", false, |values| {
        let caps = values.get(2).and_then(|caps| caps.get::<gst::Caps>().ok());
        let name = caps
            .as_ref()
            .and_then(|caps| caps.structure(0))
            .map(|s| s.name().as_str());
        let other = name.is_some_and(|name| {
            ["audio/", "subpicture/", "closedcaption/"]
                .iter()
                .any(|kind| name.starts_with(kind))
        });
        Some((!other).to_value())
    });
    let sink = decoded.static_pad("sink").map(|pad| pad.downgrade());
    source.connect_no_more_pads(move |source| {
        let linked =
            (sink.as_ref().and_then(glib::WeakRef::upgrade)).is_some_and(|pad| pad.is_linked());
        if !linked {
            gst::element_error!(
                source,
                gst::StreamError::WrongType,
                ("there is no video in it")
            );
        }
    });
}

/// Gives the frames one timeline, however many segments the file has: the first frame gets `offset`, its place in the
/// file as players count it, and the others the place behind it that the file gives them.
fn count_from(pad: &gst::Pad, offset: ClockTime) {
    struct Timeline {
        segment: gst::FormattedSegment<ClockTime>,
        /// Whether there is a segment downstream. It stays the only one: another would end the cue before, and describe
        /// the first frame behind it.
        begun: bool,
        /// Timestamp of the first frame, and its place in the file.
        first: Option<(ClockTime, ClockTime)>,
    }
    impl Timeline {
        fn follow(&mut self, segment: &gst::FormattedSegment<ClockTime>) {
            let old = std::mem::replace(&mut self.segment, segment.clone());
            // Matroska's demuxer begins with a segment that starts at the first frame, and corrects it when a stream
            // turns out to start before.
            let corrects = segment.start() < old.start() && segment.time() == old.time();
            if let Some((pts, place)) = &mut self.first
                && corrects
                && let Some(corrected) = segment.to_stream_time(*pts)
            {
                *place = corrected;
            }
        }
    }
    let timeline = Mutex::new(Timeline {
        segment: gst::FormattedSegment::new(),
        begun: false,
        first: None,
    });
    let mask = gst::PadProbeType::BUFFER | gst::PadProbeType::EVENT_DOWNSTREAM;
    pad.add_probe(mask, move |_, info| {
        let mut timeline = timeline.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut info.data {
            // A decoder lets it overtake frames that come before it, and its time is not of this timeline.
            Some(gst::PadProbeData::Event(event)) if event.type_() == gst::EventType::Gap => {
                return gst::PadProbeReturn::Handled;
            }
            Some(gst::PadProbeData::Event(event)) => {
                if let gst::EventView::Segment(segment) = event.view()
                    && let Some(segment) = segment.segment().downcast_ref::<ClockTime>()
                {
                    timeline.follow(segment);
                    if std::mem::replace(&mut timeline.begun, true) {
                        return gst::PadProbeReturn::Handled;
                    }
                    let plain = gst::FormattedSegment::<ClockTime>::new();
                    *event = gst::event::Segment::builder(&plain)
                        .seqnum(event.seqnum())
                        .build();
                }
            }
            Some(gst::PadProbeData::Buffer(buffer)) => {
                let Some(pts) = buffer.pts() else {
                    return gst::PadProbeReturn::Ok;
                };
                // A frame in front of its segment is not shown.
                let Some(place) = timeline.segment.to_stream_time(pts) else {
                    return gst::PadProbeReturn::Drop;
                };
                let (_, first) = *timeline.first.get_or_insert((pts, place));
                let place = place.saturating_sub(first) + offset;
                if place != pts {
                    buffer.make_mut().set_pts(place);
                }
            }
            _ => (),
        }
        gst::PadProbeReturn::Ok
    });
}
