// Gradients of softmax attention, in two launches, so that no sum depends on the order of blocks:
//
//   queries  a block has a tile of queries. It attends as in the forward pass, then goes over the
//            keys again: with P = exp(S - L), L the logarithm of a row's sum, and D = dO.O, the
//            scores' gradient is dS = P (dO.V - D), and dQ = scale dS K. L, D and the other terms
//            of the scores are kept for the second launch.
//   keys     a block has a tile of keys and goes over the queries: dV = P^T dO, dK = scale dS^T Q.
//
// The image encoder's position terms are sums of dS too; each block writes a partial sum of their
// tables' gradients.
//
// On tensor cores for elements of 16 bits (lib/attention_gradient_matrix.cuh), in plain float
// arithmetic for float32.
#include "lib/attention_gradient_matrix.cuh"

// Writes a thread's share of a row of `to`: every fourth channel.
template <class T>
__device__ __forceinline__ void write_row(T *to, const float (&acc)[MOST_DIM / 4], float scale,
                                          int dim) {
#pragma unroll
    for (int i = 0; i < MOST_DIM / 4; i++) {
        int c = threadIdx.x % 4 + 4 * i;
        if (c < dim) to[c] = from_float<T>(scale * acc[i]);
    }
}

// dO.O of this thread's query.
__device__ __forceinline__ float output_dot(const Row &state, const float *g, int dim) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < MOST_DIM / 4; i++) {
        int c = threadIdx.x % 4 + 4 * i;
        if (c < dim) sum += g[c] * state.acc[i];
    }
    return row_sum(sum / state.sum);
}

// Goes over all keys with the gradient `g` of this tile's outputs; `acc` becomes dS K. `each(k0,
// count)` is called with a tile's dS in `t.scores`, after all threads have written theirs.
template <class T, class K, class V, class B, class E>
__device__ __forceinline__ void query_gradients(const Tiles &t, const float *g, float log_sum,
                                                float mean, float (&acc)[MOST_DIM / 4], int keys,
                                                int dim, float scale, K key_row, V value_row,
                                                B bias, E each) {
    int query = threadIdx.x / 4, part = threadIdx.x % 4;
    float *scores = t.scores + query * (KEYS + 1);
    for (int k0 = 0; k0 < keys; k0 += KEYS) {
        int count = min(KEYS, keys - k0);
        __syncthreads();
        load_tile<T>(t.k, t.row, count, dim, [&](int r) { return key_row(k0 + r); });
        load_tile<T>(t.v, t.row, count, dim, [&](int r) { return value_row(k0 + r); });
        __syncthreads();
        float s[8] = {}, dp[8] = {};
        for (int c = 0; c < dim; c++) {
            float q = t.q[query * t.row + c], o = g[query * t.row + c];
#pragma unroll
            for (int j = 0; j < 8; j++)
                s[j] += q * t.k[(part + 4 * j) * t.row + c],
                    dp[j] += o * t.v[(part + 4 * j) * t.row + c];
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            int key = part + 4 * j;
            scores[key] =
                key < count ? expf(scale * s[j] + bias(query, k0 + key) - log_sum) * (dp[j] - mean)
                            : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < MOST_DIM / 4; i++) {
            int c = part + 4 * i;
            if (c >= dim) break;
#pragma unroll 4
            for (int k = 0; k < KEYS; k++) acc[i] += scores[k] * t.k[k * t.row + c];
        }
        each(k0, count);
    }
}

// One tile of queries for this thread's key, whose row of `t.k` and `t.v` is already loaded: adds
// dS^T Q to `dk` and P^T dO to `dv`. `second` has room for as many scores as `t.scores`.
template <class B>
__device__ __forceinline__ void key_gradients(const Tiles &t, const float *g, float *second,
                                              const float *log_sum, const float *mean, int queries,
                                              int dim, float scale, float (&dk)[MOST_DIM / 4],
                                              float (&dv)[MOST_DIM / 4], B bias) {
    int key = threadIdx.x / 4, part = threadIdx.x % 4;
    float *p = t.scores + key * (KEYS + 1), *ds = second + key * (KEYS + 1);
    float s[8] = {}, dp[8] = {};
    for (int c = 0; c < dim; c++) {
        float k = t.k[key * t.row + c], v = t.v[key * t.row + c];
#pragma unroll
        for (int j = 0; j < 8; j++)
            s[j] += k * t.q[(part + 4 * j) * t.row + c], dp[j] += v * g[(part + 4 * j) * t.row + c];
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        int query = part + 4 * j;
        float weight = query < queries ? expf(scale * s[j] + bias(query) - log_sum[query]) : 0.0f;
        p[query] = weight;
        ds[query] = query < queries ? weight * (dp[j] - mean[query]) : 0.0f;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < MOST_DIM / 4; i++) {
        int c = part + 4 * i;
        if (c >= dim) break;
#pragma unroll 4
        for (int q = 0; q < QUERIES; q++)
            dk[i] += ds[q] * t.q[q * t.row + c], dv[i] += p[q] * g[q * t.row + c];
    }
}

