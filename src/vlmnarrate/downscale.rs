//! From a video buffer to the small RGB picture that the model looks at.

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
    /// How incoming buffers are read.
    input: VideoInfo,
    output: VideoInfo,
    /// Where the converter writes, each time the same.
    scratch: gst::Buffer,
}

impl Downscaler {
    pub(super) fn new(
        info: &VideoInfo,
        (width, height): (u32, u32),
    ) -> Result<Self, gst::glib::BoolError> {
        // The fields of an interlaced frame are scaled as one picture: the converter would keep
        // them apart, in a picture that is too small to show a comb.
        let input = VideoInfo::builder(info.format(), info.width(), info.height())
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
        Ok(Self {
            converter: gst_video::VideoConverter::new(&input, &output, Some(config))?,
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
    ) -> Result<Picture, gst::glib::BoolError> {
        let (width, height) = self.size();
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
