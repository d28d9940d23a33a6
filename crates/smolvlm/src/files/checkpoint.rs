//! What can be known of a model before it is loaded.

use serde_json::Value;

use crate::{
    error::{Error, Result},
    families::idefics3::config::{Config, PreprocessorConfig},
    files::{
        fingerprint::Fingerprint,
        gguf::{self, Vocabulary},
        source::{
            CONFIG, PREPROCESSOR_CONFIG, PROCESSOR_CONFIG, Source, TOKENIZER, WEIGHTS, weight_files,
        },
        weights::Weights,
    },
    text::{
        chat_template::{self, ChatTemplate},
        tokenizer,
    },
};

/// A model's files, looked at and found fit, nothing heavy read yet.
pub struct Checkpoint {
    pub(crate) source: Source,
    name: String,
    revision: String,
    pub(crate) config: Config,
    pub(crate) preprocessor: PreprocessorConfig,
    pub(crate) chat_template: ChatTemplate,
    /// Where there is no `tokenizer.json`.
    vocabulary: Option<Vocabulary>,
    /// Ids that end generation, from `generation_config.json`.
    pub(crate) eos: Vec<u32>,
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
    /// Reads the configuration and the weights' headers, and checks that every file is there and whole.
    pub fn open(source: &Source) -> Result<Self> {
        let (name, revision) = source.identity();
        if let Source::Gguf {
            text,
            projector,
            guessed,
        } = source
        {
            let parts = gguf::Parts::open(text, projector, *guessed)?;
            check_eos(&parts.eos, &parts.config)
                .map_err(|reason| Error::file(text, reason, "Download it again"))?;
            return Ok(Self {
                name,
                revision,
                fingerprint: Fingerprint::new(source, &parts.weights),
                chat_template: parts.chat_template,
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
            eos: eos(source, &config)?,
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

    pub(crate) fn tokenizer(&self) -> Result<tokenizers::Tokenizer> {
        if let Some(vocabulary) = &self.vocabulary {
            return vocabulary
                .tokenizer()
                .map_err(|reason| self.file_error(TOKENIZER, reason));
        }
        self.source.parsed(TOKENIZER, tokenizer::from_json)
    }

    /// An error that concerns one of the checkpoint's files.
    pub(crate) fn file_error(&self, name: &str, reason: impl std::fmt::Display) -> Error {
        Error::file(&self.source.path(name), reason, SAME_CHECKPOINT)
    }

    pub(crate) fn encoder_error(&self, reason: String) -> Error {
        match &self.source {
            Source::Gguf { projector, .. } => Error::file(projector, reason, SAME_CHECKPOINT),
            _ => self.decoder_error(reason),
        }
    }

    pub(crate) fn decoder_error(&self, reason: String) -> Error {
        self.file_error(WEIGHTS, reason)
    }
}

const GENERATION_CONFIG: &str = "generation_config.json";
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

/// `eos_token_id` is a number or a list of them.
fn eos(source: &Source, config: &Config) -> Result<Vec<u32>> {
    let json = source.json(GENERATION_CONFIG)?;
    let ids = match json.as_ref().and_then(|j| j.get("eos_token_id")) {
        Some(Value::Array(ids)) => ids.iter().collect(),
        None | Some(Value::Null) => vec![],
        Some(id) => vec![id],
    };
    let number = |id: &Value| id.as_u64()?.try_into().ok();
    let ids = ids.into_iter().map(|id| {
        number(id).ok_or_else(|| format!("has the `eos_token_id` {id}, which is no token's number"))
    });
    ids.collect::<Result<Vec<_>, _>>()
        .and_then(|ids| check_eos(&ids, config).map(|()| ids))
        .map_err(|reason| Error::file(&source.path(GENERATION_CONFIG), reason, SAME_CHECKPOINT))
}

/// A token that the model doesn't have would never end a caption.
fn check_eos(ids: &[u32], config: &Config) -> Result<(), String> {
    let vocabulary = config.text_config.vocab_size;
    match ids.iter().find(|id| **id as usize >= vocabulary) {
        None => Ok(()),
        Some(id) => Err(format!(
            "has the `eos_token_id` {id}, and the model's `vocab_size` is {vocabulary}"
        )),
    }
}
