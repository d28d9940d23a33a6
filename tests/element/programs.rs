//! The programs that use the element: `pipelines/narrate.py` and the examples.

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    time::Instant,
};

use crate::common::programs::{Plugin, Said, repository};
use serde_json::{Value, json};

/// A red screen of so many frames, ten a second, into the narrator.
fn red(frames: u32) -> String {
    format!(
        "videotestsrc pattern=red num-buffers={frames} ! video/x-raw,framerate=10/1 ! vlmnarrate"
    )
}

/// `narrate.py`, with a pipeline that may not have spaces within its words.
pub(crate) fn narrate(plugin: &Plugin, options: &str, pipeline: &str) -> Command {
    let mut command = plugin.python();
    command
        .arg(repository("pipelines/narrate.py"))
        .args(options.split_whitespace())
        .args(pipeline.split_whitespace())
        .stdin(Stdio::null());
    command
}

/// A Python program that may import what is in `pipelines`.
pub(crate) fn importing(plugin: &Plugin, program: &str) -> Command {
    let mut python = plugin.python();
    python
        .args(["-c", program])
        .env("PYTHONPATH", repository("pipelines"));
    python
}

pub(crate) fn said(mut command: Command) -> Said {
    command.output().unwrap().into()
}

#[test]
fn captions_are_lines_of_time_and_text() {
    let plugin = Plugin::new();
    let said = said(narrate(
        &plugin,
        "--text",
        &format!("{} ! fakesink", red(20)),
    ));
    assert_eq!(said.status, Some(0), "{said:?}");
    assert_eq!(
        said.out,
        "0:00.0  A solid red screen.\n0:01.0  A solid red screen.\n"
    );
    // No terminal, nothing but lines; the last says how it went.
    assert!(!said.err.contains(['\r', '\x1b']), "{said:?}");
    let last = said.err.lines().last().unwrap();
    assert!(last.starts_with("Narrated 0:02 in "), "{said:?}");
    assert!(last.ends_with("  2 captions"), "{said:?}");
}

#[test]
fn silence_on_demand() {
    let plugin = Plugin::new();
    let pipeline = format!("{} ! fakesink", red(10));
    let said = said(narrate(&plugin, "--no-progress", &pipeline));
    assert_eq!(said.status, Some(0), "{said:?}");
    assert_eq!(said.out, "");
    // That the demo model is a demo is no progress.
    assert_eq!(said.err.lines().count(), 1, "{said:?}");
}

/// What a model says must not reach the terminal as an order.
#[test]
fn captions_stay_on_their_line() {
    let program = "import narrate
caption = {'partial': False, 'stream-time': 3725_940_000_000, 'text': 'two\\nlines \\x1b[2J\\u202e'}
assert narrate.as_text(caption) == '1:02:05.9  two lines [2J', narrate.as_text(caption)
caption['stream-time'] = None
assert narrate.as_text(caption).startswith('-  two')
caption['partial'] = True
assert narrate.as_text(caption) is None
assert [narrate.span(s) for s in (0.1, 59.5, 3700)] == ['1 s', '1 min 0 s', '1 h 1 min']
";
    let said = said(importing(&Plugin::new(), program));
    assert_eq!(said.status, Some(0), "{said:?}");
}

/// Without a terminal a line comes now and then, with one it is redrawn.
#[test]
fn progress_shows_while_it_runs() {
    let program = "import sys, narrate
narrate.Gst.init(None)
pipeline = narrate.launch(sys.argv[2:])
sys.exit(narrate.Run(pipeline, progress=narrate.Progress(every=float(sys.argv[1]))).run())
";
    // 4 s of video and no faster than that.
    let pipeline = format!("{} ! fakesink sync=true", red(40));
    let plugin = Plugin::new();
    let progress = |every: &str| {
        let mut python = importing(&plugin, program);
        python.arg(every).args(pipeline.split_whitespace());
        said(python)
    };
    let start = Instant::now();
    let often = progress("1");
    // One a second, however long a busy machine takes.
    let most = 2 + start.elapsed().as_secs() as usize;
    let lines: Vec<_> = (often.err.lines())
        .filter(|line| line.contains("real time") && line.contains(" / 0:04  "))
        .collect();
    assert!((1..=most).contains(&lines.len()), "{often:?}");
    assert!(lines.iter().all(|line| line.contains(" %  ")), "{often:?}");
    assert!(lines.last().unwrap().ends_with(" s left"), "{often:?}");
    let seldom = progress("1000");
    assert!(!seldom.err.contains(" / 0:04"), "{seldom:?}");
    assert!(seldom.err.contains("Narrated 0:04 in "), "{seldom:?}");
}

