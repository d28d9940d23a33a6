//! The element's settings and the table of their properties.

use std::{ffi::OsString, path::PathBuf, sync::LazyLock, time::Duration};

use gst::{glib, prelude::*};

use crate::{
    caption::Caption,
    element::enums::{DType, Device, ImageFormat, Mode, Quantization},
    input::{sampler::SamplerSettings, scene::MAX_SILENCE},
    prompt::{IntervalRequest, RequestSettings},
    properties::{
        Mutable::{Playing, Ready},
        Property, row,
    },
    worker::Urgency,
};
use vlmnarrate_engine::{EndpointSettings, ModelSettings, Sampling};

/// The parts of a text separated by bars, without blank ones.
fn parts(text: &Option<String>) -> impl Iterator<Item = &str> {
    let parts = text.as_deref().unwrap_or_default().split('|');
    parts.filter(|part| !part.trim_matches(' ').is_empty())
}

/// The default prompts, for frames and for clips.
const PROMPT: &str = "Describe this frame in one sentence.";
const CLIP_PROMPT: &str = "Describe this video in one sentence.";

/// A prompt and the form of its answer, for frames that are due or for `describe-now`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PromptSettings {
    pub(crate) prompt: Option<String>,
    pub(crate) max_tokens: u32,
    /// Separated by bars.
    pub(crate) choices: Option<String>,
    pub(crate) image_splitting: bool,
}

/// A server that describes the frames.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Endpoint {
    /// `None` or empty for a model in this process.
    pub(crate) url: Option<String>,
    pub(crate) api_key_file: Option<OsString>,
    pub(crate) ca_file: Option<OsString>,
    pub(crate) request_options: Option<String>,
    pub(crate) image_format: ImageFormat,
    pub(crate) image_quality: u32,
    pub(crate) max_requests: u32,
    pub(crate) timeout: gst::ClockTime,
    pub(crate) fallback_model: Option<OsString>,
}

impl Endpoint {
    /// The URL of the server, if there is one.
    fn url(&self) -> Option<&str> {
        self.url.as_deref().filter(|url| !url.trim().is_empty())
    }

    /// The settings of an engine; `None` if there is no server.
    fn settings(&self) -> Option<EndpointSettings> {
        let url = self.url()?;
        let path = |path: &Option<OsString>| path.as_ref().map(PathBuf::from);
        let mut settings = EndpointSettings::new(url);
        settings.api_key_file = path(&self.api_key_file);
        settings.ca_file = path(&self.ca_file);
        settings.request_options = self.request_options.clone();
        settings.image_format = match self.image_format {
            ImageFormat::Jpeg => vlmnarrate_engine::ImageFormat::Jpeg {
                quality: self.image_quality as u8,
            },
            ImageFormat::Png => vlmnarrate_engine::ImageFormat::Png,
        };
        settings.max_requests = self.max_requests as usize;
        settings.timeout = self.timeout.into();
        let fallback = self.fallback_model.clone();
        settings.fallback_model = fallback.filter(|model| !model.is_empty());
        Some(settings)
    }
}

/// The values of all properties that can be set.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Settings {
    /// A path need not be UTF-8.
    pub(crate) model: Option<OsString>,
    pub(crate) mmproj: Option<OsString>,
    pub(crate) revision: Option<String>,
    pub(crate) device: Device,
    pub(crate) dtype: DType,
    pub(crate) quantization: Quantization,
    pub(crate) threads: u32,
    pub(crate) nice: u32,
    pub(crate) endpoint: Endpoint,
    pub(crate) interval_prompt: PromptSettings,
    pub(crate) detail: PromptSettings,
    pub(crate) system_prompt: Option<String>,
    pub(crate) image_size: u32,
    pub(crate) temperature: f64,
    pub(crate) top_p: f64,
    pub(crate) top_k: u32,
    pub(crate) min_p: f64,
    pub(crate) repetition_penalty: f64,
    pub(crate) seed: u64,
    pub(crate) stop_strings: Option<String>,
    pub(crate) mode: Mode,
    pub(crate) sampler: SamplerSettings,
    pub(crate) expire: gst::ClockTime,
    pub(crate) merge_captions: bool,
    pub(crate) drain_timeout: gst::ClockTime,
    pub(crate) deadline: gst::ClockTime,
    pub(crate) post_messages: bool,
    pub(crate) post_repeated: bool,
    pub(crate) attach_meta: bool,
    pub(crate) partial_captions: bool,
}

