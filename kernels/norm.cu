// Norms: the sums and coefficients of instance norms, their application if a map must be written
// out, layer norm over channels; and their gradients.
#include "lib/sums.cuh"

// Sums of map [n, rows, c] by tiles of 256 rows: partial [n][tiles][c][value, square]. Grid (tiles,
// n). One thread per channel at a time.
template <class T>
__device__ __forceinline__ void sums(const T *x, double *partial, int rows, int c) {
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

// Sums over the rows of x [n, rows, c], which is all that the gradient of a bias is. Summing each
// value in double is for norms only, whose variance is a difference.
template <int V, class T>
__device__ __forceinline__ void totals_of(const T *x, const Totals &to, int rows, int c, int run,
                                          int lanes) {
    int column = own_group(lanes) * V;
    x += (int64)blockIdx.y * rows * c + column;
    column_sums<1, V, 8>(
        rows, run, lanes, column < c,
        [&](int row, float (&some)[1][V]) {
            float v[V];
            load(v, x + (int64)row * c);
#pragma unroll
            for (int j = 0; j < V; j++) some[0][j] += v[j];
        },
        [&](int group, int j, const double (&all)[1]) {
            if (group * V + j < c) to.put(group * V + j, c, all[0], 0.0);
        });
}

// Adds up partial sums [n][tiles][c][2] of channel `blockIdx.x % c` of item `blockIdx.x / c` over a
// block of up to 512 threads; thread 0 has the two totals.
__device__ __forceinline__ void total(const double *partial, int tiles, int c, double &first,
                                      double &second) {
    SHARED_MEMORY(shared);
    double *bins = reinterpret_cast<double *>(shared);
    int channel = blockIdx.x % c, item = blockIdx.x / c, warp = threadIdx.x / 32;
    const AlignedVector<double, 2> *from =
        reinterpret_cast<const AlignedVector<double, 2> *>(partial) + (int64)item * tiles * c +
        channel;
    first = 0, second = 0;
    // Eight loads in flight at a time.
    for (int tile = threadIdx.x; tile < tiles; tile += 8 * blockDim.x) {
        AlignedVector<double, 2> p[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int at = tile + i * blockDim.x;
            p[i] = at < tiles ? load_vector(from + (int64)at * c)
                              : AlignedVector<double, 2>{{0.0, 0.0}};
        }
#pragma unroll
        for (int i = 0; i < 8; i++) first += p[i].v[0], second += p[i].v[1];
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1)
        first += __shfl_xor_sync(0xffffffffu, first, o),
            second += __shfl_xor_sync(0xffffffffu, second, o);
    if (threadIdx.x % 32 == 0) bins[warp * 2] = first, bins[warp * 2 + 1] = second;
    __syncthreads();
    if (threadIdx.x) return;
    for (int i = 1; i < (int)blockDim.x / 32; i++) first += bins[i * 2], second += bins[i * 2 + 1];
}

// From partial sums [n][tiles][c][2] to coefficients [n][c][mean, scale, shift] and, for the
// gradient, [n][c][inverse deviation, what rounding the mean adds to the standardised value]. One
// block per channel of an item.
__device__ __forceinline__ void coefficients(const double *partial, const float *weight,
                                             const float *bias, float *norm, float *deviations,
                                             int tiles, int c, double count, double eps) {
    double sum, squares;
    total(partial, tiles, c, sum, squares);
    if (threadIdx.x) return;
    int channel = blockIdx.x % c;
    double mean = sum / count, variance = squares / count - mean * mean;
    double deviation = 1.0 / sqrt((variance > 0.0 ? variance : 0.0) + eps),
           scale = weight[channel] * deviation;
    // What rounding the mean leaves out goes into the shift.
    float near = (float)mean;
    norm[blockIdx.x * 3] = near, norm[blockIdx.x * 3 + 1] = (float)scale,
        norm[blockIdx.x * 3 + 2] = (float)(bias[channel] - (mean - near) * scale);
    deviations[blockIdx.x * 2] = (float)deviation,
        deviations[blockIdx.x * 2 + 1] = (float)((near - mean) * deviation);
}

KERNEL(norm_coefficients, 512, 2,
       (const double *partial, const float *weight, const float *bias, float *norm,
        float *deviations, int tiles, int c, double count, double eps),
       coefficients(partial, weight, bias, norm, deviations, tiles, c, count, eps))

// The first of V values of [n, rows, c] that this thread computes, and its channel's number in
// [n, c]; false after the last. `count` is the number of values of an item, and blockIdx.y the
// item: numbers within an item have 32 bits, because divisions of 64 bits would take most of the
// time.
template <int V> __device__ __forceinline__ bool mine(int64 &at, int64 &channel, int count, int c) {
    unsigned number = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (number >= (unsigned)count) return false;
    at = (int64)blockIdx.y * count + number;
    channel = (int64)blockIdx.y * c + number % (unsigned)c;
    return true;
}

// y = norm(x) + add, V values of [n, rows, c] per thread.
template <int V, class T>
__device__ __forceinline__ void apply(const T *x, const float *norm, const T *add, T *y, int count,
                                      int c, float slope) {
    int64 at, channel;
    if (!mine<V>(at, channel, count, c)) return;
    float v[V], more[V] = {};
    load(v, x + at);
    if (add) load(more, add + at);
    norm += channel * 3;
#pragma unroll
    for (int i = 0; i < V; i++) v[i] = normed(v[i], norm + i * 3, slope) + more[i];
    store(y + at, v);
}

// Layer norm of rows of c values, followed by GELU if asked; `group` threads of a warp share a row,
// each with some multiple of V values in registers. With `w` > 0 the rows are those of a transposed
// convolution of stride 2: row r of y is a fine voxel of [n, 2d, 2h, 2w], and x holds, per coarse
// voxel, its 8 phases one after the other. Without a weight, rows are only moved.
template <int V, class T>
__device__ __forceinline__ void layer_norm(const T *x, const float *weight, const float *bias, T *y,
                                           int64 rows, int c, float eps, int gelu_behind, int d,
                                           int h, int w, int group) {
    constexpr int MOST = V == 1 ? 32 : 32 / V;
    int64 row = ((int64)blockIdx.x * 128 + threadIdx.x) / group;
    bool live = row < rows;
    if (!live) row = rows - 1;
    int64 source = row;
    if (w > 0) {
        int k = row % (2 * w), j = row / (2 * w) % (2 * h);
        int64 i = row / (4 * w * h) % (2 * d), item = row / (8 * w * h * d);
        source =
            (((item * d + i / 2) * h + j / 2) * w + k / 2) * 8 + (i % 2 * 2 + j % 2) * 2 + k % 2;
    }
    int lane = threadIdx.x % group;
    x += source * c, y += row * c;
    float v[MOST][V], mean = 0.0f, scale = 1.0f;
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        int at = (lane + i * group) * V;
#pragma unroll
        for (int j = 0; j < V; j++) v[i][j] = 0.0f;
        if (at < c) load(v[i], x + at);
    }
    auto sum = [&](float s) {
        for (int o = group / 2; o > 0; o >>= 1) s += __shfl_xor_sync(0xffffffffu, s, o);
        return s;
    };
    if (weight) {
#pragma unroll
        for (int i = 0; i < MOST * V; i++) mean += v[i / V][i % V];
        mean = sum(mean) / c;
        float variance = 0.0f;
#pragma unroll
        for (int i = 0; i < MOST * V; i++) {
            if ((lane + i / V * group) * V < c)
                variance += (v[i / V][i % V] - mean) * (v[i / V][i % V] - mean);
        }
        scale = 1.0f / sqrtf(sum(variance) / c + eps);
    }
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        int at = (lane + i * group) * V;
        if (at >= c || !live) continue;
        if (weight) {
            float a[V], b[V];
            load(a, weight + at), load(b, bias + at);
#pragma unroll
            for (int j = 0; j < V; j++) v[i][j] = (v[i][j] - mean) * scale * a[j] + b[j];
        }
        if (gelu_behind) {
#pragma unroll
            for (int j = 0; j < V; j++) v[i][j] = gelu(v[i][j]);
        }
        store(y + at, v[i]);
    }
}

