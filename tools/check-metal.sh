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
# A TLS library has parts in C, and a compiler for Macs is not here. As nothing is linked, empty objects do.
compiler=$(mktemp)
trap 'rm -f "$compiler"' EXIT
cat >"$compiler" <<'END'
#!/bin/sh
while [ $# -gt 0 ]; do
    case $1 in
    -o) : >"$2" ;;
    cq*) printf '!<arch>\n' >"$2" ;;
    esac
    shift
done
END
chmod +x "$compiler"
export CC_aarch64_apple_darwin=$compiler AR_aarch64_apple_darwin=$compiler
cargo clippy --target "$target" --features metal -- -D warnings
