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
 * RULES THAT HOLD FOR EVERY CALL
 *
 * Ownership.  gemma2_open* gives a model that gemma2_close frees; gemma2_session_new
 * gives a session that gemma2_session_free frees.  Buffers you pass in stay yours and
 * are not kept, except the bytes of gemma2_open_memory and of gemma2_session_place,
 * which must outlive the model and the session.  Pointers you get back live as long as
 * the model or session they came from.  A model must outlive its sessions.
 *
 * Errors.  Opening returns NULL and writes one sentence to err (always terminated; err
 * may be NULL).  Everything else returns a negative GEMMA2_ERR_ code.  A call that fails
 * leaves the session as it was, unless its comment says otherwise.  A handle or pointer
 * that is NULL where the comment does not allow it is GEMMA2_ERR_ARGUMENT, or NULL or 0
 * from functions that return pointers, answers of yes and no, or sizes.  The library never
 * exits, aborts, prints, installs signal handlers or keeps global state, and calls back only
 * what gemma2_set_hook was given; what
 * the OpenMP runtime does is its own affair.  The one environment variable it reads is
 * GEMMA2_ISA, at open (see gemma2_open).  A call takes up to 200 KB of stack, also in
 * OpenMP's threads (their default, or OMP_STACKSIZE, is more).
 *
 * Threads.  A model never changes after it is opened: any number of threads may use it.
 * A session belongs to one thread at a time; gemma2_cancel alone may be called from any
 * thread, and from a signal handler.  With n_threads = 1 the OpenMP runtime is never
 * entered.  With more, OpenMP keeps a pool of threads between calls, one pool for each
 * calling thread.  Inside a host's own parallel region OpenMP may grant fewer threads than
 * asked for, often one; results do not depend on the number.  If the host runs more threads
 * than there are processors, let its sessions have n_threads = 1 or set
 * OMP_WAIT_POLICY=passive, because OpenMP's threads spin while they wait.
 *
 * Processes.  After fork() the child may use models and sessions, each process its own copy
 * of the session, as long as n_threads is 1: threads do not survive a fork, and GNU's
 * OpenMP then waits for its own forever.  A session of more threads can be moved to one of a
 * single thread with gemma2_session_copy.
 *
 * Signals and floating point.  A mapped file that someone cuts short raises SIGBUS where it
 * is read (read_into_memory is proof against that).  Rounding mode, flush-to-zero and trap
 * masks of the calling thread are set for the length of a call and then put back.
 *
 * Versions.  MAJOR changes when programs must change, MINOR when something is added, PATCH
 * when something is mended.  Structs with struct_size, and gemma2_config, may grow at their
 * ends; the others never change within a major version.  The struct_size of an older version
 * leaves the rest at its defaults; that of a newer one (up to 4096) is accepted if all that
 * lies beyond is zero; any other is GEMMA2_ERR_ARGUMENT: a request is never overlooked.
 *
 * Numbers.  Positions and ids start at 0.  Logits are float, after the final soft-cap.
 * The same calls give the same bits for any number of threads and, but for
 * gemma2_prefill, for any way of cutting tokens into calls and rows into batches. */
#ifndef GEMMA2_H
#define GEMMA2_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GEMMA2_VERSION_MAJOR 0
#define GEMMA2_VERSION_MINOR 1
#define GEMMA2_VERSION_PATCH 0
#define GEMMA2_VERSION_STRING "0.1.0"
#define GEMMA2_VERSION_NUMBER \
    (GEMMA2_VERSION_MAJOR * 10000 + GEMMA2_VERSION_MINOR * 100 + GEMMA2_VERSION_PATCH)

#ifndef GEMMA2_API
#if defined(__GNUC__) && !defined(_WIN32)
#define GEMMA2_API __attribute__((visibility("default")))
#else
#define GEMMA2_API
#endif
#endif

/* Of the library at run time: "MAJOR.MINOR.PATCH", and GEMMA2_VERSION_NUMBER. */
GEMMA2_API const char *gemma2_version(void);
GEMMA2_API int gemma2_version_number(void);

