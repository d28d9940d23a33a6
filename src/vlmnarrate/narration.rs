//! Between the element and its worker: the model comes and goes here, captions arrive here.

use std::sync::Arc;

use gst::{glib, prelude::*, subclass::prelude::*};

use super::imp::{CAT, VlmNarrate};
use crate::{
    caption::{Caption, FrameStamp},
    narrator::{
        Checkpoint, Death, Epoch, Error, ErrorKind, Events, Load, ModelSettings, Narrated, Narrator,
    },
};

/// Code of the PROGRESS messages.
const LOAD_MODEL: &str = "load-model";

/// A model, loaded or on its way, and the worker that has it.
pub(super) struct Loaded {
    pub(super) narrator: Narrator,
    pub(super) checkpoint: Arc<dyn Checkpoint>,
    settings: ModelSettings,
}

impl Loaded {
    /// Side of the pictures to give it, where the property says `image_size`.
    pub(super) fn side(&self, image_size: u32) -> u32 {
        match image_size {
            0 => self.checkpoint.image_size(),
            side => side,
        }
    }
}

/// The caption that is current.
#[derive(Default)]
pub(super) struct Shown {
    /// Captions of another epoch come too late.
    epoch: Epoch,
    /// Number of the next caption.
    sequence: u64,
    caption: Option<Arc<Caption>>,
    /// The one under way, as far as it has come (`partial-captions`).
    partial: Option<Arc<Caption>>,
}

/// From NULL to READY and back.
impl VlmNarrate {
    pub(super) fn loaded(&self) -> Option<Arc<Loaded>> {
        self.loaded.lock().unwrap().clone()
    }

    /// Checks what can be checked at once, then loads on a thread of its own.
    pub(super) fn load(&self) -> Result<(), gst::StateChangeError> {
        let (settings, image_size) = {
            let settings = self.settings.lock().unwrap();
            (settings.model_settings(), settings.image_size)
        };
        let loader = self.loader.lock().unwrap().0.clone();
        let loaded = loader.open(&settings).and_then(|checkpoint| {
            check_image_size(checkpoint.as_ref(), image_size)?;
            self.spawn(checkpoint, settings)
        });
        match loaded {
            Ok(loaded) => {
                self.reset_shown(loaded.narrator.epoch());
                *self.loaded.lock().unwrap() = Some(Arc::new(loaded));
                Ok(())
            }
            Err(error) => {
                self.post_error(&error);
                Err(gst::StateChangeError)
            }
        }
    }

    fn spawn(
        &self,
        checkpoint: Arc<dyn Checkpoint>,
        settings: ModelSettings,
    ) -> Result<Loaded, Error> {
        if checkpoint.is_demo() {
            const TEXT: &str = "The built-in demo model knows videotestsrc pictures only. For \
                real video, set model to the folder of a SmolVLM checkpoint";
            // Twice, because gst-launch-1.0 shows the debug text alone.
            gst::element_imp_info!(self, gst::LibraryError::Settings, ("{TEXT}"), ["{TEXT}"]);
        }
        let bridge = Bridge {
            element: self.obj().downgrade(),
            model: checkpoint.name().to_owned(),
        };
        let narrator = Narrator::spawn(checkpoint.clone(), Box::new(bridge)).map_err(|error| {
            let message = format!("no thread for the model: {error}");
            Error::new(ErrorKind::Failed, message)
        })?;
        Ok(Loaded {
            narrator,
            checkpoint,
            settings,
        })
    }

    /// The model's properties may change in READY: if they did, what was loaded goes.
    pub(super) fn reload_if_changed(&self) -> Result<(), gst::StateChangeError> {
        let settings = self.settings.lock().unwrap().model_settings();
        if self
            .loaded()
            .is_some_and(|loaded| loaded.settings == settings)
        {
            return Ok(());
        }
        self.unload();
        self.load()
    }

    /// Never blocks: a busy worker finds out by itself.
    pub(super) fn unload(&self) {
        let loaded = self.loaded.lock().unwrap().take();
        if let Some(loaded) = loaded {
            loaded.narrator.close();
        }
    }

