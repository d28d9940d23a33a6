#!/usr/bin/env bash
# Draws captions into the picture of a video, whose sound is left out. The command keeps it: vlmnarrate burn
#   pipelines/burn-in.sh FILE OUTPUT.mp4
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh"
usage="usage: burn-in.sh FILE OUTPUT.mp4"
uri=$(uri_of "${1:?$usage}")
new_file "${2:?$usage}"
gst-launch-1.0 uridecodebin uri="$uri" ! videoconvert ! videoflip video-direction=auto ! vlmnarrateoverlay mode=recorded \
    ! videoconvert ! x264enc pass=qual quantizer=20 ! mp4mux ! filesink location="$2"
