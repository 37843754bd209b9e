// Dense layers: y = act(x w^T + b) + residual; x [m, k], w [n, k], y and residual [m, n].
//
//   matrix   block 64 x 64, 4 warps of 32 x 32; k in steps of 32 through three buffers filled by asynchronous copies
//   plain    block 64 x 64, 256 threads of 4 x 4; k in steps of 16, each summed on its own before it joins the total
#include "lib/base.cuh"
#include "lib/matrix.cuh"

constexpr int EDGE = 64, DEPTH = 32, STAGES = 3, STRIDE = DEPTH + 8, PLAIN_ROW = EDGE + 4;

struct Dense {
    int m, n, k, act;
};

// One step's 64 rows of 32 elements, from row `row0` of a matrix of `rows`.
template <class T> __device__ __forceinline__ void fill(T *to, const T *from, int row0, int rows, int k0, int k) {
    for (int i = threadIdx.x; i < EDGE * DEPTH / 8; i += 128) {
        int row = i / (DEPTH / 8), column = i % (DEPTH / 8) * 8;
        T *cell = to + row * STRIDE + column;
        bool inside = row0 + row < rows && k0 + column < k;
        if (k % 8 == 0) {
            copy_async(cell, inside ? from + (int64)(row0 + row) * k + k0 + column : from, inside);
        } else {
            for (int j = 0; j < 8; j++) {
                bool there = inside && k0 + column + j < k;
                cell[j] = there ? from[(int64)(row0 + row) * k + k0 + column + j] : from_float<T>(0.0f);
            }
        }
    }
}

template <class T>
__device__ __forceinline__ void linear_matrix(const T *x, const T *w, const float *bias, const T *residual, T *y, const Dense &s) {
    SHARED_MEMORY(shared);
    T *left = reinterpret_cast<T *>(shared), *right = left + STAGES * EDGE * STRIDE;
    int m0 = blockIdx.x * EDGE, n0 = blockIdx.y * EDGE, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int wm = warp / 2 * 32, wn = warp % 2 * 32;
    float acc[2][4][4] = {};
    int steps = (s.k + DEPTH - 1) / DEPTH;
    auto start = [&](int step) {
        if (step < steps) {
            fill(left + step % STAGES * EDGE * STRIDE, x, m0, s.m, step * DEPTH, s.k);
            fill(right + step % STAGES * EDGE * STRIDE, w, n0, s.n, step * DEPTH, s.k);
        }
        copy_commit();
    };
    for (int i = 0; i < STAGES - 1; i++) start(i);
    for (int step = 0; step < steps; step++) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        start(step + STAGES - 1);
        const T *l = left + step % STAGES * EDGE * STRIDE, *r = right + step % STAGES * EDGE * STRIDE;
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            FragmentA a[2];
            unsigned b[2][4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                load_matrices(a[i].r, l + (wm + i * 16 + lane % 16) * STRIDE + k + lane / 16 * 8);
                load_matrices(b[i], r + (wn + i * 16 + lane / 16 * 8 + lane % 8) * STRIDE + k + lane / 8 % 2 * 8);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) multiply<T>(acc[i][j], a[i], FragmentB{{b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]}});
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int row = m0 + wm + i * 16 + e / 2 * 8 + lane / 4, column = n0 + wn + j * 8 + lane % 4 * 2 + e % 2;
                if (row >= s.m || column >= s.n) continue;
                int64 at = (int64)row * s.n + column;
                float v = activate(acc[i][j][e] + (bias ? bias[column] : 0.0f), s.act);
                y[at] = from_float<T>(v + (residual ? to_float(residual[at]) : 0.0f));
            }
        }
    }
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

#define LINEAR(T, THREADS, BLOCKS, FUNCTION)                                                                                                       \
    KERNEL(linear_##T, THREADS, BLOCKS, (const T *x, const T *w, const float *bias, const T *residual, T *y, int m, int n, int k, int act),        \
           FUNCTION(x, w, bias, residual, y, Dense{m, n, k, act}))
LINEAR(f32, 256, 3, linear_plain)
LINEAR(f16, 128, 6, linear_matrix<f16>)
LINEAR(bf16, 128, 6, linear_matrix<bf16>)

// A weight turned, [n, k] to [k, n]: for the gradient of the input. A thread a value.
template <class T> __device__ __forceinline__ void turn(const T *w, T *y, int n, int k) {
    int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < (int64)n * k) y[at] = w[at % n * k + at / n];
}

#define TURN(T) KERNEL(linear_turn_##T, 256, 4, (const T *w, T *y, int n, int k), turn(w, y, n, k))
TURN(f32)
TURN(f16)
TURN(bf16)
