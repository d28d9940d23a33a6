//! Where jobs wait for the worker, and callers for the jobs.

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

/// Moves on with each flush.
pub type Epoch = u64;

/// The newest epoch that somebody has heard of. Those who begin an epoch may tell of it in any order.
#[derive(Debug, Default)]
pub struct NewestEpoch(Epoch);

impl NewestEpoch {
    /// Whether it is not older than what was heard of before.
    pub fn reach(&mut self, epoch: Epoch) -> bool {
        let is_newest = epoch >= self.0;
        self.0 = self.0.max(epoch);
        is_newest
    }

    pub fn is(&self, epoch: Epoch) -> bool {
        self.0 == epoch
    }
}

/// No job can be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Flushing, or on the way down.
    Flushing,
    /// The worker has failed and said so.
    Dead,
}

/// How a wait for the worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Nothing waits and nothing is under way.
    Idle,
    TimedOut,
    Refused(Refused),
}

/// Two slots and one worker. `J` is a job.
pub struct Mailbox<J> {
    slots: Mutex<Slots<J>>,
    changed: Condvar,
    /// Same as `slots.epoch`, to be looked at without the lock: at each layer, at each token.
    epoch: AtomicU64,
}

struct Slots<J> {
    epoch: Epoch,
    /// The newest frame whose turn had come.
    newest: Option<J>,
    /// A frame that somebody asked about.
    asked: Option<J>,
    worker: Worker,
    /// Where a word of the worker is listened to.
    speaker: Option<ThreadId>,
    /// Between the two flush events.
    flushing: bool,
    /// Below PAUSED, whatever flush events say.
    stopped: bool,
    closed: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Worker {
    Loading,
    Idle,
    Busy,
    Dead,
}

impl<J> Slots<J> {
    fn is_empty(&self) -> bool {
        self.newest.is_none() && self.asked.is_none()
    }

