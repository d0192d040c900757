# shellcheck shell=bash
# What a user does: builds again, with other dependencies, for other targets, from a cache mount.

# What the README shows is what is run here.
scenario_readme() {
    check "the README's Dockerfiles stand in deploy/ word by word" python3 "$HERE/shown.py" "$REPOSITORY"
}

# A real program against an empty server, and again in a fresh builder. Prints the seconds of both.
scenario_repeated() {
    ripgrep_context
    start_server repeated
    local plain=- first
    if [ -n "${PLAIN:-}" ]; then
        build_with "$LOGS/plain.log" "$WORK/ripgrep" --no-cache -f "$HERE/plain.Dockerfile" --build-arg "RUST_IMAGE=$RUST_IMAGE" \
            --build-arg "BASE_IMAGE=$SLIM_IMAGE" -t cachec-test/plain
        plain=$SECONDS_TAKEN
    fi
    check "ripgrep builds with an empty server" build first "$WORK/ripgrep" --no-cache -t cachec-test/first
    first=$SECONDS_TAKEN
    docker builder prune --all --force >/dev/null
    check "ripgrep builds again in a fresh builder" build second "$WORK/ripgrep" --no-cache -t cachec-test/second
    check "all of it is hits" all_hits second
    check "the program runs" prints "ripgrep 15.2.0" cachec-test/second rg --version
    copy_out cachec-test/first /usr/local/bin/rg "$WORK/rg-first"
    copy_out cachec-test/second /usr/local/bin/rg "$WORK/rg-second"
    check "both programs are the same" cmp "$WORK/rg-first" "$WORK/rg-second"
    cat <<END

| docker build of ripgrep 15.2.0 | seconds | hits | received / sent |
|---|---|---|---|
| plain | $plain | - | - |
| first | $first | $(row first hits) | $(row first 'received . sent') |
| second | $SECONDS_TAKEN | $(row second hits) | $(row second 'received . sent') |

END
}

# prints TEXT IMAGE COMMAND...
prints() {
    local text=$1
    shift
    docker run --rm --network none "$@" | grep -q -F "$text"
}

# A dependency of another version: what depends on it is compiled, and nothing else.
scenario_dependency() {
    ripgrep_context
    start_server repeated
    local context="$WORK/ripgrep-dependency" expected
    cp -r "$WORK/ripgrep" "$context"
    # As a new release of the crate `log` would be: another version and other contents.
    sed -i '0,/^version = ".*"/s//version = "0.4.999"/' "$context/vendor/log/Cargo.toml"
    echo '// Changed.' >>"$context/vendor/log/src/lib.rs"
    sed -i 's/"files":{[^}]*}/"files":{}/' "$context/vendor/log/.cargo-checksum.json"
    sed -i '/^name = "log"$/{n;s/".*"/"0.4.999"/}' "$context/Cargo.lock"
    expected=$(cd "$context" && RUSTC_BOOTSTRAP=1 RUSTC_WRAPPER='' cargo build --release --locked --offline -Z unstable-options --unit-graph |
        python3 "$HERE/dependents.py" log)
    check "ripgrep builds with another version of the crate log" build dependency "$context" --no-cache -t cachec-test/dependency
    check "log and its dependents are compiled, $expected units of $(row dependency hits | cut -d' ' -f3), and nothing else" \
        test "$(misses dependency)" = "$expected"
}

# Two targets at the same time against one empty server, then both again.
scenario_targets() {
    ripgrep_context
    make_zig_image
    start_server targets
    local round gnu zig
    for round in first second; do
        docker builder prune --all --force >/dev/null
        # A commit that changes nothing that is compiled: steps with mounted sources run again.
        echo "$round" >"$WORK/ripgrep/COMMIT"
        build "gnu-$round" "$WORK/ripgrep" -t cachec-test/gnu &
        gnu=$!
        build_zig "zig-$round" &
        zig=$!
        check "$round build for gnu, beside the other" wait "$gnu"
        check "$round build for glibc 2.28 with zig, beside the other" wait "$zig"
    done
    rm "$WORK/ripgrep/COMMIT"
    check "the second for gnu is all hits" all_hits gnu-second
    check "the second with zig is all hits" all_hits zig-second
    copy_out cachec-test/zig /rg "$WORK/rg-zig"
    check "zig's program asks for no glibc after 2.28" glibc_at_most 2.28 "$WORK/rg-zig"
    check "zig's program runs" prints "ripgrep 15.2.0" -v "$WORK/rg-zig:/rg:ro" "$SLIM_IMAGE" /rg --version
}

build_zig() {
    local log="$LOGS/$1.log"
    build_with "$log" "$WORK/ripgrep" -f "$REPOSITORY/deploy/examples/zigbuild.Dockerfile" --network host -t cachec-test/zig \
        --build-arg "RUST_IMAGE=$ZIG_IMAGE" --build-arg "CACHEC_URL=$URL" --secret "id=cachec_token,src=$TOKEN_FILE"
}

# The highest version of glibc that a program asks for.
glibc_at_most() {
    local highest
    highest=$(grep -a -o 'GLIBC_2\.[0-9]*' "$2" | sort -V | tail -1)
    echo "      it asks for $highest" >&2
    [ "$(printf '%s\n' "$highest" "GLIBC_$1" | sort -V | tail -1)" = "GLIBC_$1" ]
}

# Two builds at a time on one cache mount, and no server.
scenario_cache_mount() {
    ripgrep_context
    small_context
    docker builder prune --all --force --filter id=cachec >/dev/null
    local round programs
    for round in first second; do
        # Not by --no-cache, which gives a build an empty mount.
        echo "$round" | tee "$WORK/ripgrep/COMMIT" >"$WORK/small/COMMIT"
        build_in_mount "mount-ripgrep-$round" "$WORK/ripgrep" -t cachec-test/mounted &
        programs=$!
        build_in_mount "mount-small-$round" "$WORK/small"
        check "$round builds beside each other on one cache mount" wait "$programs"
    done
    rm "$WORK/ripgrep/COMMIT" "$WORK/small/COMMIT"
    check "the second ripgrep is all hits" all_hits mount-ripgrep-second
    check "from the mount" test "$(row mount-ripgrep-second '  local . server')" = "$(misses mount-ripgrep-first) / 0"
    check "the second small program is all hits" all_hits mount-small-second
}

build_in_mount() {
    local log="$LOGS/$1.log" context=$2
    shift 2
    build_with "$log" "$context" -f "$REPOSITORY/deploy/examples/cache-mount.Dockerfile" \
        --build-arg "BASE_IMAGE=$SLIM_IMAGE" --build-arg "RUST_IMAGE=$RUST_IMAGE" "$@"
}
