//! What can be described.

use std::{
    ffi::OsStr,
    fs,
    io::Write,
    os::unix::ffi::OsStrExt,
    process::{Command, Stdio},
};

use crate::common::{Folder, Said, printed};

#[test]
fn names_may_be_anything() {
    let folder = Folder::new();
    let video = folder.red("plain.mp4", 1);
    for name in [
        &b"two\nlines.mp4"[..],
        b"Stra\xdfe.mp4",
        b"back\\slash.mp4",
        b"-lead.mp4",
        b"50% #1?.mp4",
        b"a:b.mp4",
        b"no suffix",
        "🎬 日本.mp4".as_bytes(),
    ] {
        let name = OsStr::from_bytes(name);
        fs::copy(&video, folder.path(name)).unwrap();
        let said = folder.run([
            OsStr::new("-o"),
            OsStr::new("out.mkv"),
            OsStr::new("--"),
            name,
        ]);
        assert_eq!(said.status, Some(0), "{name:?}: {said:?}");
        assert_eq!(said.out, "0:00.0  A solid red screen.\n", "{name:?}");
        fs::remove_file(folder.path("out.mkv")).unwrap();
    }
    // A wrong suffix changes nothing.
    fs::copy(
        folder.make("b.mkv", "-i plain.mp4 -c copy").clone(),
        folder.path("wrong.mp4"),
    )
    .ok();
}

#[test]
fn inputs_that_are_none_are_refused_in_one_line() {
    let folder = Folder::new();
    fs::write(folder.path("empty.mp4"), "").unwrap();
    fs::write(folder.path("text.mp4"), "This is no video.\n".repeat(100)).unwrap();
    fs::create_dir(folder.path("folder")).unwrap();
    folder.make("sound.mp4", "-f lavfi -i sine=duration=1 -c:a aac");
    let video = folder.red("whole.mp4", 4);
    // The index of this file is at its end.
    let bytes = fs::read(video).unwrap();
    fs::write(folder.path("headless.mp4"), &bytes[..bytes.len() / 2]).unwrap();
    for (input, words) in [
        ("missing.mp4", "no such file"),
        ("empty.mp4", "empty"),
        ("text.mp4", "text.mp4"),
        ("folder", "folder"),
        ("sound.mp4", "there is no video in it"),
        ("headless.mp4", "moov atom not found"),
        ("/dev/null", "no file"),
        ("http://127.0.0.1:1/a.mp4", "Connection refused"),
        ("nowhere://a", "nowhere://a"),
    ] {
        for output in ["out.mkv", "out.vtt"] {
            let said = folder.run([input, "-o", output]);
            said.fails_with(1, &[input]);
            assert!(
                said.err.to_lowercase().contains(&words.to_lowercase()),
                "{input}: {said:?}"
            );
            assert_eq!(said.err.lines().count(), 1, "{said:?}");
            assert!(!folder.path(output).exists());
        }
    }
}

