// Gradients of weights: sums over all voxels of an input's value times an output's gradient.
//
//   convolution, stage   dW[tap][i][o] = sum over v of x[v + tap][i] dy[v][o], all taps (of a
//                        phase) in a block.
//              matrix    32 input and 32 output channels. The block goes along d through columns of
//                        8 x 8 voxels, a plane at a time: 8 x 8 voxels of x, and those of dy that
//                        any tap reaches from them (10 x 10, in a stage 9 x 9), [voxel][channel],
//                        come through four buffers filled by asynchronous copies; x is normed once,
//                        in place. A warp has the taps of one position along w, for 16 of the
//                        inputs and 16 of the outputs. It keeps fragments of as many planes of x as
//                        there are taps along d in registers from step to step; a fragment of rows
//                        h and h + 4 of dy, read transposed, serves all taps along d and h. So a
//                        step of 72 multiplications takes 10 loads from shared memory.
//              plain     16 input and 32 output channels, over every gridDim.x-th tile of 4 x 8 x 8
//                        voxels
//   dense                dW[n][k] = sum over rows of dy[row][n] x[row][k]. A block has 64 x 64 of
//                        it, or 128 x 64, and one of gridDim.z runs of rows, 32 rows per step
//                        through four buffers.
//
// Blocks that share weights write partial sums, which are added up in order: the same bits every
// time.
#include "lib/conv.cuh"

constexpr int IN = 16, SPAN = 64;

// The tile's output gradients for channels n0 to n0 + 32, zero outside the map.
template <int V, int STRIDE, class T>
__device__ __forceinline__ void load_gradient(float *to, const ConvShape &s, const ConvBlock &b,
                                              const T *dy) {
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
#pragma unroll
        for (int j = 0; j < V; j++) to[v * STRIDE + column + j] = g[j];
    }
}

// The layout of a convolution's columns for tensor cores, with EDGE taps along each axis; the
// launching side knows the numbers too.
template <int EDGE> struct Ring {
    // Threads, the edge of a plane of dy, the elements in shared memory of a voxel (such that rows
    // of matrices fall on different banks), of a plane of x and of one of dy; buffers.
    static constexpr int THREADS = 128 * EDGE, AROUND = 8 + EDGE - 1, ROW = OUT + 8, X = 64 * ROW,
                         DY = AROUND * AROUND * ROW, STAGES = 4;
};

// Eight channels of a voxel, or if V is 1 the `left` that remain, and zeros.
template <int V, class T>
__device__ __forceinline__ RawVector<T, 8> load_channels(const T *from, int left) {
    if constexpr (V == 8) {
        return load_raw<8>(from);
    } else {
        RawVector<T, 8> raw = {};
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < left) raw.words.v[i / 2] |= (unsigned)from[i].bits << i % 2 * 16;
        return raw;
    }
}

// The convolution's prologue for 8 channels from `channel` on.
template <int V, class T>
__device__ __forceinline__ Prologue<T> prologue_of(const ConvShape &s, const float *norm, bool adds,
                                                   int item, int channel) {
    const float *from = norm && channel < s.c ? norm + ((int64)item * s.c + channel) * 3 : nullptr;
    if constexpr (V == 8) {
        return Prologue<T>(from, adds, s.slope);
    } else {
        Prologue<T> prologue(nullptr, adds, s.slope);
        prologue.norms = from != nullptr;
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (from && channel + i < s.c)
                prologue.scale[i] = from[3 * i + 1],
                    prologue.shift[i] = fmaf(-from[3 * i], from[3 * i + 1], from[3 * i + 2]);
        return prologue;
    }
}

