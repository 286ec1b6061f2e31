/* gemma2.h - run Gemma 2 language models (2B, 9B, 27B and their descendants)
 * on any CPU.  One header, one C file, no dependencies.
 *
 * A complete program (cc -O3 -ffp-contract=off prog.c gemma2.c -lm):
 *
 *   #include "gemma2.h"
 *   #include <stdio.h>
 *   #include <stdlib.h>
 *
 *   int main(int argc, char **argv)
 *   {
 *       char err[256], text[1024];
 *       if (argc < 3)
 *           return fprintf(stderr, "usage: prog MODEL TEXT\n"), 2;
 *       gemma2_model *model = gemma2_open(argv[1], NULL, err, sizeof err);
 *       if (!model)
 *           return fprintf(stderr, "%s\n", err), 3;
 *       gemma2_session *session = gemma2_session_new(model, NULL, err, sizeof err);
 *       if (!session)
 *           return fprintf(stderr, "%s\n", err), 1;
 *       float *logits = (float *)malloc(sizeof *logits * gemma2_get_config(model)->n_vocab);
 *       size_t scratch_bytes = gemma2_encode_scratch(4096);
 *       void *scratch = malloc(scratch_bytes);
 *       int32_t ids[4096];
 *       if (!logits || !scratch)
 *           return 1;
 *
 *       int64_t n = gemma2_encode(model, argv[2], -1, GEMMA2_ENCODE_BOS, ids, 4096,
 *                                 scratch, scratch_bytes);
 *       int status = n > 4096 ? (int)GEMMA2_ERR_CONTEXT : (int)n;
 *       if (n >= 0 && n <= 4096)
 *           status = gemma2_prefill(session, ids, n, logits);
 *       gemma2_sampler sampler;
 *       gemma2_sampler_init(&sampler, 42);
 *       gemma2_utf8 hold = {{0}, 0};
 *       for (int i = 0; status >= 0 && i < 100; i++) {
 *           int32_t id = gemma2_sample(session, &sampler, logits);
 *           if (id < 0 || gemma2_is_stop(model, id))
 *               break;
 *           int bytes = gemma2_decode(model, &hold, id, text, sizeof text);
 *           if (bytes > 0)
 *               fwrite(text, 1, bytes, stdout);
 *           status = gemma2_eval(session, &id, 1, logits);
 *       }
 *       printf("\n");
 *       if (status < 0)
 *           fprintf(stderr, "%s\n", gemma2_error_string(status));
 *       free(scratch), free(logits);
 *       gemma2_session_free(session), gemma2_close(model);
 *       return status < 0;
 *   }
 *
 * RULES FOR EVERY CALL
 *
 * Ownership.  gemma2_close frees what gemma2_open* gave, gemma2_session_free what
 * gemma2_session_new gave, gemma2_worker_free what gemma2_worker_new gave.  Your buffers stay
 * yours and are not kept, except the bytes of gemma2_open_memory and gemma2_session_place, which
 * must outlive the model or the session.  Pointers you get live as long as the model or session
 * they came from.  A model must outlive its workers and sessions, a worker its sessions.
 *
 * Errors.  Functions that make something return NULL on failure and write one sentence to err,
 * which is always terminated and may be NULL.  The others return a negative GEMMA2_ERR_ code.  A
 * call that fails leaves the session as it was, unless its comment says otherwise.  A NULL that
 * the comment does not allow is GEMMA2_ERR_ARGUMENT; functions that return a pointer, a size, or
 * yes or no then return NULL or 0.  The library never exits, aborts, prints, installs signal
 * handlers or keeps global state.  It calls back only the hook of gemma2_set_hook and the
 * `run` of a worker.  The one environment variable it reads is GEMMA2_ISA, at open.  A call takes
 * up to 200 KB of stack, also in OpenMP's threads or the host's.
 *
 * Threads.  A model never changes after it was opened: any number of threads may use it.  A
 * session belongs to one thread at a time; only gemma2_cancel may be called from any thread and
 * from a signal handler.  With n_threads = 1 OpenMP is never entered.  With more, OpenMP keeps a
 * pool of threads for each calling thread, which spin while they wait: a host with more threads
 * than processors should set n_threads = 1 or OMP_WAIT_POLICY=passive, or lend a worker its own
 * threads.  Inside a parallel region
 * of the host OpenMP may grant fewer threads than asked for.  Results do not depend on it.
 *
 * Processes.  After fork() the child may use models and its copies of sessions whose n_threads is
 * 1.  With more, GNU's OpenMP waits forever for threads that did not survive the fork.
 * gemma2_session_copy moves such a session to one with a single thread.
 *
 * Signals and floating point.  Reading a mapped file that someone cuts short raises SIGBUS;
 * read_into_memory is proof against that.  A call sets rounding mode, flush-to-zero and trap
 * masks of its thread and puts them back.
 *
 * Versions.  MAJOR changes when programs must change, MINOR when something is added, PATCH when
 * something is mended.  gemma2_config and structs with struct_size may grow at their ends; other
 * structs never change within a major version.  A smaller struct_size, of an older version, leaves
 * the rest at its defaults.  A larger one, up to 4096, is accepted if all that lies beyond is zero.
 * Any other is GEMMA2_ERR_ARGUMENT: no request is overlooked.
 *
 * Numbers.  Positions and ids start at 0.  Logits are float, after the final soft-cap.  The same
 * calls give the same bits for any number of threads.  Except in gemma2_prefill, so does any way
 * of cutting tokens into calls and rows into batches. */
