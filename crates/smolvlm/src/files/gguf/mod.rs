//! GGUF checkpoints of llama.cpp: a file with the decoder and its vocabulary, the text model, and one with the vision
//! encoder and the projector, the mmproj file.
//!
//! Their metadata becomes a `config.json` and a `preprocessor_config.json`, parsed as those of a safetensors checkpoint.
//! Tensors get the names and rows of queries and keys the order that they had before
//! [`convert_hf_to_gguf.py`](https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py). The rest of the
//! crate does not know which format a model came from.
//!
//! Two values are the family's if the files lack them: pictures are resized to 4 times the encoder's side before they are
//! split into tiles, and the encoder's norms add 1e-6, for which converters write 1e-5 if they don't find it.

mod compatibility;
mod discovery;
mod header;
mod names;
mod reader;

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::{Value as Json, json};
use tokenizers::{
    AddedToken, Tokenizer,
    models::bpe::{BPE, Vocab},
    pre_tokenizers::{
        PreTokenizerWrapper, byte_level::ByteLevel, digits::Digits, sequence::Sequence,
    },
};

use crate::{
    error::{Error, Result},
    families::idefics3::config::{Config, PreprocessorConfig},
    files::chat_template,
    files::weights::{ReadSeek, TensorEntry, Weights},
    text::{
        chat_template::{ChatTemplate, SpecialTokens},
        tokenizer::check_merge,
    },
};
#[cfg(feature = "hub")]
pub(crate) use discovery::{FileNames, list_files};
pub(crate) use discovery::{
    is_gguf, quantization, source_in_folder, source_of_text_model, with_mmproj,
};
use header::{Header, TensorInfo};
use names::{decoder_name, encoder_name, permuted_heads};
use reader::Value;

const REMEDY: &str = "vlmnarrate runs the GGUF files that llama.cpp makes of SmolVLM and SmolVLM2, \
     in F32, F16, BF16, Q8_0, Q6_K, Q5_K, Q5_1, Q5_0, Q4_K, Q4_1, Q4_0, Q3_K and Q2_K";

/// The contents of the two files.
pub(crate) struct GgufCheckpoint {
    pub(crate) config: Config,
    pub(crate) preprocessor: PreprocessorConfig,
    pub(crate) vocabulary: Vocabulary,
    pub(crate) chat_template: ChatTemplate,
    /// Tokens that end generation.
    pub(crate) eos_token_ids: Vec<u32>,
    pub(crate) weights: Weights,
}

impl GgufCheckpoint {
    /// Reads both headers and checks that the files are complete and belong together. A projector that was `guessed`
    /// must have the name of the same model, too.
    pub(crate) fn open(text: &Path, projector: &Path, guessed: bool) -> Result<Self> {
        let (mut decoder, encoder) = (GgufFile::open(text)?, GgufFile::open(projector)?);
        compatibility::check_kinds(&decoder, &encoder)?;
        let in_text = |reason: String| Error::file(text, reason, REMEDY);
        let in_projector = |reason: String| Error::file(projector, reason, REMEDY);
        decoder.check_architecture("llama").map_err(in_text)?;
        encoder.check_architecture("clip").map_err(in_projector)?;
        let mut config = encoder.encoder_config().map_err(in_projector)?;
        let preprocessor = encoder.preprocessor().map_err(in_projector)?;
        let vocabulary = decoder.vocabulary().map_err(in_text)?;
        config["text_config"] = decoder
            .decoder_config(vocabulary.tokens.len())
            .map_err(in_text)?;
        config["tie_word_embeddings"] = decoder.tensor("output.weight").is_none().into();
        let config = Config::from_json(config.to_string().as_bytes()).map_err(in_text)?;
        decoder.check_rope(&config).map_err(in_text)?;
        config
            .check_side(preprocessor.max_image_size.longest_edge)
            .map_err(in_projector)?;
        compatibility::check_shapes(&decoder, &encoder, &config)?;
        if guessed {
            compatibility::check_names(&decoder, &encoder)?;
        }

        let template = decoder.chat_template().map_err(in_text)?;
        let template = template.as_deref().unwrap_or(chat_template::PUBLISHED);
        let tokens = decoder
            .special_tokens(&vocabulary.tokens)
            .map_err(in_text)?;
        let chat_template = ChatTemplate::new(template, text, tokens)?;

        let mut entries = decoder.entries(0, decoder_name).map_err(in_text)?;
        let head_dim = config.text_config.head_dim();
        for (name, entry) in &mut entries {
            entry.permuted_heads = permuted_heads(name, &config);
            let rows = entry.permuted_heads.map(|heads| heads * head_dim);
            if rows.is_some_and(|rows| rows != entry.shape[0]) {
                return Err(in_text(format!("has {} rows in `{name}`", entry.shape[0])));
            }
            // A quantized bias has many rows in a block, which can't be permuted.
            if rows.is_some() && entry.shape.len() == 1 && entry.dtype.block_size() > 1 {
                return Err(in_text(format!("has `{name}` as {:?}", entry.dtype)));
            }
        }
        let swapped = encoder.has_swapped_mlp(&config);
        let others = encoder.entries(1, |name| encoder_name(name, swapped));
        entries.extend(others.map_err(in_projector)?);
        Ok(Self {
            config,
            preprocessor,
            vocabulary,
            chat_template,
            eos_token_ids: decoder.eos_token_ids().map_err(in_text)?,
            weights: Weights::new(vec![decoder.into_file(), encoder.into_file()], entries),
        })
    }
}

