#!/bin/sh
# Fuzzes each target of tests/fuzz.c for some seconds: sh tests/fuzz.sh PROGRAM SECONDS
# [TARGET...].  Starts from tests/fuzz/TARGET and the inputs of earlier runs in build/fuzz-corpus.
# Inputs that break something are left in build/.  Prints executions by target and their sum, then
# "N passed, N failed".
program=$1 seconds=$2
shift 2
[ $# -gt 0 ] || set -- weights tokenizer encode decode chat session ahead cli grammar schema batch editor json
ASAN_OPTIONS=detect_leaks=1:abort_on_error=0:${ASAN_OPTIONS:-}
export ASAN_OPTIONS
passed=0 failed=0 sum=0
for target; do
    case $target in
    weights) longest=24576 silent=1 ;; session) longest=16384 silent=1 ;;
    tokenizer | chat | grammar | editor) longest=300 silent=1 ;;
    schema) longest=500 silent=3 ;; cli) longest=200 silent=3 ;;
    batch | json) longest=400 silent=3 ;; *) longest=100 silent=1 ;;
    esac
    corpus=build/fuzz-corpus/$target
    mkdir -p "$corpus"
    GEMMA2_FUZZ=$target "$program" -max_total_time="$seconds" -max_len=$longest -timeout=60 \
        -close_fd_mask=$silent -print_final_stats=1 -artifact_prefix="build/$target-" \
        "$corpus" "tests/fuzz/$target" >"build/fuzz-$target.log" 2>&1
    status=$?
    n=$(sed -n 's/^stat::number_of_executed_units: *//p' "build/fuzz-$target.log" | tail -n 1)
    n=${n:-0}
    sum=$((sum + n))
    if [ $status -eq 0 ] && [ "$n" -gt 0 ]; then
        passed=$((passed + 1))
        echo "$target: $n executions"
    else
        failed=$((failed + 1))
        echo "FAIL $target: $n executions, then exit status $status; the log's end:"
        grep -v -e NEW -e REDUCE -e pulse "build/fuzz-$target.log" | tail -n 30
    fi
done
echo "$sum executions in all"
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
