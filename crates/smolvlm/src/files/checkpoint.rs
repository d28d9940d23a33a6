//! Checkpoints: everything that is known of a model before it is loaded.

use serde_json::Value;

use crate::{
    error::{Error, Result},
    families::idefics3::config::{Config, PreprocessorConfig},
    files::{
        chat_template,
        fingerprint::Fingerprint,
        gguf::{self, Vocabulary},
        source::{
            CONFIG, PREPROCESSOR_CONFIG, PROCESSOR_CONFIG, Source, TOKENIZER, WEIGHTS, weight_files,
        },
        weights::Weights,
    },
    text::{chat_template::ChatTemplate, tokenizer},
};

/// The files of a model, checked, with everything read but tokenizer and weights.
pub struct Checkpoint {
    pub(crate) source: Source,
    name: String,
    revision: String,
    pub(crate) config: Config,
    pub(crate) preprocessor: PreprocessorConfig,
    pub(crate) chat_template: ChatTemplate,
    /// The vocabulary of a GGUF file, which has no `tokenizer.json`.
    vocabulary: Option<Vocabulary>,
    /// Tokens that end generation, from `generation_config.json`.
    pub(crate) eos_token_ids: Vec<u32>,
    pub(crate) weights: Weights,
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
    /// Reads the configuration, the chat template and the headers of the weights.
    ///
    /// Errors if a file is missing or truncated, or describes a model of another family.
    pub fn open(source: &Source) -> Result<Self> {
        let (name, revision) = source.identity();
        if let Source::Gguf {
            text,
            projector,
            guessed,
        } = source
        {
            let gguf = gguf::GgufCheckpoint::open(text, projector, *guessed)?;
            check_eos_token_ids(&gguf.eos_token_ids, &gguf.config)
                .map_err(|reason| Error::file(text, reason, "Download it again"))?;
            return Ok(Self {
                name,
                revision,
                fingerprint: Fingerprint::new(source, &gguf.weights),
                chat_template: gguf.chat_template,
                vocabulary: Some(gguf.vocabulary),
                eos_token_ids: gguf.eos_token_ids,
                source: source.clone(),
                config: gguf.config,
                preprocessor: gguf.preprocessor,
                weights: gguf.weights,
            });
        }
        let config = source.read_parsed(CONFIG, Config::from_json)?;
        let preprocessor = read_preprocessor(source, &config)?;
        // The tokenizer is parsed when the model is loaded, which may take a while.
        source.require(TOKENIZER, source.open(TOKENIZER)?)?;
        let (template, path) = chat_template::chat_template(source)?;
        let tokens = chat_template::special_tokens(source)?;
        let chat_template = ChatTemplate::new(&template, &path, tokens)?;
        let weights = Weights::open(weight_files(source)?)?;
        Ok(Self {
            name,
            revision,
            fingerprint: Fingerprint::new(source, &weights),
            chat_template,
            vocabulary: None,
            eos_token_ids: read_eos_token_ids(source, &config)?,
            source: source.clone(),
            config,
            preprocessor,
            weights,
        })
    }

    /// The model's id on the hub if the path tells it, else the name of the folder or file; `demo` for the demo model.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The commit on the hub if the path tells it, else empty.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// The identity of the checkpoint's files.
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// Whether this is the demo model.
    pub fn is_demo(&self) -> bool {
        self.source == Source::Demo
    }

    /// Side of the encoder's input in pixels.
    pub fn image_size(&self) -> u32 {
        self.preprocessor.max_image_size.longest_edge as u32
    }

    /// Checks that the encoder can run on pictures of `side` × `side` pixels: at least one token, at most
    /// [`image_size`](Self::image_size).
    pub fn check_image_size(&self, side: u32) -> Result<()> {
        let least = self.config.vision_config.patch_size * self.config.scale_factor;
        let most = self.image_size();
        if side as usize >= least && side <= most {
            return Ok(());
        }
        Err(Error::Setting {
            property: "image-size",
            reason: format!(
                "{side} pixels are out of range: model `{}` takes {least} to {most}. Set 0 for {most}",
                self.name
            ),
        })
    }

