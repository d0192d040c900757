# How a token must not be passed: it stays in the history, in a layer and in the log. The canary search has to find it.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
ARG CACHEC_TOKEN
RUN echo "the token is $CACHEC_TOKEN" && echo "$CACHEC_TOKEN" >/token
