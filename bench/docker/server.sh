# shellcheck shell=bash
# The cachec server on the machine itself, at the bridge's address: RUN steps reach it by the default network and by the
# machine's.

SERVER_ID=

# Starts one on data of this name; what is there is kept. Sets $TOKEN for the namespace `default`.
start_server() {
    DATA="$WORK/data-$1"
    SERVER_LOG="$LOGS/server-$1.log"
    mkdir -p "$DATA"
    if [ ! -e "$DATA/.token" ]; then
        "$CACHEC_SERVER" token create --data "$DATA" --namespace default --allow read,write 2>/dev/null >"$DATA/.token"
    fi
    TOKEN=$(cat "$DATA/.token")
    TOKEN_FILE="$WORK/token"
    (umask 077 && printf '%s\n' "$TOKEN" >"$TOKEN_FILE")
    # The most that it says, so that a token would be found in its log.
    "$CACHEC_SERVER" --data "$DATA" --listen "$BRIDGE_ADDRESS:7373" --metrics-listen "$BRIDGE_ADDRESS:7374" \
        --clients "$CLIENTS" --max-size 4GiB --log "info,cachec_server=debug" >"$WORK/server.out" 2>>"$SERVER_LOG" &
    SERVER_ID=$!
    URL="http://$BRIDGE_ADDRESS:7373"
    for _ in $(seq 100); do
        ! curl -fs "$URL/readyz" >/dev/null || return 0
        kill -0 "$SERVER_ID" 2>/dev/null || break
        sleep 0.1
    done
    tail -3 "$SERVER_LOG" >&2
    return 1
}

stop_server() {
    [ -n "$SERVER_ID" ] || return 0
    kill "$SERVER_ID" 2>/dev/null || true
    wait "$SERVER_ID" 2>/dev/null || true
    SERVER_ID=
}

# Checks all that a stopped server has kept.
scrub() {
    "$CACHEC_SERVER" scrub --data "$DATA"
}
