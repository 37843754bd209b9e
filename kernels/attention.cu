// Softmax attention, scores never in global memory: on tensor cores (lib/attention_matrix.cuh), and
// for float32 in plain arithmetic as well (lib/attention.cuh).
#include "lib/attention_matrix.cuh"

template <class T> __device__ __forceinline__ void write(const Row &state, T *to, int dim) {
#pragma unroll
    for (int i = 0; i < MOST_DIM / 4; i++) {
        int c = threadIdx.x % 4 + 4 * i;
        if (c < dim) to[c] = from_float<T>(state.acc[i] / state.sum);
    }
}

// Attention of q [queries, width] to k and v [keys, width], each head in its own channels. Grid
// (queries / 32, heads). If `live` is given, it is the number of valid keys, and the rows after
// them are padding.
template <class T>
__device__ __forceinline__ void two_way(const T *q, const T *k, const T *v, T *y, const int *live,
                                        int queries, int keys, int width, int dim) {
    SHARED_MEMORY(shared);
    if (live) keys = min(keys, *live);
    Tiles tiles(shared, dim);
    int q0 = blockIdx.x * QUERIES, c0 = blockIdx.y * dim, query = q0 + threadIdx.x / 4;
    load_tile<T>(tiles.q, tiles.row, queries - q0, dim,
                 [&](int r) { return q + (int64)(q0 + r) * width + c0; });
    Row state = {MINUS_INFINITY, 0.0f, {}};
    attend<T>(
        tiles, state, keys, dim, rsqrtf((float)dim),
        [&](int r) { return k + (int64)r * width + c0; },
        [&](int r) { return v + (int64)r * width + c0; }, [](int, int) { return 0.0f; });
    if (query < queries) write(state, y + (int64)query * width + c0, dim);
}

// The image encoder's attention. Grid (tiles of query lines, heads, windows). A tile is `lines`
// lines along w, at most 8, of one window. If the gradient will be computed on tensor cores,
// `log_sums` [row, head] gets the base-2 logarithm of the sum of a query's key weights, and
// `values` [row, width] the values of y before rounding.
template <class T>
__device__ __forceinline__ void vit(const T *qkv, T *y, float *, float *, const VitShape &v) {
    SHARED_MEMORY(shared);
    Tiles tiles(shared, v.dim);
    VitWindow window(v);
    int line0 = blockIdx.x * v.lines, lines = min(v.lines, window.ed * window.eh - line0);
    if (lines <= 0) return;
    int queries = lines * window.ew, first = line0 * window.ew, query = threadIdx.x / 4;
    load_tile<T>(tiles.q, tiles.row, queries, v.dim,
                 [&](int r) { return qkv + window.row(first + r) * 3 * v.width + window.c0; });
    __syncthreads();
    Positions positions(tiles.end(), v);
    positions.form(v, window, tiles.q, tiles.row, line0, lines);
    __syncthreads();
    Row state;
    vit_attend(v, window, tiles, positions, qkv, queries, state);
    if (query < queries) write(state, y + window.row(first + query) * v.width + window.c0, v.dim);
}

// Both kinds of attention on tensor cores.
// tensor cores
template <class P, class T = typename Products<P>::Element>
__device__ __forceinline__ void two_way_matrix(const T *q, const T *k, const T *v, T *y,
                                               const int *live, int queries, int keys, int width,
                                               int dim) {
    SHARED_MEMORY(shared);
    if (live) keys = min(keys, *live);
    MatrixTiles<T> tiles(shared, dim);
    int q0 = blockIdx.x * QUERIES, c0 = blockIdx.y * dim;
    auto load_step_async = [&](int step) {
        int first = step * STEP;
        if (first < keys) {
            tiles.load_tile_async(tiles.buffer(tiles.k, step), tiles.buffer(tiles.v, step), STEP,
                                  [&](int r, const T *&a, const T *&b) {
                                      int64 at = (int64)min(first + r, keys - 1) * width + c0;
                                      a = k + at, b = v + at;
                                      return first + r < keys;
                                  });
        }
        copy_commit();
    };
    tiles.load_tile_async(tiles.q, (T *)nullptr, QUERIES, [&](int r, const T *&a, const T *&b) {
        a = b = q + (int64)min(q0 + r, queries - 1) * width + c0;
        return q0 + r < queries;
    });
    load_step_async(0);
    copy_wait<0>();
    __syncthreads();
    MatrixRows rows = {{MINUS_INFINITY, MINUS_INFINITY}, {}, {}};
    float scale = LOG2_E * rsqrtf((float)dim);
    attend<P>(tiles, rows, keys, load_step_async, [&](int step, int j, float (&s)[4]) {
        int count = keys - step * STEP - half_of_step() * 32 - j * 8;
#pragma unroll
        for (int e = 0; e < 4; e++)
            s[e] = column_of_element(e) < count ? scale * s[e] : MINUS_INFINITY;
    });
    join(
        tiles, rows,
        [&](int query) {
            return q0 + query < queries ? y + (int64)(q0 + query) * width + c0 : nullptr;
        },
        [](int, float) { return (float *)nullptr; });
}

