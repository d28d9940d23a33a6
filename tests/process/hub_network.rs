//! Servers, proxies and connections that fail, redirect, stall or are cancelled in the middle of a download.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    common::{
        Pipeline,
        engine::wait_for,
        hub::{COMMIT, Hub, ID},
        programs::Plugin,
    },
    hub::{
        LINE, fails, folder, hub, is_failed, launch, lock, narrates, part, pipeline, ranges,
        repository, set,
    },
};
use gst::{ProgressType, ResourceError, prelude::*};
use tempfile::TempDir;

/// A hub whose weights are on another server, and a model that only the token may read.
fn gated_elsewhere() -> (Hub, Hub, TempDir) {
    let (hub, home) = hub();
    let cdn = Hub::start(repository());
    hub.plan().elsewhere = Some(cdn.endpoint());
    hub.plan().gated = true;
    set("HF_TOKEN", "hf_secret");
    (hub, cdn, home)
}

#[test]
fn the_token_is_for_the_endpoint_alone_wherever_that_redirects() {
    let (hub, cdn, home) = gated_elsewhere();
    let token = Some("Bearer hf_secret".to_owned());
    narrates();
    // Paths of its own it redirects to as well.
    let requests = hub.requests();
    assert!(requests.iter().any(|a| a.path.contains("resolve-cache")));
    assert!(requests.iter().all(|a| a.token == token), "{requests:?}");
    let requests = cdn.requests();
    assert!(!requests.is_empty());
    assert!(requests.iter().all(|a| a.token.is_none()), "{requests:?}");

    // A way back is to the endpoint again.
    cdn.plan().back = Some(hub.endpoint());
    fs::remove_dir_all(folder(&home)).unwrap();
    narrates();
    let requests = hub.requests();
    assert!(requests.iter().any(|a| a.path.starts_with("/back/")));
    assert!(requests.iter().all(|a| a.token == token), "{requests:?}");
    assert!(cdn.requests().iter().all(|a| a.token.is_none()));

    // So it is for what is said of a repository.
    hub.plan().moved = Some(format!("{}/api/models/{ID}/revision/main", cdn.endpoint()));
    fs::remove_dir_all(folder(&home)).unwrap();
    narrates();
    let requests = cdn.requests();
    assert!(requests[0].path.contains("/api/"));
    assert!(requests.iter().all(|a| a.token.is_none()), "{requests:?}");
}

#[test]
fn redirects_that_lead_nowhere_are_an_error() {
    let (hub, _home) = hub();
    for (to, says) in [
        (format!("/api/models/{ID}/revision/main"), "too often"),
        ("file:///etc/passwd".into(), "invalid URL"),
        ("http://[".into(), "invalid URL"),
    ] {
        hub.plan().moved = Some(to);
        fails(ID, ResourceError::OpenRead, &[ID, "redirects", says]);
    }
}

/// A proxy that notes what it can read.
fn proxy() -> (String, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let read = Arc::new(Mutex::new(Vec::new()));
    let noted = read.clone();
    thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, noted) = (client.unwrap(), noted.clone());
            thread::spawn(move || -> std::io::Result<()> {
                let mut lines = BufReader::new(client.try_clone()?).lines();
                let connect = lines.next().unwrap()?;
                let to = connect.split(' ').nth(1).unwrap().to_owned();
                while lines.next().is_some_and(|line| !line.unwrap().is_empty()) {}
                let mut server = TcpStream::connect(to)?;
                client.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
                let (mut answers, mut back) = (server.try_clone()?, client.try_clone()?);
                thread::spawn(move || std::io::copy(&mut answers, &mut back));
                let mut chunk = [0; 4096];
                loop {
                    let count = client.read(&mut chunk)?;
                    noted.lock().unwrap().extend(&chunk[..count]);
                    server.write_all(&chunk[..count])?;
                    if count == 0 {
                        return server.shutdown(std::net::Shutdown::Write);
                    }
                }
            });
        }
    });
    (address, read)
}

