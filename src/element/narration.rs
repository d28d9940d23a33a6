//! Between the element and its worker: the model comes and goes here, captions arrive here.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use gst::{glib, prelude::*, subclass::prelude::*};

use crate::{
    caption::{Caption, FrameStamp},
    element::{imp::VlmNarrate, panics},
    log::CAT,
    prompt::{PictureSize, Turn},
    properties::lossy,
    worker::{
        progress::percent,
        worker::{Death, Download, Events, Load, Narrated, Narrator},
    },
};
use vlmnarrate_engine::{Checkpoint, Error, ErrorKind, Found, ModelSettings};
use vlmnarrate_mailbox::{Epoch, NewestEpoch};

/// Codes of the PROGRESS messages.
const DOWNLOAD_MODEL: &str = "download-model";
const LOAD_MODEL: &str = "load-model";

/// A model, loaded or on its way, and the worker that has it.
pub(crate) struct Loaded {
    pub(crate) narrator: Narrator,
    settings: ModelSettings,
    /// What the model was checked for when it was loaded.
    checked: Arc<Mutex<Option<Turn>>>,
    /// Has taken frames.
    was_started: AtomicBool,
}

impl Loaded {
    /// Whether it is good for another run, which asks this. One that failed on the way to its first has said so a
    /// moment ago, and would again, unless it refused what is no longer asked.
    fn is_good(&self, turn: &Turn) -> bool {
        let is_other = || {
            let checked = self.checked.lock().unwrap();
            checked.as_ref().is_some_and(|checked| checked != turn)
        };
        !self.narrator.has_failed() || !self.was_started.load(Ordering::Relaxed) && !is_other()
    }

    /// Size of the pictures to give it, where the property says `image_size`. Not known of a model
    /// that is still on its way.
    pub(crate) fn picture_size(&self, image_size: u32) -> Option<PictureSize> {
        match image_size {
            0 => Some(PictureSize::of(0, self.narrator.checkpoint()?)),
            side => Some(PictureSize::Square(side)),
        }
    }
}

/// The caption that is current.
#[derive(Default)]
pub(crate) struct Shown {
    /// Captions of another epoch come too late.
    epoch: NewestEpoch,
    /// Number of the next caption.
    sequence: u64,
    caption: Option<Arc<Caption>>,
    /// The one under way, as far as it has come (`partial-captions`).
    partial: Option<Arc<Caption>>,
}

impl Shown {
    /// Whether the current caption says this already.
    fn is_said(&self, caption: &Caption) -> bool {
        let current = self.caption.as_deref();
        current.is_some_and(|current| {
            !caption.partial && (&current.text, &current.prompt) == (&caption.text, &caption.prompt)
        })
    }
}

/// From NULL to READY and back.
impl VlmNarrate {
    pub(crate) fn loaded(&self) -> Option<Arc<Loaded>> {
        self.loaded.lock().unwrap().clone()
    }

