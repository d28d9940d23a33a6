"""Kinds of sizes, rates and times, of streams that change midway, and of stills and animations."""

import glob
import os

from PIL import Image

from kinds import AUDIO, VIDEO, add, ff, kind, read, run, write

# Sizes.
add("size-odd", "odd.mkv", "-f lavfi -i testsrc2=size=175x143:rate=25:duration=3 -c:v ffv1 -pix_fmt yuv444p")
add(
    "size-1x1",
    "dot.mkv",
    "-f lavfi -i color=red:size=2x2:rate=25:duration=2,format=gray,crop=1:1 -c:v ffv1",
    captions=2,
    exit=(0, 1),
)
add("size-16x16", "tiny.mp4", "-f lavfi -i color=red:size=16x16:rate=25:duration=2 {H264}", captions=2)
add("size-4096x16", "ribbon.mp4", "-f lavfi -i testsrc2=size=4096x16:rate=25:duration=2 {H264}", captions=2)
add("size-16x4096", "column.mkv", "-f lavfi -i testsrc2=size=16x4096:rate=25:duration=2 {H264}", captions=2)
add("size-8k", "8k.mp4", "-f lavfi -i testsrc2=size=7680x4320:rate=1:duration=1 {H264}", captions=1)
add("anamorphic", "wide.mp4", "{V} -vf setsar=16/11 {H264}")

# Rates and times.
add("rate-variable", "screen.mp4", "{V} -vf select='not(mod(n\\,7))+not(mod(n\\,11))' -vsync vfr {H264}")
add("rate-120", "slow-motion.mp4", "-f lavfi -i testsrc2=size=320x180:rate=120:duration=3 {H264}")
add("rate-1", "lapse.mp4", "-f lavfi -i testsrc2=size=320x180:rate=1:duration=3 {H264}")
add("rate-one-in-10-s", "slow.mp4", "-f lavfi -i testsrc2=size=320x180:rate=1/10:duration=30 {H264}")
add("rate-29.97", "ntsc.mp4", "-f lavfi -i testsrc2=size=320x180:rate=30000/1001:duration=3 {H264}")
add("one-frame", "frame.mp4", "{V} -frames:v 1 {H264}", captions=1)
add(
    "0.04-s",
    "blink.mp4",
    "-f lavfi -i testsrc2=size=320x180:rate=25:duration=0.04 -f lavfi -i sine=d=0.04 {H264} {AAC}",
    captions=1,
)
# What is shown of the first frame begins within it, so that the rest is off by less than a frame.
add("edit-list", "edited.mp4", lambda path: edited(path), cue_slack=0.021)
add("video-after-audio", "late.mkv", "{A} -itsoffset 1.2 {V} -map 1 -map 0 {H264} {AAC}")
add("audio-after-video", "late-audio.mkv", "{V} -itsoffset 1.2 {A} {H264} {AAC}")
add("video-ends-early", "podcast.mp4", "{V} -f lavfi -i sine=d=6 {H264} {AAC}")
add("two-videos", "two.mkv", "{V} -f lavfi -i smptebars=size=160x120:d=3 {A} -map 0 -map 1 -map 2 {H264} {AAC}")


def edited(path):
    """Cut without coding anew: the edit list hides frames before 0.5 s, whose time stamps are negative."""
    whole = path + ".whole.mp4"
    ff("{V} {A} {H264} {AAC} -g 75 -bf 2", whole)
    ff("-ss 0.5", "-i", whole, "-c", "copy", path)
    os.remove(whole)


@kind("video-after-audio-mp4", "late.mp4")
def _(path):
    whole = path + ".whole.mkv"
    ff("{A} -itsoffset 1.2 {V} -map 1 -map 0 {H264} {AAC}", whole)
    ff("", "-i", whole, "-c", "copy", path)
    os.remove(whole)


# Changes midway.
def joined(path, first, second, starts=3):
    """Two encodings, one after the other in time."""
    names = [path + ".1", path + ".2"]
    ff(f"{first} -f mpegts", names[0])
    ff(f"{second} -output_ts_offset {starts} -f mpegts", names[1])
    write(path, read(names[0]) + read(names[1]))
    for name in names:
        os.remove(name)


SMALL = "-f lavfi -i testsrc2=size=176x144:rate=25:duration=3"


@kind("change-size-ts", "change.ts", captions=6, times=False)  # its sound overlaps by a packet where it changes
def _(path):
    joined(path, "{V} {A} {H264} -c:a mp2", SMALL + " {A} {H264} -c:a mp2")


@kind("change-size-webm", "change.webm", captions=6)
def _(path):
    names = [path + ".1.webm", path + ".2.webm"]
    for source, name in zip((VIDEO, SMALL), names):
        ff(f"{source} -c:v libvpx -b:v 300k -deadline realtime", name)
    listing = path + ".txt"
    write(listing, "".join(f"file '{os.path.basename(name)}'\n" for name in names))
    ff("-f concat -safe 0", "-i", listing, "-c", "copy", path)
    for name in (*names, listing):
        os.remove(name)


@kind("change-pixel-format", "format.ts", captions=6)
def _(path):
    joined(path, "{V} {H264}", VIDEO + " {H264} -pix_fmt yuv422p")


@kind("change-rate", "rate.ts", captions=6)
def _(path):
    joined(path, "{V} {H264}", "-f lavfi -i testsrc2=size=320x180:rate=50:duration=3 {H264}")


