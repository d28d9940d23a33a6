//! What is in a file, as `ffprobe` tells it.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    io::Read,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use gst::ClockTime;
use serde::Deserialize;

use crate::processes::Bound;

/// Streams, chapters and times of a file.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Probe {
    /// In the order of the file.
    #[serde(default)]
    pub streams: Vec<Stream>,
    #[serde(default)]
    pub chapters: Vec<serde_json::Value>,
    #[serde(default)]
    pub format: Format,
}

/// One stream of a file.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Stream {
    pub index: u32,
    #[serde(default)]
    pub codec_type: String,
    /// Empty for a codec that FFmpeg does not know.
    #[serde(default)]
    pub codec_name: String,
    #[serde(default)]
    pub codec_tag_string: String,
    #[serde(default)]
    pub pix_fmt: String,
    /// Seconds.
    pub start_time: Option<String>,
    /// Seconds.
    pub duration: Option<String>,
    #[serde(default)]
    pub avg_frame_rate: String,
    /// Number of frames that may be decoded before one that is shown earlier.
    #[serde(default)]
    pub has_b_frames: u32,
    #[serde(default)]
    pub disposition: BTreeMap<String, u8>,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    #[serde(default)]
    pub side_data_list: Vec<SideData>,
}

/// Something about a stream that is not in its packets.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct SideData {
    #[serde(default)]
    pub side_data_type: String,
}

/// The file as a whole.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Format {
    #[serde(default)]
    pub format_name: String,
    pub start_time: Option<String>,
    pub duration: Option<String>,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
}

impl Stream {
    /// Whether it is moving video, and no cover picture.
    pub fn is_video(&self) -> bool {
        self.codec_type == "video" && !self.is_picture()
    }

    /// Whether it is a cover picture.
    pub fn is_picture(&self) -> bool {
        self.has("attached_pic")
    }

    /// Whether a disposition such as `default` is set.
    pub fn has(&self, disposition: &str) -> bool {
        self.disposition.get(disposition) == Some(&1)
    }

    /// Time from one frame to the next, on average.
    pub fn frame_time(&self) -> Option<ClockTime> {
        let (frames, seconds) = self.avg_frame_rate.split_once('/')?;
        let (frames, seconds): (f64, f64) = (frames.parse().ok()?, seconds.parse().ok()?);
        (frames > 0.0).then(|| ClockTime::try_from_seconds_f64(seconds / frames).ok())?
    }

    /// Bits per second of the version that the stream belongs to.
    fn variant(&self) -> Option<u64> {
        self.tags.get("variant_bitrate")?.parse().ok()
    }

    /// The stream in words: `audio stream 2 (pcm_s16le, fra)`.
    pub fn named(&self) -> String {
        let name = match (self.codec_name.as_str(), self.codec_tag_string.as_str()) {
            ("", tag) if tag.starts_with('[') => self.tags.get("filename").map(String::as_str),
            ("", tag) => Some(tag),
            (name, _) => Some(name),
        };
        let language = self.tags.get("language").map(String::as_str);
        let details: Vec<_> = (name.into_iter())
            .chain(language.filter(|&language| language != "und"))
            .collect();
        let kind = match self.codec_type.as_str() {
            "" => "unknown",
            kind => kind,
        };
        match details.is_empty() {
            true => format!("{kind} stream {}", self.index),
            false => format!("{kind} stream {} ({})", self.index, details.join(", ")),
        }
    }
}

fn seconds(text: Option<&String>) -> Option<f64> {
    text?.parse().ok()
}

impl Probe {
    /// The video that is described: the first, or the best of those that a server offers.
    pub fn video(&self) -> Option<&Stream> {
        let mut videos = self.streams.iter().filter(|stream| stream.is_video());
        match self.is_adaptive() {
            // Of equals the first.
            true => videos.rev().max_by_key(|video| video.variant()),
            false => videos.next(),
        }
    }

    /// Whether there are several versions of the same, of which a player shows one.
    fn is_adaptive(&self) -> bool {
        matches!(self.format.format_name.as_str(), "hls" | "dash")
    }

    /// The streams that belong to the video: all, or those of one version.
    pub fn streams_with(&self, video: &Stream) -> Vec<&Stream> {
        let adaptive = self.is_adaptive();
        let shares =
            |stream: &&Stream| stream.variant() == video.variant() && stream.codec_type != "video";
        let any_shared = self.streams.iter().any(|stream| shares(&stream));
        let is_kept = |stream: &&Stream| {
            !adaptive
                || stream.index == video.index
                || shares(stream)
                || (!any_shared && stream.codec_type != "video")
        };
        self.streams.iter().filter(is_kept).collect()
    }

