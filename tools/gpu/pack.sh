#!/usr/bin/env bash
# Builds what run.sh needs on a machine with a GPU, and leaves it in target/gpu/vlmnarrate-gpu.tar.xz: the programs, the
# goldens, and the scripts and configurations for PyTorch. No GPU is needed here.
#
#   tools/gpu/pack.sh
#
# There: tar -xJf vlmnarrate-gpu.tar.xz && vlmnarrate-gpu/tools/gpu/run.sh
# FEATURES names other features than cuda.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -e "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
# The newest C library that may be asked for: that of Ubuntu 24.04.
newest_glibc=2.39
out=target/gpu
work=$out/packing/vlmnarrate-gpu
rm -rf "$out/packing"
mkdir -p "$work/bin"
trap 'rm -rf "$out/packing"' EXIT

# build COMMAND…: prints where the program is.
build() {
    # The engine alone, without the hub.
    tools/cuda/toolkit.sh cargo "$@" -p vlmnarrate-smolvlm --no-run --no-default-features \
        --features "${FEATURES-cuda}" --message-format=json-render-diagnostics | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1
}
for program in gpu parity cuda model; do
    case $program in
    gpu) built=$(build bench --bench gpu) ;;
    *) built=$(build test --release --test $program) ;;
    esac
    strip -o "$work/bin/$program" "$built"
done

# The engine knows no GStreamer, so the programs need only libraries that every machine has.
others=$(ldd "$work"/bin/* | sed -n 's/.* => \([^ ]*\).*/\1/p' | grep -v -E '/(libc|libm|libgcc_s)\.so' || true)
[ -z "$others" ] || { echo "These would be missing on another machine:" $others >&2 && exit 1; }
needed=$(objdump -T "$work"/bin/* | grep -o 'GLIBC_2\.[0-9.]*' | sort -uV | tail -n 1)
printf '%s\n' "${needed#GLIBC_}" $newest_glibc | sort -VC ||
    { echo "The programs need glibc ${needed#GLIBC_}: build where there is $newest_glibc or older" >&2 && exit 1; }

cp --parents tools/gpu/*.{sh,py} tools/peers/*.py tools/reference/*.py "$work"
cp --parents -r tests/data/reference tests/data/gguf/SmolVLM-Small tests/data/hub/SmolVLM-{256M-,500M-,}Instruct "$work"
tar -C "$out/packing" -cf - vlmnarrate-gpu | xz -6 -T0 >"$out/packing/archive"
mv "$out/packing/archive" "$out/vlmnarrate-gpu.tar.xz"
du -h "$out/vlmnarrate-gpu.tar.xz"
