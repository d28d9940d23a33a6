//! From a video buffer to the small RGB picture that the model looks at.

use gst::glib;
use gst_video::{
    VideoColorRange, VideoFlags, VideoFormat, VideoFrameExt, VideoFrameRef, VideoInfo,
};

use crate::input::{
    alpha::{
        AlphaMode, Unpacked, alpha_bits, append_composed, has_alpha, is_deep, is_opaque, set_alpha,
        widen_alpha,
    },
    layout::{Layout, Window},
    small::{Small, planar},
    tone_map::ToneMap,
    unpack::Unpacker,
};
use vlmnarrate_engine::Picture;

/// Scales frames of one format to RGB of one size. Small squares don't keep the aspect ratio, as the
/// models were trained.
///
/// Linear with as many taps as the ratio needs, which is what `videoconvertscale
/// method=bilinear2 add-borders=false` does: shrinking to a tenth with two taps would alias.
#[derive(Debug)]
pub(crate) struct Downscaler {
    /// What the caps say.
    info: VideoInfo,
    window: Window,
    /// How incoming buffers are read.
    packed: VideoInfo,
    /// Goes before the rest, where that can't read the window.
    unpacker: Option<Unpacker>,
    /// What the rest reads: the same, or what the unpacker makes of it.
    input: VideoInfo,
    /// Where odd rows are copied to.
    upright: Option<gst::Buffer>,
    /// Components are scaled first, each where it is, and what is left is converted. `None` where
    /// the converter does all.
    small: Option<Small>,
    converter: gst_video::VideoConverter,
    /// For frames that are transparent somewhere.
    detour: Option<Detour>,
    /// All have to go that way.
    is_detoured: bool,
    /// RGB, with alpha if the input has it, and in 16 bits where tones are mapped.
    output: VideoInfo,
    tones: Option<ToneMap>,
    /// Where the converter writes, each time the same.
    scratch: Option<gst::Buffer>,
}

/// A longer way: a frame is unpacked, then scaled.
#[derive(Debug)]
struct Detour {
    frame: Unpacked,
    small: Small,
    converter: gst_video::VideoConverter,
}

impl Detour {
    fn new(
        info: &VideoInfo,
        input: &VideoInfo,
        window: &Window,
        output: &VideoInfo,
    ) -> Result<Self, glib::BoolError> {
        let is_straight = has_alpha(&info.format_info()) && !is_premultiplied(info);
        let frame = Unpacked::new(input, window, is_straight)?;
        let (left, _, width, height) = window.seen;
        let window = Window {
            full: (frame.info.width(), height),
            seen: (left, 0, width, height),
        };
        let size = (output.width(), output.height());
        let is_deep = output.format() == VideoFormat::Argb64;
        let small = Small::new(&frame.info, &window, size, is_deep)?;
        let small = small.ok_or_else(|| glib::bool_error!("{} can't be scaled", info.format()))?;
        Ok(Self {
            converter: gst_video::VideoConverter::new(&small.info, output, Some(one_thread()))?,
            frame,
            small,
        })
    }
}

/// The other cores are the model's.
fn one_thread() -> gst_video::VideoConverterConfig {
    let mut config = gst_video::VideoConverterConfig::new();
    config.set_threads(1);
    config
}

impl Downscaler {
    pub(crate) fn new(info: &VideoInfo, size: (u32, u32)) -> Result<Self, glib::BoolError> {
        Self::with_window(info, Window::whole(info), size)
    }

