//! SIMD arithmetic of transformers on CPUs: products with quantized weights, attention, norms.
//!
//! - [`matmul`] multiplies rows of activations with [`PackedWeights`], which are read from ggml's Q8_0 or Q4_0.
//!   [`ActivationBuffers`] holds the activations, quantized on the way.
//! - [`matmul_int8`] does so for many rows, with [`Int8Weights`] and [`Int8Buffer`]s of activations, both in bytes;
//!   [`gelu_matmul_int8`] goes on to the next product's activations.
//! - [`RowSource`]s compute what stands before a product: [`LayerNorm`], [`RmsNorm`], [`SwiGlu`].
//! - [`bidirectional_attention`] is a vision encoder's, [`causal_attention`] a decoder's, with its [`PackedKv`].
//!
//! Everything works on slices of f32 and on rayon's current thread pool. The instruction set is chosen at run time:
//! AVX-512 with VNNI, AVX2 with or without AVX-VNNI, Neon with or without dot products, or none. A row comes out the
//! same, to the bit, on every processor and whatever rows are computed beside it.
//!
//! # Example
//!
//! A row times two rows of Q8_0 weights:
//!
//! ```
//! use vlmnarrate_kernels::{ActivationBuffers, BlockQ8_0x16, Epilogue, F32Rows, PackedWeights, matmul};
//!
//! // A ggml block of Q8_0: a scale in half precision, here 0.5, then 32 weights.
//! let block = |weight: i8| [&[0x00, 0x38][..], &[weight.cast_unsigned(); 32]].concat();
//! let (first, second) = (block(2), block(-4));
//! let weights: PackedWeights<BlockQ8_0x16> =
//!     PackedWeights::from_ggml(2, 32, [&first[..], &second[..]]).expect("finite scales");
//!
//! let x = [1.0; 32];
//! let mut buffers = ActivationBuffers::default();
//! let x = buffers.i16_per_row.quantize(&F32Rows::new(&x, 32));
//! let mut y = [0.0; 2];
//! matmul(x, &weights, None, Epilogue::Store, &mut y);
//! assert!((y[0] - 32.0).abs() < 1e-3 && (y[1] + 64.0).abs() < 1e-3);
//! ```

mod activations;
mod attention;
mod int8;
mod lanes;
mod matmul;
mod pointwise;
mod weights;

pub use activations::{
    ActivationBuffer, ActivationBuffers, ActivationFormat, I8BlockParams, I8PerBlock, I16PerRow,
    MatMul, QuantizedRows, RowSource,
};
pub use attention::{
    PackedKv, QkvBlocks, QkvShape, SequenceRows, bidirectional_attention, causal_attention,
};
pub use int8::{
    INT8_BLOCK, Int8Buffer, Int8Rows, Int8Weights, gelu_matmul_int8, matmul_int8,
    matmul_int8_blocks,
};
pub use lanes::{InstructionSet, LANES, limit_instructions};
pub use matmul::{Epilogue, matmul};
pub use pointwise::{F32Rows, LayerNorm, RmsNorm, SwiGlu};
pub use weights::{BlockQ4_0x16, BlockQ8_0x16, GgmlBlock, PackedWeights};
