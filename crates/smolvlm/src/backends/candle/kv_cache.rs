//! Keys and values of the tokens seen so far, written in place.

use candle_core::{DType, Device, Result, Tensor};

/// The cache of all layers; `C` is a layer's.
///
/// `candle_nn::kv_cache::Cache` grows by concatenation and can't be cut back to a prefix; this one is allocated once for
/// the longest sequence so far, and only its length moves.
#[derive(Debug)]
pub(crate) struct KvCache<C> {
    layers: Vec<C>,
    capacity: usize,
    /// Of the capacity, what the present sequence has asked for: what a session can do doesn't depend on what it did.
    limit: usize,
    len: usize,
}

impl<C> Default for KvCache<C> {
    fn default() -> Self {
        Self {
            layers: Vec::new(),
            capacity: 0,
            limit: 0,
            len: 0,
        }
    }
}

impl<C> KvCache<C> {
    /// Number of tokens held.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Number of tokens that the buffers have room for.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Number of tokens that there is room for beside those held.
    pub(crate) fn room(&self) -> usize {
        self.limit - self.len
    }

    /// Forgets every token but the first `len`.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Makes room for `capacity` tokens in all. If buffers must be made, of which `layers` is told the capacity, what was
    /// held is forgotten.
    pub(crate) fn reserve(
        &mut self,
        capacity: usize,
        layers: impl Iterator<Item = Result<C>>,
    ) -> Result<()> {
        if self.capacity >= capacity {
            self.limit = capacity;
            self.len = self.len.min(capacity);
            return Ok(());
        }
        self.layers.clear();
        (self.capacity, self.limit, self.len) = (0, 0, 0);
        for layer in layers {
            self.layers.push(layer?);
        }
        (self.capacity, self.limit) = (capacity, capacity);
        Ok(())
    }

    /// Buffers of a layer.
    ///
    /// # Panics
    ///
    /// Before room was [reserved](Self::reserve).
    pub(crate) fn layer(&mut self, index: usize) -> &mut C {
        &mut self.layers[index]
    }

    /// New tokens were seen by all layers.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}

/// Keys and values of a layer, each `[kv_heads, capacity, head_dim]`.
#[derive(Debug)]
pub(crate) struct LayerKv {
    keys: Tensor,
    values: Tensor,
}

impl LayerKv {
    pub(crate) fn new(
        (kv_heads, capacity, head_dim): (usize, usize, usize),
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let zeros = || Tensor::zeros((kv_heads, capacity, head_dim), dtype, device);
        Ok(Self {
            keys: zeros()?,
            values: zeros()?,
        })
    }

    /// Writes `[kv_heads, n, head_dim]` behind `past` tokens and returns all keys and values as views.
    pub(crate) fn write(&self, k: &Tensor, v: &Tensor, past: usize) -> Result<(Tensor, Tensor)> {
        self.keys.slice_set(k, 1, past)?;
        self.values.slice_set(v, 1, past)?;
        let total = past + k.dim(1)?;
        Ok((
            self.keys.narrow(1, 0, total)?,
            self.values.narrow(1, 0, total)?,
        ))
    }
}
