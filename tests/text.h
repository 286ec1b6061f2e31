/* Text to ids and back, as tests that include gemma2.c want it, and a second reading of bytes as
 * UTF-8.  Include gemma2.c and model.h before it. */
#ifndef TEXT_H
#define TEXT_H

/* In scratch of exactly the size that was asked for. */
static int64_t encode(const gemma2_model *m, const char *text, int64_t size, unsigned flags,
                      int32_t *ids, size_t max_ids)
{
    size_t n = gemma2_encode_scratch(size < 0 ? strlen(text) : (size_t)size);
    void *scratch = fresh(n);
    int64_t count = gemma2_encode(m, text, size, flags, ids, max_ids, scratch, n);
    free(scratch);
    return count;
}

/* The text of n ids, each decoded in exactly the room that it may need. */
static size_t decode_all(const gemma2_model *m, const int32_t *ids, int64_t n, char *out)
{
    gemma2_utf8 hold = {{0}, 0};
    size_t room = (size_t)gemma2_get_config(m)->max_piece_bytes + 12, at = 0;
    char *text = fresh(room);
    for (int64_t i = 0; i <= n; i++) {
        int bytes = gemma2_decode(m, &hold, i < n ? ids[i] : -1, text, room);
        if (bytes < 0)
            check(0, "decode %d: %d", i < n ? ids[i] : -1, bytes);
        memcpy(out + at, text, (size_t)max_i32(bytes, 0));
        at += (size_t)max_i32(bytes, 0);
    }
    free(text);
    return at;
}

/* What SentencePiece reads bytes as: valid UTF-8, each stray byte U+FFFD.  Our own reading. */
static inline size_t repaired(const uint8_t *p, size_t n, char *out)
{
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    size_t at = 0, used;
    for (size_t i = 0; i < n; i += used) {
        size_t len = p[i] < 0x80 ? 1 : p[i] >> 5 == 6 ? 2 : p[i] >> 4 == 14 ? 3
                     : p[i] >> 3 == 30 ? 4 : 0;
        uint32_t code = len == 1 ? p[i] : p[i] & (0x7fu >> len);
        int ok = len && len <= n - i;
        for (size_t k = 1; ok && k < len; k++) {
            ok = p[i + k] >> 6 == 2;
            code = code << 6 | (p[i + k] & 63);
        }
        ok = ok && code >= least[len] && code < 0x110000 && code >> 11 != 27;
        used = ok ? len : 1;
        memcpy(out + at, ok ? (const char *)p + i : "\xef\xbf\xbd", ok ? len : 3);
        at += ok ? len : 3;
    }
    return at;
}

#endif
