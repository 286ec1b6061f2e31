/* Failure injection: every call to libc that can fail fails in turn - the 1st, the 2nd, the 3rd
 * .., once or from then on - while the library opens, plans, encodes, generates, saves and
 * restores, and while the program does all it can.  Each time the right code comes back, nothing
 * is left behind, one sentence is said, and what was written before is the start of what would
 * have been written.
 *
 *   cc -D_GNU_SOURCE -Dmain=run_main -include tests/fault.h run.c gemma2.c tests/fault.c -lm
 *
 * Run it from the repository's root.  It takes some seconds. */
#undef main
#include "../gemma2.h"

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <string.h>

int run_main(int argc, char **argv); /* run.c */

#define MODEL "tests/golden/mixed.bin"

/* ---- Calls that fail ----------------------------------------------------------------------- */

enum kind { MEMORY = 1, FILES = 2, INPUT = 4, OUTPUT = 8, SAVING = 16 };

/* What the wrappers do: of the calls whose kind is in `kinds`, number fail_at (and with
 * `lasting` all after it) fails with `error`. */
static struct {
    int kinds, fail_at, lasting, error, calls;
    int short_reads, terminal;
    int interrupted; /* Ctrl-C comes when the file of that number is made, before it is named */
    int flushes, interrupted_flush; /* of standard error; the one behind which Ctrl-C comes */
    const FILE *broken; /* has had an error */
    const FILE *saved;  /* the file being written */
    int synced, named_early; /* it is on the disk; it got its name before it was */
} plan;

static struct {
    int memory, mappings, descriptors, files;
} live;

static int denied(enum kind kind)
{
    if (!(plan.kinds & kind))
        return 0;
    plan.calls++;
    if (plan.calls != plan.fail_at && !(plan.lasting && plan.fail_at && plan.calls > plan.fail_at))
        return 0;
    errno = plan.error ? plan.error : errno;
    return 1;
}

static void *counted(void *p)
{
    live.memory += p != NULL;
    return p;
}

/* What is read before it is written is neither zero nor a number. */
void *fault_malloc(size_t n)
{
    void *p = denied(MEMORY) ? NULL : counted((malloc)(n));
    return p ? memset(p, 0xff, n) : NULL;
}

void *fault_calloc(size_t n, size_t size)
{
    return denied(MEMORY) ? NULL : counted((calloc)(n, size));
}

void *fault_realloc(void *p, size_t n)
{
    if (denied(MEMORY))
        return NULL;
    void *q = (realloc)(p, n);
    live.memory += q && !p;
    return q;
}

void fault_free(void *p)
{
    live.memory -= p != NULL;
    (free)(p);
}

void *fault_mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset)
{
    if (denied(flags & MAP_ANONYMOUS ? MEMORY : FILES))
        return MAP_FAILED;
    void *p = (mmap)(at, n, protection, flags, fd, offset);
    live.mappings += p != MAP_FAILED;
    return p;
}

int fault_munmap(void *p, size_t n)
{
    live.mappings--;
    return (munmap)(p, n);
}

int fault_open(const char *path, int flags, mode_t mode, ...)
{
    int fd = denied(FILES) ? -1 : (open)(path, flags, mode);
    live.descriptors += fd >= 0;
    return fd;
}

int fault_close(int fd)
{
    live.descriptors--;
    return (close)(fd);
}

int fault_fstat(int fd, struct stat *st) { return denied(FILES) ? -1 : (fstat)(fd, st); }

static ssize_t read_line(char *to, size_t n)
{
    size_t got = 0;
    while (got < n && (read)(STDIN_FILENO, to + got, 1) == 1 && to[got++] != '\n')
        ;
    return (ssize_t)got;
}

