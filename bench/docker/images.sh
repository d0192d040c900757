# shellcheck shell=bash
# Base images without a registry: debootstrap makes what `debian:bookworm-slim` is, and the machine's own toolchain is
# copied over it.

SLIM_IMAGE=cachec-test/slim
# With the toolchain and the Dockerfile they are made from, so that none is kept for another.
RUST_IMAGE=cachec-test/rust:$({ rustc -vV 2>/dev/null || true; cat "$HERE/toolchain.Dockerfile"; } | sha256sum | head -c 12)
ZIG_IMAGE=${RUST_IMAGE/rust:/rust-zig:}
SERVICES_IMAGE=cachec-test/services:$(sha256sum "$HERE/services.Dockerfile" | head -c 12)

# Where this machine's apt gets Debian from, proxy variables included, is never written down anywhere.
debian_mirror() {
    apt-get indextargets --format '$(REPO_URI)|$(RELEASE)|$(COMPONENT)' 'Created-By: Packages' 2>/dev/null |
        awk -F'|' '$2 == "bookworm" && $3 == "main" { print $1; exit }'
}

make_slim_image() {
    ! has_image "$SLIM_IMAGE" || return 0
    say "making a base image with debootstrap"
    local mirror
    mirror=$(debian_mirror)
    debootstrap --variant=minbase --include=ca-certificates bookworm "$WORK/slim" ${mirror:+"$mirror"} >"$LOGS/debootstrap.log" 2>&1 ||
        skip "debootstrap cannot make a base image: $(tail -1 "$LOGS/debootstrap.log")"
    rm -rf "$WORK"/slim/var/cache/apt/* "$WORK"/slim/var/lib/apt/lists/*
    # Authorities that this machine trusts besides, for a mirror behind a proxy.
    cp /etc/ssl/certs/ca-certificates.crt "$WORK/slim/etc/ssl/certs/"
    tar -C "$WORK/slim" -c . | docker import - "$SLIM_IMAGE" >/dev/null
    rm -rf "$WORK/slim"
}

has_image() {
    docker image inspect "$1" >/dev/null 2>&1
}

# Makes an image with Rust and these packages. The network is the machine's, for apt alone.
make_rust_image() {
    local name=$1 packages=$2
    ! has_image "$name" || return 0
    say "making $name: the toolchain and $packages"
    local proxies=() variable
    for variable in http_proxy https_proxy no_proxy; do
        [ -z "${!variable:-}" ] || proxies+=(--build-arg "$variable=${!variable}")
    done
    docker build --network=host --progress=plain -f "$HERE/toolchain.Dockerfile" --build-arg "SLIM_IMAGE=$SLIM_IMAGE" \
        --build-arg "PACKAGES=$packages" ${proxies[@]+"${proxies[@]}"} -t "$name" "$(rustc --print sysroot)" >"$LOGS/image.log" 2>&1 ||
        { tail -5 "$LOGS/image.log" >&2; return 1; }
}

# The same with Python, and the wheels of zig where pip finds them.
make_zig_image() {
    make_rust_image "$ZIG_IMAGE-python" "gcc libc6-dev curl python3-venv"
    local wheels="$WORK/wheels"
    mkdir -p "$wheels"
    if [ -n "${ZIG_WHEELS:-}" ]; then
        cp "$ZIG_WHEELS"/*.whl "$wheels/"
    else
        say "fetching the wheels of zig"
        python3 -m pip download -q --no-deps --only-binary :all: -d "$wheels" cargo-zigbuild==0.24.0 ziglang==0.17.1
    fi
    docker build -q -f "$HERE/wheels.Dockerfile" --build-arg "RUST_IMAGE=$ZIG_IMAGE-python" -t "$ZIG_IMAGE" "$wheels" >/dev/null
}
