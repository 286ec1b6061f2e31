#!/bin/sh
# Tests what `make install` leaves, from outside: make test-install, or sh tests/install.sh from the
# root.  Programs are built against the staged library as C11 and C++17, static and shared.
# It needs a C++ compiler, pkg-config, nm, groff and the shells that completions are for.
# A missing tool is a failure.
MAKE=${MAKE:-make} CC=${CC:-cc} CXX=${CXX:-c++}
HERE=$(dirname "$0")
TMP=${TMPDIR:-/tmp}/gemma2-install.$$
STRICT="-Wall -Wextra -Wpedantic -Wshadow -Werror"
mkdir "$TMP" || exit 1
trap 'rm -rf "$TMP"' EXIT
passed=0 failed=0
claim() { # WHAT COMMAND...: the command succeeds
    what=$1
    shift
    if "$@" >"$TMP/log" 2>&1; then passed=$((passed + 1)); else
        failed=$((failed + 1))
        echo "FAIL $what: $*"
        head -n 20 "$TMP/log"
    fi
}
files() { (cd "$1" && find . ! -type d | sort); }

# ---- What is there -------------------------------------------------------------------
D=$TMP/stage
ROOT=$D/opt/gemma
umask 077 # the installer's own: all may still read what it installs
claim "install" $MAKE -s install DESTDIR="$D" PREFIX=/opt/gemma
claim "all can read it" test -z "$(find "$D" ! -perm -444 -o -type d ! -perm -555)"
files "$ROOT" >"$TMP/files"
for file in bin/gemma2 bin/gemma2-export include/gemma2.h lib/libgemma2.a lib/pkgconfig/gemma2.pc \
    share/man/man1/gemma2.1 share/bash-completion/completions/gemma2 \
    share/zsh/site-functions/_gemma2 share/fish/vendor_completions.d/gemma2.fish \
        share/gemma2/tokenizer.bin; do
    claim "$file" test -s "$ROOT/$file"
done
claim "13 files" test "$(wc -l <"$TMP/files")" -eq 13
claim "no file outside" test "$(files "$D" | wc -l)" -eq 13
claim "the converter runs" sh -c "'$ROOT/bin/gemma2-export' --help | grep -q 'usage: gemma2-export'"
claim "the header is this one" cmp gemma2.h "$ROOT/include/gemma2.h"
LIB=$ROOT/lib
VERSION=$(sed -n 's/.*GEMMA2_VERSION_STRING "\(.*\)"/\1/p' gemma2.h)
case $(uname -s) in
Darwin) LOAD=DYLD_LIBRARY_PATH SHARED=$LIB/libgemma2.dylib ;;
*) LOAD=LD_LIBRARY_PATH SHARED=$LIB/libgemma2.so
   claim "soname" sh -c "objdump -p '$SHARED' | grep -q 'SONAME *libgemma2.so.${VERSION%%.*}$'"
   claim "the soname's file" test -e "$LIB/libgemma2.so.${VERSION%%.*}" ;;
esac

# ---- Symbols: every function of the header, and no other --------------------------------
sed -n 's/^GEMMA2_API .*[ *]\(gemma2_[a-z0-9_]*\)(.*/\1/p' gemma2.h | sort >"$TMP/declared"
claim "the header declares functions" test "$(wc -l <"$TMP/declared")" -gt 35
nm -D "$SHARED" 2>/dev/null | awk 'NF == 3 && $2 != "U" { print $3 }' | sort >"$TMP/shared"
nm -g "$LIB/libgemma2.a" | awk 'NF == 3 && $2 != "U" { print $3 }' | sort >"$TMP/static"
claim "symbols of the shared library" diff "$TMP/declared" "$TMP/shared"
claim "symbols of the static library" diff "$TMP/declared" "$TMP/static"
nm -g "$LIB/libgemma2.a" | awk '$1 == "U" { print $2 }' >"$TMP/needed"
claim "never ends the process" sh -c "! grep -xE '_?(abort|exit|_exit|_Exit|raise|signal|sigaction|__assert_fail|f?printf|puts|perror|setlocale)' '$TMP/needed'"