// Grid (tiles of query lines, heads, windows). A tile is 32 slots of tokens.
// tensor cores
template <class P, class T = typename Products<P>::Element>
__device__ __forceinline__ void vit_matrix(const T *qkv, T *y, float *log_sums, float *values,
                                           const VitShape &v) {
    SHARED_MEMORY(shared);
    MatrixTiles<T> tiles(shared, v.dim);
    VitWindow w(v);
    Slots slots(v);
    int key_lines = w.ed * w.eh, line0 = blockIdx.x * v.lines,
        lines = min(v.lines, key_lines - line0), edge = v.edge, dim = v.dim, stride = slots.stride;
    if (lines <= 0) return;
    int slot0 = line0 << slots.shift, keys = key_lines << slots.shift, parts = slots.parts(),
        half = half_of_step();
    // From here on these pointers start at the window's first token and the head's first channel.
    int wide = 3 * v.width;
    int64 origin = w.origin();
    qkv += origin * wide + w.c0, y += origin * v.width + w.c0;
    if (log_sums) log_sums += origin * gridDim.y + blockIdx.y, values += origin * v.width + w.c0;
    auto load_step_async = [&](int step) {
        if (step * STEP < keys) {
            tiles.load_tile_async(tiles.buffer(tiles.k, step), tiles.buffer(tiles.v, step), STEP,
                                  [&](int r, const T *&a, const T *&b) {
                                      int at;
                                      bool is_there = slots.row(w, step * STEP + r, at);
                                      a = qkv + (int64)at * wide + v.width, b = a + v.width;
                                      return is_there;
                                  });
        }
        copy_commit();
    };
    tiles.load_tile_async(tiles.q, (T *)nullptr, QUERIES, [&](int r, const T *&a, const T *&b) {
        int at;
        bool is_there = slots.row(w, slot0 + r, at);
        a = b = qkv + (int64)at * wide;
        return is_there;
    });
    copy_commit();
    load_step_async(0);
    copy_wait<1>();
    __syncthreads();
    SlotPositions p(tiles.end(), v, slots);
    // The weight of the padded keys of each column kw for each line of queries.
    float *columns = p.end;
    form_slots<P>(p, v, w, slots, tiles, columns + v.lines * edge, line0, lines);
    bool padded = w.is_padded(edge);
    if (padded) {
        for (int i = threadIdx.x; i < lines * edge; i += THREADS) {
            int line = i / edge, kw = i - line * edge;
            columns[i] = PaddedColumn(w, p.b + line * edge * stride, p.c + line * edge * stride,
                                      edge, kw, stride)
                             .log_weight(kw < w.ew);
        }
        __syncthreads();
    }
    float scale = rsqrtf((float)dim), a_terms[4][4];
    MatrixRows rows = {{MINUS_INFINITY, MINUS_INFINITY}, {}, {}};
    int line_of[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int slot = own_rows() + row_of_element(2 * i);
        line_of[i] = (own_rows() / 8 + i) >> parts;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float a[2];
            load(a, p.a + slot * stride + ((half * 4 + j) & ((1 << parts) - 1)) * 8 +
                        column_of_element(0));
            a_terms[j][2 * i] = LOG2_E * a[0], a_terms[j][2 * i + 1] = LOG2_E * a[1];
        }
        // All padded keys count as one, which starts the row. Lines after the last have none.
        if (!padded || half || line_of[i] >= lines) continue;
        const float *a = p.a + slot * stride, *column = columns + line_of[i] * edge;
        float row_max = MINUS_INFINITY, sum = 0.0f, score = 0.0f;
        for (int kw = threadIdx.x % 4; kw < edge; kw += 4)
            row_max = fmaxf(row_max, column[kw] + a[kw]);
        row_max = fmaxf(row_max, __shfl_xor_sync(0xffffffffu, row_max, 1));
        row_max = fmaxf(row_max, __shfl_xor_sync(0xffffffffu, row_max, 2));
        for (int kw = threadIdx.x % 4; kw < edge; kw += 4)
            sum += expf(column[kw] + a[kw] - row_max);
        for (int channel = threadIdx.x % 4; channel < dim; channel += 4)
            score +=
                to_float(tiles.q[slot * tiles.row + channel]) * v.bias[v.width + w.c0 + channel];
        rows.row_max[i] = LOG2_E * (scale * row_sum(score) + row_max + logf(row_sum(sum)));
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
    const float *b_terms = p.b + line_of[0] * edge * stride,
                *c_terms = p.c + line_of[0] * edge * stride;
    int to_second = (line_of[1] - line_of[0]) * edge * stride;
    scale *= LOG2_E;
    attend<P>(tiles, rows, keys, load_step_async, [&](int step, int j, float (&s)[4]) {
        int fragment = step * 8 + half * 4 + j, key_line = fragment >> parts,
            kw = (fragment & ((1 << parts) - 1)) * 8 + column_of_element(0);
        bool is_line = key_line < key_lines;
        key_line = min(key_line, key_lines - 1);
        int kd = w.plane(key_line), kh = key_line - kd * w.eh;
        float b[2][2], c[2][2];
        load(b[0], b_terms + kd * stride + kw), load(b[1], b_terms + to_second + kd * stride + kw);
        load(c[0], c_terms + kh * stride + kw), load(c[1], c_terms + to_second + kh * stride + kw);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float score =
                scale * s[e] + a_terms[j][e] + LOG2_E * (b[e / 2][e % 2] + c[e / 2][e % 2]);
            s[e] = is_line && kw + e % 2 < w.ew ? score : MINUS_INFINITY;
        }
    });
    auto row_to = [&](int query, int &at) { return slots.row(w, slot0 + query, at); };
    join(
        tiles, rows,
        [&](int query) {
            int at;
            return row_to(query, at) ? y + (int64)at * v.width : nullptr;
        },
        [&](int query, float log_sum) -> float * {
            int at;
            row_to(query, at);
            if (!log_sums) return nullptr;
            // Four lanes share a query.
            if (threadIdx.x % 4 == 0) log_sums[(int64)at * gridDim.y] = log_sum;
            return values + (int64)at * v.width;
        });
}