/* With short_reads a call is interrupted, the next gives a few bytes, and so on. */
ssize_t fault_read(int fd, void *to, size_t n)
{
    if (denied(fd == STDIN_FILENO ? INPUT : FILES))
        return plan.error ? -1 : 0; /* 0: the file ends here */
    if (plan.short_reads && plan.short_reads++ % 2) {
        errno = EINTR;
        return -1;
    }
    if (fd == STDIN_FILENO && plan.terminal)
        return read_line(to, n);
    return (read)(fd, to, plan.short_reads && n > 4999 ? 4999 : n);
}

/* What is typed comes a line at a time. */
int fault_poll(struct pollfd *files, nfds_t n, int milliseconds)
{
    return plan.terminal && milliseconds == 20 ? 0 : (poll)(files, n, milliseconds);
}

ssize_t fault_write(int fd, const void *from, size_t n)
{
    return denied(SAVING) ? -1 : (write)(fd, from, n);
}

int fault_fsync(int fd)
{
    plan.synced = !denied(SAVING) && (fsync)(fd) == 0;
    return plan.synced ? 0 : -1;
}

int fault_rename(const char *from, const char *to)
{
    plan.named_early |= !plan.synced;
    return denied(SAVING) ? -1 : (rename)(from, to);
}

int fault_mkstemp(char *path)
{
    int fd = denied(SAVING) ? -1 : (mkstemp)(path);
    live.descriptors += fd >= 0;
    if (plan.interrupted && !--plan.interrupted)
        raise(SIGINT);
    return fd;
}

char *fault_realpath(const char *path, char *to)
{
    return denied(MEMORY) ? NULL : counted((realpath)(path, to));
}

static FILE *opened(FILE *f)
{
    live.files += f != NULL;
    return f;
}

FILE *fault_fopen(const char *path, const char *mode)
{
    return denied(*mode == 'r' ? INPUT : SAVING) ? NULL : opened((fopen)(path, mode));
}

FILE *fault_fdopen(int fd, const char *mode)
{
    if (denied(SAVING))
        return NULL;
    live.descriptors--; /* it is the FILE's now */
    plan.saved = opened((fdopen)(fd, mode));
    return (FILE *)(uintptr_t)plan.saved;
}

int fault_fclose(FILE *f)
{
    int failed = f == plan.saved && denied(SAVING);
    if (f == plan.saved)
        plan.saved = NULL;
    live.files--;
    return (fclose)(f) || failed ? EOF : 0;
}

/* Which failures a stream that is written to may have. */
static int cannot_write(const FILE *f)
{
    return f != stderr && denied(f == plan.saved ? SAVING : OUTPUT);
}

size_t fault_fread(void *to, size_t size, size_t n, FILE *f)
{
    if (denied(INPUT)) {
        plan.broken = f;
        return 0;
    }
    return (fread)(to, size, n, f);
}

int fault_getc(FILE *f)
{
    if (denied(INPUT)) {
        plan.broken = f;
        return EOF;
    }
    return (getc)(f);
}

int fault_ferror(FILE *f) { return plan.broken == f || (ferror)(f); }

size_t fault_fwrite(const void *from, size_t size, size_t n, FILE *f)
{
    return cannot_write(f) ? 0 : (fwrite)(from, size, n, f);
}

int fault_fflush(FILE *f)
{
    int failed = cannot_write(f) ? EOF : (fflush)(f);
    if (f == stderr && ++plan.flushes == plan.interrupted_flush)
        raise(SIGINT);
    return failed;
}

int fault_vfprintf(FILE *f, const char *format, va_list arguments)
{
    return cannot_write(f) ? -1 : (vfprintf)(f, format, arguments);
}

int fault_isatty(int fd) { return fd == STDIN_FILENO && plan.terminal; }

/* ---- Checks ---------------------------------------------------------------------------------- */

static int n_passed, n_failed;
static FILE *said; /* standard output, while the program has it */

__attribute__((format(printf, 2, 3)))
static int check(int ok, const char *format, ...)
{
    ok ? n_passed++ : n_failed++;
    if (!ok) {
        va_list args;
        va_start(args, format);
        fprintf(said, "FAIL ");
        (vfprintf)(said, format, args);
        fprintf(said, "\n");
        va_end(args);
    }
    return ok;
}