    fn with_window(
        info: &VideoInfo,
        window: Window,
        size: (u32, u32),
    ) -> Result<Self, glib::BoolError> {
        // The fields of an interlaced frame are scaled as one picture: the converter would keep
        // them apart, in a picture that is too small to show a comb.
        let packed = VideoInfo::builder(info.format(), window.full.0, window.full.1)
            .interlace_mode(gst_video::VideoInterlaceMode::Progressive)
            .colorimetry(&info.colorimetry())
            .chroma_site(info.chroma_site())
            .fps(info.fps())
            .build()?;
        let (left, top, width, height) = window.seen;
        let is_scaled = (width, height) != size;
        let is_scaled_as_it_is = is_scaled && planar(packed.format()).is_some();
        let unpacker = match is_scaled_as_it_is {
            true => None,
            false => Unpacker::new(&packed, left, width)?,
        };
        let (packed, input) = match &unpacker {
            Some(unpacker) => (unpacker.packed().clone(), unpacker.plain().clone()),
            None => (packed.clone(), packed),
        };
        let is_planar = is_scaled && planar(input.format()).is_some();
        let tones = ToneMap::new(&input.colorimetry(), largest_code(&input, is_planar));
        let format = match (&tones, has_alpha(&info.format_info())) {
            (Some(_), _) => VideoFormat::Argb64,
            (None, true) => VideoFormat::Rgba,
            (None, false) => VideoFormat::Rgb,
        };
        let output = VideoInfo::builder(format, size.0, size.1)
            .fps(info.fps())
            .build()?;
        let small = match is_planar {
            true => Small::new(&input, &window, size, tones.is_some())?,
            false => None,
        };
        // GStreamer 1.22 leaves part of the picture out where words grow on one axis and shrink on
        // the other, and does too little for bytes whose tones are mapped.
        let is_wrong = match is_deep(&input.format_info()) {
            true => (width < size.0) != (height < size.1),
            false => tones.is_some(),
        };
        let is_detoured = is_scaled && small.is_none() && is_wrong;
        let mut config = one_thread();
        if small.is_none() {
            config.set_resampler_method(gst_video::VideoResamplerMethod::Linear);
            // No picture is larger than i32: VideoInfo would have refused it.
            config.set_src_x(left as i32);
            config.set_src_y(top as i32);
            config.set_src_width(Some(width as i32));
            config.set_src_height(Some(height as i32));
        }
        let converted = small.as_ref().map_or(&input, |small| &small.info);
        Ok(Self {
            converter: gst_video::VideoConverter::new(converted, &output, Some(config))?,
            info: info.clone(),
            window,
            upright: None,
            small,
            detour: None,
            is_detoured,
            tones,
            scratch: None,
            packed,
            unpacker,
            input,
            output,
        })
    }

    pub(crate) fn size(&self) -> (u32, u32) {
        (self.output.width(), self.output.height())
    }

    /// Scales one frame into `rgb`'s memory.
    pub(crate) fn picture(
        &mut self,
        buffer: &gst::BufferRef,
        rgb: Vec<u8>,
    ) -> Result<Picture, glib::BoolError> {
        let layout = Layout::of(buffer, &self.info)?;
        if layout.window != self.window {
            *self = Self::with_window(&self.info, layout.window, self.size())?;
        }
        if !layout.is_odd() {
            return self.picture_of_packed(buffer, rgb);
        }
        let mut upright = match self.upright.take() {
            Some(upright) => upright,
            None => {
                let mut upright = gst::Buffer::with_size(self.packed.size())?;
                upright.make_mut().memset(.., 0)?;
                upright
            }
        };
        layout.copy(buffer, &self.packed, upright.make_mut())?;
        let picture = self.picture_of_packed(&upright, rgb);
        self.upright = Some(upright);
        picture
    }

    /// Of a buffer whose rows are as GStreamer expects them.
    fn picture_of_packed(
        &mut self,
        buffer: &gst::BufferRef,
        rgb: Vec<u8>,
    ) -> Result<Picture, glib::BoolError> {
        let Some(mut unpacker) = self.unpacker.take() else {
            return self.picture_of(buffer, rgb);
        };
        let plain = unpacker.unpack(buffer);
        let picture = plain.and_then(|plain| self.picture_of(plain, rgb));
        self.unpacker = Some(unpacker);
        picture
    }

