#!/bin/sh
# Sets cachec up in a GitHub job (action.yml): the client from the server, a session in place of the job's own token, and
# the variables for the steps after this one. Whatever goes wrong, the job goes on without cachec and a warning says why.
#
# Environment: CACHEC_URL, CACHEC_NAMESPACE, CACHEC_AUDIENCE, CACHEC_MODE (may be empty), and what GitHub sets.
set -u

give_up() {
    echo "::warning title=cachec::not used: $1"
    exit 0
}

directory=$RUNNER_TEMP/cachec
mkdir -p "$directory" || give_up "cannot write to $RUNNER_TEMP"
umask 077
url=${CACHEC_URL%/}

# An installer that comes in half must not run.
curl -fsS --retry 3 --max-time 60 -o "$directory/install.sh" "$url/install.sh" ||
    give_up "the server at $url has no client for us"
CACHEC_URL=$url CACHEC_INSTALL_DIR=$directory/bin sh "$directory/install.sh" || give_up "the client cannot be installed"

if [ -n "${ACTIONS_ID_TOKEN_REQUEST_URL:-}" ]; then
    # By files and standard input: what is in arguments, other processes see.
    answer=$(printf 'header = "Authorization: bearer %s"\n' "$ACTIONS_ID_TOKEN_REQUEST_TOKEN" |
        curl -fsS --retry 3 --max-time 30 --config - "$ACTIONS_ID_TOKEN_REQUEST_URL&audience=$CACHEC_AUDIENCE") ||
        give_up "GitHub gives this job no token"
    proof=$(printf '%s' "$answer" | sed -n 's/.*"value" *: *"\([^"]*\)".*/\1/p')
    echo "::add-mask::$proof"
    printf 'header = "Authorization: Bearer %s"\n' "$proof" |
        curl -fsS --retry 3 --max-time 30 --config - --request POST -o "$directory/token" "$url/v1/$CACHEC_NAMESPACE/token" ||
        give_up "the server gives this job no session for the namespace $CACHEC_NAMESPACE"
    echo "::add-mask::$(cat "$directory/token")"
    echo "CACHEC_TOKEN_FILE=$directory/token" >>"$GITHUB_ENV"
else
    echo "::notice title=cachec::no token: the job lacks \`permissions: id-token: write\`, as those of forks do"
fi

# What a pull request compiles is not for others.
case ${CACHEC_MODE:-}:${GITHUB_EVENT_NAME:-} in
    :pull_request*) mode=read-only ;;
    :*) mode=read-write ;;
    *) mode=$CACHEC_MODE ;;
esac
cat >>"$GITHUB_ENV" <<END
RUSTC_WRAPPER=$directory/bin/cachec
CACHEC_URL=$url
CACHEC_NAMESPACE=$CACHEC_NAMESPACE
CACHEC_MODE=$mode
END
echo "$directory/bin" >>"$GITHUB_PATH"
echo "cachec: $url, namespace $CACHEC_NAMESPACE, $mode"
