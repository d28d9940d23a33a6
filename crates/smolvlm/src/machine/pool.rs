//! The CPU's threads.

use std::thread::JoinHandle;

use vlmnarrate_engine::threads::spawn;

use crate::error::{Error, Result};

/// rayon's threads. Dropped, it waits until they have ended.
#[derive(Debug)]
pub(crate) struct Pool {
    /// Always there, but while it is dropped.
    pool: Option<rayon::ThreadPool>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// The threads of a model on the CPU.
    pub(crate) fn for_model(threads: usize) -> Result<Self> {
        Self::new("vlmnarrate-cpu", threads).map_err(|e| Error::Setting {
            property: "threads",
            reason: format!("{e}; lower it"),
        })
    }

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
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        thread,
        time::Duration,
    };

    use vlmnarrate_engine::threads::is_own;

    use super::*;

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
}
