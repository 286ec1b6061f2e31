/* Section 2, the weight file: what opens, what is refused, and what --check finds. */

static void test_models_open(void)
{
    for (int i = 0; i < N_SHAPES; i++) {
        struct model x = make(&shapes[i]);
        const gemma2_config *c = gemma2_get_config(x.m);
        const struct shape *s = &shapes[i];
        check(c->n_layers == (int)s->layers && c->d_model == (int)s->d && c->n_heads == (int)s->n &&
                  c->n_kv_heads == (int)s->k && c->head_dim == (int)s->h &&
                  c->d_ffn == (int)s->f && c->n_vocab == (int)s->v && c->window == 8,
              "%s: config", s->name);
        for (uint32_t l = 0; l < s->layers; l++) /* a bit a layer, not even and odd ones */
            check(c->is_local[l] == (s->local >> l & 1), "%s: layer %u local", s->name, l);
        check(c->n_stop == 2 && gemma2_is_stop(x.m, 5) && !gemma2_is_stop(x.m, 2), "stops");
        check(c->file_bytes == x.image.size && !memcmp(c->identity, x.image.data + 480, 32),
              "%s: identity", s->name);
        for (size_t k = 0; k < x.m->n_sections; k++)
            check(gemma2_check(x.m, k, NULL, 0) == 1, "%s: section %zu", s->name, k);
        check(gemma2_check(x.m, x.m->n_sections, NULL, 0) == 0, "check past the end");
        exercise(x.m);
        unmake(&x);
    }
}

/* Every prefix, and the file with a byte more, then both with a header that agrees. */
static void test_truncated(void)
{
    struct image m = build(&tiny_shape), cut;
    int opened = 0, opened_sealed = 0;
    for (size_t n = 1; n <= m.size + 1; n++) {
        if (n == m.size)
            continue;
        cut.size = n, cut.data = fresh(n);
        memcpy(cut.data, m.data, n < m.size ? n : m.size);
        opened += opens(&cut);
        if (n >= 512 + 96) {
            put_u64(cut.data + 32, n);
            seal(&cut);
            opened_sealed += opens(&cut);
        }
        free(cut.data);
    }
    check(!opened, "%d truncated files open", opened);
    check(!opened_sealed, "%d truncated files with a new checksum open", opened_sealed);
    free(m.data);
}

/* Every bit of header and directory counts. */
static void test_flipped(void)
{
    struct image m = build(&tiny_shape);
    int opened = 0;
    size_t end = 512 + 96 * get_u32(m.data + 48);
    for (size_t i = 0; i < end; i++)
        for (int bit = 0; bit < 8; bit += 1 + (i > 512)) {
            m.data[i] ^= (uint8_t)(1 << bit);
            opened += opens(&m);
            m.data[i] ^= (uint8_t)(1 << bit);
        }
    check(!opened, "%d files with a flipped bit open", opened);
    free(m.data);
}