    /// Parses the tokenizer.
    pub(crate) fn tokenizer(&self) -> Result<tokenizers::Tokenizer> {
        if let Some(vocabulary) = &self.vocabulary {
            return vocabulary
                .tokenizer()
                .map_err(|reason| self.file_error(TOKENIZER, reason));
        }
        self.source.read_parsed(TOKENIZER, tokenizer::from_json)
    }

    /// The error of one of the checkpoint's files.
    pub(crate) fn file_error(&self, name: &str, reason: impl std::fmt::Display) -> Error {
        Error::file(&self.source.path(name), reason, SAME_CHECKPOINT_REMEDY)
    }

    /// The error of the file with the encoder's weights.
    pub(crate) fn encoder_error(&self, reason: String) -> Error {
        match &self.source {
            Source::Gguf { projector, .. } => {
                Error::file(projector, reason, SAME_CHECKPOINT_REMEDY)
            }
            _ => self.decoder_error(reason),
        }
    }

    /// The error of the file with the decoder's weights.
    pub(crate) fn decoder_error(&self, reason: String) -> Error {
        self.file_error(WEIGHTS, reason)
    }
}

const GENERATION_CONFIG: &str = "generation_config.json";
const SAME_CHECKPOINT_REMEDY: &str = "Are all files from the same checkpoint?";

/// Reads `preprocessor_config.json`, or the `image_processor` of a `processor_config.json` of transformers 5.
fn read_preprocessor(source: &Source, config: &Config) -> Result<PreprocessorConfig> {
    let parse = |json: &[u8]| {
        let preprocessor = PreprocessorConfig::from_json(json)?;
        config.check_side(preprocessor.max_image_size.longest_edge)?;
        Ok(preprocessor)
    };
    if source.read(PREPROCESSOR_CONFIG)?.is_none() {
        let processor = source.read_json(PROCESSOR_CONFIG)?;
        if let Some(config) = processor.as_ref().and_then(|p| p.get("image_processor")) {
            return parse(config.to_string().as_bytes()).map_err(|reason| {
                Error::file(&source.path(PROCESSOR_CONFIG), reason, "Download it again")
            });
        }
    }
    source.read_parsed(PREPROCESSOR_CONFIG, parse)
}

/// Reads `eos_token_id` of `generation_config.json`, a number or a list.
fn read_eos_token_ids(source: &Source, config: &Config) -> Result<Vec<u32>> {
    let json = source.read_json(GENERATION_CONFIG)?;
    let ids = match json.as_ref().and_then(|j| j.get("eos_token_id")) {
        Some(Value::Array(ids)) => ids.iter().collect(),
        None | Some(Value::Null) => vec![],
        Some(id) => vec![id],
    };
    let number = |id: &Value| id.as_u64()?.try_into().ok();
    let ids = ids.into_iter().map(|id| {
        number(id).ok_or_else(|| format!("has the `eos_token_id` {id}, which is not a token id"))
    });
    ids.collect::<Result<Vec<_>, _>>()
        .and_then(|ids| check_eos_token_ids(&ids, config).map(|()| ids))
        .map_err(|reason| {
            Error::file(
                &source.path(GENERATION_CONFIG),
                reason,
                SAME_CHECKPOINT_REMEDY,
            )
        })
}

/// Checks that the model has the tokens that end generation.
fn check_eos_token_ids(ids: &[u32], config: &Config) -> Result<(), String> {
    let vocabulary = config.text_config.vocab_size;
    match ids.iter().find(|id| **id as usize >= vocabulary) {
        None => Ok(()),
        Some(id) => Err(format!(
            "has the `eos_token_id` {id}, but the model's `vocab_size` is {vocabulary}"
        )),
    }
}
