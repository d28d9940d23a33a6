#!/usr/bin/env bash
# Looks for what tests alone don't show, in the mailbox between the element's threads and the worker's:
#
#   tools/sanitize.sh loom      runs models of it in every order of their threads
#   tools/sanitize.sh thread    runs its tests under ThreadSanitizer
#
# ThreadSanitizer comes with stable Rust, the switch for it does not: hence RUSTC_BOOTSTRAP. It must see the
# atomics of the standard library, which is built too (rustup component add rust-src).
set -euo pipefail
cd "$(dirname "$0")/.."
[ -e "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
out=${CARGO_TARGET_DIR:-$PWD/target}/sanitize
kind=${1:?loom or thread}
shift
case $kind in
loom)
    RUSTFLAGS="--cfg loom" cargo test --release --lib --target-dir "$out/loom" \
        --manifest-path tools/loom/Cargo.toml "$@"
    ;;
thread)
    target=$(rustc -vV | sed -n 's/^host: //p')
    RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=thread cargo test -Zbuild-std --lib --target "$target" \
        --target-dir "$out/thread" --manifest-path tools/loom/Cargo.toml "$@"
    ;;
*)
    echo "$kind: loom or thread" >&2
    exit 2
    ;;
esac
