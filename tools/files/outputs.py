"""Outputs that must be refused, and what must never be lost."""

import os
import re

import media
from bench import manners

IN = "holiday.mp4"


class Case:
    """One run. `prepare` gets the folder; `kept` are files that must stay as they are."""

    def __init__(
        self, name, arguments, expected, says="", prepare=None, kept=(IN,), trait="", made=(), stdin=None, shell=""
    ):
        self.name, self.arguments, self.expected, self.says, self.prepare = name, arguments, expected, says, prepare
        self.kept, self.trait, self.made, self.stdin, self.shell = kept, trait, made, stdin, shell


def old(name, text="yesterday's result\n"):
    def prepare(folder):
        with open(os.path.join(folder, name), "w") as file:
            file.write(text)

    return prepare


def both(*steps):
    return lambda folder: [step(folder) for step in steps]


def link(name, to, hard=False):
    return lambda folder: (os.link if hard else os.symlink)(
        os.path.join(folder, to) if hard else to, os.path.join(folder, name)
    )


def broken(folder):
    """The input's second half is gone, and its index with it."""
    path = os.path.join(folder, IN)
    os.truncate(path, os.path.getsize(path) // 2)


NO = (1, 2)
SAME = "input|same file"
EXISTS = "exist|--force"
CASES = [
    Case("the input itself", ["-o", IN, IN], NO, SAME + "|" + EXISTS),
    Case("the input itself, --force", ["--force", "-o", IN, IN], NO, SAME),
    Case("the input by ./", ["--force", "-o", "./" + IN, IN], NO, SAME),
    Case("the input by its whole path", ["--force", "-o", "{work}/" + IN, IN], NO, SAME),
    Case("the input through ..", ["--force", "-o", "../work/" + IN, IN], NO, SAME),
    Case("the input through a linked folder", ["--force", "-o", "here/" + IN, IN], NO, SAME, link("here", ".")),
    Case(
        "a symlink to the input",
        ["--force", "-o", "link.mp4", IN],
        NO,
        SAME,
        link("link.mp4", IN),
        kept=(IN, "link.mp4"),
    ),
    Case(
        "a hard link of the input",
        ["--force", "-o", "hard.mp4", IN],
        NO,
        SAME,
        link("hard.mp4", IN, True),
        kept=(IN, "hard.mp4"),
    ),
    Case("the input, of which a link is given", ["--force", "-o", IN, "link.mp4"], NO, SAME, link("link.mp4", IN)),
    Case("the input as file:// URL", ["--force", "-o", IN, "file://{work}/" + IN], NO, SAME),
    Case("the input on standard input", ["--force", "-o", IN, "-"], NO, SAME, shell="< " + IN),
    Case("the input, to burn", ["burn", "--force", "-o", IN, IN], NO, SAME),
    Case(
        "the input, named as subtitles",
        ["--force", "-o", "odd.vtt", "odd.vtt"],
        NO,
        SAME,
        lambda folder: os.rename(os.path.join(folder, IN), os.path.join(folder, "odd.vtt")),
        kept=("odd.vtt",),
    ),
    Case("an existing file", ["-o", "out.mkv", IN], NO, EXISTS, old("out.mkv"), kept=(IN, "out.mkv")),
    Case(
        "an existing default output", [IN], NO, EXISTS, old("holiday.narrated.mkv"), kept=(IN, "holiday.narrated.mkv")
    ),
    Case("an existing file, to burn", ["burn", "-o", "out.mp4", IN], NO, EXISTS, old("out.mp4"), kept=(IN, "out.mp4")),
    Case(
        "an existing file, --force, a broken input",
        ["--force", "-o", "out.mkv", IN],
        NO,
        "",
        both(old("out.mkv"), broken),
        kept=(IN, "out.mkv"),
    ),
    Case(
        "existing subtitles, --force, no model",
        ["--force", "--model", "/none", "-o", "out.vtt", IN],
        NO,
        "model",
        old("out.vtt"),
        kept=(IN, "out.vtt"),
    ),
    Case(
        "an existing file, --force, a full disk",
        ["--force", "-o", "out.mkv", IN],
        NO,
        "space|large|full|limit",
        old("out.mkv"),
        kept=(IN, "out.mkv"),
        trait="fsize",
    ),
    Case(
        "an existing file, --force", ["--force", "-o", "out.vtt", IN], (0,), prepare=old("out.vtt"), made=("out.vtt",)
    ),
    Case(
        "an existing link, --force",
        ["--force", "-o", "link.vtt", IN],
        (0,),
        prepare=both(old("real.vtt"), link("link.vtt", "real.vtt")),
        made=("link.vtt",),
    ),
    Case("a link to nothing", ["-o", "link.mkv", IN], (0, 1, 2), "link", link("link.mkv", "nothing.mkv")),
    Case("a missing folder", ["-o", "no/such/out.mkv", IN], NO, "folder|directory"),
    Case(
        "a folder",
        ["--force", "-o", "folder.mkv", IN],
        NO,
        "folder|directory",
        lambda f: os.mkdir(os.path.join(f, "folder.mkv")),
    ),
    Case("a name that ends in /", ["-o", "out.mkv/", IN], NO, "folder|directory|name"),
    Case("a folder, by a file", ["-o", IN + "/out.mkv", IN], NO, "folder|directory"),
    Case("an unknown suffix", ["-o", "out.xyz", IN], NO, "mkv"),
    Case("no suffix", ["-o", "out", IN], NO, "mkv"),
    Case("an empty name", ["-o", "", IN], NO),
    Case("a suffix that burn can't write", ["burn", "-o", "out.vtt", IN], NO, "mp4"),
    Case("a read-only folder", ["-o", "out.mkv", IN], NO, "permission|denied|read-only|write", trait="read-only"),
    Case("/dev/full", ["-o", "/dev/full", IN], NO),
    Case("/dev/full, through a link", ["-o", "full.vtt", "--force", IN], NO, prepare=link("full.vtt", "/dev/full")),
    Case("a FIFO", ["--force", "-o", "pipe.vtt", IN], NO, prepare=lambda f: os.mkfifo(os.path.join(f, "pipe.vtt"))),
    Case("a name of 256 bytes", ["-o", "n" * 252 + ".mkv", IN], NO, "name|long"),
    Case("captions to a full disk", ["-o", "-", IN], (1,), "space|full|written|output", shell="> /dev/full"),
    Case("captions to a pipe that closes", ["-o", "-", IN], (0, 1, 141, -13), shell="| head -n 1"),
    Case("two inputs' outputs", [IN, "other.mp4"], (0, 1, 2), prepare=link("other.mp4", IN)),
    Case("an odd name: file:x.vtt", ["-o", "file:x.vtt", IN], (0,), made=("file:x.vtt",)),
    Case("an odd name: concat:x|y.mkv", ["-o", "concat:x|y.mkv", IN], (0,), made=("concat:x|y.mkv",)),
    Case("an odd name: %03d.mkv", ["-o", "%03d.mkv", IN], (0,), made=("%03d.mkv",)),
    Case("an odd name: two lines", ["-o", "two\nlines.mkv", IN], (0,), made=("two\nlines.mkv",)),
    Case("an odd name: -x.mkv", ["-o", "./-x.mkv", IN], (0,), made=("-x.mkv",)),
    Case("an upper-case suffix", ["-o", "OUT.VTT", IN], (0,), made=("OUT.VTT",)),
    Case("no such option", ["--no-such", IN], (2,), "--no-such"),
    Case("no input", [], (2,)),
    Case("a number of nonsense", ["--prompt", "x", "--max-tokens", "many", IN], (2,), "number"),
]


def judge(case, bench, source, table):
    if not bench.lay(source):
        return table.skip(case.name, "this machine can't arrange it")
    if case.prepare:
        case.prepare(bench.work)
    if case.trait == "read-only":
        if os.geteuid() == 0 and not bench.reachable():
            return table.skip(case.name, "this machine can't arrange it")
        os.chmod(bench.work, 0o555)
    arguments = [word.format(work=bench.work) for word in case.arguments]
    if case.shell:
        outcome = in_shell(case, bench, arguments)
    else:
        outcome = bench.run(arguments, trait=case.trait)
    failed = outcome.code != 0
    usage = outcome.code == 2
    problems = []
    if outcome.code not in case.expected:
        problems.append(
            f"exit status {outcome.code}, not {' or '.join(map(str, case.expected))}: {outcome.err.strip()[-200:]!r}"
        )
    if failed and case.says:
        if not re.search(case.says, outcome.err, re.I):
            problems.append(f"stderr does not say {case.says!r}: {outcome.err.strip()[-200:]!r}")
    problems += [text for text in manners(outcome, [], failed, usage)
                 if not text.startswith("changed")]  # fmt: skip
    problems += [f"lost {name}" for name in outcome.changed if name in case.kept]
    if failed and outcome.added:
        problems.append(f"failed and left {outcome.added}")
    for name in case.made:
        path = os.path.join(bench.work, name)
        if not os.path.exists(path) or os.path.getsize(path) < 60:
            problems.append(f"{name} is not there: {outcome.added}")
        elif os.stat(path).st_mode & 0o777 != 0o644:
            problems.append(f"its mode is {os.stat(path).st_mode & 0o777:o}, not 644")
    said = (outcome.err.strip().splitlines() or [""])[0]
    table.row(case.name, problems, [outcome.code], [said[:160]])


def in_shell(case, bench, arguments):
    """With redirections, the command's own exit status."""
    script = f'"$0" "$@" {case.shell}; exit ${{PIPESTATUS[0]}}'
    command, bench.command = bench.command, "/bin/bash"
    options, bench.options = bench.options, ["-c", script, command, *bench.options]
    try:
        return bench.run(arguments)
    finally:
        bench.command, bench.options = command, options


def narrated_again(bench, source, table):
    """`vlmnarrate a.mp4`, then `vlmnarrate a.narrated.mkv`, then the first again."""
    bench.lay(source)
    first = bench.run([IN])
    second = bench.run(["holiday.narrated.mkv"])
    third = bench.run([IN])
    problems = []
    if (first.code, second.code, third.code) != (0, 0, 1):
        problems.append(f"exit status {first.code}, {second.code}, {third.code}, not 0, 0, 1: {second.err[-200:]!r}")
    for outcome in (first, second, third):
        problems += manners(outcome, [], outcome.code == 1)
    if third.added:
        problems.append(f"left {third.added}")
    path = os.path.join(bench.work, "holiday.narrated.narrated.mkv")
    if os.path.exists(path):
        tracks = [s for s in media.probe(path)["streams"] if s["codec_type"] == "subtitle"]
        if len(tracks) != 2:
            problems.append(f"{len(tracks)} subtitle tracks, not 2")
    else:
        problems.append(f"no holiday.narrated.narrated.mkv, but {second.added}")
    table.row("narrated again", problems, [second.code], [])


def no_ffmpeg(bench, source, table):
    """Without ffmpeg on the PATH: an error with a remedy for copies, none for text."""
    bench.lay(source)
    kept = os.environ["PATH"]
    os.environ["PATH"] = "/nowhere"
    try:
        copied, text = bench.run([IN]), bench.run(["-o", "out.vtt", IN])
    finally:
        os.environ["PATH"] = kept
    problems = manners(copied, [], True) + manners(text, [], False)
    if (copied.code, text.code) != (1, 0):
        problems.append(
            f"exit status {copied.code} and {text.code}, not 1 and 0: {copied.err[-150:]!r} {text.err[-150:]!r}"
        )
    if "ffmpeg" not in copied.err:
        problems.append("the error does not name ffmpeg")
    table.row("no ffmpeg installed", problems, [copied.code], [copied.err.strip()[:160]])


def try_all(bench, folder, table):
    source = os.path.join(folder, "mp4-h264-aac")
    for case in CASES:
        judge(case, bench, source, table)
    narrated_again(bench, source, table)
    no_ffmpeg(bench, source, table)
