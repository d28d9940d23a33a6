#!/usr/bin/python3
"""Runs a pipeline with a vlmnarrate in it: captions go to stdout, how far it has come to stderr.

Ctrl-C ends the stream, so that files are finished; a second one stops at once.
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time

import gi

gi.require_version("Gst", "1.0")
from gi.repository import GLib, Gst

TIMES = {"timestamp", "stream-time", "running-time", "duration", "arrival-time"}
Kind = Gst.MessageType
KINDS = Kind.ELEMENT | Kind.PROGRESS | Kind.LATENCY | Kind.EOS | Kind.ERROR | Kind.WARNING | Kind.INFO


def fields(structure):
    """The caption as a dictionary; a time that is not known is None."""
    names = (structure.nth_field_name(i) for i in range(structure.n_fields()))
    caption = {name: structure.get_value(name) for name in names}
    return {name: None if name in TIMES and value == Gst.CLOCK_TIME_NONE else value for name, value in caption.items()}


def one_line(text):
    """A model may say anything, also what a terminal would obey."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def clock(time):
    """A stream's time as players show it."""
    minutes, seconds = divmod(time // Gst.SECOND, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def span(seconds):
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def tell(source, error, debug):
    """What a message says, who says it, and of which file."""
    name = source.get_name() if source else "pipeline"
    if source and source.find_property("location") and source.get_property("location"):
        name += f" ({source.get_property('location')})"
    # The first line of the debug text is a place in the source code.
    detail = " ".join((debug or "").split("\n")[1:]).strip()
    return f"{name}: {error.message}" + (f" ({detail})" if detail and detail not in error.message else "")


class Progress:
    """Redraws one line if a terminal shows it, adds a line now and then if not."""

    def __init__(self, quiet=False, every=10):
        self.quiet = quiet
        self.terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.every = 0.2 if self.terminal else every
        self.due = time.monotonic() + self.every
        self.drawn = False

    def show(self, describe):
        """Shows what `describe` returns, if it is time to."""
        if self.quiet or time.monotonic() < self.due:
            return
        self.due = time.monotonic() + self.every
        if self.terminal:
            self.clear()
            print(describe()[: shutil.get_terminal_size().columns - 1], end="", file=sys.stderr, flush=True)
            self.drawn = True
        else:
            self.say(describe())

    def say(self, line):
        """Prints a line that stays."""
        self.clear()
        print(line, file=sys.stderr, flush=True)

    def clear(self):
        """Makes room for another line."""
        if self.drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self.drawn, self.due = False, 0


class Run:
    """One run of a pipeline; `on_caption` gets each caption as a dictionary."""

    def __init__(self, pipeline, on_caption=lambda caption: None, progress=None):
        self.pipeline, self.on_caption, self.progress = pipeline, on_caption, progress or Progress()
        self.status = self.signal = self.loading = None
        self.interrupts = []
        self.captions = self.position = 0
        found, narrator = pipeline.iterate_all_by_element_factory_name("vlmnarrate").next()
        # The pad tells how far the narrator is; a sink lags by what the encoder before it looks ahead.
        self.place = narrator.get_static_pad("src") if found == Gst.IteratorResult.OK else pipeline
        self.start_clock()

    def run(self):
        """Runs until the stream ends; returns the exit status."""
        for signum in signal.SIGINT, signal.SIGTERM:
            signal.signal(signum, lambda signum, _: self.interrupts.append(signum))
        bus = self.pipeline.get_bus()
        try:
            started = self.pipeline.set_state(Gst.State.PLAYING) != Gst.StateChangeReturn.FAILURE
            while self.status is None:
                message = bus.timed_pop_filtered(Gst.SECOND // 10, KINDS)
                if message:
                    self.handle(message)
                elif not started:
                    self.end(1, "error: the pipeline can't start")
                if self.interrupts:
                    self.interrupt(self.interrupts.pop(0))
                self.locate()
                if self.status is None:
                    self.progress.show(self.describe)
        finally:
            self.progress.clear()
            self.pipeline.set_state(Gst.State.NULL)
        return self.status

    def handle(self, message):
        if message.type == Kind.ELEMENT and message.get_structure().get_name() == "vlmnarrate":
            self.caption(fields(message.get_structure()))
        elif message.type == Kind.PROGRESS:
            what, _, self.loading = message.parse_progress()
            if what not in (Gst.ProgressType.START, Gst.ProgressType.CONTINUE):
                self.loading = None
                self.start_clock()
        elif message.type == Kind.LATENCY:
            self.pipeline.recalculate_latency()
        elif message.type == Kind.EOS:
            self.end(128 + self.signal if self.signal else 0)
        elif message.type == Kind.ERROR:
            self.end(1, "error: " + tell(message.src, *message.parse_error()))
        elif message.type == Kind.WARNING:
            self.progress.say("warning: " + tell(message.src, *message.parse_warning()))
        elif message.type == Kind.INFO:
            self.progress.say(tell(message.src, *message.parse_info()))

    def caption(self, caption):
        self.captions += not caption["partial"]
        self.position = caption["stream-time"] or self.position
        self.progress.clear()
        try:
            self.on_caption(caption)
        except OSError as error:
            # Python must not try to flush at exit what could not be written.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                # Whoever reads has had enough; files are still finished.
                self.pipeline.send_event(Gst.Event.new_eos())
            else:
                self.end(1, f"error: stdout: {error.strerror}")

    def interrupt(self, signum):
        if self.signal:
            # An element may take its time to stop; then the next one ends the process.
            signal.signal(signum, signal.SIG_DFL)
            self.end(128 + signum)
        else:
            self.signal = signum
            self.progress.say("Ending the stream; once more to stop at once")
            self.pipeline.send_event(Gst.Event.new_eos())

    def end(self, status, why=None):
        """The last words: how far it came, and why not further."""
        if self.status is not None:
            return
        self.status = status
        self.locate()
        if not self.progress.quiet and self.captions:
            verb = "Stopped after" if status else "Narrated"
            took = span(time.monotonic() - self.began)
            self.progress.say("  ".join([f"{verb} {clock(self.position)} in {took}", *self.speed(), self.counted()]))
        if why:
            self.progress.say(why)

    def start_clock(self):
        """Loading the model says nothing about the speed."""
        self.locate()
        self.began, self.began_at = time.monotonic(), self.position

    def locate(self):
        known, position = self.place.query_position(Gst.Format.TIME)
        # Else the last caption's time must do.
        if known and position >= 0:
            self.position = position

    def describe(self):
        if self.loading:
            return self.loading
        known, length = self.place.query_duration(Gst.Format.TIME)
        elapsed, gained = time.monotonic() - self.began, self.position - self.began_at
        place, left = [clock(self.position)], []
        if known and 0 < self.position <= length:
            place = [f"{clock(self.position)} / {clock(length)}", f"{100 * self.position // length} %"]
            # The first moment says little.
            if elapsed > 1 and gained > 0:
                left = [f"{span(elapsed * (length - self.position) / gained)} left"]
        return "  ".join([*place, *self.speed(), self.counted(), *left])

    def speed(self):
        """Since the model was loaded: captions come in steps, too coarse for a shorter time."""
        elapsed = time.monotonic() - self.began
        gained = (self.position - self.began_at) / Gst.SECOND
        return [f"{gained / elapsed:.{1 if gained < 100 * elapsed else 0}f}x real time"] if gained > 0 else []

    def counted(self):
        return f"{self.captions} caption{'' if self.captions == 1 else 's'}"


def as_json(caption):
    return json.dumps(caption, ensure_ascii=False)


def as_text(caption):
    """A line for people, who do not wait for unfinished captions."""
    if caption["partial"]:
        return None
    at = caption["stream-time"]
    return f"{'-' if at is None else f'{clock(at)}.{at // (Gst.SECOND // 10) % 10}'}  {one_line(caption['text'])}"


def launch(description):
    """The pipeline that gst-launch-1.0 would make of it."""
    try:
        element = Gst.parse_launchv(description)
    except GLib.Error as error:
        hint = ""
        if error.matches(Gst.ParseError.quark(), Gst.ParseError.NO_SUCH_ELEMENT):
            hint = "; is its plugin installed, and vlmnarrate's folder in GST_PLUGIN_PATH?"
        sys.exit(f"error: {error.message}{hint}")
    if isinstance(element, Gst.Pipeline):
        return element
    pipeline = Gst.Pipeline()
    pipeline.add(element)
    return pipeline


def main():
    usage = "%(prog)s [-h] [--json | --text] [--no-progress] PIPELINE"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__.split("\n")[0], epilog=__doc__.split("\n\n")[1])
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", dest="line", action="store_const", const=as_json, help="captions as JSON lines, see caption.schema.json")
    output.add_argument("--text", dest="line", action="store_const", const=as_text, help="captions as lines of time and text")
    parser.add_argument("--no-progress", action="store_true", help="do not tell how far it has come")
    parser.add_argument("pipeline", nargs=argparse.REMAINDER, metavar="PIPELINE", help="as for gst-launch-1.0")
    arguments = parser.parse_args()
    if not arguments.pipeline:
        parser.error("no pipeline; for instance: videotestsrc num-buffers=90 ! vlmnarrate ! fakesink")
    sys.stdout.reconfigure(encoding="utf-8")
    Gst.init(None)

    def print_caption(caption):
        line = arguments.line and arguments.line(caption)
        if line is not None:
            print(line, flush=True)

    return Run(launch(arguments.pipeline), print_caption, Progress(arguments.no_progress)).run()


if __name__ == "__main__":
    sys.exit(main())
