//! How many requests an endpoint gets, and when it gets none.
//!
//! All elements of an endpoint share one gate. While it is open, requests enter in the order in which they asked, those
//! of high priority first, up to a limit. A failure of the server or the network closes it: nobody asks until a pause is over, then one request is the
//! probe. Its success opens the gate; its failure makes the next pause twice as long.

use std::{
    collections::VecDeque,
    ops::ControlFlow,
    sync::{Arc, Mutex, MutexGuard},
    thread::{self, Thread},
    time::{Duration, Instant},
};

use vlmnarrate_engine::{Error, Priority};

/// How long a waiting thread sleeps at most before it asks whether it is still to wait.
///
/// Tests would not see through a short one that nobody was woken.
const POLL: Duration = Duration::from_millis(if cfg!(test) { 60_000 } else { 50 });
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A `Retry-After` beyond this is taken for this.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(300);

/// The gate of one endpoint.
#[derive(Default)]
pub(crate) struct Gate(Mutex<State>);

#[derive(Default)]
struct State {
    in_flight: usize,
    /// Requests that an overloaded server bore; `None` while it was never overloaded.
    bearable: Option<usize>,
    /// Answers since `bearable` last grew.
    answers: usize,
    last_answer: Option<Instant>,
    /// Those of high priority, then all others, oldest first each.
    waiting: VecDeque<Waiter>,
    last_ticket: u64,
    closed: Option<Closed>,
    /// Number of the last closing. What was asked before it says nothing about the time after it.
    closings: u64,
    /// Closings in a row.
    failures: u32,
}

struct Waiter {
    ticket: u64,
    priority: Priority,
    thread: Thread,
}

struct Closed {
    until: Instant,
    error: Error,
    is_probed: bool,
}

/// What a waiter is to do.
enum Entry {
    Enter {
        is_probe: bool,
    },
    /// With the error that closed the gate.
    Wait(Duration, Option<Error>),
}

impl State {
    fn enter(&self, ticket: u64, limit: usize, now: Instant) -> Entry {
        if let Some(closed) = &self.closed {
            let pause = closed.until.saturating_duration_since(now);
            return match closed.is_probed || !pause.is_zero() {
                true => Entry::Wait(
                    pause.clamp(Duration::from_millis(1), POLL),
                    Some(closed.error.clone()),
                ),
                false => Entry::Enter { is_probe: true },
            };
        }
        let place = self
            .waiting
            .iter()
            .position(|waiter| waiter.ticket == ticket);
        match place.is_some_and(|place| place < self.free(limit)) {
            true => Entry::Enter { is_probe: false },
            false => Entry::Wait(POLL, None),
        }
    }

    /// Requests that may enter now.
    fn free(&self, limit: usize) -> usize {
        let limit = self.bearable.map_or(limit, |bearable| bearable.min(limit));
        limit.saturating_sub(self.in_flight)
    }

    /// Queues a waiter behind all of its priority.
    fn queue(&mut self, waiter: Waiter) {
        let place = match waiter.priority {
            Priority::Normal => self.waiting.len(),
            Priority::High => self
                .waiting
                .partition_point(|other| other.priority == Priority::High),
        };
        self.waiting.insert(place, waiter);
    }

    /// Wakes as many waiters as places have become free, one if the gate is closed.
    fn wake(&self, places: usize) {
        for waiter in self.waiting.iter().take(places) {
            waiter.thread.unpark();
        }
    }

    /// Closes the gate after a failure of a request that entered after so many closings.
    fn close(&mut self, entered_after: u64, error: Error, pause: impl FnOnce(u32) -> Duration) {
        // Requests in flight together fail together: that is one failure.
        if entered_after != self.closings {
            return;
        }
        self.failures += 1;
        self.closings += 1;
        self.closed = Some(Closed {
            until: Instant::now() + pause(self.failures),
            error,
            is_probed: false,
        });
    }

    /// Counts an answer to a request that entered after so many closings.
    fn answered(&mut self, entered_after: u64) {
        if entered_after != self.closings {
            return;
        }
        self.failures = 0;
        if self.closed.take().is_some() {
            self.wake(usize::MAX);
        }
        if let Some(bearable) = &mut self.bearable {
            self.answers += 1;
            if self.answers >= *bearable {
                self.answers = 0;
                *bearable = bearable.saturating_add(1);
            }
        }
    }

    /// Lowers the limit after a request that the server had no room for, beside others that it has.
    fn lower(&mut self) {
        let bearable = self.in_flight.saturating_sub(1).max(1);
        self.bearable = Some(self.bearable.map_or(bearable, |old| old.min(bearable)));
        self.answers = 0;
    }
}

/// The pause before the next probe, after so many failures in a row: doubled each time, ± 25 %.
fn pause(failures: u32) -> Duration {
    let doubled = FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(16));
    doubled
        .min(LONGEST_PAUSE)
        .mul_f64(0.75 + 0.5 * fastrand::f64())
}

