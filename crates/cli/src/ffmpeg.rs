//! FFmpeg: short runs that answer a question, and long ones that write a file.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
    process::{ChildStdin, Command, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result, anyhow};
use gst::ClockTime;
use rustix::process::Signal;

use crate::{
    probe,
    processes::{Bound, own_descriptor},
};

/// A file as FFmpeg takes it, whatever is in its name.
pub fn file(path: &Path) -> OsString {
    let mut location = OsString::from("file:");
    location.push(path);
    location
}

/// Runs FFmpeg on an input with these options, and tells whether it ended well. It is silent.
fn succeeds(
    location: &OsStr,
    options: impl IntoIterator<Item = impl Into<OsString>>,
) -> Result<bool> {
    let mut command = Command::new("ffmpeg");
    command
        .args(["-v", "quiet", "-nostdin", "-y"])
        .args(probe::network_options(location))
        .arg("-i")
        .arg(location)
        .args(options.into_iter().map(Into::into))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = Bound::spawn(&mut command).map_err(not_installed)?;
    Ok(child.wait()?.success())
}

/// `-map` for each of these streams.
fn maps(streams: &[u32]) -> impl Iterator<Item = String> {
    streams
        .iter()
        .flat_map(|stream| ["-map".to_owned(), format!("0:{stream}")])
}

fn words(text: &str) -> impl Iterator<Item = String> {
    text.split(' ').map(str::to_owned)
}

/// Whether a muxer takes these streams.
pub fn holds(location: &OsStr, muxer: &str, streams: &[u32]) -> Result<bool> {
    let rest = format!("-c copy -t 0 -strict -2 -f {} /dev/null", muxer);
    succeeds(location, maps(streams).chain(words(&rest)))
}

/// Whether the video can be decoded out of what a muxer writes: it may take what it does not keep all of.
pub fn can_be_read(location: &OsStr, muxer: &str, video: u32) -> Result<bool> {
    let file = tempfile::tempfile()?;
    let path = own_descriptor(&file);
    let rest = format!(
        "-c copy -frames:v 5 -strict -2 -f {} {}",
        muxer,
        path.display()
    );
    Ok(succeeds(location, maps(&[video]).chain(words(&rest)))?
        && succeeds(path.as_os_str(), words("-xerror -frames:v 1 -f null -"))?)
}

/// Whether packets of sound are damaged so that a copy would end there: a transport stream's AAC is unpacked on the way.
/// Reads the file once, as fast as the disk is.
pub fn is_damaged(location: &OsStr, sound: &[u32]) -> Result<bool> {
    if sound.is_empty() {
        return Ok(false);
    }
    let rest = words("-c copy -f matroska /dev/null");
    Ok(!succeeds(location, maps(sound).chain(rest))?)
}

/// Writes a cover picture into a file.
pub fn extract(location: &OsStr, picture: u32, path: &Path) -> Result<bool> {
    let rest = words("-c copy -frames:v 1 -f image2pipe").map(OsString::from);
    let maps = maps(&[picture]).map(OsString::from).collect::<Vec<_>>();
    succeeds(location, maps.into_iter().chain(rest).chain([path.into()]))
}

/// Decodes all frames into a file without a name, of which nothing is left whatever happens.
pub fn decode(location: &OsStr) -> Result<Option<File>> {
    let file = tempfile::tempfile()?;
    let rest = format!(
        "-map 0:v:0 -c:v ffv1 -f matroska {}",
        own_descriptor(&file).display()
    );
    Ok(succeeds(location, words(&rest))?.then_some(file))
}

/// FFmpeg as it writes a file, started with `-progress pipe:1`.
pub struct Writing {
    child: Bound,
    /// Microseconds written.
    written: Arc<AtomicU64>,
    errors: Option<JoinHandle<String>>,
    is_stopped: bool,
}

impl Writing {
    /// Starts FFmpeg.
    ///
    /// # Errors
    ///
    /// What the system says of a program that can't be started.
    pub fn start(command: &mut Command) -> Result<Self, std::io::Error> {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = Bound::spawn(command)?;
        let written = Arc::new(AtomicU64::new(0));
        if let Some(progress) = child.stdout.take() {
            let seen = written.clone();
            thread::spawn(move || {
                for line in BufReader::new(progress).lines().map_while(Result::ok) {
                    let time = line.strip_prefix("out_time_us=");
                    if let Some(time) = time.and_then(|time| time.parse().ok()) {
                        seen.store(time, Ordering::Relaxed);
                    }
                }
            });
        }
        let errors = child.stderr.take().map(probe::drain);
        Ok(Self {
            child,
            written,
            errors,
            is_stopped: false,
        })
    }

    /// The pipe that FFmpeg reads, once.
    ///
    /// # Errors
    ///
    /// FFmpeg was started without one.
    pub fn stdin(&mut self) -> Result<ChildStdin> {
        self.child.stdin.take().context("ffmpeg has no stdin")
    }

    /// Time up to which the file is written.
    pub fn written(&self) -> ClockTime {
        ClockTime::from_useconds(self.written.load(Ordering::Relaxed))
    }

    /// Lets FFmpeg finish the file with what is there.
    pub fn stop(&mut self) {
        self.is_stopped = true;
        self.child.signal(Signal::INT);
    }

    /// How FFmpeg ended; `None` while it works.
    ///
    /// # Errors
    ///
    /// The system has no such child.
    pub fn status(&mut self) -> std::io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Whether FFmpeg finished the file, by its status: after SIGINT it does and ends with 255.
    pub fn is_finished(&self, status: ExitStatus) -> bool {
        status.success() || (self.is_stopped && status.code() == Some(255))
    }

    /// What FFmpeg said until its end, once.
    pub fn errors(&mut self) -> String {
        (self.errors.take())
            .and_then(|errors| errors.join().ok())
            .unwrap_or_default()
    }
}

/// The error of a program of FFmpeg that can't be started.
pub fn not_installed(error: std::io::Error) -> anyhow::Error {
    match error.kind() {
        std::io::ErrorKind::NotFound => {
            anyhow!(
                "ffmpeg is not installed; install the package ffmpeg, or name an output such as -o out.vtt"
            )
        }
        _ => anyhow!("ffmpeg can't be started: {error}"),
    }
}

/// Whether FFmpeg writes into Matroska that a video is turned, as it does since 6.1.
pub fn matroska_can_turn() -> bool {
    let Ok(output) = Command::new("ffmpeg")
        .arg("-version")
        .stdin(Stdio::null())
        .output()
    else {
        return true;
    };
    let text = String::from_utf8_lossy(&output.stdout);
    // One that is built from a branch has no number.
    version(&text).is_none_or(|version| version >= (6, 1))
}

/// Major and minor version, of the first line that FFmpeg prints.
fn version(text: &str) -> Option<(u32, u32)> {
    let rest = text.strip_prefix("ffmpeg version ")?;
    let mut numbers = rest
        .split(['.', '-', ' '])
        .map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next().flatten().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::version;

    #[test]
    fn versions_are_read_as_distributions_write_them() {
        assert_eq!(
            version("ffmpeg version 5.1.9-0+deb12u1 Copyright"),
            Some((5, 1))
        );
        assert_eq!(
            version("ffmpeg version 7.1.1-1ubuntu1 Copyright"),
            Some((7, 1))
        );
        assert_eq!(version("ffmpeg version 6.0 Copyright"), Some((6, 0)));
        assert_eq!(version("ffmpeg version N-109542-g3be8e3a Copyright"), None);
    }
}
