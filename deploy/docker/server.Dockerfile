# The server, with the client that matches it.
#
#   docker build -f deploy/docker/server.Dockerfile -t cachec-server .
#   docker volume create cachec
#   docker run --rm -v cachec:/var/lib/cachec cachec-server token create --namespace default --allow read,write
#   docker run -d --name cachec -p 7373:7373 -v cachec:/var/lib/cachec --read-only --cap-drop ALL cachec-server
#
# With --build-arg PROGRAMS=prebuilt and a directory with both programs as the context nothing is compiled:
#
#   deploy/build.sh && docker build -f deploy/docker/server.Dockerfile --build-arg PROGRAMS=prebuilt target/release
#
# Tested by bench/docker.sh with Docker 20.10.24 (BuildKit), with programs that are there; from source by its long form.
ARG RUST_IMAGE=rust:1.95-slim-bookworm
ARG BASE_IMAGE=debian:bookworm-slim
ARG PROGRAMS=source

FROM ${RUST_IMAGE} AS source
# RocksDB's build needs them.
RUN apt-get update -qq && \
    apt-get install -y -qq --no-install-recommends g++ libclang-dev && \
    rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# First the server: both share dependencies, and the flag for a static client would build them again for it.
RUN --mount=type=cache,id=cachec-server-target,target=/src/target,sharing=locked \
    cargo build --release --locked --package cachec-server && \
    cargo rustc --release --locked --package cachec --bin cachec -- -C target-feature=+crt-static && \
    install -D -t /programs target/release/cachec target/release/cachec-server

FROM ${BASE_IMAGE} AS prebuilt
COPY --chmod=755 cachec cachec-server /programs/

FROM ${PROGRAMS} AS programs

FROM ${BASE_IMAGE}
# A fixed number, so that a volume's files belong to the same user after every update, and for `runAsUser`.
RUN useradd --system --uid 7373 --user-group --home-dir /var/lib/cachec --shell /usr/sbin/nologin cachec && \
    install -d -o cachec -g cachec -m 700 /var/lib/cachec
COPY --from=programs /programs/cachec-server /usr/local/bin/
COPY --from=programs /programs/cachec /usr/local/share/cachec/clients/x86_64-linux
USER 7373:7373
# It does not start at this address before there is a token (above).
ENV CACHEC_SERVER_LISTEN=0.0.0.0:7373 CACHEC_SERVER_DATA=/var/lib/cachec
VOLUME /var/lib/cachec
EXPOSE 7373
# It finishes requests in flight, then closes the store.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 \
    CMD ["cachec-server", "health", "--url", "http://127.0.0.1:7373"]
ENTRYPOINT ["cachec-server"]
CMD ["serve"]
