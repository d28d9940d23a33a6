"""Kinds of containers and codecs, with what rides along: audio tracks, subtitles, chapters, fonts, HDR, rotation."""

import os
import struct

from kinds import VIDEO, add, ass, chapters, ff, gst, kind, read, srt, sup, write

FONT = "/usr/share/fonts/truetype/dejavu/DejaVuSans-Bold.ttf"


def assembled(name, file, recipe, **more):
    """Adds a kind that is put together from a clip {mkv} and subtitles, chapters, a picture and a font."""

    def make(path):
        names = {suffix: path + "." + suffix for suffix in ("srt", "ass", "sup", "txt", "png", "mkv")}
        srt(names["srt"]), ass(names["ass"]), sup(names["sup"]), chapters(names["txt"])
        ff("-f lavfi -i smptebars=size=64x64:duration=1 -frames:v 1", names["png"])
        ff("{V} {A} {H264} {AAC}", names["mkv"])
        ff(recipe.format(font=FONT, **names), path)
        for other in names.values():
            os.remove(other)

    add(name, file, make, **more)


# Everyday files.
add("mp4-h264-aac", "holiday.mp4", "{V} {A} {H264} {AAC}")
add("mp4-faststart", "web.mp4", "{V} {A} {H264} {AAC} -movflags +faststart")
add("mp4-fragmented", "fragments.mp4", "{V} {A} {H264} {AAC} -movflags frag_keyframe+empty_moov")
add("mp4-b-frames", "b-frames.mp4", "{V} {A} -c:v libx264 -preset medium -crf 30 -bf 3 -pix_fmt yuv420p {AAC}")
add(
    "mp4-two-audio",
    "two languages.mp4",
    "{V} {A} -f lavfi -i sine=880:duration=3 -map 0 -map 1 -map 2 {H264} {AAC} -metadata:s:a:0 language=eng "
    "-metadata:s:a:1 language=deu -metadata:s:a:1 title=Kommentar -disposition:a:0 0 -disposition:a:1 default",
)
add("mp4-surround", "surround.mp4", "{V} -f lavfi -i anoisesrc=d=3:a=.01,aformat=channel_layouts=5.1 {H264} -c:a eac3")
add("mp4-no-audio", "silent.mp4", "{V} {H264}")
add("mp4-opus", "opus.mp4", "{V} {A} {H264} -c:a libopus")
add(
    "mp4-metadata",
    "tagged.mp4",
    "{V} {A} {H264} {AAC} -metadata title='Ein schöner Tag 🌞' -metadata artist=Ñandú -metadata comment='a; b = c' "
    "-metadata creation_time=2024-02-29T12:00:00Z -metadata location=+48.2082+016.3738/",
)
for angle in (90, 180, 270):

    @kind(f"mov-rotated-{angle}", f"IMG_{angle}.MOV")
    def rotated(path, angle=angle):
        upright = path + ".mov"
        ff("{V} {A} {H264} {AAC}", upright)
        ff(f"-i '{upright}' -c copy -metadata:s:v rotate={angle}", path)
        os.remove(upright)


def hdr(path, transfer, more=""):
    ff(
        f"{VIDEO} -c:v libx265 -preset ultrafast -pix_fmt yuv420p10le -tag:v hvc1 -x265-params log-level=none:"
        f"repeat-headers=1:keyint=25:colorprim=bt2020:colormatrix=bt2020nc:transfer={transfer}{more}",
        path,
    )


MASTERING = (
    ":hdr10=1:master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50):max-cll=1000,400"
)


