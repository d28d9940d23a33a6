#!/usr/bin/env bash
# Narrates a video file into a web page: a folder with the page, the video and its captions, to put on any web
# server or to open from disk.
#   pipelines/web-player.sh FILE|URI [FOLDER]
# MODEL and INTERVAL as in narrate-file.sh.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh"

input=${1:?usage: web-player.sh FILE [FOLDER]}
folder=${2-narrated-page}
uri=$(uri_of "$input")
page=$folder/index.html
if [ -e "$page" ] && ! grep -q 'name="generator" content="vlmnarrate"' "$page"; then
    echo "$page is there already and not from this script: name another folder" >&2
    exit 1
fi
# A branch without a pad would hold up the muxer for ever.
contents=$(gst-discoverer-1.0 "$uri" 2>/dev/null || true)
if ! grep -q '^ *video' <<<"$contents"; then
    echo "$input: no video in it that GStreamer can read" >&2
    exit 1
fi
mkdir -p "$folder"
# Comes last, so that there is no page of a narration cut short.
rm -f "$page"

sound=()
if grep -q '^ *audio' <<<"$contents"; then
    sound=(in. ! queue ! audioconvert ! audioresample ! 'audio/x-raw,channels=[1,2]' ! avenc_aac bitrate=128000 ! "${text_queue[@]}" ! mux.)
fi

# What every browser plays: upright, 4:2:0, even sides, the index in front, a key frame at most every two seconds
# or so that seeking is quick.
echo "Narrating $input" >&2
gst-launch-1.0 -q \
    uridecodebin uri="$uri" name=in \
    in. ! videoflip video-direction=auto ! videoconvert ! identity single-segment=true ! \
    vlmnarrate name=narrator mode=recorded "${options[@]}" `# merge-captions` ! \
    videoconvert ! videoscale ! 'video/x-raw,format=I420,width=[2,8192,2],height=[2,8192,2]' ! \
    x264enc pass=qual quantizer=23 speed-preset=veryfast key-int-max=60 ! video/x-h264,profile=high ! "${text_queue[@]}" ! \
    mp4mux name=mux faststart=true faststart-file="$folder/video.mp4.part" ! filesink location="$folder/video.mp4" \
    narrator.text_src ! tee name=captions ! \
    "${text_queue[@]}" ! webvttenc ! filesink location="$folder/captions.vtt" async=false \
    captions. ! "${text_queue[@]}" ! webvttenc ! fdsink fd=1 sync=false async=false \
    "${sound[@]}" | (to_stdout)

name=${input##*/}
/usr/bin/python3 "$here/web-player.py" "$here/web/player.html" "$folder" "${name%.*}"
cat >&2 <<END
Wrote $folder: index.html, video.mp4, captions.vtt
Look at it: open $(gst_file_uri "$page") in a browser, or put the folder on a web server.
END
