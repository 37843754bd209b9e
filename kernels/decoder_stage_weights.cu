// A decoder stage's weights, composed of products of a 3x3x3 convolution's taps with a
// deconvolution's phases, and the gradients of both.
//
// Along an axis, tap t of an output voxel of phase p falls on the fine voxel p + t - 1: on coarse
// tap a = (p + t + 1) / 2 - p, computed there by the deconvolution's phase q = (p + t + 1) % 2. So
// each of the 216 pairs of 8 phases and 27 taps belongs to one composed weight W[p][a] = sum of
// conv[t] deconv[q], and its gradient goes back to one weight of each: d conv[t] = sum of dW[p][a]
// deconv[q]^T, d deconv[q] = sum of dW[p][a]^T conv[t]. Weights are stored here with their taps
// first: conv [27][outs][inputs], of whose inputs the last `up` are outputs of the deconvolution,
// deconv [8][coarse][up], dW [a][p][outs][coarse].
#include "lib/base.cuh"

constexpr int THREADS = 256, SPAN = 64, STEP = 16, STRIDE = SPAN + 4;
// The number of steps whose products are summed separately, so that a sum of thousands loses no
// more precision than a short one.
constexpr int SHORT = 4;
constexpr int PAIRS = 8 * 27;

// Weights [row][tap] with their taps first, [tap][row], or the reverse. A block has 256 rows: both
// sides are read and written in the order of memory.
template <bool FORWARD>
__device__ __forceinline__ void transpose(const float *x, float *y, int64 rows, int taps) {
    SHARED_MEMORY(shared);
    float *tile = reinterpret_cast<float *>(shared);
    // An odd number of floats from one row to the next.
    int stride = taps | 1, count = (int)min((int64)THREADS, rows - (int64)blockIdx.x * THREADS);
    int64 first = (int64)blockIdx.x * THREADS;
    for (int i = threadIdx.x; i < THREADS * taps; i += THREADS) {
        int row = FORWARD ? i / taps : i % THREADS, tap = FORWARD ? i % taps : i / THREADS;
        if (row < count)
            tile[row * stride + tap] = x[FORWARD ? first * taps + i : tap * rows + first + row];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < THREADS * taps; i += THREADS) {
        int row = FORWARD ? i % THREADS : i / taps, tap = FORWARD ? i / THREADS : i % taps;
        if (row < count)
            y[FORWARD ? tap * rows + first + row : first * taps + i] = tile[row * stride + tap];
    }
}

KERNEL(stage_taps_first, 256, 4, (const float *x, float *y, int64 rows, int taps),
       transpose<true>(x, y, rows, taps))
KERNEL(stage_taps_last, 256, 4, (const float *x, float *y, int64 rows, int taps),
       transpose<false>(x, y, rows, taps))

// The coarse tap and the deconvolution's phase that belong to phase p and tap t of the convolution
// along an axis. Each is appended to those of the axes before.
__device__ __forceinline__ void meet(int p, int t, int &coarse_tap, int &deconv_phase) {
    coarse_tap = coarse_tap * 2 + (p + t + 1) / 2 - p,
        deconv_phase = deconv_phase * 2 + (p + t + 1) % 2;
}

__device__ __forceinline__ void meet_all(int phase, int tap, int &coarse_tap, int &deconv_phase) {
    coarse_tap = deconv_phase = 0;
    meet(phase >> 2, tap / 9, coarse_tap, deconv_phase);
    meet(phase >> 1 & 1, tap / 3 % 3, coarse_tap, deconv_phase);
    meet(phase & 1, tap % 3, coarse_tap, deconv_phase);
}

// 64 rows and 16 columns k of a matrix, as [k][row]; zero beyond its edges. With DEEP, columns are
// contiguous in memory, otherwise rows are.
template <bool DEEP>
__device__ __forceinline__ void fill(float *to, const float *from, int stride, int row0, int rows,
                                     int k0, int columns) {
    for (int i = threadIdx.x; i < SPAN * STEP; i += THREADS) {
        int row = DEEP ? i / STEP : i % SPAN, k = DEEP ? i % STEP : i / SPAN;
        bool there = row0 + row < rows && k0 + k < columns;
        int64 at =
            DEEP ? (int64)(row0 + row) * stride + k0 + k : (int64)(k0 + k) * stride + row0 + row;
        to[k * STRIDE + row] = there ? from[at] : 0.0f;
    }
}

// The product that a kernel computes: the composed weights, or the gradient of the convolution's
// weights or of the deconvolution's.
enum Product { COMPOSED, OF_CONV, OF_DECONV };

