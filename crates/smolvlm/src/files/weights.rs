//! The weights of a checkpoint: tensors in safetensors or GGUF files, by their published names, read one at a time.
//!
//! Files are read, not mapped: each tensor is converted to its format once and moved to the device. A file that is
//! truncated while it is read gives an error, where a mapping would give SIGBUS.

use std::{
    collections::HashMap,
    io::{self, Read, Seek, SeekFrom},
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use candle_core::{
    DType, Device, Error as CandleError, Result as CandleResult, Shape, Tensor, WithDType,
    quantized::{GgmlDType, QStorage, QTensor},
};
use candle_nn::{Init, var_builder::SimpleBackend};
use safetensors::{Dtype, tensor::Metadata};

use crate::{
    error::{Error, Result},
    families::idefics3::names,
    files::formats::{Format, Formats},
};

/// An open file, or bytes in memory.
pub(crate) trait ReadSeek: Read + Seek + Send {}
impl<T: Read + Seek + Send> ReadSeek for T {}

/// Bytes of a safetensors header, at most, as the format has it.
const MAX_HEADER_SIZE: u64 = 100_000_000;
const REMEDY: &str = "Download it again";

struct File {
    path: PathBuf,
    bytes: Mutex<Box<dyn ReadSeek>>,
}

/// The type, shape and place of a stored tensor.
#[derive(Debug, Clone)]
pub(crate) struct TensorEntry {
    /// Index of the file.
    pub(crate) file: usize,
    pub(crate) dtype: GgmlDType,
    pub(crate) shape: Vec<usize>,
    /// First byte, from the start of the file.
    pub(crate) start: u64,
    /// Bytes.
    pub(crate) len: usize,
    /// The number of heads whose rows are permuted: first and second half of each head interleaved.
    pub(crate) permuted_heads: Option<usize>,
}

impl TensorEntry {
    /// Whether the tensor is quantized: blocks of values share a scale.
    fn is_quantized(&self) -> bool {
        self.dtype.block_size() > 1
    }

    pub(crate) fn value_count(&self) -> u64 {
        let blocks = self.len / self.dtype.type_size();
        (blocks as u64).saturating_mul(self.dtype.block_size() as u64)
    }

    pub(crate) fn row_len(&self) -> usize {
        self.shape.last().copied().unwrap_or(0)
    }

    /// Undoes the permutation of each head's rows, as `LlamaModel.permute` of llama.cpp made it.
    fn unpermute(&self, bytes: &mut [u8]) {
        let Some(heads) = self.permuted_heads else {
            return;
        };
        // A row is a whole number of blocks, which move as they are.
        let row = self.len / self.shape[0];
        for head in bytes.chunks_exact_mut(self.len / heads) {
            let permuted = head.to_vec();
            let (first, second) = head.split_at_mut(permuted.len() / 2);
            let halves = first
                .chunks_exact_mut(row)
                .zip(second.chunks_exact_mut(row));
            for (pair, (first, second)) in permuted.chunks_exact(2 * row).zip(halves) {
                first.copy_from_slice(&pair[..row]);
                second.copy_from_slice(&pair[row..]);
            }
        }
    }
}

/// A weight tensor in memory, dense or in quantized blocks.
pub(crate) enum WeightTensor {
    Dense(Tensor),
    Quantized(Arc<QTensor>),
}

/// The open files of a checkpoint and their tensors, known from the headers.
pub(crate) struct Weights {
    files: Vec<File>,
    entries: HashMap<String, TensorEntry>,
    total: u64,
}

impl Weights {
    /// Reads the headers of safetensors files and checks that every tensor is inside its file.
    pub(crate) fn open(mut files: Vec<(PathBuf, Box<dyn ReadSeek>)>) -> Result<Self> {
        let mut entries = HashMap::new();
        for (index, (path, bytes)) in files.iter_mut().enumerate() {
            match read_header(bytes.as_mut(), index) {
                Ok(found) => entries.extend(found),
                Err(reason) => return Err(Error::file(path, reason, REMEDY)),
            }
        }
        Ok(Self::new(files, entries))
    }

    /// The weights of tensors that are known to be inside their files.
    pub(crate) fn new(
        files: Vec<(PathBuf, Box<dyn ReadSeek>)>,
        entries: HashMap<String, TensorEntry>,
    ) -> Self {
        let file = |(path, bytes)| File {
            path,
            bytes: Mutex::new(bytes),
        };
        Self {
            files: files.into_iter().map(file).collect(),
            total: entries.values().map(|e| e.len as u64).sum(),
            entries,
        }
    }

    /// Whether some tensors are quantized in their files.
    pub(crate) fn has_quantized(&self) -> bool {
        self.entries.values().any(TensorEntry::is_quantized)
    }

    /// Values of all tensors.
    pub(crate) fn parameter_count(&self) -> u64 {
        let sizes = self.entries.values();
        let sizes = sizes.map(|entry| entry.shape.iter().map(|side| *side as u64).product::<u64>());
        sizes.fold(0, u64::saturating_add)
    }

    pub(crate) fn entries(&self) -> &HashMap<String, TensorEntry> {
        &self.entries
    }

    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    fn find(&self, name: &str) -> CandleResult<&TensorEntry> {
        self.entries.get(name).ok_or_else(|| {
            CandleError::CannotFindTensor {
                path: name.to_owned(),
            }
            .bt()
        })
    }

    /// Reads a tensor: a dense one into memory, a quantized one onto the device.
    fn read(&self, name: &str, entry: &TensorEntry, device: &Device) -> CandleResult<WeightTensor> {
        Ok(WeightTensor::Dense(match entry.dtype {
            GgmlDType::F32 => self.read_as::<f32>(name, entry)?,
            GgmlDType::F16 => self.read_as::<half::f16>(name, entry)?,
            GgmlDType::BF16 => self.read_as::<half::bf16>(name, entry)?,
            blocks => {
                // candle needs blocks that are aligned as their scales are.
                let mut data = vec![0u64; entry.len.div_ceil(size_of::<u64>())];
                let bytes = &mut bytemuck::cast_slice_mut(&mut data)[..entry.len];
                self.read_bytes(name, entry, bytes)?;
                let blocks = QStorage::from_data((&*bytes).into(), device, blocks)?;
                let blocks = QTensor::new(blocks, entry.shape.as_slice())?;
                return Ok(WeightTensor::Quantized(blocks.into()));
            }
        }))
    }

    /// Reads directly into the tensor's memory: another copy would raise peak memory.
    fn read_as<T: WithDType + bytemuck::Pod>(
        &self,
        name: &str,
        entry: &TensorEntry,
    ) -> CandleResult<Tensor> {
        let mut data = vec![T::zeroed(); entry.len / size_of::<T>()];
        self.read_bytes(name, entry, bytemuck::cast_slice_mut(&mut data))?;
        Tensor::from_vec(data, entry.shape.as_slice(), &Device::Cpu)
    }

    fn read_bytes(&self, name: &str, entry: &TensorEntry, into: &mut [u8]) -> CandleResult<()> {
        let file = &self.files[entry.file];
        // After a panic in another read, the position is arbitrary; it is set here.
        let mut bytes = file.bytes.lock().unwrap_or_else(|e| e.into_inner());
        bytes
            .seek(SeekFrom::Start(entry.start))
            .and_then(|_| bytes.read_exact(into))
            .map_err(|e| {
                CandleError::msg(format!("{}: reading `{name}`: {e}", file.path.display()))
            })?;
        drop(bytes);
        entry.unpermute(into);
        Ok(())
    }
}

fn read_header(
    bytes: &mut dyn ReadSeek,
    file: usize,
) -> Result<Vec<(String, TensorEntry)>, String> {
    let io = |e: io::Error| e.to_string();
    let size = bytes.seek(SeekFrom::End(0)).map_err(io)?;
    bytes.rewind().map_err(io)?;
    let mut len = [0; 8];
    bytes
        .read_exact(&mut len)
        .map_err(|_| format!("is only {size} bytes long, too short for safetensors"))?;
    let len = u64::from_le_bytes(len);
    if len > MAX_HEADER_SIZE || len > size.saturating_sub(8) {
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
            Dtype::F32 => GgmlDType::F32,
            Dtype::F16 => GgmlDType::F16,
            Dtype::BF16 => GgmlDType::BF16,
            // Buffers such as integer position ids, which the model doesn't use.
            _ => continue,
        };
        let bytes = info
            .shape
            .iter()
            .try_fold(dtype.type_size() as u64, |n, &d| n.checked_mul(d as u64));
        if from > to || bytes != Some(to - from) {
            return Err(format!(
                "has a broken header: `{name}` of shape {:?} at {from}..{to}",
                info.shape
            ));
        }
        let entry = TensorEntry {
            file,
            dtype,
            shape: info.shape.clone(),
            start: data_start + from,
            len: (to - from) as usize,
            permuted_heads: None,
        };
        entries.push((canonical_name(&name), entry));
    }
    Ok(entries)
}

