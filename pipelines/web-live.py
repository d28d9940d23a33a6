#!/usr/bin/python3
"""Runs a pipeline that ends in a multifdsink named `clients` and serves it with its captions as a web page.

web-live.py PAGE.html PIPELINE, written as for gst-launch-1.0. / is the page, /video.webm what the sink sends,
/captions the captions as Server-Sent Events. Environment: HOST, PORT.
"""

import collections
import errno
import http.server
import ipaddress
import json
import os
import pathlib
import queue
import socket
import socketserver
import sys
import threading
import time
import urllib.parse

import narrate
from narrate import Gst

KEPT = 100  # captions that a new client is told
WAITING = 200  # events that a client may be behind before it is let go
PING = 5  # seconds


class Captions:
    """The captions so far, and everybody who listens."""

    def __init__(self):
        self.lock = threading.Lock()
        # Sequence numbers start anew with each run; a browser that was here before must not take them for old ones.
        self.run = f"{time.time_ns():x}"
        self.kept = collections.deque(maxlen=KEPT)
        self.listeners = set()

    def listen(self, last_id):
        """A queue of events to come, filled with the whole captions that came after the one of that id."""
        events = queue.Queue(WAITING)
        with self.lock:
            missed = list(self.kept)
            ids = [id for id, _ in missed]
            if last_id in ids:
                missed = missed[ids.index(last_id) + 1 :]
            for id, data in missed:
                events.put(event("caption", data, id))
            self.listeners.add(events)
        return events

    def leave(self, events):
        with self.lock:
            self.listeners.discard(events)

    def add(self, data, sequence, partial):
        with self.lock:
            if partial:
                sent = event("words", data)
            else:
                id = f"{self.run}-{sequence}"
                self.kept.append((id, data))
                sent = event("caption", data, id)
            for events in list(self.listeners):
                try:
                    events.put_nowait(sent)
                except queue.Full:
                    # Gone or asleep: its thread finds itself off the list.
                    self.listeners.discard(events)


def event(name, data, id=None):
    """One Server-Sent Event; JSON has no line breaks of its own."""
    lines = [f"event: {name}", f"data: {json.dumps(data, ensure_ascii=False)}"]
    if id is not None:
        lines.append(f"id: {id}")
    return ("\n".join(lines) + "\n\n").encode()


class Viewers:
    """Hands connections to the multifdsink and waits until it lets them go."""

    def __init__(self, sink):
        self.sink = sink
        self.left = {}
        sink.connect("client-fd-removed", self.on_removed)

    def serve(self, fd):
        left = self.left[fd] = threading.Event()
        self.sink.emit("add", fd)
        left.wait()
        del self.left[fd]

    def on_removed(self, _sink, fd):
        self.left[fd].set()


class Handler(http.server.BaseHTTPRequestHandler):
    disable_nagle_algorithm = True
    # Also how long a client may take to read some of the captions.
    timeout = 20

    def do_GET(self):
        if not self.is_for_us():
            self.send_error(403, explain="This page answers to the name or address it was started with.")
            return
        path, _, query = self.path.partition("?")
        if path == "/":
            self.reply("text/html; charset=utf-8")
            self.wfile.write(self.server.page)
        elif path == "/video.webm":
            self.reply("video/webm")
            self.wfile.flush()
            self.server.viewers.serve(self.connection.fileno())
        elif path == "/captions":
            self.reply("text/event-stream")
            self.send_captions(*urllib.parse.parse_qs(query).get("after", [])[:1])
        else:
            self.send_error(404)

    def is_for_us(self):
        """No to another site's name that has come to mean this machine: its scripts could look through the camera."""
        if not ipaddress.ip_address(self.server.server_address[0]).is_loopback:
            return True
        name = self.headers.get("Host", "").rsplit(":", 1)[0]
        return name in ("localhost", "127.0.0.1", "[::1]", self.server.server_address[0])

    def reply(self, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()

    def send_captions(self, after=None):
        captions = self.server.captions
        events = captions.listen(self.headers.get("Last-Event-ID", after))
        try:
            self.wfile.write(b"retry: 1000\n\n")
            while events in captions.listeners or not events.empty():
                try:
                    self.wfile.write(events.get(timeout=PING))
                except queue.Empty:
                    # By this the page knows that we are there, and we learn that it is gone.
                    self.wfile.write(event("ping", {}))
        finally:
            captions.leave(events)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host, port):
        self.address_family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        super().__init__(address[:2], Handler)

    def handle_error(self, request, client_address):
        # Clients come and go.
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def server_bind(self):
        # Without HTTPServer's look-up of this machine's name, which may take long and is not needed.
        socketserver.TCPServer.server_bind(self)

    @property
    def url(self):
        host, port = self.server_address[:2]
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def listen():
    host, port = os.environ.get("HOST") or "127.0.0.1", os.environ.get("PORT") or "8080"
    if not port.isdecimal() or int(port) > 65535:
        sys.exit(f"PORT={port} is no port: set PORT to a number from 1024 to 65535")
    try:
        return Server(host, int(port))
    except socket.gaierror as error:
        sys.exit(f"HOST={host}: {error.strerror}. Set HOST to an address of this machine, or to 0.0.0.0 for all")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            sys.exit(f"Port {port} is in use: set PORT to another, for instance PORT={int(port) % 65535 + 1}")
        if error.errno == errno.EACCES:
            sys.exit(f"Port {port} is not for everybody: set PORT to 1024 or more")
        sys.exit(f"Can't listen on HOST={host} PORT={port}: {error.strerror}")


def main():
    Gst.init(None)
    server = listen()
    server.page = pathlib.Path(sys.argv[1]).read_bytes()
    pipeline = narrate.launch(sys.argv[2:])
    server.captions = captions = Captions()
    server.viewers = Viewers(pipeline.get_by_name("clients"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = "this machine only" if ipaddress.ip_address(server.server_address[0]).is_loopback else "everyone who can reach this machine"
    print(f"Serving {server.url} for {where}; Ctrl-C ends it", file=sys.stderr, flush=True)

    def add(caption):
        # When the frame was seen, not when the model had done with it.
        seen = time.time() - caption["latency-ms"] / 1000
        captions.add({"time": round(seen * 1000), "text": caption["text"]}, caption["sequence"], caption["partial"])

    status = narrate.Run(pipeline, add, narrate.Progress(quiet=True)).run()
    server.shutdown()
    server.server_close()
    return status


if __name__ == "__main__":
    sys.exit(main())
