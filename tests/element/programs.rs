//! The examples: programs that use the element.

use std::process::Command;

use crate::common::programs::{Plugin, Said, repository};

fn said(mut command: Command) -> Said {
    command.output().unwrap().into()
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
    let mut launch = plugin.command("gst-launch-1.0");
    launch.arg("-q").args(make.split_whitespace());
    assert_eq!(said(launch).status, Some(0));
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
