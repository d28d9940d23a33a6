//! An engine without a model.

use std::{
    ops::ControlFlow,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use gstvlmnarrate::engine::{
    Answer, Checkpoint, Clip, Download, DownloadObserver, Engine, EngineInfo, EngineLoader, Error,
    ErrorKind, Event, Found, LoadObserver, ModelSettings, Observer, Request, Sampling, Timings,
};

/// What the engine does; can be changed while it runs.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Fails to open.
    pub open: Option<Error>,
    pub loading: Duration,
    /// Fails to load.
    pub load: Option<Error>,
    pub caption: Duration,
    /// From one word of it to the next.
    pub word: Duration,
    /// Doesn't look up from its work when it is cancelled.
    pub deaf: bool,
    /// Number of the caption, counted from 0, that fails.
    pub fail: Option<usize>,
    /// Each caption fails, with this kind of error.
    pub broken: Option<ErrorKind>,
    /// The model must be downloaded, which fails.
    pub download: Option<Error>,
    /// Number of the caption at which the device fails.
    pub dead: Option<usize>,
    /// Number of the caption that panics.
    pub panic: Option<usize>,
    /// Time that an engine needs to go.
    pub leaving: Duration,
    /// What it says; by default something that tells pictures apart.
    pub say: Option<String>,
}

/// What it was asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    pub prompt: String,
    pub system: Option<String>,
    pub max_tokens: usize,
    pub sampling: Sampling,
    /// Width of the last picture.
    pub side: u32,
    pub splitting: bool,
    pub pictures: usize,
    pub clip: Option<Clip>,
}

/// A loader of fake engines; clones share one plan and one memory.
#[derive(Clone)]
pub struct Fake(Arc<Shared>);

struct Shared {
    plan: Mutex<Plan>,
    asked: Mutex<Vec<Asked>>,
    loads: Mutex<Vec<ModelSettings>>,
    /// Engines that live.
    engines: AtomicUsize,
    /// As many as ever lived at once.
    most_engines: AtomicUsize,
    cancelled: AtomicUsize,
}

/// What the fake's model was trained on.
pub const SIDE: u32 = 32;
/// Tokens of each word, told of together.
pub const PER_WORD: usize = 2;

impl Fake {
    pub fn new() -> Self {
        Self(Arc::new(Shared {
            plan: Mutex::new(Plan {
                open: None,
                loading: Duration::ZERO,
                load: None,
                caption: Duration::ZERO,
                word: Duration::ZERO,
                deaf: false,
                fail: None,
                broken: None,
                download: None,
                dead: None,
                panic: None,
                leaving: Duration::ZERO,
                say: None,
            }),
            asked: Mutex::default(),
            loads: Mutex::default(),
            engines: AtomicUsize::new(0),
            most_engines: AtomicUsize::new(0),
            cancelled: AtomicUsize::new(0),
        }))
    }

    /// One that needs so long for a caption.
    pub fn slow(caption: Duration) -> Self {
        let fake = Self::new();
        fake.plan().caption = caption;
        fake
    }

    pub fn plan(&self) -> MutexGuard<'_, Plan> {
        self.0.plan.lock().unwrap()
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.0.asked.lock().unwrap().clone()
    }

    pub fn loads(&self) -> Vec<ModelSettings> {
        self.0.loads.lock().unwrap().clone()
    }

    pub fn engines(&self) -> usize {
        self.0.engines.load(Ordering::SeqCst)
    }

    pub fn most_engines(&self) -> usize {
        self.0.most_engines.load(Ordering::SeqCst)
    }

    /// Loads and captions that were.
    pub fn cancelled(&self) -> usize {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// Waits until it is at its `n`th caption, counted from 1.
    #[track_caller]
    pub fn wait_asked(&self, n: usize) {
        wait_for(|| self.asked().len() >= n);
    }
}

#[track_caller]
pub fn wait_for(condition: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from(super::PATIENCE);
    while !condition() {
        assert!(Instant::now() < end, "waited in vain");
        thread::sleep(Duration::from_millis(1));
    }
}

impl EngineLoader for Fake {
    fn open(&self, settings: &ModelSettings) -> Result<Found, Error> {
        self.0.loads.lock().unwrap().push(settings.clone());
        let plan = self.plan().clone();
        match plan.open {
            Some(error) => Err(error),
            None if plan.download.is_some() => Ok(Found::ToDownload(Arc::new(self.clone()))),
            None => Ok(Found::Ready(Arc::new(self.clone()))),
        }
    }
}

impl Download for Fake {
    fn name(&self) -> &str {
        "fake"
    }

    fn download(&self, _: &mut DownloadObserver<'_>) -> Result<Arc<dyn Checkpoint>, Error> {
        match self.plan().download.clone() {
            Some(error) => Err(error),
            None => Ok(Arc::new(self.clone())),
        }
    }
}

