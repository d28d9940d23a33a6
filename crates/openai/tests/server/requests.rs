//! What servers are asked, and how answers are read.

use std::{
    ops::ControlFlow,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
        mpsc,
    },
    time::Duration,
};

use serde_json::json;
use vlmnarrate_engine::{Clip, Event, ImageFormat, Picture, Request, Setting};
use vlmnarrate_scripted_server::{MODEL, Server, answers, models};

use crate::common::*;

#[test]
fn an_answer_is_streamed() {
    let server = Server::start(answers("A solid red screen."));
    let mut engine = load(endpoint(server.url()), None).unwrap();
    let info = engine.info();
    assert_eq!(
        (info.model.as_str(), info.device.as_str()),
        (MODEL, "remote")
    );
    assert_eq!(info.device_name, server.address().to_string());
    let (answer, told) = ask_with(engine.as_mut(), |request| {
        request.system = Some("Be brief.")
    });
    let answer = answer.unwrap();
    assert_eq!(answer.text, "A solid red screen.");
    assert_eq!(
        (answer.tokens, answer.truncated, answer.probability),
        (4, false, Some(1.0))
    );
    assert_eq!(told.texts.last().unwrap(), "A solid red screen.");
    assert!(told.ignored.is_empty() && told.models.is_empty());
    let exchange = server.exchanges().pop().unwrap();
    assert_eq!(exchange.texts(), ["Be brief.", "What is this?"]);
    assert!(exchange.image_urls()[0].starts_with("data:image/jpeg;base64,"));
    assert_eq!(exchange.header("authorization"), None);
}

#[test]
fn the_text_comes_while_it_is_made() {
    let (heard, was_heard) = mpsc::channel();
    let was_heard = Mutex::new(was_heard);
    let server = Server::start(move |exchange, client| {
        if !exchange.is_chat() {
            return models(client);
        }
        client.stream_head()?;
        client.delta(" A solid")?;
        let text: String = was_heard.lock().unwrap().recv().unwrap();
        assert_eq!(text, "A solid");
        client.delta(" red screen.")?;
        client.finish("stop")?;
        client.done()
    });
    let picture = Picture::blank(8);
    let pictures = [&picture];
    let answer = engine(server.url()).describe(&Request::new(&pictures, ""), &mut |event| {
        if let Event::Text { text, .. } = event {
            let _ = heard.send(text.to_owned());
        }
        ControlFlow::Continue(())
    });
    assert_eq!(answer.unwrap().text, "A solid red screen.");
}

#[test]
fn the_same_picture_makes_the_same_bytes_over_one_connection() {
    let server = Server::start(answers("Red."));
    let mut engines = [engine(server.url()), engine(server.url())];
    for _ in 0..3 {
        for engine in &mut engines {
            ask(engine.as_mut()).unwrap();
        }
    }
    let chats: Vec<_> = server
        .exchanges()
        .into_iter()
        .filter(|e| e.is_chat())
        .collect();
    assert_eq!(chats.len(), 6);
    assert!(chats.iter().all(|chat| chat.body == chats[0].body));
    assert_eq!(server.accepted(), 1, "elements share idle connections");
}

#[test]
fn the_key_is_sent_to_the_endpoint() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("key");
    std::fs::write(&path, "sk-sesame\n").unwrap();
    let server = Server::start(answers("Red."));
    let mut settings = endpoint(server.url());
    settings.api_key_file = Some(path);
    let mut engine = load(settings, None).unwrap();
    ask(engine.as_mut()).unwrap();
    for exchange in server.exchanges() {
        assert_eq!(exchange.header("authorization"), Some("Bearer sk-sesame"));
    }
}

