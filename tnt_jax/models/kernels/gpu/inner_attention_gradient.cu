/* The gradient of the inner layer's attention: inner_gradient.h. */
#include "inner_gradient.h"

/* After the tiles of qkv: proj transposed, and of each head its q, k and v transposed. */
enum {
    PROJ_T = PROJ,
    QKV_T = PROJ_T + ROWS(GROUPS) * MERGED,
    OF_HEAD = ROWS(3 * HEAD) * GROUPS,
    TILES = QKV_T + HEADS * OF_HEAD
};

/* Where the sums of all heads do not fit into registers, the heads are taken in parts, one after the other over all
   sentences: the cotangent of the words is added to from part to part. */
enum { OF_PART = HEADS / PARTS, GROUPS_OF_PART = OF_PART * HEAD, ROWS_OF_PART = (GROUPS_OF_PART + 1) / 2 };
typedef struct { lanes qkv[NORMED / 2][3 * GROUPS_OF_PART][4], proj[ROWS_OF_PART][GROUPS][4]; } Sums;
enum { SUMS = NORMED / 2 * 3 * GROUPS_OF_PART * 4 + ROWS_OF_PART * GROUPS * 4, SUMS_APART = (SUMS + 3) / 4 * 128 };

/* p: softmax of the scores. s: the scores' cotangent for `of_p`, that of p. Both packed as the left of a product. */
INLINE void softmax_gradient(lanes score[2][4], lanes of_p[2][4], bits *p, bits *s) {
    exponentials(score);
    UNROLL for (int row = 0; row < 2; row++) {
        lanes *a = score[0] + 2 * row, *b = score[1] + 2 * row, *da = of_p[0] + 2 * row, *db = of_p[1] + 2 * row;
        lanes scale = rcp_(sum_of_four(a[0] + a[1] + (b[0] + b[1])));
        UNROLL for (int i = 0; i < 2; i++) a[i] *= scale, b[i] *= scale;
        p[row] = pack(a[0], a[1]), p[2 + row] = pack(b[0], b[1]);
        lanes along = sum_of_four(a[0] * da[0] + a[1] * da[1] + (b[0] * db[0] + b[1] * db[1]));
        UNROLL for (int i = 0; i < 2; i++) {
            a[i] = a[i] * 0.69314718f * (da[i] - along); /* of 2^x: ln 2 */
            b[i] = b[i] * 0.69314718f * (db[i] - along);
        }
        s[row] = pack(a[0], a[1]), s[2 + row] = pack(b[0], b[1]);
    }
}

/* out = left (words x words) right (words x 8 channels, turned), packed. */
INLINE void over_words(bits *out, const bits *left, const bits *right) {
    lanes c[4] = ZEROS;
    mma16(c, left, right[0], right[1]);
    pack_rows(out, c);
}

