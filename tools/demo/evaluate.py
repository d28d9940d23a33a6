#!/usr/bin/python3
"""Judges the demo model through the element: exact captions of held-out scenes, per class.

    GST_PLUGIN_PATH=target/release /usr/bin/python3 tools/demo/evaluate.py [--at-least 97] [--clips]
    GST_PLUGIN_PATH=target/release /usr/bin/python3 tools/demo/evaluate.py --real FOLDER [--at-least 98] [--clips]

With `--real`, of the pictures that `real.py held-out` wrote into FOLDER, and of which the model must say that it does
not know them; per kind. Needs the element and python3-gi (GStreamer 1.0), nothing else. Exits 1 below `--at-least` per
cent, over all frames or, of test pictures, averaged over classes; 2 if the element is missing or a pipeline fails.
"""

import argparse
import sys
import time
from pathlib import Path

import gi

gi.require_version("Gst", "1.0")
from gi.repository import Gst  # noqa: E402

from captions import UNKNOWN  # noqa: E402
from scenes import defaults, held_out, held_out_clips, kind, way  # noqa: E402

X264_SHIFT = 1000 * 3600 * 10**9  # x264enc moves timestamps so that none is negative


def messages(description, seconds):
    """The `vlmnarrate` structures of a pipeline's run, up to its end."""
    pipeline = Gst.parse_launch(description)
    bus = pipeline.get_bus()
    pipeline.set_state(Gst.State.PLAYING)
    wanted = Gst.MessageType.ELEMENT | Gst.MessageType.EOS | Gst.MessageType.ERROR
    try:
        while True:
            message = bus.timed_pop_filtered(seconds * Gst.SECOND, wanted)
            if message is None:
                raise RuntimeError(f"nothing for {seconds} s: {description}")
            if message.type == Gst.MessageType.EOS:
                return
            if message.type == Gst.MessageType.ERROR:
                error, detail = message.parse_error()
                raise RuntimeError(f"{error.message} ({detail}): {description}")
            structure = message.get_structure()
            if structure.get_name() == "vlmnarrate":
                yield structure
    finally:
        pipeline.set_state(Gst.State.NULL)


def captions(scene, options):
    """{frame number, of a clip those of the first and the last: caption} as the element posts them."""
    if scene.clip == 1:
        turns = f"interval=0 every-nth={scene.step}"
    else:
        # A little early, so that rounding makes no frame miss its turn.
        step = 10**9 * scene.step * scene.framerate[1] // scene.framerate[0] - 1000
        turns = f"interval={scene.clip * step} frames={scene.clip}"
    description = f"{scene.source()} ! vlmnarrate mode=recorded {turns} {options.element} ! fakesink sync=false"
    rate = scene.framerate[0] / scene.framerate[1] / 1e9
    found = {}
    for structure in messages(description, options.seconds):
        if structure.has_field("partial") and structure.get_value("partial"):
            continue
        fields = ["timestamp"] if scene.clip == 1 else ["first-timestamp", "timestamp"]
        times = [structure.get_uint64(field) for field in fields]
        if not all(ok for ok, _ in times):
            continue
        numbers = [round((t - X264_SHIFT if t >= X264_SHIFT else t) * rate) for _, t in times]
        if scene.clip == 1 or structure.get_value("frames") == scene.clip:
            found[numbers[0] if scene.clip == 1 else tuple(numbers)] = structure.get_string("text").strip()
    return found


def truth(scene):
    """{what `captions` has as keys: the true caption}, without what has none."""
    if scene.clip == 1:
        return {frame: c.strip() for frame, c in scene.captions().items() if c}
    return {(frames[0], frames[-1]): c.strip() for frames, c in scene.clips().items() if c}


