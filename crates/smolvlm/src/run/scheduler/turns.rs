//! Who may have a caption made, and when: a place for each sequence in the batch, given out in turn.
//!
//! A caller waits for its turn before it takes a picture, so that no picture grows old in a queue. A caller waits at most
//! once at a time, so first come, first served is round-robin. A sequence that has had its share while others wait goes
//! back into the queue with all it holds.

use std::{
    collections::VecDeque,
    ops::ControlFlow,
    sync::{Arc, Mutex, MutexGuard},
    thread::{self, Thread},
    time::Duration,
};

use vlmnarrate_engine::Priority;

use super::sequence::Sequence;

/// How long a waiting thread sleeps at most before it asks whether it is still to wait.
///
/// Tests would not see through a short one that nobody was woken.
const POLL: Duration = Duration::from_millis(if cfg!(test) { 60_000 } else { 20 });

/// The places of a batch and those who wait for one.
#[derive(Debug)]
pub(crate) struct Turns(Mutex<Queue>);

#[derive(Debug)]
struct Queue {
    places: usize,
    taken: usize,
    last_ticket: u64,
    /// Requests, oldest first.
    high: VecDeque<Waiter>,
    /// All others, oldest first.
    normal: VecDeque<Waiter>,
}

#[derive(Debug)]
enum Waiter {
    /// A thread that waits for a turn.
    Caller { ticket: u64, thread: Thread },
    /// A sequence that has had its share.
    Suspended(Box<Sequence>),
}

impl Waiter {
    fn has(&self, number: u64) -> bool {
        matches!(self, Self::Caller { ticket, .. } if *ticket == number)
    }
}

impl Queue {
    /// Places that are free for requests, and for all others.
    ///
    /// A request finds one even where others take all: it comes between their steps.
    fn free(&self) -> (usize, usize) {
        (
            (self.places + 1).saturating_sub(self.taken),
            self.places.saturating_sub(self.taken + self.high.len()),
        )
    }

    fn may_enter(&self, ticket: u64) -> bool {
        let (high, normal) = self.free();
        let before = |queue: &VecDeque<Waiter>| queue.iter().position(|waiter| waiter.has(ticket));
        before(&self.high).is_some_and(|before| before < high)
            || before(&self.normal).is_some_and(|before| before < normal)
    }

    fn remove(&mut self, ticket: u64) {
        self.high.retain(|waiter| !waiter.has(ticket));
        self.normal.retain(|waiter| !waiter.has(ticket));
    }

    /// Wakes all who may enter.
    fn wake(&self) {
        let (high, normal) = self.free();
        let high = self.high.iter().take(high);
        for waiter in high.chain(self.normal.iter().take(normal)) {
            if let Waiter::Caller { thread, .. } = waiter {
                thread.unpark();
            }
        }
    }
}

/// Someone asked to stop waiting.
#[derive(Debug)]
pub(crate) struct Stopped;

