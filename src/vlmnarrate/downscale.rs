//! From a video buffer to the small RGB picture that the model looks at.

use std::ops::Range;

use gst::glib;
use gst_video::{VideoFormat, VideoFrameExt, VideoFrameRef, VideoInfo};

use super::layout::{Layout, Window};
use crate::{
    kernels::scale::{Component, Plane, Sample, Span, Target},
    narrator::Picture,
};

/// Scales frames of one format to RGB of one size. Small squares don't keep the aspect ratio, as the
/// models were trained.
///
/// Linear with as many taps as the ratio needs, which is what `videoconvertscale
/// method=bilinear2 add-borders=false` does: shrinking to a tenth with two taps would alias.
#[derive(Debug)]
pub(super) struct Downscaler {
    /// What the caps say.
    info: VideoInfo,
    window: Window,
    /// How incoming buffers are read.
    input: VideoInfo,
    /// Where odd rows are copied to.
    upright: Option<gst::Buffer>,
    /// Components are scaled first, each where it is, and what is left is converted. `None` where
    /// the converter does all.
    small: Option<Small>,
    converter: gst_video::VideoConverter,
    output: VideoInfo,
    /// Where the converter writes, each time the same.
    scratch: gst::Buffer,
}

/// A small frame whose components are planes of one size, YUV if the large one is.
#[derive(Debug)]
struct Small {
    info: VideoInfo,
    buffer: gst::Buffer,
    /// From planes of the large frame.
    planes: Vec<(u32, Plane)>,
}

impl Small {
    /// `None` of formats whose samples are neither bytes nor words.
    fn new(
        input: &VideoInfo,
        window: &Window,
        (width, height): (u32, u32),
    ) -> Result<Option<Self>, glib::BoolError> {
        let large = input.format_info();
        let Some(small) = planar(input.format()) else {
            return Ok(None);
        };
        let info = VideoInfo::builder(small, width, height)
            .colorimetry(&input.colorimetry())
            .fps(input.fps())
            .build()?;
        let (left, top, seen_width, seen_height) = window.seen;
        let mut planes = vec![];
        for plane in 0..large.n_planes() {
            // Without alpha, which comes last.
            let components = 0..info.n_components() as usize;
            let here = components.filter(|c| large.plane()[*c] == plane);
            let cosited = |axis| input.chroma_site().contains(axis);
            let components = here.clone().map(|c| Component {
                offset: offset(&large, c),
                pixel_stride: large.pixel_stride()[c] as usize,
                columns: span(
                    left..left + seen_width,
                    large.w_sub()[c],
                    cosited(gst_video::VideoChromaSite::H_COSITED),
                    width,
                ),
                target: info.format_info().plane()[c] as usize,
            });
            let components = components.collect::<Vec<_>>();
            // All that are in one plane have as many rows and bits.
            let Some(c) = here.min() else { continue };
            let rows = span(
                top..top + seen_height,
                large.h_sub()[c],
                cosited(gst_video::VideoChromaSite::V_COSITED),
                height,
            );
            let sample = match large.depth()[c] + large.shift()[c] {
                8 => Sample::Byte,
                bits => Sample::Word(bits),
            };
            let Some(scaler) = Plane::new(sample, &rows, &components) else {
                return Ok(None);
            };
            planes.push((plane, scaler));
        }
        Ok(Some(Self {
            buffer: gst::Buffer::with_size(info.size())?,
            info,
            planes,
        }))
    }

    fn fill(&mut self, large: &VideoFrameRef<&gst::BufferRef>) -> Result<(), glib::BoolError> {
        let mut small =
            VideoFrameRef::from_buffer_ref_writable(self.buffer.make_mut(), &self.info)?;
        let strides = small.plane_stride().to_vec();
        let mut targets = (small.planes_data_mut().into_iter().zip(strides))
            .map(|(bytes, stride)| Target {
                bytes,
                stride: stride as usize,
            })
            .collect::<Vec<_>>();
        for (plane, scaler) in &mut self.planes {
            let stride = large.plane_stride()[*plane as usize] as usize;
            let bytes = large.plane_data(*plane)?;
            if scaler.size(stride).is_none_or(|size| size > bytes.len()) {
                return Err(glib::bool_error!("its rows are shorter than its pixels"));
            }
            scaler.scale(bytes, stride, &mut targets);
        }
        Ok(())
    }
}

/// The format of small frames, where all samples are bytes or words and GStreamer tells of all where
/// they are.
fn planar(large: VideoFormat) -> Option<VideoFormat> {
    use VideoFormat::*;
    match large {
        I420 | Yv12 | Y41b | Y42b | Y444 | Yuv9 | Yvu9 | A420 => Some(Y444),
        Nv12 | Nv21 | Nv16 | Nv61 | Nv24 | Yuy2 | Yvyu | Uyvy | Ayuv | Vuya | Iyu2 => Some(Y444),
        I42010le | I42012le | I42210le | I42212le | Y44410le | Y44412le | Y44416le => Some(Y444),
        A42010le | A42210le | A44410le | P01010le | P012Le | P016Le => Some(Y444),
        Ayuv64 if cfg!(target_endian = "little") => Some(Y444),
        Rgb | Bgr | Rgbx | Bgrx | Xrgb | Xbgr | Rgba | Bgra | Argb | Abgr => Some(Gbr),
        Rgbp | Bgrp | Gbr | Gbra | Gbr10le | Gbr12le | Gbra10le | Gbra12le => Some(Gbr),
        Argb64 if cfg!(target_endian = "little") => Some(Gbr),
        Argb64Le | Rgba64Le | Bgra64Le | Abgr64Le => Some(Gbr),
        Gray8 | Gray16Le => Some(Gray8),
        _ => None,
    }
}

