# A cache mount as the local tier: builds on this machine restore from it without asking the server. Unlike a target
# directory in a cache mount it may be shared by builds that run at the same time, of other branches and programs too,
# and nothing is lost where the engine throws it away.
#
#   docker build -f cache-mount.Dockerfile --build-arg CACHEC_URL=https://cache.example.org \
#       --secret id=cachec_token,src=token .
#
# Without CACHEC_URL the mount alone is used. Tested by bench/docker.sh, two builds at a time.
ARG RUST_IMAGE=rust:1.95-slim-bookworm
ARG BASE_IMAGE=debian:bookworm-slim
ARG CLIENT_IMAGE=cachec-client

FROM ${CLIENT_IMAGE} AS client

FROM ${RUST_IMAGE} AS build
COPY --from=client /cachec /usr/local/bin/
ARG CACHEC_URL
ENV RUSTC_WRAPPER=cachec CACHEC_DIR=/var/cache/cachec CACHEC_DIR_SIZE=5GiB
WORKDIR /src
COPY . .
# sharing=shared is the default, and said because cachec allows it; `locked` would have builds wait for each other.
RUN --mount=type=cache,id=cachec,target=/var/cache/cachec,sharing=shared \
    --mount=type=secret,id=cachec_token \
    cargo install --locked --path . --root /out && \
    cachec stats

FROM ${BASE_IMAGE}
COPY --from=build /out/bin/ /usr/local/bin/