#ifndef GEMMA2_H
#define GEMMA2_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GEMMA2_VERSION_MAJOR 0
#define GEMMA2_VERSION_MINOR 3
#define GEMMA2_VERSION_PATCH 0
#define GEMMA2_VERSION_STRING "0.3.0"
#define GEMMA2_VERSION_NUMBER \
    (GEMMA2_VERSION_MAJOR * 10000 + GEMMA2_VERSION_MINOR * 100 + GEMMA2_VERSION_PATCH)

#ifndef GEMMA2_API
#if defined(__GNUC__) && !defined(_WIN32)
#define GEMMA2_API __attribute__((visibility("default")))
#else
#define GEMMA2_API
#endif
#endif

/* The library's own at run time: "MAJOR.MINOR.PATCH", and GEMMA2_VERSION_NUMBER. */
GEMMA2_API const char *gemma2_version(void);
GEMMA2_API int gemma2_version_number(void);

enum {
    GEMMA2_OK = 0,
    GEMMA2_ERR_ARGUMENT = -1,  /* a missing buffer, a count or value out of its range */
    GEMMA2_ERR_MEMORY = -2,    /* out of memory; for callers, no call returns it */
    GEMMA2_ERR_CONTEXT = -3,   /* more tokens than the context has room for */
    GEMMA2_ERR_TOKEN = -4,     /* a token id outside the vocabulary */
    GEMMA2_ERR_REWIND = -5,    /* the sliding window no longer holds that position */
    GEMMA2_ERR_NONFINITE = -6, /* a pass gave logits that are not finite, or logits to sample from
                                * hold NaN or +infinity */
    GEMMA2_ERR_SPACE = -7,     /* the caller's buffer is too small */
    GEMMA2_ERR_CORRUPT = -8,   /* the contents are not what header or digest say */
    GEMMA2_ERR_CANCELLED = -9, /* gemma2_cancel */
    GEMMA2_ERR_MISMATCH = -10, /* another model, window, cache type or version */
    GEMMA2_ERR_CHAT = -11,     /* the chat template has no form for these messages */
    GEMMA2_ERR_FOREIGN = -12,  /* not a saved session, or not a model file, at all */
    GEMMA2_ERR_FILE = -13      /* the file cannot be opened or read */
};
/* One sentence for a code; never NULL. */
GEMMA2_API const char *gemma2_error_string(int code);

/* ---- Model ---------------------------------------------------------------------- */

typedef struct gemma2_model gemma2_model;

/* gemma2_open_params_init fills in the defaults and struct_size. */
typedef struct {
    uint32_t struct_size;
    uint32_t read_into_memory; /* 0: map the file (default).  1: read it into memory with huge
                                * pages: a tenth faster to decode, slower to open */
    uint32_t exact_prefill;    /* 1: gemma2_prefill returns the bits of gemma2_eval; no matrix
                                * units or bf16 arithmetic */
    int *code;                 /* where opening leaves GEMMA2_OK or what kind of error the
                                * sentence tells: ARGUMENT, MEMORY, FILE, FOREIGN, MISMATCH (a
                                * newer format) or CORRUPT; NULL: nowhere */
} gemma2_open_params;
GEMMA2_API void gemma2_open_params_init(gemma2_open_params *params);

/* Opens a model file.  Checks header, directory, identity and tokenizer; reads no weights.
 * params may be NULL.  A mapped file must not change while it is open.  The instruction set is
 * the best that this CPU has.  GEMMA2_ISA=scalar|avx2|avxvnni|avx512|avx512bf16|amx|neon|dotprod|
 * i8mm in the environment forces one; an unknown one, or one that the CPU lacks, is an error.
 * GEMMA2_ISA=reference runs the model in plain loops instead: the same bits, slowly.
 * On Linux with AMX the process asks the kernel for the use of tile registers, unless
 * exact_prefill is set or all weights are f32.  This permission stays: signal frames of threads
 * that use tiles grow by 8 KB, and sigaltstack refuses stacks too small for them.  If the kernel
 * declines, prefill does without. */
GEMMA2_API gemma2_model *gemma2_open(const char *path, const gemma2_open_params *params,
                                     char *err, size_t err_size);
/* The same for a file in memory, aligned to 64, which must not change until gemma2_close.
 * read_into_memory must be 0. */
GEMMA2_API gemma2_model *gemma2_open_memory(const void *data, size_t size,
                                            const gemma2_open_params *params, char *err,
                                            size_t err_size);
GEMMA2_API void gemma2_close(gemma2_model *model); /* NULL is fine */

