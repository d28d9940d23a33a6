//! The debug category.

use std::sync::LazyLock;

pub(crate) static CAT: LazyLock<gst::DebugCategory> = LazyLock::new(|| {
    gst::DebugCategory::new(
        "vlmnarrate",
        gst::DebugColorFlags::empty(),
        Some("VLM Video Narrator"),
    )
});
