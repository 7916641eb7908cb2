/* Resizing and affine maps of RGB images, pixel for pixel what Pillow makes of them (libImaging/Resample.c and Geometry.c),
   with the three channels of a pixel in one vector. resample.py compiles and calls this; see there for the arguments. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __SSE4_1__
#include <immintrin.h>
#endif

typedef uint8_t bytes4 __attribute__((vector_size(4)));
typedef int32_t ints4 __attribute__((vector_size(16)));
typedef double doubles4 __attribute__((vector_size(32)));

enum { CHANNELS = 3, PRECISION = 22, HALF = 1 << (PRECISION - 1), SLACK = 8 };

/* Reads one byte more than a pixel has: what it is called with has SLACK bytes behind it. */
static inline ints4 load(const uint8_t *pixel) {
#ifdef __SSE4_1__
    int32_t bytes;
    memcpy(&bytes, pixel, 4);
    return (ints4)_mm_cvtepu8_epi32(_mm_cvtsi32_si128(bytes));
#else
    bytes4 bytes;
    memcpy(&bytes, pixel, 4);
    return __builtin_convertvector(bytes, ints4);
#endif
}

static inline uint8_t clip(int32_t value) { return value < 0 ? 0 : value > 255 ? 255 : value; }

static inline void store(uint8_t *pixel, ints4 value) {
#ifdef __SSE4_1__
    __m128i words = _mm_packus_epi32((__m128i)value, (__m128i)value);
    int32_t bytes = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
    memcpy(pixel, &bytes, CHANNELS);
#else
    for (int c = 0; c < CHANNELS; c++) pixel[c] = clip(value[c]);
#endif
}

