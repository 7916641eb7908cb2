/* The inner transformer layer on NVIDIA GPUs from sm_80 on, in bfloat16: what its kernels share, and the forward pass.

   A sentence is one tile of the tensor cores: its words, at most 16, are the 16 rows of mma.m16n8k16. A warp takes one
   sentence at a time, and nothing but words leaves its registers: what one product returns lies as the next one wants
   it, except V, which is transposed.

   Matrices come folded and cut into tiles of 32 x 8 (folding.py). Scales and biases of the norms, the scale of the
   softmax and log2(e) are in the weights. Each head is padded to 8 or 16 channels. Channel CHANNELS of what a norm
   returns is 1, so biases are one more row of a matrix; it also makes a 1 in the padding of V, so that the product of
   the softmax with V sums up its weights, and after the division by that sum there is a 1 for the bias of `proj`.

   Sizes are macros: CHANNELS (even), HEADS, HIDDEN (a multiple of 16), WORDS (at most 16), EPSILON. */
#include "blocks.h"

enum {
    DIM = CHANNELS / HEADS,
    GROUPS = (CHANNELS + 7) / 8,          /* of 8 channels, of a word */
    NORMED = (CHANNELS + 16) / 16 * 2,    /* the same with the channel of ones, in twos */
    HEAD = DIM < 8 ? 1 : 2,               /* groups of a head: at least one channel is left */
    MERGED = HEADS * HEAD,                /* groups of all heads */
    HIDDEN_GROUPS = HIDDEN / 8
};
#define ROWS(groups) (((groups) + 3) / 4) /* rows of tiles of a matrix with so many groups of rows */
/* Where the tiles of each matrix begin: row after row. Those of qkv are head by head q, k and v. */
enum {
    QKV = 0,
    PROJ = QKV + ROWS(NORMED) * 3 * MERGED,
    FC1 = PROJ + ROWS(MERGED) * GROUPS,
    FC1_END = FC1 + ROWS(NORMED) * HIDDEN_GROUPS
};

typedef struct { lanes c[GROUPS][4]; } Words;   /* of 8 channels: two of word lane / 4, two of word lane / 4 + 8 */
typedef struct { bits a[2 * NORMED]; } Normed;  /* as the left of a product: [group of channels][words 0-7, 8-15] */

INLINE ints channel_of(int group, int half) { return lane_number() % 4 * 2 + (8 * group + half); }
INLINE lanes sum_of_four(lanes x) { x += across(x, 1); return x + across(x, 2); }
INLINE lanes largest_of_four(lanes x) { x = larger(x, across(x, 1)); return larger(x, across(x, 2)); }

/* Each word less its mean, over its deviation, and the inverse deviations; 0 in channels that there are not. */
INLINE void normalise(const Words *x, Words *out, lanes *inverse) {
    UNROLL for (int row = 0; row < 2; row++) {
        lanes sum = splat(0), square = splat(0);
        UNROLL for (int j = 0; j < GROUPS; j++) sum += x->c[j][2 * row] + x->c[j][2 * row + 1];
        lanes mean = sum_of_four(sum) * (1.f / CHANNELS);
        UNROLL for (int i = 0; i < 2 * GROUPS; i++) {
            lanes centred = x->c[i / 2][2 * row + i % 2] - mean;
            if (8 * (i / 2) + 8 > CHANNELS) centred = select(channel_of(i / 2, i % 2) < CHANNELS, centred, splat(0));
            square = fma_(centred, centred, square);
            out->c[i / 2][2 * row + i % 2] = centred;
        }
        inverse[row] = rsqrt_(fma_(sum_of_four(square), splat(1.f / CHANNELS), splat(EPSILON)));
        UNROLL for (int i = 0; i < 2 * GROUPS; i++) out->c[i / 2][2 * row + i % 2] *= inverse[row];
    }
}

INLINE Normed as_left(const Words *normed) {
    Normed n;
    UNROLL for (int j = 0; j < NORMED; j++) UNROLL for (int row = 0; row < 2; row++) {
        bits *a = &n.a[2 * j + row];
        if (j < CHANNELS / 8) *a = pack(normed->c[j][2 * row], normed->c[j][2 * row + 1]);
        else if (j > CHANNELS / 8) *a = zeros();
        else if (CHANNELS % 8 == 0) *a = ones();
        else {
            int last = j < GROUPS ? j : 0; /* j, said so that no compiler sees an index beyond */
            *a = pack(select(channel_of(j, 0) == CHANNELS, splat(1), normed->c[last][2 * row]),
                      normed->c[last][2 * row + 1]);
        }
    }
    return n;
}

INLINE Normed norm(const Words *x) {
    Words normed;
    lanes inverse[2];
    normalise(x, &normed, inverse);
    return as_left(&normed);
}

/* d += left (16 x 8 groups) times a column of tiles: the one at `tile`, in rows of `columns` tiles. */
INLINE void times(lanes *d, const bits *left, int groups, const pair *weights, int tile, int columns) {
    UNROLL for (int g = 0; g < groups; g += 4) {
        Fragment f = fragment(weights, tile + g / 4 * columns);
        if (g + 1 < groups) mma16(d, left + 2 * g, f.r[0], f.r[1]);
        else mma8(d, left + 2 * g, f.r[0]);
        if (g + 3 < groups) mma16(d, left + 2 * g + 4, f.r[2], f.r[3]);
        else if (g + 2 < groups) mma8(d, left + 2 * g + 4, f.r[2]);
    }
}

