#!/usr/bin/env bash
# Runs the kernels' tests on a processor that this machine need not have:
#
#   tools/emulate.sh aarch64    Neon, with and without its dot products, in QEMU
#   tools/emulate.sh avx512     AVX-512 with VNNI, in Bochs: QEMU knows neither. It boots a kernel whose first process is
#                               the tests, in about a minute
#
# Installs what it needs from Debian. BOCHS and CPU name another emulator and its processor: Bochs 3.0's
# sapphire_rapids has AVX-VNNI too. Ends with 125 if there is no compiler or emulator, and no test has failed.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${CARGO_TARGET_DIR:-$PWD/target}/emulate
kind=${1:?aarch64 or avx512}

# Builds for a target, and prints where the tests are.
build() {
    cargo test --quiet --release --lib --no-run --message-format=json --target "$1" --target-dir "$out" \
        -p vlmnarrate-kernels |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p'
}

case $kind in
aarch64)
    packages=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)
    ;;
avx512)
    packages=(bochs bochs-term bochsbios busybox-static cpio isolinux syslinux-common vgabios xorriso)
    ;;
*)
    echo "$kind: aarch64 or avx512" >&2
    exit 2
    ;;
esac
tools/setup.sh --also "${packages[@]}"
[ -e "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"

if [ "$kind" = aarch64 ]; then
    target=aarch64-unknown-linux-gnu
    [ -e "$(rustc --print target-libdir --target $target)" ] || rustup -q target add $target || exit 125
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    tests=$(build $target)
    exec qemu-aarch64 -L /usr/aarch64-linux-gnu "$tests"
fi

tests=$(RUSTFLAGS="-C target-feature=+crt-static" build x86_64-unknown-linux-gnu)
work=$(mktemp -d)
trap 'kill -9 "$(cat "$work/pid" 2>/dev/null)" 2>/dev/null || true; rm -rf "$work"' EXIT

# A kernel, unpacked and not installed.
if [ ! -e "$out/vmlinuz" ]; then
    package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -1)
    (cd "$work" && apt-get download -qq "$package" && dpkg-deb -x "$package"*.deb kernel) 2>/dev/null ||
        { echo "No kernel: apt-get download $package" >&2 && exit 125; }
    cp "$work"/kernel/boot/vmlinuz-* "$out/vmlinuz"
fi

# Its first process, which runs the tests and says how they ended.
mkdir -p "$work"/root/{bin,dev,proc,sys,tmp} "$work/iso/isolinux"
cp /bin/busybox "$work/root/bin/"
strip -o "$work/root/tests" "$tests"
cat >"$work/root/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
stty -F /dev/ttyS1 115200 raw -echo
if grep -q avx512_vnni /proc/cpuinfo; then /tests --test-threads=1; else false; fi >/dev/ttyS1 2>&1
echo "The tests ended with $?." >/dev/ttyS1
poweroff -f
INIT
chmod +x "$work/root/init"
(cd "$work/root" && find . | cpio -o -H newc --quiet) >"$work/iso/initrd"
cp "$out/vmlinuz" "$work/iso/"
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$work/iso/isolinux/"
# Without FSRM (580), XSAVEC (321), XSAVES (323) and PKU (515): of the first Bochs has half, about the others it and the
# kernel disagree, which then does without AVX.
cat >"$work/iso/isolinux/isolinux.cfg" <<'CONFIG'
DEFAULT tests
LABEL tests
  KERNEL /vmlinuz
  INITRD /initrd
  APPEND console=ttyS0 nokaslr clearcpuid=580,321,323,515 mitigations=off nopti random.trust_cpu=on panic=-1 rdinit=/init
CONFIG
xorriso -report_about WARNING -as mkisofs -quiet -R -o "$work/boot.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat \
    -no-emul-boot -boot-load-size 4 -boot-info-table "$work/iso"

cpu=${CPU:-tigerlake}
# Of the newest, what the kernel trips over.
[ "$cpu" != sapphire_rapids ] || cpu+=', exclude_features="amx amx_int8 amx_bf16 pku pks xsavec xsaves cet uintr la57"'
bochs=${BOCHS:-/usr/bin/bochs-bin}
# Debian's starts in its debugger, and draws on a terminal.
display=${BOCHS:+nogui}
cat >"$work/bochsrc" <<CONFIG
config_interface: textconfig
display_library: ${display:-term}
cpu: model=$cpu, ips=20000000, reset_on_triple_fault=0, ignore_bad_msrs=1
memory: guest=1024, host=1024
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
pci: enabled=1, chipset=i440fx
ata0-master: type=cdrom, path=$work/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$work/console
com2: enabled=1, mode=file, dev=$work/said
clock: sync=none, time0=utc
log: $work/log
panic: action=fatal
CONFIG
touch "$work/said"
echo c >"$work/go"
[ -n "$display" ] || bochs+=" -rc $work/go"
export TERM=xterm
script -qfec "echo \$\$ >$work/pid; exec $bochs -q -f $work/bochsrc" /dev/null </dev/null >/dev/null 2>&1 &
emulator=$!
for _ in $(seq 600); do
    sleep 1
    ! grep -q '^The tests ended' "$work/said" || break
    kill -0 $emulator 2>/dev/null || break
done
cat "$work/said"
status=$(sed -n 's/^The tests ended with \([0-9]*\)\..*/\1/p' "$work/said")
if [ -z "$status" ]; then
    tail -n 5 "$work/console" "$work/log" >&2 || true
    echo "The emulator failed" >&2
fi
exit "${status:-125}"
