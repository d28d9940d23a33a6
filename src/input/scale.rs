//! Scales planes of pixels.
//!
//! A general converter first unpacks every pixel of a large frame. This one reads each byte in place and multiplies it at
//! most a few times: rows are scaled first, as bytes of any meaning, and only the rows that are left are separated into
//! components.

use std::ops::Range;

/// Sums of the weights of rows and of columns. A byte times the first fits 16 bits, and so does the upper half of such a
/// sum times the second.
const ROWS_ONE: u32 = 1 << 8;
const COLUMNS_ONE: u32 = u16::MAX as u32;

/// Part of an axis that is scaled, and the number of samples to which it is scaled.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Start and length in samples, with fractions.
    pub start: f64,
    pub length: f64,
    /// Samples that may be read, at least one. Those beyond count as the nearest of them.
    pub inside: Range<usize>,
    pub out: usize,
}

/// The taps of each sample of a scaled axis: linear, with as many taps as the ratio needs, so that nothing aliases.
#[derive(Clone, Debug)]
struct Axis(Vec<Taps>);

#[derive(Clone, Debug)]
struct Taps {
    /// The first sample.
    first: usize,
    weights: Vec<u16>,
}

impl Axis {
    fn new(span: &Span, one: u32) -> Self {
        let ratio = span.length / span.out as f64;
        let centre = |i: usize| span.start + (i as f64 + 0.5) * ratio - 0.5;
        let taps = (0..span.out).map(|i| Taps::new(centre(i), ratio.max(1.0), &span.inside, one));
        Self(taps.collect())
    }

    /// The samples that are read.
    fn inside(&self) -> Range<usize> {
        let starts = self.0.iter().map(|taps| taps.first);
        let ends = self.0.iter().map(|taps| taps.first + taps.weights.len());
        starts.min().unwrap_or(0)..ends.max().unwrap_or(0)
    }
}

impl Taps {
    fn new(centre: f64, reach: f64, inside: &Range<usize>, one: u32) -> Self {
        let nearest = |at: f64| (at.max(0.0) as usize).clamp(inside.start, inside.end - 1);
        let (from, to) = ((centre - reach).ceil(), (centre + reach).floor());
        let first = nearest(from);
        let mut shares = vec![0.0; nearest(to) - first + 1];
        for at in from as i64..=to as i64 {
            let share = 1.0 - (at as f64 - centre).abs() / reach;
            shares[nearest(at as f64) - first] += share.max(0.0);
        }
        // The running sum is rounded, not the shares, so that they add up to one and the error at an edge stays below
        // half a step.
        let whole = shares.iter().sum::<f64>();
        let (mut sum, mut rounded) = (0.0, 0);
        let weights = shares.iter().map(|share| {
            sum += share;
            let before = std::mem::replace(&mut rounded, (sum / whole * f64::from(one)) as u32);
            (rounded - before) as u16
        });
        Self {
            first,
            weights: weights.collect(),
        }
    }
}

/// Format of the samples of a plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sample {
    Byte,
    /// A little-endian word of which the lowest bits, 8 to 16, are used.
    Word(u32),
}

/// One of the components that share the rows of a plane.
#[derive(Clone, Debug)]
pub struct Component {
    /// Offset of the first sample in a row, in bytes.
    pub offset: usize,
    /// Distance of two samples, in bytes.
    pub pixel_stride: usize,
    pub columns: Span,
    /// Index of the target.
    pub target: usize,
}

/// Output plane of a scaled component.
pub struct Target<'a> {
    pub bytes: &'a mut [u8],
    pub stride: usize,
    pub sample: Sample,
}

/// Scales the components of one plane.
#[derive(Clone, Debug)]
pub struct Plane {
    sample: Sample,
    rows: Axis,
    last_row: usize,
    passes: Vec<Pass>,
    /// The bytes of a row that are read.
    bytes: Range<usize>,
    /// Weighted sums of bytes.
    byte_sums: Vec<u16>,
    /// Weighted sums of words, if the samples are words.
    word_sums: Vec<u16>,
}

