//! Real models in the element: the embedded one, folders, and broken folders.

use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use crate::common::{Fake, Heard, Pipeline};
use gst::prelude::*;
use gstvlmnarrate::SmolVlmLoader;
use gstvlmnarrate::engine::{DType, DeviceKind, Event, Picture, Quantization, Request};
use vlmnarrate_smolvlm::{Checkpoint, LoadOptions, Model, Source, check_device, resize};

const LINE: &str = "videotestsrc num-buffers=3 ! video/x-raw,width=64,height=48,framerate=1/1
                    ! vlmnarrate name=n ! fakesink";

/// A small random SmolVLM-256M, written by transformers.
fn reference() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/reference/smolvlm-256m")
}

#[track_caller]
fn run(model: Option<&Path>, set: impl FnOnce(&Pipeline)) -> Heard {
    let pipeline = Pipeline::new(LINE, &Fake::new());
    pipeline.narrator.set_engine_loader(SmolVlmLoader);
    if let Some(model) = model {
        pipeline.narrator.set_property("model", model.to_str());
    }
    set(&pipeline);
    pipeline.run()
}

#[test]
fn the_demo_model_says_once_what_it_is() {
    let heard = run(None, |_| ());
    assert!(heard.eos, "{heard:#?}");
    assert_eq!(heard.captions.len(), 3);
    let [info] = &heard.infos[..] else {
        panic!("{:?}", heard.infos);
    };
    assert!(
        info.contains("videotestsrc") && info.contains("set model to"),
        "{info}"
    );
    let caption = &heard.captions[0];
    assert_eq!(caption.model, "demo");
    assert!(!caption.text.is_empty());
    assert!(caption.cost.vision.as_nanos() > 0 && caption.cost.decode.as_nanos() > 0);
}

#[test]
fn a_launch_line_may_name_the_device() {
    let line = LINE.replace("name=n", "name=n device=cpu");
    let pipeline = Pipeline::new(&line, &Fake::new());
    pipeline.narrator.set_engine_loader(SmolVlmLoader);
    let heard = pipeline.run();
    assert!(heard.eos, "{heard:#?}");
    let caption = &heard.captions[0];
    assert_eq!(caption.device, "cpu");
    assert!(!caption.device_name.is_empty());
    #[cfg(target_os = "linux")]
    assert!(caption.device_memory > 64 << 20, "{caption:?}");
}

#[test]
fn a_device_that_is_not_built_in_is_one_error_in_ready() {
    let devices = [
        ("cuda", DeviceKind::Cuda, "CUDA"),
        ("metal", DeviceKind::Metal, "Metal"),
    ];
    for (nick, kind, name) in devices {
        if check_device(kind).is_ok() {
            continue;
        }
        let element = crate::common::narrator(&Fake::new());
        element.set_engine_loader(SmolVlmLoader);
        element.set_property_from_str("device", nick);
        let log = crate::common::Log::of(&element);
        assert!(element.set_state(gst::State::Ready).is_err());
        let heard = log.heard();
        let [(error, _)] = &heard.errors[..] else {
            panic!("{heard:#?}");
        };
        assert!(error.matches(gst::ResourceError::Settings));
        let says = error.message();
        let begins = format!("device: this build has no {name}; build it with ");
        assert!(says.starts_with(&begins), "{says}");
        assert!(says.contains(&format!("--features {nick}`")), "{says}");
        assert!(says.ends_with(". Or set device=auto"), "{says}");
        element.set_state(gst::State::Null).unwrap();
    }
}

