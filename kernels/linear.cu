// Dense layers: y = act(x w^T + b) + residual; x [m, k], w [n, k], y and residual [m, n]. For the
// input's gradient: y = x w with w [k, n] in its stored order.
//
//   matrix   block 64 x 64 or, if there are few rows, 16 x 64; k in steps of 128 bytes (64 elements
//            of 16 bits, 32 floats) through three buffers filled by asynchronous copies. If there
//            are few blocks, several share a product's k: each writes its sums in float, and
//            linear_splitk_reduce adds them up. For 16 bits on sm_90a there is a second body:
//            linear_wgmma.cu
//   plain    block 64 x 64, 256 threads of 4 x 4; k in steps of 16, each summed separately before
//            it is added to the total. For float32 as the oracle, and for rows that are not a
//            multiple of 16 bytes
#include "lib/linear.cuh"

constexpr int EDGE = 64, PLAIN_ROW = EDGE + 4;

// How a block is laid out: rows and columns, warps along both, bytes of k per step, buffers.
template <int ROWS_, int COLUMNS_, int DOWN_, int ACROSS_, int BYTES_, int STAGES_> struct Layout {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, DOWN = DOWN_, ACROSS = ACROSS_,
                         BYTES = BYTES_, STAGES = STAGES_;
    static constexpr int THREADS = 32 * DOWN * ACROSS;
    static constexpr bool SWIZZLED = false;
};
typedef Layout<64, 64, 2, 2, 128, 3> Many;
typedef Layout<16, 64, 1, 4, 128, 3> Few;

// Loads columns of a matrix [k, n] into shared memory: DEPTH rows per step, COLUMNS elements of
// each. Rows of n values are whole pieces of 16 bytes; beyond k and n there are zeros.
template <class T, class L> struct RowTileLoader {
    // Eight elements more than a row has: rows of floats that are 72 elements apart fall on
    // different banks.
    static constexpr int PIECES = L::COLUMNS / PIECE<T>, APART = L::THREADS / PIECES,
                         EACH = STEP_DEPTH<T, L> / APART, ROW = L::COLUMNS + 8;
    static_assert(STEP_DEPTH<T, L> * ROW == L::COLUMNS * STEP_STRIDE<T, L>,
                  "a step of rows is as large as one of columns");
    const T *from;
    T *to;
    int row, k, n;
    bool within;

    __device__ __forceinline__ RowTileLoader(const T *matrix, T *shared, int n0, int n, int k0,
                                             int k)
        : k(k), n(n) {
        int r = threadIdx.x / PIECES, column = threadIdx.x % PIECES * PIECE<T>;
        row = k0 + r, within = n0 + column < n;
        from = matrix + (int64)row * n + n0 + column, to = shared + r * ROW + column;
    }
    __device__ __forceinline__ void load_tile_async(int buffer) {
        T *cell = to + buffer * STEP_DEPTH<T, L> * ROW;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            copy_async(cell + i * APART * ROW, from + (int64)i * APART * n,
                       within && row + i * APART < k);
        from += (int64)STEP_DEPTH<T, L> * n, row += STEP_DEPTH<T, L>;
    }
};

template <bool FIRST, class A, class B> struct Either {
    typedef A Type;
};
template <class A, class B> struct Either<false, A, B> {
    typedef B Type;
};

