//! The virtual functions of the element.

use std::sync::{Arc, LazyLock, Mutex};

use gst::{glib, prelude::*, subclass::prelude::*};
use gst_base::{prelude::*, subclass::prelude::*};

use crate::{
    element::{
        caption_state::CaptionState,
        model::{LoadedModel, Loader},
        phase::Phase,
        requests::RequestQueue,
        settings::{PROPERTIES, Settings, specs},
        stats::Stats,
        stream::Stream,
    },
    log::CAT,
    output::text_pad::{self, TextPad},
    properties::{NotUtf8, Property, utf8},
};
use vlmnarrate_engine::{ImageSize, threads::TimedJoinHandle};

/// Name of the signal and of the custom event.
const DESCRIBE_NOW: &str = "describe-now";
const DESCRIBE_NOW_EVENT: &str = "vlmnarrate-describe-now";

/// The state of the element.
///
/// No two of the locks are held at the same time, and none while anything is pushed, posted or waited for.
#[derive(Default)]
pub struct VlmNarrate {
    pub(crate) settings: Mutex<Settings>,
    pub(crate) loader: Mutex<Loader>,
    /// From READY up.
    pub(crate) model: Mutex<Option<Arc<LoadedModel>>>,
    /// A worker that had not ended in time when it was closed.
    pub(crate) closing_worker: Mutex<Option<TimedJoinHandle>>,
    pub(crate) captions: Mutex<CaptionState>,
    pub(crate) requests: RequestQueue,
    pub(crate) stats: Stats,
    pub(crate) stream: Stream,
    pub(crate) text: TextPad,
    /// The bin that the element is a part of.
    pub(crate) bin: Mutex<glib::WeakRef<gst::Object>>,
    pub(crate) phase: Phase,
}

#[glib::object_subclass]
impl ObjectSubclass for VlmNarrate {
    const NAME: &'static str = "GstVlmNarrate";
    type Type = super::VlmNarrate;
    type ParentType = gst_base::BaseTransform;
}

impl ObjectImpl for VlmNarrate {
    fn properties() -> &'static [glib::ParamSpec] {
        static SPECS: LazyLock<Vec<glib::ParamSpec>> = LazyLock::new(specs);
        &SPECS
    }

    fn set_property(&self, _id: usize, value: &glib::Value, spec: &glib::ParamSpec) {
        if spec.name() == "image-size"
            && let Ok(side) = value.get()
            && let Err(error) = self.check_image_size(side)
        {
            self.warn_of_setting(error);
            return;
        }
        if let Some(property) = Property::find(&PROPERTIES, spec.name()) {
            let set = property.set(&mut self.settings.lock().unwrap(), value);
            if let Err(error) = set {
                self.warn_of_setting(format_args!(
                    "{}: {error}; the property keeps its value",
                    spec.name()
                ));
            }
        }
    }

    fn property(&self, _id: usize, spec: &glib::ParamSpec) -> glib::Value {
        match Property::find(&PROPERTIES, spec.name()) {
            Some(property) => property.get(&mut self.settings.lock().unwrap()),
            None if spec.name() == "stats" => {
                let model = self.model();
                let engine = model.as_ref().and_then(|model| model.worker.info());
                let engine = engine.cloned().unwrap_or_default();
                let chosen = self.settings.lock().unwrap().image_size;
                let size = model.as_ref().and_then(|model| model.picture_size(chosen));
                let pixels = size.map_or(chosen, ImageSize::pixels);
                self.stats.structure(&engine, pixels).to_value()
            }
            None => self
                .current_caption()
                .map(|caption| caption.text.clone())
                .to_value(),
        }
    }

    fn constructed(&self) {
        self.parent_constructed();
        let element = self.obj().downgrade();
        let queries = gst::PadProbeType::QUERY_DOWNSTREAM | gst::PadProbeType::PUSH;
        self.obj().src_pad().add_probe(queries, move |_, info| {
            let deadlocks = element
                .upgrade()
                .is_some_and(|e| e.imp().would_deadlock(info));
            match deadlocks {
                true => gst::PadProbeReturn::Drop,
                false => gst::PadProbeReturn::Ok,
            }
        });
    }

    fn signals() -> &'static [glib::subclass::Signal] {
        static SIGNALS: LazyLock<Vec<glib::subclass::Signal>> =
            LazyLock::new(|| vec![describe_now_signal(|element| element.get().ok())]);
        &SIGNALS
    }
}