#[test]
fn a_proxy_does_not_get_to_see_the_token() {
    let (hub, _cdn, _home) = gated_elsewhere();
    let (address, read) = proxy();
    set("HTTP_PROXY", &address);
    hub.plan().refuse = Some((401, "GatedRepo"));
    let words = [ID, "401", "the token was not sent", "NO_PROXY"];
    fails(ID, ResourceError::NotAuthorized, &words);
    let seen = String::from_utf8(read.lock().unwrap().clone()).unwrap();
    assert!(
        seen.contains("/api/models/") && !seen.contains("hf_secret"),
        "{seen}"
    );
    assert!(hub.requests().iter().all(|a| a.token.is_none()));
    read.lock().unwrap().clear();
    hub.plan().refuse = None;
    set("NO_PROXY", "127.0.0.1");
    narrates();
    assert!(hub.requests()[0].token.is_some());
    assert!(read.lock().unwrap().is_empty());
}

#[test]
fn the_token_is_in_no_message() {
    let (hub, cdn, _home) = gated_elsewhere();
    let plugin = Plugin::new();
    let with_password = hub.endpoint().replace("http://", "http://me:hf_password@");
    set("HF_ENDPOINT", with_password);
    set(
        "GST_DEBUG",
        "vlmnarrate*:9,GST_ELEMENT*:6,GST_BUS:6,GST_MESSAGE:6",
    );
    for fault in 0..5 {
        hub.plan().refuse = [None, Some((401, "GatedRepo")), Some((503, ""))][fault % 3];
        hub.plan().refuse_files = (fault == 3).then_some(403);
        cdn.plan().cut = (fault == 0).then_some(0);
        if fault == 4 {
            set("HF_TOKEN", "hf_secret\u{1}");
        }
        let said = launch(&plugin, 1_000_000);
        assert_ne!(said.status, Some(0), "{said:?}");
        assert!(said.err.contains(&format!("model={ID}")), "{said:?}");
        for secret in ["hf_secret", "hf_password"] {
            assert!(!said.err.contains(secret), "{}", said.err);
            assert!(!said.out.contains(secret), "{}", said.out);
        }
    }
}

#[test]
fn what_the_list_of_files_does_not_say_the_files_do() {
    let (hub, home) = hub();
    hub.plan().no_sums = true;
    narrates();
    assert!(part(&home).with_extension("").exists());
    assert_eq!(narrates().downloads, []);
}

#[test]
fn a_server_names_no_file_outside_of_the_cache() {
    let (hub, home) = hub();
    for sum in ["../../../x", "", "/x", "a/b"] {
        hub.plan().sum = Some(sum.into());
        let words = [&*format!("model={ID}"), "config.json", sum];
        fails(ID, ResourceError::OpenRead, &words);
        let blobs = fs::read_dir(folder(&home).join("blobs"));
        assert_eq!(blobs.map_or(0, |blobs| blobs.count()), 0);
    }
}

#[test]
fn a_part_that_is_of_something_else_is_no_obstacle() {
    let (hub, home) = hub();
    fs::create_dir_all(folder(&home).join("blobs")).unwrap();
    fs::write(part(&home), vec![7; 1000]).unwrap();
    narrates();
    assert_eq!(ranges(&hub), ["bytes=1000-", "bytes=0-"]);
}

#[test]
fn no_server_or_one_that_fails_or_is_none() {
    let (hub, _home) = hub();
    hub.plan().refuse = Some((503, ""));
    fails(ID, ResourceError::OpenRead, &[ID, "503", "later"]);
    hub.plan().refuse = Some((200, ""));
    fails(
        ID,
        ResourceError::OpenRead,
        &["its answer is not that of a Hugging Face hub"],
    );
    let closed = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let endpoint = format!("http://{}", closed.local_addr().unwrap());
    drop(closed);
    set("HF_ENDPOINT", &endpoint);
    let words = [&*format!("model={ID}"), &endpoint, "refused", "network"];
    fails(ID, ResourceError::OpenRead, &words);
}

#[test]
fn a_connection_that_breaks_is_taken_up_again() {
    let (hub, _home) = hub();
    hub.plan().cut = Some(500_000);
    narrates();
    let [first, second] = &ranges(&hub)[..] else {
        panic!();
    };
    assert_eq!((&**first, &**second), ("bytes=0-", "bytes=500000-"));
}