    fn check(&self) -> Result<(), Refused> {
        if self.flushing || self.stopped {
            return Err(Refused::Flushing);
        }
        if self.worker == Worker::Dead {
            return Err(Refused::Dead);
        }
        Ok(())
    }
}

/// Unique in the process: what a worker that was let go still says can't be taken for its
/// successor's word.
fn new_epoch() -> Epoch {
    // 0 is older than any.
    static NEXT: atomic::AtomicU64 = atomic::AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl<J> Mailbox<J> {
    /// A mailbox that takes jobs once it is [started](Self::start).
    pub fn new() -> Self {
        let epoch = new_epoch();
        Self {
            slots: Mutex::new(Slots {
                epoch,
                newest: None,
                asked: None,
                worker: Worker::Loading,
                speaker: None,
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

    pub fn epoch(&self) -> Epoch {
        self.epoch.load(Ordering::Acquire)
    }

    /// Takes jobs, until [stopped](Self::stop) or [closed](Self::close).
    pub fn start(&self) {
        let mut slots = self.lock();
        slots.stopped = slots.closed;
        slots.flushing = false;
    }

    /// Drops everything and refuses jobs until [started](Self::start) again. Returns the epoch
    /// that begins.
    ///
    /// A word of the worker that is under way is waited for, so that none of the old epoch comes after this.
    /// Not in that very word, and not for long: it may itself wait for us.
    pub fn stop(&self) -> Epoch {
        self.begin_epoch(|slots| slots.stopped = true)
    }

    /// As [`stop`](Self::stop), until [`flush_stop`](Self::flush_stop).
    pub fn flush_start(&self) -> Epoch {
        self.begin_epoch(|slots| slots.flushing = true)
    }

    /// As [`stop`](Self::stop), and takes jobs at once.
    pub fn cancel(&self) -> Epoch {
        self.begin_epoch(|_| ())
    }

    pub fn flush_stop(&self) {
        self.lock().flushing = false;
    }

    /// [Stops](Self::stop) for good. From here on the worker isn't heard any more. Says whether no word is
    /// under way any more.
    pub fn close(&self) -> bool {
        self.begin_epoch(|slots| {
            slots.stopped = true;
            slots.closed = true;
        });
        self.lock().speaker.is_none()
    }

    /// Empties the slots, disowns the job under way and wakes all who wait.
    fn begin_epoch(&self, change: impl FnOnce(&mut Slots<J>)) -> Epoch {
        const PATIENCE: Duration = Duration::from_millis(100);
        let deadline = Instant::now() + PATIENCE;
        let mut slots = self.lock();
        change(&mut slots);
        let epoch = new_epoch();
        slots.epoch = epoch;
        slots.newest = None;
        slots.asked = None;
        self.epoch.store(epoch, Ordering::Release);
        self.changed.notify_all();
        let here = thread::current().id();
        while slots.speaker.is_some_and(|speaker| speaker != here) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            slots = self.changed.wait_timeout(slots, left).unwrap().0;
        }
        epoch
    }

    /// For the worker: asks to be heard for as long as it keeps what it gets. `None` once closed.
    pub fn speak(&self) -> Option<Speech<'_, J>> {
        self.speak_if(|_| true)
    }

    /// For the worker: the same of a job, which nobody wants to hear of in another epoch than its own.
    pub fn speak_in(&self, epoch: Epoch) -> Option<Speech<'_, J>> {
        self.speak_if(|slots| slots.epoch == epoch)
    }

    fn speak_if(&self, heard: impl FnOnce(&Slots<J>) -> bool) -> Option<Speech<'_, J>> {
        let mut slots = self.lock();
        debug_assert!(slots.speaker.is_none());
        let heard = !slots.closed && heard(&slots);
        slots.speaker = heard.then(|| thread::current().id());
        slots.speaker.map(|_| Speech(self))
    }

    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Whether a job would be taken.
    pub fn check(&self) -> Result<(), Refused> {
        self.lock().check()
    }

    /// Puts a frame in the slot where the newest wins; returns the one it replaced.
    pub fn put_newest(&self, job: J) -> Result<Option<J>, Refused> {
        let mut slots = self.lock();
        slots.check()?;
        let replaced = slots.newest.replace(job);
        self.changed.notify_all();
        Ok(replaced)
    }

    /// Puts a frame in the slot of those that were asked for, which must [be free](Self::has_room).
    pub fn put_asked(&self, job: J) -> Result<(), Refused> {
        let mut slots = self.lock();
        slots.check()?;
        debug_assert!(slots.asked.is_none());
        slots.asked = Some(job);
        self.changed.notify_all();
        Ok(())
    }

    /// Whether the slot of frames that were asked for is free.
    pub fn has_room(&self) -> bool {
        self.lock().asked.is_none()
    }

    /// Whether the worker is loaded and has nothing to do.
    pub fn is_idle(&self) -> bool {
        let slots = self.lock();
        slots.worker == Worker::Idle && slots.is_empty()
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
            if slots.worker != Worker::Loading {
                return Ok(());
            }
            slots = self.changed.wait(slots).unwrap();
        }
    }

    /// Waits until nothing is under way and nothing waits.
    pub fn wait_idle(&self, deadline: Option<Instant>) -> Wait {
        let mut slots = self.lock();
        let epoch = slots.epoch;
        loop {
            // A flush that came and went meanwhile has taken our job with it.
            if slots.epoch != epoch {
                return Wait::Refused(Refused::Flushing);
            }
            if let Err(refused) = slots.check() {
                return Wait::Refused(refused);
            }
            if slots.is_empty() && slots.worker != Worker::Busy {
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

    /// For the worker: says that the last job is done and waits for the next, a frame that was
    /// asked for first. `None` once closed.
    pub fn take(&self) -> Option<(Epoch, J)> {
        let mut slots = self.lock();
        slots.worker = Worker::Idle;
        loop {
            if slots.closed {
                return None;
            }
            if let Some(job) = slots.asked.take().or_else(|| slots.newest.take()) {
                slots.worker = Worker::Busy;
                return Some((slots.epoch, job));
            }
            self.changed.notify_all();
            slots = self.changed.wait(slots).unwrap();
        }
    }

    /// For the worker: there won't be another word.
    pub fn die(&self) {
        let mut slots = self.lock();
        slots.worker = Worker::Dead;
        slots.newest = None;
        slots.asked = None;
        self.changed.notify_all();
    }
}

/// A word of the worker.
pub struct Speech<'a, J>(&'a Mailbox<J>);

impl<J> Drop for Speech<'_, J> {
    fn drop(&mut self) {
        self.0.lock().speaker = None;
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
    fn newest_wins_and_asked_stays() {
        let mailbox = started();
        assert_eq!(mailbox.put_newest(1), Ok(None));
        assert_eq!(mailbox.put_asked(10), Ok(()));
        assert_eq!(mailbox.put_newest(2), Ok(Some(1)));
        assert!(!mailbox.has_room());
        assert_eq!(mailbox.take().map(|(_, job)| job), Some(10));
        assert!(mailbox.has_room());
        assert_eq!(mailbox.take().map(|(_, job)| job), Some(2));
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
        for end in ["job", "flush", "flush and on", "death", "time"] {
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
                    "death" => {
                        mailbox.die();
                        Wait::Refused(Refused::Dead)
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
        assert!(mailbox.speak().is_none());
    }

    #[test]
    fn a_word_is_of_its_own_epoch() {
        let mailbox = started();
        let epoch = mailbox.epoch();
        assert!(mailbox.speak_in(epoch).is_some());
        let next = mailbox.cancel();
        assert!(mailbox.speak_in(epoch).is_none());
        assert!(mailbox.speak_in(next).is_some());
        assert_eq!(mailbox.check(), Ok(()));
    }

    #[test]
    fn the_newest_epoch_stays_the_newest() {
        let mut newest = NewestEpoch::default();
        assert!(newest.reach(2) && newest.reach(2));
        assert!(!newest.reach(1));
        assert!(newest.is(2) && !newest.is(1));
    }

    #[test]
    fn a_word_is_waited_for_but_not_forever_and_not_in_itself() {
        let mailbox = &started();
        let speech = mailbox.speak();
        assert!(speech.is_some());
        assert!(!mailbox.close());
        let start = Instant::now();
        thread::scope(|scope| assert!(!scope.spawn(|| mailbox.close()).join().unwrap()));
        assert!(start.elapsed() >= Duration::from_millis(100));

        let mailbox = &started();
        let is_closed = &atomic::AtomicBool::new(false);
        thread::scope(|scope| {
            let speech = mailbox.speak();
            let close = scope.spawn(move || {
                assert!(mailbox.close());
                is_closed.store(true, Ordering::SeqCst);
            });
            while !mailbox.is_closed() {
                thread::yield_now();
            }
            assert!(!is_closed.load(Ordering::SeqCst));
            drop(speech);
            close.join().unwrap();
        });
    }
}

#[cfg(all(test, loom))]
mod models;
