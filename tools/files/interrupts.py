"""Signals while a slow model describes: how long the command takes to end, and what it leaves."""

import os
import re
import signal
import subprocess
import threading
import time
import uuid

import media
import slow_model
from bench import LINE, listing, manners, marked
from kinds import ff

CLIP = "long.mp4"


class Reader(threading.Thread):
    """Collects what a pipe gives."""

    def __init__(self, pipe):
        super().__init__(daemon=True)
        self.pipe, self.data = pipe, b""
        self.start()

    def run(self):
        while part := os.read(self.pipe.fileno(), 65536):
            self.data += part

    def captions(self):
        return sum(bool(LINE.match(line)) for line in self.data.decode(errors="replace").splitlines())


class Case:
    """One run of the command with a slow model, which gets signals."""

    def __init__(self, bench, source, arguments, **more):
        bench.lay(source)
        self.bench, self.mark, self.before = bench, uuid.uuid4().hex, listing(bench.work)
        self.process = bench.start(arguments, self.mark, **more)
        self.out, self.err = Reader(self.process.stdout), Reader(self.process.stderr)

    def wait_for(self, captions, patience=120):
        """Waits for so many captions, and returns the mean seconds between them."""
        started, first = time.monotonic(), None
        while self.out.captions() < captions and self.process.poll() is None:
            if first is None and self.out.captions():
                first = time.monotonic(), self.out.captions()
            if time.monotonic() - started > patience:
                break
            time.sleep(0.02)
        now, found = time.monotonic(), self.out.captions()
        return (now - first[0]) / (found - first[1]) if first and found > first[1] else None

    def signal(self, number, group):
        (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self, patience=60):
        """Waits for the end; seconds, and what is left as bench.Outcome."""
        started = time.monotonic()
        try:
            code = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            code = None
        seconds = time.monotonic() - started
        self.out.join(1), self.err.join(1)
        return self.bench.outcome(code, self.out.data, self.err.data, seconds, self.mark, self.before)


def is_whole(path, captions=True):
    """Problems of a file that was to be finished after a signal. `captions` says that they are a track of it."""
    if not os.path.exists(path):
        return ["no file"]
    if path.endswith(".mkv") or path.endswith(".mp4"):
        problems = [text[:200] for text in [media.whole(path)] if text]
        found = media.probe(path)
        captions = [s for s in found["streams"] if s["codec_type"] == "subtitle"]
        cues = [p for s in captions for p in s["packets"] if int(p["size"]) > 2]
        if captions and not cues:
            problems.append("no captions in the file")
        if not float(found["format"].get("duration", 0)) > 0:
            problems.append("the file has no duration")
        for sort in ("video", "audio"):
            if not any(s["packets"] for s in found["streams"] if s["codec_type"] == sort):
                problems.append(f"no {sort} in the file")
        return problems
    with open(path, encoding="utf-8") as file:
        text = file.read()
    cues = len(re.findall("-->", text))
    return [] if cues and text.startswith("WEBVTT") and text.endswith("\n") else [f"{cues} cues, ends {text[-40:]!r}"]


def try_all(bench, folder, model, table):
    if not model:
        model = os.path.join(folder, ".slow-model")
        slow_model.make(model)
    source = os.path.join(folder, ".interrupts")
    if not os.path.exists(source):
        os.makedirs(source)
        # Long, and different in each second, so that no caption is known before.
        ff(
            "-f lavfi -i testsrc2=size=640x360:rate=25:duration=60 -f lavfi -i sine=d=60 {H264} {AAC}",
            os.path.join(source, CLIP),
        )
    # Not optimised, the demo model is slow enough.
    slow = (
        []
        if model == "demo"
        else ["--model", model, "--max-tokens", "20", "--image-splitting=false", "--device", "cpu"]
    )

    def once(name, output, number, group, extra=(), burn=()):
        path = os.path.join(bench.work, output)
        case = Case(bench, source, [*burn, *slow, *extra, "-o", output, "--", CLIP])
        each = case.wait_for(3)
        if case.process.poll() is not None:
            outcome = case.end()
            return table.row(name, [f"ended by itself: {outcome.code} {outcome.err[-200:]!r}"], [""])
        case.signal(number, group)
        outcome = case.end()
        limit = max(1.0, each or 0) + 0.5  # half a second for a busy machine
        problems = manners(outcome, [], failed=False)
        if outcome.code != 128 + number:
            problems.append(f"exit status {outcome.code}, not {128 + number}")
        if outcome.seconds > limit:
            problems.append(f"took {outcome.seconds:.1f} s; a caption takes {each or 0:.1f} s")
        if [added for added in outcome.added if added != output]:
            problems.append(f"left {outcome.added}")
        problems += is_whole(path, captions=not burn)
        cues = len(outcome.captions)
        table.row(name, problems, [f"{outcome.seconds:.2f}"], [f"{cues} captions, one takes {each or 0:.1f} s"])

    once("SIGINT to all, MKV", "out.mkv", signal.SIGINT, True)
    once("SIGTERM to the command, MKV", "out.mkv", signal.SIGTERM, False)
    once("SIGINT to all, MP4", "out.mp4", signal.SIGINT, True)
    once("SIGINT to all, WebVTT", "out.vtt", signal.SIGINT, True)
    once("SIGINT to all, burn", "out.mp4", signal.SIGINT, True, burn=["burn"])
    twice(bench, source, slow, table)
    early(bench, source, slow, table)
    killed(bench, source, slow, table)
    existing(bench, source, slow, table)
    endless(bench, source, table)


