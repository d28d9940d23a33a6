#!/usr/bin/python3
"""Runs a pipeline, written as for gst-launch-1.0, and prints each caption's fields as a line of JSON."""

import json
import os
import sys

import gi

gi.require_version("Gst", "1.0")
from gi.repository import Gst


def fields(structure):
    return {structure.nth_field_name(i): structure.get_value(structure.nth_field_name(i)) for i in range(structure.n_fields())}


def main():
    Gst.init(None)
    pipeline = Gst.parse_launchv(sys.argv[1:])
    bus = pipeline.get_bus()
    pipeline.set_state(Gst.State.PLAYING)
    kinds = Gst.MessageType.ELEMENT | Gst.MessageType.ERROR | Gst.MessageType.EOS
    try:
        while True:
            message = bus.timed_pop_filtered(Gst.CLOCK_TIME_NONE, kinds)
            if message.type == Gst.MessageType.EOS:
                return 0
            if message.type == Gst.MessageType.ERROR:
                error, _ = message.parse_error()
                print(error.message, file=sys.stderr)
                return 1
            structure = message.get_structure()
            if structure.get_name() == "vlmnarrate":
                print(json.dumps(fields(structure), ensure_ascii=False), flush=True)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever reads has had enough; Python must not try to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        pipeline.set_state(Gst.State.NULL)


if __name__ == "__main__":
    sys.exit(main())
