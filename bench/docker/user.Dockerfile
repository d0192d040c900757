# A RUN step as another user, who can read the secret, with HOME=/.
ARG RUST_IMAGE
ARG CLIENT_IMAGE=cachec-client
FROM ${CLIENT_IMAGE} AS client
FROM ${RUST_IMAGE}
COPY --from=client /cachec /usr/local/bin/
ARG CACHEC_URL
ENV RUSTC_WRAPPER=cachec HOME=/
WORKDIR /work
RUN chown 1000 .
USER 1000
COPY --chown=1000 . .
RUN --mount=type=secret,id=cachec_token,uid=1000 \
    cargo build --release --locked && target/release/small && { cachec stats || true; }
