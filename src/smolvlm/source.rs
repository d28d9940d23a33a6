//! Where a model comes from, and what can be known of it before it is loaded.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, Read},
    path::{Component, Path, PathBuf},
    time::SystemTime,
};

use serde::Deserialize;
use serde_json::Value;

use super::{
    Config, Error, PreprocessorConfig, Result,
    gguf::{self, Vocabulary},
    tokenizer,
    weights::{Bytes, Weights},
};

/// What the `model` property names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The model embedded in this library; it knows `videotestsrc` pictures only.
    Demo,
    /// A folder with the files of a checkpoint.
    Folder(PathBuf),
    /// The two files of a model that llama.cpp runs.
    Gguf {
        text: PathBuf,
        /// Its vision encoder, the mmproj file.
        projector: PathBuf,
    },
    /// A model of the Hugging Face hub that isn't in the cache yet.
    #[cfg(feature = "hub")]
    Hub(super::Repository),
}

/// How far a download has come, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Transfer {
    /// On disk, whenever it got there.
    pub done: u64,
    /// 0 until it is known.
    pub total: u64,
    /// Brought by the network since the download began.
    pub received: u64,
}

impl Source {
    /// `None` and the empty string are the demo model; anything else is a folder, a GGUF file or, where there
    /// is neither and it looks like one, an id of the hub, behind which `:Q8_0` may choose among GGUF files.
    /// Asks no network: a model that is whole in the hub's cache is what it has there.
    pub fn parse(model: Option<&str>, revision: Option<&str>) -> Result<Self> {
        let Some(model) = model.filter(|m| !m.is_empty()) else {
            return Ok(Self::Demo);
        };
        let path = PathBuf::from(model);
        if path.is_dir() {
            return Self::inside(path);
        }
        if gguf::is_gguf(model) {
            return gguf::beside(&path);
        }
        #[cfg(feature = "hub")]
        if let Some((id, tag)) = hub_id(model).filter(|_| !path.exists()) {
            let repository = super::Repository::new(id, tag, revision)?;
            return match repository.cached() {
                Some(source) => Ok(source),
                None => repository.check_online().map(|()| Self::Hub(repository)),
            };
        }
        #[cfg(not(feature = "hub"))]
        let _ = revision;
        let remedy = if path.exists() {
            "Set model to the folder that holds config.json, not to a file in it".into()
        } else if cfg!(feature = "hub") {
            "Set model to a folder with config.json, tokenizer.json and model.safetensors, to a GGUF file, or \
             to the id of a model on the Hugging Face hub, as in HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
                .into()
        } else if let Some((id, _)) = hub_id(model) {
            format!(
                "This build does without the Hugging Face hub: download the model (hf download {id} \
                 --local-dir DIR) and set model=DIR"
            )
        } else {
            "Set model to a folder with config.json, tokenizer.json and model.safetensors, or to a GGUF file"
                .into()
        };
        Err(Error::NotFound {
            path,
            what: "model folder",
            remedy,
        })
    }

    fn inside(folder: PathBuf) -> Result<Self> {
        if !folder.join(CONFIG).exists()
            && let Some(source) = gguf::inside(&folder)?
        {
            return Ok(source);
        }
        Ok(Self::Folder(folder))
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let Some(mut file) = self.open(name)? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        match file.read_to_end(&mut bytes) {
            Ok(_) => Ok(Some(bytes)),
            Err(e) => Err(Error::file(&self.path(name), e, "Check its permissions")),
        }
    }

