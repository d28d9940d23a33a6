//! The thread that downloads: it drives hf-hub file by file and looks at what has come.

use std::{
    any::Any,
    collections::BTreeSet,
    fs,
    io::{self, ErrorKind as Io, Read},
    panic::resume_unwind,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use hf_hub::{
    Cache, Repo, RepoType,
    api::sync::{ApiBuilder, ApiError, ApiRepo},
};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{
    super::{
        Config, Error, ErrorKind, Result, Source, Transfer, gguf,
        source::{
            CONFIG, PREPROCESSOR_CONFIG, PROCESSOR_CONFIG, TOKENIZER, WEIGHTS, WEIGHTS_INDEX,
            shards,
        },
    },
    Repository, SMALL, TICK, Token, is_commit,
};

/// Shared by the thread that downloads and the one that waits for it.
#[derive(Default)]
pub(super) struct State {
    /// Of files that are whole.
    whole: AtomicU64,
    /// Of the file under way.
    part: AtomicU64,
    total: AtomicU64,
    received: AtomicU64,
    /// Moves on whenever something happens.
    pub(super) beats: AtomicU64,
    let_go: AtomicBool,
    /// The lock that hf-hub holds.
    lock: Mutex<Option<PathBuf>>,
    claim: Mutex<Option<Claim>>,
}

/// Blobs that threads of this process are bringing. hf-hub alone would wait for its lock and then
/// fetch what has come meanwhile once more.
static CLAIMED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// The right to bring a blob, until it is dropped.
struct Claim(PathBuf);

impl Claim {
    /// `None` if another has it.
    fn new(blob: &Path) -> Option<Self> {
        let is_free = CLAIMED.lock().unwrap().insert(blob.to_owned());
        is_free.then(|| Self(blob.to_owned()))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        CLAIMED.lock().unwrap().remove(&self.0);
    }
}

impl State {
    pub(super) fn transfer(&self) -> Transfer {
        Transfer {
            done: self.whole.load(Relaxed) + self.part.load(Relaxed),
            total: self.total.load(Relaxed),
            received: self.received.load(Relaxed),
        }
    }

    pub(super) fn let_go(&self) {
        self.let_go.store(true, Relaxed);
        // A thread that is stuck keeps its lock, which must not keep the next download waiting.
        self.claim.lock().unwrap().take();
        if let Some(lock) = self.lock.lock().unwrap().take() {
            let _ = fs::remove_file(lock);
        }
    }

    /// A sign of life, and a look at whether to go on.
    fn beat(&self) -> Result<()> {
        self.beats.fetch_add(1, Relaxed);
        self.check()
    }

    fn check(&self) -> Result<()> {
        match self.let_go.load(Relaxed) {
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

/// Unwinds hf-hub, which has no other way out, without the panic hook.
struct LetGo;

/// What hf-hub tells of one file.
struct Watch<'a> {
    state: &'a State,
    /// What is told next was there already.
    resuming: bool,
}

impl Watch<'_> {
    fn beat(&self) {
        if self.state.beat().is_err() {
            resume_unwind(Box::new(LetGo));
        }
    }
}

impl hf_hub::api::Progress for Watch<'_> {
    fn init(&mut self, _: usize, _: &str) {
        self.beat();
        self.state.part.store(0, Relaxed);
        self.resuming = true;
    }

    fn update(&mut self, bytes: usize) {
        // Before these bytes are written.
        self.beat();
        self.state.part.fetch_add(bytes as u64, Relaxed);
        if !std::mem::take(&mut self.resuming) {
            self.state.received.fetch_add(bytes as u64, Relaxed);
        }
    }

    fn finish(&mut self) {
        self.beat();
    }
}

/// What the hub says of a repository.
#[derive(Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<File>,
    /// `false`, or who lets one in.
    gated: Option<serde_json::Value>,
    private: Option<bool>,
}

