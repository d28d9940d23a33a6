//! Requests of `describe-now` that are not answered yet.

use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, Ordering},
};

use crate::element::settings::PromptSettings;

/// Limit of the queue, so that a runaway caller can't fill the memory.
const MAX_PENDING: usize = 64;

/// A queue of requests. Each stays in the queue until its caption is made or has failed, so that after a flush another
/// frame answers it.
#[derive(Debug, Default)]
pub(crate) struct RequestQueue {
    queue: Mutex<Queue>,
    /// Whether a request waits for a frame; read for every frame, without the lock.
    has_pending: AtomicBool,
}

#[derive(Debug, Default)]
struct Queue {
    last_id: u32,
    requests: Vec<DescribeRequest>,
}

#[derive(Clone, Debug)]
pub(crate) struct DescribeRequest {
    pub(crate) id: u32,
    /// `None` takes `detail-prompt`.
    pub(crate) prompt: Option<String>,
    /// `None` takes `detail-max-tokens`.
    pub(crate) max_tokens: Option<u32>,
    /// Whether a frame was submitted for the request.
    submitted: bool,
}

impl DescribeRequest {
    /// The request's own prompt settings, with those of `detail` where it has none.
    pub(crate) fn prompt_settings(&self, detail: &PromptSettings) -> PromptSettings {
        PromptSettings {
            prompt: self.prompt.clone().or_else(|| detail.prompt.clone()),
            max_tokens: self.max_tokens.unwrap_or(detail.max_tokens),
            choices: None,
            image_splitting: detail.image_splitting,
        }
    }
}

impl RequestQueue {
    /// Queues a request and returns its id; `None` if too many are pending.
    pub(crate) fn push(&self, prompt: Option<String>, max_tokens: Option<u32>) -> Option<u32> {
        let mut queue = self.lock();
        if queue.requests.len() == MAX_PENDING {
            return None;
        }
        // 0 stands for no request.
        queue.last_id = queue.last_id.checked_add(1).unwrap_or(1);
        let id = queue.last_id;
        queue.requests.push(DescribeRequest {
            id,
            prompt,
            max_tokens,
            submitted: false,
        });
        self.update(&queue);
        Some(id)
    }

    /// Whether a request waits for a frame.
    pub(crate) fn has_pending(&self) -> bool {
        self.has_pending.load(Ordering::Acquire)
    }

    /// Takes the oldest request that waits for a frame.
    pub(crate) fn take_next(&self) -> Option<DescribeRequest> {
        let mut queue = self.lock();
        let request = queue
            .requests
            .iter_mut()
            .find(|request| !request.submitted)?;
        request.submitted = true;
        let request = request.clone();
        self.update(&queue);
        Some(request)
    }

    /// Removes a request that was answered or has failed.
    pub(crate) fn complete(&self, id: u32) {
        self.lock().requests.retain(|request| request.id != id);
    }

    /// Ids of the requests in the queue.
    pub(crate) fn unanswered(&self) -> Vec<u32> {
        self.lock()
            .requests
            .iter()
            .map(|request| request.id)
            .collect()
    }

    /// Lets all requests wait for a frame again, because the worker's jobs were cancelled.
    pub(crate) fn retry_all(&self) {
        let mut queue = self.lock();
        for request in &mut queue.requests {
            request.submitted = false;
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
        let has_pending = queue.requests.iter().any(|request| !request.submitted);
        self.has_pending.store(has_pending, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_stays_until_it_is_answered() {
        let requests = RequestQueue::default();
        assert!(!requests.has_pending());
        assert_eq!(requests.push(None, None), Some(1));
        assert_eq!(requests.push(None, None), Some(2));
        assert_eq!(requests.take_next().map(|r| r.id), Some(1));
        assert!(requests.has_pending());
        assert_eq!(requests.take_next().map(|r| r.id), Some(2));
        assert!(!requests.has_pending());
        requests.complete(1);
        requests.retry_all();
        assert_eq!(requests.take_next().map(|r| r.id), Some(2));
        assert!(requests.take_next().is_none());
    }

    #[test]
    fn not_too_many() {
        let requests = RequestQueue::default();
        assert!((0..MAX_PENDING).all(|_| requests.push(None, None).is_some()));
        assert_eq!(requests.push(None, None), None);
        requests.clear();
        assert!(!requests.has_pending());
        assert!(requests.push(None, None).is_some());
    }
}