impl Default for Settings {
    fn default() -> Self {
        let sampling = Sampling::default();
        Self {
            model: None,
            mmproj: None,
            revision: Some("main".into()),
            device: Device::Auto,
            dtype: DType::Auto,
            quantization: Quantization::Auto,
            threads: 0,
            nice: 5,
            endpoint: Endpoint {
                url: None,
                api_key_file: None,
                ca_file: None,
                request_options: None,
                image_format: ImageFormat::Jpeg,
                image_quality: 85,
                max_requests: 0,
                timeout: 120 * gst::ClockTime::SECOND,
                fallback_model: None,
            },
            interval_prompt: PromptSettings {
                prompt: Some(PROMPT.into()),
                max_tokens: 20,
                choices: None,
                image_splitting: false,
            },
            detail: PromptSettings {
                prompt: Some("Describe this frame in detail.".into()),
                max_tokens: 50,
                choices: None,
                image_splitting: false,
            },
            system_prompt: None,
            image_size: 0,
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: 0,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty.into(),
            seed: sampling.seed,
            stop_strings: None,
            mode: Mode::Auto,
            sampler: SamplerSettings {
                interval: gst::ClockTime::SECOND,
                frames: 1,
                every_nth: 1,
                scene_threshold: 0.0,
                phase: 0.0,
            },
            expire: gst::ClockTime::ZERO,
            merge_captions: false,
            drain_timeout: 10 * gst::ClockTime::SECOND,
            deadline: gst::ClockTime::ZERO,
            post_messages: true,
            post_repeated: true,
            attach_meta: true,
            partial_captions: false,
        }
    }
}

impl Settings {
    /// Settings that decide which model is loaded, and how.
    pub(crate) fn model_settings(&self) -> ModelSettings {
        let mut settings = ModelSettings::default();
        settings.model = self.model.clone();
        settings.mmproj = self.mmproj.clone();
        settings.revision = self.revision.clone();
        settings.device = self.device.into();
        settings.dtype = self.dtype.into();
        settings.quantization = self.quantization.into();
        settings.threads = self.threads as usize;
        settings.nice = self.nice as u8;
        settings.endpoint = self.endpoint.settings();
        settings
    }

    /// Whether a server describes the frames.
    pub(crate) fn is_remote(&self) -> bool {
        self.endpoint.url().is_some()
    }

    /// How long a frame of a live or recorded stream may wait for its caption.
    pub(crate) fn urgency(&self, live: bool) -> Urgency {
        /// An older caption would have expired.
        const REMOTE_DEADLINE: Duration = Duration::from_secs(30);
        if !live {
            let patience = self.endpoint.timeout.into();
            return Urgency::Recorded { patience };
        }
        Urgency::Live {
            deadline: match self.deadline {
                gst::ClockTime::ZERO => self.is_remote().then_some(REMOTE_DEADLINE),
                deadline => Some(deadline.into()),
            },
        }
    }

    /// Whether to post a message for a caption.
    pub(crate) fn should_post(&self, caption: &Caption) -> bool {
        let is_news = !caption.repeated || caption.stamp.request_id != 0;
        self.post_messages && (self.post_repeated || is_news)
    }