// Grid (queries / 32, heads). sums [heads][tiles][L, D][32]. If `live` is given, it is the number
// of valid keys, as in the forward pass.
template <class T>
__device__ __forceinline__ void two_way_queries(const T *q, const T *k, const T *v, const T *dy,
                                                T *dq, float *sums, const int *live, int queries,
                                                int keys, int width, int dim) {
    SHARED_MEMORY(shared);
    if (live) keys = min(keys, *live);
    Tiles t(shared, dim);
    float *g = t.end(), scale = rsqrtf((float)dim), acc[MOST_DIM / 4] = {};
    int q0 = blockIdx.x * QUERIES, c0 = blockIdx.y * dim, query = q0 + threadIdx.x / 4;
    load_tile<T>(t.q, t.row, queries - q0, dim,
                 [&](int r) { return q + (int64)(q0 + r) * width + c0; });
    load_tile<T>(g, t.row, queries - q0, dim,
                 [&](int r) { return dy + (int64)(q0 + r) * width + c0; });
    auto key_row = [&](int r) { return k + (int64)r * width + c0; };
    auto value_row = [&](int r) { return v + (int64)r * width + c0; };
    auto none = [](int, int) { return 0.0f; };
    Row state = {MINUS_INFINITY, 0.0f, {}};
    attend<T>(t, state, keys, dim, scale, key_row, value_row, none);
    float log_sum = state.row_max + logf(state.sum),
          mean = output_dot(state, g + threadIdx.x / 4 * t.row, dim);
    query_gradients<T>(t, g, log_sum, mean, acc, keys, dim, scale, key_row, value_row, none,
                       [](int, int) {});
    if (query < queries) write_row(dq + (int64)query * width + c0, acc, scale, dim);
    sums += ((int64)blockIdx.y * gridDim.x + blockIdx.x) * 2 * QUERIES;
    if (threadIdx.x % 4 == 0)
        sums[threadIdx.x / 4] = log_sum, sums[QUERIES + threadIdx.x / 4] = mean;
}

// Grid (keys / 32, heads). If `live` is given, it is the number of valid keys; the gradients of the
// others are zeros.
template <class T>
__device__ __forceinline__ void two_way_keys(const T *q, const T *k, const T *v, const T *dy,
                                             const float *sums, T *dk, T *dv, const int *live,
                                             int queries, int keys, int width, int dim) {
    SHARED_MEMORY(shared);
    Tiles t(shared, dim);
    float *g = t.end(), *second = g + QUERIES * t.row, scale = rsqrtf((float)dim),
          k_acc[MOST_DIM / 4] = {}, v_acc[MOST_DIM / 4] = {};
    int k0 = blockIdx.x * KEYS, c0 = blockIdx.y * dim, key = k0 + threadIdx.x / 4,
        tiles = (queries + QUERIES - 1) / QUERIES, valid = live ? min(keys, *live) : keys;
    // Nothing but padding: the whole block is done.
    if (k0 >= valid) {
        if (key < keys) {
            write_row(dk + (int64)key * width + c0, k_acc, scale, dim);
            write_row(dv + (int64)key * width + c0, v_acc, 1.0f, dim);
        }
        return;
    }
    load_tile<T>(t.k, t.row, valid - k0, dim,
                 [&](int r) { return k + (int64)(k0 + r) * width + c0; });
    load_tile<T>(t.v, t.row, valid - k0, dim,
                 [&](int r) { return v + (int64)(k0 + r) * width + c0; });
    sums += (int64)blockIdx.y * tiles * 2 * QUERIES;
    for (int tile = 0; tile < tiles; tile++, sums += 2 * QUERIES) {
        int q0 = tile * QUERIES;
        __syncthreads();
        load_tile<T>(t.q, t.row, queries - q0, dim,
                     [&](int r) { return q + (int64)(q0 + r) * width + c0; });
        load_tile<T>(g, t.row, queries - q0, dim,
                     [&](int r) { return dy + (int64)(q0 + r) * width + c0; });
        __syncthreads();
        key_gradients(t, g, second, sums, sums + QUERIES, queries - q0, dim, scale, k_acc, v_acc,
                      [](int) { return 0.0f; });
    }
    // The zeros in the place of a padded key had some weight, of any size: it counts for nothing.
#pragma unroll
    for (int i = 0; i < MOST_DIM / 4; i++)
        if (key >= valid) k_acc[i] = v_acc[i] = 0.0f;
    if (key < keys) {
        write_row(dk + (int64)key * width + c0, k_acc, scale, dim);
        write_row(dv + (int64)key * width + c0, v_acc, 1.0f, dim);
    }
}

