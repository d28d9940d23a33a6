//! Video files: FFmpeg copies the streams, the pipeline adds captions or a video with captions on it.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    time::Instant,
};

use anyhow::{Context, Result, anyhow};
use gst::{ClockTime, prelude::*};

use super::{Ended, Writer};
use crate::{
    copy::{Added, Copier, Plan},
    input::Input,
    output::{Format, Output},
};

/// Encoded video waits for its text for as long as a cue lasts, text for as long as an encoder looks ahead.
const UNLIMITED: &str = "queue max-size-buffers=0 max-size-bytes=0 max-size-time=0";

/// Writes Matroska or MP4.
pub struct CopyWriter {
    output: Output,
    copier: Copier,
    /// Open until the pipeline has ended; then FFmpeg sees the end of what it adds.
    pipe: Option<OwnedFd>,
    launch: String,
}

impl CopyWriter {
    pub fn captions(
        input: &Input,
        output: Output,
        format: Format,
        model: &str,
        notice: impl FnMut(&str),
    ) -> Result<Self> {
        let launch = format!(
            "fakesink narrator.text_src ! {UNLIMITED} ! text/x-raw,format=utf8 ! mux.subtitle_0 \
             matroskamux name=mux streamable=true ! fdsink name=pipe sync=false async=false"
        );
        Self::new(
            input,
            output,
            format,
            Added::Captions(model),
            launch,
            notice,
        )
    }

    pub fn video(
        input: &Input,
        output: Output,
        format: Format,
        notice: impl FnMut(&str),
    ) -> Result<Self> {
        let launch = format!(
            "videoconvert name=encode ! {} ! {UNLIMITED} ! mux.video_0 \
             matroskamux name=mux streamable=true ! fdsink name=pipe sync=false async=false",
            encoder(input)
        );
        Self::new(input, output, format, Added::Video, launch, notice)
    }

    fn new(
        input: &Input,
        output: Output,
        format: Format,
        added: Added<'_>,
        launch: String,
        mut notice: impl FnMut(&str),
    ) -> Result<Self> {
        let plan = Plan::new(input, format, added).with_context(|| input.name.clone())?;
        for line in &plan.notices {
            notice(line);
        }
        let (copier, pipe) = Copier::start(input, plan, format, added, &output.part())?;
        Ok(Self {
            output,
            copier,
            pipe: Some(pipe),
            launch,
        })
    }
}

/// An encoder whose result is hard to tell from the input.
fn encoder(input: &Input) -> String {
    let deep = input
        .probe
        .as_ref()
        .and_then(|probe| probe.video())
        .is_some_and(|video| video.pix_fmt.contains("10") || video.pix_fmt.contains("12"));
    let (format, profile) = match deep {
        true => ("I420_10LE", "high-10"),
        false => ("I420", "high"),
    };
    // x264 can't do odd sizes in 4:2:0, and the size must hold for the whole file.
    format!(
        "videoscale name=size ! capsfilter name=first ! video/x-raw,format={format} \
         ! x264enc pass=qual quantizer=18 speed-preset=medium ! video/x-h264,profile={profile} ! h264parse"
    )
}

impl Writer for CopyWriter {
    fn launch(&self) -> String {
        self.launch.clone()
    }

    fn connect(&mut self, pipeline: &gst::Pipeline) -> Result<()> {
        let pipe = self.pipe.as_ref().context("the pipe is closed")?;
        let sink = pipeline.by_name("pipe").context("no fdsink")?;
        sink.set_property("fd", pipe.as_raw_fd());
        if let (Some(encode), Some(first)) = (pipeline.by_name("encode"), pipeline.by_name("first"))
        {
            hold_size(&encode, first)?;
        }
        Ok(())
    }

    fn check(&mut self) -> Result<()> {
        // FFmpeg must not end before the pipe has; `finish` says why it did.
        match self.copier.has_ended() {
            true => Err(io::Error::from(io::ErrorKind::BrokenPipe).into()),
            false => Ok(()),
        }
    }

    fn finish(
        mut self: Box<Self>,
        ended: &Ended,
        wait: &mut dyn FnMut(ClockTime),
    ) -> Result<Option<String>> {
        let name = self.output.name();
        // A pipe that was closed too early is FFmpeg's failure, and it says why.
        drop(self.pipe.take());
        if ended.early {
            self.copier.stop_at(ended.position);
        }
        let began = Instant::now();
        self.copier
            .finish(|position| {
                if began.elapsed().as_secs_f64() > 0.3 {
                    wait(position);
                }
            })
            .map_err(|error| anyhow!("{name}: {error}"))?;
        self.output.finish(ended.failed)
    }
}

/// Scales everything to the size of the first picture: a file has one.
fn hold_size(encode: &gst::Element, first: gst::Element) -> Result<()> {
    let pad = encode.static_pad("sink").context("no pad")?;
    // Caps that come before the first frame may be those of a picture that is not turned yet.
    pad.add_probe(gst::PadProbeType::BUFFER, move |pad, _| {
        let caps = pad.current_caps();
        if let Some(video) = caps.and_then(|caps| gst_video::VideoInfo::from_caps(&caps).ok()) {
            let even = |side: u32| ((side + 1) & !1).cast_signed();
            let caps = gst::Caps::builder("video/x-raw")
                .field("width", even(video.width()))
                .field("height", even(video.height()))
                .field("pixel-aspect-ratio", video.par())
                .build();
            first.set_property("caps", caps);
        }
        gst::PadProbeReturn::Remove
    });
    Ok(())
}
