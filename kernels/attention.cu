// Softmax attention, scores never in global memory: on tensor cores for elements of 16 bits (lib/attention_matrix.cuh), in plain float arithmetic for float32
// (lib/attention.cuh).
#include "lib/attention_matrix.cuh"

template <class T> __device__ __forceinline__ void write(const Row &state, T *to, int dim) {
#pragma unroll
    for (int i = 0; i < MOST_DIM / 4; i++) {
        int c = threadIdx.x % 4 + 4 * i;
        if (c < dim) to[c] = from_float<T>(state.acc[i] / state.sum);
    }
}

// Attention of q [queries, width] to k and v [keys, width], each head in its own channels. Grid (queries / 32, heads). Where `live` is given, only so many
// keys count, and the rows behind them are padding.
template <class T>
__device__ __forceinline__ void two_way(const T *q, const T *k, const T *v, T *y, const int *live, int queries, int keys, int width, int dim) {
    SHARED_MEMORY(shared);
    if (live) keys = min(keys, *live);
    Tiles tiles(shared, dim);
    int q0 = blockIdx.x * QUERIES, c0 = blockIdx.y * dim, query = q0 + threadIdx.x / 4;
    bring<T>(tiles.q, tiles.row, queries - q0, dim, [&](int r) { return q + (int64)(q0 + r) * width + c0; });
    Row state = {MINUS_INFINITY, 0.0f, {}};
    attend<T>(
        tiles, state, keys, dim, rsqrtf((float)dim), [&](int r) { return k + (int64)r * width + c0; }, [&](int r) { return v + (int64)r * width + c0; },
        [](int, int) { return 0.0f; });
    if (query < queries) write(state, y + (int64)query * width + c0, dim);
}

// The image encoder's attention. Grid (tiles of query lines, heads, windows). A tile is `lines` lines along w, at most 8, of one window. Where `log_sums` [row, head] is
// given, it gets the logarithm, of base 2, of what a query's keys weigh together: the way back wants it on tensor cores.
template <class T> __device__ __forceinline__ void vit(const T *qkv, T *y, float *, const VitShape &v) {
    SHARED_MEMORY(shared);
    Tiles tiles(shared, v.dim);
    VitWindow window(v);
    int line0 = blockIdx.x * v.lines, lines = min(v.lines, window.ed * window.eh - line0);
    if (lines <= 0) return;
    int queries = lines * window.ew, first = line0 * window.ew, query = threadIdx.x / 4;
    bring<T>(tiles.q, tiles.row, queries, v.dim, [&](int r) { return qkv + window.row(first + r) * 3 * v.width + window.c0; });
    __syncthreads();
    Positions positions(tiles.end(), v);
    positions.form(v, window, tiles.q, tiles.row, line0, lines);
    __syncthreads();
    Row state;
    vit_attend(v, window, tiles, positions, qkv, queries, state);
    if (query < queries) write(state, y + window.row(first + query) * v.width + window.c0, v.dim);
}

// The same two on tensor cores.
// tensor cores
template <class T>
__device__ __forceinline__ void two_way_matrix(const T *q, const T *k, const T *v, T *y, const int *live, int queries, int keys, int width, int dim) {
    SHARED_MEMORY(shared);
    if (live) keys = min(keys, *live);
    MatrixTiles<T> tiles(shared, dim);
    int q0 = blockIdx.x * QUERIES, c0 = blockIdx.y * dim;
    auto key_row = [&](int r) { return k + (int64)r * width + c0; };
    auto no_place = [](int) { return 0; };
    tiles.bring(tiles.q, QUERIES, q0, queries, [&](int r) { return q + (int64)r * width + c0; });
    bring_keys(tiles, 0, keys, key_row, v - k, no_place);
    copy_wait<0>();
    __syncthreads();
    MatrixRows rows = {{MINUS_INFINITY, MINUS_INFINITY}, {}, {}};
    attend(tiles, rows, keys, rsqrtf((float)dim), key_row, v - k, no_place, [](int, int) { return 0.0f; });
    join(tiles, rows, [&](int query) { return q0 + query < queries ? y + (int64)(q0 + query) * width + c0 : nullptr; }, [](int, float) {});
}

