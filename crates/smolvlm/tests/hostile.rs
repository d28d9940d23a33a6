//! The corpus of `fuzz/`, replayed without the fuzzer.

use std::{fs, path::Path};

#[path = "../../../fuzz/src/lib.rs"]
mod harness;

fn replay(target: &str, run: fn(&[u8]) -> bool) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
    let files = fs::read_dir(corpus.join(target)).unwrap();
    let mut answers = 0;
    for file in files {
        let file = file.unwrap().path();
        // Names the file at fault if one panics.
        println!("{}", file.display());
        answers += usize::from(run(&fs::read(file).unwrap()));
    }
    // Otherwise the corpus belongs to another model.
    assert!(answers > 0);
}

#[test]
fn configurations_and_templates() {
    replay("config", harness::config);
}

#[test]
fn tokenizers() {
    replay("tokenizer", harness::tokenizer);
}

#[test]
fn headers_of_safetensors() {
    replay("safetensors", harness::safetensors);
}

#[test]
fn headers_of_gguf() {
    replay("gguf", harness::gguf);
}
