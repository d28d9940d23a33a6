//! What becomes of each stream of the input.

use std::ffi::{OsStr, OsString};

use anyhow::{Context, Result, anyhow, bail};
use tempfile::TempPath;

use super::{Added, muxer};
use crate::{
    ffmpeg,
    input::Input,
    output::Format,
    probe::{Probe, Stream},
    processes::Unfinished,
};

/// What becomes of each stream.
pub struct Plan {
    /// FFmpeg's `-fflags` for the input.
    pub(super) flags: &'static str,
    /// Options of FFmpeg between the inputs and the output.
    pub(super) options: Vec<OsString>,
    /// What the container can't hold, to be said before the start.
    pub notices: Vec<String>,
    /// Cover pictures, which Matroska has as attachments.
    _pictures: Vec<(TempPath, Unfinished)>,
}

/// What happens to one stream.
enum Fate {
    Copy,
    /// Text subtitles in the container's own kind.
    Convert(&'static str),
    /// A cover picture becomes an attachment.
    Attach,
    /// FFmpeg makes it anew, from the metadata: chapters, a timecode.
    Implied,
    Leave,
}

impl Plan {
    /// Decides what becomes of each stream of the input.
    ///
    /// # Errors
    ///
    /// The container can't hold the video.
    pub fn new(input: &Input, format: Format, added: Added<'_>) -> Result<Self> {
        let (probe, location) = (input.probe.as_ref(), input.location.as_ref());
        let probe = probe.context("ffprobe is not installed; install the package ffmpeg, or name an output such as -o out.vtt")?;
        let location = location.context("a stream that can be read only once can't be copied")?;
        let video = probe.video().context("there is no video in it")?;
        if added != Added::Video && probe.lacks_display_times() {
            bail!(
                "AVI does not tell when these frames are shown, and a copy would show them in the wrong order; name an \
                 output of text (-o out.vtt), or draw the captions (vlmnarrate burn)"
            );
        }
        let mut kept: Vec<(&Stream, Fate)> = Vec::new();
        let mut notices = Vec::new();
        for stream in probe.streams_with(video) {
            if stream.index == video.index && added == Added::Video {
                continue;
            }
            match fate(stream, format, probe) {
                Fate::Leave => notices.push(left_out(stream, format)),
                Fate::Implied => (),
                Fate::Convert(codec) => {
                    notices.push(format!(
                        "{} can't hold {}: it becomes {codec}, which keeps the text",
                        format.name(),
                        stream.named()
                    ));
                    kept.push((stream, Fate::Convert(codec)));
                }
                fate => kept.push((stream, fate)),
            }
        }
        // Whether the container takes the codecs that are copied, only the muxer knows.
        let copied: Vec<_> = (kept.iter())
            .filter(|(stream, fate)| {
                matches!(fate, Fate::Copy) && stream.codec_type != "attachment"
            })
            .map(|(stream, _)| stream.index)
            .collect();
        if !copied.is_empty() && !ffmpeg::holds(location, muxer(format), &copied)? {
            for index in copied {
                if ffmpeg::holds(location, muxer(format), &[index])? {
                    continue;
                }
                let place = kept.iter().position(|(stream, _)| stream.index == index);
                let (stream, _) = kept.remove(place.context("a stream is gone")?);
                if stream.index == video.index {
                    return Err(cannot_hold(video, format));
                }
                notices.push(left_out(stream, format));
            }
        }
        if added != Added::Video
            && !COMMON.contains(&video.codec_name.as_str())
            && !ffmpeg::can_be_read(location, muxer(format), video.index)?
        {
            return Err(cannot_hold(video, format));
        }
        if format == Format::Mkv
            && probe.is_turned()
            && added != Added::Video
            && !ffmpeg::matroska_can_turn()
        {
            notices.push(
                "this version of FFmpeg can't write into Matroska that the video is turned; MP4 (-o out.mp4) can hold it".to_owned(),
            );
        }
        notices.extend(lost_tags(probe, format));
        // Packets of old files may have no times.
        let mut flags = "+genpts";
        if probe.format.format_name == "mpegts" && input.path.is_some() {
            let sound = kept.iter().filter(|(stream, _)| stream.codec_name == "aac");
            let sound: Vec<_> = sound.map(|(stream, _)| stream.index).collect();
            // Not unasked: a packet in front of a splice may look damaged.
            if ffmpeg::is_damaged(location, &sound)? {
                flags = "+genpts+discardcorrupt";
                notices.push("the stream is damaged; its damaged packets are left out".to_owned());
            }
        }
        let mut plan = Self {
            flags,
            options: Vec::new(),
            notices,
            _pictures: Vec::new(),
        };
        plan.map(location, &kept, added, video)?;
        if let Added::Captions(model) = added {
            plan.describe_captions(&kept, format, model);
        }
        Ok(plan)
    }

