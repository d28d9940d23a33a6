//! How the decoder's kernel shares the work among its blocks, and what it is given.

use super::{
    Error, Gpu, Memory, Result,
    arguments::{
        self as raw, DECODE_WARPS, MOST_ROWS, PASS_ROW_BYTES, Product, RING, STANDING_BYTES, STEP,
        Sequence, TILE,
    },
    operations::{Heads, Number, Weights, optional},
};

/// The decoder's shape.
#[derive(Debug, Clone, Copy)]
pub struct Stack {
    pub layers: usize,
    pub hidden: usize,
    pub heads: Heads,
    pub inner: usize,
    pub vocabulary: usize,
    pub epsilon: f64,
}

impl Stack {
    /// Whether these are its matrices.
    fn fit(&self, products: &[Product]) -> bool {
        let attended = self.heads.heads * self.heads.size;
        let layer = [
            (self.heads.width(), self.hidden),
            (self.hidden, attended),
            (2 * self.inner, self.hidden),
            (self.hidden, self.inner),
        ];
        let mut all = layer.repeat(self.layers);
        all.push((self.vocabulary, self.hidden));
        let sides = products.iter().map(|p| (p.n as usize, p.k as usize));
        sides.eq(all)
    }
}

/// What the decoder's kernel is given, but for the captions.
pub struct Decode<'a> {
    pub sequences: &'a Memory,
    pub count: usize,
    /// Where to put all scores of each row, if anywhere. Then it runs one pass.
    pub scores: Option<&'a Memory>,
    pub table: &'a Weights,
    pub norms: &'a Memory,
    pub frequencies: &'a Memory,
    /// A bit for each token of the vocabulary, 32 a word: whether it ends a caption.
    pub stops: &'a Memory,
}

/// How the decoder's kernel shares the work, and the memory that its blocks meet in.
pub struct Plan {
    stack: Stack,
    pub(super) blocks: usize,
    pub(super) shared: usize,
    most_rows: usize,
    row_stride: usize,
    partial: usize,
    products: Memory,
    /// What blocks give each other, as `exchange.cuh` has it.
    middle: Memory,
    states: Memory,
    qkv: Memory,
    attended: Memory,
    inner: Memory,
    best: Memory,
    turn: Memory,
}

/// Shared memory for sums, which a product with a finer share would need more of.
const MOST_PARTIAL: usize = 24 * 1024;

