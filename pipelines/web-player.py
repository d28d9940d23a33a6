#!/usr/bin/python3
"""Fills in the page of a narrated video, see web-player.sh: web-player.py TEMPLATE FOLDER TITLE."""

import base64
import html
import pathlib
import re
import sys

TIMING = re.compile(r"(\d+):(\d\d):(\d\d\.\d{3}) --> (\d+):(\d\d):(\d\d\.\d{3})")


def seconds(hours, minutes, rest):
    return int(hours) * 3600 + int(minutes) * 60 + float(rest)


def clock(time):
    hours, minutes, rest = int(time) // 3600, int(time) // 60 % 60, int(time) % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def read_cues(vtt):
    """Yields start and end in seconds, and text in one line, which it need not be in the file."""
    lines = vtt.splitlines()
    timings = [i for i, line in enumerate(lines) if TIMING.fullmatch(line)]
    for i, following in zip(timings, timings[1:] + [len(lines)]):
        times = TIMING.fullmatch(lines[i]).groups()
        # WebVTT escapes as HTML does.
        text = html.unescape(" ".join(" ".join(lines[i + 1 : following]).split()))
        yield seconds(*times[:3]), seconds(*times[3:]), text


def main():
    template, folder, title = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
    vtt = (folder / "captions.vtt").read_text(encoding="utf-8")
    items = "\n".join(
        f'<li><button type="button" data-start="{start:.3f}" data-end="{end:.3f}">'
        f"<time>{clock(start)}</time> <span>{html.escape(text)}</span></button></li>"
        for start, end, text in read_cues(vtt)
    )
    fields = {
        "title": html.escape(title),
        # A page opened from disk may not read a track from a file beside it.
        "track": "data:text/vtt;base64," + base64.b64encode(vtt.encode()).decode(),
        "cues": items,
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda slot: fields[slot[1]], template.read_text(encoding="utf-8"))
    (folder / "index.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
