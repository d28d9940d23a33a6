//! A model in which one file is whatever the fuzzer makes of it: opened, loaded and, if it still stands, asked
//! for a few tokens. An error is fine; a panic, a hang or a gigabyte is not. Each function says whether there was
//! an answer.
//!
//! `crates/smolvlm/tests/hostile.rs` feeds the same functions the corpus.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs,
    ops::ControlFlow,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use candle_core::quantized::gguf_file;
use tempfile::TempDir;
use vlmnarrate_engine::{Picture, Quantization, Request, Sampling};
use vlmnarrate_smolvlm::{Checkpoint, LoadOptions, Model, Source};

/// The first byte chooses the file, the others are what is in it.
pub fn config(bytes: &[u8]) -> bool {
    const NAMES: [&str; 5] = [
        "config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "generation_config.json",
        "chat_template.jinja",
    ];
    let Some((choice, bytes)) = choice(bytes) else {
        return false;
    };
    let name = NAMES[choice % NAMES.len()];
    let splitting = name.contains("processor");
    with_file(name, bytes, |folder| {
        run(folder, bytes.len(), Quantization::None, splitting)
    })
}

pub fn tokenizer(bytes: &[u8]) -> bool {
    with_file("tokenizer.json", bytes, |folder| {
        run(folder, bytes.len(), Quantization::None, false)
    })
}

/// The first byte chooses the index, or what follows the header and how it is loaded; the others are the
/// header without its length.
pub fn safetensors(bytes: &[u8]) -> bool {
    static DATA: OnceLock<Vec<u8>> = OnceLock::new();
    let data = DATA.get_or_init(|| {
        let file = fs::read(data().join("SmolVLM-Small/model.safetensors")).expect("weights");
        let (len, rest) = file.split_first_chunk().expect("a length");
        rest[u64::from_le_bytes(*len) as usize..].into()
    });
    let Some((choice, bytes)) = choice(bytes) else {
        return false;
    };
    if choice == 0 {
        return with_file("model.safetensors.index.json", bytes, |folder| {
            run(folder, bytes.len(), Quantization::None, false)
        });
    }
    let mut file = (bytes.len() as u64).to_le_bytes().to_vec();
    file.extend(bytes);
    match choice % 4 {
        // bf16: not a number, infinite.
        2 => file.resize(file.len() + data.len(), 0xff),
        3 => file.extend([0x80, 0x7f].repeat(data.len() / 2)),
        _ => file.extend(data),
    }
    let quantization = [Quantization::None, Quantization::Q8_0, Quantization::Q4_0][choice / 4 % 3];
    with_file("model.safetensors", &file, |folder| {
        run(folder, bytes.len(), quantization, false)
    })
}

/// The first byte chooses the file, the others are its header.
pub fn gguf(bytes: &[u8]) -> bool {
    const NAMES: [&str; 2] = ["SmolVLM-Small-Q8_0.gguf", "mmproj-SmolVLM-Small-Q8_0.gguf"];
    static DATA: OnceLock<[Vec<u8>; 2]> = OnceLock::new();
    let data = DATA.get_or_init(|| {
        NAMES.map(|name| {
            let path = data().join(name);
            let mut file = fs::File::open(&path).expect("a file");
            let content = gguf_file::Content::read(&mut file).expect("GGUF");
            fs::read(path).expect("a file")[content.tensor_data_offset as usize..].into()
        })
    });
    let Some((choice, bytes)) = choice(bytes) else {
        return false;
    };
    let mut file = bytes.to_vec();
    // As the format aligns it, where the header doesn't say otherwise.
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend(&data[choice % 2]);
    with_file(NAMES[choice % 2], &file, |folder| {
        run(folder, bytes.len(), Quantization::None, false)
    })
}

/// A digit, so that the corpus can be read.
fn choice(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let (first, rest) = bytes.split_first()?;
    Some((usize::from(first.wrapping_sub(b'0')), rest))
}

fn data() -> PathBuf {
    let mut folders = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    folders
        .find_map(|folder| folder.join("tests/data/gguf").canonicalize().ok())
        .expect("the references")
}

