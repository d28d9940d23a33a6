//! How the decode kernel shares work among its blocks, and its arguments.

use super::{
    Error, Gpu, Memory, Result,
    arguments::{
        self as raw, DECODE_WARPS, MAX_ROWS, Matrix, PASS_ROW_BYTES, RING_SLOTS,
        SEQUENCE_STATE_BYTES, STEP, Sequence, TILE,
    },
    operations::optional,
    parameters::{DType, QkvShape, Weights},
};

/// Shape of a Llama decoder.
#[derive(Debug, Clone, Copy)]
pub struct DecoderShape {
    /// Number of layers.
    pub layers: usize,
    /// Values of a hidden state, at most 2048.
    pub hidden: usize,
    /// Heads of the attention.
    pub qkv: QkvShape,
    /// Inner size of the MLP.
    pub intermediate: usize,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Epsilon of the RMS norms.
    pub epsilon: f64,
}

impl DecoderShape {
    /// Values of an attention's output.
    fn attn_out(&self) -> usize {
        self.qkv.heads * self.qkv.head_size
    }

    /// Whether these are the shapes of a decoder's matrices.
    fn matches(&self, matrices: &[Matrix]) -> bool {
        let layer = [
            (self.qkv.row_length(), self.hidden),
            (self.hidden, self.attn_out()),
            (2 * self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        ];
        let mut all = layer.repeat(self.layers);
        all.push((self.vocab_size, self.hidden));
        let shapes = matrices.iter().map(|m| (m.n as usize, m.k as usize));
        shapes.eq(all)
    }
}

/// Inputs of [`Kernels::decode`](crate::Kernels::decode).
pub struct DecodeInput<'a> {
    /// [`Sequence`]s.
    pub sequences: &'a Memory,
    /// Number of sequences.
    pub count: usize,
    /// Where all logits of each row are stored, f32 `[MAX_ROWS, vocab_size]`. With logits the kernel runs one pass: a row
    /// for each sequence's token and draft tokens.
    pub logits: Option<&'a Memory>,
    /// The token embedding.
    pub embed_tokens: &'a Weights,
    /// Weights of the RMS norms, f32 `[2 * layers + 1, hidden]`.
    pub norms: &'a Memory,
    /// Inverse frequencies of the rotary embedding, f32 `[head_size / 2]`.
    pub inv_freq: &'a Memory,
    /// A bit for each token of the vocabulary, in words of 32: whether it ends a sequence.
    pub stop_tokens: &'a Memory,
}

/// How the decode kernel shares work among its blocks, and the memory through which these exchange data.
pub struct DecodePlan {
    shape: DecoderShape,
    pub(super) blocks: usize,
    pub(super) shared: usize,
    max_rows: usize,
    row_stride: usize,
    partial_sums: usize,
    matrices: Memory,
    /// Flagged words of `exchange.cuh`, as the five below.
    attn_hidden: Memory,
    mlp_hidden: Memory,
    qkv: Memory,
    attn_out: Memory,
    mlp_inner: Memory,
    candidates: Memory,
    epoch: Memory,
}

/// Bytes of shared memory for partial sums, which a finer split would need more of.
const MAX_PARTIAL_BYTES: usize = 24 * 1024;