// Where a block of the image encoder's attention writes its results for the other blocks of its
// launch and for the next launch, for this head and window.
//
//   kept     [tile][A, B, C, L, D]: the position terms of a tile, then two numbers per query
//   tables   [tile, head][3 (2 edge - 1) dim]: the tables' gradients, along d, h and w
//   padding  [tile][3 width]: the bias' gradients, through the padded positions
__device__ __forceinline__ int kept_size(const VitShape &v) {
    return QUERIES * v.edge + 2 * v.lines * v.edge * v.edge + 2 * QUERIES;
}

__device__ __forceinline__ float *kept_of(const VitShape &v, float *kept, int tiles, int tile) {
    return kept + (((int64)blockIdx.z * gridDim.y + blockIdx.y) * tiles + tile) * kept_size(v);
}

// Gradients of a line's B and C, column kw, and of A of each of its queries, through the padded
// keys. `da` holds, for each query, the gradient of the padded keys' score.
__device__ __forceinline__ void padded_gradient(const VitWindow &w, const Positions &p,
                                                const Positions &d, int line, int kw) {
    int edge = p.edge, at = line * edge * edge;
    float through = 0.0f;
    for (int x = 0; x < w.ew; x++) through += d.a[(line * w.ew + x) * edge + kw];
    PaddedColumn column(w, p.b + at, p.c + at, edge, kw, edge);
    float weight = column.weight(kw < w.ew), scale = weight > 0.0f ? through / weight : 0.0f;
    for (int i = 0; i < edge; i++) {
        float others_c = kw >= w.ew || i >= w.ed ? column.c_in + column.c_out : column.c_out;
        float others_b = kw >= w.ew || i >= w.eh ? column.b_in + column.b_out : column.b_out;
        d.b[at + i * edge + kw] = scale * expf(p.b[at + i * edge + kw] - column.top_b) * others_c;
        d.c[at + i * edge + kw] = scale * expf(p.c[at + i * edge + kw] - column.top_c) * others_b;
    }
}