/// The published name of a tensor, with or without the `model.` of the wrapping class, and with the decoder's own
/// `model.` and `lm_head` inside.
fn canonical_name(name: &str) -> String {
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

/// A callback with bytes read and bytes in all. Returning `Break` cancels the load.
pub type Progress<'a> = dyn FnMut(u64, u64) -> ControlFlow<()> + Send + 'a;

/// [`Weights`] for candle's `VarBuilder`, with progress and cancellation.
#[derive(Clone, Copy)]
pub(crate) struct Loader<'a> {
    pub(crate) weights: &'a Weights,
    /// The device that tensors are loaded onto.
    pub(crate) device: &'a Device,
    /// Called with the bytes of each tensor that was read; `false` cancels the load.
    pub(crate) progress: &'a (dyn Fn(u64) -> bool + Sync),
}

/// The sum of what [`Loader::progress`] reports.
pub(crate) struct LoadProgress<'a> {
    read: u64,
    total: u64,
    pub(crate) cancelled: bool,
    report: &'a mut Progress<'a>,
}

impl<'a> LoadProgress<'a> {
    pub(crate) fn new(weights: &Weights, report: &'a mut Progress<'a>) -> Self {
        Self {
            read: 0,
            total: weights.total,
            cancelled: false,
            report,
        }
    }