#[test]
fn what_is_left_to_the_machine_is_the_same_as_what_it_comes_to() {
    let demo = Checkpoint::open(&Source::Demo).unwrap();
    let options = |device, dtype, quantization| {
        let mut options = LoadOptions::default();
        options.device = device;
        options.dtype = dtype;
        options.quantization = quantization;
        options.resolve(&demo).unwrap()
    };
    let (cpu, auto) = (DeviceKind::Cpu, Quantization::Auto);
    for (dtype, quantization) in [
        (DType::Auto, Quantization::Q8_0),
        (DType::F32, Quantization::None),
    ] {
        let named = options(cpu, dtype, quantization);
        assert_eq!(options(cpu, dtype, auto), named);
        assert_eq!(named.resolve(&demo).unwrap(), named);
    }
    let found = options(DeviceKind::Auto, DType::Auto, auto);
    assert_ne!(found.device, DeviceKind::Auto);
    assert_ne!(found.quantization, auto);
}

#[test]
fn a_folder_is_loaded_and_described_with() {
    let describe = |side: u32| {
        run(Some(&reference()), |pipeline| {
            let narrator = &pipeline.narrator;
            narrator.set_property("image-size", side);
            narrator.set_property("max-tokens", 5u32);
            narrator.set_property("partial-captions", true);
        })
    };
    let heard = describe(0);
    assert!(heard.eos, "{heard:#?}");
    assert_eq!(heard.infos, [""; 0]);
    let caption = &heard.captions[2];
    assert_eq!(caption.model, "smolvlm-256m");
    assert!(caption.tokens <= 5);
    assert_eq!(heard.partials.last().map(|c| c.sequence), Some(2));
    // Greedy, and the picture has not changed much: the same again, to the byte.
    let again = describe(0);
    assert_eq!(heard.texts(), again.texts());
}

/// What the demo model says of a screen of one colour, in a second.
fn screen(pattern: &str, set: impl FnOnce(&Pipeline)) -> Heard {
    let pipeline = Pipeline::new(
        &format!(
            "videotestsrc pattern={pattern} num-buffers=2
             ! video/x-raw,width=64,height=48,framerate=1/1 ! vlmnarrate name=n ! fakesink"
        ),
        &Fake::new(),
    );
    pipeline.narrator.set_engine_loader(SmolVlmLoader);
    set(&pipeline);
    pipeline.run_to_eos()
}

/// What the demo model says of one picture.
fn said_of(info: &gst_video::VideoInfo, mut buffer: gst::Buffer) -> String {
    let narrator = crate::common::narrator(&Fake::new());
    narrator.set_engine_loader(SmolVlmLoader);
    let caps = info.to_caps().unwrap().to_string();
    let (mut harness, log) = crate::common::harness_with(&narrator, &caps);
    buffer.make_mut().set_pts(gst::ClockTime::ZERO);
    harness.push_and_pull(buffer).unwrap();
    log.heard().texts().concat()
}

/// The same picture as PQ of BT.2020, its white the reference white.
fn pq_twin(info: &gst_video::VideoInfo, rgb: &[u8]) -> (gst_video::VideoInfo, gst::Buffer) {
    let light = |value: u8| match f64::from(value) / 255.0 {
        value if value <= 0.04045 => value / 12.92,
        value => ((value + 0.055) / 1.055).powf(2.4),
    };
    let code = |light: f64| {
        let power = (light * 0.0203).powf(2610.0 / 16384.0);
        let root = (0.8359375 + 18.8515625 * power) / (1.0 + 18.6875 * power);
        (root.powf(78.84375) * 65535.0).round() as u16
    };
    let mut bytes = vec![];
    for row in rgb.chunks_exact(info.stride()[0] as usize) {
        for pixel in row.as_chunks().0.iter().take(info.width() as usize) {
            let [r, g, b] = pixel.map(light);
            let wide = [
                0.6274 * r + 0.3293 * g + 0.0433 * b,
                0.0691 * r + 0.9195 * g + 0.0114 * b,
                0.0164 * r + 0.0880 * g + 0.8956 * b,
            ];
            bytes.extend([0xff; 2]);
            bytes.extend(wide.iter().flat_map(|light| code(*light).to_ne_bytes()));
        }
    }
    let twin = |format, colorimetry: &str| {
        gst_video::VideoInfo::builder(format, info.width(), info.height())
            .fps(info.fps())
            .colorimetry(&colorimetry.parse().unwrap())
            .build()
            .unwrap()
    };
    let deep = twin(gst_video::VideoFormat::Argb64, "1:1:14:7");
    let camera = twin(gst_video::VideoFormat::P01010le, "bt2100-pq");
    let from = gst::Buffer::from_slice(bytes);
    let from = gst_video::VideoFrame::from_buffer_readable(from, &deep).unwrap();
    let to = gst::Buffer::with_size(camera.size()).unwrap();
    let mut to = gst_video::VideoFrame::from_buffer_writable(to, &camera).unwrap();
    let converter = gst_video::VideoConverter::new(&deep, &camera, None).unwrap();
    converter.frame(&from, &mut to);
    (camera, to.into_buffer())
}

