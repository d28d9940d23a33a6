//! Captions as JSON lines are what the schema says.

use std::{
    collections::BTreeSet,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::{Value, json};

use crate::common::{Folder, Said};

/// A red screen of so many frames, ten a second, into the narrator.
fn red(frames: u32) -> String {
    format!(
        "videotestsrc pattern=red num-buffers={frames} ! video/x-raw,framerate=10/1 ! vlmnarrate"
    )
}

/// A file of the repository.
fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(path)
}

const SCHEMA: &str = "pipelines/caption.schema.json";

/// What the validator finds wrong.
fn validate(lines: &[Value]) -> Said {
    let mut child = Command::new("/usr/bin/python3")
        .args([repository("tests/validate.py"), repository(SCHEMA)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for line in lines {
        writeln!(stdin, "{line}").unwrap();
    }
    drop(stdin);
    child.wait_with_output().unwrap().into()
}

fn captions(pipeline: &str) -> Vec<Value> {
    let words = ["launch", "--format", "jsonl"]
        .into_iter()
        .chain(pipeline.split_whitespace());
    let said = Folder::new().run(words);
    assert_eq!(said.status, Some(0), "{said:?}");
    let lines = said.out.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn the_schema_says_what_a_caption_has() {
    let schema = std::fs::read(repository(SCHEMA)).unwrap();
    let schema: Value = serde_json::from_slice(&schema).unwrap();
    let lines = captions(&format!("{} partial-captions=true ! fakesink", red(11)));
    let names = |object: &Value| -> BTreeSet<String> {
        object.as_object().unwrap().keys().cloned().collect()
    };
    let required = schema["required"].as_array().unwrap();
    let required = required
        .iter()
        .map(|name| name.as_str().unwrap().to_owned());
    // Not every engine knows the probability.
    let required = required.chain(["probability".into()]);
    assert_eq!(required.collect::<BTreeSet<_>>(), names(&lines[0]));
    assert_eq!(names(&schema["properties"]), names(&lines[0]));
    for (name, property) in schema["properties"].as_object().unwrap() {
        assert!(property["description"].is_string(), "{name}");
    }
    assert!(lines.iter().any(|line| line["partial"] == true));
    assert_eq!(
        lines.iter().filter(|line| line["partial"] == false).count(),
        2
    );
    let valid = validate(&lines);
    assert_eq!(valid.status, Some(0), "{valid:?}");
}

#[test]
fn a_time_that_is_not_known_is_null() {
    let still = "videotestsrc num-buffers=1 ! video/x-raw,framerate=0/1 ! vlmnarrate ! fakesink";
    let lines = captions(still);
    assert_eq!(lines[0]["duration"], Value::Null);
    assert_eq!(lines[0]["timestamp"], 0);
    let valid = validate(&lines);
    assert_eq!(valid.status, Some(0), "{valid:?}");
}

#[test]
fn a_broken_line_is_refused() {
    let good = captions(&format!("{} ! fakesink", red(1))).remove(0);
    let broken = |name: &str, value: Value| {
        let mut line = good.clone();
        line[name] = value;
        line
    };
    let mut short = good.clone();
    short.as_object_mut().unwrap().remove("text");
    let lines = [
        short,
        broken("mood", json!("good")),
        broken("text", json!(null)),
        broken("timestamp", json!(-1)),
        broken("timestamp", json!(u64::MAX)),
        broken("tokens", json!(1.5)),
        broken("truncated", json!("false")),
        broken("trigger", json!("timer")),
        broken("latency-ms", json!("5")),
    ];
    let said = validate(&lines);
    assert_eq!(said.status, Some(1), "{said:?}");
    for number in 1..=lines.len() {
        let reported = format!("line {number}: ");
        let reports = said.out.lines().filter(|l| l.starts_with(&reported));
        assert_eq!(reports.count(), 1, "{number}: {said:?}");
    }
}
