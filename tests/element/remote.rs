//! Models behind an endpoint: everything works as in process, nothing gets in the way, nothing is lost in silence.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use crate::common::{Heard, Pipeline, TIMEOUT, engine::wait_for, spy, stat};
use gst::{ResourceError, prelude::*};
use serde_json::json;
use vlmnarrate_scripted_server::{Capacity, Connection, Server, Slots, answers, models};

const RECORDED: &str =
    "videotestsrc num-buffers=3 ! video/x-raw,width=320,height=180,framerate=1/1";
const LIVE: &str = "videotestsrc is-live=true ! video/x-raw,width=64,height=48,framerate=50/1";

/// A pipeline with these properties of a narrator that asks this server.
fn pipeline(source: &str, url: &str, properties: &str) -> Pipeline {
    Pipeline::with_default_engine(&format!(
        "{source} ! vlmnarrate name=n endpoint={url} {properties} ! fakesink"
    ))
}

/// The error of a pipeline that ends with one.
#[track_caller]
fn error(heard: &Heard) -> String {
    let [(error, _)] = &heard.errors[..] else {
        panic!("not one error: {heard:#?}");
    };
    error.to_string()
}

#[test]
fn a_recording_is_described_frame_by_frame() {
    let server = Server::start(answers("A solid red screen."));
    let heard = pipeline(RECORDED, &server.url(), "").run_to_eos();
    assert_eq!(heard.texts(), ["A solid red screen."; 3]);
    assert!(
        heard.warnings.is_empty() && heard.infos.is_empty(),
        "{heard:#?}"
    );
    let caption = &heard.captions[2];
    assert_eq!(
        (caption.device.as_str(), caption.model.as_str()),
        ("remote", "scripted")
    );
    assert_eq!(caption.device_name, server.address().to_string());
    assert!(caption.repeated);
    let exchanges = server.exchanges();
    let chats: Vec<_> = exchanges
        .iter()
        .filter(|exchange| exchange.is_chat())
        .collect();
    assert_eq!(chats.len(), 3);
    assert_eq!(chats[0].texts(), ["Describe this frame in one sentence."]);
    let url = chats[0].image_urls()[0];
    assert!(url.starts_with("data:image/jpeg;base64,"));
}

/// The size of a PNG in a data URL.
fn png_size(url: &str) -> (u32, u32) {
    // The width and height are bytes 16 to 24, of which base64 writes three in four characters from byte 15 on.
    let text = url.strip_prefix("data:image/png;base64,").unwrap();
    let bits = text[20..32].bytes().map(|c| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        _ => 63,
    });
    let number = bits.fold(0u128, |number, bits| number << 6 | u128::from(bits));
    // 72 bits: byte 15 and the eight that count.
    ((number >> 32) as u32, number as u32)
}

#[test]
fn the_aspect_is_kept_unless_the_model_is_a_smolvlm() {
    let server = Server::start(|exchange, client| match exchange.is_chat() {
        true => answers("A screen.")(exchange, client),
        false => {
            let ids = ["Qwen3-VL-8B", "SmolVLM2-500M"].map(|id| json!({"id": id}));
            client.json(200, &json!({"data": ids}))
        }
    });
    for (model, properties, size) in [
        ("Qwen3-VL-8B", "", (320, 180)),
        ("Qwen3-VL-8B", "image-size=160", (160, 90)),
        (
            "Qwen3-VL-8B",
            "image-splitting=true image-size=160",
            (320, 180),
        ),
        ("SmolVLM2-500M", "", (512, 512)),
        ("SmolVLM2-500M", "image-size=256", (256, 256)),
    ] {
        let properties = format!("model={model} image-format=png {properties}");
        let pipeline = pipeline(RECORDED, &server.url(), &properties);
        assert_eq!(pipeline.run_to_eos().captions.len(), 3);
        let exchange = server.exchanges().pop().unwrap();
        assert_eq!(png_size(exchange.image_urls()[0]), size, "{properties}");
    }
}

