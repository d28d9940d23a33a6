//! The download thread: lists a repository, chooses the files that are needed, downloads and verifies them.

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
        chat_template, gguf,
        hub::{
            CONFIG_FILES, POLL_INTERVAL, Repository,
            client::{Client, ClientError},
            is_commit,
            listing::{LfsInfo, ModelInfo, Sibling, is_etag, is_relative_path, percent_encode},
        },
        source::{
            CONFIG, PREPROCESSOR_CONFIG, PROCESSOR_CONFIG, Source, TOKENIZER, WEIGHTS,
            WEIGHTS_INDEX, shards,
        },
    },
};
use vlmnarrate_engine::{ErrorKind, Transfer};

/// Progress and cancellation, shared by the download thread and the thread that waits for it.
#[derive(Default)]
pub(crate) struct DownloadState {
    /// Bytes of the files that are complete.
    complete: AtomicU64,
    /// Bytes of the current file.
    current: AtomicU64,
    total: AtomicU64,
    received: AtomicU64,
    /// Counts signs of life, to tell a slow server from a silent one.
    pub(crate) activity: AtomicU64,
    cancelled: AtomicBool,
    /// The lock file of the current file.
    lock: Mutex<Option<fs::File>>,
}

impl DownloadState {
    pub(crate) fn transfer(&self) -> Transfer {
        Transfer {
            done: self.complete.load(Relaxed) + self.current.load(Relaxed),
            total: self.total.load(Relaxed),
            received: self.received.load(Relaxed),
        }
    }

    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Relaxed);
    }

    /// Lets other processes download the current file.
    pub(crate) fn unlock(&self) {
        self.lock.lock().unwrap().take();
    }

    /// Counts a sign of life. Errors if the download was cancelled.
    fn record_activity(&self) -> Result<()> {
        self.activity.fetch_add(1, Relaxed);
        self.check_cancelled()
    }

    fn check_cancelled(&self) -> Result<()> {
        match self.cancelled.load(Relaxed) {
            true => Err(Error::Cancelled),
            false => Ok(()),
        }
    }

    fn sleep(&self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.record_activity()?;
            thread::sleep(POLL_INTERVAL.min(time));
        }
        Ok(())
    }
}

fn total_size(files: &[&Sibling]) -> u64 {
    files.iter().map(|file| file.size()).sum()
}

/// The work of the download thread.
pub(crate) struct Download {
    pub(crate) repository: Repository,
    pub(crate) state: Arc<DownloadState>,
    pub(crate) client: Client,
}

/// The files of a repository at one commit, and the folder that they are downloaded to.
struct Snapshot {
    info: ModelInfo,
    folder: PathBuf,
}

impl Snapshot {
    fn file(&self, name: &str) -> Option<&Sibling> {
        self.info.siblings.iter().find(|file| file.name == name)
    }
}

impl Download {
    pub(crate) fn run(&self) -> Result<Source> {
        // A cancelled request fails with an arbitrary error.
        self.download_all()
            .map_err(|error| self.state.check_cancelled().err().unwrap_or(error))
    }

    fn download_all(&self) -> Result<Source> {
        let Repository { tag, revision, .. } = &self.repository;
        let info = self.info()?;
        let names: Vec<_> = info.siblings.iter().map(|file| file.name.clone()).collect();
        let has = |name: &str| names.iter().any(|file| file == name);
        let is_gguf =
            !has(WEIGHTS) && !has(WEIGHTS_INDEX) && names.iter().any(|n| gguf::is_gguf(n));
        let files = match tag.is_some() || is_gguf {
            true => Some(self.choose_gguf(&names)?),
            false => {
                self.check_files(&info)?;
                None
            }
        };

        // All files come from one commit, even if the branch moves meanwhile.
        let cache_folder = self.repository.folder();
        let commit = info.sha.clone();
        let folder = cache_folder.join("snapshots").join(&commit);
        let snapshot = Snapshot { info, folder };
        let source = match files {
            Some(names) => self.download_gguf(&snapshot, names)?,
            None => self.download_checkpoint(&snapshot)?,
        };
        if *revision != commit {
            let reference = cache_folder.join("refs").join(revision);
            let written = create_parent(&reference).and_then(|()| fs::write(&reference, &commit));
            written.map_err(|e| self.write_error(&e))?;
        }
        Ok(source)
    }

