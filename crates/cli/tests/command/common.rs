//! Runs the command, and makes videos for it.

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Output, Stdio},
};

use tempfile::TempDir;

/// A folder for one test, gone behind it.
pub struct Folder(TempDir);

impl Folder {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.path().join(name)
    }

    /// The names in it.
    pub fn names(&self) -> Vec<String> {
        Self::names_in(self.0.path())
    }

    /// The names in a folder.
    pub fn names_in(path: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(path).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// The command, started in this folder.
    pub fn vlmnarrate(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vlmnarrate"));
        command
            .current_dir(self.0.path())
            .args(arguments)
            .stdin(Stdio::null())
            .env_remove("DISPLAY")
            .env_remove("WAYLAND_DISPLAY");
        command
    }

    /// Runs the command.
    pub fn run(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Said {
        self.vlmnarrate(arguments).output().unwrap().into()
    }

    /// Makes a file with `ffmpeg`, whose options are separated by spaces.
    pub fn make(&self, name: &str, options: &str) -> PathBuf {
        let path = self.path(name);
        let made = Command::new("ffmpeg")
            .args(["-v", "error", "-y", "-nostdin"])
            .args(options.split_whitespace())
            .arg(&path)
            .current_dir(self.0.path())
            .output()
            .unwrap();
        assert!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        path
    }

    /// Red for so many seconds, ten frames a second, and a tone.
    pub fn red(&self, name: &str, seconds: u32) -> PathBuf {
        self.make(
            name,
            &format!(
                "-f lavfi -i color=red:size=64x48:rate=10:duration={seconds} -f lavfi -i sine=duration={seconds} \
                 -c:v libx264 -preset ultrafast -c:a aac"
            ),
        )
    }
}

/// What the command said, and how it ended.
#[derive(Debug)]
pub struct Said {
    pub status: Option<i32>,
    pub out: String,
    pub err: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        Self {
            status: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Said {
    /// One line of error that has all these words.
    #[track_caller]
    pub fn fails_with(&self, status: i32, words: &[&str]) {
        assert_eq!(self.status, Some(status), "{self:?}");
        let errors: Vec<_> = self
            .err
            .lines()
            .filter(|line| line.starts_with("error: "))
            .collect();
        assert_eq!(errors.len(), 1, "{self:?}");
        for word in words {
            assert!(errors[0].contains(word), "{word}: {self:?}");
        }
    }
}

impl Said {
    /// The last line is this error.
    #[track_caller]
    pub fn fails_with_last(&self, status: i32, words: &str) {
        assert_eq!(self.status, Some(status), "{self:?}");
        assert_eq!(
            self.err.lines().last(),
            Some(format!("error: {words}").as_str()),
            "{self:?}"
        );
    }
}

/// What `ffprobe` or another program prints.
pub fn printed(program: &str, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> String {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = Said::from(output);
    assert_eq!((said.status, said.err.as_str()), (Some(0), ""), "{program}");
    said.out
}

/// Digests of the packets of the streams of one kind, as they are.
pub fn packets(file: &Path, streams: &str) -> Vec<String> {
    let file = file.to_str().unwrap();
    let map = format!("0:{streams}");
    let digests = printed(
        "ffmpeg",
        [
            "-v",
            "error",
            "-i",
            file,
            "-map",
            &map,
            "-c",
            "copy",
            "-f",
            "streamhash",
            "-",
        ],
    );
    digests
        .lines()
        .map(|line| line.rsplit('=').next().unwrap().to_owned())
        .collect()
}

/// The cues of a file's last subtitle track, as SubRip.
pub fn cues(file: &Path) -> String {
    let count = printed(
        "ffprobe",
        [
            OsStr::new("-v"),
            OsStr::new("error"),
            OsStr::new("-select_streams"),
            OsStr::new("s"),
            OsStr::new("-show_entries"),
            OsStr::new("stream=index"),
            OsStr::new("-of"),
            OsStr::new("csv=p=0"),
            file.as_os_str(),
        ],
    );
    let last = format!("0:{}", count.lines().last().unwrap());
    printed(
        "ffmpeg",
        [
            "-v",
            "error",
            "-i",
            file.to_str().unwrap(),
            "-map",
            &last,
            "-f",
            "srt",
            "-",
        ],
    )
}

/// Starts it and waits for its first line on stdout.
pub fn first_line(mut command: Command) -> (Child, BufReader<ChildStdout>, String) {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    (child, out, line)
}

/// Sends a signal such as `INT`.
pub fn send(child: &Child, signal: &str) {
    let sent = Command::new("kill")
        .args([&format!("-{signal}"), &child.id().to_string()])
        .status();
    assert!(sent.unwrap().success());
}
