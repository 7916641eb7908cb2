/* The CUDA half of lanes.h without a GPU: a thread for each CUDA thread, one block after the other. What a warp does
   together, the 32 threads of a warp do through a table that all of them have written before any of them reads. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utility>
#define __device__
#define __forceinline__ inline
#define __global__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
struct uint4 { unsigned x, y, z, w; };
struct Place { unsigned x; };
static thread_local Place threadIdx, blockIdx;
static Place gridDim;
static pthread_barrier_t block_barrier, warp_barriers[32];
static unsigned tables[32][6][32];
static void __syncthreads() { pthread_barrier_wait(&block_barrier); }

typedef float lanes;
typedef unsigned bits;
typedef int ints;
typedef unsigned pair;
#define INLINE static inline
#define UNROLL
static unsigned of_float(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
static float of_bits(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
static unsigned rounded(float x) { unsigned u = of_float(x); return isnan(x) ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16; }
static void warp_wait() { pthread_barrier_wait(&warp_barriers[threadIdx.x / 32]); }
static unsigned (*table())[32] { return tables[threadIdx.x / 32]; }

INLINE ints lane_number(void) { return threadIdx.x & 31; }
/* What another lane of the warp has. */
static unsigned from_lane(unsigned x, int lane) {
    table()[0][lane_number()] = x;
    warp_wait();
    unsigned found = table()[0][lane];
    warp_wait();
    return found;
}
INLINE lanes splat(float x) { return x; }
INLINE lanes larger(lanes a, lanes b) { return fmaxf(a, b); }
INLINE lanes fma_(lanes a, lanes b, lanes c) { return fmaf(a, b, c); }
INLINE lanes exp2_(lanes x) { return exp2f(x); }
INLINE lanes tanh_(lanes x) { return tanhf(x); }
INLINE lanes rsqrt_(lanes x) { return 1 / sqrtf(x); }
INLINE lanes rcp_(lanes x) { return 1 / x; }
INLINE lanes across(lanes x, int mask) { return of_bits(from_lane(of_float(x), lane_number() ^ mask)); }
INLINE lanes from_one_of_four(lanes x, int one) { return of_bits(from_lane(of_float(x), lane_number() / 4 * 4 + one)); }
INLINE lanes select(ints where, lanes a, lanes b) { return where ? a : b; }
INLINE lanes at_lane(const float *from, ints index) { return from[index]; }
INLINE bits pack(lanes a, lanes b) { return rounded(a) | rounded(b) << 16; }
INLINE lanes low(bits x) { return of_bits(x << 16); }
INLINE lanes high(bits x) { return of_bits(x & 0xffff0000u); }
INLINE bits zeros(void) { return 0; }
INLINE bits ones(void) { return (threadIdx.x & 3) ? 0 : 0x3f80; }
static float half_of(unsigned x, int which) { return which ? high(x) : low(x); }
/* PTX's manual, movmatrix: lane i has row i / 4, columns 2 (i % 4) and one more. */
INLINE bits turn(bits x) {
    int lane = lane_number(), column = lane / 4;
    unsigned found = 0;
    table()[0][lane] = x;
    warp_wait();
    for (int h = 0; h < 2; h++) {
        unsigned pair_of_row = table()[0][(lane % 4 * 2 + h) * 4 + column / 2];
        found |= (pair_of_row >> 16 * (column % 2) & 0xffff) << 16 * h;
    }
    warp_wait();
    return found;
}
/* PTX's manual, mma.m16n8k16 and m16n8k8: where the numbers of the operands lie. */
static void multiply(lanes *d, const bits *a, const bits *b, int k) {
    int lane = lane_number();
    for (int r = 0; r < k / 4; r++) table()[r][lane] = a[r];
    for (int r = 0; r < k / 8; r++) table()[4 + r][lane] = b[r];
    warp_wait();
    for (int c = 0; c < 4; c++) {
        int row = lane / 4 + c / 2 * 8, column = lane % 4 * 2 + c % 2;
        for (int j = 0; j < k; j++) {
            unsigned left = table()[row / 8 + j / 8 * 2][row % 8 * 4 + j % 8 / 2];
            unsigned right = table()[4 + j / 8][column * 4 + j % 8 / 2];
            d[c] += half_of(left, j % 2) * half_of(right, j % 2);
        }
    }
    warp_wait();
}
INLINE void mma16(lanes *d, const bits *a, bits b0, bits b1) { bits b[] = {b0, b1}; multiply(d, a, b, 16); }
INLINE void mma8(lanes *d, const bits *a, bits b0) { multiply(d, a, &b0, 8); }
INLINE bits load(const pair *from, ints index, ints there) { return there ? from[index] : 0; }
INLINE bits load_again(const pair *from, ints index, ints there) { return load(from, index, there); }
INLINE void store(pair *to, ints index, bits value, ints there) { if (there) to[index] = value; }
INLINE void store_first(float *to, lanes value) { if (!lane_number()) *to = value; }
#define ZEROS {0, 0, 0, 0}
typedef struct { bits r[4]; } Fragment;
INLINE Fragment fragment(const pair *tiles, int tile) {
    uint4 v = reinterpret_cast<const uint4 *>(tiles)[tile * 32 + lane_number()];
    return Fragment{{v.x, v.y, v.z, v.w}};
}

