"""The formats beside the default: subtitles, a page, MP4, and captions drawn into the picture."""

import os
import re
import subprocess

import media
from bench import manners
from kinds import select

SOME = (
    "mp4-h264-aac|mp4-two-audio|mp4-chapters|mp4-hevc-hdr10|mov-rotated-90|webm-vp9|mkv-srt-ass|mkv-everything|"
    "mkv-pgs|ts-at-10-hours|vob-mpeg2-ac3|mov-prores-timecode|avi-mpeg4-mp3|video-after-audio|anamorphic|rate-variable|"
    "size-odd|change-size-ts|gif-loops|still-jpeg|still-jpeg-orientation-6|real-big-buck-bunny|mpg-mpeg2-interlaced"
)
FORMATS = ("vtt", "srt", "html", "mp4", "burn.mp4", "burn.mkv")
# Codecs that an MP4 can hold.
MP4 = {"h264", "hevc", "av1", "vp9", "mpeg4", "mpeg2video", "mpeg1video", "aac", "mp3", "mp2", "ac3", "eac3",
       "opus", "flac", "vorbis", "alac", "mov_text", "dvd_subtitle", "mjpeg", "png", "dts", "truehd"}  # fmt: skip
LOST = re.compile(r"cannot|can't|left out|not hold|without|leav|drop|convert", re.I)


def seconds(text):
    parts = [float(part) for part in text.replace(",", ".").split(":")]
    return sum(part * 60**i for i, part in enumerate(reversed(parts)))


def cues(text):
    """Start, end and words of the cues in WebVTT or SubRip."""
    found = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        for i, line in enumerate(lines):
            if times := re.match(r"([\d:.,]+) --> ([\d:.,]+)", line):
                found.append((seconds(times[1]), seconds(times[2]), "\n".join(lines[i + 1 :])))
    return found


def check_text(kind, suffix, path):
    with open(path, encoding="utf-8") as file:
        text = file.read()
    problems = []
    if suffix == "html":
        if not re.match(r"(?i)\s*<!doctype html>", text) or "</html>" not in text.lower():
            problems.append("no whole page")
        if not re.search(r"<img|data:image", text):
            problems.append("no picture")
        if re.search(r"""(?:src|href)=["']?https?://""", text):
            problems.append("needs the network")
        if kind.file.partition(".")[0] not in text:
            problems.append("does not name its video")
        return problems, text.count("<img") or text.count("data:image")
    found = cues(text)
    if suffix == "vtt" and not text.startswith("WEBVTT"):
        problems.append("no WEBVTT at its start")
    if suffix == "srt" and not text.startswith("1\n"):
        problems.append("does not start with cue 1")
    if not 1 <= len(found) <= kind.captions + 1:
        problems.append(f"{len(found)} cues for {kind.captions} s")
    if any(not words.strip() or end <= start for start, end, words in found):
        problems.append("a cue without words or time")
    if any(one[1] > two[0] + 0.0005 for one, two in zip(found, found[1:])):
        problems.append("cues overlap")
    return problems, len(found)


def check_mp4(kind, path, original, said):
    """An MP4 holds what it can, and the rest is told."""
    before = media.probe(original)
    chapters = {"bin_data"} if before["chapters"] else set()
    unfit = tuple({media.name_of(s) for s in before["streams"]} - MP4 - media.TEXT - chapters)
    attached = [s for s in before["streams"] if s["codec_type"] == "attachment"]
    kind.lost = kind.lost + unfit + tuple(media.name_of(s) for s in attached)
    report = media.compare(original, path, kind, said)
    problems = [text for text in report.problems if "bitmap" not in text]
    if (unfit or attached) and not LOST.search(said):
        problems.append(f"nothing said that {unfit} can't be held")
    return problems + [text for text in [media.whole(path)] if text], len((report.captions or {}).get("packets", []))


def luma(path, seek, filters):
    """A frame's luma as it is shown, scaled to 64 by 36."""
    result = subprocess.run(
        ["ffmpeg", "-v", "error", "-nostdin", "-ss", str(seek), "-i", media.as_file(path), "-map", "0:v:0",
         "-frames:v", "1", "-vf", filters + "scale=64:36:flags=area,format=gray", "-f", "rawvideo", "-"],
        capture_output=True,
    )  # fmt: skip
    return result.stdout


def shown_size(stream):
    """Width and height as they are shown, rotated if the side data says so."""
    turned = any(int(item.get("rotation", 0)) % 180 for item in stream.get("side_data_list", []))
    size = (stream["width"], stream["height"])
    return size[::-1] if turned else size


