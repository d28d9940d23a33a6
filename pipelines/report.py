#!/usr/bin/python3
"""Narrates a video into one HTML page: pictures of the frames described, with their times and captions.

    report.py URI OUTPUT.html [PROPERTY=VALUE]...

The properties are vlmnarrate's. The page is report.html, beside this file, filled in.
"""

import base64
import html
import os
import sys
import tempfile
import time
from urllib.parse import unquote, urlsplit

import narrate
from narrate import GLib, Gst, clock

import gi

gi.require_version("GstPbutils", "1.0")
gi.require_version("GstVideo", "1.0")
from gi.repository import GstPbutils, GstVideo

META = "VlmNarrateMeta"
WIDTH = 320


def stamp(nanoseconds):
    return f'<time datetime="PT{nanoseconds / Gst.SECOND:.3f}S">{clock(nanoseconds)}</time>'


def of_buffer(buffer):
    """The caption of a frame."""
    meta = buffer.get_custom_meta(META)
    return narrate.fields(meta.get_structure()) if meta else None


class Entries:
    """Writes captions as items of a list; the same one several times in a row makes one item."""

    def __init__(self, file):
        self.file, self.captions = file, 0
        self.first = self.latest = self.jpeg = None

    def add(self, caption, jpeg):
        if self.first and self.first["text"] != caption["text"]:
            self.write(caption["stream-time"])
        if not self.first:
            self.first, self.jpeg = caption, jpeg
        self.latest = caption
        self.captions += 1

    def write(self, end):
        """The item that began with the first of the same captions, up to `end`."""
        start = self.first["stream-time"] or 0
        span = stamp(start) + (f" – {stamp(end)}" if end and clock(end) != clock(start) else "")
        text = html.escape(" ".join(self.first["text"].split())) or "<em>Nothing was said.</em>"
        picture = base64.b64encode(self.jpeg).decode()
        # The caption beside it says what is in the picture.
        item = (
            f'<li id="caption-{self.first["sequence"]}">\n'
            f'<img src="data:image/jpeg;base64,{picture}" alt="" decoding="async">\n'
            f'<div><p class="when"><a href="#caption-{self.first["sequence"]}">{span}</a></p>\n'
            f'<p class="text">{text}</p></div>\n</li>\n'
        )
        self.file.write(item.encode())
        self.first = None


def thumbnails(uri, properties, entries):
    """A pipeline that adds each frame described to `entries`."""
    pipeline = narrate.launch(
        ["uridecodebin", f"uri={uri}", "!", "videoconvert", "!", "videoflip", "video-direction=auto", "!", "identity", "single-segment=true", "!"]
        + ["vlmnarrate", "name=narrator", "mode=recorded", *properties, "!", "videoconvertscale", "add-borders=false", "!"]
        + ["capsfilter", "name=size", "!", "jpegenc", "quality=80", "!", "appsink", "name=sink", "sync=false"]
    )
    size, sink = pipeline.get_by_name("size"), pipeline.get_by_name("sink")

    def shape(_, info):
        """Makes pixels square and pictures small, in the shape that a player shows."""
        event = info.get_event()
        if event.type == Gst.EventType.CAPS:
            # Python's face of the caps' structure differs between GStreamer 1.22, 1.26 and 1.28.
            video = GstVideo.VideoInfo.new_from_caps(event.parse_caps())
            shown = video.width * video.par_n / video.par_d
            scale = min(1, WIDTH / shown)
            width, height = (max(1, round(side * scale)) for side in (shown, video.height))
            size.set_property(
                "caps", Gst.Caps.from_string(f"video/x-raw,width={width},height={height},pixel-aspect-ratio=1/1")
            )
        return Gst.PadProbeReturn.OK

    def described(_, info):
        """Lets the frame pass that its caption is about."""
        caption = of_buffer(info.get_buffer())
        own = caption and caption["timestamp"] == info.get_buffer().pts
        return Gst.PadProbeReturn.OK if own else Gst.PadProbeReturn.DROP

    def on_sample(sink):
        buffer = sink.emit("pull-sample").get_buffer()
        try:
            entries.add(of_buffer(buffer), buffer.extract_dup(0, buffer.get_size()))
            return Gst.FlowReturn.OK
        except OSError as error:
            said = GLib.Error.new_literal(Gst.ResourceError.quark(), error.strerror, Gst.ResourceError.WRITE)
            sink.post_message(Gst.Message.new_error(sink, said, ""))
            return Gst.FlowReturn.ERROR

    narrated = pipeline.get_by_name("narrator").get_static_pad("src")
    narrated.add_probe(Gst.PadProbeType.EVENT_DOWNSTREAM, shape)
    narrated.add_probe(Gst.PadProbeType.BUFFER, described)
    sink.set_property("emit-signals", True)
    sink.connect("new-sample", on_sample)
    return pipeline


def page(name, length, entries, model):
    """The template's parts before and after the list, filled in."""
    now = time.localtime()
    values = {
        "name": name,
        "length": clock(length),
        "captions": f"{entries.captions}",
        "model": model,
        "datetime": time.strftime("%Y-%m-%dT%H:%M:%S%z", now),
        "date": time.strftime("%-d %B %Y, %H:%M", now),
    }
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "report.html"), encoding="utf-8") as file:
        head, tail = file.read().split("{{list}}\n")
    for key, value in values.items():
        head = head.replace("{{" + key + "}}", html.escape(value))
    return head, tail


def check_video(uri):
    """Whether there is something to narrate, before a model is loaded for it."""
    info = GstPbutils.Discoverer.new(30 * Gst.SECOND).discover_uri(uri)
    if not info.get_video_streams():
        sys.exit(f"error: {uri}: there is no video in it")


def report(uri, output, properties):
    folder = os.path.dirname(os.path.abspath(output))
    # Now, not after hours, is the time to learn that it can't be written. An older report stays until then.
    with open(output, "a+b") as file, tempfile.TemporaryFile(dir=folder) as items:
        entries = Entries(items)
        run = narrate.Run(thumbnails(uri, properties, entries))
        status = run.run()
        if not entries.captions:
            return status or 1
        model = f"{entries.latest['model']} {entries.latest['revision']}"
        if entries.first:
            entries.write(run.position)
        head, tail = page(os.path.basename(unquote(urlsplit(uri).path)), run.position, entries, model)
        file.truncate(0)
        file.write(head.encode())
        items.seek(0)
        while chunk := items.read(1 << 20):
            file.write(chunk)
        file.write(tail.encode())
    print(f"Wrote {output}", file=sys.stderr)
    return status


def main():
    if len(sys.argv) < 3:
        sys.exit("usage: report.py URI OUTPUT.html [PROPERTY=VALUE]...")
    uri, output, *properties = sys.argv[1:]
    Gst.init(None)
    try:
        check_video(uri)
    except GLib.Error as error:
        sys.exit(f"error: {uri}: {error.message}")
    try:
        return report(uri, output, properties)
    except OSError as error:
        sys.exit(f"error: {output}: {error.strerror}")
    finally:
        if os.path.isfile(output) and not os.path.getsize(output):
            os.unlink(output)


if __name__ == "__main__":
    sys.exit(main())