impl GstObjectImpl for VlmNarrate {}

impl ElementImpl for VlmNarrate {
    fn metadata() -> Option<&'static gst::subclass::ElementMetadata> {
        static METADATA: LazyLock<gst::subclass::ElementMetadata> = LazyLock::new(|| {
            gst::subclass::ElementMetadata::new(
                "VLM Video Narrator",
                "Filter/Analyzer/Video",
                "Describes video frames in words with a vision language model (SmolVLM)",
                "The gst-plugin-vlmnarrate developers",
            )
        });
        Some(&METADATA)
    }

    fn pad_templates() -> &'static [gst::PadTemplate] {
        static TEMPLATES: LazyLock<Vec<gst::PadTemplate>> = LazyLock::new(pad_templates);
        &TEMPLATES
    }

    fn change_state(
        &self,
        transition: gst::StateChange,
    ) -> Result<gst::StateChangeSuccess, gst::StateChangeError> {
        match transition {
            gst::StateChange::NullToReady => self.load()?,
            gst::StateChange::ReadyToPaused => {
                self.reload_if_changed()?;
                self.start_narrating();
            }
            // Before the pads are deactivated, which takes the streaming thread's lock.
            gst::StateChange::PausedToReady => self.stop_narrating(),
            gst::StateChange::ReadyToNull => {
                self.unload();
                self.requests.clear();
            }
            _ => (),
        }
        self.parent_change_state(transition).inspect_err(|_| {
            if transition == gst::StateChange::NullToReady {
                self.unload();
            }
        })
    }

    fn request_new_pad(
        &self,
        template: &gst::PadTemplate,
        _name: Option<&str>,
        _caps: Option<&gst::Caps>,
    ) -> Option<gst::Pad> {
        let pad = gst::Pad::builder_from_template(template)
            .name(text_pad::NAME)
            .query_function(|pad, parent, query| {
                Self::catch_panic_pad_function(
                    parent,
                    || false,
                    |this| {
                        this.may_query(query)
                            && gst::Pad::query_default(pad, Some(&*this.obj()), query)
                    },
                )
            })
            .event_function(|pad, parent, event| {
                Self::catch_panic_pad_function(
                    parent,
                    || false,
                    |this| this.text_src_event(pad, event),
                )
            })
            .build();
        pad.set_active(true).ok()?;
        if !self.text.add(&pad, self.obj().src_pad()) {
            gst::warning!(CAT, imp = self, "There is already a text pad");
            return None;
        }
        if let Err(error) = self.obj().add_pad(&pad) {
            gst::warning!(CAT, imp = self, "Can't add a text pad: {error}");
            self.text.remove(&pad);
            return None;
        }
        Some(pad)
    }

    fn release_pad(&self, pad: &gst::Pad) {
        // Before the deactivation, so that the streaming thread does not take it for a flush.
        self.text.remove(pad);
        let _ = pad.set_active(false);
        let _ = self.obj().remove_pad(pad);
    }
}

impl BaseTransformImpl for VlmNarrate {
    const MODE: gst_base::subclass::BaseTransformMode =
        gst_base::subclass::BaseTransformMode::AlwaysInPlace;
    // Buffers in passthrough mode can't get metas.
    const PASSTHROUGH_ON_SAME_CAPS: bool = false;
    const TRANSFORM_IP_ON_PASSTHROUGH: bool = false;

    fn stop(&self) -> Result<(), gst::ErrorMessage> {
        self.stream.reset();
        self.text.reset();
        Ok(())
    }

    fn set_caps(&self, incaps: &gst::Caps, _outcaps: &gst::Caps) -> Result<(), gst::LoggableError> {
        let info = gst_video::VideoInfo::from_caps(incaps)
            .map_err(|_| gst::loggable_error!(CAT, "Not raw video: {incaps}"))?;
        self.stream.set_info(info);
        Ok(())
    }

