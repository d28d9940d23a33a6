//! Where what `tools/reference` has written is.

use std::{
    env,
    path::{Path, PathBuf},
};

/// Of a family member. `VLMNARRATE_TEST_DATA` is for programs that run where they weren't built.
pub fn data(member: &str) -> PathBuf {
    let here = || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let folder = env::var_os("VLMNARRATE_TEST_DATA").map_or_else(here, Into::into);
    folder.join("reference").join(member)
}
