//! Weights in blocks of 32 with a common scale, sixteen rows interleaved.
//!
//! As llama.cpp repacks them (`block_q8_0x8`, `block_q4_0x8`): one vector holds the same columns of sixteen rows.

use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;
use rayon::prelude::*;

use super::lanes::{Kernel, LANES, Lanes, PAIR, QUAD, dispatch};

/// Values of a row with a common scale.
pub const BLOCK: usize = 32;
/// Rows of activations in a tile where there are [`Lanes::MANY_REGISTERS`].
pub const MAX_TILE_ROWS: usize = 12;
/// Pairs in a block.
pub const PAIRS: usize = BLOCK / PAIR;
/// Fours in a block.
pub const QUADS: usize = BLOCK / QUAD;

/// Blocks of sixteen rows of weights that are multiplied with 16-bit activations, one behind the other.
///
/// A trait rather than a function that is passed: nothing else is sure to be compiled for the instruction set.
pub trait DotI16: Pod + Send + Sync {
    /// A scale for each row of weights.
    fn scales<L: Lanes>(&self, l: L) -> L::Float;

    /// Dot products with blocks of some rows of activations.
    fn dot_rows<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[i16; BLOCK]; ROWS],
    ) -> [L::Int; ROWS];
}

/// Blocks of sixteen rows of weights that can be read from a row format of ggml.
pub trait GgmlBlock: Pod + Send + Sync {
    /// Sets one row from a ggml block: the bits of its half-precision scale and the bytes of its weights.
    #[doc(hidden)]
    fn set_row(&mut self, row: usize, scale: u16, weights: &[u8]);
    /// Sets one row to what ggml makes of these values. Gives the scale.
    #[doc(hidden)]
    fn quantize_row(&mut self, row: usize, values: &[f32; BLOCK]) -> f32;
}

/// Q8_0 blocks of sixteen rows: signed 8 bits for each weight, scales in half precision.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(32))]
pub struct BlockQ8_0x16 {
    scales: [u16; LANES],
    weights: [[[i8; QUAD]; LANES]; QUADS],
}

impl DotI16 for BlockQ8_0x16 {
    #[inline(always)]
    fn scales<L: Lanes>(&self, l: L) -> L::Float {
        l.load_f16(&self.scales)
    }

    #[inline(always)]
    fn dot_rows<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[i16; BLOCK]; ROWS],
    ) -> [L::Int; ROWS] {
        let mut parts = [l.zero_partial(); ROWS];
        for (i, weights) in self.weights.iter().enumerate() {
            let weights = l.widen_quads(weights);
            for (parts, x) in parts.iter_mut().zip(x) {
                *parts = l.dot_i16_quads(*parts, l.splat_i16_quad(x.as_chunks().0[i]), weights);
            }
        }
        let mut sums = [l.splat_int(0); ROWS];
        for (sum, parts) in sums.iter_mut().zip(parts) {
            *sum = l.reduce_partial(parts);
        }
        sums
    }
}

impl GgmlBlock for BlockQ8_0x16 {
    #[inline(always)]
    fn set_row(&mut self, row: usize, scale: u16, weights: &[u8]) {
        self.scales[row] = scale;
        for (quad, weights) in self.weights.iter_mut().zip(weights.as_chunks().0) {
            let weights: [u8; QUAD] = *weights;
            quad[row] = bytemuck::cast(weights);
        }
    }

    #[inline(always)]
    fn quantize_row(&mut self, row: usize, values: &[f32; BLOCK]) -> f32 {
        let mut largest = 0.0f32;
        for x in values {
            largest = largest.max(x.abs());
        }
        let scale = largest / 127.0;
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        let mut bytes = [0; BLOCK];
        for (x, byte) in values.iter().zip(&mut bytes) {
            *byte = ((x * inverse).round() as i8).cast_unsigned();
        }
        self.set_row(row, half::f16::from_f32(scale).to_bits(), &bytes);
        scale
    }
}

impl BlockQ8_0x16 {
    /// The block in 16 bits, which is faster for many rows.
    #[inline(always)]
    pub fn to_i16<L: Lanes>(&self, l: L) -> BlockI16x16 {
        let mut wide = BlockI16x16::zeroed();
        l.store(l.load_f16(&self.scales), &mut wide.scales);
        for (weights, to) in self.weights.iter().zip(wide.weights.as_chunks_mut().0) {
            let [first, last] = l.split_pairs(l.widen_quads(weights));
            let [to_first, to_last] = to;
            l.store_pairs(first, to_first);
            l.store_pairs(last, to_last);
        }
        wide
    }

