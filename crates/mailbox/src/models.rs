//! loom models of the mailbox, run by `tools/sanitize.sh loom`: every interleaving of the threads. A lost wake-up is a
//! deadlock, which loom reports.

use loom::{sync::Arc, thread};

use super::*;

/// Runs a model with a worker thread that hands each job it takes to `describe`.
fn model<N>(worker: fn() -> N, rest: fn(&Arc<Mailbox<u32>>))
where
    N: FnMut(&Mailbox<u32>, Epoch, u32) + 'static,
{
    loom::model(move || {
        let mailbox = Arc::new(Mailbox::new());
        mailbox.start();
        let mut describe = worker();
        let worker = thread::spawn({
            let mailbox = mailbox.clone();
            move || {
                while let Some((epoch, job)) = mailbox.take() {
                    describe(&mailbox, epoch, job);
                }
                mailbox.worker_exited();
            }
        });
        rest(&mailbox);
        mailbox.close();
        worker.join().unwrap();
    });
}

fn anything() -> impl FnMut(&Mailbox<u32>, Epoch, u32) {
    |_, _, _| ()
}

#[test]
fn a_wait_ends_when_the_job_is_done() {
    model(anything, |mailbox| {
        assert_eq!(mailbox.put_newest(1), Ok(None));
        assert_eq!(mailbox.wait_idle(None), Wait::Idle);
        assert!(mailbox.is_idle());
        assert_eq!(mailbox.put_requested(2), Ok(()));
        assert_eq!(mailbox.wait_idle(None), Wait::Idle);
    });
}

/// All that is put is taken or replaced, and nothing twice.
#[test]
fn nothing_is_lost() {
    fn once() -> impl FnMut(&Mailbox<u32>, Epoch, u32) {
        let mut last = 0;
        move |_, _, job| {
            assert!(job > last, "{job} after {last}");
            last = job;
        }
    }
    model(once, |mailbox| {
        assert_eq!(mailbox.put_newest(1), Ok(None));
        let replaced = mailbox.put_newest(2).unwrap();
        assert!(replaced.is_none_or(|job| job == 1));
        assert_eq!(mailbox.wait_idle(None), Wait::Idle);
    });
}

#[test]
fn a_job_is_of_the_epoch_in_which_it_was_put() {
    // What is put is the epoch, cut to a job's size.
    fn own() -> impl FnMut(&Mailbox<u32>, Epoch, u32) {
        |mailbox, epoch, job| {
            assert_eq!(epoch as u32, job);
            assert!(mailbox.epoch() >= epoch);
        }
    }
    model(own, |mailbox| {
        assert_eq!(mailbox.put_newest(mailbox.epoch() as u32), Ok(None));
        let epoch = mailbox.flush_start();
        assert_eq!(mailbox.put_newest(0), Err(Refused::Flushing));
        mailbox.flush_stop();
        assert_eq!(mailbox.put_newest(epoch as u32), Ok(None));
        assert_eq!(mailbox.wait_idle(None), Wait::Idle);
    });
}

#[test]
fn a_close_ends_with_the_callback_that_it_waits_for() {
    fn callback() -> impl FnMut(&Mailbox<u32>, Epoch, u32) {
        |mailbox, _, _| drop(mailbox.begin_callback())
    }
    model(callback, |mailbox| {
        assert_eq!(mailbox.put_newest(1), Ok(None));
    });
}

/// A streaming thread that waits, and somebody else who flushes, stops or closes.
#[test]
fn a_wait_ends_when_it_is_flushed() {
    fn stop(mailbox: &Mailbox<u32>) {
        mailbox.stop();
    }
    fn close(mailbox: &Mailbox<u32>) {
        mailbox.close();
    }
    fn flush(mailbox: &Mailbox<u32>) {
        mailbox.flush_start();
        mailbox.flush_stop();
    }
    fn check(mailbox: &Arc<Mailbox<u32>>, interrupt: fn(&Mailbox<u32>)) {
        let streaming = thread::spawn({
            let mailbox = mailbox.clone();
            move || match mailbox.put_newest(1) {
                Ok(_) => mailbox.wait_idle(None),
                Err(refused) => Wait::Refused(refused),
            }
        });
        interrupt(mailbox);
        let wait = streaming.join().unwrap();
        let flushed = Wait::Refused(Refused::Flushing);
        assert!(wait == Wait::Idle || wait == flushed, "{wait:?}");
    }
    model(anything, |mailbox| check(mailbox, stop));
    model(anything, |mailbox| check(mailbox, flush));
    model(anything, |mailbox| check(mailbox, close));
}

#[test]
fn a_wait_ends_when_the_worker_fails() {
    loom::model(|| {
        let mailbox = Arc::new(Mailbox::new());
        mailbox.start();
        let worker = thread::spawn({
            let mailbox = mailbox.clone();
            move || {
                assert!(mailbox.take().is_some());
                mailbox.worker_exited();
            }
        });
        assert_eq!(mailbox.put_newest(1), Ok(None));
        let failed = Wait::Refused(Refused::WorkerFailed);
        assert_eq!(mailbox.wait_idle(None), failed);
        assert_eq!(mailbox.put_newest(2), Err(Refused::WorkerFailed));
        worker.join().unwrap();
    });
}

#[test]
fn a_wait_for_the_load_ends_with_it_or_with_the_stop() {
    model(anything, |mailbox| {
        assert_eq!(mailbox.wait_loaded(), Ok(()));
    });
    model(anything, |mailbox| {
        let streaming = thread::spawn({
            let mailbox = mailbox.clone();
            move || mailbox.wait_loaded()
        });
        mailbox.stop();
        let wait = streaming.join().unwrap();
        assert!(wait.is_ok() || wait == Err(Refused::Flushing), "{wait:?}");
    });
}

/// Threads that cancel report the epoch that began to the element, without a lock around both steps.
#[test]
fn the_element_knows_the_newest_epoch_whoever_reports_last() {
    loom::model(|| {
        let mailbox = Arc::new(Mailbox::<u32>::new());
        let known = Arc::new(Mutex::new(NewestEpoch::default()));
        mailbox.start();
        let flush = thread::spawn({
            let (mailbox, known) = (mailbox.clone(), known.clone());
            move || {
                let epoch = mailbox.flush_start();
                known.lock().unwrap().advance_to(epoch);
            }
        });
        let epoch = mailbox.cancel();
        known.lock().unwrap().advance_to(epoch);
        flush.join().unwrap();
        assert!(known.lock().unwrap().is_current(mailbox.epoch()));
    });
}

#[test]
fn no_callback_begins_in_an_epoch_that_is_over() {
    use loom::sync::atomic::AtomicBool;
    loom::model(|| {
        let mailbox = Arc::new(Mailbox::new());
        let is_over = Arc::new(AtomicBool::new(false));
        mailbox.start();
        let worker = thread::spawn({
            let (mailbox, is_over) = (mailbox.clone(), is_over.clone());
            move || {
                if let Some((epoch, _)) = mailbox.take()
                    && let Some(_callback) = mailbox.begin_callback_in(epoch)
                {
                    assert!(!is_over.load(Ordering::SeqCst));
                }
            }
        });
        assert_eq!(mailbox.put_newest(1), Ok(None));
        mailbox.flush_start();
        is_over.store(true, Ordering::SeqCst);
        mailbox.close();
        worker.join().unwrap();
    });
}
