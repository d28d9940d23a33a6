#!/usr/bin/env bash
# Looks for what tests alone don't show:
#
#   tools/sanitize.sh loom      runs models of the mailbox between the element's threads and the worker's in every
#                               order of their threads
#   tools/sanitize.sh thread    runs the mailbox's tests under ThreadSanitizer
#   tools/sanitize.sh address   runs all tests under AddressSanitizer and LeakSanitizer, except those that start a
#                               program, which can't load a plugin built with a sanitizer
#
# Further arguments go to cargo. Stable Rust has the sanitizers but not the flag for them: hence RUSTC_BOOTSTRAP.
# ThreadSanitizer must see the atomics of the standard library, so that is built too (rustup component add rust-src).
set -euo pipefail
cd "$(dirname "$0")/.."
[ -e "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
out=${CARGO_TARGET_DIR:-$PWD/target}/sanitize
target=$(rustc -vV | sed -n 's/^host: //p')
kind=${1:?loom, thread or address}
shift
case $kind in
loom)
    RUSTFLAGS="--cfg loom" cargo test --release -p vlmnarrate-mailbox --lib --target-dir "$out/loom" "$@"
    ;;
thread)
    RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=thread cargo test -Zbuild-std -p vlmnarrate-mailbox --lib \
        --target "$target" --target-dir "$out/thread" "$@"
    ;;
address)
    # A test allocates more than there can be, and expects an error.
    export ASAN_OPTIONS=allocator_may_return_null=1
    # GLib and Pango's libraries never free what they make once. For GStreamer's objects, the leaks tracer of
    # tools/test.sh knows more.
    mkdir -p "$out"
    printf 'leak:%s\n' libglib libgobject libgio libpango libfontconfig libcairo libharfbuzz libfreetype >"$out/leaks"
    export LSAN_OPTIONS=print_suppressions=0:suppressions="$out/leaks"
    RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address cargo nextest run --target "$target" \
        --target-dir "$out/address" --no-fail-fast \
        -E 'not test(/^(programs::|readme::|faults::(processes_share|a_model_for_which|a_model_that_its_control)|hub::(a_full_disk|the_token_is_in))/)' "$@"
    ;;
*)
    echo "$kind: loom, thread or address" >&2
    exit 2
    ;;
esac