/* What the model is.  New members come at the end. */
typedef struct {
    int32_t n_layers; /* L; 0: the file holds only a tokenizer */
    int32_t d_model;  /* D, width of the residual stream */
    int32_t n_heads, n_kv_heads, head_dim; /* N, K, H; N is a multiple of K */
    int32_t d_ffn;     /* F, width of one branch of the feed-forward layer */
    int32_t n_vocab;   /* V, rows of the embedding = pieces of the tokenizer */
    int32_t window;    /* W, keys a local layer sees, the current one included */
    int32_t n_context; /* positions the model was trained for */
    float rms_norm_eps, attn_softcap, final_softcap; /* soft-caps: 0 is off */
    float query_scale;     /* on q; query_pre_attn_scalar^-0.5 */
    float embedding_scale; /* sqrt(D) as the model was trained with it */
    double rope_theta;
    int32_t bos, eos, pad, unk;          /* ids, -1 where absent */
    int32_t start_of_turn, end_of_turn;  /* turn markers, -1 where absent */
    int32_t n_stop;       /* ids that end a text ... */
    int32_t stop[15];     /* ... in the order of the file */
    int32_t max_piece_bytes; /* longest piece; see gemma2_decode */
    uint8_t is_local[1024];  /* per layer: 1 sliding window, 0 global */
    uint8_t identity[32];    /* SHA-256 of header and directory */
    uint64_t file_bytes;
    const char *isa; /* the instruction set in use, "avx512" */
    int32_t n_scores; /* of a reward model or classifier, see gemma2_scores; else 0 */
    int32_t n_kept;   /* ids that can be written: V, or fewer where the file was made so.  The
                       * logits of the others are -INFINITY */
} gemma2_config;
GEMMA2_API const gemma2_config *gemma2_get_config(const gemma2_model *model);
GEMMA2_API int gemma2_is_stop(const gemma2_model *model, int32_t id); /* 1 or 0 */

/* One of the file's facts: "name", "source", "license", "chat_template", "export" and others.
 * UTF-8, not terminated, its size in *size.  NULL and size 0 where absent. */
GEMMA2_API const char *gemma2_fact(const gemma2_model *model, const char *key, size_t *size);

/* One entry of the file's directory. */
typedef struct {
    const char *role;   /* "embedding", "q", ...; "optional" for one this version skips */
    const char *type;   /* "f32", "bf16", "q8", "q6", "q4", "q3" or "bytes" */
    int32_t layer;      /* -1 where it belongs to no layer */
    uint64_t rows, cols, bytes;
} gemma2_section;
/* Fills *out with entry i.  Returns 1, or 0 where there is no entry i. */
GEMMA2_API int gemma2_get_section(const gemma2_model *model, size_t i, gemma2_section *out);
/* Reads all of entry i: digest, finite values, zero padding.  Returns 1 when it is sound, 0 where
 * there is no entry i, or GEMMA2_ERR_CORRUPT with a sentence in err. */
GEMMA2_API int gemma2_check(const gemma2_model *model, size_t i, char *err, size_t err_size);

/* ---- Worker --------------------------------------------------------------------- */

/* Threads and scratch for passes.  A session brings a worker of its own unless it is given one:
 * then it is little more than its cache, and any number of sessions of one model share the
 * worker.  A worker and all its sessions belong to one thread at a time. */
typedef struct gemma2_worker gemma2_worker;

/* The host's threads instead of OpenMP's: calls fn(arg, i) for each i from 0 to n - 1, each on a
 * thread of its own and all at once, and returns when all calls have.  One may be made on the
 * calling thread.  With fewer threads than n, with some i left out, with one call after another or
 * with none at all, a pass takes longer but gives the same bits.  No call may still run, or begin,
 * after the return. */
typedef void gemma2_run(void *run_context, int32_t n, void (*fn)(void *arg, int32_t i),
                        void *arg);

/* gemma2_worker_params_init sets struct_size, and zeros, which mean the defaults. */
typedef struct {
    uint32_t struct_size;
    int32_t n_batch;   /* rows of one pass, 1..4096; 0: 256 */
    int32_t n_threads; /* 1..1024; 0: one a processor that this process may use, by its affinity
                        * mask (with OpenMP) and its control group's quota */
    int32_t n_context; /* in passes of up to 4 rows, threads share the attention of one row to as
                        * many positions; 0: as trained */
    gemma2_run *run;   /* NULL: OpenMP, and one thread where the library was built without it */
    void *run_context;
} gemma2_worker_params;
GEMMA2_API void gemma2_worker_params_init(gemma2_worker_params *params);

/* ---- Session -------------------------------------------------------------------- */

typedef struct gemma2_session gemma2_session;

enum { GEMMA2_CACHE_AUTO = 0, GEMMA2_CACHE_F32 = 1, GEMMA2_CACHE_F16 = 2, GEMMA2_CACHE_Q8 = 3 };

/* gemma2_session_params_init sets struct_size, and zeros, which mean the defaults. */
typedef struct {
    uint32_t struct_size;
    int32_t n_context;  /* positions; 0: as trained; more than that is allowed */
    int32_t n_batch;    /* its rows in one pass, 1..4096; 0: 256, or the context if shorter */
    int32_t n_threads;  /* of a worker of its own, as gemma2_worker_params has it; without
                         * effect where a worker is given */
    int32_t window;     /* local layers' window, 1..W; 0: W */
    int32_t cache_type; /* GEMMA2_CACHE_*; auto: f32 for all-f32 weights, else f16.  Q8: 8.5 bits
                         * a number, 32 of a position with one scale */
    gemma2_worker *worker; /* must outlive the session; NULL: a worker of its own, for n_batch
                            * rows, within the session's memory */
} gemma2_session_params;
GEMMA2_API void gemma2_session_params_init(gemma2_session_params *params);

