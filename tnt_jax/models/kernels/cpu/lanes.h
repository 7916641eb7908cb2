/* Arithmetic between vectors whose lanes have nothing to do with each other, and matrix products of them; numbers in
   float32 and bfloat16. */

#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__AVX512F__)
enum { LANES = 16, WIDE = 6 };
#elif defined(__AVX__)
enum { LANES = 8, WIDE = 3 };
#else
enum { LANES = 4, WIDE = 6 };
#endif
enum { HIGH = 4 }; /* the sums of a block of HIGH x WIDE stay in registers */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef int64_t size;

#define INLINE static inline __attribute__((always_inline))

INLINE vec all(float x) { return (vec){0} + x; }

INLINE vec choose(ints where, vec a, vec b) { return (vec)(((ints)a & where) | ((ints)b & ~where)); }

/* NaN where b is. */
INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }

INLINE vec inverse_root(vec x) {
    for (int lane = 0; lane < LANES; lane++) x[lane] = 1 / sqrtf(x[lane]);
    return x;
}

INLINE float sum_of_lanes(vec x) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}

/* An array as XLA holds it, in float32 or in bfloat16, which is the upper half of a float32. */
typedef struct {
    void *data;
    int is_bfloat16;
} Array;

INLINE Array from(Array array, size offset) {
    array.data = (char *)array.data + offset * (array.is_bfloat16 ? 2 : 4);
    return array;
}

INLINE float widened(uint16_t x) {
    union { uint32_t bits; float number; } all = {(uint32_t)x << 16};
    return all.number;
}

/* To nearest, ties to even. */
INLINE uint16_t rounded(float x) {
    union { float number; uint32_t bits; } all = {x};
    uint32_t nan = all.bits >> 16 | 64, finite = (all.bits + 0x7fff + (all.bits >> 16 & 1)) >> 16;
    return (uint16_t)(x != x ? nan : finite);
}

/* `count` numbers; the array's lie side by side, the others `stride` apart. */
INLINE void read_numbers(Array array, size count, float *to, size stride) {
    const float *numbers = array.data;
    const uint16_t *halves = array.data;
    if (array.is_bfloat16)
        for (size i = 0; i < count; i++) to[i * stride] = widened(halves[i]);
    else
        for (size i = 0; i < count; i++) to[i * stride] = numbers[i];
}

INLINE void write_numbers(const float *numbers, size stride, size count, Array array) {
    float *to = array.data;
    uint16_t *halves = array.data;
    if (array.is_bfloat16)
        for (size i = 0; i < count; i++) halves[i] = rounded(numbers[i * stride]);
    else
        for (size i = 0; i < count; i++) to[i] = numbers[i * stride];
}

/* e^x for x <= 0, to 2e-7 of it. */
INLINE vec exponential(vec x) {
    x = larger(all(-87), x);
    vec shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the integer part comes to stand in the lowest bits */
    vec n = shifted - 12582912.0f, r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = 1 + r + r * r * (0.499992318f + r * (0.166671145f + r * (0.0418901151f + r * 0.00831252545f)));
    return (vec)((ints)p + ((ints)shifted << 23));
}

/* The normal distribution's cumulative function, to 3e-7: 1/2 + x P(x^2) / Q(x^2), fitted to |x| < 5.2. */
INLINE vec cumulative(vec x) {
    vec within = larger(all(-5.2f), -larger(all(-5.2f), -x)), u = within * within;
    vec p = 5.05042087e-6f + u * -1.53376858e-8f;
    p = 0.398942018f + u * (0.0580210636f + u * (0.00593026271f + u * (0.000387110768f + u * p)));
    vec q = 0.0418935759f + u * (0.00311519886f + u * 0.000129572881f);
    q = 1 + u * (0.312098106f + u * q);
    return choose(x > -5.2f, 0.5f + within * p / q, all(0));
}

/* ---- products ---- */

/* A matrix whose element (i, j) is data[i * row + j * column]; of vectors, or of numbers for all lanes. */
typedef struct {
    vec *data;
    size row, column;
} Vectors;

typedef struct {
    const float *data;
    size row, column;
} Numbers;

INLINE void block_of_vectors(int high, int wide, size depth, Vectors a, Vectors b, vec sums[HIGH][WIDE]) {
    for (size k = 0; k < depth; k++)
        for (int i = 0; i < high; i++)
            for (int j = 0; j < wide; j++)
                sums[i][j] += a.data[i * a.row + k * a.column] * b.data[k * b.row + j * b.column];
}

INLINE void block_of_numbers(int high, int wide, size depth, Vectors a, Numbers b, vec sums[HIGH][WIDE]) {
    for (size k = 0; k < depth; k++)
        for (int i = 0; i < high; i++)
            for (int j = 0; j < wide; j++)
                sums[i][j] += a.data[i * a.row + k * a.column] * b.data[k * b.row + j * b.column];
}

#define CASE(what, h, w)                                                 \
    case h * 8 + w: {                                                    \
        vec sums[HIGH][WIDE] = {0};                                      \
        what(h, w, depth, at_a, at_b, sums);                             \
        for (int y = 0; y < h; y++)                                      \
            for (int x = 0; x < w; x++) {                                \
                vec *to = c.data + (i + y) * c.row + (j + x) * c.column; \
                *to = add ? *to + sums[y][x] : sums[y][x];               \
            }                                                            \
        break;                                                           \
    }
#if defined(__AVX__) && !defined(__AVX512F__)
#define CASES(what, h) CASE(what, h, 1) CASE(what, h, 2) CASE(what, h, 3)
#else
#define CASES(what, h) \
    CASE(what, h, 1) CASE(what, h, 2) CASE(what, h, 3) CASE(what, h, 4) CASE(what, h, 5) CASE(what, h, 6)
#endif

/* c = a b, or c += a b, where a has `rows` rows and `depth` columns and b `columns` columns. */
#define PRODUCT(name, Right, block)                                                              \
    __attribute__((unused)) static void name(size rows, size depth, size columns, Vectors a,     \
                                             Right b, Vectors c, int add) {                      \
        for (size j = 0; j < columns; j += WIDE) {                                               \
            size wide = columns - j < WIDE ? columns - j : WIDE, high;                           \
            for (size i = 0; i < rows; i += high) {                                              \
                high = rows - i < HIGH ? 1 : HIGH;                                               \
                Vectors at_a = {a.data + i * a.row, a.row, a.column};                            \
                Right at_b = {b.data + j * b.column, b.row, b.column};                           \
                switch (high * 8 + wide) { CASES(block, 1) CASES(block, HIGH) }                  \
            }                                                                                    \
        }                                                                                        \
    }
PRODUCT(product, Vectors, block_of_vectors)
PRODUCT(linear, Numbers, block_of_numbers)

INLINE Vectors rows_of(vec *data, size width) { return (Vectors){data, width, 1}; }

INLINE Vectors transposed(Vectors x) { return (Vectors){x.data, x.column, x.row}; }

INLINE Numbers transposed_numbers(Numbers x) { return (Numbers){x.data, x.column, x.row}; }
