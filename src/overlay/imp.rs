//! The virtual functions of the bin, and the pad probe between its two elements.

use std::sync::{Arc, LazyLock, Mutex, MutexGuard};

use gst::{glib, prelude::*, subclass::prelude::*};

use crate::{
    VlmNarrate,
    caption::Caption,
    element,
    output::text_pad::NAME as TEXT_PAD,
    overlay::{
        layout::{self, Layout},
        style::{PROPERTIES, StyleSettings},
    },
    properties::Property,
};

static CAT: LazyLock<gst::DebugCategory> = LazyLock::new(|| {
    gst::DebugCategory::new(
        "vlmnarrateoverlay",
        gst::DebugColorFlags::empty(),
        Some("VLM Video Narrator with text on the video"),
    )
});

/// A bin of the narrator and a `textoverlay`.
///
/// Captions reach `textoverlay` as its property `text`, set between two frames. Its text pad would show a caption no
/// earlier than the end of the one before, and needs a thread of its own.
pub struct VlmNarrateOverlay {
    pub(crate) narrator: VlmNarrate,
    /// `None` if GStreamer's Pango plugin is not installed.
    textoverlay: Option<gst::Element>,
    /// The text pad that was removed from `textoverlay`, which keeps a pointer to it.
    text_sink: Mutex<Option<gst::Pad>>,
    drawing: Mutex<Drawing>,
}

/// State of the drawing. Not locked while anything is pushed or posted.
#[derive(Default)]
struct Drawing {
    style: StyleSettings,
    /// Width and height of the video.
    picture: Option<(u32, u32)>,
    /// Made of the two above; `None` after one of them has changed.
    layout: Option<Layout>,
    /// The caption that textoverlay shows.
    drawn: Option<Arc<Caption>>,
}

#[glib::object_subclass]
impl ObjectSubclass for VlmNarrateOverlay {
    const NAME: &'static str = "GstVlmNarrateOverlay";
    type Type = super::VlmNarrateOverlay;
    type ParentType = gst::Bin;

    fn new() -> Self {
        Self {
            narrator: glib::Object::builder().property("name", "narrator").build(),
            textoverlay: gst::ElementFactory::make("textoverlay")
                .name("textoverlay")
                .property("auto-resize", false)
                .property("draw-shadow", false)
                .property("wait-text", false)
                .property_from_str("scale-mode", "par")
                .build()
                .ok(),
            text_sink: Mutex::default(),
            drawing: Mutex::default(),
        }
    }
}

impl ObjectImpl for VlmNarrateOverlay {
    fn properties() -> &'static [glib::ParamSpec] {
        static SPECS: LazyLock<Vec<glib::ParamSpec>> = LazyLock::new(|| {
            let style = PROPERTIES.iter().map(|property| property.spec.clone());
            element::specs().into_iter().chain(style).collect()
        });
        &SPECS
    }

    fn set_property(&self, _id: usize, value: &glib::Value, spec: &glib::ParamSpec) {
        let Some(property) = Property::find(&PROPERTIES, spec.name()) else {
            self.narrator.set_property_from_value(spec.name(), value);
            return;
        };
        let mut style = self.drawing().style.clone();
        if let Err(error) = property.set(&mut style, value) {
            gst::element_imp_warning!(
                self,
                gst::LibraryError::Settings,
                ("{}: {error}; the property keeps its value", spec.name())
            );
            return;
        }
        // In NULL any font is accepted: fonts may still be installed.
        if spec.name() == "font-desc"
            && self.obj().current_state() > gst::State::Null
            && let Err(error) = layout::check_font(&style)
        {
            gst::element_imp_warning!(self, gst::ResourceError::Settings, ("{error}"));
            return;
        }
        let mut drawing = self.drawing();
        drawing.style = style;
        drawing.layout = None;
    }

    fn property(&self, _id: usize, spec: &glib::ParamSpec) -> glib::Value {
        match Property::find(&PROPERTIES, spec.name()) {
            Some(property) => property.get(&mut self.drawing().style),
            None => self.narrator.property_value(spec.name()),
        }
    }

    fn signals() -> &'static [glib::subclass::Signal] {
        static SIGNALS: LazyLock<Vec<glib::subclass::Signal>> = LazyLock::new(|| {
            vec![element::describe_now_signal(|element| {
                let bin = element.get::<super::VlmNarrateOverlay>().ok()?;
                Some(bin.narrator().clone())
            })]
        });
        &SIGNALS
    }

    fn constructed(&self) {
        self.parent_constructed();
        if let Err(error) = self.build() {
            gst::error!(CAT, imp = self, "Can't build the bin: {error}");
        }
        self.narrator.set_bin(&*self.obj());
        let bin = self.obj().downgrade();
        self.narrator.connect_notify(Some("caption"), move |_, _| {
            if let Some(bin) = bin.upgrade() {
                bin.notify("caption");
            }
        });
    }
}

impl GstObjectImpl for VlmNarrateOverlay {}

