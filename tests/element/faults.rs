//! What goes wrong around the element is told once, stops no live video, and is over when its cause is.

use std::{
    fs,
    io::Write,
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

use crate::common::{
    Fake, Heard, Item, Log, Pipeline,
    engine::wait_for,
    harness, ms,
    programs::{Plugin, Said, repository},
    spy, stat,
};
use gst::{BufferFlags, ClockTime, prelude::*};
use gstvlmnarrate::SmolVlmLoader;
use gstvlmnarrate::engine::{
    Answer, Checkpoint, Engine, EngineInfo, EngineLoader, Error, ErrorKind, Found, LoadObserver,
    ModelSettings, Observer, Request,
};
use tempfile::TempDir;

/// What the narrator itself says went wrong; a source says too why its stream ended.
fn errors(heard: &Heard) -> Vec<String> {
    let ours = heard.errors.iter().filter(|(_, source)| source == "n");
    ours.map(|(error, _)| error.to_string()).collect()
}

#[test]
fn a_worker_that_fails_says_so_once_and_ready_mends_it() {
    type Break = fn(&Fake);
    let panics: Break = |fake| fake.plan().panic = Some(1);
    let cannot_load: Break = |fake| {
        fake.plan().load = Some(Error::new(ErrorKind::OpenRead, "torn"));
    };
    let device_fails: Break = |fake| fake.plan().dead = Some(1);
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
            fake.plan().panic = None;
            fake.plan().load = None;
            fake.plan().dead = None;
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
    fake.plan().load = Some(Error::new(ErrorKind::OpenRead, "torn"));
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
    let cases = [
        (ErrorKind::Failed, true),
        (ErrorKind::Failed, false),
        (ErrorKind::Unavailable, true),
        (ErrorKind::Unavailable, false),
    ];
    for (kind, live) in cases {
        let fake = Fake::new();
        fake.plan().broken = Some(kind);
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
        let asked = fake.asked().len();
        assert!(asked > 0 && (live || asked == 20), "{asked}");
        assert_eq!(heard.warnings.len(), asked, "{heard:#?}");
        assert_eq!(stat(&pipeline.narrator, "errors"), asked as u64);
        let mut warnings = heard.warnings;
        warnings.dedup();
        assert_eq!(warnings.len(), asked, "each names its frame");

        fake.plan().broken = None;
        let heard = pipeline.run_to_eos();
        assert!(!heard.captions.is_empty() && heard.warnings.is_empty());
    }
}

#[test]
fn a_model_that_is_unavailable_for_now_is_a_busy_resource() {
    type Break = fn(&Fake, Option<Error>);
    let open: Break = |fake, error| fake.plan().open = error;
    let download: Break = |fake, error| fake.plan().download = error;
    let load: Break = |fake, error| fake.plan().load = error;
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

/// SmolVLM, with something done to its files between the first look at them and the load.
struct Meanwhile<F>(Arc<F>);

struct Between<F> {
    checkpoint: Arc<dyn Checkpoint>,
    meanwhile: Arc<F>,
}

fn meanwhile<F: Fn() + Send + Sync + 'static>(act: F) -> Meanwhile<F> {
    Meanwhile(Arc::new(act))
}

impl<F: Fn() + Send + Sync + 'static> EngineLoader for Meanwhile<F> {
    fn open(&self, settings: &ModelSettings) -> Result<Found, Error> {
        let Found::Ready(checkpoint) = SmolVlmLoader.open(settings)? else {
            panic!("no folder");
        };
        let meanwhile = self.0.clone();
        Ok(Found::Ready(Arc::new(Between {
            checkpoint,
            meanwhile,
        })))
    }
}

impl<F: Fn() + Send + Sync> Checkpoint for Between<F> {
    fn name(&self) -> &str {
        self.checkpoint.name()
    }

    fn image_size(&self) -> Option<u32> {
        self.checkpoint.image_size()
    }

    fn check_image_size(&self, side: u32) -> Result<(), Error> {
        self.checkpoint.check_image_size(side)
    }

