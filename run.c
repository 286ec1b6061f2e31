/* run.c - the command line of gemma2.c, on nothing but gemma2.h and libc.
 *
 *   1 Platform      what is not plain C11, declared; sections 9 and 10 hold it
 *   2 Ground        exit codes, messages, growable arrays, checked output
 *   3 Options       one table that drives parsing, --help and suggestions
 *   4 Text          UTF-8, what a terminal may see, JSON, what a file seems to be
 *   5 The prompt    where it comes from, its ids, the chat template; schemas to grammars
 *   6 The reply     prefill, sampling, stop strings, streaming, timings, saved sessions
 *   7 Modes         generate, converse (line editor, commands), tokenize, logits, trace, score,
 *                   embed, perplexity, importance, info, check, batches
 *   8 main
 *   9 POSIX   10 Windows
 *
 * Standard output carries what was asked for and nothing else.  A function that returns
 * int returns an exit code, 0 to go on, unless its comment says otherwise.  The function that
 * finds a failure prints its sentence.  */
#if !defined(_WIN32) && !defined(_XOPEN_SOURCE)
#define _XOPEN_SOURCE 700
#endif

#include "gemma2.h"

#include <ctype.h>
#include <errno.h>
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#define NOGDI /* it has names of ours */
#include <fcntl.h>
#include <io.h>
#include <windows.h>
#include <shellapi.h>
#undef IN
#else
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>
#ifndef SIGWINCH
#define SIGWINCH 28 /* macOS hides it from a program that asks for X/Open */
#endif
#endif

/* ===================================================================================
 * 1. Platform: what is not plain C11; section 9 has it for POSIX, section 10 for Windows
 * =================================================================================== */

enum { DONE = 0, FAILED = 1, USAGE = 2, BAD_MODEL = 3, INTERRUPTED = 130 };

static const char *program_name = "run"; /* as it was called: installed it is gemma2 */

/* What Ctrl-C does.  While a reply is made, Ctrl-C asks for a stop and uses up some patience
 * (a second one may just be what timeout(1) sends along).  Without patience it ends the
 * program at once. */
enum { PATIENCE = 2 };
static volatile sig_atomic_t patience, stop_asked;
static volatile sig_atomic_t ended_by; /* SIGTERM, SIGHUP: the same, and no more questions */
static volatile sig_atomic_t mid_line; /* a terminal may show text without its newline */
static gemma2_session *volatile interruptible; /* whose evaluation it cuts short, or NULL */

/* Standard streams byte for byte, a terminal in UTF-8, a broken pipe as a failed write, and a
 * sentence for a file that shrinks while it is mapped. */
static void platform_init(void);
/* Catches interrupts, except those that whoever started us ignores. */
static void catch_interrupts(void);
/* Arguments in UTF-8, to the end of the program.  NULL without memory. */
static char **utf8_arguments(int *argc, char **argv);
static double seconds(void);

/* fopen and remove; the path is UTF-8. */
static FILE *open_path(const char *path, const char *mode);
static void remove_path(const char *path);
static int is_directory(const char *path);
/* Whether there is something at path that is no file: a device, a pipe, a directory. */
static int is_special(const char *path);
/* What path leads to over links, to be freed; a link is not replaced by a file.  NULL without
 * memory. */
static char *follow_links(const char *path);
/* Makes a new file beside path, readable by its owner only; its name goes to name. */
static FILE *open_beside(const char *path, char *name, size_t size);
/* Writes the bytes through to the disk and puts the file in the place of path; 1 or 0. */
static int replace_file(FILE *file, const char *name, const char *path, const void *bytes,
                        size_t n);

static int is_terminal(FILE *file);
static int reader_left(int error); /* a write failed because the reader of a pipe has left */

/* Makes the terminal of standard input hand over keys one at a time and show none itself, until
 * the end of the program; 0 where it hands over lines, shows and edits them. */
static int terminal_raw(void);
static void terminal_restore(void); /* a signal handler may call it */
/* Sizes that are unknown are left alone.  Returns whether others have written there since. */
static int terminal_size(size_t *width, size_t *height);
/* Up to n bytes that were typed; 0 at the end, below 0 with errno, which is EINTR after a signal or
 * a while in which nothing came. */
static long read_terminal(char *bytes, size_t n);
/* Up to n bytes of standard input; 0 at the end.  Below 0: an error, where EAGAIN in errno means
 * that nothing is there yet.  With wait a while passes before that. */
static long read_input(char *bytes, size_t n, int wait);
static uint64_t memory_bytes(void);     /* of the machine; UINT64_MAX where it does not say */
static int input_waits(int milliseconds); /* some was typed already, or is within that time */
static int edit_file(const char *path);   /* in the person's editor; 0 when all went well */
static int is_cut(size_t line);         /* a line of so many bytes may have lost its end */

/* ===================================================================================
 * 2. Ground
 * =================================================================================== */

/* The last part of argv[0], without ".exe", unless it is an odd name. */
static void name_program(char *path)
{
    for (char *c = path; c && *c; c++)
        if ((*c == '/' || *c == '\\') && c[1])
            path = c + 1;
    size_t n = path ? strlen(path) : 0;
    if (n > 4 && strcmp(path + n - 4, ".exe") == 0)
        path[n - 4] = '\0';
    for (size_t i = 0; i < n; i++)
        if (!isalnum((unsigned char)path[i]) && !strchr("._+-", path[i]))
            return;
    if (n)
        program_name = path;
}

#if defined(__MINGW_PRINTF_FORMAT)
#define PRINTF_LIKE(text, first) __attribute__((format(__MINGW_PRINTF_FORMAT, text, first)))
#elif defined(__GNUC__)
#define PRINTF_LIKE(text, first) __attribute__((format(printf, text, first)))
#else
#define PRINTF_LIKE(text, first)
#endif

enum { SENTENCE = 5000 }; /* bytes: the longest path and what is wrong with it */

static void hide_controls(char *text);

/* A line on standard error.  Paths and arguments stand in sentences, so none keeps its control
 * characters. */
PRINTF_LIKE(1, 0) static void say(const char *format, va_list arguments)
{
    char sentence[SENTENCE];
    vsnprintf(sentence, sizeof sentence, format, arguments);
    hide_controls(sentence);
    fprintf(stderr, "%s\n", sentence);
}

static char *overheard; /* [SENTENCE] where a failure's sentence goes instead, or NULL */

/* One sentence, of a failure; returns status. */
PRINTF_LIKE(2, 3) static int fail(int status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    if (overheard) {
        vsnprintf(overheard, SENTENCE, format, arguments);
    } else {
        fprintf(stderr, "%s: ", program_name);
        say(format, arguments);
    }
    va_end(arguments);
    return status;
}

/* A sentence that tells of no failure. */
PRINTF_LIKE(1, 2) static void remark(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    say(format, arguments);
    va_end(arguments);
}

static int out_of_memory(void)
{
    return fail(FAILED, "out of memory");
}

/* To be freed; NULL without memory. */
static char *copy_of(const char *text)
{
    size_t n = strlen(text) + 1;
    char *copy = malloc(n);
    return copy ? memcpy(copy, text, n) : NULL;
}

/* "PATH.END" into name; 0, with errno, where that cannot be. */
static int has_name_beside(const char *path, const char *end, char *name, size_t size)
{
    errno = *path ? ENAMETOOLONG : ENOENT;
    return *path && snprintf(name, size, "%s.%s", path, end) < (int)size;
}

typedef struct {
    void *items;
    size_t n, room;
} array;

/* Adds room for count items of the given size at the end and returns where they start;
 * NULL, with the array as it was, when memory is short. */
static void *extend(array *a, size_t count, size_t item)
{
    if (count > SIZE_MAX / 2 / item - a->n)
        return NULL;
    size_t need = a->n + count;
    if (need > a->room || !a->items) {
        size_t room = need > 2 * a->room ? need : 2 * a->room;
        room = room < 64 ? 64 : room;
        void *items = realloc(a->items, room * item);
        if (!items)
            return NULL;
        a->items = items;
        a->room = room;
    }
    void *start = (char *)a->items + a->n * item;
    a->n = need;
    return start;
}

/* Appends bytes and a NUL that does not count. */
static int append(array *to, const char *bytes, size_t n)
{
    char *end = extend(to, n + 1, 1);
    if (!end)
        return out_of_memory();
    if (n)
        memcpy(end, bytes, n);
    end[n] = '\0';
    to->n--;
    return DONE;
}

/* Standard output, or memory.  The first error sticks, and silences what follows. */
typedef struct {
    array *memory; /* of char, or NULL */
    int terminal; /* text must carry no control sequences */
    int error;    /* errno of the first write that failed, 0 while all is well */
} output;

static void note_write(output *out, int failed)
{
    if (failed && !out->error)
        out->error = errno ? errno : EIO;
}

static void put_bytes(output *out, const char *bytes, size_t n)
{
    char *end = out->memory && n ? extend(out->memory, n, 1) : NULL;
    if (end)
        memcpy(end, bytes, n);
    else if (n && !out->error)
        note_write(out, out->memory || fwrite(bytes, 1, n, stdout) != n);
}

PRINTF_LIKE(2, 3) static void put_format(output *out, const char *format, ...)
{
    va_list arguments, again;
    va_start(arguments, format);
    if (out->memory) {
        va_copy(again, arguments);
        int n = vsnprintf(NULL, 0, format, again);
        va_end(again);
        char *end = n < 0 ? NULL : extend(out->memory, (size_t)n + 1, 1);
        note_write(out, !end);
        if (end) {
            vsnprintf(end, (size_t)n + 1, format, arguments);
            out->memory->n--; /* the NUL */
        }
    } else if (!out->error) {
        note_write(out, vfprintf(stdout, format, arguments) < 0);
    }
    va_end(arguments);
}

/* A text in which @ stands for the program's name. */
static void put_named(output *out, const char *text)
{
    for (size_t n; *text; text += n + (text[n] == '@')) {
        n = strcspn(text, "@");
        put_bytes(out, text, n);
        if (text[n] == '@')
            put_bytes(out, program_name, strlen(program_name));
    }
}

static void put_flush(output *out)
{
    if (!out->error)
        note_write(out, fflush(stdout) != 0 || ferror(stdout)); /* MinGW's printf tells late */
}

/* The exit code after all is written.  Readers that leave early (| head) got what they
 * wanted: that ends quietly. */
static int finish_output(output *out, int status)
{
    put_flush(out);
    if (out->error && !reader_left(out->error) && status == DONE)
        return fail(FAILED, "cannot write to standard output: %s", strerror(out->error));
    return status;
}

/* ===================================================================================
 * 3. Options
 * =================================================================================== */

typedef enum {
    GENERATE, CONVERSE, TOKENIZE, DETOKENIZE, LOGITS, SCORE, PERPLEXITY, IMPORTANCE, INFO, CHECK,
    TRACE, BATCH, EMBED, REWARD
} mode_kind;

/* Sets of modes: an option names those in which it may stand.  Settings stand with any, so that
 * they can be the same in every call; what asks for something stands only where that is done. */
#define ONE(mode) (1u << (mode))
enum {
    ALL = ONE(REWARD + 1) - 1,
    SESSIONS = ONE(GENERATE) | ONE(CONVERSE),
    REPLIES = SESSIONS | ONE(BATCH),
    READERS = ONE(LOGITS) | ONE(SCORE) | ONE(TRACE) | ONE(EMBED) | ONE(REWARD),
    TURNS = REPLIES | READERS | ONE(TOKENIZE),
    PROMPTS = READERS | ONE(GENERATE) | ONE(TOKENIZE) | ONE(IMPORTANCE),
    EVALUATES = REPLIES | READERS | ONE(PERPLEXITY) | ONE(IMPORTANCE),
    OBJECTS = TURNS - ONE(CONVERSE) - ONE(TRACE) + ONE(INFO)
};

typedef struct option option;

typedef struct {
    const char *model;
    const char *positional[3]; /* MODEL and PROMPT, or PROMPT alone with -m; one too many */
    int n_positional;
    const char *text, *file, *ids; /* the prompt: at most one of them */
    int n_prompts;
    mode_kind mode;
    const option *asked; /* the option that chose the mode, or NULL */
    const char *subject; /* its text */
    const option **given; /* all options, in order: room for one per argument */
    size_t n_given;
    int32_t logits, trace_layer; /* -1: all layers in short */
    int32_t block; /* of the importance */
    int32_t n_top; /* of --top-logprobs */
    const char *results; /* where a batch's go, or NULL */
    int32_t parallel; /* lines of a batch at a time, 0: as many as seem good */
    int chat;
    const char *after_chat; /* the number behind a -c: a llama.cpp user's context */
    const char *system;
    int32_t max_tokens; /* -1: no limit */
    gemma2_sampler sampler;
    gemma2_open_params open;
    gemma2_session_params session;
    uint64_t seed;
    int seed_given;
    const char **stops; /* room for one per argument */
    size_t n_stops;
    const char **choices; /* the same */
    size_t n_choices;
    const char *grammar, *schema; /* files */
    gemma2_bias *biases; /* room for one per argument and all stop ids */
    int ignore_eos, echo, json, quiet, verbose, help, version;
    int32_t full_drops; /* where a conversation fills the context its oldest turns go */
    const char *kept, *loaded; /* files of sessions */
    int32_t lookup;            /* guess from what was said */
    int32_t spaced;            /* JSON of a schema */
    int32_t mean;              /* of the states, not the last */
    const char *draft;         /* a model that guesses */
    int32_t draft_max;         /* guesses a pass; 0: adapts */
    const char *history;       /* file of messages */
} options;

typedef enum {
    HEADING, /* a line of --help */
    FLAG,    /* int field becomes 1 */
    MODE,    /* without a value; the other modes have one of the kinds below */
    TEXT,    /* const char * field */
    PROMPT,  /* the same, and counts as a source of the prompt */
    STOP,    /* one more stop string */
    CHOICE,  /* one more choice */
    BIAS,    /* one more logit bias */
    WHOLE,   /* int32_t field; least -1: "-1" is allowed, too */
    REAL,    /* float field */
    SEED,
    KEYWORD     /* int32_t field: the words of `argument` stand for least .. most */
} option_kind;

struct option {
    char letter;
    const char *name, *argument, *help;
    option_kind kind;
    size_t field;      /* offset in options */
    const char *takes; /* "it takes ...", for values that can be wrong */
    double least, most;
    mode_kind mode; /* what the option asks for, or GENERATE */
    unsigned modes; /* in which it may stand */
};

#define HEAD(text) {.help = text, .kind = HEADING}
#define IS(modes, kind, member) kind, offsetof(options, member), NULL, 0, 0, GENERATE, modes
#define ASKS(mode, kind, member) kind, offsetof(options, member), NULL, 0, 0, mode, ALL
#define IN(modes, kind, member, takes, least, most) \
    kind, offsetof(options, member), takes, least, most, GENERATE, modes
#define FROM_1(modes, member) \
    IN(modes, WHOLE, member, "a whole number from 1 to 2147483647", 1, INT32_MAX)

static const option OPTIONS[] = {
    HEAD("Common options"),
    {'c', "chat", NULL, "use the chat template; without a prompt, on a\n"
     "terminal: a conversation (Ctrl-C stops a reply)", IS(TURNS, FLAG, chat)},
    {'S', "system", "TEXT", "instructions for a chat, before its first message",
     IS(TURNS, TEXT, system)},
    {'n', "max-tokens", "N", "at most N tokens of reply; -1: until the model\n"
     "stops or the context is full (default)",
     IN(ALL, WHOLE, max_tokens, "a whole number from 0 to 2147483647, or -1 for no limit", -1,
        INT32_MAX)},
    {'t', "temperature", "F", "randomness; 0 is greedy (default 1.0)",
     IN(ALL, REAL, sampler.temperature, "a number from 0 to 1000000", 0, 1e6)},
    {'s', "seed", "N", "same seed, same text, on CPUs of one kind or with\n"
     "--exact on all (default: random, shown)",
     IN(ALL, SEED, seed, "a whole number from 0 to 18446744073709551615", 0, 0)},
    {'m', "model", "FILE", "the model, where it is not the first argument", IS(ALL, TEXT, model)},
    {'q', "quiet", NULL, "nothing on standard error but errors", IS(ALL, FLAG, quiet)},
    {'v', "verbose", NULL, "also show model, memory, threads, instruction set",
     IS(ALL, FLAG, verbose)},
    {'h', "help", NULL, "this text", IS(ALL, FLAG, help)},
    {0, "version", NULL, "the version", IS(ALL, FLAG, version)},

    HEAD("The prompt: PROMPT, or one of these, or else standard input"),
    {'p', "prompt", "TEXT", "the prompt; may start with a dash", IS(PROMPTS, PROMPT, text)},
    {'f', "file", "FILE", "the prompt, byte for byte, but for a last newline in\n"
     "a chat; - is standard input", IS(PROMPTS, PROMPT, file)},
    {0, "ids", "\"IDS\"", "the prompt as token ids; no BOS is added", IS(PROMPTS, PROMPT, ids)},
    {0, "echo", NULL, "print the prompt before the reply", IS(ONE(GENERATE), FLAG, echo)},

    HEAD("Choosing and stopping"),
    {'k', "top-k", "N", "among the N best tokens; 0: all (default 64)",
     IN(ALL, WHOLE, sampler.top_k, "a whole number from 0 to 2147483647", 0, INT32_MAX)},
    {'P', "top-p", "F", "among the best tokens that together have\n"
     "probability F (default 0.95)",
     IN(ALL, REAL, sampler.top_p, "a number above 0, at most 1", FLT_MIN, 1)},
    {0, "min-p", "F", "among tokens at least F times as likely as the\n"
     "best (default 0: off)", IN(ALL, REAL, sampler.min_p, "a number from 0 to 1", 0, 1)},
    {0, "repeat-penalty", "F", "divide logits of tokens seen lately by F, multiply\n"
     "negative ones (default 1: off)",
     IN(ALL, REAL, sampler.repetition_penalty, "a number above 0, at most 1000000", FLT_MIN,
        1e6)},
    {0, "presence-penalty", "F", "take F off the logits of tokens seen lately ...",
     IN(ALL, REAL, sampler.presence_penalty, "a number from -1000000 to 1000000", -1e6, 1e6)},
    {0, "frequency-penalty", "F", "... and F for each time they were seen (defaults 0)",
     IN(ALL, REAL, sampler.frequency_penalty, "a number from -1000000 to 1000000", -1e6, 1e6)},
    {0, "repeat-last-n", "N", "lately: among the last N tokens; -1: in all of the\n"
     "context (default 64)",
     IN(ALL, WHOLE, sampler.penalty_last,
        "a whole number from 0 to 2147483647, or -1 for all", -1, INT32_MAX)},
    {0, "logit-bias", "ID+F", "add F to a token's logit; also ID-F, and ID-inf bans\n"
     "the token; may be repeated",
     IN(ALL, BIAS, biases, "a token id, a sign and a number, as in 235+1.5 or 235-inf", 0, 0)},
    {0, "stop", "TEXT", "end the reply before TEXT; may be repeated",
     IN(ALL, STOP, stops, "a text that is not empty", 0, 0)},
    {0, "choice", "TEXT", "reply with exactly one of the TEXTs; to be repeated.  --json\n"
     "adds \"choices\": the probability of each, tokenised by\n"
     "itself behind the prompt; they sum to 1",
     IN(REPLIES, CHOICE, choices, "a text that is not empty", 0, 0)},
    {0, "grammar", "FILE", "reply with a sentence of this grammar, in GBNF",
     IS(REPLIES, TEXT, grammar)},
    {0, "schema", "FILE", "reply with compact JSON that fits this JSON Schema; keys\n"
     "stand in its order, and where it names some no others come",
     IS(REPLIES, TEXT, schema)},
    {0, "schema-spaces", "on|off", "a space behind each comma and colon of that JSON\n"
     "(default off)", IN(ALL, KEYWORD, spaced, "on or off", 1, 0)},
    {0, "ignore-eos", NULL, "never choose a token that ends the text",
     IS(ALL, FLAG, ignore_eos)},

    HEAD("Running"),
    {'C', "context", "N", "room for N tokens in all (default: as trained)",
     FROM_1(ALL, session.n_context)},
    {'j', "threads", "N", "threads (default: one a processor)",
     IN(ALL, WHOLE, session.n_threads, "a whole number from 1 to 1024", 1, 1024)},
    {0, "window", "N", "let local layers see only N tokens (default: as\ntrained)",
     FROM_1(ALL, session.window)},
    {0, "kv", "f32|f16|q8", "type of the cached keys and values (default: f32\n"
     "for f32 weights, else f16; q8 takes half of f16)",
     IN(ALL, KEYWORD, session.cache_type, "f32, f16 or q8", GEMMA2_CACHE_F32, GEMMA2_CACHE_Q8)},
    {0, "lookup", "on|off", "guess what followed earlier in prompt and reply, and\n"
     "check several tokens at once: faster where text\nrepeats, the same reply (default on)",
     IN(ALL, KEYWORD, lookup, "on or off", 1, 0)},
    {0, "draft", "MODEL", "a smaller model with the same vocabulary guesses what\n"
     "comes next: faster, the same reply (not used by --batch)", IS(REPLIES, TEXT, draft)},
    {0, "draft-max", "N", "always guess up to N tokens ahead, no more than 15\n"
     "(default: as many as pay)", FROM_1(ALL, draft_max)},
    {0, "exact", NULL, "read prompts in the arithmetic of decoding: slower,\n"
     "the same result on every CPU", IS(ALL, FLAG, open.exact_prefill)},
    {0, "in-memory", NULL, "read the weights into memory, huge pages asked for:\n"
     "slower to start, the last tenth of speed",
     IS(ALL, FLAG, open.read_into_memory)},

    HEAD("Going on another time"),
    {0, "session", "FILE", "go on from FILE where it exists, and keep there what\n"
     "was read and shown; the prompt is what comes next", IS(SESSIONS, TEXT, kept)},
    {0, "load", "FILE", "go on from such a file, and leave it as it is",
     IS(SESSIONS, TEXT, loaded)},

    {0, "history", "FILE", "keep the messages of conversations there, for the\n"
     "arrow keys", IS(ONE(CONVERSE), TEXT, history)},
    {0, "full", "drop|stop", "when a conversation fills the context, drop its\n"
     "oldest turns (default) or refuse the message",
     IN(ALL, KEYWORD, full_drops, "drop or stop", 1, 0)},

    HEAD("Many prompts in one process: see Batches below"),
    {0, "batch", "IN.jsonl", "a result for each line; - is standard input",
     ASKS(BATCH, TEXT, subject)},
    {'o', "output", "OUT.jsonl", "where results go; those that it has already are not made\n"
     "again (default: standard output)", IS(ONE(BATCH), TEXT, results)},
    {0, "parallel", "N", "N lines at a time, 1 to 256 (default: 16, or what half of\n"
     "the memory can hold)",
     IN(ONE(BATCH), WHOLE, parallel, "a whole number from 1 to 256", 1, 256)},

    HEAD("Instead of plain text"),
    {0, "json", NULL, "one JSON object: text, prompt_ids, ids, logprobs,\n"
     "finish_reason, seed, timings; also for --tokenize,\n--logits, --score and --info",
     IS(OBJECTS, FLAG, json)},
    {0, "top-logprobs", "N", "with --json: also the N best at every token of the reply",
     IN(REPLIES - ONE(CONVERSE), WHOLE, n_top, "a whole number from 0 to 1000", 0, 1000)},
    {0, "tokenize", NULL, "the prompt's ids on one line, BOS first",
     ASKS(TOKENIZE, MODE, asked)},
    {0, "detokenize", "\"IDS\"", "the text of ids, byte for byte",
     ASKS(DETOKENIZE, TEXT, subject)},
    {0, "logits", "N", "the N best next tokens: id, logit, piece",
     WHOLE, offsetof(options, logits), "a whole number from 1 to 2147483647", 1, INT32_MAX,
     LOGITS, ALL},
    {0, "score", NULL, "log-probability of every prompt token, total",
     ASKS(SCORE, MODE, asked)},
    {0, "embed", "last|mean", "the prompt as D numbers, one JSON array: the state after\n"
     "the final norm of the last token, or the mean of all;\nmodels that embed in <eos> want it "
     "written", KEYWORD, offsetof(options, mean), "last or mean", 0, 1, EMBED, ALL},
    {0, "reward", NULL, "what a reward model or classifier gives the prompt: one\n"
     "JSON array of its scores", ASKS(REWARD, MODE, asked)},
    {0, "perplexity", "FILE", "perplexity of a text; the method is below",
     ASKS(PERPLEXITY, TEXT, subject)},
    {0, "importance", "OUT", "how large the inputs of every product are, over the\n"
     "text of the prompt, for export.py --importance OUT", ASKS(IMPORTANCE, TEXT, subject)},
    {0, "importance-block", "N", "also how N neighbouring inputs go together, so that\n"
     "export.py rounds better: a multiple of 32 up to 1024\n(the file grows N-fold; default 1)",
     IN(ONE(IMPORTANCE), WHOLE, block, "1, or a multiple of 32 up to 1024", 1, 1024)},
    {0, "trace", NULL, "every step of the pass over a short prompt: shape, norm,\n"
     "first values, bytes, time, formula; after each layer\nits best next tokens",
     ASKS(TRACE, MODE, asked)},
    {0, "trace-layer", "N", "all values of one layer's steps, the first layer is 0",
     WHOLE, offsetof(options, trace_layer), "a whole number from 0 to 1023", 0, 1023, TRACE, ALL},
    {0, "info", NULL, "facts, sections and memory plan of the model",
     ASKS(INFO, MODE, asked)},
    {0, "check", NULL, "verify every digest and value of the model file",
     ASKS(CHECK, MODE, asked)},
};
enum { N_OPTIONS = sizeof OPTIONS / sizeof OPTIONS[0], HELP_COLUMN = 27 };

/* What llama.cpp, ollama and transformers call things: an option of ours that means the same,
 * nothing where it is so here anyway, or a sentence.  An underscore counts as a dash. */
static const struct {
    const char *names, *meaning;
} FOREIGN[] = {
    {" --temp ", "--temperature"},
    {" --ctx-size --num-ctx --n-ctx --max-seq-len --max-model-len ", "--context"},
    {" --n-predict --predict --num-predict --max-new-tokens --max-completion-tokens ",
     "--max-tokens"},
    {" --logprobs ", "--top-logprobs"},
    {" --choices ", "--choice"},
    {" --num-thread --num-threads --n-threads ", "--threads"},
    {" --repetition-penalty ", "--repeat-penalty"},
    {" -l ", "--logit-bias"},
    {" --grammar-file ", "--grammar"},
    {" --json-schema --json-schema-file --format ", "--schema"},
    {" -sys --system-prompt ", "--system"},
    {" -cnv --conversation ", "--chat"},
    {" -r --reverse-prompt ", "--stop"},
    {" --no-mmap ", "--in-memory"},
    {" -ctk -ctv --cache-type-k --cache-type-v ", "--kv"},
    {" --log-disable ", "--quiet"},
    {" -md --model-draft ", "--draft"},
    {" --draft-n ", "--draft-max"},
    {" --no-display-prompt --no-cnv -no-cnv --no-conversation --jinja -st --single-turn "
     "--no-warmup --no-context-shift ", ""},
    {" -i --interactive ", "a conversation is -c, a prompt is -p TEXT"},
    {" -ngl --gpu-layers --n-gpu-layers --num-gpu -dev --device -sm --split-mode -ts "
     "--tensor-split -mg --main-gpu -fa --flash-attn ",
     "everything runs on the CPU here, so leave it out"},
    {" -b -ub --batch-size --ubatch-size --num-batch -tb --threads-batch ",
     "a prompt is cut into pieces and shared out by itself here, so leave it out"},
    {" --mlock --numa --low-vram --f16-kv ",
     "there is nothing to set here; --in-memory and --kv are what decides about memory"},
    {" --mirostat --mirostat-lr --mirostat-ent --mirostat-eta --mirostat-tau --tfs --tfs-z "
     "--typical --typical-p --xtc-probability --xtc-threshold --dry-multiplier --dry-base "
     "--dry-allowed-length --dynatemp-range --dynatemp-exp --top-nsigma --samplers "
     "--sampling-seq ",
     "tokens are chosen here by --temperature, --top-k, --top-p, --min-p and the penalties"},
    {" --rope-scaling --rope-scale --rope-freq-base --rope-freq-scale --yarn-orig-ctx "
     "--yarn-ext-factor --yarn-attn-factor ",
     "positions are always as the model was trained; its file says how"},
    {" --lora --lora-scaled --lora-base --adapter ",
     "an adapter is merged when the model is converted: export.py --lora DIR"},
    {" --chat-template --chat-template-file --template ",
     "the chat template is the one in the model file, where export.py put it"},
    {" -hf -hfr -hff --hf-repo --hf-file -mu --model-url ",
     "nothing is downloaded here; give the path of a file that export.py made"},
    {" --prompt-cache --prompt-cache-all --prompt-cache-ro ",
     "what was read and shown is kept by --session FILE, and --load FILE goes on from it"},
    {" -e --escape ", "a prompt is taken as it is; your shell can write newlines into it"},
    {" --tokenizer ", "the tokenizer is in the model file"},
    {" --keep --num-keep --context-shift ",
     "a full context ends the reply here; in a conversation --full says what is dropped"},
};

/* The meaning of another program's spelling, or NULL. */
static const char *foreign_meaning(const char *argument)
{
    char name[40] = " ";
    size_t n = strcspn(argument, "=");
    if (n < 2 || n > sizeof name - 3)
        return NULL;
    for (size_t i = 0; i < n; i++)
        name[i + 1] = (char)(argument[i] == '_' ? '-' : argument[i]);
    name[n + 1] = ' ';
    for (size_t i = 0; i < sizeof FOREIGN / sizeof *FOREIGN; i++)
        if (strstr(FOREIGN[i].names, name))
            return FOREIGN[i].meaning;
    return NULL;
}

/* ---- --help: in these texts @ is the program's name.  tests/pages.awk makes the manual page
 * and the shell completions of this text, so its form counts: a heading begins its line, all
 * else stands two blanks or more from the left. ---- */

static const char INTRODUCTION[] =
    "usage: @ MODEL [options] [PROMPT]\n"
    "\nRuns a Gemma 2 model that export.py made.\n\n"
    "Examples\n"
    "  @ story.bin \"Once upon a time\"              continue a text\n"
    "  @ gemma-2-2b-it.bin -c                      hold a conversation\n"
    "  @ gemma-2-2b-it.bin -c \"Why is it dark?\"    one answer, then exit\n"
    "  @ gemma-2-2b-it.bin -c -S \"Summarise:\" < notes.txt\n"
    "  @ gemma-2-2b-it.bin -c --session moon.chat  a conversation to go on with\n"
    "  @ story.bin -t 0 -n 64 --stop \"The end\" -f start.txt\n"
    "  @ story.bin --json -s 7 \"Hello\" | jq -r .text\n";
static const char NOTES[] =
    "\nConversation\n"
    "  Alt-Enter begins a new line of the message.  So does Enter behind a \\, and inside\n"
    "  \"\"\" and \"\"\".  A pasted text of several lines is one message.  The arrow keys move,\n"
    "  and bring back earlier messages.  Ctrl-C stops a reply, and at the prompt asks before\n"
    "  it leaves.  A message of one line that begins with / is a command; // says a /.\n"
    "    /help               all commands: /clear, /undo, /regen, /edit, /read FILE,\n"
    "                        /system TEXT, /set NAME VALUE, /show, /save FILE, /load FILE,\n"
    "                        /stats, /exit\n"
    "\nPerplexity\n"
    "  --perplexity follows llama.cpp: the text, after one BOS, is cut into chunks of 512\n"
    "  tokens (-C N: of N; a shorter trained context: of that), a rest is dropped, BOS takes\n"
    "  the place of each chunk's first token, and the tokens after the first half of each\n"
    "  chunk are scored, in the exact arithmetic of decoding.  It prints exp of the mean\n"
    "  negative log-probability and its standard error.\n"
    "\nImportance\n"
    "  --importance cuts its text as --perplexity does, but drops nothing and counts every\n"
    "  token.  About 100 KB of text are enough.\n"
    "\nSessions\n"
    "  A session's file holds ids, keys and values (as large as the cache, see --info) and\n"
    "  fits one model, --window and --kv.  It keeps what was shown: with -c a conversation,\n"
    "  else a text; --system counts in the first turn only.  The file is replaced whole when\n"
    "  all went well, and when a signal ends a conversation.  It stays as it was after an\n"
    "  error or an interrupted answer.  Under --exact what follows is the same, to the bit,\n"
    "  as in one go.\n"
    "\nBatches\n"
    "  A line of IN is {\"prompt\": TEXT} or {\"messages\": [{\"role\": \"user\", \"content\":\n"
    "  TEXT}, ...]}, and may have id, max_tokens, temperature, top_k, top_p, min_p, seed,\n"
    "  stop, choices (a list of texts) and schema; options are the defaults.  Or it is one of\n"
    "  OpenAI's batch files, for /v1/chat/completions or /v1/completions, and is answered in\n"
    "  that form.  Results come as they finish, each what that prompt alone would give with\n"
    "  this seed.  A bad line has an error as its result.  After a crash the same command\n"
    "  goes on where it was, on standard input if it has --seed.  Exit code 1: a line failed.\n"
    "\nOutput\n"
    "  Text goes to standard output, speed, seed and warnings to standard error.  On a\n"
    "  terminal control characters of the text are shown as U+FFFD.  The ids of --json are\n"
    "  all that were generated, its text ends before a stop string.  Its seed may exceed 2^53\n"
    "  when you chose it so.\n"
    "\nEnvironment\n"
    "  GEMMA2_ISA=scalar|avx2|avxvnni|avx512|avx512bf16|amx forces an instruction set, on\n"
    "  ARM scalar|neon|dotprod|i8mm.\n"
    "\nExit status\n"
    "  Exit codes: 0 done (also when the reader of a pipe left), 1 failed while running,\n"
    "  2 wrong usage, 3 bad, missing or unreadable model file, 130 interrupted\n"
    "  (143 by SIGTERM, 129 by SIGHUP).\n";

/* The lines of a text, each but the first after that many blanks. */
static void put_indented(output *out, const char *text, int column)
{
    for (const char *end; (end = strchr(text, '\n')) != NULL; text = end + 1)
        put_format(out, "%.*s\n%*s", (int)(end - text), text, column, "");
    put_format(out, "%s\n", text);
}

static void print_help(output *out)
{
    put_named(out, INTRODUCTION);
    for (const option *o = OPTIONS; o < OPTIONS + N_OPTIONS; o++) {
        if (o->kind == HEADING) {
            put_format(out, "\n%s\n", o->help);
            continue;
        }
        char left[64], letter[] = {'-', o->letter, ',', '\0'};
        int n = snprintf(left, sizeof left, "  %3s --%s %s", o->letter ? letter : "", o->name,
                         o->argument ? o->argument : "");
        put_format(out, "%-*s", HELP_COLUMN, left);
        if (n >= HELP_COLUMN)
            put_format(out, "\n%*s", HELP_COLUMN, "");
        put_indented(out, o->help, HELP_COLUMN);
    }
    put_bytes(out, NOTES, sizeof NOTES - 1);
}

/* ---- parsing ---- */

/* Insertions, deletions and replacements that turn one name into another. */
static size_t edit_distance(const char *a, const char *b)
{
    enum { LONGEST = 32 };
    size_t n = strlen(b), row[LONGEST + 1];
    if (n > LONGEST)
        return SIZE_MAX;
    for (size_t j = 0; j <= n; j++)
        row[j] = j;
    for (size_t i = 1; *a; a++, i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= n; j++) {
            size_t replaced = diagonal + (*a != b[j - 1]);
            size_t shifted = (row[j] < row[j - 1] ? row[j] : row[j - 1]) + 1;
            diagonal = row[j];
            row[j] = replaced < shifted ? replaced : shifted;
        }
    }
    return row[n];
}

/* How far an option is from the name that was given, SIZE_MAX where it was hardly meant: the
 * other case of its letter, a name cut short, a few wrong letters, a part of its name. */
static size_t remoteness(const option *o, const char *argument, const char *name)
{
    size_t length = strlen(name), distance = edit_distance(name, o->name);
    if (length == 1)
        return tolower((unsigned char)*name) == o->letter ? 0 : SIZE_MAX;
    if (length && strncmp(o->name, name, length) == 0)
        return 1;
    if (length && argument[1] == o->letter) /* -qc */
        return 2;
    if (distance <= length / 3)
        return 1 + distance;
    return length > 3 && strstr(o->name, name) ? length : SIZE_MAX;
}

