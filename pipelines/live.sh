#!/usr/bin/env bash
# Draws captions on a moving test picture, word by word, in a window if there is a screen. Ctrl-C ends it; FRAMES ends
# it after so many frames. For a camera write v4l2src instead of videotestsrc, or use: vlmnarrate live
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh"
[ -n "${DISPLAY-}${WAYLAND_DISPLAY-}" ] && sink=autovideosink || sink="fakesink sync=true"
gst-launch-1.0 -m videotestsrc is-live=true pattern=ball num-buffers="${FRAMES:--1}" ! video/x-raw,width=640,height=360,framerate=30/1 \
    ! vlmnarrateoverlay partial-captions=true ! videoconvert ! $sink
