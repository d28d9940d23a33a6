"""What a kind of file is, and the tools that make one."""

import dataclasses
import os
import random
import re
import shlex
import subprocess
from collections.abc import Callable

VIDEO = "-f lavfi -i testsrc2=size=320x180:rate=25:duration=3"
AUDIO = "-f lavfi -i sine=frequency=440:duration=3"
H264 = "-c:v libx264 -preset veryfast -crf 30 -pix_fmt yuv420p -g 25"
AAC = "-c:a aac -b:a 64k"


@dataclasses.dataclass
class Kind:
    """One kind of input and what the command is to make of it.

    `file` is the input's name in the kind's folder. `make` gets its path. Where `arguments` is given, it stands in
    place of the name: {here} is the folder, {http} and {rtsp} the judge's servers. `stdin` is a file to be piped in.
    """

    name: str
    file: str
    make: Callable | str | None
    captions: int = 3  # of an interval of one second; a caption that says the same may be left out
    exit: tuple = (0,)  # of captions as text
    copy_exit: tuple = (0,)  # of the default output, an MKV with all streams
    says: str = ""  # what stderr must say if the exit status is not 0
    warns: str = ""  # what stderr must say whatever the exit status
    arguments: str = ""
    stdin: str = ""
    original: str = ""  # the file with which the output of `arguments` or `stdin` is compared
    lost: tuple = ()  # codecs that an MKV cannot hold: left out or turned into another, which must be said
    decoded: tuple = ()  # codecs whose packets the container changes: the decoded frames are compared
    share: float = 1.0  # of the packets that must be in the output: damaged ones may be left out
    times: bool = True  # whether time stamps are to stay as they are, apart from one offset
    cue_slack: float = 0.0025  # seconds by which a caption may miss its frame
    trait: str = ""  # what the judge arranges: a user's rights, a full disk, a FIFO
    timeout: int = 60


KINDS: list[Kind] = []


def add(name, file, make, **more):
    """Adds a kind. `make` is ffmpeg's arguments, with {V}, {A}, {H264}, {AAC} for the usual, or a function."""
    for key in ("exit", "copy_exit", "lost", "decoded"):
        if key in more and not isinstance(more[key], tuple):
            more[key] = (more[key],)
    if "exit" in more and "copy_exit" not in more:
        more["copy_exit"] = more["exit"]
    assert all(kind.name != name for kind in KINDS), name
    KINDS.append(Kind(name, file, make, **more))


def kind(name, file, **more):
    """Adds the decorated function's kind."""

    def decorate(make):
        add(name, file, make, **more)
        return make

    return decorate


def run(command, **more):
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)
    if result.returncode:
        words = " ".join(os.fsdecode(word) for word in command)
        raise RuntimeError(f"{words}\n{result.stdout.decode(errors='replace')[-2000:]}")


def ff(arguments, *out):
    """Runs ffmpeg; `out` are further arguments, the last of them the output."""
    words = shlex.split(arguments.format(V=VIDEO, A=AUDIO, H264=H264, AAC=AAC))
    run(["ffmpeg", "-v", "error", "-nostdin", "-y", *words, *[as_file(word) for word in out]])


def as_file(word):
    """A path as ffmpeg takes it: a name like `concat:a` is none of its protocols."""
    return "file:" + word if isinstance(word, str) and word.startswith("/") else word


def gst(pipeline):
    run(["gst-launch-1.0", "-q", *shlex.split(pipeline)])


def read(path):
    with open(path, "rb") as file:
        return file.read()


def write(path, data):
    with open(path, "wb") as file:
        file.write(data if isinstance(data, bytes) else data.encode())


def beside(path, name):
    """A path in the same folder."""
    return os.path.join(os.path.dirname(path), name)


def through(path, arguments, suffix, change):
    """Makes a file by ffmpeg under another name, and writes its changed bytes to the path."""
    whole = path + ".whole." + suffix
    ff(arguments, whole)
    write(path, change(read(whole)))
    os.remove(whole)


def cut(share):
    return lambda data: data[: int(len(data) * share)]


def scratched(data, seed=1, holes=12, size=150):
    """The bytes with runs of random ones between a third and two thirds."""
    data, chance = bytearray(data), random.Random(seed)
    for _ in range(holes):
        at = chance.randrange(len(data) // 3, len(data) * 2 // 3)
        data[at : at + size] = chance.randbytes(size)
    return bytes(data)


def srt(path, words=("Grüße aus Köln", "こんにちは", "The end")):
    lines = [f"{i + 1}\n00:00:0{i},100 --> 00:00:0{i},900\n{word}\n" for i, word in enumerate(words)]
    write(path, "\n".join(lines))


def ass(path):
    write(
        path,
        "[Script Info]\nScriptType: v4.00+\nPlayResX: 320\nPlayResY: 180\n\n[V4+ Styles]\nFormat: Name, Fontname, "
        "Fontsize, PrimaryColour, Alignment\nStyle: Default,DejaVu Sans,18,&H00FFFF00,8\n\n[Events]\nFormat: Layer, "
        "Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n"
        "Dialogue: 0,0:00:00.20,0:00:01.00,Default,,0,0,0,,{\\pos(160,20)\\i1}Slanted\n"
        "Dialogue: 0,0:00:01.20,0:00:02.50,Default,,0,0,0,,Über, with a comma\n",
    )


def chapters(path, streams=""):
    write(
        path,
        ";FFMETADATA1\ntitle=Ein schöner Tag 🌞\nartist=Ñandú\ncomment=line one\\\nline two\n"
        "[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=1500\ntitle=Début\n"
        f"[CHAPTER]\nTIMEBASE=1/1000\nSTART=1500\nEND=3000\ntitle=Schluß = Ende; \\#1\n{streams}",
    )


def sup(path):
    """Writes subtitles of a Blu-ray (PGS): a box of one colour, shown twice for a second."""
    width, height = 64, 24
    line = b"\x00" + bytes([0x40 | 0x80, width, 1]) + b"\x00\x00"  # a long run of colour 1, end of line
    picture = line * height
    number = 0

    def segment(sort, seconds, body):
        stamp = int(seconds * 90000).to_bytes(4, "big")
        return b"PG" + stamp + bytes(4) + bytes([sort]) + len(body).to_bytes(2, "big") + body

    def screen(seconds, shown):
        nonlocal number
        size = (320).to_bytes(2, "big") + (180).to_bytes(2, "big")
        place = bytes([0, 0, 0, 0]) + (128).to_bytes(2, "big") + (140).to_bytes(2, "big")
        state = 0x80 if shown else 0
        body = size + b"\x10" + number.to_bytes(2, "big") + bytes([state, 0, 0, int(shown)]) + (place if shown else b"")
        window = b"\x01\x00" + b"".join(n.to_bytes(2, "big") for n in (128, 140, width, height))
        number += 1
        out = segment(0x16, seconds, body) + segment(0x17, seconds, window)
        if shown:
            head = b"\x00\x00\x00\xc0" + (len(picture) + 4).to_bytes(3, "big")
            out += segment(0x14, seconds, b"\x00\x00" + bytes([1, 235, 128, 128, 255]))
            out += segment(0x15, seconds, head + width.to_bytes(2, "big") + height.to_bytes(2, "big") + picture)
        return out + segment(0x80, seconds, b"")

    write(path, screen(0.2, True) + screen(1.0, False) + screen(1.5, True) + screen(2.5, False))


def select(pattern):
    """The kinds whose name the pattern matches, all without one."""
    return [kind for kind in KINDS if re.search(pattern or "", kind.name)]
