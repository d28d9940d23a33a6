# Sourced by the scripts beside it: installs and builds what is missing, and makes GStreamer find the plugin and the
# shell the command.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/tools/setup.sh" >&2
[ -e "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
# The first build takes some minutes; later ones are no work.
cargo build --release --manifest-path "$root/Cargo.toml" >&2
built=${CARGO_TARGET_DIR:-$root/target}/release
export GST_PLUGIN_PATH="$built${GST_PLUGIN_PATH:+:$GST_PLUGIN_PATH}"
export PATH="$built:$PATH"

# Encoded video waits for its text for as long as a cue lasts, text for as long as an encoder looks ahead.
unlimited="queue max-size-buffers=0 max-size-bytes=0 max-size-time=0"

# Prints a file's URI. A name may hold what a URI may not.
uri_of() {
    [ -r "$1" ] || { echo "$1: no such file, or it can't be read" >&2; exit 1; }
    /usr/bin/python3 -c 'import pathlib, sys; print(pathlib.Path(sys.argv[1]).resolve().as_uri(), end="")' "$1"
}

# A line writes into its output at once, and would empty its input: only new files.
new_file() {
    [ ! -e "$1" ] || { echo "$1 exists: name a new file" >&2; exit 1; }
}