enum {
    GEMMA2_OK = 0,
    GEMMA2_ERR_ARGUMENT = -1,  /* a missing buffer, a count or value out of its range */
    GEMMA2_ERR_MEMORY = -2,    /* memory could not be had (for callers: no call returns it) */
    GEMMA2_ERR_CONTEXT = -3,   /* more tokens than the context has room for */
    GEMMA2_ERR_TOKEN = -4,     /* a token id outside the vocabulary */
    GEMMA2_ERR_REWIND = -5,    /* the window's cache no longer holds that position */
    GEMMA2_ERR_NONFINITE = -6, /* logits hold NaN or infinity */
    GEMMA2_ERR_SPACE = -7,     /* the caller's buffer is too small */
    GEMMA2_ERR_CORRUPT = -8,   /* the contents are not what header or digest say */
    GEMMA2_ERR_CANCELLED = -9, /* gemma2_cancel */
    GEMMA2_ERR_MISMATCH = -10, /* a session of another model, window, cache type or version */
    GEMMA2_ERR_CHAT = -11,     /* the chat template has no form for these messages */
    GEMMA2_ERR_FOREIGN = -12   /* not a saved session at all */
};
/* One sentence for a code; never NULL. */
GEMMA2_API const char *gemma2_error_string(int code);

/* ---- Model ---------------------------------------------------------------------- */

typedef struct gemma2_model gemma2_model;

/* How to open.  gemma2_open_params_init fills in the defaults and struct_size. */
typedef struct {
    uint32_t struct_size;
    uint32_t read_into_memory; /* 0: map the file (default).  1: read it into anonymous
                                * memory, huge pages asked for: the last tenth of decode
                                * speed for the price of load time and memory */
    uint32_t exact_prefill;    /* 1: gemma2_prefill returns the bits of gemma2_eval; it
                                * uses no matrix units, bf16 arithmetic or fused sums */
} gemma2_open_params;
GEMMA2_API void gemma2_open_params_init(gemma2_open_params *params);

/* Opens a file made by export.py.  Checks header, directory, identity and tokenizer, and
 * reads no weights.  params may be NULL.  A mapped file must not be changed or cut short
 * while it is open (the system would signal the process); read_into_memory is proof
 * against that.  The instruction set is the best this CPU has; in the environment
 * GEMMA2_ISA=scalar|avx2|avxvnni|avx512|avx512bf16|amx|neon|dotprod|i8mm forces one, and a
 * name that is unknown or that the CPU lacks fails the call.
 * On Linux and a CPU with AMX the process asks the kernel for the use of its tile registers,
 * unless exact_prefill is set or all weights are f32; it keeps that permission, which makes
 * the signal frames of threads that use them 8 KB larger and sigaltstack refuse stacks too
 * small for that.  If the kernel declines, prefill does without. */
GEMMA2_API gemma2_model *gemma2_open(const char *path, const gemma2_open_params *params,
                                     char *err, size_t err_size);
/* The same for a file image of size bytes at data, aligned to 64, which the caller keeps
 * unchanged until after gemma2_close.  read_into_memory must be 0. */
GEMMA2_API gemma2_model *gemma2_open_memory(const void *data, size_t size,
                                            const gemma2_open_params *params, char *err,
                                            size_t err_size);
GEMMA2_API void gemma2_close(gemma2_model *model); /* NULL is fine */

/* Facts of the model, read-only, owned by it.  New members come at the end. */
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
    const char *isa; /* the row of kernels in use, "avx512" */
} gemma2_config;
GEMMA2_API const gemma2_config *gemma2_get_config(const gemma2_model *model);
GEMMA2_API int gemma2_is_stop(const gemma2_model *model, int32_t id); /* 1 or 0 */

/* The value of a key of the file's facts ("name", "source", "license", "chat_template",
 * "export"), UTF-8, not terminated, its size in *size; NULL, size 0, where absent. */
GEMMA2_API const char *gemma2_fact(const gemma2_model *model, const char *key, size_t *size);