fn offset(large: &gst_video::VideoFormatInfo, component: usize) -> usize {
    use VideoFormat::{P012Le, P016Le, P01010le};
    match (large.format(), component) {
        // GStreamer says 1, which is in the middle of U.
        (P01010le | P012Le | P016Le, 2) => 2,
        _ => large.poffset()[component] as usize,
    }
}

/// Some pixels of an axis, in samples of a component that has one for `1 << sub` of them.
fn span(pixels: Range<u32>, sub: u32, cosited: bool, out: u32) -> Span {
    let scale = f64::from(1 << sub);
    // A sample is the colour of the middle of its pixels, or of the first.
    let shift = if cosited { (scale - 1.0) / 2.0 } else { 0.0 };
    let last = pixels.end.div_ceil(1 << sub) as usize;
    Span {
        start: (f64::from(pixels.start) + shift) / scale,
        length: f64::from(pixels.end - pixels.start) / scale,
        inside: (pixels.start >> sub) as usize..last,
        out: out as usize,
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
        let output = VideoInfo::builder(VideoFormat::Rgb, width, height)
            .fps(info.fps())
            .build()?;
        let (left, top, seen_width, seen_height) = window.seen;
        let is_scaled = (seen_width, seen_height) != (width, height);
        let small = match is_scaled {
            true => Small::new(&input, &window, (width, height))?,
            false => None,
        };
        let mut config = gst_video::VideoConverterConfig::new();
        // The other cores are the model's.
        config.set_threads(1);
        if small.is_none() {
            config.set_resampler_method(gst_video::VideoResamplerMethod::Linear);
            // No picture is larger than i32: VideoInfo would have refused it.
            config.set_src_x(left as i32);
            config.set_src_y(top as i32);
            config.set_src_width(Some(seen_width as i32));
            config.set_src_height(Some(seen_height as i32));
        }
        let converted = small.as_ref().map_or(&input, |small| &small.info);
        Ok(Self {
            converter: gst_video::VideoConverter::new(converted, &output, Some(config))?,
            info: info.clone(),
            window,
            upright: None,
            small,
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
        rgb: Vec<u8>,
    ) -> Result<Picture, glib::BoolError> {
        let layout = Layout::of(buffer, &self.info)?;
        if layout.window != self.window {
            *self = Self::with_window(&self.info, layout.window, self.size())?;
        }
        if !layout.is_odd() {
            return self.picture_of(buffer, rgb);
        }
        let mut upright = match self.upright.take() {
            Some(upright) => upright,
            None => {
                let mut upright = gst::Buffer::with_size(self.input.size())?;
                upright.make_mut().memset(.., 0)?;
                upright
            }
        };
        layout.copy(buffer, &self.input, upright.make_mut())?;
        let picture = self.picture_of(&upright, rgb);
        self.upright = Some(upright);
        picture
    }

    /// Of a buffer whose rows are as GStreamer expects them.
    fn picture_of(
        &mut self,
        buffer: &gst::BufferRef,
        mut rgb: Vec<u8>,
    ) -> Result<Picture, glib::BoolError> {
        let (width, height) = self.size();
        let frame = VideoFrameRef::from_buffer_ref_readable(buffer, &self.input)?;
        let mut scaled =
            VideoFrameRef::from_buffer_ref_writable(self.scratch.make_mut(), &self.output)?;
        match &mut self.small {
            Some(small) => {
                small.fill(&frame)?;
                let small = VideoFrameRef::from_buffer_ref_readable(&small.buffer, &small.info)?;
                self.converter.frame_ref(&small, &mut scaled);
            }
            None => self.converter.frame_ref(&frame, &mut scaled),
        }

        let row = 3 * width as usize;
        let stride = scaled.plane_stride()[0] as usize;
        rgb.clear();
        for line in scaled.plane_data(0)?.chunks_exact(stride) {
            rgb.extend_from_slice(&line[..row]);
        }
        Ok(Picture { width, height, rgb })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

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
            let sizes = [
                ((640, 362), (64, 64)),
                ((301, 203), (100, 70)),
                ((30, 20), (64, 64)),
            ];
            for (from, to) in sizes {
                let (info, buffer) = frame(format, from);
                let mut scaler = Downscaler::new(&info, to).unwrap();
                let picture = scaler.picture(&buffer, vec![]).unwrap();
                let reference = reference(&info, &buffer, to);
                let (mean, max) = difference(&picture, &reference);
                // GStreamer is more exact in colours of 16 bits than in those of 8, which is what
                // the small frame has.
                let is_deep = info.format_info().depth()[0] > 8;
                let limit = if is_deep { 2.7 } else { 1.2 };
                assert!(mean < limit, "{format} {from:?} to {to:?}: {mean}");
                assert!(max < 20.0, "{format} {from:?} to {to:?}: {max}");
                by_planes += u32::from(scaler.small.is_some());
            }
        }
        assert_eq!(by_planes, 3 * 58);
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
}