/* Names the option that was likely meant, if there is one, and what lists all. */
static int unknown_option(const char *argument, const char *list)
{
    char name[32];
    size_t length = strcspn(argument + strspn(argument, "-"), "="), best = SIZE_MAX;
    const option *nearest = NULL;
    snprintf(name, sizeof name, "%.*s", (int)(length < 31 ? length : 31),
             argument + strspn(argument, "-"));
    for (const option *o = OPTIONS; o < OPTIONS + N_OPTIONS; o++) {
        size_t distance = o->kind == HEADING ? SIZE_MAX : remoteness(o, argument, name);
        if (distance < best) {
            best = distance;
            nearest = o;
        }
    }
    return fail(USAGE, "unknown option %s%s%s (%s lists all)", argument,
                nearest ? "; the nearest is --" : "", nearest ? nearest->name : "", list);
}

/* Digits only, at most `most`; returns 1 or 0. */
static int parse_whole(const char *text, uint64_t most, uint64_t *value)
{
    *value = 0;
    for (const char *c = text; *c; c++) {
        if (*c < '0' || *c > '9')
            return 0;
        uint64_t digit = (uint64_t)(*c - '0');
        if (digit > most || *value > (most - digit) / 10)
            return 0;
        *value = *value * 10 + digit;
    }
    return *text != '\0';
}

/* A decimal number from least to most that float can hold; returns 1 or 0. */
static int parse_real(const char *text, double least, double most, float *value)
{
    char *end;
    if (!*text || text[strspn(text, "0123456789.eE+-")])
        return 0; /* strtod would take blanks, inf, nan and hexadecimal */
    errno = 0;
    double number = strtod(text, &end);
    *value = (float)number;
    int underflow = number != 0 && !(*value != 0);
    return !*end && errno != ERANGE && !underflow && number >= least && number <= most;
}

/* "235+1.5", "235-1.5" or "235-inf"; returns 1 or 0. */
static int parse_bias(const char *text, gemma2_bias *bias)
{
    char id[16];
    uint64_t number;
    size_t digits = strspn(text, "0123456789");
    const char *sign = text + digits;
    if (digits >= sizeof id || (*sign != '+' && *sign != '-') || sign[1] == '+' || sign[1] == '-')
        return 0;
    snprintf(id, sizeof id, "%.*s", (int)digits, text);
    if (!parse_whole(id, INT32_MAX, &number))
        return 0;
    bias->id = (int32_t)number;
    bias->bias = -INFINITY;
    return strcmp(sign, "-inf") == 0 || parse_real(sign, -FLT_MAX, FLT_MAX, &bias->bias);
}

/* Which of the words between | a value is, from 0 on; -1 for none. */
static int32_t which_word(const char *words, const char *value)
{
    size_t n = strlen(value), length;
    for (int32_t i = 0;; i++, words += length + 1) {
        length = strcspn(words, "|");
        if (length == n && memcmp(words, value, n) == 0)
            return i;
        if (!words[length])
            return -1;
    }
}

/* Whether the first n bytes of text are the name; an underscore counts as a dash. */
static int is_name(const char *name, const char *text, size_t n)
{
    size_t i = 0;
    while (i < n && (text[i] == name[i] || (text[i] == '_' && name[i] == '-')))
        i++;
    return i == n && name[n] == '\0';
}

/* Stores the value of an option.  Returns 1, or 0 for a value that it does not take. */
static int set_option(options *opts, const option *o, const char *value)
{
    void *field = (char *)opts + o->field;
    uint64_t number;
    int32_t word;
    switch (o->kind) {
    case HEADING:
        return 0;
    case MODE:
        return 1;
    case FLAG:
        return *(int *)field = 1;
    case PROMPT:
    case TEXT:
        opts->n_prompts += o->kind == PROMPT;
        *(const char **)field = value;
        return 1;
    case STOP:
        opts->stops[opts->n_stops] = value;
        return opts->stops[opts->n_stops++][0] != '\0';
    case CHOICE:
        opts->choices[opts->n_choices] = value;
        return opts->choices[opts->n_choices++][0] != '\0';
    case BIAS:
        return parse_bias(value, &opts->biases[opts->sampler.n_bias++]);
    case WHOLE:
        if (o->least < 0 && strcmp(value, "-1") == 0) {
            *(int32_t *)field = -1;
            return 1;
        }
        if (!parse_whole(value, (uint64_t)o->most, &number) || (double)number < o->least)
            return 0;
        *(int32_t *)field = (int32_t)number;
        return 1;
    case REAL:
        return parse_real(value, o->least, o->most, field);
    case SEED:
        opts->seed_given = 1;
        return parse_whole(value, UINT64_MAX, &opts->seed);
    case KEYWORD:
        word = which_word(o->argument, value);
        *(int32_t *)field = (int32_t)o->least + (o->most > o->least ? word : -word);
        return word >= 0;
    }
    return 0;
}

/* The option that an argument names, and the value it carries itself: --name=value or
 * -nvalue; *value is NULL where it carries none.  A long name behind one dash is a slip. */
static const option *find_option(const char *argument, const char **value)
{
    const option *found = NULL;
    int dashes = argument[1] == '-' ? 2 : 1;
    size_t length = strcspn(argument + dashes, "=");
    *value = NULL;
    for (const option *o = OPTIONS; o < OPTIONS + N_OPTIONS; o++) {
        if (o->kind == HEADING)
            continue;
        if (is_name(o->name, argument + dashes, length)) {
            *value = argument[2 + length] ? argument + 3 + length : NULL;
            return dashes == 2 ? o : NULL;
        }
        if (argument[1] == o->letter && (o->argument || !argument[2])) {
            *value = argument[2] ? argument + 2 : NULL;
            found = o;
        }
    }
    return found;
}

/* Takes the option that argv[*i] begins, with its value, and moves *i to the last of it. */
static int take_option(options *opts, int argc, char **argv, int *i)
{
    const char *argument = argv[*i], *value, *meaning = foreign_meaning(argument);
    if (meaning && !*meaning)
        return DONE;
    if (meaning && *meaning != '-')
        return fail(USAGE, "%s: %s", argument, meaning);
    const option *o = find_option(meaning ? meaning : argument, &value);
    if (!o)
        return unknown_option(argument, "--help");
    if (meaning && argument[strcspn(argument, "=")])
        value = strchr(argument, '=') + 1;
    if (!o->argument && value)
        return fail(USAGE, "--%s takes no value", o->name);
    if (o->argument && !value && ++*i == argc)
        return fail(USAGE, "--%s needs a value: %s", o->name, o->argument);
    if (!value)
        value = o->argument ? argv[*i] : "";
    if (!set_option(opts, o, value))
        return fail(USAGE, "--%s '%s': it takes %s", o->name, value, o->takes);
    if (o->mode && opts->asked && opts->mode != o->mode)
        return fail(USAGE, "--%s and --%s do not go together", opts->asked->name, o->name);
    if (o->mode) {
        opts->mode = o->mode;
        opts->asked = o;
    }
    opts->given[opts->n_given++] = o;
    if (strcmp(argument, "-c") == 0 && *i + 1 < argc && argv[*i + 1][0] &&
        !argv[*i + 1][strspn(argv[*i + 1], "0123456789")])
        opts->after_chat = argv[*i + 1];
    return DONE;
}

/* --help and --version end the parsing: whatever follows them is not looked at. */
static int parse_options(options *opts, int argc, char **argv)
{
    int options_ended = 0, status = DONE;
    for (int i = 1; i < argc && status == DONE && !opts->help && !opts->version; i++) {
        int is_option = !options_ended && argv[i][0] == '-' && argv[i][1];
        if (is_option && strcmp(argv[i], "--") == 0)
            options_ended = 1;
        else if (is_option)
            status = take_option(opts, argc, argv, &i);
        else if (opts->n_positional < 3)
            opts->positional[opts->n_positional++] = argv[i];
    }
    return status;
}

/* MODEL and PROMPT; says where a number was likely meant for another option. */
static int place_positional(options *opts)
{
    const char *number = opts->after_chat;
    int at = opts->model == NULL, n = opts->n_positional; /* at: the prompt's place */
    if (!opts->model)
        opts->model = opts->positional[0];
    opts->n_prompts += n > at;
    if (number && (number == opts->model || n > at + 1 || opts->n_prompts > 1))
        return fail(USAGE, "-c %s: -c is --chat here; a context of %s tokens is -C %s", number,
                    number, number);
    if (n > at + 1)
        return fail(USAGE, "one argument too many: %s; put quotes around the whole prompt",
                    opts->positional[at + 1]);
    if (opts->n_prompts > 1)
        return fail(USAGE, "more than one prompt: give PROMPT, -p, -f or --ids, and only once");
    if (n > at)
        opts->text = opts->positional[at];
    float temperature = opts->sampler.temperature;
    if (number && number == opts->text && !opts->quiet)
        remark("note: -c is --chat here and %s the message; a context of %s tokens is -C %s",
               number, number, number);
    if (temperature >= 2 && temperature <= 1024 && temperature == floorf(temperature) &&
        !opts->quiet)
        remark("note: -t is --temperature here; %g threads are -j %g", (double)temperature,
               (double)temperature);
    return DONE;
}

/* A chat without a prompt on a terminal is a conversation. */
static int find_mode(options *opts)
{
    const char *name = opts->asked ? opts->asked->name : opts->json ? "json" : NULL;
    int takes_prompt = (PROMPTS & ONE(opts->mode)) != 0;
    if (opts->n_prompts && !takes_prompt)
        return fail(USAGE, "--%s takes no prompt", name);
    if (!takes_prompt || opts->n_prompts || !is_terminal(stdin))
        return DONE;
    if (opts->chat && name)
        return fail(USAGE, "--%s has no meaning in a conversation: put one message after the model "
                    "file, or leave --%s out", name, name);
    if (!opts->chat)
        return fail(USAGE, "no prompt: put one after the model file%s; --help shows examples",
                    name ? "" : ", or -c for a conversation");
    opts->mode = CONVERSE;
    return DONE;
}

/* Refuses what would be ignored: options without meaning in the mode. */
static int check_meanings(const options *opts)
{
    for (size_t i = 0; i < opts->n_given; i++) {
        const option *o = opts->given[i];
        if (o->modes & ONE(opts->mode))
            continue;
        if (opts->asked)
            return fail(USAGE, "--%s has no meaning with --%s: leave one of them out", o->name,
                        opts->asked->name);
        return fail(USAGE, "--%s has no meaning %s: leave it out", o->name,
                    opts->mode == CONVERSE ? "in a conversation" : "for a single reply");
    }
    return DONE;
}

/* Whether what is asked for makes sense together. */
static int check_options(options *opts)
{
    const char *limit = opts->schema ? "schema" : opts->grammar ? "grammar" : "choice";
    int limits = (opts->n_choices != 0) + (opts->grammar != NULL) + (opts->schema != NULL);
    int status = place_positional(opts);
    if (status == DONE && !opts->model)
        return fail(USAGE, "no model file given; --help shows examples");
    status = status ? status : find_mode(opts);
    status = status ? status : check_meanings(opts);
    if (status != DONE)
        return status;
    if (opts->n_top && !opts->json)
        return fail(USAGE, "--top-logprobs belongs to the --json of a reply");
    if (opts->kept && opts->loaded)
        return fail(USAGE, "--session and --load do not go together");
    if (opts->block > 1 && opts->block % 32)
        return fail(USAGE, "--importance-block '%" PRId32 "': it takes 1, or a multiple of 32 up "
                    "to 1024", opts->block);
    if (limits > 1)
        return fail(USAGE, "--choice, --grammar and --schema do not go together");
    if (limits && opts->ignore_eos)
        return fail(USAGE, "--ignore-eos and --%s do not go together: such a reply has an end",
                    limit);
    if (opts->system && !opts->chat && opts->mode != BATCH)
        return fail(USAGE, "--system belongs to a chat; add -c");
    if (opts->ids && opts->chat)
        return fail(USAGE, "--ids and --chat do not go together: ids are taken as they are");
    return DONE;
}

/* ===================================================================================
 * 4. Text
 * =================================================================================== */

enum { REPLACEMENT = 0xFFFD };
#define REPLACEMENT_UTF8 "\xEF\xBF\xBD"

/* The code point at the start of n >= 1 bytes, and its length in bytes; a byte that
 * starts no valid UTF-8 character is one U+FFFD. */
static uint32_t next_char(const char *text, size_t n, size_t *length)
{
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    const unsigned char *byte = (const unsigned char *)text;
    size_t len = byte[0] < 0x80         ? 1
                 : byte[0] >> 5 == 0x06 ? 2
                 : byte[0] >> 4 == 0x0E ? 3
                 : byte[0] >> 3 == 0x1E ? 4
                                        : 0;
    *length = 1;
    if (len == 1)
        return byte[0];
    if (len == 0 || len > n)
        return REPLACEMENT;
    uint32_t code = byte[0] & (0x7Fu >> len);
    for (size_t i = 1; i < len; i++) {
        if (byte[i] >> 6 != 2)
            return REPLACEMENT;
        code = code << 6 | (byte[i] & 0x3Fu);
    }
    if (code < least[len] || code > 0x10FFFF || (code >= 0xD800 && code <= 0xDFFF))
        return REPLACEMENT;
    *length = len;
    return code;
}

/* Writes a character in UTF-8 and returns how many bytes it takes. */
static size_t write_char(char *to, uint32_t code)
{
    size_t n = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (size_t i = n; i-- > 1; code >>= 6)
        to[i] = (char)(0x80 | (code & 0x3F));
    to[0] = (char)(n == 1 ? code : (0xF00u >> n & 0xFF) | code);
    return n;
}

/* No character of valid UTF-8 begins with this byte. */
static int is_inside_char(char byte) { return ((unsigned char)byte & 0xC0) == 0x80; }

static int is_control(uint32_t code)
{
    return code < 0x20 || (code >= 0x7F && code <= 0x9F);
}

/* The text without white space at both ends. */
static const char *trim(const char *text, size_t *n)
{
    while (*n && isspace((unsigned char)text[*n - 1]))
        --*n;
    while (*n && isspace((unsigned char)*text)) {
        text++;
        --*n;
    }
    return text;
}

/* Control characters and stray bytes of a sentence become question marks. */
static void hide_controls(char *text)
{
    size_t length;
    for (size_t left = strlen(text); left; text += length, left -= length) {
        uint32_t code = next_char(text, left, &length);
        if (is_control(code) || code == REPLACEMENT)
            memset(text, '?', length);
    }
}

/* Text as a terminal may see it: nothing but newline and tab below U+0020, no DEL, no C1,
 * no stray bytes.  Marks of writing direction are not control sequences and belong to the
 * text: what they do ends with their line. */
static void put_printable(output *out, const char *text, size_t n)
{
    size_t length;
    for (size_t i = 0; i < n; i += length) {
        uint32_t code = next_char(text + i, n - i, &length);
        if ((is_control(code) && code != '\n' && code != '\t') || code == REPLACEMENT)
            put_bytes(out, REPLACEMENT_UTF8, 3);
        else
            put_bytes(out, text + i, length);
    }
}

static void put_text(output *out, const char *text, size_t n)
{
    if (out->terminal)
        put_printable(out, text, n);
    else
        put_bytes(out, text, n);
}

/* The inside of a JSON string: valid UTF-8 whatever the bytes are. */
static void put_json(output *out, const char *text, size_t n)
{
    size_t length;
    for (size_t i = 0; i < n; i += length) {
        uint32_t code = next_char(text + i, n - i, &length);
        if (code == '"' || code == '\\')
            put_format(out, "\\%c", (int)code);
        else if (code == '\n' || code == '\t')
            put_format(out, "\\%c", code == '\n' ? 'n' : 't');
        else if (is_control(code) || code == REPLACEMENT)
            put_format(out, "\\u%04" PRIx32, code);
        else
            put_bytes(out, text + i, length);
    }
}

static void put_quoted(output *out, const char *text, size_t n)
{
    put_bytes(out, "\"", 1);
    put_json(out, text, n);
    put_bytes(out, "\"", 1);
}

/* ---- JSON, by the letter of RFC 8259.  A text becomes a flat array of nodes in its own order,
 * and nothing here calls itself, so no input leads deep.  Strings are decoded in a copy of the
 * text, where a NUL follows each of them and each number, true, false and null. ---- */

typedef enum {
    JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT
} json_kind;

typedef struct {
    json_kind kind;
    size_t start, end; /* its bytes in the text; a string's are its characters */
    size_t n;          /* elements of an array; members of an object, a key and a value each */
    size_t next;       /* index of the first node behind it and all that it holds */
} json_node;

typedef struct {
    char *text; /* NUL-terminated, whatever else it holds */
    size_t size, at;
    array nodes;     /* json_node; the first is the whole */
    const char *why; /* what is wrong at byte `at`, or NULL */
} json;

enum { JSON_DEPTH = 512 };
static const char JSON_MEMORY[] = "there is not enough memory to read it";

static int json_wrong(json *j, const char *why)
{
    j->why = why;
    return 0;
}

/* Four hexadecimal digits, or UINT32_MAX. */
static uint32_t json_hex(const char *text)
{
    char digits[5] = "";
    if (strspn(text, "0123456789abcdefABCDEF") < 4)
        return UINT32_MAX;
    memcpy(digits, text, 4);
    return (uint32_t)strtoul(digits, NULL, 16);
}

/* The character that the n >= 1 bytes inside a string begin with, and how many of them it takes;
 * *why where there is none. */
static uint32_t json_char(const char *text, size_t n, size_t *length, const char **why)
{
    static const char names[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    uint32_t code = next_char(text, n, length), low;
    if (code < 0x20)
        *why = "a control character in a string must be an escape, as in \\n";
    else if (code == REPLACEMENT && *length == 1)
        *why = "this byte is not valid UTF-8";
    if (code != '\\')
        return code;
    *length = 2;
    const char *name = text[1] ? strchr(names, text[1]) : NULL;
    if (name)
        return (unsigned char)meanings[name - names];
    code = text[1] == 'u' ? json_hex(text + 2) : UINT32_MAX;
    *length = 6;
    if (code == UINT32_MAX)
        *why = "there is no such escape; a backslash itself is \\\\";
    if (code < 0xD800 || code > 0xDFFF)
        return code;
    low = text[6] == '\\' && text[7] == 'u' ? json_hex(text + 8) : UINT32_MAX;
    *length = 12;
    if (code > 0xDBFF || low < 0xDC00 || low > 0xDFFF)
        *why = "half of a surrogate pair stands alone here";
    return 0x10000 + ((code & 0x3FF) << 10 | (low & 0x3FF));
}

static json_node *json_push(json *j, json_kind kind, size_t start)
{
    json_node *node = extend(&j->nodes, 1, sizeof *node);
    if (node)
        *node = (json_node){kind, start, j->at, 0, j->nodes.n};
    else
        j->why = JSON_MEMORY;
    return node;
}

/* A string, decoded where it stands: no character is longer than what spells it. */
static int json_string(json *j)
{
    size_t start = ++j->at, end = start, length;
    for (; j->at < j->size && j->text[j->at] != '"'; j->at += length) {
        const char *why = NULL;
        uint32_t code = json_char(j->text + j->at, j->size - j->at, &length, &why);
        if (why)
            return json_wrong(j, why);
        end += write_char(j->text + end, code);
    }
    if (j->at == j->size)
        return json_wrong(j, "a string has no closing quote");
    json_node *node = json_push(j, JSON_STRING, start);
    if (node)
        node->end = end;
    j->at++;
    return node != NULL;
}

static int json_number(json *j)
{
    static const char digits[] = "0123456789";
    size_t start = j->at, n;
    const char *at = j->text + start + (j->text[start] == '-');
    n = strspn(at, digits);
    if (n > 1 && *at == '0') {
        j->at = (size_t)(at - j->text);
        return json_wrong(j, "a number cannot begin with a needless 0");
    }
    at += n;
    if (n && *at == '.') {
        n = strspn(at + 1, digits);
        at += 1 + n;
    }
    if (n && (*at == 'e' || *at == 'E')) {
        at += 1 + (at[1] == '+' || at[1] == '-');
        n = strspn(at, digits);
        at += n;
    }
    j->at = (size_t)(at - j->text);
    return n ? json_push(j, JSON_NUMBER, start) != NULL : json_wrong(j, "a digit must follow");
}

/* A value that holds no others. */
static int json_scalar(json *j)
{
    static const char *const words[] = {"null", "false", "true"};
    char c = j->text[j->at];
    if (c == '"')
        return json_string(j);
    if (c == '-' || (c >= '0' && c <= '9'))
        return json_number(j);
    for (int i = 0; i < 3; i++) {
        size_t n = strlen(words[i]), start = j->at;
        if (strncmp(j->text + start, words[i], n) == 0) {
            j->at += n;
            return json_push(j, (json_kind)(JSON_NULL + i), start) != NULL;
        }
    }
    return json_wrong(j, j->at < j->size ? "a value must stand here" : "it ends too early");
}

static const json_node *json_next(const json *j, const json_node *node)
{
    return (const json_node *)j->nodes.items + node->next;
}

typedef struct {
    const char *text;
    size_t n;
} json_key;

/* Orders keys by their bytes. */
static int by_key(const void *left, const void *right)
{
    const json_key *a = left, *b = right;
    int order = memcmp(a->text, b->text, a->n < b->n ? a->n : b->n);
    return order ? order : (a->n > b->n) - (a->n < b->n);
}

/* Whether an object that has been read has each of its keys once. */
static int json_keys_differ(json *j, const json_node *object)
{
    json_key *keys = malloc((object->n + 1) * sizeof *keys);
    const json_node *node = object + 1;
    if (!keys)
        return json_wrong(j, JSON_MEMORY);
    for (size_t i = 0; i < object->n; i++, node = json_next(j, node + 1))
        keys[i] = (json_key){j->text + node->start, node->end - node->start};
    qsort(keys, object->n, sizeof *keys, by_key);
    for (size_t i = 1; i < object->n && !j->why; i++)
        if (by_key(keys + i - 1, keys + i) == 0) {
            const char *a = keys[i - 1].text, *b = keys[i].text;
            j->at = (size_t)((a > b ? a : b) - j->text) - 1;
            j->why = "this key stands twice in its object";
        }
    free(keys);
    return !j->why;
}

static char json_skip(json *j)
{
    j->at += strspn(j->text + j->at, " \t\r\n");
    return j->text[j->at];
}

/* What stands before a value: nothing in an array, a key and a colon in an object. */
static int json_lead(json *j, json_node *container)
{
    container->n++;
    if (container->kind == JSON_ARRAY)
        return 1;
    if (json_skip(j) != '"')
        return json_wrong(j, "a key in quotes must stand here");
    if (!json_string(j))
        return 0;
    if (json_skip(j) != ':')
        return json_wrong(j, "a colon must follow the key");
    return j->at++, 1;
}

/* What was wrong stays. */
static void json_free(json *j)
{
    free(j->text);
    free(j->nodes.items);
    *j = (json){.at = j->at, .why = j->why};
}

/* Reads a text that is one value.  Returns 1, or 0 with why and at.  Either way json_free is to
 * follow. */
static int json_read(json *j, const char *text, size_t size)
{
    size_t open[JSON_DEPTH], depth = 0; /* the nodes that are not closed yet */
    *j = (json){malloc(size + 1), size, 0, {0}, NULL};
    if (!j->text)
        return json_wrong(j, JSON_MEMORY);
    if (size)
        memcpy(j->text, text, size);
    j->text[size] = '\0';
    for (;;) {
        char c = json_skip(j);
        int opens = c == '[' || c == '{';
        if (opens && depth == JSON_DEPTH)
            return json_wrong(j, "arrays and objects are nested more than 512 deep");
        if (opens) {
            if (!json_push(j, c == '[' ? JSON_ARRAY : JSON_OBJECT, j->at++))
                return 0;
            open[depth++] = j->nodes.n - 1;
        } else if (!json_scalar(j))
            return 0;
        for (int first = opens; depth; first = 0) { /* what closes here */
            json_node *container = (json_node *)j->nodes.items + open[depth - 1];
            c = json_skip(j);
            if (c != (container->kind == JSON_ARRAY ? ']' : '}')) {
                if (!first && c != ',')
                    return json_wrong(j, "a comma or the end must stand here");
                j->at += !first;
                if (!json_lead(j, container))
                    return 0;
                break;
            }
            container->end = ++j->at;
            container->next = j->nodes.n;
            if (container->kind == JSON_OBJECT && !json_keys_differ(j, container))
                return 0;
            depth--;
        }
        if (depth == 0)
            break;
    }
    json_skip(j);
    if (j->at < size)
        return json_wrong(j, "nothing may follow the value");
    for (json_node *node = j->nodes.items; node < (json_node *)j->nodes.items + j->nodes.n; node++)
        if (node->kind <= JSON_STRING)
            j->text[node->end] = '\0';
    return 1;
}

/* Whether a value is there and a string of these n bytes. */
static int json_equal(const json *j, const json_node *node, const char *text, size_t n)
{
    return node && node->kind == JSON_STRING && node->end - node->start == n &&
           memcmp(j->text + node->start, text, n) == 0;
}

static int json_is(const json *j, const json_node *node, const char *text)
{
    return json_equal(j, node, text, strlen(text));
}

/* The value of a key of n bytes; NULL without it, or without an object. */
static const json_node *json_find(const json *j, const json_node *object, const char *name,
                                  size_t n)
{
    if (!object || object->kind != JSON_OBJECT)
        return NULL;
    for (const json_node *key = object + 1; key < json_next(j, object); key = json_next(j, key + 1))
        if (json_equal(j, key, name, n))
            return key + 1;
    return NULL;
}

static const json_node *json_get(const json *j, const json_node *object, const char *name)
{
    return json_find(j, object, name, strlen(name));
}

/* The n bytes of a string; NULL where there is none. */
static const char *json_text(const json *j, const json_node *node, size_t *n)
{
    *n = node ? node->end - node->start : 0;
    return node && node->kind == JSON_STRING ? j->text + node->start : NULL;
}

static void format_bytes(char text[32], uint64_t bytes)
{
    static const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
    double value = (double)bytes;
    int unit = 0;
    for (; value >= 1024 && unit < 4; unit++)
        value /= 1024;
    snprintf(text, 32, "%.*f %s", unit ? 1 : 0, value, units[unit]);
}

/* What stands for path as one word of a shell; size is at least 8. */
static void quote_path(const char *path, char *word, size_t size)
{
    size_t n = 0;
    int plain = *path && *path != '-';
    for (const char *c = path; *c; c++)
        plain = plain && (isalnum((unsigned char)*c) || strchr("/._+-", *c));
    snprintf(word, size, "%s", path);
    if (plain)
        return;
    word[n++] = '\'';
    for (const char *c = path; *c && n + 6 < size; c++) {
        memcpy(word + n, *c == '\'' ? "'\\''" : c, *c == '\'' ? 4 : 1);
        n += *c == '\'' ? 4 : 1;
    }
    word[n++] = '\'';
    word[n] = '\0';
}

#define SESSION_MAGIC "\x89GEMSES\n"
#define IMPORTANCE_MAGIC "\x89GEMMAI\n"
#define HISTORY_MAGIC "#gemma2" /* and a NUL, as behind every message */
enum { MAGIC_BYTES = 8, HEAD_BYTES = 4096 };

/* What a file seems to be. */
typedef struct {
    const char *bytes; /* that stand at `at` */
    size_t at, n;
    const char *what;
    int is_text, converts; /* export.py reads it */
} kind;

static const kind KINDS[] = {
    {"\x89GEMMA2\n", 0, 8, "a model of gemma2.c", 0, 0},
    {SESSION_MAGIC, 0, 8, "a saved session", 0, 0},
    {IMPORTANCE_MAGIC, 0, 8, "an importance file", 0, 0},
    {HISTORY_MAGIC, 0, 8, "a history of messages", 0, 0},
    {"GGUF", 0, 4, "a GGUF file", 0, 1},
    {"{\"", 8, 2, "a safetensors file", 0, 1},
    {"PK\3\4", 0, 4, "a PyTorch file or a zip archive", 0, 1},
    {"\x80\2", 0, 2, "a PyTorch file", 0, 1},
    {"\x1f\x8b", 0, 2, "gzip-compressed", 0, 0},
    {"\x7f" "ELF", 0, 4, "a program", 0, 0},
    {"\x89PNG", 0, 4, "an image", 0, 0},
    {"\xff\xd8\xff", 0, 3, "an image", 0, 0},
    {"%PDF", 0, 4, "a PDF file", 0, 0},
    {"\xff\xfe", 0, 2, "UTF-16", 0, 0},
    {"\xfe\xff", 0, 2, "UTF-16", 0, 0},
    {"version https://git-lfs", 0, 23, "a Git LFS pointer", 1, 0},
    {"<!DOCTYPE", 0, 9, "a web page", 1, 0},
    {"<html", 0, 5, "a web page", 1, 0},
};
static const kind BINARY = {"", 0, 0, "binary data", 0, 0}, PLAIN_TEXT = {"", 0, 0, "text", 1, 0},
                  EMPTY = {"", 0, 0, "empty", 1, 0}, UTF_16 = {"", 0, 0, "UTF-16", 0, 0};

/* By the first bytes of n.  A tenth of control characters and stray bytes is too much for a
 * text.  In UTF-16 of Latin script every second byte is zero. */
static const kind *kind_of(const char *bytes, size_t n)
{
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++)
        if (n >= KINDS[i].at + KINDS[i].n &&
            memcmp(bytes + KINDS[i].at, KINDS[i].bytes, KINDS[i].n) == 0)
            return KINDS + i;
    size_t odd = 0, zeros[2] = {0, 0}, length, most = n < HEAD_BYTES ? n : HEAD_BYTES;
    for (size_t i = 0; i < most; i += length) {
        uint32_t code = next_char(bytes + i, n - i, &length);
        odd += code == REPLACEMENT || code == 0x7F || code == 0 ||
               (code < 0x20 && !strchr("\t\n\f\r\033", (int)code));
        zeros[i % 2] += code == 0;
    }
    if (n > 16 && (zeros[0] > most / 4) != (zeros[1] > most / 4))
        return &UTF_16;
    return n == 0 ? &EMPTY : n > 16 && odd > most / 10 ? &BINARY : &PLAIN_TEXT;
}

/* ===================================================================================
 * 5. The prompt
 * =================================================================================== */

/* ---- what constrains the reply: a grammar in GBNF, which --choice and --schema become ---- */

typedef struct {
    gemma2_grammar *grammar;
    gemma2_matcher *matcher; /* NULL: the reply may be anything */
    gemma2_grammar_state state;
    uint32_t *mask;
    int64_t shortest; /* tokens that the shortest reply takes */
    array gbnf;       /* char: the text of the grammar */
} constraint;

static void close_constraint(constraint *c)
{
    gemma2_matcher_free(c->matcher);
    gemma2_grammar_free(c->grammar);
    free(c->mask);
    free(c->gbnf.items);
    *c = (constraint){0};
}

/* Makes the constraint of a grammar, or keeps it if it has the same text.  Returns 0 with a
 * sentence in err, which has a line and a column only if the user wrote the grammar. */
static int open_constraint(constraint *c, const gemma2_model *model, const char *gbnf, size_t n,
                           int written, char *err, size_t size)
{
    size_t words = ((size_t)gemma2_get_config(model)->n_vocab + 31) / 32;
    if (c->matcher && c->gbnf.n == n && memcmp(c->gbnf.items, gbnf, n) == 0)
        return 1;
    close_constraint(c);
    *c = (constraint){.grammar = gemma2_grammar_new(model, gbnf, (int64_t)n, err, size)};
    const char *what = c->grammar || written || strncmp(err, "line ", 5) ? NULL : strchr(err, ':');
    if (what)
        memmove(err, what + 2, strlen(what + 2) + 1);
    else if (!c->grammar && !written && strstr(err, "fits the grammar"))
        snprintf(err, size, "no value fits the schema, or only values that are too long");
    if (!c->grammar)
        return 0;
    c->matcher = gemma2_matcher_new(c->grammar);
    c->mask = malloc(words * sizeof *c->mask);
    gemma2_matcher_start(c->matcher, &c->state);
    c->shortest = gemma2_matcher_shortest(c->matcher, &c->state);
    if (c->matcher && c->mask && c->shortest >= 0 && append(&c->gbnf, gbnf, n) == DONE)
        return 1;
    snprintf(err, size, "out of memory for the grammar");
    close_constraint(c);
    return 0;
}

/* Whether the reply may end here. */
static int may_end(constraint *c)
{
    return c->matcher && gemma2_matcher_shortest(c->matcher, &c->state) == 0;
}

/* A text as a literal of GBNF. */
static void put_literal(output *out, const char *text, size_t n)
{
    put_bytes(out, "\"", 1);
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)text[i] < 0x20 || text[i] == '"' || text[i] == '\\')
            put_format(out, "\\x%02X", text[i]);
        else
            put_bytes(out, text + i, 1);
    put_bytes(out, "\" ", 2);
}

/* The choices as a grammar; 0 without memory. */
static int add_choices(array *gbnf, const char *const *texts, size_t n)
{
    output out = {.memory = gbnf};
    put_format(&out, "root ::= ");
    for (size_t i = 0; i < n; i++) {
        put_format(&out, i ? "| " : "");
        put_literal(&out, texts[i], strlen(texts[i]));
    }
    return !out.error;
}

/* Whether a word is in a list that has a blank around each. */
static int in_words(const char *words, const char *word)
{
    size_t n = strcspn(word, " ");
    const char *at = n && !word[n] ? strstr(words, word) : NULL;
    while (at && (at[-1] != ' ' || at[n] != ' '))
        at = strstr(at + 1, word);
    return at != NULL;
}

/* ---- JSON Schema as a grammar.
 *
 * A rule stands for a set of schemas that a value must meet together.  A `view` is what they say:
 * meet() reads a schema into it, and what $ref and allOf lead to joins the set.  A list of anyOf or
 * oneOf waits in the set until put_ways() replaces it by each of its ways in turn.  An object that
 * names keys gets no others, and its keys stand in the order in which they are named. ---- */

/* Types are bits, one for each json_kind, but JSON_NUMBER has two: INTEGER, and FRACTION. */
enum { NO_VALUE = 1 << JSON_NULL, TRUTH = 1 << JSON_FALSE | 1 << JSON_TRUE,
       FRACTION = 1 << JSON_NUMBER, STRING = 1 << JSON_STRING, ARRAY = 1 << JSON_ARRAY,
       OBJECT = 1 << JSON_OBJECT, INTEGER = 2 * OBJECT, NUMBER = FRACTION | INTEGER,
       ALL_TYPES = 2 * INTEGER - 1, A_SCHEMA = OBJECT | TRUTH, A_NUMBER = FRACTION };
static const struct {
    const char *name; /* also of the rule of all such values, which arrays and objects lack */
    unsigned bits;
    json_kind kind;
} TYPES[] = {{"string", STRING, JSON_STRING}, {"integer", INTEGER, JSON_NUMBER},
             {"number", NUMBER, JSON_NUMBER}, {"boolean", TRUTH, JSON_TRUE},
             {"null", NO_VALUE, JSON_NULL}, {"array", ARRAY, JSON_ARRAY},
             {"object", OBJECT, JSON_OBJECT}};

enum { MOST_SCHEMAS = 64, MOST_DEPTH = 128, MOST_RULES = 20000, MOST_STEPS = 2000000,
       MOST_GBNF = 1 << 22, MOST_TIMES = 2000, /* both are limits of gemma2_grammar_new */
       N_TYPES = sizeof TYPES / sizeof *TYPES, N_KINDS = JSON_OBJECT + 1 };
typedef struct {
    size_t n;
    unsigned types, spoken; /* types that are allowed, and that keywords constrain */
    const json_node *at[MOST_SCHEMAS]; /* schemas, and lists of ways */
    double low[N_KINDS], high[N_KINDS]; /* by kind: of a number, length, elements, keys */
    const json_node *list, *text, *keys; /* enum or const, pattern or format, pattern of keys */
    int clash; /* two patterns or formats that differ must both be met */
} view;
static const view EVERYTHING = {.types = ALL_TYPES, .low = {[JSON_NUMBER] = -INFINITY}, .high = {
    INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY}};

typedef struct {
    const json *j;
    const json_node *root;
    output out; /* the grammar */
    array rules; /* view: to be met (of all types), or met and of one type, array or object */
    size_t n_steps; /* ways, keywords and keys that were read */
    int depth;      /* of put_ways */
    char *err;
    size_t size;
    int failed;
} schema;

