#!/usr/bin/env bash
# Narrates a live source: the webcam, or a moving test picture where there is none. Captions are drawn on the
# picture if there is a screen, and printed as they come. Ctrl-C ends it.
#   pipelines/live.sh [DEVICE]
# MODEL and INTERVAL as in narrate-file.sh; FRAMES ends it after so many frames.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh"

device=${1:-/dev/video0}
if [ -e "$device" ]; then
    source=(v4l2src device="$device" num-buffers="${FRAMES:--1}")
else
    echo "No camera at $device, showing a test picture" >&2
    source=(videotestsrc is-live=true pattern=ball num-buffers="${FRAMES:--1}" ! video/x-raw,width=640,height=360,framerate=30/1)
fi
if [ -n "${DISPLAY-}${WAYLAND_DISPLAY-}" ]; then
    sink=(autovideosink)
else
    sink=(fakesink sync=true)
fi
gst-launch-1.0 -q -e \
    "${source[@]}" ! videoconvert ! vlmnarrate name=narrator mode=live "${options[@]}" ! \
    textoverlay name=overlay wait-text=false shaded-background=true ! videoconvert ! "${sink[@]}" \
    narrator.text_src ! tee name=captions ! "${text_queue[@]}" ! overlay.text_sink \
    captions. ! "${text_queue[@]}" ! webvttenc ! fdsink fd=1 sync=false | (to_stdout)
