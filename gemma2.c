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
 *     68   u32   D, model width                         1 .. 2^20; D, N, K, H, F are 0
 *     72   u32   N, query heads                         1 .. 4096          when L is 0
 *     76   u32   K, key/value heads                     divides N
 *     80   u32   H, head_dim                            even, 2 .. 4096
 *     84   u32   F, feed-forward width of one branch    1 .. 2^22
 *     88   u32   V, vocabulary                          1 .. 2^22
 *     92   u32   W, window of local layers              1 .. 2^30 (0 when L is 0)
 *     96   u32   trained context                        1 .. 2^30 (0 when L is 0)
 *    100   f32   rms_norm_eps                           finite, >= 0
 *    104   f64   rope_theta                             finite, > 0 (0 when L is 0)
 *    112   f32   soft-cap of attention scores           0 (off), or 0.01 .. 10000
 *    116   f32   soft-cap of logits                     the same
 *    120   f32   query scale (query_pre_attn_scalar^-0.5)  finite, > 0 (0 when L is 0)
 *    124   f32   embedding scale (sqrt(D) in bf16)      finite, > 0 (0 when L is 0)
 *    128   u8[128] bit l%8 of byte l/8: layer l is local (sliding window)
 *    256   u32   number of stop ids                     0 .. 15
 *    260   u32[15] stop ids                             < V; unused ones 0
 *    320   u8[160] zero
 *    480   u8[32] identity: SHA-256 of bytes 0 .. 479 followed by the directory
 *
 * Directory entry, 96 bytes
 *      0   u32   role (table below)      16  u64  rows        48  u8[32] SHA-256 of the
 *      4   u32   layer, 0 where none     24  u64  cols                   section's bytes
 *      8   u32   type (section 3)        32  u64  offset      80  u8[16] zero
 *     12   u32   flags: bit 0 optional   40  u64  bytes
 *   An entry with an unknown role is skipped when optional, else refuses the file.  No
 *   (role, layer) pair occurs twice.  Sections stand in directory order: the first at the
 *   directory's end rounded up to A, each next at the end of the one before rounded up to
 *   A, the file ends with the last one; the gaps are zero.
 *
 * Roles
 *     1 facts      bytes     u32 count; per pair: u32 key bytes, u32 value bytes, key, value
 *     2 tokenizer  bytes     below
 *    16 embedding  [V, D]    tied output head unless role 17 is there
 *    17 head       [V, D]    an output head of its own, or a cheaper copy of a tied one
 *    18 final_norm [D, 1]    norms are f32, stored as trained: x is scaled by 1 + w
 *    32 attn_norm  [D, 1]    33 q [N*H, D]  34 k [K*H, D]  35 v [K*H, D]  36 o [D, N*H]
 *    37 post_attn_norm       40 ffn_norm    41 gate [F, D] 42 up [F, D]   43 down [D, F]
 *    44 post_ffn_norm        (32 .. 44 once for each layer)
 *   Reserved, always optional: 256 + role importance of a tensor's inputs, 512 + role and
 *   768 + role the A and B of a LoRA pair.  Released files hold sections in order of use:
 *   facts, tokenizer, layers, final norm, embedding, head.
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
 *                 has at most 4096 bytes; of equal pieces the lowest id is found
 * =================================================================================== */
/* ===================================================================================
 * 3. Number formats
 *
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
 *     group scale s: q8 the byte, 0 .. 255; q6 the byte as signed, -127 .. 127; q4 the
 *        byte as signed >> 1, -64 .. 63
 *     weight = S * (s * value): s * value is an exact integer, its product with S rounds
 *   type 0 bytes  no tensor
 *
 * S is finite.  Padded rows have S = 0; padded inputs hold any value, they meet zero
 * activations.  (Exporters write zero bytes in both; --check asks for S and finite values.)
 * =================================================================================== */
