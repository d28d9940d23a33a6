//! What the machine has: devices, memory, threads, time.

pub(crate) mod device;
pub(crate) mod memory;
pub(crate) mod memory_limits;
pub(crate) mod pool;
pub(crate) mod stopwatch;
