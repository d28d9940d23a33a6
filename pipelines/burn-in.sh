#!/usr/bin/env bash
# Draws captions into a video: prints each as it is made, and leaves a Matroska or MP4 file that any player shows
# them in, since they are part of the picture.
#   pipelines/burn-in.sh FILE OUTPUT.mkv|OUTPUT.mp4
# MODEL and INTERVAL as in narrate-file.sh; FONT is a Pango font description, as in "Serif Bold 24".
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh"
usage="usage: burn-in.sh FILE OUTPUT.mkv|OUTPUT.mp4"
input=${1:?$usage}
output=${2:?$usage}
choose_muxer "$output"
open_input "$input"
find_sound "$audio"
narrate --text \
    uridecodebin uri="$uri" name=in \
    in. ! "${upright[@]}" ! identity single-segment=true ! \
    vlmnarrateoverlay mode=recorded font-desc="${FONT-Sans}" "${options[@]}" ! \
    "${h264[@]}" ! "${unlimited[@]}" ! mux. \
    "${sound[@]}" "${muxer[@]}" ! filesink location="$output"
echo "Wrote $output" >&2
