// Gradients of weights: sums over all voxels of an input's value times an output's gradient.
//
//   convolution, stage   dW[tap][i][o] = sum over v of x[v + tap][i] dy[v][o]. A block has 16 input and 32 output channels and all taps (of a phase), and goes over every
//                        gridDim.x-th tile of 4 x 8 x 8 voxels: the tile of x with its border and that of dy are in shared memory, [voxel][channel]. With tensor
//                        cores warp w has taps w, w + 8, w + 16, w + 24: the product over voxels reads both tiles transposed.
//   dense                dW[n][k] = sum over rows of dy[row][n] x[row][k]. A block has 64 x 64 of it and one of gridDim.z runs of rows.
//
// Blocks that share weights leave partial sums, which are added up in order: the same bits every time.
#include "lib/conv.cuh"

constexpr int IN = 16, SPAN = 64;

// The tile's output gradients for channels n0 to n0 + 32, zero outside the map.
template <int V, int STRIDE, class T, class S> __device__ __forceinline__ void load_gradient(S *to, const ConvShape &s, const ConvBlock &b, const T *dy) {
    int up = s.phases == 8 ? 2 : 1;
    for (int i = threadIdx.x; i < TILE * (OUT / V); i += 256) {
        int v = i / (OUT / V), column = i % (OUT / V) * V;
        int d = b.d0 + v / 64, h = b.h0 + v / 8 % 8, w = b.w0 + v % 8;
        float g[V];
#pragma unroll
        for (int j = 0; j < V; j++) g[j] = 0.0f;
        if (d < s.d && h < s.h && w < s.w && b.n0 + column < s.outs) {
            load(g, dy + b.voxel(s, up, d, h, w) * s.outs + b.n0 + column);
        }
        S *row = to + v * STRIDE + column;
        if constexpr (sizeof(S) == 2) {
            store(row, g);
        } else {
#pragma unroll
            for (int j = 0; j < V; j++) row[j] = g[j];
        }
    }
}

// tensor cores
template <class T, int V, int TAPS>
__device__ __forceinline__ void conv_weight_matrix(unsigned char *shared, const ConvShape &s, int items, const T *x, const float *norm, const T *add,
                                                   const T *dy, float *partial) {
    typedef Halo<TAPS> H;
    constexpr int XS = IN + 8, GS = OUT + 8, MOST = (TAPS + 7) / 8;
    T *halo = reinterpret_cast<T *>(shared), *grad = halo + H::VOXELS * XS;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, across = (s.c + IN - 1) / IN;
    int c0 = blockIdx.y % across * IN, n0 = blockIdx.y / across * OUT, phase = blockIdx.z, tiles = conv_tiles(s);
    float acc[MOST][4][4] = {};
    for (int t = blockIdx.x; t < items * tiles; t += gridDim.x) {
        ConvBlock b(s, t / tiles, t % tiles, n0, phase);
        __syncthreads();
        load_halo<TAPS, false, IN, V, XS, 256>(halo, s, b, x, norm, add, c0);
        load_gradient<V, GS>(grad, s, b, dy);
        __syncthreads();
#pragma unroll 1
        for (int step = 0; step < TILE / 16; step++) {
            unsigned right[2][4];
#pragma unroll
            for (int j = 0; j < 2; j++)
                load_matrices_turned(right[j], grad + (step * 16 + lane / 8 % 2 * 8 + lane % 8) * GS + j * 16 + lane / 16 * 8);
            const T *from = halo + ((step / 4 * H::H + step % 4 * 2 + lane / 16) * H::W + lane % 8) * XS + lane / 8 % 2 * 8;
#pragma unroll
            for (int j = 0; j < MOST; j++) {
                int tap = warp + 8 * j;
                if (tap >= TAPS) break;
                FragmentA left;
                load_matrices_turned(left.r, from + H::tap(tap) * XS);
#pragma unroll
                for (int n = 0; n < 4; n++) multiply<T>(acc[j][n], left, FragmentB{{right[n / 2][n % 2 * 2], right[n / 2][n % 2 * 2 + 1]}});
            }
        }
    }
#pragma unroll
    for (int j = 0; j < MOST; j++) {
        int tap = warp + 8 * j;
        if (tap >= TAPS) break;
        float *to = partial + (((int64)blockIdx.x * s.phases + phase) * TAPS + tap) * s.c * s.outs;
#pragma unroll
        for (int n = 0; n < 4; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int i = c0 + e / 2 * 8 + lane / 4, o = n0 + n * 8 + lane % 4 * 2 + e % 2;
                if (i < s.c && o < s.outs) to[(int64)i * s.outs + o] = acc[j][n][e];
            }
        }
    }
}