impl Info {
    fn is_public(&self) -> bool {
        self.gated == Some(false.into()) && self.private == Some(false)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    #[serde(rename = "rfilename")]
    name: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
}

impl File {
    fn size(&self) -> u64 {
        self.size.unwrap_or_default()
    }

    /// Name of the blob in the cache.
    fn etag(&self) -> Option<&str> {
        let lfs = self.lfs.as_ref().map(|lfs| lfs.sha256.as_str());
        // It becomes a file's name.
        lfs.or(self.blob_id.as_deref())
            .filter(|etag| etag.bytes().all(|c| c.is_ascii_hexdigit()))
    }
}

fn sum(files: &[&File]) -> u64 {
    files.iter().map(|file| file.size()).sum()
}

pub(super) struct Download {
    pub(super) repository: Repository,
    pub(super) state: Arc<State>,
}

impl Download {
    pub(super) fn run(&self) -> Result<Source> {
        let Repository {
            id,
            tag,
            revision,
            environment,
        } = &self.repository;
        let cache = Cache::new(environment.cache.clone());
        let api = |token: Option<Token>| {
            ApiBuilder::from_cache(cache.clone())
                .with_endpoint(environment.endpoint.clone())
                .with_token(token.map(|token| token.0))
                .with_progress(false)
                .with_user_agent("vlmnarrate", env!("CARGO_PKG_VERSION"))
                .build()
                .map_err(|e| self.failed(e, ""))
        };
        let at = |revision: &str| Repo::with_revision(id.clone(), RepoType::Model, revision.into());
        let info = self.info(&api(environment.token.clone())?.repo(at(revision)))?;
        let has = |name: &str| info.siblings.iter().any(|file| file.name == name);
        let names: Vec<_> = info.siblings.iter().map(|file| file.name.clone()).collect();
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
        // hf-hub shows the token to wherever a file is redirected, too: it has none to show of what everyone
        // may read.
        let token = environment.token.clone().filter(|_| !info.is_public());
        let repo = api(token)?.repo(at(&info.sha));
        let snapshot = cache.repo(at(revision)).pointer_path(&info.sha);
        let source = match files {
            Some(names) => self.bring_gguf(&repo, &info, names, &snapshot)?,
            None => self.bring_checkpoint(&repo, &info, snapshot)?,
        };
        cache
            .repo(at(revision))
            .create_ref(&info.sha)
            .map_err(|e| self.repository.not_written(&e, self.state.transfer()))?;
        Ok(source)
    }

