# What `rust:slim` is to server.Dockerfile, with crates in a directory in place of a registry.
ARG RUST_IMAGE
FROM ${RUST_IMAGE}
COPY config.toml /usr/local/cargo/config.toml
COPY vendor /vendor
