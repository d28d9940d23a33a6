#!/usr/bin/env bash
# Times a caption of one frame in vlmnarrate and in what a user could take instead, in turn, on this machine:
#
#   tools/peers/compare.sh [--model 256m|500m] [--side 512] [--rounds 5] [--engines NAME …]
#
# The first run installs the others and makes a model of full size with random weights, in all their forms: that takes
# half an hour and 10 GB below target/. Needs python3-venv, a C++ compiler and the way to PyPI.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -e "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
out=${CARGO_TARGET_DIR:-$PWD/target}/peers
python=$out/venv/bin/python
if [ ! -e "$out/installed" ]; then
    mkdir -p "$out"
    python3 -m venv "$out/venv"
    "$python" -m pip install --quiet -r tools/peers/requirements.txt
    # With its source come the programs that convert a model.
    "$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$out" llama-cpp-python==0.3.36
    tar -xf "$out"/llama_cpp_python-*.tar.gz -C "$out"
    CMAKE_ARGS=-DGGML_NATIVE=ON "$python" -m pip install --quiet "$out"/llama_cpp_python-*.tar.gz
    touch "$out/installed"
fi
model=256m
for argument in "$@"; do
    case $argument in 256m | 500m) model=$argument ;; esac
done
llama=$(echo "$out"/llama_cpp_python-*/vendor/llama.cpp)
"$python" tools/peers/prepare.py "$out" --model "$model" --llama "$llama" 2>"$out/prepare.log" ||
    { tail -20 "$out/prepare.log" >&2 && exit 1; }
cargo bench --quiet --no-run --bench caption
"$python" tools/peers/compare.py "$out" "$@"
