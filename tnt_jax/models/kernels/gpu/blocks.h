/* What the warps of a block do together: weights in shared memory, and sums over sentences or rows. */
#include "lanes.h"

#ifdef __CUDACC__
#define KERNEL extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
extern __shared__ __align__(16) pair shared[];
INLINE void copy_to_shared(const pair *from, int tiles) {
    for (int i = threadIdx.x; i < tiles * 32; i += 32 * WARPS)
        reinterpret_cast<uint4 *>(shared)[i] = reinterpret_cast<const uint4 *>(from)[i];
    __syncthreads();
}

/* The sums of all warps of a block, one after the other, so that they are the same in every run. */
template <int COUNT> INLINE void add_up(const lanes *mine, float *out) {
    float *sums = reinterpret_cast<float *>(shared);
    for (int warp = 0; warp < WARPS; warp++) {
        __syncthreads();
        if (threadIdx.x / 32 == warp) {
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                int at = i / 4 * 128 + (threadIdx.x & 31) * 4 + i % 4;
                sums[at] = warp ? sums[at] + mine[i] : mine[i];
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < (COUNT + 3) / 4 * 128; i += 32 * WARPS)
        out[i] = i / 128 * 4 + i % 4 < COUNT ? sums[i] : 0;
    __syncthreads(); /* before they are overwritten */
}
#else
static void add_up(const lanes *of, int count, float *out) {
    for (int i = 0; i < count; i++) EACH(lane) out[i / 4 * 128 + lane * 4 + i % 4] = of[i][lane];
}
#endif
