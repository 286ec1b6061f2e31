/* Unit tests of run.c, which is included here so that its statics are in reach.
 *
 *   cc -O2 -ffp-contract=off tests/test_run.c gemma2.c -lm && ./a.out */
#define main run_main
#define check run_check /* its own is a mode */
#define gemma2_encode_chat other_chat
#include "../run.c"
#undef main
#undef check
#undef gemma2_encode_chat

#include "check.h"

/* ---- options ---- */

#define EVERYWHERE " model quiet verbose help version threads exact in-memory context window kv " \
    "max-tokens temperature seed top-k top-p min-p repeat-penalty presence-penalty " \
    "frequency-penalty repeat-last-n logit-bias stop schema-spaces ignore-eos lookup draft-max " \
    "full "
#define PROMPT_WORDS " chat system prompt file ids "
#define FORMS " choice grammar schema "

/* The options that a mode takes.  It refuses all others, but for those that choose a mode. */
static const struct {
    mode_kind mode;
    const char *takes;
} MEANINGS[] = {
    {GENERATE, PROMPT_WORDS FORMS " echo json top-logprobs draft session load "},
    {CONVERSE, " chat system " FORMS " draft session load history "},
    {BATCH, " chat system " FORMS " json top-logprobs draft output parallel "},
    {TOKENIZE, PROMPT_WORDS " json "},
    {DETOKENIZE, ""},
    {LOGITS, PROMPT_WORDS " json "},
    {SCORE, PROMPT_WORDS " json "},
    {PERPLEXITY, ""},
    {IMPORTANCE, " prompt file ids importance-block "},
    {INFO, " json "},
    {CHECK, ""},
    {TRACE, PROMPT_WORDS},
    {EMBED, PROMPT_WORDS " json "},
    {REWARD, PROMPT_WORDS " json "},
};

static void test_meanings(void)
{
    char said[SENTENCE], word[40];
    for (size_t i = 0; i < sizeof MEANINGS / sizeof *MEANINGS; i++)
        for (const option *o = OPTIONS; o < OPTIONS + N_OPTIONS; o++) {
            if (o->kind == HEADING || o->mode)
                continue;
            options opts = {.mode = MEANINGS[i].mode, .given = &o, .n_given = 1};
            snprintf(word, sizeof word, " %s ", o->name);
            int used = strstr(MEANINGS[i].takes, word) || strstr(EVERYWHERE, word);
            overheard = strcpy(said, "");
            check(check_meanings(&opts) == (used ? DONE : USAGE) && (used || strstr(said, o->name)),
                  "--%s in mode %d: '%s'", o->name, (int)MEANINGS[i].mode, said);
            overheard = NULL;
        }
}

/* ---- JSON ---- */

/* Reads a copy of exactly those bytes, so that a sanitizer sees a step past their end. */
static int reads(const char *text, size_t size, json *j)
{
    char *copy = malloc(size ? size : 1);
    if (!copy)
        exit(1);
    memcpy(copy, text, size);
    int sound = json_read(j, copy, size);
    check(sound == !j->why, "%s: a refusal needs a reason, and nothing else has one", text);
    check(j->at <= size, "%s: the place of an error is in the text", text);
    json_free(j);
    free(copy);
    return sound;
}

static const char *const SOUND[] = {
    "0", "-0", "12.5e-3", " null\n", "true", "false", "\"\"", "[]", "{}", "[1,2, [3]]",
    "{\"a\":1,\"b\":{\"a\":[{}]},\"A\":2}", "\"\\u0000\\ud83d\\ude00\\/\\b\"", "\"\xc3\xa9\x7f\"",
    "\"\xEF\xBF\xBD\"", "1E+2", "[{\"\":{\"\":0}},{\"\":1}]", "\"\xF4\x8F\xBF\xBF\""};