/* A value in a sealed header: legal or not, by the byte table. */
static void test_header_limits(void)
{
    static const struct {
        uint32_t at, value;
        int legal;
    } cases[] = {
        {8, 0, 0}, {8, 2, 0}, {12, 511, 0}, {16, 1, 0}, {20, 1u << 31, 0}, {24, ~0u, 1},
        {40, 511, 0}, {44, 1, 0}, {48, 0, 0}, {48, 65537, 0}, {48, ~0u, 0}, {52, 95, 0},
        {56, 0, 0}, {56, 32, 0}, {56, 96, 0}, {56, 1u << 22, 0}, {60, 1, 0}, {64, 0, 0},
        {64, 2, 0}, {64, 1025, 0}, {68, 0, 0}, {68, 3, 0}, {72, 0, 0}, {72, 3, 0}, {76, 0, 0},
        {76, 3, 0}, {80, 0, 0}, {80, 1, 0}, {80, 3, 0}, {84, 0, 0}, {88, 0, 0}, {88, 6, 0},
        {92, 0, 0}, {92, 1, 1}, {92, 1u << 30, 1}, {92, (1u << 30) + 1, 0}, {92, 1u << 31, 0},
        {96, 0, 0}, {96, 1, 1}, {96, 1u << 30, 1}, {96, ~0u, 0},
        {100, 0, 1}, {100, 0x80000001, 0}, {100, 0x7fc00000, 0}, {100, 0x7f800000, 0},
        {108, 0, 0}, {108, 0x7ff80000, 0}, {108, 0x7ff00000, 0}, {108, 0xc0c38800, 0},
        {112, 0, 1}, {112, 0x42480000, 1}, {112, 0xc2480000, 0}, {112, 0x7fc00000, 0},
        {112, 0x7f800000, 0}, {112, 1, 0}, {116, 0x461c4000, 1}, {116, 0x461c4001, 0},
        {116, 0x7fc00000, 0}, {120, 0, 0}, {120, 0xbf800000, 0}, {120, 0x7f800000, 0},
        {124, 0, 0}, {124, 0x7fc00000, 0}, {124, 0xff800000, 0}, {128, 2, 0}, {252, 1, 0},
        {256, 0, 0}, {256, 3, 1}, {256, 15, 1}, {256, 16, 0}, {256, ~0u, 0}, {260, 7, 0},
        {260, 6, 1}, {268, 1, 0}, {320, 1, 0}, {476, 1, 0},
    };
    struct image m = build(&tiny_shape);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint32_t was = get_u32(m.data + cases[i].at);
        put_u32(m.data + cases[i].at, cases[i].value);
        seal(&m);
        check(opens(&m) == cases[i].legal, "header value %#x at %u is %s", cases[i].value,
              cases[i].at, cases[i].legal ? "refused" : "accepted");
        put_u32(m.data + cases[i].at, was);
    }
    free(m.data);
}

static char said[160]; /* by the last refusal of may_be */

/* Whether the header's field at `at` may be x, in a file of so many layers. */
static int may_be(size_t at, char kind, double x, int32_t layers)
{
    uint8_t header[HEADER_BYTES] = {0};
    gemma2_config c = {.n_layers = layers};
    struct errbuf err = {said, sizeof said, 0};
    uint64_t bits;
    memcpy(&bits, &x, 8);
    if (kind == 'd')
        put_u64(header + at, bits);
    else
        put_u32(header + at, kind == 'i' ? (uint32_t)x : bits_of((float)x));
    for (int i = 0; i < N_HEADER_FIELDS; i++)
        if (header_fields[i].at == at)
            return read_field(header, &header_fields[i], &c, &err);
    return -1;
}

/* The ends of each field's range in the byte table, which no file of a test could reach. */
static void test_field_limits(void)
{
    static const struct {
        size_t at;
        char kind;
        double low, high;
        int zero; /* is legal: 1 also, 2 only, in a file without layers */
    } fields[] = {
        {64, 'i', 0, 1024, 1}, {68, 'i', 1, 1 << 20, 2}, {72, 'i', 1, 4096, 2},
        {76, 'i', 1, 4096, 2}, {80, 'i', 2, 1024, 2}, {84, 'i', 1, 1 << 22, 2},
        {88, 'i', 1, (1 << 22) - 1, 0}, {92, 'i', 1, 1 << 30, 2}, {96, 'i', 1, 1 << 30, 2},
        {100, 'f', 0, 1, 2}, {104, 'd', 1e-3, 1e12, 2}, {112, 'c', 0.01, 10000, 1},
        {116, 'c', 0.01, 10000, 1}, {120, 'f', 1e-9, 1e9, 2}, {124, 'f', 1e-9, 1e9, 2}};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        size_t at = fields[i].at;
        char kind = fields[i].kind;
        double low = fields[i].low, high = fields[i].high, step = kind == 'i' ? 0 : 1e-6;
        check(may_be(at, kind, low + low * step, 1) == 1 &&
                  may_be(at, kind, high - high * step, 1) == 1, "field %zu: its ends", at);
        check(!may_be(at, kind, kind == 'i' ? high + 1 : high + high * step, 1), "field %zu above",
              at);
        check(kind == 'i' && low == 0 ? 1 : !may_be(at, kind, kind == 'i' ? low - 1 :
              low > 0 ? low - low * step : -1e-30, 1), "field %zu below", at);
        check(may_be(at, kind, 0, 0) == (fields[i].zero > 0), "field %zu: zero, no layers", at);
        check(fields[i].zero < 2 || !may_be(at, kind, high, 0), "field %zu, no layers", at);
        check(may_be(at, kind, 0, 1) == (fields[i].zero == 1 || low == 0), "field %zu: zero", at);
    }
    static const struct { size_t at; char kind; int layers; const char *range; } sentences[] = {
        {68, 'i', 1, "is 4000000000, not 1 to 1048576"}, {68, 'i', 0, "not 0 to 0"},
        {112, 'c', 1, "not 0 or 0.01 to 10000"}};
    for (int i = 0; i < 3; i++)
        check(!may_be(sentences[i].at, sentences[i].kind, 4e9, sentences[i].layers) &&
                  strstr(said, sentences[i].range), "not '%s': %s", sentences[i].range, said);
}

