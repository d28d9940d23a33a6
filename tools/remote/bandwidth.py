#!/usr/bin/python3
"""Measures how many bytes a caption costs on the way to an endpoint, by format, quality and size of its picture.

    tools/demo/real.py held-out FOLDER --small
    GST_PLUGIN_PATH=target/release /usr/bin/python3 tools/remote/bandwidth.py FOLDER/photo

FOLDER has JPEG pictures. Each is shown as a 1920×1080 frame to the element, which sends it to a server of this program.
What counts is the whole request, its headers too. Prints a table in Markdown.
"""

import http.server
import json
import statistics
import sys
import threading
from pathlib import Path

import gi

gi.require_version("Gst", "1.0")
from gi.repository import Gst  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parents[1] / "demo"))
from evaluate import messages  # noqa: E402

# `image-size` 0 is the size that the model's name stands for.
ROWS = [
    ("a SmolVLM, 512×512", "SmolVLM", "image-quality=75"),
    ("a SmolVLM, 512×512", "SmolVLM", "image-quality=85"),
    ("a SmolVLM, 512×512", "SmolVLM", "image-quality=95"),
    ("a SmolVLM, 512×512", "SmolVLM", "image-format=png"),
    ("others, 512×288", "other", "image-size=512 image-quality=85"),
    ("others, 1024×576", "other", "image-size=1024 image-quality=85"),
    ("others, 1920×1080", "other", "image-size=1920 image-quality=85"),
]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    sizes = []

    def answer(self, kind, text):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        models = [{"id": name, "object": "model", "owned_by": "vllm"} for name in ("SmolVLM", "other")]
        self.answer("application/json", json.dumps({"object": "list", "data": models}).encode())

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        self.rfile.read(length)
        self.sizes.append(length + len(self.requestline) + 2 + len(bytes(self.headers)))
        chunk = {"model": "x", "choices": [{"index": 0, "delta": {"content": "A picture."}, "finish_reason": "stop"}]}
        self.answer("text/event-stream", f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode())

    def log_message(self, *_):
        pass


def main():
    if len(sys.argv) != 2 or not (pictures := sorted(Path(sys.argv[1]).glob("*.jpg"))):
        print(__doc__, file=sys.stderr)
        return 2
    Gst.init(None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"{len(pictures)} pictures\n\n| picture | setting | kB a caption, median | 95 of 100 below | kbit/s at a caption a second |")
    print("|---|---|---|---|---|")
    for what, model, properties in ROWS:
        Handler.sizes.clear()
        for picture in pictures:
            description = (
                f"filesrc location={picture} ! jpegdec ! imagefreeze num-buffers=1 ! videoconvertscale ! "
                f"video/x-raw,format=I420,width=1920,height=1080,framerate=1/1 ! vlmnarrate mode=recorded interval=0 "
                f"endpoint=http://127.0.0.1:{server.server_port}/v1 model={model} {properties} ! fakesink sync=false"
            )
            list(messages(description, 60))
        assert len(Handler.sizes) == len(pictures), (len(Handler.sizes), len(pictures))
        kilobytes = [size / 1000 for size in Handler.sizes]
        middle, most = statistics.median(kilobytes), statistics.quantiles(kilobytes, n=20)[-1]
        setting = properties.split()[-1]
        print(f"| {what} | `{setting}` | {middle:.1f} | {most:.1f} | {statistics.mean(kilobytes) * 8:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
