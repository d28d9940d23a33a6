//! Parity of every stage of the model with transformers.
//!
//! `tools/reference/small_models.py` builds a random-weight checkpoint in the shape of each family member and
//! runs transformers on it; the goldens are beside the weights in `tests/data/reference`. The full-size
//! models of `tools/reference/full_size.py` work in the same way: name their folders in
//! `VLMNARRATE_REFERENCE`, separated by colons, and run `cargo nextest run --run-ignored all full_size`.

#[path = "reference/data.rs"]
mod data;
mod reference;

use std::{collections::HashMap, fs, ops::ControlFlow, path::Path};

use candle_core::{DType as Type, Device, Tensor};
use data::data;
use reference::{Video, messages};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use vlmnarrate_engine::{DType, DeviceKind, Event, Picture, Request};
use vlmnarrate_smolvlm::{
    Checkpoint, Content, LoadOptions, Model, Processed, Processor, Prompt, Source, Span, question,
    resize,
};

/// Largest relative L2 distance from the reference in f32: hidden states and logits alike.
const F32_TOLERANCE: f64 = 1e-4;
/// The same in bf16, from transformers' bf16 run. Both round at every step; neither is exact.
const BF16_TOLERANCE: f64 = 2e-2;
/// A greedy choice counts where the reference's first token leads its second by more than this.
const MARGIN: f64 = 1e-3;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    messages: serde_json::Value,
    pictures: Vec<PictureSpec>,
    video: Option<Video>,
    splitting: bool,
    max_image_side: u32,
    longest_edge: u32,
    input_ids: Vec<u32>,
    tiles: Vec<(usize, usize)>,
    pixel_pictures: usize,
    pixels_sha256: String,
    pixels_row_stride: usize,
    tokens: Vec<u32>,
    margins: Vec<f64>,
}

#[derive(Deserialize)]
struct PictureSpec {
    width: u32,
    height: u32,
    dx: u32,
    dy: u32,
}

impl PictureSpec {
    /// The picture that `tools/reference` draws, from the same integers.
    fn draw(&self) -> Picture {
        let mut rgb = Vec::new();
        for y in self.dy..self.dy + self.height {
            for x in self.dx..self.dx + self.width {
                for c in 0..3 {
                    let waves = (x * x * (c + 1) + 3 * y * y + x * y * (2 * c + 1)) >> 6;
                    rgb.push((waves + 5 * ((x >> 4) ^ (y >> 4))) as u8);
                }
            }
        }
        Picture::new(self.width, self.height, rgb).unwrap()
    }
}

struct Member {
    model: Model,
    golden: Golden,
    tensors: HashMap<String, Tensor>,
}

impl Member {
    fn load(folder: &Path, dtype: DType) -> Self {
        let checkpoint = Checkpoint::open(&Source::Folder(folder.into())).unwrap();
        let mut options = LoadOptions::default();
        options.device = device();
        options.dtype = dtype;
        let model = Model::load(&checkpoint, &options, &mut |_, _| ControlFlow::Continue(()));
        let golden = fs::read(folder.join("golden.json")).unwrap();
        Self {
            model: model.unwrap(),
            golden: serde_json::from_slice(&golden).unwrap(),
            tensors: candle_core::safetensors::load(
                folder.join("golden.safetensors"),
                &Device::Cpu,
            )
            .unwrap(),
        }
    }

    fn tensor(&self, case: &Case, name: &str) -> Option<&Tensor> {
        self.tensors.get(&format!("{}.{name}", case.name))
    }

    /// Relative L2 distance of `ours` from the golden `name`, at the golden's rows.
    fn error(&self, case: &Case, name: &str, ours: &Tensor) -> f64 {
        let golden = self.tensor(case, name).unwrap();
        relative_l2(ours, golden)
    }

