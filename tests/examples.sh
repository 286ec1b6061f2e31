#!/bin/sh
# Runs the examples on the demo model and compares their output with the command line's:
# sh tests/examples.sh FOLDER [./run], where FOLDER holds the built example_*.
DIR=${1:-build}
[ $# -eq 0 ] || shift
. "$(dirname "$0")/start.sh"
P="Once upon a time there was"

claim() { # WHAT COMMAND...: the command succeeds
    what=$1
    shift
    if "$@"; then passed=$((passed + 1)); else
        failed=$((failed + 1))
        echo "FAIL $what"
        head -c 300 "$TMP/out"
    fi
}
same() { claim "$1 differs from run" cmp -s "$TMP/out" "$TMP/want"; }
# repeated FILE: how many runs of 5 words occur more than once.
repeated() { tr -s ' \n' '\n\n' <"$1" | awk '{ w[NR] = $0 }
    END { for (i = 5; i <= NR; i++) n[w[i-4] " " w[i-3] " " w[i-2] " " w[i-1] " " w[i]]++
          for (k in n) twice += n[k] > 1; print twice + 0 }'; }

"$DIR/example_minimal" "$STORY" "$P" >"$TMP/out"; claim "minimal: exit status" [ $? -eq 0 ]
"$RUN" "$STORY" -q -t 0 -n 60 "$P" >"$TMP/want"
same "minimal"
claim "minimal says enough" [ "$(wc -c <"$TMP/out")" -gt 100 ]

printf 'Who are you?\nAnd where do you live?\n' | "$DIR/example_chat" "$STORY" >"$TMP/out"
claim "chat: exit status" [ $? -eq 0 ]
for turn in "Who are you?" "And where do you live?"; do
    "$RUN" "$STORY" -q -c -t 0 -n 40 --exact --session "$TMP/chat" "$turn"
done >"$TMP/want"
same "chat of two turns"
claim "chat says enough" [ "$(wc -c <"$TMP/out")" -gt 100 ]

"$DIR/example_sampler" "$STORY" "$P" >"$TMP/out"; claim "sampler: exit status" [ $? -eq 0 ]
"$RUN" "$STORY" -q -t 0 -n 150 --exact "$P" >"$TMP/want"
claim "greedy text repeats itself" [ "$(repeated "$TMP/want")" -gt 0 ]
claim "the sampler's text repeats itself" [ "$(repeated "$TMP/out")" -eq 0 ]
claim "sampler says enough" [ "$(wc -c <"$TMP/out")" -gt 300 ]

for example in minimal chat sampler; do
    "$DIR/example_$example" >"$TMP/out" 2>&1
    claim "$example without arguments" [ $? -eq 1 ]
    claim "$example: usage" grep -q "usage: example_$example MODEL" "$TMP/out"
    [ $example = chat ] && set -- "$TMP/none" || set -- "$TMP/none" x
    "$DIR/example_$example" "$@" >"$TMP/out" 2>&1
    claim "$example without a model" grep -q "cannot open" "$TMP/out"
done

# The first page of gemma2.c sends readers to functions: the rest has all of them.
sed '1,/SAME BITS/d' "$HERE/../gemma2.c" | grep -oE '[a-z0-9_]+' | sort -u >"$TMP/names"
sed '/SAME BITS/,$d' "$HERE/../gemma2.c" | grep -oE '[a-z0-9]+(_[a-z0-9]+)+' | sort -u |
    grep -vxFf "$TMP/names" >"$TMP/out"
claim "the first page of gemma2.c names what is not there:" [ ! -s "$TMP/out" ]

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
