# gemma2.c - `make` builds ./run, `make demo` tells a story, `make help` lists the rest.
CC ?= cc
CFLAGS ?= -O3
WARNINGS = -Wall -Wextra -Wpedantic -Wshadow
# Every result is the same to the bit on every machine; that needs -ffp-contract=off.
NEEDED = -std=c11 -ffp-contract=off $(OPENMP)
# OpenMP is optional: without it everything works, on one thread.  OPENMP= turns it off.
OPENMP := $(shell echo 'int main(void) { return 0; }' | \
	$(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo -fopenmp)
BUILD = $(CC) $(NEEDED) $(CFLAGS) $(WARNINGS) -I. $(CPPFLAGS) $(LDFLAGS)
PYTHON ?= python3
DEMO = tests/demo/story-q8.bin
EXAMPLES = build/example_minimal build/example_chat build/example_sampler

# Where `make install` puts things, below DESTDIR; the names are GNU's.
PREFIX ?= /usr/local
prefix = $(PREFIX)
exec_prefix = $(prefix)
bindir = $(exec_prefix)/bin
libdir = $(exec_prefix)/lib
includedir = $(prefix)/include
datarootdir = $(prefix)/share
mandir = $(datarootdir)/man
pkgconfigdir = $(libdir)/pkgconfig
BASH_DIR = $(datarootdir)/bash-completion/completions
ZSH_DIR = $(datarootdir)/zsh/site-functions
FISH_DIR = $(datarootdir)/fish/vendor_completions.d
INSTALL ?= install
INSTALL_PROGRAM ?= $(INSTALL)
INSTALL_DATA ?= $(INSTALL) -m 644

# The library's names: libgemma2.so -> libgemma2.so.MAJOR -> libgemma2.so.MAJOR.MINOR.PATCH.
number = $(shell sed -n 's/^.define GEMMA2_VERSION_$(1) //p' gemma2.h)
MAJOR := $(call number,MAJOR)
VERSION := $(MAJOR).$(call number,MINOR).$(call number,PATCH)
ifeq ($(shell uname -s),Darwin)
LIB_NAMES = libgemma2.$(VERSION).dylib libgemma2.$(MAJOR).dylib libgemma2.dylib
SHARED = -dynamiclib -install_name $(libdir)/$(word 2,$(LIB_NAMES))
else
LIB_NAMES = libgemma2.so.$(VERSION) libgemma2.so.$(MAJOR) libgemma2.so
SHARED = -shared -Wl,-soname,$(word 2,$(LIB_NAMES))
endif
SHARED_LIB = build/$(firstword $(LIB_NAMES))

# The command line program.
run: run.c gemma2.c gemma2.h
	$(BUILD) run.c gemma2.c -lm -o $@

# Builds, and tells a story with a small model that lies in the repository.
demo: run
	@./run $(DEMO) --quiet --echo --seed 3 --temperature 0.7 --top-p 0.9 --max-tokens 180 \
		"Once upon a time there was a little girl who"
	@echo >&2
	@echo >&2 "That was $(DEMO), 6 MB, trained on fairy tales. Try next:"
	@echo >&2 "  ./run $(DEMO) \"The old witch looked at the boy and\""
	@echo >&2 "  ./run $(DEMO) --info"
	@echo >&2 "  ./run --help"

# The static and the shared library, which show nothing but gemma2_* functions.
lib: build/libgemma2.a $(SHARED_LIB)

build/gemma2.o: gemma2.c gemma2.h
	@mkdir -p build
	$(CC) $(NEEDED) $(CFLAGS) $(WARNINGS) $(CPPFLAGS) -fPIC -fvisibility=hidden -c $< -o $@

build/libgemma2.a: build/gemma2.o
	$(AR) rcs $@ $<

$(SHARED_LIB): build/gemma2.o
	$(CC) $(SHARED) $(NEEDED) $(CFLAGS) $(LDFLAGS) $< -lm -o $@

# run as `gemma2`, the library, header, .pc file, man page and completions: PREFIX, DESTDIR.
install: run lib
	@for dir in $(bindir) $(libdir) $(includedir) $(pkgconfigdir) $(mandir)/man1 \
		$(BASH_DIR) $(ZSH_DIR) $(FISH_DIR); do $(INSTALL) -d "$(DESTDIR)$$dir" || exit 1; done
	$(INSTALL_PROGRAM) run "$(DESTDIR)$(bindir)/gemma2"
	$(INSTALL_DATA) gemma2.h "$(DESTDIR)$(includedir)/gemma2.h"
	$(INSTALL_DATA) build/libgemma2.a "$(DESTDIR)$(libdir)/libgemma2.a"
	$(INSTALL_PROGRAM) $(SHARED_LIB) "$(DESTDIR)$(libdir)/$(firstword $(LIB_NAMES))"
	@for name in $(wordlist 2,3,$(LIB_NAMES)); do \
		ln -sf $(firstword $(LIB_NAMES)) "$(DESTDIR)$(libdir)/$$name" || exit 1; done
	@umask 022; printf '%s\n' 'prefix=$(prefix)' 'exec_prefix=$(exec_prefix)' 'libdir=$(libdir)' \
		'includedir=$(includedir)' '' 'Name: gemma2' 'Description: Gemma 2 inference on any CPU' \
		'Version: $(VERSION)' 'Cflags: -I$${includedir}' 'Libs: -L$${libdir} -lgemma2' \
		'Libs.private: $(OPENMP) -lm' > "$(DESTDIR)$(pkgconfigdir)/gemma2.pc"
	@ln -sf ../run build/gemma2
	@umask 022; build/gemma2 --man > "$(DESTDIR)$(mandir)/man1/gemma2.1"
	@umask 022; build/gemma2 --completion bash > "$(DESTDIR)$(BASH_DIR)/gemma2"
	@umask 022; build/gemma2 --completion zsh > "$(DESTDIR)$(ZSH_DIR)/_gemma2"
	@umask 022; build/gemma2 --completion fish > "$(DESTDIR)$(FISH_DIR)/gemma2.fish"

# Removes what `make install` with the same PREFIX and DESTDIR put there.
uninstall:
	@for file in $(bindir)/gemma2 $(includedir)/gemma2.h $(pkgconfigdir)/gemma2.pc \
		$(addprefix $(libdir)/,libgemma2.a $(LIB_NAMES)) $(mandir)/man1/gemma2.1 \
		$(BASH_DIR)/gemma2 $(ZSH_DIR)/_gemma2 $(FISH_DIR)/gemma2.fish; do \
		rm -f "$(DESTDIR)$$file" || exit 1; done

C_TESTS = test test_session test_header test_golden hostile fault replay

# C only, no network, no Python; the last line is the sum.  Compiles on all processors.
test:
	@$(MAKE) --no-print-directory $(JOBS) test-programs
	@sh tests/all.sh $(addprefix build/,$(C_TESTS)) "sh tests/cli.sh ./run" \
		"sh tests/examples.sh build ./run"

# These use the library; the other tests include gemma2.c.
LINKED = $(addprefix build/,test_header check_model) $(EXAMPLES)
$(LINKED): build/gemma2.o

JOBS = $(if $(filter -j%,$(MAKEFLAGS)),,-j$(shell getconf _NPROCESSORS_ONLN || echo 1))
test-programs: run $(addprefix build/,$(C_TESTS)) $(EXAMPLES)

build/%: tests/%.c gemma2.c gemma2.h $(wildcard tests/*.h tests/unit/*)
	@mkdir -p build
	$(BUILD) -pthread $< $(filter $(if $(filter $@,$(LINKED)),%.o),$^) -lm -o $@

# Installs into a folder of its own; builds and runs programs against that, in C11 and C++17.
test-install: run lib
	@MAKE="$(MAKE)" CC="$(CC)" CXX="$(CXX)" sh tests/install.sh

# Hostile input, failing calls, the corpus of the fuzzer: nothing where speed matters.
FAULT = -pthread -D_GNU_SOURCE -Dmain=run_main -include tests/fault.h run.c gemma2.c tests/fault.c
REPLAY = -pthread -DREPLAY -Dmain=run_main run.c tests/fuzz.c
HOSTILE = -pthread tests/hostile.c

build/hostile build/fault build/replay: run.c gemma2.c gemma2.h $(wildcard tests/*.[ch] tests/unit/*)
	@mkdir -p build
	$(BUILD) -O1 $($(shell echo $(@F) | tr a-z A-Z)) -lm -o $@

# Searches for input that breaks something, SECONDS on each target: needs clang's libFuzzer.
fuzz:
	@mkdir -p build
	clang -std=c11 -ffp-contract=off -O1 -g -fsanitize=fuzzer,address,undefined \
		-fno-sanitize-recover=all -fno-sanitize-coverage=trace-cmp -pthread \
		-Dmain=run_main run.c tests/fuzz.c -lm -o build/fuzz
	@sh tests/fuzz.sh build/fuzz $(or $(SECONDS),60) $(TARGETS)

# The rows "amx", its six tile instructions in C, and "avxvnni", on CPUs that have AVX-512.
test-emulated: build/test_emulated build/test_golden_emulated
	@sh tests/all.sh build/test_emulated build/test_golden_emulated

build/%_emulated: tests/%.c gemma2.c gemma2.h $(wildcard tests/*.h tests/unit/*)
	@mkdir -p build
	$(BUILD) -DGEMMA2_EMULATE $< -lm -o $@

# Against transformers, sentencepiece and export.py; see tests/requirements.txt.
test-oracle: run
	$(PYTHON) tests/oracle.py

# Published figures, for those who hold real weights: make check-model MODEL=file
check-model: build/check_model
	build/check_model $(MODEL) $(ARGS)

# Speed: make bench MODEL=file, or SHAPE=2b|9b|27b with TYPE=q8 (random weights, in memory).
bench: build/bench
	build/bench $(if $(MODEL),$(MODEL),--shape $(or $(SHAPE),2b) --type $(or $(TYPE),q8)) $(ARGS)

# Sanitizers, analyzers, coverage, and other machines: ARM, 32 bits, Windows, macOS, musl ..
include tests/tools.mk

# Removes what was built.
clean:
	rm -rf run build

# This list.
help:
	@awk '/^# /{ if (!n++) text = substr($$0, 3); next } \
		n && /^[a-z][a-z0-9-]*:/{ sub(/:.*/, ""); printf "%-16s %s\n", $$0, text } { n = 0 }' \
		$(MAKEFILE_LIST)

.PHONY: demo lib install uninstall test test-programs test-install fuzz test-emulated test-oracle check-model bench \
	clean help
