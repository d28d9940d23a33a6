//! The structs of the kernels' sources, and their constants.

use cudarc::driver::DeviceRepr;

macro_rules! arguments {
    ($($(#[$doc:meta])* $name:ident: $size:literal { $($(#[$field_doc:meta])* $field:ident: $type:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, Default)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type),*
        }

        // The kernels' sources assert the same size.
        const _: () = assert!(size_of::<$name>() == $size);

        // SAFETY: numbers and device addresses in C's layout.
        unsafe impl DeviceRepr for $name {}
        // SAFETY: as above.
        unsafe impl bytemuck::Zeroable for $name {}
        // SAFETY: as above, and the size leaves no room for padding.
        unsafe impl bytemuck::Pod for $name {}
    )*};
}

/// An address in device memory.
pub type Address = u64;

arguments! {
    Gemm: 104 {
        x: Address, w: Address, bias: Address, out: Address, position_embedding: Address, position_ids: Address,
        patches: i32, m: i32, n: i32, k: i32,
        rows: Address, sequences: Address, rotations: Address,
        layer: i32, heads: i32, kv_heads: i32, head_size: i32,
    }
    Attention: 72 {
        q: Address, q_stride: i32, padding: i32, k: Address, v: Address, out: Address, sequences: Address,
        layer: i32, rows: i32, heads: i32, kv_heads: i32, head_size: i32, scale: f32,
    }
    Patchify: 48 {
        rgb: Address, pixel_table: Address, out: Address,
        side: i32, patch_size: i32, grid: i32, k: i32, rows: i32, padding: i32,
    }
    Norm: 64 {
        x: Address, weight: Address, bias: Address, out: Address, indices: Address,
        per_image: i32, stride: i32, rows: i32, n: i32, epsilon: f32, padding: i32,
    }
    Embed: 56 {
        rows: Address, sequences: Address, embeddings: Address, out: Address, inv_freq: Address, rotations: Address,
        hidden: i32, half: i32,
    }
    Matrix: 24 {
        w: Address, n: i32, k: i32, split_log2: i32, tiles: i32,
    }
    /// A row of a prompt in a prefill.
    PromptRow: 12 {
        /// The token, or below zero a row of the sequence's image features: −1 is the first.
        token: i32,
        /// Index of the sequence.
        sequence: i32,
        /// Position in the sequence.
        position: i32,
    }
    /// A sequence of tokens. Addresses are of device memory or of [`MappedWords`](crate::MappedWords).
    Sequence: 80 {
        /// Keys and values `[layers, 2, kv_heads, capacity, head_size]` in the kernels' type.
        kv_cache: Address,
        /// Features of its images, f32 `[tokens, hidden]`.
        image_features: Address,
        /// Tokens that the KV cache has room for.
        capacity: i32,
        /// First row of the prompt in a prefill.
        first_row: i32,
        /// Rows of the prompt in a prefill.
        rows: i32,
        /// Tokens that are in the KV cache before the prefill.
        past: i32,
        /// The last token of the prompt, which the decode kernel starts from.
        token: i32,
        /// Position of `token`.
        position: i32,
        /// Tokens to generate at most.
        max_tokens: i32,
        /// Number of draft tokens.
        draft_len: i32,
        /// Draft tokens to be verified, i32.
        draft_tokens: Address,
        /// A mapped word: the kernel stops when it is not zero.
        cancelled: Address,
        /// A mapped word: the number of generated tokens, plus the finish reason times 2²⁴.
        generated_len: Address,
        /// Mapped words: the generated tokens.
        generated: Address,
    }
    Decode: 168 {
        matrices: Address, norms: Address, inv_freq: Address, embeddings: Address, sequences: Address,
        attn_hidden: Address, mlp_hidden: Address, qkv: Address, attn_out: Address, mlp_inner: Address,
        candidates: Address, logits: Address, epoch: Address, stop_tokens: Address,
        sequence_count: i32, layers: i32, hidden: i32, heads: i32, kv_heads: i32, head_size: i32, intermediate: i32,
        vocab_size: i32, max_rows: i32, row_stride: i32, partial_sums: i32, single_pass: i32,
        epsilon: f32, scale: f32,
    }
}

/// Most rows of a pass of the decode kernel, and most sequences that it takes at once.
pub const MAX_ROWS: usize = 16;
/// Warps of a block of the decode kernel.
pub const DECODE_WARPS: usize = 8;
/// Rows of a matrix that a warp multiplies at once.
pub const TILE: usize = 8;
/// Columns of a matrix that a warp fetches at once.
pub const STEP: usize = 32;
/// Slots of a warp's ring buffer of weights.
pub const RING_SLOTS: usize = 16;
/// Size of the kernel's `SequenceState`.
pub const SEQUENCE_STATE_BYTES: usize = 24;
/// Size of the kernel's `PassRow`.
pub const PASS_ROW_BYTES: usize = 12;
