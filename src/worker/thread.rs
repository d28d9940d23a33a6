//! The thread that owns the engine.

use std::{
    io,
    ops::ControlFlow,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    caption::FrameStamp,
    prompt::RequestSettings,
    remedies::worded,
    worker::{
        callbacks::{DownloadProgress, LoadProgress, WorkerCallbacks, WorkerFailure},
        describe::DescribeLoop,
        progress::{DownloadThrottle, LoadThrottle},
    },
};
use vlmnarrate_engine::{
    Checkpoint, Clip, Download, Engine, EngineInfo, Error, ErrorKind, Found, Picture,
    threads::{self, TimedJoinHandle, panic_message},
};
use vlmnarrate_mailbox::{Epoch, Mailbox, Refused, Wait};

/// How long [`Worker::close`] waits for a thread that is in the middle of a layer or a tensor.
const TIMEOUT: Duration = Duration::from_secs(2);
/// How long a load waits for the thread of a predecessor that had not ended when it was closed.
const PREDECESSOR_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a frame may wait for its caption.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Urgency {
    /// A newer frame is worth more than a late caption.
    Live {
        /// Time from the sampling after which the caption is worth nothing.
        deadline: Option<Duration>,
    },
    /// No frame may be lost: the frame waits so long for a server that is away, then there are no more captions.
    Recorded { patience: Duration },
}

/// One frame to describe, or a clip of several.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    /// Oldest first.
    pub(crate) pictures: Vec<Arc<Picture>>,
    /// Times of the pictures, if they are a clip.
    pub(crate) clip: Option<Clip>,
    pub(crate) stamp: FrameStamp,
    pub(crate) settings: RequestSettings,
    /// When the frame, the last one of a clip, was taken from the stream.
    pub(crate) sampled_at: Instant,
    /// Time that the scaling took.
    pub(crate) scaling: Duration,
    pub(crate) urgency: Urgency,
}

/// Handle of a worker.
///
/// Closing or dropping the handle waits until the thread has noticed (at the next layer, token, tensor or piece of a
/// download), has freed the model and has ended; at most [`TIMEOUT`], and not from a callback of the worker.
pub(crate) struct Worker(Arc<Shared>);

pub(super) struct Shared {
    pub(super) mailbox: Mailbox<Job>,
    callbacks: Box<dyn WorkerCallbacks>,
    /// Unset while the model is being downloaded.
    checkpoint: OnceLock<Arc<dyn Checkpoint>>,
    /// Unset until the model is loaded; set before that is reported.
    info: OnceLock<EngineInfo>,
    phase: Mutex<Phase>,
    /// Set before the failure is reported.
    has_failed: AtomicBool,
    thread: Mutex<Option<TimedJoinHandle>>,
    /// Memory of pictures that were described, for reuse.
    spare_memory: Mutex<Vec<Vec<u8>>>,
}

/// The operation in progress. Whoever ends a phase reports how it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Downloading,
    /// Downloaded, but the load hasn't started.
    Downloaded,
    Loading,
    /// Loaded, failed or closed.
    Ended,
}

