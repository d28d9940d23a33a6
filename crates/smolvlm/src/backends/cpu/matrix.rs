//! Linear layers of a quantized model, packed for the kernels.

use candle_core::{
    Device, Error as CandleError, Result as CandleResult, Tensor,
    quantized::{GgmlDType, QMatMul, QTensor},
};
use candle_nn::LayerNorm;
use rayon::prelude::*;
use vlmnarrate_kernels::{
    ActivationBuffers, BlockQ4_0x16, BlockQ8_0x16, Epilogue, F32Rows, GgmlBlock, Int8Rows,
    Int8Weights, PackedWeights, RowSource, matmul, matmul_int8,
};

use crate::backends::candle::{
    linear::Linear,
    values::{MatrixRows, numbers},
};

/// The values of a norm or a bias, checked here because they are not checked when they are used.
pub(super) fn parameters(tensor: &Tensor) -> CandleResult<Vec<f32>> {
    let numbers = numbers(tensor)?;
    match numbers.iter().all(|x| x.is_finite()) {
        true => Ok(numbers),
        false => Err(CandleError::msg(
            "a norm or a bias has values that are not finite",
        )),
    }
}

/// Linear layers with the same input, as one.
#[derive(Debug)]
pub(crate) struct Matrix {
    weights: Weights,
    bias: Option<Vec<f32>>,
}

#[derive(Debug)]
enum Weights {
    Q8_0(PackedWeights<BlockQ8_0x16>),
    Q4_0(PackedWeights<BlockQ4_0x16>),
}

impl Matrix {
    /// `None` if there is no kernel for them.
    pub(crate) fn new(layers: &[&Linear]) -> CandleResult<Option<Self>> {
        let weights = match Stack::unquantized(layers)? {
            Some((GgmlDType::Q8_0, stack)) => stack.quantize().map(Weights::Q8_0),
            Some((GgmlDType::Q4_0, stack)) => stack.quantize().map(Weights::Q4_0),
            Some(_) => None,
            None => match quantized(layers)? {
                Some((GgmlDType::Q8_0, parts)) => pack(&parts)?.map(Weights::Q8_0),
                Some((GgmlDType::Q4_0, parts)) => pack(&parts)?.map(Weights::Q4_0),
                _ => None,
            },
        };
        let biases = layers.iter().map(|layer| bias(layer).map(parameters));
        let biases: Option<Vec<_>> = biases.collect();
        let biases = biases.map(|all| all.into_iter().collect::<CandleResult<Vec<_>>>());
        let bias = biases.transpose()?.map(|biases| biases.concat());
        Ok(weights.map(|weights| Self { weights, bias }))
    }

    pub(super) fn rows(&self) -> usize {
        match &self.weights {
            Weights::Q8_0(weights) => weights.rows(),
            Weights::Q4_0(weights) => weights.rows(),
        }
    }

    /// Of a tensor on the CPU, `[rows, length]` in whole lanes.
    pub(crate) fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let (rows, length) = x.dims2()?;
        let x = numbers(x)?;
        let mut out = vec![0.0; rows * self.rows()];
        self.multiply(
            &F32Rows::new(&x, length),
            &mut ActivationBuffers::default(),
            Epilogue::Store,
            &mut out,
        );
        Tensor::from_vec(out, (rows, self.rows()), &Device::Cpu)
    }

    /// Quantizes `x` and multiplies.
    pub(super) fn multiply(
        &self,
        x: &impl RowSource,
        quantized: &mut ActivationBuffers,
        epilogue: Epilogue,
        out: &mut [f32],
    ) {
        let bias = self.bias.as_deref();
        match &self.weights {
            Weights::Q8_0(weights) => matmul(
                quantized.i16_per_row.quantize(x),
                weights,
                bias,
                epilogue,
                out,
            ),
            Weights::Q4_0(weights) => matmul(
                quantized.i8_per_block.quantize(x),
                weights,
                bias,
                epilogue,
                out,
            ),
        }
    }
}

fn bias(layer: &Linear) -> Option<&Tensor> {
    match layer {
        Linear::Dense(linear) => linear.bias(),
        Linear::Unquantized(_, _, bias) | Linear::Quantized(_, bias) => bias.as_ref(),
    }
}

