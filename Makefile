# gemma2.c: `make` builds ./run, `make demo` tells a story, `make help` lists the rest.
CFLAGS ?= -O3
WARNINGS = -Wall -Wextra -Wpedantic -Wshadow
# Every result is the same to the bit on every machine; that needs -ffp-contract=off.
NEEDED = -std=c11 -ffp-contract=off $(OPENMP)
# OpenMP is optional: without it everything works, on one thread.  OPENMP= turns it off.
OPENMP := $(shell mkdir -p build; p=build/probe-$$$$; \
	echo 'int omp_get_max_threads(void); int main(void) { return omp_get_max_threads() < 1; }' \
	>$$p.c; $(CC) -fopenmp $$p.c -o $$p 2>/dev/null && echo -fopenmp; rm -f $$p*)
BUILD = $(CC) $(NEEDED) $(CFLAGS) $(WARNINGS) -I. $(CPPFLAGS) $(LDFLAGS)
ADVISE = { echo "$(CC) cannot build it: try CC=gcc or CC=clang" >&2; exit 1; }
PYTHON ?= python3
DEMO = tests/demo/story-q8.bin

# Builds ./run, the command line program (CC=gcc, CC=clang).
run: run.c build/gemma2.o
	@$(BUILD) run.c build/gemma2.o -lm -o $@ || $(ADVISE)
	@echo "Built ./run with $(CC), $(if $(OPENMP),with OpenMP,without OpenMP: it has one thread)."

# Builds ./run and tells a story with a small model.
demo: run
	@./run $(DEMO) --quiet --echo --seed 3 --temperature 0.7 --top-p 0.9 --max-tokens 180 \
		"Once upon a time there was a little girl who"
	@echo >&2
	@echo >&2 "That was $(DEMO), 6 MB, trained on fairy tales. Try next:"
	@echo >&2 "  ./run $(DEMO) \"The old witch looked at the boy and\""
	@echo >&2 "  ./run $(DEMO) --info"
	@echo >&2 "  ./run --help"

# Runs the tests in C: no network, no Python; the sum comes last.
test:
	@$(MAKE) --no-print-directory $(JOBS) test-programs
	@sh tests/add_up.sh $(addprefix build/,$(C_TESTS)) $(WHOLE) "sh tests/cli.sh ./run" \
		"sh tests/batch.sh ./run" "build/terminal ./run" \
		"sh tests/examples.sh build ./run"

# Compares real weights with published figures (MODEL=file).
check-model: build/check_model
	build/check_model $(MODEL) $(ARGS)

# Measures speed (MODEL=file, or SHAPE=2b|9b|27b TYPE=q8).
bench: build/bench
	build/bench $(if $(MODEL),$(MODEL),--shape $(or $(SHAPE),2b) --type $(or $(TYPE),q8)) $(ARGS)

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
# nodelete: OpenMP's threads outlive a dlclose, and so must the code that they run.
SHARED = -shared -Wl,-soname,$(word 2,$(LIB_NAMES)),-z,nodelete
endif
SHARED_LIB = build/$(firstword $(LIB_NAMES))

# Builds the static and the shared library.
lib: build/libgemma2.a $(SHARED_LIB)

build/gemma2.o: gemma2.c gemma2.h
	@mkdir -p build
	@$(CC) $(NEEDED) $(CFLAGS) $(WARNINGS) $(CPPFLAGS) -fPIC -fvisibility=hidden -c $< -o $@ || $(ADVISE)

build/libgemma2.a: build/gemma2.o
	$(AR) rcs $@ $<

$(SHARED_LIB): build/gemma2.o
	$(CC) $(SHARED) $(NEEDED) $(CFLAGS) $(LDFLAGS) $< -lm -o $@

# Installs programs, library, header, manual (PREFIX=, DESTDIR=).
install: run lib
	@for dir in $(bindir) $(libdir) $(includedir) $(pkgconfigdir) $(mandir)/man1 \
		$(BASH_DIR) $(ZSH_DIR) $(FISH_DIR) $(datarootdir)/gemma2; do $(INSTALL) -d "$(DESTDIR)$$dir" || exit 1; done
	$(INSTALL_PROGRAM) run "$(DESTDIR)$(bindir)/gemma2"
	$(INSTALL_PROGRAM) export.py "$(DESTDIR)$(bindir)/gemma2-export"
	$(INSTALL_DATA) tokenizer.bin "$(DESTDIR)$(datarootdir)/gemma2/tokenizer.bin"
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
	@umask 022; build/gemma2 --help > build/help; \
	page() { awk -v form=$$1 -v version=$(VERSION) -f tests/pages.awk build/help > "$(DESTDIR)$$2"; }; \
	page man "$(mandir)/man1/gemma2.1" && page bash "$(BASH_DIR)/gemma2" && \
	page zsh "$(ZSH_DIR)/_gemma2" && page fish "$(FISH_DIR)/gemma2.fish"

# Removes what install put there (PREFIX=, DESTDIR=).
uninstall:
	@for file in $(addprefix $(bindir)/,gemma2 gemma2-export) $(includedir)/gemma2.h $(pkgconfigdir)/gemma2.pc \
		$(addprefix $(libdir)/,libgemma2.a $(LIB_NAMES)) $(mandir)/man1/gemma2.1 \
		$(BASH_DIR)/gemma2 $(ZSH_DIR)/_gemma2 $(FISH_DIR)/gemma2.fish \
		$(datarootdir)/gemma2/tokenizer.bin; do rm -f "$(DESTDIR)$$file" || exit 1; done

# Removes what was built.
clean:
	rm -rf run build

# Lists these targets, then those for developers.
help:
	@awk '/^# /{ if (!n++) text = substr($$0, 3); next } \
		n && /^[a-z][a-z0-9-]*:/{ sub(/:.*/, ""); printf "%-15s %s\n", $$0, text } { n = 0 }' \
		$(MAKEFILE_LIST)

include tests/tools.mk
.PHONY: demo test check-model bench lib install uninstall clean help
