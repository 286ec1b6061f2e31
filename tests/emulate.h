/* AMX in C, and AVX-VNNI as AVX-512 encodes it, for CPUs that lack them: include this before
 * gemma2.c.  The tests that do run the "amx" and "avxvnni" rows on any CPU with AVX-512.  What
 * is undefined or faults on a real CPU (an instruction of AMX without a configuration, a shape
 * that does not fit) ends the program. */
#ifndef GEMMA2_TESTS_EMULATE_H
#define GEMMA2_TESTS_EMULATE_H

#define GEMMA2_EMULATE 1
#define VPDPBUSD "vpdpbusd"
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE
#endif
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

struct tile_shapes; /* 64 bytes, in gemma2.c */

static _Thread_local struct {
    _Alignas(64) uint8_t data[8][16][64];
    int row_bytes[8], rows[8]; /* 0: not configured */
} amx;
static _Thread_local int tiles_in_use;

/* Linux: arch_prctl, for which the tests answer. */
static int tiles_refused, tiles_asked_for;

static long emulated_syscall(long number, int code, long feature)
{
    tiles_asked_for += number == SYS_arch_prctl && code == 0x1023 && feature == 18;
    return tiles_refused ? -1 : 0;
}
#define syscall emulated_syscall

static void require(int ok, const char *what)
{
    if (!ok)
        printf("FAIL AMX: %s\n", what), abort();
}

/* LDTILECFG.  A configuration of all zeros would release. */
static void tile_config(const struct tile_shapes *shapes)
{
    uint8_t bytes[64];
    memcpy(bytes, shapes, 64);
    require(bytes[0] == 1 && !bytes[1], "palette 1 is what there is");
    for (int i = 2; i < 16; i++)
        require(!bytes[i], "reserved bytes are zero");
    memset(&amx, 0, sizeof amx);
    for (int i = 0; i < 16; i++) {
        int row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8, rows = bytes[48 + i];
        require(row_bytes <= 64 && rows <= 16 && !row_bytes == !rows, "a tile's shape");
        require(i < 8 || !rows, "there are 8 tiles");
        if (i < 8)
            amx.row_bytes[i] = row_bytes, amx.rows[i] = rows;
    }
    require(!tiles_in_use++, "released before it is configured again");
}

static void tile_release(void)
{
    require(tiles_in_use-- == 1, "configured before it is released");
    memset(&amx, 0, sizeof amx);
}

static void tile_zero(int c)
{
    require(amx.rows[c], "zeroing a configured tile");
    memset(amx.data[c], 0, sizeof amx.data[c]);
}

static void tile_load(int a, const void *from, size_t stride)
{
    require(amx.rows[a], "loading a configured tile");
    memset(amx.data[a], 0, sizeof amx.data[a]);
    for (int r = 0; r < amx.rows[a]; r++)
        memcpy(amx.data[a][r], (const uint8_t *)from + (size_t)r * stride,
               (size_t)amx.row_bytes[a]);
}

static void tile_store(int c, void *to, size_t stride)
{
    require(amx.rows[c], "storing a configured tile");
    for (int r = 0; r < amx.rows[c]; r++)
        memcpy((uint8_t *)to + (size_t)r * stride, amx.data[c][r], (size_t)amx.row_bytes[c]);
}

static inline __attribute__((always_inline)) float float_from(uint16_t bf16)
{
    uint32_t bits = (uint32_t)bf16 << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline __attribute__((always_inline)) float flushed(float x) /* denormals are zeros */
{
    return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0, x) : x;
}

/* TDPBF16PS: for each element a sum of the even inputs' products and one of the odd ones',
 * in fused steps from zero on; their sum is added to the tile (Intel's manual, Operation). */
__attribute__((target("avx512f")))
static void tile_dot_bf16(int c, int a, int b)
{
    int n_pairs = amx.row_bytes[a] / 4, n_rows = amx.rows[c], n_cols = amx.row_bytes[c] / 4;
    require(n_pairs && n_rows && amx.rows[b] && c != a && a != b && b != c, "three tiles");
    require(n_rows == amx.rows[a] && n_pairs == amx.rows[b] && n_cols * 4 == amx.row_bytes[b],
            "shapes that fit");
    float x[16][16][2], w[16][2][16], row[16];
    for (int r = 0; r < 16; r++) /* beyond a tile's shape lie zeros */
        for (int i = 0; i < 16; i++)
            for (int odd = 0; odd < 2; odd++) {
                uint16_t from_a, from_b;
                memcpy(&from_a, amx.data[a][r] + 4 * i + 2 * odd, 2);
                memcpy(&from_b, amx.data[b][r] + 4 * i + 2 * odd, 2);
                x[r][i][odd] = flushed(float_from(from_a));
                w[r][odd][i] = flushed(float_from(from_b));
            }
    for (int m = 0; m < n_rows; m++) {
        float even[16] = {0}, odd[16] = {0};
        for (int k = 0; k < n_pairs; k++)
            for (int i = 0; i < 16; i++) {
                even[i] = flushed(__builtin_fmaf(x[m][k][0], w[k][0][i], even[i]));
                odd[i] = flushed(__builtin_fmaf(x[m][k][1], w[k][1][i], odd[i]));
            }
        memcpy(row, amx.data[c][m], sizeof row);
        for (int i = 0; i < n_cols; i++)
            row[i] = flushed(flushed(row[i]) + flushed(even[i] + odd[i]));
        memcpy(amx.data[c][m], row, sizeof row);
    }
}
#endif
#endif