#[test]
fn the_demo_model_says_the_same_of_a_twin_in_high_dynamic_range() {
    crate::common::init();
    for pattern in ["smpte", "red", "blue", "ball", "checkers-8", "gradient"] {
        let line = format!(
            "videotestsrc pattern={pattern} num-buffers=1
             ! capsfilter caps=video/x-raw,format=RGB,width=96,height=64,framerate=1/1"
        );
        let mut source = gst_check::Harness::new_parse(&line);
        source.play();
        let buffer = source.pull().unwrap();
        let caps = source.sinkpad().unwrap().current_caps().unwrap();
        let info = gst_video::VideoInfo::from_caps(&caps).unwrap();
        let (camera, twin) = pq_twin(&info, &buffer.map_readable().unwrap());
        let said = said_of(&info, buffer);
        assert!(!said.is_empty(), "{pattern}");
        assert_eq!(said_of(&camera, twin), said, "{pattern}");
    }
}

/// A picture of RGB, 320×240, each colour a function of the place: both from 0 to 1.
fn drawn(colour: impl Fn(f64, f64) -> [f64; 3]) -> (gst_video::VideoInfo, gst::Buffer) {
    let (width, height) = (320, 240);
    let info = gst_video::VideoInfo::builder(gst_video::VideoFormat::Rgb, width, height)
        .fps(gst::Fraction::new(1, 1))
        .build()
        .unwrap();
    let places = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
    let bytes: Vec<u8> = places
        .flat_map(|(x, y)| colour(f64::from(x) / 320.0, f64::from(y) / 240.0))
        .map(|value| (255.0 * value) as u8)
        .collect();
    (info, gst::Buffer::from_slice(bytes))
}

#[test]
fn the_demo_model_says_what_it_does_not_know() {
    crate::common::init();
    let plasma = drawn(|x, y| {
        let wave = |across: f64, down: f64| {
            (across * x + down * y + (7.0 * x * y).sin()).sin() / 2.0 + 0.5
        };
        [wave(9.0, 5.0), wave(4.0, -11.0), wave(-6.0, 7.0)]
    });
    // Hills in front of an evening sky.
    let hills = drawn(|x, y| {
        let ridge = |at: f64, height: f64| at + height * ((9.0 * x).sin() + (23.0 * x).cos() / 2.0);
        match y {
            _ if y > ridge(0.8, 0.05) => [0.1, 0.2, 0.1],
            _ if y > ridge(0.6, 0.08) => [0.2, 0.3, 0.4],
            _ => [0.9 - y / 3.0, 0.5 + y / 4.0, 0.4],
        }
    });
    for (what, (info, buffer)) in [("plasma", plasma), ("hills", hills)] {
        assert_eq!(
            said_of(&info, buffer),
            "This demo model only knows test pictures; choose a model.",
            "{what}"
        );
    }
}

