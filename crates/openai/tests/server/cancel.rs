//! A cancel closes the connection within 100 ms, whatever the server does.
//!
//! The limits here are wider, for machines that are busy.

use std::{
    ops::ControlFlow,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use vlmnarrate_engine::{EngineLoader, ErrorKind, Found, ModelSettings};
use vlmnarrate_openai::OpenAiLoader;
use vlmnarrate_scripted_server::{Server, models};

use crate::common::*;

const LIMIT: Duration = Duration::from_millis(600);
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn while_the_answer_is_awaited_or_comes() {
    for text in [None, Some("A solid")] {
        let (closed, was_closed) = mpsc::channel();
        let server = Server::start(move |exchange, client| {
            if !exchange.is_chat() {
                return models(client);
            }
            if let Some(text) = text {
                client.stream_head()?;
                client.delta(text)?;
            }
            let _ = closed.send(client.closed_within(PATIENCE));
            Ok(())
        });
        let mut engine = engine(server.url());
        let took = ask_and_stop(engine.as_mut(), Duration::from_millis(200));
        assert!(took < LIMIT, "{took:?}");
        let closed = was_closed.recv_timeout(PATIENCE).unwrap();
        assert!(closed.expect("closed") < 200 * Duration::from_millis(1) + LIMIT);
        // The next request is not disturbed.
        let took = ask_and_stop(engine.as_mut(), Duration::from_millis(50));
        assert!(took < LIMIT, "{took:?}");
    }
}

/// Loads an engine whose server is no server, and stops after a while.
fn load_and_stop(url: String) -> Duration {
    let mut settings = ModelSettings::default();
    settings.endpoint = Some(endpoint(url));
    let Ok(Found::Ready(checkpoint)) = OpenAiLoader.open(&settings) else {
        panic!("not opened");
    };
    let start = Instant::now();
    let after = Duration::from_millis(200);
    let loaded = checkpoint.load(&mut |_, _| match start.elapsed() < after {
        true => ControlFlow::Continue(()),
        false => ControlFlow::Break(()),
    });
    assert_eq!(loaded.err().expect("cancelled").kind, ErrorKind::Cancelled);
    start.elapsed().saturating_sub(after)
}

#[test]
fn in_a_tls_handshake() {
    let server = Server::silent();
    let url = server.url().replace("http://", "https://");
    let took = load_and_stop(url);
    assert!(took < LIMIT, "{took:?}");
    server.wait_for_accepted(1, PATIENCE);
    server.wait_for_open(0, LIMIT);
}

#[test]
fn while_connecting() {
    let nowhere = Server::unreachable_connect();
    let took = load_and_stop(nowhere.url());
    assert!(took < LIMIT, "{took:?}");
    // No socket goes on connecting: the kernel would try for two minutes.
    let port = format!(":{:04X} 02", nowhere.address().port());
    let is_connecting = || {
        let sockets = std::fs::read_to_string("/proc/net/tcp").unwrap();
        // The remote address and the state SYN_SENT.
        sockets.lines().any(|line| line.contains(&port))
    };
    let start = Instant::now();
    while is_connecting() {
        assert!(start.elapsed() < LIMIT, "still connecting");
        thread::sleep(Duration::from_millis(5));
    }
}
