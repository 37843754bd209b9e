// Dense layers: y = act(x w^T + b) + residual; x [m, k], w [n, k], y and residual [m, n].
//
//   matrix   block 64 x 64 or, where rows are few, 16 x 64, 4 warps; k in steps of 64 through three buffers filled by asynchronous copies. Where there are few blocks
//            several share a product's k: each leaves its sums in float, and linear_join adds them up
//   plain    block 64 x 64, 256 threads of 4 x 4; k in steps of 16, each summed on its own before it joins the total
#include "lib/base.cuh"
#include "lib/matrix.cuh"

constexpr int EDGE = 64, DEPTH = 64, STAGES = 3, STRIDE = DEPTH + 8, PLAIN_ROW = EDGE + 4;

struct Dense {
    int m, n, k, act;
};

// Brings ROWS rows of a matrix into shared memory, DEPTH elements a step; a thread keeps its places, which are 16 bytes each.
template <class T, int ROWS> struct Bringer {
    static constexpr int EACH = ROWS * DEPTH / 8 / 128, APART = 128 / (DEPTH / 8);
    const T *from;
    T *to;
    int column, k, missing;
    int64 apart;

    __device__ __forceinline__ Bringer(const T *matrix, T *shared, int row0, int rows, int k0, int k)
        : column(k0 + threadIdx.x % (DEPTH / 8) * 8), k(k), missing(0), apart((int64)APART * k) {
        int row = threadIdx.x / (DEPTH / 8);
        from = matrix + (int64)(row0 + row) * k + column, to = shared + row * STRIDE + threadIdx.x % (DEPTH / 8) * 8;
#pragma unroll
        for (int i = 0; i < EACH; i++) missing |= (row0 + row + i * APART < rows ? 0 : 1) << i;
    }
    // Starts the next step, into its buffer. Beyond the matrix is zero.
    __device__ __forceinline__ void bring(int buffer, const T *somewhere) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            T *cell = to + buffer * ROWS * STRIDE + i * APART * STRIDE;
            const T *at = from + i * apart;
            bool inside = !(missing >> i & 1) && column < k;
            if (k % 8 == 0) {
                copy_async(cell, inside ? at : somewhere, inside);
            } else {
                for (int j = 0; j < 8; j++) cell[j] = inside && column + j < k ? at[j] : from_float<T>(0.0f);
            }
        }
        from += DEPTH, column += DEPTH;
    }
};

// Where a sum goes: y = act(v + bias) + residual.
template <class T>
__device__ __forceinline__ void put(T *y, float v, int64 at, int column, const float *bias, const T *residual, int act) {
    v = activate(v + (bias ? bias[column] : 0.0f), act);
    y[at] = from_float<T>(v + (residual ? to_float(residual[at]) : 0.0f));
}

// ROWS is 64, with warps of 32 x 32, or 16, with warps of 16 x 16. Grid (m / ROWS, n / 64, splits).
template <class T, int ROWS>
__device__ __forceinline__ void linear_matrix(const T *x, const T *w, const float *bias, const T *residual, T *y, float *shares, const Dense &s) {
    constexpr int M = ROWS == 64 ? 2 : 1, N = ROWS == 64 ? 4 : 2;
    SHARED_MEMORY(shared);
    T *left = reinterpret_cast<T *>(shared), *right = left + STAGES * ROWS * STRIDE;
    int m0 = blockIdx.x * ROWS, n0 = blockIdx.y * EDGE, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int wm = ROWS == 64 ? warp / 2 * 32 : 0, wn = ROWS == 64 ? warp % 2 * 32 : warp * 16;
    float acc[M][N][4] = {};
    int all = (s.k + DEPTH - 1) / DEPTH, first = blockIdx.z * all / gridDim.z, steps = (blockIdx.z + 1) * all / gridDim.z - first;
    Bringer<T, ROWS> rows(x, left, m0, s.m, first * DEPTH, s.k);
    Bringer<T, EDGE> columns(w, right, n0, s.n, first * DEPTH, s.k);
    auto start = [&](int step, int buffer) {
        if (step < steps) rows.bring(buffer, x), columns.bring(buffer, w);
        copy_commit();
    };
    for (int i = 0; i < STAGES - 1; i++) start(i, i);
    const T *l = left + (wm + lane % 16) * STRIDE + lane / 16 * 8, *r = right + (wn + lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8;
    for (int step = 0, buffer = 0; step < steps; step++, buffer = buffer + 1 == STAGES ? 0 : buffer + 1) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        start(step + STAGES - 1, buffer ? buffer - 1 : STAGES - 1);
        const T *l_step = l + buffer * ROWS * STRIDE, *r_step = r + buffer * EDGE * STRIDE;
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            FragmentA a[M];
            unsigned b[N / 2][4];
#pragma unroll
            for (int i = 0; i < M; i++) load_matrices(a[i].r, l_step, (i * 16 * STRIDE + k) * 2);
#pragma unroll
            for (int j = 0; j < N / 2; j++) load_matrices(b[j], r_step, (j * 16 * STRIDE + k) * 2);
#pragma unroll
            for (int i = 0; i < M; i++) {
#pragma unroll
                for (int j = 0; j < N; j++) multiply<T>(acc[i][j], a[i], FragmentB{{b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]}});
            }
        }
    }
    float *share = shares + (int64)blockIdx.z * s.m * s.n;
