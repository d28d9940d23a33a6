//! From what was measured to the table.

use std::time::Duration;

use serde_json::Value;

/// One column of the table.
pub struct Figures<'a> {
    pub name: String,
    pub interval: Duration,
    pub elements: usize,
    /// Requests per second that the server answers at most.
    pub ceiling: f64,
    pub measured: Value,
    /// What the server counted until each element had its first caption, and in the measured time. Null if unknown.
    pub start: Value,
    pub counted: Value,
    /// The same with one element.
    pub one: &'a Value,
    /// With `identity` instead of the element.
    pub base_one: &'a Value,
    pub base_all: &'a Value,
}

pub fn numbers(value: &Value) -> Vec<f64> {
    let values = value.as_array().into_iter().flatten();
    values.filter_map(Value::as_f64).collect()
}

pub fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

pub fn percent_of_a_core(measured: &Value) -> f64 {
    100.0 * number(&measured["cpu"]) / number(&measured["seconds"])
}

/// p50, p95 and maximum.
pub fn percentiles(values: &mut [f64]) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1) as f64;
    [0.5, 0.95, 1.0].map(|q| {
        let value = values.get((last * q).round() as usize);
        value.copied().unwrap_or(f64::NAN)
    })
}

/// Largest and mean number of arrivals in 10 ms, and the variance over the mean, which is 1 for independent arrivals.
fn bins(counted: &Value) -> Option<[f64; 3]> {
    let seconds = counted["seconds"].as_f64()?;
    let mut bins = vec![0u32; (seconds * 100.0).ceil() as usize];
    for arrival in numbers(&counted["arrivals"]) {
        if let Some(bin) = bins.get_mut((arrival / 1e4) as usize) {
            *bin += 1;
        }
    }
    let count = bins.len() as f64;
    let mean = bins.iter().sum::<u32>() as f64 / count;
    let squares = bins.iter().map(|bin| (f64::from(*bin) - mean).powi(2));
    let dispersion = squares.sum::<f64>() / count / mean;
    Some([f64::from(*bins.iter().max()?), mean, dispersion])
}

