# The tests of ./run source this first: the program, the demo model, a folder of their own, and
# the counts.
RUN=${1:-./run}
HERE=$(dirname "$0")
STORY=$HERE/demo/story-q8.bin
TMP=${TMPDIR:-/tmp}/gemma2-$(basename "$0" .sh).$$
LC_ALL=C
OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # waiting threads that spin crawl on a busy machine
export LC_ALL OMP_WAIT_POLICY
case $RUN in */*) ;; *) RUN=./$RUN ;; esac
mkdir "$TMP" || exit 1
trap 'rm -rf "$TMP"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
passed=0 failed=0
# await COMMAND...: waits until it succeeds, some minutes at most.
await() {
    tries=0
    until "$@" 2>/dev/null || [ $tries -ge 9000 ]; do sleep 0.02; tries=$((tries + 1)); done
}
