# An image whose pip finds wheels in a directory, instead of asking an index that is out of its reach.
ARG RUST_IMAGE
FROM ${RUST_IMAGE}
COPY *.whl /wheels/
ENV PIP_FIND_LINKS=/wheels PIP_NO_INDEX=1
