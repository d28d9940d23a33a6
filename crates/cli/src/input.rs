//! What is to be described: a file, a pipe or a URL.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileTypeExt, MetadataExt},
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context, Result, bail};
use gst::glib;

use crate::{
    ffmpeg,
    probe::{self, Probe},
    processes::{self, Bound, own_descriptor},
};

/// A video, or what can be read as one.
pub struct Input {
    /// As the user wrote it, for messages.
    pub name: String,
    /// For GStreamer.
    pub uri: String,
    /// For FFmpeg; `None` for a pipe, which can be read once.
    pub location: Option<OsString>,
    /// The file on disk, if it has a name there.
    pub path: Option<PathBuf>,
    /// What FFmpeg found; `None` where it can't look, or is not installed.
    pub probe: Option<Probe>,
    /// Why FFmpeg can't read it, for the case that GStreamer can't either.
    pub unreadable: Option<String>,
    /// Device and inode of the file.
    identity: Option<(u64, u64)>,
    /// Keeps a pipe open, or a copy of what came out of it.
    _file: Option<File>,
    /// FFmpeg, if it reads the file for GStreamer.
    _reader: Option<Bound>,
    /// Whether FFmpeg missed parts of a playlist.
    is_incomplete: Arc<AtomicBool>,
}

impl Input {
    /// Opens what the user named. `whole` says that it is read twice, so that a pipe must be stored first.
    ///
    /// # Errors
    ///
    /// There is nothing of that name, or it can't be read, or there is no video in it.
    pub fn open(name: &OsStr, whole: bool) -> Result<Self> {
        let shown = shown(name);
        let shown = if name == "-" {
            "standard input".to_owned()
        } else {
            shown
        };
        let mut input = Self::find(name, &shown, whole).with_context(|| shown.clone())?;
        if let Some(location) = &input.location {
            match probe::probe(location) {
                Ok(probe) => input.probe = probe,
                // GStreamer may know more.
                Err(error) if input.path.is_some() && !whole => {
                    input.unreadable = Some(format!("{error:#}"));
                }
                Err(error) => return Err(error.context(shown)),
            }
        }
        if let Some(probe) = &input.probe
            && probe.video().is_none()
        {
            bail!("{shown}: there is no video in it; name a video or a picture");
        }
        if let Some(probe) = &input.probe
            && probe.needs_decoding()
            && let Some(location) = &input.location
        {
            match ffmpeg::decode(location) {
                Ok(Some(frames)) => {
                    input.uri = glib::filename_to_uri(own_descriptor(&frames), None)?.into();
                    input._file = Some(frames);
                }
                // GStreamer may know more.
                _ => {
                    let codec = probe
                        .video()
                        .map_or("unknown", |video| video.codec_name.as_str());
                    let reason = format!(
                        "neither FFmpeg nor GStreamer can decode this picture ({codec}); save it as PNG or MP4"
                    );
                    input.unreadable = Some(reason);
                }
            }
        }
        Ok(input)
    }

    /// An input of which nothing else is known yet.
    fn new(name: String, uri: String) -> Self {
        Self {
            name,
            uri,
            location: None,
            path: None,
            probe: None,
            unreadable: None,
            identity: None,
            _file: None,
            _reader: None,
            is_incomplete: Arc::default(),
        }
    }

    fn find(name: &OsStr, shown: &str, whole: bool) -> Result<Self> {
        if name == "-" {
            return Self::standard_input(whole);
        }
        if let Some(text) = name.to_str()
            && let Some((scheme, rest)) = text.split_once("://")
            && !scheme.is_empty()
            && scheme
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
            && fs::symlink_metadata(name).is_err()
        {
            if scheme == "file" {
                let (path, _) = glib::filename_from_uri(text).context("not a URL of a file")?;
                return Self::file(&path, whole);
            }
            if rest.is_empty() {
                bail!("there is nothing behind ://");
            }
            return Ok(Self {
                location: (scheme != "rtsp" && scheme != "rtsps").then(|| name.to_owned()),
                ..Self::new(shown.to_owned(), text.to_owned())
            });
        }
        Self::file(Path::new(name), whole)
    }