// The gradient before the leaky ReLU, and the standardised value: `norm` [mean, scale, shift],
// `deviation` [inverse deviation, offset] of a channel.
__device__ __forceinline__ float before_activation(float x, float dy, const float *norm,
                                                   const float *deviation, float slope,
                                                   float &standard) {
    standard = (x - norm[0]) * deviation[0] + deviation[1];
    return (x - norm[0]) * norm[1] + norm[2] >= 0.0f ? dy : dy * slope;
}

// Instance norm's gradient: sums of dz and of dz times the standardised value. In the loop the
// latter is dz times the distance from the mean.
template <int V, class T>
__device__ __forceinline__ void gradient_sums(const T *x, const T *dy, const float *norm,
                                              const float *deviations, const Totals &to, int rows,
                                              int c, int run, int lanes, float slope) {
    int column = own_group(lanes) * V;
    int64 from = (int64)blockIdx.y * rows * c + column;
    x += from, dy += from, norm += (int64)blockIdx.y * c * 3,
        deviations += (int64)blockIdx.y * c * 2;
    float n[3 * V] = {};
    if (column < c) {
#pragma unroll
        for (int j = 0; j < 3 * V; j++) n[j] = norm[column * 3 + j];
    }
    column_sums<2, V, 4>(
        rows, run, lanes, column < c,
        [&](int row, float (&some)[2][V]) {
            float v[V], g[V];
            load(v, x + (int64)row * c), load(g, dy + (int64)row * c);
#pragma unroll
            for (int j = 0; j < V; j++) {
                float centred = v[j] - n[3 * j],
                      dz = centred * n[3 * j + 1] + n[3 * j + 2] >= 0.0f ? g[j] : g[j] * slope;
                some[0][j] += dz, some[1][j] += dz * centred;
            }
        },
        [&](int group, int j, const double (&all)[2]) {
            int i = group * V + j;
            if (i < c)
                to.put(i, c, all[0], all[1] * deviations[i * 2] + all[0] * deviations[i * 2 + 1]);
        });
}

