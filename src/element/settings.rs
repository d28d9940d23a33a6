//! The element's settings and, in one table, the properties that show them.

use std::{ffi::OsString, sync::LazyLock};

use gst::{glib, prelude::*};

use crate::{
    caption::Caption,
    input::{sampler::SamplerSettings, scene::MAX_SILENCE},
    prompt::{IntervalRequest, RequestSettings},
    properties::{
        Choice,
        Mutable::{Playing, Ready},
        Property, row,
    },
};
use vlmnarrate_engine::{ModelSettings, Sampling};

/// Whether frames wait for their captions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstVlmNarrateMode")]
pub enum Mode {
    /// Live if upstream answers the LATENCY query so, else recorded.
    #[default]
    #[enum_value(name = "Auto: live if upstream is live, else recorded", nick = "auto")]
    Auto,
    /// Never holds a buffer. Captions come when they are ready, and the newest frame is described.
    #[enum_value(
        name = "Live: never hold a buffer, describe the newest frame",
        nick = "live"
    )]
    Live,
    /// Each frame that is due waits for its caption. The same input gives the same captions.
    #[enum_value(
        name = "Recorded: each frame that is due waits for its caption",
        nick = "recorded"
    )]
    Recorded,
}

/// Where the model runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstVlmNarrateDevice")]
pub enum Device {
    /// The first of CUDA, Metal and the CPU that the build supports and the machine has.
    #[default]
    #[enum_value(
        name = "Auto: the fastest device that the build supports and the machine has",
        nick = "auto"
    )]
    Auto,
    /// The CPU.
    #[enum_value(name = "CPU", nick = "cpu")]
    Cpu,
    /// An NVIDIA GPU.
    #[enum_value(name = "CUDA: an NVIDIA GPU", nick = "cuda")]
    Cuda,
    /// An Apple GPU.
    #[enum_value(name = "Metal: an Apple GPU", nick = "metal")]
    Metal,
}

/// Data type of weights that are not quantized, and of the computation with them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstVlmNarrateDType")]
pub enum DType {
    /// The fastest data type on the device.
    #[default]
    #[enum_value(name = "Auto: the fastest on the device", nick = "auto")]
    Auto,
    /// 32-bit float.
    #[enum_value(name = "F32: 32-bit float", nick = "f32")]
    F32,
    /// 16-bit brain float, with the range of a 32-bit float.
    #[enum_value(name = "BF16: 16-bit brain float", nick = "bf16")]
    Bf16,
    /// 16-bit float.
    #[enum_value(name = "F16: 16-bit float", nick = "f16")]
    F16,
}

/// Quantization of the weights when they are loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstVlmNarrateQuantization")]
pub enum Quantization {
    /// `q8-0` on a CPU unless `dtype` is set, else none.
    #[default]
    #[enum_value(
        name = "Auto: q8-0 on a CPU unless dtype is set, else none",
        nick = "auto"
    )]
    Auto,
    /// The weights have the data type of `dtype`.
    #[enum_value(name = "None: weights in the data type of dtype", nick = "none")]
    None,
    /// 8 bits per weight, in blocks of 32.
    #[enum_value(name = "Q8_0: 8 bits per weight, in blocks of 32", nick = "q8-0")]
    Q8_0,
    /// 4 bits per weight in the decoder, 8 elsewhere.
    #[enum_value(
        name = "Q4_0: 4 bits per weight in the decoder, 8 elsewhere",
        nick = "q4-0"
    )]
    Q4_0,
}

impl Choice for Mode {}
impl Choice for Quantization {}
impl Choice for Device {}
impl Choice for DType {}

impl From<Device> for vlmnarrate_engine::DeviceKind {
    fn from(device: Device) -> Self {
        match device {
            Device::Auto => Self::Auto,
            Device::Cpu => Self::Cpu,
            Device::Cuda => Self::Cuda,
            Device::Metal => Self::Metal,
        }
    }
}

impl From<Quantization> for vlmnarrate_engine::Quantization {
    fn from(quantization: Quantization) -> Self {
        match quantization {
            Quantization::Auto => Self::Auto,
            Quantization::None => Self::None,
            Quantization::Q8_0 => Self::Q8_0,
            Quantization::Q4_0 => Self::Q4_0,
        }
    }
}

