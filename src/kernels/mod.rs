//! What libraries are too slow at, on raw slices.

pub(crate) mod attention;
mod lanes;
pub(crate) mod pointwise;
pub(crate) mod products;
pub(crate) mod scale;

pub(crate) use lanes::LANES;
