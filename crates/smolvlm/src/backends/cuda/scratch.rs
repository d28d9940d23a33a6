//! Memory that every run writes anew.

use crate::backends::cuda::MOST_CAPTIONS;
use vlmnarrate_cuda::{Gpu, Memory, Number, Result, Row, Sequence};

pub(crate) struct Scratch {
    number: Number,
    pub(crate) rgb: Memory,
    pub(crate) features: Memory,
    /// States, f32.
    pub(crate) x: Memory,
    pub(crate) normed: Memory,
    pub(crate) qkv: Memory,
    pub(crate) attended: Memory,
    pub(crate) inner: Memory,
    pub(crate) rows: Memory,
    /// What rows are turned by.
    pub(crate) turns: Memory,
    pub(crate) sequences: Memory,
    pub(crate) guesses: Memory,
}

/// Grows memory to so many bytes; what it held is lost. Says whether it moved.
fn grow(gpu: &Gpu, memory: &mut Memory, bytes: usize) -> Result<bool> {
    if memory.bytes() >= bytes {
        return Ok(false);
    }
    // Freed first, so that both need not fit.
    *memory = gpu.memory(0)?;
    *memory = gpu.memory(bytes)?;
    Ok(true)
}

impl Scratch {
    pub(crate) fn new(gpu: &Gpu, number: Number, most_tokens: usize) -> Result<Self> {
        let empty = || gpu.memory(0);
        Ok(Self {
            number,
            rgb: empty()?,
            features: empty()?,
            x: empty()?,
            normed: empty()?,
            qkv: empty()?,
            attended: empty()?,
            inner: empty()?,
            rows: empty()?,
            turns: empty()?,
            sequences: gpu.memory(MOST_CAPTIONS * size_of::<Sequence>())?,
            guesses: gpu.memory(MOST_CAPTIONS * most_tokens * size_of::<i32>())?,
        })
    }

    /// For rows of so many values: states, queries with keys and values, attention's, the widest, and for prompts those
    /// of a head.
    pub(crate) fn reserve(&mut self, gpu: &Gpu, rows: usize, widths: [usize; 5]) -> Result<bool> {
        let size = self.number.bytes();
        let [hidden, qkv, attended, inner, head] = widths.map(|width| rows * width);
        let grown = [
            grow(gpu, &mut self.x, hidden * size_of::<f32>())?,
            grow(gpu, &mut self.normed, hidden * size)?,
            grow(gpu, &mut self.qkv, qkv * size)?,
            grow(gpu, &mut self.attended, attended * size)?,
            grow(gpu, &mut self.inner, inner * size)?,
            grow(gpu, &mut self.rows, rows * size_of::<Row>())?,
            grow(gpu, &mut self.turns, head * size_of::<f32>())?,
        ];
        Ok(grown.contains(&true))
    }

    pub(crate) fn features(&mut self, gpu: &Gpu, floats: usize) -> Result<bool> {
        grow(gpu, &mut self.features, floats * size_of::<f32>())
    }

    pub(crate) fn pictures(&mut self, gpu: &Gpu, bytes: usize) -> Result<bool> {
        grow(gpu, &mut self.rgb, bytes)
    }
}