#[test]
fn clips_partial_captions_and_requests_work_as_in_process() {
    let server = Server::start(answers("A ball moves."));
    let line = "videotestsrc num-buffers=8 ! video/x-raw,width=64,height=48,framerate=4/1";
    let pipeline = pipeline(
        line,
        &server.url(),
        "frames=4 partial-captions=true system-prompt=Brief.",
    );
    pipeline.reach(gst::State::Ready);
    let id = pipeline
        .narrator
        .describe_now(Some("What colour?"), Some(7))
        .unwrap();
    let heard = pipeline.run_to_eos();
    assert_eq!(heard.captions.len(), 3);
    assert!(!heard.partials.is_empty());
    let requested = heard
        .captions
        .iter()
        .find(|caption| caption.stamp.request_id == id);
    assert_eq!(requested.unwrap().prompt, "What colour?");
    let exchanges = server.exchanges();
    let chats: Vec<_> = exchanges
        .iter()
        .filter(|exchange| exchange.is_chat())
        .collect();
    let clip = chats
        .iter()
        .find(|chat| chat.image_urls().len() == 4)
        .unwrap();
    let texts = clip.texts();
    assert_eq!(texts[0], "Brief.");
    assert!(texts[1].contains("four frames from a 0:00:01"), "{texts:?}");
    assert!(
        texts[5].ends_with("Describe this video in one sentence."),
        "{texts:?}"
    );
    let now = chats
        .iter()
        .find(|chat| chat.texts().contains(&"What colour?"))
        .unwrap();
    assert_eq!(now.body["max_tokens"], 7);
}

#[test]
fn what_an_endpoint_ignores_is_one_warning_each() {
    let server = Server::start(|exchange, client| match exchange.is_chat() {
        true => answers("Red.")(exchange, client),
        false => client.json(200, &json!({"data": [{"id": "m", "owned_by": "library"}]})),
    });
    let heard = pipeline(
        RECORDED,
        &server.url(),
        "device=cpu threads=2 repetition-penalty=1.2",
    )
    .run_to_eos();
    let words = |property: &str| format!("{property}: the endpoint ignores it");
    let mut warnings = heard.warnings.clone();
    warnings.sort();
    assert_eq!(
        warnings,
        ["device", "repetition-penalty", "threads"].map(words)
    );
    assert_eq!(heard.captions.len(), 3);
}

#[test]
fn a_wrong_key_is_one_error() {
    let server = Server::start(|_, client| client.json(401, &json!({"error": "Unauthorized"})));
    let heard = pipeline(RECORDED, &server.url(), "").run();
    assert!(heard.errors[0].0.matches(ResourceError::NotAuthorized));
    let error = error(&heard);
    assert!(error.contains("VLMNARRATE_API_KEY"), "{error}");
}

#[test]
fn a_key_that_becomes_wrong_is_one_error_too() {
    for source in [RECORDED, LIVE] {
        let server = Server::start(|exchange, client| match exchange.is_chat() {
            true => client.json(401, &json!({"error": "Unauthorized"})),
            false => models(client),
        });
        let heard = pipeline(source, &server.url(), "interval=20000000").run();
        assert!(heard.errors[0].0.matches(ResourceError::NotAuthorized));
        assert_eq!(heard.errors.len(), 1);
    }
}

