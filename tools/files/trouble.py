"""Kinds of damaged files, of odd names, pipes and servers, and of folders and disks that refuse."""

import os

from kinds import add, cut, ff, kind, scratched, srt, through, write

CLIP = "{V} {A} {H264} {AAC}"
NOT_VIDEO = dict(captions=0, exit=1)

# Nothing to narrate.
add("audio-only", "song.m4a", "{A} {AAC}", says="no (video|picture)|only audio|audio", **NOT_VIDEO)
add(
    "audio-with-cover",
    "album.mp3",
    "{A} -f lavfi -i smptebars=size=64x64:d=1 -map 0 -map 1 -frames:v 1 -c:a libmp3lame -c:v png "
    "-disposition:v attached_pic",
    captions=1,
    exit=(0, 1),
)
add("subtitles-only", "words.srt", lambda path: srt(path), **NOT_VIDEO)
add("text-file", "notes.txt", lambda path: write(path, "To do:\n- buy milk\n"), **NOT_VIDEO)
add("text-named-mp4", "notes.mp4", lambda path: write(path, "To do:\n- buy milk\n" * 50), **NOT_VIDEO)
add("empty-file", "empty.mp4", lambda path: write(path, b""), says="empty", **NOT_VIDEO)
add("random-bytes", "noise.mp4", lambda path: write(path, scratched(bytes(200_000), 2, 2000, 300)), **NOT_VIDEO)
add("zeros", "zeros.mkv", lambda path: write(path, bytes(500_000)), **NOT_VIDEO)
add("folder", "holiday", lambda path: os.mkdir(path), says="folder|directory", **NOT_VIDEO)
add("missing", "missing.mp4", lambda path: None, says="not|no such", **NOT_VIDEO)
add("link-to-nothing", "link.mp4", lambda path: os.symlink("gone.mp4", path), says="not|no such", **NOT_VIDEO)
add("unreadable", "secret.mp4", CLIP, says="permission|denied|not allowed", trait="unreadable", **NOT_VIDEO)

# Damage.
TOLD = dict(exit=(0, 1), warns="truncat|cut|incomplete|ends|damag|corrupt|unfinished", times=False)


@kind("truncated-mp4-no-moov", "copied.mp4", captions=0, exit=1, says="truncat|incomplete|unfinished|index|moov|damag")
def _(path):
    through(path, CLIP, "mp4", cut(0.8))


@kind("truncated-mp4-moov-first", "download.mp4", captions=2, **TOLD)
def _(path):
    through(path, CLIP + " -movflags +faststart", "mp4", cut(0.6))


@kind("truncated-mkv", "cut.mkv", captions=2, **TOLD)
def _(path):
    through(path, CLIP, "mkv", cut(0.6))


# A live stream's recording has neither length nor index; its end may be any: nothing tells that it is cut.
@kind("unfinalised-mkv", "crashed.mkv", captions=2, times=False)
def _(path):
    through(path, CLIP + " -live 1", "mkv", cut(0.9))


@kind("truncated-ts", "cut.ts", captions=2, times=False)
def _(path):
    through(path, CLIP, "ts", cut(0.6))


@kind("truncated-avi", "cut.avi", captions=2, **TOLD)
def _(path):
    through(path, "{V} {A} -c:v mpeg4 -b:v 300k -c:a libmp3lame", "avi", cut(0.6))


@kind("truncated-jpeg", "cut.jpg", captions=1, **TOLD)
def _(path):
    through(path, "-f lavfi -i testsrc2=size=640x360:d=1 -frames:v 1 -pix_fmt yuvj420p", "jpg", cut(0.5))


@kind("corrupt-ts", "corrupt.ts", exit=(0, 1), share=0.6, times=False)
def _(path):
    through(path, CLIP, "ts", scratched)


@kind("corrupt-mkv", "corrupt.mkv", exit=(0, 1), share=0.6, times=False)
def _(path):
    through(path, CLIP, "mkv", scratched)


@kind("corrupt-mp4", "corrupt.mp4", exit=(0, 1), share=0.6, times=False)
def _(path):
    through(path, CLIP, "mp4", scratched)


