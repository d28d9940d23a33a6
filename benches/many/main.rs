//! Many live elements on one engine: `cargo bench --bench many -- [OPTIONS]`
//!
//! With `--in-process`, elements that share a model in this process, all of them always busy: captions per second, their
//! latency beside a fair share, and memory. Otherwise elements that ask a server.
//!
//! | option | default | |
//! |---|---|---|
//! | `--in-process N,…` | | numbers of elements |
//! | `--model DIR` | the demo model | its folder, by its whole path |
//! | `--against FILE` | | another build of this program, measured in turn with this one |
//! | `--rounds N` | 1 | how often all is measured |
//! | `--seconds S`, `--set NAME=VALUE`, `--fps F` | 60, none, 10 | as below |
//!
//! # On a server
//!
//! Prints a Markdown table: captions per second beside what the server can do at most, latency, fairness, bursts of
//! requests, and CPU time and memory of the process that has the elements. Each element has a pipeline of its own, and
//! moving pictures that differ from all others.
//!
//! | option | default | |
//! |---|---|---|
//! | `--elements N` | 100 | number of elements |
//! | `--interval-ms MS` | 1000 | `interval` of each element |
//! | `--load L,…` | | instead of `--interval-ms`: an interval for so many times what the server can do |
//! | `--seconds S` | 60 | measured time, after a warm-up |
//! | `--set NAME=VALUE` | | a property of the elements; may be repeated |
//! | `--fps F` | 10 | frames per second of each element |
//! | `--slots N --delay-ms MS --tokens T` | 32, 300, 12 | the scripted server: requests at once, time and words of each |
//! | `--endpoint URL --model M` | | a real server instead. What it can do is measured with plain clients |
//! | `--in-flight N,…` | 1,2,4,8 | numbers of plain clients to try; the best counts |
//! | `--ceiling` | | measures only the server, with plain clients |
//!
//! The server and the elements run in processes of their own, so CPU time and memory are the elements' alone.
//! The pipelines have a cost without the element: it is measured with `identity` and shown.

mod clients;
mod elements;
mod figures;
mod in_process;
mod server;

use std::{
    error::Error,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};

use figures::Figures;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

struct Options {
    elements: usize,
    interval: Duration,
    loads: Vec<f64>,
    seconds: f64,
    fps: u32,
    properties: Vec<String>,
    slots: usize,
    delay: Duration,
    tokens: u32,
    endpoint: Option<String>,
    /// By default the scripted server's or the demo model.
    model: Option<String>,
    in_flight: Vec<usize>,
    ceiling_only: bool,
    in_process: Vec<usize>,
    against: Option<PathBuf>,
    rounds: usize,
}

fn options(mut arguments: impl Iterator<Item = String>) -> Result<Options> {
    let mut options = Options {
        elements: 100,
        interval: Duration::from_secs(1),
        loads: Vec::new(),
        seconds: 60.0,
        fps: 10,
        properties: Vec::new(),
        slots: 32,
        delay: Duration::from_millis(300),
        tokens: 12,
        endpoint: None,
        model: None,
        in_flight: vec![1, 2, 4, 8],
        ceiling_only: false,
        in_process: Vec::new(),
        against: None,
        rounds: 1,
    };
    while let Some(name) = arguments.next() {
        if name == "--ceiling" {
            options.ceiling_only = true;
            continue;
        }
        if name == "--bench" {
            continue;
        }
        let value = arguments.next().ok_or(format!("{name} needs a value"))?;
        let millis = || value.parse().map(Duration::from_millis);
        match name.as_str() {
            "--elements" => options.elements = value.parse()?,
            "--interval-ms" => options.interval = millis()?,
            "--load" => options.loads = list(&value)?,
            "--seconds" => options.seconds = value.parse()?,
            "--fps" => options.fps = value.parse()?,
            "--set" => options.properties.push(value),
            "--slots" => options.slots = value.parse()?,
            "--delay-ms" => options.delay = millis()?,
            "--tokens" => options.tokens = value.parse()?,
            "--endpoint" => options.endpoint = Some(value),
            "--model" => options.model = Some(value),
            "--in-process" => options.in_process = list(&value)?,
            "--against" => options.against = Some(value.into()),
            "--rounds" => options.rounds = value.parse()?,
            "--in-flight" => options.in_flight = list(&value)?,
            _ => return Err(format!("no option is named {name}").into()),
        }
    }
    Ok(options)
}

impl Options {
    /// The elements' `model`.
    fn model(&self, endpoint: Option<&str>) -> Option<&str> {
        let scripted = endpoint.map(|_| vlmnarrate_scripted_server::MODEL);
        self.model.as_deref().or(scripted)
    }
}

