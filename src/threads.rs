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
pub(crate) fn is_own() -> bool {
    OWN.try_with(Cell::get).unwrap_or(false)
}

/// Marks the calling thread, which somebody else started for this library.
pub(crate) fn mark_own() {
    let _ = OWN.try_with(|own| own.set(true));
}

/// Runs a callback of the application: until it returns, the thread is the application's.
pub(crate) fn lend<T>(callback: impl FnOnce() -> T) -> T {
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
pub(crate) fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    thread::Builder::new().name(name.into()).spawn(move || {
        mark_own();
        work()
    })
}

/// Who decodes, draws or plays goes before who describes.
#[cfg_attr(target_os = "linux", expect(unsafe_code, reason = "setpriority"))]
pub(crate) fn give_way(nice: u8) {
    #[cfg(target_os = "linux")]
    // SAFETY: takes no pointer. 0 is the calling thread, whose children inherit it.
    unsafe {
        // Refused, the thread runs as others do: a wish, not a need.
        let _ = libc::setpriority(libc::PRIO_PROCESS, 0, nice.into());
    }
    #[cfg(not(target_os = "linux"))]
    let _ = nice;
}

/// A thread that can be waited for with a limit, which [`JoinHandle`] has none of.
pub(crate) struct Joinable {
    thread: JoinHandle<()>,
    /// Nothing comes: the other end goes with the thread.
    ended: Receiver<Infallible>,
}

impl Joinable {
    /// As [`spawn`].
    pub(crate) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let (running, ended) = mpsc::channel();
        let thread = spawn(name, move || {
            let _running = running;
            work();
        })?;
        Ok(Self { thread, ended })
    }

    /// Waits until the thread has ended; gives itself back if it has not. A thread doesn't wait for itself.
    pub(crate) fn join(self, timeout: Duration) -> Result<(), Self> {
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

/// rayon's threads. Dropped, it waits until they have ended.
#[derive(Debug)]
pub(crate) struct Pool {
    /// Always there, but while it is dropped.
    pool: Option<rayon::ThreadPool>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// So many threads, or one for each core for 0, called `name` and a number.
    pub(crate) fn new(name: &str, count: usize) -> Result<Self, rayon::ThreadPoolBuildError> {
        let mut threads = Vec::new();
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(count)
            .spawn_handler(|thread| {
                let name = format!("{name}{}", thread.index());
                threads.push(spawn(name, || thread.run())?);
                Ok(())
            })
            .build()?;
        Ok(Self {
            pool: Some(pool),
            threads,
        })
    }

    /// Runs `work` on a thread of the pool.
    pub(crate) fn install<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match &self.pool {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let Some(pool) = self.pool.take() else {
            return;
        };
        // A thread doesn't wait for itself.
        let is_inside = pool.current_thread_index().is_some();
        drop(pool);
        for thread in self.threads.drain(..).filter(|_| !is_inside) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn a_thread_is_ours_by_its_mark_and_not_by_its_name() {
        let named = thread::Builder::new().name("vlmnarrate-cpu0".into());
        assert!(!named.spawn(is_own).unwrap().join().unwrap());
        let own = spawn("anything", || (is_own(), lend(is_own), is_own()));
        assert_eq!(own.unwrap().join().unwrap(), (true, false, true));
    }

    #[test]
    fn a_pool_is_ours_and_leaves_no_thread_behind() {
        let pool = Pool::new("test", 3).unwrap();
        assert_eq!(
            pool.install(|| (is_own(), rayon::current_num_threads())),
            (true, 3)
        );
        static ALIVE: AtomicUsize = AtomicUsize::new(0);
        struct Alive;
        impl Drop for Alive {
            fn drop(&mut self) {
                thread::sleep(Duration::from_millis(20));
                ALIVE.fetch_sub(1, Ordering::SeqCst);
            }
        }
        thread_local!(static LIFE: Alive = {
            ALIVE.fetch_add(1, Ordering::SeqCst);
            Alive
        });
        pool.install(|| rayon::broadcast(|_| LIFE.with(|_| ())));
        assert_eq!(ALIVE.load(Ordering::SeqCst), 3);
        drop(pool);
        assert_eq!(ALIVE.load(Ordering::SeqCst), 0);
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
