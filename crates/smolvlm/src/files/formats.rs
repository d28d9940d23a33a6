//! The number format that each tensor of a checkpoint is held in: what loads them and what counts the memory beforehand
//! ask the same.

use candle_core::{DType, quantized::GgmlDType};

use vlmnarrate_engine::{DeviceKind, Quantization};

use crate::{families::idefics3::names, files::checkpoint::Checkpoint};

/// Of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Dense(DType),
    Blocks(GgmlDType),
}

impl Format {
    /// Bytes of so many values, which are whole blocks.
    pub(crate) fn bytes(self, values: u64) -> u64 {
        let (block, size) = match self {
            Self::Dense(dtype) => (1, dtype.size_in_bytes()),
            Self::Blocks(dtype) => (dtype.block_size(), dtype.type_size()),
        };
        (values / block as u64).saturating_mul(size as u64)
    }
}

/// Of all tensors, as options have it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Formats {
    /// Of what is not quantized, and of what is computed.
    pub(crate) dtype: DType,
    /// Of dense matrices.
    pub(crate) quantization: Quantization,
}

impl Formats {
    /// Whether some weights are quantized, in the checkpoint or as they are loaded.
    pub(crate) fn has_blocks(self, checkpoint: &Checkpoint) -> bool {
        self.quantization != Quantization::None || checkpoint.weights.has_blocks()
    }

    /// For a tensor of this name, type and shape; `None` if no model has one of that name.
    pub(crate) fn of(self, name: &str, stored: GgmlDType, shape: &[usize]) -> Option<Format> {
        let matrix = |blocks| self.matrix(blocks, stored, shape.last().copied().unwrap_or(0));
        let is_matrix = shape.len() == 2 && name.ends_with(".weight");
        let module = name.strip_suffix(".weight").unwrap_or_default();
        Some(match module {
            names::LM_HEAD => matrix(head(self.quantization)),
            names::EMBED_TOKENS => self.table(stored),
            _ if is_matrix && name.starts_with(names::DECODER_LAYERS) => {
                matrix(decoder(self.quantization))
            }
            _ if is_matrix
                && (name.starts_with(names::ENCODER_LAYERS) || module == names::CONNECTOR) =>
            {
                matrix(vision(self.quantization))
            }
            _ if ["text_model", "vision_model", "connector"]
                .iter()
                .any(|part| is_of(name, part)) =>
            {
                Format::Dense(self.dtype)
            }
            _ => return None,
        })
    }

    /// For the layer that takes the table for its weights, where there is no head of its own.
    pub(crate) fn tied_head(self, stored: GgmlDType, row: usize) -> Format {
        self.matrix(head(self.quantization), stored, row)
    }

    /// Rows are looked up, not multiplied with: beside blocks they stay as they are.
    fn table(self, stored: GgmlDType) -> Format {
        match dense(stored) {
            None => Format::Blocks(stored),
            Some(stored) if decoder(self.quantization).is_some() => Format::Dense(stored),
            Some(_) => Format::Dense(self.dtype),
        }
    }

    /// Blocks of a file stay as they are: quantized again they would only lose.
    fn matrix(self, blocks: Option<GgmlDType>, stored: GgmlDType, row: usize) -> Format {
        match (dense(stored), blocks) {
            // candle takes two blocks of these types at a time, and would leave one of a row.
            (None, _) if is_paired(stored) && !row.is_multiple_of(2 * stored.block_size()) => {
                Format::Dense(DType::F32)
            }
            (None, _) => Format::Blocks(stored),
            (Some(_), None) => Format::Dense(self.dtype),
            (Some(_), Some(blocks)) if row.is_multiple_of(blocks.block_size()) => {
                Format::Blocks(blocks)
            }
            // No whole number of blocks, such as 4304 in the encoder of the 2.2B. Beside blocks, products are made in
            // f32.
            (Some(_), Some(_)) => Format::Dense(DType::F32),
        }
    }
}

