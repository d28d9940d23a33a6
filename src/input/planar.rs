//! Scales the components of a frame without unpacking it first.

use std::ops::Range;

use gst::glib;
use gst_video::{VideoFormat, VideoFrameExt, VideoFrameRef, VideoInfo};

use crate::input::{
    alpha::{ALPHA, has_alpha},
    layout::Window,
    scale::{Component, Plane, Sample, Span, Target},
};

/// Scales frames to planar ones whose planes have one size; YUV stays YUV.
#[derive(Debug)]
pub(crate) struct PlanarScaler {
    pub(crate) info: VideoInfo,
    buffer: gst::Buffer,
    /// Scalers of the input's planes, by the index of the plane.
    planes: Vec<(u32, Plane)>,
    /// Format of the scaled samples.
    sample: Sample,
    /// Scaled alpha, of frames that have it.
    alpha: Option<Vec<u8>>,
}

impl PlanarScaler {
    /// `None` for formats whose samples are neither bytes nor words.
    pub(crate) fn new(
        input: &VideoInfo,
        window: &Window,
        (width, height): (u32, u32),
        is_deep: bool,
    ) -> Result<Option<Self>, glib::BoolError> {
        let large = input.format_info();
        let Some(small) = planar(input.format()) else {
            return Ok(None);
        };
        let (small, sample) = match (is_deep, small) {
            (false, small) => (small, Sample::Byte),
            (true, VideoFormat::Y444) => (VideoFormat::Y44412le, Sample::Word(12)),
            (true, VideoFormat::Gbr) => (VideoFormat::Gbr12le, Sample::Word(12)),
            (true, _) => (VideoFormat::Gray16Le, Sample::Word(16)),
        };
        let info = VideoInfo::builder(small, width, height)
            .colorimetry(&input.colorimetry())
            .fps(input.fps())
            .build()?;
        let (left, top, seen_width, seen_height) = window.crop;
        let mut planes = vec![];
        let has_alpha = has_alpha(&large);
        let components = 0..info.n_components() as usize + usize::from(has_alpha);
        let target = |c: usize| match c == ALPHA {
            // After the planes.
            true => info.n_planes(),
            false => info.format_info().plane()[c],
        };
        for plane in 0..large.n_planes() {
            let here = components.clone().filter(|c| large.plane()[*c] == plane);
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
                target: target(c) as usize,
            });
            let components = components.collect::<Vec<_>>();
            // All components of a plane have the same rows and bits.
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
            planes,
            sample,
            alpha: has_alpha.then(|| vec![0; width as usize * height as usize]),
            info,
        }))
    }

    pub(crate) fn convert(
        &self,
        converter: &gst_video::VideoConverter,
        output: &mut VideoFrameRef<&mut gst::BufferRef>,
    ) -> Result<(), glib::BoolError> {
        let small = VideoFrameRef::from_buffer_ref_readable(&self.buffer, &self.info)?;
        converter.frame_ref(&small, output);
        Ok(())
    }

    /// Whether all scaled pixels are opaque.
    pub(crate) fn is_opaque(&self) -> bool {
        self.alpha().iter().all(|alpha| *alpha == u8::MAX)
    }

    pub(crate) fn alpha(&self) -> &[u8] {
        self.alpha.as_deref().unwrap_or_default()
    }

    pub(crate) fn fill(
        &mut self,
        large: &VideoFrameRef<&gst::BufferRef>,
    ) -> Result<(), glib::BoolError> {
        let mut small =
            VideoFrameRef::from_buffer_ref_writable(self.buffer.make_mut(), &self.info)?;
        let strides = small.plane_stride().to_vec();
        let mut targets = (small.planes_data_mut().into_iter().zip(strides))
            .map(|(bytes, stride)| Target {
                bytes,
                stride: stride as usize,
                sample: self.sample,
            })
            .collect::<Vec<_>>();
        targets.extend(self.alpha.as_mut().map(|alpha| Target {
            bytes: alpha,
            stride: self.info.width() as usize,
            sample: Sample::Byte,
        }));
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

/// The planar format for an input format. `None` if its samples are not bytes or words at known offsets.
pub(crate) fn planar(large: VideoFormat) -> Option<VideoFormat> {
    use VideoFormat::*;
    match large {
        I420 | Yv12 | Y41b | Y42b | Y444 | Yuv9 | Yvu9 | A420 => Some(Y444),
        Nv12 | Nv21 | Nv16 | Nv61 | Nv24 | Yuy2 | Yvyu | Uyvy | Ayuv | Vuya | Iyu2 | Av12 => {
            Some(Y444)
        }
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
        // GStreamer's offset is 1, in the middle of U.
        (P01010le | P012Le | P016Le, 2) => 2,
        _ => large.poffset()[component] as usize,
    }
}

/// A range of pixels in samples of a component that has one sample for `1 << sub` pixels.
fn span(pixels: Range<u32>, sub: u32, cosited: bool, out: u32) -> Span {
    let scale = f64::from(1 << sub);
    // A sample has the colour of the middle of its pixels, or of the first pixel.
    let shift = if cosited { (scale - 1.0) / 2.0 } else { 0.0 };
    let last = pixels.end.div_ceil(1 << sub) as usize;
    Span {
        start: (f64::from(pixels.start) + shift) / scale,
        length: f64::from(pixels.end - pixels.start) / scale,
        inside: (pixels.start >> sub) as usize..last,
        out: out as usize,
    }
}