    fn load(&self, watch: &mut LoadObserver<'_>) -> Result<Box<dyn Engine>, Error> {
        (self.meanwhile)();
        self.checkpoint.load(watch)
    }
}

/// Puts a model into a folder, over what is there.
fn fill(folder: &Path, model: &str) {
    fs::create_dir_all(folder).unwrap();
    for file in fs::read_dir(repository(model)).unwrap() {
        let file = file.unwrap();
        if !file.file_name().to_str().unwrap().starts_with("golden") {
            fs::copy(file.path(), folder.join(file.file_name())).unwrap();
        }
    }
}

/// Says what it sees.
const DEMO: &str = "models/demo";
/// Talks nonsense.
const RANDOM: &str = "tests/data/reference/smolvlm-256m";
const RED: &str = "A solid red screen.";

fn models() -> (TempDir, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    let model = place.path().join("model");
    fill(&model, DEMO);
    (place, model)
}

fn looks_at_red(model: &Path, live: bool) -> Pipeline {
    let pipeline = Pipeline::new(
        &format!(
            "videotestsrc pattern=red is-live={live} num-buffers=10
             ! video/x-raw,width=64,height=48,framerate=20/1 ! vlmnarrate name=n interval=250000000
             ! fakesink async=false"
        ),
        &Fake::new(),
    );
    pipeline.narrator.set_engine_loader(SmolVlmLoader);
    pipeline.narrator.set_property("model", model.to_str());
    // However long a busy machine takes to load it.
    pipeline
        .narrator
        .set_property("drain-timeout", crate::common::PATIENCE);
    pipeline
}

#[test]
fn files_that_go_while_they_are_loaded() {
    type Harm = fn(&Path);
    type Class = fn(&gst::glib::Error) -> bool;
    let gone: Harm = |model| fs::remove_dir_all(model).unwrap();
    let cut: Harm = |model| {
        let weights = model.join("model.safetensors");
        let weights = fs::File::options().write(true).open(weights).unwrap();
        let size = weights.metadata().unwrap().len();
        weights.set_len(size / 2).unwrap();
    };
    let not_found: Class = |error| error.matches(gst::ResourceError::NotFound);
    let broken: Class = |error| error.matches(gst::ResourceError::OpenRead);
    let harms: [(Harm, &str, Class); 2] = [
        (gone, "tokenizer.json", not_found),
        (cut, "model.safetensors", broken),
    ];
    for (harm, names, is_class) in harms {
        for live in [true, false] {
            let (_place, model) = models();
            let pipeline = looks_at_red(&model, live);
            let harmed = model.clone();
            pipeline
                .narrator
                .set_engine_loader(meanwhile(move || harm(&harmed)));
            let heard = match live {
                true => pipeline.run_past_errors(),
                false => pipeline.run(),
            };
            let ours = errors(&heard);
            assert_eq!(ours.len(), 1, "{heard:#?}");
            assert!(ours[0].contains(names), "{ours:?}");
            assert!(is_class(&heard.errors[0].0), "{heard:#?}");
            assert_eq!(
                heard.progress.last().unwrap().0,
                gst::ProgressType::Error,
                "{heard:#?}"
            );
            assert_eq!(heard.warnings, [""; 0]);

            fill(&model, DEMO);
            pipeline.narrator.set_engine_loader(SmolVlmLoader);
            let heard = pipeline.run_to_eos();
            assert_eq!(heard.texts().last(), Some(&RED));
        }
    }
}

/// What is open stays, whatever becomes of its name.
#[test]
fn weights_that_go_while_they_are_loaded_are_loaded() {
    let (_place, model) = models();
    let pipeline = looks_at_red(&model, false);
    let weights = model.join("model.safetensors");
    let loader = meanwhile(move || fs::remove_file(&weights).unwrap());
    pipeline.narrator.set_engine_loader(loader);
    let heard = pipeline.run_to_eos();
    assert_eq!(heard.texts(), [RED, RED]);
}