static const char SCHEMA_RULES[] =
    "never ::= \" \" never\n" /* no text: behind it every way begins with "|" */
    "char ::= [^\"\\\\\\x00-\\x1F] | \"\\\\\" ([\"\\\\bfnrt] | \"u00\" [01] [0-9a-f])\n"
    "dot ::= [^\"\\\\\\x00-\\x1F\\u2028\\u2029] | \"\\\\\" [\"\\\\bft]\n"
    "string ::= \"\\\"\" char* \"\\\"\"\n"
    "integer ::= \"0\" | \"-\"? [1-9] [0-9]{0,14}\n"
    "number ::= \"-\"? (\"0\" | [1-9] [0-9]{0,14}) fraction? ([eE] [-+]? [0-9]{1,2})?\n"
    "fraction ::= \".\" [0-9]{1,16}\n" /* bounded: a model may write digits for ever */
    "boolean ::= \"true\" | \"false\"\n"
    "null ::= \"null\"\n"
    "date ::= [1-9] [0-9]{3} \"-\" ((\"0\" [13578] | \"1\" [02]) \"-\" day31 | "
    "(\"0\" [469] | \"11\") \"-\" day30 | \"02-\" day28) | "
    "[1-9] [0-9] (\"0\" [48] | [2468] [048] | [13579] [26]) \"-02-29\"\n"
    "day28 ::= \"0\" [1-9] | \"1\" [0-9] | \"2\" [0-8]\n"
    "day30 ::= day28 | \"29\" | \"30\"\n"
    "day31 ::= day30 | \"31\"\n"
    "time ::= hour \":\" [0-5] [0-9] \":\" [0-5] [0-9] (\".\" [0-9]{1,9})? "
    "(\"Z\" | [+-] hour \":\" [0-5] [0-9])\n"
    "hour ::= [01] [0-9] | \"2\" [0-3]\n"
    "date-time ::= date \"T\" time\n"
    "uuid ::= hex{8} \"-\" hex{4} \"-\" hex{4} \"-\" hex{4} \"-\" hex{12}\n"
    "hex ::= [0-9a-fA-F]\n"
    "ipv4 ::= byte (\".\" byte){3}\n"
    "byte ::= [1-9]? [0-9] | \"1\" [0-9]{2} | \"2\" [0-4] [0-9] | \"25\" [0-5]\n"
    "label ::= [a-zA-Z0-9] ([a-zA-Z0-9] | \"-\" [a-zA-Z0-9]){0,30}\n"
    "hostname ::= label (\".\" label){0,3}\n"
    "email ::= atom (\".\" atom){0,3} \"@\" label (\".\" label){1,3}\n"
    "atom ::= [a-zA-Z0-9_+-]{1,20}\n"
    "uri ::= [a-zA-Z] [a-zA-Z0-9+.-]{0,15} \":\" (\"//\" ((hostname | ipv4) (\":\" "
    "[0-9]{1,5})?)? | pchar+) (\"/\" pchar*)* (\"?\" (pchar | [/?])*)? (\"#\" (pchar | [/?])*)?\n"
    "pchar ::= [a-zA-Z0-9._~!$&'()*+,;=:@-] | \"%\" hex hex\n";
static const char FORMATS[] = " date time date-time uuid ipv4 hostname email uri ";
static const char OTHER_FORMATS[] = " duration ipv6 idn-email idn-hostname uri-reference iri "
    "iri-reference uri-template json-pointer relative-json-pointer regex ";

/* The keywords that are known.  A PART is not met: part_of() and gather_keys() look it up. */
static const struct {
    const char *words, *what; /* what their value must be */
    unsigned kinds, types; /* kinds of that value, types of the values that they constrain */
    enum { REMARK, PART, TYPE, VALUES, BOUND, PATTERN, FORMAT, ON_KEYS, REFERS, MEETS, WAYS } use;
    json_kind kind; /* BOUND: the kind of value that it bounds */
} KEYWORDS[] = {
    {" properties ", "an object", OBJECT, OBJECT, PART, JSON_NULL},
    {" patternProperties ", "an object", OBJECT, OBJECT, ON_KEYS, JSON_NULL},
    {" additionalProperties ", "a schema", A_SCHEMA, OBJECT, PART, JSON_NULL},
    {" required ", "a list", ARRAY, OBJECT, PART, JSON_NULL},
    {" minProperties maxProperties ", "a number", A_NUMBER, OBJECT, BOUND, JSON_OBJECT},
    {" prefixItems ", "a list", ARRAY, ARRAY, PART, JSON_NULL},
    {" items ", "a schema", A_SCHEMA, ARRAY, PART, JSON_NULL},
    {" minItems maxItems ", "a number", A_NUMBER, ARRAY, BOUND, JSON_ARRAY},
    {" minimum maximum exclusiveMinimum exclusiveMaximum ", "a number", A_NUMBER, NUMBER, BOUND,
     JSON_NUMBER},
    {" minLength maxLength ", "a number", A_NUMBER, STRING, BOUND, JSON_STRING},
    {" pattern ", "a text", STRING, STRING, PATTERN, JSON_NULL},
    {" format ", "a text", STRING, STRING, FORMAT, JSON_NULL},
    {" type ", "a text or a list", STRING | ARRAY, 0, TYPE, JSON_NULL},
    {" enum ", "a list", ARRAY, 0, VALUES, JSON_NULL},
    {" const ", "no array or object", ALL_TYPES - ARRAY - OBJECT, 0, VALUES, JSON_NULL},
    {" $ref ", "a text", STRING, 0, REFERS, JSON_NULL},
    {" allOf ", "a list", ARRAY, 0, MEETS, JSON_NULL},
    {" anyOf oneOf ", "a list", ARRAY, 0, WAYS, JSON_NULL},
    {" uniqueItems ", "false", 1 << JSON_FALSE, 0, REMARK, JSON_NULL},
    {" $defs definitions additionalItems title description default example examples deprecated "
     "readOnly writeOnly links $comment $schema $id id $anchor $vocabulary contentEncoding "
     "contentMediaType contentSchema ", "anything", ALL_TYPES, 0, REMARK, JSON_NULL},
};
enum { N_KEYWORDS = sizeof KEYWORDS / sizeof *KEYWORDS };

/* Refuses a node, with its JSON pointer. */
PRINTF_LIKE(3, 4) static void refuse_node(schema *s, const json_node *node, const char *format, ...)
{
    char what[160], at[200] = "#";
    const json_node *in = s->root, *child;
    va_list arguments;
    if (s->failed)
        return;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    for (size_t used = 1; in < node && used < sizeof at - 1; used = strlen(at)) {
        size_t k = 0; /* of the child that holds the node */
        int is_key = in->kind == JSON_OBJECT;
        for (child = in + 1; json_next(s->j, child + is_key) <= node; k++)
            child = json_next(s->j, child + is_key);
        if (is_key)
            snprintf(at + used, sizeof at - used, "/%s", s->j->text + child->start);
        else
            snprintf(at + used, sizeof at - used, "/%zu", k);
        in = child + is_key;
    }
    snprintf(s->err, s->size, "%s: %s", at, what);
    for (char *c = s->err; *c; c++) /* keys may hold anything */
        *c = (unsigned char)*c < ' ' ? '?' : *c;
    s->failed = 1;
}

static int same_string(const schema *s, const json_node *a, const json_node *b)
{
    return json_equal(s->j, a, s->j->text + b->start, b->end - b->start);
}

/* The element behind `last`, or with NULL the first.  NULL at the end, or without a list.  The
 * elements of an object are its keys.  Any other value is a list of itself. */
static const json_node *next_of(const schema *s, const json_node *list, const json_node *last)
{
    if (!list)
        return NULL;
    const json_node *next = last ? json_next(s->j, last + (list->kind == JSON_OBJECT))
                                 : list + (list->kind >= JSON_ARRAY);
    return next < json_next(s->j, list) ? next : NULL;
}

/* Adds a schema, or a list of ways, to those of a view. */
static void view_add(schema *s, view *v, const json_node *node, int is_list)
{
    if (!is_list && !(1u << node->kind & A_SCHEMA))
        refuse_node(s, node, "a schema is an object, true or false");
    else if (v->n == MOST_SCHEMAS)
        refuse_node(s, node, "it leads back to itself, or more than %d schemas meet here",
                    MOST_SCHEMAS);
    else
        v->at[v->n++] = node;
}

/* Counts steps, of which 128 comparisons make one, and refuses a schema that takes too much. */
static void take_steps(schema *s, size_t n)
{
    s->n_steps += n;
    if (s->n_steps > MOST_STEPS || s->rules.n > MOST_RULES || s->out.memory->n > MOST_GBNF)
        refuse_node(s, s->root, "it takes more than %d steps, %d rules or %d bytes of a grammar",
                    MOST_STEPS, MOST_RULES, MOST_GBNF);
}

/* Writes the name of the rule of a view, and asks for the rule. */
static void put_rule(schema *s, const view *v)
{
    size_t i = 0;
    const view *asked = s->rules.items;
    take_steps(s, 1);
    while (i < s->rules.n && (asked[i].n != v->n || asked[i].types != v->types ||
                              asked[i].at[0] != v->at[0] ||
                              memcmp(asked[i].at, v->at, v->n * sizeof *v->at)))
        i++; /* the rest of a view follows from its schemas and types */
    view *more = i < s->rules.n || s->failed ? NULL : extend(&s->rules, 1, sizeof *more);
    if (more)
        *more = *v;
    s->failed |= i == s->rules.n; /* no memory */
    put_format(&s->out, "s%zu ", i);
}

/* Writes a value that holds no others as replies spell it. */
static void put_value(schema *s, const json_node *node)
{
    array spelled = {0};
    output out = {.memory = &spelled};
    if (node->kind == JSON_STRING)
        put_quoted(&out, s->j->text + node->start, node->end - node->start);
    else
        put_bytes(&out, s->j->text + node->start, node->end - node->start);
    put_literal(&s->out, spelled.items, spelled.n);
    s->failed |= out.error != 0;
    free(spelled.items);
}

/* Writes how often the last item may stand: MOST_TIMES at most, even if more is allowed. */
static void put_times(schema *s, double least, double most)
{
    put_format(&s->out, "{%.0f,", least > 0 ? ceil(least) : 0);
    if (most < INFINITY)
        put_format(&s->out, "%.0f", fmin(floor(most), MOST_TIMES));
    put_format(&s->out, "} ");
}

/* Writes low..high, with 0 <= low, as runs: digits that are fixed, a range of one digit, any
 * digits, and the tail behind them. */
static void put_digits(schema *s, int64_t low, int64_t high, const char *sign, const char *tail)
{
    while (low <= high) {
        int64_t unit = 1;
        int n_any = 0;
        for (; low && low % (unit * 10) == 0 && low + unit * 10 - 1 <= high; n_any++)
            unit *= 10;
        int64_t digit = low / unit % 10, most = digit + (high + 1 - low) / unit - 1;
        put_format(&s->out, "| \"%s", sign);
        if (low / unit >= 10)
            put_format(&s->out, "%" PRId64, low / unit / 10);
        put_format(&s->out, "\" [%d-%d] [0-9]{%d} %s", (int)digit, most < 9 ? (int)most : 9, n_any,
                   tail);
        low += ((most < 9 ? most : 9) - digit + 1) * unit;
    }
}

/* Writes the numbers of at most 15 digits between the bounds, first those without a sign. */
static void put_number(schema *s, const view *v, int is_integer)
{
    static const double most = 999999999999999;
    double low = fmax(v->low[JSON_NUMBER], -most), high = fmin(v->high[JSON_NUMBER], most);
    if (is_integer)
        low = ceil(low), high = floor(high);
    if (low > high)
        refuse_node(s, v->at[0], "no number of at most 15 digits lies between its bounds");
    if (low > nextafter(floor(low), INFINITY) || high < nextafter(ceil(high), -INFINITY))
        refuse_node(s, v->at[0], "the bounds of a number must be whole, and of at most 15 digits");
    put_format(&s->out, "(never ");
    for (int minus = 0; minus < 2; minus++) { /* 1e-9: above 0, for -0 is not written */
        const char *sign = minus ? "-" : "";
        double from = fmax(minus ? -high : low, minus ? 1e-9 : 0), to = minus ? -low : high;
        if (from > to)
            continue;
        if (!is_integer && from < ceil(from)) /* exclusive: only with a fraction */
            put_format(&s->out, "| \"%s%.0f.\" [0-9]{0,15} [1-9] ", sign, floor(from));
        if (!is_integer && to == floor(to)) /* inclusive: only without one */
            put_format(&s->out, "| \"%s%.0f\" ", sign, to--);
        put_digits(s, (int64_t)ceil(from), (int64_t)floor(to), sign,
                   is_integer ? "" : "fraction? ");
    }
    put_format(&s->out, ") ");
}

/* ---- "pattern": a regular expression over the characters of a JSON string, read from left to
 * right and written as GBNF.  It may have printable ASCII, classes, ., |, groups, repetition,
 * \d \w \s \S (of ASCII), and ^ and $ at its ends. ---- */

/* Writes a character, \d or the like, or a class in brackets.  Returns 0 if it is not known.  No
 * class has the quote or the backslash, which JSON writes with two characters. */
static int put_pattern_item(schema *s, const char **at)
{
    static const char letters[] = "dwsS";
    static const char *const sets[] = {"0-9", "a-zA-Z0-9_", " ", "!#-\\x5B\\x5D-~"};
    int brackets = **at == '[', negated = brackets && (*at)[1] == '^', n_sets = 0, n = negated;
    *at += brackets + negated;
    put_format(&s->out, negated ? "[^\"\\\\\\x00-\\x1F" : "[");
    do {
        int escaped = **at == '\\', low = (unsigned char)(*at)[escaped], high = low;
        const char *letter = escaped && isalpha(low) ? strchr(letters, low) : NULL;
        *at += escaped + 1;
        if (brackets && !letter && **at == '-' && (*at)[1] != ']') {
            high = (*at)[1] == '\\' ? 0 : (unsigned char)(*at)[1];
            *at += 2;
        }
        if (low < ' ' || high < low || high > '~' || (escaped && isalnum(low) && !letter) ||
            (brackets && !escaped && low == ']'))
            return 0;
        n_sets += letter != NULL;
        put_format(&s->out, "%s", letter ? sets[letter - letters] : "");
        for (int c = low; c <= high && !letter; c++)
            if (c != '"' && c != '\\')
                put_format(&s->out, "\\x%02X", (unsigned)c), n++;
    } while (brackets && **at != ']');
    *at += brackets;
    /* beyond ASCII \s may take more, so [^\s] takes only ASCII */
    put_format(&s->out, negated && n_sets ? "\\x7F-\\U0010FFFF] " : "] ");
    return n + n_sets;
}

/* Bytes of *, +, ? or {m,n}, which GBNF writes alike.  Returns 0 if it is not known. */
static size_t repetition(const char *at)
{
    const char *digits = "0123456789", *end = at + 1 + strspn(at + 1, digits);
    long least = strtol(at + 1, NULL, 10), most = least;
    if (*at != '{')
        return 1;
    if (*end == ',') {
        most = isdigit((unsigned char)end[1]) ? strtol(end + 1, NULL, 10) : least;
        end += 1 + strspn(end + 1, digits);
    }
    return isdigit((unsigned char)at[1]) && *end == '}' && least <= most && most <= MOST_TIMES
               ? (size_t)(end + 1 - at) : 0;
}

/* Writes the strings that the pattern is found in. */
static void put_pattern(schema *s, const json_node *node)
{
    const char *text = s->j->text + node->start, *at = text;
    char c = '|', last; /* 'x' stands for a character or a class */
    int depth = 0, known = strlen(text) == node->end - node->start;
    put_format(&s->out, "\"\\\"\" (");
    while (known && c) {
        last = c, c = *at++;
        if (last == '|' || last == '(')
            put_format(&s->out, depth || c == '^' ? "\"\" " : "char* ");
        if (c == '^') {
            known = last == '|' && !depth;
        } else if (c == '$') {
            known = !depth && (*at == '\0' || *at == '|');
        } else if (c == '|' || c == '\0') {
            known = c || !depth;
            put_format(&s->out, "%s%s", depth || last == '$' ? "" : "char* ", c ? "| " : "");
        } else if (c == '(') {
            known = ++depth < 100 && (*at != '?' || at[1] == ':');
            at += *at == '?' ? 2 : 0;
            put_format(&s->out, "(");
        } else if (c == ')') {
            known = depth-- > 0;
            put_format(&s->out, ") ");
        } else if (strchr("*+?{", c)) {
            size_t n = last == 'x' || last == ')' ? repetition(at - 1) : 0;
            known = n > 0;
            put_format(&s->out, "%.*s ", (int)n, at - 1);
            at += n ? n - 1 + (at[n - 1] == '?') : 0; /* lazy is the same language */
        } else if (c == '.') {
            put_format(&s->out, "dot ");
            c = 'x';
        } else {
            at--;
            known = put_pattern_item(s, &at) != 0;
            c = 'x';
        }
    }
    if (!known)
        refuse_node(s, node, "'pattern' has something unknown just before byte %d",
                    (int)(at - text));
    put_format(&s->out, ") \"\\\"\" ");
}

static void put_string(schema *s, const view *v)
{
    if (v->text && (v->clash || v->low[JSON_STRING] > 0 || v->high[JSON_STRING] < INFINITY))
        refuse_node(s, v->text, "two of 'pattern', 'format' and a length do not go together");
    if (v->text && json_is(s->j, v->text - 1, "pattern")) {
        put_pattern(s, v->text);
        return;
    }
    put_format(&s->out, "\"\\\"\" %s", v->text ? s->j->text + v->text->start : "char");
    if (!v->text)
        put_times(s, v->low[JSON_STRING], v->high[JSON_STRING]);
    put_format(&s->out, " \"\\\"\" ");
}

/* ---- arrays and objects ---- */

/* What the schemas say of element i of an array, or of the value of a key of an object.  The name
 * is NULL for all keys that no schema names. */
static view part_of(schema *s, const view *v, const json_node *name, size_t i)
{
    int is_array = v->types == ARRAY;
    view part = EVERYTHING;
    for (size_t k = 0; k < v->n; k++) {
        const json_node *value = NULL, *list = json_get(s->j, v->at[k], is_array ? "prefixItems" :
                                                name ? "properties" : "patternProperties");
        if (name && list && list < name && name < json_next(s->j, list))
            value = name + 1;
        else if (name && list)
            value = json_find(s->j, list, s->j->text + name->start, name->end - name->start);
        else if (list && list->n > i)
            for (size_t m = 0; m <= i; m++)
                value = next_of(s, list, value);
        if (value && !is_array && !name)
            value++; /* behind its pattern */
        if (!value && !(name && v->keys)) /* a probe's name may fit the pattern */
            value = json_get(s->j, v->at[k], is_array ? "items" : "additionalProperties");
        for (size_t m = 0; m < part.n; m++) /* no schema twice, or recursion would not end */
            value = part.at[m] == value ? NULL : value;
        if (value)
            view_add(s, &part, value, 0);
    }
    return part;
}

/* Writes element i, or a key and its value. */
static void put_part(schema *s, const view *v, const json_node *name, size_t i)
{
    view part = part_of(s, v, name, i);
    if (name)
        put_value(s, name);
    else if (v->types == OBJECT && v->keys)
        put_pattern(s, v->keys);
    else if (v->types == OBJECT)
        put_format(&s->out, "string ");
    put_format(&s->out, v->types == OBJECT ? "colon " : "");
    put_rule(s, &part);
}

typedef struct {
    const json_node *name;
    int must;
} property;

/* Notes the keys that the schemas name, each once, and which of them an object must have. */
static void gather_keys(schema *s, const view *v, array *keys)
{
    for (size_t i = 0; i < 2 * v->n; i++) { /* all "properties", then all "required" */
        int must = i >= v->n;
        size_t n_before = keys->n; /* the keys of an object differ */
        const json_node *name = NULL, *list = json_get(s->j, v->at[i % v->n],
                                                       must ? "required" : "properties");
        while ((name = next_of(s, list, name)) != NULL && !s->failed) {
            property *key = keys->items;
            size_t k = 0, n = must ? keys->n : n_before;
            if (name->kind != JSON_STRING)
                refuse_node(s, list, "'required' must be a list of keys");
            while (k < n && !same_string(s, name, key[k].name))
                k++;
            take_steps(s, 1 + k / 128);
            key = k < n ? key + k : extend(keys, 1, sizeof *key);
            s->failed |= !key;
            if (key)
                *key = (property){k < n ? key->name : name, must};
        }
    }
}

/* Writes the rules of an array or an object: sID-i is part i and all that follow, the last one all
 * other parts.  Key a may stand before b: s1-0 ::= never | "a" colon s2 (comma s1-1) | s1-1. */
static void put_sequence(schema *s, const view *v, size_t id)
{
    int is_array = v->types == ARRAY;
    json_kind whole = is_array ? JSON_ARRAY : JSON_OBJECT;
    double least = v->low[whole], most = v->high[whole];
    double need = is_array ? least : 0; /* the place behind the last part that must be there */
    array found = {0};
    if (!is_array)
        gather_keys(s, v, &found);
    const property *keys = found.items;
    size_t n = found.n;
    double certain = 1; /* keys that differ; others might stand twice */
    for (size_t i = 0, n_must = 0; i < n; i++)
        if (keys[i].must)
            need = (double)i + 1, certain = (double)++n_must;
    if ((n && (v->keys || (double)n > most)) || (!is_array && least > certain))
        refuse_node(s, v->keys ? v->keys - 1 : v->at[0], least > certain ?
                    "'minProperties' may be at most 1, or the number of keys in 'required'" :
                    "named keys do not go with 'patternProperties' or smaller 'maxProperties'");
    for (size_t i = 0; i < v->n && is_array; i++) {
        const json_node *list = json_get(s->j, v->at[i], "prefixItems");
        n = list && list->n > n ? list->n : n;
    }
    put_format(&s->out, "| \"%c\" (s%zu-0 %s) \"%c\"", is_array ? '[' : '{', id,
               need > 0 || least > 0 ? "" : "| \"\"", is_array ? ']' : '}');
    for (size_t i = 0; i <= n && !s->failed; i++) {
        put_format(&s->out, "\ns%zu-%zu ::= never ", id, i);
        if ((double)i >= floor(most) || (i == n && found.n))
            break;
        put_format(&s->out, "| ");
        put_part(s, v, i < found.n ? keys[i].name : NULL, i);
        put_format(&s->out, "(comma ");
        if (i < n) {
            put_format(&s->out, "s%zu-%zu %s) ", id, i + 1, (double)i + 1 < need ? "" : "| \"\"");
        } else {
            put_part(s, v, NULL, n);
            put_format(&s->out, ")");
            put_times(s, least - (double)n - 1, most - (double)n - 1);
        }
        if (i < found.n && !keys[i].must)
            put_format(&s->out, "| s%zu-%zu", id, i + 1);
    }
    free(found.items);
}

/* ---- a rule: its types, listed values and ways ---- */

static unsigned type_of_value(const schema *s, const json_node *value)
{
    double x = value->kind == JSON_NUMBER ? strtod(s->j->text + value->start, NULL) : 0.5;
    return x == floor(x) ? INTEGER : 1u << value->kind;
}

static int same_value(const schema *s, const json_node *a, const json_node *b)
{
    const char *left = s->j->text + a->start, *right = s->j->text + b->start;
    if (a->kind == JSON_NUMBER && b->kind == JSON_NUMBER) /* a double keeps 15 digits apart */
        return (a->end - a->start <= 15 && b->end - b->start <= 15) ?
               strtod(left, NULL) == strtod(right, NULL) : strcmp(left, right) == 0;
    return a->kind == b->kind && (a->kind != JSON_STRING || same_string(s, a, b));
}

/* Whether every enum and const of the view has this value of the first. */
static int in_lists(schema *s, const view *v, const json_node *value)
{
    for (size_t i = 0; i < 2 * v->n; i++) {
        const json_node *list = json_get(s->j, v->at[i / 2], i % 2 ? "const" : "enum"), *each;
        each = list == v->list ? NULL : next_of(s, list, NULL);
        take_steps(s, each ? list->n / 128 : 0);
        while (each && !same_value(s, each, value))
            each = next_of(s, list, each);
        if (list && list != v->list && !each)
            return 0;
    }
    return 1;
}

/* Writes the listed values that meet the view, for a probe none.  Returns how many there are. */
static int put_values(schema *s, const view *v, int probe)
{
    const json_node *each = NULL;
    int n = 0;
    while ((each = next_of(s, v->list, each)) != NULL)
        if (type_of_value(s, each) & v->types && in_lists(s, v, each)) {
            n++;
            if (!probe && type_of_value(s, each) & v->spoken)
                refuse_node(s, each, "no keyword but 'type' may constrain this listed value");
            put_format(&s->out, probe ? "" : "| ");
            if (!probe)
                put_value(s, each);
        }
    return n;
}

/* What "$ref" points to: # and the keys on the way from the root. */
static const json_node *referred(schema *s, const json_node *ref)
{
    const char *at = s->j->text + ref->start;
    const json_node *node = *at++ == '#' ? s->root : NULL;
    while (node && *at == '/') {
        size_t n = strcspn(++at, "/~%");
        node = json_find(s->j, node, at, n);
        at += n;
    }
    if (!node || at != s->j->text + ref->end)
        refuse_node(s, ref, "this $ref leads to nothing: it is # and keys, like #/$defs/NAME");
    return node ? node : s->root;
}

/* Reads what a keyword, row `row` of KEYWORDS, says into the view. */
static void meet_keyword(schema *s, view *v, const json_node *key, size_t row)
{
    const json_node *value = key + 1, *each = NULL;
    const char *name = s->j->text + key->start, *text = s->j->text + value->start;
    double x = strtod(text, NULL) + 0.0; /* -0 is 0 */
    double *low = v->low + KEYWORDS[row].kind, *high = v->high + KEYWORDS[row].kind;
    unsigned bits = 0;
    size_t i;
    v->spoken |= KEYWORDS[row].types;
    switch (KEYWORDS[row].use) {
    case TYPE:
        while ((each = next_of(s, value, each)) != NULL) {
            for (i = 0; i < N_TYPES && !json_is(s->j, each, TYPES[i].name);)
                i++;
            if (i < N_TYPES)
                bits |= TYPES[i].bits;
            else
                refuse_node(s, value, "'type' must be one, or a list, of string, integer, "
                            "number, boolean, null, array, object");
        }
        v->types &= bits;
        break;
    case VALUES:
        take_steps(s, value->n / 8);
        while ((each = next_of(s, value, each)) != NULL)
            bits |= type_of_value(s, each);
        if (bits & (ARRAY | OBJECT))
            refuse_node(s, value, "a listed value must not be an array or object");
        v->types &= bits;
        v->list = v->list ? v->list : value;
        break;
    case BOUND: /* exclusive: up to the double next to it */
        if (strstr(name, "ax")) /* max..., exclusiveMax... */
            *high = fmin(*high, *name == 'e' ? nextafter(x, -INFINITY) : x);
        else
            *low = fmax(*low, *name == 'e' ? nextafter(x, INFINITY) : x);
        break;
    case FORMAT:
        if (in_words(OTHER_FORMATS, text))
            refuse_node(s, value, "only the formats%sare known", FORMATS);
        if (!in_words(FORMATS, text)) /* an invented format says nothing */
            break;
        /* fall through */
    case PATTERN:
        v->clash |= v->text && (!same_string(s, v->text, value) ||
                                !same_string(s, v->text - 1, key));
        v->text = value;
        break;
    case ON_KEYS:
        if (value->n && (v->keys || value->n > 1))
            refuse_node(s, value, "'patternProperties' may have only one pattern");
        v->keys = value->n ? value + 1 : v->keys;
        break;
    case MEETS:
        while ((each = next_of(s, value, each)) != NULL && !s->failed)
            view_add(s, v, each, 0);
        break;
    case REFERS: view_add(s, v, referred(s, value), 0); break;
    case WAYS: view_add(s, v, value, 1); break;
    case PART: case REMARK: break;
    }
}

/* Reads what a schema says into the view.  Keywords that begin with x- or _ are remarks. */
static void meet(schema *s, view *v, const json_node *node)
{
    const json_node *key = NULL;
    v->types = node->kind == JSON_FALSE ? 0 : v->types;
    while (node->kind == JSON_OBJECT && (key = next_of(s, node, key)) != NULL && !s->failed) {
        const char *name = s->j->text + key->start;
        take_steps(s, 1);
        size_t row = strlen(name) == key->end - key->start ? 0 : N_KEYWORDS;
        while (row < N_KEYWORDS && !in_words(KEYWORDS[row].words, name))
            row++;
        if (row == N_KEYWORDS && *name != '_' && strncmp(name, "x-", 2) != 0)
            refuse_node(s, key + 1, "the keyword '%s' is not known", name);
        else if (row < N_KEYWORDS && !(KEYWORDS[row].kinds >> key[1].kind & 1))
            refuse_node(s, key + 1, "'%s' must be %s", name, KEYWORDS[row].what);
        else if (row < N_KEYWORDS)
            meet_keyword(s, v, key, row);
    }
}

/* Writes the values of the types that schemas name.  If they name none, it writes fewer than they
 * allow: those of the last type in TYPES that their keywords constrain. */
static void put_types(schema *s, const view *v)
{
    view one = *v;
    unsigned types = v->types;
    for (size_t i = N_TYPES; i-- > 0 && types == ALL_TYPES;)
        types = v->spoken & TYPES[i].bits ? TYPES[i].bits : types;
    for (size_t i = 0; i < N_TYPES; i++) {
        unsigned bits = TYPES[i].bits;
        if ((bits & types) != bits || (bits == INTEGER && types & FRACTION))
            continue;
        double low = v->low[TYPES[i].kind], high = v->high[TYPES[i].kind];
        if (!(bits & NUMBER) && (low > MOST_TIMES || ceil(low) > floor(high)))
            refuse_node(s, v->at[0], "no %s of a size up to %d lies between its bounds",
                        TYPES[i].name, MOST_TIMES);
        one.types = bits;
        put_format(&s->out, "| ");
        if (bits & (ARRAY | OBJECT))
            put_rule(s, &one);
        else if (!(v->spoken & bits))
            put_format(&s->out, "%s ", TYPES[i].name);
        else if (bits == STRING)
            put_string(s, v);
        else
            put_number(s, v, bits == INTEGER);
    }
}

/* Writes each way to meet the schemas from number i on: those before have been met.  Returns
 * whether there may be one.  A probe writes nothing and looks only at types, listed values and the
 * keys that an object must have, down to probe - 1 objects deep. */
static int put_ways(schema *s, const view *from, size_t i, int probe)
{
    view v = *from;
    take_steps(s, 1);
    if (s->depth++ == MOST_DEPTH)
        refuse_node(s, v.at[0], "lists of ways are nested more than %d deep here", MOST_DEPTH);
    while (i < v.n && v.types && !s->failed && v.at[i]->kind != JSON_ARRAY)
        meet(s, &v, v.at[i++]);
    int met = v.types && !s->failed;
    if (met && i == v.n) {
        const json_node *name = NULL;
        met = !v.list || put_values(s, &v, probe);
        if (!v.list && !probe)
            put_types(s, &v);
        for (i = 0; i < v.n && v.types == OBJECT && probe > 1; i++)
            while (met && (name = next_of(s, json_get(s->j, v.at[i], "required"), name)) != NULL) {
                view part = part_of(s, &v, name, 0);
                met = put_ways(s, &part, 0, probe - 1);
            }
    } else if (met) {
        const json_node *list = v.at[i], *way = NULL, *other;
        int exclusive = !probe && json_is(s->j, list - 1, "oneOf");
        for (met = 0; (way = next_of(s, list, way)) != NULL && !s->failed;) {
            view next = v; /* the way takes the place of its list */
            view_add(s, &next, way, 0);
            next.at[i] = next.at[--next.n];
            for (other = NULL; exclusive && (other = next_of(s, list, other)) != way;) {
                view both = next;
                view_add(s, &both, other, 0);
                if (put_ways(s, &both, i, 3)) /* sees a tag in a tag */
                    refuse_node(s, way, "a value may fit this way of 'oneOf' and an earlier one: "
                                "take 'anyOf'");
            }
            met |= put_ways(s, &next, i, probe);
        }
    }
    s->depth--;
    return met;
}

/* Writes the grammar of a schema, which is a value in j; returns 0 with a sentence in err. */
static int add_schema(array *gbnf, const json *j, const json_node *root, int spaced, char *err,
                      size_t size)
{
    schema s = {.j = j, .root = root, .out = {.memory = gbnf}, .err = err, .size = size};
    view v = EVERYTHING;
    snprintf(err, size, "out of memory for the schema");
    put_format(&s.out, spaced ? "comma ::= \", \"\ncolon ::= \": \"\nroot ::= "
                              : "comma ::= \",\"\ncolon ::= \":\"\nroot ::= ");
    view_add(&s, &v, root, 0);
    put_rule(&s, &v);
    for (size_t i = 0; !s.failed && i < s.rules.n; i++) {
        v = ((const view *)s.rules.items)[i];
        put_format(&s.out, "\ns%zu ::= never ", i);
        if (v.types == ALL_TYPES) /* to be met */
            put_ways(&s, &v, 0, 0);
        else
            put_sequence(&s, &v, i);
    }
    put_format(&s.out, "\n%s", SCHEMA_RULES);
    free(s.rules.items);
    return !s.failed && !s.out.error;
}

/* The same of a schema that is still text. */
static int read_schema(array *gbnf, const char *text, size_t n, int spaced, char *err, size_t size)
{
    json j;
    size_t line = 1, column = 1;
    int ok = json_read(&j, text, n) && add_schema(gbnf, &j, j.nodes.items, spaced, err, size);
    for (size_t i = 0; j.why && i < j.at; i++) {
        column = text[i] == '\n' ? 1 : column + ((text[i] & 0xC0) != 0x80); /* characters */
        line += text[i] == '\n';
    }
    if (j.why)
        snprintf(err, size, "line %zu, column %zu: %s", line, column, j.why);
    json_free(&j);
    return ok;
}

/* Why a reply ended. */
typedef enum {
    RUNNING, AT_STOP, AT_STOP_STRING, AT_LENGTH, AT_CONTEXT, AT_INTERRUPT
} finish_reason;
static const char *const FINISH_REASONS[] = {
    "", "stop", "stop_string", "length", "context", "interrupted"
};

typedef struct {
    array text;       /* char: all of it, up to a stop string */
    array logprobs;   /* float: one an id, under --json */
    array tops;       /* gemma2_candidate: n_top or all of the vocabulary an id */
    array choices;    /* double: their probabilities, under --json */
    array ends;       /* size_t: bytes of text after each id */
    size_t shown;     /* bytes of text that no stop string can take back */
    gemma2_utf8 hold; /* bytes of a character still incomplete */
    size_t n_ids;     /* the last n_ids of program.ids are the reply */
    finish_reason finish;
    double prefill_s, decode_s;
    size_t prefill_tokens;
    size_t decode_passes; /* n_ids less one, most times: the prompt's logits give the first */
} reply;

/* The line editor: the message that is typed, and what the terminal shows of it. */
typedef struct {
    array text, screen;     /* char: the message; what the terminal is to be sent */
    output out;             /* to the screen */
    array history, drafts;  /* char: messages, a NUL behind each; changed, the new one last */
    size_t recalled;        /* where in the drafts the message that is shown begins */
    size_t oldest;          /* where the first message begins */
    size_t aim;             /* the column that Up and Down aim at, and 1; 0: where the cursor is */
    size_t at;              /* the cursor, in bytes of the text */
    size_t width, height;   /* columns and rows of the terminal */
    size_t row, top;        /* of the text: where the cursor is shown, the first that is visible */
    char sequence[16], typed[4096]; /* of a key so far; read but not taken yet */
    size_t n_sequence, i, n;
    int raw;                /* the terminal neither shows nor edits what is typed */
    int in_paste, marks_pastes; /* behind ESC [ 200 ~; the terminal sends such marks */
    int after_return, ended; /* behind a CR; nothing comes after this message */
    int cut;                 /* the terminal may have lost the end of a line */
    int ahead;               /* this was typed before the prompt: a line each, no paste */
} editor;

/* Where a turn and the reply to it begin in program.ids. */
typedef struct {
    size_t start, reply;
} exchange;

/* A turn by example: its first ids, before a user's text, and those from `behind` on. */
typedef struct {
    array ids; /* int32_t */
    size_t before, behind;
} frame;

