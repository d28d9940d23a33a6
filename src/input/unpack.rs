//! Unpacks frames whose rows GStreamer's converter can't read in part.

use gst::glib;
use gst_video::{VideoChromaMode, VideoFormatInfo, VideoFrameRef, VideoInfo, VideoMeta};

use crate::input::alpha::{alpha_bits, widen_alpha};

/// Number of pixels that are packed in a group. If a row ends within a group, GStreamer's converter leaves pixels out or
/// swaps their colours.
pub(crate) fn pixels_in_group(format: &VideoFormatInfo) -> u32 {
    // By name: GStreamer 1.22 lacks the first two.
    match format.name().as_str() {
        "MT2110T" | "MT2110R" => 16,
        // GStreamer 1.22 reads, or without ORC writes, one value beyond an odd row.
        "VYUY" | "UYVY" | "UYVP" => 2,
        _ => 1,
    }
}

/// Unpacks whole rows.
#[derive(Debug)]
pub(crate) struct Unpacker {
    converter: gst_video::VideoConverter,
    packed: VideoInfo,
    plain: VideoInfo,
    /// The converter's output buffer, which is reused.
    buffer: gst::Buffer,
}

impl Unpacker {
    /// `None` if the converter can read `width` pixels from `left` on. If `left` is not 0, GStreamer 1.22 and 1.26 can in
    /// few formats only: they count `left` twice, in other units or not at all, and write beyond their rows if it is
    /// within a tile.
    pub(crate) fn new(
        info: &VideoInfo,
        left: u32,
        width: u32,
    ) -> Result<Option<Self>, glib::BoolError> {
        let group = pixels_in_group(&info.format_info());
        if left == 0 && width.is_multiple_of(group) {
            return Ok(None);
        }
        // The checked layout has all of the last group in the buffer.
        let whole = |format| {
            VideoInfo::builder(format, info.width().next_multiple_of(group), info.height())
                .colorimetry(&info.colorimetry())
                .chroma_site(info.chroma_site())
                .fps(info.fps())
                .build()
        };
        let packed = whole(info.format())?;
        let plain = whole(info.format_info().unpack_format())?;
        let mut config = gst_video::VideoConverterConfig::new();
        config.set_threads(1);
        if group > 1 {
            // Keeps pixels beyond the picture out of its chroma.
            config.set_chroma_mode(VideoChromaMode::None);
        }
        Ok(Some(Self {
            converter: gst_video::VideoConverter::new(&packed, &plain, Some(config))?,
            buffer: gst::Buffer::with_size(plain.size())?,
            packed,
            plain,
        }))
    }

    /// The format of the input of [`unpack`](Self::unpack).
    pub(crate) fn packed(&self) -> &VideoInfo {
        &self.packed
    }

    /// The format of the output of [`unpack`](Self::unpack).
    pub(crate) fn plain(&self) -> &VideoInfo {
        &self.plain
    }

    pub(crate) fn unpack(
        &mut self,
        buffer: &gst::BufferRef,
    ) -> Result<&gst::BufferRef, glib::BoolError> {
        // A meta may leave out a part of the last group.
        let meta = buffer.meta::<VideoMeta>();
        let told = meta.filter(|meta| meta.width() != self.packed.width());
        let whole = told.map(|meta| self.with_whole_groups(buffer, &meta));
        let whole = whole.transpose()?;
        let buffer = whole.as_deref().unwrap_or(buffer);
        let packed = VideoFrameRef::from_buffer_ref_readable(buffer, &self.packed)?;
        let target = self.buffer.make_mut();
        let mut plain = VideoFrameRef::from_buffer_ref_writable(target, &self.plain)?;
        self.converter.frame_ref(&packed, &mut plain);
        let alpha_bits = alpha_bits(&self.packed.format_info());
        widen_alpha(plain.plane_data_mut(0)?, self.plain.format(), alpha_bits);
        drop(plain);
        Ok(&self.buffer)
    }

    /// A buffer of the same memory, with a meta that agrees with `packed`.
    fn with_whole_groups(
        &self,
        buffer: &gst::BufferRef,
        meta: &VideoMeta,
    ) -> Result<gst::Buffer, glib::BoolError> {
        let mut whole = buffer.copy_region(gst::BufferCopyFlags::MEMORY, ..)?;
        VideoMeta::add_full(
            whole.make_mut(),
            meta.video_frame_flags(),
            meta.format(),
            self.packed.width(),
            self.packed.height(),
            meta.offset(),
            meta.stride(),
        )?;
        Ok(whole)
    }
}

#[cfg(test)]
mod tests {
    use gst_video::{VideoCropMeta, VideoFormat, VideoFrameFlags, VideoFrameRef, VideoInfo};

    use super::super::{
        alpha::{alpha_bits, has_alpha},
        downscale::Downscaler,
    };

