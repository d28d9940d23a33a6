//! The memory that is estimated for a model's weights is what the model holds. This file has one test, because memory is
//! counted for the whole process.

#![cfg(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64"))]
#![expect(unsafe_code, reason = "an allocator and system calls that count")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    collections::HashMap,
    ffi::{c_int, c_void},
    fs,
    ops::ControlFlow,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use candle_core::{DType as Type, Device, Tensor, safetensors};
use serde_json::json;
use vlmnarrate_engine::{DType, DeviceKind, Quantization};
use vlmnarrate_smolvlm::{Checkpoint, LoadOptions, Model, Source};

static USED: AtomicUsize = AtomicUsize::new(0);

struct Counted;

#[global_allocator]
static MEMORY: Counted = Counted;

// SAFETY: it hands on what the system gives.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        USED.fetch_add(layout.size(), Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(memory, layout) }
    }
}

/// Replaces the C library's `mmap` to count packed weights, which are mapped. The allocator doesn't call it.
///
/// # Safety
///
/// As for `mmap`.
#[unsafe(no_mangle)]
unsafe extern "C" fn mmap64(
    address: *mut c_void,
    len: usize,
    protection: c_int,
    flags: c_int,
    file: c_int,
    offset: i64,
) -> *mut c_void {
    if flags & libc::MAP_ANONYMOUS != 0 {
        USED.fetch_add(len, Relaxed);
    }
    // SAFETY: the caller's.
    unsafe {
        libc::syscall(
            libc::SYS_mmap,
            address,
            len,
            protection,
            flags,
            file,
            offset,
        ) as _
    }
}

/// As above; nothing else that is mapped here goes before the process does.
///
/// # Safety
///
/// As for `munmap`.
#[unsafe(no_mangle)]
unsafe extern "C" fn munmap(address: *mut c_void, len: usize) -> c_int {
    USED.fetch_sub(len, Relaxed);
    // SAFETY: the caller's.
    unsafe { libc::syscall(libc::SYS_munmap, address, len) as _ }
}

const VOCABULARY: usize = 8192;
const HIDDEN: usize = 512;
const VISION: usize = 256;
const LAYERS: usize = 3;

