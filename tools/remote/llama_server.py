"""What llama-server.sh tries: captions, choices, a cancelled request and errors, through a real llama-server.

    /usr/bin/python3 llama_server.py PROGRAM LOG

The model has random weights, and what it says is nonsense: only a grammar makes it text that the server takes for text.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import gi

gi.require_version("Gst", "1.0")
from gi.repository import Gst  # noqa: E402

DATA = Path(__file__).resolve().parents[2] / "tests" / "data" / "gguf"
KEY = "sesame"
WORDS = {"grammar": "root ::= [a-z ]+"}
# Minutes of text, if nobody closes the connection.
ENDLESS = WORDS | {"ignore_eos": True, "max_tokens": 7000}
PATIENCE = 60  # seconds, for what takes one


def get(url):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def wait_for(what, condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {PATIENCE} s")
        time.sleep(0.01)


@contextlib.contextmanager
def server(program, log):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [program, "-m", DATA / "SmolVLM-Small-BF16.gguf", "--mmproj", DATA / "mmproj-SmolVLM-Small-BF16.gguf",
               "--alias", "small", "-t", "1", "-np", "2", "-c", "16384", "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    with open(log, "w") as file:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=file, stderr=file, env=os.environ | {"LLAMA_API_KEY": KEY}
        )
    base = f"http://127.0.0.1:{port}"

    def ready():
        if process.poll() is not None:
            raise AssertionError(f"llama-server has ended: {log}")
        try:
            return get(f"{base}/health") == {"status": "ok"}
        except (urllib.error.URLError, OSError):
            return False

    try:
        wait_for("llama-server starts", ready)
        yield base
    finally:
        process.kill()
        process.wait()


class Run:
    """A pipeline on this server, and what it posts."""

    def __init__(self, base, properties="", options=WORDS, choices=None, buffers=3):
        self.pipeline = Gst.parse_launch(
            f"videotestsrc num-buffers={buffers} ! video/x-raw,width=320,height=180,framerate=1/1 ! vlmnarrate name=n "
            f"mode=recorded interval=0 endpoint={base}/v1 {properties} ! fakesink sync=false"
        )
        narrator = self.pipeline.get_by_name("n")
        narrator.set_property("request-options", options and json.dumps(options))
        narrator.set_property("choices", choices and "|".join(choices))
        self.captions, self.error = [], None
        self.pipeline.set_state(Gst.State.PLAYING)

    def to_end(self):
        """The captions, or the error, up to the end."""
        wanted = Gst.MessageType.ELEMENT | Gst.MessageType.EOS | Gst.MessageType.ERROR
        while True:
            message = self.pipeline.get_bus().timed_pop_filtered(PATIENCE * Gst.SECOND, wanted)
            assert message is not None, f"nothing for {PATIENCE} s"
            if message.type == Gst.MessageType.ERROR:
                error, detail = message.parse_error()
                self.error = f"{error.message} ({detail})"
            if message.type != Gst.MessageType.ELEMENT:
                self.pipeline.set_state(Gst.State.NULL)
                return self
            structure = message.get_structure()
            if structure.get_name() == "vlmnarrate":
                self.captions.append(structure)


def describes(base):
    run = Run(base, "max-tokens=8").to_end()
    assert run.error is None and len(run.captions) == 3, (run.error, len(run.captions))
    for caption in run.captions:
        assert caption.get_string("text").strip(), caption.to_string()
        assert caption.get_string("device") == "remote", caption.to_string()
        assert caption.get_string("device-name") == base.removeprefix("http://"), caption.to_string()
        assert caption.get_string("model") == "small", caption.to_string()


def takes_clips_and_settings(base):
    settings = "system-prompt=Brief. max-tokens=6 repetition-penalty=1.1 seed=7 temperature=0.5 top-k=40 min-p=0.1"
    run = Run(base, f"frames=3 {settings}").to_end()
    assert run.error is None and len(run.captions) == 1, (run.error, len(run.captions))
    assert run.captions[0].get_value("frames") == 3


def obeys_choices(base):
    choices = ["a red screen", 'a "green" \\ screen', "nothing"]
    run = Run(base, options=None, choices=choices).to_end()
    said = [caption.get_string("text") for caption in run.captions]
    assert run.error is None and len(said) == 3 and set(said) <= set(choices), (run.error, said)


def cancels(base):
    def busy():
        return any(slot["is_processing"] for slot in get(f"{base}/slots"))

    run = Run(base, options=ENDLESS, buffers=1)
    wait_for("a request arrives", busy)
    begin = time.monotonic()
    run.pipeline.set_state(Gst.State.NULL)
    stopped = time.monotonic() - begin
    wait_for("the slot is free", lambda: not busy())
    freed = time.monotonic() - begin
    # Alone, the whole text takes 16 s on a core; a request that nobody closes would last that long.
    assert stopped < 2 and freed < 5, f"stopped after {stopped:.2f} s, slot free after {freed:.2f} s"
    print(f"cancelled: stopped after {stopped * 1000:.0f} ms, slot free after {freed * 1000:.0f} ms")


def says_what_is_wrong(base):
    key = "not-the-key"
    os.environ["VLMNARRATE_API_KEY"] = key
    try:
        error = Run(base).to_end().error
    finally:
        os.environ["VLMNARRATE_API_KEY"] = KEY
    assert error and "VLMNARRATE_API_KEY" in error and key not in error, error
    error = Run(f"{base}/nowhere").to_end().error
    assert error and "endpoint" in error, error


def main():
    program, log = sys.argv[1:]
    Gst.init(None)
    if Gst.ElementFactory.find("vlmnarrate") is None:
        print("no element vlmnarrate: is GST_PLUGIN_PATH set?", file=sys.stderr)
        return 2
    os.environ["VLMNARRATE_API_KEY"] = KEY
    tests = [describes, takes_clips_and_settings, obeys_choices, cancels, says_what_is_wrong]
    failed = 0
    with server(program, log) as base:
        for test in tests:
            try:
                test(base)
                print(f"{test.__name__}: passed")
            except AssertionError as error:
                failed += 1
                print(f"{test.__name__}: failed: {error}")
    print(f"{len(tests) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