# Names. The clip is the same in all.
NAMES = {
    "newline": "two\nlines.mp4",
    "latin-1": b"caf\xe9.mp4",
    "backslash": "back\\slash.mp4",
    "leading-dash": "-holiday.mp4",
    "option": "--force.mp4",
    "spaces": "  my  holiday .mp4",
    "emoji": "🌞 Ferien 日本.mp4",
    "percent": "100%d %s %03d.mp4",
    "hash-question": "what? #1.mp4",
    "quotes": 'it\'s "so" $(touch pwned) `id`; & | < > *.mp4',
    "glob": "[a-c]*?.mp4",
    "colon": "concat:a|b.mp4",
    "scheme": "file:c.mp4",
    "braces-comma": "{a,b}=1,2.mp4",
    "escape": "red\x1b[31m\a.mp4",
    "255-bytes": "n" * 251 + ".mp4",
    "no-suffix": "holiday",
    "dots": "my.holiday..2024.final.mp4",
    "hidden": ".hidden.mp4",
    "upper-case": "HOLIDAY.MP4",
}
for title, name in NAMES.items():
    add(f"name-{title}", os.fsdecode(name), CLIP + " -f mp4", copy_exit=(0, 1) if title == "255-bytes" else 0)
add("name-wrong-suffix", "matroska.mp4", CLIP + " -f matroska")
add("name-video-as-jpg", "video.jpg", CLIP + " -f mp4")
add(
    "still-named-mp4",
    "picture.mp4",
    "-f lavfi -i testsrc2=size=640x360:d=1 -frames:v 1 -c:v png -f image2pipe",
    captions=1,
    copy_exit=(0, 1),
)


@kind("name-long-path", "/".join(["d" * 200] * 12) + "/holiday.mp4")
def _(path):
    os.makedirs(os.path.dirname(path))
    ff(CLIP, path)


@kind("name-link", "link.mp4")
def _(path):
    ff(CLIP, path + ".elsewhere.mp4")
    os.symlink(os.path.basename(path) + ".elsewhere.mp4", path)


# Pipes. No name to put an output beside: the judge gives -o.
PIPE = dict(arguments="-", copy_exit=(0, 1, 2))
add("pipe-mp4-moov-last", "in.mp4", CLIP, stdin="in.mp4", original="in.mp4", exit=(0, 1), **PIPE)
add(
    "pipe-mp4-fragmented",
    "in.mp4",
    CLIP + " -movflags frag_keyframe+empty_moov",
    stdin="in.mp4",
    original="in.mp4",
    **PIPE,
)
add("pipe-ts", "in.ts", CLIP, stdin="in.ts", original="in.ts", **PIPE)
add("pipe-mkv", "in.mkv", CLIP, stdin="in.mkv", original="in.mkv", **PIPE)
add(
    "pipe-jpeg",
    "in.jpg",
    "-f lavfi -i testsrc2=size=640x360:d=1 -frames:v 1",
    stdin="in.jpg",
    original="in.jpg",
    captions=1,
    **PIPE,
)
add(
    "pipe-empty",
    "in",
    lambda path: write(path, b""),
    stdin="in",
    arguments="-",
    says="empty|nothing|no data",
    **NOT_VIDEO,
)
add("pipe-text", "in", lambda path: write(path, "words\n" * 99), stdin="in", arguments="-", **NOT_VIDEO)
add("fifo", "in.mkv", CLIP, trait="fifo", arguments="fifo", original="in.mkv", copy_exit=(0, 1, 2))
add("dev-zero", "none", lambda path: None, arguments="/dev/zero", **NOT_VIDEO)
add("dev-null", "none", lambda path: None, arguments="/dev/null", **NOT_VIDEO)

