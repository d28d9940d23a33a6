#!/usr/bin/env bash
# Narrates a video file: prints each caption with its time as it is made, and leaves a Matroska file with the
# captions as a subtitle track.
#   pipelines/narrate-file.sh [FILE or URI] [OUTPUT.mkv]
# Without a file it makes one of test pictures, which is all that the embedded demo model knows. For anything
# else set MODEL to a folder with a SmolVLM checkpoint. INTERVAL is the time between captions in nanoseconds.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh"

input=${1-}
output=${2-narrated.mkv}
if [ -z "$input" ]; then
    input=${TMPDIR:-/tmp}/vlmnarrate-sample.mp4
    "$here/make-sample.sh" "$input"
fi
uri=$(uri_of "$input")

# Sound goes along where there is any: a branch for it without a pad would hold up the muxer for ever.
sound=()
if gst-discoverer-1.0 "$uri" 2>/dev/null | grep -q '^ *audio'; then
    sound=(in. ! queue ! audioconvert ! audioresample ! opusenc ! queue ! mux.)
fi

# Times count from the start of the video, wherever its own timestamps start.
echo "Narrating $input" >&2
gst-launch-1.0 -q \
    uridecodebin uri="$uri" name=in \
    in. ! videoconvert ! identity single-segment=true ! vlmnarrate name=narrator mode=recorded "${options[@]}" ! \
    videoconvert ! x264enc speed-preset=veryfast ! queue ! matroskamux name=mux ! filesink location="$output" \
    narrator.text_src ! tee name=captions ! \
    "${text_queue[@]}" ! mux. \
    captions. ! "${text_queue[@]}" ! webvttenc ! fdsink fd=1 sync=false \
    "${sound[@]}" | (to_stdout)
echo "Wrote $output" >&2
