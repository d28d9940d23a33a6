//! The thread that downloads: what a repository has, what of it is needed, and whether it came whole.

use std::{
    fs,
    io::{self, ErrorKind as Io, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};
use ureq::{
    Body,
    http::{Response, StatusCode, header::CONTENT_RANGE},
};

use crate::{
    error::{Error, Result},
    families::idefics3::config::Config,
    files::{
        gguf,
        hub::{
            Repository, SMALL, TICK,
            client::{Client, Failure},
            is_commit,
            listing::{File, Info, Lfs, escaped, is_etag, is_inside},
        },
        source::{
            CONFIG, PREPROCESSOR_CONFIG, PROCESSOR_CONFIG, Source, TOKENIZER, WEIGHTS,
            WEIGHTS_INDEX, shards,
        },
    },
    text::chat_template,
};
use vlmnarrate_engine::{ErrorKind, Transfer};

/// Shared by the thread that downloads and the one that waits for it.
#[derive(Default)]
pub(crate) struct State {
    /// Of files that are whole.
    whole: AtomicU64,
    /// Of the file under way.
    part: AtomicU64,
    total: AtomicU64,
    received: AtomicU64,
    /// Moves on whenever something happens.
    pub(crate) beats: AtomicU64,
    cancelled: AtomicBool,
    /// Of the file under way, locked.
    lock: Mutex<Option<fs::File>>,
}

impl State {
    pub(crate) fn transfer(&self) -> Transfer {
        Transfer {
            done: self.whole.load(Relaxed) + self.part.load(Relaxed),
            total: self.total.load(Relaxed),
            received: self.received.load(Relaxed),
        }
    }

    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Relaxed);
    }

    /// Lets others bring the file under way.
    pub(crate) fn unlock(&self) {
        self.lock.lock().unwrap().take();
    }

    /// A sign of life, and a look at whether to go on.
    fn beat(&self) -> Result<()> {
        self.beats.fetch_add(1, Relaxed);
        self.check()
    }

    fn check(&self) -> Result<()> {
        match self.cancelled.load(Relaxed) {
            true => Err(Error::Cancelled),
            false => Ok(()),
        }
    }

    fn pause(&self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.beat()?;
            thread::sleep(TICK.min(time));
        }
        Ok(())
    }
}

fn sum(files: &[&File]) -> u64 {
    files.iter().map(|file| file.size()).sum()
}

pub(crate) struct Download {
    pub(crate) repository: Repository,
    pub(crate) state: Arc<State>,
    pub(crate) client: Client,
}

/// The repository's files at one commit.
struct Found {
    info: Info,
    snapshot: PathBuf,
}

impl Found {
    fn file(&self, name: &str) -> Option<&File> {
        self.info.siblings.iter().find(|file| file.name == name)
    }
}

impl Download {
    pub(crate) fn run(&self) -> Result<Source> {
        // Whatever else a cancelled request fails of.
        self.bring_all()
            .map_err(|error| self.state.check().err().unwrap_or(error))
    }

    fn bring_all(&self) -> Result<Source> {
        let Repository { tag, revision, .. } = &self.repository;
        let info = self.info()?;
        let names: Vec<_> = info.siblings.iter().map(|file| file.name.clone()).collect();
        let has = |name: &str| names.iter().any(|file| file == name);
        let is_gguf =
            !has(WEIGHTS) && !has(WEIGHTS_INDEX) && names.iter().any(|n| gguf::is_gguf(n));
        let files = match tag.is_some() || is_gguf {
            true => Some(self.choose(&names)?),
            false => {
                self.check_files(&info)?;
                None
            }
        };

        // Every file of the one commit, should the branch move meanwhile.
        let folder = self.repository.folder();
        let commit = info.sha.clone();
        let snapshot = folder.join("snapshots").join(&commit);
        let found = Found { info, snapshot };
        let source = match files {
            Some(names) => self.bring_gguf(&found, names)?,
            None => self.bring_checkpoint(&found)?,
        };
        if *revision != commit {
            let note = folder.join("refs").join(revision);
            let noted = create_parent(&note).and_then(|()| fs::write(&note, &commit));
            noted.map_err(|e| self.not_written(&e))?;
        }
        Ok(source)
    }

