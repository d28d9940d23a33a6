//! Captions on the GPU, as `caption` makes them on the CPU: the engine that `tools/gpu` times.
//!
//! ```text
//! cargo bench --features cuda --bench gpu -- FOLDER SIDE bf16|f16|f32 cut|slow|static [TOKENS]
//! cargo bench --features cuda --bench gpu -- FOLDER SIDE bf16|f16|f32 callers N SECONDS
//! ```
//!
//! * `cut`: nothing is known from the last caption
//! * `slow`: one byte in a hundred is another
//! * `static`: the same picture
//! * `callers`: so many threads with a session each, who ask again as soon as they are answered

#[path = "common/captions.rs"]
mod captions;
mod common;

use std::{
    error::Error,
    io,
    ops::ControlFlow,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use gstvlmnarrate::smolvlm::{Checkpoint, DType, DeviceKind, LoadOptions, Model, Source};

use captions::{change_slowly, describe, noise};
use common::memory;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = std::env::args().skip(1).filter(|a| a != "--bench");
    let arguments = arguments.collect::<Vec<_>>();
    let [folder, side, dtype, scene, rest @ ..] = &arguments[..] else {
        return Err(
            "FOLDER SIDE bf16|f16|f32 cut|slow|static [TOKENS], or callers N SECONDS".into(),
        );
    };
    let side = side.parse()?;
    let options = LoadOptions {
        device: DeviceKind::Cuda,
        dtype: match dtype.as_str() {
            "bf16" => DType::Bf16,
            "f16" => DType::F16,
            "f32" => DType::F32,
            other => return Err(other.into()),
        },
        ..LoadOptions::default()
    };
    let checkpoint = Checkpoint::open(&Source::Folder(PathBuf::from(folder)))?;
    let model = Model::load(&checkpoint, &options, &mut |_, _| ControlFlow::Continue(()))?;
    match (scene.as_str(), rest) {
        ("callers", [callers, seconds]) => {
            callers_at_once(&model, side, callers.parse()?, seconds.parse()?)
        }
        ("cut" | "slow" | "static", [] | [_]) => {
            let tokens = rest.first().map_or(Ok(20), |tokens| tokens.parse())?;
            one_by_one(&model, side, scene, tokens)
        }
        (other, _) => Err(other.into()),
    }
}

fn one_by_one(model: &Model, side: u32, scene: &str, tokens: usize) -> Result<(), Box<dyn Error>> {
    let mut session = model.session();
    let mut rng = fastrand::Rng::with_seed(0);
    let mut changes = rng.fork();
    let mut picture = noise(&mut rng, side);
    println!(r#"{{"ready": true}}"#);
    for line in io::stdin().lines() {
        line?;
        match scene {
            "cut" => {
                picture = noise(&mut rng, side);
                // The same memory, but nothing that is known.
                session.forget();
            }
            "slow" => change_slowly(&mut changes, &mut picture),
            _ => (),
        }
        let start = Instant::now();
        let made = describe(model, &mut session, &picture, tokens)?;
        let total = start.elapsed();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
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
    }
    Ok(())
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