@kind("change-codec", "codec.ts", captions=6, exit=(0, 1), times=False)
def _(path):
    joined(path, "{V} -c:v mpeg2video -b:v 500k", VIDEO + " {H264}")


@kind("change-audio", "audio.ts", captions=6, times=False)
def _(path):
    joined(path, "{V} {A} {H264} -c:a mp2 -ac 1", VIDEO + " " + AUDIO + " {H264} -c:a mp2 -ac 2 -ar 48000")


@kind("time-jumps-back", "spliced.ts", captions=6, times=False)
def _(path):
    part = path + ".1"
    ff("{V} {A} {H264} -c:a mp2 -f mpegts", part)
    write(path, read(part) * 2)
    os.remove(part)


@kind("time-gap", "gap.ts", captions=11)
def _(path):
    joined(path, "{V} {A} {H264} -c:a mp2", "{V} {A} {H264} -c:a mp2", starts=8)


# Animations.
BALL = "-f lavfi -i testsrc2=size=120x90:rate=10:duration=3"
add("gif-loops", "loops.gif", BALL + " -loop 0", copy_exit=(0, 1))
add("gif-plays-once", "once.gif", BALL + " -loop -1", copy_exit=(0, 1))
add("gif-one-frame", "one.gif", BALL + " -frames:v 1", captions=1, copy_exit=(0, 1))
add("webp-animated", "moves.webp", BALL + " -c:v libwebp_anim -loop 0", exit=(0, 1))
add("apng", "moves.png", BALL + " -plays 0 -f apng", copy_exit=(0, 1))

# Stills: one caption each.
STILL = "-f lavfi -i testsrc2=size=640x360:duration=1:rate=1 -frames:v 1"
for name, file, how in (
    ("jpeg", "photo.jpg", "-q:v 3 -pix_fmt yuvj420p"),
    ("png", "picture.png", ""),
    ("png-alpha", "alpha.png", "-vf format=rgba,colorchannelmixer=aa=0.4"),
    ("png-16-bit", "deep.png", "-pix_fmt rgb48be"),
    ("png-palette", "palette.png", "-pix_fmt pal8"),
    ("bmp", "picture.bmp", ""),
    ("tiff", "scan.tiff", "-compression_algo lzw"),
    ("webp", "still.webp", "-c:v libwebp"),
    ("jpeg-2000", "still.jp2", "-c:v jpeg2000"),
):  # fmt: skip
    if file.endswith((".webp", ".jp2", ".tiff", ".bmp")):
        add(f"still-{name}", file, f"{STILL} {how}", captions=1, copy_exit=(0, 1))
    else:
        add(f"still-{name}", file, f"{STILL} {how}", captions=1)
add(
    "still-avif", "still.avif", f"{STILL} -c:v libaom-av1 -cpu-used 8 -still-picture 1 -f avif", captions=1, exit=(0, 1)
)


def still(path, change, **options):
    whole = path + ".png"
    ff(STILL, whole)
    change(Image.open(whole).convert("RGB")).save(path, "JPEG", quality=90, **options)
    os.remove(whole)


for orientation in (3, 6, 8):

    @kind(f"still-jpeg-orientation-{orientation}", f"IMG_{orientation}.JPG", captions=1)
    def oriented(path, orientation=orientation):
        exif = Image.Exif()
        exif[0x112] = orientation
        still(path, lambda image: image, exif=exif.tobytes())


@kind("still-jpeg-progressive", "web.jpg", captions=1)
def _(path):
    still(path, lambda image: image, progressive=True)


@kind("still-jpeg-cmyk", "print.jpg", captions=1)
def _(path):
    still(path, lambda image: image.convert("CMYK"))


@kind("still-jpeg-grey", "grey.jpg", captions=1)
def _(path):
    still(path, lambda image: image.convert("L"))


@kind("still-png-8k", "poster.png", captions=1)
def _(path):
    Image.new("RGB", (7680, 4320), "navy").save(path)


@kind("still-png-1x1", "dot.png", captions=1, exit=(0, 1))
def _(path):
    Image.new("RGB", (1, 1), "red").save(path)


@kind("still-heic", "IMG_0001.HEIC", captions=1, exit=(0, 1))
def _(path):
    whole = path + ".png"
    ff(STILL, whole)
    run(["heif-enc", "-o", path, whole])
    os.remove(whole)


@kind("still-svg", "drawing.svg", captions=1, exit=(0, 1))
def _(path):
    write(
        path,
        "<svg xmlns='http://www.w3.org/2000/svg' width='320' height='180'><circle cx='90' cy='90' r='60' "
        "fill='red'/></svg>",
    )


# Real media.
def downloaded(path):
    """Takes a file out of the packages that make.py has fetched."""
    found = glob.glob(os.path.join(os.environ["PACKAGES"], "**", os.path.basename(path)), recursive=True)
    if not found:
        raise RuntimeError(f"no {os.path.basename(path)} in the packages: run make.py without --offline")
    write(path, read(found[0]))


add("real-big-buck-bunny", "bigbuckbunny.mp4", downloaded, captions=6)
add("real-bikes", "bikes.mp4", downloaded, captions=10)
add("real-carphone", "carphone_pristine.mp4", downloaded, captions=4)
add("real-xine-logo", "xine-ui_logo.mpg", downloaded, captions=10, times=False)
add("still-real-photograph", "china.jpg", downloaded, captions=1)
