#!/bin/sh
# Builds both programs, as they are given to users: target/release/cachec is one static file, which runs on any Linux.
set -eu
cd "$(dirname "$0")/.."
sh bench/prepare.sh
cargo build --release --locked --package cachec-server
exec cargo rustc --release --locked --package cachec --bin cachec -- -C target-feature=+crt-static