    /// Of a buffer that is read as `input` says.
    fn picture_of(
        &mut self,
        buffer: &gst::BufferRef,
        mut rgb: Vec<u8>,
    ) -> Result<Picture, glib::BoolError> {
        let (width, height) = self.size();
        let frame = VideoFrameRef::from_buffer_ref_readable(buffer, &self.input)?;
        let mut scratch = match self.scratch.take() {
            Some(scratch) => scratch,
            None => gst::Buffer::with_size(self.output.size())?,
        };
        let target = scratch.make_mut();
        let mut scaled = VideoFrameRef::from_buffer_ref_writable(target, &self.output)?;
        let mode = match self.is_detoured {
            true => None,
            false => self.scale(&frame, &mut scaled)?,
        };
        let mode = match mode {
            Some(mode) => mode,
            None => self.scale_by_detour(&frame, &mut scaled)?,
        };
        let stride = scaled.plane_stride()[0] as usize;
        let pixels = scaled.plane_data(0)?;
        rgb.clear();
        match (&self.tones, self.output.format()) {
            (Some(tones), _) => tones.map(pixels, mode, &mut rgb),
            (None, VideoFormat::Rgba) => append_composed(pixels, mode, &mut rgb),
            _ => {
                for line in pixels.chunks_exact(stride) {
                    rgb.extend_from_slice(&line[..3 * width as usize]);
                }
            }
        }
        drop(scaled);
        self.scratch = Some(scratch);
        Ok(Picture { width, height, rgb })
    }

    /// `None` where something shows through that has to be scaled with care.
    fn scale(
        &mut self,
        frame: &VideoFrameRef<&gst::BufferRef>,
        scaled: &mut VideoFrameRef<&mut gst::BufferRef>,
    ) -> Result<Option<AlphaMode>, glib::BoolError> {
        let has_alpha = has_alpha(&self.info.format_info());
        let is_premultiplied = is_premultiplied(&self.info);
        let format = self.output.format();
        if let Some(small) = &mut self.small {
            small.fill(frame)?;
            let is_opaque = !has_alpha || small.is_opaque();
            if !is_opaque && !is_premultiplied {
                return Ok(None);
            }
            small.convert(&self.converter, scaled)?;
            if is_opaque {
                return Ok(Some(AlphaMode::Opaque));
            }
            set_alpha(scaled.plane_data_mut(0)?, format, small.alpha());
            return Ok(Some(AlphaMode::Premultiplied));
        }
        self.converter.frame_ref(frame, scaled);
        if !has_alpha {
            return Ok(Some(AlphaMode::Opaque));
        }
        let pixels = scaled.plane_data_mut(0)?;
        widen_alpha(pixels, format, alpha_bits(&self.input.format_info()));
        let (_, _, width, height) = self.window.seen;
        Ok(match (width, height) == self.size() {
            _ if is_opaque(pixels, format) => Some(AlphaMode::Opaque),
            _ if is_premultiplied => Some(AlphaMode::Premultiplied),
            true => Some(AlphaMode::Straight),
            false => None,
        })
    }

    fn scale_by_detour(
        &mut self,
        frame: &VideoFrameRef<&gst::BufferRef>,
        scaled: &mut VideoFrameRef<&mut gst::BufferRef>,
    ) -> Result<AlphaMode, glib::BoolError> {
        let detour = match &mut self.detour {
            Some(detour) => detour,
            none => none.insert(Detour::new(
                &self.info,
                &self.input,
                &self.window,
                &self.output,
            )?),
        };
        let small = &mut detour.small;
        small.fill(&detour.frame.fill(frame)?)?;
        small.convert(&detour.converter, scaled)?;
        if !has_alpha(&self.info.format_info()) {
            return Ok(AlphaMode::Opaque);
        }
        let pixels = scaled.plane_data_mut(0)?;
        set_alpha(pixels, self.output.format(), small.alpha());
        Ok(AlphaMode::Premultiplied)
    }
}

fn is_premultiplied(info: &VideoInfo) -> bool {
    info.flags().contains(VideoFlags::PREMULTIPLIED_ALPHA)
}

