//! Where what `tools/reference` has written is.

use std::{
    env,
    path::{Path, PathBuf},
};

/// All of it. `VLMNARRATE_TEST_DATA` is for programs that run where they weren't built.
pub fn all() -> PathBuf {
    let here = || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    env::var_os("VLMNARRATE_TEST_DATA").map_or_else(here, Into::into)
}

/// Of a family member.
#[allow(
    dead_code,
    reason = "of the tests that include this file one wants no member"
)]
pub fn data(member: &str) -> PathBuf {
    all().join("reference").join(member)
}