static const uint32_t HOSTILE[] = {0, 1, 2, 3, 15, 16, 17, 64, 255, 256, 1024, 4096, 1u << 20,
                                   1u << 22, 1u << 30, 0x7fffffff, 0x80000000, 0xfffffff0, ~0u,
                                   0x7fc00000, 0x7f800000, 0xbf800000, 0x3f800000, 0x00000001};
enum { N_HOSTILE = sizeof HOSTILE / sizeof *HOSTILE };

/* Every word of header, directory, facts and tokenizer, set to hostile values under
 * a right checksum, then several at once: refused, or harmless. */
static void test_hostile_words(void)
{
    struct image m = build(&tiny_shape), copy = {fresh(m.size), m.size};
    size_t end = (size_t)(section_of(&m, 2) - m.data);
    int full = full_test();
    for (size_t at = 8; at + 4 <= end; at += 4)
        for (int i = full ? 0 : (int)(at / 4 % 3); i < N_HOSTILE; i += full ? 1 : 3) {
            memcpy(copy.data, m.data, m.size);
            put_u32(copy.data + at, HOSTILE[i]);
            seal(&copy);
            opens(&copy);
        }
    for (int i = 0; i < (full ? 100000 : 2000); i++) {
        memcpy(copy.data, m.data, m.size);
        for (uint32_t k = 0; k <= below(3); k++)
            if (below(2))
                put_u32(copy.data + 8 + below((uint32_t)end / 4 - 2) * 4,
                        HOSTILE[below(N_HOSTILE)]);
            else
                copy.data[8 + below((uint32_t)end - 8)] = (uint8_t)rnd();
        seal(&copy);
        opens(&copy);
    }
    free(m.data), free(copy.data);
}

/* Directory entries that lie.  Entry 0 is facts, 1 the tokenizer, 2 attn_norm, 3 q. */
static void test_directory(void)
{
    static const struct {
        int entry;
        uint32_t at, value;
        int legal;
    } cases[] = {
        {0, 0, 2, 0}, {0, 0, 300, 0}, {1, 0, 300, 0}, {0, 4, 1, 0}, {0, 8, 1, 0}, {0, 12, 1, 1},
        {0, 12, 2, 0}, {0, 16, 1, 0}, {0, 24, 1, 0}, {0, 80, 1, 0}, {0, 92, 1, 0}, {1, 40, 1, 0},
        {3, 0, 34, 0}, {3, 0, 36, 0}, {3, 4, 1, 0}, {3, 4, ~0u, 0}, {3, 8, 0, 0}, {3, 8, 6, 0},
        {3, 8, ~0u, 0}, {3, 16, 5, 0}, {3, 20, 1, 0}, {3, 24, 3, 0}, {3, 28, 1, 0}, {3, 32, 0, 0},
        {3, 36, 1, 0}, {3, 36, ~0u, 0}, {3, 40, 0, 0}, {3, 44, 1, 0}, {3, 44, ~0u, 0},
        {2, 8, 2, 0}, {13, 4, 1, 0}, {14, 4, 1, 0},
    };
    struct image m = build(&tiny_shape);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint8_t *p = entry_of(&m, cases[i].entry) + cases[i].at;
        uint32_t was = get_u32(p);
        put_u32(p, cases[i].value);
        seal(&m);
        check(opens(&m) == cases[i].legal, "entry %d with %#x at %u is %s", cases[i].entry,
              cases[i].value, cases[i].at, cases[i].legal ? "refused" : "accepted");
        put_u32(p, was);
    }
    free(m.data);
}