static int nothing_lives(void)
{
    int n = live.memory | live.mappings | live.descriptors | live.files;
    memset(&live, 0, sizeof live);
    return !n;
}

/* The first `at` calls go well, with 0 all calls. */
static void arm(int kinds, int at, int lasting, int error)
{
    memset(&plan, 0, sizeof plan);
    plan.kinds = kinds, plan.fail_at = at, plan.lasting = lasting, plan.error = error;
}

/* ---- The library --------------------------------------------------------------------------- */

enum { N_VOCAB = 337 };

/* From open to a restored session; whether it came to the end.  After the session is there,
 * nothing may be called that can fail. */
static int use_library(int read_in, float logits[N_VOCAB], char err[256])
{
    gemma2_open_params params;
    gemma2_session_params small;
    gemma2_open_params_init(&params);
    gemma2_session_params_init(&small);
    params.read_into_memory = (uint32_t)read_in;
    small.n_context = 40, small.n_batch = 8, small.n_threads = 1;
    err[0] = 0;
    gemma2_model *m = gemma2_open(MODEL, &params, err, 256);
    gemma2_session *s = m ? gemma2_session_new(m, &small, err, 256) : NULL;
    gemma2_session *t = s ? gemma2_session_new(m, &small, err, 256) : NULL;
    if (t) {
        static char scratch[4096], saved[1 << 16];
        int calls = plan.calls;
        int32_t ids[40], id;
        int64_t n = gemma2_encode(m, "Once upon a time", -1, GEMMA2_ENCODE_BOS, ids, 20, scratch,
                                  sizeof scratch);
        gemma2_sampler sampler;
        gemma2_sampler_init(&sampler, 3);
        check(n > 1 && gemma2_prefill(s, ids, (size_t)n, logits) == GEMMA2_OK, "prefill");
        for (int i = 0; i < 5; i++) {
            id = gemma2_sample(s, &sampler, logits);
            check(gemma2_eval(s, &id, 1, logits) == GEMMA2_OK, "eval");
        }
        int64_t bytes = gemma2_session_save(s, saved, sizeof saved);
        check(bytes > 0 && gemma2_session_restore(t, saved, (size_t)bytes) == GEMMA2_OK, "restore");
        check(gemma2_session_copy(s, t) == GEMMA2_OK && gemma2_eval(s, &id, 1, logits) == GEMMA2_OK,
              "copy");
        for (size_t i = 0; gemma2_check(m, i, NULL, 0) == 1; i++)
            ;
        check(plan.calls == calls, "%d calls after the session was there", plan.calls - calls);
    }
    int done = t != NULL;
    gemma2_session_free(s), gemma2_session_free(t), gemma2_close(m);
    return done;
}

static void test_library(void)
{
    static const struct {
        int kinds, error;
        const char *needles[8]; /* what the sentences of its failures say, in order */
    } ways[2][2] = {
        {{MEMORY, ENOMEM, {"out of memory", "out of memory", "out of memory"}},
         {FILES, EIO, {"cannot open", "cannot read", "cannot map"}}},
        {{MEMORY, ENOMEM, {"out of memory", "out of memory", "out of memory", "out of memory"}},
         {FILES, EIO, {"cannot open", "cannot read", "cannot read"}}}};
    static float truth[N_VOCAB], logits[N_VOCAB];
    char err[256];
    arm(MEMORY | FILES, 0, 0, 0);
    check(use_library(0, truth, err), "the library: %s", err);
    for (int i = 0; i < 8; i++) {
        int read_in = i / 4, which = i / 2 % 2, lasting = i % 2, at = 0, done = 0;
        while (!done && at < 20) {
            arm(ways[read_in][which].kinds, ++at, lasting, ways[read_in][which].error);
            done = use_library(read_in, logits, err);
            const char *needle = at <= 8 ? ways[read_in][which].needles[at - 1] : NULL;
            if (needle)
                check(!done && strstr(err, needle), "call %d: \"%s\", not \"%s\"", at, err, needle);
            else
                check(done && !memcmp(logits, truth, sizeof truth), "call %d: %s", at, err);
            check(nothing_lives(), "call %d leaves something behind", at);
        }
    }
    for (int interrupted = 0; interrupted < 2; interrupted++) { /* open, fstat, (EINTR,) the end */
        arm(FILES, 3 + interrupted, 0, 0);
        plan.short_reads = interrupted;
        check(!use_library(1, logits, err) && strstr(err, "became shorter"), "early end: %s", err);
    }
    arm(0, 0, 0, 0);
    plan.short_reads = 1;
    check(use_library(1, logits, err) && !memcmp(logits, truth, sizeof truth) &&
              plan.short_reads > 20, "short and interrupted reads: %s", err);
    check(nothing_lives(), "short reads leave something behind");
}