/* One run of the program. */
typedef struct {
    const options *opts;
    output out;
    gemma2_model *model;
    const gemma2_config *config;
    gemma2_session *session;
    gemma2_ahead *ahead; /* or NULL: no guesses */
    gemma2_model *draft_model;
    gemma2_session *draft;
    float *logits; /* [V] after the last token of the session */
    gemma2_sampler sampler;
    constraint constraint;
    uint64_t seed;
    int32_t end_of_reply; /* the mark of the chat template, or -1 */
    double load_s;
    array prompt; /* char: its bytes */
    array echo;   /* char: what --echo puts before the reply */
    array ids;    /* int32_t: all said so far; the session holds the first of them */
    reply reply;
    editor editor;
    options *settings; /* opts, for /set and /system */
    array turns;       /* exchange */
    frame first, later; /* of the first turn, with the system text, and of all others */
    array attached;    /* char: what goes before the next message */
    char *system;      /* the text of /system */
    int first_stays;   /* the first turn was loaded, and may hold a system text */
    const char *rest;  /* what stands behind a command */
    int stats, leaves;
    int asked;         /* since the last message: whether to leave what cannot be saved */
    int shows_progress, progress_shown;
    int silent; /* a line of a batch: the reply's text is kept, not shown */
} program;

/* Columns for what is overwritten: less than a row. */
static int progress_width(void)
{
    size_t width = 80, height = 24;
    terminal_size(&width, &height);
    return width > 71 ? 71 : (int)width - 1;
}

/* A line that the next one overwrites; only for people who look at it. */
PRINTF_LIKE(2, 3) static void show_progress(program *p, const char *format, ...)
{
    char line[72];
    va_list arguments;
    if (!p->shows_progress)
        return;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    fprintf(stderr, "\r%-*.*s", progress_width(), progress_width(), line);
    fflush(stderr);
    p->progress_shown = 1;
}

static void clear_progress(program *p)
{
    if (p->progress_shown)
        fprintf(stderr, "\r%*s\r", progress_width(), "");
    p->progress_shown = 0;
}

enum { LONGEST_TEXT = 1 << 28 }; /* bytes that gemma2_encode takes */

/* Appends all of a file to bytes; one that never ends is not read to the end of memory. */
static int read_file(FILE *file, const char *name, uint64_t most, array *bytes)
{
    enum { PIECE = 1 << 16 };
    while (bytes->n <= most) {
        char *end = extend(bytes, PIECE, 1);
        if (!end)
            return out_of_memory();
        size_t got = fread(end, 1, PIECE, file);
        bytes->n -= PIECE - got;
        if (got < PIECE)
            break;
    }
    if (ferror(file))
        return fail(FAILED, "cannot read %s: %s", name, strerror(errno));
    if (bytes->n > most)
        return fail(FAILED, "%s is too long: more than %" PRIu64 " bytes%s", name, most,
                    most == LONGEST_TEXT ? "" : "; for a longer session raise --context");
    return DONE;
}

static int read_path(const char *path, array *bytes)
{
    if (!path || strcmp(path, "-") == 0)
        return read_file(stdin, "standard input", LONGEST_TEXT, bytes);
    FILE *file = open_path(path, "rb");
    if (!file)
        return fail(FAILED, "cannot open %s: %s", path, strerror(errno));
    int status = read_file(file, path, LONGEST_TEXT, bytes);
    fclose(file);
    return status;
}

static int push_ids(program *p, const int32_t *ids, size_t n)
{
    int32_t *end = extend(&p->ids, n, sizeof *end);
    if (!end)
        return out_of_memory();
    if (n)
        memcpy(end, ids, n * sizeof *end);
    return DONE;
}

static int push_id(program *p, int32_t id) { return push_ids(p, &id, 1); }

/* Appends the ids of a text, or of a chat's messages. */
static int push_encoded(program *p, const gemma2_message *text, size_t n_messages, unsigned flags)
{
    size_t size = (size_t)text[n_messages ? n_messages - 1 : 0].size, room = size / 2 + 64;
    size_t held = p->ids.n, scratch_bytes = n_messages
        ? gemma2_chat_scratch(p->model, text, n_messages) : gemma2_encode_scratch(size);
    if (scratch_bytes == 0)
        return fail(FAILED, "a text of %zu bytes is too long", size);
    void *scratch = malloc(scratch_bytes);
    if (!scratch)
        return out_of_memory();
    int64_t n = (int64_t)room; /* a guess; the second round is never short */
    int32_t *ids;
    do {
        p->ids.n = held;
        room = (size_t)n;
        ids = extend(&p->ids, room, sizeof *ids);
        if (!ids)
            break;
        n = n_messages ? gemma2_encode_chat(p->model, text, n_messages, flags, ids, room, scratch,
                                            scratch_bytes)
                       : gemma2_encode(p->model, text->text, text->size, flags, ids, room, scratch,
                                       scratch_bytes);
    } while (n > (int64_t)room);
    free(scratch);
    p->ids.n = held + (ids && n > 0 ? (size_t)n : 0);
    if (!ids)
        return out_of_memory();
    return n < 0 ? fail(FAILED, "cannot encode the text: %s", gemma2_error_string((int)n)) : DONE;
}

static int push_text(program *p, const char *text, size_t size, unsigned flags)
{
    gemma2_message whole = {GEMMA2_ROLE_USER, text, (int64_t)size};
    return size ? push_encoded(p, &whole, 0, flags) : DONE;
}

/* Appends the ids of a list, "2 651, 6037". */
static int push_list(program *p, const char *list)
{
    static const char between[] = " \t\r\n,";
    for (list += strspn(list, between); *list; list += strspn(list, between)) {
        char word[24];
        uint64_t id;
        size_t length = strcspn(list, between);
        int fits = length < sizeof word;
        snprintf(word, sizeof word, "%.*s", (int)(fits ? length : sizeof word), list);
        if (!fits || !parse_whole(word, UINT64_MAX, &id))
            return fail(USAGE, "'%s%s' is not a token id", word, fits ? "" : "..");
        if (id >= (uint64_t)p->config->n_vocab)
            return fail(USAGE, "token id %s is outside the vocabulary of %" PRId32 " pieces", word,
                        p->config->n_vocab);
        int status = push_id(p, (int32_t)id);
        if (status != DONE)
            return status;
        list += length;
    }
    return DONE;
}

/* Appends a user's turn, which closes the reply before it, and what opens the model's. */
static int push_turn(program *p, const char *text, size_t size, int is_first)
{
    const char *system = p->opts->system;
    gemma2_message turn[2] = {{GEMMA2_ROLE_SYSTEM, system, -1},
                              {GEMMA2_ROLE_USER, text ? text : "", (int64_t)size}};
    int has_system = is_first && system;
    return push_encoded(p, has_system ? turn : turn + 1, has_system ? 2 : 1,
                        GEMMA2_CHAT_GENERATE | (is_first ? 0 : GEMMA2_CHAT_CONTINUE));
}

/* Whether the model's chat template can be used for what is asked, and which token ends a reply
 * by it. */
static int open_chat(program *p)
{
    char err[512];
    const options *opts = p->opts;
    gemma2_message turn[2] = {{GEMMA2_ROLE_SYSTEM, opts->system, -1}, {GEMMA2_ROLE_USER, "x", 1}};
    p->end_of_reply = -1;
    if (!opts->chat)
        return DONE;
    if (gemma2_chat_check(p->model, opts->system ? turn : turn + 1, opts->system ? 2 : 1,
                          GEMMA2_CHAT_GENERATE, err, sizeof err) < 0)
        return fail(USAGE, "%s: %s", opts->model, err);
    size_t size = gemma2_chat_scratch(p->model, NULL, 0);
    void *scratch = malloc(size);
    int32_t id;
    if (!scratch)
        return out_of_memory();
    int64_t n = gemma2_encode_chat(p->model, NULL, 0, GEMMA2_CHAT_CONTINUE, &id, 1, scratch, size);
    free(scratch);
    int type = 0;
    if (n > 0 && gemma2_piece(p->model, id, NULL, &type) && type != GEMMA2_PIECE_NORMAL &&
        type != GEMMA2_PIECE_BYTE)
        p->end_of_reply = id;
    return DONE;
}

static const char *prompt_name(const options *opts)
{
    if (opts->text)
        return "the prompt";
    return opts->file && strcmp(opts->file, "-") != 0 ? opts->file : "standard input";
}

/* Says what is odd about the prompt's bytes, which are taken as they are all the same. */
static void warn_of_prompt(const program *p)
{
    const char *text = p->prompt.items, *name = prompt_name(p->opts);
    size_t n = p->prompt.n;
    const kind *seems = kind_of(text, n);
    if (p->opts->quiet || n == 0)
        return;
    if (strcmp(seems->what, "UTF-16") == 0)
        remark("warning: %s seems to be UTF-16, and only UTF-8 is read as text; convert it, as "
               "with iconv -f UTF-16 -t UTF-8", name);
    else if (!seems->is_text)
        remark("warning: %s seems to be %s, not text", name, seems->what);
    else if (n >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0)
        remark("warning: %s begins with a byte-order mark, which counts as text; save it without",
               name);
}

/* The prompt's bytes, from wherever they come.  The newline that ends a file is no part of a
 * message. */
static int read_prompt(program *p)
{
    const options *opts = p->opts;
    array *prompt = &p->prompt;
    if (!opts->text) {
        int status = read_path(opts->file, prompt);
        const char *bytes = prompt->items;
        prompt->n -= opts->chat && prompt->n && bytes[prompt->n - 1] == '\n';
        prompt->n -= opts->chat && prompt->n && bytes[prompt->n - 1] == '\r';
        return status;
    }
    size_t n = strlen(opts->text);
    char *copy = extend(prompt, n, 1);
    if (!copy)
        return out_of_memory();
    memcpy(copy, opts->text, n);
    return DONE;
}

/* Appends the ids of a prompt, in a chat as a turn. */
static int push_prompt(program *p, const char *text, size_t n)
{
    if (p->opts->chat)
        return push_turn(p, text, n, p->ids.n == 0);
    int status = p->config->bos >= 0 && !p->ids.n ? push_id(p, p->config->bos) : DONE;
    return status ? status : push_text(p, text, n, 0);
}

static int refuse_length(size_t n, size_t context)
{
    return n ? fail(USAGE, "the prompt has %zu tokens and the context holds %zu; shorten it or "
                    "raise --context", n, context)
             : fail(USAGE, "the prompt has no tokens to go on from");
}

static int load_prompt(program *p)
{
    const options *opts = p->opts;
    if (opts->ids)
        return push_list(p, opts->ids);
    int status = read_prompt(p);
    return status ? status : push_prompt(p, p->prompt.items, p->prompt.n);
}

/* ===================================================================================
 * 6. The reply
 * =================================================================================== */

enum { PREFILL_PIECE = 256 }; /* between two looks at Ctrl-C; the default batch */

static int engine_failed(program *p, const char *doing, int code)
{
    clear_progress(p);
    return fail(FAILED, "%s: %s", doing, gemma2_error_string(code));
}

/* Evaluates the ids that the session does not hold yet, unless interrupted. */
static int prefill(program *p)
{
    const int32_t *ids = p->ids.items;
    size_t start = (size_t)gemma2_position(p->session), end = p->ids.n, at = start;
    double began = seconds();
    if (end > at + PREFILL_PIECE)
        show_progress(p, "prompt: 0 of %zu tokens", end - at);
    while (at < end && !stop_asked) {
        size_t n = end - at < PREFILL_PIECE ? end - at : PREFILL_PIECE;
        int code = gemma2_prefill(p->session, ids + at, n, at + n == end ? p->logits : NULL);
        if (code == GEMMA2_ERR_CANCELLED)
            break;
        if (code < 0)
            return engine_failed(p, "reading the prompt", code);
        at += n;
        if (at < end && seconds() - began > 1)
            show_progress(p, "prompt: %zu of %zu tokens, %.0f s left", at - start, end - start,
                          (seconds() - began) * (double)(end - at) / (double)(at - start));
    }
    clear_progress(p);
    p->reply.prefill_tokens += at - start;
    p->reply.prefill_s += seconds() - began;
    if (at < end)
        p->reply.finish = AT_INTERRUPT;
    return DONE;
}

/* What the n bytes at text are the start of: 2 a whole stop string, 1 a part of one that
 * the bytes to come may complete, 0 neither. */
static int match_stops(const options *opts, const char *text, size_t n)
{
    int match = 0;
    for (size_t i = 0; i < opts->n_stops; i++) {
        size_t length = strlen(opts->stops[i]);
        if (memcmp(text, opts->stops[i], length < n ? length : n) == 0)
            match = length <= n ? 2 : match ? match : 1;
        if (match == 2)
            break;
    }
    return match;
}

/* Shows the text up to the first place where a stop string stands or may be beginning;
 * where one stands, the text ends there.  So the reply is what would have been generated
 * up to the earliest stop string, however the text falls into tokens.  At the end of
 * generation nothing more comes that could complete one. */
static void show_text(program *p, int at_end)
{
    reply *r = &p->reply;
    const char *text = r->text.items;
    size_t cut = r->shown;
    int match = 0;
    for (; cut < r->text.n; cut++) {
        match = is_inside_char(text[cut]) ? 0
                                          : match_stops(p->opts, text + cut, r->text.n - cut);
        if (match == 2 || (match == 1 && !at_end))
            break;
    }
    if (cut > r->shown && !p->opts->json && !p->silent) {
        put_text(&p->out, text + r->shown, cut - r->shown);
        put_flush(&p->out);
    }
    r->shown = cut;
    if (cut < r->text.n && match == 2) {
        r->text.n = cut;
        r->finish = AT_STOP_STRING;
    }
}

/* Appends the text that an id completes; -1 ends the text. */
static int append_text(program *p, int32_t id)
{
    reply *r = &p->reply;
    size_t held = r->text.n, room = (size_t)p->config->max_piece_bytes + 12;
    char *end = extend(&r->text, room, 1);
    if (!end)
        return out_of_memory();
    int n = gemma2_decode(p->model, &r->hold, id, end, room);
    r->text.n = held + (n > 0 ? (size_t)n : 0);
    return n < 0 ? engine_failed(p, "decoding", n) : DONE;
}

/* Whether the reply must end before its next token. */
static void check_limits(program *p)
{
    reply *r = &p->reply;
    if (stop_asked)
        r->finish = AT_INTERRUPT;
    else if (p->opts->max_tokens >= 0 && r->n_ids >= (size_t)p->opts->max_tokens)
        r->finish = may_end(&p->constraint) ? AT_STOP : AT_LENGTH;
    else if (p->ids.n >= (size_t)gemma2_context(p->session))
        r->finish = may_end(&p->constraint) ? AT_STOP : AT_CONTEXT;
}

/* Sets the mask of the tokens that may come next. */
static int constrain(program *p)
{
    constraint *c = &p->constraint;
    int64_t left = gemma2_context(p->session) - (int64_t)p->ids.n;
    if (p->opts->max_tokens >= 0 && p->opts->max_tokens - (int64_t)p->reply.n_ids < left)
        left = p->opts->max_tokens - (int64_t)p->reply.n_ids;
    int code = gemma2_matcher_allowed(c->matcher, &c->state, left, c->mask);
    if (code == GEMMA2_ERR_SPACE) {
        clear_progress(p);
        return fail(FAILED, "the reply can go on in more ways than memory is kept for; give the "
                            "grammar or schema fewer alternatives that begin alike");
    }
    if (code < 0)
        return engine_failed(p, "constraining the reply", code);
    if (p->end_of_reply >= 0 && may_end(c))
        c->mask[p->end_of_reply / 32] |= (uint32_t)1 << p->end_of_reply % 32;
    return DONE;
}

/* Reads --choice, --grammar or --schema, before the prompt costs time. */
static int load_constraint(program *p)
{
    const options *opts = p->opts;
    const char *path = opts->schema ? opts->schema : opts->grammar;
    const char *name = opts->schema ? "--schema " : path ? "--grammar " : "--choice";
    array text = {0}, gbnf = {0};
    char err[SENTENCE] = "out of memory";
    if (!path && !opts->n_choices)
        return DONE;
    int status = path ? read_path(path, opts->schema ? &text : &gbnf) : DONE;
    int ok = status == DONE;
    if (opts->schema)
        ok = ok && read_schema(&gbnf, text.items, text.n, opts->spaced, err, sizeof err);
    else if (!path)
        ok = add_choices(&gbnf, opts->choices, opts->n_choices);
    ok = ok && open_constraint(&p->constraint, p->model, gbnf.n ? gbnf.items : "", gbnf.n,
                               opts->grammar != NULL, err, sizeof err);
    free(text.items);
    free(gbnf.items);
    return status || ok ? status : fail(USAGE, "%s%s: %s", name, path ? path : "", err);
}

/* Begins a constrained reply behind n tokens; refuses it where the context or -n leaves no room. */
static int start_constraint(program *p, size_t n)
{
    constraint *c = &p->constraint;
    int64_t room = gemma2_context(p->session) - (int64_t)n;
    if (!c->matcher)
        return DONE;
    gemma2_matcher_start(c->matcher, &c->state);
    if (p->opts->max_tokens >= 0 && p->opts->max_tokens < c->shortest)
        return fail(USAGE, "-n %" PRId32 " leaves no room for the shortest reply, which takes %"
                    PRId64 " tokens", p->opts->max_tokens, c->shortest);
    if (c->shortest > room)
        return fail(USAGE, "the context has room for %" PRId64 " more tokens and the shortest "
                    "reply takes %" PRId64, room, c->shortest);
    return DONE;
}

/* The natural log-probability of a text, tokenised as a text of its own, behind the prompt whose
 * logits are there; the session comes back to where it was. */
static int score_choice(program *p, const char *text, double *sum)
{
    int32_t at = gemma2_position(p->session);
    size_t before = p->ids.n;
    int status = push_text(p, text, strlen(text), GEMMA2_ENCODE_PLAIN), code = GEMMA2_OK;
    size_t n = p->ids.n - before;
    const int32_t *ids = (const int32_t *)p->ids.items + before;
    float *logprobs = status == DONE ? malloc((n + 1) * sizeof *logprobs) : NULL;
    p->ids.n = before;
    if (!logprobs)
        return status ? status : out_of_memory();
    if (n > 0)
        code = gemma2_logprob(p->logits, (size_t)p->config->n_vocab, ids[0], logprobs);
    if (n > 1 && code == GEMMA2_OK)
        code = gemma2_score(p->session, ids, n - 1, ids[n - 1], logprobs + 1);
    if (n > 1 && code == GEMMA2_OK)
        code = gemma2_rewind(p->session, at);
    *sum = 0;
    for (size_t i = 0; i < n && code == GEMMA2_OK; i++)
        *sum += (double)logprobs[i];
    free(logprobs);
    return code < 0 ? engine_failed(p, "weighing the choices", code) : DONE;
}

/* The probabilities of the choices among themselves, for --json. */
static int weigh_choices(program *p)
{
    size_t n = p->opts->n_choices;
    double best = -HUGE_VAL, total = 0;
    p->reply.choices.n = 0;
    double *weights = extend(&p->reply.choices, n, sizeof *weights);
    if (!weights)
        return out_of_memory();
    for (size_t i = 0; i < n; i++) {
        int status = score_choice(p, p->opts->choices[i], &weights[i]);
        if (status != DONE)
            return status;
        best = weights[i] > best ? weights[i] : best;
    }
    if (best == -HUGE_VAL)
        return fail(FAILED, "the model has kept only a part of its vocabulary, and each choice has "
                    "a token of the rest: without --json it can choose");
    for (size_t i = 0; i < n; i++)
        total += weights[i] = exp(weights[i] - best);
    for (size_t i = 0; i < n; i++)
        weights[i] /= total;
    return DONE;
}

/* How many candidates --top-logprobs keeps of each token. */
static size_t count_top(const program *p)
{
    int32_t n = p->opts->n_top, all = p->config->n_kept;
    return (size_t)(n < all ? n : all);
}

/* Chooses the next token by the logits after those so far, shows its text, and sees whether the
 * reply ends with it. */
static int choose(program *p)
{
    reply *r = &p->reply;
    int status = p->constraint.matcher ? constrain(p) : DONE;
    if (status != DONE)
        return status;
    int32_t id = gemma2_sample(p->session, &p->sampler, p->logits);
    if (id < 0)
        return engine_failed(p, "choosing a token", id);
    if (gemma2_is_stop(p->model, id) || id == p->end_of_reply) {
        r->finish = AT_STOP;
        return DONE;
    }
    if (p->opts->json) {
        float *logprob = extend(&r->logprobs, 1, sizeof *logprob);
        if (!logprob)
            return out_of_memory();
        int code = gemma2_logprob(p->logits, (size_t)p->config->n_vocab, id, logprob);
        size_t n_top = count_top(p);
        gemma2_candidate *top = n_top ? extend(&r->tops, n_top, sizeof *top) : NULL;
        if (n_top && !top)
            return out_of_memory();
        if (top && code >= 0)
            code = gemma2_top_logprobs(p->logits, (size_t)p->config->n_vocab, top, n_top);
        if (code < 0)
            return engine_failed(p, "generating", code);
    }
    if (p->constraint.matcher)
        gemma2_matcher_accept(p->constraint.matcher, &p->constraint.state, id);
    status = push_id(p, id);
    if (status == DONE)
        status = append_text(p, id);
    size_t *end = status == DONE ? extend(&r->ends, 1, sizeof *end) : NULL;
    if (!end)
        return status ? status : out_of_memory();
    *end = r->text.n;
    r->n_ids++;
    show_text(p, 0);
    return DONE;
}

/* Evaluates the last token, unless the prompt's reading did, and chooses the next. */
static int step(program *p)
{
    const int32_t *ids = p->ids.items;
    if ((size_t)gemma2_position(p->session) < p->ids.n) {
        const int32_t *last = ids + p->ids.n - 1;
        int code = p->ahead ? gemma2_eval_ahead(p->session, p->ahead, *last, p->logits)
                            : gemma2_eval(p->session, last, 1, p->logits);
        if (code == GEMMA2_ERR_CANCELLED) {
            p->reply.finish = AT_INTERRUPT;
            return DONE;
        }
        if (code < 0)
            return engine_failed(p, "generating", code);
        p->reply.decode_passes++;
    }
    return choose(p);
}

/* Shows what was held back, as nothing more comes. */
static int end_text(program *p)
{
    int status = p->reply.finish == AT_STOP_STRING ? DONE : append_text(p, -1);
    if (status == DONE && p->reply.finish != AT_STOP_STRING)
        show_text(p, 1);
    return status;
}

static int drop_oldest(program *p);

/* Whether the oldest turns can make room. */
static int can_drop(const program *p) { return p->opts->full_drops && p->turns.n > 1; }

/* Generates from the session's logits until something ends it.  In a conversation that fills the
 * context the oldest turns go, and the reply goes on. */
static int decode(program *p)
{
    reply *r = &p->reply;
    double began = seconds();
    int status = DONE;
    while (!status && !r->finish && !p->out.error) {
        check_limits(p);
        if (r->finish == AT_CONTEXT && can_drop(p)) {
            status = drop_oldest(p);
            r->finish = RUNNING;
            status = status ? status : prefill(p);
        }
        if (!status && !r->finish)
            status = step(p);
    }
    r->decode_s = seconds() - began;
    return status ? status : end_text(p);
}

/* Forgets all of a reply but its memory. */
static void clear_reply(reply *r)
{
    r->text.n = r->logprobs.n = r->tops.n = r->choices.n = r->ends.n = 0;
    r->shown = r->n_ids = r->prefill_tokens = r->decode_passes = 0;
    r->hold = (gemma2_utf8){{0}, 0};
    r->finish = RUNNING;
    r->prefill_s = r->decode_s = 0;
}

/* One reply to the ids so far.  Ctrl-C stops it. */
static int make_reply(program *p)
{
    reply *r = &p->reply;
    clear_reply(r);
    int status = start_constraint(p, p->ids.n);
    if (status != DONE)
        return status;
    gemma2_cancel(p->session, 0);
    interruptible = p->session;
    patience = PATIENCE;
    status = prefill(p);
    if (status == DONE && !p->opts->json)
        put_text(&p->out, p->echo.items, p->echo.n);
    if (status == DONE && !r->finish && p->opts->json && p->opts->n_choices)
        status = weigh_choices(p);
    if (status == DONE && !r->finish)
        status = decode(p);
    if (r->finish == AT_INTERRUPT)
        stop_asked = 0; /* only here, where it was heeded, so that no Ctrl-C is lost */
    if (!p->opts->json)
        put_bytes(&p->out, "\n", 1);
    put_flush(&p->out);
    return status;
}

/* Takes the session back to the first n ids, or to none where its window has moved on.  The
 * next prefill catches up. */
static void forget_after(program *p, size_t n)
{
    p->ids.n = n;
    if ((size_t)gemma2_position(p->session) > n && gemma2_rewind(p->session, (int32_t)n) < 0)
        gemma2_rewind(p->session, 0);
}

/* Makes the ids those of what was shown: a stop string and what came with it goes.  Where the
 * string began inside a token, the part before it is encoded anew. */
static int keep_shown(program *p)
{
    reply *r = &p->reply;
    const char *text = r->text.items;
    const size_t *ends = r->ends.items;
    size_t kept = 0, shown = 0;
    if (r->finish != AT_STOP_STRING)
        return DONE;
    for (size_t i = 0; i < r->n_ids && ends[i] <= r->text.n; i++)
        if (ends[i] > shown) {
            shown = ends[i];
            kept = i + 1;
        }
    forget_after(p, p->ids.n - r->n_ids + kept);
    r->finish = RUNNING; /* once is enough */
    return push_text(p, text + shown, r->text.n - shown, GEMMA2_ENCODE_PLAIN);
}

/* Gives the sampler what the options now say, and the seed's first state where it is new. */
static void settle_sampler(program *p, int reseed)
{
    gemma2_sampler seeded, was = p->sampler;
    gemma2_sampler_init(&seeded, p->seed);
    p->sampler = p->opts->sampler;
    p->sampler.rng = reseed ? seeded.rng : was.rng;
    p->sampler.bias = was.bias;
    p->sampler.n_bias = was.n_bias;
    p->sampler.allow = was.allow;
    if (p->sampler.penalty_last < 0)
        p->sampler.penalty_last = gemma2_context(p->session);
}

static double rate(size_t tokens, double time)
{
    return time > 0 ? (double)tokens / time : 0;
}

static void print_speed(const program *p)
{
    const reply *r = &p->reply;
    fprintf(stderr, "prompt %zu tokens, %.1f tok/s; reply %zu tokens, %.1f tok/s",
            r->prefill_tokens, rate(r->prefill_tokens, r->prefill_s), r->n_ids,
            rate(r->decode_passes, r->decode_s));
    if (p->sampler.temperature > 0)
        fprintf(stderr, "; seed %" PRIu64, p->seed);
    fputc('\n', stderr);
}

/* ---- sessions in files ---- */

/* Writes a file, whole or not at all.  bytes NULL: only sees whether one can be made there, to
 * say so before the work and not after it. */
static int save_file(const char *what, const char *path, const void *bytes, size_t n)
{
    char name[4096];
    int before = patience;
    patience = PATIENCE; /* Ctrl-C must not come between making the file and naming it */
    char *target = follow_links(path);
    FILE *file = target ? open_beside(target, name, sizeof name) : NULL;
    int made = file && (bytes ? replace_file(file, name, target, bytes, n) : fclose(file) == 0);
    int reason = errno;
    free(target);
    if (file && (!made || !bytes))
        remove_path(name);
    patience = before;
    if (!made)
        return fail(FAILED, "cannot save %s as %s: %s", what, path, strerror(reason));
    return !bytes && stop_asked ? INTERRUPTED : DONE;
}

/* Above the bytes of any that the context has room for: keys and values in f32, ids, header. */
static uint64_t longest_session(const program *p)
{
    const gemma2_config *c = p->config;
    uint64_t numbers = 2 * (uint64_t)c->n_layers * (uint64_t)c->n_kv_heads * (uint64_t)c->head_dim;
    return (uint64_t)gemma2_context(p->session) * 4 * (numbers + 1) + 4096;
}

/* Reads a file that begins with the magic of `what`, at most so many bytes; 0: the first ones
 * alone, if there are any.  Nothing where may_be_new and no file is there yet; magic NULL: any
 * file. */
static int read_kept(const char *path, const char *magic, const char *what, uint64_t most,
                     int may_be_new, array *bytes)
{
    if (is_special(path))
        return fail(FAILED, "%s is not a file that can hold %s", path, what);
    FILE *file = open_path(path, "rb");
    if (!file && errno == ENOENT && may_be_new)
        return DONE;
    if (!file)
        return fail(FAILED, "cannot open %s: %s", path, strerror(errno));
    char *head = extend(bytes, HEAD_BYTES, 1);
    bytes->n = head ? fread(head, 1, HEAD_BYTES, file) : 0;
    int status = head ? DONE : out_of_memory();
    if (head && ferror(file))
        status = fail(FAILED, "cannot read %s: %s", path, strerror(errno));
    else if (head && magic && (most || bytes->n) &&
             (bytes->n < MAGIC_BYTES || memcmp(head, magic, MAGIC_BYTES) != 0))
        status = fail(FAILED, "%s is not %s: it seems to be %s; give another name", path, what,
                      kind_of(head, bytes->n)->what);
    else if (head && most)
        status = read_file(file, path, most, bytes);
    fclose(file);
    return status;
}

/* Puts the session where the file's stood, but for its last token: that is evaluated with
 * what follows, to have logits. */
static int load_session(program *p, const char *path, int may_be_new)
{
    array bytes = {0};
    int status = may_be_new && !is_special(path) ? save_file("the session", path, NULL, 0) : DONE;
    if (status == DONE)
        status = read_kept(path, SESSION_MAGIC, "a saved session", longest_session(p), may_be_new,
                           &bytes);
    int code = status || !bytes.n ? 0 : gemma2_session_restore(p->session, bytes.items, bytes.n);
    free(bytes.items);
    if (code < 0)
        return fail(FAILED, "%s: %s", path, gemma2_error_string(code));
    if (status != DONE)
        return status;
    int32_t n = gemma2_position(p->session);
    p->ids.n = 0;
    status = push_ids(p, gemma2_history(p->session), (size_t)n);
    if (n && gemma2_rewind(p->session, n - 1) < 0) /* saved after a rewind as deep as can be */
        gemma2_rewind(p->session, 0);
    if (n && p->opts->system && !p->opts->quiet && p->opts->mode != CONVERSE)
        remark("warning: --system is for the first turn, and %s holds some", path);
    return status;
}

static int save_session(program *p, const char *path)
{
    size_t held = (size_t)gemma2_position(p->session);
    interruptible = NULL; /* Ctrl-C comes too late */
    gemma2_cancel(p->session, 0);
    if (held < p->ids.n) {
        const int32_t *ids = p->ids.items;
        int code = gemma2_prefill(p->session, ids + held, p->ids.n - held, NULL);
        if (code < 0)
            return engine_failed(p, "saving the session", code);
    }
    int64_t n = gemma2_session_save(p->session, NULL, 0);
    void *bytes = n > 0 ? malloc((size_t)n) : NULL;
    if (!bytes)
        return out_of_memory();
    gemma2_session_save(p->session, bytes, (size_t)n);
    int status = save_file("the session", path, bytes, (size_t)n);
    free(bytes);
    return status;
}

/* ===================================================================================
 * 7. Modes
 * =================================================================================== */

static void put_ids(output *out, const int32_t *ids, size_t n, const char *between)
{
    for (size_t i = 0; i < n; i++)
        put_format(out, "%s%" PRId32, i ? between : "", ids[i]);
}

static void put_piece(program *p, int32_t id)
{
    size_t n;
    const char *piece = gemma2_piece(p->model, id, &n, NULL);
    put_quoted(&p->out, piece, n);
}

/* Of every token of the reply, the best that could have stood in its place. */
static void put_tops(program *p)
{
    const gemma2_candidate *top = p->reply.tops.items;
    size_t n_top = count_top(p);
    put_format(&p->out, "], \"top_logprobs\": [");
    for (size_t i = 0; i < p->reply.logprobs.n * n_top; i++, top++) {
        put_format(&p->out, "%s{\"id\": %" PRId32 ", \"piece\": ",
                   i % n_top ? ", " : i ? "], [" : "[", top->id);
        put_piece(p, top->id);
        put_format(&p->out, ", \"logprob\": %.9g}", (double)top->logprob);
    }
    put_format(&p->out, p->reply.logprobs.n ? "]" : "");
}

/* What --json tells of a reply in a batch, too. */
static void put_details(program *p)
{
    const reply *r = &p->reply;
    put_format(&p->out, "\"ids\": [");
    put_ids(&p->out, (const int32_t *)p->ids.items + p->ids.n - r->n_ids, r->n_ids, ", ");
    put_format(&p->out, "], \"logprobs\": [");
    for (size_t i = 0; i < r->logprobs.n; i++)
        put_format(&p->out, "%s%.9g", i ? ", " : "", (double)((const float *)r->logprobs.items)[i]);
    if (p->opts->n_top)
        put_tops(p);
    for (size_t i = 0; i < r->choices.n; i++) {
        put_format(&p->out, i ? ", {\"text\": " : "], \"choices\": [{\"text\": ");
        put_quoted(&p->out, p->opts->choices[i], strlen(p->opts->choices[i]));
        put_format(&p->out, ", \"probability\": %.9g}", ((const double *)r->choices.items)[i]);
    }
    put_format(&p->out, "]");
}

static void print_json(program *p)
{
    const reply *r = &p->reply;
    output *out = &p->out;
    put_format(out, "{\"text\": \"");
    put_json(out, p->echo.items, p->echo.n);
    put_json(out, r->text.items, r->text.n);
    put_format(out, "\", \"prompt_ids\": [");
    put_ids(out, p->ids.items, p->ids.n - r->n_ids, ", ");
    put_format(out, "], ");
    put_details(p);
    put_format(out, ", \"finish_reason\": \"%s\", \"seed\": %" PRIu64,
               FINISH_REASONS[r->finish], p->seed);
    put_format(out, ", \"timings\": {\"load_s\": %.6f, \"prefill_s\": %.6f", p->load_s,
               r->prefill_s);
    put_format(out, ", \"prefill_tokens\": %zu, \"prefill_tps\": %.3f", r->prefill_tokens,
               rate(r->prefill_tokens, r->prefill_s));
    put_format(out, ", \"decode_s\": %.6f, \"decode_tokens\": %zu, \"decode_tps\": %.3f}",
               r->decode_s, r->n_ids, rate(r->decode_passes, r->decode_s));
    gemma2_ahead_counts counts = {.passes = r->decode_passes};
    gemma2_ahead_count(p->ahead, &counts);
    put_format(out, ", \"passes\": %" PRIu64 ", \"drafted\": %" PRIu64, counts.passes,
               counts.drafted);
    put_format(out, ", \"accepted\": %" PRIu64 "}\n", counts.accepted);
}

/* Appends the text of all ids. */
static int decode_ids(program *p, const int32_t *ids, size_t n_ids, array *text)
{
    size_t room = (size_t)p->config->max_piece_bytes + 12;
    gemma2_utf8 hold = {{0}, 0};
    for (size_t i = 0; i <= n_ids; i++) {
        char *end = extend(text, room, 1);
        if (!end)
            return out_of_memory();
        int n = gemma2_decode(p->model, &hold, i < n_ids ? ids[i] : -1, end, room);
        text->n -= room - (n > 0 ? (size_t)n : 0);
        if (n < 0)
            return engine_failed(p, "decoding", n);
    }
    return DONE;
}

/* The prompt as it came, or the text of its ids; in a chat with a newline, which ends a message and
 * is no part of a text. */
static int load_echo(program *p)
{
    if (p->opts->ids)
        return decode_ids(p, p->ids.items, p->ids.n, &p->echo);
    int status = append(&p->echo, p->prompt.items, p->prompt.n);
    return status || !p->opts->chat ? status : append(&p->echo, "\n", 1);
}

static int generate(program *p)
{
    if (p->ids.n == 1 && !p->opts->ids && !p->opts->quiet)
        remark("note: the prompt is empty, so the text begins with anything");
    else if (p->opts->chat && !p->prompt.n && !p->opts->quiet)
        remark("note: the message is empty");
    int status = p->opts->echo ? load_echo(p) : DONE;
    if (status == DONE)
        status = make_reply(p);
    if (status != DONE || p->out.error)
        return status;
    if (p->opts->json)
        print_json(p);
    put_flush(&p->out);
    if (!p->opts->quiet && !p->out.error)
        print_speed(p);
    return p->reply.finish == AT_INTERRUPT ? INTERRUPTED : DONE;
}

/* ---- the line editor: what is typed becomes keys, keys change the text, draw() shows it.
 * Nothing here writes to the terminal: what it is to be sent gathers in `screen` ---- */

enum { CTRL = 0x1F, ESCAPE = 27, RUBOUT = 127 }; /* Ctrl-A is 'A' & CTRL; arrows are such keys */
enum { LEFT = 'B' & CTRL, RIGHT = 'F' & CTRL, UP = 'P' & CTRL, DOWN = 'N' & CTRL,
       HOME = 'A' & CTRL, END = 'E' & CTRL, WORD_ERASE = 'W' & CTRL,
       ERASE = 0x110000, WORD_LEFT, WORD_RIGHT, NEW_LINE, PASTE, PASTED, NO_KEY }; /* no byte */
