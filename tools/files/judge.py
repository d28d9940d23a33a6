#!/usr/bin/python3
"""Runs `vlmnarrate` over the files of make.py and judges what comes of them, as a table in Markdown.

    tools/files/judge.py FOLDER target/debug/vlmnarrate [--only PATTERN] [--formats] [--outputs] [--interrupts]

Without a switch every kind is narrated twice, into the default MKV and into JSON lines, and compared: exit status,
error, captions, packets and times of every stream, chapters, tags, fonts, dispositions, HDR and rotation, the input's
bytes, what is left in the folder, and processes. --formats tries the other formats and `burn` on some kinds,
--outputs files that must not be written, --interrupts signals. Exits 1 if anything is not as expected. As root some
kinds are run as another user.
"""

import argparse
import json
import os
import re
import sys
import tempfile

import containers  # noqa: F401
import formats
import interrupts
import media
import outputs
import pictures  # noqa: F401
import trouble  # noqa: F401
from bench import Bench, manners
from kinds import select
from serve import servers


class Table:
    """Rows of Markdown, printed as they come, and how many are as expected."""

    def __init__(self, columns):
        self.good = self.bad = self.skipped = 0
        print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)

    def row(self, name, problems, cells, notes=()):
        result = "**" + "FAILED" + "**" if problems else "ok"
        self.bad, self.good = self.bad + bool(problems), self.good + (not problems)
        text = "; ".join([*problems, *notes]).replace("|", "\\|").replace("\n", " ")
        text = "".join(c if c.isprintable() else "�" for c in text)
        print("| " + " | ".join([name, result, *map(str, cells), text[:700]]) + " |", flush=True)

    def skip(self, name, why):
        self.skipped += 1
        print(f"| {name} | skipped | | {why} |", flush=True)

    def end(self):
        print(f"\n{self.good} as expected, {self.bad} not, {self.skipped} skipped.", flush=True)
        return self.bad


def default_output(name):
    folder, file = os.path.split(name)
    return os.path.join(folder, os.path.splitext(file)[0] + ".narrated.mkv")


def arguments_of(kind, addresses):
    """The input's words on the command line; None if this machine has no such server."""
    if not kind.arguments:
        return ["--", kind.file]
    if "{rtsp}" in kind.arguments and not addresses["rtsp"]:
        return None
    return ["--", kind.arguments.format(here=".", **addresses)]


def says(kind, outcome, problems):
    if kind.warns and not re.search(kind.warns, outcome.err, re.I):
        problems.append(f"stderr does not say {kind.warns!r}: {outcome.err.strip()[-150:]!r}")
    live = kind.arguments.startswith("{rtsp}") and "live" in outcome.err  # refused before the server is asked
    if outcome.code not in (0, None) and kind.says and not live and not re.search(kind.says, outcome.err, re.I):
        problems.append(f"stderr does not say {kind.says!r}: {outcome.err.strip()[-150:]!r}")


def ended(kind, outcome, expected, named):
    """Problems that do not depend on the output's format."""
    if outcome.code is None:
        return [f"did not end in {kind.timeout} s"]
    problems = []
    if outcome.code not in expected:
        problems.append(
            f"exit status {outcome.code}, not {' or '.join(map(str, expected))}: {outcome.err.strip()[-200:]!r}"
        )
    problems += manners(outcome, named, failed=outcome.code != 0)
    says(kind, outcome, problems)
    return problems


def count(kind, outcome, problems):
    found = len(outcome.captions)
    if not 1 <= found <= kind.captions + 1:
        problems.append(f"{found} captions on stdout for {kind.captions} s")
    return found


def json_lines(kind, bench, words, named):
    """Narrates into JSON lines in another folder."""
    path = os.path.join(bench.base, "out", "captions.jsonl")
    trait = kind.trait if kind.trait != "fsize" else ""
    outcome = bench.run(["-o", path, *words], kind.timeout, trait, kind.stdin)
    problems = ended(kind, outcome, kind.exit, named)
    if outcome.added:
        problems.append(f"left {outcome.added[:3]}")
    written = sorted(os.listdir(os.path.dirname(path)))
    if outcome.code != 0:
        if written and " ends at " not in "".join(outcome.errors):
            problems.append(f"failed and left {written}")
        return problems, 0
    if written != ["captions.jsonl"]:
        problems.append(f"wrote {written}")
        return problems, 0
    with open(path, encoding="utf-8") as file:
        try:
            lines = [json.loads(line) for line in file]
        except ValueError as error:
            return [*problems, f"no JSON: {error}"], 0
    if not 1 <= len(lines) <= kind.captions + 1:
        problems.append(f"{len(lines)} lines for {kind.captions} s")
    if any(not line.get("text") for line in lines):
        problems.append("a line without a text")
    return problems, len(lines)


