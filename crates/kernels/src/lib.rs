//! What libraries are too slow at, on raw slices.

pub mod attention;
pub mod blocks;
mod lanes;
pub mod pointwise;
pub mod products;
pub mod rounding;

pub use lanes::LANES;