    fn file(path: &Path, whole: bool) -> Result<Self> {
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                bail!("there is no such file; check the name");
            }
            Err(error) => bail!("{}; {}", said(&error), probe::remedy(&error.to_string())),
        };
        let kind = metadata.file_type();
        if kind.is_dir() {
            bail!("this is a folder; name a video file");
        }
        if kind.is_char_device() && path.starts_with("/dev/video") {
            bail!("this is a camera; use: vlmnarrate live {}", path.display());
        }
        if kind.is_fifo() {
            return Self::pipe(File::open(path)?, path.as_os_str(), whole);
        }
        if !kind.is_file() {
            bail!("this is no file, no pipe and no URL");
        }
        File::open(path).map_err(|error| {
            anyhow::anyhow!("{}; {}", said(&error), probe::remedy(&error.to_string()))
        })?;
        if metadata.len() == 0 {
            bail!("the file is empty; copy or download it anew");
        }
        let absolute = std::path::absolute(path)?;
        Ok(Self {
            location: Some(ffmpeg::file(&absolute)),
            path: Some(path.to_owned()),
            identity: Some((metadata.dev(), metadata.ino())),
            ..Self::new(
                shown(path.as_os_str()),
                glib::filename_to_uri(&absolute, None)
                    .context("the name can't be made a URL")?
                    .into(),
            )
        })
    }

    fn standard_input(whole: bool) -> Result<Self> {
        let file = File::from(rustix::io::dup(io::stdin()).context("standard input is closed")?);
        let metadata = file.metadata()?;
        if metadata.is_file() {
            let location = own_descriptor(&file);
            return Ok(Self {
                location: Some(ffmpeg::file(&location)),
                identity: Some((metadata.dev(), metadata.ino())),
                _file: Some(file),
                ..Self::new(
                    "standard input".into(),
                    glib::filename_to_uri(&location, None)?.into(),
                )
            });
        }
        if io::IsTerminal::is_terminal(&file) {
            bail!("standard input is a terminal; pipe a video into it");
        }
        Self::pipe(file, OsStr::new("standard input"), whole)
    }

    fn pipe(mut file: File, name: &OsStr, whole: bool) -> Result<Self> {
        let name = shown(name);
        if !whole {
            let uri = format!("fd://{}", file.as_raw_fd());
            return Ok(Self {
                _file: Some(file),
                ..Self::new(name, uri)
            });
        }
        // It has no name, so nothing is left of it whatever happens.
        let mut copy = tempfile::tempfile().context(
            "no temporary file for what comes through the pipe; set TMPDIR to a folder with room",
        )?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            if let Some(signal) = processes::asked_to_end() {
                processes::exit(128 + signal);
            }
            let read = match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            copy.write_all(&buffer[..read])
                .context("the temporary copy of what comes through the pipe can't be written; set TMPDIR to a folder with room")?;
        }
        if copy.metadata()?.len() == 0 {
            bail!("nothing came through the pipe; look at the program before it");
        }
        let location = own_descriptor(&copy);
        Ok(Self {
            location: Some(ffmpeg::file(&location)),
            _file: Some(copy),
            ..Self::new(name, glib::filename_to_uri(&location, None)?.into())
        })
    }

    /// Lets FFmpeg read the file for GStreamer too, if the two would give its frames different times. Then what is copied
    /// and what is described have the same.
    ///
    /// # Errors
    ///
    /// FFmpeg can't be started.
    pub fn share_times(&mut self) -> Result<()> {
        let (Some(probe), Some(location)) = (&self.probe, &self.location) else {
            return Ok(());
        };
        let Some(video) = probe.video().filter(|_| probe.has_loose_times()) else {
            return Ok(());
        };
        let mut command = Command::new("ffmpeg");
        command
            .args(["-v", "warning", "-nostdin", "-fflags", "+genpts"])
            .args(probe::network_options(location))
            .arg("-i")
            .arg(location)
            .args(["-map".to_owned(), format!("0:{}", video.index)])
            .args(["-c", "copy", "-f", "matroska", "pipe:1"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut reader = Bound::spawn(&mut command)?;
        let pipe = File::from(OwnedFd::from(
            reader.stdout.take().context("ffmpeg has no stdout")?,
        ));
        if let Some(errors) = reader.stderr.take() {
            let is_incomplete = self.is_incomplete.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(errors).split(b'\n').map_while(Result::ok) {
                    if String::from_utf8_lossy(&line).contains("Failed to open segment") {
                        is_incomplete.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
        self.uri = format!("fd://{}", pipe.as_raw_fd());
        self._file = Some(pipe);
        self._reader = Some(reader);
        Ok(())
    }

    /// What a page calls it: the name without folders, addresses and control characters.
    pub fn title(&self) -> String {
        let path = match self.path {
            None if self.name.contains("://") => {
                self.name.split(['?', '#']).next().unwrap_or_default()
            }
            _ => &self.name,
        };
        let last = path.trim_end_matches('/').rsplit('/').next();
        last.filter(|name| !name.is_empty())
            .unwrap_or(&self.name)
            .to_owned()
    }

    /// Whether this file is the input, under whatever name.
    pub fn is(&self, metadata: &fs::Metadata) -> bool {
        self.identity == Some((metadata.dev(), metadata.ino()))
    }

    /// Whether it goes on for as long as one looks.
    pub fn is_live(&self) -> bool {
        ["rtsp", "rtsps", "rtmp", "rtp", "udp", "srt"]
            .iter()
            .any(|scheme| self.uri.split("://").next() == Some(scheme))
    }

    /// Whether segments of a playlist could not be read.
    pub fn lacks_segments(&self) -> bool {
        self.is_incomplete.load(Ordering::Relaxed)
    }

    /// Whether the file is shorter than its own header says: an AVI, or a JPEG without its end mark. Of other files the
    /// times of their frames tell it.
    pub fn lacks_its_end(&self) -> bool {
        let look = |path: &PathBuf| -> io::Result<bool> {
            let mut file = File::open(path)?;
            let length = file.metadata()?.len();
            let mut head = [0; 12];
            file.read_exact(&mut head)?;
            if head.starts_with(b"RIFF") && head.ends_with(b"AVI ") {
                let said = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
                return Ok(u64::from(said) + 8 > length);
            }
            if head.starts_with(&[0xff, 0xd8, 0xff]) {
                // Cameras put more behind the picture; a mark near the end will do.
                let mut tail = Vec::new();
                file.seek(SeekFrom::Start(length.saturating_sub(1 << 16)))?;
                file.read_to_end(&mut tail)?;
                return Ok(!tail.windows(2).any(|pair| pair == [0xff, 0xd9]));
            }
            Ok(false)
        };
        self.path
            .as_ref()
            .is_some_and(|path| look(path).unwrap_or(false))
    }

    /// Whether it is one picture that does not move.
    pub fn is_still(&self) -> bool {
        self.probe.as_ref().is_some_and(Probe::is_still)
    }
}

/// A name in one line, however it is written.
pub fn shown(name: &OsStr) -> String {
    let name = String::from_utf8_lossy(name.as_bytes());
    if name.chars().any(char::is_control) {
        name.escape_debug().collect()
    } else {
        name.into_owned()
    }
}

/// What went wrong, without the number of the error.
pub fn said(error: &io::Error) -> String {
    let text = error.to_string();
    match text.rfind(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}
