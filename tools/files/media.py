"""Whether a narrated file holds all that its input holds: packets, times, tags, chapters, side data, dispositions."""

import dataclasses
import fractions
import json
import os
import re
import statistics
import subprocess

MS = 0.001
# What a container writes of itself, and what ffmpeg tells of an MP4's tracks.
OWN_TAGS = {
    "major_brand", "minor_version", "compatible_brands", "encoder", "duration", "handler_name", "vendor_id",
    "variant_bitrate", "service_name", "service_provider", "_statistics_writing_app", "_statistics_tags",
    "_statistics_writing_date_utc", "bps", "number_of_frames", "number_of_bytes", "metadatacreator", "hasaudio",
    "hasvideo", "hasmetadata", "canseektoend", "devicemanufacturer", "iskeyframes", "wmfsdkversion", "filename",
    "mimetype", "operational_pattern_ul", "material_package_umid", "file_package_umid", "reel_umid", "uid",
    "generation_uid", "company_name", "product_name", "product_version", "product_uid", "toolkit_version",
    "modification_date", "application_platform", "project_name", "file_package_name", "track_name", "data_type",
    "language", "title", "alpha_mode", "rotate", "codecid", "id3v2_priv", "software",
}  # fmt: skip
SHOWN = ("width", "height", "sample_aspect_ratio", "pix_fmt", "color_range", "color_space", "color_transfer",
         "color_primaries", "sample_rate", "channels")  # fmt: skip
# Side data that ffmpeg makes of the bit stream, or of how it reads.
DERIVED = {"CPB properties", "Audio Service Type", "Skip Samples", "MPEGTS Stream ID", "Replay Gain"}
# Frames at the times that they have, however close.
AS_TIMED = ("-vsync", "passthrough", "-enc_time_base", "-1")
TEXT = {"subrip", "ass", "ssa", "webvtt", "mov_text", "text"}
NORMAL = {
    "h264": "h264_mp4toannexb,filter_units=remove_types=7-9",
    "hevc": "hevc_mp4toannexb,filter_units=remove_types=32-35",
    "aac": "aac_adtstoasc",
    "mpeg4": "mpeg4_unpack_bframes",
}


@dataclasses.dataclass
class Report:
    problems: list = dataclasses.field(default_factory=list)
    notes: list = dataclasses.field(default_factory=list)
    compared: int = 0
    captions: dict | None = None  # the caption track


def as_file(path):
    return "file:" + os.fsdecode(path)


