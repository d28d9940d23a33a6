//! The number format that each tensor is loaded in, for loading and for the estimate of memory before it.

use candle_core::{DType, quantized::GgmlDType};

use vlmnarrate_engine::{DeviceKind, Quantization};
use vlmnarrate_kernels::LANES;

use crate::families::idefics3::names;

/// The format of a loaded tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Dense(DType),
    Quantized(GgmlDType),
}

impl Format {
    /// Bytes of `values` values, a whole number of blocks.
    pub(crate) fn bytes(self, values: u64) -> u64 {
        let (block, size) = match self {
            Self::Dense(dtype) => (1, dtype.size_in_bytes()),
            Self::Quantized(dtype) => (dtype.block_size(), dtype.type_size()),
        };
        (values / block as u64).saturating_mul(size as u64)
    }
}

/// The settings that decide the format of each tensor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Formats {
    /// Type of dense tensors and of activations.
    pub(crate) dtype: DType,
    /// Quantization of matrices that are dense in the file.
    pub(crate) quantization: Quantization,
    /// Whether kernels of our own compute on a CPU.
    pub(crate) is_cpu: bool,
}

impl Formats {
    /// The format of a tensor by its name, stored type and shape; `None` if the family has no tensor of that name.
    pub(crate) fn format(self, name: &str, stored: GgmlDType, shape: &[usize]) -> Option<Format> {
        let matrix = |blocks| self.matrix(blocks, stored, shape.last().copied().unwrap_or(0));
        let is_matrix = shape.len() == 2 && name.ends_with(".weight");
        let module = name.strip_suffix(".weight").unwrap_or_default();
        Some(match module {
            names::LM_HEAD => matrix(head_dtype(self.quantization)),
            names::EMBED_TOKENS => self.embeddings(stored),
            _ if is_matrix && name.starts_with(names::DECODER_LAYERS) => {
                matrix(decoder_dtype(self.quantization))
            }
            // Kernels of our own pad them.
            _ if is_matrix
                && name.starts_with(names::ENCODER_LAYERS)
                && self.is_cpu
                && encoder_dtype(self.quantization).is_some()
                && dense_dtype(stored).is_some()
                && shape.last().is_some_and(|row| row.is_multiple_of(LANES)) =>
            {
                Format::Quantized(GgmlDType::Q8_0)
            }
            _ if is_matrix
                && (name.starts_with(names::ENCODER_LAYERS) || module == names::CONNECTOR) =>
            {
                matrix(encoder_dtype(self.quantization))
            }
            _ if ["text_model", "vision_model", "connector"]
                .iter()
                .any(|part| is_in_module(name, part)) =>
            {
                Format::Dense(self.dtype)
            }
            _ => return None,
        })
    }

    /// The format of an `lm_head` that is tied to token embeddings of type `stored` and rows of `row` values.
    pub(crate) fn tied_head(self, stored: GgmlDType, row: usize) -> Format {
        self.matrix(head_dtype(self.quantization), stored, row)
    }

    /// The format of the token embeddings, whose rows are looked up, not multiplied. They are never quantized here, and
    /// keep the file's type in a quantized model.
    fn embeddings(self, stored: GgmlDType) -> Format {
        match dense_dtype(stored) {
            None => Format::Quantized(stored),
            Some(stored) if decoder_dtype(self.quantization).is_some() => Format::Dense(stored),
            Some(_) => Format::Dense(self.dtype),
        }
    }

    /// The format of a matrix. One that is quantized in the file is not quantized again.
    fn matrix(self, blocks: Option<GgmlDType>, stored: GgmlDType, row: usize) -> Format {
        match (dense_dtype(stored), blocks) {
            // candle multiplies two blocks of these types at a time, and would ignore the last of an odd number.
            (None, _)
                if needs_even_blocks(stored) && !row.is_multiple_of(2 * stored.block_size()) =>
            {
                Format::Dense(DType::F32)
            }
            (None, _) => Format::Quantized(stored),
            (Some(_), None) => Format::Dense(self.dtype),
            (Some(_), Some(blocks)) if row.is_multiple_of(blocks.block_size()) => {
                Format::Quantized(blocks)
            }
            // Not a whole number of blocks, as 4304 in the encoder of the 2.2B. Quantized models compute in f32.
            (Some(_), Some(_)) => Format::Dense(DType::F32),
        }
    }
}

/// The candle type of a setting; `None` for `Auto`.
pub(crate) fn candle_dtype(dtype: vlmnarrate_engine::DType) -> Option<DType> {
    match dtype {
        vlmnarrate_engine::DType::Auto => None,
        vlmnarrate_engine::DType::F32 => Some(DType::F32),
        vlmnarrate_engine::DType::Bf16 => Some(DType::BF16),
        vlmnarrate_engine::DType::F16 => Some(DType::F16),
    }
}

/// The quantization that `Auto` means on a device, and `None` where the device's kernels need dense weights.
pub(crate) fn resolve_quantization(
    quantization: Quantization,
    (device, takes_blocks): (DeviceKind, bool),
    dtype: vlmnarrate_engine::DType,
) -> Quantization {
    match quantization {
        // Kernels that need dense weights.
        _ if !takes_blocks => Quantization::None,
        Quantization::Auto
            if (device, dtype) == (DeviceKind::Cpu, vlmnarrate_engine::DType::Auto) =>
        {
            Quantization::Q8_0
        }
        Quantization::Auto => Quantization::None,
        named => named,
    }
}

