//! What libraries are too slow at, on raw slices.

pub(crate) mod attention;
pub(crate) mod blocks;
#[cfg(feature = "cuda")]
pub mod cuda;
mod lanes;
pub(crate) mod pointwise;
pub(crate) mod products;
pub(crate) mod rounding;
pub(crate) mod scale;

pub(crate) use lanes::LANES;
