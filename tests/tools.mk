# Other compilers, machines and tools, included by the Makefile.  Each target closes with
# "N passed, N failed"; a tool that is not there is a failure.  The tools are what CI installs:
# .ci/run names their packages.

STRICT = $(WARNINGS) -Wconversion -Wsign-conversion -Wcast-qual -Wundef -Wvla -Wformat=2 -Werror
PLAIN = -std=c11 -ffp-contract=off

# need PROGRAM...: an error where one is not there.
need = for tool in $(1); do command -v $$tool >/dev/null || \
	{ echo "$@: there is no $$tool; .ci/run names its package" >&2; exit 1; }; done
# With another machine's compiler and emulator: the tests, and the digests of this machine.
# foreign FOLDER COMPILER EMULATOR SECTIONS COMMANDS
define foreign
@mkdir -p build/$(1)
@for t in test test_golden; do \
	$(2) $(WARNINGS) -Werror tests/$$t.c -lm -o build/$(1)/$$t.exe || exit 1; done
@$(2) $(WARNINGS) -Werror tests/digest.c gemma2.c -lm -o build/$(1)/digest.exe
@$(2) $(WARNINGS) -Werror run.c gemma2.c -lm -o build/$(1)/run.exe
@sh tests/all.sh "$(strip $(3) build/$(1)/test.exe $(4))" \
	"$(strip $(3) build/$(1)/test_golden.exe --no-tale)" \
	"sh tests/same_bits.sh build/digest $(strip $(3) build/$(1)/digest.exe)" $(5)
endef

build/digest: tests/digest.c gemma2.c gemma2.h
	@mkdir -p build
	$(BUILD) tests/digest.c gemma2.c -lm -o $@

SANITIZE = $(CC) $(PLAIN) -O1 -g -pthread -fsanitize=address,undefined \
	-fno-sanitize-recover=all

# The C tests and the command line again under AddressSanitizer and UndefinedBehaviorSanitizer.
test-sanitize:
	@mkdir -p build/sanitize
	@for t in test test_session test_golden; do \
		$(SANITIZE) tests/$$t.c -lm -o build/sanitize/$$t || exit 1; done
	@$(SANITIZE) -DGEMMA2_EMULATE tests/test.c -lm -o build/sanitize/test_emulated
	@$(SANITIZE) $(HOSTILE) -lm -o build/sanitize/hostile
	@$(SANITIZE) $(FAULT) -lm -o build/sanitize/fault
	@$(SANITIZE) $(REPLAY) -lm -o build/sanitize/replay
	@$(SANITIZE) run.c gemma2.c -lm -o build/sanitize/run
	@sh tests/all.sh $(addprefix build/sanitize/,test test_session test_golden test_emulated \
		hostile fault replay) "sh tests/cli.sh build/sanitize/run"

ARCHER ?= $(firstword $(wildcard /usr/lib/llvm-*/lib/libarcher.so))
TSAN = clang $(PLAIN) -O1 -g -fopenmp -fsanitize=thread

# Threads under ThreadSanitizer, which learns what OpenMP orders from LLVM's Archer (without
# it, it reports a hundred races that are none); and a race on purpose, which it must report.
test-tsan:
	@$(call need,clang $(or $(ARCHER),libarcher.so))
	@mkdir -p build/tsan
	@for t in test threads; do $(TSAN) tests/$$t.c -lm -lpthread -o build/tsan/$$t || exit 1; done
	@export OMP_TOOL_LIBRARIES=$(ARCHER) TSAN_OPTIONS=ignore_noninstrumented_modules=1; \
	sh tests/all.sh build/tsan/threads "build/tsan/test sharing kernels" \
		"sh tests/fails.sh 66 0 data.race build/tsan/threads race"

VALGRIND = valgrind -q --error-exitcode=9 --leak-check=full \
	--errors-for-leak-kinds=definite,possible

# Under valgrind, which knows AVX2 but not AVX-512: what reads files, text and options.
test-valgrind: build/test run
	@$(call need,valgrind)
	@export OMP_NUM_THREADS=1; for isa in scalar avx2; do \
		GEMMA2_ISA=$$isa $(VALGRIND) ./run $(DEMO) -q -j 1 -s 3 -n 3 --json "Once upon" || exit 9; done
	@sh tests/all.sh "$(VALGRIND) build/test ground file formats sampler api" \
		"sh tests/fails.sh 3 1 not.a.gemma2.c.model $(VALGRIND) ./run tests/demo/README.md x"

# gcc -fanalyzer, clang-tidy and cppcheck find nothing that tests/analyze.known does not explain.
analyze:
	@$(call need,gcc clang-tidy cppcheck)
	@sh tests/analyze.sh