// dx = scale (dz - mean dz - standard mean(dz standard)), V values per thread; the means are given
// as sums [n][c] and 1 / rows.
template <int V, class T>
__device__ __forceinline__ void gradient_apply(const T *x, const T *dy, const float *norm,
                                               const float *deviations, const float *first,
                                               const float *second, T *dx, int count, int c,
                                               float share, float slope) {
    int64 at, channel;
    if (!mine<V>(at, channel, count, c)) return;
    norm += channel * 3, deviations += channel * 2, first += channel, second += channel;
    float v[V], g[V];
    load(v, x + at), load(g, dy + at);
#pragma unroll
    for (int j = 0; j < V; j++) {
        float standard,
            dz = before_activation(v[j], g[j], norm + j * 3, deviations + j * 2, slope, standard);
        v[j] = norm[j * 3 + 1] * (dz - first[j] * share - standard * (second[j] * share));
    }
    store(dx + at, v);
}

// Adds up partial [n][tiles][c][2]: a [n][c] from the first (with `more`, added to what it has), b
// [n][c] from the second. One block per channel of an item.
__device__ __forceinline__ void totals(const double *partial, float *a, float *b, int tiles, int c,
                                       int more) {
    double first, second;
    total(partial, tiles, c, first, second);
    if (threadIdx.x) return;
    a[blockIdx.x] = (float)(more ? first + a[blockIdx.x] : first), b[blockIdx.x] = (float)second;
}

KERNEL(norm_totals, 512, 2, (const double *partial, float *a, float *b, int tiles, int c, int more),
       totals(partial, a, b, tiles, c, more))

// Layer norm's gradient, with `group` threads of a warp per row and V values of it at a time, which
// are read again from the nearest cache rather than kept; writes each row's [mean, inverse
// deviation] to `rows_are`. The result is added to the gradient so far if that is given.
template <int V, class T>
__device__ __forceinline__ void layer_gradient(const T *x, const T *dy, const float *weight,
                                               const float *bias, const T *so_far, T *dx,
                                               float *rows_are, int64 rows, int c, float eps,
                                               int gelu_behind, int group) {
    int64 row = ((int64)blockIdx.x * 256 + threadIdx.x) / group;
    bool live = row < rows;
    if (!live) row = rows - 1;
    int lane = threadIdx.x % group, from = lane * V, step = group * V;
    x += row * c, dy += row * c, dx += row * c, so_far = so_far ? so_far + row * c : so_far;
    auto sum = [&](float s) {
        for (int o = group / 2; o > 0; o >>= 1) s += __shfl_xor_sync(0xffffffffu, s, o);
        return s;
    };
    float mean = 0.0f, variance = 0.0f, first = 0.0f, second = 0.0f;
    for (int i = from; i < c; i += step) {
        float v[V];
        load(v, x + i);
#pragma unroll
        for (int j = 0; j < V; j++) mean += v[j];
    }
    mean = sum(mean) / c;
    for (int i = from; i < c; i += step) {
        float v[V];
        load(v, x + i);
#pragma unroll
        for (int j = 0; j < V; j++) variance += (v[j] - mean) * (v[j] - mean);
    }
    float deviation = 1.0f / sqrtf(sum(variance) / c + eps);
    // Standardised values and their gradients.
    auto both = [&](int i, float (&v)[V], float (&g)[V]) {
        float a[V], b[V];
        load(v, x + i), load(g, dy + i), load(a, weight + i);
        if (gelu_behind) load(b, bias + i);
#pragma unroll
        for (int j = 0; j < V; j++) {
            v[j] = (v[j] - mean) * deviation;
            g[j] = (gelu_behind ? g[j] * gelu_slope(v[j] * a[j] + b[j]) : g[j]) * a[j];
        }
    };
    for (int i = from; i < c; i += step) {
        float v[V], g[V];
        both(i, v, g);
#pragma unroll
        for (int j = 0; j < V; j++) first += g[j], second += g[j] * v[j];
    }
    first = sum(first) / c, second = sum(second) / c;
    if (!live) return;
    for (int i = from; i < c; i += step) {
        float v[V], g[V];
        both(i, v, g);
#pragma unroll
        for (int j = 0; j < V; j++) g[j] = deviation * (g[j] - first - v[j] * second);
        if (so_far) {
            load(v, so_far + i);
#pragma unroll
            for (int j = 0; j < V; j++) g[j] += v[j];
        }
        store(dx + i, g);
    }
    if (lane == 0) rows_are[row * 2] = mean, rows_are[row * 2 + 1] = deviation;
}

