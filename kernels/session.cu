// The steps around the network in an interaction: prompts into maps, the choice among candidates,
// masks as bits, and labels from them.
#include "lib/base.cuh"

// Sets the listed values of a map to one; one thread per entry.
template <class T>
__device__ __forceinline__ void scatter(const unsigned *list, T *maps, int count) {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at < count) maps[list[at]] = from_float<T>(1.0f);
}

// The report's head: the index of the largest of `count` scores (the first of equal ones), then the
// scores as floats. One thread.
template <class T> __device__ __forceinline__ void select(const T *scores, int *report, int count) {
    if (threadIdx.x) return;
    int best = 0;
    for (int i = 0; i < count; i++) {
        if (to_float(scores[i]) > to_float(scores[best])) best = i;
        report[1 + i] = (int)__float_as_uint(to_float(scores[i]));
    }
    report[0] = best;
}

// Row `*row` of x [.., c].
template <class T>
__device__ __forceinline__ void gather_row(const T *x, const int *row, T *y, int64 c) {
    int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < c) y[at] = x[*row * c + at];
}

// Up to four matrices of `each` values one below the other: block y copies matrix y, one thread per
// value.
template <class T>
__device__ __forceinline__ void join_rows(const T *a, const T *b, const T *c, const T *d, T *y,
                                          int64 each) {
    int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= each) return;
    const T *from = blockIdx.y == 0 ? a : blockIdx.y == 1 ? b : blockIdx.y == 2 ? c : d;
    y[blockIdx.y * each + at] = from[at];
}

// One bit per value, set if it is positive, the first in the highest bit; eight values per thread.
template <class T>
__device__ __forceinline__ void pack_bits(const T *x, unsigned char *bits, int64 bytes) {
    int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= bytes) return;
    float v[8];
    load(v, x + at * 8);
    unsigned char byte = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) byte |= v[i] > 0.0f ? 0x80 >> i : 0;
    bits[at] = byte;
}

// The zeros and ones of such bits as floats; eight values per thread.
__device__ __forceinline__ void widen_bits(const unsigned char *bits, float *y, int64 bytes) {
    int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= bytes) return;
    int byte = bits[at];
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = (float)(byte >> (7 - i) & 1);
    store(y + at * 8, v);
}

// Rows of parameters: y[r] = base[r] + the row at address table[r], rows of c floats. One block per
// row.
template <class T>
__device__ __forceinline__ void embed(const int64 *table, const float *base, T *y, int c) {
    int64 at = (int64)blockIdx.x * c;
    const float *row = reinterpret_cast<const float *>(table[blockIdx.x]);
    for (int i = threadIdx.x; i < c; i += blockDim.x)
        y[at + i] = from_float<T>(base[at + i] + row[i]);
}

// The gradient of embed: the row at address table[b] becomes the sum of the rows of dy whose
// number, after the gridDim.x addresses in the table, is b. One block per address.
template <class T>
__device__ __forceinline__ void embed_gradient(const T *dy, const int64 *table, int rows, int c) {
    const int64 *number = table + gridDim.x;
    float *to = reinterpret_cast<float *>(table[blockIdx.x]);
    for (int i = threadIdx.x; i < c; i += blockDim.x) {
        float sum = 0.0f;
        for (int r = 0; r < rows; r++)
            if (number[r] == blockIdx.x) sum += to_float(dy[(int64)r * c + i]);
        to[i] = sum;
    }
}

#define SESSION(T)                                                                                 \
    KERNEL(scatter_##T, 256, 4, (const unsigned *list, T *maps, int count),                        \
           scatter(list, maps, count))                                                             \
    KERNEL(select_##T, 32, 4, (const T *scores, int *report, int count),                           \
           select(scores, report, count))                                                          \
    KERNEL(embed_##T, 128, 8, (const int64 *table, const float *base, T *y, int c),                \
           embed(table, base, y, c))                                                               \
    KERNEL(embed_gradient_##T, 128, 8, (const T *dy, const int64 *table, int rows, int c),         \
           embed_gradient(dy, table, rows, c))                                                     \
    KERNEL(gather_row_##T, 256, 4, (const T *x, const int *row, T *y, int64 c),                    \
           gather_row(x, row, y, c))                                                               \
    KERNEL(join_rows_##T, 256, 4,                                                                  \
           (const T *a, const T *b, const T *c, const T *d, T *y, int64 each),                     \
           join_rows(a, b, c, d, y, each))                                                         \
    KERNEL(pack_bits_##T, 256, 4, (const T *x, unsigned char *bits, int64 bytes),                  \
           pack_bits(x, bits, bytes))
SESSION(f32)
SESSION(f16)
SESSION(bf16)

KERNEL(unpack_bits, 256, 4, (const unsigned char *bits, float *y, int64 bytes),
       widen_bits(bits, y, bytes))