    /// Takes frames from now on.
    pub(super) fn start_narrating(&self) {
        self.stats.reset();
        self.shown.lock().unwrap().sequence = 0;
        let merge = self.settings.lock().unwrap().merge_captions;
        self.text.set_merge(merge);
        if let Some(loaded) = self.loaded() {
            loaded.narrator.start();
        }
    }

    /// Cancels whatever is under way and lets go of a streaming thread that waits for it.
    pub(super) fn stop_narrating(&self) {
        if let Some(loaded) = self.loaded() {
            self.cancelled(loaded.narrator.stop());
        }
    }

    pub(super) fn flush_start(&self) {
        if let Some(loaded) = self.loaded() {
            self.cancelled(loaded.narrator.flush_start());
        }
    }

    pub(super) fn flush_stop(&self) {
        if let Some(loaded) = self.loaded() {
            loaded.narrator.flush_stop();
        }
    }

    fn cancelled(&self, epoch: Epoch) {
        self.requests.ask_again();
        self.reset_shown(epoch);
    }

    fn reset_shown(&self, epoch: Epoch) {
        let was_shown = {
            let mut shown = self.shown.lock().unwrap();
            shown.epoch = epoch;
            shown.partial = None;
            shown.caption.take().is_some()
        };
        if was_shown {
            self.obj().notify("caption");
        }
    }

    /// Whether frames can be scaled to this side; everything goes where no model is open yet.
    pub(super) fn check_image_size(&self, side: u32) -> Result<(), Error> {
        match self.loaded() {
            Some(loaded) => check_image_size(loaded.checkpoint.as_ref(), side),
            None => Ok(()),
        }
    }

    fn post_error(&self, error: &Error) {
        let class = match error.kind {
            ErrorKind::NotFound => gst::ResourceError::NotFound,
            ErrorKind::OpenRead => gst::ResourceError::OpenRead,
            ErrorKind::Settings => gst::ResourceError::Settings,
            ErrorKind::Cancelled | ErrorKind::Failed => gst::ResourceError::Failed,
        };
        gst::element_imp_error!(self, class, ("{error}"));
    }
}

fn check_image_size(checkpoint: &dyn Checkpoint, side: u32) -> Result<(), Error> {
    match side {
        0 => Ok(()),
        side => checkpoint.check_image_size(side),
    }
}

/// Captions.
impl VlmNarrate {
    pub(super) fn current(&self) -> Option<Arc<Caption>> {
        self.shown.lock().unwrap().caption.clone()
    }

    /// What to draw on the frame that goes out: the words so far, or else the current caption.
    #[cfg(feature = "overlay")]
    pub(super) fn on_screen(&self) -> Option<Arc<Caption>> {
        let shown = self.shown.lock().unwrap();
        shown.partial.as_ref().or(shown.caption.as_ref()).cloned()
    }

    /// The time of a caption is up, unless another has come.
    pub(super) fn expire(&self, sequence: u64) {
        let expired = {
            let mut shown = self.shown.lock().unwrap();
            let caption = &mut shown.caption;
            caption
                .take_if(|caption| caption.sequence == sequence)
                .is_some()
        };
        if expired {
            gst::debug!(CAT, imp = self, "Caption {sequence} has expired");
            self.obj().notify("caption");
        }
    }

    fn on_caption(&self, mut narrated: Narrated) {
        narrated.caption.arrival_time = self.running_time();
        let caption = {
            let mut shown = self.shown.lock().unwrap();
            if narrated.epoch != shown.epoch {
                return;
            }
            narrated.caption.sequence = shown.sequence;
            let caption = Arc::new(narrated.caption.clone());
            if caption.partial {
                shown.partial = Some(caption.clone());
            } else {
                shown.sequence += 1;
                shown.partial = None;
                shown.caption = Some(caption.clone());
            }
            caption
        };
        if !caption.partial {
            self.requests.answered(caption.stamp.request_id);
            self.stats.record(&narrated);
            log(self, &narrated);
            self.obj().notify("caption");
        }
        if self.settings.lock().unwrap().post_messages {
            let message = gst::message::Element::builder(caption.as_ref().into())
                .src(&*self.obj())
                .build();
            // Without a bus nobody wants to know.
            let _ = self.obj().post_message(message);
        }
    }

