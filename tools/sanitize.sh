#!/usr/bin/env bash
# Looks for what tests alone don't show:
#
#   tools/sanitize.sh loom      runs models of the mailbox between the element's threads and the worker's in every
#                               order of their threads
#   tools/sanitize.sh thread    runs its tests under ThreadSanitizer
#   tools/sanitize.sh address   runs all tests under AddressSanitizer and LeakSanitizer, but for those that start a
#                               program: it can't load a plugin that was built so
#
# What comes behind goes to cargo. The sanitizers come with stable Rust, the switch for them does not: hence
# RUSTC_BOOTSTRAP. ThreadSanitizer must see the atomics of the standard library, which is built too (rustup component
# add rust-src).
set -euo pipefail
cd "$(dirname "$0")/.."
[ -e "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
out=${CARGO_TARGET_DIR:-$PWD/target}/sanitize
target=$(rustc -vV | sed -n 's/^host: //p')
kind=${1:?loom, thread or address}
shift
case $kind in
loom)
    RUSTFLAGS="--cfg loom" cargo test --release --lib --target-dir "$out/loom" \
        --manifest-path tools/loom/Cargo.toml "$@"
    ;;
thread)
    RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=thread cargo test -Zbuild-std --lib --target "$target" \
        --target-dir "$out/thread" --manifest-path tools/loom/Cargo.toml "$@"
    ;;
address)
    # A test asks for more than there can be and wants to be told so.
    export ASAN_OPTIONS=allocator_may_return_null=1
    # GLib and what Pango builds on keep for ever what they make once; the leaks tracer of tools/test.sh knows more of
    # GStreamer's objects.
    mkdir -p "$out"
    printf 'leak:%s\n' libglib libgobject libgio libpango libfontconfig libcairo libharfbuzz libfreetype >"$out/leaks"
    export LSAN_OPTIONS=print_suppressions=0:suppressions="$out/leaks"
    RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address cargo nextest run --target "$target" \
        --target-dir "$out/address" --no-fail-fast \
        -E 'not (binary(programs) or binary(readme) or test(/^(processes_share_a_folder|a_model_for_which_there|a_full_disk_and_what)/))' "$@"
    ;;
*)
    echo "$kind: loom, thread or address" >&2
    exit 2
    ;;
esac
