//! The local engine of vlmnarrate: SmolVLM and SmolVLM2 (256M, 500M, 2.2B) on CPUs and GPUs.
//!
//! [`SmolVlmLoader`] implements the contract of `vlmnarrate-engine`, which is all that the plugin uses. Underneath, a
//! [`Source`] names a model's files, a [`Checkpoint`] is those files checked, a [`Model`] is loaded by [`LoadOptions`], and
//! a [`Session`] keeps one caller's KV cache between captions. [`Model::describe`] makes a caption.
//!
//! # Models
//!
//! Safetensors checkpoints in a folder, GGUF files of llama.cpp with their mmproj file, models of the Hugging Face hub,
//! and an embedded demo model of 3 MB. The network is that of transformers'
//! [idefics3](https://github.com/huggingface/transformers/tree/main/src/transformers/models/idefics3) and
//! [smolvlm](https://github.com/huggingface/transformers/tree/main/src/transformers/models/smolvlm): a SigLIP vision
//! encoder, pixel shuffle, a projection, and a Llama decoder. Tests compare each stage with tensors from transformers.
//!
//! # Backends
//!
//! | backend | runs on | weights |
//! |---|---|---|
//! | `candle` | CPUs, Metal, and CUDA with the feature `candle-cuda` | dense or quantized |
//! | `cpu` | CPUs, by the fused kernels of `vlmnarrate-kernels` | quantized |
//! | `cuda` | NVIDIA GPUs from Ampere on, by the kernels of `vlmnarrate-cuda` | dense; quantized ones are dequantized |
//!
//! # Features
//!
//! - `hub` (default): models from the Hugging Face hub, downloaded into its cache.
//! - `cuda`: NVIDIA GPUs by our own kernels. Needs nvcc to build, and only the NVIDIA driver to run.
//! - `candle-cuda`: NVIDIA GPUs by candle. Needs the CUDA toolkit to build and to run; excludes `cuda`.
//! - `metal`: Apple GPUs by candle.
//!
//! # Example
//!
//! ```
//! use std::ops::ControlFlow;
//! use vlmnarrate_engine::{Picture, Request};
//! use vlmnarrate_smolvlm::{Checkpoint, LoadOptions, Model, Source};
//!
//! # fn main() -> Result<(), vlmnarrate_smolvlm::Error> {
//! let checkpoint = Checkpoint::open(&Source::Demo)?;
//! let side = checkpoint.image_size();
//! let model = Model::load(&checkpoint, &LoadOptions::default(), &mut |_, _| ControlFlow::Continue(()))?;
//! let red = [255, 0, 0].repeat((side * side) as usize);
//! let picture = Picture::new(side, side, red).expect("a whole picture");
//! let pictures = [&picture];
//! let mut request = Request::new(&pictures, "Describe this frame in one sentence.");
//! request.max_tokens = 20;
//! let caption = model.describe(&mut model.session(), &request, &mut |_| ControlFlow::Continue(()))?;
//! assert!(caption.text.contains("red"));
//! # Ok(())
//! # }
//! ```

mod backends;
mod engine;
mod error;
mod families;
mod files;
mod image;
mod machine;
mod run;
mod text;

pub use engine::SmolVlmLoader;
pub use error::{Error, Result};
#[cfg(feature = "hub")]
pub use files::hub::Repository;
pub use files::{
    checkpoint::Checkpoint, fingerprint::Fingerprint, source::Source, weights::Progress,
};
pub use machine::device::DeviceInfo;
pub use run::{model::Model, options::LoadOptions, session::Session};

// For tests and benchmarks, which compare each stage with transformers.
#[doc(hidden)]
pub use backends::device::check as check_device;
#[doc(hidden)]
pub use families::idefics3::config::{
    Config, LongestEdge, PreprocessorConfig, TextConfig, VisionConfig,
};
#[doc(hidden)]
pub use image::{Processed, Processor, resize};
#[doc(hidden)]
pub use text::{
    chat_template::{ChatTemplate, SpecialTokens},
    message::{Content, Message, Role, question, video},
    prompt::{Prompt, Prompter, Span},
};