    fn option(&mut self, words: impl IntoIterator<Item = impl Into<OsString>>) {
        self.options.extend(words.into_iter().map(Into::into));
    }

    /// The streams in their order, and behind them what is new.
    fn map(
        &mut self,
        location: &OsString,
        kept: &[(&Stream, Fate)],
        added: Added<'_>,
        video: &Stream,
    ) -> Result<()> {
        let mut written = 0;
        if added == Added::Video {
            self.option(["-map", "1:v:0"]);
            written += 1;
        }
        let mut pictures = Vec::new();
        for (stream, fate) in kept {
            if matches!(fate, Fate::Attach) {
                pictures.push(*stream);
                continue;
            }
            self.option(["-map".to_owned(), format!("0:{}", stream.index)]);
            if let Fate::Convert(codec) = fate {
                self.option([format!("-c:{written}"), (*codec).to_owned()]);
            }
            written += 1;
        }
        if added != Added::Video {
            self.option(["-map", "1:0"]);
        } else {
            // Name, language and the like of the video that it replaces.
            for (key, value) in &video.tags {
                let statistic = ["DURATION", "ENCODER", "BPS", "NUMBER_OF_", "ROTATE"]
                    .iter()
                    .any(|name| key.to_uppercase().starts_with(name));
                if !statistic {
                    self.option(["-metadata:s:0".to_owned(), format!("{key}={value}")]);
                }
            }
        }
        let attached = kept
            .iter()
            .filter(|(stream, _)| stream.codec_type == "attachment")
            .count();
        for (number, stream) in pictures.into_iter().enumerate() {
            let picture = extract(location, stream)?;
            let (suffix, kind) = match stream.codec_name.as_str() {
                "png" => ("png", "image/png"),
                "bmp" => ("bmp", "image/bmp"),
                "webp" => ("webp", "image/webp"),
                _ => ("jpg", "image/jpeg"),
            };
            let name = stream
                .tags
                .get("filename")
                .cloned()
                .unwrap_or_else(|| match number {
                    0 => format!("cover.{suffix}"),
                    _ => format!("cover_{number}.{suffix}"),
                });
            self.option([OsString::from("-attach"), picture.0.as_os_str().to_owned()]);
            let place = attached + number;
            self.option([format!("-metadata:s:t:{place}"), format!("mimetype={kind}")]);
            self.option([format!("-metadata:s:t:{place}"), format!("filename={name}")]);
            self._pictures.push(picture);
        }
        Ok(())
    }