/// A model in which the file that is `name`d holds `bytes`.
fn with_file(name: &'static str, bytes: &[u8], run: impl FnOnce(&Path) -> bool) -> bool {
    thread_local! {
        static FOLDERS: RefCell<BTreeMap<&'static str, TempDir>> = RefCell::default();
    }
    FOLDERS.with_borrow_mut(|folders| {
        let folder = folders.entry(name).or_insert_with(|| folder(name)).path();
        fs::write(folder.join(name), bytes).expect("room");
        run(folder)
    })
}

/// All the files of a model but the one that is `name`d, and those that go before it.
fn folder(name: &str) -> TempDir {
    // Memory, where the system has such a folder: a disk would take longer than the model.
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let folder = folder.expect("a temporary folder");
    let link = |file: PathBuf, link: &str| symlink(file, folder.path().join(link)).expect("a link");
    if name.ends_with(".gguf") {
        let other = match name.strip_prefix("mmproj-") {
            Some(text) => text.to_owned(),
            None => format!("mmproj-{name}"),
        };
        link(data().join(&other), &other);
        return folder;
    }
    for file in fs::read_dir(data().join("SmolVLM-Small")).expect("the checkpoint") {
        let file = file.expect("a file").path();
        match file
            .file_name()
            .and_then(|name| name.to_str())
            .expect("a name")
        {
            same if same == name => (),
            "preprocessor_config.json" if name == "processor_config.json" => (),
            "model.safetensors" if name.ends_with("index.json") => {
                link(file, "model-00001-of-00001.safetensors");
            }
            // One layer is as good as two, and small pictures and short prompts take no time.
            "config.json" => {
                let config = fs::read_to_string(file).expect("a configuration");
                let config = config
                    .replace(r#""num_hidden_layers": 2"#, r#""num_hidden_layers": 1"#)
                    .replace(r#"embeddings": 8192"#, r#"embeddings": 512"#);
                fs::write(folder.path().join("config.json"), config).expect("room");
            }
            "preprocessor_config.json" => {
                let config = fs::read_to_string(file).expect("a configuration");
                let config = config.replace("128", "64").replace("512", "128");
                fs::write(folder.path().join("preprocessor_config.json"), config).expect("room");
            }
            other => link(file.clone(), other),
        }
    }
    folder
}

/// `len` is that of what the fuzzer made up.
fn run(folder: &Path, len: usize, quantization: Quantization, splitting: bool) -> bool {
    let Ok(source) = Source::parse(Some(folder.as_os_str()), None) else {
        return false;
    };
    let Ok(checkpoint) = Checkpoint::open(&source) else {
        return false;
    };
    let mut options = LoadOptions::default();
    options.quantization = quantization;
    options.threads = 1;
    let Ok(model) = Model::load(&checkpoint, &options, &mut |_, _| ControlFlow::Continue(()))
    else {
        return false;
    };
    let side = checkpoint.image_size();
    let picture = |width, height| {
        let rgb = (0..3 * width * height).map(|i| i as u8).collect();
        Picture::new(width, height, rgb).expect("a whole picture")
    };
    let square = picture(side, side);
    let wide = picture(64, 48);
    let (squares, frames) = ([&square], [&wide]);
    let stop_strings = ["a".into()];
    let choices = ["yes".into(), "no".into()];
    let mut greedy = Request::new(&squares, "What is it?");
    greedy.max_tokens = 2;
    let mut sampled = greedy;
    sampled.system = Some("Be short.");
    sampled.sampling = Sampling {
        temperature: 0.7,
        top_p: 0.9,
        top_k: 20,
        min_p: 0.01,
        repetition_penalty: 1.1,
        seed: 7,
    };
    sampled.stop_strings = &stop_strings;
    let mut chosen = greedy;
    chosen.choices = &choices;
    let mut tiled = greedy;
    tiled.pictures = &frames;
    tiled.whole_frames = splitting;
    let mut without = greedy;
    without.pictures = &[];
    let mut requests = vec![&greedy, &sampled, &chosen, &without];
    if splitting {
        requests.push(&tiled);
    }
    // One a run: there will be another of another length.
    let request = requests[len % requests.len()];
    let described = model.describe(&mut model.session(), request, &mut |_| {
        ControlFlow::Continue(())
    });
    described.is_ok()
}
