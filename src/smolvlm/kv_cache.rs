//! Keys and values of the tokens seen so far, written in place.

use candle_core::{DType, Device, Result, Tensor};

/// One buffer per layer for keys and one for values, `[kv_heads, capacity, head_dim]`.
///
/// `candle_nn::kv_cache::Cache` grows by concatenation and can't be cut back to a prefix; this one
/// is allocated once for the longest caption seen and only its length moves.
#[derive(Debug)]
pub(super) struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
    shape: (usize, usize, usize),
    len: usize,
}

impl KvCache {
    pub(super) fn new(layers: usize, kv_heads: usize, head_dim: usize) -> Self {
        Self {
            layers: Vec::with_capacity(layers),
            shape: (layers, kv_heads, head_dim),
            len: 0,
        }
    }

    /// Number of tokens held.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Forgets every token but the first `len`.
    pub(super) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Makes room for `capacity` tokens in all; what was held is forgotten if buffers must be made.
    pub(super) fn reserve(&mut self, capacity: usize, dtype: DType, device: &Device) -> Result<()> {
        let (layers, kv_heads, head_dim) = self.shape;
        if self
            .layers
            .first()
            .is_some_and(|(k, _)| k.dims()[1] >= capacity)
        {
            return Ok(());
        }
        self.layers.clear();
        self.len = 0;
        let shape = (kv_heads, capacity, head_dim);
        for _ in 0..layers {
            self.layers.push((
                Tensor::zeros(shape, dtype, device)?,
                Tensor::zeros(shape, dtype, device)?,
            ));
        }
        Ok(())
    }

    /// Writes `[kv_heads, n, head_dim]` behind the tokens held and returns all keys and values of
    /// this layer as views. The length itself moves in [`advance`](Self::advance), after the last layer.
    pub(super) fn write(&self, layer: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (keys, values) = &self.layers[layer];
        keys.slice_set(k, 1, self.len)?;
        values.slice_set(v, 1, self.len)?;
        let total = self.len + k.dim(1)?;
        Ok((keys.narrow(1, 0, total)?, values.narrow(1, 0, total)?))
    }

    pub(super) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}
