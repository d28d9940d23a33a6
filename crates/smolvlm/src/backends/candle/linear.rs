//! Layers whose weights may be quantized.

use std::sync::Arc;

use candle_core::{
    DType, Device, Module, Result as CandleResult, Tensor,
    quantized::{GgmlDType, QMatMul, QStorage, QTensor},
};
use candle_nn::VarBuilder;

use crate::files::{
    formats::{Format, Formats},
    weights::{Loader, WeightTensor},
};

/// Where layers get their matrices, and what they are held in.
#[derive(Clone, Copy)]
pub(crate) struct Matrices<'a> {
    pub(crate) loader: Loader<'a>,
    pub(crate) formats: Formats,
}

impl Matrices<'_> {
    /// `vb` is at the matrix' module. Widened only where it stays dense.
    fn weight(
        &self,
        shape: (usize, usize),
        vb: &VarBuilder,
    ) -> CandleResult<(WeightTensor, Format)> {
        let name = format!("{}.weight", vb.prefix());
        let format = self.loader.format(&name, self.formats)?;
        let dtype = match format {
            Format::Dense(dtype) => Some(dtype),
            Format::Quantized(_) => None,
        };
        Ok((self.loader.weight(&shape.into(), &name, dtype)?, format))
    }

    /// What the head is held in where it is the table.
    pub(crate) fn tied_head(&self) -> CandleResult<Format> {
        self.loader.tied_head(self.formats)
    }
}

/// Weights and, for some layers, a bias.
#[derive(Debug)]
pub(crate) enum Linear {
    Dense(candle_nn::Linear),
    /// Dense weights that are to be held in blocks: kernels of our own quantize them as they pack them.
    Unquantized(Tensor, GgmlDType, Option<Tensor>),
    /// Blocks: those that the kernels know are packed when a whole layer is loaded, candle multiplies the others.
    Quantized(QMatMul, Option<Tensor>),
}

impl Linear {
    /// Loads a layer from `from` to `to` values.
    pub(crate) fn load(
        (from, to): (usize, usize),
        bias: bool,
        matrices: Matrices<'_>,
        vb: VarBuilder,
    ) -> CandleResult<Self> {
        let (weight, format) = matrices.weight((to, from), &vb)?;
        let bias = bias.then(|| vb.get(to, "bias")).transpose()?;
        Self::new(weight, bias, format)
    }

    /// Of weights that are held in this format from now on.
    pub(crate) fn new(
        weight: WeightTensor,
        bias: Option<Tensor>,
        format: Format,
    ) -> CandleResult<Self> {
        Ok(match (weight, format) {
            (WeightTensor::Dense(weight), Format::Dense(dtype)) => {
                Self::Dense(candle_nn::Linear::new(weight.to_dtype(dtype)?, bias))
            }
            (WeightTensor::Dense(weight), Format::Quantized(blocks)) => {
                Self::Unquantized(weight, blocks, bias)
            }
            (WeightTensor::Quantized(weight), Format::Dense(dtype)) => {
                let weight = weight.dequantize(&weight.device())?.to_dtype(dtype)?;
                Self::Quantized(QMatMul::Tensor(weight), bias)
            }
            (WeightTensor::Quantized(weight), Format::Quantized(_)) => {
                Self::Quantized(QMatMul::from_arc(weight)?, bias)
            }
        })
    }
}

impl Linear {
    /// The layer as candle multiplies it.
    pub(crate) fn quantized(self) -> CandleResult<Self> {
        Ok(match self {
            Self::Unquantized(weight, blocks, bias) if fills(&weight, blocks)? => {
                Self::Quantized(QMatMul::from_qtensor(quantize(&weight, blocks)?)?, bias)
            }
            // As 4304 in the encoder of the 2.2B. Quantized models compute in f32.
            Self::Unquantized(weight, _, bias) => {
                Self::Dense(candle_nn::Linear::new(weight.to_dtype(DType::F32)?, bias))
            }
            other => other,
        })
    }
}

/// Whether rows are whole numbers of blocks.
fn fills(weight: &Tensor, blocks: GgmlDType) -> CandleResult<bool> {
    Ok(weight.dims2()?.1.is_multiple_of(blocks.block_size()))
}

/// On the CPU, as candle does in any case, and a part at a time: it takes as much memory as the weights once
/// more, in f32.
fn quantize(weight: &Tensor, blocks: GgmlDType) -> CandleResult<QTensor> {
    const ROWS: usize = 4096;
    let device = weight.device();
    let weight = weight.to_device(&Device::Cpu)?;
    let rows = weight.dim(0)?;
    let mut bytes = Vec::new();
    for start in (0..rows).step_by(ROWS) {
        let part = weight.narrow(0, start, ROWS.min(rows - start))?;
        // Its own values: candle would quantize all that is in the storage of a part in f32.
        let part = part.force_contiguous()?.to_dtype(DType::F32)?;
        let part = QTensor::quantize(&part, blocks)?;
        bytes.extend_from_slice(&part.data()?);
    }
    let storage = QStorage::from_data(bytes.into(), device, blocks)?;
    QTensor::new(storage, weight.shape())
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        match self {
            Self::Dense(linear) => linear.forward(x),
            Self::Unquantized(weight, blocks, bias) => {
                Self::Unquantized(weight.clone(), *blocks, bias.clone())
                    .quantized()?
                    .forward(x)
            }
            Self::Quantized(weight, bias) => {
                let y = match weight {
                    QMatMul::QTensor(blocks) if widens(x)? => {
                        x.matmul(&blocks.dequantize(x.device())?.t()?)?
                    }
                    _ => weight.forward(x)?,
                };
                match bias {
                    None => Ok(y),
                    Some(bias) => y.broadcast_add(bias),
                }
            }
        }
    }
}