// Grid (tiles of query lines, heads, windows). What the forward pass kept is for tensor cores; here
// it is computed again.
template <class T>
__device__ __forceinline__ void vit_queries(const T *qkv, const float *, const float *, const T *dy,
                                            T *dqkv, float *kept, float *tables, float *padding,
                                            const VitShape &v) {
    SHARED_MEMORY(shared);
    int dim = v.dim, edge = v.edge, length = (2 * edge - 1) * dim, t = threadIdx.x;
    Tiles tile(shared, dim);
    VitWindow w(v);
    int line0 = blockIdx.x * v.lines, lines = max(0, min(v.lines, w.ed * w.eh - line0)),
        queries = lines * w.ew, first = line0 * w.ew, query = t / 4;
    int64 block = (int64)blockIdx.z * gridDim.x + blockIdx.x;
    tables += (block * gridDim.y + blockIdx.y) * 3 * length, padding += block * 3 * v.width + w.c0;
    float *g = tile.end(), scale = rsqrtf((float)dim), acc[MOST_DIM / 4] = {};
    Positions p(g + QUERIES * tile.row, v), d(p.end(v.lines), v);
    float *weights = d.end(v.lines), *slopes = weights + QUERIES;
    load_tile<T>(tile.q, tile.row, queries, dim,
                 [&](int r) { return qkv + w.row(first + r) * 3 * v.width + w.c0; });
    load_tile<T>(g, tile.row, queries, dim,
                 [&](int r) { return dy + w.row(first + r) * v.width + w.c0; });
    __syncthreads();
    p.form(v, w, tile.q, tile.row, line0, lines);
    __syncthreads();

    Row state;
    float padded = vit_attend(v, w, tile, p, qkv, queries, state);
    float log_sum = state.row_max + logf(state.sum),
          mean = output_dot(state, g + query * tile.row, dim);
    // The padded keys' common weight and the gradient of its score, which the first thread of each
    // query writes for all four.
    if (t % 4 == 0) {
        bool any = padded > MINUS_INFINITY && query < queries;
        float weight = any ? expf(padded - log_sum) : 0.0f;
        weights[query] = weight;
        slopes[query] =
            any ? weight * (dot(g + query * tile.row, v.bias + 2 * v.width + w.c0, dim) - mean)
                : 0.0f;
    }
    for (int i = t; i < QUERIES * edge; i += THREADS) d.a[i] = 0.0f;
    for (int i = t; i < 2 * v.lines * edge * edge; i += THREADS) d.b[i] = 0.0f;
    __syncthreads();
    if (w.is_padded(edge)) {
        if (query < queries) {
            float all = padded_positions(w, p, query);
            int line = query / w.ew * edge * edge;
            for (int kw = t % 4; kw < edge; kw += 4) {
                float share =
                    PaddedColumn(w, p.b + line, p.c + line, edge, kw, edge).log_weight(kw < w.ew) +
                    p.a[query * edge + kw] - all;
                d.a[query * edge + kw] = slopes[query] * expf(share);
            }
#pragma unroll
            for (int i = 0; i < MOST_DIM / 4; i++) {
                int c = t % 4 + 4 * i;
                if (c < dim) acc[i] = slopes[query] * v.bias[v.width + w.c0 + c];
            }
        }
        __syncthreads();
        for (int i = t; i < lines * edge; i += THREADS)
            padded_gradient(w, p, d, i / edge, i % edge);
    }

    auto bias = [&](int q, int key) {
        return q < queries ? p.of(w, q, key / w.ew / w.eh, key / w.ew % w.eh, key % w.ew) : 0.0f;
    };
    query_gradients<T>(
        tile, g, log_sum, mean, acc, w.tokens(), dim, scale,
        [&](int r) { return qkv + w.row(r) * 3 * v.width + v.width + w.c0; },
        [&](int r) { return qkv + w.row(r) * 3 * v.width + 2 * v.width + w.c0; }, bias,
        [&](int k0, int count) {
            // A: each thread of a row has every fourth kw. B and C: one thread per line, kw and
            // term.
            const float *row = tile.scores + query * (KEYS + 1);
            if (query >= queries) return;
            int line = query / w.ew, mine = query % w.ew, kw = k0 % w.ew - 1, kh = k0 / w.ew % w.eh,
                kd = k0 / w.ew / w.eh;
            for (int j = 0; j < count; j++) {
                if (++kw == w.ew) kw = 0, kh++;
                if (kh == w.eh) kh = 0, kd++;
                if (kw % 4 == t % 4) d.a[query * edge + kw] += row[j];
                if (kw != mine || t % 4 > 1) continue;
                float sum = 0.0f;
                for (int x = 0; x < w.ew; x++)
                    sum += tile.scores[(line * w.ew + x) * (KEYS + 1) + j];
                float *to =
                    (t % 4 == 0 ? d.b + kd * edge : d.c + kh * edge) + line * edge * edge + kw;
                *to += sum;
            }
        });
    __syncthreads();

    // The gradient through the position terms: to the queries, the tables and, for padded queries,
    // the bias.
    if (query < queries) {
        int x = query % w.ew, line = query / w.ew, at = line * edge * edge + x * edge,
            dd = (line0 + line) / w.eh, h = (line0 + line) % w.eh;
        float terms[MOST_DIM / 4] = {};
        for (int kw = 0; kw < edge; kw++) {
            float a = d.a[query * edge + kw], b = d.b[at + kw], c = d.c[at + kw];
            const float *in_d = v.table_d + (dd - kw + edge - 1) * dim,
                        *in_h = v.table_h + (h - kw + edge - 1) * dim,
                        *in_w = v.table_w + (x - kw + edge - 1) * dim;
#pragma unroll
            for (int i = 0; i < MOST_DIM / 4; i++) {
                int channel = t % 4 + 4 * i;
                if (channel < dim)
                    terms[i] += a * in_d[channel] + b * in_h[channel] + c * in_w[channel];
            }
        }
#pragma unroll
        for (int i = 0; i < MOST_DIM / 4; i++) acc[i] = scale * acc[i] + terms[i];
        write_row(dqkv + w.row(first + query) * 3 * v.width + w.c0, acc, 1.0f, dim);
    }
    for (int i = t; i < 3 * length; i += THREADS) {
        int axis = i / length, n = i % length / dim, c = i % dim;
        float sum = 0.0f;
        for (int line = 0; line < lines; line++) {
            int along = axis == 0 ? (line0 + line) / w.eh : (line0 + line) % w.eh;
            for (int x = 0; x < (axis == 0 ? w.ew : edge); x++) {
                int kw = (axis == 2 ? x : along) + edge - 1 - n;
                if (kw < 0 || kw >= edge) continue;
                float slope = axis == 0 ? d.a[(line * w.ew + x) * edge + kw]
                                        : (axis == 1 ? d.b : d.c)[(line * edge + x) * edge + kw];
                sum += slope *
                       (x < w.ew ? tile.q[(line * w.ew + x) * tile.row + c] : v.bias[w.c0 + c]);
            }
        }
        tables[i] = sum;
    }
    for (int i = t; i < 3 * dim; i += THREADS) {
        int part = i / dim, c = i % dim;
        float sum = 0.0f;
        if (part == 0) {
            for (int line = 0; line < lines; line++) {
                int h = (line0 + line) % w.eh;
                for (int x = w.ew; x < edge; x++)
                    for (int kw = 0; kw < edge; kw++)
                        sum += d.b[(line * edge + x) * edge + kw] *
                                   v.table_h[(h - kw + edge - 1) * dim + c] +
                               d.c[(line * edge + x) * edge + kw] *
                                   v.table_w[(x - kw + edge - 1) * dim + c];
            }
        } else {
            for (int q = 0; q < queries; q++)
                sum += part == 1 ? scale * slopes[q] * tile.q[q * tile.row + c]
                                 : weights[q] * g[q * tile.row + c];
        }
        padding[part * v.width + c] = sum;
    }
    if (lines == 0) return;
    float *keep = kept_of(v, kept, gridDim.x, blockIdx.x);
    int terms = kept_size(v) - 2 * QUERIES;
    for (int i = t; i < terms; i += THREADS) {
        bool formed = i < QUERIES * edge
                          ? i < queries * edge
                          : (i - QUERIES * edge) % (v.lines * edge * edge) < lines * edge * edge;
        if (formed) keep[i] = p.a[i];
    }
    if (t % 4 == 0) keep[terms + query] = log_sum, keep[terms + QUERIES + query] = mean;
}