    /// Dot products with blocks of some rows of 16-bit activations whose bytes are [split](Lanes::SPLITS_I16): of fours,
    /// the first of each row, then the second of each, and so on, `stride` apart.
    ///
    /// `quads` is [`QUADS`] as a variable: with a constant, compilers unroll the loop, put rows before weights and run
    /// out of registers.
    #[inline(always)]
    pub(crate) fn dot_split_rows<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: &[[[u8; QUAD]; 2]],
        stride: usize,
        quads: usize,
    ) -> [L::Int; ROWS] {
        let mut low = [l.splat_int(0); ROWS];
        let mut high = [l.splat_int(0); ROWS];
        // The higher bytes are 128 too large.
        let mut excess = l.splat_int(0);
        for (weights, x) in self.weights[..quads].iter().zip(x.chunks(stride)) {
            let weights = l.load_quads(weights);
            let x: &[_; ROWS] = x.first_chunk().expect("as many rows");
            excess = l.dot_quads(excess, l.splat_quad([128; QUAD]), weights);
            // Bytes are read where they lie: as one number they would take the way through a register.
            for (row, [lower, higher]) in x.iter().enumerate() {
                low[row] = l.dot_quads(low[row], l.splat_quad(*lower), weights);
                high[row] = l.dot_quads(high[row], l.splat_quad(*higher), weights);
            }
        }
        for (low, high) in low.iter_mut().zip(high) {
            *low = l.join_bytes(l.sub_int(high, excess), *low);
        }
        low
    }
}

/// Q4_0 blocks of sixteen rows: 4 bits for each weight, 8 standing for 0, scales in half precision.
///
/// A byte holds a weight of the block's first half and one of its second half.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(32))]
pub struct BlockQ4_0x16 {
    scales: [u16; LANES],
    weights: [[[u8; QUAD]; LANES]; QUADS / 2],
}

impl GgmlBlock for BlockQ4_0x16 {
    #[inline(always)]
    fn set_row(&mut self, row: usize, scale: u16, weights: &[u8]) {
        self.scales[row] = scale;
        for (i, weight) in weights.iter().enumerate() {
            self.weights[i / QUAD][row][i % QUAD] = *weight;
        }
    }

    #[inline(always)]
    fn quantize_row(&mut self, row: usize, values: &[f32; BLOCK]) -> f32 {
        let (mut largest, mut signed) = (0.0f32, 0.0);
        for x in values {
            if x.abs() > largest {
                (largest, signed) = (x.abs(), *x);
            }
        }
        let scale = signed / -8.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let mut nibbles = [0; BLOCK];
        for (x, nibble) in values.iter().zip(&mut nibbles) {
            *nibble = ((x * inverse + 8.5) as u8).min(15);
        }
        let mut bytes = [0; BLOCK / 2];
        let (low, high) = nibbles.split_at(BLOCK / 2);
        for ((low, high), byte) in low.iter().zip(high).zip(&mut bytes) {
            *byte = low | (high << 4);
        }
        self.set_row(row, half::f16::from_f32(scale).to_bits(), &bytes);
        scale
    }
}

/// Blocks of sixteen rows of 4-bit weights, 8 standing for 0, that are multiplied with `i8` activations.
pub trait DotI8 {
    /// A scale for each row of weights.
    fn scales<L: Lanes>(&self, l: L) -> L::Float;

    /// Dot products with blocks of some rows of activations, each weight taken as larger by 8. `quads` is as for
    /// [`BlockQ8_0x16::dot_split_rows`].
    fn dot_i8_rows<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[i8; BLOCK]; ROWS],
        quads: usize,
    ) -> [L::NarrowSums; ROWS];
}

impl DotI8 for BlockQ4_0x16 {
    #[inline(always)]
    fn scales<L: Lanes>(&self, l: L) -> L::Float {
        l.load_f16(&self.scales)
    }

    #[inline(always)]
    fn dot_i8_rows<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[i8; BLOCK]; ROWS],
        quads: usize,
    ) -> [L::NarrowSums; ROWS] {
        let mut sums = [l.zero_narrow(); ROWS];
        for i in 0..quads / 2 {
            let i = i % (QUADS / 2);
            let [low, high] = l.unpack_nibbles(&self.weights[i]);
            for (sum, x) in sums.iter_mut().zip(x) {
                let x = x.as_chunks().0;
                *sum = l.dot_narrow(*sum, low, l.splat_signed_quad(x[i]));
                *sum = l.dot_narrow(*sum, high, l.splat_signed_quad(x[i + QUADS / 2]));
            }
        }
        sums
    }
}

