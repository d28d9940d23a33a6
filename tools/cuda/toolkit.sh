#!/usr/bin/env bash
# NVIDIA's compiler for `--features cuda`, without its toolkit, root or a GPU: the parts of it that are on PyPI, in one
# folder below target/.
#
#   tools/cuda/toolkit.sh                                         installs it and prints NVCC=…, once for all
#   tools/cuda/toolkit.sh cargo build --release --features cuda   installs it and runs a command with it
#
# 110 MB to download, 260 MB unpacked. Needs python3 with pip or venv, and g++, through which nvcc reads its sources.
set -euo pipefail
# What this one makes, every driver from 580 on can run.
version='13.0.*'
out=${CARGO_TARGET_DIR:-$(cd "$(dirname "$0")/../.." && pwd)/target}
mkdir -p "$out"
out=$(cd "$out" && pwd)/cuda-toolkit

fail() {
    echo "$1" >&2
    exit 1
}

command -v g++ >/dev/null || fail "No g++, which nvcc needs: apt-get install g++"
if [ ! -e "$out/bin/nvcc" ]; then
    command -v python3 >/dev/null || fail "No python3, which installs nvcc: apt-get install python3-venv"
    echo "Installing nvcc $version of NVIDIA's packages on PyPI into $out" >&2
    work=$(mktemp -d "$out.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    pip=(python3 -m pip)
    if ! "${pip[@]}" --version >/dev/null 2>&1; then
        python3 -m venv "$work/venv" >&2 || fail "Neither pip nor venv in python3: apt-get install python3-venv"
        pip=("$work/venv/bin/python" -m pip)
    fi
    packages=()
    for part in cuda-nvcc cuda-crt cuda-runtime cuda-cccl nvvm; do
        packages+=("nvidia-$part==$version")
    done
    PIP_ROOT_USER_ACTION=ignore "${pip[@]}" install --quiet --disable-pip-version-check --no-deps --no-compile \
        --only-binary :all: --target "$work" "${packages[@]}" >&2
    # As a whole or not at all, also where two do it at once.
    mv -T "$work/nvidia/cu13" "$out" 2>/dev/null || [ -e "$out/bin/nvcc" ]
fi
if [ $# = 0 ]; then
    echo "NVCC=$out/bin/nvcc"
else
    # No exec: what is above tidies up first.
    NVCC=$out/bin/nvcc "$@"
fi
