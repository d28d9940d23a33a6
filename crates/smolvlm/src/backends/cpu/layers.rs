//! Layers of a quantized model on the CPU: the same arithmetic as candle's, fused and on plain slices.

use candle_core::Result as CandleResult;
use candle_nn::RmsNorm;
use vlmnarrate_kernels::{
    self as kernels, ActivationBuffers, Epilogue, F32Rows, INT8_BLOCK, Int8Buffer, LANES,
    QkvBlocks, QkvShape, SequenceRows, SwiGlu, bidirectional_attention, causal_attention,
    gelu_matmul_int8, matmul_int8_blocks,
};

use super::matrix::{Int8Matrix, Matrix, Stack, biases, parameters, widened};
use crate::backends::candle::{decoder, encoder, linear::Linear};

/// What a forward pass needs beside its input, from layer to layer.
#[derive(Default)]
pub(crate) struct Workspace {
    quantized: ActivationBuffers,
    int8: [Int8Buffer; 2],
    qkv: Vec<f32>,
    attn_out: Vec<f32>,
    inner: Vec<f32>,
}

/// Room for so many values, whatever they are.
fn room(values: &mut Vec<f32>, len: usize) -> &mut [f32] {
    values.resize(len, 0.0);
    values
}

/// An RMS norm's parameters.
#[derive(Debug)]
struct Norm {
    weight: Vec<f32>,
    epsilon: f32,
}

impl Norm {
    fn rms(norm: &RmsNorm) -> CandleResult<Self> {
        Ok(Self {
            weight: parameters(norm.weight())?,
            epsilon: norm.eps() as f32,
        })
    }

    fn rms_norm<'a>(&'a self, x: &'a [f32]) -> kernels::RmsNorm<'a> {
        kernels::RmsNorm {
            x: F32Rows::new(x, self.weight.len()),
            weight: &self.weight,
            epsilon: self.epsilon,
        }
    }
}

/// The head size that attention takes heads of this size in.
pub(crate) fn padded_head(size: usize) -> usize {
    match size < INT8_BLOCK {
        true => size.next_power_of_two().max(LANES),
        false => size.next_multiple_of(INT8_BLOCK),
    }
}

/// Whether kernels can take rows of this length, and heads.
fn fits(length: usize) -> bool {
    length.is_multiple_of(LANES)
}

#[derive(Debug)]
pub(crate) struct EncoderLayer {
    qkv: Int8Matrix,
    out_proj: Int8Matrix,
    fc1: Int8Matrix,
    fc2: Int8Matrix,
    /// Of both norms.
    epsilons: [f32; 2],
    heads: usize,
    head_size: usize,
}

impl EncoderLayer {
    /// `None` if there are no kernels for it.
    pub(crate) fn new(layer: &encoder::Layer) -> CandleResult<Option<Self>> {
        let (norm1, norm2) = (&layer.layer_norm1, &layer.layer_norm2);
        let hidden = norm1.weight().elem_count();
        let attention = [&layer.q_proj, &layer.k_proj, &layer.v_proj];
        let all = [&layer.out_proj, &layer.fc1, &layer.fc2];
        let (Some(attention_weights), Some(all)) = (widened(&attention)?, widened(&all)?) else {
            return Ok(None);
        };
        let (Some(qkv), Some(out_proj), Some(fc1), Some(fc2)) = (
            Stack::new(&attention_weights)?,
            Stack::new([&all[0]])?,
            Stack::new([&all[1]])?,
            Stack::new([&all[2]])?,
        ) else {
            return Ok(None);
        };
        if !fits(hidden) || !fits(fc1.rows()) {
            return Ok(None);
        }
        let heads = layer.heads;
        let (head_size, padded) = (hidden / heads, padded_head(hidden / heads));
        let width = heads * padded;
        // Each head is followed by zeros.
        let mut qkv_bias = vec![0.0; 3 * width];
        let stored = biases(&attention, qkv.rows())?;
        for (to, bias) in qkv_bias.chunks_mut(padded).zip(stored.chunks(head_size)) {
            to[..head_size].copy_from_slice(bias);
        }
        let qkv = Int8Matrix::new(
            (3 * width, hidden),
            |row, to| match row % padded < head_size {
                true => qkv.write(row / padded * head_size + row % padded, to),
                false => to.fill(0.0),
            },
            qkv_bias,
            Some(norm1),
        )?;
        let bias = biases(&[&layer.out_proj], hidden)?;
        let out_proj = Int8Matrix::new(
            (hidden, width),
            |row, to| {
                let mut values = vec![0.0; hidden];
                out_proj.write(row, &mut values);
                for (to, values) in to.chunks_mut(padded).zip(values.chunks(head_size)) {
                    let (head, rest) = to.split_at_mut(head_size);
                    head.copy_from_slice(values);
                    rest.fill(0.0);
                }
            },
            bias,
            None,
        )?;
        let fc1 = Int8Matrix::of(&layer.fc1, &fc1, Some(norm2))?;
        let fc2 = Int8Matrix::of(&layer.fc2, &fc2, None)?;
        let (Some(qkv), Some(out_proj), Some(fc1), Some(fc2)) = (qkv, out_proj, fc1, fc2) else {
            return Ok(None);
        };
        Ok(Some(Self {
            qkv,
            out_proj,
            fc1,
            fc2,
            epsilons: [norm1, norm2].map(|norm| norm.eps() as f32),
            heads,
            head_size,
        }))
    }