    /// Whether the video is to be turned when it is shown.
    pub fn is_turned(&self) -> bool {
        let kind = |data: &SideData| data.side_data_type == "Display Matrix";
        self.video()
            .is_some_and(|video| video.side_data_list.iter().any(kind))
    }

    /// Time from the start of the file to the start of its video, as players count it.
    pub fn video_offset(&self) -> ClockTime {
        let start = self
            .video()
            .and_then(|video| seconds(video.start_time.as_ref()));
        let offset = start.unwrap_or(0.0) - seconds(self.format.start_time.as_ref()).unwrap_or(0.0);
        ClockTime::try_from_seconds_f64(offset.max(0.0)).unwrap_or(ClockTime::ZERO)
    }

    /// Where the video ends by what the file says, as players count it.
    pub fn video_end(&self) -> Option<ClockTime> {
        let video = self.video()?;
        let start = seconds(self.format.start_time.as_ref()).unwrap_or(0.0);
        let by_length =
            || Some(self.video_offset().seconds_f64() + seconds(video.duration.as_ref())?);
        // Matroska has the end of the stream in a tag, under the name of its duration.
        let by_tag = || {
            let tag = video
                .tags
                .iter()
                .find(|(key, _)| key.eq_ignore_ascii_case("duration"))?;
            let mut parts = tag.1.split(':').map(|part| part.parse::<f64>().ok());
            let end = parts.next()?? * 3600.0 + parts.next()?? * 60.0 + parts.next()??;
            Some(end - start)
        };
        // What the file says of all streams is true of the video if it is alone.
        let by_file = || {
            let alone = self
                .streams
                .iter()
                .all(|stream| stream.codec_type != "audio");
            seconds(self.format.duration.as_ref()).filter(|_| alone)
        };
        let end = by_length().or_else(by_tag).or_else(by_file)?;
        ClockTime::try_from_seconds_f64(end).ok()
    }

    /// Whether FFmpeg must decode it: GStreamer shows a moving picture for ever, and one that does not move not at all,
    /// unless it is a plain PNG or JPEG.
    pub fn needs_decoding(&self) -> bool {
        let video = self.video();
        let codec = video.map_or("", |video| video.codec_name.as_str());
        let is_photo = |brand: &String| matches!(brand.trim(), "avif" | "avis" | "heic" | "mif1");
        let plain = codec == "png"
            || (codec == "mjpeg"
                && video.is_some_and(|video| {
                    video.pix_fmt.starts_with("yuv") || video.pix_fmt.starts_with("gray")
                }));
        matches!(codec, "gif" | "apng")
            || self.format.tags.get("major_brand").is_some_and(is_photo)
            || (self.is_still() && !plain)
    }

    /// Whether it does not tell when its frames are shown: AVI tells when they are decoded, and some are shown later.
    pub fn lacks_display_times(&self) -> bool {
        self.format.format_name == "avi" && self.video().is_some_and(|video| video.has_b_frames > 0)
    }

    /// Whether demuxers make different times of it: its own may jump, or are only those of decoding.
    pub fn has_loose_times(&self) -> bool {
        let name = self.format.format_name.as_str();
        ["mpegts", "mpeg", "mpegvideo", "hls", "flv"].contains(&name)
    }

    /// Whether this is a picture that does not move.
    pub fn is_still(&self) -> bool {
        let name = &self.format.format_name;
        (name == "image2" || name.ends_with("_pipe"))
            && self.video().is_some_and(|video| {
                seconds(video.duration.as_ref()).is_none_or(|duration| duration <= 0.05)
            })
    }
}

/// Asks `ffprobe`; `None` if it is not installed.
///
/// # Errors
///
/// What FFmpeg says of a file that it can't read.
pub fn probe(location: &OsStr) -> Result<Option<Probe>> {
    let mut command = Command::new("ffprobe");
    command
        .args([
            "-v",
            "error",
            "-of",
            "json",
            "-show_format",
            "-show_streams",
            "-show_chapters",
        ])
        .args(network_options(location))
        .arg(location)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = match Bound::spawn(&mut command) {
        Ok(child) => child,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context("ffprobe can't be started"),
    };
    let errors = drain(child.stderr.take().context("ffprobe has no stderr")?);
    let mut found = Vec::new();
    child
        .stdout
        .take()
        .context("ffprobe has no stdout")?
        .read_to_end(&mut found)?;
    let status = child.wait()?;
    let errors = errors.join().unwrap_or_default();
    if !status.success() {
        bail!(
            "{}",
            last_words(&errors, location).unwrap_or_else(|| format!("ffprobe ended with {status}"))
        );
    }
    let probe = serde_json::from_str(&String::from_utf8_lossy(&found))
        .context("ffprobe answers in a way that is not known")?;
    Ok(Some(probe))
}