impl ElementImpl for VlmNarrateOverlay {
    fn metadata() -> Option<&'static gst::subclass::ElementMetadata> {
        static METADATA: LazyLock<gst::subclass::ElementMetadata> = LazyLock::new(|| {
            gst::subclass::ElementMetadata::new(
                "VLM Video Narrator Overlay",
                "Filter/Editor/Video",
                "Describes video frames in words with a vision language model (SmolVLM) and draws \
                 the words on the video",
                "The gst-plugin-vlmnarrate developers",
            )
        });
        Some(&METADATA)
    }

    fn pad_templates() -> &'static [gst::PadTemplate] {
        static TEMPLATES: LazyLock<Vec<gst::PadTemplate>> = LazyLock::new(element::pad_templates);
        &TEMPLATES
    }

    fn change_state(
        &self,
        transition: gst::StateChange,
    ) -> Result<gst::StateChangeSuccess, gst::StateChangeError> {
        if transition == gst::StateChange::NullToReady {
            self.check()?;
        }
        let success = self.parent_change_state(transition)?;
        if transition == gst::StateChange::PausedToReady {
            self.reset();
        }
        Ok(success)
    }

    fn request_new_pad(
        &self,
        template: &gst::PadTemplate,
        _name: Option<&str>,
        _caps: Option<&gst::Caps>,
    ) -> Option<gst::Pad> {
        if self.narrator.static_pad(TEXT_PAD).is_some() {
            gst::warning!(CAT, imp = self, "There is already a text pad");
            return None;
        }
        let text = self.narrator.request_pad_simple(TEXT_PAD)?;
        match self.add_ghost(template, &text) {
            Ok(pad) => Some(pad),
            Err(error) => {
                gst::warning!(CAT, imp = self, "Can't add a text pad: {error}");
                self.narrator.release_request_pad(&text);
                None
            }
        }
    }

    fn release_pad(&self, pad: &gst::Pad) {
        if let Some(text) = self.narrator.static_pad(TEXT_PAD) {
            self.narrator.release_request_pad(&text);
        }
        let _ = pad.set_active(false);
        let _ = self.obj().remove_pad(pad);
    }
}

impl BinImpl for VlmNarrateOverlay {}

