//! The video as browsers play it: the input itself, or an MP4 that FFmpeg makes of it.

use std::{
    fs::File,
    io::Read,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use gst::ClockTime;

use crate::{
    ffmpeg::{self, Writing},
    input::Input,
    probe::{self, Probe, Stream},
};

/// A kind of file that browsers play.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    Mp4,
    WebM,
}

impl Container {
    /// The MIME type.
    pub fn mime(self) -> &'static str {
        match self {
            Self::Mp4 => "video/mp4",
            Self::WebM => "video/webm",
        }
    }

    /// The name of the file in a folder that is written.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Mp4 => "video.mp4",
            Self::WebM => "video.webm",
        }
    }
}

/// How browsers get to play the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// As it is.
    AsIs(Container),
    /// As an MP4 with the streams of these numbers.
    Convert {
        video: u32,
        /// Whether the video is encoded anew, which takes time.
        encodes: bool,
        audio: Option<u32>,
        copies_audio: bool,
    },
}

impl Way {
    /// Decides by what FFmpeg found in the input.
    ///
    /// # Errors
    ///
    /// FFmpeg is not installed.
    pub fn choose(input: &Input) -> Result<Self> {
        let probe = input
            .probe
            .as_ref()
            .context("ffprobe is not installed; install the package ffmpeg")?;
        let webm = input.path.as_ref().is_some_and(|path| is_webm(path));
        let way = Self::of(probe, webm).context("there is no video in it")?;
        Ok(match way {
            // Only a file on this machine can be served as it is.
            Self::AsIs(_) if input.path.is_none() => {
                Self::conversion(probe).context("there is no video in it")?
            }
            way => way,
        })
    }

    fn of(probe: &Probe, webm: bool) -> Option<Self> {
        let video = probe.video()?;
        let mut audio = streams(probe, "audio");
        let plain = matches!(video.pix_fmt.as_str(), "yuv420p" | "yuvj420p");
        let (video, pictures) = (video.codec_name.as_str(), probe.streams.iter());
        // A browser plays the first video that it finds.
        let first = pictures.clone().find(|stream| stream.codec_type == "video");
        let plain = plain && first.is_some_and(Stream::is_video);
        let is_mp4 = probe
            .format
            .format_name
            .split(',')
            .any(|name| name == "mp4");
        let can = |kinds: &[&str], stream: &Stream| kinds.contains(&stream.codec_name.as_str());
        if is_mp4
            && plain
            && ["h264", "av1", "vp9"].contains(&video)
            && audio.all(|stream| can(&["aac", "mp3"], stream))
        {
            return Some(Self::AsIs(Container::Mp4));
        }
        if webm
            && plain
            && ["vp8", "vp9", "av1"].contains(&video)
            && streams(probe, "audio").all(|stream| can(&["opus", "vorbis"], stream))
        {
            return Some(Self::AsIs(Container::WebM));
        }
        Self::conversion(probe)
    }

    fn conversion(probe: &Probe) -> Option<Self> {
        let video = probe.video()?;
        let audio = streams(probe, "audio")
            .find(|stream| stream.has("default"))
            .or_else(|| streams(probe, "audio").next());
        // In other containers H.264 may have no times.
        let timed = ["mp4", "matroska", "mpegts", "flv"]
            .iter()
            .any(|name| probe.format.format_name.split(',').any(|own| own == *name));
        let plain = matches!(video.pix_fmt.as_str(), "yuv420p" | "yuvj420p");
        Some(Self::Convert {
            video: video.index,
            encodes: !(timed && plain && video.codec_name == "h264"),
            audio: audio.map(|stream| stream.index),
            copies_audio: timed && audio.is_some_and(|stream| stream.codec_name == "aac"),
        })
    }

    /// The kind of the file that a browser gets.
    pub fn container(self) -> Container {
        match self {
            Self::AsIs(container) => container,
            Self::Convert { .. } => Container::Mp4,
        }
    }
}

fn streams<'a>(probe: &'a Probe, kind: &'a str) -> impl Iterator<Item = &'a Stream> {
    (probe.streams.iter()).filter(move |stream| stream.codec_type == kind)
}

/// Whether the head of the file calls itself WebM: not every browser plays other Matroska.
fn is_webm(path: &Path) -> bool {
    let mut head = Vec::new();
    let read = File::open(path).and_then(|file| file.take(64).read_to_end(&mut head));
    read.is_ok() && head.windows(7).any(|bytes| bytes == b"\x42\x82\x84webm")
}

/// FFmpeg as it makes the MP4.
pub struct Conversion {
    writing: Writing,
    length: Option<ClockTime>,
}

