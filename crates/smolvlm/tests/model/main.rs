//! What callers of the model and its files may get wrong: an error or a defined answer, never a panic, and the
//! callers beside go on. On the CPU, or with `VLMNARRATE_DEVICE=cuda` on a GPU.

#[path = "../reference/data.rs"]
mod data;
mod requests;
mod small;
mod vocabulary;