impl Turns {
    /// For a batch of so many sequences.
    pub(crate) fn new(places: usize) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Queue {
            places,
            taken: 0,
            last_ticket: 0,
            high: VecDeque::new(),
            normal: VecDeque::new(),
        })))
    }

    /// Waits for a turn. `on_wait` is called every few milliseconds; `Break` ends the wait.
    pub(crate) fn wait(
        self: &Arc<Self>,
        priority: Priority,
        mut on_wait: impl FnMut() -> ControlFlow<()>,
    ) -> Result<Turn, Stopped> {
        let ticket = {
            let mut queue = self.lock();
            queue.last_ticket += 1;
            let waiter = Waiter::Caller {
                ticket: queue.last_ticket,
                thread: thread::current(),
            };
            match priority {
                Priority::High => queue.high.push_back(waiter),
                Priority::Normal => queue.normal.push_back(waiter),
            }
            queue.last_ticket
        };
        loop {
            let mut queue = self.lock();
            if queue.may_enter(ticket) {
                queue.remove(ticket);
                queue.taken += 1;
                // Two places that became free together have both woken the same waiters.
                queue.wake();
                return Ok(Turn(self.clone()));
            }
            drop(queue);
            if on_wait().is_break() {
                let mut queue = self.lock();
                queue.remove(ticket);
                // The place may have been free for this one.
                queue.wake();
                return Err(Stopped);
            }
            thread::park_timeout(POLL);
        }
    }

    /// Whether anybody waits.
    pub(super) fn has_waiting(&self) -> bool {
        let queue = self.lock();
        !queue.high.is_empty() || !queue.normal.is_empty()
    }

    /// Whether a sequence waits that has had its share.
    pub(super) fn has_suspended(&self) -> bool {
        let queue = self.lock();
        let is_sequence = |waiter: &Waiter| matches!(waiter, Waiter::Suspended(_));
        queue.normal.iter().any(is_sequence)
    }

    /// Queues a sequence behind all others until its turn comes again. Its place is free.
    pub(super) fn suspend(&self, mut sequence: Sequence) {
        drop(sequence.turn.take());
        let mut queue = self.lock();
        queue
            .normal
            .push_back(Waiter::Suspended(Box::new(sequence)));
        queue.wake();
    }

    /// Takes a sequence whose turn has come, or that was cancelled.
    pub(super) fn resume(self: &Arc<Self>) -> Option<Sequence> {
        let mut queue = self.lock();
        let (_, free) = queue.free();
        let index = queue.normal.iter().enumerate().position(|(i, waiter)| {
            matches!(waiter, Waiter::Suspended(sequence) if i < free || sequence.is_cancelled())
        })?;
        match queue.normal.remove(index) {
            Some(Waiter::Suspended(mut sequence)) => {
                queue.taken += 1;
                sequence.turn = Some(Turn(self.clone()));
                Some(*sequence)
            }
            _ => None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A place in the batch, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn(Arc<Turns>);

impl Drop for Turn {
    fn drop(&mut self) {
        let mut queue = self.0.lock();
        queue.taken -= 1;
        queue.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn take(turns: &Arc<Turns>, priority: Priority) -> Option<Turn> {
        turns.wait(priority, || ControlFlow::Break(())).ok()
    }

    #[test]
    fn requests_come_first_and_all_others_in_turn() {
        let turns = Turns::new(1);
        let first = take(&turns, Priority::Normal).unwrap();
        assert!(take(&turns, Priority::Normal).is_none());
        // A request finds a place beside all others, but only one.
        let request = take(&turns, Priority::High).unwrap();
        assert!(take(&turns, Priority::High).is_none());
        let order = Mutex::new(Vec::new());
        thread::scope(|scope| {
            let priorities = [
                Priority::Normal,
                Priority::High,
                Priority::Normal,
                Priority::High,
            ];
            for (i, priority) in priorities.into_iter().enumerate() {
                let (turns, order) = (&turns, &order);
                scope.spawn(move || {
                    let turn = turns.wait(priority, || ControlFlow::Continue(())).unwrap();
                    order.lock().unwrap().push(i);
                    drop(turn);
                });
                let waiting = || {
                    let queue = turns.lock();
                    queue.high.len() + queue.normal.len()
                };
                while waiting() <= i {
                    thread::yield_now();
                }
            }
            drop(request);
            // Beside the first there is one place, so requests take it one after the other.
            while order.lock().unwrap().len() < 2 {
                thread::yield_now();
            }
            drop(first);
        });
        assert_eq!(order.into_inner().unwrap(), [1, 3, 0, 2]);
        assert_eq!(turns.lock().taken, 0);
    }

    #[test]
    fn places_that_become_free_together_wake_as_many() {
        let turns = Turns::new(8);
        let start = std::time::Instant::now();
        for _ in 0..20 {
            let held: Vec<_> = (0..8)
                .map(|_| take(&turns, Priority::Normal).unwrap())
                .collect();
            thread::scope(|scope| {
                let wait = || {
                    let go_on = || ControlFlow::Continue(());
                    turns.wait(Priority::Normal, go_on).unwrap()
                };
                let waiters: Vec<_> = (0..8).map(|_| scope.spawn(wait)).collect();
                while turns.lock().normal.len() < 8 {
                    thread::yield_now();
                }
                drop(held);
                let turns = waiters.into_iter().map(|waiter| waiter.join().unwrap());
                drop(turns.collect::<Vec<_>>());
            });
        }
        assert!(start.elapsed() < POLL, "a waiter was not woken");
    }
}