/* Files that agree with themselves and are illegal all the same.  And a second embedding,
 * which nothing would miss, in the place of the head. */
static void test_consistent_lies(void)
{
    struct shape heads = tiny_shape, odd = tiny_shape, untied = tiny_shape, align = tiny_shape;
    heads.n = 3, heads.k = 2, odd.h = 3, align.align = 32, untied.untied = 1;
    const struct shape *lies[] = {&heads, &odd, &align};
    struct image m;
    for (int i = 0; i < 3; i++) {
        m = build(lies[i]);
        check(!opens(&m), "consistent lie %d", i);
        free(m.data);
    }
    m = build(&untied);
    check(opens(&m), "an untied head");
    put_u32(entry_of(&m, (int)get_u32(m.data + 48) - 1), 16);
    seal(&m);
    check(!opens(&m), "two embeddings");
    free(m.data);
    m = build(&tiny_shape); /* as many bytes as tile_bytes would say */
    struct image x = {fresh(m.size + 64), m.size + 64};
    uint8_t *last = entry_of(&x, (int)get_u32(m.data + 48) - 1);
    memcpy(x.data, m.data, m.size), memset(x.data + m.size, 0, 64);
    put_u32(last + 8, TYPE_BYTES), put_u64(last + 40, 64 + 128), put_u64(x.data + 32, x.size);
    seal(&x);
    check(!opens(&x), "a matrix of bytes");
    free(x.data), free(m.data);
}

/* A tokenizer and nothing else, or with as many sections behind it as there may be. */
static void test_section_counts(void)
{
    static const uint64_t counts[] = {1, 2, 65536, 65537};
    static struct pieces p;
    plain_pieces(&p, 30);
    struct image m = build_tokenizer_file(&p);
    for (int i = 0; i < 4; i++) {
        uint64_t n = counts[i], at = (512 + 96 * n + 63) / 64 * 64, end = at + pieces_bytes(&p);
        struct image c = {NULL, n == 1 ? end : (end + 63) / 64 * 64};
        c.data = fresh(c.size);
        memset(c.data, 0, c.size);
        memcpy(c.data, m.data, 512);
        memcpy(entry_of(&c, 0), entry_of(&m, 1), 96);
        memcpy(c.data + at, section_of(&m, 1), end - at);
        put_u64(c.data + 32, c.size), put_u32(c.data + 48, (uint32_t)n);
        put_u64(entry_of(&c, 0) + 32, at);
        for (uint32_t k = 1; k < n; k++) { /* optional, empty */
            put_u32(entry_of(&c, (int)k), 300), put_u32(entry_of(&c, (int)k) + 4, k);
            put_u32(entry_of(&c, (int)k) + 12, 1), put_u64(entry_of(&c, (int)k) + 32, c.size);
        }
        seal(&c);
        check(opens(&c) == (n <= 65536), "%llu sections", (unsigned long long)n);
        free(c.data);
    }
    free(m.data);
}

