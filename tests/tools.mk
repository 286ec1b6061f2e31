# For developers: how the tests are built, other compilers, machines and tools.  The Makefile
# includes it.  Each target closes with "N passed, N failed".  A tool that is not there is a
# failure; .ci/run installs all of them and so names their packages.

EXAMPLES = build/example_minimal build/example_chat build/example_sampler
C_TESTS = test test_header test_run fault replay
# The sections of build/test that it runs by name alone.
WHOLE = "build/test hosts hostile" "build/test golden tale"

# These use the library; the other tests include gemma2.c.
LINKED = $(addprefix build/,test_header test_run check_model) $(EXAMPLES)
$(LINKED): build/gemma2.o
build/test_run: run.c

JOBS = $(if $(filter -j%,$(MAKEFLAGS)),,-j$(shell getconf _NPROCESSORS_ONLN || echo 1))
test-programs: run $(addprefix build/,$(C_TESTS) terminal) $(EXAMPLES)

build/%: tests/%.c gemma2.c gemma2.h $(wildcard tests/*.[ch] tests/unit/*)
	@mkdir -p build
	$(BUILD) -pthread $< $(if $(filter $@,$(LINKED)),build/gemma2.o) -lm -o $@

# Installs into a folder, builds C and C++ programs against it.
test-install: run lib
	@MAKE="$(MAKE)" CC="$(CC)" CXX="$(CXX)" sh tests/install.sh

# Failing calls, the corpus of the fuzzer: nothing where speed matters.
FAULT = -pthread -D_GNU_SOURCE -Dmain=run_main -include tests/fault.h run.c gemma2.c tests/fault.c
REPLAY = -pthread -DREPLAY -Dmain=run_main tests/fuzz_run.c tests/fuzz.c

build/fault build/replay: run.c gemma2.c gemma2.h $(wildcard tests/*.[ch] tests/unit/*)
	@mkdir -p build
	$(BUILD) -O1 $($(shell echo $(@F) | tr a-z A-Z)) -lm -o $@

# Searches for input that breaks something (SECONDS=60 a target).
fuzz:
	@mkdir -p build
	clang -std=c11 -ffp-contract=off -O1 -g -fsanitize=fuzzer,address,undefined \
		-fno-sanitize-recover=all -fno-sanitize-coverage=trace-cmp -pthread \
		-Dmain=run_main tests/fuzz_run.c tests/fuzz.c -lm -o build/fuzz
	@sh tests/fuzz.sh build/fuzz $(or $(SECONDS),60) $(TARGETS)

# Tests all kernels, AMX's and AVX-VNNI's in emulation (AVX-512).
# AMX's six tile instructions are C there, AVX-VNNI's have AVX-512's encoding.
test-emulated: build/test_emulated
	@sh tests/add_up.sh build/test_emulated "build/test_emulated hosts hostile" \
		"build/test_emulated golden tale"

build/test_emulated: gemma2.c gemma2.h $(wildcard tests/*.[ch] tests/unit/*)
	@mkdir -p build
	$(BUILD) -O1 -DGEMMA2_EMULATE -pthread tests/test.c -lm -o $@

# Tests against transformers and sentencepiece, and export.py.
# They need the Python packages of tests/requirements.txt.
test-oracle: run
	$(PYTHON) tests/oracle.py

# Checks what tests/exercises.md says of its eight changes.
test-exercises:
	@$(PYTHON) tests/exercises.py

STRICT = $(WARNINGS) -Wconversion -Wsign-conversion -Wcast-qual -Wundef -Wvla -Wformat=2 -Werror
PLAIN = -std=c11 -ffp-contract=off

# need PROGRAM...: an error where one is not there.
need = for tool in $(1); do command -v $$tool >/dev/null || \
	{ echo "$@: there is no $$tool; .ci/run names its package" >&2; exit 1; }; done
# With another machine's compiler and emulator: the tests, and the digests of this machine.
# foreign FOLDER COMPILER EMULATOR SECTIONS COMMANDS
define foreign
@mkdir -p build/$(1)
@$(2) $(WARNINGS) -Werror tests/test.c -lm -o build/$(1)/test.exe
@$(2) $(WARNINGS) -Werror -c gemma2.c -o build/$(1)/gemma2.o
@for t in tests/digest run; do \
	$(2) $(WARNINGS) -Werror $$t.c build/$(1)/gemma2.o -lm -o build/$(1)/$${t##*/}.exe || exit 1; done
@sh tests/add_up.sh "$(strip $(3) build/$(1)/test.exe $(4))" \
	"$(strip $(3) build/$(1)/test.exe golden)" \
	"sh tests/same_bits.sh build/digest $(strip $(3) build/$(1)/digest.exe)" $(5)
endef

build/digest: tests/digest.c gemma2.c gemma2.h
	@mkdir -p build
	$(BUILD) tests/digest.c gemma2.c -lm -o $@