/// `None` for automatic.
pub(crate) fn named(dtype: vlmnarrate_engine::DType) -> Option<DType> {
    match dtype {
        vlmnarrate_engine::DType::Auto => None,
        vlmnarrate_engine::DType::F32 => Some(DType::F32),
        vlmnarrate_engine::DType::Bf16 => Some(DType::BF16),
        vlmnarrate_engine::DType::F16 => Some(DType::F16),
    }
}

/// What `Auto` comes to on this device.
pub(crate) fn resolve(
    quantization: Quantization,
    (device, takes_blocks): (DeviceKind, bool),
    dtype: vlmnarrate_engine::DType,
) -> Quantization {
    match quantization {
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

fn vision(quantization: Quantization) -> Option<GgmlDType> {
    match quantization {
        Quantization::Auto | Quantization::None => None,
        Quantization::Q8_0 | Quantization::Q4_0 => Some(GgmlDType::Q8_0),
    }
}

fn decoder(quantization: Quantization) -> Option<GgmlDType> {
    match quantization {
        Quantization::Auto | Quantization::None => None,
        Quantization::Q8_0 => Some(GgmlDType::Q8_0),
        Quantization::Q4_0 => Some(GgmlDType::Q4_0),
    }
}

fn head(quantization: Quantization) -> Option<GgmlDType> {
    vision(quantization)
}

fn is_of(name: &str, part: &str) -> bool {
    let name = name.strip_prefix("model.").unwrap_or_default();
    name.strip_prefix(part)
        .is_some_and(|rest| rest.starts_with('.'))
}

/// The type of values that are not in blocks.
fn dense(stored: GgmlDType) -> Option<DType> {
    match stored {
        GgmlDType::F32 => Some(DType::F32),
        GgmlDType::F16 => Some(DType::F16),
        GgmlDType::BF16 => Some(DType::BF16),
        _ => None,
    }
}

fn is_paired(dtype: GgmlDType) -> bool {
    matches!(dtype, GgmlDType::Q4_1 | GgmlDType::Q5_0 | GgmlDType::Q5_1)
}

/// Whether kernels of the CPU have the blocks in an order of their own.
pub(crate) fn is_packed(dtype: GgmlDType) -> bool {
    matches!(dtype, GgmlDType::Q8_0 | GgmlDType::Q4_0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_tensor_has_its_format() {
        use Format::{Blocks, Dense};
        let (f32, bf16) = (Dense(DType::F32), Dense(DType::BF16));
        let q8 = Blocks(GgmlDType::Q8_0);
        let q4 = Blocks(GgmlDType::Q4_0);
        let up = "model.text_model.layers.3.mlp.up_proj.weight";
        let fc2 = "model.vision_model.encoder.layers.0.mlp.fc2.weight";
        let connector = "model.connector.modality_projection.proj.weight";
        let stored = [GgmlDType::BF16, GgmlDType::Q5_0, GgmlDType::Q6K];
        for (name, row, none, eight, four, [fives, sixes]) in [
            (up, 64, f32, q8, q4, [Blocks(stored[1]), Blocks(stored[2])]),
            (fc2, 64, f32, q8, q8, [Blocks(stored[1]), Blocks(stored[2])]),
            (fc2, 4304, f32, f32, f32, [f32, Blocks(stored[2])]),
            (connector, 96, f32, q8, q8, [f32, Blocks(stored[2])]),
            (
                "lm_head.weight",
                64,
                f32,
                q8,
                q8,
                [Blocks(stored[1]), Blocks(stored[2])],
            ),
            (
                "model.text_model.embed_tokens.weight",
                64,
                f32,
                bf16,
                bf16,
                [Blocks(stored[1]), Blocks(stored[2])],
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
                };
                formats.of(name, stored, &[10, row]).unwrap()
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
        };
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
                formats.of(name, GgmlDType::F32, shape),
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
            assert_eq!(formats.of(name, GgmlDType::F32, &[64]), None, "{name}");
        }
    }
}
