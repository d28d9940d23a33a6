//! GGUF files of llama.cpp's converter against the checkpoint that they were made from.
//!
//! `tools/reference/gguf_files.py` wrote `tests/data/gguf`; what is wrong with a file here is done to one of
//! those, with candle's reader and writer of the format.

use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use crate::common::gguf::{
    Gguf, PROJECTOR, PROJECTOR_Q8_0, TEXT, TEXT_Q8_0, changed, data, folder,
};
use crate::common::{Fake, Pipeline};
use candle_core::{
    DType as Type, Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file::Value},
};
use gstvlmnarrate::SmolVlmLoader;
use gstvlmnarrate::engine::{DType, Event, Picture, Quantization};
use tempfile::TempDir;
use tokenizers::Tokenizer;
use vlmnarrate_smolvlm::{
    Checkpoint, Content, Error, LoadOptions, Model, Prompter, Source, Span, question,
};

fn f32(quantization: Quantization) -> LoadOptions {
    let mut options = LoadOptions::default();
    options.dtype = DType::F32;
    options.quantization = quantization;
    options.threads = 1;
    options
}

fn load(model: &Path, options: LoadOptions) -> Result<Model, Error> {
    let source = Source::parse(Some(model.as_os_str()), None)?;
    Model::load(&Checkpoint::open(&source)?, &options, &mut |_, _| {
        ControlFlow::Continue(())
    })
}

/// The safetensors that the files were made from.
fn checkpoint() -> PathBuf {
    data("SmolVLM-Small")
}

