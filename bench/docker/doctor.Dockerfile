# What `cachec doctor` finds in a RUN step.
ARG RUST_IMAGE
FROM ${RUST_IMAGE}
COPY cachec /usr/local/bin/
ARG CACHEC_URL
RUN --mount=type=secret,id=cachec_token cachec doctor
