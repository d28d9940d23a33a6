#!/usr/bin/python3
"""Shows that the judge can find fault: a stand-in for the command does each thing wrong in turn, and must be caught.

    tools/files/selftest.py FOLDER

The stand-in copies by ffmpeg and invents its captions. Done right it must pass; each fault must fail the named kind.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time

LINES = 3
# Fault, the kind that shows it, and what the judge must say.
FAULTS = [
    ("reencode", "mp4-h264-aac", "h264 .* not in the output as it was"),
    ("reencode-lossless", "mkv-flac-ffv1", "flac .* not in the output as it was"),
    ("drop-audio", "mp4-two-audio", "aac .* not in the output"),
    ("drop-subtitle", "mkv-srt-ass", "ass .* not in the output"),
    ("drop-font", "mkv-fonts", "attachment .* not in the output"),
    ("drop-cover", "mkv-cover", "png .* not in the output"),
    ("drop-chapters", "mkv-chapters-tags", "chapters .* became"),
    ("drop-tags", "mkv-chapters-tags", "tag title|tag artist"),
    ("drop-languages", "mp4-two-audio", "language deu became"),
    ("drop-dispositions", "mkv-srt-ass", "disposition forced is lost"),
    ("drop-rotation", "mov-rotated-90", "Display Matrix is lost"),
    ("drop-mastering", "mp4-hevc-hdr10", "Mastering display metadata is lost"),
    ("truncate-packets", "mp4-h264-aac", "not in the output as it was"),
    ("shift-audio", "mp4-h264-aac", "moved against each other"),
    ("late-captions", "mp4-h264-aac", "first caption at"),
    ("captions-from-audio", "video-after-audio", "first caption at"),
    ("overlap", "mp4-h264-aac", "overlap"),
    ("no-captions", "mp4-h264-aac", "no caption track"),
    ("silent", "mp4-h264-aac", "0 captions on stdout"),
    ("chatter", "mp4-h264-aac", "captions on stdout for"),
    ("change-input", "mp4-h264-aac", "changed"),
    ("touch-input", "mp4-h264-aac", "changed"),
    ("leave-file", "mp4-h264-aac", "left"),
    ("leave-temporary", "mp4-h264-aac", "temporary files left"),
    ("leave-process", "mp4-h264-aac", "outlived by"),
    ("panic", "mp4-h264-aac", "noise on stderr"),
    ("fail", "mp4-h264-aac", "exit status 1, not 0"),
    ("fail-and-leave", "mp4-h264-aac", "failed and left"),
    ("no-output", "mp4-h264-aac", "no output"),
    ("succeed", "text-file", "exit status 0, not 1"),
    ("two-errors", "text-file", "2 lines of error"),
    ("nameless-error", "text-file", "does not name the file"),
    ("no-remedy", "text-file", "names no remedy"),
    ("hang", "text-file", "did not end"),
    ("untold-truncation", "truncated-mkv", "stderr does not say"),
]
HIDING = {  # ffmpeg's options for what a fault leaves out
    "reencode": ["-c:v", "libx264", "-preset", "ultrafast"],
    "drop-audio": ["-map", "-0:a:1"],
    "drop-subtitle": ["-map", "-0:s:1"],
    "reencode-lossless": ["-c:a", "flac", "-af", "volume=0.99"],
    "drop-font": ["-map", "-0:t"], "drop-chapters": ["-map_chapters", "-1"],
    "drop-tags": ["-map_metadata", "-1"], "drop-languages": ["-metadata:s:a:1", "language="],
    "drop-dispositions": ["-disposition:s:1", "0"],
    "truncate-packets": ["-t", "2"],
}  # fmt: skip


def wrong(fault, arguments):
    """The stand-in: one fault, all else right. Returns its exit status."""
    output = arguments[arguments.index("-o") + 1] if "-o" in arguments else None
    name = arguments[-1]
    output = output or os.path.splitext(name)[0] + ".narrated.mkv"
    if name.endswith(".txt"):
        return {
            "succeed": lambda: 0, "hang": lambda: time.sleep(600),
            "two-errors": lambda: complain(f"error: {name}: no video\nerror: {name}: name a video"),
            "nameless-error": lambda: complain("error: file: no video in it; name a video"),
            "no-remedy": lambda: complain(f"error: {name}: nonsense"),
        }.get(fault, lambda: complain(f"error: {name}: there is no video in it; name a video file"))()  # fmt: skip
    if fault == "fail":
        return complain(f"error: {name}: something failed; try again")
    if name == "cut.mkv" and fault != "untold-truncation":
        print("warning: the input is truncated", file=sys.stderr)
    if fault not in ("silent",):
        for i in range(9 if fault == "chatter" else LINES):
            print(f"0:0{i}.0  A ball")
    if output.endswith(".jsonl"):
        with open(output, "w") as file:
            file.write('{"text": "A ball"}\n' * LINES)
        return 0
    if fault != "no-output":
        narrate(fault, name, output)
    if fault == "fail-and-leave":
        return complain(f"error: {name}: something failed; try again")
    side_effects(fault, name)
    return 0


def complain(text):
    print(text, file=sys.stderr)
    return 1


def narrate(fault, name, output):
    starts = first_frame(name) if fault != "captions-from-audio" else 0.0
    starts += 0.5 if fault == "late-captions" else 0.0
    length = 1.5 if fault == "overlap" else 1
    with tempfile.TemporaryDirectory() as folder:
        subtitles = os.path.join(folder, "s.srt")
        with open(subtitles, "w") as file:
            for i in range(1 if name == "cut.mkv" else LINES):
                clock = [f"00:00:{t:06.3f}".replace(".", ",") for t in (starts + i, starts + i + length)]
                file.write(f"{i + 1}\n{clock[0]} --> {clock[1]}\nA ball\n\n")
        words = ["-i", f"file:{name}", "-i", subtitles, "-map", "0", "-c", "copy"]
        if fault == "shift-audio":
            again = ["-itsoffset", "0.1", "-i", f"file:{name}"]
            words = ["-i", f"file:{name}", "-i", subtitles, *again, "-map", "0:v", "-map", "2:a", "-c", "copy"]
        if fault != "no-captions":
            words += ["-map", "1"]
        if fault == "drop-mastering":
            bare = os.path.join(folder, "bare.ts")
            subprocess.run(["ffmpeg", "-v", "error", "-i", name, "-c", "copy", bare], check=True)
            words = ["-i", bare, "-i", subtitles, "-map", "0", "-map", "1", "-c", "copy"]
        if name == "cover.mkv":  # ffmpeg would make the picture a second video
            cover = os.path.join(folder, "cover.png")
            subprocess.run(["ffmpeg", "-v", "error", "-i", name, "-map", "0:v:1", "-c", "copy", cover], check=True)
            words += ["-map", "-0:v:1"]
            if fault != "drop-cover":
                words += [
                    "-attach",
                    cover,
                    "-metadata:s:t",
                    "mimetype=image/png",
                    "-metadata:s:t",
                    "filename=cover.png",
                ]
        words += HIDING.get(fault, [])
        muxer = (
            ["-f", "mov", "-c:s", "mov_text"]
            if name.endswith("MOV") and fault != "drop-rotation"
            else ["-f", "matroska"]
        )
        subprocess.run(["ffmpeg", "-v", "error", "-y", *words, *muxer, f"file:{output}"], check=True)


def first_frame(name):
    """Seconds from the start of the file to its video's."""
    asked = ["ffprobe", "-v", "error", "-of", "csv=p=0", "-select_streams", "v:0", "-show_entries",
             "stream=start_time:format=start_time", f"file:{name}"]  # fmt: skip
    found = re.findall(r"-?\d+\.\d+", subprocess.run(asked, capture_output=True, text=True).stdout)
    return float(found[0]) - float(found[-1]) if found else 0.0


