#!/bin/sh
# Builds the client and puts it where `self.sh` and continuous integration use it from: building it anew does not
# replace it under their hands.
set -eu
cd "$(dirname "$0")/.."
self=$PWD/target/self
cargo build --locked --package cachec --target-dir "$self/bootstrap"
cp "$self/bootstrap/debug/cachec" "$self/cachec"