/// A random model with this `intermediate_size`, with an `lm_head` or with tied embeddings.
fn checkpoint(folder: &Path, inner: usize, is_tied: bool, dtype: Type) -> Checkpoint {
    let small = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/gguf/SmolVLM-Small");
    for file in fs::read_dir(&small).unwrap().map(Result::unwrap) {
        fs::copy(file.path(), folder.join(file.file_name())).unwrap();
    }
    let mut config: serde_json::Value =
        serde_json::from_slice(&fs::read(small.join("config.json")).unwrap()).unwrap();
    config["tie_word_embeddings"] = is_tied.into();
    for (part, values) in [
        (
            "text_config",
            json!({"hidden_size": HIDDEN, "intermediate_size": inner, "head_dim": HIDDEN / 4,
                   "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "tie_word_embeddings": is_tied}),
        ),
        (
            "vision_config",
            json!({"hidden_size": VISION, "intermediate_size": inner, "num_hidden_layers": LAYERS}),
        ),
    ] {
        for (key, value) in values.as_object().unwrap() {
            config[part][key] = value.clone();
        }
    }
    fs::write(folder.join("config.json"), config.to_string()).unwrap();

    let mut tensors = HashMap::new();
    let mut add = |name: String, shape: &[usize]| {
        let tensor = Tensor::randn(0f32, 0.02, shape, &Device::Cpu).unwrap();
        tensors.insert(name, tensor.to_dtype(dtype).unwrap());
    };
    let text = "model.text_model";
    add(format!("{text}.embed_tokens.weight"), &[VOCABULARY, HIDDEN]);
    add(format!("{text}.norm.weight"), &[HIDDEN]);
    if !is_tied {
        add("lm_head.weight".into(), &[VOCABULARY, HIDDEN]);
    }
    let vision = "model.vision_model";
    add(format!("{vision}.post_layernorm.weight"), &[VISION]);
    add(format!("{vision}.post_layernorm.bias"), &[VISION]);
    let embeddings = format!("{vision}.embeddings");
    add(
        format!("{embeddings}.patch_embedding.weight"),
        &[VISION, 3, 16, 16],
    );
    add(format!("{embeddings}.patch_embedding.bias"), &[VISION]);
    add(
        format!("{embeddings}.position_embedding.weight"),
        &[64, VISION],
    );
    let connector = "model.connector.modality_projection.proj.weight";
    add(connector.into(), &[HIDDEN, 16 * VISION]);
    for layer in 0..LAYERS {
        let text = format!("{text}.layers.{layer}");
        for (name, rows, columns) in [
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.k_proj", HIDDEN / 2, HIDDEN),
            ("self_attn.v_proj", HIDDEN / 2, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate_proj", inner, HIDDEN),
            ("mlp.up_proj", inner, HIDDEN),
            ("mlp.down_proj", HIDDEN, inner),
        ] {
            add(format!("{text}.{name}.weight"), &[rows, columns]);
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            add(format!("{text}.{name}.weight"), &[HIDDEN]);
        }
        let vision = format!("{vision}.encoder.layers.{layer}");
        for (name, rows, columns) in [
            ("self_attn.q_proj", VISION, VISION),
            ("self_attn.k_proj", VISION, VISION),
            ("self_attn.v_proj", VISION, VISION),
            ("self_attn.out_proj", VISION, VISION),
            ("mlp.fc1", inner, VISION),
            ("mlp.fc2", VISION, inner),
        ] {
            add(format!("{vision}.{name}.weight"), &[rows, columns]);
            add(format!("{vision}.{name}.bias"), &[rows]);
        }
        for name in ["layer_norm1", "layer_norm2"] {
            add(format!("{vision}.{name}.weight"), &[VISION]);
            add(format!("{vision}.{name}.bias"), &[VISION]);
        }
    }
    // A tensor that the family doesn't have is not loaded.
    add("ballast.weight".into(), &[1024, 1024]);
    safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
    let source = Source::parse(Some(folder.as_os_str()), None).unwrap();
    Checkpoint::open(&source).unwrap()
}

/// Estimated and held bytes of a model.
fn sizes(checkpoint: &Checkpoint, dtype: DType, quantization: Quantization) -> [usize; 2] {
    let mut options = LoadOptions::default();
    options.device = DeviceKind::Cpu;
    options.dtype = dtype;
    options.quantization = quantization;
    options.threads = 1;
    let counted = options.memory(checkpoint).unwrap();
    let before = USED.load(Relaxed);
    let go_on = &mut |_, _| ControlFlow::Continue(());
    let model = Model::load(checkpoint, &options, go_on).unwrap();
    let held = USED.load(Relaxed) - before;
    drop(model);
    [counted as usize, held]
}

#[test]
fn a_model_holds_as_much_as_was_counted() {
    let folder = tempfile::tempdir().unwrap();
    for (inner, is_tied, stored) in [
        (1024, false, Type::BF16),
        // Rows that are not a whole number of blocks.
        (1040, true, Type::F32),
    ] {
        let checkpoint = checkpoint(folder.path(), inner, is_tied, stored);
        // Warm up what stays allocated.
        sizes(&checkpoint, DType::F32, Quantization::None);
        let mut all = Vec::new();
        for (dtype, quantization) in [
            (DType::F32, Quantization::None),
            (DType::Bf16, Quantization::None),
            (DType::F16, Quantization::None),
            (DType::Auto, Quantization::Q8_0),
            (DType::Auto, Quantization::Q4_0),
        ] {
            let [counted, held] = sizes(&checkpoint, dtype, quantization);
            println!("{inner} {dtype:?} {quantization:?}: counted {counted}, held {held}");
            // The tokenizer and the template are in it too.
            assert!(
                held >= counted && held - counted < counted / 100,
                "{counted} {held}"
            );
            all.push(counted);
        }
        let [f32, bf16, f16, q8_0, q4_0] = all[..] else {
            unreachable!()
        };
        assert_eq!((bf16, f16), (f32 / 2, f32 / 2));
        assert!(q8_0 < f32 && q4_0 < q8_0);
    }
}