    fn on_failure(&self, epoch: Epoch, stamp: &FrameStamp, error: &Error) {
        let is_ours = {
            let mut shown = self.shown.lock().unwrap();
            let is_ours = shown.epoch == epoch;
            shown.partial.take_if(|_| is_ours);
            is_ours
        };
        if is_ours {
            self.not_described(stamp, error);
        }
    }

    /// One frame has no caption; the stream goes on.
    pub(super) fn not_described(&self, stamp: &FrameStamp, error: &dyn std::fmt::Display) {
        self.stats.errors.add_one();
        self.requests.answered(stamp.request_id);
        self.stream.forget_scene();
        gst::element_imp_warning!(
            self,
            gst::StreamError::Failed,
            (
                "Frame at {} was not described: {error}",
                stamp.timestamp.display()
            )
        );
    }

    /// Now, as buffers count it.
    fn running_time(&self) -> Option<gst::ClockTime> {
        let element = self.obj();
        // Below PLAYING the clock may run, but the base time isn't that of this run.
        match element.current_state() {
            gst::State::Playing => element.current_running_time(),
            _ => element.start_time(),
        }
    }
}

fn log(imp: &VlmNarrate, Narrated { caption, queue, .. }: &Narrated) {
    let cost = &caption.cost;
    let ms = |duration: std::time::Duration| duration.as_secs_f64() * 1e3;
    gst::info!(
        CAT,
        imp = imp,
        "timestamp={} latency_ms={:.1} queue_ms={:.1} preprocess_ms={:.1} vision_ms={:.1} \
         prefill_ms={:.1} decode_ms={:.1} tokens={} trigger={} text={:?}",
        caption.stamp.timestamp.display(),
        ms(cost.latency),
        ms(*queue),
        ms(cost.preprocess),
        ms(cost.vision),
        ms(cost.prefill),
        ms(cost.decode),
        caption.tokens,
        caption.stamp.trigger,
        caption.text,
    );
}

/// Carries what the worker says to the element, without keeping the element alive.
struct Bridge {
    element: glib::WeakRef<super::VlmNarrate>,
    model: String,
}

impl Events for Bridge {
    fn load(&self, load: Load<'_>) {
        use gst::ProgressType::{Canceled, Complete, Continue, Error, Start};
        let Some(element) = self.element.upgrade() else {
            return;
        };
        let model = &self.model;
        let (type_, percent, text) = match load {
            Load::Started => (Start, 0, format!("Loading {model}")),
            Load::Percent(percent) => (Continue, percent, format!("Loading {model}: {percent}%")),
            Load::Completed => (Complete, 100, format!("Loaded {model}")),
            Load::Cancelled => (Canceled, 0, format!("Loading {model} was cancelled")),
            Load::Failed(error) => (Error, 0, format!("Loading {model} failed: {error}")),
        };
        gst::debug!(CAT, obj = element, "{text}");
        let message = gst::message::Progress::builder(type_, LOAD_MODEL, &text)
            .src(&element)
            .other_field("percent", i32::from(percent))
            .build();
        let _ = element.post_message(message);
    }

    fn partial(&self, narrated: Narrated) {
        self.caption(narrated);
    }

    fn caption(&self, narrated: Narrated) {
        if let Some(element) = self.element.upgrade() {
            element.imp().on_caption(narrated);
        }
    }

    fn failed(&self, epoch: Epoch, stamp: &FrameStamp, error: &Error) {
        if let Some(element) = self.element.upgrade() {
            element.imp().on_failure(epoch, stamp, error);
        }
    }

    fn died(&self, death: Death) {
        let Some(element) = self.element.upgrade() else {
            return;
        };
        match death {
            Death::NotLoaded(error) => element.imp().post_error(&error),
            Death::Panicked(text) => gst::element_error!(
                element,
                gst::StreamError::Failed,
                ("The model's thread panicked; there won't be another caption"),
                ["{text}"]
            ),
        }
    }
}