    fn processed(&self, case: &Case) -> Vec<Processed> {
        let processor = Processor {
            longest_edge: case.longest_edge,
            side: case.max_image_side,
        };
        case.pictures
            .iter()
            .map(|spec| {
                let picture = spec.draw();
                if case.splitting {
                    processor.split(&picture)
                } else {
                    processor.whole(&picture)
                }
            })
            .collect()
    }

    fn prompt(&self, case: &Case, processed: &[Processed]) -> Prompt {
        let spans = processed
            .iter()
            .map(|p| self.model.span(&p.pictures[0], p.grid))
            .collect::<Vec<Span>>();
        let messages = messages(&case.messages, case.video.as_ref());
        self.model.prompter().encode(&messages, &spans).unwrap()
    }

    /// The logits that choose the first token.
    fn first_logits(&self, case: &Case) -> Tensor {
        let processed = self.processed(case);
        let prompt = self.prompt(case, &processed);
        let features = self.features(&pictures(&processed));
        let mut session = self.model.session();
        self.model
            .prefill(&mut session, &prompt, &features, 0, &mut go_on)
            .unwrap()
    }

    fn features(&self, pictures: &[Picture]) -> Vec<Tensor> {
        pictures
            .iter()
            .map(|p| self.model.features(p, &mut go_on).unwrap())
            .collect()
    }
}

/// In the order of the prompt.
fn pictures(processed: &[Processed]) -> Vec<Picture> {
    processed.iter().flat_map(|p| p.pictures.clone()).collect()
}