    /// Colours that change slowly, so that it matters little which neighbour shares its chroma.
    fn gradients(format: VideoFormat, width: u32, height: u32) -> (VideoInfo, gst::Buffer) {
        let info = VideoInfo::builder(format, width, height);
        let info = info.build().unwrap();
        let mut bytes = vec![0; info.size()];
        for (y, row) in bytes
            .chunks_exact_mut(info.stride()[0] as usize)
            .enumerate()
        {
            let pixels = row.chunks_exact_mut(info.n_components() as usize);
            for (x, pixel) in pixels.enumerate() {
                // The last is alpha, of formats that have it.
                let values = [40 + 3 * x / 4, 40 + y, 230 - (x + y) / 3, 90 + (x + y) / 3];
                for (to, value) in pixel.iter_mut().zip(values) {
                    *to = value as u8;
                }
            }
        }
        (info, gst::Buffer::from_mut_slice(bytes))
    }

    fn convert(from: &VideoInfo, buffer: &gst::BufferRef, to: &VideoInfo) -> gst::Buffer {
        let mut converted = gst::Buffer::with_size(to.size()).unwrap();
        let converter = gst_video::VideoConverter::new(from, to, None).unwrap();
        let from = VideoFrameRef::from_buffer_ref_readable(buffer, from).unwrap();
        let out = converted.get_mut().unwrap();
        let mut out = VideoFrameRef::from_buffer_ref_writable(out, to).unwrap();
        converter.frame_ref(&from, &mut out);
        drop(out);
        converted
    }

    /// The model's view of a part of a frame: the left top, of a size, or in there a window.
    fn look(
        info: &VideoInfo,
        buffer: &gst::BufferRef,
        (width, height): (u32, u32),
        window: Option<(u32, u32, u32, u32)>,
    ) -> Vec<u8> {
        let mut buffer = buffer.copy_deep().unwrap();
        let fresh = buffer.get_mut().unwrap();
        let (flags, format) = (VideoFrameFlags::empty(), info.format());
        let (offset, stride) = (info.offset(), info.stride());
        gst_video::VideoMeta::add_full(fresh, flags, format, width, height, offset, stride)
            .unwrap();
        let mut seen = (width, height);
        if let Some(window) = window {
            VideoCropMeta::add(fresh, window);
            seen = (window.2, window.3);
        }
        let info = VideoInfo::builder(format, seen.0, seen.1).build().unwrap();
        let mut downscaler = Downscaler::new(&info, (64, 64)).unwrap();
        downscaler.picture(&buffer, vec![]).unwrap().rgb
    }

    /// Packed whole, in whole tiles, and looked at in part: the same as if it had been RGB.
    #[test]
    fn of_every_format_any_part_can_be_seen() {
        gst::init().unwrap();
        let whole @ (width, height) = (256, 160);
        let [rgb, rgba] =
            [VideoFormat::Rgb, VideoFormat::Rgba].map(|format| gradients(format, width, height));
        let mut wrong = vec![];
        for format in VideoFormat::iter_raw() {
            let info = VideoInfo::builder(format, width, height).build().unwrap();
            let format_info = info.format_info();
            let is_transparent = has_alpha(&format_info) && alpha_bits(&format_info) >= 8;
            let (plain, source) = if is_transparent { &rgba } else { &rgb };
            let packed = convert(plain, source, &info);
            let unpacked = convert(&info, &packed, plain);
            for (size, window) in [
                ((201, 133), None),
                (whole, Some((138, 22, 113, 100))),
                (whole, Some((174, 8, 20, 30))),
                (whole, Some((243, 6, 13, 150))),
                // Whole tiles, and as large as the picture.
                (whole, Some((64, 32, 128, 96))),
                (whole, Some((137, 9, 64, 64))),
            ] {
                let seen = look(&info, &packed, size, window);
                let expected = look(plain, &unpacked, size, window);
                let off = seen.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b));
                let off = off.max().unwrap();
                if off > 18 {
                    wrong.push(format!("{format} {size:?} {window:?}: off by {off}"));
                }
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    /// In the same rows, and in the same tile.
    #[test]
    fn what_lies_behind_the_picture_is_not_seen() {
        gst::init().unwrap();
        let (width, height, inside) = (256, 160, 204);
        let [yellow, blue] = [[255, 255, 0], [0, 0, 255]].map(|behind: [u8; 3]| {
            let (info, buffer) = gradients(VideoFormat::Rgb, width, height);
            let mut bytes = buffer.map_readable().unwrap().to_vec();
            let pixels = bytes.as_chunks_mut::<3>().0.iter_mut().enumerate();
            for (_, pixel) in pixels.filter(|(i, _)| i % width as usize >= inside) {
                *pixel = behind;
            }
            (info, gst::Buffer::from_slice(bytes))
        });
        for format in VideoFormat::iter_raw() {
            let info = VideoInfo::builder(format, width, height).build().unwrap();
            let [one, other] = [&yellow, &blue].map(|(rgb, source)| {
                let packed = convert(rgb, source, &info);
                look(&info, &packed, (inside as u32, height), None)
            });
            let off = one.iter().zip(&other).map(|(a, b)| a.abs_diff(*b));
            let off = off.max().unwrap();
            assert!(off < 18, "{format}: off by {off}");
        }
    }
}