def side_effects(fault, name):
    if fault == "change-input":
        with open(name, "r+b") as file:
            file.write(b"\0")
    elif fault == "touch-input":
        os.utime(name)
    elif fault == "leave-file":
        open(".part", "w").close()
    elif fault == "leave-temporary":
        open(os.path.join(os.environ["TMPDIR"], "x.part"), "w").close()
    elif fault == "leave-process":
        subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    elif fault == "panic":
        print("thread 'main' panicked at src/main.rs:1", file=sys.stderr)


def tried(folder, fault, kind):
    """What the judge prints of a kind that the stand-in narrates with a fault."""
    here = os.path.abspath(__file__)
    with tempfile.TemporaryDirectory() as place:
        stand_in = os.path.join(place, "stand-in")
        with open(stand_in, "w") as file:
            file.write(f'#!/bin/sh\nexec /usr/bin/python3 {here} --stand-in {fault} "$@"\n')
        os.chmod(stand_in, 0o755)
        os.chmod(place, 0o755)
        judge = subprocess.run(
            [sys.executable, os.path.join(os.path.dirname(here), "judge.py"), folder, stand_in, "--only", f"^{kind}$",
             "--timeout", "5"], capture_output=True, text=True,
        )  # fmt: skip
    return judge.returncode, judge.stdout + judge.stderr


def main():
    if sys.argv[1:2] == ["--stand-in"]:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        return wrong(sys.argv[2], sys.argv[3:])
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    missed = 0
    for kind in sorted({kind for _, kind, _ in FAULTS}):
        code, said = tried(sys.argv[1], "none", kind)
        if code:
            missed += 1
            print(f"right, but not passed: {kind}\n{said}")
    for fault, kind, expected in FAULTS:
        code, said = tried(sys.argv[1], fault, kind)
        if code == 1 and re.search(expected, said):
            print(f"caught: {fault}", flush=True)
        else:
            missed += 1
            print(f"MISSED: {fault}, exit status {code}\n{said}", flush=True)
    print(f"{len(FAULTS)} faults, {missed} missed")
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