impl Plane {
    /// `None` if there are not 1 to 4 samples per pixel.
    pub fn new(sample: Sample, rows: &Span, components: &[Component]) -> Option<Self> {
        let size = match sample {
            Sample::Byte => 1,
            Sample::Word(_) => 2,
        };
        let mut passes = Vec::<Pass>::new();
        for component in components {
            let Component {
                offset,
                pixel_stride,
                columns,
                target,
            } = component;
            let step = pixel_stride / size;
            let out = Out {
                offset: offset / size,
                target: *target,
            };
            if offset % size != 0 || pixel_stride % size != 0 || out.offset >= step {
                return None;
            }
            let same = |pass: &&mut Pass| pass.step == step && pass.span == *columns;
            match passes.iter_mut().find(same) {
                Some(pass) => pass.outs.push(out),
                None => passes.push(Pass::new(step, columns, out)?),
            }
        }
        let start = passes.iter().map(|pass| pass.samples.start).min()?;
        let end = passes.iter().map(|pass| pass.samples.end).max()?;
        for pass in &mut passes {
            pass.skip = pass.samples.start - start;
        }
        let bytes = start * size..end * size;
        // With a few more for lanes of weight 0.
        let words = (size == 2).then_some(end - start + MOST_LANES);
        let rows = Axis::new(rows, ROWS_ONE);
        Some(Self {
            sample,
            last_row: rows.inside().end - 1,
            rows,
            passes,
            byte_sums: vec![0; bytes.len() + MOST_LANES],
            word_sums: vec![0; words.unwrap_or(0)],
            bytes,
        })
    }

    /// Minimum size of a plane in bytes; `None` on overflow.
    pub fn size(&self, stride: usize) -> Option<usize> {
        let rows = self.last_row.checked_mul(stride)?;
        rows.checked_add(self.bytes.end)
    }

    /// Scales each component to its target, which must have room for it.
    ///
    /// # Panics
    ///
    /// If `plane` is shorter than [`size`](Self::size), or a target is too small.
    pub fn scale(&mut self, plane: &[u8], stride: usize, targets: &mut [Target<'_>]) {
        for (y, taps) in self.rows.0.iter().enumerate() {
            let rows = &plane[taps.first * stride + self.bytes.start..];
            let sums = &mut self.byte_sums[..self.bytes.len()];
            sum_rows(rows, stride, &taps.weights, sums);
            let sums = match self.sample {
                Sample::Byte => &self.byte_sums,
                Sample::Word(bits) => {
                    join(sums, bits, &mut self.word_sums);
                    &self.word_sums
                }
            };
            for pass in &mut self.passes {
                pass.run(sums, y, targets);
            }
        }
    }
}

/// Weighted sum of rows of bytes.
fn sum_rows(rows: &[u8], stride: usize, weights: &[u16], sums: &mut [u16]) {
    /// Bytes whose sums fit the registers of any processor.
    const BLOCK: usize = 64;
    // The sums can't overflow, and checks would be slow.
    let add = |sum: &mut u16, byte: u8, weight: u16| {
        *sum = sum.wrapping_add(u16::from(byte).wrapping_mul(weight));
    };
    let (blocks, rest) = sums.as_chunks_mut::<BLOCK>();
    let mut start = 0;
    for block in blocks {
        let mut sum = [0; BLOCK];
        for (row, weight) in weights.iter().enumerate() {
            let bytes = &rows[row * stride + start..][..BLOCK];
            for (sum, byte) in sum.iter_mut().zip(bytes) {
                add(sum, *byte, *weight);
            }
        }
        *block = sum;
        start += BLOCK;
    }
    rest.fill(0);
    for (row, weight) in weights.iter().enumerate() {
        for (sum, byte) in rest.iter_mut().zip(&rows[row * stride + start..]) {
            add(sum, *byte, *weight);
        }
    }
}

/// Sums of words from those of their low and high bytes, in units of 1/256 of the range of a byte.
fn join(bytes: &[u16], bits: u32, words: &mut [u16]) {
    for (word, [low, high]) in words.iter_mut().zip(bytes.as_chunks::<2>().0) {
        let sum = u32::from(*low) + (u32::from(*high) << 8);
        // Unused upper bits may be set.
        *word = (sum >> (bits - 8)).min(u16::MAX.into()) as u16;
    }
}

/// Maximum number of samples that are weighted at once.
const MOST_LANES: usize = 24;

/// Taps of one pixel of a scaled row.
#[derive(Clone, Debug)]
struct Column {
    first: usize,
    /// One for each sample of a pixel, with zeros to fill the lanes.
    weights: Vec<u16>,
    /// Mean loss from rounding the products down.
    lost: u16,
}

/// Scales a row of samples of all components at once.
type Weigh = fn(&[Column], &[u16], &mut [u16]);

/// Scales the components of a row that have the same step and span.
#[derive(Clone, Debug)]
struct Pass {
    /// Distance of two pixels, in samples.
    step: usize,
    span: Span,
    /// Samples of a row that are read, and their offset from the first that any pass reads.
    samples: Range<usize>,
    skip: usize,
    columns: Vec<Column>,
    weigh: Weigh,
    /// A scaled row.
    pixels: Vec<u16>,
    outs: Vec<Out>,
}

/// A component of the scaled pixels.
#[derive(Clone, Debug)]
struct Out {
    offset: usize,
    target: usize,
}

impl Pass {
    fn new(step: usize, span: &Span, out: Out) -> Option<Self> {
        let (lanes, weigh): (_, Weigh) = match step {
            1 => (16, weigh_one),
            2 => (16, weigh::<2, 16>),
            3 => (MOST_LANES, weigh::<3, MOST_LANES>),
            4 => (16, weigh::<4, 16>),
            _ => return None,
        };
        let axis = Axis::new(span, COLUMNS_ONE);
        let inside = axis.inside();
        let columns = axis.0.into_iter().map(|taps| {
            // Limited, so that white does not overflow to black.
            let lost = (taps.weights.len() / 2).min(127) as u16;
            let of_pixel = |weight| std::iter::repeat_n(weight, step);
            let mut weights = taps
                .weights
                .into_iter()
                .flat_map(of_pixel)
                .collect::<Vec<_>>();
            weights.resize(weights.len().next_multiple_of(lanes), 0);
            Column {
                first: (taps.first - inside.start) * step,
                weights,
                lost,
            }
        });
        Some(Self {
            step,
            span: span.clone(),
            samples: inside.start * step..inside.end * step,
            skip: 0,
            columns: columns.collect(),
            weigh,
            pixels: vec![0; span.out * step],
            outs: vec![out],
        })
    }