    /// A checkpoint as transformers reads it.
    fn bring_checkpoint(&self, found: &Found) -> Result<Source> {
        let find = |name: &str| found.file(name);
        let small = SMALL
            .into_iter()
            .filter(|name| *name != WEIGHTS_INDEX || find(WEIGHTS).is_none())
            .filter_map(find);
        let templates = found.info.siblings.iter();
        let templates = templates.filter(|file| chat_template::is_additional(&file.name));
        let small: Vec<_> = small.chain(templates).collect();
        let large = |file: &&File| match find(WEIGHTS) {
            Some(_) => file.name == WEIGHTS,
            // Until the index has come.
            None => file.name.starts_with("model-") && file.name.ends_with(".safetensors"),
        };
        let weights: Vec<_> = found.info.siblings.iter().filter(large).collect();
        self.state.total.store(sum(&small) + sum(&weights), Relaxed);
        let source = Source::Folder(found.snapshot.clone());
        for file in &small {
            self.bring(found, file)?;
            if file.name == CONFIG {
                // Before gigabytes of a model that we can't run.
                source.parsed(CONFIG, Config::from_json)?;
            }
        }
        let weights = match find(WEIGHTS) {
            Some(_) => weights,
            None => {
                let path = found.snapshot.join(WEIGHTS_INDEX);
                let index =
                    fs::read(&path).map_err(|e| Error::file(&path, e, "Check its permissions"))?;
                let shards = shards(&source, &index)?;
                let found = shards
                    .iter()
                    .map(|shard| find(shard).ok_or_else(|| self.lacks(shard)));
                found.collect::<Result<_>>()?
            }
        };
        self.state.total.store(sum(&small) + sum(&weights), Relaxed);
        for file in weights {
            self.bring(found, file)?;
        }
        Ok(source)
    }

    /// Of all that quantization gives, two files.
    fn bring_gguf(&self, found: &Found, names: gguf::Names) -> Result<Source> {
        let chosen = |file: &&File| [&names.projector, &names.text].contains(&&file.name);
        let mut files: Vec<_> = found.info.siblings.iter().filter(chosen).collect();
        // A snapshot that has the text file has its projector too.
        files.sort_by_key(|file| file.name == names.text);
        self.state.total.store(sum(&files), Relaxed);
        for file in files {
            self.bring(found, file)?;
        }
        Ok(names.inside(&found.snapshot))
    }

    fn choose(&self, names: &[String]) -> Result<gguf::Names> {
        gguf::Names::choose(names, self.repository.tag.as_deref()).map_err(|reason| {
            self.repository.error(
                ErrorKind::NotFound,
                format!("the repository {reason}"),
                "Set model to a repository of SmolVLM, and behind a colon to what there is, as in \
                 ggml-org/SmolVLM-500M-Instruct-GGUF:Q8_0"
                    .into(),
            )
        })
    }

    fn info(&self) -> Result<Info> {
        let Repository { id, revision, .. } = &self.repository;
        let revision = revision.replace('/', "%2F");
        let path = format!("/api/models/{id}/revision/{revision}?blobs=true");
        let answer = self.client.get(&path, None, true);
        let (mut answer, _) = answer.map_err(|failure| self.failed(failure, ""))?;
        self.state.beat()?;
        let body = answer.body_mut().read_to_vec();
        let body = body.map_err(|e| self.failed(e.into(), ""))?;
        let info: Option<Info> = serde_json::from_slice(&body).ok();
        // The commit becomes a folder's name.
        info.filter(|info| is_commit(&info.sha)).ok_or_else(|| {
            self.repository
                .unreachable("it doesn't answer as the hub does")
        })
    }

    fn lacks(&self, what: &str) -> Error {
        self.repository.error(
            ErrorKind::NotFound,
            format!("the repository has no {what}"),
            "vlmnarrate runs SmolVLM and SmolVLM2 checkpoints in safetensors form".into(),
        )
    }

    fn check_files(&self, info: &Info) -> Result<()> {
        for any in [
            &[CONFIG][..],
            &[TOKENIZER],
            &[PREPROCESSOR_CONFIG, PROCESSOR_CONFIG],
            &[WEIGHTS, WEIGHTS_INDEX],
        ] {
            if !info.siblings.iter().any(|file| any.contains(&&*file.name)) {
                return Err(self.lacks(any[0]));
            }
        }
        Ok(())
    }

    /// Sees that one file is in the snapshot.
    fn bring(&self, found: &Found, file: &File) -> Result<()> {
        let unexpected = |what: &str, word: &str| {
            let word: String = word.chars().take(200).collect();
            self.repository
                .unreachable(format!("it names {what} `{}`", word.escape_debug()))
        };
        if !is_inside(&file.name) {
            return Err(unexpected("as a file of the repository", &file.name));
        }
        self.state.beat()?;
        let pointer = found.snapshot.join(&file.name);
        if !pointer.exists() {
            let etag = match file.etag() {
                Some(etag) => etag.to_owned(),
                None => self.ask_etag(found, file)?,
            };
            if !is_etag(&etag) {
                return Err(unexpected(&format!("as the sum of {}", file.name), &etag));
            }
            let folder = self.repository.folder();
            let blob = folder.join("blobs").join(&etag);
            let part = blob.with_file_name(format!("{etag}.incomplete"));
            let id = folder.file_name().unwrap_or_default();
            let locks = self.repository.environment.cache.join(".locks").join(id);
            let lock = locks.join(format!("{etag}.lock"));
            for file in [&blob, &pointer, &lock] {
                create_parent(file).map_err(|e| self.not_written(&e))?;
            }
            self.lock(&lock, &part)?;
            let brought = self.bring_blob(found, file, &part, &blob, &pointer);
            self.state.unlock();
            brought?;
        } else {
            self.verify(file, &pointer, Some(&pointer))?;
        }
        self.state.part.store(0, Relaxed);
        self.state.whole.fetch_add(file.size(), Relaxed);
        Ok(())
    }

