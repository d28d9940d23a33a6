//! Loaded models, shared by all who want the same.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Condvar, Mutex, MutexGuard, Weak},
    time::Duration,
};

/// How often a caller that waits for another's load is asked whether to go on.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Values by key, each for as long as an `Arc` of it exists.
pub(crate) struct Registry<K, T> {
    slots: Mutex<HashMap<K, Slot<T>>>,
    changed: Condvar,
}

enum Slot<T> {
    Loading,
    Loaded(Weak<T>),
}

impl<K: Clone + Eq + Hash, T> Registry<K, T> {
    pub(crate) fn new() -> Self {
        Self {
            slots: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<K, Slot<T>>> {
        self.slots.lock().unwrap()
    }

    /// The value of a key, loaded if it isn't there. While another caller loads it, `waiting` is called now and then and
    /// may give up; if that load fails, this caller tries. Both closures get the `context`.
    ///
    /// No lock is held during a load.
    pub(crate) fn get<C: ?Sized, E>(
        &self,
        key: K,
        context: &mut C,
        mut waiting: impl FnMut(&mut C) -> Result<(), E>,
        load: impl FnOnce(&mut C) -> Result<T, E>,
    ) -> Result<Arc<T>, E> {
        let mut slots = self.lock();
        loop {
            match slots.get(&key) {
                Some(Slot::Loading) => {
                    drop(self.changed.wait_timeout(slots, POLL_INTERVAL).unwrap());
                    waiting(context)?;
                    slots = self.lock();
                }
                Some(Slot::Loaded(value)) => match value.upgrade() {
                    Some(value) => return Ok(value),
                    None => break,
                },
                None => break,
            }
        }
        slots.retain(|_, slot| match slot {
            Slot::Loading => true,
            Slot::Loaded(value) => value.strong_count() > 0,
        });
        slots.insert(key.clone(), Slot::Loading);
        drop(slots);

        let mut claim = Claim {
            registry: self,
            key: Some(key),
        };
        let value = Arc::new(load(context)?);
        claim.fill(&value);
        Ok(value)
    }

    fn settle(&self, key: K, value: Option<&Arc<T>>) {
        let mut slots = self.lock();
        match value {
            Some(value) => slots.insert(key, Slot::Loaded(Arc::downgrade(value))),
            None => slots.remove(&key),
        };
        self.changed.notify_all();
    }
}

/// Marks a key as being loaded. Dropped without a value, after a failure or a panic, another caller may try.
struct Claim<'r, K: Clone + Eq + Hash, T> {
    registry: &'r Registry<K, T>,
    key: Option<K>,
}

impl<K: Clone + Eq + Hash, T> Claim<'_, K, T> {
    fn fill(&mut self, value: &Arc<T>) {
        if let Some(key) = self.key.take() {
            self.registry.settle(key, Some(value));
        }
    }
}

impl<K: Clone + Eq + Hash, T> Drop for Claim<'_, K, T> {
    fn drop(&mut self) {
        if let Some(key) = self.key.take() {
            self.registry.settle(key, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        panic::{AssertUnwindSafe, catch_unwind},
        sync::mpsc::channel,
        thread,
    };

    use super::*;

    type Numbers = Registry<&'static str, u32>;

    fn get(numbers: &Numbers, key: &'static str, number: u32) -> Arc<u32> {
        let waiting = |_: &mut ()| Ok::<_, ()>(());
        numbers.get(key, &mut (), waiting, |_| Ok(number)).unwrap()
    }

    #[test]
    fn who_wants_the_same_gets_the_same() {
        let numbers = Numbers::new();
        let one = get(&numbers, "a", 1);
        let same = get(&numbers, "a", 2);
        assert!(Arc::ptr_eq(&one, &same));
        assert_eq!(*get(&numbers, "b", 3), 3);
        // Nobody holds it any more: it is gone, and so is its slot.
        drop((one, same));
        assert_eq!(*get(&numbers, "a", 4), 4);
        get(&numbers, "c", 5);
        assert_eq!(numbers.lock().len(), 1);
    }

    #[test]
    fn who_fails_leaves_it_to_the_next() {
        let numbers = Numbers::new();
        let failed = numbers.get("a", &mut (), |_| Ok(()), |_| Err("no"));
        assert_eq!(failed, Err("no"));
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            numbers.get(
                "a",
                &mut (),
                |()| Ok::<_, ()>(()),
                |()| panic!("as planned"),
            )
        }));
        assert!(panicked.is_err());
        assert_eq!(*get(&numbers, "a", 1), 1);
    }

    #[test]
    fn one_loads_and_the_others_wait() {
        let numbers = Numbers::new();
        let (begun, has_begun) = channel();
        let (go, may_go) = channel();
        thread::scope(|scope| {
            let numbers = &numbers;
            let loader = scope.spawn(move || {
                let load = |_: &mut ()| -> Result<u32, ()> {
                    begun.send(()).map_err(|_| ())?;
                    may_go.recv().map_err(|_| ())?;
                    Ok(1)
                };
                numbers.get("a", &mut (), |_| Ok(()), load).unwrap()
            });
            has_begun.recv().unwrap();
            // One gives up, one gets what the first has loaded.
            let load = |_: &mut u32| -> Result<u32, ()> { panic!("somebody is at it") };
            assert_eq!(numbers.get("a", &mut 0, |_| Err(()), load), Err(()));
            let waiting = |asked: &mut u32| {
                *asked += 1;
                if *asked == 1 {
                    go.send(()).unwrap();
                }
                Ok(())
            };
            let got = numbers.get("a", &mut 0, waiting, load).unwrap();
            assert!(Arc::ptr_eq(&got, &loader.join().unwrap()));
        });
    }
}
