"""Pictures that a program draws and that are no `videotestsrc` pattern, some nearly: training needs the difference.

`pictures(count)` draws so many, always the same, 256x256 from twice as large. What a pattern could look like is left
out: a single disc, an upright bar, a gradient from top to bottom, red and green checks.
"""

import math
import random

import numpy as np
from PIL import Image, ImageDraw

SIDE = 512
WORDS = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some"
).split()


def colour(rng, spread=None):
    """Any colour; greys and black and white oftener than chance has them."""
    draw = rng.random()
    if draw < 0.15:
        return rng.choice([(0, 0, 0), (255, 255, 255)])
    if draw < 0.3:
        return (rng.randrange(256),) * 3
    return tuple(rng.randrange(256) for _ in range(3))


def two_colours(rng):
    """Two that can be told apart."""
    while True:
        a, b = colour(rng), colour(rng)
        if math.dist(a, b) > 70:
            return a, b


def sheet(rng, ground=None):
    picture = Image.new("RGB", (SIDE, SIDE), ground or colour(rng))
    return picture, ImageDraw.Draw(picture)


def box(rng, least=60, most=300):
    w, h = rng.randint(least, most), rng.randint(least, most)
    x, y = rng.randint(-20, SIDE - w + 20), rng.randint(-20, SIDE - h + 20)
    return x, y, x + w, y + h


def shapes(rng):
    picture, draw = sheet(rng)
    for _ in range(rng.randint(3, 25)):
        kind = rng.choice([draw.ellipse, draw.rectangle, draw.polygon, draw.line])
        if kind in (draw.ellipse, draw.rectangle):
            kind(box(rng), fill=colour(rng), outline=colour(rng), width=rng.randint(1, 12))
        else:
            points = [(rng.randrange(SIDE), rng.randrange(SIDE)) for _ in range(rng.randint(3, 7))]
            kind(points, fill=colour(rng), **({"width": rng.randint(2, 20)} if kind == draw.line else {}))
    return picture


