/* Section 6, what constrains the sampler: grammars and masks. */

static gemma2_model *words; /* tokenizer.bin */

/* Whether the text, token by token as encoded, is a sentence of the grammar. */
static int takes(gemma2_matcher *m, const char *text)
{
    static int32_t ids[4096];
    gemma2_grammar_state state;
    size_t room = gemma2_encode_scratch(4096);
    void *scratch = malloc(room);
    int64_t n = gemma2_encode(words, text, -1, GEMMA2_ENCODE_PLAIN, ids, 4096, scratch, room);
    int status = gemma2_matcher_start(m, &state);
    for (int64_t i = 0; i < n && status == GEMMA2_OK; i++)
        status = gemma2_matcher_accept(m, &state, ids[i]);
    if (status == GEMMA2_OK) /* a stop id is taken where the reply may end */
        status = gemma2_matcher_accept(m, &state, words->config.stop[0]);
    free(scratch);
    return status == GEMMA2_OK;
}

/* Texts behind '+' must be taken, behind '-' refused. */
static const struct language {
    const char *grammar, *texts[8];
} LANGUAGES[] = {
    {"root ::= \"yes\" | \"no\"", {"+yes", "+no", "-", "-ye", "-yess", "-Yes"}},
    {"# c\nroot ::= (a # d\n | b)+ \"!\"?\na ::= \"x\" |\n \"y\"\nb ::= [0-9]{2}\n",
     {"+x", "+xy12!", "-1", "-123", "-!", "-x!!"}},
    {"root ::= [^a-c\\n]*", {"+", "+xyz \xc3\xa9\xf0\x9f\x98\x80", "-b", "-x\n"}},
    {"root ::= [\xc3\xa9-\xc3\xbc]{2,3} \"\\u00df\"",
     {"+\xc3\xa9\xc3\xbc\xc3\x9f", "-\xc3\xa9\xc3\x9f", "-ee\xc3\x9f"}},
    {"root ::= .{3}", {"+abc", "+\xe6\x97\xa5\n\xf0\x9f\x98\x80", "-ab", "-abcd"}},
    {"root ::= \"(\" root \")\" root | \"\"", {"+", "+()", "+(()())()", "-(()", "-)("}},
    {"root ::= (\"a\"* \"b\"?)* \"c\"{0} x{1,2}\nx ::= \"d\"", {"+d", "+abbadd", "-ab", "-ddd"}},
    {"root ::= \"x\"{1} \"y\"{2,} \"z\"+", {"+xyyz", "+xyyyyzz", "-xyz", "-yyz", "-xyy"}},
    {"root ::= \"\\\"\\\\\\x41\\t\" [\\]\\[-]", {"+\"\\A\t]", "+\"\\A\t-", "-\"\\A\tx"}},
    {"root ::= s\ns ::= \"a\" s \"b\"? | \"c\"", {"+c", "+aaacb", "+aaac", "-aacbbb"}},
    {"root ::= (\"\" | \"x\")* .+ \"end\"", {"+xxaend", "+endend", "-end", "-xen"}},
    {"root ::= \"'\" [^\"\\\\\\x00-\\x1f\\x7f]{2,18} \"'\"",
     {"+'ab'", "+'it's one'", "-'a'", "-'abcdefghijklmnopqrs'"}},
    {"root ::= \"<\" [ab]* (\"\\x01\\x02\\x03\" | \"it is\")", {"+<abit is", "+<\1\2\3", "-<a"}},
    {"root ::= <[235285]> !<bos>*", {"+Iab", "+I", "-b"}}, /* 235285: I */
    {"root ::= \"a\"\nroot ::= \"b\"", {"+b", "-a"}}, /* the last counts */
};

