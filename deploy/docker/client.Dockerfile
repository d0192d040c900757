# The client alone, for other Dockerfiles: COPY --from=cachec-client /cachec /usr/local/bin/
#
#   docker build -f deploy/docker/client.Dockerfile -t cachec-client target/release
#
# The context is the directory of the static client, which this builds:
#   cargo rustc --release --locked -p cachec --bin cachec -- -C target-feature=+crt-static
FROM scratch
COPY --chmod=755 cachec /cachec
ENTRYPOINT ["/cachec"]