// Grid (tiles of keys, heads, windows); each window has `tiles` tiles of query lines.
template <class T>
__device__ __forceinline__ void vit_keys(const T *qkv, const T *dy, T *dqkv, float *kept, int tiles,
                                         const VitShape &v) {
    SHARED_MEMORY(shared);
    int dim = v.dim, edge = v.edge, t = threadIdx.x, k0 = blockIdx.x * KEYS;
    Tiles tile(shared, dim);
    VitWindow w(v);
    int keys = w.tokens(), key = k0 + t / 4;
    if (k0 >= keys) return;
    float *g = tile.end(), *second = g + QUERIES * tile.row, scale = rsqrtf((float)dim),
          k_acc[MOST_DIM / 4] = {}, v_acc[MOST_DIM / 4] = {};
    Positions p(second + KEYS * (QUERIES + 1), v);
    load_tile<T>(tile.k, tile.row, keys - k0, dim,
                 [&](int r) { return qkv + w.row(k0 + r) * 3 * v.width + v.width + w.c0; });
    load_tile<T>(tile.v, tile.row, keys - k0, dim,
                 [&](int r) { return qkv + w.row(k0 + r) * 3 * v.width + 2 * v.width + w.c0; });
    int kw = key % w.ew, kh = key / w.ew % w.eh, kd = key / w.ew / w.eh,
        terms = kept_size(v) - 2 * QUERIES;
    for (int at = 0; at * v.lines < w.ed * w.eh; at++) {
        int lines = min(v.lines, w.ed * w.eh - at * v.lines), queries = lines * w.ew,
            first = at * v.lines * w.ew;
        const float *keep = kept_of(v, kept, tiles, at);
        __syncthreads();
        load_tile<T>(tile.q, tile.row, queries, dim,
                     [&](int r) { return qkv + w.row(first + r) * 3 * v.width + w.c0; });
        load_tile<T>(g, tile.row, queries, dim,
                     [&](int r) { return dy + w.row(first + r) * v.width + w.c0; });
        for (int i = t; i < terms; i += THREADS) {
            bool formed = i < QUERIES * edge ? i < queries * edge
                                             : (i - QUERIES * edge) % (v.lines * edge * edge) <
                                                   lines * edge * edge;
            if (formed) p.a[i] = keep[i];
        }
        __syncthreads();
        key_gradients(tile, g, second, keep + terms, keep + terms + QUERIES, queries, dim, scale,
                      k_acc, v_acc,
                      [&](int query) { return key < keys ? p.of(w, query, kd, kh, kw) : 0.0f; });
    }
    if (key < keys) {
        T *to = dqkv + w.row(key) * 3 * v.width + w.c0;
        write_row(to + v.width, k_acc, scale, dim);
        write_row(to + 2 * v.width, v_acc, 1.0f, dim);
    }
}

