//! Tensors of a checkpoint's safetensors files, found by one set of names and read one at a time.
//!
//! Files are read, not mapped: each tensor is converted to the compute type once, and a file that is
//! cut or replaced while we load gives an error where a mapping would give SIGBUS.

use std::{
    collections::HashMap,
    io::{self, Read, Seek, SeekFrom},
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Mutex,
};

use candle_core::{
    DType, Device, Error as CandleError, Result as CandleResult, Shape, Tensor, WithDType,
};
use candle_nn::{Init, var_builder::SimpleBackend};
use safetensors::{Dtype, tensor::Metadata};

use super::{Error, Result};

pub(super) trait Bytes: Read + Seek + Send {}
impl<T: Read + Seek + Send> Bytes for T {}

/// The largest header the safetensors format allows.
const MAX_HEADER: u64 = 100_000_000;
const DOWNLOAD_AGAIN: &str = "Download it again";

struct File {
    path: PathBuf,
    bytes: Mutex<Box<dyn Bytes>>,
}

#[derive(Debug, Clone)]
struct Entry {
    file: usize,
    dtype: DType,
    shape: Vec<usize>,
    /// From the start of the file.
    start: u64,
    len: usize,
}

/// What a checkpoint holds, known from the headers alone.
pub(super) struct Weights {
    files: Vec<File>,
    entries: HashMap<String, Entry>,
    total: u64,
}

impl Weights {
    /// Reads the headers and checks that every tensor lies inside its file.
    pub(super) fn open(files: Vec<(PathBuf, Box<dyn Bytes>)>) -> Result<Self> {
        let mut weights = Self {
            files: Vec::with_capacity(files.len()),
            entries: HashMap::new(),
            total: 0,
        };
        for (path, mut bytes) in files {
            let index = weights.files.len();
            match read_header(bytes.as_mut(), index) {
                Ok(entries) => weights.entries.extend(entries),
                Err(reason) => return Err(Error::file(&path, reason, DOWNLOAD_AGAIN)),
            }
            weights.files.push(File {
                path,
                bytes: Mutex::new(bytes),
            });
        }
        weights.total = weights.entries.values().map(|e| e.len as u64).sum();
        Ok(weights)
    }

    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    fn find(&self, name: &str) -> CandleResult<&Entry> {
        self.entries.get(name).ok_or_else(|| {
            CandleError::CannotFindTensor {
                path: name.to_owned(),
            }
            .bt()
        })
    }

    fn read(&self, name: &str, entry: &Entry) -> CandleResult<Tensor> {
        match entry.dtype {
            DType::F32 => self.read_as::<f32>(name, entry),
            DType::F16 => self.read_as::<half::f16>(name, entry),
            _ => self.read_as::<half::bf16>(name, entry),
        }
    }

    /// Straight into the tensor's memory: a copy on the way would count in the peak.
    fn read_as<T: WithDType + bytemuck::Pod>(
        &self,
        name: &str,
        entry: &Entry,
    ) -> CandleResult<Tensor> {
        let file = &self.files[entry.file];
        let mut data = vec![T::zeroed(); entry.len / size_of::<T>()];
        // A poisoned lock means that another read panicked; the position is set anew anyway.
        let mut bytes = file.bytes.lock().unwrap_or_else(|e| e.into_inner());
        bytes
            .seek(SeekFrom::Start(entry.start))
            .and_then(|_| bytes.read_exact(bytemuck::cast_slice_mut(&mut data)))
            .map_err(|e| {
                CandleError::msg(format!("{}: reading `{name}`: {e}", file.path.display()))
            })?;
        drop(bytes);
        Tensor::from_vec(data, entry.shape.as_slice(), &Device::Cpu)
    }
}

fn read_header(bytes: &mut dyn Bytes, file: usize) -> Result<Vec<(String, Entry)>, String> {
    let io = |e: io::Error| e.to_string();
    let size = bytes.seek(SeekFrom::End(0)).map_err(io)?;
    bytes.rewind().map_err(io)?;
    let mut len = [0; 8];
    bytes
        .read_exact(&mut len)
        .map_err(|_| format!("is only {size} bytes long, too short for safetensors"))?;
    let len = u64::from_le_bytes(len);
    if len > MAX_HEADER || len > size.saturating_sub(8) {
        return Err(format!(
            "is not safetensors, or cut short (a header of {len} bytes in a file of {size})"
        ));
    }
    let mut header = vec![0; len as usize];
    bytes.read_exact(&mut header).map_err(io)?;
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|e| format!("has a broken header ({e})"))?;
    let data_start = 8 + len;
    let mut entries = Vec::new();
    for (name, info) in metadata.tensors() {
        let (from, to) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
        if to > size - data_start {
            return Err(format!(
                "is cut short: `{name}` ends at byte {} of {size}",
                data_start.saturating_add(to)
            ));
        }
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            // Buffers such as integer position ids; the model asks for none of them.
            _ => continue,
        };
        let bytes = info
            .shape
            .iter()
            .try_fold(dtype.size_in_bytes() as u64, |n, &d| {
                n.checked_mul(d as u64)
            });
        if from > to || bytes != Some(to - from) {
            return Err(format!(
                "has a broken header: `{name}` of shape {:?} at {from}..{to}",
                info.shape
            ));
        }
        let entry = Entry {
            file,
            dtype,
            shape: info.shape.clone(),
            start: data_start + from,
            len: (to - from) as usize,
        };
        entries.push((canonical(&name), entry));
    }
    Ok(entries)
}

