/* The gradient of the inner layer, in two kernels, each of which computes the forward pass again: through the MLP, from
   the cotangent of what the layer returned to that of the words after attention, and through attention. Two, because
   the gradients of the weights stay in registers over all sentences of a warp: for TNT-S 174 and 120 of them. They are
   gradients of the folded matrices, and JAX goes on from there. Operands that are summed over words are transposed in
   registers. */
#include "inner_layer.h"

typedef struct {
    Words normed;
    lanes inverse[2];
    Normed left;                  /* of products over channels */
    bits turned[NORMED / 2][4];   /* of products over words: 16 channels each */
} Kept;

INLINE Kept normalise_and_keep(const Words *x) {
    Kept kept;
    normalise(x, &kept.normed, kept.inverse);
    kept.left = as_left(&kept.normed);
    UNROLL for (int m = 0; m < NORMED / 2; m++) UNROLL for (int i = 0; i < 4; i++)
        kept.turned[m][i] = turn(kept.left.a[4 * m + i / 2 + i % 2 * 2]);
    return kept;
}

/* cotangent += what reaches the words through their norm */
INLINE void through_norm(Words *cotangent, const Words *of_normed, const Kept *kept) {
    UNROLL for (int row = 0; row < 2; row++) {
        lanes mean = splat(0), along = splat(0);
        UNROLL for (int i = 0; i < 2 * GROUPS; i++) {
            lanes d = of_normed->c[i / 2][2 * row + i % 2];
            mean += d;
            along = fma_(d, kept->normed.c[i / 2][2 * row + i % 2], along);
        }
        mean = sum_of_four(mean) * (1.f / CHANNELS), along = sum_of_four(along) * (1.f / CHANNELS);
        UNROLL for (int i = 0; i < 2 * GROUPS; i++) {
            lanes *to = &cotangent->c[i / 2][2 * row + i % 2];
            lanes d = of_normed->c[i / 2][2 * row + i % 2] - mean - kept->normed.c[i / 2][2 * row + i % 2] * along;
            *to = fma_(d, kept->inverse[row], *to);
        }
    }
}

/* survival * cotangent: as the left of a product over channels, and turned, as the right of one over words. */
INLINE void cotangent_of_branch(const Words *cotangent, float survival, bits *left, bits turned[GROUPS][2],
                                lanes bias[GROUPS][2]) {
    UNROLL for (int j = 0; j < GROUPS; j++) {
        lanes c[4];
        UNROLL for (int i = 0; i < 4; i++) c[i] = cotangent->c[j][i] * survival;
        if (bias) bias[j][0] += c[0] + c[2], bias[j][1] += c[1] + c[3];
        pack_rows(left + 2 * j, c);
        UNROLL for (int row = 0; row < 2; row++) turned[j][row] = turn(left[2 * j + row]);
    }
}