/// A [`BlockQ4_0x16`] with a byte for each weight and scales in f32, for many rows.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(32))]
pub struct UnpackedQ4_0x16 {
    scales: [f32; LANES],
    weights: [[[i8; QUAD]; LANES]; QUADS],
}

impl UnpackedQ4_0x16 {
    #[inline(always)]
    pub fn new<L: Lanes>(l: L, block: &BlockQ4_0x16) -> Self {
        let mut unpacked = Self::zeroed();
        l.store(block.scales(l), &mut unpacked.scales);
        let (first, last) = unpacked.weights.split_at_mut(QUADS / 2);
        for (weights, (first, last)) in block.weights.iter().zip(first.iter_mut().zip(last)) {
            let [low, high] = l.unpack_nibbles(weights);
            l.store_quads(low, first);
            l.store_quads(high, last);
        }
        unpacked
    }
}

impl DotI8 for UnpackedQ4_0x16 {
    #[inline(always)]
    fn scales<L: Lanes>(&self, l: L) -> L::Float {
        l.load(&self.scales)
    }

    #[inline(always)]
    fn dot_i8_rows<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[i8; BLOCK]; ROWS],
        quads: usize,
    ) -> [L::NarrowSums; ROWS] {
        let mut sums = [l.zero_narrow(); ROWS];
        for i in 0..quads {
            let i = i % QUADS;
            let weights = l.load_quads(&self.weights[i]);
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum = l.dot_narrow(*sum, weights, l.splat_signed_quad(x.as_chunks().0[i]));
            }
        }
        sums
    }
}

/// Blocks of sixteen rows in 16 bits, with scales in f32.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(32))]
pub struct BlockI16x16 {
    pub scales: [f32; LANES],
    pub weights: [[[i16; PAIR]; LANES]; PAIRS],
}

impl DotI16 for BlockI16x16 {
    #[inline(always)]
    fn scales<L: Lanes>(&self, l: L) -> L::Float {
        l.load(&self.scales)
    }

    #[inline(always)]
    fn dot_rows<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[i16; BLOCK]; ROWS],
    ) -> [L::Int; ROWS] {
        let mut sums = [l.splat_int(0); ROWS];
        // Two loops: the end of one loop over 16 would be mispredicted in every block.
        for quarter in 0..4 {
            let at = quarter * PAIRS / 4;
            for i in [at, at + 1, at + 2, at + 3] {
                let weights = l.load_pairs(&self.weights[i]);
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum = l.dot_pairs(*sum, l.splat_pair(x.as_chunks().0[i]), weights);
                }
            }
        }
        sums
    }
}

/// Memory of blocks.
///
/// A model's weights are mapped, so that their memory goes back to the system when they are dropped. An allocator would
/// keep what lies below a piece that is still in use.
#[derive(Debug)]
pub(crate) enum Storage<B> {
    Heap(Vec<B>),
    Mapped(MmapMut),
}

impl<B: Pod> Storage<B> {
    /// Smaller pieces, such as the keys of one image, are short-lived.
    const MIN_MAPPED: usize = 256 << 10;

    pub(crate) fn zeroed(len: usize) -> Self {
        let bytes = len * size_of::<B>();
        match (bytes >= Self::MIN_MAPPED).then(|| MmapMut::map_anon(bytes)) {
            Some(Ok(pages)) => Self::Mapped(pages),
            _ => Self::Heap(vec![B::zeroed(); len]),
        }
    }

    pub(crate) fn all(&self) -> &[B] {
        match self {
            Self::Heap(blocks) => blocks,
            Self::Mapped(pages) => bytemuck::cast_slice(pages),
        }
    }

    pub(crate) fn all_mut(&mut self) -> &mut [B] {
        match self {
            Self::Heap(blocks) => blocks,
            Self::Mapped(pages) => bytemuck::cast_slice_mut(pages),
        }
    }
}

/// A weight matrix `[rows, columns]` in blocks `B` of sixteen rows.
///
/// Panels of sixteen rows follow each other, each with its blocks from the first column to the last.
#[derive(Debug)]
pub struct PackedWeights<B> {
    blocks: Storage<B>,
    rows: usize,
    columns: usize,
}

impl<B: Pod> PackedWeights<B> {
    /// A matrix of zeros. `columns` is in whole blocks.
    pub(crate) fn zeros(rows: usize, columns: usize) -> Self {
        assert!(columns.is_multiple_of(BLOCK) && columns > 0);
        let blocks = rows.div_ceil(LANES) * (columns / BLOCK);
        Self {
            blocks: Storage::zeroed(blocks),
            rows,
            columns,
        }
    }

