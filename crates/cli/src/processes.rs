//! Signals, and what must not outlive this process: children and unfinished files.

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI32, Ordering},
    },
    thread,
};

use rustix::process::{Pid, Signal, kill_process};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};

/// The signal that asked for an end; 0 before.
static ASKED: AtomicI32 = AtomicI32::new(0);

/// What is left behind if the process ends now.
static LEFT: Mutex<Left> = Mutex::new(Left {
    children: Vec::new(),
    files: Vec::new(),
});

struct Left {
    children: Vec<Pid>,
    files: Vec<PathBuf>,
}

fn left() -> MutexGuard<'static, Left> {
    LEFT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Handles SIGINT, SIGTERM and SIGHUP from now on: the first asks for an end, the second ends the process at once.
///
/// # Errors
///
/// The system refuses a handler.
pub fn watch_signals() -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in &mut signals {
                if ASKED.swap(signal, Ordering::SeqCst) != 0 {
                    exit(128 + signal);
                }
            }
        })?;
    Ok(())
}

/// The signal that asked for an end, if there was one.
pub fn asked_to_end() -> Option<i32> {
    Some(ASKED.load(Ordering::SeqCst)).filter(|&signal| signal != 0)
}

/// Ends the process without children and unfinished files.
pub fn exit(status: i32) -> ! {
    let left = left();
    for &child in &left.children {
        // It may have ended by itself.
        let _ = kill_process(child, Signal::KILL);
    }
    for file in &left.files {
        // It may be a folder.
        let _ = std::fs::remove_file(file).or_else(|_| std::fs::remove_dir_all(file));
    }
    // The lock is held: nothing new can be left behind.
    std::process::exit(status)
}

/// A child that ends with this process, even if that is killed, and that the terminal's Ctrl-C does not reach.
pub struct Bound(Child);

impl Bound {
    /// Starts a program. Call it from the main thread: a child ends with the thread that started it.
    ///
    /// # Errors
    ///
    /// The program can't be started.
    pub fn spawn(command: &mut Command) -> io::Result<Self> {
        command.process_group(0);
        die_with_parent(command);
        // While the lock is held, a second signal waits for the child to be on the list.
        let mut left = left();
        let child = command.spawn()?;
        left.children.push(pid(&child));
        Ok(Self(child))
    }

    /// Sends a signal, if the child has not ended.
    pub fn signal(&self, signal: Signal) {
        let _ = kill_process(pid(&self.0), signal);
    }
}

impl std::ops::Deref for Bound {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl std::ops::DerefMut for Bound {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let own = pid(&self.0);
        left().children.retain(|&child| child != own);
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

#[cfg(target_os = "linux")]
#[expect(
    unsafe_code,
    reason = "the standard library has no safe way to ask for it"
)]
fn die_with_parent(command: &mut Command) {
    // SAFETY: between fork and exec the closure makes one system call, and allocates nothing.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            Ok(())
        });
    }
}

#[cfg(not(target_os = "linux"))]
fn die_with_parent(_: &mut Command) {}

/// Removes a file if the process ends at once while this lives.
pub struct Unfinished(PathBuf);

impl Unfinished {
    /// The file may be made afterwards.
    pub fn new(path: &Path) -> Self {
        left().files.push(path.to_owned());
        Self(path.to_owned())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        left().files.retain(|file| *file != self.0);
    }
}

/// A path by which this process and its children can open the file anew.
pub fn own_descriptor(file: &File) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into()
}
