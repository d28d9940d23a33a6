//! Streams are copied as they are.

use crate::common::{Folder, cues, packets, printed};

/// Two sounds, subtitles, chapters, an attachment and tags.
fn rich(folder: &Folder) -> std::path::PathBuf {
    std::fs::write(folder.path("meta.txt"), ";FFMETADATA1\ntitle=Ürlaub 日本\nmood=good\n[CHAPTER]\nTIMEBASE=1/1\nSTART=0\nEND=2\ntitle=Beach\n[CHAPTER]\nTIMEBASE=1/1\nSTART=2\nEND=4\ntitle=Sea\n").unwrap();
    std::fs::write(
        folder.path("sub.srt"),
        "1\n00:00:01,000 --> 00:00:02,000\n<i>Bonjour</i>\n\n",
    )
    .unwrap();
    std::fs::write(folder.path("font.ttf"), vec![7; 5000]).unwrap();
    let path = |name| folder.path(name).display().to_string();
    folder.make(
        "rich.mkv",
        &format!(
            "-f lavfi -i color=red:size=64x48:rate=10:duration=4 -f lavfi -i sine=440:duration=4 -f lavfi -i sine=880:duration=4 \
             -i {} -i {} -map 0 -map 1 -map 2 -map 4 -map_metadata 3 -map_chapters 3 \
             -c:v libx264 -preset ultrafast -c:a:0 aac -c:a:1 flac -c:s ass \
             -metadata:s:a:0 language=fra -metadata:s:a:1 language=deu -metadata:s:a:1 title=Kommentar -metadata:s:s:0 language=fra \
             -attach {} -metadata:s:t mimetype=font/ttf",
            path("meta.txt"), path("sub.srt"), path("font.ttf"),
        ),
    )
}

#[test]
fn every_stream_stays_as_it_is() {
    let folder = Folder::new();
    let input = rich(&folder);
    let said = folder.run(["rich.mkv"]);
    assert_eq!(said.status, Some(0), "{said:?}");
    assert!(
        said.out.starts_with("0:00.0  A solid red screen.\n"),
        "{said:?}"
    );
    assert!(said.err.contains("Wrote rich.narrated.mkv"), "{said:?}");
    let output = folder.path("rich.narrated.mkv");
    for (streams, count) in [("v", 1), ("a", 2), ("s:0", 1)] {
        let before = packets(&input, streams);
        assert_eq!(before.len(), count);
        assert_eq!(packets(&output, streams), before, "{streams}");
    }
    let shown = |file: &std::path::Path| {
        let entries = "stream=codec_name:stream_tags=language,title,filename,mimetype:stream_disposition=default:chapter=start,end:chapter_tags:format_tags=title,mood";
        let all = printed(
            "ffprobe",
            [
                "-v",
                "error",
                "-show_chapters",
                "-show_entries",
                entries,
                "-of",
                "compact",
                file.to_str().unwrap(),
            ],
        );
        let mut lines: Vec<_> = all.lines().map(str::to_owned).collect();
        lines.retain(|line| !line.contains("title=vlmnarrate: demo"));
        lines
    };
    assert_eq!(shown(&output), shown(&input));
    assert_eq!(
        cues(&output),
        // The video starts behind what its sound needs to start.
        "1\n00:00:00,023 --> 00:00:04,023\nA solid red screen.\n\n"
    );
}

/// A container that can't hold something says so before the start, and what it can hold is there.
#[test]
fn what_mp4_cannot_hold_is_said_before_the_start() {
    let folder = Folder::new();
    let input = rich(&folder);
    let said = folder.run(["rich.mkv", "-o", "out.mp4"]);
    assert_eq!(said.status, Some(0), "{said:?}");
    let notes: Vec<_> = said.err.lines().take(3).collect();
    for (note, words) in notes.iter().zip([
        "note: MP4 can't hold subtitle stream 3 (ass, fra): it becomes mov_text, which keeps the text",
        "note: MP4 can't hold attachment stream 4 (font.ttf): it is left out; Matroska",
        "note: MP4 can't hold these tags: MOOD; Matroska",
    ]) {
        assert!(note.starts_with(words), "{said:?}");
    }
    let output = folder.path("out.mp4");
    assert_eq!(packets(&output, "a"), packets(&input, "a"));
    let streams = printed(
        "ffprobe",
        [
            "-v",
            "error",
            "-show_entries",
            "stream=codec_name",
            "-of",
            "csv=p=0",
            output.to_str().unwrap(),
        ],
    );
    // The last is the list of chapters.
    assert_eq!(streams, "h264\naac\nflac\nmov_text\nmov_text\nbin_data\n");
    assert!(cues(&output).contains("A solid red screen."));

    folder.make(
        "lossless.mkv",
        "-f lavfi -i color=red:size=64x48:rate=10:duration=1 -c:v ffv1",
    );
    folder
        .run(["lossless.mkv", "-o", "lossless.mp4"])
        .fails_with(
            1,
            &["lossless.mkv", "MP4 can't hold the video (ffv1)", ".mkv"],
        );
    assert!(!folder.path("lossless.mp4").exists());
}

