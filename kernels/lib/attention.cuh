// Softmax attention of a tile of queries, scores never in global memory: the parts that the forward
// pass and the gradients share.
//
//   block    32 queries of one head, 128 threads; keys in tiles of 32 through shared memory
//   thread   a quarter of a query's row: 8 of its 32 scores, then every fourth channel of its
//            result
//
// A row's running maximum and sum live in the registers of its four threads. Heads have at most 64
// channels. Arithmetic is float throughout.
#pragma once
#include "lib/base.cuh"

constexpr int QUERIES = 32, KEYS = 32, THREADS = 128, MOST_DIM = 64;

// Shared memory of a block for heads of `dim` channels: queries, keys, values, scores.
struct Tiles {
    float *q, *k, *v, *scores;
    int row;

    __device__ __forceinline__ Tiles(unsigned char *shared, int dim) {
        row = dim + 1;
        q = reinterpret_cast<float *>(shared), k = q + QUERIES * row, v = k + KEYS * row,
            scores = v + KEYS * row;
    }
    __device__ __forceinline__ float *end() const { return scores + QUERIES * (KEYS + 1); }
};

// A query's state, with its share of the result in `acc`.
struct Row {
    float row_max, sum, acc[MOST_DIM / 4];
};

// Loads `count` rows of a tile: `row_of(i)` is the address of row i's `dim` values.
template <class T, class F>
__device__ __forceinline__ void load_tile(float *to, int row, int count, int dim, F row_of) {
    for (int i = threadIdx.x; i < 32 * dim; i += THREADS) {
        int r = i / dim, c = i % dim;
        const T *from = r < count ? row_of(r) : nullptr;
        to[r * row + c] = from ? to_float(from[c]) : 0.0f;
    }
}

// Goes over all keys. `bias(query, key)` is added to the scaled score.
template <class T, class K, class V, class B>
__device__ __forceinline__ void attend(const Tiles &t, Row &state, int keys, int dim, float scale,
                                       K key_row, V value_row, B bias) {
    int query = threadIdx.x / 4, part = threadIdx.x % 4;
    float *scores = t.scores + query * (KEYS + 1);
    for (int k0 = 0; k0 < keys; k0 += KEYS) {
        int count = min(KEYS, keys - k0);
        __syncthreads();
        load_tile<T>(t.k, t.row, count, dim, [&](int r) { return key_row(k0 + r); });
        load_tile<T>(t.v, t.row, count, dim, [&](int r) { return value_row(k0 + r); });
        __syncthreads();
        float s[8], row_max = state.row_max;
#pragma unroll
        for (int j = 0; j < 8; j++) s[j] = 0.0f;
        for (int c = 0; c < dim; c++) {
            float q = t.q[query * t.row + c];
#pragma unroll
            for (int j = 0; j < 8; j++) s[j] += q * t.k[(part + 4 * j) * t.row + c];
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            int key = part + 4 * j;
            s[j] = key < count ? scale * s[j] + bias(query, k0 + key) : MINUS_INFINITY;
            row_max = fmaxf(row_max, s[j]);
        }
        row_max = fmaxf(row_max, __shfl_xor_sync(0xffffffffu, row_max, 1));
        row_max = fmaxf(row_max, __shfl_xor_sync(0xffffffffu, row_max, 2));
        float rescale = expf(state.row_max - row_max), sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float e = expf(s[j] - row_max);
            scores[part + 4 * j] = e;
            sum += e;
        }
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        state.sum = state.sum * rescale + sum;
        state.row_max = row_max;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < MOST_DIM / 4; i++) {
            int c = part + 4 * i;
            if (c >= dim) break;
            float more = 0.0f;
            for (int k = 0; k < KEYS; k++) more += scores[k] * t.v[k * t.row + c];
            state.acc[i] = state.acc[i] * rescale + more;
        }
    }
}

