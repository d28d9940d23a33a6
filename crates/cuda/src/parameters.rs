//! Parameters of the kernels.

use super::{
    Gpu, Memory, Result,
    arguments::{Address, PromptRow, Sequence},
};

/// The type of weights and of the activations that they are multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DType {
    /// Without tensor cores: for checks, not for speed.
    F32,
    /// bfloat16.
    Bf16,
    /// Half precision.
    F16,
}

impl DType {
    /// Size of a value.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// Waits for all earlier work and reads `count` values of this type, widened to f32.
    pub fn read(self, gpu: &Gpu, from: &Memory, count: usize) -> Result<Vec<f32>> {
        Ok(match self {
            Self::F32 => gpu.read(from, 0, count)?,
            Self::Bf16 => gpu
                .read::<half::bf16>(from, 0, count)?
                .iter()
                .map(|x| x.to_f32())
                .collect(),
            Self::F16 => gpu
                .read::<half::f16>(from, 0, count)?
                .iter()
                .map(|x| x.to_f32())
                .collect(),
        })
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}

/// A linear layer: row-major weights `[rows, columns]` and a bias.
#[derive(Debug)]
pub struct Weights {
    /// The weights, in the kernels' type.
    pub memory: Memory,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
    /// Bias `[rows]`, f32.
    pub bias: Option<Memory>,
}

/// What happens to a product `[m, n]` after the bias was added.
#[derive(Debug, Clone, Copy)]
pub enum Epilogue<'a> {
    /// Stores in the kernels' type.
    Store,
    /// Stores the GELU (tanh) in the kernels' type.
    Gelu,
    /// Stores `silu(gate) * up` `[m, n / 2]` in the kernels' type. Columns are pairs of gate and up.
    SwiGlu,
    /// Adds to f32, as a residual connection does.
    AddF32,
    /// Stores in f32.
    StoreF32,
    /// Adds the position embedding of each row and stores in f32.
    AddPositions(PositionEmbedding<'a>),
    /// Rotates queries and keys by their positions (RoPE), stores queries in the kernels' type, and stores keys and values
    /// to the KV caches. The rows of query and key weights have the halves of each head interleaved.
    RopeStoreKv(RopeStoreKv<'a>),
}

impl Epilogue<'_> {
    pub(super) const NAMES: [&'static str; 7] = [
        "store",
        "gelu",
        "swiglu",
        "add_f32",
        "store_f32",
        "add_positions",
        "rope_store_kv",
    ];

    /// Index in [`NAMES`](Self::NAMES).
    pub(super) fn index(self) -> usize {
        match self {
            Self::Store => 0,
            Self::Gelu => 1,
            Self::SwiGlu => 2,
            Self::AddF32 => 3,
            Self::StoreF32 => 4,
            Self::AddPositions(_) => 5,
            Self::RopeStoreKv(_) => 6,
        }
    }
}

/// A learned position embedding of an image's patches.
#[derive(Debug, Clone, Copy)]
pub struct PositionEmbedding<'a> {
    /// Embeddings, f32 `[positions, n]`.
    pub table: &'a Memory,
    /// Row of the table for each patch of an image, i32. Must be inside the table.
    pub ids: &'a Memory,
    /// Patches of an image.
    pub patches: usize,
}

/// Parameters of a layer norm, or without a bias of an RMS norm.
#[derive(Debug)]
pub struct Norm {
    /// Factors `[length]`, f32.
    pub weight: Memory,
    /// Summands `[length]`, f32, of a layer norm.
    pub bias: Option<Memory>,
    /// Added to the variance, or to the mean square.
    pub epsilon: f64,
    /// Values of a row, a multiple of 4.
    pub length: usize,
}

/// Indices of the rows that a norm reads, the same for each image.
#[derive(Debug, Clone, Copy)]
pub struct RowGather<'a> {
    /// Rows of an image, i32, in the order of the output. Must be below `stride`.
    pub indices: &'a Memory,
    /// Number of indices, and of an image's rows in the output.
    pub per_image: usize,
    /// Rows of an image in the input.
    pub stride: usize,
}

/// Shape of rows `[heads + 2 * kv_heads, head_size]` of queries, keys and values.
#[derive(Debug, Clone, Copy)]
pub struct QkvShape {
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Values of a head, a multiple of 8.
    pub head_size: usize,
}

impl QkvShape {
    /// Values of a row.
    pub fn row_length(self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_size
    }

    /// Factor of the scores, for an exponential of base 2.
    pub(super) fn scale(self) -> f32 {
        (self.head_size as f64).powf(-0.5) as f32 * std::f32::consts::LOG2_E
    }
}

/// Which keys a query attends to.
#[derive(Debug, Clone, Copy)]
pub enum Attention<'a> {
    /// All keys of the same image.
    Bidirectional {
        /// Number of images.
        images: usize,
        /// Rows of an image.
        rows: usize,
    },
    /// Keys of the same sequence up to the query's position, from the KV cache.
    Causal {
        /// [`Sequence`]s.
        sequences: &'a Memory,
        /// Number of sequences.
        count: usize,
        /// Rows of the longest prompt.
        longest: usize,
        /// Rows of all prompts.
        rows: usize,
        /// Layer of the KV cache.
        layer: usize,
    },
}

/// Rows of the prompts of several sequences.
#[derive(Debug, Clone, Copy)]
pub struct PromptRows<'a> {
    /// [`PromptRow`]s.
    pub rows: &'a Memory,
    /// Number of rows.
    pub count: usize,
    /// [`Sequence`]s.
    pub sequences: &'a Memory,
    /// Number of sequences.
    pub sequence_count: usize,
}

impl PromptRows<'_> {
    pub(super) fn rows(&self) -> Address {
        self.rows.part(0, self.count * size_of::<PromptRow>())
    }

    pub(super) fn sequences(&self) -> Address {
        let bytes = self.sequence_count * size_of::<Sequence>();
        self.sequences.part(0, bytes)
    }
}

/// Parameters of [`Epilogue::RopeStoreKv`].
#[derive(Debug, Clone, Copy)]
pub struct RopeStoreKv<'a> {
    /// Rows of the product.
    pub rows: PromptRows<'a>,
    /// Cosine and sine of each row's position, f32 `[rows, head_size / 2, 2]`, from [`Kernels::embed`](crate::Kernels::embed).
    pub rotations: &'a Memory,
    /// Shape of the product's rows. `head_size` is a power of two.
    pub shape: QkvShape,
    /// Layer of the KV caches.
    pub layer: usize,
}

/// Square images of one size.
#[derive(Debug, Clone, Copy)]
pub struct Images<'a> {
    /// Pixels, u8 `[count, side, side, 3]`.
    pub rgb: &'a Memory,
    /// Number of images.
    pub count: usize,
    /// Width and height.
    pub side: usize,
    /// Width and height of a patch.
    pub patch_size: usize,
    /// Columns of the patches' rows: `3 * patch_size * patch_size` values, then zeros.
    pub columns: usize,
    /// Normalised value of each byte of each channel, f32 `[3, 256]`.
    pub pixel_table: &'a Memory,
}

impl Images<'_> {
    /// Patches of a side.
    pub fn grid(&self) -> usize {
        self.side / self.patch_size
    }
}
