//! The worker's callbacks: progress messages, captions and errors.

use std::time::Duration;

use gst::{glib, prelude::*, subclass::prelude::*};

use crate::{
    caption::FrameStamp,
    element::model::{CheckedRequest, check_image_size},
    log::CAT,
    prompt::IntervalRequest,
    remedies::ignored,
    worker::{
        CaptionUpdate, DownloadProgress, LoadProgress, WorkerCallbacks, WorkerFailure, percent,
    },
};
use vlmnarrate_engine::{Checkpoint, Error, Setting};
use vlmnarrate_mailbox::Epoch;

/// Codes of the PROGRESS messages.
const DOWNLOAD_MODEL: &str = "download-model";
const LOAD_MODEL: &str = "load-model";

/// Passes callbacks on to the element without keeping it alive.
pub(crate) struct ElementCallbacks {
    element: glib::WeakRef<super::VlmNarrate>,
    /// Name of the model.
    model: String,
    checked_request: CheckedRequest,
}

impl ElementCallbacks {
    pub(crate) fn new(
        element: &super::VlmNarrate,
        model: &str,
        checked_request: CheckedRequest,
    ) -> Self {
        Self {
            element: element.downgrade(),
            model: model.to_owned(),
            checked_request,
        }
    }

    fn post_progress(
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

/// A number of bytes in decimal units, as disks and networks use them.
fn format_bytes(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.0} kB", bytes as f64 / 1e3),
        1_000_000..100_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        100_000_000..10_000_000_000 => format!("{:.0} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

impl WorkerCallbacks for ElementCallbacks {
    fn download_progress(&self, progress: DownloadProgress<'_>) {
        use gst::ProgressType::{Canceled, Complete, Continue, Error, Start};
        let model = &self.model;
        let (mut bytes, mut speed) = (0, 0);
        let (type_, percent, text) = match progress {
            DownloadProgress::Started => (Start, 0, format!("Downloading {model}")),
            DownloadProgress::Transferred {
                transfer,
                bytes_per_second,
            } => {
                (bytes, speed) = (transfer.done, bytes_per_second);
                let percent = percent(transfer.done, transfer.total);
                let text = match percent {
                    Some(percent) => {
                        let total = format_bytes(transfer.total);
                        let speed = format_bytes(speed);
                        format!("Downloading {model}: {percent} % of {total}, {speed}/s")
                    }
                    None => format!("Downloading {model}: waiting for the hub"),
                };
                (Continue, percent.unwrap_or(0), text)
            }
            DownloadProgress::Completed => (Complete, 100, format!("Downloaded {model}")),
            DownloadProgress::Cancelled => {
                let text = format!(
                    "Downloading {model} was cancelled; the parts that have arrived are kept"
                );
                (Canceled, 0, text)
            }
            DownloadProgress::Failed(error) => {
                (Error, 0, format!("Downloading {model} failed: {error}"))
            }
        };
        let fields = [
            ("percent", i32::from(percent).to_send_value()),
            ("bytes", bytes.to_send_value()),
            ("bytes-per-second", speed.to_send_value()),
        ];
        self.post_progress(type_, DOWNLOAD_MODEL, &text, &fields);
    }

    fn load_progress(&self, progress: LoadProgress<'_>) {
        use gst::ProgressType::{Canceled, Complete, Continue, Error, Start};
        let model = &self.model;
        let (type_, percent, text) = match progress {
            LoadProgress::Started => (Start, 0, format!("Loading {model}")),
            LoadProgress::Percent(percent) => {
                (Continue, percent, format!("Loading {model}: {percent}%"))
            }
            LoadProgress::Completed => (Complete, 100, format!("Loaded {model}")),
            LoadProgress::Cancelled => (Canceled, 0, format!("Loading {model} was cancelled")),
            LoadProgress::Failed(error) => (Error, 0, format!("Loading {model} failed: {error}")),
        };
        let percent = i32::from(percent).to_send_value();
        self.post_progress(type_, LOAD_MODEL, &text, &[("percent", percent)]);
    }

    fn check_checkpoint(&self, checkpoint: &dyn Checkpoint) -> Result<(), Error> {
        let Some(element) = self.element.upgrade() else {
            return Ok(());
        };
        let image_size = element.imp().settings.lock().unwrap().image_size;
        check_image_size(checkpoint, image_size)
    }

    fn interval_request(&self) -> Option<IntervalRequest> {
        let element = self.element.upgrade()?;
        let request = element.imp().settings.lock().unwrap().interval_request();
        *self.checked_request.lock().unwrap() = Some(request.clone());
        Some(request)
    }

    fn caption(&self, update: CaptionUpdate) {
        if let Some(element) = self.element.upgrade() {
            element.imp().on_caption(update);
        }
    }

    fn frame_failed(&self, epoch: Epoch, stamp: &FrameStamp, error: &Error) {
        if let Some(element) = self.element.upgrade() {
            element.imp().on_frame_failed(epoch, stamp, error);
        }
    }

    fn frame_unanswered(&self, epoch: Epoch, stamp: &FrameStamp, error: &Error) {
        if let Some(element) = self.element.upgrade() {
            element.imp().on_frame_unanswered(epoch, stamp, error);
        }
    }

    fn server_away(&self, error: &Error) {
        if let Some(element) = self.element.upgrade() {
            gst::element_warning!(
                element,
                gst::ResourceError::Busy,
                ("{error}. It is asked again from time to time")
            );
        }
    }

    fn server_back(&self, outage: Duration) {
        if let Some(element) = self.element.upgrade() {
            let text = format!(
                "The endpoint answers again, after {:.1} s",
                outage.as_secs_f64()
            );
            // Also as debug text, the only one that gst-launch-1.0 shows.
            gst::element_info!(element, gst::ResourceError::Busy, ("{text}"), ["{text}"]);
        }
    }

    fn captions_late(&self, deadline: Duration) {
        if let Some(element) = self.element.upgrade() {
            gst::element_warning!(
                element,
                gst::ResourceError::Busy,
                (
                    "Captions take longer than {} s (deadline), and are left out. Set a longer deadline, a smaller model, \
                     image-size or max-tokens",
                    deadline.as_secs_f64()
                )
            );
        }
    }

    fn setting_ignored(&self, setting: Setting) {
        if let Some(element) = self.element.upgrade() {
            gst::element_warning!(
                element,
                gst::LibraryError::Settings,
                ("{}", ignored(setting))
            );
        }
    }

    fn worker_failed(&self, failure: WorkerFailure) {
        let Some(element) = self.element.upgrade() else {
            return;
        };
        match failure {
            WorkerFailure::Error(error) => element.imp().post_error(&error),
            WorkerFailure::Panic(message) => gst::element_error!(
                element,
                gst::StreamError::Failed,
                ("The model's thread panicked: there are no more captions. Set the element to READY to load \
                     the model again, and report this as a bug"),
                ["{message}"]
            ),
        }
    }
}