fn list<T: std::str::FromStr<Err: Error + 'static>>(value: &str) -> Result<Vec<T>> {
    Ok(value
        .split(',')
        .map(str::parse)
        .collect::<std::result::Result<_, _>>()?)
}

/// This program once more, with a part of the work. Asked and answered in lines of JSON.
struct Helper {
    child: Child,
    asks: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Helper {
    fn start(role: &str, settings: &Value) -> Result<Self> {
        Self::start_program(&std::env::current_exe()?, role, settings)
    }

    fn start_program(program: &Path, role: &str, settings: &Value) -> Result<Self> {
        let mut child = Command::new(program)
            .args([role, &settings.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let asks = child.stdin.take().ok_or("no pipe")?;
        let answers = BufReader::new(child.stdout.take().ok_or("no pipe")?);
        Ok(Self {
            child,
            asks,
            answers,
        })
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            return Err("a helper has failed".into());
        }
        Ok(serde_json::from_str(&line)?)
    }

    fn ask(&mut self, what: &str) -> Result<Value> {
        writeln!(self.asks, "{what}")?;
        self.answer()
    }

    /// Lets the helper end by itself.
    fn end(mut self) -> Result<()> {
        drop(self.asks);
        self.child.wait()?;
        Ok(())
    }
}

/// CPU time of this process.
fn processor_time() -> f64 {
    let ticks = |text: &str, field: usize| -> Option<f64> {
        // Behind the name, which may have spaces.
        text.rsplit_once(')')?
            .1
            .split_whitespace()
            .nth(field)?
            .parse()
            .ok()
    };
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // In ticks of 10 ms, user and system.
    let sum = ticks(&stat, 11)
        .zip(ticks(&stat, 12))
        .map_or(0.0, |(user, system)| user + system);
    sum / 100.0
}

/// The elements of one run.
struct Run<'a> {
    options: &'a Options,
    /// `None` for a model in this process.
    endpoint: Option<&'a str>,
    /// `vlmnarrate`, or `identity` for what the pipelines cost without it.
    element: &'a str,
    elements: usize,
    interval: Duration,
    seconds: f64,
    /// Another build of this program.
    program: Option<&'a Path>,
}

impl Run<'_> {
    /// Starts the elements; each of those that describe has a caption then.
    fn start(&self) -> Result<Helper> {
        let this = std::env::current_exe()?;
        let mut elements = Helper::start_program(
            self.program.unwrap_or(&this),
            "elements",
            &json!({
                "element": self.element,
                "elements": self.elements,
                "endpoint": self.endpoint,
                "model": self.options.model(self.endpoint),
                "interval_ns": self.interval.as_nanos() as u64,
                "fps": self.options.fps,
                "properties": self.options.properties,
            }),
        )?;
        elements.answer()?;
        Ok(elements)
    }

    /// Returns what the elements measured, and what the server counted at the start and in the measured time.
    fn measure(&self, mut server: Option<&mut Helper>) -> Result<(Value, Value, Value)> {
        if let Some(server) = &mut server {
            server.ask("reset")?;
        }
        let mut elements = self.start()?;
        let start = match &mut server {
            Some(server) => server.ask("report")?,
            None => Value::Null,
        };
        // Until the crowd at the start is gone.
        std::thread::sleep(Duration::from_secs_f64(self.seconds.min(5.0)));
        elements.ask("begin")?;
        if let Some(server) = &mut server {
            server.ask("reset")?;
        }
        std::thread::sleep(Duration::from_secs_f64(self.seconds));
        let counted = match &mut server {
            Some(server) => server.ask("report")?,
            None => Value::Null,
        };
        let measured = elements.ask("report")?;
        elements.end()?;
        Ok((measured, start, counted))
    }
}

/// Requests per second that the server can answer, from the plain clients' best, and a line about each try.
fn ceiling(options: &Options, endpoint: &str, bodies: &[String]) -> Result<f64> {
    println!(
        "| plain clients | answers/s | latency p50 ms | p95 ms | max ms |\n|---|---|---|---|---|"
    );
    let mut best = 0.0f64;
    for &clients in &options.in_flight {
        let seconds = Duration::from_secs_f64(options.seconds.min(20.0));
        let (rate, mut latencies) = clients::closed_loop(endpoint, bodies, clients, seconds)?;
        let [p50, p95, max] = figures::percentiles(&mut latencies);
        println!("| {clients} | {rate:.2} | {p50:.0} | {p95:.0} | {max:.0} |");
        best = best.max(rate);
    }
    println!();
    Ok(best)
}