enum { SIGN = 2 }; /* columns of "> " and ". " */

/* How many columns of a terminal a character takes: 0 where it joins the one before, 2 where it
 * is wide.  Unicode's classes in rough ranges, for the scripts that are most in use. */
static size_t columns(uint32_t code)
{
    static const uint32_t ranges[2][64] = { /* the first and the last of each, then 0 */
        {0x300, 0x36F, 0x483, 0x489, 0x591, 0x5C7, 0x610, 0x61C, 0x64B, 0x65F, 0x670, 0x670, 0x6D6,
         0x6ED, 0x93A, 0x93C, 0x941, 0x948, 0x94D, 0x94D, 0x951, 0x957, 0x9C1, 0x9C4, 0x9CD, 0x9CD,
         0xBC0, 0xBC0, 0xBCD, 0xBCD, 0xE31, 0xE31, 0xE34, 0xE3A, 0xE47, 0xE4E, 0x1160, 0x11FF,
         0x200B, 0x200F, 0x202A, 0x202E, 0x2060, 0x206F, 0x20D0, 0x20F0, 0x302A, 0x302D, 0x3099,
         0x309A, 0xFE00, 0xFE0F, 0xFE20, 0xFE2F, 0xFEFF, 0xFEFF, 0xE0001, 0xE01EF},
        {0x1100, 0x115F, 0x231A, 0x231B, 0x23E9, 0x23F3, 0x2614, 0x2615, 0x26A1, 0x26A1, 0x2705,
         0x2705, 0x2728, 0x2728, 0x274C, 0x274E, 0x2753, 0x2757, 0x2795, 0x2797, 0x2B50, 0x2B50,
         0x2E80, 0x303E, 0x3041, 0xA4C6, 0xA960, 0xA97C, 0xAC00, 0xD7A3, 0xF900, 0xFAD9, 0xFE30,
         0xFE6B, 0xFF01, 0xFF60, 0xFFE0, 0xFFE6, 0x16FE0, 0x1B2FB, 0x1F300, 0x1F64F, 0x1F680,
         0x1F6FF, 0x1F7E0, 0x1F7F0, 0x1F900, 0x1FAFF, 0x20000, 0x3FFFD}};
    for (size_t wide = 0; wide < 2; wide++)
        for (const uint32_t *r = ranges[wide]; *r && code >= *r; r += 2)
            if (code <= r[1])
                return 2 * wide;
    return 1;
}

/* A place in the text: the bytes and the cells of the terminal before it (a row has `width` cells),
 * and the character that ends there. */
typedef struct {
    size_t byte, cell;
    uint32_t code;
} spot;

/* The place behind the next character, or at the end of the text the same place.  A newline fills
 * its row.  A wide character that does not fit leaves the row's last cell empty. */
static spot behind(const editor *e, spot at)
{
    size_t length, left = e->width - at.cell % e->width;
    if (at.byte == e->text.n)
        return at;
    at.code = next_char((char *)e->text.items + at.byte, e->text.n - at.byte, &length);
    size_t width = at.code == '\n' ? SIGN : columns(at.code);
    at.cell += width + (at.code == '\n' || width > left ? left : 0);
    at.byte += length;
    return at;
}

static int is_flag(uint32_t code) { return code >= 0x1F1E6 && code <= 0x1F1FF; } /* half a flag */
static int is_tone(uint32_t code) { return code >= 0x1F3FB && code <= 0x1F3FF; } /* of skin */

/* The place behind one step of the cursor: a character with all that joins it. */
static spot step_behind(const editor *e, spot at)
{
    spot next = behind(e, at);
    int is_half = is_flag(next.code), joins = 1;
    for (; joins; is_half = 0) {
        at = next;
        next = behind(e, at);
        joins = next.byte > at.byte && next.code != '\n' &&
                (next.cell == at.cell || at.code == 0x200D || is_tone(next.code) ||
                 (is_half && is_flag(next.code)));
    }
    return at;
}

/* The last place of the cursor up to a byte and a cell.  The cells of a sign lead behind it. */
static spot find_place(const editor *e, size_t byte, size_t cell)
{
    spot at = {0, SIGN, 0}, next = step_behind(e, at);
    while (next.byte > at.byte && next.byte <= byte &&
           next.cell - (next.code == '\n' ? SIGN : 0) <= cell) {
        at = next;
        next = step_behind(e, at);
    }
    return at;
}

static spot place_of(const editor *e, size_t byte) { return find_place(e, byte, SIZE_MAX); }
static size_t step_before(const editor *e) { return place_of(e, e->at - (e->at > 0)).byte; }
static size_t step_after(const editor *e) { return step_behind(e, place_of(e, e->at)).byte; }

/* Sends the rows from `top` to `bottom` and returns the row that the cursor is then on.  Behind a
 * full row terminals wait: a blank makes them wrap, once nothing more joins its last character. */
static size_t send_rows(editor *e, size_t top, size_t bottom)
{
    const char *text = e->text.items;
    spot at = {0, SIGN, 0}, next = behind(e, at);
    put_format(&e->out, top ? "" : "> ");
    for (;; at = next, next = behind(e, at)) {
        size_t row = at.cell / e->width;
        int is_end = next.byte == at.byte, is_joined = !is_end && next.cell == at.cell;
        if (at.cell % e->width == 0 && !is_joined && row > top && row <= bottom)
            put_format(&e->out, " \r");
        if (is_end || (next.cell - 1) / e->width > bottom)
            return row < bottom ? row : bottom;
        if ((next.cell - 1) / e->width < top)
            continue;
        if (next.code == '\n')
            put_format(&e->out, row < top ? ". " : "\r\n. ");
        else if (is_control(next.code) || next.code == REPLACEMENT)
            put_format(&e->out, next.code == '\t' ? " " : "?");
        else
            put_bytes(&e->out, text + at.byte, next.byte - at.byte);
    }
}

/* Draws the text anew: at most `rows` rows around the cursor, or all of it for SIZE_MAX. */
static void draw(editor *e, size_t rows)
{
    size_t cell = place_of(e, e->at).cell, row = cell / e->width;
    if (e->row > e->top)
        put_format(&e->out, "\033[%zuA", e->row - e->top);
    put_format(&e->out, "\r\033[J");
    e->top = rows == SIZE_MAX ? 0 : row < e->top ? row : e->top;
    e->top = row - e->top < rows ? e->top : row - rows + 1;
    size_t end = send_rows(e, e->top, e->top + rows - 1);
    put_format(&e->out, "\r");
    if (end > row)
        put_format(&e->out, "\033[%zuA", end - row);
    if (cell % e->width)
        put_format(&e->out, "\033[%zuC", cell % e->width);
    e->row = row;
}

/* Draws all of the text for the last time, with the cursor on a new row below it. */
static void leave_text(editor *e)
{
    e->at = e->text.n;
    draw(e, SIZE_MAX);
    if (place_of(e, e->at).cell % e->width)
        put_format(&e->out, "\r\n");
}

/* Replaces the bytes from..to by n others.  Returns 0 without memory: the array stays, and the
 * screen has an error. */
static int substitute(editor *e, array *a, size_t from, size_t to, const char *bytes, size_t n)
{
    size_t rest = a->n - to, held = to - from;
    if (!extend(a, n > held ? n - held : 0, 1))
        return note_write(&e->out, 1), 0;
    char *text = a->items;
    memmove(text + from + n, text + to, rest);
    if (n)
        memcpy(text + from, bytes, n);
    a->n = from + n + rest;
    return 1;
}

/* Does the same in the text, and puts the cursor behind the new bytes. */
static void replace(editor *e, size_t from, size_t to, const char *bytes, size_t n)
{
    if (substitute(e, &e->text, from, to, bytes, n))
        e->at = from + n;
}

static void insert(editor *e, const char *s, size_t n) { replace(e, e->at, e->at, s, n); }

/* Where the message before place `at` of the history begins. */
static size_t message_before(const char *history, size_t at)
{
    at -= at > 0;
    while (at > 0 && history[at - 1])
        at--;
    return at;
}

/* Keeps a message for the arrow keys, unless it is the last one kept. */
static int remember(editor *e, const char *text, size_t n)
{
    size_t last = message_before(e->history.items, e->history.n);
    if (!n || memchr(text, '\0', n) ||
        (e->history.n == last + n + 1 && !memcmp((char *)e->history.items + last, text, n)))
        return DONE;
    int status = append(&e->history, text, n);
    e->history.n += status == DONE; /* its NUL */
    return status;
}

/* Moves a row up or down in the text, or from its first or last row to a message of the history.
 * Until a message is sent, the drafts keep all messages as they were changed, the new one last. */
static void move_row(editor *e, int down)
{
    size_t from = e->recalled, cell = place_of(e, e->at).cell, row = cell / e->width;
    row = down ? row + 1 : row - 1; /* above the first: SIZE_MAX */
    e->aim = e->aim ? e->aim : cell % e->width + 1;
    if (row <= place_of(e, e->text.n).cell / e->width) {
        e->at = find_place(e, SIZE_MAX, row * e->width + e->aim - 1).byte;
        return;
    }
    if (!e->drafts.n && substitute(e, &e->drafts, 0, 0, e->history.items, from))
        substitute(e, &e->drafts, from, from, "", 1);
    size_t end = e->out.error ? from : from + strlen((char *)e->drafts.items + from);
    if (e->out.error || (down ? end + 1 == e->drafts.n : from == e->oldest) ||
        !substitute(e, &e->drafts, from, end, e->text.items, e->text.n))
        return;
    e->recalled = down ? from + e->text.n + 1 : message_before(e->drafts.items, from);
    const char *other = (char *)e->drafts.items + e->recalled;
    replace(e, 0, e->text.n, other, strlen(other));
    e->aim = 0;
}

/* Where the line, or behind blanks the word, ends on one side of the cursor. */
static size_t find_end(const editor *e, int of_word, int right)
{
    const char *text = e->text.items;
    size_t at = e->at, end = right ? e->text.n : 0;
    for (int blank = of_word; blank >= 0; blank--)
        for (; at != end; at = right ? at + 1 : at - 1) {
            char c = text[right ? at : at - 1];
            if ((c == '\n' || (of_word && (c == ' ' || c == '\t'))) != blank)
                break;
        }
    return at;
}

/* The key of the bytes behind ESC, or NO_KEY if it is not known.  No key has a blank. */
static uint32_t key_of(const char *bytes, size_t n)
{
    static const struct {
        const char *names;
        uint32_t key;
    } keys[] = {
        {" [A OA ", UP}, {" [B OB ", DOWN}, {" [C OC ", RIGHT}, {" [D OD ", LEFT},
        {" [H OH [1~ [7~ ", HOME}, {" [F OF [4~ [8~ ", END}, {" [3~ ", ERASE},
        {" f [1;5C [1;3C ", WORD_RIGHT}, {" b [1;5D [1;3D ", WORD_LEFT}, {" \177 ", WORD_ERASE},
        {" \r \n [13;2u [27;2;13~ ", NEW_LINE}, {" [200~ ", PASTE}, {" [201~ ", PASTED}};
    char name[20];
    snprintf(name, sizeof name, " %.*s ", (int)n, bytes);
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (strstr(keys[i].names, name))
            return keys[i].key;
    return NO_KEY;
}

/* Takes one more byte.  Returns the key that is then complete, else NO_KEY: the byte was text, or
 * part of an escape sequence.  In a paste everything is text but its end.  If the terminal edits
 * lines, everything is text but their ends.  The console of Linux has keys like ESC [ [ A. */
static uint32_t take_byte(editor *e, char c)
{
    char *s = e->sequence;
    size_t n = c == ESCAPE ? 0 : e->n_sequence;
    if (e->in_paste && c == ESCAPE) /* the sequence so far was text */
        insert(e, s, e->n_sequence);
    if (n == 0 && (c != ESCAPE || !e->raw)) {
        int is_key = (unsigned char)c < ' ' || c == RUBOUT;
        if (c == '\n' || c == '\r' || (is_key && c != '\t' && e->raw && !e->in_paste))
            return (unsigned char)c;
        insert(e, &c, 1);
        return NO_KEY;
    }
    s[n++] = c;
    int introduced = n > 1 && (s[1] == '[' || s[1] == 'O'), doubled = n == 3 && c == '[';
    int is_part = n == 1 || (introduced && (n == 2 || (unsigned char)c < '@' || doubled));
    if (n > 1 && !e->in_paste && memchr("]P_^", s[1], 4)) /* a string, up to BEL: not kept */
        n = 2, is_part = c != '\a';
    e->n_sequence = is_part && n < sizeof e->sequence ? n : 0;
    uint32_t key = e->n_sequence ? NO_KEY : key_of(s + 1, n - 1);
    if (e->n_sequence || !e->in_paste || key == PASTED)
        return key;
    insert(e, s, n);
    return NO_KEY;
}

/* Does what a key says.  The bell rings if there is nothing to erase. */
static void take_key(editor *e, uint32_t key)
{
    size_t from = e->at, to = e->at;
    switch (key) {
    case LEFT: e->at = step_before(e); return;
    case RIGHT: e->at = step_after(e); return;
    case UP: case DOWN: move_row(e, key == DOWN); return;
    case HOME: case END: e->at = find_end(e, 0, key == END); return;
    case WORD_LEFT: case WORD_RIGHT: e->at = find_end(e, 1, key == WORD_RIGHT); return;
    case NEW_LINE: insert(e, "\n", 1); return;
    case PASTE: case PASTED: e->in_paste = key == PASTE; e->marks_pastes = 1; return;
    case 'L' & CTRL:
        put_format(&e->out, "\033[H\033[2J");
        e->row = e->top = 0;
        return;
    case 'D' & CTRL: case ERASE: /* Ctrl-D in an empty last line ends the input */
        e->ended = key != ERASE && from == e->text.n && find_end(e, 0, 0) == from;
        from -= e->ended && from > 0; /* the newline before an empty last line */
        to = e->ended ? to : step_after(e);
        break;
    case 'H' & CTRL: case RUBOUT: from = step_before(e); break;
    case 'U' & CTRL: from = find_end(e, 0, 0); break;
    case WORD_ERASE: from = find_end(e, 1, 0); break;
    case 'K' & CTRL: to = find_end(e, 0, 1); to += to == e->at && to < e->text.n; break;
    case NO_KEY: return;
    }
    if (from == to && !e->ended)
        put_format(&e->out, "\a");
    else if (from < to)
        replace(e, from, to, NULL, 0);
}

/* Ends a line.  Returns whether the message goes on: behind a \, which is dropped, in an open """,
 * or where more comes within 20 ms, as in a paste that the terminal does not mark. */
static int close_line(editor *e)
{
    int more = !e->marks_pastes && !e->ahead && (e->i < e->n || input_waits(20));
    e->cut |= !e->raw && is_cut(e->text.n - find_end(e, 0, 0));
    size_t n = e->at = e->text.n;
    const char *text = e->text.items;
    int continued = n >= 3 && memcmp(text, "\"\"\"", 3) == 0 &&
                    (n < 6 || memcmp(text + n - 3, "\"\"\"", 3) != 0);
    if (n && text[n - 1] == '\\')
        replace(e, n - 1, n, NULL, 0), continued = 1;
    if (continued && !more && !e->raw)
        put_format(&e->out, ". ");
    return continued || more;
}

/* Takes the bytes that were typed, up to the end of a message.  Returns whether that came. */
static int take_typed(editor *e)
{
    while (e->i < e->n && !e->out.error && !e->ended) {
        char c = e->typed[e->i++];
        int is_second = c == '\n' && e->after_return; /* of CR and LF */
        e->after_return = e->raw && c == '\r';
        if (is_second || (c == '\r' && !e->raw))
            continue;
        uint32_t key = take_byte(e, c);
        if (key != UP && key != DOWN && !e->n_sequence)
            e->aim = 0;
        if (key != '\n' && key != '\r')
            take_key(e, key);
        else if (e->in_paste || close_line(e))
            insert(e, "\n", 1);
        else
            return 1;
    }
    return 0;
}

/* Begins an empty message on a new row. */
static void begin_text(editor *e)
{
    e->text.n = e->at = e->row = e->top = e->n_sequence = e->drafts.n = e->aim = 0;
    e->out.memory = &e->screen;
    put_format(&e->out, "> ");
    e->in_paste = 0;
    e->recalled = e->history.n;
}

/* ---- reading a message ---- */

static void flush_screen(editor *e)
{
    if (e->screen.n)
        fwrite(e->screen.items, 1, e->screen.n, stderr);
    fflush(stderr);
    e->screen.n = 0;
}

/* Takes over the terminal's size and what became of the rows there; covered: others wrote there.
 * Returns whether the text must be shown anew. */
static int fit(editor *e, size_t width, size_t height, int covered)
{
    width = width < 2 * SIGN ? 2 * SIGN : width;
    int resized = e->width && (width != e->width || height != e->height);
    e->aim = resized ? 0 : e->aim;
    e->width = width, e->height = height;
    if (covered || resized) {
        e->row = covered ? 0 : place_of(e, e->at).cell / width; /* terminals fold anew */
        e->top = e->row < height ? 0 : e->row - height + 1;
    }
    return covered || resized;
}

/* Waits until something was typed.  Ctrl-C puts the message away, which the arrow keys bring back.
 * A second Ctrl-C in a row leaves. */
static int wait_for_typed(editor *e, int *asked)
{
    int status = DONE, waits = e->raw && input_waits(0); /* it came before a Ctrl-C */
    int stopped = stop_asked && !waits;
    errno = EINTR;
    long got = ended_by || stopped ? -1 : read_terminal(e->typed, sizeof e->typed);
    int reason = errno;
    e->i = 0, e->n = got > 0 ? (size_t)got : 0;
    e->ended = got == 0;
    e->text.n = e->raw && e->ended ? 0 : e->text.n; /* a terminal that is gone ends no message */
    if (ended_by || (stopped && *asked))
        return INTERRUPTED;
    if (stopped) {
        stop_asked = 0; /* before the answer is shown: the next Ctrl-C is the second */
        if (e->raw)
            leave_text(e);
        flush_screen(e);
        fprintf(stderr, "%sCtrl-C once more leaves, and so does /exit.\n", e->raw ? "" : "\n");
        status = remember(e, e->text.items, e->text.n);
        begin_text(e);
    } else if (got < 0 && reason != EINTR)
        status = fail(FAILED, "cannot read standard input: %s", strerror(reason));
    else if (got < 0 && !e->in_paste) /* the key ESC itself */
        e->n_sequence = 0;
    *asked = stopped || (*asked && got < 0);
    return status;
}

/* Reads a message, of any length, without its last newline.  Where there is none the conversation
 * ends. */
static int read_message(program *p)
{
    editor *e = &p->editor;
    int status = DONE, asked = 0;
    begin_text(e);
    e->cut = 0;
    e->ahead = e->raw && (e->i < e->n || input_waits(0));
    while (status == DONE && !e->ended) {
        size_t width = 80, height = 24;
        patience = PATIENCE; /* before the prompt is shown */
        int covered = e->raw ? terminal_size(&width, &height) : 0;
        int is_new = fit(e, width, height, covered), was_typed = e->i < e->n;
        if (take_typed(e) || e->out.error || e->ended)
            break;
        if (e->raw && (is_new || was_typed) && !input_waits(0)) /* a long paste is shown once */
            draw(e, height);
        flush_screen(e);
        e->ahead &= !was_typed;
        status = wait_for_typed(e, &asked);
    }
    if (e->raw)
        leave_text(e);
    flush_screen(e);
    if (status == DONE && e->out.error)
        status = out_of_memory();
    p->leaves = status == DONE && e->ended && e->text.n == 0;
    if (e->cut) {
        e->text.n = 0;
        fprintf(stderr, "The terminal cuts a line at 4,095 bytes, so the end of this one may be "
                        "lost.  Put the\ntext into a file for -f or /read, or into shorter lines "
                        "that end in \\.\n");
    }
    return status ? status : append(&e->text, NULL, 0); /* a NUL */
}

/* The message without the """ around it, if there are. */
static const char *without_quotes(const char *text, size_t *n)
{
    size_t size = *n;
    const char *inside = trim(text, &size);
    if (size < 6 || memcmp(inside, "\"\"\"", 3) != 0 || memcmp(inside + size - 3, "\"\"\"", 3) != 0)
        return text;
    *n = size - 6;
    return inside + 3;
}

/* ---- the conversation: its turns, and what becomes of them ---- */

/* Learns the ids around a user's text, by example: what two texts that share no id have in
 * common. */
static int learn_frame(program *p, int is_first, frame *f)
{
    size_t held = p->ids.n, same = 0;
    int status = push_turn(p, "x", 1, is_first);
    size_t n = p->ids.n - held;
    status = status ? status : push_turn(p, "Y", 1, is_first);
    const int32_t *ids = (const int32_t *)p->ids.items + held;
    p->ids.n = held;
    while (status == DONE && same < n && ids[same] == ids[n + same])
        same++;
    f->before = same, f->behind = same + 1;
    f->ids.n = 0;
    void *copy = status ? NULL : extend(&f->ids, n, sizeof *ids);
    if (copy)
        memcpy(copy, ids, n * sizeof *ids);
    return status || copy ? status : out_of_memory();
}

static int learn_frames(program *p)
{
    int status = learn_frame(p, 1, &p->first);
    return status ? status : learn_frame(p, 0, &p->later);
}

/* The first place from `at` on where the ids of a frame from `from` to `to` stand, or the end. */
static size_t find_ids(const program *p, size_t at, const frame *f, size_t from, size_t to)
{
    const int32_t *ids = p->ids.items, *wanted = f->ids.items;
    for (; at + (to - from) <= p->ids.n && from < to; at++)
        if (memcmp(ids + at, wanted + from, (to - from) * sizeof *ids) == 0)
            return at;
    return p->ids.n;
}

/* Finds the turns of a conversation that was loaded, of which its file has the ids alone. */
static int find_turns(program *p)
{
    int status = DONE;
    size_t at = 0, end;
    const frame *f = &p->first;
    p->turns.n = 0;
    if (p->opts->system && find_ids(p, 0, f, 0, f->before) > 0) {
        p->settings->system = NULL;
        status = learn_frames(p);
        if (!p->opts->quiet)
            remark("warning: the loaded conversation did not begin with the system text, which is "
                   "left out");
    }
    p->first_stays = !p->opts->system;
    if (status != DONE || find_ids(p, 0, f, 0, f->before) > 0)
        return status;
    while ((end = find_ids(p, at + f->before, f, f->behind, f->ids.n)) < p->ids.n) {
        exchange *t = extend(&p->turns, 1, sizeof *t);
        if (!t)
            return out_of_memory();
        *t = (exchange){at, end + f->ids.n - f->behind};
        f = &p->later;
        at = find_ids(p, t->reply, f, 0, f->before);
    }
    return DONE;
}

static void forget_last_turn(program *p)
{
    const exchange *turns = p->turns.items;
    forget_after(p, turns[--p->turns.n].start);
    p->first_stays &= p->ids.n > 0;
}

/* Puts the first n ids of a first turn in the place of those from `from` to `to`, and the session
 * back to where it differs. */
static int retell(program *p, size_t from, size_t to, size_t n)
{
    size_t rest = p->ids.n - to, all = from + n + rest, same = 0;
    exchange *turns = p->turns.items;
    if (all > p->ids.n && !extend(&p->ids, all - p->ids.n, sizeof(int32_t)))
        return out_of_memory();
    int32_t *ids = p->ids.items;
    memmove(ids + from + n, ids + to, rest * sizeof *ids);
    if (n)
        memcpy(ids + from, p->first.ids.items, n * sizeof *ids);
    for (exchange *t = turns; t < turns + p->turns.n; t++) {
        t->start = t->start >= to ? t->start - to + from + n : t->start > from ? from : t->start;
        t->reply = t->reply >= to ? t->reply - to + from + n : t->reply;
    }
    const int32_t *held = gemma2_history(p->session);
    while (same < all && same < (size_t)gemma2_position(p->session) && ids[same] == held[same])
        same++;
    forget_after(p, same);
    p->ids.n = all;
    return DONE;
}

/* Drops the oldest turns until a quarter of the context is free, or only the last turn is left. */
static int drop_oldest(program *p)
{
    size_t context = (size_t)gemma2_context(p->session), before = p->turns.n;
    int status;
    do {
        exchange *turns = p->turns.items;
        size_t stay = p->first_stays && p->turns.n > 2 && turns[1].start <= context / 2;
        size_t from = stay ? turns[1].start : 0, n = stay ? 0 : p->first.before, to = stay, end;
        do
            end = turns[++to].start + (stay ? 0 : p->later.before);
        while (to + 1 < p->turns.n && from + n + p->ids.n - end > context / 4 * 3);
        p->first_stays = stay != 0;
        p->turns.n -= to - stay;
        memmove(turns + stay, turns + to, (p->turns.n - stay) * sizeof *turns);
        status = retell(p, from, end, n);
    } while (status == DONE && p->turns.n > 1 && p->ids.n >= context);
    if (status == DONE)
        fprintf(stderr, "%sThe context of %zu tokens is full, so the oldest turns are dropped: %zu "
                        "of %zu.\n", p->reply.finish == AT_CONTEXT ? "\n" : "", /* amid a reply */
                context, before - p->turns.n, before);
    return status;
}

/* The reply to the last turn, and what there is to say about it.  Where there is none, because it
 * was stopped or -n leaves no room for it, the conversation has its first `held` ids again. */
static int reply_to_turn(program *p, size_t held)
{
    const exchange *turns = p->turns.items;
    size_t context = (size_t)gemma2_context(p->session);
    int is_new = turns[p->turns.n - 1].start == held, status = make_reply(p);
    if (status != DONE && status != USAGE)
        return status;
    if (status == USAGE || (p->reply.finish == AT_INTERRUPT && p->reply.n_ids == 0)) {
        p->turns.n -= (size_t)is_new;
        forget_after(p, held);
        remark(is_new ? "The message is taken back%s." : "The old reply stays%s.",
               is_new && p->editor.raw ? "; the up arrow has it" : "");
        return DONE;
    }
    p->attached.n = is_new ? 0 : p->attached.n;
    if (p->reply.finish == AT_CONTEXT)
        fprintf(stderr, "The context of %zu tokens is full, so the reply ends here.%s\n", context,
                p->opts->full_drops ? "" : "  /undo or /clear makes room.");
    if (p->stats)
        print_speed(p);
    status = keep_shown(p);
    if (p->ids.n < context && context - p->ids.n < context / 8)
        fprintf(stderr, "%zu of %zu tokens of context are left.\n", context - p->ids.n, context);
    return status;
}

static size_t shortest_reply(const program *p)
{
    return p->constraint.shortest > 1 ? (size_t)p->constraint.shortest : 1;
}

/* A message that was typed, behind what /read has put before it. */
static int answer(program *p, const char *text, size_t n)
{
    size_t context = (size_t)gemma2_context(p->session), start = p->ids.n;
    size_t least = shortest_reply(p);
    p->asked = 0;
    exchange *t = extend(&p->turns, 1, sizeof *t);
    int status = t ? append(&p->attached, text, n) : out_of_memory();
    if (status == DONE)
        status = push_turn(p, p->attached.items, p->attached.n, start == 0);
    if (status != DONE)
        return status;
    p->attached.n -= n;
    *t = (exchange){start, p->ids.n};
    size_t alone = p->ids.n - start; /* without the turns before it */
    if (start > 0)
        alone += p->first.before - p->later.before;
    if ((can_drop(p) ? alone : p->ids.n) + least > context) {
        fprintf(stderr, "With this turn and the shortest reply the conversation has %zu tokens; "
                        "the context holds %zu.\nSay less, or /clear to start over.%s\n",
                p->ids.n + least, context,
                p->attached.n ? "  What /read has found is forgotten." : "");
        p->attached.n = 0;
        forget_last_turn(p);
        return DONE;
    }
    p->reply.finish = RUNNING; /* so nothing is dropped amid it */
    while (status == DONE && p->ids.n + least > context)
        status = drop_oldest(p);
    const exchange *turns = p->turns.items;
    return status ? status : reply_to_turn(p, turns[p->turns.n - 1].start);
}

/* Where the conversation stands, behind the name of the file that it comes from. */
static void show_where(const program *p, const char *path)
{
    remark("%s%s%zu turn%s, %zu of %" PRId32 " tokens of context", path, *path ? ": " : "",
           p->turns.n, p->turns.n == 1 ? "" : "s", p->ids.n, gemma2_context(p->session));
}

/* Reads the history's file, which is the history with a magic before it, and keeps its last
 * messages there, readable by its owner only. */
static int open_history(program *p)
{
    enum { MOST_MESSAGES = 1000, MOST_BYTES = 1 << 24 }; /* that are kept */
    const char *path = p->opts->history;
    array *history = &p->editor.history;
    int status = read_kept(path, HISTORY_MAGIC, "a history of messages", LONGEST_TEXT, 1, history);
    if (status == DONE && !history->n)
        status = append(history, HISTORY_MAGIC, MAGIC_BYTES);
    if (status == DONE && ((char *)history->items)[history->n - 1]) /* a torn message */
        status = append(history, "", 1);
    if (status != DONE)
        return status;
    size_t at = history->n, before;
    for (int kept = 0; kept < MOST_MESSAGES && at > MAGIC_BYTES; kept++, at = before) {
        before = message_before(history->items, at);
        if (history->n - before > MOST_BYTES)
            break;
    }
    p->editor.oldest = at;
    char *text = (char *)history->items + at - MAGIC_BYTES;
    memcpy(text, HISTORY_MAGIC, MAGIC_BYTES);
    return save_file("the history", path, text, history->n - at + MAGIC_BYTES);
}

/* Adds a message to the history and to its file. */
static int keep_in_history(program *p, const char *text, size_t n)
{
    const array *history = &p->editor.history;
    const char *path = p->opts->history;
    size_t held = history->n;
    int status = remember(&p->editor, text, n);
    if (!path || history->n == held)
        return status;
    FILE *file = open_path(path, "ab");
    int written = file && fwrite((char *)history->items + held, 1, n + 1, file) == n + 1;
    if (file)
        written &= fclose(file) == 0;
    if (!written)
        fail(FAILED, "cannot write to %s: %s", path, strerror(errno));
    return DONE;
}

/* ---- commands; a failure is said, and the conversation goes on ---- */

static int clear(program *p)
{
    forget_after(p, 0);
    p->turns.n = p->attached.n = 0;
    p->first_stays = 0;
    return DONE;
}

static int undo(program *p)
{
    if (!p->turns.n)
        return fail(DONE, "there is no turn to take back");
    forget_last_turn(p);
    remark("The last message and its reply are forgotten.");
    return DONE;
}

static int regenerate(program *p)
{
    const exchange *turns = p->turns.items;
    if (!p->turns.n)
        return fail(DONE, "there is no reply to make again");
    size_t held = p->ids.n, end = turns[p->turns.n - 1].reply;
    forget_after(p, end - 1); /* its last token is evaluated again, to have logits */
    p->ids.n = end;
    return reply_to_turn(p, held);
}

static int attach(program *p)
{
    const char *path = p->rest;
    size_t before = p->attached.n;
    int status = is_special(path) || strcmp(path, "-") == 0
        ? fail(FAILED, "%s is not a file that can hold text", path) : read_path(path, &p->attached);
    const char *bytes = (char *)p->attached.items + before;
    size_t n = p->attached.n - before;
    if (status == DONE && !kind_of(bytes, n)->is_text)
        status = fail(FAILED, "%s seems to be %s, not text", path, kind_of(bytes, n)->what);
    if (status == DONE && n && bytes[n - 1] != '\n')
        status = append(&p->attached, "\n", 1);
    if (status != DONE)
        p->attached.n = before;
    else
        remark("%zu bytes of %s go before the next message.", n, path);
    return DONE;
}

static int set_system(program *p)
{
    char err[512];
    const char *text = strcmp(p->rest, "-") == 0 ? "" : p->rest;
    gemma2_message turn[2] = {{GEMMA2_ROLE_SYSTEM, text, -1}, {GEMMA2_ROLE_USER, "x", 1}};
    size_t before = p->first.before, context = (size_t)gemma2_context(p->session);
    const char *was = p->opts->system;
    exchange *turns = p->turns.items;
    if (p->turns.n ? turns->start : p->ids.n)
        return fail(DONE, "the loaded conversation has turns that are not known, so its system "
                          "text stays; /clear starts another");
    if (*text && gemma2_chat_check(p->model, turn, 2, GEMMA2_CHAT_GENERATE, err, sizeof err) < 0)
        return fail(DONE, "%s", err);
    char *copy = *text ? copy_of(text) : NULL;
    if (*text && !copy)
        return out_of_memory();
    p->settings->system = copy;
    int status = learn_frames(p);
    size_t all = p->turns.n ? p->ids.n - before + p->first.before + 1 : 0;
    size_t least = p->first.ids.n + shortest_reply(p); /* of one short turn */
    all = all > least ? all : least;
    if (status == DONE && p->first.before > before && all > context) {
        p->settings->system = was;
        free(copy);
        fail(DONE, "with this system text and the shortest reply the conversation has %zu tokens; "
                   "the context holds %zu, so the old one stays", all, context);
        return learn_frames(p);
    }
    free(p->system);
    p->system = copy;
    remark(*text ? "The system text is changed." : "There is no system text now.");
    return status || !p->turns.n ? status : retell(p, 0, before, p->first.before);
}

/* Whether a conversation may change an option: it is about choosing tokens. */
static int is_setting(const option *o)
{
    size_t first = offsetof(options, sampler), field = o->field;
    return o->kind == SEED || field == offsetof(options, max_tokens) ||
           ((o->kind == WHOLE || o->kind == REAL) && field >= first &&
            field < first + sizeof(gemma2_sampler));
}

static int set(program *p)
{
    char name[48];
    const char *value, *rest = p->rest + strspn(p->rest, "-");
    const options before = *p->settings;
    size_t n = strcspn(rest, " \t=");
    snprintf(name, sizeof name, "%s%.*s", n > 1 ? "--" : "-", (int)n, rest);
    const char *meaning = foreign_meaning(name);
    const option *o = n ? find_option(meaning && *meaning == '-' ? meaning : name, &value) : NULL;
    value = rest + n + strspn(rest + n, " \t=");
    if (!o)
        unknown_option(name, "/show");
    else if (!is_setting(o))
        fail(USAGE, "/set changes nothing but the options that /show lists, so not --%s", o->name);
    else if (!set_option(p->settings, o, value)) {
        *p->settings = before;
        fail(USAGE, "/set %s '%s': it takes %s", o->name, value, o->takes);
    } else {
        p->seed = o->kind == SEED ? p->opts->seed : p->seed;
        settle_sampler(p, o->kind == SEED);
    }
    return DONE;
}

static int show(program *p)
{
    const options *opts = p->opts;
    show_where(p, "");
    if (p->attached.n)
        remark("%zu bytes that /read has found go before the next message", p->attached.n);
    if (opts->system)
        remark("system            %s", opts->system);
    else if (p->first_stays)
        remark("system            as in the loaded conversation, if there is one");
    for (const option *o = OPTIONS; o < OPTIONS + N_OPTIONS; o++) {
        const void *field = (const char *)opts + o->field;
        if (is_setting(o) && o->kind == SEED)
            fprintf(stderr, "%-18s%" PRIu64 "\n", o->name, p->seed);
        else if (is_setting(o) && o->kind == WHOLE)
            fprintf(stderr, "%-18s%" PRId32 "\n", o->name, *(const int32_t *)field);
        else if (is_setting(o))
            fprintf(stderr, "%-18s%g\n", o->name, (double)*(const float *)field);
    }
    return DONE;
}

static int save(program *p)
{
    const char *path = p->rest;
    array head = {0};
    int status = read_kept(path, SESSION_MAGIC, "a saved session", 0, 1, &head);
    free(head.items);
    if (status == DONE && !p->ids.n)
        status = fail(FAILED, "there is nothing to save yet");
    if (status == DONE && save_session(p, path) == DONE)
        remark("Saved as %s; /load, --load and --session go on from it.", path);
    return DONE;
}

static int load(program *p)
{
    if (load_session(p, p->rest, 0) != DONE)
        return DONE;
    int status = find_turns(p);
    if (status == DONE)
        show_where(p, p->rest);
    return status;
}

static int stats(program *p)
{
    p->stats = !p->stats;
    if (p->stats && p->reply.n_ids)
        print_speed(p);
    remark(p->stats ? "Speed and tokens are shown after each reply." : "Speed is no longer shown.");
    return DONE;
}