fn encoder_dtype(quantization: Quantization) -> Option<GgmlDType> {
    match quantization {
        Quantization::Auto | Quantization::None => None,
        Quantization::Q8_0 | Quantization::Q4_0 => Some(GgmlDType::Q8_0),
    }
}

fn decoder_dtype(quantization: Quantization) -> Option<GgmlDType> {
    match quantization {
        Quantization::Auto | Quantization::None => None,
        Quantization::Q8_0 => Some(GgmlDType::Q8_0),
        Quantization::Q4_0 => Some(GgmlDType::Q4_0),
    }
}

fn head_dtype(quantization: Quantization) -> Option<GgmlDType> {
    encoder_dtype(quantization)
}

fn is_in_module(name: &str, part: &str) -> bool {
    let name = name.strip_prefix("model.").unwrap_or_default();
    name.strip_prefix(part)
        .is_some_and(|rest| rest.starts_with('.'))
}

/// The candle type of a dense tensor; `None` for a quantized one.
fn dense_dtype(stored: GgmlDType) -> Option<DType> {
    match stored {
        GgmlDType::F32 => Some(DType::F32),
        GgmlDType::F16 => Some(DType::F16),
        GgmlDType::BF16 => Some(DType::BF16),
        _ => None,
    }
}

/// Whether candle's kernels need an even number of blocks in a row.
fn needs_even_blocks(dtype: GgmlDType) -> bool {
    matches!(dtype, GgmlDType::Q4_1 | GgmlDType::Q5_0 | GgmlDType::Q5_1)
}

/// Whether the CPU kernels repack blocks of this type.
pub(crate) fn is_packed(dtype: GgmlDType) -> bool {
    matches!(dtype, GgmlDType::Q8_0 | GgmlDType::Q4_0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_tensor_has_its_format() {
        use Format::{Dense, Quantized};
        let (f32, bf16) = (Dense(DType::F32), Dense(DType::BF16));
        let q8 = Quantized(GgmlDType::Q8_0);
        let q4 = Quantized(GgmlDType::Q4_0);
        let up = "model.text_model.layers.3.mlp.up_proj.weight";
        let fc2 = "model.vision_model.encoder.layers.0.mlp.fc2.weight";
        let connector = "model.connector.modality_projection.proj.weight";
        let stored = [GgmlDType::BF16, GgmlDType::Q5_0, GgmlDType::Q6K];
        for (name, row, none, eight, four, [fives, sixes]) in [
            (
                up,
                64,
                f32,
                q8,
                q4,
                [Quantized(stored[1]), Quantized(stored[2])],
            ),
            (
                fc2,
                64,
                f32,
                q8,
                q8,
                [Quantized(stored[1]), Quantized(stored[2])],
            ),
            (fc2, 4304, f32, f32, f32, [f32, Quantized(stored[2])]),
            (connector, 96, f32, q8, q8, [f32, Quantized(stored[2])]),
            (
                "lm_head.weight",
                64,
                f32,
                q8,
                q8,
                [Quantized(stored[1]), Quantized(stored[2])],
            ),
            (
                "model.text_model.embed_tokens.weight",
                64,
                f32,
                bf16,
                bf16,
                [Quantized(stored[1]), Quantized(stored[2])],
            ),
            (
                "model.vision_model.embeddings.position_embedding.weight",
                64,
                f32,
                f32,
                f32,
                [f32; 2],
            ),
        ] {
            let of = |quantization, stored| {
                let formats = Formats {
                    dtype: DType::F32,
                    quantization,
                    is_cpu: false,
                };
                formats.format(name, stored, &[10, row]).unwrap()
            };
            assert_eq!(of(Quantization::None, stored[0]), none, "{name}");
            assert_eq!(of(Quantization::Q8_0, stored[0]), eight, "{name} {row}");
            assert_eq!(of(Quantization::Q4_0, stored[0]), four, "{name} {row}");
            assert_eq!(of(Quantization::Q8_0, stored[1]), fives, "{name} {row}");
            assert_eq!(of(Quantization::Q8_0, stored[2]), sixes, "{name} {row}");
        }
        let formats = Formats {
            dtype: DType::BF16,
            quantization: Quantization::None,
            is_cpu: true,
        };
        let on_cpu = Formats {
            dtype: DType::F32,
            quantization: Quantization::Q8_0,
            is_cpu: true,
        };
        let format = |row| on_cpu.format(fc2, GgmlDType::BF16, &[10, row]);
        assert_eq!([4304, 4300].map(format), [Some(q8), Some(f32)]);
        for (name, shape) in [
            (
                "model.text_model.layers.0.input_layernorm.weight",
                &[64][..],
            ),
            ("model.text_model.norm.weight", &[64]),
            (
                "model.vision_model.embeddings.patch_embedding.weight",
                &[64, 3, 16, 16],
            ),
            ("model.vision_model.encoder.layers.0.mlp.fc1.bias", &[64]),
            (up, &[2, 64]),
        ] {
            assert_eq!(
                formats.format(name, GgmlDType::F32, shape),
                Some(bf16),
                "{name}"
            );
        }
        for name in [
            "ballast",
            "model.ballast",
            "model.text_modeller.x",
            "text_model.norm.weight",
        ] {
            assert_eq!(formats.format(name, GgmlDType::F32, &[64]), None, "{name}");
        }
    }
}
