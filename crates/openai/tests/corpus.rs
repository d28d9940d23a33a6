//! The corpus of `fuzz/`, replayed without the fuzzer.

use std::{fs, path::Path};

#[path = "../../../fuzz/src/stream.rs"]
mod harness;

#[test]
fn streams() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/stream");
    let mut answers = 0;
    for file in fs::read_dir(corpus).unwrap() {
        let file = file.unwrap().path();
        // Names the file at fault if one panics.
        println!("{}", file.display());
        answers += usize::from(harness::stream(&fs::read(file).unwrap()));
    }
    // Otherwise the corpus is not of streams.
    assert!(answers > 0);
}