static const char *const REFUSED[][2] = {
    {"root ::= root \"a\" | \"b\"", "line 1, column 1: the rule 'root' can begin with itself"},
    {"root ::= \"x\" | n root \"a\"\nn ::= \"\"", "can begin with itself"},
    {"root ::= \"a\" root", "no text of at most"},
    {"a ::= \"a\"", "no rule 'root'"},
    {"root ::= \"a\"\nb ::= c", "line 2, column 7: there is no rule 'c'"},
    {"root ::= (\"a\"", "line 1, column 10: this ( is not closed"},
    {"root ::= \"a", "line 1, column 10: this has no closing \""},
    {"root ::= [a", "this has no closing ]"},
    {"root ::= []", "no character is in this class"},
    {"root ::= [b-a]", "this range ends before it begins"},
    {"root ::= \"\\q\"", "there is no such escape"},
    {"root ::= \"\\uD800\"", "U+D800 is no character"},
    {"root ::= \"a\"{2001}", "a repetition is"},
    {"root ::= \"a\"{3,2}", "a repetition is"},
    {"root ::= \"a\"{1,2001}", "a repetition is"},
    {"root ::= \"a\")", "this ) closes nothing"},
    {"root = \"a\"", "::= was expected"},
    {"root ::= \"\xff\"", "this is not UTF-8"},
    {"root ::= <[999999]>", "the vocabulary has no such token"},
    {"root ::= \"a\" <eos>", "this token ends replies"},
};

static void test_languages(void)
{
    char err[256];
    for (size_t i = 0; i < sizeof LANGUAGES / sizeof *LANGUAGES; i++) {
        const struct language *l = &LANGUAGES[i];
        gemma2_grammar *g = gemma2_grammar_new(words, l->grammar, -1, err, sizeof err);
        gemma2_matcher *m = gemma2_matcher_new(g);
        check(m != NULL, "%s: %s", l->grammar, err);
        for (int k = 0; m && k < 8 && l->texts[k]; k++)
            check(takes(m, l->texts[k] + 1) == (l->texts[k][0] == '+'), "%s: %s", l->grammar,
                  l->texts[k]);
        gemma2_matcher_free(m), gemma2_grammar_free(g);
    }
    for (size_t i = 0; i < sizeof REFUSED / sizeof *REFUSED; i++) {
        gemma2_grammar *g = gemma2_grammar_new(words, REFUSED[i][0], -1, err, sizeof err);
        check(!g && strstr(err, REFUSED[i][1]), "%s: %s", REFUSED[i][0], g ? "taken" : err);
        gemma2_grammar_free(g);
    }
}

/* Every mask says of each token what accept says, and a reply that is cut ends in time. */
static void test_masks(void)
{
    static uint32_t mask[8192], again[8192];
    char err[256];
    uint32_t n = (uint32_t)words->config.n_vocab, draw = 1;
    for (size_t i = 0; i < sizeof LANGUAGES / sizeof *LANGUAGES; i++) {
        gemma2_grammar *g = gemma2_grammar_new(words, LANGUAGES[i].grammar, -1, err, sizeof err);
        gemma2_matcher *m = gemma2_matcher_new(g);
        gemma2_grammar_state state, next;
        gemma2_matcher_start(m, &state);
        int64_t left = gemma2_matcher_shortest(m, &state) + (int64_t)(i % 3), over = 0;
        for (int step = 0; !over; step++, left--) {
            int32_t chosen = -1, choices = 0;
            check(gemma2_matcher_allowed(m, &state, step ? left : -1, mask) == GEMMA2_OK, "mask");
            for (uint32_t id = step ? n : 0; id < n; id++) {
                next = state;
                check((gemma2_matcher_accept(m, &next, (int32_t)id) == GEMMA2_OK) ==
                          (int)(mask[id / 32] >> id % 32 & 1),
                      "%s: token %u", LANGUAGES[i].grammar, id);
            }
            gemma2_matcher_allowed(m, &state, left, mask);
            memset(m->ready, 0, sizeof m->ready); /* a kept mask says what a new one says */
            gemma2_matcher_allowed(m, &state, left, again);
            check(!memcmp(mask, again, (n + 7) / 8), "%s: a mask that was kept is another",
                  LANGUAGES[i].grammar);
            for (uint32_t id = 0; id < n; id++)
                if (mask[id / 32] >> id % 32 & 1) {
                    draw = draw * 1664525 + 1013904223;
                    chosen = (draw >> 16) % (uint32_t)++choices ? chosen : (int32_t)id;
                }
            check(chosen >= 0, "%s: nothing is allowed with %d left", LANGUAGES[i].grammar,
                  (int)left);
            over = chosen < 0 || gemma2_is_stop(words, chosen);
            if (!over)
                check(gemma2_matcher_accept(m, &state, chosen) == GEMMA2_OK, "accept");
        }
        next = (gemma2_grammar_state){state.tag, state.set + 100000000};
        check(gemma2_matcher_accept(m, &next, 5) == GEMMA2_ERR_MISMATCH, "a hostile state");
        next.tag ^= 1;
        check(gemma2_matcher_allowed(m, &next, 1, mask) == GEMMA2_ERR_MISMATCH, "a foreign state");
        gemma2_matcher_free(m), gemma2_grammar_free(g);
    }
}