impl Figures<'_> {
    fn rows(&self) -> Vec<(&'static str, String)> {
        let measured = &self.measured;
        let seconds = number(&measured["seconds"]);
        let each = numbers(&measured["captions"]);
        let captions: f64 = each.iter().sum();
        let rate = captions / seconds;
        let timed: Vec<(f64, f64)> = measured["latencies"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|pair| (number(&pair[0]), 1e3 * number(&pair[1])))
            .collect();
        let third = |from: f64, to: f64| {
            let within = timed
                .iter()
                .filter(|(at, _)| (from..to).contains(&(at / seconds)));
            percentiles(&mut within.map(|(_, latency)| *latency).collect::<Vec<_>>())[0]
        };
        let spread = |mut values: Vec<f64>| {
            let [p50, p95, max] = percentiles(&mut values);
            format!("{p50:.0} / {p95:.0} / {max:.0}")
        };
        let ages = numbers(&measured["ages"])
            .iter()
            .map(|age| age * 1e3)
            .collect();
        let mean = captions / each.len() as f64;
        let least = each.iter().copied().fold(f64::INFINITY, f64::min);
        let most = each.iter().copied().fold(0.0, f64::max);
        let base = percent_of_a_core(self.base_all);
        let core = percent_of_a_core(measured);
        let memory = |all: &Value, one: &Value| {
            let others = (self.elements.max(2) - 1) as f64;
            (number(&all["rss"]) - number(&one["rss"])) / others / 1e3
        };
        let counters = &measured["counters"];
        let count = |name: &str| {
            counters[name]
                .as_u64()
                .map_or("–".into(), |n| n.to_string())
        };
        let offered = number(&counters["sampled"]) / seconds;

        let mut rows = vec![
            (
                "interval, ms",
                format!("{:.0}", self.interval.as_secs_f64() * 1e3),
            ),
            ("captions/s", format!("{rate:.2}")),
            (
                "the server's ceiling, captions/s",
                format!("{:.2}", self.ceiling),
            ),
            (
                "of the ceiling",
                format!("{:.1} %", 100.0 * rate / self.ceiling),
            ),
            ("frames sampled/s", format!("{offered:.2}")),
            (
                "latency p50 / p95 / max, ms",
                spread(timed.iter().map(|t| t.1).collect()),
            ),
            (
                "latency p50, first / last third, ms",
                format!(
                    "{:.0} / {:.0}",
                    third(0.0, 1.0 / 3.0),
                    third(2.0 / 3.0, 1.0)
                ),
            ),
            ("age of the picture p50 / p95 / max, ms", spread(ages)),
            (
                "captions per element, least / mean / most",
                format!("{least} / {mean:.1} / {most}"),
            ),
        ];
        if let Some([max, mean, dispersion]) = bins(&self.counted) {
            rows.push((
                "arrivals in 10 ms, most / mean",
                format!("{max} / {mean:.2}"),
            ));
            rows.push((
                "variance / mean of these (1: independent)",
                format!("{dispersion:.2}"),
            ));
            let start = bins(&self.start).map_or(f64::NAN, |bins| bins[0]);
            rows.push(("most arrivals in 10 ms at the start", format!("{start}")));
            let count = |name: &str| self.counted[name].to_string();
            rows.push(("requests in flight, most", count("in_flight_max")));
            rows.push(("connections made since the start", count("connections")));
            rows.push(("requests closed by the element", count("cancelled")));
            let server = percent_of_a_core(&self.counted);
            rows.push(("the server's CPU, of a core", format!("{server:.1} %")));
        }
        let known = [
            "frames",
            "sampled",
            "captions",
            "dropped",
            "unchanged",
            "errors",
        ];
        for (name, key) in [
            ("frames", "frames"),
            ("sampled", "sampled"),
            ("described", "captions"),
            ("dropped (replaced by a newer one)", "dropped"),
            ("errors", "errors"),
        ] {
            rows.push((name, count(key)));
        }
        let others: Vec<_> = counters
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(name, count)| {
                !known.contains(&name.as_str())
                    && **count != 0
                    && !matches!(name.as_str(), "device-memory" | "weights-memory")
            })
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        rows.push(("other counters", others.join(", ")));
        rows.push((
            "errors and warnings on the bus",
            measured["problems"].to_string(),
        ));
        rows.push(("CPU of the process, of a core", format!("{core:.1} %")));
        rows.push((
            "CPU of the pipelines without the element",
            format!("{base:.1} %"),
        ));
        rows.push((
            "CPU per caption, without the pipelines', ms",
            format!("{:.2}", (core - base) / 100.0 * seconds / captions * 1e3),
        ));
        let others = number(&measured["machine_cpu"])
            - number(&measured["cpu"])
            - self.counted["cpu"].as_f64().unwrap_or(0.0);
        rows.push((
            "CPU of everything else on the machine, of a core",
            format!("{:.1} %", 100.0 * others / seconds),
        ));
        rows.push((
            "memory (RSS) of the process, MB",
            format!("{:.1}", number(&measured["rss"]) / 1e6),
        ));
        rows.push((
            "memory per element, its pipeline's included, kB",
            format!("{:.0}", memory(measured, self.one)),
        ));
        rows.push((
            "memory per pipeline without the element, kB",
            format!("{:.0}", memory(self.base_all, self.base_one)),
        ));
        rows.push((
            "threads, with / without the elements",
            format!("{} / {}", measured["threads"], self.base_all["threads"]),
        ));
        rows
    }
}

/// Prints the table, and the first error of each run.
pub fn print(columns: &[Figures]) {
    let Some(first) = columns.first() else {
        return;
    };
    let names: Vec<_> = columns.iter().map(|column| column.name.as_str()).collect();
    println!("| {} elements | {} |", first.elements, names.join(" | "));
    println!("|---{}|", "|---".repeat(columns.len()));
    let all: Vec<_> = columns.iter().map(Figures::rows).collect();
    for (number, (name, _)) in all[0].iter().enumerate() {
        let values: Vec<_> = all.iter().map(|rows| rows[number].1.as_str()).collect();
        println!("| {name} | {} |", values.join(" | "));
    }
    for column in columns {
        if let Some(problem) = column.measured["first_problem"].as_str() {
            println!("\n{}: {problem}", column.name);
        }
    }
}
