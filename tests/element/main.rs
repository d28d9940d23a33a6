//! The elements in pipelines, on a fake engine and on small models.

mod common;

mod broken_streams;
mod caption;
mod chain;
mod clips;
mod events;
mod faults;
mod files;
mod formats;
mod gguf;
mod live;
mod mmproj;
mod model_files;
mod models;
mod muxing;
#[cfg(feature = "overlay")]
mod overlay;
mod programs;
mod properties;
mod readme;
mod recorded;
#[cfg(feature = "openai")]
mod remote;
mod rooms;
mod settings;
mod states;
mod text_pad;
mod timestamps;
mod torture;
