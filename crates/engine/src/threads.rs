//! Threads that this library starts, told from the application's by a mark and not by their names.

use std::{
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

/// Whether code of this library runs in this thread, which it started itself.
pub fn is_own() -> bool {
    OWN.try_with(Cell::get).unwrap_or(false)
}

/// Marks the calling thread, which somebody else started for this library.
pub fn mark_own() {
    let _ = OWN.try_with(|own| own.set(true));
}

/// Runs a callback of the application: until it returns, the thread is the application's.
pub fn lend<T>(callback: impl FnOnce() -> T) -> T {
    struct Lent(bool);
    impl Drop for Lent {
        fn drop(&mut self) {
            let _ = OWN.try_with(|own| own.set(self.0));
        }
    }
    let _lent = Lent(OWN.try_with(|own| own.replace(false)).unwrap_or(false));
    callback()
}

/// Starts a thread of this library.
pub fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    thread::Builder::new().name(name.into()).spawn(move || {
        mark_own();
        work()
    })
}

/// A thread that can be waited for with a limit, which [`JoinHandle`] has none of.
pub struct Joinable {
    thread: JoinHandle<()>,
    /// Nothing comes: the other end goes with the thread.
    ended: Receiver<Infallible>,
}

impl Joinable {
    /// As [`spawn`].
    pub fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let (running, ended) = mpsc::channel();
        let thread = spawn(name, move || {
            let _running = running;
            work();
        })?;
        Ok(Self { thread, ended })
    }

    /// Waits until the thread has ended; gives itself back if it has not. A thread doesn't wait for itself.
    pub fn join(self, timeout: Duration) -> Result<(), Self> {
        if self.thread.thread().id() == thread::current().id() {
            return Err(self);
        }
        match self.ended.recv_timeout(timeout) {
            Err(RecvTimeoutError::Timeout) => Err(self),
            // A panic has been told of by its hook.
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
        let own = spawn("anything", || (is_own(), lend(is_own), is_own()));
        assert_eq!(own.unwrap().join().unwrap(), (true, false, true));
    }

    #[test]
    fn a_wait_for_a_thread_ends_with_it_or_with_patience() {
        let (go, may_go) = mpsc::channel::<()>();
        let thread = Joinable::spawn("test", move || {
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