#[test]
fn a_model_that_is_loaded_needs_no_files() {
    let (_place, model) = models();
    let pipeline = looks_at_red(&model, false);
    pipeline.pipeline.set_state(gst::State::Ready).unwrap();
    pipeline.log.wait(|heard| {
        let last = heard.progress.last();
        last.is_some_and(|(type_, _)| *type_ == gst::ProgressType::Complete)
    });
    fs::remove_dir_all(&model).unwrap();
    for _ in 0..2 {
        pipeline.play();
        let heard = pipeline.log.wait(|heard| heard.eos);
        assert_eq!(heard.texts(), [RED, RED]);
        pipeline.reach(gst::State::Ready);
    }
    pipeline.reach(gst::State::Null);

    assert!(pipeline.pipeline.set_state(gst::State::Ready).is_err());
    let heard = pipeline.log.heard();
    assert_eq!(errors(&heard).len(), 1, "{heard:#?}");
    assert!(heard.errors[0].0.matches(gst::ResourceError::NotFound));
    fill(&model, DEMO);
    assert_eq!(pipeline.run_to_eos().texts(), [RED, RED]);
}

#[test]
fn a_model_that_is_replaced_is_another_from_null_up() {
    let (_place, model) = models();
    let texts = |pipeline: &Pipeline| {
        pipeline.play();
        let heard = pipeline.log.wait(|heard| heard.eos);
        pipeline.reach(gst::State::Ready);
        heard.captions.into_iter().map(|caption| caption.text)
    };
    let is_old = |pipeline: &Pipeline| texts(pipeline).eq([RED, RED]);
    let is_new = |pipeline: &Pipeline| texts(pipeline).filter(|text| text != RED).count() == 2;
    let old = looks_at_red(&model, false);
    assert!(is_old(&old));

    // Whoever has the old one keeps it; nobody else gets it of him.
    fs::remove_dir_all(&model).unwrap();
    fill(&model, RANDOM);
    let new = looks_at_red(&model, false);
    assert!(is_new(&new));
    assert!(is_old(&old));
    old.reach(gst::State::Null);
    assert!(is_new(&old));
}

const CAPS: &str = "video/x-raw,format=GRAY8,width=8,height=8,framerate=10/1";
const UNTIMED: &str = "video/x-raw,format=GRAY8,width=8,height=8,framerate=0/1";
const DAY: ClockTime = ClockTime::from_seconds(24 * 60 * 60);

/// A harness in this mode, with what its text pad gives.
fn with_text(
    mode: &str,
    caps: &str,
) -> (
    gst_check::Harness,
    gstvlmnarrate::VlmNarrate,
    Log,
    crate::common::Items,
) {
    let element = crate::common::narrator(&Fake::new());
    let text = element.request_pad_simple("text_src").unwrap();
    let items = spy(&text);
    let (harness, log) = crate::common::harness_with(&element, caps);
    element.set_property_from_str("mode", mode);
    (harness, element, log, items)
}

/// Pushes a buffer and takes the same.
#[track_caller]
fn pass(harness: &mut gst_check::Harness, buffer: gst::Buffer) {
    let (pts, flags) = (buffer.pts(), buffer.flags());
    let out = harness.push_and_pull(buffer).unwrap();
    assert_eq!((out.pts(), out.flags()), (pts, flags));
}

/// Hears enough, and no complaint.
#[track_caller]
fn hear(log: &Log, enough: impl Fn(&Heard) -> bool) -> Heard {
    let heard = log.wait(enough);
    assert_eq!(
        (heard.errors.len(), heard.warnings.len()),
        (0, 0),
        "{heard:#?}"
    );
    heard
}

fn captioned(heard: &Heard) -> bool {
    !heard.captions.is_empty()
}

