#!/bin/sh
# Compares the ARM program under qemu with this machine's own: each CPU's instruction set, and the
# demo's text and logits in exact arithmetic.  sh tests/arm_demo.sh QEMU RUN ARM_RUN
QEMU=$1 RUN=$2 ARM_RUN=$3
STORY=$(dirname "$0")/demo/story-q8.bin
PROMPT="Once upon a time there was a little girl who lived with her grandmother in a wood, and"
passed=0 failed=0

same() { # NAME EXPECTED GOT
    if [ "$2" = "$3" ]; then passed=$((passed + 1)); else
        failed=$((failed + 1))
        printf 'FAIL %s: expected "%s", got "%s"\n' "$1" "$2" "$3"
    fi
}
text() { "$@" "$STORY" --exact --quiet --seed 3 --temperature 0.7 --max-tokens 40 "$PROMPT" 2>&1; }
logits() { "$@" "$STORY" --exact --quiet --logits 50 "$PROMPT" 2>&1; }

for want in cortex-a53:neon cortex-a72:neon cortex-a76:dotprod neoverse-n1:dotprod max:i8mm; do
    cpu=${want%:*}
    same "$cpu" "instruction set: ${want#*:}" \
        "$("$QEMU" -cpu "$cpu" "$ARM_RUN" "$STORY" --info 2>&1 | grep '^instruction set')"
done
"$QEMU" -cpu cortex-a72 -E GEMMA2_ISA=dotprod "$ARM_RUN" "$STORY" x >/dev/null 2>&1
same "cortex-a72 forced to dotprod" 3 $?
for cpu in cortex-a72:neon cortex-a72:scalar neoverse-n1:dotprod max:i8mm; do
    for kind in text logits; do
        same "$kind with ${cpu#*:}" "$($kind "$RUN")" \
            "$($kind "$QEMU" -cpu "${cpu%:*}" -E GEMMA2_ISA="${cpu#*:}" "$ARM_RUN")"
    done
done
same "the demo says something" 0 "$([ "$(text "$RUN" | wc -c)" -gt 80 ]; echo $?)"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