#[test]
fn a_terminal_line_makes_room_for_captions() {
    let plugin = Plugin::new();
    let program = repository("pipelines/narrate.py");
    let program = format!(
        "/usr/bin/python3 '{}' --text {} ! fakesink sync=true",
        program.display(),
        red(30)
    );
    let mut script = plugin.command("script");
    script
        .args(["-qec", &program, "/dev/null"])
        .env("TERM", "xterm")
        .stdin(Stdio::null());
    let said = said(script);
    assert_eq!(said.status, Some(0), "{said:?}");
    assert!(said.out.contains(" / 0:03  "), "{said:?}");
    // What remains of each line is what was written after it was last cleared.
    let remains: Vec<_> = (said.out.lines())
        .map(|line| line.rsplit("\r\x1b[K").next().unwrap().trim_end())
        .filter(|line| !line.starts_with("vlmnarrate"))
        .collect();
    assert_eq!(remains.len(), 4, "{said:?}");
    for (second, line) in remains[..3].iter().enumerate() {
        assert_eq!(*line, format!("0:0{second}.0  A solid red screen."));
    }
    assert!(remains[3].starts_with("Narrated 0:03 in "), "{said:?}");
}

#[test]
fn errors_name_what_is_wrong() {
    let plugin = Plugin::new();
    let missing = plugin.folder().join("missing");
    let missing = missing.display();
    let red = red(10);
    for (pipeline, expected) in [
        (
            format!("{red} ! filesink location={missing}/out"),
            vec!["filesink0", "missing/out", "No such file or directory"],
        ),
        (
            format!("{red} ! filesink location={}", plugin.folder().display()),
            vec!["filesink0", "Could not open file", "directory"],
        ),
        (
            format!("filesrc location={missing} ! fakesink"),
            vec!["filesrc0", "missing"],
        ),
        (
            format!("{red} model={missing} ! fakesink"),
            vec!["vlmnarrate0", "missing", "Set model to"],
        ),
        (
            "videotestsrc ! vlmnarrat ! fakesink".into(),
            vec!["\"vlmnarrat\"", "GST_PLUGIN_PATH"],
        ),
        (
            "videotestsrc ! vlmnarrate intervall=1 ! fakesink".into(),
            vec!["intervall"],
        ),
        // The message alone says "Internal data stream error."
        (
            format!(
                "fakesrc num-buffers=1 filltype=zero sizetype=fixed ! h264parse ! fakesink {red} ! fakesink"
            ),
            vec!["h264parse0"],
        ),
    ] {
        let said = said(narrate(&plugin, "", &pipeline));
        assert_eq!(said.status, Some(1), "{pipeline}: {said:?}");
        assert_eq!(said.out, "", "{pipeline}");
        let last = said.err.lines().last().unwrap();
        assert!(last.starts_with("error: "), "{pipeline}: {said:?}");
        for word in expected {
            assert!(last.contains(word), "{pipeline}: {word}: {said:?}");
        }
    }
    let nothing = said(narrate(&plugin, "", ""));
    assert_eq!(nothing.status, Some(2), "{nothing:?}");
}

/// Starts it and waits for its first caption.
fn first_caption(mut command: Command) -> (Child, impl BufRead) {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    assert!(line.contains("A solid red screen."), "{line:?}");
    (child, out)
}

fn interrupt(child: &Child) {
    let pid = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &pid])
            .status()
            .unwrap()
            .success()
    );
}

#[test]
fn an_interrupt_finishes_the_file() {
    let plugin = Plugin::new();
    let file = plugin.folder().join("out.mp4");
    let live = red(1000).replace("videotestsrc", "videotestsrc is-live=true");
    let pipeline = format!(
        "{live} ! videoconvert ! x264enc tune=zerolatency ! mp4mux ! filesink location={}",
        file.display()
    );
    let (child, _out) = first_caption(narrate(&plugin, "--text", &pipeline));
    interrupt(&child);
    let said = Said::from(child.wait_with_output().unwrap());
    assert_eq!(said.status, Some(130), "{said:?}");
    assert!(said.err.contains("Stopped after "), "{said:?}");
    // A plain MP4 file that was not finished has no index: nothing can play it.
    let probe = Command::new("ffprobe")
        .args(["-v", "error"])
        .arg(&file)
        .output();
    let probe = Said::from(probe.unwrap());
    assert_eq!((probe.status, probe.err.as_str()), (Some(0), ""));
}

