//! Failures of the engine: each is reported once, stops no live video, and is over when its cause is.

use std::{
    ops::ControlFlow,
    process::{Command, Stdio},
    sync::Arc,
};

use crate::{
    broken_streams::{CAPS, pass, with_text},
    common::{Fake, Heard, Item, Log, Pipeline, engine::wait_for, ms, programs::Said, spy, stat},
};
use gst::prelude::*;
use gstvlmnarrate::SmolVlmLoader;
use gstvlmnarrate::engine::{
    Answer, Checkpoint, Engine, EngineInfo, EngineLoader, Error, ErrorKind, Found, LoadObserver,
    ModelSettings, Observer, Request,
};

/// Errors of the narrator, without those of the source that it stopped.
pub(crate) fn errors(heard: &Heard) -> Vec<String> {
    let ours = heard.errors.iter().filter(|(_, source)| source == "n");
    ours.map(|(error, _)| error.to_string()).collect()
}

#[test]
fn a_worker_that_fails_says_so_once_and_ready_mends_it() {
    type Break = fn(&Fake);
    let panics: Break = |fake| fake.plan().panics_at = Some(1);
    let cannot_load: Break = |fake| {
        fake.plan().load_error = Some(Error::new(ErrorKind::OpenRead, "torn"));
    };
    let device_fails: Break = |fake| fake.plan().device_fails_at = Some(1);
    for (break_it, says) in [
        (panics, "panicked"),
        (cannot_load, "torn"),
        (device_fails, "the device failed"),
    ] {
        for live in [true, false] {
            let fake = Fake::new();
            break_it(&fake);
            let pipeline = Pipeline::new(
                &format!(
                    "videotestsrc is-live={live} ! video/x-raw,width=64,height=48,framerate=50/1
                     ! vlmnarrate name=n interval=40000000 ! fakesink async=false"
                ),
                &fake,
            );
            let passed = spy(&pipeline.narrator.static_pad("src").unwrap());
            let passed = || passed.lock().unwrap().len();
            pipeline.play();
            let heard = pipeline.log.wait(|heard| !heard.errors.is_empty());
            assert!(errors(&heard)[0].contains(says), "{heard:#?}");
            if live {
                let frames = passed();
                wait_for(|| passed() > frames + 10);
            }
            let heard = pipeline.log.heard();
            assert_eq!(errors(&heard), [""; 0], "said before");
            assert_eq!(heard.warnings, [""; 0]);

            pipeline.reach(gst::State::Ready);
            fake.plan().panics_at = None;
            fake.plan().load_error = None;
            fake.plan().device_fails_at = None;
            pipeline.log.heard();
            pipeline.play();
            let heard = pipeline
                .log
                .wait(|heard| heard.captions.len() > 2 || !heard.errors.is_empty());
            assert_eq!(errors(&heard), [""; 0]);
            assert_eq!(fake.loads().len(), 2);
            drop(pipeline);
            wait_for(|| fake.engines() == 0);
        }
    }
}

#[test]
fn a_worker_that_fails_before_its_first_frame_is_not_tried_again_at_once() {
    let fake = Fake::new();
    fake.plan().load_error = Some(Error::new(ErrorKind::OpenRead, "torn"));
    let element = crate::common::narrator(&fake);
    let log = Log::of(&element);
    element.set_state(gst::State::Ready).unwrap();
    log.wait(|heard| !heard.errors.is_empty());
    element.set_state(gst::State::Paused).unwrap();
    assert_eq!(fake.loads().len(), 1);
    element.set_state(gst::State::Ready).unwrap();
    element.set_state(gst::State::Paused).unwrap();
    assert_eq!(fake.loads().len(), 2);
    log.wait(|heard| !heard.errors.is_empty());
    element.set_state(gst::State::Null).unwrap();
    assert_eq!(log.heard().errors.len(), 0);
}

