//! Captions of one frame, one for each line that is read: the engine that `tools/peers/compare.py` times.
//! `cargo bench --bench caption -- FOLDER SIDE THREADS none|q8-0|q4-0`

use std::{error::Error, fs, io, ops::ControlFlow, path::PathBuf};

use gstvlmnarrate::smolvlm::{
    Checkpoint, LoadOptions, Model, Picture, Quantization, Request, Sampling, Source,
};

/// Most memory that the process has taken, MiB.
fn peak() -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    kib.unwrap_or(f64::NAN) / 1024.0
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = std::env::args().skip(1).filter(|a| a != "--bench");
    let [folder, side, threads, quantization] = &arguments.collect::<Vec<_>>()[..] else {
        return Err("FOLDER SIDE THREADS none|q8-0|q4-0".into());
    };
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
    let noise = (0..3 * side * side).map(|_| rng.u8(..)).collect();
    let picture = Picture::new(side, side, noise).ok_or("no picture")?;
    println!(r#"{{"ready": true}}"#);
    for line in io::stdin().lines() {
        line?;
        let request = Request {
            pictures: &[&picture],
            clip: None,
            splitting: false,
            system: None,
            prompt: "Describe this frame in one sentence.",
            max_tokens: 20,
            sampling: Sampling::default(),
            stop_strings: &[],
            choices: &[],
        };
        let go_on = &mut |_: gstvlmnarrate::smolvlm::Event<'_>| ControlFlow::Continue(());
        let made = model.describe(&mut session, &request, go_on)?;
        if made.tokens != 20 {
            return Err(format!("{} tokens", made.tokens).into());
        }
        let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
        println!(
            r#"{{"vision": {}, "prefill": {}, "decode": {}, "peak": {}}}"#,
            ms(made.timings.preprocess + made.timings.vision),
            ms(made.timings.prefill),
            ms(made.timings.decode),
            peak()
        );
    }
    Ok(())
}
