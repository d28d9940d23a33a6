//! Weights in blocks of 32 with a common scale, packed sixteen rows beside each other.

use bytemuck::{Pod, Zeroable};

use super::lanes::{LANES, Lanes, PAIR, QUAD};

/// Values of a row with a common scale.
pub(crate) const BLOCK: usize = 32;
pub(super) const PAIRS: usize = BLOCK / PAIR;
pub(super) const QUADS: usize = BLOCK / QUAD;

/// A block of each of sixteen rows of weights.
pub(crate) trait Block: Pod + Send + Sync {
    /// Rows of words whose products are summed at once: as many as there are registers for.
    const ROWS: usize;

    fn scales<L: Lanes>(&self, l: L) -> L::Float;

    /// Sums of what some rows of activations give with it; `totals` are the sums of each row's.
    fn products<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[i16; BLOCK]; ROWS],
        totals: [i32; ROWS],
    ) -> [L::Int; ROWS];

    /// The same in 16 bits, which many rows are multiplied with in less time; `None` if it is so already.
    fn widen<L: Lanes>(&self, l: L) -> Option<Block16>;
}

/// A block whose rows ggml has in bytes: a scale of half precision, then the weights.
pub(crate) trait Stored: Block {
    fn set(&mut self, row: usize, scale: u16, weights: &[u8]);

    /// Sums of what some rows of activations, up to 127, give with it.
    ///
    /// `QUADS` comes as `quads`: told that it is constant, compilers unroll the loop, put rows before weights
    /// and run out of registers.
    fn byte_products<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[u8; BLOCK]; ROWS],
        quads: usize,
    ) -> [L::Int; ROWS];
}

/// 8 bits a weight, scales of half precision.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(32))]
pub(crate) struct Block8 {
    scales: [u16; LANES],
    weights: [[[i8; QUAD]; LANES]; QUADS],
}

impl Block for Block8 {
    const ROWS: usize = 2;

    #[inline(always)]
    fn scales<L: Lanes>(&self, l: L) -> L::Float {
        l.load_f16(&self.scales)
    }

    #[inline(always)]
    fn products<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[i16; BLOCK]; ROWS],
        _: [i32; ROWS],
    ) -> [L::Int; ROWS] {
        let mut parts = [l.no_parts(); ROWS];
        for (i, weights) in self.weights.iter().enumerate() {
            let weights = l.widen(weights);
            for (parts, x) in parts.iter_mut().zip(x) {
                *parts = l.dot_fours(*parts, l.four(x.as_chunks().0[i]), weights);
            }
        }
        let mut sums = [l.splat_int(0); ROWS];
        for (sum, parts) in sums.iter_mut().zip(parts) {
            *sum = l.whole(parts);
        }
        sums
    }

    #[inline(always)]
    fn widen<L: Lanes>(&self, l: L) -> Option<Block16> {
        let mut wide = Block16::zeroed();
        l.store(self.scales(l), &mut wide.scales);
        for (weights, to) in self.weights.iter().zip(wide.weights.as_chunks_mut().0) {
            let [first, last] = l.split(l.widen(weights));
            let [to_first, to_last] = to;
            l.store_pairs(first, to_first);
            l.store_pairs(last, to_last);
        }
        Some(wide)
    }
}

impl Stored for Block8 {
    fn set(&mut self, row: usize, scale: u16, weights: &[u8]) {
        self.scales[row] = scale;
        for (i, weight) in weights.iter().enumerate() {
            self.weights[i / QUAD][row][i % QUAD] = weight.cast_signed();
        }
    }

    #[inline(always)]
    fn byte_products<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[u8; BLOCK]; ROWS],
        quads: usize,
    ) -> [L::Int; ROWS] {
        let mut sums = [l.splat_int(0); ROWS];
        for i in 0..quads {
            let i = i % QUADS;
            let weights = l.quads(&self.weights[i]);
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum = l.dot_quads(*sum, l.quad(x.as_chunks().0[i]), weights);
            }
        }
        sums
    }
}

/// 4 bits a weight, 8 standing for 0: in each byte one of the first half of the block, and one of the second.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(32))]
pub(crate) struct Block4 {
    scales: [u16; LANES],
    weights: [[[u8; QUAD]; LANES]; QUADS / 2],
}

impl Block for Block4 {
    const ROWS: usize = 2;

    #[inline(always)]
    fn scales<L: Lanes>(&self, l: L) -> L::Float {
        l.load_f16(&self.scales)
    }

