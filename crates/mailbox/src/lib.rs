//! Two job slots between callers and one worker thread: the newest job wins, a requested job stays.
//!
//! A flush moves the [`Epoch`] on. Jobs and callbacks belong to the epoch in which their job was put, so nothing of an
//! old epoch reaches the application after the flush has returned.

use std::{
    sync::atomic::{self, Ordering},
    time::{Duration, Instant},
};
#[cfg(not(loom))]
use std::{
    sync::{Condvar, Mutex, MutexGuard, atomic::AtomicU64},
    thread::{self, ThreadId},
};

#[cfg(loom)]
use loom::{
    sync::{Condvar, Mutex, MutexGuard, atomic::AtomicU64},
    thread::{self, ThreadId},
};

/// Number of the period between two flushes, unique in the process.
pub type Epoch = u64;

/// The newest epoch that a listener knows of. Threads that begin epochs may report them in any order.
#[derive(Debug, Default)]
pub struct NewestEpoch(Epoch);

impl NewestEpoch {
    /// Records an epoch. Returns whether the epoch is at least as new as all recorded before.
    pub fn advance_to(&mut self, epoch: Epoch) -> bool {
        let is_newest = epoch >= self.0;
        self.0 = self.0.max(epoch);
        is_newest
    }

    /// Whether this epoch is the newest recorded.
    pub fn is_current(&self, epoch: Epoch) -> bool {
        self.0 == epoch
    }
}

/// Why a job is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Flushing, stopped or closed.
    Flushing,
    /// The worker has failed and reported the failure.
    WorkerFailed,
}

/// How a wait for the worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Nothing waits and nothing is under way.
    Idle,
    /// The deadline passed first.
    TimedOut,
    /// No job is taken any more.
    Refused(Refused),
}

/// Two slots of jobs `J`, and the state of the one worker that takes them.
pub struct Mailbox<J> {
    slots: Mutex<Slots<J>>,
    changed: Condvar,
    /// Copy of `slots.epoch` that is read without the lock, at each layer and each token.
    epoch: AtomicU64,
}

struct Slots<J> {
    epoch: Epoch,
    /// Replaced by a newer job.
    newest: Option<J>,
    /// Never replaced.
    requested: Option<J>,
    worker: WorkerState,
    /// The thread that runs a callback of the worker.
    callback_thread: Option<ThreadId>,
    /// Between the two flush events.
    flushing: bool,
    /// Below PAUSED, whatever flush events say.
    stopped: bool,
    closed: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum WorkerState {
    Loading,
    Idle,
    Busy,
    Exited,
}

impl<J> Slots<J> {
    fn is_empty(&self) -> bool {
        self.newest.is_none() && self.requested.is_none()
    }

