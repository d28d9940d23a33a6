//! The element `vlmnarrateoverlay`; its page is that of [`VlmNarrateOverlay`].

use gst::{glib, prelude::*, subclass::prelude::*};

mod imp;
mod layout;
mod style;

use crate::VlmNarrate;
pub use style::{HAlign, VAlign, WrapMode};

glib::wrapper! {
    /// SECTION:element-vlmnarrateoverlay
    ///
    /// Describes raw video in words and draws the captions on it: #vlmnarrate and #textoverlay in one
    /// bin. It has all properties of #vlmnarrate, its messages, its metas, its `text_src` pad and its
    /// `describe-now` signal.
    ///
    /// If upstream is live, no frame waits: each is drawn with the current caption, or without one.
    /// With `partial-captions` the words appear as the model generates them. If upstream is not live,
    /// a caption is drawn from the frame on that it describes. A caption that has expired (`expire`) is
    /// not drawn any more.
    ///
    /// Text is white on a dark background, of at most two lines, in a size that follows that of the
    /// video. An ellipsis marks text that is cut off; messages and the text pad have all of it. If
    /// downstream takes #GstVideoOverlayCompositionMeta, the text is attached to the frames and their
    /// pixels stay unchanged.
    ///
    /// ## Example launch lines
    ///
    /// ```bash
    /// gst-launch-1.0 videotestsrc pattern=ball is-live=true ! vlmnarrateoverlay ! videoconvert ! autovideosink
    /// ```
    /// Shows a bouncing ball and its captions.
    ///
    /// ```bash
    /// gst-launch-1.0 uridecodebin uri=file:///tmp/in.mp4 ! videoconvert \
    ///     ! vlmnarrateoverlay model=/models/SmolVLM-256M-Instruct font-desc="Serif Bold" \
    ///     ! videoconvert ! x264enc ! mp4mux ! filesink location=/tmp/out.mp4
    /// ```
    /// Burns captions into a file.
    pub struct VlmNarrateOverlay(ObjectSubclass<imp::VlmNarrateOverlay>)
        @extends gst::Bin, gst::Element, gst::Object,
        @implements gst::ChildProxy;
}

impl VlmNarrateOverlay {
    /// The `vlmnarrate` element inside the bin.
    pub fn narrator(&self) -> &VlmNarrate {
        &self.imp().narrator
    }
}

pub(crate) fn register(plugin: &gst::Plugin) -> Result<(), glib::BoolError> {
    for enum_ in [
        VAlign::static_type(),
        HAlign::static_type(),
        WrapMode::static_type(),
    ] {
        enum_.mark_as_plugin_api(gst::PluginAPIFlags::empty());
    }
    gst::Element::register(
        Some(plugin),
        "vlmnarrateoverlay",
        gst::Rank::NONE,
        VlmNarrateOverlay::static_type(),
    )
}