SANITIZE = $(CC) $(PLAIN) -O1 -g -fno-var-tracking -pthread -fsanitize=address,undefined \
	-fno-sanitize-recover=all

# Repeats the tests under sanitizers (address, undefined).
# One program has the emulated rows and all others.  `make fuzz` replays the fuzzer's corpus under
# the same sanitizers.
test-sanitize: build/terminal
	@mkdir -p build/sanitize
	@$(SANITIZE) -DGEMMA2_EMULATE tests/test.c -lm -o build/sanitize/test
	@$(SANITIZE) $(FAULT) -lm -o build/sanitize/fault
	@$(SANITIZE) run.c gemma2.c -lm -o build/sanitize/run
	@sh tests/add_up.sh "build/sanitize/test gemma2.c" "build/sanitize/test hosts hostile" \
		"build/sanitize/test golden" build/sanitize/fault "sh tests/cli.sh build/sanitize/run" \
		"build/terminal build/sanitize/run"

ARCHER ?= $(firstword $(wildcard /usr/lib/llvm-*/lib/libarcher.so))
TSAN = clang $(PLAIN) -O1 -g -fopenmp -fsanitize=thread

# Tests threads under ThreadSanitizer, with a race planted.
# It learns what OpenMP orders from LLVM's Archer.  Without Archer it reports a hundred races
# that are none.
test-tsan:
	@$(call need,clang $(or $(ARCHER),libarcher.so))
	@mkdir -p build/tsan
	@for t in test threads; do $(TSAN) tests/$$t.c -lm -lpthread -o build/tsan/$$t || exit 1; done
	@export OMP_TOOL_LIBRARIES=$(ARCHER) TSAN_OPTIONS=ignore_noninstrumented_modules=1; \
	sh tests/add_up.sh build/tsan/threads "build/tsan/test sharing kernels" \
		"sh tests/must_fail.sh 66 0 data.race build/tsan/threads race"

VALGRIND = valgrind -q --error-exitcode=9 --leak-check=full \
	--errors-for-leak-kinds=definite,possible

# Tests what reads files, text and options under valgrind.
# Valgrind knows AVX2, but not AVX-512.
test-valgrind: build/test run
	@$(call need,valgrind)
	@export OMP_NUM_THREADS=1; for isa in scalar avx2; do \
		GEMMA2_ISA=$$isa $(VALGRIND) ./run $(DEMO) -q -j 1 -s 3 -n 3 --json "Once upon" || exit 9; done
	@sh tests/add_up.sh "$(VALGRIND) build/test ground file formats sampler api" \
		"sh tests/must_fail.sh 3 1 not.a.gemma2.c.model $(VALGRIND) ./run tests/demo/README.md x"

# Runs gcc -fanalyzer, clang-tidy and cppcheck.
# They may find what tests/analyze.known explains, and nothing else.
analyze:
	@$(call need,gcc clang-tidy cppcheck)
	@sh tests/analyze.sh

