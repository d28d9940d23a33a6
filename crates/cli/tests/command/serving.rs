//! The web pages, asked as a browser asks.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    os::unix::fs::symlink,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::common::{Folder, Said, packets, printed, send};

/// The command while it serves.
struct Server {
    child: Child,
    port: u16,
    errors: BufReader<std::process::ChildStderr>,
}

impl Server {
    fn start(mut command: Command) -> Self {
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut errors = BufReader::new(child.stderr.take().unwrap());
        let mut said = String::new();
        let port = loop {
            let mut line = String::new();
            let read = errors.read_line(&mut line).unwrap();
            assert!(read > 0, "it does not serve: {said}");
            said.push_str(&line);
            if let Some(rest) = line.strip_prefix("Serving http://127.0.0.1:") {
                let (port, rest) = rest.split_once(' ').unwrap();
                assert_eq!(rest, "for this machine only; Ctrl-C ends it\n");
                break port.parse().unwrap();
            }
        };
        Self {
            child,
            port,
            errors,
        }
    }

    /// Sends a request, and returns the connection to read the answer from.
    fn ask(&self, path: &str, headers: &str) -> TcpStream {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nConnection: close\r\n{headers}\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        stream
    }

    /// Head and body of an answer.
    fn get(&self, path: &str, headers: &str) -> (String, Vec<u8>) {
        let headers = format!("Host: localhost:{}\r\n{headers}", self.port);
        let mut answer = Vec::new();
        self.ask(path, &headers).read_to_end(&mut answer).unwrap();
        let end = answer.windows(4).position(|four| four == b"\r\n\r\n");
        let body = answer.split_off(end.unwrap() + 4);
        (String::from_utf8(answer).unwrap(), body)
    }

    /// Reads an answer that does not end, until it has all these words.
    fn read_until(&self, path: &str, words: &[&str]) -> String {
        let stream = self.ask(path, "Host: localhost\r\n");
        let mut text = String::new();
        // Signs of life come all the time.
        let deadline = Instant::now() + Duration::from_secs(120);
        for line in BufReader::new(stream).lines() {
            text.push_str(&line.unwrap());
            text.push('\n');
            if words.iter().all(|word| text.contains(word)) {
                return text;
            }
            if Instant::now() > deadline {
                break;
            }
        }
        panic!("{words:?} did not come: {text}");
    }

    /// The status with which it ends after a signal, within some seconds, and what it said.
    fn end(mut self, signal: &str) -> (Option<i32>, String) {
        send(&self.child, signal);
        let asked = Instant::now();
        let status = self.child.wait().unwrap();
        assert!(
            asked.elapsed() < Duration::from_secs(5),
            "{:?}",
            asked.elapsed()
        );
        let mut said = String::new();
        self.errors.read_to_string(&mut said).unwrap();
        (status.code(), said)
    }
}

impl Drop for Server {
    /// A test that fails leaves no server behind.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn serve(folder: &Folder, arguments: &str) -> Server {
    let arguments = arguments.split(' ');
    let mut command = folder.vlmnarrate(
        ["serve", "--listen", "127.0.0.1:0"]
            .into_iter()
            .chain(arguments),
    );
    command.env("TMPDIR", folder.path("."));
    Server::start(command)
}