static double bilinear(double x) {
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

static double bicubic(double x) {
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

typedef struct {
    int taps;        /* at most, of one output */
    int *first;      /* input at which the taps of an output begin */
    int *count;      /* of the taps of an output */
    int32_t *weight; /* fixed point, `taps` for each output */
} Taps;

/* The taps of the outputs from `begin` on, where `input` pixels become `output`. 0 where there is no memory. */
static int make_taps(Taps *made, int input, int output, int begin, int length, int cubic) {
    double scale = (double)input / output, stretch = scale < 1.0 ? 1.0 : scale;
    double support = (cubic ? 2.0 : 1.0) * stretch;
    made->taps = (int)ceil(support) * 2 + 2; /* one to spare, see along_row */
    made->first = malloc(length * sizeof(int));
    made->count = malloc(length * sizeof(int));
    made->weight = calloc((size_t)length * made->taps, sizeof(int32_t));
    double *exact = malloc(made->taps * sizeof(double));
    if (!made->first || !made->count || !made->weight || !exact) {
        free(exact);
        return 0;
    }
    for (int i = 0; i < length; i++) {
        double centre = (begin + i + 0.5) * scale, sum = 0.0;
        int first = (int)(centre - support + 0.5), last = (int)(centre + support + 0.5);
        first = first < 0 ? 0 : first;
        last = last > input ? input : last;
        for (int x = first; x < last; x++) {
            double at = (x - centre + 0.5) * (1.0 / stretch);
            sum += exact[x - first] = cubic ? bicubic(at) : bilinear(at);
        }
        for (int x = 0; x < last - first; x++) {
            double weight = (sum != 0.0 ? exact[x] / sum : exact[x]) * (1 << PRECISION);
            made->weight[i * made->taps + x] = (int32_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
        made->first[i] = first;
        made->count[i] = last - first;
    }
    free(exact);
    return 1;
}

static void free_taps(Taps *taps) {
    free(taps->first);
    free(taps->count);
    free(taps->weight);
}

static void along_row(const uint8_t *padded, const Taps *taps, int width, uint8_t *out) {
    for (int x = 0; x < width; x++) {
        const int32_t *weight = taps->weight + x * taps->taps;
        const uint8_t *pixel = padded + taps->first[x] * CHANNELS;
        ints4 sum = {HALF, HALF, HALF, 0};
#ifdef __AVX2__
        /* Two pixels at a time; after an odd number of taps comes one whose weight is 0. */
        const __m128i spread = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, -1, -1, -1, -1, -1, -1, -1, -1);
        const __m256i pairs = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
        __m256i sums = _mm256_setzero_si256();
        for (int tap = 0; tap < taps->count[x]; tap += 2) {
            __m128i bytes = _mm_loadl_epi64((const __m128i *)(pixel + tap * CHANNELS));
            __m256i pixels = _mm256_cvtepu8_epi32(_mm_shuffle_epi8(bytes, spread));
            __m128i two = _mm_loadl_epi64((const __m128i *)(weight + tap));
            __m256i weights = _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(two), pairs);
            sums = _mm256_add_epi32(sums, _mm256_mullo_epi32(pixels, weights));
        }
        sum += (ints4)_mm256_castsi256_si128(sums) + (ints4)_mm256_extracti128_si256(sums, 1);
#else
        for (int tap = 0; tap < taps->count[x]; tap++) sum += load(pixel + tap * CHANNELS) * weight[tap];
#endif
        store(out + x * CHANNELS, sum >> PRECISION);
    }
}

static void across_rows(const uint8_t *rows, int64_t row_bytes, int bytes, const int32_t *weight, int count,
                        int32_t *sum, uint8_t *out) {
    for (int i = 0; i < bytes; i++) sum[i] = HALF;
    for (int tap = 0; tap < count; tap++) {
        const uint8_t *row = rows + tap * row_bytes;
        for (int i = 0; i < bytes; i++) sum[i] += row[i] * weight[tap];
    }
    for (int i = 0; i < bytes; i++) out[i] = clip(sum[i] >> PRECISION);
}

/* 0 where there is no memory. */
int resize(const uint8_t *image, int64_t row_bytes, int height, int width, uint8_t *out, int to_height, int to_width,
           int top, int left, int rows, int columns, int cubic) {
    Taps across = {0}, down = {0};
    int bytes = columns * CHANNELS, whole = width * CHANNELS, done = 0;
    uint8_t *padded = malloc((size_t)whole + SLACK), *between = malloc((size_t)height * bytes);
    int32_t *sum = malloc((size_t)(whole > bytes ? whole : bytes) * sizeof(int32_t));
    if (padded && between && sum && make_taps(&across, width, to_width, left, columns, cubic) &&
        make_taps(&down, height, to_height, top, rows, cubic)) {
        /* Pillow's order, which decides how the pixels between the passes are rounded. */
        if (height > to_height && height - to_height > (width - to_width) * 2) {
            for (int y = 0; y < rows; y++) {
                across_rows(image + down.first[y] * row_bytes, row_bytes, whole, down.weight + y * down.taps,
                            down.count[y], sum, padded);
                along_row(padded, &across, columns, out + (size_t)y * bytes);
            }
        } else {
            int last = down.first[rows - 1] + down.count[rows - 1];
            for (int y = down.first[0]; y < last; y++) {
                memcpy(padded, image + y * row_bytes, whole);
                along_row(padded, &across, columns, between + (size_t)y * bytes);
            }
            for (int y = 0; y < rows; y++)
                across_rows(between + (size_t)down.first[y] * bytes, bytes, bytes, down.weight + y * down.taps,
                            down.count[y], sum, out + (size_t)y * bytes);
        }
        done = 1;
    }
    free_taps(&across);
    free_taps(&down);
    free(padded);
    free(between);
    free(sum);
    return done;
}

static inline int clamp(int value, int size) { return value < 0 ? 0 : value < size ? value : size - 1; }

static inline doubles4 at(const uint8_t *row, int x) {
#ifdef __AVX__
    return (doubles4)_mm256_cvtepi32_pd((__m128i)load(row + (int64_t)x * CHANNELS));
#else
    return __builtin_convertvector(load(row + (int64_t)x * CHANNELS), doubles4);
#endif
}

static inline ints4 truncate(doubles4 value) {
#ifdef __AVX__
    return (ints4)_mm256_cvttpd_epi32((__m256d)value);
#else
    return __builtin_convertvector(value, ints4);
#endif
}

static inline doubles4 cubic_between(doubles4 a, doubles4 b, doubles4 c, doubles4 d, double t) {
    doubles4 p2 = -a + c, p3 = 2 * (a - b) + c - d, p4 = -a + b - c + d;
    return b + t * (p2 + t * (p3 + t * p4));
}

static inline doubles4 cubic_in_row(const uint8_t *row, const int *x, double t) {
    return cubic_between(at(row, x[0]), at(row, x[1]), at(row, x[2]), at(row, x[3]), t);
}

static inline doubles4 sample_cubic(const uint8_t *padded, int height, int width, double x, double y) {
    int left = (int)floor(x), top = (int)floor(y), columns[4];
    double across = x - left, down = y - top;
    const uint8_t *rows[4];
    for (int i = 0; i < 4; i++) {
        columns[i] = clamp(left - 1 + i, width);
        rows[i] = padded + (int64_t)clamp(top - 1 + i, height) * width * CHANNELS;
    }
    /* Shears and translations run along one axis: along the other the formula gives its second value, exactly. */
    if (down == 0) return cubic_in_row(rows[1], columns, across);
    if (across == 0)
        return cubic_between(at(rows[0], columns[1]), at(rows[1], columns[1]), at(rows[2], columns[1]),
                             at(rows[3], columns[1]), down);
    return cubic_between(cubic_in_row(rows[0], columns, across), cubic_in_row(rows[1], columns, across),
                         cubic_in_row(rows[2], columns, across), cubic_in_row(rows[3], columns, across), down);
}

static inline doubles4 sample_linear(const uint8_t *padded, int height, int width, double x, double y) {
    int left = (int)floor(x), top = (int)floor(y), x0 = clamp(left, width), x1 = clamp(left + 1, width);
    double across = x - left, down = y - top;
    const uint8_t *row = padded + (int64_t)clamp(top, height) * width * CHANNELS;
    doubles4 upper = at(row, x0) + (at(row, x1) - at(row, x0)) * across;
    if (down == 0) return upper;
    row = padded + (int64_t)clamp(top + 1, height) * width * CHANNELS;
    doubles4 lower = at(row, x0) + (at(row, x1) - at(row, x0)) * across;
    return upper + (lower - upper) * down;
}

/* 0 where there is no memory. */
int affine(const uint8_t *image, int height, int width, uint8_t *out, const double *matrix, int cubic,
           const uint8_t *fill) {
    size_t bytes = (size_t)height * width * CHANNELS;
    uint8_t *padded = malloc(bytes + SLACK);
    if (!padded) return 0;
    memcpy(padded, image, bytes);
    for (int row = 0; row < height; row++)
        for (int column = 0; column < width; column++, out += CHANNELS) {
            double x = matrix[0] * (column + 0.5) + matrix[1] * (row + 0.5) + matrix[2];
            double y = matrix[3] * (column + 0.5) + matrix[4] * (row + 0.5) + matrix[5];
            if (!(x >= 0.0 && x < width && y >= 0.0 && y < height)) {
                memcpy(out, fill, CHANNELS);
                continue;
            }
            doubles4 value = cubic ? sample_cubic(padded, height, width, x - 0.5, y - 0.5)
                                   : sample_linear(padded, height, width, x - 0.5, y - 0.5);
            store(out, truncate(value));
        }
    free(padded);
    return 1;
}

void mirror(const uint8_t *image, int64_t pixels, int width, uint8_t *out) {
    for (const uint8_t *row = image; row < image + pixels * CHANNELS; row += (int64_t)width * CHANNELS)
        for (int x = width - 1; x >= 0; x--, out += CHANNELS) memcpy(out, row + x * CHANNELS, CHANNELS);
}