    /// Packs rows of ggml's Q8_0 or Q4_0, one item of `bytes` for each row. `None` if a scale is not finite.
    ///
    /// # Panics
    ///
    /// If `columns` is zero or no multiple of 32, or if there are more rows than `rows`.
    pub fn from_ggml<'a>(
        rows: usize,
        columns: usize,
        bytes: impl IntoIterator<Item = &'a [u8]>,
    ) -> Option<Self>
    where
        B: GgmlBlock,
    {
        let mut packed = Self::zeros(rows, columns);
        for (row, bytes) in bytes.into_iter().enumerate() {
            let panel = packed.panel_mut(row / LANES);
            let stored = bytes.chunks_exact(bytes.len() / panel.len());
            for (block, stored) in panel.iter_mut().zip(stored) {
                let (scale, weights) = stored.split_first_chunk()?;
                let scale = u16::from_le_bytes(*scale);
                if !half::f16::from_bits(scale).is_finite() {
                    return None;
                }
                block.set_row(row % LANES, scale, weights);
            }
        }
        Some(packed)
    }

    /// Quantizes rows as ggml does, in parallel. `write` puts a row, by its number, to where it is told. `None` if a value
    /// or a scale is not finite.
    ///
    /// # Panics
    ///
    /// If `columns` is zero or no multiple of 32.
    pub fn quantize(
        rows: usize,
        columns: usize,
        write: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Option<Self>
    where
        B: GgmlBlock,
    {
        let mut packed = Self::zeros(rows, columns);
        let panels = packed
            .blocks
            .all_mut()
            .par_chunks_exact_mut(columns / BLOCK);
        let is_finite = panels.enumerate().all(|(i, panel)| {
            let mut values = vec![0.0; columns];
            (0..LANES.min(rows - i * LANES)).all(|row| {
                write(i * LANES + row, &mut values);
                dispatch(QuantizeRow {
                    values: &values,
                    row,
                    panel,
                })
            })
        });
        is_finite.then_some(packed)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// The blocks of sixteen rows, from the first column to the last.
    pub(crate) fn panel(&self, panel: usize) -> &[B] {
        let blocks = self.columns / BLOCK;
        &self.blocks.all()[panel * blocks..][..blocks]
    }

    pub(crate) fn panel_mut(&mut self, panel: usize) -> &mut [B] {
        let blocks = self.columns / BLOCK;
        &mut self.blocks.all_mut()[panel * blocks..][..blocks]
    }
}

/// Quantizes a row to its place in a panel. Gives whether all is finite.
struct QuantizeRow<'a, B> {
    values: &'a [f32],
    row: usize,
    panel: &'a mut [B],
}

impl<B: GgmlBlock> Kernel for QuantizeRow<'_, B> {
    type Output = bool;

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) -> bool {
        let mut is_finite = true;
        for (block, values) in self.panel.iter_mut().zip(self.values.as_chunks().0) {
            let scale = block.quantize_row(self.row, values);
            is_finite &= half::f16::from_f32(scale).is_finite() && all_finite(values);
        }
        is_finite
    }
}

/// Whether all values are finite, asked of all at once.
#[inline(always)]
pub(crate) fn all_finite(values: &[f32]) -> bool {
    // What is not finite is not 0 when it is multiplied with 0.
    let mut sum = 0.0;
    for x in values {
        sum += x * 0.0;
    }
    sum == 0.0
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// Bytes in memory that are this process's own.
    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1));
        kib.unwrap().parse::<usize>().unwrap() << 10
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs /proc")]
    fn dropped_weights_return_their_memory_to_the_system() {
        // glibc raises its mmap threshold when such a piece is freed: from then on they come from its heap.
        drop(std::hint::black_box(vec![1u8; 30 << 20]));
        let before = resident();
        let mut weights = Vec::new();
        let mut between = Vec::new();
        for _ in 0..64 {
            let mut packed = PackedWeights::<BlockQ8_0x16>::zeros(1024, 1024);
            for panel in 0..packed.panels() {
                packed.panel_mut(panel).fill(Zeroable::zeroed());
            }
            weights.push(packed);
            between.push(std::hint::black_box(vec![1u8; 1000]));
        }
        // Other tests may run beside this one.
        let held = resident().saturating_sub(before);
        assert!(held > 48 << 20, "{held}");
        drop(weights);
        let left = resident().saturating_sub(before);
        assert!(left < held / 2, "{left} of {held}");
    }
}
