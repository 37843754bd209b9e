// The few rows of the two-way transformer: everything between two complete reads of a result is one
// launch. Weights are most of what is read, and each is read by one warp alone, so they go from
// memory directly into fragments; rows are in shared memory, where every warp reads them.
//
//   token_linear     up to three dense layers of the same rows, with norm and sum before them. A
//                    block has 16 rows x 16 columns, where two warps share the columns and four
//                    share k; with many rows (`_wide`) 32 x 64, 8 columns per warp
//   token_attention  attention to at most 64 keys and the dense layer after it, in the same blocks.
//                    Each block computes the attention of its rows again, which takes less time
//                    than waiting for another block
//   row_linear       dense layers of one row each, one warp per column
//
// Of every 32 elements of k a lane has 8 contiguous ones, of rows as well as of weights: the order
// of k within a product does not matter.
#include "lib/matrix.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS, CHUNK = 32, MOST_COLUMNS = 512, MOST_KEYS = 64,
              MOST_DIM = 64;
constexpr float LOG2_E = 1.4426950408889634f;

// How a block is laid out: the multiple of 16 rows, warps of 8 columns each, and the number of
// weights that a lane has in flight.
template <int M_, int ACROSS_, int DEPTH_> struct Layout {
    static constexpr int M = M_, ACROSS = ACROSS_, DEPTH = DEPTH_, ROWS = 16 * M,
                         COLUMNS = 8 * ACROSS, SPLITS = WARPS / ACROSS;
};
typedef Layout<1, 2, 8> Narrow;
typedef Layout<2, 8, 4> Wide;

// The distance between rows of k elements in shared memory, such that 16 bytes of each of four
// lanes of two rows fall on different banks.
template <class T> __device__ __forceinline__ int stride_of(int k) {
    constexpr int LINE = 128 / (int)sizeof(T);
    return (k + LINE - 1) / LINE * LINE + LINE / 2;
}

// A warp's share of rows times the transposed weight [n, k], columns `column` to `column + 8`: the
// chunks `first`, `first + step` and so on of k. A lane has rows lane / 4 and lane / 4 + 8 of each
// 16.
template <class T, class L> struct Product {
    const T *w;
    int k, step, chunk;
    RawVector<T, 8> weights[L::DEPTH];

    __device__ __forceinline__ Product(const T *matrix, int column, int n, int k, int first,
                                       int step)
        : k(k), step(step * CHUNK), chunk(first * CHUNK) {
        w = matrix + (int64)min(column + (int)threadIdx.x % 32 / 4, n - 1) * k +
            threadIdx.x % 4 * 8;
        fetch();
    }
    // Starts loading the next chunks' weights. Beyond k nothing is read, nor used.
    __device__ __forceinline__ void fetch() {
        int own = threadIdx.x % 4 * 8;
#pragma unroll
        for (int i = 0; i < L::DEPTH; i++) {
            int at = chunk + i * step;
            weights[i] = at + own < k ? load_raw<8>(w + at) : RawVector<T, 8>{};
        }
    }
    // `rows` are this lane's rows, of M times 16.
    __device__ __forceinline__ void run(float (&acc)[L::M][4], const T *const (&rows)[L::M][2]) {
        int own = threadIdx.x % 4 * 8;
#pragma unroll 1
        while (chunk < k) {
            RawVector<T, 8> now[L::DEPTH];
#pragma unroll
            for (int i = 0; i < L::DEPTH; i++) now[i] = weights[i];
            int from = chunk;
            chunk += L::DEPTH * step;
            fetch();
#pragma unroll
            for (int i = 0; i < L::DEPTH; i++) {
                int at = from + i * step + own;
                if (at - own >= k) break;
                const unsigned *b = now[i].words.v;
#pragma unroll
                for (int m = 0; m < L::M; m++) {
                    RawVector<T, 8> low = at < k ? load_raw<8>(rows[m][0] + at) : RawVector<T, 8>{},
                        high = at < k ? load_raw<8>(rows[m][1] + at) : RawVector<T, 8>{};
                    const unsigned *l = low.words.v, *h = high.words.v;
                    multiply<T>(acc[m], FragmentA{{l[0], h[0], l[1], h[1]}},
                                FragmentB{{b[0], b[1]}});
                    multiply<T>(acc[m], FragmentA{{l[2], h[2], l[3], h[3]}},
                                FragmentB{{b[2], b[3]}});
                }
            }
        }
    }
};

