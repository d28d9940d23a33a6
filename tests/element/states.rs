//! State changes, loading, and failures of the engine.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use crate::common::{Fake, Log, Pipeline, engine::wait_for, narrator};
use gst::{ProgressType, prelude::*};
use gstvlmnarrate::engine::{
    Checkpoint, DType, Download, DownloadObserver, EngineLoader, Error, ErrorKind, Found,
    ModelSettings,
};

fn types(progress: &[(ProgressType, String)]) -> Vec<ProgressType> {
    progress.iter().map(|(type_, _)| *type_).collect()
}

#[test]
fn loading_is_told_from_start_to_end() {
    let fake = Fake::new();
    fake.plan().load_time = Duration::from_millis(500);
    let element = narrator(&fake);
    let log = Log::of(&element);
    let start = Instant::now();
    element.set_state(gst::State::Ready).unwrap();
    assert!(
        start.elapsed() < Duration::from_millis(400),
        "READY waited for the model"
    );
    let ended = |heard: &crate::common::Heard| {
        heard
            .progress
            .iter()
            .any(|(type_, _)| *type_ == ProgressType::Complete)
    };
    let progress = log.wait(ended).progress;
    assert_eq!(progress[0], (ProgressType::Start, "Loading fake".into()));
    let percents: Vec<_> = progress[1..progress.len() - 1].iter().collect();
    assert!(percents.len() >= 3, "{progress:?}");
    assert!(
        percents
            .iter()
            .all(|(type_, _)| *type_ == ProgressType::Continue)
    );
    assert!(percents.iter().all(|(_, text)| text.ends_with('%')));
    assert_eq!(
        progress.last(),
        Some(&(ProgressType::Complete, "Loaded fake".into()))
    );
    element.set_state(gst::State::Null).unwrap();
    wait_for(|| fake.engines() == 0);
    assert_eq!(log.heard().progress, []);
}

#[test]
fn loading_is_cancelled_by_null() {
    let fake = Fake::new();
    fake.plan().load_time = Duration::from_secs(4);
    let element = narrator(&fake);
    let log = Log::of(&element);
    element.set_state(gst::State::Ready).unwrap();
    element.set_state(gst::State::Null).unwrap();
    let heard = log.heard();
    assert_eq!(types(&heard.progress).first(), Some(&ProgressType::Start));
    assert_eq!(types(&heard.progress).last(), Some(&ProgressType::Canceled));
    assert_eq!(heard.errors.len(), 0);
    drop(element);
    // The worker finds out, and nothing comes after.
    wait_for(|| fake.cancelled() == 1);
    thread::sleep(Duration::from_millis(50));
    assert_eq!(log.heard().progress, []);
    assert_eq!(fake.engines(), 0);
}

#[test]
fn what_cannot_be_opened_is_an_error_before_the_first_buffer() {
    for (kind, class) in [
        (ErrorKind::NotFound, gst::ResourceError::NotFound),
        (ErrorKind::OpenRead, gst::ResourceError::OpenRead),
        (ErrorKind::Settings, gst::ResourceError::Settings),
        (ErrorKind::Failed, gst::ResourceError::Failed),
    ] {
        let fake = Fake::new();
        fake.plan().open_error = Some(Error::new(kind, "/x/y: no such thing. Get one"));
        let element = narrator(&fake);
        let log = Log::of(&element);
        assert!(element.set_state(gst::State::Ready).is_err());
        let heard = log.heard();
        let [(error, _)] = &heard.errors[..] else {
            panic!("{heard:?}");
        };
        assert!(error.matches(class), "{error:?}");
        assert_eq!(error.message(), "/x/y: no such thing. Get one");
        assert_eq!(heard.progress, []);
        // The way out of it.
        element.set_state(gst::State::Null).unwrap();
        fake.plan().open_error = None;
        element.set_state(gst::State::Ready).unwrap();
        element.set_state(gst::State::Null).unwrap();
    }
}

#[test]
fn an_image_size_that_the_model_cannot_take_is_an_error_in_ready() {
    let element = narrator(&Fake::new());
    let log = Log::of(&element);
    // Nobody knows yet which model it will be.
    element.set_property("image-size", 33u32);
    assert!(element.set_state(gst::State::Ready).is_err());
    let (error, _) = log.heard().errors.remove(0);
    assert!(error.matches(gst::ResourceError::Settings));
    assert_eq!(
        error.message(),
        "image-size: 33 is no multiple of 4; take 32"
    );
    element.set_state(gst::State::Null).unwrap();
}

