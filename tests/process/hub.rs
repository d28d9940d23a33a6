//! Models of the Hugging Face hub in the element, from a local server.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::common::hub::{COMMIT, GGUF_ID, Hub, ID, etag};
use crate::common::{
    Fake, Heard, Pipeline,
    programs::{Plugin, Said},
};
use gst::{ProgressType, ResourceError, prelude::*};
use gstvlmnarrate::SmolVlmLoader;
use tempfile::TempDir;

pub(crate) const LINE: &str =
    "videotestsrc num-buffers=2 ! video/x-raw,width=64,height=48,framerate=1/1
                    ! vlmnarrate name=n max-tokens=3 ! fakesink";

/// What a repository holds that is of no use here.
const USELESS: [&str; 4] = [
    "README.md",
    "pytorch_model.bin",
    "onnx/model.onnx",
    "images/a.png",
];

/// A small random SmolVLM-256M, as a repository.
pub(crate) fn repository() -> BTreeMap<String, Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/reference/smolvlm-256m");
    let files = fs::read_dir(folder).unwrap().map(|file| {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        (name, fs::read(path).unwrap())
    });
    let useless = USELESS.map(|name| (name.to_owned(), b"of no use".to_vec()));
    files
        .filter(|(name, _)| !name.starts_with("golden"))
        .chain(useless)
        .collect()
}

pub(crate) fn set(variable: &str, value: impl AsRef<std::ffi::OsStr>) {
    // SAFETY: at the start of a test, alone in its process.
    unsafe { std::env::set_var(variable, value) };
}

/// A hub with that repository, and an empty cache.
pub(crate) fn hub() -> (Hub, TempDir) {
    let hub = Hub::start(repository());
    let home = tempfile::tempdir().unwrap();
    for variable in std::env::vars_os().map(|(name, _)| name) {
        let name = variable.to_str().unwrap_or_default();
        if name.starts_with("HF_") || name.to_ascii_lowercase().ends_with("_proxy") {
            // SAFETY: as above.
            unsafe { std::env::remove_var(&variable) };
        }
    }
    set("HF_HOME", home.path());
    set("HF_ENDPOINT", hub.endpoint());
    (hub, home)
}

pub(crate) fn pipeline(line: &str, model: &str) -> Pipeline {
    let pipeline = Pipeline::new(line, &Fake::new());
    pipeline.narrator.set_engine_loader(SmolVlmLoader);
    pipeline.narrator.set_property("model", model);
    pipeline
}

#[track_caller]
fn run(model: &str) -> Heard {
    pipeline(LINE, model).run()
}

/// Runs and has captions of the commit.
#[track_caller]
pub(crate) fn narrates() -> Heard {
    let heard = run(ID);
    assert!(heard.eos, "{heard:#?}");
    assert_eq!(heard.captions.len(), 2);
    let caption = &heard.captions[0];
    assert_eq!((&*caption.model, &*caption.revision), (ID, COMMIT));
    heard
}

/// Runs and ends in one ERROR of this class, after a download that ended so too.
#[track_caller]
pub(crate) fn fails(model: &str, class: ResourceError, words: &[&str]) -> Heard {
    let heard = run(model);
    is_failed(&heard, class, words);
    let ends = |type_| heard.downloads.iter().filter(|d| d.0 == type_).count();
    assert_eq!(ends(ProgressType::Start), 1, "{:?}", heard.downloads);
    assert_eq!(ends(ProgressType::Error), 1, "{:?}", heard.downloads);
    assert_eq!(heard.downloads.last().unwrap().0, ProgressType::Error);
    heard
}

#[track_caller]
pub(crate) fn is_failed(heard: &Heard, class: ResourceError, words: &[&str]) {
    let ours = heard.errors.iter().filter(|(_, source)| source == "n");
    let [(error, _)] = &ours.collect::<Vec<_>>()[..] else {
        panic!("{heard:#?}");
    };
    assert!(error.matches(class), "{error:?}");
    for word in words {
        assert!(error.message().contains(word), "{word}: {error}");
    }
    assert!(!error.message().contains('\n'), "one line: {error}");
    assert_eq!(heard.captions.len(), 0);
}

pub(crate) fn folder(home: &TempDir) -> PathBuf {
    home.path().join("hub/models--owner--Some-SmolVLM")
}

