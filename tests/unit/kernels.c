/* Section 3, the kernels: the specification against libm, then every row against it. */

/* |y - x| in units of the last place of a float near x. */
static double ulps(float y, double x)
{
    int e;
    frexp(x, &e);
    return fabs((double)y - x) / ldexp(1, (e < -125 ? -125 : e) - 24);
}

/* Largest error over the floats from `low` to `high` (bits), every step-th. */
static double sweep(float (*f)(float), double (*truth)(double), uint32_t low, uint32_t high,
                    uint32_t step)
{
    double worst = 0;
#ifdef _OPENMP
#pragma omp parallel for reduction(max : worst)
#endif
    for (uint32_t bits = low; bits <= high - step; bits += step) {
        float x = float_of(bits);
        double error = ulps(f(x), truth((double)x));
        worst = error > worst ? error : worst;
    }
    return worst;
}

static float call_exp(float x) { return exp_f32(x); }
static float call_tanh(float x) { return tanh_f32(x); }

static void test_exp_tanh_error(void)
{
    uint32_t step = full_test() ? 1 : 499;
    double up = sweep(call_exp, exp, bits_of(1e-30f), bits_of(88.4f), step);
    double down = sweep(call_exp, exp, bits_of(-1e-30f), bits_of(-87.3f), step);
    double near = sweep(call_tanh, tanh, 1, bits_of(0.625f), step);
    double far = sweep(call_tanh, tanh, bits_of(0.625f) - step, bits_of(20.0f), step);
    check(up < 1.5 && down < 1.5, "exp is off by %.3f and %.3f ulp", up, down);
    check(near < 3 && far < 3, "tanh is off by %.3f and %.3f ulp", near, far);
    if (full_test())
        printf("largest errors in ulp: exp %.4f above 0, %.4f below; tanh %.4f below 0.625, %.4f "
               "above\n", up, down, near, far);
}

static void test_exp_tanh_ends(void)
{
    check(exp_f32(0.0f) == 1 && exp_f32(-0.0f) == 1 && exp_f32(1e-45f) == 1, "exp near 0");
    check(exp_f32(-INFINITY) == 0 && exp_f32(-87.4f) == 0 && exp_f32(-3e38f) == 0, "exp far below");
    check(exp_f32(-87.3f) >= 0x1p-126f, "exp(-87.3) is no denormal");
    check(exp_f32(88.5f) >= 2.4e38f && exp_f32(INFINITY) >= 2.4e38f, "exp far above");
    check(isfinite(exp_f32(INFINITY)), "exp of infinity is finite");
    check(isnan(exp_f32(NAN)) && isnan(exp_f32(-NAN)), "exp of NaN");
    check(tanh_f32(INFINITY) == 1 && tanh_f32(-INFINITY) == -1 && tanh_f32(-3e38f) == -1,
          "tanh ends");
    check(tanh_f32(0.0f) == 0 && tanh_f32(-0.0f) == 0, "tanh of zeros");
    check(tanh_f32(1e-45f) == 1e-45f && tanh_f32(-1e-40f) == -1e-40f, "tanh of denormals");
    check(isnan(tanh_f32(NAN)) && isnan(tanh_f32(-NAN)), "tanh of NaN");
    int bad = 0;
    for (uint32_t i = 0; i < 200000; i++) {
        float x = uniform(-25, 25);
        bad += tanh_f32(-x) != -tanh_f32(x) || fabsf(tanh_f32(x)) > 1;
    }
    check_none(bad, "tanh is odd and within 1");
}

/* A half's value, in double. */
static double half_value(uint32_t h)
{
    int e = h >> 10 & 31, m = h & 1023;
    double x = e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
    return h >> 15 ? -x : x;
}

static void test_halves(void)
{
    int bad = 0, bad_ties = 0;
    for (uint32_t h = 0; h < 1 << 16; h++) {
        float x = from_f16((uint16_t)h);
        if ((h & 0x7c00) == 0x7c00) {
            bad += h & 1023 ? !isnan(x) : !isinf(x);
            continue;
        }
        bad += (double)x != half_value(h) || f16_of(x) != h;
        if ((h & 0x7fff) == 0x7bff)
            continue;
        float middle = (float)((half_value(h) + half_value(h + 1)) / 2); /* exact in float */
        float out = float_of(bits_of(middle) + 1), in = float_of(bits_of(middle) - 1);
        bad_ties += f16_of(middle) != h + (h & 1) || f16_of(out) != h + 1 || f16_of(in) != h;
    }
    check_none(bad, "halves to float and back");
    check_none(bad_ties, "halves at their rounding boundaries");
    check(f16_of(65519.9f) == 0x7bff && f16_of(65520) == 0x7bff && f16_of(1e30f) == 0x7bff &&
              f16_of(-INFINITY) == 0xfbff, "halves saturate");
    check(isnan(from_f16(f16_of(NAN))), "half of NaN");
    check(f16_of(0x1p-25f) == 0 && f16_of(0x1.000002p-25f) == 1 && f16_of(-1e-40f) == 0x8000,
          "halves near zero");
}

