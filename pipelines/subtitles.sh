#!/usr/bin/env bash
# Narrates a video into WebVTT subtitles.
#   pipelines/subtitles.sh FILE OUTPUT.vtt
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh"
usage="usage: subtitles.sh FILE OUTPUT.vtt"
uri=$(uri_of "${1:?$usage}")
new_file "${2:?$usage}"
# Where < and & are markup, as in WebVTT, the pad writes them as such.
gst-launch-1.0 uridecodebin uri="$uri" ! videoconvert ! videoflip video-direction=auto ! identity single-segment=true \
    ! vlmnarrate name=n mode=recorded merge-captions=true ! fakesink \
    n.text_src ! $unlimited ! text/x-raw,format=pango-markup ! webvttenc ! filesink location="$2"
