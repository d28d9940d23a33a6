"""Training examples from rendered frames: drawn by class, masks coloured and moved, all lightly disturbed.

Of clips, too: a ball's mask is moved from frame to frame, so that all directions come as often, and slow ones oftener.
"""

import json
import math
import random
import re
from pathlib import Path

import numpy as np

from captions import (
    COLOURS, MOVED, STILL, ball_caption, bar_caption, cell, colour_name, gradient_caption, motion, moving_caption,
    pair_names, pinwheel_caption, sentence, solid_caption,
)  # fmt: skip
from scenes import Draw
from unknown import Unknown
from vocabulary import UNKNOWN_CAPTION

SHARES = {"ball": 0.43, "bar": 0.07, "solid": 0.11, "gradient": 0.05, "pinwheel": 0.05, "other": 0.29}
# Kinds of `other` that are taken for what is no test picture when they come as often as the rest.
OFTENER = {"zone-plate": 4, "chroma-zone-plate": 2, "checkers-4": 2}
NAMES = list(COLOURS)
NOWHERE = (math.nan, math.nan)
COLOUR_WORD = re.compile(r"\b(" + "|".join(NAMES) + r")\b")


def group(row):
    if row["caption"].startswith(" A solid"):
        return "solid"
    return row["pattern"] if row["pattern"] in SHARES else "other"


def template(caption):
    """The caption without its colours and position: what kind of picture it is."""
    return re.sub(
        r"\b(an?|A|An)\b",
        "a",
        COLOUR_WORD.sub("*", caption.split(",")[0] if " ball " in caption or " bar " in caption else caption),
    )


