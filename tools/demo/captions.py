"""The one true table: what each `videotestsrc` picture is called.

`caption(scene, frame)` gives the caption of one frame of a scene (see scenes.py), decided from the source's
state, not from its pixels, and true of what is left of it at 256x256. It gives None where the picture has no
honest single name: a ball or a bar on a line of the 3x3 grid, a checkerboard just fading into its average
colour, a colour between two names. Such frames are neither trained on nor judged. `clip_caption(scene, frames)`
does so of several frames that are shown together. No dependencies: the evaluation runs with the system's Python.
"""

import math

# Colours by name: the shades that carry it. Any other colour has the name of the nearest shade (CIE Lab).
COLOURS = {
    "black": [0x000000],
    "white": [0xFFFFFF],
    "grey": [0x808080, 0xA0A0A0, 0x606060],
    "red": [0xFF0000, 0xD01010],
    "green": [0x00FF00, 0x00A000, 0x008000],
    "blue": [0x0000FF, 0x2040E0, 0x0000A0],
    "yellow": [0xFFFF00, 0xF0E020],
    "cyan": [0x00FFFF, 0x20D0E0],
    "magenta": [0xFF00FF, 0xE020D0],
    "orange": [0xFF8000, 0xFFA500],
    "purple": [0x800080, 0x7000B0],
    "pink": [0xFFC0CB, 0xFF90B8],
    "brown": [0x8B4513, 0x703810],
    "olive": [0x808000],
}
# What it says of everything else.
UNKNOWN = "This demo model only knows test pictures; choose a model."
GRID_MARGIN = 0.01  # of the picture: this near to a line of the 3x3 grid, a position has no single name
COLOUR_MARGIN = 1.6  # the second nearest name must be this much further than the nearest
CONTRAST = 40  # Lab distance that two colours of one picture need
# Of the picture, in one axis: a ball that stays within STILL does not move, one that gets further than MOVED does.
STILL, MOVED, TURNED = 0.03, 0.07, 0.01
CHROMA_SUBSAMPLED = {"I420", "NV12", "NV21", "YV12", "YUY2", "UYVY", "Y42B"}

# Patterns that look the same whatever the size, the time and the colours.
FIXED = {
    "smpte": "SMPTE colour bars.",
    "smpte75": "Seven vertical colour bars at 75% intensity.",
    "smpte100": "Seven vertical colour bars at full intensity.",
    "smpte-rp-219": "SMPTE RP 219 high-definition colour bars.",
    "snow": "Black and white television snow.",
    "circular": "Black and white concentric rings.",
    "gamut": "Black, white, red and blue horizontal bands.",
    "spokes": "Thin white spokes on a black background.",
    "colors": "A grid of many colours.",
    "red": "A solid red screen.",
    "green": "A solid green screen.",
    "blue": "A solid blue screen.",
}
POSITIONS = [
    ["at the top left", "at the top", "at the top right"],
    ["on the left", "in the middle", "on the right"],
    ["at the bottom left", "at the bottom", "at the bottom right"],
]