/* How many bytes a session or a worker with these params takes. */
typedef struct {
    uint64_t weights; /* of the file, mapped, shared by all sessions */
    uint64_t cache;   /* keys and values; touched only as positions fill up */
    uint64_t scratch; /* activations and sampling: a worker; ids */
    uint64_t total;   /* cache + scratch: what gemma2_session_place needs */
} gemma2_plan;
/* params may be NULL.  GEMMA2_ERR_ARGUMENT where they, or the sizes they lead to, are out of
 * range; GEMMA2_ERR_MISMATCH where the worker is of another model. */
GEMMA2_API int gemma2_session_plan(const gemma2_model *model,
                                   const gemma2_session_params *params, gemma2_plan *plan);
GEMMA2_API int gemma2_worker_plan(const gemma2_model *model,
                                  const gemma2_worker_params *params, gemma2_plan *plan);

/* A worker for sessions of the model, which must outlive it.  params may be NULL.  One
 * allocation; none follow it. */
GEMMA2_API gemma2_worker *gemma2_worker_new(const gemma2_model *model,
                                            const gemma2_worker_params *params,
                                            char *err, size_t err_size);
GEMMA2_API void gemma2_worker_free(gemma2_worker *worker); /* NULL is fine */

/* How many threads a session or a worker with that n_threads and without `run` has: for 0 the
 * default, and 1 for any number where the library was built without OpenMP. */
GEMMA2_API int32_t gemma2_threads(int32_t n_threads);

/* A session at position 0.  params may be NULL.  One allocation; none follow it. */
GEMMA2_API gemma2_session *gemma2_session_new(const gemma2_model *model,
                                              const gemma2_session_params *params,
                                              char *err, size_t err_size);
/* The same in the caller's memory: plan.total bytes, aligned to 64. */
GEMMA2_API gemma2_session *gemma2_session_place(const gemma2_model *model,
                                                const gemma2_session_params *params,
                                                void *memory, size_t size,
                                                char *err, size_t err_size);
GEMMA2_API void gemma2_session_free(gemma2_session *session); /* NULL is fine */

GEMMA2_API int32_t gemma2_position(const gemma2_session *session);  /* tokens held */
GEMMA2_API int32_t gemma2_context(const gemma2_session *session);   /* room in all */
GEMMA2_API const int32_t *gemma2_history(const gemma2_session *session); /* ids of those held */

/* Appends n >= 1 tokens with the exact arithmetic of single steps.  logits, V floats or NULL,
 * receives those after the last token.  GEMMA2_ERR_CONTEXT when the tokens do not fit, before any
 * is evaluated. */
GEMMA2_API int gemma2_eval(gemma2_session *session, const int32_t *ids, size_t n,
                           float *logits);
/* The same, faster, for prompts: where the CPU has units for bf16, inputs of products and of
 * attention may be rounded to it.  So the bits depend on the CPU, but not on threads or batches.
 * Results stay about as close to f32 arithmetic as those of gemma2_eval: on the demo model q8's
 * divergence, 0.00016 nats a token, grows by at most 5 %, and bf16 weights stay below a fifth of
 * it.  f32 weights, and attention over an f32 cache, stay exact.  A long prompt may come in
 * pieces, to show progress or to be cancelled. */
GEMMA2_API int gemma2_prefill(gemma2_session *session, const int32_t *ids, size_t n,
                              float *logits);

/* One token of one session in a pass that sessions share. */
typedef struct {
    gemma2_session *session;
    int32_t id;
    float *logits;   /* V floats, or NULL where not wanted */
    int32_t prefill; /* 0: the bits of gemma2_eval; else those of gemma2_prefill */
    int32_t status;  /* out: GEMMA2_OK, or why this row was not done */
} gemma2_row;
/* Evaluates the rows in one pass of the first session's worker; those of one session follow one
 * another in order.  All rows of a session are done, or none: their status is
 * GEMMA2_ERR_MISMATCH where it is of another model than the worker, GEMMA2_ERR_ARGUMENT for more
 * rows than its n_batch, GEMMA2_ERR_CONTEXT where it lacks room for them, GEMMA2_ERR_TOKEN or
 * GEMMA2_ERR_CANCELLED.  A row without a session is GEMMA2_ERR_ARGUMENT.  The other sessions' rows
 * are done.  Returns GEMMA2_OK when all rows were done, else the status of the first that was not.
 * Without any session, or with more rows than the worker's n_batch, no row is done and all are
 * GEMMA2_ERR_ARGUMENT. */
GEMMA2_API int gemma2_eval_rows(gemma2_row *rows, size_t n_rows);

/* Appends n >= 1 tokens like gemma2_eval and writes natural log-probabilities: logprobs[i] is that
 * of ids[i + 1] after those before it, and logprobs[n - 1] that of next, or left alone when next is
 * -1.  That of an id that cannot be written is -INFINITY.  After GEMMA2_ERR_NONFINITE the tokens
 * have been appended. */
