#!/bin/sh
# Builds this project and its tests through this project's client, twice from nothing. The second build must restore
# everything, RocksDB's C++ included: a compiler that is started is a miss, and the second such build fails this. The present target directory
# is put aside meanwhile: what C++ compilers make holds its path.
set -eu
cd "$(dirname "$0")/.."
sh bench/prepare.sh
self=$PWD/target/self
[ -x "$self/cachec" ] || sh bench/bootstrap.sh
export RUSTC_WRAPPER="$self/cachec" CACHEC_DIR="$self/tier" CACHEC_RUNTIME_DIR="$self/run" CARGO_INCREMENTAL=0

put_back() {
    rm -rf target/debug
    [ ! -d "$self/debug" ] || mv "$self/debug" target/debug
}
build() {
    rm -rf target/debug
    cargo test --locked --workspace --no-run
    "$self/cachec" flush
}
misses() {
    "$self/cachec" stats --json | grep -o '"misses":[0-9]*'
}

[ ! -d target/debug ] || mv target/debug "$self/debug"
trap put_back EXIT
echo "==> Building cachec through cachec" >&2
build
# What a busy machine has kept from being stored (an input that changed its times meanwhile) is stored the next time.
for attempt in 1 2; do
    before=$(misses)
    echo "==> Building it again, from nothing" >&2
    build
    "$self/cachec" stats
    [ "$(misses)" != "$before" ] || break
    [ "$attempt" = 1 ] || { echo "Builds from the cache compile something each time." >&2; exit 1; }
done
target/debug/cachec-server --version