static void test_log_and_angles(void)
{
    int bad = 0;
    for (int i = 0; i < 100000; i++) {
        double x = ldexp(1 + (double)rnd() / 0x1p32, (int)below(1200) - 600);
        bad += fabs(log_f64(x) - log(x)) > 1e-15 + 4e-16 * fabs(log(x));
    }
    check(log_f64(1) == 0 && bad == 0, "log: %d wrong", bad);
    bad = 0;
    for (int i = 0; i < 100000; i++) {
        double x = ldexp((double)rnd() - 0x1p31, (int)below(20) - 41);
        bad += fabs(exp_f64(x) / exp(x) - 1) > 5e-16;
    }
    check(exp_f64(0) == 1 && bad == 0, "exp in double: %d wrong", bad);
    bad = 0;
    for (int i = 0; i < 200000; i++) {
        double x = i < 1000 ? i : ldexp((double)rnd(), (int)below(30) - 41);
        float c, s;
        cos_sin(x, &c, &s);
        bad += fabs(c - cos(x)) > 1e-14 + 0x1p-24 * 0.51 * fabs(cos(x)) * 2;
        bad += fabs(s - sin(x)) > 1e-14 + 0x1p-24 * 0.51 * fabs(sin(x)) * 2;
    }
    check_none(bad, "cos and sin");
}

/* RoPE's powers of theta are the floats that libm's pow gives. */
static void test_powers(void)
{
    static const double thetas[] = {10000, 1e6, 5e5, 1e-3, 1e12, 1, 10.125};
    int bad = 0;
    for (int k = 0; k < 7; k++)
        for (int h = 2; h <= MAX_HEAD_DIM; h += 2)
            for (int i = 0; i < h / 2; i++) {
                double exponent = (double)((float)(2 * i) / (float)h);
                bad += (float)exp_f64(exponent * log_f64(thetas[k])) !=
                       (float)pow(thetas[k], exponent);
            }
    check_none(bad, "powers of theta");
}

/* Gemma scales by 1 + w: with w = 0 the row has mean square 1, with w = -1 it is zero. */
static void test_norm_and_gelu(void)
{
    float x[50], w[50], y[50], gate[3] = {1, -1, 0.5f}, up[3] = {1, 2, -3};
    double mean = 0;
    for (int i = 0; i < 50; i++)
        x[i] = uniform(-3, 3), w[i] = 0;
    rms_norm(x, w, 0, 50, y);
    for (int i = 0; i < 50; i++)
        mean += (double)y[i] * y[i] / 50, w[i] = -1;
    check(fabs(mean - 1) < 1e-6, "norm with w = 0");
    rms_norm(x, w, 0, 50, y);
    check(y[0] == 0 && y[49] == 0, "norm with w = -1");
    geglu(gate, up, 3); /* the tanh form: 0.841192, not the exact gelu's 0.841345 */
    check(fabsf(gate[0] - 0.8411920f) < 1e-6f && fabsf(gate[1] + 2 * 0.1588080f) < 1e-6f,
          "gelu, tanh form");
    float capped[2] = {5, -100};
    soft_cap(capped, 2, 30);
    check(fabs(capped[0] - 30 * tanh(5 / 30.0)) < 1e-6 && fabs(capped[1] + 29.9238) < 1e-3, "cap");
}