#[test]
fn the_next_start_goes_on_where_the_last_ended() {
    let (hub, home) = hub();
    hub.plan().cut = Some(300_000);
    let waiting = pipeline(LINE, ID);
    waiting.play();
    wait_for(|| fs::metadata(part(&home)).is_ok_and(|part| part.len() == 300_000));
    hub.plan().refuse_files = Some(500);
    let heard = waiting.log.wait(|heard| !heard.errors.is_empty());
    is_failed(
        &heard,
        ResourceError::OpenRead,
        &["model.safetensors", "500", "kept"],
    );
    drop(waiting);
    hub.plan().refuse_files = None;
    hub.requests();
    narrates();
    assert_eq!(ranges(&hub), ["bytes=300000-"]);
}

#[test]
fn a_part_that_is_whole_or_too_long_is_no_obstacle() {
    let (hub, home) = hub();
    let weights = &repository()["model.safetensors"];
    fs::create_dir_all(folder(&home).join("blobs")).unwrap();
    fs::write(part(&home), weights).unwrap();
    narrates();
    assert_eq!(ranges(&hub), [format!("bytes={}-", weights.len() - 1)]);
    fs::remove_dir_all(folder(&home)).unwrap();
    fs::create_dir_all(folder(&home).join("blobs")).unwrap();
    fs::write(part(&home), [&weights[..], b"more"].concat()).unwrap();
    narrates();
    assert_eq!(ranges(&hub), ["bytes=0-"]);
}

#[test]
fn what_does_not_come_whole_is_deleted() {
    let (hub, home) = hub();
    let weights = folder(&home)
        .join("snapshots")
        .join(COMMIT)
        .join("model.safetensors");
    for (tamper, lie, says) in [(true, false, "SHA-256"), (false, true, "bytes, not")] {
        (hub.plan().tamper, hub.plan().lie) = (tamper, lie);
        let words = [
            &*format!("model={ID}"),
            "model.safetensors",
            says,
            "start again",
        ];
        fails(ID, ResourceError::OpenRead, &words);
        assert!(fs::symlink_metadata(&weights).is_err());
        assert!(!part(&home).with_extension("").exists());
    }
    (hub.plan().tamper, hub.plan().lie) = (false, false);
    hub.requests();
    narrates();
    assert_eq!(ranges(&hub), ["bytes=0-"]);
}

#[test]
fn offline_is_offline() {
    let (hub, home) = hub();
    set("HF_HUB_OFFLINE", "1");
    let pipeline = pipeline(LINE, ID);
    // Known at once.
    assert!(pipeline.pipeline.set_state(gst::State::Playing).is_err());
    let home = home.path().to_str().unwrap();
    let words = [&*format!("model={ID}"), "HF_HUB_OFFLINE", home, "main"];
    let heard = pipeline.log.heard();
    is_failed(&heard, ResourceError::NotFound, &words);
    assert_eq!(heard.downloads, []);
    assert_eq!(hub.requests(), []);
}

#[test]
fn null_cancels_a_download_at_once_and_the_next_goes_on() {
    let (hub, home) = hub();
    hub.plan().trickle = Duration::from_millis(20);
    let pipeline = pipeline(LINE, ID);
    pipeline.play();
    wait_for(|| fs::metadata(part(&home)).is_ok_and(|part| part.len() > 20_000));
    let start = Instant::now();
    pipeline.pipeline.set_state(gst::State::Null).unwrap();
    assert!(start.elapsed() < Duration::from_secs(1));
    // Now, not when the thread has found out.
    assert!(pipeline.log.heard().downloads.is_empty(), "the bus flushes");
    hub.plan().trickle = Duration::ZERO;
    narrates();
    let ranges = ranges(&hub);
    assert_eq!(ranges.len(), 2, "{ranges:?}");
    assert_ne!(ranges[1], "bytes=0-");
}

#[test]
fn a_cancelled_download_says_so() {
    let (hub, home) = hub();
    hub.plan().stall = Some(1000);
    crate::common::init();
    let element = gst::ElementFactory::make("vlmnarrate").build().unwrap();
    element.set_property("model", ID);
    let log = crate::common::Log::of(&element);
    element.set_state(gst::State::Ready).unwrap();
    wait_for(|| fs::metadata(part(&home)).is_ok_and(|part| part.len() == 1000));
    let start = Instant::now();
    element.set_state(gst::State::Null).unwrap();
    assert!(start.elapsed() < Duration::from_secs(1));
    let heard = log.heard();
    assert_eq!(heard.errors.len(), 0);
    let last = heard.downloads.last().unwrap();
    assert_eq!(last.0, ProgressType::Canceled);
    assert_eq!(heard.progress, []);
    // The thread that is stuck is in nobody's way.
    hub.plan().stall = None;
    let start = Instant::now();
    narrates();
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
}

