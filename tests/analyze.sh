#!/bin/sh
# Static analysis of gemma2.c and run.c: sh tests/analyze.sh.  Passes if all tools find only what
# tests/analyze.known lists, each finding with the reason why it is no mistake.  A listed
# finding that no tool makes any more fails too.
HERE=$(dirname "$0")
OUT=build/analyze
mkdir -p $OUT

# clang-tidy's groups bugprone, cert, portability, performance and the analyzer.  Off are checks
# that ask for C11 Annex K, for a check of every fprintf, for another style (swappable
# parameters, memcmp without != 0, paddings, reserved _DEFAULT_SOURCE) or for parentheses around
# what a macro declares, and the two that fear overflow of int in a product of small constants
# and indexes.
TIDY='-*,bugprone-*,cert-*,portability-*,performance-*,clang-analyzer-*'
TIDY=$TIDY,-clang-analyzer-security.insecureAPI.DeprecatedOrUnsafeBufferHandling
TIDY=$TIDY,-clang-analyzer-optin.performance.Padding,-bugprone-easily-swappable-parameters
TIDY=$TIDY,-bugprone-suspicious-string-compare,-bugprone-reserved-identifier,-cert-dcl37-c
TIDY=$TIDY,-cert-dcl51-cpp,-cert-err33-c,-bugprone-implicit-widening-of-multiplication-result
TIDY=$TIDY,-bugprone-misplaced-widening-cast,-bugprone-not-null-terminated-result
TIDY=$TIDY,-bugprone-macro-parentheses

# run TOOL FILE COMMAND...: its findings as "TOOL FILE CHECK: the line's text"
run() {
    tool=$1 file=$2 found=$OUT/$1.$2
    shift 2
    "$@" >"$found.log" 2>&1
    status=$?
    sed -n "s/^.*$file:\([0-9]*\):[0-9]*: [a-z]*:.*\[\([^]]*\)\]\$/\1 \2/p" "$found.log" |
        while read -r line check; do
            printf '%s\n' "$tool $file $check: $(sed -n "${line}s/^ *//p" "$file")"
        done | sort -u >"$found.seen"
    grep -v '^#' "$HERE/analyze.known" | grep -vxFf - "$found.seen" | sed 's/^/FAIL /' >"$found.new"
    if [ $status -ne 0 ] && ! [ -s "$found.seen" ]; then
        echo "FAIL $tool $file: exit status $status: $(head -n 3 "$found.log")" >>"$found.new"
    fi
}

# gcc's analyzer runs beside the other two tools.
rm -f $OUT/*
for file in run.c gemma2.c; do
    run fanalyzer $file gcc -std=c11 -O1 -ffp-contract=off -fanalyzer -c $file -o $OUT/o &
    run clang-tidy $file clang-tidy --quiet --checks="$TIDY" $file -- -std=c11 -ffp-contract=off
    run cppcheck $file cppcheck --enable=warning,portability,performance --std=c11 --quiet \
        --max-configs=1 -D__x86_64__ -D__GNUC__ -D__linux__ -D__unix__ -D__SSE__ \
        --template='{file}:{line}:{column}: {severity}: {message} [{id}]' \
        --suppress=invalidPointerCast $file # tiles of floats are read where they lie in a file
    wait
done
passed=0 failed=0
for new in $OUT/*.new; do
    if [ -s "$new" ]; then failed=$((failed + 1)); else passed=$((passed + 1)); fi
done
cat $OUT/*.new
grep -v '^#' "$HERE/analyze.known" | sed 's/^/FAIL not found any more: /' >$OUT/known
cat $OUT/*.seen | sed 's/^/FAIL not found any more: /' | grep -vxFf - $OUT/known &&
    failed=$((failed + 1))
echo "$passed passed, $failed failed"
[ $failed -eq 0 ] && [ $passed -eq 6 ]