    fn run(&mut self, sums: &[u16], y: usize, targets: &mut [Target<'_>]) {
        (self.weigh)(&self.columns, &sums[self.skip..], &mut self.pixels);
        for out in &self.outs {
            let target = &mut targets[out.target];
            let bytes = &mut target.bytes[y * target.stride..];
            let values = self.pixels[out.offset..].iter().step_by(self.step);
            match target.sample {
                Sample::Byte => {
                    for (byte, value) in bytes.iter_mut().zip(values) {
                        *byte = (value.saturating_add(1 << 7) >> 8) as u8;
                    }
                }
                Sample::Word(bits) => {
                    let half = (1 << (16 - bits)) >> 1;
                    for (word, value) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                        *word = (value.saturating_add(half) >> (16 - bits)).to_le_bytes();
                    }
                }
            }
        }
    }
}

/// Scales pixels of one sample, in a form that the compiler vectorizes.
fn weigh_one(columns: &[Column], sums: &[u16], pixels: &mut [u16]) {
    for (column, pixel) in columns.iter().zip(pixels) {
        let sums = &sums[column.first..];
        let products = (column.weights.iter().zip(sums)).map(|(weight, sum)| upper(*weight, *sum));
        *pixel = products.fold(column.lost, u16::wrapping_add);
    }
}

/// The upper half of the product.
fn upper(weight: u16, sum: u16) -> u16 {
    ((u32::from(weight) * u32::from(sum)) >> 16) as u16
}

fn weigh<const STEP: usize, const LANES: usize>(
    columns: &[Column],
    sums: &[u16],
    pixels: &mut [u16],
) {
    for (column, pixel) in columns.iter().zip(pixels.as_chunks_mut::<STEP>().0) {
        let mut lanes = weigh_lanes::<LANES>(&column.weights, &sums[column.first..]);
        let mut width = LANES;
        while width > STEP {
            width /= 2;
            let (front, back) = lanes.split_at_mut(width);
            for (front, back) in front.iter_mut().zip(back) {
                *front = front.wrapping_add(*back);
            }
        }
        for (sample, lane) in pixel.iter_mut().zip(lanes) {
            *sample = lane.wrapping_add(column.lost);
        }
    }
}

/// A function of its own, so that the compiler keeps the lanes in vectors.
#[inline(never)]
fn weigh_lanes<const LANES: usize>(weights: &[u16], sums: &[u16]) -> [u16; LANES] {
    let mut lanes = [0u16; LANES];
    let weights = weights.as_chunks::<LANES>().0;
    for (weights, sums) in weights.iter().zip(sums.as_chunks::<LANES>().0) {
        for ((lane, weight), sum) in lanes.iter_mut().zip(weights).zip(sums) {
            *lane = lane.wrapping_add(upper(*weight, *sum));
        }
    }
    lanes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(length: usize, out: usize) -> Span {
        Span {
            start: 0.0,
            length: length as f64,
            inside: 0..length,
            out,
        }
    }

    /// Scales a plane of one component, its rows 3 bytes longer than they need be.
    fn scale(
        (width, height): (usize, usize),
        (out_width, out_height): (usize, usize),
        (pixel_stride, sample): (usize, Sample),
        value: impl Fn(usize, usize) -> u32,
    ) -> Vec<u8> {
        let size = if sample == Sample::Byte { 1 } else { 2 };
        let component = Component {
            offset: pixel_stride - size,
            pixel_stride,
            columns: span(width, out_width),
            target: 1,
        };
        let rows = span(height, out_height);
        let mut plane = Plane::new(sample, &rows, &[component]).unwrap();
        let stride = width * pixel_stride + 3;
        let mut bytes = vec![0xa5; stride * height];
        for y in 0..height {
            for x in 0..width {
                let at = y * stride + (x + 1) * pixel_stride - size;
                let value = value(x, y).to_le_bytes();
                match sample {
                    Sample::Byte => bytes[at] = value[0],
                    Sample::Word(_) => bytes[at..at + 2].copy_from_slice(&value[..2]),
                }
            }
        }
        bytes.truncate(plane.size(stride).unwrap());
        let mut out = vec![0; out_width * out_height];
        let mut targets = [
            Target {
                bytes: &mut [],
                stride: 0,
                sample: Sample::Byte,
            },
            Target {
                bytes: &mut out,
                stride: out_width,
                sample: Sample::Byte,
            },
        ];
        plane.scale(&bytes, stride, &mut targets);
        out
    }

    /// The same, computed from the definition.
    fn exact(
        (width, height): (usize, usize),
        (out_width, out_height): (usize, usize),
        value: impl Fn(usize, usize) -> f64,
    ) -> Vec<f64> {
        let weights = |length: usize, out: usize| {
            let ratio = length as f64 / out as f64;
            let taps = move |i: usize| {
                let centre = (i as f64 + 0.5) * ratio - 0.5;
                let reach = ratio.max(1.0);
                let mut weights = vec![0.0; length];
                let from = (centre - reach).ceil() as i64;
                for at in from..=(centre + reach).floor() as i64 {
                    let nearest = at.clamp(0, length as i64 - 1) as usize;
                    weights[nearest] += 1.0 - (at as f64 - centre).abs() / reach;
                }
                let sum = weights.iter().sum::<f64>();
                weights.iter().map(|w| w / sum).collect::<Vec<_>>()
            };
            (0..out).map(taps).collect::<Vec<_>>()
        };
        let (columns, rows) = (weights(width, out_width), weights(height, out_height));
        let mut out = vec![];
        for row in &rows {
            for column in &columns {
                let line = |y: usize| (0..width).map(|x| column[x] * value(x, y)).sum::<f64>();
                out.push((0..height).map(|y| row[y] * line(y)).sum());
            }
        }
        out
    }

    #[test]
    fn every_ratio_is_what_its_definition_says() {
        let mut rng = fastrand::Rng::with_seed(3);
        for _ in 0..20 {
            let mut side = || rng.usize(1..150);
            let (from, to) = ((side(), side()), (side(), side()));
            let noise = (0..from.0 * from.1).map(|_| rng.u8(..)).collect::<Vec<_>>();
            let value = |x, y| u32::from(noise[y * from.0 + x]);
            // Noise is the worst there is for weights that are rounded: it finds each of them.
            let limit = 1.0 + (from.1 as f64 / to.1 as f64).max(1.0).sqrt();
            let exact = exact(from, to, |x, y| value(x, y).into());
            for (stride, sample, up) in [
                (1, Sample::Byte, 0),
                (3, Sample::Byte, 0),
                (2, Sample::Word(10), 2),
                (4, Sample::Word(16), 8),
            ] {
                let scaled = scale(from, to, (stride, sample), |x, y| value(x, y) << up);
                for (scaled, exact) in scaled.iter().zip(&exact) {
                    let off = (f64::from(*scaled) - exact).abs();
                    assert!(
                        off <= limit,
                        "{from:?} to {to:?}, {sample:?}: {scaled} {exact}"
                    );
                }
            }
        }
    }

    /// However many samples are added up, and whatever bits are set that should not be.
    #[test]
    fn one_colour_stays_what_it_is() {
        for (length, out) in [(1, 2), (2, 2), (63, 2), (65, 64), (250, 2), (8192, 64)] {
            for value in [0, 1, 127, 254, 255] {
                for stride in 1..=4 {
                    let pixels = (stride, Sample::Byte);
                    let scaled = scale((length, 3), (out, 3), pixels, |_, _| value);
                    assert!(scaled.iter().all(|v| u32::from(*v) == value), "{length}");
                    let scaled = scale((3, length), (3, out), pixels, |_, _| value);
                    assert!(scaled.iter().all(|v| u32::from(*v) == value), "{length}");
                }
            }
            let scaled = scale((length, 3), (out, 3), (2, Sample::Word(10)), |_, _| 0xffff);
            assert!(scaled.iter().all(|v| *v == 255));
        }
    }
}