#[test]
fn what_cannot_be_loaded_ends_the_stream_with_the_reason_first() {
    for live in [false, true] {
        let fake = Fake::new();
        fake.plan().load_time = Duration::from_millis(100);
        fake.plan().load_error = Some(Error::new(
            ErrorKind::OpenRead,
            "w.safetensors: torn. Sew it",
        ));
        let pipeline = Pipeline::new(
            &format!(
                "videotestsrc is-live={live} ! video/x-raw,framerate=30/1 ! vlmnarrate name=n
                 ! fakesink"
            ),
            &fake,
        );
        let heard = pipeline.run();
        let (error, source) = &heard.errors[0];
        assert_eq!(
            (source.as_str(), error.message()),
            ("n", "w.safetensors: torn. Sew it")
        );
        assert!(error.matches(gst::ResourceError::OpenRead));
        assert_eq!(types(&heard.progress).last(), Some(&ProgressType::Error));
    }
}

#[test]
fn a_panic_is_an_error_and_never_a_quiet_end() {
    // Recorded: the frame that waits is let go, with an error.
    let fake = Fake::new();
    fake.plan().panics_at = Some(2);
    let line = "videotestsrc num-buffers=60 ! video/x-raw,framerate=10/1 ! vlmnarrate name=n
                ! fakesink";
    let heard = Pipeline::new(line, &fake).run();
    assert!(!heard.eos);
    let (error, source) = &heard.errors[0];
    assert_eq!(source, "n");
    assert!(error.matches(gst::StreamError::Failed), "{error}");
    assert_eq!(heard.captions.len(), 2);

    // Live: the video goes on for as long as the application lets it. (Not in preroll: there an
    // ERROR ends the pipeline's state change.)
    let fake = Fake::new();
    fake.plan().panics_at = Some(3);
    let line = "videotestsrc is-live=true num-buffers=30 ! video/x-raw,framerate=30/1
                ! vlmnarrate name=n interval=100000000 ! fakesink";
    let heard = Pipeline::new(line, &fake).run_past_errors();
    assert!(heard.errors[0].0.matches(gst::StreamError::Failed));
    assert_eq!((heard.captions.len(), heard.eos), (3, true));
}

#[test]
fn a_panic_while_loading_is_an_error_too() {
    struct Panics;
    impl gstvlmnarrate::engine::EngineLoader for Panics {
        fn open(&self, _: &gstvlmnarrate::engine::ModelSettings) -> Result<Found, Error> {
            Ok(Found::Ready(std::sync::Arc::new(Panics)))
        }
    }
    impl gstvlmnarrate::engine::Checkpoint for Panics {
        fn name(&self) -> &str {
            "panics"
        }
        fn image_size(&self) -> gstvlmnarrate::engine::ImageSize {
            gstvlmnarrate::engine::ImageSize::Square(32)
        }
        fn check_image_size(&self, _: u32) -> Result<(), Error> {
            Ok(())
        }
        fn load(
            &self,
            _: &mut gstvlmnarrate::engine::LoadObserver<'_>,
        ) -> Result<Box<dyn gstvlmnarrate::engine::Engine>, Error> {
            panic!("as planned")
        }
    }
    let element = narrator(&Fake::new());
    element.set_engine_loader(Panics);
    let log = Log::of(&element);
    element.set_state(gst::State::Ready).unwrap();
    let heard = log.wait(|heard| !heard.errors.is_empty());
    assert_eq!(
        types(&heard.progress),
        [ProgressType::Start, ProgressType::Error]
    );
    assert!(heard.errors[0].0.matches(gst::StreamError::Failed));
    element.set_state(gst::State::Null).unwrap();
}

/// The worker can't be interrupted at all here: it is waited for, but not to the end.
#[test]
fn null_is_quick_however_deep_the_engine_is_in_thought() {
    for live in [false, true] {
        let fake = Fake::slow(Duration::from_secs(5));
        fake.plan().ignores_cancel = true;
        let pipeline = Pipeline::new(
            &format!(
                "videotestsrc is-live={live} ! video/x-raw,framerate=30/1 ! vlmnarrate name=n
                 ! fakesink async=false"
            ),
            &fake,
        );
        pipeline.play();
        fake.wait_requests(1);
        pipeline.pipeline.set_state(gst::State::Null).unwrap();
        assert_eq!(fake.engines(), 1, "NULL waited to the end");
        // The next model waits, even where one between them was let go before it was loaded, and the state
        // change doesn't.
        for _ in 0..2 {
            pipeline.pipeline.set_state(gst::State::Null).unwrap();
            pipeline.pipeline.set_state(gst::State::Ready).unwrap();
        }
        let loaded = |heard: &crate::common::Heard| {
            let mut progress = heard.progress.iter();
            progress.any(|(type_, _)| *type_ == ProgressType::Complete)
        };
        pipeline.log.wait(loaded);
        assert_eq!(fake.most_engines(), 1, "two models at once");
        // The model goes when the worker lets go of it, and so may the element before.
        drop(pipeline);
        wait_for(|| fake.engines() == 0);
    }
}