#[test]
fn a_video_is_served_with_its_transcript() {
    let folder = Folder::new();
    let input = folder.red("a & b.mp4", 3);
    symlink("a & b.mp4", folder.path("a")).unwrap();
    let server = serve(&folder, "a");
    let (head, page) = server.get("/", "");
    let page = String::from_utf8(page).unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    for header in [
        "cache-control: no-store",
        "cross-origin-resource-policy: same-origin",
        "x-content-type-options: nosniff",
        "content-security-policy: frame-ancestors 'none'",
    ] {
        assert!(head.contains(header), "{head}");
    }
    assert!(page.contains("<h1>a</h1>") && page.contains("default-src 'none'"));
    assert!(!page.contains("://"), "it loads nothing from elsewhere");

    let file = fs::read(&input).unwrap();
    let (head, part) = server.get("/video", "Range: bytes=100-199\r\n");
    assert!(head.starts_with("HTTP/1.1 206 "), "{head}");
    assert!(head.contains("content-type: video/mp4\r\n"), "{head}");
    let range = format!("content-range: bytes 100-199/{}\r\n", file.len());
    assert!(head.contains(&range), "{head}");
    assert_eq!(part, file[100..200]);
    assert_eq!(server.get("/video", "").1, file);

    let words = [
        "A solid red screen.",
        r#""narration":"whole""#,
        "demo ",
        "\nid: ",
    ];
    let events = server.read_until("/events", &words);
    assert_eq!(events.matches("event: caption").count(), 1, "{events}");
    let vtt = String::from_utf8(server.get("/captions.vtt", "").1).unwrap();
    let (note, cues) = vtt.split_once("\n\n0").unwrap();
    assert!(note.contains(" with demo "), "{vtt}");
    assert_eq!(
        cues,
        "0:00:00.000 --> 00:00:03.000\nA solid red screen.\n\n"
    );
    assert!(server.get("/else", "").0.starts_with("HTTP/1.1 404 "));

    // Who comes late gets all of it, who comes back what was missed.
    let id = events.split("id: ").nth(1).unwrap().lines().next().unwrap();
    let again = server.read_until("/events", &words);
    assert!(again.contains(&format!("id: {id}\n")), "{again}");
    let path = format!("/events?after={id}");
    let missed = server.read_until(&path, &["event: ping"]);
    assert!(!missed.contains("event: caption"), "{missed}");

    let (status, said) = server.end("INT");
    assert_eq!(status, Some(130), "{said}");
    assert_eq!(folder.names(), ["a", "a & b.mp4"]);
}

/// A site whose name has come to mean this machine must not see the video.
#[test]
fn another_name_of_this_machine_is_refused() {
    let folder = Folder::new();
    folder.red("a.mp4", 1);
    let server = serve(&folder, "a.mp4");
    for path in ["/", "/video", "/events", "/captions.vtt"] {
        for host in ["Host: elsewhere.example\r\n", ""] {
            let mut answer = String::new();
            let _ = server.ask(path, host).read_to_string(&mut answer);
            let status = answer.split(' ').nth(1).unwrap_or_default();
            assert!(["403", "400"].contains(&status), "{path}: {answer}");
            assert!(!answer.contains("<html"));
        }
    }
    assert_eq!(server.end("TERM").0, Some(143));
}

