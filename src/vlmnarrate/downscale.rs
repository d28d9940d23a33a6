//! From a video buffer to the small RGB picture that the model looks at.

use gst::glib;
use gst_video::{VideoFrameExt, VideoFrameRef, VideoInfo};

use crate::narrator::Picture;

/// Scales frames of one format to RGB of one size. Small squares don't keep the aspect ratio, as the
/// models were trained.
///
/// Linear with as many taps as the ratio needs, which is what `videoconvertscale
/// method=bilinear2 add-borders=false` does: shrinking to a tenth with two taps would alias.
#[derive(Debug)]
pub(super) struct Downscaler {
    converter: gst_video::VideoConverter,
    /// What the caps say.
    info: VideoInfo,
    window: Window,
    /// How incoming buffers are read.
    input: VideoInfo,
    output: VideoInfo,
    /// Where the converter writes, each time the same.
    scratch: gst::Buffer,
}

/// Where in a buffer the picture is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Window {
    /// Width and height of what the buffer holds.
    full: (u32, u32),
    /// Left, top, width and height of what is to be seen.
    seen: (u32, u32, u32, u32),
}

impl Window {
    fn whole(info: &VideoInfo) -> Self {
        let full = (info.width(), info.height());
        Self {
            full,
            seen: (0, 0, full.0, full.1),
        }
    }

    fn of(buffer: &gst::BufferRef, info: &VideoInfo) -> Result<Self, glib::BoolError> {
        let whole = Self::whole(info);
        let size = buffer.meta::<gst_video::VideoMeta>();
        let crop = buffer.meta::<gst_video::VideoCropMeta>();
        let window = Self {
            full: size.map_or(whole.full, |meta| (meta.width(), meta.height())),
            seen: crop.map_or(whole.seen, |meta| meta.rect()),
        };
        let (left, top, width, height) = window.seen;
        let fits = |start: u32, length: u32, full| {
            length > 0 && start.checked_add(length).is_some_and(|end| end <= full)
        };
        if !fits(left, width, window.full.0) || !fits(top, height, window.full.1) {
            return Err(glib::bool_error!(
                "the picture, {width}x{height} at {left},{top}, is not inside its buffer of {}x{}",
                window.full.0,
                window.full.1
            ));
        }
        Ok(window)
    }
}

impl Downscaler {
    pub(super) fn new(info: &VideoInfo, size: (u32, u32)) -> Result<Self, glib::BoolError> {
        Self::with_window(info, Window::whole(info), size)
    }

    fn with_window(
        info: &VideoInfo,
        window: Window,
        (width, height): (u32, u32),
    ) -> Result<Self, glib::BoolError> {
        // The fields of an interlaced frame are scaled as one picture: the converter would keep
        // them apart, in a picture that is too small to show a comb.
        let input = VideoInfo::builder(info.format(), window.full.0, window.full.1)
            .interlace_mode(gst_video::VideoInterlaceMode::Progressive)
            .colorimetry(&info.colorimetry())
            .chroma_site(info.chroma_site())
            .fps(info.fps())
            .build()?;
        let output = VideoInfo::builder(gst_video::VideoFormat::Rgb, width, height)
            .fps(info.fps())
            .build()?;
        let mut config = gst_video::VideoConverterConfig::new();
        config.set_resampler_method(gst_video::VideoResamplerMethod::Linear);
        // The other cores are the model's.
        config.set_threads(1);
        let (left, top, width, height) = window.seen;
        // No picture is larger than i32: VideoInfo would have refused it.
        config.set_src_x(left as i32);
        config.set_src_y(top as i32);
        config.set_src_width(Some(width as i32));
        config.set_src_height(Some(height as i32));
        Ok(Self {
            converter: gst_video::VideoConverter::new(&input, &output, Some(config))?,
            info: info.clone(),
            window,
            scratch: gst::Buffer::with_size(output.size())?,
            input,
            output,
        })
    }

    pub(super) fn size(&self) -> (u32, u32) {
        (self.output.width(), self.output.height())
    }

    /// Scales one frame into `rgb`'s memory.
    pub(super) fn picture(
        &mut self,
        buffer: &gst::BufferRef,
        mut rgb: Vec<u8>,
    ) -> Result<Picture, glib::BoolError> {
        let (width, height) = self.size();
        let window = Window::of(buffer, &self.info)?;
        if window != self.window {
            *self = Self::with_window(&self.info, window, (width, height))?;
        }
        let frame = VideoFrameRef::from_buffer_ref_readable(buffer, &self.input)?;
        let mut scaled =
            VideoFrameRef::from_buffer_ref_writable(self.scratch.make_mut(), &self.output)?;
        self.converter.frame_ref(&frame, &mut scaled);

        let row = 3 * width as usize;
        let stride = scaled.plane_stride()[0] as usize;
        rgb.clear();
        for line in scaled.plane_data(0)?.chunks_exact(stride) {
            rgb.extend_from_slice(&line[..row]);
        }
        Ok(Picture { width, height, rgb })
    }
}
