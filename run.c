/* run.c - the command line of gemma2.c, on nothing but gemma2.h and libc.
 *
 *   1 Platform     terminals, interrupts, the clock, a seed: all that is not plain C11
 *   2 Ground       exit codes, messages, growable arrays, checked output
 *   3 Options      one table that drives parsing, --help, man page, completion, suggestions
 *   4 Text         UTF-8, what a terminal may see, JSON strings, lists of ids
 *   5 The prompt   where it comes from, its ids, the chat template
 *   6 The reply    prefill, sampling, stop strings, streaming, timings, saved sessions
 *   7 Modes        generate, converse, tokenize, logits, score, perplexity, importance,
 *                  info, check
 *   8 main
 *
 * Standard output carries what was asked for and nothing else.  A function that returns
 * int returns an exit code, 0 to go on, unless its comment says otherwise; whoever finds
 * the failure prints the sentence.  */
#if !defined(_WIN32) && !defined(_XOPEN_SOURCE)
#define _XOPEN_SOURCE 700
#endif
#ifdef _WIN32
#define _CRT_RAND_S
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
#include <fcntl.h>
#include <io.h>
#include <windows.h>
#include <shellapi.h>
#undef IN
#else
#include <sys/stat.h>
#include <unistd.h>
#endif

/* ===================================================================================
 * 1. Platform
 * =================================================================================== */

enum { DONE = 0, FAILED = 1, USAGE = 2, BAD_MODEL = 3, INTERRUPTED = 130 };

static const char *program_name = "run"; /* as it was called: installed it is gemma2 */

/* What Ctrl-C does.  While a reply is made it asks for a stop and uses up some patience
 * (a second one may just be what timeout(1) sends along); without patience it ends the
 * program at once. */
enum { PATIENCE = 2 };
static volatile sig_atomic_t patience, stop_asked;
static volatile sig_atomic_t ended_by; /* SIGTERM, SIGHUP: the same, and no more questions */
static volatile sig_atomic_t mid_line; /* a terminal may show text without its newline */
static gemma2_session *volatile interruptible; /* whose evaluation it cuts short, or NULL */

/* Calls nothing but what a signal handler may. */
static void on_interrupt(int signal_number)
{
#ifdef _WIN32
    signal(signal_number, on_interrupt);
#else
    if (signal_number != SIGINT)
        ended_by = signal_number;
#endif
    if (patience > 0) {
        patience--;
        stop_asked = 1;
        gemma2_cancel(interruptible, 1); /* NULL is refused, and that is all */
        return;
    }
#ifndef _WIN32
    ssize_t written = write(STDERR_FILENO, "\n", 1); /* the terminal stands behind ^C */
    (void)written;
#endif
    _Exit(128 + signal_number);
}

#ifndef _WIN32
/* A page of the mapped model file that is not there any more: the file became shorter, or its
 * disk fails.  No instruction can go on from there; what is left is to say so.  Calls nothing
 * but what a signal handler may. */
static void on_lost_page(int signal_number, siginfo_t *info, void *context)
{
    static const char sentence[] = ": the model file can no longer be read: it became "
                                   "shorter while in use, or its disk failed; copy it again\n";
    (void)context;
    if (info->si_code != BUS_ADRERR) { /* not about a file */
        signal(signal_number, SIG_DFL);
        raise(signal_number);
        return;
    }
    ssize_t written = mid_line ? write(STDERR_FILENO, "\n", 1) : 0;
    written += write(STDERR_FILENO, program_name, strlen(program_name));
    written += write(STDERR_FILENO, sentence, sizeof sentence - 1);
    (void)written;
    _Exit(BAD_MODEL);
}
#else
static UINT console_input, console_output;

static void restore_console(void)
{
    SetConsoleCP(console_input);
    SetConsoleOutputCP(console_output);
}
#endif

/* Signals as above, but those that whoever started us ignores; whether they end a waiting
 * read. */
static void catch_interrupts(int ends_reading)
{
#ifdef _WIN32
    (void)ends_reading; /* it always does */
    signal(SIGINT, on_interrupt);
#else
    struct sigaction interrupt = {0}, inherited;
    interrupt.sa_handler = on_interrupt;
    interrupt.sa_flags = ends_reading ? 0 : SA_RESTART;
    sigemptyset(&interrupt.sa_mask);
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP};
    for (int i = 0; i < 3; i++)
        if (sigaction(numbers[i], NULL, &inherited) == 0 && inherited.sa_handler != SIG_IGN)
            sigaction(numbers[i], &interrupt, NULL);
#endif
}

/* Standard streams byte for byte, a terminal in UTF-8, a broken pipe as a failed write, and a
 * file that shrinks while it is mapped. */
static void platform_init(void)
{
#ifdef _WIN32
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
    _setmode(_fileno(stderr), _O_BINARY);
    console_input = GetConsoleCP(), console_output = GetConsoleOutputCP();
    SetConsoleCP(CP_UTF8), SetConsoleOutputCP(CP_UTF8);
    atexit(restore_console);
#else
    struct sigaction lost_page = {0};
    lost_page.sa_sigaction = on_lost_page;
    lost_page.sa_flags = SA_SIGINFO;
    sigemptyset(&lost_page.sa_mask);
    sigaction(SIGBUS, &lost_page, NULL);
    signal(SIGPIPE, SIG_IGN);
#endif
}

/* Arguments in UTF-8, to the end of the program; argv may be in a code page that lacks most
 * characters.  NULL without memory. */
static char **utf8_arguments(int *argc, char **argv)
{
#ifdef _WIN32
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
#else
    (void)argc;
#endif
    return argv;
}

#ifdef _WIN32
/* A path as Windows takes it; 0 where it is not UTF-8 or too long. */
static int widen(const char *path, wchar_t wide[4096])
{
    errno = ENOENT;
    return MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, wide, 4096);
}
#endif

/* fopen and remove; the path is UTF-8. */
static FILE *open_path(const char *path, const char *mode)
{
#ifdef _WIN32
    wchar_t wide[4096];
    return widen(path, wide) ? _wfopen(wide, *mode == 'r' ? L"rb" : L"wb") : NULL;
#else
    return fopen(path, mode);
#endif
}

static void remove_path(const char *path)
{
#ifdef _WIN32
    wchar_t wide[4096];
    if (widen(path, wide))
        _wremove(wide);
#else
    remove(path);
#endif
}

/* Whether a write failed because the reader of a pipe has left. */
static int reader_left(int error)
{
#ifdef _WIN32
    return error == EPIPE || error == EINVAL;
#else
    return error == EPIPE;
#endif
}

static int is_terminal(FILE *file)
{
#ifdef _WIN32
    DWORD mode; /* _isatty takes NUL for a terminal */
    return GetConsoleMode((HANDLE)_get_osfhandle(_fileno(file)), &mode) != 0;
#else
    return isatty(fileno(file));
#endif
}

static double seconds(void)
{
#ifdef _WIN32
    LARGE_INTEGER ticks, a_second;
    QueryPerformanceCounter(&ticks), QueryPerformanceFrequency(&a_second);
    return (double)ticks.QuadPart / (double)a_second.QuadPart;
#else
    struct timespec now = {0};
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
#endif
}

/* 32 bits: easy to type again, and exact as a number in any reader of JSON. */
static uint64_t random_seed(void)
{
#ifdef _WIN32
    unsigned seed = 0;
    if (rand_s(&seed) == 0)
        return seed;
#else
    uint32_t seed = 0;
    FILE *source = fopen("/dev/urandom", "rb");
    if (source) {
        setvbuf(source, NULL, _IONBF, 0);
        size_t got = fread(&seed, sizeof seed, 1, source);
        fclose(source);
        if (got == 1)
            return seed;
    }
#endif
    uint64_t mix = (uint64_t)time(NULL) ^ (uint64_t)(seconds() * 1e9) ^ (uintptr_t)&seed;
    return (mix * 6364136223846793005u) >> 32;
}

/* Whether there is something at path that is no file: a device, a pipe, a directory. */
static int is_special(const char *path)
{
#ifdef _WIN32
    wchar_t wide[4096];
    DWORD kind = widen(path, wide) ? GetFileAttributesW(wide) : INVALID_FILE_ATTRIBUTES;
    return kind != INVALID_FILE_ATTRIBUTES &&
           kind & (FILE_ATTRIBUTE_DIRECTORY | FILE_ATTRIBUTE_DEVICE);
#else
    struct stat st;
    return stat(path, &st) == 0 && !S_ISREG(st.st_mode);
#endif
}

/* What path leads to over links, to be freed; a link is not replaced by a file.  NULL without
 * memory. */
static char *follow_links(const char *path)
{
#ifndef _WIN32
    char *target = realpath(path, NULL);
    if (target || errno == ENOMEM)
        return target;
#endif
    size_t n = strlen(path) + 1;
    char *copy = malloc(n);
    return copy ? memcpy(copy, path, n) : NULL;
}

/* Makes a new file beside path, readable by its owner only; its name goes to name. */
static FILE *open_beside(const char *path, char *name, size_t size)
{
#ifdef _WIN32
    int n = snprintf(name, size, "%s.%lx", path, (unsigned long)GetCurrentProcessId());
#else
    int n = snprintf(name, size, "%s.XXXXXX", path);
#endif
    if (n >= (int)size || !*path) {
        errno = *path ? ENAMETOOLONG : ENOENT;
        return NULL;
    }
#ifdef _WIN32
    return open_path(name, "wb");
#else
    int fd = mkstemp(name);
    FILE *file = fd < 0 ? NULL : fdopen(fd, "wb");
    int reason = errno;
    if (fd >= 0 && !file)
        close(fd), remove(name);
    errno = reason;
    return file;
#endif
}