// tensor cores
template <class T> __device__ __forceinline__ void vit_matrix(const T *qkv, T *y, float *log_sums, const VitShape &v) {
    SHARED_MEMORY(shared);
    MatrixTiles<T> tiles(shared, v.dim);
    VitWindow w(v);
    int line0 = blockIdx.x * v.lines, lines = min(v.lines, w.ed * w.eh - line0), edge = v.edge, dim = v.dim;
    if (lines <= 0) return;
    int queries = lines * w.ew, first = line0 * w.ew, keys = w.tokens();
    const T *values = qkv + w.c0;
    auto key_row = [&](int r) { return values + w.row(r) * 3 * v.width + v.width; };
    auto place = [&](int key) {
        int d, h, x;
        w.split(key, d, h, x);
        return x | h << 8 | d << 16;
    };
    tiles.bring(tiles.q, QUERIES, 0, queries, [&](int r) { return values + w.row(first + r) * 3 * v.width; });
    copy_commit();
    bring_keys(tiles, 0, keys, key_row, v.width, place);
    copy_wait<1>();
    __syncthreads();
    Positions positions(tiles.end(), v);
    // What the padded keys of each column kw weigh for each line of queries.
    float *columns = positions.end(v.lines);
    if (dim % 8 == 0) {
        form_positions(positions, v, w, tiles, columns + v.lines * edge, line0, lines);
    } else {
        positions.form(v, w, tiles.q, tiles.row, line0, lines);
        __syncthreads();
    }
    bool padded = w.is_padded(edge);
    if (padded) {
        for (int i = threadIdx.x; i < lines * edge; i += THREADS) {
            int line = i / edge * edge * edge, kw = i % edge;
            columns[i] = PaddedColumn(w, positions.b + line, positions.c + line, edge, kw, edge).log_weight(kw < w.ew);
        }
        __syncthreads();
    }
    float scale = rsqrtf((float)dim);
    const float *a[2], *b[2], *c[2];
    MatrixRows rows = {{MINUS_INFINITY, MINUS_INFINITY}, {}, {}};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        // Rows behind the last query do as the last.
        int query = min(threadIdx.x / 32 % 2 * 16 + row_of_element(2 * i), queries - 1), line = query / w.ew;
        a[i] = positions.a + query * edge, b[i] = positions.b + line * edge * edge, c[i] = positions.c + line * edge * edge;
        if (!padded || threadIdx.x >= 64) continue;
        float top = MINUS_INFINITY, sum = 0.0f, score = 0.0f;
        for (int kw = 0; kw < edge; kw++) top = fmaxf(top, columns[line * edge + kw] + a[i][kw]);
        for (int kw = 0; kw < edge; kw++) sum += expf(columns[line * edge + kw] + a[i][kw] - top);
        for (int channel = threadIdx.x % 4; channel < dim; channel += 4) score += to_float(tiles.q[query * tiles.row + channel]) * v.bias[v.width + w.c0 + channel];
        // All padded keys as one, which starts the row.
        rows.top[i] = LOG2_E * (scale * row_sum(score) + top + logf(sum));
        rows.sum[i] = threadIdx.x % 4 == 0 ? 1.0f : 0.0f;
#pragma unroll
        for (int e = 0; e < 2; e++) {
#pragma unroll
            for (int j = 0; j < MOST_DIM / 8; j++) {
                int channel = j * 8 + column_of_element(e);
                if (channel < dim) rows.acc[j][2 * i + e] = v.bias[2 * v.width + w.c0 + channel];
            }
        }
    }
    auto bias = [&](int i, int at) {
        int kw = at & 255;
        return LOG2_E * (a[i][kw] + b[i][(at >> 16) * edge + kw] + c[i][(at >> 8 & 255) * edge + kw]);
    };
    attend(tiles, rows, keys, scale, key_row, v.width, place, bias);
    join(
        tiles, rows, [&](int query) { return query < queries ? y + w.row(first + query) * v.width + w.c0 : nullptr; },
        [&](int query, float log_sum) {
            if (log_sums) log_sums[w.row(first + query) * gridDim.y + blockIdx.y] = log_sum;
        });
}

#define ATTENTION(T, TWO_WAY, VIT)                                                                                                            \
    KERNEL(two_way_attention_##T, THREADS, 4, (const T *q, const T *k, const T *v, T *y, const int *live, int queries, int keys, int width, int dim), \
           TWO_WAY(q, k, v, y, live, queries, keys, width, dim))                                                                                    \
    KERNEL(vit_attention_##T, THREADS, 3,                                                                                                        \
           (const T *qkv, const float *qkv_bias, const float *table_d, const float *table_h, const float *table_w, T *y, float *log_sums, int s, int edge, \
            int width, int dim, int lines),                                                                                                   \
           VIT(qkv, y, log_sums, {qkv_bias, table_d, table_h, table_w, s, edge, width, dim, lines}))
ATTENTION(f32, two_way, vit)
ATTENTION(f16, two_way_matrix, vit_matrix)
ATTENTION(bf16, two_way_matrix, vit_matrix)
