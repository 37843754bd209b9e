// Resampling inside the network and its gradients, one thread per value of the result; d, h, w are
// the result's grid, `count` is the number of values of each map, and blockIdx.y the map. Also
// patches of voxels as rows, and back.
#include "lib/base.cuh"

struct Voxel {
    int64 item;
    int i, j, k, c;
};

// The first of V values of a map [d, h, w, c] that this thread computes, and its place in
// [n, d, h, w, c]; false after the last. Numbers within a map have 32 bits: divisions of 64 bits
// would take most of the time.
template <int V = 1>
__device__ __forceinline__ bool mine(Voxel &v, int64 &at, int count, int h, int w, int c) {
    unsigned number = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (number >= (unsigned)count) return false;
    unsigned voxel = number / (unsigned)c, line = voxel / (unsigned)w, plane = line / (unsigned)h;
    at = (int64)blockIdx.y * count + number;
    v = Voxel{blockIdx.y, (int)plane, (int)(line - plane * h), (int)(voxel - line * w),
              (int)(number - voxel * c)};
    return true;
}

// The mean of 2 x 2 x 2 voxels.
template <class T>
__device__ __forceinline__ void halve(const T *x, T *y, int count, int d, int h, int w, int c) {
    Voxel v;
    int64 at;
    if (!mine(v, at, count, h, w, c)) return;
    float sum = 0.0f;
    for (int p = 0; p < 8; p++) {
        int64 from =
            ((v.item * 2 * d + 2 * v.i + (p >> 2)) * 2 * h + 2 * v.j + (p >> 1 & 1)) * 2 * w +
            2 * v.k + (p & 1);
        sum += to_float(x[from * c + v.c]);
    }
    y[at] = from_float<T>(sum * 0.125f);
}

// Twice the size, trilinear, corners not aligned: a fine voxel lies a quarter of a coarse one off
// its parent's middle.
template <class T>
__device__ __forceinline__ void twice(const T *x, T *y, int count, int d, int h, int w, int c) {
    Voxel v;
    int64 at;
    if (!mine(v, at, count, h, w, c)) return;
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
        int i = p & 4 ? other[0] : place[0], j = p & 2 ? other[1] : place[1],
            k = p & 1 ? other[2] : place[2];
        float weight = (p & 4 ? 0.25f : 0.75f) * (p & 2 ? 0.25f : 0.75f) * (p & 1 ? 0.25f : 0.75f);
        sum +=
            weight * to_float(x[(((v.item * edge[0] + i) * edge[1] + j) * edge[2] + k) * c + v.c]);
    }
    y[at] = from_float<T>(sum);
}

// Every fourth voxel.
template <class T>
__device__ __forceinline__ void quarter(const T *x, T *y, int count, int d, int h, int w, int c) {
    Voxel v;
    int64 at;
    if (!mine(v, at, count, h, w, c)) return;
    int64 from = ((v.item * 4 * d + 4 * v.i) * 4 * h + 4 * v.j) * 4 * w + 4 * v.k;
    y[at] = x[from * c + v.c];
}

// The maximum of 2 x 2 x 2 voxels.
template <class T>
__device__ __forceinline__ void pool(const T *x, T *y, int count, int d, int h, int w, int c) {
    Voxel v;
    int64 at;
    if (!mine(v, at, count, h, w, c)) return;
    float top = 0.0f;
    for (int p = 0; p < 8; p++) {
        int64 from =
            ((v.item * 2 * d + 2 * v.i + (p >> 2)) * 2 * h + 2 * v.j + (p >> 1 & 1)) * 2 * w +
            2 * v.k + (p & 1);
        float value = to_float(x[from * c + v.c]);
        top = p ? fmaxf(top, value) : value;
    }
    y[at] = from_float<T>(top);
}

// Gradients: d, h, w are the grid of the result, dx.
template <class T>
__device__ __forceinline__ void halve_gradient(const T *dy, T *dx, int count, int d, int h, int w,
                                               int c) {
    Voxel v;
    int64 at;
    if (!mine(v, at, count, h, w, c)) return;
    int64 from = ((v.item * (d / 2) + v.i / 2) * (h / 2) + v.j / 2) * (w / 2) + v.k / 2;
    dx[at] = from_float<T>(to_float(dy[from * c + v.c]) * 0.125f);
}