// A block computes 64 x 64 values of matrix blockIdx.z: that of a composed weight (phase * 8 +
// coarse tap), of a tap, or of a phase of the deconvolution.
template <Product WHICH>
__device__ __forceinline__ void products(const float *left, const float *right, float *y, int outs,
                                         int coarse, int up, int inputs) {
    SHARED_MEMORY(shared);
    float *a = reinterpret_cast<float *>(shared), *b = a + STEP * STRIDE;
    int t = threadIdx.x, row0 = blockIdx.y * SPAN, column0 = blockIdx.x * SPAN, group = blockIdx.z,
        skip = inputs - up;
    int rows = WHICH == OF_DECONV ? coarse : outs, columns = WHICH == COMPOSED ? coarse : up;
    int deep = WHICH == COMPOSED ? up : WHICH == OF_CONV ? coarse : outs;
    float sum[4][4] = {}, part[4][4] = {};
    int steps = 0;
    auto join = [&]() {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) sum[i][j] += part[i][j], part[i][j] = 0.0f;
    };
#pragma unroll 1
    for (int pair = 0; pair < PAIRS; pair++) {
        int phase = pair / 27, tap = pair % 27, coarse_tap, deconv_phase;
        meet_all(phase, tap, coarse_tap, deconv_phase);
        if (group != (WHICH == COMPOSED ? phase * 8 + coarse_tap
                                        : WHICH == OF_CONV ? tap : deconv_phase))
            continue;
        int64 conv = (int64)tap * outs * inputs + skip, deconv = (int64)deconv_phase * coarse * up;
        int64 composed = (int64)(coarse_tap * 8 + phase) * outs * coarse;
#pragma unroll 1
        for (int k0 = 0; k0 < deep; k0 += STEP) {
            __syncthreads();
            if constexpr (WHICH == COMPOSED) {
                fill<true>(a, left + conv, inputs, row0, rows, k0, deep);
                fill<true>(b, right + deconv, up, column0, columns, k0, deep);
            } else if constexpr (WHICH == OF_CONV) {
                fill<true>(a, left + composed, coarse, row0, rows, k0, deep);
                fill<false>(b, right + deconv, up, column0, columns, k0, deep);
            } else {
                fill<false>(a, left + composed, coarse, row0, rows, k0, deep);
                fill<false>(b, right + conv, inputs, column0, columns, k0, deep);
            }
            __syncthreads();
#pragma unroll
            for (int k = 0; k < STEP; k++) {
                float x[4], w[4];
                load(x, a + k * STRIDE + t / 16 * 4);
                load(w, b + k * STRIDE + t % 16 * 4);
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++) part[i][j] += x[i] * w[j];
            }
            if (++steps % SHORT == 0) join();
        }
    }
    join();
    // Through shared memory, in which half of the rows have room at a time, so that neighbouring
    // lanes write neighbouring columns.
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
        __syncthreads();
        if (t / (THREADS / 2) == half) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                store(a + (t % (THREADS / 2) / 16 * 4 + i) * STRIDE + t % 16 * 4, sum[i]);
        }
        __syncthreads();
#pragma unroll 1
        for (int i = t; i < SPAN / 2 * SPAN; i += THREADS) {
            int row = row0 + half * (SPAN / 2) + i / SPAN, column = column0 + i % SPAN;
            if (row >= rows || column >= columns) continue;
            int64 at = WHICH == COMPOSED
                           ? (((int64)(group / 8) * outs + row) * coarse + column) * 8 + group % 8
                       : WHICH == OF_CONV ? ((int64)group * outs + row) * inputs + skip + column
                                          : ((int64)group * coarse + row) * up + column;
            y[at] = a[i / SPAN * STRIDE + i % SPAN];
        }
    }
}

#define STAGE_PRODUCT(NAME, WHICH)                                                                 \
    KERNEL(NAME, 256, 3,                                                                           \
           (const float *left, const float *right, float *y, int outs, int coarse, int up,         \
            int inputs),                                                                           \
           products<WHICH>(left, right, y, outs, coarse, up, inputs))
// From conv and deconv: y [phase][outs][coarse][coarse tap].
STAGE_PRODUCT(stage_compose, COMPOSED)
// From dW and deconv: y [27][outs][inputs]; values of the other inputs are left unchanged.
STAGE_PRODUCT(stage_gradient_of_conv, OF_CONV)
// From dW and conv: y [8][coarse][up].
STAGE_PRODUCT(stage_gradient_of_deconv, OF_DECONV)

