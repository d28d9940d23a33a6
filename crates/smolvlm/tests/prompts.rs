//! Prompts and picture sizes of the real checkpoints against the reference's processor.
//!
//! `tests/data/hub` holds their configuration files and tokenizers; `prompts.json` beside them and
//! `sizes.json` are written by `tools/reference`.

mod reference;

use std::{fs, path::PathBuf};

use reference::{Video, messages};
use serde::Deserialize;
use serde_json::Value;
use tokenizers::Tokenizer;
use vlmnarrate_smolvlm::{Config, PreprocessorConfig, Processor, Prompter, Span};

#[derive(Deserialize)]
struct Goldens {
    prompts: Vec<Golden>,
}

#[derive(Deserialize)]
struct Golden {
    name: String,
    models: Vec<String>,
    messages: Value,
    pictures: Vec<(u32, u32)>,
    splitting: bool,
    video: Option<Video>,
    /// Runs of a token: id and count.
    ids: Vec<(u32, usize)>,
}

fn hub(file: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/hub")).join(file)
}

struct Member {
    prompter: Prompter,
    config: Config,
    processor: Processor,
}

impl Member {
    fn load(name: &str) -> Self {
        let read = |file: &str| fs::read(hub(name).join(file)).unwrap();
        // All but one share the first one's tokenizer, which is stored once.
        let own = hub(name).join("tokenizer.json");
        let shared = hub("SmolVLM-256M-Instruct/tokenizer.json");
        let tokenizer = Tokenizer::from_file(if own.exists() { own } else { shared });
        let template = String::from_utf8(read("chat_template.jinja")).unwrap();
        let preprocessor = PreprocessorConfig::from_json(&read("preprocessor_config.json"));
        Self {
            prompter: Prompter::new(template, tokenizer.unwrap()).unwrap(),
            config: Config::from_json(&read("config.json")).unwrap(),
            processor: Processor::new(&preprocessor.unwrap()),
        }
    }

    fn spans(&self, golden: &Golden) -> Vec<Span> {
        let side = self.processor.side;
        let grid = |&(width, height): &(u32, u32)| {
            let (width, height) = self.processor.longest_edge_size(width, height);
            let (width, height) = self.processor.tiled_size(width, height);
            self.processor.grid(width, height)
        };
        let span = |picture| Span {
            grid: if golden.splitting {
                grid(picture)
            } else {
                (0, 0)
            },
            tokens: self.config.tokens_per_picture(side as usize),
        };
        golden.pictures.iter().map(span).collect()
    }
}

fn check(name: &str) {
    let member = Member::load(name);
    let goldens = fs::read(hub("prompts.json")).unwrap();
    let goldens: Goldens = serde_json::from_slice(&goldens).unwrap();
    let mut checked = 0;
    for golden in goldens
        .prompts
        .iter()
        .filter(|g| g.models.iter().any(|m| m == name))
    {
        let messages = messages(&golden.messages, golden.video.as_ref());
        let prompt = member
            .prompter
            .encode(&messages, &member.spans(golden))
            .unwrap();
        let runs = prompt
            .ids
            .chunk_by(|a, b| a == b)
            .map(|run| (run[0], run.len()))
            .collect::<Vec<_>>();
        assert_eq!(runs, golden.ids, "{name}: {}", golden.name);
        checked += 1;
    }
    assert!(checked > 20, "{name}: only {checked} prompts");
}

macro_rules! members {
    ($($test:ident: $name:literal),* $(,)?) => {$(
        #[test]
        fn $test() {
            check($name);
        }
    )*};
}

members! {
    smolvlm_256m: "SmolVLM-256M-Instruct",
    smolvlm_500m: "SmolVLM-500M-Instruct",
    smolvlm_2_2b: "SmolVLM-Instruct",
    smolvlm2_256m: "SmolVLM2-256M-Video-Instruct",
    smolvlm2_500m: "SmolVLM2-500M-Video-Instruct",
    smolvlm2_2_2b: "SmolVLM2-2.2B-Instruct",
}

#[test]
fn sizes_follow_the_reference() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/data/reference/sizes.json"
    );
    let sizes: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let sizes: Vec<[u32; 10]> = serde_json::from_value(sizes["sizes"].clone()).unwrap();
    assert!(sizes.len() > 100);
    for size in sizes {
        let [longest_edge, side, width, height, expected @ ..] = size;
        let processor = Processor { longest_edge, side };
        let (w1, h1) = processor.longest_edge_size(width, height);
        let (w2, h2) = processor.tiled_size(w1, h1);
        let (rows, cols) = processor.grid(w2, h2);
        assert_eq!(
            [w1, h1, w2, h2, rows as u32, cols as u32],
            expected,
            "{width}×{height}"
        );
    }
}

#[test]
fn a_marker_in_the_prompt_is_refused() {
    let member = Member::load("SmolVLM-256M-Instruct");
    let messages = vlmnarrate_smolvlm::question(None, vec![], "What is <image>?");
    let error = member
        .prompter
        .encode(&messages, &[])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("<image>") && error.contains("leave it out"),
        "{error}"
    );
}
