//! Upload of a checkpoint's tensors.

use std::sync::Mutex;

use candle_core::{DType, Error as CandleError, Result as CandleResult, Tensor};
use candle_nn::var_builder::SimpleBackend;

use crate::files::weights::Loader;
use vlmnarrate_cuda::{self as cuda, Gpu, Memory, Norm, Weights};

/// A linear layer that is concatenated with others.
pub(crate) struct Part<'a> {
    rows: usize,
    name: &'a str,
    /// Head size of a layer whose halves are interleaved for RoPE.
    halves_interleaved: Option<usize>,
}

impl<'a> Part<'a> {
    pub(crate) fn plain(rows: usize, name: &'a str) -> Self {
        Self {
            rows,
            name,
            halves_interleaved: None,
        }
    }

    /// Queries or keys: the rows of each head's halves are interleaved, so that the pairs that RoPE rotates are adjacent.
    pub(crate) fn halves_interleaved(rows: usize, name: &'a str, head_size: usize) -> Self {
        Self {
            halves_interleaved: Some(head_size),
            ..Self::plain(rows, name)
        }
    }
}

/// Rows of `row` bytes, alternately from `first` and `second`.
fn interleave_rows(first: &[u8], second: &[u8], row: usize) -> Vec<u8> {
    let pairs = first.chunks_exact(row).zip(second.chunks_exact(row));
    let mut bytes = Vec::with_capacity(first.len() + second.len());
    for (first, second) in pairs {
        bytes.extend_from_slice(first);
        bytes.extend_from_slice(second);
    }
    bytes
}

/// Loads tensors and uploads them, quantized ones dequantized.
pub(crate) struct Uploader<'a> {
    pub(crate) gpu: &'a Gpu,
    pub(crate) dtype: cuda::DType,
    loader: Loader<'a>,
    /// The GPU's error, which candle's error can't carry.
    failed: &'a Mutex<Option<cuda::Error>>,
}

impl<'a> Uploader<'a> {
    pub(crate) fn new(
        gpu: &'a Gpu,
        dtype: cuda::DType,
        loader: Loader<'a>,
        failed: &'a Mutex<Option<cuda::Error>>,
    ) -> Self {
        Self {
            gpu,
            dtype,
            loader,
            failed,
        }
    }

    /// Keeps the GPU's error for the caller of the load.
    fn on_gpu<T>(&self, result: cuda::Result<T>) -> CandleResult<T> {
        result.map_err(|error| {
            let shown = CandleError::msg(error.to_string());
            *self.failed.lock().unwrap_or_else(|e| e.into_inner()) = Some(error);
            shown
        })
    }

    fn candle_dtype(&self) -> DType {
        match self.dtype {
            cuda::DType::F32 => DType::F32,
            cuda::DType::Bf16 => DType::BF16,
            cuda::DType::F16 => DType::F16,
        }
    }

    fn tensor(&self, shape: &[usize], name: &str, dtype: DType) -> CandleResult<Tensor> {
        let stored = self.loader.weight(&shape.into(), name, Some(dtype))?;
        stored.dense(dtype)
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.loader.contains_tensor(name)
    }

    /// A tensor's values in f32.
    pub(crate) fn floats(&self, shape: &[usize], name: &str) -> CandleResult<Vec<f32>> {
        self.tensor(shape, name, DType::F32)?
            .flatten_all()?
            .to_vec1()
    }

    pub(crate) fn upload<T: bytemuck::Pod>(&self, values: &[T]) -> CandleResult<Memory> {
        self.on_gpu(self.gpu.upload(values))
    }

    /// Parameters of a layer norm.
    pub(crate) fn layer_norm(&self, length: usize, epsilon: f64, name: &str) -> CandleResult<Norm> {
        let part = |part: &str| self.upload(&self.floats(&[length], &format!("{name}.{part}"))?);
        Ok(Norm {
            weight: part("weight")?,
            bias: Some(part("bias")?),
            epsilon,
            length,
        })
    }

    /// Bytes of a matrix.
    fn rows(&self, rows: usize, columns: usize, name: &str) -> CandleResult<Vec<u8>> {
        let tensor = self.tensor(
            &[rows, columns],
            &format!("{name}.weight"),
            self.candle_dtype(),
        )?;
        self.bytes(&tensor)
    }

    fn bytes(&self, tensor: &Tensor) -> CandleResult<Vec<u8>> {
        let tensor = tensor.flatten_all()?;
        Ok(match self.dtype {
            cuda::DType::F32 => bytemuck::cast_slice(&tensor.to_vec1::<f32>()?).to_vec(),
            cuda::DType::Bf16 => bytemuck::cast_slice(&tensor.to_vec1::<half::bf16>()?).to_vec(),
            cuda::DType::F16 => bytemuck::cast_slice(&tensor.to_vec1::<half::f16>()?).to_vec(),
        })
    }

    /// A linear layer without a bias.
    pub(crate) fn linear(&self, rows: usize, columns: usize, name: &str) -> CandleResult<Weights> {
        self.layers(&[Part::plain(rows, name)], columns, false)
    }

    /// Linear layers with the same input, concatenated.
    pub(crate) fn layers(
        &self,
        parts: &[Part<'_>],
        columns: usize,
        has_bias: bool,
    ) -> CandleResult<Weights> {
        let rows = parts.iter().map(|part| part.rows).sum();
        let row = columns * self.dtype.bytes();
        let mut memory = self.on_gpu(self.gpu.memory(rows * row))?;
        let (mut at, mut biases) = (0, Vec::new());
        for part in parts {
            let mut bytes = self.rows(part.rows, columns, part.name)?;
            if let Some(size) = part.halves_interleaved {
                let heads = bytes.chunks_exact(size * row).flat_map(|head| {
                    let (first, second) = head.split_at(head.len() / 2);
                    interleave_rows(first, second, row)
                });
                bytes = heads.collect();
            }
            self.on_gpu(self.gpu.write(&bytes, &mut memory, at))?;
            at += bytes.len();
            if has_bias {
                biases.extend(self.floats(&[part.rows], &format!("{}.bias", part.name))?);
            }
        }
        Ok(Weights {
            memory,
            rows,
            columns,
            bias: has_bias.then(|| self.upload(&biases)).transpose()?,
        })
    }

    /// Two linear layers of the same shape, their rows interleaved.
    pub(crate) fn interleaved(
        &self,
        rows: usize,
        columns: usize,
        names: [&str; 2],
    ) -> CandleResult<Weights> {
        let [first, second] = names.map(|name| self.rows(rows, columns, name));
        let bytes = interleave_rows(&first?, &second?, columns * self.dtype.bytes());
        Ok(Weights {
            memory: self.upload(&bytes)?,
            rows: 2 * rows,
            columns,
            bias: None,
        })
    }

    /// A convolution with a stride as long as its kernel: a row for each channel, padded with zeros to whole vectors.
    pub(crate) fn patches(&self, hidden: usize, patch: usize, name: &str) -> CandleResult<Weights> {
        let shape = [hidden, 3, patch, patch];
        let tensor = self.tensor(&shape, &format!("{name}.weight"), self.candle_dtype())?;
        let length = 3 * patch * patch;
        let columns = length.next_multiple_of(8);
        let tensor = tensor
            .reshape((hidden, length))?
            .pad_with_zeros(1, 0, columns - length)?
            .contiguous()?;
        Ok(Weights {
            memory: self.upload(&self.bytes(&tensor)?)?,
            rows: hidden,
            columns,
            bias: Some(self.upload(&self.floats(&[hidden], &format!("{name}.bias"))?)?),
        })
    }
}
