"""Time a caption of one frame in vlmnarrate and in what a user could take instead, in turn, in one run.

    python compare.py OUT [--model 256m] [--side 512] [--rounds 5] [--engines NAME …]

OUT is what prepare.py has made. Each engine is a process that stands still while another has its turn. Prints a table
of medians, their ratio to the best peer's and peak memory, and leaves the raw times in OUT.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import engines

HERE = Path(__file__).resolve().parent
STAGES = ["vision", "prefill", "decode"]
OURS = {
    "vlmnarrate-f32": ["none", "cut"],
    "vlmnarrate-q8-0": ["q8-0", "cut"],
    "vlmnarrate-q4-0": ["q4-0", "cut"],
    "vlmnarrate-q8-0-static": ["q8-0", "static"],
}


def ours(checkpoint, side, threads, *rest):
    program = ["cargo", "bench", "--quiet", "--bench", "caption", "--"]
    # Cargo runs it in its package's folder.
    return [*program, *map(str, [Path(checkpoint).resolve(), side, threads, *rest])]


def program(name, folder, side, threads):
    if name in OURS:
        return ours(folder / "checkpoint", side, threads, *OURS[name])
    return [sys.executable, str(HERE / "engines.py"), name, str(folder), str(side), str(threads)]


class Ended(SystemExit):
    """An engine is no more."""


class Engine:
    def __init__(self, name, program, threads, log=subprocess.DEVNULL):
        self.name, self.times, self.peak = name, [], 0
        limits = dict.fromkeys(["OMP_NUM_THREADS", "CANDLE_NUM_THREADS", "RAYON_NUM_THREADS"], str(threads))
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
        self.process = subprocess.Popen(program, env=os.environ | limits, start_new_session=True, **pipe)

    def load(self):
        self.read()
        self.rest()

    def read(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise Ended(f"{self.name} ended: run it alone to see why")

    def rest(self):
        os.killpg(self.process.pid, signal.SIGSTOP)

    def run(self):
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        said = self.read()
        self.rest()
        self.peak = said.pop("peak")
        return said

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


WANTED = "avx2 fma f16c avx_vnni avx512f avx512_vnni avx512_bf16 amx_bf16 amx_int8 asimd asimddp i8mm bf16"


def features():
    """What of the processor counts here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    has = set(next(line for line in lines if line.startswith(("flags", "Features"))).split())
    return [name for name in WANTED.split() if name in has]


def worth_a_try():
    """Without instructions for bf16 PyTorch takes many times as long with it."""
    has_bf16 = any("bf16" in name for name in features())
    return [name for name in engines.ENGINES if has_bf16 or "bf16" not in name]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="256m")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    names = [*OURS, *engines.ENGINES]
    parser.add_argument("--engines", nargs="+", default=[*OURS, *worth_a_try()], choices=names, metavar="NAME")
    options = parser.parse_args()
    folder = options.out / options.model
    side, threads = options.side, options.threads
    programs = {name: (program(name, folder, side, threads), threads) for name in options.engines}
    report(take_turns(programs, options.rounds), options)


def take_turns(programs, rounds):
    """Each in turn, once for nothing and then so often."""
    running = []
    try:
        for name, (program, threads) in programs.items():
            print(f"{name} loads", file=sys.stderr, flush=True)
            running.append(Engine(name, program, threads))
            running[-1].load()
        for engine in running:
            print(f"{engine.name} makes its first caption", file=sys.stderr, flush=True)
            engine.run()
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            for engine in running:
                engine.times.append(engine.run())
    finally:
        for engine in running:
            engine.end()
    return running


def medians(times):
    """Of each stage, and of all together."""
    stages = [statistics.median(t[stage] for t in times) for stage in STAGES]
    return stages, statistics.median(sum(t[stage] for stage in STAGES) for t in times)


def report(running, options):
    rows = [(engine.name, *medians(engine.times), engine.peak) for engine in running]
    peers = [row for row in rows if row[0] not in OURS]
    best = min(row[2] for row in peers) if peers else float("nan")
    machine = f"{platform.machine()} with {' '.join(features())}"
    print(f"SmolVLM {options.model}, {options.side} px, {engines.TOKENS} tokens, {options.threads} threads, {machine}\n")
    heads = ["vision ms", "prefill ms", "ms a token", "total ms", "of the best peer", "peak MiB"]
    print(f"| median of {options.rounds} | {' | '.join(heads)} |")
    print("|---|---|---|---|---|---|---|")
    for name, (vision, prefill, decode), total, peak in sorted(rows, key=lambda row: row[2]):
        token = decode / (engines.TOKENS - 1)
        print(f"| {name} | {vision:.0f} | {prefill:.0f} | {token:.1f} | {total:.0f}", end="")
        print(f" | {total / best:.2f} | {peak:.0f} |")
    raw = {engine.name: {"times": engine.times, "peak": engine.peak} for engine in running}
    (options.out / f"{options.model}-{options.side}.json").write_text(json.dumps(raw) + "\n")


if __name__ == "__main__":
    main()
