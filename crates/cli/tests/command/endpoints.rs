//! A model behind an endpoint, from the command line.

use std::{
    io::Read,
    process::Stdio,
    time::{Duration, Instant},
};

use vlmnarrate_scripted_server::{Server, answers, models};

use crate::common::{Folder, Said, cues, send};

#[test]
fn a_file_is_narrated_by_a_server() {
    let folder = Folder::new();
    folder.red("in.mp4", 3);
    let server = Server::start(answers("A red wall."));
    let said = folder.run(["in.mp4", "--endpoint", &server.url()]);
    assert_eq!(said.status, Some(0), "{said:?}");
    assert_eq!(said.out.matches("A red wall.").count(), 3, "{said:?}");
    let cues = cues(&folder.path("in.narrated.mkv"));
    assert!(cues.contains("A red wall."), "{cues}");
}

#[test]
fn a_server_that_is_away_costs_no_file() {
    let folder = Folder::new();
    folder.red("in.mp4", 2);
    std::fs::write(folder.path("out.vtt"), "before").unwrap();
    let nowhere = Server::refusing();
    let url = nowhere.url();
    let arguments = [
        "in.mp4",
        "-o",
        "out.vtt",
        "--force",
        "--model",
        "m",
        "--endpoint",
        &url,
    ];
    let said = folder.run([&arguments[..], &["--endpoint-timeout", "1s"]].concat());
    said.fails_with(
        1,
        &[
            "nothing listens there",
            "endpoint-timeout",
            "fallback-model",
        ],
    );
    assert_eq!(said.err.matches("warning: ").count(), 1, "{said:?}");
    assert_eq!(
        std::fs::read_to_string(folder.path("out.vtt")).unwrap(),
        "before"
    );
    assert_eq!(folder.names(), ["in.mp4", "out.vtt"]);
}

#[test]
fn an_interrupt_does_not_wait_for_the_server() {
    let folder = Folder::new();
    folder.red("in.mp4", 30);
    let server = Server::start(|exchange, client| {
        if !exchange.is_chat() {
            return models(client);
        }
        client.closed_within(Duration::from_secs(60));
        Ok(())
    });
    let mut command = folder.vlmnarrate(["in.mp4", "-o", "out.vtt", "--endpoint", &server.url()]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    server.wait_for(2, Duration::from_secs(30));
    // The second one does not wait for the caption under way.
    send(&child, "INT");
    std::thread::sleep(Duration::from_millis(300));
    let asked = Instant::now();
    send(&child, "INT");
    let mut rest = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut rest)
        .unwrap();
    let said = Said::from(child.wait_with_output().unwrap());
    assert_eq!(said.status, Some(130), "{said:?}");
    assert!(
        asked.elapsed() < Duration::from_secs(10),
        "{:?}",
        asked.elapsed()
    );
    assert_eq!(folder.names(), ["in.mp4"]);
}
