//! Live video: a file in real time, a network camera, a window.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::common::{Folder, Said, first_line, send};

/// Ends with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a program that prints a line when it is ready; `None` if it is not installed.
fn server(program: &str, arguments: &[&str]) -> Option<(Server, String)> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take()?)
        .read_line(&mut line)
        .ok()?;
    let server = Server(child);
    (!line.is_empty()).then(|| (server, line.trim().to_owned()))
}

/// No faster than its time, and frames do not wait for the model.
#[test]
fn a_file_is_watched_in_real_time() {
    let folder = Folder::new();
    folder.make(
        "a.mp4",
        "-f lavfi -i color=red:size=64x48:rate=60:duration=6 -c:v libx264 -preset ultrafast",
    );
    let began = Instant::now();
    let slowly = [
        "--interval",
        "0",
        "--image-splitting",
        "--threads=1",
        "--drain-timeout=0",
    ];
    let said = folder.run([&["live", "a.mp4", "--format", "jsonl"][..], &slowly].concat());
    let took = began.elapsed();
    assert_eq!(said.status, Some(0), "{said:?}");
    assert!(took > Duration::from_secs(5), "{took:?}");
    // Of 360 frames.
    assert!(said.out.lines().count() < 300, "{said:?}");
    assert!(said.err.contains("There is no screen"), "{said:?}");
    assert!(said.err.contains("Watched 0:05"), "{said:?}");
}

#[test]
fn the_same_caption_is_printed_once() {
    let folder = Folder::new();
    folder.red("a.mp4", 3);
    let said = folder.run(["live", "a.mp4", "-o", "a.txt"]);
    assert_eq!((said.status, said.out.as_str()), (Some(0), ""), "{said:?}");
    assert!(said.err.contains("vlmnarrate live --model"), "{said:?}");
    let written = std::fs::read_to_string(folder.path("a.txt")).unwrap();
    assert_eq!(
        written.matches("A solid red screen.").count(),
        1,
        "{written}"
    );
}

#[test]
fn an_interrupt_ends_at_once() {
    let folder = Folder::new();
    let command = folder.vlmnarrate(["live", "test", "--format=jsonl"]);
    let (child, mut out, line) = first_line(command);
    let caption: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(caption["partial"], false);
    assert!(caption["text"].as_str().unwrap().contains("ball"), "{line}");
    send(&child, "INT");
    let asked = Instant::now();
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    let said = Said::from(child.wait_with_output().unwrap());
    assert_eq!(said.status, Some(130), "{said:?}");
    let took = asked.elapsed();
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[test]
fn a_source_that_is_not_there_is_named() {
    let folder = Folder::new();
    folder.make("a.png", "-f lavfi -i color=red:size=64x48 -frames:v 1");
    for (source, words) in [
        (&["/dev/video99"][..], "vlmnarrate live test"),
        (&["none.mp4"], "none.mp4: there is no such file"),
        (&["a.png"], "vlmnarrate a.png"),
        (&["rtsp://me:secret@127.0.0.1:9/x"], "rtsp://127.0.0.1:9/x"),
        (
            &["test", "-o", "/none/a.txt"],
            "/none/a.txt: the folder does not exist",
        ),
    ] {
        let said = folder.run([&["live"], source].concat());
        said.fails_with(1, &[words]);
        assert!(!said.err.contains("secret"), "{said:?}");
    }
    if !std::path::Path::new("/dev/video0").exists() {
        folder
            .run(["live"])
            .fails_with(1, &["vlmnarrate live test"]);
    }
    assert_eq!(folder.run(["live", "test", "-o", "a.mkv"]).status, Some(1));
    assert_eq!(folder.names(), ["a.png"]);
}

const RTSP: &str = r#"
import gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
server = GstRtspServer.RTSPServer(service="0")
factory = GstRtspServer.RTSPMediaFactory()
factory.set_launch("( videotestsrc is-live=true pattern=red ! video/x-raw,format=I420,width=320,height=240,framerate=15/1 "
    "! jpegenc ! rtpjpegpay name=pay0 audiotestsrc is-live=true ! alawenc ! rtppcmapay name=pay1 )")
server.get_mount_points().add_factory("/door", factory)
server.attach(None)
print(f"rtsp://127.0.0.1:{server.get_bound_port()}/door", flush=True)
GLib.MainLoop().run()
"#;

/// A network camera, with sound that nobody wants, until somebody pulls its plug.
#[test]
fn a_stream_that_breaks_off_is_an_error() {
    let Some((camera, url)) = server("/usr/bin/python3", &["-c", RTSP]) else {
        eprintln!("skipped: needs gir1.2-gst-rtsp-server-1.0");
        return;
    };
    let folder = Folder::new();
    let (child, mut out, line) = first_line(folder.vlmnarrate(["live", &url]));
    assert!(line.ends_with("  A solid red screen.\n"), "{line}");
    drop(camera);
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    let said = Said::from(child.wait_with_output().unwrap());
    said.fails_with(1, &[&url, "broke off after 0:0"]);
}

/// The picture in the window, and on it the caption: nothing else there is white.
#[test]
fn a_window_shows_the_caption() {
    let folder = Folder::new();
    let screen = [
        "-displayfd",
        "1",
        "-noreset",
        "-screen",
        "0",
        "640x480x24",
        "-fbdir",
    ];
    let path = folder.path(".");
    let screen = [&screen[..], &[path.to_str().unwrap()]].concat();
    let Some((_screen, display)) = server("Xvfb", &screen) else {
        eprintln!("skipped: needs xvfb");
        return;
    };
    folder.make(
        "a.mp4",
        "-f lavfi -i color=red:size=320x240:rate=10:duration=20 -c:v libx264",
    );
    let mut command = folder.vlmnarrate(["live", "a.mp4"]);
    command.env("DISPLAY", format!(":{display}"));
    let (child, _out, line) = first_line(command);
    if line.is_empty() {
        panic!("{:?}", Said::from(child.wait_with_output().unwrap()));
    }
    assert_eq!(line, "0:00.0  A solid red screen.\n");
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        let pixels = std::fs::read(folder.path("Xvfb_screen0")).unwrap();
        let count = |wanted: fn(&[u8]) -> bool| {
            let pixels = pixels.chunks_exact(4);
            pixels.filter(|pixel| wanted(pixel)).count()
        };
        let red = count(|pixel| pixel[2] > 200 && pixel[..2].iter().all(|&value| value < 50));
        let white = count(|pixel| pixel[..3].iter().all(|&value| value > 180));
        if red > 50_000 && white > 50 {
            break;
        }
        assert!(Instant::now() < deadline, "{red} red, {white} white");
        std::thread::sleep(Duration::from_millis(50));
    }
    send(&child, "INT");
    let said = Said::from(child.wait_with_output().unwrap());
    assert_eq!(said.status, Some(130), "{said:?}");
    assert!(!said.err.contains("no screen"), "{said:?}");
    // One that can't be opened is said, and captions are printed as ever.
    let mut command = folder.vlmnarrate(["live", "test"]);
    command.env("DISPLAY", ":4095");
    let (child, _out, _) = first_line(command);
    send(&child, "INT");
    let said = Said::from(child.wait_with_output().unwrap());
    assert_eq!(said.status, Some(130), "{said:?}");
    assert!(
        said.err.contains("DISPLAY=:4095 can't be opened"),
        "{said:?}"
    );
}
