# shellcheck shell=bash
# What is built: directories as a user would have them, with their dependencies beside them, since no RUN step here
# reaches a package registry.

# ripgrep 15.2.0, as bench/src/crates.rs gets it.
ripgrep_context() {
    local name=ripgrep version=15.2.0 context="$WORK/ripgrep" archive
    ! [ -d "$context" ] || return 0
    find_archive() {
        find "${CARGO_HOME:-$HOME/.cargo}/registry/cache" -name "$name-$version.crate" 2>/dev/null | head -1
    }
    archive=$(find_archive)
    if [ -z "$archive" ]; then
        (cd / && cargo info --quiet "$name@$version" >/dev/null)
        archive=$(find_archive)
    fi
    mkdir "$context"
    tar -C "$context" --strip-components=1 -xf "$archive"
    vendor "$context"
}

# Puts the dependencies of a context's Cargo.lock into it.
vendor() {
    mkdir -p "$1/.cargo"
    (cd "$1" && RUSTC_WRAPPER='' cargo vendor --locked >.cargo/config.toml 2>>"$LOGS/vendor.log")
}

small_context() {
    [ -d "$WORK/small" ] || cp -r "$HERE/small" "$WORK/small"
}

make_client_image() {
    # By a hard link or a copy under the name that the Dockerfile asks for.
    mkdir -p "$WORK/client"
    cp "$CACHEC_CLIENT" "$WORK/client/cachec"
    docker build -q -f "$REPOSITORY/deploy/docker/client.Dockerfile" -t cachec-client "$WORK/client" >/dev/null
}

# build LOG CONTEXT ARGUMENT...: one `docker build` of the users' example with this server. Sets $SECONDS_TAKEN.
build() {
    local log="$LOGS/$1.log" context=$2
    shift 2
    build_with "$log" "$context" -f "$REPOSITORY/deploy/examples/Dockerfile" --build-arg "BASE_IMAGE=$SLIM_IMAGE" \
        --build-arg "RUST_IMAGE=$RUST_IMAGE" --build-arg "CACHEC_URL=$URL" --secret "id=cachec_token,src=$TOKEN_FILE" "$@"
}

build_with() {
    local log=$1 context=$2 started ended
    shift 2
    started=$(date +%s%N)
    # In the background, so that a signal ends this at once; the build ends with the engine.
    docker build --progress=plain "$@" "$context" >"$log" 2>&1 &
    wait $! || { tail -15 "$log" >&2; return 1; }
    ended=$(date +%s%N)
    SECONDS_TAKEN=$(awk "BEGIN { printf \"%.1f\", ($ended - $started) / 1e9 }")
}

# A build's step, without what the engine puts in front of its lines.
step_log() {
    sed -E 's/^#[0-9]+ ([0-9.]+ )?//' "$LOGS/$1.log"
}

# row LOG NAME: the value of a row of `cachec stats` in a build's log.
row() {
    step_log "$1" | sed -n "s/^$2  *//p" | tail -1
}

# Whether all units of a build were hits: `54 of 54 (100.0 %)`.
all_hits() {
    local hits
    hits=$(row "$1" hits)
    echo "      $1: $hits" >&2
    [[ $hits =~ ^([0-9]+)\ of\ ([0-9]+)\  ]] && [ "${BASH_REMATCH[1]}" = "${BASH_REMATCH[2]}" ] && [ "${BASH_REMATCH[1]}" -gt 0 ]
}

misses() {
    local hits
    hits=$(row "$1" hits)
    [[ $hits =~ ^([0-9]+)\ of\ ([0-9]+)\  ]] && echo $((BASH_REMATCH[2] - BASH_REMATCH[1]))
}

# A file out of an image, by way of a container that never runs.
copy_out() {
    local image=$1 path=$2 to=$3 container
    container=$(docker create --network none "$image" "$path")
    docker cp "$container:$path" "$to" >/dev/null
    docker rm "$container" >/dev/null
}
