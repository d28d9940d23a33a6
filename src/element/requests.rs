//! What `describe-now` asked for and is not answered yet.

use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, Ordering},
};

use crate::element::settings::Asking;

/// Requests that may wait: a runaway caller must not fill the memory.
const LIMIT: usize = 64;

/// A queue of requests. One stays in it until its caption is made or has failed, so that a flush
/// in between only makes another frame answer it.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    queue: Mutex<Queue>,
    /// Some request waits for a frame; to be looked at for every frame, without the lock.
    waiting: AtomicBool,
}

#[derive(Debug, Default)]
struct Queue {
    last_id: u32,
    requests: Vec<Request>,
}

#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) id: u32,
    /// `None` takes `detail-prompt`.
    pub(crate) prompt: Option<String>,
    /// `None` takes `detail-max-tokens`.
    pub(crate) max_tokens: Option<u32>,
    /// A frame was given to the worker.
    asked: bool,
}

impl Request {
    /// The question to ask, where it doesn't say itself as `detail` has it.
    pub(crate) fn asking(&self, detail: &Asking) -> Asking {
        Asking {
            prompt: self.prompt.clone().or_else(|| detail.prompt.clone()),
            max_tokens: self.max_tokens.unwrap_or(detail.max_tokens),
            choices: None,
            image_splitting: detail.image_splitting,
        }
    }
}

impl Requests {
    /// Queues a request; `None` if too many wait.
    pub(crate) fn push(&self, prompt: Option<String>, max_tokens: Option<u32>) -> Option<u32> {
        let mut queue = self.lock();
        if queue.requests.len() == LIMIT {
            return None;
        }
        // 0 stands for "nobody asked".
        queue.last_id = queue.last_id.checked_add(1).unwrap_or(1);
        let id = queue.last_id;
        queue.requests.push(Request {
            id,
            prompt,
            max_tokens,
            asked: false,
        });
        self.update(&queue);
        Some(id)
    }

    /// Whether a request waits for a frame.
    pub(crate) fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::Acquire)
    }

    /// The oldest request that waits for a frame, which it gets now.
    pub(crate) fn next(&self) -> Option<Request> {
        let mut queue = self.lock();
        let request = queue.requests.iter_mut().find(|request| !request.asked)?;
        request.asked = true;
        let request = request.clone();
        self.update(&queue);
        Some(request)
    }

    /// The request is done with.
    pub(crate) fn answered(&self, id: u32) {
        self.lock().requests.retain(|request| request.id != id);
    }

    /// Numbers of those that are not answered.
    pub(crate) fn open(&self) -> Vec<u32> {
        self.lock()
            .requests
            .iter()
            .map(|request| request.id)
            .collect()
    }

    /// What the worker had is lost: frames to come will do.
    pub(crate) fn ask_again(&self) {
        let mut queue = self.lock();
        for request in &mut queue.requests {
            request.asked = false;
        }
        self.update(&queue);
    }

    pub(crate) fn clear(&self) {
        let mut queue = self.lock();
        queue.requests.clear();
        self.update(&queue);
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap()
    }

    fn update(&self, queue: &Queue) {
        let waiting = queue.requests.iter().any(|request| !request.asked);
        self.waiting.store(waiting, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_stays_until_it_is_answered() {
        let requests = Requests::default();
        assert!(!requests.is_waiting());
        assert_eq!(requests.push(None, None), Some(1));
        assert_eq!(requests.push(None, None), Some(2));
        assert_eq!(requests.next().map(|r| r.id), Some(1));
        assert!(requests.is_waiting());
        assert_eq!(requests.next().map(|r| r.id), Some(2));
        assert!(!requests.is_waiting());
        requests.answered(1);
        requests.ask_again();
        assert_eq!(requests.next().map(|r| r.id), Some(2));
        assert!(requests.next().is_none());
    }

    #[test]
    fn not_too_many() {
        let requests = Requests::default();
        assert!((0..LIMIT).all(|_| requests.push(None, None).is_some()));
        assert_eq!(requests.push(None, None), None);
        requests.clear();
        assert!(!requests.is_waiting());
        assert!(requests.push(None, None).is_some());
    }
}