/// An engine that takes its time to go, and a live pipeline that has one.
fn leaving() -> (Fake, Pipeline) {
    let fake = Fake::new();
    fake.plan().drop_time = Duration::from_millis(200);
    let pipeline = Pipeline::new(
        "videotestsrc is-live=true ! video/x-raw,framerate=30/1
         ! vlmnarrate name=n interval=0 partial-captions=true ! fakesink async=false",
        &fake,
    );
    (fake, pipeline)
}

#[test]
fn null_has_no_model_any_more_whatever_it_was_doing() {
    let hour = Duration::from_secs(3600);
    for phase in ["loading", "idle", "vision", "decoding"] {
        let (fake, pipeline) = leaving();
        match phase {
            // Which looks ten times at whether to go on.
            "loading" => fake.plan().load_time = Duration::from_secs(5),
            "idle" => (),
            "vision" => fake.plan().caption_time = hour,
            _ => fake.plan().word_time = Duration::from_millis(50),
        }
        fake.plan().text = Some("word ".repeat(1000));
        pipeline.narrator.set_property("max-tokens", 1000u32);
        match phase {
            "loading" => {
                pipeline.play();
                let is_percent = |(type_, _): &(ProgressType, _)| *type_ == ProgressType::Continue;
                pipeline
                    .log
                    .wait(|heard| heard.progress.iter().any(is_percent));
            }
            "idle" => {
                pipeline.reach(gst::State::Ready);
                wait_for(|| fake.engines() == 1);
            }
            "vision" => {
                pipeline.play();
                fake.wait_requests(1);
            }
            _ => {
                pipeline.play();
                pipeline.log.wait(|heard| heard.partials.len() > 2);
            }
        }
        pipeline.pipeline.set_state(gst::State::Null).unwrap();
        assert_eq!(fake.engines(), 0, "{phase}");
        assert_eq!(fake.cancelled(), usize::from(phase != "idle"), "{phase}");
        // Nor has an element that goes without NULL, or another model.
        let narrator = narrator(&fake);
        fake.plan().load_time = Duration::ZERO;
        narrator.set_state(gst::State::Ready).unwrap();
        wait_for(|| fake.engines() == 1);
        narrator.set_property("model", "another");
        narrator.set_state(gst::State::Paused).unwrap();
        wait_for(|| fake.loads().len() == 3 && fake.engines() == 1);
        narrator.set_state(gst::State::Null).unwrap();
        assert_eq!((fake.engines(), fake.most_engines()), (0, 1), "{phase}");
    }
}

/// A model that is on its way for as long as anyone wants it.
struct OnItsWay(Arc<AtomicBool>);

impl EngineLoader for OnItsWay {
    fn open(&self, _: &ModelSettings) -> Result<Found, Error> {
        Ok(Found::ToDownload(Arc::new(Self(self.0.clone()))))
    }
}

impl Download for OnItsWay {
    fn name(&self) -> &str {
        "far"
    }

    fn download(&self, watch: &mut DownloadObserver<'_>) -> Result<Arc<dyn Checkpoint>, Error> {
        while watch(Default::default()).is_continue() {
            thread::sleep(Duration::from_millis(10));
        }
        thread::sleep(Duration::from_millis(200));
        self.0.store(true, SeqCst);
        Err(Error::cancelled())
    }
}

#[test]
fn null_has_no_download_any_more() {
    let has_ended = Arc::new(AtomicBool::new(false));
    let element = narrator(&Fake::new());
    element.set_engine_loader(OnItsWay(has_ended.clone()));
    let log = Log::of(&element);
    element.set_state(gst::State::Ready).unwrap();
    log.wait(|heard| !heard.downloads.is_empty());
    element.set_state(gst::State::Null).unwrap();
    assert!(has_ended.load(SeqCst));
}

