//! Idefics3 and SmolVLM: a SigLIP encoder, pixel shuffle and a Llama decoder.

pub(crate) mod config;
pub(crate) mod names;
pub(crate) mod positions;