    /// Downloads a safetensors checkpoint.
    fn download_checkpoint(&self, snapshot: &Snapshot) -> Result<Source> {
        let find = |name: &str| snapshot.file(name);
        let small = CONFIG_FILES
            .into_iter()
            .filter(|name| *name != WEIGHTS_INDEX || find(WEIGHTS).is_none())
            .filter_map(find);
        let templates = snapshot.info.siblings.iter();
        let templates = templates.filter(|file| chat_template::is_additional(&file.name));
        let small: Vec<_> = small.chain(templates).collect();
        let large = |file: &&Sibling| match find(WEIGHTS) {
            Some(_) => file.name == WEIGHTS,
            // An estimate, until the index is downloaded.
            None => file.name.starts_with("model-") && file.name.ends_with(".safetensors"),
        };
        let weights: Vec<_> = snapshot.info.siblings.iter().filter(large).collect();
        self.state
            .total
            .store(total_size(&small) + total_size(&weights), Relaxed);
        let source = Source::Folder(snapshot.folder.clone());
        for file in &small {
            self.download_file(snapshot, file)?;
            if file.name == CONFIG {
                // Before gigabytes of an unsupported model are downloaded.
                source.read_parsed(CONFIG, Config::from_json)?;
            }
        }
        let weights = match find(WEIGHTS) {
            Some(_) => weights,
            None => {
                let path = snapshot.folder.join(WEIGHTS_INDEX);
                let index =
                    fs::read(&path).map_err(|e| Error::file(&path, e, "Check its permissions"))?;
                let shards = shards(&source, &index)?;
                let files = shards
                    .iter()
                    .map(|shard| find(shard).ok_or_else(|| self.missing_file_error(shard)));
                files.collect::<Result<_>>()?
            }
        };
        self.state
            .total
            .store(total_size(&small) + total_size(&weights), Relaxed);
        for file in weights {
            self.download_file(snapshot, file)?;
        }
        Ok(source)
    }

    /// Downloads the two GGUF files of one quantization.
    fn download_gguf(&self, snapshot: &Snapshot, names: gguf::FileNames) -> Result<Source> {
        let chosen = |file: &&Sibling| [&names.projector, &names.text].contains(&&file.name);
        let mut files: Vec<_> = snapshot.info.siblings.iter().filter(chosen).collect();
        // The text model last: a snapshot that has it has its mmproj file too.
        files.sort_by_key(|file| file.name == names.text);
        self.state.total.store(total_size(&files), Relaxed);
        for file in files {
            self.download_file(snapshot, file)?;
        }
        Ok(names.into_source(&snapshot.folder))
    }

    fn choose_gguf(&self, names: &[String]) -> Result<gguf::FileNames> {
        gguf::FileNames::choose(names, self.repository.tag.as_deref()).map_err(|reason| {
            self.repository.error(
                ErrorKind::NotFound,
                format!("the repository {reason}"),
                "Set model to a SmolVLM repository and one of its quantizations, as in \
                 ggml-org/SmolVLM-500M-Instruct-GGUF:Q8_0"
                    .into(),
            )
        })
    }

