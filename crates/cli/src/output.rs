//! Files that are written whole or not at all.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use anyhow::{Result, anyhow, bail};
use clap::ValueEnum;

use crate::{
    input::{Input, said, shown},
    part::Part,
};

/// What a narration is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Matroska: all streams of the input, and the captions as a subtitle track.
    Mkv,
    /// MP4: all streams of the input that it can hold, and the captions as a subtitle track.
    Mp4,
    /// WebVTT subtitles.
    Vtt,
    /// SubRip subtitles.
    Srt,
    /// One JSON object per caption, with every field.
    Jsonl,
    /// One page with a picture of each frame that was described.
    Html,
    /// Lines of time and caption.
    Txt,
}

impl Format {
    /// Tells the format by the file's suffix.
    fn of(path: &Path) -> Option<Self> {
        let suffix = path.extension()?.to_str()?.to_ascii_lowercase();
        Self::from_str(&suffix, false).ok()
    }

    /// Whether the streams of the input are in it.
    pub fn copies(self) -> bool {
        matches!(self, Self::Mkv | Self::Mp4)
    }

    /// Whether it can't be written to standard output.
    pub fn needs_name(self) -> bool {
        self.copies() || self == Self::Html
    }

    /// The name that people know it by.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mkv => "Matroska",
            Self::Mp4 => "MP4",
            Self::Vtt => "WebVTT",
            Self::Srt => "SubRip",
            Self::Jsonl => "JSON lines",
            Self::Html => "HTML",
            Self::Txt => "text",
        }
    }
}

/// Where the user wants a narration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Standard output.
    Stdout(Format),
    /// A file.
    File(PathBuf, Format),
}

impl Target {
    /// Decides by the option `-o`, the option `--format`, and the formats that are possible.
    ///
    /// # Errors
    ///
    /// The format is not known, or not one of those.
    pub fn choose(output: &OsStr, format: Option<Format>, possible: &[Format]) -> Result<Self> {
        let list = || {
            let names: Vec<_> = possible
                .iter()
                .filter_map(ValueEnum::to_possible_value)
                .collect();
            let names: Vec<_> = names
                .iter()
                .map(|name| format!(".{}", name.get_name()))
                .collect();
            match names.split_last() {
                Some((last, [])) => last.clone(),
                Some((last, others)) => format!("{} or {last}", others.join(", ")),
                None => String::new(),
            }
        };
        if output == "-" {
            let format = format.unwrap_or(Format::Txt);
            if format.needs_name() || !possible.contains(&format) {
                bail!(
                    "-o -: {} can't be written to standard output; name a file",
                    format.name()
                );
            }
            return Ok(Self::Stdout(format));
        }
        let path = PathBuf::from(output);
        let format = format
            .or_else(|| Format::of(&path))
            .filter(|format| possible.contains(format))
            .ok_or_else(|| {
                anyhow!(
                    "{}: the output's name must end in {}",
                    shown(output),
                    list()
                )
            })?;
        Ok(Self::File(path, format))
    }
}

/// A file that gets its name when it is whole.
pub struct Output {
    /// The name that it will have.
    path: PathBuf,
    replace: bool,
    part: Part,
    /// Where it is.
    folder: PathBuf,
}

impl Output {
    /// Opens a file beside the one that is to be.
    ///
    /// # Errors
    ///
    /// It would replace an input, or a file without `force`, or can't be written.
    pub fn create(path: &Path, inputs: &[&Input], force: bool) -> Result<Self> {
        let name = shown(path.as_os_str());
        if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            bail!("{name}: this is the name of a folder; name a file with -o");
        }
        // A link to a file stays a link.
        let path = match fs::metadata(path) {
            Ok(metadata) => {
                let kind = metadata.file_type();
                if kind.is_dir() {
                    bail!("{name}: this is a folder; name a file in it");
                }
                if !kind.is_file() || kind.is_char_device() {
                    bail!("{name}: this is no regular file; name another output with -o");
                }
                if inputs.iter().any(|input| input.is(&metadata)) {
                    bail!("{name}: the output is the input; name another file with -o");
                }
                if !force {
                    bail!(
                        "{name}: the file exists; replace it with --force, or name another with -o"
                    );
                }
                fs::canonicalize(path)?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if fs::symlink_metadata(path).is_ok() {
                    bail!(
                        "{name}: this is a link to a file that does not exist; name another output with -o"
                    );
                }
                path.to_owned()
            }
            Err(error) => bail!("{name}: {}; name another output with -o", said(&error)),
        };
        let folder = match path.parent() {
            Some(folder) if folder.as_os_str().is_empty() => PathBuf::from("."),
            Some(folder) => folder.to_owned(),
            None => bail!("{name}: name a file"),
        };
        if path.file_name().is_none() {
            bail!("{name}: name a file");
        }
        let part = Part::create(&folder).map_err(|error| {
            let why = match error.kind() {
                io::ErrorKind::NotFound => "the folder does not exist".to_owned(),
                _ => format!("the folder can't be written to ({})", said(&error)),
            };
            anyhow!("{name}: {why}; name another output with -o")
        })?;
        Ok(Self {
            path,
            replace: force,
            folder,
            part,
        })
    }

    /// A path by which children can open the unfinished file.
    pub fn part(&self) -> PathBuf {
        self.part.path()
    }

    /// The folder that it will be in.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The unfinished file.
    pub fn file(&mut self) -> &mut File {
        self.part.file()
    }

    /// The name that the file will have.
    pub fn name(&self) -> String {
        shown(self.path.as_os_str())
    }

    /// Gives the file its name, and returns it. A run that `failed` leaves no file where there is an older one.
    ///
    /// # Errors
    ///
    /// Another file has got that name meanwhile, or the disk fails.
    pub fn finish(self, failed: bool) -> Result<Option<String>> {
        let name = self.name();
        if failed && fs::symlink_metadata(&self.path).is_ok() {
            return Ok(None);
        }
        match self.part.persist(&self.path, self.replace) {
            Ok(()) => Ok(Some(name)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                bail!("{name}: a file of that name was made meanwhile; try again with another -o")
            }
            Err(error) => bail!("{name}: {}", said(&error)),
        }
    }
}

/// The output's name if the user gives none: `holiday.mp4` becomes `holiday.narrated.mkv`.
pub fn default_path(input: &Path, added: &str) -> PathBuf {
    let mut name = input.file_stem().unwrap_or(OsStr::new("video")).to_owned();
    name.push(added);
    input.with_file_name(name)
}
