// Products of a warpgroup and barriers with phases by themselves, right and wrong, for cases.cpp.
#include "lib/wgmma.cuh"

enum Wrong {
    RIGHT, NO_FENCE, FENCE_OF_ANOTHER, STORED_AFTER_FENCE, STORED_DURING, NOT_STORED,
    NO_SUMS_FENCE, NOT_COMMITTED, NOT_THE_SAME, BEYOND, SWIZZLED, NOT_MADE, ONE_MISSING,
    FEWER_WARPS, OFF_ITS_PLACE, BEYOND_ITS_ROW
};

// D[64 x 96] = A[64 x 16] B[96 x 16]^T, of matrices by rows. In shared memory the pieces of A are
// `along_k` bytes apart along k and `along_rows` along the rows, from `at` on; those of B lie
// behind them, 128 bytes apart along k.
template <class T>
__device__ void product(const T *a, const T *b, float *d, int at, int along_k, int along_rows,
                        int wrong) {
    WGMMA_SHARED_MEMORY(shared);
    int thread = threadIdx.x, behind = at + along_k + 8 * along_rows;
    auto put = [&](unsigned char *to, const T *from, int rows, int k_apart, int rows_apart) {
        for (int i = thread; i < rows * 2; i += 128) {
            int row = i / 2, k = i % 2;
            if (wrong == NOT_STORED && rows == 96 && i == 190) continue;
            *reinterpret_cast<RawVector<T, 8> *>(to + k * k_apart + row / 8 * rows_apart +
                                                 row % 8 * 16) =
                load_raw<8>(from + row * 16 + k * 8);
        }
    };
    if (wrong != FENCE_OF_ANOTHER) {
        put(shared + at, a, 64, along_k, along_rows), put(shared + behind, b, 96, 128, 256);
        if (wrong != NO_FENCE) fence_async();
        if (wrong == STORED_AFTER_FENCE && thread == 0) *reinterpret_cast<T *>(shared + at) = a[0];
    } else if (thread == 0) {
        for (int i = 0; i < 128; i++)
            thread = i, put(shared + at, a, 64, along_k, along_rows),
                put(shared + behind, b, 96, 128, 256);
        thread = 0;
    } else {
        fence_async();
    }
    __syncthreads();
    if (wrong == FEWER_WARPS && thread >= 96) return;
    float sums[1][48] = {};
    Descriptor left = describe(shared + at, along_k, along_rows),
               right = describe(shared + behind, 128, 256);
    if (wrong == BEYOND) right += 4096;
    if (wrong == SWIZZLED) right |= 2ull << 62;
    if (wrong == NOT_THE_SAME && thread == 100) left += 1;
    if (wrong != NO_SUMS_FENCE) fence_sums(sums);
    start_product<T>(sums[0], left, right);
    if (wrong != NOT_COMMITTED) commit_products();
    if (wrong == STORED_DURING && thread == 0) *reinterpret_cast<T *>(shared + at) = a[0];
    await_products(sums);
    for (int i = 0; i < 48; i++) {
        int row = thread / 32 * 16 + i / 2 % 2 * 8 + thread % 32 / 4,
            column = i / 4 * 8 + thread % 4 * 2 + i % 2;
        d[row * 96 + column] = sums[0][i];
    }
}

// The same of matrices with 64 columns, swizzled, of which step `at` along k is multiplied; B lies
// behind A.
template <class T>
__device__ void swizzled_product(const T *a, const T *b, float *d, int at, int wrong) {
    WGMMA_SHARED_MEMORY(shared);
    unsigned char *behind = shared + 64 * 128;
    auto put = [](unsigned char *to, const T *from, int rows) {
        for (int i = threadIdx.x; i < rows * 8; i += 128) {
            int row = i / 8, piece = i % 8;
            *reinterpret_cast<RawVector<T, 8> *>(to + row * 128 + (piece ^ row % 8) * 16) =
                load_raw<8>(from + row * 64 + piece * 8);
        }
    };
    put(shared, a, 64), put(behind, b, 96);
    fence_async();
    __syncthreads();
    float sums[1][48] = {};
    Descriptor left = describe_swizzled(shared) + at * 2,
               right = describe_swizzled(behind) + at * 2;
    if (wrong == OFF_ITS_PLACE) left += 8;
    if (wrong == BEYOND_ITS_ROW) left += 7;
    fence_sums(sums);
    start_product<T>(sums[0], left, right);
    commit_products();
    await_products(sums);
    for (int i = 0; i < 48; i++) {
        int row = threadIdx.x / 32 * 16 + i / 2 % 2 * 8 + threadIdx.x % 32 / 4,
            column = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
        d[row * 96 + column] = sums[0][i];
    }
}
#define SWIZZLED_PRODUCT(T)                                                                        \
    KERNEL(swizzled_product_##T, 128, 1, (const T *a, const T *b, float *d, int at, int wrong),    \
           swizzled_product(a, b, d, at, wrong))
SWIZZLED_PRODUCT(f16)
SWIZZLED_PRODUCT(bf16)

#define PRODUCT(T)                                                                                 \
    KERNEL(product_##T, 128, 1,                                                                    \
           (const T *a, const T *b, float *d, int at, int along_k, int along_rows, int wrong),     \
           product(a, b, d, at, along_k, along_rows, wrong))
PRODUCT(f16)
PRODUCT(bf16)

// One warp puts `turns` numbers into a place, one after the other, and the other adds them up.
KERNEL(phases, 64, 1, (int *sum, int turns, int wrong), {
    WGMMA_SHARED_MEMORY(shared);
    PhaseBarrier *full = reinterpret_cast<PhaseBarrier *>(shared);
    PhaseBarrier *empty = full + 1;
    volatile int *place = reinterpret_cast<volatile int *>(full + 2);
    if (threadIdx.x == 0 && wrong != NOT_MADE)
        make_barrier(full, wrong == ONE_MISSING ? 33 : 32), make_barrier(empty, 32);
    __syncthreads();
    int all = 0;
    for (int turn = 0; turn < turns; turn++) {
        if (threadIdx.x < 32) {
            wait(empty, turn % 2 ^ 1);
            if (threadIdx.x == 0) *place = turn * turn + 1;
            arrive(full);
        } else {
            wait(full, turn % 2);
            all += *place;
            arrive(empty);
        }
    }
    if (threadIdx.x >= 32) sum[threadIdx.x - 32] = all;
})