GEMMA2_API int gemma2_score(gemma2_session *session, const int32_t *ids, size_t n,
                            int32_t next, float *logprobs);

/* on = 1: calls that evaluate this session, now or later, end after the layer they are at with
 * GEMMA2_ERR_CANCELLED.  on = 0 withdraws that.  Past its last layer a call succeeds, but for
 * gemma2_score, which asks again all along the head.  Passes of n_batch rows that were complete
 * stay, see gemma2_position; the rows of the cut pass count as taken back by gemma2_rewind.  A
 * shared pass goes on for the sessions that are not cancelled, and ends early when all are. */
GEMMA2_API int gemma2_cancel(gemma2_session *session, int on);

/* One step of a pass: the values [rows][cols] that it gave, a row for each token of the pass.
 * In order of use: "embedding"; in each layer "attn_norm", "q", "k", "v" (q and k turned by
 * RoPE, q scaled), "attn", "o", "post_attn_norm", "attn_residual", "ffn_norm", "geglu",
 * "down", "post_ffn_norm" and "residual"; where logits are wanted "final_norm" and, once for
 * each row, "logits" (layer is then the row's number among those). */
typedef struct {
    const char *name;
    int32_t layer; /* 0 outside of layers */
    size_t rows, cols;
    float *data;
} gemma2_activation;
typedef void gemma2_hook(void *context, const gemma2_activation *activation);
/* Calls hook with context after each step of every pass of the session's worker, whichever
 * sessions take part.  The thread that evaluates makes the call; where the threads are the host's,
 * it evaluates alone.  The hook may change data, which the following steps then read, and may not
 * use sessions of this worker but for gemma2_cancel and what only asks.  hook NULL: no calls, and
 * no cost. */
GEMMA2_API int gemma2_set_hook(gemma2_session *session, gemma2_hook *hook, void *context);

/* The logits [V] that a residual stream state[D] would give: final norm, head, soft-cap.  With
 * the "residual" of a layer this shows what the model would say after it (the logit lens).
 * Between calls that evaluate; the session stays where it is, and no hook is called. */
GEMMA2_API int gemma2_read_out(gemma2_session *session, const float *state, float *logits);

/* Appends n >= 1 tokens like gemma2_eval and writes states[n][D]: the residual stream after the
 * last layer and the final norm, which embeddings of text are made of.  After
 * GEMMA2_ERR_NONFINITE the tokens have been appended. */
GEMMA2_API int gemma2_states(gemma2_session *session, const int32_t *ids, size_t n,
                             float *states);
/* The n_scores outputs of the score head of a reward model or classifier for one of these states
 * (as transformers' Gemma2ForSequenceClassification: that of the last token, no soft-cap).
 * GEMMA2_ERR_ARGUMENT where the model has no such head.  Between calls that evaluate. */
GEMMA2_API int gemma2_scores(gemma2_session *session, const float *state, float *scores);

/* Goes back to the first n tokens, exactly.  Rewinding to 0 always works.  Any other position
 * works while the session has held at most window + n_batch tokens since 0; after that, one that
 * is at most n_batch tokens back from the most it ever held.  Further back is GEMMA2_ERR_REWIND:
 * rewind to 0 and evaluate the ids again.  A session that was copied or restored goes back no
 * further than the one that it continues. */
GEMMA2_API int gemma2_rewind(gemma2_session *session, int32_t n);

/* Makes `to` continue where `from` stands, with the same bits; what it held is gone.  Context,
 * batch, threads and memory may differ.  GEMMA2_ERR_MISMATCH where model, window or cache type do,
 * GEMMA2_ERR_CONTEXT where `to` has too little room. */
GEMMA2_API int gemma2_session_copy(gemma2_session *to, const gemma2_session *from);

/* Writes the session to a buffer: ids, keys and values, the model's identity and a digest.
 * Returns the bytes it takes; buffer NULL only asks.  GEMMA2_ERR_SPACE when size is too small. */
GEMMA2_API int64_t gemma2_session_save(const gemma2_session *session, void *buffer, size_t size);
/* Makes the session continue where the saved one stood, with the same bits, on any instruction
 * set, context, batch and number of threads.  Logits are not saved: the next call evaluates a
 * token.  GEMMA2_ERR_FOREIGN where the bytes are no saved session, GEMMA2_ERR_CORRUPT where they
 * are a damaged one, GEMMA2_ERR_MISMATCH where another version wrote them; that and
 * GEMMA2_ERR_CONTEXT also as for a copy. */
GEMMA2_API int gemma2_session_restore(gemma2_session *session, const void *data, size_t size);

/* ---- Importance: how large the inputs of products are, for quantisation ----------- */

/* Input i in order of use: "q" (which k and v read, too), "o", "gate" (and up) and "down" of each
 * layer, at last "head". */
typedef struct {
    const char *role;
    int32_t layer;  /* -1 for the head */
    uint32_t cols;  /* values of one input */
    uint64_t first; /* columns of all entries before it */
} gemma2_input;
/* Returns 1, or 0 where there is no input i. */
GEMMA2_API int gemma2_get_input(const gemma2_model *model, size_t i, gemma2_input *out);

