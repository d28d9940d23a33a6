#!/usr/bin/env bash
# Checks and times vlmnarrate on this machine's NVIDIA GPU, with what pack.sh has made elsewhere:
#
#   tools/gpu/run.sh [OUT] [--only PART,…] [--models MODEL,…] [--compiled MODEL,…]
#
# In the unpacked archive, or in a checkout with the archive in target/gpu. Needs the driver, and Python with torch and
# transformers, which make the weights and are what vlmnarrate is compared with; PYTHON names another than python3. No
# Rust, no GStreamer, no network. Of 256m, 500m and 2.2b, PyTorch compiles 256m if --compiled names no others, or none.
#
#   parity     every member of the family against the reference's goldens; guesses and callers against captions alone
#   models     weights of full size, random, in MODELS if that is set: what is there already is kept
#   bench      captions in turn with PyTorch's, and of several callers
#   sanitize   memory and races under compute-sanitizer, where there is one
#
# OUT (target/gpu/results) gets gpu.md, gpu.json and gpu.log. A part that fails or takes too long doesn't stop the
# others, but the script then ends with 1. DEVICE=cpu tries the scripts without a GPU.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)

out=$root/target/gpu/results only=parity,models,bench,sanitize chosen=(256m 500m 2.2b) compiled=(256m)
while [ $# -gt 0 ]; do
    case $1 in
    --only) only=$2 && shift 2 ;;
    --models) IFS=, read -ra chosen <<<"$2" && shift 2 ;;
    --compiled) IFS=, read -ra compiled <<<"${2/none/}" && shift 2 ;;
    -*) echo "$1: --only, --models or --compiled" >&2 && exit 2 ;;
    *) out=$1 && shift ;;
    esac
done
for part in ${only//,/ }; do
    case $part in
    parity | models | bench | sanitize) ;;
    *) echo "$part: parity, models, bench or sanitize" >&2 && exit 2 ;;
    esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)

# What was built: beside this script in the archive, or to be unpacked.
built=$root
if [ ! -x "$root/bin/gpu" ]; then
    archive=$root/target/gpu/vlmnarrate-gpu.tar.xz
    [ -e "$archive" ] ||
        { echo "No $archive: make it with tools/gpu/pack.sh where there is Rust, and bring it here" >&2 && exit 1; }
    built=$root/target/gpu/vlmnarrate-gpu
    if [ "$archive" -nt "$built/bin/gpu" ]; then
        rm -rf "$built"
        tar -xJf "$archive" -C "$root/target/gpu" --touch
    fi
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
models=${MODELS:-$work/models} logs=$work/logs python=${PYTHON:-python3} device=${DEVICE:-cuda}
mkdir -p "$models" "$logs"
: >"$out/gpu.log"
rm -f "$out/gpu.md" "$out/gpu.json"
export HF_HUB_OFFLINE=1 TQDM_DISABLE=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export VLMNARRATE_DEVICE=$device VLMNARRATE_TEST_DATA=$built/tests/data
export built models logs

{
    date -u '+%Y-%m-%d %H:%M UTC'
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader 2>/dev/null ||
        echo "No nvidia-smi: is there a driver?"
    "$python" -c 'import torch, transformers as t; print("torch", torch.__version__, "transformers", t.__version__)' ||
        echo "No torch and transformers in $python: neither weights nor peers"
} 2>&1 | tee -a "$out/gpu.log" | grep -v '^ \|^Traceback'

# part NAME LINES SECONDS COMMAND…: shows the last lines of what it says.
rows=() failed=0
part() {
    local name=$1 lines=$2 limit=$3 start=$SECONDS status=0 said log=$logs/$1.log
    shift 3
    case ,$only, in *,"$name",*) ;; *) return 0 ;; esac
    timeout -k 10 "$limit" "$@" >"$log" 2>&1 || status=$?
    case $status in
    0) said=passed ;;
    77) said="left out" ;;
    124 | 137) said="stopped after $limit s" failed=1 ;;
    *) said=failed failed=1 && [ "$lines" -gt 20 ] || lines=20 ;;
    esac
    echo "== $name: $said, $((SECONDS - start)) s"
    tail -n "$lines" "$log"
    rows+=("| $name | $said | $((SECONDS - start)) |")
    for log in "$logs"/*; do
        [ -s "$log" ] || continue
        echo "== ${log##*/}"
        cat "$log"
    done >>"$out/gpu.log"
    rm -f "$logs"/*
}

parity() {
    "$built/bin/parity" --nocapture --test-threads=4 && "$built/bin/cuda" --test-threads=1 &&
        "$built/bin/model" --test-threads=1
}

sanitize() {
    local sanitizer tool pid running=() status=0
    local small=$built/tests/data/reference/smolvlm-256m full=$models/256m/checkpoint
    sanitizer=$(command -v compute-sanitizer) || sanitizer=/usr/local/cuda/bin/compute-sanitizer
    [ -x "$sanitizer" ] || { echo "No compute-sanitizer: it comes with NVIDIA's toolkit" && exit 77; }
    # check NAME TOOL PROGRAM…: all at once, for nobody looks at the clock.
    check() {
        local name=$1 tool=$2 log=$logs/sanitize-$1-$2.log
        shift 2
        local command=("$sanitizer" --tool "$tool" --error-exitcode 1 "$@")
        "${command[@]}" >"$log" 2>&1 <<<$'\n' ||
            { echo "$tool, $name: failed: $(grep SUMMARY "$log" | tail -n 1)" && return 1; }
        echo "$tool, $name: $(grep SUMMARY "$log" | tail -n 1)"
    }
    for tool in memcheck racecheck synccheck; do
        check small $tool "$built/bin/gpu" "$small" 192 bf16 slow 4 & running+=($!)
        [ ! -e "$full" ] || { check full $tool "$built/bin/gpu" "$full" 256 bf16 slow 4 & running+=($!); }
    done
    check parity memcheck "$built/bin/parity" smolvlm_256m::bf16 --test-threads=1 & running+=($!)
    for pid in "${running[@]}"; do
        wait "$pid" || status=1
    done
    return $status
}

export -f parity sanitize

part parity 3 90 bash -c parity
part models 5 90 "$python" "$root/tools/gpu/weights.py" "$models" "${chosen[@]}" --device "$device"
part bench 20 270 "$python" "$root/tools/gpu/bench.py" "$models" "$out" --gpu "$built/bin/gpu" --logs "$logs" \
    --device "$device" --models "${chosen[@]}" --compiled "${compiled[@]}"
part sanitize 8 90 bash -c sanitize

{
    [ ! -e "$out/gpu.md" ] || { cat "$out/gpu.md" && echo; }
    echo "| part | | s |"
    echo "|---|---|---|"
    printf '%s\n' "${rows[@]}"
} >"$work/gpu.md"
mv "$work/gpu.md" "$out/gpu.md"
echo
cat "$out/gpu.md"
exit $failed
