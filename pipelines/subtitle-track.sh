#!/usr/bin/env bash
# Encodes a video anew with its captions as a subtitle track. The command copies the streams instead: vlmnarrate FILE
#   pipelines/subtitle-track.sh FILE OUTPUT.mkv
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh"
usage="usage: subtitle-track.sh FILE OUTPUT.mkv"
uri=$(uri_of "${1:?$usage}")
new_file "${2:?$usage}"
gst-launch-1.0 uridecodebin uri="$uri" ! videoconvert ! videoflip video-direction=auto ! identity single-segment=true \
    ! vlmnarrate name=n mode=recorded merge-captions=true ! videoconvert ! x264enc ! $unlimited ! matroskamux name=m \
    ! filesink location="$2" n.text_src ! $unlimited ! m.
