#!/bin/sh
# Installs the cachec client from a server that hands it out:
#   curl -fsS "$CACHEC_URL/install.sh" | CACHEC_URL="$CACHEC_URL" sh
# CACHEC_INSTALL_DIR says where to; without it /usr/local/bin.
set -eu
: "${CACHEC_URL:?has to be set to the URL of the server}"
directory=${CACHEC_INSTALL_DIR:-/usr/local/bin}
url=${CACHEC_URL%/}/client/$(uname -m)-$(uname -s | tr '[:upper:]' '[:lower:]')

mkdir -p "$directory"
file=$(mktemp "$directory/.cachec.XXXXXX")
trap 'rm -f "$file"' EXIT
if command -v curl >/dev/null; then
    curl -fsS -o "$file" "$url"
elif command -v wget >/dev/null; then
    wget -q -O "$file" "$url"
else
    echo "cachec: neither curl nor wget is here to fetch $url with" >&2
    exit 1
fi
chmod 755 "$file"
"$file" --version
mv "$file" "$directory/cachec"
