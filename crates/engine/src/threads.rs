//! Threads that this library starts, marked by a thread-local flag so that a panic hook can tell them from the
//! application's.

use std::{
    any::Any,
    cell::Cell,
    convert::Infallible,
    io,
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread::{self, JoinHandle},
    time::Duration,
};

thread_local! {
    static OWN: Cell<bool> = const { Cell::new(false) };
}

/// Whether the calling thread was started by this library and isn't running a callback of the application.
pub fn is_own() -> bool {
    OWN.try_with(Cell::get).unwrap_or(false)
}

/// Marks the calling thread as this library's, for threads that another library started for it.
pub fn mark_own() {
    let _ = OWN.try_with(|own| own.set(true));
}

/// Runs a callback of the application, during which the calling thread counts as the application's.
pub fn run_callback<T>(callback: impl FnOnce() -> T) -> T {
    struct CallbackGuard {
        was_own: bool,
    }
    impl Drop for CallbackGuard {
        fn drop(&mut self) {
            let _ = OWN.try_with(|own| own.set(self.was_own));
        }
    }
    let _guard = CallbackGuard {
        was_own: OWN.try_with(|own| own.replace(false)).unwrap_or(false),
    };
    callback()
}

/// Starts a thread of this library.
///
/// # Errors
///
/// The system refuses another thread.
pub fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    thread::Builder::new().name(name.into()).spawn(move || {
        mark_own();
        work()
    })
}

/// What a caught panic says.
pub fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let owned = panic.downcast_ref::<String>().map(String::as_str);
    let message = owned.or_else(|| panic.downcast_ref::<&str>().copied());
    message.unwrap_or("no message")
}

/// A thread that can be joined with a timeout, which [`JoinHandle`] lacks.
pub struct TimedJoinHandle {
    thread: JoinHandle<()>,
    /// Disconnected when the thread ends; nothing is ever sent.
    ended: Receiver<Infallible>,
}

impl TimedJoinHandle {
    /// Starts a thread of this library, as the function [`spawn`] does.
    ///
    /// # Errors
    ///
    /// The system refuses another thread.
    pub fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let (running, ended) = mpsc::channel();
        let thread = spawn(name, move || {
            let _running = running;
            work();
        })?;
        Ok(Self { thread, ended })
    }

    /// Waits until the thread has ended.
    ///
    /// # Errors
    ///
    /// The handle itself, if the thread has not ended in time or is the calling thread.
    pub fn join(self, timeout: Duration) -> Result<(), Self> {
        if self.thread.thread().id() == thread::current().id() {
            return Err(self);
        }
        match self.ended.recv_timeout(timeout) {
            Err(RecvTimeoutError::Timeout) => Err(self),
            // The panic hook has reported a panic.
            _ => {
                let _ = self.thread.join();
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_ours_by_its_mark_and_not_by_its_name() {
        let named = thread::Builder::new().name("vlmnarrate-cpu0".into());
        assert!(!named.spawn(is_own).unwrap().join().unwrap());
        let own = spawn("anything", || (is_own(), run_callback(is_own), is_own()));
        assert_eq!(own.unwrap().join().unwrap(), (true, false, true));
    }

    #[test]
    fn a_join_ends_with_the_thread_or_the_timeout() {
        let (go, may_go) = mpsc::channel::<()>();
        let thread = TimedJoinHandle::spawn("test", move || {
            let _ = may_go.recv();
        });
        let thread = thread.unwrap();
        let Err(thread) = thread.join(Duration::from_millis(10)) else {
            panic!("it has not ended");
        };
        drop(go);
        assert!(thread.join(Duration::from_secs(60)).is_ok());
    }
}