def with_mastering(data):
    """The MP4 with boxes of the mastering display and the content's light level, which ffmpeg's x265 leaves out."""
    display = (13250, 34500, 7500, 3000, 34000, 16000, 15635, 16450)
    display = b"".join(n.to_bytes(2, "big") for n in display) + struct.pack(">II", 10000000, 50)
    added = struct.pack(">I4s", 32, b"mdcv") + display + struct.pack(">I4sHH", 12, b"clli", 1000, 400)
    data, at = bytearray(data), 0
    for box in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"hvc1"):
        at = data.index(box, at) - 4
        size = int.from_bytes(data[at : at + 4], "big")
        data[at : at + 4] = (size + len(added)).to_bytes(4, "big")
        end, at = at + size, at + 8
    data[end:end] = added  # the index comes last: no offset changes
    return bytes(data)


@kind("mp4-hevc-hdr10", "hdr10.mp4")
def _(path):
    hdr(path, "smpte2084", MASTERING)
    write(path, with_mastering(read(path)))


@kind("mkv-hevc-hdr10", "hdr10.mkv")
def _(path):
    whole = path + ".mp4"
    hdr(whole, "smpte2084", MASTERING)
    write(whole, with_mastering(read(whole)))
    ff("", "-i", whole, "-c", "copy", path)
    os.remove(whole)


@kind("mp4-hevc-hlg", "hlg.mp4")
def _(path):
    hdr(path, "arib-std-b67")


assembled(
    "mp4-mov-text",
    "captions.mp4",
    "-i {mkv} -i {srt} -map 0 -map 1 -c copy -c:s mov_text -metadata:s:s language=deu",
    lost="mov_text",
)
assembled("mp4-chapters", "chapters.mp4", "-i {mkv} -i {txt} -map 0 -map_metadata 1 -c copy", lost="bin_data")
assembled("mp4-cover", "cover.mp4", "-i {png} -i {mkv} -map 0 -map 1 -c copy -disposition:v:0 attached_pic")
add("m4v-suffix", "itunes.m4v", "{V} {A} {H264} {AAC} -f ipod")
add("webm-vp8", "vp8.webm", "{V} {A} -c:v libvpx -b:v 300k -deadline realtime -c:a libvorbis")
add("webm-vp9", "vp9.webm", "{V} {A} -c:v libvpx-vp9 -b:v 300k -deadline realtime -cpu-used 8 -c:a libopus")
add("webm-av1", "av1.webm", "{V} {A} -c:v libsvtav1 -preset 12 -c:a libopus")
add(
    "webm-vp9-alpha",
    "alpha.webm",
    "-f lavfi -i color=red@0.5:size=320x180:rate=25:duration=3,format=yuva420p -c:v libvpx-vp9 -b:v 300k -cpu-used 8 "
    "-deadline realtime -pix_fmt yuva420p",
)