pub(crate) fn part(home: &TempDir) -> PathBuf {
    let weights = etag("model.safetensors", &repository()["model.safetensors"]);
    folder(home).join("blobs").join(weights + ".incomplete")
}

/// Where huggingface_hub looks whether somebody brings the weights.
pub(crate) fn lock(home: &TempDir) -> PathBuf {
    let name = part(home).with_extension("lock");
    let locks = home.path().join("hub/.locks/models--owner--Some-SmolVLM");
    locks.join(name.file_name().unwrap())
}

/// Ranges of the weights that were sent, first bytes that only show their size apart.
pub(crate) fn ranges(hub: &Hub) -> Vec<String> {
    let requests = hub.requests().into_iter();
    let weights = requests.filter(|request| request.path == "/cdn/model.safetensors");
    let ranges = weights.map(|request| request.range.unwrap());
    ranges.filter(|range| range != "bytes=0-0").collect()
}

#[test]
fn an_id_is_downloaded_once() {
    let (hub, home) = hub();
    let heard = narrates();
    let [first, .., last] = &heard.downloads[..] else {
        panic!("{:?}", heard.downloads);
    };
    assert_eq!(*first, (ProgressType::Start, format!("Downloading {ID}")));
    assert_eq!(*last, (ProgressType::Complete, format!("Downloaded {ID}")));
    assert_eq!(heard.progress[0].0, ProgressType::Start);
    assert_eq!(heard.progress.last().unwrap().0, ProgressType::Complete);
    let requests = hub.requests();
    for useless in USELESS.iter().chain(&["added_tokens.json"]) {
        assert!(
            !requests.iter().any(|a| a.path.contains(useless)),
            "{useless}"
        );
    }
    // As transformers will look for it.
    let folder = folder(&home);
    assert_eq!(
        fs::read_to_string(folder.join("refs/main")).unwrap(),
        COMMIT
    );
    let weights = folder
        .join("snapshots")
        .join(COMMIT)
        .join("model.safetensors");
    let blob = fs::read_link(weights).unwrap();
    let name = etag("model.safetensors", &repository()["model.safetensors"]);
    assert_eq!(blob, Path::new("../../blobs").join(name));

    let again = narrates();
    assert_eq!(again.downloads, []);
    assert_eq!(again.texts(), heard.texts());
    assert_eq!(hub.requests(), []);
}

/// A cache as huggingface_hub 1.x leaves it.
fn python_cache(home: &TempDir, files: &BTreeMap<String, Vec<u8>>) {
    let folder = folder(home);
    let snapshot = folder.join("snapshots").join(COMMIT);
    for folder in [&snapshot, &folder.join("blobs"), &folder.join("refs")] {
        fs::create_dir_all(folder).unwrap();
    }
    fs::write(folder.join("refs/main"), COMMIT).unwrap();
    for (name, bytes) in files.iter().filter(|(name, _)| !name.contains('/')) {
        let etag = etag(name, bytes);
        fs::write(folder.join("blobs").join(&etag), bytes).unwrap();
        let link = Path::new("../../blobs").join(&etag);
        std::os::unix::fs::symlink(link, snapshot.join(name)).unwrap();
    }
}

#[test]
fn what_transformers_downloaded_is_found() {
    let (hub, home) = hub();
    python_cache(&home, &repository());
    set("HF_HUB_OFFLINE", "1");
    assert_eq!(narrates().downloads, []);
    for revision in [COMMIT, "main", ""] {
        let pipeline = pipeline(LINE, ID);
        pipeline.narrator.set_property("revision", revision);
        let heard = pipeline.run_to_eos();
        assert_eq!(heard.captions[0].revision, COMMIT);
    }
    set("HF_HUB_CACHE", home.path().join("hub"));
    set("HF_HOME", "/nowhere");
    narrates();
    assert_eq!(hub.requests(), []);
}

#[test]
fn what_is_there_in_part_is_completed() {
    let (hub, home) = hub();
    let mut files = repository();
    files.remove("tokenizer.json");
    python_cache(&home, &files);
    narrates();
    let requests = hub.requests();
    assert!(requests.iter().any(|a| a.path.ends_with("tokenizer.json")));
    assert!(!requests.iter().any(|a| a.path.ends_with(".safetensors")));
}