fn go_on(_: Event<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

const STEPS: usize = 12;

/// Tokens and the logits that chose each, of a picture with something in it.
struct Answer {
    tokens: Vec<u32>,
    logits: Vec<Vec<f32>>,
}

/// What a model says, or would have said next had it said `given` until then.
fn answer(model: &Model, given: Option<&[u32]>) -> Answer {
    let side = model.preprocessor().max_image_size.longest_edge as u32;
    let wave = |i: u32| (128.0 + 100.0 * (f64::from(i * i) / 900.0).sin()) as u8;
    let rgb = (0..side * side).flat_map(|i| [i % side, i / side, i % side + i / side].map(wave));
    let picture = Picture::new(side, side, rgb.collect()).unwrap();
    let features = model.features(&picture, &mut go_on).unwrap();
    let messages = question(None, vec![Content::Image], "Can you describe this image?");
    let spans = [model.span(&picture, (0, 0))];
    let prompt = model.prompter().encode(&messages, &spans).unwrap();
    let mut session = model.session();
    let mut logits = model
        .prefill(&mut session, &prompt, &[features], STEPS, &mut go_on)
        .unwrap();
    let mut answer = Answer {
        tokens: vec![],
        logits: vec![],
    };
    for step in 0..STEPS {
        answer.logits.push(logits.to_vec1().unwrap());
        let best = logits.argmax(0).unwrap().to_scalar().unwrap();
        answer.tokens.push(best);
        let token = given.map_or(best, |given| given[step]);
        logits = model.step(&mut session, token, &mut go_on).unwrap();
    }
    answer
}

impl Answer {
    /// Largest relative L2 distance of the logits from those of `reference`.
    fn error(&self, reference: &Self) -> f64 {
        let steps = self.logits.iter().zip(&reference.logits);
        let errors = steps.map(|(ours, theirs)| {
            let squares = |values: &mut dyn Iterator<Item = f32>| {
                values.map(|v| f64::from(v).powi(2)).sum::<f64>()
            };
            let off = squares(&mut ours.iter().zip(theirs).map(|(a, b)| a - b));
            (off / squares(&mut theirs.iter().copied())).sqrt()
        });
        errors.fold(0.0, f64::max)
    }

    /// By how much the first token led the second, at each step.
    fn margins(&self) -> Vec<f32> {
        let margin = |logits: &Vec<f32>| {
            let mut sorted = logits.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            sorted[0] - sorted[1]
        };
        self.logits.iter().map(margin).collect()
    }

    /// Largest difference of any logit from that of `reference`.
    fn most(&self, reference: &Self) -> f32 {
        let pairs = self
            .logits
            .iter()
            .flatten()
            .zip(reference.logits.iter().flatten());
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    /// Whether each token that `reference` chose by more than our logits are off is ours too.
    #[track_caller]
    fn agrees(&self, reference: &Self) {
        let bound = 2.0 * self.most(reference);
        let decided = reference.margins().iter().filter(|m| **m > bound).count();
        println!("{decided} of {STEPS} tokens are decided");
        assert!(
            decided > STEPS / 2,
            "{decided} of {:?}",
            reference.margins()
        );
        for (step, margin) in reference.margins().into_iter().enumerate() {
            if margin > bound {
                assert_eq!(self.tokens[step], reference.tokens[step], "step {step}");
            }
        }
    }
}

#[test]
fn dense_files_are_the_checkpoint_to_the_bit() {
    let reference = answer(&load(&checkpoint(), f32(Quantization::None)).unwrap(), None);
    let model = load(&data(TEXT), f32(Quantization::None)).unwrap();
    let ours = answer(&model, None);
    assert_eq!(ours.tokens, reference.tokens);
    let error = ours.error(&reference);
    println!("bf16: {error:e}");
    assert!(error <= 1e-6, "{error:e}");
    // Quantized on the way, both are the same again.
    let reference = load(&checkpoint(), f32(Quantization::Q8_0)).unwrap();
    let ours = load(&data(TEXT), f32(Quantization::Q8_0)).unwrap();
    let reference = answer(&reference, None);
    let ours = answer(&ours, None);
    assert_eq!(ours.tokens, reference.tokens);
    assert!(ours.error(&reference) <= 1e-6);
}

#[test]
fn quantized_files_are_near_it() {
    let reference = answer(&load(&checkpoint(), f32(Quantization::None)).unwrap(), None);
    let same_blocks = load(&checkpoint(), f32(Quantization::Q8_0)).unwrap();
    let same_blocks = answer(&same_blocks, Some(&reference.tokens));
    // The blocks stay whatever is asked for.
    let mut answers = Vec::new();
    for quantization in [Quantization::None, Quantization::Q8_0, Quantization::Q4_0] {
        let model = load(&data(TEXT_Q8_0), f32(quantization)).unwrap();
        answers.push(answer(&model, Some(&reference.tokens)));
    }
    let ours = &answers[0];
    for other in &answers[1..] {
        assert_eq!(ours.logits, other.logits);
    }
    let (error, usual) = (ours.error(&reference), same_blocks.error(&reference));
    let apart = ours.error(&same_blocks);
    println!("q8_0: {error:.2e}, ours {usual:.2e}, apart {apart:.2e}");
    // Rows that are looked up are blocks in the file alone.
    assert!(error < 2.0 * usual && error < 0.03, "{error:e} {usual:e}");
    ours.agrees(&reference);
}

#[test]
fn a_projector_may_be_of_another_type() {
    let folder = folder(&[TEXT_Q8_0, "mmproj-SmolVLM-Small-f16.gguf"]);
    let model = load(folder.path(), f32(Quantization::None)).unwrap();
    assert_eq!(model.name(), "SmolVLM-Small-Q8_0");
    let reference = answer(&load(&checkpoint(), f32(Quantization::None)).unwrap(), None);
    let error = answer(&model, Some(&reference.tokens)).error(&reference);
    println!("q8_0 with f16: {error:.2e}");
    assert!(error < 0.03, "{error:e}");
}

#[test]
fn other_blocks_of_32_are_near_it_too() {
    let reference = answer(&load(&checkpoint(), f32(Quantization::None)).unwrap(), None);
    for (dtype, bound) in [
        (GgmlDType::Q8_0, 0.03),
        (GgmlDType::Q5_1, 0.15),
        (GgmlDType::Q5_0, 0.15),
        (GgmlDType::Q4_1, 0.2),
        (GgmlDType::Q4_0, 0.2),
    ] {
        let folder = changed(|text, _| {
            for (name, tensor) in &mut text.tensors {
                if !name.contains("norm") {
                    let dense = tensor.dequantize(&Device::Cpu).unwrap();
                    *tensor = QTensor::quantize(&dense, dtype).unwrap();
                }
            }
        });
        let model = load(folder.path(), f32(Quantization::None)).unwrap();
        let error = answer(&model, Some(&reference.tokens)).error(&reference);
        println!("{dtype:?}: {error:.2e}");
        assert!(error < bound, "{dtype:?}: {error:e}");
    }
}

/// What older and other converters do differently, and what they leave out.
#[test]
fn variants_are_the_same() {
    let same = load(&data(TEXT), f32(Quantization::None)).unwrap();
    let same = answer(&same, None);
    let check = |what: &str, folder: TempDir| {
        let model = load(folder.path(), f32(Quantization::None)).unwrap();
        assert_eq!(model.preprocessor().size.longest_edge, 512, "{what}");
        assert_eq!(answer(&model, None).logits, same.logits, "{what}");
    };
    check("written again", changed(|_, _| ()));
    check(
        "the encoder's MLP the other way round",
        changed(|_, projector| {
            for layer in 0..2 {
                for kind in ["weight", "bias"] {
                    let [up, down] =
                        ["up", "down"].map(|w| format!("v.blk.{layer}.ffn_{w}.{kind}"));
                    projector.rename(&up, "aside");
                    projector.rename(&down, &up);
                    projector.rename("aside", &down);
                }
            }
        }),
    );
    check(
        "without what the family has in common",
        changed(|text, projector| {
            for key in [
                "tokenizer.chat_template",
                "llama.attention.key_length",
                "llama.rope.dimension_count",
                "llama.vocab_size",
            ] {
                text.metadata.remove(key).unwrap();
            }
            for key in [
                "clip.vision.preproc_image_size",
                "clip.vision.image_mean",
                "clip.vision.attention.layer_norm_epsilon",
            ] {
                projector.metadata.remove(key).unwrap();
            }
        }),
    );
    check(
        "the epsilon that is written where none was found",
        changed(|_, projector| {
            let key = "clip.vision.attention.layer_norm_epsilon";
            projector.set(key, Value::F32(1e-5));
        }),
    );
}

/// Without `output.weight` the head is the table, dense or in blocks.
#[test]
fn the_head_may_be_the_table() {
    for dtype in [GgmlDType::BF16, GgmlDType::Q8_0] {
        let logits = [false, true].map(|tied| {
            let folder = changed(|text, _| {
                let dense = text.tensors["token_embd.weight"].dequantize(&Device::Cpu);
                let table = QTensor::quantize(dense.as_ref().unwrap(), dtype).unwrap();
                let head = QTensor::quantize(dense.as_ref().unwrap(), dtype).unwrap();
                text.tensors.insert("token_embd.weight".into(), table);
                match tied {
                    true => text.tensors.remove("output.weight"),
                    false => text.tensors.insert("output.weight".into(), head),
                };
            });
            let model = load(folder.path(), f32(Quantization::None)).unwrap();
            answer(&model, None).logits
        });
        assert_eq!(logits[0], logits[1], "{dtype:?}");
    }
}

const TEXTS: [&str; 9] = [
    "Can you describe this image?",
    "In 2024, 3.14159 times 1000000 is   what?\n\n\tNext",
    "🦙🚀 naïve façade — 日本語 😶\u{200d}🌫️ Ünïcödé",
    "<end_of_utterance><|im_start|> <fake_token_around_image><row_1_col_2> <|endoftext|>",
    "I've 'told' you'RE  it''s 1st   ",
    "",
    " leading and trailing ",
    // Where digits are not parted first, the spaces are.
    "a  3 and   42 \t7  apples",
    "def f(x):\n    return x**2  # done\r\n",
];

/// Both give the same ids, and the same text for them.
fn is_same_tokenizer(ours: &Prompter, reference: &Prompter) {
    let span = |rows, cols| Span {
        grid: (rows, cols),
        tokens: 4,
    };
    for text in TEXTS {
        for system in [None, Some("You are a helpful assistant.")] {
            for spans in [&[span(0, 0)][..], &[span(2, 3), span(0, 0)]] {
                let messages = question(system, vec![Content::Image; spans.len()], text);
                let [ours_, theirs] =
                    [ours, reference].map(|prompter| prompter.encode(&messages, spans).unwrap());
                assert_eq!(ours_, theirs, "{text:?}");
                let decode = |prompter: &Prompter| prompter.decode(&theirs.ids).unwrap();
                assert_eq!(decode(ours), decode(reference));
            }
        }
    }
}

#[test]
fn prompts_are_the_same() {
    let models = [data(TEXT), data(TEXT_Q8_0), checkpoint()];
    let [dense, blocks, reference] =
        models.map(|model| load(&model, LoadOptions::default()).unwrap());
    is_same_tokenizer(dense.prompter(), reference.prompter());
    is_same_tokenizer(blocks.prompter(), reference.prompter());
    for id in 0..500 {
        let decode = |model: &Model| model.prompter().decode(&[id]).unwrap();
        assert_eq!(decode(&dense), decode(&reference), "{id}");
    }
    assert!(dense.prompter().decode(&[500]).unwrap().is_empty());
}

/// The published vocabulary, as `get_vocab_base` of the converter writes it.
#[test]
fn the_whole_vocabulary_is_the_same() {
    let hub = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/hub/SmolVLM-256M-Instruct");
    let json = fs::read(hub.join("tokenizer.json")).unwrap();
    let tokenizer = Tokenizer::from_bytes(&json).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let size = tokenizer.get_vocab_size(true);
    assert_eq!(size, 49_280);
    let special: Vec<_> = json["added_tokens"].as_array().unwrap().iter().collect();
    let special: Vec<_> = special.iter().map(|t| t["id"].as_u64().unwrap()).collect();
    let strings =
        |strings: Vec<String>| Value::Array(strings.into_iter().map(Value::String).collect());
    let tokens = (0..size as u32).map(|id| tokenizer.id_to_token(id).unwrap());
    let kind = |id| if special.contains(&id) { 3 } else { 1 };
    let kinds = (0..size as u64).map(|id| Value::I32(kind(id)));
    let merges = json["model"]["merges"].as_array().unwrap().iter();
    let merges = merges.map(|merge| {
        format!(
            "{} {}",
            merge[0].as_str().unwrap(),
            merge[1].as_str().unwrap()
        )
    });
    let folder = changed(|text, _| {
        text.set("tokenizer.ggml.tokens", strings(tokens.collect()));
        text.set("tokenizer.ggml.token_type", Value::Array(kinds.collect()));
        text.set("tokenizer.ggml.merges", strings(merges.collect()));
        for name in ["token_embd.weight", "output.weight"] {
            let rows = Tensor::zeros((size, 64), Type::F32, &Device::Cpu).unwrap();
            let rows = QTensor::quantize(&rows, GgmlDType::Q8_0).unwrap();
            text.tensors.insert(name.into(), rows);
        }
    });
    let model = load(folder.path(), LoadOptions::default()).unwrap();
    let template = fs::read_to_string(hub.join("chat_template.jinja")).unwrap();
    is_same_tokenizer(
        model.prompter(),
        &Prompter::new(template, tokenizer).unwrap(),
    );
}

/// One line that names the file and what to do.
#[track_caller]
fn refused(model: &Path, words: &[&str]) {
    let error = load(model, LoadOptions::default()).unwrap_err().to_string();
    println!("{error}");
    for word in words {
        assert!(error.contains(word), "{word}: {error}");
    }
    assert!(!error.contains('\n'), "{error}");
}

#[test]
fn what_can_not_be_run_is_named() {
    let of =
        |change: fn(&mut Gguf, &mut Gguf), words: &[&str]| refused(changed(change).path(), words);
    of(
        |text, _| text.set("general.architecture", Value::String("qwen2".into())),
        &[TEXT, "`qwen2`, not SmolVLM's `llama`", "vlmnarrate runs"],
    );
    of(
        |_, projector| projector.set("clip.projector_type", Value::String("gemma3".into())),
        &[PROJECTOR, "`gemma3`", "idefics3"],
    );
    of(
        |text, _| text.set("tokenizer.ggml.pre", Value::String("llama-bpe".into())),
        &[TEXT, "tokenizer", "llama-bpe"],
    );
    of(
        |text, _| text.set("llama.rope.scaling.type", Value::String("yarn".into())),
        &[TEXT, "yarn"],
    );
    of(
        |text, _| text.set("llama.rope.dimension_count", Value::U32(8)),
        &[TEXT, "rotates 8 of the 16"],
    );
    of(
        |text, _| text.set("llama.block_count", Value::U32(1_000_000_000)),
        &[TEXT, "num_hidden_layers"],
    );
    of(
        |text, _| {
            text.set(
                "llama.attention.head_count",
                Value::Array(vec![Value::U32(4)]),
            )
        },
        &[TEXT, "head_count", "not an integer"],
    );
    of(
        |text, _| drop(text.metadata.remove("llama.context_length")),
        &[TEXT, "lacks `llama.context_length`"],
    );
    of(
        |text, _| text.set("split.count", Value::U16(2)),
        &[TEXT, "one of 2 shards"],
    );
    of(
        |text, _| text.rename("output.weight", "rope_freqs.weight"),
        &[TEXT, "rope_freqs.weight"],
    );
    of(
        |text, _| drop(text.tensors.remove("blk.1.attn_q.weight")),
        &[TEXT, "layers.1.self_attn.q_proj.weight", "missing"],
    );
    of(
        |_, projector| drop(projector.tensors.remove("v.post_ln.bias")),
        &[PROJECTOR, "post_layernorm.bias", "missing"],
    );
    of(
        |text, _| text.set("llama.attention.head_count_kv", Value::U32(1)),
        &[TEXT, "k_proj"],
    );
    of(
        |text, _| {
            text.set(
                "tokenizer.ggml.merges",
                Value::Array(vec![Value::String("ab".into())]),
            );
        },
        &[TEXT, "merge `ab`"],
    );
    of(
        |text, _| {
            let tokens = text.metadata.get_mut("tokenizer.ggml.tokens");
            if let Some(Value::Array(tokens)) = tokens {
                tokens[1] = tokens[0].clone();
            }
        },
        &[TEXT, "a token twice"],
    );
    of(
        |text, _| {
            // Rows of a head, which change places, and less than a byte each.
            let bias = Tensor::zeros(64, Type::F32, &Device::Cpu).unwrap();
            let bias = QTensor::quantize(&bias, GgmlDType::Q4_0).unwrap();
            text.tensors.insert("blk.0.attn_q.bias".into(), bias);
        },
        &[TEXT, "q_proj.bias` as Q4_0"],
    );
    of(
        |_, projector| projector.set("clip.vision.image_size", Value::U32(8192)),
        &[PROJECTOR, "longest_edge` is 8192"],
    );
}

#[test]
fn broken_files_are_named() {
    for (file, other) in [(TEXT, PROJECTOR), (PROJECTOR, TEXT)] {
        let folder = folder(&[other]);
        let path = folder.path().join(file);
        let whole = fs::read(data(file)).unwrap();
        let put = |bytes: &[u8], words: &[&str]| {
            fs::write(&path, bytes).unwrap();
            refused(folder.path(), &[words, &[path.to_str().unwrap()]].concat());
        };
        put(
            &whole[..whole.len() - 1],
            &["cut short", "Download it again"],
        );
        put(&whole[..1000], &["cut short", "Download it again"]);
        put(b"", &["not GGUF"]);
        put(b"version https://git-lfs.github.com/spec/v1", &["not GGUF"]);
        let mut old = whole.clone();
        old[4] = 1;
        put(&old, &["version 1"]);
    }
}

/// Products with blocks are made in f32.
#[test]
fn blocks_are_computed_with_in_f32() {
    let mut bf16 = LoadOptions::default();
    bf16.dtype = DType::Bf16;
    let error = load(&data(TEXT_Q8_0), bf16).unwrap_err().to_string();
    assert!(error.starts_with("dtype: "), "{error}");
    load(&data(TEXT), bf16).unwrap();
}

#[test]
fn progress_goes_to_the_end_and_a_break_ends_it() {
    let source = Source::parse(Some(data(TEXT_Q8_0).as_os_str()), None).unwrap();
    let checkpoint = Checkpoint::open(&source).unwrap();
    let mut heard = Vec::new();
    let mut report = |done, total| {
        heard.push((done, total));
        ControlFlow::Continue(())
    };
    Model::load(&checkpoint, &LoadOptions::default(), &mut report).unwrap();
    let sizes = [TEXT_Q8_0, PROJECTOR_Q8_0].map(|file| fs::metadata(data(file)).unwrap().len());
    let (done, total) = *heard.last().unwrap();
    assert_eq!(done, total);
    assert!(total > sizes.iter().sum::<u64>() * 9 / 10);
    assert!(heard.is_sorted() && heard.len() == 59);
    let cancelled = Model::load(&checkpoint, &LoadOptions::default(), &mut |_, _| {
        ControlFlow::Break(())
    });
    assert!(matches!(cancelled, Err(Error::Cancelled)));
}

#[test]
fn a_file_is_the_same_until_it_is_replaced() {
    let folder = folder(&[TEXT, PROJECTOR]);
    let fingerprint = |model: &Path| {
        let source = Source::parse(Some(model.as_os_str()), None).unwrap();
        Checkpoint::open(&source).unwrap().fingerprint().clone()
    };
    let first = fingerprint(folder.path());
    assert_eq!(first, fingerprint(&folder.path().join(TEXT)));
    for (file, by) in [(PROJECTOR, PROJECTOR_Q8_0), (TEXT, TEXT_Q8_0)] {
        let before = fingerprint(folder.path());
        fs::copy(data(by), folder.path().join(file)).unwrap();
        assert_ne!(before, fingerprint(folder.path()));
    }
}

#[test]
fn a_file_narrates() {
    let describe = |model: &Path| {
        let pipeline = Pipeline::new(
            "videotestsrc num-buffers=2 ! video/x-raw,width=64,height=48,framerate=1/1
             ! vlmnarrate name=n max-tokens=5 dtype=f32 ! fakesink",
            &Fake::new(),
        );
        pipeline.narrator.set_engine_loader(SmolVlmLoader);
        gst::prelude::ObjectExt::set_property(&pipeline.narrator, "model", model.to_str());
        pipeline.run_to_eos()
    };
    let heard = describe(&data(TEXT));
    assert_eq!(heard.captions[0].model, "SmolVLM-Small-BF16");
    assert_eq!(heard.texts(), describe(&checkpoint()).texts());
}