/// Words of a small frame have bits behind those of the input, so that the largest code is less
/// than one where it is not that of some range.
fn largest_code(input: &VideoInfo, is_planar: bool) -> f64 {
    match (is_planar, input.colorimetry().range()) {
        (true, VideoColorRange::Range0_255) => {
            1.0 - 0.5f64.powi(input.format_info().depth()[0] as i32)
        }
        _ => 1.0,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use gst_video::VideoFormatInfo;

    use super::{super::unpack::pixels_in_group, *};

    pub(in super::super) fn convert(
        from: &VideoInfo,
        buffer: &gst::BufferRef,
        to: &VideoInfo,
        config: gst_video::VideoConverterConfig,
    ) -> gst::Buffer {
        let mut converted = gst::Buffer::with_size(to.size()).unwrap();
        let converter = gst_video::VideoConverter::new(from, to, Some(config)).unwrap();
        let large = VideoFrameRef::from_buffer_ref_readable(buffer, from).unwrap();
        let fresh = converted.get_mut().unwrap();
        let mut frame = VideoFrameRef::from_buffer_ref_writable(fresh, to).unwrap();
        converter.frame_ref(&large, &mut frame);
        drop(frame);
        converted
    }

    /// A picture with edges, gradients and noise.
    pub(in super::super) fn rgb((width, height): (u32, u32)) -> (VideoInfo, gst::Buffer) {
        let info = VideoInfo::builder(VideoFormat::Rgb, width, height)
            .build()
            .unwrap();
        let mut rng = fastrand::Rng::with_seed(7);
        let mut buffer = gst::Buffer::with_size(info.size()).unwrap();
        {
            let mut map = buffer.get_mut().unwrap().map_writable().unwrap();
            let stride = info.stride()[0] as usize;
            for (y, row) in map.chunks_exact_mut(stride).enumerate() {
                for (x, pixel) in row.as_chunks_mut::<3>().0.iter_mut().enumerate() {
                    let at = |v: usize, of: u32| (v * 255 / of as usize) as u8;
                    let square = if (x / 40 + y / 30) % 3 == 0 { 90 } else { 0 };
                    *pixel = [at(x, width), at(y, height), 128 + square]
                        .map(|v: u8| v.saturating_add(rng.u8(..20)));
                }
            }
        }
        (info, buffer)
    }

    /// The same as `format` has it.
    pub(in super::super) fn frame(
        format: VideoFormat,
        (width, height): (u32, u32),
    ) -> (VideoInfo, gst::Buffer) {
        let (from, buffer) = rgb((width, height));
        let info = VideoInfo::builder(format, width, height).build().unwrap();
        let converted = convert(&from, &buffer, &info, undithered());
        (info, converted)
    }

    pub(in super::super) fn undithered() -> gst_video::VideoConverterConfig {
        let mut config = gst_video::VideoConverterConfig::new();
        config.set_dither_method(gst_video::VideoDitherMethod::None);
        config
    }

    /// How far two pictures are apart, on average and at most.
    pub(in super::super) fn difference(a: &Picture, b: &Picture) -> (f64, f64) {
        assert_eq!((a.width, a.height), (b.width, b.height));
        assert_eq!(a.rgb.len(), b.rgb.len());
        let off = (a.rgb.iter().zip(&b.rgb)).map(|(a, b)| f64::from(a.abs_diff(*b)));
        let mean = off.clone().sum::<f64>() / a.rgb.len() as f64;
        (mean, off.fold(0.0, f64::max))
    }

    /// What GStreamer's converter makes of it in one go.
    fn reference(info: &VideoInfo, buffer: &gst::BufferRef, size: (u32, u32)) -> Picture {
        let rgb = VideoInfo::builder(VideoFormat::Rgb, size.0, size.1).fps(info.fps());
        let rgb = rgb.build().unwrap();
        let mut config = gst_video::VideoConverterConfig::new();
        config.set_resampler_method(gst_video::VideoResamplerMethod::Linear);
        let picture = convert(info, buffer, &rgb, config);
        let map = picture.map_readable().unwrap();
        let rows = map.chunks_exact(rgb.stride()[0] as usize);
        Picture {
            width: size.0,
            height: size.1,
            rgb: rows
                .flat_map(|row| row[..3 * size.0 as usize].to_vec())
                .collect(),
        }
    }

    #[test]
    fn every_format_looks_as_gstreamer_scales_it() {
        gst::init().unwrap();
        let mut by_planes = 0;
        for format in VideoFormat::iter_raw() {
            let group = pixels_in_group(&VideoFormatInfo::from_format(format));
            let sizes = [
                ((640, 362), (64, 64)),
                ((301, 203), (100, 70)),
                ((30, 20), (64, 64)),
            ];
            for ((width, height), to) in sizes {
                // What ends within a group GStreamer itself doesn't show right.
                let from = (u32::next_multiple_of(width, group), height);
                let (info, buffer) = frame(format, from);
                let mut scaler = Downscaler::new(&info, to).unwrap();
                let picture = scaler.picture(&buffer, vec![]).unwrap();
                let reference = reference(&info, &buffer, to);
                let (mean, max) = difference(&picture, &reference);
                // GStreamer is more exact in colours of 16 bits than in those of 8, which is what
                // the small frame has.
                let is_deep = info.format_info().depth()[0] > 8;
                let limit = if is_deep { 2.7 } else { 1.3 };
                assert!(mean < limit, "{format} {from:?} to {to:?}: {mean}");
                assert!(max < 20.0, "{format} {from:?} to {to:?}: {max}");
                by_planes += u32::from(scaler.small.is_some());
            }
        }
        assert_eq!(by_planes, 3 * 59);
    }

    /// In the corner of a larger buffer that is black elsewhere.
    #[test]
    fn nothing_from_around_the_window_is_seen() {
        gst::init().unwrap();
        for format in [VideoFormat::I420, VideoFormat::Yuy2, VideoFormat::Rgb] {
            let info = VideoInfo::builder(format, 200, 100).build().unwrap();
            let mut buffer = gst::Buffer::with_size(info.size()).unwrap();
            {
                let buffer = buffer.get_mut().unwrap();
                let mut frame = VideoFrameRef::from_buffer_ref_writable(buffer, &info).unwrap();
                // Black YUV has to be asked for; white is 255 in all of these.
                frame.planes_data_mut()[0].fill(0);
                let rows = 51..89;
                let stride = frame.plane_stride()[0] as usize;
                let pixel = info.format_info().pixel_stride()[0] as usize;
                for row in rows {
                    let row = &mut frame.planes_data_mut()[0][row * stride..];
                    row[100 * pixel..156 * pixel].fill(128);
                }
                for plane in &mut frame.planes_data_mut()[1..] {
                    plane.fill(128);
                }
            }
            let buffer = buffer.get_mut().unwrap();
            gst_video::VideoCropMeta::add(buffer, (100, 51, 56, 38));
            let mut scaler = Downscaler::new(&info, (16, 16)).unwrap();
            let picture = scaler.picture(buffer, vec![]).unwrap();
            assert!(scaler.small.is_some());
            let expected = picture.rgb[..3].to_vec();
            assert!(expected[0] > 100, "{format}: {expected:?}");
            assert!(picture.rgb.chunks(3).all(|rgb| rgb == expected), "{format}");
        }
    }

    /// In a way that GStreamer 1.22 doesn't do right in more than 8 bits.
    #[test]
    fn one_axis_may_grow_while_the_other_shrinks() {
        gst::init().unwrap();
        // Whole tiles: GStreamer 1.26 packs no part of those that MT2110R has.
        for from in [(96, 40), (48, 90)] {
            let (rgb, buffer) = rgb(from);
            let mut scaler = Downscaler::new(&rgb, (64, 64)).unwrap();
            let expected = scaler.picture(&buffer, vec![]).unwrap();
            for format in VideoFormat::iter_raw() {
                let (info, buffer) = frame(format, from);
                if info.is_gray() || info.format_info().has_palette() {
                    continue;
                }
                let mut scaler = Downscaler::new(&info, (64, 64)).unwrap();
                let picture = scaler.picture(&buffer, vec![]).unwrap();
                let (mean, _) = difference(&picture, &expected);
                assert!(mean < 6.0, "{format} {from:?}: {mean}");
            }
        }
    }
}
