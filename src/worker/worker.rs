//! The thread that owns the engine.

use std::{
    any::Any,
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
    caption::{Caption, Cost, FrameStamp},
    prompt::{Question, Turn},
    worker::progress::{Pace, Throttle},
};
use vlmnarrate_engine::{
    Answer, Checkpoint, Clip, Download as Fetch, Engine, EngineInfo, Error, ErrorKind, Event,
    Found, Picture, Transfer,
    threads::{self, Joinable},
};
use vlmnarrate_mailbox::{Epoch, Mailbox, Refused, Wait};

/// How long [`Narrator::close`] waits for a worker that is deep in a layer or a tensor.
const TIMEOUT: Duration = Duration::from_secs(2);
/// How long a load waits for a worker that was not waited for, or not long enough.
const PREDECESSOR_TIMEOUT: Duration = Duration::from_secs(10);

/// One frame to describe, or a clip of several.
#[derive(Clone, Debug)]
pub struct Job {
    pub pictures: Vec<Arc<Picture>>,
    /// Of pictures that are a clip, oldest first.
    pub clip: Option<Clip>,
    pub stamp: FrameStamp,
    pub question: Question,
    /// When the frame, the last of a clip, was taken from the stream.
    pub sampled_at: Instant,
    /// How long the scaling took.
    pub scaling: Duration,
}

/// A caption, whole or partial, and what only the statistics want to know.
#[derive(Debug)]
pub struct Narrated {
    /// Its `element`, `sequence`, `repeated` and `arrival_time` are for the listener to fill in.
    pub caption: Caption,
    pub epoch: Epoch,
    /// How long the frame waited for the worker.
    pub queue: Duration,
}

/// How the load goes. It starts once and ends once, whatever happens.
#[derive(Debug)]
pub enum Load<'a> {
    Started,
    Percent(u8),
    Completed,
    Cancelled,
    Failed(&'a Error),
}

/// How the download goes, where there is one. It starts once and ends once, before the load starts.
#[derive(Debug)]
pub enum Download<'a> {
    Started,
    Progress {
        transfer: Transfer,
        bytes_per_second: u64,
    },
    Completed,
    Cancelled,
    Failed(&'a Error),
}

/// Why there won't be another caption.
#[derive(Debug)]
pub enum Death {
    Failed(Error),
    Panicked(String),
}

/// Who listens to the worker. Called on the worker's thread, with no lock held, before anyone who
/// waits for the job is woken.
pub trait Events: Send + Sync {
    fn download(&self, download: Download<'_>);
    /// What was downloaded is open: does it fit the settings?
    fn check(&self, checkpoint: &dyn Checkpoint) -> Result<(), Error>;
    /// The model is loaded: what will it be asked? `None` where nobody asks any more.
    fn turn(&self) -> Option<Turn>;
    fn load(&self, load: Load<'_>);
    fn partial(&self, narrated: Narrated);
    fn caption(&self, narrated: Narrated);
    fn failed(&self, epoch: Epoch, stamp: &FrameStamp, error: &Error);
    fn died(&self, death: Death);
}

/// The element's end of a worker.
///
/// Closed or dropped, it waits until the worker has found out (at the next layer, token, tensor or piece of a
/// download), has freed the model and has ended; at most [`TIMEOUT`], and not in a callback of the worker.
pub struct Narrator(Arc<Shared>);

struct Shared {
    mailbox: Mailbox<Job>,
    events: Box<dyn Events>,
    /// From the start, or from when it is downloaded.
    checkpoint: OnceLock<Arc<dyn Checkpoint>>,
    /// Of the engine, from when it is loaded, set before that is told.
    info: OnceLock<EngineInfo>,
    phase: Mutex<Phase>,
    /// Set before it is told, so that whoever hears of it finds it so.
    failed: AtomicBool,
    thread: Mutex<Option<Joinable>>,
    /// Memory of pictures that were described.
    spare: Mutex<Vec<Vec<u8>>>,
}

/// What is under way. Whoever changes it tells how that ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Downloading,
    /// Downloaded, and the load hasn't started.
    Between,
    Loading,
    Over,
}

impl Narrator {
    /// Starts a thread that downloads the model if need be, loads it and then waits for jobs.
    ///
    /// On Linux its threads have this `nice` value, 0 to 19, and so do those that the engine starts. The model
    /// is not loaded beside that of a predecessor which has yet to end.
    pub fn spawn(
        found: Found,
        nice: u8,
        predecessor: Option<Joinable>,
        events: Box<dyn Events>,
    ) -> io::Result<Self> {
        let (phase, checkpoint) = match &found {
            Found::Ready(checkpoint) => (Phase::Loading, checkpoint.clone().into()),
            Found::ToDownload(_) => (Phase::Downloading, OnceLock::new()),
        };
        let shared = Arc::new(Shared {
            mailbox: Mailbox::new(),
            events,
            checkpoint,
            info: OnceLock::new(),
            phase: Mutex::new(phase),
            failed: AtomicBool::new(false),
            thread: Mutex::default(),
            spare: Mutex::default(),
        });
        // Before the thread runs, so that nothing it says can come first.
        match phase {
            Phase::Downloading => shared.events.download(Download::Started),
            _ => shared.events.load(Load::Started),
        }
        let thread = Joinable::spawn("vlmnarrate", {
            let shared = shared.clone();
            move || {
                lower_priority(nice);
                shared.run(found, predecessor)
            }
        });
        let thread = thread.inspect_err(|error| {
            let error = Error::new(ErrorKind::Failed, format!("no thread: {error}"));
            shared.end(Some(&error));
        })?;
        *shared.thread.lock().unwrap() = Some(thread);
        Ok(Self(shared))
    }