impl VlmNarrateOverlay {
    fn drawing(&self) -> MutexGuard<'_, Drawing> {
        self.drawing.lock().unwrap()
    }

    fn add_ghost(
        &self,
        template: &gst::PadTemplate,
        text: &gst::Pad,
    ) -> Result<gst::Pad, glib::BoolError> {
        let pad = gst::GhostPad::builder_from_template_with_target(template, text)?;
        let pad = pad.name(TEXT_PAD).build();
        pad.set_active(true)?;
        self.obj().add_pad(&pad)?;
        Ok(pad.upcast())
    }

    fn build(&self) -> Result<(), glib::BoolError> {
        let bin = self.obj();
        bin.add(&self.narrator)?;
        let last = match &self.textoverlay {
            Some(textoverlay) => {
                bin.add(textoverlay)?;
                // Without this pad the bin has no unlinked pad, which parsers of launch lines would ghost.
                if let Some(pad) = textoverlay.static_pad("text_sink") {
                    textoverlay.remove_pad(&pad)?;
                    *self.text_sink.lock().unwrap() = Some(pad);
                }
                self.narrator
                    .link_pads(Some("src"), textoverlay, Some("video_sink"))?;
                textoverlay
            }
            None => self.narrator.upcast_ref::<gst::Element>(),
        };
        for (name, element) in [("sink", self.narrator.upcast_ref()), ("src", last)] {
            let pad = element.static_pad(name);
            let pad = pad.ok_or_else(|| glib::bool_error!("no pad {name}"))?;
            let template = bin.pad_template(name);
            let template = template.ok_or_else(|| glib::bool_error!("no template {name}"))?;
            let ghost = gst::GhostPad::builder_from_template_with_target(&template, &pad)?.build();
            bin.add_pad(&ghost)?;
        }
        // Controlled properties change before the frame is described.
        if let Some(pad) = self.narrator.static_pad("sink") {
            let bin = bin.downgrade();
            pad.add_probe(gst::PadProbeType::BUFFER, move |pad, info| {
                if let (Some(bin), Some(buffer)) = (bin.upgrade(), info.buffer())
                    && bin.has_active_control_bindings()
                    && let Some(segment) = pad.sticky_event::<gst::event::Segment>(0)
                    && let Some(segment) = segment.segment().downcast_ref::<gst::ClockTime>()
                    && let Some(time) = segment.to_stream_time(buffer.pts())
                {
                    let _ = bin.sync_values(time);
                }
                gst::PadProbeReturn::Ok
            });
        }
        if let Some(pad) = self.narrator.static_pad("src") {
            let bin = bin.downgrade();
            let mask = gst::PadProbeType::BUFFER | gst::PadProbeType::EVENT_DOWNSTREAM;
            pad.add_probe(mask, move |_, info| match bin.upgrade() {
                Some(bin) => bin.imp().on_probe(info),
                None => gst::PadProbeReturn::Ok,
            });
        }
        Ok(())
    }

    /// Checks what `textoverlay` needs, which would otherwise fail silently with the first caption.
    fn check(&self) -> Result<(), gst::StateChangeError> {
        if self.textoverlay.is_none() {
            gst::element_imp_error!(
                self,
                gst::CoreError::MissingPlugin,
                ("The element textoverlay is missing. Install GStreamer's Pango plugin; on Debian, that is \
                  the package gstreamer1.0-x")
            );
            return Err(gst::StateChangeError);
        }
        let style = self.drawing().style.clone();
        layout::check_font(&style).map_err(|error| {
            gst::element_imp_error!(self, gst::ResourceError::Settings, ("{error}"));
            gst::StateChangeError
        })
    }

    /// Handles caps and frames between narrator and textoverlay, on the streaming thread.
    fn on_probe(&self, info: &mut gst::PadProbeInfo) -> gst::PadProbeReturn {
        match &info.data {
            Some(gst::PadProbeData::Event(event)) => {
                if let gst::EventView::Caps(caps) = event.view()
                    && let Ok(video) = gst_video::VideoInfo::from_caps(caps.caps())
                {
                    let mut drawing = self.drawing();
                    drawing.picture = Some((video.width(), video.height()));
                    drawing.layout = None;
                }
                gst::PadProbeReturn::Ok
            }
            Some(gst::PadProbeData::Buffer(buffer)) => {
                self.draw();
                match buffer.pts() {
                    Some(_) => gst::PadProbeReturn::Ok,
                    None => self.bypass_textoverlay(info),
                }
            }
            _ => gst::PadProbeReturn::Ok,
        }
    }

    /// Pushes a frame without a timestamp past textoverlay, which would drop it.
    fn bypass_textoverlay(&self, info: &mut gst::PadProbeInfo) -> gst::PadProbeReturn {
        let pad = self
            .textoverlay
            .as_ref()
            .and_then(|textoverlay| textoverlay.static_pad("src"));
        match (pad, info.data.take()) {
            (Some(pad), Some(gst::PadProbeData::Buffer(buffer))) => {
                info.flow_res = pad.push(buffer);
                gst::PadProbeReturn::Handled
            }
            (_, data) => {
                info.data = data;
                gst::PadProbeReturn::Ok
            }
        }
    }

    /// Updates the text of textoverlay for the frame that comes.
    fn draw(&self) {
        let Some(textoverlay) = &self.textoverlay else {
            return;
        };
        let caption = self.narrator.caption_to_draw();
        let mut drawing = self.drawing();
        let is_drawn = match (&drawing.drawn, &caption) {
            (Some(drawn), Some(caption)) => Arc::ptr_eq(drawn, caption),
            (None, None) => true,
            _ => false,
        };
        if is_drawn && drawing.layout.is_some() {
            return;
        }
        let Some((width, height)) = drawing.picture else {
            return;
        };
        let Drawing { style, layout, .. } = &mut *drawing;
        let new_style = layout.is_none().then(|| style.clone());
        let layout = layout.get_or_insert_with(|| Layout::new(style, width, height));
        let text = caption.as_ref().map(|caption| layout.markup(&caption.text));
        let new_style = new_style.map(|style| (style, layout.font_desc()));
        drawing.drawn = caption;
        drop(drawing);

        if let Some((style, font_desc)) = new_style {
            let nick = |value: glib::Value| {
                let value =
                    glib::EnumValue::from_value(&value).map(|(_, value)| value.nick().to_owned());
                value.unwrap_or_default()
            };
            textoverlay.set_property("font-desc", font_desc);
            textoverlay.set_property("color", style.color);
            textoverlay.set_property("silent", style.silent);
            textoverlay.set_property_from_str("valignment", &nick(style.valignment.to_value()));
            textoverlay.set_property_from_str("halignment", &nick(style.halignment.to_value()));
            textoverlay.set_property("xpad", (width / 20) as i32);
            textoverlay.set_property("ypad", (height / 20) as i32);
        }
        textoverlay.set_property("text", text.unwrap_or_default());
    }

    /// Forgets the stream.
    fn reset(&self) {
        let mut drawing = self.drawing();
        drawing.layout = None;
        drawing.picture = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_pad_that_can_not_be_shown_leaves_none_behind() {
        gst::init().unwrap();
        let bin = glib::Object::new::<crate::VlmNarrateOverlay>();
        let caps = gst::Caps::new_any();
        let (direction, presence) = (gst::PadDirection::Sink, gst::PadPresence::Request);
        let foreign = gst::PadTemplate::new("text_%u", direction, presence, &caps).unwrap();
        assert!(bin.imp().request_new_pad(&foreign, None, None).is_none());
        assert!(bin.narrator().static_pad(TEXT_PAD).is_none());
        assert!(bin.request_pad_simple(TEXT_PAD).is_some());
    }
}
