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
    /// Watches raw video, says in words what it sees and draws the words on it: #vlmnarrate and
    /// #textoverlay in one. All properties of #vlmnarrate are here too, as are its messages, its
    /// metas, its `text_src` pad and its `describe-now` signal.
    ///
    /// If the source is live, no frame waits: the picture goes on with the caption it has, or none,
    /// until there is another; with `partial-captions` the words appear as the model finds them.
    /// Otherwise a caption is drawn from the very frame on that it describes. A caption that has
    /// expired (`expire`) is drawn no more.
    ///
    /// Text is white on a dark ground, two lines at most, of a size that follows the picture's.
    /// What does not fit is cut off with an ellipsis; messages and the text pad have the whole of
    /// it. Where downstream takes #GstVideoOverlayCompositionMeta the text is attached to the frames
    /// and their pixels stay as they are.
    ///
    /// ## Example launch lines
    ///
    /// ```bash
    /// gst-launch-1.0 videotestsrc pattern=ball is-live=true ! vlmnarrateoverlay ! videoconvert ! autovideosink
    /// ```
    /// Shows a ball and says so.
    ///
    /// ```bash
    /// gst-launch-1.0 uridecodebin uri=file:///tmp/in.mp4 ! videoconvert \
    ///     ! vlmnarrateoverlay model=/models/SmolVLM-256M-Instruct font-desc="Serif Bold" \
    ///     ! videoconvert ! x264enc ! mp4mux ! filesink location=/tmp/out.mp4
    /// ```
    /// Burns captions into a video.
    pub struct VlmNarrateOverlay(ObjectSubclass<imp::VlmNarrateOverlay>)
        @extends gst::Bin, gst::Element, gst::Object,
        @implements gst::ChildProxy;
}

impl VlmNarrateOverlay {
    /// The narrator inside.
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
