//! How often somebody hears of progress.

use std::time::{Duration, Instant};

use vlmnarrate_engine::Transfer;

/// `None` of nothing.
pub fn percent(done: u64, total: u64) -> Option<u8> {
    let percent = (u128::from(done) * 100).checked_div(u128::from(total))?;
    Some(percent.min(100) as u8)
}

/// Lets a percentage through when it is new and the last is 100 ms old.
#[derive(Default)]
pub(crate) struct Throttle(Option<(u8, Instant)>);

impl Throttle {
    const PERIOD: Duration = Duration::from_millis(100);

    pub(crate) fn pass(&mut self, done: u64, total: u64) -> Option<u8> {
        let percent = percent(done, total).unwrap_or(100);
        if let Some((last, at)) = self.0
            && (percent == last || at.elapsed() < Self::PERIOD)
        {
            return None;
        }
        self.0 = Some((percent, Instant::now()));
        Some(percent)
    }
}

/// Lets a download's progress through once a second if the percentage is new, else every ten, with
/// the speed since the last time.
#[derive(Default)]
pub(crate) struct Pace(Option<(Transfer, Instant)>);

impl Pace {
    pub(crate) fn pass(&mut self, transfer: Transfer) -> Option<u64> {
        let Some((last, at)) = self.0 else {
            self.0 = Some((transfer, Instant::now()));
            return None;
        };
        let elapsed = at.elapsed();
        let is_new = percent(transfer.done, transfer.total) != percent(last.done, last.total)
            && elapsed >= Duration::from_secs(1);
        if !is_new && elapsed < Duration::from_secs(10) {
            return None;
        }
        self.0 = Some((transfer, Instant::now()));
        let received = transfer.received.saturating_sub(last.received);
        Some((received as f64 / elapsed.as_secs_f64()) as u64)
    }
}