    /// What the hub calls a file's contents where its list of files doesn't say.
    fn ask_etag(&self, found: &Found, file: &File) -> Result<String> {
        let answer = self.ask(found, file, "bytes=0-0".into());
        let (_, etag) = answer.map_err(|failure| self.failed(failure, &file.name))?;
        etag.ok_or_else(|| {
            self.repository
                .unreachable(format!("{}: it has no ETag", file.name))
        })
    }

    /// Waits while somebody else brings the file, another program perhaps: huggingface_hub locks the same.
    fn lock(&self, path: &Path, part: &Path) -> Result<()> {
        let file = fs::File::create(path).map_err(|e| self.not_written(&e))?;
        loop {
            self.state.check()?;
            match file.try_lock() {
                Err(fs::TryLockError::WouldBlock) => (),
                // Not every file system has locks.
                _ => break,
            }
            let size = fs::metadata(part).map_or(0, |part| part.len());
            if self.state.part.swap(size, Relaxed) != size {
                self.state.beat()?;
            }
            thread::sleep(TICK);
        }
        *self.state.lock.lock().unwrap() = Some(file);
        Ok(())
    }

    /// With the lock: sees that the blob is there, whole, and a link to it.
    fn bring_blob(
        &self,
        found: &Found,
        file: &File,
        part: &Path,
        blob: &Path,
        pointer: &Path,
    ) -> Result<()> {
        let disk = |e: io::Error| self.not_written(&e);
        // Of another commit, or somebody else has just brought it.
        if blob.exists() {
            self.verify(file, blob, None)?;
        } else {
            // What has no sum to check is small, and comes anew.
            let mut is_new = file.lfs.is_none() || !part.exists();
            loop {
                if is_new {
                    remove(part).map_err(disk)?;
                }
                self.fetch(found, file, part)?;
                match self.verify(file, part, None) {
                    Err(Error::Hub { .. }) if !is_new => is_new = true,
                    verified => break verified?,
                }
            }
            self.state.check()?;
            fs::rename(part, blob).map_err(disk)?;
        }
        if !pointer.exists() {
            // A link to a blob that is gone.
            remove(pointer).map_err(disk)?;
            link(blob, pointer, &file.name).map_err(disk)?;
        }
        Ok(())
    }

    /// Downloads, and goes on where the connection broke for as long as each try brings something.
    fn fetch(&self, found: &Found, file: &File, part: &Path) -> Result<()> {
        loop {
            let before = self.state.received.load(Relaxed);
            match self.receive(found, file, part)? {
                Ok(()) => return Ok(()),
                Err(Failure::Broken(_)) if self.state.received.load(Relaxed) > before => {
                    self.state.pause(Duration::from_secs(1))?;
                }
                Err(failure) => return Err(self.failed(failure, &file.name)),
            }
        }
    }

    /// One request for what is not in the part yet.
    fn receive(&self, found: &Found, file: &File, part: &Path) -> Result<Result<(), Failure>> {
        let disk = |e: io::Error| self.not_written(&e);
        let mut out = fs::OpenOptions::new();
        let mut out = out
            .create(true)
            .write(true)
            .truncate(false)
            .open(part)
            .map_err(disk)?;
        let have = out.metadata().map_err(disk)?.len();
        let start = match file.size {
            Some(0) => return out.set_len(0).map_err(disk).map(Ok),
            // No server has a range of no bytes.
            Some(size) if have == size => size - 1,
            Some(size) if have < size => have,
            _ => 0,
        };
        let asked = self.ask(found, file, format!("bytes={start}-"));
        let (mut answer, _) = match asked {
            Ok(answer) => answer,
            Err(failure) => return Ok(Err(failure)),
        };
        self.state.beat()?;
        let first = first_byte(&answer).unwrap_or(start);
        // All of it is fine, whatever was asked for.
        if first != start && first != 0 {
            let why = format!("it sends the bytes from {first}, not from {start}");
            return Ok(Err(Failure::Unexpected(why)));
        }
        let start = first;
        out.set_len(start).map_err(disk)?;
        out.seek(SeekFrom::Start(start)).map_err(disk)?;
        self.state.part.store(start, Relaxed);
        let mut body = answer.body_mut().as_reader();
        let mut chunk = vec![0; 1 << 16];
        // More than there should be is noticed, and not taken.
        while file
            .size
            .is_none_or(|size| self.state.part.load(Relaxed) <= size)
        {
            let read = match body.read(&mut chunk) {
                Ok(0) => break,
                Ok(read) => read,
                Err(e) if e.kind() == Io::Interrupted => continue,
                Err(e) => return Ok(Err(Failure::Broken(e.to_string()))),
            };
            self.state.beat()?;
            out.write_all(&chunk[..read]).map_err(disk)?;
            self.state.part.fetch_add(read as u64, Relaxed);
            self.state.received.fetch_add(read as u64, Relaxed);
        }
        // A connection that is shut down may look like the end.
        self.state.check()?;
        Ok(Ok(()))
    }

