//! Pictures with an alpha channel, composed on white as the models' image processors do.

use std::ops::Range;

use gst::glib;
use gst_video::{VideoFormat, VideoFormatInfo, VideoFrameRef, VideoInfo};

use crate::input::layout::Window;

/// Unpacks frames to packed pixels, alpha first, and premultiplies their colours, so that transparent pixels have no
/// weight when the frame is scaled.
#[derive(Debug)]
pub(crate) struct UnpackedFrame {
    pub(crate) info: VideoInfo,
    converter: gst_video::VideoConverter,
    buffer: gst::Buffer,
    /// The values of black.
    black: [u32; 4],
    /// Whether the colours must be premultiplied.
    is_straight: bool,
    alpha_bits: u32,
}

impl UnpackedFrame {
    pub(crate) fn new(
        input: &VideoInfo,
        window: &Window,
        is_straight: bool,
    ) -> Result<Self, glib::BoolError> {
        let (_, top, _, height) = window.crop;
        let format = unpacked(input);
        // Whole rows: the converter can't read parts of rows in every format.
        let info = VideoInfo::builder(format, input.width(), height)
            .colorimetry(&input.colorimetry())
            .fps(input.fps())
            .build()?;
        let mut config = gst_video::VideoConverterConfig::new();
        config.set_threads(1);
        if is_straight {
            // Chroma of transparent pixels must not spread.
            config.set_chroma_resampler_method(gst_video::VideoResamplerMethod::Nearest);
        }
        // VideoInfo refuses sizes above i32.
        config.set_src_y(top as i32);
        config.set_src_height(Some(height as i32));
        let (black, _) = info.range_offsets(info.colorimetry().range());
        Ok(Self {
            converter: gst_video::VideoConverter::new(input, &info, Some(config))?,
            buffer: gst::Buffer::with_size(info.size())?,
            // The offsets start with Y or red.
            black: [0, black[0], black[1], black[2]].map(|level| level as u32),
            is_straight,
            alpha_bits: alpha_bits(&input.format_info()),
            info,
        })
    }

    /// Unpacks and premultiplies a frame.
    pub(crate) fn fill(
        &mut self,
        frame: &VideoFrameRef<&gst::BufferRef>,
    ) -> Result<VideoFrameRef<&gst::BufferRef>, glib::BoolError> {
        let buffer = self.buffer.make_mut();
        let mut unpacked = VideoFrameRef::from_buffer_ref_writable(buffer, &self.info)?;
        self.converter.frame_ref(frame, &mut unpacked);
        let bytes = unpacked.plane_data_mut(0)?;
        widen_alpha(bytes, self.info.format(), self.alpha_bits);
        if self.is_straight {
            match self.info.format() {
                VideoFormat::Argb | VideoFormat::Ayuv => premultiply_bytes(bytes, self.black),
                _ => premultiply_words(bytes, self.black),
            }
        }
        drop(unpacked);
        VideoFrameRef::from_buffer_ref_readable(&self.buffer, &self.info)
    }
}

/// Index of the alpha component, in all formats that have one but palettes.
pub(crate) const ALPHA: usize = 3;

pub(crate) fn has_alpha(format: &VideoFormatInfo) -> bool {
    // GStreamer 1.22 denies it.
    format.has_alpha() || format.format() == VideoFormat::Av12
}

pub(crate) fn alpha_bits(format: &VideoFormatInfo) -> u32 {
    format.depth().get(ALPHA).copied().unwrap_or(8)
}

/// Whether samples have more than eight bits.
pub(crate) fn is_deep(format: &VideoFormatInfo) -> bool {
    format.depth()[0] > 8
}

/// Size of a pixel and the range of its alpha, in bytes.
fn pixel(format: VideoFormat) -> (usize, Range<usize>) {
    match format {
        VideoFormat::Rgba => (4, 3..4),
        VideoFormat::Argb | VideoFormat::Ayuv => (4, 0..1),
        _ => (8, 0..2),
    }
}

fn alphas(pixels: &mut [u8], format: VideoFormat) -> impl Iterator<Item = &mut [u8]> {
    let (size, alpha) = pixel(format);
    let pixels = pixels.chunks_exact_mut(size);
    pixels.map(move |pixel| &mut pixel[alpha.clone()])
}

pub(crate) fn is_opaque(pixels: &[u8], format: VideoFormat) -> bool {
    let (size, alpha) = pixel(format);
    let mut pixels = pixels.chunks_exact(size);
    pixels.all(|pixel| pixel[alpha.clone()].iter().all(|byte| *byte == u8::MAX))
}

pub(crate) fn set_alpha(pixels: &mut [u8], format: VideoFormat, values: &[u8]) {
    for (alpha, value) in alphas(pixels, format).zip(values) {
        alpha.fill(*value);
    }
}