    /// Of `x`, `[patches, hidden]`, to what takes its place.
    pub(crate) fn forward(&self, x: &mut [f32], workspace: &mut Workspace) {
        let Workspace {
            int8: [narrow, wide],
            qkv,
            ..
        } = workspace;
        let hidden = self.out_proj.rows();
        let patches = x.len() / hidden;
        let columns = self.qkv.rows().next_multiple_of(INT8_BLOCK);
        let qkv = room(qkv, patches * columns);
        let normed = narrow.quantize(&norm(x, hidden, self.epsilons[0]));
        matmul_int8_blocks(normed, &self.qkv.weights, Some(&self.qkv.bias), qkv);
        let blocks = QkvBlocks {
            qkv,
            rows: patches,
            heads: self.heads,
            head_size: padded_head(self.head_size),
            scale: 1.0 / (self.head_size as f32).sqrt(),
        };
        let attn_out = bidirectional_attention(blocks, narrow);
        self.out_proj.multiply(attn_out, Epilogue::Add, x);

        let normed = narrow.quantize(&norm(x, hidden, self.epsilons[1]));
        let inner = gelu_matmul_int8(normed, &self.fc1.weights, Some(&self.fc1.bias), wide);
        self.fc2.multiply(inner, Epilogue::Add, x);
    }
}

/// A layer norm whose weight and bias are in the weights behind it.
fn norm(x: &[f32], hidden: usize, epsilon: f32) -> kernels::LayerNorm<'_> {
    kernels::LayerNorm {
        x: F32Rows::new(x, hidden),
        epsilon,
    }
}

#[derive(Debug)]
pub(crate) struct DecoderLayer {
    input_layernorm: Norm,
    qkv: Matrix,
    o_proj: Matrix,
    post_attention_layernorm: Norm,
    gate_up: Matrix,
    down_proj: Matrix,
    shape: QkvShape,
}

impl DecoderLayer {
    /// `None` if there are no kernels for it.
    pub(crate) fn new(layer: &decoder::Layer) -> CandleResult<Option<Self>> {
        let matrix = |layers: &[&Linear]| Matrix::new(layers);
        let (Some(qkv), Some(o_proj), Some(gate_up), Some(down_proj)) = (
            matrix(&[&layer.q_proj, &layer.k_proj, &layer.v_proj])?,
            matrix(&[&layer.o_proj])?,
            matrix(&[&layer.gate_proj, &layer.up_proj])?,
            matrix(&[&layer.down_proj])?,
        ) else {
            return Ok(None);
        };
        let fits = fits(layer.head_dim) && fits(o_proj.rows()) && fits(gate_up.rows() / 2);
        Ok(fits.then_some(Self {
            input_layernorm: Norm::rms(&layer.input_layernorm)?,
            qkv,
            o_proj,
            post_attention_layernorm: Norm::rms(&layer.post_attention_layernorm)?,
            gate_up,
            down_proj,
            shape: QkvShape {
                heads: layer.heads,
                kv_heads: layer.kv_heads,
                head_size: layer.head_dim,
            },
        }))
    }

    /// Of `x`, `[rows, hidden]` of all sequences, to what takes its place.
    pub(crate) fn forward(
        &self,
        x: &mut [f32],
        rope: (&[f32], &[f32]),
        sequences: &mut [SequenceRows<'_>],
        workspace: &mut Workspace,
    ) {
        let Workspace {
            quantized,
            qkv,
            attn_out,
            inner,
            ..
        } = workspace;
        let tokens = x.len() / self.o_proj.rows();
        let qkv = room(qkv, tokens * self.qkv.rows());
        self.qkv.multiply(
            &self.input_layernorm.rms_norm(x),
            quantized,
            Epilogue::Store,
            qkv,
        );
        let width = self.shape.heads * self.shape.head_size;
        let attn_out = room(attn_out, tokens * width);
        causal_attention(qkv, self.shape, rope, sequences, attn_out);
        self.o_proj
            .multiply(&F32Rows::new(attn_out, width), quantized, Epilogue::Add, x);

        let inner = room(inner, tokens * self.gate_up.rows());
        let normed = self.post_attention_layernorm.rms_norm(x);
        self.gate_up
            .multiply(&normed, quantized, Epilogue::Store, inner);
        let inner = SwiGlu(F32Rows::new(inner, self.gate_up.rows()));
        self.down_proj.multiply(&inner, quantized, Epilogue::Add, x);
    }
}

/// The last norm and the layer that gives each token of the vocabulary its score.
#[derive(Debug)]
pub(crate) struct Head {
    norm: Norm,
    weights: Matrix,
}

impl Head {
    /// `None` if there is no kernel for it.
    pub(crate) fn new(norm: &RmsNorm, lm_head: &Linear) -> CandleResult<Option<Self>> {
        let Some(weights) = Matrix::new(&[lm_head])? else {
            return Ok(None);
        };
        let norm = Norm::rms(norm)?;
        Ok(Some(Self { norm, weights }))
    }

