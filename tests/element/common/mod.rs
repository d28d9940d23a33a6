//! A narrator with a fake engine, and pipelines around it.

// Each test binary uses a part of it.
#![allow(dead_code)]

pub mod engine;
pub mod gguf;
#[cfg(feature = "hub")]
pub mod hub;
pub mod leaks;
pub mod programs;

use std::{
    sync::Once,
    time::{Duration, Instant},
};

pub use engine::Fake;
use gst::{ClockTime, glib, prelude::*};
use gstvlmnarrate::{Caption, VlmNarrate, VlmNarrateOverlay};

/// Longer than anything here should take on a busy machine.
pub const TIMEOUT: ClockTime = ClockTime::from_seconds(30);

pub fn init() {
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        gst::init().unwrap();
        // What G_DEBUG=fatal-warnings does; that variable is read before main().
        glib::log_set_always_fatal(
            glib::LogLevels::LEVEL_CRITICAL | glib::LogLevels::LEVEL_WARNING,
        );
        gstvlmnarrate::plugin_register_static().unwrap();
        leaks::watch();
    });
}

pub fn ms(ms: u64) -> ClockTime {
    ClockTime::from_mseconds(ms)
}

/// A narrator on a fake engine, with a bus of its own.
#[track_caller]
pub fn narrator(fake: &Fake) -> VlmNarrate {
    init();
    let element = gst::ElementFactory::make("vlmnarrate").build().unwrap();
    let element = element.downcast::<VlmNarrate>().unwrap();
    element.set_engine_loader(fake.clone());
    element
}

/// A count of the `stats`.
pub fn stat(narrator: &VlmNarrate, name: &str) -> u64 {
    let stats = narrator.property::<gst::Structure>("stats");
    stats.get(name).unwrap()
}

/// Plays 100 frames a second, of which every other is described, until it is sought elsewhere.
#[track_caller]
pub fn sought(fake: &Fake) -> Pipeline {
    let pipeline = Pipeline::new(
        "videotestsrc pattern=blink ! video/x-raw,width=64,height=48,framerate=100/1
         ! vlmnarrate name=n interval=20000000 n.src ! queue ! fakesink sync=true
         n.text_src ! queue ! fakesink sync=true",
        fake,
    );
    pipeline.reach(gst::State::Playing);
    pipeline
}

/// After whatever seeks: the last one has all its captions and no others, with the model that was there.
#[track_caller]
pub fn ends_normally(pipeline: &Pipeline, fake: &Fake, captions: u64) {
    pipeline.pipeline.state(TIMEOUT).0.unwrap();
    pipeline.log.heard();
    let (start, set) = (ClockTime::from_seconds(1000), gst::SeekType::Set);
    let stop = start + ms(20 * captions);
    let flags = gst::SeekFlags::FLUSH | gst::SeekFlags::ACCURATE;
    let sought = pipeline.pipeline.seek(1.0, flags, set, start, set, stop);
    sought.unwrap();
    let heard = pipeline
        .log
        .wait(|heard| heard.eos || !heard.errors.is_empty());
    assert!(heard.eos && heard.warnings.is_empty(), "{heard:#?}");
    let mut times = heard.timestamps();
    times.retain(|time| *time >= start);
    let expected: Vec<_> = (0..captions).map(|i| start + ms(20 * i)).collect();
    assert_eq!(times, expected);
    assert_eq!(fake.loads().len(), 1);
}

/// The messages on a bus.
pub struct Log(gst::Bus);

/// What the messages amount to.
#[derive(Debug, Default)]
pub struct Heard {
    pub captions: Vec<Caption>,
    pub partials: Vec<Caption>,
    pub progress: Vec<(gst::ProgressType, String)>,
    pub downloads: Vec<(gst::ProgressType, String)>,
    pub infos: Vec<String>,
    pub warnings: Vec<String>,
    pub errors: Vec<(glib::Error, String)>,
    pub eos: bool,
}

