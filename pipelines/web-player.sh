#!/usr/bin/env bash
# Narrates a video file into a web page: a folder with the page, the video and its captions, to put on any web
# server or to open from disk.
#   pipelines/web-player.sh FILE|URI [FOLDER]
# MODEL and INTERVAL as in narrate-file.sh.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh"

input=${1:?usage: web-player.sh FILE [FOLDER]}
folder=${2-narrated-page}
page=$folder/index.html
if [ -e "$page" ] && ! grep -q 'name="generator" content="vlmnarrate"' "$page"; then
    echo "$page is there already and not from this script: name another folder" >&2
    exit 1
fi
open_input "$input"
find_sound 'audio/x-raw,channels=[1,2]' ! avenc_aac bitrate=128000
mkdir -p "$folder"
# Comes last, so that there is no page of a narration cut short.
rm -f "$page"

# What every browser plays: upright, 4:2:0, even sides, the index in front, a key frame at most every two seconds
# or so that seeking is quick.
echo "Narrating $input" >&2
narrate --text \
    uridecodebin uri="$uri" name=in \
    in. ! "${upright[@]}" ! identity single-segment=true ! \
    vlmnarrate name=narrator mode=recorded merge-captions=true "${options[@]}" ! \
    videoconvert ! video/x-raw,format=I420 ! "${h264[@]}" pass=qual quantizer=23 key-int-max=60 ! \
    video/x-h264,profile=high ! "${unlimited[@]}" ! \
    mp4mux name=mux faststart=true faststart-file="$folder/video.mp4.part" ! filesink location="$folder/video.mp4" \
    narrator.text_src ! "${unlimited[@]}" ! text/x-raw,format=pango-markup ! webvttenc ! \
    filesink location="$folder/captions.vtt" async=false \
    "${sound[@]}"

name=${input##*/}
/usr/bin/python3 "$here/web-player.py" "$here/web/player.html" "$folder" "${name%.*}"
cat >&2 <<END
Wrote $folder: index.html, video.mp4, captions.vtt
Look at it: open $(gst_file_uri "$page") in a browser, or put the folder on a web server.
END
