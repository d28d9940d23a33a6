#!/usr/bin/env bash
# Narrates a video file: prints each caption with its time as it is made, and leaves a Matroska or MP4 file with
# the captions as a subtitle track.
#   pipelines/narrate-file.sh [FILE or URI] [OUTPUT.mkv|OUTPUT.mp4]
# Without a file it makes one of test pictures, which is all that the embedded demo model knows. For anything
# else set MODEL to a folder with a SmolVLM checkpoint. INTERVAL is the time between captions in nanoseconds.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
output=${2-narrated.mkv}
# Either way what was written can be played, also after a crash or on a full disk.
case $output in
*.mkv)
    muxer=(matroskamux)
    audio=opusenc
    ;;
*.mp4)
    muxer=(mp4mux fragment-duration=1000 fragment-mode=first-moov-then-finalise)
    audio=avenc_aac
    ;;
*)
    echo "$output: captions can't be a track of such a file; name one that ends in .mkv or .mp4" >&2
    exit 2
    ;;
esac
. "$here/env.sh"

input=${1-}
if [ -z "$input" ]; then
    input=${TMPDIR:-/tmp}/vlmnarrate-sample.mp4
    "$here/make-sample.sh" "$input"
fi
uri=$(uri_of "$input")

# Sound goes along where there is any: a branch for it without a pad would hold up the muxer for ever.
sound=()
if gst-discoverer-1.0 "$uri" 2>/dev/null | grep -q '^ *audio'; then
    sound=(in. ! queue ! audioconvert ! audioresample ! "$audio" ! queue "${unlimited[@]}" ! mux.)
fi

# Times count from the start of the video, wherever its own timestamps start.
echo "Narrating $input" >&2
narrate --text \
    uridecodebin uri="$uri" name=in \
    in. ! videoconvert ! identity single-segment=true ! vlmnarrate name=narrator mode=recorded "${options[@]}" ! \
    videoconvert ! x264enc speed-preset=veryfast ! queue "${unlimited[@]}" ! mux. \
    narrator.text_src ! "${text_queue[@]}" ! mux. \
    "${sound[@]}" "${muxer[@]}" name=mux ! filesink location="$output"
echo "Wrote $output" >&2
