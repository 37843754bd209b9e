// The losses of masks and their gradient: x [masks, voxels] are logits of one label, p is a map of
// floats of their probabilities. Sums are formed tile by tile, a block having a tile of 4096
// voxels, and then added up in order.
#include "lib/base.cuh"

constexpr int THREADS = 256, EACH = 16, COLUMNS = 5;

// Adds each thread's numbers over the block; thread 0 has the sums.
template <int N> __device__ __forceinline__ void block_sums(double (&v)[N]) {
    SHARED_MEMORY(shared);
    double *all = reinterpret_cast<double *>(shared);
#pragma unroll
    for (int i = 0; i < N; i++) all[i * THREADS + threadIdx.x] = v[i];
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) {
#pragma unroll
            for (int i = 0; i < N; i++)
                all[i * THREADS + threadIdx.x] += all[i * THREADS + threadIdx.x + half];
        }
    }
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = all[i * THREADS];
}

// Probabilities, and a tile's sums of p g, p^2, p and the cross entropy: the first four of partial
// [mask][tile][5]. Grid (tiles, masks).
template <class T>
__device__ __forceinline__ void probabilities(const T *x, const float *label, float *p,
                                              double *partial, int64 voxels) {
    int64 first = (int64)blockIdx.x * THREADS * EACH + threadIdx.x;
    x += blockIdx.y * voxels, p += blockIdx.y * voxels;
    float both = 0.0f, squares = 0.0f, total = 0.0f, entropy = 0.0f;
    for (int i = 0; i < EACH; i++) {
        int64 at = first + i * THREADS;
        if (at >= voxels) break;
        float logit = to_float(x[at]), g = label[at], e = expf(-fabsf(logit)),
              value = (logit >= 0.0f ? 1.0f : e) / (1.0f + e);
        p[at] = value;
        both += value * g, squares += value * value, total += value;
        entropy += fmaxf(logit, 0.0f) - logit * g + log1pf(e);
    }
    double sums[4] = {both, squares, total, entropy};
    block_sums(sums);
    if (threadIdx.x == 0) {
        partial += ((int64)blockIdx.y * gridDim.x + blockIdx.x) * COLUMNS;
#pragma unroll
        for (int i = 0; i < 4; i++) partial[i] = sums[i];
    }
}

// The mean over 2 reach + 1 neighbours along one axis, zeros beyond the border counted, times their
// number and `scale`: one factor of an average pooling, which is its own transpose. `stride` is
// that of the axis. One thread per value.
__device__ __forceinline__ void window(const float *x, float *y, int64 count, int extent,
                                       int stride, int reach, float scale) {
    int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    int place = at / stride % extent;
    float sum = 0.0f;
    for (int i = max(-reach, -place); i <= min(reach, extent - 1 - place); i++)
        sum += x[at + (int64)i * stride];
    y[at] = scale * sum;
}

// |x - pooled|: the boundary map of one mask.
__device__ __forceinline__ void boundary(const float *x, const float *pooled, float *y,
                                         int64 count) {
    int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < count) y[at] = fabsf(x[at] - pooled[at]);
}

// From `pooled` probabilities to the gradient with respect to p - pooled, in place, times `scale`;
// a tile's sum of squared differences is the last of its five.
__device__ __forceinline__ void slopes(const float *p, const float *target, float *pooled,
                                       double *partial, int64 voxels, float scale) {
    int64 first = (int64)blockIdx.x * THREADS * EACH + threadIdx.x;
    p += blockIdx.y * voxels, pooled += blockIdx.y * voxels;
    float squares = 0.0f;
    for (int i = 0; i < EACH; i++) {
        int64 at = first + i * THREADS;
        if (at >= voxels) break;
        float difference = p[at] - pooled[at], off = fabsf(difference) - target[at];
        squares += off * off;
        pooled[at] = scale * off * (difference > 0.0f ? 1.0f : difference < 0.0f ? -1.0f : 0.0f);
    }
    double sums[1] = {squares};
    block_sums(sums);
    if (threadIdx.x == 0)
        partial[((int64)blockIdx.y * gridDim.x + blockIdx.x) * COLUMNS + 4] = sums[0];
}

