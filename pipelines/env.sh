# Sourced by the scripts beside it: installs and builds what is missing, and makes GStreamer find the plugin.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/tools/setup.sh" >&2
[ -e "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
# The first build takes some minutes; later ones are no work.
cargo build --release --manifest-path "$root/Cargo.toml" >&2
export GST_PLUGIN_PATH="${CARGO_TARGET_DIR:-$root/target}/release${GST_PLUGIN_PATH:+:$GST_PLUGIN_PATH}"

# What every script lets one choose by environment.
options=(interval="${INTERVAL:-1000000000}")
if [ -n "${MODEL-}" ]; then
    options+=(model="$MODEL")
fi

# Encoded video waits for its text for as long as a cue lasts, text for as long as an encoder looks ahead.
unlimited=(queue max-size-buffers=0 max-size-bytes=0 max-size-time=0)
# Phones lie on their side and say so. What is seen must be upright for the model.
upright=(videoconvert ! videoflip video-direction=auto)
# x264enc can't do odd sizes.
h264=(videoconvert ! videoscale ! 'video/x-raw,width=[2,16384,2],height=[2,16384,2]' ! x264enc speed-preset=veryfast)

# Runs a pipeline, written as for gst-launch-1.0, and shows how far it has come.
narrate() {
    /usr/bin/python3 "$root/pipelines/narrate.py" "$@"
}

# Sets `muxer`, and `audio` to an encoder for it, as the output's name says. Whatever happens, a crash or a full
# disk, what was written until then can be played.
choose_muxer() {
    case $1 in
    *.mkv)
        muxer=(matroskamux name=mux)
        audio=opusenc
        ;;
    *.mp4)
        muxer=(mp4mux name=mux fragment-duration=1000 fragment-mode=first-moov-then-finalise)
        audio=avenc_aac
        ;;
    *)
        echo "$1: name a file that ends in .mkv or .mp4; others can't have captions as a track" >&2
        exit 2
        ;;
    esac
}

# Looks into a file or URI: sets `uri`, and `contents` to what is in it, which must be video among other things.
open_input() {
    uri=$(uri_of "$1")
    contents=$(gst-discoverer-1.0 "$uri" 2>/dev/null || true)
    if ! grep -q '^ *video' <<<"$contents"; then
        echo "$1: there is no video in it that GStreamer can read" >&2
        exit 1
    fi
}

# Sets `sound` to a branch from the element `in` to `mux` through this encoder if there is any sound: a branch for
# it without a pad would hold up the muxer for ever.
find_sound() {
    sound=()
    if grep -q '^ *audio' <<<"$contents"; then
        sound=(in. ! queue ! audioconvert ! audioresample ! "$@" ! "${unlimited[@]}" ! mux.)
    fi
}

# Sets `source` to a camera, or to a moving test picture where there is none.
open_camera() {
    local device=${1:-/dev/video0} frames=num-buffers=${FRAMES:--1}
    if [ -e "$device" ]; then
        source=(v4l2src device="$device" "$frames")
    else
        echo "No camera at $device, showing a test picture" >&2
        source=(videotestsrc is-live=true pattern=ball "$frames" ! 'video/x-raw,width=640,height=360,framerate=30/1')
    fi
}

# Prints the URI of a file, or passes a URI through.
uri_of() {
    case $1 in
    *://*) printf '%s' "$1" ;;
    *)
        [ -r "$1" ] || { echo "$1: no such file, or it can't be read" >&2; exit 1; }
        gst_file_uri "$1"
        ;;
    esac
}

# Percent-encodes what a file name may hold and a URI may not.
gst_file_uri() {
    /usr/bin/python3 -c 'import pathlib, sys; print(pathlib.Path(sys.argv[1]).resolve().as_uri(), end="")' "$1"
}
