//! On candle's tensors, wherever candle runs.

pub(crate) mod decoder;
pub(crate) mod encoder;
pub(crate) mod kv_cache;
pub(crate) mod linear;
#[cfg(feature = "metal")]
pub(crate) mod metal;
