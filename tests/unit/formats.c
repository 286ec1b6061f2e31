/* Section 2, the number formats, read bit by bit as its table has them. */

static void test_bf16(void)
{
    int bad = 0;
    for (uint32_t h = 0; h < 1 << 16; h++) {
        int e = h >> 7 & 255, m = h & 127;
        double x = e == 0 ? ldexp(m, -133) : ldexp(128 + m, e - 134);
        float y = from_bf16((uint16_t)h);
        if (e == 255)
            bad += m ? !isnan(y) : !isinf(y);
        else
            bad += (double)y != (h >> 15 ? -x : x) || (signbit(y) != 0) != (int)(h >> 15);
    }
    check_none(bad, "bf16 values");
}

/* Weight [row][col] of a quantised tensor, exactly: S and s * v. */
static int32_t weight_at(uint32_t type, const uint8_t *data, uint32_t cols, uint32_t row,
                         uint32_t col, float *scale)
{
    static const int code[16] = {-31, -25, -20, -16, -12, -9, -6, -3, 0, 3, 6, 9, 13, 17, 22, 28};
    static const int code3[2][8] = {{-31, -17, -9, -2, 4, 10, 17, 27},
                                    {-31, -20, -12, -5, 0, 7, 14, 23}};
    static const uint32_t sizes[N_TYPES] = {[Q8] = 512, [Q6] = 384, [Q4] = 256, [Q3] = 192};
    uint32_t group_bytes = sizes[type], lane = row % 16;
    const uint8_t *tile = data + row / 16 * tensor_bytes(type, 1, cols);
    const uint8_t *block = tile + 64 + col / 256 * (128 + 8 * group_bytes);
    const uint8_t *group = block + 128 + col % 256 / 32 * group_bytes;
    int s = block[col % 256 / 32 * 16 + lane], step = col % 32 / 4, input = lane * 4 + col % 4;
    *scale = float_of(get_u32(tile + lane * 4));
    if (type == Q8)
        return s * (group[step * 64 + input] ^ 128) - s * 128;
    if (type == Q3 && step >= 6) {
        int index = 0;
        for (int o = 0; o < 3; o++)
            index += (group[o * 64 + input] >> (step == 6 ? 3 : 7) & 1) << o;
        return ((s > 127 ? s - 256 : s) - (s & 1)) / 2 * code3[s & 1][index];
    }
    int byte = group[step / 2 * 64 + input], low = step % 2 ? byte / 16 : byte % 16;
    int sign = s > 127 ? s - 256 : s;
    if (type == Q6)
        return sign * ((group[256 + step / 4 * 64 + input] >> 2 * (step % 4) & 3) * 16 + low - 32);
    if (type == Q3)
        return (sign - (s & 1)) / 2 * code3[s & 1][low % 8];
    return (sign - (s & 1)) / 2 * (code[low] + 4 * (s & 1));
}

static struct tensor random_matrix(uint32_t type, uint32_t rows, uint32_t cols)
{
    uint8_t *data = fresh(tensor_bytes(type, rows, cols));
    struct tensor w = {data, type, rows, cols, (size_t)tensor_bytes(type, 1, cols)};
    memset(data, 0, tensor_bytes(type, rows, cols));
    fill_tensor(data, type, rows, cols);
    return w;
}

static void test_unpack(void)
{
    static const uint32_t cols[] = {1, 31, 256, 257, 300};
    for (uint32_t type = Q8; type <= Q3; type++)
        for (int i = 0; i < 5; i++) {
            struct tensor w = random_matrix(type, 19, cols[i]);
            float *y = fresh(cols[i] * sizeof *y), scale;
            int bad = 0;
            for (uint32_t r = 0; r < 19; r++) {
                read_row(&w, r, y);
                for (uint32_t k = 0; k < cols[i]; k++) {
                    int32_t v = weight_at(type, w.data, cols[i], r, k, &scale);
                    bad += y[k] != scale * (float)v;
                }
            }
            check(!bad, "%s, %u columns: %d weights wrong", types[type].name, cols[i], bad);
            free(y), free((void *)(uintptr_t)w.data);
        }
}

static struct input random_input(size_t rows, uint32_t cols)
{
    size_t ldq = round_up(cols, 256);
    struct input in = {fresh(rows * cols * 4), cols, fresh(rows * ldq), fresh(rows * ldq / 8),
                       fresh(rows * ldq / 8), fresh(round_up(rows, 16) * ldq * 2), ldq};
    return in;
}

static void quantise_input(const struct input *in, size_t rows, uint32_t cols)
{
    for (size_t t = 0; t < rows; t++)
        quantise(in->x + t * in->ldx, cols, in->q + t * in->ldq, in->scale + t * in->ldq / 32,
                 in->sum + t * in->ldq / 32);
}

static void free_input(const struct input *in)
{
    free(in->x), free(in->q), free(in->scale), free(in->sum), free(in->bf16);
}

/* A product with a unit vector is a column: the same weights that read_row sees. */
static void test_rows_are_columns(void)
{
    for (uint32_t type = F32; type < N_TYPES; type++) {
        uint32_t cols = 67;
        struct tensor w = random_matrix(type, 16, cols);
        struct tiles tile = {.data = {w.data}, .n = 1, .type = type, .cols = cols};
        struct input in = random_input(1, cols);
        float row[67], y[1][TILE];
        int bad = 0;
        for (uint32_t k = 0; k < cols; k++) {
            memset(in.x, 0, cols * sizeof *in.x);
            in.x[k] = 1;
            quantise_input(&in, 1, cols);
            multiply_tiles(&scalar_kernels, &tile, &in, 0, 1, y[0]);
            for (uint32_t r = 0; r < 16; r++) {
                read_row(&w, r, row);
                bad += fabsf(y[0][r] - row[k]) > (type >= Q8 ? 1e-6f : 0) * fabsf(row[k]);
            }
        }
        check(!bad, "%s: %d products with a unit vector", types[type].name, bad);
        free_input(&in), free((void *)(uintptr_t)w.data);
    }
}

static void test_formats(void)
{
    test_bf16();
    test_unpack();
    test_rows_are_columns();
}
