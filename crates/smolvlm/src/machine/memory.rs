//! Whether there is memory for what is about to be made: an allocation that fails ends the process, and
//! what it was for is not told.

use std::{fmt, path::Path};

use super::memory_limits::{Limit, available};

/// Why there is no memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Shortage {
    /// A limit that is known beforehand.
    Limit(Limit),
    /// The system doesn't say why, for instance beyond `ulimit -v`.
    Refused,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Limit(limit) => limit.fmt(f),
            Self::Refused => f.write_str("the system refuses to give this process so much"),
        }
    }
}

/// Checks that so many bytes can be had: the system has them, and the process gets them. They are asked for and given
/// back untouched, which costs nothing.
pub(crate) fn check_available(bytes: u64) -> Result<(), Shortage> {
    if let Some(limit) = available(Path::new("/")).filter(|limit| bytes > limit.free) {
        return Err(Shortage::Limit(limit));
    }
    // glibc takes it for a habit when less than 32 MiB come and go, and keeps all smaller pieces for the
    // process from then on.
    const LEAST: u64 = (32 << 20) + 1;
    let is_given = usize::try_from(bytes.max(LEAST))
        .is_ok_and(|bytes| Vec::<u8>::new().try_reserve_exact(bytes).is_ok());
    match is_given {
        true => Ok(()),
        false => Err(Shortage::Refused),
    }
}
