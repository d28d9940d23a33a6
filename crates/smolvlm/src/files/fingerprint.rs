//! The identity of a checkpoint, for sharing loaded models.

use std::{
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use crate::files::{
    chat_template,
    source::{CONFIG, PREPROCESSOR_CONFIG, PROCESSOR_CONFIG, Source, TOKENIZER},
    weights::Weights,
};

/// The identity of a checkpoint: its files with size, modification time and inode. Two checkpoints with equal
/// fingerprints are the same model.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Fingerprint(Vec<FileState>);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct FileState {
    path: PathBuf,
    /// Bytes, if the file exists.
    size: Option<u64>,
    modified: Option<SystemTime>,
    /// Tells a file from a copy that replaced it with the same size and time.
    inode: Option<u64>,
}

impl Fingerprint {
    pub(crate) fn new(source: &Source, weights: &Weights) -> Self {
        let others: &[_] = match source {
            Source::Gguf { .. } => &[],
            _ => &[
                CONFIG,
                PREPROCESSOR_CONFIG,
                PROCESSOR_CONFIG,
                TOKENIZER,
                "generation_config.json",
            ],
        };
        let templates: &[_] = match source {
            Source::Gguf { .. } => &[],
            _ => &chat_template::FILES,
        };
        let others = others.iter().chain(templates).map(|name| source.path(name));
        let files = others.chain(weights.paths().map(Path::to_owned));
        let states = files.map(|path| {
            let file = fs::metadata(&path).ok();
            FileState {
                // A link may change, and a folder may have two names.
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

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use crate::Checkpoint;

    #[test]
    fn a_copy_of_the_same_size_and_time_is_another_model() {
        let folder = tempfile::tempdir().unwrap();
        let reference = Path::new("tests/data/gguf/SmolVLM-Small");
        for file in fs::read_dir(reference).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
        }
        let source = Source::parse(Some(folder.path().as_os_str()), None).unwrap();
        let fingerprint = || Checkpoint::open(&source).unwrap().fingerprint().clone();
        let before = fingerprint();
        assert!(before == fingerprint());
        // rsync replaces a file this way.
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
}
