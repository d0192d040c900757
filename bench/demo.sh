#!/bin/sh
# Builds client and server, and then ripgrep twice through them. Arguments go to `cachec-bench demo`.
set -eu
cd "$(dirname "$0")/.."
sh bench/prepare.sh
echo "==> Building cachec; RocksDB takes some minutes the first time" >&2
cargo build --release --locked --package cachec --package cachec-server --package cachec-bench
exec cargo run --release --locked --quiet --package cachec-bench -- demo "$@"