#[test]
fn weights_may_be_quantized() {
    for (quantization, dtype) in [
        ("auto", "auto"),
        ("auto", "bf16"),
        ("none", "auto"),
        ("q8-0", "f32"),
        ("q4-0", "auto"),
    ] {
        let heard = screen("red", |pipeline| {
            let narrator = &pipeline.narrator;
            narrator.set_property_from_str("quantization", quantization);
            narrator.set_property_from_str("dtype", dtype);
        });
        assert_eq!(
            heard.texts(),
            ["A solid red screen."; 2],
            "{quantization} {dtype}"
        );
    }
}

#[test]
fn quantized_weights_are_computed_with_in_f32() {
    let heard = run(None, |pipeline| {
        pipeline
            .narrator
            .set_property_from_str("quantization", "q8-0");
        pipeline.narrator.set_property_from_str("dtype", "bf16");
    });
    let (error, _) = &heard.errors[0];
    assert!(error.matches(gst::ResourceError::Settings), "{error}");
    assert!(error.message().contains("dtype"), "{error}");
}

#[test]
fn a_caption_is_one_of_the_choices() {
    let choices = "A solid blue screen. | A solid red screen.|A solid red";
    for (pattern, text) in [
        ("red", "A solid red screen."),
        ("blue", "A solid blue screen."),
    ] {
        let heard = screen(pattern, |pipeline| {
            pipeline.narrator.set_property("choices", choices);
            // Choices are as long as they are.
            pipeline.narrator.set_property("max-tokens", 1u32);
        });
        let caption = &heard.captions[1];
        assert_eq!(caption.text, text);
        assert!(!caption.truncated);
        let probability = caption.probability.unwrap();
        assert!((0.9..=1.0).contains(&probability), "{probability}");
    }
    // What nobody would say is said where there is nothing else.
    let heard = screen("red", |pipeline| {
        pipeline
            .narrator
            .set_property("choices", "Television snow.");
    });
    assert_eq!(heard.texts(), ["Television snow."; 2]);
    assert_eq!(heard.captions[0].probability, Some(1.0));
    // Two that are about as wrong share the probability.
    let either = |choices: &str| {
        let heard = screen("red", |pipeline| {
            pipeline.narrator.set_property("choices", choices);
        });
        heard.captions[0].probability.unwrap()
    };
    assert!(either("black|snow") < 1.0);
}

#[test]
fn a_stop_string_ends_the_caption() {
    let heard = screen("red", |pipeline| {
        pipeline
            .narrator
            .set_property("stop-strings", "nowhere| screen");
        pipeline.narrator.set_property("partial-captions", true);
    });
    assert_eq!(heard.texts(), ["A solid red"; 2]);
    assert!(!heard.captions[0].truncated);
    assert_eq!(heard.captions[0].probability, Some(1.0));
    assert!(
        heard
            .partials
            .iter()
            .all(|partial| !partial.text.contains("screen"))
    );
}

#[test]
fn describe_now_is_not_limited_to_the_choices() {
    let heard = screen("red", |pipeline| {
        pipeline.narrator.set_property("choices", "yes|no");
        pipeline.reach(gst::State::Ready);
        pipeline.narrator.describe_now(None, None).unwrap();
    });
    let texts = heard.texts();
    assert!(texts.contains(&"A solid red screen."), "{texts:?}");
    assert!(texts.contains(&"yes") || texts.contains(&"no"), "{texts:?}");
}

