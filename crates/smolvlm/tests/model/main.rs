//! Misuse of a model and broken files: each gives an error or a defined answer, never a panic, and other sessions go on.
//! On the CPU, or with `VLMNARRATE_DEVICE=cuda` on a GPU.

#[path = "../reference/data.rs"]
mod data;
mod requests;
mod small;
mod vocabulary;
