//! Weights in blocks of 32 with a common scale, packed sixteen rows beside each other.

use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;

use super::lanes::{LANES, Lanes, PAIR, QUAD};

/// Values of a row with a common scale.
pub const BLOCK: usize = 32;
/// Rows that are multiplied at once where there are [`Lanes::MANY`] registers.
pub const MANY: usize = 12;
pub const PAIRS: usize = BLOCK / PAIR;
pub const QUADS: usize = BLOCK / QUAD;

/// A block of each of sixteen rows of weights, for words.
pub trait Block: Pod + Send + Sync {
    /// Rows of words whose products are summed at once: as many as there are registers for.
    fn rows<L: Lanes>() -> usize;

    fn scales<L: Lanes>(&self, l: L) -> L::Float;

    /// Sums of what some rows of activations give with it.
    fn products<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[i16; BLOCK]; ROWS],
    ) -> [L::Int; ROWS];

    /// The same in 16 bits, which many rows are multiplied with in less time; `None` if it is so already.
    fn widen<L: Lanes>(&self, l: L) -> Option<Block16>;
}

/// A block whose rows ggml has in bytes: a scale of half precision, then the weights.
pub trait Stored: Pod + Send + Sync {
    fn set(&mut self, row: usize, scale: u16, weights: &[u8]);
}

/// 8 bits a weight, scales of half precision.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(32))]
pub struct Block8 {
    scales: [u16; LANES],
    weights: [[[i8; QUAD]; LANES]; QUADS],
}

impl Block for Block8 {
    #[inline(always)]
    fn rows<L: Lanes>() -> usize {
        2
    }

    #[inline(always)]
    fn scales<L: Lanes>(&self, l: L) -> L::Float {
        l.load_f16(&self.scales)
    }

    #[inline(always)]
    fn products<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[i16; BLOCK]; ROWS],
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
}

impl Block8 {
    /// Sums of what some rows of activations, up to 127, give with it.
    ///
    /// `QUADS` comes as `quads`: told that it is constant, compilers unroll the loop, put rows before weights
    /// and run out of registers.
    #[inline(always)]
    pub fn byte_products<L: Lanes, const ROWS: usize>(
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
pub struct Block4 {
    scales: [u16; LANES],
    weights: [[[u8; QUAD]; LANES]; QUADS / 2],
}

impl Stored for Block4 {
    fn set(&mut self, row: usize, scale: u16, weights: &[u8]) {
        self.scales[row] = scale;
        for (i, weight) in weights.iter().enumerate() {
            self.weights[i / QUAD][row][i % QUAD] = *weight;
        }
    }
}

/// 4 bits a weight, 8 standing for 0: the products of a block with signed bytes fit 16.
pub trait Nibbles {
    fn scales<L: Lanes>(&self, l: L) -> L::Float;

    /// Sums of what some rows of activations give with it, each weight taken for 8 more. `quads` is `QUADS`, as
    /// for [`Block8::byte_products`].
    fn products<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[i8; BLOCK]; ROWS],
        quads: usize,
    ) -> [L::Narrow; ROWS];
}

impl Nibbles for Block4 {
    #[inline(always)]
    fn scales<L: Lanes>(&self, l: L) -> L::Float {
        l.load_f16(&self.scales)
    }

    #[inline(always)]
    fn products<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[i8; BLOCK]; ROWS],
        quads: usize,
    ) -> [L::Narrow; ROWS] {
        let mut sums = [l.no_narrow(); ROWS];
        for i in 0..quads / 2 {
            let i = i % (QUADS / 2);
            let [low, high] = l.nibbles(&self.weights[i]);
            for (sum, x) in sums.iter_mut().zip(x) {
                let x = x.as_chunks().0;
                *sum = l.dot_narrow(*sum, low, l.signed_quad(x[i]));
                *sum = l.dot_narrow(*sum, high, l.signed_quad(x[i + QUADS / 2]));
            }
        }
        sums
    }
}

/// A [`Block4`] with a byte a weight, for many rows.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(32))]
pub struct Unpacked4 {
    scales: [f32; LANES],
    weights: [[[i8; QUAD]; LANES]; QUADS],
}

impl Unpacked4 {
    #[inline(always)]
    pub fn new<L: Lanes>(l: L, block: &Block4) -> Self {
        let mut unpacked = Self::zeroed();
        l.store(block.scales(l), &mut unpacked.scales);
        let (first, last) = unpacked.weights.split_at_mut(QUADS / 2);
        for (weights, (first, last)) in block.weights.iter().zip(first.iter_mut().zip(last)) {
            let [low, high] = l.nibbles(weights);
            l.store_quads(low, first);
            l.store_quads(high, last);
        }
        unpacked
    }
}