static const struct {
    const char *text;
    size_t at;
    const char *why;
} UNSOUND[] = {
    {"", 0, "early"}, {" ", 1, "early"}, {"[", 1, "early"}, {"{", 1, "key"}, {"nul", 0, "value"},
    {"nulll", 4, "follow"}, {"True", 0, "value"}, {"NaN", 0, "value"}, {"+1", 0, "value"},
    {".5", 0, "value"}, {"01", 0, "needless"}, {"-", 1, "digit"}, {"-a", 1, "digit"},
    {"1.", 2, "digit"}, {"1e", 2, "digit"}, {"1e+", 3, "digit"}, {"0x1", 1, "follow"},
    {"1 2", 2, "follow"}, {"[1,]", 3, "value"}, {"[,1]", 1, "value"}, {"[1 2]", 3, "comma"},
    {"[1}", 2, "comma"}, {"{\"a\"}", 4, "colon"}, {"{\"a\":}", 5, "value"}, {"{a:1}", 1, "key"},
    {"{\"a\":1,}", 7, "key"}, {"{'a':1}", 1, "key"}, {"{1:1}", 1, "key"}, {"{\"a\":1]", 6, "comma"},
    {"\"", 1, "quote"}, {"\"\\", 1, "escape"}, {"\"\\\"", 3, "quote"}, {"\"\\x\"", 1, "escape"},
    {"\"\\u12\"", 1, "escape"}, {"\"\\u12g4\"", 1, "escape"}, {"\"\\ud800\"", 1, "surrogate"},
    {"\"\\udc00\"", 1, "surrogate"}, {"\"\\ud800\\ud800\"", 1, "surrogate"},
    {"\"\\ud800x\\udc00\"", 1, "surrogate"}, {"\"\t\"", 1, "control"}, {"\"a\n\"", 2, "control"},
    {"\"\xff\"", 1, "UTF-8"}, {"\"\xc3\"", 1, "UTF-8"}, {"\"\xc0\x80\"", 1, "UTF-8"},
    {"\"\xed\xa0\x80\"", 1, "UTF-8"}, {"\"\xf5\x80\x80\x80\"", 1, "UTF-8"},
    {"\xEF\xBB\xBF{}", 0, "value"}, {"{\"a\":1,\"a\":2}", 7, "twice"},
    {"{\"a\":1,\"b\":2,\"\\u0061\":3}", 13, "twice"}, {"[{\"\\n\":0,\"\\u000A\":0}]", 9, "twice"},
    {"// x\n1", 0, "value"}, {"[1]]", 3, "follow"}};

static void test_json_refusals(void)
{
    json j;
    for (size_t i = 0; i < sizeof SOUND / sizeof *SOUND; i++)
        if (!reads(SOUND[i], strlen(SOUND[i]), &j))
            check(0, "%s: %s", SOUND[i], j.why);
    for (size_t i = 0; i < sizeof UNSOUND / sizeof *UNSOUND; i++) {
        int refused = !reads(UNSOUND[i].text, strlen(UNSOUND[i].text), &j);
        if (check(refused, "%s is taken", UNSOUND[i].text)) {
            check(strstr(j.why, UNSOUND[i].why) != NULL, "%s: %s", UNSOUND[i].text, j.why);
            check(j.at == UNSOUND[i].at, "%s: at byte %zu", UNSOUND[i].text, j.at);
        }
    }
    check(!reads("\"\0\"", 3, &j), "a NUL in a string is taken");
    check(!reads("1\0", 2, &j) && !reads("\0", 1, &j) && !reads("[1,\0]", 5, &j),
          "a NUL between values is taken");
    const char *whole = SOUND[10]; /* every beginning of an object is refused */
    for (size_t n = 0; n < strlen(whole); n++)
        check(!reads(whole, n, &j), "%.*s is taken", (int)n, whole);
}