/* Adds to the cotangent of a sentence what reaches its words through the heads of a part; `out` has it up to there. */
INLINE void attention_gradient(const Words *x, Words *cotangent, const pair *weights, float survival, int part,
                               const pair *out, int sentence, Sums *sums) {
    Kept kept = normalise_and_keep(x);
    bits d[2 * GROUPS], turned[GROUPS][2], attended[ROWS_OF_PART][4];
    cotangent_of_branch(cotangent, survival, d, turned, 0);
    if (GROUPS_OF_PART % 2) attended[GROUPS_OF_PART / 2][1] = attended[GROUPS_OF_PART / 2][3] = zeros();
    Words of_normed;
    UNROLL for (int j = 0; j < GROUPS; j++) UNROLL for (int c = 0; c < 4; c++) of_normed.c[j][c] = splat(0);
    UNROLL for (int here = 0; here < OF_PART; here++) {
        int head = part * OF_PART + here;
        bits qkv[3][HEAD][2], turned_qkv[3][HEAD][2], of_out[HEAD][2], turned_of_out[HEAD][2];
        bits query[2 * HEAD], left_of_out[2 * HEAD], p[4], s[4], of_qkv[3 * HEAD][2];
        UNROLL for (int i = 0; i < 3; i++) {
            lanes c[HEAD][4];
            part_of_head(c, &kept.left, weights, head, i);
            UNROLL for (int t = 0; t < HEAD; t++) {
                pack_rows(qkv[i][t], c[t]);
                UNROLL for (int row = 0; row < 2; row++) turned_qkv[i][t][row] = turn(qkv[i][t][row]);
            }
        }
        UNROLL for (int t = 0; t < HEAD; t++) {
            lanes c[4] = ZEROS;
            times(c, d, GROUPS, weights, PROJ_T + HEAD * head + t, MERGED);
            pack_rows(of_out[t], c);
            UNROLL for (int row = 0; row < 2; row++) {
                query[2 * t + row] = qkv[0][t][row], left_of_out[2 * t + row] = of_out[t][row];
                turned_of_out[t][row] = turn(of_out[t][row]);
            }
        }
        lanes score[2][4], of_p[2][4];
        between_words(score, query, qkv[1]);
        between_words(of_p, left_of_out, qkv[2]);
        softmax_gradient(score, of_p, p, s);
        bits s_by_key[4] = {turn(s[0]), turn(s[2]), turn(s[1]), turn(s[3])};
        bits p_by_key[4] = {turn(p[0]), turn(p[2]), turn(p[1]), turn(p[3])};
        UNROLL for (int t = 0; t < HEAD; t++) {
            int group = HEAD * here + t;
            bits of_head[2];
            over_words(of_head, p, turned_qkv[2][t]);
            attended[group / 2][group % 2] = turn(of_head[0]), attended[group / 2][2 + group % 2] = turn(of_head[1]);
            over_words(of_qkv[t], s, turned_qkv[1][t]);
            over_words(of_qkv[HEAD + t], s_by_key, turned_qkv[0][t]);
            over_words(of_qkv[2 * HEAD + t], p_by_key, turned_of_out[t]);
        }
        UNROLL for (int j = 0; j < GROUPS; j++)
            times(of_normed.c[j], of_qkv[0], 3 * HEAD, weights, QKV_T + head * OF_HEAD + j, GROUPS);
        UNROLL for (int i = 0; i < 3 * HEAD; i++) {
            bits right[2] = {turn(of_qkv[i][0]), turn(of_qkv[i][1])};
            UNROLL for (int m = 0; m < NORMED / 2; m++)
                mma16(sums->qkv[m][3 * HEAD * here + i], kept.turned[m], right[0], right[1]);
        }
    }
    UNROLL for (int m = 0; m < ROWS_OF_PART; m++) UNROLL for (int j = 0; j < GROUPS; j++)
        mma16(sums->proj[m][j], attended[m], turned[j][0], turned[j][1]);
    if (part) load_words_again(out, sentence, cotangent);
    through_norm(cotangent, &of_normed, &kept);
}

INLINE void sentence_gradient(const pair *words, const float *survival, const pair *cotangent, const pair *weights,
                              pair *out, int sentence, int part, Sums *sums) {
    Words x, d;
    load_words(words, sentence, &x);
    load_words(cotangent, sentence, &d);
    attention_gradient(&x, &d, weights, survival[sentence], part, out, sentence, sums);
    store_words(out, sentence, &d);
}

#ifdef __CUDACC__
KERNEL inner_attention_gradient(const pair *__restrict__ words, const float *__restrict__ survival,
                                const pair *__restrict__ cotangent, const pair *__restrict__ tiles,
                                const int *__restrict__ count, pair *__restrict__ out,
                                float *__restrict__ of_weights) {
    int sentences = *count;
#pragma unroll 1
    for (int part = 0; part < PARTS; part++) {
        copy_to_shared(tiles, TILES);
        Sums sums = {};
#pragma unroll 1
        for (int s = blockIdx.x * WARPS + threadIdx.x / 32; s < sentences; s += gridDim.x * WARPS)
            sentence_gradient(words, survival, cotangent, shared, out, s, part, &sums);
        add_up<SUMS>(&sums.qkv[0][0][0], of_weights + (blockIdx.x * PARTS + part) * SUMS_APART);
    }
}
#else
void inner_attention_gradient(const pair *words, const float *survival, const pair *cotangent, const pair *tiles,
                              const int *count, pair *out, float *of_weights) {
    for (int part = 0; part < PARTS; part++) {
        Sums sums;
        memset(&sums, 0, sizeof sums);
        for (int s = 0; s < *count; s++) sentence_gradient(words, survival, cotangent, tiles, out, s, part, &sums);
        add_up(&sums.qkv[0][0][0], SUMS, of_weights + part * SUMS_APART);
    }
}
#endif