# ---- Programs against it -----------------------------------------------------------------
pc() { PKG_CONFIG_SYSROOT_DIR="$D" PKG_CONFIG_PATH="$LIB/pkgconfig" pkg-config "$@" gemma2; }
claim "pkg-config" pc --exists
claim "version of the .pc file" test "$(pc --modversion)" = "$VERSION"
# The header's program, as tests/test_header.c has it.
sed -n '/^\/\* example \*\//,/^\/\* end \*\//p' "$HERE/test_header.c" |
    sed 's|"../gemma2.h"|"gemma2.h"|' >"$TMP/header.c"
claim "the header's program" test "$(wc -l <"$TMP/header.c")" -gt 40
build() { # FOLDER LIBRARIES COMPILER...
    to=$1 libraries=$2
    shift 2
    mkdir "$to"
    for name in minimal chat sampler header; do
        source=$HERE/example_$name.c
        [ $name = header ] && source=$TMP/header.c
        claim "$name: $*" "$@" $STRICT "$source" -o "$to/example_$name" -x none \
            $(pc --cflags) $libraries
    done
}
build "$TMP/c-shared" "$(pc --libs)" $CC -std=c11 -x c
build "$TMP/c-static" "$LIB/libgemma2.a $(pc --libs --static | sed 's/-lgemma2//')" $CC \
    -std=c11 -x c
build "$TMP/c++-shared" "$(pc --libs)" $CXX -std=c++17 -x c++
build "$TMP/c++-static" "$LIB/libgemma2.a $(pc --libs --static | sed 's/-lgemma2//')" $CXX \
    -std=c++17 -x c++
for kind in c-shared c-static c++-shared c++-static; do
    claim "examples, $kind" env $LOAD="$LIB" sh "$HERE/examples.sh" "$TMP/$kind" "$ROOT/bin/gemma2"
    env $LOAD="$LIB" "$TMP/$kind/example_header" "$HERE/demo/story-q8.bin" "Once upon" \
        >"$TMP/$kind.txt"
    claim "the header's program, $kind" test "$(wc -c <"$TMP/$kind.txt")" -gt 100
    claim "the same text" cmp "$TMP/c-shared.txt" "$TMP/$kind.txt"
done
claim "compiles a program that unloads it" $CC $STRICT -std=c11 $(pc --cflags) "$HERE/unload.c" \
    -o "$TMP/unload" -ldl
claim "unloaded, its host goes on" "$TMP/unload" "$SHARED" "$HERE/demo/story-q8.bin"
claim "shared is shared" sh -c \
    "! LD_LIBRARY_PATH= '$TMP/c-shared/example_chat'  2>&1 | grep -q usage"

# ---- The program, its page, its completions --------------------------------------------------
"$ROOT/bin/gemma2" --help >"$TMP/help"
claim "calls itself gemma2" grep -q '^usage: gemma2 MODEL' "$TMP/help"
claim "nowhere else" sh -c "! grep -w run '$TMP/help' | grep -vi 'runs\|running'"
printf 'GGUF\003\000\000\000' >"$TMP/model.gguf"
claim "names the installed converter" sh -c "'$ROOT/bin/gemma2' '$TMP/model.gguf' x 2>&1 | grep -q 'with: gemma2-export $TMP/model.gguf model.bin'"
PAGE=$ROOT/share/man/man1/gemma2.1
groff -ww -man -Tascii -P-c -P-b -P-u "$PAGE" >"$TMP/page" 2>"$TMP/warnings"
claim "roff without warnings" test -s "$TMP/page" -a ! -s "$TMP/warnings"
claim "mandoc" mandoc -T lint -W error "$PAGE"
for section in NAME SYNOPSIS OPTIONS "EXIT STATUS"; do
    claim "section $section" grep -q "^$section$" "$TMP/page"