// For k in whole pieces of 16 bytes. Grid (m / rows, n / columns, split_k). With LIES the weight is
// [k, n], with n in whole pieces too, and is transposed on its way out of shared memory.
// tensor cores
template <class P, class L, bool LIES, class T = typename Products<P>::Element>
__device__ __forceinline__ void linear_matrix(const T *x, const T *w, const float *bias,
                                              const T *residual, T *y, float *splitk_workspace,
                                              const Dense &s) {
    constexpr int ROWS = L::ROWS, COLUMNS = L::COLUMNS, STRIDE = STEP_STRIDE<T, L>,
                  DEPTH = STEP_DEPTH<T, L>, STAGES = L::STAGES;
    constexpr int M = ROWS / L::DOWN / 16, N = COLUMNS / L::ACROSS / 8;
    SHARED_MEMORY(shared);
    T *left = reinterpret_cast<T *>(shared), *right = left + STAGES * ROWS * STRIDE;
    int m0 = blockIdx.x * ROWS, n0 = blockIdx.y * COLUMNS, warp = threadIdx.x / 32,
        lane = threadIdx.x % 32;
    int wm = warp / L::ACROSS * (M * 16), wn = warp % L::ACROSS * (N * 8);
    float acc[M][N][4] = {};
    int all = (s.k + DEPTH - 1) / DEPTH, first = blockIdx.z * all / gridDim.z,
        steps = (blockIdx.z + 1) * all / gridDim.z - first;
    TileLoader<T, L, ROWS> rows(x, left, m0, s.m, first * DEPTH, s.k);
    typename Either<LIES, RowTileLoader<T, L>, TileLoader<T, L, COLUMNS>>::Type columns(
        w, right, n0, s.n, first * DEPTH, s.k);
    auto start = [&](int step, int buffer) {
        if (step < steps) rows.load_tile_async(buffer), columns.load_tile_async(buffer);
        copy_commit();
    };
    for (int i = 0; i < STAGES - 1; i++) start(i, i);
    // A lane's row of four matrices of 8 columns by 16 bytes of k, or of k by columns; for floats,
    // which no instruction transposes, its position in the first matrix of k by columns.
    int eight = lane / 16 * 8, other = lane / 8 % 2 * PIECE<T>;
    constexpr int ROW = COLUMNS + 8;
    const T *l = left + (wm + lane % 16) * STRIDE + lane / 16 * PIECE<T>;
    const T *r = !LIES            ? right + (wn + eight + lane % 8) * STRIDE + other
                 : sizeof(T) == 2 ? right + (other + lane % 8) * ROW + wn + eight
                                  : right + lane % 4 * ROW + wn + lane / 4;
#pragma unroll 1
    for (int step = 0, buffer = 0; step < steps;
         step++, buffer = buffer + 1 == STAGES ? 0 : buffer + 1) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        start(step + STAGES - 1, buffer ? buffer - 1 : STAGES - 1);
        const T *l_step = l + buffer * ROWS * STRIDE, *r_step = r + buffer * COLUMNS * STRIDE;
        // With several passes, one step at a time: otherwise more would be started than registers
        // can hold.
        [[maybe_unused]] constexpr int UNROLL = Products<P>::PASSES == 1 ? DEPTH / ALONG<T> : 1;
#pragma unroll UNROLL
        for (int k = 0; k < DEPTH; k += ALONG<T>) {
            FragmentA a[M];
            typename Products<P>::Right b[N];
#pragma unroll
            for (int i = 0; i < M; i++)
                load_matrices(a[i].r, l_step, (i * 16 * STRIDE + k) * (int)sizeof(T));
#pragma unroll
            for (int j = 0; j < N; j += 2) {
                unsigned two[4];
                if constexpr (!LIES) {
                    load_matrices(two, r_step, (j * 8 * STRIDE + k) * (int)sizeof(T));
                } else if constexpr (sizeof(T) == 2) {
                    load_matrices_transposed(two, r_step, (k * ROW + j * 8) * 2);
                } else {
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        two[i] = __float_as_uint(r_step[(k + i % 2 * 4) * ROW + (j + i / 2) * 8]);
                }
                b[j] = Products<P>::right(two[0], two[1]),
                    b[j + 1] = Products<P>::right(two[2], two[3]);
            }
#pragma unroll
            for (int i = 0; i < M; i++) Products<P>::add(acc[i], a[i], b);
        }
    }
    // Through shared memory once more, so that rows are written in whole pieces and all layouts
    // share the code that follows.
    copy_wait<0>();
    __syncthreads();
    float *sums = reinterpret_cast<float *>(shared);
#pragma unroll
    for (int i = 0; i < M; i++) {
#pragma unroll
        for (int j = 0; j < N; j++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float v[2] = {acc[i][j][half * 2], acc[i][j][half * 2 + 1]};
                store(sums + (wm + i * 16 + half * 8 + lane / 4) * SUMS_ROW<COLUMNS> + wn + j * 8 +
                          lane % 4 * 2, v);
            }
        }
    }
    __syncthreads();
    write_tile<ROWS, COLUMNS, L::THREADS>(sums, m0, n0, bias, residual, y, splitk_workspace, s);
}