// A warp's share of the product in float: a lane has two columns as well, and each chunk is summed
// separately before it is added to the total.
template <class L> struct Product<f32, L> {
    const float *w[2];
    int k, step, chunk;

    __device__ __forceinline__ Product(const float *matrix, int column, int n, int k, int first,
                                       int step)
        : k(k), step(step * CHUNK), chunk(first * CHUNK) {
        for (int e = 0; e < 2; e++)
            w[e] = matrix + (int64)min(column + (int)threadIdx.x % 4 * 2 + e, n - 1) * k;
    }
    __device__ __forceinline__ void run(float (&acc)[L::M][4],
                                        const float *const (&rows)[L::M][2]) {
#pragma unroll 1
        for (; chunk < k; chunk += step) {
            float sums[L::M][4] = {};
#pragma unroll 2
            for (int at = chunk; at < min(k, chunk + CHUNK); at += 4) {
                float b[2][4];
                load(b[0], w[0] + at), load(b[1], w[1] + at);
#pragma unroll
                for (int m = 0; m < L::M; m++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        float a[4];
                        load(a, rows[m][half] + at);
#pragma unroll
                        for (int j = 0; j < 4; j++)
                            sums[m][half * 2] += a[j] * b[0][j],
                                sums[m][half * 2 + 1] += a[j] * b[1][j];
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < L::M * 4; i++) acc[i / 4][i % 4] += sums[i / 4][i % 4];
        }
    }
};

// What a dense layer writes: y = act(sum + bias) + residual.
template <class T> struct Layer {
    const T *w;
    const float *bias;
    const T *residual;
    T *y;
    int rows, n, act;
};

// Computes a block's product with the rows at `row_at(r)`, and writes it. `parts` has room for the
// sums of the warps that share k.
template <class T, class L, class F>
__device__ __forceinline__ void multiply_and_write(Product<T, L> &product, const Layer<T> &layer,
                                                   int row0, int n0, float *parts, F row_at) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, across = warp % L::ACROSS,
        split = warp / L::ACROSS;
    const T *rows[L::M][2];
#pragma unroll
    for (int i = 0; i < L::M * 2; i++) rows[i / 2][i % 2] = row_at(i * 8 + lane / 4);
    float acc[L::M][4] = {};
    product.run(acc, rows);
    if constexpr (L::SPLITS == 1) {
#pragma unroll
        for (int i = 0; i < L::M * 2; i++) {
            int row = row0 + i * 8 + lane / 4, column = n0 + across * 8 + lane % 4 * 2;
            float v[2] = {acc[i / 2][i % 2 * 2], acc[i / 2][i % 2 * 2 + 1]};
            if (row < layer.rows && column < layer.n)
                put(layer.y, v, (int64)row * layer.n + column, column, layer.bias, layer.residual,
                    layer.act);
        }
    } else {
#pragma unroll
        for (int i = 0; i < L::M * 2; i++) {
            float v[2] = {acc[i / 2][i % 2 * 2], acc[i / 2][i % 2 * 2 + 1]};
            store(parts + (split * L::ROWS + i * 8 + lane / 4) * L::COLUMNS +
                      across * 8 + lane % 4 * 2, v);
        }
        __syncthreads();
        for (int i = threadIdx.x * 2; i < L::ROWS * L::COLUMNS; i += THREADS * 2) {
            int row = row0 + i / L::COLUMNS, column = n0 + i % L::COLUMNS;
            if (row >= layer.rows || column >= layer.n) continue;
            float v[2] = {};
#pragma unroll
            for (int s = 0; s < L::SPLITS; s++) {
                float part[2];
                load(part, parts + s * L::ROWS * L::COLUMNS + i);
                v[0] += part[0], v[1] += part[1];
            }
            put(layer.y, v, (int64)row * layer.n + column, column, layer.bias, layer.residual,
                layer.act);
        }
    }
}

// The rows of a product's input: norm(x) if there is a weight, and a sum with `add`; `normed` is
// the destination of the rows before that sum, or null for none.
template <class T> struct Input {
    const T *x;
    const float *weight, *bias;
    const T *add;
    T *normed;
    float eps;
    int rows, k;
};

// Loads a block's rows into shared memory, two per warp at a time: both are in flight before either
// is needed. Rows after the last are copies of the last.
template <class T, class L>
__device__ __forceinline__ void load_tile(T *to, const Input<T> &in, int row0, int stride) {
    constexpr int V = 4, MOST = MOST_COLUMNS / 32 / V;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int r0 = warp * 2; r0 < L::ROWS; r0 += WARPS * 2) {
        float v[2][MOST][V], mean[2] = {}, scale[2] = {1.0f, 1.0f};
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const T *from = in.x + (int64)min(row0 + r0 + e, in.rows - 1) * in.k;
#pragma unroll
            for (int i = 0; i < MOST; i++) {
                int at = (lane + i * 32) * V;
#pragma unroll
                for (int j = 0; j < V; j++) v[e][i][j] = 0.0f;
                if (at < in.k) load(v[e][i], from + at);
            }
        }
        if (in.weight) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