    /// `None` while it is being downloaded.
    pub fn checkpoint(&self) -> Option<&dyn Checkpoint> {
        self.0.checkpoint.get().map(AsRef::as_ref)
    }

    /// `None` while it is being loaded.
    pub fn info(&self) -> Option<&EngineInfo> {
        self.0.info.get()
    }

    /// Waits until the model is loaded.
    pub fn wait_loaded(&self) -> Result<(), Refused> {
        self.0.mailbox.wait_loaded()
    }

    pub fn epoch(&self) -> Epoch {
        self.0.mailbox.epoch()
    }

    /// Takes frames.
    pub fn start(&self) {
        self.0.mailbox.start();
    }

    /// Cancels everything and refuses frames until [`start`](Self::start). The model stays.
    pub fn stop(&self) -> Epoch {
        self.0.mailbox.stop()
    }

    /// As [`stop`](Self::stop), until [`flush_stop`](Self::flush_stop).
    pub fn flush_start(&self) -> Epoch {
        self.0.mailbox.flush_start()
    }

    pub fn flush_stop(&self) {
        self.0.mailbox.flush_stop();
    }

    /// As [`stop`](Self::stop), and takes frames at once.
    pub fn cancel(&self) -> Epoch {
        self.0.mailbox.cancel()
    }

    /// Cancels everything, download and load too, for good. Returns the worker if it has yet to end.
    pub fn close(&self) -> Option<Joinable> {
        let is_silent = self.0.mailbox.close();
        self.0.end(None);
        let thread = self.0.thread.lock().unwrap().take()?;
        // A callback that has not returned may wait for whoever closes.
        match is_silent {
            true => thread.join(TIMEOUT).err(),
            false => Some(thread),
        }
    }

    pub fn check(&self) -> Result<(), Refused> {
        self.0.mailbox.check()
    }

    pub fn is_idle(&self) -> bool {
        self.0.mailbox.is_idle()
    }

    /// Whether it was said that there won't be another caption.
    pub fn has_failed(&self) -> bool {
        self.0.failed.load(Ordering::Acquire)
    }

    /// Whether [`ask`](Self::ask) may be called.
    pub fn has_room(&self) -> bool {
        self.0.mailbox.has_room()
    }

    /// Describe this frame, unless a newer one comes first. Says whether it replaced an older one.
    pub fn submit(&self, job: Job) -> Result<bool, Refused> {
        let replaced = self.0.mailbox.put_newest(job)?;
        Ok(replaced.map(|job| self.0.recycle(job)).is_some())
    }

    /// Describe this frame, and before any other.
    pub fn ask(&self, job: Job) -> Result<(), Refused> {
        self.0.mailbox.put_asked(job)
    }

    /// Waits until all frames are described.
    pub fn wait_idle(&self, timeout: Option<Duration>) -> Wait {
        // A timeout beyond what a clock can tell is no timeout.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        self.0.mailbox.wait_idle(deadline)
    }