#[test]
fn a_revision_is_a_branch_a_tag_or_a_commit() {
    let (hub, home) = hub();
    for revision in ["v1", "some/branch", COMMIT] {
        let pipeline = pipeline(LINE, ID);
        pipeline.narrator.set_property("revision", revision);
        let heard = pipeline.run_to_eos();
        assert_eq!(heard.captions[0].revision, COMMIT);
        if revision != COMMIT {
            let noted = fs::read_to_string(folder(&home).join("refs").join(revision));
            assert_eq!(noted.unwrap(), COMMIT);
        }
    }
    // The blobs were there after the first.
    assert_eq!(ranges(&hub), ["bytes=0-"]);

    let absent = pipeline(LINE, ID);
    absent.narrator.set_property("revision", "v9");
    is_failed(
        &absent.run(),
        ResourceError::NotFound,
        &["revision=v9", ID, "branch, tag or commit"],
    );
    let evil = pipeline(LINE, ID);
    evil.narrator.set_property("revision", "../../x");
    assert!(evil.pipeline.set_state(gst::State::Playing).is_err());
    is_failed(
        &evil.log.heard(),
        ResourceError::Settings,
        &["revision", "../../x"],
    );
}

#[test]
fn shards_come_by_their_index() {
    let (hub, _home) = hub();
    let mut files = repository();
    let weights = files.remove("model.safetensors").unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&weights).unwrap();
    let tensors = tensors.tensors();
    let (first, second) = tensors.split_at(tensors.len() / 2);
    let mut map = BTreeMap::new();
    for (n, half) in [(1, first), (2, second)] {
        let name = format!("model-0000{n}-of-00002.safetensors");
        map.extend(
            half.iter()
                .map(|(tensor, _)| (tensor.clone(), name.clone())),
        );
        let half = half.iter().map(|(tensor, view)| (tensor, view));
        files.insert(name, safetensors::serialize(half, None).unwrap());
    }
    let index = serde_json::json!({ "weight_map": map }).to_string();
    files.insert("model.safetensors.index.json".into(), index.into_bytes());
    hub.plan().files = files;
    narrates();
    hub.requests();
    assert_eq!(narrates().downloads, []);
    assert_eq!(hub.requests(), []);
}

/// What llama.cpp makes of a model, as a repository.
fn gguf_repository() -> BTreeMap<String, Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/gguf");
    let mut files = BTreeMap::from(USELESS.map(|name| (name.into(), b"of no use".to_vec())));
    for file in fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        if path.is_file() {
            let name = path.file_name().unwrap().to_str().unwrap().into();
            files.insert(name, fs::read(path).unwrap());
        }
    }
    files
}

/// Runs and has captions of the commit.
#[track_caller]
fn narrates_as(model: &str, name: &str) -> Heard {
    let heard = run(model);
    assert!(heard.eos, "{heard:#?}");
    let caption = &heard.captions[0];
    assert_eq!((&*caption.model, &*caption.revision), (name, COMMIT));
    heard
}

/// Names of the large files that were sent.
fn sent(hub: &Hub) -> Vec<String> {
    let requests = hub.requests().into_iter();
    let sent = requests.filter(|request| request.range.as_deref() == Some("bytes=0-"));
    sent.filter_map(|request| Some(request.path.strip_prefix("/cdn/")?.to_owned()))
        .collect()
}

#[test]
fn two_of_the_gguf_files_are_downloaded() {
    let (hub, _home) = hub();
    hub.plan().files = gguf_repository();
    for (model, tag) in [
        (GGUF_ID.to_owned(), "Q8_0"),
        (format!("{GGUF_ID}:bf16"), "BF16"),
    ] {
        let name = format!("{GGUF_ID}:{tag}");
        let heard = narrates_as(&model, &name);
        let files = ["mmproj-", ""].map(|part| format!("{part}SmolVLM-Small-{tag}.gguf"));
        assert_eq!(sent(&hub), files);
        let again = narrates_as(&model, &name);
        assert_eq!(again.downloads, []);
        assert_eq!(again.texts(), heard.texts());
        // What a caption names is a model.
        narrates_as(&name, &name);
        assert_eq!(hub.requests(), []);
    }
    let model = format!("{GGUF_ID}:Q2_K");
    let words = [
        &*format!("model={model}"),
        "no Q2_K",
        "SmolVLM-Small-BF16.gguf, SmolVLM-Small-Q8_0.gguf",
        "one of its quantizations",
    ];
    fails(&model, ResourceError::NotFound, &words);
    assert_eq!(sent(&hub), [""; 0]);
}