#pragma unroll
                for (int i = 0; i < MOST * V; i++) mean[e] += v[e][i / V][i % V];
            }
#pragma unroll
            for (int e = 0; e < 2; e++) mean[e] = warp_sum(mean[e]) / in.k;
            float squares[2] = {};
#pragma unroll
            for (int e = 0; e < 2; e++) {
#pragma unroll
                for (int i = 0; i < MOST * V; i++) {
                    float apart = v[e][i / V][i % V] - mean[e];
                    if ((lane + i / V * 32) * V < in.k) squares[e] += apart * apart;
                }
            }
#pragma unroll
            for (int e = 0; e < 2; e++)
                scale[e] = 1.0f / sqrtf(warp_sum(squares[e]) / in.k + in.eps);
        }
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            int at = (lane + i * 32) * V;
            if (at >= in.k) break;
            float a[V], b[V];
            if (in.weight) load(a, in.weight + at), load(b, in.bias + at);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                if (in.weight) {
#pragma unroll
                    for (int j = 0; j < V; j++)
                        v[e][i][j] = (v[e][i][j] - mean[e]) * scale[e] * a[j] + b[j];
                }
                int row = row0 + r0 + e;
                int64 place = (int64)min(row, in.rows - 1) * in.k + at;
                if (in.normed && row < in.rows) store(in.normed + place, v[e][i]);
                if (in.add) {
                    float more[V];
                    load(more, in.add + place);
                    // Rounded in between, as if it were written out.
#pragma unroll
                    for (int j = 0; j < V; j++)
                        v[e][i][j] = to_float(from_float<T>(v[e][i][j])) + more[j];
                }
                store(to + (r0 + e) * stride + at, v[e][i]);
            }
        }
    }
}

// Up to three layers of the same shape. Grid (rows, columns of one layer after the other). Bit i of
// `added`: the input of layer i is the sum. k and n are multiples of 8; with a norm or a sum, k is
// at most MOST_COLUMNS.
template <class T, class L>
__device__ __forceinline__ void token_layers(Input<T> in, const T *const (&w)[3],
                                             const float *const (&biases)[3], T *const (&y)[3],
                                             const T *residual, int n, int act, int added) {
    SHARED_MEMORY(shared);
    int blocks = (n + L::COLUMNS - 1) / L::COLUMNS, which = blockIdx.y / blocks,
        n0 = (blockIdx.y - which * blocks) * L::COLUMNS, row0 = blockIdx.x * L::ROWS;
    int warp = threadIdx.x / 32;
    Layer<T> layer = {which == 0 ? w[0] : which == 1 ? w[1] : w[2],
                      which == 0 ? biases[0] : which == 1 ? biases[1] : biases[2], residual,
                      which == 0 ? y[0] : which == 1 ? y[1] : y[2], in.rows, n, act};
    if (!(added >> which & 1)) in.add = nullptr;
    if (blockIdx.y) in.normed = nullptr;
    // Weights are being loaded while rows are normed.
    Product<T, L> product(layer.w, n0 + warp % L::ACROSS * 8, n, in.k, warp / L::ACROSS, L::SPLITS);
    bool staged = in.weight || in.add;
    T *tile = reinterpret_cast<T *>(shared);
    int stride = stride_of<T>(in.k);
    float *parts = reinterpret_cast<float *>(shared);
    if (staged) {
        load_tile<T, L>(tile, in, row0, stride);
        parts = reinterpret_cast<float *>(tile + L::ROWS * stride);
        __syncthreads();
    }
    multiply_and_write(product, layer, row0, n0, parts, [&](int r) -> const T * {
        return staged ? tile + r * stride : in.x + (int64)min(row0 + r, in.rows - 1) * in.k;
    });
}

template <class L>
__device__ __forceinline__ void token_plain(const Input<f32> &in, const f32 *const (&w)[3],
                                            const float *const (&biases)[3], f32 *const (&y)[3],
                                            const f32 *residual, int n, int act, int added) {
    token_layers<f32, L>(in, w, biases, y, residual, n, act, added);
}
// tensor cores
template <class T, class L>
__device__ __forceinline__ void token_matrix(const Input<T> &in, const T *const (&w)[3],
                                             const float *const (&biases)[3], T *const (&y)[3],
                                             const T *residual, int n, int act, int added) {
    token_layers<T, L>(in, w, biases, y, residual, n, act, added);
}