// tensor cores
template <class T, int V, int TAPS, bool GATHERS>
__device__ __forceinline__ void conv_weight_matrix(unsigned char *shared, const ConvShape &s,
                                                   int items, const T *x, const float *norm,
                                                   const T *add, const T *dy, float *partial) {
    constexpr int EDGE = TAPS == 27 ? 3 : 2;
    typedef Ring<EDGE> R;
    constexpr int ROW = R::ROW, AROUND = R::AROUND, STAGES = R::STAGES, ALL = AROUND * AROUND * 4,
                  EACH = (ALL + R::THREADS - 1) / R::THREADS;
    T *ring = reinterpret_cast<T *>(shared);
    int across = (s.c + OUT - 1) / OUT, c0 = blockIdx.y % across * OUT,
        n0 = blockIdx.y / across * OUT, phase = blockIdx.z;
    int up = s.phases == 8 ? 2 : 1, fine = s.pool ? 2 : 1;
    bool adds = add != nullptr;
    // In a buffer, the map that is added to x comes after it, then dy.
    int behind = adds ? 2 * R::X : R::X, stage = behind + R::DY;
    // Each scheduler's warps have different quarters of the channels.
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quarter = (warp + warp / 4) % 4,
        wi = quarter % 2 * 16, wo = quarter / 2 * 16, kw = warp / 4;
    bool active = c0 + wi < s.c && n0 + wo < s.outs;
    // A lane's row of four matrices: voxels of rows h and h + 4 by 16 channels.
    const T *left = ring + (lane / 16 * 4 * 8 + lane % 8) * ROW + wi + lane / 8 % 2 * 8;
    const T *right = ring + behind + (lane / 8 % 2 * 4 * AROUND + lane % 8 + EDGE - 1 - kw) * ROW +
                     wo + lane / 16 * 8;
    float acc[EDGE][EDGE][2][4] = {};

    // Columns are cut into as many runs of planes of dy as give each block one.
    int flat = ((s.h + 7) / 8) * ((s.w + 7) / 8), columns = items * flat;
    int run = (s.d + ((int)gridDim.x + columns - 1) / columns - 1) /
              (((int)gridDim.x + columns - 1) / columns),
        parts = (s.d + run - 1) / run;
#pragma unroll 1
    for (int at = blockIdx.x; at < columns * parts; at += gridDim.x) {
        int first = at % parts * run, steps = min(run, s.d - first) + EDGE - 1,
            item = at / parts / flat;
        ConvBlock b(s, item, at / parts % flat, n0, phase);
        // A step loads a plane of x, and the plane of dy for which that is the last plane of x: the
        // first steps have none.
        int plane = first - 1 + (EDGE == 2 ? phase >> 2 : 0), dy_plane = first - (EDGE - 1);
        // The first 256 threads load 8 channels of a voxel of x each, all threads load those of dy.
        // They compute the addresses each time, which costs less than keeping them.
        auto loads_x = [&](int step, int thread) {
            return thread < 256 && b.h0 + thread / 32 < s.h && b.w0 + thread / 4 % 8 < s.w &&
                   c0 + thread % 4 * 8 < s.c && (unsigned)(plane + step) < (unsigned)s.d;
        };
        // Starts a step's copies.
        auto start = [&](int step, int slot) {
            if (step < steps) {
                int thread = own_thread();
                T *to = ring + slot * stage;
                if (thread < 256) {
                    T *own = to + thread / 4 * ROW + thread % 4 * 8;
                    int channel = c0 + thread % 4 * 8,
                        voxel = (((plane + step) * fine * s.h + b.h0 + thread / 32) * fine * s.w +
                                 b.w0 + thread / 4 % 8) * fine;
                    bool inside = loads_x(step, thread);
                    int64 from =
                        inside
                            ? ((int64)item * (s.d * s.h * s.w * fine * fine * fine) + voxel) * s.c +
                                  channel
                            : 0;
                    if constexpr (!GATHERS) {
                        copy_async(own, x + from, inside);
                        if (adds) copy_async(own + R::X, add + from, inside);
                    } else {
                        RawVector<T, 8> most = {};
                        if (inside) {
                            Prologue<T> prologue = prologue_of<V, T>(s, norm, adds, item, channel);
#pragma unroll 1
                            for (int p = 0; p < (s.pool ? 8 : 1); p++) {
                                int64 at =
                                    from + (int64)(((p >> 2) * 2 * s.h + (p >> 1 & 1)) * 2 * s.w +
                                                   (p & 1)) * s.c;
                                RawVector<T, 8> value = load_channels<V>(x + at, s.c - channel),
                                                more = value;
                                if (adds) more = load_channels<V>(add + at, s.c - channel);
                                value = prologue.of(value, more);
#pragma unroll
                                for (int j = 0; j < 4; j++)
                                    most.words.v[j] =
                                        p ? pair_max<T>(most.words.v[j], value.words.v[j])
                                          : value.words.v[j];
                            }
                        }
                        *reinterpret_cast<RawVector<T, 8> *>(own) = most;
                    }
                }
                if (step >= EDGE - 1) {
#pragma unroll
                    for (int i = 0; i < EACH; i++) {
                        int cell = (thread + R::THREADS - 256) % R::THREADS + i * R::THREADS,
                            o = n0 + cell % 4 * 8;
                        int h = b.h0 + cell / 4 / AROUND - (EDGE == 2 ? phase >> 1 & 1 : 1),
                            w = b.w0 + cell / 4 % AROUND - (EDGE == 2 ? phase & 1 : 1);
                        if (cell >= ALL) continue;
                        bool inside = (unsigned)h < (unsigned)s.h && (unsigned)w < (unsigned)s.w &&
                                      o < s.outs;
                        int voxel = ((up * (dy_plane + step) + (phase >> 2)) * up * s.h +
                                     up * h + (phase >> 1 & 1)) * up * s.w +
                                    up * w + (phase & 1);
                        const T *from =
                            dy +
                            (inside
                                 ? ((int64)item * (s.d * s.h * s.w * s.phases) + voxel) * s.outs + o
                                 : 0);
                        T *there = to + behind + cell / 4 * ROW + cell % 4 * 8;
                        if constexpr (V == 8) {
                            copy_async(there, from, inside);
                        } else {
                            RawVector<T, 8> value = {};
                            if (inside) value = load_channels<V>(from, s.outs - o);
                            *reinterpret_cast<RawVector<T, 8> *>(there) = value;
                        }
                    }
                }
            }
            copy_commit();
        };
        // Computes the prologue of the values that the thread loaded, in place.
        auto apply_prologue = [&](int step, int slot) {
            int thread = own_thread();
            if (!GATHERS && (norm || adds) && loads_x(step, thread)) {
                Prologue<T> prologue = prologue_of<8, T>(s, norm, adds, item, c0 + thread % 4 * 8);
                T *own = ring + slot * stage + thread / 4 * ROW + thread % 4 * 8;
                RawVector<T, 8> value = load_raw<8>(own), more = value;
                if (adds) more = load_raw<8>(own + R::X);
                *reinterpret_cast<RawVector<T, 8> *>(own) = prologue.of(value, more);
            }
        };
        FragmentA a[EDGE][4];
        auto load_x = [&](FragmentA (&to)[4], int slot) {
#pragma unroll
            for (int h = 0; h < 4; h++)
                load_matrices_transposed(to[h].r, left + slot * stage, h * 8 * ROW * 2);
        };
        __syncthreads();
#pragma unroll 1
        for (int i = 0; i < STAGES - 1; i++) start(i, i);
        copy_wait<STAGES - EDGE>();
#pragma unroll 1
        for (int i = 0; i < EDGE - 1; i++) apply_prologue(i, i);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < EDGE - 1; k++) load_x(a[k], k);
        __syncthreads();
#pragma unroll 1
        for (int i = STAGES - 1; i < STAGES + EDGE - 2; i++) start(i, i % STAGES);
#pragma unroll 1
        for (int step = EDGE - 1, slot = EDGE - 1; step < steps;
             step++, slot = slot + 1 == STAGES ? 0 : slot + 1) {
            copy_wait<STAGES - 2>();
            apply_prologue(step, slot);
            __syncthreads();
            start(step + STAGES - 1, slot ? slot - 1 : STAGES - 1);
            load_x(a[EDGE - 1], slot);
            if (active) {
                unsigned b[2][4];
                load_matrices_transposed(b[0], right + slot * stage);
#pragma unroll
                for (int r = 0; r < 3 + EDGE; r++) {
                    if (r + 1 < 3 + EDGE)
                        load_matrices_transposed(b[(r + 1) % 2], right + slot * stage,
                                                 (r + 1) * AROUND * ROW * 2);
                    FragmentB halves[2] = {{{b[r % 2][0], b[r % 2][1]}},
                                           {{b[r % 2][2], b[r % 2][3]}}};
#pragma unroll
                    for (int kh = 0; kh < EDGE; kh++) {
                        int h = r + kh - (EDGE - 1);
                        if (h < 0 || h > 3) continue;
#pragma unroll
                        for (int kd = 0; kd < EDGE; kd++)
                            multiply_each<T>(acc[kd][kh], a[kd][h], halves);
                    }
                }
            }
#pragma unroll
            for (int k = 0; k + 1 < EDGE; k++) {
#pragma unroll
                for (int h = 0; h < 4; h++) a[k][h] = a[k + 1][h];
            }
        }
    }
    float *to = partial + (((int64)blockIdx.x * s.phases + phase) * TAPS + kw) * s.c * s.outs;
