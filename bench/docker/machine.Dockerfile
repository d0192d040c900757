# A build machine as an image, for containers with options that a RUN step cannot have.
ARG RUST_IMAGE
ARG CLIENT_IMAGE=cachec-client
FROM ${CLIENT_IMAGE} AS client
FROM ${RUST_IMAGE}
COPY --from=client /cachec /usr/local/bin/
ENV RUSTC_WRAPPER=cachec
WORKDIR /work
COPY . .
CMD cargo build --release --locked && target/release/small && cachec stats
