//! GStreamer element that watches video and says what it sees.
//!
//! The element is [`vlmnarrate`]; its page says how to use it in a pipeline. Rust applications find
//! here what they need to read its captions ([`Caption`]), to ask about a frame and to bring their
//! own model ([`vlmnarrate::VlmNarrate`], [`narrator`]).

// Where it is needed, `expect` says why.
#![deny(unsafe_code)]

pub mod caption;
mod kernels;
pub mod narrator;
#[cfg(feature = "overlay")]
pub mod overlay;
mod properties;
pub mod smolvlm;
mod threads;
pub mod vlmnarrate;

pub use caption::Caption;
#[cfg(feature = "overlay")]
pub use overlay::VlmNarrateOverlay;
pub use vlmnarrate::VlmNarrate;

fn plugin_init(plugin: &gst::Plugin) -> Result<(), gst::glib::BoolError> {
    #[cfg(feature = "overlay")]
    overlay::register(plugin)?;
    vlmnarrate::register(plugin)
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
