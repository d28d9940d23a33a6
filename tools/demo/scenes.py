"""Scenes: a state of `videotestsrc`, the caps it is rendered in, and the draws of scenes to train on and to judge on.

No dependencies: rendering (render.py) and evaluation through the element (evaluate.py) share this.
"""

import random
from collections import Counter
from dataclasses import dataclass, field

from captions import CHROMA_SUBSAMPLED, COLOURS, caption, clip_caption, pair_names

USUAL_SIZES = [(320, 240), (640, 480), (640, 360), (1280, 720), (1920, 1080)]
HELD_OUT_SIZES = [
    (176, 144), (200, 150), (352, 288), (426, 240), (480, 270), (240, 426), (400, 400), (512, 288),
    (720, 576), (854, 480), (96, 72), (288, 512), (1024, 768), (1600, 900), (720, 1280),
]  # fmt: skip
ASPECTS = [4 / 3, 16 / 9, 1, 3 / 2, 2, 2.4, 3 / 4, 9 / 16, 2 / 3]
FORMATS = ["I420", "I420", "NV12", "RGB", "YUY2", "BGRx", "AYUV", "Y444"]
HELD_OUT_FORMATS = ["I420", "I420", "NV12", "RGB", "YUY2", "UYVY", "RGBA", "NV21"]
STILL = ["red", "green", "blue", "circular", "gamut", "smpte75", "smpte100", "spokes", "colors", "smpte-rp-219"]
MOVING = ["smpte", "snow"]
CHECKERS = ["checkers-1", "checkers-2", "checkers-4", "checkers-8"]
PLATES = ["zone-plate", "chroma-zone-plate"]
WAYS = 9  # that a ball can move: eight, and not at all


@dataclass
class Scene:
    pattern: str
    width: int
    height: int
    format: str = "RGB"
    frames: int = 1
    step: int = 1  # of so many frames from the source, one is kept
    framerate: tuple = (30, 1)
    properties: dict = field(default_factory=dict)  # of videotestsrc, beside the pattern
    quantizer: int = 0  # of H.264 on the way; 0: none
    clip: int = 1  # so many of the frames kept are shown together

    def get(self, name, default=None):
        return self.properties.get(name, default)

    def captions(self):
        """{frame number: caption or None} of the frames kept"""
        return {i: caption(self, i) for i in range(0, self.frames * self.step, self.step)}

    def clips(self):
        """{frame numbers: caption or None} of the clips that the frames kept make up"""
        numbers = range(0, self.frames * self.step, self.step)
        parts = [tuple(numbers[i : i + self.clip]) for i in range(0, self.frames - self.clip + 1, self.clip)]
        return {part: clip_caption(self, part) for part in parts}

    def source(self):
        """The gst-launch description up to raw frames in `format`."""
        properties = " ".join(f"{k}={str(v).lower()}" for k, v in self.properties.items())
        buffers = (self.frames - 1) * self.step + 1
        text = (
            f"videotestsrc pattern={self.pattern} num-buffers={buffers} {properties} ! video/x-raw,"
            f"format={self.format},width={self.width},height={self.height},"
            f"framerate={self.framerate[0]}/{self.framerate[1]}"
        )
        if self.quantizer:
            text += (
                f" ! videoconvert ! video/x-raw,format=I420 ! x264enc pass=quant quantizer={self.quantizer}"
                " speed-preset=veryfast tune=zerolatency threads=1 ! avdec_h264 max-threads=1"
            )
        return text


def argb(colour):
    return 0xFF000000 | colour


def even(value):
    return max(48, round(value / 2) * 2)