#[test]
fn what_browsers_cannot_play_is_made_into_an_mp4() {
    let folder = Folder::new();
    folder.make(
        "odd.mkv",
        "-f lavfi -i testsrc2=size=321x241:rate=10:duration=2 -f lavfi -i sine=duration=2 -c:v ffv1 -c:a flac",
    );
    folder.make(
        "h264.mkv",
        "-f lavfi -i testsrc2=size=320x240:rate=10:duration=2 -pix_fmt yuv420p -c:v libx264",
    );
    for name in ["odd.mkv", "h264.mkv"] {
        let server = serve(&folder, name);
        server.read_until("/events", &[r#""video":"ready""#]);
        let (head, video) = server.get("/video", "");
        assert!(head.contains("content-type: video/mp4\r\n"), "{head}");
        let made = folder.path("made.mp4");
        fs::write(&made, video).unwrap();
        let streams = [
            "-v",
            "error",
            "-show_entries",
            "stream=codec_name,pix_fmt",
            "-of",
            "csv=p=0",
            made.to_str().unwrap(),
        ];
        let streams = printed("ffprobe", streams);
        match name {
            "odd.mkv" => assert_eq!(streams, "h264,yuv420p\naac\n"),
            // Not encoded anew.
            _ => assert_eq!(packets(&made, "v"), packets(&folder.path(name), "v")),
        }
        assert_eq!(server.end("INT").0, Some(130));
        fs::remove_file(made).unwrap();
        assert_eq!(folder.names(), ["h264.mkv", "odd.mkv"]);
    }
}

#[test]
fn nothing_survives_the_server() {
    let folder = Folder::new();
    folder.make(
        "long.mkv",
        "-f lavfi -i testsrc2=size=1280x720:rate=25:duration=60 -c:v mpeg4",
    );
    let server = serve(&folder, "long.mkv --interval 0");
    let children = printed(
        "ps",
        ["-o", "pid=", "--ppid", &server.child.id().to_string()],
    );
    let child = children.trim().to_owned();
    assert!(!child.is_empty());
    // Pages that listen do not hold it up.
    let _listens = server.ask("/events", "Host: localhost\r\n");
    assert_eq!(server.end("INT").0, Some(130));
    let there = Command::new("kill").args(["-0", &child]).output().unwrap();
    assert!(!there.status.success(), "{child} is there");
    assert_eq!(folder.names(), ["long.mkv"]);
}

#[test]
fn what_cannot_be_served_says_why() {
    let folder = Folder::new();
    folder.red("a.mp4", 1);
    folder.make(
        "picture.png",
        "-f lavfi -i color=red:size=64x48 -frames:v 1",
    );
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap();
    let other = format!("--listen=127.0.0.1:{}", taken.port().wrapping_add(1).max(1));
    let address = taken.to_string();
    for (arguments, words) in [
        (
            ["a.mp4", "--listen", &address],
            ["is in use", other.as_str()],
        ),
        (
            ["a.mp4", "--listen", "nowhere.invalid:80"],
            ["no machine is named nowhere.invalid", "--listen="],
        ),
        (
            ["picture.png", "--listen", "0"],
            ["this is a picture", "vlmnarrate picture.png"],
        ),
        (
            ["rtsp://localhost/a", "--listen", "0"],
            ["live stream", "vlmnarrate live rtsp://localhost/a --serve"],
        ),
        (
            ["missing.mp4", "--listen", "0"],
            ["missing.mp4", "no such file"],
        ),
    ] {
        let said = folder.run([&["serve"][..], &arguments].concat());
        said.fails_with(1, &words);
    }
    let said = folder.run(["serve", "a.mp4", "--listen", "localhost:http"]);
    assert_eq!(said.status, Some(2), "{said:?}");
    assert!(said.err.contains("such as 127.0.0.1:8080"), "{said:?}");
}

#[test]
fn a_page_is_written_into_a_folder() {
    let folder = Folder::new();
    let input = folder.red("a.mp4", 3);
    let said = folder.run([
        "serve",
        "a.mp4",
        "--write",
        "page",
        "--choices",
        "a <b> & c",
    ]);
    assert_eq!(said.status, Some(0), "{said:?}");
    assert_eq!(folder.names(), ["a.mp4", "page"]);
    let names = Folder::names_in(&folder.path("page"));
    assert_eq!(names, ["captions.vtt", "index.html", "video.mp4"]);
    let file = |name: &str| fs::read(folder.path("page").join(name)).unwrap();
    assert_eq!(file("video.mp4"), fs::read(&input).unwrap());
    let page = String::from_utf8(file("index.html")).unwrap();
    let item = "<button type=\"button\" data-start=\"0.000\" data-end=\"3.000\"><time>0:00</time> \
                <span>a &lt;b&gt; &amp; c</span></button>";
    assert!(page.contains(item), "{page}");
    assert!(page.contains("<b id=\"model\">demo "), "{page}");
    let vtt = String::from_utf8(file("captions.vtt")).unwrap();
    assert!(
        vtt.ends_with("00:00:00.000 --> 00:00:03.000\na &lt;b&gt; &amp; c\n\n"),
        "{vtt}"
    );

    // Again only if it is meant, and never over what is not ours.
    let again = ["serve", "a.mp4", "--write", "page"];
    folder.run(again).fails_with(1, &["page", "--force"]);
    let said = folder.run([&again[..], &["--force"]].concat());
    assert_eq!(said.status, Some(0), "{said:?}");
    assert!(
        !String::from_utf8(file("captions.vtt"))
            .unwrap()
            .contains("&amp;")
    );
    let own = folder.path("page/video.mp4");
    let input_inside = ["serve", "page/video.mp4", "--write", "page", "--force"];
    folder
        .run(input_inside)
        .fails_with(1, &["the input is in this folder"]);
    assert!(own.exists());
    fs::write(folder.path("page/mine.txt"), "mine").unwrap();
    let forced = [&again[..], &["--force"]].concat();
    folder
        .run(&forced)
        .fails_with(1, &["mine.txt", "name another"]);
    fs::remove_file(folder.path("page/mine.txt")).unwrap();
    fs::write(folder.path("page/index.html"), "mine").unwrap();
    folder
        .run(&forced)
        .fails_with(1, &["no page of vlmnarrate", "name another"]);
    assert_eq!(
        fs::read_to_string(folder.path("page/index.html")).unwrap(),
        "mine"
    );
    let nowhere = ["serve", "a.mp4", "--write", "missing/page"];
    folder
        .run(nowhere)
        .fails_with(1, &["missing/page", "does not exist"]);
    assert_eq!(folder.names(), ["a.mp4", "page"]);
}

#[test]
fn an_interrupted_folder_is_whole() {
    let folder = Folder::new();
    folder.red("slow.mp4", 60);
    let arguments = "serve slow.mp4 --write page --interval 0";
    let (child, _out, line) = crate::common::first_line(folder.vlmnarrate(arguments.split(' ')));
    assert!(line.starts_with("0:00.0  "), "{line}");
    send(&child, "INT");
    let said = Said::from(child.wait_with_output().unwrap());
    assert_eq!(said.status, Some(130), "{said:?}");
    assert_eq!(folder.names(), ["page", "slow.mp4"]);
    let page = fs::read_to_string(folder.path("page/index.html")).unwrap();
    assert!(page.contains("<span>A solid red"), "{page}");
}

/// Reads the stream for so long, into a file.
fn watch(server: &Server, to: &Path) {
    let mut stream = server.ask("/video.webm", "Host: localhost\r\n");
    let deadline = Instant::now() + Duration::from_secs(3);
    let (mut answer, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
    while Instant::now() < deadline {
        let read = stream.read(&mut buffer).unwrap();
        answer.extend_from_slice(&buffer[..read]);
    }
    // The body comes in chunks with their lengths.
    let mut at = answer
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .unwrap()
        + 4;
    let mut body = Vec::new();
    while let Some(end) = answer[at..].windows(2).position(|two| two == b"\r\n") {
        let length = std::str::from_utf8(&answer[at..at + end]).unwrap();
        let length = usize::from_str_radix(length, 16).unwrap();
        let start = at + end + 2;
        let Some(chunk) = answer.get(start..start + length) else {
            break;
        };
        body.extend_from_slice(chunk);
        at = start + length + 2;
        if at > answer.len() {
            break;
        }
    }
    fs::write(to, body).unwrap();
}

#[test]
fn a_live_source_is_served() {
    let folder = Folder::new();
    let server = Server::start(folder.vlmnarrate(["live", "test", "--serve=127.0.0.1:0"]));
    let (_, page) = server.get("/", "");
    let page = String::from_utf8(page).unwrap();
    assert!(page.contains("<h1>Live narration</h1>") && !page.contains("{{"));
    let words = [
        "event: words",
        "event: caption",
        "demo ",
        "white ball",
        "\nid: ",
    ];
    let first = server.read_until("/captions", &words);
    let id = first.split("id: ").nth(1).unwrap().lines().next().unwrap();
    let path = format!("/captions?after={id}");
    let missed = server.read_until(&path, &["event: caption", "\nid: "]);
    assert!(!missed.contains(&format!("id: {id}\n")), "{missed}");
    // Long after the first frame, a client can still begin, and sees whole pictures.
    let asleep = server.ask("/video.webm", "Host: localhost\r\n");
    let seen = folder.path("seen.webm");
    watch(&server, &seen);
    let frames = [
        "-v",
        "error",
        "-show_entries",
        "frame=key_frame,width",
        "-of",
        "csv=p=0",
        seen.to_str().unwrap(),
    ];
    let frames = Command::new("ffprobe").args(frames).output().unwrap();
    let frames = String::from_utf8(frames.stdout).unwrap();
    assert!(frames.starts_with("1,640"), "{frames}");
    assert!(frames.lines().count() > 5, "{frames}");
    drop(asleep);
    let (status, said) = server.end("INT");
    assert_eq!((status, said.as_str()), (Some(130), ""));
}

#[test]
fn a_live_page_names_its_option() {
    let folder = Folder::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let serve = format!("--serve={}", taken.local_addr().unwrap());
    let said = folder.run(["live", "test", &serve]);
    said.fails_with(1, &["is in use", "--serve=127.0.0.1:"]);
}
