// Operations on each value by itself, with 16 bytes of values per thread if their number allows it:
// changes of type, activations, sums of maps, the mask head, the refiner's answer.
#include "lib/sums.cuh"

#define EACH(V, count)                                                    \
    int64 at = ((int64)blockIdx.x * blockDim.x + threadIdx.x) * (V);      \
    if (at >= count) return

// Elements of 16 bytes.
template <class T> constexpr int WIDE = 16 / (int)sizeof(T);

// Calls FUNCTION for the number of values per thread that divides both counts, for which
// src/device/cuda/launcher.rs launches it (Launch::per_vector).
#define BY_VECTORS(V, count, period, FUNCTION, ...)                                                \
    if ((count) % (V) == 0 && (period) % (V) == 0) FUNCTION<V>(__VA_ARGS__);                       \
    else FUNCTION<1>(__VA_ARGS__)

// From one element type to another.
template <int V, class A, class B>
__device__ __forceinline__ void convert(const A *x, B *y, int64 count) {
    EACH(V, count);
    float v[V];
    load(v, x + at);
    store(y + at, v);
}

#define CONVERT(A, B)                                                                              \
    KERNEL(convert_##A##_##B, 256, 4, (const A *x, B *y, int64 count),                             \
           BY_VECTORS(8, count, count, convert, x, y, count))
CONVERT(f32, f16)
CONVERT(f32, bf16)
CONVERT(f16, f32)
CONVERT(bf16, f32)

// a + b, the second repeated.
template <int V, class T>
__device__ __forceinline__ void add(const T *a, const T *b, T *y, int64 count, int64 period) {
    EACH(V, count);
    float v[V], more[V];
    load(v, a + at), load(more, b + (period == count ? at : at % period));
#pragma unroll
    for (int i = 0; i < V; i++) v[i] += more[i];
    store(y + at, v);
}

// sum + part, in place, of floats: what is small beside a sum of 16 bits would be lost in it.
template <int V, class T>
__device__ __forceinline__ void accumulate(float *sum, const T *part, int64 count) {
    EACH(V, count);
    float v[V], more[V];
    load(v, sum + at), load(more, part + at);
#pragma unroll
    for (int i = 0; i < V; i++) v[i] += more[i];
    store(sum + at, v);
}

#define ACCUMULATE(T)                                                                              \
    KERNEL(accumulate_##T, 256, 4, (float *sum, const T *part, int64 count),                       \
           BY_VECTORS(WIDE<T>, count, count, accumulate, sum, part, count))
ACCUMULATE(f16)
ACCUMULATE(bf16)

enum Function { GELU = 0, SIGMOID = 1 };

template <int V, class T>
__device__ __forceinline__ void function(const T *x, T *y, int64 count, int which) {
    EACH(V, count);
    float v[V];
    load(v, x + at);
#pragma unroll
    for (int i = 0; i < V; i++) v[i] = which == GELU ? gelu(v[i]) : 1.0f / (1.0f + expf(-v[i]));
    store(y + at, v);
}

// Derivatives of functions: that of GELU from its input, those of the logistic function and of ReLU
// from their values.
enum Slope { GELU_SLOPE = 0, SIGMOID_SLOPE = 1, RELU_SLOPE = 2 };

template <int V, class T>
__device__ __forceinline__ void slope(const T *x, const T *dy, T *dx, int64 count, int which) {
    EACH(V, count);
    float v[V], g[V];
    load(v, x + at), load(g, dy + at);
#pragma unroll
    for (int i = 0; i < V; i++) {
        g[i] *= which == GELU_SLOPE      ? gelu_slope(v[i])
                : which == SIGMOID_SLOPE ? v[i] * (1.0f - v[i])
                : v[i] > 0.0f            ? 1.0f
                                         : 0.0f;
    }
    store(dx + at, g);
}

template <int V, class T>
__device__ __forceinline__ void times(const T *a, const T *b, T *y, int64 count) {
    EACH(V, count);
    float v[V], by[V];
    load(v, a + at), load(by, b + at);
#pragma unroll
    for (int i = 0; i < V; i++) v[i] *= by[i];
    store(y + at, v);
}

// a b + c.
template <int V, class T>
__device__ __forceinline__ void multiply_add(const T *a, const T *b, const T *c, T *y,
                                             int64 count) {
    EACH(V, count);
    float v[V], by[V], more[V];
    load(v, a + at), load(by, b + at), load(more, c + at);
#pragma unroll
    for (int i = 0; i < V; i++) v[i] = v[i] * by[i] + more[i];
    store(y + at, v);
}

