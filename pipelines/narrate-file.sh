#!/usr/bin/env bash
# Narrates a video file: prints each caption with its time as it is made, and leaves a Matroska or MP4 file with
# the captions as a subtitle track.
#   pipelines/narrate-file.sh [FILE or URI] [OUTPUT.mkv|OUTPUT.mp4]
# Without a file it makes one of test pictures, which is all that the embedded demo model knows. For anything
# else set MODEL to a SmolVLM checkpoint, an id on the Hugging Face hub or a folder. INTERVAL is the time between
# captions in nanoseconds.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh"
output=${2-narrated.mkv}
choose_muxer "$output"

input=${1-}
if [ -z "$input" ]; then
    input=${TMPDIR:-/tmp}/vlmnarrate-sample.mp4
    "$here/make-sample.sh" "$input"
fi
open_input "$input"
find_sound "$audio"

# Times count from the start of the video, wherever its own timestamps start.
echo "Narrating $input" >&2
narrate --text \
    uridecodebin uri="$uri" name=in \
    in. ! "${upright[@]}" ! identity single-segment=true ! \
    vlmnarrate name=narrator mode=recorded merge-captions=true "${options[@]}" ! \
    "${h264[@]}" ! "${unlimited[@]}" ! mux. \
    narrator.text_src ! "${unlimited[@]}" ! mux. \
    "${sound[@]}" "${muxer[@]}" ! filesink location="$output"
echo "Wrote $output" >&2