/* Nesting up to the limit, far beyond it, and wide objects. */
static void test_json_sizes(void)
{
    enum { WIDE = 200000, DEEP = 1000000 };
    json j;
    char *text = malloc(16 * WIDE + 2);
    if (!text)
        exit(1);
    memset(text, '[', JSON_DEPTH);
    memset(text + JSON_DEPTH, ']', JSON_DEPTH);
    check(reads(text, 2 * JSON_DEPTH, &j), "512 arrays are refused");
    memset(text, '[', DEEP);
    check(!reads(text, DEEP, &j) && j.at == JSON_DEPTH, "a million arrays are taken");
    for (int repeats = 0; repeats < 2; repeats++) {
        size_t n = 0;
        for (int i = 0; i < WIDE; i++)
            n += (size_t)sprintf(text + n, "%c\"%07d\":0", i ? ',' : '{',
                                 repeats && i == WIDE - 1 ? 5 : i);
        text[n++] = '}';
        check(reads(text, n, &j) == !repeats, "an object of 200,000 keys, %d of them twice",
              repeats);
    }
    free(text);
}

static void test_json_values(void)
{
    static const char text[] =
        "{\"s\": \"a\\\"\\\\\\/\\b\\f\\n\\r\\t\\u0000\\u00e9\\u20ac\\uD83D\\uDE00\xc3\xa9\","
        " \"n\": [12, -1, 1.5, 1e2, 18446744073709551615, 18446744073709551616, 1e400, 0.1],"
        " \"\\u006f\": {\"x\": null, \"y\": [true, false]}}";
    static const char meaning[] = "a\"\\/\b\f\n\r\t\0\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\xc3\xa9";
    json j;
    uint64_t whole;
    size_t size;
    if (!check(json_read(&j, text, sizeof text - 1), "a text is refused"))
        return;
    const json_node *root = j.nodes.items, *s = json_get(&j, root, "s");
    check(root->kind == JSON_OBJECT && root->n == 3 && root->next == j.nodes.n, "the root");
    const char *decoded = s ? json_text(&j, s, &size) : NULL;
    check(decoded && size == sizeof meaning - 1 && memcmp(decoded, meaning, size + 1) == 0,
          "the characters of a string");
    const json_node *n = json_get(&j, root, "n");
    static const int wholes[] = {1, 0, 0, 0, 1, 0, 0, 0};
    if (check(n && n->kind == JSON_ARRAY && n->n == 8, "an array of 8")) {
        const json_node *each = n + 1;
        for (int i = 0; i < 8; i++, each = json_next(&j, each)) {
            check(parse_whole(j.text + each->start, UINT64_MAX, &whole) == wholes[i],
                  "whole number %d", i);
        }
    }
    const json_node *o = json_get(&j, root, "o");
    check(o && json_get(&j, o, "x") && json_get(&j, o, "x")->kind == JSON_NULL, "o.x");
    check(o && json_get(&j, o, "y") && json_get(&j, o, "y")->n == 2, "o.y");
    check(!json_get(&j, root, "x") && !json_get(&j, s, "s") && !json_get(&j, root, ""), "no keys");
    json_free(&j);
}

/* ---- schemas ---- */