/// Someone asked to stop waiting.
#[derive(Debug)]
pub(crate) struct Stopped;

impl Gate {
    /// Waits for a permit while at most `limit` requests are in flight.
    ///
    /// `on_wait` is called every few milliseconds, with the error that closed the gate if it is closed; `Break` ends the
    /// wait.
    pub(crate) fn acquire(
        self: &Arc<Self>,
        limit: usize,
        priority: Priority,
        mut on_wait: impl FnMut(Option<&Error>) -> ControlFlow<()>,
    ) -> Result<Permit, Stopped> {
        let ticket = {
            let mut state = self.lock();
            state.last_ticket += 1;
            let ticket = state.last_ticket;
            state.queue(Waiter {
                ticket,
                priority,
                thread: thread::current(),
            });
            ticket
        };
        loop {
            let mut state = self.lock();
            match state.enter(ticket, limit, Instant::now()) {
                Entry::Enter { is_probe } => {
                    if is_probe && let Some(closed) = &mut state.closed {
                        closed.is_probed = true;
                    }
                    state.in_flight += 1;
                    state.waiting.retain(|waiter| waiter.ticket != ticket);
                    // Two permits that end before the first waiter runs have both woken that one only.
                    state.wake(state.free(limit));
                    return Ok(Permit {
                        gate: self.clone(),
                        entered_after: state.closings,
                        is_probe,
                    });
                }
                Entry::Wait(time, error) => {
                    drop(state);
                    if on_wait(error.as_ref()).is_break() {
                        let mut state = self.lock();
                        state.waiting.retain(|waiter| waiter.ticket != ticket);
                        // The place may have been free for this one.
                        state.wake(1);
                        return Err(Stopped);
                    }
                    thread::park_timeout(time);
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

/// The right to have one request in flight, until it is dropped.
pub(crate) struct Permit {
    gate: Arc<Gate>,
    entered_after: u64,
    is_probe: bool,
}

impl Permit {
    /// The server has answered, if only by an error about this request.
    pub(crate) fn answered(&self) {
        self.gate.lock().answered(self.entered_after);
    }

    /// The server or the network is away: closes the gate.
    pub(crate) fn away(&self, error: Error, retry_after: Option<Duration>) {
        let mut state = self.gate.lock();
        state.close(self.entered_after, error, |failures| {
            retry_after.map_or_else(|| pause(failures), |time| time.min(LONGEST_RETRY_AFTER))
        });
    }

    /// The server has no room. It gets fewer requests at once, or none for a while if it says so or had no other.
    pub(crate) fn overloaded(&self, error: Error, retry_after: Option<Duration>) {
        let has_others = self.gate.lock().in_flight > 1;
        match retry_after.is_none() && has_others && !self.is_probe {
            true => self.gate.lock().lower(),
            false => self.away(error, retry_after),
        }
    }

    /// A request was answered well.
    pub(crate) fn succeeded(&self) {
        self.answered();
        self.gate.lock().last_answer = Some(Instant::now());
    }

    /// Whether some request was answered well a short time ago.
    pub(crate) fn others_succeed(&self) -> bool {
        const SHORT: Duration = Duration::from_secs(10);
        let last = self.gate.lock().last_answer;
        last.is_some_and(|last| last.elapsed() < SHORT)
    }

    /// The error that keeps the gate closed; `None` while it is open.
    pub(crate) fn closed_by(&self) -> Option<Error> {
        let state = self.gate.lock();
        state.closed.as_ref().map(|closed| closed.error.clone())
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        state.in_flight -= 1;
        if self.is_probe
            && self.entered_after == state.closings
            && let Some(closed) = &mut state.closed
        {
            // Cancelled: another one may probe.
            closed.is_probed = false;
        }
        state.wake(1);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use vlmnarrate_engine::ErrorKind;

    use super::*;

    fn error() -> Error {
        Error::new(ErrorKind::Unavailable, "away")
    }

    fn enter(gate: &Arc<Gate>, limit: usize) -> Option<Permit> {
        gate.acquire(limit, Priority::Normal, |_| ControlFlow::Break(()))
            .ok()
    }

    #[test]
    fn no_more_than_the_limit_are_in_flight_and_each_gets_its_turn() {
        let gate = Arc::new(Gate::default());
        let (in_flight, most, done) = (
            AtomicUsize::new(0),
            AtomicUsize::new(0),
            AtomicUsize::new(0),
        );
        thread::scope(|scope| {
            for _ in 0..20 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let permit = gate
                            .acquire(3, Priority::Normal, |_| ControlFlow::Continue(()))
                            .unwrap();
                        most.fetch_max(in_flight.fetch_add(1, SeqCst) + 1, SeqCst);
                        thread::yield_now();
                        in_flight.fetch_sub(1, SeqCst);
                        permit.answered();
                        done.fetch_add(1, SeqCst);
                    }
                });
            }
        });
        assert_eq!((most.into_inner(), done.into_inner()), (3, 1000));
        assert!(gate.lock().waiting.is_empty());
    }

    #[test]
    fn permits_that_end_together_wake_as_many() {
        let gate = Arc::new(Gate::default());
        let start = Instant::now();
        for _ in 0..20 {
            let permits: Vec<_> = (0..8).map(|_| enter(&gate, 8).unwrap()).collect();
            thread::scope(|scope| {
                let enter = || {
                    let go_on = |_: Option<&Error>| ControlFlow::Continue(());
                    gate.acquire(8, Priority::Normal, go_on).unwrap()
                };
                let waiters: Vec<_> = (0..8).map(|_| scope.spawn(enter)).collect();
                while gate.lock().waiting.len() < 8 {
                    thread::yield_now();
                }
                drop(permits);
                // The end of a permit would wake the next waiter, so none ends before all have entered.
                let entered = waiters.into_iter().map(|waiter| waiter.join().unwrap());
                drop(entered.collect::<Vec<_>>());
            });
        }
        assert!(start.elapsed() < POLL, "a waiter was not woken");
    }

    #[test]
    fn those_of_high_priority_are_first() {
        let gate = Arc::new(Gate::default());
        let permit = enter(&gate, 1).unwrap();
        let order = Mutex::new(Vec::new());
        thread::scope(|scope| {
            let priorities = [
                Priority::Normal,
                Priority::High,
                Priority::Normal,
                Priority::High,
            ];
            for (i, priority) in priorities.into_iter().enumerate() {
                let (gate, order) = (&gate, &order);
                scope.spawn(move || {
                    let permit = gate.acquire(1, priority, |_| ControlFlow::Continue(()));
                    order.lock().unwrap().push(i);
                    drop(permit);
                });
                while gate.lock().waiting.len() <= i {
                    thread::yield_now();
                }
            }
            drop(permit);
        });
        assert_eq!(order.into_inner().unwrap(), [1, 3, 0, 2]);
    }

    #[test]
    fn a_failure_closes_the_gate_and_one_probe_opens_it() {
        let gate = Arc::new(Gate::default());
        let (a, b) = (enter(&gate, 9).unwrap(), enter(&gate, 9).unwrap());
        a.away(error(), Some(Duration::from_millis(30)));
        // Asked before the gate was closed: neither another failure nor a proof that the server is back.
        b.away(error(), Some(Duration::from_secs(100)));
        b.answered();
        drop((a, b));
        assert!(enter(&gate, 9).is_none());
        assert_eq!(gate.lock().failures, 1);
        thread::sleep(Duration::from_millis(40));
        let probe = enter(&gate, 9).expect("the pause is over");
        assert!(enter(&gate, 9).is_none(), "one probe is enough");
        drop(probe);
        let probe = enter(&gate, 9).expect("the first probe was cancelled");
        probe.answered();
        assert!(enter(&gate, 9).is_some());
    }

    #[test]
    fn those_who_wait_enter_when_the_gate_opens() {
        let gate = Arc::new(Gate::default());
        let first = enter(&gate, 9).unwrap();
        first.away(error(), Some(Duration::from_secs(100)));
        drop(first);
        let waiting = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..5 {
                scope.spawn(|| {
                    let mut has_waited = false;
                    let permit = gate.acquire(9, Priority::Normal, |error| {
                        assert_eq!(error.unwrap().message, "away");
                        if !std::mem::replace(&mut has_waited, true) {
                            waiting.fetch_add(1, SeqCst);
                        }
                        ControlFlow::Continue(())
                    });
                    permit.unwrap().answered();
                });
            }
            while waiting.load(SeqCst) < 5 {
                thread::yield_now();
            }
            // The pause is over.
            let mut state = gate.lock();
            state.closed.as_mut().unwrap().until = Instant::now();
            state.wake(usize::MAX);
        });
        assert!(gate.lock().closed.is_none());
    }

    #[test]
    fn an_overloaded_server_gets_as_many_requests_as_it_bears() {
        let gate = Arc::new(Gate::default());
        let mut permits: Vec<_> = (0..10).map(|_| enter(&gate, 10).unwrap()).collect();
        // It has room for 4.
        for refused in permits.drain(4..) {
            refused.overloaded(error(), None);
        }
        assert_eq!(gate.lock().free(10), 0);
        assert!(gate.lock().closed.is_none());
        // The limit grows again, one by one.
        for _ in 0..4 {
            permits[0].answered();
        }
        assert_eq!(gate.lock().free(10), 1);
        drop(permits);
        let alone = enter(&gate, 10).unwrap();
        alone.overloaded(error(), None);
        assert!(gate.lock().closed.is_some());
    }

    #[test]
    fn pauses_grow_and_end_growing() {
        for (failures, seconds) in [(1, 0.5), (2, 1.0), (5, 8.0), (7, 30.0), (1000, 30.0)] {
            let pause = pause(failures).as_secs_f64();
            assert!(
                (0.75 * seconds..=1.25 * seconds).contains(&pause),
                "{pause}"
            );
        }
    }
}
