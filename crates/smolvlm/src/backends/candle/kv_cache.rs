//! Keys and values of the tokens seen so far, written in place.

use candle_core::{DType, Device, Result, Tensor};

use vlmnarrate_kernels::attention;

/// Of a layer.
#[derive(Debug)]
pub(crate) enum Seen {
    /// Keys and values, each `[kv_heads, capacity, head_dim]`.
    Tensors(Tensor, Tensor),
    Packed(attention::Seen),
}

/// `candle_nn::kv_cache::Cache` grows by concatenation and can't be cut back to a prefix; this one
/// is allocated once for the longest caption seen and only its length moves.
#[derive(Debug)]
pub(crate) struct KvCache {
    /// Whether each layer is a packed one.
    packed: Vec<bool>,
    layers: Vec<Seen>,
    kv_heads: usize,
    head_dim: usize,
    capacity: usize,
    /// Of them, what the caption at hand has asked for: what a session can do doesn't depend on what it did.
    limit: usize,
    len: usize,
}

impl KvCache {
    pub(crate) fn new(packed: Vec<bool>, kv_heads: usize, head_dim: usize) -> Self {
        Self {
            layers: Vec::with_capacity(packed.len()),
            packed,
            kv_heads,
            head_dim,
            capacity: 0,
            limit: 0,
            len: 0,
        }
    }

    /// Number of tokens held.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Number of tokens that there is room for beside those held.
    pub(crate) fn room(&self) -> usize {
        self.limit - self.len
    }

    /// Forgets every token but the first `len`.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Makes room for `capacity` tokens in all; what was held is forgotten if buffers must be made.
    pub(crate) fn reserve(&mut self, capacity: usize, dtype: DType, device: &Device) -> Result<()> {
        if self.capacity >= capacity {
            self.limit = capacity;
            self.len = self.len.min(capacity);
            return Ok(());
        }
        self.layers.clear();
        (self.capacity, self.limit, self.len) = (0, 0, 0);
        let shape = (self.kv_heads, capacity, self.head_dim);
        for packed in &self.packed {
            self.layers.push(match packed {
                true => Seen::Packed(attention::Seen::new(self.kv_heads, self.head_dim, capacity)),
                false => Seen::Tensors(
                    Tensor::zeros(shape, dtype, device)?,
                    Tensor::zeros(shape, dtype, device)?,
                ),
            });
        }
        (self.capacity, self.limit) = (capacity, capacity);
        Ok(())
    }

    pub(crate) fn layers(&mut self) -> impl Iterator<Item = &mut Seen> {
        self.layers.iter_mut()
    }

    /// New tokens were seen by all layers.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}