#[test]
fn a_tag_takes_the_gguf_files_of_a_repository_that_has_both() {
    let (hub, _home) = hub();
    hub.plan().files.extend(gguf_repository());
    let name = format!("{ID}:Q8_0");
    narrates_as(&name, &name);
    assert_eq!(sent(&hub).len(), 2);
    narrates();
    assert_eq!(sent(&hub), ["model.safetensors"]);
    narrates_as(&name, &name);
    assert_eq!(hub.requests(), []);
}

/// What is in the cache may not be what a repository has first.
#[test]
fn without_a_tag_the_hub_says_which_there_are() {
    let (hub, home) = hub();
    hub.plan().files = gguf_repository();
    let bf16 = format!("{GGUF_ID}:BF16");
    narrates_as(&bf16, &bf16);
    narrates_as(GGUF_ID, &format!("{GGUF_ID}:Q8_0"));
    assert_eq!(sent(&hub).len(), 4);

    hub.plan().files.remove("SmolVLM-Small-Q8_0.gguf");
    fs::remove_dir_all(home.path().join("hub")).unwrap();
    narrates_as(GGUF_ID, &bf16);
    assert_eq!(sent(&hub).len(), 2);
    narrates_as(GGUF_ID, &bf16);
    assert_eq!(hub.requests().len(), 1, "it was requests which there are");
    set("HF_HUB_OFFLINE", "1");
    narrates_as(GGUF_ID, &bf16);
    assert_eq!(hub.requests(), []);

    hub.plan()
        .files
        .retain(|name, _| !name.starts_with("mmproj"));
    fs::remove_dir_all(home.path().join("hub")).unwrap();
    set("HF_HUB_OFFLINE", "0");
    fails(
        GGUF_ID,
        ResourceError::NotFound,
        &[GGUF_ID, "no mmproj", "BF16"],
    );
}

#[test]
fn unknown_ids() {
    let (hub, _home) = hub();
    let words = ["model=nobody/Nothing", &hub.endpoint(), "spelling"];
    fails("nobody/Nothing", ResourceError::NotFound, &words);
    // What the hub says to those without a token.
    hub.plan().refuse = Some((401, "RepoNotFound"));
    let words = [&*format!("model={ID}"), "spelling", "HF_TOKEN"];
    fails(ID, ResourceError::NotFound, &words);
}

#[test]
fn gated_models() {
    let (hub, home) = hub();
    let id = format!("model={ID}");
    hub.plan().refuse = Some((401, "GatedRepo"));
    let page = format!("{}/{ID}", hub.endpoint());
    let words = [
        &*id,
        "401",
        "gated",
        &page,
        "set the environment variable HF_TOKEN",
    ];
    fails(ID, ResourceError::NotAuthorized, &words);
    // Everyone may read what there is, but not the files.
    hub.plan().refuse = None;
    hub.plan().refuse_files = Some(403);
    hub.plan().gated = true;
    fs::write(home.path().join("token"), "hf_noted\n").unwrap();
    hub.requests();
    let words = [&*id, "config.json", "403", "account of the token"];
    fails(ID, ResourceError::NotAuthorized, &words);
    let token = |token: &str| Some(format!("Bearer {token}"));
    assert!(hub.requests().iter().all(|a| a.token == token("hf_noted")));
    set("HF_TOKEN", "hf_set");
    hub.plan().refuse_files = None;
    narrates();
    assert!(hub.requests().iter().all(|a| a.token == token("hf_set")));
    // The token is for the hub alone where files are for everyone.
    hub.plan().gated = false;
    fs::remove_dir_all(folder(&home)).unwrap();
    narrates();
    let requests = hub.requests();
    assert_eq!(requests[0].token, token("hf_set"));
    assert!(requests[1..].iter().all(|a| a.token.is_none()));
}