/* A missing tensor: its entry becomes a kind unknown but optional.  Only facts can go. */
static void test_missing(void)
{
    struct image m = build(&tiny_shape);
    for (int i = 0; i < (int)get_u32(m.data + 48); i++) {
        uint32_t was = get_u32(entry_of(&m, i));
        put_u32(entry_of(&m, i), 300);
        put_u32(entry_of(&m, i) + 12, 1);
        seal(&m);
        check(opens(&m) == (i == 0), "without section %d (role %u)", i, was);
        put_u32(entry_of(&m, i), was);
        put_u32(entry_of(&m, i) + 12, 0);
    }
    free(m.data);
    struct shape untied = tiny_shape;
    untied.untied = 1;
    m = build(&untied);
    int last = (int)get_u32(m.data + 48) - 1;
    put_u32(entry_of(&m, last), 300), put_u32(entry_of(&m, last) + 12, 1);
    memset(section_of(&m, last), 0xff, 4); /* NaN is no fault in what is not known */
    seal_section(&m, last);
    gemma2_model *x = open_image(&m);
    check(gemma2_check(x, (size_t)last, NULL, 0) == 1, "an optional section is checked");
    gemma2_close(x);
    free(m.data);
}

/* A list of kept ids that is empty, too long, not in order, not of the vocabulary, or without its
 * head. */
