//! GStreamer element that watches video and says what it sees.
//!
//! The element is [`VlmNarrate`]; its page says how to use it in a pipeline. Rust applications find
//! here what they need to read its captions ([`Caption`]), to ask about a frame and to bring their
//! own model ([`VlmNarrate::set_engine_loader`], [`engine`]).

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
mod worker;

pub use caption::Caption;
pub use element::{DType, Device, Mode, Quantization, VlmNarrate};
#[cfg(feature = "smolvlm")]
pub use engines::SmolVlmLoader;
#[doc(hidden)]
pub use output::encoding::TextCue;
pub use output::encoding::{META_NAME, NotACaption};
#[cfg(feature = "overlay")]
pub use overlay::{HAlign, VAlign, VlmNarrateOverlay, WrapMode};
/// The contract of an engine, for applications that bring their own.
pub use vlmnarrate_engine as engine;

fn plugin_init(plugin: &gst::Plugin) -> Result<(), gst::glib::BoolError> {
    #[cfg(feature = "overlay")]
    overlay::register(plugin)?;
    element::register(plugin)
}

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

/// The README's Rust program, compiled and run as a doc test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
