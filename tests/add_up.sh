#!/bin/sh
# Runs commands and adds up their closing lines "N passed, N failed", and closes with
# such a line of its own.  A command that dies without its line counts as a failure.
passed=0 failed=0
for command in "$@"; do
    out=$($command 2>&1)
    status=$?
    out=$(printf '%s\n' "$out" | tr -d '\r') # of a Windows program
    printf '%s\n' "$out" | sed "s|^|${command##*/}: |"
    line=$(printf '%s\n' "$out" | grep -E '^[0-9]+ passed, [0-9]+ failed$' | tail -n 1)
    p=${line%% passed*} f=${line#*passed, } f=${f%% failed*}
    if [ -z "$line" ] || { [ $status -ne 0 ] && [ "$f" = 0 ]; }; then
        echo "FAIL $command: exit status $status"
        p=${p:-0} f=$((${f:-0} + 1))
    fi
    passed=$((passed + p)) failed=$((failed + f))
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