/* Where a vocabulary is kept in part, only that part is allowed or accepted, and the shortest reply
 * is made of it. */
static void test_kept_masks(void)
{
    static uint32_t ids[1 << 18], mask[8192];
    char err[256];
    gemma2_model *m = gemma2_open("tokenizer.bin", NULL, err, sizeof err);
    uint32_t n = 0, v = m ? m->tokenizer.n : 0, bad = 0;
    for (uint32_t id = 0; id < v; id++)
        if (m->tokenizer.kinds[id] != GEMMA2_PIECE_NORMAL || id % 3 == 0)
            ids[n++] = id;
    m->kept = ids, m->head.rows = n;
    gemma2_grammar *g = gemma2_grammar_new(m, "root ::= .* !<bos> \"It is wonderful.\"", -1, err,
                                           256);
    gemma2_matcher *matcher = gemma2_matcher_new(g);
    gemma2_grammar_state state;
    gemma2_matcher_start(matcher, &state);
    int64_t left = gemma2_matcher_shortest(matcher, &state), over = 0;
    for (gemma2_matcher_allowed(matcher, &state, -1, mask); left >= 0 && !over && !bad; left--) {
        uint32_t first;
        for (uint32_t id = 0; id < v; id++)
            bad += !is_kept(m, id) &&
                   ((mask[id / 32] >> id % 32 & 1) ||
                    gemma2_matcher_accept(matcher, &state, (int32_t)id) != GEMMA2_ERR_TOKEN);
        gemma2_matcher_allowed(matcher, &state, left, mask);
        for (first = 0; first < v && !(mask[first / 32] >> first % 32 & 1);)
            first++;
        over = gemma2_is_stop(m, (int32_t)first);
        bad += first == v || (!over && gemma2_matcher_accept(matcher, &state, (int32_t)first));
    }
    check(over && !bad && left == -1, "masks of kept ids: %u are wrong, %d left", bad, (int)left);
    gemma2_matcher_free(matcher), gemma2_grammar_free(g);
    check(!gemma2_grammar_new(m, "root ::= <[235285]>", -1, err, 256) &&
          strstr(err, "column 10: the model cannot write this token"), "a token that is not kept");
    m->kept = ids + 1, m->head.rows = 300; /* without the last bytes */
    check(!gemma2_grammar_new(m, "root ::= .", -1, err, 256) && strstr(err, "no piece for byte"),
          "a vocabulary that has not kept all bytes");
    gemma2_close(m);
}

/* Grammars that take memory or depth are refused or stay small. */
static void test_huge_grammars(void)
{
    enum { N = 60000 };
    static char text[2 * N + 64];
    char err[256];
    size_t n = (size_t)sprintf(text, "root ::= ");
    memset(text + n, '(', N), memcpy(text + n + N, "\"a\"", 3), memset(text + n + N + 3, ')', N);
    gemma2_grammar *g = gemma2_grammar_new(words, text, (int64_t)(n + 2 * N + 3), err, sizeof err);
    check(!g && strstr(err, "nested deeper"), "60,000 parentheses");
    static const char repeats[] = "root ::= (((\"a\"{1,2000} \"b\"){1,2000}){1,2000})";
    g = gemma2_grammar_new(words, repeats, -1, err, sizeof err);
    check(g && g->n_insts < 20000, "nested repetition: %s", g ? "large" : err);
    gemma2_grammar_free(g);
    for (n = 0; n < 2 * N; n += 5)
        sprintf(text + n, "%04x ", (unsigned)n / 5);
    memcpy(text, "root ::= ", 9);
    g = gemma2_grammar_new(words, text, (int64_t)n, err, sizeof err);
    check(!g && strstr(err, "there is no rule '5dbf'"), "24,000 names without a rule: %s", err);
}

