#!/usr/bin/env bash
# Narrates a live source: the webcam, or a moving test picture where there is none. Captions are drawn on the
# picture word by word if there is a screen, and printed when they are whole. Ctrl-C ends it.
#   pipelines/live.sh [DEVICE]
# MODEL and INTERVAL as in narrate-file.sh; FRAMES ends it after so many frames.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh"

open_camera "${1-}"
if [ -n "${DISPLAY-}${WAYLAND_DISPLAY-}" ]; then
    sink=(autovideosink)
else
    sink=(fakesink sync=true)
fi
narrate --text \
    "${source[@]}" ! videoconvert ! vlmnarrateoverlay mode=live partial-captions=true "${options[@]}" ! \
    videoconvert ! "${sink[@]}"
