//! Captions of one frame, one for each line of standard input, timed by `tools/peers`.
//!
//! `cargo bench --bench caption -- FOLDER SIDE THREADS none|q8-0|q4-0 [cut|slow|static [TOKENS [INSTRUCTIONS]]]`
//!
//! * `cut`: nothing is reused from the last caption
//! * `slow`: one byte in a hundred differs
//! * `static`: the same picture
//!
//! `INSTRUCTIONS` are the most that kernels of our own may use: `plain`, `avx2`, `avx-vnni` or `avx-512`. What candle
//! computes is not limited.

#[path = "common/captions.rs"]
mod captions;
mod common;

use std::error::Error;

use vlmnarrate_engine::Quantization;
use vlmnarrate_kernels::{InstructionSet, limit_instructions};
use vlmnarrate_smolvlm::LoadOptions;

use captions::{arguments, load, ms, one_by_one};
use common::memory;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = arguments();
    let [folder, side, threads, quantization, rest @ ..] = &arguments[..] else {
        return Err(
            "FOLDER SIDE THREADS none|q8-0|q4-0 [cut|slow|static [TOKENS [INSTRUCTIONS]]]".into(),
        );
    };
    let scene = rest.first().map_or("cut", String::as_str);
    let tokens = rest.get(1).map_or(Ok(20), |tokens| tokens.parse())?;
    if let Some(most) = rest.get(2) {
        limit_instructions(match most.as_str() {
            "plain" => InstructionSet::Plain,
            "avx2" => InstructionSet::Avx2OrNeon,
            "avx-vnni" => InstructionSet::AvxVnniOrNeonDot,
            "avx-512" => InstructionSet::Avx512,
            other => return Err(other.into()),
        });
    }
    let mut options = LoadOptions::default();
    options.threads = threads.parse()?;
    options.quantization = match quantization.as_str() {
        "none" => Quantization::None,
        "q8-0" => Quantization::Q8_0,
        "q4-0" => Quantization::Q4_0,
        other => return Err(other.into()),
    };
    let model = load(folder, &options)?;
    let forget = |session: &mut _| *session = model.session();
    one_by_one(&model, side.parse()?, (scene, tokens), forget, |made, _| {
        println!(
            r#"{{"vision": {}, "prefill": {}, "decode": {}, "peak": {}}}"#,
            ms(made.timings.preprocess + made.timings.vision),
            ms(made.timings.prefill),
            ms(made.timings.decode),
            memory("VmHWM").unwrap_or(f64::NAN)
        );
    })
}
