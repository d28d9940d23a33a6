#!/usr/bin/env bash
# Narrates a video file into subtitles: WebVTT or SubRip, as the output's name says.
#   pipelines/subtitles.sh FILE OUTPUT.vtt|OUTPUT.srt
# MODEL and INTERVAL as in narrate-file.sh.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh"
usage="usage: subtitles.sh FILE OUTPUT.vtt|OUTPUT.srt"
uri=$(uri_of "${1:?$usage}")
case ${2:?$usage} in
*.vtt) encoder=webvttenc ;;
*.srt) encoder=srtenc ;;
*) echo "$usage" >&2; exit 2 ;;
esac
gst-launch-1.0 -q \
    uridecodebin uri="$uri" caps=video/x-raw expose-all-streams=false ! \
    vlmnarrate name=narrator mode=recorded model="${MODEL-}" interval="${INTERVAL:-1000000000}" ! fakesink \
    narrator.text_src ! queue ! "$encoder" ! filesink location="$2"
echo "Wrote $2" >&2