    /// Time that a caption stays current if no other replaces it.
    pub(crate) fn lifetime(&self) -> gst::ClockTime {
        match self.expire {
            gst::ClockTime::ZERO => {
                let SamplerSettings {
                    interval,
                    every_nth,
                    ..
                } = self.sampler;
                MAX_SILENCE.max(interval.saturating_mul(2 * u64::from(every_nth)))
            }
            expire => expire,
        }
    }

    /// Settings of the request about a frame or clip that is due.
    pub(crate) fn interval_request_settings(&self) -> RequestSettings {
        let mut settings = self.request_settings(&self.interval_prompt);
        if self.sampler.frames > 1 {
            // The reference implementation doesn't split frames of a video.
            settings.whole_frames = false;
            if settings.prompt == PROMPT {
                settings.prompt = CLIP_PROMPT.into();
            }
        }
        settings
    }

    /// The request about every frame or clip that is due.
    pub(crate) fn interval_request(&self) -> IntervalRequest {
        IntervalRequest {
            settings: self.interval_request_settings(),
            frames: self.sampler.frames as usize,
            image_size: self.image_size,
        }
    }

    /// Settings of a request with these prompt settings.
    pub(crate) fn request_settings(&self, prompt: &PromptSettings) -> RequestSettings {
        RequestSettings {
            whole_frames: prompt.image_splitting,
            system: self.system_prompt.clone().filter(|s| !s.is_empty()),
            prompt: prompt.prompt.clone().unwrap_or_default(),
            max_tokens: prompt.max_tokens,
            sampling: Sampling {
                temperature: self.temperature,
                top_p: self.top_p,
                top_k: self.top_k as usize,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty as f32,
                seed: self.seed,
            },
            stop_strings: parts(&self.stop_strings).map(str::to_owned).collect(),
            choices: parts(&prompt.choices)
                .map(|part| part.trim().to_owned())
                .collect(),
            partial: self.partial_captions,
        }
    }
}

pub(crate) static PROPERTIES: LazyLock<Vec<Property<Settings>>> = LazyLock::new(properties);