static int leave(program *p)
{
    p->leaves = 1;
    return DONE;
}

/* A message from the person's own editor, which begins with the text given. */
static int edit(program *p)
{
    char base[SENTENCE / 2], name[SENTENCE];
    const char *folder = getenv("TMPDIR");
    editor *e = &p->editor;
    folder = folder ? folder : getenv("TEMP");
    snprintf(base, sizeof base, "%s/gemma2-message", folder ? folder : "/tmp");
    FILE *file = open_beside(base, name, sizeof name);
    if (!file)
        return fail(DONE, "cannot make a file in %s: %s", base, strerror(errno));
    int written = fputs(p->rest, file) >= 0, status = DONE;
    if (fclose(file) != 0 || !written)
        status = fail(FAILED, "cannot write to %s: %s", name, strerror(errno));
    terminal_restore();
    int gave_up = status == DONE && edit_file(name);
    e->raw = e->raw && terminal_raw();
    if (gave_up)
        status = fail(FAILED, "the editor failed, so nothing is sent; set EDITOR to another");
    p->prompt.n = 0;
    status = status ? status : read_path(name, &p->prompt);
    remove_path(name);
    size_t n = p->prompt.n;
    const char *message = trim(p->prompt.items, &n);
    if (status == DONE && n == 0)
        remark("The message is empty, so nothing is sent.");
    if (status != DONE || n == 0)
        return DONE;
    begin_text(e);
    insert(e, message, n);
    if (e->raw)
        leave_text(e);
    else
        put_format(&e->out, "(%zu bytes)\n", n);
    flush_screen(e);
    status = keep_in_history(p, message, n);
    return status ? status : answer(p, message, n);
}

static int help(program *p);

static const struct {
    const char *name, *argument, *help;
    int (*run)(program *p);
} COMMANDS[] = {
    {"help", "", "this list", help},
    {"clear", "", "start over", clear},
    {"undo", "", "take back the last message and its reply", undo},
    {"regen", "", "draw the last reply anew", regenerate},
    {"edit", "[TEXT]", "write a message in $EDITOR", edit},
    {"read", "FILE", "put a file's text before the next message", attach},
    {"system", "TEXT or -", "other instructions, or none, from the first message on", set_system},
    {"set", "NAME VALUE", "change temperature, top-k, seed, max-tokens and others", set},
    {"show", "", "these settings, turns and tokens", show},
    {"save", "FILE", "keep the conversation in a file", save},
    {"load", "FILE", "go on from such a file", load},
    {"stats", "", "show speed and tokens after each reply, or no longer", stats},
    {"exit", "", "leave; also /quit, /bye, Ctrl-D", leave},
    {"quit", "", NULL, leave},
    {"bye", "", NULL, leave},
};
enum { N_COMMANDS = sizeof COMMANDS / sizeof *COMMANDS };

static int help(program *p)
{
    (void)p;
    for (size_t i = 0; i < N_COMMANDS; i++)
        if (COMMANDS[i].help)
            fprintf(stderr, "  /%s %-*s%s\n", COMMANDS[i].name, 18 - (int)strlen(COMMANDS[i].name),
                    COMMANDS[i].argument, COMMANDS[i].help);
    fputs("A message of several lines: Alt-Enter, a \\ at the end of a line, or \"\"\" around\n"
          "them; a pasted text is one message.  //x says /x.  Ctrl-C stops a reply.\n", stderr);
    return DONE;
}

static int run_command(program *p, const char *text)
{
    size_t n = strcspn(text, " \t"), best = 0, least = SIZE_MAX;
    char name[32];
    const char *rest = text + n + strspn(text + n, " \t");
    snprintf(name, sizeof name, "%.*s", (int)n, text);
    for (size_t i = 0; n && n < sizeof name && i < N_COMMANDS; i++) {
        size_t distance = edit_distance(name, COMMANDS[i].name);
        if (strncmp(name, COMMANDS[i].name, n) == 0)
            distance = distance > 0;
        if (distance < least)
            least = distance, best = i;
    }
    int is_near = least < 2 || 2 * least < n;
    if (least > 0)
        return fail(DONE, "unknown command /%s%s%s; /help lists all, and //%s sends /%s", name,
                    is_near ? "; the nearest is /" : "", is_near ? COMMANDS[best].name : "", name,
                    name);
    if (!*COMMANDS[best].argument && *rest)
        return fail(DONE, "/%s takes nothing", name);
    if (isalpha((unsigned char)*COMMANDS[best].argument) && !*rest)
        return fail(DONE, "/%s needs %s", name, COMMANDS[best].argument);
    p->rest = rest;
    return COMMANDS[best].run(p);
}

/* Does what the message that was typed asks for. */
static int take_message(program *p)
{
    size_t size = p->editor.text.n, n;
    const char *text = without_quotes(p->editor.text.items, &size);
    size_t slash = *text == '/' && size == p->editor.text.n && !memchr(text, '\n', size);
    int status = keep_in_history(p, text, n = size);
    if (status == DONE && slash && text[1] != '/')
        return run_command(p, text + 1);
    trim(text, &n);
    return status || n == 0 ? status : answer(p, text + slash, size - slash);
}

/* A conversation on a terminal.  The prompt sign and all remarks go to standard error. */
static int converse(program *p)
{
    size_t context = (size_t)gemma2_context(p->session);
    int status = learn_frames(p);
    if (status == DONE && p->ids.n)
        status = find_turns(p);
    size_t n = p->first.ids.n; /* of one short turn */
    if (status == DONE && n >= context)
        status = fail(USAGE, "the shortest conversation%s has %zu tokens and the context holds "
                      "%zu; raise --context%s", p->opts->system ? " with this system text" : "",
                      n + 1, context, p->opts->system ? " or shorten the text" : "");
    status = status ? status : start_constraint(p, n);
    p->editor.raw = status == DONE && terminal_raw();
    status = status || !p->opts->history ? status : open_history(p);
    if (status != DONE)
        return status;
    if (!p->opts->quiet)
        fprintf(stderr, "/help shows the commands, /exit or Ctrl-D leaves, Ctrl-C stops a reply; "
                        "a\npasted text is one message.\n");
    if (!p->opts->quiet && p->sampler.temperature > 0)
        fprintf(stderr, "seed %" PRIu64 "\n", p->seed);
    if (status == DONE && p->ids.n && !p->opts->quiet)
        show_where(p, p->opts->kept ? p->opts->kept : p->opts->loaded);
    while (status == DONE && !p->out.error && !p->leaves) {
        status = read_message(p);
        if ((p->leaves || status == INTERRUPTED) && !p->editor.raw)
            fputc('\n', stderr);
        if (status == DONE && !p->leaves)
            status = take_message(p);
        int at_end = p->editor.ended && !p->editor.raw; /* nobody can be asked */
        if (status != DONE || !p->leaves || !p->opts->kept || p->asked || at_end)
            continue;
        if (save_session(p, p->opts->kept) == DONE) {
            p->settings->kept = NULL; /* once is enough */
            break;
        }
        remark("/save FILE puts it elsewhere; leaving once more loses what is not saved.");
        p->leaves = p->editor.ended = 0;
        p->asked = 1;
    }
    terminal_restore();
    return status;
}

static int tokenize(program *p)
{
    int status = load_prompt(p);
    if (status != DONE)
        return status;
    warn_of_prompt(p);
    const int32_t *ids = p->ids.items;
    put_format(&p->out, p->opts->json ? "{\"ids\": [" : "");
    put_ids(&p->out, ids, p->ids.n, p->opts->json ? ", " : " ");
    put_format(&p->out, p->opts->json ? "], \"pieces\": [" : "");
    for (size_t i = 0; p->opts->json && i < p->ids.n; i++) {
        put_format(&p->out, i ? ", " : "");
        put_piece(p, ids[i]);
    }
    put_format(&p->out, p->opts->json ? "]}\n" : "\n");
    return DONE;
}

static int detokenize(program *p)
{
    int status = push_list(p, p->opts->subject);
    if (status == DONE)
        status = decode_ids(p, p->ids.items, p->ids.n, &p->prompt);
    if (status == DONE)
        put_text(&p->out, p->prompt.items, p->prompt.n);
    return status;
}

static int by_logit(const void *left, const void *right)
{
    const gemma2_candidate *a = left, *b = right;
    if (a->logprob != b->logprob)
        return a->logprob < b->logprob ? 1 : -1;
    return (a->id > b->id) - (a->id < b->id);
}

/* The logits themselves, best first: gemma2_top_logprobs is slow for all of a vocabulary. */
static int best_logits(program *p)
{
    size_t n = (size_t)p->config->n_vocab, most = (size_t)p->opts->logits, n_finite = 0;
    gemma2_candidate *ranked = malloc(sizeof *ranked * n);
    int status = ranked ? prefill(p) : out_of_memory(), as_json = p->opts->json;
    for (size_t i = 0; i < n && status == DONE; i++) {
        ranked[i] = (gemma2_candidate){(int32_t)i, p->logits[i]};
        n_finite += !!isfinite(p->logits[i]);
    }
    if (status == DONE && n_finite != (size_t)p->config->n_kept)
        status = engine_failed(p, "reading the prompt", GEMMA2_ERR_NONFINITE);
    if (status == DONE)
        qsort(ranked, n, sizeof *ranked, by_logit);
    for (size_t i = 0; status == DONE && i < most && i < n_finite; i++) {
        put_format(&p->out, as_json ? "%s{\"id\": %" PRId32 ", \"logit\": %.9g, \"piece\": "
                                    : "%.0s%" PRId32 "\t%.9g\t",
                   i ? ", " : "{\"logits\": [", ranked[i].id, (double)ranked[i].logprob);
        put_piece(p, ranked[i].id);
        put_format(&p->out, as_json ? "}" : "\n");
    }
    if (status == DONE && as_json)
        put_format(&p->out, "]}\n");
    free(ranked);
    return status;
}

/* ---- --trace: the steps of a pass, with what they are and where that is written ---- */

/* Sources: the report is arXiv 2408.00118, the code transformers' modeling_gemma2.py. */
static const struct {
    const char *step, *formula, *source;
} STEPS[] = {
    {"embedding", "x = E[id] * sqrt(D)", "Gemma2TextScaledWordEmbedding.forward"},
    {"attn_norm", "RMSNorm(x) * (1 + w)", "Gemma2DecoderLayer.input_layernorm, report 2: pre-norm"},
    {"q", "RoPE(h Wq) * scale",
     "Gemma2Attention.q_proj, apply_rotary_pos_emb, Gemma2Attention.scaling"},
    {"k", "RoPE(h Wk)",
     "Gemma2Attention.k_proj, apply_rotary_pos_emb, report 2: grouped-query attention"},
    {"v", "h Wv", "Gemma2Attention.v_proj"},
    {"attn", "softmax(c tanh(q k / c)) v, in the window",
     "eager_attention_forward, report 2: sliding window and soft-capping"},
    {"o", "a Wo", "Gemma2Attention.o_proj"},
    {"post_attn_norm", "RMSNorm(o) * (1 + w)",
     "Gemma2DecoderLayer.post_attention_layernorm, report 2: post-norm"},
    {"attn_residual", "x = x + o", "Gemma2DecoderLayer.forward"},
    {"ffn_norm", "RMSNorm(x) * (1 + w)", "Gemma2DecoderLayer.pre_feedforward_layernorm"},
    {"geglu", "GELU(h Wgate) * (h Wup)", "Gemma2MLP.forward, report 2: GeGLU"},
    {"down", "g Wdown", "Gemma2MLP.down_proj"},
    {"post_ffn_norm", "RMSNorm(f) * (1 + w)", "Gemma2DecoderLayer.post_feedforward_layernorm"},
    {"residual", "x = x + f", "Gemma2DecoderLayer.forward"},
    {"final_norm", "RMSNorm(x) * (1 + w)", "Gemma2Model.norm"},
    {"logits", "c tanh(h E' / c)", "Gemma2ForCausalLM.forward, report 2: soft-capping"},
};

enum { N_LENS = 5, FIRST_VALUES = 4 };

/* What the hooks of a trace share. */
typedef struct {
    program *p;
    float *residuals;       /* [L][D]: the last token's after each layer */
    gemma2_candidate *best; /* [L][N_LENS]: its best next tokens */
    double last;            /* when the step before ended */
    size_t seen;            /* tokens up to this pass: the reference takes one token at a time */
} tracer;

static int is_step(const gemma2_activation *a, const char *step) { return !strcmp(a->name, step); }
static float *last_row(const gemma2_activation *a) { return a->data + (a->rows - 1) * a->cols; }

static void keep_residual(void *context, const gemma2_activation *a)
{
    tracer *t = context;
    if (is_step(a, "residual"))
        memcpy(t->residuals + (size_t)a->layer * a->cols, last_row(a), a->cols * sizeof(float));
}

/* Bytes of weights that a step reads; most steps have the name of their weights.  A token reads one
 * row of the embedding, and the logits all of it where there is no other head. */
static uint64_t bytes_read(const program *p, const gemma2_activation *a)
{
    uint64_t bytes = 0, embedding = 0, row = 0;
    gemma2_section s;
    for (size_t i = 0; gemma2_get_section(p->model, i, &s); i++) {
        if (strcmp(s.role, "embedding") == 0)
            embedding = s.bytes, row = s.bytes / s.rows;
        else if (s.layer >= 0 && s.layer != a->layer)
            continue;
        else if (is_step(a, s.role) || (is_step(a, "logits") && !strcmp(s.role, "head")) ||
                 (is_step(a, "geglu") && (!strcmp(s.role, "gate") || !strcmp(s.role, "up"))))
            bytes += s.bytes;
    }
    if (is_step(a, "embedding"))
        return row * a->rows;
    if (p->config->n_kept < p->config->n_vocab)
        embedding = row * (uint64_t)p->config->n_kept;
    return is_step(a, "logits") && !bytes ? embedding : bytes;
}

static void print_rows(program *p, const gemma2_activation *a, size_t first)
{
    for (size_t i = 0; i < a->rows; i++) {
        put_format(&p->out, "%s[%zu]", a->name, first + i);
        for (size_t c = 0; c < a->cols; c++)
            put_format(&p->out, " %.9g", (double)a->data[i * a->cols + c]);
        put_bytes(&p->out, "\n", 1);
    }
}

/* The lines of a step, about the last token's row. */
static void print_step(const tracer *t, const gemma2_activation *a, double spent)
{
    program *p = t->p;
    output *out = &p->out;
    const float *x = last_row(a);
    double squares = 0;
    size_t i = 0;
    char size[32];
    while (i + 1 < sizeof STEPS / sizeof *STEPS && !is_step(a, STEPS[i].step))
        i++;
    for (size_t c = 0; c < a->cols; c++)
        squares += (double)x[c] * (double)x[c];
    if (is_step(a, "attn_norm"))
        put_format(out, "layer %" PRId32 ", %s\n", a->layer,
                   p->config->is_local[a->layer] ? "local" : "global");
    put_format(out, "%-15s[%zu, %zu]\tnorm %.6g\t", a->name, a->rows, a->cols, sqrt(squares));
    for (size_t c = 0; c < FIRST_VALUES && c < a->cols; c++)
        put_format(out, "%.5g ", (double)x[c]);
    format_bytes(size, bytes_read(p, a));
    put_format(out, "..\t%s\t%.3f ms\t%s\t(%s)\n", size, 1e3 * spent, STEPS[i].formula,
               STEPS[i].source);
    if (!is_step(a, "residual"))
        return;
    put_format(out, "best next");
    for (int32_t k = 0; k < N_LENS && k < p->config->n_kept; k++) {
        put_bytes(out, " ", 1);
        put_piece(p, t->best[a->layer * N_LENS + k].id);
    }
    put_bytes(out, "\n", 1);
}

static void show_step(void *context, const gemma2_activation *a)
{
    tracer *t = context;
    double spent = seconds() - t->last;
    int32_t layer = t->p->opts->trace_layer;
    t->seen += is_step(a, "embedding") ? a->rows : 0;
    if (layer < 0 && t->seen == t->p->ids.n)
        print_step(t, a, spent);
    else if (layer >= 0 && layer == a->layer)
        print_rows(t->p, a, t->seen - a->rows);
    t->last = seconds();
}

/* Evaluates the prompt, each step with the hook. */
static int traced_pass(tracer *t, gemma2_hook *hook)
{
    program *p = t->p;
    gemma2_rewind(p->session, 0);
    gemma2_set_hook(p->session, hook, t);
    t->last = seconds();
    int code = gemma2_eval(p->session, p->ids.items, p->ids.n, p->logits);
    gemma2_set_hook(p->session, NULL, NULL);
    return code < 0 ? engine_failed(p, "tracing", code) : DONE;
}

/* Prints the steps of the prompt's pass: the shape, and of the last token's row the norm and the
 * first values.  A pass before it says what the best next tokens are after each layer. */
static int trace(program *p)
{
    enum { MOST = 256 };
    size_t n_layers = (size_t)p->config->n_layers, d = (size_t)p->config->d_model;
    if (p->ids.n > MOST)
        return fail(USAGE, "--trace is for a short prompt of at most %d tokens, and this one has "
                    "%zu", MOST, p->ids.n);
    if (p->opts->trace_layer >= p->config->n_layers)
        return fail(USAGE, "--trace-layer %" PRId32 ": the model has %" PRId32 " layers, from 0 on",
                    p->opts->trace_layer, p->config->n_layers);
    tracer t = {.p = p, .residuals = malloc(sizeof *t.residuals * n_layers * d),
                .best = calloc(n_layers * N_LENS, sizeof *t.best)};
    int status = t.residuals && t.best ? traced_pass(&t, keep_residual) : out_of_memory();
    for (size_t l = 0; l < n_layers && status == DONE; l++) {
        int code = gemma2_read_out(p->session, t.residuals + l * d, p->logits);
        if (code >= 0)
            code = gemma2_top_logprobs(p->logits, (size_t)p->config->n_vocab, t.best + l * N_LENS,
                                       N_LENS);
        status = code < 0 ? engine_failed(p, "tracing", code) : DONE;
    }
    if (status == DONE && p->opts->trace_layer < 0)
        put_format(&p->out, "step [tokens, values], norm and first values of the last token, "
                   "weights read, time, formula\n"
                   "(report: arXiv 2408.00118; names: transformers, modeling_gemma2.py)\n");
    if (status == DONE)
        status = traced_pass(&t, show_step);
    free(t.residuals);
    free(t.best);
    return status;
}

/* ---- texts that are judged: scores, states, perplexity, importance ---- */

/* A log-probability, which may be -infinity, of which JSON knows nothing. */
static void put_log(program *p, double x)
{
    if (isfinite(x))
        put_format(&p->out, "%.9g", x);
    else
        put_format(&p->out, p->opts->json ? "null" : "-inf");
}

static int score(program *p)
{
    const int32_t *ids = p->ids.items;
    size_t n = p->ids.n - 1;
    int as_json = p->opts->json;
    double total = 0;
    output *out = &p->out;
    float *logprobs = extend(&p->reply.logprobs, n, sizeof *logprobs);
    if (!logprobs)
        return out_of_memory();
    int code = n ? gemma2_score(p->session, ids, n, ids[n], logprobs) : GEMMA2_OK;
    if (code < 0)
        return engine_failed(p, "scoring", code);
    put_format(out, as_json ? "{\"logprobs\": [" : "");
    for (size_t i = 0; i < n; i++) {
        total += (double)logprobs[i];
        if (as_json)
            put_format(out, i ? ", " : "");
        else
            put_format(out, "%" PRId32 "\t", ids[i + 1]);
        put_log(p, (double)logprobs[i]);
        put_format(out, as_json ? "" : "\n");
    }
    put_format(out, as_json ? "], \"ids\": [" : "total\t");
    if (as_json) {
        put_ids(out, ids + 1, n, ", ");
        put_format(out, "], \"total\": ");
    }
    put_log(p, total);
    put_format(out, as_json ? "}\n" : "\n");
    return DONE;
}

/* The prompt's states after the final norm, a piece at a time: their mean, or the last one,
 * which also leads to the scores of a reward model. */
static int embed(program *p)
{
    size_t d = (size_t)p->config->d_model, n_scores = (size_t)p->config->n_scores, n_out = d;
    int is_reward = p->opts->mode == REWARD, is_mean = p->opts->mean && !is_reward;
    float *states = malloc((PREFILL_PIECE * d + n_scores) * sizeof *states), *last = states;
    double *sums = calloc(d, sizeof *sums);
    int code = states && sums ? GEMMA2_OK : GEMMA2_ERR_MEMORY;
    for (size_t at = 0, n; code >= 0 && at < p->ids.n; at += n) {
        n = p->ids.n - at < PREFILL_PIECE ? p->ids.n - at : PREFILL_PIECE;
        code = gemma2_states(p->session, (const int32_t *)p->ids.items + at, n, states);
        last = states + (n - 1) * d;
        for (size_t i = 0; is_mean && i < n * d; i++)
            sums[i % d] += (double)states[i] / (double)p->ids.n;
    }
    if (code >= 0 && is_reward) {
        code = gemma2_scores(p->session, last, states + PREFILL_PIECE * d);
        last = states + PREFILL_PIECE * d, n_out = n_scores;
    }
    for (size_t i = 0; code >= 0 && i < n_out; i++)
        put_format(&p->out, "%s%.9g", i ? ", " : "[", is_mean ? sums[i] : (double)last[i]);
    put_format(&p->out, code < 0 ? "" : "]\n");
    free(states), free(sums);
    return code < 0 ? engine_failed(p, "evaluating the prompt", code) : DONE;
}

/* Sums over the scored tokens of all chunks so far. */
typedef struct {
    double sum, squares; /* of negative log-probabilities */
    size_t n;
} tally;

static double perplexity_of(const tally *t, double *error)
{
    double mean = t->sum / (double)t->n, variance = t->squares / (double)t->n - mean * mean;
    *error = variance > 0 ? exp(mean) * sqrt(variance / (double)(t->n - 1)) : 0;
    return exp(mean);
}

/* Adds one chunk of n tokens: ids[n/2 + 1 .. n - 1], each given all before it. */
static int tally_chunk(program *p, const int32_t *ids, size_t n, tally *t)
{
    size_t half = n / 2, rest = n - 1 - half;
    p->reply.logprobs.n = 0;
    float *logprobs = extend(&p->reply.logprobs, rest, sizeof *logprobs);
    if (!logprobs)
        return out_of_memory();
    gemma2_rewind(p->session, 0);
    int code = gemma2_eval(p->session, ids, half, NULL);
    if (code >= 0)
        code = gemma2_score(p->session, ids + half, rest, ids[n - 1], logprobs);
    for (size_t i = 0; code >= 0 && i < rest; i++) {
        t->sum -= (double)logprobs[i];
        t->squares += (double)logprobs[i] * (double)logprobs[i];
    }
    t->n += rest;
    if (code >= 0 && !isfinite(t->sum))
        return fail(FAILED, "%s has a token that this model cannot write, for it has kept only a "
                            "part of its vocabulary: judge a text by the whole model",
                    p->opts->subject);
    return code < 0 ? engine_failed(p, "scoring", code) : DONE;
}

static int perplexity(program *p)
{
    size_t length = (size_t)gemma2_context(p->session);
    if (length < 3)
        return fail(USAGE, "--perplexity needs chunks of 3 tokens or more");
    int status = p->config->bos >= 0 ? push_id(p, p->config->bos) : DONE;
    if (status == DONE)
        status = read_path(p->opts->subject, &p->prompt);
    if (status == DONE)
        status = push_text(p, p->prompt.items, p->prompt.n, 0);
    if (status == DONE && p->ids.n < 2 * length)
        status = fail(USAGE, "%s has %zu tokens; chunks of %zu need %zu", p->opts->subject,
                      p->ids.n, length, 2 * length);
    size_t n_chunks = p->ids.n / length;
    tally t = {0, 0, 0};
    double value = 0, error = 0;
    for (size_t i = 0; i < n_chunks && status == DONE; i++) {
        int32_t *ids = (int32_t *)p->ids.items + i * length;
        if (p->config->bos >= 0)
            *ids = p->config->bos;
        status = tally_chunk(p, ids, length, &t);
        value = perplexity_of(&t, &error);
        show_progress(p, "[%zu/%zu] %.4f", i + 1, n_chunks, value);
        if (!p->shows_progress && !p->opts->quiet && status == DONE)
            fprintf(stderr, "[%zu/%zu] %.4f\n", i + 1, n_chunks, value);
    }
    clear_progress(p);
    if (status != DONE)
        return status;
    if (!p->opts->quiet)
        fprintf(stderr, "%zu chunks of %zu tokens, %zu scored\n", n_chunks, length, t.n);
    put_format(&p->out, "perplexity\t%.4f\t+/-\t%.5f\n", value, error);
    return DONE;
}

/* The file of --importance, as section 2 of gemma2.c describes it, written under a temporary
 * name. */
enum { IMPORTANCE_HEADER = 64 };

/* Numbers as the CPU has them: the library runs on little-endian CPUs alone. */
static void importance_header(const program *p, uint32_t block, uint8_t header[IMPORTANCE_HEADER])
{
    const gemma2_config *c = p->config;
    const uint32_t start[] = {1, block};
    const int32_t sizes[] = {c->n_layers, c->d_model, c->n_heads, c->n_kv_heads, c->head_dim,
                             c->d_ffn, c->n_vocab};
    uint64_t tokens = p->ids.n;
    memset(header, 0, IMPORTANCE_HEADER);
    memcpy(header, IMPORTANCE_MAGIC, MAGIC_BYTES);
    memcpy(header + 8, start, sizeof start);
    memcpy(header + 16, sizes, sizeof sizes);
    memcpy(header + 48, &tokens, sizeof tokens);
}

/* Memory holds room for the header, then n sums; these become the file in their own place. */
static int save_importance(program *p, uint32_t block, double *memory, size_t n)
{
    const double *sums = memory + IMPORTANCE_HEADER / sizeof *memory;
    uint8_t *image = (uint8_t *)memory;
    for (size_t i = 0; i < n; i++) {
        float mean = (float)(sums[i] / (double)p->ids.n);
        if (!isfinite(mean))
            return fail(FAILED,
                        "the model's activations are not finite; its weights are damaged");
        memcpy(image + IMPORTANCE_HEADER + 4 * i, &mean, sizeof mean);
    }
    importance_header(p, block, image);
    return save_file("the importance", p->opts->subject, image, IMPORTANCE_HEADER + 4 * n);
}

/* A file that is there and no importance is not replaced: a slip would cost a model. */
static int check_target(const program *p)
{
    const char *path = p->opts->subject;
    array head = {0};
    int status = read_kept(path, IMPORTANCE_MAGIC, "an importance file", 0, 1, &head);
    free(head.items);
    return status ? status : save_file("the importance", path, NULL, 0);
}

static int importance(program *p)
{
    gemma2_input last;
    size_t length = (size_t)gemma2_context(p->session);
    size_t columns = 0, n = 0;
    uint32_t block = p->opts->block ? (uint32_t)p->opts->block : 1;
    int status = check_target(p);
    if (status == DONE)
        status = load_prompt(p);
    if (status != DONE)
        return status;
    while (gemma2_get_input(p->model, n++, &last))
        columns = (size_t)last.first + last.cols;
    if (p->ids.n < 2)
        return fail(USAGE, "--importance needs a text: give a file of some 100 KB with -f");
    size_t header = IMPORTANCE_HEADER / sizeof(double);
    int fits = columns <= (SIZE_MAX / sizeof(double) - header) / block;
    double *memory = fits ? calloc(header + columns * block, sizeof *memory) : NULL;
    if (!memory)
        return fail(FAILED, "out of memory: choose a smaller --importance-block");
    int32_t *ids = p->ids.items;
    size_t n_chunks = (p->ids.n + length - 1) / length;
    for (size_t i = 0; i < n_chunks && status == DONE; i++) {
        size_t at = i * length, left = p->ids.n - at;
        show_progress(p, "importance: %zu of %zu chunks", i, n_chunks);
        if (p->config->bos >= 0)
            ids[at] = p->config->bos;
        gemma2_rewind(p->session, 0);
        int code = gemma2_importance(p->session, ids + at, left < length ? left : length, block,
                                     memory + header);
        status = code < 0 ? engine_failed(p, "reading the text", code) : DONE;
    }
    clear_progress(p);
    if (status == DONE)
        status = save_importance(p, block, memory, columns * block);
    free(memory);
    if (status == DONE && !p->opts->quiet)
        remark("%s: %zu tokens", p->opts->subject, p->ids.n);
    return status;
}

/* Where a model comes from: lines, or members of an object. */
static void put_facts(program *p)
{
    static const char *const keys[] = {"name", "source", "license", "export"};
    for (size_t i = 0, n; i < sizeof keys / sizeof keys[0]; i++) {
        const char *value = gemma2_fact(p->model, keys[i], &n);
        if (value && p->opts->json) {
            put_format(&p->out, ", \"%s\": \"", keys[i]);
            put_json(&p->out, value, n);
            put_bytes(&p->out, "\"", 1);
        } else if (value) {
            const char *newline = memchr(value, '\n', n);
            put_format(&p->out, "%s: ", keys[i]);
            put_printable(&p->out, value, newline ? (size_t)(newline - value) : n);
            put_bytes(&p->out, "\n", 1);
        }
    }
}

static void put_identity(program *p)
{
    for (size_t i = 0; i < sizeof p->config->identity; i++)
        put_format(&p->out, "%02x", p->config->identity[i]);
}

static void put_architecture(program *p)
{
    const gemma2_config *c = p->config;
    output *out = &p->out;
    put_format(out, "layers: %" PRId32 ", width %" PRId32 ", ffn %" PRId32 "\n", c->n_layers,
               c->d_model, c->d_ffn);
    put_format(out, "heads: %" PRId32 " query, %" PRId32 " key/value, head_dim %" PRId32 "\n",
               c->n_heads, c->n_kv_heads, c->head_dim);
    put_format(out, "attention: ");
    for (int32_t l = 0; l < c->n_layers; l++)
        put_bytes(out, c->is_local[l] ? "L" : "G", 1);
    put_format(out, " (L local, window %" PRId32 "; G global)\n", c->window);
    put_format(out, "soft-caps: attention %g, final %g (0 is off)\n", (double)c->attn_softcap,
               (double)c->final_softcap);
    put_format(out, "scales: query %.9g, embedding %.9g, rope theta %g, norm eps %g\n",
               (double)c->query_scale, (double)c->embedding_scale, c->rope_theta,
               (double)c->rms_norm_eps);
    put_format(out, "trained context: %" PRId32 "\n", c->n_context);
}

/* A conversation as the chat template writes it, control pieces by their names. */
static int put_turns(program *p)
{
    gemma2_message talk[] = {{GEMMA2_ROLE_SYSTEM, "SYSTEM", 6}, {GEMMA2_ROLE_USER, "USER", 4},
                             {GEMMA2_ROLE_MODEL, "MODEL", 5}};
    char err[512];
    int bare = gemma2_chat_check(p->model, talk, 3, 0, err, sizeof err) < 0;
    put_format(&p->out, "chat: ");
    p->ids.n = 0;
    if (bare && gemma2_chat_check(p->model, talk + 1, 2, 0, err, sizeof err) < 0) {
        put_format(&p->out, "%s\n", err);
        return DONE;
    }
    int status = push_encoded(p, talk + bare, bare ? 2 : 3, 0);
    put_bytes(&p->out, "\"", 1);
    for (size_t i = 0; i < p->ids.n && status == DONE; i++) {
        const int32_t *id = (const int32_t *)p->ids.items + i;
        int type;
        size_t n;
        const char *text = gemma2_piece(p->model, *id, &n, &type);
        if (type != GEMMA2_PIECE_CONTROL) {
            p->prompt.n = 0;
            status = decode_ids(p, id, 1, &p->prompt);
            text = p->prompt.items, n = p->prompt.n;
        }
        if (status == DONE)
            put_json(&p->out, text, n);
    }
    if (status == DONE)
        put_format(&p->out, bare ? "\", and no place for system text\n" : "\"\n");
    return status;
}

/* One line for each type of section: how many, how many values, how many bytes. */
static void put_sections(program *p)
{
    static const char *const types[] = {"bytes", "f32", "bf16", "q8", "q6", "q4", "q3"};
    for (size_t t = 0; t < sizeof types / sizeof types[0]; t++) {
        uint64_t count = 0, values = 0, bytes = 0;
        gemma2_section section;
        for (size_t i = 0; gemma2_get_section(p->model, i, &section); i++) {
            if (strcmp(section.type, types[t]) != 0)
                continue;
            count++;
            values += section.rows * section.cols;
            bytes += section.bytes;
        }
        char size[32];
        format_bytes(size, bytes);
        if (count && t == 0)
            put_format(&p->out, "sections of bytes: %" PRIu64 ", %s\n", count, size);
        else if (count)
            put_format(&p->out, "sections of %s: %" PRIu64 ", %" PRIu64 " values, %s\n", types[t],
                       count, values, size);
    }
}

static int plan_failed(int32_t context, int code)
{
    return fail(USAGE, "a context of %" PRId32 " tokens cannot be had: at most 1073741824 and what "
                "memory can hold (%s)", context, gemma2_error_string(code));
}

/* "weights 2.6 GiB mapped, cache ...": what running will take. */
static int memory_plan(const program *p, const gemma2_session_params *params, char text[160])
{
    gemma2_plan plan;
    char weights[32], cache[32], scratch[32];
    int code = gemma2_session_plan(p->model, params, &plan);
    if (code < 0)
        return plan_failed(params->n_context, code);
    format_bytes(weights, plan.weights);
    format_bytes(cache, plan.cache);
    format_bytes(scratch, plan.scratch);
    int32_t context = params->n_context ? params->n_context : p->config->n_context;
    snprintf(text, 160, "weights %s mapped, cache %s for %" PRId32 " tokens, scratch %s", weights,
             cache, context, scratch);
    return DONE;
}

/* What each type of cache takes. */
static void put_caches(program *p)
{
    static const char *const names[] = {"auto", "f32", "f16", "q8"}; /* by GEMMA2_CACHE_* */
    gemma2_session_params all = p->opts->session, few = all;
    int32_t context = all.n_context ? all.n_context : p->config->n_context;
    few.n_context = 16, few.n_batch = 1; /* the least that a cache is made of */
    for (int32_t i = GEMMA2_CACHE_F32; i <= GEMMA2_CACHE_Q8; i++) {
        gemma2_plan plan, part;
        char size[32];
        all.cache_type = few.cache_type = i;
        if (gemma2_session_plan(p->model, &few, &part) != GEMMA2_OK ||
            gemma2_session_plan(p->model, &all, &plan) != GEMMA2_OK)
            continue;
        format_bytes(size, plan.cache);
        put_format(&p->out, "--kv %s: %" PRIu64 " bytes a position, %s for %" PRId32 " tokens\n",
                   names[i], part.cache / 16, size, context);
    }
}

/* What --info says, but for the turns of a chat, as one object. */
static void put_info_json(program *p)
{
    const gemma2_config *c = p->config;
    output *out = &p->out;
    gemma2_plan plan;
    gemma2_section section;
    put_format(out, "{\"file_bytes\": %" PRIu64 ", \"identity\": \"", c->file_bytes);
    put_identity(p);
    put_bytes(out, "\"", 1);
    put_facts(p);
    if (c->n_layers) {
        put_format(out, ", \"n_layers\": %" PRId32 ", \"d_model\": %" PRId32
                   ", \"d_ffn\": %" PRId32, c->n_layers, c->d_model, c->d_ffn);
        put_format(out, ", \"n_heads\": %" PRId32 ", \"n_kv_heads\": %" PRId32 ", \"head_dim\": %"
                   PRId32, c->n_heads, c->n_kv_heads, c->head_dim);
        put_format(out, ", \"window\": %" PRId32 ", \"n_context\": %" PRId32
                   ", \"local_layers\": [", c->window, c->n_context);
        for (int32_t l = 0, n = 0; l < c->n_layers; l++)
            if (c->is_local[l])
                put_format(out, "%s%" PRId32, n++ ? ", " : "", l);
        put_format(out, "], \"attn_softcap\": %.9g, \"final_softcap\": %.9g",
                   (double)c->attn_softcap, (double)c->final_softcap);
        put_format(out, ", \"query_scale\": %.9g, \"embedding_scale\": %.9g",
                   (double)c->query_scale, (double)c->embedding_scale);
        put_format(out, ", \"rope_theta\": %.17g, \"rms_norm_eps\": %.9g", c->rope_theta,
                   (double)c->rms_norm_eps);
        if (gemma2_session_plan(p->model, &p->opts->session, &plan) >= 0)
            put_format(out, ", \"memory\": {\"weights\": %" PRIu64 ", \"cache\": %" PRIu64
                       ", \"scratch\": %" PRIu64 "}", plan.weights, plan.cache, plan.scratch);
    }
    put_format(out, ", \"n_vocab\": %" PRId32 ", \"n_kept\": %" PRId32 ", \"n_scores\": %" PRId32,
               c->n_vocab, c->n_kept, c->n_scores);
    put_format(out, ", \"bos\": %" PRId32 ", \"eos\": %" PRId32 ", \"stop\": [", c->bos, c->eos);
    put_ids(out, c->stop, (size_t)c->n_stop, ", ");
    put_format(out, "], \"sections\": [");
    for (size_t i = 0; gemma2_get_section(p->model, i, &section); i++)
        put_format(out, "%s{\"role\": \"%s\", \"layer\": %" PRId32 ", \"type\": \"%s\", \"rows\": %"
                   PRIu64 ", \"cols\": %" PRIu64 ", \"bytes\": %" PRIu64 "}", i ? ", " : "",
                   section.role, section.layer, section.type, section.rows, section.cols,
                   section.bytes);
    put_format(out, "], \"isa\": \"%s\", \"threads\": %" PRId32 "}\n", c->isa,
               gemma2_threads(p->opts->session.n_threads));
}