/// The element hands the whole frame over and the model does with it what it does with any picture
/// (which `tests/parity.rs` holds against the reference).
#[test]
fn image_splitting_looks_at_the_whole_frame() {
    let pipeline = Pipeline::new(
        "videotestsrc num-buffers=1 ! video/x-raw,format=RGB,width=96,height=48,framerate=1/1
         ! vlmnarrate name=n image-splitting=true max-tokens=5 dtype=f32 ! fakesink",
        &Fake::new(),
    );
    pipeline.narrator.set_engine_loader(SmolVlmLoader);
    pipeline
        .narrator
        .set_property("model", reference().to_str());
    let frame = Arc::new(Mutex::new(Vec::new()));
    let entry = pipeline.narrator.static_pad("sink").unwrap();
    entry.add_probe(gst::PadProbeType::BUFFER, {
        let frame = frame.clone();
        move |_, info| {
            *frame.lock().unwrap() = info.buffer().unwrap().map_readable().unwrap().to_vec();
            gst::PadProbeReturn::Ok
        }
    });
    let heard = pipeline.run_to_eos();

    let checkpoint = Checkpoint::open(&Source::Folder(reference())).unwrap();
    let go_on = &mut |_, _| ControlFlow::Continue(());
    let model = Model::load(&checkpoint, &LoadOptions::default(), go_on).unwrap();
    let picture = Picture::new(96, 48, frame.lock().unwrap().clone()).unwrap();
    let describe = |splitting| {
        let side = checkpoint.image_size();
        let shown = match splitting {
            true => picture.clone(),
            false => resize(&picture, side, side),
        };
        let pictures = [&shown];
        let mut request = Request::new(&pictures, "Describe this frame in one sentence.");
        request.whole_frames = splitting;
        request.max_tokens = 5;
        let mut session = model.session();
        let go_on = &mut |_: Event<'_>| ControlFlow::Continue(());
        model.describe(&mut session, &request, go_on).unwrap().text
    };
    // Random weights say control characters, too.
    let said = describe(true).replace(char::is_control, "\u{fffd}");
    assert_eq!(heard.texts(), [said]);
    assert_ne!(describe(true), describe(false));
}

#[test]
fn detail_on_demand_goes_beside_short_captions() {
    let fake = Fake::new();
    let pipeline = Pipeline::new(
        "videotestsrc num-buffers=2 ! video/x-raw,width=96,height=48,framerate=1/1
         ! vlmnarrate name=n detail-image-splitting=true ! fakesink",
        &fake,
    );
    pipeline.reach(gst::State::Ready);
    let id = pipeline.narrator.describe_now(None, None).unwrap();
    let heard = pipeline.run_to_eos();
    let requests = fake.requests();
    let requests = requests
        .iter()
        .map(|request| (request.splitting, request.side));
    let small = (false, crate::common::engine::SIDE);
    assert_eq!(Vec::from_iter(requests), [small, (true, 96), small]);
    assert_eq!(heard.captions[1].stamp.request_id, id);
}

#[test]
fn an_image_size_that_does_not_fit_is_refused_with_the_remedy() {
    let pipeline = Pipeline::new(LINE, &Fake::new());
    pipeline.narrator.set_engine_loader(SmolVlmLoader);
    pipeline
        .narrator
        .set_property("model", reference().to_str());
    pipeline.narrator.set_property("image-size", 4000u32);
    assert!(pipeline.pipeline.set_state(gst::State::Playing).is_err());
    let (error, _) = pipeline.log.heard().errors.remove(0);
    assert!(error.matches(gst::ResourceError::Settings), "{error:?}");
    assert!(error.message().starts_with("image-size: "), "{error}");
}

/// A copy of the reference in which something is broken.
fn broken(damage: impl FnOnce(&Path)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in fs::read_dir(reference()).unwrap() {
        let file = file.unwrap();
        if !file.file_name().to_str().unwrap().starts_with("golden") {
            fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
        }
    }
    damage(folder.path());
    folder
}

