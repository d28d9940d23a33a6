//! Layout of a picture's planes and rows in its buffer.

use gst::glib;
use gst_video::{VideoFormat, VideoFormatInfo, VideoInfo, VideoMeta};

/// The part of a buffer that is the picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    /// Width and height of the buffer.
    pub(crate) size: (u32, u32),
    /// Left, top, width and height of the picture.
    pub(crate) crop: (u32, u32, u32, u32),
}

impl Window {
    pub(crate) fn whole(info: &VideoInfo) -> Self {
        let size = (info.width(), info.height());
        Self {
            size,
            crop: (0, 0, size.0, size.1),
        }
    }

    fn of(
        buffer: &gst::BufferRef,
        meta: Option<&VideoMeta>,
        info: &VideoInfo,
    ) -> Result<Self, glib::BoolError> {
        let whole = Self::whole(info);
        let crop = buffer.meta::<gst_video::VideoCropMeta>();
        let window = Self {
            size: meta.map_or(whole.size, |meta| (meta.width(), meta.height())),
            crop: crop.map_or(whole.crop, |meta| meta.rect()),
        };
        let (left, top, width, height) = window.crop;
        let fits = |start: u32, length: u32, size| {
            length > 0 && start.checked_add(length).is_some_and(|end| end <= size)
        };
        if !fits(left, width, window.size.0) || !fits(top, height, window.size.1) {
            return Err(glib::bool_error!(
                "the picture, {width}x{height} at {left},{top}, is not inside its buffer of {}x{}",
                window.size.0,
                window.size.1
            ));
        }
        Ok(window)
    }
}

/// Checked layout of a buffer. GStreamer maps planes as a meta describes them, without checks.
#[derive(Debug)]
pub(crate) struct BufferLayout {
    pub(crate) window: Window,
    /// Rows that must be copied, because GStreamer can't map them.
    irregular: Option<Vec<Rows>>,
}

/// The rows of one plane.
#[derive(Clone, Copy, Debug)]
struct Rows {
    offset: i128,
    stride: i128,
    /// The bytes of a row without its padding.
    bytes: i128,
    /// The bytes that GStreamer reads of a row: all of the last group of samples.
    read: i128,
    count: i128,
}

impl BufferLayout {
    /// The layout of a buffer. Fails if a meta contradicts the caps or describes anything outside the buffer.
    pub(crate) fn of(buffer: &gst::BufferRef, info: &VideoInfo) -> Result<Self, glib::BoolError> {
        // GStreamer uses the meta with the lowest id.
        let metas = || buffer.iter_meta::<VideoMeta>();
        let meta = metas().min_by_key(|meta| meta.id());
        let window = Window::of(buffer, meta.as_deref(), info)?;
        let Some(meta) = meta else {
            // GStreamer checks the size.
            let rows = (0..info.n_planes() as usize).map(|plane| Rows::from_info(info, plane));
            let rows = rows.collect::<Option<Vec<_>>>().unwrap_or_default();
            let irregular = rows.iter().any(|rows| rows.end_early()).then_some(rows);
            return Ok(Self { window, irregular });
        };
        if meta.format() != info.format() {
            return Err(glib::bool_error!(
                "its meta says {}, but its caps say {}",
                meta.format(),
                info.format()
            ));
        }
        let planes = info.n_planes();
        if !(planes..=gst_video::VIDEO_MAX_PLANES as u32).contains(&meta.n_planes()) {
            return Err(glib::bool_error!(
                "its meta has {} planes, but {} has {planes}",
                meta.n_planes(),
                info.format()
            ));
        }
        let plain = VideoInfo::builder(info.format(), meta.width(), meta.height()).build()?;
        let rows = (0..planes as usize)
            .map(|plane| Rows::of((meta.offset()[plane], meta.stride()[plane]), plane, &plain));
        let rows = rows.collect::<Option<Vec<_>>>();
        let inside = rows.filter(|rows| rows.iter().all(|rows| rows.are_inside(buffer.size())));
        let Some(rows) = inside else {
            return Err(glib::bool_error!(
                "the rows that its meta describes are not inside its buffer"
            ));
        };
        let is_plain = metas().nth(1).is_none()
            && meta.n_planes() == planes
            && rows.iter().all(|rows| rows.are_plain(buffer));
        if is_plain {
            return Ok(Self {
                window,
                irregular: None,
            });
        }
        let room = |info: &VideoInfo| info.size() as u128;
        // There could be any number of overlapping rows.
        let is_too_large = room(&plain) > room(info) + 2 * buffer.size() as u128;
        // Tiles are copied as they are.
        let format = info.format_info();
        let is_other = format.is_tiled() && meta.stride() != plain.stride();
        if is_too_large || is_other {
            return Err(glib::bool_error!(
                "its meta describes {}x{} pixels in {} bytes, in rows that can't be copied",
                meta.width(),
                meta.height(),
                buffer.size()
            ));
        }
        let irregular = Some(rows);
        Ok(Self { window, irregular })
    }