    fn info(&self) -> Result<ModelInfo> {
        let Repository { id, revision, .. } = &self.repository;
        let revision = revision.replace('/', "%2F");
        let path = format!("/api/models/{id}/revision/{revision}?blobs=true");
        let response = self.client.get(&path, None, true);
        let (mut response, _) = response.map_err(|error| self.client_error(error, ""))?;
        self.state.record_activity()?;
        let body = response.body_mut().read_to_vec();
        let body = body.map_err(|e| self.client_error(e.into(), ""))?;
        let info: Option<ModelInfo> = serde_json::from_slice(&body).ok();
        // The commit becomes the name of a folder.
        info.filter(|info| is_commit(&info.sha)).ok_or_else(|| {
            self.repository
                .unreachable_error("its answer is not that of a Hugging Face hub")
        })
    }

    fn missing_file_error(&self, what: &str) -> Error {
        self.repository.error(
            ErrorKind::NotFound,
            format!("the repository has no {what}"),
            "vlmnarrate runs SmolVLM and SmolVLM2 checkpoints in safetensors form".into(),
        )
    }

    fn check_files(&self, info: &ModelInfo) -> Result<()> {
        for any in [
            &[CONFIG][..],
            &[TOKENIZER],
            &[PREPROCESSOR_CONFIG, PROCESSOR_CONFIG],
            &[WEIGHTS, WEIGHTS_INDEX],
        ] {
            if !info.siblings.iter().any(|file| any.contains(&&*file.name)) {
                return Err(self.missing_file_error(any[0]));
            }
        }
        Ok(())
    }

    /// Makes sure that a file is in the snapshot, complete and verified.
    fn download_file(&self, snapshot: &Snapshot, file: &Sibling) -> Result<()> {
        let unexpected = |what: &str, word: &str| {
            let word: String = word.chars().take(200).collect();
            self.repository
                .unreachable_error(format!("it names {what} `{}`", word.escape_debug()))
        };
        if !is_relative_path(&file.name) {
            return Err(unexpected("as a file of the repository", &file.name));
        }
        self.state.record_activity()?;
        let pointer = snapshot.folder.join(&file.name);
        if !pointer.exists() {
            let etag = match file.etag() {
                Some(etag) => etag.to_owned(),
                None => self.fetch_etag(snapshot, file)?,
            };
            if !is_etag(&etag) {
                return Err(unexpected(&format!("as the sum of {}", file.name), &etag));
            }
            let folder = self.repository.folder();
            let blob = folder.join("blobs").join(&etag);
            let partial = blob.with_file_name(format!("{etag}.incomplete"));
            let id = folder.file_name().unwrap_or_default();
            let locks = self.repository.environment.cache.join(".locks").join(id);
            let lock = locks.join(format!("{etag}.lock"));
            for file in [&blob, &pointer, &lock] {
                create_parent(file).map_err(|e| self.write_error(&e))?;
            }
            self.lock(&lock, &partial)?;
            let downloaded = self.download_blob(snapshot, file, &partial, &blob, &pointer);
            self.state.unlock();
            downloaded?;
        } else {
            self.verify(file, &pointer, Some(&pointer))?;
        }
        self.state.current.store(0, Relaxed);
        self.state.complete.fetch_add(file.size(), Relaxed);
        Ok(())
    }

    /// Asks for the ETag of a file, if the listing of the repository has no hash for it.
    fn fetch_etag(&self, snapshot: &Snapshot, file: &Sibling) -> Result<String> {
        let response = self.request(snapshot, file, "bytes=0-0".into());
        let (_, etag) = response.map_err(|error| self.client_error(error, &file.name))?;
        etag.ok_or_else(|| {
            self.repository
                .unreachable_error(format!("{}: it has no ETag", file.name))
        })
    }

    /// Takes the lock file of a blob, and waits while another process downloads it: huggingface_hub takes the same lock.
    fn lock(&self, path: &Path, partial: &Path) -> Result<()> {
        let file = fs::File::create(path).map_err(|e| self.write_error(&e))?;
        loop {
            self.state.check_cancelled()?;
            match file.try_lock() {
                Err(fs::TryLockError::WouldBlock) => (),
                // Locked, or on a file system without locks.
                _ => break,
            }
            let size = fs::metadata(partial).map_or(0, |partial| partial.len());
            if self.state.current.swap(size, Relaxed) != size {
                self.state.record_activity()?;
            }
            thread::sleep(POLL_INTERVAL);
        }
        *self.state.lock.lock().unwrap() = Some(file);
        Ok(())
    }

