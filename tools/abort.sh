#!/usr/bin/env bash
# Builds the plugin with panic=abort, as an application that links it may be built, and shows that nothing is done by a
# panic that is caught: here one ends the process, and with it this script. A download is cancelled, a caption made,
# models and captions are given up and broken files refused. What comes behind goes to cargo.
#
# All is built anew, in the profile `abort`: that takes many minutes, so it isn't a part of what runs on every change.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh
[ -e "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"

cargo build --profile abort --lib "$@"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/plugins"
ln -s "$(realpath "${CARGO_TARGET_DIR:-target}/abort/libgstvlmnarrate.so")" "$work/plugins/"
export G_DEBUG=fatal-warnings GST_PLUGIN_PATH=$work/plugins GST_REGISTRY=$work/registry HF_HOME=$work/hub WORK=$work
unset HF_ENDPOINT HF_HUB_CACHE HUGGINGFACE_HUB_CACHE HF_HUB_OFFLINE TRANSFORMERS_OFFLINE \
    HTTP_PROXY http_proxy HTTPS_PROXY https_proxy ALL_PROXY all_proxy

/usr/bin/python3 - <<'PYTHON'
import os
import pathlib
import random
import shutil
import socket
import threading
import time

import gi

gi.require_version("Gst", "1.0")
from gi.repository import Gst

# A server that takes a request and says nothing.
server = socket.create_server(("127.0.0.1", 0))
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:%d" % server.getsockname()[1]
asked = threading.Event()
connections = []


def serve():
    connection, _ = server.accept()
    connections.append(connection)
    connection.recv(1)
    asked.set()


def element(**properties):
    made = Gst.ElementFactory.make("vlmnarrate")
    bus = Gst.Bus.new()
    made.set_bus(bus)
    for name, value in properties.items():
        made.set_property(name, value)
    return made, bus


def a_download_is_cancelled():
    threading.Thread(target=serve, daemon=True).start()
    narrator, bus = element(model="owner/none")
    narrator.set_state(Gst.State.READY)
    assert asked.wait(60), "nothing was asked"
    start = time.monotonic()
    narrator.set_state(Gst.State.NULL)
    assert bus.pop_filtered(Gst.MessageType.ERROR) is None
    print("a download cancelled in %.0f ms" % (1000 * (time.monotonic() - start)))


def captions(properties, patience):
    """Narrates until the first caption or partial caption, or for so many seconds, and goes to NULL at once."""
    pipeline = Gst.parse_launch(
        "videotestsrc is-live=true pattern=red ! video/x-raw,width=64,height=48,framerate=25/1 ! vlmnarrate "
        + properties
        + " ! fakesink"
    )
    bus = pipeline.get_bus()
    pipeline.set_state(Gst.State.PLAYING)
    message = bus.timed_pop_filtered(int(patience * Gst.SECOND), Gst.MessageType.ELEMENT | Gst.MessageType.ERROR)
    pipeline.set_state(Gst.State.NULL)
    assert message is None or message.type == Gst.MessageType.ELEMENT, message.parse_error()
    return message and message.get_structure()


def a_caption_is_made():
    start = time.monotonic()
    caption = captions("", 300)
    assert caption and "red" in caption.get_value("text"), caption
    print("a caption made in %.1f s" % (time.monotonic() - start))
    return time.monotonic() - start


def a_model_is_given_up_while_it_loads(longest):
    made = [captions("", longest * part / 20) for part in range(20)]
    unmade = sum(caption is None for caption in made)
    assert unmade >= 10, "there was a caption already"
    print("NULL %d times before the first caption" % unmade)


def a_caption_is_given_up():
    """After its first word."""
    for _ in range(5):
        caption = captions("interval=0 partial-captions=true", 300)
        assert caption and caption.get_value("partial"), caption
    print("NULL 5 times within a caption")


def files_are_broken():
    """Cut short or changed at random, each file of the demo model in turn."""
    chance = random.Random(7)
    refused = 0
    for file in sorted(pathlib.Path("models/demo").iterdir()):
        if file.suffix == ".md":
            continue
        whole = file.read_bytes()
        for kind in ["empty", "half", "noise", "missing"]:
            folder = pathlib.Path(os.environ["WORK"], "model")
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree("models/demo", folder)
            if kind == "missing":
                (folder / file.name).unlink()
            else:
                content = bytearray(whole[: {"empty": 0, "half": len(whole) // 2}.get(kind)])
                for _ in range(20 if kind == "noise" else 0):
                    content[chance.randrange(min(2000, len(content)))] = chance.randrange(256)
                (folder / file.name).write_bytes(content)
            narrator, bus = element(model=str(folder))
            narrator.set_state(Gst.State.READY)
            # Without the others there may be a model all the same.
            is_needed = file.name in ["config.json", "model.safetensors", "tokenizer.json"]
            message = bus.timed_pop_filtered((60 if is_needed else 1) * Gst.SECOND, Gst.MessageType.ERROR)
            narrator.set_state(Gst.State.NULL)
            refused += message is not None
            assert message or not is_needed, f"{file.name}, {kind}: no error"
    print("%d broken models refused" % refused)


Gst.init(None)
a_download_is_cancelled()
longest = a_caption_is_made()
a_model_is_given_up_while_it_loads(longest)
a_caption_is_given_up()
files_are_broken()
PYTHON
