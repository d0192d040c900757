# deploy/examples/Dockerfile without cachec, to compare with.
ARG RUST_IMAGE
ARG BASE_IMAGE
FROM ${RUST_IMAGE} AS build
WORKDIR /src
COPY . .
RUN cargo install --locked --path . --root /out

FROM ${BASE_IMAGE}
COPY --from=build /out/bin/ /usr/local/bin/
