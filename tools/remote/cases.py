"""What engines.py asks: test pictures in the size that the demo model sees, so that nobody scales them, and properties.

Needs the element and python3-gi (GStreamer 1.0), nothing else.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import gi

gi.require_version("Gst", "1.0")
from gi.repository import Gst  # noqa: E402, F401

sys.path.append(str(Path(__file__).resolve().parents[1] / "demo"))
from evaluate import messages  # noqa: E402
from scenes import defaults, held_out, held_out_clips  # noqa: E402

SIDE = 256  # of the demo model's pictures, in pixels
CHOICES = [
    "A solid red screen.", "A solid green screen.", "A solid blue screen.", "A solid black screen.",
    "A solid white screen.", "SMPTE colour bars.", "Black and white television snow.",
    "Black and white concentric rings.", "A grid of many colours.",
]  # fmt: skip


@dataclass
class Case:
    """A row of the table: scenes, and properties of the element."""

    name: str
    scenes: list
    properties: dict = field(default_factory=dict)
    must_equal: bool = True

    def needs(self, name):
        """Whether the server must know this property."""
        return name in self.properties


def in_size(scene):
    """The scene in the model's size and colours, and never through H.264."""
    return replace(scene, width=SIDE, height=SIDE, format="RGB", quantizer=0)


def each_pattern():
    """Each pattern as it comes."""
    first = {scene.pattern: scene for scene in reversed(defaults())}
    return [in_size(replace(scene, frames=min(scene.frames, 6))) for scene in first.values()]


def fits(scene):
    """Whether one of `CHOICES` is true of each frame."""
    return all(caption and caption.strip() in CHOICES for caption in scene.captions().values())


def cases(every):
    """The rows of the table; of the many pictures and clips only each `every`-th scene."""
    patterns = each_pattern()
    clips = [in_size(scene) for scene in held_out_clips() if scene.clip == 3]
    choices = {"choices": "|".join(CHOICES)}
    return [
        Case("pictures", [in_size(scene) for scene in held_out()[::every]]),
        Case("clips, `frames=3`", clips[::every]),
        Case("`system-prompt`", patterns, {"system-prompt": "You describe test pictures. Be brief."}),
        Case("another `prompt`", patterns, {"prompt": "What do you see?"}),
        Case("`max-tokens=5`", patterns, {"max-tokens": 5}),
        Case("`stop-strings`", patterns, {"stop-strings": " on | of |screen"}),
        Case("`repetition-penalty=1.2`", patterns, {"repetition-penalty": 1.2}),
        Case("`choices`, one of them true", [scene for scene in patterns if fits(scene)], choices),
        Case("`choices`, none of them true", [scene for scene in patterns if not fits(scene)], choices, False),
    ]


def quoted(value):
    """A property's value for a gst-launch description."""
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def captions(scene, properties, seconds=120):
    """What the element says of the scene's frames, or of its clips, in order."""
    if scene.clip == 1:
        turns = {"interval": 0, "every-nth": scene.step}
    else:
        # A little early, so that rounding makes no frame miss its turn.
        step = 10**9 * scene.step * scene.framerate[1] // scene.framerate[0] - 1000
        turns = {"interval": scene.clip * step, "frames": scene.clip}
    words = " ".join(f"{name}={quoted(value)}" for name, value in (turns | properties).items())
    description = f"{scene.source()} ! vlmnarrate mode=recorded {words} ! fakesink sync=false"
    return [s.get_string("text").strip() for s in messages(description, seconds)
            if not (s.has_field("partial") and s.get_value("partial"))
            and (scene.clip == 1 or s.get_value("frames") == scene.clip)]  # fmt: skip
