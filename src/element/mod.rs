//! The element `vlmnarrate`; its page is that of [`VlmNarrate`].

use std::sync::Arc;

use gst::{glib, prelude::*, subclass::prelude::*};

mod callbacks;
mod caption_state;
mod captions;
mod enums;
mod frames;
mod imp;
mod model;
mod model_control;
mod panics;
mod phase;
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
pub use enums::{DType, Device, ImageFormat, Mode, Quantization};

glib::wrapper! {
    /// SECTION:element-vlmnarrate
    ///
    /// Describes raw video in words. Once per `interval` the element takes a frame, scales it to a small
    /// square and asks a SmolVLM vision language model to describe it. The video passes through
    /// unchanged; only metadata is added.
    /// The model sees transparent pixels on white, and high dynamic range (PQ, HLG) or BT.2020 as an
    /// sRGB display would show them.
    ///
    /// Without a `model` the element uses a tiny embedded one that only knows `videotestsrc` patterns.
    /// It shows that everything works. For real video, set `model` to a SmolVLM or SmolVLM2
    /// checkpoint: the id of a model on the Hugging Face hub, a folder, or a GGUF file.
    ///
    /// A model that is not in the hub's cache is downloaded, with PROGRESS messages of the code
    /// `download-model`. Recorded video waits for the download; live video goes on without captions.
    ///
    /// With `endpoint` the model runs on a server instead: vLLM, llama-server, SGLang, Ollama, OpenAI or
    /// another one that understands their protocol. See below.
    ///
    /// ## Captions
    ///
    /// Captions are available in four ways:
    ///
    /// - as an element message named `vlmnarrate` on the bus (`post-messages`);
    /// - as a custom meta named `VlmNarrateMeta` on every buffer while the caption is current
    ///   (`attach-meta`), that is until the next caption or until it expires (`expire`);
    /// - as timed text on the request pad `text_src`;
    /// - as the property `caption`, which notifies.
    ///
    /// Message and meta have these fields:
    ///
    /// - `timestamp`, `stream-time`, `running-time`, `duration` (#guint64, nanoseconds): times of the
    ///   described frame, the last one of a clip. `GST_CLOCK_TIME_NONE` if unknown.
    /// - `first-timestamp` (#guint64): timestamp of the first frame of a clip; `frames` (#guint): number of
    ///   frames, 1 if there is no clip.
    /// - `arrival-time` (#guint64, nanoseconds): running time at which the caption was ready.
    /// - `text`, `prompt` (string); `element` (string): name of the element that made the caption.
    /// - `model`, `revision` (string): the model; `device`, `device-name` (string) and `device-memory`
    ///   (#guint64, bytes): the device that it ran on; `remote` and the host for an endpoint.
    /// - `sequence` (#guint64): number of the caption since the element started, from 0.
    /// - `frame` (#guint64): number of the frame since the element started, from 0.
    /// - `tokens` (#guint): length of the caption; `probability` (#gdouble): probability of the text among
    ///   the `choices`, 1 without choices, left out where the engine can't know it; `truncated`
    ///   (#gboolean): whether `max-tokens` cut the caption off.
    /// - `repeated` (#gboolean): whether the current caption already had this text and prompt. With
    ///   `post-repeated` off such a caption is not posted, but its lifetime starts anew.
    /// - `partial` (#gboolean): whether the text is unfinished (with `partial-captions`, in messages only).
    /// - `trigger` (string): `interval`, `scene` (the picture had changed, with `scene-threshold`) or
    ///   `request`; `request-id` (#guint): the id that `describe-now` returned, or 0.
    /// - `latency-ms`, `preprocess-ms`, `vision-ms`, `prefill-ms`, `decode-ms` (#gdouble): time from the
    ///   sampling of the frame to the finished caption, and its stages.
    ///
    /// If several such elements are in one chain, the meta has the fields of the last one's caption. Its
    /// field `captions` (#GstStructure) has the caption of each element under the name of the element.
    ///
    /// The debug category `vlmnarrate` logs one line per caption at level INFO.
    ///
    /// ## Live and recorded
    ///
    /// If upstream is live, the element never holds a buffer and adds no latency. Captions come when they
    /// are ready. While the model is busy, the newest due frame waits for it and replaces an older one.
    /// If upstream is not live, each due frame waits for its caption: no caption is lost, each is on
    /// the buffer that it describes, and the same input gives the same captions. `mode` overrides the
    /// answer to the LATENCY query.
    ///
    /// EOS waits for captions in progress, at most for `drain-timeout`. A flush or a new stream cancels
    /// them. The model stays loaded until NULL.
    ///
    /// A frame that can't be described is a WARNING, and the stream goes on. A model that can't be
    /// loaded or that panics is an ERROR, and there are no more captions. Live video goes on without
    /// captions for as long as the application lets it; the next change from READY to PAUSED loads the
    /// model again. Settings that no frame can be described with, for example a `system-prompt` that the
    /// chat template refuses, are an ERROR when the model is loaded, and a WARNING for each frame when
    /// they are set later.
    ///
    /// ## Endpoints
    ///
    /// With `endpoint` set, `model` is the name of a model on that server. The API key comes from
    /// `api-key-file` or from the environment variable `VLMNARRATE_API_KEY` or `OPENAI_API_KEY`, a proxy
    /// from `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY`. All other properties mean what they
    /// mean in process; a WARNING names each that the server ignores. Frames keep their aspect ratio,
    /// except for a SmolVLM, and are sent as JPEG or PNG (`image-format`). The probability of a choice is
    /// not known.
    ///
    /// Answers are streamed. A flush, a seek or a state change closes the connection at once, which ends
    /// the server's work too. In live mode each element has one request in flight, and an answer that is
    /// older than `deadline` is not waited for. All elements of the process that use the same endpoint
    /// share its connections and a limit of requests (`max-requests`); an element takes its newest frame
    /// when it is its turn. Their intervals are shifted against each other.
    ///
    /// If the endpoint can't be reached, breaks off or has no room, no element asks it until a pause is
    /// over: what `Retry-After` says, or half a second, doubled up to 30 s. Then one request probes it. Each
    /// element posts one WARNING when the endpoint goes away and one INFO when it is back. Meanwhile live
    /// video goes on, with captions of `fallback-model` if there is one; the statistic `unanswered` counts
    /// frames without a caption. Recorded frames wait, at most for `endpoint-timeout`; then there is an
    /// ERROR. A wrong key, URL or model is an ERROR at once.
    ///
    /// ## Clips
    ///
    /// With `frames` above 1 the model describes clips instead of single frames, in the format that
    /// SmolVLM2 was trained with: each frame follows its time in seconds from the start of the clip. An
    /// interval is divided into as many equal parts as the clip has frames, and the first frame of each
    /// part is taken, so that clips cover the stream without gaps. The last frame carries the caption,
    /// and waits for it in recorded mode. At the end of a recorded stream an incomplete clip is
    /// described too. `describe-now` always describes one frame.
    ///
    /// ## Requests
    ///
    /// The action signal `describe-now` (prompt or null, number of tokens or 0) describes the next
    /// frame regardless of `interval`. It uses `detail-prompt` and `detail-max-tokens` for arguments
    /// that are null or 0, and the whole frame in tiles with `detail-image-splitting`. It returns the
    /// `request-id` of the caption. A custom event named `vlmnarrate-describe-now`, upstream or
    /// downstream, with the optional fields `prompt` (string) and `max-tokens` (#guint), does the same
    /// for code that has no reference to the element. A request that is pending when the stream ends is
    /// reported in a WARNING with its `request-id` in the details. If the stream goes on after a seek, a
    /// later frame still answers it.
    ///
    /// ## Text pad
    ///
    /// `text_src` is a sparse stream of `text/x-raw,format=utf8`, for `textoverlay`, `srtenc`,
    /// `matroskamux` and others, or of `format=pango-markup` if downstream wants that, as `webvttenc`
    /// does, which doesn't escape text. Every caption has a duration, and there is a GAP event wherever
    /// there is no caption, so downstream never waits for text. In recorded mode a caption lasts until the
    /// next due frame. In live mode a caption starts at the position of the video when it is ready, and
    /// is repeated every `interval`, at most every half second, while it is current. A caption that comes
    /// before the end of the previous cue waits for that end. No caption lasts longer than `expire`. In
    /// reverse playback, each cue ends where the one before starts.
    ///
    /// `merge-captions` makes better cues for files: identical captions in a row become one cue, and each
    /// cue starts with the frame or clip that it describes and ends where the next one starts. Because
    /// that end is known late, text comes one cue after its video. This suits a `filesink` and muxers with
    /// the queues below. An element that waits for the text of each frame, as `textoverlay` does, would
    /// block forever.
    ///
    /// One thread feeds both pads: put a `queue` behind each, as behind a demuxer. A muxer waits for
    /// video until it has text, and for text until it has video, so the queues between the element and a
    /// muxer, behind `text_src` and behind the video encoder, must have no limits: `queue max-size-time=0
    /// max-size-bytes=0 max-size-buffers=0`. A text pad that is blocked for seconds is a WARNING.
    ///
    /// ## Example launch lines
    ///
    /// ```bash
    /// gst-launch-1.0 -m videotestsrc pattern=ball num-buffers=300 ! vlmnarrate ! autovideosink
    /// ```
    /// Describes a bouncing ball once per second; `-m` prints the captions.
    ///
    /// ```bash
    /// gst-launch-1.0 uridecodebin uri=file:///tmp/in.mp4 ! videoconvert \
    ///     ! vlmnarrate name=n model=/models/SmolVLM-256M-Instruct image-size=224 interval=2000000000 \
    ///     merge-captions=true ! fakesink n.text_src ! queue ! srtenc ! filesink location=/tmp/in.srt
    /// ```
    /// Writes the captions of a file as SubRip subtitles. Use #vlmnarrateoverlay to draw captions.
    ///
    /// ```bash
    /// gst-launch-1.0 uridecodebin uri=file:///tmp/in.mp4 ! videoconvert \
    ///     ! vlmnarrate name=n model=/models/SmolVLM-256M-Instruct ! videoconvert ! x264enc \
    ///     ! queue max-size-time=0 max-size-bytes=0 max-size-buffers=0 ! mp4mux name=m ! filesink location=/tmp/out.mp4 \
    ///     n.text_src ! queue max-size-time=0 max-size-bytes=0 max-size-buffers=0 ! m.
    /// ```
    /// Adds a subtitle track to a file.
    ///
    /// ```bash
    /// gst-launch-1.0 v4l2src ! videoconvert ! vlmnarrate name=n model=/models/SmolVLM-256M-Instruct \
    ///     scene-threshold=0.02 merge-captions=true ! fakesink \
    ///     n.text_src ! queue ! text/x-raw,format=pango-markup ! webvttenc ! filesink location=out.vtt
    /// ```
    /// Describes a camera's video whenever it changes, and writes WebVTT subtitles.
    ///
    /// ```bash
    /// gst-launch-1.0 -m v4l2src ! videoconvert ! vlmnarrate endpoint=http://gpu:8000/v1 \
    ///     model=HuggingFaceTB/SmolVLM2-500M-Video-Instruct ! fakesink
    /// ```
    /// Asks a server, for example `vllm serve HuggingFaceTB/SmolVLM2-500M-Video-Instruct`.
    pub struct VlmNarrate(ObjectSubclass<imp::VlmNarrate>)
        @extends gst_base::BaseTransform, gst::Element, gst::Object;
}

impl VlmNarrate {
    /// Sets the engine that describes frames, from the next load of the model on.
    ///
    /// The loader gets the properties that [`ModelSettings`](vlmnarrate_engine::ModelSettings) has and is free to ignore
    /// them.
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

    /// Requests a caption of the next frame, as the action signal `describe-now` does.
    ///
    /// `None` stands for `detail-prompt` and `detail-max-tokens`. Returns the `request-id` of the caption; `None` in
    /// NULL or if too many requests are pending.
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
        ImageFormat::static_type(),
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
