#!/usr/bin/env bash
# Narrates a live source on a web page: the webcam, or a moving test picture where there is none. Captions appear
# word by word beside the video. Ctrl-C ends it.
#   pipelines/web-live.sh [DEVICE]
# The page is http://127.0.0.1:8080/, for this machine only; PORT chooses another port, HOST another address to
# listen on: HOST=0.0.0.0 shows the camera to everyone on the network. MODEL and INTERVAL as in narrate-file.sh;
# FRAMES ends it after so many frames.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh"

open_camera "${1-}"
# The video waits for nobody: frames that the encoder has no time for are dropped, and a browser that is too slow
# goes on at the next key frame.
exec /usr/bin/python3 "$here/web-live.py" "$here/web/live.html" \
    "${source[@]}" ! videoconvert ! vlmnarrate mode=live partial-captions=true "${options[@]}" ! \
    queue leaky=downstream max-size-buffers=0 max-size-bytes=0 max-size-time=500000000 ! videoconvert ! video/x-raw,format=I420 ! \
    vp8enc deadline=1 cpu-used=8 threads=2 lag-in-frames=0 keyframe-max-dist=30 end-usage=cbr target-bitrate=2000000 ! \
    webmmux streamable=true ! \
    multifdsink name=clients sync=false sync-method=latest-keyframe recover-policy=keyframe \
    unit-format=time units-soft-max=3000000000 units-max=10000000000 timeout=30000000000
