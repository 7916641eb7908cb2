/* The gradient of the inner layer's MLP: inner_gradient.h. */
#include "inner_gradient.h"

/* After the tiles of the forward pass up to fc1: fc2 and fc1 transposed. */
enum {
    FC2_T = FC1_END,
    FC1_T = FC2_T + ROWS(GROUPS) * HIDDEN_GROUPS,
    TILES = FC1_T + ROWS(HIDDEN_GROUPS) * GROUPS
};

/* Where the sums of all hidden channels do not fit into registers, these are taken in parts, one after the other over all
   sentences: the cotangent of the words is added to from part to part, and the words after attention are kept. */
enum { OF_PART = HIDDEN_GROUPS / PARTS };
typedef struct {
    lanes fc1[NORMED / 2][OF_PART][4], fc2[OF_PART / 2][GROUPS][4], bias[GROUPS][2];
} Sums;
enum {
    SUMS = NORMED / 2 * OF_PART * 4 + OF_PART / 2 * GROUPS * 4 + GROUPS * 2,
    SUMS_APART = (SUMS + 3) / 4 * 128
};

/* Value and derivative of the forward pass' gelu2. */
INLINE lanes gelu2_and_derivative(lanes x, lanes *derivative) {
#ifdef EXACT
    lanes t = 1 + erf_(x * 0.70710678f);
    *derivative = t + x * 0.79788456f * exp2_(x * x * (-0.5f * 1.44269504f));
    return x * t;
#else
    lanes square = x * x, p = fma_(square, splat(0.035677408f), splat(0.7978845608f));
    lanes t = tanh_(x * p), of_p = fma_(square, splat(3 * 0.035677408f), splat(0.7978845608f));
    *derivative = fma_(fma_(-t, t, splat(1)) * x, of_p, t + 1);
    return fma_(x, t, x);
#endif
}

/* Adds to the cotangent of a sentence what reaches its words through the hidden channels of a part; `out` has it up to
   there. */
INLINE void mlp_gradient(const Words *x, Words *cotangent, const pair *weights, float survival, int part,
                         const pair *out, int sentence, Sums *sums) {
    Kept kept = normalise_and_keep(x);
    bits d[2 * GROUPS], turned[GROUPS][2];
    cotangent_of_branch(cotangent, survival, d, turned, sums->bias);
    Words of_normed;
    UNROLL for (int j = 0; j < GROUPS; j++) UNROLL for (int c = 0; c < 4; c++) of_normed.c[j][c] = splat(0);
    UNROLL for (int first = 0; first < OF_PART; first += 4) {
        int count = OF_PART - first < 4 ? OF_PART - first : 4, group = part * OF_PART + first;
        bits hidden[8], of_hidden[8];
        UNROLL for (int g = 0; g < count; g++) {
            lanes z[4] = ZEROS, dz[4] = ZEROS, derivative;
            times(z, kept.left.a, NORMED, weights, FC1 + group + g, HIDDEN_GROUPS);
            times(dz, d, GROUPS, weights, FC2_T + group + g, HIDDEN_GROUPS);
            UNROLL for (int c = 0; c < 4; c++) z[c] = gelu2_and_derivative(z[c], &derivative), dz[c] *= derivative;
            UNROLL for (int row = 0; row < 2; row++) hidden[2 * g + row] = turn(pack(z[2 * row], z[2 * row + 1]));
            pack_rows(of_hidden + 2 * g, dz);
        }
        UNROLL for (int j = 0; j < GROUPS; j++)
            times(of_normed.c[j], of_hidden, count, weights, FC1_T + group / 4 * GROUPS + j, GROUPS);
        UNROLL for (int m = 0; m < count / 2; m++) {
            bits left[4] = {hidden[4 * m], hidden[4 * m + 2], hidden[4 * m + 1], hidden[4 * m + 3]};
            UNROLL for (int j = 0; j < GROUPS; j++) mma16(sums->fc2[first / 2 + m][j], left, turned[j][0], turned[j][1]);
        }
        UNROLL for (int g = 0; g < count; g++) {
            bits right[2] = {turn(of_hidden[2 * g]), turn(of_hidden[2 * g + 1])};
            UNROLL for (int m = 0; m < NORMED / 2; m++)
                mma16(sums->fc1[m][first + g], kept.turned[m], right[0], right[1]);
        }
    }
    if (part) load_words_again(out, sentence, cotangent);
    through_norm(cotangent, &of_normed, &kept);
}

/* The words as they are after attention. */
INLINE void attend(const pair *words, const float *survival, const pair *weights, int sentence, Words *x) {
    load_words(words, sentence, x);
    Normed n = norm(x);
    attention(x, &n, weights, survival[sentence]);
}

INLINE void sentence_gradient(const pair *words, const float *survival, const pair *cotangent, const pair *weights,
                              pair *out, const pair *after_attention, int sentence, int sentences, int part,
                              Sums *sums) {
    Words x, d;
    if (PARTS > 1) load_words_again(after_attention, sentence, &x);
    else attend(words, survival, weights, sentence, &x);
    load_words(cotangent, sentence, &d);
    mlp_gradient(&x, &d, weights, survival[sentences + sentence], part, out, sentence, sums);
    store_words(out, sentence, &d);
}

/* With one part there is nothing to keep, and no such argument. */
#if PARTS > 1
#define AFTER_ATTENTION , pair *after_attention
#else
#define AFTER_ATTENTION
#define after_attention ((pair *)0)
#endif

#ifdef __CUDACC__
KERNEL inner_mlp_gradient(const pair *__restrict__ words, const float *__restrict__ survival,
                          const pair *__restrict__ cotangent, const pair *__restrict__ tiles,
                          const int *__restrict__ count, pair *__restrict__ out,
                          float *__restrict__ of_weights AFTER_ATTENTION) {
    int sentences = *count, first = blockIdx.x * WARPS + threadIdx.x / 32;
    copy_to_shared(tiles, TILES);
    if (PARTS > 1) {
#pragma unroll 1
        for (int s = first; s < sentences; s += gridDim.x * WARPS) {
            Words x;
            attend(words, survival, shared, s, &x);
            store_words(after_attention, s, &x);
        }
    }
#pragma unroll 1
    for (int part = 0; part < PARTS; part++) {
        if (part) copy_to_shared(tiles, TILES); /* the sums took its place */
        Sums sums = {};
#pragma unroll 1
        for (int s = first; s < sentences; s += gridDim.x * WARPS)
            sentence_gradient(words, survival, cotangent, shared, out, after_attention, s, sentences, part, &sums);
        add_up<SUMS>(&sums.fc1[0][0][0], of_weights + (blockIdx.x * PARTS + part) * SUMS_APART);
    }
}
#else
void inner_mlp_gradient(const pair *words, const float *survival, const pair *cotangent, const pair *tiles,
                        const int *count, pair *out, float *of_weights AFTER_ATTENTION) {
    for (int s = 0; PARTS > 1 && s < *count; s++) {
        Words x;
        attend(words, survival, tiles, s, &x);
        store_words(after_attention, s, &x);
    }
    for (int part = 0; part < PARTS; part++) {
        Sums sums;
        memset(&sums, 0, sizeof sums);
        for (int s = 0; s < *count; s++)
            sentence_gradient(words, survival, cotangent, tiles, out, after_attention, s, *count, part, &sums);
        add_up(&sums.fc1[0][0][0], SUMS, of_weights + part * SUMS_APART);
    }
}
#endif