// Sums over rows for the gradients of layer norm's bias and weight.
template <int V, class T>
__device__ __forceinline__ void layer_sums(const T *x, const T *dy, const float *weight,
                                           const float *bias, const float *rows_are,
                                           const Totals &to, int rows, int c, int run, int lanes,
                                           int gelu_behind) {
    int column = own_group(lanes) * V;
    x += column, dy += column;
    float a[V] = {}, b[V] = {};
    if (gelu_behind && column < c) load(a, weight + column), load(b, bias + column);
    column_sums<2, V, 4>(
        rows, run, lanes, column < c,
        [&](int row, float (&some)[2][V]) {
            float v[V], g[V], mean = rows_are[(int64)row * 2],
                  deviation = rows_are[(int64)row * 2 + 1];
            load(v, x + (int64)row * c), load(g, dy + (int64)row * c);
#pragma unroll
            for (int j = 0; j < V; j++) {
                float standard = (v[j] - mean) * deviation;
                if (gelu_behind) g[j] *= gelu_slope(standard * a[j] + b[j]);
                some[0][j] += g[j], some[1][j] += g[j] * standard;
            }
        },
        [&](int group, int j, const double (&all)[2]) {
            if (group * V + j < c) to.put(group * V + j, c, all[0], all[1]);
        });
}

// Undoes how layer_norm placed the rows of a transposed convolution: `rows` has, per coarse voxel,
// its 8 phases one after the other; V values of a phase per thread. `count` is the number of values
// of each map, which fits 32 bits, and blockIdx.y the map.
template <int V, class T>
__device__ __forceinline__ void split_phases(const T *fine, T *rows, int count, int d, int h, int w,
                                             int c) {
    unsigned number = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (number >= (unsigned)count) return;
    unsigned row = number / (unsigned)c, phase = row % 8, voxel = row / 8,
             line = voxel / (unsigned)w, i = line / (unsigned)h;
    unsigned channel = number - row * c, k = voxel - line * w, j = line - i * h;
    int64 plane = (int64)blockIdx.y * 2 * d + 2 * i + (phase >> 2);
    int64 from = (plane * 2 * h + 2 * j + (phase >> 1 & 1)) * 2 * w + 2 * k + (phase & 1);
    *reinterpret_cast<RawVector<T, V> *>(rows + (int64)blockIdx.y * count + number) =
        load_raw<V>(fine + from * c + channel);
}

