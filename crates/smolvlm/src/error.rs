//! What can go wrong between a model's files and a caption.

use std::path::{Path, PathBuf};

use vlmnarrate_engine::ErrorKind;

/// What can go wrong between a model's files and a caption.
///
/// `Display` is one line that names the file or the property and what to do about it, because that
/// line is what a person reads in `gst-launch-1.0`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: no such {what}. {remedy}")]
    NotFound {
        path: PathBuf,
        what: &'static str,
        remedy: String,
    },
    #[error("{path}: {reason}. {remedy}")]
    File {
        path: PathBuf,
        reason: String,
        remedy: String,
    },
    #[error("{property}: {reason}")]
    Setting {
        property: &'static str,
        reason: String,
    },
    /// Something about a model of the hub; `remedy` is a sentence or two.
    #[error("{property}={value}: {reason}. {remedy}")]
    Hub {
        property: &'static str,
        value: String,
        kind: ErrorKind,
        reason: String,
        remedy: String,
    },
    #[error("cancelled")]
    Cancelled,
    #[error("prompt: {0}")]
    Prompt(String),
    #[error(
        "there is no memory for the {megabytes} MB that {pictures} pictures and {tokens} tokens take: {shortage}; \
         lower frames, image-size or max-tokens"
    )]
    Memory {
        megabytes: u64,
        pictures: usize,
        tokens: usize,
        /// Whose limit it is, and what is free.
        shortage: String,
    },
    #[error("picture: {0}")]
    Picture(String),
    #[error("session: {0}")]
    Session(String),
    #[error(
        "the model's scores are not finite: with dtype=f16 its values may be too large, take dtype=bf16 or \
         dtype=f32; with those its weights are broken, download it again"
    )]
    NotFinite,
    /// The GPU can't go on, and won't for the next caption either.
    #[error("device: {0}")]
    Device(String),
    #[error("inference failed: {}", plain(.0))]
    Inference(#[from] candle_core::Error),
}

impl Error {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::File { .. } => ErrorKind::OpenRead,
            Self::Setting { .. } => ErrorKind::Settings,
            Self::Device(_) => ErrorKind::Device,
            Self::Hub { kind, .. } => *kind,
            Self::Cancelled => ErrorKind::Cancelled,
            Self::Prompt(_)
            | Self::Memory { .. }
            | Self::Picture(_)
            | Self::Session(_)
            | Self::NotFinite
            | Self::Inference(_) => ErrorKind::Failed,
        }
    }

    /// A file that is there and unusable; `remedy` is a sentence.
    pub(crate) fn file(
        path: &Path,
        reason: impl std::fmt::Display,
        remedy: impl Into<String>,
    ) -> Self {
        Self::File {
            path: path.to_owned(),
            // Parsers' messages may span lines; the bus shows one.
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

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl From<Error> for vlmnarrate_engine::Error {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}