    pub(crate) fn is_irregular(&self) -> bool {
        self.irregular.is_some()
    }

    /// Copies irregular rows to the layout of `plain`, the top row first.
    pub(crate) fn copy(
        &self,
        buffer: &gst::BufferRef,
        plain: &VideoInfo,
        copy: &mut gst::BufferRef,
    ) -> Result<(), glib::BoolError> {
        let from = buffer.map_readable()?;
        let mut to = copy.map_writable()?;
        for (plane, rows) in self.irregular.iter().flatten().enumerate() {
            let (offset, stride) = (plain.offset()[plane], plain.stride()[plane]);
            for y in 0..rows.count {
                let start = (rows.offset + y * rows.stride) as usize;
                let target = offset + y as usize * stride as usize;
                let bytes = rows.bytes as usize;
                let row = from.get(start..start + bytes);
                match row.zip(to.get_mut(target..target + bytes)) {
                    Some((row, target)) => target.copy_from_slice(row),
                    None => return Err(glib::bool_error!("its rows are longer than its buffer")),
                }
            }
        }
        Ok(())
    }
}

impl Rows {
    fn from_info(info: &VideoInfo, plane: usize) -> Option<Self> {
        Self::of((info.offset()[plane], info.stride()[plane]), plane, info)
    }

    /// `None` if there are fewer tiles than the picture needs.
    fn of((offset, stride): (usize, i32), plane: usize, plain: &VideoInfo) -> Option<Self> {
        let format = plain.format_info();
        let offset = offset as i128;
        let one = |bytes| Self {
            offset,
            stride: bytes,
            bytes,
            read: bytes,
            count: 1,
        };
        if format.is_tiled() {
            // The number of tiles from left to right, and from top to bottom.
            let tiles = |stride: i32| [stride & 0xffff, stride >> 16].map(i128::from);
            let ([across, down], [least_across, least_down]) =
                (tiles(stride), tiles(plain.stride()[plane]));
            let end = plain.offset().get(plane + 1).copied();
            let least = (end.unwrap_or(plain.size()) - plain.offset()[plane]) as i128;
            let least_tiles = (least_across * least_down).max(1);
            let of_tile = (least + least_tiles - 1) / least_tiles;
            return match (across, down) == (least_across, least_down) {
                true => Some(one(least)),
                false => (across >= least_across && down >= least_down)
                    .then(|| one(across * down * of_tile)),
            };
        }
        // All components of a plane have as many rows; a palette has none.
        let components = 0..format.n_components() as u8;
        let here = components.filter(|c| format.plane()[usize::from(*c)] == plane as u32);
        if format.has_palette() && plane == 1 {
            return Some(one(PALETTE));
        }
        let first = here.clone().next()?;
        let read = match format.pixel_stride()[usize::from(first)] == 0 {
            true => complex_bytes(&format, first, plain, plane),
            false => (here.map(|c| {
                let width = format.scale_width(c, plain.width());
                i128::from(width) * i128::from(format.pixel_stride()[usize::from(c)])
            }))
            .max()?,
        };
        Some(Self {
            offset,
            stride: stride.into(),
            // Rows of UYVP may end within the last of two pixels.
            bytes: read.min(plain.stride()[plane].into()),
            read,
            count: format.scale_height(first, plain.height()).into(),
        })
    }