# Matroska with all that it can hold.
assembled(
    "mkv-srt-ass",
    "subtitles.mkv",
    "-i {mkv} -i {srt} -i {ass} -map 0 -map 1 -map 2 -c copy -metadata:s:s:0 language=deu -metadata:s:s:1 "
    "language=eng -metadata:s:s:1 title=Signs -disposition:s:0 default -disposition:s:1 forced",
)
assembled("mkv-pgs", "bluray.mkv", "-i {mkv} -i {sup} -map 0 -map 1 -c copy -metadata:s:s:0 language=fra")
assembled("mkv-vobsub", "dvd.mkv", "-i {mkv} -i {sup} -map 0 -map 1 -c copy -c:s dvdsub -metadata:s:s:0 language=fra")
assembled(
    "mkv-chapters-tags",
    "chapters.mkv",
    "-i {mkv} -i {txt} -map 0 -map_metadata 1 -c copy -metadata:s:a language=jpn -metadata:s:a title=日本語",
)
assembled(
    "mkv-fonts", "fonts.mkv", "-i {mkv} -i {ass} -map 0 -map 1 -c copy -attach {font} -metadata:s:t mimetype=font/ttf"
)
assembled(
    "mkv-cover",
    "cover.mkv",
    "-i {mkv} -map 0 -c copy -attach {png} -metadata:s:t mimetype=image/png -metadata:s:t filename=cover.png",
)
assembled(
    "mkv-everything",
    "everything.mkv",
    "-i {mkv} -i {srt} -i {ass} -i {sup} -i {txt} -map 0 -map 0:a -map 1 -map 2 -map 3 -map_metadata 4 "
    "-map_chapters 4 -c copy -attach {font} -metadata:s:t mimetype=font/ttf -metadata:s:a:0 language=eng "
    "-metadata:s:a:1 language=fra -metadata:s:s:0 language=deu -disposition:s:0 hearing_impaired",
)
add("mkv-flac-ffv1", "archive.mkv", "{V} {A} -c:v ffv1 -level 3 -c:a flac")
add(
    "mkv-dts-truehd",
    "cinema.mkv",
    "{V} {A} -f lavfi -i anoisesrc=d=3:a=.01 -map 0 -map 1 -map 2 {H264} -c:a:0 dca -c:a:1 truehd -strict -2",
)
add("mkv-h264-lossless-444", "444.mkv", "{V} -c:v libx264 -preset ultrafast -qp 0 -pix_fmt yuv444p")
add("mkv-h264-10-bit", "ten.mkv", "{V} -c:v libx264 -preset ultrafast -pix_fmt yuv420p10le")
add("mkv-rgb", "rgb.mkv", "{V} -c:v libx264rgb -preset ultrafast -crf 20")
add("mkv-grey", "grey.mkv", "{V} -c:v ffv1 -pix_fmt gray")


