//! A caption as message, meta and text.
//!
//! Message and meta have the same fields. In Rust, [`Caption::try_from`] reads either:
//!
//! ```no_run
//! use gstvlmnarrate::Caption;
//!
//! # fn on(message: &gst::MessageRef, buffer: &gst::BufferRef) {
//! if let Some(Ok(caption)) = message.structure().map(Caption::try_from) {
//!     println!("{}", caption.text);
//! }
//! if let Ok(caption) = Caption::try_from(buffer) {
//!     println!("{}", caption.text);
//! }
//! # }
//! ```

use std::{ops::Range, time::Duration};

use gst::{ClockTime, glib};

use crate::caption::{Caption, Cost, FrameStamp};

/// Name of the element message.
pub const MESSAGE_NAME: &str = "vlmnarrate";

/// Name of the custom meta.
pub const META_NAME: &str = "VlmNarrateMeta";

/// Why a structure or a buffer can't be read as a caption.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotACaption {
    /// The structure has another name, given here.
    #[error("the structure is named {0}")]
    Name(String),
    /// The field of this name is missing or malformed.
    #[error("field {0} is missing or malformed")]
    Field(&'static str),
    /// The buffer has no caption of the element.
    #[error("the buffer has no {META_NAME}")]
    NoMeta,
    /// The buffer is not timed text.
    #[error("the buffer has no timestamp or duration, or is not UTF-8 text")]
    NotText,
}

/// Registers the custom meta, once per process.
pub(crate) fn register_meta() {
    if !gst::meta::CustomMeta::is_registered(META_NAME) {
        // No tags: a caption is still true after scaling and conversion.
        gst::meta::CustomMeta::register_simple(META_NAME);
    }
}

/// Field of the meta with the captions of several elements, by the names of the elements.
const CAPTIONS: &str = "captions";

/// Attaches the caption to a buffer. Replaces one of the same element; that of another element stays in the field
/// `captions`.
pub(crate) fn attach(
    caption: &Caption,
    buffer: &mut gst::BufferRef,
) -> Result<(), glib::BoolError> {
    let Ok(mut meta) = gst::meta::CustomMeta::from_mut_buffer(buffer, META_NAME) else {
        let mut meta = gst::meta::CustomMeta::add(buffer, META_NAME)?;
        write(caption, meta.mut_structure());
        return Ok(());
    };
    let s = meta.mut_structure();
    if let Some(mut captions) = captions_of_others(s, &caption.element) {
        let mut own = gst::Structure::new_empty(META_NAME);
        write(caption, &mut own);
        captions.set(&caption.element, own);
        s.set(CAPTIONS, captions);
    }
    write(caption, s);
    Ok(())
}

/// Removes the caption of an element from a buffer, if it has one.
pub(crate) fn detach(element: impl FnOnce() -> String, buffer: &mut gst::BufferRef) {
    let Ok(mut meta) = gst::meta::CustomMeta::from_mut_buffer(buffer, META_NAME) else {
        return;
    };
    let (s, element) = (meta.mut_structure(), element());
    let Some(mut captions) = captions_of_others(s, &element) else {
        // There is no caption of another element.
        let _ = meta.remove();
        return;
    };
    let others: Vec<_> = captions.fields().map(|name| name.to_string()).collect();
    if s.get::<&str>("element") == Ok(&element)
        && let Some(last) = others.last()
        && let Ok(caption) = captions.get::<gst::Structure>(last)
    {
        for (name, value) in caption.iter() {
            s.set_value(name, value.clone());
        }
    }
    match others.len() {
        1 => s.remove_field(CAPTIONS),
        _ => s.set(
            CAPTIONS,
            std::mem::replace(&mut captions, gst::Structure::new_empty(CAPTIONS)),
        ),
    }
}