// The oracle: a thread has two input channels and one output channel.
template <class T, int V, int TAPS>
__device__ __forceinline__ void conv_weight_plain(unsigned char *shared, const ConvShape &s, int items, const T *x, const float *norm, const T *add,
                                                  const T *dy, float *partial) {
    typedef Halo<TAPS> H;
    constexpr int XS = IN + 1, GS = OUT + 1;
    float *halo = reinterpret_cast<float *>(shared), *grad = halo + H::VOXELS * XS;
    int across = (s.c + IN - 1) / IN, column = threadIdx.x % OUT, row = threadIdx.x / OUT * 2;
    int c0 = blockIdx.y % across * IN, n0 = blockIdx.y / across * OUT, phase = blockIdx.z, tiles = conv_tiles(s);
    float acc[TAPS][2] = {};
    for (int t = blockIdx.x; t < items * tiles; t += gridDim.x) {
        ConvBlock b(s, t / tiles, t % tiles, n0, phase);
        __syncthreads();
        load_halo<TAPS, false, IN, V, XS, 256>(halo, s, b, x, norm, add, c0);
        load_gradient<V, GS>(grad, s, b, dy);
        __syncthreads();
#pragma unroll 1
        for (int v = 0; v < TILE; v++) {
            float g = grad[v * GS + column];
            const float *from = halo + ((v / 64 * H::H + v / 8 % 8) * H::W + v % 8) * XS + row;
#pragma unroll
            for (int tap = 0; tap < TAPS; tap++) {
                acc[tap][0] += from[H::tap(tap) * XS] * g;
                acc[tap][1] += from[H::tap(tap) * XS + 1] * g;
            }
        }
    }
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++) {
        float *to = partial + (((int64)blockIdx.x * s.phases + phase) * TAPS + tap) * s.c * s.outs;
#pragma unroll
        for (int j = 0; j < 2; j++)
            if (c0 + row + j < s.c && n0 + column < s.outs) to[(int64)(c0 + row + j) * s.outs + n0 + column] = acc[tap][j];
    }
}

#define CONV_WEIGHT(NAME, T, BLOCKS, FUNCTION, V, TAPS)                                                                                         \
    KERNEL(weight_gradient_##NAME##TAPS##_##T, 256, BLOCKS,                                                                                     \
           (const T *x, const float *norm, const T *add, const T *dy, float *partial, int items, int d, int h, int w, int c, int outs,          \
            int phases, int pool, float slope),                                                                                                 \
           SHARED_MEMORY(shared); ConvShape s{d, h, w, c, outs, phases, pool, slope, 1, nullptr};            \
           FUNCTION<T, V, TAPS>(shared, s, items, x, norm, add, dy, partial))
CONV_WEIGHT(, f32, 2, conv_weight_plain, 4, 27)
CONV_WEIGHT(, f16, 1, conv_weight_matrix, 8, 27)
CONV_WEIGHT(, bf16, 1, conv_weight_matrix, 8, 27)
CONV_WEIGHT(few_, f32, 2, conv_weight_plain, 1, 27)
CONV_WEIGHT(few_, f16, 1, conv_weight_matrix, 1, 27)
CONV_WEIGHT(few_, bf16, 1, conv_weight_matrix, 1, 27)
CONV_WEIGHT(, f32, 2, conv_weight_plain, 4, 8)
CONV_WEIGHT(, f16, 1, conv_weight_matrix, 8, 8)
CONV_WEIGHT(, bf16, 1, conv_weight_matrix, 8, 8)
CONV_WEIGHT(few_, f32, 2, conv_weight_plain, 1, 8)
CONV_WEIGHT(few_, f16, 1, conv_weight_matrix, 1, 8)
CONV_WEIGHT(few_, bf16, 1, conv_weight_matrix, 1, 8)

