# shellcheck shell=bash
# A Docker engine of its own: own data, own socket, own bridge. No rule of the machine's firewall and no setting of its
# kernel is changed, so RUN steps of the default network reach the machine's bridge address and nothing else.

ENGINE_ID=

# Starts it below $WORK; images and build caches are in $ROOT.
start_engine() {
    # One bridge a run: a second run, or another engine, is not in the way.
    BRIDGE="cachec$((BASHPID % 10000))"
    SUBNET="10.213.$((BASHPID % 250))"
    BRIDGE_ADDRESS="$SUBNET.1"
    ip link add name "$BRIDGE" type bridge
    ip address add "$BRIDGE_ADDRESS/24" dev "$BRIDGE"
    ip link set "$BRIDGE" up
    make_runtime
    PATH="$WORK/runtime:$PATH" dockerd --data-root "$ROOT/engine" --exec-root "$WORK/exec" --pidfile "$WORK/engine.pid" \
        --host "unix://$WORK/docker.sock" --bridge "$BRIDGE" --iptables=false --ip-forward=false --ip-masq=false \
        >"$WORK/engine.log" 2>&1 &
    ENGINE_ID=$!
    for _ in $(seq 100); do
        docker version >/dev/null 2>&1 && return
        kill -0 "$ENGINE_ID" 2>/dev/null || break
        sleep 0.2
    done
    tail -5 "$WORK/engine.log" >&2
    ENGINE_FAILURE=$(grep -o 'failed to start daemon.*' "$WORK/engine.log" | tail -1)
    return 1
}

# BuildKit's steps have no option for a seccomp profile. This is the engine's runc, with one change where the file
# deny-seccomp is there: the system call `seccomp` is taken out of the list of those that are allowed.
make_runtime() {
    local runc
    runc=$(command -v runc)
    mkdir -p "$WORK/runtime"
    cat >"$WORK/runtime/runc" <<END
#!/bin/sh
bundle= previous=
for word; do
    [ "\$previous" != --bundle ] || bundle=\$word
    previous=\$word
done
if [ -e "$WORK/deny-seccomp" ] && [ -f "\$bundle/config.json" ]; then
    sed -i 's/"seccomp",//' "\$bundle/config.json"
    echo "\$bundle" >>"$WORK/denied"
fi
exec "$runc" "\$@"
END
    chmod 755 "$WORK/runtime/runc"
}

# Debian's client by its path: another `docker` may be first in PATH.
docker() {
    DOCKER_BUILDKIT=1 DOCKER_CONFIG="$WORK/docker-config" "$DOCKER" -H "unix://$WORK/docker.sock" "$@"
}

stop_engine() {
    if [ -n "$ENGINE_ID" ]; then
        # Steps would outlive the engine.
        kill_steps
        # Containers end with the engine, but the bridges of their networks would stay.
        local left
        left=$(docker ps -aq 2>/dev/null || true)
        # shellcheck disable=SC2086
        [ -z "$left" ] || docker rm -f $left >/dev/null 2>&1 || true
        docker network prune -f >/dev/null 2>&1 || true
        kill "$ENGINE_ID" 2>/dev/null || true
        wait "$ENGINE_ID" 2>/dev/null || true
        ENGINE_ID=
        # What it has mounted for networks and layers that were in use.
        awk -v work="$WORK/" -v root="$ROOT/engine/" 'index($2, work) == 1 || index($2, root) == 1 { print $2 }' /proc/mounts |
            sort -r | xargs -r umount 2>/dev/null || true
    fi
    [ -z "${BRIDGE:-}" ] || ip link delete "$BRIDGE" 2>/dev/null || true
}

kill_steps() {
    local id
    for id in $(step_processes); do
        kill -9 "$id" 2>/dev/null || true
    done
}

# The processes of this engine's steps and containers: its descendants that have other process ids inside.
step_processes() {
    local id outside inside
    outside=$(readlink /proc/self/ns/pid)
    for id in $(descendants "$ENGINE_ID"); do
        # One that has ended meanwhile has none.
        inside=$(readlink "/proc/$id/ns/pid" || true)
        [ -z "$inside" ] || [ "$inside" = "$outside" ] || echo "$id"
    done
}

descendants() {
    ps -e -o pid=,ppid= | awk -v root="$1" '
        { parent[$1] = $2 }
        END {
            for (id in parent) {
                for (above = parent[id]; above in parent && above != root; above = parent[above]);
                if (above == root) print id
            }
        }'
}
