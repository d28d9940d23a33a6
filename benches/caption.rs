//! Captions of one frame, one for each line that is read: the engine that `tools/peers` times.
//!
//! `cargo bench --bench caption -- FOLDER SIDE THREADS none|q8-0|q4-0 [cut|slow|static [TOKENS]]`
//!
//! * `cut`: nothing is known from the last caption
//! * `slow`: one byte in a hundred is another
//! * `static`: the same picture

#[path = "common/captions.rs"]
mod captions;
mod common;

use std::{error::Error, io, ops::ControlFlow, path::PathBuf};

use gstvlmnarrate::smolvlm::{Checkpoint, LoadOptions, Model, Quantization, Source};

use captions::{change_slowly, describe, noise};
use common::memory;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = std::env::args().skip(1).filter(|a| a != "--bench");
    let arguments = arguments.collect::<Vec<_>>();
    let [folder, side, threads, quantization, rest @ ..] = &arguments[..] else {
        return Err("FOLDER SIDE THREADS none|q8-0|q4-0 [cut|slow|static [TOKENS]]".into());
    };
    let scene = rest.first().map_or("cut", String::as_str);
    let tokens = rest.get(1).map_or(Ok(20), |tokens| tokens.parse())?;
    let options = LoadOptions {
        threads: threads.parse()?,
        quantization: match quantization.as_str() {
            "none" => Quantization::None,
            "q8-0" => Quantization::Q8_0,
            "q4-0" => Quantization::Q4_0,
            other => return Err(other.into()),
        },
        ..LoadOptions::default()
    };
    let checkpoint = Checkpoint::open(&Source::Folder(PathBuf::from(folder)))?;
    let model = Model::load(&checkpoint, &options, &mut |_, _| ControlFlow::Continue(()))?;
    let mut session = model.session();
    let side = side.parse()?;
    let mut rng = fastrand::Rng::with_seed(0);
    let mut changes = rng.fork();
    let mut picture = noise(&mut rng, side);
    println!(r#"{{"ready": true}}"#);
    for line in io::stdin().lines() {
        line?;
        match scene {
            "cut" => {
                picture = noise(&mut rng, side);
                session = model.session();
            }
            "slow" => change_slowly(&mut changes, &mut picture),
            "static" => (),
            other => return Err(other.into()),
        }
        let made = describe(&model, &mut session, &picture, tokens)?;
        let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
        println!(
            r#"{{"vision": {}, "prefill": {}, "decode": {}, "peak": {}}}"#,
            ms(made.timings.preprocess + made.timings.vision),
            ms(made.timings.prefill),
            ms(made.timings.decode),
            memory("VmHWM").unwrap_or(f64::NAN)
        );
    }
    Ok(())
}