static int info(program *p)
{
    const gemma2_config *c = p->config;
    output *out = &p->out;
    char size[32], plan[160];
    int status = c->n_layers ? memory_plan(p, &p->opts->session, plan) : DONE;
    if (status != DONE)
        return status;
    if (p->opts->json) {
        put_info_json(p);
        return DONE;
    }
    format_bytes(size, c->file_bytes);
    put_format(out, "file: %s (%" PRIu64 " bytes)\nidentity: ", size, c->file_bytes);
    put_identity(p);
    put_bytes(out, "\n", 1);
    put_facts(p);
    if (c->n_layers)
        put_architecture(p);
    put_format(out, "vocabulary: %" PRId32 " pieces", c->n_vocab);
    if (c->n_kept < c->n_vocab)
        put_format(out, ", of which %" PRId32 " can be written", c->n_kept);
    put_format(out, "; bos %" PRId32 ", eos %" PRId32, c->bos, c->eos);
    put_format(out, ", pad %" PRId32 ", unk %" PRId32 ", turns %" PRId32 " %" PRId32 "\n", c->pad,
               c->unk, c->start_of_turn, c->end_of_turn);
    put_format(out, "stop ids: ");
    put_ids(out, c->stop, (size_t)c->n_stop, " ");
    put_bytes(out, "\n", 1);
    status = put_turns(p);
    if (status != DONE)
        return status;
    put_sections(p);
    if (c->n_layers) {
        put_format(out, "memory: %s\n", plan);
        put_caches(p);
    }
    put_format(out, "instruction set: %s\nthreads: %" PRId32 "\n", c->isa,
               gemma2_threads(p->opts->session.n_threads));
    return DONE;
}

static int check(program *p)
{
    char err[256], size[32];
    gemma2_section section;
    size_t n = 0, done = 0;
    int sound = 1;
    while (gemma2_get_section(p->model, n, &section))
        n++;
    while (sound > 0) {
        show_progress(p, "checked %zu of %zu sections", done, n);
        sound = gemma2_check(p->model, done, err, sizeof err);
        done += sound > 0;
    }
    clear_progress(p);
    if (sound < 0)
        return fail(BAD_MODEL, "%s: %s", p->opts->model, err);
    format_bytes(size, p->config->file_bytes);
    put_format(&p->out, "ok: %zu sections, %s: every digest and every value is sound\n", done,
               size);
    return DONE;
}

/* 32 bits of the clocks and of where the stack is: easy to type again, and exact as a number in any
 * reader of JSON. */
static uint64_t random_seed(void)
{
    uint64_t mix = (uint64_t)time(NULL) << 32 ^ (uint64_t)(seconds() * 1e9);
    mix = (mix ^ (uintptr_t)&mix) * 6364136223846793005u;
    return (mix ^ mix >> 29) * 6364136223846793005u >> 32;
}

static void init_sampler(program *p)
{
    const gemma2_config *c = p->config;
    const options *opts = p->opts;
    p->seed = opts->seed_given ? opts->seed : random_seed();
    p->sampler.bias = opts->biases;
    p->sampler.allow = p->constraint.mask;
    p->sampler.n_bias = opts->sampler.n_bias;
    for (int32_t i = 0; opts->ignore_eos && i < c->n_stop; i++)
        opts->biases[p->sampler.n_bias++] = (gemma2_bias){c->stop[i], -INFINITY};
    if (opts->ignore_eos && p->end_of_reply >= 0)
        opts->biases[p->sampler.n_bias++] = (gemma2_bias){p->end_of_reply, -INFINITY};
    settle_sampler(p, 1);
}

static void free_all(void *const *blocks, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(blocks[i]);
}

/* Frees all that a run holds but its model and options. */
static void close_program(program *p)
{
    void *const all[] = {
        p->logits, p->turns.items, p->first.ids.items, p->later.ids.items, p->attached.items,
        p->editor.text.items, p->editor.screen.items, p->editor.history.items,
        p->editor.drafts.items, p->system, p->prompt.items, p->echo.items, p->ids.items,
        p->reply.text.items, p->reply.logprobs.items, p->reply.tops.items, p->reply.ends.items,
        p->reply.choices.items};
    gemma2_ahead_free(p->ahead);
    gemma2_session_free(p->draft), gemma2_close(p->draft_model);
    gemma2_session_free(p->session);
    close_constraint(&p->constraint);
    free_all(all, sizeof all / sizeof *all);
}

/* ---- --batch: many prompts in one process.  Lines share passes: a line joins as another ends,
 * and its result is the one it would have alone. ---- */

enum { MOST_PARALLEL = 256 };
enum { WORTH_WAITING = 32 }; /* tokens that another line is reading anyhow */

/* Input that is taken line by line. */
typedef struct {
    FILE *file; /* NULL: standard input, of which only what is there is taken */
    array bytes;
    size_t at, seen; /* where the next line begins; so far there is no newline */
    size_t number;   /* of the last line, from 1 */
    uint64_t size, taken; /* bytes in all, or 0 where nobody knows; bytes of all lines so far */
    int ended;
    int error; /* errno of the read that failed, or 0 */
} line_input;

/* An id of a line, as JSON. */
typedef struct line_id {
    struct line_id *next; /* of those with this hash */
    int state;     /* of those below */
    uint64_t seed; /* of its result */
    size_t n;      /* bytes of the name */
    char name[];
} line_id;
enum { NEW, HAS_RESULT, TAKEN }; /* from an earlier run; by a line of the input */
enum { N_HASHES = 1 << 16 };

/* A place for one line.  Its program is a whole one, for one reply, without output. */
typedef struct {
    program p;
    options opts;
    json said;                      /* the line */
    const json_node *limit;         /* the value of its key that constrains the reply, or NULL */
    array stops, choices, messages; /* what it says */
    array id;                       /* char: its id, as JSON */
    constraint held;                /* the last that a line had */
    size_t number;
    size_t pure; /* positions of the session that another prompt may begin with */
    int busy, begun, ready; /* has a line; its prompt is begun; its logits are there */
    int openai;
    size_t first_row, n_rows; /* of the pass */
    char *piece;              /* [max_piece_bytes] */
    gemma2_candidate token;   /* of which a form of results speaks, */
    size_t shown, offset;     /* its number in the reply, and the characters before it */
} batch_slot;

typedef struct {
    program *p;
    gemma2_worker *worker;
    gemma2_session_params session;
    batch_slot *slots;
    size_t n_slots, n_busy;
    line_input in;
    FILE *out;
    array line;    /* char: of a result */
    line_id **ids; /* [N_HASHES]: the first of each hash */
    int exact;     /* prompts are read in one arithmetic, so they may be cut anywhere */
    size_t n_kept; /* results of an earlier run */
    size_t done, failed, skipped, prompt_tokens, shared_tokens, reply_tokens;
    double began;
    gemma2_row rows[PREFILL_PIECE + MOST_PARALLEL];
    size_t n_rows;
    char error[SENTENCE]; /* why a line has no result, or why the batch ends */
} batch;

/* The next line, without its newline, or NULL: at the end, or with wait 0 where none is there
 * yet.  Of a longer line only the first LONGEST_TEXT + 1 bytes come. */
static const char *next_line(line_input *in, int wait, size_t *n)
{
    enum { PIECE = 1 << 16 };
    for (;;) {
        char *bytes = in->bytes.items, *end = NULL;
        if (in->seen < in->bytes.n)
            end = memchr(bytes + in->seen, '\n', in->bytes.n - in->seen);
        if (end || (in->ended && in->at < in->bytes.n)) {
            size_t start = in->at;
            *n = (end ? (size_t)(end - bytes) : in->bytes.n) - start;
            in->at = in->seen = start + *n + (end != NULL);
            in->taken += *n + 1;
            in->number++;
            return bytes + start;
        }
        if (in->ended)
            return NULL;
        in->bytes.n -= in->at;
        if (in->at) /* what is left moves to the front */
            memmove(bytes, bytes + in->at, in->bytes.n);
        in->bytes.n = in->bytes.n > LONGEST_TEXT ? LONGEST_TEXT + 1 : in->bytes.n;
        in->at = 0;
        in->seen = in->bytes.n;
        char *more = extend(&in->bytes, PIECE, 1);
        errno = more ? 0 : ENOMEM;
        long got = !more ? -1
                   : in->file ? (long)fread(more, 1, PIECE, in->file)
                              : read_input(more, PIECE, wait);
        in->bytes.n = in->seen + (got > 0 ? (size_t)got : 0);
        if (got < 0 && (errno == EAGAIN || errno == EINTR))
            return NULL;
        in->ended = got <= 0;
        if (got < 0 || (got == 0 && ferror(in->file ? in->file : stdin))) {
            in->error = errno ? errno : EIO;
            in->bytes.n = 0; /* not even the beginning of a line */
        }
    }
}

/* What is known of an id; NULL without memory. */
static line_id *find_id(batch *b, const array *id)
{
    uint64_t hash = 14695981039346656037u;
    const char *bytes = id->items;
    for (size_t i = 0; i < id->n; i++)
        hash = (hash ^ (unsigned char)bytes[i]) * 1099511628211u;
    line_id **place = b->ids + (hash ^ hash >> 32) % N_HASHES, *known;
    for (known = *place; known; known = known->next)
        if (known->n == id->n && memcmp(known->name, bytes, id->n) == 0)
            return known;
    known = malloc(sizeof *known + id->n);
    if (!known)
        return NULL;
    *known = (line_id){.next = *place, .n = id->n};
    memcpy(known->name, bytes, id->n);
    return *place = known;
}

/* Reads a line, or a result, into a place, and finds out its form and its id, as JSON: its number
 * where it names none or cannot be read.  *known becomes what is known of that id. */
static int identify(batch *b, batch_slot *s, const char *text, size_t n, line_id **known)
{
    json *j = &s->said;
    output out = {.memory = &s->id};
    int has_mark = b->in.number == 1 && n >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0;
    *known = NULL;
    s->id.n = 0;
    put_format(&out, "%zu", b->in.number); /* there is room for that */
    json_free(j);
    if (n > LONGEST_TEXT)
        return fail(USAGE, "the line is longer than %d bytes", LONGEST_TEXT);
    if (!json_read(j, has_mark ? text + 3 : text, has_mark ? n - 3 : n))
        return j->why == JSON_MEMORY ? out_of_memory()
            : fail(USAGE, "the line is no JSON: at byte %zu: %s", j->at + 1, j->why);
    const json_node *root = j->nodes.items;
    s->openai = json_get(j, root, "custom_id") || json_get(j, root, "body");
    const json_node *id = json_get(j, root, s->openai ? "custom_id" : "id");
    const char *name = id ? j->text + id->start : NULL;
    int is_text = id && id->kind == JSON_STRING, is_none = !id || id->kind == JSON_NULL;
    int is_whole = id && id->kind == JSON_NUMBER && !name[strspn(name, "-0123456789")];
    if (!is_text && (s->openai || !(is_none || is_whole)))
        return fail(USAGE, s->openai ? "\"custom_id\" must be a text"
                                     : "\"id\" must be a text or a whole number");
    s->id.n = is_none ? s->id.n : 0;
    if (is_text)
        put_quoted(&out, name, id->end - id->start);
    else if (is_whole)
        put_bytes(&out, name, id->end - id->start);
    *known = out.error ? NULL : find_id(b, &s->id);
    if (*known)
        return DONE;
    s->id.n = 0;
    put_format(&out, "%zu", b->in.number);
    return out_of_memory();
}

/* ---- what the keys of a request mean: functions of one type, for a table ---- */

/* A number, a text or a list of texts, for the option with that name. */
static int take_values(batch_slot *s, const json *j, const json_node *value, const char *key)
{
    char name[40];
    const char *unused, *meaning, **texts = NULL;
    snprintf(name, sizeof name, "--%s", key);
    meaning = foreign_meaning(name);
    const option *o = find_option(meaning ? meaning : name, &unused);
    int takes_texts = o->kind == STOP || o->kind == CHOICE;
    int is_list = takes_texts && value->kind == JSON_ARRAY;
    const json_node *each = value + is_list;
    size_t n = is_list ? value->n : 1;
    if (takes_texts)
        texts = extend(o->kind == STOP ? &s->stops : &s->choices, n, sizeof *texts);
    if (takes_texts && !texts)
        return out_of_memory();
    if (o->kind == STOP)
        s->opts.stops = texts, s->opts.n_stops = 0;
    else if (o->kind == CHOICE)
        s->opts.choices = texts, s->opts.n_choices = 0;
    for (; n; n--, each = json_next(j, each)) {
        const char *text = j->text + each->start;
        int fits = each->kind == (takes_texts ? JSON_STRING : JSON_NUMBER) &&
                   strlen(text) == each->end - each->start;
        if (!fits || !set_option(&s->opts, o, text))
            return fail(USAGE, "\"%s\" takes %s%s", key, o->takes,
                        takes_texts ? " and holds no NUL, or a list of such texts" : "");
    }
    return DONE;
}

/* What constrains the reply is kept for limit_reply, when the whole line has been read. */
static int take_limit(batch_slot *s, const json *j, const json_node *value, const char *key)
{
    if (s->limit)
        return fail(USAGE, "\"%s\" and \"%s\" do not go together", j->text + s->limit[-1].start,
                    key);
    if (s->opts.ignore_eos)
        return fail(USAGE, "\"%s\" and --ignore-eos do not go together", key);
    s->limit = value;
    s->opts.n_choices = 0;
    int is_choices = strcmp(key, "choices") == 0;
    int status = is_choices ? take_values(s, j, value, key) : DONE;
    return status || !is_choices || s->opts.n_choices
        ? status : fail(USAGE, "\"choices\" takes a list of texts that is not empty");
}

/* Reads the content of message i: a text, or a list of text parts.  The line itself then holds the
 * joined parts where their list stood. */
static int take_content(const json *j, const json_node *content, size_t i, gemma2_message *m)
{
    size_t n = 0;
    char *end = j->text + content->start;
    const json_node *part = content + 1;
    *m = (gemma2_message){m->role, json_text(j, content, &n), (int64_t)n};
    if (content->kind != JSON_ARRAY)
        return m->text ? DONE : fail(USAGE, "message %zu needs a \"content\", which is text", i);
    m->text = end;
    for (size_t k = 1; k <= content->n; k++, part = json_next(j, part), end += n) {
        const json_node *type = json_get(j, part, "type"), *text = json_get(j, part, "text");
        const char *name = json_text(j, type, &n), *bytes = json_text(j, text, &n);
        if (!bytes || !json_is(j, type, "text"))
            return fail(USAGE, "message %zu: part %zu of its \"content\" has the type '%s': it "
                        "must be text, with a \"text\"", i, k, name ? name : "");
        memmove(end, bytes, n);
    }
    m->size = end - m->text;
    return DONE;
}

static int take_messages(batch_slot *s, const json *j, const json_node *list, const char *key)
{
    static const char *const roles[] = {"system", "user", "assistant", "developer"};
    const char *system = s->opts.system;
    if (list->kind != JSON_ARRAY || !list->n)
        return fail(USAGE, "\"%s\" must be a list of messages", key);
    gemma2_message *first = extend(&s->messages, list->n + 1, sizeof *first), *m = first;
    const json_node *each = list + 1;
    if (!first)
        return out_of_memory();
    for (size_t i = 0; i < list->n; i++, each = json_next(j, each)) {
        const json_node *role = json_get(j, each, "role"), *content = json_get(j, each, "content");
        int32_t r = 0;
        while (r < 4 && !json_is(j, role, roles[r]))
            r++;
        if (r == 4 || !content)
            return fail(USAGE, "message %zu needs a \"role\", which is system, developer, user or "
                        "assistant, and a \"content\"", i + 1);
        r = r == 3 ? GEMMA2_ROLE_SYSTEM : r;
        if (i == 0 && system && r != GEMMA2_ROLE_SYSTEM)
            *m++ = (gemma2_message){GEMMA2_ROLE_SYSTEM, system, -1};
        m->role = r;
        int status = take_content(j, content, i + 1, m++);
        if (status != DONE)
            return status;
    }
    s->messages.n = (size_t)(m - first);
    s->opts.chat = 1;
    return DONE;
}

/* True or false for a chat; for a completion how many others are told of, too. */
static int take_logprobs(batch_slot *s, const json *j, const json_node *value, const char *key)
{
    s->opts.json = value->kind != JSON_FALSE;
    if (!s->opts.chat)
        return take_values(s, j, value, key);
    return value->kind == JSON_TRUE || value->kind == JSON_FALSE
        ? DONE : fail(USAGE, "\"%s\" must be true or false", key);
}

#define NUMBERS " max_tokens temperature top_k top_p min_p seed presence_penalty " \
    "frequency_penalty repetition_penalty stop "

/* The keys of our form and of OpenAI's.  Some leave no choice, for a line has one reply, whole and
 * without its prompt; those in the last row are read elsewhere, or have no meaning here. */
static const struct {
    const char *ours, *openai;
    int (*take)(batch_slot *, const json *, const json_node *, const char *);
    const char *must; /* the only value, as JSON, or NULL */
} MEMBERS[] = {
    {NUMBERS, NUMBERS "max_completion_tokens top_logprobs ", take_values, NULL},
    {" messages ", " messages ", take_messages, NULL},
    {" schema choices ", " response_format ", take_limit, NULL},
    {"", " logprobs ", take_logprobs, NULL},
    {"", " stream echo ", NULL, "false"},
    {"", " n best_of ", NULL, "1"},
    {" id prompt ", " prompt model user metadata store service_tier ", NULL, NULL},
};

static int take_member(batch_slot *s, const json *j, const char *key, const json_node *value)
{
    size_t i = 0, n = sizeof MEMBERS / sizeof *MEMBERS;
    while (i < n && !in_words(s->openai ? MEMBERS[i].openai : MEMBERS[i].ours, key))
        i++;
    if (value->kind == JSON_NULL)
        return DONE;
    if (i == n)
        return fail(USAGE, "there is no key \"%s\" here", key);
    const char *must = MEMBERS[i].must;
    if (must && (value->kind > JSON_NUMBER || strcmp(j->text + value->start, must) != 0))
        return fail(USAGE, "\"%s\" must be %s in a batch", key, must);
    return MEMBERS[i].take ? MEMBERS[i].take(s, j, value, key) : DONE;
}

/* The wrapping of OpenAI's lines, which says what is inside. */
static int read_wrapping(batch_slot *s, const json *j, const json_node *body)
{
    const json_node *root = j->nodes.items, *method = json_get(j, root, "method");
    const json_node *url = json_get(j, root, "url");
    s->opts.chat = json_is(j, url, "/v1/chat/completions");
    const char *needed = s->opts.chat ? "messages" : "prompt";
    if (method && !json_is(j, method, "POST"))
        return fail(USAGE, "\"method\" must be POST");
    if (!s->opts.chat && !json_is(j, url, "/v1/completions"))
        return fail(USAGE, "\"url\" must be /v1/chat/completions or /v1/completions");
    if (!json_get(j, body, needed))
        return fail(USAGE, "\"body\" must hold \"%s\"", needed);
    s->opts.json = s->opts.n_top = 0; /* they are asked for by keys */
    return DONE;
}

/* What a line says; the prompt's ids. */
static int read_request(batch_slot *s, const json *j)
{
    program *p = &s->p;
    char err[SENTENCE];
    size_t n = 0;
    const json_node *root = j->nodes.items;
    const json_node *request = s->openai ? json_get(j, root, "body") : root;
    int status = s->openai ? read_wrapping(s, j, request) : DONE;
    if (status != DONE)
        return status;
    if (request->kind != JSON_OBJECT)
        return fail(USAGE, "the line must be an object");
    const json_node *prompt = json_get(j, request, "prompt"), *key = request + 1;
    prompt = prompt && prompt->kind == JSON_NULL ? NULL : prompt;
    for (size_t i = 0; status == DONE && i < request->n; i++, key = json_next(j, key + 1))
        status = take_member(s, j, json_text(j, key, &n), key + 1);
    if (status != DONE)
        return status;
    if (s->opts.n_top && !s->opts.json)
        return fail(USAGE, "\"top_logprobs\" belongs to \"logprobs\": true");
    if ((prompt != NULL) == (s->messages.n != 0))
        return fail(USAGE, "a line has either a \"prompt\" or \"messages\"");
    const char *text = json_text(j, prompt, &n);
    if (prompt && !text)
        return fail(USAGE, "\"prompt\" must be a text");
    status = open_chat(p);
    if (status != DONE || prompt)
        return status ? status : push_prompt(p, text, n);
    if (gemma2_chat_check(p->model, s->messages.items, s->messages.n, GEMMA2_CHAT_GENERATE, err,
                          sizeof err) < 0)
        return fail(USAGE, "%s", err);
    return push_encoded(p, s->messages.items, s->messages.n, GEMMA2_CHAT_GENERATE);
}

/* Makes the reply a sentence of the line's own grammar, or of the options'.  A place keeps what
 * was worked out about a grammar for the next line with the same. */
static int limit_reply(batch *b, batch_slot *s)
{
    static const char object[] = "{\"type\": \"object\"}";
    const json *j = &s->said;
    const json_node *limit = s->limit, *form = s->openai ? limit : NULL; /* response_format */
    const json_node *type = json_get(j, form, "type"), *inner = json_get(j, form, "json_schema");
    const json_node *wanted = !form ? limit : json_is(j, type, "json_schema")
                                                  ? json_get(j, inner, "schema") : NULL;
    const char *key = limit ? j->text + limit[-1].start : "options";
    array own = {0};
    const array *gbnf = limit ? &own : &b->p->constraint.gbnf;
    char err[SENTENCE] = "out of memory";
    int ok = 1;
    if (json_is(j, type, "text") || (!limit && !gbnf->n))
        return DONE;
    if (form && !wanted && !json_is(j, type, "json_object"))
        return fail(USAGE, "\"%s\" has the \"type\" text, json_object or json_schema with its "
                    "\"schema\"", key);
    if (limit && s->opts.n_choices)
        ok = add_choices(&own, s->opts.choices, s->opts.n_choices);
    else if (wanted)
        ok = add_schema(&own, j, wanted, s->opts.spaced, err, sizeof err);
    else if (limit)
        ok = read_schema(&own, object, sizeof object - 1, s->opts.spaced, err, sizeof err);
    ok = ok && open_constraint(&s->held, s->p.model, gbnf->items, gbnf->n, 0, err, sizeof err);
    free(own.items);
    if (ok)
        s->p.constraint = s->held;
    return ok ? DONE : fail(USAGE, "\"%s\": %s", key, err);
}

/* A place has its session from its first line on, with the run's context: memory that no line
 * reaches is never touched. */
static int fit_session(batch *b, batch_slot *s)
{
    char err[256];
    if (!s->p.session)
        s->p.session = gemma2_session_new(b->p->model, &b->session, err, sizeof err);
    if (!s->p.session)
        return fail(FAILED, "%s", err);
    size_t n = s->p.ids.n, context = (size_t)gemma2_context(s->p.session);
    return n == 0 || n > context ? refuse_length(n, context) : DONE;
}

/* Empties a place for the next line; its session stays as it is. */
static void clear_slot(batch *b, batch_slot *s)
{
    clear_reply(&s->p.reply);
    s->opts = *b->p->opts;
    s->opts.seed = b->p->seed;
    s->opts.seed_given = 1;
    s->limit = NULL;
    s->p.constraint = (constraint){0};
    s->p.ids.n = s->messages.n = 0;
    s->begun = s->ready = s->openai = 0;
    s->number = b->in.number;
}

/* Takes a line into a place.  Returns -1 where an earlier run has its result. */
static int take_line(batch *b, batch_slot *s, const char *text, size_t n)
{
    line_id *known;
    int status = identify(b, s, text, n, &known);
    if (status != DONE)
        return status;
    int was = known->state;
    known->state = TAKEN;
    if (was != NEW)
        return was == TAKEN ? fail(USAGE, "an earlier line has the same id") : -1;
    status = read_request(s, &s->said);
    status = status ? status : limit_reply(b, s);
    status = status ? status : fit_session(b, s);
    status = status ? status : start_constraint(&s->p, s->p.ids.n);
    if (status == DONE)
        init_sampler(&s->p);
    return status;
}

/* ---- results: their forms, where ' is a quotation mark and @ with a letter what put_field puts.
 * The same line gives the same bytes: that is why "created" is 0. ---- */

#define USED "'usage': {'prompt_tokens': @p, 'completion_tokens': @c"
#define OPENAI(status, body) "{'id': 'batch_req_@I', 'custom_id': '@I', 'response': " \
    "{'status_code': " status ", 'request_id': 'req_@I', 'body': {" body "}}, 'error': null}\n"
#define ANSWER(id, object, reply) OPENAI("200", "'id': '" id "-@I', 'object': '" object "', " \
    "'created': 0, 'model': @m, 'choices': [{'index': 0, " reply ", 'logprobs': @l, " \
    "'finish_reason': '@F'}], " USED ", 'total_tokens': @a}, 'seed': @s")
#define REFUSED \
    OPENAI("400", "'error': {'message': @e, 'type': 'invalid_request_error', 'code': null}")
#define TOKEN "{'token': @k, 'logprob': @g, 'bytes': [@b]"
static const char *const RESULT[2][3] = {
    {"{'id': @i, 'text': @t, 'finish_reason': '@f', 'seed': @s, " USED "}@d}\n",
     ANSWER("cmpl", "text_completion", "'text': @t"),
     ANSWER("chatcmpl", "chat.completion", "'message': {'role': 'assistant', 'content': @t}")},
    {"{'id': @i, 'error': {'message': @e}}\n", REFUSED, REFUSED},
};
static const char *const LOGPROBS[2] = {
    "{'tokens': [@K], 'token_logprobs': [@G], 'top_logprobs': [@O], 'text_offset': [@X]}",
    "{'content': [@C]}",
};

static void put_form(batch_slot *s, const char *form);

/* Puts a form for every token of the reply. */
static void put_tokens(batch_slot *s, const char *form)
{
    const reply *r = &s->p.reply;
    const int32_t *ids = (const int32_t *)s->p.ids.items + s->p.ids.n - r->n_ids;
    const char *text = r->text.items;
    s->offset = 0;
    for (size_t at = 0, i = s->shown = 0; i < r->logprobs.n; i = ++s->shown) {
        put_format(&s->p.out, i ? ", " : "");
        s->token = (gemma2_candidate){ids[i], ((const float *)r->logprobs.items)[i]};
        put_form(s, form);
        for (; at < ((const size_t *)r->ends.items)[i] && at < r->text.n; at++)
            s->offset += !is_inside_char(text[at]);
    }
}

/* The tokens that could have stood there.  A completion tells of the chosen one in any case. */
static void put_others(batch_slot *s)
{
    const gemma2_candidate chosen = s->token, *tops = s->p.reply.tops.items;
    size_t n = count_top(&s->p);
    int found = s->opts.chat;
    for (size_t k = 0; k < n + !found; k++) {
        put_format(&s->p.out, k ? ", " : "");
        s->token = k < n ? tops[s->shown * n + k] : chosen;
        put_form(s, s->opts.chat ? TOKEN "}" : "@k: @g");
        found |= s->token.id == chosen.id;
    }
    s->token = chosen;
}

/* A token's text as OpenAI has it, or its bytes: a byte that is no text by itself is called
 * bytes:\xe2, and a piece that adds no text goes by its name. */
static void put_token(batch_slot *s, int as_bytes)
{
    output *out = &s->p.out;
    int type = 0;
    size_t n, room = (size_t)s->p.config->max_piece_bytes;
    const char *text = gemma2_piece(s->p.model, s->token.id, &n, &type);
    int64_t added = gemma2_piece_bytes(s->p.model, s->token.id, s->piece, room);
    if (added > 0)
        text = s->piece, n = (size_t)added;
    for (size_t i = 0; as_bytes && i < n; i++)
        put_format(out, "%s%d", i ? ", " : "", (unsigned char)text[i]);
    if (!as_bytes && added > 0 && type == GEMMA2_PIECE_BYTE)
        put_format(out, "\"bytes:\\\\x%02x\"", (unsigned char)*text);
    else if (!as_bytes)
        put_quoted(out, text, n);
}

static void put_field(batch_slot *s, char what)
{
    const reply *r = &s->p.reply;
    output *out = &s->p.out;
    int is_cut = r->finish == AT_LENGTH || r->finish == AT_CONTEXT;
    const json *j = &s->said;
    const char *id = s->id.items, *model;
    size_t n;
    switch (what) {
    case 'i': put_bytes(out, id, s->id.n); break;
    case 'I': put_bytes(out, id + 1, s->id.n - 2); break;
    case 'e': put_quoted(out, overheard, strlen(overheard)); break;
    case 'm':
        model = json_text(j, json_get(j, json_get(j, j->nodes.items, "body"), "model"), &n);
        put_quoted(out, model, model ? n : 0);
        break;
    case 't': put_quoted(out, r->text.items, r->text.n); break;
    case 'f': put_format(out, "%s", FINISH_REASONS[r->finish]); break;
    case 'F': put_format(out, is_cut ? "length" : "stop"); break;
    case 's': put_format(out, "%" PRIu64, s->p.seed); break;
    case 'p': put_format(out, "%zu", s->p.ids.n - r->n_ids); break;
    case 'c': put_format(out, "%zu", r->n_ids); break;
    case 'a': put_format(out, "%zu", s->p.ids.n); break;
    case 'l': put_form(s, s->opts.json ? LOGPROBS[s->opts.chat] : "null"); break;
    case 'K': put_tokens(s, "@k"); break;
    case 'G': put_tokens(s, "@g"); break;
    case 'O': put_tokens(s, "{@o}"); break;
    case 'X': put_tokens(s, "@x"); break;
    case 'C': put_tokens(s, TOKEN ", 'top_logprobs': [@o]}"); break;
    case 'k': put_token(s, 0); break;
    case 'b': put_token(s, 1); break;
    case 'g': put_format(out, "%.9g", (double)s->token.logprob); break;
    case 'o': put_others(s); break;
    case 'x': put_format(out, "%zu", s->offset); break;
    default: /* 'd' */
        put_format(out, s->opts.json ? ", " : "");
        if (s->opts.json)
            put_details(&s->p);
    }
}

static void put_form(batch_slot *s, const char *form)
{
    for (; *form; form++)
        if (*form == '@')
            put_field(s, *++form);
        else
            put_bytes(&s->p.out, *form == '\'' ? "\"" : form, 1);
}

/* Writes a line's result, or after a failure its sentence, and frees its place. */
static int end_line(batch *b, batch_slot *s, int status)
{
    output *line = &s->p.out;
    int failed = status != DONE, openai = s->openai && *(char *)s->id.items == '"';
    b->line.n = 0;
    put_form(s, RESULT[failed][openai ? 1 + s->opts.chat : 0]);
    b->n_busy -= (size_t)s->busy;
    s->busy = 0;
    b->failed += (size_t)failed;
    b->done += (size_t)!failed;
    b->reply_tokens += s->p.reply.n_ids;
    if (line->error)
        return out_of_memory();
    errno = 0; /* the file has no buffer: a line is one write */
    note_write(&b->p->out, fwrite(b->line.items, 1, b->line.n, b->out) != b->line.n);
    return b->p->out.error ? FAILED : DONE;
}

/* ---- the passes ---- */

/* Chooses a token, if the line may have one more, and ends the line where it ends. */
static int choose_next(batch *b, batch_slot *s)
{
    program *p = &s->p;
    reply *r = &p->reply;
    int status = DONE;
    check_limits(p);
    if (!r->finish && !r->n_ids && s->opts.json && s->opts.n_choices)
        status = weigh_choices(p);
    if (!r->finish && status == DONE)
        status = choose(p);
    if (!r->finish)
        check_limits(p);
    if (status == DONE && (!r->finish || r->finish == AT_INTERRUPT))
        return DONE;
    return end_line(b, s, status ? status : end_text(p));
}

/* How many ids the two begin with in common, where the second may end. */
static size_t common_ids(const batch *b, const batch_slot *s, const int32_t *ids, size_t n)
{
    size_t same = 0, most = n < s->p.ids.n - 1 ? n : s->p.ids.n - 1;
    while (same < most && ids[same] == ((int32_t *)s->p.ids.items)[same])
        same++;
    return same - (b->exact ? 0 : same % PREFILL_PIECE);
}

/* Lets the session begin with what others hold of its prompt.  Prompts are cut as in a run for
 * this prompt alone, as the bits may depend on it, and their last token is always evaluated.
 * Returns 0 where it pays to wait for a line that is reading the same. */
static int share_beginning(batch *b, batch_slot *s)
{
    batch_slot *best = s;
    size_t most = 0, awaited = 0, n;
    for (batch_slot *o = b->slots; o < b->slots + b->n_slots; o++) {
        size_t held = b->exact && o->p.session ? (size_t)gemma2_position(o->p.session) : o->pure;
        n = held ? common_ids(b, s, gemma2_history(o->p.session), held) : 0;
        if (n > most || (n == most && o == s)) {
            most = n;
            best = o;
        }
        n = o->busy && o->begun && !o->ready ? common_ids(b, s, o->p.ids.items, o->p.ids.n) : 0;
        awaited = n > awaited ? n : awaited;
    }
    if (awaited >= most + WORTH_WAITING)
        return 0;
    if (best != s && (!most || gemma2_session_copy(s->p.session, best->p.session) < 0))
        most = 0;
    if (gemma2_rewind(s->p.session, (int32_t)most) < 0)
        gemma2_rewind(s->p.session, (int32_t)(most = 0));
    s->pure = most;
    s->begun = 1;
    b->shared_tokens += most;
    return 1;
}

/* A token of each reply joins the pass, and up to a piece's worth of prompts, the earliest line
 * first, so that it has what later ones begin with, too. */
static void add_lines(batch *b)
{
    size_t room = PREFILL_PIECE, last = 0;
    for (batch_slot *s;; last = s->number) {
        s = NULL;
        for (batch_slot *o = b->slots; o < b->slots + b->n_slots; o++)
            if (o->busy && o->number > last && (!s || o->number < s->number))
                s = o;
        if (!s)
            return;
        s->n_rows = 0;
        if (!s->begun && (!room || !share_beginning(b, s)))
            continue;
        size_t left = s->p.ids.n - (size_t)gemma2_position(s->p.session);
        size_t most = s->ready ? 1 : b->exact ? room : PREFILL_PIECE;
        size_t piece = left < most ? left : most;
        if (!s->ready && piece > room)
            continue;
        room -= s->ready ? 0 : piece;
        s->first_row = b->n_rows;
        s->n_rows = piece;
        for (size_t at = s->p.ids.n - left; piece; piece--, at++)
            b->rows[b->n_rows++] = (gemma2_row){
                .session = s->p.session, .prefill = !s->ready,
                .id = ((int32_t *)s->p.ids.items)[at],
                .logits = at + 1 < s->p.ids.n ? NULL : s->p.logits};
    }
}

/* What the pass made of a line's rows. */
static int take_rows(batch *b, batch_slot *s)
{
    int code = b->rows[s->first_row].status;
    if (code == GEMMA2_ERR_CANCELLED)
        return DONE;
    if (code < 0)
        return end_line(b, s, fail(FAILED, "%s", gemma2_error_string(code)));
    if (!s->ready) {
        b->prompt_tokens += s->n_rows;
        s->pure += s->n_rows == PREFILL_PIECE ? s->n_rows : 0;
        s->ready = gemma2_position(s->p.session) == (int32_t)s->p.ids.n;
    }
    return s->ready ? choose_next(b, s) : DONE;
}

/* One pass for all lines: a token of each reply, and prompts.  Ctrl-C cuts short that of a line
 * alone. */