    #[inline(always)]
    fn products<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[i16; BLOCK]; ROWS],
        totals: [i32; ROWS],
    ) -> [L::Int; ROWS] {
        let mut parts = [l.no_parts(); ROWS];
        for (i, weights) in self.weights.iter().enumerate() {
            let [low, high] = l.nibbles(weights);
            for (parts, x) in parts.iter_mut().zip(x) {
                let x = x.as_chunks().0;
                *parts = l.dot_fours(*parts, l.four(x[i]), low);
                *parts = l.dot_fours(*parts, l.four(x[i + QUADS / 2]), high);
            }
        }
        // Each weight was taken for 8 more.
        let mut sums = [l.splat_int(0); ROWS];
        for (sum, (parts, total)) in sums.iter_mut().zip(parts.into_iter().zip(totals)) {
            *sum = l.sub_int(l.whole(parts), l.splat_int(8 * total));
        }
        sums
    }

    #[inline(always)]
    fn widen<L: Lanes>(&self, l: L) -> Option<Block16> {
        let mut wide = Block16::zeroed();
        l.store(self.scales(l), &mut wide.scales);
        let (low, high) = wide.weights.split_at_mut(PAIRS / 2);
        let to = low.as_chunks_mut().0.iter_mut().zip(high.as_chunks_mut().0);
        for (weights, (low, high)) in self.weights.iter().zip(to) {
            for (nibbles, to) in l.nibbles(weights).into_iter().zip([low, high]) {
                let [first, last] = l.split(nibbles);
                let [to_first, to_last] = to;
                l.store_pairs(first, to_first);
                l.store_pairs(last, to_last);
            }
        }
        for weight in wide.weights.as_flattened_mut().as_flattened_mut() {
            *weight -= 8;
        }
        Some(wide)
    }
}

impl Stored for Block4 {
    fn set(&mut self, row: usize, scale: u16, weights: &[u8]) {
        self.scales[row] = scale;
        for (i, weight) in weights.iter().enumerate() {
            self.weights[i / QUAD][row][i % QUAD] = *weight;
        }
    }

    #[inline(always)]
    fn byte_products<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[u8; BLOCK]; ROWS],
        quads: usize,
    ) -> [L::Int; ROWS] {
        let mut sums = [l.splat_int(0); ROWS];
        for i in 0..quads / 2 {
            let i = i % (QUADS / 2);
            let [low, high] = l.nibble_quads(&self.weights[i]);
            for (sum, x) in sums.iter_mut().zip(x) {
                let x = x.as_chunks().0;
                *sum = l.dot_quads(*sum, l.quad(x[i]), low);
                *sum = l.dot_quads(*sum, l.quad(x[i + QUADS / 2]), high);
            }
        }
        sums
    }
}

/// 12 bits a weight.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(32))]
pub(crate) struct Block16 {
    pub(crate) scales: [f32; LANES],
    pub(crate) weights: [[[i16; PAIR]; LANES]; PAIRS],
}

impl Block for Block16 {
    const ROWS: usize = 6;

    #[inline(always)]
    fn scales<L: Lanes>(&self, l: L) -> L::Float {
        l.load(&self.scales)
    }

    #[inline(always)]
    fn products<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[i16; BLOCK]; ROWS],
        _: [i32; ROWS],
    ) -> [L::Int; ROWS] {
        let mut sums = [l.splat_int(0); ROWS];
        // In two loops: the end of one of 16 would be guessed wrong, once a block.
        for quarter in 0..4 {
            let at = quarter * PAIRS / 4;
            for i in [at, at + 1, at + 2, at + 3] {
                let weights = l.pairs(&self.weights[i]);
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum = l.dot_pairs(*sum, l.pair(x.as_chunks().0[i]), weights);
                }
            }
        }
        sums
    }

    #[inline(always)]
    fn widen<L: Lanes>(&self, _: L) -> Option<Block16> {
        None
    }
}

/// Rows of weights, sixteen at a time, block by block.
#[derive(Debug, Clone)]
pub(crate) struct Packed<B> {
    blocks: Vec<B>,
    rows: usize,
    /// Of a row.
    length: usize,
}

impl<B: Block> Packed<B> {
    /// All zeros. `length` is that of a row, in whole blocks.
    pub(crate) fn new(rows: usize, length: usize) -> Self {
        assert!(length.is_multiple_of(BLOCK) && length > 0);
        let blocks = rows.div_ceil(LANES) * (length / BLOCK);
        Self {
            blocks: vec![B::zeroed(); blocks],
            rows,
            length,
        }
    }

    /// Of rows as ggml has them, one after the other; `None` if a scale is no number.
    pub(crate) fn pack<'a>(
        rows: usize,
        length: usize,
        bytes: impl IntoIterator<Item = &'a [u8]>,
    ) -> Option<Self>
    where
        B: Stored,
    {
        let mut packed = Self::new(rows, length);
        for (row, bytes) in bytes.into_iter().enumerate() {
            let panel = packed.panel_mut(row / LANES);
            let stored = bytes.chunks_exact(bytes.len() / panel.len());
            for (block, stored) in panel.iter_mut().zip(stored) {
                let (scale, weights) = stored.split_first_chunk()?;
                let scale = u16::from_le_bytes(*scale);
                if !half::f16::from_bits(scale).is_finite() {
                    return None;
                }
                block.set(row % LANES, scale, weights);
            }
        }
        Some(packed)
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn length(&self) -> usize {
        self.length
    }

    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// The blocks of sixteen rows, from the first value to the last.
    pub(super) fn panel(&self, panel: usize) -> &[B] {
        let blocks = self.length / BLOCK;
        &self.blocks[panel * blocks..][..blocks]
    }

    pub(crate) fn panel_mut(&mut self, panel: usize) -> &mut [B] {
        let blocks = self.length / BLOCK;
        &mut self.blocks[panel * blocks..][..blocks]
    }
}
