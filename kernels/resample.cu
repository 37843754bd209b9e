// Resampling inside the network, a thread a result value; d, h, w are the result's grid. And patches of voxels as rows.
#include "lib/base.cuh"

struct Voxel {
    int64 item;
    int i, j, k, c;
};

// The value this thread makes, of a map [n, d, h, w, c]; false behind the last.
__device__ __forceinline__ bool mine(Voxel &v, int64 &at, int64 count, int d, int h, int w, int c) {
    at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return false;
    int64 voxel = at / c;
    v = Voxel{voxel / w / h / d, (int)(voxel / w / h % d), (int)(voxel / w % h), (int)(voxel % w), (int)(at % c)};
    return true;
}

// The mean of 2 x 2 x 2 voxels.
template <class T> __device__ __forceinline__ void halve(const T *x, T *y, int64 count, int d, int h, int w, int c) {
    Voxel v;
    int64 at;
    if (!mine(v, at, count, d, h, w, c)) return;
    float sum = 0.0f;
    for (int p = 0; p < 8; p++) {
        int64 from = ((v.item * 2 * d + 2 * v.i + (p >> 2)) * 2 * h + 2 * v.j + (p >> 1 & 1)) * 2 * w + 2 * v.k + (p & 1);
        sum += to_float(x[from * c + v.c]);
    }
    y[at] = from_float<T>(sum * 0.125f);
}

// Twice the size, trilinear, corners not aligned: a fine voxel lies a quarter of a coarse one off its parent's middle.
template <class T> __device__ __forceinline__ void twice(const T *x, T *y, int64 count, int d, int h, int w, int c) {
    Voxel v;
    int64 at;
    if (!mine(v, at, count, d, h, w, c)) return;
    int place[3] = {v.i, v.j, v.k}, edge[3] = {d / 2, h / 2, w / 2}, other[3];
#pragma unroll
    for (int a = 0; a < 3; a++) {
        other[a] = place[a] / 2 + (place[a] % 2 ? 1 : -1);
        other[a] = min(max(other[a], 0), edge[a] - 1);
        place[a] /= 2;
    }
    float sum = 0.0f;
#pragma unroll
    for (int p = 0; p < 8; p++) {
        int i = p & 4 ? other[0] : place[0], j = p & 2 ? other[1] : place[1], k = p & 1 ? other[2] : place[2];
        float weight = (p & 4 ? 0.25f : 0.75f) * (p & 2 ? 0.25f : 0.75f) * (p & 1 ? 0.25f : 0.75f);
        sum += weight * to_float(x[(((v.item * edge[0] + i) * edge[1] + j) * edge[2] + k) * c + v.c]);
    }
    y[at] = from_float<T>(sum);
}

// Every fourth voxel.
template <class T> __device__ __forceinline__ void quarter(const T *x, T *y, int64 count, int d, int h, int w, int c) {
    Voxel v;
    int64 at;
    if (!mine(v, at, count, d, h, w, c)) return;
    int64 from = ((v.item * 4 * d + 4 * v.i) * 4 * h + 4 * v.j) * 4 * w + 4 * v.k;
    y[at] = x[from * c + v.c];
}

// The maximum of 2 x 2 x 2 voxels.
template <class T> __device__ __forceinline__ void pool(const T *x, T *y, int64 count, int d, int h, int w, int c) {
    Voxel v;
    int64 at;
    if (!mine(v, at, count, d, h, w, c)) return;
    float top = 0.0f;
    for (int p = 0; p < 8; p++) {
        int64 from = ((v.item * 2 * d + 2 * v.i + (p >> 2)) * 2 * h + 2 * v.j + (p >> 1 & 1)) * 2 * w + 2 * v.k + (p & 1);
        float value = to_float(x[from * c + v.c]);
        top = p ? fmaxf(top, value) : value;
    }
    y[at] = from_float<T>(top);
}

// Patches of edge e as rows: y [n, d, h, w, c e^3], channel slowest, from x [n, d e, h e, w e, c].
template <class T> __device__ __forceinline__ void unfold(const T *x, T *y, int64 count, int d, int h, int w, int c, int e) {
    Voxel v;
    int64 at;
    if (!mine(v, at, count, d, h, w, c * e * e * e)) return;
    int tw = v.c % e, th = v.c / e % e, td = v.c / (e * e) % e, channel = v.c / (e * e * e);
    int64 from = ((v.item * d * e + v.i * e + td) * h * e + v.j * e + th) * w * e + v.k * e + tw;
    y[at] = x[from * c + channel];
}

// The refiner's input at half the resolution [d, h, w, 4]: image, share of mask, positive and negative prompt voxels; and the halved logits. The mask is
// number `selected`, or `*choice` where given, of `masks` [m, 2d, 2h, 2w]; `prompts` [2d, 2h, 2w, 2].
template <class T>
__device__ __forceinline__ void refiner_input(const T *image, const T *masks, const T *prompts, T *y, T *logits, const int *choice, int selected, int d,
                                              int h, int w) {
    Voxel v;
    int64 at, count = (int64)d * h * w;
    if (!mine(v, at, count, d, h, w, 1)) return;
    if (choice) selected = *choice;
    float mask = 0.0f, positive = 0.0f, negative = 0.0f, sum = 0.0f;
    for (int p = 0; p < 8; p++) {
        int64 from = (((int64)2 * v.i + (p >> 2)) * 2 * h + 2 * v.j + (p >> 1 & 1)) * 2 * w + 2 * v.k + (p & 1);
        float m = to_float(masks[selected * count * 8 + from]), both[2];
        load(both, prompts + from * 2);
        mask += m > 0.0f ? 1.0f : 0.0f, positive += both[0], negative += both[1], sum += m;
    }
    float row[4] = {to_float(image[at]), mask * 0.125f, positive * 0.125f, negative * 0.125f};
    store(y + at * 4, row);
    logits[at] = from_float<T>(sum * 0.125f);
}

#define GRID(NAME, FUNCTION, T) \
    KERNEL(NAME##_##T, 256, 4, (const T *x, T *y, int64 count, int d, int h, int w, int c), FUNCTION(x, y, count, d, h, w, c))
#define RESAMPLE(T)                                                                                                                      \
    GRID(halve, halve, T)                                                                                                                \
    GRID(double, twice, T)                                                                                                               \
    GRID(quarter, quarter, T)                                                                                                            \
    GRID(max_pool, pool, T)                                                                                                              \
    KERNEL(unfold_##T, 256, 4, (const T *x, T *y, int64 count, int d, int h, int w, int c, int e), unfold(x, y, count, d, h, w, c, e))       \
    KERNEL(refiner_input_##T, 256, 4,                                                                                                       \
           (const T *image, const T *masks, const T *prompts, T *y, T *logits, const int *choice, int selected, int d, int h, int w),    \
           refiner_input(image, masks, prompts, y, logits, choice, selected, d, h, w))
RESAMPLE(f32)
RESAMPLE(f16)
RESAMPLE(bf16)