fn go_on(_: Event<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn relative_l2(ours: &Tensor, golden: &Tensor) -> f64 {
    let vec = |t: &Tensor| {
        t.to_dtype(Type::F64)
            .and_then(|t| t.flatten_all()?.to_vec1::<f64>())
            .unwrap()
    };
    let (ours, golden) = (vec(ours), vec(golden));
    assert_eq!(ours.len(), golden.len());
    let distance: f64 = ours.iter().zip(&golden).map(|(a, b)| (a - b).powi(2)).sum();
    let norm: f64 = golden.iter().map(|b| b * b).sum();
    (distance / norm).sqrt()
}

/// All pictures as the reference's `pixel_values` before rescaling: `[pictures, 3, height, width]`.
fn planes(pictures: &[Picture]) -> Vec<u8> {
    pictures
        .iter()
        .flat_map(|p| (0..3).flat_map(|c| p.rgb[c..].iter().step_by(3).copied()))
        .collect()
}

/// Every `stride`th row of [`planes`].
fn sampled_rows(pictures: &[Picture], stride: usize) -> Vec<u8> {
    let width = pictures[0].width as usize;
    let height = pictures[0].height as usize;
    planes(pictures)
        .chunks_exact(width * height)
        .flat_map(|plane| plane.chunks_exact(width).step_by(stride).flatten().copied())
        .collect()
}

fn check_pixels(member: &Member, case: &Case, pictures: &[Picture]) {
    assert_eq!(pictures.len(), case.pixel_pictures);
    let golden = member.tensor(case, "pixels").unwrap();
    let golden = golden.flatten_all().unwrap().to_vec1::<u8>().unwrap();
    let ours = sampled_rows(pictures, case.pixels_row_stride);
    let off = ours
        .iter()
        .zip(&golden)
        .map(|(a, b)| a.abs_diff(*b))
        .max()
        .unwrap();
    assert_eq!(ours.len(), golden.len());
    assert_eq!(off, 0, "{}: pixels off by up to {off} levels", case.name);
    // Rows show where a difference is, the digest covers all others.
    let digest = Sha256::digest(planes(pictures));
    let hex = digest
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect::<String>();
    assert_eq!(hex, case.pixels_sha256, "{}", case.name);
}

fn check_vision(member: &Member, case: &Case, picture: &Picture, features: &Tensor) -> f64 {
    let mut worst = member.error(case, "connector", features);
    if let Some(rows) = member.tensor(case, "vision.rows") {
        let rows = rows.to_dtype(Type::U32).unwrap();
        let states = member.model.vision_states(picture).unwrap();
        let layers = (0..states.len() - 2).map(|i| format!("vision.layer.{i}"));
        let names = ["vision.embeddings".to_owned()]
            .into_iter()
            .chain(layers)
            .chain(["vision.post_layernorm".into()]);
        for (name, state) in names.zip(&states) {
            let error = member.error(case, &name, &state.index_select(&rows, 0).unwrap());
            assert!(error <= F32_TOLERANCE, "{} {name}: {error:e}", case.name);
            worst = worst.max(error);
        }
    }
    assert!(worst <= F32_TOLERANCE, "{} connector: {worst:e}", case.name);
    worst
}

/// Every stage in f32: pixels to the bit, vision, connector, prompt, logits, tokens.
fn check_f32(folder: &Path) {
    let member = Member::load(folder, DType::F32);
    let (mut vision, mut logits_error) = (0f64, 0f64);
    for case in &member.golden.cases {
        let processed = member.processed(case);
        if case.video.is_none() {
            let grids = processed.iter().map(|p| p.grid).collect::<Vec<_>>();
            assert_eq!(grids, case.tiles, "{}", case.name);
        }
        let pictures = pictures(&processed);
        check_pixels(&member, case, &pictures);

        let prompt = member.prompt(case, &processed);
        assert_eq!(prompt.ids, case.input_ids, "{}", case.name);

        let features = member.features(&pictures);
        vision = vision.max(check_vision(&member, case, &pictures[0], &features[0]));

        if case.video.is_some() {
            check_clip(&member, case, &pictures);
        }

        let steps = case.tokens.len();
        let mut session = member.model.session();
        let mut logits = member
            .model
            .prefill(&mut session, &prompt, &features, steps, &mut go_on)
            .unwrap();
        let golden = member.tensor(case, "logits").unwrap();
        for (step, (&token, &margin)) in case.tokens.iter().zip(&case.margins).enumerate() {
            if step < golden.dim(0).unwrap() {
                let error = relative_l2(&logits, &golden.get(step).unwrap());
                assert!(
                    error <= F32_TOLERANCE,
                    "{} logits {step}: {error:e}",
                    case.name
                );
                logits_error = logits_error.max(error);
            }
            if margin > MARGIN {
                let ours = logits.argmax(0).unwrap().to_scalar::<u32>().unwrap();
                assert_eq!(ours, token, "{} token {step}", case.name);
            }
            logits = member.model.step(&mut session, token, &mut go_on).unwrap();
        }
    }
    println!(
        "{}: f32: vision {vision:.1e}, logits {logits_error:.1e}, {} cases",
        folder.display(),
        member.golden.cases.len()
    );
}

/// Frames of a video as the element hands them over: the reference's tokens as text.
fn check_clip(member: &Member, case: &Case, pictures: &[Picture]) {
    let content = &case.messages.as_array().unwrap().last().unwrap()["content"];
    let [_, question] = content.as_array().unwrap().as_slice() else {
        panic!("{}: a video and a question", case.name);
    };
    let clear = case.margins.iter().take_while(|margin| **margin > MARGIN);
    let steps = clear.count();
    let pictures = pictures.iter().collect::<Vec<_>>();
    let clip = case.video.as_ref().unwrap().clip();
    let mut request = Request::new(&pictures, question["text"].as_str().unwrap());
    request.clip = Some(&clip);
    request.max_tokens = steps;
    let mut session = member.model.session();
    let ours = member.model.describe(&mut session, &request, &mut go_on);
    let ours = ours.unwrap();
    let golden = &case.tokens[..ours.tokens];
    let golden = member.model.prompter().decode(golden).unwrap();
    let golden = golden.trim_end_matches(char::REPLACEMENT_CHARACTER).trim();
    assert!(ours.tokens > 3, "{}: {} tokens", case.name, ours.tokens);
    assert_eq!(ours.text, golden, "{}", case.name);
}

/// First logits in bf16 against transformers' bf16 run, without tiles, which take the same code as whole pictures.
fn check_bf16(folder: &Path) {
    let member = Member::load(folder, DType::Bf16);
    let mut worst = 0f64;
    for case in member.golden.cases.iter().filter(|c| !c.splitting) {
        let error = member.error(case, "logits_bf16", &member.first_logits(case));
        println!("{}: bf16 {}: {error:.1e}", folder.display(), case.name);
        worst = worst.max(error);
    }
    assert!(worst <= BF16_TOLERANCE, "{}: {worst:e}", folder.display());
}

/// The device to test, from `VLMNARRATE_DEVICE`.
fn device() -> DeviceKind {
    match std::env::var("VLMNARRATE_DEVICE").as_deref() {
        Ok("cuda") => DeviceKind::Cuda,
        _ => DeviceKind::Cpu,
    }
}

macro_rules! members {
    ($($module:ident: $folder:literal),* $(,)?) => {$(
        mod $module {
            #[test]
            fn f32() {
                super::check_f32(&super::data($folder));
            }

            #[test]
            fn bf16() {
                super::check_bf16(&super::data($folder));
            }
        }
    )*};
}

members! {
    smolvlm_256m: "smolvlm-256m",
    smolvlm_500m: "smolvlm-500m",
    smolvlm_2_2b: "smolvlm-2.2b",
    smolvlm2_256m: "smolvlm2-256m",
    smolvlm2_500m: "smolvlm2-500m",
    smolvlm2_2_2b: "smolvlm2-2.2b",
}

#[test]
#[ignore = "needs the folders that tools/reference/full_size.py writes"]
fn full_size() {
    let folders = std::env::var("VLMNARRATE_REFERENCE").expect("VLMNARRATE_REFERENCE");
    for folder in folders.split(':') {
        check_f32(Path::new(folder));
        check_bf16(Path::new(folder));
    }
}

/// f16 has no run of the reference to compare with: it must stay near the f32 goldens.
#[test]
fn f16_stays_near_f32() {
    let member = Member::load(&data("smolvlm2-2.2b"), DType::F16);
    let case = &member.golden.cases[0];
    let golden = member.tensor(case, "logits").unwrap().get(0).unwrap();
    let error = relative_l2(&member.first_logits(case), &golden);
    assert!(error <= BF16_TOLERANCE, "{error:e}");
}

/// 224 px is 14 × 14 patches, which 4 does not divide: the encoder runs on those 196, and the connector sees
/// them in a 16 × 16 grid whose border repeats the edge.
#[test]
fn a_grid_that_does_not_divide_is_padded_by_its_edges() {
    let member = Member::load(&data("smolvlm-256m"), DType::F32);
    let spec = &member.golden.cases[0].pictures[0];
    let picture = resize(&spec.draw(), 224, 224);
    let states = member.model.vision_states(&picture).unwrap();
    let patches = states.last().unwrap();
    assert_eq!(patches.dim(0).unwrap(), 14 * 14);

    let inner = |i: u32| i.saturating_sub(1).min(13);
    let grid = (0..16 * 16)
        .map(|i| inner(i / 16) * 14 + inner(i % 16))
        .collect::<Vec<_>>();
    let padded = patches
        .index_select(&Tensor::new(grid, &Device::Cpu).unwrap(), 0)
        .unwrap();
    // CUDA's kernels shuffle patches in their own way, which the members of 384 pixels test.
    let Some(expected) = member.model.connect(&padded, (16, 16)) else {
        return;
    };
    let expected = expected.unwrap();
    let features = member.model.features(&picture, &mut go_on).unwrap();
    assert_eq!(features.dim(0).unwrap(), 16);
    assert_eq!(relative_l2(&features, &expected), 0.0);

    let messages = question(None, vec![Content::Image], "What is this?");
    let spans = [member.model.span(&picture, (0, 0))];
    let prompt = member.model.prompter().encode(&messages, &spans).unwrap();
    assert_eq!(prompt.images.len(), 1);
    assert_eq!(prompt.images[0].1, 16);
}