#[test]
fn times_that_jump_by_days() {
    for mode in ["live", "recorded"] {
        let (mut harness, _narrator, log, items) = with_text(mode, CAPS);
        let jumps = [
            ClockTime::ZERO,
            DAY,
            365 * DAY,
            365 * DAY + ClockTime::SECOND,
            DAY,
            DAY - ClockTime::SECOND,
            ClockTime::ZERO,
            ClockTime::from_nseconds(u64::MAX - 1),
            ms(500),
        ];
        for at in jumps {
            pass(&mut harness, crate::common::buffer(64, 0, at));
            assert_eq!(hear(&log, captioned).timestamps(), [at]);
        }
        // A gap is one gap, however long.
        let items = items.lock().unwrap().len();
        assert!(items < 3 * jumps.len(), "{mode}: {items}");
    }
}

/// GStreamer's clocks never go back: one that is set back stands still.
#[test]
fn a_clock_that_jumps() {
    let fake = Fake::new();
    let pipeline = Pipeline::new(
        &format!(
            "appsrc name=src is-live=true do-timestamp=true format=time caps={CAPS}
             ! vlmnarrate name=n ! fakesink async=false"
        ),
        &fake,
    );
    let clock = gst::glib::Object::new::<gst::SystemClock>();
    let jump = |hours: i64| {
        let internal = clock.internal_time();
        let time = internal
            .nseconds()
            .checked_add_signed(hours * 3_600_000_000_000);
        let external = ClockTime::from_nseconds(time.unwrap_or(0));
        clock.set_calibration(internal, external, 1, 1);
    };
    pipeline.pipeline.use_clock(Some(&clock));
    pipeline.reach(gst::State::Playing);
    let source = pipeline.element("src");
    let push = || {
        let flow = source
            .emit_by_name::<gst::FlowReturn>("push-buffer", &[&crate::common::buffer(64, 0, None)]);
        assert_eq!(flow, gst::FlowReturn::Ok);
    };
    push();
    let first = pipeline.log.wait(captioned).captions.remove(0);
    jump(1);
    push();
    let second = pipeline.log.wait(captioned).captions.remove(0);
    let hour = ClockTime::from_seconds(3600);
    for time in [
        |c: &gstvlmnarrate::Caption| c.stamp.timestamp,
        |c: &gstvlmnarrate::Caption| c.arrival_time,
    ] {
        assert!(time(&second).unwrap() >= time(&first).unwrap() + hour);
    }
    // Nothing is latency that the clock only says.
    assert!(second.cost.latency < std::time::Duration::from_secs(60));
    jump(-1);
    push();
    pipeline.narrator.describe_now(None, None).unwrap();
    push();
    let heard = pipeline.log.wait(captioned);
    assert_eq!(heard.captions[0].stamp.request_id, 1);
    jump(3);
    push();
    let heard = pipeline.log.wait(captioned);
    assert!(heard.captions[0].stamp.timestamp.unwrap() > 2 * hour);
    assert_eq!((heard.errors.len(), heard.warnings.len()), (0, 0));
    assert_eq!(fake.asked().len(), 4);
}

#[test]
fn without_any_times_there_are_captions_and_no_timed_text() {
    for mode in ["live", "recorded"] {
        let (mut harness, narrator, log, items) = with_text(mode, UNTIMED);
        let mut captions = Vec::new();
        // Live, a frame is described if the worker has nothing to do.
        while captions.len() < 3 {
            pass(&mut harness, crate::common::buffer(64, 0, None));
            let heard = log.heard();
            assert_eq!((heard.errors.len(), heard.warnings.len()), (0, 0));
            captions.extend(heard.captions);
            std::thread::yield_now();
        }
        assert!(captions.iter().all(|c| c.stamp.timestamp.is_none()));
        narrator.describe_now(None, None).unwrap();
        let answered = |heard: &Heard| heard.captions.iter().any(|c| c.stamp.request_id > 0);
        pass(&mut harness, crate::common::buffer(64, 0, None));
        hear(&log, answered);
        let items = items.lock().unwrap();
        assert!(
            items.iter().all(|item| matches!(item, Item::Event(_))),
            "{items:?}"
        );
    }
}