/* Takes up to n tokens that masks allow, drawn at random, of which none ends the reply.  Returns
 * how many.  Before them so many sets were used. */
static int take_random(const char *name, const char *text, int n, uint32_t used)
{
    static uint32_t mask[8192];
    char err[256];
    uint32_t n_words = ((uint32_t)words->config.n_vocab + 31) / 32, draw = 1;
    gemma2_grammar *g = gemma2_grammar_new(words, text, -1, err, sizeof err);
    gemma2_matcher *m = gemma2_matcher_new(g);
    gemma2_grammar_state state;
    int status = gemma2_matcher_start(m, &state), step = 0;
    if (m)
        m->n_sets += used;
    for (; status == GEMMA2_OK && step < n; step++) {
        status = gemma2_matcher_allowed(m, &state, -1, mask);
        for (int32_t i = 0; i < words->config.n_stop; i++)
            mask[words->config.stop[i] / 32] &= ~(1u << words->config.stop[i] % 32);
        draw = draw * 1664525 + 1013904223;
        uint32_t at = (draw >> 8) % n_words, end = at + n_words, bit = 0;
        while (at < end && !mask[at % n_words])
            at++;
        if (at == end)
            break;
        while (!(mask[at % n_words] >> bit & 1))
            bit++;
        if (status == GEMMA2_OK)
            status = gemma2_matcher_accept(m, &state, (int32_t)(at % n_words * 32 + bit));
    }
    check(status == GEMMA2_OK, "%s: %s at token %d", name, g ? gemma2_error_string(status) : err,
          step);
    gemma2_matcher_free(m), gemma2_grammar_free(g);
    return step;
}

/* Tokens that a grammar names: known before any mask, all of them where the reply is short, and
 * counted as exactly as texts: here It, is and wonderful follow. */
static void test_named_tokens(void)
{
    static uint32_t mask[8192];
    gemma2_grammar *g = gemma2_grammar_new(words, "root ::= (<bos> | <mask>) \"It is wonderful\"",
                                           -1, NULL, 0);
    gemma2_matcher *m = gemma2_matcher_new(g);
    gemma2_grammar_state state, next;
    int32_t bos = gemma2_find_piece(words, "<bos>", -1);
    int32_t other = gemma2_find_piece(words, "<mask>", -1);
    gemma2_matcher_start(m, &state), next = state;
    check(gemma2_matcher_accept(m, &next, bos) == GEMMA2_OK, "a named token before any mask");
    check(gemma2_matcher_shortest(m, &next) == 3 && gemma2_matcher_shortest(m, &state) == 4,
          "the fewest tokens behind a named token");
    gemma2_matcher_allowed(m, &state, gemma2_matcher_shortest(m, &state), mask);
    check((mask[bos / 32] >> bos % 32 & 1) && (mask[other / 32] >> other % 32 & 1),
          "two named tokens in a short reply");
    gemma2_matcher_free(m), gemma2_grammar_free(g);
}

