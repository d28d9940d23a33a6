//! Throttles for progress messages.

use std::time::{Duration, Instant};

use vlmnarrate_engine::Transfer;

/// `None` if the total is 0.
pub(crate) fn percent(done: u64, total: u64) -> Option<u8> {
    let percent = (u128::from(done) * 100).checked_div(u128::from(total))?;
    Some(percent.min(100) as u8)
}

/// Passes a percentage on if it is new and the last one is at least 100 ms old.
#[derive(Default)]
pub(crate) struct LoadThrottle(Option<(u8, Instant)>);

impl LoadThrottle {
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

/// Passes the progress of a download on once a second if the percentage is new, else every ten seconds.
#[derive(Default)]
pub(crate) struct DownloadThrottle(Option<(Transfer, Instant)>);

impl DownloadThrottle {
    /// Bytes per second since the last time, if the progress is to be passed on.
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
