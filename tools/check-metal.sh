#!/usr/bin/env bash
# Type-checks and lints the build for Macs with Metal, which is all that can be done without a Mac: nothing is linked
# or run. On a machine that tools/setup.sh has set up.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -e "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"

target=aarch64-apple-darwin
rustup target list --installed | grep -qx "$target" || rustup -q target add "$target"

# GStreamer's build scripts look for it here: what is not linked may be of another platform.
export PKG_CONFIG_ALLOW_CROSS=1
# Without the hub: its TLS library is in C, and a compiler for Macs is not here.
build=(--target "$target" --no-default-features --features metal,overlay)
cargo clippy "${build[@]}" -- -D warnings
