/* The gradient of a norm behind a linear map behind a norm that is folded into it (formulations/folded.py), up to the
   product: rows of WIDTH channels, one warp a row, in one pass over memory.

       y = (product - mean left_over) inverse + offset,    out = norm(y) scale + bias

   A lane has two channels side by side of each 64. `vectors` are offset, left_over and scale; `statistics` the mean and
   the inverse deviation of each row before the product, which has INPUTS channels. Returned are what reaches the product,
   what reaches the row through its deviation, and the sums over rows of what reaches offset, scale and bias. */
#include "blocks.h"

enum { PAIRS = WIDTH / 64, SUMS = 3 * PAIRS * 2 };
enum { OFFSET, LEFT_OVER, SCALE };

typedef struct { lanes c[PAIRS][2]; } Row;
typedef struct { lanes offset[PAIRS][2], scale[PAIRS][2], bias[PAIRS][2]; } Sums;

INLINE lanes sum_of_row(lanes x) {
    UNROLL for (int mask = 1; mask < 32; mask *= 2) x += across(x, mask);
    return x;
}

INLINE void load_row(const pair *from, int row, Row *x) {
    UNROLL for (int k = 0; k < PAIRS; k++) {
        bits two = load(from + (long)row * (WIDTH / 2), lane_number() + 32 * k, lane_number() >= 0);
        x->c[k][0] = low(two), x->c[k][1] = high(two);
    }
}

INLINE lanes vector(const float *vectors, int which, int k, int half) {
    return at_lane(vectors + which * WIDTH, lane_number() * 2 + (64 * k + half));
}

INLINE void row_gradient(const pair *product, const float *statistics, const pair *cotangent, const float *vectors,
                         pair *of_product, float *through, int row, Sums *sums) {
    Row part, y, d;
    float mean = statistics[2 * row], inverse = statistics[2 * row + 1];
    load_row(product, row, &part);
    load_row(cotangent, row, &d);
    lanes sum = splat(0), square = splat(0), of_mean = splat(0), along = splat(0), of_deviation = splat(0);
    UNROLL for (int k = 0; k < PAIRS; k++) UNROLL for (int i = 0; i < 2; i++) {
        part.c[k][i] = (part.c[k][i] - vector(vectors, LEFT_OVER, k, i) * mean) * inverse;
        y.c[k][i] = part.c[k][i] + vector(vectors, OFFSET, k, i);
        sum += y.c[k][i];
    }
    lanes last_mean = sum_of_row(sum) * (1.f / WIDTH);
    UNROLL for (int k = 0; k < PAIRS; k++) UNROLL for (int i = 0; i < 2; i++) {
        y.c[k][i] -= last_mean;
        square = fma_(y.c[k][i], y.c[k][i], square);
    }
    lanes last_inverse = rsqrt_(fma_(sum_of_row(square), splat(1.f / WIDTH), splat(EPSILON)));
    UNROLL for (int k = 0; k < PAIRS; k++) UNROLL for (int i = 0; i < 2; i++) {
        y.c[k][i] *= last_inverse;
        sums->bias[k][i] += d.c[k][i];
        sums->scale[k][i] = fma_(d.c[k][i], y.c[k][i], sums->scale[k][i]);
        d.c[k][i] *= vector(vectors, SCALE, k, i);
        of_mean += d.c[k][i];
        along = fma_(d.c[k][i], y.c[k][i], along);
    }
    of_mean = sum_of_row(of_mean) * (1.f / WIDTH), along = sum_of_row(along) * (1.f / WIDTH);
    UNROLL for (int k = 0; k < PAIRS; k++) {
        UNROLL for (int i = 0; i < 2; i++) {
            d.c[k][i] = (d.c[k][i] - of_mean - y.c[k][i] * along) * last_inverse;
            sums->offset[k][i] += d.c[k][i];
            of_deviation = fma_(d.c[k][i], part.c[k][i], of_deviation);
        }
        store(of_product + (long)row * (WIDTH / 2), lane_number() + 32 * k,
              pack(d.c[k][0] * inverse, d.c[k][1] * inverse), lane_number() >= 0);
    }
    store_first(through + row, sum_of_row(of_deviation) * (inverse * inverse * (1.f / INPUTS)));
}

#ifdef __CUDACC__
KERNEL norm_gradient(const pair *__restrict__ product, const float *__restrict__ statistics,
                     const pair *__restrict__ cotangent, const float *__restrict__ vectors,
                     const int *__restrict__ count, pair *__restrict__ of_product, float *__restrict__ through,
                     float *__restrict__ of_vectors) {
    float *here = reinterpret_cast<float *>(shared);
    for (int i = threadIdx.x; i < 3 * WIDTH; i += 32 * WARPS) here[i] = vectors[i];
    __syncthreads();
    Sums sums = {};
    int rows = *count;
#pragma unroll 1
    for (int row = blockIdx.x * WARPS + threadIdx.x / 32; row < rows; row += gridDim.x * WARPS)
        row_gradient(product, statistics, cotangent, here, of_product, through, row, &sums);
    add_up<SUMS>(&sums.offset[0][0], of_vectors + blockIdx.x * ((SUMS + 3) / 4 * 128));
}
#else
void norm_gradient(const pair *product, const float *statistics, const pair *cotangent, const float *vectors,
                   const int *count, pair *of_product, float *through, float *of_vectors) {
    Sums sums;
    memset(&sums, 0, sizeof sums);
    for (int row = 0; row < *count; row++)
        row_gradient(product, statistics, cotangent, vectors, of_product, through, row, &sums);
    add_up(&sums.offset[0][0], SUMS, of_vectors);
}
#endif