// sums [mask][5] of partial [mask][tile][5]; one block per mask.
__device__ __forceinline__ void totals(const double *partial, double *sums, int tiles) {
    double mine[COLUMNS] = {};
    partial += (int64)blockIdx.x * tiles * COLUMNS;
    for (int tile = threadIdx.x; tile < tiles; tile += THREADS)
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) mine[i] += partial[tile * COLUMNS + i];
    block_sums(mine);
    if (threadIdx.x == 0)
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) sums[blockIdx.x * COLUMNS + i] = mine[i];
}

// The gradient of region (Dice with squared denominators + cross entropy) + the boundary loss,
// whose `slopes` and their `pooled` map are given (or none); `label` has `volume` voxels that are
// one. One thread per voxel, grid (.., masks).
template <class T>
__device__ __forceinline__ void gradient(const float *p, const float *label, const float *slopes,
                                         const float *pooled, const double *sums, T *dx,
                                         int64 voxels, double volume, double region, double smooth,
                                         float scale) {
    int64 i = (int64)blockIdx.x * THREADS + threadIdx.x, at = blockIdx.y * voxels + i;
    if (i >= voxels) return;
    sums += blockIdx.y * COLUMNS;
    double below = sums[1] + volume + smooth;
    float a = (float)(-2.0 * region / below),
          b = (float)(2.0 * region * (2.0 * sums[0] + smooth) / (below * below)),
          c = (float)(region / voxels);
    float value = p[at], g = label[i], through = a * g + b * value;
    if (slopes) through += slopes[at] - pooled[at];
    dx[at] = from_float<T>(scale * (through * value * (1.0f - value) + c * (value - g)));
}

// The gradient of the squared differences of scores from their masks' Dice, computed from `sums`:
// one thread per score. No gradient goes through Dice.
template <class T>
__device__ __forceinline__ void score_gradient(const double *sums, const T *scores, T *dx,
                                               int masks, double volume, double smooth,
                                               double factor, float scale) {
    int mask = blockIdx.x * blockDim.x + threadIdx.x;
    if (mask >= masks) return;
    const double *s = sums + (int64)mask * COLUMNS;
    double dice = (2.0 * s[0] + smooth) / (s[2] + volume + smooth);
    dx[mask] = from_float<T>((float)((to_float(scores[mask]) - dice) * factor) * scale);
}

// Where a tile lies in a volume of planes of h x w voxels, and which of some clicks, three floats
// [i, j, k] each, are near its voxels. Coordinates, and squared distances below `far`, are whole
// numbers that floats hold exactly, so it does not matter how products and sums of them are fused.
struct Tile {
    // Its first voxel, its last plane, and its rows: all of a plane, if it has voxels of several.
    int h, w, i, j, k, last_i, least_j, most_j;

    __device__ __forceinline__ Tile(int64 first, int64 last, int h, int w) : h(h), w(w) {
        int64 row = first / w, last_row = last / w;
        i = (int)(row / h), j = (int)(row % h), k = (int)(first % w);
        last_i = (int)(last_row / h);
        least_j = i == last_i ? j : 0, most_j = i == last_i ? (int)(last_row % h) : h - 1;
    }
    // A bit for each of 32 clicks from `from` on: whether the square of its distance from the
    // tile's rows is below `far`. A whole warp asks.
    __device__ __forceinline__ unsigned near(const float *clicks, int count, int from,
                                             int far) const {
        int at = from + (int)threadIdx.x % 32;
        bool within = false;
        if (at < count) {
            float a = clicks[at * 3], b = clicks[at * 3 + 1],
                  di = fmaxf(fmaxf(i - a, a - last_i), 0.0f),
                  dj = fmaxf(fmaxf(least_j - b, b - most_j), 0.0f);
            within = di * di + dj * dj < far;
        }
        return __ballot_sync(0xffffffffu, within);
    }
    // The squared distance from the voxel `ahead` of the first one to the nearest click, `far` at
    // most. A whole warp asks.
    __device__ __forceinline__ float nearest(const float *clicks, int count, int ahead,
                                             int far) const {
        int column = k + ahead, row = j + column / w;
        float own_i = i + row / h, own_j = row % h, own_k = column % w, least = far;
        for (int from = 0; from < count; from += 32) {
            for (unsigned left = near(clicks, count, from, far); left; left &= left - 1) {
                const float *click = clicks + (from + __ffs(left) - 1) * 3;
                float di = own_i - click[0], dj = own_j - click[1], dk = own_k - click[2];
                least = fminf(least, di * di + dj * dj + dk * dk);
            }
        }
        return least;
    }
};

