//! Caches of a model's sessions, and the memory that requests take beside them.
//!
//! A session's cache stays for its next caption. When memory gets short, caches that nobody uses go first, those that
//! were not used for longest before the others; their sessions only take longer next time.

use std::{
    sync::{Arc, Mutex, MutexGuard, Weak},
    time::Instant,
};

use crate::{
    backends::{SequenceSlot, request_size::RequestMemory},
    machine::memory::{Shortage, check_available},
};

/// The place of a session's cache. It is empty while a sequence has the cache, and after it was evicted.
#[derive(Debug, Default)]
pub(crate) struct CachePlace(Mutex<Option<(Instant, Box<dyn SequenceSlot>)>>);

impl CachePlace {
    fn lock(&self) -> MutexGuard<'_, Option<(Instant, Box<dyn SequenceSlot>)>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes the cache away.
    pub(crate) fn take(&self) -> Option<Box<dyn SequenceSlot>> {
        self.lock().take().map(|(_, slot)| slot)
    }

    /// Puts the cache back, for the next caption.
    pub(crate) fn put(&self, slot: Box<dyn SequenceSlot>) {
        *self.lock() = Some((Instant::now(), slot));
    }

    /// Looks at the cache, if it is there.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&dyn SequenceSlot) -> T) -> Option<T> {
        self.lock().as_ref().map(|(_, slot)| look(slot.as_ref()))
    }
}

/// The places of all sessions of a model.
#[derive(Debug, Default)]
pub(crate) struct Caches(Mutex<Vec<Weak<CachePlace>>>);

impl Caches {
    /// A place for a new session.
    pub(crate) fn new_place(&self) -> Arc<CachePlace> {
        let place = Arc::new(CachePlace::default());
        let mut places = self.0.lock().unwrap_or_else(|e| e.into_inner());
        places.retain(|place| place.strong_count() > 0);
        places.push(Arc::downgrade(&place));
        place
    }

    /// Frees the cache that was not used for longest, but not this one. Returns whether there was one.
    pub(crate) fn evict(&self, but: &Arc<CachePlace>) -> bool {
        let places = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let others = places.iter().filter_map(Weak::upgrade);
        let others = others.filter(|place| !Arc::ptr_eq(place, but));
        let unused = others.filter_map(|place| {
            let since = place.lock().as_ref().map(|(since, _)| *since)?;
            Some((since, place))
        });
        let oldest = unused.min_by_key(|(since, _)| *since);
        oldest.is_some_and(|(_, place)| place.take().is_some())
    }
}

/// Memory that requests of all models in this process may still take.
static CLAIMED: Mutex<Vec<RequestMemory>> = Mutex::new(Vec::new());

/// Memory that a request may take, until it is dropped.
#[derive(Debug)]
pub(crate) struct Claim(RequestMemory);

impl Claim {
    /// Claims memory, if there is enough for this request beside those that have claimed theirs.
    pub(crate) fn new(memory: RequestMemory) -> Result<Self, Shortage> {
        let mut claimed = CLAIMED.lock().unwrap_or_else(|e| e.into_inner());
        let all = claimed.iter().chain([&memory]);
        // Two at a time take what passes: pictures are encoded while others make a step.
        let mut passing: Vec<_> = all.clone().map(|memory| memory.passing).collect();
        passing.sort_unstable_by(|a, b| b.cmp(a));
        let passing = passing.iter().take(2).sum::<u64>();
        let held = all.map(|memory| memory.held + memory.cache).sum::<u64>();
        check_available(held + passing)?;
        claimed.push(memory);
        Ok(Self(memory))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claimed = CLAIMED.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(index) = claimed.iter().position(|memory| *memory == self.0) {
            claimed.swap_remove(index);
        }
    }
}