#pragma unroll
    for (int i = 0; i < M; i++) {
#pragma unroll
        for (int j = 0; j < N; j++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = m0 + wm + i * 16 + half * 8 + lane / 4, column = n0 + wn + j * 8 + lane % 4 * 2;
                if (row >= s.m || column >= s.n) continue;
                int64 at = (int64)row * s.n + column;
                float v[2] = {acc[i][j][half * 2], acc[i][j][half * 2 + 1]};
                if (gridDim.z > 1) {
                    if (s.n % 2 == 0) {
                        store(share + at, v);
                    } else {
                        share[at] = v[0];
                        if (column + 1 < s.n) share[at + 1] = v[1];
                    }
                } else if (s.n % 2 == 0) {
                    float more[2] = {};
                    if (residual) load(more, residual + at);
                    for (int e = 0; e < 2; e++) v[e] = activate(v[e] + (bias ? bias[column + e] : 0.0f), s.act) + more[e];
                    store(y + at, v);
                } else {
                    put(y, v[0], at, column, bias, residual, s.act);
                    if (column + 1 < s.n) put(y, v[1], at + 1, column + 1, bias, residual, s.act);
                }
            }
        }
    }
}

// Adds up shares [splits][m][n], a thread a value.
template <class T>
__device__ __forceinline__ void linear_join(const float *shares, const float *bias, const T *residual, T *y, int64 count, int n, int act, int splits) {
    int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    float v = 0.0f;
#pragma unroll 4
    for (int i = 0; i < splits; i++) v += shares[i * count + at];
    put(y, v, at, at % n, bias, residual, act);
}

// The plain kernel's step: 64 rows of 16 values, four a thread, laid down with k slowest.
__device__ __forceinline__ void bring(float *to, const float *from, int row0, int rows, int k0, int k) {
    int row = threadIdx.x / 4, column = threadIdx.x % 4 * 4;
    const float *at = from + (int64)(row0 + row) * k + k0 + column;
    float v[4] = {};
    if (row0 + row < rows) {
        if (k % 4 == 0 && k0 + column < k) {
            load(v, at);
        } else {
            for (int j = 0; j < 4; j++)
                if (k0 + column + j < k) v[j] = at[j];
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) to[(column + j) * PLAIN_ROW + row] = v[j];
}

__device__ __forceinline__ void linear_plain(const float *x, const float *w, const float *bias, const float *residual, float *y, const Dense &s) {
    constexpr int K = 16, ROW = PLAIN_ROW;
    SHARED_MEMORY(shared);
    float *left = reinterpret_cast<float *>(shared), *right = left + K * ROW;
    int m0 = blockIdx.x * EDGE, n0 = blockIdx.y * EDGE, t = threadIdx.x;
    float total[4][4] = {};
    for (int k0 = 0; k0 < s.k; k0 += K) {
        __syncthreads();
        bring(left, x, m0, s.m, k0, s.k);
        bring(right, w, n0, s.n, k0, s.k);
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
            y[at] = activate(total[i][j] + (bias ? bias[column] : 0.0f), s.act) + (residual ? residual[at] : 0.0f);
        }
    }
}

KERNEL(linear_f32, 256, 3, (const float *x, const float *w, const float *bias, const float *residual, float *y, int m, int n, int k, int act),
       linear_plain(x, w, bias, residual, y, Dense{m, n, k, act}))

#define LINEAR(T)                                                                                                                                     \
    KERNEL(linear_##T, 128, 4, (const T *x, const T *w, const float *bias, const T *residual, T *y, int m, int n, int k, int act, float *shares),     \
           linear_matrix<T, 64>(x, w, bias, residual, y, shares, Dense{m, n, k, act}))                                                                \
    KERNEL(linear_few_##T, 128, 4, (const T *x, const T *w, const float *bias, const T *residual, T *y, int m, int n, int k, int act, float *shares), \
           linear_matrix<T, 16>(x, w, bias, residual, y, shares, Dense{m, n, k, act}))                                                                \
    KERNEL(linear_join_##T, 256, 4,                                                                                                                   \
           (const float *shares, const float *bias, const T *residual, T *y, int64 count, int n, int act, int splits),                                \
           linear_join(shares, bias, residual, y, count, n, act, splits))
LINEAR(f16)
LINEAR(bf16)

// A weight turned, [n, k] to [k, n]: for the gradient of the input. A thread a value.
template <class T> __device__ __forceinline__ void turn(const T *w, T *y, int n, int k) {
    int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < (int64)n * k) y[at] = w[at % n * k + at / n];
}

#define TURN(T) KERNEL(linear_turn_##T, 256, 4, (const T *w, T *y, int n, int k), turn(w, y, n, k))
TURN(f32)
TURN(f16)
TURN(bf16)