// A coarse voxel is read by the fine positions 2i - 1 to 2i + 2 with weights 1/4, 3/4, 3/4, 1/4; at
// the border also by those that would read beyond it.
template <class T>
__device__ __forceinline__ void twice_gradient(const T *dy, T *dx, int count, int d, int h, int w,
                                               int c) {
    Voxel v;
    int64 at;
    if (!mine(v, at, count, h, w, c)) return;
    auto weight = [](int step, int i, int edge) {
        float inner = step == 0 || step == 3 ? 0.25f : 0.75f;
        return inner + ((step == 1 && i == 0) || (step == 2 && i + 1 == edge) ? 0.25f : 0.0f);
    };
    float sum = 0.0f;
    for (int a = 0; a < 4; a++) {
        int i = 2 * v.i - 1 + a;
        if (i < 0 || i >= 2 * d) continue;
        for (int b = 0; b < 4; b++) {
            int j = 2 * v.j - 1 + b;
            if (j < 0 || j >= 2 * h) continue;
            for (int e = 0; e < 4; e++) {
                int k = 2 * v.k - 1 + e;
                if (k < 0 || k >= 2 * w) continue;
                float share = weight(a, v.i, d) * weight(b, v.j, h) * weight(e, v.k, w);
                sum += share *
                       to_float(dy[(((v.item * 2 * d + i) * 2 * h + j) * 2 * w + k) * c + v.c]);
            }
        }
    }
    dx[at] = from_float<T>(sum);
}

template <class T>
__device__ __forceinline__ void quarter_gradient(const T *dy, T *dx, int count, int d, int h, int w,
                                                 int c) {
    Voxel v;
    int64 at;
    if (!mine(v, at, count, h, w, c)) return;
    bool read = v.i % 4 == 0 && v.j % 4 == 0 && v.k % 4 == 0;
    int64 from = ((v.item * (d / 4) + v.i / 4) * (h / 4) + v.j / 4) * (w / 4) + v.k / 4;
    dx[at] = read ? dy[from * c + v.c] : from_float<T>(0.0f);
}

// The gradient of a map that was normalised (if `norm` is given), added to and pooled on load: each
// gradient dy [n, d, h, w, c] goes to the first of the largest of its eight voxels, and is added to
// the gradient so far if that is given. One thread per pooled value.
template <class T>
__device__ __forceinline__ void unpool(const T *x, const float *norm, const T *add, const T *dy,
                                       const T *so_far, T *dx, int count, int d, int h, int w,
                                       int c, float slope) {
    Voxel v;
    int64 at;
    if (!mine(v, at, count, h, w, c)) return;
    auto place = [&](int p) {
        return (((v.item * 2 * d + 2 * v.i + (p >> 2)) * 2 * h + 2 * v.j + (p >> 1 & 1)) * 2 * w +
                2 * v.k + (p & 1)) * c + v.c;
    };
    float best = MINUS_INFINITY;
    int winner = 0;
    for (int p = 0; p < 8; p++) {
        float value = to_float(x[place(p)]);
        if (norm) value = normed(value, norm + (v.item * c + v.c) * 3, slope);
        if (add) value += to_float(add[place(p)]);
        if (value > best) best = value, winner = p;
    }
    float passed = to_float(dy[at]);
    for (int p = 0; p < 8; p++) {
        float value = p == winner ? passed : 0.0f;
        if (so_far) value += to_float(so_far[place(p)]);
        dx[place(p)] = from_float<T>(value);
    }
}

// Rows back to patches: x [n, d, h, w, c] from rows [n, d / e, h / e, w / e, c e^3]. One thread per
// value of x.
template <class T>
__device__ __forceinline__ void fold(const T *rows, T *x, int count, int d, int h, int w, int c,
                                     int e) {
    Voxel v;
    int64 at;
    if (!mine(v, at, count, h, w, c)) return;
    int64 patch = ((v.item * (d / e) + v.i / e) * (h / e) + v.j / e) * (w / e) + v.k / e;
    x[at] = rows[patch * c * e * e * e + ((v.c * e + v.i % e) * e + v.j % e) * e + v.k % e];
}

// Patches of edge e as rows: y [n, d, h, w, c e^3], channel slowest, from x [n, d e, h e, w e, c].
// V values per thread: more than one only of a single channel, where they are side by side in a
// patch.
template <int V, class T>
__device__ __forceinline__ void unfold(const T *x, T *y, int count, int d, int h, int w, int c,
                                       int e) {
    Voxel v;
    int64 at;
    if (!mine<V>(v, at, count, h, w, c * e * e * e)) return;
    unsigned edge = e, line = v.c / edge, plane = line / edge, channel = plane / edge;
    int tw = v.c - line * edge, th = line - plane * edge, td = plane - channel * edge;
    int64 from = ((v.item * d * e + v.i * e + td) * h * e + v.j * e + th) * w * e + v.k * e + tw;
    *reinterpret_cast<RawVector<T, V> *>(y + at) = load_raw<V>(x + from * c + channel);
}

