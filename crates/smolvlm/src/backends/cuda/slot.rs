//! What a sequence keeps on the GPU between requests.

use std::sync::Arc;

use crate::{
    backends::cuda::{CANCELLED, COUNT, GENERATED},
    error::Error,
};
use vlmnarrate_cuda::{Gpu, MappedWords, Memory, Pinned, Result};

/// The KV cache, image features, and memory for generated tokens.
#[derive(Debug)]
pub(crate) struct Slot {
    gpu: Arc<Gpu>,
    /// `None` before anything is reserved.
    buffers: Option<SlotBuffers>,
    /// Tokens in the KV cache.
    len: usize,
    /// Tokens that the request at hand may have.
    limit: usize,
    kv_bytes_per_token: usize,
    hidden: usize,
}

/// The buffers of a slot.
#[derive(Debug)]
pub(crate) struct SlotBuffers {
    pub(crate) kv_cache: Memory,
    /// Tokens that the KV cache has room for.
    pub(crate) capacity: usize,
    /// Image features, f32 `[tokens, hidden]`.
    pub(crate) features: Memory,
    /// Staged pictures.
    pub(crate) pixels: Pinned,
    /// Words that the GPU and this process both read and write.
    pub(crate) words: MappedWords,
}

impl Slot {
    pub(crate) fn new(gpu: Arc<Gpu>, kv_bytes_per_token: usize, hidden: usize) -> Self {
        Self {
            gpu,
            buffers: None,
            len: 0,
            limit: 0,
            kv_bytes_per_token,
            hidden,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Tokens that there is memory for.
    pub(crate) fn capacity(&self) -> usize {
        self.buffers.as_ref().map_or(0, |buffers| buffers.capacity)
    }

    /// Tokens that there is room for beside those held.
    pub(crate) fn room(&self) -> usize {
        self.limit.saturating_sub(self.len)
    }

    pub(crate) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    pub(crate) fn set_len(&mut self, len: usize) {
        self.len = len;
    }

    /// Makes room for `capacity` tokens in all, `max_tokens` generated ones, `features` rows of features and `bytes` of
    /// staged pictures. A KV cache or features that must move are lost.
    pub(crate) fn reserve(
        &mut self,
        capacity: usize,
        max_tokens: usize,
        features: usize,
        bytes: usize,
    ) -> Result<()> {
        // No room until everything is allocated.
        self.limit = 0;
        let gpu = &self.gpu;
        let buffers = match &mut self.buffers {
            Some(buffers) => buffers,
            none => none.insert(SlotBuffers {
                kv_cache: gpu.memory(0)?,
                capacity: 0,
                features: gpu.memory(0)?,
                pixels: gpu.pinned(0)?,
                words: gpu.mapped_words(GENERATED + max_tokens)?,
            }),
        };
        if buffers.capacity < capacity {
            (self.len, buffers.capacity) = (0, 0);
            buffers.kv_cache = gpu.memory(0)?;
            buffers.kv_cache = gpu.memory(capacity * self.kv_bytes_per_token)?;
            buffers.capacity = capacity;
        }
        let features = features * self.hidden * size_of::<f32>();
        if buffers.features.bytes() < features {
            buffers.features = gpu.memory(features)?;
        }
        if buffers.pixels.bytes() < bytes {
            buffers.pixels = gpu.pinned(bytes)?;
        }
        if buffers.words.len() < GENERATED + max_tokens {
            buffers.words = gpu.mapped_words(GENERATED + max_tokens)?;
        }
        self.limit = capacity;
        self.len = self.len.min(capacity);
        Ok(())
    }

    /// Rows of features that the slot has room for.
    pub(crate) fn features(&self) -> usize {
        let bytes = self
            .buffers
            .as_ref()
            .map_or(0, |buffers| buffers.features.bytes());
        bytes / (self.hidden * size_of::<f32>())
    }

    /// Sets the features of all images.
    pub(crate) fn set_features(&mut self, values: &[f32]) -> Result<()> {
        match &mut self.buffers {
            Some(buffers) => self.gpu.write(values, &mut buffers.features, 0),
            None => Ok(()),
        }
    }

    /// Stages a picture from byte `at` on.
    pub(crate) fn stage(&mut self, at: usize, rgb: &[u8]) {
        if let Some(buffers) = &mut self.buffers {
            buffers.pixels.write(at, rgb);
        }
    }

    /// The buffers, with words as a job starts from them.
    pub(crate) fn buffers(&mut self) -> Result<&SlotBuffers, Error> {
        let none = || Error::Session("there is no room in its cache".into());
        let buffers = self.buffers.as_ref().ok_or_else(none)?;
        buffers.words.set(CANCELLED, 0);
        buffers.words.set(COUNT, 0);
        Ok(buffers)
    }
}