def kept_part(outcome, path):
    """Whether an error says that the output has what was described until then, and it can be read."""
    return " ends at " in "".join(outcome.errors) and media.probe(path)["streams"]


def copy(kind, bench, words, named, original):
    """Narrates into the default MKV, and compares it with its input."""
    served = kind.arguments != "" or kind.name.startswith("still-")  # a picture has no narrated copy by default
    output = "out.mkv" if served else default_output(kind.file)
    extra = ["-o", output] if served else []
    outcome = bench.run([*extra, *words], kind.timeout, kind.trait, kind.stdin)
    # What Matroska can't hold, a rotation, goes into an MP4.
    if not extra and output.removesuffix(".mkv") + ".mp4" in outcome.added:
        output = output.removesuffix(".mkv") + ".mp4"
    # A read-only folder, a full disk and an endless name concern the output: the error names that.
    problems = ended(kind, outcome, kind.copy_exit, [*named, os.path.basename(output)])
    added = [name for name in outcome.added if name != output]
    if added:
        problems.append(f"left {added[:3]}")
    path = os.path.join(bench.work, output)
    if outcome.code != 0:
        if output in outcome.added and not kept_part(outcome, path):
            problems.append("failed and left an output")
        return problems, [], "" if outcome.code is None else "no", 0
    if output not in outcome.added:
        return [*problems, "exit status 0 and no output"], [], "no", 0
    found = count(kind, outcome, problems)
    report = media.compare(os.path.join(bench.work, original), path, kind, outcome.err)
    damaged = kind.name.startswith(("truncated", "corrupt", "unfinalised", "hls-missing", "http-cut"))
    if not damaged and (faults := media.whole(path)) and not media.whole(os.path.join(bench.work, original)):
        problems.append(f"ffmpeg can't decode the output: {faults[:150]}")
    return problems + report.problems, report.notes, report.compared, found


def judge(kind, bench, source, addresses, serve, table):
    words = arguments_of(kind, addresses)
    if words is None:
        return table.skip(kind.name, "no server for it on this machine")
    if not os.path.isdir(source):
        return table.skip(kind.name, "not made")
    named = [os.path.basename(words[-1])] if kind.arguments != "-" else ["standard input", "-: "]
    if any(not c.isprintable() or "\udc80" <= c <= "\udcff" for c in named[0]):
        named = []  # shown in another way
    results = []
    for step in (copy, json_lines):
        if not bench.lay(source, kind.trait):
            return table.skip(kind.name, "this machine can't arrange it")
        serve(bench.work)
        results.append(step(kind, bench, words, named, *([kind.original or kind.file] if step is copy else [])))
    (problems, notes, streams, captions), (more, lines) = results
    problems += [f"jsonl: {text}" for text in more]
    table.row(kind.name, problems, [captions or lines or "", streams], notes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("command")
    parser.add_argument("--only", metavar="PATTERN", help="kinds whose name the regular expression matches")
    parser.add_argument("--formats", action="store_true", help="try the other formats and burn, not all kinds")
    parser.add_argument("--outputs", action="store_true", help="try outputs that must be refused")
    parser.add_argument("--interrupts", action="store_true", help="send signals")
    parser.add_argument(
        "--slow-model", metavar="FOLDER", help="for --interrupts: a slow checkpoint instead of one made here, or demo"
    )
    parser.add_argument("--timeout", type=int, help="seconds for one run, instead of what a kind allows")
    options = parser.parse_args()
    folder = os.path.abspath(options.folder)
    bench = Bench(options.command, ["--interval", "1s"])
    try:
        with tempfile.TemporaryDirectory() as keys, servers(keys) as (serve, addresses):
            if options.outputs:
                table = Table(["output", "result", "note"])
                outputs.try_all(bench, folder, table)
            elif options.interrupts:
                table = Table(["interrupt", "result", "seconds", "note"])
                interrupts.try_all(bench, folder, options.slow_model, table)
            elif options.formats:
                table = Table(["kind, format", "result", "captions", "note"])
                formats.try_all(bench, folder, options.only, table)
            else:
                table = Table(["kind", "result", "captions", "streams compared", "note"])
                for kind in select(options.only):
                    kind.timeout = options.timeout or kind.timeout
                    judge(kind, bench, os.path.join(folder, kind.name), addresses, serve, table)
            return table.end() > 0
    finally:
        bench.close()


if __name__ == "__main__":
    sys.exit(main())
