//! The virtual functions of the bin, and what it does to each frame between its two elements.

use std::sync::{Arc, LazyLock, Mutex, MutexGuard};

use gst::{glib, prelude::*, subclass::prelude::*};

use crate::{
    VlmNarrate,
    caption::Caption,
    element,
    output::text_pad::NAME as TEXT_PAD,
    overlay::{
        layout::{self, Layout},
        look::{Look, PROPERTIES},
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

/// Text reaches textoverlay as its property, between one frame and the next: its text pad would
/// show a caption no earlier than the last has ended, and needs a thread of its own.
pub struct VlmNarrateOverlay {
    pub(crate) narrator: VlmNarrate,
    /// `None` where GStreamer's Pango plugin is not installed.
    textoverlay: Option<gst::Element>,
    /// Of `textoverlay`, which goes on pointing to it.
    text_sink: Mutex<Option<gst::Pad>>,
    drawing: Mutex<Drawing>,
}

/// Never locked while anything is pushed or posted.
#[derive(Default)]
struct Drawing {
    look: Look,
    /// Width and height of the video.
    picture: Option<(u32, u32)>,
    /// Made of the two above; `None` when one has changed.
    layout: Option<Layout>,
    /// What textoverlay shows now.
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
            let look = PROPERTIES.iter().map(|property| property.spec.clone());
            element::specs().into_iter().chain(look).collect()
        });
        &SPECS
    }

    fn set_property(&self, _id: usize, value: &glib::Value, spec: &glib::ParamSpec) {
        let Some(property) = Property::find(&PROPERTIES, spec.name()) else {
            self.narrator.set_property_from_value(spec.name(), value);
            return;
        };
        let mut look = self.drawing().look.clone();
        if let Err(error) = property.set(&mut look, value) {
            gst::element_imp_warning!(
                self,
                gst::LibraryError::Settings,
                ("{}: {error}; it stays as it was", spec.name())
            );
            return;
        }
        // Until READY anything goes: fonts may still be installed.
        if spec.name() == "font-desc"
            && self.obj().current_state() > gst::State::Null
            && let Err(error) = layout::check_font(&look)
        {
            gst::element_imp_warning!(self, gst::ResourceError::Settings, ("{error}"));
            return;
        }
        let mut drawing = self.drawing();
        drawing.look = look;
        drawing.layout = None;
    }

    fn property(&self, _id: usize, spec: &glib::ParamSpec) -> glib::Value {
        match Property::find(&PROPERTIES, spec.name()) {
            Some(property) => property.get(&mut self.drawing().look),
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
            gst::error!(CAT, imp = self, "Can't be put together: {error}");
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
            self.forget();
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
            gst::warning!(CAT, imp = self, "There is a text pad already");
            return None;
        }
        let text = self.narrator.request_pad_simple(TEXT_PAD)?;
        match self.add_ghost(template, &text) {
            Ok(pad) => Some(pad),
            Err(error) => {
                gst::warning!(CAT, imp = self, "No text pad: {error}");
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
                // Text comes as a property. Whoever looks for pads of ours that are not linked, as parsers of
                // launch lines do to make an effect of us, must not find this one.
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
        // Before the frame is described.
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
                Some(bin) => bin.imp().between(info),
                None => gst::PadProbeReturn::Ok,
            });
        }
        Ok(())
    }

    /// What would otherwise show as missing or other text only when hours have been narrated.
    fn check(&self) -> Result<(), gst::StateChangeError> {
        if self.textoverlay.is_none() {
            gst::element_imp_error!(
                self,
                gst::CoreError::MissingPlugin,
                ("There is no element textoverlay: install GStreamer's Pango plugin, on Debian the \
                  package gstreamer1.0-x")
            );
            return Err(gst::StateChangeError);
        }
        let look = self.drawing().look.clone();
        layout::check_font(&look).map_err(|error| {
            gst::element_imp_error!(self, gst::ResourceError::Settings, ("{error}"));
            gst::StateChangeError
        })
    }

    /// On the streaming thread, between narrator and textoverlay.
    fn between(&self, info: &mut gst::PadProbeInfo) -> gst::PadProbeReturn {
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
                    None => self.go_past(info),
                }
            }
            _ => gst::PadProbeReturn::Ok,
        }
    }

    /// textoverlay throws away what has no time: such a frame goes past it, without text.
    fn go_past(&self, info: &mut gst::PadProbeInfo) -> gst::PadProbeReturn {
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

    /// Gives textoverlay the caption of the frame that comes, if it has another.
    fn draw(&self) {
        let Some(textoverlay) = &self.textoverlay else {
            return;
        };
        let caption = self.narrator.on_screen();
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
        let Drawing { look, layout, .. } = &mut *drawing;
        let new_look = layout.is_none().then(|| look.clone());
        let layout = layout.get_or_insert_with(|| Layout::new(look, width, height));
        let text = caption.as_ref().map(|caption| layout.markup(&caption.text));
        let new_look = new_look.map(|look| (look, layout.font_desc()));
        drawing.drawn = caption;
        drop(drawing);

        if let Some((look, font_desc)) = new_look {
            let nick = |value: glib::Value| {
                let value =
                    glib::EnumValue::from_value(&value).map(|(_, value)| value.nick().to_owned());
                value.unwrap_or_default()
            };
            textoverlay.set_property("font-desc", font_desc);
            textoverlay.set_property("color", look.color);
            textoverlay.set_property("silent", look.silent);
            textoverlay.set_property_from_str("valignment", &nick(look.valignment.to_value()));
            textoverlay.set_property_from_str("halignment", &nick(look.halignment.to_value()));
            textoverlay.set_property("xpad", (width / 20) as i32);
            textoverlay.set_property("ypad", (height / 20) as i32);
        }
        textoverlay.set_property("text", text.unwrap_or_default());
    }

    /// The next stream starts with a clean picture.
    fn forget(&self) {
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
