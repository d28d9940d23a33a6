#!/usr/bin/python3
"""Waits for a word in the captions of a video, and then requests a detailed caption of the same moment.

    examples/watch.py [URI WORD [MODEL]]

Without arguments it watches a test picture. GST_PLUGIN_PATH must name the folder with libgstvlmnarrate.so.
"""

import os
import re
import sys

import gi

gi.require_version("Gst", "1.0")
from gi.repository import GLib, Gst

# In real time, so that the picture is still about the same when the request comes.
SINK = "autovideosink" if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") else "fakesink sync=true"
NARRATE = f"videoconvert ! vlmnarrate name=narrator ! videoconvert ! {SINK}"


def build(uri, model):
    """Builds the pipeline, and returns its narrator too."""
    if uri is None:
        pipeline = Gst.parse_launch(f"videotestsrc pattern=ball num-buffers=90 ! video/x-raw,framerate=30/1 ! {NARRATE}")
    else:
        pipeline = Gst.parse_launch(f"uridecodebin name=source ! {NARRATE}")
        pipeline.get_by_name("source").set_property("uri", uri)
    narrator = pipeline.get_by_name("narrator")
    narrator.set_property("model", model)
    return pipeline, narrator


def watch(pipeline, narrator, word):
    """Plays the video to its end; raises the pipeline's error if there is one."""
    seen = False
    bus = pipeline.get_bus()
    while True:
        message = bus.timed_pop_filtered(
            Gst.CLOCK_TIME_NONE, Gst.MessageType.ELEMENT | Gst.MessageType.EOS | Gst.MessageType.ERROR
        )
        if message.type == Gst.MessageType.EOS:
            return
        if message.type == Gst.MessageType.ERROR:
            raise message.parse_error()[0]
        caption = message.get_structure()
        if caption.get_name() != "vlmnarrate":
            continue
        time, text = caption["stream-time"] / Gst.SECOND, caption["text"]
        if caption["request-id"]:
            print(f"{time:7.2f} s  answer {caption['request-id']}: {text}", flush=True)
            continue
        print(f"{time:7.2f} s  {text}", flush=True)
        was_seen, seen = seen, word.casefold() in re.findall(r"\w+", text.casefold())
        if seen and not was_seen:
            # None and 0 stand for the properties detail-prompt and detail-max-tokens. Returns 0 if too many requests are pending.
            request = narrator.emit("describe-now", None, 0)
            print(f"{time:7.2f} s  *** {word} *** request {request}", flush=True)


def main():
    if len(sys.argv) not in (1, 3, 4):
        sys.exit(__doc__.split("\n\n")[1].strip())
    uri, word, model = (sys.argv[1:] + [None] * 3)[:3]
    Gst.init(None)
    try:
        pipeline, narrator = build(uri, model)
    except GLib.Error as error:
        sys.exit(f"watch.py: {error.message}")
    try:
        pipeline.set_state(Gst.State.PLAYING)
        watch(pipeline, narrator, word or "ball")
    except GLib.Error as error:
        sys.exit(f"watch.py: {uri or 'test picture'}: {error.message}")
    finally:
        pipeline.set_state(Gst.State.NULL)


if __name__ == "__main__":
    main()