/// Scales alpha of few bits to the full range: GStreamer makes 0xc030 of two bits that are set.
pub(crate) fn widen_alpha(pixels: &mut [u8], format: VideoFormat, bits: u32) {
    if bits >= 8 {
        return;
    }
    let high = if cfg!(target_endian = "little") { 1 } else { 0 };
    for alpha in alphas(pixels, format) {
        let value = u32::from(alpha[high.min(alpha.len() - 1)] >> (8 - bits));
        alpha.fill((value * 255 / ((1 << bits) - 1)) as u8);
    }
}

/// The packed format with the depth of the input.
fn unpacked(input: &VideoInfo) -> VideoFormat {
    // Only little-endian words can be scaled.
    let is_deep = is_deep(&input.format_info()) && cfg!(target_endian = "little");
    match (is_deep, input.is_rgb()) {
        (false, false) => VideoFormat::Ayuv,
        (false, true) => VideoFormat::Argb,
        (true, false) => VideoFormat::Ayuv64,
        (true, true) => VideoFormat::Argb64,
    }
}

fn premultiply_bytes(bytes: &mut [u8], black: [u32; 4]) {
    for pixel in bytes.as_chunks_mut::<4>().0 {
        let alpha = u32::from(pixel[0]);
        for (value, black) in pixel.iter_mut().zip(black).skip(1) {
            let sum = u32::from(*value) * alpha + black * (255 - alpha);
            *value = ((sum + 127) / 255) as u8;
        }
    }
}

fn premultiply_words(bytes: &mut [u8], black: [u32; 4]) {
    for pixel in bytes.as_chunks_mut::<2>().0.as_chunks_mut::<4>().0 {
        let alpha = f32::from(u16::from_ne_bytes(pixel[0])) / 65535.0;
        for (word, black) in pixel.iter_mut().zip(black).skip(1) {
            let (value, black) = (f32::from(u16::from_ne_bytes(*word)), black as f32);
            *word = ((black + (value - black) * alpha + 0.5) as u16).to_ne_bytes();
        }
    }
}

/// Relation of colours to alpha.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AlphaMode {
    /// All pixels are opaque.
    Opaque,
    Straight,
    Premultiplied,
}

/// Composes a colour on white.
pub(crate) fn compose(colour: u8, alpha: u8, mode: AlphaMode) -> u8 {
    match mode {
        AlphaMode::Opaque => colour,
        AlphaMode::Premultiplied => colour.saturating_add(255 - alpha),
        AlphaMode::Straight => {
            let lack = u32::from(255 - colour) * u32::from(alpha);
            255 - ((lack + 127) / 255) as u8
        }
    }
}

