//! The element `vlmnarrate`; its page is that of [`VlmNarrate`].

use std::sync::Arc;

use gst::{glib, prelude::*, subclass::prelude::*};

mod callbacks;
mod caption_state;
mod captions;
mod frames;
mod imp;
mod model;
mod model_control;
mod panics;
mod requests;
mod settings;
mod stats;
mod stream;

use vlmnarrate_engine::EngineLoader;
// For the overlay, a bin around the element.
#[cfg(feature = "overlay")]
pub(crate) use self::{
    imp::{describe_now_signal, pad_templates},
    settings::specs,
};
pub use settings::{DType, Device, Mode, Quantization};

glib::wrapper! {
    /// SECTION:element-vlmnarrate
    ///
    /// Watches raw video and says in words what it sees. Every `interval` it takes a frame, scales
    /// it to a small square and asks a SmolVLM vision language model about it. The video itself
    /// goes through untouched: nothing but metadata is added to it.
    /// The model sees what is transparent on white, and high dynamic range (PQ, HLG) or BT.2020 as
    /// an sRGB display would show it.
    ///
    /// Without a `model` it uses a tiny one that is built in and names `videotestsrc` pictures: good
    /// to see that everything works, and for nothing else. For real video, set `model` to a
    /// SmolVLM or SmolVLM2 checkpoint: its id on the Hugging Face hub, a folder, or a GGUF file.
    ///
    /// A model that isn't in the hub's cache is downloaded, with PROGRESS messages of the code
    /// `download-model`. Recorded video waits for it; live video goes on without captions.
    ///
    /// ## Captions
    ///
    /// A caption comes in four ways:
    ///
    /// - as an element message named `vlmnarrate` on the bus (`post-messages`);
    /// - as a custom meta named `VlmNarrateMeta` on every buffer while the caption is current
    ///   (`attach-meta`), which is until the next one comes or its time is up (`expire`);
    /// - as timed text on the request pad `text_src`;
    /// - as the property `caption`, which notifies.
    ///
    /// Message and meta have these fields:
    ///
    /// - `timestamp`, `stream-time`, `running-time`, `duration` (#guint64, nanoseconds): of the frame
    ///   that is described. `GST_CLOCK_TIME_NONE` where unknown.
    ///   Of a clip it is the last one; `first-timestamp` (#guint64) is that of the first, and `frames`
    ///   (#guint) their number, 1 where there is no clip.
    /// - `arrival-time` (#guint64, nanoseconds): the running time at which the caption was ready.
    /// - `text`, `prompt` (string); `element` (string): name of the element that made it.
    /// - `model`, `revision`, `device` (string): what made it; `device-name` (string) and `device-memory`
    ///   (#guint64, bytes): of that device.
    /// - `sequence` (#guint64): number of the caption since the element started, from 0.
    /// - `frame` (#guint64): number of the frame since the element started, from 0.
    /// - `tokens` (#guint): length of the caption; `probability` (#gdouble): of this one of the
    ///   `choices`, 1 without any; `truncated` (#gboolean): it was cut off at
    ///   `max-tokens`.
    /// - `repeated` (#gboolean): it says what the current one said to the same prompt. With
    ///   `post-repeated` off there is no message then; the caption is current anew.
    /// - `partial` (#gboolean): more is to come (with `partial-captions`, in messages only).
    /// - `trigger` (string): `interval`, `scene` (the picture had changed, with `scene-threshold`) or
    ///   `request`; `request-id` (#guint): what `describe-now` returned, or 0.
    /// - `latency-ms`, `preprocess-ms`, `vision-ms`, `prefill-ms`, `decode-ms` (#gdouble): from the
    ///   moment the frame was taken to the finished caption, and the stages of that.
    ///
    /// Where several narrators stand in one chain, the meta has the fields of the last one's caption; its
    /// field `captions` (#GstStructure) has each one's under the name of its element.
    ///
    /// The debug category `vlmnarrate` logs one line per caption at level INFO.
    ///
    /// ## Live and recorded
    ///
    /// If upstream is live, no buffer is ever held and no latency is added. Captions come when they
    /// are ready; while the model is busy the newest frame waits for it, and takes the place of the
    /// one that waited before. Otherwise each frame whose turn it is waits for its caption, so that
    /// none is lost, the caption is on the buffer it describes, and the same input gives the same
    /// captions. `mode` overrides what the LATENCY query says.
    ///
    /// EOS waits for captions under way, at most for `drain-timeout`. A flush or a new stream
    /// cancels them; the model stays loaded until NULL.
    ///
    /// A frame that can't be described is a WARNING, and the next is described. A model that can't be
    /// loaded, or one that panics, is an ERROR and makes no more captions: live video goes on without
    /// them for as long as the application lets it, and from READY up the model is loaded anew. So are
    /// settings that no frame can be described with, for instance a system-prompt that the chat template
    /// refuses, if the model finds them when it is loaded; if they are set later, each frame is a WARNING.
    ///
    /// ## Several frames
    ///
    /// With `frames` above 1 the model is shown clips instead of single frames, in the way SmolVLM2
    /// was trained on video: each frame behind its time, in whole seconds from the clip's start. An
    /// interval is divided into so many equal parts and the first frame of each is taken, so that
    /// clips follow each other without a hole; the last one is the frame that is described, and
    /// waited for in recorded mode. At the end of a recorded stream a clip that has begun is
    /// described as far as it has come. `describe-now` looks at one frame still.
    ///
    /// ## Asking
    ///
    /// The action signal `describe-now` (prompt or null, number of tokens or 0) describes the next
    /// frame whatever `interval` says, with `detail-prompt` and `detail-max-tokens` where the
    /// arguments leave them open, and of the whole frame in tiles with `detail-image-splitting`. It
    /// returns the `request-id` of the caption to come. A custom event named
    /// `vlmnarrate-describe-now`, upstream or downstream, with the optional fields `prompt` (string)
    /// and `max-tokens` (#guint), does the same for those who have no handle on the element.
    /// A request that waits when the stream ends is told of in a WARNING, with its `request-id` in the
    /// details; frames of a stream that goes on after a seek still answer it.
    ///
    /// ## The text pad
    ///
    /// `text_src` gives `text/x-raw,format=utf8` in a stream of its own, for `textoverlay`, `srtenc`,
    /// `matroskamux` and the like, or `format=pango-markup` where that is asked for, as for
    /// `webvttenc`, which writes text as it comes. Every caption has a duration and every
    /// stretch without one a GAP event, so nothing downstream waits in vain. Recorded, a caption
    /// lasts until the next frame that is due; live, it starts where the video is when it is ready
    /// and is repeated every `interval`, at most every half second, for as long as it is current. A
    /// caption that comes while the one before has not ended waits for its end. None lasts longer
    /// than `expire`. Played backwards, each ends where the one before starts.
    ///
    /// For files, `merge-captions` makes better cues: identical captions in a row are one, and each
    /// starts with the frame or clip it is about and ends where the next starts. Because that is
    /// known only then, text comes behind the video by a whole cue: fine for a `filesink` and for
    /// muxers with the queues below; whoever waits for the text of each frame, as `textoverlay` does,
    /// would wait for ever.
    ///
    /// One thread feeds both pads: put a `queue` behind each, as behind a demuxer. A muxer waits for
    /// video until it has text, and for text until it has video, so in front of it the queues behind
    /// `text_src` and behind the video encoder must have no limits: `queue max-size-time=0
    /// max-size-bytes=0 max-size-buffers=0`. Text that nobody takes for seconds is told of in a WARNING.
    ///
    /// ## Example launch lines
    ///
    /// ```bash
    /// gst-launch-1.0 -m videotestsrc pattern=ball num-buffers=300 ! vlmnarrate ! autovideosink
    /// ```
    /// Describes a bouncing ball once a second; `-m` prints the captions.
    ///
    /// ```bash
    /// gst-launch-1.0 uridecodebin uri=file:///tmp/in.mp4 ! videoconvert \
    ///     ! vlmnarrate name=n model=/models/SmolVLM-256M-Instruct image-size=224 interval=2000000000 \
    ///     merge-captions=true ! fakesink n.text_src ! queue ! srtenc ! filesink location=/tmp/in.srt
    /// ```
    /// Writes SubRip subtitles of a file. To draw captions there is #vlmnarrateoverlay.
    ///
    /// ```bash
    /// gst-launch-1.0 uridecodebin uri=file:///tmp/in.mp4 ! videoconvert \
    ///     ! vlmnarrate name=n model=/models/SmolVLM-256M-Instruct ! videoconvert ! x264enc \
    ///     ! queue max-size-time=0 max-size-bytes=0 max-size-buffers=0 ! mp4mux name=m ! filesink location=/tmp/out.mp4 \
    ///     n.text_src ! queue max-size-time=0 max-size-bytes=0 max-size-buffers=0 ! m.
    /// ```
    /// Adds a subtitle track to a video.
    ///
    /// ```bash
    /// gst-launch-1.0 v4l2src ! videoconvert ! vlmnarrate name=n model=/models/SmolVLM-256M-Instruct \
    ///     scene-threshold=0.02 merge-captions=true ! fakesink \
    ///     n.text_src ! queue ! text/x-raw,format=pango-markup ! webvttenc ! filesink location=out.vtt
    /// ```
    /// Writes WebVTT subtitles of what a camera sees, when it changes.
    pub struct VlmNarrate(ObjectSubclass<imp::VlmNarrate>)
        @extends gst_base::BaseTransform, gst::Element, gst::Object;
}