#pragma unroll
    for (int tap = 0; tap < EDGE * EDGE; tap++) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int i = c0 + wi + half * 8 + lane / 4, o = n0 + wo + n * 8 + lane % 4 * 2;
                if (i >= s.c || o >= s.outs) continue;
                float *at = to + ((int64)tap * EDGE * s.c + i) * s.outs + o,
                      two[2] = {acc[tap / EDGE][tap % EDGE][n][half * 2],
                                acc[tap / EDGE][tap % EDGE][n][half * 2 + 1]};
                if (s.outs % 2 == 0) {
                    store(at, two);
                } else {
                    at[0] = two[0];
                    if (o + 1 < s.outs) at[1] = two[1];
                }
            }
        }
    }
}

// The oracle: a thread has two input channels and one output channel.
template <class T, int V, int TAPS>
__device__ __forceinline__ void conv_weight_plain(unsigned char *shared, const ConvShape &s,
                                                  int items, const T *x, const float *norm,
                                                  const T *add, const T *dy, float *partial) {
    typedef Halo<TAPS> H;
    constexpr int XS = IN + 1, GS = OUT + 1;
    float *halo = reinterpret_cast<float *>(shared), *grad = halo + H::VOXELS * XS;
    int across = (s.c + IN - 1) / IN, column = threadIdx.x % OUT, row = threadIdx.x / OUT * 2;
    int c0 = blockIdx.y % across * IN, n0 = blockIdx.y / across * OUT, phase = blockIdx.z,
        tiles = conv_tiles(s);
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
            if (c0 + row + j < s.c && n0 + column < s.outs)
                to[(int64)(c0 + row + j) * s.outs + n0 + column] = acc[tap][j];
    }
}