# No warning from gcc and clang as C11 to C23, and of the header alone as C99 and C++17.
warnings:
	@$(call need,gcc clang g++ clang++)
	@n=0; ok() { "$$@" || { echo "FAIL $$*"; echo "$$n passed, 1 failed"; exit 1; }; \
		n=$$((n + 1)); }; \
	for cc in gcc clang; do \
		for std in c11 c17 c2x; do \
			ok $$cc -std=$$std $(STRICT) -fsyntax-only gemma2.c; \
			ok $$cc -std=$$std $(STRICT) -fsyntax-only run.c; \
			for t in $(filter-out tests/fault.c,$(wildcard tests/*.c)) \
				"-D_GNU_SOURCE -include tests/fault.h tests/fault.c"; do \
				ok $$cc -std=$$std -I. $(WARNINGS) -Werror -fsyntax-only $$t; done; done; \
		ok $$cc $(PLAIN) -O2 $(STRICT) -c gemma2.c -o /dev/null; \
		ok $$cc $(PLAIN) -O2 $(STRICT) -c run.c -o /dev/null; \
		ok $$cc -x c -std=c99 $(STRICT) -Wno-pragma-once-outside-header -fsyntax-only gemma2.h; \
	done; \
	ok g++ -x c++ -std=c++17 $(STRICT) -fsyntax-only gemma2.h; \
	ok clang++ -x c++ -std=c++17 $(STRICT) -fsyntax-only gemma2.h; \
	echo "$$n passed, 0 failed"

# The same bits from gcc and clang, unoptimised and optimised for this CPU alone.
test-builds:
	@$(call need,gcc clang)
	@sh tests/builds.sh

# 32-bit x86 with SSE arithmetic: the same bits; a file too large to map is refused.
test-32bit: build/digest
	@$(call need,i686-linux-gnu-gcc)
	@mkdir -p build/32bit && truncate -s 5G build/32bit/large
	$(call foreign,32bit,i686-linux-gnu-gcc -static -msse2 -mfpmath=sse $(PLAIN) -O2,,,\
		"sh tests/fails.sh 3 1 5368709120.bytes..too.large build/32bit/run.exe build/32bit/large x" \
		"sh tests/fails.sh 1 0 needs.floats i686-linux-gnu-gcc -mfpmath=387 -fsyntax-only gemma2.c")
	@rm -f build/32bit/large

# Big-endian (s390x under qemu-user): compiles, and refuses every model in one sentence.
test-big-endian:
	@$(call need,s390x-linux-gnu-gcc qemu-s390x)
	@mkdir -p build/s390x
	@s390x-linux-gnu-gcc -static $(PLAIN) -O1 $(WARNINGS) -Werror run.c gemma2.c -lm -o build/s390x/run
	@sh tests/all.sh \
		"sh tests/fails.sh 3 1 needs.a.little-endian.CPU qemu-s390x build/s390x/run $(DEMO) x" \
		"sh tests/fails.sh 3 1 needs.a.little-endian.CPU qemu-s390x build/s390x/run tokenizer.bin --info"

ARM_CC = aarch64-linux-gnu-gcc
QEMU = qemu-aarch64

# The ARM kernels under qemu: needs gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user.
# Sections that hold no instruction of ARM's, and the long way to far positions, are left to
# this machine.
test-arm: run build/digest
	@$(call need,$(ARM_CC) $(QEMU))
	$(call foreign,arm,$(ARM_CC) -static $(PLAIN) $(CFLAGS),$(QEMU) -cpu max,\
		formats kernels sharing model,"sh tests/arm.sh $(QEMU) ./run build/arm/run.exe")

# A static build with musl.
test-musl: build/digest
	@$(call need,musl-gcc)
	$(call foreign,musl,musl-gcc -static $(PLAIN) -O2,,ground file text sharing api,\
		"sh tests/cli.sh build/musl/run.exe")

WINE ?= $(firstword $(shell command -v wine64 wine) $(wildcard /usr/lib/wine/wine64))

# Windows, built with mingw-w64: tests and command line under wine, in a prefix of its own.
test-windows: build/digest
	@$(call need,x86_64-w64-mingw32-gcc $(or $(WINE),wine64))
	@mkdir -p build/windows
	@printf '#!/bin/sh\nexec $(WINE) build/windows/run.exe "$$@"\n' >build/windows/wine-run
	@chmod +x build/windows/wine-run
	@export WINEDEBUG=-all WINEPREFIX=$(CURDIR)/build/windows/prefix LC_ALL=C.UTF-8; \
	$(WINE) cmd /c exit >/dev/null 2>&1; $(MAKE) --no-print-directory windows-tests
windows-tests:
	$(call foreign,windows,x86_64-w64-mingw32-gcc -static -fopenmp $(PLAIN) -O2,$(WINE),,\
		"sh tests/cli.sh build/windows/wine-run windows")

ZIG ?= $(PYTHON) -m ziglang

# macOS on both architectures, and Windows on ARM: compiled and linked by zig's clang (pip
# install ziglang), not run.
check-macos:
	@mkdir -p build/zig
	@export ZIG_LOCAL_CACHE_DIR=$(CURDIR)/build/zig ZIG_GLOBAL_CACHE_DIR=$(CURDIR)/build/zig; n=0; \
	for target in x86_64-macos aarch64-macos aarch64-windows-gnu; do \
		$(ZIG) cc -target $$target $(PLAIN) -O1 $(WARNINGS) -Werror run.c gemma2.c \
			-o build/zig/run-$$target && n=$$((n + 1)); done; \
	echo "$$n passed, $$((3 - n)) failed"; test $$n = 3

# Without OpenMP; and where the system is not known, so that files are read with plain C.
test-plain:
	@mkdir -p build/plain
	@gcc $(PLAIN) -O2 $(WARNINGS) -Werror tests/test.c -lm -o build/plain/test
	@gcc $(PLAIN) -O2 $(WARNINGS) -Werror -U__unix__ -U__linux__ run.c gemma2.c -lm -o build/plain/run
	@sh tests/all.sh build/plain/test "sh tests/cli.sh build/plain/run plain"

# Lines and branches that the C tests reach on this CPU, by section; what they miss, by function.
coverage:
	@$(call need,gcc gcov)
	@$(PYTHON) tests/coverage.py

.PHONY: test-sanitize test-tsan test-valgrind analyze warnings test-builds test-32bit \
	test-big-endian test-arm test-musl test-windows windows-tests check-macos test-plain coverage
