// A thread a value: changes of type, activations, sums of maps, the mask head, the refiner's answer.
#include "lib/base.cuh"

#define EACH(count)                                               \
    int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;        \
    if (at >= count) return

// From one element type to another.
template <class A, class B> __device__ __forceinline__ void convert(const A *x, B *y, int64 count) {
    EACH(count);
    y[at] = from_float<B>(to_float(x[at]));
}

KERNEL(convert_f32_f16, 256, 4, (const f32 *x, f16 *y, int64 count), convert(x, y, count))
KERNEL(convert_f32_bf16, 256, 4, (const f32 *x, bf16 *y, int64 count), convert(x, y, count))
KERNEL(convert_f16_f32, 256, 4, (const f16 *x, f32 *y, int64 count), convert(x, y, count))
KERNEL(convert_bf16_f32, 256, 4, (const bf16 *x, f32 *y, int64 count), convert(x, y, count))

// a + b, the second repeated.
template <class T> __device__ __forceinline__ void add(const T *a, const T *b, T *y, int64 count, int64 period) {
    EACH(count);
    y[at] = from_float<T>(to_float(a[at]) + to_float(b[at % period]));
}

enum Function { GELU = 0, SIGMOID = 1 };

template <class T> __device__ __forceinline__ void function(const T *x, T *y, int64 count, int which) {
    EACH(count);
    float v = to_float(x[at]);
    y[at] = from_float<T>(which == GELU ? gelu(v) : 1.0f / (1.0f + expf(-v)));
}

// Gradients of functions: of GELU from its input, of the logistic function and of ReLU from their values.
enum Slope { GELU_SLOPE = 0, SIGMOID_SLOPE = 1, RELU_SLOPE = 2 };

template <class T> __device__ __forceinline__ void slope(const T *x, const T *dy, T *dx, int64 count, int which) {
    EACH(count);
    float v = to_float(x[at]), g = to_float(dy[at]);
    float s = which == GELU_SLOPE ? gelu_slope(v) : which == SIGMOID_SLOPE ? v * (1.0f - v) : v > 0.0f ? 1.0f : 0.0f;
    dx[at] = from_float<T>(g * s);
}

template <class T> __device__ __forceinline__ void times(const T *a, const T *b, T *y, int64 count) {
    EACH(count);
    y[at] = from_float<T>(to_float(a[at]) * to_float(b[at]));
}

// a b + c.
template <class T> __device__ __forceinline__ void multiply_add(const T *a, const T *b, const T *c, T *y, int64 count) {
    EACH(count);
    y[at] = from_float<T>(to_float(a[at]) * to_float(b[at]) + to_float(c[at]));
}

// Linear heads over every voxel of x [voxels, c], after its norm and an added map: weights [m, c], bias [m] or none, m at most 4, y [m, voxels].
// Reads the map once and writes m values a voxel: traffic is all there is.
template <class T>
__device__ __forceinline__ void heads(const T *x, const float *norm, const T *add, const T *weights, const T *bias, T *y, int64 voxels, int c, int m,
                                      float slope) {
    SHARED_MEMORY(shared);
    float *w = reinterpret_cast<float *>(shared), *n = w + m * c;
    for (int i = threadIdx.x; i < m * c; i += blockDim.x) w[i] = to_float(weights[i]);
    for (int i = threadIdx.x; i < 3 * c; i += blockDim.x) n[i] = norm[i];
    __syncthreads();
    EACH(voxels);
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

// The heads' gradient of the activated map: dx [voxels, c] from dy [m, voxels].
template <class T> __device__ __forceinline__ void heads_gradient(const T *weights, const T *dy, T *dx, int64 voxels, int c, int m) {
    EACH(voxels * c);
    int64 voxel = at / c;
    float g = 0.0f;
    for (int j = 0; j < m; j++) g += to_float(dy[j * voxels + voxel]) * to_float(weights[j * c + at % c]);
    dx[at] = from_float<T>(g);
}

// Sums of their weights' and bias's gradient by tiles of 256 voxels: partial [tiles][m * (c + 1)][2], of which the second is unused.
template <class T>
__device__ __forceinline__ void heads_sums(const T *x, const float *norm, const T *add, const T *dy, double *partial, int64 voxels, int c, int m,
                                           float slope) {
    int64 first = (int64)blockIdx.x * 256, end = first + 256 < voxels ? first + 256 : voxels;
    int columns = m * (c + 1);
    for (int column = threadIdx.x; column < columns; column += blockDim.x) {
        int j = column / (c + 1), i = column % (c + 1);
        double sum = 0;
        for (int64 v = first; v < end; v++) {
            float g = to_float(dy[j * voxels + v]);
            if (i < c) g *= normed(to_float(x[v * c + i]), norm + i * 3, slope) + (add ? to_float(add[v * c + i]) : 0.0f);
            sum += g;
        }
        double *to = partial + ((int64)blockIdx.x * columns + column) * 2;
        to[0] = sum, to[1] = 0;
    }
}

#define POINTWISE(T)                                                                                                                   \
    KERNEL(add_##T, 256, 4, (const T *a, const T *b, T *y, int64 count, int64 period), add(a, b, y, count, period))                         \
    KERNEL(function_##T, 256, 4, (const T *x, T *y, int64 count, int which), function(x, y, count, which))                                 \
    KERNEL(multiply_add_##T, 256, 4, (const T *a, const T *b, const T *c, T *y, int64 count), multiply_add(a, b, c, y, count))             \
    KERNEL(slope_##T, 256, 4, (const T *x, const T *dy, T *dx, int64 count, int which), slope(x, dy, dx, count, which))                    \
    KERNEL(times_##T, 256, 4, (const T *a, const T *b, T *y, int64 count), times(a, b, y, count))                                          \
    KERNEL(heads_gradient_##T, 256, 4, (const T *weights, const T *dy, T *dx, int64 voxels, int c, int m),                                 \
           heads_gradient(weights, dy, dx, voxels, c, m))                                                                                  \
    KERNEL(heads_sums_##T, 256, 4,                                                                                                         \
           (const T *x, const float *norm, const T *add, const T *dy, double *partial, int64 voxels, int c, int m, float slope),           \
           heads_sums(x, norm, add, dy, partial, voxels, c, m, slope))                                                                     \
    KERNEL(heads_##T, 256, 4,                                                                                                             \
           (const T *x, const float *norm, const T *add, const T *weights, const T *bias, T *y, int64 voxels, int c, int m, float slope), \
           heads(x, norm, add, weights, bias, y, voxels, c, m, slope))
POINTWISE(f32)
POINTWISE(f16)
POINTWISE(bf16)
