#!/usr/bin/env bash
# Narrates a video file: the command vlmnarrate, with what it needs installed and built.
#   pipelines/narrate-file.sh [ARGUMENTS OF VLMNARRATE]
# Without arguments it makes a video of test pictures, which is all that the embedded demo model knows, and narrates
# it into narrated.mkv.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh"
if [ $# = 0 ]; then
    sample=${TMPDIR:-/tmp}/vlmnarrate-sample.mp4
    "$here/make-sample.sh" "$sample"
    set -- "$sample" --output narrated.mkv --force
fi
exec vlmnarrate "$@"
