#!/bin/sh
# Fuzzes every format that is read from others for some seconds each, 20 without an argument: bench/fuzz.sh [SECONDS [TARGET ...]]
# A crash leaves its input in target/fuzz/artifacts. With LLVM's libFuzzer, on a stable compiler.
set -eu
cd "$(dirname "$0")/fuzz"
seconds=${1:-20}
[ $# -eq 0 ] || shift
work=$PWD/../../target/fuzz
coverage="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions"
env -u RUSTC_WRAPPER RUSTFLAGS="$coverage" \
    cargo build --release --quiet --target "$(rustc -vV | sed -n 's/^host: //p')" --target-dir "$work"
for target in ${@:-messages packs frames arguments roots dep_info}; do
    mkdir -p "$work/corpus/$target" "$work/artifacts"
    echo "== $target: $seconds s"
    "$work"/*/release/"$target" -max_total_time="$seconds" -rss_limit_mb=1024 -timeout=10 -print_final_stats=1 \
        -artifact_prefix="$work/artifacts/$target-" "$work/corpus/$target" $(ls -d "seeds/$target" 2>/dev/null) 2>"$work/$target.log" ||
        { tail -40 "$work/$target.log" >&2; exit 1; }
    grep -E '^stat::number_of_executed_units|^stat::peak_rss_mb' "$work/$target.log"
done