/// The captions of other elements in a meta, by the names of the elements. `None` if there are none.
fn captions_of_others(s: &gst::StructureRef, element: &str) -> Option<gst::Structure> {
    let mut captions = s.get::<gst::Structure>(CAPTIONS).unwrap_or_else(|_| {
        let mut captions = gst::Structure::new_empty(CAPTIONS);
        if let Ok(only) = s.get::<&str>("element") {
            captions.set(only, s.to_owned());
        }
        captions
    });
    captions.remove_field(element);
    (captions.n_fields() > 0).then_some(captions)
}

impl Caption {
    /// Reads the caption that the element of this name attached to a buffer.
    ///
    /// If several elements describe one stream, [`Caption::try_from`] returns the caption of the last one.
    ///
    /// # Errors
    ///
    /// [`NotACaption::NoMeta`] if that element attached none.
    pub fn from_buffer(buffer: &gst::BufferRef, element: &str) -> Result<Self, NotACaption> {
        let meta = gst::meta::CustomMeta::from_buffer(buffer, META_NAME)
            .map_err(|_| NotACaption::NoMeta)?;
        let s = meta.structure();
        let captions = s.get::<gst::Structure>(CAPTIONS);
        if let Ok(caption) = captions.and_then(|captions| captions.get::<gst::Structure>(element)) {
            return read(&caption);
        }
        match s.get::<&str>("element") {
            Ok(only) if only == element => read(s),
            _ => Err(NotACaption::NoMeta),
        }
    }
}

fn write(caption: &Caption, s: &mut gst::StructureRef) {
    let Caption { stamp, cost, .. } = caption;
    s.set("timestamp", stamp.timestamp);
    s.set("stream-time", stamp.stream_time);
    s.set("running-time", stamp.running_time);
    s.set("duration", stamp.duration);
    s.set("first-timestamp", stamp.first_timestamp);
    s.set("frames", stamp.frames);
    s.set("arrival-time", caption.arrival_time);
    s.set("text", &caption.text);
    s.set("element", &caption.element);
    s.set("prompt", &caption.prompt);
    s.set("model", &caption.model);
    s.set("revision", &caption.revision);
    s.set("device", &caption.device);
    s.set("device-name", &caption.device_name);
    s.set("device-memory", caption.device_memory);
    s.set("sequence", caption.sequence);
    s.set("frame", stamp.frame);
    s.set("tokens", caption.tokens);
    if let Some(probability) = caption.probability {
        s.set("probability", probability);
    }
    s.set("truncated", caption.truncated);
    s.set("repeated", caption.repeated);
    s.set("partial", caption.partial);
    s.set("trigger", stamp.trigger.as_str());
    s.set("request-id", stamp.request_id);
    s.set("latency-ms", millis(cost.latency));
    s.set("preprocess-ms", millis(cost.preprocess));
    s.set("vision-ms", millis(cost.vision));
    s.set("prefill-ms", millis(cost.prefill));
    s.set("decode-ms", millis(cost.decode));
}

fn read(s: &gst::StructureRef) -> Result<Caption, NotACaption> {
    let duration = |name| {
        Duration::try_from_secs_f64(field::<f64>(s, name)? / 1e3)
            .map_err(|_| NotACaption::Field(name))
    };
    Ok(Caption {
        stamp: FrameStamp {
            timestamp: field(s, "timestamp")?,
            stream_time: field(s, "stream-time")?,
            running_time: field(s, "running-time")?,
            duration: field(s, "duration")?,
            first_timestamp: field(s, "first-timestamp")?,
            frames: field(s, "frames")?,
            frame: field(s, "frame")?,
            trigger: field::<&str>(s, "trigger")?
                .parse()
                .map_err(|_| NotACaption::Field("trigger"))?,
            request_id: field(s, "request-id")?,
        },
        arrival_time: field(s, "arrival-time")?,
        text: field(s, "text")?,
        element: field(s, "element")?,
        prompt: field(s, "prompt")?,
        model: field(s, "model")?,
        revision: field(s, "revision")?,
        device: field(s, "device")?,
        device_name: field(s, "device-name")?,
        device_memory: field(s, "device-memory")?,
        sequence: field(s, "sequence")?,
        tokens: field(s, "tokens")?,
        probability: s
            .get_optional("probability")
            .map_err(|_| NotACaption::Field("probability"))?,
        truncated: field(s, "truncated")?,
        repeated: field(s, "repeated")?,
        partial: field(s, "partial")?,
        cost: Cost {
            latency: duration("latency-ms")?,
            preprocess: duration("preprocess-ms")?,
            vision: duration("vision-ms")?,
            prefill: duration("prefill-ms")?,
            decode: duration("decode-ms")?,
        },
    })
}