#[test]
fn each_caption_that_fails_is_one_warning() {
    for live in [true, false] {
        let fake = Fake::new();
        fake.plan().fails_with = Some(ErrorKind::Failed);
        let pipeline = Pipeline::new(
            &format!(
                "videotestsrc is-live={live} num-buffers=20
                 ! video/x-raw,width=64,height=48,framerate=50/1
                 ! vlmnarrate name=n interval=0 ! fakesink async=false"
            ),
            &fake,
        );
        let passed = spy(&pipeline.narrator.static_pad("src").unwrap());
        let heard = pipeline.run_to_eos();
        let passed = passed.lock().unwrap().clone();
        let buffers = passed.iter().filter(|i| matches!(i, Item::Buffer { .. }));
        assert_eq!(buffers.count(), 20);
        assert_eq!(heard.captions.len(), 0);
        let requests = fake.requests().len();
        assert!(requests > 0 && (live || requests == 20), "{requests}");
        assert_eq!(heard.warnings.len(), requests, "{heard:#?}");
        assert_eq!(stat(&pipeline.narrator, "errors"), requests as u64);
        let mut warnings = heard.warnings;
        warnings.dedup();
        assert_eq!(warnings.len(), requests, "each names its frame");

        fake.plan().fails_with = None;
        let heard = pipeline.run_to_eos();
        assert!(!heard.captions.is_empty() && heard.warnings.is_empty());
    }
}

#[test]
fn a_server_that_is_away_is_one_warning_and_no_recorded_frame_is_lost() {
    for live in [true, false] {
        let fake = Fake::new();
        fake.plan().fails_with = Some(ErrorKind::Unavailable);
        let line = format!(
            "videotestsrc is-live={live} num-buffers=20
             ! video/x-raw,width=64,height=48,framerate=50/1
             ! vlmnarrate name=n interval=0 ! fakesink async=false"
        );
        let pipeline = Pipeline::new(&line, &fake);
        pipeline.play();
        fake.wait_requests(3);
        let unanswered = stat(&pipeline.narrator, "unanswered");
        assert_eq!(unanswered > 0, live);
        fake.plan().fails_with = None;
        let heard = pipeline.log.wait(|heard| heard.eos);
        assert_eq!(
            (heard.warnings.len(), heard.infos.len()),
            (1, 1),
            "{heard:#?}"
        );
        assert_eq!(stat(&pipeline.narrator, "errors"), 0);
        let captions = heard.captions.len();
        assert!(captions > 0 && (live || captions == 20), "{captions}");
    }
}

#[test]
fn a_model_that_is_unavailable_for_now_is_a_busy_resource() {
    type Break = fn(&Fake, Option<Error>);
    let open: Break = |fake, error| fake.plan().open_error = error;
    let download: Break = |fake, error| fake.plan().download_error = error;
    let load: Break = |fake, error| fake.plan().load_error = error;
    for break_it in [open, download, load] {
        let fake = Fake::new();
        let error = Error::new(ErrorKind::Unavailable, "the server is overloaded");
        break_it(&fake, Some(error));
        let element = crate::common::narrator(&fake);
        let log = Log::of(&element);
        let _ = element.set_state(gst::State::Ready);
        let heard = log.wait(|heard| !heard.errors.is_empty());
        let (error, _) = &heard.errors[0];
        assert!(error.matches(gst::ResourceError::Busy), "{error:?}");
        let text = error.message();
        assert!(
            text.contains("overloaded") && text.contains("later"),
            "{text}"
        );
        // Later it is there.
        element.set_state(gst::State::Null).unwrap();
        break_it(&fake, None);
        element.set_state(gst::State::Ready).unwrap();
        let heard = log.wait(|heard| {
            let last = heard.progress.last();
            last.is_some_and(|(type_, _)| *type_ == gst::ProgressType::Complete)
        });
        assert_eq!(heard.errors.len(), 0);
        element.set_state(gst::State::Null).unwrap();
    }
}

/// SmolVLM, with a panic in the midst of it, on one of its own threads.
struct PanicsInside;

struct Inside(Box<dyn Engine>);

impl EngineLoader for PanicsInside {
    fn open(&self, settings: &ModelSettings) -> Result<Found, Error> {
        match SmolVlmLoader.open(settings)? {
            Found::Ready(checkpoint) => Ok(Found::Ready(Arc::new(InsideCheckpoint(checkpoint)))),
            remote => Ok(remote),
        }
    }
}

struct InsideCheckpoint(Arc<dyn Checkpoint>);

impl Checkpoint for InsideCheckpoint {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn image_size(&self) -> gstvlmnarrate::engine::ImageSize {
        self.0.image_size()
    }

    fn check_image_size(&self, side: u32) -> Result<(), Error> {
        self.0.check_image_size(side)
    }

    fn load(&self, watch: &mut LoadObserver<'_>) -> Result<Box<dyn Engine>, Error> {
        Ok(Box::new(Inside(self.0.load(watch)?)))
    }
}

impl Engine for Inside {
    fn info(&self) -> EngineInfo {
        self.0.info()
    }

