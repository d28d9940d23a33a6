//! The error of this crate: what can go wrong between a model's files and a caption.

use std::path::{Path, PathBuf};

use vlmnarrate_engine::{ErrorKind, Remedy};

/// Everything that can go wrong between a model's files and a caption.
///
/// `Display` writes one line that names the file or the setting and what to do with the file. What else could be set is
/// [`remedy`](Error::remedy).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder that does not exist.
    #[error("{path}: no such {what}. {remedy}")]
    NotFound {
        /// The path as it was asked for.
        path: PathBuf,
        /// The kind of thing that was expected there, as in `model folder`.
        what: &'static str,
        /// A sentence without its full stop: what to do.
        remedy: String,
    },
    /// A file that exists and can't be read or used.
    #[error("{path}: {reason}. {remedy}")]
    File {
        /// The file or folder at fault.
        path: PathBuf,
        /// What is wrong with the file, on one line.
        reason: String,
        /// A sentence without its full stop: what to do.
        remedy: String,
    },
    /// A setting that the model or the machine can't follow.
    #[error("{property}: {reason}")]
    Setting {
        /// Name of the setting, as the element's property has it.
        property: &'static str,
        /// What is wrong with its value, and what to set instead.
        reason: String,
    },
    /// A device that this build or this machine doesn't have, or that doesn't know the model.
    #[error("device: {reason}")]
    NoDevice {
        /// What is missing.
        reason: String,
        /// Which device to take instead.
        remedy: Remedy,
    },
    /// A model of the Hugging Face hub that can't be had.
    #[error("{property}={value}: {reason}. {remedy}")]
    Hub {
        /// Name of the setting, `model` or `revision`.
        property: &'static str,
        /// Its value.
        value: String,
        /// The class of the failure, from no network to no permission.
        kind: ErrorKind,
        /// What happened, on one line.
        reason: String,
        /// A sentence or two: what to do.
        remedy: String,
    },
    /// Work that was cancelled by its observer.
    #[error("cancelled")]
    Cancelled,
    /// A prompt that the model can't take.
    #[error("prompt: {0}")]
    Prompt(String),
    /// A request of more tokens than the model has positions.
    #[error("prompt: {prompt} tokens and {answer} of the answer exceed the model's {limit}")]
    TooManyTokens {
        /// Tokens of the prompt, its pictures' included.
        prompt: usize,
        /// Tokens that the answer may have.
        answer: usize,
        /// Positions of the model.
        limit: usize,
    },
    /// A request that needs more memory than there is.
    #[error(
        "not enough memory: {pictures} pictures and {tokens} tokens need {megabytes} MB, but {shortage}"
    )]
    Memory {
        /// Memory that the request needs, in MB (10⁶ bytes).
        megabytes: u64,
        /// Pictures of the request, tiles included.
        pictures: usize,
        /// Tokens of the prompt and the longest answer.
        tokens: usize,
        /// Which limit is in the way, and what is free.
        shortage: String,
    },
    /// A picture whose bytes do not match its width and height.
    #[error("picture: {0}")]
    Picture(String),
    /// A session that can't be used: of another model, or without the image features that a prompt refers to.
    #[error("session: {0}")]
    Session(String),
    /// Logits that are infinite or no numbers.
    #[error("the model's logits are not finite")]
    NotFinite,
    /// A panic while an answer was made, which is a bug.
    #[error("a bug in the model's code: {0}")]
    Panic(String),
    /// A GPU that failed and stays unusable for this process.
    #[error("device: {0}")]
    Device(String),
    /// A failure inside candle.
    #[error("inference failed: {}", plain(.0))]
    Inference(#[from] candle_core::Error),
}

impl Error {
    /// The class of the error, which decides the GStreamer error that the element posts.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::File { .. } => ErrorKind::OpenRead,
            Self::Setting { .. } | Self::NoDevice { .. } => ErrorKind::Settings,
            Self::Device(_) => ErrorKind::Device,
            Self::Hub { kind, .. } => *kind,
            Self::Cancelled => ErrorKind::Cancelled,
            Self::Prompt(_)
            | Self::TooManyTokens { .. }
            | Self::Memory { .. }
            | Self::Picture(_)
            | Self::Session(_)
            | Self::NotFinite
            | Self::Panic(_)
            | Self::Inference(_) => ErrorKind::Failed,
        }
    }

    /// The setting that may help.
    pub fn remedy(&self) -> Option<Remedy> {
        match self {
            Self::NoDevice { remedy, .. } => Some(*remedy),
            Self::TooManyTokens { .. } => Some(Remedy::ShorterRequest),
            Self::Memory { .. } => Some(Remedy::SmallerRequest),
            Self::NotFinite => Some(Remedy::WiderDType),
            _ => None,
        }
    }

    /// A [`File`](Self::File) error; newlines of `reason` become spaces.
    pub(crate) fn file(
        path: &Path,
        reason: impl std::fmt::Display,
        remedy: impl Into<String>,
    ) -> Self {
        Self::File {
            path: path.to_owned(),
            // Parsers' messages may span lines, and a message on the bus is one line.
            reason: reason.to_string().replace('\n', " "),
            remedy: remedy.into(),
        }
    }
}

/// A candle error on one line, without the backtrace that `RUST_BACKTRACE` adds to its `Display`.
pub(crate) fn plain(error: &candle_core::Error) -> String {
    use candle_core::Error as E;
    match error {
        E::WithBacktrace { inner, .. } | E::WithPath { inner, .. } => plain(inner),
        E::CannotFindTensor { path } => format!("the tensor `{path}` is missing"),
        other => other.to_string().replace('\n', " "),
    }
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl From<Error> for vlmnarrate_engine::Error {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error.to_string()).with_remedy(error.remedy())
    }
}
