//! Tests of the CUDA backend alone. They need a GPU, or the emulator of `tools/cuda`, and `VLMNARRATE_DEVICE=cuda`.
#![cfg(feature = "cuda")]

#[path = "reference/data.rs"]
mod data;

use std::{
    env, fs, ops::ControlFlow, os::unix::fs::symlink, path::PathBuf, process::Command, thread,
};

use candle_core::{Device, Tensor};
use vlmnarrate_engine::{DType, DeviceKind, Event, Picture, Remedy, Request, Sampling};
use vlmnarrate_smolvlm::{Checkpoint, Error, LoadOptions, Model, Session, Source};

use data::data;

const TOKENS: usize = 20;
const SIDE: u32 = 64;

/// A model of random weights: its logits are so close that one wrong bit changes the text.
fn model(dtype: DType) -> Option<Model> {
    if env::var("VLMNARRATE_DEVICE").as_deref() != Ok("cuda") {
        eprintln!("not tested: VLMNARRATE_DEVICE is not cuda");
        return None;
    }
    Some(load(dtype).unwrap())
}

fn load(dtype: DType) -> Result<Model, Error> {
    load_from(data("smolvlm2-256m"), DeviceKind::Cuda, dtype)
}

fn load_from(folder: PathBuf, device: DeviceKind, dtype: DType) -> Result<Model, Error> {
    let mut options = LoadOptions::default();
    options.device = device;
    options.dtype = dtype;
    let checkpoint = Checkpoint::open(&Source::Folder(folder)).unwrap();
    Model::load(&checkpoint, &options, &mut |_, _| ControlFlow::Continue(()))
}

fn noise(rng: &mut fastrand::Rng) -> Picture {
    let rgb = (0..3 * SIDE * SIDE).map(|_| rng.u8(..)).collect();
    Picture::new(SIDE, SIDE, rgb).unwrap()
}

fn request<'a>(pictures: &'a [&'a Picture], prompt: &'a str) -> Request<'a> {
    {
        let mut request = Request::new(pictures, prompt);
        request.max_tokens = TOKENS;
        request
    }
}

/// The partial texts of a caption.
fn describe(model: &Model, session: &mut Session, request: &Request<'_>) -> Vec<String> {
    let mut said = Vec::new();
    let observer = &mut |event: Event<'_>| {
        if let Event::Text { text, .. } = event {
            said.push(text.to_owned());
        }
        ControlFlow::Continue(())
    };
    model.describe(session, request, observer).unwrap();
    said
}

/// Accepted and rejected draft tokens, cached image features and cached prompt prefixes change nothing but the time.
#[test]
fn what_was_said_before_changes_nothing() {
    for dtype in [DType::Bf16, DType::F16, DType::F32] {
        let Some(model) = model(dtype) else { return };
        let mut rng = fastrand::Rng::with_seed(5);
        let mut pictures = [noise(&mut rng), noise(&mut rng)];
        let mut prompt = "Describe this frame in one sentence.";
        let mut session = model.session();
        let mut sampling = Sampling::default();
        for i in 0..12 {
            match i % 6 {
                0 => pictures[1] = noise(&mut rng),
                2 => pictures[1].rgb[7] ^= 1,
                3 => prompt = ["What?", "Describe this frame in one sentence."][rng.usize(..2)],
                4 => sampling.temperature = [0.0, 1.5][rng.usize(..2)],
                5 => sampling.repetition_penalty = [1.0, 1.1][rng.usize(..2)],
                _ => (),
            }
            let [first, second] = &pictures;
            let shown = &[first, second][1 - i % 2..];
            let mut request = request(shown, prompt);
            request.sampling = sampling;
            let known = describe(&model, &mut session, &request);
            let fresh = describe(&model, &mut model.session(), &request);
            assert_eq!(known, fresh, "{dtype:?} caption {i}");
        }
    }
}

