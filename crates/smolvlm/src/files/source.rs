//! Model sources: the demo model, a folder, GGUF files, or the hub.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs,
    io::{self, Read},
    path::{Component, Path, PathBuf},
};

use serde::Deserialize;
use serde_json::Value;

use crate::{
    error::{Error, Result},
    files::{gguf, weights::ReadSeek},
};

/// The place that a model is loaded from.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Source {
    /// The demo model embedded in this library, which only knows pictures of `videotestsrc`, and says so of others.
    Demo,
    /// A folder with a safetensors checkpoint.
    Folder(PathBuf),
    /// The two GGUF files of a llama.cpp model.
    Gguf {
        /// The text model: decoder and vocabulary.
        text: PathBuf,
        /// The mmproj file: vision encoder and projector.
        projector: PathBuf,
        /// Whether `projector` was chosen only because the folder has no other.
        guessed: bool,
    },
    /// A model of the Hugging Face hub that must be downloaded.
    #[cfg(feature = "hub")]
    Hub(crate::files::hub::Repository),
}

impl Source {
    /// Parses a `model` setting: a folder, a GGUF file or, if no such path exists, an id of the hub, as in `owner/name`
    /// or `owner/name:Q8_0` for one of several GGUF files. `None` and the empty string are the demo model.
    ///
    /// Makes no request: a model that is complete in the hub's cache is the files there. Errors if `model` is none of
    /// these, or is not in the cache and an environment variable forbids the network.
    pub fn parse(model: Option<&OsStr>, revision: Option<&str>) -> Result<Self> {
        let Some(model) = model.filter(|m| !m.is_empty()) else {
            return Ok(Self::Demo);
        };
        let path = PathBuf::from(model);
        if path.is_dir() {
            return Self::from_folder(path);
        }
        if gguf::is_gguf(&model.to_string_lossy()) {
            return gguf::source_of_text_model(&path);
        }
        // An id is ASCII; a path need not be.
        let id = model.to_str().and_then(hub_id);
        #[cfg(feature = "hub")]
        if let Some((id, tag)) = id.filter(|_| !path.exists()) {
            let repository = crate::files::hub::Repository::new(id, tag, revision)?;
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
        } else if let Some((id, _)) = id {
            format!(
                "This build has no support for the Hugging Face hub: download the model (hf download {id} \
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

    /// The text model `model`, a GGUF file or a folder with one, and the mmproj file `mmproj`. Errors if either is
    /// missing.
    pub fn with_mmproj(model: Option<&OsStr>, mmproj: &OsStr) -> Result<Self> {
        gguf::with_mmproj(model, mmproj)
    }

    fn from_folder(folder: PathBuf) -> Result<Self> {
        if !folder.join(CONFIG).exists()
            && let Some(source) = gguf::source_in_folder(&folder)?
        {
            return Ok(source);
        }
        Ok(Self::Folder(folder))
    }

    /// Reads a file of text, of at most 64 MiB; `None` if it doesn't exist.
    pub(crate) fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        // A tokenizer takes 4 MB. Without a limit a link to /dev/zero would take all memory.
        const MAX: u64 = 64 << 20;
        let Some(file) = self.open(name)? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        match file.take(MAX + 1).read_to_end(&mut bytes) {
            Ok(_) if bytes.len() as u64 > MAX => Err(Error::file(
                &self.path(name),
                "is larger than 64 MiB",
                "Download it again",
            )),
            Ok(_) => Ok(Some(bytes)),
            Err(e) => Err(Error::file(&self.path(name), e, "Check its permissions")),
        }
    }

    /// Opens a file; `None` if it doesn't exist.
    pub(crate) fn open(&self, name: &str) -> Result<Option<Box<dyn ReadSeek>>> {
        match self {
            Self::Demo => {
                Ok(demo::file(name).map(|b| Box::new(io::Cursor::new(b)) as Box<dyn ReadSeek>))
            }
            Self::Folder(folder) => {
                let path = folder.join(name);
                match fs::File::open(&path) {
                    Ok(file) => Ok(Some(Box::new(file))),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                    Err(e) => Err(Error::file(&path, e, "Check its permissions")),
                }
            }
            // The header has what other checkpoints have in files.
            Self::Gguf { .. } => Ok(None),
            #[cfg(feature = "hub")]
            Self::Hub(_) => Ok(None),
        }
    }

    /// The path of a file, for errors.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        match self {
            Self::Demo => Path::new("demo").join(name),
            Self::Folder(folder) => folder.join(name),
            Self::Gguf { text, .. } => text.clone(),
            #[cfg(feature = "hub")]
            Self::Hub(repository) => Path::new(repository.id()).join(name),
        }
    }