impl Nibbles for Unpacked4 {
    #[inline(always)]
    fn scales<L: Lanes>(&self, l: L) -> L::Float {
        l.load(&self.scales)
    }

    #[inline(always)]
    fn products<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[i8; BLOCK]; ROWS],
        quads: usize,
    ) -> [L::Narrow; ROWS] {
        let mut sums = [l.no_narrow(); ROWS];
        for i in 0..quads {
            let i = i % QUADS;
            let weights = l.quads(&self.weights[i]);
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum = l.dot_narrow(*sum, weights, l.signed_quad(x.as_chunks().0[i]));
            }
        }
        sums
    }
}

/// 12 bits a weight.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(32))]
pub struct Block16 {
    pub scales: [f32; LANES],
    pub weights: [[[i16; PAIR]; LANES]; PAIRS],
}

impl Block for Block16 {
    #[inline(always)]
    fn rows<L: Lanes>() -> usize {
        match L::MANY {
            true => MANY,
            false => 6,
        }
    }

    #[inline(always)]
    fn scales<L: Lanes>(&self, l: L) -> L::Float {
        l.load(&self.scales)
    }

    #[inline(always)]
    fn products<L: Lanes, const ROWS: usize>(
        &self,
        l: L,
        x: [&[i16; BLOCK]; ROWS],
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

/// Where blocks lie. A model's are mapped: when it goes its memory goes back to the system, whatever else
/// the process holds. An allocator keeps what lies below a piece that is still in use.
#[derive(Debug)]
enum Blocks<B> {
    Heap(Vec<B>),
    Mapped(MmapMut),
}

impl<B: Pod> Blocks<B> {
    /// Smaller ones, such as those of a picture's keys, come and go.
    const LEAST_MAPPED: usize = 256 << 10;

    fn zeroed(len: usize) -> Self {
        let bytes = len * size_of::<B>();
        match (bytes >= Self::LEAST_MAPPED).then(|| MmapMut::map_anon(bytes)) {
            Some(Ok(pages)) => Self::Mapped(pages),
            _ => Self::Heap(vec![B::zeroed(); len]),
        }
    }

    fn all(&self) -> &[B] {
        match self {
            Self::Heap(blocks) => blocks,
            Self::Mapped(pages) => bytemuck::cast_slice(pages),
        }
    }

    fn all_mut(&mut self) -> &mut [B] {
        match self {
            Self::Heap(blocks) => blocks,
            Self::Mapped(pages) => bytemuck::cast_slice_mut(pages),
        }
    }
}

/// Rows of weights, sixteen at a time, block by block.
#[derive(Debug)]
pub struct Packed<B> {
    blocks: Blocks<B>,
    rows: usize,
    /// Of a row.
    length: usize,
}

impl<B: Pod> Packed<B> {
    /// All zeros. `length` is that of a row, in whole blocks.
    pub fn new(rows: usize, length: usize) -> Self {
        assert!(length.is_multiple_of(BLOCK) && length > 0);
        let blocks = rows.div_ceil(LANES) * (length / BLOCK);
        Self {
            blocks: Blocks::zeroed(blocks),
            rows,
            length,
        }
    }

    /// Of rows as ggml has them, one after the other; `None` if a scale is no number.
    pub fn pack<'a>(
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

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn length(&self) -> usize {
        self.length
    }

    pub fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// The blocks of sixteen rows, from the first value to the last.
    pub fn panel(&self, panel: usize) -> &[B] {
        let blocks = self.length / BLOCK;
        &self.blocks.all()[panel * blocks..][..blocks]
    }

    pub fn panel_mut(&mut self, panel: usize) -> &mut [B] {
        let blocks = self.length / BLOCK;
        &mut self.blocks.all_mut()[panel * blocks..][..blocks]
    }
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
    fn what_a_model_took_goes_back_to_the_system() {
        // glibc takes what comes and goes for a habit, and from then on such pieces from its heap.
        drop(std::hint::black_box(vec![1u8; 30 << 20]));
        let before = resident();
        let mut weights = Vec::new();
        let mut between = Vec::new();
        for _ in 0..64 {
            let mut packed = Packed::<Block8>::new(1024, 1024);
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
