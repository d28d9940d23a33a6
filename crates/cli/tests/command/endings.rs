//! Signals, and what they leave.

use std::{
    io::Read,
    process::Command,
    time::{Duration, Instant},
};

use crate::common::{Folder, Said, cues, first_line, printed, send};

/// Minutes that take long: each of their frames is described.
fn slow(folder: &Folder) {
    folder.red("slow.mp4", 300);
}

const SLOWLY: [&str; 3] = ["--interval", "0", "--threads=1"];

/// The file is whole, and has what was described.
#[test]
fn an_interrupt_leaves_a_whole_file() {
    for (signal, status) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        for output in ["out.mkv", "out.mp4", "out.vtt", "out.jsonl"] {
            if signal != "INT" && output != "out.mkv" {
                continue;
            }
            let folder = Folder::new();
            slow(&folder);
            let arguments = [&["slow.mp4", "-o", output][..], &SLOWLY].concat();
            let (child, mut out, line) = first_line(folder.vlmnarrate(&arguments));
            assert!(line.starts_with("0:00.0  "), "{line}");
            send(&child, signal);
            let asked = Instant::now();
            let mut rest = String::new();
            out.read_to_string(&mut rest).unwrap();
            let said = Said::from(child.wait_with_output().unwrap());
            let took = asked.elapsed();
            assert_eq!(said.status, Some(status), "{output}: {said:?}");
            assert!(took < Duration::from_secs(10), "{took:?}");
            assert!(said.err.contains("Stopped after 0:0"), "{said:?}");
            assert_eq!(folder.names(), [output, "slow.mp4"]);
            let path = folder.path(output);
            if output.ends_with(".mkv") || output.ends_with(".mp4") {
                assert!(cues(&path).contains("A solid red screen."));
                let decoded = printed(
                    "ffmpeg",
                    [
                        "-v",
                        "error",
                        "-i",
                        path.to_str().unwrap(),
                        "-f",
                        "framecrc",
                        "-",
                    ],
                );
                assert!(decoded.lines().count() > 5, "{decoded}");
            } else {
                assert!(
                    std::fs::read_to_string(path)
                        .unwrap()
                        .contains("A solid red screen.")
                );
            }
        }
    }
}

#[test]
fn a_second_interrupt_leaves_nothing() {
    let folder = Folder::new();
    slow(&folder);
    let arguments = [&["slow.mp4"][..], &SLOWLY].concat();
    let (mut child, _out, _) = first_line(folder.vlmnarrate(&arguments));
    send(&child, "INT");
    std::thread::sleep(Duration::from_millis(5));
    send(&child, "INT");
    assert_eq!(child.wait().unwrap().code(), Some(130));
    // Either was quicker: a whole file, or none.
    let names = folder.names();
    assert!(
        names
            .iter()
            .all(|name| name.ends_with(".mp4") || name.ends_with(".mkv")),
        "{names:?}"
    );
}

/// Before the first caption there is nothing to keep.
#[test]
fn an_interrupt_before_the_first_caption_leaves_nothing() {
    let folder = Folder::new();
    folder.make(
        "a.mp4",
        "-f lavfi -i color=red:size=64x48:rate=1:duration=2 -c:v libx264",
    );
    // Nobody answers there, so the download waits.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut command = folder.vlmnarrate(["a.mp4", "--model", "some/model"]);
    command
        .env(
            "HF_ENDPOINT",
            format!("http://{}", silent.local_addr().unwrap()),
        )
        .env("HF_HUB_CACHE", folder.path("cache"))
        .stderr(std::process::Stdio::piped());
    let child = command.spawn().unwrap();
    let (_connection, _) = silent.accept().unwrap();
    send(&child, "INT");
    let asked = Instant::now();
    let said = Said::from(child.wait_with_output().unwrap());
    assert_eq!(said.status, Some(130), "{said:?}");
    assert!(
        asked.elapsed() < Duration::from_secs(5),
        "{:?}",
        asked.elapsed()
    );
    let names = folder.names();
    assert!(
        !names
            .iter()
            .any(|name| name.ends_with(".mkv") || name.ends_with(".part")),
        "{names:?}"
    );
}

/// A process that is killed can't clean up, but its child ends.
#[test]
fn no_child_outlives_its_parent() {
    let folder = Folder::new();
    slow(&folder);
    let arguments = [&["slow.mp4"][..], &SLOWLY].concat();
    let (mut child, _out, _) = first_line(folder.vlmnarrate(&arguments));
    let children = printed("ps", ["-o", "pid=", "--ppid", &child.id().to_string()]);
    let children: Vec<_> = children.split_whitespace().collect();
    assert!(!children.is_empty());
    send(&child, "KILL");
    child.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    for pid in children {
        let there = || {
            Command::new("kill")
                .args(["-0", pid])
                .output()
                .unwrap()
                .status
                .success()
        };
        while there() {
            assert!(Instant::now() < deadline, "{pid} is there");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let folder = Folder::new();
    folder.red("a.mp4", 20);
    let (child, out, _) = first_line(folder.vlmnarrate(["a.mp4", "--interval", "0"]));
    drop(out);
    let said = Said::from(child.wait_with_output().unwrap());
    assert_eq!(said.status, Some(0), "{said:?}");
    assert!(!said.err.contains("rror"), "{said:?}");
    assert_eq!(folder.names(), ["a.mp4", "a.narrated.mkv"]);
}

/// What is there when a disk is full is no result, also if FFmpeg finds that only at the end.
#[test]
fn a_full_disk_is_said_and_leaves_nothing() {
    let folder = Folder::new();
    folder.make(
        "noise.mkv",
        "-f lavfi -i testsrc2=size=320x240:rate=10:duration=6 -c:v ffv1",
    );
    assert_eq!(folder.run(["noise.mkv", "-o", "out.mkv"]).status, Some(0));
    let whole = std::fs::metadata(folder.path("out.mkv")).unwrap().len();
    for kilobytes in [whole / 2048, (whole - 1) / 1024] {
        std::fs::write(folder.path("out.mkv"), "precious").unwrap();
        let line = format!(
            "trap '' XFSZ; ulimit -f {kilobytes}; exec \"$0\" noise.mkv -o out.mkv --force"
        );
        let mut shell = Command::new("bash");
        shell
            .args(["-c", &line, env!("CARGO_BIN_EXE_vlmnarrate")])
            .current_dir(folder.path("."));
        let said = Said::from(shell.output().unwrap());
        said.fails_with(1, &["out.mkv", "File too large"]);
        assert_eq!(folder.names(), ["noise.mkv", "out.mkv"]);
        assert_eq!(std::fs::read(folder.path("out.mkv")).unwrap(), b"precious");
    }
}