/// An open GGUF file with its header.
struct GgufFile {
    path: PathBuf,
    bytes: Box<dyn ReadSeek>,
    header: Header,
}

impl GgufFile {
    fn open(path: &Path) -> Result<Self> {
        let file = fs::File::open(path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::NotFound {
                path: path.to_owned(),
                what: "file",
                remedy: "Set model to a GGUF file with its mmproj file beside it".into(),
            },
            _ => Error::file(path, e, "Check its permissions"),
        })?;
        let mut bytes: Box<dyn ReadSeek> = Box::new(file);
        let header = Header::read(bytes.as_mut()).map_err(|reason| {
            let remedy = match reason.starts_with("is cut short") {
                true => "Download it again",
                false => REMEDY,
            };
            Error::file(path, reason, remedy)
        })?;
        Ok(Self {
            path: path.to_owned(),
            bytes,
            header,
        })
    }

    /// Checks the architecture, and that the file isn't one of several shards.
    fn check_architecture(&self, architecture: &str) -> Result<(), String> {
        match self.string("general.architecture")? {
            Some(found) if found == architecture => (),
            found => {
                let found = found.as_deref().unwrap_or("none");
                return Err(format!(
                    "has the architecture `{found}`, not SmolVLM's `{architecture}`"
                ));
            }
        }
        match self.integer("split.count")? {
            Some(parts) if parts > 1 => {
                Err(format!("is one of {parts} shards, which are not supported"))
            }
            _ => Ok(()),
        }
    }

    fn integer(&self, key: &str) -> Result<Option<i64>, String> {
        match self.header.metadata.get(key) {
            None => Ok(None),
            Some(Value::Integer(value)) => Ok(Some(*value)),
            Some(_) => Err(format!("has a broken header: `{key}` is not an integer")),
        }
    }

    fn float(&self, key: &str) -> Result<Option<f64>, String> {
        match self.header.metadata.get(key) {
            None => Ok(None),
            Some(Value::Float(value)) => Ok(Some(*value)),
            Some(_) => Err(format!("has a broken header: `{key}` is not a float")),
        }
    }

    fn string(&self, key: &str) -> Result<Option<String>, String> {
        match self.header.metadata.get(key) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value.clone())),
            Some(_) => Err(format!("has a broken header: `{key}` is not a string")),
        }
    }

    fn into_file(self) -> (PathBuf, Box<dyn ReadSeek>) {
        (self.path, self.bytes)
    }

    fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.header.tensors.iter().find(|t| t.name == name)
    }

    /// The `text_config` of the original checkpoint's `config.json`.
    fn decoder_config(&self, vocabulary: usize) -> Result<Json, String> {
        let integer = |key: &str| required(key, self.integer(key)?);
        let scaling = self.string("llama.rope.scaling.type")?;
        Ok(json!({
            "hidden_size": integer("llama.embedding_length")?,
            "intermediate_size": integer("llama.feed_forward_length")?,
            "num_hidden_layers": integer("llama.block_count")?,
            "num_attention_heads": integer("llama.attention.head_count")?,
            "num_key_value_heads": self.integer("llama.attention.head_count_kv")?,
            "head_dim": self.integer("llama.attention.key_length")?,
            "vocab_size": vocabulary,
            "rms_norm_eps": required("llama.attention.layer_norm_rms_epsilon",
                self.float("llama.attention.layer_norm_rms_epsilon")?)?,
            "max_position_embeddings": integer("llama.context_length")?,
            "rope_theta": self.float("llama.rope.freq_base")?,
            "rope_scaling": scaling.filter(|kind| kind != "none").map(|kind| json!({"type": kind})),
            "attention_bias": self.tensor("blk.0.attn_q.bias").is_some(),
            "mlp_bias": self.tensor("blk.0.ffn_up.bias").is_some(),
        }))
    }

    /// The original checkpoint's `config.json` without `text_config`.
    fn encoder_config(&self) -> Result<Json, String> {
        let integer = |key: &str| required(key, self.integer(key)?);
        let projector = match self.string("clip.projector_type")? {
            None => self.string("clip.vision.projector_type")?,
            projector => projector,
        };
        if projector.as_deref() != Some("idefics3") {
            return Err(format!(
                "has a projector of type `{}`, not SmolVLM's `idefics3`",
                projector.as_deref().unwrap_or("none")
            ));
        }
        let eps = self.float("clip.vision.attention.layer_norm_epsilon")?;
        Ok(json!({
            "model_type": "idefics3",
            "scale_factor": integer("clip.vision.projector.scale_factor")?,
            "vision_config": {
                "hidden_size": integer("clip.vision.embedding_length")?,
                "intermediate_size": integer("clip.vision.feed_forward_length")?,
                "num_hidden_layers": integer("clip.vision.block_count")?,
                "num_attention_heads": integer("clip.vision.attention.head_count")?,
                "image_size": integer("clip.vision.image_size")?,
                "patch_size": integer("clip.vision.patch_size")?,
                "layer_norm_eps": eps.filter(|eps| *eps != 1e-5).unwrap_or(1e-6),
            },
        }))
    }

    /// Checks that RoPE applies to all values of a head.
    fn check_rope(&self, config: &Config) -> Result<(), String> {
        let head_dim = config.text_config.head_dim();
        match self.integer("llama.rope.dimension_count")? {
            Some(rotated) if rotated != head_dim as i64 => Err(format!(
                "rotates {rotated} of the {head_dim} values of a head, only all are supported"
            )),
            _ => Ok(()),
        }
    }

    fn preprocessor(&self) -> Result<PreprocessorConfig, String> {
        let floats = |key| match self.header.metadata.get(key) {
            None => Ok(vec![0.5; 3]),
            Some(Value::Floats(values)) => Ok(values.clone()),
            Some(_) => Err(format!(
                "has a broken header: `{key}` is not an array of floats"
            )),
        };
        let side = required(
            "clip.vision.image_size",
            self.integer("clip.vision.image_size")?,
        )?;
        let longest_edge = self.integer("clip.vision.preproc_image_size")?;
        let config = json!({
            "size": {"longest_edge": longest_edge.unwrap_or(side.saturating_mul(4))},
            "max_image_size": {"longest_edge": side},
            "image_mean": floats("clip.vision.image_mean")?,
            "image_std": floats("clip.vision.image_std")?,
        });
        PreprocessorConfig::from_json(config.to_string().as_bytes())
    }

    fn eos_token_ids(&self) -> Result<Vec<u32>, String> {
        let keys = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"];
        let mut ids = Vec::new();
        for key in keys {
            ids.extend(self.integer(key)?.and_then(|id| u32::try_from(id).ok()));
        }
        Ok(ids)
    }

    /// The template without a name, or the one named `default`.
    fn chat_template(&self) -> Result<Option<String>, String> {
        const KEY: &str = "tokenizer.chat_template";
        if let Some(template) = self.string(KEY)? {
            return Ok(Some(template));
        }
        let templates = self.header.metadata.iter().filter_map(|(key, value)| {
            let name = key.strip_prefix(KEY)?.strip_prefix('.')?;
            match value {
                Value::String(template) => Some((name.to_owned(), template.clone())),
                _ => None,
            }
        });
        let mut templates: Vec<_> = templates.collect();
        templates.sort();
        chat_template::choose(templates)
    }

    fn special_tokens(&self, tokens: &[String]) -> Result<SpecialTokens, String> {
        let mut special = SpecialTokens::new();
        for (key, name) in [
            ("bos", "bos_token"),
            ("eos", "eos_token"),
            ("unknown", "unk_token"),
            // Spelled so in the specification.
            ("seperator", "sep_token"),
            ("padding", "pad_token"),
            ("cls", "cls_token"),
            ("mask", "mask_token"),
        ] {
            let id = self.integer(&format!("tokenizer.ggml.{key}_token_id"))?;
            let id = id.and_then(|id| usize::try_from(id).ok());
            if let Some(token) = id.and_then(|id| tokens.get(id)) {
                special.insert(name.into(), token.clone());
            }
        }
        Ok(special)
    }

    fn vocabulary(&mut self) -> Result<Vocabulary, String> {
        for (key, expected) in [
            ("tokenizer.ggml.model", "gpt2"),
            ("tokenizer.ggml.pre", "smollm"),
        ] {
            let found = self.string(key)?;
            if found.as_deref() != Some(expected) {
                let found = found.as_deref().unwrap_or("none");
                return Err(format!(
                    "has a tokenizer that is not SmolVLM's: `{key}` is `{found}`"
                ));
            }
        }
        let mut texts = |key: &str| match self.header.metadata.remove(key) {
            Some(Value::Strings(texts)) => Ok(texts),
            _ => Err(format!("lacks `{key}`")),
        };
        let tokens = texts("tokenizer.ggml.tokens")?;
        let merges = texts("tokenizer.ggml.merges")?;
        let Some(Value::Integers(token_types)) =
            self.header.metadata.remove("tokenizer.ggml.token_type")
        else {
            return Err("lacks `tokenizer.ggml.token_type`".into());
        };
        if token_types.len() != tokens.len() {
            return Err(format!(
                "has {} tokens and types for {}",
                tokens.len(),
                token_types.len()
            ));
        }
        Ok(Vocabulary {
            tokens,
            merges,
            token_types,
        })
    }

    /// Its tensors by the names that `rename` has for them; `file` is its place among the files.
    fn entries(
        &self,
        file: usize,
        rename: impl Fn(&str) -> Option<String>,
    ) -> Result<HashMap<String, TensorEntry>, String> {
        let mut entries = HashMap::new();
        for tensor in &self.header.tensors {
            let name = rename(&tensor.name)
                .ok_or_else(|| format!("holds `{}`, which no SmolVLM has", tensor.name))?;
            let entry = TensorEntry {
                file,
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                start: tensor.start,
                len: tensor.len,
                permuted_heads: None,
            };
            if entries.insert(name, entry).is_some() {
                return Err(format!("holds `{}` twice", tensor.name));
            }
        }
        Ok(entries)
    }

    /// Whether `ffn_up` and `ffn_down` of the encoder are swapped, as converters wrote them until May 2025.
    fn has_swapped_mlp(&self, config: &Config) -> bool {
        self.tensor("v.blk.0.ffn_up.weight")
            .is_some_and(|up| up.shape.last() != Some(&config.vision_config.hidden_size))
    }
}

