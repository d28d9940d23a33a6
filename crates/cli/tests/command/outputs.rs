//! What may be written where.

use std::{fs, os::unix::fs::symlink};

use crate::common::Folder;

#[test]
fn the_input_is_never_the_output() {
    let folder = Folder::new();
    let input = folder.red("a.mp4", 1);
    let before = fs::read(&input).unwrap();
    symlink("a.mp4", folder.path("link.mp4")).unwrap();
    fs::hard_link(&input, folder.path("hard.mp4")).unwrap();
    symlink(folder.path("."), folder.path("alias")).unwrap();
    for output in [
        "a.mp4",
        "./a.mp4",
        "link.mp4",
        "hard.mp4",
        "alias/a.mp4",
        input.to_str().unwrap(),
    ] {
        for command in [&["a.mp4"][..], &["burn", "a.mp4"]] {
            for forced in [&[][..], &["--force"]] {
                let arguments = [command, &["-o", output], forced].concat();
                folder
                    .run(&arguments)
                    .fails_with(1, &[output, "the output is the input", "-o"]);
                assert_eq!(fs::read(&input).unwrap(), before);
            }
        }
    }
    assert_eq!(folder.names(), ["a.mp4", "alias", "hard.mp4", "link.mp4"]);
}

#[test]
fn outputs_that_cannot_be_are_refused() {
    let folder = Folder::new();
    folder.red("a.mp4", 1);
    fs::create_dir(folder.path("folder.mkv")).unwrap();
    symlink("nowhere", folder.path("dangling.mkv")).unwrap();
    let long = format!("{}.mkv", "n".repeat(300));
    for (output, words) in [
        ("folder.mkv", "this is a folder"),
        ("missing/out.mkv", "the folder does not exist"),
        (
            "/dev/null",
            "must end in .mkv, .mp4, .vtt, .srt, .jsonl, .html or .txt",
        ),
        ("dangling.mkv", "a link to a file that does not exist"),
        ("out.avi", "must end in"),
        ("out", "must end in"),
        ("", "must end in"),
        (long.as_str(), "name too long"),
        ("a.mp4/out.mkv", "ot a directory"),
        ("..", "must end in"),
    ] {
        let said = folder.run(["a.mp4", "-o", output]);
        assert_eq!(said.status, Some(1), "{output}: {said:?}");
        assert_eq!(said.err.lines().count(), 1, "{output}: {said:?}");
        assert!(
            said.err.to_lowercase().contains(&words.to_lowercase()),
            "{output}: {said:?}"
        );
    }
    folder
        .run(["a.mp4", "-o", "/dev/full", "--format", "vtt"])
        .fails_with(1, &["/dev/full", "no regular file"]);
    folder
        .run(["rtsp://127.0.0.1:1/a", "-o", "a.mkv"])
        .fails_with(1, &["live stream", "-o out.vtt"]);
    folder
        .run(["burn", "rtsp://127.0.0.1:1/a", "-o", "a.mkv"])
        .fails_with(1, &["live stream", "vlmnarrate live"]);
    let mut piped = folder.vlmnarrate(["-", "--format", "html"]);
    let mut cat = std::process::Command::new("cat")
        .arg(folder.path("a.mp4"))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let said = crate::common::Said::from(piped.stdin(cat.stdout.take().unwrap()).output().unwrap());
    cat.wait().unwrap();
    said.fails_with(1, &["name the output with -o"]);
    folder
        .run(["a.mp4", "-o", "-", "--format", "mkv"])
        .fails_with(1, &["standard output"]);
    assert_eq!(folder.names(), ["a.mp4", "dangling.mkv", "folder.mkv"]);
}

/// An older result goes only if it must, and only for a new one that is whole.
#[test]
fn an_older_result_stays_until_there_is_a_new_one() {
    let folder = Folder::new();
    folder.red("a.mp4", 1);
    for output in [
        "out.mkv",
        "out.mp4",
        "out.vtt",
        "out.srt",
        "out.jsonl",
        "out.txt",
    ] {
        let path = folder.path(output);
        fs::write(&path, "precious").unwrap();
        folder
            .run(["a.mp4", "-o", output])
            .fails_with(1, &[output, "exists", "--force"]);
        folder
            .run(["a.mp4", "-o", output, "--force", "--model", "/nowhere"])
            .fails_with(1, &["/nowhere"]);
        assert_eq!(fs::read(&path).unwrap(), b"precious", "{output}");
        let said = folder.run(["a.mp4", "-o", output, "--force"]);
        assert_eq!(said.status, Some(0), "{said:?}");
        assert!(fs::metadata(&path).unwrap().len() > 20, "{output}");
        fs::remove_file(path).unwrap();
    }
    assert_eq!(folder.names(), ["a.mp4"]);
}

#[test]
fn formats_hold_the_captions_and_name_the_model() {
    let folder = Folder::new();
    folder.red("a.mp4", 2);
    let read = |name: &str| {
        let said = folder.run(["a.mp4", "-o", name]);
        assert_eq!(said.status, Some(0), "{said:?}");
        assert!(said.err.contains(&format!("Wrote {name}")), "{said:?}");
        // What to do for real captions is said once.
        assert_eq!(said.err.matches("--model ").count(), 1, "{said:?}");
        fs::read_to_string(folder.path(name)).unwrap()
    };
    let vtt = read("a.vtt");
    assert!(
        vtt.starts_with("WEBVTT\n\nNOTE Captions by vlmnarrate "),
        "{vtt}"
    );
    assert!(vtt.contains(" with demo "), "{vtt}");
    assert!(
        vtt.ends_with("\n\n00:00:00.000 --> 00:00:02.000\nA solid red screen.\n\n"),
        "{vtt}"
    );
    assert_eq!(
        read("a.srt"),
        "1\n00:00:00,000 --> 00:00:02,000\nA solid red screen.\n\n"
    );
    assert_eq!(
        read("a.txt"),
        "0:00.0  A solid red screen.\n0:01.0  A solid red screen.\n"
    );
    let lines = read("a.jsonl");
    let lines: Vec<serde_json::Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[1]["text"], "A solid red screen.");
    assert_eq!(lines[1]["model"], "demo");
    assert_eq!(lines[1]["stream-time"], 1_000_000_000u64);
    let said = folder.run(["a.mp4", "-o", "-", "--format", "srt", "--interval", "500ms"]);
    assert_eq!(
        (said.status, said.out.as_str()),
        (
            Some(0),
            "1\n00:00:00,000 --> 00:00:02,000\nA solid red screen.\n\n"
        )
    );
}