    fn last(&self) -> i128 {
        self.offset + self.stride * (self.count - 1)
    }

    fn are_inside(&self, size: usize) -> bool {
        let last = self.last();
        last.min(self.offset) >= 0 && last.max(self.offset) + self.bytes <= size as i128
    }

    /// Whether the rows end before the bytes that GStreamer reads of them.
    fn end_early(&self) -> bool {
        self.stride < self.read
    }

    /// Whether the rows, with their padding, are in one piece of memory.
    fn are_plain(&self, buffer: &gst::BufferRef) -> bool {
        let end = self.offset + self.stride * self.count;
        if self.end_early() || end > buffer.size() as i128 {
            return false;
        }
        let memory = buffer.find_memory(self.offset as usize..end as usize);
        memory.is_some_and(|(pieces, _)| pieces.len() == 1)
    }
}

/// The bytes of a palette: 256 colours.
const PALETTE: i128 = 4 * 256;

/// The bytes of a row whose samples are packed in groups.
fn complex_bytes(format: &VideoFormatInfo, component: u8, plain: &VideoInfo, plane: usize) -> i128 {
    use VideoFormat::*;
    let width = format.scale_width(component, plain.width());
    // Chroma samples come in pairs.
    let samples = width << u32::from(plane == 1);
    let (of_group, bytes) = match format.format() {
        V210 => (6, 16),
        Uyvp => (2, 5),
        Iyu1 => (4, 6),
        Gray10Le32 | Nv1210le32 | Nv1610le32 => (3, 4),
        Nv1210le40 => (4, 5),
        // GStreamer's default.
        _ => return plain.stride()[plane].into(),
    };
    i128::from(samples.div_ceil(of_group)) * bytes
}

#[cfg(test)]
mod tests {
    use gst_video::{VideoCropMeta, VideoFrameFlags};

    use super::{
        super::downscale::{Downscaler, tests},
        *,
    };
    use vlmnarrate_engine::Picture;

    fn add_meta(
        buffer: &mut gst::Buffer,
        info: &VideoInfo,
        (width, height): (u32, u32),
        offset: &[usize],
        stride: &[i32],
    ) {
        let buffer = buffer.get_mut().unwrap();
        let flags = VideoFrameFlags::empty();
        VideoMeta::add_full(buffer, flags, info.format(), width, height, offset, stride).unwrap();
    }

    /// A buffer of several pieces of memory.
    fn in_pieces(bytes: &[u8], pieces: usize) -> gst::Buffer {
        let mut buffer = gst::Buffer::new();
        for piece in bytes.chunks(bytes.len().div_ceil(pieces).max(1)) {
            let memory = gst::Memory::from_slice(piece.to_vec());
            buffer.get_mut().unwrap().append_memory(memory);
        }
        buffer
    }

    fn picture(info: &VideoInfo, buffer: &gst::Buffer) -> Result<Picture, glib::BoolError> {
        Downscaler::new(info, (16, 16))?.picture(buffer, vec![])
    }

    /// Number of rows of a plane, 1 for a palette and for tiles.
    fn rows(info: &VideoInfo, plane: usize) -> usize {
        let format = info.format_info();
        let c = format.plane().iter().position(|p| *p == plane as u32);
        let c = c.filter(|_| !(format.is_tiled() || format.has_palette() && plane == 1));
        c.map_or(1, |c| format.scale_height(c as u8, info.height()) as usize)
    }