// The biases of a stage: `inner` [outs] is the bias of a voxel far from the border, from the
// convolution's and the deconvolution's, and `border` [27][outs] is the part of it that is lost
// where taps fall outside, by kind of voxel: first, inner or last along each axis. conv is
// [outs][inputs][27], as the caller passed it. One block per output.
constexpr int PARTS = THREADS / 27;

__device__ __forceinline__ bool outside(int kind, int tap) {
    bool none = true;
#pragma unroll
    for (int axis = 1; axis <= 9; axis *= 3) {
        int k = kind / axis % 3, t = tap / axis % 3;
        none = none && !((k == 0 && t == 0) || (k == 2 && t == 2));
    }
    return !none;
}

KERNEL(stage_biases, 256, 4,
       (const float *conv, const float *deconv_bias, const float *conv_bias, float *inner,
        float *border, int outs, int up, int inputs),
       {
           SHARED_MEMORY(shared);
           double *sums = reinterpret_cast<double *>(shared), *all = sums + PARTS * 27;
           int o = blockIdx.x, t = threadIdx.x, tap = t % 27;
           const float *row = conv + ((int64)o * inputs + inputs - up) * 27;
           if (t < PARTS * 27) {
               double sum = 0.0;
               for (int m = t / 27; m < up; m += PARTS)
                   sum += (double)row[(int64)m * 27 + tap] * deconv_bias[m];
               sums[t] = sum;
           }
           __syncthreads();
           if (t < 27) {
               double sum = 0.0;
               for (int part = 0; part < PARTS; part++) sum += sums[part * 27 + t];
               all[t] = sum;
           }
           __syncthreads();
           if (t < 27) {
               double lost = 0.0;
               for (int i = 0; i < 27; i++) lost += outside(t, i) ? all[i] : 0.0;
               border[(int64)t * outs + o] = (float)-lost;
           }
           if (t == 32) {
               double whole = 0.0;
               for (int i = 0; i < 27; i++) whole += all[i];
               inner[o] = (float)(conv_bias[o] + whole);
           }
       })

// The gradients of the biases, from `kinds` [27][outs], the sums of the skip map's gradient over
// the kinds of voxel. First the gradient that reaches each tap, [outs][27], and that of the
// convolution's bias; one thread per tap of an output.
KERNEL(stage_taps_reached, 256, 4,
       (const float *kinds, double *reached, float *conv_bias, int outs),
       {
           int at = blockIdx.x * blockDim.x + threadIdx.x, o = at / 27, tap = at % 27;
           if (o >= outs) return;
           double sum = 0.0, all = 0.0;
           for (int kind = 0; kind < 27; kind++) {
               double v = kinds[kind * outs + o];
               all += v, sum += outside(kind, tap) ? 0.0 : v;
           }
           reached[at] = sum;
           if (tap == 0) conv_bias[o] = (float)all;
       })

// Then what the deconvolution's bias adds to the gradient of the convolution's weights, y
// [outs][inputs][27], after that of the skip inputs, `skip_part`, which is zero if there is none;
// one thread per value.
KERNEL(stage_biases_to_conv, 256, 4,
       (const double *reached, const float *deconv_bias, const float *skip_part, float *y,
        int64 count, int up, int inputs),
       {
           int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
           if (at >= count) return;
           int tap = at % 27, i = at / 27 % inputs, skip = inputs - up;
           int64 o = at / 27 / inputs;
           if (i >= skip) {
               y[at] = (float)(reached[o * 27 + tap] * deconv_bias[i - skip]);
           } else {
               y[at] = skip_part ? skip_part[(o * skip + i) * 27 + tap] : 0.0f;
           }
       })

// Then the gradient of the deconvolution's bias itself, y [up]; one block per value.
KERNEL(stage_biases_to_deconv, 256, 4,
       (const double *reached, const float *conv, float *y, int outs, int up, int inputs),
       {
           SHARED_MEMORY(shared);
           double *all = reinterpret_cast<double *>(shared);
           int t = threadIdx.x, i = inputs - up + blockIdx.x;
           double sum = 0.0;
           for (int e = t; e < outs * 27; e += THREADS)
               sum += reached[e] * conv[((int64)(e / 27) * inputs + i) * 27 + e % 27];
           all[t] = sum;
           for (int half = THREADS / 2; half > 0; half /= 2) {
               __syncthreads();
               if (t < half) all[t] += all[t + half];
           }
           if (t == 0) y[blockIdx.x] = (float)all[0];
       })
