#!/bin/sh
# Compares the exact class on two machines: sh tests/same_bits.sh HERE THERE..., both builds of
# tests/digest.c, the second with the emulator in front.
here=$("$1" | tr -d '\r' | grep '^exact')
shift
there=$("$@" 2>&1 | tr -d '\r' | grep '^exact')
if [ "$(printf '%s\n' "$here" | wc -l)" -eq 6 ] && [ "$here" = "$there" ]; then
    echo "6 passed, 0 failed"
else
    printf 'FAIL here:\n%s\nthere:\n%s\n0 passed, 1 failed\n' "$here" "$there"
    exit 1
fi
