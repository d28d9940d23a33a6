//! When in an interval the frames of an element are due.

use std::sync::{
    LazyLock,
    atomic::{AtomicU32, Ordering},
};

/// A part of the interval, 0 to 1, by which the grid of due frames is shifted, so that elements that ask the same server
/// don't ask at the same time.
pub(crate) struct Phase(pub(crate) f64);

impl Default for Phase {
    /// A phase far from those of the elements before: however many there are, multiples of the golden ratio leave no
    /// large gap. Processes start anywhere.
    fn default() -> Self {
        const GOLDEN_RATIO: f64 = 0.618_033_988_749_894_9;
        static FIRST: LazyLock<f64> = LazyLock::new(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            f64::from(now.unwrap_or_default().subsec_nanos()) / 1e9
        });
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self((*FIRST + f64::from(count) * GOLDEN_RATIO).fract())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_spread_evenly() {
        let mut phases: Vec<_> = (0..100).map(|_| Phase::default().0).collect();
        phases.sort_by(f64::total_cmp);
        assert!(phases.iter().all(|phase| (0.0..1.0).contains(phase)));
        let gaps = phases.windows(2).map(|pair| pair[1] - pair[0]);
        let widest = gaps.fold(0.0, f64::max);
        assert!(widest < 0.02, "{widest}");
    }
}