/// Whoever waits for the worker there would wait for himself.
#[test]
fn null_in_a_callback_of_the_worker_does_not_wait() {
    for partial in [false, true] {
        let (fake, pipeline) = leaving();
        pipeline.narrator.set_property("partial-captions", partial);
        let engines = Arc::new(AtomicUsize::new(usize::MAX));
        let bus = pipeline.pipeline.bus().unwrap();
        let (weak, seen, watched) = (pipeline.pipeline.downgrade(), engines.clone(), fake.clone());
        bus.set_sync_handler(move |_, message| {
            let is_caption = message
                .structure()
                .is_some_and(|s| s.name() == "vlmnarrate");
            if is_caption && seen.load(SeqCst) == usize::MAX {
                let pipeline = weak.upgrade().unwrap();
                pipeline.set_state(gst::State::Null).unwrap();
                // And up again, to another model.
                pipeline.set_state(gst::State::Ready).unwrap();
                seen.store(watched.engines(), SeqCst);
            }
            gst::BusSyncReply::Drop
        });
        pipeline.play();
        wait_for(|| engines.load(SeqCst) != usize::MAX);
        assert_eq!(engines.load(SeqCst), 1, "whose callback it is");
        wait_for(|| fake.loads().len() == 2 && fake.engines() == 1);
        assert_eq!(fake.most_engines(), 1);
        bus.unset_sync_handler();
    }
}

/// A callback may wait for what whoever goes to NULL holds.
#[test]
fn null_does_not_wait_for_a_callback_that_waits_for_it() {
    let (fake, pipeline) = leaving();
    let held = Arc::new(Mutex::new(()));
    let waits = Arc::new(AtomicBool::new(false));
    let guard = held.lock().unwrap();
    let (wanted, says) = (held.clone(), waits.clone());
    let here = thread::current().id();
    pipeline
        .narrator
        .connect_notify(Some("caption"), move |_, _| {
            if thread::current().id() != here {
                says.store(true, SeqCst);
                drop(wanted.lock());
            }
        });
    pipeline.play();
    wait_for(|| waits.load(SeqCst));
    pipeline.pipeline.set_state(gst::State::Null).unwrap();
    assert_eq!(fake.engines(), 1);
    drop(guard);
    wait_for(|| fake.engines() == 0);
}

#[test]
fn a_cancelled_caption_is_neither_heard_nor_a_failure() {
    let fake = Fake::slow(Duration::from_secs(20));
    let pipeline = Pipeline::new(
        "videotestsrc ! video/x-raw,framerate=30/1 ! vlmnarrate name=n ! fakesink",
        &fake,
    );
    pipeline.pipeline.set_auto_flush_bus(false);
    pipeline.play();
    fake.wait_requests(1);
    let start = Instant::now();
    pipeline.pipeline.set_state(gst::State::Ready).unwrap();
    assert!(start.elapsed() < Duration::from_secs(1));
    wait_for(|| fake.cancelled() == 1);
    assert_eq!(fake.engines(), 1, "the model stays in READY");
    let heard = pipeline.log.heard();
    assert_eq!(
        (
            heard.captions.len(),
            heard.warnings.len(),
            heard.errors.len()
        ),
        (0, 0, 0)
    );
}

#[test]
fn states_may_change_at_any_time() {
    use gst::State::{Null, Paused, Playing, Ready};
    let fake = Fake::slow(Duration::from_millis(5));
    fake.plan().load_time = Duration::from_millis(5);
    for live in [false, true] {
        let pipeline = Pipeline::new(
            &format!(
                "videotestsrc is-live={live} ! video/x-raw,width=64,height=48,framerate=100/1
                 ! vlmnarrate name=n interval=0 n.src ! queue ! fakesink async=false
                 n.text_src ! queue ! fakesink async=false"
            ),
            &fake,
        );
        for round in 0..60u64 {
            for state in [Ready, Paused, Playing, Paused, Ready, Playing, Null] {
                pipeline.pipeline.set_state(state).unwrap();
                // Now and then it gets to work.
                thread::sleep(Duration::from_millis(round % 4));
            }
        }
        let heard = pipeline.run_for(Duration::from_millis(300));
        assert_eq!(
            (heard.errors.len(), heard.warnings.len()),
            (0, 0),
            "{heard:?}"
        );
        assert!(!heard.captions.is_empty());
    }
    wait_for(|| fake.engines() == 0);
}

