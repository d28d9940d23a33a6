//! What computes.

pub(crate) mod candle;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub(crate) mod network;

use vlmnarrate_engine::{Event, Observer};

use crate::error::{Error, Result};

/// Reports that a layer is done.
///
/// # Errors
///
/// [`Error::Cancelled`] if the observer doesn't want to go on.
pub(crate) fn layer_done(observer: &mut Observer<'_>) -> Result<()> {
    if observer(Event::Layer).is_break() {
        return Err(Error::Cancelled);
    }
    Ok(())
}