def one_shape(rng):
    """A single thing on a plain ground that is neither ball nor bar."""
    front, back = two_colours(rng)
    picture, draw = sheet(rng, back)
    x, y, size = rng.randint(100, SIDE - 100), rng.randint(100, SIDE - 100), rng.randint(50, 140)
    kind = rng.choice(["polygon", "ring", "cross", "lines", "square"])
    if kind == "polygon":
        angle, n = rng.random() * 6, rng.randint(3, 5)
        turns = [angle + i * 2 * math.pi / n for i in range(n)]
        draw.polygon([(x + size * math.cos(t), y + size * math.sin(t)) for t in turns], fill=front)
    elif kind == "square":
        draw.rectangle((x - size, y - size, x + size, y + size * rng.uniform(0.3, 1)), fill=front)
    elif kind == "ring":
        draw.ellipse((x - size, y - size, x + size, y + size), outline=front, width=rng.randint(4, size // 2))
    elif kind == "cross":
        draw.line((x - size, y, x + size, y), fill=front, width=size // 3)
        draw.line((x, y - size, x, y + size), fill=front, width=size // 3)
    else:
        for i in range(rng.randint(2, 6)):
            ends = [(rng.randrange(SIDE), rng.randrange(SIDE)) for _ in range(2)]
            draw.line(ends, fill=front, width=rng.randint(3, 20))
    return picture


def discs(rng):
    """Two to nine discs: more than one ball."""
    front, back = two_colours(rng)
    picture, draw = sheet(rng, back)
    size = rng.randint(18, 70)
    for _ in range(rng.randint(2, 9)):
        x, y = rng.randint(size, SIDE - size), rng.randint(size, SIDE - size)
        draw.ellipse((x - size, y - size, x + size, y + size), fill=front if rng.random() < 0.7 else colour(rng))
    return picture


def ruled(rng):
    """Stripes, slanting or across, in two or many colours."""
    some = [colour(rng) for _ in range(rng.choice([2, 2, 3, 6]))]
    picture, draw = sheet(rng, some[0])
    step, angle = rng.randint(12, 160), rng.choice([0, rng.uniform(0.2, 1.3)])
    for i in range(-8, 8 + SIDE // step * 3):
        y = i * step - SIDE
        slant = SIDE * math.tan(angle)
        draw.polygon([(0, y), (SIDE, y + slant), (SIDE, y + slant + step), (0, y + step)], fill=some[i % len(some)])
    return picture


def upright(rng):
    """Upright stripes that are no colour bars."""
    picture, draw = sheet(rng)
    x, even = 0, rng.random() < 0.5
    width = rng.randint(10, 130)
    some = [colour(rng) for _ in range(rng.choice([2, 3, 12]))]
    i = rng.randrange(12)
    while x < SIDE:
        w = width if even else rng.randint(8, 150)
        draw.rectangle((x, 0, x + w, SIDE), fill=some[i % len(some)])
        x, i = x + w, i + 1
    return picture


def checks(rng):
    """A checkerboard in colours that `checkers` has not."""
    a, b = two_colours(rng)
    while min(a[2], b[2]) < 60 and abs(a[0] - b[0]) + abs(a[1] - b[1]) > 120:
        a, b = two_colours(rng)
    picture, draw = sheet(rng, a)
    w = rng.randint(16, 130)
    h = w if rng.random() < 0.6 else rng.randint(16, 130)
    for y in range(0, SIDE, h):
        for x in range(0, SIDE, w):
            if (x // w + y // h) % 2:
                draw.rectangle((x, y, x + w - 1, y + h - 1), fill=b)
    return picture


def tiles(rng):
    """A grid of tiles in drawn colours, as of a game or a puzzle."""
    picture, draw = sheet(rng)
    some, w, h = [colour(rng) for _ in range(rng.randint(3, 8))], rng.randint(20, 120), rng.randint(20, 120)
    gap = rng.choice([0, 0, 3, 8])
    for y in range(0, SIDE, h):
        for x in range(0, SIDE, w):
            draw.rectangle((x + gap, y + gap, x + w - 1, y + h - 1), fill=rng.choice(some))
    return picture


def gradient(rng):
    """From side to side, aslant or from a middle; two to four colours."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    if rng.random() < 0.4:
        along = np.hypot(x - rng.random(), y - rng.random())
    else:
        angle = rng.choice([0, math.pi, rng.uniform(-0.9, 0.9), rng.uniform(2.2, 4)])
        along = x * math.cos(angle) + y * math.sin(angle)
    along = (along - along.min()) / (along.max() - along.min())
    some = np.array([*two_colours(rng), *(colour(rng) for _ in range(rng.randint(0, 2)))], np.float32)
    at = np.linspace(0, 1, len(some))
    return Image.fromarray(np.stack([np.interp(along, at, some[:, c]) for c in range(3)], -1).astype(np.uint8))


def plasma(rng):
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    channels = []
    for _ in range(3):
        waves = 0
        for _ in range(rng.randint(1, 4)):
            phase = rng.uniform(-20, 20) * x + rng.uniform(-20, 20) * y
            waves = waves + np.sin(phase + 5 * np.sin(rng.uniform(1, 9) * x + rng.random()))
        channels.append(waves)
    if rng.random() < 0.25:
        channels = [channels[0]] * 3
    values = np.stack(channels, -1)
    return Image.fromarray(((values - values.min()) / np.ptp(values) * 255).astype(np.uint8))


def noise(rng):
    """Noise in colours or in soft blobs: not the fine grain of snow in black and white."""
    n, cells = np.random.default_rng(rng.randrange(1 << 30)), rng.choice([6, 12, 24, 48, 256])
    values = n.integers(0, 256, (cells, cells, 3), np.uint8)
    if cells < 100 and rng.random() < 0.4:
        values = values[..., :1].repeat(3, -1)
    return Image.fromarray(values).resize((SIDE, SIDE), rng.choice([Image.BICUBIC, Image.NEAREST]))


def text(rng):
    """A page, a title, a terminal."""
    front, back = rng.choice([((0, 0, 0), (255, 255, 255)), ((230, 230, 230), (20, 20, 20)), two_colours(rng)])
    small = rng.choice([SIDE, 256, 160, 100])
    picture = Image.new("RGB", (small, small), back)
    draw, lines = ImageDraw.Draw(picture), rng.choice([1, 2, small // 14, small // 14])
    y = rng.randint(2, 20) if lines > 2 else small // 2 - 10
    for _ in range(lines):
        words = " ".join(rng.choices(WORDS, k=rng.randint(1, max(2, small // 32))))
        draw.text((rng.randint(2, 12) if lines > 2 else small // 6, y), words, fill=front)
        y += rng.choice([11, 12, 14, 14, 28])
    return picture.resize((SIDE, SIDE), Image.BICUBIC)


def chart(rng):
    picture, draw = sheet(rng, rng.choice([(255, 255, 255), (20, 20, 30), (240, 240, 230)]))
    ink = (0, 0, 0) if picture.getpixel((0, 0))[0] > 100 else (255, 255, 255)
    draw.line([(40, 30), (40, 470), (490, 470)], fill=ink, width=3)
    if rng.random() < 0.5:
        for i in range(n := rng.randint(4, 14)):
            w = 440 / n
            draw.rectangle((50 + i * w, rng.randint(60, 440), 50 + (i + 0.7) * w, 468), fill=colour(rng))
    else:
        for _ in range(rng.randint(1, 4)):
            points, y = [], rng.randint(100, 400)
            for x in range(44, 490, 12):
                points.append((x, y := min(460, max(30, y + rng.randint(-40, 40)))))
            draw.line(points, fill=colour(rng), width=rng.randint(2, 6))
    return picture


def halves(rng):
    """The screen cut in two or four."""
    picture, draw = sheet(rng)
    x, y = rng.randint(100, 400), rng.randint(100, 400)
    if rng.random() < 0.6:
        draw.rectangle((0, 0, x, SIDE if rng.random() < 0.5 else y), fill=colour(rng))
    draw.rectangle((0, y, SIDE, SIDE), fill=two_colours(rng)[0])
    return picture


KINDS = [shapes, one_shape, discs, ruled, upright, checks, tiles, gradient, plasma, noise, text, text, chart, halves]


def pictures(count):
    rng = random.Random(7)
    for _ in range(count):
        while True:
            picture = rng.choice(KINDS)(rng).resize((256, 256), Image.BOX)
            if max(np.asarray(picture).std((0, 1))) > 12:
                break
        yield picture
