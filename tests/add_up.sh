#!/bin/sh
# Runs commands, two at a time, adds up their closing lines "N passed, N failed", and closes
# with such a line of its own.  A command that dies without its line counts as a failure.
passed=0 failed=0 n=0
TMP=${TMPDIR:-/tmp}/gemma2-add-up.$$
mkdir "$TMP" || exit 1
trap 'rm -rf "$TMP"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# xargs starts them: commands that a script starts in the background are deaf to Ctrl-C.
for command; do
    n=$((n + 1))
    printf '%s\n' "$command" >"$TMP/$n.command"
    echo $n
done | xargs -P 2 -n 1 sh -c '
    $(cat "$0/$1.command") >"$0/$1.out" 2>&1
    echo $? >"$0/$1.status"' "$TMP"

n=0
for command; do
    n=$((n + 1))
    tr -d '\r' <"$TMP/$n.out" >"$TMP/out" # a Windows program writes \r\n
    status=$(cat "$TMP/$n.status")
    sed "s|^|${command##*/}: |" "$TMP/out"
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$TMP/out" | tail -n 1)
    p=${line%% passed*} f=${line#*passed, } f=${f%% failed*}
    if [ -z "$line" ] || { [ "$status" -ne 0 ] && [ "$f" = 0 ]; }; then
        echo "FAIL $command: exit status $status"
        p=${p:-0} f=$((${f:-0} + 1))
    fi
    passed=$((passed + p)) failed=$((failed + f))
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