template <class... A, size_t... I> static void call(void (*kernel)(A...), void **given, std::index_sequence<I...>) {
    kernel(static_cast<A>(given[I])...);
}
template <class... A> static void call(void (*kernel)(A...), void **given) {
    call(kernel, given, std::index_sequence_for<A...>());
}
static void call_kernel(void **given);
struct Thread { unsigned thread, block; void **given; };
static void *run(void *of) {
    Thread *own = static_cast<Thread *>(of);
    threadIdx.x = own->thread, blockIdx.x = own->block;
    call_kernel(own->given);
    return nullptr;
}
static void launch(void **given, int blocks, int threads, void *shared_memory, size_t bytes) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 1 << 20);
    gridDim.x = blocks;
    for (int block = 0; block < blocks; block++) {
        memset(shared_memory, 0xff, bytes); /* NaN where nothing was written */
        pthread_barrier_init(&block_barrier, nullptr, threads);
        for (int warp = 0; warp < threads / 32; warp++) pthread_barrier_init(&warp_barriers[warp], nullptr, 32);
        pthread_t *made = new pthread_t[threads];
        Thread *each = new Thread[threads];
        for (int i = 0; i < threads; i++) {
            each[i] = {unsigned(i), unsigned(block), given};
            if (pthread_create(&made[i], &attributes, run, &each[i])) abort();
        }
        for (int i = 0; i < threads; i++) pthread_join(made[i], nullptr);
        delete[] made;
        delete[] each;
    }
}
/* program BLOCKS THREADS INPUTS BYTES...: inputs from standard input, outputs, which begin as NaN, to standard output.
   Each has memory of its own, so that AddressSanitizer knows where it ends. */
#define MAIN(SHARED)                                                                                                   \
    int main(int count, char **argument) {                                                                             \
        int inputs = atoi(argument[3]), arrays = count - 4;                                                            \
        void **given = new void *[arrays];                                                                             \
        for (int i = 0; i < arrays; i++) {                                                                             \
            size_t bytes = atol(argument[4 + i]);                                                                      \
            given[i] = malloc(bytes); /* 16-aligned */                                                                   \
            memset(given[i], 0xff, bytes);                                                                             \
            if (i < inputs && fread(given[i], 1, bytes, stdin) != bytes) abort();                                      \
        }                                                                                                              \
        launch(given, atoi(argument[1]), atoi(argument[2]), SHARED, sizeof SHARED);                                    \
        for (int i = inputs; i < arrays; i++) fwrite(given[i], 1, atol(argument[4 + i]), stdout);                      \
    }
