//! Quantized layers on CPUs, by kernels of our own.

pub(crate) mod layers;