# Servers. {http} is the judge's: its first folder is what it does with the file.
SERVED = dict(original="clip.mp4")
add("http", "clip.mp4", CLIP, arguments="{http}/range/clip.mp4", **SERVED)
add("http-no-range", "clip.mp4", CLIP + " -movflags +faststart", arguments="{http}/plain/clip.mp4", **SERVED)
add("http-no-range-moov-last", "clip.mp4", CLIP, arguments="{http}/plain/clip.mp4", exit=(0, 1), **SERVED)
add("http-redirect", "clip.mp4", CLIP, arguments="{http}/redirect/clip.mp4", **SERVED)
add("http-query", "clip.mp4", CLIP, arguments="{http}/range/clip.mp4?sig=a%20b&x=1#t=1", **SERVED)
add("http-slow", "clip.mp4", CLIP + " -movflags +faststart", arguments="{http}/slow/clip.mp4", **SERVED)
add("http-chunked", "clip.mkv", CLIP, arguments="{http}/chunked/clip.mkv", original="clip.mkv")
add("http-cut", "clip.mp4", CLIP + " -movflags +faststart", arguments="{http}/cut/clip.mp4", captions=2, **TOLD)
add("http-401", "clip.mp4", CLIP, arguments="{http}/401/clip.mp4", says="401|unauthori[sz]ed", **NOT_VIDEO)
add("http-404", "clip.mp4", CLIP, arguments="{http}/404/clip.mp4", says="404|not found", **NOT_VIDEO)
add("http-500", "clip.mp4", CLIP, arguments="{http}/500/clip.mp4", says="500|internal server error", **NOT_VIDEO)
add("http-redirect-loop", "clip.mp4", CLIP, arguments="{http}/loop/clip.mp4", says="redirect", **NOT_VIDEO)
add(
    "http-page",
    "page.html",
    lambda path: write(path, "<!doctype html><title>Log in</title>"),
    arguments="{http}/range/page.html",
    **NOT_VIDEO,
)
add("http-refused", "clip.mp4", CLIP, arguments="http://127.0.0.1:9/clip.mp4", says="refused|connect", **NOT_VIDEO)
add(
    "http-no-host",
    "clip.mp4",
    CLIP,
    arguments="http://no-such-host.invalid/clip.mp4",
    says="resolve|host|name|server",
    **NOT_VIDEO,
)
add("https-untrusted", "clip.mp4", CLIP, arguments="{https}/range/clip.mp4", says="certificate|tls", **NOT_VIDEO)
add(
    "scheme-unknown",
    "clip.mp4",
    CLIP,
    arguments="gopher://127.0.0.1/clip.mp4",
    says="gopher|scheme|protocol|url",
    captions=0,
    exit=(1, 2),
)
HLS = "{V} {A} {H264} {AAC} -f hls -hls_time 1 -hls_playlist_type vod"
add("hls-local", "list.m3u8", HLS, times=False, copy_exit=(0, 1, 2))
add("hls-http", "list.m3u8", HLS, arguments="{http}/range/list.m3u8", original="list.m3u8", times=False)
add(
    "hls-missing-segment",
    "list.m3u8",
    HLS,
    arguments="{http}/hole/list.m3u8",
    captions=3,
    exit=(0, 1),
    share=0.5,
    warns="missing|404|segment|cut|damag|incomplete",
    times=False,
)
DASH = "{V} {A} {H264} {AAC} -f dash -seg_duration 1"
add("dash-local", "manifest.mpd", DASH, exit=(0, 1), copy_exit=(0, 1, 2), times=False)
add(
    "dash-http",
    "manifest.mpd",
    DASH,
    arguments="{http}/range/manifest.mpd",
    original="manifest.mpd",
    times=False,
    exit=(0, 1),
)
add("rtsp", "clip.mkv", "{V} {H264}", arguments="{rtsp}/clip", copy_exit=(1, 2), captions=3, times=False)
add("rtsp-no-such", "clip.mkv", "{V} {H264}", arguments="{rtsp}/other", says="404|not found", **NOT_VIDEO)

# Where the output is to go.
add(
    "output-folder-read-only",
    "clip.mp4",
    CLIP,
    trait="read-only",
    copy_exit=1,
    says="permission|read-only|write|denied",
)
add(
    "disk-full",
    "clip.mp4",
    "{V} {A} -c:v libx264 -b:v 2M -preset ultrafast {AAC}",
    trait="tmpfs",
    copy_exit=1,
    says="space|full",
)
add(
    "file-size-limit",
    "clip.mp4",
    "{V} {A} -c:v libx264 -b:v 2M -preset ultrafast {AAC}",
    trait="fsize",
    copy_exit=1,
    says="large|limit|space|full",
)