// By 16 bytes if rows of patches are: src/ops/strided/cuda.rs decides in the same way.
template <class T>
__device__ __forceinline__ void unfold_any(const T *x, T *y, int count, int d, int h, int w, int c,
                                           int e) {
    constexpr int V = 16 / (int)sizeof(T);
    if (c == 1 && e % V == 0) unfold<V>(x, y, count, d, h, w, c, e);
    else unfold<1>(x, y, count, d, h, w, c, e);
}

// The refiner's input at half the resolution [d, h, w, 4]: image, share of mask, positive and
// negative prompt voxels; and the halved logits. The mask is number `selected`, or `*choice` if
// given, of `masks` [m, 2d, 2h, 2w]; `prompts` is [2d, 2h, 2w, 2].
template <class T>
__device__ __forceinline__ void refiner_input(const T *image, const T *masks, const T *prompts,
                                              T *y, T *logits, const int *choice, int selected,
                                              int d, int h, int w) {
    Voxel v;
    int64 at;
    int count = d * h * w;
    if (!mine(v, at, count, h, w, 1)) return;
    if (choice) selected = *choice;
    float mask = 0.0f, positive = 0.0f, negative = 0.0f, sum = 0.0f;
    for (int p = 0; p < 8; p++) {
        int64 from = (((int64)2 * v.i + (p >> 2)) * 2 * h + 2 * v.j + (p >> 1 & 1)) * 2 * w +
                     2 * v.k + (p & 1);
        float m = to_float(masks[(int64)selected * count * 8 + from]), both[2];
        load(both, prompts + from * 2);
        mask += m > 0.0f ? 1.0f : 0.0f, positive += both[0], negative += both[1], sum += m;
    }
    float row[4] = {to_float(image[at]), mask * 0.125f, positive * 0.125f, negative * 0.125f};
    store(y + at * 4, row);
    logits[at] = from_float<T>(sum * 0.125f);
}

#define GRID(NAME, FUNCTION, T)                                                                    \
    KERNEL(NAME##_##T, 256, 4, (const T *x, T *y, int count, int d, int h, int w, int c),          \
           FUNCTION(x, y, count, d, h, w, c))
#define RESAMPLE(T)                                                                                \
    GRID(halve, halve, T)                                                                          \
    GRID(double, twice, T)                                                                         \
    GRID(quarter, quarter, T)                                                                      \
    GRID(max_pool, pool, T)                                                                        \
    GRID(halve_gradient, halve_gradient, T)                                                        \
    GRID(double_gradient, twice_gradient, T)                                                       \
    GRID(quarter_gradient, quarter_gradient, T)                                                    \
    KERNEL(unpool_##T, 256, 4,                                                                     \
           (const T *x, const float *norm, const T *add, const T *dy, const T *so_far, T *dx,      \
            int count, int d, int h, int w, int c, float slope),                                   \
           unpool(x, norm, add, dy, so_far, dx, count, d, h, w, c, slope))                         \
    KERNEL(fold_##T, 256, 4, (const T *rows, T *x, int count, int d, int h, int w, int c, int e),  \
           fold(rows, x, count, d, h, w, c, e))                                                    \
    KERNEL(unfold_##T, 256, 4, (const T *x, T *y, int count, int d, int h, int w, int c, int e),   \
           unfold_any(x, y, count, d, h, w, c, e))                                                 \
    KERNEL(refiner_input_##T, 256, 4,                                                              \
           (const T *image, const T *masks, const T *prompts, T *y, T *logits, const int *choice,  \
            int selected, int d, int h, int w),                                                    \
           refiner_input(image, masks, prompts, y, logits, choice, selected, d, h, w))
RESAMPLE(f32)
RESAMPLE(f16)
RESAMPLE(bf16)

// Weights with their axes in reverse order, x [a][b][c] to y [c][b][a]. A block has 32 of a and 32
// of (b, c): both sides are read and written in the order of memory.
KERNEL(reverse_axes, 256, 4, (const float *x, float *y, int a, int b, int c), {
    SHARED_MEMORY(shared);
    float *tile = reinterpret_cast<float *>(shared);
    int lane = threadIdx.x % 32, first = threadIdx.x / 32;
    int64 inner = (int64)b * c, i0 = (int64)blockIdx.x * 32;
    int a0 = blockIdx.y * 32;
    for (int row = first; row < 32; row += 8)
        if (a0 + row < a && i0 + lane < inner)
            tile[row * 33 + lane] = x[(a0 + row) * inner + i0 + lane];
    __syncthreads();
    for (int column = first; column < 32; column += 8) {
        int64 at = i0 + column;
        if (a0 + lane < a && at < inner)
            y[(at % c * b + at / c) * a + a0 + lane] = tile[lane * 33 + column];
    }
})

// x [period] repeated to fill `count` values; one thread per value.
KERNEL(repeat, 256, 4, (const float *x, float *y, int count, int period), {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at < count) y[at] = x[at % period];
})