impl DecodePlan {
    /// A plan for weights of a decoder: `[q, k, v]`, `o`, interleaved `[gate, up]` and `down` of each layer, then the LM
    /// head. Query and key rows have the halves of each head interleaved.
    ///
    /// # Errors
    ///
    /// [`Error::Failed`] if shared memory is too small for the decoder, [`Error::OutOfMemory`].
    ///
    /// # Panics
    ///
    /// If the weights don't have the shapes of `shape`.
    pub fn new<'w>(
        gpu: &Gpu,
        dtype: DType,
        shape: DecoderShape,
        weights: impl Iterator<Item = &'w Weights>,
    ) -> Result<Self> {
        // Each block has a part in the widest product of a layer, so that none is ahead of another by a layer.
        let blocks = (gpu.processors as usize).min((2 * shape.intermediate).div_ceil(TILE));
        let size = dtype.bytes();
        let qkv = shape.qkv;
        let matrices = weights.enumerate().map(|(i, w)| Matrix {
            w: w.memory.part(0, w.rows * w.columns * size),
            n: w.rows as i32,
            k: w.columns as i32,
            split_log2: match i == 4 * shape.layers {
                true => 0,
                false => split_log2(w.rows, w.columns, blocks) as i32,
            },
            tiles: 0,
        });
        let matrices: Vec<Matrix> = matrices.collect();
        assert!(shape.matches(&matrices));

        let layers = &matrices[..4 * shape.layers];
        let sums = layers
            .iter()
            .map(|m| partial_sums(m.n as usize, blocks, m.split_log2));
        let partial_sums = sums.max().unwrap_or(0).max(2 * DECODE_WARPS * MAX_ROWS);
        let longest = matrices.iter().map(|m| m.k as usize).max().unwrap_or(0);
        // Padded so that eight rows, four lanes each, touch all banks.
        let row_stride = longest.next_multiple_of(2 * STEP) + STEP;
        let floats = |count: usize| (count * size_of::<f32>()).next_multiple_of(16);
        let fixed = RING_SLOTS * DECODE_WARPS * STEP * 8 * size
            + size_of_val(matrices.as_slice())
            + floats(MAX_ROWS * qkv.head_size)
            + floats(MAX_ROWS * tiles_per_block(shape.hidden, blocks) * TILE)
            + floats(DECODE_WARPS * 32)
            + floats(DECODE_WARPS * (qkv.head_size + 4))
            + MAX_ROWS * (size_of::<Sequence>() + SEQUENCE_STATE_BYTES + PASS_ROW_BYTES)
            + floats(partial_sums)
            + 128;
        let max_rows = gpu.shared.saturating_sub(fixed) / (row_stride * size);
        let max_rows = max_rows.min(MAX_ROWS);
        if max_rows == 0 {
            return Err(Error::Failed(format!(
                "its {} kB of shared memory are too few for the decoder of this model",
                gpu.shared / 1024
            )));
        }
        // No epoch is zero.
        let exchange = |words: usize| {
            let mut memory = gpu.memory(words * size_of::<u64>())?;
            gpu.clear(&mut memory)?;
            Ok::<_, Error>(memory)
        };
        let words = |length: usize| exchange(2 * MAX_ROWS * length);
        let values = |length: usize| words(length * size / 4);
        Ok(Self {
            blocks,
            shared: fixed + max_rows * row_stride * size,
            max_rows,
            row_stride,
            partial_sums,
            matrices: gpu.upload(&matrices)?,
            attn_hidden: words(shape.hidden)?,
            mlp_hidden: words(shape.hidden)?,
            qkv: values(qkv.row_length())?,
            attn_out: values(shape.attn_out())?,
            mlp_inner: values(shape.intermediate)?,
            candidates: exchange(2 * blocks * MAX_ROWS + MAX_ROWS)?,
            epoch: exchange(1)?,
            shape,
        })
    }

    /// Most rows of a pass, at most [`MAX_ROWS`].
    pub fn max_rows(&self) -> usize {
        self.max_rows
    }

    pub(super) fn arguments(&self, dtype: DType, input: &DecodeInput<'_>) -> raw::Decode {
        let s = &self.shape;
        let size = dtype.bytes();
        assert!((1..=MAX_ROWS).contains(&input.count));
        let logits = MAX_ROWS * s.vocab_size * 4;
        raw::Decode {
            matrices: self.matrices.part(0, 0),
            norms: input.norms.part(0, (2 * s.layers + 1) * s.hidden * 4),
            inv_freq: input.inv_freq.part(0, s.qkv.head_size / 2 * 4),
            embeddings: input
                .embed_tokens
                .memory
                .part(0, s.vocab_size * s.hidden * size),
            sequences: input.sequences.part(0, input.count * size_of::<Sequence>()),
            attn_hidden: self.attn_hidden.part(0, 0),
            mlp_hidden: self.mlp_hidden.part(0, 0),
            qkv: self.qkv.part(0, 0),
            attn_out: self.attn_out.part(0, 0),
            mlp_inner: self.mlp_inner.part(0, 0),
            candidates: self.candidates.part(0, 0),
            logits: optional(input.logits, logits),
            epoch: self.epoch.part(0, 0),
            stop_tokens: input.stop_tokens.part(0, s.vocab_size.div_ceil(32) * 4),
            sequence_count: input.count as i32,
            layers: s.layers as i32,
            hidden: s.hidden as i32,
            heads: s.qkv.heads as i32,
            kv_heads: s.qkv.kv_heads as i32,
            head_size: s.qkv.head_size as i32,
            intermediate: s.intermediate as i32,
            vocab_size: s.vocab_size as i32,
            max_rows: self.max_rows as i32,
            row_stride: self.row_stride as i32,
            partial_sums: self.partial_sums as i32,
            single_pass: input.logits.is_some().into(),
            epsilon: s.epsilon as f32,
            scale: s.qkv.scale(),
        }
    }
}

fn tiles_per_block(rows: usize, blocks: usize) -> usize {
    rows.div_ceil(TILE).div_ceil(blocks)
}

/// Floats that a block's partial sums of a product take.
fn partial_sums(rows: usize, blocks: usize, split_log2: i32) -> usize {
    (tiles_per_block(rows, blocks) << split_log2) * MAX_ROWS * TILE
}

/// Logarithm of the number of warps that share a tile, so that the busiest warp has the least to do.
fn split_log2(rows: usize, columns: usize, blocks: usize) -> u32 {
    let tiles = tiles_per_block(rows, blocks);
    let steps = columns.div_ceil(STEP);
    let splits = (0..=DECODE_WARPS.ilog2()).filter(|log2| {
        *log2 == 0 || partial_sums(rows, blocks, *log2 as i32) * 4 <= MAX_PARTIAL_BYTES
    });
    // The overhead of a tile is about as long as a step.
    let cost = |log2: u32| {
        let tiles = tiles.div_ceil(DECODE_WARPS >> log2);
        tiles * (steps.div_ceil(1 << log2) + 1)
    };
    splits.min_by_key(|log2| cost(*log2)).unwrap_or(0)
}