    fn transform_ip(
        &self,
        buffer: &mut gst::BufferRef,
    ) -> Result<gst::FlowSuccess, gst::FlowError> {
        self.frame(buffer)
    }

    fn sink_event(&self, event: gst::Event) -> bool {
        use gst::EventView;
        if is_describe_now(&event) {
            return self.on_describe_now_event(&event);
        }
        match event.view() {
            EventView::StreamStart(stream_start) => {
                self.finish_recorded();
                // A caption of the last stream must not come with pictures of the next.
                self.cancel();
                self.stream.start_over();
                self.text.stream_start(stream_start, &self.element_name());
            }
            EventView::Segment(segment) if self.stream.is_new_segment(segment.segment()) => {
                self.finish_recorded();
                self.stream.set_segment(segment.segment());
                self.text.segment(segment);
            }
            EventView::Gap(gap) => {
                let (position, duration) = gap.get();
                if let Some(timing) = self.stream.gap(position, duration) {
                    self.text.gap(timing);
                }
            }
            EventView::FlushStart(_) => {
                self.flush_start();
                self.text.forward(&event);
            }
            EventView::FlushStop(_) => {
                self.flush_stop();
                self.stream.start_over();
                self.text.forward(&event);
            }
            EventView::SegmentDone(_) => {
                self.drain();
                self.text.forward(&event);
            }
            EventView::Eos(_) => {
                self.drain();
                self.warn_of_unanswered_requests();
                let interval = self.settings.lock().unwrap().sampler.interval;
                self.text
                    .eos(&event, self.current_caption().as_ref(), interval);
            }
            _ => (),
        }
        self.parent_sink_event(event)
    }

    fn before_transform(&self, buffer: &gst::BufferRef) {
        if self.obj().has_active_control_bindings()
            && let Some(time) = self.stream.stream_time(buffer.pts())
        {
            // The controller logs a failure.
            let _ = self.obj().sync_values(time);
        }
        self.parent_before_transform(buffer);
    }

    fn query(&self, direction: gst::PadDirection, query: &mut gst::QueryRef) -> bool {
        let may_query = direction == gst::PadDirection::Sink || self.may_query(query);
        may_query && BaseTransformImplExt::parent_query(self, direction, query)
    }

    fn src_event(&self, event: gst::Event) -> bool {
        if is_describe_now(&event) {
            return self.on_describe_now_event(&event);
        }
        self.parent_src_event(event)
    }
}

impl VlmNarrate {
    /// Handles events from downstream of the text pad.
    fn text_src_event(&self, pad: &gst::Pad, event: gst::Event) -> bool {
        if is_describe_now(&event) {
            return self.on_describe_now_event(&event);
        }
        match event.type_() {
            // The lateness of text says nothing about the video.
            gst::EventType::Qos => true,
            _ => gst::Pad::event_default(pad, Some(&*self.obj()), event),
        }
    }

    /// Requests a detailed caption of the next frame. Returns the id of the request.
    pub(crate) fn describe_now(
        &self,
        prompt: Option<String>,
        max_tokens: Option<u32>,
    ) -> Option<u32> {
        if self.model().is_none() {
            gst::warning!(CAT, imp = self, "Can't describe a frame in NULL");
            return None;
        }
        let id = self.requests.push(prompt, max_tokens);
        if id.is_none() {
            gst::warning!(CAT, imp = self, "Too many requests are pending");
        }
        id
    }

    /// Posts a WARNING for each request that no frame is left for.
    fn warn_of_unanswered_requests(&self) {
        for id in self.requests.unanswered() {
            gst::element_imp_warning!(
                self,
                gst::StreamError::Failed,
                ("describe-now {id} was not answered: the stream has ended"),
                details: gst::Structure::builder("vlmnarrate-describe-now").field("request-id", id).build()
            );
        }
    }

    /// Whether a query from downstream may go upstream. Decoders that get a POSITION query before they have a segment in
    /// time log a CRITICAL.
    fn may_query(&self, query: &gst::QueryRef) -> bool {
        match query.view() {
            gst::QueryView::Position(position) => {
                position.format() == gst::Format::Bytes || self.stream.is_in_time()
            }
            _ => true,
        }
    }

