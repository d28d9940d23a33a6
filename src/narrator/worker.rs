//! The thread that owns the engine.

use std::{
    any::Any,
    io,
    ops::ControlFlow,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    engine::{
        Checkpoint, Description, Engine, EngineInfo, Error, ErrorKind, Event, Picture, Request,
        Sampling,
    },
    mailbox::{Epoch, Mailbox, Refused, Wait},
};
use crate::caption::{Caption, Cost, FrameStamp};

/// What to say about a frame.
#[derive(Clone, Debug)]
pub struct Question {
    /// The picture is the whole frame, to be cut into tiles.
    pub splitting: bool,
    pub system: Option<String>,
    pub prompt: String,
    pub max_tokens: u32,
    pub sampling: Sampling,
    pub stop_strings: Vec<String>,
    /// What the caption is one of; empty for anything.
    pub choices: Vec<String>,
    /// Tell of the text at each token.
    pub partial: bool,
}

/// One frame to describe.
#[derive(Clone, Debug)]
pub struct Job {
    pub picture: Arc<Picture>,
    pub stamp: FrameStamp,
    pub question: Question,
    /// When the frame was taken from the stream.
    pub sampled_at: Instant,
    /// How long the scaling took.
    pub scaling: Duration,
}

/// A caption, whole or partial, and what only the statistics want to know.
#[derive(Debug)]
pub struct Narrated {
    /// Its `sequence` and `arrival_time` are for the listener to fill in.
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

/// Why there won't be another caption.
#[derive(Debug)]
pub enum Death {
    NotLoaded(Error),
    Panicked(String),
}

/// Who listens to the worker. Called on the worker's thread, with no lock held, before anyone who
/// waits for the job is woken.
pub trait Events: Send + Sync {
    fn load(&self, load: Load<'_>);
    fn partial(&self, narrated: Narrated);
    fn caption(&self, narrated: Narrated);
    fn failed(&self, epoch: Epoch, stamp: &FrameStamp, error: &Error);
    fn died(&self, death: Death);
}

/// The element's end of a worker.
///
/// To let go of it never blocks: the thread finds out at the next layer or token, frees the model
/// and ends.
pub struct Narrator(Arc<Shared>);

struct Shared {
    mailbox: Mailbox<Job>,
    events: Box<dyn Events>,
    /// Whoever sets it tells how the load ended.
    load_ended: AtomicBool,
    /// The last picture's memory.
    spare: Mutex<Vec<u8>>,
}

impl Narrator {
    /// Starts a thread that loads the model and then waits for jobs.
    pub fn spawn(checkpoint: Arc<dyn Checkpoint>, events: Box<dyn Events>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            mailbox: Mailbox::new(),
            events,
            load_ended: AtomicBool::new(false),
            spare: Mutex::default(),
        });
        // Before the thread runs, so that nothing it says can come first.
        shared.events.load(Load::Started);
        thread::Builder::new()
            .name("vlmnarrate".into())
            .spawn({
                let shared = shared.clone();
                move || shared.run(checkpoint)
            })
            .inspect_err(|error| {
                let error = Error::new(ErrorKind::Failed, format!("no thread: {error}"));
                shared.end_load(Load::Failed(&error));
            })?;
        Ok(Self(shared))
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

    /// Cancels everything, the load too, for good.
    pub fn close(&self) {
        self.0.mailbox.close();
        self.0.end_load(Load::Cancelled);
    }

    pub fn check(&self) -> Result<(), Refused> {
        self.0.mailbox.check()
    }

    pub fn is_idle(&self) -> bool {
        self.0.mailbox.is_idle()
    }

    /// Whether [`ask`](Self::ask) may be called.
    pub fn has_room(&self) -> bool {
        self.0.mailbox.has_room()
    }

    /// Describe this frame, unless a newer one comes first. Says whether it replaced an older one.
    pub fn submit(&self, job: Job) -> Result<bool, Refused> {
        let replaced = self.0.mailbox.put_newest(job)?;
        Ok(replaced.map(|job| self.0.recycle(job.picture)).is_some())
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
        std::mem::take(&mut self.0.spare.lock().unwrap())
    }
}

impl Drop for Narrator {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn run(&self, checkpoint: Arc<dyn Checkpoint>) {
        // The engine lives and dies in here: one that panics in its destructor is caught too.
        let result = catch_unwind(AssertUnwindSafe(|| {
            let mut engine = self.load(checkpoint)?;
            let info = engine.info();
            while let Some((epoch, job)) = self.mailbox.take() {
                self.narrate(engine.as_mut(), &info, epoch, job);
            }
            Ok(())
        }));
        give_back_memory();
        let death = match result {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(Death::NotLoaded(error)),
            Err(panic) => Some(Death::Panicked(panic_text(panic.as_ref()))),
        };
        if let Some(death) = death
            && !self.mailbox.is_closed()
        {
            let error = match &death {
                Death::NotLoaded(error) => error,
                Death::Panicked(text) => &Error::new(ErrorKind::Failed, text.as_str()),
            };
            self.end_load(Load::Failed(error));
            self.events.died(death);
        }
        self.mailbox.die();
    }