/* One entry of the file's directory. */
typedef struct {
    const char *role;   /* "embedding", "q", ...; "optional" for one this version skips */
    const char *type;   /* "f32", "bf16", "q8", "q6", "q4" or "bytes" */
    int32_t layer;      /* -1 where it belongs to no layer */
    uint64_t rows, cols, bytes;
} gemma2_section;
/* Fills *out with entry i.  Returns 1, or 0 where the directory has no entry i. */
GEMMA2_API int gemma2_get_section(const gemma2_model *model, size_t i, gemma2_section *out);
/* Reads all of entry i: digest, finite values, zero padding.  Returns 1 when it is sound,
 * 0 where there is no entry i, GEMMA2_ERR_CORRUPT with a sentence in err. */
GEMMA2_API int gemma2_check(const gemma2_model *model, size_t i, char *err, size_t err_size);

/* ---- Session -------------------------------------------------------------------- */

typedef struct gemma2_session gemma2_session;

enum { GEMMA2_CACHE_AUTO = 0, GEMMA2_CACHE_F32 = 1, GEMMA2_CACHE_F16 = 2 };

/* gemma2_session_params_init fills in zeros, which mean the defaults, and struct_size. */
typedef struct {
    uint32_t struct_size;
    int32_t n_context;  /* positions, 1 or more; 0: as trained.  Above: allowed, untrained */
    int32_t n_batch;    /* rows of one pass, 1..4096; 0: 256, or the context if shorter */
    int32_t n_threads;  /* 1..1024; 0: one a processor */
    int32_t window;     /* local layers' window, 1..W; 0: W */
    int32_t cache_type; /* GEMMA2_CACHE_*; auto: f32 for all-f32 weights, else f16 */
} gemma2_session_params;
GEMMA2_API void gemma2_session_params_init(gemma2_session_params *params);

/* How many threads a session with that n_threads runs on: for 0 the default, and 1 for any
 * number where the library was built without OpenMP. */
GEMMA2_API int32_t gemma2_threads(int32_t n_threads);

/* Bytes that a session with these params takes.  Returns GEMMA2_OK, or
 * GEMMA2_ERR_ARGUMENT where the params or the sizes they lead to are out of range. */
typedef struct {
    uint64_t weights; /* of the file, mapped, shared by all sessions */
    uint64_t cache;   /* keys and values; touched only as positions fill up */
    uint64_t scratch; /* activations, sampling, ids */
    uint64_t total;   /* cache + scratch: what gemma2_session_place needs */
} gemma2_plan;
GEMMA2_API int gemma2_session_plan(const gemma2_model *model,
                                   const gemma2_session_params *params, gemma2_plan *plan);

/* A session at position 0.  params may be NULL.  One allocation; none follow it. */
GEMMA2_API gemma2_session *gemma2_session_new(const gemma2_model *model,
                                              const gemma2_session_params *params,
                                              char *err, size_t err_size);
/* The same in memory of the caller: plan.total bytes, aligned to 64. */
GEMMA2_API gemma2_session *gemma2_session_place(const gemma2_model *model,
                                                const gemma2_session_params *params,
                                                void *memory, size_t size,
                                                char *err, size_t err_size);
GEMMA2_API void gemma2_session_free(gemma2_session *session); /* NULL is fine */

GEMMA2_API int32_t gemma2_position(const gemma2_session *session);  /* tokens held */
GEMMA2_API int32_t gemma2_context(const gemma2_session *session);   /* room in all */
GEMMA2_API const int32_t *gemma2_history(const gemma2_session *session); /* ids of those held */

/* Appends n >= 1 tokens; logits, V floats or NULL, receives those after the last one.
 * Prompts go through here: faster than gemma2_eval, because inputs of products may be
 * rounded to bf16 and sums fused, as the instruction set has it.  So the bits depend on
 * the CPU (not on threads, batches or cuts), but are no further from those of f32 weights
 * and f32 arithmetic: on the demo model q8's divergence from them, 0.00016 nats a token
 * for gemma2_eval, grows by at most 5 %; bf16 weights stay below a fifth of it.  f32
 * weights, and attention over an f32 cache, stay exact.  Long prompts may be fed in
 * pieces, to show progress or to be cancelled.  GEMMA2_ERR_CONTEXT when they do not fit,
 * before any is evaluated. */