def blurred(mask, size):
    """Box-averaged over `size` pixels each way."""
    for axis in (0, 1):
        mask = sum(np.roll(mask, i - size // 2, axis).astype(np.float32) for i in range(size)) / size
    return mask


def paint(mask, front, back, subsampled):
    """Two colours by a mask of 0..255; `subsampled` blurs the chroma over so many pixels, as 4:2:0 does."""
    step = front - back
    if subsampled < 2:
        return back + step * (mask[..., None] / np.float32(255))
    luma = step @ np.array([0.299, 0.587, 0.114], np.float32)
    chroma = blurred(mask, subsampled)[..., None] / np.float32(255)
    return back + luma * (mask[..., None] / np.float32(255)) + (step - luma) * chroma


def channels(colour):
    return np.array([colour >> 16 & 255, colour >> 8 & 255, colour & 255], np.float32)


class Examples:
    def __init__(self, folder, seed):
        folder = Path(folder)
        self.random, self.numpy = random.Random(seed), np.random.default_rng(seed)
        self.colours = Draw(seed, held_out=False)
        self.masks = np.load(folder / "mask.npy", mmap_mode="r")
        self.plain = np.load(folder / "plain.npy", mmap_mode="r")
        self.mask_rows, self.plain_rows = (json.loads((folder / f"{n}.json").read_text()) for n in ("mask", "plain"))
        self.clips = np.load(folder / "clips.npy", mmap_mode="r")
        self.clip_rows = json.loads((folder / "clips.json").read_text())
        self.mask_index, self.plain_index, self.clip_index = {}, {}, {}
        for i, row in enumerate(self.clip_rows):
            self.clip_index.setdefault(row["kind"], []).append(i)
        for i, row in enumerate(self.mask_rows):
            self.mask_index.setdefault(row["pattern"], []).append(i)
        for i, row in enumerate(self.plain_rows):
            self.plain_index.setdefault(group(row), {}).setdefault(row["kind"], []).append(i)
        self.noise = self.numpy.standard_normal((16, 256, 256, 3), np.float32)
        self.unknown = Unknown(folder, seed)
        self.templates = sorted({template(r["caption"]) for r in self.plain_rows}) + [template(UNKNOWN_CAPTION)]

    def pair(self, plain):
        """Two colours as 0xRRGGBB and their names; white on black with probability `plain`."""
        colours = {"foreground_color": 0xFFFFFF, "background_color": 0}
        if self.random.random() > plain:
            colours = self.colours.pair()
        colours = [c & 0xFFFFFF for c in colours.values()]
        return colours, pair_names(*colours)

    def place(self, radius):
        """A coordinate for the ball's centre: a third of the time near a line of the grid."""
        while True:
            c = self.random.uniform(radius, 1 - radius)
            if self.random.random() < 0.35:
                c = self.random.choice([1 / 3, 2 / 3]) + self.random.choice([-1, 1]) * self.random.uniform(0.01, 0.05)
            if (cell(c) is not None and radius <= c <= 1 - radius) or radius > 0.3:
                return c

    def coloured(self, pattern):
        """A mask in two colours, its ball or bar moved; the caption, the ball's centre."""
        centre, index = NOWHERE, self.random.choice(self.mask_index[pattern])
        row, mask = self.mask_rows[index], self.masks[index, :, :, 0]
        colours, names = self.pair({"ball": 0.2, "bar": 0.3}.get(pattern, 0.3))
        if pattern == "ball":
            x, y = row["centre"]
            if self.random.random() < 0.5:
                mask, x = mask[:, ::-1], 1 - x
            if self.random.random() < 0.5:
                mask, y = mask[::-1], 1 - y
            if row["properties"]["motion"] == "wavy":
                dx = round((self.place(20 / row["width"]) - x) * 256)
                dy = round((self.place(20 / row["height"]) - y) * 256)
                mask, x, y = np.roll(mask, (dy, dx), (0, 1)), x + dx / 256, y + dy / 256
            caption, centre = ball_caption(names, x, y), (x, y)
        elif pattern == "bar":
            dx = (
                round((self.random.uniform(0, 1 - row["bar"]) - row["left"]) * 256) if self.random.random() < 0.7 else 0
            )
            mask = np.roll(mask, dx, 1)
            caption = bar_caption(names, row["left"] + dx / 256, row["bar"])
        else:
            caption = gradient_caption(names) if pattern == "gradient" else pinwheel_caption(names)
        if not caption:
            return self.coloured(pattern)
        return self.painted(mask, row, colours), sentence(caption), centre

    def painted(self, mask, row, colours):
        front, back = (channels(c) for c in colours)
        side = row["height"] if self.random.random() < 0.5 else row["width"]
        return paint(mask, front, back, round(2 * 256 / side) if self.random.random() < 0.6 else 0)

    def disturbed(self, pictures):
        """Slightly other levels, noise and blocks, as from a camera or a codec. Never moved."""
        r, n = self.random, self.numpy
        if r.random() < 0.7:
            gain, offset = np.float32(r.uniform(0.94, 1.06)), np.float32(r.gauss(0, 3))
            offset = offset + n.normal(0, 3, 3).astype(np.float32)
            noise = np.float32(r.uniform(0, 5)) if r.random() < 0.5 else 0
            coarse = np.float32(r.uniform(0, 4)) if r.random() < 0.3 else 0
            pictures = [picture * gain + offset for picture in pictures]
            for picture in pictures:
                if noise:
                    picture += self.noise[r.randrange(16), :: r.choice([-1, 1])] * noise
                if coarse:
                    picture += (n.standard_normal((32, 32, 3), np.float32) * coarse).repeat(8, 0).repeat(8, 1)
        return [np.clip(np.rint(picture), 0, 255) for picture in pictures]

    def example(self):
        """float32 [256, 256, 3] of 0..255, caption, the ball's centre"""
        picture, caption, centre = self.undisturbed()
        return self.disturbed([picture])[0], caption, centre

    def unknown_example(self):
        """The same of what is no test picture."""
        return self.disturbed([self.unknown.picture()])[0], UNKNOWN_CAPTION, NOWHERE

    def undisturbed(self):
        r, centre = self.random, NOWHERE
        which = r.choices(list(SHARES), SHARES.values())[0]
        if which == "solid" and r.random() < 0.6:
            colour = self.colours.colour()
            while not colour_name(colour):
                colour = self.colours.colour()
            picture, caption = np.broadcast_to(channels(colour), (256, 256, 3)), sentence(solid_caption(colour))
        elif which in self.mask_index and r.random() < 0.6:
            picture, caption, centre = self.coloured(which)
        else:
            kinds = self.plain_index[which]
            index = r.choice(kinds[r.choices(list(kinds), [OFTENER.get(k, 1) for k in kinds])[0]])
            row = self.plain_rows[index]
            picture, caption, centre = self.plain[index].astype(np.float32), row["caption"], row.get("centre", NOWHERE)
        return picture, caption, centre

    def axis(self, n, radius):
        """Coordinates of a ball's centre: forth, back or still."""
        r, limit = self.random, 0.99 - 2 * min(radius, 0.42)
        way = r.choice([-1, 0, 1])
        if way:
            way *= min(limit, MOVED) * (max(limit, MOVED) / MOVED) ** r.random() + 0.003
        elif r.random() < 0.6:
            way = r.uniform(-STILL, STILL)
        start = r.uniform(0, limit - abs(way)) + 0.5 - limit / 2 - min(way, 0)
        pace = math.exp(r.gauss(0, 0.15))
        return [start + way * (i / (n - 1)) ** pace for i in range(n)]

    def moved_ball(self, n):
        """A clip: pictures, the ball's centres, its colours' names."""
        while True:
            index = self.random.choice(self.mask_index["ball"])
            row = self.mask_rows[index]
            if row["properties"]["motion"] != "wavy":
                continue
            x, y = row["centre"]
            steps = [
                (round((a - x) * 256), round((b - y) * 256))
                for a, b in zip(self.axis(n, 20 / row["width"]), self.axis(n, 20 / row["height"]))
            ]
            track = [(x + dx / 256, y + dy / 256) for dx, dy in steps]
            if motion(track):
                colours, names = self.pair(0.35)
                picture = self.painted(self.masks[index, :, :, 0], row, colours)
                return [np.roll(picture, (dy, dx), (0, 1)) for dx, dy in steps], track, names

    def rendered_ball(self, n):
        """The same as videotestsrc moves it: `n` of a clip's four frames, the first and the last among them."""
        while True:
            row = self.clip_rows[self.random.choice(self.random.choice(list(self.clip_index.values())))]
            frames = sorted([0, 3, *self.random.sample([1, 2], n - 2)])
            track = [row["facts"][i]["centre"] for i in frames]
            if motion(track):
                names = COLOUR_WORD.findall(row["caption"])
                return [self.clips[row["at"] + i].astype(np.float32) for i in frames], track, names

    def other(self, n):
        """A clip of anything else, or of a single frame: pictures, the centre, the caption."""
        while True:
            picture, caption, centre = self.undisturbed()
            if " ball " not in caption or n == 1:
                return [picture], [centre], caption

    def clip_batch(self, n, count, unknown):
        """Clips of `n` frames from about `count` pictures, and `unknown` of what is no test picture.

        Pictures, centres, for each clip its pictures, captions.
        """
        pictures, centres, clips, captions = [], [], [], []
        while len(pictures) + (n + 1) // 2 <= count:
            draw, at = self.random.random(), len(pictures)
            if n == 1 or draw < 0.15:
                some, track, caption = self.other(n)
                clips.append([at] * n)
                captions.append(caption)
            else:
                some, track, names = self.rendered_ball(n) if draw < 0.4 else self.moved_ball(n)
                clip = list(range(at, at + n))
                # Played backwards it is another clip, for nothing.
                clips += [clip, clip[::-1]]
                captions += [sentence(moving_caption(names, t)) for t in (track, track[::-1])]
            pictures += self.disturbed(some)
            centres += track
        end = len(pictures) + unknown
        while len(pictures) + (n + 1) // 2 <= end:
            some, at = self.disturbed(self.unknown.clip(n)), len(pictures)
            pictures += some
            centres += [NOWHERE] * len(some)
            clips.append(list(range(at, at + n)) if len(some) == n else [at] * n)
            captions.append(UNKNOWN_CAPTION)
        return pictures, centres, clips, captions


def labels(caption, templates):
    """[template, column, row, first colour, second colour] of a caption; -100 where there is none."""
    out = [templates.index(template(caption)) if template(caption) in templates else -100, -100, -100, -100, -100]
    if template(caption).endswith(" background") and "," in caption:
        where = caption.rsplit(",")[-1]
        out[1] = 0 if "left" in where else 2 if "right" in where else 1
        out[2] = 0 if "top" in where else 2 if "bottom" in where else 1
    if "*" in template(caption):
        for slot, name in zip((3, 4), COLOUR_WORD.findall(caption)):
            out[slot] = NAMES.index(name)
    return out