    /// Memory for the next picture, of any size.
    pub fn spare(&self) -> Vec<u8> {
        self.0.spare.lock().unwrap().pop().unwrap_or_default()
    }
}

impl Drop for Narrator {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn run(&self, found: Found, predecessor: Option<Joinable>) {
        // The engine lives and dies in here: one that panics in its destructor is caught too.
        let result = catch_unwind(AssertUnwindSafe(|| {
            let checkpoint = match found {
                Found::Ready(checkpoint) => Ok(checkpoint),
                Found::ToDownload(remote) => self.download(remote),
            };
            // Closed or not: whoever closes waits for it through us. Two models at once are better than none.
            if let Some(predecessor) = predecessor {
                let _ = predecessor.join(PREDECESSOR_TIMEOUT);
            }
            let (mut engine, info) = self.load(checkpoint?)?;
            while let Some((epoch, job)) = self.mailbox.take() {
                self.narrate(engine.as_mut(), info, epoch, job)?;
            }
            Ok(())
        }));
        let death = match result {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(Death::Failed(error)),
            Err(panic) => Some(Death::Panicked(panic_text(panic.as_ref()))),
        };
        if let Some(death) = death {
            self.say(|events| {
                let error = match &death {
                    Death::Failed(error) => error,
                    Death::Panicked(text) => &Error::new(ErrorKind::Failed, text.as_str()),
                };
                self.failed.store(true, Ordering::Release);
                self.end(Some(error));
                events.died(death);
            });
        }
        self.mailbox.die();
    }

    /// Calls those who listen, if they still do: once closed there isn't a word more.
    fn say<T>(&self, word: impl FnOnce(&dyn Events) -> T) -> Option<T> {
        let _speech = self.mailbox.speak()?;
        Some(threads::lend(|| word(self.events.as_ref())))
    }

    /// The same of a caption, which must be heard in its own epoch.
    fn say_in(&self, epoch: Epoch, word: impl FnOnce(&dyn Events)) {
        if let Some(_speech) = self.mailbox.speak_in(epoch) {
            threads::lend(|| word(self.events.as_ref()));
        }
    }

