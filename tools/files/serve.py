"""Servers for the judge: HTTP that behaves well or badly by the path's first folder, HTTPS that nobody trusts, RTSP."""

import contextlib
import http.server
import os
import re
import socketserver
import ssl
import subprocess
import threading
import time
import urllib.parse


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    root = "/nonexistent"

    def handle_error(self, request, address):
        pass  # a client that went away


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        how, _, name = path.lstrip("/").partition("/")
        if how in ("401", "404", "500"):
            return self.refuse(int(how))
        if how in ("redirect", "loop"):
            self.send_response(302)
            self.send_header("Location", f"/{'range' if how == 'redirect' else 'loop'}/{urllib.parse.quote(name)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        try:
            with open(os.path.join(self.server.root, name), "rb") as file:
                data = file.read()
        except OSError:
            return self.refuse(404)
        if how == "hole" and name.endswith("1.ts"):
            return self.refuse(404)
        first, last, whole = 0, len(data) - 1, True
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and how not in ("plain", "chunked", "cut"):
            first, whole = int(asked[1]), False
            last = min(last, int(asked[2] or last))
            if first > last:
                return self.refuse(416)
        self.send_response(200 if whole else 206)
        kind = {".m3u8": "application/vnd.apple.mpegurl", ".mpd": "application/dash+xml", ".html": "text/html"}
        self.send_header("Content-Type", kind.get(os.path.splitext(name)[1], "application/octet-stream"))
        if how not in ("plain", "chunked", "cut"):
            self.send_header("Accept-Ranges", "bytes")
        if not whole:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        if how == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        if body:
            self.send(how, data[first : last + 1])

    def send(self, how, data):
        if how == "cut":
            self.wfile.write(data[: len(data) * 6 // 10])
            self.close_connection = True
            return
        step = {"slow": len(data) // 20 + 1, "chunked": 10_000}.get(how, len(data) or 1)
        for at in range(0, len(data), step):
            part = data[at : at + step]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if how == "chunked" else part)
            if how == "slow":
                time.sleep(0.1)
        if how == "chunked":
            self.wfile.write(b"0\r\n\r\n")

    def refuse(self, status):
        body = b"<h1>no</h1>"
        self.send_response(status)
        self.send_header("Content-Type", "text/html")
        if status == 401:
            self.send_header("WWW-Authenticate", 'Basic realm="films"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def certificate(folder):
    """A certificate that no system trusts."""
    key, cert = os.path.join(folder, "key.pem"), os.path.join(folder, "cert.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-keyout", key, "-out", cert], check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def rtsp(root):
    """A server of /clip, which is clip.mkv in the folder that root() gives; its port, or None without its library."""
    try:
        import gi

        gi.require_version("Gst", "1.0")
        gi.require_version("GstRtspServer", "1.0")
        from gi.repository import GLib, Gst, GstRtspServer
    except (ImportError, ValueError):
        return None
    Gst.init(None)

    class Factory(GstRtspServer.RTSPMediaFactory):
        def do_create_element(self, url):
            return Gst.parse_launch(
                f"( filesrc location={root()}/clip.mkv ! matroskademux ! h264parse "
                "! rtph264pay config-interval=-1 name=pay0 )"
            )

    server = GstRtspServer.RTSPServer(service="0", address="127.0.0.1")
    server.get_mount_points().add_factory("/clip", Factory())
    server.attach(None)
    threading.Thread(target=GLib.MainLoop().run, daemon=True).start()
    return server.get_bound_port()


@contextlib.contextmanager
def servers(folder):
    """Starts all; gives a function that sets the folder served, and the addresses by name."""
    plain, secure = Server(("127.0.0.1", 0), Handler), Server(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate(folder))
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    for server in (plain, secure):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    port = rtsp(lambda: plain.root)

    def serve(root):
        plain.root = secure.root = root

    addresses = {
        "http": f"http://127.0.0.1:{plain.server_port}",
        "https": f"https://127.0.0.1:{secure.server_port}",
        "rtsp": f"rtsp://127.0.0.1:{port}" if port else None,
    }
    yield serve, addresses
    for server in (plain, secure):
        server.shutdown()
