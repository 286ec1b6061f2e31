/* Unit tests of gemma2.c, a file a section in tests/unit/, with those of whole models, hosts and
 * hostile input: gemma2.c is included once for all, so that its statics are in reach.
 *
 *   cc -O2 -ffp-contract=off -fopenmp tests/test.c -lm && ./a.out [SECTION...]
 *
 * Run it from the repository's root.  Names of sections run these alone; without names, or named
 * gemma2.c, its sections run, in a few seconds.  GEMMA2_TEST_FULL=1 sweeps exp and tanh over every
 * float and prints their largest errors, and tries more hostile files: two minutes.
 * -DGEMMA2_EMULATE adds the "amx" and "avxvnni" rows on CPUs with AVX-512. */
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
#include "unit/golden.c"
#ifndef _WIN32
#include "unit/hosts.c"
#include "unit/hostile.c"
#endif

/* The sections of gemma2.c, then what runs by name alone. */
static const struct {
    const char *name;
    void (*run)(void);
} sections[] = {
    {"ground", test_ground}, {"file", test_weight_file}, {"formats", test_formats},
    {"kernels", test_kernels}, {"sharing", test_work_sharing}, {"rows", test_model_on_rows},
    {"model", test_model}, {"far", test_far_positions},
    {"text", test_text}, {"chat", test_chat}, {"sampler", test_sampler},
    {"constraints", test_constraints}, {"ahead", test_ahead}, {"api", test_api},
    {"golden", test_golden}, {"tale", test_tale},
#ifndef _WIN32
    {"hosts", test_hosts}, {"hostile", test_hostile},
#endif
};
enum { N_SECTIONS = sizeof sections / sizeof *sections, N_OF_GEMMA2 = 14 };

/* Runs a section, or all of gemma2.c. */
static void run_section(const char *name)
{
    int found = 0, all = !strcmp(name, "gemma2.c");
    for (int i = 0; i < N_SECTIONS; i++)
        if (all ? i < N_OF_GEMMA2 : !strcmp(sections[i].name, name)) {
            sections[i].run();
            found++;
        }
    check(found, "there is no section '%s'", name);
}

int main(int argc, char **argv)
{
    snprintf(scratch_dir, sizeof scratch_dir, "/tmp/gemma2-test-XXXXXX");
    if (!mkdtemp(scratch_dir))
        return printf("cannot make %s\n", scratch_dir), 1;
    unsetenv("GEMMA2_ISA"); /* the tests choose */
    if (argc == 1)
        run_section("gemma2.c");
    for (int i = 1; i < argc; i++)
        run_section(argv[i]);
    check(rmdir(scratch_dir) == 0, "files are left in %s", scratch_dir);
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed > 0;
}