impl Worker {
    /// Starts a thread that downloads the model if necessary, loads it and then waits for jobs.
    ///
    /// On Linux, the thread and those that the engine starts get this `nice` value, 0 to 19. The load waits for the
    /// thread of a predecessor, so that two models are not in memory at once.
    ///
    /// # Errors
    ///
    /// The system refuses another thread.
    pub(crate) fn spawn(
        found: Found,
        nice: u8,
        predecessor: Option<TimedJoinHandle>,
        callbacks: Box<dyn WorkerCallbacks>,
    ) -> io::Result<Self> {
        let (phase, checkpoint) = match &found {
            Found::Ready(checkpoint) => (Phase::Loading, checkpoint.clone().into()),
            Found::ToDownload(_) => (Phase::Downloading, OnceLock::new()),
        };
        let shared = Arc::new(Shared {
            mailbox: Mailbox::new(),
            callbacks,
            checkpoint,
            info: OnceLock::new(),
            phase: Mutex::new(phase),
            has_failed: AtomicBool::new(false),
            thread: Mutex::default(),
            spare_memory: Mutex::default(),
        });
        // Before the thread runs, so that this callback is the first.
        match phase {
            Phase::Downloading => shared
                .callbacks
                .download_progress(DownloadProgress::Started),
            _ => shared.callbacks.load_progress(LoadProgress::Started),
        }
        let thread = TimedJoinHandle::spawn("vlmnarrate", {
            let shared = shared.clone();
            move || {
                lower_priority(nice);
                shared.run(found, predecessor)
            }
        });
        let thread = thread.inspect_err(|error| {
            let error = Error::new(ErrorKind::Failed, format!("no thread: {error}"));
            shared.end_phase(Some(&error));
        })?;
        *shared.thread.lock().unwrap() = Some(thread);
        Ok(Self(shared))
    }

    /// The model; `None` while it is being downloaded.
    pub(crate) fn checkpoint(&self) -> Option<&dyn Checkpoint> {
        self.0.checkpoint.get().map(AsRef::as_ref)
    }

    /// Description of the engine; `None` until the model is loaded.
    pub(crate) fn info(&self) -> Option<&EngineInfo> {
        self.0.info.get()
    }

    /// Waits until the model is loaded.
    pub(crate) fn wait_loaded(&self) -> Result<(), Refused> {
        self.0.mailbox.wait_loaded()
    }

    /// The current epoch.
    pub(crate) fn epoch(&self) -> Epoch {
        self.0.mailbox.epoch()
    }

    /// Takes jobs from now on.
    pub(crate) fn start(&self) {
        self.0.mailbox.start();
    }

    /// Cancels all jobs and refuses new ones until [`start`](Self::start). The model stays loaded.
    pub(crate) fn stop(&self) -> Epoch {
        self.0.mailbox.stop()
    }

    /// The same as [`stop`](Self::stop), until [`flush_stop`](Self::flush_stop).
    pub(crate) fn flush_start(&self) -> Epoch {
        self.0.mailbox.flush_start()
    }

    /// Takes jobs again after a flush.
    pub(crate) fn flush_stop(&self) {
        self.0.mailbox.flush_stop();
    }

    /// Cancels all jobs, and takes new ones at once.
    pub(crate) fn cancel(&self) -> Epoch {
        self.0.mailbox.cancel()
    }

    /// Cancels everything for good, a download and a load too. Returns the thread if it has not ended in time.
    pub(crate) fn close(&self) -> Option<TimedJoinHandle> {
        let no_callback = self.0.mailbox.close();
        self.0.end_phase(None);
        let thread = self.0.thread.lock().unwrap().take()?;
        // A callback that has not returned may wait for the caller.
        match no_callback {
            true => thread.join(TIMEOUT).err(),
            false => Some(thread),
        }
    }

    /// Checks whether a job would be taken.
    pub(crate) fn check(&self) -> Result<(), Refused> {
        self.0.mailbox.check()
    }

    /// Whether a frame is welcome: the model is loaded and there is no job, or one whose frame has grown old while it
    /// waited for its turn.
    pub(crate) fn wants_frame(&self) -> bool {
        /// Scaling a frame for each one that comes would cost more than its youth is worth.
        const OLD: Duration = Duration::from_millis(250);
        let is_old = |job: &Job| job.sampled_at.elapsed() >= OLD;
        self.0.mailbox.is_idle() || self.0.mailbox.has_newest(is_old)
    }

    /// Whether a failure of the worker was reported.
    pub(crate) fn has_failed(&self) -> bool {
        self.0.has_failed.load(Ordering::Acquire)
    }

    /// Whether [`submit_request`](Self::submit_request) may be called.
    pub(crate) fn has_room_for_request(&self) -> bool {
        self.0.mailbox.has_room_for_request()
    }

