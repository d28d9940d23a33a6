//! Which model, and how to hold it.

use std::{ffi::OsString, fmt, path::PathBuf};

/// Which model, and how to hold it or reach it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ModelSettings {
    /// A folder, a GGUF file or an id of the Hugging Face hub; `None` is the model embedded in the library, or with an
    /// endpoint the one that the server has.
    pub model: Option<OsString>,
    /// The projector of a GGUF file; `None` to have it found beside the file.
    pub mmproj: Option<OsString>,
    /// Branch, tag or commit on the hub; `None` is `main`.
    pub revision: Option<String>,
    /// URL of a server that holds the model; `None` for an engine in this process.
    pub endpoint: Option<String>,
    /// What the server knows us by.
    pub api_key: Option<Secret>,
    /// Certificates of those who may vouch for the server, beside the usual ones.
    pub ca_file: Option<PathBuf>,
    /// Where to run the model.
    pub device: DeviceKind,
    /// What weights are held and products computed in.
    pub dtype: DType,
    /// What the weights of linear layers are quantized to.
    pub quantization: Quantization,
    /// Number of CPU threads; 0 for one on each core.
    pub threads: usize,
    /// Nice value of the threads, 0 to 19. Elements that share a model share its threads: that of the first counts.
    pub nice: u8,
}

/// Text that is shown to nobody: not in logs, not in errors.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Hides this text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the one who must send it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Where to run a model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// The first of CUDA, Metal and the CPU that is built in and there, and knows the model.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// A GPU of NVIDIA.
    Cuda,
    /// The GPU of a Mac.
    Metal,
}

/// The type that weights are held and products are computed in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum DType {
    /// The fastest on the device: f32 on the CPU and beside quantized weights, bf16 on a GPU.
    #[default]
    Auto,
    /// 32 bits.
    F32,
    /// 16 bits with the range of f32.
    Bf16,
    /// 16 bits with a short range.
    F16,
}

/// Number format that the weights of linear layers, which are nearly all there are, are quantized to as they are loaded.
/// Those that a GGUF file has quantized stay as they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Quantization {
    /// The fastest on the device: `Q8_0` on the CPU, at half the time and a third of the memory of f32; none on a GPU, and
    /// where a [`DType`] is named.
    Auto,
    /// As [`DType`] says.
    #[default]
    None,
    /// Blocks of 32 weights with a common scale, 8 bits a weight.
    Q8_0,
    /// 4 bits a weight in the decoder's layers, which take time by their size; encoder and head as in `Q8_0`: the encoder
    /// takes time by its arithmetic, and the head chooses the words.
    Q4_0,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_in_no_debug_output() {
        let settings = ModelSettings {
            api_key: Some(Secret::new("sk-123")),
            ..ModelSettings::default()
        };
        assert!(!format!("{settings:?}").contains("123"));
        assert_eq!(settings.api_key.unwrap().reveal(), "sk-123");
    }
}