// Logits of masks, or other maps that are linear in each voxel's channels, of x [voxels, c], after
// its norm and an added map: weights [m, c], bias [m] or none, m at most 4, y [m, voxels]. Reads
// the map once and writes m values a voxel: traffic is all there is.
template <class T>
__device__ __forceinline__ void mask_logits(const T *x, const float *norm, const T *add,
                                            const T *weights, const T *bias, T *y, int64 voxels,
                                            int c, int m, float slope) {
    SHARED_MEMORY(shared);
    float *w = reinterpret_cast<float *>(shared), *n = w + m * c;
    for (int i = threadIdx.x; i < m * c; i += blockDim.x) w[i] = to_float(weights[i]);
    for (int i = threadIdx.x; i < 3 * c; i += blockDim.x) n[i] = norm[i];
    __syncthreads();
    EACH(1, voxels);
    float acc[4] = {};
    auto one = [&](float v, int i) {
        v = normed(v, n + i * 3, slope);
        if (add) v += to_float(add[at * c + i]);
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (j < m) acc[j] += v * w[j * c + i];
    };
    if (c % 8 == 0) {
        for (int i = 0; i < c; i += 8) {
            float v[8];
            load(v, x + at * c + i);
#pragma unroll
            for (int k = 0; k < 8; k++) one(v[k], i + k);
        }
    } else {
        for (int i = 0; i < c; i++) one(to_float(x[at * c + i]), i);
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (j < m) y[j * voxels + at] = from_float<T>(acc[j] + (bias ? to_float(bias[j]) : 0.0f));
}

// Their gradient of the activated map: dx [voxels, c] from dy [m, voxels].
template <int V, class T>
__device__ __forceinline__ void mask_logits_gradient(const T *weights, const T *dy, T *dx,
                                                     int64 voxels, int c, int m) {
    EACH(V, voxels * c);
    int64 voxel = at / c;
    weights += at - voxel * c;
    float g[V] = {};
    for (int j = 0; j < m; j++) {
        float of_map = to_float(dy[j * voxels + voxel]), w[V];
        load(w, weights + j * c);
#pragma unroll
        for (int i = 0; i < V; i++) g[i] += of_map * w[i];
    }
    store(dx + at, g);
}

// Sums over voxels for the gradients of their weights and bias, [m][c + 1]: a thread has V
// channels of all maps, and the column of the bias after them.
template <int V, class T>
__device__ __forceinline__ void mask_logits_sums(const T *x, const float *norm, const T *add,
                                                 const T *dy, const Totals &to, int voxels, int c,
                                                 int m, int run, int lanes, float slope) {
    constexpr int MAPS = 4;
    int column = own_group(lanes) * V;
    x += column, add = add ? add + column : add;
    float n[3 * V] = {};
    if (column < c) {
#pragma unroll
        for (int j = 0; j < 3 * V; j++) n[j] = norm[column * 3 + j];
    }
    column_sums<MAPS, V + 1, 2>(
        voxels, run, lanes, column < c,
        [&](int voxel, float (&some)[MAPS][V + 1]) {
            float v[V], more[V] = {};
            load(v, x + (int64)voxel * c);
            if (add) load(more, add + (int64)voxel * c);
#pragma unroll
            for (int j = 0; j < V; j++) v[j] = normed(v[j], n + j * 3, slope) + more[j];
#pragma unroll
            for (int k = 0; k < MAPS; k++) {
                if (k >= m) break;
                float g = to_float(dy[(int64)k * voxels + voxel]);
#pragma unroll
                for (int j = 0; j < V; j++) some[k][j] += g * v[j];
                some[k][V] += g;
            }
        },
        [&](int group, int j, const double (&all)[MAPS]) {
            int i = j < V ? group * V + j : c;
            if (j < V ? i >= c : group > 0) return;
#pragma unroll
            for (int k = 0; k < MAPS; k++)
                if (k < m) to.put(k * (c + 1) + i, m * (c + 1), all[k], 0.0);
        });
}

#define POINTWISE(T)                                                                               \
    KERNEL(add_##T, 256, 4, (const T *a, const T *b, T *y, int64 count, int64 period),             \
           BY_VECTORS(WIDE<T>, count, period, add, a, b, y, count, period))                        \
    KERNEL(function_##T, 256, 4, (const T *x, T *y, int64 count, int which),                       \
           BY_VECTORS(WIDE<T>, count, count, function, x, y, count, which))                        \
    KERNEL(multiply_add_##T, 256, 4, (const T *a, const T *b, const T *c, T *y, int64 count),      \
           BY_VECTORS(WIDE<T>, count, count, multiply_add, a, b, c, y, count))                     \
    KERNEL(slope_##T, 256, 4, (const T *x, const T *dy, T *dx, int64 count, int which),            \
           BY_VECTORS(WIDE<T>, count, count, slope, x, dy, dx, count, which))                      \
    KERNEL(times_##T, 256, 4, (const T *a, const T *b, T *y, int64 count),                         \
           BY_VECTORS(WIDE<T>, count, count, times, a, b, y, count))                               \
    KERNEL(mask_logits_gradient_##T, 256, 4,                                                       \
           (const T *weights, const T *dy, T *dx, int64 voxels, int c, int m),                     \
           BY_VECTORS(WIDE<T>, c, c, mask_logits_gradient, weights, dy, dx, voxels, c, m))         \
    KERNEL(mask_logits_sums_##T, 256, 2,                                                           \
           (const T *x, const float *norm, const T *add, const T *dy, double *partial,             \
            float *first, int voxels, int c, int m, int run, int lanes, float slope),              \
           Totals to{partial, first, nullptr, 0};                                                  \
           if (c % COLUMNS_EACH == 0)                                                              \
               mask_logits_sums<COLUMNS_EACH>(x, norm, add, dy, to, voxels, c, m, run, lanes,      \
                                              slope);                                              \
           else mask_logits_sums<1>(x, norm, add, dy, to, voxels, c, m, run, lanes, slope))        \
    KERNEL(mask_logits_##T, 256, 4,                                                                \
           (const T *x, const float *norm, const T *add, const T *weights, const T *bias, T *y,    \
            int64 voxels, int c, int m, float slope),                                              \
           mask_logits(x, norm, add, weights, bias, y, voxels, c, m, slope))
POINTWISE(f32)
POINTWISE(f16)
POINTWISE(bf16)
