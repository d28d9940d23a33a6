//! How a model is held.

use vlmnarrate_engine::{DType, DeviceKind, Quantization};

use crate::{
    backends::device,
    error::{Error, Result},
    files::{
        checkpoint::Checkpoint,
        formats::{self, Formats},
    },
};

/// How a model is held, and where.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct LoadOptions {
    /// Where the model runs.
    pub device: DeviceKind,
    /// What weights are held and products computed in: with quantized weights f32, or it is an error.
    pub dtype: DType,
    /// What the weights of linear layers are quantized to.
    pub quantization: Quantization,
    /// CPU threads; 0 takes all cores. Where nothing is quantized, candle runs element-wise operations in a pool
    /// of its own, for the whole process, whose size `CANDLE_NUM_THREADS` sets.
    pub threads: usize,
}

impl LoadOptions {
    /// The same options with what is left to the machine chosen for a model: options that come to the same are equal.
    ///
    /// # Errors
    ///
    /// A device that this build doesn't have.
    pub fn resolve(self, checkpoint: &Checkpoint) -> Result<Self> {
        device::check(self.device)?;
        let device = device::resolve(self.device, checkpoint);
        Ok(Self {
            device,
            quantization: formats::resolve_quantization(
                self.quantization,
                (device, device::takes_blocks(device)),
                self.dtype,
            ),
            ..self
        })
    }

    /// Whether some weights are held quantized, with options that [`resolve`](Self::resolve) returned.
    pub(crate) fn has_quantized(&self, checkpoint: &Checkpoint) -> bool {
        device::takes_blocks(self.device)
            && (self.quantization != Quantization::None || checkpoint.weights.has_quantized())
    }

    /// Of options that [`resolve`](Self::resolve) gave: what the weights are quantized to, as the setting names it.
    pub(crate) fn quantization_name(&self, checkpoint: &Checkpoint) -> &'static str {
        match self.quantization {
            Quantization::Q8_0 => "q8-0",
            Quantization::Q4_0 => "q4-0",
            Quantization::None | Quantization::Auto if self.has_quantized(checkpoint) => "file",
            Quantization::None | Quantization::Auto => "none",
        }
    }

    /// Of options that [`resolve`](Self::resolve) gave: what the weights are held in.
    pub(crate) fn formats(&self, checkpoint: &Checkpoint) -> Result<Formats> {
        let has_quantized = self.has_quantized(checkpoint);
        if has_quantized && !matches!(self.dtype, DType::Auto | DType::F32) {
            return Err(Error::Setting {
                property: "dtype",
                reason: "products with quantized weights are made in f32; leave it at auto".into(),
            });
        }
        let dtype = match formats::candle_dtype(self.dtype) {
            Some(dtype) => dtype,
            None if has_quantized => candle_core::DType::F32,
            None => device::dtype(self.device),
        };
        Ok(Formats {
            dtype,
            quantization: self.quantization,
            is_cpu: self.device == DeviceKind::Cpu,
        })
    }

    /// Bytes that the weights of a model take in memory when it is loaded with these options.
    ///
    /// # Errors
    ///
    /// Options that contradict each other, and a device that this build doesn't have.
    pub fn memory(self, checkpoint: &Checkpoint) -> Result<u64> {
        let options = self.resolve(checkpoint)?;
        let formats = options.formats(checkpoint)?;
        let weights = &checkpoint.weights;
        Ok(match device::takes_blocks(options.device) {
            true => weights.size(formats),
            false => weights.parameter_count() * formats.dtype.size_in_bytes() as u64,
        })
    }
}
