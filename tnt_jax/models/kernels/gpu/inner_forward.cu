/* The inner transformer layer, forward: inner_layer.h. */
#include "inner_layer.h"

enum { FC2 = FC1_END, TILES = FC2 + ROWS(HIDDEN_GROUPS) * GROUPS };

/* Twice the tanh form of GELU, x (1 + tanh(x p(x^2))), which is 1e-3 off the exact one at most; the instruction for tanh
   adds 2^-11 of its value. The half is in the weights that follow. */
INLINE lanes gelu2(lanes x) {
#ifdef EXACT
    return x + x * erf_(x * 0.70710678f);
#else
    lanes square = x * x;
    lanes t = tanh_(x * fma_(square, splat(0.035677408f), splat(0.7978845608f)));
    return fma_(x, t, x);
#endif
}

/* x += survival (gelu(n fc1) fc2 + bias), 32 hidden channels at a time. */
INLINE void mlp(Words *x, const Normed *n, const pair *weights, const float *bias, float survival) {
    Words out;
    UNROLL for (int j = 0; j < GROUPS; j++) {
        out.c[j][0] = out.c[j][2] = at_lane(bias, channel_of(j, 0));
        out.c[j][1] = out.c[j][3] = at_lane(bias, channel_of(j, 1));
    }
    UNROLL for (int first = 0; first < HIDDEN_GROUPS; first += 4) {
        int count = HIDDEN_GROUPS - first < 4 ? HIDDEN_GROUPS - first : 4;
        bits hidden[8];
        UNROLL for (int g = 0; g < count; g++) {
            lanes h[4] = ZEROS;
            times(h, n->a, NORMED, weights, FC1 + first + g, HIDDEN_GROUPS);
            UNROLL for (int c = 0; c < 4; c++) h[c] = gelu2(h[c]);
            pack_rows(hidden + 2 * g, h);
        }
        UNROLL for (int j = 0; j < GROUPS; j++)
            times(out.c[j], hidden, count, weights, FC2 + first / 4 * GROUPS + j, GROUPS);
    }
    UNROLL for (int j = 0; j < GROUPS; j++) UNROLL for (int c = 0; c < 4; c++)
        x->c[j][c] = fma_(out.c[j][c], splat(survival), x->c[j][c]);
}

INLINE void layer(const pair *words, const float *survival, const pair *weights, const float *bias, pair *out,
                  int sentence, int sentences) {
    Words x;
    load_words(words, sentence, &x);
    Normed n = norm(&x);
    attention(&x, &n, weights, survival[sentence]);
    n = norm(&x);
    mlp(&x, &n, weights, bias, survival[sentences + sentence]);
    store_words(out, sentence, &x);
}

#ifdef __CUDACC__
KERNEL inner_forward(const pair *__restrict__ words, const float *__restrict__ survival,
                     const pair *__restrict__ tiles, const float *__restrict__ bias, const int *__restrict__ count,
                     pair *__restrict__ out) {
    float *bias_here = reinterpret_cast<float *>(shared + TILES * 128);
    if (threadIdx.x < 8 * GROUPS) bias_here[threadIdx.x] = bias[threadIdx.x];
    copy_to_shared(tiles, TILES);
    int sentences = *count;
#pragma unroll 1
    for (int s = blockIdx.x * WARPS + threadIdx.x / 32; s < sentences; s += gridDim.x * WARPS)
        layer(words, survival, shared, bias_here, out, s, sentences);
}
#else
void inner_forward(const pair *words, const float *survival, const pair *tiles, const float *bias, const int *count,
                   pair *out) {
    for (int s = 0; s < *count; s++) layer(words, survival, tiles, bias, out, s, *count);
}
#endif
