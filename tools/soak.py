#!/usr/bin/python3
"""Narrates for an hour while all that may change does, and plots the memory that the process takes.

    GST_PLUGIN_PATH=target/release /usr/bin/python3 tools/soak.py [--minutes 60] [--every 2] [--plot soak.svg]

60 frames a second go through the element in live mode. Every so many seconds something happens, drawn at random: a
flushing seek at another rate or backwards, another prompt, size, interval or number of frames, a question about a
frame, and now and then a way down to READY or NULL and up again. What the process holds while it plays depends on what
was asked last, so what it holds in NULL, its model gone, is judged. Exits 1 if the element posts an ERROR or a WARNING,
if captions stop, or if the memory in NULL is in the last quarter more than 5 % above that in the second (medians); 2 if
there is no element. Needs python3-gi (GStreamer 1.0), nothing else.
"""

import argparse
import pathlib
import random
import statistics
import sys
import time

import gi

gi.require_version("Gst", "1.0")
from gi.repository import GLib, Gst  # noqa: E402

RATE = 60
PIPELINE = f"""
    videotestsrc name=source ! video/x-raw,width=640,height=360,framerate={RATE}/1
    ! vlmnarrate name=n mode=live scene-threshold=0.02
    n.src ! queue ! fakesink name=sink sync=true
    n.text_src ! queue ! fakesink async=false
"""
SECOND = Gst.SECOND
STATES = {"ready": Gst.State.READY, "null": Gst.State.NULL}


def resident():
    """MiB of memory that are this process's own."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon:"))
    return int(line.split()[1]) / 1024


def worker_is_there():
    """Whether a thread of the element's has yet to leave."""
    for task in pathlib.Path("/proc/self/task").iterdir():
        try:
            if (task / "comm").read_text().startswith("vlmnarrate"):
                return True
        except OSError:
            pass
    return False


class Soak:
    def __init__(self, options):
        self.random = random.Random(options.seed)
        self.pipeline = Gst.parse_launch(PIPELINE)
        self.narrator = self.pipeline.get_by_name("n")
        self.source = self.pipeline.get_by_name("source")
        self.counts = dict.fromkeys(["frames", "captions", "seeks", "settings", "questions", "restarts"], 0)
        self.problems = []
        self.spoke = time.monotonic()
        self.samples = []
        self.rests = []
        self.end = options.minutes * 60
        self.every = round(1000 * options.every)
        self.loop = GLib.MainLoop()
        bus = self.pipeline.get_bus()
        bus.add_signal_watch()
        bus.connect("message", self.on_message)
        pad = self.narrator.get_static_pad("src")
        pad.add_probe(Gst.PadProbeType.BUFFER, self.on_frame)

    def on_frame(self, _pad, _info):
        self.counts["frames"] += 1
        return Gst.PadProbeReturn.OK

    def on_message(self, _bus, message):
        if message.type in (Gst.MessageType.ERROR, Gst.MessageType.WARNING):
            parse = message.parse_error if message.type == Gst.MessageType.ERROR else message.parse_warning
            error, detail = parse()
            self.problems.append(f"{message.src.get_name()}: {error.message} ({detail})")
            self.loop.quit()
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

    def restart(self, state):
        self.pipeline.set_state(STATES[state])
        if state == "null":
            self.rest()
        self.pipeline.set_state(Gst.State.PLAYING)
        self.counts["restarts"] += 1

    def rest(self):
        """Measures in NULL, once the worker has left."""
        patience = time.monotonic() + 30
        while worker_is_there():
            if time.monotonic() > patience:
                self.problems.append("the worker is still there, 30 s after NULL")
                return
            time.sleep(0.01)
        self.rests.append((time.monotonic() - self.begun, resident()))

    def act(self):
        chance = self.random.random()
        if chance < 0.01:
            self.restart("null")
        elif chance < 0.03:
            self.restart("ready")
        elif chance < 0.3:
            self.seek()
        elif chance < 0.6:
            self.change()
        elif chance < 0.8:
            self.narrator.emit("describe-now", None, 0)
            self.counts["questions"] += 1
        else:
            self.source.set_property("pattern", self.random.choice(["smpte", "snow", "ball", "red", "checkers-8"]))
        return True

    def sample(self):
        elapsed = time.monotonic() - self.begun
        self.samples.append((elapsed, resident(), *self.counts.values()))
        if time.monotonic() - self.spoke > 120:
            self.problems.append("no caption for two minutes")
        if elapsed >= self.end or self.problems:
            self.loop.quit()
        return True

    def run(self):
        self.begun = time.monotonic()
        self.pipeline.set_state(Gst.State.PLAYING)
        GLib.timeout_add(self.every, self.act)
        GLib.timeout_add(5000, self.sample)
        self.loop.run()
        self.pipeline.set_state(Gst.State.NULL)


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
    most = max(s[1] for s in samples)
    quarter = soak.end / 4
    parts = [[memory for at, memory in soak.rests if i * quarter <= at < (i + 1) * quarter] for i in range(4)]
    early, late = (statistics.median(parts[i] or [float("nan")]) for i in (1, 3))
    print(f"memory in NULL: {early:.1f} MiB in the second quarter, {late:.1f} in the last; at most {most:.1f} at work")
    return 1 if soak.problems or not late <= 1.05 * early else 0


if __name__ == "__main__":
    sys.exit(main())
