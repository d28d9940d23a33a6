//! From video buffers to the RGB pictures that the model sees.

use gst::glib;
use gst_video::{
    VideoColorRange, VideoFlags, VideoFormat, VideoFrameExt, VideoFrameRef, VideoInfo,
};

use crate::input::{
    alpha::{
        AlphaMode, UnpackedFrame, alpha_bits, append_composed, has_alpha, is_deep, is_opaque,
        set_alpha, widen_alpha,
    },
    layout::{BufferLayout, Window},
    planar::{PlanarScaler, planar},
    tone_map::ToneMap,
    unpack::Unpacker,
};
use vlmnarrate_engine::Picture;

/// Size of the pictures that frames are scaled to, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Width and height, whatever the frame's aspect ratio.
    Exact(u32, u32),
    /// The longest edge at most, with the aspect ratio that the frame is shown with.
    LongestEdge(u32),
}

impl From<(u32, u32)> for Target {
    fn from((width, height): (u32, u32)) -> Self {
        Self::Exact(width, height)
    }
}

impl Target {
    /// Width and height of the picture of a window.
    fn size(self, info: &VideoInfo, window: &Window) -> (u32, u32) {
        let longest = match self {
            Self::Exact(width, height) => return (width, height),
            Self::LongestEdge(longest) => f64::from(longest),
        };
        let (_, _, width, height) = window.crop;
        let (mut width, mut height) = (f64::from(width), f64::from(height));
        // Pixels that are not square: the shorter edge grows, so that none is lost.
        let aspect = f64::from(info.par().numer()) / f64::from(info.par().denom());
        match aspect {
            1.0.. => width *= aspect,
            _ if aspect > 0.0 => height /= aspect,
            _ => (),
        }
        let scale = (longest / width.max(height)).min(1.0);
        let scaled = |edge: f64| ((edge * scale).round() as u32).max(1);
        (scaled(width), scaled(height))
    }
}

/// Scales frames of one format to RGB pictures of one size. Squares don't keep the aspect ratio, as in the training of
/// the models.
///
/// The filter is linear with as many taps as the ratio needs, like that of `videoconvertscale method=bilinear2
/// add-borders=false`: two taps would alias.
#[derive(Debug)]
pub(crate) struct Downscaler {
    /// The format of the caps.
    info: VideoInfo,
    target: Target,
    window: Window,
    /// The format in which incoming buffers are mapped.
    packed: VideoInfo,
    /// Unpacks buffers whose window the other steps can't read.
    unpacker: Option<Unpacker>,
    /// The format of the input of the other steps: `packed` or that of the unpacker's output.
    input: VideoInfo,
    /// The copy of irregular rows.
    row_copy: Option<gst::Buffer>,
    /// Scales components before the conversion. `None` if the converter scales too.
    scaler: Option<PlanarScaler>,
    converter: gst_video::VideoConverter,
    /// For frames with transparent pixels.
    unpacked: Option<UnpackedPath>,
    /// Whether all frames need that path.
    always_unpacks: bool,
    /// RGB, with alpha if the input has it, and 16 bits per component if tones are mapped.
    output: VideoInfo,
    tones: Option<ToneMap>,
    /// The converter's output buffer, which is reused.
    scratch: Option<gst::Buffer>,
}

/// Unpacks frames before scaling, and premultiplies those with alpha.
#[derive(Debug)]
struct UnpackedPath {
    frame: UnpackedFrame,
    scaler: PlanarScaler,
    converter: gst_video::VideoConverter,
}

impl UnpackedPath {
    fn new(
        info: &VideoInfo,
        input: &VideoInfo,
        window: &Window,
        output: &VideoInfo,
    ) -> Result<Self, glib::BoolError> {
        let is_straight = has_alpha(&info.format_info()) && !is_premultiplied(info);
        let frame = UnpackedFrame::new(input, window, is_straight)?;
        let (left, _, width, height) = window.crop;
        let window = Window {
            size: (frame.info.width(), height),
            crop: (left, 0, width, height),
        };
        let size = (output.width(), output.height());
        let is_deep = output.format() == VideoFormat::Argb64;
        let scaler = PlanarScaler::new(&frame.info, &window, size, is_deep)?;
        let scaler =
            scaler.ok_or_else(|| glib::bool_error!("{} can't be scaled", info.format()))?;
        Ok(Self {
            converter: gst_video::VideoConverter::new(&scaler.info, output, Some(one_thread()))?,
            frame,
            scaler,
        })
    }
}

/// One thread: the other cores are for the model.
fn one_thread() -> gst_video::VideoConverterConfig {
    let mut config = gst_video::VideoConverterConfig::new();
    config.set_threads(1);
    config
}

impl Downscaler {
    pub(crate) fn new(
        info: &VideoInfo,
        target: impl Into<Target>,
    ) -> Result<Self, glib::BoolError> {
        Self::with_window(info, Window::whole(info), target.into())
    }

