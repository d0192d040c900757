# shellcheck shell=bash
# What goes wrong, or is not as usual: secrets, missing rights, other users, no server, builds that are killed.

# The server's token is nowhere but in its file. A token that is passed in the wrong way is found, to show that the search
# finds one.
scenario_canary() {
    small_context
    start_server canary
    check "a build with a token" build canary "$WORK/small" --no-cache -t cachec-test/canary
    check "it has used the server" test "$(row canary 'results stored')" = "5 (5 uploaded)"
    check "the token is not in the image's history" absent "$(docker history --no-trunc cachec-test/canary)"
    check "the token is in no layer" absent_in_image cachec-test/canary
    check "the token is in no layer of the engine's build cache" absent_below "$ROOT/engine/overlay2" "$ROOT/engine/image" "$ROOT/engine/buildkit"
    check "the token is in no build log" absent "$(cat "$LOGS"/*.log)"
    check "the token is not in the server's log" absent "$(cat "$SERVER_LOG")"
    check "the token is not in the engine's log" absent "$(cat "$WORK/engine.log")"
    check "the token is not among the metrics" absent "$(curl -fs "http://$BRIDGE_ADDRESS:7374/metrics")"
    check "the metrics are there" has_metrics
    check "the server serves no metrics to others" test "$(curl -s -o /dev/null -w '%{http_code}' "$URL/metrics")" = 404

    build_with "$LOGS/leak.txt" "$WORK/small" -f "$HERE/leak.Dockerfile" --build-arg "BASE_IMAGE=$SLIM_IMAGE" \
        --build-arg "CACHEC_TOKEN=$TOKEN" -t cachec-test/leak
    check "a leaked token is found in the history" present "$(docker history --no-trunc cachec-test/leak)"
    check "a leaked token is found in a layer" present_in_image cachec-test/leak
    check "a leaked token is found in a build log" present "$(cat "$LOGS/leak.txt")"
    rm "$LOGS/leak.txt"
    docker rmi -f cachec-test/leak >/dev/null
    docker builder prune --all --force >/dev/null
}

# Only the secret part: `cachec_` alone is in every client.
absent() {
    ! present "$1"
}

present() {
    grep -q -F "${TOKEN#cachec_}" <<<"$1"
}

absent_below() {
    ! grep -r -q -F "${TOKEN#cachec_}" "$@"
}

absent_in_image() {
    ! present_in_image "$1"
}

# Layers are tar files in a tar file, not compressed, but what is in them may be.
present_in_image() {
    local directory="$WORK/saved" found=1
    rm -rf "$directory"
    mkdir "$directory"
    docker save "$1" | tar -C "$directory" -x
    grep -r -q -F "${TOKEN#cachec_}" "$directory" && found=0
    rm -rf "$directory"
    return "$found"
}

has_metrics() {
    curl -fs "http://$BRIDGE_ADDRESS:7374/metrics" | grep -q '^cachec_requests_total'
}

# The engine's default profile allows what observing needs.
scenario_observed() {
    small_context
    start_server observed
    check "a build under the default seccomp profile" build observed "$WORK/small" --no-cache -t cachec-test/observed
    check "every compile was observed" test "$(row observed 'compiles observed')" = "5 of 5"
    check "cachec doctor finds nothing wrong in a RUN step" doctor_is_content
    check "the program runs" prints "hello from a macro 42" cachec-test/observed small
}

doctor_is_content() {
    build_with "$LOGS/doctor.log" "$WORK/client" -f "$HERE/doctor.Dockerfile" --no-cache --build-arg "RUST_IMAGE=$RUST_IMAGE" \
        --build-arg "CACHEC_URL=$URL" --secret "id=cachec_token,src=$TOKEN_FILE" -t cachec-test/doctor
}

# Where seccomp is denied, plain libraries are cached, and the build is told.
scenario_denied() {
    small_context
    start_server denied
    touch "$WORK/deny-seccomp"
    local round
    for round in first second; do
        check "the $round build without seccomp" build "denied-$round" "$WORK/small" --no-cache -t cachec-test/denied
    done
    rm "$WORK/deny-seccomp"
    check "seccomp was denied indeed" test -s "$WORK/denied"
    check "no compile was observed" test "$(row denied-first 'compiles observed')" = "0 of $(misses denied-first)"
    check "the summary says why" test "$(row denied-first '  not stored')" = "4 untraced"
    check "and the build says it once" test "$(grep -c "cannot be observed here" "$LOGS/denied-first.log")" = 1
    check "the second restores the library" test "$(row denied-second 'hits' | cut -d' ' -f1)" = 1
    check "the program runs" prints "hello from a macro 42" cachec-test/denied small
}

# A container in place of a RUN step, where more can be asked of the engine than of a build.
scenario_unprivileged() {
    small_context
    start_server unprivileged
    build_with "$LOGS/machine.log" "$WORK/small" -f "$HERE/machine.Dockerfile" --build-arg "RUST_IMAGE=$RUST_IMAGE" -t cachec-test/machine
    local round
    cp "$TOKEN_FILE" "$WORK/readable-token"
    chmod 644 "$WORK/readable-token"
    check "a build as root" in_container root
    check "as another user" in_container user hits --user 1000:1000
    check "as a user without a home" in_container homeless hits --user 1000:1000 --env HOME=
    check "with / as home" in_container root-home hits --user 1000:1000 --env HOME=/
    check "with a temporary directory that has a space" in_container odd-tmpdir hits --user 1000:1000 --env "TMPDIR=/var/tmp/odd place" --tmpfs "/var/tmp/odd place:mode=1777"
    check "with a temporary directory that is not there" in_container no-tmpdir hits --env TMPDIR=/nowhere
    check "where all is read-only but target and /tmp" in_container read-only hits --user 1000:1000 --read-only --tmpfs /tmp:mode=1777
    check "without capabilities and new privileges" in_container no-capabilities hits --user 1000:1000 --cap-drop ALL --security-opt no-new-privileges
    check "with SOURCE_DATE_EPOCH" in_container epoch built --env SOURCE_DATE_EPOCH=0
    check "in the machine's network" in_container host-network hits --network host
    check "as another user with HOME=/ in a RUN step" in_run_step
}