    fn load(&self, checkpoint: Arc<dyn Checkpoint>) -> Result<Box<dyn Engine>, Error> {
        let mut throttle = Throttle::default();
        let engine = checkpoint.load(&mut |done, total| {
            if self.mailbox.is_closed() {
                return ControlFlow::Break(());
            }
            if let Some(percent) = throttle.pass(done, total) {
                self.events.load(Load::Percent(percent));
            }
            ControlFlow::Continue(())
        })?;
        self.end_load(Load::Completed);
        Ok(engine)
    }

    /// Tells how the load ended, unless that has been told.
    fn end_load(&self, end: Load<'_>) {
        if !self.load_ended.swap(true, Ordering::AcqRel) {
            self.events.load(end);
        }
    }

    fn narrate(&self, engine: &mut dyn Engine, info: &EngineInfo, epoch: Epoch, job: Job) {
        let queue = job.sampled_at.elapsed().saturating_sub(job.scaling);
        let request = Request {
            pictures: std::slice::from_ref(job.picture.as_ref()),
            splitting: job.question.splitting,
            system: job.question.system.as_deref(),
            prompt: &job.question.prompt,
            max_tokens: job.question.max_tokens as usize,
            sampling: job.question.sampling,
            stop_strings: &job.question.stop_strings,
            choices: &job.question.choices,
        };
        let mut tokens = 0;
        let result = engine.describe(&request, &mut |event| {
            if self.mailbox.epoch() != epoch {
                return ControlFlow::Break(());
            }
            if let Event::Text(text) = event {
                tokens += 1;
                if job.question.partial {
                    let description = Description {
                        text: text.to_owned(),
                        tokens,
                        truncated: false,
                        // Nobody knows yet which it will be.
                        probability: 1.0,
                        timings: Default::default(),
                    };
                    self.events.partial(Narrated {
                        caption: caption(&job, info, description, true),
                        epoch,
                        queue,
                    });
                }
            }
            ControlFlow::Continue(())
        });
        // What nobody waits for any more is nobody's failure either.
        if self.mailbox.epoch() == epoch {
            match result {
                Ok(description) => self.events.caption(Narrated {
                    caption: caption(&job, info, description, false),
                    epoch,
                    queue,
                }),
                Err(error) => self.events.failed(epoch, &job.stamp, &error),
            }
        }
        self.recycle(job.picture);
    }

    fn recycle(&self, picture: Arc<Picture>) {
        if let Ok(picture) = Arc::try_unwrap(picture) {
            *self.spare.lock().unwrap() = picture.rgb;
        }
    }
}

fn caption(job: &Job, info: &EngineInfo, description: Description, partial: bool) -> Caption {
    Caption {
        stamp: job.stamp,
        arrival_time: None,
        text: description.text,
        prompt: job.question.prompt.clone(),
        model: info.model.clone(),
        revision: info.revision.clone(),
        device: info.device.clone(),
        sequence: 0,
        tokens: description.tokens.try_into().unwrap_or(u32::MAX),
        probability: description.probability,
        truncated: description.truncated,
        partial,
        cost: Cost {
            latency: job.sampled_at.elapsed(),
            preprocess: job.scaling + description.timings.preprocess,
            vision: description.timings.vision,
            prefill: description.timings.prefill,
            decode: description.timings.decode,
        },
    }
}

/// Lets a percentage through when it is new and the last is 100 ms old.
#[derive(Default)]
struct Throttle(Option<(u8, Instant)>);

impl Throttle {
    const PERIOD: Duration = Duration::from_millis(100);

    fn pass(&mut self, done: u64, total: u64) -> Option<u8> {
        let percent = (u128::from(done) * 100)
            .checked_div(u128::from(total))
            .map_or(100, |percent| percent.min(100) as u8);
        if let Some((last, at)) = self.0
            && (percent == last || at.elapsed() < Self::PERIOD)
        {
            return None;
        }
        self.0 = Some((percent, Instant::now()));
        Some(percent)
    }
}

/// Of a model that is gone: glibc keeps for itself what was in pieces of less than 32 MiB.
fn give_back_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: takes no pointer and may be called at any time from any thread.
    unsafe {
        libc::malloc_trim(0);
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