done
claim "an option in the page" grep -q "^ *-n, --max-tokens N$" "$TMP/page"
claim "bash takes its completion" bash -n "$ROOT/share/bash-completion/completions/gemma2"
claim "zsh takes its completion" zsh -n "$ROOT/share/zsh/site-functions/_gemma2"
claim "fish takes its completion" fish -n "$ROOT/share/fish/vendor_completions.d/gemma2.fish"
completes() { # WORDS EXPECTED: what bash offers for the last word
    bash -c 'cd "$1"; . "$2"; COMP_WORDS=(gemma2 $3); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
             _gemma2; IFS=,; test "${COMPREPLY[*]}" = "$4"' - \
        "$TMP/words" "$ROOT/share/bash-completion/completions/gemma2" "$1" "$2"
}
mkdir "$TMP/words"; : >"$TMP/words/a model.bin"; : >"$TMP/words/a text.txt"
claim "completes an option" completes "--max" "--max-tokens"
claim "completes several" completes "--te" "--temperature"
claim "completes a word" completes "--kv f" "f32,f16"
claim "after = as well" completes "m.bin --kv = f" "f32,f16"
claim "and at once" completes "m.bin --kv =" "f32,f16,q8"
claim "completes a file to write" completes "m.bin --importance a" "a model.bin,a text.txt"
claim "zsh puts no letters together" sh -c \
    "! grep -q '_arguments -s' '$ROOT/share/zsh/site-functions/_gemma2'"
claim "completes a file" completes "a" "a model.bin,a text.txt"
claim "completes a file after its option" completes "m.bin -f a" "a model.bin,a text.txt"
claim "completes no number" completes "m.bin -n 1" ""

# ---- What make says -----------------------------------------------------------------------
claim "make help in whole lines" sh -c \
    "$MAKE -s help | awk 'length > 79 || !/^[a-z0-9-]+  *[A-Z].*[.]$/ { exit 1 }'"
cp -R Makefile gemma2.c gemma2.h run.c "$TMP"; mkdir "$TMP/tests"; cp tests/tools.mk "$TMP/tests"
claim "says what it built" sh -c "cd '$TMP' && $MAKE run CFLAGS=-O0 OPENMP= CC='$CC' | grep -q 'Built ./run with .*without OpenMP'"
# A compiler like tcc takes any flag and removes its output before it fails.  If the output is a
# device and root runs it, the device is gone.
printf '#!/bin/sh\nfor a; do [ "$last" = -o ] && echo "$a" >>outputs; last=$a; done\nexit 1\n' \
    >"$TMP/bad"
chmod +x "$TMP/bad"
claim "a failed build names compilers" sh -c \
    "cd '$TMP' && rm run && $MAKE run CC=./bad 2>&1 | grep -q 'CC=gcc or CC=clang'"
claim "outputs stay here" sh -c \
    "cd '$TMP' && grep -q build/ outputs && ! grep -v '^build/\|^run$' outputs"

# ---- And gone again -----------------------------------------------------------------------
claim "uninstall" $MAKE -s uninstall DESTDIR="$D" PREFIX=/opt/gemma
claim "nothing is left" test "$(files "$D" | wc -l)" -eq 0
claim "other folders" $MAKE -s install DESTDIR="$D" bindir=/b libdir=/l includedir=/i mandir=/m \
    datarootdir=/d
claim "are respected" test -x "$D/b/gemma2" -a -e "$D/l/libgemma2.a" -a -e "$D/i/gemma2.h" \
    -a -e "$D/m/man1/gemma2.1"
claim "and left" $MAKE -s uninstall DESTDIR="$D" bindir=/b libdir=/l includedir=/i mandir=/m \
    datarootdir=/d
claim "with nothing" test "$(files "$D" | wc -l)" -eq 0

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