    /// Scores of each of some states.
    pub(crate) fn forward(&self, x: &[f32], workspace: &mut Workspace) -> Vec<f32> {
        let x = self.norm.rms_norm(x);
        let mut scores = vec![0.0; kernels::RowSource::rows(&x) * self.weights.rows()];
        self.weights
            .multiply(&x, &mut workspace.quantized, Epilogue::Store, &mut scores);
        scores
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor, quantized::GgmlDType};
    use candle_nn::LayerNorm;

    use super::*;
    use crate::files::{formats::Format, weights::WeightTensor};

    /// A layer with heads of a size that is padded and rows that are no whole blocks, in f32 or to be quantized.
    /// Some channels of the norms are `outlier` times as large, and the weights behind them as much smaller.
    fn layer(heads: usize, outlier: f32, format: Format) -> encoder::Layer {
        const HIDDEN: usize = 96;
        const INNER: usize = 112;
        let mut rng = fastrand::Rng::with_seed(4);
        let mut noise = |len: usize, size: f32| -> Vec<f32> {
            (0..len).map(|_| (rng.f32() - 0.5) * size).collect()
        };
        let gain = |channel: usize| if channel % 17 == 3 { outlier } else { 1.0 };
        let tensor = |values: Vec<f32>, shape: &[usize]| {
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        let mut norm = || {
            let parts = [1.0, 0.0].map(|middle| {
                let values = noise(HIDDEN, 0.5).into_iter().enumerate();
                let values = values.map(|(i, x)| (x + middle) * gain(i)).collect();
                tensor(values, &[HIDDEN])
            });
            let [weight, bias] = parts;
            LayerNorm::new(weight, bias, 1e-6)
        };
        let (layer_norm1, layer_norm2) = (norm(), norm());
        let mut linear = |from: usize, to: usize, is_behind_norm: bool| {
            let mut weight = noise(from * to, 0.6);
            for (i, w) in weight.iter_mut().enumerate().filter(|_| is_behind_norm) {
                *w /= gain(i % from);
            }
            let bias = tensor(noise(to, 0.5), &[to]);
            let weight = WeightTensor::Dense(tensor(weight, &[to, from]));
            Linear::new(weight, Some(bias), format).unwrap()
        };
        encoder::Layer {
            q_proj: linear(HIDDEN, HIDDEN, true),
            k_proj: linear(HIDDEN, HIDDEN, true),
            v_proj: linear(HIDDEN, HIDDEN, true),
            out_proj: linear(HIDDEN, HIDDEN, false),
            fc1: linear(HIDDEN, INNER, true),
            fc2: linear(INNER, HIDDEN, false),
            layer_norm1,
            layer_norm2,
            heads,
        }
    }

    /// How far the fused layer is from candle's in f32, of what it adds to its input.
    fn distance(heads: usize, outlier: f32) -> f64 {
        const ROWS: usize = 70;
        let mut rng = fastrand::Rng::with_seed(5);
        let x: Vec<_> = (0..ROWS * 96).map(|_| rng.f32() * 4.0 - 2.0).collect();
        let tensor = Tensor::from_vec(x.clone(), (ROWS, 96), &Device::Cpu).unwrap();
        let exact = layer(heads, outlier, Format::Dense(DType::F32)).forward(&tensor);
        let exact = exact.unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let fused = layer(heads, outlier, Format::Quantized(GgmlDType::Q8_0));
        let fused = EncoderLayer::new(&fused).unwrap().expect("kernels");
        let mut y = x.clone();
        fused.forward(&mut y, &mut Workspace::default());
        let (mut off, mut all) = (0.0, 0.0);
        for ((y, exact), x) in y.into_iter().zip::<Vec<f32>>(exact).zip(x) {
            off += f64::from(y - exact).powi(2);
            all += f64::from(exact - x).powi(2);
        }
        (off / all).sqrt()
    }

    #[test]
    fn heads_and_rows_of_any_size_come_out_as_candle_has_them() {
        // Of 24 and 96 values.
        for heads in [4, 1] {
            let off = distance(heads, 1.0);
            assert!(off < 3e-2, "{heads}: {off}");
        }
    }

    #[test]
    fn outliers_of_norms_cost_no_precision() {
        let without = distance(4, 1.0);
        for outlier in [10.0, 100.0] {
            let off = distance(4, outlier);
            assert!(off < 1.1 * without, "{outlier}: {off}, {without} without");
        }
    }
}