#[test]
fn live_video_goes_on_meanwhile() {
    let (hub, _home) = hub();
    hub.plan().trickle = Duration::from_millis(1);
    let line = "videotestsrc is-live=true ! video/x-raw,width=64,height=48,framerate=30/1
                ! vlmnarrate name=n max-tokens=3 interval=100000000 ! fakesink";
    let pipeline = pipeline(line, ID);
    let passed = crate::common::spy(&pipeline.narrator.static_pad("src").unwrap());
    pipeline.play();
    let count = |passed: &crate::common::Items| {
        let items = passed.lock().unwrap();
        let buffers = items
            .iter()
            .filter(|i| matches!(i, crate::common::Item::Buffer { .. }));
        buffers.count()
    };
    let heard = pipeline.log.wait(|heard| {
        heard
            .downloads
            .last()
            .is_some_and(|d| d.0 == ProgressType::Complete)
    });
    assert!(count(&passed) >= 10, "{}", count(&passed));
    assert_eq!(heard.captions.len(), 0);
    pipeline.log.wait(|heard| !heard.captions.is_empty());
}

#[test]
fn what_cannot_run_is_told_before_its_weights_come() {
    let (hub, _home) = hub();
    let mut files = repository();
    let config = String::from_utf8(files.remove("config.json").unwrap()).unwrap();
    files.insert(
        "config.json".into(),
        config.replace("idefics3", "gpt9").into(),
    );
    hub.plan().files = files;
    fails(
        ID,
        ResourceError::OpenRead,
        &["config.json", "gpt9", "SmolVLM"],
    );
    assert_eq!(ranges(&hub), [""; 0]);
    hub.plan().files.remove("model.safetensors");
    let words = [&*format!("model={ID}"), "has no model.safetensors"];
    fails(ID, ResourceError::NotFound, &words);
}

#[test]
fn an_image_size_that_does_not_fit_is_told_after_the_download() {
    let (_hub, _home) = hub();
    let pipeline = pipeline(LINE, ID);
    pipeline.narrator.set_property("image-size", 4000u32);
    let heard = pipeline.run();
    is_failed(&heard, ResourceError::Settings, &["image-size: 4000"]);
    assert_eq!(heard.downloads.last().unwrap().0, ProgressType::Complete);
}

#[test]
fn a_cache_that_cannot_be_written() {
    let (_hub, home) = hub();
    let file = home.path().join("file");
    fs::write(&file, "").unwrap();
    set("HF_HOME", &file);
    let words = [
        &*format!("model={ID}"),
        file.to_str().unwrap(),
        "set HF_HOME",
    ];
    fails(ID, ResourceError::Write, &words);
}

/// What a user of `gst-launch-1.0` sees; `limit` is the size in kB at which the disk is full.
pub(crate) fn launch(plugin: &Plugin, limit: u32) -> Said {
    // The signal would end the process before it sees an error.
    let script = "trap '' XFSZ; ulimit -f $LIMIT; exec gst-launch-1.0 videotestsrc num-buffers=2 \
                  ! video/x-raw,width=64,height=48,framerate=1/1 ! vlmnarrate model=$MODEL \
                  max-tokens=3 ! fakesink";
    let mut bash = plugin.command("bash");
    bash.args(["-c", script])
        .env("LIMIT", limit.to_string())
        .env("MODEL", ID);
    Said::from(bash.output().unwrap())
}

#[test]
fn a_full_disk_and_what_gst_launch_shows() {
    let (hub, home) = hub();
    let plugin = Plugin::new();
    hub.plan().trickle = Duration::from_millis(3);
    let said = launch(&plugin, 500);
    assert_ne!(said.status, Some(0), "{said:?}");
    let weights = part(&home);
    for word in [
        &*format!("model={ID}"),
        "no space left",
        home.path().to_str().unwrap(),
        "Free 1 MB",
    ] {
        assert!(said.err.contains(word), "{word}: {said:?}");
    }
    assert_eq!(fs::metadata(weights).unwrap().len(), 500 * 1024);
    hub.requests();
    let said = launch(&plugin, 1_000_000);
    assert_eq!(said.status, Some(0), "{said:?}");
    assert_eq!(ranges(&hub), [format!("bytes={}-", 500 * 1024)]);
    let lines: Vec<_> = said
        .out
        .lines()
        .filter(|l| l.contains("(download-model)"))
        .collect();
    assert!(lines[0].contains(&format!("Downloading {ID}")), "{said:?}");
    let percent = lines.iter().find(|l| l.contains(" % of ")).unwrap();
    assert!(
        percent.contains("kB, ") && percent.contains("B/s"),
        "{percent}"
    );
    assert!(
        lines.last().unwrap().contains(&format!("Downloaded {ID}")),
        "{said:?}"
    );
}
