# gemma2.c - `make` builds ./run, `make demo` tells a story, `make help` lists the rest.
CC ?= cc
CFLAGS ?= -O3
WARNINGS = -Wall -Wextra -Wpedantic -Wshadow
# Every result is the same to the bit on every machine; that needs -ffp-contract=off.
NEEDED = -std=c11 -ffp-contract=off $(OPENMP)
# OpenMP is optional: without it everything works, on one thread.  OPENMP= turns it off.
OPENMP := $(shell echo 'int main(void) { return 0; }' | \
	$(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo -fopenmp)
BUILD = $(CC) $(NEEDED) $(CFLAGS) $(WARNINGS) $(CPPFLAGS) $(LDFLAGS)
PYTHON ?= python3
DEMO = tests/demo/story-q8.bin

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

# C only, no network, no Python, a few seconds; the last line is the sum.
test: run build/test build/test_session build/test_header build/test_golden
	@sh tests/all.sh build/test build/test_session build/test_header build/test_golden \
		"sh tests/cli.sh ./run"

build/%: tests/%.c gemma2.c gemma2.h $(wildcard tests/*.h)
	@mkdir -p build
	$(BUILD) -pthread $< $(if $(filter test_header check_model,$*),gemma2.c) -lm -o $@

# The matrix class of the "amx" row, with its six tile instructions in C: for CPUs that have
# AVX-512 but not AMX.
test-amx: build/test_amx build/test_golden_amx
	@sh tests/all.sh build/test_amx build/test_golden_amx

build/%_amx: tests/%.c gemma2.c gemma2.h $(wildcard tests/*.h)
	@mkdir -p build
	$(BUILD) -DGEMMA2_EMULATE_AMX $< -lm -o $@

# Against transformers, sentencepiece and export.py; see tests/requirements.txt.
test-oracle: run
	$(PYTHON) tests/oracle.py

# Published figures, for those who hold real weights: make check-model MODEL=file
check-model: build/check_model
	build/check_model $(MODEL) $(ARGS)

# Speed: make bench MODEL=file, or SHAPE=2b|9b|27b with TYPE=q8 (random weights, in memory).
bench: build/bench
	build/bench $(if $(MODEL),$(MODEL),--shape $(or $(SHAPE),2b) --type $(or $(TYPE),q8)) $(ARGS)

# The C tests again under AddressSanitizer and UndefinedBehaviorSanitizer.
test-sanitize:
	@mkdir -p build/sanitize
	@for t in test test_session test_golden; do \
		$(CC) -std=c11 -ffp-contract=off -O1 -g -fsanitize=address,undefined -pthread \
		-fno-sanitize-recover=all tests/$$t.c -lm -o build/sanitize/$$t || exit 1; done
	@$(CC) -std=c11 -ffp-contract=off -O1 -g -fsanitize=address,undefined \
		-fno-sanitize-recover=all -DGEMMA2_EMULATE_AMX tests/test.c -lm -o build/sanitize/test_amx
	@sh tests/all.sh build/sanitize/test build/sanitize/test_session build/sanitize/test_golden \
		build/sanitize/test_amx

ARM_CC = aarch64-linux-gnu-gcc
QEMU = qemu-aarch64
ARM_BUILD = $(ARM_CC) -static -std=c11 -ffp-contract=off $(CFLAGS) $(WARNINGS)

# The ARM kernels under qemu: needs gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user.
test-arm: run
	@for tool in $(firstword $(ARM_CC)) $(QEMU); do command -v $$tool >/dev/null || \
		{ echo "test-arm: there is no $$tool; it needs gcc-aarch64-linux-gnu," \
		"libc6-dev-arm64-cross and qemu-user" >&2; exit 1; }; done
	@mkdir -p build/arm
	@for t in test test_golden; do \
		$(ARM_BUILD) tests/$$t.c -lm -o build/arm/$$t || exit 1; done
	@$(ARM_BUILD) run.c gemma2.c -lm -o build/arm/run
	@sh tests/all.sh "$(QEMU) -cpu max build/arm/test" "$(QEMU) -cpu max build/arm/test_golden" \
		"sh tests/arm.sh $(QEMU) ./run build/arm/run"

# Removes what was built.
clean:
	rm -rf run build

# This list.
help:
	@sed -n '/^# /h; /^[a-z][a-z-]*:/{G; s/:[^\n]*\n#/  -/p}' Makefile

.PHONY: demo test test-amx test-oracle check-model bench test-sanitize test-arm clean help