/* ---- The program --------------------------------------------------------------------------- */

static const struct mode {
    const char *arguments[12], *input; /* "@" is the path of a text, "@@" of a file to keep */
    int terminal; /* standard input is one */
} modes[] = {
    {{"-q", "-t", "0", "-n", "6", "Once upon"}, "", 0},
    {{"-q", "-s", "7", "-n", "4", "--echo", "--stop", "zzz", "-f", "@"}, "", 0},
    {{"-q", "-n", "2", "-t", "0"}, "From standard input", 0},
    {{"-q", "--json", "-t", "0", "-s", "1", "-n", "0", "--in-memory", "x"}, "", 0},
    {{"-q", "-c", "-S", "Be brief.", "-t", "0", "-n", "3", "Hello"}, "", 0},
    {{"-q", "-c", "-t", "0", "-n", "2"}, "one\ntwo\n/clear\nthree\n", 1},
    {{"-q", "-t", "0", "-n", "2", "--session", "@@", " and then"}, "", 0},
    {{"-q", "-c", "-t", "0", "-n", "2", "--session", "@@"}, "one\n/clear\ntwo\n", 1},
    {{"-q", "-t", "0", "-n", "2", "--load", "@@", " and then"}, "", 0},
    {{"--tokenize", "-f", "@"}, "", 0},
    {{"--detokenize", "2 6 7 8 100 200"}, "", 0},
    {{"--logits", "3", "Once"}, "", 0},
    {{"--score", "--ids", "2 6 7 8"}, "", 0},
    {{"--trace-layer", "1", "--ids", "2 6 7 8"}, "", 0},
    {{"--trace", "--ids", "2 6 7 8"}, "", 0},
    {{"-q", "--perplexity", "@", "-C", "16"}, "", 0},
    {{"--info"}, "", 0},
    {{"--check"}, "", 0},
    {{"--help"}, "", 0},
    {{"--version"}, "", 0},
    {{"--tokenize", "--json", "-f", "@"}, "", 0},
    {{"-q", "-t", "0", "-n", "4", "--session", "@@", "--stop", "e", "Once"}, "", 0},
    {{"-q", "-C", "16", "--importance", "@@", "--importance-block", "32", "-f", "@"}, "", 0},
};
enum { N_MODES = sizeof modes / sizeof *modes };

struct ran {
    int status;
    char out[1 << 15], err[4096], session[1 << 17];
    size_t session_bytes;
};

static char scratch_dir[64];

static const char *in_dir(const char *name)
{
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", scratch_dir, name);
    return path;
}

/* All of a file, and a NUL.  Returns its size. */
static size_t read_file(const char *name, char *text, size_t room)
{
    FILE *f = (fopen)(in_dir(name), "rb");
    size_t n = f ? (fread)(text, 1, room - 1, f) : 0;
    text[n] = 0;
    if (f)
        (fclose)(f);
    return n;
}

