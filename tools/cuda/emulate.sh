#!/usr/bin/env bash
# Runs a command with a CUDA driver that runs the kernels on the CPU, to test without a GPU:
#
#   tools/cuda/emulate.sh                   builds it: libcuda.so.1 in target/cuda-emulator
#   tools/cuda/emulate.sh cargo test …      builds it and runs a command with it
#   tools/cuda/emulate.sh --selftest        builds it and tests itself
#
# KERNELS names other kernels than crates/cuda/kernels/kernels.cu, SANITIZE=undefined builds it with GCC's checks. In the
# command's environment:
#
#   VLMNARRATE_EMULATED_DEVICES=n        how many GPUs there are (1)
#   VLMNARRATE_EMULATED_MEMORY=bytes     of each (4 GiB)
#   VLMNARRATE_EMULATED_DRIVER=version   as cuDriverGetVersion has it (13000)
#   VLMNARRATE_EMULATED_LOAD_ERROR=code  with which modules fail to load
#   VLMNARRATE_EMULATED_FAIL_LAUNCH=n    from the nth kernel on, those of graphs among them, all fails with 700
#   VLMNARRATE_EMULATED_ORDER=reversed   runs threads and blocks from the last to the first, which finds other barriers
#                                        missing
set -euo pipefail
repository=$(cd "$(dirname "$0")/../.." && pwd)
emulator=$repository/crates/cuda/emulator
out=${CARGO_TARGET_DIR:-$repository/target}/cuda-emulator
kernels=${KERNELS:-$repository/crates/cuda/kernels/kernels.cu}
command -v g++ >/dev/null || "$repository/tools/setup.sh" --also g++

flags=(-std=c++20 -O2 -g1 -march=native -fno-strict-aliasing -fPIC -fvisibility=hidden -Wall -Wno-unknown-pragmas -I "$emulator")
[ -z "${SANITIZE-}" ] || flags+=("-fsanitize=$SANITIZE")
mkdir -p "$out"
out=$(cd "$out" && pwd)
# One at a time: tests may start many.
exec 9>"$out/lock"
flock 9
[ "$(cat "$out/flags" 2>/dev/null)" = "${flags[*]}" ] || rm -f "$out"/*.o
echo "${flags[*]}" >"$out/flags"

# Compiles a source to an object, if it or what it includes is newer.
compile() {
    local source=$1 object=$2
    if [ -e "$object" ] && [ "$(cat "$object.source")" = "$source" ] &&
        [ -z "$(find "$emulator" "$(dirname "$source")" -newer "$object" -print -quit)" ]; then
        return
    fi
    g++ "${flags[@]}" -c -o "$object.new" -x c++ "$source"
    echo "$source" >"$object.source"
    mv "$object.new" "$object"
}

objects=()
for source in "$emulator"/*.cpp; do
    object=$out/$(basename "$source" .cpp).o
    compile "$source" "$object"
    objects+=("$object")
done
if [ "${1-}" = --selftest ]; then
    compile "$emulator/selftest.cu" "$out/selftest.o"
    g++ "${flags[@]}" -o "$out/selftest" "${objects[@]}" "$out/selftest.o"
    exec "$out/selftest"
fi

compile "$kernels" "$out/kernels.o"
library=$out/libcuda.so.1
if [ ! -e "$library" ] || [ -n "$(find "$out" -name '*.o' -newer "$library" -print -quit)" ]; then
    g++ "${flags[@]}" -shared -Wl,-soname,libcuda.so.1 -o "$library.new" "${objects[@]}" "$out/kernels.o"
    mv "$library.new" "$library"
    # What is asked for first.
    ln -sf libcuda.so.1 "$out/libcuda.so"
fi
exec 9>&-
[ $# = 0 ] || LD_LIBRARY_PATH=$out${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} exec "$@"
