#!/usr/bin/env bash
# Narrates a video file into JSON lines on stdout: one object a caption, with every field of the message as
# caption.schema.json says.
#   pipelines/captions-json.sh FILE >captions.jsonl
# MODEL and INTERVAL as in narrate-file.sh.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh"
open_input "${1:?usage: captions-json.sh FILE}"
narrate --json uridecodebin uri="$uri" ! "${upright[@]}" ! vlmnarrate mode=recorded "${options[@]}" ! fakesink