    /// Checks what can be checked at once, then loads on a thread of its own.
    pub(crate) fn load(&self) -> Result<(), gst::StateChangeError> {
        let (settings, image_size) = {
            let settings = self.settings.lock().unwrap();
            (settings.model_settings(), settings.image_size)
        };
        let loader = self.loader.lock().unwrap().0.clone();
        let loaded = loader.open(&settings).and_then(|found| {
            if let Found::Ready(checkpoint) = &found {
                check_image_size(checkpoint.as_ref(), image_size)?;
            }
            self.spawn(found, settings)
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

    fn spawn(&self, found: Found, settings: ModelSettings) -> Result<Loaded, Error> {
        let (name, is_demo) = match &found {
            Found::Ready(checkpoint) => (checkpoint.name(), checkpoint.is_demo()),
            Found::ToDownload(remote) => (remote.name(), false),
        };
        if is_demo {
            #[cfg(feature = "hub")]
            const TEXT: &str = "The built-in demo model knows videotestsrc pictures only. For \
                real video, set model to a SmolVLM checkpoint: an id on the Hugging Face hub, as in \
                model=HuggingFaceTB/SmolVLM2-500M-Video-Instruct, or a folder";
            #[cfg(not(feature = "hub"))]
            const TEXT: &str = "The built-in demo model knows videotestsrc pictures only. For \
                real video, set model to the folder of a SmolVLM checkpoint";
            // Twice, because gst-launch-1.0 shows the debug text alone.
            gst::element_imp_info!(self, gst::LibraryError::Settings, ("{TEXT}"), ["{TEXT}"]);
        }
        let checked = Arc::default();
        let bridge = Bridge {
            element: self.obj().downgrade(),
            model: name.to_owned(),
            checked: Arc::clone(&checked),
        };
        panics::go_to_the_log();
        let predecessor = self.leaving.lock().unwrap().take();
        let narrator = Narrator::spawn(found, settings.nice, predecessor, Box::new(bridge));
        let narrator = narrator.map_err(|error| {
            let message = format!("no thread for the model: {error}");
            Error::new(ErrorKind::Failed, message)
        })?;
        Ok(Loaded {
            narrator,
            settings,
            checked,
            was_started: AtomicBool::new(false),
        })
    }

    /// The model's properties may change in READY: if they did, what was loaded goes. So does a worker that
    /// failed, for another try.
    pub(crate) fn reload_if_changed(&self) -> Result<(), gst::StateChangeError> {
        let (settings, turn) = {
            let settings = self.settings.lock().unwrap();
            (settings.model_settings(), settings.turn())
        };
        if self
            .loaded()
            .is_some_and(|loaded| loaded.settings == settings && loaded.is_good(&turn))
        {
            return Ok(());
        }
        self.unload();
        self.load()
    }

    /// Waits for a busy worker, but not for long: what is left of it is waited for before the next model is
    /// loaded.
    pub(crate) fn unload(&self) {
        let loaded = self.loaded.lock().unwrap().take();
        if let Some(loaded) = loaded {
            let leaving = loaded.narrator.close();
            *self.leaving.lock().unwrap() = leaving;
        }
    }

    /// Takes frames from now on.
    pub(crate) fn start_narrating(&self) {
        self.stats.reset();
        self.shown.lock().unwrap().sequence = 0;
        let merge = self.settings.lock().unwrap().merge_captions;
        self.text.set_merge(merge);
        if let Some(loaded) = self.loaded() {
            loaded.was_started.store(true, Ordering::Relaxed);
            loaded.narrator.start();
        }
    }

    /// Cancels whatever is under way and lets go of a streaming thread that waits for it.
    pub(crate) fn stop_narrating(&self) {
        if let Some(loaded) = self.loaded() {
            self.cancelled(loaded.narrator.stop());
        }
    }

    pub(crate) fn flush_start(&self) {
        if let Some(loaded) = self.loaded() {
            self.cancelled(loaded.narrator.flush_start());
        }
    }

    pub(crate) fn flush_stop(&self) {
        if let Some(loaded) = self.loaded() {
            loaded.narrator.flush_stop();
        }
    }

    /// Cancels what is under way, and takes what comes.
    pub(crate) fn cancel(&self) {
        if let Some(loaded) = self.loaded() {
            self.cancelled(loaded.narrator.cancel());
        }
    }

    fn cancelled(&self, epoch: Epoch) {
        self.requests.ask_again();
        self.reset_shown(epoch);
    }

    fn reset_shown(&self, epoch: Epoch) {
        let was_shown = {
            let mut shown = self.shown.lock().unwrap();
            if !shown.epoch.reach(epoch) {
                // Somebody else who cancelled after us came here first.
                return;
            }
            shown.partial = None;
            shown.caption.take().is_some()
        };
        if was_shown {
            self.obj().notify("caption");
        }
    }

    /// Whether frames can be scaled to this side; everything goes where no model is open yet.
    pub(crate) fn check_image_size(&self, side: u32) -> Result<(), Error> {
        let loaded = self.loaded();
        match loaded.as_ref().and_then(|l| l.narrator.checkpoint()) {
            Some(checkpoint) => check_image_size(checkpoint, side),
            None => Ok(()),
        }
    }

    fn post_error(&self, error: &Error) {
        let class = match error.kind {
            ErrorKind::NotFound => gst::ResourceError::NotFound,
            ErrorKind::OpenRead => gst::ResourceError::OpenRead,
            ErrorKind::NotAuthorized => gst::ResourceError::NotAuthorized,
            ErrorKind::Write => gst::ResourceError::Write,
            ErrorKind::NoSpaceLeft => gst::ResourceError::NoSpaceLeft,
            ErrorKind::Settings => gst::ResourceError::Settings,
            ErrorKind::Unavailable => gst::ResourceError::Busy,
            _ => gst::ResourceError::Failed,
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
    pub(crate) fn current(&self) -> Option<Arc<Caption>> {
        self.shown.lock().unwrap().caption.clone()
    }

    /// What to draw on the frame that goes out: the words so far, or else the current caption.
    #[cfg(feature = "overlay")]
    pub(crate) fn on_screen(&self) -> Option<Arc<Caption>> {
        let shown = self.shown.lock().unwrap();
        shown.partial.as_ref().or(shown.caption.as_ref()).cloned()
    }

    /// The time of a caption is up, unless another has come.
    pub(crate) fn expire(&self, sequence: u64) {
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
        narrated.caption.element = self.element_name();
        let caption = {
            let mut shown = self.shown.lock().unwrap();
            if !shown.epoch.is(narrated.epoch) {
                return;
            }
            narrated.caption.sequence = shown.sequence;
            narrated.caption.repeated = shown.is_said(&narrated.caption);
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
        if self.settings.lock().unwrap().posts(&caption) {
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
            let is_ours = shown.epoch.is(epoch);
            shown.partial.take_if(|_| is_ours);
            is_ours
        };
        if is_ours {
            self.not_described(stamp, error);
        }
    }

    /// One frame has no caption; the stream goes on.
    pub(crate) fn not_described(&self, stamp: &FrameStamp, error: &dyn std::fmt::Display) {
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

    /// What captions say made them: of the bin that applications see, where there is one around us.
    pub(crate) fn element_name(&self) -> String {
        let bin = self.bin.lock().unwrap().upgrade();
        let element = bin.unwrap_or_else(|| self.obj().clone().upcast());
        lossy(&element.property_value("name"))
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
    checked: Arc<Mutex<Option<Turn>>>,
}

impl Bridge {
    fn progress(
        &self,
        type_: gst::ProgressType,
        code: &str,
        text: &str,
        fields: &[(&str, glib::SendValue)],
    ) {
        let Some(element) = self.element.upgrade() else {
            return;
        };
        gst::debug!(CAT, obj = element, "{text}");
        let mut message = gst::message::Progress::builder(type_, code, text).src(&element);
        for (name, value) in fields {
            message = message.other_field(name, value.clone());
        }
        let _ = element.post_message(message.build());
    }
}

/// In the units that disks and networks are sold in.
fn bytes(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.0} kB", bytes as f64 / 1e3),
        1_000_000..100_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        100_000_000..10_000_000_000 => format!("{:.0} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

impl Events for Bridge {
    fn download(&self, download: Download<'_>) {
        use gst::ProgressType::{Canceled, Complete, Continue, Error, Start};
        let model = &self.model;
        let mut done = (0, 0);
        let (type_, percent, text) = match download {
            Download::Started => (Start, 0, format!("Downloading {model}")),
            Download::Progress {
                transfer,
                bytes_per_second,
            } => {
                done = (transfer.done, bytes_per_second);
                let percent = percent(transfer.done, transfer.total);
                let speed = bytes(bytes_per_second);
                let text = match percent {
                    Some(percent) => {
                        let total = bytes(transfer.total);
                        format!("Downloading {model}: {percent} % of {total}, {speed}/s")
                    }
                    None => format!("Downloading {model}: waiting for the hub"),
                };
                (Continue, percent.unwrap_or(0), text)
            }
            Download::Completed => (Complete, 100, format!("Downloaded {model}")),
            Download::Cancelled => (
                Canceled,
                0,
                format!("Downloading {model} was cancelled; what has come is kept"),
            ),
            Download::Failed(error) => (Error, 0, format!("Downloading {model} failed: {error}")),
        };
        let fields = [
            ("percent", i32::from(percent).to_send_value()),
            ("bytes", done.0.to_send_value()),
            ("bytes-per-second", done.1.to_send_value()),
        ];
        self.progress(type_, DOWNLOAD_MODEL, &text, &fields);
    }

    fn check(&self, checkpoint: &dyn Checkpoint) -> Result<(), Error> {
        let Some(element) = self.element.upgrade() else {
            return Ok(());
        };
        let image_size = element.imp().settings.lock().unwrap().image_size;
        check_image_size(checkpoint, image_size)
    }

    fn turn(&self) -> Option<Turn> {
        let element = self.element.upgrade()?;
        let turn = element.imp().settings.lock().unwrap().turn();
        *self.checked.lock().unwrap() = Some(turn.clone());
        Some(turn)
    }

    fn load(&self, load: Load<'_>) {
        use gst::ProgressType::{Canceled, Complete, Continue, Error, Start};
        let model = &self.model;
        let (type_, percent, text) = match load {
            Load::Started => (Start, 0, format!("Loading {model}")),
            Load::Percent(percent) => (Continue, percent, format!("Loading {model}: {percent}%")),
            Load::Completed => (Complete, 100, format!("Loaded {model}")),
            Load::Cancelled => (Canceled, 0, format!("Loading {model} was cancelled")),
            Load::Failed(error) => (Error, 0, format!("Loading {model} failed: {error}")),
        };
        let percent = i32::from(percent).to_send_value();
        self.progress(type_, LOAD_MODEL, &text, &[("percent", percent)]);
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
            Death::Failed(error) => element.imp().post_error(&error),
            Death::Panicked(text) => gst::element_error!(
                element,
                gst::StreamError::Failed,
                ("The model's thread panicked; there won't be another caption"),
                ["{text}"]
            ),
        }
    }
}