    /// A checkpoint as transformers reads it.
    fn bring_checkpoint(&self, repo: &ApiRepo, info: &Info, snapshot: PathBuf) -> Result<Source> {
        let find = |name: &str| info.siblings.iter().find(|file| file.name == name);
        let small: Vec<_> = SMALL
            .into_iter()
            .filter(|name| *name != WEIGHTS_INDEX || find(WEIGHTS).is_none())
            .filter_map(find)
            .collect();
        let large = |file: &&File| match find(WEIGHTS) {
            Some(_) => file.name == WEIGHTS,
            // Until the index has come.
            None => file.name.starts_with("model-") && file.name.ends_with(".safetensors"),
        };
        let weights: Vec<_> = info.siblings.iter().filter(large).collect();
        self.state.total.store(sum(&small) + sum(&weights), Relaxed);
        let source = Source::Folder(snapshot.clone());
        for file in &small {
            self.bring(repo, file, &snapshot)?;
            if file.name == CONFIG {
                // Before gigabytes of a model that we can't run.
                source.parsed(CONFIG, Config::from_json)?;
            }
        }
        let weights = match find(WEIGHTS) {
            Some(_) => weights,
            None => {
                let path = snapshot.join(WEIGHTS_INDEX);
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
            self.bring(repo, file, &snapshot)?;
        }
        Ok(source)
    }

    /// Of all that quantization gives, two files.
    fn bring_gguf(
        &self,
        repo: &ApiRepo,
        info: &Info,
        names: gguf::Names,
        snapshot: &Path,
    ) -> Result<Source> {
        let chosen = |file: &&File| [&names.projector, &names.text].contains(&&file.name);
        let mut files: Vec<_> = info.siblings.iter().filter(chosen).collect();
        // A snapshot that has the text file has its projector too.
        files.sort_by_key(|file| file.name == names.text);
        self.state.total.store(sum(&files), Relaxed);
        for file in files {
            self.bring(repo, file, snapshot)?;
        }
        Ok(names.inside(snapshot))
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

    fn info(&self, repo: &ApiRepo) -> Result<Info> {
        let answer = repo
            .info_request()
            .query("blobs", "true")
            .config()
            .http_status_as_error(false)
            .timeout_global(Some(self.repository.environment.patience))
            .build()
            .call();
        let mut answer = answer.map_err(|e| self.repository.unreachable(e))?;
        self.state.beat()?;
        if !answer.status().is_success() {
            let code = answer.headers().get("x-error-code");
            let code = code.and_then(|code| code.to_str().ok()).unwrap_or_default();
            return Err(self.repository.refused(answer.status().as_u16(), code, ""));
        }
        let body = answer.body_mut().read_to_vec();
        let body = body.map_err(|e| self.repository.unreachable(e))?;
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
    fn bring(&self, repo: &ApiRepo, file: &File, snapshot: &Path) -> Result<()> {
        let pointer = snapshot.join(&file.name);
        let blobs = self.repository.folder().join("blobs");
        let blob = file.etag().map(|etag| blobs.join(etag));
        let disk = |e: io::Error| self.repository.not_written(&e, self.state.transfer());
        fs::create_dir_all(&blobs).map_err(disk)?;
        fs::create_dir_all(snapshot).map_err(disk)?;
        self.state.beat()?;
        while !pointer.exists() {
            self.state.check()?;
            // Before the look at what is there: who had it may have just brought it.
            let claim = blob.as_deref().and_then(Claim::new);
            if (claim.is_some() || blob.is_none()) && !pointer.exists() {
                // A link to a blob that is gone.
                let _ = fs::remove_file(&pointer);
            }
            if let Some(blob) = &blob {
                if pointer.exists() {
                    continue;
                }
                if claim.is_some() && blob.exists() {
                    // Of another commit, or somebody else has just brought it.
                    link(blob, &pointer).map_err(disk)?;
                    continue;
                }
                if claim.is_none() || self.is_locked(blob)? {
                    // Somebody else brings it.
                    let part = fs::metadata(blob.with_extension("part"));
                    let part = part.map_or(0, |part| part.len());
                    if self.state.part.swap(part, Relaxed) != part {
                        self.state.beat()?;
                    }
                    thread::sleep(TICK);
                    continue;
                }
                make_resumable(&blob.with_extension("part"), file.size()).map_err(disk)?;
                *self.state.lock.lock().unwrap() = Some(blob.with_extension("lock"));
                *self.state.claim.lock().unwrap() = claim;
                // Let go between the two.
                if let Err(gone) = self.state.check() {
                    self.state.claim.lock().unwrap().take();
                    return Err(gone);
                }
            }
            let fetched = self.fetch(repo, file);
            self.state.lock.lock().unwrap().take();
            self.state.claim.lock().unwrap().take();
            if fetched? && !pointer.exists() && !blob.as_ref().is_some_and(|blob| blob.exists()) {
                return Err(self.repository.unreachable(format!(
                    "{}: it is of another commit than was asked for",
                    file.name
                )));
            }
        }
        self.state.part.store(0, Relaxed);
        self.verify(file, &pointer)?;
        self.state.whole.fetch_add(file.size(), Relaxed);
        Ok(())
    }

    /// Whether some other thread or program has hf-hub's lock.
    fn is_locked(&self, blob: &Path) -> Result<bool> {
        let lock = fs::File::create(blob.with_extension("lock"))
            .map_err(|e| self.repository.not_written(&e, self.state.transfer()))?;
        Ok(matches!(lock.try_lock(), Err(fs::TryLockError::WouldBlock)))
    }

    /// Downloads, and goes on where the connection broke for as long as each try brings something.
    /// False if somebody else has the lock.
    fn fetch(&self, repo: &ApiRepo, file: &File) -> Result<bool> {
        loop {
            let before = self.state.received.load(Relaxed);
            let watch = Watch {
                state: &self.state,
                resuming: false,
            };
            match repo.download_with_progress(&file.name, watch) {
                Ok(_) => return Ok(true),
                Err(ApiError::LockAcquisition(_)) => return Ok(false),
                Err(error) if is_broken(&error) && self.state.received.load(Relaxed) > before => {
                    self.state.pause(Duration::from_secs(1))?;
                }
                Err(error) => return Err(self.failed(error, &file.name)),
            }
        }
    }

    /// Size and, of large files, sum. A file that fails is deleted.
    fn verify(&self, file: &File, pointer: &Path) -> Result<()> {
        let blob = pointer.canonicalize().unwrap_or_else(|_| pointer.into());
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
        let _ = fs::remove_file(pointer);
        let _ = fs::remove_file(&blob);
        Err(self.repository.error(
            ErrorKind::OpenRead,
            format!("{} {reason}", file.name),
            "It is deleted: start again, and if that doesn't help, check what is between here and the hub"
                .into(),
        ))
    }

    fn failed(&self, error: ApiError, file: &str) -> Error {
        use ureq::Error as Http;
        let repository = &self.repository;
        let during = |e: &dyn std::fmt::Display| match file {
            "" => repository.unreachable(e),
            file => repository.unreachable(format!("{file}: {e}")),
        };
        match error {
            ApiError::IoError(e) if is_disk(&e) => {
                repository.not_written(&e, self.state.transfer())
            }
            ApiError::IoError(e) => during(&e),
            ApiError::RequestError(e) => match *e {
                Http::StatusCode(status) => repository.refused(status, "", file),
                e => during(&e),
            },
            e => during(&e),
        }
    }

    pub(super) fn panicked(&self, panic: &(dyn Any + Send)) -> Error {
        if panic.is::<LetGo>() {
            return Error::Cancelled;
        }
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        self.repository.error(
            ErrorKind::Failed,
            format!("the download panicked: {}", text.unwrap_or("no message")),
            "Download the model with `hf download` instead".into(),
        )
    }
}

/// hf-hub has one kind of error for both ends of a copy.
fn is_disk(error: &io::Error) -> bool {
    error.raw_os_error().is_some()
        && !matches!(
            error.kind(),
            Io::ConnectionReset
                | Io::ConnectionAborted
                | Io::ConnectionRefused
                | Io::NotConnected
                | Io::BrokenPipe
                | Io::TimedOut
                | Io::WouldBlock
                | Io::HostUnreachable
                | Io::NetworkUnreachable
                | Io::NetworkDown
        )
}

/// Whether the connection broke, rather than that somebody said no.
fn is_broken(error: &ApiError) -> bool {
    match error {
        ApiError::IoError(e) => !is_disk(e),
        ApiError::RequestError(e) => !matches!(**e, ureq::Error::StatusCode(_)),
        _ => false,
    }
}

/// hf-hub asks for the bytes behind the last it has, which must not be none, and takes no file that is too
/// long.
fn make_resumable(part: &Path, size: u64) -> io::Result<()> {
    match fs::metadata(part) {
        Ok(found) if found.len() == size && size > 0 => fs::OpenOptions::new()
            .write(true)
            .open(part)?
            .set_len(size - 1),
        Ok(found) if found.len() >= size => fs::remove_file(part),
        _ => Ok(()),
    }
}

/// As the cache has them: relative, so that it can be moved.
fn link(blob: &Path, pointer: &Path) -> io::Result<()> {
    #[cfg(unix)]
    {
        let name = blob.file_name().unwrap_or_default();
        std::os::unix::fs::symlink(Path::new("../../blobs").join(name), pointer)
    }
    #[cfg(not(unix))]
    fs::copy(blob, pointer).map(|_| ())
}
