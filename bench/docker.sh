#!/bin/bash
# Builds with a real Docker engine through cachec. Everything under deploy/ that a user copies is run from there.
#
#   bench/docker.sh         what continuous integration runs, some minutes
#   bench/docker.sh full    everything
#   bench/docker.sh NAME... some scenarios: the functions scenario_NAME in bench/docker
#
# It needs root, Debian's docker.io and debootstrap, and the programs of a release build: the client linked statically.
# Where it cannot run it says so and succeeds. It starts an engine, a bridge and servers of its own, and stops them.
#
#   CACHEC_CLIENT, CACHEC_SERVER   the programs [target/release]
#   CACHEC_DOCKER_ROOT             a directory that keeps base images between runs
#   KEEP=1                         leaves logs and data
#   ZIG_WHEELS                     a directory with the wheels of ziglang and cargo-zigbuild, instead of pip's index
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)/docker
REPOSITORY=$(cd "$HERE/../.." && pwd)
# shellcheck source=docker/engine.sh
. "$HERE/engine.sh"
# shellcheck source=docker/images.sh
. "$HERE/images.sh"
# shellcheck source=docker/server.sh
. "$HERE/server.sh"
# shellcheck source=docker/contexts.sh
. "$HERE/contexts.sh"
# shellcheck source=docker/scenarios.sh
. "$HERE/scenarios.sh"
# shellcheck source=docker/hostile.sh
. "$HERE/hostile.sh"
# shellcheck source=docker/deployment.sh
. "$HERE/deployment.sh"
# shellcheck source=docker/ci.sh
. "$HERE/ci.sh"

SHORT="readme repeated canary observed unprivileged unreachable prebuilt_server ci_sessions"
FULL="readme repeated dependency canary observed denied unprivileged unreachable killed targets cache_mount prebuilt_server ci_sessions compose source_server"

DOCKER=${DOCKER:-/usr/bin/docker}
CACHEC_CLIENT=$(realpath -m "${CACHEC_CLIENT:-$REPOSITORY/target/release/cachec}")
CACHEC_SERVER=$(realpath -m "${CACHEC_SERVER:-$REPOSITORY/target/release/cachec-server}")
FAILURES=0

say() {
    echo "==> $*" >&2
}

skip() {
    echo "SKIPPED: the builds with a Docker engine: $*" >&2
    exit 0
}

# check TEXT COMMAND...: one line, and a failure where the command fails.
check() {
    local text=$1
    shift
    if "$@"; then
        echo "PASS  $text"
    else
        echo "FAIL  $text"
        FAILURES=$((FAILURES + 1))
    fi
}

look_for_what_is_needed() {
    [ "$(id -u)" = 0 ] || skip "they need root, to start an engine"
    local program
    for program in "$DOCKER" dockerd runc debootstrap ip curl cargo rustc python3 openssl; do
        command -v "$program" >/dev/null || skip "there is no $program (Debian: docker.io, debootstrap, iproute2, curl, openssl, python3)"
    done
    for program in "$CACHEC_CLIENT" "$CACHEC_SERVER"; do
        [ -x "$program" ] || skip "there is no $program; build it first (cargo build --release)"
    done
    LC_ALL=C ldd "$CACHEC_CLIENT" 2>&1 | grep -q -E 'statically linked|not a dynamic' || skip "$CACHEC_CLIENT is not static: cargo rustc --release -p cachec --bin cachec -- -C target-feature=+crt-static"
}

clean_up() {
    local code=$?
    trap - EXIT
    stop_issuer
    stop_server
    stop_engine
    [ "$code" = 0 ] || KEEP_LOGS=1
    if [ "${KEEP:-}" = 1 ]; then
        say "logs and data are in $WORK"
    elif [ -n "${KEEP_LOGS:-}" ]; then
        mv "$LOGS" "$WORK.logs"
        rm -rf --one-file-system "$WORK"
        say "logs are in $WORK.logs"
    else
        rm -rf --one-file-system "$WORK"
    fi
    exit "$code"
}

main() {
    local scenarios
    case ${1:-short} in
        short) scenarios=$SHORT ;;
        full)
            scenarios=$FULL
            PLAIN=1
            ;;
        *) scenarios=$* ;;
    esac
    look_for_what_is_needed
    WORK=$(mktemp -d "${TMPDIR:-/tmp}/cachec-docker-XXXXXX")
    ROOT=${CACHEC_DOCKER_ROOT:-$WORK}
    LOGS="$WORK/logs"
    CLIENTS="$WORK/clients"
    mkdir -p "$ROOT" "$LOGS" "$CLIENTS" "$WORK/docker-config"
    trap clean_up EXIT
    trap 'exit 130' INT TERM
    cp "$CACHEC_CLIENT" "$CLIENTS/x86_64-linux"
    start_engine || skip "the engine does not start here: ${ENGINE_FAILURE:-see above}"
    say "$("$DOCKER" --version) listens on $WORK/docker.sock, its bridge has $BRIDGE_ADDRESS"
    make_slim_image
    make_rust_image "$RUST_IMAGE" "gcc libc6-dev curl"
    make_client_image
    local scenario
    for scenario in $scenarios; do
        say "$scenario"
        "scenario_$scenario"
        stop_server
    done
    [ "$FAILURES" = 0 ] || { KEEP_LOGS=1; say "$FAILURES checks failed"; exit 1; }
}

main "$@"
