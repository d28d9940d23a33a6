#!/usr/bin/env bash
# Runs all tests on Debian 13, whose GStreamer is 1.26: in a chroot that the first run makes below target/debian13, with
# this machine's Rust and what cargo has fetched. Takes 8 GB there. Needs root.
#
#   tools/debian13.sh           all tests
#   tools/debian13.sh FILTER…   what goes to cargo nextest run
#   tools/debian13.sh --run COMMAND…  a program of this repository, or of Debian's
#
# `--mirror URL` before any of these names a mirror of Debian other than the one that this machine's apt uses.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || {
    echo "$0: a chroot takes root: run it with sudo" >&2
    exit 2
}
# What is mounted from here on is seen by this process and its children alone, and gone with the last of them.
[ "${MOUNTS_ARE_PRIVATE-}" ] || MOUNTS_ARE_PRIVATE=1 exec unshare --mount "$0" "$@"

mirror=
[ "${1-}" != --mirror ] || { mirror=$2 && shift 2; }
command=(tools/test.sh)
[ "${1-}" != --run ] || { command=() && shift; }

tools/setup.sh --tests
tools/setup.sh --also debootstrap
[ -e "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
cargo fetch --quiet --locked

base=$(realpath -m "${CARGO_TARGET_DIR:-target}")/debian13
root=$base/root
if [ ! -e "$root" ]; then
    of_debian=('Created-By: Packages' 'Origin: Debian' 'Label: Debian')
    [ "$mirror" ] || mirror=$(apt-get indextargets --format '$(SITE)' "${of_debian[@]}" | sed -n 1p)
    [ "$mirror" ] || {
        echo "$0: apt on this machine has no mirror of Debian to take Debian 13 from: name one with --mirror" >&2
        exit 1
    }
    echo "Making Debian 13 in $root" >&2
    mkdir -p "$base"
    rm -rf "$root.part"
    debootstrap --variant=minbase trixie "$root.part" "$mirror" >"$base/debootstrap.log" || {
        tail -n 3 "$base/debootstrap.log" >&2
        exit 1
    }
    # How this machine reaches its mirror is how the chroot does.
    apt-config dump | grep -E '^Acquire::https?::' >"$root.part/etc/apt/apt.conf.d/90acquire" || true
    echo 'APT::Keep-Downloaded-Packages "false";' >"$root.part/etc/apt/apt.conf.d/90no-archives"
    mv "$root.part" "$root"
fi

mount_in() {
    mkdir -p "$root/${*: -1}"
    mount "${@:1:$#-1}" "$root/${*: -1}"
}
mount_in -t proc proc proc
mount_in --rbind /sys sys
mount_in --rbind /dev dev
mount_in --bind "$PWD" "$PWD"
mount_in --bind -o ro "$(rustc --print sysroot)" opt/rust
cargo=$(realpath "${CARGO_HOME:-$HOME/.cargo}")
mount_in --bind -o ro "$cargo/registry" "$cargo/registry"
mkdir -p "$base/target"
mount_in --bind "$base/target" opt/target
cp --remove-destination /etc/resolv.conf "$root/etc/"
cp --remove-destination "$(command -v cargo-nextest)" "$root/usr/local/bin/"

# Of this machine's variables, those that say how to build and test.
kept=()
while IFS= read -r -d '' variable; do
    [[ $variable =~ ^(CARGO_PROFILE|NEXTEST|VLMNARRATE|GST_DEBUG|TORTURE) ]] && kept+=("$variable")
done < <(env --null)
run() {
    env --ignore-environment "${kept[@]}" HOME=/root TERM="${TERM:-dumb}" LANG=C.UTF-8 RUST_BACKTRACE=1 \
        PATH="/opt/rust/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" \
        CARGO_HOME="$cargo" CARGO_NET_OFFLINE=true CARGO_TARGET_DIR=/opt/target \
        chroot "$root" sh -c 'cd "$1" && shift && exec "$@"' sh "$PWD" "$@"
}
run tools/setup.sh --tests
run "${command[@]}" "$@"