    fn download(&self, remote: Arc<dyn Fetch>) -> Result<Arc<dyn Checkpoint>, Error> {
        let mut pace = Pace::default();
        let checkpoint = remote.download(&mut |transfer| {
            if self.mailbox.is_closed() {
                return ControlFlow::Break(());
            }
            if let Some(bytes_per_second) = pace.pass(transfer) {
                self.say(|events| {
                    events.download(Download::Progress {
                        transfer,
                        bytes_per_second,
                    })
                });
            }
            ControlFlow::Continue(())
        })?;
        self.say(|events| {
            if !self.pass(Phase::Downloading, Phase::Between) {
                return Err(Error::cancelled());
            }
            events.download(Download::Completed);
            // First, so that settings that change from now on are checked by whoever changes them.
            let _ = self.checkpoint.set(checkpoint.clone());
            events.check(checkpoint.as_ref())?;
            events.load(Load::Started);
            if !self.pass(Phase::Between, Phase::Loading) {
                events.load(Load::Cancelled);
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
        let mut throttle = Throttle::default();
        let engine = checkpoint.load(&mut |done, total| {
            if self.mailbox.is_closed() {
                return ControlFlow::Break(());
            }
            if let Some(percent) = throttle.pass(done, total) {
                self.say(|events| events.load(Load::Percent(percent)));
            }
            ControlFlow::Continue(())
        })?;
        if let Some(turn) = self.say(|events| events.turn()).flatten() {
            turn.check(engine.as_ref(), checkpoint.as_ref())?;
        }
        let info = self.info.get_or_init(|| engine.info());
        self.say(|events| {
            if self.pass(Phase::Loading, Phase::Over) {
                events.load(Load::Completed);
            }
        });
        Ok((engine, info))
    }

    /// Moves on, unless somebody else has.
    fn pass(&self, from: Phase, to: Phase) -> bool {
        let mut phase = self.phase.lock().unwrap();
        let passes = *phase == from;
        if passes {
            *phase = to;
        }
        passes
    }

    /// Tells that what is under way ends early: by this error, or because somebody wants it to.
    fn end(&self, error: Option<&Error>) {
        let phase = std::mem::replace(&mut *self.phase.lock().unwrap(), Phase::Over);
        match (phase, error) {
            (Phase::Downloading, None) => self.events.download(Download::Cancelled),
            (Phase::Downloading, Some(error)) => self.events.download(Download::Failed(error)),
            (Phase::Loading, None) => self.events.load(Load::Cancelled),
            (Phase::Loading, Some(error)) => self.events.load(Load::Failed(error)),
            (Phase::Between | Phase::Over, _) => (),
        }
    }

    /// Fails where no other caption can be made either.
    fn narrate(
        &self,
        engine: &mut dyn Engine,
        info: &EngineInfo,
        epoch: Epoch,
        job: Job,
    ) -> Result<(), Error> {
        let queue = job.sampled_at.elapsed().saturating_sub(job.scaling);
        let pictures: Vec<&Picture> = job.pictures.iter().map(AsRef::as_ref).collect();
        let request = job.question.request(&pictures, job.clip.as_ref());
        let result = engine.describe(&request, &mut |event| {
            if self.mailbox.epoch() != epoch {
                return ControlFlow::Break(());
            }
            if let Event::Text { text, tokens } = event
                && job.question.partial
            {
                let mut answer = Answer::new(text);
                answer.tokens = tokens;
                // Nobody knows yet which it will be.
                answer.probability = Some(1.0);
                self.say_in(epoch, |events| {
                    events.partial(Narrated {
                        caption: caption(&job, info, answer, true),
                        epoch,
                        queue,
                    })
                });
            }
            ControlFlow::Continue(())
        });
        // Told when the worker ends of it.
        if let Err(error) = &result
            && error.kind == ErrorKind::Device
        {
            return Err(error.clone());
        }
        // What nobody waits for any more is nobody's failure either.
        self.say_in(epoch, |events| match result {
            Ok(answer) => events.caption(Narrated {
                caption: caption(&job, info, answer, false),
                epoch,
                queue,
            }),
            Err(error) => events.failed(epoch, &job.stamp, &error),
        });
        self.recycle(job);
        Ok(())
    }

    /// Keeps the memory of as many pictures as a job has.
    fn recycle(&self, job: Job) {
        let count = job.pictures.len();
        let pictures = job.pictures.into_iter();
        let memory = pictures.filter_map(|picture| Some(Arc::into_inner(picture)?.rgb));
        let mut spare = self.spare.lock().unwrap();
        spare.extend(memory);
        spare.truncate(count);
    }
}

fn caption(job: &Job, info: &EngineInfo, answer: Answer, partial: bool) -> Caption {
    Caption {
        stamp: job.stamp,
        arrival_time: None,
        text: printable(answer.text),
        element: String::new(),
        prompt: job.question.prompt.clone(),
        model: info.model.clone(),
        revision: info.revision.clone(),
        device: info.device.clone(),
        device_name: info.device_name.clone(),
        device_memory: info.device_memory,
        sequence: 0,
        tokens: answer.tokens.try_into().unwrap_or(u32::MAX),
        probability: answer.probability,
        truncated: answer.truncated,
        repeated: false,
        partial,
        cost: Cost {
            latency: job.sampled_at.elapsed(),
            preprocess: job.scaling + answer.timings.preprocess,
            vision: answer.timings.vision,
            prefill: answer.timings.prefill,
            decode: answer.timings.decode,
        },
    }
}

/// A model may say anything, GLib's strings end at a NUL, and terminals obey the other control characters.
fn printable(text: String) -> String {
    let is_bad = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    match text.contains(is_bad) {
        true => text.replace(is_bad, "\u{fffd}"),
        false => text,
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message")
        .to_owned()
}
/// Who decodes, draws or plays goes before who describes.
#[cfg_attr(target_os = "linux", expect(unsafe_code, reason = "setpriority"))]
fn lower_priority(nice: u8) {
    #[cfg(target_os = "linux")]
    // SAFETY: takes no pointer. 0 is the calling thread, whose children inherit it.
    unsafe {
        // Refused, the thread runs as others do: a wish, not a need.
        let _ = libc::setpriority(libc::PRIO_PROCESS, 0, nice.into());
    }
    #[cfg(not(target_os = "linux"))]
    let _ = nice;
}
