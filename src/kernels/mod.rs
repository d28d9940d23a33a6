//! What libraries are too slow at, on raw slices.

pub(crate) mod scale;