#[test]
fn options_and_pngs_reach_the_server() {
    let server = Server::start(answers("Red."));
    let mut settings = endpoint(server.url());
    settings.request_options = Some(r#"{"max_tokens": 3, "priority": {"a": [1]}}"#.into());
    settings.image_format = ImageFormat::Png;
    let mut engine = load(settings, None).unwrap();
    ask(engine.as_mut()).unwrap();
    let exchange = server.exchanges().pop().unwrap();
    assert_eq!(exchange.body["max_tokens"], 3);
    assert_eq!(exchange.body["priority"], json!({"a": [1]}));
    assert!(exchange.image_urls()[0].starts_with("data:image/png;base64,"));
}

#[test]
fn a_stop_string_ends_the_answer_and_the_work_of_the_server() {
    let server = Server::start(|exchange, client| {
        if !exchange.is_chat() {
            return models(client);
        }
        client.stream_head()?;
        for word in [" One.", " Tw", "o. Three."] {
            client.delta(word)?;
        }
        assert!(client.closed_within(Duration::from_secs(20)).is_some());
        Ok(())
    });
    let mut engine = engine(server.url());
    let stop = ["Two".to_owned()];
    let (answer, _) = ask_with(engine.as_mut(), |request| request.stop_strings = &stop);
    let answer = answer.unwrap();
    assert_eq!((answer.text.as_str(), answer.truncated), ("One.", false));
    server.wait_for_open(0, Duration::from_secs(20));
}

#[test]
fn a_limit_of_tokens_truncates() {
    let server = Server::start(|exchange, client| {
        if !exchange.is_chat() {
            return models(client);
        }
        client.stream_head()?;
        client.delta("A man")?;
        client.finish("length")?;
        client.done()
    });
    let answer = ask(engine(server.url()).as_mut()).unwrap();
    assert_eq!((answer.text.as_str(), answer.truncated), ("A man", true));
}

#[test]
fn an_answer_without_a_stream_or_without_an_end_mark_is_one() {
    let count = AtomicUsize::new(0);
    let server = Server::start(move |exchange, client| {
        if !exchange.is_chat() {
            return models(client);
        }
        if count.fetch_add(1, SeqCst) == 0 {
            let message = json!({"message": {"content": "Whole."}, "finish_reason": "stop"});
            return client.json(200, &json!({"model": "m", "choices": [message]}));
        }
        // As transformers serve ends a stream.
        client.stream_head()?;
        client.delta("Streamed.")?;
        client.finish("stop")?;
        client.end()
    });
    let mut engine = engine(server.url());
    assert_eq!(ask(engine.as_mut()).unwrap().text, "Whole.");
    assert_eq!(ask(engine.as_mut()).unwrap().text, "Streamed.");
}

#[test]
fn the_model_is_the_one_that_answers() {
    let server = Server::start(|exchange, client| {
        if !exchange.is_chat() {
            return client.json(
                200,
                &json!({"data": [{"id": "a.gguf", "owned_by": "llamacpp"}]}),
            );
        }
        client.stream_head()?;
        client.event(&json!({"model": "a.gguf", "choices": [{"delta": {"content": "Hi."}}]}))?;
        client.finish("stop")?;
        client.done()
    });
    let mut engine = load(endpoint(server.url()), Some("another")).unwrap();
    let (answer, told) = ask_with(engine.as_mut(), |_| ());
    assert_eq!(answer.unwrap().text, "Hi.");
    assert!(!told.models.is_empty() && told.models.iter().all(|model| model == "a.gguf"));
}

#[test]
fn choices_are_asked_for_and_checked() {
    let texts = [" red", "green", "Red, I think"];
    let count = AtomicUsize::new(0);
    let server = Server::start(move |exchange, client| match exchange.is_chat() {
        true => answers(texts[count.fetch_add(1, SeqCst)])(exchange, client),
        false => models(client),
    });
    let mut engine = engine(server.url());
    let choices = ["red".to_owned(), "green".to_owned()];
    let mut ask = || ask_with(engine.as_mut(), |request| request.choices = &choices);
    for expected in ["red", "green"] {
        let (answer, told) = ask();
        let answer = answer.unwrap();
        assert_eq!((answer.text.as_str(), answer.probability), (expected, None));
        assert_eq!(told.texts, [""; 0]);
    }
    let (answer, told) = ask();
    let error = answer.unwrap_err().to_string();
    assert!(
        error.contains("\"Red, I think\" is none of the choices"),
        "{error}"
    );
    assert_eq!(told.ignored, [Setting::Choices]);
    let exchange = server.exchanges().pop().unwrap();
    let asked = &exchange.body["structured_outputs"]["choice"];
    assert_eq!(*asked, json!(["red", "green", " red", " green"]));
}

#[test]
fn a_field_that_the_server_refuses_is_left_out_from_then_on() {
    let server = Server::start(|exchange, client| {
        if !exchange.is_chat() {
            return client.json(200, &json!({"data": [{"id": "m", "owned_by": "somebody"}]}));
        }
        if exchange.body.get("top_k").is_some() {
            let detail =
                json!({"detail": "Unexpected keys in the request: {'top_k', 'stream_options'}"});
            return client.json(422, &detail);
        }
        assert!(exchange.body.get("stream_options").is_none());
        answers("Red.")(exchange, client)
    });
    let mut engine = load(endpoint(server.url()), Some("m")).unwrap();
    let mut ask = || {
        ask_with(engine.as_mut(), |request| {
            request.sampling.temperature = 0.7;
            request.sampling.top_k = 5;
        })
    };
    let (answer, told) = ask();
    assert_eq!(answer.unwrap().text, "Red.");
    assert_eq!(told.ignored, [Setting::TopK]);
    let (answer, told) = ask();
    assert_eq!(answer.unwrap().text, "Red.");
    assert_eq!(told.ignored, [], "told once");
    assert_eq!(server.exchanges().iter().filter(|e| e.is_chat()).count(), 3);
}

#[test]
fn frames_of_a_clip_go_in_one_request() {
    let server = Server::start(answers("Red."));
    let mut engine = engine(server.url());
    let picture = Picture::blank(8);
    let pictures = [&picture; 3];
    let clip = Clip {
        times: [0, 1, 2].map(Duration::from_secs).into(),
        duration: Duration::from_secs(3),
    };
    let mut request = Request::new(&pictures, "What?");
    request.clip = Some(&clip);
    let go_on = &mut |_: Event<'_>| ControlFlow::Continue(());
    assert_eq!(engine.describe(&request, go_on).unwrap().text, "Red.");
    let exchange = server.exchanges().pop().unwrap();
    assert_eq!(exchange.image_urls().len(), 3);
    assert!(
        exchange.texts()[0].starts_with("You are provided the following series of three frames")
    );
}