    fn with_window(
        info: &VideoInfo,
        window: Window,
        target: Target,
    ) -> Result<Self, glib::BoolError> {
        let size = target.size(info, &window);
        // Both fields of an interlaced frame are scaled as one picture. The converter would keep them apart, and the
        // picture is too small to show combing.
        let packed = VideoInfo::builder(info.format(), window.size.0, window.size.1)
            .interlace_mode(gst_video::VideoInterlaceMode::Progressive)
            .colorimetry(&info.colorimetry())
            .chroma_site(info.chroma_site())
            .fps(info.fps())
            .build()?;
        let (left, top, width, height) = window.crop;
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
        let scaler = match is_planar {
            true => PlanarScaler::new(&input, &window, size, tones.is_some())?,
            false => None,
        };
        // GStreamer 1.22 leaves out part of a picture of words that grows on one axis and shrinks on the other, and is
        // too coarse for bytes whose tones are mapped.
        let is_wrong = match is_deep(&input.format_info()) {
            true => (width < size.0) != (height < size.1),
            false => tones.is_some(),
        };
        let always_unpacks = is_scaled && scaler.is_none() && is_wrong;
        let mut config = one_thread();
        if scaler.is_none() {
            config.set_resampler_method(gst_video::VideoResamplerMethod::Linear);
            // VideoInfo refuses sizes above i32.
            config.set_src_x(left as i32);
            config.set_src_y(top as i32);
            config.set_src_width(Some(width as i32));
            config.set_src_height(Some(height as i32));
        }
        let converted = scaler.as_ref().map_or(&input, |scaler| &scaler.info);
        Ok(Self {
            converter: gst_video::VideoConverter::new(converted, &output, Some(config))?,
            info: info.clone(),
            target,
            window,
            row_copy: None,
            scaler,
            unpacked: None,
            always_unpacks,
            tones,
            scratch: None,
            packed,
            unpacker,
            input,
            output,
        })
    }

    pub(crate) fn target(&self) -> Target {
        self.target
    }

    fn size(&self) -> (u32, u32) {
        (self.output.width(), self.output.height())
    }

    /// Scales a frame. Reuses the memory of `rgb`.
    pub(crate) fn picture(
        &mut self,
        buffer: &gst::BufferRef,
        rgb: Vec<u8>,
    ) -> Result<Picture, glib::BoolError> {
        let layout = BufferLayout::of(buffer, &self.info)?;
        if layout.window != self.window {
            *self = Self::with_window(&self.info, layout.window, self.target)?;
        }
        if !layout.is_irregular() {
            return self.picture_of_packed(buffer, rgb);
        }
        let mut row_copy = match self.row_copy.take() {
            Some(row_copy) => row_copy,
            None => {
                let mut row_copy = gst::Buffer::with_size(self.packed.size())?;
                row_copy.make_mut().memset(.., 0)?;
                row_copy
            }
        };
        layout.copy(buffer, &self.packed, row_copy.make_mut())?;
        let picture = self.picture_of_packed(&row_copy, rgb);
        self.row_copy = Some(row_copy);
        picture
    }

    /// Scales a buffer with regular rows.
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

    /// Scales a buffer in the format `input`.
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
        let mode = match self.always_unpacks {
            true => None,
            false => self.scale(&frame, &mut scaled)?,
        };
        let mode = match mode {
            Some(mode) => mode,
            None => self.scale_unpacked(&frame, &mut scaled)?,
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

    /// `None` if the frame must be unpacked first, because it has transparent pixels.
    fn scale(
        &mut self,
        frame: &VideoFrameRef<&gst::BufferRef>,
        scaled: &mut VideoFrameRef<&mut gst::BufferRef>,
    ) -> Result<Option<AlphaMode>, glib::BoolError> {
        let has_alpha = has_alpha(&self.info.format_info());
        let is_premultiplied = is_premultiplied(&self.info);
        let format = self.output.format();
        if let Some(scaler) = &mut self.scaler {
            scaler.fill(frame)?;
            let is_opaque = !has_alpha || scaler.is_opaque();
            if !is_opaque && !is_premultiplied {
                return Ok(None);
            }
            scaler.convert(&self.converter, scaled)?;
            if is_opaque {
                return Ok(Some(AlphaMode::Opaque));
            }
            set_alpha(scaled.plane_data_mut(0)?, format, scaler.alpha());
            return Ok(Some(AlphaMode::Premultiplied));
        }
        self.converter.frame_ref(frame, scaled);
        if !has_alpha {
            return Ok(Some(AlphaMode::Opaque));
        }
        let pixels = scaled.plane_data_mut(0)?;
        widen_alpha(pixels, format, alpha_bits(&self.input.format_info()));
        let (_, _, width, height) = self.window.crop;
        Ok(match (width, height) == self.size() {
            _ if is_opaque(pixels, format) => Some(AlphaMode::Opaque),
            _ if is_premultiplied => Some(AlphaMode::Premultiplied),
            true => Some(AlphaMode::Straight),
            false => None,
        })
    }

    fn scale_unpacked(
        &mut self,
        frame: &VideoFrameRef<&gst::BufferRef>,
        scaled: &mut VideoFrameRef<&mut gst::BufferRef>,
    ) -> Result<AlphaMode, glib::BoolError> {
        let unpacked = match &mut self.unpacked {
            Some(unpacked) => unpacked,
            none => none.insert(UnpackedPath::new(
                &self.info,
                &self.input,
                &self.window,
                &self.output,
            )?),
        };
        let scaler = &mut unpacked.scaler;
        scaler.fill(&unpacked.frame.fill(frame)?)?;
        scaler.convert(&unpacked.converter, scaled)?;
        if !has_alpha(&self.info.format_info()) {
            return Ok(AlphaMode::Opaque);
        }
        let pixels = scaled.plane_data_mut(0)?;
        set_alpha(pixels, self.output.format(), scaler.alpha());
        Ok(AlphaMode::Premultiplied)
    }
}

fn is_premultiplied(info: &VideoInfo) -> bool {
    info.flags().contains(VideoFlags::PREMULTIPLIED_ALPHA)
}

/// The largest code value of full range. Words of a scaled frame have more bits than the input, so it is less than 1.
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

