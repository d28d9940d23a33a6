//! An unfinished file, which has no name where the file system can do that.

use std::{
    fs::{File, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;

use crate::processes::Unfinished;

/// A file in a folder, to be named when it is whole.
pub enum Part {
    /// Nothing is left of it, whatever ends the process.
    #[cfg(target_os = "linux")]
    Unnamed(File),
    /// Where the file system or the operating system needs a name.
    Named(NamedTempFile, Unfinished),
}

impl Part {
    /// Makes a file in the folder.
    ///
    /// # Errors
    ///
    /// The folder can't be written to.
    pub fn create(folder: &Path) -> io::Result<Self> {
        #[cfg(target_os = "linux")]
        {
            use rustix::fs::{Mode, OFlags};
            let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
            // What the umask leaves of it, as for any new file.
            if let Ok(file) = rustix::fs::open(folder, flags, Mode::from_raw_mode(0o666)) {
                return Ok(Self::Unnamed(file.into()));
            }
        }
        let file = named(folder)?;
        let unfinished = Unfinished::new(file.path());
        Ok(Self::Named(file, unfinished))
    }

    /// The file, for this process.
    pub fn file(&mut self) -> &mut File {
        match self {
            #[cfg(target_os = "linux")]
            Self::Unnamed(file) => file,
            Self::Named(file, _) => file.as_file_mut(),
        }
    }

    /// A path by which children can open the file.
    pub fn path(&self) -> PathBuf {
        match self {
            #[cfg(target_os = "linux")]
            Self::Unnamed(file) => crate::processes::own_descriptor(file),
            Self::Named(file, _) => file.path().to_owned(),
        }
    }

    /// Gives the file its name.
    ///
    /// # Errors
    ///
    /// There is a file of that name and `replace` is not set, or the disk fails.
    pub fn persist(mut self, path: &Path, replace: bool) -> io::Result<()> {
        self.file().sync_all()?;
        match self {
            #[cfg(target_os = "linux")]
            Self::Unnamed(ref file) => {
                let own = crate::processes::own_descriptor(file);
                if !replace {
                    return link(&own, path);
                }
                // A link can't take the place of a file, a name can.
                let folder = path
                    .parent()
                    .filter(|folder| !folder.as_os_str().is_empty());
                let between = named(folder.unwrap_or(Path::new(".")))?;
                let between = between.into_temp_path();
                let _unfinished = Unfinished::new(&between);
                std::fs::remove_file(&between)?;
                link(&own, &between)?;
                std::fs::rename(&between, path)
            }
            Self::Named(file, _unfinished) => match replace {
                true => file.persist(path).map(drop).map_err(|error| error.error),
                false => file
                    .persist_noclobber(path)
                    .map(drop)
                    .map_err(|error| error.error),
            },
        }
    }
}

fn named(folder: &Path) -> io::Result<NamedTempFile> {
    tempfile::Builder::new()
        .prefix(".vlmnarrate-")
        .suffix(".part")
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(folder)
}

#[cfg(target_os = "linux")]
fn link(file: &Path, path: &Path) -> io::Result<()> {
    use rustix::fs::{AtFlags, CWD, linkat};
    Ok(linkat(CWD, file, CWD, path, AtFlags::SYMLINK_FOLLOW)?)
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write};

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    /// Both kinds: which of them `create` makes depends on the file system.
    fn both(folder: &Path) -> [Part; 2] {
        let file = named(folder).unwrap();
        let unfinished = Unfinished::new(file.path());
        [Part::create(folder).unwrap(), Part::Named(file, unfinished)]
    }

    #[test]
    fn a_part_gets_its_name_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        for mut part in both(folder.path()) {
            part.file().write_all(b"one").unwrap();
            assert_eq!(fs::read(part.path()).unwrap(), b"one");
            assert!(!path.exists());
            part.persist(&path, false).unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"one");
            fs::remove_file(&path).unwrap();
        }
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn a_file_is_replaced_only_if_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        fs::write(&path, "precious").unwrap();
        for part in both(folder.path()) {
            let error = part.persist(&path, false).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
            assert_eq!(fs::read(&path).unwrap(), b"precious");
        }
        for mut part in both(folder.path()) {
            part.file().write_all(b"new").unwrap();
            part.persist(&path, true).unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"new");
            fs::write(&path, "precious").unwrap();
        }
        assert_eq!(names(folder.path()), ["out"]);
    }
}
