//! Keys and proxies from the environment, each in a process of its own.

use std::{
    env,
    io::{self, BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    process::Command,
    thread,
};

use vlmnarrate_scripted_server::{Server, answers};

use crate::common::*;

/// Variables that would change what is tested.
const VARIABLES: [&str; 8] = [
    "VLMNARRATE_API_KEY",
    "OPENAI_API_KEY",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "http_proxy",
    "https_proxy",
    "all_proxy",
];

/// Asks the endpoint `URL` once in a process with these variables. Returns what it printed.
fn ask_in_process(url: &str, variables: &[(&str, &str)]) -> String {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "environment::asks", "--ignored", "--nocapture"]);
    for name in VARIABLES {
        command.env_remove(name);
    }
    command.env("URL", url).envs(variables.iter().copied());
    let output = command.output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
#[ignore = "run by the others, with an environment"]
fn asks() {
    let Ok(url) = env::var("URL") else { return };
    match load(endpoint(url), Some("scripted")) {
        Ok(mut engine) => println!(
            "answer: {:?}",
            ask(engine.as_mut()).map(|answer| answer.text)
        ),
        Err(error) => println!("error: {error}"),
    }
}

#[test]
fn the_key_is_the_first_one_that_is_set() {
    let server = Server::start(answers("Red."));
    for (variables, key) in [
        (&[][..], None),
        (&[("OPENAI_API_KEY", "sk-2")], Some("Bearer sk-2")),
        (
            &[("VLMNARRATE_API_KEY", "sk-1"), ("OPENAI_API_KEY", "sk-2")],
            Some("Bearer sk-1"),
        ),
        (
            &[("VLMNARRATE_API_KEY", ""), ("OPENAI_API_KEY", "sk-2")],
            Some("Bearer sk-2"),
        ),
    ] {
        let said = ask_in_process(&server.url(), variables);
        assert!(said.contains("answer: Ok(\"Red.\")"), "{said}");
        assert_eq!(
            server.exchanges().last().unwrap().header("authorization"),
            key
        );
    }
    let said = ask_in_process(&server.url(), &[("VLMNARRATE_API_KEY", "two words")]);
    assert!(
        said.contains("error: the environment variable VLMNARRATE_API_KEY"),
        "{said}"
    );
    assert!(!said.contains("two words"), "{said}");
}

/// A proxy that takes `CONNECT` to any host and connects with this address. Returns its own.
fn proxy(to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for client in listener.incoming() {
            let Ok(client) = client else { return };
            thread::spawn(move || tunnel(client, to));
        }
    });
    address
}

fn tunnel(client: TcpStream, to: SocketAddr) -> io::Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    assert!(first.starts_with("CONNECT engine.example:80"), "{first}");
    let mut line = String::from("head");
    while !line.trim().is_empty() {
        line.clear();
        reader.read_line(&mut line)?;
    }
    let mut client = client;
    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
    let server = TcpStream::connect(to)?;
    let mut to_server = server.try_clone()?;
    thread::spawn(move || io::copy(&mut reader, &mut to_server));
    let mut from_server = server;
    io::copy(&mut from_server, &mut client).map(|_| ())
}

#[test]
fn a_proxy_is_used_except_for_this_machine() {
    let server = Server::start(answers("Through."));
    let proxy = format!("http://{}", proxy(server.address()));
    let said = ask_in_process("http://engine.example/v1", &[("HTTP_PROXY", &proxy)]);
    assert!(said.contains("answer: Ok(\"Through.\")"), "{said}");
    // Nothing is at the proxy's address.
    let nowhere = Server::refusing();
    let wrong = format!("http://{}", nowhere.address());
    let said = ask_in_process(&server.url(), &[("ALL_PROXY", &wrong)]);
    assert!(said.contains("answer: Ok(\"Through.\")"), "{said}");
    let said = ask_in_process("http://engine.example/v1", &[("ALL_PROXY", &wrong)]);
    assert!(!said.contains("Through"), "{said}");
}