def twice(bench, source, slow, table):
    case = Case(bench, source, [*slow, "-o", "out.mkv", CLIP])
    case.wait_for(2)
    case.signal(signal.SIGINT, True)
    time.sleep(0.05)
    case.signal(signal.SIGINT, True)
    outcome = case.end()
    problems = manners(outcome, [], failed=False)
    if outcome.code != 130:
        problems.append(f"exit status {outcome.code}, not 130")
    if outcome.seconds > 0.3:
        problems.append(f"took {outcome.seconds:.2f} s")
    if outcome.added:  # it was finished between the signals
        problems += [f"left {outcome.added}: {text}" for text in is_whole(os.path.join(bench.work, "out.mkv"))]
    table.row("SIGINT twice", problems, [f"{outcome.seconds:.2f}"], [f"left {outcome.added}"] if outcome.added else [])


def early(bench, source, slow, table):
    """While the model is loaded or the file is looked at, before any caption."""
    for delay in (0.02, 0.2, 1.0):
        case = Case(bench, source, [*slow, "-o", "out.mkv", CLIP])
        time.sleep(delay)
        case.signal(signal.SIGINT, True)
        outcome = case.end()
        problems = [] if outcome.code in (130, -2) else [f"exit status {outcome.code}, not 130"]
        problems += manners(outcome, [], failed=False)
        if outcome.seconds > 2.5:
            problems.append(f"took {outcome.seconds:.2f} s")
        if [name for name in outcome.added if name != "out.mkv"]:
            problems.append(f"left {outcome.added}")
        table.row(
            f"SIGINT after {delay} s",
            problems,
            [f"{outcome.seconds:.2f}"],
            [f"left {outcome.added}"] if outcome.added else [],
        )


def killed(bench, source, slow, table):
    """SIGKILL: nothing can be tidied, but no child may go on."""
    case = Case(bench, source, [*slow, "-o", "out.mkv", CLIP])
    case.wait_for(2)
    children = len(marked(case.mark)) - 1
    case.signal(signal.SIGKILL, False)
    case.process.wait()
    time.sleep(1)
    left = marked(case.mark)
    outcome = case.end()
    problems = [f"{words[:80]} goes on" for _, words in left]
    if children < 1:
        problems.append("there was no child to be left")
    if "out.mkv" in outcome.added:
        problems.append("an unfinished file has the output's name")
    table.row(
        "SIGKILL",
        problems,
        [f"{outcome.seconds:.2f}"],
        [f"{children} children before, {len(left)} after 1 s", f"left {outcome.added}"],
    )


def existing(bench, source, slow, table):
    """A second signal must not cost what was there before."""
    case = Case(bench, source, [*slow, "--force", "-o", "out.vtt", CLIP])
    with open(os.path.join(bench.work, "out.vtt"), "w") as file:
        file.write("old\n")
    case.before = listing(bench.work)
    case.wait_for(2)
    case.signal(signal.SIGINT, True)
    time.sleep(0.02)
    case.signal(signal.SIGINT, True)
    outcome = case.end()
    with open(os.path.join(bench.work, "out.vtt")) as file:
        text = file.read()
    problems = (
        []
        if text == "old\n" or text.startswith("WEBVTT") and text.count("-->")
        else [f"the old file became {text[:80]!r}"]
    )
    table.row(
        "SIGINT twice, --force",
        problems,
        [f"{outcome.seconds:.2f}"],
        ["old file kept" if text == "old\n" else "replaced"],
    )


def endless(bench, source, table):
    """A stream on standard input that never ends."""
    feed = subprocess.Popen(
        ["ffmpeg", "-v", "quiet", "-nostdin", "-re", "-f", "lavfi", "-i", "testsrc2=size=320x180:rate=25",
         "-c:v", "libx264", "-preset", "ultrafast", "-tune", "zerolatency", "-g", "25", "-f", "mpegts", "-"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        case = Case(bench, source, ["-o", "out.vtt", "-"], stdin=feed.stdout)
        each = case.wait_for(3)
        case.signal(signal.SIGINT, False)
        outcome = case.end()
    finally:
        feed.kill()
        feed.wait()
    problems = manners(outcome, [], failed=False) + is_whole(os.path.join(bench.work, "out.vtt"))
    if outcome.code != 130:
        problems.append(f"exit status {outcome.code}, not 130: {outcome.err[-150:]!r}")
    if outcome.seconds > max(1.0, each or 0) + 0.5:
        problems.append(f"took {outcome.seconds:.2f} s")
    table.row("SIGINT, an endless pipe", problems, [f"{outcome.seconds:.2f}"], [f"{len(outcome.captions)} captions"])
