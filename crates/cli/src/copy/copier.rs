//! FFmpeg, which writes the file.

use std::{
    io::Read,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use gst::ClockTime;

use super::{Added, Plan, muxer};
use crate::{
    ffmpeg::{self, Writing, not_installed},
    input::Input,
    output::Format,
    probe::{self, Probe},
    processes::Bound,
};

/// FFmpeg at work.
pub struct Copier {
    writing: Writing,
    output: PathBuf,
    _plan: Plan,
}

impl Copier {
    /// Starts to copy. What the pipeline makes must be written into the descriptor that is returned.
    ///
    /// # Errors
    ///
    /// FFmpeg can't be started.
    pub fn start(
        input: &Input,
        plan: Plan,
        format: Format,
        added: Added<'_>,
        output: &Path,
    ) -> Result<(Self, OwnedFd)> {
        let location = input.location.as_ref().context("nothing to copy from")?;
        let mut command = Command::new("ffmpeg");
        command
            .args([
                "-v",
                "warning",
                "-y",
                "-nostats",
                "-progress",
                "pipe:1",
                "-stats_period",
                "0.1",
            ])
            .args(["-fflags", plan.flags])
            .args(probe::network_options(location))
            .arg("-i")
            .arg(location);
        if added == Added::Video {
            let offset = input
                .probe
                .as_ref()
                .map(Probe::video_offset)
                .unwrap_or_default();
            command.args([
                "-itsoffset".to_owned(),
                format!("{:.6}", offset.seconds_f64()),
            ]);
            command.args(["-f", "matroska", "-i", "pipe:0"]);
        } else {
            // All about text is in the header: FFmpeg must not wait for the first captions to start.
            command.args([
                "-probesize",
                "32",
                "-analyzeduration",
                "0",
                "-f",
                "matroska",
                "-i",
                "pipe:0",
            ]);
        }
        command
            .args(["-c", "copy", "-map_metadata", "0", "-map_chapters", "0"])
            .args(&plan.options)
            .args([
                "-max_muxing_queue_size",
                "100000",
                "-strict",
                "-2",
                "-f",
                muxer(format),
            ]);
        command.arg(ffmpeg::file(output)).stdin(Stdio::piped());
        let mut writing = Writing::start(&mut command).map_err(not_installed)?;
        let pipe = writing.stdin()?;
        let copier = Self {
            writing,
            output: output.to_owned(),
            _plan: plan,
        };
        Ok((copier, pipe.into()))
    }

    /// Whether FFmpeg has ended, which it must not before the pipe has.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.writing.status(), Ok(None))
    }

    /// Ends the file soon behind `position`; the pipe must be closed.
    pub fn stop_at(&mut self, position: ClockTime) {
        let patience = Instant::now() + Duration::from_millis(700);
        while !self.has_ended() && self.writing.written() < position && Instant::now() < patience {
            thread::sleep(Duration::from_millis(10));
        }
        self.writing.stop();
    }

    /// Waits until the file is written. Returns what FFmpeg said if it could not be.
    ///
    /// # Errors
    ///
    /// FFmpeg failed; the text has its last words.
    pub fn finish(mut self, mut wait: impl FnMut(ClockTime)) -> Result<()> {
        let status = loop {
            if let Some(status) = self.writing.status()? {
                break status;
            }
            wait(self.writing.written());
            thread::sleep(Duration::from_millis(20));
        };
        let errors = self.writing.errors();
        // FFmpeg may end well although the disk was full or the input broke off.
        let failed = FAILURES.iter().any(|text| errors.contains(text));
        if self.writing.is_finished(status) && !failed {
            return has_video(&self.output);
        }
        Err(anyhow!(
            "{}",
            last_words(&errors).unwrap_or_else(|| format!("ffmpeg ended with {status}"))
        ))
    }
}

/// What FFmpeg says of a file that is not whole.
const FAILURES: [&str; 7] = [
    "Error writing trailer",
    "Error closing file",
    "av_interleaved_write_frame",
    "No space left on device",
    "File too large",
    "Input/output error",
    "Error muxing a packet",
];

/// Whether there is a packet of video in a file.
fn has_video(file: &Path) -> Result<()> {
    let mut command = Command::new("ffprobe");
    command
        .args([
            "-v",
            "quiet",
            "-select_streams",
            "v:0",
            "-read_intervals",
            "%+#1",
        ])
        .args(["-show_entries", "packet=size", "-of", "csv=p=0"])
        .arg(ffmpeg::file(file))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = Bound::spawn(&mut command).map_err(not_installed)?;
    let mut packets = String::new();
    child
        .stdout
        .take()
        .context("ffprobe has no stdout")?
        .read_to_string(&mut packets)?;
    let status = child.wait()?;
    if !status.success() || packets.trim().is_empty() {
        return Err(anyhow!(
            "FFmpeg could not copy the video; name an output of text (-o out.vtt)"
        ));
    }
    Ok(())
}

/// The line of FFmpeg's that says most.
fn last_words(errors: &str) -> Option<String> {
    let known = [
        "No space left on device",
        "Permission denied",
        "File too large",
        "Input/output error",
    ];
    if let Some(text) = known.iter().find(|text| errors.contains(**text)) {
        return Some(format!(
            "{text}; make room there, or name an output elsewhere with -o"
        ));
    }
    let vague = [
        "Error initializing output stream",
        "Conversion failed",
        "Could not write header",
    ];
    let lines = || {
        errors
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
    };
    let line = lines()
        .rfind(|line| !vague.iter().any(|text| line.starts_with(text)))
        .or_else(|| lines().next_back())?;
    // [matroska @ 0x55d0c8] Attachment stream 4 has no filename tag.
    let text = match line
        .strip_prefix('[')
        .and_then(|line| line.split_once("] "))
    {
        Some((_, text)) => text,
        None => line,
    };
    Some(text.to_owned())
}
