#![no_main]

// Not of the library, which other tests include as well.
#[path = "../src/stream.rs"]
mod stream;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    stream::stream(bytes);
});
