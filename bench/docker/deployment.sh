# shellcheck shell=bash
# What an operator runs: the server's image, from programs and from source, the Compose file, CI's sessions.

# The server's image from programs that are there, as the volume's first use and every later one.
scenario_prebuilt_server() {
    local context="$WORK/programs"
    mkdir -p "$context"
    cp "$CACHEC_CLIENT" "$context/cachec"
    cp "$CACHEC_SERVER" "$context/cachec-server"
    check "the server's image from programs" build_server_image prebuilt "$context" --build-arg PROGRAMS=prebuilt
    use_server_image
}

# The same from the sources of this checkout, some ten minutes.
scenario_source_server() {
    local context="$WORK/source"
    mkdir -p "$context/bench"
    cp -r "$REPOSITORY"/{Cargo.toml,Cargo.lock,client,protocol,server} "$context/"
    cp -r "$REPOSITORY"/bench/{Cargo.toml,src} "$context/bench/"
    mkdir -p "$WORK/vendored"
    (cd "$context" && RUSTC_WRAPPER='' cargo vendor --locked "$WORK/vendored/vendor" 2>>"$LOGS/vendor.log") |
        sed "s,$WORK/vendored/vendor,/vendor," >"$WORK/vendored/config.toml"
    docker build -q -f "$HERE/source.Dockerfile" --build-arg "RUST_IMAGE=$RUST_IMAGE" -t cachec-test/source "$WORK/vendored" >/dev/null
    # The machine's network, for apt alone.
    check "the server's image from source" build_server_image source "$context" --network host --build-arg RUST_IMAGE=cachec-test/source
    echo "      it took $SECONDS_TAKEN s" >&2
    use_server_image
    copy_out cachec-server /usr/local/share/cachec/clients/x86_64-linux "$WORK/client-of-image"
    check "its client is static" is_static "$WORK/client-of-image"
}

is_static() {
    LC_ALL=C ldd "$1" 2>&1 | grep -q -E 'statically linked|not a dynamic'
}

build_server_image() {
    local log="$LOGS/server-image-$1.log" context=$2
    shift 2
    build_with "$log" "$context" -f "$REPOSITORY/deploy/docker/server.Dockerfile" --build-arg "BASE_IMAGE=$SLIM_IMAGE" -t cachec-server "$@"
}

# Starts a container of the image, hardened, and builds through it.
use_server_image() {
    small_context
    docker volume create cachec-test >/dev/null
    check "without a token the server does not start" refuses_to_start
    docker run --rm -v cachec-test:/var/lib/cachec --network none cachec-server token create --namespace default --allow read,write \
        >"$WORK/token" 2>/dev/null
    TOKEN_FILE="$WORK/token"
    docker run -d --name cachec-test -v cachec-test:/var/lib/cachec --read-only --cap-drop ALL --security-opt no-new-privileges \
        --health-interval 1s cachec-server >/dev/null 2>"$LOGS/run.log"
    local address
    address=$(docker inspect -f '{{.NetworkSettings.IPAddress}}' cachec-test)
    URL="http://$address:7373"
    check "it becomes healthy" becomes_healthy cachec-test
    check "it runs as a user of its own" test "$(docker inspect -f '{{.Config.User}}' cachec-server)" = 7373:7373
    check "a build through it" build server-image-first "$WORK/small" --no-cache -t cachec-test/through
    check "another, in which all is hits" build server-image-second "$WORK/small" --no-cache -t cachec-test/through
    check "all is hits" all_hits server-image-second
    docker stop -t 30 cachec-test >/dev/null
    check "it stops in order" test "$(docker inspect -f '{{.State.ExitCode}}' cachec-test)" = 0
    docker start cachec-test >/dev/null
    check "it becomes healthy again" becomes_healthy cachec-test
    check "what it had is there" build server-image-third "$WORK/small" --no-cache -t cachec-test/through
    check "all is hits still" all_hits server-image-third
    check "no token is in its log" absent_from_log cachec-test
    docker rm -f -v cachec-test >/dev/null
    check "its data is in order" docker run --rm --network none -v cachec-test:/var/lib/cachec cachec-server scrub
    docker volume rm cachec-test >/dev/null
    check "the init container of the Kubernetes manifest makes a token" first_token
    check "and only one" same_first_token
    docker volume rm cachec-test-first >/dev/null
    echo "      the image has $(($(docker image inspect -f '{{.Size}}' cachec-server) - $(docker image inspect -f '{{.Size}}' "$SLIM_IMAGE"))) bytes beyond its base" >&2
}

# The manifest's script, as its text stands there.
first_token() {
    local script
    script=$(awk '/^            - \|$/ { inside = 1; next } inside && !/^              / { exit } inside' "$REPOSITORY/deploy/kubernetes/cachec.yaml")
    docker run --rm --network none --read-only --cap-drop ALL --user 7373:7373 --entrypoint sh \
        -v cachec-test-first:/var/lib/cachec cachec-server -c "$script; cat /var/lib/cachec/first-token" >"$WORK/first-token" 2>"$LOGS/first-token.log" &&
        grep -q -x 'cachec_[0-9a-f]*' "$WORK/first-token"
}

same_first_token() {
    local first
    first=$(cat "$WORK/first-token")
    first_token && [ "$(cat "$WORK/first-token")" = "$first" ]
}

refuses_to_start() {
    ! docker run --rm -v cachec-test:/var/lib/cachec --network none cachec-server >"$LOGS/no-token.log" 2>&1 &&
        grep -q 'token create' "$LOGS/no-token.log"
}