impl Checkpoint for Fake {
    fn name(&self) -> &str {
        "fake"
    }

    fn image_size(&self) -> Option<u32> {
        Some(SIDE)
    }

    fn check_image_size(&self, side: u32) -> Result<(), Error> {
        match side % 4 {
            0 => Ok(()),
            _ => Err(Error::new(
                ErrorKind::Settings,
                format!(
                    "image-size: {side} is no multiple of 4; take {}",
                    side / 4 * 4
                ),
            )),
        }
    }

    fn load(&self, watch: &mut LoadObserver<'_>) -> Result<Box<dyn Engine>, Error> {
        let plan = self.plan().clone();
        let start = Instant::now();
        for step in 0..=10 {
            while start.elapsed() < plan.loading * step / 10 {
                thread::sleep(Duration::from_millis(1));
            }
            if watch(step.into(), 10).is_break() {
                self.0.cancelled.fetch_add(1, Ordering::SeqCst);
                return Err(Error::cancelled());
            }
        }
        match plan.load {
            Some(error) => Err(error),
            None => {
                let engines = self.0.engines.fetch_add(1, Ordering::SeqCst) + 1;
                self.0.most_engines.fetch_max(engines, Ordering::SeqCst);
                Ok(Box::new(FakeEngine(self.clone())))
            }
        }
    }
}

struct FakeEngine(Fake);

impl Drop for FakeEngine {
    fn drop(&mut self) {
        let leaving = self.0.plan().leaving;
        thread::sleep(leaving);
        self.0.0.engines.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Engine for FakeEngine {
    fn info(&self) -> EngineInfo {
        let mut info = EngineInfo::default();
        info.model = "fake".into();
        info.revision = "r1".into();
        info.device = "none".into();
        info.device_name = "a device".into();
        info.device_memory = 1 << 40;
        info
    }

    fn describe(
        &mut self,
        request: &Request<'_>,
        watch: &mut Observer<'_>,
    ) -> Result<Answer, Error> {
        let start = Instant::now();
        let plan = self.0.plan().clone();
        let times = request.clip.map(|clip| clip.times.len());
        assert_eq!(times.unwrap_or(1), request.pictures.len());
        let picture = request.pictures.last().expect("a picture");
        assert_eq!(picture.rgb.len() as u32, 3 * picture.width * picture.height);
        let number = {
            let mut asked = self.0.0.asked.lock().unwrap();
            asked.push(Asked {
                prompt: request.prompt.to_owned(),
                system: request.system.map(str::to_owned),
                max_tokens: request.max_tokens,
                sampling: request.sampling,
                side: picture.width,
                splitting: request.whole_frames,
                pictures: request.pictures.len(),
                clip: request.clip.cloned(),
            });
            asked.len() - 1
        };
        if plan.panic == Some(number) {
            panic!("as planned");
        }
        let cancelled = || {
            self.0.0.cancelled.fetch_add(1, Ordering::SeqCst);
            Error::cancelled()
        };
        while start.elapsed() < plan.caption {
            thread::sleep(Duration::from_millis(1).min(plan.caption));
            if !plan.deaf && watch(Event::Layer) == ControlFlow::Break(()) {
                return Err(cancelled());
            }
        }
        if plan.dead == Some(number) {
            return Err(Error::new(
                ErrorKind::Device,
                "the device failed as planned",
            ));
        }
        let fails = (plan.fail == Some(number)).then_some(ErrorKind::Failed);
        if let Some(kind) = plan.broken.or(fails) {
            return Err(Error::new(kind, "failed as planned"));
        }
        let text = plan.say.unwrap_or_else(|| {
            // The average colour tells the test pictures apart.
            let sum = |channel| {
                picture
                    .rgb
                    .iter()
                    .skip(channel)
                    .step_by(3)
                    .map(|b| *b as u64)
            };
            let mean = [0, 1, 2].map(|c| sum(c).sum::<u64>() / (picture.rgb.len() as u64 / 3));
            format!("mean colour {mean:?}")
        });
        let words: Vec<_> = text.split_inclusive(' ').take(request.max_tokens).collect();
        let mut so_far = String::new();
        let mut tokens = 0;
        for word in &words {
            thread::sleep(plan.word);
            so_far += word;
            tokens += PER_WORD;
            let event = Event::Text {
                text: &so_far,
                tokens,
            };
            if watch(event) == ControlFlow::Break(()) {
                return Err(cancelled());
            }
        }
        let mut answer = Answer::new(so_far.trim_end());
        answer.truncated = so_far.len() < text.len();
        answer.tokens = tokens;
        answer.probability = Some(1.0);
        answer.timings = Timings {
            preprocess: Duration::from_micros(10),
            vision: start.elapsed(),
            prefill: Duration::from_micros(20),
            decode: Duration::from_micros(30),
        };
        Ok(answer)
    }
}