    /// `found`, or the error that the file is missing.
    pub(crate) fn require<T>(&self, name: &str, found: Option<T>) -> Result<T> {
        found.ok_or_else(|| Error::NotFound {
            path: self.path(name),
            what: "file",
            remedy:
                "A model folder needs config.json, preprocessor_config.json, tokenizer.json and \
                     model.safetensors; download the whole repository"
                    .into(),
        })
    }

    /// Reads and parses a file that must exist.
    pub(crate) fn read_parsed<T>(
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

    /// Reads a JSON file; `None` if it doesn't exist. Errors if it doesn't parse.
    pub(crate) fn read_json(&self, name: &str) -> Result<Option<Value>> {
        self.read(name)?
            .map(|bytes| {
                serde_json::from_slice(&bytes)
                    .map_err(|e| Error::file(&self.path(name), e, "Download it again"))
            })
            .transpose()
    }

    /// Name and revision for the caption record.
    pub(crate) fn identity(&self) -> (String, String) {
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
                // Not of the file: in the hub's cache it is a link.
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

/// Splits `owner/name:tag` into id and tag; `None` if the text is no id.
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

/// Id and commit of a snapshot in the hub's cache, `…/models--owner--name/snapshots/<commit>`.
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

/// The commit of a file that `hf download --local-dir` downloaded, from the metadata beside it.
fn local_dir_revision(folder: &Path, file: &str) -> Option<String> {
    let notes = folder.join(".cache/huggingface/download");
    let note = fs::read_to_string(notes.join(format!("{file}.metadata"))).ok()?;
    let commit = note.lines().next()?.trim();
    (commit.len() == 40 && commit.chars().all(|c| c.is_ascii_hexdigit())).then(|| commit.to_owned())
}

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const PROCESSOR_CONFIG: &str = "processor_config.json";
pub(crate) const PREPROCESSOR_CONFIG: &str = "preprocessor_config.json";
pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const WEIGHTS: &str = "model.safetensors";
pub(crate) const WEIGHTS_INDEX: &str = "model.safetensors.index.json";

#[derive(Deserialize)]
struct WeightsIndex {
    weight_map: BTreeMap<String, String>,
}

/// Opens the weights: one file, or all shards of the index.
pub(crate) fn weight_files(source: &Source) -> Result<Vec<(PathBuf, Box<dyn ReadSeek>)>> {
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

/// The shards of an index. Errors if one isn't in the same folder.
pub(crate) fn shards(source: &Source, index: &[u8]) -> Result<BTreeSet<String>> {
    let index: WeightsIndex = serde_json::from_slice(index)
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
                format!("names `{shard}`, which is not a file in this folder"),
                "Do not use this checkpoint",
            ));
        }
    }
    Ok(shards)
}

/// The embedded files of `models/demo`.
mod demo {
    macro_rules! files {
        ($($name:literal),*) => {
            pub(crate) fn file(name: &str) -> Option<&'static [u8]> {
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
    fn a_file_of_text_without_an_end_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let file = fs::File::create(folder.path().join(TOKENIZER)).unwrap();
        file.set_len(64 << 20).unwrap();
        let source = Source::Folder(folder.path().into());
        assert_eq!(source.read(TOKENIZER).unwrap().unwrap().len(), 64 << 20);
        file.set_len((64 << 20) + 1).unwrap();
        let error = source.read(TOKENIZER).unwrap_err().to_string();
        assert!(
            error.contains("tokenizer.json: is larger than 64 MiB"),
            "{error}"
        );
    }

    #[test]
    fn a_missing_folder_is_told_from_a_hub_id() {
        let error = Source::parse(Some("/no/such/folder".as_ref()), None)
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
            Source::parse(Some("a/b".as_ref()), None)
                .unwrap_err()
                .to_string()
                .contains("hf download a/b")
        );
        assert_eq!(Source::parse(None, None).unwrap(), Source::Demo);
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