/// A new table: a ParamSpec belongs to one class, and the overlay has these properties too.
#[rustfmt::skip]
pub(crate) fn properties() -> Vec<Property<Settings>> {
    vec![
        row(Ready, ("model", "Model"), (), |s| &mut s.model,
            "SmolVLM or SmolVLM2 checkpoint: a folder, a GGUF file with its mmproj file beside it, or the id \
             of a model on the Hugging Face hub, for example HuggingFaceTB/SmolVLM2-500M-Video-Instruct or \
             ggml-org/SmolVLM-500M-Instruct-GGUF:Q8_0. A model that is not in the hub's cache is downloaded \
             (null = the embedded demo model, which only knows videotestsrc patterns)"),
        row(Ready, ("mmproj", "Multimodal projector"), (), |s| &mut s.mmproj,
            "Path of the mmproj file, the GGUF file with the vision encoder (only used when model is a GGUF \
             file; null or empty = the file beside the model that is named after it, or the only one)"),
        row(Ready, ("revision", "Revision"), (), |s| &mut s.revision,
            "Branch, tag or commit of a model on the hub. A revision in the cache is used as it is: the hub \
             is not asked whether a branch has moved on"),
        row(Ready, ("device", "Device"), (), |s| &mut s.device,
            "Device that the model runs on. cuda and metal need a build with the feature of the same name \
             (auto = the first of cuda, metal and cpu that the build supports and the machine has)"),
        row(Ready, ("dtype", "Data type"), (), |s| &mut s.dtype,
            "Data type of weights that are not quantized, and of the computation with them"),
        row(Ready, ("quantization", "Quantization"), (), |s| &mut s.quantization,
            "Quantization of the weights when they are loaded. Weights that a GGUF file has quantized stay \
             as they are (auto = q8-0 on a CPU, none on a GPU or if dtype is set)"),
        row(Ready, ("threads", "Threads"), 0..=1024, |s| &mut s.threads,
            "CPU threads for the model (0 = one per core)"),
        row(Ready, ("nice", "Nice value"), 0..=19, |s| &mut s.nice,
            "Nice value of the model's threads, so that decoders beside them keep their frame rate \
             (0 = normal priority; only used on Linux)"),
        row(Ready, ("endpoint", "Endpoint"), (), |s| &mut s.endpoint.url,
            "Base URL of an OpenAI-compatible server that describes the frames, for example \
             http://gpu:8000/v1 for vLLM or llama-server. model is then the name of one of its models \
             (null = the only one that it has). An API key is taken from the environment variable \
             VLMNARRATE_API_KEY or OPENAI_API_KEY (null = the model runs in this process)"),
        row(Ready, ("api-key-file", "API key file"), (), |s| &mut s.endpoint.api_key_file,
            "File with the API key of the endpoint, in one line (null = the environment variables)"),
        row(Ready, ("ca-file", "CA file"), (), |s| &mut s.endpoint.ca_file,
            "PEM file of the certificate authorities to trust for the endpoint, instead of the public ones \
             (null = the public ones)"),
        row(Ready, ("request-options", "Request options"), (), |s| &mut s.endpoint.request_options,
            "JSON object whose fields are added to the body of each request to the endpoint, and win over the \
             element's own, for example {\"mm_processor_kwargs\": {\"do_image_splitting\": false}} \
             (null = none)"),
        row(Ready, ("image-format", "Image format"), (), |s| &mut s.endpoint.image_format,
            "Format of the pictures that the endpoint gets"),
        row(Ready, ("image-quality", "Image quality"), 1..=100, |s| &mut s.endpoint.image_quality,
            "Quality of JPEG pictures that the endpoint gets"),
        row(Ready, ("max-requests", "Maximum requests"), 0..=4096, |s| &mut s.endpoint.max_requests,
            "Maximum number of requests that all elements of this process have in flight at the endpoint. \
             Others wait, and take their newest frame when it is their turn (0 = twice the \
             slots of llama-server, 32 at other servers)"),
        row(Ready, ("endpoint-timeout", "Endpoint timeout"), (), |s| &mut s.endpoint.timeout,
            "Nanoseconds without a sign of life after which a request to the endpoint has failed, and for \
             which a recorded frame waits for an endpoint that is away, before an ERROR"),
        row(Ready, ("fallback-model", "Fallback model"), (), |s| &mut s.endpoint.fallback_model,
            "Model that describes frames in this process while the endpoint is away, named as model is \
             without an endpoint. device, dtype, quantization, threads, revision and mmproj are those of this \
             model then (null = none)"),
        row(Playing, ("prompt", "Prompt"), (), |s| &mut s.interval_prompt.prompt,
            "Prompt for each frame (null or empty = the picture alone). The default prompt for clips asks \
             for a description of the video"),
        row(Playing, ("system-prompt", "System prompt"), (), |s| &mut s.system_prompt,
            "Instruction in front of every prompt (null or empty = none)"),
        row(Playing, ("image-size", "Image size"), 0..=4096, |s| &mut s.image_size,
            "Side in pixels of the square to which frames are scaled for the vision encoder, or with an \
             endpoint and a model that is no SmolVLM the longest edge, with the aspect ratio kept. Smaller is \
             faster and shows less detail (0 = the size that the model was trained with, 512 with an \
             endpoint)"),
        row(Playing, ("image-splitting", "Image splitting"), (),
            |s| &mut s.interval_prompt.image_splitting,
            "Describe the whole frame, split into up to 17 tiles of the size that the model was trained \
             with, as the reference implementation does. Shows more detail, and takes many times as long. \
             image-size is ignored"),
        row(Playing, ("max-tokens", "Maximum tokens"), 1..=4096, |s| &mut s.interval_prompt.max_tokens,
            "Maximum length of a caption in tokens"),
        row(Playing, ("temperature", "Temperature"), 0.0..=10.0, |s| &mut s.temperature,
            "Randomness of the choice of tokens (0 = always the likeliest token)"),
        row(Playing, ("top-p", "Top p"), 0.0..=1.0, |s| &mut s.top_p,
            "Sample from the likeliest tokens whose probabilities add up to this value \
             (1 = all; only used when temperature > 0)"),
        row(Playing, ("top-k", "Top k"), 0..=u32::MAX, |s| &mut s.top_k,
            "Sample from this many of the likeliest tokens \
             (0 = all; only used when temperature > 0)"),
        row(Playing, ("min-p", "Min p"), 0.0..=1.0, |s| &mut s.min_p,
            "Sample from tokens whose probability is at least this fraction of the likeliest token's \
             (0 = all; only used when temperature > 0)"),
        row(Playing, ("repetition-penalty", "Repetition penalty"), 0.1..=10.0,
            |s| &mut s.repetition_penalty,
            "Divisor for the scores of tokens that were already used (1 = off)"),
        row(Playing, ("seed", "Seed"), 0..=u64::MAX, |s| &mut s.seed,
            "Seed of the random choices in each caption (only used when temperature > 0)"),
        row(Playing, ("stop-strings", "Stop strings"), (), |s| &mut s.stop_strings,
            "Strings, separated by |, that end a caption. The caption does not contain them (null = none)"),
        row(Playing, ("choices", "Choices"), (), |s| &mut s.interval_prompt.choices,
            "Allowed captions, separated by |, for example yes|no. The caption has the probability of the \
             choice in its fields. Not used for describe-now (null = any caption)"),
        row(Ready, ("mode", "Mode"), (), |s| &mut s.mode,
            "Whether frames wait for their captions (recorded), or captions come when they are ready (live)"),
        row(Playing, ("deadline", "Deadline"), (), |s| &mut s.deadline,
            "Nanoseconds after which the caption of a live frame is worth nothing and is not waited for any \
             longer. Not used in recorded mode (0 = 30 s with an endpoint, none otherwise)"),
        row(Playing, ("interval", "Interval"), (), |s| &mut s.sampler.interval,
            "Stream time in nanoseconds between described frames \
             (0 = every frame in recorded mode, in live mode the newest whenever the model has time)"),
        row(Playing, ("frames", "Frames"), 1..=64, |s| &mut s.sampler.frames,
            "Number of frames that are described together, as a clip, with SmolVLM2's prompt for video. \
             They are spread evenly over interval, or consecutive if interval is 0. The caption comes with \
             the last frame. A clip of n frames takes about n times as long as one frame; its frames are \
             never split into tiles"),
        row(Playing, ("every-nth", "Every nth"), 1..=u32::MAX, |s| &mut s.sampler.every_nth,
            "Describe only every nth of the frames or clips that interval selects"),
        row(Playing, ("scene-threshold", "Scene threshold"), 0.0..=1.0,
            |s| &mut s.sampler.scene_threshold,
            "Skip frames that differ less than this from the last described one: mean absolute difference \
             of 16x16 grey cells, 1 = black to white. 0.02 separates cuts from noise. After 30 s a frame is \
             described anyway (0 = off)"),
        row(Playing, ("expire", "Expire"), (), |s| &mut s.expire,
            "Stream time in nanoseconds for which a caption stays current if no other replaces it and the \
             picture is not found unchanged (0 = 30 s, or two intervals if that is longer)"),
        row(Ready, ("merge-captions", "Merge captions"), (), |s| &mut s.merge_captions,
            "Merge identical captions in a row into one cue on the text pad, which ends where the next \
             caption starts, or after 5 minutes. A cue is pushed when it has ended, later than its video: \
             use this for files"),
        row(Playing, ("detail-prompt", "Detail prompt"), (), |s| &mut s.detail.prompt,
            "Prompt for describe-now requests without a prompt of their own"),
        row(Playing, ("detail-max-tokens", "Detail maximum tokens"), 1..=4096,
            |s| &mut s.detail.max_tokens,
            "Maximum length in tokens of captions that describe-now requests"),
        row(Playing, ("detail-image-splitting", "Detail image splitting"), (),
            |s| &mut s.detail.image_splitting,
            "Split the frames of describe-now requests into tiles, as image-splitting does"),
        row(Playing, ("drain-timeout", "Drain timeout"), (), |s| &mut s.drain_timeout,
            "Nanoseconds that EOS waits for captions in progress (0 = EOS does not wait)"),
        row(Playing, ("post-messages", "Post messages"), (), |s| &mut s.post_messages,
            "Post each caption on the bus, as an element message named vlmnarrate"),
        row(Playing, ("post-repeated", "Post repeated captions"), (), |s| &mut s.post_repeated,
            "Post captions that repeat the current one too, with the field repeated set. Captions that \
             describe-now requests are always posted"),
        row(Playing, ("attach-meta", "Attach meta"), (), |s| &mut s.attach_meta,
            "Attach the current caption to every buffer, as a custom meta named VlmNarrateMeta"),
        row(Playing, ("partial-captions", "Partial captions"), (), |s| &mut s.partial_captions,
            "Post a message for each token too, with the text so far and the field partial set"),
    ]
}