/// The blocks of layers with rows of one length, and their common type, if they are on the CPU.
fn quantized<'a>(layers: &[&'a Linear]) -> CandleResult<Option<(GgmlDType, Vec<&'a QTensor>)>> {
    let mut parts = Vec::new();
    for layer in layers {
        match layer {
            Linear::Quantized(QMatMul::QTensor(weights), _) if weights.device().is_cpu() => {
                parts.push(weights.as_ref());
            }
            _ => return Ok(None),
        }
    }
    let Some(first) = parts.first() else {
        return Ok(None);
    };
    let (dtype, columns) = (first.dtype(), first.shape().dims2()?.1);
    for part in &parts {
        if part.dtype() != dtype || part.shape().dims2()?.1 != columns {
            return Ok(None);
        }
    }
    Ok(Some((dtype, parts)))
}

fn pack<B: GgmlBlock>(parts: &[&QTensor]) -> CandleResult<Option<PackedWeights<B>>> {
    let data = parts.iter().map(|part| part.data());
    let data = data.collect::<CandleResult<Vec<_>>>()?;
    let shapes = parts.iter().map(|part| part.shape().dims2());
    let shapes = shapes.collect::<CandleResult<Vec<_>>>()?;
    let rows: usize = shapes.iter().map(|(rows, _)| rows).sum();
    let bytes = data.iter().map(|data| data.len()).sum::<usize>() / rows;
    let all = data.iter().flat_map(|data| data.chunks_exact(bytes));
    Ok(PackedWeights::from_ggml(rows, shapes[0].1, all))
}

/// Dense matrices with rows of one length, one below the other.
pub(super) struct Stack<'a>(Vec<MatrixRows<'a>>);

impl<'a> Stack<'a> {
    /// Matrices that are to become blocks, and of which type.
    fn unquantized(layers: &[&'a Linear]) -> CandleResult<Option<(GgmlDType, Self)>> {
        let (mut tensors, mut dtypes) = (Vec::new(), Vec::new());
        for layer in layers {
            match layer {
                Linear::Unquantized(weight, blocks, _) => {
                    tensors.push(weight);
                    dtypes.push(*blocks);
                }
                _ => return Ok(None),
            }
        }
        dtypes.dedup();
        let stack = Self::new(tensors)?;
        Ok(match dtypes[..] {
            [dtype] => stack.map(|stack| (dtype, stack)),
            _ => None,
        })
    }

    pub(super) fn new(tensors: impl IntoIterator<Item = &'a Tensor>) -> CandleResult<Option<Self>> {
        let parts = tensors.into_iter().map(MatrixRows::new);
        let parts: Option<Vec<_>> = parts.collect::<CandleResult<_>>()?;
        let same = |parts: &Vec<MatrixRows<'_>>| {
            parts.windows(2).all(|two| two[0].columns == two[1].columns)
        };
        Ok(parts.filter(same).map(Self))
    }

    pub(super) fn rows(&self) -> usize {
        self.0.iter().map(|part| part.rows).sum()
    }

    pub(super) fn columns(&self) -> usize {
        self.0.first().map_or(0, |part| part.columns)
    }

    pub(super) fn write(&self, mut row: usize, to: &mut [f32]) {
        for part in &self.0 {
            if row < part.rows {
                return part.write(row, to);
            }
            row -= part.rows;
        }
    }

    fn quantize<B: GgmlBlock>(&self) -> Option<PackedWeights<B>> {
        let columns = self.columns();
        let fits = columns > 0 && columns.is_multiple_of(Q_BLOCK);
        fits.then(|| PackedWeights::quantize(self.rows(), columns, |row, to| self.write(row, to)))?
    }
}

/// Weights with a common scale in ggml's blocks.
const Q_BLOCK: usize = 32;

/// Linear layers with the same input, as one whose weights and activations have 8 bits.
#[derive(Debug)]
pub(super) struct Int8Matrix {
    pub(super) weights: Int8Weights,
    pub(super) bias: Vec<f32>,
}

impl Int8Matrix {
    /// Of rows that `write` puts to where it is told, behind a norm whose weight and bias become theirs. `None` if a
    /// value is not finite.
    pub(super) fn new(
        (rows, columns): (usize, usize),
        write: impl Fn(usize, &mut [f32]) + Sync,
        mut bias: Vec<f32>,
        norm: Option<&LayerNorm>,
    ) -> CandleResult<Option<Self>> {
        let (mut gains, mut shift) = (Vec::new(), Vec::new());
        if let Some(norm) = norm {
            gains = parameters(norm.weight())?;
            shift = norm.bias().map(parameters).transpose()?.unwrap_or_default();
        }
        if shift.iter().any(|x| *x != 0.0) {
            bias.par_iter_mut().enumerate().for_each(|(i, bias)| {
                let mut row = vec![0.0; columns];
                write(i, &mut row);
                *bias += row.iter().zip(&shift).map(|(w, x)| w * x).sum::<f32>();
            });
        }
        let weights = Int8Weights::quantize(rows, columns, |i, row| {
            write(i, row);
            for (w, gain) in row.iter_mut().zip(&gains) {
                *w *= gain;
            }
        });
        Ok(weights.map(|weights| Self { weights, bias }))
    }