    /// Adds and reports bytes. Returns whether to continue.
    pub(crate) fn add(&mut self, bytes: u64) -> bool {
        self.read += bytes;
        self.cancelled |= (self.report)(self.read, self.total).is_break();
        !self.cancelled
    }
}

impl Loader<'_> {
    /// The format that a tensor is loaded in.
    pub(crate) fn format(&self, name: &str, formats: Formats) -> CandleResult<Format> {
        let entry = self.weights.find(name)?;
        let format = formats.format(name, entry.dtype, &entry.shape);
        format.ok_or_else(|| CandleError::msg(format!("the model has no tensor `{name}`")))
    }

    /// The format of an `lm_head` that is tied to the token embeddings.
    pub(crate) fn tied_head(&self, formats: Formats) -> CandleResult<Format> {
        let embeddings = self.weights.find(&names::weight(names::EMBED_TOKENS))?;
        Ok(formats.tied_head(embeddings.dtype, embeddings.row_len()))
    }

    /// Loads a tensor of `shape`. A dense tensor is converted to `dtype`, if given. Errors if the shape differs.
    pub(crate) fn weight(
        &self,
        shape: &Shape,
        name: &str,
        dtype: Option<DType>,
    ) -> CandleResult<WeightTensor> {
        let entry = self.weights.find(name)?;
        if entry.shape != shape.dims() {
            let got = Shape::from(entry.shape.as_slice());
            let msg = format!("shape mismatch for `{name}`");
            return Err(CandleError::UnexpectedShape {
                msg,
                expected: shape.clone(),
                got,
            }
            .bt());
        }
        self.load(entry, name, dtype)
    }

    fn load(
        &self,
        entry: &TensorEntry,
        name: &str,
        dtype: Option<DType>,
    ) -> CandleResult<WeightTensor> {
        let stored = match self.weights.read(name, entry, self.device)? {
            WeightTensor::Dense(tensor) => {
                let tensor = tensor.to_dtype(dtype.unwrap_or(tensor.dtype()))?;
                WeightTensor::Dense(tensor.to_device(self.device)?)
            }
            blocks => blocks,
        };
        match (self.progress)(entry.len as u64) {
            true => Ok(stored),
            false => Err(CandleError::msg("loading was cancelled")),
        }
    }
}

impl WeightTensor {
    /// The dense tensor; a quantized one is dequantized to `dtype`.
    pub(crate) fn dense(self, dtype: DType) -> CandleResult<Tensor> {
        match self {
            Self::Dense(tensor) => Ok(tensor),
            Self::Quantized(blocks) => blocks.dequantize(&blocks.device())?.to_dtype(dtype),
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
        _: &Device,
    ) -> CandleResult<Tensor> {
        self.weight(&shape, name, Some(dtype))?.dense(dtype)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, _: &Device) -> CandleResult<Tensor> {
        let entry = self.weights.find(name)?;
        self.load(entry, name, Some(dtype))?.dense(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.weights.entries.contains_key(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_canonical() {
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
            assert_eq!(canonical_name(stored), name);
        }
    }

    #[test]
    fn permuted_rows_are_restored() {
        // Two heads of four rows of three: 0 2 1 3 as stored.
        let entry = TensorEntry {
            file: 0,
            dtype: GgmlDType::F32,
            shape: vec![8, 3],
            start: 0,
            len: 24,
            permuted_heads: Some(2),
        };
        let mut bytes = [0u8, 2, 1, 3, 4, 6, 5, 7].map(|row| [row; 3]).concat();
        entry.unpermute(&mut bytes);
        assert_eq!(
            bytes,
            [0u8, 1, 2, 3, 4, 5, 6, 7].map(|row| [row; 3]).concat()
        );
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
    fn broken_headers_are_refused() {
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
