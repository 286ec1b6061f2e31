/* Section 9, the back rooms: SHA-256, and errors that are cut. */

static int is_digest(const uint8_t digest[32], const char *hex)
{
    char text[65];
    for (int i = 0; i < 32; i++)
        snprintf(text + 2 * i, 3, "%02x", digest[i]);
    return !strcmp(text, hex);
}

/* The CPU's instructions give the digests of the plain code, wherever blocks begin and end. */
static void test_fast_sha256(void)
{
    sha256_fn *fast = fast_sha256();
    int bad = 0;
    if (!fast)
        printf("not run: SHA-256 by instructions, this CPU has none\n");
    for (int i = 0; fast && i < 500; i++) {
        size_t n = below(64 * 9), cut = below((uint32_t)n + 1);
        uint8_t *text = fresh(n), digest[32], want[32];
        for (size_t k = 0; k < n; k++)
            text[k] = (uint8_t)rnd();
        sha256_of(text, n, n + 1, want);
        digest_of(&(gemma2_model){.sha256 = fast}, text, cut, text + cut, n - cut, digest);
        bad += !!memcmp(digest, want, 32);
        free(text);
    }
    check_none(bad, "SHA-256 by instructions");
    struct model x = make(&shapes[0]);
    check(x.m->sha256 == (x.m->isa == &scalar_kernels ? NULL : fast), "a model's own SHA-256");
    unmake(&x);
}

/* FIPS 180-4 examples, and n letters 'a' around the padding's edges (by sha256sum). */
static void test_sha256(void)
{
    static const struct {
        const char *text;
        size_t repeat;
        const char *hex;
    } cases[] = {
        {"", 1, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"abc", 1, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 1,
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
        {"a", 55, "9f4390f8d30c2dd92ec9f095b65e2b9ae9b0a925a5258e241c9f1e910f734318"},
        {"a", 56, "b35439a4ac6f0948b6d6f9e3c6af0f5f590ce20f1bde7090ef7970686ec6738a"},
        {"a", 63, "7d3e74a05d7db15bce4ad9ec0658ea98e3f06eeecf16b4c6fff2da457ddc2f34"},
        {"a", 64, "ffe054fe7ae0cb6dc65c3af9b61d5209f439851db43d0ba5997337df154668eb"},
        {"a", 65, "635361c48bb9eab14198e76ea8ab7f1a41685d6ad62aa9146d301d4f17eb0ae0"},
        {"a", 1000000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t unit = strlen(cases[i].text), n = unit * cases[i].repeat;
        uint8_t digest[32], *text = fresh(n);
        for (size_t k = 0; k < n; k++)
            text[k] = (uint8_t)cases[i].text[k % unit];
        sha256_of(text, n, n + 1, digest);
        check(is_digest(digest, cases[i].hex), "SHA-256 of %zu bytes", n);
        free(text);
    }
}

static void test_sha256_in_parts(void)
{
    uint8_t text[300], whole[32], parts[32];
    int bad = 0;
    for (size_t i = 0; i < sizeof text; i++)
        text[i] = (uint8_t)rnd();
    for (size_t n = 0; n <= sizeof text; n++)
        for (size_t step = 1; step < 130; step += 1 + step / 9) {
            sha256_of(text, n, n + 1, whole);
            sha256_of(text, n, step, parts);
            bad += !!memcmp(whole, parts, 32);
        }
    check_none(bad, "SHA-256 added in parts");
}

#ifdef HAVE_MMAP
/* Writes text to FOLDER/name, making the folders on the way. */
static void write_below(const char *folder, const char *name, const char *text)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    for (char *p = strchr(path + 1, '/'); p; p = strchr(p + 1, '/')) {
        *p = 0;
        mkdir(path, 0700);
        *p = '/';
    }
    FILE *f = fopen(path, "w");
    if (!f || fputs(text, f) < 0 || fclose(f))
        printf("cannot write %s\n", path), exit(1);
}

/* A quota of processors, as version 2 and version 1 of Linux's control groups say it. */
static void test_quota(void)
{
    const char *root = "build/quota", *v2 = "build/quota/sys/fs/cgroup";
    const char *v1 = "build/quota/sys/fs/cgroup/cpu";
    check(processor_quota("build/no such folder") == 0, "quota: no control groups");
    write_below(root, "proc/self/cgroup", "0::/a/b:c\n");
    write_below(v2, "cpu.max", "max 100000\n");
    write_below(v2, "a/cpu.max", "150000 100000\n");
    write_below(v2, "a/b:c/cpu.max", "max 100000\n");
    check(processor_quota(root) == 1.5, "quota: set by the group above");
    write_below(v2, "a/b:c/cpu.max", "50000 100000\n");
    check(processor_quota(root) == 0.5, "quota: the smallest counts");
    write_below(root, "proc/self/cgroup", "0::/elsewhere\n");
    check(processor_quota(root) == 0, "quota: no limit");
    write_below(v2, "cpu.max", "300000 100000\n");
    check(processor_quota(root) == 3, "quota: the root's, as a container sees its own");
    write_below(root, "proc/self/cgroup", "5:memory:/\n4:cpuacct,cpu:/d\n");
    write_below(v1, "d/cpu.cfs_quota_us", "250000\n");
    write_below(v1, "d/cpu.cfs_period_us", "100000\n");
    check(processor_quota(root) == 2.5, "quota: version 1");
    write_below(v1, "d/cpu.cfs_quota_us", "-1\n");
    check(processor_quota(root) == 0, "quota: version 1, no limit");
    write_below(root, "proc/self/cgroup", "nonsense\n1:\n:::\n0::\n");
    check(processor_quota(root) == 3, "quota: lines that say nothing");
}
#endif

static void test_ground(void)
{
#ifdef HAVE_MMAP
    test_quota();
#endif
    static const uint8_t bytes[8] = {1, 2, 3, 0x84, 5, 6, 7, 0x88};
    char text[8] = "?";
    struct errbuf err = {text, 4, 0}, none = {NULL, 0, 0};
    check(get_u32(bytes) == 0x84030201, "get_u32");
    check(get_u64(bytes) == 0x8807060584030201, "get_u64");
    check(fail(&err, "%d", 12345) == 0 && !strcmp(text, "123"), "a long message is cut");
    check(fail(&none, "nothing") == 0, "no buffer for a message");
    check(round_up(0, 16) == 0 && round_up(1, 16) == 16 && round_up(32, 16) == 32, "round_up");
    check(is_zero(bytes, 0) && !is_zero(bytes, 8), "is_zero");
    test_sha256();
    test_fast_sha256();
    test_sha256_in_parts();
}