    fn open(&self, name: &str) -> Result<Option<Box<dyn Bytes>>> {
        match self {
            Self::Demo => {
                Ok(demo::file(name).map(|b| Box::new(io::Cursor::new(b)) as Box<dyn Bytes>))
            }
            Self::Folder(folder) => {
                let path = folder.join(name);
                match fs::File::open(&path) {
                    Ok(file) => Ok(Some(Box::new(file))),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                    Err(e) => Err(Error::file(&path, e, "Check its permissions")),
                }
            }
            // What others have files for is in the header.
            Self::Gguf { .. } => Ok(None),
            #[cfg(feature = "hub")]
            Self::Hub(_) => Ok(None),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        match self {
            Self::Demo => Path::new("demo").join(name),
            Self::Folder(folder) => folder.join(name),
            Self::Gguf { text, .. } => text.clone(),
            #[cfg(feature = "hub")]
            Self::Hub(repository) => Path::new(repository.id()).join(name),
        }
    }

    fn require<T>(&self, name: &str, found: Option<T>) -> Result<T> {
        found.ok_or_else(|| Error::NotFound {
            path: self.path(name),
            what: "file",
            remedy:
                "A model folder needs config.json, preprocessor_config.json, tokenizer.json and \
                     model.safetensors; download the whole repository"
                    .into(),
        })
    }

    /// A file that must be there, through `parse`.
    pub(super) fn parsed<T>(
        &self,
        name: &str,
        parse: impl FnOnce(&[u8]) -> Result<T, String>,
    ) -> Result<T> {
        let bytes = self.require(name, self.read(name)?)?;
        parse(&bytes).map_err(|reason| {
            Error::file(
                &self.path(name),
                reason,
                "vlmnarrate runs SmolVLM and SmolVLM2 checkpoints in safetensors form",
            )
        })
    }

    /// A JSON file that may be missing; one that doesn't parse is an error all the same.
    fn json(&self, name: &str) -> Result<Option<Value>> {
        self.read(name)?
            .map(|bytes| {
                serde_json::from_slice(&bytes)
                    .map_err(|e| Error::file(&self.path(name), e, "Download it again"))
            })
            .transpose()
    }

    /// Name and revision for the caption record.
    fn identity(&self) -> (String, String) {
        match self {
            Self::Demo => ("demo".into(), env!("CARGO_PKG_VERSION").into()),
            Self::Folder(folder) => {
                let folder = folder.canonicalize().unwrap_or_else(|_| folder.clone());
                hub_cache_identity(&folder).unwrap_or_else(|| {
                    let name = folder.file_name().unwrap_or(folder.as_os_str());
                    let revision = local_dir_revision(&folder, CONFIG).unwrap_or_default();
                    (name.to_string_lossy().into_owned(), revision)
                })
            }
            Self::Gguf { text, .. } => {
                // Not of the file, which is a link in the hub's cache.
                let folder = text.parent().and_then(|folder| folder.canonicalize().ok());
                let folder = folder.unwrap_or_default();
                let file = text.file_name().unwrap_or_default().to_string_lossy();
                match (hub_cache_identity(&folder), gguf::quantization(&file)) {
                    (Some((id, commit)), Some(tag)) => (format!("{id}:{tag}"), commit),
                    (Some(identity), None) => identity,
                    (None, _) => {
                        let name = text.file_stem().unwrap_or_default();
                        let revision = local_dir_revision(&folder, &file).unwrap_or_default();
                        (name.to_string_lossy().into_owned(), revision)
                    }
                }
            }
            #[cfg(feature = "hub")]
            Self::Hub(repository) => (repository.id().into(), String::new()),
        }
    }
}

/// `owner/name`, and what stands behind a colon.
fn hub_id(model: &str) -> Option<(&str, Option<&str>)> {
    let word = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    let (id, tag) = match model.split_once(':') {
        Some((id, tag)) => (id, Some(tag)),
        None => (model, None),
    };
    let (owner, name) = id.split_once('/')?;
    (word(owner) && word(name) && tag.is_none_or(word)).then_some((id, tag))
}

/// `…/models--owner--name/snapshots/<commit>`, as the hub's cache lays it out.
fn hub_cache_identity(folder: &Path) -> Option<(String, String)> {
    let commit = folder.file_name()?.to_str()?;
    let snapshots = folder.parent()?;
    let repo = snapshots.parent()?.file_name()?.to_str()?;
    if snapshots.file_name()? != "snapshots" {
        return None;
    }
    let name = repo.strip_prefix("models--")?.replacen("--", "/", 1);
    Some((name, commit.to_owned()))
}

/// The commit that `huggingface-cli download --local-dir` notes for each file.
fn local_dir_revision(folder: &Path, file: &str) -> Option<String> {
    let notes = folder.join(".cache/huggingface/download");
    let note = fs::read_to_string(notes.join(format!("{file}.metadata"))).ok()?;
    let commit = note.lines().next()?.trim();
    (commit.len() == 40 && commit.chars().all(|c| c.is_ascii_hexdigit())).then(|| commit.to_owned())
}

/// Tells whether two checkpoints are the same: the same files, unchanged since.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Fingerprint(Vec<FileState>);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct FileState {
    path: PathBuf,
    /// Where there is such a file.
    size: Option<u64>,
    modified: Option<SystemTime>,
    /// A copy that took its place may have all of these.
    inode: Option<u64>,
}