impl Heard {
    pub fn timestamps(&self) -> Vec<ClockTime> {
        let timestamps = self.captions.iter().map(|c| c.stamp.timestamp.unwrap());
        timestamps.collect()
    }

    pub fn texts(&self) -> Vec<&str> {
        self.captions.iter().map(|c| c.text.as_str()).collect()
    }

    fn add(&mut self, message: &gst::Message) {
        use gst::MessageView;
        match message.view() {
            // Demuxers post element messages of their own.
            MessageView::Element(element) if element.has_name("vlmnarrate") => {
                let caption = Caption::try_from(element.structure().unwrap()).unwrap();
                let list = match caption.partial {
                    true => &mut self.partials,
                    false => &mut self.captions,
                };
                list.push(caption);
            }
            MessageView::Progress(progress) => {
                let (type_, code, text) = progress.get();
                let list = match code {
                    "load-model" => &mut self.progress,
                    "download-model" => &mut self.downloads,
                    _ => panic!("{code}"),
                };
                list.push((type_, text.to_owned()));
            }
            MessageView::Info(info) => self.infos.push(info.error().to_string()),
            MessageView::Warning(warning) => self.warnings.push(warning.error().to_string()),
            MessageView::Error(error) => {
                let source = error.src().map(|src| src.name().to_string());
                self.errors
                    .push((error.error(), source.unwrap_or_default()));
            }
            MessageView::Eos(_) => self.eos = true,
            _ => (),
        }
    }
}

impl Log {
    /// For an element outside of a pipeline.
    pub fn of(element: &impl IsA<gst::Element>) -> Self {
        let bus = gst::Bus::new();
        element.set_bus(Some(&bus));
        Self(bus)
    }

    /// All that was posted until now.
    pub fn heard(&self) -> Heard {
        let mut heard = Heard::default();
        while let Some(message) = self.0.pop() {
            heard.add(&message);
        }
        heard
    }

    /// All that is posted until `enough` says so.
    #[track_caller]
    pub fn wait(&self, enough: impl Fn(&Heard) -> bool) -> Heard {
        let mut heard = Heard::default();
        let end = Instant::now() + Duration::from(TIMEOUT);
        while !enough(&heard) {
            let left = end.saturating_duration_since(Instant::now());
            let left = ClockTime::try_from(left).unwrap();
            match self.0.timed_pop(left) {
                Some(message) => heard.add(&message),
                None => panic!("waited in vain; heard {heard:#?}"),
            }
        }
        heard
    }
}

/// Messages that wait hold their element, which holds the bus.
impl Drop for Log {
    fn drop(&mut self) {
        self.0.set_flushing(true);
    }
}

/// A pipeline with a narrator named `n` in it, alone or in an overlay.
pub struct Pipeline {
    pub pipeline: gst::Pipeline,
    pub narrator: VlmNarrate,
    pub log: Log,
}

impl Pipeline {
    #[track_caller]
    pub fn new(description: &str, fake: &Fake) -> Self {
        let pipeline = Self::with_default_engine(description);
        pipeline.narrator.set_engine_loader(fake.clone());
        pipeline
    }

    /// A pipeline whose narrator has the engine that it has by itself.
    #[track_caller]
    pub fn with_default_engine(description: &str) -> Self {
        init();
        let pipeline = gst::parse::launch(description).unwrap();
        let pipeline = pipeline.downcast::<gst::Pipeline>().unwrap();
        let narrator = pipeline.by_name("n").unwrap();
        let narrator = narrator.downcast::<VlmNarrate>().unwrap_or_else(|bin| {
            let bin = bin.downcast::<VlmNarrateOverlay>().unwrap();
            bin.narrator().clone()
        });
        let log = Log(pipeline.bus().unwrap());
        Self {
            pipeline,
            narrator,
            log,
        }
    }

    pub fn element(&self, name: &str) -> gst::Element {
        self.pipeline.by_name(name).unwrap()
    }

    #[track_caller]
    pub fn play(&self) {
        self.pipeline.set_state(gst::State::Playing).unwrap();
    }

