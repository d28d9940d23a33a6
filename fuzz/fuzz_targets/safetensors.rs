#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    vlmnarrate_fuzz::safetensors(bytes);
});
