//! Any pipeline.

use crate::common::{Folder, Said, first_line, printed, send};

/// A red screen of so many frames, ten a second, into the narrator.
fn red(frames: u32) -> String {
    format!(
        "videotestsrc pattern=red num-buffers={frames} ! video/x-raw,framerate=10/1 ! vlmnarrate"
    )
}

/// The command's options and a pipeline that has no spaces within its words.
fn words<'a>(options: &'a str, pipeline: &'a str) -> impl Iterator<Item = &'a str> {
    ["launch"]
        .into_iter()
        .chain(options.split_whitespace())
        .chain(pipeline.split_whitespace())
}

#[test]
fn captions_are_lines_of_time_and_text() {
    let folder = Folder::new();
    let said = folder.run(words("", &format!("{} ! fakesink", red(20))));
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
    let quiet = folder.run(words("--quiet", &format!("{} ! fakesink", red(10))));
    assert_eq!(
        (quiet.status, quiet.out.as_str(), quiet.err.as_str()),
        (Some(0), "", "")
    );
}

#[test]
fn a_terminal_line_makes_room_for_captions() {
    let folder = Folder::new();
    let line = format!(
        "{} launch {} ! fakesink sync=true",
        env!("CARGO_BIN_EXE_vlmnarrate"),
        red(30)
    );
    let mut script = std::process::Command::new("script");
    script
        .args(["-qec", &line, "/dev/null"])
        .env("TERM", "xterm")
        .current_dir(folder.path("."))
        .stdin(std::process::Stdio::null());
    let said = Said::from(script.output().unwrap());
    assert_eq!(said.status, Some(0), "{said:?}");
    assert!(said.out.contains("x real time"), "{said:?}");
    for second in 0..3 {
        let caption = format!("0:0{second}.0  A solid red screen.");
        // Nothing of the progress is left in front of it.
        let line = said
            .out
            .lines()
            .find(|line| line.contains(&caption))
            .unwrap();
        assert!(line.trim_end().ends_with(&caption), "{said:?}");
    }
}

#[test]
fn errors_name_what_is_wrong() {
    let folder = Folder::new();
    let red = red(10);
    for (pipeline, expected) in [
        (
            format!("{red} ! filesink location=missing/out"),
            &["missing/out", "No such file or directory"][..],
        ),
        ("filesrc location=missing ! fakesink".into(), &["missing"]),
        (
            format!("{red} model=missing ! fakesink"),
            &["missing", "Set model to"],
        ),
        (
            "videotestsrc ! vlmnarrat ! fakesink".into(),
            &["\"vlmnarrat\"", "GST_PLUGIN_PATH"],
        ),
        (
            "videotestsrc ! vlmnarrate intervall=1 ! fakesink".into(),
            &["intervall"],
        ),
        // The message alone says "Internal data stream error."
        (
            format!(
                "fakesrc num-buffers=1 filltype=zero sizetype=fixed ! h264parse ! fakesink {red} ! fakesink"
            ),
            &["h264parse0"],
        ),
    ] {
        let said = folder.run(words("", &pipeline));
        said.fails_with(1, expected);
        assert_eq!(said.out, "", "{pipeline}");
    }
    assert_eq!(folder.run(["launch"]).status, Some(2));
}

#[test]
fn an_interrupt_finishes_the_files_of_the_pipeline() {
    let folder = Folder::new();
    let live = red(1000).replace("videotestsrc", "videotestsrc is-live=true");
    let pipeline = format!(
        "{live} ! videoconvert ! x264enc tune=zerolatency ! mp4mux ! filesink location=out.mp4"
    );
    let (child, _out, line) = first_line(folder.vlmnarrate(words("", &pipeline)));
    assert!(line.contains("A solid red screen."), "{line:?}");
    send(&child, "INT");
    let said = Said::from(child.wait_with_output().unwrap());
    assert_eq!(said.status, Some(130), "{said:?}");
    assert!(said.err.contains("Stopped after "), "{said:?}");
    // A plain MP4 file that was not finished has no index: nothing can play it.
    printed(
        "ffprobe",
        ["-v", "error", folder.path("out.mp4").to_str().unwrap()],
    );
}

#[test]
fn a_second_interrupt_stops_at_once() {
    let folder = Folder::new();
    let live = red(1000).replace("videotestsrc", "videotestsrc is-live=true");
    // The end of the stream never comes through.
    let pipeline = format!(
        "{live} ! tee name=t ! fakesink t. ! queue ! valve drop=true ! fakesink async=false"
    );
    let (mut child, _out, _) = first_line(folder.vlmnarrate(words("", &pipeline)));
    send(&child, "INT");
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert!(child.try_wait().unwrap().is_none());
    send(&child, "INT");
    assert_eq!(child.wait().unwrap().code(), Some(130));
}
