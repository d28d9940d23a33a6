//! Elements that share a model in this process.

use std::{path::Path, time::Duration};

use serde_json::Value;

use crate::{
    Options, Result, Run,
    figures::{number, numbers, percentiles},
};

/// One row of the table.
struct Row {
    build: &'static str,
    elements: usize,
    measured: Value,
}

/// Measures each number of elements in turn, and in turn with the other build, and prints a Markdown table.
pub fn measure(options: &Options) -> Result<()> {
    let mut builds = vec![("this", None)];
    if let Some(other) = &options.against {
        builds.insert(0, ("other", Some(other.as_path())));
    }
    let run = |element, elements, program: Option<&Path>, seconds| {
        let run = Run {
            options,
            endpoint: None,
            element,
            elements,
            interval: Duration::ZERO,
            seconds,
            program,
        };
        run.measure(None).map(|(measured, ..)| measured)
    };
    let mut rows = Vec::new();
    for _ in 0..options.rounds {
        for &elements in &options.in_process {
            for &(build, program) in &builds {
                eprintln!("{elements} elements, {build} build");
                rows.push(Row {
                    build,
                    elements,
                    measured: run("vlmnarrate", elements, program, options.seconds)?,
                });
            }
        }
    }
    println!(
        "| elements | build | captions/s | latency p50 / p95 / max, ms | fair share, ms | p95, max / fair share \
         | captions each, least – most | memory, MB |\n|---|---|---|---|---|---|---|---|"
    );
    for row in &rows {
        println!("{}", row.line());
    }
    let most = options.in_process.iter().copied().max().unwrap_or(1);
    let memory = |elements: usize| {
        let same = rows
            .iter()
            .rev()
            .find(|row| row.elements == elements && row.build == "this");
        same.map_or(f64::NAN, |row| number(&row.measured["rss"]))
    };
    if most > 1 && options.in_process.contains(&1) {
        let each = |all: f64, one: f64| (all - one) / (most - 1) as f64 / 1e6;
        let mut without = [0.0; 2];
        for (elements, rss) in [1, most].into_iter().zip(&mut without) {
            let measured = run("identity", elements, None, 2.0)?;
            *rss = number(&measured["rss"]);
        }
        println!(
            "\nMemory of each further element: {:.1} MB, of which its pipeline has {:.1} without it.",
            each(memory(most), memory(1)),
            each(without[1], without[0])
        );
    }
    for row in &rows {
        if let Some(problem) = row.measured["first_problem"].as_str() {
            return Err(format!("{} elements: {problem}", row.elements).into());
        }
    }
    Ok(())
}

impl Row {
    fn line(&self) -> String {
        let mut each = numbers(&self.measured["captions"]);
        each.sort_unstable_by(f64::total_cmp);
        let rate = each.iter().sum::<f64>() / number(&self.measured["seconds"]);
        let pairs = self.measured["latencies"].as_array().into_iter().flatten();
        let latencies = pairs.map(|pair| 1e3 * number(&pair[1]));
        let [p50, p95, max] = percentiles(&mut latencies.collect::<Vec<_>>());
        // What a caption would take if all were served in turn, and one alone what it takes.
        let share = 1e3 * self.elements as f64 / rate;
        let ends = each.first().zip(each.last());
        let (least, most) = ends.map_or((0.0, 0.0), |(least, most)| (*least, *most));
        format!(
            "| {} | {} | {rate:.2} | {p50:.0} / {p95:.0} / {max:.0} | {share:.0} | {:.2}, {:.2} | {least} – {most} | {:.0} |",
            self.elements,
            self.build,
            p95 / share,
            max / share,
            number(&self.measured["rss"]) / 1e6,
        )
    }
}
