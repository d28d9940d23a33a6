//! A local server with the hub's protocol and configurable faults.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::Duration,
};

use sha2::{Digest, Sha256};

pub const ID: &str = "owner/Some-SmolVLM";
/// Another name for the same.
pub const GGUF_ID: &str = "owner/Some-SmolVLM-GGUF";
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server has, and what is wrong with it.
#[derive(Default)]
pub struct Plan {
    pub files: BTreeMap<String, Vec<u8>>,
    /// Answers questions about the repository with a status and an `X-Error-Code`.
    pub refuse: Option<(u16, &'static str)>,
    /// Not for everyone.
    pub gated: bool,
    /// Answers requests for files with it.
    pub refuse_files: Option<u16>,
    /// The next transfer of weights ends after so many bytes.
    pub cut: Option<usize>,
    /// Nothing but the first so many bytes of weights come, and the connection stays.
    pub stall: Option<usize>,
    /// Time between two kB of weights.
    pub trickle: Duration,
    /// Weights come with another last byte.
    pub tamper: bool,
    /// Says of weights that they are longer than they are.
    pub lie: bool,
    /// Address of another server that has the weights.
    pub elsewhere: Option<String>,
    /// Sends those who want weights from here back to this server.
    pub back: Option<String>,
    /// Sends those who want to know of the repository to this address.
    pub moved: Option<String>,
    /// Its list says of no file what is in it, or this.
    pub no_sums: bool,
    pub sum: Option<String>,
    /// Says nothing at all on paths that contain it.
    pub mute: Option<&'static str>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct HttpRequest {
    pub path: String,
    pub range: Option<String>,
    pub token: Option<String>,
}

#[derive(Clone)]
pub struct Hub {
    address: SocketAddr,
    plan: Arc<Mutex<Plan>>,
    requests: Arc<Mutex<Vec<HttpRequest>>>,
}

/// Large files are kept elsewhere, under their sum.
fn is_large(name: &str) -> bool {
    [".safetensors", ".gguf", ".bin"]
        .iter()
        .any(|end| name.ends_with(end))
}

pub fn sum(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

/// Git's name for it, or one as good.
pub fn etag(name: &str, bytes: &[u8]) -> String {
    let mut sum = sum(bytes);
    if !is_large(name) {
        sum.truncate(40);
    }
    sum
}

impl Hub {
    pub fn start(files: BTreeMap<String, Vec<u8>>) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let hub = Self {
            address: listener.local_addr().unwrap(),
            plan: Arc::new(Mutex::new(Plan {
                files,
                ..Plan::default()
            })),
            requests: Arc::default(),
        };
        let server = hub.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let server = server.clone();
                // What breaks is the client's doing.
                thread::spawn(move || server.serve(stream.unwrap()).ok());
            }
        });
        hub
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap()
    }

    /// Everything that it was asked since the last time.
    pub fn requests(&self) -> Vec<HttpRequest> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }

    fn serve(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
        let mut request = HttpRequest {
            path: first.split(' ').nth(1).unwrap_or_default().into(),
            range: None,
            token: None,
        };
        for line in lines {
            let line = line?;
            let Some((name, value)) = line.split_once(": ") else {
                break;
            };
            match name.to_ascii_lowercase().as_str() {
                "range" => request.range = Some(value.into()),
                "authorization" => request.token = Some(value.into()),
                _ => (),
            }
        }
        self.requests.lock().unwrap().push(request.clone());
        let path = request.path.as_str();
        if self.plan().mute.is_some_and(|mute| path.contains(mute)) {
            thread::sleep(Duration::from_secs(600));
        }
        let id = match path.contains(GGUF_ID) {
            true => GGUF_ID,
            false => ID,
        };
        let resolve = format!("/{id}/resolve/");
        if let Some(rest) = path.strip_prefix(&format!("/api/models/{id}/revision/")) {
            let revision = rest.trim_end_matches("?blobs=true");
            self.info(&mut stream, revision)
        } else if let Some((revision, name)) = path
            .strip_prefix(&resolve)
            .and_then(|rest| rest.split_once('/'))
        {
            self.resolve(&mut stream, revision, name)
        } else if let Some(name) = path.strip_prefix("/api/resolve-cache/") {
            self.send(&mut stream, name, &request, true)
        } else if let Some((name, back)) = path
            .strip_prefix("/cdn/")
            .and_then(|name| Some((name, self.plan().back.clone()?)))
        {
            let location = format!("Location: {back}/back/{name}\r\n");
            answer(&mut stream, "302 Found", &location, b"")
        } else if let Some(name) = path
            .strip_prefix("/cdn/")
            .or_else(|| path.strip_prefix("/back/"))
        {
            self.send(&mut stream, name, &request, false)
        } else {
            answer(
                &mut stream,
                "404 Not Found",
                "X-Error-Code: RepoNotFound\r\n",
                b"",
            )
        }
    }

    fn info(&self, stream: &mut TcpStream, revision: &str) -> std::io::Result<()> {
        let plan = self.plan();
        if let Some((status, code)) = plan.refuse {
            let header = format!("X-Error-Code: {code}\r\n");
            return answer(stream, &format!("{status} No"), &header, b"");
        }
        if let Some(moved) = &plan.moved {
            let location = format!("Location: {moved}\r\n");
            return answer(stream, "307 Temporary Redirect", &location, b"");
        }
        if !["main", "v1", "some%2Fbranch", COMMIT].contains(&revision) {
            let header = "X-Error-Code: RevisionNotFound\r\n";
            return answer(stream, "404 Not Found", header, b"");
        }
        let siblings = plan.files.iter().map(|(name, bytes)| {
            let size = bytes.len() + usize::from(plan.lie && is_large(name));
            let etag = etag(name, bytes);
            let mut file = serde_json::json!({"rfilename": name, "size": size, "blobId": etag});
            if is_large(name) {
                file["lfs"] = serde_json::json!({"sha256": etag, "size": size, "pointerSize": 134});
                file["blobId"] = etag[..40].into();
            }
            if plan.no_sums {
                file = serde_json::json!({"rfilename": name});
            }
            if let Some(sum) = &plan.sum {
                file["blobId"] = sum.as_str().into();
            }
            file
        });
        let siblings: Vec<_> = siblings.collect();
        let gated = match plan.gated {
            true => "auto".into(),
            false => serde_json::Value::from(false),
        };
        let info = serde_json::json!({
            "id": ID, "sha": COMMIT, "private": false, "gated": gated, "siblings": siblings
        });
        answer(stream, "200 OK", "", info.to_string().as_bytes())
    }

    /// The hub itself sends no file: small ones come from another path, large ones from another place.
    fn resolve(&self, stream: &mut TcpStream, revision: &str, name: &str) -> std::io::Result<()> {
        let plan = self.plan();
        if let Some(status) = plan.refuse_files {
            return answer(stream, &format!("{status} No"), "", b"");
        }
        let Some(bytes) = plan.files.get(name).filter(|_| revision == COMMIT) else {
            return answer(
                stream,
                "404 Not Found",
                "X-Error-Code: EntryNotFound\r\n",
                b"",
            );
        };
        if !is_large(name) {
            let location = format!(
                "Location: /api/resolve-cache/{name}\r\nX-Linked-Etag: W/\"{}\"\r\n",
                etag(name, bytes)
            );
            return answer(stream, "307 Temporary Redirect", &location, b"");
        }
        let headers = format!(
            "Location: {}/cdn/{name}\r\nX-Repo-Commit: {COMMIT}\r\nX-Linked-Size: {}\r\n\
             X-Linked-Etag: \"{}\"\r\nETag: \"of-the-redirect\"\r\n",
            plan.elsewhere.clone().unwrap_or_else(|| self.endpoint()),
            bytes.len(),
            etag(name, bytes)
        );
        answer(stream, "302 Found", &headers, b"")
    }

    fn send(
        &self,
        stream: &mut TcpStream,
        name: &str,
        request: &HttpRequest,
        small: bool,
    ) -> std::io::Result<()> {
        let mut plan = self.plan();
        let mut bytes = plan.files[name].clone();
        let etag = etag(name, &bytes);
        if plan.tamper && !small {
            *bytes.last_mut().unwrap() ^= 1;
        }
        let range = request
            .range
            .as_deref()
            .expect("files are asked for by range");
        let (from, to) = range.trim_start_matches("bytes=").split_once('-').unwrap();
        let from: usize = from.parse().unwrap();
        let whole = bytes.len();
        if from >= whole {
            drop(plan);
            return answer(stream, "416 Range Not Satisfiable", "", b"");
        }
        let probe = to == "0";
        let to = to.parse().map_or(whole, |to: usize| to + 1);
        let body = &bytes[from..to];
        let mut headers = format!(
            "Content-Range: bytes {from}-{}/{whole}\r\nETag: \"{etag}\"\r\n",
            to - 1
        );
        if small {
            headers += &format!("X-Repo-Commit: {COMMIT}\r\n");
        }
        if small || probe {
            drop(plan);
            return answer(stream, "206 Partial Content", &headers, body);
        }
        let (cut, stall, trickle) = (plan.cut.take(), plan.stall, plan.trickle);
        drop(plan);
        let head = format!(
            "HTTP/1.1 206 Partial Content\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        let sent = cut.or(stall).unwrap_or(body.len()).min(body.len());
        for chunk in body[..sent].chunks(1000) {
            stream.write_all(chunk)?;
            thread::sleep(trickle);
        }
        if stall.is_some() {
            thread::sleep(Duration::from_secs(60));
        }
        Ok(())
    }
}

fn answer(stream: &mut TcpStream, status: &str, headers: &str, body: &[u8]) -> std::io::Result<()> {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)
}
