//! Servers that mean harm: bounded memory, bounded time, one clear message.

use std::{
    io, thread,
    time::{Duration, Instant},
};

use vlmnarrate_engine::ErrorKind;
use vlmnarrate_scripted_server::{Connection, Exchange, Server, models};

use crate::common::*;

/// Bytes of this process's memory in use, at most so far.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .unwrap();
    let kib = line.split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() << 10
}

/// The error of one request to a server that answers chats like this, within time and memory.
fn error_of(
    chat: impl Fn(&Exchange, &mut Connection) -> io::Result<()> + Send + Sync + 'static,
) -> (ErrorKind, String) {
    let server = Server::start(move |exchange, client| match exchange.is_chat() {
        true => chat(exchange, client),
        false => models(client),
    });
    let mut settings = endpoint(server.url());
    settings.timeout = Duration::from_secs(2);
    let mut engine = load(settings, None).unwrap();
    let (start, before) = (Instant::now(), peak_memory());
    let error = ask(engine.as_mut()).unwrap_err();
    let (took, grown) = (start.elapsed(), peak_memory().saturating_sub(before));
    assert!(took < Duration::from_secs(60), "{took:?}");
    assert!(grown < 64 << 20, "{grown}");
    let text = error.to_string();
    assert!(
        text.len() < 1000 && !text.contains(char::is_control),
        "{text:?}"
    );
    (error.kind, text)
}

const STREAM: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";

#[test]
fn a_body_without_an_end() {
    for status in ["200 OK", "500 Oh"] {
        let head = format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\n\r\n");
        let (_, error) = error_of(move |_, client| {
            client.raw(head.as_bytes())?;
            loop {
                client.raw(&[b'['; 1 << 16])?;
            }
        });
        assert!(
            error.contains("does not end") || error.contains("500"),
            "{error}"
        );
    }
}

#[test]
fn a_line_without_an_end() {
    let (kind, error) = error_of(|_, client| {
        client.raw(STREAM)?;
        client.raw(b"data: \"")?;
        loop {
            client.raw(&[b'x'; 1 << 16])?;
        }
    });
    assert_eq!(kind, ErrorKind::Failed);
    assert!(error.contains("does not end"), "{error}");
}

#[test]
fn events_without_an_end() {
    for event in [
        "data: {\"choices\":[{\"delta\":{\"content\":\"la \"}}]}\n\n",
        "data: {\"choices\":[{\"delta\":{}}]}\n\n",
        "data: {}\n\n",
        ": still here\n\n",
    ] {
        let events = event.repeat(1000);
        let (_, error) = error_of(move |_, client| {
            client.raw(STREAM)?;
            loop {
                client.raw(events.as_bytes())?;
            }
        });
        assert!(
            error.contains("does not end") || error.contains("nothing has come"),
            "{error}"
        );
    }
}

#[test]
fn one_byte_at_a_time() {
    let (kind, error) = error_of(|_, client| {
        client.raw(STREAM)?;
        loop {
            client.raw(b"d")?;
            thread::sleep(Duration::from_millis(20));
        }
    });
    assert_eq!(kind, ErrorKind::Unavailable);
    assert!(error.contains("nothing has come"), "{error}");
    // The same before the body.
    let (kind, _) = error_of(|_, client| {
        for byte in STREAM.iter().cycle() {
            client.raw(&[*byte])?;
            thread::sleep(Duration::from_millis(100));
            if *byte == b'e' {
                client.raw(b"\r\nx: ")?;
            }
        }
        Ok(())
    });
    assert_ne!(kind, ErrorKind::Cancelled);
}

#[test]
fn heads_that_are_none() {
    for head in [
        "HTTP/1.1 999999 Oh\r\n\r\n",
        "HTTP/9.9 200 OK\r\n\r\n",
        "220 smtp.example.org ESMTP\r\n",
        "\0\u{1}\u{2}\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
    ] {
        let (kind, error) = error_of(move |_, client| client.raw(head.as_bytes()));
        assert!(
            matches!(kind, ErrorKind::Failed | ErrorKind::Unavailable),
            "{head}: {error}"
        );
    }
    let header = format!("x: {}\r\n", "y".repeat(1000));
    error_of(move |_, client| {
        client.raw(b"HTTP/1.1 200 OK\r\n")?;
        loop {
            client.raw(header.as_bytes())?;
        }
    });
}

#[test]
fn a_body_shorter_than_it_says() {
    let (kind, error) = error_of(|_, client| {
        client.raw(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 5000\r\n\r\n",
        )?;
        client.raw(b"data: {\"choices\":[{\"delta\":{\"content\":\"Hi\"}}]}\n\n")
    });
    assert_eq!(kind, ErrorKind::Unavailable);
    assert!(
        error.contains("closed the connection") || error.contains("end"),
        "{error}"
    );
}

#[test]
fn characters_cut_in_half_and_what_is_no_text() {
    for (data, words) in [
        (
            &b"data: {\"choices\":[{\"delta\":{\"content\":\"\xc3\"}}]}\n\n"[..],
            "not JSON",
        ),
        (
            b"data: {\"choices\":[{\"delta\":{\"content\":\"\\ud83d\"}}]}\n\n",
            "not JSON",
        ),
        (b"data: \xff\xfe\n\n", "not JSON"),
        (b"data: [[[[[[[[[[[[[[[[[[[[\n\n", "not JSON"),
        (
            b"data: {\"error\":\"\\u001b[31m\\u0000<b>&amp;\"}\n\n",
            "the server failed",
        ),
    ] {
        let (kind, error) = error_of(move |_, client| {
            client.raw(STREAM)?;
            client.raw(data)
        });
        assert_eq!(kind, ErrorKind::Failed, "{error}");
        assert!(error.contains(words), "{error}");
    }
    let deep = format!("data: {}\n\n", "[".repeat(200_000));
    let (_, error) = error_of(move |_, client| {
        client.raw(STREAM)?;
        client.raw(deep.as_bytes())
    });
    assert!(error.contains("not JSON"), "{error}");
}