impl Conversion {
    /// Starts to write into the file of that path.
    ///
    /// # Errors
    ///
    /// FFmpeg can't be started.
    pub fn start(input: &Input, way: Way, output: &Path) -> Result<Self> {
        let location = input
            .location
            .as_ref()
            .context("a stream that can be read only once can't be played")?;
        let mut command = Command::new("ffmpeg");
        command
            .args("-v warning -nostdin -y -nostats -progress pipe:1 -stats_period 0.5".split(' '))
            .args(["-fflags", "+genpts"])
            .args(probe::network_options(location))
            .arg("-i")
            .arg(location)
            .args(options(way))
            .arg(ffmpeg::file(output))
            .stdin(Stdio::null());
        let writing = Writing::start(&mut command).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                anyhow!("ffmpeg is not installed; install the package ffmpeg")
            }
            _ => anyhow!("ffmpeg can't be started: {error}"),
        })?;
        Ok(Self {
            writing,
            length: input.probe.as_ref().and_then(Probe::video_end),
        })
    }

    /// How much is done, of 100.
    pub fn percent(&self) -> Option<u64> {
        let length = self.length?.useconds().max(1);
        Some((100 * self.writing.written().useconds() / length).min(99))
    }

    /// Whether the file is whole.
    ///
    /// # Errors
    ///
    /// FFmpeg failed; the text has its last words.
    pub fn poll(&mut self) -> Result<bool> {
        let Some(status) = self.writing.status()? else {
            return Ok(false);
        };
        if self.writing.is_finished(status) {
            return Ok(true);
        }
        let errors = self.writing.errors();
        let last = errors.lines().map(str::trim).rfind(|line| !line.is_empty());
        bail!(
            "{}",
            last.map_or_else(|| format!("ffmpeg ended with {status}"), str::to_owned)
        )
    }

    /// Ends the file with what is there.
    ///
    /// # Errors
    ///
    /// As for [`Self::poll`].
    pub fn stop(&mut self) -> Result<()> {
        self.writing.stop();
        while !self.poll()? {
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// Options of FFmpeg for the output.
fn options(way: Way) -> Vec<String> {
    let Way::Convert {
        video,
        encodes,
        audio,
        copies_audio,
    } = way
    else {
        return ["-map", "0", "-c", "copy"].map(str::to_owned).into();
    };
    let mut options = format!("-map 0:{video} -map_chapters -1 ");
    options.push_str(match encodes {
        // 4:2:0, even sides, square pixels, and a key frame every two seconds so that seeking is quick.
        true => {
            "-c:v libx264 -preset veryfast -crf 20 -pix_fmt yuv420p \
             -vf scale=trunc(iw*sar/2+0.5)*2:trunc(ih/2+0.5)*2,setsar=1 -force_key_frames expr:gte(t,n_forced*2) "
        }
        false => "-c:v copy ",
    });
    if let Some(audio) = audio {
        options.push_str(&format!("-map 0:{audio} "));
        options.push_str(match copies_audio {
            true => "-c:a copy ",
            false => "-c:a aac -b:a 160k -ac 2 ",
        });
    }
    // The index is in front, for servers that know no ranges.
    options.push_str("-max_muxing_queue_size 10000 -movflags +faststart -f mp4");
    options.split_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn way(format: &str, video: (&str, &str), audio: &[&str], webm: bool) -> Way {
        let mut streams = vec![json!({
            "index": 0, "codec_type": "video", "codec_name": video.0, "pix_fmt": video.1,
        })];
        for (index, codec) in audio.iter().enumerate() {
            streams.push(json!({"index": index + 1, "codec_type": "audio", "codec_name": codec}));
        }
        let probe = json!({"streams": streams, "format": {"format_name": format}});
        Way::of(&serde_json::from_value(probe).unwrap(), webm).unwrap()
    }

    const MP4: &str = "mov,mp4,m4a,3gp,3g2,mj2";

    #[test]
    fn what_every_browser_plays_is_left_as_it_is() {
        let h264 = ("h264", "yuv420p");
        for (format, video, audio, webm, container) in [
            (MP4, h264, &["aac"][..], false, Container::Mp4),
            (MP4, h264, &[], false, Container::Mp4),
            (MP4, ("av1", "yuv420p"), &["mp3"], false, Container::Mp4),
            (
                "matroska,webm",
                ("vp9", "yuv420p"),
                &["opus"],
                true,
                Container::WebM,
            ),
        ] {
            assert_eq!(way(format, video, audio, webm), Way::AsIs(container));
        }
    }

    #[test]
    fn what_can_be_copied_is_not_encoded() {
        for (format, video, audio, encodes, copies_audio) in [
            ("matroska,webm", ("h264", "yuv420p"), "aac", false, true),
            (MP4, ("h264", "yuv420p"), "ac3", false, false),
            ("mpegts", ("h264", "yuvj420p"), "aac", false, true),
            ("avi", ("h264", "yuv420p"), "aac", true, false),
            (MP4, ("h264", "yuv420p10le"), "aac", true, true),
            (MP4, ("hevc", "yuv420p"), "aac", true, true),
            ("matroska,webm", ("vp9", "yuv420p"), "opus", true, false),
        ] {
            let expected = Way::Convert {
                video: 0,
                encodes,
                audio: Some(1),
                copies_audio,
            };
            assert_eq!(way(format, video, &[audio], false), expected, "{video:?}");
        }
    }
}