/// Appends RGBA pixels as RGB, composed on white.
pub(crate) fn append_composed(rgba: &[u8], mode: AlphaMode, rgb: &mut Vec<u8>) {
    let start = rgb.len();
    rgb.resize(start + rgba.len() / 4 * 3, 0);
    let pairs = rgb[start..].as_chunks_mut::<3>().0.iter_mut();
    let pairs = pairs.zip(rgba.as_chunks::<4>().0);
    use AlphaMode::{Opaque, Premultiplied, Straight};
    // One loop for each mode, so that the compiler vectorizes it.
    match mode {
        Opaque => pairs.for_each(|(to, [colour @ .., _])| *to = *colour),
        Straight => pairs.for_each(|(to, [colour @ .., alpha])| {
            *to = colour.map(|value| compose(value, *alpha, Straight));
        }),
        Premultiplied => pairs.for_each(|(to, [colour @ .., alpha])| {
            *to = colour.map(|value| compose(value, *alpha, Premultiplied));
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::downscale::{Downscaler, tests},
        *,
    };
    use vlmnarrate_engine::Picture;

    #[test]
    fn colours_are_multiplied_and_composed() {
        let mut bytes = [255, 10, 20, 30, 0, 10, 20, 30, 128, 16, 200, 128];
        premultiply_bytes(&mut bytes, [0, 16, 128, 128]);
        assert_eq!(bytes, [255, 10, 20, 30, 0, 16, 128, 128, 128, 16, 164, 128]);
        let words = [0x8000u16, 0, 0xffff, 0x8000].map(u16::to_ne_bytes);
        let mut words = words.concat();
        premultiply_words(&mut words, [0; 4]);
        let words = words.as_chunks::<2>().0.iter();
        let words = words.map(|word| u16::from_ne_bytes(*word));
        assert_eq!(words.collect::<Vec<_>>(), [0x8000, 0, 0x8000, 0x4000]);

        use AlphaMode::{Opaque, Premultiplied, Straight};
        for colour in 0..=255 {
            assert_eq!(compose(colour, 255, Straight), colour);
            assert_eq!(compose(colour, 255, Premultiplied), colour);
            assert_eq!(compose(colour, 0, Opaque), colour);
            assert_eq!(compose(colour, 0, Straight), 255);
        }
        assert_eq!(compose(0, 0, Premultiplied), 255);
        assert_eq!(compose(0, 51, Straight), 204);
        assert_eq!(compose(51, 51, Premultiplied), 255);
        assert_eq!(compose(40, 51, Premultiplied), 244);
    }

    /// Alpha of a pixel: opaque, transparent or a third, which two bits can express too.
    fn alpha(x: usize, y: usize, some: u8) -> u8 {
        match (x / 24 + y / 16) % 4 {
            0 => 0,
            1 => some,
            _ => 255,
        }
    }

    /// The picture with alpha, and noise where it is transparent, and the same composed on white.
    fn pictures(size: (u32, u32), some: u8) -> [(VideoInfo, gst::Buffer); 2] {
        let (info, mut composed) = tests::rgb(size);
        let with_alpha = VideoInfo::builder(VideoFormat::Rgba, size.0, size.1)
            .build()
            .unwrap();
        let mut rng = fastrand::Rng::with_seed(3);
        let mut bytes = vec![];
        {
            let mut map = composed.get_mut().unwrap().map_writable().unwrap();
            for (y, row) in map.chunks_exact_mut(info.stride()[0] as usize).enumerate() {
                let pixels = row.as_chunks_mut::<3>().0.iter_mut().take(size.0 as usize);
                for (x, pixel) in pixels.enumerate() {
                    let alpha = alpha(x, y, some);
                    bytes.extend(match alpha {
                        0 => [(); 3].map(|()| rng.u8(..)),
                        _ => *pixel,
                    });
                    bytes.push(alpha);
                    *pixel = pixel.map(|value| {
                        let part = f64::from(255 - value) * f64::from(alpha) / 255.0;
                        255 - part.round() as u8
                    });
                }
            }
        }
        let transparent = gst::Buffer::from_slice(bytes);
        [(with_alpha, transparent), (info, composed)]
    }

    fn picture(info: &VideoInfo, buffer: &gst::Buffer, size: (u32, u32)) -> Picture {
        let mut scaler = Downscaler::new(info, size).unwrap();
        scaler.picture(buffer, vec![]).unwrap()
    }

    const SIZES: [((u32, u32), (u32, u32)); 5] = [
        ((320, 240), (64, 64)),
        ((301, 203), (100, 70)),
        ((96, 64), (128, 128)),
        ((96, 64), (95, 64)),
        ((97, 63), (97, 63)),
    ];

    #[test]
    fn every_format_is_composed_on_white() {
        gst::init().unwrap();
        let mut formats = 0;
        for format in VideoFormat::iter_raw() {
            let format_info = VideoFormatInfo::from_format(format);
            if !has_alpha(&format_info) {
                continue;
            }
            formats += 1;
            let has_palette = format_info.has_palette();
            // Its only transparent colour is fully transparent.
            let some = if has_palette { 0 } else { 85 };
            for (from, to) in SIZES {
                let [(rgba, transparent), (rgb, composed)] = pictures(from, some);
                let info = VideoInfo::builder(format, from.0, from.1).build().unwrap();
                let buffer = tests::convert(&rgba, &transparent, &info, tests::undithered());
                let seen = picture(&info, &buffer, to);
                let (mean, max) = tests::difference(&seen, &picture(&rgb, &composed, to));
                let what = format!("{format} {from:?} to {to:?}: {mean} {max}");
                // A palette is coarse, GStreamer's YUV of 8 bits is off by a few, and chroma may be
                // that of a transparent pixel too.
                let is_subsampled = format_info.w_sub().iter().any(|sub| *sub > 0);
                let (most_mean, most) = match (has_palette, is_subsampled, info.is_yuv()) {
                    (true, ..) => (12.0, 60.0),
                    (_, true, _) => (4.0, 80.0),
                    (_, _, true) => (3.0, 9.0),
                    _ => (1.0, 3.0),
                };
                assert!(mean < most_mean && max < most, "{what}");
            }
        }
        assert!(formats >= 28, "{formats}");
    }

    #[test]
    fn premultiplied_colours_are_composed() {
        gst::init().unwrap();
        for (from, to) in SIZES {
            let [(info, buffer), (rgb, composed)] = pictures(from, 85);
            let mut bytes = buffer.map_readable().unwrap().to_vec();
            for [red, green, blue, alpha] in bytes.as_chunks_mut().0 {
                for value in [red, green, blue] {
                    *value = (u32::from(*value) * u32::from(*alpha) / 255) as u8;
                }
            }
            let info = VideoInfo::builder(info.format(), from.0, from.1)
                .flags(gst_video::VideoFlags::PREMULTIPLIED_ALPHA)
                .build()
                .unwrap();
            let seen = picture(&info, &gst::Buffer::from_slice(bytes), to);
            let (mean, max) = tests::difference(&seen, &picture(&rgb, &composed, to));
            assert!(mean < 1.0 && max < 4.0, "{from:?} to {to:?}: {mean} {max}");
        }
    }
}
