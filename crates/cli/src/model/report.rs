//! What a measurement says: a table for people, JSON for programs.

use std::{fmt::Write, time::Duration};

use anyhow::Result;
use gstvlmnarrate::{Caption, caption::Cost};
use serde_json::{Value, json};

use super::Times;
use super::{
    frames::SIZE,
    measure::{Measurement, Row, Scene},
};
use crate::{captions::lines::one_line, run::named, units::span};

/// Part of what a caption took.
type Stage = fn(&Cost) -> Duration;

/// Stages of a caption, with their names.
const STAGES: [(&str, Stage); 5] = [
    ("caption", |cost| cost.latency),
    ("preprocess", |cost| cost.preprocess),
    ("vision", |cost| cost.vision),
    ("prefill", |cost| cost.prefill),
    ("decode", |cost| cost.decode),
];

/// Where it was measured.
pub struct Machine {
    pub processor: Option<String>,
    pub cores: usize,
    /// Bytes.
    pub peak_memory: Option<u64>,
    /// Bytes, before the model was loaded.
    pub memory_before: Option<u64>,
    pub times: Times,
}

/// All that was measured.
pub struct Report<'a> {
    machine: &'a Machine,
    last: Caption,
    dtype: String,
    quantization: String,
    weights_memory: u64,
    rows: Vec<Row>,
}

impl<'a> Report<'a> {
    /// # Errors
    ///
    /// Nothing was measured.
    pub fn new(
        machine: &'a Machine,
        stats: &gst::Structure,
        measurement: Measurement,
    ) -> Result<Self> {
        let last = (measurement.rows.last())
            .and_then(|row| row.captions.last())
            .cloned();
        Ok(Self {
            machine,
            last: last.ok_or_else(|| anyhow::anyhow!("nothing was measured"))?,
            dtype: stats.get("dtype")?,
            quantization: stats.get("quantization")?,
            weights_memory: stats.get("weights-memory")?,
            rows: measurement.rows,
        })
    }

    /// The report for people.
    pub fn text(&self) -> String {
        let mut text = format!("{}\n", one_line(&named(&self.last)));
        let mut say = |name: &str, value: String| {
            let _ = writeln!(text, "  {name:<11}{value}");
        };
        let Machine {
            processor,
            cores,
            peak_memory,
            memory_before,
            times,
        } = self.machine;
        let device = match self.last.device.as_str() {
            "cpu" => "cpu".to_owned(),
            kind => format!("{kind}, {}", self.last.device_name),
        };
        say("device", device);
        let name = processor.as_deref().unwrap_or(&self.last.device_name);
        say("processor", format!("{name}, {}", counted(*cores, "core")));
        let weights = match self.quantization.as_str() {
            "" => "unknown".to_owned(),
            "none" => self.dtype.clone(),
            "file" => format!("quantized as in the file, computed in {}", self.dtype),
            quantization => format!("{quantization}, computed in {}", self.dtype),
        };
        say("weights", weights);
        if let Some(time) = times.download {
            say("download", span(time.as_secs_f64()));
        }
        if let Some(time) = times.load {
            say("load", format!("{} ms", time.as_millis()));
        }
        if let (Some(peak), Some(before)) = (peak_memory, memory_before) {
            let weights = match self.weights_memory {
                0 => String::new(),
                bytes => format!(", {} of weights", megabytes(bytes)),
            };
            let on_device = match self.last.device.as_str() {
                "cpu" => "",
                _ => " on the device",
            };
            let value = format!(
                "{} at most in this process: {} without a model{weights}{on_device}",
                megabytes(*peak),
                megabytes(*before)
            );
            say("memory", value);
        }
        let (width, height) = SIZE;
        say("frames", format!("{width}x{height}"));
        say("says", one_line(&self.last.text));
        text.push_str(&self.table());
        text
    }