/* Texts behind '+' fit, behind '-' do not; behind '=' they fit with spaces. */
static const struct {
    const char *schema, *texts[9];
} SCHEMAS[] = {
    {"{\"allOf\":[{\"required\":[\"a\"],\"properties\":{\"a\":{\"type\":\"integer\"}}},"
     "{\"properties\":{\"b\":true,\"a\":{\"minimum\":3}}}]}",
     {"+{\"a\":3}", "+{\"a\":9,\"b\":[]}", "-{\"a\":2}", "-{\"b\":1}", "-{\"a\":3,\"c\":1}",
      "={\"a\": 3, \"b\": [1, 2]}"}},
    {"{\"properties\":{\"k\":{\"enum\":[1,2]},\"kin\":true},\"additionalProperties\":"
     "{\"type\":\"null\"}}",
     {"+{\"k\":2,\"kin\":0}", "+{\"kin\":null}", "+{}", "-{\"ki\":null}", "-{\"k\":null}",
      "-{\"kin\":null,\"k\":1}"}},
    {"{\"additionalProperties\":{\"type\":\"null\"},\"minProperties\":1,\"maxProperties\":2}",
     {"+{\"ki\":null}", "+{\"\":null,\"\\n\":null}", "-{}", "-{\"ki\":1}",
      "-{\"a\":null,\"b\":null,\"c\":null}", "={\"a\": null, \"b\": null}"}},
    {"{\"properties\":{\"a\":true,\"b\":{\"type\":\"null\"},\"c\":{\"const\":1}},"
     "\"required\":[\"b\"]}",
     {"+{\"a\":0,\"b\":null,\"c\":1}", "+{\"b\":null}", "+{\"b\":null,\"c\":1}", "-{\"a\":0}",
      "-{}", "-{\"b\":null,\"a\":0}", "-{\"a\":0,\"c\":1}", "={\"a\": 0, \"b\": null}"}},
    {"{\"type\":\"object\",\"properties\":{\"x\":{\"type\":\"integer\"}},"
     "\"anyOf\":[{\"required\":[\"x\"]},{\"properties\":{\"y\":{\"const\":1}},"
     "\"required\":[\"y\"]}]}",
     {"+{\"x\":1}", "+{\"x\":1,\"y\":1}", "+{\"y\":1}", "-{}", "-{\"y\":2}"}},
    {"{\"type\":\"number\",\"exclusiveMinimum\":-1,\"maximum\":12}",
     {"+-0.99", "+0", "+12", "+11.999", "--1", "--1.0", "-12.000001", "-13", "--1.5"}},
    {"{\"type\":\"number\",\"exclusiveMinimum\":3,\"exclusiveMaximum\":4}",
     {"+3.5", "+3.001", "+3.999", "-3", "-3.0", "-4", "-4.0", "-2.5"}},
    {"{\"type\":\"number\",\"exclusiveMaximum\":0}", {"+-0.5", "+-70", "-0", "--0", "--0.0", "-1"}},
    {"{\"type\":\"number\",\"minimum\":-1e15,\"maximum\":1e15}", {"+-9.5", "+7", "-9e50"}},
    {"{\"type\":\"integer\",\"minimum\":-12.5,\"exclusiveMaximum\":100}",
     {"+-12", "+0", "+99", "--13", "-100", "-007", "-1.0"}},
    {"{\"oneOf\":[{\"type\":\"object\",\"required\":[\"t\"],\"properties\":{\"t\":"
     "{\"const\":\"a\"}}},{\"type\":\"object\",\"required\":[\"t\"],\"properties\":{\"t\":"
     "{\"enum\":[\"b\",\"c\"]},\"n\":true}}]}",
     {"+{\"t\":\"a\"}", "+{\"t\":\"c\",\"n\":0}", "-{\"t\":\"a\",\"n\":0}", "-{\"t\":\"d\"}"}},
    {"{\"type\":\"string\",\"pattern\":\"^[a-z.]{2,3}$\"}",
     {"+\"ab\"", "+\"a.c\"", "-\"a\"", "-\"abcd\"", "-\"A1\""}},
    {"{\"pattern\":\"^(?:[^\\\\d]|[!-]\\\\d+?)*$|x.\"}",
     {"+\"\"", "+\"a b\"", "+\"-12\"", "+\"x\\\"\"", "+\"1xÃ©\"", "-\"a12\"", "-\"\\\"\"",
      "-\"Ã©\"", "-\"1x\\n\""}},
    {"{\"pattern\":\"^\\\\S{2,3}[A-z][^a]$\"}",
     {"+\"abcd\"", "+\"#1_]é\"", "-\"a bc\"", "-\"ab\\\\d\"", "-\"abca\"", "-\"abcd\\\\\""}},
    {"{\"patternProperties\":{\"^x-\":{\"type\":\"string\"}},\"additionalProperties\":false}",
     {"+{\"x-a\":\"\",\"x-\":\"\"}", "+{}", "-{\"x-a\":1}", "-{\"xa\":\"\"}", "-{\"id\":1}"}},
    {"{\"type\":\"object\",\"minProperties\":1,\"properties\":{\"a\":{},\"b\":{\"$ref\":\"#\"}}}",
     {"+{\"a\":0}", "+{\"b\":{\"a\":0}}", "-{}", "-{\"b\":{}}"}},
    {"{\"prefixItems\":[{\"type\":\"null\"},{\"const\":2}],\"items\":{\"enum\":[3,4]},"
     "\"minItems\":1,\"maxItems\":4}",
     {"+[null]", "+[null,2]", "+[null,2,3,4]", "-[]", "-[2]", "-[null,3]", "-[null,2,3,3,3]",
      "=[null, 2, 4]"}},
    {"{\"items\":{\"type\":\"null\"},\"minItems\":2}",
     {"+[null,null]", "+[null,null,null]", "-[null]"}},
    {"{\"type\":[\"number\",\"null\"],\"enum\":[2,null,\"x\",7],"
     "\"allOf\":[{\"enum\":[7,2.0,\"x\"]}]}",
     {"+2", "+7", "-null", "-\"x\""}},
    {"{\"type\":[\"array\",\"object\"],\"items\":{\"const\":1},\"minItems\":1,"
     "\"required\":[\"k\"]}",
     {"+[1]", "+[1,1]", "+{\"k\":0}", "-[]", "-{}", "-[2]"}},
    {"{\"format\":\"uri\"}",
     {"+\"https://a.b/c?d#e\"", "+\"urn:x:y\"", "-\"http://a:b/\"", "-\"//a\"", "-\"a b:c\""}},
    {"{\"oneOf\":[{\"const\":1},{\"$ref\":\"#/$defs/a/items\"}],\"$defs\":{\"a\":{\"items\":"
     "{\"enum\":[\"x\",null]}}}}",
     {"+1", "+\"x\"", "+null", "-2", "-\"a\""}},
    {"{\"anyOf\":[{\"properties\":{\"a\":{}}}],\"allOf\":[{\"properties\":{\"c\":{}}},"
     "{\"properties\":{\"d\":{}}}]}",
     {"+{\"a\":1,\"c\":1,\"d\":1}", "+{\"c\":1,\"d\":1}", "-{\"d\":1,\"c\":1}"}},
    {"{\"type\":\"number\",\"minimum\":-0,\"maximum\":-0}", {"+0", "-1", "-0.5"}},
    {"{\"anyOf\":[{\"const\":1},{\"enum\":[9007199254740993],\"const\":9007199254740992}]}",
     {"+1", "-9007199254740993", "-9007199254740992"}},
    {"{\"required\":[\"a\",\"b\"],\"minProperties\":2,\"properties\":{\"b\":{},\"c\":{}}}",
     {"+{\"b\":1,\"a\":1}", "+{\"b\":1,\"c\":1,\"a\":1}", "-{\"b\":1,\"c\":1}"}},
    {"{\"type\":\"string\",\"format\":\"date time\"}", {"+\"\"", "+\"x\""}},
    {"{\"pattern\":\"^a{1,2}b{2,}c{2}$\"}",
     {"+\"abbcc\"", "+\"aabbbcc\"", "-\"abcc\"", "-\"abbc\""}},
    {"{\"format\":\"date\"}", {"+\"2024-02-29\"", "-\"2023-02-29\"", "-\"1900-02-29\""}},
};

