//! Layers of a quantized model on the CPU: the same arithmetic as candle's, fused and on plain slices.

use candle_core::{
    Device, Error as CandleError, Result as CandleResult, Tensor,
    quantized::{GgmlDType, QMatMul, QTensor},
};
use candle_nn::{LayerNorm, RmsNorm};

use crate::backends::candle::{decoder, encoder, linear::Linear, values::numbers};
use vlmnarrate_kernels::{
    self as kernels, ActivationBuffers, BlockQ4_0x16, BlockQ8_0x16, Epilogue, F32Rows, GgmlBlock,
    INT8_BLOCK, Int8Buffer, Int8Rows, Int8Weights, LANES, PackedWeights, QkvBlocks, QkvShape,
    RowSource, SequenceRows, SwiGlu, bidirectional_attention, causal_attention, gelu_matmul_int8,
    matmul, matmul_int8, matmul_int8_blocks,
};

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

/// The values of a norm or a bias, checked here because they are not checked when they are used.
fn parameters(tensor: &Tensor) -> CandleResult<Vec<f32>> {
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
        let mut parts = Vec::new();
        for layer in layers {
            match layer {
                Linear::Quantized(QMatMul::QTensor(weights), _) => parts.push(weights.as_ref()),
                _ => return Ok(None),
            }
        }
        let (Some(first), true) = (parts.first(), parts.iter().all(|p| p.device().is_cpu())) else {
            return Ok(None);
        };
        let (dtype, (_, length)) = (first.dtype(), first.shape().dims2()?);
        for part in &parts {
            if part.dtype() != dtype || part.shape().dims2()?.1 != length {
                return Ok(None);
            }
        }
        let weights = match dtype {
            GgmlDType::Q8_0 => pack(&parts, length)?.map(Weights::Q8_0),
            GgmlDType::Q4_0 => pack(&parts, length)?.map(Weights::Q4_0),
            _ => None,
        };
        let biases = layers.iter().map(|layer| match layer {
            Linear::Quantized(_, Some(bias)) => parameters(bias).map(Some),
            _ => Ok(None),
        });
        let biases = biases.collect::<CandleResult<Option<Vec<_>>>>()?;
        let bias = biases.map(|biases| biases.concat());
        Ok(weights.map(|weights| Self { weights, bias }))
    }

    fn rows(&self) -> usize {
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
    fn multiply(
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

fn pack<B: GgmlBlock>(parts: &[&QTensor], length: usize) -> CandleResult<Option<PackedWeights<B>>> {
    let data = parts.iter().map(|part| part.data());
    let data = data.collect::<CandleResult<Vec<_>>>()?;
    let rows = |part: &&QTensor| part.shape().dims()[0];
    let rows: usize = parts.iter().map(rows).sum();
    let bytes = data.iter().map(|data| data.len()).sum::<usize>() / rows;
    let all = data.iter().flat_map(|data| data.chunks_exact(bytes));
    Ok(PackedWeights::from_ggml(rows, length, all))
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

/// Linear layers with the same input, as one whose weights and activations have 8 bits.
#[derive(Debug)]
struct Int8Matrix {
    weights: Int8Weights,
    bias: Vec<f32>,
}

impl Int8Matrix {
    /// Of layers that come behind `norm`, whose weights they take over. `None` if there is no kernel for them.
    fn new(layers: &[&Linear], norm: Option<&LayerNorm>) -> CandleResult<Option<Self>> {
        let (mut rows, mut bias) = (Vec::new(), Vec::new());
        for layer in layers {
            let Linear::Quantized(QMatMul::QTensor(weights), layer_bias) = layer else {
                return Ok(None);
            };
            if weights.dtype() != GgmlDType::Q8_0 || !weights.device().is_cpu() {
                return Ok(None);
            }
            let values = weights.dequantize(&Device::Cpu)?.to_vec2::<f32>()?;
            match layer_bias {
                Some(values) => bias.extend(parameters(values)?),
                None => bias.resize(bias.len() + values.len(), 0.0),
            }
            rows.extend(values);
        }
        if let Some(norm) = norm {
            let gains = parameters(norm.weight())?;
            let shift = norm.bias().map(parameters).transpose()?.unwrap_or_default();
            for (row, bias) in rows.iter_mut().zip(&mut bias) {
                *bias += row.iter().zip(&shift).map(|(w, b)| w * b).sum::<f32>();
                for (w, gain) in row.iter_mut().zip(&gains) {
                    *w *= gain;
                }
            }
        }
        let columns = rows.first().map_or(0, Vec::len);
        let weights = Int8Weights::quantize(rows.len(), columns, |row, to| {
            to.copy_from_slice(&rows[row]);
        });
        Ok(weights.map(|weights| Self { weights, bias }))
    }

    fn rows(&self) -> usize {
        self.weights.rows()
    }

    fn multiply(&self, x: Int8Rows<'_>, epilogue: Epilogue, out: &mut [f32]) {
        matmul_int8(x, &self.weights, Some(&self.bias), epilogue, out);
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
}

impl EncoderLayer {
    /// `None` if there are no kernels for it.
    pub(crate) fn new(layer: &encoder::Layer) -> CandleResult<Option<Self>> {
        let (norm1, norm2) = (&layer.layer_norm1, &layer.layer_norm2);
        let hidden = norm1.weight().elem_count();
        let (Some(qkv), Some(out_proj), Some(fc1), Some(fc2)) = (
            Int8Matrix::new(&[&layer.q_proj, &layer.k_proj, &layer.v_proj], Some(norm1))?,
            Int8Matrix::new(&[&layer.out_proj], None)?,
            Int8Matrix::new(&[&layer.fc1], Some(norm2))?,
            Int8Matrix::new(&[&layer.fc2], None)?,
        ) else {
            return Ok(None);
        };
        let fits = fits(hidden / layer.heads) && fits(fc1.rows());
        Ok(fits.then_some(Self {
            qkv,
            out_proj,
            fc1,
            fc2,
            epsilons: [norm1, norm2].map(|norm| norm.eps() as f32),
            heads: layer.heads,
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
        let head_size = hidden / self.heads;
        let blocks = QkvBlocks {
            qkv,
            rows: patches,
            heads: self.heads,
            head_size,
            scale: 1.0 / (head_size as f32).sqrt(),
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
        let mut scores = vec![0.0; x.rows() * self.weights.rows()];
        self.weights
            .multiply(&x, &mut workspace.quantized, Epilogue::Store, &mut scores);
        scores
    }
}
