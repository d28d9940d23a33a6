//! Counters, and the durations of each stage.

use std::{
    collections::VecDeque,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::caption::Caption;
use vlmnarrate_engine::EngineInfo;

/// Number of captions that the percentiles cover.
const WINDOW: usize = 256;

/// A number that only grows, until the element starts again.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Returns the count before.
    pub(crate) fn increment(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn reset(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub(crate) frames: Counter,
    /// Submitted to the worker.
    pub(crate) sampled: Counter,
    /// Due, but the picture had not changed.
    pub(crate) unchanged: Counter,
    /// Submitted to the worker and replaced by a newer one.
    pub(crate) dropped: Counter,
    /// Submitted to the worker, and not answered because the server was away or the deadline passed.
    pub(crate) unanswered: Counter,
    captions: Counter,
    pub(crate) errors: Counter,
    window: Mutex<VecDeque<Sample>>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    /// As in [`STAGES`].
    stages: [Duration; STAGES.len()],
    tokens: u32,
}

const STAGES: [&str; 6] = [
    "queue",
    "preprocess",
    "vision",
    "prefill",
    "decode",
    "total",
];
const DECODE: usize = 4;

impl Stats {
    pub(crate) fn reset(&self) {
        let Self {
            frames,
            sampled,
            unchanged,
            dropped,
            unanswered,
            captions,
            errors,
            window,
        } = self;
        let counters = [
            frames, sampled, unchanged, dropped, unanswered, captions, errors,
        ];
        for counter in counters {
            counter.reset();
        }
        window.lock().unwrap().clear();
    }

    pub(crate) fn record(&self, caption: &Caption, queue: Duration) {
        let Caption { cost, tokens, .. } = caption;
        let sample = Sample {
            stages: [
                queue,
                cost.preprocess,
                cost.vision,
                cost.prefill,
                cost.decode,
                cost.latency,
            ],
            tokens: *tokens,
        };
        self.captions.increment();
        let mut window = self.window.lock().unwrap();
        if window.len() == WINDOW {
            window.pop_front();
        }
        window.push_back(sample);
    }

    /// The value of the `stats` property.
    ///
    /// `image_size` is the side of the squares that the engine is given; 0 if unknown.
    pub(crate) fn structure(&self, engine: &EngineInfo, image_size: u32) -> gst::Structure {
        let window = self.window.lock().unwrap().clone();
        let mut stats = gst::Structure::builder("vlmnarrate-stats")
            .field("device", &engine.device)
            .field("device-name", &engine.device_name)
            .field("device-memory", engine.device_memory)
            .field("dtype", &engine.dtype)
            .field("quantization", &engine.quantization)
            .field("weights-memory", engine.weights_memory)
            .field("image-size", image_size)
            .field("frames", self.frames.get())
            .field("sampled", self.sampled.get())
            .field("unchanged", self.unchanged.get())
            .field("dropped", self.dropped.get())
            .field("unanswered", self.unanswered.get())
            .field("captions", self.captions.get())
            .field("errors", self.errors.get());
        for (stage, name) in STAGES.into_iter().enumerate() {
            let mut times: Vec<_> = window.iter().map(|sample| sample.stages[stage]).collect();
            times.sort_unstable();
            for percent in [50, 95] {
                stats = stats.field(format!("{name}-p{percent}"), percentile(&times, percent));
            }
        }
        let tokens: u64 = window.iter().map(|sample| u64::from(sample.tokens)).sum();
        let decode: Duration = window.iter().map(|sample| sample.stages[DECODE]).sum();
        let rate = if decode.is_zero() {
            0.0
        } else {
            tokens as f64 / decode.as_secs_f64()
        };
        stats.field("tokens-per-second", rate).build()
    }
}

/// The smallest time that `percent` of the sorted times don't exceed, in nanoseconds.
fn percentile(times: &[Duration], percent: usize) -> u64 {
    let rank = (times.len() * percent).div_ceil(100).saturating_sub(1);
    times
        .get(rank)
        .map_or(0, |time| time.as_nanos().try_into().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_rank() {
        let times: Vec<_> = (1..=20).map(Duration::from_nanos).collect();
        assert_eq!(percentile(&times, 50), 10);
        assert_eq!(percentile(&times, 95), 19);
        assert_eq!(percentile(&times[..1], 95), 1);
        assert_eq!(percentile(&[], 50), 0);
    }
}
