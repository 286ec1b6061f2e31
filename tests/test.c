/* Unit tests of gemma2.c, a file a section in tests/unit/: gemma2.c is included there, so that
 * its statics are in reach.  What transformers and SentencePiece say is in test_golden.c.
 *
 *   cc -O2 -ffp-contract=off -fopenmp tests/test.c -lm && ./a.out [SECTION...]
 *
 * Run it from the repository's root.  It takes a few seconds.  Names of sections run these alone.
 * GEMMA2_TEST_FULL=1 sweeps exp and tanh over every float and prints their largest errors, and
 * tries more hostile files: two minutes.  -DGEMMA2_EMULATE builds the tests of the "amx" and
 * "avxvnni" rows alone, for CPUs with AVX-512. */
#include "unit/common.h"

#include "unit/weight_file.c"
#include "unit/formats.c"
#include "unit/kernels.c"
#include "unit/sharing.c"
#include "unit/pass.c"
#include "unit/tokenizer.c"
#include "unit/chat.c"
#include "unit/sampler.c"
#include "unit/constraints.c"
#include "unit/ahead.c"
#include "unit/api.c"
#include "unit/back_rooms.c"

/* The sections of gemma2.c, and of this file. */
static const struct {
    const char *name;
    void (*run)(void);
} sections[] = {
    {"ground", test_ground}, {"file", test_weight_file}, {"formats", test_formats},
    {"kernels", test_kernels}, {"sharing", test_work_sharing}, {"model", test_model},
    {"far", test_far_positions},
    {"text", test_text}, {"chat", test_chat}, {"sampler", test_sampler},
    {"constraints", test_constraints}, {"ahead", test_ahead}, {"api", test_api}};
enum { N_SECTIONS = sizeof sections / sizeof *sections };

static int run_section(const char *name)
{
    for (int i = 0; i < N_SECTIONS; i++)
        if (!strcmp(sections[i].name, name)) {
            sections[i].run();
            return 1;
        }
    return check(0, "there is no section '%s'", name);
}

int main(int argc, char **argv)
{
    snprintf(scratch_dir, sizeof scratch_dir, "/tmp/gemma2-test-XXXXXX");
    if (!mkdtemp(scratch_dir))
        return printf("cannot make %s\n", scratch_dir), 1;
    unsetenv("GEMMA2_ISA"); /* the tests choose */
    if (EMULATED) {
        test_rows();
        test_matrix_models();
        test_permission();
    } else if (argc > 1) {
        for (int i = 1; i < argc; i++)
            run_section(argv[i]);
    } else {
        for (int i = 0; i < N_SECTIONS; i++)
            sections[i].run();
    }
    check(rmdir(scratch_dir) == 0, "files are left in %s", scratch_dir);
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed > 0;
}
