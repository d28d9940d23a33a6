//! SmolVLM and SmolVLM2 (256M, 500M, 2.2B) in candle.
//!
//! One code path for the whole family, driven by the checkpoint's `config.json`: a SigLIP vision encoder
//! , pixel shuffle and a projection into the embeddings of a Llama decoder, greedy or sampled
//! decoding into a key-value cache that is written in place. Quantized layers run on kernels of our own on the CPU,
//! the others on candle. The judge is the reference implementation,
//! transformers' [idefics3](https://github.com/huggingface/transformers/tree/main/src/transformers/models/idefics3)
//! and [smolvlm](https://github.com/huggingface/transformers/tree/main/src/transformers/models/smolvlm): the
//! tests in `tests/parity.rs` hold every stage against tensors it wrote.
//!
//! Nothing in here knows of GStreamer.
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

#[cfg(all(feature = "cuda", feature = "candle-cuda"))]
compile_error!(
    "the features `cuda` and `candle-cuda` exclude each other: our kernels open the driver at run time, candle links with \
     CUDA, and both share one cudarc. Build with one of them"
);

mod backends;
mod engine;
mod error;
mod families;
mod files;
mod image;
mod machine;
mod run;
mod text;

pub use backends::device::check as check_device;
pub use engine::SmolVlmLoader;
pub use error::{Error, Result};
pub use families::idefics3::config::{
    Config, LongestEdge, PreprocessorConfig, TextConfig, VisionConfig,
};
#[cfg(feature = "hub")]
pub use files::hub::Repository;
pub use files::{
    checkpoint::Checkpoint, fingerprint::Fingerprint, source::Source, weights::Progress,
};
pub use image::{Processed, Processor, resize};
pub use machine::device::DeviceInfo;
pub use run::{model::Model, options::LoadOptions, session::Session};
pub use text::{
    chat_template::{ChatTemplate, SpecialTokens},
    message::{Content, Message, Role, question, video},
    prompt::{Prompt, Prompter, Span},
};