    /// Names the model in the track's title.
    fn describe_captions(&mut self, kept: &[(&Stream, Fate)], format: Format, model: &str) {
        let subtitles = kept
            .iter()
            .filter(|(stream, _)| stream.codec_type == "subtitle");
        let others = subtitles.clone().count();
        if format == Format::Mp4 {
            self.option([format!("-c:s:{others}"), "mov_text".into()]);
        }
        let shown = subtitles.clone().any(|(stream, _)| stream.has("default"));
        self.option([
            format!("-metadata:s:s:{others}"),
            format!("title=vlmnarrate: {model}"),
        ]);
        self.option([
            format!("-metadata:s:s:{others}"),
            format!("handler_name=vlmnarrate: {model}"),
        ]);
        self.option([format!("-metadata:s:s:{others}"), "language=eng".into()]);
        // One that is shown by itself stays the only one.
        let disposition = if shown { "0" } else { "default" };
        self.option([format!("-disposition:s:{others}"), disposition.into()]);
    }
}

/// Codecs of video that both containers are known to hold if their muxers take them.
const COMMON: [&str; 14] = [
    "h264",
    "hevc",
    "av1",
    "vp8",
    "vp9",
    "mpeg4",
    "mpeg2video",
    "mpeg1video",
    "mjpeg",
    "theora",
    "prores",
    "dnxhd",
    "ffv1",
    "wmv3",
];

fn cannot_hold(video: &Stream, format: Format) -> anyhow::Error {
    let remedy = match format {
        Format::Mp4 => "name an output that ends in .mkv",
        _ => "name an output of text (-o out.vtt), or draw the captions (vlmnarrate burn)",
    };
    anyhow!(
        "{} can't hold the video ({}); {remedy}",
        format.name(),
        video.codec_name
    )
}

fn fate(stream: &Stream, format: Format, probe: &Probe) -> Fate {
    let codec = stream.codec_name.as_str();
    let text = matches!(
        codec,
        "subrip" | "ass" | "ssa" | "webvtt" | "mov_text" | "text"
    );
    match (stream.codec_type.as_str(), format) {
        ("video", Format::Mkv) if stream.is_picture() => Fate::Attach,
        ("video" | "audio", _) if !codec.is_empty() => Fate::Copy,
        ("subtitle", Format::Mkv) if codec == "mov_text" => Fate::Convert("subrip"),
        ("subtitle", Format::Mkv)
            if text
                || matches!(
                    codec,
                    "hdmv_pgs_subtitle" | "dvd_subtitle" | "dvb_subtitle" | "hdmv_text_subtitle"
                ) =>
        {
            Fate::Copy
        }
        ("subtitle", Format::Mp4) if codec == "mov_text" || codec == "dvd_subtitle" => Fate::Copy,
        ("subtitle", Format::Mp4) if text => Fate::Convert("mov_text"),
        ("attachment", Format::Mkv) => Fate::Copy,
        ("data", _) if codec == "bin_data" && !probe.chapters.is_empty() => Fate::Implied,
        ("data", Format::Mp4) if stream.codec_tag_string == "tmcd" => Fate::Implied,
        _ => Fate::Leave,
    }
}

/// Tags of the file that MP4 has no place for.
fn lost_tags(probe: &Probe, format: Format) -> Option<String> {
    const KNOWN: [&str; 33] = [
        "title",
        "artist",
        "album_artist",
        "composer",
        "album",
        "date",
        "encoder",
        "comment",
        "genre",
        "copyright",
        "grouping",
        "lyrics",
        "description",
        "synopsis",
        "show",
        "episode_id",
        "network",
        "keywords",
        "episode_sort",
        "season_number",
        "media_type",
        "hd_video",
        "gapless_playback",
        "track",
        "disc",
        "compilation",
        "location",
        "creation_time",
        "major_brand",
        "minor_version",
        "compatible_brands",
        "make",
        "model",
    ];
    let lost: Vec<_> = (probe.format.tags.keys())
        .map(String::as_str)
        .filter(|key| !KNOWN.contains(&key.to_lowercase().as_str()))
        .collect();
    (format == Format::Mp4 && !lost.is_empty()).then(|| {
        format!(
            "MP4 can't hold these tags: {}; Matroska (-o out.mkv) can hold them",
            lost.join(", ")
        )
    })
}

fn left_out(stream: &Stream, format: Format) -> String {
    let remedy = if format == Format::Mp4 && stream.codec_type != "data" {
        "; Matroska (-o out.mkv) can hold it"
    } else {
        ""
    };
    format!(
        "{} can't hold {}: it is left out{remedy}",
        format.name(),
        stream.named()
    )
}

/// Writes a cover picture into a file of its own.
fn extract(location: &OsStr, stream: &Stream) -> Result<(TempPath, Unfinished)> {
    let file = tempfile::Builder::new()
        .prefix("vlmnarrate-")
        .suffix(".part")
        .tempfile()?;
    let path = file.into_temp_path();
    let unfinished = Unfinished::new(&path);
    if !ffmpeg::extract(location, stream.index, &path)? {
        bail!("the cover picture can't be read");
    }
    Ok((path, unfinished))
}
