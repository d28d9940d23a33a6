#!/usr/bin/env bash
# Narrates a video file into one HTML page to look at: a small picture of each frame that was described, its time
# and its caption, with a field to search them. Needs nothing but the file and a browser.
#   pipelines/report.sh FILE OUTPUT.html
# MODEL and INTERVAL as in narrate-file.sh.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh"
usage="usage: report.sh FILE OUTPUT.html"
uri=$(uri_of "${1:?$usage}")
echo "Narrating $1" >&2
/usr/bin/python3 "$here/report.py" "$uri" "${2:?$usage}" "${options[@]}"