static void write_file(const char *name, const char *bytes, size_t n)
{
    FILE *f = (fopen)(in_dir(name), "wb");
    if (!f || (fwrite)(bytes, 1, n, f) != n || (fclose)(f))
        fprintf(said, "cannot write to %s\n", scratch_dir), exit(1);
}

static int files_in_dir(void)
{
    DIR *dir = opendir(scratch_dir);
    int n = 0;
    for (struct dirent *e; dir && (e = readdir(dir)) != NULL;)
        n += e->d_name[0] != '.';
    closedir(dir);
    return n;
}

/* Runs the program as `plan` has it, on files for its standard streams. */
static void run_program(const struct mode *mode, struct ran *r)
{
    char *argv[16] = {"run", MODEL};
    int argc = 2;
    char text[128], session[128];
    snprintf(text, sizeof text, "%s", in_dir("text"));
    snprintf(session, sizeof session, "%s", in_dir("session"));
    for (; argc < 14 && mode->arguments[argc - 2]; argc++) {
        const char *argument = mode->arguments[argc - 2];
        argv[argc] = !strcmp(argument, "@") ? text : !strcmp(argument, "@@") ? session
                     : (char *)(uintptr_t)argument;
    }
    plan.terminal = mode->terminal;
    write_file("in", mode->input, strlen(mode->input));
    if (!freopen(in_dir("in"), "rb", stdin) ||
        !freopen(in_dir("out"), "wb", stdout) || !freopen(in_dir("err"), "wb", stderr))
        fprintf(said, "cannot write to %s\n", scratch_dir), exit(1);
    r->status = run_main(argc, argv);
    (fflush)(stdout), (fflush)(stderr);
    read_file("out", r->out, sizeof r->out);
    read_file("err", r->err, sizeof r->err);
    r->session_bytes = read_file("session", r->session, sizeof r->session);
}

/* One sentence, and nothing else but the signs of a conversation. */
static int is_sentence(const char *text)
{
    text += strspn(text, "> \n");
    size_t n = strlen(text);
    return n > 10 && !strncmp(text, "run: ", 5) && text[n - 1] == '\n' &&
           strchr(text, '\n') == text + n - 1;
}

/* A failure of each kind: how it is reported.  A broken pipe is no failure. */
static const struct {
    int kind, error, status[2];
    const char *sentence;
} failures[] = {
    {MEMORY, ENOMEM, {1, 3}, "memory"},
    {FILES, EIO, {3, 3}, "cannot"},
    {INPUT, EIO, {1, 1}, "cannot"},
    {OUTPUT, ENOSPC, {1, 1}, "cannot write to standard output: No space left"},
    {OUTPUT, EPIPE, {0, 0}, ""},
    {SAVING, ENOSPC, {1, 1}, "cannot save the "},
};
enum { N_FAILURES = sizeof failures / sizeof *failures };

/* The session's file before each run; what --importance writes replaces another importance. */
static struct ran kept, first_session;

static int has_argument(const struct mode *mode, const char *argument)
{
    for (int k = 0; mode->arguments[k]; k++)
        if (!strcmp(mode->arguments[k], argument))
            return 1;
    return 0;
}

static void put_kept(const struct mode *mode)
{
    kept = first_session;
    if (has_argument(mode, "--importance"))
        kept.session_bytes = (size_t)snprintf(kept.session, sizeof kept.session, "\x89GEMMAI\n");
    write_file("session", kept.session, kept.session_bytes);
}

static int same_session(const struct ran *a, const struct ran *b)
{
    return a->session_bytes == b->session_bytes &&
           !memcmp(a->session, b->session, a->session_bytes);
}

/* Whether one text is the start of the other, but for what a clock says. */
static int is_start(const char *text, const char *whole)
{
    const char *clock = strstr(whole, "\"timings\""), *time = strstr(whole, " ms\t");
    while (time && *time != '\t')
        time--;
    clock = clock ? clock : time;
    size_t n = strlen(text), sure = clock ? (size_t)(clock - whole) : n;
    return !strncmp(text, whole, n < sure ? n : sure);
}