/// Whether it takes less time to widen the blocks and multiply in f32: on a CPU where candle multiplies blocks by
/// one row at a time.
fn widens(x: &Tensor) -> CandleResult<bool> {
    const MANY_ROWS: usize = 8;
    Ok(x.dim(0)? >= MANY_ROWS && x.device().is_cpu() && !has_vnni())
}

/// Whether the processor has the instructions that candle multiplies blocks by many rows with.
fn has_vnni() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512vnni");
    #[cfg(not(target_arch = "x86_64"))]
    true
}

/// A row of values for each token.
#[derive(Debug)]
pub(crate) enum Embedding {
    /// Rows of any type, and the type to make of them: widened, those of the 256M take 57 MB more.
    Dense(Tensor, DType),
    /// Rows are widened when they are asked for: the table of the 2.2B would take 400 MB in f32.
    Quantized(Arc<QTensor>),
}

impl Embedding {
    pub(crate) fn load(
        shape: (usize, usize),
        matrices: Matrices<'_>,
        vb: VarBuilder,
    ) -> CandleResult<Self> {
        Ok(match matrices.weight(shape, &vb)?.0 {
            WeightTensor::Dense(rows) => Self::Dense(rows, vb.dtype()),
            WeightTensor::Quantized(rows) => Self::Quantized(rows),
        })
    }

    /// The layer that gives each token the product with its row.
    pub(crate) fn tied(&self, format: Format) -> CandleResult<Linear> {
        let rows = match self {
            Self::Dense(rows, _) => WeightTensor::Dense(rows.clone()),
            Self::Quantized(rows) => WeightTensor::Quantized(rows.clone()),
        };
        Linear::new(rows, None, format)
    }

    /// `[tokens, length]`
    pub(crate) fn forward(&self, ids: &[u32]) -> CandleResult<Tensor> {
        match self {
            Self::Dense(rows, dtype) => rows
                .index_select(&Tensor::new(ids, rows.device())?, 0)?
                .to_dtype(*dtype),
            Self::Quantized(rows) => rows.embedding(&Tensor::new(ids, &rows.device())?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(row: usize, blocks: Option<GgmlDType>) -> Linear {
        let weight = Tensor::arange(0f32, 3.0 * row as f32, &Device::Cpu);
        let weight = weight.and_then(|w| ((w * 0.7)?.sin())?.reshape((3, row)));
        let bias = Tensor::new(&[1f32, 2.0, 3.0], &Device::Cpu).unwrap();
        let format = match blocks {
            Some(blocks) => Format::Quantized(blocks),
            None => Format::Dense(DType::F32),
        };
        Linear::new(WeightTensor::Dense(weight.unwrap()), Some(bias), format)
            .and_then(Linear::quantized)
            .unwrap()
    }

    #[test]
    fn quantized_is_nearly_the_same() {
        // The products, not the bias: relative to their own size.
        let x = Tensor::arange(0f32, 1024.0, &Device::Cpu).unwrap();
        let x = x.cos().unwrap().reshape((2, 512)).unwrap();
        let products = |blocks| {
            let y = layer(512, blocks).forward(&x).unwrap();
            let y = y.to_vec2::<f32>().unwrap().concat();
            let bias = [1f32, 2.0, 3.0].into_iter().cycle();
            y.into_iter()
                .zip(bias)
                .map(|(y, bias)| y - bias)
                .collect::<Vec<_>>()
        };
        let length = |values: &[f32]| values.iter().map(|v| v * v).sum::<f32>().sqrt();
        let exact = products(None);
        for (blocks, bound) in [(GgmlDType::Q8_0, 0.02), (GgmlDType::Q4_0, 0.3)] {
            let near = products(Some(blocks));
            let off = exact
                .iter()
                .zip(&near)
                .map(|(a, b)| a - b)
                .collect::<Vec<_>>();
            let off = length(&off) / length(&exact);
            assert!(off > 0.0 && off < bound, "{blocks:?}: {off}");
        }
    }

    #[test]
    fn many_rows_are_quantized_in_parts_of_every_type() {
        let rows = Tensor::arange(0f32, 5000.0 * 32.0, &Device::Cpu).unwrap();
        let rows = ((rows * 0.01).unwrap().sin().unwrap())
            .reshape((5000, 32))
            .unwrap();
        for dtype in [DType::F32, DType::BF16] {
            let stored = rows.to_dtype(dtype).unwrap();
            let whole = QTensor::quantize(&stored.to_dtype(DType::F32).unwrap(), GgmlDType::Q8_0);
            let parts = quantize(&stored, GgmlDType::Q8_0).unwrap();
            assert_eq!(
                parts.data().unwrap(),
                whole.unwrap().data().unwrap(),
                "{dtype:?}"
            );
        }
    }
}