/* A grammar that is not refused serves replies of any length. */
static void test_large_grammars(void)
{
    char *text = malloc(1 << 21);
    size_t n = (size_t)sprintf(text, "root ::= \"{\"");
    for (int i = 0; i < 3000; i++)
        n += (size_t)sprintf(text + n, " (\"key%d\" [0-9]+)?", i);
    sprintf(text + n, " \"}\"{50}");
    check(take_random("3,000 optional keys", text, 30, 0) > 5, "3,000 keys end early");
    n = (size_t)sprintf(text, "root ::= r0\n");
    for (int i = 0; i < 20000; i++)
        n += (size_t)sprintf(text + n, "r%d ::= r%d \"b\"?\n", i, i + 1);
    sprintf(text + n, "r20000 ::= \"a\"");
    check(take_random("a chain of 20,000 rules", text, 10, 0) == 10, "a chain ends early");
    n = (size_t)sprintf(text, "root ::= \"!\"");
    for (int i = 0; i < 26 * 26 * 26; i++)
        n += (size_t)sprintf(text + n, " | \"%c%c%c-\" root", 'a' + i / 676, 'a' + i / 26 % 26,
                             'a' + i % 26);
    check(take_random("17,576 words", text, 10, 0) > 0, "words end early");
    n = (size_t)sprintf(text, "x ::= \"a\"?\nroot ::= \"b\" ");
    for (int i = 0; i < 20000; i++)
        n += (size_t)sprintf(text + n, "x ");
    check(take_random("a rule that may be empty, 20,000 times", text, 2, 0) == 2, "it ends early");
    check(take_random("a long reply", "root ::= (\"a\" root \"x\" | \"b\" root \"y\")*", 200,
                      MAX_SETS - 5000) == 200, "a long reply ends early");
    free(text);
}

/* Where a deep state needs over half of the memory, half of the rest must be used. */
static void test_room(void)
{
    gemma2_grammar *g = gemma2_grammar_new(words, "root ::= \"a\"", -1, NULL, 0);
    gemma2_matcher *m = gemma2_matcher_new(g);
    check(m != NULL, "a small grammar is refused");
    if (m) {
        uint32_t tag = m->tag;
        m->n_sets = m->sets_left = MAX_SETS / 8 * 5;
        check(make_room(m, 1) == 1 && m->tag == tag, "what cannot be forgotten is copied");
        m->n_sets = MAX_SETS / 8 * 7;
        check(make_room(m, 1) == 1 && m->tag != tag && m->n_sets == 2, "nothing is forgotten");
    }
    gemma2_matcher_free(m);
    gemma2_grammar_free(g);
}

static void test_pieces(void)
{
    static const struct {
        const char *piece, *bytes;
        int n;
    } known[] = {{"\xe2\x96\x81the", " the", 4}, {"<0x00>", "", 1}, {"<0xE9>", "\xe9", 1},
                 {"<bos>", "", 0}, {"<start_of_turn>", "", 0}, {"\n\n", "\n\n", 2}};
    char bytes[16];
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        int32_t id = gemma2_find_piece(words, known[i].piece, -1);
        int64_t n = gemma2_piece_bytes(words, id, bytes, sizeof bytes);
        check(n == known[i].n && !memcmp(bytes, known[i].bytes, (size_t)n), "%s", known[i].piece);
        check(gemma2_piece_bytes(words, id, NULL, 0) == n, "%s is counted", known[i].piece);
    }
    for (int32_t id = 0; id < words->config.n_vocab; id += 5003) {
        size_t n;
        const char *piece = gemma2_piece(words, id, &n, NULL);
        check(gemma2_find_piece(words, piece, (int64_t)n) == id, "piece %d", (int)id);
    }
    check(gemma2_find_piece(words, "no such piece", -1) == GEMMA2_ERR_TOKEN &&
          gemma2_find_piece(words, NULL, 0) == GEMMA2_ERR_ARGUMENT &&
          gemma2_piece_bytes(words, -1, NULL, 0) == GEMMA2_ERR_TOKEN, "what is none is said");
}

static void test_constraints(void)
{
    char err[256];
    words = gemma2_open("tokenizer.bin", NULL, err, sizeof err);
    if (!words) {
        check(0, "tokenizer.bin: %s", err);
        return;
    }
    test_languages();
    test_masks();
    test_kept_masks();
    test_huge_grammars();
    test_named_tokens();
    test_large_grammars();
    test_room();
    test_pieces();
    gemma2_close(words);
}
