// Norms: the sums and coefficients of instance norms, their application where a map must be written out, layer norm over channels.
#include "lib/base.cuh"

// Sums of map [n, rows, c] by tiles of 256 rows: partial [n][tiles][c][value, square]. Grid (tiles, n). A thread a channel at a time.
template <class T> __device__ __forceinline__ void sums(const T *x, double *partial, int rows, int c) {
    int row0 = blockIdx.x * 256, count = min(256, rows - row0);
    const T *from = x + ((int64)blockIdx.y * rows + row0) * c;
    double *to = partial + ((int64)blockIdx.y * gridDim.x + blockIdx.x) * c * 2;
    for (int channel = threadIdx.x; channel < c; channel += blockDim.x) {
        double sum = 0, squares = 0;
        for (int r = 0; r < count; r++) {
            double v = to_float(from[(int64)r * c + channel]);
            sum += v, squares += v * v;
        }
        to[channel * 2] = sum, to[channel * 2 + 1] = squares;
    }
}

// From partial sums [n][tiles][c][2] to coefficients [n][c][mean, scale, shift] and, for the gradient, [n][c][inverse deviation, what rounding the mean
// adds to the standardised value]. A block of 128 threads a channel of an item.
__device__ __forceinline__ void coefficients(const double *partial, const float *weight, const float *bias, float *norm, float *deviations, int tiles,
                                             int c, double count, double eps) {
    SHARED_MEMORY(shared);
    double *bins = reinterpret_cast<double *>(shared);
    int channel = blockIdx.x % c, item = blockIdx.x / c, t = threadIdx.x;
    double sum = 0, squares = 0;
    for (int tile = t; tile < tiles; tile += 128) {
        const double *p = partial + (((int64)item * tiles + tile) * c + channel) * 2;
        sum += p[0], squares += p[1];
    }
    bins[t * 2] = sum, bins[t * 2 + 1] = squares;
    for (int half = 64; half > 0; half /= 2) {
        __syncthreads();
        if (t < half) bins[t * 2] += bins[(t + half) * 2], bins[t * 2 + 1] += bins[(t + half) * 2 + 1];
    }
    if (t) return;
    double mean = bins[0] / count, variance = bins[1] / count - mean * mean;
    double deviation = 1.0 / sqrt((variance > 0.0 ? variance : 0.0) + eps), scale = weight[channel] * deviation;
    // What rounding the mean leaves out goes into the shift.
    float near = (float)mean;
    norm[blockIdx.x * 3] = near, norm[blockIdx.x * 3 + 1] = (float)scale, norm[blockIdx.x * 3 + 2] = (float)(bias[channel] - (mean - near) * scale);
    deviations[blockIdx.x * 2] = (float)deviation, deviations[blockIdx.x * 2 + 1] = (float)((near - mean) * deviation);
}

KERNEL(norm_coefficients, 128, 4,
       (const double *partial, const float *weight, const float *bias, float *norm, float *deviations, int tiles, int c, double count, double eps),
       coefficients(partial, weight, bias, norm, deviations, tiles, c, count, eps))

// y = norm(x) + add, a thread a value of [n, rows, c].
template <class T>
__device__ __forceinline__ void apply(const T *x, const float *norm, const T *add, T *y, int64 count, int64 per_item, int c, float slope) {
    int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    float v = normed(to_float(x[at]), norm + (at / per_item * c + at % c) * 3, slope);
    y[at] = from_float<T>(v + (add ? to_float(add[at]) : 0.0f));
}

// Layer norm of rows of c values and GELU where asked, a warp a row. With `w` > 0 the rows are those of a transposed convolution of stride 2: row r of y
// is a fine voxel of [n, 2d, 2h, 2w], and x holds, per coarse voxel, its 8 phases one behind the other. Without a weight, rows are moved only.
template <class T>
__device__ __forceinline__ void layer_norm(const T *x, const float *weight, const float *bias, T *y, int64 rows, int c, float eps, int gelu_behind, int d,
                                           int h, int w) {
    int64 row = (int64)blockIdx.x * 8 + threadIdx.x / 32, source = row;
    if (row >= rows) return;
    if (w > 0) {
        int k = row % (2 * w), j = row / (2 * w) % (2 * h);
        int64 i = row / (4 * w * h) % (2 * d), item = row / (8 * w * h * d);
        source = (((item * d + i / 2) * h + j / 2) * w + k / 2) * 8 + (i % 2 * 2 + j % 2) * 2 + k % 2;
    }
    int lane = threadIdx.x % 32;
    x += source * c, y += row * c;
    float mean = 0.0f, scale = 1.0f;
    if (weight) {
        for (int i = lane; i < c; i += 32) mean += to_float(x[i]);
        mean = warp_sum(mean) / c;
        float variance = 0.0f;
        for (int i = lane; i < c; i += 32) {
            float v = to_float(x[i]) - mean;
            variance += v * v;
        }
        scale = 1.0f / sqrtf(warp_sum(variance) / c + eps);
    }
    for (int i = lane; i < c; i += 32) {
        float v = to_float(x[i]);
        if (weight) v = (v - mean) * scale * weight[i] + bias[i];
        y[i] = from_float<T>(gelu_behind ? gelu(v) : v);
    }
}

#define NORM(T)                                                                                                                              \
    KERNEL(norm_sums_##T, 256, 4, (const T *x, double *partial, int rows, int c), sums(x, partial, rows, c))                                    \
    KERNEL(norm_apply_##T, 256, 4, (const T *x, const float *norm, const T *add, T *y, int64 count, int64 per_item, int c, float slope),          \
           apply(x, norm, add, y, count, per_item, c, slope))                                                                                \
    KERNEL(layer_norm_##T, 256, 4,                                                                                                              \
           (const T *x, const float *weight, const float *bias, T *y, int64 rows, int c, float eps, int gelu_behind, int d, int h, int w),    \
           layer_norm(x, weight, bias, y, rows, c, eps, gelu_behind, d, h, w))
NORM(f32)
NORM(f16)
NORM(bf16)