def ffmpeg(*arguments):
    result = subprocess.run(
        ["ffmpeg", "-v", "error", "-nostdin", *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=120
    )
    return result.stdout.decode(errors="replace"), result.stderr.decode(errors="replace").strip()


def probe(path):
    """What ffprobe says of a file, with each stream's packets."""
    result = subprocess.run(
        ["ffprobe", "-v", "error", "-of", "json", "-show_streams", "-show_chapters", "-show_format", "-show_packets",
         "-show_data_hash", "md5", "-i", as_file(path)], stdin=subprocess.DEVNULL, capture_output=True, timeout=120,
    )  # fmt: skip
    try:
        found = json.loads(result.stdout.decode(errors="replace"))
    except ValueError:
        found = {}  # no media file
    streams = found.get("streams", [])
    for stream in streams:
        stream["packets"] = [p for p in found.get("packets", []) if p["stream_index"] == stream["index"]]
        stream["path"] = path
    return {"streams": streams, "chapters": found.get("chapters", []), "format": found.get("format", {})}


def is_cover(stream):
    return stream["disposition"].get("attached_pic") == 1


def name_of(stream):
    return stream.get("codec_name") or stream.get("codec_tag_string") or "unknown"


def packet_hashes(stream):
    return [p.get("data_hash") for p in stream["packets"]]


def hashes(stream, *how):
    """MD5 of each packet or frame by ffmpeg."""
    out, _ = ffmpeg(
        "-i", as_file(stream["path"]), "-map", f"0:{stream['index']}", *how, "-f", "framehash", "-hash", "md5", "-"
    )
    return [line.split(",")[5].strip() for line in out.splitlines() if line and not line.startswith("#")]


def texts(stream):
    """The words of a text subtitle's cues."""
    out, _ = ffmpeg("-i", as_file(stream["path"]), "-map", f"0:{stream['index']}", "-f", "srt", "-")
    cues = re.split(r"\n\s*\n", re.sub(r"<[^>]*>|\{[^}]*\}", "", out).strip())
    return ["\n".join(cue.splitlines()[2:]) for cue in cues]


def same(one, other, decoded, share=1.0):
    """How two streams are the same: by packets, by packets less what a container adds, by frames; None if not."""
    if one["codec_type"] == "attachment":
        return "packets" if one.get("extradata_hash") == other.get("extradata_hash") else None
    if name_of(one) in TEXT and name_of(other) in TEXT:
        return "texts" if texts(one) == texts(other) else None
    # An MP4 names both layers of MPEG audio alike.
    if name_of(one) != name_of(other) and {name_of(one), name_of(other)} != {"mp2", "mp3"}:
        return None
    if packet_hashes(one) == packet_hashes(other):
        return "packets"
    normal = NORMAL.get(name_of(one))
    how = ["-c", "copy", *(["-bsf", normal] if normal else [])]
    if normal and (first := hashes(one, *how)) and first == hashes(other, *how):
        return "payload"
    if name_of(one) in decoded:
        frames = ["-vsync", "passthrough"]
        if (first := hashes(one, *frames)) and first == hashes(other, *frames):
            return "frames"
    if share < 1:
        first, second = (set(hashes(stream, *how)) for stream in (one, other))
        if first and len(first & second) >= share * len(first):
            return f"{len(first & second)} of {len(first)} packets"
    return None


def stamps(stream):
    """Presentation times in seconds; None where a packet has none."""
    return [float(p["pts_time"]) if "pts_time" in p else None for p in stream["packets"]]


def first_frame(stream):
    shown = [t for t, p in zip(stamps(stream), stream["packets"]) if t is not None and "D" not in p.get("flags", "")]
    return min(shown, default=None)


def shift(one, other, report):
    """The offset of the other's times, if it is the same for all packets."""
    pairs = [(a, b) for a, b in zip(stamps(one), stamps(other)) if a is not None and b is not None]
    if not pairs or len(one["packets"]) != len(other["packets"]):
        return None
    offsets = [b - a for a, b in pairs]
    if max(offsets) - min(offsets) > 2.5 * MS:
        report.problems.append(f"times of {name_of(one)} changed by {min(offsets):.3f} to {max(offsets):.3f} s")
    return statistics.median(offsets)


def value(text):
    """A number or fraction as a fraction, other text as it is."""
    try:
        return fractions.Fraction(str(text))
    except (ValueError, ZeroDivisionError):
        return text


def side_data(stream):
    found = {}
    for item in stream.get("side_data_list", []):
        if item.get("side_data_type") not in DERIVED:
            found[item.get("side_data_type")] = {k: value(v) for k, v in item.items() if k != "displaymatrix"}
    return found


def tags(of):
    return {k.lower(): v for k, v in of.get("tags", {}).items()}


def compare_about(one, other, changes, report):
    """What is said of a stream: its shape, side data, language, title, dispositions."""
    name = f"{one['codec_type']} {name_of(one)}"
    for key in () if changes else SHOWN:
        before, after = one.get(key), other.get(key)
        if (
            before in (None, "unknown", "0:1", "N/A")
            or before == after
            or (key == "sample_aspect_ratio" and before == "1:1")
        ):
            continue
        report.problems.append(f"{name}: {key} {before} became {after}")
    there = side_data(other)
    for sort, before in side_data(one).items():
        if sort not in there:
            report.problems.append(f"{name}: {sort} is lost")
        elif there[sort] != before:
            report.problems.append(f"{name}: {sort} changed")
    before, after = tags(one), tags(other)
    if before.get("language", "und") != after.get("language", "und"):
        report.problems.append(f"{name}: language {before.get('language')} became {after.get('language')}")
    if before.get("title") and before["title"] != after.get("title"):
        report.problems.append(f"{name}: title {before['title']} became {after.get('title')}")
    for key, before in one["disposition"].items():
        if before and not other["disposition"].get(key):
            report.problems.append(f"{name}: disposition {key} is lost")


def compare_whole(before, after, offset, report):
    """Tags of the file, and chapters."""
    there = tags(after["format"])
    for key, text in tags(before["format"]).items():
        key_there = key if key in there else key.replace("-eng", "")
        if key not in OWN_TAGS - {"title"} and there.get(key_there) != text:
            report.problems.append(f"tag {key} {text!r} became {there.get(key_there)!r}")
    chapters = [(c["start_time"], tags(c).get("title")) for c in before["chapters"]]
    now = [(c["start_time"], tags(c).get("title")) for c in after["chapters"]]
    if [title for _, title in chapters] != [title for _, title in now]:
        report.problems.append(f"chapters {chapters} became {now}")
    elif any(abs(float(a) + max(offset, 0) - float(b)) > 0.003 and abs(float(a) - float(b)) > 0.003
             for (a, _), (b, _) in zip(chapters, now)):  # fmt: skip
        report.problems.append(f"chapters moved: {chapters} to {now}")


def compare(path, output, kind, said):
    """Compares an input with the file in which it was narrated. `said` is what stderr said of it."""
    report = Report()
    before, after = probe(path), probe(output)
    left = list(after["streams"])
    offsets = {}
    for stream in before["streams"]:
        sort = stream["codec_type"]
        match = None
        for other in left:
            # A stream may become an attachment (a font of unknown type) but never another sort of media.
            if other["codec_type"] == sort and is_cover(other) == is_cover(stream):
                if how := same(stream, other, kind.decoded, kind.share):
                    match = other
                    break
        if not match:
            tag = stream.get("codec_tag_string")
            if sort == "data" and before["chapters"] and tag in ("text", "[0][0][0][0]"):
                continue  # an MP4's chapters, which are compared as such
            if sort == "data" or name_of(stream) in kind.lost:
                if not re.search(r"cannot|can't|left out|not hold|without|leav|drop", said):
                    report.problems.append(f"{sort} {name_of(stream)} ({tag}) left out, and nothing said so")
                continue
            report.problems.append(
                f"{sort} {name_of(stream)} (stream {stream['index']}) is not in the output as it was"
            )
            continue
        left.remove(match)
        report.compared += 1
        if how not in ("packets",):
            report.notes.append(f"{name_of(stream)} by {how}")
        compare_about(stream, match, kind.name.startswith("change-"), report)
        if kind.times and sort in ("video", "audio") and not is_cover(stream):
            if (offset := shift(stream, match, report)) is not None:
                offsets[stream["index"]] = offset
    # ffmpeg's Matroska muxer counts the samples that an Opus decoder skips, 6.5 ms, twice.
    slack = 8 * MS if any(name_of(s) == "opus" for s in before["streams"]) else 2.5 * MS
    if offsets and max(offsets.values()) - min(offsets.values()) > slack:
        moved = ", ".join(f"stream {i} by {o:+.3f} s" for i, o in offsets.items())
        report.problems.append(f"streams moved against each other: {moved}")
    compare_whole(before, after, min(offsets.values(), default=0.0), report)
    videos = [s for s in before["streams"] if s["codec_type"] == "video" and not is_cover(s)]
    begins = None
    if videos and videos[0]["index"] in offsets and (first := first_frame(videos[0])) is not None:
        begins = first + offsets[videos[0]["index"]]
    check_captions(left, after, begins, kind.cue_slack, report)
    return report


def check_captions(left, after, begins, slack, report):
    """That one subtitle track was added, that it starts with the first frame of the video, and each cue with a frame.

    `begins` is the time of the first frame that is shown, if the input tells: an edit list may hide some.
    """
    subtitles = [s for s in left if s["codec_type"] == "subtitle"]
    for stream in left:
        if stream["codec_type"] == "data" and after["chapters"]:
            continue  # an MP4's chapters
        if stream not in subtitles[-1:]:
            report.problems.append(
                f"{stream['codec_type']} {name_of(stream)} (stream {stream['index']}) came from nowhere"
            )
    if not subtitles:
        report.problems.append("no caption track")
        return
    report.captions = track = subtitles[-1]
    if not tags(track).get("title") and tags(track).get("handler_name", "SubtitleHandler") == "SubtitleHandler":
        report.notes.append("caption track without a title")
    cues = [p for p in track["packets"] if int(p.get("size", 0)) > 2]
    videos = [s for s in after["streams"] if s["codec_type"] == "video" and not is_cover(s)]
    frames = sorted(t for t in stamps(videos[0]) if t is not None) if videos else []
    begins = frames[0] if begins is None and frames else begins
    if not cues:
        report.problems.append("caption track is empty")
    elif begins is not None and abs(float(cues[0]["pts_time"]) - begins) > 2.5 * MS:
        report.problems.append(f"first caption at {float(cues[0]['pts_time']):.3f} s, first frame at {begins:.3f} s")
    for cue in cues:
        if frames and min(abs(float(cue["pts_time"]) - t) for t in frames) > slack:
            report.problems.append(f"a caption at {cue['pts_time']} s stands on no frame")
        if float(cue.get("duration_time", 0)) <= 0:
            report.problems.append(f"a caption at {cue['pts_time']} s lasts no time")
    for one, two in zip(cues, cues[1:]):
        if float(one["pts_time"]) + float(one.get("duration_time", 0)) > float(two["pts_time"]) + 2 * MS:
            report.problems.append(f"captions overlap at {two['pts_time']} s")


def whole(path):
    """What ffmpeg has against a file when it decodes all of it; empty if nothing."""
    return ffmpeg("-i", as_file(path), "-map", "0:v?", "-map", "0:a?", *AS_TIMED, "-f", "null", "-")[1]
