#!/bin/sh
# Installs what building RocksDB needs beyond Rust and a C compiler: C++ and libclang. Does nothing where they are.
set -eu

# libclang-cpp, another library, is there on many machines without libclang.
has_libclang() {
    [ -n "${LIBCLANG_PATH:-}" ] ||
        { ldconfig -p 2>/dev/null; ls /usr/lib/llvm-*/lib 2>/dev/null; } | grep -v 'libclang-cpp' | grep -q 'libclang[-.0-9]*so'
}

if has_libclang && command -v c++ >/dev/null; then
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "Building RocksDB needs a C++ compiler and libclang: install them (clang-devel, libclang-dev or the like)." >&2
    exit 1
fi
run=
[ "$(id -u)" = 0 ] || run=sudo
echo "==> Installing g++ and libclang, which building RocksDB needs" >&2
$run apt-get update -qq
$run apt-get install -y -qq g++ libclang-dev >/dev/null