    /// The same picture in `format`.
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

    /// Mean and maximum difference of two pictures.
    pub(in super::super) fn difference(a: &Picture, b: &Picture) -> (f64, f64) {
        assert_eq!((a.width, a.height), (b.width, b.height));
        assert_eq!(a.rgb.len(), b.rgb.len());
        let off = (a.rgb.iter().zip(&b.rgb)).map(|(a, b)| f64::from(a.abs_diff(*b)));
        let mean = off.clone().sum::<f64>() / a.rgb.len() as f64;
        (mean, off.fold(0.0, f64::max))
    }

    /// The picture that GStreamer's converter makes in one step.
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
                // GStreamer itself is wrong where a row ends within a group.
                let from = (u32::next_multiple_of(width, group), height);
                let (info, buffer) = frame(format, from);
                let mut downscaler = Downscaler::new(&info, to).unwrap();
                let picture = downscaler.picture(&buffer, vec![]).unwrap();
                let reference = reference(&info, &buffer, to);
                let (mean, max) = difference(&picture, &reference);
                // GStreamer is more exact in colours of 16 bits than in those of 8, which is what
                // the small frame has.
                let is_deep = info.format_info().depth()[0] > 8;
                let limit = if is_deep { 2.7 } else { 1.3 };
                assert!(mean < limit, "{format} {from:?} to {to:?}: {mean}");
                assert!(max < 20.0, "{format} {from:?} to {to:?}: {max}");
                by_planes += u32::from(downscaler.scaler.is_some());
            }
        }
        assert_eq!(by_planes, 3 * 59);
    }

    #[test]
    fn the_longest_edge_is_limited_and_the_aspect_kept() {
        gst::init().unwrap();
        let size = |(width, height), par: (i32, i32), longest| {
            let info = VideoInfo::builder(VideoFormat::I420, width, height)
                .par(gst::Fraction::new(par.0, par.1))
                .build()
                .unwrap();
            let mut buffer = gst::Buffer::with_size(info.size()).unwrap();
            gst_video::VideoCropMeta::add(buffer.get_mut().unwrap(), (0, 0, width, height / 2));
            let mut downscaler = Downscaler::new(&info, Target::LongestEdge(longest)).unwrap();
            let whole = downscaler.size();
            let picture = downscaler.picture(&buffer, vec![]).unwrap();
            (whole, (picture.width, picture.height))
        };
        assert_eq!(size((1920, 1080), (1, 1), 512), ((512, 288), (512, 144)));
        assert_eq!(size((1080, 1920), (1, 1), 512), ((288, 512), (512, 455)));
        // No frame grows.
        assert_eq!(size((320, 240), (1, 1), 512), ((320, 240), (320, 120)));
        assert_eq!(size((720, 576), (64, 45), 512), ((512, 288), (512, 144)));
        assert_eq!(size((720, 480), (8, 9), 4096), ((720, 540), (720, 270)));
        assert_eq!(size((2000, 2), (1, 1), 100), ((100, 1), (100, 1)));
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
            let mut downscaler = Downscaler::new(&info, (16, 16)).unwrap();
            let picture = downscaler.picture(buffer, vec![]).unwrap();
            assert!(downscaler.scaler.is_some());
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
            let mut downscaler = Downscaler::new(&rgb, (64, 64)).unwrap();
            let expected = downscaler.picture(&buffer, vec![]).unwrap();
            for format in VideoFormat::iter_raw() {
                let (info, buffer) = frame(format, from);
                if info.is_gray() || info.format_info().has_palette() {
                    continue;
                }
                let mut downscaler = Downscaler::new(&info, (64, 64)).unwrap();
                let picture = downscaler.picture(&buffer, vec![]).unwrap();
                let (mean, _) = difference(&picture, &expected);
                assert!(mean < 6.0, "{format} {from:?}: {mean}");
            }
        }
    }
}