    /// Bottom up, in pieces, with a short last row, and all of these together.
    #[test]
    fn every_format_is_the_right_way_up() {
        gst::init().unwrap();
        for format in VideoFormat::iter_raw() {
            let (info, buffer) = tests::frame(format, (70, 38));
            let expected = picture(&info, &buffer).unwrap();
            let whole = Downscaler::new(&info, (70, 38))
                .unwrap()
                .picture(&buffer, vec![]);
            let whole = whole.unwrap();
            let map = buffer.map_readable().unwrap();
            for (flip, pad, pieces) in [(true, 0, 1), (true, 7, 3), (false, 5, 4), (false, 0, 2)] {
                let (mut bytes, mut offset, mut stride) = (vec![0; 3], vec![], vec![]);
                for plane in 0..info.n_planes() as usize {
                    let (start, rows) = (info.offset()[plane], rows(&info, plane));
                    let end = info.offset().get(plane + 1).copied().unwrap_or(map.len());
                    let row = match rows {
                        1 => end - start,
                        _ => info.stride()[plane] as usize,
                    };
                    let first = bytes.len();
                    for y in 0..rows {
                        let y = if flip { rows - 1 - y } else { y };
                        bytes.extend_from_slice(&map[start + y * row..][..row]);
                        bytes.extend(std::iter::repeat_n(0xa5, if rows > 1 { pad } else { 0 }));
                    }
                    let step = (row + pad) as i32;
                    (offset, stride) = match (rows, flip) {
                        (1, _) => (
                            [offset, vec![first]].concat(),
                            [stride, vec![info.stride()[plane]]].concat(),
                        ),
                        (_, true) => (
                            [offset, vec![first + (rows - 1) * (row + pad)]].concat(),
                            [stride, vec![-step]].concat(),
                        ),
                        _ => (
                            [offset, vec![first]].concat(),
                            [stride, vec![step]].concat(),
                        ),
                    };
                }
                if rows(&info, info.n_planes() as usize - 1) > 1 {
                    bytes.truncate(bytes.len() - pad);
                }
                let mut irregular = in_pieces(&bytes, pieces);
                add_meta(&mut irregular, &info, (70, 38), &offset, &stride);
                let actual = picture(&info, &irregular).unwrap();
                assert!(actual.rgb == expected.rgb, "{format} {flip} {pad} {pieces}");
                let actual = Downscaler::new(&info, (70, 38))
                    .unwrap()
                    .picture(&irregular, vec![]);
                assert!(
                    actual.unwrap().rgb == whole.rgb,
                    "{format} {flip} {pad} {pieces}"
                );
            }
        }
    }

    /// A copy with regular rows, sample by sample; `None` if a sample is outside the buffer.
    fn plain_copy(info: &VideoInfo, buffer: &gst::Buffer) -> Option<(VideoInfo, gst::Buffer)> {
        let meta = buffer.meta::<VideoMeta>()?;
        let plain = VideoInfo::builder(info.format(), meta.width(), meta.height());
        let plain = plain.build().ok()?;
        let format = info.format_info();
        let from = buffer.map_readable().ok()?;
        let mut bytes = vec![0; plain.size()];
        for c in 0..format.n_components() as usize {
            let (plane, pixel) = (
                format.plane()[c] as usize,
                format.pixel_stride()[c] as usize,
            );
            let width = format.scale_width(c as u8, plain.width()) as usize * pixel;
            for y in 0..format.scale_height(c as u8, plain.height()) as usize {
                let start =
                    meta.offset()[plane] as i128 + y as i128 * i128::from(meta.stride()[plane]);
                let start = usize::try_from(start).ok()?;
                let row = from.get(start..start.checked_add(width)?)?;
                let target = plain.offset()[plane] + y * plain.stride()[plane] as usize;
                bytes[target..][..width].copy_from_slice(row);
            }
        }
        let mut copy = gst::Buffer::from_slice(bytes);
        let fresh = copy.get_mut().unwrap();
        let crop = buffer.meta::<VideoCropMeta>();
        let seen = (0, 0, info.width(), info.height());
        VideoCropMeta::add(fresh, crop.map_or(seen, |crop| crop.rect()));
        add_meta(
            &mut copy,
            &plain,
            (plain.width(), plain.height()),
            plain.offset(),
            plain.stride(),
        );
        Some((plain, copy))
    }