/// Captions stand where the video stands, wherever its times start.
#[test]
fn captions_start_with_the_video() {
    let folder = Folder::new();
    // The sound starts first; the times start at ten hours.
    folder.make(
        "late.ts",
        "-f lavfi -i sine=duration=5 -itsoffset 1.5 -f lavfi -i color=red:size=64x48:rate=10:duration=3 \
         -c:v libx264 -preset ultrafast -c:a aac -output_ts_offset 36000 -f mpegts",
    );
    let said = folder.run(["late.ts"]);
    assert_eq!(said.status, Some(0), "{said:?}");
    let output = folder.path("late.narrated.mkv");
    let first = |kind| {
        let times = printed(
            "ffprobe",
            [
                "-v",
                "error",
                "-select_streams",
                kind,
                "-show_entries",
                "packet=pts_time",
                "-of",
                "csv=p=0",
                output.to_str().unwrap(),
            ],
        );
        times
            .lines()
            .next()
            .unwrap()
            .trim_end_matches(',')
            .parse::<f64>()
            .unwrap()
    };
    assert!((first("v") - 1.5).abs() < 0.1, "{}", first("v"));
    assert!(
        (first("s") - first("v")).abs() < 0.002,
        "{} {}",
        first("s"),
        first("v")
    );
    let said = folder.run(["late.ts", "-o", "late.srt"]);
    assert_eq!(said.status, Some(0), "{said:?}");
    let subtitles = std::fs::read_to_string(folder.path("late.srt")).unwrap();
    assert!(subtitles.starts_with("1\n00:00:01,5"), "{subtitles}");
}

/// Each caption has the time of a frame in the file, although the demuxer may change its segment behind the first.
#[test]
fn captions_stand_on_frames() {
    let folder = Folder::new();
    folder.make(
        "late.mkv",
        "-f lavfi -i sine=duration=5 -itsoffset 1.2 -f lavfi -i testsrc2=size=64x48:rate=10:duration=4 \
         -vsync vfr -c:v libx264 -preset ultrafast -c:a aac",
    );
    // With an edit list.
    folder.make("late.mp4", "-i late.mkv -c copy");
    for name in ["late.mkv", "late.mp4"] {
        let said = folder.run([name, "-o", "-", "--format", "jsonl"]);
        assert!(!said.err.contains("warning"), "{said:?}");
        assert_eq!(said.status, Some(0), "{said:?}");
        let path = folder.path(name);
        let entries = [
            "-v",
            "error",
            "-select_streams",
            "v",
            "-show_entries",
            "packet=pts_time:format=start_time",
            "-of",
            "csv=p=0",
        ];
        let times = printed(
            "ffprobe",
            entries.into_iter().chain([path.to_str().unwrap()]),
        );
        let mut times: Vec<f64> = times
            .lines()
            .map(|line| line.trim_end_matches(',').parse().unwrap())
            .collect();
        let start = times.pop().unwrap();
        let captions: Vec<serde_json::Value> = said
            .out
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(captions.len(), 4);
        for caption in captions {
            let time = caption["stream-time"].as_f64().unwrap() / 1e9;
            assert!(
                times
                    .iter()
                    .any(|frame| (frame - start - time).abs() < 0.002),
                "{name}: {time}: {times:?}"
            );
        }
    }
}

/// Only the picture is new.
#[test]
fn burning_encodes_the_video_alone() {
    let folder = Folder::new();
    let input = rich(&folder);
    let said = folder.run(["burn", "rich.mkv", "-o", "burnt.mkv"]);
    assert_eq!(said.status, Some(0), "{said:?}");
    let output = folder.path("burnt.mkv");
    assert_eq!(packets(&output, "a"), packets(&input, "a"));
    assert_eq!(packets(&output, "s"), packets(&input, "s"));
    let size = printed(
        "ffprobe",
        [
            "-v",
            "error",
            "-select_streams",
            "v",
            "-show_entries",
            "stream=codec_name,width,height,nb_read_frames",
            "-count_frames",
            "-of",
            "csv=p=0",
            output.to_str().unwrap(),
        ],
    );
    assert_eq!(size, "h264,64,48,40\n");
    // White letters on the red picture.
    let frame = printed(
        "ffprobe",
        [
            "-v",
            "error",
            "-f",
            "lavfi",
            "-i",
            &format!("movie={},signalstats", output.display()),
            "-show_entries",
            "frame_tags=lavfi.signalstats.YMAX",
            "-of",
            "csv=p=0",
            "-read_intervals",
            "%+#1",
        ],
    );
    let brightest: f64 = frame.lines().next().unwrap().parse().unwrap();
    assert!(brightest > 180.0, "{brightest}");
}

/// Copied as they are, these would be shown in the wrong order.
#[test]
fn frames_without_display_times_are_not_copied() {
    let folder = Folder::new();
    folder.make(
        "b.avi",
        "-f lavfi -i testsrc2=size=64x48:rate=10:duration=2 -c:v libx264 -bf 3",
    );
    folder
        .run(["b.avi"])
        .fails_with(1, &["b.avi", "wrong order", "-o out.vtt", "burn"]);
    let said = folder.run(["b.avi", "-o", "b.vtt"]);
    assert_eq!(said.status, Some(0), "{said:?}");
    folder.make(
        "p.avi",
        "-f lavfi -i testsrc2=size=64x48:rate=10:duration=2 -c:v mpeg4",
    );
    let said = folder.run(["p.avi"]);
    assert_eq!(said.status, Some(0), "{said:?}");
}