/* Appends n >= 1 tokens like gemma2_eval.  For each input e, and its values x at each token, adds
 * x[c]^2 to sums[block * e.first + c]: that is block 1.  With a block of 32, 64, 96 ... 1024 there
 * are as many rows of sums, sums[block * e.first + r * e.cols + c], and row r adds
 * x[c] * x[c - c % block + r], or nothing where that lies past the end.  The same bits for any
 * threads and any way of cutting tokens into calls.  Set sums to 0 before the first call; after
 * GEMMA2_ERR_CANCELLED they are of no use. */
GEMMA2_API int gemma2_importance(gemma2_session *session, const int32_t *ids, size_t n,
                                 uint32_t block, double *sums);

/* ---- Text ----------------------------------------------------------------------- */

enum {
    GEMMA2_ENCODE_BOS = 1,  /* put BOS first */
    GEMMA2_ENCODE_PLAIN = 2 /* text of strangers: turn markers, mask and unusedN in it are spelled
                             * out, never the pieces themselves */
};
/* Scratch for encoding a text of that many bytes; 0 where it is too long: above 2^28 bytes, in a
 * 32-bit program above 69 MB. */
GEMMA2_API size_t gemma2_encode_scratch(size_t text_bytes);
/* Text to ids, exactly as SentencePiece does; bytes that are not UTF-8 become U+FFFD.  UNUSED
 * pieces are not supported; Gemma's vocabularies have none.  size -1: up to the first NUL.  Returns
 * how many ids the text has and writes the first max_ids of them; ids may be NULL when max_ids is
 * 0.  GEMMA2_ERR_SPACE where scratch is too small, GEMMA2_ERR_ARGUMENT where the text is too long
 * or the vocabulary lacks the BOS asked for. */
GEMMA2_API int64_t gemma2_encode(const gemma2_model *model, const char *text, int64_t size,
                                 unsigned flags, int32_t *ids, size_t max_ids,
                                 void *scratch, size_t scratch_bytes);

/* Bytes of a character that is not complete yet, between calls of gemma2_decode; start at {0}. */
typedef struct {
    uint8_t bytes[4];
    uint8_t n;
} gemma2_utf8;
/* One id to the text that it completes; -1 flushes what is held.  Returns the bytes written, maybe
 * 0, not terminated.  max_piece_bytes + 12 bytes of room always suffice. */
GEMMA2_API int gemma2_decode(const gemma2_model *model, gemma2_utf8 *hold, int32_t id,
                             char *text, size_t text_size);

/* SentencePiece's kinds of pieces, and MARKER. */
enum {
    GEMMA2_PIECE_NORMAL = 1,
    GEMMA2_PIECE_UNKNOWN = 2,
    GEMMA2_PIECE_CONTROL = 3, /* never comes from text */
    GEMMA2_PIECE_USER = 4,    /* matched whole, before anything else */
    GEMMA2_PIECE_UNUSED = 5,
    GEMMA2_PIECE_BYTE = 6,
    GEMMA2_PIECE_MARKER = 7   /* as USER, but never under GEMMA2_ENCODE_PLAIN */
};
/* The stored bytes of a piece, where a space is U+2581.  Its size and kind go to *size and *kind,
 * which may be NULL.  NULL for an id outside the vocabulary. */
GEMMA2_API const char *gemma2_piece(const gemma2_model *model, int32_t id, size_t *size,
                                    int *kind);
/* The id of the piece with these stored bytes, the lowest; GEMMA2_ERR_TOKEN where there is none.
 * size -1: up to the first NUL.  It looks through the whole vocabulary. */
GEMMA2_API int32_t gemma2_find_piece(const gemma2_model *model, const char *piece, int64_t size);
/* The bytes that the token adds to a text, which may be a part of a character: a space is a space,
 * a byte piece its byte.  Returns how many there are, 0 for pieces without text, as turn markers,
 * and writes the first `size` of them, not terminated. */
GEMMA2_API int64_t gemma2_piece_bytes(const gemma2_model *model, int32_t id, char *bytes,
                                      size_t size);

/* ---- Chat ----------------------------------------------------------------------- */

/* A conversation becomes ids by the checkpoint's own chat template, which the file holds taken
 * apart: the facts "chat.user.before", "chat.user.after" and so on.  For a file without them
 * gemma2_fact answers with Gemma 2's own turns, if the vocabulary has both turn markers.  System
 * text, for which Gemma 2's template has no place, begins its first user turn. */
enum { GEMMA2_ROLE_SYSTEM = 0, GEMMA2_ROLE_USER = 1, GEMMA2_ROLE_MODEL = 2 };
typedef struct {
    int32_t role;
    const char *text; /* never becomes a turn marker, whatever it says */
    int64_t size;     /* in bytes; -1: up to the first NUL */
} gemma2_message;

enum {
    GEMMA2_CHAT_CONTINUE = 1, /* the session ends with a reply, whose stop token was not evaluated:
                               * close that turn first; no BOS, no system text */
    GEMMA2_CHAT_GENERATE = 2  /* open the model's turn at the end */
};
/* Whether gemma2_encode_chat takes the messages: GEMMA2_OK, or its error with a sentence in err.
 * Without messages it says whether the template can be used at all. */
