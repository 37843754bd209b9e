// A decoder stage's first convolution: upsampling and convolution composed into 8 phases of 2x2x2 taps on the coarse grid, on top of the skip map.
// See lib/conv.cuh. skip_border adds to a skip map what the deconvolution's bias loses at the border.
#include "lib/conv.cuh"

#define PLAIN(NAME, T, GATHER)                                                                                              \
    KERNEL(NAME##_plain_##T, 256, 2, CONV_PARAMETERS(T, float), CONV_BODY(8, conv_plain<T, 16, 4, 8, GATHER>))              \
    KERNEL(NAME##_few_##T, 256, 2, CONV_PARAMETERS(T, float), CONV_BODY(8, conv_plain<T, 1, 1, 8, GATHER>))
#define MATRIX(NAME, T, GATHER)                                                                                             \
    KERNEL(NAME##_16_##T, 256, 2, CONV_PARAMETERS(T, T), CONV_BODY(8, conv_matrix<T, 16, 8, GATHER>))                       \
    KERNEL(NAME##_32_##T, 256, 2, CONV_PARAMETERS(T, T), CONV_BODY(8, conv_matrix<T, 32, 8, GATHER>))
PLAIN(decoder_stage, f32, false)
PLAIN(decoder_stage, f16, false)
PLAIN(decoder_stage, bf16, false)
MATRIX(decoder_stage, f16, false)
MATRIX(decoder_stage, bf16, false)
// The gradient of the coarse input.
PLAIN(decoder_stage_gradient, f32, true)
PLAIN(decoder_stage_gradient, f16, true)
PLAIN(decoder_stage_gradient, bf16, true)
MATRIX(decoder_stage_gradient, f16, true)
MATRIX(decoder_stage_gradient, bf16, true)

// A thread a voxel of map [n, d, h, w, c]: adds border[case][c], the case being first, inner or last along each axis; inner voxels are left alone. With `bias` the map
// is written from it instead.
template <class T> __device__ __forceinline__ void border(T *map, const float *bias, const float *border, int64 voxels, int d, int h, int w, int c) {
    int64 voxel = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (voxel >= voxels) return;
    int k = voxel % w, j = voxel / w % h, i = voxel / w / h % d;
    int side = ((i == 0 ? 0 : 1 + (i + 1 == d)) * 3 + (j == 0 ? 0 : 1 + (j + 1 == h))) * 3 + (k == 0 ? 0 : 1 + (k + 1 == w));
    if (!bias && side == 13) return;
    T *to = map + voxel * c;
    for (int channel = 0; channel < c; channel++) to[channel] = from_float<T>((bias ? bias[channel] : to_float(to[channel])) + border[side * c + channel]);
}

#define BORDER(T)                                                                                                                 \
    KERNEL(skip_border_##T, 256, 2, (T * map, const float *bias, const float *edges, int64 voxels, int d, int h, int w, int c),       \
           border(map, bias, edges, voxels, d, h, w, c))
BORDER(f32)
BORDER(f16)
BORDER(bf16)

// What the biases of a stage need of the skip map's gradient: sums over the 27 kinds of voxel, first, inner or last along each axis. First by lines along w,
// partial [line][kind][c], a block a line and a thread a channel at a time; then the lines of a kind, a block of 128 threads a channel of a kind.
template <class T> __device__ __forceinline__ void line_sums(const T *g, double *partial, int w, int c) {
    const T *row = g + (int64)blockIdx.x * w * c;
    for (int channel = threadIdx.x; channel < c; channel += blockDim.x) {
        double inner = 0;
        for (int k = 1; k + 1 < w; k++) inner += to_float(row[(int64)k * c + channel]);
        double *to = partial + (int64)blockIdx.x * 3 * c + channel;
        to[0] = to_float(row[channel]), to[c] = inner, to[2 * c] = w > 1 ? to_float(row[(int64)(w - 1) * c + channel]) : 0.0f;
    }
}

__device__ __forceinline__ void kind_sums(const double *partial, float *y, int lines, int d, int h, int c) {
    SHARED_MEMORY(shared);
    double *bins = reinterpret_cast<double *>(shared);
    int channel = blockIdx.x % c, kind = blockIdx.x / c, t = threadIdx.x;
    double sum = 0;
    for (int line = t; line < lines; line += 128) {
        int j = line % h, i = line / h % d;
        int side = (i == 0 ? 0 : 1 + (i + 1 == d)) * 3 + (j == 0 ? 0 : 1 + (j + 1 == h));
        if (side == kind / 3) sum += partial[((int64)line * 3 + kind % 3) * c + channel];
    }
    bins[t] = sum;
    for (int half = 64; half > 0; half /= 2) {
        __syncthreads();
        if (t < half) bins[t] += bins[t + half];
    }
    if (t == 0) y[blockIdx.x] = (float)bins[0];
}

#define LINES(T) KERNEL(skip_border_lines_##T, 32, 16, (const T *g, double *partial, int w, int c), line_sums(g, partial, w, c))
LINES(f32)
LINES(f16)
LINES(bf16)
KERNEL(skip_border_kinds, 128, 8, (const double *partial, float *y, int lines, int d, int h, int c), kind_sums(partial, y, lines, d, h, c))
