#!/bin/sh
# Builds client and server, and then ripgrep twice through them. Arguments go to `cachec-bench demo`.
set -eu
cd "$(dirname "$0")/.."
echo "==> Building cachec; RocksDB takes some minutes the first time" >&2
sh deploy/build.sh
exec cargo run --release --locked --quiet --package cachec-bench -- demo "$@"