impl Plan {
    /// `weights` are four matrices of each layer, then the head's.
    pub fn new<'w>(
        gpu: &Gpu,
        number: Number,
        stack: Stack,
        weights: impl Iterator<Item = &'w Weights>,
    ) -> Result<Self> {
        // Each has a part in the widest product of a layer, so that none is ahead of another by a layer.
        let blocks = (gpu.processors as usize).min((2 * stack.inner).div_ceil(TILE));
        let size = number.bytes();
        let heads = stack.heads;
        let products = weights.enumerate().map(|(i, w)| Product {
            w: w.memory.part(0, w.rows * w.columns * size),
            n: w.rows as i32,
            k: w.columns as i32,
            shift: match i == 4 * stack.layers {
                true => 0,
                false => shift(w.rows, w.columns, blocks) as i32,
            },
            tiles: 0,
        });
        let products: Vec<Product> = products.collect();
        assert!(stack.fit(&products));

        let layers = &products[..4 * stack.layers];
        let sums = layers.iter().map(|p| sums(p.n as usize, blocks, p.shift));
        let partial = sums.max().unwrap_or(0).max(2 * DECODE_WARPS * MOST_ROWS);
        let longest = products.iter().map(|p| p.k as usize).max().unwrap_or(0);
        // Rows lie so that eight of them, four lanes each, touch all banks.
        let row_stride = longest.next_multiple_of(2 * STEP) + STEP;
        let floats = |count: usize| (count * size_of::<f32>()).next_multiple_of(16);
        let fixed = RING * DECODE_WARPS * STEP * 8 * size
            + size_of_val(products.as_slice())
            + floats(MOST_ROWS * heads.size)
            + floats(MOST_ROWS * tiles_of_a_block(stack.hidden, blocks) * TILE)
            + floats(DECODE_WARPS * 32)
            + floats(DECODE_WARPS * (heads.size + 4))
            + MOST_ROWS * (size_of::<Sequence>() + STANDING_BYTES + PASS_ROW_BYTES)
            + floats(partial)
            + 128;
        let most_rows = gpu.shared.saturating_sub(fixed) / (row_stride * size);
        let most_rows = most_rows.min(MOST_ROWS);
        if most_rows == 0 {
            return Err(Error::Failed(format!(
                "its {} kB of shared memory are too few for the decoder of this model",
                gpu.shared / 1024
            )));
        }
        // Zero is the number of no turn.
        let shared = |words: usize| {
            let mut memory = gpu.memory(words * size_of::<u64>())?;
            gpu.clear(&mut memory)?;
            Ok::<_, Error>(memory)
        };
        let states = |length: usize| shared(2 * MOST_ROWS * length);
        // Words hold 32 bits.
        let rows = |length: usize| states(length * size / 4);
        Ok(Self {
            blocks,
            shared: fixed + most_rows * row_stride * size,
            most_rows,
            row_stride,
            partial,
            products: gpu.upload(&products)?,
            middle: states(stack.hidden)?,
            states: states(stack.hidden)?,
            qkv: rows(heads.width())?,
            attended: rows(heads.heads * heads.size)?,
            inner: rows(stack.inner)?,
            best: shared(2 * blocks * MOST_ROWS + MOST_ROWS)?,
            turn: shared(1)?,
            stack,
        })
    }

    /// Rows that a pass can have.
    pub fn most_rows(&self) -> usize {
        self.most_rows
    }

    pub(super) fn arguments(&self, number: Number, decode: &Decode<'_>) -> raw::Decode {
        let s = &self.stack;
        let size = number.bytes();
        assert!((1..=MOST_ROWS).contains(&decode.count));
        let scores = MOST_ROWS * s.vocabulary * 4;
        raw::Decode {
            products: self.products.part(0, 0),
            norms: decode.norms.part(0, (2 * s.layers + 1) * s.hidden * 4),
            frequencies: decode.frequencies.part(0, s.heads.size / 2 * 4),
            table: decode.table.memory.part(0, s.vocabulary * s.hidden * size),
            sequences: decode
                .sequences
                .part(0, decode.count * size_of::<Sequence>()),
            middle: self.middle.part(0, 0),
            states: self.states.part(0, 0),
            qkv: self.qkv.part(0, 0),
            attended: self.attended.part(0, 0),
            inner: self.inner.part(0, 0),
            best: self.best.part(0, 0),
            scores: optional(decode.scores, scores),
            turn: self.turn.part(0, 0),
            stops: decode.stops.part(0, s.vocabulary.div_ceil(32) * 4),
            count: decode.count as i32,
            layers: s.layers as i32,
            hidden: s.hidden as i32,
            heads: s.heads.heads as i32,
            kv_heads: s.heads.kv_heads as i32,
            head_size: s.heads.size as i32,
            inner_size: s.inner as i32,
            vocabulary: s.vocabulary as i32,
            most_rows: self.most_rows as i32,
            row_stride: self.row_stride as i32,
            partial: self.partial as i32,
            once: decode.scores.is_some().into(),
            epsilon: s.epsilon as f32,
            scale: s.heads.scale(),
        }
    }
}

fn tiles_of_a_block(rows: usize, blocks: usize) -> usize {
    rows.div_ceil(TILE).div_ceil(blocks)
}

/// Sums that warps have of a product's tiles.
fn sums(rows: usize, blocks: usize, shift: i32) -> usize {
    (tiles_of_a_block(rows, blocks) << shift) * MOST_ROWS * TILE
}

/// How many warps share a tile, as a power of two: so that the last to end has the least to do.
fn shift(rows: usize, columns: usize, blocks: usize) -> u32 {
    let tiles = tiles_of_a_block(rows, blocks);
    let steps = columns.div_ceil(STEP);
    let shifts = (0..=DECODE_WARPS.ilog2())
        .filter(|shift| *shift == 0 || sums(rows, blocks, *shift as i32) * 4 <= MOST_PARTIAL);
    // To begin and to end a tile takes about as long as a step.
    let turns = |shift: u32| {
        let tiles = tiles.div_ceil(DECODE_WARPS >> shift);
        tiles * (steps.div_ceil(1 << shift) + 1)
    };
    shifts.min_by_key(|shift| turns(*shift)).unwrap_or(0)
}