    /// Makes sure that the blob is complete and the snapshot links to it. Needs the lock.
    fn download_blob(
        &self,
        snapshot: &Snapshot,
        file: &Sibling,
        partial: &Path,
        blob: &Path,
        pointer: &Path,
    ) -> Result<()> {
        let disk = |e: io::Error| self.write_error(&e);
        // Another commit has the same blob, or another process has just downloaded it.
        if blob.exists() {
            self.verify(file, blob, None)?;
        } else {
            // A file without SHA-256 is small, and is not resumed.
            let mut is_new = file.lfs.is_none() || !partial.exists();
            loop {
                if is_new {
                    remove(partial).map_err(disk)?;
                }
                self.fetch(snapshot, file, partial)?;
                match self.verify(file, partial, None) {
                    Err(Error::Hub { .. }) if !is_new => is_new = true,
                    verified => break verified?,
                }
            }
            self.state.check_cancelled()?;
            fs::rename(partial, blob).map_err(disk)?;
        }
        if !pointer.exists() {
            // The link may lead to a blob that was removed.
            remove(pointer).map_err(disk)?;
            link(blob, pointer, &file.name).map_err(disk)?;
        }
        Ok(())
    }

    /// Downloads a file, and resumes after a broken connection as long as each attempt receives something.
    fn fetch(&self, snapshot: &Snapshot, file: &Sibling, partial: &Path) -> Result<()> {
        loop {
            let before = self.state.received.load(Relaxed);
            match self.receive(snapshot, file, partial)? {
                Ok(()) => return Ok(()),
                Err(ClientError::Connection(_)) if self.state.received.load(Relaxed) > before => {
                    self.state.sleep(Duration::from_secs(1))?;
                }
                Err(error) => return Err(self.client_error(error, &file.name)),
            }
        }
    }

    /// Makes one request for the bytes that the partial file lacks.
    fn receive(
        &self,
        snapshot: &Snapshot,
        file: &Sibling,
        partial: &Path,
    ) -> Result<Result<(), ClientError>> {
        let disk = |e: io::Error| self.write_error(&e);
        let mut out = fs::OpenOptions::new();
        let mut out = out
            .create(true)
            .write(true)
            .truncate(false)
            .open(partial)
            .map_err(disk)?;
        let have = out.metadata().map_err(disk)?.len();
        let start = match file.size {
            Some(0) => return out.set_len(0).map_err(disk).map(Ok),
            // An empty range would be refused: ask for the last byte again.
            Some(size) if have == size => size - 1,
            Some(size) if have < size => have,
            _ => 0,
        };
        let response = self.request(snapshot, file, format!("bytes={start}-"));
        let (mut response, _) = match response {
            Ok(response) => response,
            Err(error) => return Ok(Err(error)),
        };
        self.state.record_activity()?;
        let first = first_byte(&response).unwrap_or(start);
        // A server that ignores ranges sends the whole file, which is fine.
        if first != start && first != 0 {
            let why = format!("it sends the bytes from {first}, not from {start}");
            return Ok(Err(ClientError::Protocol(why)));
        }
        let start = first;
        out.set_len(start).map_err(disk)?;
        out.seek(SeekFrom::Start(start)).map_err(disk)?;
        self.state.current.store(start, Relaxed);
        let mut body = response.body_mut().as_reader();
        let mut chunk = vec![0; 1 << 16];
        // Stops one chunk after the expected size; `verify` refuses the file.
        while file
            .size
            .is_none_or(|size| self.state.current.load(Relaxed) <= size)
        {
            let read = match body.read(&mut chunk) {
                Ok(0) => break,
                Ok(read) => read,
                Err(e) if e.kind() == Io::Interrupted => continue,
                Err(e) => return Ok(Err(ClientError::Connection(e.to_string()))),
            };
            self.state.record_activity()?;
            out.write_all(&chunk[..read]).map_err(disk)?;
            self.state.current.fetch_add(read as u64, Relaxed);
            self.state.received.fetch_add(read as u64, Relaxed);
        }
        // A connection that was shut down may look like the end of the file.
        self.state.check_cancelled()?;
        Ok(Ok(()))
    }

