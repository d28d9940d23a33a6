//! Model files: found in a folder, GGUF files or the hub, checked, and read as tensors.

pub(crate) mod chat_template;
pub(crate) mod checkpoint;
pub(crate) mod fingerprint;
pub(crate) mod formats;
pub(crate) mod gguf;
#[cfg(feature = "hub")]
pub(crate) mod hub;
pub(crate) mod size;
pub(crate) mod source;
pub(crate) mod weights;
