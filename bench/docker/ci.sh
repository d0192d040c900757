# shellcheck shell=bash
# Sessions for CI jobs: the scripts of deploy/ci as a runner would run them, with an issuer of our own.

ISSUER_PORT=17373
ISSUER_ID=

scenario_ci_sessions() {
    small_context
    local directory="$WORK/ci"
    mkdir -p "$directory"
    python3 "$HERE/issuer.py" "$ISSUER_PORT" "$directory" 2>"$LOGS/issuer.log" &
    ISSUER_ID=$!
    cat >"$WORK/ci.toml" <<END
[namespaces.main]
[namespaces."pr-*"]
parent = "main"
[[identity]]
issuer = "http://127.0.0.1:$ISSUER_PORT"
audience = "cachec-test"
[[identity.rules]]
claims = { repository_id = "12", ref = "refs/heads/main" }
namespace = "main"
allow = "read,write"
[[identity.rules]]
claims = { repository_id = "12", ref = "refs/pull/*/merge" }
namespace = "main"
allow = "read"
END
    CACHEC_SERVER_CONFIG="$WORK/ci.toml" start_server ci
    for _ in $(seq 50); do
        ! curl -fs "http://127.0.0.1:$ISSUER_PORT/keys" >/dev/null || break
        sleep 0.1
    done

    job push refs/heads/main
    check "a job of the main branch gets a session" github_job push
    check "its build stores what it has compiled" test "$(row github-push 'results stored')" = "5 (5 uploaded)"
    job pull_request refs/pull/7/merge
    check "a pull request gets one" github_job pull_request
    check "it reads all" all_hits github-pull_request
    check "for reading alone" grep -q '^CACHEC_MODE=read-only$' "$directory/pull_request/env"
    check "its session is for reading alone, whatever the job says" writes_are_refused "$directory/pull_request/cachec/token"
    job pull_request refs/heads/unknown
    check "a job without a rule goes on, with a warning" github_job refused
    check "and without cachec" test ! -s "$directory/refused/env"
    check "the warning says why" grep -q 'title=cachec::not used: the server gives this job no session' "$LOGS/github-refused.log"

    job push refs/heads/main
    check "a GitLab job gets a session, and hits" gitlab_job
    stop_issuer
}

# What the next job is.
job() {
    EVENT=$1
    printf '{"sub": "repo:team/product", "repository_id": "12", "ref": "%s"}' "$2" >"$WORK/ci/claims.json"
}

# Runs the action's script as a runner does, then a build with what it has left for later steps.
github_job() {
    local directory="$WORK/ci/$1"
    mkdir -p "$directory/build"
    : >"$directory/env"
    : >"$directory/path"
    env -i PATH="$PATH" RUNNER_TEMP="$directory" GITHUB_ENV="$directory/env" GITHUB_PATH="$directory/path" \
        GITHUB_EVENT_NAME="$EVENT" ACTIONS_ID_TOKEN_REQUEST_TOKEN=runner \
        ACTIONS_ID_TOKEN_REQUEST_URL="http://127.0.0.1:$ISSUER_PORT/job?x=1" CACHEC_URL="$URL" CACHEC_NAMESPACE=main \
        CACHEC_AUDIENCE=cachec-test CACHEC_MODE='' sh "$REPOSITORY/deploy/ci/setup.sh" >"$LOGS/github-$1.log" 2>&1 || return 1
    [ -s "$directory/env" ] || return 0
    local variables
    mapfile -t variables <"$directory/env"
    job_build "$directory" "$LOGS/github-$1.log" "${variables[@]}" "PATH=$(cat "$directory/path"):$PATH"
}

# job_build DIRECTORY LOG VARIABLE...: builds as a job would, on a machine that has no cache.
job_build() {
    local directory=$1 log=$2
    shift 2
    cp -r "$WORK/small/." "$directory/build"
    (cd "$directory/build" && env -i HOME="$HOME" CI=true CACHEC_RUNTIME_DIR="$directory/run" "$@" sh -c '
        cargo build --release --locked && target/release/small && cachec stats && cachec stop') >>"$log" 2>&1 ||
        { tail -5 "$log" >&2; return 1; }
}

# The template's before_script, as its text stands there.
gitlab_job() {
    local directory="$WORK/ci/gitlab" proof
    mkdir -p "$directory/build"
    awk '/^    - \|$/ { inside = 1; next } inside { sub(/^      /, ""); print }' "$REPOSITORY/deploy/ci/gitlab-ci.yml" >"$directory/before.sh"
    echo "cd '$directory/build' && cargo build --release --locked && cachec stats && cachec stop" >>"$directory/before.sh"
    cp -r "$WORK/small/." "$directory/build"
    proof=$(curl -fs -H 'Authorization: bearer runner' "http://127.0.0.1:$ISSUER_PORT/job?audience=cachec-test" | sed 's/.*"value": "//; s/".*//')
    env -i PATH="$PATH" HOME="$HOME" CI=true CACHEC_RUNTIME_DIR="$directory/run" CACHEC_URL="$URL" CACHEC_NAMESPACE=main \
        CACHEC_ID_TOKEN="$proof" CI_PIPELINE_SOURCE=push sh "$directory/before.sh" >"$LOGS/gitlab.log" 2>&1 ||
        { tail -5 "$LOGS/gitlab.log" >&2; return 1; }
    all_hits gitlab
}

writes_are_refused() {
    [ "$(curl -s -o /dev/null -w '%{http_code}' -X PUT -H "Authorization: Bearer $(cat "$1")" --data x \
        "$URL/v1/main/blobs/$(printf '%064d' 0)")" = 403 ]
}

stop_issuer() {
    [ -n "$ISSUER_ID" ] || return 0
    kill "$ISSUER_ID" 2>/dev/null || true
    wait "$ISSUER_ID" 2>/dev/null || true
    ISSUER_ID=
}