/* The soft-cap acts on scores before the mask: masked places weigh exactly nothing. */
static void test_weigh(void)
{
    static const float caps[] = {2, 100, 0}; /* with the maximum 0, with their own, without cap */
    for (int i = 0; i < 3; i++) {
        volatile int n = 32; /* or gcc 12 sees a loop that never ends */
        float s[32], cap = caps[i], max = cap > 0 ? cap * tanhf(9 / cap) : 9;
        for (int k = 0; k < 32; k++)
            s[k] = k == 5 ? NAN : (float)k;
        struct partial p = weigh(&scalar_kernels, cap, s, n, 7, 9);
        check(s[5] == 0 && s[6] == 0 && s[10] == 0 && s[7] > 0, "masked places weigh 0");
        float seven = (cap > 0 ? cap * tanhf(7 / cap) : 7) - (i ? max : 0);
        check(fabsf(p.max - (i ? max : 0)) < 1e-5f && fabsf(s[7] / expf(seven) - 1) < 1e-5f &&
              fabsf(p.sum / (s[7] + s[8] + s[9]) - 1) < 1e-6f, "weights with a cap of %g", cap);
        p = weigh(&scalar_kernels, cap, s, n, 20, 3);
        check(p.max == -INFINITY && p.sum == 0 && s[25] == 0, "a query that sees nothing here");
    }
}

/* The specification's quantisation, in exact arithmetic. */
static int quantise_is_off(const float *x, uint32_t n, const int8_t *q, const float *scale,
                           const int32_t *sum)
{
    int bad = 0;
    for (size_t g = 0; g < round_up(n, 256) / 32; g++) {
        float max = 0, v;
        int total = 0;
        for (size_t i = g * 32; i < g * 32 + 32 && i < n; i++)
            max = fabsf(x[i]) > max ? fabsf(x[i]) : max;
        for (size_t i = g * 32; i < g * 32 + 32; i++) {
            v = i < n && max >= 1e-30f ? x[i] * (127.0f / max) : 0;
            v = v > 127 ? 127 : v < -127 ? -127 : v;
            bad += q[i] != (int)nearbyint((double)v);
            total += q[i];
        }
        bad += scale[g] != (max >= 1e-30f ? max / 127.0f : 0) || sum[g] != total;
    }
    return bad;
}

static void test_quantise(void)
{
    int bad = 0;
    for (uint32_t n = 1; n < 600; n += 1 + n / 7)
        for (int kind = 0; kind < 4; kind++) {
            struct input in = random_input(1, n);
            for (uint32_t i = 0; i < n; i++)
                in.x[i] = kind == 0 ? uniform(-1, 1) : kind == 1 ? (float)below(255) - 127.0f
                        : kind == 2 ? (float)below(510) * 0.5f - 127 : uniform(-3e-30f, 3e-30f);
            if (kind == 2) /* ties: with a maximum of 127 halves stay halves */
                in.x[n / 2] = 127;
            quantise_input(&in, 1, n);
            bad += quantise_is_off(in.x, n, in.q, in.scale, in.sum);
            free_input(&in);
        }
    check_none(bad, "quantised inputs");
}

/* ---- rows of the table against scalar, every bit ---- */

enum { N_EXTREMES = 9 };

/* Bytes of a quantised tile, and S, driven to their limits. */
static void extreme_tile(uint8_t *tile, size_t bytes, int kind)
{
    static const float scales[] = {1, -1, 1e30f, -1e-38f, 1e-45f, 3e38f, -0.0f, 1e-3f, 0};
    static const uint8_t fill[] = {0x7f, 0x81, 0xff, 0x80, 0, 1, 0xf0, 0x0f, 0xfe};
    memset(tile, fill[kind], bytes);
    for (int lane = 0; lane < 16; lane++)
        put_u32(tile + 4 * lane, bits_of(scales[(kind + lane / 4) % 9]));
    for (size_t i = 64; i < bytes && kind % 2; i++)
        if (below(3) == 0)
            tile[i] = fill[below(9)];
}

static void extreme_input(const struct input *in, size_t rows, uint32_t cols, int kind)
{
    for (size_t t = 0; t < rows; t++)
        for (uint32_t i = 0; i < cols; i++)
            in->x[t * in->ldx + i] = kind < 5 ? (t % 2 ? -127.0f : 127.0f)
                                   : kind == 5 ? 1e30f * (float)(i % 3)
                                   : kind == 6 ? 1e-38f : uniform(-200, 200);
}