#define CONV_WEIGHT(NAME, T, THREADS, BLOCKS, ...)                                                 \
    KERNEL(weight_gradient_##NAME##_##T, THREADS, BLOCKS,                                          \
           (const T *x, const float *norm, const T *add, const T *dy, float *partial, int items,   \
            int d, int h, int w, int c, int outs, int phases, int pool, float slope),              \
           SHARED_MEMORY(shared);                                                                  \
           ConvShape s{d, h, w, c, outs, phases, pool, slope, 1, nullptr};                         \
           __VA_ARGS__(shared, s, items, x, norm, add, dy, partial))
CONV_WEIGHT(27, f32, 256, 2, conv_weight_plain<f32, 4, 27>)
CONV_WEIGHT(8, f32, 256, 2, conv_weight_plain<f32, 4, 8>)
CONV_WEIGHT(few_27, f32, 256, 2, conv_weight_plain<f32, 1, 27>)
CONV_WEIGHT(few_8, f32, 256, 2, conv_weight_plain<f32, 1, 8>)
#define CONV_WEIGHT_MATRIX(T)                                                        \
    CONV_WEIGHT(27, T, 384, 1, conv_weight_matrix<T, 8, 27, false>)                  \
    CONV_WEIGHT(pooled_27, T, 384, 1, conv_weight_matrix<T, 8, 27, true>)            \
    CONV_WEIGHT(few_27, T, 384, 1, conv_weight_matrix<T, 1, 27, true>)               \
    CONV_WEIGHT(8, T, 256, 2, conv_weight_matrix<T, 8, 8, false>)                    \
    CONV_WEIGHT(few_8, T, 256, 2, conv_weight_matrix<T, 1, 8, true>)
