#!/bin/sh
# Passes if a command fails as it must: sh tests/must_fail.sh STATUS LINES PATTERN COMMAND...
# It must exit with STATUS and print PATTERN, in at most LINES lines (0: any number).
status=$1 lines=$2 pattern=$3
shift 3
out=$("$@" 2>&1)
got=$?
count=$(printf '%s\n' "$out" | wc -l)
if [ $got -eq "$status" ] && printf '%s\n' "$out" | grep -q "$pattern" &&
    { [ "$lines" -eq 0 ] || [ "$count" -le "$lines" ]; }; then
    echo "1 passed, 0 failed"
else
    printf 'FAIL %s: exit status %s, not %s, or no "%s":\n%s\n' "$*" $got "$status" "$pattern" \
        "$(printf '%s\n' "$out" | head -n 5)"
    echo "0 passed, 1 failed"
    exit 1
fi
