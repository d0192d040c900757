#!/bin/sh
# Passes all tests. Arguments go to `cargo test`.
set -eu
cd "$(dirname "$0")/.."
sh bench/prepare.sh
exec cargo test --locked --workspace "$@"