static int product_differs(const struct kernels *row, uint32_t type, uint32_t cols, int kind)
{
    struct tensor w = random_matrix(type, 16, cols);
    struct tiles tile = {.data = {w.data}, .n = 1, .type = type, .cols = cols};
    enum { MOST = MAX_PRODUCT_ROWS + 1 };
    struct input in = random_input(1 + MOST, cols);
    float z[MOST][TILE];
    int bad = 0;
    if (type >= Q8 && kind)
        extreme_tile((uint8_t *)(uintptr_t)w.data, w.tile_bytes, kind - 1);
    extreme_input(&in, 1 + MOST, cols, kind ? kind - 1 : 9);
    quantise_input(&in, 1 + MOST, cols);
    multiply_tiles(&scalar_kernels, &tile, &in, 1, MOST, z[0]);
    for (int n = 1; n <= MOST; n += n < 9 ? 1 : 4) {
        float (*y)[TILE] = fresh(sizeof *y * (size_t)n);
        multiply_tiles(row, &tile, &in, 1, n, y[0]);
        bad += !!memcmp(y, z, sizeof *y * (size_t)n);
        free(y);
    }
    free_input(&in), free((void *)(uintptr_t)w.data);
    return bad;
}

static void row_products(const struct kernels *row)
{
    static const uint32_t cols[] = {1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 129,
                                    255, 256, 257, 287, 289, 300, 511, 512, 513, 599, 600};
    for (uint32_t type = F32; type < N_TYPES; type++) {
        int bad = 0;
        for (size_t i = 0; i < sizeof cols / sizeof *cols; i++)
            for (int kind = 0; kind < (type >= Q8 && i % 5 == 0 ? N_EXTREMES + 1 : 1); kind++)
                bad += product_differs(row, type, cols[i], kind);
        check(!bad, "%s: %d products of %s differ from scalar", row->name, bad, types[type].name);
    }
}

/* Two tiles for many tokens: the same sums as a tile for few. */
static int panel_differs(const struct kernels *row, uint32_t type, uint32_t cols, int n, int kind)
{
    struct tensor w = random_matrix(type, 32, cols);
    struct tiles tiles = {.data = {w.data, w.data + w.tile_bytes}, .n = 2, .type = type,
                          .cols = cols};
    struct input in = random_input((size_t)n + 1, cols);
    float (*y)[2][TILE] = fresh(sizeof *y * (size_t)n), z[1][TILE];
    int bad = 0;
    for (int i = 0; i < 2 && kind; i++)
        extreme_tile((uint8_t *)(uintptr_t)tiles.data[i], w.tile_bytes, kind - 1);
    extreme_input(&in, (size_t)n + 1, cols, kind ? kind - 1 : 9);
    quantise_input(&in, (size_t)n + 1, cols);
    multiply_tiles(row, &tiles, &in, 1, n, y[0][0]);
    for (int t = 0; t < n; t++)
        for (int i = 0; i < 2; i++) {
            struct tiles tile = {.data = {tiles.data[i]}, .n = 1, .type = type, .cols = cols};
            multiply_tiles(&scalar_kernels, &tile, &in, 1 + (size_t)t, 1, z[0]);
            bad += !!memcmp(y[t][i], z[0], sizeof z[0]);
        }
    free(y), free_input(&in), free((void *)(uintptr_t)w.data);
    return bad;
}

static void row_panels(const struct kernels *row)
{
    static const uint32_t cols[] = {1, 33, 256, 257, 600};
    for (uint32_t type = F32; type < N_TYPES; type++) {
        int bad = 0;
        for (int n = 1; n <= 18 && (row->int8_panel || type < Q8); n++)
            for (int i = 0; i < 5; i++)
                for (int kind = 0; kind <= (n == 15 && type >= Q8 ? N_EXTREMES : 0); kind++)
                    bad += panel_differs(row, type, cols[i], n < 18 ? n : MAX_PANEL_ROWS, kind);
        check(!bad, "%s: %d panels of %s differ from scalar", row->name, bad, types[type].name);
    }
}

static int quantise_differs(const struct kernels *row, uint32_t n, int special)
{
    struct input a = random_input(1, n), b = random_input(1, n);
    for (uint32_t i = 0; i < n; i++)
        a.x[i] = uniform(-8, 8);
    if (special)
        mix_in_special(a.x, n, special == 1);
    memset(a.q, 99, a.ldq), memset(b.q, 77, b.ldq);
    quantise(a.x, n, a.q, a.scale, a.sum);
    row->quantise(a.x, n, b.q, b.scale, b.sum);
    int bad = memcmp(a.q, b.q, a.ldq) || memcmp(a.scale, b.scale, a.ldq / 8) ||
              memcmp(a.sum, b.sum, a.ldq / 8);
    free_input(&a), free_input(&b);
    return bad;
}

