//! A small model, requests to it, and broken copies of it.

use std::{
    env, fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor};
use serde_json::Value;
use tempfile::TempDir;
use vlmnarrate_engine::{
    Answer, DType, DeviceKind, ErrorKind, Event, Picture, Quantization, Request, Sampling,
};
use vlmnarrate_smolvlm::{
    Checkpoint, Content, Error, LoadOptions, Model, Prompt, Session, Source, question,
};

use super::data;

/// Tokens of [`small`]'s vocabulary.
pub const VOCABULARY: u32 = 500;
pub const SIDE: u32 = 64;
pub const PROMPT: &str = "What is it?";

/// A checkpoint of random weights with kernels on every device.
pub fn small() -> PathBuf {
    data::all().join("gguf/SmolVLM-Small")
}

/// A copy of [`small`] to be changed.
pub struct Copy(pub TempDir);

impl Copy {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for file in fs::read_dir(small()).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
        }
        Self(folder)
    }

    pub fn json(self, name: &str, change: impl FnOnce(&mut Value)) -> Self {
        let path = self.0.path().join(name);
        let mut json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut json);
        fs::write(&path, json.to_string()).unwrap();
        self
    }

    pub fn eos(self, ids: Value) -> Self {
        self.json("generation_config.json", |json| json["eos_token_id"] = ids)
    }

    /// Changes the values of a tensor, row by row.
    pub fn tensor(self, name: &str, change: impl FnOnce(&mut Vec<Vec<f32>>)) -> Self {
        let path = self.0.path().join("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        let tensor = tensors[name].to_dtype(candle_core::DType::F32).unwrap();
        let is_row = tensor.rank() == 1;
        let tensor = if is_row {
            tensor.unsqueeze(0).unwrap()
        } else {
            tensor
        };
        let mut rows = tensor.to_vec2().unwrap();
        change(&mut rows);
        let changed = Tensor::new(rows, &Device::Cpu).unwrap();
        let changed = if is_row {
            changed.squeeze(0).unwrap()
        } else {
            changed
        };
        let changed = changed.to_dtype(tensors[name].dtype()).unwrap();
        tensors.insert(name.into(), changed);
        candle_core::safetensors::save(&tensors, &path).unwrap();
        self
    }

    pub fn load(&self) -> Result<Model, Error> {
        load(self.0.path(), options()[0])
    }

    pub fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }
}

pub fn is_cuda() -> bool {
    env::var("VLMNARRATE_DEVICE").as_deref() == Ok("cuda")
}

/// Every way to run on the device: candle's tensors and the kernels of the CPU, or those of a GPU.
pub fn options() -> Vec<LoadOptions> {
    let options = |device, dtype, quantization| {
        let mut options = LoadOptions::default();
        options.device = device;
        options.dtype = dtype;
        options.quantization = quantization;
        options.threads = 1;
        options
    };
    match is_cuda() {
        true => vec![options(DeviceKind::Cuda, DType::Bf16, Quantization::None)],
        false => vec![
            options(DeviceKind::Cpu, DType::F32, Quantization::None),
            options(DeviceKind::Cpu, DType::Auto, Quantization::Q8_0),
        ],
    }
}

pub fn load(folder: &Path, options: LoadOptions) -> Result<Model, Error> {
    let checkpoint = Checkpoint::open(&Source::Folder(folder.into()))?;
    Model::load(&checkpoint, &options, &mut |_, _| ControlFlow::Continue(()))
}

pub fn small_model() -> Model {
    load(&small(), options()[0]).unwrap()
}

pub fn each_model(test: impl Fn(&Model)) {
    for options in options() {
        println!("{options:?}");
        test(&load(&small(), options).unwrap());
    }
}

pub fn picture(seed: u64) -> Picture {
    let mut rng = fastrand::Rng::with_seed(seed);
    let rgb = (0..3 * SIDE * SIDE).map(|_| rng.u8(..)).collect();
    Picture::new(SIDE, SIDE, rgb).unwrap()
}

pub fn request<'a>(pictures: &'a [&'a Picture]) -> Request<'a> {
    {
        let mut request = Request::new(pictures, PROMPT);
        request.max_tokens = 8;
        request
    }
}

pub fn go_on(_: Event<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

pub fn describe(
    model: &Model,
    session: &mut Session,
    request: &Request<'_>,
) -> Result<Answer, Error> {
    model.describe(session, request, &mut go_on)
}

/// The text of a caption of one picture, made before and after each failure.
pub fn caption(model: &Model, session: &mut Session) -> String {
    let picture = picture(1);
    let made = describe(model, session, &request(&[&picture])).unwrap();
    assert_eq!(made.tokens, 8);
    made.text
}

/// A prompt with a picture, and the picture's features.
pub fn prompt(model: &Model) -> (Prompt, Vec<Tensor>) {
    let picture = picture(1);
    let features = model.features(&picture, &mut go_on).unwrap();
    let messages = question(None, vec![Content::Image], PROMPT);
    let spans = [model.span(&picture, (0, 0))];
    let prompt = model.prompter().encode(&messages, &spans).unwrap();
    (prompt, vec![features])
}

pub fn prefill(
    model: &Model,
    session: &mut Session,
    prompt: &Prompt,
    features: &[Tensor],
    room: usize,
) -> Result<Vec<f32>, Error> {
    let logits = model.prefill(session, prompt, features, room, &mut go_on)?;
    Ok(logits.to_vec1().unwrap())
}

pub fn step(model: &Model, session: &mut Session, token: u32) -> Result<Vec<f32>, Error> {
    Ok(model.step(session, token, &mut go_on)?.to_vec1().unwrap())
}

pub fn best(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.unwrap().0 as u32
}

/// Greedy tokens of [`caption`]'s picture and prompt.
pub fn greedy(model: &Model, count: usize) -> Vec<u32> {
    let (prompt, features) = prompt(model);
    let mut session = model.session();
    let mut logits = prefill(model, &mut session, &prompt, &features, count).unwrap();
    let mut tokens = Vec::new();
    while tokens.len() < count {
        tokens.push(best(&logits));
        logits = step(model, &mut session, tokens[tokens.len() - 1]).unwrap();
    }
    tokens
}

/// Checks that a caption failed with an error that has all of these words.
#[track_caller]
pub fn fails<T: std::fmt::Debug>(result: Result<T, Error>, says: &[&str]) {
    let error = result.unwrap_err();
    let text = error.to_string();
    assert_ne!(error.kind(), ErrorKind::Device, "{text}");
    for part in says {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

/// Requests of each kind of decoding: greedy, sampled, penalized, and constrained to choices.
pub fn kinds<'a>(plain: Request<'a>, choices: &'a [String]) -> [Request<'a>; 5] {
    let sampled = |sampling| {
        let mut request = plain;
        request.sampling = sampling;
        request
    };
    [
        plain,
        sampled(Sampling {
            temperature: 0.7,
            top_p: 0.9,
            top_k: 20,
            ..Sampling::default()
        }),
        sampled(Sampling {
            temperature: 1.0,
            min_p: 0.1,
            ..Sampling::default()
        }),
        sampled(Sampling {
            repetition_penalty: 1.1,
            ..Sampling::default()
        }),
        {
            let mut request = plain;
            request.choices = choices;
            request
        },
    ]
}