    /// Of a layer as it is.
    pub(super) fn of(
        layer: &Linear,
        stack: &Stack<'_>,
        norm: Option<&LayerNorm>,
    ) -> CandleResult<Option<Self>> {
        let shape = (stack.rows(), stack.columns());
        let bias = biases(&[layer], shape.0)?;
        Self::new(shape, |row, to| stack.write(row, to), bias, norm)
    }

    pub(super) fn rows(&self) -> usize {
        self.weights.rows()
    }

    pub(super) fn multiply(&self, x: Int8Rows<'_>, epilogue: Epilogue, out: &mut [f32]) {
        matmul_int8(x, &self.weights, Some(&self.bias), epilogue, out);
    }
}

/// Biases of layers with so many rows in all, zeros for those without.
pub(super) fn biases(layers: &[&Linear], rows: usize) -> CandleResult<Vec<f32>> {
    let mut all = Vec::with_capacity(rows);
    for layer in layers {
        match bias(layer) {
            Some(bias) => all.extend(parameters(bias)?),
            None => all.resize(all.len() + rows / layers.len(), 0.0),
        }
    }
    Ok(all)
}

/// Matrices of the encoder that become bytes, widened first where they are blocks.
pub(super) fn widened(layers: &[&Linear]) -> CandleResult<Option<Vec<Tensor>>> {
    let mut tensors = Vec::new();
    for layer in layers {
        tensors.push(match layer {
            Linear::Unquantized(weight, GgmlDType::Q8_0, _) => weight.clone(),
            Linear::Quantized(QMatMul::QTensor(weight), _)
                if weight.dtype() == GgmlDType::Q8_0 && weight.device().is_cpu() =>
            {
                weight.dequantize(&Device::Cpu)?
            }
            _ => return Ok(None),
        });
    }
    Ok(Some(tensors))
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::files::{formats::Format, weights::WeightTensor};

    /// A layer that is to become blocks, and its weights.
    fn layer(rows: usize, columns: usize, seed: u64, blocks: GgmlDType) -> Linear {
        let mut rng = fastrand::Rng::with_seed(seed);
        // Some blocks are zeros, and some have ties.
        let mut value = |i: usize| match i / 32 % 7 {
            0 => 0.0,
            1 => (i % 9) as f32 - 4.0,
            _ => rng.f32() - 0.5,
        };
        let values: Vec<_> = (0..rows * columns).map(&mut value).collect();
        let weight = Tensor::from_vec(values, (rows, columns), &Device::Cpu);
        let weight = weight.unwrap().to_dtype(DType::BF16).unwrap();
        Linear::new(WeightTensor::Dense(weight), None, Format::Quantized(blocks)).unwrap()
    }

    #[test]
    fn dense_weights_become_the_blocks_that_candle_makes_of_them() {
        let x = Tensor::arange(0f32, 3.0 * 96.0, &Device::Cpu).unwrap();
        let x = x.sin().unwrap().reshape((3, 96)).unwrap();
        for blocks in [GgmlDType::Q8_0, GgmlDType::Q4_0] {
            let layers = || [layer(17, 96, 1, blocks), layer(40, 96, 2, blocks)];
            let product = |layers: &[Linear]| {
                let matrix = Matrix::new(&layers.iter().collect::<Vec<_>>());
                let y = matrix.unwrap().expect("a kernel").forward(&x);
                y.unwrap().to_vec2::<f32>().unwrap()
            };
            let quantized = layers().map(|layer| layer.quantized().unwrap());
            assert!(matches!(quantized[0], Linear::Quantized(..)));
            assert_eq!(product(&layers()), product(&quantized), "{blocks:?}");
        }
    }

    #[test]
    fn layers_that_differ_are_not_one_matrix() {
        let eight = || layer(16, 64, 1, GgmlDType::Q8_0);
        for other in [
            layer(16, 64, 1, GgmlDType::Q4_0),
            layer(16, 32, 1, GgmlDType::Q8_0),
        ] {
            assert!(Matrix::new(&[&eight(), &other]).unwrap().is_none());
            let both = [eight(), other].map(|layer| layer.quantized().unwrap());
            assert!(Matrix::new(&[&both[0], &both[1]]).unwrap().is_none());
        }
    }
}