/* Whether the text, a byte piece for each byte, is a reply. */
static int takes(const gemma2_model *words, constraint *c, const char *text)
{
    char piece[8];
    int ok = c->matcher && gemma2_matcher_start(c->matcher, &c->state) == GEMMA2_OK;
    for (; *text && ok; text++) {
        snprintf(piece, sizeof piece, "<0x%02X>", (unsigned char)*text);
        ok = gemma2_matcher_accept(c->matcher, &c->state, gemma2_find_piece(words, piece, -1)) ==
             GEMMA2_OK;
    }
    return ok && may_end(c);
}

static void test_schemas(void)
{
    char err[SENTENCE];
    gemma2_model *words = gemma2_open("tokenizer.bin", NULL, err, sizeof err);
    check(words != NULL, "tokenizer.bin: %s", err);
    for (size_t i = 0; words && i < 2 * sizeof SCHEMAS / sizeof *SCHEMAS; i++) {
        const char *source = SCHEMAS[i / 2].schema, *const *text = SCHEMAS[i / 2].texts;
        array gbnf = {0};
        constraint c = {0};
        check(read_schema(&gbnf, source, strlen(source), i % 2, err, sizeof err) &&
              open_constraint(&c, words, gbnf.items, gbnf.n, 0, err, sizeof err), "%s: %s", source,
              err);
        for (int k = 0; k < 9 && text[k]; k++)
            if (i % 2 == (*text[k] == '='))
                check(takes(words, &c, text[k] + 1) == (*text[k] != '-'), "%s: %s", source,
                      text[k]);
        close_constraint(&c);
        free(gbnf.items);
    }
    gemma2_close(words);
}

