# What `rust:slim` is: Debian, a C compiler and this machine's toolchain. Its context is the toolchain's directory.
ARG SLIM_IMAGE
FROM ${SLIM_IMAGE}
ARG PACKAGES
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends ${PACKAGES} >/dev/null && rm -rf /var/lib/apt/lists/*
ENV CARGO_HOME=/usr/local/cargo PATH=/usr/local/cargo/bin:/usr/local/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
RUN mkdir -m 1777 -p /usr/local/cargo/bin
# Without its documentation (toolchain.Dockerfile.dockerignore) it is half as large.
COPY . /usr/local/rust/