// Adds up partial sums [split_k][m][n], V values per thread.
template <int V, class T>
__device__ __forceinline__ void linear_splitk_reduce(const float *splitk_workspace,
                                                     const float *bias, const T *residual, T *y,
                                                     int64 count, int n, int act, int split_k) {
    int64 at = ((int64)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (at >= count) return;
    float v[V] = {};
#pragma unroll 8
    for (int i = 0; i < split_k; i++) {
        float more[V];
        load(more, splitk_workspace + i * count + at);
#pragma unroll
        for (int j = 0; j < V; j++) v[j] += more[j];
    }
    put(y, v, at, at % n, bias, residual, act);
}

// The plain kernel's step: 64 rows of 16 values, four per thread, stored with k slowest.
template <class T>
__device__ __forceinline__ void load_tile(float *to, const T *from, int row0, int rows, int k0,
                                          int k) {
    int row = threadIdx.x / 4, column = threadIdx.x % 4 * 4;
    const T *at = from + (int64)(row0 + row) * k + k0 + column;
    float v[4] = {};
    if (row0 + row < rows) {
        if (k % 4 == 0 && k0 + column < k) {
            load(v, at);
        } else {
            for (int j = 0; j < 4; j++)
                if (k0 + column + j < k) v[j] = to_float(at[j]);
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) to[(column + j) * PLAIN_ROW + row] = v[j];
}

template <class T>
__device__ __forceinline__ void linear_plain(const T *x, const T *w, const float *bias,
                                             const T *residual, T *y, const Dense &s) {
    constexpr int K = 16, ROW = PLAIN_ROW;
    SHARED_MEMORY(shared);
    float *left = reinterpret_cast<float *>(shared), *right = left + K * ROW;
    int m0 = blockIdx.x * EDGE, n0 = blockIdx.y * EDGE, t = threadIdx.x;
    float total[4][4] = {};
    for (int k0 = 0; k0 < s.k; k0 += K) {
        __syncthreads();
        load_tile(left, x, m0, s.m, k0, s.k);
        load_tile(right, w, n0, s.n, k0, s.k);
        __syncthreads();
        if (m0 + t / 16 * 4 >= s.m) continue;
        float acc[4][4] = {};
#pragma unroll
        for (int k = 0; k < K; k++) {
            float a[4], b[4];
            load(a, left + k * ROW + t / 16 * 4);
            load(b, right + k * ROW + t % 16 * 4);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) acc[i][j] += a[i] * b[j];
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) total[i][j] += acc[i][j];
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int row = m0 + t / 16 * 4 + i, column = n0 + t % 16 * 4 + j;
            if (row >= s.m || column >= s.n) continue;
            int64 at = (int64)row * s.n + column;
            float v[1] = {total[i][j]};
            put(y, v, at, column, bias, residual, s.act);
        }
    }
}

#define PLAIN(NAME, T)                                                                             \
    KERNEL(NAME, 256, 3,                                                                           \
           (const T *x, const T *w, const float *bias, const T *residual, T *y, int m, int n,      \
            int k, int act),                                                                       \
           linear_plain(x, w, bias, residual, y, Dense{m, n, k, act}))
PLAIN(linear_f32, f32)
PLAIN(linear_odd_f16, f16)
PLAIN(linear_odd_bf16, bf16)

#define LINEAR_MATRIX(NAME, P, T, LAYOUT, LIES)                                                    \
    KERNEL(NAME, LAYOUT::THREADS, 4,                                                               \
           (const T *x, const T *w, const float *bias, const T *residual, T *y, int m, int n,      \
            int k, int act, float *splitk_workspace),                                              \
           linear_matrix<P, LAYOUT, LIES>(x, w, bias, residual, y, splitk_workspace,               \
                                          Dense{m, n, k, act}))
#define SPLITK_REDUCE(NAME, T, V)                                                                  \
    KERNEL(NAME, 256, 4,                                                                           \
           (const float *splitk_workspace, const float *bias, const T *residual, T *y,             \
            int64 count, int n, int act, int split_k),                                             \
           linear_splitk_reduce<V>(splitk_workspace, bias, residual, y, count, n, act, split_k))
#define LINEAR(P, T)                                                                               \
    LINEAR_MATRIX(linear_##P, P, T, Many, false)                                                   \
    LINEAR_MATRIX(linear_few_##P, P, T, Few, false)                                                \
    LINEAR_MATRIX(linear_back_##P, P, T, Many, true)                                               \
    LINEAR_MATRIX(linear_back_few_##P, P, T, Few, true)
LINEAR(f16, f16)
LINEAR(bf16, bf16)
LINEAR(tf32, f32)
LINEAR(tf32x3, f32)
#define SPLITK_REDUCES(T)                                                                          \
    SPLITK_REDUCE(linear_splitk_reduce_##T, T, 1)                                                  \
    SPLITK_REDUCE(linear_splitk_reduce_vec4_##T, T, 4)
SPLITK_REDUCES(f32)
SPLITK_REDUCES(f16)
SPLITK_REDUCES(bf16)

// A weight transposed, [n, k] to [k, n]: for the gradient of the input in plain arithmetic. One
// thread per value.
template <class T> __device__ __forceinline__ void transpose(const T *w, T *y, int n, int k) {
    int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < (int64)n * k) y[at] = w[at % n * k + at / n];
}

#define TRANSPOSE(T)                                                                               \
    KERNEL(linear_transpose_##T, 256, 4, (const T *w, T *y, int n, int k), transpose(w, y, n, k))
TRANSPOSE(f32)
TRANSPOSE(f16)
TRANSPOSE(bf16)
