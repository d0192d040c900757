# Debian's Caddy, Prometheus and docker-compose in one image, in the place of their makers' images.
ARG SLIM_IMAGE
FROM ${SLIM_IMAGE}
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends caddy prometheus docker-compose >/dev/null && \
    rm -rf /var/lib/apt/lists/* && install -d -o 65534 -g 65534 /prometheus
# As in Caddy's own image.
ENV XDG_CONFIG_HOME=/config XDG_DATA_HOME=/data
ENTRYPOINT []