#[test]
fn a_question_waits_for_the_picture_behind_a_gap() {
    for mode in ["live", "recorded"] {
        let (mut harness, narrator, log, _) = with_text(mode, CAPS);
        pass(&mut harness, crate::common::buffer(64, 0, ms(0)));
        hear(&log, captioned);
        narrator.describe_now(None, None).unwrap();
        let mut gap = crate::common::buffer(0, 0, ms(100));
        gap.get_mut().unwrap().set_flags(BufferFlags::GAP);
        pass(&mut harness, gap);
        assert!(harness.push_event(gst::event::Gap::new(ms(200), None)));
        assert!(harness.push_event(gst::event::Gap::new(ms(300), ms(100))));
        pass(&mut harness, crate::common::buffer(64, 0, ms(400)));
        let caption = &hear(&log, captioned).captions[0].stamp;
        assert_eq!((caption.request_id, caption.timestamp), (1, Some(ms(400))));
        let mut gaps = 0;
        while let Some(event) = harness.try_pull_event() {
            gaps += usize::from(event.type_() == gst::EventType::Gap);
        }
        assert_eq!(gaps, 2);
    }
}

/// A decoder that flags what it could not decode has something to show all the same.
#[test]
fn damaged_pictures_are_described_as_they_are() {
    let (mut harness, _narrator, log) = harness(&Fake::new(), CAPS);
    let damages = [
        BufferFlags::CORRUPTED,
        BufferFlags::DISCONT,
        BufferFlags::DROPPABLE,
    ];
    for (second, flags) in (0..).zip(damages) {
        let mut buffer = crate::common::buffer(64, 0, ClockTime::from_seconds(second));
        buffer.get_mut().unwrap().set_flags(flags);
        pass(&mut harness, buffer);
        hear(&log, captioned);
    }
}

#[test]
fn a_buffer_that_is_shorter_than_its_caps_say_is_one_warning() {
    let huge = "video/x-raw,format=GRAY8,width=32767,height=32767,framerate=10/1";
    for (mode, caps, split) in [
        ("live", CAPS, false),
        ("recorded", CAPS, true),
        ("live", huge, true),
        ("recorded", huge, false),
    ] {
        let (mut harness, narrator, log, _) = with_text(mode, caps);
        narrator.set_property("image-splitting", split);
        let warned = |heard: &Heard| !heard.warnings.is_empty();
        for second in 0..3 {
            let at = ClockTime::from_seconds(second);
            pass(&mut harness, crate::common::buffer(60, 0, at));
            let heard = log.wait(warned);
            assert_eq!((heard.captions.len(), heard.warnings.len()), (0, 1));
        }
        harness.set_src_caps_str(CAPS);
        let whole = crate::common::buffer(64, 0, ClockTime::from_seconds(3));
        pass(&mut harness, whole);
        hear(&log, captioned);
    }
}

fn launch(plugin: &Plugin, pipeline: &str) -> Command {
    let mut launch = plugin.command("gst-launch-1.0");
    launch
        .args(["-m", "--no-fault"])
        .args(pipeline.split_whitespace())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    launch
}

fn look_at_red(model: &Path) -> String {
    format!(
        "videotestsrc pattern=red num-buffers=3 ! video/x-raw,width=64,height=48,framerate=1/1 \
         ! vlmnarrate model={} ! fakesink",
        model.display()
    )
}

#[test]
fn processes_share_a_folder() {
    let (_place, model) = models();
    let plugin = Plugin::new();
    let start = || launch(&plugin, &look_at_red(&model)).spawn().unwrap();
    let processes = [start(), start(), start()];
    for process in processes {
        let said = Said::from(process.wait_with_output().unwrap());
        assert_eq!(said.status, Some(0), "{said:?}");
        assert_eq!(
            said.out.matches(RED.replace(' ', "\\ ").as_str()).count(),
            3,
            "{said:?}"
        );
    }
}