/// An ERROR of this class comes before any buffer and names the file and what to do.
#[track_caller]
fn refused(model: &Path, class: gst::ResourceError, words: &[&str]) {
    let pipeline = Pipeline::new(LINE, &Fake::new());
    pipeline.narrator.set_engine_loader(SmolVlmLoader);
    pipeline.narrator.set_property("model", model.to_str());
    let passed = crate::common::spy(&pipeline.narrator.static_pad("src").unwrap());
    assert!(pipeline.pipeline.set_state(gst::State::Playing).is_err());
    let heard = pipeline.log.heard();
    let (error, source) = &heard.errors[0];
    assert_eq!(source, "n");
    assert!(error.matches(class), "{error:?}");
    for word in words {
        assert!(error.message().contains(word), "{word}: {error}");
    }
    assert!(!error.message().contains('\n'), "one line: {error}");
    assert_eq!(*passed.lock().unwrap(), []);
}

#[test]
fn no_such_folder() {
    use gst::ResourceError::NotFound;
    refused(
        Path::new("/no/such/folder"),
        NotFound,
        &["/no/such/folder", "Set model to"],
    );
    let file = reference().join("config.json");
    refused(&file, NotFound, &["config.json", "folder"]);
}

#[test]
fn missing_files() {
    use gst::ResourceError::NotFound;
    for name in [
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "preprocessor_config.json",
    ] {
        let folder = broken(|folder| fs::remove_file(folder.join(name)).unwrap());
        let path = folder.path().join(name);
        refused(
            folder.path(),
            NotFound,
            &[path.to_str().unwrap(), "download"],
        );
    }
}

#[test]
fn truncated_weights() {
    let folder = broken(|folder| {
        let weights = folder.join("model.safetensors");
        let bytes = fs::read(&weights).unwrap();
        fs::write(weights, &bytes[..bytes.len() / 2]).unwrap();
    });
    refused(
        folder.path(),
        gst::ResourceError::OpenRead,
        &["model.safetensors", "ownload"],
    );
}

#[test]
fn unknown_architecture() {
    let folder = broken(|folder| {
        let config = folder.join("config.json");
        let json = fs::read_to_string(&config).unwrap();
        assert!(json.contains("idefics3"));
        fs::write(config, json.replace("idefics3", "gpt9")).unwrap();
    });
    let words = ["config.json", "gpt9", "SmolVLM"];
    refused(folder.path(), gst::ResourceError::OpenRead, &words);
}

/// Attention takes memory with the fourth power of the side: that of 8192 pixels would be a terabyte.
#[test]
fn a_side_that_no_memory_is_enough_for() {
    let folder = broken(|folder| {
        let config = folder.join("preprocessor_config.json");
        let mut json: serde_json::Value =
            serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        json["max_image_size"]["longest_edge"] = 8192.into();
        fs::write(config, json.to_string()).unwrap();
    });
    let words = ["preprocessor_config.json", "max_image_size", "8192"];
    refused(folder.path(), gst::ResourceError::OpenRead, &words);
}

#[test]
fn an_index_does_not_lead_out_of_the_folder() {
    for shard in ["../x", "/etc/passwd", "a/b", "..", ".", ""] {
        let folder = broken(|folder| {
            fs::remove_file(folder.join("model.safetensors")).unwrap();
            let index = serde_json::json!({"weight_map": {"lm_head.weight": shard}});
            let path = folder.join("model.safetensors.index.json");
            fs::write(path, index.to_string()).unwrap();
        });
        let named = format!("names `{shard}`");
        let words = ["model.safetensors.index.json", &named, "Do not use"];
        refused(folder.path(), gst::ResourceError::OpenRead, &words);
    }
}

/// What only loading can find out comes as an ERROR too, and ends the PROGRESS.
#[test]
fn a_tokenizer_that_is_none() {
    let folder = broken(|folder| fs::write(folder.join("tokenizer.json"), "{}").unwrap());
    let heard = run(Some(folder.path()), |_| ());
    let (error, source) = &heard.errors[0];
    assert_eq!(source, "n");
    assert!(error.matches(gst::ResourceError::OpenRead), "{error:?}");
    assert!(error.message().contains("tokenizer.json"), "{error}");
    assert_eq!(heard.progress.last().unwrap().0, gst::ProgressType::Error);
}
