//! From a request to a caption.

pub(crate) mod caches;
pub(crate) mod decode;
pub(crate) mod generate;
pub(crate) mod model;
pub(crate) mod options;
pub(crate) mod prepare;
pub(crate) mod registry;
pub(crate) mod sampling;
pub(crate) mod scheduler;
pub(crate) mod session;
pub(crate) mod speculation;