// Rows `row0` to `row0 + ROWS` of a matrix, 64 columns from `column0` on, zero beyond `rows` and `columns`.
template <int ROWS, int THREADS, class T> __device__ __forceinline__ void fill_rows(T *to, int stride, const T *from, int row0, int rows, int column0, int columns) {
    constexpr int V = 16 / sizeof(T);
    for (int i = threadIdx.x; i < ROWS * SPAN / V; i += THREADS) {
        int r = i / (SPAN / V), column = i % (SPAN / V) * V;
        float v[V];
#pragma unroll
        for (int j = 0; j < V; j++) v[j] = 0.0f;
        if (row0 + r < rows) {
            const T *at = from + (int64)(row0 + r) * columns + column0 + column;
            if (columns % V == 0 && column0 + column < columns) {
                load(v, at);
            } else {
#pragma unroll
                for (int j = 0; j < V; j++)
                    if (column0 + column + j < columns) v[j] = to_float(at[j]);
            }
        }
        store(to + r * stride + column, v);
    }
}

// Each run has `run` rows. partial [run][n][k], to which they are added where there is more.
// tensor cores
template <class T> __device__ __forceinline__ void dense_weight_matrix(const T *x, const T *dy, float *partial, int m, int n, int k, int run, int more) {
    constexpr int ROWS = 32, STRIDE = SPAN + 8;
    SHARED_MEMORY(shared);
    T *left = reinterpret_cast<T *>(shared), *right = left + ROWS * STRIDE;
    int n0 = blockIdx.x * SPAN, k0 = blockIdx.y * SPAN, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int wn = warp / 2 * 32, wk = warp % 2 * 32, end = min(m, (int)(blockIdx.z + 1) * run);
    float acc[2][4][4] = {};
    for (int row0 = blockIdx.z * run; row0 < end; row0 += ROWS) {
        __syncthreads();
        fill_rows<ROWS, 128>(left, STRIDE, dy, row0, end, n0, n);
        fill_rows<ROWS, 128>(right, STRIDE, x, row0, end, k0, k);
        __syncthreads();
#pragma unroll
        for (int r = 0; r < ROWS; r += 16) {
            FragmentA a[2];
            unsigned b[2][4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                load_matrices_turned(a[i].r, left + (r + lane / 16 * 8 + lane % 8) * STRIDE + wn + i * 16 + lane / 8 % 2 * 8);
                load_matrices_turned(b[i], right + (r + lane / 8 % 2 * 8 + lane % 8) * STRIDE + wk + i * 16 + lane / 16 * 8);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) multiply<T>(acc[i][j], a[i], FragmentB{{b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]}});
            }
        }
    }
    partial += (int64)blockIdx.z * n * k;
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int row = n0 + wn + i * 16 + e / 2 * 8 + lane / 4, column = k0 + wk + j * 8 + lane % 4 * 2 + e % 2;
                float *to = partial + (int64)row * k + column;
                if (row < n && column < k) *to = more ? *to + acc[i][j][e] : acc[i][j][e];
            }
        }
    }
}

__device__ __forceinline__ void dense_weight_plain(const float *x, const float *dy, float *partial, int m, int n, int k, int run, int more) {
    constexpr int ROWS = 16, STRIDE = SPAN + 4;
    SHARED_MEMORY(shared);
    float *left = reinterpret_cast<float *>(shared), *right = left + ROWS * STRIDE;
    int n0 = blockIdx.x * SPAN, k0 = blockIdx.y * SPAN, t = threadIdx.x, end = min(m, (int)(blockIdx.z + 1) * run);
    float acc[4][4] = {};
    for (int row0 = blockIdx.z * run; row0 < end; row0 += ROWS) {
        __syncthreads();
        fill_rows<ROWS, 256>(left, STRIDE, dy, row0, end, n0, n);
        fill_rows<ROWS, 256>(right, STRIDE, x, row0, end, k0, k);
        __syncthreads();
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float a[4], b[4];
            load(a, left + r * STRIDE + t / 16 * 4);
            load(b, right + r * STRIDE + t % 16 * 4);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) acc[i][j] += a[i] * b[j];
        }
    }
    partial += (int64)blockIdx.z * n * k;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int row = n0 + t / 16 * 4 + i, column = k0 + t % 16 * 4 + j;
            float *to = partial + (int64)row * k + column;
            if (row < n && column < k) *to = more ? *to + acc[i][j] : acc[i][j];
        }
    }
}

