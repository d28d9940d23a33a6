//! Which model, and how to hold it.

use std::{ffi::OsString, path::PathBuf, time::Duration};

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
    /// How to reach a server that holds the model; `None` for an engine in this process.
    pub endpoint: Option<EndpointSettings>,
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

/// A server that holds the model, and how to ask it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct EndpointSettings {
    /// Base URL, for example `http://gpu:8000/v1`.
    pub url: String,
    /// File with the API key; `None` or empty to look in the environment.
    pub api_key_file: Option<PathBuf>,
    /// PEM file of the certificate authorities to trust instead of the built-in ones.
    pub ca_file: Option<PathBuf>,
    /// JSON object whose fields are added to the body of every request, and win over ours.
    pub request_options: Option<String>,
    /// How pictures are sent.
    pub image_format: ImageFormat,
    /// Requests that this process has in flight at the server at most; 0 for as many as the server can use, or 32.
    pub max_requests: usize,
    /// How long the server may stay silent before a request counts as failed.
    pub timeout: Duration,
    /// Model in this process that answers while the server is away, named as
    /// [`ModelSettings::model`] without an endpoint.
    pub fallback_model: Option<OsString>,
}

impl EndpointSettings {
    /// The server at this base URL, with everything else at its default.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            api_key_file: None,
            ca_file: None,
            request_options: None,
            image_format: ImageFormat::default(),
            max_requests: 0,
            timeout: Duration::from_secs(120),
            fallback_model: None,
        }
    }
}

/// How pictures are sent to a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ImageFormat {
    /// Small, and a little different from the original.
    Jpeg {
        /// 1 to 100.
        quality: u8,
    },
    /// Several times as large as JPEG, and exact.
    Png,
}

impl Default for ImageFormat {
    fn default() -> Self {
        Self::Jpeg { quality: 85 }
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