# Compiles with every warning, in gcc and clang, as C11 and C23.
# What only gcc's optimiser sees, it says of C11.
warnings:
	@$(call need,gcc clang g++ clang++)
	@mkdir -p build; n=0; ok() { "$$@" || { echo "FAIL $$*"; echo "$$n passed, 1 failed"; exit 1; }; \
		n=$$((n + 1)); }; \
	for cc in gcc clang; do \
		for std in c11 c2x; do \
			ok $$cc -std=$$std $(STRICT) -fsyntax-only gemma2.c; \
			ok $$cc -std=$$std $(STRICT) -fsyntax-only run.c; \
			for t in $(filter-out tests/fault.c,$(wildcard tests/*.c)) \
				"-D_GNU_SOURCE -include tests/fault.h tests/fault.c"; do \
				ok $$cc -std=$$std -I. $(WARNINGS) -Werror -fsyntax-only $$t; done; done; \
		ok $$cc -x c -std=c99 $(STRICT) -Wno-pragma-once-outside-header -fsyntax-only gemma2.h; \
	done; \
	for file in gemma2.c run.c; do \
		ok gcc $(PLAIN) -O2 $(STRICT) -c $$file -o build/warnings.o; done; \
	ok g++ -x c++ -std=c++17 $(STRICT) -fsyntax-only gemma2.h; \
	ok clang++ -x c++ -std=c++17 $(STRICT) -fsyntax-only gemma2.h; \
	echo "$$n passed, 0 failed"

# Compares the bits of gcc's and clang's builds, with many flags.
test-builds:
	@$(call need,gcc clang)
	@sh tests/builds.sh

# Tests a 32-bit build for x86.
test-32bit: build/digest
	@$(call need,i686-linux-gnu-gcc)
	@mkdir -p build/32bit && truncate -s 5G build/32bit/large
	$(call foreign,32bit,i686-linux-gnu-gcc -static -msse2 -mfpmath=sse $(PLAIN) -O1,,,\
		"sh tests/must_fail.sh 3 1 5368709120.bytes..too.large build/32bit/run.exe build/32bit/large x" \
		"sh tests/must_fail.sh 1 0 needs.floats i686-linux-gnu-gcc -mfpmath=387 -fsyntax-only gemma2.c")
	@rm -f build/32bit/large

# Tests that a big-endian build (s390x) refuses every model.
test-big-endian:
	@$(call need,s390x-linux-gnu-gcc qemu-s390x)
	@mkdir -p build/s390x
	@s390x-linux-gnu-gcc -static $(PLAIN) -O1 $(WARNINGS) -Werror run.c gemma2.c -lm -o build/s390x/run
	@sh tests/add_up.sh \
		"sh tests/must_fail.sh 3 1 needs.a.little-endian.CPU qemu-s390x build/s390x/run $(DEMO) x" \
		"sh tests/must_fail.sh 3 1 needs.a.little-endian.CPU qemu-s390x build/s390x/run tokenizer.bin --info"

ARM_CC = aarch64-linux-gnu-gcc
QEMU = qemu-aarch64

# Tests the ARM kernels under qemu.
# Sections that hold no instruction of ARM's are left to this machine.
test-arm: run build/digest
	@$(call need,$(ARM_CC) $(QEMU))
	$(call foreign,arm,$(ARM_CC) -static $(PLAIN) -O2,$(QEMU) -cpu max,\
		formats kernels sharing rows,"sh tests/arm_demo.sh $(QEMU) ./run build/arm/run.exe")

# Tests a static build with musl.
test-musl: build/digest build/terminal
	@$(call need,musl-gcc)
	$(call foreign,musl,musl-gcc -static $(PLAIN) -O1,,ground file text sharing api,\
		"sh tests/cli.sh build/musl/run.exe" "build/terminal build/musl/run.exe")

WINE ?= $(firstword $(shell command -v wine64 wine) $(wildcard /usr/lib/wine/wine64))
WINESERVER = $(or $(shell command -v wineserver),$(wildcard /usr/lib/wine/wineserver),true)

# Tests a Windows build (mingw-w64) under wine.
# Wine's server is told to stay: a program that starts while it leaves would fail.
test-windows: build/digest
	@$(call need,x86_64-w64-mingw32-gcc $(or $(WINE),wine64))
	@mkdir -p build/windows
	@printf '#!/bin/sh\nexec $(WINE) build/windows/run.exe "$$@"\n' >build/windows/wine-run
	@chmod +x build/windows/wine-run
	@export WINEDEBUG=-all WINEPREFIX=$(CURDIR)/build/windows/prefix LC_ALL=C.UTF-8; \
	$(WINESERVER) -p600; $(WINE) cmd /c exit >/dev/null 2>&1; \
	$(MAKE) --no-print-directory windows-tests; status=$$?; $(WINESERVER) -k; exit $$status
windows-tests:
	$(call foreign,windows,x86_64-w64-mingw32-gcc -static -fopenmp $(PLAIN) -O1,$(WINE),\
		ground file formats kernels sharing rows text chat sampler constraints ahead api,\
		"sh tests/cli.sh build/windows/wine-run windows")

ZIG ?= $(PYTHON) -m ziglang

# Compiles for macOS and for Windows on ARM; runs nothing.
# The compiler is zig's clang: pip install ziglang.
check-macos:
	@mkdir -p build/zig
	@export ZIG_LOCAL_CACHE_DIR=$(CURDIR)/build/zig ZIG_GLOBAL_CACHE_DIR=$(CURDIR)/build/zig; n=0; \
	for target in x86_64-macos aarch64-macos aarch64-windows-gnu; do \
		$(ZIG) cc -target $$target $(PLAIN) -O1 $(WARNINGS) -Werror run.c gemma2.c \
			-o build/zig/run-$$target && n=$$((n + 1)); done; \
	echo "$$n passed, $$((3 - n)) failed"; test $$n = 3

# Tests ./run built for an unknown system, without OpenMP.
test-plain:
	@mkdir -p build/plain
	@gcc $(PLAIN) -O1 $(WARNINGS) -Werror -U__unix__ -U__linux__ run.c gemma2.c -lm -o build/plain/run
	@sh tests/add_up.sh "sh tests/cli.sh build/plain/run plain"

# Counts the lines and branches that the C tests reach.
coverage:
	@$(call need,gcc gcov)
	@$(PYTHON) tests/coverage.py

.PHONY: test-programs test-install fuzz test-emulated test-oracle test-exercises test-sanitize \
	test-tsan test-valgrind analyze warnings test-builds test-32bit test-big-endian \
	test-arm test-musl test-windows windows-tests check-macos test-plain coverage
