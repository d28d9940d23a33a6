//! Pictures to describe, none of which was there before.

use anyhow::{Context, Result};
use gst::{ClockTime, prelude::*};

/// The size and format of most videos.
pub const SIZE: (u32, u32) = (1280, 720);
/// The same as caps.
pub const CAPS: &str = "video/x-raw,format=I420,width=1280,height=720,framerate=1/1";

/// Test patterns with much to see.
const PATTERNS: [&str; 6] = [
    "smpte",
    "checkers-8",
    "circular",
    "zone-plate",
    "spokes",
    "pinwheel",
];

/// An endless video of test pictures.
pub struct Frames {
    patterns: Vec<gst::Buffer>,
    pushed: u64,
    cuts: u64,
}

impl Frames {
    /// # Errors
    ///
    /// An element is missing.
    pub fn new() -> Result<Self> {
        let patterns = PATTERNS.into_iter().map(pattern);
        Ok(Self {
            patterns: patterns.collect::<Result<_>>()?,
            pushed: 0,
            cuts: 0,
        })
    }

    /// The next frame: that of before, or after a cut one that was not there yet.
    pub fn next(&mut self, cut: bool) -> gst::Buffer {
        self.cuts += u64::from(cut);
        let pattern = usize::try_from(self.cuts).unwrap_or(0) % self.patterns.len();
        let mut frame = self.patterns[pattern]
            .copy_deep()
            .expect("memory for a frame");
        let buffer = frame.make_mut();
        buffer.set_pts(ClockTime::from_seconds(self.pushed));
        buffer.set_duration(ClockTime::SECOND);
        // The same pattern comes again and again, each time in other colours: nothing remembers it.
        let shift = (37 * self.cuts % 256) as u8;
        for value in buffer.map_writable().expect("a frame of ours").iter_mut() {
            *value = value.wrapping_add(shift);
        }
        self.pushed += 1;
        frame
    }
}

fn pattern(name: &str) -> Result<gst::Buffer> {
    let (width, height) = SIZE;
    let description = format!(
        "videotestsrc num-buffers=1 pattern={name} \
         ! video/x-raw,format=I420,width={width},height={height} ! appsink name=out sync=false"
    );
    let pipeline = gst::parse::launch(&description)
        .context("test pictures need videotestsrc; install gstreamer1.0-plugins-base")?;
    let sink = (pipeline.downcast_ref::<gst::Bin>())
        .and_then(|pipeline| pipeline.by_name("out")?.downcast::<gst_app::AppSink>().ok())
        .context("no sink")?;
    pipeline.set_state(gst::State::Playing)?;
    let frame = sink.pull_sample();
    pipeline.set_state(gst::State::Null)?;
    frame?.buffer_owned().context("no test picture")
}
