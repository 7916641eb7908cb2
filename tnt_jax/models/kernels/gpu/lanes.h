/* One source for two machines. CUDA: a variable is one number of one lane, a warp is 32 of them, mma.sync multiplies.
   C on a CPU: the same variable is a vector of 32 numbers and each instruction of a warp is a loop. That is slow, and it
   is what the tests run: with bfloat16 as on a GPU, or with -DEXACT in float32 throughout.

   `lanes` are numbers, `bits` are two bfloat16 numbers side by side, `pair` is such two in memory. */
#ifdef __CUDACC__
typedef float lanes;
typedef unsigned bits;
typedef int ints;
typedef unsigned pair;
#define INLINE static __device__ __forceinline__
#define UNROLL _Pragma("unroll")
INLINE ints lane_number(void) { return threadIdx.x & 31; }
INLINE lanes splat(float x) { return x; }
INLINE lanes larger(lanes a, lanes b) { return fmaxf(a, b); }
INLINE lanes fma_(lanes a, lanes b, lanes c) { return fmaf(a, b, c); }
INLINE lanes exp2_(lanes x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
INLINE lanes tanh_(lanes x) { float y; asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
INLINE lanes rsqrt_(lanes x) { float y; asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
INLINE lanes rcp_(lanes x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
INLINE lanes across(lanes x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
INLINE lanes from_one_of_four(lanes x, int one) { return __shfl_sync(0xffffffffu, x, one, 4); }
INLINE lanes select(ints where, lanes a, lanes b) { return where ? a : b; }
INLINE lanes at_lane(const float *from, ints index) { return from[index]; }
/* The low 16 bits are a, the high ones b. */
INLINE bits pack(lanes a, lanes b) {
    unsigned d;
    asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(b), "f"(a));
    return d;
}
INLINE lanes low(bits x) { return __uint_as_float(x << 16); }
INLINE lanes high(bits x) { return __uint_as_float(x & 0xffff0000u); }
INLINE bits zeros(void) { return 0; }
/* 1 in the first channel of eight; volatile, or it is made again wherever it is used. */
INLINE bits ones(void) {
    unsigned d;
    asm volatile("mov.b32 %0, %1;" : "=r"(d) : "r"((threadIdx.x & 3) ? 0u : 0x3f80u));
    return d;
}
/* A tile of 8 x 8, transposed. */
INLINE bits turn(bits x) {
    unsigned d;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(x));
    return d;
}
/* d += a (16 x 16) b (16 x 8) */
INLINE void mma16(lanes *d, const bits *a, bits b0, bits b1) {
    float c0 = d[0], c1 = d[1], c2 = d[2], c3 = d[3]; /* a sum that starts with zeros takes no registers for them */
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}
/* d += a (16 x 8) b (8 x 8) */
INLINE void mma8(lanes *d, const bits *a, bits b0) {
    float c0 = d[0], c1 = d[1], c2 = d[2], c3 = d[3];
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}
INLINE bits load(const pair *from, ints index, ints there) { return there ? __ldg(from + index) : 0u; }
INLINE bits load_again(const pair *from, ints index, ints there) { return there ? from[index] : 0u; }
INLINE void store(pair *to, ints index, bits value, ints there) {
    if (there) to[index] = value;
}
INLINE void store_first(float *to, lanes value) {
    if (!(threadIdx.x & 31)) *to = value;
}
typedef struct { bits r[4]; } Fragment; /* a tile of 32 x 8 numbers: of each lane 8 */
INLINE Fragment fragment(const pair *tiles, int tile) {
    uint4 v = reinterpret_cast<const uint4 *>(tiles)[tile * 32 + (threadIdx.x & 31)];
    return Fragment{{v.x, v.y, v.z, v.w}};
}
#else
#include <math.h>
#include <string.h>
typedef float lanes __attribute__((vector_size(128)));
typedef int ints __attribute__((vector_size(128)));
#define INLINE static inline
#define UNROLL
#define EACH(lane) for (int lane = 0; lane < 32; lane++)
INLINE ints lane_number(void) { ints n; EACH(i) n[i] = i; return n; }
INLINE lanes splat(float x) { lanes y; EACH(i) y[i] = x; return y; }
INLINE lanes larger(lanes a, lanes b) { lanes y; EACH(i) y[i] = fmaxf(a[i], b[i]); return y; }
INLINE lanes fma_(lanes a, lanes b, lanes c) { return a * b + c; }
INLINE lanes exp2_(lanes x) { lanes y; EACH(i) y[i] = exp2f(x[i]); return y; }
/* As the instruction's, which is within 2^-11 of its value: ten bits behind the first. */
INLINE float rounded(float x) { unsigned u; memcpy(&u, &x, 4), u = (u + 4096) & ~8191u, memcpy(&x, &u, 4); return x; }
INLINE lanes tanh_(lanes x) { lanes y; EACH(i) y[i] = rounded(tanhf(x[i])); return y; }
INLINE lanes rsqrt_(lanes x) { lanes y; EACH(i) y[i] = 1 / sqrtf(x[i]); return y; }
INLINE lanes rcp_(lanes x) { return 1 / x; }
INLINE lanes across(lanes x, int mask) { lanes y; EACH(i) y[i] = x[i ^ mask]; return y; }
INLINE lanes from_one_of_four(lanes x, int one) { lanes y; EACH(i) y[i] = x[i / 4 * 4 + one]; return y; }
INLINE lanes select(ints where, lanes a, lanes b) { lanes y; EACH(i) y[i] = where[i] ? a[i] : b[i]; return y; }
INLINE lanes at_lane(const float *from, ints index) { lanes y; EACH(i) y[i] = from[index[i]]; return y; }
#ifdef EXACT /* float32 where a GPU has bfloat16: what remains is the arithmetic */
typedef struct { float a, b; } pair;
typedef struct { lanes a, b; } bits;
INLINE bits pack(lanes a, lanes b) { return (bits){a, b}; }
INLINE lanes low(bits x) { return x.a; }
INLINE lanes high(bits x) { return x.b; }
INLINE lanes erf_(lanes x) { lanes y; EACH(i) y[i] = erff(x[i]); return y; }
INLINE void set(bits *x, int lane, pair from) { x->a[lane] = from.a, x->b[lane] = from.b; }
INLINE pair get(bits x, int lane) { return (pair){x.a[lane], x.b[lane]}; }
#else
typedef unsigned pair;
typedef unsigned bits __attribute__((vector_size(128)));
INLINE unsigned to_bf16(float x) { unsigned u; memcpy(&u, &x, 4); return (u + 0x7fff + (u >> 16 & 1)) >> 16; }
INLINE float of_bf16(unsigned u) { float x; u <<= 16; memcpy(&x, &u, 4); return x; }
INLINE bits pack(lanes a, lanes b) { bits y; EACH(i) y[i] = to_bf16(a[i]) | to_bf16(b[i]) << 16; return y; }
INLINE lanes low(bits x) { lanes y; EACH(i) y[i] = of_bf16(x[i] & 0xffff); return y; }
INLINE lanes high(bits x) { lanes y; EACH(i) y[i] = of_bf16(x[i] >> 16); return y; }
INLINE void set(bits *x, int lane, pair from) { (*x)[lane] = from; }
INLINE pair get(bits x, int lane) { return x[lane]; }
#endif
INLINE bits zeros(void) { return pack(splat(0), splat(0)); }
INLINE bits ones(void) { lanes x; EACH(i) x[i] = i % 4 == 0; return pack(x, splat(0)); }
INLINE bits turn(bits x) {
    float m[8][8];
    lanes a = low(x), b = high(x);
    EACH(i) m[i / 4][i % 4 * 2] = a[i], m[i / 4][i % 4 * 2 + 1] = b[i];
    EACH(i) a[i] = m[i % 4 * 2][i / 4], b[i] = m[i % 4 * 2 + 1][i / 4];
    return pack(a, b);
}
/* Where PTX's manual says that the numbers of the operands of mma.m16n8k16 and m16n8k8 lie. */
static void mma(lanes *d, const bits *a, const bits *b, int k) {
    float left[16][16], right[16][8];
    for (int r = 0; r < k / 4; r++) {
        lanes halves[2] = {low(a[r]), high(a[r])};
        EACH(i) for (int h = 0; h < 2; h++) left[i / 4 + r % 2 * 8][r / 2 * 8 + i % 4 * 2 + h] = halves[h][i];
    }
    for (int r = 0; r < k / 8; r++) {
        lanes halves[2] = {low(b[r]), high(b[r])};
        EACH(i) for (int h = 0; h < 2; h++) right[r * 8 + i % 4 * 2 + h][i / 4] = halves[h][i];
    }
    EACH(i) for (int c = 0; c < 4; c++) for (int j = 0; j < k; j++)
        d[c][i] += left[i / 4 + c / 2 * 8][j] * right[j][i % 4 * 2 + c % 2];
}
INLINE void mma16(lanes *d, const bits *a, bits b0, bits b1) { bits b[2] = {b0, b1}; mma(d, a, b, 16); }
INLINE void mma8(lanes *d, const bits *a, bits b0) { mma(d, a, &b0, 8); }
INLINE bits load(const pair *from, ints index, ints there) {
    bits y;
    memset(&y, 0, sizeof y);
    EACH(i) if (there[i]) set(&y, i, from[index[i]]);
    return y;
}
INLINE bits load_again(const pair *from, ints index, ints there) { return load(from, index, there); }
INLINE void store(pair *to, ints index, bits value, ints there) { EACH(i) if (there[i]) to[index[i]] = get(value, i); }
INLINE void store_first(float *to, lanes value) { *to = value[0]; }
typedef struct { bits r[4]; } Fragment;
INLINE Fragment fragment(const pair *tiles, int tile) {
    Fragment f;
    EACH(i) for (int r = 0; r < 4; r++) set(&f.r[r], i, tiles[(tile * 32 + i) * 4 + r]);
    return f;
}
#endif
#define ZEROS {splat(0), splat(0), splat(0), splat(0)}
