// Sums over the rows of matrices, column by column.
//
// A block has `run` rows of an item and `lanes` groups of columns, a power of two of at most 8;
// each of its 256 threads has one group and goes over every 256 / lanes-th row. Eight rows are
// added up in float before they are added to a sum in double. Grid (tiles, items, groups / lanes).
// Shared memory: 8 K lanes W doubles.
#pragma once
#include "lib/base.cuh"

// The number of columns that a thread handles if it can; the launching side knows it too.
constexpr int COLUMNS_EACH = 4;

// Where sums go: to partial sums [item][tile][column][2] or, if a tile has all rows, to lists
// [item][column] of the first sum and, if wanted, of the second. With `more`, the first list
// already has sums, to which they are added.
struct Totals {
    double *partial;
    float *first, *second;
    int more;

    __device__ __forceinline__ void put(int column, int columns, double a, double b) const {
        if (partial) {
            double *to =
                partial + (((int64)blockIdx.y * gridDim.x + blockIdx.x) * columns + column) * 2;
            to[0] = a, to[1] = b;
        } else {
            int64 at = (int64)blockIdx.y * columns + column;
            first[at] = (float)(more ? a + first[at] : a);
            if (second) second[at] = (float)b;
        }
    }
};

// The group of columns that the thread has.
__device__ __forceinline__ int own_group(int lanes) {
    return blockIdx.z * lanes + threadIdx.x % lanes;
}

// K sums of each of a group's W columns. `add(row, some)` adds a row's values to `some` [K][W], for
// threads whose group is `live`; `put(group, i, all)` receives all K sums of column i of a group.
// AHEAD rows are in flight at a time.
template <int K, int W, int AHEAD, class Add, class Put>
__device__ __forceinline__ void column_sums(int rows, int run, int lanes, bool live, Add add,
                                            Put put) {
    SHARED_MEMORY(shared);
    double *bins = reinterpret_cast<double *>(shared);
    int lane = threadIdx.x % lanes, apart = 256 / lanes, first = blockIdx.x * run,
        count = min(run, rows - first);
    double sum[K][W] = {};
    if (live) {
#pragma unroll 1
        for (int row = threadIdx.x / lanes; row < count; row += 8 * apart) {
            float some[K][W] = {};
            if (row + 7 * apart < count) {
#pragma unroll AHEAD
                for (int i = 0; i < 8; i++) add(first + row + i * apart, some);
            } else {
#pragma unroll 1
                for (int i = row; i < count; i += apart) add(first + i, some);
            }
#pragma unroll
            for (int k = 0; k < K; k++) {
#pragma unroll
                for (int j = 0; j < W; j++) sum[k][j] += some[k][j];
            }
        }
    }
    // Threads of a warp that have the same columns, then warps in order.
    for (int o = 16; o >= lanes; o >>= 1) {
#pragma unroll
        for (int k = 0; k < K; k++) {
#pragma unroll
            for (int j = 0; j < W; j++) sum[k][j] += __shfl_xor_sync(0xffffffffu, sum[k][j], o);
        }
    }
    int wide = lanes * W, at = threadIdx.x;
    if (at % 32 < lanes) {
#pragma unroll
        for (int k = 0; k < K; k++) {
#pragma unroll
            for (int j = 0; j < W; j++) bins[(at / 32 * K + k) * wide + lane * W + j] = sum[k][j];
        }
    }
    __syncthreads();
    if (at >= wide) return;
    double all[K];
#pragma unroll
    for (int k = 0; k < K; k++) {
        all[k] = bins[k * wide + at];
        for (int warp = 1; warp < 8; warp++) all[k] += bins[(warp * K + k) * wide + at];
    }
    put((int)blockIdx.z * lanes + at / W, at % W, all);
}
