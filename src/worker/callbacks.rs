//! Callbacks of the worker.

use crate::{
    caption::{Caption, FrameStamp},
    prompt::IntervalRequest,
};
use vlmnarrate_engine::{Checkpoint, Error, Setting, Transfer};
use vlmnarrate_mailbox::Epoch;

/// A finished or partial caption.
#[derive(Debug)]
pub(crate) struct CaptionUpdate {
    /// The receiver fills in `element`, `sequence`, `repeated` and `arrival_time`.
    pub(crate) caption: Caption,
    pub(crate) epoch: Epoch,
    /// Time that the frame waited for the worker.
    pub(crate) queue: std::time::Duration,
}

/// Progress of a load, which starts once and ends once, whatever happens.
#[derive(Debug)]
pub(crate) enum LoadProgress<'a> {
    Started,
    Percent(u8),
    Completed,
    Cancelled,
    Failed(&'a Error),
}

/// Progress of a download, if there is one. It starts once and ends once, before the load starts.
#[derive(Debug)]
pub(crate) enum DownloadProgress<'a> {
    Started,
    Transferred {
        transfer: Transfer,
        bytes_per_second: u64,
    },
    Completed,
    Cancelled,
    Failed(&'a Error),
}

/// Why the worker makes no more captions.
#[derive(Debug)]
pub(crate) enum WorkerFailure {
    Error(Error),
    /// With the message of the panic.
    Panic(String),
}

/// Receiver of what the worker reports.
///
/// The methods run on the worker's thread with no lock held, before anyone who waits for the job is woken.
pub(crate) trait WorkerCallbacks: Send + Sync {
    fn download_progress(&self, progress: DownloadProgress<'_>);

    fn load_progress(&self, progress: LoadProgress<'_>);

    /// Checks that a model that was downloaded fits the settings.
    fn check_checkpoint(&self, checkpoint: &dyn Checkpoint) -> Result<(), Error>;

    /// The request that the settings make of every interval, for the check of a model that was just loaded. `None` if
    /// the receiver is gone.
    fn interval_request(&self) -> Option<IntervalRequest>;

    /// Takes a finished caption, or a partial one (`partial-captions`).
    fn caption(&self, update: CaptionUpdate);

    /// Takes the error of one frame; the next frame may succeed.
    fn frame_failed(&self, epoch: Epoch, stamp: &FrameStamp, error: &Error);

    /// Takes the reason why a live frame has no caption, which says nothing about the frame: the server is away, or the
    /// answer would have come too late.
    fn frame_unanswered(&self, epoch: Epoch, stamp: &FrameStamp, error: &Error);

    /// Takes the error with which the server goes away; once, until it is back.
    fn server_away(&self, error: &Error);

    /// The server answers again after this time.
    fn server_back(&self, outage: std::time::Duration);

    /// Captions are later than the deadline; once, until one is in time.
    fn captions_late(&self, deadline: std::time::Duration);

    /// The engine ignores a setting.
    fn setting_ignored(&self, setting: Setting);

    /// Takes the reason why there are no more captions.
    fn worker_failed(&self, failure: WorkerFailure);
}