// Sums over the four threads of a row.
__device__ __forceinline__ float row_sum(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

template <class T> __device__ __forceinline__ float dot(const T *a, const float *b, int dim) {
    float sum = 0.0f;
    for (int i = 0; i < dim; i++) sum += to_float(a[i]) * b[i];
    return sum;
}

// The dot product of rows that start at multiples of 16 bytes and whose length is a multiple of 8.
template <class T> __device__ __forceinline__ float dot_whole(const T *a, const float *b, int dim) {
    float sum = 0.0f;
    for (int i = 0; i < dim; i += 8) {
        float x[8], y[8];
        load(x, a + i), load(y, b + i);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += x[j] * y[j];
    }
    return sum;
}

// The input of the image encoder's attention. qkv [n s^3, 3 width] is in the grid's order, windows
// have `edge` tokens along an axis (s: the whole grid). With query (d, h, x) and key (kd, kh, kw)
// of a window, the score is scale q.k + A[kw] + B[kd, kw] + C[kh, kw]: A[kw] = q[d,h,x].R_d[d,kw],
// B[p, kw] = q[d,h,p].R_h[h,kw], C[p, kw] = q[d,h,p].R_w[p,kw], R_a[p, n] =
// table_a[p - n + edge - 1]. Positions beyond the grid have q, k and v equal to the bias; the total
// weight of their keys is exp(scale q.k_bias) sum exp(A + B + C) over them, which factors for each
// kw.
struct VitShape {
    const float *bias, *table_d, *table_h, *table_w;
    int s, edge, width, dim, lines;
};

// A window's part of the grid, for the head of this block; grid (tiles, heads, windows).
struct VitWindow {
    int s, d0, h0, w0, ed, eh, ew, item, c0;
    // Factors to multiply by instead of dividing by ew and eh: exact for fewer than 2^31 / 32
    // tokens.
    unsigned by_w, by_h;

    __device__ __forceinline__ VitWindow(const VitShape &v) {
        int across = (v.s + v.edge - 1) / v.edge, cell = blockIdx.z % (across * across * across);
        s = v.s, item = blockIdx.z / (across * across * across), c0 = blockIdx.y * v.dim;
        d0 = cell / across / across * v.edge, h0 = cell / across % across * v.edge,
            w0 = cell % across * v.edge;
        ed = min(v.edge, s - d0), eh = min(v.edge, s - h0), ew = min(v.edge, s - w0);
        by_w = ((1u << 31) + ew - 1) / ew, by_h = ((1u << 31) + eh - 1) / eh;
    }
    // The plane along d that contains a line.
    __device__ __forceinline__ int plane(int line) const {
        return (int)((unsigned long long)line * by_h >> 31);
    }
    // The position of token r in the window.
    __device__ __forceinline__ void split(int r, int &d, int &h, int &w) const {
        int line = (int)((unsigned long long)r * by_w >> 31);
        w = r - line * ew, d = plane(line), h = line - d * eh;
    }
    // The grid's row of the window's token r.
    __device__ __forceinline__ int64 row(int r) const {
        int d, h, w;
        split(r, d, h, w);
        return (((int64)item * s + d0 + d) * s + h0 + h) * s + w0 + w;
    }
    // The grid's row of its first token.
    __device__ __forceinline__ int64 origin() const {
        return (((int64)item * s + d0) * s + h0) * s + w0;
    }
    __device__ __forceinline__ int tokens() const { return ed * eh * ew; }
    __device__ __forceinline__ bool is_padded(int edge) const {
        return ed < edge || eh < edge || ew < edge;
    }
};

// The position terms of a tile of query lines, in shared memory: A for each query, B and C for each
// line.
struct Positions {
    float *a, *b, *c;
    int edge;

    __device__ __forceinline__ Positions(float *at, const VitShape &v)
        : a(at), b(at + QUERIES * v.edge), c(b + v.lines * v.edge * v.edge), edge(v.edge) {}
    __device__ __forceinline__ float *end(int lines) const { return c + lines * edge * edge; }

    // Computed from the queries of `lines` lines from `line0` on, rows of `row` values.
    template <class T>
    __device__ __forceinline__ void form(const VitShape &v, const VitWindow &w, const T *queries,
                                         int row, int line0, int lines) const {
        int dim = v.dim;
        for (int i = threadIdx.x; i < lines * w.ew * edge; i += THREADS) {
            int d = (line0 + i / edge / w.ew) / w.eh;
            a[i] = dot(queries + i / edge * row, v.table_d + (int64)(d - i % edge + edge - 1) * dim,
                       dim);
        }
        for (int i = threadIdx.x; i < lines * edge * edge; i += THREADS) {
            int line = i / edge / edge, p = i / edge % edge, kw = i % edge,
                h = (line0 + line) % w.eh;
            const float *in_h = v.table_h + (int64)(h - kw + edge - 1) * dim,
                        *in_w = v.table_w + (int64)(p - kw + edge - 1) * dim;
            if (p < w.ew) {
                const T *q = queries + (line * w.ew + p) * row;
                b[i] = dot(q, in_h, dim), c[i] = dot(q, in_w, dim);
            } else {
                b[i] = dot(v.bias + w.c0, in_h, dim), c[i] = dot(v.bias + w.c0, in_w, dim);
            }
        }
    }
    // What a key adds to a query's score.
    __device__ __forceinline__ float of(const VitWindow &w, int query, int kd, int kh,
                                        int kw) const {
        int line = query / w.ew * edge * edge;
        return a[query * edge + kw] + b[line + kd * edge + kw] + c[line + kh * edge + kw];
    }
};

// Column kw of a line's B and C, as weights relative to their largest, summed inside the grid and
// beyond.
struct PaddedColumn {
    float top_b, top_c, b_in, b_out, c_in, c_out;

    // Rows of B and C are `row` values apart.
    __device__ __forceinline__ PaddedColumn(const VitWindow &w, const float *b, const float *c,
                                            int edge, int kw, int row) {
        top_b = MINUS_INFINITY, top_c = MINUS_INFINITY, b_in = 0.0f, b_out = 0.0f, c_in = 0.0f,
            c_out = 0.0f;
        for (int p = 0; p < edge; p++)
            top_b = fmaxf(top_b, b[p * row + kw]), top_c = fmaxf(top_c, c[p * row + kw]);
        for (int p = 0; p < edge; p++) {
            float eb = expf(b[p * row + kw] - top_b), ec = expf(c[p * row + kw] - top_c);
            if (p < w.ed) b_in += eb; else b_out += eb;
            if (p < w.eh) c_in += ec; else c_out += ec;
        }
    }
    // The padded positions' weight, relative to exp(top_b + top_c).
    __device__ __forceinline__ float weight(bool inside) const {
        return inside ? b_out * (c_in + c_out) + b_in * c_out : (b_in + b_out) * (c_in + c_out);
    }
    __device__ __forceinline__ float log_weight(bool inside) const {
        return top_b + top_c + logf(weight(inside));
    }
};

// The logarithm of the total weight of a query's padded keys, without their q.k: in two passes over
// kw, first the largest logarithm, then the sum relative to it.
__device__ __forceinline__ float padded_positions(const VitWindow &w, const Positions &p,
                                                  int query) {
    int edge = p.edge, line = query / w.ew * edge * edge;
    float row_max = MINUS_INFINITY, sum = 0.0f;
    for (int kw = 0; kw < edge; kw++) {
        float weight =
                  PaddedColumn(w, p.b + line, p.c + line, edge, kw, edge).log_weight(kw < w.ew) +
                  p.a[query * edge + kw],
              higher = fmaxf(row_max, weight);
        if (weight > MINUS_INFINITY)
            sum = sum * expf(row_max - higher) + expf(weight - higher), row_max = higher;
    }
    return row_max + logf(sum);
}

// A query's attention to the whole window: its state, and the padded keys' score, minus infinity if
// there are none.
template <class T>
__device__ __forceinline__ float vit_attend(const VitShape &v, const VitWindow &w, const Tiles &t,
                                            const Positions &p, const T *qkv, int queries,
                                            Row &state) {
    int query = threadIdx.x / 4, dim = v.dim;
    float scale = rsqrtf((float)dim);
    state = {MINUS_INFINITY, 0.0f, {}};
    if (w.is_padded(v.edge) && query < queries) {
        state.row_max = scale * dot(t.q + query * t.row, v.bias + v.width + w.c0, dim) +
                        padded_positions(w, p, query);
        state.sum = 1.0f;
#pragma unroll
        for (int i = 0; i < MOST_DIM / 4; i++) {
            int channel = threadIdx.x % 4 + 4 * i;
            if (channel < dim) state.acc[i] = v.bias[2 * v.width + w.c0 + channel];
        }
    }
    float padded = state.row_max;
    auto bias = [&](int q, int key) {
        return q < queries ? p.of(w, q, key / w.ew / w.eh, key / w.ew % w.eh, key % w.ew) : 0.0f;
    };
    attend<T>(
        t, state, w.tokens(), dim, scale,
        [&](int r) { return qkv + w.row(r) * 3 * v.width + v.width + w.c0; },
        [&](int r) { return qkv + w.row(r) * 3 * v.width + 2 * v.width + w.c0; }, bias);
    return padded;
}