/// Requests that run at the same time get the captions that they would get alone.
#[test]
fn callers_do_not_meet() {
    let Some(model) = model(DType::Bf16) else {
        return;
    };
    let captions = &|caller: u64| {
        let mut rng = fastrand::Rng::with_seed(caller);
        let mut session = model.session();
        let pictures: Vec<_> = (0..3).map(|_| noise(&mut rng)).collect();
        let prompts = ["Describe this frame in one sentence.", "What?"];
        let captions = pictures.iter().map(|picture| {
            let shown = [picture];
            describe(
                &model,
                &mut session,
                &request(&shown, prompts[caller as usize % 2]),
            )
        });
        captions.collect::<Vec<_>>()
    };
    let alone: Vec<_> = (0..5).map(captions).collect();
    let together = thread::scope(|scope| {
        let threads: Vec<_> = (0..5)
            .map(|caller| scope.spawn(move || captions(caller)))
            .collect();
        let captions = threads.into_iter().map(|thread| thread.join().unwrap());
        captions.collect::<Vec<_>>()
    });
    assert_eq!(alone, together);
}

#[test]
fn a_caption_can_be_ended() {
    let Some(model) = model(DType::Bf16) else {
        return;
    };
    let picture = noise(&mut fastrand::Rng::with_seed(1));
    let shown = [&picture];
    let mut session = model.session();
    let request = request(&shown, "What?");
    let whole = describe(&model, &mut session, &request);
    let mut heard = 0;
    let stop = &mut |event: Event<'_>| {
        heard += usize::from(matches!(event, Event::Text { .. }));
        match heard {
            3.. => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    };
    let error = model.describe(&mut session, &request, stop).unwrap_err();
    assert_eq!(error.to_string(), "cancelled");
    assert_eq!(describe(&model, &mut session, &request), whole);

    // A stop string is not part of the caption.
    let text = whole.last().unwrap();
    let end: String = text
        .chars()
        .skip(text.chars().count() / 2)
        .take(2)
        .collect();
    let stop_strings = [end];
    let mut stopping = request;
    stopping.stop_strings = &stop_strings;
    let made = model.describe(&mut session, &stopping, &mut |_| ControlFlow::Continue(()));
    let made = made.unwrap();
    assert!(
        text.starts_with(&made.text) && made.text.len() < text.len(),
        "{made:?} of {text}"
    );
    assert!(!made.truncated);
}

/// The output of a process that runs an ignored test with variables of the emulator.
fn says(test: &str, variables: &[(&str, &str)]) -> Option<String> {
    model(DType::Bf16).filter(|model| model.device().name == "Emulated GPU")?;
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture"])
        .envs(variables.iter().copied())
        .output();
    let output = output.unwrap();
    let said = [output.stdout, output.stderr].concat();
    Some(String::from_utf8_lossy(&said).into_owned())
}

#[test]
#[ignore = "run by the tests of errors"]
fn two_captions() {
    let model = match load(DType::Auto) {
        Ok(model) => model,
        Err(error) => return println!("not loaded: {:?}: {error}", error.kind()),
    };
    let picture = noise(&mut fastrand::Rng::with_seed(1));
    for _ in 0..2 {
        let shown = [&picture];
        let request = request(&shown, "What?");
        let made = model.describe(&mut model.session(), &request, &mut |_| {
            ControlFlow::Continue(())
        });
        match made {
            Ok(made) => println!("made: {} tokens", made.tokens),
            Err(error) => println!("not made: {:?}: {error}", error.kind()),
        }
    }
}

#[test]
fn what_is_wrong_is_said_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let mut paths = maps.split_whitespace();
    let no_driver = paths.find(|path| path.ends_with("/libc.so.6")).unwrap();
    symlink(no_driver, folder.path().join("libcuda.so.1")).unwrap();
    for (variables, expected) in [
        (&[][..], "made: 20 tokens"),
        (
            &[("LD_LIBRARY_PATH", "")],
            "not loaded: Settings: device: there is no NVIDIA driver",
        ),
        (
            &[("LD_LIBRARY_PATH", folder.path().to_str().unwrap())],
            "not loaded: Settings: device: the NVIDIA driver is for CUDA of an unknown version and",
        ),
        (
            &[("VLMNARRATE_EMULATED_DEVICES", "0")],
            "not loaded: Settings: device: the NVIDIA driver finds no GPU",
        ),
        (
            &[("VLMNARRATE_EMULATED_DRIVER", "12040")],
            "not loaded: Settings: device: the NVIDIA driver is for CUDA 12.4 and this build for 13.0; update",
        ),
        (
            &[("VLMNARRATE_EMULATED_MEMORY", "500000")],
            "not loaded: Settings: device: the GPU has no memory for 1 MB more, 0 of its 0 MB are free",
        ),
        (
            &[("VLMNARRATE_EMULATED_FAIL_LAUNCH", "20")],
            "not made: Device: device: the GPU failed: ",
        ),
    ] {
        let Some(said) = says("two_captions", variables) else {
            return;
        };
        assert!(said.contains(expected), "{variables:?}: {said}");
        assert!(!said.contains("panicked"), "{variables:?}: {said}");
    }
}