// The cross entropy of each voxel times its weight and `share`: a tile's sum is the first of its
// five, the others are zero. y is `gradient` plus `factor` times the gradient of the sum. `near`
// has the clicks, and behind them a voxel's weight by its squared distance from the nearest: beyond
// the last of `distances` it is zero, and logits and label are not read. Grid (tiles, masks).
template <class T>
__device__ __forceinline__ void emphasis(const T *x, const float *label, const float *near,
                                         const T *gradient, T *y, double *partial, int64 voxels,
                                         int clicks, int distances, int h, int w, float share,
                                         float factor) {
    int64 first = (int64)blockIdx.x * THREADS * EACH, end = first + THREADS * EACH,
          from = blockIdx.y * voxels;
    Tile tile(first, (end < voxels ? end : voxels) - 1, h, w);
    const float *weights = near + clicks * 3;
    unsigned any = 0;
    for (int click = 0; click < clicks; click += 32)
        any |= tile.near(near, clicks, click, distances);
    float sum = 0.0f;
    for (int i = 0; i < EACH; i++) {
        int ahead = i * THREADS + threadIdx.x;
        int64 at = first + ahead;
        // Threads without a voxel take part in this.
        float squared = any ? tile.nearest(near, clicks, ahead, distances) : (float)distances;
        if (at >= voxels) continue;
        float own = 0.0f;
        if (squared < distances) {
            float weight = weights[(int)squared] * share, logit = to_float(x[from + at]),
                  g = label[at], e = expf(-fabsf(logit));
            sum += weight * (log1pf(e) + fmaxf(logit, 0.0f) - logit * g);
            own = weight * factor * ((logit >= 0.0f ? 1.0f : e) / (1.0f + e) - g);
        }
        // Rounded as a separate map of gradients would be before it is added.
        y[from + at] = from_float<T>(to_float(gradient[from + at]) + to_float(from_float<T>(own)));
    }
    double sums[1] = {sum};
    block_sums(sums);
    if (threadIdx.x < COLUMNS)
        partial[((int64)blockIdx.y * gridDim.x + blockIdx.x) * COLUMNS + threadIdx.x] =
            threadIdx.x == 0 ? sums[0] : 0.0;
}

KERNEL(loss_window, 256, 4,
       (const float *x, float *y, int64 count, int extent, int stride, int reach, float scale),
       window(x, y, count, extent, stride, reach, scale))
KERNEL(loss_boundary, 256, 4, (const float *x, const float *pooled, float *y, int64 count),
       boundary(x, pooled, y, count))
KERNEL(loss_slopes, 256, 4,
       (const float *p, const float *target, float *pooled, double *partial, int64 voxels,
        float scale),
       slopes(p, target, pooled, partial, voxels, scale))
KERNEL(loss_totals, 256, 4, (const double *partial, double *sums, int tiles),
       totals(partial, sums, tiles))

#define SCORES(T)                                                                                  \
    KERNEL(loss_scores_##T, 32, 4,                                                                 \
           (const double *sums, const T *scores, T *dx, int masks, double volume, double smooth,   \
            double factor, float scale),                                                           \
           score_gradient(sums, scores, dx, masks, volume, smooth, factor, scale))                 \
    KERNEL(loss_emphasis_##T, 256, 4,                                                              \
           (const T *x, const float *label, const float *near, const T *gradient, T *y,            \
            double *partial, int64 voxels, int clicks, int distances, int h, int w, float share,   \
            float factor),                                                                         \
           emphasis(x, label, near, gradient, y, partial, voxels, clicks, distances, h, w, share,  \
                    factor))
SCORES(f32)
SCORES(f16)
SCORES(bf16)

#define LOSS(T)                                                                                    \
    KERNEL(loss_probabilities_##T, 256, 4,                                                         \
           (const T *x, const float *label, float *p, double *partial, int64 voxels),              \
           probabilities(x, label, p, partial, voxels))                                            \
    KERNEL(loss_gradient_##T, 256, 4,                                                              \
           (const float *p, const float *label, const float *slopes, const float *pooled,          \
            const double *sums, T *dx, int64 voxels, double volume, double region, double smooth,  \
            float scale),                                                                          \
           gradient(p, label, slopes, pooled, sums, dx, voxels, volume, region, smooth, scale))
LOSS(f32)
LOSS(f16)
LOSS(bf16)