    fn describe(&mut self, request: &Request<'_>, _: &mut Observer<'_>) -> Result<Answer, Error> {
        self.0.describe(request, &mut |_| -> ControlFlow<()> {
            panic!("as planned");
        })
    }
}

/// For a process of its own, in which whatever is printed to either stream goes to stderr.
const QUIET: &str = "FAULTS_QUIET";

/// Everything that goes wrong here in one process, which prints nothing.
#[test]
fn nothing_is_printed() {
    if std::env::var_os(QUIET).is_some() {
        #[expect(unsafe_code, reason = "dup2")]
        // SAFETY: both are open, and nobody holds on to what 1 was.
        let copied = unsafe { libc::dup2(2, 1) };
        assert_eq!(copied, 1);
        all_goes_wrong();
        // Before the harness says how it went.
        std::process::exit(0);
    }
    let quiet = || {
        let mut quiet = Command::new(std::env::current_exe().unwrap());
        quiet
            .args(["--exact", "faults::nothing_is_printed", "--nocapture"])
            .env(QUIET, "1")
            .env_remove("GST_DEBUG")
            .stdin(Stdio::null());
        quiet
    };
    for backtrace in ["0", "1"] {
        let output = quiet().env("RUST_BACKTRACE", backtrace).output().unwrap();
        let said = Said::from(output);
        assert_eq!(
            (said.status, said.err.as_str()),
            (Some(0), ""),
            "{}",
            said.out
        );
    }
    // It is all in the log, where it is wanted.
    let log = quiet().env("GST_DEBUG", "vlmnarrate:1").output().unwrap();
    let log = Said::from(log).err;
    assert_eq!(log.matches("as planned").count(), PANICS, "{log}");
}

/// So many of what [`all_goes_wrong`] does are panics.
const PANICS: usize = 4;

fn all_goes_wrong() {
    let line = |live| {
        format!(
            "videotestsrc is-live={live} num-buffers=10 ! video/x-raw,width=64,height=48,framerate=50/1
             ! vlmnarrate name=n interval=40000000 ! fakesink async=false"
        )
    };
    for live in [true, false] {
        for plan in ["panic", "fail", "load", "open"] {
            let fake = Fake::new();
            let error = || Some(Error::new(ErrorKind::Failed, "as was to be expected"));
            match plan {
                "panic" => fake.plan().panics_at = Some(1),
                "fail" => fake.plan().fails_with = Some(ErrorKind::Failed),
                "load" => fake.plan().load_error = error(),
                _ => fake.plan().open_error = error(),
            }
            let pipeline = Pipeline::new(&line(live), &fake);
            if plan == "open" {
                assert!(pipeline.pipeline.set_state(gst::State::Playing).is_err());
                continue;
            }
            let heard = pipeline.run();
            let told = heard.errors.len() + heard.warnings.len();
            assert!(told > 0, "{heard:#?}");
        }
        let pipeline = Pipeline::new(&line(live), &Fake::new());
        pipeline.narrator.set_engine_loader(PanicsInside);
        pipeline.play();
        pipeline.log.wait(|heard| !errors(heard).is_empty());
    }
    for mode in ["live", "recorded"] {
        let (mut harness, _narrator, log, _) = with_text(mode, CAPS);
        pass(&mut harness, crate::common::buffer(60, 0, ms(0)));
        log.wait(|heard| !heard.warnings.is_empty());
    }
}

/// Panics of threads that are not ours are the application's business.
#[test]
fn panics_of_others_are_heard_as_before() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static HEARD: AtomicUsize = AtomicUsize::new(0);
    std::panic::set_hook(Box::new(|_| {
        HEARD.fetch_add(1, Ordering::SeqCst);
    }));
    let fake = Fake::new();
    fake.plan().panics_at = Some(0);
    let pipeline = Pipeline::new(
        "videotestsrc ! video/x-raw,framerate=1/1 ! vlmnarrate name=n ! fakesink",
        &fake,
    );
    assert_eq!(errors(&pipeline.run()).len(), 1);
    assert_eq!(HEARD.load(Ordering::SeqCst), 0);
    // Whatever they are called.
    for (heard, name) in ["other", "candle-bp-0", "vlmnarrate", "vlmnarrate-cpu0"]
        .iter()
        .enumerate()
    {
        let other = std::thread::Builder::new().name((*name).into());
        let other = other.spawn(|| panic!("as planned")).unwrap();
        assert!(other.join().is_err());
        assert_eq!(HEARD.load(Ordering::SeqCst), heard + 1, "{name}");
    }
}