class Draw:
    """Draws scenes; `held_out` says from which side of the fence."""

    def __init__(self, seed, held_out):
        self.random = random.Random(seed)
        self.held_out = held_out

    def size(self, limit=1920):
        r = self.random
        while True:
            if self.held_out:
                w, h = r.choice(HELD_OUT_SIZES)
            elif r.random() < 0.3:
                w, h = r.choices(USUAL_SIZES, [4, 4, 4, 2, 1])[0]
            else:
                area = r.choice([96, 160, 240, 320, 480, 640, 960]) * r.uniform(0.8, 1.25)
                aspect = r.choice(ASPECTS)
                w, h = even(area * aspect**0.5), even(area / aspect**0.5)
            if max(w, h) <= limit and (self.held_out or (w, h) not in HELD_OUT_SIZES):
                return w, h

    def scene(self, pattern, frames=1, limit=1920, encode=0.2, formats=None, **properties):
        r = self.random
        properties = {k.replace("_", "-"): v for k, v in properties.items()}
        rate = (r.randint(101, 2999), 100) if r.random() < 0.8 else (30, 1)
        quantizer = r.randint(20, 32) if r.random() < encode else 0
        choice = formats or (HELD_OUT_FORMATS if self.held_out else FORMATS)
        return Scene(pattern, *self.size(limit), r.choice(choice), frames, 1, rate, properties, quantizer)

    def colour(self, spread=20):
        """A colour that has a name: one of the shades, or one near it."""
        r = self.random
        shade = r.choice(r.choice(list(COLOURS.values())))
        if r.random() < 0.4:
            return shade
        return sum(min(255, max(0, (shade >> s & 255) + r.randint(-spread, spread))) << s for s in (16, 8, 0))

    def pair(self):
        while True:
            pair = self.colour(), self.colour()
            if pair_names(*pair):
                return {"foreground_color": argb(pair[0]), "background_color": argb(pair[1])}

    def ball(self, frames, colours=None, **options):
        r = self.random
        motion = r.choices(["wavy", "sweep", "hsweep"], [6, 1, 1])[0]
        scene = self.scene("ball", frames, motion=motion, flip=r.random() < 0.2, **(colours or {}), **options)
        scene.step = r.randint(3, 60 if scene.width * scene.height < 500_000 else 20)
        return scene

    def ball_clip(self, clip, **options):
        """Six clips of a ball that follow each other, from hardly moving ones to half a second of the usual ball."""
        r = self.random
        properties = {"motion": r.choice(["wavy", "wavy", "sweep", "hsweep"]), "flip": r.random() < 0.1}
        scene = self.scene("ball", 6 * clip, **properties, **(self.pair() if r.random() < 0.5 else {}), **options)
        scene.clip, scene.step = clip, max(1, round(3 * 16 ** r.random() / (clip - 1)))
        return scene

    def ball_clips(self, clip, quota, **options):
        """Scenes until each way that a ball can move has `quota` clips."""
        scenes, found = [], Counter()
        while len(found) < WAYS or min(found.values()) < quota:
            scene = self.ball_clip(clip, **options)
            ways = Counter(way(c) for c in scene.clips().values() if c)
            if 2 * sum(n for w, n in ways.items() if found[w] < quota) > sum(ways.values()):
                scenes.append(scene)
                found += ways
        return scenes

    def other_clips(self, clip, count):
        """Each pattern but ball, `count` scenes of one clip, and more of what has colours."""
        scenes = self.patterns(count) + [self.bar(1, **self.pair()) for _ in range(6 * count)]
        scenes += [self.scene("solid-color", foreground_color=argb(self.colour())) for _ in range(10 * count)]
        for scene in scenes:
            scene.frames = scene.clip = clip
            if scene.pattern == "bar":
                scene.properties.pop("horizontal-speed", None)
        return scenes

    def bar(self, frames, **options):
        scene = self.scene("bar", frames, **options)
        if self.random.random() < 0.75:
            scene.properties["horizontal-speed"] = self.random.choice([-1, 1]) * self.random.randint(1, scene.width - 1)
        return scene

    def plate(self, pattern, **options):
        scene = self.scene(pattern, 3, **options)
        longest, shortest = max(scene.width, scene.height), min(scene.width, scene.height)
        least, most = max(6, 2600 // shortest), min(60, 32000 // longest)
        k = self.random.randint(least, max(least, most))
        scene.properties |= {"kx2": k, "ky2": k, "kt": self.random.choice([0, 1, 3, 8, 20])}
        return scene

    def patterns(self, count):
        """Each pattern but ball, bar and solid-color, `count` scenes."""
        scenes = []
        for _ in range(count):
            scenes += [self.scene(p) for p in STILL] + [self.scene(p, 3) for p in MOVING]
            scenes += [self.scene(p, encode=0) for p in CHECKERS for _ in range(2)]
            scenes += [self.plate(p) for p in PLATES] + [self.scene(p) for p in PLATES]
            scenes += [self.scene("blink", 2), self.scene("black"), self.scene("white"), self.scene("gradient")]
            scenes += [self.scene("pinwheel", 3, kt=self.random.randint(0, 40))]
        return scenes


def training():
    """[(kind, scenes)]: `plain` has its final colours; `mask` is white on black, coloured by the trainer."""
    d = Draw(1, held_out=False)
    masks = [d.ball(12, limit=1280, encode=0, formats=["RGB"]) for _ in range(150)]
    for scene in masks:
        scene.properties["flip"] = False
    masks += [d.bar(12, limit=1280, encode=0, formats=["RGB"]) for _ in range(40)]
    masks += [d.scene("gradient", encode=0, formats=["RGB"]) for _ in range(30)]
    masks += [d.scene("pinwheel", 4, limit=1280, encode=0, formats=["RGB"], kt=30) for _ in range(30)]
    plain = d.patterns(36)
    plain += [d.ball(8, d.pair(), encode=0.3) for _ in range(170)] + [d.ball(12, encode=0.3) for _ in range(60)]
    plain += [d.bar(6, **d.pair()) for _ in range(40)] + [d.bar(6) for _ in range(20)]
    plain += [d.scene("solid-color", foreground_color=argb(d.colour())) for _ in range(120)]
    plain += [d.scene(p, **d.pair()) for p in ("gradient", "pinwheel") for _ in range(30)]
    subsampled = {"encode": 0, "limit": 1280, "formats": ["I420", "NV12"]}
    plain += [d.scene(p, **subsampled) for p in ("checkers-2", "checkers-4") for _ in range(60)]
    plain += [d.ball(6, d.pair(), limit=1280, encode=0.3) for _ in range(60)]
    return {"mask": masks, "plain": plain}


def held_out(scale=1):
    """Scenes to judge on: other sizes, times, colour pairs and formats than those of training."""
    d = Draw(2, held_out=True)
    scenes = d.patterns(8 * scale)
    scenes += [d.ball(6, encode=0.15) for _ in range(20 * scale)]
    scenes += [d.ball(6, d.pair(), encode=0.15) for _ in range(40 * scale)]
    scenes += [d.bar(4) for _ in range(6 * scale)] + [d.bar(4, **d.pair()) for _ in range(10 * scale)]
    scenes += [d.scene("solid-color", foreground_color=argb(d.colour())) for _ in range(40 * scale)]
    scenes += [d.scene(p, **d.pair()) for p in ("gradient", "pinwheel") for _ in range(8 * scale)]
    return scenes


def training_clips():
    d = Draw(3, held_out=False)
    return d.ball_clips(4, 40, limit=1280, encode=0.3)


def held_out_clips(scale=1):
    d = Draw(4, held_out=True)
    return [
        scene
        for clip, quota in ((4, 20), (3, 8), (2, 8))
        for scene in d.ball_clips(clip, quota * scale, encode=0.2) + d.other_clips(clip, scale)
    ]


def defaults():
    """What a newcomer types first: each pattern with no property set, in the size and format it has without caps."""
    moving = [Scene("ball", 320, 240, "ABGR64_LE", 60, 10), Scene("blink", 320, 240, "ABGR64_LE", 2)]
    names = STILL + MOVING + CHECKERS + PLATES + ["black", "white", "solid-color", "bar", "gradient", "pinwheel"]
    return moving + [Scene(name, 320, 240, "ABGR64_LE") for name in names]


def way(caption):
    """How the ball of a clip's caption moves; of other captions `no ball`."""
    return caption.rsplit(", ")[-1].rstrip(".") if " ball " in caption else "no ball"


def kind(scene):
    """The class that accuracy is counted by."""
    if scene.pattern in PLATES and not scene.get("kx2", 0):
        return f"{scene.pattern} (plain)"
    coloured = scene.pattern in ("ball", "bar", "gradient", "pinwheel") and "foreground-color" in scene.properties
    return f"{scene.pattern} (colours)" if coloured else scene.pattern


if __name__ == "__main__":
    for name, scenes in ("clips", training_clips()), ("held-out-clips", held_out_clips()):
        known = [(s.clip, way(c)) for s in scenes for c in s.clips().values() if c]
        print(f"{name}: {len(scenes)} scenes, {len(known)} clips", sorted(Counter(known).items()))
    for name, scenes in {**training(), "held-out": held_out()}.items():
        pictures = [c for s in scenes for c in s.captions().values()]
        known = [c for c in pictures if c]
        print(f"{name}: {len(scenes)} scenes, {len(known)} frames with a caption, {len(pictures) - len(known)} without")
        print(f"  {len(set(known))} captions, formats with chroma subsampled: "
              f"{sum(s.format in CHROMA_SUBSAMPLED for s in scenes)}")  # fmt: skip