/// Gives a model weights that need so much memory, and no room on the disk.
fn bloat(model: &Path, gigabytes: u64) {
    let path = model.join("model.safetensors");
    let file = fs::read(&path).unwrap();
    let (length, rest) = file.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let mut header: serde_json::Value = serde_json::from_slice(header).unwrap();
    let size = gigabytes << 30;
    // The last one in the file becomes larger than the model has it, which only shows when it is read.
    let tensors = header.as_object_mut().unwrap().values_mut();
    let start = |tensor: &serde_json::Value| tensor["data_offsets"][0].as_u64();
    let last = tensors.max_by_key(|tensor| start(tensor)).unwrap();
    let from = start(last).unwrap();
    *last = serde_json::json!(
        {"dtype": "F32", "shape": [size / 4], "data_offsets": [from, from + size]}
    );
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = fs::File::create(&path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(&header).unwrap();
    file.write_all(data).unwrap();
    let end = file.metadata().unwrap().len();
    file.set_len(end + size).unwrap();
}

/// A control group of the kernel, gone with this.
struct Group(PathBuf);

impl Group {
    /// `None` where this process can't make one: it takes root, and a kernel that has the controller.
    fn with_memory(bytes: u64) -> Option<Self> {
        let name = format!("vlmnarrate-test-{}", std::process::id());
        let v1 = (Path::new("/sys/fs/cgroup/memory"), "memory.limit_in_bytes");
        let v2 = (Path::new("/sys/fs/cgroup"), "memory.max");
        for (top, limit) in [v1, v2] {
            let group = Self(top.join(&name));
            let has_limit = fs::create_dir(&group.0).is_ok()
                && fs::write(group.0.join(limit), bytes.to_string()).is_ok();
            if has_limit {
                return Some(group);
            }
        }
        None
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// As in a container: beyond the limit the process would be killed, while it uses what it was given.
#[test]
fn a_model_that_its_control_group_has_no_memory_for_is_an_error() {
    let Some(group) = Group::with_memory(600_000_000) else {
        eprintln!("no control group can be made here");
        return;
    };
    let (_place, model) = models();
    bloat(&model, 1);
    let plugin = Plugin::new();
    let launch = launch(&plugin, &look_at_red(&model));
    let mut limited = plugin.command("bash");
    limited
        .args(["-c", "echo $$ > \"$0/cgroup.procs\" && exec \"$@\""])
        .arg(&group.0)
        .arg(launch.get_program())
        .args(launch.get_args())
        .stdin(Stdio::null());
    let said = Said::from(limited.output().unwrap());
    assert_eq!(said.status, Some(1), "{said:?}");
    let errors: Vec<_> = said.err.lines().filter(|l| l.contains("ERROR")).collect();
    let limit = format!("the control group {} has ", group.0.display());
    assert!(
        errors[0].contains("no memory for the 1.1 GB") && errors[0].contains(&limit),
        "{said:?}"
    );
}

#[test]
fn a_model_for_which_there_is_no_memory_is_an_error() {
    let (_place, model) = models();
    bloat(&model, 8);
    let plugin = Plugin::new();
    let launch = launch(&plugin, &look_at_red(&model));
    let mut limited = plugin.command("bash");
    limited
        .args(["-c", "ulimit -v 4000000; exec \"$0\" \"$@\""])
        .arg(launch.get_program())
        .args(launch.get_args())
        .stdin(Stdio::null());
    let said = Said::from(limited.output().unwrap());
    assert_eq!(said.status, Some(1), "{said:?}");
    let errors: Vec<_> = said.err.lines().filter(|l| l.contains("ERROR")).collect();
    let ours = "the system refuses to give this process so much";
    // A machine that has less says so first.
    let says = |limit: &str| {
        errors[0].contains(&format!("no memory for the 8.6 GB that it takes: {limit}"))
    };
    assert!(says(ours) || says("the machine has "), "{said:?}");
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

    fn image_size(&self) -> Option<u32> {
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
                "panic" => fake.plan().panic = Some(1),
                "fail" => fake.plan().broken = Some(ErrorKind::Failed),
                "load" => fake.plan().load = error(),
                _ => fake.plan().open = error(),
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
    fake.plan().panic = Some(0);
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