def lab(rgb):
    """CIE Lab of 0xRRGGBB (sRGB, D65)."""
    r, g, b = (((rgb >> s) & 255) / 255 for s in (16, 8, 0))
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (r, g, b))
    x = (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505
    y = 0.2126 * r + 0.7152 * g + 0.0722 * b
    z = (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


SHADES = [(name, lab(shade)) for name, shades in COLOURS.items() for shade in shades]


def colour_name(rgb):
    """The name of 0xRRGGBB, or None between two names."""
    here = lab(rgb)
    best = {}
    for name, there in SHADES:
        best[name] = min(best.get(name, 1e9), math.dist(here, there))
    (first, name), (second, _) = sorted((d, n) for n, d in best.items())[:2]
    return name if first < 25 and second > COLOUR_MARGIN * first + 4 else None


def pair_names(foreground, background):
    """The names of two colours that can be told apart, or None."""
    names = colour_name(foreground), colour_name(background)
    if None in names or names[0] == names[1] or math.dist(lab(foreground), lab(background)) < CONTRAST:
        return None
    return names


def article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def cell(fraction):
    """Which third of the picture, or None on a line."""
    if min(abs(fraction - 1 / 3), abs(fraction - 2 / 3)) < GRID_MARGIN:
        return None
    return int(fraction * 3)


def ball_centre(scene, frame):
    """Centre of the ball as fractions of width and height; the formulas of videotestsrc, animation-mode=frames."""
    turns = frame / 200
    w, h = scene.width, scene.height
    if scene.get("motion", "wavy") == "wavy":
        angle = 2 * math.pi * turns
        x = 20 + (0.5 + 0.5 * math.sin(angle)) * (w - 40)
        y = 20 + (0.5 + 0.5 * math.sin(angle * math.sqrt(2))) * (h - 40)
    else:
        if scene.get("motion") == "hsweep":
            turns = turns / 2 - math.floor(turns) / 2
        radius = min(w, h) // 4
        x = w // 2 + math.sin(2 * math.pi * turns) * radius
        y = h // 2 - math.cos(2 * math.pi * turns) * radius
    return x / w, y / h


def ball_flipped(scene, frame):
    return scene.get("flip", False) and frame // 50 % 2 == 1


def colours(scene):
    """Foreground and background, 0xRRGGBB."""
    return scene.get("foreground-color", 0xFFFFFFFF) & 0xFFFFFF, scene.get("background-color", 0xFF000000) & 0xFFFFFF


def ball_names(scene, frame):
    names = pair_names(*colours(scene))
    return names and names[::-1] if ball_flipped(scene, frame) else names


def bar_left(scene, frame):
    """Left edge of the bar as a fraction of the width: `horizontal-speed` scrolls it."""
    return (-scene.get("horizontal-speed", 0) * frame) % scene.width / scene.width


def ball_caption(names, x, y):
    column, row = cell(x), cell(y)
    if names is None or column is None or row is None:
        return None
    return f"{article(names[0])} ball on {article(names[1])} background, {POSITIONS[row][column]}."


def motion(track):
    """How a ball moves whose centre is at these places one after the other; None where that has no honest name."""
    words = []
    for axis, (back, forth) in (1, ("up", "down")), (0, ("left", "right")):
        places = [place[axis] for place in track]
        extent, way = max(places) - min(places), places[-1] - places[0]
        if extent < STILL:
            continue
        if abs(way) <= MOVED or extent > abs(way) + TURNED:
            return None
        words.append(forth if way > 0 else back)
    return "moving " + " and ".join(words) if words else "not moving"


def moving_caption(names, track):
    way = motion(track)
    return names and way and f"{article(names[0])} ball on {article(names[1])} background, {way}."


def bar_caption(names, left, width):
    if names is None or left + width > 1:  # cut in two by the picture's edge
        return None
    column = cell(left + width / 2)
    return column is not None and f"{article(names[0])} bar on {article(names[1])} background, {POSITIONS[1][column]}."


def solid_caption(rgb):
    name = colour_name(rgb)
    return name and f"{article('solid ' + name)} screen."


def gradient_caption(names):
    return names and f"a gradient from {names[1]} at the top to {names[0]} at the bottom."


def pinwheel_caption(names):
    return names and "{} and {} pinwheel.".format(*two(names))


def two(names):
    """Two colours in the table's order: which is the foreground does not show in every pattern."""
    first, second = sorted(names, key=list(COLOURS).index)
    return article(first), second


def checkers_caption(scene, size):
    """Red and green cells, or their average once the scaling to 256x256 has merged them."""
    contrast = 1.0
    for side in (scene.width, scene.height):
        f = max(side / 256, 0.6) / (2 * size)
        contrast *= (math.sin(math.pi * f) / (math.pi * f)) ** 2
    if scene.format not in CHROMA_SUBSAMPLED:
        return "a red and green checkerboard." if contrast > 0.12 else contrast < 0.02 and "a solid olive screen."
    if size >= 4 and contrast > 0.15:
        return "a red and green checkerboard."
    if size == 2 and contrast > 0.3 and scene.format in ("I420", "NV12", "NV21", "YV12"):
        return "a fine olive checkerboard."
    return contrast < 0.02 and "a solid olive screen."


def zone_plate_caption(scene, names):
    if not scene.get("kx2", 0):  # no frequency at all is a plain surface
        return "a solid grey screen." if not scene.get("kt", 0) else None
    return "{} and {} zone plate.".format(*two(names))


def lower_caption(scene, frame):
    pattern = scene.pattern
    foreground, background = colours(scene)
    if pattern in FIXED:
        return FIXED[pattern]
    if pattern == "solid-color" or pattern == "white":
        return solid_caption(foreground)
    if pattern == "black":
        return solid_caption(background)
    if pattern == "blink":
        return solid_caption(foreground if frame & 1 else background)
    if pattern.startswith("checkers-"):
        return checkers_caption(scene, int(pattern[9:]))
    if pattern == "chroma-zone-plate":
        return zone_plate_caption(scene, ("blue", "olive") if set("RGB") <= set(scene.format) else ("green", "magenta"))
    names = pair_names(foreground, background)
    if names is None:
        return None
    if pattern == "zone-plate":
        return zone_plate_caption(scene, names)
    if pattern == "gradient":
        return gradient_caption(names)
    if pattern == "pinwheel":
        return pinwheel_caption(names)
    if pattern == "bar":
        return bar_caption(names, bar_left(scene, frame), scene.width // 7 / scene.width)
    if pattern == "ball":
        return ball_caption(ball_names(scene, frame), *ball_centre(scene, frame))
    raise ValueError(f"no caption for pattern {pattern}")


def sentence(text):
    """With a capital, and the space that the prompt's `Assistant:` leaves to the caption."""
    return f" {text[0].upper()}{text[1:]}" if text else None


def caption(scene, frame):
    """The caption of one frame, or None if it has no single honest name."""
    return sentence(lower_caption(scene, frame))


def clip_caption(scene, frames):
    """The caption of a clip of these frames, or None: of a ball how it moves, of all else what each frame shows."""
    if scene.pattern != "ball" or len(frames) == 1:
        captions = {caption(scene, frame) for frame in frames}
        return captions.pop() if len(captions) == 1 else None
    between = range(frames[0], frames[-1] + 1)
    flipped = {ball_flipped(scene, frame) for frame in between}
    names = ball_names(scene, frames[0])
    return sentence(moving_caption(names, [ball_centre(scene, i) for i in between])) if len(flipped) == 1 else None
