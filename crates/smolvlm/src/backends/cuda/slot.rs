//! What one caller keeps on the GPU from caption to caption.

use std::sync::Arc;

use crate::{
    backends::cuda::{CANCELLED, COUNT, SAID},
    error::Error,
};
use vlmnarrate_cuda::{Gpu, Memory, Pinned, Result, Words};

/// The cache of keys and values, features of pictures, and room for the tokens of a caption.
#[derive(Debug)]
pub(crate) struct Slot {
    gpu: Arc<Gpu>,
    /// Away while somebody works with it.
    inner: Option<Inner>,
    /// Tokens that the cache holds, and that the caption at hand has room for.
    len: usize,
    limit: usize,
    cached: usize,
    hidden: usize,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) cache: Memory,
    /// Tokens that there is room for.
    pub(crate) capacity: usize,
    /// Rows of f32 values.
    pub(crate) features: Memory,
    /// Pictures on their way to the GPU.
    pub(crate) pixels: Pinned,
    words: Arc<Words>,
}

impl Inner {
    pub(crate) fn words(&self) -> Arc<Words> {
        self.words.clone()
    }
}

impl Slot {
    pub(crate) fn new(gpu: Arc<Gpu>, cached: usize, hidden: usize) -> Self {
        Self {
            gpu,
            inner: None,
            len: 0,
            limit: 0,
            cached,
            hidden,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
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

    /// Makes room: for tokens in all and of a caption, rows of features, bytes of pictures. What the cache held is
    /// forgotten if it must move, and so are features.
    pub(crate) fn reserve(
        &mut self,
        capacity: usize,
        most: usize,
        features: usize,
        bytes: usize,
    ) -> Result<()> {
        // Nothing until all is there.
        self.limit = 0;
        let gpu = &self.gpu;
        let inner = match &mut self.inner {
            Some(inner) => inner,
            none => none.insert(Inner {
                cache: gpu.memory(0)?,
                capacity: 0,
                features: gpu.memory(0)?,
                pixels: gpu.pinned(0)?,
                words: Arc::new(gpu.words(SAID + most)?),
            }),
        };
        if inner.capacity < capacity {
            (self.len, inner.capacity) = (0, 0);
            inner.cache = gpu.memory(0)?;
            inner.cache = gpu.memory(capacity * self.cached)?;
            inner.capacity = capacity;
        }
        let features = features * self.hidden * size_of::<f32>();
        if inner.features.bytes() < features {
            inner.features = gpu.memory(features)?;
        }
        if inner.pixels.bytes() < bytes {
            inner.pixels = gpu.pinned(bytes)?;
        }
        if inner.words.len() < SAID + most {
            inner.words = Arc::new(gpu.words(SAID + most)?);
        }
        self.limit = capacity;
        self.len = self.len.min(capacity);
        Ok(())
    }

    /// Rows of features that there is room for.
    pub(crate) fn features(&self) -> usize {
        let bytes = self
            .inner
            .as_ref()
            .map_or(0, |inner| inner.features.bytes());
        bytes / (self.hidden * size_of::<f32>())
    }

    /// Features of all pictures, made before.
    pub(crate) fn set_features(&mut self, values: &[f32]) -> Result<()> {
        match &mut self.inner {
            Some(inner) => self.gpu.write(values, &mut inner.features, 0),
            None => Ok(()),
        }
    }

    /// Puts a picture behind so many bytes of others.
    pub(crate) fn stage(&mut self, at: usize, rgb: &[u8]) {
        if let Some(inner) = &mut self.inner {
            inner.pixels.write(at, rgb);
        }
    }

    pub(crate) fn take(&mut self) -> Result<Inner, Error> {
        let lost = || Error::Device("its memory is lost with an earlier error".into());
        let inner = self.inner.take().ok_or_else(lost)?;
        inner.words.set(CANCELLED, 0);
        inner.words.set(COUNT, 0);
        Ok(inner)
    }

    pub(crate) fn put_back(&mut self, inner: Inner) {
        self.inner = Some(inner);
    }
}