#[test]
#[ignore = "run by the next"]
fn one_too_large() {
    let Ok(model) = load(DType::Auto) else {
        return println!("not loaded");
    };
    let mut rng = fastrand::Rng::with_seed(1);
    let pictures: Vec<_> = (0..6).map(|_| noise(&mut rng)).collect();
    let pictures: Vec<_> = pictures.iter().collect();
    let describe = |request: &Request<'_>| {
        let go_on = &mut |_: Event<'_>| ControlFlow::Continue(());
        model.describe(&mut model.session(), request, go_on)
    };
    // With a picture and without.
    let small = [&pictures[..1], &[]].map(|pictures| request(pictures, "What?"));
    let texts = || {
        let texts = small.iter().map(|small| Ok(describe(small)?.text));
        texts.collect::<Result<Vec<_>, Error>>()
    };
    let Ok(first) = texts() else {
        return println!("not even small ones");
    };
    // The second round captures CUDA graphs, which later ones replay.
    for _ in 0..2 {
        assert_eq!(texts().unwrap(), first);
    }
    let words = "a word ".repeat(60);
    match describe(&request(&pictures, &words)) {
        Ok(_) => println!("the large one too"),
        Err(error) => println!("the large one not: {error}"),
    }
    assert_eq!(describe(&small[1]).unwrap().text, first[1]);
    assert_eq!(texts().unwrap(), first);
    println!("the small ones as before");
}

/// Running out of memory while buffers grow leaves no kernel that uses the old buffers.
#[test]
fn a_caption_that_there_is_no_memory_for_leaves_others_alone() {
    let mut failed = 0;
    for kilobytes in (1400..1700).step_by(30) {
        let bytes = (kilobytes * 1000).to_string();
        let Some(said) = says("one_too_large", &[("VLMNARRATE_EMULATED_MEMORY", &bytes)]) else {
            return;
        };
        println!("{kilobytes}: {said}");
        let said = said.replace("\n", " | ");
        if said.contains("the large one") {
            assert!(
                said.contains("the small ones as before"),
                "{kilobytes}: {said}"
            );
            failed += usize::from(said.contains("the large one not"));
        }
    }
    assert!(failed > 0);
}

#[test]
fn a_model_that_the_kernels_do_not_know_runs_on_the_cpu() {
    if model(DType::Bf16).is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for file in fs::read_dir(data("smolvlm2-256m")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
    }
    let path = folder.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["text_config"]["mlp_bias"] = true.into();
    fs::write(&path, config.to_string()).unwrap();
    let weights = folder.path().join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&weights, &Device::Cpu).unwrap();
    let biases: Vec<_> = tensors
        .iter()
        .filter(|(name, _)| name.contains("text_model") && name.contains(".mlp."))
        .map(|(name, weight)| {
            let bias = Tensor::zeros(weight.dim(0).unwrap(), weight.dtype(), &Device::Cpu);
            (name.replace(".weight", ".bias"), bias.unwrap())
        })
        .collect();
    assert!(!biases.is_empty());
    tensors.extend(biases);
    candle_core::safetensors::save(&tensors, &weights).unwrap();

    let on = |device| load_from(folder.path().into(), device, DType::Auto);
    let error = on(DeviceKind::Cuda).unwrap_err();
    assert_eq!(
        error.to_string(),
        "device: the GPU's kernels don't know biases in the decoder"
    );
    assert_eq!(error.remedy(), Some(Remedy::Cpu));
    assert_eq!(on(DeviceKind::Auto).unwrap().device().kind, "cpu");
}