impl Fingerprint {
    fn new(source: &Source, weights: &Weights) -> Self {
        let others: &[_] = match source {
            Source::Gguf { .. } => &[],
            _ => &[
                CONFIG,
                PREPROCESSOR_CONFIG,
                PROCESSOR_CONFIG,
                TOKENIZER,
                "chat_template.jinja",
                "generation_config.json",
            ],
        };
        let others = others.iter().map(|name| source.path(name));
        let files = others.chain(weights.paths().map(Path::to_owned));
        let states = files.map(|path| {
            let file = fs::metadata(&path).ok();
            FileState {
                // A link may lead elsewhere tomorrow, a folder have two names.
                path: path.canonicalize().unwrap_or(path),
                size: file.as_ref().map(fs::Metadata::len),
                modified: file.as_ref().and_then(|file| file.modified().ok()),
                inode: file.as_ref().and_then(inode),
            }
        });
        Self(states.collect())
    }
}

#[cfg(unix)]
fn inode(file: &fs::Metadata) -> Option<u64> {
    Some(std::os::unix::fs::MetadataExt::ino(file))
}

#[cfg(not(unix))]
fn inode(_: &fs::Metadata) -> Option<u64> {
    None
}

/// A model's files, looked at and found fit, nothing heavy read yet.
pub struct Checkpoint {
    pub(super) source: Source,
    name: String,
    revision: String,
    pub(super) config: Config,
    pub(super) preprocessor: PreprocessorConfig,
    pub(super) chat_template: String,
    /// Where there is no `tokenizer.json`.
    vocabulary: Option<Vocabulary>,
    /// Ids that end generation, from `generation_config.json`.
    pub(super) eos: Vec<u32>,
    pub(super) weights: Weights,
    fingerprint: Fingerprint,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint")
            .field("source", &self.source)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Checkpoint {
    /// Reads the configuration and the weights' headers, and checks that every file is there and whole.
    pub fn open(source: &Source) -> Result<Self> {
        let (name, revision) = source.identity();
        if let Source::Gguf { text, projector } = source {
            let parts = gguf::Parts::open(text, projector)?;
            return Ok(Self {
                name,
                revision,
                fingerprint: Fingerprint::new(source, &parts.weights),
                chat_template: parts.chat_template.unwrap_or_else(|| CHAT_TEMPLATE.into()),
                vocabulary: Some(parts.vocabulary),
                eos: parts.eos,
                source: source.clone(),
                config: parts.config,
                preprocessor: parts.preprocessor,
                weights: parts.weights,
            });
        }
        let config = source.parsed(CONFIG, Config::from_json)?;
        let preprocessor = preprocessor(source, &config)?;
        // Parsing megabytes of merges is the worker's job; that the file is there is known now.
        source.require(TOKENIZER, source.open(TOKENIZER)?)?;
        let weights = Weights::open(weight_files(source)?)?;
        Ok(Self {
            name,
            revision,
            fingerprint: Fingerprint::new(source, &weights),
            chat_template: chat_template(source)?,
            vocabulary: None,
            eos: eos(source)?,
            source: source.clone(),
            config,
            preprocessor,
            weights,
        })
    }

    /// The hub's name if the folder shows it, else the folder's; `demo` for the embedded model.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The hub's commit, or empty where the folder doesn't tell.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    pub fn is_demo(&self) -> bool {
        self.source == Source::Demo
    }

    /// Side in pixels of the squares seen in training.
    pub fn image_size(&self) -> u32 {
        self.preprocessor.max_image_size.longest_edge as u32
    }

