#!/usr/bin/python3
"""Narrates for an hour while all that may change does, and plots the memory that the process takes.

    GST_PLUGIN_PATH=target/release /usr/bin/python3 tools/soak.py [--minutes 60] [--every 2] [--plot soak.svg]
        [--narrators 1] [--model DIR]

Frames go through elements in live mode, 60 a second through one, 10 a second through each of several, which share a
model. Every so many seconds something happens to one of them, drawn at random: a flushing seek at another rate or
backwards, another prompt, size, interval, number of frames or choices, a question about a frame, and now and then a way
down to READY or NULL and up again; of several also the end of one element and a new one in its place. Every five minutes
all of several rest in NULL. What the process holds while it plays depends on what was asked last, so what it holds when
all are in NULL, the model gone, is judged, once glibc has given back what it keeps of freed memory: the frames of all
pipelines come and go through its arenas.

Exits 1 if an element posts an ERROR or a WARNING, if captions stop, if a frame came in and did not go out, if a frame
that was sampled is neither described nor counted as dropped nor lost by a flush, or if the memory in NULL is in the last
quarter more than 5 % above that in the second (medians); 2 if there is no element. Needs python3-gi (GStreamer 1.0),
nothing else.
"""

import argparse
import contextlib
import ctypes
import gc
import pathlib
import random
import statistics
import sys
import time

import gi

gi.require_version("Gst", "1.0")
from gi.repository import GLib, Gst  # noqa: E402

PIPELINE = """
    videotestsrc name=source ! video/x-raw,width={width},height={height},framerate={rate}/1
    ! vlmnarrate name=n mode=live scene-threshold=0.02 {model}
    n.src ! queue ! fakesink name=sink sync=true
    n.text_src ! queue ! fakesink async=false
"""
ALONE = {"width": 640, "height": 360, "rate": 60}
OF_MANY = {"width": 320, "height": 240, "rate": 10}
REST_EVERY = 300
SECOND = Gst.SECOND


def resident():
    """MiB of memory that are this process's own."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon:"))
    return int(line.split()[1]) / 1024


def trim():
    """Has the C library give back what is free, where it knows how."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def worker_is_there():
    """Whether a thread of the element's has yet to leave."""
    for task in pathlib.Path("/proc/self/task").iterdir():
        try:
            if (task / "comm").read_text().startswith("vlmnarrate"):
                return True
        except OSError:
            pass
    return False


