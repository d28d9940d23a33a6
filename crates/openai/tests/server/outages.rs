//! Servers that go away and come back.

use std::{
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use vlmnarrate_engine::{ErrorKind, Event, Priority};
use vlmnarrate_scripted_server::{Capacity, Server, Slots, answers, models};

use crate::common::*;

#[test]
fn a_server_that_is_not_there_yet_is_asked_again() {
    let nowhere = Server::refusing();
    let address = nowhere.address();
    let mut engine = load(endpoint(nowhere.url()), Some("scripted")).unwrap();
    let mut errors = vec![];
    let waited = engine.wait_turn(Priority::Normal, &mut |event| match event {
        Event::Unavailable(error) => {
            errors.push(error.to_string());
            ControlFlow::Break(())
        }
        _ => ControlFlow::Continue(()),
    });
    assert_eq!(waited.unwrap_err().kind, ErrorKind::Cancelled);
    assert!(errors[0].contains("nothing listens there"), "{errors:?}");
    drop(nowhere);
    let server = Server::builder()
        .port(address.port())
        .start(answers("Back."));
    assert_eq!(ask(engine.as_mut()).unwrap().text, "Back.");
    assert_eq!(engine.info().model, "scripted");
    drop(server);
}

#[test]
fn one_probe_asks_a_server_that_failed() {
    let (chats, is_broken) = (
        Arc::new(AtomicUsize::new(0)),
        Arc::new(AtomicBool::new(true)),
    );
    let (counted, broken) = (chats.clone(), is_broken.clone());
    let server = Server::start(move |exchange, client| {
        if !exchange.is_chat() {
            return models(client);
        }
        counted.fetch_add(1, SeqCst);
        match broken.load(SeqCst) {
            true => client.text(502, "text/html", "<h1>Bad Gateway</h1>"),
            false => answers("Fine.")(exchange, client),
        }
    });
    let mut engines: Vec<_> = (0..5).map(|_| engine(server.url())).collect();
    let (answer, told) = ask_with(engines[0].as_mut(), |_| ());
    assert_eq!(answer.unwrap_err().kind, ErrorKind::Unavailable);
    assert_eq!(told.away.len(), 1);
    let text = told.away[0].to_string();
    assert!(text.contains("502: Bad Gateway"), "{text}");
    thread::scope(|scope| {
        // Engines don't change threads.
        for _ in 1..5 {
            scope.spawn(|| {
                let mut engine = engine(server.url());
                let start = Instant::now();
                // The pause, ± 25 %.
                while ask(engine.as_mut()).is_err() {
                    assert!(start.elapsed() < Duration::from_secs(20));
                }
            });
        }
        thread::sleep(Duration::from_millis(300));
        assert_eq!(chats.load(SeqCst), 1, "nobody asks during the pause");
        thread::sleep(Duration::from_millis(600));
        // The first probe has failed, and the next pause is longer.
        assert_eq!(chats.load(SeqCst), 2);
        is_broken.store(false, SeqCst);
    });
    assert_eq!(chats.load(SeqCst), 6);
}

/// A picture over which the server fails again and again is one camera's trouble.
#[test]
fn a_request_that_breaks_the_server_does_not_stop_the_others() {
    let server = Server::start(|exchange, client| {
        match (exchange.is_chat(), exchange.texts().contains(&"bad")) {
            (false, _) => models(client),
            (true, true) => client.error(500, "the model produced nonsense"),
            (true, false) => answers("Fine.")(exchange, client),
        }
    });
    thread::scope(|scope| {
        let good = scope.spawn(|| {
            let mut engine = engine(server.url());
            for _ in 0..50 {
                assert_eq!(ask(engine.as_mut()).unwrap().text, "Fine.");
                thread::sleep(Duration::from_millis(2));
            }
        });
        server.wait_for(3, Duration::from_secs(20));
        let mut engine = engine(server.url());
        while !good.is_finished() {
            let (answer, told) = ask_with(engine.as_mut(), |request| request.prompt = "bad");
            let error = answer.unwrap_err();
            assert_eq!(error.kind, ErrorKind::Failed);
            assert!(
                error.to_string().contains("nonsense") && told.away.is_empty(),
                "{error}"
            );
        }
        good.join().unwrap();
    });
}

#[test]
fn a_server_that_says_when_is_asked_then() {
    let start = Instant::now();
    let count = AtomicUsize::new(0);
    let server = Server::start(move |exchange, client| {
        if !exchange.is_chat() {
            return models(client);
        }
        match count.fetch_add(1, SeqCst) {
            0 => client.json_with_headers(429, &[("retry-after", "2")], &serde_json::json!({})),
            _ => answers("Now.")(exchange, client),
        }
    });
    let mut engine = engine(server.url());
    assert_eq!(
        ask(engine.as_mut()).unwrap_err().kind,
        ErrorKind::Unavailable
    );
    assert_eq!(ask(engine.as_mut()).unwrap().text, "Now.");
    assert!(start.elapsed() >= Duration::from_secs(2));
}

#[test]
fn an_overloaded_server_gets_what_it_bears() {
    let slots = Slots::new(Capacity {
        slots: 3,
        delay: Duration::from_millis(40),
        queue_limit: Some(1),
        ..Capacity::default()
    });
    let server = Server::start(slots.handler());
    thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                let mut engine = engine(server.url());
                let mut answers = 0;
                let start = Instant::now();
                while answers < 10 {
                    match ask(engine.as_mut()) {
                        Ok(_) => answers += 1,
                        Err(error) => assert_eq!(error.kind, ErrorKind::Unavailable, "{error}"),
                    }
                    assert!(start.elapsed() < Duration::from_secs(60));
                }
            });
        }
    });
    let counters = slots.counters();
    assert_eq!(counters.served, 120);
    // One more is tried now and then.
    assert!(counters.refused < 60, "{}", counters.refused);
}

#[test]
fn a_deadline_without_a_word_means_away() {
    let server = Server::start(|exchange, client| {
        if !exchange.is_chat() {
            return models(client);
        }
        client.closed_within(Duration::from_secs(20));
        Ok(())
    });
    let mut engine = engine(server.url());
    let picture = vlmnarrate_engine::Picture::blank(8);
    let pictures = [&picture];
    let mut request = vlmnarrate_engine::Request::new(&pictures, "");
    let deadline = Instant::now() + Duration::from_millis(200);
    request.deadline = Some(deadline);
    let mut away = 0;
    let answer = engine.describe(&request, &mut |event| {
        away += usize::from(matches!(event, Event::Unavailable(_)));
        match Instant::now() < deadline {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        }
    });
    assert_eq!(answer.unwrap_err().kind, ErrorKind::Unavailable);
    assert_eq!(away, 1);
}

#[test]
fn an_answer_that_breaks_off_is_asked_for_again() {
    let server = Server::start(|exchange, client| {
        if !exchange.is_chat() {
            return models(client);
        }
        client.stream_head()?;
        client.delta("Half an")
    });
    let error = ask(engine(server.url()).as_mut()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert!(
        error.to_string().contains("closed the connection"),
        "{error}"
    );
}