#define VIT_SHAPE                                                                                  \
    const float *qkv_bias, const float *table_d, const float *table_h, const float *table_w,       \
    int s, int edge, int width, int dim, int lines
#define ATTENTION_GRADIENT(T, TWO_WAY_QUERIES, TWO_WAY_KEYS, VIT_QUERIES, VIT_KEYS, BLOCKS)        \
    KERNEL(attention_gradient_queries_##T, THREADS, 4,                                             \
           (const T *q, const T *k, const T *v, const T *dy, T *dq, float *sums, const int *live,  \
            int queries, int keys, int width, int dim),                                            \
           TWO_WAY_QUERIES(q, k, v, dy, dq, sums, live, queries, keys, width, dim))                \
    KERNEL(attention_gradient_keys_##T, THREADS, BLOCKS,                                           \
           (const T *q, const T *k, const T *v, const T *dy, const float *sums, T *dk, T *dv,      \
            const int *live, int queries, int keys, int width, int dim),                           \
           TWO_WAY_KEYS(q, k, v, dy, sums, dk, dv, live, queries, keys, width, dim))               \
    KERNEL(attention_gradient_vit_queries_##T, THREADS, 3,                                         \
           (const T *qkv, const float *values, const float *log_sums, const T *dy, T *dqkv,        \
            float *kept, float *tables, float *padding, VIT_SHAPE),                                \
           VIT_QUERIES(qkv, values, log_sums, dy, dqkv, kept, tables, padding,                     \
                       {qkv_bias, table_d, table_h, table_w, s, edge, width, dim, lines}))         \
    KERNEL(attention_gradient_vit_keys_##T, THREADS, 3,                                            \
           (const T *qkv, const T *dy, T *dqkv, float *kept, int tiles, VIT_SHAPE),                \
           VIT_KEYS(qkv, dy, dqkv, kept, tiles,                                                    \
                    {qkv_bias, table_d, table_h, table_w, s, edge, width, dim, lines}))
ATTENTION_GRADIENT(f32, two_way_queries, two_way_keys, vit_queries, vit_keys, 4)
ATTENTION_GRADIENT(f16, two_way_queries_matrix, two_way_keys_matrix, vit_queries_matrix,
                   vit_keys_matrix, 3)
ATTENTION_GRADIENT(bf16, two_way_queries_matrix, two_way_keys_matrix, vit_queries_matrix,
                   vit_keys_matrix, 3)
