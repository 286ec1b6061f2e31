#!/bin/sh
# The same bits from every build: two compilers, optimisation off, and on with the host's own
# -march, OpenMP and without the flag against contraction; on every instruction set this CPU
# has.  A build that could not keep them does not compile.  sh tests/builds.sh
OUT=build/builds
EXACT="-ffp-contract=off"
passed=0 failed=0
mkdir -p $OUT

pass() { passed=$((passed + 1)); }
fail() { failed=$((failed + 1)); echo "FAIL $1"; }

# digests NAME: of build NAME for every instruction set, into $OUT/NAME.txt
digests() {
    for isa in scalar avx2 avxvnni avx512 avx512bf16 amx neon dotprod i8mm; do
        GEMMA2_ISA=$isa $OUT/"$1" >$OUT/one 2>&1 && sed "s/^/$isa /" $OUT/one
    done >$OUT/"$1".txt
}

# build NAME COMMAND...: compiles, and compares with the first build
build() {
    name=$1
    shift
    if ! "$@" tests/digest.c gemma2.c -lm -o $OUT/"$name" 2>$OUT/err; then
        fail "$name: $(head -n 3 $OUT/err)"
        return
    fi
    digests "$name"
    if ! [ -s $OUT/"$name".txt ]; then fail "$name computes nothing"
    elif cmp -s $OUT/gcc-O0.txt $OUT/"$name".txt; then pass
    else fail "$name: $(diff $OUT/gcc-O0.txt $OUT/"$name".txt | head -n 4)"; fi
}

build gcc-O0 gcc -std=c11 -O0 $EXACT
exact=$(sed -n 's/^[a-z0-9]* exact //p' $OUT/gcc-O0.txt | sort -u | wc -l)
[ "$exact" -eq 6 ] && pass || fail "$exact digests in the exact class, not one for each of 6 models"
build gcc-native gcc -std=gnu17 -O3 -march=native -fopenmp
build clang-O0 clang -std=c11 -O0 $EXACT
build clang-native clang -std=gnu17 -O2 -march=native -fopenmp
for bad in "gcc -O3 -ffast-math" "clang -O3 -ffast-math" "gcc -Ofast"; do
    if $bad -fsyntax-only gemma2.c 2>$OUT/err; then fail "$bad compiles"
    elif grep -q "without -ffast-math" $OUT/err; then pass
    else fail "$bad: $(head -n 3 $OUT/err)"; fi
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
