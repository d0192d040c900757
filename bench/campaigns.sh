#!/bin/sh
# The server's campaigns at full length; continuous integration runs a short form of each with the other tests. The whole
# takes about two hours on two cores. Arguments name some of them: kills flips crowd entries timing.
set -eu
cd "$(dirname "$0")/.."
run() {
    name=$1 variable=$2 count=$3 test=$4
    echo "== $name: $count"
    env "$variable=$count" cargo test --release --locked --package cachec-server --test "$test" "$5" -- --nocapture
}
for campaign in ${@:-kills flips crowd entries timing}; do
    case $campaign in
        kills) run "kill -9 at any moment" CACHEC_KILLS "${COUNT:-1000}" durability a_killed_server ;;
        # A store is copied and opened for each flip: in memory, where there is such a directory.
        flips)
            (
                [ ! -w /dev/shm ] || export TMPDIR=/dev/shm
                run "flipped bits and cut files" CACHEC_FLIPS "${COUNT:-10000}" corruption flipped_bits
            )
            ;;
        crowd) run "slow clients" CACHEC_CONNECTIONS "${COUNT:-10000}" crowd a_crowd ;;
        timing) run "what is there and what is not, for strangers" CACHEC_REQUESTS "${COUNT:-20000}" namespaces who_may_not_read ;;
        entries) run "entries" CACHEC_ENTRIES "${COUNT:-10000000}" scale an_entry_costs ;;
        *) echo "no such campaign: $campaign" >&2; exit 2 ;;
    esac
done