static void test_kept_section(void)
{
    static const struct {
        uint32_t ids[8], bytes;
        int legal;
    } cases[] = {
        {{1, 2, 6}, 12, 1}, {{0}, 4, 1}, {{0, 1, 2, 3, 4, 5, 6}, 28, 1}, {{1, 2, 7}, 12, 0},
        {{1, 2, ~0u}, 12, 0}, {{1, 2, 2}, 12, 0}, {{2, 1, 6}, 12, 0}, {{0}, 0, 0}, {{1, 2}, 7, 0},
        {{0, 1, 2, 3, 4, 5, 6, 7}, 32, 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct image whole = build(&tiny_shape), m;
        m = with_kept(&whole, cases[2].ids, cases[i].bytes ? 7 : 0);
        memcpy(section_of(&m, 2), cases[i].ids, cases[i].bytes); /* 64 bytes have room for all */
        put_u64(entry_of(&m, 2) + 40, cases[i].bytes);
        seal_section(&m, 2);
        check(opens(&m) == cases[i].legal, "kept ids, case %zu", i);
        free(m.data), free(whole.data);
    }
    struct shape untied = tiny_shape;
    untied.untied = 1;
    struct image whole = build(&untied), m = with_kept(&whole, cases[0].ids, 3);
    int last = (int)get_u32(m.data + 48) - 1;
    put_u64(entry_of(&m, last) + 16, 7);
    seal(&m);
    check(!opens(&m), "a head of all rows beside kept ids");
    put_u64(entry_of(&m, last) + 16, 3), put_u32(entry_of(&m, 2), 1), put_u32(entry_of(&m, 0), 3);
    seal(&m);
    check(!opens(&m), "facts as kept ids");
    free(m.data), free(whole.data);
}

/* A word in the tokenizer section of a sealed file. */
static void tokenizer_word(struct image *m, size_t at, uint32_t value, int legal, const char *what)
{
    uint8_t *p = section_of(m, 1) + at;
    uint32_t was = get_u32(p);
    put_u32(p, value);
    seal_section(m, 1);
    check(opens(m) == legal, "tokenizer: %s", what);
    put_u32(p, was);
}

/* Whether a file opens whose second section, so many bytes of it, is the last. */
static int opens_cut(const struct image *m, size_t bytes)
{
    size_t size = (size_t)(section_of(m, 1) - m->data) + bytes;
    struct image cut = {fresh(size), size};
    memcpy(cut.data, m->data, size);
    put_u64(entry_of(&cut, 1) + 40, bytes);
    put_u64(cut.data + 32, size);
    seal(&cut);
    int opened = opens(&cut);
    free(cut.data);
    return opened;
}

static void test_tokenizer_section(void)
{
    static struct pieces p;
    plain_pieces(&p, 20);
    add_bytes_pieces(&p);
    struct image m = build_tokenizer_file(&p);
    size_t scores = 64, ends = 64 + 4 * p.n, kinds = 64 + 8 * p.n, blob = 64 + 9 * p.n;
    tokenizer_word(&m, 0, p.n - 1, 0, "another count than the header's");
    tokenizer_word(&m, 0, ~0u, 0, "a huge count");
    tokenizer_word(&m, 4, p.n, 0, "bos outside the vocabulary");
    tokenizer_word(&m, 4, ~0u, 1, "no bos");
    tokenizer_word(&m, 16, ~0u, 1, "no unk, but all bytes");
    tokenizer_word(&m, 20, 0xfffffffe, 0, "a negative turn marker");
    tokenizer_word(&m, 28, p.blob_bytes + 1, 0, "too large a blob");
    tokenizer_word(&m, 32, 1, 0, "reserved bytes");
    tokenizer_word(&m, 60, 1, 0, "reserved bytes");
    tokenizer_word(&m, scores, 0x7fc00000, 0, "a NaN score");
    tokenizer_word(&m, scores + 4, 0xff800000, 0, "an infinite score");
    tokenizer_word(&m, ends + 4, p.ends[2] + 1, 0, "ends that do not ascend");
    tokenizer_word(&m, ends + 4, ~0u, 0, "an end far away");
    tokenizer_word(&m, ends + 4, p.ends[0], 0, "an empty piece");
    tokenizer_word(&m, ends + 4 * (p.n - 1), p.ends[p.n - 1] - 1, 0, "bytes left over");
    tokenizer_word(&m, kinds, 0, 0, "kind 0");
    tokenizer_word(&m, kinds, 0x03030308, 0, "kind 8");
    tokenizer_word(&m, kinds + 8, 0x01010106, 0, "a letter that calls itself a byte");
    tokenizer_word(&m, blob, 0xff, 0, "a piece that is no UTF-8");
    tokenizer_word(&m, blob, 0x80c1, 0, "an overlong piece");
    for (size_t cut = 0; cut <= 64; cut += cut == 62 ? 1 : 62) /* it ends in its head */
        check(!opens_cut(&m, cut), "a tokenizer of %zu bytes", cut);
    put_u32(entry_of(&m, 0), ROLE_TOKENIZER), put_u32(entry_of(&m, 1), ROLE_FACTS);
    for (size_t cut = 0; cut < 12; cut++)
        check(!opens_cut(&m, cut), "facts of %zu bytes", cut);
    free(m.data);
    static const char *const bad[] = {"<0x-1>", "<0xZZ>", "<0x1>", "<0x0a>", "<0x001>", "<0xGG>",
                                      "<0x41>>"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        plain_pieces(&p, 8);
        add_piece(&p, bad[i], GEMMA2_PIECE_BYTE, 0);
        m = build_tokenizer_file(&p);
        check(!opens(&m), "the byte piece %s is accepted", bad[i]);
        free(m.data);
    }
    plain_pieces(&p, 8);
    p.special[3] = -1;
    m = build_tokenizer_file(&p);
    check(!opens(&m), "neither unk nor bytes");
    free(m.data);
    add_bytes_pieces(&p);
    p.n--, p.blob_bytes = p.ends[p.n - 1];
    m = build_tokenizer_file(&p);
    check(!opens(&m), "neither unk nor the last byte");
    free(m.data);
}

/* A vocabulary made to collide: more pieces want one place of the index than it searches. */
static void test_colliding_pieces(void)
{
    static struct pieces p;
    static uint32_t slots[2048];
    struct tokenizer t = {.buckets = slots, .bucket_mask = 2047};
    char text[16];
    uint32_t tag;
    memset(slots, 0xff, sizeof slots);
    for (int n = MAX_PROBES; n <= MAX_PROBES + 1; n++) {
        start_pieces(&p);
        for (int made = 0, i = 0; made < n; i++) {
            snprintf(text, sizeof text, "%x", (unsigned)i);
            struct text piece = {(const uint8_t *)text, (uint32_t)strlen(text)};
            if (find_bucket(&t, piece, &tag) != slots + 1024)
                continue;
            add_piece(&p, text, GEMMA2_PIECE_NORMAL, 0);
            made++;
        }
        while (p.n < 600)
            add_piece(&p, "<0x00>", GEMMA2_PIECE_USER, 0);
        struct image m = build_tokenizer_file(&p);
        char err[256] = "";
        gemma2_model *model = gemma2_open_memory(m.data, m.size, NULL, err, sizeof err);
        check(n > MAX_PROBES ? !model && strstr(err, "alike") : model != NULL,
              "%d colliding pieces: %s", n, err);
        gemma2_close(model);
        free(m.data);
    }
}

static void test_facts(void)
{
    struct model x = make(&tiny_shape);
    size_t size = 9;
    const char *value = gemma2_fact(x.m, "name", &size);
    check(value && size == 4 && !memcmp(value, "test", 4), "fact: name");
    check(gemma2_fact(x.m, "empty", &size) && size == 0, "fact: an empty one");
    check(!gemma2_fact(x.m, "nam", &size) && !gemma2_fact(x.m, "", &size), "facts not there");
    static const struct {
        uint32_t at, value;
    } lies[] = {{0, 2}, {0, 4}, {0, ~0u}, {4, 5}, {4, ~0u}, {8, 3}, {8, ~0u}, {20, 1u << 31}};
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        uint8_t *p = section_of(&x.image, 0) + lies[i].at;
        uint32_t was = get_u32(p);
        put_u32(p, lies[i].value);
        seal_section(&x.image, 0);
        check(!opens(&x.image), "facts with %#x at %u", lies[i].value, lies[i].at);
        put_u32(p, was);
    }
    unmake(&x);
}

