//! A folder with a page, which gets its name when it is whole.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, bail};
use gst::glib;
use tempfile::TempDir;

use crate::{
    input::{Input, said, shown},
    processes::Unfinished,
};

/// By this a page is known as ours.
const OURS: &str = "name=\"generator\" content=\"vlmnarrate\"";

/// All that such a folder has.
const FILES: [&str; 4] = ["index.html", "captions.vtt", "video.mp4", "video.webm"];

/// The folder in the making, beside the one that is to be.
pub struct Folder {
    path: PathBuf,
    part: TempDir,
    _unfinished: Unfinished,
}

impl Folder {
    /// Makes a folder beside the one that is to be.
    ///
    /// # Errors
    ///
    /// What is there is not ours, or there is no `force`, or nothing can be written.
    pub fn create(path: &Path, input: &Input, force: bool) -> Result<Self> {
        let name = shown(path.as_os_str());
        // A link to a folder stays a link.
        let path = match fs::canonicalize(path) {
            Ok(path) => {
                may_replace(&path, input, force).with_context(|| name.clone())?;
                path
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if path.file_name().is_none() || fs::symlink_metadata(path).is_ok() {
                    bail!("{name}: name another folder with --write");
                }
                std::path::absolute(path)?
            }
            Err(error) => bail!("{name}: {}; name another folder with --write", said(&error)),
        };
        let parent = path
            .parent()
            .with_context(|| format!("{name}: name another folder with --write"))?;
        let part = tempfile::Builder::new()
            .prefix(".vlmnarrate-")
            .suffix(".part")
            // What the umask leaves of it, as for any new folder.
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777))
            .tempdir_in(parent)
            .map_err(|error| {
                let parent = shown(parent.as_os_str());
                let why = match error.kind() {
                    io::ErrorKind::NotFound => "does not exist".to_owned(),
                    _ => format!("can't be written to ({})", said(&error)),
                };
                anyhow!("{name}: the folder {parent} {why}; name another with --write")
            })?;
        Ok(Self {
            _unfinished: Unfinished::new(part.path()),
            path,
            part,
        })
    }

    /// The name that the folder will have.
    pub fn name(&self) -> String {
        shown(self.path.as_os_str())
    }

    /// Whether there is a folder of that name, which a run that failed must not replace.
    pub fn is_taken(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok()
    }

    /// The path of a file in it, as long as it is not whole.
    pub fn path(&self, name: &str) -> PathBuf {
        self.part.path().join(name)
    }

    /// Writes a file.
    ///
    /// # Errors
    ///
    /// The disk fails.
    pub fn write(&self, name: &str, text: &[u8]) -> Result<()> {
        fs::write(self.path(name), text)
            .map_err(|error| anyhow!("{}/{name}: {}", self.name(), said(&error)))
    }

    /// Gives the folder its name. Returns the address of its page.
    ///
    /// # Errors
    ///
    /// Something else has got that name meanwhile.
    pub fn finish(self) -> Result<String> {
        let name = self.name();
        let old = self.part.path().with_extension("old");
        let had = self.is_taken();
        let renamed = (|| {
            if had {
                fs::rename(&self.path, &old)?;
            }
            fs::rename(self.part.path(), &self.path).inspect_err(|_| {
                // What was there stays.
                let _ = fs::rename(&old, &self.path);
            })
        })();
        renamed.map_err(|error| anyhow!("{name}: {}", said(&error)))?;
        if had {
            fs::remove_dir_all(&old).with_context(|| shown(old.as_os_str()))?;
        }
        Ok(glib::filename_to_uri(self.path.join("index.html"), None)?.into())
    }
}

/// Whether a folder may go.
fn may_replace(path: &Path, input: &Input, force: bool) -> Result<()> {
    if !path.is_dir() {
        bail!("this is no folder; name another with --write");
    }
    let entries: Vec<_> = fs::read_dir(path)?.collect::<io::Result<_>>()?;
    if entries.is_empty() {
        return Ok(());
    }
    let page = fs::read_to_string(path.join("index.html")).unwrap_or_default();
    let other = (entries.iter()).find(|entry| !FILES.iter().any(|name| entry.file_name() == *name));
    if !page.contains(OURS) {
        bail!("the folder exists and has no page of vlmnarrate; name another with --write");
    }
    if let Some(other) = other {
        bail!(
            "the folder also has {}, which is not of vlmnarrate; name another with --write",
            shown(&other.file_name())
        );
    }
    for entry in &entries {
        if fs::metadata(entry.path()).is_ok_and(|metadata| input.is(&metadata)) {
            bail!("the input is in this folder; name another with --write");
        }
    }
    if !force {
        bail!("the folder exists; replace it with --force, or name another with --write");
    }
    Ok(())
}
