"""Training examples of what is no test picture, from what real.py collected: cut, coloured and spoilt in many ways."""

import io
import json
import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from drawn import WORDS, colour

SIDE = 256
PLAIN = 7  # a picture that deviates less than this may be a solid screen


class Unknown:
    def __init__(self, folder, seed):
        self.random = random.Random(seed)
        self.bytes = np.memmap(folder / "real.bin", np.uint8, "r")
        self.rows = json.loads((folder / "real.json").read_text())
        packages, videos = {}, {}
        for i, row in enumerate(self.rows):
            packages.setdefault(row["package"], []).append(i)
            if row["video"]:
                videos.setdefault(row["video"], []).append(i)
        self.drawn = packages.pop("", [])
        self.packages = list(packages.values())
        # A package of many pictures comes oftener, but not in proportion.
        self.shares = [len(p) ** 0.7 for p in self.packages]
        self.videos = [v for v in videos.values() if len(v) >= 8]

    def stored(self, index):
        row = self.rows[index]
        size = row["width"], row["height"]
        return Image.frombytes("RGB", size, self.bytes[row["at"] : row["at"] + 3 * size[0] * size[1]].tobytes())

    def some(self):
        """A stored picture; and whether it is a drawn one, of which no part may be taken."""
        if self.drawn and self.random.random() < 0.2:
            return self.stored(self.random.choice(self.drawn)), True
        return self.stored(self.random.choice(self.random.choices(self.packages, self.shares)[0])), False

    def cut(self, picture, box):
        """A part of the picture, scaled to what the model sees."""
        r = self.random
        how = r.choices([Image.BOX, Image.BILINEAR, Image.BICUBIC, Image.NEAREST], [2, 4, 2, 1])[0]
        box = [min(max(v, 0), limit) for v, limit in zip(box, picture.size * 2)]  # rounding
        return picture.resize((SIDE, SIDE), how, box)

    def box(self, picture):
        r, (w, h) = self.random, picture.size
        if r.random() < 0.3:
            return 0, 0, w, h
        part, aspect = r.uniform(0.25, 1), math.exp(r.gauss(0, 0.25))
        cw, ch = min(w, w * part * aspect), min(h, h * part / aspect)
        x, y = r.uniform(0, w - cw), r.uniform(0, h - ch)
        return x, y, x + cw, y + ch

    def look(self):
        """One way to spoil pictures, the same for all frames of a clip."""
        r, steps = self.random, []
        if r.random() < 0.5:
            steps.append(ImageOps.mirror)
        if r.random() < 0.06:
            steps.append(r.choice([ImageOps.flip, lambda p: p.transpose(Image.ROTATE_90)]))
        if r.random() < 0.2:  # a small video, scaled up
            small, how = (r.randint(48, 180), r.randint(48, 180)), r.choice([Image.BILINEAR, Image.BICUBIC])
            steps.append(lambda p: p.resize(small, Image.BOX).resize((SIDE, SIDE), how))
        if r.random() < 0.12:
            radius = 0.5 * 16 ** r.random()
            steps.append(lambda p: p.filter(ImageFilter.GaussianBlur(radius)))
        tone = r.random()
        if tone < 0.15:
            steps.append(lambda p: ImageOps.grayscale(p).convert("RGB"))
        elif tone < 0.5:
            strength = r.uniform(0.2, 1.8)
            steps.append(lambda p: ImageEnhance.Color(p).enhance(strength))
        elif tone < 0.56:
            order = r.sample(range(3), 3)
            steps.append(lambda p: Image.merge("RGB", [p.getchannel(i) for i in order]))
        elif tone < 0.6:
            bits = r.randint(1, 3)
            steps.append(lambda p: ImageOps.posterize(p, bits))
        elif tone < 0.63:
            steps.append(ImageOps.invert)
        elif tone < 0.66:
            level = r.randint(60, 190)
            steps.append(lambda p: p.convert("L").point(lambda v: 255 * (v > level)).convert("RGB"))
        elif tone < 0.7:
            dark, bright = colour(r), colour(r)
            steps.append(lambda p: ImageOps.colorize(ImageOps.grayscale(p), dark, bright))
        light = r.random()
        if light < 0.4:
            strength = r.uniform(0.5, 1.5)
            steps.append(lambda p: ImageEnhance.Contrast(p).enhance(strength))
        if light < 0.6:
            gain = r.uniform(0.1, 0.5) if r.random() < 0.3 else r.uniform(0.6, 1.4)
            steps.append(lambda p: ImageEnhance.Brightness(p).enhance(gain))
        if r.random() < 0.1:  # black at two edges
            part, across = r.uniform(0.5, 0.9), r.random() < 0.5
            w, h = (SIDE, round(SIDE * part)) if across else (round(SIDE * part), SIDE)
            steps.append(lambda p: ImageOps.pad(p.resize((w, h)), (SIDE, SIDE)))
        if r.random() < 0.08:
            words, at, ink = " ".join(r.choices(WORDS, k=5)), (r.randint(0, 120), r.randint(0, 240)), colour(r)
            steps.append(lambda p: written(p, at, words, ink))
        if r.random() < 0.3:
            quality, fine = r.randint(4, 45), r.choice([0, 2])
            steps.append(lambda p: squeezed(p, quality, fine))
        return steps

    def spoilt(self, pictures):
        """float32 [256, 256, 3] each; None if one became too plain."""
        for step in self.look():
            pictures = [step(p) for p in pictures]
        arrays = [np.asarray(p, np.float32) for p in pictures]
        return arrays if min(a.std((0, 1)).max() for a in arrays) > PLAIN else None

    def picture(self):
        while True:
            picture, drawn = self.some()
            picture = self.cut(picture, (0, 0, *picture.size) if drawn else self.box(picture))
            if self.random.random() < 0.04:
                self.beside(picture)
            if done := self.spoilt([picture]):
                return done[0]

    def beside(self, picture):
        """Another picture within it, or next to it."""
        r, (other, _) = self.random, self.some()
        w, h = r.choice([(128, 256), (256, 128), (r.randint(60, 180), r.randint(60, 180))])
        picture.paste(other.resize((w, h)), (r.choice([0, SIDE - w]), r.choice([0, SIDE - h])))

    def clip(self, n):
        """Frames of a video, or of a picture that is panned over; of one that stands still, a single frame."""
        while True:
            draw = self.random.random()
            if draw < 0.35 and self.videos:
                video = self.random.choice(self.videos)
                step = self.random.randint(1, (len(video) - 1) // (n - 1)) if n > 1 else 1
                start = self.random.randrange(len(video) - step * (n - 1))
                pictures = [self.stored(i) for i in video[start : start + step * (n - 1) + 1 : step]]
                box = self.box(pictures[0])
                pictures = [self.cut(p, box) for p in pictures]
            else:
                picture, drawn = self.some()
                box = (0, 0, *picture.size) if drawn else self.box(picture)
                boxes = [box] * (1 if draw > 0.75 else n)
                if len(boxes) > 1 and not drawn:
                    end = self.box(picture)
                    boxes = [[a + (b - a) * i / (n - 1) for a, b in zip(box, end)] for i in range(n)]
                pictures = [self.cut(picture, b) for b in boxes]
            if done := self.spoilt(pictures):
                return done


def written(picture, at, words, ink):
    picture = picture.copy()
    ImageDraw.Draw(picture).text(at, words, fill=ink)
    return picture


def squeezed(picture, quality, fine):
    """As a codec leaves it that has few bits."""
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality, subsampling=fine)
    return Image.open(out).convert("RGB")