/// New ParamSpecs of all properties of the element.
pub(crate) fn specs() -> Vec<glib::ParamSpec> {
    let caption = glib::ParamSpecString::builder("caption")
        .nick("Caption")
        .blurb(
            "Current caption (null = none yet, or the last one has expired). Notifies of each change",
        )
        .read_only()
        .build();
    let stats = glib::ParamSpecBoxed::builder::<gst::Structure>("stats")
        .nick("Statistics")
        .blurb(
            "Statistics since the element started: the counters frames, sampled, unchanged, dropped, \
             unanswered, captions and errors; the 50th and 95th percentile in nanoseconds of each stage of the last 256 captions, \
             for example queue-p50, for queue, preprocess, vision, prefill, decode and total; \
             tokens-per-second while decoding. Also the device that the model runs on, its device-name and \
             its device-memory in bytes, the dtype, the quantization (file = that of the GGUF file), the \
             weights-memory in bytes and the image-size in use (empty and 0 while no model is loaded)",
        )
        .read_only()
        .build();
    let settings = properties().into_iter().map(|property| property.spec);
    settings.chain([caption, stats]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Any value but the default.
    fn other(spec: &glib::ParamSpec) -> glib::Value {
        if let Ok(default) = spec.default_value().get::<bool>() {
            (!default).to_value()
        } else if let Some(spec) = spec.downcast_ref::<glib::ParamSpecEnum>() {
            spec.enum_class().to_value(1).unwrap()
        } else if let Some(spec) = spec.downcast_ref::<glib::ParamSpecDouble>() {
            (spec.minimum() + 0.25).to_value()
        } else if spec.value_type() == glib::Type::STRING {
            "other".to_value()
        } else {
            7u32.to_value()
                .transform_with_type(spec.value_type())
                .unwrap()
        }
    }

    #[test]
    fn each_row_has_a_field_of_its_own() {
        gst::init().unwrap();
        let changed = |settings: &mut Settings| {
            let changed = PROPERTIES.iter().filter(|p| {
                let value = p.get(settings);
                p.spec.default_value().compare(&value) != Some(std::cmp::Ordering::Equal)
            });
            changed.map(|p| p.spec.name()).collect::<Vec<_>>()
        };
        assert_eq!(changed(&mut Settings::default()), [""; 0]);
        for property in PROPERTIES.iter() {
            let mut settings = Settings::default();
            property.set(&mut settings, &other(&property.spec)).unwrap();
            assert_eq!(changed(&mut settings), [property.spec.name()]);
        }
    }
}