    /// Whether the encoder can run on squares of `side` pixels.
    pub fn check_image_size(&self, side: u32) -> Result<()> {
        let least = self.config.vision_config.patch_size * self.config.scale_factor;
        let most = self.image_size();
        if side as usize >= least && side <= most {
            return Ok(());
        }
        Err(Error::Setting {
            property: "image-size",
            reason: format!(
                "{side} pixels is outside the {least} to {most} that model `{}` can see; 0 takes {most}",
                self.name
            ),
        })
    }

    pub(super) fn tokenizer(&self) -> Result<tokenizers::Tokenizer> {
        if let Some(vocabulary) = &self.vocabulary {
            return vocabulary
                .tokenizer()
                .map_err(|reason| self.file_error(TOKENIZER, reason));
        }
        self.source.parsed(TOKENIZER, tokenizer::from_json)
    }

    /// An error that concerns one of the checkpoint's files.
    pub(super) fn file_error(&self, name: &str, reason: impl std::fmt::Display) -> Error {
        Error::file(&self.source.path(name), reason, SAME_CHECKPOINT)
    }

    pub(super) fn encoder_error(&self, reason: String) -> Error {
        match &self.source {
            Source::Gguf { projector, .. } => Error::file(projector, reason, SAME_CHECKPOINT),
            _ => self.decoder_error(reason),
        }
    }

    pub(super) fn decoder_error(&self, reason: String) -> Error {
        self.file_error(WEIGHTS, reason)
    }
}

const SAME_CHECKPOINT: &str = "Are all files from the same checkpoint?";

/// In a file of its own as published, inside `processor_config.json` as transformers 5 saves it.
fn preprocessor(source: &Source, config: &Config) -> Result<PreprocessorConfig> {
    let parse = |json: &[u8]| {
        let preprocessor = PreprocessorConfig::from_json(json)?;
        config.check_side(preprocessor.max_image_size.longest_edge)?;
        Ok(preprocessor)
    };
    if source.read(PREPROCESSOR_CONFIG)?.is_none() {
        let processor = source.json(PROCESSOR_CONFIG)?;
        if let Some(config) = processor.as_ref().and_then(|p| p.get("image_processor")) {
            return parse(config.to_string().as_bytes()).map_err(|reason| {
                Error::file(&source.path(PROCESSOR_CONFIG), reason, "Download it again")
            });
        }
    }
    source.parsed(PREPROCESSOR_CONFIG, parse)
}

pub(super) const CONFIG: &str = "config.json";
pub(super) const PROCESSOR_CONFIG: &str = "processor_config.json";
pub(super) const PREPROCESSOR_CONFIG: &str = "preprocessor_config.json";
pub(super) const TOKENIZER: &str = "tokenizer.json";
pub(super) const WEIGHTS: &str = "model.safetensors";
pub(super) const WEIGHTS_INDEX: &str = "model.safetensors.index.json";

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The one file, or every shard that the index names.
pub(super) fn weight_files(source: &Source) -> Result<Vec<(PathBuf, Box<dyn Bytes>)>> {
    if let Some(bytes) = source.open(WEIGHTS)? {
        return Ok(vec![(source.path(WEIGHTS), bytes)]);
    }
    let Some(index) = source.read(WEIGHTS_INDEX)? else {
        return source.require(WEIGHTS, None);
    };
    shards(source, &index)?
        .into_iter()
        .map(|shard| {
            let bytes = source.require(&shard, source.open(&shard)?)?;
            Ok((source.path(&shard), bytes))
        })
        .collect()
}

/// The files that an index names.
pub(super) fn shards(source: &Source, index: &[u8]) -> Result<BTreeSet<String>> {
    let index: Index = serde_json::from_slice(index)
        .map_err(|e| Error::file(&source.path(WEIGHTS_INDEX), e, "Download it again"))?;
    let shards: BTreeSet<_> = index.weight_map.into_values().collect();
    for shard in &shards {
        let mut parts = Path::new(shard).components();
        if !matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(_)), None)
        ) {
            return Err(Error::file(
                &source.path(WEIGHTS_INDEX),
                format!("names `{shard}`, which is not a file of this folder"),
                "Do not use this checkpoint",
            ));
        }
    }
    Ok(shards)
}