CONV_WEIGHT_MATRIX(f16)
CONV_WEIGHT_MATRIX(bf16)

// Loads COLUMNS columns of a matrix's rows into shared memory, ROWS rows per step, zeros beyond
// `rows` and `columns`; a thread keeps its positions, of 16 bytes each.
template <class T, int COLUMNS> struct DenseTileLoader {
    static constexpr int THREADS = 128, ROWS = 32, APART = THREADS / (COLUMNS / 8),
                         EACH = ROWS / APART, STRIDE = COLUMNS + 8;
    const T *from;
    T *to;
    int row, rows, columns, left;

    __device__ __forceinline__ DenseTileLoader(const T *matrix, T *shared, int row0, int rows,
                                               int column0, int columns)
        : rows(rows), columns(columns) {
        int r = threadIdx.x / (COLUMNS / 8), column = column0 + threadIdx.x % (COLUMNS / 8) * 8;
        row = row0 + r, left = columns - column;
        from = matrix + (int64)row * columns + column,
            to = shared + r * STRIDE + threadIdx.x % (COLUMNS / 8) * 8;
    }
    // Starts the next step, into its buffer.
    __device__ __forceinline__ void load_tile_async(int buffer) {
        T *cell = to + buffer * ROWS * STRIDE;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            bool within = left > 0 && row + i * APART < rows;
            const T *at = from + (int64)i * APART * columns;
            if (columns % 8 == 0) {
                copy_async(cell + i * APART * STRIDE, at, within);
            } else {
                RawVector<T, 8> value = {};
                if (within) value = load_channels<1>(at, left);
                *reinterpret_cast<RawVector<T, 8> *>(cell + i * APART * STRIDE) = value;
            }
        }
        row += ROWS, from += (int64)ROWS * columns;
    }
};

