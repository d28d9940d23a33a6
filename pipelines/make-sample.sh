#!/usr/bin/env bash
# Makes a short H.264 video of test pictures, three seconds each.
#   pipelines/make-sample.sh OUTPUT.mp4
set -euo pipefail
output=${1:?usage: make-sample.sh OUTPUT.mp4}
scenes=(
    "pattern=smpte"
    "pattern=ball"
    "pattern=red"
    "pattern=snow"
    "pattern=solid-color foreground-color=0xff0000ff"
    "pattern=pinwheel"
)
branches=()
for scene in "${scenes[@]}"; do
    read -ra properties <<<"$scene"
    branches+=(videotestsrc num-buffers=90 "${properties[@]}" ! 'video/x-raw,format=I420,width=640,height=360,framerate=30/1' ! all.)
done
gst-launch-1.0 -q concat name=all ! identity single-segment=true ! x264enc speed-preset=veryfast ! mp4mux ! filesink location="$output" "${branches[@]}"
