//! An engine whose capacity is known exactly.

use std::{
    collections::VecDeque,
    io,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, Instant},
};

use crate::{Connection, Exchange, answers, models};

/// Capacity of [`Slots`].
#[derive(Clone, Debug)]
pub struct Capacity {
    /// Number of requests that are computed at once.
    pub slots: usize,
    /// Time that each takes, counted from when it gets a slot.
    pub delay: Duration,
    /// Number of words of each answer, streamed at equal distances over `delay`.
    pub tokens: u32,
    /// Number of requests that may wait for a slot; others get 503. `None`: no limit.
    pub queue_limit: Option<usize>,
}

impl Default for Capacity {
    fn default() -> Self {
        Self {
            slots: 1,
            delay: Duration::from_millis(100),
            tokens: 8,
            queue_limit: None,
        }
    }
}

/// What happened so far.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Requests answered in full.
    pub served: usize,
    /// Requests whose client closed the connection before the end.
    pub cancelled: usize,
    /// Requests that got 503.
    pub refused: usize,
    /// Largest number of requests at the server at once, those that wait included.
    pub in_flight_max: usize,
    /// When each chat request arrived, those that got 503 included.
    pub arrivals: Vec<Instant>,
}

/// Engine that computes a fixed number of requests at once, each in a fixed time, in the order of arrival.
///
/// A slot is free again at the nominal end of its request, or as soon as the client closes the connection. Threads that
/// wake up late don't lower the capacity: the next request begins when it should have.
#[derive(Clone)]
pub struct Slots(Arc<Shared>);

struct Shared {
    capacity: Capacity,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    busy: usize,
    queue: VecDeque<Waiter>,
    in_flight: usize,
    counters: Counters,
}

struct Waiter {
    arrived: Instant,
    begin: Arc<OnceLock<Instant>>,
    /// Wakes the thread of the request when dropped.
    _signal: UnixStream,
}

impl State {
    /// Gives the slot of a request that ended at `end` to the next one.
    fn release(&mut self, end: Instant) {
        match self.queue.pop_front() {
            Some(next) => {
                let _ = next.begin.set(end.max(next.arrived));
            }
            None => self.busy -= 1,
        }
    }
}

enum Place {
    Slot,
    Queue(Arc<OnceLock<Instant>>, UnixStream),
    Refused,
}

impl Slots {
    /// Engine with all slots free.
    pub fn new(capacity: Capacity) -> Self {
        Self(Arc::new(Shared {
            capacity,
            state: Mutex::default(),
        }))
    }

    /// Handler for [`Server::start`](crate::Server::start).
    pub fn handler(
        &self,
    ) -> impl Fn(&Exchange, &mut Connection) -> io::Result<()> + Send + Sync + use<> {
        let slots = self.clone();
        move |exchange, client| {
            if !exchange.is_chat() {
                return models(client);
            }
            let answered = slots.answer(exchange, client);
            slots.0.state.lock().unwrap().in_flight -= 1;
            answered
        }
    }

    /// Requests per second that the engine answers at most.
    pub fn ceiling(&self) -> f64 {
        self.0.capacity.slots as f64 / self.0.capacity.delay.as_secs_f64()
    }

    /// What happened since the start or the last [`reset`](Self::reset).
    pub fn counters(&self) -> Counters {
        self.0.state.lock().unwrap().counters.clone()
    }

    /// Sets all counters to zero. Requests that are at the server stay there.
    pub fn reset(&self) {
        let mut state = self.0.state.lock().unwrap();
        state.counters = Counters {
            in_flight_max: state.in_flight,
            ..Counters::default()
        };
    }

    fn arrive(&self, arrived: Instant) -> io::Result<Place> {
        let capacity = &self.0.capacity;
        let mut state = self.0.state.lock().unwrap();
        state.in_flight += 1;
        state.counters.arrivals.push(arrived);
        state.counters.in_flight_max = state.counters.in_flight_max.max(state.in_flight);
        if state.busy < capacity.slots {
            state.busy += 1;
            return Ok(Place::Slot);
        }
        if capacity
            .queue_limit
            .is_some_and(|limit| state.queue.len() >= limit)
        {
            state.counters.refused += 1;
            return Ok(Place::Refused);
        }
        let (signal, wake) = UnixStream::pair()?;
        let begin = Arc::<OnceLock<Instant>>::default();
        state.queue.push_back(Waiter {
            arrived,
            begin: begin.clone(),
            _signal: signal,
        });
        Ok(Place::Queue(begin, wake))
    }

    /// Frees the slot, or the place in the queue, of a request whose client has gone.
    fn cancel(&self, begin: Option<&Arc<OnceLock<Instant>>>) {
        let mut state = self.0.state.lock().unwrap();
        state.counters.cancelled += 1;
        match begin {
            Some(begin) if begin.get().is_none() => {
                state.queue.retain(|w| !Arc::ptr_eq(&w.begin, begin));
            }
            _ => state.release(Instant::now()),
        }
    }

    fn answer(&self, exchange: &Exchange, client: &mut Connection) -> io::Result<()> {
        let begin = match self.arrive(exchange.arrived)? {
            Place::Slot => exchange.arrived,
            Place::Refused => return client.error(503, "The queue is full"),
            Place::Queue(begin, wake) => {
                let granted = client.wait_for(&wake);
                match begin.get() {
                    Some(begin) if granted => *begin,
                    _ => {
                        self.cancel(Some(&begin));
                        return Err(io::ErrorKind::ConnectionAborted.into());
                    }
                }
            }
        };
        if let Err(error) = self.stream(begin, client) {
            self.cancel(None);
            return Err(error);
        }
        // Counted before the client can know that it has the whole answer.
        {
            let mut state = self.0.state.lock().unwrap();
            state.counters.served += 1;
            state.release(begin + self.0.capacity.delay);
        }
        answers::end(exchange, client, self.0.capacity.tokens).inspect_err(|_| {
            let counters = &mut self.0.state.lock().unwrap().counters;
            counters.served -= 1;
            counters.cancelled += 1;
        })
    }

    /// Sends all words, the last at the end of `delay`.
    fn stream(&self, begin: Instant, client: &mut Connection) -> io::Result<()> {
        let Capacity { delay, tokens, .. } = self.0.capacity;
        for token in 1..=tokens.max(1) {
            if client.closed_until(begin + delay * token / tokens.max(1)) {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            match token {
                1 => {
                    client.stream_head()?;
                    client.delta("word")?;
                }
                _ => client.delta(" word")?,
            }
        }
        Ok(())
    }
}