#[test]
fn a_pipe_is_read_once() {
    let folder = Folder::new();
    let video = folder.red("a.mp4", 2);
    for (arguments, expected) in [
        (
            &["-"][..],
            "0:00.0  A solid red screen.\n0:01.0  A solid red screen.\n",
        ),
        (
            &["-", "-o", "-", "--format", "srt"],
            "1\n00:00:00,000 --> 00:00:02,000\nA solid red screen.\n\n",
        ),
        (
            &["-", "-o", "out.mkv"],
            "0:00.0  A solid red screen.\n0:01.0  A solid red screen.\n",
        ),
    ] {
        let mut command = folder.vlmnarrate(arguments);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut pipe = child.stdin.take().unwrap();
        let bytes = fs::read(&video).unwrap();
        let writer = std::thread::spawn(move || pipe.write_all(&bytes));
        let said = Said::from(child.wait_with_output().unwrap());
        writer.join().unwrap().unwrap();
        assert_eq!(
            (said.status, said.out.as_str()),
            (Some(0), expected),
            "{said:?}"
        );
    }
    assert_eq!(folder.names(), ["a.mp4", "out.mkv"]);
    // Nothing, and no video.
    for (text, words) in [
        ("", "nothing came"),
        ("This is no video.\n", "try to play it"),
    ] {
        let mut command = folder.vlmnarrate(["-"]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(text.repeat(50).as_bytes())
            .unwrap();
        Said::from(child.wait_with_output().unwrap()).fails_with(1, &["standard input", words]);
    }
    // A file by redirection is a file.
    let mut command = folder.vlmnarrate(["-", "-o", "again.mkv"]);
    let said = Said::from(
        command
            .stdin(fs::File::open(video).unwrap())
            .output()
            .unwrap(),
    );
    assert_eq!(said.status, Some(0), "{said:?}");
}

/// A video that ends before its time is told of.
#[test]
fn a_video_that_is_cut_short_is_told_of() {
    let folder = Folder::new();
    let video = folder.make("a.mp4", "-f lavfi -i testsrc2=size=320x240:rate=10:duration=20 -c:v libx264 -preset ultrafast -movflags +faststart");
    let bytes = fs::read(video).unwrap();
    fs::write(folder.path("short.mp4"), &bytes[..bytes.len() * 6 / 10]).unwrap();
    let said = folder.run(["short.mp4", "--interval", "5s"]);
    assert_eq!(said.status, Some(0), "{said:?}");
    assert!(
        said.err
            .contains("warning: short.mp4: the video ends at 0:1"),
        "{said:?}"
    );
    assert!(
        said.err
            .contains("although the file says 0:20: it is cut short or damaged"),
        "{said:?}"
    );
    let whole = folder.run(["a.mp4", "--interval", "5s"]);
    assert!(!whole.err.contains("warning"), "{whole:?}");
}

/// Of these the times of frames do not tell it.
#[test]
fn a_file_without_its_end_is_told_of() {
    let folder = Folder::new();
    folder.make(
        "a.avi",
        "-f lavfi -i testsrc2=size=64x48:rate=10:duration=3 -c:v mpeg4",
    );
    folder.make("a.jpg", "-f lavfi -i testsrc2=size=640x480 -frames:v 1");
    for name in ["a.avi", "a.jpg"] {
        let whole = folder.run([name, "-o", "-"]);
        assert!(!whole.err.contains("cut short"), "{whole:?}");
        let bytes = fs::read(folder.path(name)).unwrap();
        fs::write(folder.path(name), &bytes[..bytes.len() * 7 / 10]).unwrap();
        let said = folder.run([name, "-o", "-"]);
        assert_eq!(said.status, Some(0), "{said:?}");
        assert!(
            said.err
                .contains(&format!("warning: {name}: the file is cut short")),
            "{said:?}"
        );
    }
}

/// The size changes, and nothing hangs.
#[test]
fn a_picture_may_change_its_size() {
    let folder = Folder::new();
    folder.make(
        "one.ts",
        "-f lavfi -i color=red:size=64x48:rate=10:duration=2 -c:v libx264 -f mpegts",
    );
    folder.make("two.ts", "-f lavfi -i color=blue:size=128x48:rate=10:duration=2 -c:v libx264 -output_ts_offset 2 -f mpegts");
    let both = [
        fs::read(folder.path("one.ts")).unwrap(),
        fs::read(folder.path("two.ts")).unwrap(),
    ]
    .concat();
    fs::write(folder.path("both.ts"), both).unwrap();
    for arguments in [
        &["both.ts"][..],
        &["burn", "both.ts"],
        &["both.ts", "-o", "both.vtt"],
    ] {
        let said = folder.run(arguments);
        assert_eq!(said.status, Some(0), "{said:?}");
        assert!(said.out.contains("A solid red screen."), "{said:?}");
        assert!(said.out.contains("A solid blue screen."), "{said:?}");
    }
}

#[test]
fn a_picture_is_read_aloud() {
    let folder = Folder::new();
    for name in ["a.png", "a.jpg", "a.bmp"] {
        folder.make(name, "-f lavfi -i color=red:size=64x48 -frames:v 1");
        let said = folder.run([name]);
        assert_eq!(
            (said.status, said.out.as_str()),
            (Some(0), "0:00.0  A solid red screen.\n"),
            "{name}: {said:?}"
        );
    }
    assert_eq!(folder.names(), ["a.bmp", "a.jpg", "a.png"]);
}

/// A picture that moves for ever is described for one round.
#[test]
fn a_gif_is_described_once() {
    let folder = Folder::new();
    folder.make(
        "a.gif",
        "-f lavfi -i color=red:size=64x48:rate=10:duration=3 -loop 0",
    );
    let said = folder.run(["a.gif"]);
    assert_eq!(said.status, Some(0), "{said:?}");
    assert_eq!(said.out.lines().count(), 3, "{said:?}");
}

/// Without FFmpeg's programs the text is there all the same.
#[test]
fn without_ffmpeg_there_is_text() {
    let folder = Folder::new();
    folder.red("a.mp4", 1);
    let bare = |arguments: &[&str]| -> Said {
        let mut command = folder.vlmnarrate(arguments);
        command
            .env("PATH", folder.path("."))
            .output()
            .unwrap()
            .into()
    };
    bare(&["a.mp4"]).fails_with(1, &["install the package ffmpeg", "-o out.vtt"]);
    let said = bare(&["a.mp4", "-o", "a.srt"]);
    assert_eq!(said.status, Some(0), "{said:?}");
    assert_eq!(folder.names(), ["a.mp4", "a.srt"]);
    let _ = Command::new("true");
}

/// Of several versions of the same, one is described and copied.
#[test]
fn one_version_of_a_playlist_is_taken() {
    let folder = Folder::new();
    let (colour, tone) = (
        "-f lavfi -i color=red:rate=10:duration=4:size",
        "-f lavfi -i sine=duration=4",
    );
    let made = Command::new("ffmpeg")
        .args(["-v", "error", "-nostdin"])
        .args(format!("{colour}=64x48 {colour}=320x240 {tone}").split_whitespace())
        .args(
            "-map 0 -map 2 -map 1 -map 2 -c:v libx264 -g 20 -c:a aac -b:v:0 100k -b:v:1 900k"
                .split_whitespace(),
        )
        .args([
            "-var_stream_map",
            "v:0,a:0 v:1,a:1",
            "-master_pl_name",
            "all.m3u8",
            "-f",
            "hls",
            "-hls_time",
            "2",
        ])
        .args(["-hls_list_size", "0", "v%v.m3u8"])
        .current_dir(folder.path("."))
        .status();
    assert!(made.unwrap().success());
    let said = folder.run(["all.m3u8"]);
    assert_eq!(said.status, Some(0), "{said:?}");
    assert_eq!(said.out.lines().count(), 4, "{said:?}");
    let path = folder.path("all.narrated.mkv");
    let entries = [
        "-v",
        "error",
        "-show_entries",
        "stream=codec_name,width",
        "-of",
        "csv=p=0",
    ];
    let streams = printed(
        "ffprobe",
        entries.into_iter().chain([path.to_str().unwrap()]),
    );
    assert_eq!(streams, "h264,320\naac\nsubrip,N/A\n");
    assert!(!said.err.contains("warning"), "{said:?}");

    // The second of its parts is gone.
    fs::remove_file(folder.path("v11.ts")).unwrap();
    let said = folder.run(["all.m3u8", "-o", "-"]);
    assert_eq!(said.status, Some(0), "{said:?}");
    let warning = "warning: all.m3u8: segments of the playlist are missing";
    assert!(said.err.contains(warning), "{said:?}");
}

/// Reception broke off for a while. Captions stand where the copy has their frames, one behind the other.
#[test]
fn a_gap_in_a_stream_stays_a_gap() {
    let folder = Folder::new();
    let colour =
        |name| format!("-f lavfi -i color={name}:size=64x48:rate=10:duration=3 -c:v libx264");
    folder.make("one.ts", &format!("{} -f mpegts", colour("red")));
    folder.make(
        "two.ts",
        &format!("{} -output_ts_offset 8 -f mpegts", colour("blue")),
    );
    let both = [
        fs::read(folder.path("one.ts")).unwrap(),
        fs::read(folder.path("two.ts")).unwrap(),
    ]
    .concat();
    fs::write(folder.path("both.ts"), both).unwrap();
    let said = folder.run(["both.ts", "-o", "both.mkv"]);
    assert_eq!(said.status, Some(0), "{said:?}");
    assert!(!said.err.contains("cut short"), "{said:?}");
    let times = |kind: &str, entries: &str| -> Vec<f64> {
        let path = folder.path("both.mkv");
        let entries = format!("packet={entries}");
        let shown = [
            "-v",
            "error",
            "-select_streams",
            kind,
            "-show_entries",
            &entries,
            "-of",
            "csv=p=0",
        ];
        let shown = printed("ffprobe", shown.into_iter().chain([path.to_str().unwrap()]));
        shown
            .lines()
            .map(|line| line.trim_end_matches(',').parse().unwrap())
            .collect()
    };
    let frames = times("v", "pts_time");
    assert!(frames.iter().any(|&frame| frame > 8.0), "{frames:?}");
    let cues = times("s", "pts_time");
    let lengths = times("s", "duration_time");
    assert!(cues.iter().any(|&cue| cue >= 7.5), "{cues:?}");
    for (number, &cue) in cues.iter().enumerate() {
        assert!(
            frames.iter().any(|frame| (frame - cue).abs() < 0.003),
            "{cue}: {frames:?}"
        );
        let end = cue + lengths[number];
        assert!(
            cues.get(number + 1).is_none_or(|&next| end < next + 0.003),
            "{cues:?} {lengths:?}"
        );
    }
}