/* Call number `at` of a kind fails.  Returns whether there was such a call. */
static int fail_once(const struct mode *mode, int which, int at, int lasting,
                     const struct ran *good)
{
    static struct ran r;
    int expected = 0, kind = failures[which].kind;
    put_kept(mode);
    arm(kind, at, lasting, failures[which].error);
    run_program(mode, &r);
    const char *name = mode->arguments[0], *second = mode->arguments[1];
    int there = plan.calls >= at, quiet = failures[which].error == EPIPE;
    for (int i = 0; i < 2; i++)
        expected |= r.status == failures[which].status[i];
    if (!there || (kind == INPUT && r.status == 0)) /* a seed can be had without a file */
        check(r.status == 0 && is_start(r.out, good->out) && is_start(good->out, r.out),
              "%s %s: status %d without a failure", name, second ? second : "", r.status);
    else
        check(expected && (quiet ? !strstr(r.err, "run:")
                                 : is_sentence(r.err) && strstr(r.err, failures[which].sentence)),
              "%s %s, %s at call %d: status %d, \"%s\"", name, second ? second : "",
              strerror(failures[which].error), at, r.status, r.err);
    size_t n = strlen(r.out);
    if (n && r.status && r.out[n - 1] == '\n') /* a newline ends what there is of a reply */
        r.out[n - 1] = 0;
    check(is_start(r.out, good->out), "%s: \"%s\" is written at call %d", name, r.out, at);
    check(same_session(&r, &kept) || same_session(&r, good), "%s: call %d, %s: half a session",
          name, at, strerror(failures[which].error));
    check(kind != SAVING || !there || same_session(&r, &kept), "%s: a session that is not saved "
          "is changed", name);
    check(!plan.named_early, "%s: a file is named before it is on the disk", name);
    check(nothing_lives() && files_in_dir() == 5, "%s: call %d leaves something behind", name, at);
    return there;
}

/* Ctrl-C while it is seen whether there can be a file: there is none, and that is all.  While
 * it is written: it is written.  Nothing else is left. */
static void test_interrupted_saves(void)
{
    static struct ran r;
    for (int i = 0; i < N_MODES; i++) {
        if (!has_argument(&modes[i], "--session") && !has_argument(&modes[i], "--importance"))
            continue;
        for (int file = 1; file <= 2; file++) {
            put_kept(&modes[i]);
            arm(0, 0, 0, 0);
            plan.interrupted = file;
            run_program(&modes[i], &r);
            check(r.status == (file == 1 ? 130 : 0) && files_in_dir() == 5 &&
                      same_session(&r, &kept) == (file == 1),
                  "%s, interrupted while saving: status %d, %s", modes[i].arguments[1], r.status,
                  r.err);
        }
    }
}

/* Ctrl-C as soon as a person may have seen something: each asks, or stops a reply. */
static void test_interrupts(void)
{
    static const struct mode talk = {{"-q", "-c", "-t", "0", "-n", "2"}, "one\ntwo\n/show\n3\n", 1};
    static struct ran good, r;
    arm(0, 0, 0, 0);
    run_program(&talk, &good);
    int n = plan.flushes;
    check(n > 8 && good.status == 0, "%d times something was shown", n);
    for (int at = 1; at < n; at++) {
        arm(0, 0, 0, 0);
        plan.interrupted_flush = at;
        run_program(&talk, &r);
        check(r.status == 0 && (strstr(r.err, "once more") || strcmp(r.out, good.out) != 0),
              "Ctrl-C behind flush %d of %d is lost: status %d, %s", at, n, r.status, r.err);
    }
}

/* ---- Batches: a line that fails has its own result, and the others are as ever -------------- */

#define CHAT "{\"custom_id\": \"c\", \"url\": \"/v1/chat/completions\", \"body\": {\"messages\": " \
    "[{\"role\": \"user\", \"content\": [{\"type\": \"text\", \"text\": \"Hi\"}]}], " \
    "\"max_tokens\": 2, \"logprobs\": true, \"top_logprobs\": 2}}\n"