# in_container NAME [hits|built] ARGUMENT...: builds the small program in a new container, and runs it.
in_container() {
    local name=$1 wanted=${2:-built}
    shift
    [ $# = 0 ] || shift
    docker run --rm --env "CACHEC_URL=$URL" --volume "$WORK/readable-token:/run/secrets/cachec_token:ro" \
        --tmpfs /work/target:exec,mode=1777 "$@" cachec-test/machine >"$LOGS/$name.log" 2>&1 ||
        { tail -15 "$LOGS/$name.log" >&2; return 1; }
    grep -q "hello from a macro 42" "$LOGS/$name.log" && { [ "$wanted" = built ] || all_hits "$name"; }
}

in_run_step() {
    build_installed run-user && all_hits run-user
}

# Nobody at the address, somebody who says nothing, and a wrong token: the program is built, and a line says why not
# through the cache.
scenario_unreachable() {
    small_context
    start_server unreachable
    local good=$URL
    printf 'cachec_%064d\n' 0 >"$WORK/wrong-token"
    TOKEN_FILE="$WORK/wrong-token" check_told wrong-token "with a wrong token"
    URL="http://$BRIDGE_ADDRESS:1" check_told nobody "with nobody at the server's address"
    # An address that answers nothing at all: nobody has it.
    URL="http://$SUBNET.77:7373" check_told silent "with a server that is gone"
    URL="nonsense" check_told nonsense "with an address that is none"
    URL="http://$BRIDGE_ADDRESS:1"
    check "the users' example with nobody at the server's address" build example-nobody "$WORK/small" --no-cache -t cachec-test/nobody
    check "curl's line says why" test "$(step_log example-nobody | grep -c '^curl: .*connect')" = 1
    check "the program runs" prints "hello from a macro 42" cachec-test/nobody small
    URL=$good
}

# With the client in the image: it is not there that the server is missed.
check_told() {
    check "a build $2" build_installed "$1"
    check "one line says why" test "$(step_log "$1" | grep -c -E '^cachec: no(t used| help from the server)')" = 1
    step_log "$1" | grep '^cachec: ' | sed 's/^/      /' >&2
    echo "      it took $SECONDS_TAKEN s" >&2
    check "the program runs" grep -q "hello from a macro 42" "$LOGS/$1.log"
}

build_installed() {
    build_with "$LOGS/$1.log" "$WORK/small" -f "$HERE/user.Dockerfile" --no-cache --build-arg "RUST_IMAGE=$RUST_IMAGE" \
        --build-arg "CACHEC_URL=$URL" --secret "id=cachec_token,src=$TOKEN_FILE" -t cachec-test/user
}

# Builds that end at any moment, by the client's end and by the end of all their processes. What comes after is right.
scenario_killed() {
    ripgrep_context
    start_server killed
    local kill count=${KILLS:-4} moment
    for kill in $(seq "$count"); do
        docker builder prune --all --force >/dev/null
        moment=$((RANDOM % 30 + 3))
        say "kill $kill of $count, after $moment s"
        if [ $((kill % 2)) = 0 ]; then
            kill_client "$moment" "$kill"
        else
            kill_processes "$moment" "$kill"
        fi
    done
    check "the build after that" build after-kills "$WORK/ripgrep" --no-cache -t cachec-test/after-kills
    check "it restores what the killed ones had stored" test "$(row after-kills hits | cut -d' ' -f1)" -gt 0
    echo "      $(row after-kills hits)" >&2
    check "its program runs" prints "ripgrep 15.2.0" cachec-test/after-kills rg --version
    copy_out cachec-test/after-kills /usr/local/bin/rg "$WORK/rg-killed"
    stop_server
    check "the server's data is in order" scrub
    # From nothing, to compare with.
    start_server untouched
    build untouched "$WORK/ripgrep" --no-cache -t cachec-test/untouched
    copy_out cachec-test/untouched /usr/local/bin/rg "$WORK/rg-untouched"
    check "the program is the one of builds that nobody has killed" cmp "$WORK/rg-killed" "$WORK/rg-untouched"
}

kill_client() {
    docker_build_in_background "killed-$2"
    sleep "$1"
    kill -9 "$BUILD" 2>/dev/null || true
    wait "$BUILD" 2>/dev/null || true
}

# All processes of the step.
kill_processes() {
    docker_build_in_background "killed-$2"
    sleep "$1"
    kill_steps
    wait "$BUILD" 2>/dev/null || true
}

docker_build_in_background() {
    DOCKER_BUILDKIT=1 DOCKER_CONFIG="$WORK/docker-config" "$DOCKER" -H "unix://$WORK/docker.sock" build --progress=plain --no-cache \
        -f "$REPOSITORY/deploy/examples/Dockerfile" --build-arg "BASE_IMAGE=$SLIM_IMAGE" --build-arg "RUST_IMAGE=$RUST_IMAGE" \
        --build-arg "CACHEC_URL=$URL" --secret "id=cachec_token,src=$TOKEN_FILE" "$WORK/ripgrep" >"$LOGS/$1.log" 2>&1 &
    BUILD=$!
}
