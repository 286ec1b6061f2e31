#!/bin/sh
# Every build gives the same bits on every instruction set of this CPU: gcc with optimisation off,
# both compilers with it on, with the host's own -march, with OpenMP, and without the flag against
# contraction.  A build that cannot keep the bits does not compile, or opens no model.
#   sh tests/builds.sh
OUT=build/builds
EXACT="-ffp-contract=off"
passed=0 failed=0
mkdir -p $OUT

pass() { passed=$((passed + 1)); }
fail() { failed=$((failed + 1)); echo "FAIL $1"; }

# digests NAME: writes build NAME's digests on every instruction set to $OUT/NAME.txt
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
build gcc-native gcc -std=gnu17 -O2 -march=native -fopenmp
build clang-O1 clang -std=c11 -O1 $EXACT
build clang-native clang -std=gnu17 -O2 -march=native -fopenmp

# unsafe COMMAND...: a build that may change floats does not compile, opens no model, or gives
# the same bits.
unsafe() {
    if ! "$@" tests/digest.c -lm -o $OUT/unsafe 2>$OUT/err; then
        if grep -q "promises equal bits" $OUT/err; then pass; else fail "$*: $(head -n 3 $OUT/err)"; fi
        return
    fi
    bad=
    for isa in scalar avx2 avx512 neon; do
        GEMMA2_ISA=$isa $OUT/unsafe >$OUT/one 2>&1
        grep "^exact" $OUT/one | sed "s/^/$isa /" >$OUT/bits
        grep "^$isa exact" $OUT/gcc-O0.txt | cmp -s - $OUT/bits && continue
        grep -q "flag that changes results" $OUT/one || bad="$bad $isa"
    done
    if [ "$bad" ]; then fail "$*: other bits with$bad"; else pass; fi
}
for flag in -ffast-math -Ofast -funsafe-math-optimizations -ffinite-math-only -fno-signed-zeros \
    -ffp-contract=fast -freciprocal-math; do
    unsafe gcc -O1 $flag gemma2.c
    unsafe clang -O1 $flag gemma2.c
done
# The check at opening finds the flags that no macro shows: here clang's -freciprocal-math.
$OUT/unsafe | grep -q "flag that changes results" && pass || fail "reciprocals open a model"
for flags in -fassociative-math "-fassociative-math -fno-signed-zeros -fno-trapping-math" \
    -fsingle-precision-constant "-mrecip -fno-math-errno" "-flto -fno-math-errno"; do
    unsafe gcc -O2 $flags gemma2.c
done
for flags in -ffp-model=fast \
    "-fno-honor-infinities -fno-honor-nans -fapprox-func -fdenormal-fp-math=preserve-sign"; do
    unsafe clang -O1 $flags gemma2.c
done

# One host includes gemma2.c after a pragma of its own.  Another links with fast maths and so
# starts with denormals off.
pragma() { # COMPILER PRAGMA
    printf '#pragma %s\n#include "../../gemma2.c"\n' "$2" >$OUT/pragma.c
    unsafe "$1" -O1 $OUT/pragma.c
}
pragma gcc 'GCC optimize("fast-math")'
pragma gcc 'GCC optimize("associative-math", "no-signed-zeros")'
pragma clang 'clang fp reassociate(on)'
pragma clang 'float_control(precise, off, push)'
pragma clang 'clang fp contract(fast)'
gcc -O1 $EXACT -c gemma2.c -o $OUT/gemma2.o && unsafe gcc -O1 -ffast-math $OUT/gemma2.o

# A compiler without GNU C gets a message that says what works.
for cc in "g++ -x c++" "gcc -U__GNUC__"; do
    $cc -fsyntax-only gemma2.c 2>&1 | grep -q "with gcc or clang" && pass || fail "$cc"
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