#[test]
fn settings_are_refused_in_ready() {
    for (properties, words) in [
        (
            "endpoint=gpu:8000/v1",
            &["endpoint: ", "http://localhost:8000/v1"][..],
        ),
        ("endpoint=http://me:secret@gpu/v1", &["api-key-file"]),
        (
            "endpoint=http://h/v1 api-key-file=/no/such",
            &["api-key-file: /no/such"],
        ),
        (
            "endpoint=http://h/v1 ca-file=/no/such",
            &["ca-file: /no/such"],
        ),
        (
            "endpoint=http://h/v1 request-options=[]",
            &["request-options: "],
        ),
        (
            "endpoint=http://h/v1 fallback-model=/no/such",
            &["/no/such"],
        ),
    ] {
        let line = format!("{RECORDED} ! vlmnarrate name=n {properties} ! fakesink");
        let pipeline = Pipeline::with_default_engine(&line);
        let _ = pipeline.pipeline.set_state(gst::State::Ready).unwrap_err();
        let heard = pipeline.log.heard();
        let error = error(&heard);
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
}

#[test]
fn the_key_is_in_nothing_that_can_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("key");
    std::fs::write(&path, "sk-sesame").unwrap();
    let server = Server::start(answers("Red."));
    let properties = format!("api-key-file={}", path.display());
    gst::log::set_default_threshold(gst::DebugLevel::Trace);
    let log = Arc::new(std::sync::Mutex::new(String::new()));
    gst::log::add_log_function({
        let log = log.clone();
        move |_, _, _, _, _, _, message| {
            let text = message.get().unwrap_or_default();
            log.lock().unwrap().push_str(&text);
        }
    });
    let pipeline = pipeline(RECORDED, &server.url(), &properties);
    pipeline.play();
    let heard = pipeline.log.wait(|heard| heard.eos);
    let dot = pipeline
        .pipeline
        .debug_to_dot_data(gst::DebugGraphDetails::all());
    gst::log::remove_default_log_function();
    let narrator = &pipeline.narrator;
    let properties = narrator.list_properties();
    let values = properties
        .iter()
        .filter(|spec| spec.flags().contains(gst::glib::ParamFlags::READABLE))
        .map(|spec| format!("{:?}", narrator.property_value(spec.name())));
    let everything = format!("{heard:?} {dot} {}", values.collect::<String>());
    assert!(everything.contains("api-key-file") || dot.contains("GstVlmNarrate"));
    assert!(!everything.contains("sesame"));
    let log = log.lock().unwrap();
    assert!(log.contains("vlmnarrate") && !log.contains("sesame"));
    assert_eq!(
        server.exchanges()[0].header("authorization"),
        Some("Bearer sk-sesame")
    );
}

#[test]
fn live_one_request_is_in_flight_and_the_newest_frame_wins() {
    let slots = Slots::new(Capacity {
        slots: 9,
        delay: Duration::from_millis(300),
        ..Capacity::default()
    });
    let server = Server::start(slots.handler());
    let pipeline = pipeline(LIVE, &server.url(), "interval=20000000");
    pipeline.play();
    let heard = pipeline.log.wait(|heard| heard.captions.len() == 4);
    assert_eq!(slots.counters().in_flight_max, 1);
    assert!(stat(&pipeline.narrator, "dropped") > 0);
    // 300 ms, from the first word on.
    assert!(stat(&pipeline.narrator, "decode-p50") > 100_000_000);
    assert!(stat(&pipeline.narrator, "prefill-p50") > 0);
    for pair in heard.captions.windows(2) {
        // Not the frame behind the last one, but the newest.
        let [a, b] = pair else { unreachable!() };
        assert!(
            b.stamp.timestamp.unwrap()
                >= a.stamp.timestamp.unwrap() + gst::ClockTime::from_mseconds(40)
        );
    }
}

#[test]
fn elements_wait_for_their_turn_with_the_newest_frame() {
    let slots = Slots::new(Capacity {
        slots: 1,
        delay: Duration::from_millis(200),
        ..Capacity::default()
    });
    let server = Server::start(slots.handler());
    let url = server.url();
    let pipelines: Vec<_> = (0..4)
        .map(|_| pipeline(LIVE, &url, "interval=20000000 max-requests=1"))
        .collect();
    for pipeline in &pipelines {
        pipeline.play();
    }
    for pipeline in &pipelines {
        pipeline.log.wait(|heard| heard.captions.len() == 5);
        // The wait for three others, 600 ms, is not the picture's.
        let queue = stat(&pipeline.narrator, "queue-p50");
        assert!(queue < 300_000_000, "{queue}");
    }
    assert_eq!(slots.counters().in_flight_max, 1);
}

