//! Where live video comes from: a camera, a stream, a test picture, or a file played in real time.

use std::{ffi::OsStr, fs, os::unix::fs::FileTypeExt, path::Path};

use anyhow::{Context, Result, anyhow, bail};
use gst::{ClockTime, prelude::*};

use crate::{
    input::{Input, said, shown},
    pipeline::only_video,
};

/// How long a network camera's frames wait for late packets.
const LATENCY: ClockTime = ClockTime::from_mseconds(200);

/// A video that goes on whether anybody keeps up or not.
pub struct Source {
    /// For messages: without a password.
    pub name: String,
    /// Whether it comes in real time by itself; a file is slowed down to it.
    pub is_live: bool,
    kind: Kind,
}

enum Kind {
    /// Makes frames, or a stream that must be decoded.
    Camera(gst::Element),
    Input(Box<Input>),
    Test,
}

impl Source {
    /// Finds the source that the user named: a device, a URL, a file or `test`; `None` is the first camera.
    ///
    /// # Errors
    ///
    /// There is no such source, or it can't be read, or there is no video in it.
    pub fn open(name: Option<&OsStr>) -> Result<Self> {
        let Some(name) = name else {
            return first_camera();
        };
        if name == "test" {
            return Ok(Self {
                name: "test picture".into(),
                is_live: true,
                kind: Kind::Test,
            });
        }
        let is_device = fs::metadata(name).is_ok_and(|data| data.file_type().is_char_device());
        if is_device || Path::new(name).starts_with("/dev") {
            return camera_at(Path::new(name));
        }
        let input = Input::open(name, false)?;
        if input.is_still() {
            bail!(
                "{}: this is a picture; describe it with: vlmnarrate {}",
                input.name,
                input.name
            );
        }
        Ok(Self {
            name: without_password(&input.name),
            is_live: input.is_live(),
            kind: Kind::Input(input.into()),
        })
    }

    /// How long the video is, where that is known.
    pub fn length(&self) -> Option<ClockTime> {
        match &self.kind {
            Kind::Input(input) if !self.is_live => input.probe.as_ref()?.video_end(),
            _ => None,
        }
    }

    /// A pipeline from the source to upright frames in real time, and from there through `rest`, which is written as for
    /// `gst-launch-1.0` and begins with an element that takes raw video.
    ///
    /// # Errors
    ///
    /// An element is missing.
    pub fn pipeline(&self, rest: &str) -> Result<gst::Pipeline> {
        // Cameras in a corner and phones are turned, and say so.
        let upright = "videoconvert name=decoded ! videoflip video-direction=auto";
        let head = match &self.kind {
            Kind::Camera(_) => format!("decodebin name=in ! {upright}"),
            Kind::Input(_) => {
                let pace = if self.is_live {
                    ""
                } else {
                    "! identity sync=true"
                };
                format!("uridecodebin name=in in. ! {upright} {pace}")
            }
            Kind::Test => {
                "videotestsrc name=in is-live=true pattern=ball ! video/x-raw,width=640,height=360,framerate=30/1"
                    .into()
            }
        };
        let pipeline = gst::parse::launch(&format!("{head} ! {rest}"))
            .context(
                "a GStreamer element is missing; install gstreamer1.0-plugins-good and gstreamer1.0-libav",
            )?
            .downcast::<gst::Pipeline>()
            .map_err(|_| anyhow!("not a pipeline"))?;
        let first = pipeline.by_name("in").context("no source")?;
        match &self.kind {
            Kind::Camera(camera) => {
                pipeline.add(camera)?;
                camera.link(&first)?;
            }
            Kind::Input(input) => {
                first.set_property("uri", &input.uri);
                only_video(&first, &pipeline.by_name("decoded").context("no decoder")?);
                first.connect("source-setup", false, |values| {
                    let source = values[1].get::<gst::Element>().ok()?;
                    if source.factory()?.name() == "rtspsrc" {
                        source.set_property("latency", LATENCY.mseconds() as u32);
                    }
                    None
                });
            }
            Kind::Test => (),
        }
        Ok(pipeline)
    }
}

fn first_camera() -> Result<Source> {
    let cameras = cameras();
    // Others may ask for a permission first, and are the same cameras.
    let is_direct = |camera: &&gst::Device| path_of(camera).is_some();
    let camera = cameras.iter().find(is_direct).or_else(|| cameras.first());
    if let Some(camera) = camera {
        let element = camera
            .create_element(None)
            .with_context(|| format!("{}: the camera can't be opened", camera.display_name()))?;
        return Ok(Source {
            name: camera.display_name().into(),
            is_live: true,
            kind: Kind::Camera(element),
        });
    }
    let usual = Path::new("/dev/video0");
    if usual.exists() {
        return camera_at(usual);
    }
    bail!(
        "there is no camera; name a device (/dev/video0), a stream (rtsp://…) or a file, or try a test picture: \
         vlmnarrate live test"
    )
}

fn camera_at(path: &Path) -> Result<Source> {
    let name = shown(path.as_os_str());
    if let Err(error) = fs::OpenOptions::new().read(true).write(true).open(path) {
        let remedy = match error.kind() {
            std::io::ErrorKind::NotFound => format!(
                "{}, or try a test picture: vlmnarrate live test",
                known_cameras()
            ),
            std::io::ErrorKind::PermissionDenied => "add yourself to the group video".into(),
            _ => "try a test picture: vlmnarrate live test".into(),
        };
        bail!("{name}: {}; {remedy}", said(&error));
    }
    let element = gst::ElementFactory::make("v4l2src")
        .property("device", path.to_str().context("not the name of a camera")?)
        .build()
        .context("cameras need the element v4l2src; install gstreamer1.0-plugins-good")?;
    Ok(Source {
        name,
        is_live: true,
        kind: Kind::Camera(element),
    })
}

fn cameras() -> Vec<gst::Device> {
    let monitor = gst::DeviceMonitor::new();
    monitor.add_filter(Some("Video/Source"), None);
    monitor.devices().into_iter().collect()
}

/// The device's file, of a camera that has one.
fn path_of(camera: &gst::Device) -> Option<String> {
    let properties = camera.properties()?;
    ["device.path", "api.v4l2.path"]
        .into_iter()
        .find_map(|name| properties.get(name).ok())
}

/// What there is instead of a camera that there is not.
fn known_cameras() -> String {
    let names: Vec<_> = cameras()
        .iter()
        .filter_map(|camera| Some(format!("{} ({})", path_of(camera)?, camera.display_name())))
        .collect();
    match names.as_slice() {
        [] => "no camera is connected".into(),
        names => format!("cameras: {}", names.join(", ")),
    }
}

/// A URL without the password in it.
fn without_password(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return url.to_owned();
    };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    match rest[..end].rsplit_once('@') {
        Some((_, host)) => format!("{scheme}://{host}{}", &rest[end..]),
        None => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::without_password;

    #[test]
    fn passwords_are_not_shown() {
        for (url, expected) in [
            ("rtsp://me:secret@door/1", "rtsp://door/1"),
            ("rtsp://me:s@cret@door:554", "rtsp://door:554"),
            ("https://host/a@b?c=d@e", "https://host/a@b?c=d@e"),
            ("a@b.mp4", "a@b.mp4"),
        ] {
            assert_eq!(without_password(url), expected);
        }
    }
}
