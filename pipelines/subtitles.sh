#!/usr/bin/env bash
# Narrates a video file into subtitles: WebVTT or SubRip, as the output's name says.
#   pipelines/subtitles.sh FILE OUTPUT.vtt|OUTPUT.srt
# MODEL and INTERVAL as in narrate-file.sh.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh"
usage="usage: subtitles.sh FILE OUTPUT.vtt|OUTPUT.srt"
input=${1:?$usage}
case ${2:?$usage} in
# Where < and & are markup they are written as such.
*.vtt) encoder=(text/x-raw,format=pango-markup ! webvttenc) ;;
*.srt) encoder=(srtenc) ;;
*) echo "$usage" >&2; exit 2 ;;
esac
open_input "$input"
# Times count from the start of the video, wherever its own timestamps start.
narrate \
    uridecodebin uri="$uri" ! "${upright[@]}" ! identity single-segment=true ! \
    vlmnarrate name=narrator mode=recorded merge-captions=true "${options[@]}" ! fakesink \
    narrator.text_src ! "${unlimited[@]}" ! "${encoder[@]}" ! filesink location="$2"
echo "Wrote $2" >&2
