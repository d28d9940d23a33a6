//! From a buffer to a picture, and which buffers are looked at.

pub(crate) mod alpha;
pub(crate) mod clip;
pub(crate) mod downscale;
pub(crate) mod layout;
pub(crate) mod sampler;
pub(crate) mod scale;
pub(crate) mod scene;
pub(crate) mod small;
pub(crate) mod tone_map;
pub(crate) mod unpack;
