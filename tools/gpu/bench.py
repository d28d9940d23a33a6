"""Time captions of one frame on a GPU in vlmnarrate and in what PyTorch makes of the same weights, in turn, in one run.

    python bench.py MODELS OUT --gpu PROGRAM [--models MODEL …] [--compiled MODEL …]

MODELS is what weights.py has made, PROGRAM the built benches/gpu.rs. All engines of a model load at once, and who has
no first caption within the limit is left out; then each stands still while another has its turn, in which its first
caption is not counted. Writes OUT/gpu.json and OUT/gpu.md anew after each model, and what engines say in --logs.
"""

import argparse
import concurrent.futures
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

PEERS = Path(__file__).resolve().parents[1] / "peers"
sys.path.insert(0, str(PEERS))
import engines  # noqa: E402
from compare import Ended, Engine, medians  # noqa: E402

SIDES = {"256m": 512, "500m": 512, "2.2b": 384}
SCENES = {"vlmnarrate": "cut", "vlmnarrate, slow change": "slow", "vlmnarrate, no change": "static"}
COMPILED = "pytorch-compiled"
THREADS = min(8, len(os.sched_getaffinity(0)))


def ours(options, model, *rest):
    folder = options.folder / model / "checkpoint"
    return [str(options.gpu), str(folder), str(options.side or SIDES[model]), "bf16", *map(str, rest)]


def program(options, model, name):
    if name in SCENES:
        return ours(options, model, SCENES[name], engines.TOKENS)
    side = str(options.side or SIDES[model])
    peer = [name, str(options.folder / model), side, str(THREADS), options.device]
    return [sys.executable, str(PEERS / "engines.py"), *peer]


def first_caption(engine, limit):
    """None, or why there is none."""
    late = threading.Timer(limit, engine.end)
    late.start()
    start = time.monotonic()
    try:
        engine.load()
        engine.run()
    except (Ended, OSError):
        return f"not within {limit} s" if time.monotonic() - start > limit else f"ended: see {engine.log}"
    finally:
        late.cancel()
    print(f"  {engine.name}: first caption after {time.monotonic() - start:.0f} s", flush=True)
    return None