def check_burnt(kind, path, original, said):
    """Captions are in the picture; the rest of it and all other streams are as they were."""
    problems = []
    before, after = media.probe(original), media.probe(path)
    one = [s for s in before["streams"] if s["codec_type"] == "video" and not media.is_cover(s)]
    two = [s for s in after["streams"] if s["codec_type"] == "video" and not media.is_cover(s)]
    if not two:
        return ["no video"], 0
    if kind.name != "change-size-ts":
        even = tuple(n + n % 2 for n in shown_size(one[0]))
        if shown_size(two[0]) not in (shown_size(one[0]), even, tuple(n - n % 2 for n in shown_size(one[0]))):
            problems.append(f"shown at {shown_size(two[0])}, not {shown_size(one[0])}")
    still = kind.captions == 1
    if not still and kind.name != "gif-loops" and abs(len(one[0]["packets"]) - len(two[0]["packets"])) > 1:
        problems.append(f"{len(two[0]['packets'])} frames, not {len(one[0]['packets'])}")
    sounds = [s for s in before["streams"] if s["codec_type"] == "audio"]
    now = [s for s in after["streams"] if s["codec_type"] == "audio"]
    if len(sounds) != len(now) and not LOST.search(said):
        problems.append(f"{len(now)} audio tracks, not {len(sounds)}")
    for old, new in zip(sounds, now):
        if not media.same(old, new, kind.decoded):
            problems.append(f"audio {media.name_of(old)} is not as it was")
        if media.tags(old).get("language", "und") != media.tags(new).get("language", "und"):
            problems.append("an audio track's language changed")
    if kind.times and sounds and now and not still:
        apart = [media.first_frame(v) - media.first_frame(a) for v, a in ((one[0], sounds[0]), (two[0], now[0]))]
        if abs(apart[0] - apart[1]) > 0.045:
            problems.append(f"video starts {apart[1]:+.3f} s after audio, not {apart[0]:+.3f} s")
    if len(before["chapters"]) != len(after["chapters"]):
        problems.append(f"{len(after['chapters'])} chapters, not {len(before['chapters'])}")
    if path.endswith(".mkv") or all(media.name_of(s) in MP4 | media.TEXT for s in before["streams"]):
        subtitles = [sum(s["codec_type"] == "subtitle" for s in found["streams"]) for found in (before, after)]
        if subtitles[0] != subtitles[1]:
            problems.append(f"{subtitles[1]} subtitle tracks, not {subtitles[0]}")
    moved = [media.first_frame(two[0]) or 0, media.first_frame(one[0]) or 0]
    pictures = [luma(p, 0.5 if not still else 0, "") for p in (path, original)]
    if all(len(p) == 64 * 36 for p in pictures) and "rotated" not in kind.name and "orientation" not in kind.name:
        rows = [sum(abs(pictures[0][64 * y + x] - pictures[1][64 * y + x]) for x in range(64)) / 64 for y in range(36)]
        if max(rows) < 8:
            problems.append("no caption in the picture")
        quiet = sorted(rows)[:12]
        if sum(quiet) / 12 > 12 and kind.name not in ("change-size-ts", "gif-loops", "mp4-hevc-hdr10"):
            problems.append(f"the rest of the picture is off by {sum(quiet) / 12:.0f} of 255 (moved by {moved})")
    problems += [text for text in [media.whole(path)] if text]
    return problems, 0


def judge(kind, suffix, bench, source, table):
    bench.lay(source)
    burn = suffix.startswith("burn.")
    output = os.path.join(bench.base, "out", "out." + suffix.removeprefix("burn."))
    words = ["burn"] if burn else []
    outcome = bench.run([*words, "-o", output, "--", kind.file], kind.timeout)
    name = f"{kind.name}, {suffix}"
    problems = manners(outcome, [], failed=outcome.code != 0)
    picture = kind.file.endswith((".gif", ".jpg", ".JPG"))
    refused = suffix == "mp4" and "can't hold the video" in outcome.err
    fine = (0, 1) if (picture and suffix == "mp4") or refused else (0,)
    if outcome.code not in fine:
        problems.append(f"exit status {outcome.code}: {outcome.err.strip()[-200:]!r}")
    if outcome.added:
        problems.append(f"left {outcome.added}")
    found = 0
    if outcome.code == 0 and not os.path.exists(output):
        problems.append("no output")
    elif outcome.code == 0:
        original = os.path.join(bench.work, kind.file)
        if burn:
            more, found = check_burnt(kind, output, original, outcome.err)
        elif suffix == "mp4":
            more, found = check_mp4(kind, output, original, outcome.err)
        else:
            more, found = check_text(kind, suffix, output)
        problems += more
    table.row(name, problems, [found or len(outcome.captions)])


def try_all(bench, folder, only, table):
    lost = {}
    for kind in select(only or f"^({SOME})$"):
        lost[kind.name] = kind.lost
        for suffix in FORMATS:
            kind.lost = lost[kind.name]
            judge(kind, suffix, bench, os.path.join(folder, kind.name), table)
