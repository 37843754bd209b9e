// Dense layers of 16 bits by wgmma, for sm_90a: what linear_matrix of linear.cu computes, for
// weights [n, k] and rows in whole pieces of 16 bytes.
//
//   block    128 x 96 or, if that gives few blocks, 64 x 96: a warpgroup has 64 rows. Grid (m /
//            rows, n / columns, split_k): if several blocks share a product's k,
//            linear_splitk_reduce adds up their sums
//   step     64 elements of k, 128 bytes of each row, through four buffers filled by asynchronous
//            copies, swizzled: both operands are read from there. While a step is multiplied, the
//            copies of the third after it are started into the buffer of the one before it
//
// Sums: in the order of k, in the float accumulators of the tensor cores, which add 16 products at
// once and truncate.
//
// It has not run on a GPU. Counted: docs/kernels.md.
#include "lib/linear.cuh"
#include "lib/wgmma.cuh"

// How a block is laid out: a number of warpgroups, each with 64 rows.
template <int GROUPS> struct Tile {
    static constexpr int ROWS = 64 * GROUPS, COLUMNS = 96, THREADS = 128 * GROUPS, BYTES = 128,
                         STAGES = 4;
    static constexpr bool SWIZZLED = true;
};

// tensor cores
template <class L, class T>
__device__ __forceinline__ void linear_wgmma(unsigned char *shared, const T *x, const T *w,
                                             const float *bias, const T *residual, T *y,
                                             float *splitk_workspace, const Dense &s) {
#ifdef WITHOUT_WGMMA
    stop();
#else
    constexpr int ROWS = L::ROWS, COLUMNS = L::COLUMNS, DEPTH = STEP_DEPTH<T, L>,
                  STAGES = L::STAGES;
    T *left = reinterpret_cast<T *>(shared), *right = left + STAGES * ROWS * DEPTH;
    int m0 = blockIdx.x * ROWS, n0 = blockIdx.y * COLUMNS, group = threadIdx.x / 128;
    int all = (s.k + DEPTH - 1) / DEPTH, first = blockIdx.z * all / gridDim.z,
        steps = (blockIdx.z + 1) * all / gridDim.z - first;
    TileLoader<T, L, ROWS> rows(x, left, m0, s.m, first * DEPTH, s.k);
    TileLoader<T, L, COLUMNS> columns(w, right, n0, s.n, first * DEPTH, s.k);
    auto start = [&](int step, int buffer) {
        if (step < steps) rows.load_tile_async(buffer), columns.load_tile_async(buffer);
        copy_commit();
    };
    for (int i = 0; i < STAGES - 1; i++) start(i, i);
    Descriptor a = describe_swizzled(left + group * 64 * DEPTH), b = describe_swizzled(right);
    float acc[1][COLUMNS / 2] = {};
#pragma unroll 1
    for (int step = 0, buffer = 0; step < steps;
         step++, buffer = buffer + 1 == STAGES ? 0 : buffer + 1) {
        copy_wait<STAGES - 2>();
        fence_async();
        __syncthreads();
        fence_sums(acc);
#pragma unroll
        for (int k = 0; k < L::BYTES / 32; k++) {
            start_product<T>(acc[0], a + buffer * (ROWS * L::BYTES / 16) + k * 2,
                             b + buffer * (COLUMNS * L::BYTES / 16) + k * 2);
        }
        commit_products();
        start(step + STAGES - 1, buffer ? buffer - 1 : STAGES - 1);
        await_products(acc);
    }
    // Through shared memory once more, so that rows are written in whole pieces.
    copy_wait<0>();
    __syncthreads();
    float *sums = reinterpret_cast<float *>(shared);
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i += 2) {
        float v[2] = {acc[0][i], acc[0][i + 1]};
        store(sums + (threadIdx.x / 32 * 16 + i / 2 % 2 * 8 + lane / 4) * SUMS_ROW<COLUMNS> +
                  i / 4 * 8 + lane % 4 * 2, v);
    }
    __syncthreads();
    write_tile<ROWS, COLUMNS, L::THREADS>(sums, m0, n0, bias, residual, y, splitk_workspace, s);
#endif
}

#define LINEAR_WGMMA(NAME, T, GROUPS, THREADS)                                                     \
    KERNEL(NAME, THREADS, 2,                                                                       \
           (const T *x, const T *w, const float *bias, const T *residual, T *y, int m, int n,      \
            int k, int act, float *splitk_workspace),                                              \
           WGMMA_SHARED_MEMORY(shared);                                                            \
           linear_wgmma<Tile<GROUPS>>(shared, x, w, bias, residual, y, splitk_workspace,           \
                                      Dense{m, n, k, act}))
#define LINEAR(T)                                                                                  \
    LINEAR_WGMMA(linear_wgmma_##T, T, 1, 128)                                                      \
    LINEAR_WGMMA(linear_wgmma_tall_##T, T, 2, 256)
LINEAR(f16)
LINEAR(bf16)