GEMMA2_API int gemma2_chat_check(const gemma2_model *model, const gemma2_message *messages,
                                 size_t n_messages, unsigned flags, char *err,
                                 size_t err_size);
/* Scratch that gemma2_encode_chat needs for these messages; 0 where they are too long, as for
 * gemma2_encode_scratch. */
GEMMA2_API size_t gemma2_chat_scratch(const gemma2_model *model,
                                      const gemma2_message *messages, size_t n_messages);
/* Messages to ids, counted like gemma2_encode.  After an optional system message first, user and
 * model alternate, beginning with the user; with GEMMA2_CHAT_GENERATE the user has the last word.
 * Texts are trimmed where the template trims them.  GEMMA2_ERR_CHAT where the order is another
 * one, the template has no place for system text, or no template can be used. */
GEMMA2_API int64_t gemma2_encode_chat(const gemma2_model *model,
                                      const gemma2_message *messages, size_t n_messages,
                                      unsigned flags, int32_t *ids, size_t max_ids,
                                      void *scratch, size_t scratch_bytes);

/* ---- Sampling ------------------------------------------------------------------- */

typedef struct {
    int32_t id;
    float bias; /* added to the logit; -INFINITY bans the token, NaN and +INFINITY are errors */
} gemma2_bias;

/* In the order they are applied, top_p and min_p together.  gemma2_sampler_init fills in
 * gemma_pytorch's defaults, named here.  Values out of range are GEMMA2_ERR_ARGUMENT. */
typedef struct {
    uint32_t struct_size;
    uint32_t n_bias;
    const gemma2_bias *bias;
    int32_t penalty_last;      /* how many last tokens of the session penalties look at; 64.  Cost
                                * grows with its square */
    float repetition_penalty;  /* divides positive, multiplies negative logits; above 0, at most
                                * 1e6; 1: off */
    float presence_penalty;    /* taken off once; -1e6..1e6; 0: off */
    float frequency_penalty;   /* taken off per occurrence; -1e6..1e6; 0: off */
    int32_t top_k;             /* 0 or more; 64; 0: all */
    float temperature;         /* 0..1e6; 1; 0: greedy */
    float top_p;               /* above 0, at most 1; 0.95; 1: all */
    float min_p;               /* relative to the best token; 0..1; 0: off */
    uint64_t rng;              /* state of PCG32 (XSH-RR 64/32, increment 1442695040888963407,
                                * seeded as by pcg32_srandom); one draw a token, none if greedy */
    const uint32_t *allow;     /* the mask of the tokens that may be drawn, as
                                * gemma2_matcher_allowed fills it; NULL: all */
} gemma2_sampler;
GEMMA2_API void gemma2_sampler_init(gemma2_sampler *sampler, uint64_t seed);

/* Draws an id from logits (V floats, left alone; -INFINITY bans a token).  Equal logits rank by
 * lower id.  The session lends its worker's scratch and, to the penalties, its history.
 * GEMMA2_ERR_ARGUMENT also when every token is banned or a bias or penalty makes a logit NaN or
 * +infinity, GEMMA2_ERR_TOKEN for a bias of an unknown id, GEMMA2_ERR_NONFINITE for logits that are
 * NaN or +infinity.  After an error the sampler is as it was. */
GEMMA2_API int32_t gemma2_sample(gemma2_session *session, gemma2_sampler *sampler,
                                 const float *logits);
/* Natural log-probability of id under logits (n floats, -INFINITY for a banned token), before
 * temperature and cuts, into *logprob. */
GEMMA2_API int gemma2_logprob(const float *logits, size_t n, int32_t id, float *logprob);
typedef struct {
    int32_t id;
    float logprob;
} gemma2_candidate;
/* The best of n logits, at most max of them, best first, equal logits by lower id, with the
 * log-probabilities of gemma2_logprob, without banned tokens.  Returns how many. */
GEMMA2_API int32_t gemma2_top_logprobs(const float *logits, size_t n, gemma2_candidate *top,
                                       size_t max);

/* ---- Grammars: what a reply may be ------------------------------------------------ */

/* Compiled from GBNF, the dialect of llama.cpp's grammars: rules name ::= ..., of which root is
 * the start; "text", [a-z] [^"\\], . for any character, (a | b), * + ? {m} {m,} {m,n}, # comments,
 * and tokens <[id]> <text> !<text>.  If a rule is defined twice, the last definition counts.  Never
 * changes, so any number of threads may use it.  The model must outlive it.  A grammar that is
 * refused leaves "line L, column C: ..." in err: one of over 4 MB, 2^20 instructions (about one for
 * each byte of text and for each repetition) or 250 parentheses deep, without a sentence, or with a
 * rule that can begin with itself.
 *
 *   gemma2_matcher_start(matcher, &state), sampler.allow = mask;
 *   for (...) {
 *       gemma2_matcher_allowed(matcher, &state, left, mask);
 *       id = gemma2_sample(session, &sampler, logits);
 *       gemma2_matcher_accept(matcher, &state, id);
 *   } */
