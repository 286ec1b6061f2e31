/* Section 8, the public API: what no other section holds. */

static void test_strings(void)
{
    static const int codes[] = {1, GEMMA2_ERR_FILE - 1, 1000, -1000, INT32_MAX, INT32_MIN,
                                INT32_MIN + 1};
    char version[32];
    snprintf(version, sizeof version, "%d.%d.%d", GEMMA2_VERSION_MAJOR, GEMMA2_VERSION_MINOR,
             GEMMA2_VERSION_PATCH);
    check(!strcmp(gemma2_version(), version) && !strcmp(version, GEMMA2_VERSION_STRING), "version");
    int major = -1, minor = -1, patch = -1;
    sscanf(gemma2_version(), "%d.%d.%d", &major, &minor, &patch);
    check(gemma2_version_number() == GEMMA2_VERSION_NUMBER &&
              GEMMA2_VERSION_NUMBER == major * 10000 + minor * 100 + patch, "version number");
    for (int i = GEMMA2_ERR_FILE; i <= 0; i++)
        for (int k = i + 1; k <= 0; k++)
            check(strcmp(gemma2_error_string(i), gemma2_error_string(k)) != 0, "codes %d, %d",
                  i, k);
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
        check(!strcmp(gemma2_error_string(codes[i]), "unknown error"), "code %d", codes[i]);
}

static void test_sections(void)
{
    struct model x = make(&shapes[3]);
    gemma2_section s;
    size_t n = 0;
    for (; gemma2_get_section(x.m, n, &s); n++) {
        check(s.bytes == get_u64(entry_of(&x.image, (int)n) + 40), "section %zu: bytes", n);
        check((s.layer == -1) == (n < 2 || n > 23), "section %zu: layer %d", n, s.layer);
    }
    check(n == 26, "%zu sections", n);
    check(gemma2_get_section(x.m, 3, &s) && !strcmp(s.role, "q") && !strcmp(s.type, "q6") &&
              s.layer == 0 && s.rows == 64 && s.cols == 264, "section 3 is q");
    check(gemma2_get_section(x.m, 1, &s) && !strcmp(s.role, "tokenizer") &&
              !strcmp(s.type, "bytes"), "section 1 is the tokenizer");
    check(!gemma2_get_section(x.m, SIZE_MAX, &s), "a section far away");
    unmake(&x);
}

/* GEMMA2_ISA forces a row.  A name that is unknown, or whose row this CPU lacks, fails the call. */
static void test_isa_choice(void)
{
    struct image m = build(&tiny_shape);
    char err[256];
    for (int i = 0; i < N_KERNELS + 2; i++) {
        const char *name = i < N_KERNELS ? all_kernels[i]->name : i == N_KERNELS ? "sse9" : "";
        int there = i < N_KERNELS ? all_kernels[i]->available() : i > N_KERNELS;
        setenv("GEMMA2_ISA", name, 1);
        gemma2_model *x = gemma2_open_memory(m.data, m.size, NULL, err, sizeof err);
        check(!!x == there, "GEMMA2_ISA=%s", name);
        if (x && i < N_KERNELS)
            check(!strcmp(gemma2_get_config(x)->isa, name), "GEMMA2_ISA=%s is heeded", name);
        if (!x)
            check(strstr(err, name) != NULL, "GEMMA2_ISA=%s is named in \"%s\"", name, err);
        gemma2_close(x);
    }
    unsetenv("GEMMA2_ISA");
    free(m.data);
}

/* Tiles are asked for once a model is opened whose prefill may use them, not before; where
 * they are refused, another matrix class stands in. */
static void test_permission(void)
{
#if defined(GEMMA2_EMULATE) && defined(HAVE_AMX)
    static const struct { uint32_t type, exact, refused, asked; } cases[] = {
        {Q8, 0, 0, 1}, {Q4, 0, 1, 1}, {BF16, 1, 0, 0}, {F32, 0, 0, 0}};
    struct shape shape = {"asking", 1, 64, 4, 2, 32, 96, 70, 37, 64, 50, 30, 1, 0, {0}, 64};
    if (!amx_kernels.available())
        return;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (int k = 0; k < 5; k++)
            shape.types[k] = cases[i].type;
        struct model x = {build(&shape), NULL};
        gemma2_open_params params;
        gemma2_open_params_init(&params);
        params.exact_prefill = cases[i].exact;
        tiles_refused = (int)cases[i].refused, tiles_asked_for = 0;
        x.m = gemma2_open(write_file("asking", x.image.data, x.image.size), &params, NULL, 0);
        check(x.m && x.m->isa == &amx_kernels, "the amx row comes first");
        check(tiles_asked_for == (int)cases[i].asked, "%s: asked for tiles %d times",
              types[cases[i].type].name, tiles_asked_for);
        const struct matrix_kernels *given = tiles_refused ? NULL : &amx_matrix;
        check(x.m->matrix == (cases[i].asked ? given : NULL), "%s: the wrong matrix class",
              types[cases[i].type].name);
        unmake(&x);
    }
    tiles_refused = 0;
    remove(in_dir("asking"));
