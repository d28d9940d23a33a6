//! Buffers that every run overwrites.

use crate::backends::cuda::MAX_SEQUENCES;
use vlmnarrate_cuda::{DType, Gpu, Memory, PromptRow, Result, Sequence};

pub(crate) struct Scratch {
    dtype: DType,
    pub(crate) rgb: Memory,
    pub(crate) features: Memory,
    /// Hidden states, f32.
    pub(crate) x: Memory,
    pub(crate) normed: Memory,
    pub(crate) qkv: Memory,
    pub(crate) attn_out: Memory,
    pub(crate) inner: Memory,
    pub(crate) rows: Memory,
    /// Cosine and sine of each prompt row's position.
    pub(crate) rotations: Memory,
    pub(crate) sequences: Memory,
    pub(crate) draft_tokens: Memory,
}

/// Grows memory to so many bytes and loses its contents. Returns whether it moved.
fn grow(gpu: &Gpu, memory: &mut Memory, bytes: usize) -> Result<bool> {
    if memory.bytes() >= bytes {
        return Ok(false);
    }
    // Freed first, so that both needn't fit.
    *memory = gpu.memory(0)?;
    *memory = gpu.memory(bytes)?;
    Ok(true)
}

impl Scratch {
    pub(crate) fn new(gpu: &Gpu, dtype: DType, max_tokens: usize) -> Result<Self> {
        let empty = || gpu.memory(0);
        Ok(Self {
            dtype,
            rgb: empty()?,
            features: empty()?,
            x: empty()?,
            normed: empty()?,
            qkv: empty()?,
            attn_out: empty()?,
            inner: empty()?,
            rows: empty()?,
            rotations: empty()?,
            sequences: gpu.memory(MAX_SEQUENCES * size_of::<Sequence>())?,
            draft_tokens: gpu.memory(MAX_SEQUENCES * max_tokens * size_of::<i32>())?,
        })
    }

    /// Makes room for rows of these widths: hidden states, queries with keys and values, the output of attention, the inner
    /// activations of the MLP or patches, and a head for prompts.
    pub(crate) fn reserve(&mut self, gpu: &Gpu, rows: usize, widths: [usize; 5]) -> Result<bool> {
        let size = self.dtype.bytes();
        let [hidden, qkv, attn_out, inner, head] = widths.map(|width| rows * width);
        let grown = [
            grow(gpu, &mut self.x, hidden * size_of::<f32>())?,
            grow(gpu, &mut self.normed, hidden * size)?,
            grow(gpu, &mut self.qkv, qkv * size)?,
            grow(gpu, &mut self.attn_out, attn_out * size)?,
            grow(gpu, &mut self.inner, inner * size)?,
            grow(gpu, &mut self.rows, rows * size_of::<PromptRow>())?,
            grow(gpu, &mut self.rotations, head * size_of::<f32>())?,
        ];
        Ok(grown.contains(&true))
    }

    pub(crate) fn features(&mut self, gpu: &Gpu, floats: usize) -> Result<bool> {
        grow(gpu, &mut self.features, floats * size_of::<f32>())
    }

    pub(crate) fn images(&mut self, gpu: &Gpu, bytes: usize) -> Result<bool> {
        grow(gpu, &mut self.rgb, bytes)
    }
}