#[test]
fn an_answer_later_than_the_deadline_is_not_awaited() {
    let server = Server::start(|exchange, client| {
        if !exchange.is_chat() {
            return models(client);
        }
        client.stream_head()?;
        client.delta("One word, then")?;
        assert!(client.closed_within(Duration::from_secs(30)).is_some());
        Ok(())
    });
    let pipeline = pipeline(LIVE, &server.url(), "interval=20000000 deadline=300000000");
    pipeline.play();
    wait_for(|| stat(&pipeline.narrator, "unanswered") >= 3);
    let heard = pipeline.log.heard();
    let [warning] = &heard.warnings[..] else {
        panic!("{heard:#?}");
    };
    assert!(warning.contains("0.3 s (deadline)"), "{warning}");
    assert!(heard.errors.is_empty() && heard.captions.is_empty());
    assert_eq!(stat(&pipeline.narrator, "errors"), 0);
}

/// A server that is away as long as the switch says.
fn switched(is_away: &Arc<AtomicBool>) -> Server {
    let is_away = is_away.clone();
    Server::start(move |exchange, client: &mut Connection| {
        match (is_away.load(SeqCst), exchange.is_chat()) {
            (true, _) => client.text(502, "text/html", "<h1>Bad Gateway</h1>"),
            (false, true) => answers("It is back.")(exchange, client),
            (false, false) => models(client),
        }
    })
}

#[test]
fn live_an_outage_is_one_warning_and_one_message() {
    let is_away = Arc::new(AtomicBool::new(false));
    let server = switched(&is_away);
    let pipeline = pipeline(LIVE, &server.url(), "interval=20000000");
    let passed = spy(&pipeline.narrator.static_pad("src").unwrap());
    pipeline.play();
    pipeline.log.wait(|heard| heard.captions.len() > 2);
    is_away.store(true, SeqCst);
    wait_for(|| stat(&pipeline.narrator, "unanswered") > 5);
    let before = passed.lock().unwrap().len();
    wait_for(|| passed.lock().unwrap().len() > before + 20);
    is_away.store(false, SeqCst);
    let heard = pipeline.log.wait(|heard| !heard.infos.is_empty());
    let [warning] = &heard.warnings[..] else {
        panic!("{heard:#?}");
    };
    assert!(
        warning.contains(&server.url()) && warning.contains("502: Bad Gateway"),
        "{warning}"
    );
    assert!(
        heard.infos[0].contains("answers again"),
        "{:?}",
        heard.infos
    );
    assert!(heard.errors.is_empty());
    // Every frame is accounted for.
    pipeline
        .narrator
        .set_property("drain-timeout", 10_000_000_000u64);
    pipeline.pipeline.send_event(gst::event::Eos::new());
    pipeline.log.wait(|heard| heard.eos);
    let count = |name| stat(&pipeline.narrator, name);
    let ends = ["captions", "dropped", "unanswered", "errors"].map(count);
    assert_eq!(count("sampled"), ends.iter().sum::<u64>(), "{ends:?}");
    assert_eq!(count("errors"), 0);
}

#[test]
fn a_request_during_an_outage_is_answered_by_a_warning() {
    let is_away = Arc::new(AtomicBool::new(false));
    let server = switched(&is_away);
    let pipeline = pipeline(LIVE, &server.url(), "");
    pipeline.play();
    pipeline.log.wait(|heard| heard.captions.len() == 1);
    is_away.store(true, SeqCst);
    pipeline.narrator.describe_now(None, None).unwrap();
    let heard = pipeline.log.wait(|heard| heard.warnings.len() == 2);
    assert!(
        heard
            .warnings
            .iter()
            .any(|text| text.contains("was not described")),
        "{heard:#?}"
    );
}