static int shared_pass(batch *b)
{
    int status = DONE;
    b->n_rows = 0;
    add_lines(b);
    if (!b->n_rows)
        return DONE;
    if (b->rows[0].session == b->rows[b->n_rows - 1].session)
        interruptible = b->rows[0].session;
    gemma2_eval_rows(b->rows, b->n_rows);
    interruptible = NULL;
    for (batch_slot *s = b->slots; s < b->slots + b->n_slots && status == DONE && !stop_asked; s++)
        if (s->busy && s->n_rows)
            status = take_rows(b, s);
    return status;
}

/* ---- the whole ---- */

/* Gives lines to the places that are free. */
static int fill_slots(batch *b)
{
    for (batch_slot *s = b->slots; s < b->slots + b->n_slots; s++)
        while (!s->busy && !stop_asked) {
            size_t n, rest;
            const char *text = next_line(&b->in, b->n_busy == 0, &n);
            if (!text)
                return DONE;
            rest = n;
            trim(text, &rest);
            if (!rest)
                continue;
            clear_slot(b, s);
            int status = take_line(b, s, text, n);
            b->skipped += status < 0;
            s->busy = status == DONE;
            b->n_busy += (size_t)s->busy;
            if (status > 0 && end_line(b, s, status) != DONE)
                return FAILED;
        }
    return DONE;
}

/* FAILED if the lines could not be read to their end. */
static int check_reading(const batch *b)
{
    return b->in.error ? fail(FAILED, "cannot read %s: %s", b->in.file ? b->p->opts->subject
                              : "standard input", strerror(b->in.error)) : DONE;
}

static int run_batch(batch *b)
{
    const line_input *in = &b->in;
    int status = DONE;
    double shown = b->began;
    while (status == DONE && !stop_asked) {
        status = fill_slots(b);
        if (!status && !stop_asked && !b->n_busy && b->in.ended)
            return check_reading(b);
        if (status == DONE && !stop_asked)
            status = shared_pass(b);
        double time = seconds() - b->began;
        if (b->began + time - shown < 0.5)
            continue;
        shown = b->began + time;
        char left[40] = "";
        if (in->size > in->taken && in->taken)
            snprintf(left, sizeof left, ", %.0f s left",
                     time * ((double)in->size / (double)in->taken - 1));
        show_progress(b->p, "%zu done, %zu failed, %.1f tok/s%s", b->done + b->skipped, b->failed,
                      rate(b->reply_tokens, time), left);
    }
    return status;
}

/* Notes the result in a line of the output.  Returns -1 where the line is not to stay: it is an
 * error, or its id has a result already. */
static int keep_result(batch *b, const char *text, size_t n)
{
    batch_slot *s = b->slots;
    const json *j = &s->said;
    line_id *known;
    int status = identify(b, s, text, n, &known);
    const json_node *root = status ? NULL : j->nodes.items;
    const json_node *response = json_get(j, root, "response");
    const json_node *body = response ? json_get(j, response, "body") : root;
    const json_node *made = json_get(j, body, response ? "choices" : "text");
    const json_node *seed = json_get(j, body, "seed");
    if (status == FAILED)
        return status;
    if (!json_get(j, root, "id") || (!made && !json_get(j, body, "error")))
        return fail(USAGE, "%s holds something else than results; give another file with "
                    "--output", b->p->opts->results);
    if (!made || known->state != NEW)
        return -1;
    known->state = HAS_RESULT;
    b->n_kept++;
    if (seed)
        parse_whole(j->text + seed->start, UINT64_MAX, &known->seed);
    return DONE;
}

/* Opens the output.  Of an earlier run's results the sound ones stay, once each. */
static int open_results(batch *b)
{
    const char *path = b->p->opts->results;
    array bytes = {0};
    b->out = stdout;
    if (!path || strcmp(path, "-") == 0)
        return setvbuf(stdout, NULL, _IONBF, 0), DONE;
    b->out = NULL;
    int status = is_special(path) ? DONE : read_kept(path, NULL, "results", UINT64_MAX / 4, 1,
                                                     &bytes);
    char *text = bytes.items, *end;
    size_t kept = 0;
    for (size_t at = 0, n; status <= DONE && at < bytes.n; at += n) {
        end = memchr(text + at, '\n', bytes.n - at);
        if (!end) /* a torn line */
            break;
        n = (size_t)(end + 1 - (text + at));
        status = keep_result(b, text + at, n - 1);
        if (status == DONE)
            memmove(text + kept, text + at, n);
        kept += status == DONE ? n : 0;
    }
    if (status <= DONE)
        status = kept < bytes.n ? save_file("the results", path, text, kept) : DONE;
    free(bytes.items);
    if (status != DONE)
        return status;
    b->out = open_path(path, "ab");
    if (!b->out)
        return fail(FAILED, "cannot open %s: %s", path, strerror(errno));
    setvbuf(b->out, NULL, _IONBF, 0);
    return DONE;
}

/* The seed of the earlier run, which drew it: that of a result whose line has none of its own. */
static int recall_seed(batch *b)
{
    batch_slot *s = b->slots;
    const char *text;
    size_t n;
    int found = 0;
    if (!b->in.file || is_special(b->p->opts->subject))
        return fail(USAGE, "%s holds results of an earlier run: give its seed with --seed, for "
                    "this input can be read only once", b->p->opts->results);
    while (!found && (text = next_line(&b->in, 1, &n)) != NULL) {
        line_id *known;
        if (identify(b, s, text, n, &known) == FAILED)
            return FAILED;
        const json_node *root = s->said.nodes.items, *body = json_get(&s->said, root, "body");
        const json_node *seed = json_get(&s->said, body ? body : root, "seed");
        found = known && known->state == HAS_RESULT && (!seed || seed->kind == JSON_NULL);
        b->p->seed = found ? known->seed : b->p->seed;
    }
    int status = check_reading(b);
    free(b->in.bytes.items);
    b->in = (line_input){.file = b->in.file, .size = b->in.size};
    rewind(b->in.file);
    return status;
}

static int open_lines(batch *b)
{
    const char *path = b->p->opts->subject;
    if (strcmp(path, "-") == 0)
        return DONE;
    b->in.file = open_path(path, "rb");
    if (!b->in.file)
        return fail(FAILED, "cannot open %s: %s", path, strerror(errno));
    fseek(b->in.file, 0, SEEK_END); /* a pipe stays where it is */
    long size = ftell(b->in.file);
    b->in.size = size > 0 ? (uint64_t)size : 0;
    rewind(b->in.file);
    return DONE;
}

/* Makes the worker and the places, and tells what memory they may take: by default at most 16
 * places, and fewer where these could fill half of the machine's memory. */
static int open_slots(batch *b)
{
    char err[256], each[32], all[32];
    program *p = b->p;
    const options *opts = p->opts;
    gemma2_worker_params worker;
    gemma2_plan plan, threads;
    gemma2_worker_params_init(&worker);
    worker.n_threads = opts->session.n_threads;
    worker.n_context = opts->session.n_context;
    b->n_slots = opts->parallel ? (size_t)opts->parallel : 16;
    worker.n_batch = PREFILL_PIECE + (int32_t)b->n_slots;
    b->worker = gemma2_worker_new(p->model, &worker, err, sizeof err);
    if (!b->worker)
        return fail(FAILED, "%s", err);
    b->session = opts->session;
    b->session.worker = b->worker;
    int code = gemma2_worker_plan(p->model, &worker, &threads);
    if (code == GEMMA2_OK)
        code = gemma2_session_plan(p->model, &b->session, &plan);
    if (code < 0)
        return plan_failed(worker.n_context, code);
    uint64_t logits = 4 * (uint64_t)p->config->n_vocab, one = plan.total + logits;
    while (!opts->parallel && b->n_slots > 1 && b->n_slots * one > memory_bytes() / 2)
        b->n_slots--;
    format_bytes(each, one);
    format_bytes(all, b->n_slots * one + threads.total);
    if (!opts->quiet)
        remark("batch: at most %zu sessions of up to %" PRId32 " tokens, %s each, %s in all",
               b->n_slots, worker.n_context ? worker.n_context : p->config->n_context, each, all);
    b->slots = calloc(b->n_slots, sizeof *b->slots);
    for (size_t i = 0; b->slots && i < b->n_slots; i++) {
        batch_slot *s = b->slots + i;
        s->p = (program){.opts = &s->opts, .model = p->model, .config = p->config, .silent = 1,
                         .out = {.memory = &b->line}, .logits = malloc((size_t)logits)};
        s->piece = malloc((size_t)p->config->max_piece_bytes + 1);
        if (!s->p.logits || !s->piece || !extend(&s->id, 64, 1))
            return out_of_memory();
    }
    return b->slots ? DONE : out_of_memory();
}

static void close_batch(batch *b)
{
    for (batch_slot *s = b->slots; s && s < b->slots + b->n_slots; s++) {
        s->p.constraint = s->held;
        close_program(&s->p);
        json_free(&s->said);
        void *const all[] = {s->stops.items, s->choices.items, s->messages.items, s->id.items,
                             s->piece};
        free_all(all, sizeof all / sizeof *all);
    }
    gemma2_worker_free(b->worker);
    for (size_t i = 0; b->ids && i < N_HASHES; i++)
        for (line_id *id = b->ids[i], *next; id; id = next) {
            next = id->next;
            free(id);
        }
    void *const rest[] = {b->slots, b->ids, b->in.bytes.items, b->line.items};
    free_all(rest, sizeof rest / sizeof *rest);
    if (b->in.file)
        fclose(b->in.file);
    if (b->out && b->out != stdout)
        fclose(b->out);
}

static int answer_lines(program *p)
{
    static const char exact[] = "reference|scalar|avx2|avxvnni|avx512"; /* no bf16 units */
    batch b = {.p = p, .exact = p->opts->open.exact_prefill ||
                                which_word(exact, p->config->isa) >= 0};
    p->seed = p->opts->seed_given ? p->opts->seed : random_seed();
    overheard = b.error;
    b.ids = calloc(N_HASHES, sizeof *b.ids);
    int status = b.ids ? load_constraint(p) : out_of_memory();
    status = status ? status : open_lines(&b);
    status = status ? status : open_slots(&b);
    status = status ? status : open_results(&b);
    if (status == DONE && !p->opts->seed_given && b.n_kept)
        status = recall_seed(&b);
    if (status == DONE) {
        patience = PATIENCE;
        b.began = seconds();
        status = run_batch(&b);
        clear_progress(p);
        double time = seconds() - b.began;
        if (!p->opts->quiet)
            remark("batch: %zu done, %zu failed, %zu done before; prompts %zu tokens and %zu "
                   "shared, replies %zu, %.1f tok/s in %.1f s; seed %" PRIu64, b.done, b.failed,
                   b.skipped, b.prompt_tokens, b.shared_tokens, b.reply_tokens,
                   rate(b.reply_tokens, time), time, p->seed);
    }
    int to_stdout = b.out == stdout;
    close_batch(&b);
    overheard = NULL;
    if (p->out.error && (to_stdout || reader_left(p->out.error)))
        return DONE; /* finish_output says what there is to say */
    if (p->out.error)
        return fail(FAILED, "cannot write to %s: %s", p->opts->results, strerror(p->out.error));
    if (status != DONE)
        fail(status, "%s", b.error);
    return stop_asked ? INTERRUPTED : status ? status : b.failed ? FAILED : DONE;
}

/* ===================================================================================
 * 8. main
 * =================================================================================== */

/* The command that makes a model of what is at path: the name of the result is that of the
 * checkpoint, in the directory one is in. */
static void converting(const char *path, char *command, size_t size)
{
    char name[256], from[SENTENCE / 3], to[SENTENCE / 3];
    size_t end = strlen(path), start, dot;
    while (end > 1 && (path[end - 1] == '/' || path[end - 1] == '\\'))
        end--;
    for (start = end; start && path[start - 1] != '/' && path[start - 1] != '\\'; start--)
        ;
    static const char *const endings[] = {".gguf", ".safetensors", ".bin", ".pt", ".pth", ".zip"};
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++) {
        dot = strlen(endings[i]);
        if (end - start > dot && strncmp(path + end - dot, endings[i], dot) == 0)
            end -= dot;
    }
    int is_name = strspn(path + start, "./\\") < end - start;
    snprintf(name, sizeof name, "%.*s%s.bin", is_name ? (int)(end - start) : 5,
             is_name ? path + start : "model", strncmp(path + end, ".bin", 4) ? "" : "-gemma2");
    quote_path(path, from, sizeof from);
    quote_path(name, to, sizeof to);
    snprintf(command, size, "%s %s %s", strncmp(program_name, "gemma2", 6) == 0 ?
             "gemma2-export" : "python3 export.py", from, to);
}

/* The library's sentence on a file that is no model, and for a checkpoint the command that makes
 * a model of it. */
static int refuse_model(const char *path, const char *sentence)
{
    char command[SENTENCE], head[HEAD_BYTES];
    FILE *file = is_special(path) ? NULL : open_path(path, "rb");
    size_t n = file ? fread(head, 1, sizeof head, file) : 0;
    if (file)
        fclose(file);
    if (!is_directory(path) && !kind_of(head, n)->converts)
        return fail(BAD_MODEL, "%s", sentence);
    converting(path, command, sizeof command);
    const char *advice = strrchr(sentence, ';'); /* of the library, which knows no command */
    return fail(BAD_MODEL, "%.*s; convert it with: %s",
                advice ? (int)(advice - sentence) : SENTENCE, sentence, command);
}

/* What the model file must have for what is asked. */
static int check_model_fits(program *p)
{
    const gemma2_config *c = p->config;
    const options *opts = p->opts;
    if (c->n_layers == 0 && EVALUATES & ONE(opts->mode))
        return fail(BAD_MODEL, "%s holds a tokenizer but no model; give a model file", opts->model);
    if (c->n_layers && opts->session.window > c->window)
        return fail(USAGE, "--window %" PRId32 " is above the model's window of %" PRId32,
                    opts->session.window, c->window);
    for (uint32_t i = 0; i < opts->sampler.n_bias; i++)
        if (opts->biases[i].id >= c->n_vocab)
            return fail(USAGE, "--logit-bias: token id %" PRId32 " is outside the vocabulary of "
                        "%" PRId32 " pieces", opts->biases[i].id, c->n_vocab);
    return open_chat(p);
}

static int open_session(program *p, const gemma2_session_params *params)
{
    char err[256], plan[160];
    const options *opts = p->opts;
    double began = seconds();
    int status = memory_plan(p, params, plan);
    if (status != DONE)
        return status;
    if (!opts->quiet && params->n_context > p->config->n_context)
        fprintf(stderr, "warning: a context of %" PRId32 " is more than the %" PRId32
                        " that the model was trained for\n",
                params->n_context, p->config->n_context);
    int32_t threads = gemma2_threads(params->n_threads);
    if (!opts->quiet && threads < params->n_threads)
        remark("warning: this program was built without OpenMP, so -j %" PRId32 " is one thread",
               params->n_threads);
    if (opts->verbose && !opts->quiet)
        fprintf(stderr, "%" PRId32 " layers, width %" PRId32 ", vocabulary %" PRId32
                        "; instruction set %s, threads %" PRId32 "\n%s\n",
                p->config->n_layers, p->config->d_model, p->config->n_vocab, p->config->isa,
                threads, plan);
    p->session = gemma2_session_new(p->model, params, err, sizeof err);
    if (!p->session)
        return fail(FAILED, "%s", err);
    p->logits = malloc(sizeof *p->logits * (size_t)p->config->n_vocab);
    p->load_s += seconds() - began;
    return p->logits ? DONE : out_of_memory();
}

/* What guesses need: lookup's memory, and the model and session of a draft. */
static int open_ahead(program *p)
{
    char err[SENTENCE];
    const options *opts = p->opts;
    gemma2_ahead_params params;
    gemma2_session_params session = opts->session;
    double began = seconds();
    gemma2_ahead_params_init(&params);
    params.lookup = (uint32_t)opts->lookup != 0;
    params.n_drafts = opts->draft_max < 15 ? opts->draft_max : 15;
    params.n_context = session.n_context = gemma2_context(p->session);
    session.window = 0;
    if (opts->draft) {
        p->draft_model = gemma2_open(opts->draft, &opts->open, err, sizeof err);
        if (!p->draft_model)
            return refuse_model(opts->draft, err);
        p->draft = gemma2_session_new(p->draft_model, &session, err, sizeof err);
        if (!p->draft)
            return fail(gemma2_get_config(p->draft_model)->n_layers ? FAILED : BAD_MODEL,
                        "--draft %s: %s", opts->draft, err);
    } else if (!opts->lookup)
        return DONE;
    params.draft = p->draft;
    p->ahead = gemma2_ahead_new(p->model, &params, err, sizeof err);
    p->load_s += seconds() - began;
    if (!p->ahead && opts->draft && !gemma2_ahead_bytes(p->model, &params))
        return fail(USAGE, "--draft %s: %s", opts->draft, err);
    return p->ahead ? DONE : fail(FAILED, "%s", err);
}

/* Reads the prompt that a mode evaluates. */
static int open_prompt(program *p)
{
    int status = load_prompt(p);
    if (status != DONE)
        return status;
    int32_t context = gemma2_context(p->session);
    const kind *seems = kind_of(p->prompt.items, p->prompt.n);
    if (p->ids.n > (size_t)context && !seems->is_text)
        return fail(USAGE, "%s seems to be %s, not text, and is longer than the context of %" PRId32
                    " tokens", prompt_name(p->opts), seems->what, context);
    if (p->ids.n == 0 || p->ids.n > (size_t)context)
        return refuse_length(p->ids.n, (size_t)context);
    warn_of_prompt(p);
    if (p->opts->mode == REWARD && !p->config->n_scores)
        return fail(USAGE, "--reward: this model has no head for scores; it is no reward model");
    return DONE;
}

static int (*const MODES[])(program *p) = {
    [GENERATE] = generate, [CONVERSE] = converse, [TOKENIZE] = tokenize, [DETOKENIZE] = detokenize,
    [LOGITS] = best_logits, [SCORE] = score, [PERPLEXITY] = perplexity, [IMPORTANCE] = importance,
    [INFO] = info, [CHECK] = check, [TRACE] = trace, [BATCH] = answer_lines, [EMBED] = embed,
    [REWARD] = embed,
};

static int run(program *p)
{
    char err[SENTENCE];
    const options *opts = p->opts;
    int chunks = opts->mode == PERPLEXITY || opts->mode == IMPORTANCE;
    double began = seconds();
    p->model = gemma2_open(opts->model, &opts->open, err, sizeof err);
    p->load_s = seconds() - began;
    if (!p->model)
        return refuse_model(opts->model, err);
    p->config = gemma2_get_config(p->model);
    int status = check_model_fits(p);
    if (status != DONE || opts->mode == BATCH || !(EVALUATES & ONE(opts->mode)))
        return status ? status : MODES[opts->mode](p);

    gemma2_session_params params = opts->session;
    if (chunks && params.n_context == 0)
        params.n_context = p->config->n_context < 512 ? p->config->n_context : 512;
    status = open_session(p, &params);
    if (status != DONE || chunks)
        return status ? status : MODES[opts->mode](p);
    status = load_constraint(p);
    if (status != DONE)
        return status;
    init_sampler(p);
    if (opts->mode == GENERATE || opts->mode == CONVERSE)
        status = open_ahead(p);
    if (status == DONE && (opts->kept || opts->loaded))
        status = load_session(p, opts->kept ? opts->kept : opts->loaded, opts->kept != NULL);
    if (status == DONE && opts->mode != CONVERSE)
        status = open_prompt(p);
    if (status != DONE)
        return status;
    status = MODES[opts->mode](p);
    int all_said = status == DONE || (status == INTERRUPTED && opts->mode == CONVERSE);
    if (!all_said || p->out.error || !opts->kept)
        return status;
    int saved = keep_shown(p);
    if (saved == DONE)
        saved = save_session(p, opts->kept);
    return saved != DONE ? saved : status;
}

static void init_options(options *opts)
{
    *opts = (options){.max_tokens = -1, .trace_layer = -1, .lookup = 1, .full_drops = 1};
    gemma2_sampler_init(&opts->sampler, 0);
    gemma2_open_params_init(&opts->open);
    gemma2_session_params_init(&opts->session);
}

int main(int argc, char **argv)
{
    options opts;
    init_options(&opts);
    program p = {.opts = &opts, .settings = &opts};
    patience = stop_asked = 0; /* a test may call it again */
    platform_init();
    catch_interrupts();
    argv = utf8_arguments(&argc, argv);
    if (!argv)
        return out_of_memory();
    name_program(argc > 0 ? argv[0] : NULL);
    if (argc < 2) {
        fprintf(stderr, "usage: %s MODEL [options] [PROMPT]\n"
                        "example: %s story.bin \"Once upon a time\"\n"
                        "%s --help shows the rest\n", program_name, program_name, program_name);
        return USAGE;
    }
    opts.stops = malloc(sizeof *opts.stops * (size_t)argc);
    opts.choices = malloc(sizeof *opts.choices * (size_t)argc);
    opts.biases = malloc(sizeof *opts.biases * ((size_t)argc + 16));
    opts.given = malloc(sizeof *opts.given * (size_t)argc);
    p.out.terminal = is_terminal(stdout);
    mid_line = p.out.terminal;
    int has_memory = opts.stops && opts.choices && opts.biases && opts.given;
    int status = has_memory ? parse_options(&opts, argc, argv) : out_of_memory();
    p.shows_progress = !opts.quiet && is_terminal(stderr);
    if (status == DONE && opts.help)
        print_help(&p.out);
    else if (status == DONE && opts.version)
        put_format(&p.out, "%s (gemma2.c) %s\n", program_name, gemma2_version());
    else if (status == DONE && (status = check_options(&opts)) == DONE)
        status = run(&p);
    status = finish_output(&p.out, status);

    interruptible = NULL;
    close_program(&p);
    gemma2_close(p.model);
    void *const rest[] = {opts.stops, opts.choices, opts.biases, opts.given};
    free_all(rest, sizeof rest / sizeof *rest);
    return status == INTERRUPTED && ended_by ? 128 + ended_by : status;
}

/* ===================================================================================
 * 9. POSIX
 * =================================================================================== */
#ifndef _WIN32

/* On standard error; a signal handler may call it. */
static void show_bytes(const char *bytes, size_t n)
{
    ssize_t written = write(STDERR_FILENO, bytes, n);
    (void)written; /* there is nothing to be done about it */
}

/* Calls nothing but what a signal handler may. */
static void on_interrupt(int signal_number)
{
    if (signal_number != SIGINT)
        ended_by = signal_number;
    if (patience > 0) {
        patience--;
        stop_asked = 1;
        gemma2_cancel(interruptible, 1); /* NULL is refused, and that is all */
        return;
    }
    show_bytes("\n", 1); /* the terminal stands behind ^C */
    terminal_restore();
    _Exit(128 + signal_number);
}

/* A page of the mapped model file is no longer there: the file became shorter, or its disk
 * fails.  No instruction can go on from there, so what is left is to say so.  Calls nothing
 * but what a signal handler may. */
static void on_lost_page(int signal_number, siginfo_t *info, void *context)
{
    static const char sentence[] = ": the model file can no longer be read: it became "
                                   "shorter while in use, or its disk failed; copy it again\n";
    (void)context;
    terminal_restore();
    if (info->si_code != BUS_ADRERR) { /* not about a file */
        signal(signal_number, SIG_DFL);
        raise(signal_number);
        return;
    }
    show_bytes("\n", mid_line != 0);
    show_bytes(program_name, strlen(program_name));
    show_bytes(sentence, sizeof sentence - 1);
    _Exit(BAD_MODEL);
}

/* SIGQUIT and what a fault of the program raises: ends it as always. */
static void on_quit(int signal_number)
{
    terminal_restore();
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

static void catch_interrupts(void)
{
    struct sigaction interrupt = {0}, inherited;
    interrupt.sa_handler = on_interrupt;
    interrupt.sa_flags = SA_RESTART;
    sigemptyset(&interrupt.sa_mask);
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP};
    for (int i = 0; i < 3; i++)
        if (sigaction(numbers[i], NULL, &inherited) == 0 && inherited.sa_handler != SIG_IGN)
            sigaction(numbers[i], &interrupt, NULL);
}

static void platform_init(void)
{
    struct sigaction lost_page = {0};
    lost_page.sa_sigaction = on_lost_page;
    lost_page.sa_flags = SA_SIGINFO;
    sigemptyset(&lost_page.sa_mask);
    sigaction(SIGBUS, &lost_page, NULL);
    signal(SIGPIPE, SIG_IGN);
}

static char **utf8_arguments(int *argc, char **argv)
{
    (void)argc;
    return argv;
}

static double seconds(void)
{
    struct timespec now = {0};
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static FILE *open_path(const char *path, const char *mode) { return fopen(path, mode); }
static void remove_path(const char *path) { remove(path); }

static int is_directory(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

static int is_special(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && !S_ISREG(st.st_mode);
}

static char *follow_links(const char *path)
{
    char *target = realpath(path, NULL);
    return target || errno == ENOMEM ? target : copy_of(path);
}

static FILE *open_beside(const char *path, char *name, size_t size)
{
    if (!has_name_beside(path, "XXXXXX", name, size))
        return NULL;
    int fd = mkstemp(name);
    FILE *file = fd < 0 ? NULL : fdopen(fd, "wb");
    int reason = errno;
    if (fd >= 0 && !file)
        close(fd), remove(name);
    errno = reason;
    return file;
}

static int replace_file(FILE *file, const char *name, const char *path, const void *bytes,
                        size_t n)
{
    int ok = fwrite(bytes, 1, n, file) == n && fflush(file) == 0 && fsync(fileno(file)) == 0;
    return fclose(file) == 0 && ok && rename(name, path) == 0;
}

static int is_terminal(FILE *file) { return isatty(fileno(file)); }
static int reader_left(int error) { return error == EPIPE; }

/* A terminal's lines have at most 4,095 bytes; keys that are handed over one at a time have no
 * such limit. */
static struct termios lines, keys;
static volatile sig_atomic_t is_raw;
static volatile sig_atomic_t suspensions; /* counted, so that each is noticed */

/* The settings, and whether pastes are marked (bracketed paste). */
static void set_terminal(const struct termios *settings, int marks_pastes)
{
    show_bytes(marks_pastes ? "\033[?2004h" : "\033[?2004l", 8);
    tcsetattr(STDIN_FILENO, TCSANOW, settings);
}

static void terminal_restore(void)
{
    if (!is_raw)
        return;
    is_raw = 0;
    signal(SIGTTOU, SIG_IGN); /* also from the background */
    set_terminal(&lines, 0);
}

/* Ctrl-Z, and what sends the program back to the foreground. */
static void on_suspend(int signal_number)
{
    int reason = errno;
    (void)signal_number;
    if (is_raw) {
        show_bytes("\033[J", 3);
        set_terminal(&lines, 0);
    }
    raise(SIGSTOP);
    if (is_raw)
        set_terminal(&keys, 1);
    suspensions++;
    errno = reason;
}

static void on_resize(int signal_number) { (void)signal_number; } /* it ends the wait for keys */

static int terminal_raw(void)
{
    struct sigaction suspend = {0};
    const char *name = getenv("TERM");
    static int entered_before;
    if (!name || strcmp(name, "dumb") == 0 || !isatty(STDERR_FILENO) ||
        (!entered_before && tcgetattr(STDIN_FILENO, &lines) != 0)) /* an editor may change them */
        return 0;
    keys = lines;
    keys.c_lflag &= ~(tcflag_t)(ICANON | ECHO | IEXTEN);
    keys.c_lflag |= NOFLSH; /* Ctrl-C takes back nothing that was typed */
    keys.c_iflag &= ~(tcflag_t)(ICRNL | IXON);
    keys.c_cc[VMIN] = 1;
    keys.c_cc[VTIME] = 0;
    suspend.sa_handler = on_suspend;
    suspend.sa_flags = SA_RESTART;
    sigemptyset(&suspend.sa_mask);
    sigaction(SIGTSTP, &suspend, NULL);
    static const int deadly[] = {SIGQUIT, SIGABRT, SIGSEGV, SIGFPE, SIGILL};
    for (int i = 0; i < 5; i++)
        signal(deadly[i], on_quit);
    signal(SIGWINCH, on_resize);
    if (!entered_before)
        atexit(terminal_restore);
    entered_before = is_raw = 1;
    set_terminal(&keys, 1);
    return 1;
}

static int terminal_size(size_t *width, size_t *height)
{
    static sig_atomic_t seen;
    struct winsize size = {0};
    int before = seen;
    seen = suspensions;
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0) {
        *width = size.ws_col ? size.ws_col : *width;
        *height = size.ws_row ? size.ws_row : *height;
    }
    return seen != before;
}

static int input_waits(int milliseconds)
{
    struct pollfd input = {STDIN_FILENO, POLLIN, 0};
    return poll(&input, 1, milliseconds) > 0 ? input.revents : 0;
}

/* A terminal that is gone reads as ended. */
static long read_terminal(char *bytes, size_t n)
{
    int events = input_waits(200);
    errno = EINTR;
    if (!events)
        return -1;
    long got = (long)read(STDIN_FILENO, bytes, n);
    return got < 0 && events & POLLHUP ? 0 : got;
}

static int edit_file(const char *path)
{
    char word[SENTENCE], command[2 * SENTENCE];
    const char *name = getenv("VISUAL");
    name = name && *name ? name : getenv("EDITOR");
    quote_path(path, word, sizeof word);
    snprintf(command, sizeof command, "%s %s", name && *name ? name : "vi", word);
    return system(command);
}

static long read_input(char *bytes, size_t n, int wait)
{
    struct pollfd input = {STDIN_FILENO, POLLIN, 0};
    if (poll(&input, 1, wait ? 200 : 0) <= 0) {
        errno = EAGAIN;
        return -1;
    }
    return (long)read(STDIN_FILENO, bytes, n);
}

static uint64_t memory_bytes(void)
{
#ifdef _SC_PHYS_PAGES
    long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    if (pages > 0 && size > 0)
        return (uint64_t)pages * (uint64_t)size;
#endif
    return UINT64_MAX;
}

static int is_cut(size_t line) { return line >= 4095; }

#else
/* ===================================================================================
 * 10. Windows: wide paths, a console with a code page, no links
 * =================================================================================== */

static UINT console_input, console_output;

static void restore_console(void)
{
    SetConsoleCP(console_input);
    SetConsoleOutputCP(console_output);
}

static void on_interrupt(int signal_number)
{
    signal(signal_number, on_interrupt);
    if (patience <= 0)
        _Exit(128 + signal_number);
    patience--;
    stop_asked = 1;
    gemma2_cancel(interruptible, 1); /* NULL is refused, and that is all */
}

static void catch_interrupts(void)
{
    signal(SIGINT, on_interrupt);
}

static void platform_init(void)
{
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
    _setmode(_fileno(stderr), _O_BINARY);
    console_input = GetConsoleCP(), console_output = GetConsoleOutputCP();
    SetConsoleCP(CP_UTF8), SetConsoleOutputCP(CP_UTF8);
    atexit(restore_console);
}

/* argv may be in a code page that lacks most characters. */
static char **utf8_arguments(int *argc, char **argv)
{
    wchar_t **wide = CommandLineToArgvW(GetCommandLineW(), argc);
    argv = wide ? calloc((size_t)*argc + 1, sizeof *argv) : NULL;
    for (int i = 0; argv && i < *argc; i++) {
        int n = WideCharToMultiByte(CP_UTF8, 0, wide[i], -1, NULL, 0, NULL, NULL);
        argv[i] = malloc((size_t)n);
        if (!argv[i])
            return NULL;
        WideCharToMultiByte(CP_UTF8, 0, wide[i], -1, argv[i], n, NULL, NULL);
    }
    LocalFree(wide);
    return argv;
}

static double seconds(void)
{
    LARGE_INTEGER ticks, a_second;
    QueryPerformanceCounter(&ticks), QueryPerformanceFrequency(&a_second);
    return (double)ticks.QuadPart / (double)a_second.QuadPart;
}

/* A path as Windows takes it; 0 where it is not UTF-8 or too long. */
static int widen(const char *path, wchar_t wide[4096])
{
    errno = ENOENT;
    return MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, wide, 4096);
}

static FILE *open_path(const char *path, const char *mode)
{
    wchar_t wide[4096];
    return widen(path, wide) ? _wfopen(wide, *mode == 'r' ? L"rb" : *mode == 'a' ? L"ab" : L"wb")
                             : NULL;
}

static void remove_path(const char *path)
{
    wchar_t wide[4096];
    if (widen(path, wide))
        _wremove(wide);
}

static int has_attributes(const char *path, DWORD which)
{
    wchar_t wide[4096];
    DWORD found = widen(path, wide) ? GetFileAttributesW(wide) : INVALID_FILE_ATTRIBUTES;
    return found != INVALID_FILE_ATTRIBUTES && found & which;
}

static int is_directory(const char *path) { return has_attributes(path, FILE_ATTRIBUTE_DIRECTORY); }

static int is_special(const char *path)
{
    return has_attributes(path, FILE_ATTRIBUTE_DIRECTORY | FILE_ATTRIBUTE_DEVICE);
}

static char *follow_links(const char *path) { return copy_of(path); }

static FILE *open_beside(const char *path, char *name, size_t size)
{
    char process[16];
    snprintf(process, sizeof process, "%lx", (unsigned long)GetCurrentProcessId());
    return has_name_beside(path, process, name, size) ? open_path(name, "wb") : NULL;
}

static int replace_file(FILE *file, const char *name, const char *path, const void *bytes,
                        size_t n)
{
    wchar_t from[4096], to[4096];
    int ok = fwrite(bytes, 1, n, file) == n && fflush(file) == 0;
    if (fclose(file) != 0 || !ok || !widen(name, from) || !widen(path, to))
        return 0;
    errno = EACCES;
    return MoveFileExW(from, to, MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH);
}

static int is_terminal(FILE *file)
{
    DWORD mode; /* _isatty takes NUL for a terminal */
    return GetConsoleMode((HANDLE)_get_osfhandle(_fileno(file)), &mode) != 0;
}

static int reader_left(int error) { return error == EPIPE || error == EINVAL; }

/* The console edits lines of any length. */
static int terminal_raw(void) { return 0; }
static void terminal_restore(void) {}
static int is_cut(size_t line) { return (void)line, 0; }

static int terminal_size(size_t *width, size_t *height) { return (void)width, (void)height, 0; }

/* The console's own line as UTF-8; Ctrl-Z at its start ends. */
static long read_terminal(char *bytes, size_t n)
{
    static wchar_t wide[512];
    static DWORD kept; /* the first half of a character of two units waits for the other */
    DWORD got = 0, most = (DWORD)(n / 3 < 512 ? n / 3 : 512) - kept;
    if (!ReadConsoleW(GetStdHandle(STD_INPUT_HANDLE), wide + kept, most, &got, NULL))
        return 0;
    errno = EINTR; /* Ctrl-C ends a line without one */
    if (got == 0 || wide[0] == 0x1A)
        return got == 0 ? -1 : 0;
    got += kept;
    kept = wide[got - 1] >= 0xD800 && wide[got - 1] <= 0xDBFF;
    int size = WideCharToMultiByte(CP_UTF8, 0, wide, (int)(got - kept), bytes, (int)n, NULL, NULL);
    wide[0] = kept ? wide[got - 1] : wide[0];
    return size > 0 ? size : -1;
}

static int edit_file(const char *path)
{
    char command[SENTENCE];
    wchar_t wide[4096];
    const char *name = getenv("EDITOR");
    snprintf(command, sizeof command, "%s \"%s\"", name && *name ? name : "notepad", path);
    return widen(command, wide) ? _wsystem(wide) : 1;
}

/* A key that stands for a character. */
static long read_input(char *bytes, size_t n, int wait)
{
    (void)wait; /* pipes there cannot be asked */
    return (long)fread(bytes, 1, n, stdin);
}

static uint64_t memory_bytes(void)
{
    MEMORYSTATUSEX status = {.dwLength = sizeof status};
    return GlobalMemoryStatusEx(&status) ? status.ullTotalPhys : UINT64_MAX;
}

static int input_waits(int milliseconds)
{
    INPUT_RECORD records[128];
    DWORD n = 0;
    Sleep((DWORD)milliseconds);
    if (!PeekConsoleInputW(GetStdHandle(STD_INPUT_HANDLE), records, 128, &n))
        return 0;
    for (DWORD i = 0; i < n; i++)
        if (records[i].EventType == KEY_EVENT && records[i].Event.KeyEvent.bKeyDown &&
            records[i].Event.KeyEvent.uChar.UnicodeChar)
            return 1;
    return 0;
}
#endif