/// Whether a download has yet to end.
fn is_downloading() -> bool {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let mut names =
        tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.any(|name| name.starts_with("vlmnarrate-hub"))
}

/// Goes to READY and, once a download is where `is_there` says, back.
#[track_caller]
fn cancels(is_there: impl Fn() -> bool) {
    crate::common::init();
    let element = gst::ElementFactory::make("vlmnarrate").build().unwrap();
    element.set_property("model", ID);
    let log = crate::common::Log::of(&element);
    element.set_state(gst::State::Ready).unwrap();
    wait_for(is_there);
    element.set_state(gst::State::Null).unwrap();
    let heard = log.heard();
    assert_eq!(heard.errors.len(), 0, "{heard:#?}");
    assert_eq!(heard.downloads.last().unwrap().0, ProgressType::Canceled);
}

#[test]
fn a_cancelled_download_leaves_no_thread_behind() {
    let (hub, _home) = hub();
    // Silence would end it too, but not as soon as this test would give up.
    set("HF_HUB_DOWNLOAD_TIMEOUT", "1000");
    for mute in ["/api/models/", "/resolve/", "/cdn/"] {
        hub.plan().mute = Some(mute);
        hub.requests();
        let is_asked = |a: &crate::common::hub::HttpRequest| a.path.contains(mute);
        cancels(|| hub.requests().iter().any(is_asked));
        wait_for(|| !is_downloading());
    }
    // Before anything is asked, in the middle of TLS' greetings.
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    set(
        "HF_ENDPOINT",
        format!("https://{}", listener.local_addr().unwrap()),
    );
    let silent = Mutex::new(None);
    let greeted = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_exact(&mut [0; 5]).unwrap();
            *silent.lock().unwrap() = Some(stream);
            greeted.store(true, SeqCst);
        });
        cancels(|| greeted.load(SeqCst));
    });
    wait_for(|| !is_downloading());
}

/// A connection that is neither made nor refused can't be interrupted: nobody waits for it.
#[test]
fn null_does_not_wait_for_a_connection() {
    let (_hub, home) = hub();
    set("HF_HUB_DOWNLOAD_TIMEOUT", "1000");
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    // Until no more are let in.
    let connect = || TcpStream::connect_timeout(&address, Duration::from_millis(200));
    let _connections: Vec<_> = std::iter::from_fn(|| connect().ok()).collect();
    set("HF_ENDPOINT", format!("http://{address}"));
    cancels(is_downloading);
    assert!(is_downloading());
    assert!(!folder(&home).exists());
}

#[test]
fn a_server_that_falls_silent_is_given_up() {
    let (hub, _home) = hub();
    set("HF_HUB_DOWNLOAD_TIMEOUT", "1");
    hub.plan().stall = Some(1000);
    let words = [&*format!("model={ID}"), "no data for 1 s", "kept"];
    fails(ID, ResourceError::OpenRead, &words);
}

#[test]
fn so_is_another_program_that_does_not_get_on() {
    let (_hub, home) = hub();
    set("HF_HUB_DOWNLOAD_TIMEOUT", "1");
    fs::create_dir_all(lock(&home).parent().unwrap()).unwrap();
    let lock = fs::File::create(lock(&home)).unwrap();
    lock.lock().unwrap();
    fails(ID, ResourceError::OpenRead, &["no data for 1 s"]);
    drop(lock);
    narrates();
}

#[test]
fn two_that_want_the_same_bring_it_once() {
    let (hub, _home) = hub();
    hub.plan().trickle = Duration::from_millis(1);
    let both = [pipeline(LINE, ID), pipeline(LINE, ID)];
    both.iter().for_each(Pipeline::play);
    for pipeline in &both {
        let heard = pipeline
            .log
            .wait(|heard| heard.eos || !heard.errors.is_empty());
        assert_eq!(heard.captions.len(), 2, "{heard:#?}");
    }
    assert_eq!(ranges(&hub), ["bytes=0-"]);
}