    /// Submits a job that a newer one may replace. Returns whether this job replaced an older one.
    pub(crate) fn submit_newest(&self, job: Job) -> Result<bool, Refused> {
        let replaced = self.0.mailbox.put_newest(job)?;
        Ok(replaced.map(|job| self.0.recycle(job)).is_some())
    }

    /// Submits a job that comes before all others and is not replaced.
    pub(crate) fn submit_request(&self, job: Job) -> Result<(), Refused> {
        self.0.mailbox.put_requested(job)
    }

    /// Waits until all jobs are done.
    pub(crate) fn wait_idle(&self, timeout: Option<Duration>) -> Wait {
        // A deadline that overflows is none.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        self.0.mailbox.wait_idle(deadline)
    }

    /// Memory of any size to reuse for a picture.
    pub(crate) fn take_spare_memory(&self) -> Vec<u8> {
        self.0
            .spare_memory
            .lock()
            .unwrap()
            .pop()
            .unwrap_or_default()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn run(&self, found: Found, predecessor: Option<TimedJoinHandle>) {
        // The engine is dropped in here, so that a panic of its destructor is caught too.
        let result = catch_unwind(AssertUnwindSafe(|| {
            let checkpoint = match found {
                Found::Ready(checkpoint) => Ok(checkpoint),
                Found::ToDownload(download) => self.download(download),
            };
            // Even when closed: whoever joins this thread then has joined the predecessor too. After the timeout two
            // models in memory are better than none.
            if let Some(predecessor) = predecessor {
                let _ = predecessor.join(PREDECESSOR_TIMEOUT);
            }
            let (mut engine, info) = self.load(checkpoint?)?;
            DescribeLoop::new(self, info).run(engine.as_mut())
        }));
        let failure = match result {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(WorkerFailure::Error(error)),
            Err(panic) => Some(WorkerFailure::Panic(
                panic_message(panic.as_ref()).to_owned(),
            )),
        };
        if let Some(failure) = failure {
            self.call_back(|callbacks| {
                let error = match &failure {
                    WorkerFailure::Error(error) => error,
                    WorkerFailure::Panic(message) => {
                        &Error::new(ErrorKind::Failed, message.as_str())
                    }
                };
                self.has_failed.store(true, Ordering::Release);
                self.end_phase(Some(error));
                callbacks.worker_failed(failure);
            });
        }
        self.mailbox.worker_exited();
    }

    /// Runs a callback, unless the worker is closed.
    pub(super) fn call_back<T>(
        &self,
        callback: impl FnOnce(&dyn WorkerCallbacks) -> T,
    ) -> Option<T> {
        let _guard = self.mailbox.begin_callback()?;
        Some(threads::run_callback(|| callback(self.callbacks.as_ref())))
    }

    /// Runs a callback about a job, unless its epoch is over.
    pub(super) fn call_back_in(&self, epoch: Epoch, callback: impl FnOnce(&dyn WorkerCallbacks)) {
        if let Some(_guard) = self.mailbox.begin_callback_in(epoch) {
            threads::run_callback(|| callback(self.callbacks.as_ref()));
        }
    }

    fn download(&self, download: Arc<dyn Download>) -> Result<Arc<dyn Checkpoint>, Error> {
        let mut throttle = DownloadThrottle::default();
        let checkpoint = download.download(&mut |transfer| {
            if self.mailbox.is_closed() {
                return ControlFlow::Break(());
            }
            if let Some(bytes_per_second) = throttle.pass(transfer) {
                self.call_back(|callbacks| {
                    callbacks.download_progress(DownloadProgress::Transferred {
                        transfer,
                        bytes_per_second,
                    })
                });
            }
            ControlFlow::Continue(())
        });
        let checkpoint = checkpoint.map_err(worded)?;
        self.call_back(|callbacks| {
            if !self.enter_phase(Phase::Downloading, Phase::Downloaded) {
                return Err(Error::cancelled());
            }
            callbacks.download_progress(DownloadProgress::Completed);
            // Before the check: a setting that changes from now on is checked by its setter.
            let _ = self.checkpoint.set(checkpoint.clone());
            callbacks.check_checkpoint(checkpoint.as_ref())?;
            callbacks.load_progress(LoadProgress::Started);
            if !self.enter_phase(Phase::Downloaded, Phase::Loading) {
                callbacks.load_progress(LoadProgress::Cancelled);
                return Err(Error::cancelled());
            }
            Ok(())
        })
        .unwrap_or_else(|| Err(Error::cancelled()))?;
        Ok(checkpoint)
    }

    fn load(
        &self,
        checkpoint: Arc<dyn Checkpoint>,
    ) -> Result<(Box<dyn Engine>, &EngineInfo), Error> {
        let mut throttle = LoadThrottle::default();
        let engine = checkpoint.load(&mut |done, total| {
            if self.mailbox.is_closed() {
                return ControlFlow::Break(());
            }
            if let Some(percent) = throttle.pass(done, total) {
                self.call_back(|callbacks| callbacks.load_progress(LoadProgress::Percent(percent)));
            }
            ControlFlow::Continue(())
        });
        let engine = engine.map_err(worded)?;
        let request = self.call_back(|callbacks| callbacks.interval_request());
        if let Some(request) = request.flatten() {
            let checked = request.check(engine.as_ref(), checkpoint.as_ref());
            checked.map_err(worded)?;
        }
        let info = self.info.get_or_init(|| engine.info());
        self.call_back(|callbacks| {
            if self.enter_phase(Phase::Loading, Phase::Ended) {
                callbacks.load_progress(LoadProgress::Completed);
            }
        });
        Ok((engine, info))
    }

    /// Enters the next phase, unless another thread has ended the current one. Returns whether it did.
    fn enter_phase(&self, from: Phase, to: Phase) -> bool {
        let mut phase = self.phase.lock().unwrap();
        let enters = *phase == from;
        if enters {
            *phase = to;
        }
        enters
    }

    /// Reports that the operation in progress ends early: with this error, or cancelled.
    fn end_phase(&self, error: Option<&Error>) {
        let phase = std::mem::replace(&mut *self.phase.lock().unwrap(), Phase::Ended);
        let callbacks = &self.callbacks;
        match (phase, error) {
            (Phase::Downloading, None) => callbacks.download_progress(DownloadProgress::Cancelled),
            (Phase::Downloading, Some(error)) => {
                callbacks.download_progress(DownloadProgress::Failed(error));
            }
            (Phase::Loading, None) => callbacks.load_progress(LoadProgress::Cancelled),
            (Phase::Loading, Some(error)) => callbacks.load_progress(LoadProgress::Failed(error)),
            (Phase::Downloaded | Phase::Ended, _) => (),
        }
    }

    /// Keeps the memory of a job's pictures for the next job.
    pub(super) fn recycle(&self, job: Job) {
        let count = job.pictures.len();
        let pictures = job.pictures.into_iter();
        let memory = pictures.filter_map(|picture| Some(Arc::into_inner(picture)?.rgb));
        let mut spare = self.spare_memory.lock().unwrap();
        spare.extend(memory);
        spare.truncate(count);
    }
}

/// Lets threads that decode, draw or play go first.
#[cfg_attr(target_os = "linux", expect(unsafe_code, reason = "setpriority"))]
fn lower_priority(nice: u8) {
    #[cfg(target_os = "linux")]
    // SAFETY: takes no pointer. 0 is the calling thread, whose children inherit it.
    unsafe {
        // If refused, the thread keeps the normal priority.
        let _ = libc::setpriority(libc::PRIO_PROCESS, 0, nice.into());
    }
    #[cfg(not(target_os = "linux"))]
    let _ = nice;
}