/* q, k or v of a head; part is 0, 1 or 2. */
INLINE void part_of_head(lanes out[HEAD][4], const Normed *n, const pair *weights, int head, int part) {
    UNROLL for (int t = 0; t < HEAD; t++) {
        UNROLL for (int c = 0; c < 4; c++) out[t][c] = splat(0);
        times(out[t], n->a, NORMED, weights, QKV + (3 * head + part) * HEAD + t, 3 * MERGED);
    }
}

/* out[words 0-7 and 8-15 on the right] = left (words x head) right^T, both as what a product returned, packed. */
INLINE void between_words(lanes out[2][4], const bits *left, bits right[HEAD][2]) {
    UNROLL for (int words = 0; words < 2; words++) {
        UNROLL for (int c = 0; c < 4; c++) out[words][c] = splat(0);
        if (HEAD == 1) mma8(out[words], left, right[0][words]);
        else mma16(out[words], left, right[0][words], right[HEAD - 1][words]);
    }
}

INLINE void pack_rows(bits *out, const lanes *c) { out[0] = pack(c[0], c[1]), out[1] = pack(c[2], c[3]); }

/* 2^(score - largest of its row), in place; 0 for words that there are not. */
INLINE void exponentials(lanes score[2][4]) {
    UNROLL for (int row = 0; row < 2; row++) {
        lanes *a = score[0] + 2 * row, *b = score[1] + 2 * row;
        if (WORDS < 16) UNROLL for (int i = 0; i < 2; i++) {
            a[i] = select(channel_of(0, i) < WORDS, a[i], splat(-1e30f));
            b[i] = select(channel_of(1, i) < WORDS, b[i], splat(-1e30f));
        }
        lanes most = largest_of_four(larger(larger(a[0], a[1]), larger(b[0], b[1])));
        UNROLL for (int i = 0; i < 2; i++) a[i] = exp2_(a[i] - most), b[i] = exp2_(b[i] - most);
    }
}

/* x += survival (proj(attention(n)) + bias) */
INLINE void attention(Words *x, const Normed *n, const pair *weights, float survival) {
    bits attended[2 * MERGED];
    UNROLL for (int head = 0; head < HEADS; head++) {
        lanes q[HEAD][4], k[HEAD][4], v[HEAD][4], score[2][4], out[HEAD][4];
        bits query[2 * HEAD], key[HEAD][2], p[4];
        part_of_head(q, n, weights, head, 0);
        part_of_head(k, n, weights, head, 1);
        part_of_head(v, n, weights, head, 2);
        UNROLL for (int t = 0; t < HEAD; t++) pack_rows(query + 2 * t, q[t]), pack_rows(key[t], k[t]);
        between_words(score, query, key);
        exponentials(score);
        UNROLL for (int i = 0; i < 2; i++) pack_rows(p + 2 * i, score[i]);
        UNROLL for (int t = 0; t < HEAD; t++) {
            UNROLL for (int c = 0; c < 4; c++) out[t][c] = splat(0);
            mma16(out[t], p, turn(pack(v[t][0], v[t][1])), turn(pack(v[t][2], v[t][3])));
        }
        UNROLL for (int row = 0; row < 2; row++) {
            lanes sum = from_one_of_four(out[DIM / 8][2 * row + DIM % 2], DIM % 8 / 2);
            lanes scale = rcp_(sum) * survival;
            UNROLL for (int t = 0; t < HEAD; t++)
                attended[2 * (HEAD * head + t) + row] = pack(out[t][2 * row] * scale, out[t][2 * row + 1] * scale);
        }
    }
    UNROLL for (int j = 0; j < GROUPS; j++) times(x->c[j], attended, MERGED, weights, PROJ + j, GROUPS);
}

/* Words of a sentence lie in memory as WORDS x CHANNELS. `again`: this thread has written them. */
INLINE void load_words_from(const pair *from, int sentence, Words *x, int again) {
    ints lane = lane_number(), at = lane / 4 * (CHANNELS / 2) + lane % 4;
    from += (long)sentence * (WORDS * CHANNELS / 2);
    UNROLL for (int j = 0; j < GROUPS; j++) UNROLL for (int row = 0; row < 2; row++) {
        ints inside = (lane / 4 + 8 * row < WORDS) & (channel_of(j, 0) < CHANNELS);
        ints index = at + (4 * CHANNELS * row + 4 * j);
        bits two = again ? load_again(from, index, inside) : load(from, index, inside);
        x->c[j][2 * row] = low(two), x->c[j][2 * row + 1] = high(two);
    }
}

INLINE void load_words(const pair *from, int sentence, Words *x) { load_words_from(from, sentence, x, 0); }
INLINE void load_words_again(const pair *from, int sentence, Words *x) { load_words_from(from, sentence, x, 1); }

INLINE void store_words(pair *to, int sentence, const Words *x) {
    ints lane = lane_number(), at = lane / 4 * (CHANNELS / 2) + lane % 4;
    UNROLL for (int j = 0; j < GROUPS; j++) UNROLL for (int row = 0; row < 2; row++) {
        ints inside = (lane / 4 + 8 * row < WORDS) & (channel_of(j, 0) < CHANNELS);
        store(to + (long)sentence * (WORDS * CHANNELS / 2), at + (4 * CHANNELS * row + 4 * j),
              pack(x->c[j][2 * row], x->c[j][2 * row + 1]), inside);
    }
}