/* Schemas that are refused, with words of the sentence. */
static const struct {
    const char *schema, *why;
} UNFIT[] = {
    {"{\"pattern\":\"^a{3,1}$\"}", "#/pattern: "},
    {"{\"pattern\":\"^a{1,2,3}$\"}", "#/pattern: "},
    {"{\"minLength\":1.2,\"maxLength\":1.8}", "#: no string of a size up to 2000"},
    {"{\"minimum\":1e15}", "#: no number of at most 15 digits"},
    {"{\"type\":\"integer\",\"minimum\":1.2,\"maximum\":1.8}", "#: no number of at most 15"},
    {"{\"minProperties maxProperties\":3}", "is not known"},
    {"{\"type\\u0000x\":\"string\"}", "is not known"},
    {"{\"$ref\":\"#/$defs/a\\u0000b\",\"$defs\":{\"a\":{}}}", "leads to nothing"},
    {"{\"properties\":{\"a\\n\":{\"not\":{}}}}", "#/properties/a?/not"},
    {"{\"patternProperties\":{\"^a$\":{}},\"minProperties\":2}", "'minProperties'"},
};

static void test_refused_schemas(void)
{
    char err[SENTENCE];
    for (size_t i = 0; i < sizeof UNFIT / sizeof *UNFIT; i++) {
        const char *source = UNFIT[i].schema;
        array gbnf = {0};
        *err = '\0';
        check(!read_schema(&gbnf, source, strlen(source), 0, err, sizeof err) &&
              strstr(err, UNFIT[i].why), "%s: '%s'", source, err);
        free(gbnf.items);
    }
}

/* Shapes whose work or grammar would grow with the square of their size end soon. */
static void test_wide_schemas(void)
{
    char err[SENTENCE];
    for (int shape = 0; shape < 2; shape++) {
        array text = {0}, gbnf = {0};
        output out = {.memory = &text};
        put_format(&out, "{\"$defs\":{\"o\":{\"%s", shape ? "enum\":[" : "properties\":{");
        for (int i = 0; i < 1000; i++)
            put_format(&out, "%s\"k%d\"%s", i ? "," : "", i, shape ? "" : ":true");
        put_format(&out, "%c}},\"prefixItems\":[", shape ? ']' : '}');
        for (int i = 0; i < 3000; i++)
            put_format(&out, "%s{\"allOf\":[{\"$ref\":\"#/$defs/o\"},{}]}", i ? "," : "");
        put_format(&out, "]}");
        check(!read_schema(&gbnf, text.items, text.n, 0, err, sizeof err) &&
              strstr(err, "it takes more than") && gbnf.n < 2 * MOST_GBNF, "'%s', %zu bytes", err,
              gbnf.n);
        free(text.items), free(gbnf.items);
    }
}

/* ---- conversations ---- */

static int has_system_turn; /* else system text stands before the first user's text */

