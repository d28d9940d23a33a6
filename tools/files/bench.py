"""Runs the command on a copy of a kind's folder and looks at what it leaves: files, processes, words."""

import contextlib
import dataclasses
import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import uuid

NOBODY = 65534
LINE = re.compile(r"^\d+:\d\d(?::\d\d)?\.\d  \S")
NOISE = re.compile(r"panicked at|RUST_BACKTRACE|-CRITICAL \*\*|-WARNING \*\*|Traceback|GLib-|Segmentation")
REMEDY = re.compile(r"[;.:] ?\w.*|\b(use|name|choose|try|check|install|give|make|set|pipe|replace)\b", re.I)


@dataclasses.dataclass
class Outcome:
    code: int | None  # None if it had to be killed
    out: str
    err: str
    seconds: float
    left: list  # processes that outlived the command
    added: list  # files that are there now and were not before
    changed: list  # files of before that are not as they were
    temporary: list  # what is left in the folder for temporary files

    @property
    def captions(self):
        return [line for line in self.out.splitlines() if LINE.match(line)]

    @property
    def errors(self):
        return [line for line in self.err.splitlines() if line.startswith("error:")]


def listing(folder):
    """Each file's SHA-256, size and time of change."""
    found = {}
    for where, folders, files in os.walk(folder):
        for name in files + [name for name in folders if os.path.islink(os.path.join(where, name))]:
            path = os.path.join(where, name)
            about = os.lstat(path)
            digest = ""
            if os.path.islink(path):
                digest = os.readlink(path)
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[os.path.relpath(path, folder)] = (digest, about.st_size, about.st_mtime_ns)
        for name in folders:
            found[os.path.relpath(os.path.join(where, name), folder) + "/"] = ()
    return found


