//! From a request to a caption.

pub(crate) mod decode;
pub(crate) mod device;
pub(crate) mod generate;
pub(crate) mod memory;
pub(crate) mod memory_limits;
pub(crate) mod model;
pub(crate) mod options;
pub(crate) mod pool;
pub(crate) mod prepare;
pub(crate) mod registry;
pub(crate) mod sampling;
pub(crate) mod session;
pub(crate) mod speculation;
pub(crate) mod stopwatch;