// Two elements of a fragment: those of a row from channel `c` on, of `dim` channels; zero beyond.
template <class T> __device__ __forceinline__ unsigned two_of(const T *row, int c, int dim) {
    unsigned low = c < dim ? row[c].bits : 0, high = c + 1 < dim ? row[c + 1].bits : 0;
    return low | high << 16;
}

// The attention of 16 queries of a head to `keys` keys, by one warp; the queries are in `tile`,
// where the result replaces them. `k` and `v` have zeros after the last key.
template <class T>
__device__ __forceinline__ void attend(T *tile, const T *k, const T *v, int stride, int keys,
                                       int dim) {
    int lane = threadIdx.x % 32, row = lane / 4, two = lane % 4 * 2;
    float s[MOST_KEYS / 8][4] = {};
#pragma unroll
    for (int c = 0; c < MOST_DIM; c += 16) {
        if (c >= dim) break;
        FragmentA q;
#pragma unroll
        for (int i = 0; i < 4; i++)
            q.r[i] = two_of(tile + (row + i % 2 * 8) * stride, c + two + i / 2 * 8, dim);
#pragma unroll
        for (int j = 0; j < MOST_KEYS / 8; j++) {
            if (j * 8 >= keys) break;
            const T *key = k + (j * 8 + row) * stride;
            multiply<T>(s[j], q,
                        FragmentB{{two_of(key, c + two, dim), two_of(key, c + two + 8, dim)}});
        }
    }
    float scale = LOG2_E * rsqrtf((float)dim), row_max[2] = {MINUS_INFINITY, MINUS_INFINITY},
          sum[2] = {};
#pragma unroll
    for (int j = 0; j < MOST_KEYS / 8; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            s[j][e] = j * 8 + two + e % 2 < keys ? scale * s[j][e] : MINUS_INFINITY;
            row_max[e / 2] = fmaxf(row_max[e / 2], s[j][e]);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        row_max[i] = fmaxf(row_max[i], __shfl_xor_sync(0xffffffffu, row_max[i], 1));
        row_max[i] = fmaxf(row_max[i], __shfl_xor_sync(0xffffffffu, row_max[i], 2));
    }
    FragmentA p[MOST_KEYS / 16];
#pragma unroll
    for (int j = 0; j < MOST_KEYS / 8; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++)
            s[j][e] = exp2f(s[j][e] - row_max[e / 2]), sum[e / 2] += s[j][e];
        p[j / 2].r[j % 2 * 2] = pair<T>(s[j][0], s[j][1]),
            p[j / 2].r[j % 2 * 2 + 1] = pair<T>(s[j][2], s[j][3]);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
        sum[i] = 1.0f / (sum[i] + __shfl_xor_sync(0xffffffffu, sum[i], 2));
    }
    // Each lane's queries are in fragments of every lane: none may be overwritten before all have
    // been read.
    __syncwarp();
#pragma unroll 1
    for (int c = 0; c < dim; c += 8) {
        float acc[4] = {};
        int channel = min(c + row, dim - 1);
#pragma unroll
        for (int j = 0; j < MOST_KEYS / 16; j++) {
            if (j * 16 >= keys) break;
            const T *value = v + (j * 16 + two) * stride + channel;
            multiply<T>(
                acc, p[j],
                FragmentB{{value[0].bits | (unsigned)value[stride].bits << 16,
                           value[8 * stride].bits | (unsigned)value[9 * stride].bits << 16}});
        }
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (c + two + e % 2 < dim)
                tile[(row + e / 2 * 8) * stride + c + two + e % 2] =
                    from_float<T>(acc[e] * sum[e / 2]);
        }
    }
}

