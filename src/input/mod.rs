//! From video buffers to pictures: which frames are due, and how they are scaled.

pub(crate) mod alpha;
pub(crate) mod clip;
pub(crate) mod downscale;
pub(crate) mod layout;
pub(crate) mod planar;
pub(crate) mod sampler;
pub(crate) mod scale;
pub(crate) mod scene;
pub(crate) mod tone_map;
pub(crate) mod unpack;