#[test]
fn the_model_is_loaded_once_and_again_when_ready_changes_it() {
    let fake = Fake::new();
    let pipeline = Pipeline::new(
        "videotestsrc num-buffers=2 ! video/x-raw,framerate=1/1 ! vlmnarrate name=n model=first
         ! fakesink",
        &fake,
    );
    let run = || {
        pipeline.play();
        let heard = pipeline.log.wait(|heard| heard.eos);
        assert_eq!(heard.captions.len(), 2);
        pipeline.reach(gst::State::Ready);
    };
    run();
    run();
    assert_eq!(fake.loads().len(), 1);
    pipeline.narrator.set_property("model", "second");
    pipeline.narrator.set_property_from_str("dtype", "bf16");
    pipeline.narrator.set_property("threads", 3u32);
    run();
    let loads = fake.loads();
    assert_eq!(loads.len(), 2);
    assert_eq!(loads[0].model.as_deref(), Some("first".as_ref()));
    assert_eq!((loads[0].dtype, loads[0].threads), (DType::Auto, 0));
    assert_eq!(loads[1].model.as_deref(), Some("second".as_ref()));
    assert_eq!((loads[1].dtype, loads[1].threads), (DType::Bf16, 3));
    wait_for(|| fake.engines() == 1);
}

#[test]
fn preroll_has_its_caption() {
    let fake = Fake::slow(Duration::from_millis(50));
    let pipeline = Pipeline::new(
        "videotestsrc ! video/x-raw,framerate=1/1 ! vlmnarrate name=n ! fakesink sync=true",
        &fake,
    );
    pipeline.reach(gst::State::Paused);
    let heard = pipeline.log.heard();
    // Nobody has started a clock yet.
    let arrivals: Vec<_> = heard.captions.iter().map(|c| c.arrival_time).collect();
    assert_eq!(arrivals, [Some(gst::ClockTime::ZERO)]);
}

/// Decoders know no times before they have decoded something.
#[test]
fn the_position_may_be_asked_for_before_there_is_one() {
    crate::common::init();
    let folder = tempfile::tempdir().unwrap();
    let run = |description: &str| {
        let pipeline = gst::parse::launch(description).unwrap();
        let bus = pipeline.bus().unwrap();
        pipeline.set_state(gst::State::Playing).unwrap();
        let wanted = [gst::MessageType::Eos, gst::MessageType::Error];
        let end = bus
            .timed_pop_filtered(crate::common::TIMEOUT, &wanted)
            .unwrap();
        assert_eq!(end.type_(), gst::MessageType::Eos, "{description}");
        pipeline.set_state(gst::State::Null).unwrap();
    };
    let [jpeg, png] = ["jpeg", "png"].map(|kind| {
        let file = folder.path().join(kind).display().to_string();
        run(&format!(
            "videotestsrc num-buffers=1 ! {kind}enc ! filesink location={file}"
        ));
        file
    });
    for (source, decoder) in [
        (format!("filesrc location={jpeg}"), "jpegdec"),
        (format!("filesrc location={png}"), "pngdec"),
        (
            format!("multifilesrc location={jpeg} num-buffers=3 caps=image/jpeg,framerate=1/1"),
            "jpegdec",
        ),
    ] {
        let fake = Fake::new();
        // Room for all that comes, so that the source ends up idle.
        let room = "queue max-size-time=0";
        let pipeline = Pipeline::new(
            &format!(
                "{source} ! {decoder} name=decoder ! vlmnarrate name=n n.src ! {room} ! fakesink
                 n.text_src ! {room} ! fakesink"
            ),
            &fake,
        );
        let pads = ["src", "text_src"].map(|name| pipeline.narrator.static_pad(name).unwrap());
        let ask = || {
            for format in [gst::Format::Bytes, gst::Format::Default] {
                for pad in &pads {
                    let _ = pad.query_position_generic(format);
                }
            }
            pads.each_ref()
                .map(|pad| pad.query_position::<gst::ClockTime>())
        };
        assert_eq!(ask(), [None; 2], "{decoder} in NULL");
        pipeline.reach(gst::State::Ready);
        assert_eq!(ask(), [None; 2], "{decoder} in READY");
        pipeline.reach(gst::State::Paused);
        assert!(ask().iter().all(Option::is_some), "{decoder} prerolled");
        let sink = pipeline.element("decoder").static_pad("sink").unwrap();
        // What comes behind a flush without a segment would be the test's mistake.
        let (blocked, is_blocked) = std::sync::mpsc::channel();
        let idle = gst::PadProbeType::BLOCK_DOWNSTREAM | gst::PadProbeType::IDLE;
        sink.peer().unwrap().add_probe(idle, move |_, _| {
            let _ = blocked.send(());
            gst::PadProbeReturn::Ok
        });
        is_blocked
            .recv_timeout(crate::common::TIMEOUT.into())
            .unwrap();
        sink.send_event(gst::event::FlushStart::new());
        sink.send_event(gst::event::FlushStop::new(true));
        assert_eq!(ask(), [None; 2], "{decoder} flushed");
    }
}