static int same_floats(float *a, float *b, size_t n)
{
    int same = !memcmp(a, b, n * sizeof *a);
    free(a), free(b);
    return same;
}

static float *copy_floats(const float *x, size_t n)
{
    float *y = fresh(n * sizeof *y);
    memcpy(y, x, n * sizeof *y);
    return y;
}

/* The element-wise kernels and sums on n elements; special: 1 finite ones, 2 all. */
static int vectors_differ(const struct kernels *row, uint32_t n, int special)
{
    float *x = random_floats(n, 12), *w = random_floats(n, 2), *y = copy_floats(x, n), *z;
    int bad = 0;
    if (special)
        mix_in_special(y, n, special == 1);
    z = copy_floats(y, n);
    row->soft_cap(y, n, 30), soft_cap(z, n, 30);
    bad += !same_floats(y, z, n);
    y = copy_floats(x, n), z = copy_floats(x, n);
    if (special)
        mix_in_special(y, n, special == 1), memcpy(z, y, n * 4);
    row->geglu(y, w, n), geglu(z, w, n);
    bad += !same_floats(y, z, n);
    y = copy_floats(x, n), z = copy_floats(x, n);
    if (special)
        y[n / 2] = z[n / 2] = -INFINITY, y[n / 3] = z[n / 3] = special == 1 ? -90.0f : NAN;
    float a = row->exp_sum(y, n, 11.5f), b = exp_sum(z, n, 11.5f);
    bad += bits_of(a) != bits_of(b) || !same_floats(y, z, n);
    y = copy_floats(x, n), z = copy_floats(x, n); /* the norm in place, the other apart */
    row->rms_norm(y, w, 1e-6f, n, y), rms_norm(x, w, 1e-6f, n, z);
    bad += !same_floats(y, z, n);
    free(x), free(w);
    return bad;
}

static int halves_differ(const struct kernels *row, uint32_t n)
{
    float *x = random_floats(n, 70000);
    uint16_t *y = fresh(n * 2), *z = fresh(n * 2);
    for (uint32_t i = 0; i < n; i++)
        if (below(2))
            x[i] = float_of(rnd());
    mix_in_special(x, n, 0);
    row->to_f16(x, n, y), to_f16(x, n, z);
    int bad = memcmp(y, z, n * 2) != 0;
    free(x), free(y), free(z);
    return bad;
}

static void row_vectors(const struct kernels *row)
{
    int bad[3] = {0, 0, 0};
    for (uint32_t n = 1; n <= 600; n += 1 + n / 20)
        for (int special = 0; special < 3; special++) {
            bad[0] += quantise_differs(row, n, special);
            bad[1] += vectors_differ(row, n, special);
            bad[2] += halves_differ(row, n);
        }
    check(!bad[0], "%s: %d quantised rows differ from scalar", row->name, bad[0]);
    check(!bad[1], "%s: %d vectors differ from scalar", row->name, bad[1]);
    check(!bad[2], "%s: %d rows of halves differ from scalar", row->name, bad[2]);
}

/* Lines of a type, in strips with gaps between them, that mean nothing but numbers. */
static void *random_lines(struct lines *l, enum line_type type, int n_lines, int n_strips)
{
    size_t bytes = type == LINES_F16 ? 2 : 4, gap = below(2) * 64;
    size_t used = (size_t)(n_lines + 1) * TILE * bytes + gap;
    uint8_t *data = fresh(used * (size_t)n_strips);
    float *x = random_floats(used * (size_t)n_strips / bytes, 2);
    if (type == LINES_F16)
        to_f16(x, used * (size_t)n_strips / 2, (uint16_t *)(void *)data);
    else
        memcpy(data, x, used * (size_t)n_strips);
    for (size_t i = 0; i < used * (size_t)n_strips && type == LINES_BF16; i += 4)
        memcpy(data + i, data + i + 2, 2); /* the low halves, too, are plain numbers */
    free(x);
    *l = (struct lines){.data = data, .type = type, .n_lines = n_lines, .n_strips = n_strips,
                        .strip_bytes = (ptrdiff_t)used, .line_bytes = TILE * bytes, .every = 1,
                        .go_on = (int)below(2)};
    return data;
}

