//! The files of `tests/data/gguf`, and what can be done to them.

// Each test binary uses a part of it.
#![allow(dead_code)]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use candle_core::{
    Device,
    quantized::{
        QTensor,
        gguf_file::{self, Value},
    },
};
use tempfile::TempDir;

pub const TEXT: &str = "SmolVLM-Small-BF16.gguf";
pub const PROJECTOR: &str = "mmproj-SmolVLM-Small-BF16.gguf";
pub const TEXT_Q8_0: &str = "SmolVLM-Small-Q8_0.gguf";
pub const PROJECTOR_Q8_0: &str = "mmproj-SmolVLM-Small-Q8_0.gguf";

pub fn data(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data/gguf")
        .join(file)
}

/// A folder with copies of these files.
pub fn folder(files: &[&str]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in files {
        fs::copy(data(file), folder.path().join(file)).unwrap();
    }
    folder
}

/// A GGUF file to be changed.
pub struct Gguf {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, QTensor>,
}

impl Gguf {
    pub fn read(file: &str) -> Self {
        let mut bytes = fs::File::open(data(file)).unwrap();
        let content = gguf_file::Content::read(&mut bytes).unwrap();
        let names = content.tensor_infos.keys();
        let tensors = names.map(|name| {
            let tensor = content.tensor(&mut bytes, name, &Device::Cpu).unwrap();
            (name.clone(), tensor)
        });
        Self {
            tensors: tensors.collect(),
            metadata: content.metadata.into_iter().collect(),
        }
    }

    pub fn write(&self, path: impl AsRef<Path>) {
        let metadata: Vec<_> = self.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let tensors: Vec<_> = self.tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let mut file = fs::File::create(path).unwrap();
        gguf_file::write(&mut file, &metadata, &tensors).unwrap();
    }

    pub fn set(&mut self, key: &str, value: Value) {
        self.metadata.insert(key.into(), value);
    }

    pub fn rename(&mut self, from: &str, to: &str) {
        let tensor = self.tensors.remove(from).unwrap();
        self.tensors.insert(to.into(), tensor);
    }
}

/// A folder with a text file and a projector that were changed.
pub fn changed(change: impl FnOnce(&mut Gguf, &mut Gguf)) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let (mut text, mut projector) = (Gguf::read(TEXT), Gguf::read(PROJECTOR));
    change(&mut text, &mut projector);
    text.write(folder.path().join(TEXT));
    projector.write(folder.path().join(PROJECTOR));
    folder
}