GEMMA2_API int gemma2_prefill(gemma2_session *session, const int32_t *ids, size_t n,
                              float *logits);
/* The same with the exact arithmetic of single steps, whatever n is. */
GEMMA2_API int gemma2_eval(gemma2_session *session, const int32_t *ids, size_t n,
                           float *logits);

/* One token of one session in a shared pass.  Rows of the same session follow one
 * another in order.  Sessions must be of one model; at most n_batch rows of each session,
 * and in all at most the n_batch of the first row's, whose scratch and threads are used. */
typedef struct {
    gemma2_session *session;
    int32_t id;
    float *logits; /* V floats, or NULL where not wanted */
} gemma2_row;
GEMMA2_API int gemma2_eval_rows(const gemma2_row *rows, size_t n_rows);

/* Appends n >= 1 tokens and writes the natural log-probability of each as predicted by
 * those before it: logprobs[i] belongs to ids[i + 1] for i < n - 1, and logprobs[n - 1]
 * to next, or is left alone when next is -1.  Exact arithmetic, no logits buffer.  On
 * GEMMA2_ERR_NONFINITE the tokens have been appended. */
GEMMA2_API int gemma2_score(gemma2_session *session, const int32_t *ids, size_t n,
                            int32_t next, float *logprobs);

/* on = 1: what evaluates this session, now or later, ends after the layer it is at with
 * GEMMA2_ERR_CANCELLED; on = 0 withdraws that.  A call that is past its last layer still
 * succeeds, after the output head (gemma2_score asks again all along the head).  Whatever
 * passes of n_batch rows were complete stay, and gemma2_position tells; the one that was
 * cut counts as held and then taken back by gemma2_rewind.  A pass shared by several
 * sessions ends for all.  May be called from any thread and from a signal handler, while
 * the session exists. */
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
/* Calls hook with context after each step of every pass that this session leads (it is the
 * only one, or that of the first row).  The thread that evaluates makes the call; the hook
 * may change data, which the following steps then read, and may not use the session but for
 * gemma2_cancel and what only asks.  hook NULL: no calls, and no cost. */
GEMMA2_API int gemma2_set_hook(gemma2_session *session, gemma2_hook *hook, void *context);

/* What the products of a model read, in order of use: entry i is the input of "q" (and of k
 * and v), "o", "gate" (and up) and "down" of each layer, at last that of "head". */
typedef struct {
    const char *role;
    int32_t layer;  /* -1 for the head */
    uint32_t cols;  /* values of one input */
    uint64_t first; /* columns of all entries before it */
} gemma2_input;
/* Returns 1, or 0 where there is no entry i. */
GEMMA2_API int gemma2_get_input(const gemma2_model *model, size_t i, gemma2_input *out);

/* Appends n >= 1 tokens as gemma2_eval does and adds to sums, which the caller set to 0, how
 * large the inputs x of every product were: for entry e, sums[block * e.first + c] += x[c]^2
 * over the tokens.  That is block 1; with a block of 32, 64, 128 or 256 inputs that many
 * rows, row r adding x[c] * x[c - c % block + r] (nothing where that is past the end):
 * sums[block * e.first + r * e.cols + c].  Sums are in double, tokens in order, the same
 * bits for any number of threads and any way of cutting tokens into calls.  After
 * GEMMA2_ERR_CANCELLED they hold part of a pass and are of no use. */
GEMMA2_API int gemma2_importance(gemma2_session *session, const int32_t *ids, size_t n,
                                 uint32_t block, double *sums);

/* Goes back to the first n tokens, exactly.  Possible to 0 always; to anywhere while at most
 * window + n_batch tokens were ever held since position 0; after that for n_batch tokens
 * back from the most ever held, and GEMMA2_ERR_REWIND some tokens beyond (then rewind to 0
 * and evaluate the ids again).  A session that was copied or restored goes back no further
 * than the one it continues. */