/* The same for the 8-bit cache: strips of keys, or values, each with its scales at its end. */
static void *random_q8_lines(struct lines *l, enum line_type type, int n_lines, int n_strips)
{
    int keys = type == LINES_KEYS_Q8;
    size_t numbers = (size_t)(keys ? n_lines : n_strips) * TILE;
    size_t scales = (size_t)(keys ? (n_lines + 31) / 32 * TILE : (n_strips + 1) / 2);
    size_t part = numbers + 2 * scales, parts = (size_t)(keys ? n_strips : n_lines);
    uint8_t *data = fresh(part * parts);
    for (size_t i = 0; i < part * parts; i++)
        data[i] = (uint8_t)below(256);
    for (size_t i = 0; i < parts * scales; i++) {
        uint16_t scale = f16_of((float)uniform(-1, 1));
        memcpy(data + i / scales * part + numbers + i % scales * 2, &scale, sizeof scale);
    }
    *l = (struct lines){.data = data, .type = type, .n_lines = n_lines, .n_strips = n_strips,
                        .strip_bytes = keys ? (ptrdiff_t)part : TILE,
                        .line_bytes = keys ? TILE : part, .every = 1, .go_on = (int)below(2),
                        .scales = (int)numbers};
    return data;
}

static int lines_differ(const struct kernels *row, enum line_type type, int n, int n_lines,
                        int n_strips)
{
    struct lines l;
    int is_q8 = type == LINES_KEYS_Q8 || type == LINES_VALUES_Q8;
    void *data = (is_q8 ? random_q8_lines : random_lines)(&l, type, n_lines, n_strips);
    size_t ldx = (size_t)n_lines + 3, ldy = (size_t)n_strips * TILE + 5;
    float *x = random_floats(ldx * (size_t)n, 1), *y = random_floats(ldy * (size_t)n, 1);
    float *z = copy_floats(y, ldy * (size_t)n);
    add_lines(&l, x, ldx, n, y, ldy);
    row->add_lines(&l, x, ldx, n, z, ldy);
    free(x), free(data);
    return !same_floats(y, z, ldy * (size_t)n);
}

static void row_lines(const struct kernels *row)
{
    static const struct { enum line_type type; const char *name; } line_types[] = {
        {LINES_F32, "f32"}, {LINES_F16, "f16"}, {LINES_BF16, "bf16"},
        {LINES_KEYS_Q8, "q8 key"}, {LINES_VALUES_Q8, "q8 value"}};
    for (int i = 0; i < 5; i++) {
        int bad = 0;
        for (int n = 1; n <= 17; n++)
            for (int n_strips = 1; n_strips <= 17; n_strips++)
                bad += lines_differ(row, line_types[i].type, n, 1 + (int)below(70), n_strips);
        check(!bad, "%s: %d sums of %s lines differ from scalar", row->name, bad,
              line_types[i].name);
    }
}

/* One step of every sum: a * b + c is 2^-24 when it rounds once, 0 when the product rounds
 * first. */
static void row_rounds_once(const struct kernels *row)
{
    float a = 1 + 0x1p-7f, b = 1 + 0x1p-17f, c = -(1 + 0x1p-7f + 0x1p-17f), y[TILE];
    float line[TILE];
    struct lines l = {.data = (const uint8_t *)line, .type = LINES_F32, .n_lines = 1,
                      .n_strips = 1, .line_bytes = 64, .every = 1, .go_on = 1};
    for (int i = 0; i < TILE; i++)
        line[i] = a, y[i] = c;
    row->add_lines(&l, &b, 1, 1, y, TILE);
    check(y[3] == 0x1p-24f, "%s: products are not fused with sums", row->name);
}

/* ---- the matrix class of a row against the exact class, within its rounding ---- */

/* Relative error of one product of a sum: its input rounded to bf16, with quantised weights (and
 * in attention) both factors. */
static double matrix_epsilon(uint32_t type) { return type == BF16 ? 0x1.02p-8 : 0x1.02p-7; }