impl From<DType> for vlmnarrate_engine::DType {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::Auto => Self::Auto,
            DType::F32 => Self::F32,
            DType::Bf16 => Self::Bf16,
            DType::F16 => Self::F16,
        }
    }
}

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
            },
            expire: gst::ClockTime::ZERO,
            merge_captions: false,
            drain_timeout: 10 * gst::ClockTime::SECOND,
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
        settings
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
            "SmolVLM or SmolVLM2 checkpoint: a folder, a GGUF file with its mmproj file beside it, or an id \
             on the Hugging Face hub as in HuggingFaceTB/SmolVLM2-500M-Video-Instruct or \
             ggml-org/SmolVLM-500M-Instruct-GGUF:Q8_0, which is downloaded unless the hub's cache \
             has it (null = the embedded demo model, which knows videotestsrc pictures only)"),
        row(Ready, ("mmproj", "Multimodal projector"), (), |s| &mut s.mmproj,
            "Path of the mmproj file, the GGUF file with the vision encoder, of a model that is a GGUF file \
             (null or empty = the one beside the model that is named after it, or the only one there)"),
        row(Ready, ("revision", "Revision"), (), |s| &mut s.revision,
            "Branch, tag or commit of a model on the hub. If the cache has it, it is used as it is \
             there, and the hub is not asked whether a branch has moved on"),
        row(Ready, ("device", "Device"), (), |s| &mut s.device,
            "Where the model runs: cuda and metal are there in builds with the feature of that name \
             (auto = the first of cuda, metal and cpu that build and machine have)"),
        row(Ready, ("dtype", "Data type"), (), |s| &mut s.dtype,
            "Number format of weights that are not quantized, and of what is computed with them"),
        row(Ready, ("quantization", "Quantization"), (), |s| &mut s.quantization,
            "Number format to which the weights are quantized when they are loaded; those that a GGUF \
             file has quantized stay as they are \
             (auto = q8-0 on a CPU, none on a GPU or if dtype says otherwise)"),
        row(Ready, ("threads", "Threads"), 0..=1024, |s| &mut s.threads,
            "CPU threads for the model (0 = all cores)"),
        row(Ready, ("nice", "Nice value"), 0..=19, |s| &mut s.nice,
            "How far the model's threads give way to all others, so that a decoder beside them keeps \
             its rate (0 = not at all; on Linux)"),
        row(Playing, ("prompt", "Prompt"), (), |s| &mut s.interval_prompt.prompt,
            "Question asked about each frame (null or empty = the picture alone); of clips the \
             default asks to describe this video"),
        row(Playing, ("system-prompt", "System prompt"), (), |s| &mut s.system_prompt,
            "Instruction that goes before every question (null or empty = none)"),
        row(Playing, ("image-size", "Image size"), 0..=4096, |s| &mut s.image_size,
            "Side in pixels of the square to which a frame is scaled before the vision encoder; \
             smaller is faster and sees less (0 = as the model was trained)"),
        row(Playing, ("image-splitting", "Image splitting"), (), |s| &mut s.interval_prompt.image_splitting,
            "Describe the whole frame in the reference's way, cut into tiles of the size the model was \
             trained on, up to 17 of them: sees more detail and takes many times as long. \
             image-size doesn't count then"),
        row(Playing, ("max-tokens", "Maximum tokens"), 1..=4096, |s| &mut s.interval_prompt.max_tokens,
            "Length in tokens at which a caption is cut off"),
        row(Playing, ("temperature", "Temperature"), 0.0..=10.0, |s| &mut s.temperature,
            "Randomness of the choice of tokens (0 = always the likeliest)"),
        row(Playing, ("top-p", "Top p"), 0.0..=1.0, |s| &mut s.top_p,
            "Choose among the likeliest tokens that together have this probability \
             (1 = all; heeded when temperature is above 0)"),
        row(Playing, ("top-k", "Top k"), 0..=u32::MAX, |s| &mut s.top_k,
            "Choose among this many of the likeliest tokens \
             (0 = all; heeded when temperature is above 0)"),
        row(Playing, ("min-p", "Min p"), 0.0..=1.0, |s| &mut s.min_p,
            "Choose among tokens at least so likely as this share of the likeliest \
             (0 = all; heeded when temperature is above 0)"),
        row(Playing, ("repetition-penalty", "Repetition penalty"), 0.1..=10.0,
            |s| &mut s.repetition_penalty,
            "Divides the score of tokens that were used before (1 = off)"),
        row(Playing, ("seed", "Seed"), 0..=u64::MAX, |s| &mut s.seed,
            "Start of the random choices of each caption (heeded when temperature is above 0)"),
        row(Playing, ("stop-strings", "Stop strings"), (), |s| &mut s.stop_strings,
            "Strings, separated by |, each of which ends a caption where it comes up, and is no \
             part of it (null = none)"),
        row(Playing, ("choices", "Choices"), (), |s| &mut s.interval_prompt.choices,
            "What a caption is one of, separated by |, as in yes|no; with its probability in the \
             caption's fields. describe-now is not limited to it (null = anything)"),
        row(Ready, ("mode", "Mode"), (), |s| &mut s.mode,
            "Whether a frame waits for its caption (recorded) or captions come when they are \
             ready (live)"),
        row(Playing, ("interval", "Interval"), (), |s| &mut s.sampler.interval,
            "Stream time in nanoseconds from one described frame to the next \
             (0 = every frame if recorded, whenever the model is idle if live)"),
        row(Playing, ("frames", "Frames"), 1..=64, |s| &mut s.sampler.frames,
            "Describe so many frames together, as a clip, in the way of SmolVLM2's video prompt: \
             spread evenly over interval, or with interval 0 in a row. The caption comes with the \
             last of them. Takes as many times as long as one; a clip is not cut into tiles"),
        row(Playing, ("every-nth", "Every nth"), 1..=u32::MAX, |s| &mut s.sampler.every_nth,
            "Of the frames or clips that interval chooses, describe every nth"),
        row(Playing, ("scene-threshold", "Scene threshold"), 0.0..=1.0,
            |s| &mut s.sampler.scene_threshold,
            "Do not describe a frame whose picture differs less than this from the last one \
             described: mean absolute difference of 16x16 grey cells, 1 = black to white; \
             about 0.02 tells a cut from noise. After 30 s a frame is described anyway (0 = off)"),
        row(Playing, ("expire", "Expire"), (), |s| &mut s.expire,
            "Stream time in nanoseconds for which a caption stays current if no other comes and \
             the picture is not seen to be unchanged (0 = 30 s, or two intervals where that is more)"),
        row(Ready, ("merge-captions", "Merge captions"), (), |s| &mut s.merge_captions,
            "On the text pad, identical captions in a row become one cue, which ends where the next \
             caption starts, after 5 minutes at the latest. It is pushed when it has ended, behind the \
             video: for files"),
        row(Playing, ("detail-prompt", "Detail prompt"), (), |s| &mut s.detail.prompt,
            "Question that describe-now asks when it is given none"),
        row(Playing, ("detail-max-tokens", "Detail maximum tokens"), 1..=4096,
            |s| &mut s.detail.max_tokens,
            "Length in tokens at which a caption of describe-now is cut off"),
        row(Playing, ("detail-image-splitting", "Detail image splitting"), (),
            |s| &mut s.detail.image_splitting,
            "Whether the frame that describe-now asks about is cut into tiles, as with image-splitting"),
        row(Playing, ("drain-timeout", "Drain timeout"), (), |s| &mut s.drain_timeout,
            "Nanoseconds that EOS waits for captions under way (0 = not at all)"),
        row(Playing, ("post-messages", "Post messages"), (), |s| &mut s.post_messages,
            "Post each caption on the bus, as an element message named vlmnarrate"),
        row(Playing, ("post-repeated", "Post repeated captions"), (), |s| &mut s.post_repeated,
            "Post a message for a caption that says what the current one says, too; it has repeated \
             set. An answer to describe-now is posted in any case"),
        row(Playing, ("attach-meta", "Attach meta"), (), |s| &mut s.attach_meta,
            "Attach the current caption to every buffer, as a custom meta VlmNarrateMeta"),
        row(Playing, ("partial-captions", "Partial captions"), (), |s| &mut s.partial_captions,
            "Post a message at each token too, with the text so far and partial set"),
    ]
}

/// New ParamSpecs of all properties of the element.
pub(crate) fn specs() -> Vec<glib::ParamSpec> {
    let caption = glib::ParamSpecString::builder("caption")
        .nick("Caption")
        .blurb(
            "The current caption (null = none yet, or the last has expired); \
                 notifies of each change",
        )
        .read_only()
        .build();
    let stats = glib::ParamSpecBoxed::builder::<gst::Structure>("stats")
        .nick("Statistics")
        .blurb(
            "The device that the model runs on, its device-name and its device-memory in bytes \
             (empty and 0 while none is loaded); counts since the element started: frames, \
             sampled, unchanged, dropped, captions, errors; of the last 256 captions, the 50th and 95th percentile in \
             nanoseconds of each stage, as in queue-p50, for queue, preprocess, vision, \
             prefill, decode and total; tokens-per-second while decoding",
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