impl VlmNarrate {
    /// Describes frames with another engine than SmolVLM, from the next change to READY on.
    ///
    /// The loader gets the properties that are in [`ModelSettings`](vlmnarrate_engine::ModelSettings)
    /// and makes of them what it likes.
    pub fn set_engine_loader(&self, loader: impl EngineLoader + 'static) {
        self.imp().loader.lock().unwrap().0 = Arc::new(loader);
    }

    /// Sets the bin whose name captions get as their element.
    #[cfg(feature = "overlay")]
    pub(crate) fn set_bin(&self, bin: &impl IsA<gst::Object>) {
        self.imp().bin.lock().unwrap().set(Some(bin.upcast_ref()));
    }

    /// The caption to draw on the frame that goes out.
    #[cfg(feature = "overlay")]
    pub(crate) fn caption_to_draw(&self) -> Option<Arc<crate::Caption>> {
        self.imp().caption_to_draw()
    }

    /// Describes the next frame; the same as the action signal `describe-now`.
    ///
    /// `None` takes `detail-prompt` and `detail-max-tokens`. Returns the `request-id` of the
    /// caption to come; `None` in NULL, or if too many requests wait already.
    pub fn describe_now(&self, prompt: Option<&str>, max_tokens: Option<u32>) -> Option<u32> {
        self.imp()
            .describe_now(prompt.map(str::to_owned), max_tokens)
    }
}

pub(crate) fn register(plugin: &gst::Plugin) -> Result<(), glib::BoolError> {
    for enum_ in [
        Mode::static_type(),
        Device::static_type(),
        DType::static_type(),
        Quantization::static_type(),
    ] {
        enum_.mark_as_plugin_api(gst::PluginAPIFlags::empty());
    }
    crate::output::encoding::register_meta();
    gst::Element::register(
        Some(plugin),
        "vlmnarrate",
        gst::Rank::NONE,
        VlmNarrate::static_type(),
    )
}