/* gemma2_check finds every changed byte behind the directory, padding included. */
static int sections_fail(const gemma2_model *m)
{
    int n = 0;
    for (size_t i = 0; i < m->n_sections; i++)
        n += gemma2_check(m, i, NULL, 0) == GEMMA2_ERR_CORRUPT;
    return n;
}

static void check_says(const gemma2_model *m, size_t i, const char *sentence)
{
    char err[128] = "";
    check(gemma2_check(m, i, err, sizeof err) == GEMMA2_ERR_CORRUPT &&
              !strncmp(err, sentence, strlen(sentence)), "'%s', not '%s'", err, sentence);
}

static void test_check(void)
{
    struct model x = make(&tiny_shape);
    int missed = 0;
    check(sections_fail(x.m) == 0, "a sound file has faults");
    for (size_t i = 512 + 96 * x.m->n_sections; i < x.image.size; i++) {
        x.image.data[i] ^= (uint8_t)(1 << i % 8);
        missed += sections_fail(x.m) != 1;
        x.image.data[i] ^= (uint8_t)(1 << i % 8);
    }
    check(!missed, "--check misses %d changed bytes", missed);
    section_of(&x.image, 2)[-1] ^= 1;
    check_says(x.m, 2, "the padding before attn_norm of layer 0 is not zero");
    *section_of(&x.image, 3) ^= 1;
    check_says(x.m, 3, "q of layer 0 does not match");
    *section_of(&x.image, 1) ^= 1;
    check_says(x.m, 1, "tokenizer does not match");
    unmake(&x);
}

/* Values that are not finite, under a right digest: in each type, first row and last. */
static void test_check_values(void)
{
    for (int i = 0; i < N_SHAPES; i++) {
        struct image m = build(&shapes[i]);
        for (int at_end = 0; at_end < 2; at_end++) {
            uint8_t *e = entry_of(&m, 3), *data = section_of(&m, 3);
            uint32_t type = get_u32(e + 8), rows = (uint32_t)get_u64(e + 16);
            uint64_t tile = tensor_bytes(type, 1, get_u64(e + 24));
            uint32_t lane = at_end ? (rows - 1) % 16 : 0, row = at_end ? rows - 1 : 0;
            uint8_t *p = data + row / 16 * tile + lane * 4; /* input 0, or S */
            uint32_t was = get_u32(p);
            put_u32(p, type == BF16 ? 0x7f80 : at_end ? 0x7fc00000 : 0xff800000);
            seal_section(&m, 3);
            gemma2_model *model = open_image(&m);
            check_says(model, 3, "q of layer 0 holds values that are not finite");
            exercise(model);
            gemma2_close(model);
            put_u32(p, was);
        }
        free(m.data);
    }
}