    /// Requests a range of a file at the snapshot's commit; returns the response and the file's ETag.
    fn request(
        &self,
        snapshot: &Snapshot,
        file: &Sibling,
        range: String,
    ) -> Result<(Response<Body>, Option<String>), ClientError> {
        let (id, commit) = (self.repository.id(), &snapshot.info.sha);
        let path = format!("/{id}/resolve/{commit}/{}", percent_encode(&file.name));
        // A public repository needs no token.
        let (response, metadata) =
            self.client
                .get(&path, Some(range), !snapshot.info.is_public())?;
        match metadata.commit {
            Some(other) if other != *commit => Err(ClientError::Protocol(
                "it sent another commit than requested".into(),
            )),
            _ => Ok((response, metadata.etag)),
        }
    }

    /// Checks the size of a file and, if the hub has it, its SHA-256. A file that fails is deleted, with the link to it.
    fn verify(&self, file: &Sibling, path: &Path, pointer: Option<&Path>) -> Result<()> {
        let blob = path.canonicalize().unwrap_or_else(|_| path.into());
        let unread = |e| Error::file(&blob, e, "Check its permissions");
        let mut bytes = fs::File::open(&blob).map_err(unread)?;
        let size = bytes.metadata().map_err(unread)?.len();
        let mut reason = None;
        if let Some(expected) = file.size.filter(|expected| *expected != size) {
            reason = Some(format!("came with {size} bytes, not {expected}"));
        } else if let Some(LfsInfo { sha256 }) = &file.lfs {
            let mut hash = Sha256::new();
            let mut chunk = vec![0; 1 << 20];
            loop {
                self.state.record_activity()?;
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
            "The file was deleted: start again. If that doesn't help, check proxies between here and the hub"
                .into(),
        ))
    }

    fn write_error(&self, error: &io::Error) -> Error {
        self.repository.write_error(error, self.state.transfer())
    }

    fn client_error(&self, error: ClientError, file: &str) -> Error {
        let during = |why: String| match file {
            "" => self.repository.unreachable_error(why),
            file => self.repository.unreachable_error(format!("{file}: {why}")),
        };
        match error {
            ClientError::Connection(why) | ClientError::Protocol(why) => during(why),
            ClientError::Status(status, _)
                if self.client.withholds_token() && status != StatusCode::NOT_FOUND =>
            {
                self.repository.withheld_token_error(status.as_u16())
            }
            ClientError::Status(status, code) => {
                self.repository.status_error(status.as_u16(), &code, file)
            }
        }
    }
}

/// Position of a response's first byte in the file, from `Content-Range`.
fn first_byte(response: &Response<Body>) -> Option<u64> {
    if response.status() != StatusCode::PARTIAL_CONTENT {
        return Some(0);
    }
    let range = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    let (first, _) = range.trim_start_matches("bytes ").split_once('-')?;
    first.parse().ok()
}

fn create_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}

/// Removes a file or a link, if there is one.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != Io::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Links a snapshot's file to its blob. Relative as in huggingface_hub, because the cache may be moved.
fn link(blob: &Path, pointer: &Path, name: &str) -> io::Result<()> {
    #[cfg(unix)]
    {
        // Up from the file's folders in the repository, then from the snapshot and `snapshots`.
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