class Narrator:
    """A pipeline with an element, and what has become of its frames."""

    def __init__(self, soak, line):
        self.soak, self.random, self.counts = soak, soak.random, soak.counts
        self.pipeline = Gst.parse_launch(line)
        self.narrator = self.pipeline.get_by_name("n")
        self.source = self.pipeline.get_by_name("source")
        self.show()
        # Frames on their way through the element; a flush may end the way of one.
        self.entered = self.left = self.flushes = 0
        pads = [(name, self.narrator.get_static_pad(name)) for name in ("sink", "src")]
        self.probes = [(pad, pad.add_probe(Gst.PadProbeType.BUFFER, self.on_frame, name)) for name, pad in pads]
        soak.alive += 1
        self.narrator.weak_ref(soak.on_freed)
        bus = self.pipeline.get_bus()
        bus.add_signal_watch()
        self.watch = bus.connect("message", self.on_message)
        self.spoke = time.monotonic()
        self.pipeline.set_state(Gst.State.PLAYING)

    def show(self):
        self.source.set_property("pattern", self.random.choice(["smpte", "snow", "ball", "red", "checkers-8"]))

    def on_frame(self, _pad, _info, name):
        if name == "sink":
            self.entered += 1
        else:
            self.left += 1
            self.counts["frames"] += 1
        return Gst.PadProbeReturn.OK

    def on_message(self, _bus, message):
        if message.type in (Gst.MessageType.ERROR, Gst.MessageType.WARNING):
            parse = message.parse_error if message.type == Gst.MessageType.ERROR else message.parse_warning
            error, detail = parse()
            self.soak.fail(f"{message.src.get_name()}: {error.message} ({detail})")
        elif message.type == Gst.MessageType.EOS:
            # Backwards, it is at the start.
            self.seek()
        elif message.type == Gst.MessageType.ELEMENT and message.get_structure().get_name() == "vlmnarrate":
            self.counts["captions"] += 1
            self.spoke = time.monotonic()

    def seek(self):
        rate = self.random.choice([1, 1, 1, 2, -1])
        position = self.random.randrange(1000) * SECOND
        start, stop = (position, -1) if rate > 0 else (0, position + 60 * SECOND)
        flags = Gst.SeekFlags.FLUSH | Gst.SeekFlags.ACCURATE
        # Each seek sets both ends: an earlier one's stop may be before this one's start.
        kind = Gst.SeekType.SET
        self.flushes += 1
        self.pipeline.seek(rate, Gst.Format.TIME, flags, kind, start, kind, stop)
        self.counts["seeks"] += 1

    def change(self):
        choose = self.random.choice
        name, value = choose(
            [
                ("prompt", choose(["Describe this frame in one sentence.", "What colour is it?", "What is shown?"])),
                ("image-size", choose([0, 64, 128])),
                ("interval", choose([0, SECOND // 10, SECOND // 3, SECOND])),
                ("frames", choose([1, 1, 2, 4])),
                ("temperature", choose([0.0, 0.7])),
                ("choices", choose([None, "red|green|blue", "a ball|something else"])),
                ("partial-captions", choose([False, True])),
                ("max-tokens", choose([5, 20])),
                ("attach-meta", choose([False, True])),
            ]
        )
        self.narrator.set_property(name, value)
        self.counts["settings"] += 1

    def ask(self):
        self.narrator.emit("describe-now", None, 0)
        self.counts["questions"] += 1

    def stop(self, state):
        """Goes down. The element counts anew when it starts again."""
        self.pipeline.set_state(state)
        stats = self.narrator.get_property("stats")
        value = {name: stats.get_value(name) for name in FATES + ("sampled",)}
        lost = value["sampled"] - sum(value[name] for name in FATES)
        # One under way, one that waited and one that was asked for, at each flush and at the end.
        if not 0 <= lost <= 3 * (self.flushes + 1):
            self.soak.fail(f"{lost} of the sampled frames are lost, with {self.flushes} flushes: {value}")
        if not 0 <= self.entered - self.left <= self.flushes + 1:
            self.soak.fail(f"{self.entered} frames came in, {self.left} went out, with {self.flushes} flushes")
        for name in value:
            self.soak.fates[name] += value[name]
        self.soak.fates["flushed"] += lost
        self.entered = self.left = self.flushes = 0

    def start(self):
        self.spoke = time.monotonic()
        self.pipeline.set_state(Gst.State.PLAYING)

    def leave(self):
        self.stop(Gst.State.NULL)
        bus = self.pipeline.get_bus()
        bus.disconnect(self.watch)
        bus.remove_signal_watch()
        # Python can't see that a probe holds what holds the pad.
        for pad, probe in self.probes:
            pad.remove_probe(probe)
        self.probes.clear()


FATES = ("captions", "dropped", "unanswered", "errors")


class Soak:
    def __init__(self, options):
        self.random = random.Random(options.seed)
        self.counts = dict.fromkeys(
            ["frames", "captions", "seeks", "settings", "questions", "restarts", "elements"], 0
        )
        self.fates = dict.fromkeys(("sampled", *FATES, "flushed"), 0)
        # Elements that have not been freed.
        self.alive = 0
        self.problems = []
        self.samples = []
        self.rests = []
        self.end = options.minutes * 60
        self.every = round(1000 * options.every)
        self.loop = GLib.MainLoop()
        shape = ALONE if options.narrators == 1 else OF_MANY
        model = f"model={options.model}" if options.model else ""
        self.line = PIPELINE.format(model=model, **shape)
        self.begun = time.monotonic()
        self.narrators = [self.new() for _ in range(options.narrators)]
        self.rested = time.monotonic()

    def new(self):
        self.counts["elements"] += 1
        return Narrator(self, self.line)

    def on_freed(self):
        self.alive -= 1

    def fail(self, problem):
        self.problems.append(problem)
        self.loop.quit()

    def rest(self):
        """Measures when all are in NULL, once the worker has left."""
        patience = time.monotonic() + 30
        while worker_is_there():
            if time.monotonic() > patience:
                self.fail("the worker is still there, 30 s after NULL")
                return
            time.sleep(0.01)
        trim()
        self.rests.append((time.monotonic() - self.begun, resident()))
        self.rested = time.monotonic()

    def restart(self, narrators, state):
        for narrator in narrators:
            narrator.stop(state)
        if state == Gst.State.NULL and len(narrators) == len(self.narrators):
            self.rest()
        for narrator in narrators:
            narrator.start()
        self.counts["restarts"] += len(narrators)

    def act(self):
        if len(self.narrators) > 1 and time.monotonic() - self.rested >= REST_EVERY:
            self.restart(self.narrators, Gst.State.NULL)
            return True
        index = self.random.randrange(len(self.narrators))
        narrator = self.narrators[index]
        chance = self.random.random()
        if chance < 0.01:
            self.restart([narrator], Gst.State.NULL)
        elif chance < 0.03:
            self.restart([narrator], Gst.State.READY)
        elif chance < 0.06 and len(self.narrators) > 1:
            narrator.leave()
            self.narrators[index] = self.new()
        elif chance < 0.3:
            narrator.seek()
        elif chance < 0.6:
            narrator.change()
        elif chance < 0.8:
            narrator.ask()
        else:
            narrator.show()
        return True

    def sample(self):
        elapsed = time.monotonic() - self.begun
        self.samples.append((elapsed, resident(), *self.counts.values()))
        silent = [narrator for narrator in self.narrators if time.monotonic() - narrator.spoke > 120]
        # One alone shows changing pictures; among many some show a still one.
        if len(silent) == len(self.narrators):
            self.fail("no caption for two minutes")
        if elapsed >= self.end or self.problems:
            self.loop.quit()
        return True

    def run(self):
        GLib.timeout_add(self.every, self.act)
        GLib.timeout_add(5000, self.sample)
        self.loop.run()
        while self.narrators:
            self.narrators.pop().leave()
        gc.collect()
        if self.alive:
            self.problems.append(f"{self.alive} elements of {self.counts['elements']} were never freed")


def plot(samples, rests, path):
    """The memory over time, that in NULL as dots, as an SVG."""
    width, height, left, bottom = 800, 300, 60, 40
    hours = max(s[0] for s in samples) / 3600
    most = max(s[1] for s in samples) * 1.1

    def at(elapsed, mebibytes):
        x = left + elapsed / 3600 / hours * (width - left - 10)
        return f"{x:.1f},{(height - bottom) * (1 - mebibytes / most):.1f}"

    line = " ".join(at(s[0], s[1]) for s in samples)
    step = next(step for step in (10, 20, 50, 100, 200, 500, 1000) if most / step < 8)
    marks = [
        f'<path d="M{at(0, v)}H{width - 10}" class="grid"/><text x="{left - 6}" y="{at(0, v).split(",")[1]}" '
        f'class="side">{v}</text>'
        for v in range(0, int(most), step)
    ]
    for rest in rests:
        x, y = at(*rest).split(",")
        marks.append(f'<circle cx="{x}" cy="{y}" r="3" fill="#c40"/>')
    minutes = max(1, round(hours * 60 / 6))
    marks += [
        f'<text x="{at(m * 60, 0).split(",")[0]}" y="{height - bottom + 18}">{m}</text>'
        for m in range(0, int(hours * 60) + 1, minutes)
    ]
    with open(path, "w") as file:
        file.write(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            'font-size="12" text-anchor="middle"><style>.grid{stroke:#ddd}.side{text-anchor:end;dominant-baseline:middle}'
            f'</style><rect width="{width}" height="{height}" fill="white"/>{"".join(marks)}'
            f'<text x="{width / 2}" y="{height - 6}">minutes</text>'
            f'<text x="14" y="{height / 2}" transform="rotate(-90 14 {height / 2})">MiB</text>'
            f'<polyline points="{line}" fill="none" stroke="#06c" stroke-width="1.5"/></svg>\n'
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=2, metavar="SECONDS", help="between two things that happen")
    parser.add_argument("--narrators", type=int, default=1, metavar="N", help="elements that share the model")
    parser.add_argument("--model", metavar="DIR", help="a model's folder (default: the element's)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", metavar="FILE", help="write an SVG of the memory")
    options = parser.parse_args()
    Gst.init(None)
    if Gst.ElementFactory.find("vlmnarrate") is None:
        print("there is no element vlmnarrate: set GST_PLUGIN_PATH", file=sys.stderr)
        return 2
    soak = Soak(options)
    soak.run()
    for problem in soak.problems:
        print(problem, file=sys.stderr)
    samples = soak.samples
    if options.plot and samples:
        plot(samples, soak.rests, options.plot)
    counted = ", ".join(f"{count} {name}" for name, count in soak.counts.items())
    print(f"{samples[-1][0] / 60:.1f} minutes: {counted}")
    print("frames that were " + ", ".join(f"{name}: {count}" for name, count in soak.fates.items()))
    most = max(s[1] for s in samples)
    quarter = soak.end / 4
    parts = [[memory for at, memory in soak.rests if i * quarter <= at < (i + 1) * quarter] for i in range(4)]
    early, late = (statistics.median(parts[i] or [float("nan")]) for i in (1, 3))
    print(f"memory in NULL: {early:.1f} MiB in the second quarter, {late:.1f} in the last; at most {most:.1f} at work")
    return 1 if soak.problems or not late <= 1.05 * early else 0


if __name__ == "__main__":
    sys.exit(main())
