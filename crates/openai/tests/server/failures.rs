//! Each failure is one error that says what to do.

use std::{
    fs,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use serde_json::json;
use vlmnarrate_engine::ErrorKind;
use vlmnarrate_scripted_server::{Server, answers, models};

use crate::common::*;

/// The error of loading, with its kind.
fn load_error(url: impl Into<String>, model: Option<&str>) -> (ErrorKind, String) {
    let error = load(endpoint(url), model).err().expect("an error");
    (error.kind, error.to_string())
}

fn list(ids: &[&str], owner: &str) -> serde_json::Value {
    let models = ids.iter().map(|id| json!({"id": id, "owned_by": owner}));
    json!({"data": models.collect::<Vec<_>>()})
}

#[test]
fn a_wrong_key_names_what_to_set() {
    let server = Server::start(|_, client| client.json(401, &json!({"error": "Unauthorized"})));
    let (kind, error) = load_error(server.url(), Some("m"));
    assert_eq!(kind, ErrorKind::NotAuthorized);
    for words in [
        &server.url(),
        "401",
        "Unauthorized",
        "VLMNARRATE_API_KEY",
        "api-key-file",
    ] {
        assert!(error.contains(words), "{words}: {error}");
    }
}

#[test]
fn a_key_that_a_server_repeats_is_not_shown() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("key");
    fs::write(&path, "sk-sesame").unwrap();
    for status in [400, 401, 404, 500] {
        let server = Server::start(move |exchange, client| match exchange.is_chat() {
            true => client.error(status, "your key is Bearer sk-sesame"),
            false => models(client),
        });
        let mut settings = endpoint(server.url());
        settings.api_key_file = Some(path.clone());
        let mut engine = load(settings, None).unwrap();
        let error = ask(engine.as_mut()).unwrap_err().to_string();
        assert!(error.contains(&status.to_string()), "{error}");
        assert!(!error.contains("sesame"), "{error}");
    }
}

#[test]
fn an_unknown_model_is_told_with_those_that_there_are() {
    let server = Server::start(|_, client| client.json(200, &list(&["small", "large"], "vllm")));
    let (kind, error) = load_error(server.url(), Some("medium"));
    assert_eq!(kind, ErrorKind::NotFound);
    assert!(
        error.contains("no model \"medium\"") && error.contains("small, large"),
        "{error}"
    );
    let (_, error) = load_error(server.url(), None);
    assert!(
        error.contains("several models") && error.contains("small, large"),
        "{error}"
    );

    // A gateway may know more than it lists.
    let server = Server::start(|exchange, client| match exchange.is_chat() {
        true => client.error(404, "no such model"),
        false => client.json(200, &list(&["a"], "me")),
    });
    let mut engine = load(endpoint(server.url()), Some("b")).unwrap();
    let error = ask(engine.as_mut()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotFound);
    let error = error.to_string();
    assert!(
        error.contains("no model \"b\"") && error.contains("no such model"),
        "{error}"
    );
}

#[test]
fn a_server_that_comes_back_with_another_model_is_asked_for_it() {
    let is_new = Arc::new(AtomicUsize::new(0));
    let switch = is_new.clone();
    let server = Server::start(move |exchange, client| {
        let id = ["old", "new"][switch.load(SeqCst)];
        match exchange.is_chat() {
            false => client.json(200, &list(&[id], "vllm")),
            true if exchange.body["model"] == id => answers("Here.")(exchange, client),
            true => client.error(404, "The model does not exist."),
        }
    });
    let mut engine = load(endpoint(server.url()), None).unwrap();
    assert_eq!(ask(engine.as_mut()).unwrap().text, "Here.");
    is_new.store(1, SeqCst);
    assert_eq!(ask(engine.as_mut()).unwrap().text, "Here.");
    assert_eq!(engine.info().model, "new");
    // Another element has named the old one.
    let error = load(endpoint(server.url()), Some("old"))
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("one that it has: new"), "{error}");
}

#[test]
fn a_path_without_v1_is_corrected() {
    let server = Server::start(|exchange, client| match exchange.path.as_str() {
        "/v1/models" => models(client),
        _ => client.error(404, "Not Found"),
    });
    let url = server.url();
    let base = url.strip_suffix("/v1").unwrap();
    let (kind, error) = load_error(base, Some("m"));
    assert_eq!(kind, ErrorKind::Settings);
    assert!(error.ends_with(&format!("Set endpoint={url}")), "{error}");
}

#[test]
fn what_is_no_engine_is_refused() {
    let html = "<html><title>Welcome</title><h1>It works!</h1></html>";
    let server = Server::start(move |_, client| client.text(200, "text/html", html));
    let (kind, error) = load_error(server.url(), Some("m"));
    assert_eq!(kind, ErrorKind::Settings);
    assert!(
        error.contains("not an OpenAI-compatible server") && error.contains("/v1"),
        "{error}"
    );

    let server = Server::start(|_, client| client.text(404, "text/html", "<h1>Nothing here</h1>"));
    let (kind, error) = load_error(server.url(), None);
    assert_eq!(kind, ErrorKind::NotFound);
    assert!(error.contains("lists no models"), "{error}");
    let mut engine = load(endpoint(server.url()), Some("m")).unwrap();
    let error = ask(engine.as_mut()).unwrap_err().to_string();
    assert!(
        error.contains("404: Nothing here") && error.contains("/v1"),
        "{error}"
    );
}