/// Why FFmpeg can't read a file: the last line, and what a demuxer said before it.
fn last_words(errors: &str, location: &OsStr) -> Option<String> {
    let prefix = format!("{}: ", location.to_string_lossy());
    let mut lines = errors
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty());
    let last = lines.next_back()?;
    let last = last.strip_prefix(&prefix).unwrap_or(last);
    // [mov,mp4 @ 0x55d0c8] moov atom not found
    let before = lines
        .next_back()
        .and_then(|line| line.strip_prefix('[')?.split_once("] "));
    let reason = before
        .map(|(_, reason)| format!(" ({reason})"))
        .unwrap_or_default();
    Some(match last {
        "Invalid data found when processing input" => {
            format!(
                "this is no video, or it is damaged or cut short{reason}; try to play it, or copy it anew"
            )
        }
        last => format!("{last}{reason}; {}", remedy(last)),
    })
}

/// What to do about an input that can't be read.
pub fn remedy(reason: &str) -> &'static str {
    let reason = reason.to_lowercase();
    let has = |words: &[&str]| words.iter().any(|word| reason.contains(word));
    if has(&["401", "403", "authorization"]) {
        "the server wants a login: write it as http://user:password@host/…"
    } else if has(&[
        "404",
        "4xx",
        "protocol not found",
        "name or service",
        "resolve",
    ]) {
        "check the address"
    } else if has(&["5xx", "timed out", "refused", "unreachable", "reset"]) {
        "check that the server runs, and try again"
    } else if has(&["certificate", "tls"]) {
        "the server's certificate is not trusted: install its authority's, or download the file by other means"
    } else if has(&["enough data"]) {
        "nothing came: look at the program in front of the pipe"
    } else if has(&["permission denied"]) {
        "change the file's permissions"
    } else {
        "try to play it with another program, or copy it anew"
    }
}

/// Reads a pipe to its end on a thread of its own, so that its writer is never held up.
pub fn drain(mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// What keeps FFmpeg from waiting for a silent server for ever.
pub fn network_options(location: &OsStr) -> Vec<OsString> {
    let location = location.to_string_lossy();
    if location.starts_with("http://") || location.starts_with("https://") {
        let mut options = vec!["-rw_timeout", "30000000"];
        if location.starts_with("https://") {
            options.extend(["-tls_verify", "1"]);
        }
        options.into_iter().map(OsString::from).collect()
    } else {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(json: &str) -> Probe {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn the_end_of_the_video_is_told_in_three_ways() {
        let mp4 = r#"{"streams": [{"index": 0, "codec_type": "video", "start_time": "1.5", "duration": "3.0"}, {"index": 1, "codec_type": "audio"}], "format": {"start_time": "0.5", "duration": "9"}}"#;
        assert_eq!(probe(mp4).video_end(), Some(ClockTime::from_seconds(4)));
        let mkv = r#"{"streams": [{"index": 0, "codec_type": "video", "start_time": "1.5", "tags": {"DURATION": "00:00:04.500000000"}}, {"index": 1, "codec_type": "audio"}], "format": {"start_time": "0.5", "duration": "9"}}"#;
        assert_eq!(probe(mkv).video_end(), Some(ClockTime::from_seconds(4)));
        let alone =
            r#"{"streams": [{"index": 0, "codec_type": "video"}], "format": {"duration": "9"}}"#;
        assert_eq!(probe(alone).video_end(), Some(ClockTime::from_seconds(9)));
        let nothing = r#"{"streams": [{"index": 0, "codec_type": "video"}, {"index": 1, "codec_type": "audio"}], "format": {"duration": "9"}}"#;
        assert_eq!(probe(nothing).video_end(), None);
    }

    #[test]
    fn reasons_come_with_remedies() {
        let words = |errors: &str| last_words(errors, OsStr::new("file:/a")).unwrap();
        assert_eq!(
            words(
                "[mov,mp4 @ 0x5] moov atom not found\nfile:/a: Invalid data found when processing input\n"
            ),
            "this is no video, or it is damaged or cut short (moov atom not found); try to play it, or copy it anew"
        );
        assert_eq!(
            words("file:/a: Permission denied"),
            "Permission denied; change the file's permissions"
        );
        assert!(words("file:/a: Server returned 404 Not Found").ends_with("; check the address"));
    }
}