    /// With random metas.
    #[test]
    fn nothing_outside_the_buffer_is_read() {
        gst::init().unwrap();
        let mut rng = fastrand::Rng::with_seed(22);
        let formats = VideoFormat::iter_raw().collect::<Vec<_>>();
        let (mut seen, mut refused) = (0, 0);
        for _ in 0..4000 {
            let format = formats[rng.usize(..formats.len())];
            let builder = VideoInfo::builder(format, rng.u32(1..40), rng.u32(1..40));
            let info = builder.build().unwrap();
            let size = match rng.u8(..8) {
                0 => (u32::MAX, 1 << 31),
                1 => (rng.u32(..), rng.u32(1..50)),
                2 => (rng.u32(..50), rng.u32(..50)),
                3 => (info.width() + rng.u32(..9), info.height() + rng.u32(..9)),
                _ => (info.width(), info.height()),
            };
            let plain = VideoInfo::builder(format, size.0, size.1).build();
            let plain = plain.ok().filter(|plain| plain.size() < 1 << 20);
            let plain = plain.unwrap_or(info.clone());
            let length = match rng.u8(..4) {
                0 => rng.usize(1..2 * info.size()),
                _ => plain.size() + rng.usize(..99),
            };
            let bytes = std::iter::repeat_with(|| rng.u8(..))
                .take(length)
                .collect::<Vec<_>>();
            let mut offset = plain.offset().to_vec();
            let mut stride = plain.stride().to_vec();
            for plane in 0..offset.len() {
                let rows = rows(&plain, plane);
                match rng.u8(..12) {
                    0 => offset[plane] = rng.usize(..length),
                    1 => offset[plane] = rng.usize(..),
                    2 => stride[plane] = rng.i32(..),
                    3 => stride[plane] = rng.i32(-9..9),
                    4 => stride[plane] = rng.i32(-200..200),
                    5 | 6 if rows > 1 => {
                        offset[plane] += (rows - 1) * stride[plane] as usize;
                        stride[plane] = -stride[plane];
                    }
                    7 if rows > 1 => stride[plane] -= rng.i32(..5),
                    _ => (),
                }
            }
            if rng.u8(..20) == 0 {
                let planes = rng.usize(..5);
                offset.resize(planes, 0);
                stride.resize(planes, 4);
            }
            let mut buffer = in_pieces(&bytes, rng.usize(1..4));
            let mut meta_info = info.clone();
            if rng.u8(..20) == 0 {
                let other = formats[rng.usize(..formats.len())];
                meta_info = VideoInfo::builder(other, 8, 8).build().unwrap();
            }
            for _ in 0..1 + rng.u8(..20) / 19 {
                add_meta(&mut buffer, &meta_info, size, &offset, &stride);
            }
            if rng.u8(..6) == 0 {
                let crop = std::array::from_fn::<_, 4, _>(|_| rng.u32(..50));
                let fresh = buffer.get_mut().unwrap();
                VideoCropMeta::add(fresh, (crop[0] / 4, crop[1] / 4, crop[2], crop[3]));
            }
            let picture_of = |info: &VideoInfo, buffer: &gst::Buffer| {
                let side = if rng.clone().bool() {
                    (16, 16)
                } else {
                    (info.width(), info.height())
                };
                Downscaler::new(info, side).unwrap().picture(buffer, vec![])
            };
            let Ok(picture) = picture_of(&info, &buffer) else {
                refused += 1;
                continue;
            };
            seen += 1;
            let format = info.format_info();
            if format.is_tiled() || format.has_palette() || format.pixel_stride().contains(&0) {
                continue;
            }
            let (_, copy) = plain_copy(&info, &buffer).unwrap();
            let expected = picture_of(&info, &copy).unwrap();
            assert!(
                picture.rgb == expected.rgb,
                "{} {}x{} {size:?} {offset:?} {stride:?}",
                info.format(),
                info.width(),
                info.height()
            );
        }
        assert!(seen > 500 && refused > 500, "{seen} {refused}");
    }
}