GEMMA2_API int gemma2_rewind(gemma2_session *session, int32_t n);

/* Makes `to` continue where `from` stands, with the same bits; what it held is gone.  So a
 * session forks: a new one, then this.  Context, batch, threads and memory may differ.
 * GEMMA2_ERR_MISMATCH where model, window or cache type do, GEMMA2_ERR_CONTEXT where `to`
 * has too little room. */
GEMMA2_API int gemma2_session_copy(gemma2_session *to, const gemma2_session *from);

/* Writes the session to a buffer: ids, keys and values, the model's identity and a digest.
 * Any instruction set, context, batch or number of threads restores it.  Returns the bytes it
 * takes; buffer NULL only asks.  GEMMA2_ERR_SPACE when size is too small.  The buffer may be
 * a mapped file. */
GEMMA2_API int64_t gemma2_session_save(const gemma2_session *session, void *buffer, size_t size);
/* Makes the session continue where the saved one stood, with the same bits; the next call
 * evaluates a token, for logits are not saved.  Other bytes than a saved session
 * are GEMMA2_ERR_FOREIGN, a damaged one is GEMMA2_ERR_CORRUPT; GEMMA2_ERR_MISMATCH and GEMMA2_ERR_CONTEXT as for a copy.  After any
 * of them the session is as it was. */
GEMMA2_API int gemma2_session_restore(gemma2_session *session, const void *data, size_t size);

/* ---- Text ----------------------------------------------------------------------- */

enum {
    GEMMA2_ENCODE_BOS = 1,  /* put BOS first */
    GEMMA2_ENCODE_PLAIN = 2 /* text of strangers: never a control piece (turn markers,
                             * mask, unusedN); they are spelled out instead */
};
/* Scratch that encoding text of that many bytes needs; 0 where it is too long: above 2^28
 * bytes, and in a 32-bit program above 69 MB. */
GEMMA2_API size_t gemma2_encode_scratch(size_t text_bytes);
/* Text to ids, exactly as SentencePiece does for vocabularies without UNUSED pieces, as
 * Gemma's are (bad UTF-8 becomes U+FFFD).  size -1: the text ends at its first NUL.
 * Returns how many ids the text has and writes the first max_ids of them (ids may be NULL
 * when max_ids is 0).  GEMMA2_ERR_SPACE where scratch is too small, GEMMA2_ERR_ARGUMENT
 * where the text is too long or the vocabulary lacks the BOS asked for. */
GEMMA2_API int64_t gemma2_encode(const gemma2_model *model, const char *text, int64_t size,
                                 unsigned flags, int32_t *ids, size_t max_ids,
                                 void *scratch, size_t scratch_bytes);

/* Bytes of a character still incomplete between calls of gemma2_decode with one model;
 * start at {0}. */
typedef struct {
    uint8_t bytes[4];
    uint8_t n;
} gemma2_utf8;
/* One id to the text it completes.  Returns the bytes written (not terminated), maybe 0.
 * max_piece_bytes + 12 bytes of room always suffice.  id -1 flushes what is held. */
GEMMA2_API int gemma2_decode(const gemma2_model *model, gemma2_utf8 *hold, int32_t id,
                             char *text, size_t text_size);

/* SentencePiece's kinds, and one more that export.py tells from USER. */
enum {
    GEMMA2_PIECE_NORMAL = 1,
    GEMMA2_PIECE_UNKNOWN = 2,
    GEMMA2_PIECE_CONTROL = 3, /* never comes from text */
    GEMMA2_PIECE_USER = 4,    /* matched whole, before anything else */
    GEMMA2_PIECE_UNUSED = 5,
    GEMMA2_PIECE_BYTE = 6,
    GEMMA2_PIECE_MARKER = 7   /* as USER, but never under GEMMA2_ENCODE_PLAIN */
};
/* The stored bytes of a piece (a space is U+2581), size in *size and kind in *kind (both
 * may be NULL); NULL for an id outside the vocabulary. */