#define DENSE_WEIGHT(T, THREADS, BLOCKS, FUNCTION)                                                                                  \
    KERNEL(weight_gradient_dense_##T, THREADS, BLOCKS, (const T *x, const T *dy, float *partial, int m, int n, int k, int run,      \
           int more), FUNCTION(x, dy, partial, m, n, k, run, more))
DENSE_WEIGHT(f32, 256, 3, dense_weight_plain)
DENSE_WEIGHT(f16, 128, 5, dense_weight_matrix<f16>)
DENSE_WEIGHT(bf16, 128, 5, dense_weight_matrix<bf16>)

// Every `step`-th of `parts` partial sums from number `part` on, that lie `apart` floats from each other: eight in float, eights in double.
template <int V> __device__ __forceinline__ void add_parts(double (&sum)[V], const float *from, int part, int step, int parts, int64 apart) {
#pragma unroll 1
    for (; part < parts; part += 8 * step) {
        float some[V] = {};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float v[V] = {};
            if (part + i * step < parts) load(v, from + (part + i * step) * apart);
#pragma unroll
            for (int j = 0; j < V; j++) some[j] += v[j];
        }
#pragma unroll
        for (int j = 0; j < V; j++) sum[j] += some[j];
    }
}

// Adds up partial sums [part][each] of a few parts, with `more` on top of what y has; a thread V values.
template <int V> __device__ __forceinline__ void sum_of_parts(const float *partial, float *y, int parts, int64 each, int more) {
    int64 at = ((int64)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (at >= each) return;
    double sum[V] = {};
    add_parts(sum, partial + at, 0, 1, parts, each);
    float v[V] = {};
    if (more) load(v, y + at);
#pragma unroll
    for (int j = 0; j < V; j++) v[j] = (float)(sum[j] + v[j]);
    store(y + at, v);
}

KERNEL(weight_gradient_sum, 256, 4, (const float *partial, float *y, int parts, int64 each, int more),
       if (each % 4 == 0) sum_of_parts<4>(partial, y, parts, each, more); else sum_of_parts<1>(partial, y, parts, each, more))

// Adds up partial sums [part][phase][tap][c][outs] to y [phase][outs][c][tap], with `more` on top of what it has. A block has 32 outputs of an input
// channel and `each` taps of a phase: reads go over outputs, `share` of its 8 warps taking a tap's parts in turns, and writes go over taps. Grid (c * outputs / 32, taps / each, phases).
__device__ __forceinline__ void total(const float *partial, float *y, int parts, int taps, int c, int outs, int each, int share, int more) {
    constexpr int ROW = 33;
    SHARED_MEMORY(shared);
    double *bins = reinterpret_cast<double *>(shared);
    int across = (outs + 31) / 32, i = blockIdx.x / across, o0 = blockIdx.x % across * 32, first = blockIdx.y * each, count = min(each, taps - first);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int64 phase = blockIdx.z, apart = (int64)gridDim.z * taps * c * outs;
#pragma unroll 1
    for (int tap = warp / share; tap < count; tap += 8 / share) {
        double sum[1] = {};
        if (o0 + lane < outs) {
            add_parts(sum, partial + ((phase * taps + first + tap) * c + i) * outs + o0 + lane, warp % share, share, parts, apart);
        }
        bins[(tap * share + warp % share) * ROW + lane] = sum[0];
    }
    __syncthreads();
    for (int at = threadIdx.x; at < count * 32; at += 256) {
        int tap = at % count, o = at / count;
        if (o0 + o >= outs) continue;
        double sum = 0.0;
        for (int k = 0; k < share; k++) sum += bins[(tap * share + k) * ROW + o];
        float *to = y + ((phase * outs + o0 + o) * c + i) * taps + first + tap;
        *to = (float)(more ? sum + *to : sum);
    }
}

KERNEL(weight_gradient_total, 256, 4, (const float *partial, float *y, int parts, int taps, int c, int outs, int each, int share, int more),
       total(partial, y, parts, taps, c, outs, each, share, more))
