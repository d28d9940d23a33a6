//! A model, measured.

use std::{
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::common::{Folder, Said, send};

/// A small model with random weights.
fn small() -> String {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let model = root.join("../../tests/data/reference/smolvlm2-256m");
    model.to_str().unwrap().to_owned()
}

fn json(said: &Said) -> Value {
    assert_eq!(said.status, Some(0), "{said:?}");
    serde_json::from_str(&said.out).unwrap()
}

#[test]
fn the_demo_model_is_measured() {
    let folder = Folder::new();
    let said = folder.run(["model", "--captions", "3", "--format", "json"]);
    assert!(said.err.contains("vlmnarrate model Hugging"), "{said:?}");
    let report = json(&said);
    assert_eq!(
        ["model", "device", "dtype", "quantization"].map(|name| report[name].clone()),
        ["demo", "cpu", "f32", "q8-0"]
    );
    let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{report}"));
    assert!(number(&report["load-seconds"]) > 1e-4, "{report}");
    assert_eq!(report["download-seconds"], Value::Null);
    let before = number(&report["memory-before"]);
    let weights = number(&report["weights-memory"]);
    assert!(weights > 1e6, "{report}");
    assert!(
        number(&report["peak-memory"]) > before + weights,
        "{report}"
    );
    let rows = report["rows"].as_array().unwrap();
    let kinds: Vec<_> = rows
        .iter()
        .map(|row| (row["scene"].as_str().unwrap(), row["image-size"].as_u64()))
        .collect();
    assert_eq!(kinds, [("cut", Some(256)), ("holds", Some(256))]);
    for row in rows {
        assert_eq!(row["captions"], 3);
        for stage in ["preprocess", "prefill", "decode"] {
            let stage = &row[format!("{stage}-ms")];
            assert!(number(&stage["median"]) > 0.0, "{report}");
            assert!(number(&stage["p95"]) >= number(&stage["median"]));
        }
        assert!(number(&row["tokens-per-second"]) > 1.0, "{report}");
    }
    // Only what was there before is known.
    let vision = |row: usize| number(&rows[row]["vision-ms"]["median"]);
    assert!(vision(0) > 20.0 * vision(1), "{report}");
}

#[test]
fn a_folder_is_measured_with_the_options_of_the_element() {
    let folder = Folder::new();
    let model = small();
    let model = [
        "model",
        &model,
        "--quiet",
        "--captions=1",
        "--image-size=0,64",
    ];
    let options = ["--quantization=none", "--max-tokens=2", "--frames=2"];
    let said = folder.run([&model[..], &options, &["--format=json"]].concat());
    assert_eq!(said.err, "");
    let report = json(&said);
    assert_eq!(
        ["model", "dtype", "quantization"].map(|name| report[name].clone()),
        ["smolvlm2-256m", "f32", "none"]
    );
    let rows = report["rows"].as_array().unwrap();
    let sizes: Vec<_> = rows.iter().map(|row| row["image-size"].as_u64()).collect();
    assert_eq!(sizes, [512, 512, 64, 64].map(Some));
    assert!(rows.iter().all(|row| row["tokens"] == 2), "{report}");
    let text = folder.run([&model[..], &options].concat());
    for words in [
        "smolvlm2-256m\n",
        "\n  weights    f32\n",
        "\n  load  ",
        " MB of weights\n",
        "\n512 px, cut    median",
        "\n64 px, holds   median",
    ] {
        assert!(text.out.contains(words), "{words}: {text:?}");
    }
}

#[test]
fn what_can_not_be_measured_says_why() {
    let folder = Folder::new();
    let model = small();
    folder
        .run(["model", "/none"])
        .fails_with(1, &["/none", "no such"]);
    folder
        .run(["model", &model, "--image-size=0,3", "--captions=1"])
        .fails_with(1, &["image-size", "3 pixels"]);
    let mut offline = folder.vlmnarrate(["model", "some/model"]);
    offline
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HUB_CACHE", folder.path("cache"));
    Said::from(offline.output().unwrap()).fails_with(1, &["some/model", "HF_HUB_OFFLINE"]);
    // It is set so that every picture is described.
    let said = folder.run(["model", "--interval=1s"]);
    assert_eq!(said.status, Some(2), "{said:?}");
}

#[test]
fn a_download_can_be_interrupted() {
    let folder = Folder::new();
    // Nobody answers there, so the download waits.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut command = folder.vlmnarrate(["model", "some/model"]);
    command
        .env(
            "HF_ENDPOINT",
            format!("http://{}", silent.local_addr().unwrap()),
        )
        .env("HF_HUB_CACHE", folder.path("cache"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let (_connection, _) = silent.accept().unwrap();
    send(&child, "INT");
    let asked = Instant::now();
    let said = Said::from(child.wait_with_output().unwrap());
    let took = asked.elapsed();
    assert_eq!(
        (said.status, said.out.as_str()),
        (Some(130), ""),
        "{said:?}"
    );
    assert!(took < Duration::from_secs(2), "{took:?}");
}