static const char LINES[] =
    "{\"prompt\": \"Once\", \"max_tokens\": 2}\n"
    "{\"id\": \"b\", \"prompt\": \"Once upon\", \"stop\": [\"zz\"], \"max_tokens\": 3}\n" CHAT
    "{\"id\": 5, \"prompt\": \"Once upon a\", \"choices\": [\"a\", \"bc\"]}";
static const char EARLIER[] = "{\"id\": 1, \"text\": \" so\", \"seed\": 7}\n"
    "{\"id\": 5, \"error\": {\"message\": \"gone\"}}\n{\"id\": \"b\", \"te";
enum { N_LINES = 4 };

static const struct mode batches[] = {
    {{"--batch", "-", "-q", "-s", "1", "-j", "1", "-C", "64", "--parallel", "2"}, LINES, 0},
    {{"--batch", "@", "-q", "-o", "@@", "-j", "1", "-C", "64"}, "", 0},
};

/* How many lines of a text are those of another, and how many tell of failing memory; -1 where
 * there is something else. */
static int compare_lines(const char *text, const char *whole, int *n_errors)
{
    static char line[4096];
    int n = 0;
    *n_errors = 0;
    for (const char *end; *text; text = end + 1) {
        end = strchr(text, '\n');
        if (!end || end - text > 4000)
            return -1;
        snprintf(line, sizeof line, "%.*s", (int)(end + 1 - text), text);
        int failed = strstr(line, "\"error\": {\"message\": \"") && strstr(line, "memory");
        *n_errors += failed;
        if (!failed && !strstr(whole, line))
            return -1;
        n += !failed;
    }
    return n;
}

static int fail_in_batch(const struct mode *mode, int which, int at, int lasting,
                         const struct ran *good)
{
    static struct ran r;
    int n_errors, in_file = mode > batches, expected = 0, kind = failures[which].kind;
    write_file("session", EARLIER, sizeof EARLIER - 1);
    arm(kind, at, lasting, failures[which].error);
    run_program(mode, &r);
    int there = plan.calls >= at;
    for (int i = 0; i < 2; i++)
        expected |= r.status == failures[which].status[i];
    int n = compare_lines(in_file ? r.session : r.out, in_file ? good->session : good->out,
                          &n_errors);
    if (in_file && !strcmp(r.session, EARLIER))
        n = n_errors = 0;
    if (!there || (r.status == 0 && failures[which].error != EPIPE))
        check(n == N_LINES && !n_errors, "a batch, %s at call %d: status 0, %d results:\n%s%s",
              strerror(failures[which].error), at, n, r.out, r.session);
    else
        check(n >= 0 && expected && (failures[which].error == EPIPE ? !*r.err
              : n_errors || (is_sentence(r.err) &&
                             strstr(r.err, kind == MEMORY ? "memory" : "cannot"))),
              "a batch, %s at call %d: status %d, \"%s\", %d results:\n%s%s",
              strerror(failures[which].error), at, r.status, r.err, n, r.out, r.session);
    check(nothing_lives() && files_in_dir() == 5, "a batch: call %d leaves something behind", at);
    return there;
}

static void test_batches(void)
{
    static struct ran good;
    write_file("text", LINES, sizeof LINES - 1);
    for (int i = 0; i < 2; i++) {
        arm(0, 0, 0, 0);
        write_file("session", EARLIER, sizeof EARLIER - 1);
        run_program(&batches[i], &good);
        check(good.status == 0 && nothing_lives(), "a batch: status %d, %s", good.status, good.err);
        for (int which = 0; which < N_FAILURES; which++)
            for (int lasting = 0; lasting < 2; lasting++)
                for (int at = 1; fail_in_batch(&batches[i], which, at, lasting, &good);)
                    at += 1 + at / 8;
    }
    write_file("session", EARLIER, sizeof EARLIER - 1);
    arm(0, 0, 0, 0);
    plan.interrupted = 1;
    run_program(&batches[1], &good);
    check(good.status == 130 && good.session_bytes == strcspn(EARLIER, "\n") + 1,
          "Ctrl-C while earlier results are kept: status %d, %s", good.status, good.session);
}

