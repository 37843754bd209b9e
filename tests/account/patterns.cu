// Kernels whose requests are known, for patterns.cpp. Of all a block is one warp.
#include "lib/matrix.cuh"

// A value a lane, of shared memory, `stride` values apart.
#define OF_SHARED(name, T)                                          \
    KERNEL(name, 32, 1, (int stride), {                             \
        SHARED_MEMORY(shared);                                      \
        reinterpret_cast<T *>(shared)[threadIdx.x * stride] = T{};  \
    })
typedef AlignedVector<float, 2> Pair;
typedef AlignedVector<float, 4> Four;
OF_SHARED(shared_2, f16)
OF_SHARED(shared_4, float)
OF_SHARED(shared_8, Pair)
OF_SHARED(shared_16, Four)

// Rows of 16 bytes, `stride` elements of 16 bits apart.
KERNEL(matrices, 32, 1, (int stride), {
    SHARED_MEMORY(shared);
    unsigned r[4];
    const f16 *row = reinterpret_cast<f16 *>(shared) + threadIdx.x * stride;
    load_matrices(r, row);
    load_matrices_transposed(r, row);
})

// 16 bytes for each of `there` lanes, and zeros for the others.
KERNEL(copies, 32, 1, (const float *x, int there), {
    SHARED_MEMORY(shared);
    copy_async(shared + 16 * threadIdx.x, x + 4 * threadIdx.x, (int)threadIdx.x < there);
    copy_commit();
    copy_wait<0>();
})

// A value a lane, read `stride` values apart from `first` on, added to what is written side by
// side.
KERNEL(add_to, 32, 1, (const float *x, float *y, int first, int stride), {
    y[threadIdx.x] += x[first + (int)threadIdx.x * stride];
})

// Eight elements of 16 bits a lane by one access; each block reads the same.
KERNEL(wide, 32, 1, (const f16 *x, f16 *y), {
    float v[8];
    load(v, x + 8 * threadIdx.x);
    store(y + 8 * (32 * blockIdx.x + threadIdx.x), v);
})

// `count` values, of which the last lanes have one less each.
KERNEL(loop, 32, 1, (float *y, int count), {
    for (int at = threadIdx.x; at < count; at += 32) y[at] = 0.0f;
})

// Twice: a row of all lanes, and one of every other lane. They come together in between.
KERNEL(apart, 32, 1, (float *y), {
    for (int row = 0; row < 4; row += 2) {
        for (int i = 0; i <= (int)threadIdx.x % 2; i++) y[(row + i) * 32 + threadIdx.x] = 0.0f;
        __syncwarp();
    }
})
