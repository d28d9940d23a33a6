//! What makes each family of models one.

pub(crate) mod idefics3;
