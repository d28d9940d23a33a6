//! Plain clients that ask again as soon as they have an answer.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::Result;

/// Answers per second, and their latencies in milliseconds, with so many requests in flight for so long.
///
/// Answers count by the part of their time that lies in the measured time, so that few and long ones count right.
pub fn closed_loop(
    endpoint: &str,
    bodies: &[String],
    clients: usize,
    time: Duration,
) -> Result<(f64, Vec<f64>)> {
    // Goes on from try to try: a server answers what it has seen before in less time.
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let done = Mutex::new((0.0, Vec::new()));
    // Time for connections and caches.
    let begin = Instant::now() + time / 10;
    let end = begin + time;
    let client = || -> std::result::Result<(), String> {
        let mut client = Client::connect(endpoint)?;
        while Instant::now() < end {
            let body = &bodies[NEXT.fetch_add(1, Ordering::Relaxed) % bodies.len()];
            let asked = Instant::now();
            client.ask(body).map_err(|error| error.to_string())?;
            let answered = Instant::now();
            let took = answered - asked;
            let within = answered
                .min(end)
                .saturating_duration_since(asked.max(begin));
            let mut done = done.lock().map_err(|_| "a client panicked")?;
            done.0 += within.as_secs_f64() / took.as_secs_f64();
            if asked >= begin {
                done.1.push(took.as_secs_f64() * 1e3);
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let clients: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
        clients
            .into_iter()
            .try_for_each(|client| client.join().map_err(|_| "a client panicked")?)
    })?;
    let (answers, latencies) = done.into_inner().map_err(|_| "a client panicked")?;
    Ok((answers / time.as_secs_f64(), latencies))
}

/// JSON at a path below the endpoint.
pub fn get(endpoint: &str, path: &str) -> Result<serde_json::Value> {
    let mut client = Client::connect(endpoint)?;
    let head = client.head.replacen("POST", "GET", 1);
    let head = head.replacen("/chat/completions", path, 1);
    let request = format!("{head}Connection: close\r\n\r\n");
    client.stream.get_mut().write_all(request.as_bytes())?;
    let mut answer = String::new();
    client.stream.read_to_string(&mut answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").ok_or("no answer")?;
    Ok(serde_json::from_str(body)?)
}

struct Client {
    stream: BufReader<TcpStream>,
    /// First lines of a request.
    head: String,
    endpoint: String,
    /// Over this connection.
    has_answered: bool,
}

impl Client {
    fn connect(endpoint: &str) -> std::result::Result<Self, String> {
        let (host, path) = endpoint
            .strip_prefix("http://")
            .ok_or("plain clients know only http://")?
            .split_once('/')
            .ok_or("the endpoint has no path")?;
        let address = match host.contains(':') {
            true => host.to_owned(),
            false => format!("{host}:80"),
        };
        let stream = TcpStream::connect(address).map_err(|error| error.to_string())?;
        stream
            .set_nodelay(true)
            .map_err(|error| error.to_string())?;
        let path = path.trim_end_matches('/');
        let mut head = format!(
            "POST /{path}/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        );
        if let Ok(key) = std::env::var("VLMNARRATE_API_KEY") {
            head += &format!("Authorization: Bearer {key}\r\n");
        }
        Ok(Self {
            stream: BufReader::new(stream),
            head,
            endpoint: endpoint.to_owned(),
            has_answered: false,
        })
    }

    /// Asks, over another connection if the server has closed this one: llama-server does after 100 requests.
    fn ask(&mut self, body: &str) -> Result<()> {
        if !self.has_answered {
            return self.ask_here(body);
        }
        self.ask_here(body).or_else(|_| {
            *self = Self::connect(&self.endpoint)?;
            self.ask_here(body)
        })?;
        Ok(())
    }

    fn ask_here(&mut self, body: &str) -> Result<()> {
        let request = format!("{}Content-Length: {}\r\n\r\n{body}", self.head, body.len());
        self.stream.get_mut().write_all(request.as_bytes())?;
        let status = self.line()?;
        if !status.starts_with("HTTP/1.1 200") {
            return Err(format!("the server answered {status}").into());
        }
        let mut chunked = false;
        loop {
            let line = self.line()?.to_ascii_lowercase();
            chunked |= line == "transfer-encoding: chunked";
            if line.is_empty() {
                break;
            }
        }
        if !chunked {
            return Err("the server didn't stream".into());
        }
        loop {
            let size = usize::from_str_radix(&self.line()?, 16)?;
            self.stream.read_exact(&mut vec![0; size])?;
            self.line()?;
            if size == 0 {
                self.has_answered = true;
                return Ok(());
            }
        }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        match line.pop() {
            Some('\n') => Ok(line.trim_end().to_owned()),
            _ => Err("the server closed the connection".into()),
        }
    }
}