/* Writes the bytes through to the disk and puts the file in the place of path; 1 or 0. */
static int replace_file(FILE *file, const char *name, const char *path, const void *bytes, size_t n)
{
    int ok = fwrite(bytes, 1, n, file) == n && fflush(file) == 0;
#ifdef _WIN32
    wchar_t from[4096], to[4096];
    if (fclose(file) != 0 || !ok || !widen(name, from) || !widen(path, to))
        return 0;
    errno = EACCES;
    return MoveFileExW(from, to, MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH);
#else
    ok = ok && fsync(fileno(file)) == 0;
    ok = fclose(file) == 0 && ok;
    return ok && rename(name, path) == 0;
#endif
}

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

/* One sentence, of a failure; returns status. */
PRINTF_LIKE(2, 3) static int fail(int status, const char *format, ...)
{
    va_list arguments;
    fprintf(stderr, "%s: ", program_name);
    va_start(arguments, format);
    say(format, arguments);
    va_end(arguments);
    return status;
}

/* One that tells of no failure. */
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

/* Standard output.  The first error sticks, and silences what follows. */
typedef struct {
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
    if (n && !out->error)
        note_write(out, fwrite(bytes, 1, n, stdout) != n);
}

PRINTF_LIKE(2, 3) static void put_format(output *out, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    if (!out->error)
        note_write(out, vfprintf(stdout, format, arguments) < 0);
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
        note_write(out, fflush(stdout) != 0);
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

typedef struct {
    const char *model;
    const char *positional, *text, *file, *ids; /* the prompt: at most one of them */
    int n_prompts;
    int chat;
    const char *system;
    int32_t max_tokens; /* -1: no limit */
    gemma2_sampler sampler;
    gemma2_open_params open;
    gemma2_session_params session;
    uint64_t seed;
    int seed_given;
    const char **stops; /* room for one per argument */
    size_t n_stops;
    int ignore_eos, echo, json, quiet, verbose, help, version, man;
    int tokenize, score, info, check;
    int32_t logits;
    const char *detokenize, *perplexity, *importance;
    const char *kept, *loaded; /* files of sessions */
    const char *completion;    /* the shell that it is for */
    int32_t block; /* of the importance */
} options;

typedef enum {
    HEADING, /* a line of --help */
    FLAG,    /* int field becomes 1 */
    TEXT,    /* const char * field */
    PROMPT,  /* the same, and counts as a source of the prompt */
    STOP,    /* one more stop string */
    WHOLE,   /* int32_t field */
    REAL,    /* float field */
    SEED,
    CACHE,
    SHELL
} option_kind;

typedef struct {
    char letter;
    const char *name, *argument, *help;
    option_kind kind;
    size_t field;      /* offset in options */
    const char *takes; /* "it takes ...", for values that can be wrong */
    double least, most;
} option;

#define HEAD(text) {0, NULL, NULL, text, HEADING, 0, NULL, 0, 0}
#define IS(kind, member) kind, offsetof(options, member), NULL, 0, 0
#define IN(kind, member, takes, least, most) kind, offsetof(options, member), takes, least, most
#define FROM_0(member) IN(WHOLE, member, "a whole number from 0 to 2147483647", 0, INT32_MAX)
#define FROM_1(member) IN(WHOLE, member, "a whole number from 1 to 2147483647", 1, INT32_MAX)

static const option OPTIONS[] = {
    HEAD("Common options"),
    {'c', "chat", NULL, "use the chat template; without a prompt, on a\n"
     "terminal: a conversation (Ctrl-C stops a reply)", IS(FLAG, chat)},
    {'S', "system", "TEXT", "instructions for a chat, before its first message", IS(TEXT, system)},
    {'n', "max-tokens", "N", "at most N tokens of reply (default: until the\n"
     "model stops or the context is full)", FROM_0(max_tokens)},
    {'t', "temperature", "F", "randomness; 0 is greedy (default 1.0)",
     IN(REAL, sampler.temperature, "a number from 0 to 1000000", 0, 1e6)},
    {'s', "seed", "N", "same seed, same text, on CPUs of one kind or with\n"
     "--exact on all (default: random, shown)",
     IN(SEED, seed, "a whole number from 0 to 18446744073709551615", 0, 0)},
    {'q', "quiet", NULL, "nothing on standard error but errors", IS(FLAG, quiet)},
    {'v', "verbose", NULL, "also show model, memory and instruction set", IS(FLAG, verbose)},
    {'h', "help", NULL, "this text", IS(FLAG, help)},
    {0, "version", NULL, "the version", IS(FLAG, version)},

    HEAD("The prompt: PROMPT, or one of these, or else standard input"),
    {'p', "prompt", "TEXT", "the prompt; may start with a dash", IS(PROMPT, text)},
    {'f', "file", "FILE", "the prompt, byte for byte; - is standard input", IS(PROMPT, file)},
    {0, "ids", "\"IDS\"", "the prompt as token ids; no BOS is added", IS(PROMPT, ids)},
    {0, "echo", NULL, "print the prompt before the reply", IS(FLAG, echo)},

    HEAD("Choosing and stopping"),
    {'k', "top-k", "N", "among the N best tokens; 0: all (default 64)",
     FROM_0(sampler.top_k)},
    {'P', "top-p", "F", "among the best tokens that together have\n"
     "probability F (default 0.95)",
     IN(REAL, sampler.top_p, "a number above 0, at most 1", FLT_MIN, 1)},
    {0, "min-p", "F", "among tokens at least F times as likely as the\n"
     "best (default 0: off)", IN(REAL, sampler.min_p, "a number from 0 to 1", 0, 1)},
    {0, "stop", "TEXT", "end the reply before TEXT; may be repeated",
     IN(STOP, stops, "a text that is not empty", 0, 0)},
    {0, "ignore-eos", NULL, "never choose a token that ends the text", IS(FLAG, ignore_eos)},

    HEAD("Running"),
    {'C', "context", "N", "room for N tokens in all (default: as trained)",
     FROM_1(session.n_context)},
    {'j', "threads", "N", "threads (default: one a processor)",
     IN(WHOLE, session.n_threads, "a whole number from 1 to 1024", 1, 1024)},
    {0, "window", "N", "let local layers see only N tokens (default: as\ntrained)",
     FROM_1(session.window)},
    {0, "kv", "TYPE", "keep keys and values in f32 or f16 (default:\n"
     "f32 for f32 weights, else f16)", IN(CACHE, session.cache_type, "f32 or f16", 0, 0)},
    {0, "exact", NULL, "read prompts in the arithmetic of decoding: slower,\n"
     "the same result on every CPU", IS(FLAG, open.exact_prefill)},
    {0, "in-memory", NULL, "read the weights into memory, huge pages asked for:\n"
     "slower to start, the last tenth of speed", IS(FLAG, open.read_into_memory)},

    HEAD("Going on another time"),
    {0, "session", "FILE", "go on from FILE where it exists, and keep there what\n"
     "was read and said; the prompt is what comes next", IS(TEXT, kept)},
    {0, "load", "FILE", "go on from such a file, and leave it as it is", IS(TEXT, loaded)},

    HEAD("Instead of plain text"),
    {0, "json", NULL, "one JSON object: text, prompt_ids, ids,\n"
     "logprobs, finish_reason, seed, timings", IS(FLAG, json)},
    {0, "tokenize", NULL, "the prompt's ids on one line, BOS first", IS(FLAG, tokenize)},
    {0, "detokenize", "\"IDS\"", "the text of ids, byte for byte", IS(TEXT, detokenize)},
    {0, "logits", "N", "the N best next tokens: id, logit, piece", FROM_1(logits)},
    {0, "score", NULL, "log-probability of every prompt token, total", IS(FLAG, score)},
    {0, "perplexity", "FILE", "perplexity of a text; the method is below", IS(TEXT, perplexity)},
    {0, "importance", "OUT", "how large the inputs of every product are, over the\n"
     "text of the prompt, for export.py --importance OUT", IS(TEXT, importance)},
    {0, "importance-block", "N", "also how N neighbouring inputs go together, so that\n"
     "export.py rounds better: 32, 64, 128 or 256 (the\nfile grows N-fold; default 1)",
     IN(WHOLE, block, "1, 32, 64, 128 or 256", 1, 256)},
    {0, "info", NULL, "facts, sections and memory plan of the model", IS(FLAG, info)},
    {0, "check", NULL, "verify every digest and value of the model file", IS(FLAG, check)},
    {0, "man", NULL, "this text as a manual page", IS(FLAG, man)},
    {0, "completion", "SHELL", "what makes a shell complete these options",
     IN(SHELL, completion, "bash, zsh or fish", 0, 0)},
};
enum { N_OPTIONS = sizeof OPTIONS / sizeof OPTIONS[0], HELP_COLUMN = 27 };

/* The words an option chooses from; NULL where any text will do. */
static const char *words_of(const option *o)
{
    return o->kind == CACHE ? "f32 f16" : o->kind == SHELL ? "bash zsh fish" : NULL;
}

static int is_word_of(const option *o, const char *value)
{
    size_t n = strlen(value), length;
    for (const char *word = words_of(o); *word; word += length + (word[length] == ' ')) {
        length = strcspn(word, " ");
        if (length == n && strncmp(word, value, n) == 0)
            return 1;
    }
    return 0;
}

/* ---- --help: in these texts @ is the program's name ---- */

static const char USAGE_LINE[] = "usage: @ MODEL [options] [PROMPT]\n";
static const char SUMMARY[] = "Runs a Gemma 2 model that export.py made.\n";
static const char EXAMPLES[] =
    "  @ story.bin \"Once upon a time\"              continue a text\n"
    "  @ gemma-2-2b-it.bin -c                      hold a conversation\n"
    "  @ gemma-2-2b-it.bin -c \"Why is it dark?\"    one answer, then exit\n"
    "  @ gemma-2-2b-it.bin -c -S \"Summarise:\" < notes.txt\n"
    "  @ gemma-2-2b-it.bin -c --session moon.chat  a conversation to go on with\n"
    "  @ story.bin -t 0 -n 64 --stop \"The end\" -f start.txt\n"
    "  @ story.bin --json -s 7 \"Hello\" | jq -r .text\n";

static const struct {
    const char *title, *text; /* titles are for the manual page */
} NOTES[] = {
    {"PERPLEXITY",
     "--perplexity follows llama.cpp: the text, after one BOS, is cut into chunks of 512\n"
     "tokens (-C N: of N; a shorter trained context: of that), a rest is dropped, BOS takes\n"
     "the place of each chunk's first token, and the tokens after the first half of each\n"
     "chunk are scored, in the exact arithmetic of decoding.  Printed are exp of the mean\n"
     "negative log-probability and its standard error.\n"},
    {"IMPORTANCE",
     "--importance cuts its text as --perplexity does, but drops nothing and counts every\n"
     "token.  About 100 KB of text are enough.\n"},
    {"SESSIONS",
     "A session's file holds ids, keys and values (as large as the cache, see --info) and fits\n"
     "one model, --window and --kv.  With -c it is a conversation, without a text; --system\n"
     "counts in the first turn only.  It is replaced whole when all went well (and when Ctrl-C\n"
     "at its prompt, SIGTERM or SIGHUP ends a conversation), and stays as it was after an\n"
     "error or an interrupted answer.  Under --exact what follows is the same, to the bit,\n"
     "as in one go.\n"},
    {"OUTPUT",
     "Text goes to standard output, speed, seed and warnings to standard error.  On a\n"
     "terminal control characters of the text are shown as U+FFFD.  --json's seed may\n"
     "exceed 2^53 when you chose it so.\n"},
    {"ENVIRONMENT",
     "GEMMA2_ISA=scalar|avx2|avxvnni|avx512|avx512bf16|amx, on ARM scalar|neon|dotprod|i8mm,\n"
     "forces an instruction set.\n"},
    {"EXIT STATUS",
     "Exit codes: 0 done (also when the reader of a pipe left), 1 failed while running,\n"
     "2 wrong usage, 3 bad, missing or unreadable model file, 130 interrupted\n"
     "(143 by SIGTERM, 129 by SIGHUP).\n"},
};
enum { N_NOTES = sizeof NOTES / sizeof NOTES[0] };

/* The lines of a text, each but the first after that many blanks. */
static void put_indented(output *out, const char *text, int column)
{
    for (const char *end; (end = strchr(text, '\n')) != NULL; text = end + 1)
        put_format(out, "%.*s\n%*s", (int)(end - text), text, column, "");
    put_format(out, "%s\n", text);
}

static void print_help(output *out)
{
    put_named(out, USAGE_LINE);
    put_format(out, "\n%s\nExamples\n", SUMMARY);
    put_named(out, EXAMPLES);
    for (const option *o = OPTIONS; o < OPTIONS + N_OPTIONS; o++) {
        if (o->kind == HEADING) {
            put_format(out, "\n%s\n", o->help);
            continue;
        }
        char left[64], letter[] = {'-', o->letter, ',', '\0'};
        snprintf(left, sizeof left, "  %3s --%s %s", o->letter ? letter : "", o->name,
                 o->argument ? o->argument : "");
        put_format(out, "%-*s", HELP_COLUMN, left);
        put_indented(out, o->help, HELP_COLUMN);
    }
    for (int i = 0; i < N_NOTES; i++)
        put_format(out, "\n%s", NOTES[i].text);
}

/* ---- --man ---- */

/* Text as roff takes it literally; @ is the program's name. */
static void put_roff(output *out, const char *text)
{
    for (const char *c = text; *c; c++) {
        if ((c == text || c[-1] == '\n') && (*c == '.' || *c == '\''))
            put_bytes(out, "\\&", 2);
        if (*c == '@')
            put_roff(out, program_name);
        else if (*c == '-' || *c == '\\')
            put_bytes(out, *c == '-' ? "\\-" : "\\e", 2);
        else
            put_bytes(out, c, 1);
    }
}

static void put_roff_option(output *out, const option *o)
{
    put_format(out, ".TP\n");
    if (o->letter)
        put_format(out, "\\fB\\-%c\\fR, ", o->letter);
    put_format(out, "\\fB");
    put_roff(out, "--");
    put_roff(out, o->name);
    put_format(out, "\\fR");
    if (o->argument) {
        put_format(out, " \\fI");
        put_roff(out, o->argument);
        put_format(out, "\\fR");
    }
    put_bytes(out, "\n", 1);
    put_roff(out, o->help);
    put_bytes(out, "\n", 1);
}

static void print_man(output *out)
{
    put_format(out, ".TH \"");
    put_roff(out, program_name);
    put_format(out, "\" 1 \"\" \"gemma2.c %s\" \"User Commands\"\n.SH NAME\n", gemma2_version());
    put_roff(out, "@");
    put_format(out, " \\- run Gemma 2 language models\n.SH SYNOPSIS\n\\fB");
    put_roff(out, "@");
    put_format(out, "\\fR \\fIMODEL\\fR [\\fIoptions\\fR] [\\fIPROMPT\\fR]\n.SH DESCRIPTION\n");
    put_roff(out, SUMMARY);
    put_format(out, ".SH EXAMPLES\n.nf\n");
    put_roff(out, EXAMPLES);
    put_format(out, ".fi\n.SH OPTIONS\n");
    for (const option *o = OPTIONS; o < OPTIONS + N_OPTIONS; o++)
        if (o->kind == HEADING)
            put_format(out, ".SS \"%s\"\n", o->help);
        else
            put_roff_option(out, o);
    for (int i = 0; i < N_NOTES; i++) {
        put_format(out, ".SH \"%s\"\n", NOTES[i].title);
        put_roff(out, NOTES[i].text);
    }
}

/* ---- --completion ---- */

/* Text inside single quotes, on one line; the characters in `escaped` get a backslash. */
static void put_quoted(output *out, const char *text, const char *escaped)
{
    for (; *text; text++) {
        if (*text == '\'')
            put_bytes(out, "'\\'", 3);
        else if (strchr(escaped, *text))
            put_bytes(out, "\\", 1);
        put_bytes(out, *text == '\n' ? " " : text, 1);
    }
}

static int takes_file(const option *o)
{
    return o->argument && (strcmp(o->argument, "FILE") == 0 || strcmp(o->argument, "OUT") == 0);
}

static const char BASH_FILES[] = "local IFS=$'\\n'; COMPREPLY=($(compgen -f -- \"$word\"));";

/* One arm of a case statement: what follows the option. */
static void put_bash_case(output *out, const option *o)
{
    put_format(out, "    --%s", o->name);
    if (o->letter)
        put_format(out, "|-%c", o->letter);
    put_format(out, ") ");
    if (words_of(o))
        put_format(out, "COMPREPLY=($(compgen -W '%s' -- \"$word\")); ", words_of(o));
    else if (takes_file(o))
        put_format(out, "%s ", BASH_FILES);
    put_format(out, "return ;;\n");
}

static void print_bash(output *out)
{
    put_named(out, "_@() {\n    local word=${COMP_WORDS[COMP_CWORD]}\n"
                   "    local before=${COMP_WORDS[COMP_CWORD-1]}\n    COMPREPLY=()\n"
                   "    [[ $word == = ]] && word=\n" /* --name=value comes as three words */
                   "    [[ $before == = ]] && before=${COMP_WORDS[COMP_CWORD-2]}\n"
                   "    case $before in\n");
    for (const option *o = OPTIONS; o < OPTIONS + N_OPTIONS; o++)
        if (o->kind != HEADING && o->argument)
            put_bash_case(out, o);
    put_format(out, "    esac\n    case $word in\n    -*) COMPREPLY=($(compgen -W '");
    for (const option *o = OPTIONS; o < OPTIONS + N_OPTIONS; o++)
        if (o->kind != HEADING)
            put_format(out, " --%s", o->name);
    put_format(out, "' -- \"$word\")) ;;\n    *) %s ;;\n    esac\n}\n", BASH_FILES);
    put_named(out, "complete -o filenames -F _@ @\n");
}

static void print_zsh(output *out)
{
    put_named(out, "#compdef @\n_arguments");
    for (const option *o = OPTIONS; o < OPTIONS + N_OPTIONS; o++) {
        const char *more = o->kind == STOP ? "*" : "", *value = o->argument ? "=" : "";
        if (o->kind == HEADING)
            continue;
        if (o->letter)
            put_format(out, " \\\n  '(-%c --%s)'{-%c%s,--%s%s}'[", o->letter, o->name, o->letter,
                       o->argument ? "+" : "", o->name, value);
        else
            put_format(out, " \\\n  '%s--%s%s[", more, o->name, value);
        put_quoted(out, o->help, "[]\\");
        put_format(out, "]");
        if (o->argument) {
            put_format(out, ":");
            put_quoted(out, o->argument, ":\\");
            if (words_of(o))
                put_format(out, ":(%s)", words_of(o));
            else
                put_format(out, takes_file(o) ? ":_files" : ": ");
        }
        put_format(out, "'");
    }
    put_format(out, " \\\n  '1:MODEL:_files' '2:PROMPT: '\n");
}

static void print_fish(output *out)
{
    for (const option *o = OPTIONS; o < OPTIONS + N_OPTIONS; o++) {
        if (o->kind == HEADING)
            continue;
        put_named(out, "complete -c @");
        if (o->letter)
            put_format(out, " -s %c", o->letter);
        put_format(out, " -l %s%s", o->name, !o->argument ? "" : takes_file(o) ? " -r -F" : " -x");
        if (words_of(o))
            put_format(out, " -a '%s'", words_of(o));
        put_format(out, " -d '");
        for (const char *c = o->help; *c; c++) {
            if (*c == '\'' || *c == '\\')
                put_bytes(out, "\\", 1);
            put_bytes(out, *c == '\n' ? " " : c, 1);
        }
        put_format(out, "'\n");
    }
}

static void print_completion(output *out, const char *shell)
{
    if (strcmp(shell, "bash") == 0)
        print_bash(out);
    else if (strcmp(shell, "zsh") == 0)
        print_zsh(out);
    else
        print_fish(out);
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

/* Names the option that was likely meant: the other case of a letter, a name that the
 * given one abbreviates, else the name fewest edits away. */
static int unknown_option(const char *argument)
{
    char name[32];
    size_t length = strcspn(argument + strspn(argument, "-"), "=");
    snprintf(name, sizeof name, "%.*s", (int)(length < 31 ? length : 31),
             argument + strspn(argument, "-"));
    length = strlen(name);
    const option *nearest = NULL;
    size_t best = SIZE_MAX;
    for (const option *o = OPTIONS; o < OPTIONS + N_OPTIONS; o++) {
        if (o->kind == HEADING)
            continue;
        int other_case = length == 1 && tolower((unsigned char)name[0]) == o->letter;
        int abbreviated = length && strncmp(o->name, name, length) == 0;
        int its_letter = argument[1] != '-' && argument[1] == o->letter; /* -qc */
        size_t distance = other_case    ? 0
                          : abbreviated ? 1
                          : its_letter  ? 2
                                        : 1 + edit_distance(name, o->name);
        if (distance < best) {
            best = distance;
            nearest = o;
        }
    }
    return fail(USAGE, "unknown option %s; the nearest is --%s (--help lists all)", argument,
                nearest ? nearest->name : "help");
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

/* A decimal number in the range of o and of float; returns 1 or 0. */
static int parse_real(const char *text, const option *o, float *value)
{
    char *end;
    if (!*text || text[strspn(text, "0123456789.eE+-")])
        return 0; /* strtod would take blanks, inf, nan and hexadecimal */
    errno = 0;
    double number = strtod(text, &end);
    *value = (float)number;
    int underflow = number != 0 && !(*value != 0);
    return !*end && errno != ERANGE && !underflow && number >= o->least && number <= o->most;
}

/* Stores the value of an option; returns 1, or 0 where the value is not one it takes. */
static int set_option(options *opts, const option *o, const char *value)
{
    void *field = (char *)opts + o->field;
    uint64_t number;
    switch (o->kind) {
    case HEADING:
        return 0;
    case FLAG:
        *(int *)field = 1;
        return 1;
    case PROMPT:
        opts->n_prompts++;
        *(const char **)field = value;
        return 1;
    case TEXT:
        *(const char **)field = value;
        return 1;
    case STOP:
        opts->stops[opts->n_stops] = value;
        return opts->stops[opts->n_stops++][0] != '\0';
    case WHOLE:
        if (!parse_whole(value, (uint64_t)o->most, &number) || number < (uint64_t)o->least)
            return 0;
        *(int32_t *)field = (int32_t)number;
        return 1;
    case REAL:
        return parse_real(value, o, field);
    case SEED:
        opts->seed_given = 1;
        return parse_whole(value, UINT64_MAX, &opts->seed);
    case CACHE:
        opts->session.cache_type = strcmp(value, "f32") == 0 ? GEMMA2_CACHE_F32 : GEMMA2_CACHE_F16;
        return is_word_of(o, value);
    case SHELL:
        opts->completion = value;
        return is_word_of(o, value);
    }
    return 0;
}

/* The option that an argument names, and the value it carries itself: --name=value or
 * -nvalue; *value is NULL where it carries none. */
static const option *find_option(const char *argument, const char **value)
{
    *value = NULL;
    const char *name = argument + 2;
    size_t length = strcspn(name, "=");
    for (const option *o = OPTIONS; o < OPTIONS + N_OPTIONS; o++) {
        if (o->kind == HEADING)
            continue;
        if (argument[1] == '-' && strlen(o->name) == length && !strncmp(o->name, name, length)) {
            *value = name[length] ? name + length + 1 : NULL;
            return o;
        }
        if (argument[1] == o->letter && (o->argument || !argument[2])) {
            *value = argument[2] ? argument + 2 : NULL;
            return o;
        }
    }
    return NULL;
}

static int take_positional(options *opts, const char *argument)
{
    if (!opts->model) {
        opts->model = argument;
    } else if (!opts->positional) {
        opts->positional = argument;
        opts->n_prompts++;
    } else {
        return fail(USAGE, "one argument too many: %s; put quotes around the whole prompt",
                    argument);
    }
    return DONE;
}

/* What is answered without a model. */
static int asks_about_program(const options *opts)
{
    return opts->help || opts->version || opts->man || opts->completion;
}

/* --help and its like end the parsing: whatever follows them is not looked at. */
static int parse_options(options *opts, int argc, char **argv)
{
    int options_ended = 0, status = DONE;
    for (int i = 1; i < argc && status == DONE && !asks_about_program(opts); i++) {
        const char *argument = argv[i], *value;
        if (options_ended || argument[0] != '-' || argument[1] == '\0') {
            status = take_positional(opts, argument);
            continue;
        }
        if (strcmp(argument, "--") == 0) {
            options_ended = 1;
            continue;
        }
        const option *o = find_option(argument, &value);
        if (!o)
            return unknown_option(argument);
        if (!o->argument && value)
            return fail(USAGE, "--%s takes no value", o->name);
        if (o->argument && !value && ++i == argc)
            return fail(USAGE, "--%s needs a value: %s", o->name, o->argument);
        if (!value)
            value = o->argument ? argv[i] : "";
        if (!set_option(opts, o, value))
            return fail(USAGE, "--%s '%s': it takes %s", o->name, value, o->takes);
    }
    return status;
}

typedef enum {
    GENERATE, CONVERSE, TOKENIZE, DETOKENIZE, LOGITS, SCORE, PERPLEXITY, IMPORTANCE, INFO,
    CHECK
} mode_kind;

/* What is asked for, into *mode, and whether it makes sense together. */
static int choose_mode(const options *opts, mode_kind *mode)
{
    const struct {
        int asked;
        mode_kind mode;
        const char *name;
    } modes[] = {
        {opts->json, GENERATE, "--json"},
        {opts->tokenize, TOKENIZE, "--tokenize"},
        {opts->detokenize != NULL, DETOKENIZE, "--detokenize"},
        {opts->logits > 0, LOGITS, "--logits"},
        {opts->score, SCORE, "--score"},
        {opts->perplexity != NULL, PERPLEXITY, "--perplexity"},
        {opts->importance != NULL, IMPORTANCE, "--importance"},
        {opts->info, INFO, "--info"},
        {opts->check, CHECK, "--check"},
    };
    const char *name = NULL;
    *mode = GENERATE;
    for (size_t i = 0; i < sizeof modes / sizeof modes[0]; i++) {
        if (modes[i].asked && name)
            return fail(USAGE, "%s and %s do not go together", name, modes[i].name);
        if (modes[i].asked) {
            name = modes[i].name;
            *mode = modes[i].mode;
        }
    }
    int needs_prompt = *mode == GENERATE || *mode == TOKENIZE || *mode == LOGITS ||
                       *mode == SCORE || *mode == IMPORTANCE;
    if (!opts->model)
        return fail(USAGE, "no model file given; --help shows examples");
    if (opts->n_prompts > 1)
        return fail(USAGE, "more than one prompt: give PROMPT, -p, -f or --ids, and only once");
    if (opts->n_prompts && !needs_prompt)
        return fail(USAGE, "%s takes no prompt", name);
    if (opts->kept && opts->loaded)
        return fail(USAGE, "--session and --load do not go together");
    if ((opts->kept || opts->loaded) && *mode != GENERATE)
        return fail(USAGE, "%s and %s do not go together", opts->kept ? "--session" : "--load",
                    name);
    if (opts->chat && *mode == IMPORTANCE)
        return fail(USAGE, "--importance and --chat do not go together: it takes plain text");
    if (opts->block && *mode != IMPORTANCE)
        return fail(USAGE, "--importance-block belongs to --importance OUT");
    if (opts->block > 1 && (opts->block < 32 || opts->block & (opts->block - 1)))
        return fail(USAGE, "--importance-block '%" PRId32 "': it takes 1, 32, 64, 128 or 256",
                    opts->block);
    if (opts->system && !opts->chat)
        return fail(USAGE, "--system belongs to a chat; add -c");
    if (opts->ids && opts->chat)
        return fail(USAGE, "--ids and --chat do not go together: ids are taken as they are");
    if (!needs_prompt || opts->n_prompts || !is_terminal(stdin))
        return DONE;
    if (!opts->chat || name)
        return fail(USAGE, "no prompt: put one after the model file%s; --help shows examples",
                    name ? "" : ", or -c for a conversation");
    *mode = CONVERSE;
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

/* No character of valid UTF-8 begins with this byte. */
static int is_inside_char(char byte) { return ((unsigned char)byte & 0xC0) == 0x80; }

static int is_control(uint32_t code)
{
    return code < 0x20 || (code >= 0x7F && code <= 0x9F);
}

/* Python's str.strip, which chat templates call. */
static int is_space(uint32_t code)
{
    return (code >= 0x09 && code <= 0x0D) || (code >= 0x1C && code <= 0x20) || code == 0x85 ||
           code == 0xA0 || code == 0x1680 || (code >= 0x2000 && code <= 0x200A) ||
           code == 0x2028 || code == 0x2029 || code == 0x202F || code == 0x205F || code == 0x3000;
}

/* The text without white space at both ends. */
static const char *trim(const char *text, size_t *n)
{
    size_t start = 0, end = 0, length;
    for (size_t i = 0; i < *n; i += length) {
        if (is_space(next_char(text + i, *n - i, &length)))
            continue;
        if (end == 0)
            start = i;
        end = i + length;
    }
    *n = end - start;
    return text ? text + start : "";
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

static void format_bytes(char text[32], uint64_t bytes)
{
    static const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
    double value = (double)bytes;
    int unit = 0;
    for (; value >= 1024 && unit < 4; unit++)
        value /= 1024;
    snprintf(text, 32, "%.*f %s", unit ? 1 : 0, value, units[unit]);
}

/* ===================================================================================
 * 5. The prompt
 * =================================================================================== */

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
    size_t shown;     /* bytes of text that no stop string can take back */
    gemma2_utf8 hold; /* bytes of a character still incomplete */
    size_t n_ids;     /* the last n_ids of program.ids are the reply */
    finish_reason finish;
    double prefill_s, decode_s;
    size_t prefill_tokens;
    size_t decode_passes; /* n_ids less one, most times: the prompt's logits give the first */
} reply;

/* One run of the program. */
typedef struct {
    const options *opts;
    output out;
    gemma2_model *model;
    const gemma2_config *config;
    gemma2_session *session;
    float *logits; /* [V] after the last token of the session */
    gemma2_sampler sampler;
    gemma2_bias bans[16]; /* stop ids, under --ignore-eos */
    uint64_t seed;
    double load_s;
    array prompt; /* char: its bytes */
    array echo;   /* char: what --echo puts before the reply */
    array ids;    /* int32_t: all said so far; the session holds the first of them */
    reply reply;
    int shows_progress, progress_shown;
} program;

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
    fprintf(stderr, "\r%-60s", line);
    fflush(stderr);
    p->progress_shown = 1;
}

static void clear_progress(program *p)
{
    if (p->progress_shown)
        fprintf(stderr, "\r%60s\r", "");
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
    if (strcmp(path, "-") == 0)
        return read_file(stdin, "standard input", LONGEST_TEXT, bytes);
    FILE *file = open_path(path, "rb");
    if (!file)
        return fail(FAILED, "cannot open %s: %s", path, strerror(errno));
    int status = read_file(file, path, LONGEST_TEXT, bytes);
    fclose(file);
    return status;
}

static int push_id(program *p, int32_t id)
{
    int32_t *end = extend(&p->ids, 1, sizeof *end);
    if (!end)
        return out_of_memory();
    *end = id;
    return DONE;
}

/* Appends the ids of a text. */
static int push_text(program *p, const char *text, size_t size, unsigned flags)
{
    if (size == 0)
        return DONE;
    size_t scratch_bytes = gemma2_encode_scratch(size);
    if (scratch_bytes == 0)
        return fail(FAILED, "a text of %zu bytes is too long", size);
    void *scratch = malloc(scratch_bytes);
    if (!scratch)
        return out_of_memory();
    int64_t n = (int64_t)(size / 2 + 16); /* a guess; the second round is never short */
    size_t held = p->ids.n, room;
    int32_t *ids;
    do {
        p->ids.n = held;
        room = (size_t)n;
        ids = extend(&p->ids, room, sizeof *ids);
        if (!ids)
            break;
        n = gemma2_encode(p->model, text, (int64_t)size, flags, ids, room, scratch, scratch_bytes);
    } while (n > (int64_t)room);
    free(scratch);
    p->ids.n = held + (ids && n > 0 ? (size_t)n : 0);
    if (!ids)
        return out_of_memory();
    return n < 0 ? fail(FAILED, "cannot encode the text: %s", gemma2_error_string((int)n)) : DONE;
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

/* Appends a user's turn and the opening of the model's:
 *
 *   <bos><start_of_turn>user
 *   SYSTEM                           (in the first turn, where there is one,
 *                                     and an empty line after it)
 *   TEXT<end_of_turn>
 *   <start_of_turn>model
 *
 * A later turn first closes the reply before it.  Markers go in as ids and everything
 * else as plain text, so that no text can forge one. */
static int push_turn(program *p, const char *text, size_t n)
{
    const gemma2_config *config = p->config;
    const char *system = p->opts->system ? p->opts->system : "";
    size_t n_system = strlen(system);
    int first = p->ids.n == 0;
    system = trim(system, &n_system);
    text = trim(text, &n);
    array turn = {0};
    char *bytes = extend(&turn, 5 + n_system + 2 + n, 1);
    if (!bytes)
        return out_of_memory();
    bytes = (char *)memcpy(bytes, "user\n", 5) + 5;
    if (first && n_system) {
        bytes = (char *)memcpy(bytes, system, n_system) + n_system;
        bytes = (char *)memcpy(bytes, "\n\n", 2) + 2;
    }
    bytes = (char *)memcpy(bytes, text, n) + n;
    size_t size = (size_t)(bytes - (char *)turn.items);

    int status = DONE;
    if (first && config->bos >= 0)
        status = push_id(p, config->bos);
    if (!first && !(status = push_id(p, config->end_of_turn)))
        status = push_text(p, "\n", 1, GEMMA2_ENCODE_PLAIN);
    if (!status && !(status = push_id(p, config->start_of_turn)))
        status = push_text(p, turn.items, size, GEMMA2_ENCODE_PLAIN);
    if (!status && !(status = push_id(p, config->end_of_turn)))
        status = push_text(p, "\n", 1, GEMMA2_ENCODE_PLAIN);
    if (!status && !(status = push_id(p, config->start_of_turn)))
        status = push_text(p, "model\n", 6, GEMMA2_ENCODE_PLAIN);
    free(turn.items);
    return status;
}

/* The prompt's bytes and ids, from wherever they come. */
static int load_prompt(program *p)
{
    const options *opts = p->opts;
    const char *text = opts->positional ? opts->positional : opts->text;
    if (opts->ids)
        return push_list(p, opts->ids);
    if (text) {
        size_t n = strlen(text);
        char *copy = extend(&p->prompt, n, 1);
        if (!copy)
            return out_of_memory();
        memcpy(copy, text, n);
    } else {
        int status = read_path(opts->file ? opts->file : "-", &p->prompt);
        if (status != DONE)
            return status;
    }
    if (opts->chat)
        return push_turn(p, p->prompt.items, p->prompt.n);
    int status = p->config->bos >= 0 && !p->ids.n ? push_id(p, p->config->bos) : DONE;
    return status ? status : push_text(p, p->prompt.items, p->prompt.n, 0);
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
    while (at < end && !stop_asked) {
        size_t n = end - at < PREFILL_PIECE ? end - at : PREFILL_PIECE;
        int code = gemma2_prefill(p->session, ids + at, n, at + n == end ? p->logits : NULL);
        if (code == GEMMA2_ERR_CANCELLED)
            break;
        if (code < 0)
            return engine_failed(p, "reading the prompt", code);
        at += n;
        if (at < end && seconds() - began > 1)
            show_progress(p, "prompt: %zu of %zu tokens", at - start, end - start);
    }
    clear_progress(p);
    p->reply.prefill_tokens = at - start;
    p->reply.prefill_s = seconds() - began;
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
    if (cut > r->shown && !p->opts->json) {
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

/* Chooses one more token; evaluates the one before it first. */
static int step(program *p)
{
    reply *r = &p->reply;
    const int32_t *ids = p->ids.items;
    if ((size_t)gemma2_position(p->session) < p->ids.n) {
        int code = gemma2_eval(p->session, ids + p->ids.n - 1, 1, p->logits);
        if (code == GEMMA2_ERR_CANCELLED) {
            r->finish = AT_INTERRUPT;
            return DONE;
        }
        if (code < 0)
            return engine_failed(p, "generating", code);
        r->decode_passes++;
    }
    int32_t id = gemma2_sample(p->session, &p->sampler, p->logits);
    if (id < 0)
        return engine_failed(p, "choosing a token", id);
    if (gemma2_is_stop(p->model, id) || (p->opts->chat && id == p->config->end_of_turn)) {
        r->finish = AT_STOP;
        return DONE;
    }
    if (p->opts->json) {
        float *logprob = extend(&r->logprobs, 1, sizeof *logprob);
        if (!logprob)
            return out_of_memory();
        int code = gemma2_logprob(p->logits, (size_t)p->config->n_vocab, id, logprob);
        if (code < 0)
            return engine_failed(p, "generating", code);
    }
    r->n_ids++;
    int status = push_id(p, id);
    return status ? status : append_text(p, id);
}

/* Generates from the session's logits until something ends it. */
static int decode(program *p)
{
    reply *r = &p->reply;
    double began = seconds();
    int status = DONE;
    while (!status && !r->finish && !p->out.error) {
        if (stop_asked)
            r->finish = AT_INTERRUPT;
        else if (p->opts->max_tokens >= 0 && r->n_ids >= (size_t)p->opts->max_tokens)
            r->finish = AT_LENGTH;
        else if (p->ids.n >= (size_t)gemma2_context(p->session))
            r->finish = AT_CONTEXT;
        else if (!(status = step(p)))
            show_text(p, 0);
    }
    r->decode_s = seconds() - began;
    if (status == DONE && r->finish != AT_STOP_STRING) {
        status = append_text(p, -1);
        show_text(p, 1);
    }
    return status;
}

/* One reply to the ids so far.  Ctrl-C stops it. */
static int make_reply(program *p)
{
    reply *r = &p->reply;
    array text = r->text, logprobs = r->logprobs;
    text.n = logprobs.n = 0;
    *r = (reply){.text = text, .logprobs = logprobs};
    stop_asked = 0;
    gemma2_cancel(p->session, 0);
    interruptible = p->session;
    patience = PATIENCE;
    int status = prefill(p);
    if (status == DONE && !p->opts->json)
        put_text(&p->out, p->echo.items, p->echo.n);
    if (status == DONE && !r->finish)
        status = decode(p);
    if (!p->opts->json)
        put_bytes(&p->out, "\n", 1);
    put_flush(&p->out);
    return status;
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
    patience = PATIENCE; /* Ctrl-C must not come between making the file and naming it */
    stop_asked = 0;
    char *target = follow_links(path);
    FILE *file = target ? open_beside(target, name, sizeof name) : NULL;
    int made = file && (bytes ? replace_file(file, name, target, bytes, n) : fclose(file) == 0);
    int reason = errno;
    free(target);
    if (file && (!made || !bytes))
        remove_path(name);
    if (!made)
        return fail(FAILED, "cannot save %s as %s: %s", what, path, strerror(reason));
    if (bytes)
        return DONE;
    patience = 0;
    return stop_asked ? INTERRUPTED : DONE;
}

/* Above the bytes of any that the context has room for: keys and values in f32, ids, header. */
static uint64_t longest_session(const program *p)
{
    const gemma2_config *c = p->config;
    uint64_t numbers = 2 * (uint64_t)c->n_layers * (uint64_t)c->n_kv_heads * (uint64_t)c->head_dim;
    return (uint64_t)gemma2_context(p->session) * 4 * (numbers + 1) + 4096;
}

/* Puts the session where the file's stood, but for its last token: that is evaluated with
 * what follows, to have logits. */
static int load_session(program *p)
{
    const options *opts = p->opts;
    const char *path = opts->kept ? opts->kept : opts->loaded;
    if (!path)
        return DONE;
    if (is_special(path))
        return fail(FAILED, "%s is not a file that can hold a session", path);
    int status = opts->kept ? save_file("the session", path, NULL, 0) : DONE;
    if (status != DONE)
        return status;
    FILE *file = open_path(path, "rb");
    if (!file && errno == ENOENT && opts->kept)
        return DONE; /* the first time */
    if (!file)
        return fail(FAILED, "cannot open %s: %s", path, strerror(errno));
    array bytes = {0};
    status = read_file(file, path, longest_session(p), &bytes);
    fclose(file);
    int code = status ? 0 : gemma2_session_restore(p->session, bytes.items, bytes.n);
    free(bytes.items);
    if (code < 0)
        return fail(FAILED, "%s: %s", path, gemma2_error_string(code));
    int32_t n = gemma2_position(p->session);
    for (int32_t i = 0; i < n && status == DONE; i++)
        status = push_id(p, gemma2_history(p->session)[i]);
    if (n && gemma2_rewind(p->session, n - 1) < 0) /* saved after a rewind as deep as can be */
        gemma2_rewind(p->session, 0);
    if (n && opts->system && !opts->quiet)
        remark("warning: --system is for the first turn, and %s holds some", path);
    return status;
}

static int save_session(program *p)
{
    const char *path = p->opts->kept;
    size_t held = (size_t)gemma2_position(p->session);
    if (!path)
        return DONE;
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

static void print_json(program *p)
{
    const reply *r = &p->reply;
    const int32_t *ids = p->ids.items;
    const float *logprobs = r->logprobs.items;
    size_t n_prompt = p->ids.n - r->n_ids;
    output *out = &p->out;
    put_format(out, "{\"text\": \"");
    put_json(out, p->echo.items, p->echo.n);
    put_json(out, r->text.items, r->text.n);
    put_format(out, "\", \"prompt_ids\": [");
    put_ids(out, ids, n_prompt, ", ");
    put_format(out, "], \"ids\": [");
    put_ids(out, ids + n_prompt, r->n_ids, ", ");
    put_format(out, "], \"logprobs\": [");
    for (size_t i = 0; i < r->logprobs.n; i++)
        put_format(out, "%s%.9g", i ? ", " : "", (double)logprobs[i]);
    put_format(out, "], \"finish_reason\": \"%s\", \"seed\": %" PRIu64,
               FINISH_REASONS[r->finish], p->seed);
    put_format(out, ", \"timings\": {\"load_s\": %.6f, \"prefill_s\": %.6f", p->load_s,
               r->prefill_s);
    put_format(out, ", \"prefill_tokens\": %zu, \"prefill_tps\": %.3f", r->prefill_tokens,
               rate(r->prefill_tokens, r->prefill_s));
    put_format(out, ", \"decode_s\": %.6f, \"decode_tokens\": %zu, \"decode_tps\": %.3f}}\n",
               r->decode_s, r->n_ids, rate(r->decode_passes, r->decode_s));
}

/* Appends the text of all ids. */
static int decode_ids(program *p, array *text)
{
    const int32_t *ids = p->ids.items;
    size_t room = (size_t)p->config->max_piece_bytes + 12;
    gemma2_utf8 hold = {{0}, 0};
    for (size_t i = 0; i <= p->ids.n; i++) {
        char *end = extend(text, room, 1);
        if (!end)
            return out_of_memory();
        int n = gemma2_decode(p->model, &hold, i < p->ids.n ? ids[i] : -1, end, room);
        text->n -= room - (n > 0 ? (size_t)n : 0);
        if (n < 0)
            return engine_failed(p, "decoding", n);
    }
    return DONE;
}

/* The prompt as it came, or the text of its ids; in a chat on lines of its own. */
static int load_echo(program *p)
{
    if (p->opts->ids)
        return decode_ids(p, &p->echo);
    size_t n = p->prompt.n;
    char *copy = extend(&p->echo, n + 1, 1);
    if (!copy)
        return out_of_memory();
    if (n)
        memcpy(copy, p->prompt.items, n);
    copy[n] = '\n';
    p->echo.n = p->opts->chat ? n + 1 : n;
    return DONE;
}

static int generate(program *p)
{
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

/* Reads a line, of any length, without its newline; *at_end where there is none.  A signal
 * ends it, and so the conversation, which is kept. */
static int read_line(array *line, int *at_end)
{
    int c;
    line->n = 0;
    patience = 1, stop_asked = 0;
    if (ended_by)
        return INTERRUPTED;
    catch_interrupts(1);
    while ((c = getc(stdin)) != '\n' && c != EOF) {
        char *end = extend(line, 1, 1);
        if (!end)
            return out_of_memory();
        *end = (char)c;
    }
    catch_interrupts(0);
    if (c == EOF && stop_asked)
        return INTERRUPTED;
    if (c == EOF && ferror(stdin))
        return fail(FAILED, "cannot read standard input: %s", strerror(errno));
    *at_end = c == EOF && line->n == 0;
    return DONE;
}

/* Takes the session back to the first n ids, or to none where its window has moved on;
 * the next prefill catches up. */
static void forget_after(program *p, size_t n)
{
    p->ids.n = n;
    if ((size_t)gemma2_position(p->session) > n && gemma2_rewind(p->session, (int32_t)n) < 0)
        gemma2_rewind(p->session, 0);
}

static int answer(program *p, const char *text, size_t n)
{
    size_t before = p->ids.n, context = (size_t)gemma2_context(p->session);
    int status = push_turn(p, text, n);
    if (status != DONE)
        return status;
    if (p->ids.n >= context) {
        fprintf(stderr, "With this turn the conversation has %zu tokens; the context holds %zu.  "
                        "Say less, or /clear to start over.\n", p->ids.n, context);
        p->ids.n = before;
        return DONE;
    }
    status = make_reply(p);
    if (status != DONE)
        return status;
    if (p->reply.finish == AT_INTERRUPT && p->reply.n_ids == 0)
        forget_after(p, before);
    if (p->reply.finish == AT_CONTEXT)
        fprintf(stderr, "The context of %zu tokens is full.  /clear starts over.\n", context);
    if (p->opts->verbose && !p->opts->quiet)
        print_speed(p);
    return DONE;
}

/* A conversation on a terminal.  The prompt sign and all remarks go to standard error. */
static int converse(program *p)
{
    static const char commands[] = "/clear starts over, /exit or Ctrl-D leaves, Ctrl-C stops a "
                                   "reply, /help shows this.\n";
    if (!p->opts->quiet)
        fprintf(stderr, "%s", commands);
    if (!p->opts->quiet && p->sampler.temperature > 0)
        fprintf(stderr, "seed %" PRIu64 "\n", p->seed);
    int status = DONE;
    while (status == DONE && !p->out.error) {
        fprintf(stderr, "> ");
        fflush(stderr);
        int at_end = 0;
        status = read_line(&p->prompt, &at_end);
        if (at_end || status == INTERRUPTED)
            fputc('\n', stderr);
        if (at_end || status != DONE)
            break;
        size_t n = p->prompt.n;
        const char *line = trim(p->prompt.items, &n);
        if (n == 5 && memcmp(line, "/exit", 5) == 0)
            break;
        if (n == 5 && memcmp(line, "/help", 5) == 0)
            fprintf(stderr, "%s", commands);
        else if (n == 6 && memcmp(line, "/clear", 6) == 0)
            forget_after(p, 0);
        else if (n > 0)
            status = answer(p, line, n);
    }
    return status;
}

static int tokenize(program *p)
{
    int status = load_prompt(p);
    if (status != DONE)
        return status;
    put_ids(&p->out, p->ids.items, p->ids.n, " ");
    put_bytes(&p->out, "\n", 1);
    return DONE;
}

static int detokenize(program *p)
{
    int status = push_list(p, p->opts->detokenize);
    if (status == DONE)
        status = decode_ids(p, &p->prompt);
    if (status == DONE)
        put_text(&p->out, p->prompt.items, p->prompt.n);
    return status;
}

typedef struct {
    float logit;
    int32_t id;
} candidate;

static int by_logit(const void *left, const void *right)
{
    const candidate *a = left, *b = right;
    if (a->logit != b->logit)
        return a->logit < b->logit ? 1 : -1;
    return (a->id > b->id) - (a->id < b->id);
}

static int best_logits(program *p)
{
    int status = prefill(p);
    if (status != DONE)
        return status;
    int32_t n_vocab = p->config->n_vocab;
    candidate *ranked = malloc(sizeof *ranked * (size_t)n_vocab);
    if (!ranked)
        return out_of_memory();
    int finite = 1;
    for (int32_t id = 0; id < n_vocab; id++) {
        ranked[id] = (candidate){p->logits[id], id};
        finite &= isfinite(p->logits[id]) != 0;
    }
    if (!finite) {
        free(ranked);
        return engine_failed(p, "reading the prompt", GEMMA2_ERR_NONFINITE);
    }
    qsort(ranked, (size_t)n_vocab, sizeof *ranked, by_logit);
    for (int32_t i = 0; i < p->opts->logits && i < n_vocab; i++) {
        size_t n;
        const char *piece = gemma2_piece(p->model, ranked[i].id, &n, NULL);
        put_format(&p->out, "%" PRId32 "\t%.9g\t\"", ranked[i].id, (double)ranked[i].logit);
        put_json(&p->out, piece, n);
        put_bytes(&p->out, "\"\n", 2);
    }
    free(ranked);
    return DONE;
}

static int score(program *p)
{
    const int32_t *ids = p->ids.items;
    float logprobs[PREFILL_PIECE];
    double total = 0;
    for (size_t at = 0; at + 1 < p->ids.n && !p->out.error;) {
        size_t left = p->ids.n - 1 - at, n = left < PREFILL_PIECE ? left : PREFILL_PIECE;
        int code = gemma2_score(p->session, ids + at, n, ids[at + n], logprobs);
        if (code < 0)
            return engine_failed(p, "scoring", code);
        at += n;
        for (size_t i = 0; i < n; i++) {
            put_format(&p->out, "%" PRId32 "\t%.9g\n", ids[at - n + 1 + i], (double)logprobs[i]);
            total += (double)logprobs[i];
        }
    }
    put_format(&p->out, "total\t%.9g\n", total);
    return DONE;
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
    float logprobs[PREFILL_PIECE];
    size_t at = n / 2;
    gemma2_rewind(p->session, 0);
    int code = gemma2_eval(p->session, ids, at, NULL);
    while (code >= 0 && at < n - 1) {
        size_t piece = n - 1 - at < PREFILL_PIECE ? n - 1 - at : PREFILL_PIECE;
        code = gemma2_score(p->session, ids + at, piece, ids[at + piece], logprobs);
        for (size_t i = 0; code >= 0 && i < piece; i++) {
            t->sum -= (double)logprobs[i];
            t->squares += (double)logprobs[i] * (double)logprobs[i];
        }
        at += piece;
        t->n += piece;
    }
    return code < 0 ? engine_failed(p, "scoring", code) : DONE;
}

static int perplexity(program *p, size_t length)
{
    int status = p->config->bos >= 0 ? push_id(p, p->config->bos) : DONE;
    if (status == DONE)
        status = read_path(p->opts->perplexity, &p->prompt);
    if (status == DONE)
        status = push_text(p, p->prompt.items, p->prompt.n, 0);
    if (status != DONE)
        return status;
    if (p->ids.n < 2 * length)
        return fail(USAGE, "%s has %zu tokens; chunks of %zu need %zu", p->opts->perplexity,
                    p->ids.n, length, 2 * length);
    int32_t *ids = p->ids.items;
    size_t n_chunks = p->ids.n / length;
    tally t = {0, 0, 0};
    double value = 0, error = 0;
    for (size_t i = 0; i < n_chunks; i++) {
        if (p->config->bos >= 0)
            ids[i * length] = p->config->bos;
        status = tally_chunk(p, ids + i * length, length, &t);
        if (status != DONE)
            return status;
        value = perplexity_of(&t, &error);
        show_progress(p, "[%zu/%zu] %.4f", i + 1, n_chunks, value);
        if (!p->shows_progress && !p->opts->quiet)
            fprintf(stderr, "[%zu/%zu] %.4f\n", i + 1, n_chunks, value);
    }
    clear_progress(p);
    if (!p->opts->quiet)
        fprintf(stderr, "%zu chunks of %zu tokens, %zu scored\n", n_chunks, length, t.n);
    put_format(&p->out, "perplexity\t%.4f\t+/-\t%.5f\n", value, error);
    return DONE;
}

/* The file of --importance, as section 2 of gemma2.c describes it, written under a temporary
 * name. */
enum { IMPORTANCE_HEADER = 64 };

static void put_u32(uint8_t *to, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        to[i] = (uint8_t)(value >> (8 * i));
}

static void importance_header(const program *p, uint32_t block, uint8_t header[IMPORTANCE_HEADER])
{
    const gemma2_config *c = p->config;
    const int32_t sizes[] = {c->n_layers, c->d_model, c->n_heads, c->n_kv_heads, c->head_dim,
                             c->d_ffn, c->n_vocab};
    memset(header, 0, IMPORTANCE_HEADER);
    memcpy(header, "\x89GEMMAI\n", 8);
    put_u32(header + 8, 1);
    put_u32(header + 12, block);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        put_u32(header + 16 + 4 * i, (uint32_t)sizes[i]);
    put_u32(header + 48, (uint32_t)p->ids.n);
    put_u32(header + 52, (uint32_t)((uint64_t)p->ids.n >> 32));
}

/* Memory holds room for the header, then n sums; these become the file in their own place. */
static int save_importance(program *p, uint32_t block, double *memory, size_t n)
{
    const double *sums = memory + IMPORTANCE_HEADER / sizeof *memory;
    uint8_t *image = (uint8_t *)memory;
    for (size_t i = 0; i < n; i++) {
        float mean = (float)(sums[i] / (double)p->ids.n);
        uint32_t bits;
        if (!isfinite(mean))
            return fail(FAILED,
                        "the model's activations are not finite; its weights are damaged");
        memcpy(&bits, &mean, sizeof bits);
        put_u32(image + IMPORTANCE_HEADER + 4 * i, bits);
    }
    importance_header(p, block, image);
    return save_file("the importance", p->opts->importance, image, IMPORTANCE_HEADER + 4 * n);
}

static int importance(program *p, size_t length)
{
    gemma2_input last;
    size_t columns = 0, n = 0;
    uint32_t block = p->opts->block ? (uint32_t)p->opts->block : 1;
    if (is_special(p->opts->importance))
        return fail(FAILED, "%s is not a file that can hold the importance", p->opts->importance);
    int status = save_file("the importance", p->opts->importance, NULL, 0);
    if (status != DONE)
        return status;
    while (gemma2_get_input(p->model, n++, &last))
        columns = (size_t)last.first + last.cols;
    status = load_prompt(p);
    if (status != DONE)
        return status;
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
        remark("%s: %zu tokens", p->opts->importance, p->ids.n);
    return status;
}

static void put_fact(program *p, const char *key)
{
    size_t n;
    const char *value = gemma2_fact(p->model, key, &n);
    if (!value)
        return;
    const char *newline = memchr(value, '\n', n);
    put_format(&p->out, "%s: ", key);
    put_printable(&p->out, value, newline ? (size_t)(newline - value) : n);
    put_bytes(&p->out, "\n", 1);
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

/* One line for each type of section: how many, how many values, how many bytes. */
static void put_sections(program *p)
{
    static const char *const types[] = {"bytes", "f32", "bf16", "q8", "q6", "q4"};
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

/* "weights 2.6 GiB mapped, cache ...": what running will take. */
static int memory_plan(const program *p, const gemma2_session_params *params, char text[160])
{
    gemma2_plan plan;
    char weights[32], cache[32], scratch[32];
    int code = gemma2_session_plan(p->model, params, &plan);
    if (code < 0)
        return fail(USAGE, "a context of %" PRId32 " tokens cannot be had: at most 1073741824 "
                    "and what memory can hold (%s)", params->n_context,
                    gemma2_error_string(code));
    format_bytes(weights, plan.weights);
    format_bytes(cache, plan.cache);
    format_bytes(scratch, plan.scratch);
    int32_t context = params->n_context ? params->n_context : p->config->n_context;
    snprintf(text, 160, "weights %s mapped, cache %s for %" PRId32 " tokens, scratch %s", weights,
             cache, context, scratch);
    return DONE;
}

static int info(program *p)
{
    const gemma2_config *c = p->config;
    output *out = &p->out;
    char size[32], plan[160];
    int status = c->n_layers ? memory_plan(p, &p->opts->session, plan) : DONE;
    if (status != DONE)
        return status;
    format_bytes(size, c->file_bytes);
    put_format(out, "file: %s (%" PRIu64 " bytes)\nidentity: ", size, c->file_bytes);
    for (size_t i = 0; i < sizeof c->identity; i++)
        put_format(out, "%02x", c->identity[i]);
    put_bytes(out, "\n", 1);
    put_fact(p, "name");
    put_fact(p, "source");
    put_fact(p, "license");
    put_fact(p, "export");
    if (c->n_layers)
        put_architecture(p);
    put_format(out, "vocabulary: %" PRId32 " pieces; bos %" PRId32 ", eos %" PRId32, c->n_vocab,
               c->bos, c->eos);
    put_format(out, ", pad %" PRId32 ", unk %" PRId32 ", turns %" PRId32 " %" PRId32 "\n", c->pad,
               c->unk, c->start_of_turn, c->end_of_turn);
    put_format(out, "stop ids: ");
    put_ids(out, c->stop, (size_t)c->n_stop, " ");
    put_bytes(out, "\n", 1);
    put_sections(p);
    if (c->n_layers)
        put_format(out, "memory: %s\n", plan);
    put_format(out, "instruction set: %s\n", c->isa);
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

/* ===================================================================================
 * 8. main
 * =================================================================================== */

/* What the model file must have for what is asked. */
static int check_model_fits(const program *p, mode_kind mode)
{
    const gemma2_config *c = p->config;
    const options *opts = p->opts;
    if (c->n_layers == 0 && mode != TOKENIZE && mode != DETOKENIZE && mode != INFO && mode != CHECK)
        return fail(BAD_MODEL, "%s holds a tokenizer but no model; give a model file", opts->model);
    if (opts->chat && (c->start_of_turn < 0 || c->end_of_turn < 0))
        return fail(USAGE, "--chat: the vocabulary of %s has no turn markers", opts->model);
    if (c->n_layers && opts->session.window > c->window)
        return fail(USAGE, "--window %" PRId32 " is above the model's window of %" PRId32,
                    opts->session.window, c->window);
    return DONE;
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
    if (opts->verbose && !opts->quiet)
        fprintf(stderr, "%" PRId32 " layers, width %" PRId32 ", vocabulary %" PRId32
                        "; instruction set %s\n%s\n",
                p->config->n_layers, p->config->d_model, p->config->n_vocab, p->config->isa, plan);
    p->session = gemma2_session_new(p->model, params, err, sizeof err);
    if (!p->session)
        return fail(FAILED, "%s", err);
    p->logits = malloc(sizeof *p->logits * (size_t)p->config->n_vocab);
    p->load_s += seconds() - began;
    return p->logits ? DONE : out_of_memory();
}

static void init_sampler(program *p)
{
    const gemma2_config *c = p->config;
    const options *opts = p->opts;
    gemma2_sampler seeded;
    p->seed = opts->seed_given ? opts->seed : random_seed();
    gemma2_sampler_init(&seeded, p->seed);
    p->sampler = opts->sampler;
    p->sampler.rng = seeded.rng;
    if (!opts->ignore_eos)
        return;
    uint32_t n = 0;
    for (; n < (uint32_t)c->n_stop; n++)
        p->bans[n] = (gemma2_bias){c->stop[n], -INFINITY};
    if (opts->chat)
        p->bans[n++] = (gemma2_bias){c->end_of_turn, -INFINITY};
    p->sampler.bias = p->bans;
    p->sampler.n_bias = n;
}

/* Modes that evaluate a prompt. */
static int run_prompt(program *p, mode_kind mode)
{
    int status = load_prompt(p);
    if (status != DONE)
        return status;
    int32_t context = gemma2_context(p->session);
    if (p->ids.n == 0)
        return fail(USAGE, "the prompt has no tokens to go on from");
    if (p->ids.n > (size_t)context)
        return fail(USAGE, "the prompt has %zu tokens and the context holds %" PRId32
                           "; shorten it or raise --context", p->ids.n, context);
    return mode == LOGITS ? best_logits(p) : mode == SCORE ? score(p) : generate(p);
}

static int run(program *p, mode_kind mode)
{
    char err[SENTENCE];
    const options *opts = p->opts;
    double began = seconds();
    p->model = gemma2_open(opts->model, &opts->open, err, sizeof err);
    p->load_s = seconds() - began;
    if (!p->model)
        return fail(BAD_MODEL, "%s", err);
    p->config = gemma2_get_config(p->model);
    int status = check_model_fits(p, mode);
    if (status != DONE)
        return status;
    if (mode == TOKENIZE)
        return tokenize(p);
    if (mode == DETOKENIZE)
        return detokenize(p);
    if (mode == INFO)
        return info(p);
    if (mode == CHECK)
        return check(p);

    gemma2_session_params params = opts->session;
    if ((mode == PERPLEXITY || mode == IMPORTANCE) && params.n_context == 0)
        params.n_context = p->config->n_context < 512 ? p->config->n_context : 512;
    if (mode == PERPLEXITY && params.n_context < 3)
        return fail(USAGE, "--perplexity needs chunks of 3 tokens or more");
    status = open_session(p, &params);
    if (status != DONE)
        return status;
    if (mode == PERPLEXITY)
        return perplexity(p, (size_t)params.n_context);
    if (mode == IMPORTANCE)
        return importance(p, (size_t)params.n_context);
    init_sampler(p);
    status = load_session(p);
    if (status != DONE)
        return status;
    status = mode == CONVERSE ? converse(p) : run_prompt(p, mode);
    int all_said = status == DONE || (status == INTERRUPTED && mode == CONVERSE);
    int saved = all_said && !p->out.error ? save_session(p) : DONE; /* what was shown was said */
    return saved != DONE ? saved : status;
}

static void init_options(options *opts)
{
    *opts = (options){.max_tokens = -1};
    gemma2_sampler_init(&opts->sampler, 0);
    gemma2_open_params_init(&opts->open);
    gemma2_session_params_init(&opts->session);
}

int main(int argc, char **argv)
{
    options opts;
    mode_kind mode;
    init_options(&opts);
    program p = {.opts = &opts};
    platform_init();
    catch_interrupts(0);
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
    if (!opts.stops)
        return out_of_memory();
    p.out.terminal = is_terminal(stdout);
    mid_line = p.out.terminal;
    int status = parse_options(&opts, argc, argv);
    p.shows_progress = !opts.quiet && is_terminal(stderr);
    if (status == DONE && opts.help)
        print_help(&p.out);
    else if (status == DONE && opts.version)
        put_format(&p.out, "%s (gemma2.c) %s\n", program_name, gemma2_version());
    else if (status == DONE && opts.man)
        print_man(&p.out);
    else if (status == DONE && opts.completion)
        print_completion(&p.out, opts.completion);
    else if (status == DONE && (status = choose_mode(&opts, &mode)) == DONE)
        status = run(&p, mode);
    status = finish_output(&p.out, status);

    interruptible = NULL;
    gemma2_session_free(p.session);
    gemma2_close(p.model);
    free(p.logits);
    free(p.prompt.items);
    free(p.echo.items);
    free(p.ids.items);
    free(p.reply.text.items);
    free(p.reply.logprobs.items);
    free(opts.stops);
    return status == INTERRUPTED && ended_by ? 128 + ended_by : status;
}
