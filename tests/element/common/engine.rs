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
    ErrorKind, Event, Found, ImageSize, LoadObserver, ModelSettings, Observer, Priority, Request,
    Sampling, Timings,
};

/// Behaviour of the engine; can be changed while it runs.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Error of the loader.
    pub open_error: Option<Error>,
    /// Makes the model one that must be downloaded, which fails with this error.
    pub download_error: Option<Error>,
    pub load_time: Duration,
    /// Time that others have their turn.
    pub turn_time: Duration,
    /// Error at the end of the load.
    pub load_error: Option<Error>,
    /// Time before the first word of a caption.
    pub caption_time: Duration,
    /// Time for each word of a caption.
    pub word_time: Duration,
    /// Does not notice before the first word that it is cancelled.
    pub ignores_cancel: bool,
    /// Number of the caption, from 0, that fails.
    pub fails_at: Option<usize>,
    /// Kind of the error with which each caption fails.
    pub fails_with: Option<ErrorKind>,
    /// Number of the caption at which the device fails.
    pub device_fails_at: Option<usize>,
    /// Number of the caption that panics.
    pub panics_at: Option<usize>,
    /// Time that the destructor of the engine takes.
    pub drop_time: Duration,
    /// Text of captions; by default the mean colour of the picture.
    pub text: Option<String>,
    /// Side of the pictures that the model prefers.
    pub image_size: ImageSize,
    /// Probability of captions.
    pub probability: Option<f64>,
}

/// A request that the engine received.
#[derive(Clone, Debug, PartialEq)]
pub struct ReceivedRequest {
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

/// A loader of fake engines; clones share one state.
#[derive(Clone)]
pub struct Fake(Arc<Shared>);

struct Shared {
    plan: Mutex<Plan>,
    requests: Mutex<Vec<ReceivedRequest>>,
    loads: Mutex<Vec<ModelSettings>>,
    /// Number of engines that exist.
    engines: AtomicUsize,
    /// Maximum of that number.
    most_engines: AtomicUsize,
    cancelled: AtomicUsize,
}

/// Side of the pictures that the fake model prefers by default.
pub const SIDE: u32 = 32;
/// Tokens of each word, reported together.
pub const PER_WORD: usize = 2;

impl Fake {
    pub fn new() -> Self {
        Self(Arc::new(Shared {
            plan: Mutex::new(Plan {
                open_error: None,
                load_time: Duration::ZERO,
                turn_time: Duration::ZERO,
                load_error: None,
                caption_time: Duration::ZERO,
                word_time: Duration::ZERO,
                ignores_cancel: false,
                fails_at: None,
                fails_with: None,
                download_error: None,
                device_fails_at: None,
                panics_at: None,
                drop_time: Duration::ZERO,
                text: None,
                image_size: ImageSize::Square(SIDE),
                probability: Some(1.0),
            }),
            requests: Mutex::default(),
            loads: Mutex::default(),
            engines: AtomicUsize::new(0),
            most_engines: AtomicUsize::new(0),
            cancelled: AtomicUsize::new(0),
        }))
    }

    /// A fake that takes this time for a caption.
    pub fn slow(caption: Duration) -> Self {
        let fake = Self::new();
        fake.plan().caption_time = caption;
        fake
    }

    pub fn plan(&self) -> MutexGuard<'_, Plan> {
        self.0.plan.lock().unwrap()
    }

    pub fn requests(&self) -> Vec<ReceivedRequest> {
        self.0.requests.lock().unwrap().clone()
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

    /// Number of loads and captions that were cancelled.
    pub fn cancelled(&self) -> usize {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// Waits for the `n`th request, from 1.
    #[track_caller]
    pub fn wait_requests(&self, n: usize) {
        wait_for(|| self.requests().len() >= n);
    }
}

#[track_caller]
pub fn wait_for(condition: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from(super::TIMEOUT);
    while !condition() {
        assert!(Instant::now() < end, "waited in vain");
        thread::sleep(Duration::from_millis(1));
    }
}

impl EngineLoader for Fake {
    fn open(&self, settings: &ModelSettings) -> Result<Found, Error> {
        self.0.loads.lock().unwrap().push(settings.clone());
        let plan = self.plan().clone();
        match plan.open_error {
            Some(error) => Err(error),
            None if plan.download_error.is_some() => Ok(Found::ToDownload(Arc::new(self.clone()))),
            None => Ok(Found::Ready(Arc::new(self.clone()))),
        }
    }
}

impl Download for Fake {
    fn name(&self) -> &str {
        "fake"
    }

    fn download(&self, _: &mut DownloadObserver<'_>) -> Result<Arc<dyn Checkpoint>, Error> {
        match self.plan().download_error.clone() {
            Some(error) => Err(error),
            None => Ok(Arc::new(self.clone())),
        }
    }
}

impl Checkpoint for Fake {
    fn name(&self) -> &str {
        "fake"
    }

    fn image_size(&self) -> ImageSize {
        self.plan().image_size
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
            while start.elapsed() < plan.load_time * step / 10 {
                thread::sleep(Duration::from_millis(1));
            }
            if watch(step.into(), 10).is_break() {
                self.0.cancelled.fetch_add(1, Ordering::SeqCst);
                return Err(Error::cancelled());
            }
        }
        match plan.load_error {
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
        let leaving = self.0.plan().drop_time;
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
        info.dtype = "f64".into();
        info.quantization = "q1-0".into();
        info.weights_memory = 9;
        info
    }

    fn wait_turn(&mut self, _: Priority, watch: &mut Observer<'_>) -> Result<(), Error> {
        let end = Instant::now() + self.0.plan().turn_time;
        while Instant::now() < end {
            thread::sleep(Duration::from_millis(1));
            if watch(Event::Layer).is_break() {
                return Err(Error::cancelled());
            }
        }
        Ok(())
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
            let mut requests = self.0.0.requests.lock().unwrap();
            requests.push(ReceivedRequest {
                prompt: request.prompt.to_owned(),
                system: request.system.map(str::to_owned),
                max_tokens: request.max_tokens,
                sampling: request.sampling,
                side: picture.width,
                splitting: request.whole_frames,
                pictures: request.pictures.len(),
                clip: request.clip.cloned(),
            });
            requests.len() - 1
        };
        if plan.panics_at == Some(number) {
            panic!("as planned");
        }
        let cancelled = || {
            self.0.0.cancelled.fetch_add(1, Ordering::SeqCst);
            Error::cancelled()
        };
        while start.elapsed() < plan.caption_time {
            thread::sleep(Duration::from_millis(1).min(plan.caption_time));
            if !plan.ignores_cancel && watch(Event::Layer) == ControlFlow::Break(()) {
                return Err(cancelled());
            }
        }
        if plan.device_fails_at == Some(number) {
            return Err(Error::new(
                ErrorKind::Device,
                "the device failed as planned",
            ));
        }
        let fails = (plan.fails_at == Some(number)).then_some(ErrorKind::Failed);
        if let Some(kind) = plan.fails_with.or(fails) {
            return Err(Error::new(kind, "failed as planned"));
        }
        let text = plan.text.unwrap_or_else(|| {
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
            thread::sleep(plan.word_time);
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
        answer.probability = plan.probability;
        answer.timings = Timings {
            preprocess: Duration::from_micros(10),
            vision: start.elapsed(),
            prefill: Duration::from_micros(20),
            decode: Duration::from_micros(30),
        };
        Ok(answer)
    }
}