#[test]
fn recorded_frames_wait_for_a_server_that_comes_back() {
    let is_away = Arc::new(AtomicBool::new(true));
    let server = switched(&is_away);
    let pipeline = pipeline(RECORDED, &server.url(), "model=scripted");
    pipeline.play();
    let heard = pipeline.log.wait(|heard| !heard.warnings.is_empty());
    assert!(heard.captions.is_empty());
    is_away.store(false, SeqCst);
    let heard = pipeline.log.wait(|heard| heard.eos);
    assert_eq!(heard.texts(), ["It is back."; 3]);
    assert_eq!(
        (heard.warnings.len(), heard.infos.len()),
        (0, 1),
        "{heard:#?}"
    );
}

#[test]
fn recorded_frames_wait_no_longer_than_the_timeout() {
    let nowhere = Server::refusing();
    let start = Instant::now();
    let heard = pipeline(
        RECORDED,
        &nowhere.url(),
        "model=m endpoint-timeout=1500000000",
    )
    .run();
    assert!(start.elapsed() >= Duration::from_millis(1500));
    let error = error(&heard);
    for words in [
        "nothing listens there",
        "endpoint-timeout",
        "fallback-model",
    ] {
        assert!(error.contains(words), "{error}");
    }
    assert_eq!(heard.warnings.len(), 1, "{heard:#?}");
    assert!(heard.captions.is_empty());
}

#[cfg(feature = "smolvlm")]
#[test]
fn a_fallback_describes_while_the_endpoint_is_away() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo");
    let is_away = Arc::new(AtomicBool::new(true));
    let server = switched(&is_away);
    let source =
        "videotestsrc is-live=true pattern=red ! video/x-raw,width=320,height=180,framerate=50/1";
    let properties = format!("model=scripted interval=20000000 fallback-model={model}");
    let pipeline = pipeline(source, &server.url(), &properties);
    pipeline.play();
    let heard = pipeline.log.wait(|heard| heard.captions.len() >= 3);
    for caption in &heard.captions {
        assert_eq!(caption.text, "A solid red screen.");
        assert_eq!(
            (caption.device.as_str(), caption.model.as_str()),
            ("cpu", "demo")
        );
    }
    assert_eq!(heard.warnings.len(), 1, "{heard:#?}");
    is_away.store(false, SeqCst);
    let is_remote = |heard: &Heard| heard.captions.last().is_some_and(|c| c.device == "remote");
    let heard = pipeline.log.wait(is_remote);
    assert_eq!(heard.captions.last().unwrap().text, "It is back.");
    assert_eq!(heard.infos.len(), 1);
    assert_eq!(stat(&pipeline.narrator, "unanswered"), 0);
}

#[test]
fn a_seek_closes_the_connection() {
    let closed = Arc::new(AtomicUsize::new(0));
    let counted = closed.clone();
    let server = Server::start(move |exchange, client| {
        if !exchange.is_chat() {
            return models(client);
        }
        if client.closed_within(TIMEOUT.into()).is_some() {
            counted.fetch_add(1, SeqCst);
        }
        Ok(())
    });
    let pipeline = pipeline(
        "videotestsrc ! video/x-raw,width=64,height=48,framerate=1/1",
        &server.url(),
        "",
    );
    pipeline.play();
    server.wait_for(2, TIMEOUT.into());
    for count in 1..4 {
        let flags = gst::SeekFlags::FLUSH;
        let start = Instant::now();
        pipeline
            .pipeline
            .seek_simple(flags, gst::ClockTime::ZERO)
            .unwrap();
        wait_for(|| closed.load(SeqCst) == count);
        assert!(
            start.elapsed() < Duration::from_secs(2),
            "{:?}",
            start.elapsed()
        );
        server.wait_for(2 + count as u64, TIMEOUT.into());
    }
    let start = Instant::now();
    pipeline.pipeline.set_state(gst::State::Null).unwrap();
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
    wait_for(|| closed.load(SeqCst) == 4);
}