    fn table(&self) -> String {
        let mut table = String::from("\nmilliseconds          ");
        for (name, _) in STAGES {
            let _ = write!(table, "{name:>11}");
        }
        table.push_str("   tokens/s  captions\n");
        for row in &self.rows {
            let scene = match row.scene {
                Scene::Cut => "cut",
                Scene::Holds => "holds",
            };
            for (name, percent) in [("median", 50), ("p95", 95)] {
                let label = match percent {
                    50 => format!("{} px, {scene}", row.image_size),
                    _ => String::new(),
                };
                let _ = write!(table, "{label:<15}{name:<7}");
                for (_, stage) in STAGES {
                    let _ = write!(
                        table,
                        "{:>11}",
                        milliseconds(row.percentile(stage, percent))
                    );
                }
                if percent == 50 {
                    let rate = row.tokens_per_second();
                    let rate = rate.map_or_else(|| "-".into(), |rate| format!("{rate:.0}"));
                    let _ = write!(table, "{rate:>11}{:>10}", row.captions.len());
                }
                table.push('\n');
            }
        }
        table.push_str(
            "cut: another picture each time. holds: the same picture again, as while nothing happens.\n",
        );
        table
    }

    /// The report for programs.
    pub fn json(&self) -> Value {
        let Machine {
            processor,
            cores,
            peak_memory,
            memory_before,
            times,
        } = self.machine;
        let seconds = |time: Option<Duration>| time.map(|time| time.as_secs_f64());
        json!({
            "model": self.last.model,
            "revision": self.last.revision,
            "device": self.last.device,
            "device-name": self.last.device_name,
            "device-memory": self.last.device_memory,
            "processor": processor,
            "cores": cores,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "weights-memory": self.weights_memory,
            "peak-memory": peak_memory,
            "memory-before": memory_before,
            "download-seconds": seconds(times.download),
            "load-seconds": seconds(times.load),
            "frame-width": SIZE.0,
            "frame-height": SIZE.1,
            "prompt": self.last.prompt,
            "text": self.last.text,
            "version": env!("CARGO_PKG_VERSION"),
            "rows": self.rows.iter().map(Row::json).collect::<Vec<_>>(),
        })
    }
}

impl Row {
    /// The smallest time that `percent` of the captions don't exceed.
    fn percentile(&self, stage: Stage, percent: usize) -> Duration {
        let mut times: Vec<_> = self
            .captions
            .iter()
            .map(|caption| stage(&caption.cost))
            .collect();
        times.sort_unstable();
        let rank = (times.len() * percent).div_ceil(100).saturating_sub(1);
        times.get(rank).copied().unwrap_or_default()
    }

    /// While decoding, as the element's statistics count it; `None` if no caption has more than a token.
    fn tokens_per_second(&self) -> Option<f64> {
        let tokens: u32 = self.captions.iter().map(|caption| caption.tokens).sum();
        let time: Duration = self
            .captions
            .iter()
            .map(|caption| caption.cost.decode)
            .sum();
        (!time.is_zero()).then(|| f64::from(tokens) / time.as_secs_f64())
    }

    fn json(&self) -> Value {
        let mut row = json!({
            "image-size": self.image_size,
            "scene": match self.scene {
                Scene::Cut => "cut",
                Scene::Holds => "holds",
            },
            "captions": self.captions.len(),
            "tokens": self.captions.iter().map(|caption| caption.tokens).sum::<u32>(),
            "tokens-per-second": self.tokens_per_second(),
        });
        for (name, stage) in STAGES {
            let value = |percent| 1e3 * self.percentile(stage, percent).as_secs_f64();
            row[format!("{name}-ms")] = json!({"median": value(50), "p95": value(95)});
        }
        row
    }
}

fn milliseconds(time: Duration) -> String {
    match 1e3 * time.as_secs_f64() {
        ms @ ..10.0 => format!("{ms:.2}"),
        ms @ ..100.0 => format!("{ms:.1}"),
        ms => format!("{ms:.0}"),
    }
}

fn megabytes(bytes: u64) -> String {
    match bytes {
        0..10_000_000_000 => format!("{:.0} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

fn counted(count: usize, what: &str) -> String {
    match count {
        1 => format!("1 {what}"),
        count => format!("{count} {what}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_nearest_rank() {
        let captions = (1..=20).map(|ms| {
            let mut caption = Caption::default();
            caption.cost.decode = Duration::from_millis(ms);
            caption.tokens = 2;
            caption
        });
        let row = Row {
            image_size: 512,
            scene: Scene::Cut,
            captions: captions.collect(),
        };
        let at = |percent| row.percentile(|cost| cost.decode, percent).as_millis();
        assert_eq!((at(50), at(95)), (10, 19));
        // 40 tokens in 210 ms.
        let rate = row.tokens_per_second().unwrap();
        assert!((rate - 40.0 / 0.21).abs() < 1e-6, "{rate}");
    }
}
