//! Runs programs that use the plugin.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

/// The plugin as cargo has just built it for this test, alone in a folder.
pub struct Plugin(TempDir);

impl Plugin {
    pub fn new() -> Self {
        let plugin = std::env::current_exe().unwrap();
        let plugin = plugin.with_file_name("libgstvlmnarrate.so");
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(plugin, folder.path().join("libgstvlmnarrate.so")).unwrap();
        Self(folder)
    }

    /// A place for files, gone after the test.
    pub fn folder(&self) -> &Path {
        self.0.path()
    }

    /// A program that finds the plugin and no screen.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env("GST_PLUGIN_PATH", self.folder())
            .env("GST_REGISTRY", self.folder().join("registry.bin"))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env_remove("DISPLAY")
            .env_remove("WAYLAND_DISPLAY");
        command
    }

    pub fn python(&self) -> Command {
        self.command("/usr/bin/python3")
    }
}

/// A file of this repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// What a program said and how it ended.
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
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}