#[test]
fn a_second_interrupt_stops_at_once() {
    let plugin = Plugin::new();
    let live = red(1000).replace("videotestsrc", "videotestsrc is-live=true");
    // The end of the stream never comes through.
    let pipeline = format!(
        "{live} ! tee name=t ! fakesink t. ! queue ! valve drop=true ! fakesink async=false"
    );
    let (mut child, _out) = first_caption(narrate(&plugin, "--text", &pipeline));
    let mut err = BufReader::new(child.stderr.take().unwrap());
    interrupt(&child);
    let mut line = String::new();
    while !line.starts_with("Ending the stream") {
        line.clear();
        assert!(err.read_line(&mut line).unwrap() > 0);
    }
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let plugin = Plugin::new();
    let pipeline = format!("{} interval=0 ! fakesink", red(100));
    let (child, out) = first_caption(narrate(&plugin, "--text", &pipeline));
    drop(out);
    let said = Said::from(child.wait_with_output().unwrap());
    assert_eq!(said.status, Some(0), "{said:?}");
    assert!(!said.err.contains("rror"), "{said:?}");
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
    let said = said(narrate(&Plugin::new(), "--json --no-progress", pipeline));
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

/// The word is found once, and the answer to the question about it is the request's.
#[track_caller]
fn rings(program: impl Fn() -> Command) {
    let ball = said(program());
    assert_eq!(ball.status, Some(0), "{ball:?}");
    let lines: Vec<_> = ball.out.lines().collect();
    assert!(lines[0].contains("s  A white ball"), "{ball:?}");
    assert!(lines[1].ends_with("*** ball *** request 1"), "{ball:?}");
    let answers = ball.out.matches("answer 1: A white ball").count();
    assert_eq!(
        (answers, ball.out.matches("***").count()),
        (1, 2),
        "{ball:?}"
    );

    // In a file, from red to blue, in capitals; a part of a word is none.
    let plugin = Plugin::new();
    let file = plugin.folder().join("two.mkv");
    let scene = "num-buffers=20 ! video/x-raw,framerate=10/1 ! c.";
    let make = format!(
        "concat name=c ! x264enc ! matroskamux ! filesink location={} \
         videotestsrc pattern=red {scene} videotestsrc pattern=blue {scene}",
        file.display()
    );
    assert_eq!(said(narrate(&plugin, "", &make)).status, Some(0));
    let uri = format!("file://{}", file.display());
    for (word, rung) in [("BLUE", 1), ("blu", 0)] {
        let mut command = program();
        let said = said({
            command.args([&uri, word]);
            command
        });
        assert_eq!(said.status, Some(0), "{said:?}");
        assert_eq!(said.out.matches("request 1").count(), rung, "{said:?}");
        assert_eq!(
            said.out.matches("answer 1: A solid blue").count(),
            rung,
            "{said:?}"
        );
    }

    let mut command = program();
    command.args(["file:///nowhere/to/be/found.mkv", "ball"]);
    let missing = said(command);
    assert_eq!(missing.status, Some(1), "{missing:?}");
    assert!(
        missing.err.contains("/nowhere/to/be/found.mkv"),
        "{missing:?}"
    );
}

#[test]
fn the_python_program_rings() {
    let plugin = Plugin::new();
    rings(|| {
        let mut python = plugin.python();
        python.arg(repository("examples/watch.py"));
        python
    });
}

#[test]
fn the_rust_program_rings() {
    let plugin = Plugin::new();
    // Cargo builds examples only with all tests, and puts them beside the folder of these.
    let build = ["build", "--quiet", "--example", "watch"];
    let mut cargo = Command::new(env!("CARGO"));
    // Dependencies ask for their own, and would be built again because the test's are others.
    for (name, _) in std::env::vars_os() {
        let told = name.to_str().unwrap_or_default();
        if ["CARGO_PKG_", "CARGO_MANIFEST_", "OUT_DIR"]
            .iter()
            .any(|own| told.starts_with(own))
        {
            cargo.env_remove(&name);
        }
    }
    assert!(cargo.args(build).status().unwrap().success());
    let deps = std::env::current_exe().unwrap();
    let program = deps.ancestors().nth(2).unwrap().join("examples/watch");
    rings(|| plugin.command(&program));
}
