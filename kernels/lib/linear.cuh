// What the kernels of a dense layer have in common (linear.cu, linear_wgmma.cu): the loading of
// tiles, and what becomes of a tile's sums.
#pragma once
#include "lib/base.cuh"
#include "lib/matrix.cuh"

struct Dense {
    int m, n, k, act;
};

// In elements: the elements of k per step, and the distance from one row of a step to the next,
// which is 16 bytes more unless the row's pieces of 16 bytes are swizzled.
template <class T, class L> constexpr int STEP_DEPTH = L::BYTES / (int)sizeof(T);
template <class T, class L>
constexpr int STEP_STRIDE = STEP_DEPTH<T, L> + (L::SWIZZLED ? 0 : PIECE<T>);

// Loads ROWS rows of a matrix into shared memory, DEPTH elements per step; a thread keeps its
// positions, of 16 bytes each. Rows after the last are copies of the last, and their results are
// never written. Swizzled, piece p of row r lies in the place of piece p ^ r % 8, which puts the
// same piece of eight rows on different banks, as the padding does otherwise.
template <class T, class L, int ROWS> struct TileLoader {
    static constexpr int PIECES = L::BYTES / 16, APART = L::THREADS / PIECES, EACH = ROWS / APART;
    const T *from;
    T *to;
    int column, k, further[EACH];

    __device__ __forceinline__ TileLoader(const T *matrix, T *shared, int row0, int rows, int k0,
                                          int k)
        : column(k0 + threadIdx.x % PIECES * PIECE<T>), k(k) {
        int row = threadIdx.x / PIECES, first = min(row0 + row, rows - 1);
        static_assert(!L::SWIZZLED || APART % 8 == 0, "a thread's rows are the same modulo 8");
        int place = threadIdx.x % PIECES ^ (L::SWIZZLED ? row % 8 : 0);
        from = matrix + (int64)first * k + column,
            to = shared + row * STEP_STRIDE<T, L> + place * PIECE<T>;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            further[i] = (min(row0 + row + i * APART, rows - 1) - first) * k;
    }
    // Starts the next step, into its buffer. Beyond k is zero.
    __device__ __forceinline__ void load_tile_async(int buffer) {
        T *cell = to + buffer * ROWS * STEP_STRIDE<T, L>;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            copy_async(cell + i * APART * STEP_STRIDE<T, L>, from + further[i], column < k);
        from += STEP_DEPTH<T, L>, column += STEP_DEPTH<T, L>;
    }
};

// Floats from a row of a tile's sums in shared memory to the next: rows that are 8 more apart fall
// on different banks.
template <int COLUMNS> constexpr int SUMS_ROW = COLUMNS + 8;

// Writes the sums of a block's tile of ROWS x COLUMNS, which begins at row m0 and column n0 and
// lies in shared memory: the layer's values, or, if several blocks share k, the block's share of
// the sums.
template <int ROWS, int COLUMNS, int THREADS, class T>
__device__ __forceinline__ void write_tile(const float *sums, int m0, int n0, const float *bias,
                                           const T *residual, T *y, float *splitk_workspace,
                                           const Dense &s) {
    float *share = gridDim.z > 1 ? splitk_workspace + (int64)blockIdx.z * s.m * s.n : nullptr;
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * COLUMNS / 8; i += THREADS) {
        int row = i / (COLUMNS / 8), column = i % (COLUMNS / 8) * 8;
        const float *from = sums + row * SUMS_ROW<COLUMNS> + column;
        row += m0, column += n0;
        if (row >= s.m || column >= s.n) continue;
        int64 at = (int64)row * s.n + column;
        if (s.n % 8 == 0) {
            float v[8];
            load(v, from);
            if (share) store(share + at, v); else put(y, v, at, column, bias, residual, s.act);
        } else {
#pragma unroll 1
            for (int j = 0; j < 8 && column + j < s.n; j++) {
                float v[1] = {from[j]};
                if (share) share[at + j] = v[0];
                else put(y, v, at + j, column + j, bias, residual, s.act);
            }
        }
    }
}