/// For folders that come without one: the demo model has the template of every published checkpoint.
const CHAT_TEMPLATE: &str = include_str!("../../models/demo/chat_template.jinja");

fn chat_template(source: &Source) -> Result<String> {
    if let Some(bytes) = source.read("chat_template.jinja")? {
        return String::from_utf8(bytes)
            .map_err(|e| Error::file(&source.path("chat_template.jinja"), e, "Download it again"));
    }
    for name in [
        "chat_template.json",
        PROCESSOR_CONFIG,
        "tokenizer_config.json",
    ] {
        let json = source.json(name)?;
        if let Some(template) = json.as_ref().and_then(|j| j.get("chat_template")?.as_str()) {
            return Ok(template.to_owned());
        }
    }
    Ok(CHAT_TEMPLATE.into())
}

/// `eos_token_id` is a number or a list of them.
fn eos(source: &Source) -> Result<Vec<u32>> {
    let json = source.json("generation_config.json")?;
    let ids = match json.as_ref().and_then(|j| j.get("eos_token_id")) {
        Some(Value::Array(ids)) => ids.iter().collect(),
        Some(id) => vec![id],
        None => vec![],
    };
    Ok(ids
        .into_iter()
        .filter_map(|id| id.as_u64()?.try_into().ok())
        .collect())
}

/// The files of `models/demo`, built in.
mod demo {
    macro_rules! files {
        ($($name:literal),*) => {
            pub(super) fn file(name: &str) -> Option<&'static [u8]> {
                match name {
                    $($name => Some(include_bytes!(concat!("../../models/demo/", $name))),)*
                    _ => None,
                }
            }
        };
    }
    files!(
        "config.json",
        "preprocessor_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "tokenizer.json",
        "model.safetensors"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_folder_is_told_from_a_hub_id() {
        let error = Source::parse(Some("/no/such/folder"), None)
            .unwrap_err()
            .to_string();
        assert!(error.contains("/no/such/folder: no such"), "{error}");
        assert!(error.contains("Set model to a folder"), "{error}");
        let id = "HuggingFaceTB/SmolVLM-256M-Instruct";
        assert_eq!(hub_id(id), Some((id, None)));
        assert_eq!(hub_id("a/b:Q8_0"), Some(("a/b", Some("Q8_0"))));
        for path in [
            "/a/b", "./a", "../a", "a/b/c", "a", "a/", "~/a", "a/b:", "a/b:c:d", "a:b",
        ] {
            assert_eq!(hub_id(path), None, "{path}");
        }
        #[cfg(not(feature = "hub"))]
        assert!(
            Source::parse(Some("a/b"), None)
                .unwrap_err()
                .to_string()
                .contains("hf download a/b")
        );
        assert_eq!(Source::parse(None, None).unwrap(), Source::Demo);
    }

    #[cfg(unix)]
    #[test]
    fn a_copy_of_the_same_size_and_time_is_another_model() {
        let folder = tempfile::tempdir().unwrap();
        let reference = Path::new("tests/data/gguf/SmolVLM-Small");
        for file in fs::read_dir(reference).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
        }
        let source = Source::parse(folder.path().to_str(), None).unwrap();
        let fingerprint = || Checkpoint::open(&source).unwrap().fingerprint;
        let before = fingerprint();
        assert!(before == fingerprint());
        // As rsync does it.
        let weights = folder.path().join("model.safetensors");
        let copy = folder.path().join("copy");
        fs::copy(&weights, &copy).unwrap();
        let modified = fs::metadata(&weights).unwrap().modified().unwrap();
        fs::File::options()
            .append(true)
            .open(&copy)
            .unwrap()
            .set_modified(modified)
            .unwrap();
        fs::rename(&copy, &weights).unwrap();
        assert!(before != fingerprint());
    }

    #[test]
    fn the_cache_folder_tells_name_and_commit() {
        let folder = Path::new("/c/models--HuggingFaceTB--SmolVLM-256M-Instruct/snapshots/abc");
        assert_eq!(
            hub_cache_identity(folder),
            Some(("HuggingFaceTB/SmolVLM-256M-Instruct".into(), "abc".into()))
        );
        assert_eq!(hub_cache_identity(Path::new("/models/mine")), None);
    }
}