/// The published name of a tensor, whichever way it was saved: with or without the `model.` of the class
/// that wraps it, and with the decoder's own `model.` and `lm_head` inside (2.2B descriptions).
fn canonical(name: &str) -> String {
    let bare = name.strip_prefix("model.").unwrap_or(name);
    if let Some(rest) = bare.strip_prefix("text_model.") {
        if rest.starts_with("lm_head.") {
            return rest.to_owned();
        }
        let rest = rest.strip_prefix("model.").unwrap_or(rest);
        return format!("model.text_model.{rest}");
    }
    if bare.starts_with("vision_model.") || bare.starts_with("connector.") {
        return format!("model.{bare}");
    }
    name.to_owned()
}

/// Called with bytes read and bytes in all; `Break` ends the load.
pub type Progress<'a> = dyn FnMut(u64, u64) -> ControlFlow<()> + Send + 'a;

/// [`Weights`] as a `VarBuilder` reads them, with progress and a way out.
pub(super) struct Loader<'a> {
    pub(super) weights: &'a Weights,
    pub(super) progress: &'a Mutex<LoadProgress<'a>>,
}

pub(super) struct LoadProgress<'a> {
    read: u64,
    pub(super) cancelled: bool,
    report: &'a mut Progress<'a>,
}

impl<'a> LoadProgress<'a> {
    pub(super) fn new(report: &'a mut Progress<'a>) -> Self {
        Self {
            read: 0,
            cancelled: false,
            report,
        }
    }
}

impl SimpleBackend for Loader<'_> {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> CandleResult<Tensor> {
        let entry = self.weights.find(name)?;
        if entry.shape != shape.dims() {
            let got = Shape::from(entry.shape.as_slice());
            let msg = format!("shape mismatch for `{name}`");
            return Err(CandleError::UnexpectedShape {
                msg,
                expected: shape,
                got,
            }
            .bt());
        }
        self.get_unchecked(name, dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> CandleResult<Tensor> {
        let entry = self.weights.find(name)?;
        let tensor = self
            .weights
            .read(name, entry)?
            .to_device(device)?
            .to_dtype(dtype)?;
        let mut progress = self.progress.lock().unwrap_or_else(|e| e.into_inner());
        progress.read += entry.len as u64;
        let read = progress.read;
        if (progress.report)(read, self.weights.total).is_break() {
            progress.cancelled = true;
            return Err(CandleError::msg("loading was cancelled"));
        }
        Ok(tensor)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.weights.entries.contains_key(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_of_naming_is_one() {
        for (stored, name) in [
            ("lm_head.weight", "lm_head.weight"),
            ("model.text_model.lm_head.weight", "lm_head.weight"),
            (
                "model.text_model.norm.weight",
                "model.text_model.norm.weight",
            ),
            (
                "model.text_model.model.norm.weight",
                "model.text_model.norm.weight",
            ),
            ("text_model.norm.weight", "model.text_model.norm.weight"),
            (
                "vision_model.post_layernorm.bias",
                "model.vision_model.post_layernorm.bias",
            ),
            (
                "connector.modality_projection.proj.weight",
                "model.connector.modality_projection.proj.weight",
            ),
        ] {
            assert_eq!(canonical(stored), name);
        }
    }

    fn open(header: &str, data: usize) -> Result<Weights> {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.resize(file.len() + data, 0);
        Weights::open(vec![(
            "m.safetensors".into(),
            Box::new(io::Cursor::new(file)),
        )])
    }

    #[test]
    fn headers_are_not_believed() {
        let tensor = |shape: &str, from: u64, to: u64| {
            format!(r#"{{"t":{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}}}"#)
        };
        assert!(open(&tensor("[2]", 0, 8), 8).is_ok());
        for (header, data, says) in [
            (tensor("[2]", 0, 8), 7, "cut short"),
            (
                tensor("[250000000000]", 0, 1_000_000_000_000),
                8,
                "cut short",
            ),
            (tensor("[3]", 0, 8), 8, "m.safetensors"),
            (tensor("[-1]", 0, 8), 8, "broken header"),
            (tensor("[18446744073709551615,4]", 0, 8), 8, "m.safetensors"),
            ("{".into(), 0, "broken header"),
        ] {
            let error = open(&header, data).err().expect(&header).to_string();
            assert!(error.contains(says), "{header}: {error}");
        }
    }
}
