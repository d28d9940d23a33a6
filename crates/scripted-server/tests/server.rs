//! What clients see of the scripted server.

use std::{
    io::{self, BufRead, BufReader, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde_json::json;
use vlmnarrate_scripted_server::{Capacity, MODEL, Server, Slots, answers};

/// Longer than anything takes on a machine that is not hung.
const LIMIT: Duration = Duration::from_secs(60);

struct Client<S>(BufReader<S>);

impl Client<TcpStream> {
    fn connect(address: SocketAddr) -> Self {
        let socket = TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        Self(BufReader::new(socket))
    }
}

impl<S: Read + Write> Client<S> {
    fn send(&mut self, request: &str) {
        self.0.get_mut().write_all(request.as_bytes()).unwrap();
    }

    fn chat(&mut self, more: serde_json::Value) {
        let mut body = json!({"model": "m", "stream": true, "messages": []});
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let body = body.to_string();
        let length = body.len();
        self.send(&format!(
            "POST /v1/chat/completions HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}"
        ));
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }

    /// Status and body of a response, the chunks put together.
    fn response(&mut self) -> io::Result<(String, String)> {
        let status = self.line()?;
        let mut length = None;
        loop {
            let line = self.line()?;
            match line.split_once(": ") {
                Some(("content-length", value)) => length = Some(value.parse().unwrap()),
                Some(_) => {}
                None => break,
            }
        }
        let mut body = Vec::new();
        loop {
            let size = match length {
                Some(length) => length,
                None => usize::from_str_radix(&self.line()?, 16)
                    .map_err(|_| ErrorKind::UnexpectedEof)?,
            };
            let start = body.len();
            body.resize(start + size, 0);
            self.0.read_exact(&mut body[start..])?;
            if length.is_none() {
                self.line()?;
            }
            if length.is_some() || size == 0 {
                return Ok((status, String::from_utf8(body).unwrap()));
            }
        }
    }

    /// Fails unless the server closes the connection.
    fn closed(&mut self) -> io::Result<()> {
        match self.0.read(&mut [0; 1]) {
            Ok(0) => Ok(()),
            Ok(_) => Err(io::Error::other("a byte more")),
            Err(error) => Err(error),
        }
    }
}

fn text(events: &str) -> String {
    let events = events
        .lines()
        .filter_map(|line| line.strip_prefix("data: "));
    events
        .filter_map(|data| serde_json::from_str::<serde_json::Value>(data).ok())
        .filter_map(|event| Some(event["choices"][0]["delta"]["content"].as_str()?.to_owned()))
        .collect()
}

#[test]
fn answers_stream_on_one_connection() {
    let server = Server::start(answers("A solid red screen."));
    let mut client = Client::connect(server.address());
    client.send("GET /v1/models HTTP/1.1\r\n\r\n");
    let (status, models) = client.response().unwrap();
    assert_eq!(status, "HTTP/1.1 200 OK");
    assert!(models.contains(MODEL) && models.contains(r#""owned_by":"vllm""#));

    client.chat(json!({}));
    let (_, events) = client.response().unwrap();
    assert_eq!(text(&events), "A solid red screen.");
    assert!(events.ends_with("data: [DONE]\n\n") && !events.contains("usage"));
    client.chat(json!({"stream_options": {"include_usage": true}}));
    let (_, events) = client.response().unwrap();
    assert!(events.contains(r#""completion_tokens":4"#), "{events}");
    client.chat(json!({"stream": false}));
    let (_, answer) = client.response().unwrap();
    assert!(answer.contains(r#""content":"A solid red screen.""#));

    assert_eq!(server.exchanges().len(), 4);
    assert_eq!((server.accepted(), server.open_connections()), (1, 1));
    drop(client);
    server.wait_for_open(0, LIMIT);
}

#[test]
fn exchanges_have_what_the_client_sent() {
    let server = Server::builder()
        .keep(1)
        .start(|_, client| client.text(200, "text/html", "<p>"));
    let mut client = Client::connect(server.address());
    client.send("GET /v1/models HTTP/1.1\r\n\r\n");
    client.response().unwrap();
    let content = json!([
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        {"type": "text", "text": "Describe"},
    ]);
    let body = json!({"messages": [
        {"role": "system", "content": "Short"},
        {"role": "user", "content": content},
    ]})
    .to_string();
    let (first, second) = body.split_at(10);
    client.send(
        "POST /v1/chat/completions HTTP/1.1\r\nAuthorization: Bearer K\r\n\
         Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n",
    );
    assert_eq!(client.line().unwrap(), "HTTP/1.1 100 Continue");
    client.line().unwrap();
    client.send(&format!(
        "a\r\n{first}\r\n{:x}\r\n{second}\r\n0\r\n\r\n",
        second.len()
    ));
    assert_eq!(client.response().unwrap().1, "<p>");
    let exchanges = server.wait_for(2, LIMIT);
    let [exchange] = &exchanges[..] else {
        panic!("more are kept than wanted")
    };
    assert!(exchange.is_chat());
    assert_eq!(exchange.header("AUTHORIZATION"), Some("Bearer K"));
    assert_eq!(exchange.image_urls(), ["data:image/png;base64,AA=="]);
    assert_eq!(exchange.texts(), ["Short", "Describe"]);
}

#[test]
fn what_is_no_http_gets_400() {
    let server = Server::start(answers("x"));
    let mut client = Client::connect(server.address());
    client.send("GET /\r\nno header\r\n\r\n");
    assert!(client.response().unwrap().0.contains("400"));
    client.closed().unwrap();
}

#[test]
fn broken_answers() {
    let server = Server::start(|exchange, client| match exchange.path.as_str() {
        "/truncated" => {
            client.stream_head()?;
            client.delta("A")
        }
        "/raw" => client.raw(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf"),
        "/nothing" => Ok(()),
        _ => {
            client.stream_head()?;
            client.reset()
        }
    });
    let ask = |path: &str| {
        let mut client = Client::connect(server.address());
        client.send(&format!("GET {path} HTTP/1.1\r\n\r\n"));
        let error = client.response().unwrap_err();
        (error.kind(), client)
    };
    assert_eq!(ask("/truncated").0, ErrorKind::UnexpectedEof);
    assert_eq!(ask("/raw").0, ErrorKind::UnexpectedEof);
    assert_eq!(ask("/reset").0, ErrorKind::ConnectionReset);
    let mut client = Client::connect(server.address());
    client.send("GET /nothing HTTP/1.1\r\n\r\n");
    client.closed().unwrap();
}

#[test]
fn a_handler_sees_that_the_client_has_gone() {
    let (sender, gone) = mpsc::channel();
    let server = Server::start(move |_, client| {
        client.stream_head()?;
        let _ = sender.send(client.closed_within(LIMIT));
        Ok(())
    });
    let mut client = Client::connect(server.address());
    client.chat(json!({}));
    client.line().unwrap();
    let asked = Instant::now();
    drop(client);
    assert!(gone.recv_timeout(LIMIT).unwrap().unwrap() < LIMIT);

    // A server that goes closes its connections, and its handlers end.
    let mut client = Client::connect(server.address());
    client.chat(json!({}));
    client.line().unwrap();
    drop(server);
    assert!(gone.recv_timeout(LIMIT).unwrap().is_some());
    assert!(asked.elapsed() < LIMIT);
    assert_eq!(
        client.response().unwrap_err().kind(),
        ErrorKind::UnexpectedEof
    );
}

#[test]
fn idle_connections_are_closed() {
    let server = Server::builder()
        .close_idle_after(Duration::from_millis(50))
        .start(answers("x"));
    let mut client = Client::connect(server.address());
    client.chat(json!({}));
    client.response().unwrap();
    client.closed().unwrap();
}

#[test]
fn a_port_can_be_taken_again() {
    let server = Server::start(answers("x"));
    let address = server.address();
    let mut client = Client::connect(address);
    client.chat(json!({}));
    client.response().unwrap();
    drop(server);
    let refused = TcpStream::connect(address).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    let server = Server::builder().port(address.port()).start(answers("y"));
    let mut client = Client::connect(server.address());
    client.chat(json!({}));
    assert_eq!(text(&client.response().unwrap().1), "y");
}

#[test]
fn addresses_that_do_not_answer() {
    let refusing = Server::refusing();
    let error = TcpStream::connect(refusing.address()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);

    let hanging = Server::unreachable_connect();
    let short = Duration::from_millis(300);
    let error = TcpStream::connect_timeout(&hanging.address(), short).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);

    let silent = Server::silent();
    let mut client = Client::connect(silent.address());
    client.send("GET / HTTP/1.1\r\n\r\n");
    silent.wait_for_accepted(1, LIMIT);
    let socket = client.0.get_ref();
    socket.set_read_timeout(Some(short)).unwrap();
    let error = client.line().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    drop(client);
    silent.wait_for_open(0, LIMIT);
}

#[test]
fn tls_with_an_authority_of_its_own() {
    let server = Server::start_tls(answers("A secret."));
    assert!(server.url().starts_with("https://127.0.0.1:"));
    let mut roots = rustls::RootCertStore::empty();
    let ca = CertificateDer::from_pem_slice(server.ca_pem().as_bytes()).unwrap();
    roots.add(ca).unwrap();
    let provider = rustls::crypto::ring::default_provider();
    let config = rustls::ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = "127.0.0.1".try_into().unwrap();
    let tls = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let socket = TcpStream::connect(server.address()).unwrap();
    let mut client = Client(BufReader::new(rustls::StreamOwned::new(tls, socket)));
    client.chat(json!({}));
    assert_eq!(text(&client.response().unwrap().1), "A secret.");
    client.send("GET /v1/models HTTP/1.1\r\nConnection: close\r\n\r\n");
    client.response().unwrap();
    // With a `close_notify`, without which rustls returns an error.
    client.closed().unwrap();
}

fn wait_for_arrivals(slots: &Slots, number: usize) {
    let start = Instant::now();
    while slots.counters().arrivals.len() < number {
        assert!(start.elapsed() < LIMIT);
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn slots_take_their_time_in_order() {
    let delay = Duration::from_millis(100);
    let slots = Slots::new(Capacity {
        slots: 2,
        delay,
        tokens: 3,
        queue_limit: None,
    });
    let server = Server::start(slots.handler());
    let address = server.address();
    let start = Instant::now();
    let ended: Vec<Duration> = (0..6)
        .map(|number| {
            let asking = thread::spawn(move || {
                let mut client = Client::connect(address);
                client.chat(json!({}));
                assert_eq!(text(&client.response().unwrap().1), "word word word");
                start.elapsed()
            });
            // One after the other, so that their order is known.
            wait_for_arrivals(&slots, number + 1);
            asking
        })
        .collect::<Vec<_>>()
        .into_iter()
        .map(|asking| asking.join().unwrap())
        .collect();
    for (number, ended) in ended.iter().enumerate() {
        let least = delay * (number as u32 / 2 + 1);
        assert!(*ended >= least && *ended < LIMIT, "{number}: {ended:?}");
    }
    let counters = slots.counters();
    assert_eq!((counters.served, counters.cancelled), (6, 0));
    assert_eq!(counters.arrivals.len(), 6);
    assert!((slots.ceiling() - 20.0).abs() < 1e-9);
}

#[test]
fn slots_are_freed_by_clients_that_go() {
    let slots = Slots::new(Capacity {
        slots: 1,
        delay: LIMIT,
        tokens: 6000,
        queue_limit: Some(1),
    });
    let server = Server::start(slots.handler());
    let mut clients: Vec<_> = (1..=3)
        .map(|number| {
            let mut client = Client::connect(server.address());
            client.chat(json!({}));
            wait_for_arrivals(&slots, number);
            client
        })
        .collect();
    // One computes, one waits, and there is no room for the third.
    let (status, _) = clients[2].response().unwrap();
    assert!(status.contains("503"), "{status}");
    // The one that waits goes first, then the one that computes: the next gets the slot at once.
    clients.remove(1);
    server.wait_for_open(2, LIMIT);
    clients.remove(0);
    server.wait_for_open(1, LIMIT);
    clients[0].chat(json!({}));
    assert_eq!(clients[0].line().unwrap(), "HTTP/1.1 200 OK");
    let counters = slots.counters();
    assert_eq!(
        (counters.served, counters.cancelled, counters.refused),
        (0, 2, 1)
    );
    assert_eq!(counters.in_flight_max, 3);
}