def memory_of_the_card():
    """MiB that each process has of it, where the driver tells."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines()
        return {int(pid): float(used) for pid, used in (line.split(",") for line in lines)}
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return {}


def compare(options, model):
    """Raw times of each engine, and the reasons of those that have none."""
    running, found = [], {}
    names = [*SCENES, *(name for name in engines.ON_GPU if name != COMPILED or model in options.compiled)]
    try:
        for name in names:
            log = f"{model}-{name.replace(', ', '-').replace(' ', '-')}.log"
            with (options.logs / log).open("w") as file:
                engine = Engine(name, program(options, model, name), THREADS, file)
            engine.log = log
            running.append(engine)
        with concurrent.futures.ThreadPoolExecutor(len(running)) as pool:
            try:
                reasons = list(pool.map(first_caption, running, [options.limit] * len(running)))
            except SystemExit:
                # The pool waits for its threads, and they for their engines.
                for engine in running:
                    engine.end()
                raise
        found = {engine.name: {"failed": reason} for engine, reason in zip(running, reasons) if reason}
        able = [engine for engine in running if engine.name not in found]
        for _ in range(options.rounds):
            for engine in able:
                if engine.name in found:
                    continue
                try:
                    # As in a stream that goes on: clock and caches are as the caption before left them.
                    engine.run()
                    engine.times += [engine.run() for _ in range(options.captions)]
                except (Ended, OSError):
                    found[engine.name] = {"failed": f"ended: see {engine.log}"}
        used = memory_of_the_card()
        for engine in able:
            raw = {"times": engine.times, "peak": engine.peak, "card_mib": used.get(engine.process.pid)}
            found.setdefault(engine.name, raw)
    finally:
        for engine in running:
            engine.end()
    return {name: found[name] for name in names}


def throughput(options, model):
    """Captions a second of one caller, and of several in one process."""
    found = {}
    for callers in [1, options.callers]:
        command = ours(options, model, "callers", callers, options.seconds)
        log = options.logs / f"{model}-callers-{callers}.log"
        try:
            with log.open("w") as file:
                pipes = {"stdout": subprocess.PIPE, "stderr": file, "text": True}
                said = subprocess.run(command, timeout=options.seconds + 60, **pipes).stdout
            found[callers] = json.loads(said.splitlines()[-1])["captions_per_second"]
        except (OSError, ValueError, IndexError, KeyError, subprocess.TimeoutExpired) as error:
            print(f"  {callers} callers: {error!r}: see {log.name}", flush=True)
    return found


def machine(device):
    import torch
    import transformers

    card = "no GPU"
    if device.startswith("cuda"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            said = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines()
            card = "{}, driver {}".format(*said[0].split(", "))
        except (OSError, IndexError, subprocess.TimeoutExpired):
            card = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"date": datetime.date.today().isoformat(), "card": card, **versions}


def table(facts):
    """What was found, for a reader."""
    lines = [f"{facts['date']}, {facts['card']}, torch {facts['torch']}, transformers {facts['transformers']}: bf16,"]
    lines += [f"{engines.TOKENS} tokens, median of {facts['captions']} captions, one picture at a time.", ""]
    heads = ["vision ms", "prefill ms", "ms a token", "total ms", "of the best peer", "MiB of the card"]
    lines += [f"| SmolVLM | | {' | '.join(heads)} |", "|---|---|---|---|---|---|---|---|"]
    for model, found in facts["models"].items():
        timed = {name: medians(raw["times"]) for name, raw in found["engines"].items() if "times" in raw}
        best = min((total for name, (_, total) in timed.items() if name in engines.ON_GPU), default=None)
        for name, raw in found["engines"].items():
            head = f"| {model}, {found['side']} px | {name} |"
            if "failed" in raw:
                lines.append(f"{head} {raw['failed']} | | | | | |")
                continue
            (vision, prefill, decode), total = timed[name]
            numbers = f"{vision:.2f} | {prefill:.2f} | {decode / (engines.TOKENS - 1):.3f} | {total:.2f}"
            ratio = f"{total / best:.2f}" if best else ""
            used = f"{raw['card_mib']:.0f}" if raw["card_mib"] else ""
            lines.append(f"{head} {numbers} | {ratio} | {used} |")
    lines += ["", "| SmolVLM | callers in one process | captions a second |", "|---|---|---|"]
    for model, found in facts["models"].items():
        lines += [f"| {model} | {callers} | {rate:.1f} |" for callers, rate in found["callers"].items()]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="MODELS")
    parser.add_argument("out", type=Path)
    some = {"choices": SIDES, "metavar": "MODEL"}
    parser.add_argument("--models", nargs="+", default=list(SIDES), **some)
    parser.add_argument("--gpu", type=Path, required=True, help="the built benches/gpu.rs")
    parser.add_argument("--logs", type=Path, default=Path("logs"))
    parser.add_argument("--device", default="cuda", help="of the peers, as torch names it")
    parser.add_argument("--side", type=int, help="of the picture, instead of the usual one")
    parser.add_argument("--compiled", nargs="*", default=["256m"], **some, help="for which PyTorch compiles, too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--captions", type=int, default=4, help="a round")
    parser.add_argument("--limit", type=int, default=120, help="seconds until an engine's first caption")
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=2, help="for each number of callers")
    options = parser.parse_args()
    # So that what is stopped from outside leaves no engine behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped: the table has what was found until then"))
    for folder in [options.out, options.logs]:
        folder.mkdir(parents=True, exist_ok=True)
    facts = machine(options.device) | {"captions": options.rounds * options.captions, "models": {}}
    for model in options.models:
        start = time.monotonic()
        print(f"{model}:", flush=True)
        found = {"side": options.side or SIDES[model], "engines": compare(options, model), "callers": {}}
        facts["models"][model] = found
        if "times" in found["engines"]["vlmnarrate"]:
            found["callers"] = throughput(options, model)
        found["seconds"] = round(time.monotonic() - start, 1)
        print(f"  {found['seconds']:.0f} s", flush=True)
        (options.out / "gpu.json").write_text(json.dumps(facts) + "\n")
        (options.out / "gpu.md").write_text(table(facts))
    failed = [name for found in facts["models"].values() for name, raw in found["engines"].items() if "failed" in raw]
    sys.exit(f"without {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