def marked(mark):
    """Processes, other than those that have ended, whose environment has the mark."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{name}/environ", "rb") as file:
                if mark.encode() not in file.read():
                    continue
            with open(f"/proc/{name}/cmdline", "rb") as file:
                words = file.read().replace(b"\0", b" ").decode(errors="replace").strip()
            if words:
                found.append((int(name), words))
    return found


class Bench:
    """A folder in which kinds are tried: the kind's own, one for outputs, one for temporary files and a home."""

    def __init__(self, command, options=()):
        self.command = os.path.abspath(command)
        self.options = list(options)
        self.base = tempfile.mkdtemp(prefix="files-")
        os.chmod(self.base, 0o755)
        self.work = os.path.join(self.base, "work")
        for name in ("home", "tmp", "cache"):
            os.mkdir(os.path.join(self.base, name))
            os.chmod(os.path.join(self.base, name), 0o777)
        self.mounted = False

    def close(self):
        self.clear()
        shutil.rmtree(self.base, ignore_errors=True)

    def clear(self):
        if self.mounted:
            subprocess.run(["umount", self.work], check=False)
            self.mounted = False
        with contextlib.suppress(OSError):
            os.chmod(self.work, 0o755)
        shutil.rmtree(self.work, ignore_errors=True)
        out = os.path.join(self.base, "out")
        shutil.rmtree(out, ignore_errors=True)
        os.mkdir(out)
        os.chmod(out, 0o777)

    def lay(self, source, trait=""):
        """Copies a kind's folder; False if this machine can't arrange the trait."""
        self.clear()
        if trait == "tmpfs":
            size = sum(os.path.getsize(os.path.join(source, name)) for name in os.listdir(source))
            os.mkdir(self.work)
            mounted = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size * 13 // 10 // 4096 * 4096}", "tmpfs", self.work],
                capture_output=True,
            )
            if mounted.returncode:
                return False
            self.mounted = True
        shutil.copytree(source, self.work, symlinks=True, dirs_exist_ok=True)
        if trait in ("unreadable", "read-only"):
            if os.geteuid() == 0 and not self.reachable():
                return False
            for name in os.listdir(self.work):
                os.chmod(os.path.join(self.work, name), 0 if trait == "unreadable" else 0o644)
            os.chmod(self.work, 0o555 if trait == "read-only" else 0o777)
        if trait == "fifo":
            os.mkfifo(os.path.join(self.work, "fifo"))
        return True

    def reachable(self):
        """Whether a user without rights can run the command."""
        asked = subprocess.run([self.command, "--version"], user=NOBODY, group=NOBODY, extra_groups=[],
                               env=self.environment(""), capture_output=True, check=False)  # fmt: skip
        return asked.returncode == 0

    def environment(self, mark):
        keep = {
            k: v for k, v in os.environ.items() if k in ("PATH", "LD_LIBRARY_PATH", "GST_PLUGIN_PATH", "RUST_BACKTRACE")
        }
        return keep | {
            "HOME": os.path.join(self.base, "home"), "TMPDIR": os.path.join(self.base, "tmp"), "LC_ALL": "C.UTF-8",
            "XDG_CACHE_HOME": os.path.join(self.base, "cache"), "VLMNARRATE_JUDGED": mark,
        }  # fmt: skip

    def start(self, arguments, mark, trait="", **more):
        """Starts the command in the kind's folder, in a session of its own."""
        plain = os.geteuid() == 0 and trait in ("unreadable", "read-only")
        if plain:
            more |= {"user": NOBODY, "group": NOBODY, "extra_groups": []}

        def prepare():
            # A shell starts what runs in the background with SIGINT ignored, which children inherit.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if trait == "fsize":
                resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        task = arguments[:1] if arguments[:1] == ["burn"] else []  # the options follow the name of a task
        return subprocess.Popen(
            [self.command, *task, *self.options, *arguments[len(task) :]],
            cwd=self.work, env=self.environment(mark), start_new_session=True,
            preexec_fn=prepare,
            **({"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more),
        )  # fmt: skip

    def run(self, arguments, timeout=60, trait="", stdin=None):
        """Runs the command to its end and looks at what is left."""
        mark = uuid.uuid4().hex
        before = listing(self.work)
        pipe = subprocess.PIPE if stdin else subprocess.DEVNULL
        started = time.monotonic()
        process = self.start(arguments, mark, trait, stdin=pipe)
        if stdin:
            threading.Thread(target=pour, args=(os.path.join(self.work, stdin), process.stdin), daemon=True).start()
            process.stdin = None
        if trait == "fifo":
            fifo, original = os.path.join(self.work, "fifo"), os.path.join(self.work, "in.mkv")
            threading.Thread(target=lambda: pour(original, open(fifo, "wb")), daemon=True).start()
        try:
            out, err = process.communicate(timeout=timeout)
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            code = None
        seconds = time.monotonic() - started
        return self.outcome(code, out, err, seconds, mark, before)

    def outcome(self, code, out, err, seconds, mark, before):
        left = marked(mark)
        if left:
            time.sleep(0.3)  # a killed child takes a moment to be gone
            left = marked(mark)
        for number, _ in left:
            with contextlib.suppress(OSError):
                os.kill(number, signal.SIGKILL)
        after = listing(self.work)
        temporary = sorted(listing(os.path.join(self.base, "tmp")))
        for name in os.listdir(os.path.join(self.base, "tmp")):
            path = os.path.join(self.base, "tmp", name)
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
        return Outcome(
            code, out.decode(errors="replace"), err.decode(errors="replace"), seconds, left,
            sorted(set(after) - set(before)), sorted(name for name in before if after.get(name) != before[name]),
            temporary,
        )  # fmt: skip


def pour(path, pipe):
    with contextlib.suppress(OSError, ValueError), open(path, "rb") as file, pipe:
        shutil.copyfileobj(file, pipe)


def manners(outcome, named, failed, usage=False):
    """What is wrong with how a run ended, whatever it wrote: leftovers, noise, and the words of an error."""
    problems = []
    if outcome.left:
        problems.append("outlived by " + "; ".join(f"{words[:60]}" for _, words in outcome.left))
    if outcome.temporary:
        problems.append(f"temporary files left: {outcome.temporary[:3]}")
    if outcome.changed:
        problems.append(f"changed {outcome.changed[:3]}")
    if noise := NOISE.search(outcome.err):
        line = next(line for line in outcome.err.splitlines() if noise[0] in line)
        problems.append(f"noise on stderr: {line[:100]}")
    if failed and not usage:
        if len(outcome.errors) != 1:
            problems.append(f"{len(outcome.errors)} lines of error: {outcome.err.strip()[-150:]!r}")
        elif named and not any(name in outcome.errors[0] for name in named):
            problems.append(f"the error does not name the file: {outcome.errors[0][:150]!r}")
        elif not REMEDY.search(outcome.errors[0].partition(": ")[2].partition(": ")[2]):
            problems.append(f"the error names no remedy: {outcome.errors[0][:150]!r}")
        if "\x1b" in outcome.err:
            problems.append("control characters of a name reach the terminal")
    elif outcome.errors and not failed:
        problems.append(f"exit status 0 with an error: {outcome.errors[0][:150]!r}")
    return problems
