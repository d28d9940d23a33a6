#!/usr/bin/env bash
# Runs every test: unit and integration tests with hang timeouts, then the documentation's examples.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh --tests
[ -e "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"

# A GLib or GStreamer warning is a bug of ours.
export G_DEBUG=fatal-warnings
# A test that leaves one of these behind fails as it ends.
export GST_TRACERS='leaks(filters="GstElement,GstPad,GstBus,GstBuffer,GstMemory,GstEvent,GstMessage,GstQuery")'
cargo nextest run --no-fail-fast "$@"
cargo test --quiet --doc