    fn check(&self) -> Result<(), Refused> {
        if self.flushing || self.stopped {
            return Err(Refused::Flushing);
        }
        if self.worker == WorkerState::Exited {
            return Err(Refused::WorkerFailed);
        }
        Ok(())
    }
}

/// Unique in the process: a late callback of a closed worker can't be taken for one of its successor.
fn new_epoch() -> Epoch {
    // 0 is older than any.
    static NEXT: atomic::AtomicU64 = atomic::AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl<J> Default for Mailbox<J> {
    fn default() -> Self {
        Self::new()
    }
}

impl<J> Mailbox<J> {
    /// A mailbox that takes jobs once it is [started](Self::start).
    pub fn new() -> Self {
        let epoch = new_epoch();
        Self {
            slots: Mutex::new(Slots {
                epoch,
                newest: None,
                requested: None,
                worker: WorkerState::Loading,
                callback_thread: None,
                flushing: false,
                stopped: true,
                closed: false,
            }),
            changed: Condvar::new(),
            epoch: AtomicU64::new(epoch),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Slots<J>> {
        self.slots.lock().unwrap()
    }

    /// The current epoch.
    pub fn epoch(&self) -> Epoch {
        self.epoch.load(Ordering::Acquire)
    }

    /// Takes jobs, until [stopped](Self::stop) or [closed](Self::close).
    pub fn start(&self) {
        let mut slots = self.lock();
        slots.stopped = slots.closed;
        slots.flushing = false;
    }

    /// Drops all jobs and refuses new ones until [started](Self::start) again. Returns the epoch that begins.
    ///
    /// Waits for a callback that is running, so that none of the old epoch comes afterwards; at most 100 ms, because
    /// the callback may wait for the caller, and not when called from that callback.
    pub fn stop(&self) -> Epoch {
        self.begin_epoch(|slots| slots.stopped = true)
    }

    /// The same as [`stop`](Self::stop), until [`flush_stop`](Self::flush_stop).
    pub fn flush_start(&self) -> Epoch {
        self.begin_epoch(|slots| slots.flushing = true)
    }

    /// Drops all jobs as [`stop`](Self::stop) does, but takes new ones at once.
    pub fn cancel(&self) -> Epoch {
        self.begin_epoch(|_| ())
    }

    /// Takes jobs again after [`flush_start`](Self::flush_start), unless stopped.
    pub fn flush_stop(&self) {
        self.lock().flushing = false;
    }

    /// [Stops](Self::stop) for good: no callback begins any more. Returns whether none is still running.
    pub fn close(&self) -> bool {
        self.begin_epoch(|slots| {
            slots.stopped = true;
            slots.closed = true;
        });
        self.lock().callback_thread.is_none()
    }

    /// Empties the slots, disowns the job under way and wakes all who wait.
    fn begin_epoch(&self, change: impl FnOnce(&mut Slots<J>)) -> Epoch {
        const TIMEOUT: Duration = Duration::from_millis(100);
        let deadline = Instant::now() + TIMEOUT;
        let mut slots = self.lock();
        change(&mut slots);
        let epoch = new_epoch();
        slots.epoch = epoch;
        slots.newest = None;
        slots.requested = None;
        self.epoch.store(epoch, Ordering::Release);
        self.changed.notify_all();
        let here = thread::current().id();
        while slots
            .callback_thread
            .is_some_and(|callback_thread| callback_thread != here)
        {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            slots = self.changed.wait_timeout(slots, left).unwrap().0;
        }
        epoch
    }

    /// Begins a callback of the worker, which ends when the guard is dropped. `None` once closed.
    pub fn begin_callback(&self) -> Option<CallbackGuard<'_, J>> {
        self.begin_callback_if(|_| true)
    }

    /// Begins a callback about a job of this epoch. `None` once closed or in another epoch.
    pub fn begin_callback_in(&self, epoch: Epoch) -> Option<CallbackGuard<'_, J>> {
        self.begin_callback_if(|slots| slots.epoch == epoch)
    }

    fn begin_callback_if(
        &self,
        may_begin: impl FnOnce(&Slots<J>) -> bool,
    ) -> Option<CallbackGuard<'_, J>> {
        let mut slots = self.lock();
        debug_assert!(slots.callback_thread.is_none());
        let begins = !slots.closed && may_begin(&slots);
        slots.callback_thread = begins.then(|| thread::current().id());
        slots.callback_thread.map(|_| CallbackGuard(self))
    }

    /// Whether the mailbox was [closed](Self::close).
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Checks whether a job would be taken.
    pub fn check(&self) -> Result<(), Refused> {
        self.lock().check()
    }

    /// Puts a job in the slot where the newest wins; returns the job that it replaced.
    pub fn put_newest(&self, job: J) -> Result<Option<J>, Refused> {
        let mut slots = self.lock();
        slots.check()?;
        let replaced = slots.newest.replace(job);
        self.changed.notify_all();
        Ok(replaced)
    }

    /// Puts a job in the slot of requested ones, which must [be free](Self::has_room_for_request).
    pub fn put_requested(&self, job: J) -> Result<(), Refused> {
        let mut slots = self.lock();
        slots.check()?;
        debug_assert!(slots.requested.is_none());
        slots.requested = Some(job);
        self.changed.notify_all();
        Ok(())
    }

    /// Whether the slot of requested jobs is free.
    pub fn has_room_for_request(&self) -> bool {
        self.lock().requested.is_none()
    }

    /// Whether the worker is loaded and has no job.
    pub fn is_idle(&self) -> bool {
        let slots = self.lock();
        slots.worker == WorkerState::Idle && slots.is_empty()
    }

    /// Whether a job waits in the slot where the newest wins, and is such.
    pub fn has_newest(&self, is_such: impl FnOnce(&J) -> bool) -> bool {
        self.lock().newest.as_ref().is_some_and(is_such)
    }

    /// Waits until the worker is loaded.
    pub fn wait_loaded(&self) -> Result<(), Refused> {
        let mut slots = self.lock();
        let epoch = slots.epoch;
        loop {
            if slots.epoch != epoch {
                return Err(Refused::Flushing);
            }
            slots.check()?;
            if slots.worker != WorkerState::Loading {
                return Ok(());
            }
            slots = self.changed.wait(slots).unwrap();
        }
    }

    /// Waits until no job is waiting or in progress.
    pub fn wait_idle(&self, deadline: Option<Instant>) -> Wait {
        let mut slots = self.lock();
        let epoch = slots.epoch;
        loop {
            // A flush that has already ended dropped the job too.
            if slots.epoch != epoch {
                return Wait::Refused(Refused::Flushing);
            }
            if let Err(refused) = slots.check() {
                return Wait::Refused(refused);
            }
            if slots.is_empty() && slots.worker != WorkerState::Busy {
                return Wait::Idle;
            }
            slots = match deadline {
                None => self.changed.wait(slots).unwrap(),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Wait::TimedOut;
                    }
                    self.changed.wait_timeout(slots, left).unwrap().0
                }
            };
        }
    }

    /// Marks the worker's last job as done and waits for the next one, a requested one first. `None` once closed.
    ///
    /// Called by the worker.
    pub fn take(&self) -> Option<(Epoch, J)> {
        loop {
            self.wait_for_job(|_| ())?;
            if let Some(taken) = self.try_take() {
                return Some(taken);
            }
        }
    }

    /// Marks the worker's last job as done and waits for the next one, which stays in its slot and may still be replaced.
    /// Returns the epoch and what `look` sees in the job; `None` once closed.
    ///
    /// Called by the worker.
    pub fn wait_for_job<T>(&self, look: impl FnOnce(&J) -> T) -> Option<(Epoch, T)> {
        let mut slots = self.lock();
        slots.worker = WorkerState::Idle;
        loop {
            if slots.closed {
                return None;
            }
            if let Some(job) = slots.requested.as_ref().or(slots.newest.as_ref()) {
                return Some((slots.epoch, look(job)));
            }
            self.changed.notify_all();
            slots = self.changed.wait(slots).unwrap();
        }
    }

    /// Takes a job, a requested one first. `None` if there is none, or once closed.
    ///
    /// Called by the worker.
    pub fn try_take(&self) -> Option<(Epoch, J)> {
        let mut slots = self.lock();
        if slots.closed {
            return None;
        }
        let job = slots.requested.take().or_else(|| slots.newest.take())?;
        slots.worker = WorkerState::Busy;
        Some((slots.epoch, job))
    }

    /// Marks the worker as exited: it takes no job and runs no callback any more.
    ///
    /// Called by the worker.
    pub fn worker_exited(&self) {
        let mut slots = self.lock();
        slots.worker = WorkerState::Exited;
        slots.newest = None;
        slots.requested = None;
        self.changed.notify_all();
    }
}