fn required<T>(key: &str, value: Option<T>) -> Result<T, String> {
    value.ok_or_else(|| format!("lacks `{key}`"))
}

/// The vocabulary of SmolLM2's byte-level BPE.
pub(crate) struct Vocabulary {
    tokens: Vec<String>,
    merges: Vec<String>,
    /// `enum llama_token_type`
    token_types: Vec<i64>,
}

const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

impl Vocabulary {
    /// The tokenizer of the original checkpoint's `tokenizer.json`.
    pub(crate) fn tokenizer(&self) -> Result<Tokenizer, String> {
        let vocabulary: Vocab = self.tokens.iter().cloned().zip(0..).collect();
        let merge = |merge: &String| match merge.split_once(' ') {
            Some((left, right)) => {
                check_merge(left, right, |token| vocabulary.contains_key(token))?;
                Ok((left.to_owned(), right.to_owned()))
            }
            None => Err(format!(
                "has the merge `{merge}`, which is not a pair of tokens"
            )),
        };
        let merges = self.merges.iter().map(merge);
        let merges = merges.collect::<Result<_, _>>()?;
        let text = |e: tokenizers::Error| e.to_string();
        let model = BPE::builder().vocab_and_merges(vocabulary, merges);
        let mut tokenizer = Tokenizer::new(model.build().map_err(text)?);
        if tokenizer.get_vocab_size(false) != self.tokens.len() {
            return Err("has a token twice".into());
        }
        // Single digits, then words with the space before them.
        let steps: Vec<PreTokenizerWrapper> = vec![
            Digits::new(true).into(),
            ByteLevel::new(false, true, true).into(),
        ];
        tokenizer.with_pre_tokenizer(Some(Sequence::new(steps)));
        tokenizer.with_decoder(Some(ByteLevel::default()));
        let of_type = |token_type| {
            let tokens = self.tokens.iter().zip(&self.token_types);
            tokens.filter(move |(_, found)| **found == token_type)
        };
        let special = of_type(CONTROL).map(|(token, _)| AddedToken::from(token.clone(), true));
        tokenizer
            .add_special_tokens(special.collect::<Vec<_>>())
            .map_err(text)?;
        let others = of_type(USER_DEFINED)
            .map(|(token, _)| AddedToken::from(token.clone(), false).normalized(false));
        tokenizer
            .add_tokens(others.collect::<Vec<_>>())
            .map_err(text)?;
        Ok(tokenizer)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use candle_core::{
        DType, Device, Tensor,
        quantized::{GgmlDType, QTensor, gguf_file},
    };

    use super::{
        super::weights::{Loader, WeightTensor},
        *,
    };

    /// Tensors of each type as candle wrote them, with permuted rows.
    #[test]
    fn every_type_is_read() {
        let rows = Tensor::arange(0f32, 8.0 * 256.0, &Device::Cpu).unwrap();
        let rows = (rows * 0.37)
            .unwrap()
            .sin()
            .unwrap()
            .reshape((8, 256))
            .unwrap();
        // The order of rows in the file, for two heads.
        let stored = [0u32, 2, 1, 3, 4, 6, 5, 7];
        let order = Tensor::new(&stored, &Device::Cpu).unwrap();
        let paired = rows.index_select(&order, 0).unwrap();
        for dtype in [
            GgmlDType::F32,
            GgmlDType::F16,
            GgmlDType::BF16,
            GgmlDType::Q4_0,
            GgmlDType::Q4_1,
            GgmlDType::Q5_0,
            GgmlDType::Q5_1,
            GgmlDType::Q8_0,
            GgmlDType::Q2K,
            GgmlDType::Q3K,
            GgmlDType::Q4K,
            GgmlDType::Q5K,
            GgmlDType::Q6K,
        ] {
            let written = QTensor::quantize(&paired, dtype).unwrap();
            let mut file = Cursor::new(Vec::new());
            gguf_file::write(&mut file, &[], &[("t", &written)]).unwrap();
            let header = Header::read(&mut file).unwrap();
            let gguf = GgufFile {
                path: "t.gguf".into(),
                bytes: Box::new(file),
                header,
            };
            let mut entries = gguf.entries(0, |name| Some(name.into())).unwrap();
            entries.get_mut("t").unwrap().permuted_heads = Some(2);
            let weights = Weights::new(vec![gguf.into_file()], entries);
            let loader = Loader {
                device: &Device::Cpu,
                weights: &weights,
                progress: &|_| true,
            };
            let read = match loader
                .weight(&(8, 256).into(), "t", Some(DType::F32))
                .unwrap()
            {
                WeightTensor::Dense(tensor) => tensor,
                WeightTensor::Quantized(blocks) => blocks.dequantize(&Device::Cpu).unwrap(),
            };
            let expected = QTensor::quantize(&rows, dtype).unwrap();
            let expected = expected.dequantize(&Device::Cpu).unwrap();
            let values = |t: &Tensor| t.to_vec2::<f32>().unwrap();
            assert_eq!(values(&read), values(&expected), "{dtype:?}");
        }
    }
}