/* Largest deviation from sums in double, as a multiple of what rounding may cause. */
static double matrix_panel_error(const struct matrix_kernels *m, uint32_t type, uint32_t cols,
                                 int n)
{
    struct tensor w = random_matrix(type, 32, cols);
    struct tiles tiles = {.data = {w.data, w.data + w.tile_bytes}, .n = 2, .type = type,
                          .cols = cols};
    struct input in = random_input((size_t)n, cols);
    float (*y)[2][TILE] = fresh(sizeof *y * MAX_PANEL_ROWS), *row = fresh(cols * 4);
    double worst = 0;
    extreme_input(&in, (size_t)n, cols, 9);
    memset(in.bf16, 0xff, round_up((size_t)n, 16) * in.ldq * 2); /* NaN */
    for (int t = 0; t < n; t++)
        m->pack_row(in.x + (size_t)t * in.ldx, cols, bf16_row(&in, (size_t)t));
    m->bf16_panel(&tiles, &in, 0, n, y[0][0]);
    for (uint32_t r = 0; r < 32; r++) {
        read_row(&w, r, row);
        for (int t = 0; t < n; t++) {
            double sum = 0, size = 0, got = y[t][r / 16][r % 16];
            for (uint32_t k = 0; k < cols; k++) {
                double product = (double)row[k] * in.x[(size_t)t * in.ldx + k];
                sum += product, size += fabs(product);
            }
            double error = fabs(got - sum) / (size * matrix_epsilon(type) + 1e-30);
            worst = error <= worst ? worst : error; /* NaN counts */
        }
    }
    free(y), free(row), free_input(&in), free((void *)(uintptr_t)w.data);
    return worst;
}

/* Tokens in one call, and 16 at a time, some of them; two pairs of tiles in one call, and each
 * alone: the same bits. */
static int matrix_panel_depends(const struct matrix_kernels *m, uint32_t type, uint32_t cols,
                                int n)
{
    struct tensor w = random_matrix(type, 64, cols);
    struct tiles tiles = {.data = {w.data, w.data + w.tile_bytes}, .n = 2, .type = type,
                          .cols = cols, .next_pair = 2 * w.tile_bytes};
    struct tiles twice = tiles, several = tiles;
    struct input in = random_input((size_t)n, cols);
    float (*y)[2][TILE] = fresh(sizeof *y * 2 * MAX_PANEL_ROWS);
    float (*z)[2][TILE] = fresh(sizeof *z * 16);
    int bad = 0, both = m->most_pairs > 1;
    extreme_input(&in, (size_t)n, cols, 9);
    twice.data[1] = w.data;
    several.more = both;
    for (int t = 0; t < n; t++)
        m->pack_row(in.x + (size_t)t * in.ldx, cols, bf16_row(&in, (size_t)t));
    m->bf16_panel(&several, &in, 0, n, y[0][0]);
    for (int pair = 0; pair <= both; pair++) {
        for (int t = 0; t < n; t += 16) {
            int some = n - t < 16 ? n - t : 1 + (int)below(16);
            m->bf16_panel(t % 32 ? &tiles : &twice, &in, (size_t)t, some, z[0][0]);
            for (int i = 0; i < some; i++)
                bad += !!memcmp(y[pair * MAX_PANEL_ROWS + t + i][0], z[i][0], sizeof z[i][0]);
        }
        tiles.data[0] += tiles.next_pair, tiles.data[1] += tiles.next_pair;
        twice.data[0] = twice.data[1] = tiles.data[0];
    }
    free(y), free(z), free_input(&in), free((void *)(uintptr_t)w.data);
    return bad;
}

static void row_matrix_panels(const struct kernels *row)
{
    static const uint32_t cols[] = {1, 2, 3, 16, 31, 32, 33, 100, 128, 129, 255, 256, 257, 600};
    static const int sizes[] = {1, 2, 3, 5, 6, 7, 8, 9, 13, 16, 17, 31, 33, 50};
    for (uint32_t type = F32; type < N_TYPES; type++)
        for (int i = 0; i < 14 && row->matrix->types >> type & 1; i++) {
            int n = sizes[(i * 5 + 3) % 14];
            double error = matrix_panel_error(row->matrix, type, cols[i], n);
            check(error < 1, "%s: matrix products of %s, %u x %d: %.2f of the allowed error",
                  row->name, types[type].name, cols[i], n, error);
            check(!matrix_panel_depends(row->matrix, type, cols[i], n),
                  "%s: matrix products of %s depend on their batch", row->name,
                  types[type].name);
        }
}

/* n_groups x 16 cached vectors, each group in memory of its own. */
static void random_cache(uint16_t **groups, int n_groups, size_t floats)
{
    for (int g = 0; g < n_groups; g++) {
        float *x = random_floats(floats, 2);
        groups[g] = fresh(floats * 2);
        to_f16(x, floats, groups[g]);
        free(x);
    }
}

/* Scores of n queries with 16 * groups keys, and the mix of their values from `first` on,
 * both against sums in double. */