    /// Goes to a state and is there.
    #[track_caller]
    pub fn reach(&self, state: gst::State) {
        self.pipeline.set_state(state).unwrap();
        self.pipeline.state(TIMEOUT).0.unwrap();
    }

    /// Plays to the end, of the stream or of the tether.
    #[track_caller]
    pub fn run(&self) -> Heard {
        self.play();
        let heard = self.log.wait(|heard| heard.eos || !heard.errors.is_empty());
        self.pipeline.set_state(gst::State::Null).unwrap();
        heard
    }

    /// Plays to the end of the stream, whatever happens on the way.
    #[track_caller]
    pub fn run_past_errors(&self) -> Heard {
        self.play();
        let heard = self.log.wait(|heard| heard.eos);
        self.pipeline.set_state(gst::State::Null).unwrap();
        heard
    }

    /// Plays for a while, which must not be the stream's length.
    #[track_caller]
    pub fn run_for(&self, time: Duration) -> Heard {
        self.play();
        std::thread::sleep(time);
        let heard = self.log.heard();
        self.pipeline.set_state(gst::State::Null).unwrap();
        heard
    }

    /// [Runs](Self::run) and is not content with less than EOS.
    #[track_caller]
    pub fn run_to_eos(&self) -> Heard {
        let heard = self.run();
        assert!(heard.eos, "{:#?}", heard.errors);
        heard
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        let _ = self.pipeline.set_state(gst::State::Null);
    }
}

/// Collects what comes out of an `appsink`-less pipeline at some pad: buffers and gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    Buffer {
        pts: Option<ClockTime>,
        duration: Option<ClockTime>,
        text: Option<String>,
    },
    Gap(ClockTime, Option<ClockTime>),
    Event(gst::EventType),
}

pub type Items = std::sync::Arc<std::sync::Mutex<Vec<Item>>>;

/// Notes what passes a pad, in order.
pub fn spy(pad: &gst::Pad) -> Items {
    let items = Items::default();
    let noted = items.clone();
    let mask = gst::PadProbeType::BUFFER
        | gst::PadProbeType::EVENT_DOWNSTREAM
        | gst::PadProbeType::EVENT_FLUSH;
    pad.add_probe(mask, move |_, info| {
        let item = match &info.data {
            Some(gst::PadProbeData::Buffer(buffer)) => Item::Buffer {
                pts: buffer.pts(),
                duration: buffer.duration(),
                text: (buffer.size() < 1000)
                    .then(|| buffer.map_readable().unwrap().to_vec())
                    .and_then(|bytes| String::from_utf8(bytes).ok()),
            },
            Some(gst::PadProbeData::Event(event)) => match event.view() {
                gst::EventView::Gap(gap) => Item::Gap(gap.get().0, gap.get().1),
                _ => Item::Event(event.type_()),
            },
            _ => return gst::PadProbeReturn::Ok,
        };
        noted.lock().unwrap().push(item);
        gst::PadProbeReturn::Ok
    });
    items
}

/// A harness around a narrator in recorded mode, and its bus.
pub fn harness(fake: &Fake, caps: &str) -> (gst_check::Harness, VlmNarrate, Log) {
    let element = narrator(fake);
    let (harness, log) = harness_with(&element, caps);
    (harness, element, log)
}

/// The same around one that has its settings.
pub fn harness_with(element: &VlmNarrate, caps: &str) -> (gst_check::Harness, Log) {
    // Harnesses are live.
    element.set_property_from_str("mode", "recorded");
    let log = Log::of(element);
    let mut harness = gst_check::Harness::with_element(element, Some("sink"), Some("src"));
    harness.set_src_caps_str(caps);
    harness.play();
    (harness, log)
}

/// A buffer of so many bytes of `value`, at a time.
pub fn buffer(size: usize, value: u8, pts: impl Into<Option<ClockTime>>) -> gst::Buffer {
    let mut buffer = gst::Buffer::from_slice(vec![value; size]);
    let fresh = buffer.get_mut().unwrap();
    fresh.set_pts(pts);
    buffer
}
