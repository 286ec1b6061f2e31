#!/bin/sh
# Prints a table of how often guesses come true: sh tests/acceptance.sh ./run BENCH MODEL DRAFT.
# Replies to tasks are given, as a large model would write them.  MODEL writes the prose, which
# DRAFT guesses too.  Each pass takes four guesses.
. "$(dirname "$0")/start.sh"
BENCH=$2 MODEL=$3 DRAFT=$4
cat >"$TMP/passage" <<'END'
The miller had three sons, a mill, an ass and a cat. The eldest son took the mill, the second took
the ass, and nothing was left for the youngest but the cat. He sat down by the road and said, My
brothers can live well together, but I shall die of hunger when I have eaten my cat. The cat heard
every word of it, and told him to have no fear, and to give her a bag and a pair of boots.
END
row() { awk -F '|' -v name="$1" '{ printf "| %s | %d | %.0f %% | %.2f |\n", name, $1,
    100 * $4 / ($3 ? $3 : 1), $1 / $2 }'; }
told() { # NAME, the reply on standard input
    { cat "$TMP/passage"; echo --; cat; } >"$TMP/told"
    "$BENCH" "$MODEL" --told "$TMP/told" | row "lookup, $1"
}
prose() { # NAME OPTION...
    name=$1
    shift
    set -- -q --json -n 300 -s 1 --draft-max 4 "$@" "Once upon a time there was a king who"
    "$RUN" "$MODEL" "$@" | sed 's/.*"passes": /300|/; s/[^0-9|]*[a-z][^0-9|]*/|/g; s/}//' |
        row "$name"
}
echo "| guesses, text | tokens | right | tokens a pass |"
echo "|---|---|---|---|"
told "quoting" <"$TMP/passage"
sed 's/youngest/youngest daughter/; s/three sons/three children/; s/cat/goat/g; s/He sat/She sat/' \
    "$TMP/passage" | told "rewriting"
echo "The eldest son got the mill, the second got the ass, the youngest got the cat, and the cat \
asked for a bag and a pair of boots." | told "extracting"
prose "lookup, prose at temperature 0.8" -t 0.8
for t in 0 0.8; do
    prose "draft, prose at temperature $t" -t $t --lookup off --draft "$DRAFT"
done
