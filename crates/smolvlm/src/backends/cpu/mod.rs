//! Quantized layers on CPUs, by kernels of our own; candle has the layers that the kernels don't know.

pub(crate) mod layers;
mod matrix;

use candle_core::{DType, Device, Module, Result as CandleResult, Tensor};
use candle_nn::RmsNorm;
use vlmnarrate_kernels::{PackedKv, SequenceRows};

use super::candle::{
    self, LayerRows, Parts, decoder, encoder, kv_cache::LayerKv, linear::Linear, values::in_place,
};
use layers::Workspace;
use matrix::Matrix;

/// Layers that the kernels know, fused; the others as candle has them.
#[derive(Debug)]
pub(crate) struct Fused;

impl Parts for Fused {
    type Workspace = Workspace;
    type EncoderLayer = EncoderLayer;
    type Connector = Connector;
    type DecoderLayer = DecoderLayer;
    type Head = Head;

    fn encoder_layer(layer: encoder::Layer) -> CandleResult<EncoderLayer> {
        Ok(match layers::EncoderLayer::new(&layer)? {
            Some(layer) => EncoderLayer::Fused(layer.into()),
            None => EncoderLayer::Candle(layer.quantized()?.into()),
        })
    }

    fn connector(linear: Linear) -> CandleResult<Connector> {
        Ok(match Matrix::new(&[&linear])? {
            Some(matrix) => Connector::Fused(matrix),
            None => Connector::Candle(linear.quantized()?),
        })
    }

    fn decoder_layer(layer: decoder::Layer) -> CandleResult<DecoderLayer> {
        Ok(match layers::DecoderLayer::new(&layer)? {
            Some(layer) => DecoderLayer::Fused(layer.into()),
            None => DecoderLayer::Candle(layer.quantized()?.into()),
        })
    }

    fn head(norm: RmsNorm, lm_head: Linear) -> CandleResult<Head> {
        Ok(match layers::Head::new(&norm, &lm_head)? {
            Some(head) => Head::Fused(head),
            None => {
                let lm_head = lm_head.quantized()?;
                Head::Candle(decoder::Head { norm, lm_head })
            }
        })
    }
}

#[derive(Debug)]
pub(crate) enum EncoderLayer {
    Candle(Box<encoder::Layer>),
    Fused(Box<layers::EncoderLayer>),
}

impl candle::EncoderLayer<Workspace> for EncoderLayer {
    fn forward(&self, x: Tensor, workspace: &mut Workspace) -> CandleResult<Tensor> {
        match self {
            Self::Candle(layer) => layer.forward(&x),
            Self::Fused(layer) => in_place(x, |x| layer.forward(x, workspace)),
        }
    }

    fn is_fused(&self) -> bool {
        matches!(self, Self::Fused(_))
    }
}

/// The projection into the decoder's embeddings.
#[derive(Debug)]
pub(crate) enum Connector {
    Candle(Linear),
    Fused(Matrix),
}

impl Module for Connector {
    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        match self {
            Self::Candle(linear) => linear.forward(x),
            Self::Fused(matrix) => matrix.forward(x),
        }
    }
}

#[derive(Debug)]
pub(crate) enum DecoderLayer {
    Candle(Box<decoder::Layer>),
    Fused(Box<layers::DecoderLayer>),
}

/// The cache of a layer, as the layer takes it.
#[derive(Debug)]
pub(crate) enum Kv {
    Candle(LayerKv),
    Fused(PackedKv),
}

impl Kv {
    fn candle(&mut self) -> &mut LayerKv {
        match self {
            Self::Candle(kv) => kv,
            Self::Fused(_) => unreachable!("each layer made its own"),
        }
    }

    fn fused(&mut self) -> &mut PackedKv {
        match self {
            Self::Fused(kv) => kv,
            Self::Candle(_) => unreachable!("each layer made its own"),
        }
    }
}

impl candle::DecoderLayer<Workspace> for DecoderLayer {
    type Kv = Kv;

    fn new_kv(
        &self,
        shape @ (kv_heads, capacity, head_dim): (usize, usize, usize),
        dtype: DType,
        device: &Device,
    ) -> CandleResult<Kv> {
        Ok(match self {
            Self::Candle(_) => Kv::Candle(LayerKv::new(shape, dtype, device)?),
            Self::Fused(_) => Kv::Fused(PackedKv::new(kv_heads, head_dim, capacity)),
        })
    }

    fn forward(
        &self,
        x: Tensor,
        rope: &decoder::Angles,
        mask: Option<&Tensor>,
        sequences: &mut [LayerRows<'_, Kv>],
        workspace: &mut Workspace,
    ) -> CandleResult<Tensor> {
        match self {
            Self::Candle(layer) => {
                let sequences: Vec<_> = sequences
                    .iter_mut()
                    .map(|LayerRows { rows, kv, past }| LayerRows {
                        rows: *rows,
                        kv: kv.candle(),
                        past: *past,
                    })
                    .collect();
                layer.forward(&x, rope, mask, &sequences)
            }
            Self::Fused(layer) => {
                let mut sequences: Vec<_> = sequences
                    .iter_mut()
                    .map(|LayerRows { rows, kv, past }| SequenceRows {
                        rows: *rows,
                        kv: kv.fused(),
                        past: *past,
                    })
                    .collect();
                in_place(x, |x| {
                    layer.forward(x, rope.values(), &mut sequences, workspace);
                })
            }
        }
    }

    fn is_fused(&self) -> bool {
        matches!(self, Self::Fused(_))
    }
}

#[derive(Debug)]
pub(crate) enum Head {
    Candle(decoder::Head),
    Fused(layers::Head),
}

impl candle::Head<Workspace> for Head {
    fn forward(&self, states: &Tensor, workspace: &mut Workspace) -> CandleResult<Tensor> {
        match self {
            Self::Candle(head) => head.forward(states),
            Self::Fused(head) => {
                let rows = states.dim(0)?;
                let states = states.flatten_all()?.to_vec1()?;
                let logits = head.forward(&states, workspace);
                let shape = (rows, logits.len() / rows);
                Tensor::from_vec(logits, shape, &Device::Cpu)
            }
        }
    }

    fn is_fused(&self) -> bool {
        matches!(self, Self::Fused(_))
    }
}