/* A chat template that is not Gemma's, whose ids stand for themselves. */
int64_t other_chat(const gemma2_model *m, const gemma2_message *messages, size_t n, unsigned flags,
                   int32_t *ids, size_t max_ids, void *scratch, size_t scratch_bytes)
{
    enum { BOS = 1, OPEN, CLOSE, SYSTEM, USER, MODEL, JOIN, LETTER = 100 };
    int32_t all[500];
    size_t at = 0;
    (void)m, (void)scratch, (void)scratch_bytes;
    all[at++] = flags & GEMMA2_CHAT_CONTINUE ? CLOSE : BOS;
    for (size_t i = 0; i < n; i++) {
        int is_system = messages[i].role == GEMMA2_ROLE_SYSTEM;
        if (has_system_turn || i == 0)
            all[at++] = OPEN, all[at++] = is_system && has_system_turn ? SYSTEM : USER;
        size_t size = messages[i].size < 0 ? strlen(messages[i].text) : (size_t)messages[i].size;
        for (size_t k = 0; k < size; k++)
            all[at++] = LETTER + messages[i].text[k];
        all[at++] = is_system && !has_system_turn ? JOIN : CLOSE;
    }
    all[at++] = OPEN, all[at++] = MODEL;
    for (size_t i = 0; i < at && i < max_ids; i++)
        ids[i] = all[i];
    return (int64_t)at;
}

/* Turns from `from` on, with replies of one token and, to the second, of none. */
static void add_turns(program *p, int from)
{
    static const char *const texts[] = {"one", "", "three"};
    p->ids.n = p->turns.n = 0;
    for (int i = from; i < 3; i++) {
        size_t start = p->ids.n;
        exchange *t = extend(&p->turns, 1, sizeof *t);
        check(t && push_turn(p, texts[i], strlen(texts[i]), start == 0) == DONE, "turn %d", i);
        *t = (exchange){start, p->ids.n};
        check(i == 1 || push_id(p, 50 + i) == DONE, "the reply to turn %d", i);
    }
}

/* Turns are found by their ids and told anew with another system text, whatever the template. */
static void test_turns(void)
{
    options opts;
    init_options(&opts);
    program p = {.opts = &opts, .settings = &opts}, fresh = p;
    p.model = fresh.model = gemma2_open("tests/demo/story-q8.bin", NULL, NULL, 0);
    p.session = fresh.session = gemma2_session_new(p.model, NULL, NULL, 0);
    opts.quiet = 1;
    for (int i = 0; p.session && i < 4; i++) {
        exchange was[3], *turns;
        has_system_turn = i / 2;
        opts.system = i % 2 ? "Be kind." : NULL;
        check(learn_frames(&p) == DONE, "frames");
        add_turns(&p, 0);
        memcpy(was, p.turns.items, sizeof was);
        check(find_turns(&p) == DONE && p.turns.n == 3 &&
              memcmp(was, p.turns.items, sizeof was) == 0 && !opts.system == !(i % 2),
              "template %d: %zu turns are found", i, p.turns.n);
        size_t before = p.first.before;
        opts.system = i == 1 ? NULL : "Say less.";
        check(learn_frames(&p) == DONE && retell(&p, 0, before, p.first.before) == DONE, "told");
        add_turns(&fresh, 0);
        check(p.ids.n == fresh.ids.n && !memcmp(p.ids.items, fresh.ids.items, 4 * p.ids.n) &&
              !memcmp(p.turns.items, fresh.turns.items, sizeof was), "template %d: system", i);
        turns = p.turns.items;
        before = turns[1].start + p.later.before;
        memmove(turns, turns + 1, 2 * sizeof *turns);
        p.turns.n = 2;
        check(retell(&p, 0, before, p.first.before) == DONE, "dropped");
        add_turns(&fresh, 1);
        check(p.ids.n == fresh.ids.n && !memcmp(p.ids.items, fresh.ids.items, 4 * p.ids.n) &&
              !memcmp(turns, fresh.turns.items, 2 * sizeof *turns), "template %d: dropped", i);
        opts.system = "Another one.";
        check(learn_frames(&p) == DONE && find_turns(&p) == DONE && !opts.system &&
              p.turns.n == (i == 3 || i == 2 ? 0 : 2), "template %d: another system text", i);
    }
    free(p.ids.items), free(p.turns.items), free(fresh.ids.items), free(fresh.turns.items);
    free(p.first.ids.items), free(p.later.ids.items);
    gemma2_session_free(p.session), gemma2_close(p.model);
}

int main(void)
{
    test_meanings();
    test_turns();
    test_schemas();
    test_refused_schemas();
    test_wide_schemas();
    test_json_refusals();
    test_json_sizes();
    test_json_values();
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed > 0;
}