def shows(folder, clip):
    """[kind, name, number of frames, the gst-launch description up to raw frames]: videos, and pictures one by one.

    As clips: of each picture, and of so many frames of a video as make whole clips.
    """
    for kind in sorted(p for p in folder.iterdir() if p.is_dir()):
        for path in sorted(kind.iterdir()):
            count, name = 1, f"{kind.name}/{path.name}"
            if path.is_dir():
                count = len(list(path.glob("*.jpg"))) // clip * clip
                source = f"multifilesrc location={path}/%03d.jpg stop-index={count - 1} caps=image/jpeg,framerate=10/1"
                source += " ! jpegdec"
            else:
                source = f"filesrc location={path} ! jpegdec ! imagefreeze num-buffers={clip}"
                source += " ! video/x-raw,framerate=10/1"
                count = clip
            if count:
                yield kind.name, name, count, f"{source} ! videoconvert"


def judge_real(options):
    """{kind: [right, all]} of pictures that are no test pictures"""
    score, clip = {}, 4 if options.clips else 1
    for kind, name, count, source in list(shows(options.real, clip))[:: options.every]:
        turns = f"interval={clip * (10**8 - 1000)} frames={clip}" if clip > 1 else "interval=0"
        description = f"{source} ! vlmnarrate mode=recorded {turns} {options.element} ! fakesink sync=false"
        said = [s.get_string("text").strip() for s in messages(description, options.seconds)
                if not (s.has_field("partial") and s.get_value("partial"))
                and (clip == 1 or s.get_value("frames") == clip)]  # fmt: skip
        wrong = [text for text in said if text != UNKNOWN]
        if options.show and wrong:
            print(f"{name}: {len(wrong)} of {count // clip}: {wrong}")
        entry = score.setdefault(kind, [0, 0])
        entry[0] += len(said) - len(wrong)
        entry[1] += count // clip
    return score


def judge_scenes(options):
    """{class: [right, all]} of test pictures"""
    score = {}
    scenes = defaults() if options.defaults else (held_out_clips if options.clips else held_out)(options.scale)
    for scene in scenes[:: options.every]:
        true = truth(scene)
        said = captions(scene, options) if true else {}
        for frame, caption in true.items():
            name = f"{scene.clip} frames: {way(caption)}" if options.clips else kind(scene)
            entry = score.setdefault(name, [0, 0])
            entry[0] += said.get(frame) == caption
            entry[1] += 1
            if options.show and said.get(frame) != caption:
                print(f"{scene}\n  frame {frame}: {caption!r}, said {said.get(frame)!r}")
    return score


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--at-least", type=float, metavar="PERCENT", help="97, with --real 98")
    p.add_argument("--real", type=Path, metavar="FOLDER", help="instead, pictures that are no test pictures")
    p.add_argument("--scale", type=int, default=1, help="so many times the scenes")
    p.add_argument("--defaults", action="store_true", help="instead, each pattern as it comes without any property")
    p.add_argument("--clips", action="store_true", help="of two to four frames: the ball's way; with --real, of four")
    p.add_argument("--every", type=int, default=1, help="only each n-th scene")
    p.add_argument("--element", default="", help="further properties of the element, such as model=models/demo")
    p.add_argument("--seconds", type=int, default=120, help="patience with one caption")
    p.add_argument("--show", action="store_true", help="print each wrong caption")
    options = p.parse_args()
    if options.real and not options.real.is_dir():
        p.error(f"no folder {options.real}: `real.py held-out` writes it")
    Gst.init(None)
    if Gst.ElementFactory.find("vlmnarrate") is None:
        print("no element vlmnarrate: is GST_PLUGIN_PATH set?", file=sys.stderr)
        return 2
    begin = time.monotonic()
    try:
        score = judge_real(options) if options.real else judge_scenes(options)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    for name, (right, count) in sorted(score.items()):
        print(f"{name:28} {right:4} of {count:4}  {right / count:7.2%}")
    right, count = (sum(e[i] for e in score.values()) for i in (0, 1))
    frames, classes = 100 * right / count, 100 * sum(r / n for r, n in score.values()) / len(score)
    seconds = time.monotonic() - begin
    what = "clips" if options.clips else "frames"
    print(f"exact: {frames:.2f} % of {count} {what}, {classes:.2f} % over {len(score)} classes, {seconds:.0f} s")
    least = options.at_least or (98 if options.real else 97)
    return 0 if (frames if options.real else min(frames, classes)) >= least else 1


if __name__ == "__main__":
    sys.exit(main())