static void test_foreign(void)
{
    static const struct {
        const char *bytes;
        size_t n;
        const char *needle;
    } cases[] = {
        {"", 0, "is empty"}, {"<!DOCTYPE html>", 15, "web page"}, {"<", 1, "web page"},
        {"\x1f\x8b\x08\0\0\0\0\0", 8, "gzip"}, {"GGUF\3\0\0\0\0\0\0\0", 12, "GGUF"},
        {"\xfd" "7zXZ\0\0\0", 8, "xz"}, {"PK\3\4\0\0\0\0", 8, "zip"},
        {"\x10\0\0\0\0\0\0\0{\"a\":1}       ", 22, "safetensors"},
        {"version https://git-lfs.github.com/spec/v1\n", 43, "LFS"},
        {"\x89GEMMA2\n", 8, "cut short"}, {"\x89GEMMA2\n\1\0\0\0", 12, "cut short"},
        {"\x89GEMMA", 6, "not a gemma2.c model"}, {"hello", 5, "not a gemma2.c model"},
        {"x", 1, "not a gemma2.c model"}, {"\x80\2}q\0", 5, "PyTorch"},
        {"\x89HDF\r\n\x1a\n", 8, "HDF5"},
        {"\x89GEMSES\n", 8, "saved session"}, {"\x89GEMMAI\n", 8, "importance"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        refused(write_file("foreign", cases[i].bytes, cases[i].n), cases[i].needle);
    refused(in_dir("nothing"), "cannot open");
    refused(scratch_dir, "is a directory");
#ifdef _WIN32
    refused("NUL", "device");
    refused("\xff.bin", "UTF-8");
#else
    check(mkfifo(in_dir("fifo"), 0600) == 0, "mkfifo");
    refused(in_dir("fifo"), "pipe");
    refused("/dev/zero", "device");
    remove(in_dir("fifo"));
#endif
    remove(in_dir("foreign"));
}

/* By path, mapped and read, and from memory: the same model.  Wrong sizes are named. */
static void test_open_ways(void)
{
    struct image m = build(&tiny_shape);
    char needle[64];
    gemma2_open_params p;
    gemma2_open_params_init(&p);
    for (p.read_into_memory = 0; p.read_into_memory < 2; p.read_into_memory++) {
        const char *path = write_file("model", m.data, m.size);
        gemma2_model *x = gemma2_open(path, &p, NULL, 0);
        check(x && sections_fail(x) == 0, "open, read_into_memory %u", p.read_into_memory);
        if (x)
            exercise(x);
        gemma2_close(x);
    }
    snprintf(needle, sizeof needle, "has %zu bytes, but should have %zu", m.size - 1, m.size);
    refused(write_file("model", m.data, m.size - 1), needle);
    check(!gemma2_open_memory(m.data + 32, m.size, NULL, NULL, 0), "memory not aligned to 64");
    check(!gemma2_open_memory(NULL, 100, NULL, NULL, 0) && !gemma2_open(NULL, NULL, NULL, 0),
          "NULLs");
    p.read_into_memory = 1;
    check(!gemma2_open_memory(m.data, m.size, &p, needle, sizeof needle) &&
              strstr(needle, "params not from"), "memory to be read into memory: %s", needle);
    p.struct_size = 4;
    check(!gemma2_open(in_dir("model"), &p, NULL, 0) &&
              !gemma2_open_memory(m.data, m.size, &p, NULL, 0), "open params of a wrong size");
    remove(in_dir("model"));
    gemma2_close(NULL);
    free(m.data);
}

static void test_weight_file(void)
{
    test_models_open();
    test_truncated();
    test_flipped();
    test_header_limits();
    test_field_limits();
    test_hostile_words();
    test_directory();
    test_consistent_lies();
    test_section_counts();
    test_missing();
    test_kept_section();
    test_tokenizer_section();
    test_colliding_pieces();
    test_facts();
    test_check();
    test_check_values();
    test_foreign();
    test_open_ways();
}
