//! GStreamer elements that describe video in words with a vision language model.
//!
//! [`VlmNarrate`] is the element `vlmnarrate`, and its page says how to use it in a pipeline.
#![cfg_attr(
    feature = "overlay",
    doc = "[`VlmNarrateOverlay`] is the element `vlmnarrateoverlay`, which also draws the captions on the video."
)]
//!
//! A Rust application registers the elements with [`plugin_register_static`], reads captions as [`Caption`], requests
//! one with [`VlmNarrate::describe_now`], and brings its own model with [`VlmNarrate::set_engine_loader`] and the traits
//! of [`engine`].

pub mod caption;
mod element;
mod engines;
mod input;
mod log;
mod output;
#[cfg(feature = "overlay")]
mod overlay;
mod prompt;
mod properties;
mod remedies;
mod worker;

pub use caption::Caption;
pub use element::{DType, Device, ImageFormat, Mode, Quantization, VlmNarrate};
#[cfg(feature = "openai")]
pub use engines::OpenAiLoader;
#[cfg(feature = "smolvlm")]
pub use engines::SmolVlmLoader;
#[doc(hidden)]
pub use output::encoding::TextCue;
pub use output::encoding::{META_NAME, NotACaption};
#[cfg(feature = "overlay")]
pub use overlay::{HAlign, VAlign, VlmNarrateOverlay, WrapMode};
/// Registers the elements in this process, for applications that are linked with this crate.
///
/// # Errors
///
/// GStreamer refuses the plugin or one of its elements.
pub use plugin::plugin_register_static;
/// The traits and types of engines, for applications that bring their own.
pub use vlmnarrate_engine as engine;

fn plugin_init(plugin: &gst::Plugin) -> Result<(), gst::glib::BoolError> {
    #[cfg(feature = "overlay")]
    overlay::register(plugin)?;
    element::register(plugin)
}

#[expect(missing_docs, reason = "items of the macro")]
mod plugin {
    use super::plugin_init;

    gst::plugin_define!(
        vlmnarrate,
        env!("CARGO_PKG_DESCRIPTION"),
        plugin_init,
        concat!(env!("CARGO_PKG_VERSION"), "-", env!("COMMIT_ID")),
        "MIT/X11",
        env!("CARGO_PKG_NAME"),
        env!("CARGO_PKG_NAME"),
        env!("CARGO_PKG_REPOSITORY"),
        env!("BUILD_REL_DATE")
    );
}

/// The README's Rust program, compiled and run as a doc test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
