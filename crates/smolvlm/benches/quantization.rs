//! Costs and benefits of quantization, as a table: `cargo bench --bench quantization -- MODEL…`
//!
//! For each folder and number format: memory of the loaded model, the relative L2 distances from f32 of the image
//! features and of the logits, whether the greedy token is the same, and medians of the stages' times for
//! captions of 20 tokens. The formats take turns within one run, since other work on the machine comes and goes.
//! How right the captions are is measured elsewhere: `tools/demo/evaluate.py --element quantization=q8-0`.

mod common;

use std::{
    error::Error,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use vlmnarrate_engine::{Picture, Quantization, Request};
use vlmnarrate_smolvlm::{Checkpoint, Content, LoadOptions, Model, Session, Source, question};

const FORMATS: [(&str, Quantization); 3] = [
    ("none", Quantization::None),
    ("q8-0", Quantization::Q8_0),
    ("q4-0", Quantization::Q4_0),
];
const PROMPT: &str = "Describe this frame in one sentence.";
const TOKENS: usize = 20;
const ROUNDS: usize = 5;
const SIDE: u32 = 256;

/// Resident memory in MiB; 0 if unknown.
fn resident() -> u64 {
    common::memory("VmRSS").unwrap_or(0.0) as u64
}

/// Shapes that move, so that no two pictures are the same.
fn picture(number: u32) -> Picture {
    let pixel = |i: u32| {
        let (x, y) = (i % SIDE, i / SIDE);
        [x + 10 * number, y, ((x / 16) ^ (y / 16)) * 40].map(|v| v as u8)
    };
    let rgb = (0..SIDE * SIDE).flat_map(pixel).collect();
    Picture::new(SIDE, SIDE, rgb).expect("a whole picture")
}

/// Features of the picture, and the logits of the first token.
fn stages(model: &Model, picture: &Picture) -> Result<[Vec<f32>; 2], Box<dyn Error>> {
    let go_on = &mut |_: vlmnarrate_engine::Event<'_>| ControlFlow::Continue(());
    let prompt = model.prompter().encode(
        &question(None, vec![Content::Image], PROMPT),
        &[model.span(picture, (0, 0))],
    )?;
    let features = model.features(picture, go_on)?;
    let seen = features.flatten_all()?.to_vec1()?;
    let logits = model.prefill(&mut model.session(), &prompt, &[features], 0, go_on)?;
    Ok([seen, logits.to_vec1()?])
}

struct Loaded {
    name: &'static str,
    model: Model,
    session: Session,
    memory: u64,
    /// Vision, prefill and time a token in ms, each round.
    times: [Vec<f64>; 3],
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

fn table(folder: &Path) -> Result<(), Box<dyn Error>> {
    let checkpoint = Checkpoint::open(&Source::Folder(folder.to_owned()))?;
    let mut loaded = Vec::new();
    for (name, quantization) in FORMATS {
        let before = resident();
        let mut options = LoadOptions::default();
        options.quantization = quantization;
        let model = Model::load(&checkpoint, &options, &mut |_, _| ControlFlow::Continue(()))?;
        loaded.push(Loaded {
            name,
            session: model.session(),
            model,
            memory: resident().saturating_sub(before),
            times: Default::default(),
        });
    }
    for round in 0..ROUNDS {
        for Loaded {
            model,
            session,
            times,
            ..
        } in &mut loaded
        {
            let picture = picture(round as u32);
            let pictures = [&picture];
            let mut request = Request::new(&pictures, PROMPT);
            request.max_tokens = TOKENS;
            // A session with a last caption would speculate.
            *session = model.session();
            let description =
                model.describe(session, &request, &mut |_| ControlFlow::Continue(()))?;
            let timings = description.timings;
            let ms = [timings.vision, timings.prefill, timings.decode];
            let [vision, prefill, decode] = ms.map(|time| time.as_secs_f64() * 1e3);
            let token = decode / description.tokens.max(1) as f64;
            for (times, time) in times.iter_mut().zip([vision, prefill, token]) {
                times.push(time);
            }
        }
    }
    let exact = stages(&loaded[0].model, &picture(0))?;
    let length = |values: &mut dyn Iterator<Item = f32>| {
        values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
    };
    let first = |logits: &[f32]| {
        let highest = logits.iter().copied().enumerate();
        highest
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .map(|(token, _)| token)
    };
    println!("{}, {SIDE} px, {TOKENS} tokens", checkpoint.name());
    println!(
        "| quantization | MiB | features off by | logits off by | same token | vision ms | prefill ms | ms/token |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for entry in &mut loaded {
        let near = stages(&entry.model, &picture(0))?;
        let off = |stage: usize| {
            let pairs = exact[stage].iter().zip(&near[stage]);
            let all = &mut exact[stage].iter().copied();
            length(&mut pairs.map(|(a, b)| a - b)) / length(all)
        };
        let (features, logits) = (off(0), off(1));
        let same = if first(&exact[1]) == first(&near[1]) {
            "yes"
        } else {
            "no"
        };
        let [vision, prefill, token] = entry.times.each_mut().map(|times| median(times));
        println!(
            "| {} | {} | {features:.1e} | {logits:.1e} | {same} | {vision:.0} | {prefill:.0} | {token:.1} |",
            entry.name, entry.memory
        );
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let folders = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench");
    let folders = folders.map(PathBuf::from).collect::<Vec<_>>();
    if folders.is_empty() {
        return Err("name the folders of one or more models".into());
    }
    folders.iter().try_for_each(|folder| table(folder))
}