absent_from_log() {
    TOKEN=$(cat "$TOKEN_FILE")
    docker logs "$1" >"$LOGS/$1.container.log" 2>&1
    absent "$(cat "$LOGS/$1.container.log")"
}

becomes_healthy() {
    local state
    for _ in $(seq 60); do
        state=$(docker inspect -f '{{.State.Health.Status}}' "$1")
        [ "$state" != healthy ] || return 0
        sleep 0.5
    done
    docker inspect -f '{{range .State.Health.Log}}{{.Output}}{{end}}' "$1" | tail -3 >&2
    docker logs "$1" 2>&1 | tail -5 >&2
    return 1
}

# The Compose file as it is, with Debian's programs in the place of images that cannot be fetched. Grafana has none.
scenario_compose() {
    small_context
    has_image cachec-server || scenario_prebuilt_server
    has_image "$SERVICES_IMAGE" || docker build -q --network host -f "$HERE/services.Dockerfile" \
        --build-arg "SLIM_IMAGE=$SLIM_IMAGE" -t "$SERVICES_IMAGE" "$HERE" >/dev/null
    check "the Compose file is valid" compose config --quiet
    check "the configuration of Prometheus is valid" prometheus_is_valid
    compose run -T --rm cachec token create --namespace default --allow read,write >"$WORK/token" 2>"$LOGS/compose-token.log"
    TOKEN_FILE="$WORK/token"
    check "it starts" compose up -d cachec caddy prometheus
    URL=https://localhost:17443
    check "Caddy answers with TLS" answers_with_tls
    check "a build through it, in the machine's network" build_with_tls first
    check "another" build_with_tls second
    check "all is hits" all_hits tls-second
    check "Prometheus scrapes the server" scrapes
    check "Prometheus has loaded the alert rules" has_rules
    check "no metrics go out" test "$(curl -s -o /dev/null -w '%{http_code}' --cacert "$WORK/root.crt" "$URL/metrics")" = 404
    check "the health check of the server passes" compose exec -T cachec cachec-server health --url http://127.0.0.1:7373
    compose logs --no-color >"$LOGS/compose-services.log" 2>&1 || true
    TOKEN=$(cat "$TOKEN_FILE")
    check "no token is in any log" absent "$(cat "$LOGS/compose-services.log")"
    compose down --volumes >>"$LOGS/compose.log" 2>&1
}

compose() {
    # `docker-compose run` calls Docker's client.
    docker run --rm -i --network host -v "$DOCKER:/usr/bin/docker:ro" -v "$WORK/docker.sock:/var/run/docker.sock" -v "$REPOSITORY/deploy:$REPOSITORY/deploy:ro" \
        -w "$REPOSITORY/deploy/docker" -e COMPOSE_PROJECT_NAME=cachec-test -e CACHEC_HOST=localhost \
        -e "CADDY_IMAGE=$SERVICES_IMAGE" -e "PROMETHEUS_IMAGE=$SERVICES_IMAGE" \
        -e CACHEC_HTTPS_PORT=127.0.0.1:17443 -e CACHEC_HTTP_PORT=127.0.0.1:17080 -e CACHEC_MAX_SIZE=2GiB \
        "$SERVICES_IMAGE" docker-compose "$@" 2> >(tee -a "$LOGS/compose.log" >"$WORK/compose.err") ||
        { tail -5 "$WORK/compose.err" >&2; return 1; }
}

prometheus_is_valid() {
    docker run --rm --network none -v "$REPOSITORY/deploy/docker/prometheus.yml:/etc/prometheus/prometheus.yml:ro" \
        -v "$REPOSITORY/deploy/prometheus/cachec.rules.yml:/etc/prometheus/cachec.rules.yml:ro" "$SERVICES_IMAGE" \
        promtool check config /etc/prometheus/prometheus.yml >"$LOGS/promtool.log" 2>&1
}

# By the authority that Caddy makes for names that are local.
answers_with_tls() {
    local container
    for _ in $(seq 60); do
        container=$(docker ps -q --filter label=com.docker.compose.service=caddy)
        docker cp "$container:/data/caddy/pki/authorities/local/root.crt" "$WORK/root.crt" >/dev/null 2>&1 &&
            curl -fs --cacert "$WORK/root.crt" "$URL/healthz" >/dev/null && return
        sleep 0.5
    done
    docker logs "$container" 2>&1 | tail -5 >&2
    return 1
}

build_with_tls() {
    build_with "$LOGS/tls-machine.log" "$WORK/small" -f "$HERE/machine.Dockerfile" --build-arg "RUST_IMAGE=$RUST_IMAGE" -t cachec-test/machine
    docker run --rm --network host --env "CACHEC_URL=$URL" --env SSL_CERT_FILE=/root.crt --volume "$WORK/root.crt:/root.crt:ro" \
        --volume "$TOKEN_FILE:/run/secrets/cachec_token:ro" cachec-test/machine >"$LOGS/tls-$1.log" 2>&1 &&
        ! grep '^cachec: ' "$LOGS/tls-$1.log" >&2
}

scrapes() {
    for _ in $(seq 60); do
        compose exec -T prometheus promtool query instant http://127.0.0.1:9090 'up{job="cachec"}' 2>/dev/null | grep -q '=> 1 ' && return
        sleep 1
    done
    return 1
}

# Asked in Prometheus' own network, since it is published nowhere.
has_rules() {
    local container
    container=$(docker ps -q --filter label=com.docker.compose.service=prometheus)
    docker run --rm --network "container:$container" "$RUST_IMAGE" curl -fs http://127.0.0.1:9090/api/v1/rules | grep -q CachecDown
}
