#!/usr/bin/env bash
# Installs what vlmnarrate needs to be built, tested and run on Debian 12 or later, and nothing that is there
# already. Says what it installs, asks nothing.
#   tools/setup.sh          to build and run
#   tools/setup.sh --tests  also what the tests need
#   tools/setup.sh --also PACKAGE…  also these of Debian
set -euo pipefail

packages=(
    # to build
    ca-certificates curl gcc libc6-dev pkg-config libgstreamer1.0-dev libgstreamer-plugins-base1.0-dev libpango1.0-dev
    # to run pipelines
    gstreamer1.0-tools gstreamer1.0-plugins-base gstreamer1.0-plugins-base-apps gstreamer1.0-plugins-good
    gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly gstreamer1.0-libav gstreamer1.0-x
    # copies streams for the command
    ffmpeg
    # Python applications
    python3-gi python3-gst-1.0 gir1.2-gstreamer-1.0 gir1.2-gst-plugins-base-1.0
)
if [ "${1-}" = --tests ]; then
    packages+=(python3-jsonschema gir1.2-gst-rtsp-server-1.0 mandoc xvfb)
elif [ "${1-}" = --also ]; then
    packages+=("${@:2}")
fi

missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    echo "Installing Debian packages: ${missing[*]}"
    sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get update -qq
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

# Debian 12's own Rust is too old for the GStreamer bindings.
needed=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$(dirname "$0")/../Cargo.toml")
has_rust() {
    command -v cargo >/dev/null &&
        printf '%s\n' "$needed" "$(cargo --version | cut -d' ' -f2)" | sort -VC
}
[ -e "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
if ! has_rust; then
    echo "Installing Rust (stable) with rustup, into ~/.cargo and ~/.rustup"
    if command -v rustup >/dev/null; then
        rustup -q toolchain install stable && rustup -q default stable
    else
        curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y -q --profile default
    fi
fi
[ -e "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
if [ "${1-}" = --tests ] && ! cargo nextest --version >/dev/null 2>&1; then
    echo "Installing cargo-nextest, the test runner"
    cargo install --quiet --locked cargo-nextest
fi