typedef struct gemma2_grammar gemma2_grammar;
GEMMA2_API gemma2_grammar *gemma2_grammar_new(const gemma2_model *model, const char *text,
                                              int64_t size, char *err, size_t err_size);
GEMMA2_API void gemma2_grammar_free(gemma2_grammar *grammar); /* NULL is fine */

/* What was worked out about a grammar, at most 75 MB; most take less than 5.  For one thread at a
 * time, any number of replies.  The grammar must outlive it.  NULL: out of memory.  The first one
 * of a model sorts the vocabulary, which takes a fifth of a second. */
typedef struct gemma2_matcher gemma2_matcher;
GEMMA2_API gemma2_matcher *gemma2_matcher_new(const gemma2_grammar *grammar);
GEMMA2_API void gemma2_matcher_free(gemma2_matcher *matcher); /* NULL is fine */

/* Where a reply stands; may be copied.  A start, or a token of another copy, makes the matcher
 * forget states when half of its room is used.  GEMMA2_ERR_MISMATCH for a state that was forgotten,
 * and for one of another matcher.  GEMMA2_ERR_SPACE where it has no room for what was asked.  The
 * state stays.  After it, only gemma2_matcher_accept or a start makes room. */
typedef struct {
    uint32_t tag, set;
} gemma2_grammar_state;
GEMMA2_API int gemma2_matcher_start(gemma2_matcher *matcher, gemma2_grammar_state *state);

/* Fills the mask: bit id % 32 of mask[id / 32] is 1 where that token may come next, for all of V.
 * Stop tokens may where the reply may end; other tokens without text, as turn markers, only where
 * the grammar names them.  left, -1 for any number: how many tokens may still come.  With
 * left >= gemma2_matcher_shortest only those are allowed after which the reply can be finished. */
GEMMA2_API int gemma2_matcher_allowed(gemma2_matcher *matcher, const gemma2_grammar_state *state,
                                      int64_t left, uint32_t *mask);
/* Moves the state behind the token.  GEMMA2_ERR_TOKEN, and the state stays, where the grammar does
 * not take it or the head has not kept it. */
GEMMA2_API int gemma2_matcher_accept(gemma2_matcher *matcher, gemma2_grammar_state *state,
                                     int32_t id);
/* How many tokens finish the reply, 0 where it may end: the fewest where a short search finds
 * them, else those of the text with the fewest bytes. */
GEMMA2_API int64_t gemma2_matcher_shortest(gemma2_matcher *matcher,
                                           const gemma2_grammar_state *state);

/* ---- Speculation: several tokens a pass, and the same bits ------------------------ */

/* Guesses what follows the n >= 1 ids of history: writes at most `most` ids and returns how many.
 * A wrong guess costs time, nothing else.  It may not use the session. */
typedef int32_t gemma2_propose(void *context, const int32_t *history, int32_t n, int32_t *ids,
                               int32_t most);

/* gemma2_ahead_params_init sets struct_size, lookup to 1, and zeros. */
typedef struct {
    uint32_t struct_size;
    int32_t n_drafts;  /* guesses a pass, 1..15; 0: as many as pay, by what was measured */
    int32_t n_context; /* the longest history that lookup reads; 0: the trained context */
    int32_t lookup;    /* 1: guess what followed the last tokens earlier in the history */
    gemma2_session *draft;   /* a second model with the same pieces guesses; or NULL.  It keeps
                              * this session in step, and nobody else may use it */
    gemma2_propose *propose; /* your own guesses in place of a draft's; or NULL */
    void *context;           /* for propose */
} gemma2_ahead_params;
GEMMA2_API void gemma2_ahead_params_init(gemma2_ahead_params *params);

/* What guesses need and what was learnt about them; for sessions of one model, in turn.  params
 * may be NULL.  One allocation of gemma2_ahead_bytes (0: params out of range), mostly a row of
 * logits for each guess.  The draft's session must outlive it. */
typedef struct gemma2_ahead gemma2_ahead;
GEMMA2_API uint64_t gemma2_ahead_bytes(const gemma2_model *model,
                                       const gemma2_ahead_params *params);
GEMMA2_API gemma2_ahead *gemma2_ahead_new(const gemma2_model *model,
                                          const gemma2_ahead_params *params, char *err,
                                          size_t err_size);
GEMMA2_API void gemma2_ahead_free(gemma2_ahead *ahead); /* NULL is fine */

/* gemma2_eval(session, &id, 1, logits) with the same bits, faster where guesses come true: a
 * pass may also evaluate guesses behind id, and a later call that asks for one needs no pass.
 * The session holds only what was asked for.  Any other call that moves it drops the guesses.
 * With a session of n_batch 1 nothing is guessed. */
GEMMA2_API int gemma2_eval_ahead(gemma2_session *session, gemma2_ahead *ahead, int32_t id,
                                 float *logits);

/* Since gemma2_ahead_new: passes made, guesses evaluated, guesses that were asked for. */
typedef struct {
    uint64_t passes, drafted, accepted;
} gemma2_ahead_counts;
GEMMA2_API int gemma2_ahead_count(const gemma2_ahead *ahead, gemma2_ahead_counts *counts);

#ifdef __cplusplus
}
#endif
#endif