#[test]
fn a_redirect_is_not_followed_and_takes_no_key_along() {
    let elsewhere = Arc::new(Server::start(answers("Hello.")));
    let to = format!("{}/models", elsewhere.url());
    let server = Server::start(move |_, client| {
        client.json_with_headers(307, &[("location", &to)], &json!({}))
    });
    let (kind, error) = load_error(server.url(), Some("m"));
    assert_eq!(kind, ErrorKind::Settings);
    assert!(
        error.contains("redirects to") && error.contains("Set endpoint"),
        "{error}"
    );
    assert_eq!(elsewhere.accepted(), 0);
}

#[test]
fn a_certificate_of_an_unknown_authority_needs_the_ca_file() {
    let server = Server::start_tls(answers("Secret."));
    let (kind, error) = load_error(server.url(), None);
    assert_eq!(kind, ErrorKind::Settings);
    assert!(error.contains("ca-file"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ca.pem");
    fs::write(&path, server.ca_pem()).unwrap();
    let mut settings = endpoint(server.url());
    settings.ca_file = Some(path);
    let mut engine = load(settings, None).unwrap();
    assert_eq!(ask(engine.as_mut()).unwrap().text, "Secret.");
}

#[test]
fn tls_where_there_is_none_says_so() {
    let server = Server::start(answers("Plain."));
    let url = server.url().replace("http://", "https://");
    let (kind, error) = load_error(url, None);
    assert_eq!(kind, ErrorKind::Settings);
    assert!(
        error.contains("does not speak TLS") && error.contains("http://"),
        "{error}"
    );
}

#[test]
fn an_unknown_host_is_an_error_at_the_start() {
    let (kind, error) = load_error("http://no-such-host.invalid:8000/v1", Some("m"));
    assert_eq!(kind, ErrorKind::NotFound);
    assert!(error.contains("its host name is not known"), "{error}");
    // A fallback is there for networks that are away, too.
    let mut settings = endpoint("http://no-such-host.invalid:8000/v1");
    settings.fallback_model = Some("demo".into());
    load(settings, Some("m")).unwrap();
}

#[test]
fn a_request_that_is_refused_costs_one_caption() {
    let count = AtomicUsize::new(0);
    let server = Server::start(move |exchange, client| {
        if !exchange.is_chat() {
            return models(client);
        }
        match count.fetch_add(1, SeqCst) {
            0 => client.error(400, "This model's maximum context length is 1024 tokens."),
            1 => client.text(413, "text/html", "<h1>Request Entity Too Large</h1>"),
            2 => {
                client.stream_head()?;
                client.delta("Half an ")?;
                client.event(&json!({"error": {"message": "CUDA out of memory"}}))?;
                client.end()
            }
            _ => answers("Fine.")(exchange, client),
        }
    });
    let mut engine = engine(server.url());
    for words in [
        &["400", "maximum context length is 1024"][..],
        &["413", "image-size", "client_max_body_size"],
        &["CUDA out of memory"],
    ] {
        let error = ask(engine.as_mut()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Failed);
        let error = error.to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
    assert_eq!(ask(engine.as_mut()).unwrap().text, "Fine.");
}

#[test]
fn an_idle_connection_that_the_server_has_closed_is_no_failure() {
    // Closed after the answer, when the next request may already be on its way.
    let clients = Arc::new(Mutex::new(0));
    let counted = clients.clone();
    let server = Server::start(move |exchange, client| {
        if !exchange.is_chat() {
            return models(client);
        }
        *counted.lock().unwrap() += 1;
        answers("Red.")(exchange, client)?;
        client.reset()
    });
    let mut engine = engine(server.url());
    for _ in 0..20 {
        assert_eq!(ask(engine.as_mut()).unwrap().text, "Red.");
    }
    assert_eq!(*clients.lock().unwrap(), 20);
}

#[test]
fn thoughts_without_an_answer_are_explained() {
    let server = Server::start(|exchange, client| {
        if !exchange.is_chat() {
            return models(client);
        }
        client.stream_head()?;
        client.event(&json!({"choices": [{"delta": {"reasoning_content": "Hm."}}]}))?;
        client.finish("length")?;
        client.done()
    });
    let error = ask(engine(server.url()).as_mut()).unwrap_err().to_string();
    assert!(
        error.contains("max-tokens") && error.contains("request-options"),
        "{error}"
    );
}

#[test]
fn a_server_that_falls_silent_is_away() {
    let server = Server::start(|exchange, client| {
        if !exchange.is_chat() {
            return models(client);
        }
        client.stream_head()?;
        client.delta("I was")?;
        client.closed_within(Duration::from_secs(20));
        Ok(())
    });
    let mut settings = endpoint(server.url());
    settings.timeout = Duration::from_millis(300);
    let mut engine = load(settings, None).unwrap();
    let error = ask(engine.as_mut()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert!(error.to_string().contains("endpoint-timeout"), "{error}");
}