/// Bodies as the elements send them to this endpoint, recorded with a server that answers at once.
fn record(options: &Options, endpoint: &str) -> Result<Vec<String>> {
    // The elements speak the dialect of the server that lists these models.
    let models = clients::get(endpoint, "/models")?;
    let answers = vlmnarrate_scripted_server::answers("word word word");
    let server = vlmnarrate_scripted_server::Server::start(move |exchange, client| match exchange
        .path
        .ends_with("/models")
    {
        true => client.json(200, &models),
        false => answers(exchange, client),
    });
    Run {
        options,
        endpoint: Some(&server.url()),
        element: "vlmnarrate",
        elements: options.elements.min(20),
        interval: Duration::from_millis(100),
        seconds: 5.0,
        program: None,
    }
    .measure(None)?;
    let exchanges = server.exchanges();
    let chats = exchanges.iter().filter(|exchange| exchange.is_chat());
    let bodies: Vec<_> = chats.map(|exchange| exchange.body.to_string()).collect();
    if bodies.is_empty() {
        return Err("the elements sent nothing".into());
    }
    Ok(bodies)
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some("server") => return server::run(&arguments.next().unwrap_or_default()),
        Some("elements") => return elements::run(&arguments.next().unwrap_or_default()),
        _ => {}
    }
    let options = options(std::env::args().skip(1))?;
    if !options.in_process.is_empty() {
        return in_process::measure(&options);
    }
    let mut server = None;
    let endpoint = match &options.endpoint {
        Some(endpoint) => endpoint.clone(),
        None => {
            let mut helper = Helper::start(
                "server",
                &json!({
                    "slots": options.slots,
                    "delay_ns": options.delay.as_nanos() as u64,
                    "tokens": options.tokens,
                }),
            )?;
            let url = helper.answer()?;
            server = Some(helper);
            url.as_str().unwrap_or_default().to_owned()
        }
    };
    let ceiling = match &mut server {
        Some(server) => {
            if options.ceiling_only {
                let body = json!({"model": options.model(Some(&endpoint)), "stream": true, "messages": []});
                server.ask("reset")?;
                ceiling(&options, &endpoint, &[body.to_string()])?;
                let counted = server.ask("report")?;
                println!(
                    "Scripted: {:.1}/s at most; the server took {:.1} % of a core",
                    options.slots as f64 / options.delay.as_secs_f64(),
                    figures::percent_of_a_core(&counted),
                );
                return Ok(());
            }
            options.slots as f64 / options.delay.as_secs_f64()
        }
        None => {
            let bodies = record(&options, &endpoint)?;
            // A server on the same machine has no more of its processors here than beside the elements.
            let pipelines = Run {
                options: &options,
                endpoint: Some(&endpoint),
                element: "identity",
                elements: options.elements,
                interval: options.interval,
                seconds: 0.0,
                program: None,
            };
            let beside = (!options.ceiling_only)
                .then(|| pipelines.start())
                .transpose()?;
            let ceiling = ceiling(&options, &endpoint, &bodies)?;
            beside.map_or(Ok(()), Helper::end)?;
            ceiling
        }
    };
    if options.ceiling_only {
        return Ok(());
    }

    let run = |element, elements, interval, seconds| Run {
        options: &options,
        endpoint: Some(&endpoint),
        element,
        elements,
        interval,
        seconds,
        program: None,
    };
    let short = options.seconds.min(20.0);
    let base = [1, options.elements].map(|elements| {
        run("identity", elements, options.interval, short)
            .measure(None)
            .map(|(measured, ..)| measured)
    });
    let [base_one, base_all] = base;
    let (base_one, base_all) = (base_one?, base_all?);
    let (one, ..) = run("vlmnarrate", 1, options.interval, short).measure(server.as_mut())?;

    let mut columns = Vec::new();
    let intervals = options.loads.iter().map(|load| {
        let each = options.elements as f64 / (load * ceiling);
        (format!("load {load}"), Duration::from_secs_f64(each))
    });
    let mut intervals: Vec<_> = intervals.collect();
    if intervals.is_empty() {
        let name = format!("every {} ms", options.interval.as_millis());
        intervals.push((name, options.interval));
    }
    for (name, interval) in intervals {
        let run = run("vlmnarrate", options.elements, interval, options.seconds);
        let (measured, start, counted) = run.measure(server.as_mut())?;
        columns.push(Figures {
            name,
            interval,
            elements: options.elements,
            ceiling,
            measured,
            start,
            counted,
            one: &one,
            base_one: &base_one,
            base_all: &base_all,
        });
    }
    figures::print(&columns);
    if let Some(server) = server {
        server.end()?;
    }
    Ok(())
}