// Each run has `run` rows. The products go to partial [run][n][k]; with `more` they are added to
// what is there. A block has N of n.
// tensor cores
template <class T, int N>
__device__ __forceinline__ void dense_weight_matrix(const T *x, const T *dy, float *partial, int m,
                                                    int n, int k, int run, int more) {
    typedef DenseTileLoader<T, N> Left;
    typedef DenseTileLoader<T, SPAN> Right;
    constexpr int ROWS = Left::ROWS, STAGES = 4, M = N / 32;
    SHARED_MEMORY(shared);
    T *left = reinterpret_cast<T *>(shared), *right = left + STAGES * ROWS * Left::STRIDE;
    int n0 = blockIdx.x * N, k0 = blockIdx.y * SPAN, warp = threadIdx.x / 32,
        lane = threadIdx.x % 32, wn = warp / 2 * (N / 2), wk = warp % 2 * 32;
    int first = blockIdx.z * run, end = min(m, first + run),
        steps = (end - first + ROWS - 1) / ROWS;
    Left gradients(dy, left, first, end, n0, n);
    Right inputs(x, right, first, end, k0, k);
    auto start = [&](int step, int buffer) {
        if (step < steps) gradients.load_tile_async(buffer), inputs.load_tile_async(buffer);
        copy_commit();
    };
    for (int i = 0; i < STAGES - 1; i++) start(i, i);
    // A lane's row of four matrices of 8 rows by 8 columns, transposed on their way.
    const T *l = left + (lane / 16 * 8 + lane % 8) * Left::STRIDE + wn + lane / 8 % 2 * 8;
    const T *r = right + (lane / 8 % 2 * 8 + lane % 8) * Right::STRIDE + wk + lane / 16 * 8;
    float acc[M][4][4] = {};
#pragma unroll 1
    for (int step = 0, buffer = 0; step < steps; step++, buffer = (buffer + 1) % STAGES) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        start(step + STAGES - 1, (buffer + STAGES - 1) % STAGES);
        const T *l_step = l + buffer * ROWS * Left::STRIDE,
                *r_step = r + buffer * ROWS * Right::STRIDE;
#pragma unroll
        for (int row = 0; row < ROWS; row += 16) {
            FragmentA a[M];
            unsigned b[2][4];
#pragma unroll
            for (int j = 0; j < 2; j++)
                load_matrices_transposed(b[j], r_step, (row * Right::STRIDE + j * 16) * 2);
#pragma unroll
            for (int i = 0; i < M; i++)
                load_matrices_transposed(a[i].r, l_step, (row * Left::STRIDE + i * 16) * 2);
#pragma unroll
            for (int i = 0; i < M; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++)
                    multiply<T>(acc[i][j], a[i],
                                FragmentB{{b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]}});
            }
        }
    }
    partial += (int64)blockIdx.z * n * k;
#pragma unroll
    for (int i = 0; i < M; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int row = n0 + wn + i * 16 + half * 8 + lane / 4,
                    column = k0 + wk + j * 8 + lane % 4 * 2;
                if (row >= n || column >= k) continue;
                float *to = partial + (int64)row * k + column,
                      two[2] = {acc[i][j][half * 2], acc[i][j][half * 2 + 1]}, sum[2] = {};
                if (k % 2 == 0) {
                    if (more) load(sum, to);
                    sum[0] += two[0], sum[1] += two[1];
                    store(to, sum);
                } else {
                    to[0] = more ? to[0] + two[0] : two[0];
                    if (column + 1 < k) to[1] = more ? to[1] + two[1] : two[1];
                }
            }
        }
    }
}

// Rows `row0` to `row0 + ROWS` of a matrix, 64 columns from `column0` on, zero beyond `rows` and
// `columns`.
template <int ROWS>
__device__ __forceinline__ void fill_rows(float *to, int stride, const float *from, int row0,
                                          int rows, int column0, int columns) {
    constexpr int V = 4;
    for (int i = threadIdx.x; i < ROWS * SPAN / V; i += 256) {
        int r = i / (SPAN / V), column = i % (SPAN / V) * V;
        float v[V];
#pragma unroll
        for (int j = 0; j < V; j++) v[j] = 0.0f;
        if (row0 + r < rows) {
            const float *at = from + (int64)(row0 + r) * columns + column0 + column;
            if (columns % V == 0 && column0 + column < columns) {
                load(v, at);
            } else {
#pragma unroll
                for (int j = 0; j < V; j++)
                    if (column0 + column + j < columns) v[j] = at[j];
            }
        }
        store(to + r * stride + column, v);
    }
}