#define ATTENTION(NAME, T, TWO_WAY, VIT, TWO_WAY_BLOCKS, VIT_BLOCKS)                               \
    KERNEL(two_way_attention_##NAME, THREADS, TWO_WAY_BLOCKS,                                      \
           (const T *q, const T *k, const T *v, T *y, const int *live, int queries, int keys,      \
            int width, int dim),                                                                   \
           TWO_WAY(q, k, v, y, live, queries, keys, width, dim))                                   \
    KERNEL(vit_attention_##NAME, THREADS, VIT_BLOCKS,                                              \
           (const T *qkv, const float *qkv_bias, const float *table_d, const float *table_h,       \
            const float *table_w, T *y, float *log_sums, float *values, int s, int edge,           \
            int width, int dim, int lines),                                                        \
           VIT(qkv, y, log_sums, values,                                                           \
               {qkv_bias, table_d, table_h, table_w, s, edge, width, dim, lines}))
ATTENTION(f32, f32, two_way, vit, 4, 3)
ATTENTION(f16, f16, two_way_matrix<f16>, vit_matrix<f16>, 4, 3)
ATTENTION(bf16, bf16, two_way_matrix<bf16>, vit_matrix<bf16>, 4, 3)
// Tiles of floats leave room for two blocks.
ATTENTION(tf32, f32, two_way_matrix<tf32>, vit_matrix<tf32>, 2, 2)
ATTENTION(tf32x3, f32, two_way_matrix<tf32x3>, vit_matrix<tf32x3>, 2, 2)
