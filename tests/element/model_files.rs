//! Model files that vanish, are replaced or shared while they are used, and models that exceed the memory.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

use crate::{
    common::{
        Fake, Pipeline,
        programs::{Plugin, Said, repository},
    },
    faults::errors,
};
use gst::prelude::*;
use gstvlmnarrate::SmolVlmLoader;
use gstvlmnarrate::engine::{
    Checkpoint, Engine, EngineLoader, Error, Found, LoadObserver, ModelSettings,
};
use tempfile::TempDir;

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

    fn image_size(&self) -> gstvlmnarrate::engine::ImageSize {
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
        .set_property("drain-timeout", crate::common::TIMEOUT);
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
        errors[0].contains("the model needs 1.1 GB") && errors[0].contains(&limit),
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
        errors[0].contains(&format!(
            "not enough memory: the model needs 8.6 GB, but {limit}"
        ))
    };
    assert!(says(ours) || says("the machine has "), "{said:?}");
}