static double matrix_attention_error(const struct matrix_kernels *m, int n, int h, int groups)
{
    _Alignas(64) static uint8_t keys[PACKED_BYTES], values[PACKED_BYTES];
    static float s[MAX_QUERIES][KEY_BLOCK];
    uint16_t *key[16], *value[16];
    float *q = random_floats((size_t)(n * h), 1), *o = random_floats((size_t)(n * h), 1);
    double worst = 0;
    int n_keys = groups * 16, first = (int)below((uint32_t)groups) * 16, n_valid = n_keys - 5;
    random_cache(key, groups, (size_t)h * 16);
    random_cache(value, groups, (size_t)h * 16);
    value[groups - 1][15 * h] = 0x7e00; /* NaN where nothing was stored yet */
    for (int g = 0; g < groups; g++) {
        struct lines from = {.data = (const uint8_t *)key[g], .type = LINES_F16, .n_lines = h,
                             .line_bytes = TILE * 2};
        m->pack_keys(&from, keys + (size_t)g * 16 * (size_t)h * 2);
        from = (struct lines){.data = (const uint8_t *)value[g], .type = LINES_F16, .n_lines = TILE,
                              .n_strips = h / TILE, .strip_bytes = TILE * 2,
                              .line_bytes = (size_t)h * 2};
        m->pack_values(&from, n_valid - g * 16 < 16 ? n_valid - g * 16 : 16, g * 16, values);
    }
    m->score_keys(q, n, h, keys, groups, s);
    for (int j = 0; j < n; j++)
        for (int i = 0; i < n_keys; i++) {
            double sum = 0, size = 0;
            for (int d = 0; d < h; d++) {
                double x = q[j * h + d] * half_value(key[i / 16][d * 16 + i % 16]);
                sum += x, size += fabs(x);
            }
            double error = fabs(s[j][i] - sum) / (size * matrix_epsilon(Q8));
            worst = error <= worst ? worst : error;
        }
    for (int j = 0; j < n; j++) /* weights, in the places from `first` on */
        for (int i = 0; i < n_keys - first; i++)
            s[j][i] = first + i < n_valid ? uniform(0, 1) : 0;
    m->mix_values((const float (*)[KEY_BLOCK])s, n, h, values, first, n_keys - first, o);
    for (int j = 0; j < n; j++)
        for (int d = 0; d < h; d++) {
            double sum = 0, size = 0;
            for (int i = first; i < n_valid; i++) {
                double x = s[j][i - first] * half_value(value[i / 16][i % 16 * h + d]);
                sum += x, size += fabs(x);
            }
            double error = fabs(o[j * h + d] - sum) / (size * matrix_epsilon(Q8));
            worst = error <= worst ? worst : error;
        }
    free(q), free(o);
    for (int g = 0; g < groups; g++)
        free(key[g]), free(value[g]);
    return worst;
}

static void row_matrix_attention(const struct kernels *row)
{
    static const int head_dims[] = {32, 64, 96, 128, 192, 256, 320, 512};
    for (int i = 0; i < 8; i++) {
        int most = packed_positions(head_dims[i]) / 16;
        for (int n = 1; n <= 8; n++) {
            int groups = n == 8 ? most : 1 + (int)below((uint32_t)most);
            double error = matrix_attention_error(row->matrix, n, head_dims[i], groups);
            check(error < 1, "%s: matrix attention, %d queries, %d dimensions: %.2f of the "
                  "allowed error", row->name, n, head_dims[i], error);
        }
    }
}

static void test_rows(void)
{
    for (int i = 0; i < N_KERNELS; i++) {
        if (!all_kernels[i]->available()) {
            printf("not run: the %s kernels, this CPU lacks them\n", all_kernels[i]->name);
            continue;
        }
        row_rounds_once(all_kernels[i]);
        check(computes_exactly(all_kernels[i]), "%s: does not pass the check at opening",
              all_kernels[i]->name);
        if (all_kernels[i] == &scalar_kernels)
            continue;
        row_products(all_kernels[i]);
        row_panels(all_kernels[i]);
        row_vectors(all_kernels[i]);
        row_lines(all_kernels[i]);
        if (has_matrix(all_kernels[i])) {
            row_matrix_panels(all_kernels[i]);
            row_matrix_attention(all_kernels[i]);
        }
    }
}

static void test_kernels(void)
{
    test_exp_tanh_error();
    test_exp_tanh_ends();
    test_halves();
    test_log_and_angles();
    test_powers();
    test_norm_and_gelu();
    test_weigh();
    test_quantise();
    test_rows();
}