// Attention of q [queries, width] to k and v [keys, width], each head in its own `dim` channels,
// and the dense layer [n, width] after it, with n and width multiples of 8. If `live` is given, it
// is the number of valid keys. Grid (queries, columns).
// tensor cores
template <class T, class L>
__device__ __forceinline__ void token_attention(const T *q, const T *k, const T *v, const int *live,
                                                int keys, int width, int dim,
                                                const Layer<T> &layer) {
    SHARED_MEMORY(shared);
    int warp = threadIdx.x / 32, row0 = blockIdx.x * L::ROWS, n0 = blockIdx.y * L::COLUMNS,
        stride = stride_of<T>(width);
    int there = (keys + 15) / 16 * 16;
    if (live) keys = min(keys, *live);
    Product<T, L> product(layer.w, n0 + warp % L::ACROSS * 8, layer.n, width, warp / L::ACROSS,
                          L::SPLITS);
    T *tile = reinterpret_cast<T *>(shared), *own_k = tile + L::ROWS * stride,
      *own_v = own_k + there * stride;
    // One warp per row.
    for (int r = warp; r < L::ROWS + 2 * there; r += WARPS) {
        int key = r - L::ROWS;
        const T *from = q + (int64)min(row0 + r, layer.rows - 1) * width;
        bool counts = true;
        if (key >= 0) {
            const T *of = key < there ? k : v;
            key = key < there ? key : key - there;
            counts = key < keys, from = of + (int64)(counts ? key : 0) * width;
        }
        for (int at = threadIdx.x % 32 * 8; at < width; at += 32 * 8)
            copy_async(tile + r * stride + at, from + at, counts);
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    int heads = width / dim;
#pragma unroll 1
    for (int i = warp; i < heads * L::M; i += WARPS) {
        int c0 = i / L::M * dim;
        attend(tile + i % L::M * 16 * stride + c0, own_k + c0, own_v + c0, stride, keys, dim);
    }
    __syncthreads();
    multiply_and_write(product, layer, row0, n0, reinterpret_cast<float *>(own_v + there * stride),
                       [&](int r) -> const T * { return tile + r * stride; });
}

// y = act(w x + bias) of a row x of k values, a multiple of 4. Grid (columns, layers): one warp per
// column.
template <class T>
__device__ __forceinline__ void row_linear(const T *x, const T *w, const float *bias, T *y, int n,
                                           int k, int act) {
    int column = blockIdx.x * WARPS + threadIdx.x / 32;
    if (column >= n) return;
    w += (int64)column * k;
    float sum = 0.0f;
#pragma unroll 4
    for (int at = threadIdx.x % 32 * 4; at < k; at += 128) {
        float a[4], b[4];
        load(a, x + at), load(b, w + at);
#pragma unroll
        for (int j = 0; j < 4; j++) sum += a[j] * b[j];
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) y[column] = from_float<T>(activate(sum + bias[column], act));
}

#define TOKEN_LINEAR(NAME, T, ...)                                                                 \
    KERNEL(NAME, 256, 2,                                                                           \
           (const T *x, const float *weight, const float *bias, float eps, const T *add,           \
            T *normed, const T *w0, const T *w1, const T *w2, const float *b0, const float *b1,    \
            const float *b2, T *y0, T *y1, T *y2, const T *residual, int rows, int n, int k,       \
            int act, int added),                                                                   \
           __VA_ARGS__({x, weight, bias, add, normed, eps, rows, k}, {w0, w1, w2}, {b0, b1, b2},   \
                       {y0, y1, y2}, residual, n, act, added))
#define TOKEN_ATTENTION(NAME, T, LAYOUT)                                                           \
    KERNEL(NAME, 256, 2,                                                                           \
           (const T *q, const T *k, const T *v, const int *live, const T *w, const float *bias,    \
            const T *residual, T *y, int rows, int keys, int width, int dim, int n),               \
           token_attention<T, LAYOUT>(q, k, v, live, keys, width, dim,                             \
                                      {w, bias, residual, y, rows, n, ACT_NONE}))
#define ROW_OF(OF)                                                                                 \
    (blockIdx.y == 0 ? OF##0 : blockIdx.y == 1 ? OF##1 : blockIdx.y == 2 ? OF##2 : OF##3)
#define ROW_LINEAR(T)                                                                              \
    KERNEL(row_linear_##T, 256, 2,                                                                 \
           (const T *x0, const T *x1, const T *x2, const T *x3, const T *w0, const T *w1,          \
            const T *w2, const T *w3, const float *b0, const float *b1, const float *b2,           \
            const float *b3, T *y0, T *y1, T *y2, T *y3, int n0, int n1, int n2, int n3, int k0,   \
            int k1, int k2, int k3, int act),                                                      \
           row_linear(ROW_OF(x), ROW_OF(w), ROW_OF(b), ROW_OF(y), ROW_OF(n), ROW_OF(k), act))
#define TOKENS(T)                                                                                  \
    TOKEN_LINEAR(token_linear_##T, T, token_matrix<T, Narrow>)                                     \
    TOKEN_LINEAR(token_linear_wide_##T, T, token_matrix<T, Wide>)                                  \
    TOKEN_ATTENTION(token_attention_##T, T, Narrow)                                                \
    TOKEN_ATTENTION(token_attention_wide_##T, T, Wide)                                             \
    ROW_LINEAR(T)
TOKENS(f16)
TOKENS(bf16)
TOKEN_LINEAR(token_linear_f32, f32, token_plain<Narrow>)
TOKEN_LINEAR(token_linear_wide_f32, f32, token_plain<Wide>)
ROW_LINEAR(f32)