__device__ __forceinline__ void dense_weight_plain(const float *x, const float *dy, float *partial,
                                                   int m, int n, int k, int run, int more) {
    constexpr int ROWS = 16, STRIDE = SPAN + 4;
    SHARED_MEMORY(shared);
    float *left = reinterpret_cast<float *>(shared), *right = left + ROWS * STRIDE;
    int n0 = blockIdx.x * SPAN, k0 = blockIdx.y * SPAN, t = threadIdx.x,
        end = min(m, (int)(blockIdx.z + 1) * run);
    float acc[4][4] = {};
    for (int row0 = blockIdx.z * run; row0 < end; row0 += ROWS) {
        __syncthreads();
        fill_rows<ROWS>(left, STRIDE, dy, row0, end, n0, n);
        fill_rows<ROWS>(right, STRIDE, x, row0, end, k0, k);
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

#define DENSE_WEIGHT(NAME, THREADS, BLOCKS, T, ...)                                                \
    KERNEL(weight_gradient_##NAME##_##T, THREADS, BLOCKS,                                          \
           (const T *x, const T *dy, float *partial, int m, int n, int k, int run, int more),      \
           __VA_ARGS__(x, dy, partial, m, n, k, run, more))
DENSE_WEIGHT(dense, 256, 3, f32, dense_weight_plain)
DENSE_WEIGHT(dense, 128, 5, f16, dense_weight_matrix<f16, SPAN>)
DENSE_WEIGHT(dense, 128, 5, bf16, dense_weight_matrix<bf16, SPAN>)
DENSE_WEIGHT(dense_wide, 128, 3, f16, dense_weight_matrix<f16, 2 * SPAN>)
DENSE_WEIGHT(dense_wide, 128, 3, bf16, dense_weight_matrix<bf16, 2 * SPAN>)

// Adds every `step`-th of `parts` partial sums from number `part` on, which are `apart` floats from
// each other: eight at a time in float, the sums of eight in double.
template <int V>
__device__ __forceinline__ void add_parts(double (&sum)[V], const float *from, int part, int step,
                                          int parts, int64 apart) {
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

// Adds up partial sums [part][each] of a few parts, with `more` added to what y has; V values per
// thread.
template <int V>
__device__ __forceinline__ void sum_of_parts(const float *partial, float *y, int parts, int64 each,
                                             int more) {
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

KERNEL(weight_gradient_sum, 256, 4,
       (const float *partial, float *y, int parts, int64 each, int more),
       if (each % 4 == 0) sum_of_parts<4>(partial, y, parts, each, more);
       else sum_of_parts<1>(partial, y, parts, each, more))

// Adds up partial sums [part][phase][tap][c][outs] to y [phase][outs][c][tap], with `more` added to
// what it has. A block has 32 outputs of an input channel and `each` taps of a phase: reads go over
// outputs, with `share` of its 8 warps taking turns at a tap's parts, and writes go over taps. Grid
// (c * outputs / 32, taps / each, phases).
__device__ __forceinline__ void total(const float *partial, float *y, int parts, int taps, int c,
                                      int outs, int each, int share, int more) {
    constexpr int ROW = 33;
    SHARED_MEMORY(shared);
    double *bins = reinterpret_cast<double *>(shared);
    int across = (outs + 31) / 32, i = blockIdx.x / across, o0 = blockIdx.x % across * 32,
        first = blockIdx.y * each, count = min(each, taps - first);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int64 phase = blockIdx.z, apart = (int64)gridDim.z * taps * c * outs;
#pragma unroll 1
    for (int tap = warp / share; tap < count; tap += 8 / share) {
        double sum[1] = {};
        if (o0 + lane < outs) {
            add_parts(sum, partial + ((phase * taps + first + tap) * c + i) * outs + o0 + lane,
                      warp % share, share, parts, apart);
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

KERNEL(weight_gradient_total, 256, 4,
       (const float *partial, float *y, int parts, int taps, int c, int outs, int each, int share,
        int more),
       total(partial, y, parts, taps, c, outs, each, share, more))
