//! A checkpoint's tensors on their way to the GPU.

use std::sync::Mutex;

use candle_core::{DType, Error as CandleError, Result as CandleResult, Tensor};
use candle_nn::var_builder::SimpleBackend;

use crate::files::weights::Loader;
use vlmnarrate_cuda::{self as cuda, Gpu, Memory, Norm, Number, Weights};

/// A layer that is one with others.
pub(crate) struct Part<'a> {
    rows: usize,
    name: &'a str,
    /// The size of heads whose halves, which make pairs, come in turn.
    turned: Option<usize>,
}

impl<'a> Part<'a> {
    pub(crate) fn plain(rows: usize, name: &'a str) -> Self {
        Self {
            rows,
            name,
            turned: None,
        }
    }

    /// Of queries or keys, which are turned by their position.
    pub(crate) fn turned(rows: usize, name: &'a str, head: usize) -> Self {
        Self {
            turned: Some(head),
            ..Self::plain(rows, name)
        }
    }
}

/// Rows of so many bytes, one from here and one from there.
fn in_turn(first: &[u8], second: &[u8], row: usize) -> Vec<u8> {
    let pairs = first.chunks_exact(row).zip(second.chunks_exact(row));
    let mut bytes = Vec::with_capacity(first.len() + second.len());
    for (first, second) in pairs {
        bytes.extend_from_slice(first);
        bytes.extend_from_slice(second);
    }
    bytes
}

/// Reads tensors and puts them on the GPU, blocks of quantized files widened.
pub(crate) struct Uploader<'a> {
    pub(crate) gpu: &'a Gpu,
    pub(crate) number: Number,
    loader: Loader<'a>,
    /// What the GPU said, which is more than candle's error can carry.
    failed: &'a Mutex<Option<cuda::Error>>,
}

impl<'a> Uploader<'a> {
    pub(crate) fn new(
        gpu: &'a Gpu,
        number: Number,
        loader: Loader<'a>,
        failed: &'a Mutex<Option<cuda::Error>>,
    ) -> Self {
        Self {
            gpu,
            number,
            loader,
            failed,
        }
    }

    /// Keeps an error of the GPU for whoever asks why the load failed.
    fn on_gpu<T>(&self, result: cuda::Result<T>) -> CandleResult<T> {
        result.map_err(|error| {
            let shown = CandleError::msg(error.to_string());
            *self.failed.lock().unwrap_or_else(|e| e.into_inner()) = Some(error);
            shown
        })
    }

    fn dtype(&self) -> DType {
        match self.number {
            Number::F32 => DType::F32,
            Number::Bf16 => DType::BF16,
            Number::F16 => DType::F16,
        }
    }

    fn tensor(&self, shape: &[usize], name: &str, dtype: DType) -> CandleResult<Tensor> {
        let stored = self.loader.stored(&shape.into(), name, Some(dtype))?;
        stored.dense(dtype)
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.loader.contains_tensor(name)
    }

    /// Values in f32: biases, norms and positions.
    pub(crate) fn floats(&self, shape: &[usize], name: &str) -> CandleResult<Vec<f32>> {
        self.tensor(shape, name, DType::F32)?
            .flatten_all()?
            .to_vec1()
    }

    pub(crate) fn upload<T: bytemuck::Pod>(&self, values: &[T]) -> CandleResult<Memory> {
        self.on_gpu(self.gpu.upload(values))
    }

    /// A layer norm's parameters.
    pub(crate) fn layer_norm(&self, length: usize, epsilon: f64, name: &str) -> CandleResult<Norm> {
        let part = |part: &str| self.upload(&self.floats(&[length], &format!("{name}.{part}"))?);
        Ok(Norm {
            weight: part("weight")?,
            bias: Some(part("bias")?),
            epsilon,
            length,
        })
    }

    /// Bytes of a matrix' rows.
    fn rows(&self, rows: usize, columns: usize, name: &str) -> CandleResult<Vec<u8>> {
        let tensor = self.tensor(&[rows, columns], &format!("{name}.weight"), self.dtype())?;
        self.bytes(&tensor)
    }

    fn bytes(&self, tensor: &Tensor) -> CandleResult<Vec<u8>> {
        let tensor = tensor.flatten_all()?;
        Ok(match self.number {
            Number::F32 => bytemuck::cast_slice(&tensor.to_vec1::<f32>()?).to_vec(),
            Number::Bf16 => bytemuck::cast_slice(&tensor.to_vec1::<half::bf16>()?).to_vec(),
            Number::F16 => bytemuck::cast_slice(&tensor.to_vec1::<half::f16>()?).to_vec(),
        })
    }

    /// A layer without a bias.
    pub(crate) fn linear(&self, rows: usize, columns: usize, name: &str) -> CandleResult<Weights> {
        self.layers(&[Part::plain(rows, name)], columns, false)
    }

    /// Layers with the same input as one.
    pub(crate) fn layers(
        &self,
        parts: &[Part<'_>],
        columns: usize,
        has_bias: bool,
    ) -> CandleResult<Weights> {
        let rows = parts.iter().map(|part| part.rows).sum();
        let row = columns * self.number.bytes();
        let mut memory = self.on_gpu(self.gpu.memory(rows * row))?;
        let (mut at, mut biases) = (0, Vec::new());
        for part in parts {
            let mut bytes = self.rows(part.rows, columns, part.name)?;
            if let Some(size) = part.turned {
                let heads = bytes.chunks_exact(size * row).flat_map(|head| {
                    let (first, second) = head.split_at(head.len() / 2);
                    in_turn(first, second, row)
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

    /// Two layers of the same shape, their rows in turn.
    pub(crate) fn paired(
        &self,
        rows: usize,
        columns: usize,
        names: [&str; 2],
    ) -> CandleResult<Weights> {
        let [first, second] = names.map(|name| self.rows(rows, columns, name));
        let bytes = in_turn(&first?, &second?, columns * self.number.bytes());
        Ok(Weights {
            memory: self.upload(&bytes)?,
            rows: 2 * rows,
            columns,
            bias: None,
        })
    }

    /// A convolution whose steps are as long as its kernel: a row for each channel, zeros up to whole vectors.
    pub(crate) fn patches(&self, hidden: usize, patch: usize, name: &str) -> CandleResult<Weights> {
        let shape = [hidden, 3, patch, patch];
        let tensor = self.tensor(&shape, &format!("{name}.weight"), self.dtype())?;
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