    /// Whether a query would wait for the thread that it runs on. An ALLOCATION query after a change of the video's size waits
    /// until downstream queues are empty; the muxer that empties them waits for text, which this thread pushes. If the
    /// query fails, upstream allocates by itself.
    fn would_deadlock(&self, info: &gst::PadProbeInfo) -> bool {
        let type_ = info.query().map(|query| query.type_());
        matches!(
            type_,
            Some(gst::QueryType::Allocation | gst::QueryType::Drain)
        ) && self.stats.frames.get() > 0
            && self.text.is_linked()
    }

    fn warn_of_setting(&self, error: impl std::fmt::Display) {
        gst::element_imp_warning!(self, gst::LibraryError::Settings, ("{error}"));
    }

    /// The prompt of a request. Posts a WARNING if it is not UTF-8.
    fn prompt(&self, value: &glib::Value) -> Result<Option<String>, NotUtf8> {
        let refused = |error: &NotUtf8| {
            self.warn_of_setting(format_args!("{DESCRIBE_NOW}: the prompt {error}"));
        };
        utf8(value).inspect_err(refused)
    }

    fn on_describe_now_event(&self, event: &gst::EventRef) -> bool {
        let field = event.structure();
        let prompt = field.and_then(|s| s.value("prompt").ok());
        let prompt = prompt.filter(|value| value.type_() == glib::Type::STRING);
        let Ok(prompt) = prompt.map_or(Ok(None), |value| self.prompt(value)) else {
            return false;
        };
        // gst-launch-1.0 and Python make an int of a number without a type.
        let max_tokens = field.and_then(|s| {
            let signed = || u32::try_from(s.get::<i32>("max-tokens").ok()?).ok();
            s.get::<u32>("max-tokens").ok().or_else(signed)
        });
        self.describe_now(prompt, max_tokens.filter(|max| *max > 0))
            .is_some()
    }
}

/// Pad templates of the element, and of the overlay bin.
pub(crate) fn pad_templates() -> Vec<gst::PadTemplate> {
    use gst::{PadDirection, PadPresence, PadTemplate};
    let mut video = gst_video::VideoCapsBuilder::new().build();
    let overlaid = gst_video::VideoCapsBuilder::new()
        .features([
            gst::CAPS_FEATURE_MEMORY_SYSTEM_MEMORY.as_str(),
            gst_video::CAPS_FEATURE_META_GST_VIDEO_OVERLAY_COMPOSITION.as_str(),
        ])
        .build();
    video.merge(overlaid);
    let text = text_pad::caps();
    [
        ("sink", PadDirection::Sink, PadPresence::Always, &video),
        ("src", PadDirection::Src, PadPresence::Always, &video),
        (
            text_pad::NAME,
            PadDirection::Src,
            PadPresence::Request,
            &text,
        ),
    ]
    .into_iter()
    .filter_map(|(name, direction, presence, caps)| {
        PadTemplate::new(name, direction, presence, caps).ok()
    })
    .collect()
}

/// The action signal.
///
/// Describes the next frame regardless of `interval` and `scene-threshold`. Takes a prompt (null = `detail-prompt`) and
/// a number of tokens (0 = `detail-max-tokens`). Returns the `request-id` of the caption, or 0 if the element is in NULL
/// or too many requests are pending.
pub(crate) fn describe_now_signal(
    narrator: fn(&glib::Value) -> Option<super::VlmNarrate>,
) -> glib::subclass::Signal {
    glib::subclass::Signal::builder(DESCRIBE_NOW)
        .param_types([String::static_type(), u32::static_type()])
        .return_type::<u32>()
        .run_last()
        .action()
        .class_handler(move |values| {
            let [element, prompt, max_tokens] = values else {
                return None;
            };
            let narrator = narrator(element)?;
            let max_tokens = Some(max_tokens.get::<u32>().ok()?).filter(|max| *max > 0);
            let narrator = narrator.imp();
            let id = match narrator.prompt(prompt) {
                Ok(prompt) => narrator.describe_now(prompt, max_tokens),
                Err(_) => None,
            };
            Some(id.unwrap_or(0).to_value())
        })
        .build()
}

fn is_describe_now(event: &gst::EventRef) -> bool {
    event.has_name(DESCRIBE_NOW_EVENT)
}