fn field<'s, T: glib::value::FromValue<'s>>(
    s: &'s gst::StructureRef,
    name: &'static str,
) -> Result<T, NotACaption> {
    s.value(name)
        .ok()
        .and_then(|value| value.get().ok())
        .ok_or(NotACaption::Field(name))
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The body of the bus message.
impl From<&Caption> for gst::Structure {
    fn from(caption: &Caption) -> Self {
        let mut structure = gst::Structure::new_empty(MESSAGE_NAME);
        write(caption, &mut structure);
        structure
    }
}

/// From the body of a bus message or of a meta.
impl TryFrom<&gst::StructureRef> for Caption {
    type Error = NotACaption;

    fn try_from(structure: &gst::StructureRef) -> Result<Self, NotACaption> {
        match structure.name().as_str() {
            MESSAGE_NAME | META_NAME => read(structure),
            other => Err(NotACaption::Name(other.to_owned())),
        }
    }
}

/// From a buffer's meta.
impl TryFrom<&gst::BufferRef> for Caption {
    type Error = NotACaption;

    fn try_from(buffer: &gst::BufferRef) -> Result<Self, NotACaption> {
        let meta = gst::meta::CustomMeta::from_buffer(buffer, META_NAME)
            .map_err(|_| NotACaption::NoMeta)?;
        read(meta.structure())
    }
}

/// A cue of the text pad.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextCue {
    /// Plain text, without empty lines.
    pub text: String,
    /// Positions in the stream.
    pub span: Range<ClockTime>,
}

impl TextCue {
    /// A cue with the caption's text, less what subtitle formats can't contain: an empty line ends a cue in WebVTT and
    /// SubRip, and Pango refuses control characters.
    pub fn new(caption: &Caption, span: Range<ClockTime>) -> Self {
        let lines: Vec<_> = lines(&caption.text).collect();
        Self {
            text: lines.join("\n"),
            span,
        }
    }
}

/// Escapes text for Pango markup and WebVTT. Quotes stay as they are, because not all players know `&apos;`.
pub(crate) fn markup(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// The lines of a text that are not empty, without control characters.
pub(crate) fn lines(text: &str) -> impl Iterator<Item = String> {
    let lines = text.lines().map(|line| {
        let line: String = line.chars().filter(|c| !c.is_control()).collect();
        line.trim().to_owned()
    });
    lines.filter(|line| !line.is_empty())
}

impl From<TextCue> for gst::Buffer {
    fn from(cue: TextCue) -> Self {
        let duration = cue.span.end.saturating_sub(cue.span.start);
        let mut buffer = gst::Buffer::from_slice(cue.text.into_bytes());
        let fresh = buffer.make_mut();
        fresh.set_pts(cue.span.start);
        fresh.set_duration(duration);
        buffer
    }
}

impl TryFrom<&gst::BufferRef> for TextCue {
    type Error = NotACaption;

    fn try_from(buffer: &gst::BufferRef) -> Result<Self, NotACaption> {
        let start = buffer.pts().ok_or(NotACaption::NotText)?;
        let duration = buffer.duration().ok_or(NotACaption::NotText)?;
        let bytes = buffer.map_readable().map_err(|_| NotACaption::NotText)?;
        let text = std::str::from_utf8(&bytes).map_err(|_| NotACaption::NotText)?;
        Ok(Self {
            text: text.to_owned(),
            span: start..start.saturating_add(duration),
        })
    }
}
