//! The memory that a checkpoint's weights take, known before they are loaded.

use crate::{
    error::{Error, Result},
    families::idefics3::names,
    files::{
        formats::{Format, Formats, is_packed},
        weights::{TensorEntry, Weights},
    },
    machine::{memory::Shortage, memory_limits::bytes},
};
use vlmnarrate_engine::Quantization;

impl Weights {
    /// Bytes of the loaded weights.
    pub(crate) fn size(&self, formats: Formats) -> u64 {
        let size = |(name, entry): (&String, &TensorEntry)| {
            let format = formats.format(name, entry.dtype, &entry.shape);
            format.map_or(0, |format| format.bytes(entry.value_count()))
        };
        let sizes = self
            .entries()
            .iter()
            .map(size)
            .chain([self.tied_size(formats)]);
        sizes.fold(0, u64::saturating_add)
    }

    /// Bytes of a tied `lm_head` beside the token embeddings, 0 if it shares their memory.
    fn tied_size(&self, formats: Formats) -> u64 {
        let (None, Some(embeddings)) = (
            self.entries().get(&names::weight(names::LM_HEAD)),
            self.entries().get(&names::weight(names::EMBED_TOKENS)),
        ) else {
            return 0;
        };
        let head = formats.tied_head(embeddings.dtype, embeddings.row_len());
        let is_shared = match head {
            Format::Quantized(blocks) if formats.is_cpu && is_packed(blocks) => false,
            head => {
                formats.format(
                    &names::weight(names::EMBED_TOKENS),
                    embeddings.dtype,
                    &embeddings.shape,
                ) == Some(head)
            }
        };
        match is_shared {
            true => 0,
            false => head.bytes(embeddings.value_count()),
        }
    }

    /// Checks that `check_available` finds memory for all weights.
    pub(crate) fn check_memory(
        &self,
        formats: Formats,
        check_available: impl Fn(u64) -> Result<(), Shortage>,
    ) -> Result<()> {
        let size = self.size(formats);
        check_available(size).map_err(|shortage| {
            let remedy = match formats.quantization {
                Quantization::Q4_0 => "Use a smaller model",
                // Weights that are quantized in the file are not quantized again.
                _ if self.has_quantized() => "Use a smaller model",
                _ => "Use a smaller model, or set quantization=q4-0",
            };
            Error::Setting {
                property: "model",
                reason: format!(
                    "not enough memory: the model needs {}, but {shortage}. {remedy}",
                    bytes(size)
                ),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read, Seek, SeekFrom};

    use candle_core::{DType, quantized::GgmlDType};

    use super::*;
    use crate::machine::memory::check_available;

    /// A file of any size that takes no memory.
    struct Sparse {
        header: Vec<u8>,
        size: u64,
        position: u64,
    }

    impl Read for Sparse {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            let mut left = self.header.get(self.position as usize..).unwrap_or(&[]);
            let read = left.read(into)?;
            self.position += read as u64;
            Ok(read)
        }
    }

    impl Seek for Sparse {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            self.position = match to {
                SeekFrom::Start(position) => position,
                SeekFrom::End(0) => self.size,
                _ => unimplemented!(),
            };
            Ok(self.position)
        }
    }

    #[test]
    fn memory_that_is_not_there_is_an_error_before_it_is_asked_for() {
        let weights = |side: u64| {
            let end = side * side * 2;
            let header = format!(
                r#"{{"model.text_model.layers.0.mlp.up_proj.weight":
                {{"dtype":"BF16","shape":[{side},{side}],"data_offsets":[0,{end}]}}}}"#
            );
            let mut file = (header.len() as u64).to_le_bytes().to_vec();
            file.extend(header.as_bytes());
            let size = file.len() as u64 + end;
            let sparse = Sparse {
                header: file,
                size,
                position: 0,
            };
            Weights::open(vec![("m.safetensors".into(), Box::new(sparse))]).unwrap()
        };
        let formats = |dtype, quantization| Formats {
            dtype,
            quantization,
            is_cpu: true,
        };
        let size = |dtype, quantization| weights(64).size(formats(dtype, quantization));
        assert_eq!(size(DType::F32, Quantization::None), 64 * 64 * 4);
        assert_eq!(size(DType::BF16, Quantization::None), 64 * 64 * 2);
        assert_eq!(size(DType::F32, Quantization::Q8_0), 64 * 2 * 34);
        let check = |weights: Weights, quantization| {
            weights.check_memory(formats(DType::F32, quantization), check_available)
        };
        assert!(check(weights(64), Quantization::None).is_ok());
        for (quantization, says, remedy) in [
            (
                Quantization::None,
                "needs 18014398.5 GB",
                "set quantization=q4-0",
            ),
            (
                Quantization::Q4_0,
                "needs 2533274.8 GB",
                "Use a smaller model",
            ),
        ] {
            let error = check(weights(1 << 26), quantization)
                .unwrap_err()
                .to_string();
            assert!(error.contains(says) && error.ends_with(remedy), "{error}");
        }
    }

    /// A tied `lm_head` may share the memory of the embeddings.
    #[test]
    fn a_head_that_is_the_table_takes_memory_where_it_is_another_format() {
        let sizes = |dtype: GgmlDType, row: usize, quantization| {
            let len = 64 * row / dtype.block_size() * dtype.type_size();
            let embeddings = TensorEntry {
                file: 0,
                dtype,
                shape: vec![64, row],
                start: 0,
                len,
                permuted_heads: None,
            };
            let weights = Weights::new(
                vec![],
                [(names::weight(names::EMBED_TOKENS), embeddings)].into(),
            );
            [true, false].map(|is_cpu| {
                let formats = Formats {
                    dtype: DType::F32,
                    quantization,
                    is_cpu,
                };
                weights.size(formats) as usize / 64
            })
        };
        let (none, q8_0) = (Quantization::None, Quantization::Q8_0);
        assert_eq!(sizes(GgmlDType::BF16, 64, none), [4 * 64; 2]);
        assert_eq!(sizes(GgmlDType::BF16, 64, q8_0), [2 * 64 + 2 * 34; 2]);
        // Rows that are not a whole number of blocks.
        assert_eq!(sizes(GgmlDType::BF16, 72, q8_0), [2 * 72 + 4 * 72; 2]);
        assert_eq!(sizes(GgmlDType::F32, 72, q8_0), [4 * 72; 2]);
        // Of these types, only Q8_0 is repacked for the CPU kernels.
        assert_eq!(sizes(GgmlDType::Q8_0, 64, none), [4 * 34, 2 * 34]);
        assert_eq!(sizes(GgmlDType::Q6K, 256, none), [210; 2]);
        assert_eq!(sizes(GgmlDType::Q5_0, 96, none), [3 * 22 + 4 * 96; 2]);
    }
}