# Transport streams, and what cameras, discs and televisions write.
add("ts-at-10-hours", "recording.ts", "{V} {A} {H264} {AAC} -output_ts_offset 36000 -f mpegts")
add("ts-clock-wraps", "wraps.ts", "{V} {A} {H264} {AAC} -output_ts_offset 95442 -f mpegts", times=False)
add(
    "ts-two-programs",
    "mux.ts",
    "{V} {A} -f lavfi -i smptebars=size=160x120:rate=25:duration=3 -map 0 -map 1 -map 2 -map 1 {H264} -c:a mp2 "
    "-program title=One:st=0:st=1 -program title=Two:st=2:st=3 -f mpegts",
)
add("ts-hevc", "hevc.ts", "{V} {A} -c:v libx265 -preset ultrafast -x265-params log-level=none -c:a ac3 -f mpegts")
assembled(
    "ts-dvb-subtitles",
    "dvb.ts",
    "-i {mkv} -i {sup} -map 0 -map 1 -c copy -c:s dvbsub -metadata:s:s:0 language=deu -f mpegts",
)
add(
    "mts-avchd",
    "00001.MTS",
    "{V} {A} -c:v libx264 -preset veryfast -flags +ilme+ildct -x264opts tff=1 -c:a ac3 -f mpegts",
)
add("m2ts-192-bytes", "00001.m2ts", "{V} {A} {H264} -c:a ac3 -mpegts_m2ts_mode 1 -f mpegts")
add(
    "vob-mpeg2-ac3",
    "VTS_01_1.VOB",
    "-f lavfi -i testsrc2=size=720x576:rate=25:d=3 {A} -c:v mpeg2video -b:v 2M -aspect 16:9 -bf 2 -c:a ac3 -f vob",
)
add("mpg-mpeg1", "clip.mpg", "{V} {A} -c:v mpeg1video -b:v 500k -c:a mp2 -f mpeg")
add(
    "mpg-mpeg2-interlaced",
    "interlaced.mpg",
    "-f lavfi -i testsrc2=size=720x576:rate=50:duration=3,tinterlace=interleave_top {A} -c:v mpeg2video -b:v 2M "
    "-flags +ilme+ildct -c:a mp2 -f mpeg",
)
add("dv", "tape.dv", "-f lavfi -i testsrc2=size=720x576:rate=25:duration=3 {A} -c:v dvvideo -ar 48000 -ac 2 -f dv")
add(
    "mov-prores-timecode",
    "editing.mov",
    "{V} {A} -c:v prores_ks -profile:v 0 -c:a pcm_s24le -timecode 01:02:03:04",
    lost="none",
    decoded="prores",
)
add(
    "mov-prores-4444",
    "alpha.mov",
    "-f lavfi -i color=red@0.5:size=320x180:rate=25:duration=3,format=yuva444p10le -c:v prores_ks -profile:v 4",
    decoded="prores",
)
add("mov-animation", "qtrle.mov", "{V} -c:v qtrle -pix_fmt argb", copy_exit=(0, 1))
add(
    "mxf-dnxhd",
    "broadcast.mxf",
    "-f lavfi -i testsrc2=size=1920x1080:rate=25:duration=1 -f lavfi -i sine=440:duration=1 -c:v dnxhd -b:v 36M "
    "-pix_fmt yuv422p -c:a pcm_s16le -ar 48000",
    captions=1,
)
# An AVI does not tell when B-frames are shown: their copy is right or refused.
add(
    "avi-xvid-packed",
    "film.avi",
    "{V} {A} -c:v libxvid -b:v 300k -bf 2 -c:a libmp3lame",
    decoded="mpeg4",
    times=False,
    copy_exit=(0, 1),
)
add("avi-mpeg4-mp3", "divx.avi", "{V} {A} -c:v mpeg4 -vtag DX50 -b:v 300k -c:a libmp3lame")
add(
    "avi-h264-b-frames",
    "h264.avi",
    "{V} {A} -c:v libx264 -preset medium -bf 3 -pix_fmt yuv420p -c:a libmp3lame",
    times=False,
    copy_exit=(0, 1),
)
add("avi-mjpeg-pcm", "camera.avi", "{V} {A} -c:v mjpeg -q:v 8 -pix_fmt yuvj420p -c:a pcm_s16le")
add(
    "avi-uncompressed",
    "raw.avi",
    "-f lavfi -i testsrc2=size=160x90:rate=25:duration=2 -c:v rawvideo -pix_fmt bgr24",
    captions=2,
    copy_exit=(0, 1),
    decoded="rawvideo",
)
add("wmv", "clip.wmv", "{V} {A} -c:v wmv2 -b:v 300k -c:a wmav2")
add("flv", "clip.flv", "{V} {A} {H264} {AAC}")
add("flv-sorenson", "old.flv", "{V} {A} -c:v flv -b:v 300k -c:a libmp3lame -ar 44100")
add("ogv-theora", "clip.ogv", "{V} {A} -c:v libtheora -q:v 5 -c:a libvorbis", decoded="theora")
add("rm-realvideo", "old.rm", "{V} {A} -c:v rv20 -b:v 300k -c:a ac3", exit=(0, 1))
add(
    "y4m",
    "raw.y4m",
    "-f lavfi -i testsrc2=size=160x90:rate=25:duration=2",
    captions=2,
    copy_exit=(0, 1),
    decoded="rawvideo",
)
add("h264-elementary", "stream.h264", "{V} {H264} -bf 0 -f h264", times=False)
add(
    "h265-elementary",
    "stream.h265",
    "{V} -c:v libx265 -preset ultrafast -x265-params log-level=none:bframes=0 -f hevc",
    times=False,
)
add("ivf-vp9", "stream.ivf", "{V} -c:v libvpx-vp9 -b:v 300k -deadline realtime -cpu-used 8")


@kind("3gp-h263-amr", "VID_0001.3gp")
def _(path):
    gst(
        "videotestsrc num-buffers=45 pattern=ball ! video/x-raw,width=176,height=144,framerate=15/1 ! avenc_h263 ! "
        "h263parse ! queue ! 3gppmux name=mux "
        f"! filesink location={path} audiotestsrc num-buffers=150 samplesperbuffer=160 "
        "! audio/x-raw,rate=8000,channels=1 ! amrnbenc ! queue ! mux."
    )
