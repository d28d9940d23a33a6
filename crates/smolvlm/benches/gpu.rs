//! Captions on the GPU, as `caption` makes them on the CPU: the engine that `tools/gpu` times.
//!
//! ```text
//! cargo bench --features cuda --bench gpu -- FOLDER SIDE bf16|f16|f32 cut|slow|static [TOKENS]
//! cargo bench --features cuda --bench gpu -- FOLDER SIDE bf16|f16|f32 callers N SECONDS
//! ```
//!
//! * `cut`: only the prompt's tokens and buffers are reused from the last caption
//! * `slow`: one byte in a hundred differs
//! * `static`: the same picture
//! * `callers`: `N` threads with a session each, each of which makes the next request at once

#[path = "common/captions.rs"]
mod captions;
mod common;

use std::{
    error::Error,
    thread,
    time::{Duration, Instant},
};

use vlmnarrate_engine::{DType, DeviceKind};
use vlmnarrate_smolvlm::{LoadOptions, Model, Session};

use captions::{arguments, describe, load, ms, noise, one_by_one};
use common::memory;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = arguments();
    let [folder, side, dtype, scene, rest @ ..] = &arguments[..] else {
        return Err(
            "FOLDER SIDE bf16|f16|f32 cut|slow|static [TOKENS], or callers N SECONDS".into(),
        );
    };
    let side = side.parse()?;
    let mut options = LoadOptions::default();
    options.device = DeviceKind::Cuda;
    options.dtype = match dtype.as_str() {
        "bf16" => DType::Bf16,
        "f16" => DType::F16,
        "f32" => DType::F32,
        other => return Err(other.into()),
    };
    let model = load(folder, &options)?;
    match (scene.as_str(), rest) {
        ("callers", [callers, seconds]) => {
            callers_at_once(&model, side, callers.parse()?, seconds.parse()?)
        }
        ("cut" | "slow" | "static", [] | [_]) => {
            let tokens = rest.first().map_or(Ok(20), |tokens| tokens.parse())?;
            one_by_one(
                &model,
                side,
                (scene, tokens),
                Session::forget,
                |made, total| {
                    let timings = made.timings;
                    // What is neither of the others' is the way there and back.
                    println!(
                        r#"{{"vision": {}, "prefill": {}, "decode": {}, "gpu_vision": {}, "peak": {}}}"#,
                        ms(total - timings.prefill - timings.decode),
                        ms(timings.prefill),
                        ms(timings.decode),
                        ms(timings.vision),
                        memory("VmHWM").unwrap_or(f64::NAN)
                    );
                },
            )
        }
        (other, _) => Err(other.into()),
    }
}

fn callers_at_once(
    model: &Model,
    side: u32,
    callers: u64,
    seconds: f64,
) -> Result<(), Box<dyn Error>> {
    const TOKENS: usize = 20;
    let call = |caller: u64, until: Instant| {
        let mut rng = fastrand::Rng::with_seed(caller);
        let pictures: Vec<_> = (0..4).map(|_| noise(&mut rng, side)).collect();
        let mut session = model.session();
        let mut captions = 0;
        while Instant::now() < until {
            session.forget();
            describe(
                model,
                &mut session,
                &pictures[captions % pictures.len()],
                TOKENS,
            )?;
            captions += 1;
        }
        Ok::<_, String>(captions)
    };
    let run = |seconds: f64| {
        let start = Instant::now();
        let until = start + Duration::from_secs_f64(seconds);
        let captions = thread::scope(|scope| {
            let threads: Vec<_> = (0..callers)
                .map(|caller| scope.spawn(move || call(caller, until)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().map_err(|_| "a caller panicked".to_owned())?)
                .sum::<Result<usize, _>>()
        })?;
        Ok::<_, String>(captions as f64 / start.elapsed().as_secs_f64())
    };
    // Graphs are made, and memory is grown.
    run(1.0)?;
    println!(
        r#"{{"callers": {callers}, "captions_per_second": {}}}"#,
        run(seconds)?
    );
    Ok(())
}