/* A session that was saved after a rewind beyond which there is none gives no logits of its
 * last token; with nothing to add, all is evaluated again. */
static void test_deepest_rewind(void)
{
    static const struct mode go_on = {{"-q", "-t", "0", "-n", "3", "--exact", "--session", "@@",
                                       "-p", ""}, "", 0};
    static char saved[1 << 17];
    static struct ran r;
    int32_t ids[90], refused = 0;
    gemma2_session_params p;
    arm(0, 0, 0, 0);
    gemma2_model *m = gemma2_open(MODEL, NULL, NULL, 0);
    gemma2_session_params_init(&p);
    p.n_context = 90, p.n_batch = p.n_threads = 1;
    gemma2_session *s = gemma2_session_new(m, &p, NULL, 0);
    for (int i = 0; i < 90; i++)
        ids[i] = 7 + i % 50;
    gemma2_eval(s, ids, 90, NULL);
    while (gemma2_rewind(s, gemma2_position(s) - 1) == GEMMA2_OK)
        refused = gemma2_position(s) - 1;
    check(refused > 1, "all can be rewound");
    int64_t n = gemma2_session_save(s, saved, sizeof saved);
    check(n > 0, "it is saved: %d", (int)n);
    write_file("session", saved, n > 0 ? (size_t)n : 0);
    gemma2_session_free(s), gemma2_close(m);
    run_program(&go_on, &r);
    check(r.status == 0 && r.out[0], "after the deepest rewind: status %d, %s", r.status, r.err);
}

static void test_program(void)
{
    static struct ran good;
    static const struct mode first = {{"-q", "-t", "0", "-n", "3", "--session", "@@", "Once"}, "",
                                      0};
    static const char text[] = "Once upon a time there was a king who had three sons.\n"
                               "The youngest went out, and there he met an old grey man.\n";
    write_file("text", text, sizeof text - 1);
    arm(0, 0, 0, 0);
    run_program(&first, &first_session);
    check(first_session.status == 0 && first_session.session_bytes > 200, "a session is kept: %s",
          first_session.err);
    for (int i = 0; i < N_MODES; i++) {
        put_kept(&modes[i]);
        arm(0, 0, 0, 0);
        run_program(&modes[i], &good);
        check(good.status == 0 && (good.out[0] || !same_session(&good, &kept)), "%s: status %d, %s",
              modes[i].arguments[0], good.status, good.err);
        check(nothing_lives(), "%s leaves something behind", modes[i].arguments[0]);
        for (int which = 0; which < N_FAILURES; which++)
            for (int lasting = 0; lasting < 2; lasting++)
                for (int at = 1; fail_once(&modes[i], which, at, lasting, &good);)
                    at += 1 + (at > 50 ? at / 8 : 0); /* some have thousands */
    }
    test_interrupted_saves();
    test_deepest_rewind();
    test_interrupts();
    test_batches();
    remove(in_dir("session"));
    remove(in_dir("in")), remove(in_dir("out")), remove(in_dir("err")), remove(in_dir("text"));
}

int main(void)
{
    signal(SIGINT, SIG_DFL); /* whoever started this may ignore it */
    said = (fdopen)(dup(STDOUT_FILENO), "w");
    snprintf(scratch_dir, sizeof scratch_dir, "/tmp/gemma2-fault-XXXXXX");
    if (!said || !mkdtemp(scratch_dir))
        return printf("cannot make %s\n", scratch_dir), 1;
    setenv("GEMMA2_ISA", "scalar", 1);
    test_library();
    test_program();
    rmdir(scratch_dir);
    fprintf(said, "%d passed, %d failed\n", n_passed, n_failed);
    return n_failed > 0;
}
