//! What can go wrong.

/// What went wrong, in one line that names the file or setting.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
#[non_exhaustive]
pub struct Error {
    /// Whether it is the settings, the files or this one request.
    pub kind: ErrorKind,
    /// For people.
    pub message: String,
    /// What else could be set, where the message doesn't say what to do.
    pub remedy: Option<Remedy>,
}

/// A setting that may help. Whoever shows the error words it, and knows what the setting is called there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Remedy {
    /// Fewer or smaller pictures, or fewer tokens of the answer.
    SmallerRequest,
    /// The same, or a shorter prompt.
    ShorterRequest,
    /// [`DeviceKind::Cpu`](crate::DeviceKind::Cpu).
    Cpu,
    /// [`DeviceKind::Auto`](crate::DeviceKind::Auto).
    AnyDevice,
    /// Not [`DType::F16`](crate::DType::F16), whose range is short. With another type it is the weights that are broken.
    WiderDType,
}

/// A result whose error is an engine's.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of this kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            remedy: None,
        }
    }

    /// The same error with a remedy.
    pub fn with_remedy(self, remedy: impl Into<Option<Remedy>>) -> Self {
        Self {
            remedy: remedy.into(),
            ..self
        }
    }

    /// Someone asked to stop.
    pub fn cancelled() -> Self {
        Self::new(ErrorKind::Cancelled, "cancelled")
    }
}

/// The coarse class of an [`Error`], for whoever maps it to another error system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A model or one of its files is not there.
    NotFound,
    /// A file is there but can't be used.
    OpenRead,
    /// The server refused access: gated, private or wrong credentials.
    NotAuthorized,
    /// A file can't be written.
    Write,
    /// There is no room for a file.
    NoSpaceLeft,
    /// A setting doesn't fit the model or the machine.
    Settings,
    /// Someone asked to stop.
    Cancelled,
    /// One answer failed; the next may not.
    Failed,
    /// The server or the network is away or overloaded: later it may not be.
    Unavailable,
    /// What the model runs on failed, for good.
    Device,
}

impl ErrorKind {
    /// Whether the same may succeed when it is tried again, with nothing changed.
    pub fn is_transient(self) -> bool {
        matches!(self, Self::Failed | Self::Unavailable)
    }
}