#define NORM(T)                                                                                    \
    KERNEL(norm_sums_##T, 256, 4, (const T *x, double *partial, int rows, int c),                  \
           sums(x, partial, rows, c))                                                              \
    KERNEL(norm_apply_##T, 256, 4,                                                                 \
           (const T *x, const float *norm, const T *add, T *y, int count, int c, float slope),     \
           apply<1>(x, norm, add, y, count, c, slope))                                             \
    KERNEL(norm_apply_wide_##T, 256, 4,                                                            \
           (const T *x, const float *norm, const T *add, T *y, int count, int c, float slope),     \
           apply<16 / (int)sizeof(T)>(x, norm, add, y, count, c, slope))                           \
    KERNEL(layer_norm_##T, 128, 4,                                                                 \
           (const T *x, const float *weight, const float *bias, T *y, int64 rows, int c,           \
            float eps, int gelu_behind, int d, int h, int w, int group),                           \
           layer_norm<1>(x, weight, bias, y, rows, c, eps, gelu_behind, d, h, w, group))           \
    KERNEL(layer_norm_wide_##T, 128, 4,                                                            \
           (const T *x, const float *weight, const float *bias, T *y, int64 rows, int c,           \
            float eps, int gelu_behind, int d, int h, int w, int group),                           \
           layer_norm<16 / (int)sizeof(T)>(x, weight, bias, y, rows, c, eps, gelu_behind, d, h, w, \
                                           group))                                                 \
    KERNEL(column_sums_##T, 256, 3,                                                                \
           (const T *x, double *partial, float *first, int rows, int c, int run, int lanes,        \
            int more),                                                                             \
           Totals to{partial, first, nullptr, more};                                               \
           if (c % COLUMNS_EACH == 0) totals_of<COLUMNS_EACH>(x, to, rows, c, run, lanes);         \
           else totals_of<1>(x, to, rows, c, run, lanes))                                          \
    KERNEL(norm_gradient_sums_##T, 256, 3,                                                         \
           (const T *x, const T *dy, const float *norm, const float *deviations, double *partial,  \
            float *first, float *second, int rows, int c, int run, int lanes, float slope),        \
           Totals to{partial, first, second, 0};                                                   \
           if (c % COLUMNS_EACH == 0)                                                              \
               gradient_sums<COLUMNS_EACH>(x, dy, norm, deviations, to, rows, c, run, lanes,       \
                                           slope);                                                 \
           else gradient_sums<1>(x, dy, norm, deviations, to, rows, c, run, lanes, slope))         \
    KERNEL(norm_gradient_apply_##T, 256, 4,                                                        \
           (const T *x, const T *dy, const float *norm, const float *deviations,                   \
            const float *first, const float *second, T *dx, int count, int c, float share,         \
            float slope),                                                                          \
           gradient_apply<1>(x, dy, norm, deviations, first, second, dx, count, c, share, slope))  \
    KERNEL(norm_gradient_apply_wide_##T, 256, 3,                                                   \
           (const T *x, const T *dy, const float *norm, const float *deviations,                   \
            const float *first, const float *second, T *dx, int count, int c, float share,         \
            float slope),                                                                          \
           gradient_apply<16 / (int)sizeof(T)>(x, dy, norm, deviations, first, second, dx, count,  \
                                               c, share, slope))                                   \
    KERNEL(layer_norm_gradient_##T, 256, 3,                                                        \
           (const T *x, const T *dy, const float *weight, const float *bias, const T *so_far,      \
            T *dx, float *rows_are, int64 rows, int c, float eps, int gelu_behind, int group),     \
           if (c % (16 / (int)sizeof(T)) == 0)                                                     \
               layer_gradient<16 / (int)sizeof(T)>(x, dy, weight, bias, so_far, dx, rows_are,      \
                                                   rows, c, eps, gelu_behind, group);              \
           else                                                                                    \
               layer_gradient<1>(x, dy, weight, bias, so_far, dx, rows_are, rows, c, eps,          \
                                 gelu_behind, group))                                              \
    KERNEL(layer_norm_sums_##T, 256, 3,                                                            \
           (const T *x, const T *dy, const float *weight, const float *bias,                       \
            const float *rows_are, double *partial, float *first, float *second, int rows, int c,  \
            int run, int lanes, int gelu_behind),                                                  \
           Totals to{partial, first, second, 0};                                                   \
           if (c % COLUMNS_EACH == 0)                                                              \
               layer_sums<COLUMNS_EACH>(x, dy, weight, bias, rows_are, to, rows, c, run, lanes,    \
                                        gelu_behind);                                              \
           else                                                                                    \
               layer_sums<1>(x, dy, weight, bias, rows_are, to, rows, c, run, lanes, gelu_behind)) \
    KERNEL(norm_split_phases_##T, 256, 4,                                                          \
           (const T *fine, T *rows, int count, int d, int h, int w, int c),                        \
           if (c % (16 / (int)sizeof(T)) == 0)                                                     \
               split_phases<16 / (int)sizeof(T)>(fine, rows, count, d, h, w, c);                   \
           else split_phases<1>(fine, rows, count, d, h, w, c))
NORM(f32)
NORM(f16)
NORM(bf16)