#endif
}

static void test_tokenizer_only(void)
{
    static struct pieces p;
    char err[256] = "";
    plain_pieces(&p, 30);
    struct image image = build_tokenizer_file(&p);
    gemma2_model *m = open_image(&image);
    gemma2_plan plan;
    check(gemma2_get_config(m)->n_layers == 0 && gemma2_get_config(m)->start_of_turn == 4,
          "config");
    check(gemma2_session_plan(m, NULL, &plan) == GEMMA2_ERR_ARGUMENT, "a plan without a model");
    check(!gemma2_session_new(m, NULL, err, sizeof err) && strstr(err, "tokenizer"), "no session");
    check(!gemma2_get_input(m, 0, &(gemma2_input){0}), "inputs without a model");
    gemma2_close(m);
    free(image.data);
}

/* Memory fails at the 1st, 2nd, 3rd ... place: an error each time, and nothing leaks. */
static int open_and_start(const char *path, int read_in)
{
    char err[256] = "";
    gemma2_open_params p;
    gemma2_open_params_init(&p);
    p.read_into_memory = (uint32_t)read_in;
    gemma2_model *m = gemma2_open(path, &p, err, sizeof err);
    gemma2_session *s = m ? gemma2_session_new(m, NULL, err, sizeof err) : NULL;
    if (!s)
        check(strstr(err, "memory") != NULL, "no memory, but '%s'", err);
    gemma2_session_free(s);
    gemma2_close(m);
    return s != NULL;
}

static void test_allocation_failures(void)
{
    struct image m = build(&tiny_shape);
    for (int read_in = 0; read_in < 2; read_in++) {
        const char *path = write_file("model", m.data, m.size);
        int live = alloc_live, ok = 0, at = 0;
        while (!ok && at < 100) {
            fail_allocation(++at);
            ok = open_and_start(path, read_in);
            check(alloc_live == live, "failing at %d: %d not freed", at, alloc_live - live);
        }
        check(at == 4, "a model takes 2 allocations, a session 1; failed at %d places", at - 1);
        alloc_fails_at = 0;
    }
    remove(in_dir("model"));
    free(m.data);
}

/* Models and sessions that were closed above left nothing behind. */
static void test_no_leaks(void) { check(alloc_live == 0, "%d allocations live on", alloc_live); }

/* The code that opening leaves beside its sentence. */
static int code_of(const char *name, const void *data, size_t size)
{
    char err[256];
    int code = 1;
    gemma2_open_params p;
    gemma2_open_params_init(&p);
    p.code = &code;
    const char *path = data ? write_file(name, data, size) : in_dir(name);
    gemma2_model *m = gemma2_open(path, &p, err, sizeof err);
    check((m != NULL) == (code == GEMMA2_OK), "%s: a model or an error", name);
    gemma2_close(m);
    remove(in_dir(name));
    return code;
}

static void test_open_codes(void)
{
    struct image m = build(&tiny_shape);
    gemma2_open_params p;
    int code = 1;
    check(code_of("model", m.data, m.size) == GEMMA2_OK, "a sound file");
    check(code_of("none", NULL, 0) == GEMMA2_ERR_FILE, "no such file");
    check(code_of("text", "hello world", 11) == GEMMA2_ERR_FOREIGN, "no model file");
    check(code_of("model", m.data, m.size - 1) == GEMMA2_ERR_CORRUPT, "cut short");
    fail_allocation(2); /* the first is the mapping */
    check(code_of("model", m.data, m.size) == GEMMA2_ERR_MEMORY, "out of memory");
    alloc_fails_at = 0;
    ((uint8_t *)m.data)[8] = 9;
    check(code_of("model", m.data, m.size) == GEMMA2_ERR_MISMATCH, "a newer format");
    gemma2_open_params_init(&p);
    p.code = &code;
    check(!gemma2_open_memory((const char *)m.data + 1, 99, &p, NULL, 0) &&
          code == GEMMA2_ERR_ARGUMENT, "not aligned");
    free(m.data);
}

static void test_api(void)
{
    test_open_codes();
    test_strings();
    test_sections();
    test_isa_choice();
    test_permission();
    test_tokenizer_only();
    test_allocation_failures();
    test_no_leaks();
}
