// A decoder stage's first convolution: upsampling and convolution composed into 8 phases of 2x2x2
// taps on the coarse grid, on top of the skip map. See lib/conv.cuh. skip_border adds to a skip map
// the part of the deconvolution's bias that is lost at the border.
#include "lib/conv.cuh"

#define PLAIN(NAME, T, GATHER)                                                                     \
    KERNEL(NAME##_plain_##T, 256, 2, CONV_PARAMETERS(T, float),                                    \
           CONV_BODY(8, conv_plain<T, 16, 4, 8, GATHER>))                                          \
    KERNEL(NAME##_few_##T, 256, 2, CONV_PARAMETERS(T, float),                                      \
           CONV_BODY(8, conv_plain<T, 1, 1, 8, GATHER>))
#define MATRIX(NAME, T)                                                                            \
    KERNEL(NAME##_16_##T, 128, 3, CONV_PARAMETERS(T, T),                                           \
           CONV_BODY(8, conv_matrix<T, 16, 8, true>))                                              \
    KERNEL(NAME##_32_##T, 128, 3, CONV_PARAMETERS(T, T), CONV_BODY(8, conv_matrix<T, 32, 8, true>))
PLAIN(decoder_stage, f32, false)
PLAIN(decoder_stage, f16, false)
PLAIN(decoder_stage, bf16, false)
// With up to 16 or 32 input channels, and on maps of many tiles, a block computes all phases;
// otherwise it computes one phase.
#define STAGE_MATRIX(T)                                                                            \
    KERNEL(decoder_stage_16_##T, 128, 3, CONV_PARAMETERS(T, T), CONV_BODY(8, stage_matrix<T, 16>)) \
    KERNEL(decoder_stage_32_##T, 128, 3, CONV_PARAMETERS(T, T), CONV_BODY(8, stage_matrix<T, 32>)) \
    KERNEL(decoder_stage_phase_16_##T, 128, 3, CONV_PARAMETERS(T, T),                              \
           CONV_BODY(8, conv_matrix<T, 16, 8, false>))                                             \
    KERNEL(decoder_stage_phase_32_##T, 128, 3, CONV_PARAMETERS(T, T),                              \
           CONV_BODY(8, conv_matrix<T, 32, 8, false>))
STAGE_MATRIX(f16)
STAGE_MATRIX(bf16)
// The gradient of the coarse input.
PLAIN(decoder_stage_gradient, f32, true)
PLAIN(decoder_stage_gradient, f16, true)
PLAIN(decoder_stage_gradient, bf16, true)
MATRIX(decoder_stage_gradient, f16)
MATRIX(decoder_stage_gradient, bf16)

// One block per line along w of map [n, d, h, w, c]: adds border[case][c], where the case is first,
// inner or last along each axis; inner voxels are left unchanged. With `bias` the map is written
// from it instead.
template <int V, class T>
__device__ __forceinline__ void border_line(T *map, const float *bias, const float *border, int d,
                                            int h, int w, int c) {
    int j = blockIdx.x % h, i = blockIdx.x / h % d, packs = c / V;
    int side = ((i == 0 ? 0 : 1 + (i + 1 == d)) * 3 + (j == 0 ? 0 : 1 + (j + 1 == h))) * 3;
    // Only the ends of an inner line.
    bool all = bias || side != 12 || w < 2;
    T *line = map + (int64)blockIdx.x * w * c;
    for (int at = threadIdx.x; at < (all ? w : 2) * packs; at += blockDim.x) {
        int k = at / packs * (all ? 1 : w - 1), channel = at % packs * V;
        const float *edge = border + (side + (k == 0 ? 0 : 1 + (k + 1 == w))) * c + channel;
        float v[V], more[V];
        if (bias) load(v, bias + channel); else load(v, line + (int64)k * c + channel);
        load(more, edge);
#pragma unroll
        for (int e = 0; e < V; e++) v[e] += more[e];
        store(line + (int64)k * c + channel, v);
    }
}

template <class T>
__device__ __forceinline__ void border(T *map, const float *bias, const float *border, int d, int h,
                                       int w, int c) {
    constexpr int V = 16 / (int)sizeof(T);
    if (c % V == 0) border_line<V>(map, bias, border, d, h, w, c);
    else border_line<1>(map, bias, border, d, h, w, c);
}

#define BORDER(T)                                                                                  \
    KERNEL(skip_border_##T, 128, 8,                                                                \
           (T *map, const float *bias, const float *edges, int d, int h, int w, int c),            \
           border(map, bias, edges, d, h, w, c))
BORDER(f32)
BORDER(f16)
BORDER(bf16)

// The sums of the skip map's gradient that the biases of a stage need: one for each of the 27 kinds
// of voxel (first, inner or last along each axis). First the sums of each line along w, partial
// [line][kind][c], with one block per line and one thread per channel at a time; then the sums over
// the lines of a kind, with one block of 128 threads per channel of a kind.
template <class T>
__device__ __forceinline__ void line_sums(const T *dy, double *partial, int w, int c) {
    const T *row = dy + (int64)blockIdx.x * w * c;
    for (int channel = threadIdx.x; channel < c; channel += blockDim.x) {
        double inner = 0;
        for (int k = 1; k + 1 < w; k++) inner += to_float(row[(int64)k * c + channel]);
        double *to = partial + (int64)blockIdx.x * 3 * c + channel;
        to[0] = to_float(row[channel]), to[c] = inner,
            to[2 * c] = w > 1 ? to_float(row[(int64)(w - 1) * c + channel]) : 0.0f;
    }
}

__device__ __forceinline__ void kind_sums(const double *partial, float *y, int lines, int d, int h,
                                          int c) {
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

#define LINES(T)                                                                                   \
    KERNEL(skip_border_lines_##T, 32, 16, (const T *dy, double *partial, int w, int c),            \
           line_sums(dy, partial, w, c))
LINES(f32)
LINES(f16)
LINES(bf16)
KERNEL(skip_border_kinds, 128, 8, (const double *partial, float *y, int lines, int d, int h, int c),
       kind_sums(partial, y, lines, d, h, c))
