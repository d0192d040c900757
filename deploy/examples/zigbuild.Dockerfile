# One program for several targets from one builder: cargo-zigbuild links for an older glibc (or musl, or another
# machine) than the image has. The sources are mounted, not copied, so no layer has them.
#
#   docker build -f zigbuild.Dockerfile --build-arg CACHEC_URL=https://cache.example.org \
#       --secret id=cachec_token,src=token --build-arg TARGET=x86_64-unknown-linux-gnu.2.28 --output dist .
#
# Tested by bench/docker.sh with cargo-zigbuild 0.24.0 and ziglang 0.17.1 for the target above.
ARG RUST_IMAGE=rust:1.95-slim-bookworm
ARG CLIENT_IMAGE=cachec-client

# One static file, from deploy/docker/client.Dockerfile; or from the server, as in the other Dockerfile here.
FROM ${CLIENT_IMAGE} AS client

FROM ${RUST_IMAGE} AS tools
RUN command -v python3 >/dev/null && python3 -m venv --help >/dev/null || \
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv; }
# Versions are fixed: another zig is another linker, and every program is linked again. Zig is started by Python, whose
# compiled files are part of the linker then; with SOURCE_DATE_EPOCH they do not hold the time of this step.
RUN export SOURCE_DATE_EPOCH=1 && python3 -m venv /opt/zig && \
    /opt/zig/bin/pip install --no-cache-dir cargo-zigbuild==0.24.0 ziglang==0.17.1
ENV PATH=/opt/zig/bin:$PATH

FROM tools AS build
COPY --from=client /cachec /usr/local/bin/
ARG CACHEC_URL
ARG TARGET=x86_64-unknown-linux-gnu.2.28
ENV RUSTC_WRAPPER=cachec
WORKDIR /src
# Mounted sources cannot be written to, so the target directory is elsewhere; it goes away with this stage.
RUN --mount=type=bind,target=. \
    --mount=type=secret,id=cachec_token \
    cargo zigbuild --locked --release --target "$TARGET" --target-dir /target && \
    cachec stats && \
    mkdir /out && \
    find "/target/${TARGET%.2.*}/release" -maxdepth 1 -type f -executable -exec cp {} /out/ ';'

FROM scratch
COPY --from=build /out/ /