/// A running callback of the worker; ends when dropped.
pub struct CallbackGuard<'a, J>(&'a Mailbox<J>);

impl<J> Drop for CallbackGuard<'_, J> {
    fn drop(&mut self) {
        self.0.lock().callback_thread = None;
        self.0.changed.notify_all();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::{thread, time::Duration};

    use super::*;

    fn started() -> Mailbox<u32> {
        let mailbox = Mailbox::new();
        mailbox.start();
        mailbox
    }

    #[test]
    fn the_newest_job_wins_and_a_requested_one_stays() {
        let mailbox = started();
        assert_eq!(mailbox.put_newest(1), Ok(None));
        assert_eq!(mailbox.put_requested(10), Ok(()));
        assert_eq!(mailbox.put_newest(2), Ok(Some(1)));
        assert!(!mailbox.has_room_for_request());
        assert_eq!(mailbox.take().map(|(_, job)| job), Some(10));
        assert!(mailbox.has_room_for_request());
        assert_eq!(mailbox.take().map(|(_, job)| job), Some(2));
    }

    #[test]
    fn a_job_that_is_looked_at_can_still_be_replaced_or_flushed() {
        let mailbox = started();
        assert_eq!(mailbox.put_newest(1), Ok(None));
        let (epoch, seen) = mailbox.wait_for_job(|job| *job).unwrap();
        assert_eq!((epoch, seen), (mailbox.epoch(), 1));
        assert!(!mailbox.is_idle());
        assert_eq!(mailbox.put_newest(2), Ok(Some(1)));
        assert_eq!(mailbox.try_take(), Some((epoch, 2)));
        assert_eq!(mailbox.try_take(), None);
        assert_eq!(mailbox.put_newest(3), Ok(None));
        mailbox.cancel();
        assert_eq!(mailbox.try_take(), None);
    }

    #[test]
    fn flush_empties_refuses_and_disowns() {
        let mailbox = started();
        assert_eq!(mailbox.put_newest(1), Ok(None));
        let (epoch, _) = mailbox.take().unwrap();
        assert_eq!(mailbox.put_newest(2), Ok(None));
        assert_ne!(mailbox.flush_start(), epoch);
        assert_ne!(mailbox.epoch(), epoch);
        assert_eq!(mailbox.put_newest(3), Err(Refused::Flushing));
        mailbox.flush_stop();
        assert_eq!(mailbox.put_newest(4), Ok(None));
        assert_eq!(mailbox.take().map(|(_, job)| job), Some(4));
    }

    #[test]
    fn a_start_ends_a_flush_that_was_left_open() {
        let mailbox = started();
        mailbox.flush_start();
        mailbox.stop();
        mailbox.start();
        assert_eq!(mailbox.put_newest(1), Ok(None));
    }

    #[test]
    fn a_wait_ends_with_the_job_the_flush_or_the_worker() {
        for end in ["job", "flush", "flush and on", "failure", "time"] {
            let mailbox = started();
            assert_eq!(mailbox.put_newest(1), Ok(None));
            assert!(mailbox.take().is_some());
            thread::scope(|scope| {
                let deadline = (end == "time").then(|| Instant::now() + Duration::from_millis(20));
                let mailbox = &mailbox;
                let wait = scope.spawn(move || mailbox.wait_idle(deadline));
                thread::sleep(Duration::from_millis(10));
                let expected = match end {
                    "job" => {
                        scope.spawn(|| mailbox.take());
                        Wait::Idle
                    }
                    "flush" => {
                        mailbox.flush_start();
                        Wait::Refused(Refused::Flushing)
                    }
                    "flush and on" => {
                        mailbox.flush_start();
                        mailbox.flush_stop();
                        Wait::Refused(Refused::Flushing)
                    }
                    "failure" => {
                        mailbox.worker_exited();
                        Wait::Refused(Refused::WorkerFailed)
                    }
                    _ => Wait::TimedOut,
                };
                assert_eq!(wait.join().unwrap(), expected, "{end}");
                mailbox.close();
            });
        }
    }

    #[test]
    fn nothing_to_wait_for_while_loading() {
        let mailbox = started();
        assert!(!mailbox.is_idle());
        assert_eq!(mailbox.wait_idle(None), Wait::Idle);
    }

    #[test]
    fn a_flush_does_not_start_what_was_stopped() {
        let mailbox = started();
        mailbox.stop();
        mailbox.flush_start();
        mailbox.flush_stop();
        assert_eq!(mailbox.check(), Err(Refused::Flushing));
        mailbox.start();
        assert_eq!(mailbox.check(), Ok(()));
    }

    #[test]
    fn closed_stays_closed() {
        let mailbox = started();
        mailbox.close();
        mailbox.start();
        assert_eq!(mailbox.put_newest(1), Err(Refused::Flushing));
        assert_eq!(mailbox.take(), None);
        assert!(mailbox.begin_callback().is_none());
    }

    #[test]
    fn a_callback_belongs_to_its_epoch() {
        let mailbox = started();
        let epoch = mailbox.epoch();
        assert!(mailbox.begin_callback_in(epoch).is_some());
        let next = mailbox.cancel();
        assert!(mailbox.begin_callback_in(epoch).is_none());
        assert!(mailbox.begin_callback_in(next).is_some());
        assert_eq!(mailbox.check(), Ok(()));
    }

    #[test]
    fn the_newest_epoch_stays_the_newest() {
        let mut newest = NewestEpoch::default();
        assert!(newest.advance_to(2) && newest.advance_to(2));
        assert!(!newest.advance_to(1));
        assert!(newest.is_current(2) && !newest.is_current(1));
    }

    #[test]
    fn closing_waits_for_a_callback_but_not_forever_and_not_in_itself() {
        let mailbox = &started();
        let callback = mailbox.begin_callback();
        assert!(callback.is_some());
        assert!(!mailbox.close());
        let start = Instant::now();
        thread::scope(|scope| assert!(!scope.spawn(|| mailbox.close()).join().unwrap()));
        assert!(start.elapsed() >= Duration::from_millis(100));

        let mailbox = &started();
        let is_closed = &atomic::AtomicBool::new(false);
        thread::scope(|scope| {
            let callback = mailbox.begin_callback();
            let close = scope.spawn(move || {
                assert!(mailbox.close());
                is_closed.store(true, Ordering::SeqCst);
            });
            while !mailbox.is_closed() {
                thread::yield_now();
            }
            assert!(!is_closed.load(Ordering::SeqCst));
            drop(callback);
            close.join().unwrap();
        });
    }
}

#[cfg(all(test, loom))]
mod models;
