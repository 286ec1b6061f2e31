/* gemma2.c - Gemma 2 inference in one file.  See gemma2.h for how to use it.
 *
 * MAP.  grep -n '^ \* [1-9A]\. \|^/\* ----' gemma2.c lists sections and parts with their lines,
 * grep -n -A40 '^[^ ].*\bshare(' gemma2.c shows a function.
 *   1 Gemma 2         the facts of 2B, 9B and 27B; the model in plain loops: plain_forward
 *   2 The weight file the byte table (normative), and how numbers lie in it: value_of
 *   3 Kernels         the specification of every sum, in plain C: struct kernels
 *   4 The pass        sharing of work: share; memory and cache: place_all; products: multiply;
 *                     attention, feed_forward, forward, head; the whole: evaluate
 *   5 Tokenizer       SentencePiece BPE, both ways: encode_text; chat: encode_messages
 *   6 Sampler         penalties, top-k, temperature, top-p, min-p, PCG32: sample;
 *                     grammars: read_grammar; masks: fill_mask
 *   7 Speculation     guesses of the next tokens, verified several a pass: evaluate_ahead
 *   8 Public API      in the order of gemma2.h
 *   9 Back rooms      files, SHA-256, hostile headers: make_model; saved sessions, importance
 *   A Appendix        section 3 again, faster: all_kernels says which CPU gets which kernels
 * You can stop at the appendix: it makes section 3 faster, and prompts on some CPUs less exact.
 *
 * NOTATION (the Gemma 2 report, arXiv 2408.00118, and google-deepmind/gemma)
 *   T tokens of a pass   D model width   N query heads   K key/value heads   H head_dim
 *   F ffn width   V vocabulary   V' ids that the head has rows for, mostly all   L layers
 *   W window   G = N/K query heads a kv head
 *   B most tokens of a pass (n_batch)   R slots of a layer's cache   H' H rounded up to 16
 *   A row of a pass is one token of one session; a row of a matrix is one of its outputs.
 *   Arrays are written with their shape, last index fastest: x[T][D].
 *
 * ONE LAYER (google/gemma_pytorch, gemma/model.py, Gemma2DecoderLayer)
 *
 *   x[T][D] ---+--> attn_norm --+--> q[T][N*H] --> RoPE --+--> attention --> o --> post_attn_norm
 *              |                +--> k[T][K*H] --> RoPE --+    [T][N*H]                  |
 *              |                +--> v[T][K*H] -----------+    local: W newest keys      |
 *              |                                               global: all keys          |
 *              +---------------------------(+)-------------------------------------------+
 *                                           |
 *              +----------------------------+
 *              +--> ffn_norm --+--> gate[T][F] --> gelu --(*)--> down[T][D] --> post_ffn_norm
 *              |               +--> up[T][F] --------------+                           |
 *              +---------------------------(+)----------------------------------------+
 *                                           |
 *                                        x[T][D]
 *
 *   x starts as embedding[id] * sqrt(D); after L layers final_norm, then the embedding
 *   again as output head, then logits = 30 tanh(logits / 30).
 *
 * WAYS: who calls whom, in order
 *   a token    gemma2_eval (exact class) or gemma2_prefill (matrix class) -> run_ids -> evaluate
 *              -> run_team -> run_pass, on every thread -> forward, then head.  gemma2_eval_rows
 *              comes to evaluate by judge_rows and run_rows, gemma2_eval_ahead by evaluate_ahead.
 *   a layer    forward -> attention, then feed_forward; both are made of prepare, multiply and
 *              leave_task.  In the last layer only rows that want logits go on: keep_wanted.
 *              The plain model: plain_forward -> plain_attention, plain_feed_forward.
 *   a product  prepare -> prepare_task: norm, and inputs rounded to int8 or bf16.  multiply ->
 *              product_task -> multiply_pairs (few rows: -> multiply_tile) -> multiply_in_class
 *              -> matrix->bf16_panel, or multiply_tiles: isa->int8_tile, one tile and 16 rows of
 *              the pass at a time; in passes of more than tile_rows isa->int8_panel, two tiles
 *              and 256 rows; f32 and bf16: isa->add_lines.
 *   q3         in plain C: int8_tile -> unpack_group -> value_of (q4 is a case of it) -> value_q3,
 *              scale_of; add_product.  With AVX2: int8_tile_avx2 -> tile_by_type -> tile_by_rows
 *              -> tile_avx2: operands_avx2 -> operands_q3_avx2 unpack, group_sum_avx2 -> dot_avx2
 *              multiply.  More rows: int8_panel_avx2 -> panel_by_type.  The other types and CPUs
 *              differ in these names' endings.
 *   a format   what a new one needs is listed in section 2: grep 'A new quantised format'.
 *   a CPU      select_kernels: the first of all_kernels that is available, or GEMMA2_ISA's;
 *              choose_matrix: whether prompts use its matrix class.
 *   the cache  place_cache sets R; store_head writes key and value to slot_of: position % R.
 *              query_of applies the window.  attend_rows -> cut_attention, attend_task ->
 *              attend_gathered -> attend -> attend_block -> score_keys, weigh (soft-cap),
 *              mix_values, merge_partial.  Keys become floats in isa->add_lines -> line_number,
 *              with AVX2 line_avx2.  Prompts in the matrix class: matrix_attention, pack_keys.
 *   a task     share(me, n, task, context): each thread of the team draws a number below n from
 *              team->drawn and calls task(context, number), until all are done: end_phase.
 *   logits     head -> multiply -> product_task (final soft-cap) -> output: straight into
 *              row->logits, which is the caller's; with V' < V spread_logits puts them where they
 *              belong.  Log-probabilities without logits: score_rows.
 *   a mask     a bit for each token, 1: it may come next.  gemma2_matcher_allowed -> fill_mask ->
 *              walk_trees -> take_token, which leaves out tokens after which the reply could not
 *              end in time: tokens_of.  The caller puts it into sampler.allow: gemma2_sample ->
 *              sample -> adjust_logits (penalties), keep_top, draw (temperature, then top-p and
 *              min-p); no token left: GEMMA2_ERR_ARGUMENT.  gemma2_matcher_accept -> after_token.
 *   a draft    gemma2_eval_ahead -> evaluate_ahead -> make_guesses (how many: choose_drafts) ->
 *              gemma2_eval_rows, then position goes back; gemma2_eval_ahead moves it over the
 *              drafts that were right.  The slot of a wrong one is overwritten.
 *   a text     gemma2_encode -> normalise -> encode_text -> merge_symbols -> emit_symbol: a piece,
 *              or else its bytes, or else unk (byte fallback).  Back: gemma2_decode ->
 *              release_bytes.  A chat: encode_messages -> add_part, add_message.
 *   a file     gemma2_open -> file_open; make_model -> read_header (identity), read_directory ->
 *              place_tensor.  Weights are verified by gemma2_check alone.
 *
 * WHERE
 *   exp, tanh, cos    exp_f32, tanh_f32, cos_sin     many sessions    judge_rows, run_rows
 *   int8 inputs       quantise_group                 how many threads default_threads
 *   RoPE              rotate; angles: embed_task     team or alone    next_way, useful_threads
 *   values not finite store_head, weigh, sample      to cancel        gemma2_cancel, ask_task
 *   memory            place_all, place_scratch       to go back       gemma2_rewind, s->oldest
 *   matrix class      choose_matrix, in_matrix       a saved session  save_session, check_saved
 *
 * SAME BITS.  Every sum below has one stated order.  In products of weights and in the sums
 * over keys and values each product rounds once together with the sum, everywhere else before
 * it is added; exp and tanh are this file's own.  The appendix repeats the same roundings, so
 * all instruction sets, thread counts and batch sizes give the same bits: the exact class.  The one
 * exception is the matrix class (struct matrix_kernels), which gemma2_prefill uses where a CPU has
 * units for bf16.
 * Equal bits need a compiler that does not contract a*b+c (-ffp-contract=off; the pragmas below
 * stand in for a missing flag, not for a contrary one), does not reorder (no -ffast-math) and
 * computes floats as floats (no x87).  A build that breaks this does not compile, or opens no
 * model. */

#if (!defined(__GNUC__) && !defined(__clang__)) || defined(__cplusplus)
#error "gemma2.c is written in GNU C11: compile it as C, with gcc or clang"
#endif
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
    defined(__NO_SIGNED_ZEROS__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || \
    (defined(__GCC_IEC_559) && !__GCC_IEC_559) /* what no macro shows: computes_exactly() */
#error "gemma2.c promises equal bits everywhere: build it without -ffast-math or parts of it"
#endif
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#if __clang_major__ >= 12
#pragma clang fp reassociate(off) /* for a host that includes this file under its own pragma */
#endif
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off") /* for builds that forget the flag */
#pragma GCC optimize("no-trapping-math") /* no value changes; comparisons become vectors */
#endif
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* madvise, MAP_ANONYMOUS */
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64 /* so that 32-bit programs can say that a file is too large */
#endif
#include "gemma2.h"

#include <errno.h>
#include <fenv.h>
#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#include <fcntl.h>
#include <sys/stat.h>
#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <io.h>
#include <share.h>
#include <windows.h>
#else
#include <unistd.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#define HAVE_MMAP 1
#include <sched.h>
#include <sys/mman.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_X86 1
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__aarch64__) && defined(__ARM_NEON) && defined(__GNUC__) && \
    __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define HAVE_NEON 1
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

#if FLT_EVAL_METHOD != 0 && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ /* others open nothing */
#error "gemma2.c needs floats computed as floats: on 32-bit x86 add -msse2 -mfpmath=sse"
#endif

/* gcc for Windows keeps 32- and 64-byte values on a stack aligned to 16 and moves them as if
 * it were not (gcc bug 54412).  Moves that take any address are as fast. */
#if defined(_WIN32) && defined(HAVE_X86) && !defined(__clang__)
#define ANY_ADDRESS(aligned, unaligned) \
    __asm__(".macro " aligned " operands:vararg\n\t" unaligned " \\operands\n.endm");
ANY_ADDRESS("vmovaps", "vmovups")
ANY_ADDRESS("vmovapd", "vmovupd")
ANY_ADDRESS("vmovdqa", "vmovdqu")
ANY_ADDRESS("vmovdqa32", "vmovdqu32")
ANY_ADDRESS("vmovdqa64", "vmovdqu64")
#endif

/* AVX-VNNI came to assemblers with these compilers.  AMX needs Linux's permission. */
#if defined(HAVE_X86) && ((defined(__clang__) && __clang_major__ >= 12) || \
                          (!defined(__clang__) && __GNUC__ >= 11))
#define HAVE_AVXVNNI 1
#define HAVE_AVX512BF16 1
#ifdef __linux__
#define HAVE_AMX 1
#include <sys/syscall.h>
#endif
#endif

#define INLINE static inline __attribute__((always_inline))
#ifdef __MINGW_PRINTF_FORMAT
#define PRINTF_FORMAT __MINGW_PRINTF_FORMAT /* knows %zu */
#else
#define PRINTF_FORMAT printf
#endif
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* ---- small things that every section uses ---- */

struct errbuf {
    char *text; /* may be NULL */
    size_t size;
    int code; /* of an opening call, where it is not the usual one */
};

/* Writes a sentence to err; returns 0, so that checks can `return fail(...)`. */
__attribute__((format(PRINTF_FORMAT, 2, 3)))
static int fail(struct errbuf *err, const char *format, ...)
{
    if (err->text && err->size) {
        va_list args;
        va_start(args, format);
        vsnprintf(err->text, err->size, format, args);
        va_end(args);
    }
    return 0;
}

static uint32_t get_u32(const uint8_t *p)
{
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static uint64_t get_u64(const uint8_t *p)
{
    return get_u32(p) | (uint64_t)get_u32(p + 4) << 32;
}

/* measure_model refuses CPUs of another order before anything is written. */
static void set_u32(uint8_t *p, uint32_t x) { memcpy(p, &x, sizeof x); }
static void set_u64(uint8_t *p, uint64_t x) { memcpy(p, &x, sizeof x); }

INLINE float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static float get_f32(const uint8_t *p) { return float_of(get_u32(p)); }

static double get_f64(const uint8_t *p)
{
    uint64_t bits = get_u64(p);
    double x;
    memcpy(&x, &bits, 8);
    return x;
}

static int all_finite(const float *x, size_t n)
{
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++)
        bad |= (bits_of(x[i]) & 0x7f800000) == 0x7f800000;
    return !bad;
}

/* Neither NaN nor +infinity, and not all -infinity, which bans a token. */
static int are_logits(const float *x, size_t n)
{
    int sound = 1, left = 0;
    for (size_t i = 0; i < n; i++)
        sound &= x[i] < INFINITY, left |= x[i] > -INFINITY;
    return sound && left;
}

static int is_zero(const uint8_t *p, size_t n)
{
    uint8_t any = 0;
    for (size_t i = 0; i < n; i++)
        any |= p[i];
    return !any;
}

static size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

/* Copies a caller's parameters over the defaults in to; the caller's struct may be of an
 * older version (shorter) or a newer one (longer, asking for nothing that is new).
 * pointers_at is where its first pointer stands: from there on a size must not cut a pointer.
 * Returns 0 for no plausible size, or for a request that this version does not know.  Not
 * inlined, or gcc warns of tails that callers' structs do not have. */
__attribute__((noinline))
static int copy_params(void *to, size_t size, const void *from, uint32_t struct_size,
                       size_t pointers_at)
{
    size_t step = struct_size > pointers_at ? sizeof(void *) : 4; /* no half members */
    if (struct_size < 8 || struct_size > 4096 || struct_size % step)
        return 0;
    if (struct_size > size && !is_zero((const uint8_t *)from + size, struct_size - size))
        return 0;
    memcpy(to, from, struct_size < size ? struct_size : size);
    return 1;
}

static int32_t min_i32(int32_t a, int32_t b) { return a < b ? a : b; }
static int32_t max_i32(int32_t a, int32_t b) { return a > b ? a : b; }
static uint32_t min_u32(uint32_t a, uint32_t b) { return a < b ? a : b; }

/* ===================================================================================
 * 1. Gemma 2
 *
 *                                2B       9B      27B    where it is said
 *   layers L                     26       42       46    report, table 1
 *   model width D              2304     3584     4608    report, table 1
 *   query heads N                 8       16       32    report, table 1
 *   key/value heads K             4        8       16    report, table 1
 *   head_dim H                  256      256      128    report, table 1
 *   ffn width F of a branch    9216    14336    36864    gemma_pytorch config.py; table 1 has 2F
 *   query scale                1/16     1/16     1/12    config.py, query_pre_attn_scalar^-0.5
 *   embedding scale              48    59.75       68    gemma.cpp, EmbeddingScaling: bf16 sqrt(D)
 *   parameters            2,614,341,888  9,241,705,984  27,227,128,320
 *                                    counted from the shapes above; report, table 2
 *   All three (config.py): V 256,000, context 8192, window 4096, RoPE's theta 10000, eps 1e-6,
 *   soft-caps 50 on scores and 30 on logits, no biases, one matrix for embedding and head.
 *   Layers 0, 2, 4 .. are local, 1, 3, 5 .. and so the last one global (config.py, attn_types).
 *   The file states all of these numbers for each model (section 2), and the code reads them
 *   there.  What the code assumes is the diagram: GELU, no biases, a norm on both sides.
 *
 * What surprises those who know other transformers, and the function of the plain model where it
 * happens.  The engine has the same boxes: attention (weigh caps scores), feed_forward,
 * embed_task, product_task (caps logits):
 *   every second layer sees 4096 keys only, itself included               plain_attention
 *   scores are soft-capped, 50 tanh(s / 50), before the mask              plain_attend
 *   logits are soft-capped, which changes probabilities but not ranks     plain_head
 *   27B scales queries by 1/sqrt(D/N) = 1/12, not by 1/sqrt(H)            plain_attention
 *   norms multiply by 1 + w, and a file of GGUF holds 1 + w               plain_norm
 *   a block's output is normed, too, before it is added                   plain_attention
 *   the embedding is multiplied by sqrt(D), rounded to bf16               plain_forward
 *   RoPE turns the pairs (i, i + H/2), not (2i, 2i + 1)                   plain_rope
 *   the gate goes through GELU in its tanh form, not SiLU                 plain_feed_forward
 *   the head is the embedding again, unless the file has one of its own   plain_head
 *   N*H is not D: 2048 of 2304, 4096 of 3584, 4096 of 4608                plain_attention
 *   a text begins with BOS; without it the model talks nonsense           gemma2_encode
 * =================================================================================== */

enum { TYPE_BYTES, TYPE_F32, TYPE_BF16, TYPE_Q8, TYPE_Q6, TYPE_Q4, TYPE_Q3, N_TYPES };
enum {
    HEADER_BYTES = 512, ENTRY_BYTES = 96, IDENTITY_AT = 480, MAX_LAYERS = 1024,
    MAX_HEAD_DIM = 1024, TILE = 16, GROUP = 32, BLOCK_INPUTS = 256,
    KEY_BLOCK = 256 /* positions in an absolute block of attention */
};

/* A tensor in the file, mostly a matrix of weights, used where it lies. */
struct tensor {
    const uint8_t *data; /* NULL: not there */
    uint32_t type, rows, cols;
    size_t tile_bytes; /* 16 rows */
};

struct layer {
    struct tensor attn_norm, q, k, v, o, post_attn_norm;
    struct tensor ffn_norm, gate, up, down, post_ffn_norm;
};

struct text {
    const uint8_t *p; /* not terminated */
    uint32_t n;
};

/* What section 5 needs: views into the file, and two indexes built at open. */
struct tokenizer {
    const uint8_t *scores, *ends, *kinds, *blob;
    uint32_t n;
    uint32_t *buckets, bucket_mask; /* hash of matchable pieces, see find_bucket */
    uint32_t *whole, n_whole; /* ids of pieces found whole, sorted by bytes; and the place */
    uint32_t *whole_prefix;   /* in that list of the longest other that each starts with */
    uint32_t whole_first[257]; /* pieces in it that begin with byte c: [c] .. [c + 1] */
    int32_t byte_id[256]; /* -1 where absent */
    int32_t unk;
};

/* A file's bytes: mapped, read into memory of ours, or lent by the caller. */
struct file {
    const uint8_t *data;
    size_t size;
    void *mapping; /* to unmap, or NULL */
    void *memory;  /* to free, or NULL */
};

struct kernels; /* section 3 */

/* The facts that say how a conversation is written, see encode_messages. */
enum chat_part {
    CHAT_REFUSED, CHAT_BOS, CHAT_TRIM, CHAT_START, CHAT_SYSTEM_BEFORE, CHAT_SYSTEM_AFTER,
    CHAT_SYSTEM_JOIN, CHAT_USER_BEFORE, CHAT_USER_AFTER, CHAT_MODEL_BEFORE, CHAT_MODEL_AFTER,
    CHAT_GENERATE, N_CHAT_PARTS
};
enum { MAX_TURN_PIECE = 64, MAX_OWN_TURN = MAX_TURN_PIECE + 8 };

/* Adds so many blocks of 64 bytes to a digest. */
typedef void sha256_fn(uint32_t h[8], const uint8_t *p, size_t n);

struct gemma2_model {
    gemma2_config config;
    struct file file;
    const struct kernels *isa;
    const struct matrix_kernels *matrix; /* what prefill uses; NULL: the exact class */
    int is_reference; /* passes are plain_forward and plain_head */
    sha256_fn *sha256; /* NULL: in plain C */
    const uint8_t *directory;
    uint32_t n_sections;
    struct bytes {
        const uint8_t *p; /* NULL: not there */
        size_t n;
    } facts, tokenizer_bytes, kept_bytes;
    struct tokenizer tokenizer;
    struct text chat[N_CHAT_PARTS]; /* p NULL: absent */
    _Atomic(struct vocabulary *) vocabulary_made, *vocabulary; /* see vocabulary_of */
    uint8_t own_turns[3][MAX_OWN_TURN];
    struct tensor embedding, head, final_norm, score; /* score.data NULL: writes text only */
    const uint32_t *kept; /* [head.rows] the ids that the head has rows for; NULL: all */
    struct layer layers[];
};

struct layer_cache {
    uint8_t *keys, *values; /* [K] heads of key_bytes, value_bytes each */
    int32_t slots;          /* R, a multiple of 16 */
};

struct row { /* one token of a pass */
    gemma2_session *session;
    float *logits;
    int32_t position;
};

enum { FEW_ROWS = 8, N_PACES = FEW_ROWS + 5, MAX_DRAFTS = 15 };
struct pace {          /* of passes of so many rows */
    double seconds[2]; /* a pass of one thread, and of the team; 0: not known */
    double since;      /* seconds since the way last changed */
    int is_team;       /* the way of the last pass */
};

/* What a pass needs beside sessions: threads, and scratch for n_batch rows.  Variables that point
 * to it are called work. */
struct gemma2_worker {
    const gemma2_model *model;
    void *owned; /* to free, or NULL */
    int32_t n_batch, n_threads, n_context;
    gemma2_run *run; /* the host's threads; NULL: OpenMP's */
    void *run_context;
    struct pace pace[N_PACES]; /* of 1, 2 .. FEW_ROWS rows, then of up to twice as many each */
    gemma2_hook *hook; /* or NULL */
    void *hook_context;
    _Atomic int status; /* of the pass */
    struct row *rows, **wanted; /* [B]; those whose logits the caller wants */
    float *x;                 /* [B][D] the residual stream */
    float *normed;            /* [B][D] what attention, ffn and head read */
    float *q, *k, *v;         /* [B][N*H], [B][K*H], [B][K*H] */
    float *attended;          /* [B][N*H] what the heads mixed from the values */
    float *gated;             /* [B][F] gelu(gate) * up */
    float *up;                /* [F] of the reference alone */
    float *added;             /* [B][D] what attention and ffn add to x */
    float *cosine, *sine;     /* [B][H/2] */
    float *inverse_frequency; /* [H/2] */
    uint16_t *in_bf16;        /* [B rounded up to 16][ldq] bf16 inputs of products */
    int8_t *in_q;             /* [B][ldq] quantised inputs of products */
    float *in_scale;          /* [B][ldq/32] */
    int32_t *in_sum;
    struct log_sum *log_sums; /* [B] */
    int32_t *targets;         /* [B] */
    float *partial;           /* attention split over blocks, see partial_of */
    uint64_t *candidates;     /* [V] of a draw; log_sum blocks [B][HEAD_BLOCK] share it */
    float *adjusted;          /* [V] */
    float (*pair_sums)[2][TILE]; /* [threads][most_pairs][256] of the matrix class: what pairs of
                                  * tiles gave, before store_pair; NULL if it takes one */
    size_t ldq, partial_rows, partial_blocks;
};

struct gemma2_session {
    const gemma2_model *model;
    gemma2_worker *worker; /* its own, in the same block, or a worker that others share */
    void *owned; /* to free, or NULL */
    int32_t n_context, n_batch, window;
    int32_t cache_type; /* GEMMA2_CACHE_F32, .. */
    int32_t width; /* H' */
    int32_t position;      /* tokens held */
    int32_t ring;          /* R of local layers, without the slots of drafts */
    int32_t oldest;        /* the first position that those slots still hold */
    int32_t pending, fate; /* rows of the pass being set up; GEMMA2_OK, or why they are not done */
    const gemma2_ahead *ahead;         /* whose drafts lie behind position, or NULL */
    const gemma2_session *cancels_too; /* the session that it drafts for, or NULL */
    _Atomic int cancelled; /* see gemma2_cancel */
    int is_out;            /* cancelled since the pass began */
    int32_t *ids;           /* [n_context] */
    struct layer_cache *cache; /* [L] */
};

/* n rows through all layers.  Every thread has a copy of its own; what it points to is shared. */
struct pass {
    const gemma2_model *model;
    gemma2_worker *worker;
    size_t n, n_wanted;   /* rows; those of worker->wanted */
    size_t n_exact, wanted_exact; /* how many of them are of the exact class: they come first */
    struct row **only;   /* [n] the rows, if there are no others any more; else worker->rows */
    const struct matrix_kernels *matrix; /* the class of the others */
    float *logprobs;     /* [T] of worker->targets, or NULL */
    float *states;       /* [T][D] after the final norm, or NULL */
    double *importance;  /* the sums of gemma2_importance, or NULL .. */
    uint32_t importance_block; /* .. in blocks of so many inputs */
    int layer;
    struct member *me;
};

/* ---- the model in plain loops ----
 * One token through all layers, written to be read: GEMMA2_ISA=reference runs it.  It adds in
 * the order of section 3's specification and therefore gives the bits of the engine.  The
 * functions it uses from there are numbers to numbers: exp, tanh, cos and sin, roundings. */

INLINE float add_product(float sum, float a, float b); /* section 3 */
INLINE float add_lanes(const float lane[TILE]);
INLINE float exp_f32(float x);
INLINE float tanh_f32(float x);
static void cos_sin(double x, float *cosine, float *sine);
INLINE void quantise_group(const float *x, int8_t *q, float *scale, int32_t *sum);
INLINE float float_weight(const struct tensor *w, size_t row, size_t col); /* section 2 */
INLINE int32_t group_product(const struct tensor *w, size_t row, size_t g, const int8_t *q);
static void read_row(const struct tensor *w, uint32_t row, float *y);
INLINE float row_scale(const struct tensor *w, size_t row);
static uint32_t row_of_id(const gemma2_model *m, uint32_t id);
static void spread_logits(const gemma2_model *m, float *logits);
static float cached(const gemma2_session *s, int layer, int head, char what, int32_t position,
                    int i);
static void store_head(const gemma2_session *s, int layer, int head, int32_t position, float *key,
                       float *value); /* section 4 */

static int is_cancelled(struct pass *p);
static void trace(const struct pass *p, const char *name, int layer, float *data, size_t rows,
                  size_t cols);

/* y = x / sqrt(mean(x^2) + eps) * (1 + w).  y may be x. */
static void plain_norm(const struct tensor *w, float eps, const float *x, float *y)
{
    float lane[TILE] = {0}; /* element i is added to lane i % 16 */
    for (uint32_t i = 0; i < w->rows; i++)
        lane[i % TILE] += x[i] * x[i];
    float scale = 1 / sqrtf(add_lanes(lane) / (float)w->rows + eps);
    for (uint32_t i = 0; i < w->rows; i++)
        y[i] = x[i] * scale * (1 + ((const float *)w->data)[i]);
}

/* y = W x.  Quantised weights meet x rounded to int8, 32 inputs with one scale. */
static void plain_product(const struct tensor *w, const float *x, float *y)
{
    memset(y, 0, w->rows * sizeof *y);
    if (w->type == TYPE_F32 || w->type == TYPE_BF16)
        for (size_t row = 0; row < w->rows; row++)
            for (size_t i = 0; i < w->cols; i++)
                y[row] = add_product(y[row], float_weight(w, row, i), x[i]);
    else {
        for (size_t i = 0; i < w->cols; i += GROUP) {
            float group[GROUP] = {0}, scale;
            int8_t q[GROUP];
            int32_t unused;
            memcpy(group, x + i, (w->cols - i < GROUP ? w->cols - i : GROUP) * sizeof *x);
            quantise_group(group, q, &scale, &unused);
            for (size_t row = 0; row < w->rows; row++)
                y[row] = add_product(y[row], scale, (float)group_product(w, row, i / GROUP, q));
        }
        for (size_t row = 0; row < w->rows; row++)
            y[row] *= row_scale(w, row);
    }
}

/* The pairs (i, i + H/2) of a head turn by position * theta^(-2i/H). */
static void plain_rope(const gemma2_worker *work, int32_t position, float scale, float *x)
{
    int half = work->model->config.head_dim / 2;
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half], cosine, sine;
        cos_sin((float)position * work->inverse_frequency[i], &cosine, &sine);
        x[i] = (a * cosine - b * sine) * scale;
        x[i + half] = (b * cosine + a * sine) * scale;
    }
}

/* One query head: out = softmax(cap * tanh(q . keys / cap)) . values over positions first to
 * last, in blocks of 256 positions.  A block has its own maximum, sum and output; they join
 * what the blocks before it gave. */
static void plain_attend(const gemma2_session *s, int layer, int kv_head, int32_t first,
                         int32_t last, const float *q, float *out)
{
    int h = s->model->config.head_dim;
    float cap = s->model->config.attn_softcap, inverse = 1 / cap, max = -INFINITY, sum = 0;
    memset(out, 0, (size_t)h * sizeof *out);
    for (int32_t from = first, to; from <= last; from = to + 1) {
        float score[KEY_BLOCK], o[MAX_HEAD_DIM] = {0}, lane[TILE] = {0}, block_max = -INFINITY;
        to = min_i32(from / KEY_BLOCK * KEY_BLOCK + KEY_BLOCK - 1, last);
        for (int32_t p = from; p <= to; p++) {
            float *x = &score[p - from];
            *x = 0;
            for (int i = 0; i < h; i++)
                *x = add_product(*x, q[i], cached(s, layer, kv_head, 'k', p, i));
            *x = cap > 0 ? cap * tanh_f32(*x * inverse) : *x;
            block_max = *x > block_max ? *x : block_max;
        }
        if (cap > 0 && cap <= 60) /* exp cannot overflow, so no maximum is needed */
            block_max = 0;
        block_max = block_max == -INFINITY ? 0 : block_max; /* all NaN */
        for (int32_t p = from; p <= to; p++) {
            float weight = exp_f32(score[p - from] - block_max);
            lane[p % TILE] += weight;
            for (int i = 0; i < h; i++)
                o[i] = add_product(o[i], weight, cached(s, layer, kv_head, 'v', p, i));
        }
        float new_max = block_max > max ? block_max : max;
        float keep = exp_f32(max - new_max), add = exp_f32(block_max - new_max);
        sum = sum * keep + add_lanes(lane) * add;
        for (int i = 0; i < h; i++)
            out[i] = out[i] * keep + o[i] * add;
        max = new_max;
    }
    float inverse_sum = 1 / sum;
    for (int i = 0; i < h; i++)
        out[i] *= inverse_sum;
}

/* x = x + post_attn_norm(o(attend(q, k, v of attn_norm(x)))) for the token at a position. */
static void plain_attention(const struct pass *p, int layer, gemma2_session *s, int32_t position,
                            float *x)
{
    const gemma2_config *c = &s->model->config;
    const struct layer *w = &s->model->layers[layer];
    gemma2_worker *work = p->worker;
    int32_t first = c->is_local[layer] ? max_i32(0, position - s->window + 1) : 0;
    int h = c->head_dim, group = c->n_heads / c->n_kv_heads;
    plain_norm(&w->attn_norm, c->rms_norm_eps, x, work->normed);
    trace(p, "attn_norm", layer, work->normed, 1, w->q.cols);
    plain_product(&w->q, work->normed, work->q);
    plain_product(&w->k, work->normed, work->k);
    plain_product(&w->v, work->normed, work->v);
    for (int i = 0; i < c->n_heads; i++)
        plain_rope(work, position, c->query_scale, work->q + i * h);
    for (int i = 0; i < c->n_kv_heads; i++) {
        plain_rope(work, position, 1, work->k + i * h);
        store_head(s, layer, i, position, work->k + i * h, work->v + i * h);
    }
    trace(p, "q", layer, work->q, 1, w->q.rows);
    trace(p, "k", layer, work->k, 1, w->k.rows);
    trace(p, "v", layer, work->v, 1, w->v.rows);
    for (int i = 0; i < c->n_heads; i++)
        plain_attend(s, layer, i / group, first, position, work->q + i * h, work->attended + i * h);
    trace(p, "attn", layer, work->attended, 1, w->o.cols);
    plain_product(&w->o, work->attended, work->added);
    trace(p, "o", layer, work->added, 1, w->o.rows);
    plain_norm(&w->post_attn_norm, c->rms_norm_eps, work->added, work->added);
    trace(p, "post_attn_norm", layer, work->added, 1, w->o.rows);
    for (int i = 0; i < c->d_model; i++)
        x[i] += work->added[i];
    trace(p, "attn_residual", layer, x, 1, w->o.rows);
}

/* x = x + post_ffn_norm(down(gelu(gate(y)) * up(y))), y = ffn_norm(x). */
static void plain_feed_forward(const struct pass *p, int layer, float *x)
{
    gemma2_worker *work = p->worker;
    const gemma2_config *c = &work->model->config;
    const struct layer *w = &work->model->layers[layer];
    plain_norm(&w->ffn_norm, c->rms_norm_eps, x, work->normed);
    trace(p, "ffn_norm", layer, work->normed, 1, w->gate.cols);
    plain_product(&w->gate, work->normed, work->gated);
    plain_product(&w->up, work->normed, work->up);
    for (int i = 0; i < c->d_ffn; i++) {
        float g = work->gated[i], inner = 0.797884561f * (g + 0.044715f * (g * g * g));
        work->gated[i] = 0.5f * g * (1 + tanh_f32(inner)) * work->up[i];
    }
    trace(p, "geglu", layer, work->gated, 1, w->gate.rows);
    plain_product(&w->down, work->gated, work->added);
    trace(p, "down", layer, work->added, 1, w->down.rows);
    plain_norm(&w->post_ffn_norm, c->rms_norm_eps, work->added, work->added);
    trace(p, "post_ffn_norm", layer, work->added, 1, w->down.rows);
    for (int i = 0; i < c->d_model; i++)
        x[i] += work->added[i];
    trace(p, "residual", layer, x, 1, w->down.rows);
}

/* x[D], the residual stream, of the token `id` at a position. */
static void plain_forward(struct pass *p, gemma2_session *s, int32_t id, int32_t position,
                          float *x)
{
    const gemma2_config *c = &s->model->config;
    read_row(&s->model->embedding, row_of_id(s->model, (uint32_t)id), x);
    for (int i = 0; i < c->d_model; i++)
        x[i] *= c->embedding_scale;
    trace(p, "embedding", 0, x, 1, (size_t)c->d_model);
    for (int layer = 0; layer < c->n_layers && !is_cancelled(p); layer++) {
        plain_attention(p, layer, s, position, x);
        plain_feed_forward(p, layer, x);
    }
}

/* logits[V] = cap * tanh(head(final_norm(x)) / cap) */
static void plain_head(const struct pass *p, const float *x, float *logits)
{
    gemma2_worker *work = p->worker;
    const gemma2_config *c = &work->model->config;
    float cap = c->final_softcap, inverse = 1 / cap;
    plain_norm(&work->model->final_norm, c->rms_norm_eps, x, work->normed);
    trace(p, "final_norm", 0, work->normed, 1, work->model->head.cols);
    plain_product(&work->model->head, work->normed, logits);
    for (int i = 0; i < c->n_kept && cap > 0; i++)
        logits[i] = cap * tanh_f32(logits[i] * inverse);
    spread_logits(work->model, logits);
}

/* ===================================================================================
 * 2. The weight file
 *
 * This table is the specification; export.py writes what it says.  Everything is
 * little-endian; sizes and offsets count bytes from the start of the file.
 *
 * Header, 512 bytes
 *   offset type  meaning                                legal values
 *      0   u8[8] magic                                  89 47 45 4D 4D 41 32 0A "\x89GEMMA2\n"
 *      8   u32   version                                1
 *     12   u32   header bytes                           512
 *     16   u64   required features                      0; an unknown bit refuses the file
 *     24   u64   optional features                      any; unknown bits are ignored
 *     32   u64   file bytes                             the file's size, exactly
 *     40   u64   directory offset                       512
 *     48   u32   directory entries                      1 .. 65536
 *     52   u32   bytes of one entry                     96
 *     56   u32   alignment A of sections                power of two, 64 .. 2 MiB
 *     60   u32   zero
 *     64   u32   L, layers                              0 .. 1024 (0: tokenizer only)
 *     68   u32   D, model width                         1 .. 2^20     0 when L is 0
 *     72   u32   N, query heads                         1 .. 4096     0 when L is 0
 *     76   u32   K, key/value heads                     divides N     0 when L is 0
 *     80   u32   H, head_dim                            even, 2 .. 1024  0 when L is 0
 *     84   u32   F, feed-forward width of one branch    1 .. 2^22     0 when L is 0
 *     88   u32   V, vocabulary                          1 .. 2^22 - 1
 *     92   u32   W, window of local layers              1 .. 2^30     0 when L is 0
 *     96   u32   trained context                        1 .. 2^30     0 when L is 0
 *    100   f32   rms_norm_eps                           0 .. 1        0 when L is 0
 *    104   f64   rope_theta                             1e-3 .. 1e12  0 when L is 0
 *    112   f32   soft-cap of attention scores           0 (off), or 0.01 .. 10000
 *    116   f32   soft-cap of logits                     the same
 *    120   f32   query scale (query_pre_attn_scalar^-0.5)  1e-9 .. 1e9   0 when L is 0
 *    124   f32   embedding scale (sqrt(D) in bf16)      1e-9 .. 1e9   0 when L is 0
 *    128   u8[128] bit l%8 of byte l/8: layer l is local (sliding window)
 *    256   u32   number of stop ids                     0 .. 15
 *    260   u32[15] stop ids                             < V; unused ones 0
 *    320   u8[160] zero
 *    480   u8[32] identity: SHA-256 of bytes 0 .. 479 followed by the directory
 *
 * Directory entry, 96 bytes
 *      0   u32   role (table below)      16  u64  rows        48  u8[32] SHA-256 of the
 *      4   u32   layer, 0 where none     24  u64  cols                   section's bytes
 *      8   u32   type (below)            32  u64  offset      80  u8[16] zero
 *     12   u32   flags: bit 0 optional   40  u64  bytes
 *   An entry with an unknown role is skipped when optional, else refuses the file.  No
 *   (role, layer) pair occurs twice.  Sections stand in directory order: the first at the
 *   directory's end rounded up to A, each next at the end of the one before rounded up to
 *   A, the file ends with the last one; the gaps are zero.
 *
 * Roles
 *     1 facts      bytes     u32 count; per pair: u32 key bytes, u32 value bytes, key, value;
 *                            UTF-8; the keys "chat.*" are described in section 5
 *     2 tokenizer  bytes     below
 *     3 kept       bytes     u32[V'], ascending: the only ids that can be written; see below
 *    16 embedding  [V, D]    tied output head unless role 17 is there
 *    17 head       [V', D]   an output head of its own, or a cheaper copy of a tied one
 *    18 final_norm [D, 1]    norms are f32, stored as trained: x is scaled by 1 + w
 *    19 score      [s, D]    reward models and classifiers: s = 1 .. 1024 scores of a state
 *    32 attn_norm  [D, 1]    33 q [N*H, D]  34 k [K*H, D]  35 v [K*H, D]  36 o [D, N*H]
 *    37 post_attn_norm       40 ffn_norm    41 gate [F, D] 42 up [F, D]   43 down [D, F]
 *    44 post_ffn_norm        (32 .. 44 once for each layer)
 *   Reserved, always optional: 256 + role importance of a tensor's inputs, 512 + role and
 *   768 + role the A and B of a LoRA pair.  Released files hold sections in order of use:
 *   facts, tokenizer, kept, layers, final norm, embedding, head.
 *
 * Without role 3 every id can be written: V' = V.  With it the embedding's rows are those of the
 * kept ids, then those of the others, both in ascending order.  The head has rows of kept ids
 * alone, so a tied one is the embedding's first V' rows.  All other logits are -infinity.
 *
 * Tokenizer section, 64 + 9 V + blob bytes
 *      0   u32   V, as in the header
 *      4   u32   ids of bos, eos, pad, unk, start of turn, end of turn (six values);
 *                2^32-1 where absent; unk is always there unless all 256 bytes are
 *     28   u32   blob bytes
 *     32   u8[32] zero
 *     64   f32[V] scores, finite
 *          u32[V] end of each piece in the blob; a piece starts where the last one ended
 *          u8[V]  kind, GEMMA2_PIECE_*; a BYTE piece is spelled "<0xHH>", upper case
 *          u8[]   the blob; a space is U+2581; only UNUSED pieces may be empty; a piece
 *                 is UTF-8 of at most 4096 bytes; of equal pieces the lowest id is found
 * =================================================================================== */

/* ---- The importance file: what gemma2_importance summed over a text, for the converter ----
 *      0   u8[8] magic 89 47 45 4D 4D 41 49 0A "\x89GEMMAI\n"
 *      8   u32   version, 1
 *     12   u32   block B: 1, or a multiple of 32 up to 1024
 *     16   u32[7] L, D, N, K, H, F, V of the model, as in its header
 *     44   u32   zero
 *     48   u64   tokens T, 1 or more
 *     56   u64   zero
 *     64   f32   for each entry e of gemma2_get_input, in order, [B][e.cols]: the sums, over T */

enum { /* roles */
    ROLE_FACTS = 1, ROLE_TOKENIZER = 2, ROLE_KEPT = 3, ROLE_EMBEDDING = 16, ROLE_HEAD = 17,
    ROLE_FINAL_NORM = 18, ROLE_SCORE = 19, ROLE_LAYER_FIRST = 32
};

/* The roles a file can have.  Dimensions: V, D, F, 1, q = N*H, k = K*H, s scores, w = V'; '-' no
 * matrix. */
struct role {
    uint32_t id;
    const char *name;
    char rows, cols;
    size_t member; /* of gemma2_model, or of layer from ROLE_LAYER_FIRST on */
};

static const struct role roles[] = {
    {ROLE_FACTS, "facts", '-', '-', offsetof(gemma2_model, facts)},
    {ROLE_TOKENIZER, "tokenizer", '-', '-', offsetof(gemma2_model, tokenizer_bytes)},
    {ROLE_KEPT, "kept", '-', '-', offsetof(gemma2_model, kept_bytes)},
    {ROLE_EMBEDDING, "embedding", 'V', 'D', offsetof(gemma2_model, embedding)},
    {ROLE_HEAD, "head", 'w', 'D', offsetof(gemma2_model, head)},
    {ROLE_FINAL_NORM, "final_norm", 'D', '1', offsetof(gemma2_model, final_norm)},
    {ROLE_SCORE, "score", 's', 'D', offsetof(gemma2_model, score)},
    {32, "attn_norm", 'D', '1', offsetof(struct layer, attn_norm)},
    {33, "q", 'q', 'D', offsetof(struct layer, q)},
    {34, "k", 'k', 'D', offsetof(struct layer, k)},
    {35, "v", 'k', 'D', offsetof(struct layer, v)},
    {36, "o", 'D', 'q', offsetof(struct layer, o)},
    {37, "post_attn_norm", 'D', '1', offsetof(struct layer, post_attn_norm)},
    {40, "ffn_norm", 'D', '1', offsetof(struct layer, ffn_norm)},
    {41, "gate", 'F', 'D', offsetof(struct layer, gate)},
    {42, "up", 'F', 'D', offsetof(struct layer, up)},
    {43, "down", 'D', 'F', offsetof(struct layer, down)},
    {44, "post_ffn_norm", 'D', '1', offsetof(struct layer, post_ffn_norm)},
};
enum { N_ROLES = sizeof roles / sizeof *roles };

static const struct {
    const char *name;
    uint32_t group_bytes; /* of 32 inputs, 16 rows; 0: not quantised */
} types[N_TYPES] = {{"bytes", 0}, {"f32", 0},  {"bf16", 0}, {"q8", 512},
                    {"q6", 384},  {"q4", 256}, {"q3", 192}};

static int is_quantised(uint32_t type) { return type >= TYPE_Q8; }
static int has_group_bit(uint32_t type) { return type >= TYPE_Q4; }

/* Bytes of a tile of 16 rows (below); cols is at most 2^22. */
static uint64_t tile_bytes(uint32_t type, uint64_t cols)
{
    if (type == TYPE_F32)
        return cols * 64;
    if (type == TYPE_BF16)
        return (cols + 1) / 2 * 64;
    return 64 + (cols + 255) / 256 * (128 + 8 * (uint64_t)types[type].group_bytes);
}

/* An entry of the directory. */
struct entry {
    uint32_t role, layer, type, flags;
    uint64_t rows, cols, offset, bytes;
    const uint8_t *digest, *reserved;
};

static struct entry get_entry(const uint8_t *directory, size_t i)
{
    const uint8_t *p = directory + i * ENTRY_BYTES;
    return (struct entry){get_u32(p), get_u32(p + 4), get_u32(p + 8), get_u32(p + 12),
                          get_u64(p + 16), get_u64(p + 24), get_u64(p + 32), get_u64(p + 40),
                          p + 48, p + 80};
}

static const struct role *find_role(uint32_t id)
{
    for (int i = 0; i < N_ROLES; i++)
        if (roles[i].id == id)
            return &roles[i];
    return NULL;
}

/* The header's integers and reals: where, what, within which limits.  With no layers
 * (a tokenizer file) those marked zero must be 0. */
struct header_field {
    uint16_t at;
    char kind; /* 'i' u32, 'f' f32, 'd' f64, 'c' f32 soft-cap */
    char zero;
    const char *name;
    double low, high;
    size_t member; /* of gemma2_config */
};
#define CONFIG(member) offsetof(gemma2_config, member)
static const struct header_field header_fields[] = {
    {64, 'i', 0, "number of layers", 0, MAX_LAYERS, CONFIG(n_layers)},
    {68, 'i', 1, "model width", 1, 1 << 20, CONFIG(d_model)},
    {72, 'i', 1, "number of query heads", 1, 4096, CONFIG(n_heads)},
    {76, 'i', 1, "number of key/value heads", 1, 4096, CONFIG(n_kv_heads)},
    {80, 'i', 1, "head_dim", 2, MAX_HEAD_DIM, CONFIG(head_dim)},
    {84, 'i', 1, "feed-forward width", 1, 1 << 22, CONFIG(d_ffn)},
    {88, 'i', 0, "vocabulary", 1, (1 << 22) - 1, CONFIG(n_vocab)},
    {92, 'i', 1, "window", 1, 1 << 30, CONFIG(window)},
    {96, 'i', 1, "trained context", 1, 1 << 30, CONFIG(n_context)},
    {100, 'f', 1, "rms_norm_eps", 0, 1, CONFIG(rms_norm_eps)},
    {104, 'd', 1, "rope_theta", 1e-3, 1e12, CONFIG(rope_theta)},
    {112, 'c', 0, "soft-cap of attention scores", 0.01, 10000, CONFIG(attn_softcap)},
    {116, 'c', 0, "soft-cap of logits", 0.01, 10000, CONFIG(final_softcap)},
    {120, 'f', 1, "query scale", 1e-9, 1e9, CONFIG(query_scale)},
    {124, 'f', 1, "embedding scale", 1e-9, 1e9, CONFIG(embedding_scale)},
};
enum { N_HEADER_FIELDS = sizeof header_fields / sizeof *header_fields };

static uint64_t dimension(const gemma2_config *c, char letter)
{
    switch (letter) {
    case 'V': return (uint64_t)c->n_vocab;
    case 'D': return (uint64_t)c->d_model;
    case 'F': return (uint64_t)c->d_ffn;
    case 'q': return (uint64_t)c->n_heads * (uint64_t)c->head_dim;
    case 'k': return (uint64_t)c->n_kv_heads * (uint64_t)c->head_dim;
    case 's': return (uint64_t)c->n_scores;
    case 'w': return (uint64_t)c->n_kept;
    default: return 1;
    }
}

/* ---- number formats: how a matrix lies in the file ----
 * A matrix [rows, cols] is cut into tiles of 16 rows; tile r/16 holds row r in lane r%16.
 * Rows are padded to 16 with zeros.  A tile's values follow its inputs (columns) in
 * ascending order, so a product runs down a tile with the 16 rows in the lanes of a
 * register and never adds across lanes.
 *
 *   type 1 f32    [input][16 rows] f32
 *   type 2 bf16   [input pair][16 rows][2] bf16; an odd last input is paired with zero
 *   type 3 q8     inputs are padded to 256.  A tile starts with S, one f32 a row (64
 *        4 q6     bytes); then blocks of 256 inputs: 128 bytes of group scales
 *        5 q4     [8 groups][16 rows] u8, then 8 groups of 32 inputs:
 *        6 q3
 *
 *     q8 group, 512 bytes: 8 steps of [16 rows][4 inputs] signed bytes, -127 .. 127
 *     q6 group, 384 bytes: 256 bytes of low nibbles, arranged as in q4; then 2 operands of
 *        64 bytes [16 rows][4 inputs]; operand o holds in bits 2j, 2j+1 of a byte the two
 *        high bits of that input in step 4 o + j; the value is (high * 16 + low) - 32
 *     q4 group, 256 bytes: 4 operands of 64 bytes [16 rows][4 inputs]; operand o holds
 *        step 2 o in the low nibbles and step 2 o + 1 in the high ones
 *            input of a group:  0 1 2 3 | 4 5 6 7 | 8 ..   (4 inputs are a step)
 *            operand, nibble:   0 low   | 0 high  | 1 low ..
 *        the value is CODEBOOK[nibble] + 4 * (group scale byte & 1)
 *     q3 group, 192 bytes: 3 operands arranged as in q4.  Three bits of a nibble are the index of
 *        that input, in steps 0 .. 5; the fourth bits of the operands are those of steps 6 and 7
 *            bit of a byte:     7         6 5 4     3         2 1 0
 *            operand 0:      step 7 bit 0 step 1 | step 6 bit 0 step 0
 *            operand 1:      step 7 bit 1 step 3 | step 6 bit 1 step 2
 *            operand 2:      step 7 bit 2 step 5 | step 6 bit 2 step 4
 *        the value is CODEBOOKS_Q3[8 * (group scale byte & 1) + index]
 *     group scale s: q8 the byte, 0 .. 255; q6 the byte as signed, -127 .. 127; q4 and q3 the
 *        byte as signed >> 1, -64 .. 63; bit 0 is the group bit
 *     weight = S * (s * value): s * value is an exact integer, its product with S rounds.
 *        Exporters choose S and s first, then the nearest value, ties to the even one (in
 *        q4 and q3 to the even index)
 *   type 0 bytes  no tensor
 *
 * A new quantised format needs, in this section: a TYPE_, a line in this table and in types,
 * has_group_bit (which says yes to all types behind q6), and cases in value_of, scale_of and
 * unpack_group.  In the appendix: even_offset, cases in tile_by_type, panel_by_type and
 * bf16_panel_amx (and its bit in amx_matrix.types), and in operands_, offset_ and scales_ of
 * avx2, avx512 and neon.  Chains of types end with q4 or q3 and take any other for that, so
 * search for TYPE_Q6, TYPE_Q4 and TYPE_Q3.  export.py and gemma2_section's comment name it.
 * A new type of cache needs a line_type, and cases in number_bytes, position_bytes, kv_head_of,
 * store_head, line_number, lines_by_type and line_ of avx2, avx512 and neon.
 *
 * S is finite.  Padded rows are never returned and padded inputs meet zero activations, so
 * neither matters; exporters write zero bytes there, and never the byte -128 in q8 values or
 * q6 scales (readers compute with it like with any other). */

/* 16 values for a nibble: nearly the optimum for a normal distribution, and every
 * difference fits 6 bits, so value + 31 is an unsigned operand. */
static const int8_t CODEBOOK[16] = {-31, -25, -20, -16, -12, -9, -6, -3,
                                    0, 3, 6, 9, 13, 17, 22, 28};

/* 8 values for a group bit of 0, 8 for 1.  Found on a model's own matrices: groups choose bit and
 * scale, each value then moves to the weighted mean of what fell to it (Lloyd), until both books
 * stand still; integers last.  One keeps a 0: beside an outlier the rest of a group is nothing. */
static const int8_t CODEBOOKS_Q3[16] = {-31, -17, -9, -2, 4, 10, 17, 27,
                                        -31, -20, -12, -5, 0, 7, 14, 23};

/* The nibbles of q6's low bits, of q4 and of q3. */
INLINE int low_nibble(const uint8_t *group, int i, int r)
{
    return group[i / 8 * 64 + r * 4 + i % 4] >> (i & 4) & 15;
}

INLINE int value_q3(const uint8_t *group, uint8_t scale_byte, int i, int r)
{
    int index = 0; /* of steps 6 and 7: bit 3 of steps 0, 2, 4 and of 1, 3, 5 */
    if (i < 24)
        index = low_nibble(group, i, r) & 7;
    else
        for (int j = 0; j < 3; j++)
            index |= low_nibble(group, i - 24 + 8 * j, r) >> 3 << j;
    return CODEBOOKS_Q3[8 * (scale_byte & 1) + index];
}

/* The value of input i of a group, row r of a tile; and the scale that a byte stands for. */
INLINE int value_of(uint32_t type, const uint8_t *group, uint8_t scale_byte, int i, int r)
{
    int high;
    switch (type) {
    case TYPE_Q8: return (int8_t)group[i / 4 * 64 + r * 4 + i % 4];
    case TYPE_Q6:
        high = group[256 + i / 16 * 64 + r * 4 + i % 4] >> i / 4 % 4 * 2 & 3;
        return high * 16 + low_nibble(group, i, r) - 32;
    case TYPE_Q4: return CODEBOOK[low_nibble(group, i, r)] + 4 * (scale_byte & 1);
    default: return value_q3(group, scale_byte, i, r);
    }
}

INLINE int32_t scale_of(uint32_t type, uint8_t byte)
{
    if (type == TYPE_Q8)
        return byte;
    return has_group_bit(type) ? ((int8_t)byte - (byte & 1)) / 2 : (int8_t)byte;
}

/* Unpacking a group of a quantised tile: 32 inputs x 16 rows, and the 16 group scales. */
INLINE void unpack_as(const uint32_t type, const uint8_t *group, const uint8_t *scale_bytes,
                      int8_t values[GROUP][TILE], int32_t scales[TILE])
{
    for (int r = 0; r < TILE; r++)
        scales[r] = scale_of(type, scale_bytes[r]);
    for (int i = 0; i < GROUP; i++)
        for (int r = 0; r < TILE; r++)
            values[i][r] = (int8_t)value_of(type, group, scale_bytes[r], i, r);
}

static void unpack_group(uint32_t type, const uint8_t *group, const uint8_t *scale_bytes,
                         int8_t values[GROUP][TILE], int32_t scales[TILE])
{
    switch (type) {
    case TYPE_Q8: unpack_as(TYPE_Q8, group, scale_bytes, values, scales); break;
    case TYPE_Q6: unpack_as(TYPE_Q6, group, scale_bytes, values, scales); break;
    case TYPE_Q4: unpack_as(TYPE_Q4, group, scale_bytes, values, scales); break;
    default: unpack_as(TYPE_Q3, group, scale_bytes, values, scales); break;
    }
}

/* Where group g of a quantised tile lies, and its 16 scale bytes. */
INLINE const uint8_t *group_at(uint32_t type, const uint8_t *tile, size_t g,
                               const uint8_t **scale_bytes)
{
    size_t group_bytes = types[type].group_bytes;
    const uint8_t *block = tile + 64 + g / 8 * (128 + 8 * group_bytes);
    *scale_bytes = block + g % 8 * TILE;
    return block + 128 + g % 8 * group_bytes;
}

INLINE float from_bf16(uint16_t h) { return float_of((uint32_t)h << 16); }

/* W[row][col] of a type that is not quantised. */
INLINE float float_weight(const struct tensor *w, size_t row, size_t col)
{
    const uint8_t *tile = w->data + row / TILE * w->tile_bytes;
    if (w->type == TYPE_F32)
        return ((const float *)tile)[col * TILE + row % TILE];
    return from_bf16(((const uint16_t *)tile)[col / 2 * 32 + row % TILE * 2 + col % 2]);
}

/* A quantised row's S, and s * sum of v * q over its group g. */
INLINE float row_scale(const struct tensor *w, size_t row)
{
    return ((const float *)(w->data + row / TILE * w->tile_bytes))[row % TILE];
}

INLINE int32_t group_product(const struct tensor *w, size_t row, size_t g, const int8_t *q)
{
    const uint8_t *tile = w->data + row / TILE * w->tile_bytes, *scale_bytes;
    const uint8_t *group = group_at(w->type, tile, g, &scale_bytes);
    int lane = (int)(row % TILE);
    uint8_t byte = scale_bytes[lane];
    int32_t sum = 0;
    for (int i = 0; i < GROUP; i++)
        sum += q[i] * value_of(w->type, group, byte, i, lane);
    return scale_of(w->type, byte) * sum;
}

/* Row r of a matrix as floats: y[cols].  The embedding is read this way, and scores' rows. */
static void read_row(const struct tensor *w, uint32_t r, float *y)
{
    const uint8_t *scale_bytes, *tile = w->data + r / TILE * w->tile_bytes;
    int lane = (int)(r % TILE);
    for (uint32_t i = 0; i < w->cols; i++)
        if (is_quantised(w->type)) {
            const uint8_t *group = group_at(w->type, tile, i / GROUP, &scale_bytes);
            int value = value_of(w->type, group, scale_bytes[lane], (int)(i % GROUP), lane);
            y[i] = row_scale(w, r) * (float)(scale_of(w->type, scale_bytes[lane]) * value);
        } else
            y[i] = float_weight(w, r, i);
}

/* The embedding's row of an id.  Where it is less than head.rows, it is the head's row as well:
 * otherwise the id is not kept. */
static uint32_t row_of_id(const gemma2_model *m, uint32_t id)
{
    uint32_t low = 0, high = m->kept ? m->head.rows : 0; /* how many kept ids are less */
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (m->kept[middle] < id)
            low = middle + 1;
        else
            high = middle;
    }
    if (!m->kept || (low < m->head.rows && m->kept[low] == id))
        return m->kept ? low : id;
    return m->head.rows + id - low;
}

static int is_kept(const gemma2_model *m, uint32_t id) { return row_of_id(m, id) < m->head.rows; }

/* The logits of the head's rows, in place, to those of all ids.  An id is never less than its row,
 * so from the last row on none is written over before it is read. */
static void spread_logits(const gemma2_model *m, float *logits)
{
    size_t rows = m->head.rows;
    for (size_t i = rows; i < (size_t)m->config.n_vocab; i++)
        logits[i] = -INFINITY;
    for (size_t row = m->kept ? rows : 0; row-- > 0;) {
        float logit = logits[row];
        logits[row] = -INFINITY;
        logits[m->kept[row]] = logit;
    }
}

/* ===================================================================================
 * 3. Kernels: the specification
 *
 * What these functions return, to the bit, is what every instruction set of the appendix returns,
 * except in the matrix class (struct matrix_kernels).
 * Each operation rounds to float, to nearest even; sums run in the order written.
 * =================================================================================== */

enum {
    MAX_PRODUCT_ROWS = 16, /* tokens that one kernel call multiplies a tile with */
    MAX_PANEL_ROWS = 256, /* tokens that one kernel call multiplies two tiles with */
    MAX_QUERIES = 8,      /* query vectors that one kernel call multiplies keys with */
    HEAD_BLOCK = 2048,    /* logits in a block of a log-sum-exp */
    PREFETCH_AHEAD = 8192, /* bytes of weights: far enough that page walks are done in time */
    PREFETCH_EVERY = 256,  /* and few enough lines, into L2, that the hardware's own prefetch
                            * goes on: asking for every line reads up to 15 % less a second */
    PREFETCH_SOON = 3072, /* while several rows multiply: every line, into L1 */
    BF16_STRIDE = TILE * GROUP, /* of in->bf16: from 32 inputs of a row to its next 32 */
    PACKED_BYTES = 32 << 10, /* bytes of keys, and of values, that the matrix class packs */
    MAX_PACKED_HEAD = PACKED_BYTES / (4 * TILE) /* head_dim up to which it does */
};

/* What products read: T rows as floats and, for quantised weights, the same rows as
 * int8 in groups of 32 with scale and sum. */
struct input {
    float *x;       /* [T][ldx] */
    size_t ldx;
    int8_t *q;      /* [T][ldq], ldq a multiple of 256, zeros past the row's end */
    float *scale;   /* [T][ldq / 32] */
    int32_t *sum;   /* [T][ldq / 32] sums of 32 q */
    uint16_t *bf16; /* the matrix class, [T / 16][ldq / 32][16 rows][32 inputs] */
    size_t ldq;
};

/* Row t of in->bf16: its first 32 inputs; the next 32 follow at BF16_STRIDE. */
INLINE uint16_t *bf16_row(const struct input *in, size_t t)
{
    return in->bf16 + t / TILE * TILE * in->ldq + t % TILE * GROUP;
}

/* What a kernel of floats reads: lines of 16 numbers.  A line holds an input's weights in the 16
 * rows of a tile, a dimension of 16 keys, or 16 dimensions of a value.  Strips of lines lie
 * strip_bytes apart: tiles, 16 keys, the parts of a value.
 *
 * The 8-bit cache has int8 numbers, and a half-float scale for 32 dimensions of a position.  A
 * strip of keys ends with [H/32][16 keys] scales, a value with [H'/32].  Scale times number has
 * 18 bits, so it is exactly a float. */
enum line_type { LINES_F32, LINES_F16, LINES_BF16, LINES_KEYS_Q8, LINES_VALUES_Q8, LINES_PAIRS };
struct lines {
    const uint8_t *data;
    enum line_type type;
    int n_lines, n_strips;
    ptrdiff_t strip_bytes;
    size_t line_bytes; /* from a line to the next one; with bf16 from two lines to the next two */
    int prefetch, every; /* so far ahead, of every second, fourth .. line: a power of 2 */
    int go_on;         /* the sums start at what y holds, else at 0 */
    size_t x_step;     /* PAIRS: floats from 16 pairs of x to its next 16 */
    int scales;        /* Q8: bytes from a strip of keys or a value to its scales */
    int strip;         /* Q8: number of the first strip in the value */
};

/* y[j][16 strip + lane] = sum of x[j][k] * line k of the strip [lane], for n rows j; k ascends,
 * and each product and sum round once together (add_product).  With LINES_PAIRS, which only the
 * matrix class uses, x and the lines hold pairs of bf16, multiplied pair by pair. */
typedef void add_lines_fn(const struct lines *lines, const float *x, size_t ldx, int n, float *y,
                          size_t ldy);

/* One tile of weights or two, 16 rows each, of one type. */
struct tiles {
    const uint8_t *data[2];
    int n;
    uint32_t type, cols;
    int more;         /* the matrix class: pairs of tiles that follow, so many bytes apart */
    size_t next_pair;
};

/* y[token][tile][row] = sum over inputs of w[row][input] * x[t + token][input], for n tokens
 * from t on.
 *   int8_tile   one tile, n <= 16
 *   int8_panel  a panel: two tiles, unpacked once for n <= 256
 *   bf16_panel  the same for one pair of tiles or several, each pair's y MAX_PANEL_ROWS tokens
 *               behind the one before.  t is a multiple of 16; whole groups of 16 tokens are
 *               written. */
typedef void product_fn(const struct tiles *w, const struct input *in, size_t t, int n, float *y);

/* The matrix class: what gemma2_prefill uses where a CPU has units for bf16.
 *   avx512bf16   products of bf16 weights; quantised ones stay exact
 *   amx          products of bf16 and quantised weights; s * value is rounded to bf16, too
 *   both         attention over an f16 or q8 cache: keys, values and its weights
 * Inputs are rounded to bf16 and sums have another order, so results differ from the exact class
 * and between the two, but not with the number of threads or the way tokens are cut into
 * batches.  f32 weights and f32 caches never use it.  choose_matrix decides when a model is
 * opened: exact_prefill declines it. */
struct matrix_kernels {
    uint32_t types;  /* bit t: bf16_panel multiplies weights of type t, for any number of rows */
    int most_pairs;  /* pairs of tiles that bf16_panel takes at once */
    product_fn *bf16_panel;
    void (*pack_row)(const float *x, uint32_t n, uint16_t *pairs);
    /* a strip of 16 keys to `to`, 16 values to positions at, at + 1 .. of `to`; values from
     * n_valid on become 0 */
    void (*pack_keys)(const struct lines *keys, uint8_t *to);
    void (*pack_values)(const struct lines *values, int n_valid, int at, uint8_t *to);
    /* s[j][16 strip + lane] = q[j] . key, for n <= 8 queries q[n][H] */
    void (*score_keys)(const float *q, int n, int head_dim, const uint8_t *keys, int n_strips,
                       float (*s)[KEY_BLOCK]);
    /* o[n][H] = sum of s[j][i] * value i, for the n_keys from position `first` on */
    void (*mix_values)(const float (*s)[KEY_BLOCK], int n, int head_dim, const uint8_t *values,
                       int first, int n_keys, float *o);
};

/* Positions that PACKED_BYTES bytes of packed keys or values hold. */
INLINE int packed_positions(int head_dim)
{
    int n = PACKED_BYTES / (head_dim * TILE * (int)sizeof(uint16_t)) * TILE;
    return n < KEY_BLOCK ? n : KEY_BLOCK;
}

/* One instruction set. */
struct kernels {
    const char *name;
    int (*available)(void);
    add_lines_fn *add_lines;
    product_fn *int8_tile, *int8_panel; /* of quantised weights, see product_fn; int8_panel may be
                                         * NULL: then int8_tile does all */
    size_t tile_rows; /* rows of a pass up to which int8_tile costs less than int8_panel */
    void (*quantise)(const float *x, uint32_t n, int8_t *q, float *scale, int32_t *sum);
    void (*rms_norm)(const float *x, const float *w, float eps, uint32_t n, float *y);
    void (*geglu)(float *gate, const float *up, size_t n);
    void (*soft_cap)(float *x, size_t n, float cap);
    float (*exp_sum)(float *x, size_t n, float max);
    void (*blend)(float *x, float keep, const float *y, float scale, size_t n);
    void (*to_f16)(const float *x, size_t n, uint16_t *y);
    const struct matrix_kernels *matrix; /* or NULL */
};

/* ---- half floats of the cache: to nearest even, saturating at 65504, NaN kept ---- */

INLINE uint16_t f16_of(float x)
{
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, a = bits & 0x7fffffff;
    uint32_t capped = a < 0x477fe000 ? a : 0x477fe000;
    uint32_t small = bits_of(float_of(capped) + 0.5f) - 0x3f000000; /* below 2^-14 */
    uint32_t normal = (capped - 0x38000000 + 0xfff + (capped >> 13 & 1)) >> 13;
    uint32_t half = capped < 0x38800000 ? small : normal;
    return (uint16_t)(sign | (a > 0x7f800000 ? 0x7e00 : half));
}

INLINE float from_f16(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    float magnitude = float_of((uint32_t)(h & 0x7fff) << 13) * 0x1p112f;
    uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    return float_of(sign | special | bits_of(magnitude));
}

INLINE void to_f16(const float *x, size_t n, uint16_t *y)
{
    for (size_t i = 0; i < n; i++)
        y[i] = f16_of(x[i]);
}

/* ---- products ---- */

/* sum + a * b, rounded once.  Without such an instruction: a * b is exact in double; the sum,
 * where it is not exact, is moved to the neighbour with an odd last bit that lies towards
 * the exact value, and then rounds to float as the exact value does. */
INLINE float add_product(float sum, float a, float b)
{
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, sum);
#else
    double product = (double)a * b, y = product + sum, part = y - product;
    double error = (product - (y - part)) + (sum - part); /* y + error is exact */
    int64_t bits, towards = (error > 0) == (y > 0) ? 1 : -1;
    memcpy(&bits, &y, sizeof bits);
    bits += (error > 0 || error < 0) && !(bits & 1) ? towards : 0;
    memcpy(&y, &bits, sizeof y);
    return (float)y;
#endif
}

/* Q8: the scales of line k's 16 keys, or the one scale of its dimensions; `data` is the strip. */
INLINE const uint16_t *scales_of(enum line_type type, const struct lines *l, const uint8_t *data,
                                 int strip, int k)
{
    const uint8_t *scales = data + l->scales;
    scales += type == LINES_KEYS_Q8 ? k / GROUP * TILE * 2
                                    : k * (int)l->line_bytes + strip / 2 * 2 - strip * TILE;
    return (const uint16_t *)scales;
}

/* Number `lane` of line k of a strip. */
INLINE float line_number(const struct lines *l, int strip, int k, int lane)
{
    const uint8_t *data = l->data + strip * l->strip_bytes;
    const uint8_t *line = data + (size_t)(l->type == LINES_BF16 ? k / 2 : k) * l->line_bytes;
    if (l->type == LINES_F32)
        return ((const float *)line)[lane];
    if (l->type == LINES_F16)
        return from_f16(((const uint16_t *)line)[lane]);
    if (l->type == LINES_BF16)
        return from_bf16(((const uint16_t *)line)[2 * lane + k % 2]);
    const uint16_t *scales = scales_of(l->type, l, data, l->strip + strip, k);
    return from_f16(scales[l->type == LINES_KEYS_Q8 ? lane : 0]) * (float)(int8_t)line[lane];
}

/* y = y + x * number, rounded once; lines ascend. */
static void add_lines(const struct lines *l, const float *x, size_t ldx, int n, float *y,
                      size_t ldy)
{
    for (int strip = 0; strip < l->n_strips; strip++)
        for (int k = 0; k < l->n_lines; k++) {
            float line[TILE];
            for (int r = 0; r < TILE; r++)
                line[r] = line_number(l, strip, k, r);
            for (int j = 0; j < n; j++) {
                float *to = y + (size_t)j * ldy + strip * TILE;
                for (int r = 0; r < TILE; r++)
                    to[r] = add_product(k || l->go_on ? to[r] : 0, line[r],
                                        x[(size_t)j * ldx + (size_t)k]);
            }
        }
}

/* Quantised weights.  Per group of 32 inputs, ascending:
 *     sum = sum of v * q           an exact integer
 *     y   = y + x_scale * float(s * sum), rounded once
 * and in the end y = S * y. */
static void int8_tile(const struct tiles *w, const struct input *in, size_t t, int n, float *y)
{
    size_t n_groups = round_up(w->cols, BLOCK_INPUTS) / GROUP, groups_a_row = in->ldq / GROUP;
    memset(y, 0, (size_t)n * TILE * sizeof *y);
    for (size_t g = 0; g < n_groups; g++) {
        int8_t v[GROUP][TILE];
        int32_t s[TILE];
        const uint8_t *scale_bytes, *group = group_at(w->type, w->data[0], g, &scale_bytes);
        unpack_group(w->type, group, scale_bytes, v, s);
        for (int i = 0; i < n; i++) {
            const int8_t *q = in->q + (t + (size_t)i) * in->ldq + g * GROUP;
            float x_scale = in->scale[(t + (size_t)i) * groups_a_row + g];
            int32_t sum[TILE] = {0};
            for (int k = 0; k < GROUP; k++)
                for (int r = 0; r < TILE; r++)
                    sum[r] += v[k][r] * q[k];
            for (int r = 0; r < TILE; r++)
                y[i * TILE + r] = add_product(y[i * TILE + r], x_scale, (float)(s[r] * sum[r]));
        }
    }
    for (int i = 0; i < n * TILE; i++)
        y[i] *= ((const float *)w->data[0])[i % TILE];
}

/* Weights of any type.  Floats are lines, inputs ascending from 0, with many tokens in steps of
 * inputs that stay in the fastest cache.  With 4 rows and more bf16 waits for memory unless every
 * line is asked for. */
static void multiply_tiles(const struct kernels *isa, const struct tiles *w,
                           const struct input *in, size_t t, int n, float *y)
{
    if (is_quantised(w->type)) {
        (w->n == 2 ? isa->int8_panel : isa->int8_tile)(w, in, t, n, y);
        return;
    }
    int is_bf16 = w->type == TYPE_BF16, cols = (int)w->cols;
    int step = n > MAX_PRODUCT_ROWS ? BLOCK_INPUTS : cols;
    int soon = is_bf16 && n >= 4, every = soon ? 64 : PREFETCH_EVERY;
    struct lines lines = {.data = w->data[0], .type = is_bf16 ? LINES_BF16 : LINES_F32,
                          .n_strips = w->n, .line_bytes = TILE * 4,
                          .prefetch = soon ? PREFETCH_SOON : PREFETCH_AHEAD,
                          .every = every / (is_bf16 ? 32 : 64)};
    lines.strip_bytes = w->n == 2 ? w->data[1] - w->data[0] : 0;
    for (int k = 0; k < cols; k += step) {
        lines.n_lines = min_i32(step, cols - k);
        isa->add_lines(&lines, in->x + t * in->ldx + k, in->ldx, n, y, (size_t)w->n * TILE);
        lines.data += step * (is_bf16 ? 32 : 64), lines.go_on = 1;
    }
}

/* The 32 inputs of a group: scale = max|x| / 127, q = x * (127 / max|x|) rounded to
 * nearest even (adding 1.5 * 2^23 leaves the integer in the low bits).  Groups below 1e-30
 * count as zero; NaN and infinity go into the scale. */
INLINE void quantise_group(const float *x, int8_t *q, float *scale, int32_t *sum)
{
    uint32_t max = 0;
    for (int i = 0; i < GROUP; i++) {
        uint32_t magnitude = bits_of(x[i]) & 0x7fffffff;
        max = magnitude > max ? magnitude : max;
    }
    float absmax = float_of(max);
    float inverse = absmax < 1e-30f ? 0.0f : 127.0f / absmax;
    *scale = absmax < 1e-30f ? 0.0f : absmax / 127.0f;
    int32_t total = 0;
    for (int i = 0; i < GROUP; i++) {
        float v = x[i] * inverse;
        v = v < 127.0f ? v : 127.0f;
        v = v > -127.0f ? v : -127.0f;
        int32_t rounded = (int32_t)(bits_of(v + 12582912.0f) - bits_of(12582912.0f));
        q[i] = (int8_t)rounded;
        total += rounded;
    }
    *sum = total;
}

/* A row of n inputs, zero to the next multiple of 256. */
INLINE void quantise(const float *x, uint32_t n, int8_t *q, float *scale, int32_t *sum)
{
    size_t g = 0, padded = round_up(n, BLOCK_INPUTS) / GROUP;
    for (; g < n / GROUP; g++)
        quantise_group(x + g * GROUP, q + g * GROUP, scale + g, sum + g);
    for (; g < padded; g++) {
        float rest[GROUP] = {0};
        if (g * GROUP < n)
            memcpy(rest, x + g * GROUP, (n - g * GROUP) * sizeof *rest);
        quantise_group(rest, q + g * GROUP, scale + g, sum + g);
    }
}

/* ---- exp and tanh: the engine's own, because libraries differ ---- */

/* exp(x) within 1.1 units in the last place; 0 below -87.3, at least 2.4e38 above 88.4;
 * exp(0) = 1; NaN stays NaN.  exp(x) = 2^n exp(r) with r = x - n ln 2, |r| <= 0.3466. */
INLINE float exp_f32(float x)
{
    float clamped = x < 88.4f ? x : 88.4f;
    clamped = x != x ? x : clamped < -87.3f ? -87.3f : clamped;
    float shifted = clamped * 1.44269504f + 12582912.0f; /* n in the low bits */
    float n = shifted - 12582912.0f;
    float r = clamped - n * 0.693359375f; /* ln 2 in two parts; the first product is exact */
    r = r + n * 2.12194440e-4f;
    float p = 1.39262134e-3f;
    p = p * r + 8.36320297e-3f;
    p = p * r + 4.16665544e-2f;
    p = p * r + 1.66665768e-1f;
    p = p * r + 0.5f;
    p = (r * r) * p + r + 1.0f;
    float y = float_of(bits_of(p) + (bits_of(shifted) << 23));
    y = x != x ? x : y;
    return x < -87.3f ? 0.0f : y;
}

/* tanh(x) for |x| < 0.625. */
INLINE float tanh_small(float x)
{
    float z = x * x, p = -6.09671417e-3f;
    p = p * z + 2.09971790e-2f;
    p = p * z + -5.38509096e-2f;
    p = p * z + 1.33327697e-1f;
    p = p * z + -3.33333289e-1f;
    return (p * z) * x + x;
}

/* tanh(x) within 1.5 units in the last place: an odd polynomial below 0.625, above that
 * 1 - 2 / (exp(2|x|) + 1), with the sign of x; NaN stays NaN. */
INLINE float tanh_f32(float x)
{
    float a = float_of(bits_of(x) & 0x7fffffff), p = tanh_small(x);
    float capped = a < 20.0f ? a : 20.0f;
    float big = 1.0f - 2.0f / (exp_f32(capped + capped) + 1.0f);
    big = float_of(bits_of(big) | (bits_of(x) & 0x80000000));
    big = a != a ? a : big;
    return a < 0.625f ? p : big;
}

/* gate = gelu(gate) * up with the tanh form, 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
 * (transformers gelu_pytorch_tanh; gemma_pytorch F.gelu(approximate="tanh")). */
INLINE void geglu(float *gate, const float *up, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        float x = gate[i];
        float inner = 0.797884561f * (x + 0.044715f * (x * x * x));
        gate[i] = 0.5f * x * (1.0f + tanh_f32(inner)) * up[i];
    }
}

/* x = cap * tanh(x / cap); the division is a product with the rounded 1 / cap.  Few scores
 * and logits are large, so 64 small ones in a row are spared the other half of tanh.  (Loops of
 * 16 would be unrolled before compilers look for vectors.) */
INLINE void soft_cap(float *x, size_t n, float cap)
{
    const float inverse = 1.0f / cap;
    for (size_t many; n; n -= many, x += many) {
        uint32_t largest = 0; /* magnitude as bits, which rise with it and end in NaN */
        many = n < 64 ? n : 64;
        for (size_t i = 0; i < many; i++) {
            x[i] *= inverse;
            uint32_t magnitude = bits_of(x[i]) & 0x7fffffff;
            largest = magnitude > largest ? magnitude : largest;
        }
        if (largest < 0x3f200000) /* 0.625 */
            for (size_t i = 0; i < many; i++)
                x[i] = cap * tanh_small(x[i]);
        else
            for (size_t i = 0; i < many; i++)
                x[i] = cap * tanh_f32(x[i]);
    }
}

/* ---- sums over a vector: 16 partial sums, element i in sum i % 16, then halving ---- */

INLINE float add_lanes(const float lane[TILE])
{
    float a[8], b[4];
    for (int i = 0; i < 8; i++)
        a[i] = lane[i] + lane[i + 8];
    for (int i = 0; i < 4; i++)
        b[i] = a[i] + a[i + 4];
    return (b[0] + b[2]) + (b[1] + b[3]);
}

/* x[i] = exp(x[i] - max); returns their sum. */
INLINE float exp_sum(float *x, size_t n, float max)
{
    float lane[TILE] = {0};
    size_t i = 0;
    for (; i + TILE <= n; i += TILE)
        for (int r = 0; r < TILE; r++) {
            x[i + (size_t)r] = exp_f32(x[i + (size_t)r] - max);
            lane[r] += x[i + (size_t)r];
        }
    for (int r = 0; i < n; i++, r++) {
        x[i] = exp_f32(x[i] - max);
        lane[r] += x[i];
    }
    return add_lanes(lane);
}

/* x = x * keep + y * scale */
INLINE void blend(float *x, float keep, const float *y, float scale, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = x[i] * keep + y[i] * scale;
}

/* y = x / sqrt(mean(x^2) + eps) * (1 + w): Gemma scales by 1 + w, and multiplies before
 * anything is rounded to fewer bits (transformers Gemma2RMSNorm).  y may be x. */
INLINE void rms_norm(const float *x, const float *w, float eps, uint32_t n, float *y)
{
    float lane[TILE] = {0};
    uint32_t i = 0;
    for (; i + TILE <= n; i += TILE)
        for (uint32_t r = 0; r < TILE; r++)
            lane[r] += x[i + r] * x[i + r];
    for (uint32_t r = 0; i < n; i++, r++)
        lane[r] += x[i] * x[i];
    float scale = 1.0f / sqrtf(add_lanes(lane) / (float)n + eps);
    for (i = 0; i < n; i++)
        y[i] = x[i] * scale * (1.0f + w[i]);
}

static int always(void) { return 1; }

static const struct kernels scalar_kernels = {
    .name = "scalar", .available = always, .add_lines = add_lines, .int8_tile = int8_tile,
    .quantise = quantise, .rms_norm = rms_norm, .geglu = geglu, .soft_cap = soft_cap,
    .exp_sum = exp_sum, .blend = blend, .to_f16 = to_f16};

static const struct kernels *select_kernels(struct errbuf *err);
static sha256_fn *fast_sha256(void); /* appendix */

/* An instruction set's matrix class; NULL where the system refuses its registers.  A permission,
 * once granted, stays with the process.  In the appendix. */
static const struct matrix_kernels *permitted_matrix(const struct matrix_kernels *wanted);

/* A running log-sum-exp over blocks of logits. */
struct log_sum {
    float max, target; /* target: the logit asked for */
    double sum;
};

/* Adds n <= HEAD_BLOCK logits, which are overwritten. */
static void log_sum_add(struct log_sum *s, float *x, size_t n,
                        float (*exp_sum_fn)(float *, size_t, float))
{
    float max = x[0];
    for (size_t i = 1; i < n; i++)
        max = x[i] > max ? x[i] : max;
    if (max > s->max) {
        s->sum *= exp_f32(s->max - max);
        s->max = max;
    }
    s->sum += exp_sum_fn(x, n, s->max);
}

/* ln x for finite x >= 1e-300: x = 2^e m, m in [0.7, 1.42), ln m = 2 atanh((m-1)/(m+1)). */
static double log_f64(double x)
{
    int e;
    double m = frexp(x, &e);
    if (m < 0.7071067811865476)
        m *= 2, e--;
    double z = (m - 1) / (m + 1), z2 = z * z, sum = 0;
    for (int i = 21; i >= 1; i -= 2)
        sum = sum * z2 + 1.0 / i;
    return e * 0.6931471805599453 + 2 * z * sum;
}

/* e^x for |x| < 700, within 4e-16 of its value: e^x = 2^n e^r, r by Taylor's series. */
static double exp_f64(double x)
{
    double n = floor(x * 1.4426950408889634 + 0.5), sum = 1;
    double r = x - n * 0x1.62e42fee00000p-1 - n * 0x1.a39ef35793c76p-33;
    for (int i = 16; i >= 1; i--)
        sum = 1 + sum * r / i;
    return ldexp(sum, (int)n);
}

static float log_sum_end(const struct log_sum *s)
{
    return (float)((double)s->target - (double)s->max - log_f64(s->sum));
}

/* cos and sin of x >= 0: x less k pi/2 (in three parts, so that k < 2^20 loses nothing),
 * then Taylor series on [-pi/4, pi/4]; within 1e-14 before rounding to float. */
static void cos_sin(double x, float *cosine, float *sine)
{
    double k = floor(x * 0.6366197723675814 + 0.5);
    double r = x - k * 0x1.921fb544p+0 - k * 0x1.0b4611a6p-34 - k * 0x1.3198a2e037073p-69;
    double z = r * r, c = 0, s = 0;
    for (int i = 16; i >= 0; i -= 2) {
        c = i == 16 ? 1 : 1 - c * z / ((i + 1) * (i + 2));
        s = i == 16 ? 1 : 1 - s * z / ((i + 2) * (i + 3));
    }
    double sn = s * r;
    switch ((int64_t)k & 3) {
    case 0: *cosine = (float)c, *sine = (float)sn; break;
    case 1: *cosine = (float)-sn, *sine = (float)c; break;
    case 2: *cosine = (float)-c, *sine = (float)-sn; break;
    default: *cosine = (float)sn, *sine = (float)-c; break;
    }
}

/* ===================================================================================
 * 4. The pass: sharing of work, the only OpenMP of the file
 *
 * All threads of a pass run the same program, each on its own, with its own copy of what
 * the program remembers.  What changes memory of all happens in phases of tasks: share()
 * draws tasks from a common count until the phase has none left, and waits for those that
 * other threads still do.  Within a pass nobody waits for a thread that has no task: a thread
 * that lost its processor finds no tasks left and skips ahead until it catches up.
 * =================================================================================== */

/* The floating-point environment the specification assumes: round to nearest even,
 * denormals kept, no traps.  If a host has set another environment, it gets that back. */
#ifdef __x86_64__ /* MinGW's fesetenv leaves denormals alone */
typedef unsigned float_env;

static float_env float_env_enter(void)
{
    float_env old = _mm_getcsr();
    _mm_setcsr(0x1f80);
    return old;
}

static void float_env_leave(float_env old) { _mm_setcsr(old); }
#else
typedef fenv_t float_env;

static float_env float_env_enter(void)
{
    float_env old;
    fegetenv(&old);
    fesetenv(FE_DFL_ENV);
    return old;
}

static void float_env_leave(float_env old) { fesetenv(&old); }
#endif

typedef void task_fn(void *context, size_t task);

struct member;
typedef void program_fn(struct member *me, void *context);

struct team {
    _Alignas(64) _Atomic size_t drawn; /* tasks given out, of all phases so far */
    _Alignas(64) _Atomic size_t done;  /* tasks finished */
    program_fn *program;
    void *context;
    _Atomic int is_through; /* a thread has reached the program's end */
};

/* One thread's place in the program. */
struct member {
    struct team *team; /* NULL: the thread is alone */
    int index;         /* 0: the thread that called */
    size_t first;      /* tasks of all phases that this thread has met so far */
};

/* A moment's wait: a thread that waits long lets others have the processor. */
static void wait_turn(int *turns)
{
    enum { SPINS = 200, YIELDS = 2000 }; /* about ten microseconds; some milliseconds */
    if (++*turns < SPINS) {
#ifdef HAVE_X86
        _mm_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
        return;
    }
#if defined(_WIN32)
    *turns < SPINS + YIELDS ? (void)SwitchToThread() : Sleep(1);
#elif defined(HAVE_MMAP)
    if (*turns < SPINS + YIELDS)
        sched_yield();
    else
        nanosleep(&(struct timespec){0, 50000}, NULL);
#endif
}

/* Ends a phase of n tasks: returns when all of them are done. */
static void end_phase(struct member *me, size_t n)
{
    int turns = 0;
    while (atomic_load_explicit(&me->team->done, memory_order_acquire) - me->first < n)
        wait_turn(&turns);
    me->first += n;
}

/* One phase: tasks 0 .. n - 1, in any order and by any thread.  Tasks write to places of
 * their own, so their order and owner cannot show in a result. */
static void share(struct member *me, size_t n, task_fn *task, void *context)
{
    if (!me->team) {
        for (size_t i = 0; i < n; i++)
            task(context, i);
        return;
    }
    size_t drawn = atomic_load_explicit(&me->team->drawn, memory_order_relaxed);
    while (drawn - me->first < n)
        if (atomic_compare_exchange_weak_explicit(&me->team->drawn, &drawn, drawn + 1,
                                                  memory_order_relaxed, memory_order_relaxed)) {
            task(context, drawn - me->first);
            atomic_fetch_add_explicit(&me->team->done, 1, memory_order_release);
            drawn = atomic_load_explicit(&me->team->drawn, memory_order_relaxed);
        }
    end_phase(me, n);
}

/* A phase of one task, which the calling thread has done by now. */
static void await_caller(struct member *me)
{
    if (me->team && me->index == 0) {
        atomic_fetch_add_explicit(&me->team->drawn, 1, memory_order_relaxed);
        atomic_fetch_add_explicit(&me->team->done, 1, memory_order_release);
    }
    if (me->team)
        end_phase(me, 1);
}

/* A thread of the team: OpenMP's or the host's. */
static void join_team(void *argument, int32_t index)
{
    struct team *team = argument;
    struct member me = {team, index, 0};
    float_env env = float_env_enter();
    team->program(&me, team->context);
    float_env_leave(env);
    team->is_through = 1;
}

/* Runs the program on a team of up to n_threads.  One thread never enters OpenMP.  No thread
 * waits for a thread that has not come, so a host may run fewer than asked for, at any time and in
 * any order.  If it runs none, the caller does all. */
static void run_team(const gemma2_worker *work, int n_threads, program_fn *program, void *context)
{
    if (n_threads == 1) {
        program(&(struct member){NULL, 0, 0}, context);
        return;
    }
    struct team team = {.program = program, .context = context};
    if (work->run)
        work->run(work->run_context, n_threads, join_team, &team);
    else {
#ifdef _OPENMP
#pragma omp parallel num_threads(n_threads)
        join_team(&team, omp_get_thread_num());
#endif
    }
    if (!team.is_through)
        join_team(&team, 0);
}

/* Seconds since some moment. */
static double clock_now(void)
{
#ifdef _WIN32
    LARGE_INTEGER ticks, a_second;
    QueryPerformanceCounter(&ticks), QueryPerformanceFrequency(&a_second);
    return (double)ticks.QuadPart / (double)a_second.QuadPart;
#else
    struct timespec t = {0, 0};
#if defined(HAVE_MMAP)
    clock_gettime(CLOCK_MONOTONIC, &t);
#elif defined(TIME_UTC)
    timespec_get(&t, TIME_UTC);
#endif
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
#endif
}

static double processor_quota(const char *root); /* section 9 */

/* As many as the processors that this process may use (the system's affinity mask), and no
 * more than its control group's quota pays for. */
static int default_threads(void)
{
    int n = 1;
#if defined(_OPENMP)
    n = omp_get_num_procs();
#elif defined(HAVE_MMAP)
    n = (int)sysconf(_SC_NPROCESSORS_ONLN);
#elif defined(_WIN32)
    n = (int)GetActiveProcessorCount(ALL_PROCESSOR_GROUPS);
#endif
    double quota = n > 1 ? processor_quota("") : 0;
    if (quota > 0 && quota < n)
        n = (int)(quota + 0.5);
    return min_i32(max_i32(n, 1), 1024);
}

/* ---- the cache, a session's memory and a worker's: one function counts and places ----
 * Cache.  A layer keeps, for each kv head, R slots; position p lives in slot p % R.  R is
 * the context in a global layer; in a local one window + largest batch, so that the first
 * row of a batch still finds its window when the last one is stored.  If that is shorter than
 * the context there are 16 slots more, so that drafts that turn out wrong (section 7) have
 * overwritten nothing in a window.  Slots come in strips of 16:
 *     keys   [R / 16][H][16 slots]     a dot product runs down H, 16 keys in the lanes
 *     values [R / 16][16 slots][H']    H' = H rounded up to 16, 16 dimensions in the lanes */

struct arena {
    uint8_t *base; /* NULL: only count */
    size_t used;
    int overflow;
};

static void *take(struct arena *a, size_t n, size_t bytes)
{
    size_t total, end;
    if (__builtin_mul_overflow(n, bytes, &total) || total > SIZE_MAX / 2 ||
        __builtin_add_overflow(a->used, round_up(total, 64), &end)) {
        a->overflow = 1;
        return NULL;
    }
    void *p = a->base ? a->base + a->used : NULL;
    a->used = end;
    return p;
}

enum { SPLIT_ROWS = 4 }; /* rows whose attention may be split over blocks of positions */

/* The floats of one block of one row's split attention: per query head max, sum, o[H']. */
static size_t partial_floats(const gemma2_model *m)
{
    size_t width = round_up((size_t)m->config.head_dim, TILE);
    return (size_t)m->config.n_heads * (width + TILE);
}

static void place_scratch(gemma2_worker *work, struct arena *a)
{
    const gemma2_config *c = &work->model->config;
    size_t b = (size_t)work->n_batch, d = (size_t)c->d_model, heads = (size_t)dimension(c, 'q');
    size_t f = (size_t)c->d_ffn, kv = (size_t)dimension(c, 'k'), v = (size_t)c->n_vocab;
    size_t widest = d > heads ? d : heads;
    work->ldq = round_up(widest > f ? widest : f, BLOCK_INPUTS);
    work->partial_rows = (size_t)min_i32(work->n_batch, SPLIT_ROWS);
    work->rows = take(a, b, sizeof *work->rows);
    work->wanted = take(a, b, sizeof *work->wanted);
    work->x = take(a, b, d * sizeof(float));
    work->normed = take(a, b, d * sizeof(float));
    work->q = take(a, b, heads * sizeof(float));
    work->k = take(a, b, kv * sizeof(float));
    work->v = take(a, b, kv * sizeof(float));
    work->attended = take(a, b, heads * sizeof(float));
    work->gated = take(a, b, f * sizeof(float));
    if (work->model->is_reference)
        work->up = take(a, f, sizeof(float));
    work->added = take(a, b, d * sizeof(float));
    work->cosine = take(a, b * (size_t)c->head_dim / 2, sizeof(float));
    work->sine = take(a, b * (size_t)c->head_dim / 2, sizeof(float));
    work->inverse_frequency = take(a, (size_t)c->head_dim / 2, sizeof(float));
    if (work->model->matrix)
        work->in_bf16 = take(a, round_up(b, TILE), work->ldq * sizeof *work->in_bf16);
    work->in_q = take(a, b, work->ldq);
    work->in_scale = take(a, b, work->ldq / GROUP * sizeof(float));
    work->in_sum = take(a, b, work->ldq / GROUP * sizeof(int32_t));
    work->log_sums = take(a, b, sizeof *work->log_sums);
    work->targets = take(a, b, sizeof *work->targets);
    work->partial_blocks = ((size_t)work->n_context + KEY_BLOCK - 1) / KEY_BLOCK + 1;
    work->partial = take(a, work->partial_blocks,
                         work->partial_rows * partial_floats(work->model) * sizeof(float));
    if (work->model->matrix && work->model->matrix->most_pairs > 1)
        work->pair_sums = take(a, (size_t)(work->n_threads * work->model->matrix->most_pairs),
                               MAX_PANEL_ROWS * sizeof *work->pair_sums);
    size_t log_sums = b * HEAD_BLOCK * sizeof(float), sampling = v * sizeof(uint64_t);
    work->candidates = take(a, log_sums > sampling ? log_sums : sampling, 1);
    work->adjusted = take(a, v, sizeof(float));
}

/* Bytes of a number in the cache. */
static size_t number_bytes(const gemma2_session *s)
{
    return s->cache_type == GEMMA2_CACHE_F32 ? 4 : s->cache_type == GEMMA2_CACHE_F16 ? 2 : 1;
}

/* Bytes of a position's key or value of one head. */
static size_t position_bytes(const gemma2_session *s, int32_t width)
{
    size_t groups = s->cache_type == GEMMA2_CACHE_Q8 ? ((size_t)width + GROUP - 1) / GROUP : 0;
    return (size_t)width * number_bytes(s) + groups * sizeof(uint16_t);
}

static size_t head_bytes(const gemma2_session *s, const struct layer_cache *c, int values)
{
    return (size_t)c->slots * position_bytes(s, values ? s->width : s->model->config.head_dim);
}

/* Returns the bytes of the cache alone. */
static size_t place_cache(gemma2_session *s, struct arena *a)
{
    const gemma2_config *c = &s->model->config;
    size_t before = a->used;
    for (int l = 0; l < c->n_layers; l++) {
        struct layer_cache layer = {NULL, NULL, 0};
        int64_t slots = s->n_context;
        int wraps = c->is_local[l] && (int64_t)s->window + s->n_batch < slots;
        if (wraps)
            slots = (int64_t)s->window + s->n_batch;
        layer.slots = (int32_t)round_up((size_t)slots, TILE);
        if (c->is_local[l])
            s->ring = layer.slots;
        if (wraps)
            layer.slots += (int32_t)round_up(MAX_DRAFTS, TILE);
        layer.keys = take(a, (size_t)c->n_kv_heads, head_bytes(s, &layer, 0));
        layer.values = take(a, (size_t)c->n_kv_heads, head_bytes(s, &layer, 1));
        if (a->base)
            s->cache[l] = layer;
    }
    return a->used - before;
}

/* Lays out a worker, or a session and its own worker, in one block, the structs first.  With base
 * NULL it only counts.  A session that was given a worker has no other. */
static int place_all(gemma2_session *s, gemma2_worker *work, uint8_t *base, gemma2_plan *plan)
{
    struct arena a = {base, 0, 0};
    *plan = (gemma2_plan){.weights = work->model->config.file_bytes};
    if (s) {
        take(&a, 1, sizeof *s);
        s->cache = take(&a, (size_t)s->model->config.n_layers, sizeof *s->cache);
        s->ids = take(&a, (size_t)s->n_context, sizeof *s->ids);
    }
    if (!s || !s->worker) {
        gemma2_worker *own = take(&a, 1, sizeof *own);
        place_scratch(work, &a);
        if (s)
            s->worker = own;
    }
    if (s)
        plan->cache = place_cache(s, &a);
    plan->total = a.used;
    plan->scratch = plan->total - plan->cache;
    return a.overflow ? GEMMA2_ERR_ARGUMENT : GEMMA2_OK;
}

static int all_weights_f32(const gemma2_model *m)
{
    for (uint32_t i = 0; i < m->n_sections; i++) {
        struct entry e = get_entry(m->directory, i);
        if (find_role(e.role) && e.type > TYPE_F32)
            return 0;
    }
    return 1;
}

/* Fills in the defaults and checks the ranges. */
static int read_worker_params(gemma2_worker *work, const gemma2_model *m,
                              const gemma2_worker_params *given)
{
    gemma2_worker_params p;
    gemma2_worker_params_init(&p);
    if (given && !copy_params(&p, sizeof p, given, given->struct_size,
                              offsetof(gemma2_worker_params, run)))
        return GEMMA2_ERR_ARGUMENT;
    memset(work, 0, sizeof *work);
    work->model = m;
    work->n_batch = p.n_batch ? p.n_batch : 256;
    work->n_context = p.n_context ? p.n_context : m->config.n_context;
    work->n_threads = p.n_threads ? p.n_threads : default_threads();
    work->run = p.run;
    work->run_context = p.run_context;
    if (!m->config.n_layers || work->n_batch < 1 || work->n_batch > 4096 || work->n_threads < 1 ||
        work->n_threads > 1024 || work->n_context < 1 || work->n_context > 1 << 30)
        return GEMMA2_ERR_ARGUMENT;
    if (!p.run)
        work->n_threads = gemma2_threads(work->n_threads);
    return GEMMA2_OK;
}

/* The same for a session, and for the worker of its own if it is given none. */
static int read_session_params(gemma2_session *s, gemma2_worker *work, const gemma2_model *m,
                               const gemma2_session_params *given)
{
    gemma2_session_params p;
    gemma2_session_params_init(&p);
    if (given && !copy_params(&p, sizeof p, given, given->struct_size,
                              offsetof(gemma2_session_params, worker)))
        return GEMMA2_ERR_ARGUMENT;
    const gemma2_config *c = &m->config;
    memset(s, 0, sizeof *s);
    s->model = m;
    s->worker = p.worker;
    s->n_context = p.n_context ? p.n_context : c->n_context;
    s->n_batch = p.n_batch ? p.n_batch : min_i32(256, s->n_context);
    s->window = p.window ? p.window : c->window;
    s->cache_type = p.cache_type        ? p.cache_type
                    : all_weights_f32(m) ? GEMMA2_CACHE_F32
                                         : GEMMA2_CACHE_F16;
    s->width = (int32_t)round_up((size_t)c->head_dim, TILE);
    s->ring = INT32_MAX; /* no layer is local */
    if (s->window < 1 || s->window > c->window || p.cache_type < 0 ||
        p.cache_type > GEMMA2_CACHE_Q8)
        return GEMMA2_ERR_ARGUMENT;
    gemma2_worker_params own = {.struct_size = sizeof own, .n_batch = s->n_batch,
                                .n_threads = p.n_threads, .n_context = s->n_context};
    int status = read_worker_params(work, m, &own);
    return status == GEMMA2_OK && p.worker && p.worker->model != m ? GEMMA2_ERR_MISMATCH : status;
}

/* ---- a pass: n rows through all layers ---- */

static const struct row *nth_row(const struct pass *p, size_t t)
{
    return p->only ? p->only[t] : &p->worker->rows[t];
}

/* Where the residual stream and the queries of row t lie. */
static size_t place_of(const struct pass *p, size_t t)
{
    return (size_t)(nth_row(p, t) - p->worker->rows);
}

/* From here on only the rows count whose logits are wanted. */
static void keep_wanted(struct pass *p)
{
    p->only = p->worker->wanted;
    p->n = p->n_wanted;
    p->n_exact = p->wanted_exact;
}

static void share_rows(struct pass *p, task_fn *task) { share(p->me, p->n, task, p); }

/* Shows an activation [rows][cols] to the worker's hook, by the thread that called. */
static void trace(const struct pass *p, const char *name, int layer, float *data, size_t rows,
                  size_t cols)
{
    const gemma2_worker *work = p->worker;
    if (!work->hook)
        return;
    if (p->me->index == 0) {
        gemma2_activation a = {name, layer, rows, cols, data};
        work->hook(work->hook_context, &a);
    }
    await_caller(p->me);
}

static int uses_matrix(const struct pass *p, uint32_t type)
{
    return p->matrix && p->matrix->types >> type & 1;
}

static void norm(const struct pass *p, const struct tensor *w, const float *x, float *y)
{
    p->model->isa->rms_norm(x, (const float *)w->data, p->model->config.rms_norm_eps, w->rows, y);
}

/* ---- products ----
 * Up to three products over the same n rows, y[i] = W[i] x.  A task is a run of pairs of
 * tiles, because some kernels unpack two tiles for many rows at a time. */

struct product_job {
    const struct pass *pass;
    const struct tensor *norm; /* x is the norm of the residual stream; or NULL */
    float *x;                  /* [n][cols of W] */
    size_t n, n_exact;
    const struct tensor *w[3]; /* NULL behind the last */
    float *y[3];               /* [n][rows of W[i]] */
    int is_head;               /* y[0] goes to the logits of the rows */
    float cap;                 /* y[0] = cap * tanh(y[0] / cap), if above 0 */
    int is_gated;              /* y[0] = gelu(W[0] x) * W[1] x */
    const struct tensor *post_norm; /* leave_task norms y[0] by it before it is added */
    struct input in;
    size_t n_pairs, pairs_a_task, pairs_at_once;
};

/* Whether the matrix class multiplies row t.  Where a pass has rows of both classes, those of the
 * exact class come first. */
static int in_matrix(const struct product_job *job, uint32_t type, size_t t)
{
    return t >= job->n_exact && uses_matrix(job->pass, type);
}

static void multiply_in_class(const struct product_job *job, const struct tiles *w, size_t t, int n,
                              float *y)
{
    if (in_matrix(job, w->type, t))
        job->pass->matrix->bf16_panel(w, &job->in, t - job->n_exact, n, y);
    else
        multiply_tiles(job->pass->model->isa, w, &job->in, t, n, y);
}

/* y[i][which] of n <= 256 rows from t on, for a tile that no kernel takes with another.  The matrix
 * class takes two tiles: it gets this one twice. */
static void multiply_tile(const struct product_job *job, const struct tensor *w,
                          const uint8_t *tile, size_t t, int n, float (*y)[2][TILE], int which)
{
    _Alignas(64) float out[MAX_PRODUCT_ROWS * 2 * TILE]; /* [rows][one.n][16] */
    struct tiles one = {.data = {tile, tile}, .n = in_matrix(job, w->type, t) ? 2 : 1,
                        .type = w->type, .cols = w->cols};
    for (int first = 0; first < n; first += MAX_PRODUCT_ROWS) {
        int rows = min_i32(n - first, MAX_PRODUCT_ROWS);
        multiply_in_class(job, &one, t + (size_t)first, rows, out);
        for (int i = 0; i < rows; i++)
            memcpy(y[first + i][which], out + i * one.n * TILE, sizeof y[0][0]);
    }
}

/* Outputs of row t from row `row` of W[which] on. */
static float *output(const struct product_job *job, int which, size_t row, size_t t)
{
    return (job->is_head ? nth_row(job->pass, t)->logits
                         : job->y[which] + t * job->w[which]->rows) + row;
}

/* 16 of them; padding is left out. */
static void store_tile(const struct product_job *job, int which, size_t row, size_t t,
                       const float y[TILE])
{
    size_t rows = job->w[which]->rows;
    if (rows - row < TILE)
        memcpy(output(job, which, row, t), y, (rows - row) * sizeof *y);
    else
        memcpy(output(job, which, row, t), y, TILE * sizeof *y);
}

/* What a pair of tiles, the first of them `tile` of W[which], gave for row t. */
static void store_pair(const struct product_job *job, int which, size_t tile, size_t t, int both,
                       float y[2][TILE])
{
    if (job->is_gated)
        job->pass->model->isa->geglu(y[0], y[1], TILE);
    store_tile(job, which, tile * TILE, t, y[0]);
    if (both && !job->is_gated)
        store_tile(job, which, (tile + 1) * TILE, t, y[1]);
}

/* Pairs of tiles: two neighbours of W[which], or one of W[0] and its fellow of W[1].  Quantised
 * ones gain by being multiplied together only where they are unpacked for many rows.  Only the
 * last pair of W[which] may lack its second tile, and it comes alone. */
static void multiply_pairs(const struct product_job *job, int which, size_t pair, int n_pairs)
{
    _Alignas(64) float alone[MAX_PANEL_ROWS][2][TILE];
    const struct pass *p = job->pass;
    float (*y)[2][TILE] = alone; /* each pair's is MAX_PANEL_ROWS behind the one before */
    if (n_pairs > 1)
        y = p->worker->pair_sums + p->me->index * p->matrix->most_pairs * MAX_PANEL_ROWS;
    const struct tensor *w[2] = {job->w[which], job->w[job->is_gated ? 1 : which]};
    size_t step = job->is_gated ? 1 : 2, tile = step * pair; /* tiles from a pair to the next */
    int both = job->is_gated || (tile + 1) * TILE < w[0]->rows;
    struct tiles tiles = {.n = 2, .type = w[0]->type, .cols = w[0]->cols,
                          .next_pair = step * w[0]->tile_bytes};
    int same = both && w[0]->type == w[1]->type;
    int any_matrix = uses_matrix(p, w[0]->type) || uses_matrix(p, w[1]->type);
    size_t n_exact = any_matrix && job->n_exact < job->n ? job->n_exact : job->n;
    for (size_t t = 0, end; t < job->n; t = end) {
        end = t < n_exact ? n_exact : job->n;
        end = end - t < MAX_PANEL_ROWS ? end : t + MAX_PANEL_ROWS;
        int n = (int)(end - t), in_class = in_matrix(job, tiles.type, t);
        int together = same && (!is_quantised(tiles.type) || in_class ||
                                (p->model->isa->int8_panel && job->n > p->model->isa->tile_rows));
        tiles.more = together && in_class ? n_pairs - 1 : 0;
        for (int i = 0; i < n_pairs; i += 1 + tiles.more) {
            size_t at = tile + step * (size_t)i;
            tiles.data[0] = w[0]->data + at * w[0]->tile_bytes;
            tiles.data[1] = w[1]->data + (at + !job->is_gated) * w[1]->tile_bytes;
            if (together)
                multiply_in_class(job, &tiles, t, n, y[i * MAX_PANEL_ROWS][0]);
            else
                for (int k = 0; k < 1 + both; k++)
                    multiply_tile(job, w[k], tiles.data[k], t, n, y + i * MAX_PANEL_ROWS, k);
        }
        for (int i = 0; i < n_pairs; i++)
            for (int k = 0; k < n; k++)
                store_pair(job, which, tile + step * (size_t)i, t + (size_t)k, both,
                           y[i * MAX_PANEL_ROWS + k]);
    }
}

static size_t count_pairs(const struct product_job *job, int which)
{
    size_t a_pair = job->is_gated ? TILE : 2 * TILE;
    return (job->w[which]->rows + a_pair - 1) / a_pair;
}

static void product_task(void *context, size_t task)
{
    const struct product_job *job = context;
    size_t first = task * job->pairs_a_task, last = first + job->pairs_a_task, n;
    for (size_t i = first; i < last && i < job->n_pairs; i += n) {
        size_t pair = i;
        int which = 0;
        for (; pair >= count_pairs(job, which); which++)
            pair -= count_pairs(job, which);
        size_t whole = job->is_gated ? count_pairs(job, which) : job->w[which]->rows / (2 * TILE);
        n = job->pairs_at_once < last - i ? job->pairs_at_once : last - i;
        n = pair >= whole ? 1 : n < whole - pair ? n : whole - pair;
        multiply_pairs(job, which, pair, (int)n);
    }
    if (job->cap > 0) {
        size_t row = first * 2 * TILE, end = last * 2 * TILE, rows = job->w[0]->rows;
        for (size_t t = 0; t < job->n; t++)
            job->pass->model->isa->soft_cap(output(job, 0, row, t),
                                            (end < rows ? end : rows) - row, job->cap);
    }
}

/* Row t of x, for the weights that read it: rounded to int8 for quantised weights, to bf16 for
 * weights that the matrix class multiplies.  The first n_exact rows are of the exact class. */
static void prepare_task(void *context, size_t t)
{
    const struct product_job *job = context;
    const struct pass *p = job->pass;
    const struct input *in = &job->in;
    int as_int8 = 0, as_bf16 = 0;
    for (int i = 0; i < 3 && job->w[i]; i++)
        if (in_matrix(job, job->w[i]->type, t))
            as_bf16 = 1;
        else
            as_int8 |= is_quantised(job->w[i]->type);
    uint32_t cols = job->w[0]->cols;
    size_t groups = in->ldq / GROUP;
    float *x = job->x + t * cols;
    if (job->norm)
        norm(p, job->norm, p->worker->x + place_of(p, t) * cols, x);
    if (as_int8)
        p->model->isa->quantise(x, cols, in->q + t * in->ldq, in->scale + t * groups,
                                in->sum + t * groups);
    if (as_bf16)
        p->matrix->pack_row(x, cols, bf16_row(in, t - job->n_exact));
}

static void prepare(const struct pass *p, struct product_job *job)
{
    const gemma2_worker *work = p->worker;
    job->pass = p;
    job->in = (struct input){job->x, job->w[0]->cols, work->in_q, work->in_scale, work->in_sum,
                             work->in_bf16, work->ldq};
    job->n_exact = p->n_exact;
    share(p->me, job->n, prepare_task, job);
}

/* Tasks of up to 512 KB of weights: long streams, yet enough of them to share evenly.  Where many
 * rows make a pair long enough, a task is what is multiplied at once. */
static void multiply(const struct pass *p, struct product_job job)
{
    enum { MANY_ROWS = 64 };
    for (int i = 0; i < 3 && job.w[i] && !(i && job.is_gated); i++)
        job.n_pairs += count_pairs(&job, i);
    size_t fair = job.n_pairs / ((size_t)p->worker->n_threads * 4);
    size_t most = p->matrix ? (size_t)p->matrix->most_pairs : 1;
    job.pairs_at_once = fair < most ? fair + !fair : most;
    most = job.n >= MANY_ROWS ? job.pairs_at_once : (512 << 10) / (2 * job.w[0]->tile_bytes);
    job.pairs_a_task = most < fair ? most : fair;
    job.pairs_a_task += !job.pairs_a_task;
    share(p->me, (job.n_pairs + job.pairs_a_task - 1) / job.pairs_a_task, product_task, &job);
}

/* ---- the parts of attention that go row by row ---- */

/* What gemma2_importance sums up, by the product that reads it. */
enum { INPUT_Q, INPUT_O, INPUT_GATE, INPUT_DOWN, INPUTS_A_LAYER };

static const struct {
    const char *role;
    char cols;
} layer_inputs[INPUTS_A_LAYER] = {{"q", 'D'}, {"o", 'q'}, {"gate", 'D'}, {"down", 'F'}};

static void add_importance(const struct pass *p, int layer, int input, const float *x,
                           size_t cols); /* section 9 */

/* RoPE on one head: pairs (i, i + H/2) turn by the row's angles (half-split, as in
 * transformers apply_rotary_pos_emb), then times scale. */
static void rotate(float *x, size_t half, const float *cosine, const float *sine, float scale)
{
    for (size_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = (a * cosine[i] - b * sine[i]) * scale;
        x[i + half] = (b * cosine[i] + a * sine[i]) * scale;
    }
}

/* The cache of one kv head in one layer. */
struct kv_head {
    struct lines keys, values; /* all R / 16 strips of keys; all R lines of values */
    int32_t slots;
    int head_dim, width;
    float cap;
};

static struct kv_head kv_head_of(const gemma2_session *s, int layer, int head)
{
    static const enum line_type line_types[][2] = {
        [GEMMA2_CACHE_F32] = {LINES_F32, LINES_F32},
        [GEMMA2_CACHE_F16] = {LINES_F16, LINES_F16},
        [GEMMA2_CACHE_Q8] = {LINES_KEYS_Q8, LINES_VALUES_Q8}};
    const struct layer_cache *c = &s->cache[layer];
    const gemma2_config *config = &s->model->config;
    size_t line = TILE * number_bytes(s);
    struct kv_head kv = {.slots = c->slots, .head_dim = config->head_dim, .width = s->width,
                         .cap = config->attn_softcap};
    kv.keys = (struct lines){.data = c->keys + (size_t)head * head_bytes(s, c, 0),
                             .type = line_types[s->cache_type][0], .n_lines = kv.head_dim,
                             .n_strips = c->slots / TILE, .line_bytes = line,
                             .strip_bytes = (ptrdiff_t)position_bytes(s, kv.head_dim) * TILE,
                             .every = 1 << 30, .scales = kv.head_dim * TILE};
    kv.values = (struct lines){.data = c->values + (size_t)head * head_bytes(s, c, 1),
                               .type = line_types[s->cache_type][1], .n_lines = c->slots,
                               .n_strips = s->width / TILE, .strip_bytes = (ptrdiff_t)line,
                               .line_bytes = position_bytes(s, s->width), .every = 1 << 30,
                               .scales = s->width};
    return kv;
}

/* Number i of the key ('k') or the value ('v') of a position. */
static float cached(const gemma2_session *s, int layer, int head, char what, int32_t position,
                    int i)
{
    struct kv_head kv = kv_head_of(s, layer, head);
    int slot = position % kv.slots;
    return what == 'k' ? line_number(&kv.keys, slot / TILE, i, slot % TILE)
                       : line_number(&kv.values, i / TILE, slot, i % TILE);
}

/* Where a key or a value of a head lies: its numbers and scales, each with the step between two. */
struct slot {
    uint8_t *numbers, *scales;
    size_t step, scale_step;
};

static struct slot slot_of(const gemma2_session *s, int layer, int values, int head,
                           int32_t position)
{
    const struct layer_cache *c = &s->cache[layer];
    int32_t h = s->model->config.head_dim;
    size_t slot = (size_t)(position % c->slots), number = number_bytes(s);
    uint8_t *base = (values ? c->values : c->keys) + (size_t)head * head_bytes(s, c, values);
    if (values) {
        base += slot * position_bytes(s, s->width);
        return (struct slot){base, base + s->width, number, sizeof(uint16_t)};
    }
    base += slot / TILE * TILE * position_bytes(s, h);
    return (struct slot){base + slot % TILE * number,
                         base + h * TILE + slot % TILE * sizeof(uint16_t), TILE * number,
                         TILE * sizeof(uint16_t)};
}

/* The same where key, value or what a saved session holds of them lies in a row: H numbers, then
 * the scales. */
static struct slot packed_slot(const gemma2_session *s, const void *at)
{
    uint8_t *numbers = (uint8_t *)(uintptr_t)at; /* const where slots are read alone */
    size_t number = number_bytes(s);
    return (struct slot){numbers, numbers + (size_t)s->model->config.head_dim * number, number,
                         sizeof(uint16_t)};
}

static void move_numbers(const uint8_t *from, size_t from_step, uint8_t *to, size_t to_step,
                         size_t n, size_t bytes)
{
    if (from_step == bytes && to_step == bytes)
        memcpy(to, from, n * bytes);
    else
        for (; n; n--, from += from_step, to += to_step)
            if (bytes == 4)
                memcpy(to, from, 4);
            else if (bytes == 2)
                memcpy(to, from, 2);
            else
                *to = *from;
}

static void move_slot(const gemma2_session *s, struct slot from, struct slot to)
{
    size_t h = (size_t)s->model->config.head_dim, number = number_bytes(s);
    size_t n_scales = (position_bytes(s, s->model->config.head_dim) - h * number) / 2;
    move_numbers(from.numbers, from.step, to.numbers, to.step, h, number);
    move_numbers(from.scales, from.scale_step, to.scales, to.scale_step, n_scales, 2);
}

/* One head's key and value of a position into its slot.  A row that does not see the position
 * multiplies its value by 0, which must give 0.  So a value that is not finite is stored as 0
 * and its key as NaN: only rows that attend to it become NaN.  In 8 bits an infinite key would
 * lose its sign, so it becomes NaN, too. */
static void store_head(const gemma2_session *s, int layer, int head, int32_t position, float *key,
                       float *value)
{
    const struct kernels *isa = s->model->isa;
    size_t h = (size_t)s->model->config.head_dim;
    int bad = !all_finite(value, h) || (s->cache_type == GEMMA2_CACHE_Q8 && !all_finite(key, h));
    for (size_t i = 0; bad && i < h; i++)
        key[i] = NAN, value[i] = 0;
    for (int values = 0; values < 2; values++) {
        const float *x = values ? value : key;
        uint16_t f16[MAX_HEAD_DIM];
        int8_t q[MAX_HEAD_DIM];
        float scale[MAX_HEAD_DIM / GROUP];
        int32_t sum[MAX_HEAD_DIM / GROUP];
        struct slot from = packed_slot(s, s->cache_type == GEMMA2_CACHE_F32 ? x : (void *)f16);
        if (s->cache_type == GEMMA2_CACHE_Q8) {
            isa->quantise(x, (uint32_t)h, q, scale, sum);
            isa->to_f16(scale, (h + GROUP - 1) / GROUP, f16);
            from.numbers = (uint8_t *)q, from.scales = (uint8_t *)f16;
        } else if (s->cache_type == GEMMA2_CACHE_F16)
            isa->to_f16(x, h, f16);
        move_slot(s, from, slot_of(s, layer, values, head, position));
    }
}

static void rotate_and_store_task(void *context, size_t t)
{
    const struct pass *p = context;
    const gemma2_worker *work = p->worker;
    const gemma2_config *c = &p->model->config;
    size_t h = (size_t)c->head_dim, half = h / 2;
    const float *cosine = work->cosine + t * half, *sine = work->sine + t * half;
    float *q = work->q + t * (size_t)c->n_heads * h, *k = work->k + t * (size_t)c->n_kv_heads * h;
    float *v = work->v + t * (size_t)c->n_kv_heads * h;
    const struct row *row = &work->rows[t];
    for (int i = 0; i < c->n_heads; i++)
        rotate(q + (size_t)i * h, half, cosine, sine, c->query_scale);
    for (int i = 0; i < c->n_kv_heads; i++) {
        rotate(k + (size_t)i * h, half, cosine, sine, 1.0f);
        store_head(row->session, p->layer, i, row->position, k + (size_t)i * h,
                   v + (size_t)i * h);
    }
}

/* ---- attention ----
 * Positions fall into absolute blocks of 256.  For a query, each block that it sees gives a
 * partial result: a maximum m, the sum of exp(score - m), and the sum o[H] of
 * exp(score - m) * value, positions ascending, both from 0.  m is 0 where the soft-cap
 * keeps exp and its sums within floats, else the block's largest score.  Partial results merge
 * in ascending order, wherever and by whomever they were computed.
 *
 * The matrix class does the same with keys and values that it packs as bf16 for all queries of
 * a task; its blocks are packed_positions long. */

enum { MANY_QUERIES = 256 }; /* of one kv head and session in a task */

struct query {
    const float *q;
    float *out;          /* [H] */
    int32_t first, last; /* positions it sees */
};

struct partial {
    float max, sum;
};

/* Queries of one kv head in one session, and what they have so far. */
struct queries {
    const struct kernels *isa;
    const struct matrix_kernels *matrix; /* NULL: keys and values are read where they lie */
    struct kv_head kv;
    int n;
    struct query query[MANY_QUERIES];
    struct partial total[MANY_QUERIES];
};

/* Scores to weights: the soft-cap comes before the mask (transformers eager attention),
 * then exp(score - max) over what the query sees and 0 elsewhere. */
static struct partial weigh(const struct kernels *isa, float cap, float *s, int n, int first,
                            int last)
{
    struct partial result = {-INFINITY, 0};
    if (cap > 0)
        isa->soft_cap(s, (size_t)n, cap);
    if (first > last) { /* sees nothing of this block */
        memset(s, 0, (size_t)n * sizeof *s);
        return result;
    }
    for (int i = first; i <= last && !(cap > 0 && cap <= 60); i++)
        result.max = s[i] > result.max ? s[i] : result.max;
    for (int i = 0; i < first; i++)
        s[i] = -INFINITY;
    for (int i = last + 1; i < n; i++)
        s[i] = -INFINITY;
    if (result.max == -INFINITY)
        result.max = 0; /* capped; or all NaN: the sum will say so */
    result.sum = isa->exp_sum(s, (size_t)n, result.max);
    return result;
}

/* s[n][16 n_strips] = q[n][H] . keys from position `from` on. */
static void score_keys(const struct queries *a, const float *q, int n, int32_t from,
                       int n_strips, float (*s)[KEY_BLOCK])
{
    struct lines keys = a->kv.keys;
    if (n <= 2)
        keys.prefetch = 8 * (int)keys.strip_bytes, keys.every = 64 / (int)keys.line_bytes;
    for (int g = 0; g < n_strips; g += keys.n_strips) { /* up to where the ring starts again */
        int strip = (from / TILE + g) % a->kv.keys.n_strips;
        keys.data = a->kv.keys.data + strip * keys.strip_bytes;
        keys.n_strips = min_i32(n_strips - g, a->kv.keys.n_strips - strip);
        a->isa->add_lines(&keys, q, (size_t)a->kv.head_dim, n, s[0] + g * TILE, KEY_BLOCK);
    }
}

/* o[n][H'] = sum over positions first .. last of weight * value; weights start at `from`. */
static void mix_values(const struct queries *a, const float (*s)[KEY_BLOCK], int n,
                       int32_t from, int32_t first, int32_t last, float *o)
{
    struct lines values = a->kv.values;
    if (n <= 2)
        values.prefetch = 16 * (int)values.line_bytes, values.every = 1;
    for (int32_t at = first; at <= last; at += values.n_lines) {
        int32_t slot = at % a->kv.slots;
        values.data = a->kv.values.data + (size_t)slot * values.line_bytes;
        values.n_lines = min_i32(last - at + 1, a->kv.slots - slot);
        values.go_on = at > first;
        a->isa->add_lines(&values, s[0] + (at - from), KEY_BLOCK, n, o, (size_t)a->kv.width);
    }
}

/* Adds a partial result to what is there; total->max is -inf before the first. */
static void merge_partial(const struct kernels *isa, struct partial *total, float *out,
                          const struct partial *add, const float *o, int n)
{
    if (add->max == -INFINITY)
        return;
    if (total->max == -INFINITY) {
        *total = *add;
        memcpy(out, o, (size_t)n * sizeof *o);
        return;
    }
    float max = add->max > total->max ? add->max : total->max;
    float keep = total->max == max ? 1 : exp_f32(total->max - max);
    float scale = add->max == max ? 1 : exp_f32(add->max - max);
    total->max = max;
    total->sum = total->sum * keep + add->sum * scale;
    isa->blend(out, keep, o, scale, (size_t)n);
}

static void finish_attention(const struct partial *total, float *out, int n)
{
    float inverse = 1.0f / total->sum;
    for (int h = 0; h < n; h++)
        out[h] *= inverse;
}

/* A block of positions, and where the matrix class has them packed. */
struct block {
    int32_t first, last;
    const uint8_t *keys, *values;
};

/* Queries j .. j + n - 1 and a block.  vectors has room for n times H' floats: the queries, then
 * what their scores mix from the values. */
static void attend_block(struct queries *a, int j, int n, const struct block *b, float *vectors)
{
    _Alignas(64) float s[MAX_QUERIES][KEY_BLOCK];
    const struct query *q = a->query + j;
    int head_dim = a->kv.head_dim;
    int32_t first = b->last + 1, last = b->first - 1;
    for (int i = 0; i < n; i++) {
        first = min_i32(first, max_i32(q[i].first, b->first));
        last = max_i32(last, min_i32(q[i].last, b->last));
        memcpy(vectors + i * head_dim, q[i].q, (size_t)head_dim * sizeof *vectors);
    }
    if (first > last)
        return;
    int32_t from = first / TILE * TILE, n_strips = (last - from) / TILE + 1;
    int at = from - b->first;
    struct partial results[MAX_QUERIES];
    if (a->matrix)
        a->matrix->score_keys(vectors, n, head_dim, b->keys + (size_t)(at * head_dim) * 2, n_strips,
                              s);
    else
        score_keys(a, vectors, n, from, n_strips, s);
    for (int i = 0; i < n; i++)
        results[i] = weigh(a->isa, a->kv.cap, s[i], n_strips * TILE,
                           max_i32(q[i].first, b->first) - from,
                           min_i32(q[i].last, b->last) - from);
    if (a->matrix)
        a->matrix->mix_values((const float (*)[KEY_BLOCK])s, n, head_dim, b->values, at,
                              n_strips * TILE, vectors);
    else
        mix_values(a, (const float (*)[KEY_BLOCK])s, n, from, first, last, vectors);
    for (int i = 0; i < n; i++)
        merge_partial(a->isa, &a->total[j + i], q[i].out, &results[i], vectors + i * a->kv.width,
                      head_dim);
}

/* Keys and values of the block's positions from `first` on, as the matrix class reads them. */
static void pack_block(const struct queries *a, int32_t first, const struct block *b,
                       uint8_t *keys, uint8_t *values)
{
    const struct kv_head *kv = &a->kv;
    size_t strip_bytes = (size_t)kv->head_dim * TILE * sizeof(uint16_t);
    for (int32_t at = max_i32(first, b->first) / TILE * TILE; at <= b->last; at += TILE) {
        struct lines from = kv->keys, lines = kv->values;
        from.data += at % kv->slots / TILE * from.strip_bytes;
        lines.data += (size_t)(at % kv->slots) * lines.line_bytes;
        a->matrix->pack_keys(&from, keys + (size_t)((at - b->first) / TILE) * strip_bytes);
        a->matrix->pack_values(&lines, min_i32(b->last + 1 - at, TILE), at - b->first, values);
    }
}

/* All queries and the blocks of positions first .. last.  The matrix class packs a block for all
 * queries. */
static void attend(struct queries *a, int32_t first, int32_t last)
{
    _Alignas(64) uint8_t keys[PACKED_BYTES], values[PACKED_BYTES];
    float vectors[MAX_QUERIES * MAX_HEAD_DIM];
    int32_t step = a->matrix ? packed_positions(a->kv.head_dim) : KEY_BLOCK;
    for (int32_t base = first / step * step; base <= last; base += step) {
        struct block b = {base, min_i32(last, base + step - 1), keys, values};
        if (a->matrix)
            pack_block(a, first, &b, keys, values);
        for (int j = 0; j < a->n; j += MAX_QUERIES)
            attend_block(a, j, min_i32(a->n - j, MAX_QUERIES), &b, vectors);
    }
}

/* Query head i of row t.  Local layers see keys with 0 <= position - key < window, the
 * position itself included (gemma_pytorch's mask; transformers sliding_window_overlay). */
static struct query query_of(const struct pass *p, size_t t, int head)
{
    const gemma2_worker *work = p->worker;
    const struct row *row = nth_row(p, t);
    const gemma2_config *c = &p->model->config;
    int32_t window = c->is_local[p->layer] ? row->session->window : row->position + 1;
    size_t heads = (size_t)c->n_heads, h = (size_t)c->head_dim;
    return (struct query){work->q + (place_of(p, t) * heads + (size_t)head) * h,
                          work->attended + (t * heads + (size_t)head) * h,
                          max_i32(0, row->position - window + 1), row->position};
}

/* How the attention of a pass is cut into tasks. */
struct attention_job {
    const struct pass *pass;
    size_t rows_a_task;  /* with one kv head */
    int32_t first_block; /* if split: a task takes one block, from this on .. */
    int32_t n_blocks;    /* .. this many; 0: a task takes all */
};

/* Where a split job keeps query head `head` of row t after a block: max, sum, at TILE o[H']. */
static float *partial_of(const struct attention_job *job, size_t t, int32_t block, int head)
{
    const gemma2_worker *work = job->pass->worker;
    size_t at = (t * work->partial_blocks + (size_t)block) * partial_floats(work->model);
    size_t a_head = partial_floats(work->model) / (size_t)work->model->config.n_heads;
    return work->partial + at + (size_t)head * a_head;
}

/* The queries of a that have been gathered: all they see, or one block of it. */
static void attend_gathered(const struct attention_job *job, struct queries *a, int32_t block)
{
    int32_t first = INT32_MAX, last = 0;
    for (int j = 0; j < a->n; j++) {
        a->total[j] = (struct partial){-INFINITY, 0};
        first = min_i32(first, a->query[j].first);
        last = max_i32(last, a->query[j].last);
    }
    if (job->n_blocks) {
        first = max_i32(first, (job->first_block + block) * KEY_BLOCK);
        last = min_i32(last, (job->first_block + block) * KEY_BLOCK + KEY_BLOCK - 1);
    }
    attend(a, first, last);
    for (int j = 0; j < a->n; j++)
        if (job->n_blocks)
            memcpy(a->query[j].out - TILE, &a->total[j], sizeof a->total[j]);
        else
            finish_attention(&a->total[j], a->query[j].out, a->kv.head_dim);
    a->n = 0;
}

/* The matrix class's kernels, if it attends to the session's cache. */
static const struct matrix_kernels *matrix_attention(const struct pass *p, const gemma2_session *s)
{
    int h = p->model->config.head_dim;
    int fits = s->cache_type != GEMMA2_CACHE_F32 && h % GROUP == 0 && h <= MAX_PACKED_HEAD;
    return fits ? p->matrix : NULL;
}

/* One kv head for some neighbouring rows, with their G query heads each. */
static void attend_task(void *context, size_t task)
{
    const struct attention_job *job = context;
    const struct pass *p = job->pass;
    const gemma2_config *c = &p->model->config;
    size_t kv_heads = (size_t)c->n_kv_heads, n_blocks = (size_t)max_i32(job->n_blocks, 1);
    int head = (int)(task % kv_heads), group = c->n_heads / c->n_kv_heads;
    int32_t block = (int32_t)(task / kv_heads % n_blocks);
    size_t first = task / kv_heads / n_blocks * job->rows_a_task;
    size_t last = first + job->rows_a_task < p->n ? first + job->rows_a_task : p->n;
    struct queries a;
    a.isa = p->model->isa, a.n = 0;
    for (size_t t = first; t < last; t++)
        for (int g = 0; g < group; g++) {
            const gemma2_session *s = nth_row(p, t)->session;
            int end = g + 1 == group && (t + 1 == last || t + 1 == p->n_exact ||
                                         nth_row(p, t + 1)->session != s);
            struct query *q = &a.query[a.n++];
            *q = query_of(p, t, head * group + g);
            if (job->n_blocks)
                q->out = partial_of(job, t, block, head * group + g) + TILE;
            if (a.n == MANY_QUERIES || end) {
                a.kv = kv_head_of(s, p->layer, head);
                a.matrix = t < p->n_exact ? NULL : matrix_attention(p, s);
                attend_gathered(job, &a, block);
            }
        }
}

static void merge_blocks_task(void *context, size_t task)
{
    const struct attention_job *job = context;
    const gemma2_config *c = &job->pass->model->config;
    size_t t = task / (size_t)c->n_heads;
    int head = (int)(task % (size_t)c->n_heads);
    struct query q = query_of(job->pass, t, head);
    struct partial total = {-INFINITY, 0}, add;
    for (int32_t block = 0; block < job->n_blocks; block++) {
        const float *from = partial_of(job, t, block, head);
        memcpy(&add, from, sizeof add);
        merge_partial(job->pass->model->isa, &total, q.out, &add, from + TILE, c->head_dim);
    }
    finish_attention(&total, q.out, c->head_dim);
}

/* A task takes as many rows as leave four tasks a thread: then keys and values are read and
 * packed once for many queries.  A few rows far into a context would leave threads idle: there
 * each block of positions is a task of its own, for all rows, and the blocks are merged
 * afterwards.  That is for the exact class alone, whose bits do not depend on it. */
static struct attention_job cut_attention(const struct pass *p)
{
    const gemma2_config *c = &p->model->config;
    const gemma2_worker *work = p->worker;
    int group = c->n_heads / c->n_kv_heads, threads = work->n_threads;
    int wanted = (int)(p->n * (size_t)c->n_kv_heads / (4 * (size_t)threads));
    struct attention_job job = {p, 0, INT32_MAX, 0};
    job.rows_a_task = (size_t)max_i32(1, min_i32(max_i32(wanted, MAX_QUERIES / group),
                                                 MANY_QUERIES / group));
    size_t tasks = (p->n + job.rows_a_task - 1) / job.rows_a_task * (size_t)c->n_kv_heads;
    if (p->n_exact < p->n || threads == 1 || p->n > work->partial_rows ||
        tasks >= 4 * (size_t)threads)
        return job;
    int32_t last_block = 0;
    for (size_t t = 0; t < p->n; t++) {
        job.first_block = min_i32(job.first_block, query_of(p, t, 0).first / KEY_BLOCK);
        last_block = max_i32(last_block, nth_row(p, t)->position / KEY_BLOCK);
    }
    int32_t n_blocks = last_block - job.first_block + 1;
    if (n_blocks > 1 && (size_t)n_blocks <= work->partial_blocks) /* another's may be longer */
        job.n_blocks = n_blocks, job.rows_a_task = p->n;
    return job;
}

static void attend_rows(struct pass *p)
{
    const gemma2_config *c = &p->model->config;
    struct attention_job job = cut_attention(p);
    size_t tasks = (p->n + job.rows_a_task - 1) / job.rows_a_task;
    tasks *= (size_t)max_i32(job.n_blocks, 1) * (size_t)c->n_kv_heads;
    share(p->me, tasks, attend_task, &job);
    if (job.n_blocks)
        share(p->me, p->n * (size_t)c->n_heads, merge_blocks_task, &job);
}

/* ---- one layer ---- */

/* x = x + post_norm(y[0]): what attention and feed-forward give is normed before it is added. */
static void leave_task(void *context, size_t t)
{
    const struct product_job *job = context;
    size_t d = job->post_norm->rows;
    float *x = job->pass->worker->x + place_of(job->pass, t) * d, *added = job->y[0] + t * d;
    norm(job->pass, job->post_norm, added, added);
    for (size_t i = 0; i < d; i++)
        x[i] += added[i];
}

/* Whether nothing but the logits shows what the last layer gives. */
static int has_only_logits(const struct pass *p)
{
    return p->layer + 1 == p->model->config.n_layers && !p->worker->hook && !p->states &&
           !p->logprobs && !p->importance;
}

/* x = x + post_attn_norm(o(attend(q, k, v of attn_norm(x)))).  In the last layer most rows of a
 * prompt are done once their keys and values are stored. */
static void attention(struct pass *p)
{
    gemma2_worker *work = p->worker;
    const struct layer *w = &p->model->layers[p->layer];
    uint32_t d = w->q.cols;
    struct product_job qkv = {.norm = &w->attn_norm, .x = work->normed, .n = p->n,
                              .w = {&w->q, &w->k, &w->v}, .y = {work->q, work->k, work->v}};
    struct product_job o = {.x = work->attended, .w = {&w->o}, .y = {work->added},
                            .post_norm = &w->post_attn_norm};
    prepare(p, &qkv);
    trace(p, "attn_norm", p->layer, work->normed, p->n, d);
    add_importance(p, p->layer, INPUT_Q, work->normed, d);
    multiply(p, qkv);
    share_rows(p, rotate_and_store_task);
    trace(p, "q", p->layer, work->q, p->n, w->q.rows);
    trace(p, "k", p->layer, work->k, p->n, w->k.rows);
    trace(p, "v", p->layer, work->v, p->n, w->v.rows);
    if (has_only_logits(p))
        keep_wanted(p);
    o.n = p->n;
    attend_rows(p);
    trace(p, "attn", p->layer, work->attended, p->n, w->o.cols);
    add_importance(p, p->layer, INPUT_O, work->attended, w->o.cols);
    prepare(p, &o);
    multiply(p, o);
    trace(p, "o", p->layer, work->added, p->n, d);
    share(p->me, p->n, leave_task, &o);
    trace(p, "post_attn_norm", p->layer, work->added, p->n, d);
    trace(p, "attn_residual", p->layer, work->x, p->n, d);
}

/* x = x + post_ffn_norm(down(gelu(gate(y)) * up(y))), y = ffn_norm(x) */
static void feed_forward(struct pass *p)
{
    gemma2_worker *work = p->worker;
    const struct layer *w = &p->model->layers[p->layer];
    uint32_t d = w->gate.cols, f = w->gate.rows;
    struct product_job gate_up = {.norm = &w->ffn_norm, .x = work->normed, .n = p->n,
                                  .w = {&w->gate, &w->up}, .y = {work->gated}, .is_gated = 1};
    struct product_job down = {.x = work->gated, .n = p->n, .w = {&w->down}, .y = {work->added},
                               .post_norm = &w->post_ffn_norm};
    prepare(p, &gate_up);
    trace(p, "ffn_norm", p->layer, work->normed, p->n, d);
    add_importance(p, p->layer, INPUT_GATE, work->normed, d);
    multiply(p, gate_up);
    trace(p, "geglu", p->layer, work->gated, p->n, f);
    add_importance(p, p->layer, INPUT_DOWN, work->gated, f);
    prepare(p, &down);
    multiply(p, down);
    trace(p, "down", p->layer, work->added, p->n, d);
    share(p->me, p->n, leave_task, &down);
    trace(p, "post_ffn_norm", p->layer, work->added, p->n, d);
    trace(p, "residual", p->layer, work->x, p->n, d);
}

/* x = embedding[id] * embedding_scale (the scale is sqrt(D) rounded to bf16, as in
 * gemma_pytorch and transformers Gemma2Model; the product stays f32), and the angles of
 * the row's position: position * theta^(-2i/H), in float as transformers computes them. */
static void embed_task(void *context, size_t t)
{
    const struct pass *p = context;
    const gemma2_worker *work = p->worker;
    const gemma2_config *c = &p->model->config;
    const struct row *row = &work->rows[t];
    size_t d = (size_t)c->d_model, half = (size_t)c->head_dim / 2;
    float *x = work->x + t * d;
    read_row(&p->model->embedding,
             row_of_id(p->model, (uint32_t)row->session->ids[row->position]), x);
    for (size_t i = 0; i < d; i++)
        x[i] *= c->embedding_scale;
    for (size_t i = 0; i < half; i++) {
        float angle = (float)row->position * work->inverse_frequency[i];
        cos_sin(angle, work->cosine + t * half + i, work->sine + t * half + i);
    }
}

/* Ends the pass once the owners of all rows asked for that. */
static void ask_task(void *context, size_t task)
{
    const struct pass *p = context;
    int n_left = 0;
    for (size_t t = task; t < p->n; t++) {
        gemma2_session *s = p->worker->rows[t].session;
        if (s->cancelled || (s->cancels_too && s->cancels_too->cancelled))
            s->is_out = 1;
        n_left += !s->is_out;
    }
    if (!n_left)
        p->worker->status = GEMMA2_ERR_CANCELLED;
}

/* All threads get the same answer.  A late thread may already see a later layer's answer. */
static int is_cancelled(struct pass *p)
{
    share(p->me, 1, ask_task, p);
    return p->worker->status < 0;
}

static int is_reference(const struct pass *p) { return p->model->is_reference && !p->importance; }

/* The residual stream of all rows, from embedding to last layer, in worker->x. */
static int forward(struct pass *p)
{
    if (is_reference(p)) {
        for (size_t t = 0; t < p->n; t++) {
            const struct row *row = &p->worker->rows[t];
            plain_forward(p, row->session, row->session->ids[row->position], row->position,
                          p->worker->x + t * (size_t)p->model->config.d_model);
        }
        return !is_cancelled(p);
    }
    share_rows(p, embed_task);
    trace(p, "embedding", 0, p->worker->x, p->n, (size_t)p->model->config.d_model);
    for (p->layer = 0; p->layer < p->model->config.n_layers; p->layer++) {
        if (is_cancelled(p))
            return 0;
        struct pass layer = *p; /* its last part may be for fewer rows */
        attention(&layer);
        feed_forward(&layer);
    }
    return !is_cancelled(p);
}

/* ---- the output head ---- */

static void spread_task(void *context, size_t t)
{
    const struct pass *p = context;
    spread_logits(p->model, p->only[t]->logits);
}

/* What the head reads of every row. */
static struct product_job head_inputs(const struct pass *p)
{
    struct product_job job = {.norm = &p->model->final_norm, .x = p->worker->normed, .n = p->n,
                              .w = {&p->model->head}, .cap = p->model->config.final_softcap};
    prepare(p, &job);
    return job;
}

/* Logits of the rows that want them, into the callers' buffers:
 * logits = cap * tanh(norm(x) E^T / cap). */
static void head(struct pass p)
{
    gemma2_worker *work = p.worker;
    size_t v = (size_t)p.model->config.n_vocab;
    keep_wanted(&p);
    if (is_reference(&p))
        for (size_t t = 0; t < p.n; t++)
            plain_head(&p, work->x + place_of(&p, t) * p.model->head.cols, p.only[t]->logits);
    else if (p.n) {
        struct product_job logits = head_inputs(&p);
        logits.is_head = 1;
        trace(&p, "final_norm", 0, work->normed, p.n, p.model->head.cols);
        multiply(&p, logits);
        if (p.model->kept)
            share(p.me, p.n, spread_task, &p);
    }
    for (size_t t = 0; t < p.n; t++)
        trace(&p, "logits", (int)t, p.only[t]->logits, 1, v);
}

/* Log-probabilities of one target a row, without a row of logits: the head runs in blocks
 * of 2048 rows, and each block of logits joins its row's running log-sum-exp. */
struct score_job {
    const struct pass *pass;
    size_t first, n; /* logits first .. first + n - 1 are in buf */
    float *buf;      /* [T][n] */
};

static void score_block_task(void *context, size_t t)
{
    const struct score_job *job = context;
    const gemma2_model *m = job->pass->model;
    struct log_sum *sum = &job->pass->worker->log_sums[t];
    float *x = job->buf + t * job->n;
    size_t target = row_of_id(m, (uint32_t)job->pass->worker->targets[t]);
    if (!job->first)
        *sum = (struct log_sum){-INFINITY, -INFINITY, 0};
    if (target >= job->first && target < job->first + job->n)
        sum->target = x[target - job->first];
    log_sum_add(sum, x, job->n, m->isa->exp_sum);
}

static void score_rows(struct pass *p)
{
    gemma2_worker *work = p->worker;
    struct score_job score = {p, 0, 0, (float *)work->candidates};
    struct product_job logits = head_inputs(p);
    for (; score.first < p->model->head.rows && !is_cancelled(p); score.first += score.n) {
        struct tensor w = p->model->head;
        w.data += score.first / TILE * w.tile_bytes;
        w.rows = w.rows - score.first < HEAD_BLOCK ? w.rows - (uint32_t)score.first : HEAD_BLOCK;
        score.n = w.rows;
        logits.w[0] = &w, logits.y[0] = score.buf;
        multiply(p, logits);
        share(p->me, p->n, score_block_task, &score);
    }
}

static void run_head(struct member *me, void *context)
{
    struct pass p = *(const struct pass *)context;
    p.me = me;
    head(p);
}

static void state_task(void *context, size_t t)
{
    const struct pass *p = context;
    size_t at = t * (size_t)p->model->config.d_model;
    norm(p, &p->model->final_norm, p->worker->x + at, p->states + at);
}

/* The program of every thread of a pass. */
static void run_pass(struct member *me, void *context)
{
    struct pass p = *(const struct pass *)context;
    p.me = me;
    if (!forward(&p))
        return;
    head(p);
    if (p.states)
        share_rows(&p, state_task);
    p.n -= p.logprobs && p.worker->targets[p.n - 1] < 0;
    if (p.logprobs && p.n)
        score_rows(&p);
    if (p.importance) {
        head_inputs(&p);
        add_importance(&p, p.layer, INPUT_Q, p.worker->normed, p.model->head.cols);
    }
}

static int is_large(const gemma2_model *m) { return m->config.file_bytes > 64 << 20; }

/* Another program may hold a processor that the team counts on, and one thread alone is then
 * faster than a team that waits for it.  So passes of little work are timed both ways.  The slower
 * way is tried again whenever as much time has passed as 128 such passes take; for the first
 * time the team is tried after 5 ms, and the lone thread after 16 passes. */
static int next_way(const struct pace *p)
{
    double other = p->seconds[!p->is_team];
    double first = p->is_team ? 16 * p->seconds[1] : 0.005;
    if (p->since > (other > 0 ? 128 * other : first))
        return !p->is_team;
    return other > 0 ? p->seconds[1] <= p->seconds[0] : p->is_team;
}

/* A running mean, in which a single slow pass counts little. */
static void note_mean(double *mean, double x)
{
    if (x > 0)
        *mean = *mean > 0 ? *mean + ((x < 2 * *mean ? x : 2 * *mean) - *mean) / 8 : x;
}

static void note_pace(struct pace *p, int is_team, double seconds)
{
    int goes_on = is_team == p->is_team;
    if (!goes_on)
        p->seconds[is_team] = 0;
    note_mean(&p->seconds[is_team], seconds);
    p->since = goes_on ? p->since + seconds : 0;
    p->is_team = is_team;
}

/* The pace of passes of n rows.  Their time, scaled, is that of the most rows it stands for.
 * NULL for many rows, of a large model for more than FEW_ROWS: a team is faster. */
static struct pace *pace_of(gemma2_worker *work, size_t n, double *scale)
{
    size_t i = n < FEW_ROWS ? n - 1 : FEW_ROWS - 1, most = i + 1;
    for (; most < n && i < N_PACES; i++)
        most *= 2;
    *scale = (double)most / (double)n;
    return i < (is_large(work->model) ? FEW_ROWS : N_PACES) ? &work->pace[i] : NULL;
}

/* Less work than this is not worth waking a thread for: bytes of weights, each counted again
 * for every 8 rows. */
enum { BYTES_A_THREAD = 128 << 10 };

static int useful_threads(const gemma2_worker *work, size_t n)
{
    uint64_t useful = work->model->config.file_bytes / BYTES_A_THREAD * (1 + n / 8);
    return useful < (uint64_t)work->n_threads ? max_i32(1, (int32_t)useful) : work->n_threads;
}

/* Runs n rows.  Rows of a cancelled session do not count: what they wrote to the rings lies
 * outside all windows. */
static int evaluate(struct pass *p)
{
    gemma2_worker *work = p->worker;
    work->status = GEMMA2_OK;
    for (size_t t = 0; t < p->n; t++)
        if (work->rows[t].logits) {
            work->wanted[p->n_wanted++] = &work->rows[t];
            p->wanted_exact += t < p->n_exact;
        }
    int n_threads = useful_threads(work, p->n);
    double scale;
    struct pace *pace = pace_of(work, p->n, &scale);
    int is_team = n_threads > 1 && !is_reference(p) && !(work->hook && work->run) &&
                  (!pace || next_way(pace));
    double start = clock_now();
    run_team(work, is_team ? n_threads : 1, run_pass, p);
    if (pace && n_threads > 1)
        note_pace(pace, is_team, (clock_now() - start) * scale);
    for (size_t t = 0; t < p->n; t++)
        work->rows[t].session->position -= work->rows[t].session->is_out;
    if (p->logprobs && work->status == GEMMA2_OK)
        for (size_t t = 0; t < p->n && work->targets[t] >= 0; t++)
            p->logprobs[t] = log_sum_end(&work->log_sums[t]);
    return work->status;
}

/* ===================================================================================
 * 5. Tokenizer: SentencePiece BPE (google/sentencepiece, src/bpe_model.cc)
 * =================================================================================== */

/* ---- a heap of keys, the least on top: for merging, sampling and grammars ---- */

static void sift_down(uint64_t *heap, size_t n, size_t at)
{
    uint64_t key = heap[at];
    for (size_t child; (child = 2 * at + 1) < n; at = child) {
        child += child + 1 < n && heap[child + 1] < heap[child];
        if (heap[child] >= key)
            break;
        heap[at] = heap[child];
    }
    heap[at] = key;
}

static void push_key(uint64_t *heap, size_t *n, uint64_t key)
{
    size_t at = (*n)++;
    for (; at && heap[(at - 1) / 2] > key; at = (at - 1) / 2)
        heap[at] = heap[(at - 1) / 2];
    heap[at] = key;
}

static uint64_t pop_key(uint64_t *heap, size_t *n)
{
    uint64_t least = heap[0];
    heap[0] = heap[--*n];
    sift_down(heap, *n, 0);
    return least;
}

/* A key that ascends as x descends; equal x, 0 and -0 among them, ascend by id. */
static uint64_t key_of(float x, uint32_t id)
{
    uint32_t bits = bits_of(x + 0.0f);
    return (uint64_t)(bits >> 31 ? bits : bits ^ 0x7fffffff) << 32 | id;
}

/* The x of a key. */
static float float_in(uint64_t key)
{
    uint32_t bits = (uint32_t)(key >> 32);
    return float_of(bits >> 31 ? bits : bits ^ 0x7fffffff);
}

/* ---- pieces ---- */

enum { MAX_PIECE_BYTES = 4096, MAX_PROBES = 256 };
static const uint32_t EMPTY_BUCKET = 0xffffffff, NO_PIECE = 0xffffffff;

static struct text piece_text(const struct tokenizer *t, uint32_t id)
{
    uint32_t start = id ? get_u32(t->ends + 4 * (size_t)(id - 1)) : 0;
    return (struct text){t->blob + start, get_u32(t->ends + 4 * (size_t)id) - start};
}

static struct text as_text(const char *s)
{
    return (struct text){(const uint8_t *)s, (uint32_t)strlen(s)};
}

/* Kinds that text can become.  UNUSED pieces, which SentencePiece would merge and take apart
 * again, are not supported: Gemma's vocabularies have none. */
static int is_matchable(int kind)
{
    return kind == GEMMA2_PIECE_NORMAL || kind == GEMMA2_PIECE_USER || kind == GEMMA2_PIECE_MARKER;
}

/* Sets of kinds: what is found whole, before anything is merged, in a stranger's text, in any
 * other text, and in a chat template. */
enum {
    WHOLE_PLAIN = 1 << GEMMA2_PIECE_USER,
    WHOLE_TEXT = WHOLE_PLAIN | 1 << GEMMA2_PIECE_MARKER,
    WHOLE_MARKERS = 1 << GEMMA2_PIECE_MARKER | 1 << GEMMA2_PIECE_CONTROL
};

static int is_whole(int kind) { return (WHOLE_TEXT | WHOLE_MARKERS) >> kind & 1; }

/* ---- the hash of matchable pieces: linear probing, at most half full; a bucket holds the
 * id in its low 22 bits and 10 bits of hash above them ---- */

static uint64_t hash_of(struct text s)
{
    uint64_t h = 0xcbf29ce484222325u; /* FNV-1a, then mixed */
    for (uint32_t i = 0; i < s.n; i++)
        h = (h ^ s.p[i]) * 0x100000001b3u;
    h ^= h >> 32;
    return h * 0x9e3779b97f4a7c15u;
}

static int same_text(struct text a, struct text b)
{
    return a.n == b.n && !memcmp(a.p, b.p, a.n);
}

/* The bucket that holds s or, failing that, the empty bucket where it belongs.  NULL when
 * neither is within MAX_PROBES. */
static uint32_t *find_bucket(const struct tokenizer *t, struct text s, uint32_t *tag)
{
    uint64_t h = hash_of(s);
    *tag = (uint32_t)(h >> 54) << 22;
    for (uint32_t i = 0; i < MAX_PROBES; i++) {
        uint32_t *bucket = &t->buckets[(uint32_t)((h >> 20) + i) & t->bucket_mask];
        if (*bucket == EMPTY_BUCKET)
            return bucket;
        if ((*bucket & 0xffc00000) == *tag && same_text(piece_text(t, *bucket & 0x3fffff), s))
            return bucket;
    }
    return NULL;
}

/* The id of a piece, or -1.  plain: markers are not found. */
static int32_t find_piece(const struct tokenizer *t, struct text s, int plain)
{
    uint32_t tag;
    const uint32_t *bucket = find_bucket(t, s, &tag);
    if (!bucket || *bucket == EMPTY_BUCKET)
        return -1;
    uint32_t id = *bucket & 0x3fffff;
    return plain && t->kinds[id] == GEMMA2_PIECE_MARKER ? -1 : (int32_t)id;
}

/* ---- the sorted list of pieces that are found whole, for longest-prefix search ---- */

/* Order by bytes, a prefix first: below 0, 0 or above it. */
static int compare_text(struct text a, struct text b)
{
    int order = memcmp(a.p, b.p, a.n < b.n ? a.n : b.n);
    return order ? order : (a.n > b.n) - (a.n < b.n);
}

/* Equal pieces go by id, but pieces that text can never match come last. */
static int whole_before(const struct tokenizer *t, uint32_t a, uint32_t b)
{
    int order = compare_text(piece_text(t, a), piece_text(t, b));
    if (!order)
        order = is_matchable(t->kinds[b]) - is_matchable(t->kinds[a]);
    return order ? order < 0 : a < b;
}

static void sift_whole(const struct tokenizer *t, uint32_t at, uint32_t n)
{
    for (uint32_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && whole_before(t, t->whole[child], t->whole[child + 1]))
            child++;
        if (!whole_before(t, t->whole[at], t->whole[child]))
            return;
        uint32_t id = t->whole[at];
        t->whole[at] = t->whole[child];
        t->whole[child] = id;
    }
}

/* Heapsort: bounded whatever the file holds. */
static void sort_whole(const struct tokenizer *t)
{
    for (uint32_t i = t->n_whole / 2; i-- > 0;)
        sift_whole(t, i, t->n_whole);
    for (uint32_t n = t->n_whole; n-- > 1;) {
        uint32_t id = t->whole[0];
        t->whole[0] = t->whole[n];
        t->whole[n] = id;
        sift_whole(t, 0, n);
    }
}

/* Drops all but the first of equal pieces.  Notes where the pieces of each first byte begin, and
 * the longest other piece that each starts with: the piece before it in the list, or that piece's
 * prefix, and so on. */
static void link_whole(struct tokenizer *t)
{
    uint32_t n = 0;
    memset(t->whole_first, 0, sizeof t->whole_first);
    for (uint32_t i = 0; i < t->n_whole; i++) {
        struct text s = piece_text(t, t->whole[i]), p;
        uint32_t up = n ? n - 1 : NO_PIECE;
        if (n && !compare_text(piece_text(t, t->whole[up]), s))
            continue;
        for (; up != NO_PIECE; up = t->whole_prefix[up]) {
            p = piece_text(t, t->whole[up]);
            if (p.n < s.n && !memcmp(p.p, s.p, p.n))
                break;
        }
        t->whole[n] = t->whole[i];
        t->whole_prefix[n++] = up;
        t->whole_first[s.p[0] + 1]++;
    }
    for (int c = 0; c < 256; c++)
        t->whole_first[c + 1] += t->whole_first[c];
}

static size_t bucket_count(uint32_t n_pieces)
{
    size_t n = 64;
    while (n < 2 * (size_t)n_pieces)
        n *= 2;
    return n;
}

/* Fills the indexes, whose memory is there: buckets[bucket_count], whole and whole_prefix[V]. */
static int build_tokenizer(struct tokenizer *t, struct errbuf *err)
{
    t->bucket_mask = (uint32_t)bucket_count(t->n) - 1;
    memset(t->buckets, 0xff, ((size_t)t->bucket_mask + 1) * sizeof *t->buckets);
    uint32_t n_whole = 0, tag;
    for (uint32_t id = 0; id < t->n; id++) {
        if (is_whole(t->kinds[id]))
            t->whole[n_whole++] = id;
        if (!is_matchable(t->kinds[id]))
            continue;
        uint32_t *bucket = find_bucket(t, piece_text(t, id), &tag);
        if (!bucket)
            return fail(err, "the model file's tokenizer has too many pieces alike");
        if (*bucket == EMPTY_BUCKET)
            *bucket = tag | id;
    }
    sort_whole(t);
    link_whole(t);
    return 1;
}

/* The longest piece of the kinds that s starts with, or -1.  Among the pieces up to s in the
 * list, s starts with the last piece, or with a prefix of it, or with none. */
static int32_t longest_whole(const struct tokenizer *t, struct text s, int kinds)
{
    uint32_t first = t->whole_first[s.p[0]], low = first, high = t->whole_first[s.p[0] + 1];
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (compare_text(piece_text(t, t->whole[middle]), s) <= 0)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == first)
        return -1;
    struct text p = piece_text(t, t->whole[--low]);
    uint32_t same = 0;
    while (same < p.n && same < s.n && p.p[same] == s.p[same])
        same++;
    for (; low != NO_PIECE; low = t->whole_prefix[low])
        if (piece_text(t, t->whole[low]).n <= same && kinds >> t->kinds[t->whole[low]] & 1)
            return (int32_t)t->whole[low];
    return -1;
}

/* Length of the UTF-8 character at p, or 0.  Overlong forms, surrogates and codes above U+10FFFF
 * are no characters. */
static uint32_t utf8_length(const uint8_t *p, size_t n)
{
    uint32_t c = p[0], length = c < 0x80 ? 1 : c < 0xc2 ? 0 : c < 0xe0 ? 2 : c < 0xf0 ? 3
                              : c < 0xf5 ? 4 : 0;
    if (length == 0 || length > n)
        return 0;
    for (uint32_t i = 1; i < length; i++)
        if ((p[i] & 0xc0) != 0x80)
            return 0;
    int bad = (c == 0xe0 && p[1] < 0xa0) || (c == 0xed && p[1] > 0x9f) ||
              (c == 0xf0 && p[1] < 0x90) || (c == 0xf4 && p[1] > 0x8f);
    return bad ? 0 : length;
}

static int hex_digit(int c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* "<0xHH>" to 0..255, anything else to -1. */
static int byte_piece(struct text s)
{
    if (s.n != 6 || memcmp(s.p, "<0x", 3) || s.p[5] != '>')
        return -1;
    int high = hex_digit(s.p[3]), low = hex_digit(s.p[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
}

/* ---- encoding ---- */

/* A symbol of the text that is being merged. */
struct symbol {
    uint32_t start, bytes;
    int32_t previous, next; /* symbols, -1 at the ends */
    int32_t pair;           /* id that this symbol and the next would make, or -1 */
};

struct encoder {
    const struct tokenizer *t;
    int plain;
    uint32_t max_piece;
    uint8_t *text;
    size_t n;
    struct symbol *symbols;
    int32_t n_symbols;
    uint64_t *heap; /* [3n] pairs: on top the highest score, among equals the leftmost */
    size_t n_heap;
    int32_t *ids;   /* the caller's */
    size_t max_ids;
    int64_t n_ids;
    int after_unk;
};

static uint64_t pair_key(const struct encoder *e, int32_t symbol)
{
    size_t pair = (size_t)e->symbols[symbol].pair;
    return key_of(get_f32(e->t->scores + 4 * pair), (uint32_t)symbol);
}

/* Looks up the piece that a symbol and its right neighbour would make. */
static void update_pair(struct encoder *e, int32_t i)
{
    if (i < 0)
        return;
    struct symbol *left = &e->symbols[i];
    left->pair = -1;
    if (left->next < 0)
        return;
    struct text both = {e->text + left->start, left->bytes + e->symbols[left->next].bytes};
    if (both.n <= e->max_piece)
        left->pair = find_piece(e->t, both, e->plain);
    if (left->pair >= 0)
        push_key(e->heap, &e->n_heap, pair_key(e, i));
}

/* Spaces become U+2581, bytes that are no UTF-8 become U+FFFD. */
static void normalise(struct encoder *e, const uint8_t *p, size_t n)
{
    while (n) {
        uint32_t length = utf8_length(p, n);
        const char *instead = *p == ' ' ? "\xe2\x96\x81" : length ? NULL : "\xef\xbf\xbd";
        if (instead)
            memcpy(e->text + e->n, instead, 3);
        else
            memcpy(e->text + e->n, p, length);
        e->n += instead ? 3 : length;
        p += length ? length : 1;
        n -= length ? length : 1;
    }
}

static void merge_symbols(struct encoder *e)
{
    for (int32_t i = 0; i < e->n_symbols; i++)
        update_pair(e, i);
    while (e->n_heap) {
        uint64_t key = pop_key(e->heap, &e->n_heap);
        int32_t i = (int32_t)(uint32_t)key;
        struct symbol *left = &e->symbols[i], *right = &e->symbols[left->next];
        if (left->pair < 0 || pair_key(e, i) != key) /* what it made has changed since */
            continue;
        left->bytes += right->bytes;
        left->next = right->next;
        right->pair = -1;
        if (left->next >= 0)
            e->symbols[left->next].previous = i;
        update_pair(e, i);
        update_pair(e, left->previous);
    }
}

static void emit(struct encoder *e, int32_t id)
{
    if ((uint64_t)e->n_ids < e->max_ids)
        e->ids[e->n_ids] = id;
    e->n_ids++;
}

/* Emits a symbol's piece, or else its bytes, or else one unk for a run of such symbols. */
static void emit_symbol(struct encoder *e, const struct symbol *s)
{
    struct text text = {e->text + s->start, s->bytes};
    int32_t id = find_piece(e->t, text, e->plain);
    int bytes_known = 1;
    for (uint32_t k = 0; k < text.n; k++)
        bytes_known &= e->t->byte_id[text.p[k]] >= 0;
    if (id >= 0)
        emit(e, id);
    else if (bytes_known)
        for (uint32_t k = 0; k < text.n; k++)
            emit(e, e->t->byte_id[text.p[k]]);
    else if (!e->after_unk)
        emit(e, e->t->unk);
    e->after_unk = id < 0 && !bytes_known;
}

/* Merges and emits the symbols gathered so far. */
static void finish_symbols(struct encoder *e)
{
    if (!e->n_symbols)
        return;
    e->symbols[e->n_symbols - 1].next = -1;
    merge_symbols(e);
    for (int32_t i = 0; i >= 0; i = e->symbols[i].next)
        emit_symbol(e, &e->symbols[i]);
    e->n_symbols = 0;
}

/* Encodes the text from byte `at` up to `to`.  Cuts it into pieces that are found whole and
 * stretches of characters between them, which are merged. */
static void encode_text(struct encoder *e, size_t at, size_t to)
{
    while (at < to) {
        struct text rest = {e->text + at, (uint32_t)(to - at)};
        int32_t whole = longest_whole(e->t, rest, e->plain ? WHOLE_PLAIN : WHOLE_TEXT), i;
        if (whole >= 0) {
            finish_symbols(e);
            emit(e, whole);
            e->after_unk = 0;
            at += piece_text(e->t, (uint32_t)whole).n;
            continue;
        }
        i = e->n_symbols++;
        struct symbol s = {(uint32_t)at, utf8_length(rest.p, rest.n), i - 1, i + 1, -1};
        e->symbols[i] = s;
        at += s.bytes;
    }
    finish_symbols(e);
}

/* The encoder of n bytes, in scratch of gemma2_encode_scratch(n) bytes. */
static struct encoder start_encoder(const gemma2_model *m, int plain, int32_t *ids, size_t max_ids,
                                    void *scratch, size_t n)
{
    uint8_t *p = (uint8_t *)scratch + (-(uintptr_t)scratch & 7);
    struct encoder e = {.t = &m->tokenizer, .plain = plain,
                        .max_piece = (uint32_t)m->config.max_piece_bytes, .text = p,
                        .ids = ids, .max_ids = max_ids};
    e.heap = (uint64_t *)(p + round_up(3 * n, 8));
    e.symbols = (struct symbol *)(e.heap + 3 * n);
    return e;
}

/* ---- chat: messages to ids, by what the template writes before and after each ----
 *
 * A conversation is BOS (if chat.bos is 1), start, and for each message before, text, after; to let
 * the model answer, generate follows.  System text has a turn of its own, which replaces start, or
 * it is folded into the first user turn: before, system text, join, text, after.
 *
 * Template and texts between two markers of the vocabulary are encoded together, as the template's
 * author does it.  No text can forge a turn.  Markers are looked for in the template alone.  A
 * template may also mark turns with plain text, as "### Response:".  Where a text spells such a
 * line, alone or with what surrounds it, it is cut inside a piece of that line. */

static const char *const chat_keys[N_CHAT_PARTS] = {
    "chat.refused", "chat.bos", "chat.trim", "chat.start", "chat.system.before",
    "chat.system.after", "chat.system.join", "chat.user.before", "chat.user.after",
    "chat.model.before", "chat.model.after", "chat.generate"};

enum { MAX_CHAT_PART = 1 << 16, MAX_CHAT_LINES = 64, MAX_LINE_BYTES = 255 };

struct turn_line {
    struct text text; /* normalised, at most MAX_LINE_BYTES bytes */
    uint32_t cut;     /* where its first piece of several characters is cut */
};

struct conversation {
    const gemma2_model *m;
    struct encoder e;
    size_t from; /* e.text before this is encoded */
    struct range {
        uint32_t start, end;
    } *texts;    /* where strangers' texts lie in e.text */
    size_t n_texts, text_at;
    struct turn_line turn_lines[MAX_CHAT_LINES];
    int n_turn_lines;
};

/* A character of valid UTF-8 that Python's str.strip, which templates call, takes off. */
static int is_space(const uint8_t *p, uint32_t length)
{
    uint32_t c = length == 1 ? p[0]
               : length == 2 ? (p[0] & 31u) << 6 | (p[1] & 63u)
               : length == 3 ? (p[0] & 15u) << 12 | (p[1] & 63u) << 6 | (p[2] & 63u) : 0;
    return (c >= 9 && c <= 13) || (c >= 28 && c <= 32) || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
           c == 0x205f || c == 0x3000;
}

enum { AT_START = 1, AT_END = 2 };

static struct text trimmed(struct text s, int ends)
{
    struct text t = {s.p, 0};
    for (uint32_t at = 0, length; at < s.n; at += length ? length : 1) {
        length = utf8_length(s.p + at, s.n - at);
        if (!is_space(s.p + at, length))
            t.n = (uint32_t)(s.p + at + (length ? length : 1) - t.p);
        else if (ends & AT_START)
            t.p += t.n ? 0 : length;
    }
    return ends & AT_END ? t : (struct text){t.p, (uint32_t)(s.p + s.n - t.p)};
}

static int chat_flag(const gemma2_model *m, enum chat_part part)
{
    return m->chat[part].n == 1 && *m->chat[part].p == '1';
}

static size_t message_size(const gemma2_message *message)
{
    return message->size < 0 ? strlen(message->text) : (size_t)message->size;
}

enum { TRIM_FOLD = GEMMA2_ROLE_MODEL + 1 };

/* Whether chat.trim, which is 1, 0 or names, has a role's texts trimmed.  Its name "fold" means
 * that system text and first user text are trimmed as one. */
static int is_trimmed(const gemma2_model *m, int32_t role)
{
    static const char *const names[] = {"system", "user", "model", "fold"};
    struct text trim = m->chat[CHAT_TRIM];
    uint32_t n = (uint32_t)strlen(names[role]);
    for (; trim.n >= n; trim.p++, trim.n--)
        if (!memcmp(trim.p, names[role], n))
            return 1;
    return role != TRIM_FOLD && chat_flag(m, CHAT_TRIM);
}

/* The text of a message as the template has it. */
static struct text message_text(const gemma2_model *m, const gemma2_message *message, int ends)
{
    size_t n = message_size(message);
    struct text s = {(const uint8_t *)(message->text ? message->text : ""), (uint32_t)n};
    return is_trimmed(m, message->role) ? trimmed(s, ends) : s;
}

/* Encodes what is pending up to `to`. */
static void encode_pending(struct conversation *c, size_t to)
{
    uint8_t cut[MAX_LINE_BYTES + 1] = {0}; /* whether to cut at a position, modulo 256 */
    for (size_t at = c->from; at < to && c->n_turn_lines; at++) {
        if (cut[at % sizeof cut]) {
            encode_text(&c->e, c->from, at);
            c->from = at;
            cut[at % sizeof cut] = 0;
        }
        while (c->text_at < c->n_texts && c->texts[c->text_at].end <= at)
            c->text_at++;
        size_t start = c->text_at < c->n_texts ? c->texts[c->text_at].start : to;
        for (int i = 0; i < c->n_turn_lines; i++) {
            const struct turn_line *line = &c->turn_lines[i];
            size_t end = at + line->text.n, inside = at + line->cut;
            if (end <= to && end > start && !memcmp(c->e.text + at, line->text.p, end - at))
                cut[(inside > start ? inside : start) % sizeof cut] = 1;
        }
    }
    encode_text(&c->e, c->from, to);
    c->from = to;
}

/* Appends a part of the template: its markers as ids, the rest to what is pending. */
static void add_part(struct conversation *c, enum chat_part part)
{
    struct encoder *e = &c->e;
    size_t at = e->n;
    normalise(e, c->m->chat[part].p, c->m->chat[part].n);
    while (at < e->n) {
        struct text rest = {e->text + at, (uint32_t)(e->n - at)};
        int32_t marker = longest_whole(e->t, rest, WHOLE_MARKERS);
        if (marker >= 0) {
            encode_pending(c, at);
            emit(e, marker);
            e->after_unk = 0;
            at = c->from += piece_text(e->t, (uint32_t)marker).n;
        } else
            at += utf8_length(rest.p, rest.n);
    }
}

static void add_message(struct conversation *c, struct text s)
{
    uint32_t start = (uint32_t)c->e.n;
    normalise(&c->e, s.p, s.n);
    c->texts[c->n_texts++] = (struct range){start, (uint32_t)c->e.n};
}

/* How far into a text that begins at `start` its first piece of several characters is cut. */
static uint32_t find_cut(const struct encoder *from, size_t start)
{
    int32_t ids[MAX_LINE_BYTES];
    struct encoder e = *from;
    uint32_t n = (uint32_t)(e.n - start), first = utf8_length(e.text + start, n);
    e.ids = ids, e.max_ids = MAX_LINE_BYTES, e.n_ids = 0;
    encode_text(&e, start, e.n);
    for (uint32_t at = 0, i = 0; at < n && i < e.n_ids; i++) {
        uint32_t length = utf8_length(e.text + start + at, n - at);
        int kind = e.t->kinds[ids[i]];
        uint32_t bytes = kind == GEMMA2_PIECE_BYTE ? 1 : piece_text(e.t, (uint32_t)ids[i]).n;
        if (kind == GEMMA2_PIECE_UNKNOWN)
            break;
        if (kind != GEMMA2_PIECE_BYTE && bytes > length)
            return at + length;
        at += bytes;
    }
    return first;
}

/* Keeps a line that has more than one character and no marker of the vocabulary. */
static void add_turn_line(struct conversation *c, struct text line)
{
    struct encoder *e = &c->e;
    size_t start = e->n, at = start, end = start;
    line = trimmed(line, AT_START | AT_END);
    normalise(e, line.p, line.n);
    for (uint32_t length; at < e->n; at += length) {
        struct text rest = {e->text + at, (uint32_t)(e->n - at)};
        length = utf8_length(rest.p, rest.n);
        end = at + length <= start + MAX_LINE_BYTES ? at + length : end;
        if (longest_whole(e->t, rest, WHOLE_MARKERS) >= 0)
            break;
    }
    if (at < e->n || start == end || end == start + utf8_length(e->text + start, e->n - start)) {
        e->n = start;
        return;
    }
    e->n = end;
    struct text kept = {e->text + start, (uint32_t)(end - start)};
    c->turn_lines[c->n_turn_lines++] = (struct turn_line){kept, find_cut(e, start)};
}

static void find_turn_lines(struct conversation *c)
{
    for (int part = CHAT_SYSTEM_BEFORE; part < N_CHAT_PARTS; part++) {
        struct text s = c->m->chat[part];
        for (uint32_t n; s.n; s.p += n, s.n -= n) {
            const uint8_t *end = memchr(s.p, '\n', s.n);
            struct text line = {s.p, n = end ? (uint32_t)(end - s.p) + 1 : s.n};
            add_turn_line(c, line);
        }
    }
    c->from = c->e.n;
}

static void encode_messages(struct conversation *c, const gemma2_message *messages, size_t n,
                            unsigned flags)
{
    const gemma2_model *m = c->m;
    struct text system = {NULL, 0};
    find_turn_lines(c);
    if (n && messages->role == GEMMA2_ROLE_SYSTEM)
        system = message_text(m, messages++, AT_START | AT_END), n--;
    int own_turn = system.p && m->chat[CHAT_SYSTEM_BEFORE].p;
    int as_one = system.p && !own_turn && is_trimmed(m, TRIM_FOLD);
    if (as_one)
        system = trimmed(system, AT_START);
    int fold = system.n && !own_turn;
    if (flags & GEMMA2_CHAT_CONTINUE)
        add_part(c, CHAT_MODEL_AFTER);
    else if (chat_flag(m, CHAT_BOS) && m->config.bos >= 0)
        emit(&c->e, m->config.bos);
    if (own_turn) {
        add_part(c, CHAT_SYSTEM_BEFORE);
        add_message(c, system);
        add_part(c, CHAT_SYSTEM_AFTER);
    } else if (!(flags & GEMMA2_CHAT_CONTINUE))
        add_part(c, CHAT_START);
    for (size_t i = 0; i < n; i++, fold = 0) {
        int user = messages[i].role == GEMMA2_ROLE_USER;
        add_part(c, user ? CHAT_USER_BEFORE : CHAT_MODEL_BEFORE);
        if (fold) {
            add_message(c, system);
            add_part(c, CHAT_SYSTEM_JOIN);
        }
        add_message(c, message_text(m, &messages[i],
                                    fold && as_one ? AT_END : AT_START | AT_END));
        add_part(c, user ? CHAT_USER_AFTER : CHAT_MODEL_AFTER);
    }
    if (flags & GEMMA2_CHAT_GENERATE)
        add_part(c, CHAT_GENERATE);
    encode_pending(c, c->e.n);
}

/* ---- decoding ---- */

/* Whether the n bytes at p, which are no character yet, begin one. */
static int begins_character(const uint8_t *p, uint32_t n)
{
    uint8_t rest[4] = {0x80, 0x80, 0x80, 0x80};
    if (n == 1)
        return p[0] >= 0xc2 && p[0] <= 0xf4;
    memcpy(rest, p, n);
    return utf8_length(rest, 4) > n;
}

/* Moves complete characters from the held bytes to the text.  `all` moves the rest, too: each
 * byte that makes no character becomes U+FFFD, as in SentencePiece. */
static size_t release_bytes(gemma2_utf8 *hold, int all, char *out)
{
    size_t n = 0;
    while (hold->n) {
        uint32_t length = utf8_length(hold->bytes, hold->n), used = length ? length : 1;
        if (!length && !all && begins_character(hold->bytes, hold->n))
            break;
        memcpy(out + n, length ? (const char *)hold->bytes : "\xef\xbf\xbd", length ? length : 3);
        n += length ? length : 3;
        hold->n = (uint8_t)(hold->n - used);
        memmove(hold->bytes, hold->bytes + used, hold->n);
    }
    return n;
}

/* A piece's text: U+2581 becomes a space. */
static size_t spaced_text(struct text s, char *out)
{
    size_t n = 0;
    for (uint32_t i = 0; i < s.n; i++)
        if (s.n - i >= 3 && !memcmp(s.p + i, "\xe2\x96\x81", 3)) {
            out[n++] = ' ';
            i += 2;
        } else
            out[n++] = (char)s.p[i];
    return n;
}

/* ===================================================================================
 * 6. Sampler, and what constrains it
 * =================================================================================== */

/* PCG32, XSH-RR 64/32 (O'Neill 2014): 32 random bits. */
static const uint64_t PCG_INCREMENT = 1442695040888963407u;

static uint32_t pcg32(uint64_t *state)
{
    uint64_t old = *state;
    *state = old * 6364136223846793005u + PCG_INCREMENT;
    uint32_t x = (uint32_t)((old >> 18 ^ old) >> 27), turn = (uint32_t)(old >> 59);
    return x >> turn | x << (-turn & 31);
}

/* Bias and penalties change the logits; x is the session's copy. */
static int adjust_logits(const gemma2_session *s, const gemma2_sampler *p, float *x)
{
    int32_t n_vocab = s->model->config.n_vocab;
    for (uint32_t i = 0; i < p->n_bias; i++) {
        if (p->bias[i].id < 0 || p->bias[i].id >= n_vocab)
            return GEMMA2_ERR_TOKEN;
        x[p->bias[i].id] += p->bias[i].bias;
    }
    int32_t first = max_i32(0, s->position - p->penalty_last);
    for (int32_t i = first; i < s->position; i++) {
        int32_t id = s->ids[i], seen = 0;
        for (int32_t k = first; k < i && !seen; k++)
            seen = s->ids[k] == id;
        if (!seen)
            x[id] = x[id] > 0 ? x[id] / p->repetition_penalty : x[id] * p->repetition_penalty;
        x[id] -= p->frequency_penalty + (seen ? 0 : p->presence_penalty);
    }
    for (int32_t i = 0; i < n_vocab; i++)
        if (!(x[i] < INFINITY)) /* a bias of NaN or infinity, or one that overflows */
            return GEMMA2_ERR_ARGUMENT;
    return GEMMA2_OK;
}

/* A heap of the k best of n logits, the best on top.  -inf is left out, and so is every token whose
 * bit in the mask is 0; mask NULL: all have 1. */
static size_t keep_top(const float *x, const uint32_t *mask, size_t n, size_t k, uint64_t *heap)
{
    size_t kept = 0;
    float worst = -INFINITY;
    for (size_t base = 0; base < n; base += 32) {
        size_t end = n - base < 32 ? n : base + 32;
        uint32_t allowed = mask ? mask[base / 32] : 0xffffffff;
        int better = 0;
        for (size_t i = base; i < end; i++)
            better |= x[i] > worst;
        for (size_t i = base; better && allowed && i < end; i++, allowed >>= 1) {
            if (!(allowed & 1) || x[i] <= worst)
                continue;
            uint64_t key = ~key_of(x[i], (uint32_t)i); /* the worst on top */
            if (kept < k)
                push_key(heap, &kept, key);
            else
                heap[0] = key, sift_down(heap, k, 0);
            if (kept == k)
                worst = float_in(~heap[0]);
        }
    }
    for (size_t i = 0; i < kept; i++)
        heap[i] = ~heap[i];
    for (size_t i = kept / 2; i-- > 0;)
        sift_down(heap, kept, i);
    return kept;
}

/* Draws one of the best candidates, as far as top-p and min-p reach.  Their probabilities
 * exp((logit - best) / temperature) / total are those after top-k. */
static int32_t draw(gemma2_sampler *p, uint64_t *heap, size_t n)
{
    float best = float_in(heap[0]), inverse = 1.0f / p->temperature;
    double total = 0, kept = 0, u;
    for (size_t i = 0; i < n; i++)
        total += exp_f32((float_in(heap[i]) - best) * inverse);
    size_t n_kept = 0, left = n; /* popped candidates go to the end of the heap's array */
    while (left && (n_kept == 0 || kept < (double)p->top_p * total)) {
        uint64_t c = pop_key(heap, &left);
        double weight = exp_f32((float_in(c) - best) * inverse);
        heap[n - 1 - n_kept] = c;
        if (n_kept && weight < p->min_p)
            break;
        n_kept++;
        kept += weight;
    }
    u = pcg32(&p->rng) * 0x1p-32 * kept;
    size_t at = n;
    do
        u -= exp_f32((float_in(heap[--at]) - best) * inverse);
    while (u >= 0 && at > n - n_kept); /* rounding may leave u at 0 or above: then the last */
    return (int32_t)(uint32_t)heap[at];
}

static int sampler_is_sound(const gemma2_sampler *given)
{
    gemma2_sampler copy, *p = &copy;
    return given->struct_size >= offsetof(gemma2_sampler, rng) + sizeof p->rng &&
           copy_params(p, sizeof *p, given, given->struct_size, 8) &&
           p->temperature >= 0 && p->temperature <= 1e6f && p->top_k >= 0 &&
           p->top_p > 0 && p->top_p <= 1 && p->min_p >= 0 && p->min_p <= 1 &&
           p->penalty_last >= 0 && p->repetition_penalty > 0 &&
           p->repetition_penalty <= 1e6f && fabsf(p->presence_penalty) <= 1e6f &&
           fabsf(p->frequency_penalty) <= 1e6f && (p->bias || !p->n_bias);
}

static int32_t sample(gemma2_session *s, gemma2_sampler *p, const float *logits)
{
    gemma2_worker *work = s->worker;
    size_t n = (size_t)s->model->config.n_vocab, k = (size_t)p->top_k;
    if (!are_logits(logits, n))
        return GEMMA2_ERR_NONFINITE;
    if (p->n_bias || p->repetition_penalty != 1 || p->presence_penalty != 0 ||
        p->frequency_penalty != 0) {
        memcpy(work->adjusted, logits, n * sizeof *logits);
        int status = adjust_logits(s, p, work->adjusted);
        if (status < 0)
            return status;
        logits = work->adjusted;
    }
    if (p->temperature == 0)
        k = 1;
    const uint32_t *mask = p->struct_size >= sizeof *p ? p->allow : NULL;
    size_t kept = keep_top(logits, mask, n, k && k < n ? k : n, work->candidates);
    if (!kept) /* every token is banned */
        return GEMMA2_ERR_ARGUMENT;
    return p->temperature == 0 ? (int32_t)(uint32_t)work->candidates[0]
                               : draw(p, work->candidates, kept);
}

/* ---- grammars: what a reply may be, as a machine that reads bytes ----
 *
 * A grammar becomes instructions.  Rules call each other as functions do, a rule's body is a
 * graph, and characters are their UTF-8 bytes, so a token may end inside a character.  Where a
 * reply stands is a set of pairs (instruction, stack), because alternatives run side by side.  A
 * stack is again a set of such pairs: all places that may be returned to.  Sets are numbered by
 * their contents (gemma2_matcher), so what a byte does to a set is worked out once.
 * A token that a grammar names is a character beyond Unicode: TEXT_TOKEN + id if its text is whole
 * characters, else OTHER_TOKEN + id.  Its first byte is above NAME_MARK, as no byte of a text is.
 * root ::= ("a" | b)* "c" becomes, without the splits that have one way:
 *    calls: split -> call item, back to calls | byte c -> end
 *    item:  split -> byte a -> end            | call b -> end */
enum { OP_END, OP_BYTE, OP_CALL, OP_SPLIT };
enum { MAX_GRAMMAR = 1 << 22, MAX_INSTS = 1 << 20, MAX_COST = 1 << 24, MAX_REPEAT = 2000,
       MAX_NESTING = 250, MAX_RANGES = 1000, MAX_CODE = 0x10ffff, MAX_WORK = 1 << 27,
       TEXT_TOKEN = 1 << 24, OTHER_TOKEN = 2 << 24, NAME_BYTES = 5, NAME_MARK = 0xf4 };
static const uint32_t NOWHERE = 0xffffffff;

struct inst {
    uint8_t op, low, high; /* OP_BYTE: bytes low..high */
    uint8_t sound;         /* from here no rule calls itself before it reads: see settle */
    uint32_t next;         /* OP_CALL: where the rule returns to */
    uint32_t other; /* OP_CALL: where the rule starts.  OP_SPLIT: the second way, or NOWHERE.
                     * OP_BYTE: what may be read in place of the byte, or NOWHERE */
    uint32_t cost;  /* bytes of the shortest way to the end of the rule; a named token is 1 */
};

struct gemma2_grammar {
    const gemma2_model *model;
    uint32_t n_insts, root;
    struct inst insts[]; /* [0] ends the reply */
};

struct rule {
    struct text name; /* where the grammar has it first */
    uint32_t start;   /* an OP_SPLIT that leads to the body; to 0 until the body is read */
};

struct parser {
    gemma2_grammar *g;
    const uint8_t *text;
    uint32_t size, at, n_rules;
    struct rule *rules; /* [n_rules, a power of 2] hash by name, linear probing */
    int failed;
    struct errbuf *err;
};

/* Refuses what stands at that byte and ends the text, so that all loops stop.  Returns 0. */
__attribute__((format(PRINTF_FORMAT, 3, 4)))
static uint32_t refuse(struct parser *p, uint32_t at, const char *format, ...)
{
    char what[200];
    uint32_t line = 1, column = 1;
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    for (uint32_t i = 0; i < at && i < p->size; i++) {
        column = p->text[i] == '\n' ? 1 : column + ((p->text[i] & 0xc0) != 0x80);
        line += p->text[i] == '\n';
    }
    if (!p->failed)
        fail(p->err, "line %u, column %u: %s", line, column, what);
    p->failed = 1, p->size = 0;
    return 0;
}

/* Appends an instruction that leads to the one behind it.  Returns its index, or without room 0:
 * callers then write into [0] of a grammar that is thrown away. */
static uint32_t put(struct parser *p, int op, uint32_t other)
{
    gemma2_grammar *g = p->g;
    if (g->n_insts == MAX_INSTS)
        return refuse(p, p->at, "up to here the grammar takes over %d instructions", MAX_INSTS);
    g->insts[g->n_insts] = (struct inst){(uint8_t)op, .next = g->n_insts + 1, .other = other,
                                         .cost = NOWHERE};
    return g->n_insts++;
}

/* Leads link to the UTF-8 of characters low..high: a byte with the bits of mark, then `more` bytes.
 * For those, low and high are the bits that remain.  Last bytes lead to NOWHERE as yet.
 * Returns the link for other characters. */
static uint32_t *put_codes(struct parser *p, uint32_t *link, uint32_t low, uint32_t high,
                           uint32_t more, uint32_t mark)
{
    uint32_t unit = 1u << 6 * more; /* characters of one first byte */
    for (uint32_t end; low <= high; low = end + 1) {
        uint32_t whole = (high + 1) / unit * unit; /* behind the last whole unit */
        end = low % unit == 0 && whole > low ? whole - 1 : min_u32(high, low | (unit - 1));
        *link = p->g->n_insts;
        struct inst *byte = &p->g->insts[put(p, OP_BYTE, NOWHERE)];
        byte->low = (uint8_t)(mark | low / unit), byte->high = (uint8_t)(mark | end / unit);
        if (more)
            put_codes(p, &byte->next, low % unit, end % unit, more - 1, 0x80);
        else
            byte->next = NOWHERE;
        link = &byte->other;
    }
    return link;
}

/* Puts one character of n ranges low << 32 | high.  A range with low > high is empty. */
static void put_class(struct parser *p, const uint64_t *ranges, uint32_t n)
{
    enum { FORMS = 6 };
    static const struct form {
        uint32_t low, high, more, mark;
    } forms[FORMS] = {{0, 0x7f, 0, 0}, {0x80, 0x7ff, 1, 0xc0}, {0x800, 0xd7ff, 2, 0xe0},
                      {0xe000, 0xffff, 2, 0xe0}, /* no surrogates */ {0x10000, MAX_CODE, 3, 0xf0},
                      {TEXT_TOKEN, TEXT_TOKEN + OTHER_TOKEN - 1, NAME_BYTES - 1, NAME_MARK}};
    gemma2_grammar *g = p->g;
    uint32_t first = g->n_insts, start, *link = &start;
    for (uint32_t i = 0; i < n * FORMS; i++) {
        const struct form *f = &forms[i % FORMS];
        uint32_t low = (uint32_t)(ranges[i / FORMS] >> 32), high = (uint32_t)ranges[i / FORMS];
        link = put_codes(p, link, low > f->low ? low : f->low, min_u32(high, f->high), f->more,
                         f->mark);
    }
    for (uint32_t i = first; i < g->n_insts; i++) /* NOWHERE becomes what follows the class */
        g->insts[i].next = min_u32(g->insts[i].next, g->n_insts);
}

/* ---- GBNF ---- */

static int peek(const struct parser *p) { return p->at < p->size ? p->text[p->at] : -1; }

/* Reads the word if it comes next.  Returns whether it did. */
static int next_is(struct parser *p, const char *word)
{
    uint32_t start = p->at;
    for (; *word && peek(p) == *word; word++)
        p->at++;
    p->at = *word ? start : p->at;
    return !*word;
}

/* Skips blanks and comments, and newlines where a rule may go on behind them. */
static void skip_blanks(struct parser *p, int newlines)
{
    while (peek(p) > 0 && strchr(newlines ? " \t#\r\n" : " \t#", peek(p)))
        if (p->text[p->at++] == '#')
            while (peek(p) >= 0 && peek(p) != '\n' && peek(p) != '\r')
                p->at++;
}

/* Reads a number between blanks.  Returns NOWHERE if there is none. */
static uint32_t read_number(struct parser *p)
{
    uint32_t n = NOWHERE;
    for (skip_blanks(p, 0); peek(p) >= '0' && peek(p) <= '9'; p->at++)
        n = min_u32((n == NOWHERE ? 0 : n) * 10 + (uint32_t)(peek(p) - '0'), MAX_GRAMMAR);
    skip_blanks(p, 0);
    return n;
}

/* Reads a character of a literal or class, which begins at start.  NOWHERE: it has read `end`. */
static uint32_t read_char(struct parser *p, uint32_t start, int end)
{
    static const char names[] = "xuUtnr\\\"[]", codes[] = "\2\4\10\t\n\r\\\"[]";
    int c = peek(p);
    if (c < 0 || c == '\n')
        refuse(p, start, "this has no closing %c", end);
    if (p->failed || c == end)
        return p->at++, NOWHERE;
    uint32_t at = p->at++, n = utf8_length(p->text + at, p->size - at);
    uint32_t code = (uint32_t)c & 0x7fu >> (n > 1 ? n : 0);
    if (!n)
        return refuse(p, at, "this is not UTF-8");
    for (; n > 1; n--)
        code = code << 6 | (p->text[p->at++] & 63);
    if (c != '\\')
        return code;
    const char *name = peek(p) > 0 ? strchr(names, peek(p)) : NULL;
    if (!name)
        return refuse(p, at, "there is no such escape; there are \\t \\n \\r \\\\ \\\" \\[ \\] "
                             "\\xHH \\uHHHH \\UHHHHHHHH");
    code = (uint32_t)codes[name - names], p->at++; /* of x, u and U: how many digits follow */
    if (name >= names + 3)
        return code;
    for (n = code, code = 0; n > 0; n--, p->at++) {
        int digit = hex_digit(peek(p) >= 'a' && peek(p) <= 'f' ? peek(p) - 32 : peek(p));
        if (digit < 0)
            return refuse(p, at + 2, "hexadecimal digits of a character were expected here");
        code = code * 16 + (uint32_t)digit;
    }
    if (code > MAX_CODE || (code >= 0xd800 && code <= 0xdfff))
        return refuse(p, at, "U+%04X is no character", code);
    return code;
}

static int compare_keys(const void *left, const void *right)
{
    uint64_t a, b;
    memcpy(&a, left, sizeof a), memcpy(&b, right, sizeof b);
    return (a > b) - (a < b);
}

static void read_class(struct parser *p)
{
    uint64_t ranges[MAX_RANGES + 1]; /* low << 32 | high */
    uint32_t start = p->at - 1, first = p->g->n_insts, n = 0, gap = 0; /* gap: behind the ranges */
    int negated = next_is(p, "^");
    for (uint32_t low, high; (low = high = read_char(p, start, ']')) != NOWHERE;) {
        if (peek(p) == '-' && p->at + 1 < p->size && p->text[p->at + 1] != ']') {
            p->at++;
            high = read_char(p, start, ']');
        }
        if (high < low || n == MAX_RANGES)
            refuse(p, p->at, high < low ? "this range ends before it begins"
                                        : "this class has too many parts: make it two, (a | b)");
        else
            ranges[n++] = (uint64_t)low << 32 | high;
    }
    qsort(ranges, n, sizeof *ranges, compare_keys);
    ranges[n] = (uint64_t)(MAX_CODE + 1) << 32; /* behind all characters, for the last gap */
    for (uint32_t i = 0; i <= n && negated; i++) { /* the gaps; 1..0 is an empty one */
        uint32_t low = (uint32_t)(ranges[i] >> 32), high = (uint32_t)ranges[i];
        ranges[i] = low > gap ? (uint64_t)gap << 32 | (low - 1) : (uint64_t)1 << 32;
        gap = high >= gap ? high + 1 : gap;
    }
    put_class(p, ranges, n + (uint32_t)negated);
    if (p->g->n_insts == first)
        refuse(p, start, "no character is in this class");
}

/* Reads <[id]> or <text>: that token.  With ! before it: any other token of whole characters. */
static void read_token(struct parser *p)
{
    const gemma2_model *m = p->g->model;
    uint32_t start = p->at, negated = (uint32_t)next_is(p, "!"), name = p->at;
    int by_id = next_is(p, "<[");
    uint32_t id = by_id ? read_number(p) : NOWHERE;
    while (!by_id && peek(p) > 0 && !strchr("\n>", peek(p)))
        p->at++;
    if (!next_is(p, by_id ? "]>" : ">") || p->text[name] != '<')
        refuse(p, start, "a token is <[id]> or <text>, with ! before it for any other token");
    else if (!by_id)
        id = (uint32_t)gemma2_find_piece(m, (const char *)p->text + name, p->at - name);
    if (id >= m->tokenizer.n)
        refuse(p, start, "the vocabulary has no such token");
    else if (!negated && gemma2_is_stop(m, (int32_t)id))
        refuse(p, start, "this token ends replies, so it cannot be a part of them");
    else if (!negated && m->tokenizer.kinds[id] == GEMMA2_PIECE_BYTE)
        refuse(p, start, "this token is a single byte, which may be no character");
    else if (!negated && !is_kept(m, id))
        refuse(p, start, "the model cannot write this token, which its head has not kept");
    uint64_t first = TEXT_TOKEN, text = first + id, other = OTHER_TOKEN + id; /* whichever it is */
    uint64_t ranges[2][2] = {{text << 32 | text, other << 32 | other},
                             {first << 32 | (text - 1), (text + 1) << 32 | (OTHER_TOKEN - 1)}};
    put_class(p, ranges[negated], 2);
}

/* Reads a name and returns where its rule starts, which may be defined later, or again: the last
 * definition counts.  no_name is the message if there is no name. */
static uint32_t read_name(struct parser *p, const char *no_name)
{
    struct text name = {p->text + p->at, 0};
    for (int c; (c = peek(p)) == '-' || c == '_' || (c >= '0' && c <= '9') ||
                ((c | 32) >= 'a' && (c | 32) <= 'z'); p->at++)
        name.n++;
    if (!name.n)
        return refuse(p, p->at, "%s", no_name);
    for (uint32_t at = (uint32_t)(hash_of(name) >> 32);; at++) {
        struct rule *r = &p->rules[at & (p->n_rules - 1)];
        if (!r->name.n) {
            *r = (struct rule){name, put(p, OP_SPLIT, NOWHERE)};
            p->g->insts[r->start].next = 0;
        }
        if (same_text(r->name, name))
            return r->start;
    }
}

/* Reads *, +, ? or {m,n} behind an item, which then becomes a rule: an OP_END closes it, and
 * `before` leads past it to m calls, then to a split and a call for each that may be left out. */
static void read_repeat(struct parser *p, uint32_t before)
{
    gemma2_grammar *g = p->g;
    int c = peek(p);
    uint32_t start = p->at++, least = c == '+', most = c == '?' ? 1 : NOWHERE;
    if (c == '{') {
        least = read_number(p);
        most = next_is(p, ",") ? read_number(p) : least;
        if (!next_is(p, "}") || least > MAX_REPEAT || most < least ||
            (most > MAX_REPEAT && most != NOWHERE))
            refuse(p, start, "a repetition is {m}, {m,} or {m,n}, with m at most n and n at most "
                             "%d", MAX_REPEAT);
    }
    put(p, OP_END, NOWHERE);
    uint32_t item = g->insts[before].next, calls = most == NOWHERE ? least + 1 : most;
    uint32_t end = g->n_insts + 2 * calls - least; /* behind all calls and splits */
    g->insts[before].next = g->n_insts;
    for (uint32_t i = 0; i < calls && !p->failed; i++) {
        if (i >= least)
            put(p, OP_SPLIT, end);
        put(p, OP_CALL, item);
    }
    if (most == NOWHERE)
        g->insts[g->n_insts - 1].next = g->n_insts - 2; /* the last call returns to its split */
}

static void read_ways(struct parser *p, int nesting);

static void read_item(struct parser *p, int nesting)
{
    uint32_t start = p->at, before = put(p, OP_SPLIT, NOWHERE); /* which read_repeat leads past */
    int c = peek(p);
    if (next_is(p, "\"")) {
        for (uint64_t code; (code = read_char(p, start, '"')) != NOWHERE;)
            put_class(p, &(uint64_t){code << 32 | code}, 1);
    } else if (next_is(p, "["))
        read_class(p);
    else if (next_is(p, "."))
        put_class(p, &(uint64_t){MAX_CODE}, 1);
    else if (c == '<' || c == '!')
        read_token(p);
    else if (next_is(p, "(")) {
        if (nesting == MAX_NESTING)
            refuse(p, start, "parentheses are nested deeper than %d", MAX_NESTING);
        read_ways(p, nesting + 1);
        if (!next_is(p, ")"))
            refuse(p, start, "this ( is not closed");
    } else {
        uint32_t call = put(p, OP_CALL, 0);
        p->g->insts[call].other = read_name(p, "nothing of a grammar begins with this character");
        p->g->insts[call].next = p->g->n_insts; /* a new rule's start lies between */
    }
    for (skip_blanks(p, nesting); (c = peek(p)) > 0 && strchr("*+?{", c); skip_blanks(p, nesting))
        read_repeat(p, before);
}

/* Reads alternatives, up to the ')' or the end of the rule.  MAX_NESTING bounds the C stack. */
static void read_ways(struct parser *p, int nesting)
{
    gemma2_grammar *g = p->g;
    for (uint32_t end = 0;; p->at++) { /* 0: no way before, and [0].next is not used */
        uint32_t way = put(p, OP_SPLIT, NOWHERE);
        skip_blanks(p, 1);
        while (peek(p) >= 0 && !memchr("|)\r\n", peek(p), 4))
            read_item(p, nesting);
        g->insts[end].next = g->n_insts; /* the way before ends where this one does */
        if (peek(p) != '|')
            return;
        end = put(p, OP_SPLIT, NOWHERE);
        g->insts[way].other = g->n_insts;
    }
}

/* ---- finishing a grammar: shortest ways, empty languages, left recursion ---- */

/* A byte costs 1.  The first of a named token spares this, so that its bytes together cost 1. */
static uint32_t spares(uint32_t byte) { return byte > NAME_MARK ? NAME_BYTES - 1 : 0; }

/* Works out what instructions cost, then which are sound, from the last to the first until nothing
 * changes.  None is sound at first, and a rule that waits for itself stays so: left recursion.
 * What leads back is a repetition: its split looks at the ways.  0: it takes too long. */
static int settle(gemma2_grammar *g)
{
    static const struct inst no_way = {.sound = 1, .cost = 0xffffffff};
    int n_known = 0; /* 1: costs.  2: soundness too */
    for (uint64_t work = 0; n_known < 2 && work < MAX_WORK; work += g->n_insts) {
        int news = 0;
        for (uint32_t at = g->n_insts; at-- > 0;) {
            struct inst *i = &g->insts[at], *next = &g->insts[i->next];
            const struct inst *other = i->other == NOWHERE ? &no_way : &g->insts[i->other];
            if (i->op == OP_CALL && other->op == OP_SPLIT && other->other == NOWHERE)
                other = &g->insts[i->other = other->next]; /* past a split that has one way */
            uint64_t cost = next->cost, old_cost = i->cost;
            int sound = i->next <= at || next->sound, old_sound = i->sound;
            if (i->op == OP_CALL) {
                cost += other->cost;
                sound = other->sound && (sound || other->cost); /* cost 0: the rule may be empty */
            } else {
                cost = i->op == OP_END ? 0 : i->op == OP_BYTE ? cost + 1 - spares(i->low) : cost;
                cost = cost < other->cost ? cost : other->cost;
                sound = i->op != OP_SPLIT || (sound && other->sound);
            }
            i->cost = cost > MAX_COST ? NOWHERE : (uint32_t)cost;
            i->sound = n_known == 1 && sound;
            news |= i->cost != old_cost || i->sound != old_sound;
        }
        n_known += !news;
    }
    return n_known == 2;
}

/* Reads the whole text, and refuses a grammar that cannot be run. */
static int read_grammar(struct parser *p)
{
    gemma2_grammar *g = p->g;
    struct rule bad = {.start = 0}; /* the last: earlier ones may only be its callers */
    for (skip_blanks(p, 1); peek(p) >= 0; skip_blanks(p, 1)) {
        uint32_t start = read_name(p, "a rule was expected here: name ::= ...");
        skip_blanks(p, 0);
        if (!next_is(p, "::="))
            refuse(p, p->at, "::= was expected behind the name of a rule");
        g->insts[start].next = g->n_insts;
        read_ways(p, 0);
        if (peek(p) == ')')
            refuse(p, p->at, "this ) closes nothing");
        put(p, OP_END, NOWHERE);
    }
    if (p->failed)
        return 0;
    g->insts[g->n_insts] = g->insts[0]; /* what the last end leads to */
    if (!settle(g))
        return fail(p->err, "rules call each other in too long a chain: make the grammar smaller");
    for (const struct rule *r = p->rules; r < p->rules + p->n_rules; r++) {
        if (r->start > bad.start && !(g->insts[r->start].next && g->insts[r->start].sound))
            bad = *r;
        if (same_text(r->name, as_text("root")))
            g->root = r->start;
    }
    if (bad.start)
        refuse(p, (uint32_t)(bad.name.p - p->text), g->insts[bad.start].next ?
               "the rule '%.*s' can begin with itself, or with a rule that can (left recursion): "
               "move that call to the end of the rule" : "there is no rule '%.*s'",
               (int)min_u32(bad.name.n, 60), (const char *)bad.name.p);
    else if (!g->root)
        return fail(p->err, "the grammar has no rule 'root'");
    else if (g->insts[g->root].cost == NOWHERE)
        return fail(p->err, "no text of at most %d bytes fits the grammar", MAX_COST);
    return !p->failed;
}

/* ---- the vocabulary as a tree of bytes, for masks ----
 *
 * Nodes lie in depth-first order: a node's subtree follows it, and skip leads past it.  Tokens of
 * plain text, which are most, have a second tree: where a grammar takes any plain text, fill_plain
 * has their bits and needs no walk.  The first tree begins with all tokens as they are named. */
enum { MAX_TOKEN_BYTES = 255, PLAIN_CHARS = 16, NO_TOKEN = 0xffffff };

struct node {
    uint32_t skip;  /* (nodes of the subtree with this one) << 8 | byte */
    uint32_t token; /* (id or NO_TOKEN) << 8 | depth; 1 at the top */
};

struct vocabulary {
    uint32_t *plain; /* [PLAIN_CHARS] masks: tokens of 1, up to 2, ... plain characters */
    struct node *nodes;
    uint32_t n, first_plain, n_words;
};

struct token {
    struct text bytes;
    uint32_t id, kind; /* above 1: plain.  See text_kind */
};

static int compare_tokens(const void *left, const void *right)
{
    const struct token *a = left, *b = right;
    int order = (a->kind > 1) - (b->kind > 1); /* plain tokens come last */
    order = order ? order : compare_text(a->bytes, b->bytes);
    return order ? order : (a->id > b->id) - (a->id < b->id);
}

/* 1 + the number of characters if they are plain, 1 for other whole characters, 0 for a part of a
 * character.  Plain are up to PLAIN_CHARS characters that rules for JSON seldom tell apart: no
 * controls, quotes or backslashes, and none of U+2000..U+203F, which has ends of lines.
 * note_plain has the same characters as ranges of bytes. */
static uint32_t text_kind(struct text s)
{
    uint32_t chars = 0, length, plain = 1;
    for (uint32_t i = 0; i < s.n; i += length, chars++) {
        length = utf8_length(s.p + i, s.n - i);
        if (!length)
            return 0;
        if (s.p[i] < 0x20 || s.p[i] == '"' || s.p[i] == '\\' || s.p[i] == 0x7f ||
            (s.p[i] == 0xe2 && s.p[i + 1] == 0x80))
            plain = 0;
    }
    return plain && chars <= PLAIN_CHARS ? 1 + chars : 1;
}

/* Writes the bytes that a token adds to a reply.  Returns how many, 0 if it has no text. */
static uint32_t token_bytes(const struct tokenizer *t, uint32_t id, uint8_t *bytes)
{
    struct text s = piece_text(t, id);
    int kind = t->kinds[id];
    if (kind == GEMMA2_PIECE_BYTE)
        return bytes[0] = (uint8_t)byte_piece(s), 1;
    if (kind != GEMMA2_PIECE_NORMAL && kind != GEMMA2_PIECE_USER)
        return 0;
    return (uint32_t)spaced_text(s, (char *)bytes);
}

/* Writes a token as its text or, named, as its character.  Returns how many bytes, 0 for none. */
static uint32_t spell_token(const struct tokenizer *t, uint32_t id, int named, uint8_t *bytes)
{
    uint32_t n = token_bytes(t, id, bytes);
    n = n && n <= MAX_TOKEN_BYTES && bytes[0] <= NAME_MARK ? n : 0;
    if (!named)
        return n;
    uint32_t code = (n && utf8_length(bytes, n) ? TEXT_TOKEN : OTHER_TOKEN) + id;
    for (n = NAME_BYTES - 1; n > 0; n--, code >>= 6)
        bytes[n] = (uint8_t)(0x80 | (code & 63));
    bytes[0] = (uint8_t)(NAME_MARK | code);
    return NAME_BYTES;
}

/* Makes the trees of sorted tokens.  Each adds a node, so tokens of equal bytes are brothers. */
static void build_trees(struct vocabulary *v, const struct token *t, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        struct text s = t[i].bytes, last = i ? t[i - 1].bytes : s;
        int is_first = !i || (t[i].kind > 1) != (t[i - 1].kind > 1);
        uint32_t same = 0, most = is_first ? 0 : min_u32(last.n, s.n - 1);
        while (same < most && last.p[same] == s.p[same])
            same++;
        for (; same < s.n; same++)
            v->nodes[v->n++] = (struct node){s.p[same], (uint32_t)NO_TOKEN << 8 | (same + 1)};
        v->nodes[v->n - 1].token = t[i].id << 8 | s.n;
        v->first_plain = t[i].kind > 1 ? v->first_plain : v->n;
    }
    for (uint32_t i = v->n; i-- > 0;) {
        uint32_t next = i + 1, depth = v->nodes[i].token & 255;
        while (next < v->n && (v->nodes[next].token & 255) > depth)
            next += v->nodes[next].skip >> 8;
        v->nodes[i].skip |= (next - i) << 8;
    }
}

static struct vocabulary *make_vocabulary(const gemma2_model *m)
{
    const struct tokenizer *t = &m->tokenizer;
    size_t words = (t->n + 31) / 32, blob = (size_t)t->n * NAME_BYTES;
    blob += t->n ? get_u32(t->ends + 4 * (size_t)(t->n - 1)) : 0;
    struct vocabulary *v = calloc(1, sizeof *v + PLAIN_CHARS * words * sizeof *v->plain +
                                     blob * sizeof *v->nodes);
    struct token *tokens = malloc((2 * t->n + (size_t)1) * sizeof *tokens + blob);
    if (!v || !tokens || blob >= NO_TOKEN)
        return free(v), free(tokens), NULL;
    uint8_t *bytes = (uint8_t *)(tokens + 2 * t->n + 1);
    uint32_t n = 0, n_named = 0;
    v->plain = (uint32_t *)(v + 1), v->n_words = (uint32_t)words;
    v->nodes = (struct node *)(v->plain + PLAIN_CHARS * words);
    for (uint32_t i = 0; i < 2 * t->n; i++) { /* all named, which is sorted; all texts */
        uint32_t id = i % t->n, named = i < t->n;
        struct text s = {bytes, spell_token(t, id, (int)named, bytes)};
        if (!s.n || gemma2_is_stop(m, (int32_t)id) || !is_kept(m, id))
            continue;
        uint32_t kind = text_kind(s);
        tokens[n++] = (struct token){s, id, kind}, n_named += named;
        for (uint32_t k = kind > 1 ? kind - 2 : PLAIN_CHARS; k < PLAIN_CHARS; k++)
            v->plain[k * words + id / 32] |= 1u << id % 32;
        bytes += s.n;
    }
    qsort(tokens + n_named, n - n_named, sizeof *tokens, compare_tokens);
    build_trees(v, tokens, n);
    free(tokens);
    return v;
}

/* The model's vocabulary, made at the first call.  If threads ask at once, each makes one and the
 * first to finish wins. */
static const struct vocabulary *vocabulary_of(const gemma2_model *m)
{
    struct vocabulary *none_yet = NULL, *v = atomic_load(m->vocabulary);
    if (v || !(v = make_vocabulary(m)))
        return v;
    if (!atomic_compare_exchange_strong(m->vocabulary, &none_yet, v)) {
        free(v);
        v = none_yet;
    }
    return v;
}

/* ---- matching: numbered sets, and masks ---- */
/* Sets and items take 32 MB.  Searches count nodes, EXACT_LIMIT tokens. */
enum { MAX_SETS = 1 << 19, MAX_ITEMS = 1 << 21, MAX_ROWS = 4096, MAX_MASKS = 32,
       MAX_CLOSURE = MAX_INSTS, MAX_FAMILY = 500, SLOTS = 1 << 15,
       SMALL_SEARCH = 3000, LARGE_SEARCH = 1 << 20, EXACT_LIMIT = 16, MOST_LEFT = 1 << 30 };

struct set {
    uint32_t first, n;
    uint32_t chained; /* the next set in its slot, or 0 */
    uint32_t cost;   /* bytes of the shortest way to an end of the reply; 0: it may end here */
    uint32_t row;    /* where its row is, if row_set there names the set */
    uint32_t tokens; /* 1 + what tokens_of found, or 0 before it searched */
    uint32_t mark;   /* of the last search that saw it */
};

struct gemma2_matcher {
    const gemma2_grammar *grammar;
    const struct vocabulary *vocabulary;
    uint32_t n_sets, n_items, n_rows, mark, tag, sets_left, items_left; /* left by forget */
    int full;                      /* something did not fit, so an answer lacks it */
    struct set sets[MAX_SETS];     /* 0: dead.  1: item 0, so the reply is over */
    uint64_t items[MAX_ITEMS];     /* stack << 32 | instruction, ascending in each set */
    uint32_t set_slots[SLOTS];     /* hash of sets: the last one in each slot */
    uint32_t rows[MAX_ROWS][256], row_set[MAX_ROWS]; /* what follows row_set; [0]: nothing */
    struct ready_mask {
        uint32_t set, worst; /* holds while at least `worst` tokens may follow */
    } ready[MAX_MASKS];      /* at set % MAX_MASKS */
    /* scratch */
    uint32_t n_closure, n_gathered;
    uint64_t closure[MAX_CLOSURE]; /* [0] is not used */
    uint32_t seen[MAX_CLOSURE];    /* hash of the closure: the last place in each slot, or 0 */
    uint32_t seen_before[MAX_CLOSURE]; /* the place before it in its slot */
    uint64_t calls[MAX_CLOSURE], gathered[MAX_CLOSURE];
    uint32_t queue[MAX_SETS]; /* sets that a search found; new numbers in forget */
    uint32_t masks[]; /* [MAX_MASKS][words] */
};

/* Empties `gathered` and returns the number of its set, or 0 for nothing and without room.
 * close_set does this too, so gather only behind it. */
static uint32_t intern(gemma2_matcher *m)
{
    uint64_t *items = m->gathered, h = 0;
    uint32_t n = 0, n_all = m->n_gathered;
    m->n_gathered = 0;
    if (n_all > 1)
        qsort(items, n_all, sizeof *items, compare_keys);
    for (uint32_t i = 0; i < n_all; i++)
        if (!i || items[i] != items[n - 1]) {
            items[n++] = items[i];
            h = (h ^ items[i]) * 0x9e3779b97f4a7c15u, h ^= h >> 29;
        }
    if (!n)
        return 0;
    uint32_t *slot = &m->set_slots[(h >> 20) % SLOTS];
    for (uint32_t i = *slot; i; i = m->sets[i].chained)
        if (m->sets[i].n == n && !memcmp(m->items + m->sets[i].first, items, n * sizeof *items))
            return i;
    if (m->n_sets == MAX_SETS || m->n_items + n > MAX_ITEMS)
        return m->full = 1, 0;
    struct set s = {.first = m->n_items, .n = n, .chained = *slot, .cost = NOWHERE};
    for (uint32_t i = 0; i < n; i++) {
        uint32_t own = m->grammar->insts[(uint32_t)items[i]].cost;
        uint32_t stack = (uint32_t)(items[i] >> 32);
        s.cost = min_u32(s.cost, min_u32(own + (stack ? m->sets[stack].cost : 0), MOST_LEFT));
    }
    memcpy(m->items + m->n_items, items, n * sizeof *items);
    m->n_items += n;
    m->sets[m->n_sets] = s;
    return *slot = m->n_sets++;
}

static void gather(gemma2_matcher *m, const uint64_t *items, uint32_t n)
{
    m->full |= m->n_gathered + n > MAX_CLOSURE;
    for (uint32_t i = 0; i < n && m->n_gathered < MAX_CLOSURE; i++)
        m->gathered[m->n_gathered++] = items[i];
}

/* Forgets all sets but 1, keep and its stacks.  States turn invalid.  Returns keep's number. */
static uint32_t forget(gemma2_matcher *m, uint32_t keep)
{
    uint32_t *to = m->queue; /* [keep + 1] 1: kept.  Stacks are below their users */
    memset(to, 0, (keep + (size_t)1) * sizeof *to);
    to[1] = to[keep] = 1;
    for (uint32_t i = keep; i > 1; i--)
        for (uint32_t k = 0; to[i] && k < m->sets[i].n; k++)
            to[m->items[m->sets[i].first + k] >> 32] = 1;
    to[0] = 0; /* no stack */
    memset(m->set_slots, 0, sizeof m->set_slots);
    memset(m->row_set, 0, sizeof m->row_set);
    memset(m->ready, 0, sizeof m->ready);
    m->n_sets = 1, m->n_items = 0, m->full = 0;
    m->tag += 2;
    for (uint32_t i = 1; i <= keep; i++) {
        struct set s = m->sets[i];
        for (uint32_t k = 0; to[i] && k < s.n; k++) {
            uint64_t item = m->items[s.first + k];
            item = (uint64_t)to[item >> 32] << 32 | (uint32_t)item;
            gather(m, &item, 1);
        }
        to[i] = intern(m); /* its new number */
    }
    m->sets_left = m->n_sets, m->items_left = m->n_items;
    return to[keep];
}

/* Gathers (instruction, stack).  At the end of a rule it gathers what the stack holds instead, so a
 * call at the end of a rule adds no depth. */
static void collect(gemma2_matcher *m, uint32_t at, uint32_t stack)
{
    const gemma2_grammar *g = m->grammar;
    while (g->insts[at].op == OP_SPLIT && g->insts[at].other == NOWHERE)
        at = g->insts[at].next;
    uint64_t item = (uint64_t)stack << 32 | at;
    if (g->insts[at].op == OP_END)
        gather(m, m->items + m->sets[stack].first, m->sets[stack].n);
    else if (g->insts[at].cost != NOWHERE)
        gather(m, &item, 1);
}

static uint32_t *seen_slot(gemma2_matcher *m, uint64_t item)
{
    return &m->seen[(item + 61 * (item >> 32)) % MAX_CLOSURE];
}

/* Notes that (instruction, stack) is reached without a byte. */
static void reach(gemma2_matcher *m, uint64_t item)
{
    uint32_t at = (uint32_t)item, n = m->n_closure, *slot = seen_slot(m, item);
    if (at == NOWHERE || m->grammar->insts[at].cost == NOWHERE)
        return;
    for (uint32_t i = *slot; i; i = m->seen_before[i])
        if (m->closure[i] == item)
            return;
    m->full |= n == MAX_CLOSURE;
    if (n < MAX_CLOSURE)
        m->closure[n] = item, m->seen_before[n] = *slot, *slot = m->n_closure++;
}

static void reach_all(gemma2_matcher *m, uint32_t set)
{
    for (uint32_t i = 0; i < m->sets[set].n; i++)
        reach(m, m->items[m->sets[set].first + i]);
}

/* Enters the rules that are called.  All callers of a rule get one stack, the set of the places
 * they return to, so ambiguity adds places and not sets. */
static void enter_rules(gemma2_matcher *m, uint32_t n_calls)
{
    const gemma2_grammar *g = m->grammar;
    qsort(m->calls, n_calls, sizeof *m->calls, compare_keys);
    for (uint32_t i = 0; i < n_calls; i++) {
        uint64_t item = m->closure[(uint32_t)m->calls[i]], rule = m->calls[i] >> 32;
        collect(m, g->insts[(uint32_t)item].next, (uint32_t)(item >> 32));
        if (i + 1 < n_calls && m->calls[i + 1] >> 32 == rule)
            continue;
        uint64_t stack = intern(m);
        if (stack)
            reach(m, stack << 32 | rule);
    }
}

/* Puts into closure all instructions that the set reaches before it reads. */
static void close_set(gemma2_matcher *m, uint32_t set)
{
    uint32_t n_calls;
    m->n_closure = 1;
    reach_all(m, set);
    for (uint32_t at = 1; at < m->n_closure;) {
        for (n_calls = 0; at < m->n_closure; at++) {
            uint64_t item = m->closure[at], stack = item >> 32;
            const struct inst *i = &m->grammar->insts[(uint32_t)item];
            if (i->op == OP_CALL)
                m->calls[n_calls++] = (uint64_t)i->other << 32 | at;
            else if (i->op == OP_SPLIT)
                reach(m, stack << 32 | i->next);
            if (i->op == OP_SPLIT || i->op == OP_BYTE)
                reach(m, stack << 32 | i->other);
            if (i->op == OP_END)
                reach_all(m, (uint32_t)stack);
        }
        enter_rules(m, n_calls);
    }
}

/* Works out what each byte makes of a set.  Without room no byte may follow. */
static const uint32_t *make_row(gemma2_matcher *m, uint32_t set)
{
    const struct inst *insts = m->grammar->insts;
    struct set *s = &m->sets[set];
    uint8_t starts[257] = {0}; /* bytes from which other leaves count than before */
    uint32_t at = 1 + m->n_rows++ % (MAX_ROWS - 1), *row = m->rows[at], n_leaves = 0;
    close_set(m, set);
    for (uint32_t i = 1; i < m->n_closure; i++) {
        const struct inst *leaf = &insts[(uint32_t)m->closure[i]];
        *seen_slot(m, m->closure[i]) = 0;
        if (leaf->op == OP_BYTE)
            starts[leaf->low] = starts[leaf->high + 1] = 1, m->closure[n_leaves++] = m->closure[i];
    }
    for (uint32_t byte = 0; byte < 256; byte++) {
        for (uint32_t i = 0; (!byte || starts[byte]) && i < n_leaves; i++) {
            const struct inst *leaf = &insts[(uint32_t)m->closure[i]];
            if (leaf->low <= byte && byte <= leaf->high)
                collect(m, leaf->next, (uint32_t)(m->closure[i] >> 32));
        }
        row[byte] = byte && !starts[byte] ? row[byte - 1] : intern(m);
    }
    s->row = at, m->row_set[at] = m->full ? NOWHERE : set;
    return m->full ? m->rows[0] : row;
}

/* The sets that follow a set, by byte.  Good until forget, or until MAX_ROWS - 1 more are made. */
static const uint32_t *next_sets(gemma2_matcher *m, uint32_t set)
{
    uint32_t at = m->sets[set].row;
    return m->row_set[at] == set ? m->rows[at] : m->full ? m->rows[0] : make_row(m, set);
}

struct walk {
    uint32_t limit; /* most tokens that may follow the one allowed */
    uint32_t *mask; /* NULL: sets are collected in the matcher's queue */
    uint32_t worst; /* most tokens that an allowed one needs behind it; NOWHERE: some tokens need
                     * more than the limit and are left out */
    int only_shortest; /* only ways of the least cost count */
    uint32_t n_found, nodes, most_nodes; /* sets in the queue; nodes that were looked at */
};

static uint32_t tokens_of(gemma2_matcher *m, uint32_t set, uint32_t limit);

/* Allows the token, which leads to the set, or for a search notes the set. */
static void take_token(gemma2_matcher *m, struct walk *w, uint32_t token, uint32_t set)
{
    struct set *s = &m->sets[set];
    if (!w->mask) {
        if (s->mark != m->mark)
            s->mark = m->mark, m->queue[w->n_found++] = set;
        return;
    }
    uint32_t need = tokens_of(m, set, w->limit), fits = need <= w->limit;
    w->worst = !fits ? NOWHERE : need > w->worst ? need : w->worst;
    w->mask[token / 32] |= fits << token % 32;
}

/* Takes the tokens of the first n nodes that may follow the set. */
static void walk_trees(gemma2_matcher *m, uint32_t set, uint32_t n, struct walk *w)
{
    uint32_t path[MAX_TOKEN_BYTES + 1] = {set};
    for (uint32_t i = 0; i < n && w->nodes <= w->most_nodes; w->nodes++) {
        struct node node = m->vocabulary->nodes[i];
        uint32_t depth = node.token & 255, end = i + (node.skip >> 8);
        uint32_t byte = node.skip & 255, last = path[depth - 1], next = next_sets(m, last)[byte];
        if (w->only_shortest && m->sets[next].cost + 1 - spares(byte) > m->sets[last].cost)
            next = 0;
        if (next && node.token >> 8 != NO_TOKEN)
            take_token(m, w, node.token >> 8, next);
        path[depth] = next;
        i = next ? i + 1 : end;
    }
}

/* The fewest tokens of all ways to the end, or only of those that are shortest by bytes.  NOWHERE:
 * the search grows large.  A search from a set on the way found looks at no more nodes, so it finds
 * the rest of that way: whoever follows it gets to the end. */
static uint32_t search_tokens(gemma2_matcher *m, uint32_t set, int only_shortest)
{
    struct walk w = {.only_shortest = only_shortest, .n_found = 1,
                     .most_nodes = only_shortest ? LARGE_SEARCH : SMALL_SEARCH};
    m->sets[set].mark = ++m->mark; /* walked once: later searches are not larger */
    m->queue[0] = set;
    for (uint32_t level = 1, first = 0; first < w.n_found; level++) {
        uint32_t end = w.n_found;
        for (; first < end; first++)
            walk_trees(m, m->queue[first], m->vocabulary->n, &w);
        if (w.nodes > w.most_nodes || m->full)
            return NOWHERE;
        for (uint32_t i = end; i < w.n_found; i++)
            if (m->sets[m->queue[i]].cost == 0)
                return level;
    }
    return NOWHERE;
}

/* How many tokens lead from the set to an end of the reply.  Any byte is a token, so where the
 * limit is far the bytes will do.  Else it is the fewest found, but with limit 0 whether any is. */
static uint32_t tokens_of(gemma2_matcher *m, uint32_t set, uint32_t limit)
{
    struct set *s = &m->sets[set];
    if (s->cost <= 1 || limit == 0)
        return s->cost != 0;
    if (limit >= EXACT_LIMIT && s->cost <= limit)
        return s->cost;
    if (!s->tokens) {
        uint32_t found = search_tokens(m, set, 0);
        if (found == NOWHERE)
            found = search_tokens(m, set, 1);
        s->tokens = 1 + min_u32(s->cost, found);
    }
    return s->tokens - 1;
}

/* The sets that plain characters lead to. */
struct family {
    uint32_t sets[MAX_FAMILY], n, at; /* at: whose characters are looked at */
    int is_chain; /* each set has led to a single new one */
};

/* Notes that characters of set f->at lead there.  0: there are too many sets. */
static int note_set(struct family *f, uint32_t set)
{
    uint32_t i = 0;
    while (i < f->n && f->sets[i] != set)
        i++;
    f->is_chain &= i == f->at + 1;
    if (i == MAX_FAMILY)
        return 0;
    f->sets[i] = set;
    f->n += i == f->n;
    return 1;
}

/* Notes the sets that bytes ranges[0]..ranges[1], then those of the next pair and so on, lead to.
 * 1: all of them may follow, 0: none, -1: some. */
static int note_ways(gemma2_matcher *m, struct family *f, uint32_t set, const uint8_t *ranges)
{
    int all = 1, none = 1;
    if (!ranges[0])
        return note_set(f, set) ? 1 : -1;
    for (uint32_t byte = ranges[0], last = 0, next; byte <= ranges[1] && (all || none); byte++) {
        next = next_sets(m, set)[byte];
        all = next && all && (next == last || note_ways(m, f, next, ranges + 2) == 1);
        none &= !next;
        last = next;
    }
    return all ? 1 : none ? 0 : -1;
}

/* The same for all characters that text_kind calls plain. */
static int note_plain(gemma2_matcher *m, struct family *f, uint32_t set)
{
    static const uint8_t ways[][9] = {
        " !", "#[", "]~", "\xc2\xdf\x80\xbf", "\xe0\xe0\xa0\xbf\x80\xbf",
        "\xe1\xe1\x80\xbf\x80\xbf", "\xe2\xe2\x81\xbf\x80\xbf", "\xe3\xec\x80\xbf\x80\xbf",
        "\xed\xed\x80\x9f\x80\xbf", "\xee\xef\x80\xbf\x80\xbf",
        "\xf0\xf0\x90\xbf\x80\xbf\x80\xbf", "\xf1\xf3\x80\xbf\x80\xbf\x80\xbf",
        "\xf4\xf4\x80\x8f\x80\xbf\x80\xbf"};
    int first = note_ways(m, f, set, ways[0]);
    for (size_t i = 1; i < sizeof ways / sizeof *ways && first >= 0; i++)
        if (note_ways(m, f, set, ways[i]) != first)
            return -1;
    return first;
}

/* Fills the mask with plain tokens if it does not matter which plain characters they have: any
 * number may follow (every set that is reached takes them all), or up to `chars` (a chain that
 * ends).  What is needed behind them goes into w.  0: it matters. */
static int fill_plain(gemma2_matcher *m, uint32_t set, struct walk *w)
{
    struct family f = {{set}, 1, 0, 1};
    size_t words = m->vocabulary->n_words, chars = PLAIN_CHARS;
    uint32_t worst = 0;
    for (; f.at < f.n && !(f.is_chain && f.at == chars); f.at++) {
        int may_follow = note_plain(m, &f, f.sets[f.at]);
        if (may_follow < 0 || (!may_follow && (!f.is_chain || !f.at)))
            return 0;
        chars = may_follow ? chars : f.at;
    }
    for (uint32_t i = f.is_chain ? 1 : 0; i < f.n; i++) {
        uint32_t need = tokens_of(m, f.sets[i], w->limit);
        if (need > w->limit)
            return 0;
        worst = need > worst ? need : worst;
    }
    w->worst = worst;
    memcpy(w->mask, m->vocabulary->plain + (chars - 1) * words, words * sizeof *w->mask);
    return 1;
}

/* Writes the tokens that may follow the set while `left` may still come, with this one. */
static void fill_mask(gemma2_matcher *m, uint32_t set, uint32_t left, uint32_t *mask)
{
    const gemma2_config *c = &m->grammar->model->config;
    const struct vocabulary *v = m->vocabulary;
    struct walk w = {left - 1, mask, .most_nodes = NOWHERE}; /* not walked if left is 0 */
    size_t words = v->n_words;
    struct ready_mask *ready = &m->ready[set % MAX_MASKS];
    uint32_t *kept = m->masks + set % MAX_MASKS * words;
    if (left && ready->set == set && ready->worst <= w.limit) {
        memcpy(mask, kept, words * sizeof *mask);
        return;
    }
    memset(mask, 0, words * sizeof *mask);
    if (left)
        walk_trees(m, set, fill_plain(m, set, &w) ? v->first_plain : v->n, &w);
    for (int32_t i = 0; i < c->n_stop && m->sets[set].cost == 0; i++)
        mask[c->stop[i] / 32] |= 1u << c->stop[i] % 32;
    if (left && w.worst != NOWHERE && !m->full) {
        *ready = (struct ready_mask){set, w.worst};
        memcpy(kept, mask, words * sizeof *mask);
    }
}

/* The set behind the token, as its text or by name.  0: the grammar does not take it. */
static uint32_t after_token(gemma2_matcher *m, uint32_t set, uint32_t id)
{
    uint8_t bytes[MAX_PIECE_BYTES];
    uint32_t to[2];
    for (int named = 0; named < 2; named++) {
        uint32_t n = spell_token(&m->grammar->model->tokenizer, id, named, bytes);
        to[named] = n ? set : 0;
        for (uint32_t i = 0; i < n && to[named]; i++)
            to[named] = next_sets(m, to[named])[bytes[i]];
    }
    gather(m, m->items + m->sets[to[0]].first, m->sets[to[0]].n);
    gather(m, m->items + m->sets[to[1]].first, m->sets[to[1]].n);
    return intern(m);
}

/* ===================================================================================
 * 7. Speculation: several tokens a pass, with the bits of one after another
 *
 * A proposer guesses what follows.  One pass evaluates the token asked for and the guesses
 * behind it, the drafts, with logits after each.  While the caller then asks for the very
 * tokens that were drafted, it gets their logits without a pass.  The session holds only what
 * was asked for.  The drafts' keys and values lie in slots behind its position, where the next
 * pass overwrites them if the caller goes another way.  Rows of the exact class do not depend on
 * their company, so every result is the same to the bit; guesses decide about time alone.
 *
 * How many drafts pay depends on the cost of k rows and on how often a guess comes true; both
 * are measured.  Losses are booked, and no pass may lose more than is left: see may_lose.
 * =================================================================================== */

/* Lookup believes the tokens that followed the last 8, 5, 3 or 2 earlier.  Guesses of each length
 * have their own record, and so have those of a proposer. */
enum { N_MATCHES = 4, N_SOURCES = N_MATCHES + 1 };
static const int32_t match_lengths[N_MATCHES] = {8, 5, 3, 2};

struct guesses {
    double chance;  /* that the next one comes true: a running mean */
    double seconds; /* that one takes to make */
};

struct gemma2_ahead {
    const gemma2_model *model;
    void *owned;
    int32_t n_context, most; /* ids that lookup knows; drafts a pass */
    int adapts, looks_up;
    gemma2_propose *propose;
    void *context;
    gemma2_session *draft; /* or NULL */
    const gemma2_session *session; /* which the drafts follow, if its `ahead` agrees: */
    int32_t n_drafts, n_used;
    float *logits;         /* [most][V] after each draft */
    int32_t n_seen, *seen; /* [n_context] ids that are in the index */
    uint32_t index_mask;
    int32_t *index[N_MATCHES]; /* by hash of a match: the position behind its last one, or 0 */
    struct guesses *source, sources[N_SOURCES]; /* of the drafts; the last is the proposer */
    double cost[MAX_DRAFTS + 2]; /* seconds of a pass of so many rows; 0: not known */
    double spent, balance;       /* seconds of all passes; gained by drafts, less their cost */
    int32_t pause;               /* tokens asked for since the proposer was */
    gemma2_ahead_counts counts;
};

static void place_ahead(gemma2_ahead *a, struct arena *arena)
{
    size_t slots = 16;
    while (slots < (size_t)a->n_context)
        slots *= 2;
    take(arena, 1, sizeof *a);
    a->index_mask = (uint32_t)slots - 1;
    a->logits = take(arena, (size_t)a->most, (size_t)a->model->config.n_vocab * sizeof(float));
    for (int i = 0; i < N_MATCHES && a->looks_up; i++)
        a->index[i] = take(arena, slots, sizeof(int32_t));
    if (a->looks_up)
        a->seen = take(arena, (size_t)a->n_context, sizeof(int32_t));
}

static int32_t common_prefix(const int32_t *a, int32_t n, const int32_t *b, int32_t m)
{
    int32_t i = 0;
    while (i < n && i < m && a[i] == b[i])
        i++;
    return i;
}

/* ---- lookup ---- */

static int32_t *index_slot(gemma2_ahead *a, int match, int32_t end)
{
    uint32_t hash = 0;
    for (int32_t i = end - match_lengths[match]; i < end; i++)
        hash = (hash ^ (uint32_t)a->seen[i]) * 0x9e3779b1u;
    return &a->index[match][(hash ^ hash >> 15) & a->index_mask];
}

/* Brings the index up to date.  What it says of ids that are gone is checked when it is read. */
static void index_history(gemma2_ahead *a, const int32_t *ids, int32_t n)
{
    a->n_seen = common_prefix(a->seen, a->n_seen, ids, n);
    for (; a->n_seen < n; a->n_seen++) {
        for (int i = 0; i < N_MATCHES; i++)
            if (a->n_seen >= match_lengths[i])
                *index_slot(a, i, a->n_seen) = a->n_seen;
        a->seen[a->n_seen] = ids[a->n_seen];
    }
}

/* The position behind an earlier place of the longest match, or 0. */
static int32_t find_match(gemma2_ahead *a, const int32_t *ids, int32_t n, int *match)
{
    if (!a->looks_up || n > a->n_context)
        return 0;
    index_history(a, ids, n);
    for (*match = 0; *match < N_MATCHES; ++*match) {
        int32_t length = match_lengths[*match];
        int32_t at = n > length ? *index_slot(a, *match, n) : 0;
        if (at && at < n &&
            !memcmp(ids + at - length, ids + n - length, (size_t)length * sizeof *ids))
            return at;
    }
    return 0;
}

/* ---- a draft model ---- */

/* Evaluates what the draft's session lacks of the history.  Returns how many tokens that took,
 * or a negative code. */
static int32_t follow(gemma2_session *draft, const int32_t *ids, int32_t n, float *logits)
{
    int32_t held = common_prefix(draft->ids, draft->position, ids, n);
    held = min_i32(held, n - 1);
    if (gemma2_rewind(draft, held) < 0)
        gemma2_rewind(draft, held = 0);
    int status = n - held > FEW_ROWS
                     ? gemma2_prefill(draft, ids + held, (size_t)(n - held), logits)
                     : gemma2_eval(draft, ids + held, (size_t)(n - held), logits);
    return status < 0 ? status : n - held;
}

/* What the draft model thinks likeliest, token by token. */
static int32_t propose_draft(void *context, const int32_t *ids, int32_t n, int32_t *out,
                             int32_t most)
{
    gemma2_ahead *a = context;
    float *logits = a->logits;
    int32_t made = 0;
    int status = follow(a->draft, ids, n, logits);
    while (status >= 0 && made < most) {
        int32_t best = 0;
        for (int32_t i = 1; i < a->model->config.n_vocab; i++)
            best = logits[i] > logits[best] ? i : best;
        out[made++] = best;
        if (made < most)
            status = gemma2_eval(a->draft, &best, 1, logits);
    }
    return made;
}

/* Whether two models call the same pieces by the same ids. */
static int same_vocabulary(const gemma2_model *a, const gemma2_model *b)
{
    const struct tokenizer *x = &a->tokenizer, *y = &b->tokenizer; /* kinds follow ends there */
    return x->n == y->n && !memcmp(x->ends, y->ends, 5 * (size_t)x->n) &&
           !memcmp(x->blob, y->blob, get_u32(x->ends + 4 * (size_t)(x->n - 1)));
}

/* ---- how many ---- */

/* Seconds of a pass of so many rows: as measured, or along a line through those measured. */
static double cost_of(const gemma2_ahead *a, int32_t rows)
{
    int32_t low = rows;
    while (a->cost[low] <= 0)
        low--;
    double a_row = low > 1 ? (a->cost[low] - a->cost[1]) / (low - 1) : a->cost[1] / 8;
    return a->cost[low] + (a_row > 0 ? a_row : 0) * (rows - low);
}

/* Seconds that drafts may still lose: what they gained, half a pass, and 1/400 of the time. */
static double may_lose(const gemma2_ahead *a)
{
    return a->balance + a->cost[1] / 2 + a->spent / 400;
}

/* The number of drafts that promises most tokens a second: i drafts of chance p each give
 * 1 + p + .. + p^i tokens.  Where none promises 2 % more, every other pass may try one.  The first
 * two passes show what one row costs, as the first of all may have to read the file. */
static int32_t choose_drafts(const gemma2_ahead *a, const struct guesses *source, int32_t most)
{
    if (!a->adapts || most < 1)
        return most;
    if (a->counts.passes < 2 || a->cost[1] <= 0)
        return 0;
    double chance = 1, tokens = 1, best = 1.02 / a->cost[1], left = may_lose(a);
    int32_t n = 0, i = 1;
    for (; i <= most; i++) {
        double seconds = cost_of(a, i + 1) + i * source->seconds;
        if (seconds - a->cost[1] > left)
            break;
        chance *= source->chance;
        tokens += chance;
        if (tokens / seconds > best)
            best = tokens / seconds, n = i;
    }
    return n || a->n_drafts ? n : i > 1;
}

/* A pass of one row and n drafts took so long.  A pass that had to wait says little, and fewer rows
 * cost no more. */
static void note_pass(gemma2_ahead *a, int32_t n, double seconds)
{
    double *cost = &a->cost[n + 1];
    a->n_drafts = n, a->n_used = 0;
    a->counts.drafted += (uint64_t)n;
    if (a->counts.passes++ < 2 || !a->adapts) {
        *cost = *cost > 0 ? fmin(*cost, seconds) : seconds;
        return;
    }
    if (*cost <= 0)
        *cost = (cost_of(a, n + 1) + fmin(seconds, 2 * cost_of(a, n + 1))) / 2;
    note_mean(cost, seconds);
    for (int32_t i = 1; i <= n; i++)
        a->cost[i] = fmin(a->cost[i], *cost);
    a->spent += *cost;
    a->balance -= *cost - a->cost[1];
}

/* A draft was asked for, or another token in its place. */
static void note_answer(gemma2_ahead *a, int is_draft)
{
    a->source->chance += (is_draft - a->source->chance) / 8;
    a->pause += is_draft;
    a->counts.accepted += (uint64_t)is_draft;
    a->balance = fmin(a->balance + is_draft * a->cost[1], 4 * a->cost[1]);
}

/* Writes guesses of what follows the n ids and notes their source; returns how many. */
static int32_t make_guesses(gemma2_ahead *a, const int32_t *history, int32_t n, int32_t *ids,
                            int32_t most)
{
    int match = 0;
    int32_t made = 0, at = find_match(a, history, n, &match);
    if (at) {
        a->source = &a->sources[match];
        int32_t wanted = choose_drafts(a, a->source, most);
        for (; made < wanted; made++, at++) /* past the end what is guessed goes on */
            ids[made] = at < n ? history[at] : ids[at - n];
    }
    if (made || !a->propose)
        return made;
    a->source = &a->sources[N_MATCHES];
    int32_t wanted = choose_drafts(a, a->source, most), held = a->draft ? a->draft->position : n;
    if (wanted < 1)
        return 0;
    double start = clock_now();
    int32_t given = a->propose(a->context, history, n, ids, wanted);
    double seconds = clock_now() - start;
    if (given > 0 && n - held <= 2) /* a draft that catches up says nothing about its pace */
        note_mean(&a->source->seconds, seconds / min_i32(given, wanted));
    /* What a draft lacks from a pause is part of the price of guessing, a prompt is not. */
    seconds *= fmin(1, (a->pause + 1.0) / max_i32(n - held, 1));
    a->spent += seconds, a->balance -= seconds;
    a->pause = 0;
    while (made < given && made < wanted && ids[made] >= 0 &&
           ids[made] < a->model->config.n_vocab)
        made++;
    return made;
}

/* One pass over id and drafts. */
static int evaluate_ahead(gemma2_session *s, gemma2_ahead *a, int32_t id, float *logits)
{
    gemma2_row rows[MAX_DRAFTS + 1];
    int32_t ids[MAX_DRAFTS + 1], position = s->position, oldest = s->oldest;
    int32_t room = min_i32(min_i32(s->n_batch, s->worker->n_batch), s->n_context - position) - 1;
    s->ahead = NULL;
    s->ids[position] = ids[0] = id;
    a->pause++;
    if (a->draft)
        a->draft->cancels_too = s;
    int32_t n = make_guesses(a, s->ids, position + 1, ids + 1, min_i32(a->most, room));
    if (a->draft)
        a->draft->cancels_too = NULL;
    for (int32_t i = 0; i <= n; i++)
        rows[i] = (gemma2_row){
            .session = s, .id = ids[i],
            .logits = i ? a->logits + (size_t)(i - 1) * (size_t)a->model->config.n_vocab : logits};
    double start = clock_now();
    int status = gemma2_eval_rows(rows, (size_t)n + 1);
    double seconds = clock_now() - start;
    s->position = position + (status == GEMMA2_OK);
    s->oldest = max_i32(oldest, position + 1 - s->ring);
    if (status < 0)
        return status;
    note_pass(a, n, seconds);
    a->session = s, s->ahead = a;
    return GEMMA2_OK;
}

/* ===================================================================================
 * 8. Public API, in the order of gemma2.h
 * =================================================================================== */

/* In the back rooms, section 9. */
static int file_open(struct file *f, const char *path, int read_in, struct errbuf *err);
static void file_close(struct file *f);
static void digest_of(const gemma2_model *model, const uint8_t *a, size_t n, const uint8_t *b,
                      size_t m, uint8_t digest[32]);
static gemma2_model *make_model(struct file *f, const gemma2_open_params *p, struct errbuf *err);
static int values_are_finite(const struct gemma2_model *m, const struct entry *e);
static struct text find_fact(const gemma2_model *m, const char *key);
static uint64_t saved_bytes(const gemma2_session *s, int32_t n, int32_t first);
static void save_session(const gemma2_session *s, uint8_t *p, size_t size);
static int check_saved(const gemma2_session *s, const uint8_t *p, size_t size);
static void restore_session(gemma2_session *s, const uint8_t *p);
static void copy_session(gemma2_session *to, const gemma2_session *from);
static uint64_t input_first(const gemma2_config *c, int layer, int input);

const char *gemma2_version(void) { return GEMMA2_VERSION_STRING; }
int gemma2_version_number(void) { return GEMMA2_VERSION_NUMBER; }

const char *gemma2_error_string(int code)
{
    static const char *const text[] = {
        "no error", "an argument is missing or out of its range", "out of memory",
        "the context has no room for that many tokens", "a token id is outside the vocabulary",
        "the sliding window no longer holds that position; evaluate the tokens again",
        "the model gave logits that are not finite; its weights are damaged",
        "the buffer is too small", "the contents are damaged; copy or make the file again",
        "cancelled", "the saved session is of another model, window, cache type or version",
        "the chat template has no form for these messages",
        "this is not a saved session or not a model file", "the file cannot be opened or read"};
    return code <= 0 && code > -(int)(sizeof text / sizeof *text) ? text[-code] : "unknown error";
}

/* ---- model ---- */

void gemma2_open_params_init(gemma2_open_params *params)
{
    if (params)
        *params = (gemma2_open_params){.struct_size = sizeof *params};
}

static int read_open_params(gemma2_open_params *p, const gemma2_open_params *from)
{
    gemma2_open_params_init(p);
    return !from || copy_params(p, sizeof *p, from, from->struct_size, sizeof *p);
}

gemma2_model *gemma2_open(const char *path, const gemma2_open_params *params, char *err_text,
                          size_t err_size)
{
    char reason[256] = "";
    struct errbuf err = {err_text, err_size, 0}, inner = {reason, sizeof reason, 0};
    struct file f = {0};
    gemma2_open_params p;
    if (!path || !read_open_params(&p, params)) {
        fail(&err, "gemma2_open: no path, or params not from gemma2_open_params_init");
        return NULL;
    }
    gemma2_model *m = NULL;
    inner.code = GEMMA2_ERR_FILE;
    if (file_open(&f, path, p.read_into_memory != 0, &inner))
        m = make_model(&f, &p, &inner);
    if (!m) {
        fail(&err, "%s: %s", path, reason);
        file_close(&f);
    }
    if (p.code)
        *p.code = m ? GEMMA2_OK : inner.code;
    return m;
}

gemma2_model *gemma2_open_memory(const void *data, size_t size, const gemma2_open_params *params,
                                 char *err_text, size_t err_size)
{
    struct errbuf err = {err_text, err_size, GEMMA2_ERR_ARGUMENT};
    struct file f = {data, size, NULL, NULL};
    gemma2_open_params p;
    gemma2_model *m = NULL;
    int is_read = read_open_params(&p, params);
    if (!data || (uintptr_t)data % 64)
        fail(&err, "gemma2_open_memory: the data must be aligned to 64 bytes");
    else if (!is_read || p.read_into_memory)
        fail(&err, "gemma2_open_memory: params not from gemma2_open_params_init, or with "
                   "read_into_memory, which is gemma2_open's alone");
    else
        m = make_model(&f, &p, &err);
    if (is_read && p.code)
        *p.code = m ? GEMMA2_OK : err.code;
    return m;
}

void gemma2_close(gemma2_model *m)
{
    if (!m)
        return;
    file_close(&m->file);
    free(atomic_load(&m->vocabulary_made));
    free(m);
}

const gemma2_config *gemma2_get_config(const gemma2_model *m) { return m ? &m->config : NULL; }

int gemma2_is_stop(const gemma2_model *m, int32_t id)
{
    for (int32_t i = 0; m && i < m->config.n_stop; i++)
        if (m->config.stop[i] == id)
            return 1;
    return 0;
}

const char *gemma2_fact(const gemma2_model *m, const char *key, size_t *size)
{
    struct text value = {NULL, 0};
    if (m && key && size) {
        int part = 0;
        while (part < N_CHAT_PARTS && strcmp(key, chat_keys[part]) != 0)
            part++;
        value = part < N_CHAT_PARTS ? m->chat[part] : find_fact(m, key);
    }
    if (size)
        *size = value.n;
    return (const char *)value.p;
}

int gemma2_get_section(const gemma2_model *m, size_t i, gemma2_section *out)
{
    if (!m || !out || i >= m->n_sections)
        return 0;
    struct entry e = get_entry(m->directory, i);
    const struct role *r = find_role(e.role);
    out->role = r ? r->name : "optional";
    out->type = e.type < N_TYPES ? types[e.type].name : "bytes";
    out->layer = r && r->id >= ROLE_LAYER_FIRST ? (int32_t)e.layer : -1;
    out->rows = e.rows, out->cols = e.cols, out->bytes = e.bytes;
    return 1;
}

int gemma2_check(const gemma2_model *m, size_t i, char *err_text, size_t err_size)
{
    struct errbuf err = {err_text, err_size, 0};
    if (!m)
        return GEMMA2_ERR_ARGUMENT;
    if (i >= m->n_sections)
        return 0;
    struct entry e = get_entry(m->directory, i);
    const struct role *r = find_role(e.role);
    char name[64];
    if (r && r->id >= ROLE_LAYER_FIRST)
        snprintf(name, sizeof name, "%s of layer %u", r->name, e.layer);
    else
        snprintf(name, sizeof name, "%s", r ? r->name : "an optional section");
    uint64_t gap = HEADER_BYTES + (uint64_t)m->n_sections * ENTRY_BYTES;
    if (i) {
        struct entry before = get_entry(m->directory, i - 1);
        gap = before.offset + before.bytes;
    }
    uint8_t digest[32];
    digest_of(m, m->file.data + e.offset, (size_t)e.bytes, m->file.data, 0, digest);
    if (memcmp(digest, e.digest, 32))
        fail(&err, "%s does not match its checksum; copy or convert the file again", name);
    else if (!is_zero(m->file.data + gap, (size_t)(e.offset - gap)))
        fail(&err, "the padding before %s is not zero; convert the checkpoint again", name);
    else if (r && e.type != TYPE_BYTES && !values_are_finite(m, &e))
        fail(&err, "%s holds values that are not finite; the checkpoint is damaged", name);
    else
        return 1;
    return GEMMA2_ERR_CORRUPT;
}

/* ---- session ---- */

void gemma2_session_params_init(gemma2_session_params *params)
{
    if (params)
        *params = (gemma2_session_params){.struct_size = sizeof *params};
}

int32_t gemma2_threads(int32_t n_threads)
{
#ifndef _OPENMP
    n_threads = 1;
#endif
    return n_threads ? n_threads : default_threads();
}

void gemma2_worker_params_init(gemma2_worker_params *params)
{
    if (params)
        *params = (gemma2_worker_params){.struct_size = sizeof *params};
}

int gemma2_worker_plan(const gemma2_model *m, const gemma2_worker_params *params,
                       gemma2_plan *plan)
{
    gemma2_worker work;
    if (!m || !plan)
        return GEMMA2_ERR_ARGUMENT;
    int status = read_worker_params(&work, m, params);
    return status < 0 ? status : place_all(NULL, &work, NULL, plan);
}

int gemma2_session_plan(const gemma2_model *m, const gemma2_session_params *params,
                        gemma2_plan *plan)
{
    gemma2_session s;
    gemma2_worker work;
    if (!m || !plan)
        return GEMMA2_ERR_ARGUMENT;
    int status = read_session_params(&s, &work, m, params);
    return status < 0 ? status : place_all(&s, &work, NULL, plan);
}

/* A large model begins with the team.  Frequencies of RoPE, theta^(-2i/H), are rounded where
 * transformers rounds them. */
static void start_worker(gemma2_worker *work)
{
    int32_t h = work->model->config.head_dim;
    float_env env = float_env_enter();
    for (int i = 0; i < N_PACES; i++)
        work->pace[i].is_team = is_large(work->model);
    double log_theta = log_f64(work->model->config.rope_theta);
    for (int32_t i = 0; i < h / 2; i++) {
        float exponent = (float)(2 * i) / (float)h;
        work->inverse_frequency[i] = 1.0f / (float)exp_f64((double)exponent * log_theta);
    }
    float_env_leave(env);
}

gemma2_session *gemma2_session_place(const gemma2_model *m, const gemma2_session_params *params,
                                     void *memory, size_t size, char *err_text, size_t err_size)
{
    struct errbuf err = {err_text, err_size, 0};
    gemma2_session s;
    gemma2_worker work;
    gemma2_plan plan;
    int status = m ? read_session_params(&s, &work, m, params) : GEMMA2_ERR_ARGUMENT;
    if (!m)
        fail(&err, "there is no model to make a session of");
    else if (!m->config.n_layers)
        fail(&err, "this file holds a tokenizer only, it cannot generate");
    else if (status == GEMMA2_ERR_MISMATCH)
        fail(&err, "the worker is of another model than the session");
    else if (status < 0)
        fail(&err, "session parameters are out of range");
    else if (place_all(&s, &work, NULL, &plan) < 0)
        fail(&err, "a context of %d tokens is too large for this machine", s.n_context);
    else if (!memory || (uintptr_t)memory % 64 || size < plan.total)
        fail(&err, "a session needs %llu bytes aligned to 64", (unsigned long long)plan.total);
    else {
        int has_own = !s.worker;
        place_all(&s, &work, memory, &plan);
        if (has_own) {
            start_worker(&work);
            memcpy(s.worker, &work, sizeof work);
        }
        memcpy(memory, &s, sizeof s);
        return memory;
    }
    return NULL;
}

/* Zeros, aligned to 64; *owned is to be freed. */
static void *allocate_block(uint64_t bytes, void **owned)
{
    *owned = bytes < SIZE_MAX - 63 ? calloc(1, (size_t)bytes + 63) : NULL;
    return *owned ? (char *)*owned + (-(uintptr_t)*owned & 63) : NULL;
}

gemma2_worker *gemma2_worker_new(const gemma2_model *m, const gemma2_worker_params *params,
                                 char *err_text, size_t err_size)
{
    struct errbuf err = {err_text, err_size, 0};
    gemma2_worker work, *placed;
    gemma2_plan plan;
    void *owned;
    if (!m || read_worker_params(&work, m, params) < 0 ||
        place_all(NULL, &work, NULL, &plan) < 0) {
        fail(&err, !m                       ? "there is no model to make a worker for"
                   : !m->config.n_layers ? "this file holds a tokenizer only, it cannot generate"
                                         : "worker parameters are out of range");
        return NULL;
    }
    placed = allocate_block(plan.total, &owned);
    if (!placed) {
        fail(&err, "out of memory: a worker needs %llu MB; choose a smaller batch",
             (unsigned long long)(plan.total >> 20));
        return NULL;
    }
    place_all(NULL, &work, (uint8_t *)placed, &plan);
    start_worker(&work);
    work.owned = owned;
    memcpy(placed, &work, sizeof work);
    return placed;
}

void gemma2_worker_free(gemma2_worker *work)
{
    if (work)
        free(work->owned);
}

gemma2_session *gemma2_session_new(const gemma2_model *m, const gemma2_session_params *params,
                                   char *err_text, size_t err_size)
{
    struct errbuf err = {err_text, err_size, 0};
    gemma2_plan plan = {0, 0, 0, 0};
    void *memory = NULL, *owned = NULL;
    if (gemma2_session_plan(m, params, &plan) == GEMMA2_OK) {
        memory = allocate_block(plan.total, &owned);
        if (!memory) {
            fail(&err, "out of memory: a session needs %llu MB; choose a smaller context",
                 (unsigned long long)(plan.total >> 20));
            return NULL;
        }
    }
    gemma2_session *s =
        gemma2_session_place(m, params, memory, (size_t)plan.total, err_text, err_size);
    if (s)
        s->owned = owned;
    else
        free(owned);
    return s;
}

void gemma2_session_free(gemma2_session *s)
{
    if (s)
        free(s->owned);
}

int32_t gemma2_position(const gemma2_session *s) { return s ? s->position : GEMMA2_ERR_ARGUMENT; }
int32_t gemma2_context(const gemma2_session *s) { return s ? s->n_context : GEMMA2_ERR_ARGUMENT; }
const int32_t *gemma2_history(const gemma2_session *s) { return s ? s->ids : NULL; }

static int check_ids(const gemma2_session *s, const int32_t *ids, size_t n)
{
    if (!s || !ids || !n)
        return GEMMA2_ERR_ARGUMENT;
    if (n > (size_t)(s->n_context - s->position))
        return GEMMA2_ERR_CONTEXT;
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= s->model->config.n_vocab)
            return GEMMA2_ERR_TOKEN;
    return GEMMA2_OK;
}

/* Makes a token that is appended to its session row `at` of the pass. */
static void put_row(struct pass *p, size_t at, gemma2_session *s, int32_t id, float *logits)
{
    p->worker->rows[at] = (struct row){s, logits, s->position};
    s->ids[s->position++] = id;
    s->oldest = max_i32(s->oldest, s->position - s->ring);
    s->is_out = 0;
    s->ahead = NULL;
}

/* Checks and evaluates ids of one session in passes of n_batch rows, until one is cancelled.
 * shape is what the passes have in common.  With logprobs, targets are the ids that follow, and
 * `next` for the last. */
static int run_ids(gemma2_session *s, struct pass shape, const int32_t *ids, size_t n,
                   float *logits, int32_t next)
{
    int status = check_ids(s, ids, n);
    if (status < 0)
        return status;
    float_env env = float_env_enter();
    size_t most = (size_t)min_i32(s->n_batch, s->worker->n_batch);
    shape.model = s->model;
    shape.worker = s->worker;
    for (size_t done = 0; done < n && status == GEMMA2_OK;) {
        struct pass p = shape;
        for (; p.n < most && done < n; done++) {
            int last = done + 1 == n;
            s->worker->targets[p.n] = last ? next : ids[done + 1];
            put_row(&p, p.n++, s, ids[done], last ? logits : NULL);
        }
        p.n_exact = p.matrix ? 0 : p.n;
        status = evaluate(&p);
        if (shape.logprobs)
            shape.logprobs += p.n;
        if (shape.states)
            shape.states += p.n * (size_t)s->model->config.d_model;
    }
    float_env_leave(env);
    return status;
}

int gemma2_eval(gemma2_session *s, const int32_t *ids, size_t n, float *logits)
{
    return run_ids(s, (struct pass){.matrix = NULL}, ids, n, logits, -1);
}

int gemma2_prefill(gemma2_session *s, const int32_t *ids, size_t n, float *logits)
{
    return run_ids(s, (struct pass){.matrix = s ? s->model->matrix : NULL}, ids, n, logits, -1);
}

/* Says in each row whether its session can do all the rows that it is given. */
static void judge_rows(const gemma2_worker *work, gemma2_row *rows, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        gemma2_session *s = rows[i].session;
        if (s)
            s->pending = 0, s->fate = s->model != work->model ? GEMMA2_ERR_MISMATCH
                                      : s->cancelled          ? GEMMA2_ERR_CANCELLED : GEMMA2_OK;
    }
    for (size_t i = 0; i < n; i++) {
        gemma2_session *s = rows[i].session;
        if (!s || s->fate == GEMMA2_ERR_MISMATCH)
            continue;
        if (++s->pending > s->n_batch)
            s->fate = GEMMA2_ERR_ARGUMENT;
        else if (s->pending > s->n_context - s->position)
            s->fate = GEMMA2_ERR_CONTEXT;
        else if (rows[i].id < 0 || rows[i].id >= s->model->config.n_vocab)
            s->fate = GEMMA2_ERR_TOKEN;
    }
    for (size_t i = 0; i < n; i++)
        rows[i].status = rows[i].session ? rows[i].session->fate : GEMMA2_ERR_ARGUMENT;
}

/* Rows of the exact class come first in the pass; those of one session are in order anyhow. */
static int run_rows(gemma2_worker *work, gemma2_row *rows, size_t n)
{
    struct pass p = {.model = work->model, .worker = work, .matrix = work->model->matrix};
    size_t at = 0;
    for (size_t i = 0; i < n; i++)
        p.n += rows[i].status == GEMMA2_OK, p.n_exact += rows[i].status == GEMMA2_OK &&
                                                         !(rows[i].prefill && p.matrix);
    size_t behind = p.n_exact;
    for (size_t i = 0; i < n; i++)
        if (rows[i].status == GEMMA2_OK)
            put_row(&p, rows[i].prefill && p.matrix ? behind++ : at++, rows[i].session,
                    rows[i].id, rows[i].logits);
    if (p.n)
        evaluate(&p);
    for (size_t i = 0; i < n; i++)
        if (rows[i].status == GEMMA2_OK && rows[i].session->is_out)
            rows[i].status = GEMMA2_ERR_CANCELLED;
    for (size_t i = 0; i < n; i++)
        if (rows[i].status < 0)
            return rows[i].status;
    return GEMMA2_OK;
}

int gemma2_eval_rows(gemma2_row *rows, size_t n)
{
    const gemma2_session *first = NULL;
    for (size_t i = 0; rows && i < n && !first; i++)
        first = rows[i].session;
    if (!first || n > (size_t)first->worker->n_batch) {
        for (size_t i = 0; rows && i < n; i++)
            rows[i].status = GEMMA2_ERR_ARGUMENT;
        return GEMMA2_ERR_ARGUMENT;
    }
    float_env env = float_env_enter();
    judge_rows(first->worker, rows, n);
    int status = run_rows(first->worker, rows, n);
    float_env_leave(env);
    return status;
}

int gemma2_score(gemma2_session *s, const int32_t *ids, size_t n, int32_t next, float *logprobs)
{
    if (!s || !logprobs || next < -1)
        return GEMMA2_ERR_ARGUMENT;
    if (next >= s->model->config.n_vocab)
        return GEMMA2_ERR_TOKEN;
    int status = run_ids(s, (struct pass){.logprobs = logprobs}, ids, n, NULL, next);
    for (size_t i = 0; status == GEMMA2_OK && i < (next < 0 ? n - 1 : n); i++) {
        uint32_t id = (uint32_t)(i + 1 < n ? ids[i + 1] : next);
        if (is_kept(s->model, id) ? !isfinite(logprobs[i]) : logprobs[i] != -INFINITY)
            status = GEMMA2_ERR_NONFINITE;
    }
    return status;
}

int gemma2_cancel(gemma2_session *s, int on)
{
    if (!s)
        return GEMMA2_ERR_ARGUMENT;
    s->cancelled = on != 0;
    return GEMMA2_OK;
}

int gemma2_set_hook(gemma2_session *s, gemma2_hook *hook, void *context)
{
    if (!s)
        return GEMMA2_ERR_ARGUMENT;
    s->worker->hook = hook;
    s->worker->hook_context = context;
    return GEMMA2_OK;
}

int gemma2_rewind(gemma2_session *s, int32_t n)
{
    if (!s || n < 0 || n > s->position)
        return GEMMA2_ERR_ARGUMENT;
    /* the next token sees from n - window + 1 on */
    if (n && max_i32(0, n - s->window + 1) < s->oldest)
        return GEMMA2_ERR_REWIND;
    s->position = n;
    s->ahead = NULL;
    if (!n)
        s->oldest = 0;
    return GEMMA2_OK;
}

int gemma2_session_copy(gemma2_session *to, const gemma2_session *from)
{
    if (!to || !from)
        return GEMMA2_ERR_ARGUMENT;
    if (memcmp(to->model->config.identity, from->model->config.identity, 32) ||
        to->window != from->window || to->cache_type != from->cache_type)
        return GEMMA2_ERR_MISMATCH;
    if (to->n_context < from->position)
        return GEMMA2_ERR_CONTEXT;
    if (to != from)
        copy_session(to, from);
    return GEMMA2_OK;
}

int64_t gemma2_session_save(const gemma2_session *s, void *buffer, size_t size)
{
    if (!s)
        return GEMMA2_ERR_ARGUMENT;
    uint64_t bytes = saved_bytes(s, s->position, s->oldest);
    if (buffer && size < bytes)
        return GEMMA2_ERR_SPACE;
    if (buffer)
        save_session(s, buffer, (size_t)bytes);
    return (int64_t)bytes;
}

int gemma2_session_restore(gemma2_session *s, const void *data, size_t size)
{
    int status = s && data ? check_saved(s, data, size) : GEMMA2_ERR_ARGUMENT;
    if (status == GEMMA2_OK)
        restore_session(s, data);
    return status;
}

int gemma2_read_out(gemma2_session *s, const float *state, float *logits)
{
    if (!s || !state || !logits)
        return GEMMA2_ERR_ARGUMENT;
    gemma2_worker *work = s->worker;
    gemma2_hook *hook = work->hook;
    float_env env = float_env_enter();
    work->hook = NULL;
    memcpy(work->x, state, (size_t)s->model->config.d_model * sizeof *state);
    work->rows[0] = (struct row){s, logits, 0};
    work->wanted[0] = work->rows;
    run_team(work, s->model->is_reference ? 1 : useful_threads(work, 1), run_head,
             &(struct pass){.model = s->model, .worker = work, .n = 1, .n_wanted = 1,
                             .n_exact = 1, .wanted_exact = 1});
    work->hook = hook;
    float_env_leave(env);
    return GEMMA2_OK;
}

int gemma2_states(gemma2_session *s, const int32_t *ids, size_t n, float *states)
{
    if (!states)
        return GEMMA2_ERR_ARGUMENT;
    int status = run_ids(s, (struct pass){.states = states}, ids, n, NULL, -1);
    if (status == GEMMA2_OK && !all_finite(states, n * (size_t)s->model->config.d_model))
        status = GEMMA2_ERR_NONFINITE;
    return status;
}

int gemma2_scores(gemma2_session *s, const float *state, float *scores)
{
    if (!s || !state || !scores || !s->model->score.data)
        return GEMMA2_ERR_ARGUMENT;
    const struct tensor *w = &s->model->score;
    float_env env = float_env_enter();
    for (uint32_t r = 0; r < w->rows; r++) {
        float lane[TILE] = {0};
        read_row(w, r, s->worker->normed);
        for (uint32_t i = 0; i < w->cols; i++)
            lane[i % TILE] += s->worker->normed[i] * state[i];
        scores[r] = add_lanes(lane);
    }
    float_env_leave(env);
    return GEMMA2_OK;
}

/* ---- importance ---- */

int gemma2_get_input(const gemma2_model *m, size_t i, gemma2_input *out)
{
    if (!m || !out)
        return 0;
    const gemma2_config *c = &m->config;
    size_t layer = i / INPUTS_A_LAYER, input = i % INPUTS_A_LAYER;
    int is_head = i == (size_t)c->n_layers * INPUTS_A_LAYER;
    if (!c->n_layers || layer > (size_t)c->n_layers - !is_head)
        return 0;
    out->role = is_head ? "head" : layer_inputs[input].role;
    out->layer = is_head ? -1 : (int32_t)layer;
    out->cols = (uint32_t)(is_head ? dimension(c, 'D') : dimension(c, layer_inputs[input].cols));
    out->first = input_first(c, (int)layer, (int)input);
    return 1;
}

int gemma2_importance(gemma2_session *s, const int32_t *ids, size_t n, uint32_t block,
                      double *sums)
{
    if (!sums || (block != 1 && (!block || block % 32 || block > 1024)))
        return GEMMA2_ERR_ARGUMENT;
    return run_ids(s, (struct pass){.importance_block = block, .importance = sums}, ids, n, NULL,
                   -1);
}

/* ---- text ---- */

size_t gemma2_encode_scratch(size_t text_bytes)
{
    const size_t a_byte = 3 + 3 * sizeof(uint64_t) + sizeof(struct symbol);
    if (text_bytes > 1u << 28 || text_bytes > (SIZE_MAX / 2 - 256) / a_byte) /* 32 bits */
        return 0;
    return text_bytes * a_byte + 64;
}

int64_t gemma2_encode(const gemma2_model *m, const char *text, int64_t size, unsigned flags,
                      int32_t *ids, size_t max_ids, void *scratch, size_t scratch_bytes)
{
    if (!m || (!text && size) || size < -1 || size > 1 << 28 || (!ids && max_ids) || flags & ~3u ||
        !scratch)
        return GEMMA2_ERR_ARGUMENT;
    size_t n = size < 0 ? strlen(text) : (size_t)size, needs = gemma2_encode_scratch(n);
    if (!needs || (flags & GEMMA2_ENCODE_BOS && m->config.bos < 0))
        return GEMMA2_ERR_ARGUMENT;
    if (scratch_bytes < needs)
        return GEMMA2_ERR_SPACE;
    struct encoder e =
        start_encoder(m, !!(flags & GEMMA2_ENCODE_PLAIN), ids, max_ids, scratch, n);
    if (flags & GEMMA2_ENCODE_BOS)
        emit(&e, m->config.bos);
    float_env env = float_env_enter(); /* scores are floats */
    normalise(&e, (const uint8_t *)text, n);
    encode_text(&e, 0, e.n);
    float_env_leave(env);
    return e.n_ids;
}

int gemma2_decode(const gemma2_model *m, gemma2_utf8 *hold, int32_t id, char *text,
                  size_t text_size)
{
    if (!m || !hold || hold->n > 3 || !text || id < -1)
        return GEMMA2_ERR_ARGUMENT;
    if (id >= m->config.n_vocab)
        return GEMMA2_ERR_TOKEN;
    /* hold may come from another model, whose pieces left more bytes than this one's do */
    if (text_size < (size_t)m->config.max_piece_bytes + 12 || text_size < 3u * hold->n + 5u)
        return GEMMA2_ERR_SPACE;
    int kind = id < 0 ? 0 : m->tokenizer.kinds[id];
    if (kind == GEMMA2_PIECE_BYTE) {
        hold->bytes[hold->n++] = (uint8_t)byte_piece(piece_text(&m->tokenizer, (uint32_t)id));
        return (int)release_bytes(hold, 0, text);
    }
    size_t n = release_bytes(hold, 1, text);
    if (kind == GEMMA2_PIECE_UNKNOWN) {
        memcpy(text + n, " \xe2\x81\x87 ", 5);
        n += 5;
    } else if (id >= 0 && kind != GEMMA2_PIECE_CONTROL)
        n += spaced_text(piece_text(&m->tokenizer, (uint32_t)id), text + n);
    return (int)n;
}

const char *gemma2_piece(const gemma2_model *m, int32_t id, size_t *size, int *kind)
{
    if (!m || id < 0 || id >= m->config.n_vocab)
        return NULL;
    struct text s = piece_text(&m->tokenizer, (uint32_t)id);
    if (size)
        *size = s.n;
    if (kind)
        *kind = m->tokenizer.kinds[id];
    return (const char *)s.p;
}

int32_t gemma2_find_piece(const gemma2_model *m, const char *piece, int64_t size)
{
    if (!m || !piece || size < -1)
        return GEMMA2_ERR_ARGUMENT;
    size_t n = size < 0 ? strlen(piece) : (size_t)size;
    struct text wanted = {(const uint8_t *)piece, (uint32_t)n};
    for (uint32_t id = 0; id < m->tokenizer.n && n <= MAX_PIECE_BYTES; id++)
        if (same_text(piece_text(&m->tokenizer, id), wanted))
            return (int32_t)id;
    return GEMMA2_ERR_TOKEN;
}

int64_t gemma2_piece_bytes(const gemma2_model *m, int32_t id, char *bytes, size_t size)
{
    uint8_t all[MAX_PIECE_BYTES];
    if (!m || (!bytes && size))
        return GEMMA2_ERR_ARGUMENT;
    if (id < 0 || (uint32_t)id >= m->tokenizer.n)
        return GEMMA2_ERR_TOKEN;
    uint32_t n = token_bytes(&m->tokenizer, (uint32_t)id, all);
    if (n && size)
        memcpy(bytes, all, n < size ? n : size);
    return n;
}

/* ---- chat ---- */

/* Whether arguments and sizes are sound. */
static int check_arguments(const gemma2_model *m, const gemma2_message *messages, size_t n,
                           unsigned flags)
{
    if (!m || (!messages && n) || flags & ~3u)
        return 0;
    for (size_t i = 0; i < n; i++)
        if (messages[i].size < -1 || messages[i].size > 1 << 28 ||
            (!messages[i].text && messages[i].size) || messages[i].role < GEMMA2_ROLE_SYSTEM ||
            messages[i].role > GEMMA2_ROLE_MODEL)
            return 0;
    return 1;
}

int gemma2_chat_check(const gemma2_model *m, const gemma2_message *messages, size_t n,
                      unsigned flags, char *err_text, size_t err_size)
{
    struct errbuf err = {err_text, err_size, 0};
    if (!check_arguments(m, messages, n, flags)) {
        fail(&err, "a role, flag, text or size of the messages is out of its range");
        return GEMMA2_ERR_ARGUMENT;
    }
    int system = n && messages[0].role == GEMMA2_ROLE_SYSTEM;
    int own_turn = m->chat[CHAT_SYSTEM_BEFORE].p != NULL;
    int goes_on = (flags & GEMMA2_CHAT_CONTINUE) != 0;
    int has_text = system && (own_turn || message_text(m, messages, AT_START | AT_END).n),
        alternate = 1;
    for (size_t i = (size_t)system; i < n; i++)
        alternate &= messages[i].role ==
                     ((i - (size_t)system) % 2 ? GEMMA2_ROLE_MODEL : GEMMA2_ROLE_USER);
    if (m->chat[CHAT_REFUSED].p)
        fail(&err, "this model's chat template cannot be used: %.*s",
             (int)m->chat[CHAT_REFUSED].n, (const char *)m->chat[CHAT_REFUSED].p);
    else if (system && goes_on)
        fail(&err, "system text belongs to the beginning of a conversation, not to its middle");
    else if (has_text && !own_turn && !m->chat[CHAT_SYSTEM_JOIN].p)
        fail(&err, "this model's chat template has no place for system text; put it into the "
                   "first message");
    else if (!alternate)
        fail(&err, "the messages do not alternate between user and model, the user's first");
    else if (has_text && !own_turn && n == 1)
        fail(&err, "system text belongs to the first user message, which is missing");
    else if (flags & GEMMA2_CHAT_GENERATE && (!n || messages[n - 1].role != GEMMA2_ROLE_USER))
        fail(&err, "the model can only answer a user's message, and the last one is not");
    else
        return GEMMA2_OK;
    return GEMMA2_ERR_CHAT;
}

/* Bytes that the conversation and, apart from it, the template's lines take at most. */
static uint64_t conversation_bytes(const gemma2_model *m, const gemma2_message *messages, size_t n)
{
    uint64_t turn = 0, bytes = 0;
    for (int i = CHAT_START; i < N_CHAT_PARTS; i++)
        turn += m->chat[i].n;
    for (size_t i = 0; i < n && bytes <= 1u << 28; i++) {
        enum chat_part before = messages[i].role == GEMMA2_ROLE_USER ? CHAT_USER_BEFORE
                                                                     : CHAT_MODEL_BEFORE;
        bytes += (uint64_t)m->chat[before].n + m->chat[before + 1].n + message_size(&messages[i]);
    }
    return bytes + 2 * turn;
}

size_t gemma2_chat_scratch(const gemma2_model *m, const gemma2_message *messages, size_t n)
{
    uint64_t bytes = check_arguments(m, messages, n, 0) ? conversation_bytes(m, messages, n)
                                                        : UINT64_MAX;
    size_t text = bytes <= 1u << 28 ? gemma2_encode_scratch((size_t)bytes) : 0;
    return text && n <= (SIZE_MAX - text) / sizeof(struct range) ? text + n * sizeof(struct range)
                                                                 : 0;
}

int64_t gemma2_encode_chat(const gemma2_model *m, const gemma2_message *messages, size_t n,
                           unsigned flags, int32_t *ids, size_t max_ids, void *scratch,
                           size_t scratch_bytes)
{
    int status = gemma2_chat_check(m, messages, n, flags, NULL, 0);
    if (status < 0)
        return status;
    size_t needs = gemma2_chat_scratch(m, messages, n);
    if (!needs || !scratch || (!ids && max_ids))
        return GEMMA2_ERR_ARGUMENT;
    if (scratch_bytes < needs)
        return GEMMA2_ERR_SPACE;
    size_t bytes = (size_t)conversation_bytes(m, messages, n);
    struct conversation c = {.m = m, .e = start_encoder(m, 1, ids, max_ids, scratch, bytes)};
    c.texts = (struct range *)(c.e.symbols + bytes);
    float_env env = float_env_enter();
    encode_messages(&c, messages, n, flags);
    float_env_leave(env);
    return c.e.n_ids;
}

/* ---- sampling ---- */

void gemma2_sampler_init(gemma2_sampler *p, uint64_t seed)
{
    gemma2_sampler start = {.struct_size = sizeof start, .penalty_last = 64,
                            .repetition_penalty = 1, .temperature = 1, .top_k = 64,
                            .top_p = 0.95f};
    pcg32(&start.rng);
    start.rng += seed;
    pcg32(&start.rng);
    if (p)
        *p = start;
}

int32_t gemma2_sample(gemma2_session *s, gemma2_sampler *p, const float *logits)
{
    if (!s || !p || !logits)
        return GEMMA2_ERR_ARGUMENT;
    float_env env = float_env_enter();
    int32_t id = sampler_is_sound(p) ? sample(s, p, logits) : GEMMA2_ERR_ARGUMENT;
    float_env_leave(env);
    return id;
}

/* The log-sum-exp of all logits but -infinity, so that it has the bits of score_rows, which meets
 * kept ids alone.  The caller's floating-point environment is the engine's. */
static struct log_sum log_sum_of(const float *logits, size_t n)
{
    struct log_sum sum = {-INFINITY, 0, 0};
    float x[HEAD_BLOCK];
    for (size_t i = 0, block = 0; i < n; i++) {
        x[block] = logits[i];
        block += logits[i] > -INFINITY;
        if (block == HEAD_BLOCK || (block && i + 1 == n)) {
            log_sum_add(&sum, x, block, exp_sum);
            block = 0;
        }
    }
    return sum;
}

int gemma2_logprob(const float *logits, size_t n, int32_t id, float *logprob)
{
    if (!logits || !logprob || !n || n > INT32_MAX)
        return GEMMA2_ERR_ARGUMENT;
    if (id < 0 || (size_t)id >= n)
        return GEMMA2_ERR_TOKEN;
    if (!are_logits(logits, n))
        return GEMMA2_ERR_NONFINITE;
    float_env env = float_env_enter();
    struct log_sum sum = log_sum_of(logits, n);
    sum.target = logits[id];
    *logprob = log_sum_end(&sum);
    float_env_leave(env);
    return GEMMA2_OK;
}

int32_t gemma2_top_logprobs(const float *logits, size_t n, gemma2_candidate *top, size_t max)
{
    if (!logits || !n || n > INT32_MAX || (max && !top))
        return GEMMA2_ERR_ARGUMENT;
    if (!are_logits(logits, n))
        return GEMMA2_ERR_NONFINITE;
    float_env env = float_env_enter();
    struct log_sum sum = log_sum_of(logits, n);
    size_t found = 0;
    for (size_t id = 0; id < n && max; id++) {
        if (logits[id] <= (found == max ? logits[top[max - 1].id] : -INFINITY))
            continue;
        size_t at = found < max ? found++ : max - 1;
        for (; at && logits[top[at - 1].id] < logits[id]; at--)
            top[at] = top[at - 1];
        top[at].id = (int32_t)id;
    }
    for (size_t i = 0; i < found; i++) {
        sum.target = logits[top[i].id];
        top[i].logprob = log_sum_end(&sum);
    }
    float_env_leave(env);
    return (int32_t)found;
}

/* ---- grammars ---- */

gemma2_grammar *gemma2_grammar_new(const gemma2_model *m, const char *text, int64_t size,
                                   char *err_text, size_t err_size)
{
    struct errbuf err = {err_text, err_size, 0};
    if (!m || !text || size < -1)
        return fail(&err, "gemma2_grammar_new: no model or no text"), NULL;
    size_t n = size < 0 ? strlen(text) : (size_t)size;
    if (n > MAX_GRAMMAR)
        return fail(&err, "a grammar of more than %d bytes is too long", MAX_GRAMMAR), NULL;
    for (int i = 0; i < 256; i++)
        if (m->tokenizer.byte_id[i] < 0 || !is_kept(m, (uint32_t)m->tokenizer.byte_id[i]))
            return fail(&err, "the vocabulary has no piece for byte %d, so replies cannot be "
                              "constrained", i), NULL;
    struct parser p = {.text = (const uint8_t *)text, .size = (uint32_t)n, .n_rules = 64,
                       .err = &err};
    while (p.n_rules < n / 3 + 64) /* more than there can be names */
        p.n_rules *= 2;
    p.g = malloc(sizeof *p.g + (MAX_INSTS + 1) * sizeof *p.g->insts);
    p.rules = calloc(p.n_rules, sizeof *p.rules);
    if (p.g) {
        *p.g = (gemma2_grammar){.model = m, .n_insts = 1};
        p.g->insts[0] = (struct inst){.op = OP_END};
    }
    int ok = p.g && p.rules ? read_grammar(&p) : fail(&err, "out of memory for the grammar");
    free(p.rules);
    if (!ok)
        return free(p.g), NULL;
    gemma2_grammar *fit = realloc(p.g, sizeof *fit + p.g->n_insts * sizeof *fit->insts);
    return fit ? fit : p.g;
}

void gemma2_grammar_free(gemma2_grammar *g) { free(g); }

gemma2_matcher *gemma2_matcher_new(const gemma2_grammar *g)
{
    const struct vocabulary *v = g ? vocabulary_of(g->model) : NULL;
    gemma2_matcher *m = v ? calloc(1, sizeof *m + MAX_MASKS * (size_t)v->n_words * sizeof *m->masks)
                          : NULL;
    if (!m)
        return NULL;
    m->grammar = g, m->vocabulary = v;
    m->tag = (uint32_t)((uintptr_t)m >> 6) | 1; /* another matcher's differs, most likely */
    m->sets[0].cost = NOWHERE, m->sets[1].n = 1;
    forget(m, 1);
    return m;
}

void gemma2_matcher_free(gemma2_matcher *m) { free(m); }

/* Forgets what the set does not need once half of the room that the last time left is used: the
 * next mask may need much.  Returns the number of the set. */
static uint32_t make_room(gemma2_matcher *m, uint32_t set)
{
    int is_short = m->full || m->n_sets > (MAX_SETS + m->sets_left) / 2 ||
                   m->n_items > (MAX_ITEMS + m->items_left) / 2;
    return is_short ? forget(m, set) : set;
}

int gemma2_matcher_start(gemma2_matcher *m, gemma2_grammar_state *state)
{
    if (!m || !state)
        return GEMMA2_ERR_ARGUMENT;
    make_room(m, 1);
    collect(m, m->grammar->root, 1);
    *state = (gemma2_grammar_state){m->tag, intern(m)};
    return GEMMA2_OK;
}

/* Checks the state, which may hold anything. */
static int check_state(const gemma2_matcher *m, const gemma2_grammar_state *state)
{
    if (!m || !state)
        return GEMMA2_ERR_ARGUMENT;
    if (state->tag != m->tag || !state->set || state->set >= m->n_sets)
        return GEMMA2_ERR_MISMATCH;
    return GEMMA2_OK;
}

int gemma2_matcher_allowed(gemma2_matcher *m, const gemma2_grammar_state *state, int64_t left,
                           uint32_t *mask)
{
    int status = mask && left >= -1 ? check_state(m, state) : GEMMA2_ERR_ARGUMENT;
    if (status < 0)
        return status;
    fill_mask(m, state->set, left < 0 || left > MOST_LEFT ? MOST_LEFT : (uint32_t)left, mask);
    return m->full ? GEMMA2_ERR_SPACE : GEMMA2_OK;
}

int gemma2_matcher_accept(gemma2_matcher *m, gemma2_grammar_state *state, int32_t id)
{
    int status = check_state(m, state);
    if (status < 0)
        return status;
    if (id < 0 || id >= m->grammar->model->config.n_vocab ||
        !is_kept(m->grammar->model, (uint32_t)id))
        return GEMMA2_ERR_TOKEN;
    state->set = make_room(m, state->set), state->tag = m->tag;
    int stops = gemma2_is_stop(m->grammar->model, id);
    uint32_t next = stops ? m->sets[state->set].cost == 0
                          : after_token(m, state->set, (uint32_t)id);
    if (m->full)
        return GEMMA2_ERR_SPACE;
    if (!next)
        return GEMMA2_ERR_TOKEN;
    state->set = next;
    return GEMMA2_OK;
}

int64_t gemma2_matcher_shortest(gemma2_matcher *m, const gemma2_grammar_state *state)
{
    int status = check_state(m, state);
    return status < 0 ? status : (int64_t)tokens_of(m, state->set, 1);
}

/* ---- speculation ---- */

void gemma2_ahead_params_init(gemma2_ahead_params *params)
{
    if (params)
        *params = (gemma2_ahead_params){.struct_size = sizeof *params, .lookup = 1};
}

/* Fills in the defaults and checks the ranges. */
static int read_ahead_params(gemma2_ahead *a, const gemma2_model *m,
                             const gemma2_ahead_params *given, struct errbuf *err)
{
    gemma2_ahead_params p;
    gemma2_ahead_params_init(&p);
    if (!m || !m->config.n_layers)
        return fail(err, "there is no model to look ahead for");
    if ((given && !copy_params(&p, sizeof p, given, given->struct_size,
                               offsetof(gemma2_ahead_params, draft))) ||
        p.n_drafts < 0 ||
        p.n_drafts > MAX_DRAFTS || p.n_context < 0 || p.n_context > 1 << 30 ||
        (p.draft && p.propose))
        return fail(err, "gemma2_ahead_new: parameters are out of range");
    if (p.draft && !same_vocabulary(m, p.draft->model))
        return fail(err, "the draft model has another vocabulary; give a model whose pieces are "
                         "the same");
    *a = (gemma2_ahead){.model = m, .adapts = !p.n_drafts, .looks_up = p.lookup != 0,
                        .propose = p.draft ? propose_draft : p.propose, .context = p.context,
                        .draft = p.draft};
    a->n_context = p.n_context ? p.n_context : m->config.n_context;
    a->most = p.n_drafts ? p.n_drafts : MAX_DRAFTS;
    for (int i = 0; i < N_SOURCES; i++)
        a->sources[i].chance = 0.5;
    a->source = a->sources;
    return 1;
}

uint64_t gemma2_ahead_bytes(const gemma2_model *m, const gemma2_ahead_params *params)
{
    gemma2_ahead a = {.model = NULL};
    struct errbuf err = {NULL, 0, 0};
    struct arena arena = {NULL, 0, 0};
    if (!read_ahead_params(&a, m, params, &err))
        return 0;
    place_ahead(&a, &arena);
    return arena.overflow ? 0 : arena.used;
}

gemma2_ahead *gemma2_ahead_new(const gemma2_model *m, const gemma2_ahead_params *params,
                               char *err_text, size_t err_size)
{
    struct errbuf err = {err_text, err_size, 0};
    gemma2_ahead start, *a;
    if (!read_ahead_params(&start, m, params, &err))
        return NULL;
    uint64_t bytes = gemma2_ahead_bytes(m, params);
    void *owned;
    a = bytes ? allocate_block(bytes, &owned) : NULL;
    if (!a) {
        fail(&err, "out of memory: looking ahead needs %llu MB; choose fewer drafts",
             (unsigned long long)(bytes >> 20));
        return NULL;
    }
    place_ahead(&start, &(struct arena){(uint8_t *)a, 0, 0});
    *a = start;
    a->owned = owned;
    a->source = a->sources;
    if (a->draft)
        a->context = a;
    return a;
}

void gemma2_ahead_free(gemma2_ahead *a)
{
    if (a)
        free(a->owned);
}

int gemma2_eval_ahead(gemma2_session *s, gemma2_ahead *a, int32_t id, float *logits)
{
    int status = a ? check_ids(s, &id, 1) : GEMMA2_ERR_ARGUMENT;
    if (status < 0)
        return status;
    if (s->model != a->model)
        return GEMMA2_ERR_MISMATCH;
    int waits = s->ahead == a && a->session == s && a->n_used < a->n_drafts;
    int is_draft = waits && s->ids[s->position] == id;
    if (is_draft && s->cancelled) {
        s->oldest = max_i32(s->oldest, s->position + 1 - s->ring); /* as a pass leaves it */
        return GEMMA2_ERR_CANCELLED;
    }
    if (waits)
        note_answer(a, is_draft);
    if (!is_draft)
        return evaluate_ahead(s, a, id, logits);
    size_t v = (size_t)s->model->config.n_vocab;
    if (logits)
        memcpy(logits, a->logits + (size_t)a->n_used * v, v * sizeof *logits);
    a->n_used++;
    s->position++;
    s->oldest = max_i32(s->oldest, s->position - s->ring);
    return GEMMA2_OK;
}

int gemma2_ahead_count(const gemma2_ahead *a, gemma2_ahead_counts *counts)
{
    if (!a || !counts)
        return GEMMA2_ERR_ARGUMENT;
    *counts = a->counts;
    return GEMMA2_OK;
}

/* ===================================================================================
 * 9. Back rooms: files, SHA-256, hostile headers, saved sessions, importance
 * =================================================================================== */

/* ---- files ---- */

#ifdef _WIN32
typedef struct _stat64 file_facts;
#define fstat _fstat64
#define read _read
#define close _close
#else
typedef struct stat file_facts;
#endif

/* A descriptor, or -1 and errno.  path is UTF-8, on Windows too.  A pipe that nobody writes to is
 * not waited for. */
static int open_descriptor(const char *path)
{
#ifdef _WIN32
    WCHAR wide[4096];
    if (!MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, wide, 4096))
        return errno = EILSEQ, -1;
    DWORD kind = GetFileAttributesW(wide);
    if (kind != INVALID_FILE_ATTRIBUTES && kind & FILE_ATTRIBUTE_DIRECTORY)
        return errno = EISDIR, -1;
    return _wsopen(wide, _O_RDONLY | _O_BINARY | _O_NOINHERIT, _SH_DENYWR);
#else
    return open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
#endif
}

static void file_close(struct file *f)
{
#if defined(HAVE_MMAP)
    if (f->mapping)
        munmap(f->mapping, f->size);
#elif defined(_WIN32)
    if (f->mapping)
        UnmapViewOfFile(f->mapping);
#endif
    free(f->memory);
    memset(f, 0, sizeof *f);
}

/* Reads the file into memory aligned to 64 that asks for huge pages. */
static int read_file(struct file *f, int fd, struct errbuf *err)
{
    f->memory = malloc(f->size + 63);
    if (!f->memory)
        return err->code = GEMMA2_ERR_MEMORY, fail(err, "out of memory reading %zu bytes", f->size);
    uint8_t *to = (uint8_t *)f->memory + (-(uintptr_t)f->memory & 63);
    f->data = to;
#ifdef MADV_HUGEPAGE
    enum { HUGE_PAGE = 1 << 21 };
    size_t before = -(uintptr_t)to & (HUGE_PAGE - 1);
    if (f->size > before + HUGE_PAGE)
        madvise(to + before, f->size - before, MADV_HUGEPAGE);
#endif
    for (size_t left = f->size; left;) {
        errno = 0; /* what is left tells an error from an early end */
        int64_t got = read(fd, to, left < 1u << 30 ? (unsigned)left : 1u << 30);
        if (got > 0)
            to += got, left -= (size_t)got;
        else if (got == 0 || errno != EINTR)
            return fail(err, "cannot read %zu bytes: %s", f->size,
                        errno ? strerror(errno) : "the file became shorter");
    }
    return 1;
}

static int map_file(struct file *f, int fd, struct errbuf *err)
{
#if defined(HAVE_MMAP)
    void *p = mmap(NULL, f->size, PROT_READ, MAP_SHARED, fd, 0);
    f->mapping = p == MAP_FAILED ? NULL : p;
#elif defined(_WIN32)
    HANDLE file = (HANDLE)_get_osfhandle(fd);
    HANDLE section = CreateFileMappingW(file, NULL, PAGE_READONLY, 0, 0, NULL);
    f->mapping = section ? MapViewOfFile(section, FILE_MAP_READ, 0, 0, 0) : NULL;
    if (section)
        CloseHandle(section);
    errno = ENOMEM; /* for want of a better word */
#else
    return read_file(f, fd, err);
#endif
    f->data = f->mapping;
    return f->data || fail(err, "cannot map %zu bytes: %s", f->size, strerror(errno));
}

static int file_open(struct file *f, const char *path, int read_in, struct errbuf *err)
{
    file_facts facts = {0};
    int fd = open_descriptor(path), ok = 0, reason = errno;
    if (fd < 0 && reason != EISDIR)
        return fail(err, "cannot open: %s; give the path of a model file",
                    reason == EILSEQ ? "the path is not UTF-8, or too long" : strerror(reason));
    if (fd >= 0 && fstat(fd, &facts) < 0)
        fail(err, "cannot read: %s", strerror(errno));
    else if (fd < 0 || (facts.st_mode & S_IFMT) == S_IFDIR)
        fail(err, "this is a directory; convert the checkpoint that it holds, or give the path of "
                  "a model file");
    else if ((facts.st_mode & S_IFMT) != S_IFREG)
        fail(err, "this is a device or pipe; give the path of a model file");
    else if (facts.st_size == 0)
        fail(err, "the file is empty; copy or make it again");
    else if ((uint64_t)facts.st_size > SIZE_MAX / 2)
        fail(err, "has %llu bytes, too large for this %d-bit program",
             (unsigned long long)facts.st_size, (int)sizeof(size_t) * 8);
    else {
        f->size = (size_t)facts.st_size;
        ok = (read_in ? read_file : map_file)(f, fd, err);
    }
    if (fd >= 0)
        close(fd);
    return ok;
}

/* ---- SHA-256, FIPS 180-4 ---- */

static const uint32_t sha256_k[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
    0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe,
    0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f,
    0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7,
    0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc,
    0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
    0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116,
    0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
    0xc67178f2};

struct sha256 {
    uint32_t h[8];
    uint8_t block[64];
    uint64_t bytes;
    sha256_fn *blocks;
};

static uint32_t ror(uint32_t x, int n) { return x >> n | x << (32 - n); }

/* One round; the working variable a is v[-j mod 8], b the next one, and so on. */
INLINE void sha256_round(uint32_t v[8], int j, uint32_t kw)
{
    uint32_t a = v[-j & 7], b = v[(1 - j) & 7], c = v[(2 - j) & 7];
    uint32_t e = v[(4 - j) & 7], f = v[(5 - j) & 7], g = v[(6 - j) & 7];
    uint32_t t = v[(7 - j) & 7] + (ror(e, 6) ^ ror(e, 11) ^ ror(e, 25)) + ((e & f) ^ (~e & g)) + kw;
    v[(3 - j) & 7] += t;
    v[(7 - j) & 7] = t + (ror(a, 2) ^ ror(a, 13) ^ ror(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
}

static void sha256_blocks(uint32_t h[8], const uint8_t *p, size_t n)
{
    for (; n; n--, p += 64) {
        uint32_t w[64], v[8];
        for (int i = 0; i < 16; i++)
            w[i] = __builtin_bswap32(get_u32(p + 4 * i));
        for (int i = 16; i < 64; i++) {
            uint32_t a = w[i - 15], b = w[i - 2];
            w[i] = w[i - 16] + w[i - 7] + (ror(a, 7) ^ ror(a, 18) ^ a >> 3) +
                   (ror(b, 17) ^ ror(b, 19) ^ b >> 10);
        }
        memcpy(v, h, sizeof v);
        for (int i = 0; i < 64; i += 8)
            for (int j = 0; j < 8; j++) /* unrolled, the roles of v rotate by register */
                sha256_round(v, j, sha256_k[i + j] + w[i + j]);
        for (int i = 0; i < 8; i++)
            h[i] += v[i];
    }
}

static void sha256_init(struct sha256 *s)
{
    *s = (struct sha256){.h = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f,
                               0x9b05688c, 0x1f83d9ab, 0x5be0cd19}, .blocks = sha256_blocks};
}

static void sha256_add(struct sha256 *s, const uint8_t *p, size_t n)
{
    size_t held = s->bytes % 64;
    s->bytes += n;
    if (held) {
        size_t take = n < 64 - held ? n : 64 - held;
        memcpy(s->block + held, p, take);
        p += take, n -= take;
        if (held + take < 64)
            return;
        s->blocks(s->h, s->block, 1);
    }
    s->blocks(s->h, p, n / 64);
    if (n % 64)
        memcpy(s->block, p + n / 64 * 64, n % 64);
}

static void sha256_end(struct sha256 *s, uint8_t digest[32])
{
    uint64_t bits = s->bytes * 8;
    uint8_t tail[72] = {0x80};
    size_t n = 64 - (s->bytes + 8) % 64;
    for (size_t i = 0; i < 8; i++)
        tail[n + i] = (uint8_t)(bits >> (56 - 8 * i));
    sha256_add(s, tail, n + 8);
    for (int i = 0; i < 32; i++)
        digest[i] = (uint8_t)(s->h[i / 4] >> (24 - 8 * (i % 4)));
}

/* The digest of a's n bytes followed by b's m. */
static void digest_of(const gemma2_model *model, const uint8_t *a, size_t n, const uint8_t *b,
                      size_t m, uint8_t digest[32])
{
    struct sha256 s;
    sha256_init(&s);
    if (model->sha256)
        s.blocks = model->sha256;
    sha256_add(&s, a, n);
    sha256_add(&s, b, m);
    sha256_end(&s, digest);
}

/* ---- opening: what a file says is believed only when it is checked ---- */

/* Says what is wrong with the model file; returns 0. */
__attribute__((format(PRINTF_FORMAT, 2, 3)))
static int corrupt(struct errbuf *err, const char *format, ...)
{
    char what[200];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    return fail(err, "the model file is corrupted: %s; copy or convert it again", what);
}

static int read_field(const uint8_t *header, const struct header_field *f, gemma2_config *c,
                      struct errbuf *err)
{
    const uint8_t *p = header + f->at;
    double x = f->kind == 'i' ? get_u32(p) : f->kind == 'd' ? get_f64(p) : get_f32(p);
    int zero = f->zero && c->n_layers == 0;
    int ok = zero || (f->kind == 'c' && x == 0) ? x == 0 : x >= f->low && x <= f->high;
    if (!ok)
        return corrupt(err, "its %s is %.10g, not %s%.10g to %.10g", f->name, x,
                       f->kind == 'c' ? "0 or " : "", zero ? 0 : f->low, zero ? 0 : f->high);
    void *to = (char *)c + f->member;
    if (f->kind == 'i')
        *(int32_t *)to = (int32_t)x;
    else if (f->kind == 'd')
        *(double *)to = x;
    else
        *(float *)to = (float)x;
    return 1;
}

/* The last part of the header: which layers are local, which ids stop, zeros. */
static int read_lists(const uint8_t *header, gemma2_config *c, struct errbuf *err)
{
    if (c->n_layers && c->n_heads % c->n_kv_heads)
        return corrupt(err, "%d query heads cannot share %d key/value heads", c->n_heads,
                       c->n_kv_heads);
    if (c->head_dim % 2)
        return corrupt(err, "head_dim %d is odd", c->head_dim);
    for (int l = 0; l < MAX_LAYERS; l++) {
        c->is_local[l] = header[128 + l / 8] >> l % 8 & 1;
        if (l >= c->n_layers && c->is_local[l])
            return corrupt(err, "it marks a layer that it does not have");
    }
    uint32_t n = get_u32(header + 256);
    if (n > 15)
        return corrupt(err, "it has %u stop ids, and 15 fit", n);
    c->n_stop = (int32_t)n;
    for (uint32_t i = 0; i < 15; i++) {
        uint32_t id = get_u32(header + 260 + 4 * i);
        if (id >= (i < n ? (uint32_t)c->n_vocab : 1u))
            return corrupt(err, "stop id %u is not in the vocabulary", id);
        c->stop[i] = (int32_t)id;
    }
    if (!is_zero(header + 60, 4) || !is_zero(header + 320, IDENTITY_AT - 320))
        return corrupt(err, "reserved bytes of its header are not zero");
    return 1;
}

/* Says what a file that is no model probably is. */
static int fail_foreign(const uint8_t *p, size_t size, struct errbuf *err)
{
    static const struct {
        const char *bytes;
        size_t at, n;
        const char *what;
    } known[] = {
        {"GGUF", 0, 4, "a GGUF file; convert it first"},
        {"{\"", 8, 2, "a safetensors file; convert its folder first"},
        {"PK\x03\x04", 0, 4, "a zip archive, as of PyTorch; convert the checkpoint first"},
        {"\x80\x02", 0, 2, "a PyTorch file; convert the checkpoint first"},
        {"\x89HDF", 0, 4, "an HDF5 file, as of Keras; convert the checkpoint first"},
        {"\x89GEMSES\n", 0, 8, "a saved session; give the model that it belongs to"},
        {"\x89GEMMAI\n", 0, 8, "an importance file; it serves to convert a checkpoint"},
        {"\x1f\x8b", 0, 2, "compressed with gzip; unpack it first"},
        {"\xfd" "7zXZ", 0, 5, "compressed with xz; unpack it first"},
        {"<", 0, 1, "a web page; the download went wrong"},
        {"version https://git-lfs", 0, 23, "a Git LFS pointer; fetch the file with git lfs pull"},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (size >= known[i].at + known[i].n &&
            !memcmp(p + known[i].at, known[i].bytes, known[i].n))
            return fail(err, "this is %s", known[i].what);
    return fail(err, "this is not a gemma2.c model file; convert a checkpoint to get one");
}

/* Everything before the directory's entries; sets n_sections, directory, file_bytes, identity. */
static int read_header(struct gemma2_model *m, const struct file *f, struct errbuf *err)
{
    static const uint8_t magic[8] = {0x89, 'G', 'E', 'M', 'M', 'A', '2', '\n'};
    const uint8_t *p = f->data;
    gemma2_config *c = &m->config;
    err->code = GEMMA2_ERR_FOREIGN;
    if (f->size < 8 || memcmp(p, magic, 8))
        return fail_foreign(p, f->size, err);
    err->code = GEMMA2_ERR_CORRUPT;
    if (f->size < HEADER_BYTES)
        return corrupt(err, "it was cut short to %zu bytes, less than its header", f->size);
    err->code = GEMMA2_ERR_MISMATCH;
    if (get_u32(p + 8) != 1)
        return fail(err, "the model file has format version %u and this is a program for version "
                         "1; use a newer gemma2.c or convert again", get_u32(p + 8));
    if (get_u64(p + 16))
        return fail(err, "the model file needs features (%#llx) that this version does not have; "
                         "use a newer gemma2.c", (unsigned long long)get_u64(p + 16));
    err->code = GEMMA2_ERR_CORRUPT;
    c->file_bytes = get_u64(p + 32);
    if (c->file_bytes != f->size)
        return fail(err, "the model file has %zu bytes, but should have %llu: it was %s; copy or "
                         "convert it again", f->size, (unsigned long long)c->file_bytes,
                    f->size < c->file_bytes ? "cut short" : "added to");
    m->n_sections = get_u32(p + 48);
    if (get_u32(p + 12) != HEADER_BYTES || get_u64(p + 40) != HEADER_BYTES ||
        get_u32(p + 52) != ENTRY_BYTES || m->n_sections < 1 || m->n_sections > 65536 ||
        HEADER_BYTES + (uint64_t)m->n_sections * ENTRY_BYTES > f->size)
        return corrupt(err, "its directory does not fit");
    m->directory = p + HEADER_BYTES;
    digest_of(m, p, IDENTITY_AT, m->directory, (size_t)m->n_sections * ENTRY_BYTES, c->identity);
    if (memcmp(c->identity, p + IDENTITY_AT, sizeof c->identity))
        return corrupt(err, "header and directory do not match their checksum");
    return 1;
}

static struct tensor *tensor_of(gemma2_model *m, const struct role *r, uint32_t layer)
{
    char *base = r->id >= ROLE_LAYER_FIRST ? (char *)&m->layers[layer] : (char *)m;
    return (struct tensor *)(base + r->member);
}

/* Checks a tensor's shape and size against its role and puts it in its place. */
static int place_tensor(struct gemma2_model *m, const struct role *r, const struct entry *e,
                        struct errbuf *err)
{
    if (r->id == ROLE_SCORE && e->rows >= 1 && e->rows <= 1024)
        m->config.n_scores = (int32_t)e->rows;
    uint64_t rows = dimension(&m->config, r->rows), cols = dimension(&m->config, r->cols);
    uint32_t layers = r->id >= ROLE_LAYER_FIRST ? (uint32_t)m->config.n_layers : 1;
    if (e->layer >= layers || !m->config.n_layers)
        return corrupt(err, "%s of layer %u does not belong", r->name, e->layer);
    if (e->rows != rows || e->cols != cols)
        return corrupt(err, "%s has shape [%llu, %llu], not [%llu, %llu]", r->name,
                       (unsigned long long)e->rows, (unsigned long long)e->cols,
                       (unsigned long long)rows, (unsigned long long)cols);
    if (e->type < TYPE_F32 || e->type >= N_TYPES || (r->cols == '1' && e->type != TYPE_F32))
        return corrupt(err, "%s has unknown type %u", r->name, e->type);
    uint64_t tile = tile_bytes(e->type, cols), bytes = (rows + 15) / 16 * tile;
    if (e->bytes != bytes)
        return corrupt(err, "%s has %llu bytes, not %llu", r->name, (unsigned long long)e->bytes,
                       (unsigned long long)bytes);
    struct tensor *x = tensor_of(m, r, e->layer);
    if (x->data)
        return corrupt(err, "%s occurs twice", r->name);
    *x = (struct tensor){m->file.data + e->offset, e->type, (uint32_t)rows, (uint32_t)cols,
                         (size_t)tile};
    return 1;
}

static int place_bytes(gemma2_model *m, const struct role *r, const struct entry *e,
                       struct errbuf *err)
{
    struct bytes *to = (struct bytes *)((char *)m + r->member);
    if (to->p || e->layer || e->type != TYPE_BYTES || e->rows || e->cols)
        return corrupt(err, "bad or second %s section", r->name);
    to->p = m->file.data + e->offset;
    to->n = (size_t)e->bytes;
    if (r->id == ROLE_KEPT && e->bytes % 4 == 0 && e->bytes / 4 <= dimension(&m->config, 'V'))
        m->config.n_kept = (int32_t)(e->bytes / 4);
    return 1;
}

static int read_directory(struct gemma2_model *m, struct errbuf *err)
{
    uint64_t align = get_u32(m->file.data + 56), size = m->file.size;
    uint64_t end = HEADER_BYTES + (uint64_t)m->n_sections * ENTRY_BYTES;
    if (align < 64 || align > 1 << 21 || align & (align - 1))
        return corrupt(err, "its alignment is %llu", (unsigned long long)align);
    for (uint32_t i = 0; i < m->n_sections; i++) {
        struct entry e = get_entry(m->directory, i);
        const struct role *r = find_role(e.role);
        uint64_t start = (end + align - 1) & ~(align - 1);
        if (e.offset != start || start > size || e.bytes > size - start)
            return corrupt(err, "section %u is out of its place", i);
        end = start + e.bytes;
        if (e.flags > 1 || !is_zero(e.reserved, 16) || (!r && !e.flags))
            return fail(err, "the model file has a section of unknown kind %u; use a newer "
                             "gemma2.c", e.role);
        if (r && !(r->rows == '-' ? place_bytes : place_tensor)(m, r, &e, err))
            return 0;
    }
    return end == size ? 1 : corrupt(err, "its last section ends early");
}

/* The ids that the head has rows for, where it has not all. */
static int check_kept(struct gemma2_model *m, struct errbuf *err)
{
    uint64_t n = (uint64_t)m->config.n_kept, next = 0;
    if (m->head.rows != n)
        return corrupt(err, "its list of kept ids stands behind its head");
    if (!m->kept_bytes.p)
        return 1;
    if (!n || m->kept_bytes.n != 4 * n || !m->config.n_layers)
        return corrupt(err, "%zu bytes of kept ids do not fit its vocabulary", m->kept_bytes.n);
    m->kept = (const uint32_t *)(const void *)m->kept_bytes.p;
    for (uint64_t i = 0; i < n; next = m->kept[i++] + (uint64_t)1)
        if (m->kept[i] < next || m->kept[i] >= (uint32_t)m->config.n_vocab)
            return corrupt(err, "kept id %u is out of order or not in the vocabulary", m->kept[i]);
    return 1;
}

/* Every role a model needs is there; the head may be the embedding. */
static int check_complete(struct gemma2_model *m, struct errbuf *err)
{
    if (!m->tokenizer_bytes.p)
        return fail(err, "the model file has no tokenizer; convert the checkpoint again");
    for (int i = 0; i < N_ROLES && m->config.n_layers; i++) {
        const struct role *r = &roles[i];
        int layers = r->id >= ROLE_LAYER_FIRST ? m->config.n_layers : 1;
        int may_lack = r->rows == '-' || r->id == ROLE_HEAD || r->id == ROLE_SCORE;
        for (int l = 0; !may_lack && l < layers; l++)
            if (!tensor_of(m, r, (uint32_t)l)->data)
                return fail(err, "the model file lacks %s (layer %d); convert the checkpoint again",
                            r->name, l);
    }
    if (!m->head.data)
        m->head = m->embedding, m->head.rows = (uint32_t)m->config.n_kept;
    return check_kept(m, err);
}

/* The fact at byte *at of the section, and *at behind it; 0 where there is none. */
static int next_fact(struct bytes facts, size_t *at, struct text *key, struct text *value)
{
    if (facts.n - *at < 8)
        return 0;
    key->n = get_u32(facts.p + *at), value->n = get_u32(facts.p + *at + 4);
    key->p = facts.p + *at + 8, value->p = key->p + key->n;
    uint64_t bytes = 8 + (uint64_t)key->n + value->n;
    if (bytes > facts.n - *at)
        return 0;
    *at += (size_t)bytes;
    return 1;
}

/* The facts are read when they are asked for; here only their lengths are checked. */
static int check_facts(const struct gemma2_model *m, struct errbuf *err)
{
    size_t at = 4;
    struct text key, value;
    uint32_t n = m->facts.n >= 4 ? get_u32(m->facts.p) : 0;
    while (n && next_fact(m->facts, &at, &key, &value))
        n--;
    return !m->facts.p || (n == 0 && at == m->facts.n)
               ? 1 : corrupt(err, "its facts are inconsistent");
}

/* The value of a fact; p NULL where it is absent. */
static struct text find_fact(const gemma2_model *m, const char *name)
{
    struct text key = {NULL, 0}, value, wanted = as_text(name), none = {NULL, 0};
    size_t at = 4;
    while (m->facts.p && next_fact(m->facts, &at, &key, &value))
        if (same_text(key, wanted))
            return value;
    return none;
}

static int is_utf8(struct text s)
{
    while (s.n) {
        uint32_t length = utf8_length(s.p, s.n);
        if (!length)
            return 0;
        s.p += length, s.n -= length;
    }
    return 1;
}

/* Checks a piece's kind, length and score; counts whole pieces and notes bytes. */
static int check_piece(struct tokenizer *t, uint32_t id, uint32_t start, uint32_t blob_bytes,
                       gemma2_config *c, struct errbuf *err)
{
    uint32_t end = get_u32(t->ends + 4 * (size_t)id);
    int kind = t->kinds[id];
    if (end < start || end > blob_bytes || end - start > MAX_PIECE_BYTES ||
        (end == start && kind != GEMMA2_PIECE_UNUSED))
        return corrupt(err, "tokenizer piece %u has a bad length", id);
    if (kind < GEMMA2_PIECE_NORMAL || kind > GEMMA2_PIECE_MARKER ||
        !isfinite(get_f32(t->scores + 4 * (size_t)id)))
        return corrupt(err, "tokenizer piece %u has a bad kind or score", id);
    if (!is_utf8(piece_text(t, id)))
        return corrupt(err, "tokenizer piece %u is not UTF-8", id);
    c->max_piece_bytes = max_i32(c->max_piece_bytes, (int32_t)(end - start));
    t->n_whole += (uint32_t)is_whole(kind);
    if (kind != GEMMA2_PIECE_BYTE)
        return 1;
    int byte = byte_piece(piece_text(t, id));
    if (byte < 0)
        return corrupt(err, "tokenizer piece %u is no byte", id);
    if (t->byte_id[byte] < 0)
        t->byte_id[byte] = (int32_t)id;
    return 1;
}

static int check_pieces(struct tokenizer *t, uint32_t blob_bytes, gemma2_config *c,
                        struct errbuf *err)
{
    int n_bytes = 0;
    uint32_t start = 0;
    for (int i = 0; i < 256; i++)
        t->byte_id[i] = -1;
    for (uint32_t id = 0; id < t->n; id++) {
        if (!check_piece(t, id, start, blob_bytes, c, err))
            return 0;
        start = get_u32(t->ends + 4 * (size_t)id);
    }
    for (int i = 0; i < 256; i++)
        n_bytes += t->byte_id[i] >= 0;
    if (n_bytes < 256 && c->unk < 0)
        return corrupt(err, "its tokenizer has neither unk nor all bytes");
    return start == blob_bytes ? 1 : corrupt(err, "its tokenizer's bytes do not add up");
}

/* Reads and checks the tokenizer section (but for its indexes, build_tokenizer). */
static int read_tokenizer(struct tokenizer *t, struct bytes from, gemma2_config *c,
                          struct errbuf *err)
{
    const uint8_t *p = from.p;
    size_t size = from.n;
    int32_t *const special[6] = {&c->bos, &c->eos, &c->pad, &c->unk, &c->start_of_turn,
                                 &c->end_of_turn};
    uint64_t n = size >= 64 ? get_u32(p) : 0, blob = size >= 64 ? get_u32(p + 28) : 0;
    if (size < 64 || n != (uint64_t)c->n_vocab || size != 64 + 9 * n + blob || !is_zero(p + 32, 32))
        return corrupt(err, "its tokenizer does not fit its vocabulary");
    for (int i = 0; i < 6; i++) {
        uint32_t id = get_u32(p + 4 + 4 * i);
        if (id != 0xffffffff && id >= n)
            return corrupt(err, "special id %u is not in the vocabulary", id);
        *special[i] = id == 0xffffffff ? -1 : (int32_t)id;
    }
    t->n = (uint32_t)n;
    t->unk = c->unk;
    t->scores = p + 64;
    t->ends = t->scores + 4 * n;
    t->kinds = t->ends + 4 * n;
    t->blob = t->kinds + n;
    return check_pieces(t, (uint32_t)blob, c, err);
}

/* Why the parts make no template, or NULL. */
static const char *chat_fault(const gemma2_model *m)
{
    const struct text *part = m->chat;
    uint32_t lines = 0;
    for (int i = 0; i < N_CHAT_PARTS; i++) {
        if (part[i].n > MAX_CHAT_PART)
            return "a part of it is too long";
        for (uint32_t k = 0; i >= CHAT_SYSTEM_BEFORE && k < part[i].n; k++)
            lines += k == 0 || part[i].p[k - 1] == '\n';
        if (i >= CHAT_USER_BEFORE && !part[i].p)
            return "a part of it is missing";
        int is_flag = part[i].n == 1 && (*part[i].p == '0' || *part[i].p == '1');
        if (i == CHAT_BOS && part[i].p && !is_flag)
            return "chat.bos is neither 0 nor 1";
        if (i == CHAT_TRIM && part[i].p && !is_flag && !is_trimmed(m, GEMMA2_ROLE_SYSTEM) &&
            !is_trimmed(m, GEMMA2_ROLE_USER) && !is_trimmed(m, GEMMA2_ROLE_MODEL))
            return "chat.trim is neither 0 nor 1, nor names of roles";
    }
    if (lines > MAX_CHAT_LINES)
        return "it has too many lines";
    if (!part[CHAT_SYSTEM_BEFORE].p != !part[CHAT_SYSTEM_AFTER].p ||
        (part[CHAT_SYSTEM_BEFORE].p && part[CHAT_SYSTEM_JOIN].p))
        return "it contradicts itself about system text";
    return NULL;
}

/* A turn's piece and what follows it. */
static struct text own_turn(gemma2_model *m, int i, int32_t id, const char *rest)
{
    struct text piece = piece_text(&m->tokenizer, (uint32_t)id);
    struct text turn = {m->own_turns[i], piece.n + (uint32_t)strlen(rest)};
    memcpy(m->own_turns[i], piece.p, piece.n);
    memcpy(m->own_turns[i] + piece.n, rest, strlen(rest));
    return turn;
}

static int has_turn_pieces(const gemma2_model *m)
{
    int32_t start = m->config.start_of_turn, end = m->config.end_of_turn;
    return start >= 0 && piece_text(&m->tokenizer, (uint32_t)start).n <= MAX_TURN_PIECE &&
           end >= 0 && piece_text(&m->tokenizer, (uint32_t)end).n <= MAX_TURN_PIECE;
}

/* Gemma 2's turns. */
static void set_own_turns(gemma2_model *m)
{
    const gemma2_config *c = &m->config;
    m->chat[CHAT_BOS] = m->chat[CHAT_TRIM] = as_text("1");
    m->chat[CHAT_START] = as_text("");
    m->chat[CHAT_USER_BEFORE] = own_turn(m, 0, c->start_of_turn, "user\n");
    m->chat[CHAT_MODEL_BEFORE] = own_turn(m, 1, c->start_of_turn, "model\n");
    m->chat[CHAT_USER_AFTER] = own_turn(m, 2, c->end_of_turn, "\n");
    m->chat[CHAT_MODEL_AFTER] = m->chat[CHAT_USER_AFTER];
    m->chat[CHAT_GENERATE] = m->chat[CHAT_MODEL_BEFORE];
}

/* The template's parts.  What makes no template is refused when it is used, not here. */
static void read_chat(gemma2_model *m)
{
    int found = 0;
    for (int i = 0; i < N_CHAT_PARTS; i++) {
        m->chat[i] = find_fact(m, chat_keys[i]);
        found |= m->chat[i].p != NULL;
    }
    if (!found && has_turn_pieces(m))
        set_own_turns(m);
    else if (!found)
        m->chat[CHAT_REFUSED] = as_text("the checkpoint brought none, and its vocabulary has no "
                                        "turn markers");
    /* Gemma 2's template refuses system text; it is the custom to fold it into the first turn */
    if (has_turn_pieces(m) && !m->chat[CHAT_SYSTEM_BEFORE].p && !m->chat[CHAT_SYSTEM_JOIN].p &&
        same_text(m->chat[CHAT_USER_BEFORE], own_turn(m, 0, m->config.start_of_turn, "user\n")))
        m->chat[CHAT_SYSTEM_JOIN] = as_text("\n\n");
    const char *fault = m->chat[CHAT_REFUSED].p ? NULL : chat_fault(m);
    if (fault)
        m->chat[CHAT_REFUSED] = as_text(fault);
    if (m->chat[CHAT_REFUSED].n > 1000) /* a sentence */
        m->chat[CHAT_REFUSED].n = 1000;
}

/* A compiler that is told to reorder, fuse or approximate floats seldom shows it in a macro.
 * So numbers with known results go through kernels here: a score that is 0 where a product
 * does not round once with the sum, and soft_cap, exp_sum and cos_sin, bit for bit. */
static int computes_exactly(const struct kernels *k)
{
    enum { N = 1021 }; /* a fused product changes one number in a hundred */
    float x[N], y[N], keys[32], score[TILE];
    float q[2] = {-(1 + 0x1p-7f + 0x1p-17f), 1 + 0x1p-17f};
    struct lines lines = {.data = (const uint8_t *)keys, .type = LINES_F32, .n_lines = 2,
                          .n_strips = 1, .line_bytes = 64, .every = 1};
    uint32_t digest = 0;
    for (int i = 0; i < N; i++) {
        x[i] = (float)(i * i % 1009 - 500) / 127.0f;
        y[i] = (float)(i * 7 % 1013 - 506) / 331.0f;
    }
    for (int i = 0; i < 32; i++)
        keys[i] = i < 16 ? 1 : 1 + 0x1p-7f;
    k->add_lines(&lines, q, 2, 1, score, TILE);
    k->soft_cap(x, N - 3, 3);
    x[N - 3] = k->exp_sum(y, N, 2);
    cos_sin(123.4f, &x[N - 2], &x[N - 1]);
    for (int i = 0; i < N; i++)
        digest = (digest * 31 + bits_of(x[i])) * 31 + bits_of(y[i]);
    return score[0] == 0x1p-24f && digest == 0x47f91670;
}

/* Reads the header into a model on the stack, to know how much to allocate. */
static int measure_model(struct gemma2_model *m, const struct file *f, struct errbuf *err)
{
    const uint32_t one = 1;
    if (*(const uint8_t *)&one != 1)
        return fail(err, "gemma2.c needs a little-endian CPU");
    if (!read_header(m, f, err))
        return 0;
    for (int i = 0; i < N_HEADER_FIELDS; i++)
        if (!read_field(f->data, &header_fields[i], &m->config, err))
            return 0;
    if (!read_lists(f->data, &m->config, err))
        return 0;
    m->isa = select_kernels(err);
    m->sha256 = m->isa == &scalar_kernels ? NULL : fast_sha256();
    if (m->isa && !computes_exactly(m->isa))
        return fail(err, "gemma2.c was compiled with a flag that changes results, such as "
                         "-fassociative-math or -ffp-contract=fast: build it without");
    return m->isa != NULL;
}

/* Reads what needs the array of layers. */
static int read_model(struct gemma2_model *m, struct errbuf *err)
{
    gemma2_config *c = &m->config;
    const char *name = getenv("GEMMA2_ISA");
    m->is_reference = name && !strcmp(name, "reference");
    c->isa = m->is_reference ? "reference" : m->isa->name;
    c->n_kept = c->n_vocab;
    if (!read_directory(m, err) || !check_complete(m, err) || !check_facts(m, err))
        return 0;
    return read_tokenizer(&m->tokenizer, m->tokenizer_bytes, c, err);
}

/* The caller may decline it, because it may cost the process a permission. */
static void choose_matrix(gemma2_model *m, const gemma2_open_params *p)
{
    if (m->isa->matrix && !all_weights_f32(m) && !p->exact_prefill)
        m->matrix = permitted_matrix(m->isa->matrix);
}

/* One allocation: the struct, its layers, the tokenizer's indexes.  The indexes' size
 * is known from V alone: at most every piece is one that is found whole. */
static gemma2_model *allocate_model(struct file *f, struct errbuf *err)
{
    gemma2_model small = {0};
    if (!measure_model(&small, f, err))
        return NULL;
    size_t layers = sizeof(struct layer) * (size_t)small.config.n_layers;
    size_t buckets = bucket_count((uint32_t)small.config.n_vocab);
    size_t whole = (size_t)small.config.n_vocab;
    gemma2_model *m = malloc(sizeof *m + layers + (buckets + 2 * whole) * sizeof(uint32_t));
    if (!m) {
        err->code = GEMMA2_ERR_MEMORY;
        fail(err, "out of memory opening the model");
        return NULL;
    }
    memcpy(m, &small, sizeof *m);
    memset(m->layers, 0, layers);
    m->vocabulary = &m->vocabulary_made;
    m->file = *f;
    m->tokenizer.buckets = (uint32_t *)((char *)m + sizeof *m + layers);
    m->tokenizer.whole = m->tokenizer.buckets + buckets;
    m->tokenizer.whole_prefix = m->tokenizer.whole + whole;
    return m;
}

static gemma2_model *make_model(struct file *f, const gemma2_open_params *p, struct errbuf *err)
{
    float_env env = float_env_enter();
    gemma2_model *m = allocate_model(f, err);
    if (m && !(read_model(m, err) && build_tokenizer(&m->tokenizer, err))) {
        free(m);
        m = NULL;
    }
    float_env_leave(env);
    if (m) {
        read_chat(m);
        choose_matrix(m, p);
    }
    return m;
}

/* Whether every value of a tensor is finite.  Quantised types can only go wrong in S, the
 * first 64 bytes of a tile. */
static int values_are_finite(const struct gemma2_model *m, const struct entry *e)
{
    const uint8_t *p = m->file.data + e->offset;
    uint64_t tile = tile_bytes(e->type, e->cols), uses = is_quantised(e->type) ? 64 : tile;
    uint32_t bad = 0, low = e->type == TYPE_BF16 ? 0x7f80 : 0; /* exponent of the lower number */
    for (uint64_t at = 0; at < e->bytes; at += tile)
        for (uint64_t i = 0; i < uses; i += 4) {
            uint32_t x = get_u32(p + at + i);
            bad |= (x & 0x7f800000) == 0x7f800000 || (low && (x & low) == low);
        }
    return !bad;
}

/* ---- sessions that move: to another one, to bytes and back ----
 * A saved session says what was computed, not how it lay in memory.  Little-endian:
 *      0   u8[8] magic 89 47 45 4D 53 45 53 0A "\x89GEMSES\n"
 *      8   u32   version, 1              32  u32   n, tokens held
 *     12   u32   header bytes, 128       36  u32   first position of local layers, f
 *     16   u64   bytes in all            40  u32   cache type, GEMMA2_CACHE_*
 *     24   u64   zero                    44  u32   window
 *     48   u8[16] zero
 *     64   u8[32] identity of the model
 *     96   u8[32] SHA-256 of the bytes before this and of those after it
 *    128   u32[n] ids; then for each layer keys [K][n - first][H] and values, the same, in
 *          f32, f16 or i8, first being f in local layers, 0 in global ones; behind every
 *          i8[H] follow its scales, f16[H / 32, rounded up] */
enum { SAVED_BYTES = 128, SAVED_DIGEST_AT = 96 };
static const uint8_t saved_magic[8] = {0x89, 'G', 'E', 'M', 'S', 'E', 'S', '\n'};

/* One key or value in the cache. */
struct place {
    int layer, values, head;
    int32_t position;
};
static const struct place before_first = {0, 0, -1, INT32_MAX - 1};

/* Steps through the places of a saved session in its order; returns 0 at their end. */
static int next_place(const gemma2_session *s, struct place *at)
{
    const gemma2_config *c = &s->model->config;
    at->position++;
    while (at->position >= s->position) {
        if (++at->head == c->n_kv_heads)
            at->head = 0, at->values++;
        if (at->values == 2)
            at->values = 0, at->layer++;
        if (at->layer == c->n_layers)
            return 0;
        at->position = c->is_local[at->layer] ? s->oldest : 0;
    }
    return 1;
}

static struct slot slot_at(const gemma2_session *s, const struct place *at)
{
    return slot_of(s, at->layer, at->values, at->head, at->position);
}

/* Bytes of a saved session of n tokens.  The sum stops above 2^62, before what a file claims can
 * make it wrap. */
static uint64_t saved_bytes(const gemma2_session *s, int32_t n, int32_t first)
{
    const gemma2_config *c = &s->model->config;
    uint64_t bytes = SAVED_BYTES + 4 * (uint64_t)n, a_slot = 2 * position_bytes(s, c->head_dim);
    for (int l = 0; l < c->n_layers && bytes <= (uint64_t)1 << 62; l++)
        bytes += (uint64_t)(n - (c->is_local[l] ? first : 0)) * (uint64_t)c->n_kv_heads * a_slot;
    return bytes;
}

static void saved_digest(const gemma2_model *m, const uint8_t *p, size_t size, uint8_t digest[32])
{
    digest_of(m, p, SAVED_DIGEST_AT, p + SAVED_BYTES, size - SAVED_BYTES, digest);
}

static void save_session(const gemma2_session *s, uint8_t *p, size_t size)
{
    uint8_t *to = p + SAVED_BYTES;
    memset(p, 0, SAVED_BYTES);
    memcpy(p, saved_magic, sizeof saved_magic);
    set_u32(p + 8, 1), set_u32(p + 12, SAVED_BYTES);
    set_u64(p + 16, size);
    set_u32(p + 32, (uint32_t)s->position), set_u32(p + 36, (uint32_t)s->oldest);
    set_u32(p + 40, (uint32_t)s->cache_type);
    set_u32(p + 44, (uint32_t)s->window);
    memcpy(p + 64, s->model->config.identity, 32);
    for (int32_t i = 0; i < s->position; i++, to += 4)
        set_u32(to, (uint32_t)s->ids[i]);
    for (struct place at = before_first; next_place(s, &at);
         to += position_bytes(s, s->model->config.head_dim))
        move_slot(s, slot_at(s, &at), packed_slot(s, to));
    saved_digest(s->model, p, size, p + SAVED_DIGEST_AT);
}

/* Whether the bytes are a saved session, of this model and these parameters, that fits. */
static int check_saved(const gemma2_session *s, const uint8_t *p, size_t size)
{
    uint8_t digest[32];
    if (size < sizeof saved_magic || memcmp(p, saved_magic, sizeof saved_magic))
        return GEMMA2_ERR_FOREIGN;
    if (size < SAVED_BYTES)
        return GEMMA2_ERR_CORRUPT;
    if (get_u32(p + 8) != 1)
        return GEMMA2_ERR_MISMATCH;
    saved_digest(s->model, p, size, digest);
    if (get_u32(p + 12) != SAVED_BYTES || get_u64(p + 16) != size || !is_zero(p + 24, 8) ||
        !is_zero(p + 48, 16) || memcmp(digest, p + SAVED_DIGEST_AT, 32))
        return GEMMA2_ERR_CORRUPT;
    if (memcmp(p + 64, s->model->config.identity, 32) || get_u32(p + 44) != (uint32_t)s->window ||
        get_u32(p + 40) != (uint32_t)s->cache_type)
        return GEMMA2_ERR_MISMATCH;
    uint32_t n = get_u32(p + 32), first = get_u32(p + 36);
    if (n > (uint32_t)s->n_context)
        return GEMMA2_ERR_CONTEXT;
    /* the next token sees from n - window + 1 on */
    if (first > (uint32_t)max_i32(0, (int32_t)n - s->window + 1) ||
        size != saved_bytes(s, (int32_t)n, (int32_t)first))
        return GEMMA2_ERR_CORRUPT;
    for (uint32_t i = 0; i < n; i++)
        if (get_u32(p + SAVED_BYTES + 4 * (size_t)i) >= (uint32_t)s->model->config.n_vocab)
            return GEMMA2_ERR_CORRUPT;
    return GEMMA2_OK;
}

/* Prefill's kernels take values 16 positions at a time; those in front of the window have weight
 * zero.  After a copy or restore some of them were never written here, and zero times what the
 * memory holds may be NaN. */
static void clear_before_oldest(const gemma2_session *s)
{
    const gemma2_config *c = &s->model->config;
    struct place at = {0, 1, 0, 0};
    size_t bytes = position_bytes(s, s->width);
    for (; at.layer < c->n_layers; at.layer++)
        for (at.head = 0; c->is_local[at.layer] && at.head < c->n_kv_heads; at.head++)
            for (at.position = s->oldest / TILE * TILE; at.position < s->oldest; at.position++)
                memset(slot_at(s, &at).numbers, 0, bytes);
}

/* Positions ascend, so a ring too small for all of them ends up with the last ones. */
static void restore_session(gemma2_session *s, const uint8_t *p)
{
    const uint8_t *from = p + SAVED_BYTES;
    s->position = (int32_t)get_u32(p + 32);
    s->oldest = (int32_t)get_u32(p + 36);
    s->ahead = NULL;
    for (int32_t i = 0; i < s->position; i++, from += 4)
        s->ids[i] = (int32_t)get_u32(from);
    clear_before_oldest(s);
    for (struct place at = before_first; next_place(s, &at);
         from += position_bytes(s, s->model->config.head_dim))
        move_slot(s, packed_slot(s, from), slot_at(s, &at));
    s->oldest = max_i32(s->oldest, s->position - s->ring);
}

static void copy_session(gemma2_session *to, const gemma2_session *from)
{
    to->position = from->position;
    to->oldest = from->oldest;
    to->ahead = NULL;
    clear_before_oldest(to);
    memcpy(to->ids, from->ids, (size_t)from->position * sizeof *to->ids);
    for (struct place at = before_first; next_place(from, &at);)
        move_slot(to, slot_at(from, &at), slot_at(to, &at));
    to->oldest = max_i32(to->oldest, to->position - to->ring);
}

/* ---- the system's limit on processors ---- */

/* Reads up to two numbers from a file of a control group; those that it lacks stay. */
static void read_limit(const char *folder, const char *name, double *first, double *second)
{
    char path[8192 + 32];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "r");
    if (f && fscanf(f, "%lf %lf", first, second) < 1)
        *first = 0;
    if (f)
        fclose(f);
}

/* Processors' time that the control group at folder allows; 0: no limit of its own. */
static double group_quota(const char *folder, int v2)
{
    double quota = 0, period = 0, none = 0;
    read_limit(folder, v2 ? "cpu.max" : "cpu.cfs_quota_us", &quota, &period);
    if (!v2)
        read_limit(folder, "cpu.cfs_period_us", &period, &none);
    return quota > 0 && period > 0 ? quota / period : 0;
}

/* Processors' time that this process's control group and those above it allow (docker --cpus);
 * 0: no limit.  root stands before all paths, for tests. */
static double processor_quota(const char *root)
{
    char line[4096], folder[8192];
    double least = 0, quota;
    snprintf(folder, sizeof folder, "%s/proc/self/cgroup", root);
    FILE *f = fopen(folder, "r");
    while (f && fgets(line, sizeof line, f)) { /* 0::/path or 4:cpu,cpuacct:/path */
        char *names = strchr(line, ':'), *path = names ? strchr(names + 1, ':') : NULL;
        int v2 = !strncmp(line, "0::", 3);
        line[strcspn(line, "\n")] = 0;
        if (path)
            *path++ = *names = ','; /* so that each name stands between commas */
        if (!path || (!v2 && !strstr(names, ",cpu,")))
            continue;
        for (char *end = path + strlen(path); end; end = strrchr(path, '/')) {
            *end = 0; /* up to the root, where a container finds its own group */
            snprintf(folder, sizeof folder, "%s/sys/fs/cgroup%s%s", root, v2 ? "" : "/cpu", path);
            quota = group_quota(folder, v2);
            least = quota > 0 && (least <= 0 || quota < least) ? quota : least;
        }
    }
    if (f)
        fclose(f);
    return least;
}

/* ---- importance: sums of products of neighbouring inputs, for gemma2_importance ---- */

struct importance_job {
    const float *x; /* [T][cols] */
    size_t n, cols, block;
    double *sums;   /* [block][cols] */
};

/* sums[r][c] += x[t][c] * x[t][c - c % block + r] for all t, one c after another up to last
 * (they are in one block, unless block is 1). */
static void add_products(const struct importance_job *job, size_t r, size_t c, size_t last)
{
    double sum[TILE];
    size_t n = last - c, other = c - c % job->block + r, step = job->block == 1;
    memcpy(sum, job->sums + r * job->cols + c, n * sizeof *sum);
    for (size_t t = 0; t < job->n; t++) {
        const float *x = job->x + t * job->cols;
        for (size_t i = 0; i < n; i++)
            sum[i] += (double)x[c + i] * (double)x[other + i * step];
    }
    memcpy(job->sums + r * job->cols + c, sum, n * sizeof *sum);
}

static size_t columns_a_task(const struct importance_job *job)
{
    return job->block > 1 ? job->block : BLOCK_INPUTS;
}

/* A block, or 256 columns of means alone: what stands at or above the diagonal, in pieces of
 * 16, and its mirror image. */
static void importance_task(void *context, size_t task)
{
    const struct importance_job *job = context;
    size_t first = task * columns_a_task(job), last = first + columns_a_task(job);
    last = last < job->cols ? last : job->cols;
    for (size_t c = first; c < last; c += TILE)
        for (size_t r = 0; r < job->block && r < c % job->block + TILE; r++)
            if (c - c % job->block + r < job->cols)
                add_products(job, r, c, c + TILE < last ? c + TILE : last);
    for (size_t c = first; c < last; c++)
        for (size_t r = c % job->block + 1; r < job->block; r++) {
            size_t other = c - c % job->block + r;
            if (other < job->cols)
                job->sums[r * job->cols + c] = job->sums[c % job->block * job->cols + other];
        }
}

/* Where the input's columns begin among the columns of all inputs. */
static uint64_t input_first(const gemma2_config *c, int layer, int input)
{
    uint64_t first = 0;
    for (int i = 0; i < INPUTS_A_LAYER; i++)
        first += dimension(c, layer_inputs[i].cols) * ((uint64_t)layer + (i < input));
    return first;
}

/* Adds the pass's rows of x, the input of a product, to the sums; if these are wanted. */
static void add_importance(const struct pass *p, int layer, int input, const float *x, size_t cols)
{
    if (!p->importance)
        return;
    uint64_t first = input_first(&p->model->config, layer, input);
    struct importance_job job = {x, p->n, cols, p->importance_block,
                                 p->importance + p->importance_block * first};
    share(p->me, (cols - 1) / columns_a_task(&job) + 1, importance_task, &job);
}

/* ===================================================================================
 * A. Appendix: the same kernels, faster
 *
 * Element-wise kernels are the functions of section 3 compiled again for wider registers; sums of
 * lines and products of quantised weights are written with intrinsics, in the same order of the
 * same roundings.  (gcc 12 keeps vectors of 64 bytes in memory where registers are shorter, and
 * no compiler finds the dot products of bytes.)  A new instruction set is a set of functions and
 * a line in all_kernels.  The tests find it there and hold it against the scalar one.
 * =================================================================================== */

/* Which CPU gets which kernels: the first that are available.  An instruction set takes from a
 * lower one of its family what it has nothing faster for. */
#ifdef HAVE_AMX
static const struct kernels amx_kernels;
#endif
#ifdef HAVE_AVX512BF16
static const struct kernels avx512bf16_kernels;
#endif
#ifdef HAVE_X86
static const struct kernels avx512_kernels, avxvnni_kernels, avx2_kernels;
#endif
#ifdef HAVE_NEON
static const struct kernels i8mm_kernels, dotprod_kernels, neon_kernels;
#endif
static const struct kernels *const all_kernels[] = {
#ifdef HAVE_AMX
    &amx_kernels, /* Xeons since Sapphire Rapids: prompts in tiles of 16 x 32 bf16, as avx512
                   * for the rest, because its bf16 dot products are slower than its floats */
#endif
#ifdef HAVE_AVX512BF16
    &avx512bf16_kernels, /* Zen 4 and newer: as avx512, but bf16 prompts and their attention in
                          * dot products of bf16 pairs, at twice the rate of floats */
#endif
#ifdef HAVE_X86
    &avx512_kernels,  /* servers since Ice Lake: VPDPBUSD, 64 byte products at a time */
    &avxvnni_kernels, /* client CPUs since Alder Lake, which lack AVX-512: 32 at a time */
    &avx2_kernels,    /* Haswell to Comet Lake, Zen 1 to Zen 3: byte products through 16 bits */
#endif
#ifdef HAVE_NEON
    &i8mm_kernels,    /* Neoverse V1 and N2, Graviton 3, Apple M2 and newer: SMMLA for prompts */
    &dotprod_kernels, /* Cortex-A55, A75, A76, Neoverse N1 (Raspberry Pi 5, Graviton 2), M1: SDOT */
    &neon_kernels,    /* Cortex-A53 and A72 (Raspberry Pi 3 and 4): byte products in 16 bits */
#endif
    &scalar_kernels, /* all others: section 3, as the compiler makes of it */
};

enum { N_KERNELS = sizeof all_kernels / sizeof *all_kernels };

/* ---- what all instruction sets share: from a call's type and sizes to kernels that know them ----
 * The kernels below are written for types and numbers of rows that are constants, so that sums
 * stay in registers.  These functions are inlined into each instruction set's own, and so are the
 * kernels that they are handed. */

/* The largest of 8, 4, 2 and 1 within both. */
INLINE int at_once(int left, int most)
{
    while (most > left)
        most /= 2;
    return most;
}

/* Whether line k begins with scales of its own. */
INLINE int has_new_scales(enum line_type type, int k)
{
    return type == LINES_VALUES_Q8 || (type == LINES_KEYS_Q8 && k % GROUP == 0);
}

typedef void lines_fn(enum line_type type, const int n, const int strips, const struct lines *l,
                      const float *x, size_t ldx, float *y, size_t ldy);

/* n rows, at most `most` sums of lines at once. */
INLINE void lines_by_strips(lines_fn *kernel, const int most, enum line_type type, const int n,
                            const struct lines *l, const float *x, size_t ldx, float *y,
                            size_t ldy)
{
    struct lines rest = *l;
    for (int strips; rest.n_strips; rest.n_strips -= strips) {
        strips = at_once(rest.n_strips, at_once(8, most / n));
        if (8 * n <= most && strips == 8)
            kernel(type, n, 8, &rest, x, ldx, y, ldy);
        else if (4 * n <= most && strips == 4)
            kernel(type, n, 4, &rest, x, ldx, y, ldy);
        else if (2 * n <= most && strips == 2)
            kernel(type, n, 2, &rest, x, ldx, y, ldy);
        else
            kernel(type, n, 1, &rest, x, ldx, y, ldy);
        rest.data += strips * l->strip_bytes, rest.strip += strips;
        y += strips * TILE;
    }
}

INLINE void lines_by_rows(lines_fn *kernel, const int most, enum line_type type,
                          const struct lines *l, const float *x, size_t ldx, int n, float *y,
                          size_t ldy)
{
    for (int rows; n; n -= rows, x += (size_t)rows * ldx, y += (size_t)rows * ldy) {
        rows = at_once(n, at_once(8, most));
        if (8 <= most && rows == 8)
            lines_by_strips(kernel, most, type, 8, l, x, ldx, y, ldy);
        else if (rows == 4)
            lines_by_strips(kernel, most, type, 4, l, x, ldx, y, ldy);
        else if (rows == 2)
            lines_by_strips(kernel, most, type, 2, l, x, ldx, y, ldy);
        else
            lines_by_strips(kernel, most, type, 1, l, x, ldx, y, ldy);
    }
}

INLINE void lines_by_type(lines_fn *kernel, const int most, const struct lines *l,
                          const float *x, size_t ldx, int n, float *y, size_t ldy)
{
    if (l->type == LINES_F32)
        lines_by_rows(kernel, most, LINES_F32, l, x, ldx, n, y, ldy);
    else if (l->type == LINES_F16)
        lines_by_rows(kernel, most, LINES_F16, l, x, ldx, n, y, ldy);
    else if (l->type == LINES_BF16)
        lines_by_rows(kernel, most, LINES_BF16, l, x, ldx, n, y, ldy);
    else if (l->type == LINES_KEYS_Q8)
        lines_by_rows(kernel, most, LINES_KEYS_Q8, l, x, ldx, n, y, ldy);
    else
        lines_by_rows(kernel, most, LINES_VALUES_Q8, l, x, ldx, n, y, ldy);
}

#ifdef HAVE_X86
/* Asks for a line ahead, in L1 where measured to gain: several rows of bf16, the 8-bit cache. */
INLINE void prefetch_line(enum line_type type, const int n, const struct lines *l, int k,
                          const uint8_t *line)
{
    if (k & (l->every - 1))
        return;
    if ((type == LINES_BF16 && n >= 4) || type == LINES_KEYS_Q8 || type == LINES_VALUES_Q8)
        __builtin_prefetch(line + l->prefetch, 0, 3);
    else
        __builtin_prefetch(line + l->prefetch, 0, 2);
}

/* A group's weights, asked for ahead of their use.  One row multiplies faster than memory brings
 * them: a line far ahead.  With more rows that is not so, and the hardware's own prefetch falls
 * behind: all lines into L1, and before that into L2: `early` suits q8 with AVX-512 (4 rows 0.8 of
 * the time, 8 rows 0.75), and neither q4 nor AVX2 (1.05). */
INLINE void prefetch_group(uint32_t type, const uint8_t *group, int one_row, int early)
{
    uint32_t n = types[type].group_bytes;
    if (one_row)
        __builtin_prefetch(group + PREFETCH_AHEAD, 0, 2);
    for (uint32_t line = 0; !one_row && line < n; line += 64) {
        if (early)
            __builtin_prefetch(group + line + PREFETCH_AHEAD, 0, 2);
        else if (line % 128 == 0)
            __builtin_prefetch(group + line + PREFETCH_SOON + 1024, 0, 2);
        __builtin_prefetch(group + line + PREFETCH_SOON, 0, 3);
    }
}

/* The same group of a panel's next block: all rows meet this block first. */
INLINE void prefetch_block(uint32_t type, const uint8_t *group)
{
    for (uint32_t line = 0, n = types[type].group_bytes; line < n; line += 64)
        __builtin_prefetch(group + line + 8 * (n + TILE), 0, 2);
}
#endif

/* A product of one quantised tile; `how` tells apart the instruction sets that share a
 * kernel. */
typedef void tile_fn(const int how, const uint32_t type, const int n, const struct tiles *w,
                     const struct input *in, size_t t, float *y);
enum { VNNI = 1, MANY = 2 }; /* bits of `how` on x86: n is not a constant */

/* With `most` above 4 any number from 3 to `most` goes through one kernel, which unpacks a group
 * once for all rows and keeps their sums in memory. */
INLINE void tile_by_rows(tile_fn *kernel, const int how, const int most, const uint32_t type,
                         const struct tiles *w, const struct input *in, size_t t, int n, float *y)
{
    for (int rows; n; n -= rows, t += (size_t)rows, y += rows * TILE) {
        rows = at_once(n, 4);
        if (most > 4 && n > 2)
            kernel(how | MANY, type, rows = min_i32(n, most), w, in, t, y);
        else if (most == 4 && rows == 4)
            kernel(how, type, 4, w, in, t, y);
        else if (rows == 2)
            kernel(how, type, 2, w, in, t, y);
        else
            kernel(how, type, 1, w, in, t, y);
    }
}

INLINE void tile_by_type(tile_fn *kernel, const int how, const int most, const struct tiles *w,
                         const struct input *in, size_t t, int n, float *y)
{
    if (w->type == TYPE_Q8)
        tile_by_rows(kernel, how, most, TYPE_Q8, w, in, t, n, y);
    else if (w->type == TYPE_Q6)
        tile_by_rows(kernel, how, most, TYPE_Q6, w, in, t, n, y);
    else if (w->type == TYPE_Q4)
        tile_by_rows(kernel, how, most, TYPE_Q4, w, in, t, n, y);
    else
        tile_by_rows(kernel, how, most, TYPE_Q3, w, in, t, n, y);
}

/* A panel: 256 inputs of both tiles are unpacked once for all tokens. */
struct panel_block;
typedef void unpack_panel_fn(const int how, const uint32_t type, const struct tiles *w,
                             size_t block, struct panel_block *b);
/* n tokens from t on against a block: y[token][tile][row] += scale * float(s * sum), rounded
 * once. */
typedef void panel_tokens_fn(const int how, const uint32_t type, const int n,
                             const struct panel_block *b, const struct input *in, size_t t,
                             size_t block, float (*y)[2][TILE]);

INLINE void panel_of_type(unpack_panel_fn *unpack, panel_tokens_fn *tokens, const int how,
                          const int most, const uint32_t type, struct panel_block *b,
                          const struct tiles *w, const struct input *in, size_t t, int n,
                          float (*y)[2][TILE])
{
    memset(y, 0, (size_t)n * sizeof *y);
    for (size_t block = 0; block < (w->cols + 255) / 256; block++) {
        unpack(how, type, w, block, b);
        for (int j = 0, rows; j < n; j += rows) {
            rows = n - j >= 6 && most == 6 ? 6 : at_once(n - j, 4);
            if (most == 6 && rows == 6)
                tokens(how, type, 6, b, in, t + (size_t)j, block, y + j);
            else if (rows == 4)
                tokens(how, type, 4, b, in, t + (size_t)j, block, y + j);
            else if (rows == 2)
                tokens(how, type, 2, b, in, t + (size_t)j, block, y + j);
            else
                tokens(how, type, 1, b, in, t + (size_t)j, block, y + j);
        }
    }
    for (int j = 0; j < n; j++)
        for (int i = 0; i < 2; i++)
            for (int r = 0; r < TILE; r++)
                y[j][i][r] *= ((const float *)w->data[i])[r];
}

INLINE void panel_by_type(unpack_panel_fn *unpack, panel_tokens_fn *tokens, const int how,
                          const int most, struct panel_block *b, const struct tiles *w,
                          const struct input *in, size_t t, int n, float *y)
{
    float (*to)[2][TILE] = (float (*)[2][TILE])y;
    if (w->type == TYPE_Q8)
        panel_of_type(unpack, tokens, how, most, TYPE_Q8, b, w, in, t, n, to);
    else if (w->type == TYPE_Q6)
        panel_of_type(unpack, tokens, how, most, TYPE_Q6, b, w, in, t, n, to);
    else if (w->type == TYPE_Q4)
        panel_of_type(unpack, tokens, how, most, TYPE_Q4, b, w, in, t, n, to);
    else
        panel_of_type(unpack, tokens, how, most, TYPE_Q3, b, w, in, t, n, to);
}

#ifdef HAVE_X86

/* Two tiles' 256 inputs, unpacked. */
struct panel_block {
    _Alignas(64) uint8_t operands[8][8][2][64]; /* [group][step][tile] */
    float scales[8][2][TILE];
};

/* Element-wise kernels, compiled for an instruction set. */
#define ELEMENT_WISE(isa, TARGET)                                                            \
    TARGET static void quantise_##isa(const float *x, uint32_t n, int8_t *q, float *scale,   \
                                      int32_t *sum)                                          \
    {                                                                                        \
        quantise(x, n, q, scale, sum);                                                       \
    }                                                                                        \
    TARGET static void rms_norm_##isa(const float *x, const float *w, float eps, uint32_t n, \
                                      float *y)                                              \
    {                                                                                        \
        rms_norm(x, w, eps, n, y);                                                           \
    }                                                                                        \
    TARGET static void geglu_##isa(float *gate, const float *up, size_t n)                   \
    {                                                                                        \
        geglu(gate, up, n);                                                                  \
    }                                                                                        \
    TARGET static void soft_cap_##isa(float *x, size_t n, float cap) { soft_cap(x, n, cap); } \
    TARGET static float exp_sum_##isa(float *x, size_t n, float max)                         \
    {                                                                                        \
        return exp_sum(x, n, max);                                                           \
    }                                                                                        \
    TARGET static void blend_##isa(float *x, float keep, const float *y, float scale, size_t n) \
    {                                                                                        \
        blend(x, keep, y, scale, n);                                                         \
    }                                                                                        \
    TARGET static void to_f16_##isa(const float *x, size_t n, uint16_t *y) { to_f16(x, n, y); }

/* What unsigned operands are off by: of q4, with 4 added in rows whose group bit is 1. */
INLINE int even_offset(uint32_t type)
{
    return type == TYPE_Q8 ? 128 : type == TYPE_Q6 ? 32 : 31;
}

/* ---- AVX2 and AVX-VNNI ---- */

#define AVX2 __attribute__((target("avx2,f16c,fma")))
ELEMENT_WISE(avx2, AVX2)

/* 8 numbers of a line as floats; of bf16 those of the odd line of two or the one before. */
AVX2 INLINE __m256 line_avx2(enum line_type type, int odd, const uint8_t *line, int half,
                             __m256 scale)
{
    if (type == LINES_KEYS_Q8 || type == LINES_VALUES_Q8) {
        __m128i eight = _mm_loadl_epi64((const __m128i *)(line + half * 8));
        return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)), scale);
    }
    if (type == LINES_F16)
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(line + half * 16)));
    if (type == LINES_F32)
        return _mm256_loadu_ps((const float *)line + half * 8);
    __m256i pair = _mm256_loadu_si256((const __m256i *)(line + half * 32));
    return _mm256_castsi256_ps(odd ? _mm256_and_si256(pair, _mm256_set1_epi32((int)0xffff0000))
                                   : _mm256_slli_epi32(pair, 16));
}

/* Line k of the strips into acc[row][strip][half]. */
AVX2 INLINE void add_line_avx2(enum line_type type, int odd, const int n, const int strips,
                               const struct lines *l, int k, const float *x, size_t ldx,
                               __m256 scale[4][2], __m256 acc[4][4][2])
{
    const uint8_t *line = l->data + (size_t)k / (type == LINES_BF16 ? 2 : 1) * l->line_bytes;
    for (int i = 0; i < strips; i++, line += l->strip_bytes) {
        prefetch_line(type, n, l, k, line);
        for (int half = 0; half < 2; half++) {
            __m256 w = line_avx2(type, odd, line, half, scale[i][half]);
            for (int j = 0; j < n; j++)
                acc[j][i][half] = _mm256_fmadd_ps(w, _mm256_broadcast_ss(x + (size_t)j * ldx + k),
                                                  acc[j][i][half]);
        }
    }
}

AVX2 INLINE void cache_scales_avx2(enum line_type type, const struct lines *l, int i, int k,
                                   __m256 scale[2])
{
    const uint16_t *from = scales_of(type, l, l->data + i * l->strip_bytes, l->strip + i, k);
    for (int half = 0; half < 2; half++)
        scale[half] = _mm256_cvtph_ps(type == LINES_KEYS_Q8
                                          ? _mm_loadu_si128((const __m128i *)(from + half * 8))
                                          : _mm_set1_epi16((short)*from));
}

AVX2 INLINE void lines_avx2(enum line_type type, const int n, const int strips,
                            const struct lines *l, const float *x, size_t ldx, float *y,
                            size_t ldy)
{
    __m256 acc[4][4][2], scale[4][2] = {{_mm256_setzero_ps()}};
    for (int j = 0; j < n; j++)
        for (int i = 0; i < 2 * strips; i++)
            acc[j][i / 2][i % 2] = l->go_on ? _mm256_loadu_ps(y + (size_t)j * ldy + i * 8)
                                            : _mm256_setzero_ps();
    for (int k = 0; k < l->n_lines; k += 1 + (type == LINES_BF16)) {
        for (int i = 0; has_new_scales(type, k) && i < strips; i++)
            cache_scales_avx2(type, l, i, k, scale[i]);
        add_line_avx2(type, 0, n, strips, l, k, x, ldx, scale, acc);
        if (type == LINES_BF16 && k + 1 < l->n_lines)
            add_line_avx2(type, 1, n, strips, l, k + 1, x, ldx, scale, acc);
    }
    for (int j = 0; j < n; j++)
        for (int i = 0; i < 2 * strips; i++)
            _mm256_storeu_ps(y + (size_t)j * ldy + i * 8, acc[j][i / 2][i % 2]);
}

AVX2 static void add_lines_avx2(const struct lines *l, const float *x, size_t ldx, int n,
                                float *y, size_t ldy)
{
    lines_by_type(lines_avx2, 4, l, x, ldx, n, y, ldy);
}

/* The group bits of 8 rows. */
AVX2 INLINE __m256i odd_rows_avx2(const uint8_t *bytes)
{
    return _mm256_and_si256(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)bytes)),
                            _mm256_set1_epi32(1));
}

/* A codebook of 16 values, 31 added. */
AVX2 INLINE __m256i codebook_avx2(const int8_t *values)
{
    return _mm256_add_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)values)),
                           _mm256_set1_epi8(31));
}

/* q3: three bits of each nibble and the group bit are an index; the fourth bits, put together in
 * `rest`, are the nibbles of steps 6 and 7. */
AVX2 INLINE void operands_q3_avx2(const uint8_t *group, const uint8_t *scale_bytes, __m256i w[8])
{
    const __m256i codebook = codebook_avx2(CODEBOOKS_Q3), low = _mm256_set1_epi8(7);
    const __m256i book = _mm256_mullo_epi32(odd_rows_avx2(scale_bytes),
                                            _mm256_set1_epi32(0x08080808));
    __m256i rest = _mm256_setzero_si256();
    for (int o = 0; o < 4; o++) {
        __m256i raw = rest;
        if (o < 3) {
            raw = _mm256_loadu_si256((const __m256i *)(group + o * 64));
            rest = _mm256_or_si256(rest, _mm256_and_si256(_mm256_srli_epi16(raw, 3 - o),
                                                          _mm256_set1_epi8((char)(0x11 << o))));
        }
        for (int i = 0; i < 2; i++) {
            __m256i index = _mm256_and_si256(i ? _mm256_srli_epi16(raw, 4) : raw, low);
            w[2 * o + i] = _mm256_shuffle_epi8(codebook, _mm256_or_si256(index, book));
        }
    }
}

/* Rows 8 half .. 8 half + 7 of a group as 8 registers of [8 rows][4 inputs], unsigned: q6
 * value + 32, q4 codebook + 31, q3 value + 31, q8 value + 128 for VNNI but signed without it. */
AVX2 INLINE void operands_avx2(int vnni, uint32_t type, const uint8_t *group,
                               const uint8_t *scale_bytes, int half, __m256i w[8])
{
    const __m256i codebook = codebook_avx2(CODEBOOK), low = _mm256_set1_epi8(15);
    const __m256i high_bits = _mm256_set1_epi8(0x30);
    if (type == TYPE_Q8) {
        const __m256i flip = _mm256_set1_epi8(vnni ? -128 : 0);
        for (int i = 0; i < 8; i++)
            w[i] = _mm256_xor_si256(
                _mm256_loadu_si256((const __m256i *)(group + i * 64 + half * 32)), flip);
        return;
    }
    if (type == TYPE_Q3) {
        operands_q3_avx2(group + half * 32, scale_bytes, w);
        return;
    }
    for (int o = 0; o < 4; o++) {
        __m256i raw = _mm256_loadu_si256((const __m256i *)(group + o * 64 + half * 32));
        w[2 * o] = _mm256_and_si256(raw, low);
        w[2 * o + 1] = _mm256_and_si256(_mm256_srli_epi16(raw, 4), low);
    }
    for (int o = 0; o < 2 && type == TYPE_Q6; o++) {
        __m256i raw = _mm256_loadu_si256((const __m256i *)(group + 256 + o * 64 + half * 32));
        __m256i moved[4] = {_mm256_slli_epi16(raw, 4), _mm256_slli_epi16(raw, 2), raw,
                            _mm256_srli_epi16(raw, 2)};
        for (int j = 0; j < 4; j++)
            w[4 * o + j] = _mm256_or_si256(w[4 * o + j], _mm256_and_si256(moved[j], high_bits));
    }
    for (int i = 0; i < 8 && type == TYPE_Q4; i++)
        w[i] = _mm256_shuffle_epi8(codebook, w[i]);
}

AVX2 INLINE __m256i broadcast_avx2(const int8_t *four_inputs)
{
    int32_t four;
    memcpy(&four, four_inputs, 4);
    return _mm256_set1_epi32(four);
}

/* gcc would compute all terms of a sum first, spilling them, and add them up as a tree. */
#ifdef __clang__
#define IN_THIS_ORDER(sum) ((void)0)
#else
#define IN_THIS_ORDER(sum) __asm__("" : "+x"(sum))
#endif

/* The tests ask for the encoding of AVX-512 on CPUs that have that alone. */
#ifndef GEMMA2_EMULATE
#define VPDPBUSD "%{vex%} vpdpbusd"
#endif

/* acc + the products of two steps, w[0] with inputs q[0..3], w[1] with q[4..7].  AVX-VNNI
 * adds four products at a time.  Without it pairs go through 16 bits: two pairs of q6, q4 or
 * q3 fit (4 * 63 * 127), but only one of q8, and that with the sign moved to the input. */
AVX2 INLINE __m256i dot_avx2(int vnni, uint32_t type, __m256i acc, __m256i w0, __m256i w1,
                             __m256i x0, __m256i x1)
{
    const __m256i ones = _mm256_set1_epi16(1);
#ifdef HAVE_AVXVNNI
    if (vnni) {
        __asm__(VPDPBUSD " %2, %1, %0" : "+x"(acc) : "x"(w0), "x"(x0));
        __asm__(VPDPBUSD " %2, %1, %0" : "+x"(acc) : "x"(w1), "x"(x1));
        return acc;
    }
#endif
    (void)vnni;
    if (type != TYPE_Q8) {
        __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w0, x0),
                                         _mm256_maddubs_epi16(w1, x1));
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, ones));
        IN_THIS_ORDER(acc);
        return acc;
    }
    __m256i p0 = _mm256_maddubs_epi16(_mm256_abs_epi8(w0), _mm256_sign_epi8(x0, w0));
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(p0, ones));
    IN_THIS_ORDER(acc);
    __m256i p1 = _mm256_maddubs_epi16(_mm256_abs_epi8(w1), _mm256_sign_epi8(x1, w1));
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(p1, ones));
    IN_THIS_ORDER(acc);
    return acc;
}

/* sum over a group of v * q for 8 rows. */
AVX2 INLINE __m256i group_sum_avx2(int vnni, uint32_t type, const __m256i w[8], const int8_t *q,
                                   __m256i start)
{
    __m256i sum[2] = {start, _mm256_setzero_si256()};
    for (int i = 0; i < 8; i += 2)
        sum[i / 2 % 2] = dot_avx2(vnni, type, sum[i / 2 % 2], w[i], w[i + 1],
                                  broadcast_avx2(q + 4 * i), broadcast_avx2(q + 4 * i + 4));
    return _mm256_add_epi32(sum[0], sum[1]);
}

/* What the unsigned operands of 8 rows are off by, times -1, in the low 16 bits of each
 * lane: q4's values are 4 higher in rows whose group bit is 1. */
AVX2 INLINE __m256i offset_avx2(int vnni, uint32_t type, const uint8_t *bytes)
{
    const int offset = type == TYPE_Q8 && !vnni ? 0 : even_offset(type);
    __m256i even = _mm256_set1_epi32(-offset & 0xffff);
    return type == TYPE_Q4 ? _mm256_add_epi32(even, _mm256_slli_epi32(odd_rows_avx2(bytes), 2))
                           : even;
}

/* Group scales of 8 rows as floats.  Both factors of s * sum are exact floats, so the
 * rounded float product is the rounded integer product. */
AVX2 INLINE __m256 scales_avx2(uint32_t type, const uint8_t *bytes)
{
    __m128i raw = _mm_loadl_epi64((const __m128i *)bytes);
    __m256i s = type == TYPE_Q8 ? _mm256_cvtepu8_epi32(raw) : _mm256_cvtepi8_epi32(raw);
    return _mm256_cvtepi32_ps(has_group_bit(type) ? _mm256_srai_epi32(s, 1) : s);
}

AVX2 INLINE void tile_avx2(const int how, const uint32_t type, const int n,
                           const struct tiles *w, const struct input *in, size_t t, float *y)
{
    const uint8_t *tile = w->data[0];
    size_t n_groups = round_up(w->cols, BLOCK_INPUTS) / GROUP, ld = in->ldq / GROUP;
    __m256 acc[MAX_PRODUCT_ROWS][2];
    const int vnni = how & VNNI;
    for (int i = 0; i < n; i++)
        acc[i][0] = acc[i][1] = _mm256_setzero_ps();
    for (size_t g = 0; g < n_groups; g++) {
        const uint8_t *scale_bytes, *group = group_at(type, tile, g, &scale_bytes);
        prefetch_group(type, group, !(how & MANY) && n == 1, 0);
        for (int half = 0; half < 2; half++) {
            __m256i v[8], offset = offset_avx2(vnni, type, scale_bytes + 8 * half);
            __m256 s = scales_avx2(type, scale_bytes + 8 * half);
            operands_avx2(vnni, type, group, scale_bytes + 8 * half, half, v);
            size_t at = t * ld + g;
            for (int i = 0; i < n; i++, at += ld) {
                __m256i start = _mm256_madd_epi16(offset, _mm256_set1_epi32(in->sum[at]));
                __m256i sum = group_sum_avx2(vnni, type, v, in->q + at * GROUP, start);
                __m256 product = _mm256_mul_ps(s, _mm256_cvtepi32_ps(sum));
                acc[i][half] = _mm256_fmadd_ps(_mm256_set1_ps(in->scale[at]), product,
                                               acc[i][half]);
            }
        }
    }
    for (int i = 0; i < 2 * n; i++)
        _mm256_storeu_ps(y + 8 * i, _mm256_mul_ps(acc[i / 2][i % 2],
                                                  _mm256_loadu_ps((const float *)tile +
                                                                  i % 2 * 8)));
}

AVX2 static void int8_tile_avx2(const struct tiles *w, const struct input *in, size_t t, int n,
                                float *y)
{
    tile_by_type(tile_avx2, 0, MAX_PRODUCT_ROWS, w, in, t, n, y);
}

AVX2 static void int8_tile_avxvnni(const struct tiles *w, const struct input *in, size_t t, int n,
                                   float *y)
{
    tile_by_type(tile_avx2, VNNI, MAX_PRODUCT_ROWS, w, in, t, n, y);
}

AVX2 INLINE void unpack_panel_avx2(const int vnni, const uint32_t type, const struct tiles *w,
                                   size_t block, struct panel_block *b)
{
    for (int g = 0; g < 8; g++)
        for (int i = 0; i < 4; i++) { /* tile i / 2, half i % 2 */
            const uint8_t *scale_bytes, *group;
            __m256i v[8], odd = _mm256_setzero_si256();
            group = group_at(type, w->data[i / 2], block * 8 + (size_t)g, &scale_bytes);
            if (i % 2 == 0)
                prefetch_block(type, group);
            scale_bytes += i % 2 * 8;
            if (type == TYPE_Q4)
                odd = _mm256_mullo_epi32(odd_rows_avx2(scale_bytes), _mm256_set1_epi32(0x04040404));
            operands_avx2(vnni, type, group, scale_bytes, i % 2, v);
            for (int step = 0; step < 8; step++)
                _mm256_storeu_si256((__m256i *)(b->operands[g][step][i / 2] + i % 2 * 32),
                                    _mm256_add_epi8(v[step], odd));
            _mm256_storeu_ps(b->scales[g][i / 2] + i % 2 * 8, scales_avx2(type, scale_bytes));
        }
}

/* One group of one tile of a block. */
AVX2 INLINE void panel_group_avx2(const int vnni, const uint32_t type, const int n,
                                  const struct panel_block *b, size_t g, int tile,
                                  const struct input *in, size_t at, float (*y)[2][TILE])
{
    const int offset = type == TYPE_Q8 && !vnni ? 0 : even_offset(type);
    size_t ld = in->ldq / GROUP;
    __m256i sum[4][2];
    for (int j = 0; j < n; j++)
        sum[j][0] = sum[j][1] = _mm256_set1_epi32(-offset * in->sum[at + (size_t)j * ld]);
    UNROLL
    for (int step = 0; step < 8; step += 2)
        for (int j = 0; j < n; j++) {
            const int8_t *q = in->q + (at + (size_t)j * ld) * GROUP + 4 * step;
            __m256i x0 = broadcast_avx2(q), x1 = broadcast_avx2(q + 4);
            for (int half = 0; half < 2; half++) {
                const uint8_t *v = b->operands[g][step][tile] + half * 32;
                sum[j][half] = dot_avx2(vnni, type, sum[j][half],
                                        _mm256_loadu_si256((const __m256i *)v),
                                        _mm256_loadu_si256((const __m256i *)(v + 128)), x0, x1);
            }
        }
    for (int j = 0; j < n; j++)
        for (int half = 0; half < 2; half++) {
            float *to = y[j][tile] + half * 8;
            __m256 product = _mm256_mul_ps(_mm256_loadu_ps(b->scales[g][tile] + half * 8),
                                           _mm256_cvtepi32_ps(sum[j][half]));
            __m256 scale = _mm256_set1_ps(in->scale[at + (size_t)j * ld]);
            _mm256_storeu_ps(to, _mm256_fmadd_ps(scale, product, _mm256_loadu_ps(to)));
        }
}

AVX2 INLINE void panel_tokens_avx2(const int vnni, const uint32_t type, const int n,
                                   const struct panel_block *b, const struct input *in, size_t t,
                                   size_t block, float (*y)[2][TILE])
{
    for (size_t g = 0; g < 8; g++)
        for (int tile = 0; tile < 2; tile++)
            panel_group_avx2(vnni, type, n, b, g, tile, in,
                             t * (in->ldq / GROUP) + block * 8 + g, y);
}

AVX2 static void int8_panel_avx2(const struct tiles *w, const struct input *in, size_t t, int n,
                                 float *y)
{
    struct panel_block b;
    panel_by_type(unpack_panel_avx2, panel_tokens_avx2, 0, 4, &b, w, in, t, n, y);
}

AVX2 static void int8_panel_avxvnni(const struct tiles *w, const struct input *in, size_t t, int n,
                                    float *y)
{
    struct panel_block b;
    panel_by_type(unpack_panel_avx2, panel_tokens_avx2, 1, 4, &b, w, in, t, n, y);
}

/* ---- AVX-512 with VNNI ---- */

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
ELEMENT_WISE(avx512, AVX512)

/* A line as floats, of bf16 the odd one of two or the one before; pairs as they are. */
AVX512 INLINE __m512 line_avx512(enum line_type type, int odd, const uint8_t *line, __m512 scale)
{
    if (type == LINES_KEYS_Q8 || type == LINES_VALUES_Q8) {
        __m512i w = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)line));
        return _mm512_mul_ps(_mm512_cvtepi32_ps(w), scale);
    }
    if (type == LINES_F16)
        return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)line));
    __m512i w = _mm512_loadu_si512(line);
    if (type == LINES_BF16)
        w = odd ? _mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000))
                : _mm512_slli_epi32(w, 16);
    return _mm512_castsi512_ps(w);
}

/* acc + w * x, of bf16 pairs acc + w.low * x.low + w.high * x.high. */
AVX512 INLINE __m512 fused_avx512(enum line_type type, __m512 acc, __m512 w, __m512 x)
{
#ifdef HAVE_AVX512BF16
    if (type == LINES_PAIRS) {
        __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
        return acc;
    }
#endif
    (void)type;
    return _mm512_fmadd_ps(w, x, acc);
}

/* Line k of the strips into acc[row][strip]. */
AVX512 INLINE void add_line_avx512(enum line_type type, int odd, const int n, const int strips,
                                   const struct lines *l, int k, const float *x, size_t ldx,
                                   const __m512 scale[8], __m512 acc[8][8])
{
    const uint8_t *line = l->data + (size_t)k / (type == LINES_BF16 ? 2 : 1) * l->line_bytes;
    x += type == LINES_PAIRS ? (size_t)k / TILE * l->x_step + (size_t)k % TILE : (size_t)k;
    for (int i = 0; i < strips; i++, line += l->strip_bytes) {
        prefetch_line(type, n, l, k, line);
        __m512 w = line_avx512(type, odd, line, scale[i]);
        for (int j = 0; j < n; j++)
            acc[j][i] = fused_avx512(type, acc[j][i], w, _mm512_set1_ps(x[(size_t)j * ldx]));
    }
}

AVX512 INLINE __m512 cache_scales_avx512(enum line_type type, const struct lines *l, int i,
                                         int k)
{
    const uint16_t *from = scales_of(type, l, l->data + i * l->strip_bytes, l->strip + i, k);
    return _mm512_cvtph_ps(type == LINES_KEYS_Q8 ? _mm256_loadu_si256((const __m256i *)from)
                                                 : _mm256_set1_epi16((short)*from));
}

AVX512 INLINE void lines_avx512(enum line_type type, const int n, const int strips,
                                const struct lines *l, const float *x, size_t ldx, float *y,
                                size_t ldy)
{
    __m512 acc[8][8], scale[8] = {_mm512_setzero_ps()};
    for (int j = 0; j < n; j++)
        for (int i = 0; i < strips; i++)
            acc[j][i] = l->go_on ? _mm512_loadu_ps(y + (size_t)j * ldy + i * TILE)
                                 : _mm512_setzero_ps();
    for (int k = 0; k < l->n_lines; k += 1 + (type == LINES_BF16)) {
        for (int i = 0; has_new_scales(type, k) && i < strips; i++)
            scale[i] = type == LINES_VALUES_Q8 && i % 2 ? scale[i - 1] /* of 32 dimensions */
                                                        : cache_scales_avx512(type, l, i, k);
        add_line_avx512(type, 0, n, strips, l, k, x, ldx, scale, acc);
        if (type == LINES_BF16 && k + 1 < l->n_lines)
            add_line_avx512(type, 1, n, strips, l, k + 1, x, ldx, scale, acc);
    }
    for (int j = 0; j < n; j++)
        for (int i = 0; i < strips; i++)
            _mm512_storeu_ps(y + (size_t)j * ldy + i * TILE, acc[j][i]);
}

AVX512 static void add_lines_avx512(const struct lines *l, const float *x, size_t ldx, int n,
                                    float *y, size_t ldy)
{
    if (l->type == LINES_PAIRS)
        lines_by_rows(lines_avx512, 16, LINES_PAIRS, l, x, ldx, n, y, ldy);
    else
        lines_by_type(lines_avx512, 16, l, x, ldx, n, y, ldy);
}

/* The rows whose group bit is 1. */
AVX512 INLINE __mmask16 odd_rows_avx512(__m128i scale_bytes)
{
    return _mm_test_epi8_mask(scale_bytes, _mm_set1_epi8(1));
}

/* A codebook of 16 values, 31 added. */
AVX512 INLINE __m512i codebook_avx512(const int8_t *values)
{
    return _mm512_add_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)values)),
                           _mm512_set1_epi8(31));
}

/* The bits of a that the mask has, the others of b. */
AVX512 INLINE __m512i pick_avx512(char mask, __m512i a, __m512i b)
{
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(mask), a, b, 0xca);
}

/* q3: three bits of each nibble and the group bit are an index; the fourth bits, put together in
 * raw[3], are the nibbles of steps 6 and 7. */
AVX512 INLINE void operands_q3_avx512(const uint8_t *group, __m128i scale_bytes, __m512i w[8])
{
    const __m512i codebook = codebook_avx512(CODEBOOKS_Q3);
    const __m512i book = _mm512_maskz_set1_epi32(odd_rows_avx512(scale_bytes), 0x08080808);
    __m512i raw[4];
    for (int o = 0; o < 3; o++)
        raw[o] = _mm512_loadu_si512(group + o * 64);
    raw[3] = pick_avx512(0x11, _mm512_srli_epi16(raw[0], 3), _mm512_srli_epi16(raw[1], 2));
    raw[3] = pick_avx512(0x33, raw[3], _mm512_srli_epi16(raw[2], 1));
    for (int i = 0; i < 8; i++) {
        __m512i nibble = i % 2 ? _mm512_srli_epi16(raw[i / 2], 4) : raw[i / 2];
        w[i] = _mm512_shuffle_epi8(codebook, pick_avx512(7, nibble, book));
    }
}

/* A group as 8 registers of [16 rows][4 inputs], unsigned: q8 value + 128, q6 value + 32,
 * q4 codebook + 31, q3 value + 31. */
AVX512 INLINE void operands_avx512(uint32_t type, const uint8_t *group, __m128i scale_bytes,
                                   __m512i w[8])
{
    const __m512i low = _mm512_set1_epi8(15), high_bits = _mm512_set1_epi8(0x30);
    if (type == TYPE_Q8) {
        for (int i = 0; i < 8; i++)
            w[i] = _mm512_xor_si512(_mm512_loadu_si512(group + i * 64), _mm512_set1_epi8(-128));
        return;
    }
    if (type == TYPE_Q3) {
        operands_q3_avx512(group, scale_bytes, w);
        return;
    }
    for (int o = 0; o < 4; o++) {
        __m512i raw = _mm512_loadu_si512(group + o * 64);
        w[2 * o] = _mm512_and_si512(raw, low);
        w[2 * o + 1] = _mm512_and_si512(_mm512_srli_epi16(raw, 4), low);
    }
    for (int o = 0; o < 2 && type == TYPE_Q6; o++) {
        __m512i raw = _mm512_loadu_si512(group + 256 + o * 64);
        __m512i moved[4] = {_mm512_slli_epi16(raw, 4), _mm512_slli_epi16(raw, 2), raw,
                            _mm512_srli_epi16(raw, 2)};
        for (int j = 0; j < 4; j++)
            w[4 * o + j] = _mm512_or_si512(w[4 * o + j], _mm512_and_si512(moved[j], high_bits));
    }
    const __m512i codebook = codebook_avx512(CODEBOOK);
    for (int i = 0; i < 8 && type == TYPE_Q4; i++)
        w[i] = _mm512_shuffle_epi8(codebook, w[i]);
}

/* The same, with 4 added to q4's in rows whose group bit is 1: all are off by even_offset. */
AVX512 INLINE void even_operands_avx512(uint32_t type, const uint8_t *group, __m128i scale_bytes,
                                        __m512i w[8])
{
    const __m512i odd = _mm512_maskz_set1_epi32(odd_rows_avx512(scale_bytes), 0x04040404);
    operands_avx512(type, group, scale_bytes, w);
    for (int i = 0; i < 8 && type == TYPE_Q4; i++)
        w[i] = _mm512_add_epi8(w[i], odd);
}

/* What the unsigned operands are off by, times -1, in the low 16 bits of each lane: q4's values
 * are 4 higher in rows whose group bit is 1. */
AVX512 INLINE __m512i offset_avx512(uint32_t type, __m128i scale_bytes)
{
    __m512i even = _mm512_set1_epi32(-even_offset(type) & 0xffff);
    __mmask16 odd = odd_rows_avx512(scale_bytes);
    return type == TYPE_Q4 ? _mm512_mask_set1_epi32(even, odd, -27 & 0xffff) : even;
}

/* Group scales as floats.  Both factors of s * sum are exact floats, so the rounded float
 * product is the rounded integer product. */
AVX512 INLINE __m512 scales_avx512(uint32_t type, __m128i scale_bytes)
{
    __m512i s = type == TYPE_Q8 ? _mm512_cvtepu8_epi32(scale_bytes)
                                : _mm512_cvtepi8_epi32(scale_bytes);
    return _mm512_cvtepi32_ps(has_group_bit(type) ? _mm512_srai_epi32(s, 1) : s);
}

/* sum + the products of a step with four inputs.  Assembly, because gcc 12 spends an instruction on
 * the inputs: a row and group then take 13 cycles instead of 10. */
AVX512 INLINE __m512i dot_avx512(__m512i sum, __m512i w, const int8_t *q)
{
    struct inputs { int8_t q[4]; };
    __asm__("vpdpbusd %2%{1to16%}, %1, %0"
            : "+v"(sum) : "v"(w), "m"(*(const struct inputs *)q));
    return sum;
}

AVX512 INLINE void tile_avx512(const int how, const uint32_t type, const int n,
                               const struct tiles *w, const struct input *in, size_t t, float *y)
{
    const uint8_t *tile = w->data[0];
    size_t n_groups = round_up(w->cols, BLOCK_INPUTS) / GROUP, ld = in->ldq / GROUP;
    __m512 acc[MAX_PRODUCT_ROWS];
    int32_t start[MAX_PRODUCT_ROWS][8];
    const int many = how & MANY;
    for (int i = 0; i < n; i++)
        acc[i] = _mm512_setzero_ps();
    for (size_t g = 0; g < n_groups; g++) {
        size_t at = t * ld + g;
        for (int i = 0; many && g % 8 == 0 && i < n; i++)
            _mm256_storeu_si256((__m256i *)start[i], _mm256_mullo_epi32(
                _mm256_set1_epi32(-even_offset(type)),
                _mm256_loadu_si256((const __m256i *)(in->sum + at + (size_t)i * ld))));
        const uint8_t *scale_bytes, *group = group_at(type, tile, g, &scale_bytes);
        prefetch_group(type, group, !many && n == 1, type == TYPE_Q8);
        __m128i raw = _mm_loadu_si128((const __m128i *)scale_bytes);
        __m512i v[8], offset = offset_avx512(type, raw);
        __m512 s = scales_avx512(type, raw);
        if (many)
            even_operands_avx512(type, group, raw, v);
        else
            operands_avx512(type, group, raw, v);
        for (int i = 0; i < n; i++, at += ld) {
            __m512i zero = _mm512_setzero_si512(), sum[2] = {zero, zero};
            if (many)
                sum[0] = _mm512_set1_epi32(start[i][g % 8]);
            else
                sum[0] = _mm512_dpwssd_epi32(zero, offset, _mm512_set1_epi32(in->sum[at]));
            for (int step = 0; step < 8; step++) {
                int chain = many ? 0 : step % 2;
                sum[chain] = dot_avx512(sum[chain], v[step], in->q + at * GROUP + 4 * step);
            }
            if (!many)
                sum[0] = _mm512_add_epi32(sum[0], sum[1]);
            __m512 product = _mm512_mul_ps(s, _mm512_cvtepi32_ps(sum[0]));
            acc[i] = _mm512_fmadd_ps(_mm512_set1_ps(in->scale[at]), product, acc[i]);
        }
    }
    for (int i = 0; i < n; i++)
        _mm512_storeu_ps(y + i * TILE, _mm512_mul_ps(acc[i], _mm512_loadu_ps((const float *)tile)));
}

AVX512 static void int8_tile_avx512(const struct tiles *w, const struct input *in, size_t t, int n,
                                    float *y)
{
    tile_by_type(tile_avx512, 0, MAX_PRODUCT_ROWS, w, in, t, n, y);
}

AVX512 INLINE void unpack_panel_avx512(const int how, const uint32_t type, const struct tiles *w,
                                       size_t block, struct panel_block *b)
{
    (void)how;
    for (int g = 0; g < 8; g++)
        for (int i = 0; i < 2; i++) {
            const uint8_t *scale_bytes;
            const uint8_t *group = group_at(type, w->data[i], block * 8 + (size_t)g, &scale_bytes);
            __m128i raw = _mm_loadu_si128((const __m128i *)scale_bytes);
            __m512i v[8];
            prefetch_block(type, group);
            even_operands_avx512(type, group, raw, v);
            for (int step = 0; step < 8; step++)
                _mm512_storeu_si512(b->operands[g][step][i], v[step]);
            _mm512_storeu_ps(b->scales[g][i], scales_avx512(type, raw));
        }
}

AVX512 INLINE void panel_tokens_avx512(const int how, const uint32_t type, const int n,
                                       const struct panel_block *b, const struct input *in,
                                       size_t t, size_t block, float (*y)[2][TILE])
{
    const int offset = even_offset(type);
    size_t ld = in->ldq / GROUP, at = t * ld + block * 8;
    __m512 acc[6][2];
    (void)how;
    for (int j = 0; j < n; j++)
        for (int i = 0; i < 2; i++)
            acc[j][i] = _mm512_loadu_ps(y[j][i]);
    for (size_t g = 0; g < 8; g++, at++) {
        const int8_t *q = in->q + at * GROUP;
        __m512i sum[6][2];
        for (int j = 0; j < n; j++) /* unsigned operands are too large by the offset */
            sum[j][0] = sum[j][1] = _mm512_set1_epi32(-offset * in->sum[at + (size_t)j * ld]);
        UNROLL
        for (int step = 0; step < 8; step++) {
            __m512i w0 = _mm512_loadu_si512(b->operands[g][step][0]);
            __m512i w1 = _mm512_loadu_si512(b->operands[g][step][1]);
            for (int j = 0; j < n; j++) {
                int32_t four;
                memcpy(&four, q + (size_t)j * in->ldq + 4 * step, 4);
                __m512i x = _mm512_set1_epi32(four);
                sum[j][0] = _mm512_dpbusd_epi32(sum[j][0], w0, x);
                sum[j][1] = _mm512_dpbusd_epi32(sum[j][1], w1, x);
            }
        }
        for (int j = 0; j < n; j++)
            for (int i = 0; i < 2; i++) {
                __m512 product = _mm512_mul_ps(_mm512_loadu_ps(b->scales[g][i]),
                                               _mm512_cvtepi32_ps(sum[j][i]));
                acc[j][i] = _mm512_fmadd_ps(_mm512_set1_ps(in->scale[at + (size_t)j * ld]),
                                            product, acc[j][i]);
            }
    }
    for (int j = 0; j < n; j++)
        for (int i = 0; i < 2; i++)
            _mm512_storeu_ps(y[j][i], acc[j][i]);
}

AVX512 static void int8_panel_avx512(const struct tiles *w, const struct input *in, size_t t, int n,
                                     float *y)
{
    struct panel_block b;
    panel_by_type(unpack_panel_avx512, panel_tokens_avx512, 0, 6, &b, w, in, t, n, y);
}

/* ---- the matrix class with AVX-512: dot products of bf16 pairs ---- */

/* Rounded to bf16, to nearest even, in the high halves of the lanes; NaN stays NaN. */
AVX512 INLINE __m512i round_bf16_avx512(__m512 x)
{
    __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
}

AVX512 INLINE __m256i bf16_avx512(__m512 x)
{
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16_avx512(x), 16));
}

/* Lanes of a low, of b high. */
AVX512 INLINE __m512i pair_bf16_avx512(__m512 a, __m512 b)
{
    __m512i high = _mm512_and_si512(round_bf16_avx512(b), _mm512_set1_epi32((int)0xffff0000));
    return _mm512_or_si512(_mm512_srli_epi32(round_bf16_avx512(a), 16), high);
}

AVX512 static void pack_row_avx512(const float *x, uint32_t n, uint16_t *pairs)
{
    for (uint32_t k = 0; k < n; k += GROUP, pairs += BF16_STRIDE)
        for (uint32_t half = 0; half < GROUP; half += TILE) {
            uint32_t rest = k + half < n ? n - k - half : 0;
            __mmask16 valid = rest >= TILE ? 0xffff : (__mmask16)((1u << rest) - 1);
            _mm256_storeu_si256((__m256i *)(pairs + half),
                                bf16_avx512(_mm512_maskz_loadu_ps(valid, x + k + half)));
        }
}

/* Line k of strip i, of a cache. */
AVX512 INLINE __m512 cached_avx512(const struct lines *l, int i, int k)
{
    const uint8_t *line = l->data + i * l->strip_bytes + (size_t)k * l->line_bytes;
    if (l->type == LINES_F16)
        return line_avx512(LINES_F16, 0, line, _mm512_setzero_ps());
    return line_avx512(LINES_KEYS_Q8, 0, line, cache_scales_avx512(l->type, l, i, k));
}

/* Packed keys: [H / 2][16][2]. */
AVX512 static void pack_keys_avx512(const struct lines *keys, uint8_t *to)
{
    for (int h = 0; h < keys->n_lines; h += 2, to += 64)
        _mm512_store_si512(to, pair_bf16_avx512(cached_avx512(keys, 0, h),
                                                cached_avx512(keys, 0, h + 1)));
}

/* Packed values: [H / 16][pairs of packed_positions][16][2]. */
AVX512 static void pack_values_avx512(const struct lines *values, int n_valid, int at, uint8_t *to)
{
    size_t strip = (size_t)packed_positions(values->n_strips * TILE) / 2 * 64;
    to += at / 2 * 64;
    for (int i = 0; i < TILE; i += 2, to += 64)
        for (int h = 0; h < values->n_strips; h++) {
            __m512 a = _mm512_setzero_ps(), b = a;
            if (i < n_valid)
                a = cached_avx512(values, h, i);
            if (i + 1 < n_valid)
                b = cached_avx512(values, h, i + 1);
            _mm512_store_si512(to + (size_t)h * strip, pair_bf16_avx512(a, b));
        }
}

#ifdef HAVE_AVX512BF16

/* bf16 tiles as they are, 256 inputs at a time. */
AVX512 static void bf16_panel_avx512(const struct tiles *w, const struct input *in, size_t t, int n,
                                     float *y)
{
    for (uint32_t k = 0; k < w->cols; k += BLOCK_INPUTS) {
        int n_pairs = min_i32(BLOCK_INPUTS / 2, (int)(w->cols - k + 1) / 2);
        struct lines lines = {.data = w->data[0] + k / 2 * 64, .type = LINES_PAIRS,
                              .n_lines = n_pairs, .n_strips = 2, .line_bytes = 64,
                              .strip_bytes = w->data[1] - w->data[0], .every = 1 << 30,
                              .go_on = k > 0, .x_step = BF16_STRIDE / 2};
        for (int j = 0, rows; j < n; j += rows) { /* rows of pairs follow each other by tiles */
            size_t row = t + (size_t)j;
            rows = min_i32(TILE - (int)(row % TILE), n - j);
            add_lines_avx512(&lines, (const float *)(const void *)(bf16_row(in, row) +
                                                                  k / GROUP * BF16_STRIDE),
                             GROUP / 2, rows, y + j * 2 * TILE, 2 * TILE);
        }
    }
}

/* n rows of `size` floats, `ld` from each other, as pairs of bf16. */
AVX512 INLINE void pairs_avx512(const float *x, size_t ld, int n, int size, uint32_t *to)
{
    for (int j = 0; j < n; j++, x += ld)
        for (int i = 0; i < size; i += TILE, to += TILE / 2)
            _mm256_storeu_si256((__m256i *)to, bf16_avx512(_mm512_loadu_ps(x + i)));
}

AVX512 static void score_keys_avx512bf16(const float *q, int n, int head_dim, const uint8_t *keys,
                                         int n_strips, float (*s)[KEY_BLOCK])
{
    float pairs[MAX_QUERIES * MAX_PACKED_HEAD / 2];
    ptrdiff_t strip_bytes = (ptrdiff_t)head_dim * TILE * 2;
    struct lines lines = {.data = keys, .type = LINES_PAIRS, .n_lines = head_dim / 2,
                          .n_strips = n_strips, .strip_bytes = strip_bytes, .line_bytes = 64,
                          .every = 1 << 30, .x_step = TILE};
    pairs_avx512(q, (size_t)head_dim, n, head_dim, (uint32_t *)(void *)pairs);
    add_lines_avx512(&lines, pairs, (size_t)head_dim / 2, n, s[0], KEY_BLOCK);
}

AVX512 static void mix_values_avx512bf16(const float (*s)[KEY_BLOCK], int n, int head_dim,
                                         const uint8_t *values, int first, int n_keys, float *o)
{
    float pairs[MAX_QUERIES * KEY_BLOCK / 2];
    struct lines lines = {.data = values + first / 2 * 64, .type = LINES_PAIRS,
                          .n_lines = n_keys / 2, .n_strips = head_dim / TILE,
                          .strip_bytes = packed_positions(head_dim) / 2 * 64, .line_bytes = 64,
                          .every = 1 << 30, .x_step = TILE};
    pairs_avx512(s[0], KEY_BLOCK, n, n_keys, (uint32_t *)(void *)pairs);
    add_lines_avx512(&lines, pairs, (size_t)n_keys / 2, n, o, (size_t)head_dim);
}

static const struct matrix_kernels avx512bf16_matrix = {
    .types = 1 << TYPE_BF16, .most_pairs = 1, .bf16_panel = bf16_panel_avx512,
    .pack_row = pack_row_avx512, .pack_keys = pack_keys_avx512,
    .pack_values = pack_values_avx512,
    .score_keys = score_keys_avx512bf16, .mix_values = mix_values_avx512bf16};
#endif

/* ---- the matrix class with AMX: tiles of 16 x 32 bf16 ---- */

#ifdef HAVE_AMX

/* A tile register holds up to 16 rows of 64 bytes.  C += A B takes an A tile of n tokens x 32
 * inputs, which is how in->bf16 lies, and a B tile [16 input pairs][16 rows][2], which is how
 * bf16 weights and packed keys and values lie. */
enum { TILE_WORDS = TILE * GROUP, TILE_BYTES = 2 * TILE_WORDS };

struct tile_shapes { /* what LDTILECFG reads */
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* Tile numbers are part of the instructions, hence macros; assembly, because compilers
 * declare too little of the memory that their own intrinsics read.  The tests bring these
 * six in C, for CPUs without them (tests/emulate.h). */
#ifndef GEMMA2_EMULATE
#define tile_config(shapes) __asm__ volatile("ldtilecfg %0" : : "m"(*(shapes)))
#define tile_release() __asm__ volatile("tilerelease")
#define tile_zero(c) __asm__ volatile("tilezero %%tmm" #c : :)
#define tile_load(a, from, stride)                                                          \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #a : : "r"(from), "r"((size_t)(stride))   \
                     : "memory")
#define tile_store(c, to, stride)                                                           \
    __asm__ volatile("tilestored %%tmm" #c ", (%0,%1,1)" : : "r"(to), "r"((size_t)(stride)) \
                     : "memory")
#define tile_dot_bf16(c, a, b)                                                              \
    __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)
#endif

/* Tiles 0 to 3 are sums, 4 and 5 A tiles: n rows each.  6 and 7 are B tiles.  Every kernel
 * configures on entry and releases before it returns: no thread of the host keeps tiles. */
static void config_amx(uint32_t n)
{
    struct tile_shapes shapes = {1, 0, {0}, {0}, {0}};
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = 64;
        shapes.rows[i] = (uint8_t)(i < 6 ? n : TILE);
    }
    tile_config(&shapes);
}

/* Blocks of 8 groups of 32 inputs are multiplied with all pairs of tiles in turn, so that the
 * tokens' inputs come from afar once for all of them.  There is room for the B tiles of two
 * blocks: while tiles multiply one pair's block, vectors unpack the next. */
enum { BLOCK_AMX = 8, ROOM_AMX = 2 * BLOCK_AMX };
struct unpacked_amx {
    _Alignas(64) uint16_t b[ROOM_AMX][2][TILE_WORDS]; /* [group][tile] */
    const struct tiles *w;
    uint32_t n_groups;
    uint32_t block, pair, next; /* what is unpacked next: B tile 2 * group + tile of that block */
    uint32_t n_unpacked, owed;  /* B tiles, and shares of the next one */
};

AVX512 INLINE void copy_pairs_amx(const uint8_t *tile, uint32_t cols, size_t g, uint16_t *to)
{
    size_t n = (cols + 1) / 2 - g * TILE; /* the last group may be shorter */
    const uint8_t *from = tile + g * TILE_BYTES;
    for (size_t i = 0; i < TILE; i++, from += 64) {
        _mm_prefetch((const char *)from + PREFETCH_AHEAD, _MM_HINT_T0);
        _mm512_store_si512(to + i * GROUP, i < n ? _mm512_loadu_si512(from)
                                                 : _mm512_setzero_si512());
    }
}

/* A group of a quantised tile as a B tile of s * value; S follows in the end.  The product of
 * an operand's four inputs with a scale in one of the four bytes is s * value of that input,
 * an exact integer.  As a float it is rounded to nearest by half of bf16's last place, and by
 * a little less in odd inputs: so ties, frequent among integers, go up as often as down. */
AVX512 INLINE void unpack_group_amx(uint32_t type, const uint8_t *tile, size_t g, uint16_t *to)
{
    const uint8_t *scale_bytes, *group = group_at(type, tile, g, &scale_bytes);
    for (uint32_t line = 0; line < types[type].group_bytes; line += 64)
        _mm_prefetch((const char *)group + line + PREFETCH_AHEAD, _MM_HINT_T0);
    __m128i raw = _mm_loadu_si128((const __m128i *)scale_bytes);
    __m512i w[8], zero = _mm512_setzero_si512(), s = _mm512_cvtepi8_epi32(raw);
    s = has_group_bit(type) ? _mm512_srai_epi32(s, 1) : s;
    __m512i start = type == TYPE_Q8 ? zero : _mm512_madd_epi16(offset_avx512(type, raw), s);
    s = _mm512_and_si512(s, _mm512_set1_epi32(0xff));
    const __m512i scale[4] = {s, _mm512_slli_epi32(s, 8), _mm512_slli_epi32(s, 16),
                              _mm512_slli_epi32(s, 24)};
    const __m512i half[2] = {_mm512_set1_epi32(0x8000), _mm512_set1_epi32(0x7fff)};
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i high_words = _mm512_add_epi32( /* 1 of one operand, 1 of the other, 3, 3 .. */
        _mm512_set1_epi32(33 << 16 | 1), _mm512_slli_epi16(_mm512_or_si512(
            lanes, _mm512_slli_epi32(lanes, 16)), 1));
    operands_avx512(type, group, raw, w);
    UNROLL
    for (int step = 0; step < 8; step++) {
        __m512i x[4];
        for (int k = 0; k < 4; k++) {
            __m512i product = type == TYPE_Q8 /* unsigned scale, signed values */
                ? _mm512_dpbusd_epi32(zero, scale[k], _mm512_loadu_si512(group + step * 64))
                : _mm512_dpbusd_epi32(start, w[step], scale[k]);
            x[k] = _mm512_add_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(product)), half[k % 2]);
        }
        for (int pair = 0; pair < 2; pair++)
            _mm512_store_si512(to + (2 * step + pair) * GROUP,
                               _mm512_permutex2var_epi16(x[2 * pair], high_words,
                                                         x[2 * pair + 1]));
    }
}

/* The last block may have fewer groups than 8: what is beyond the end is not unpacked. */
AVX512 INLINE void unpack_next_amx(uint32_t type, struct unpacked_amx *p)
{
    uint32_t g = p->block * BLOCK_AMX + p->next / 2, i = p->next % 2;
    const uint8_t *tile = p->w->data[i] + p->pair * p->w->next_pair;
    uint16_t *to = p->b[p->n_unpacked / 2 % ROOM_AMX][i];
    if (g < p->n_groups && type == TYPE_BF16)
        copy_pairs_amx(tile, p->w->cols, g, to);
    else if (g < p->n_groups)
        unpack_group_amx(type, tile, g, to);
    p->n_unpacked++;
    if (++p->next == 2 * BLOCK_AMX) {
        p->next = 0;
        p->pair = p->pair == (uint32_t)p->w->more ? 0 : p->pair + 1;
        p->block += !p->pair;
    }
}

/* Adds n_groups <= 8 groups to the sums of n (2 or 1, a constant) times 16 tokens.
 * Unpacking runs 16 B tiles ahead: 2 for each of the 8 steps of each of n_turns calls. */
AVX512 INLINE void multiply_amx(uint32_t type, const int n, struct unpacked_amx *p,
                                const uint16_t *a, size_t next_tokens, const uint16_t *b,
                                uint32_t n_groups, int go_on, uint32_t n_turns,
                                float (*y)[2][TILE])
{
    enum { STRIDE = sizeof *y };
    if (go_on) {
        tile_load(0, y[0][0], STRIDE);
        tile_load(1, y[0][1], STRIDE);
    } else {
        tile_zero(0);
        tile_zero(1);
    }
    if (n == 2 && go_on) {
        tile_load(2, y[TILE][0], STRIDE);
        tile_load(3, y[TILE][1], STRIDE);
    } else if (n == 2) {
        tile_zero(2);
        tile_zero(3);
    }
    for (uint32_t g = 0; g < BLOCK_AMX; g++, a += BF16_STRIDE, b += 2 * TILE_WORDS) {
        if (g < n_groups) {
            tile_load(4, a, 64);
            tile_load(6, b, 64);
            tile_dot_bf16(0, 4, 6);
            tile_load(7, b + TILE_WORDS, 64);
            tile_dot_bf16(1, 4, 7);
        }
        if (g < n_groups && n == 2) {
            tile_load(5, a + next_tokens, 64);
            tile_dot_bf16(2, 5, 6);
            tile_dot_bf16(3, 5, 7);
        }
        for (p->owed += 2; p->owed >= n_turns; p->owed -= n_turns)
            unpack_next_amx(type, p);
    }
    tile_store(0, y[0][0], STRIDE);
    tile_store(1, y[0][1], STRIDE);
    if (n == 2) {
        tile_store(2, y[TILE][0], STRIDE);
        tile_store(3, y[TILE][1], STRIDE);
    }
}

AVX512 INLINE void panel_of_type_amx(const uint32_t type, const struct tiles *w,
                                     const struct input *in, size_t t, int n,
                                     float (*y)[2][TILE])
{
    struct unpacked_amx p;
    uint32_t n_tiles = ((uint32_t)n + TILE - 1) / TILE, n_turns = (n_tiles + 1) / 2, at = 0;
    const uint16_t *x = bf16_row(in, t);
    size_t next_tokens = TILE * in->ldq;
    p.w = w, p.n_groups = (w->cols + GROUP - 1) / GROUP;
    p.block = p.pair = p.next = p.n_unpacked = p.owed = 0;
    config_amx((uint32_t)min_i32(n, TILE));
    while (p.n_unpacked < 2 * BLOCK_AMX)
        unpack_next_amx(type, &p);
    for (uint32_t first = 0; first < p.n_groups; first += BLOCK_AMX)
        for (int pair = 0; pair <= w->more; pair++, at ^= BLOCK_AMX) {
            uint32_t n_groups = p.n_groups - first < BLOCK_AMX ? p.n_groups - first : BLOCK_AMX;
            const uint16_t *a = x + (size_t)first * BF16_STRIDE, *b = p.b[at][0];
            uint32_t i = 0;
            for (; i + 1 < n_tiles; i += 2, a += 2 * next_tokens)
                multiply_amx(type, 2, &p, a, next_tokens, b, n_groups, first > 0, n_turns,
                             y + pair * MAX_PANEL_ROWS + i * TILE);
            if (i < n_tiles)
                multiply_amx(type, 1, &p, a, 0, b, n_groups, first > 0, n_turns,
                             y + pair * MAX_PANEL_ROWS + i * TILE);
        }
    tile_release();
    for (int pair = 0; pair <= w->more && type != TYPE_BF16; pair++, y += MAX_PANEL_ROWS)
        for (int i = 0; i < 2; i++) {
            const uint8_t *tile = w->data[i] + (size_t)pair * w->next_pair;
            __m512 scale = _mm512_loadu_ps((const float *)tile);
            for (int j = 0; j < n; j++)
                _mm512_storeu_ps(y[j][i], _mm512_mul_ps(scale, _mm512_loadu_ps(y[j][i])));
        }
}

AVX512 static void bf16_panel_amx(const struct tiles *w, const struct input *in, size_t t, int n,
                                  float *sums)
{
    float (*y)[2][TILE] = (float (*)[2][TILE])sums;
    switch (w->type) {
    case TYPE_BF16: panel_of_type_amx(TYPE_BF16, w, in, t, n, y); break;
    case TYPE_Q8: panel_of_type_amx(TYPE_Q8, w, in, t, n, y); break;
    case TYPE_Q6: panel_of_type_amx(TYPE_Q6, w, in, t, n, y); break;
    case TYPE_Q4: panel_of_type_amx(TYPE_Q4, w, in, t, n, y); break;
    default: panel_of_type_amx(TYPE_Q3, w, in, t, n, y); break;
    }
}

/* Attention multiplies n queries' A tile with up to four B tiles (n_b: 4 or 1, a constant),
 * each for a sum of its own: four, because a dot takes as long as three others. */
INLINE void zero_sums_amx(const int n_b)
{
    tile_zero(0);
    if (n_b == 4) {
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
    }
}

INLINE void add_dots_amx(const int n_b, const uint16_t *a, const uint8_t *b, size_t next_b)
{
    tile_load(4, a, 64);
    tile_load(6, b, 64);
    tile_dot_bf16(0, 4, 6);
    if (n_b == 4) {
        tile_load(7, b + next_b, 64);
        tile_dot_bf16(1, 4, 7);
        tile_load(6, b + 2 * next_b, 64);
        tile_dot_bf16(2, 4, 6);
        tile_load(7, b + 3 * next_b, 64);
        tile_dot_bf16(3, 4, 7);
    }
}

INLINE void store_sums_amx(const int n_b, float *to, size_t stride)
{
    tile_store(0, to, stride);
    if (n_b == 4) {
        tile_store(1, to + TILE, stride);
        tile_store(2, to + 2 * TILE, stride);
        tile_store(3, to + 3 * TILE, stride);
    }
}

INLINE void scores_block_amx(const int n_b, const uint16_t *q, int head_dim,
                             const uint8_t *keys, float *s)
{
    zero_sums_amx(n_b);
    for (int h = 0; h < head_dim; h += GROUP)
        add_dots_amx(n_b, q + h / GROUP * TILE_WORDS, keys + h / GROUP * TILE_BYTES,
                     (size_t)head_dim * TILE * sizeof *q);
    store_sums_amx(n_b, s, KEY_BLOCK * sizeof *s);
}

AVX512 static void score_keys_amx(const float *q, int n, int head_dim, const uint8_t *keys,
                                  int n_strips, float (*s)[KEY_BLOCK])
{
    _Alignas(64) uint16_t a[MAX_PACKED_HEAD / GROUP][TILE][GROUP];
    size_t strip_bytes = (size_t)head_dim * TILE * sizeof(uint16_t);
    int g = 0;
    for (int j = 0; j < n; j++)
        pack_row_avx512(q + j * head_dim, (uint32_t)head_dim, a[0][j]);
    config_amx((uint32_t)n);
    for (; n_strips - g >= 4; g += 4)
        scores_block_amx(4, a[0][0], head_dim, keys + (size_t)g * strip_bytes, s[0] + g * TILE);
    for (; g < n_strips; g++)
        scores_block_amx(1, a[0][0], head_dim, keys + (size_t)g * strip_bytes, s[0] + g * TILE);
    tile_release();
}

/* B tiles of 32 positions of which only first .. end - 1 are seen: zeros for the others, for
 * nothing may have been packed there. */
AVX512 INLINE void copy_seen_amx(const int n_b, const uint8_t *b, size_t next_b, int first,
                                 int end, uint8_t (*to)[TILE_BYTES])
{
    for (int i = 0; i < n_b; i++)
        for (int at = 0; at < GROUP; at += 2)
            _mm512_store_si512(to[i] + at / 2 * 64,
                               at >= first && at < end
                                   ? _mm512_load_si512(b + (size_t)i * next_b + at / 2 * 64)
                                   : _mm512_setzero_si512());
}

/* n_b times 16 dimensions.  Positions are added 32 by 32 as they lie packed: where a
 * query's window begins must not show in how they are grouped. */
AVX512 INLINE void mix_block_amx(const int n_b, const uint16_t *weights, const uint8_t *values,
                                 size_t next_b, int first, int end, float *to, size_t stride)
{
    _Alignas(64) uint8_t seen[4][TILE_BYTES];
    zero_sums_amx(n_b);
    for (int from = first / GROUP * GROUP; from < end; from += GROUP, weights += TILE_WORDS) {
        const uint8_t *b = values + from / 2 * 64;
        int whole = from >= first && from + GROUP <= end;
        if (!whole)
            copy_seen_amx(n_b, b, next_b, first - from, end - from, seen);
        add_dots_amx(n_b, weights, whole ? b : seen[0], whole ? next_b : TILE_BYTES);
    }
    store_sums_amx(n_b, to, stride);
}

AVX512 static void mix_values_amx(const float (*s)[KEY_BLOCK], int n, int head_dim,
                                  const uint8_t *values, int first, int n_keys, float *o)
{
    _Alignas(64) uint16_t a[KEY_BLOCK / GROUP][TILE][GROUP];
    size_t next_b = (size_t)packed_positions(head_dim) / 2 * 64;
    size_t stride = (size_t)head_dim * sizeof *o;
    int h = 0, end = first + n_keys;
    if (first % GROUP || end % GROUP)
        memset(a, 0, sizeof a);
    for (int j = 0; j < n; j++)
        for (int i = 0, at = first % GROUP; i < n_keys; i += TILE, at += TILE)
            _mm256_storeu_si256((__m256i *)(a[at / GROUP][j] + at % GROUP),
                                bf16_avx512(_mm512_loadu_ps(s[j] + i)));
    config_amx((uint32_t)n);
    for (; head_dim - h >= 4 * TILE; h += 4 * TILE, values += 4 * next_b)
        mix_block_amx(4, a[0][0], values, next_b, first, end, o + h, stride);
    for (; h < head_dim; h += TILE, values += next_b)
        mix_block_amx(1, a[0][0], values, next_b, first, end, o + h, stride);
    tile_release();
}

static const struct matrix_kernels amx_matrix = {
    .types = 1 << TYPE_BF16 | 1 << TYPE_Q8 | 1 << TYPE_Q6 | 1 << TYPE_Q4 | 1 << TYPE_Q3,
    .most_pairs = 4, .bf16_panel = bf16_panel_amx, .pack_row = pack_row_avx512,
    .pack_keys = pack_keys_avx512, .pack_values = pack_values_avx512,
    .score_keys = score_keys_amx, .mix_values = mix_values_amx};

#endif /* HAVE_AMX */

/* ---- which CPU is this ---- */

/* Register states that the operating system saves (XCR0), 0 without XSAVE. */
static uint64_t saved_states(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return a | (uint64_t)d << 32;
}

/* Bits of CPUID leaf 7: register 'b', 'c' or 'd' of subleaf 0, 'a' of subleaf 1. */
static int has_leaf7(char reg, uint32_t bits)
{
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, reg == 'a', &a, &b, &c, &d))
        return 0;
    return ((reg == 'a' ? a : reg == 'b' ? b : reg == 'c' ? c : d) & bits) == bits;
}

static int has_avx2(void) /* every CPU with AVX2 has F16C and FMA, but a hypervisor may not */
{
    unsigned a, b, c, d;
    return (saved_states() & 6) == 6 && __get_cpuid(1, &a, &b, &c, &d) && c >> 29 & 1 &&
           c >> 12 & 1 && has_leaf7('b', 1u << 5);
}

static int has_avx512(void) /* F, DQ, BW, VL; VNNI */
{
    return has_avx2() && (saved_states() & 0xe6) == 0xe6 &&
           has_leaf7('b', 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31) && has_leaf7('c', 1u << 11);
}

static int has_avxvnni(void)
{
#if defined(GEMMA2_EMULATE)
    return has_avx512();
#elif defined(HAVE_AVXVNNI)
    return has_avx2() && has_leaf7('a', 1u << 4);
#else
    return 0;
#endif
}

static int has_avx512bf16(void)
{
#ifdef HAVE_AVX512BF16
    return has_avx512() && has_leaf7('a', 1u << 5);
#else
    return 0;
#endif
}

/* Tiles need a permission of Linux for the whole process, kept until exec: it costs 8 KB of
 * state for each thread that uses them, larger signal frames, and the right to alternate
 * signal stacks too small for those.  So looking at the table only asks whether the kernel
 * knows of tiles at all; the permission is asked for when a model is opened that may use
 * them, again at each, which is harmless.  Where it is refused (some thread's alternate stack
 * is too small already, or a sandbox says no) amx keeps its other kernels. */
#ifdef HAVE_AMX
enum { GET_XCOMP_SUPP = 0x1021, REQ_XCOMP_PERM = 0x1023, XTILECFG = 17, XTILEDATA = 18 };

static int has_amx(void) /* AMX-BF16 and AMX-TILE */
{
#ifdef GEMMA2_EMULATE
    return has_avx512();
#else
    uint64_t known = 0, states = 1ull << XTILECFG | 1ull << XTILEDATA;
    return has_avx512() && has_leaf7('d', 1u << 22 | 1u << 24) &&
           (saved_states() & states) == states &&
           !syscall(SYS_arch_prctl, GET_XCOMP_SUPP, &known) && known >> XTILEDATA & 1;
#endif
}

static int may_use_tiles(void) { return !syscall(SYS_arch_prctl, REQ_XCOMP_PERM, XTILEDATA); }
#endif

/* What the instruction sets of a family have in common. */
#define AVX512_COMMON                                                                         \
    .add_lines = add_lines_avx512, .int8_tile = int8_tile_avx512,                             \
    .int8_panel = int8_panel_avx512, .tile_rows = 48,                                         \
    .quantise = quantise_avx512, .rms_norm = rms_norm_avx512, .geglu = geglu_avx512,          \
    .soft_cap = soft_cap_avx512, .exp_sum = exp_sum_avx512, .blend = blend_avx512,           \
    .to_f16 = to_f16_avx512
#define AVX2_COMMON                                                                           \
    .add_lines = add_lines_avx2, .quantise = quantise_avx2, .rms_norm = rms_norm_avx2,        \
    .tile_rows = 48,                                                                          \
    .geglu = geglu_avx2, .soft_cap = soft_cap_avx2, .exp_sum = exp_sum_avx2,                  \
    .blend = blend_avx2, .to_f16 = to_f16_avx2

#ifdef HAVE_AMX
static const struct kernels amx_kernels = {"amx", has_amx, AVX512_COMMON, .matrix = &amx_matrix};
#endif
#ifdef HAVE_AVX512BF16
static const struct kernels avx512bf16_kernels = {"avx512bf16", has_avx512bf16, AVX512_COMMON,
                                                  .matrix = &avx512bf16_matrix};
#endif
static const struct kernels avx512_kernels = {"avx512", has_avx512, AVX512_COMMON};
static const struct kernels avxvnni_kernels = {"avxvnni", has_avxvnni, AVX2_COMMON,
                                               .int8_tile = int8_tile_avxvnni,
                                               .int8_panel = int8_panel_avxvnni};
static const struct kernels avx2_kernels = {"avx2", has_avx2, AVX2_COMMON,
                                            .int8_tile = int8_tile_avx2,
                                            .int8_panel = int8_panel_avx2};

#endif /* HAVE_X86 */

#ifdef HAVE_NEON

/* ---- NEON: every 64-bit ARM, then with SDOT, then with SMMLA ----
 *
 * NEON belongs to the base of the architecture, so the functions of section 3 already come
 * out of the compiler in vectors of four; the element-wise kernels are taken from there.
 * A register holds [4 rows][4 inputs] of a step, so a group is 8 registers for each quarter
 * of a tile.  The instruction sets differ in how they sum a group: */
enum { WIDENING, SDOT, SMMLA };

/* 4 numbers of a line as floats; of bf16 those of the odd line of two or the one before. */
INLINE float32x4_t line_neon(enum line_type type, int odd, const uint8_t *line, int quarter,
                             float32x4_t scale)
{
    if (type == LINES_KEYS_Q8 || type == LINES_VALUES_Q8) {
        int16x8_t eight = vmovl_s8(vld1_s8((const int8_t *)line + quarter / 2 * 8));
        int16x4_t four = quarter % 2 ? vget_high_s16(eight) : vget_low_s16(eight);
        return vmulq_f32(vcvtq_f32_s32(vmovl_s16(four)), scale);
    }
    if (type == LINES_F16)
        return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)line + quarter * 4)));
    uint32x4_t w = vld1q_u32((const uint32_t *)line + quarter * 4);
    if (type == LINES_BF16)
        w = odd ? vandq_u32(w, vdupq_n_u32(0xffff0000)) : vshlq_n_u32(w, 16);
    return vreinterpretq_f32_u32(w);
}

/* Line k of the strips into acc[row][strip][quarter]. */
INLINE void add_line_neon(enum line_type type, int odd, const int n, const int strips,
                          const struct lines *l, int k, const float *x, size_t ldx,
                          float32x4_t scale[4][4], float32x4_t acc[4][4][4])
{
    const uint8_t *line = l->data + (size_t)k / (type == LINES_BF16 ? 2 : 1) * l->line_bytes;
    for (int i = 0; i < strips; i++, line += l->strip_bytes) {
        if (n == 1 && !odd)
            __builtin_prefetch(line + l->prefetch);
        for (int quarter = 0; quarter < 4; quarter++) {
            float32x4_t w = line_neon(type, odd, line, quarter, scale[i][quarter]);
            for (int j = 0; j < n; j++)
                acc[j][i][quarter] = vfmaq_n_f32(acc[j][i][quarter], w,
                                                 x[(size_t)j * ldx + (size_t)k]);
        }
    }
}

INLINE void cache_scales_neon(enum line_type type, const struct lines *l, int i, int k,
                              float32x4_t scale[4])
{
    const uint16_t *from = scales_of(type, l, l->data + i * l->strip_bytes, l->strip + i, k);
    for (int quarter = 0; quarter < 4; quarter++)
        scale[quarter] = vcvt_f32_f16(vreinterpret_f16_u16(
            type == LINES_KEYS_Q8 ? vld1_u16(from + quarter * 4) : vdup_n_u16(*from)));
}

INLINE void lines_neon(enum line_type type, const int n, const int strips, const struct lines *l,
                       const float *x, size_t ldx, float *y, size_t ldy)
{
    float32x4_t acc[4][4][4], scale[4][4] = {{vdupq_n_f32(0)}};
    for (int j = 0; j < n; j++)
        for (int i = 0; i < 4 * strips; i++)
            acc[j][i / 4][i % 4] = l->go_on ? vld1q_f32(y + (size_t)j * ldy + i * 4)
                                            : vdupq_n_f32(0);
    for (int k = 0; k < l->n_lines; k += 1 + (type == LINES_BF16)) {
        for (int i = 0; has_new_scales(type, k) && i < strips; i++)
            cache_scales_neon(type, l, i, k, scale[i]);
        add_line_neon(type, 0, n, strips, l, k, x, ldx, scale, acc);
        if (type == LINES_BF16 && k + 1 < l->n_lines)
            add_line_neon(type, 1, n, strips, l, k + 1, x, ldx, scale, acc);
    }
    for (int j = 0; j < n; j++)
        for (int i = 0; i < 4 * strips; i++)
            vst1q_f32(y + (size_t)j * ldy + i * 4, acc[j][i / 4][i % 4]);
}

static void add_lines_neon(const struct lines *l, const float *x, size_t ldx, int n, float *y,
                           size_t ldy)
{
    lines_by_type(lines_neon, 4, l, x, ldx, n, y, ldy);
}

/* q3: three bits of each nibble and the group bit, 4 where odd, are an index; the fourth bits, put
 * together in raw[3], are the nibbles of steps 6 and 7. */
INLINE void operands_q3_neon(const uint8_t *group, int32x4_t odd, int8x16_t w[8])
{
    const uint8x16_t book = vreinterpretq_u8_s32(vmulq_n_s32(odd, 0x02020202));
    const uint8x16_t low = vdupq_n_u8(7);
    const int8x16_t codebooks = vld1q_s8(CODEBOOKS_Q3);
    uint8x16_t raw[4];
    for (int o = 0; o < 3; o++)
        raw[o] = vld1q_u8(group + o * 64);
    raw[3] = vbslq_u8(vdupq_n_u8(0x11), vshrq_n_u8(raw[0], 3), vshrq_n_u8(raw[1], 2));
    raw[3] = vbslq_u8(vdupq_n_u8(0x33), raw[3], vshrq_n_u8(raw[2], 1));
    for (int i = 0; i < 8; i++) {
        uint8x16_t nibble = i % 2 ? vshrq_n_u8(raw[i / 2], 4) : raw[i / 2];
        w[i] = vqtbl1q_s8(codebooks, vbslq_u8(low, nibble, book));
    }
}

/* Rows 4 quarter .. 4 quarter + 3 of a group as 8 registers of [4 rows][4 inputs], signed;
 * q4 without what odd adds. */
INLINE void operands_neon(uint32_t type, const uint8_t *group, int32x4_t odd, int quarter,
                          int8x16_t w[8])
{
    const int8x16_t codebook = vld1q_s8(CODEBOOK);
    group += quarter * 16;
    for (int i = 0; i < 8 && type == TYPE_Q8; i++)
        w[i] = vreinterpretq_s8_u8(vld1q_u8(group + i * 64));
    if (type == TYPE_Q3)
        operands_q3_neon(group, odd, w);
    for (int o = 0; o < 4 && type == TYPE_Q4; o++) {
        uint8x16_t raw = vld1q_u8(group + o * 64);
        w[2 * o] = vqtbl1q_s8(codebook, vandq_u8(raw, vdupq_n_u8(15)));
        w[2 * o + 1] = vqtbl1q_s8(codebook, vshrq_n_u8(raw, 4));
    }
    /* A q6 value less 32 is its 6 bits with the highest flipped, read as signed: they are
     * put together at the top of a byte, which an arithmetic shift then brings down. */
    for (int o = 0; o < 2 && type == TYPE_Q6; o++) {
        uint8x16_t high = veorq_u8(vld1q_u8(group + 256 + o * 64), vdupq_n_u8(0xaa));
        uint8x16_t moved[4] = {vshlq_n_u8(high, 6), vshlq_n_u8(high, 4), vshlq_n_u8(high, 2), high};
        for (int j = 0; j < 4; j++) {
            uint8x16_t low = vld1q_u8(group + (2 * o + j / 2) * 64);
            low = vsriq_n_u8(moved[j], j % 2 ? low : vshlq_n_u8(low, 4), 2);
            w[4 * o + j] = vshrq_n_s8(vreinterpretq_s8_u8(low), 2);
        }
    }
}

/* 16 bytes as integers, a register for each quarter. */
INLINE void widen_neon(int is_signed, uint8x16_t bytes, int32x4_t y[4])
{
    for (int i = 0; i < 2; i++) {
        uint8x8_t half = i ? vget_high_u8(bytes) : vget_low_u8(bytes);
        int16x8_t wide = is_signed ? vmovl_s8(vreinterpret_s8_u8(half))
                                   : vreinterpretq_s16_u16(vmovl_u8(half));
        y[2 * i] = vmovl_s16(vget_low_s16(wide));
        y[2 * i + 1] = vmovl_s16(vget_high_s16(wide));
    }
}

/* Group scales of 16 rows as floats, and 4 for rows whose group bit is 1: what q4 adds. */
INLINE void scales_neon(uint32_t type, const uint8_t *bytes, float32x4_t s[4], int32x4_t odd[4])
{
    uint8x16_t raw = vld1q_u8(bytes);
    int32x4_t whole[4];
    widen_neon(0, vandq_u8(vshlq_n_u8(raw, 2), vdupq_n_u8(has_group_bit(type) ? 4 : 0)), odd);
    if (has_group_bit(type))
        raw = vreinterpretq_u8_s8(vshrq_n_s8(vreinterpretq_s8_u8(raw), 1));
    widen_neon(type != TYPE_Q8, raw, whole);
    for (int i = 0; i < 4; i++)
        s[i] = vcvtq_f32_s32(whole[i]);
}

/* Sums without SDOT go through 16 bits: a whole group of q6, q4 or q3 fits (8 * 32 * 127), but
 * only two steps of q8 (2 * 128 * 127). */
INLINE int32x4_t widening_sum(uint32_t type, const int8x16_t w[8], const int8x16_t x[2])
{
    int32x4_t sum[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
    int16x8_t part[2] = {vdupq_n_s16(0), vdupq_n_s16(0)};
    UNROLL
    for (int step = 0; step < 8; step++) {
        int32x4_t four = vreinterpretq_s32_s8(x[step / 4]);
        int8x16_t q = vreinterpretq_s8_s32(vdupq_n_s32(four[step % 4]));
        part[0] = vmlal_s8(part[0], vget_low_s8(w[step]), vget_low_s8(q));
        part[1] = vmlal_high_s8(part[1], w[step], q);
        for (int i = 0; i < 2 && (type == TYPE_Q8 ? step % 2 : step == 7); i++) {
            sum[i] = vpadalq_s16(sum[i], part[i]);
            part[i] = vdupq_n_s16(0);
        }
    }
    return vpaddq_s32(sum[0], sum[1]);
}

/* An instruction by its number, because assemblers take SDOT and SMMLA by name only in
 * functions whose -march has them, and such functions cannot inline the others under every
 * -march a user may choose.  The symbols turn "v7", as a register is printed, into 7. */
#define DOT_INSTRUCTION(number, acc, a, b)                                                     \
    __asm__(".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27," \
            "28,29,30,31\n.equ number_v\\n,\\n\n.endr\n"                                       \
            ".inst " #number " | number_%2 << 16 | number_%1 << 5 | number_%0"                 \
            : "+w"(acc) : "w"(a), "w"(b))

/* acc + the products of a step: 4 rows with the 4 inputs from x[4 lane] on. */
INLINE int32x4_t sdot(int32x4_t acc, int8x16_t w, int8x16_t x, int lane)
{
    switch (lane) {
    case 0: DOT_INSTRUCTION(0x4f80e000, acc, w, x); break;
    case 1: DOT_INSTRUCTION(0x4fa0e000, acc, w, x); break;
    case 2: DOT_INSTRUCTION(0x4f80e800, acc, w, x); break;
    default: DOT_INSTRUCTION(0x4fa0e800, acc, w, x); break;
    }
    return acc;
}

/* acc[token][row] + the products of 8 inputs: x[2 tokens][8] with w[2 rows][8]. */
INLINE int32x4_t smmla(int32x4_t acc, int8x16_t x, int8x16_t w)
{
    DOT_INSTRUCTION(0x4e80a400, acc, x, w);
    return acc;
}

/* The halves of a and b that are `high` or not, joined. */
INLINE int8x16_t join_neon(int high, int8x16_t a, int8x16_t b)
{
    int64x2_t a2 = vreinterpretq_s64_s8(a), b2 = vreinterpretq_s64_s8(b);
    return vreinterpretq_s8_s64(high ? vzip2q_s64(a2, b2) : vzip1q_s64(a2, b2));
}

/* The inputs of a group for n <= 4 tokens (a constant): two registers a token, in SMMLA's
 * case four for a pair of tokens, each [2 tokens][8 inputs]. */
INLINE void inputs_neon(const int sums, const int n, const int8_t *q, size_t ldq, int8x16_t x[8])
{
    for (int j = 0; j < n; j++)
        for (int i = 0; i < 2; i++)
            x[2 * j + i] = vld1q_s8(q + (size_t)j * ldq + i * 16);
    for (int j = 0; j < n && sums == SMMLA; j += 2) {
        int8x16_t *pair = x + 2 * j;
        int8x16_t other[2] = {pair[n > 1 ? 2 : 0], pair[n > 1 ? 3 : 1]};
        pair[3] = join_neon(1, pair[1], other[1]);
        pair[2] = join_neon(0, pair[1], other[1]);
        pair[1] = join_neon(1, pair[0], other[0]);
        pair[0] = join_neon(0, pair[0], other[0]);
    }
}

/* sum[token][row] over a group of v * q, for n tokens (a constant) and 4 rows.  SMMLA takes
 * w as 4 pairs of registers: [2 rows][8 inputs] of rows 0 and 1, then of rows 2 and 3. */
INLINE void group_sums_neon(const int sums, uint32_t type, const int n, const int8x16_t w[8],
                            const int8x16_t x[8], int32x4_t sum[4])
{
    for (int j = 0; j < n && sums == WIDENING; j++)
        sum[j] = widening_sum(type, w, x + 2 * j);
    for (int j = 0; j < n && sums == SDOT; j++) {
        sum[j] = vdupq_n_s32(0);
        UNROLL
        for (int step = 0; step < 8; step++)
            sum[j] = sdot(sum[j], w[step], x[2 * j + step / 4], step % 4);
    }
    for (int j = 0; j < n && sums == SMMLA; j += 2) {
        int32x4_t low = vdupq_n_s32(0), high = low;
        UNROLL
        for (int i = 0; i < 4; i++) {
            low = smmla(low, x[2 * j + i], w[2 * i]);
            high = smmla(high, x[2 * j + i], w[2 * i + 1]);
        }
        int8x16_t low8 = vreinterpretq_s8_s32(low), high8 = vreinterpretq_s8_s32(high);
        sum[j] = vreinterpretq_s32_s8(join_neon(0, low8, high8));
        sum[j + 1] = vreinterpretq_s32_s8(join_neon(1, low8, high8));
    }
}

/* acc + x_scale * float(s * sum), rounded once.  Both factors of s * sum are exact floats, so
 * the rounded float product is the rounded integer product. */
INLINE float32x4_t add_group_neon(float32x4_t acc, float32x4_t s, int32x4_t sum, float x_scale)
{
    return vfmaq_n_f32(acc, vmulq_f32(s, vcvtq_f32_s32(sum)), x_scale);
}

/* A group of a tile, and what n tokens hold against it. */
struct neon_group {
    const uint8_t *weights;
    float32x4_t s[4];
    int32x4_t odd[4];
    int8x16_t x[8];
};

/* A quarter of the group into acc[token][quarter]; at is its index in the first token. */
INLINE void add_quarter_neon(const int sums, uint32_t type, const int n,
                             const struct neon_group *g, int quarter, const struct input *in,
                             size_t at, float32x4_t acc[4][4])
{
    int8x16_t w[8];
    int32x4_t sum[4];
    operands_neon(type, g->weights, g->odd[quarter], quarter, w);
    group_sums_neon(sums, type, n, w, g->x, sum);
    for (int j = 0; j < n; j++, at += in->ldq / GROUP) {
        if (type == TYPE_Q4)
            sum[j] = vmlaq_n_s32(sum[j], g->odd[quarter], in->sum[at]);
        acc[j][quarter] = add_group_neon(acc[j][quarter], g->s[quarter], sum[j], in->scale[at]);
    }
}

INLINE void tile_neon(const int sums, const uint32_t type, const int n, const struct tiles *w,
                      const struct input *in, size_t t, float *y)
{
    const uint8_t *tile = w->data[0];
    size_t n_groups = round_up(w->cols, BLOCK_INPUTS) / GROUP, at = t * (in->ldq / GROUP);
    float32x4_t acc[4][4];
    for (int j = 0; j < n; j++)
        for (int i = 0; i < 4; i++)
            acc[j][i] = vdupq_n_f32(0);
    for (size_t i = 0; i < n_groups; i++, at++) {
        const uint8_t *scale_bytes;
        struct neon_group g;
        g.weights = group_at(type, tile, i, &scale_bytes);
        for (uint32_t line = 0; n == 1 && line < types[type].group_bytes; line += 64)
            __builtin_prefetch(g.weights + line + PREFETCH_AHEAD);
        scales_neon(type, scale_bytes, g.s, g.odd);
        inputs_neon(sums, n, in->q + at * GROUP, in->ldq, g.x);
        if (n == 1) { /* all in registers; more tokens would not fit */
            UNROLL
            for (int quarter = 0; quarter < 4; quarter++)
                add_quarter_neon(sums, type, n, &g, quarter, in, at, acc);
        } else
            for (int quarter = 0; quarter < 4; quarter++)
                add_quarter_neon(sums, type, n, &g, quarter, in, at, acc);
    }
    for (int j = 0; j < n; j++)
        for (int i = 0; i < 4; i++)
            vst1q_f32(y + j * TILE + i * 4,
                      vmulq_f32(acc[j][i], vld1q_f32((const float *)tile + i * 4)));
}

static void int8_tile_neon(const struct tiles *w, const struct input *in, size_t t, int n, float *y)
{
    tile_by_type(tile_neon, WIDENING, 4, w, in, t, n, y);
}

static void int8_tile_dotprod(const struct tiles *w, const struct input *in, size_t t, int n,
                              float *y)
{
    tile_by_type(tile_neon, SDOT, 4, w, in, t, n, y);
}

/* Two tiles' 256 inputs, unpacked. */
struct panel_block {
    int8_t operands[8][8][8][16]; /* [group][tile, quarter][step][4 rows][4 inputs] */
    float scales[8][8][4];
};

INLINE void unpack_panel_neon(const int sums, const uint32_t type, const struct tiles *w,
                              size_t block, struct panel_block *b)
{
    for (int g = 0; g < 8; g++)
        for (int i = 0; i < 8; i++) { /* tile i / 4, quarter i % 4 */
            const uint8_t *scale_bytes, *group;
            float32x4_t s[4];
            int32x4_t odd[4];
            int8x16_t v[8];
            group = group_at(type, w->data[i / 4], block * 8 + (size_t)g, &scale_bytes);
            scales_neon(type, scale_bytes, s, odd);
            operands_neon(type, group, odd[i % 4], i % 4, v);
            for (int step = 0; step < 8 && type == TYPE_Q4; step++)
                v[step] = vaddq_s8(v[step], vreinterpretq_s8_s32(vmulq_n_s32(odd[i % 4],
                                                                             0x01010101)));
            for (int step = 0; step < 8 && sums == SMMLA; step += 2) {
                int32x4_t first = vreinterpretq_s32_s8(v[step]);
                int32x4_t second = vreinterpretq_s32_s8(v[step + 1]);
                v[step] = vreinterpretq_s8_s32(vzip1q_s32(first, second));
                v[step + 1] = vreinterpretq_s8_s32(vzip2q_s32(first, second));
            }
            for (int step = 0; step < 8; step++)
                vst1q_s8(b->operands[g][i][step], v[step]);
            vst1q_f32(b->scales[g][i], s[i % 4]);
        }
}

/* Four tokens' inputs and a quarter's operands fill half the registers and are used four times
 * (SMMLA: twice, for twice the products) a load. */
INLINE void panel_tokens_neon(const int sums, const uint32_t type, const int n,
                              const struct panel_block *b, const struct input *in, size_t t,
                              size_t block, float (*y)[2][TILE])
{
    size_t ld = in->ldq / GROUP, at = t * ld + block * 8;
    for (size_t g = 0; g < 8; g++, at++) {
        int8x16_t x[8], w[8];
        int32x4_t sum[4];
        inputs_neon(sums, n, in->q + at * GROUP, in->ldq, x);
        for (int i = 0; i < 8; i++) {
            UNROLL
            for (int step = 0; step < 8; step++)
                w[step] = vld1q_s8(b->operands[g][i][step]);
            group_sums_neon(sums, type, n, w, x, sum);
            for (int j = 0; j < n; j++) {
                float *to = y[j][i / 4] + i % 4 * 4;
                vst1q_f32(to, add_group_neon(vld1q_f32(to), vld1q_f32(b->scales[g][i]), sum[j],
                                             in->scale[at + (size_t)j * ld]));
            }
        }
    }
}

static void int8_panel_neon(const struct tiles *w, const struct input *in, size_t t, int n,
                            float *y)
{
    struct panel_block b;
    panel_by_type(unpack_panel_neon, panel_tokens_neon, WIDENING, 4, &b, w, in, t, n, y);
}

static void int8_panel_dotprod(const struct tiles *w, const struct input *in, size_t t, int n,
                               float *y)
{
    struct panel_block b;
    panel_by_type(unpack_panel_neon, panel_tokens_neon, SDOT, 4, &b, w, in, t, n, y);
}

static void int8_panel_i8mm(const struct tiles *w, const struct input *in, size_t t, int n,
                            float *y)
{
    struct panel_block b;
    panel_by_type(unpack_panel_neon, panel_tokens_neon, SMMLA, 4, &b, w, in, t, n, y);
}

/* ---- which ARM is this ---- */

/* A feature of this CPU: its bit of Linux' AT_HWCAP or AT_HWCAP2, its name in macOS, its
 * number in Windows. */
static int has_feature(int second, int bit, const char *name, unsigned number)
{
    (void)second, (void)bit, (void)name, (void)number;
#if defined(__linux__)
    return getauxval(second ? AT_HWCAP2 : AT_HWCAP) >> bit & 1;
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return !sysctlbyname(name, &has, &size, NULL, 0) && has;
#elif defined(_WIN32)
    return !!IsProcessorFeaturePresent(number);
#else
    return 0;
#endif
}

static int has_dotprod(void)
{
    int told = 0; /* the compiler, by -march: then it may use it anywhere */
#ifdef __ARM_FEATURE_DOTPROD
    told = 1;
#endif
    return told || has_feature(0, 20, "hw.optional.arm.FEAT_DotProd", 43);
}

static int has_i8mm(void)
{
    int told = 0;
#ifdef __ARM_FEATURE_MATMUL_INT8
    told = 1;
#endif
    return has_dotprod() && (told || has_feature(1, 13, "hw.optional.arm.FEAT_I8MM", 66));
}

#define NEON_COMMON                                                                           \
    .add_lines = add_lines_neon, .quantise = quantise, .rms_norm = rms_norm, .geglu = geglu,  \
    .tile_rows = 8,                                                                           \
    .soft_cap = soft_cap, .exp_sum = exp_sum, .blend = blend, .to_f16 = to_f16

static const struct kernels i8mm_kernels = {"i8mm", has_i8mm, NEON_COMMON,
                                            .int8_tile = int8_tile_dotprod,
                                            .int8_panel = int8_panel_i8mm};
static const struct kernels dotprod_kernels = {"dotprod", has_dotprod, NEON_COMMON,
                                               .int8_tile = int8_tile_dotprod,
                                               .int8_panel = int8_panel_dotprod};
static const struct kernels neon_kernels = {"neon", always, NEON_COMMON,
                                            .int8_tile = int8_tile_neon,
                                            .int8_panel = int8_panel_neon};

#endif /* HAVE_NEON */

/* ---- SHA-256 by instructions: two or four rounds each, the words of four rounds in a register.
 * The same digest as in section 9. ---- */

#ifdef HAVE_X86
/* The state lies as the instructions want it: a b e f and c d g h, the last in lane 0. */
__attribute__((target("sha,ssse3,sse4.1")))
static void sha256_blocks_x86(uint32_t h[8], const uint8_t *p, size_t n)
{
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    __m128i abef = _mm_set_epi32((int)h[0], (int)h[1], (int)h[4], (int)h[5]);
    __m128i cdgh = _mm_set_epi32((int)h[2], (int)h[3], (int)h[6], (int)h[7]);
    for (; n; n--, p += 64) {
        __m128i w[4], abef_before = abef, cdgh_before = cdgh;
        for (int i = 0; i < 4; i++)
            w[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(p + 16 * i)), swap);
        for (int i = 0; i < 16; i++) {
            __m128i *now = &w[i % 4], last = w[(i + 3) % 4];
            __m128i kw = _mm_add_epi32(*now, _mm_loadu_si128((const __m128i *)&sha256_k[4 * i]));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, kw);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(kw, 0x0e));
            __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(*now, w[(i + 1) % 4]),
                                        _mm_alignr_epi8(last, w[(i + 2) % 4], 4));
            *now = _mm_sha256msg2_epu32(sum, last);
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    uint32_t lanes[8];
    _mm_storeu_si128((__m128i *)lanes, abef);
    _mm_storeu_si128((__m128i *)(lanes + 4), cdgh);
    h[0] = lanes[3], h[1] = lanes[2], h[4] = lanes[1], h[5] = lanes[0];
    h[2] = lanes[7], h[3] = lanes[6], h[6] = lanes[5], h[7] = lanes[4];
}
#elif defined(HAVE_NEON) && \
    (!defined(__clang__) || __clang_major__ >= 16 || defined(__ARM_FEATURE_SHA2))
#define HAVE_NEON_SHA2 1 /* older ones know the instructions only where all code may use them */
#ifdef __clang__
#define SHA2 __attribute__((target("sha2")))
#else
#define SHA2 __attribute__((target("+crypto")))
#endif
SHA2 static void sha256_blocks_neon(uint32_t h[8], const uint8_t *p, size_t n)
{
    uint32x4_t abcd = vld1q_u32(h), efgh = vld1q_u32(h + 4);
    for (; n; n--, p += 64) {
        uint32x4_t w[4], abcd_before = abcd, efgh_before = efgh;
        for (int i = 0; i < 4; i++)
            w[i] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(p + 16 * i)));
        for (int i = 0; i < 16; i++) {
            uint32x4_t *now = &w[i % 4], old = abcd;
            uint32x4_t kw = vaddq_u32(*now, vld1q_u32(&sha256_k[4 * i]));
            abcd = vsha256hq_u32(abcd, efgh, kw);
            efgh = vsha256h2q_u32(efgh, old, kw);
            *now = vsha256su1q_u32(vsha256su0q_u32(*now, w[(i + 1) % 4]), w[(i + 2) % 4],
                                   w[(i + 3) % 4]);
        }
        abcd = vaddq_u32(abcd, abcd_before);
        efgh = vaddq_u32(efgh, efgh_before);
    }
    vst1q_u32(h, abcd), vst1q_u32(h + 4, efgh);
}
#endif

/* NULL where this CPU has no such instructions. */
static sha256_fn *fast_sha256(void)
{
#ifdef HAVE_X86
    unsigned a, b, c, d; /* SSSE3 and SSE4.1 come with every CPU that has SHA */
    if (__get_cpuid(1, &a, &b, &c, &d) && c >> 9 & c >> 19 & 1 && has_leaf7('b', 1u << 29))
        return sha256_blocks_x86;
#elif defined(HAVE_NEON_SHA2)
    if (has_feature(0, 6, "hw.optional.armv8_crypto", 30))
        return sha256_blocks_neon;
#endif
    return NULL;
}

/* The best instruction set this CPU has, or the one that GEMMA2_ISA names. */
static const struct kernels *select_kernels(struct errbuf *err)
{
    const char *name = getenv("GEMMA2_ISA");
    if (name && !strcmp(name, "reference"))
        name = "scalar"; /* the rest of a pass: scores, importance */
    for (int i = 0; i < N_KERNELS; i++)
        if (name && *name ? !strcmp(name, all_kernels[i]->name) : all_kernels[i]->available()) {
            if (all_kernels[i]->available())
                return all_kernels[i];
            err->code = GEMMA2_ERR_ARGUMENT;
            fail(err, "GEMMA2_ISA=%s: this CPU does not have these instructions", name);
            return NULL;
        }
    err->code = GEMMA2_ERR_ARGUMENT;
    fail(err, "GEMMA2_ISA=%s: this build knows no such instruction set", name);
    return NULL;
}

static const struct matrix_kernels *permitted_matrix(const struct matrix_kernels *wanted)
{
#ifdef HAVE_AMX
    if (wanted == &amx_matrix && !may_use_tiles())
        return NULL;
#endif
    return wanted;
}