GEMMA2_API const char *gemma2_piece(const gemma2_model *model, int32_t id, size_t *size,
                                    int *kind);

/* ---- Chat ----------------------------------------------------------------------- */

/* A conversation becomes ids by the checkpoint's own chat template.  export.py takes it apart
 * into the facts "chat.user.before", "chat.user.after" and so on.  For a file without them
 * gemma2_fact answers with Gemma 2's own turns, if the vocabulary has both turn markers. */
enum { GEMMA2_ROLE_SYSTEM = 0, GEMMA2_ROLE_USER = 1, GEMMA2_ROLE_MODEL = 2 };
typedef struct {
    int32_t role;
    const char *text; /* never becomes a turn marker, whatever it says */
    int64_t size;     /* in bytes; -1: up to the first NUL */
} gemma2_message;

enum {
    GEMMA2_CHAT_CONTINUE = 1, /* the session ends with a reply, whose stop token was not
                               * evaluated: close that turn first; no BOS, no system text */
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
/* Messages to ids, counted like gemma2_encode.  After an optional system message first, user
 * and model alternate, beginning with the user; with GEMMA2_CHAT_GENERATE the user has the last
 * word.  Texts are trimmed where the template trims them.  GEMMA2_ERR_CHAT where the order is
 * another one, the template has no place for system text, or no template can be used. */
GEMMA2_API int64_t gemma2_encode_chat(const gemma2_model *model,
                                      const gemma2_message *messages, size_t n_messages,
                                      unsigned flags, int32_t *ids, size_t max_ids,
                                      void *scratch, size_t scratch_bytes);

/* ---- Sampling ------------------------------------------------------------------- */

typedef struct {
    int32_t id;
    float bias; /* added to the logit; -INFINITY bans the token, NaN and +INFINITY are errors */
} gemma2_bias;

/* In the order they are applied.  gemma2_sampler_init fills in gemma_pytorch's defaults.
 * What is out of its range, NaN included, is GEMMA2_ERR_ARGUMENT. */
typedef struct {
    uint32_t struct_size;
    uint32_t n_bias;
    const gemma2_bias *bias;
    int32_t penalty_last;      /* last tokens of the session that penalties look at, 0 or
                                * more; 64.  Takes the square of its time */
    float repetition_penalty;  /* divides positive, multiplies negative logits; above 0, at
                                * most 1e6; 1 is off */
    float presence_penalty;    /* taken off once; -1e6..1e6; 0 is off */
    float frequency_penalty;   /* taken off per occurrence; -1e6..1e6; 0 is off */
    float temperature;         /* 0..1e6; 1; 0: greedy */
    int32_t top_k;             /* 0 or more; 64; 0: all */
    float top_p;               /* above 0, at most 1; 0.95; 1: all */
    float min_p;               /* relative to the best token; 0..1; 0 is off */
    uint64_t rng;              /* state of PCG32 (XSH-RR 64/32, increment 1442695040888963407,
                                * seeded as pcg32_srandom does): one draw a token, none
                                * when greedy */
} gemma2_sampler;
GEMMA2_API void gemma2_sampler_init(gemma2_sampler *sampler, uint64_t seed);

/* Draws an id from logits (V floats, left alone).  Equal logits rank by lower id.  The
 * session lends its scratch and, for the penalties, its history.  Negative on error:
 * GEMMA2_ERR_ARGUMENT also when every token is banned or a bias or penalty makes a logit NaN
 * or +infinity, GEMMA2_ERR_TOKEN for a bias of an unknown id.  The sampler is then as it was. */
GEMMA2_API int32_t gemma2_sample(gemma2_session *session, gemma2_sampler *sampler,
                                 const float *logits);
/* Natural log-probability of id under logits (n floats), before temperature and cuts,
 * into *logprob. */
GEMMA2_API int gemma2_logprob(const float *logits, size_t n, int32_t id, float *logprob);

#ifdef __cplusplus
}
#endif
#endif