    /// A file of the commit, and its ETag.
    fn ask(
        &self,
        found: &Found,
        file: &File,
        range: String,
    ) -> Result<(Response<Body>, Option<String>), Failure> {
        let (id, commit) = (self.repository.id(), &found.info.sha);
        let path = format!("/{id}/resolve/{commit}/{}", escaped(&file.name));
        // What everyone may read needs no token.
        let (answer, linked) = self
            .client
            .get(&path, Some(range), !found.info.is_public())?;
        match linked.commit {
            Some(other) if other != *commit => Err(Failure::Unexpected(
                "it is of another commit than was asked for".into(),
            )),
            _ => Ok((answer, linked.etag)),
        }
    }

    /// Size and, of large files, sum. A file that fails is deleted, and so is the link to it.
    fn verify(&self, file: &File, path: &Path, pointer: Option<&Path>) -> Result<()> {
        let blob = path.canonicalize().unwrap_or_else(|_| path.into());
        let unread = |e| Error::file(&blob, e, "Check its permissions");
        let mut bytes = fs::File::open(&blob).map_err(unread)?;
        let size = bytes.metadata().map_err(unread)?.len();
        let mut reason = None;
        if let Some(expected) = file.size.filter(|expected| *expected != size) {
            reason = Some(format!("came with {size} bytes, not {expected}"));
        } else if let Some(Lfs { sha256 }) = &file.lfs {
            let mut hash = Sha256::new();
            let mut chunk = vec![0; 1 << 20];
            loop {
                self.state.beat()?;
                match bytes.read(&mut chunk).map_err(unread)? {
                    0 => break,
                    read => hash.update(&chunk[..read]),
                }
            }
            let sum = format!("{:x}", hash.finalize());
            if !sum.eq_ignore_ascii_case(sha256) {
                reason = Some(format!("came with the SHA-256 {sum}, not {sha256}"));
            }
        }
        let Some(reason) = reason else {
            return Ok(());
        };
        let _ = pointer.map(fs::remove_file);
        let _ = fs::remove_file(&blob);
        Err(self.repository.error(
            ErrorKind::OpenRead,
            format!("{} {reason}", file.name),
            "It is deleted: start again, and if that doesn't help, check what is between here and the hub"
                .into(),
        ))
    }

    fn not_written(&self, error: &io::Error) -> Error {
        self.repository.not_written(error, self.state.transfer())
    }

    fn failed(&self, failure: Failure, file: &str) -> Error {
        let during = |why: String| match file {
            "" => self.repository.unreachable(why),
            file => self.repository.unreachable(format!("{file}: {why}")),
        };
        match failure {
            Failure::Broken(why) | Failure::Unexpected(why) => during(why),
            Failure::Refused(status, _)
                if self.client.withholds_token() && status != StatusCode::NOT_FOUND =>
            {
                self.repository.kept_from_proxy(status.as_u16())
            }
            Failure::Refused(status, code) => self.repository.refused(status.as_u16(), &code, file),
        }
    }
}

/// Where the bytes begin that an answer has, if it says so.
fn first_byte(answer: &Response<Body>) -> Option<u64> {
    if answer.status() != StatusCode::PARTIAL_CONTENT {
        return Some(0);
    }
    let range = answer.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    let (first, _) = range.trim_start_matches("bytes ").split_once('-')?;
    first.parse().ok()
}

fn create_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}

/// A file or a link, if there is one.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != Io::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// As the cache has them: relative, so that it can be moved.
fn link(blob: &Path, pointer: &Path, name: &str) -> io::Result<()> {
    #[cfg(unix)]
    {
        // Out of the file's folders, of the snapshot's and of `snapshots`.
        let mut to: PathBuf = Path::new(name).components().skip(1).map(|_| "..").collect();
        to.push("../../blobs");
        std::os::unix::fs::symlink(to.join(blob.file_name().unwrap_or_default()), pointer)
    }
    #[cfg(not(unix))]
    {
        let _ = name;
        fs::copy(blob, pointer).map(|_| ())
    }
}
