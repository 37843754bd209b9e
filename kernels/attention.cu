// Softmax attention, scores never in global memory.
//
//   block    32 queries of one head, 128 threads; keys in tiles of 32 through shared memory
//   thread   a quarter of a query's row: 8 of its 32 scores, then every fourth channel of its result
//
// A row's running maximum and sum live in the registers of its four threads. Heads have at most 64 channels. Arithmetic is float throughout.
#include "lib/base.cuh"

constexpr int QUERIES = 32, KEYS = 32, THREADS = 128, MOST_DIM = 64;

// Shared memory of a block for heads of `dim` channels: queries, keys, values, scores.
struct Tiles {
    float *q, *k, *v, *scores;
    int row;

    __device__ __forceinline__ Tiles(unsigned char *shared, int dim) {
        row = dim + 1;
        q = reinterpret_cast<float *>(shared), k = q + QUERIES * row, v = k + KEYS * row, scores = v + KEYS * row;
    }
    __device__ __forceinline__ float *end() const { return scores + QUERIES * (KEYS + 1); }
};

// A query's state, its share of the result in `acc`.
struct Row {
    float top, sum, acc[MOST_DIM / 4];
};

// Brings `count` rows of a tile in: `row_of(i)` is where row i's `dim` values start.
template <class T, class F> __device__ __forceinline__ void bring(float *to, int row, int count, int dim, F row_of) {
    for (int i = threadIdx.x; i < 32 * dim; i += THREADS) {
        int r = i / dim, c = i % dim;
        const T *from = r < count ? row_of(r) : nullptr;
        to[r * row + c] = from ? to_float(from[c]) : 0.0f;
    }
}

// Goes over all keys. `bias(query, key)` is added to the scaled score.
template <class T, class K, class V, class B>
__device__ __forceinline__ void attend(const Tiles &t, Row &state, int keys, int dim, float scale, K key_row, V value_row, B bias) {
    int query = threadIdx.x / 4, part = threadIdx.x % 4;
    float *scores = t.scores + query * (KEYS + 1);
    for (int k0 = 0; k0 < keys; k0 += KEYS) {
        int count = min(KEYS, keys - k0);
        __syncthreads();
        bring<T>(t.k, t.row, count, dim, [&](int r) { return key_row(k0 + r); });
        bring<T>(t.v, t.row, count, dim, [&](int r) { return value_row(k0 + r); });
        __syncthreads();
        float s[8], top = state.top;
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
            top = fmaxf(top, s[j]);
        }
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        float fade = expf(state.top - top), sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float e = expf(s[j] - top);
            scores[part + 4 * j] = e;
            sum += e;
        }
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        state.sum = state.sum * fade + sum;
        state.top = top;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < MOST_DIM / 4; i++) {
            int c = part + 4 * i;
            if (c >= dim) break;
            float more = 0.0f;
            for (int k = 0; k < KEYS; k++) more += scores[k] * t.v[k * t.row + c];
            state.acc[i] = state.acc[i] * fade + more;
        }
    }
}

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

// The image encoder's attention: qkv [n s^3, 3 width] in the grid's order, windows of `edge` (s: the whole grid). With query (d, h, x) and key (kd, kh, kw)
// of a window, the score is scale q.k + A[kw] + B[kd, kw] + C[kh, kw]: A[kw] = q[d,h,x].R_d[d,kw], B[p, kw] = q[d,h,p].R_h[h,kw], C[p, kw] = q[d,h,p].R_w[p,kw],
// R_a[p, n] = table_a[p - n + edge - 1]. Positions beyond the grid have q, k and v equal to the bias; together their keys weigh
// exp(scale q.k_bias) sum exp(A + B + C) over them, which factors for each kw: the state starts from it.
//
// Grid (tiles of query lines, heads, windows). A tile is `lines` lines along w, at most 8, of one window.
template <class T>
__device__ __forceinline__ void vit(const T *qkv, const float *qkv_bias, const float *table_d, const float *table_h, const float *table_w, T *y, int s,
                                    int edge, int width, int dim, int lines) {
    SHARED_MEMORY(shared);
    Tiles tiles(shared, dim);
    int across = (s + edge - 1) / edge, cell = blockIdx.z % (across * across * across), item = blockIdx.z / (across * across * across);
    int d0 = cell / across / across * edge, h0 = cell / across % across * edge, w0 = cell % across * edge;
    int ed = min(edge, s - d0), eh = min(edge, s - h0), ew = min(edge, s - w0);
    int line0 = blockIdx.x * lines, c0 = blockIdx.y * dim;
    lines = min(lines, ed * eh - line0);
    if (lines <= 0) return;
    int queries = lines * ew;
    auto row = [&](int r) { return (((int64)item * s + d0 + r / ew / eh) * s + h0 + r / ew % eh) * s + w0 + r % ew; };
    bring<T>(tiles.q, tiles.row, queries, dim, [&](int r) { return qkv + row(line0 * ew + r) * 3 * width + c0; });
    __syncthreads();

    float *a = tiles.end(), *b = a + QUERIES * edge, *c = b + lines * edge * edge;
    auto dot = [&](const float *q, const float *table) {
        float sum = 0.0f;
        for (int i = 0; i < dim; i++) sum += q[i] * table[i];
        return sum;
    };
    for (int i = threadIdx.x; i < queries * edge; i += THREADS) {
        int d = (line0 + i / edge / ew) / eh;
        a[i] = dot(tiles.q + i / edge * tiles.row, table_d + (int64)(d - i % edge + edge - 1) * dim);
    }
    for (int i = threadIdx.x; i < lines * edge * edge; i += THREADS) {
        int line = i / edge / edge, p = i / edge % edge, kw = i % edge, h = (line0 + line) % eh;
        const float *q = p < ew ? tiles.q + (line * ew + p) * tiles.row : qkv_bias + c0;
        b[i] = dot(q, table_h + (int64)(h - kw + edge - 1) * dim);
        c[i] = dot(q, table_w + (int64)(p - kw + edge - 1) * dim);
    }
    __syncthreads();

    int query = threadIdx.x / 4;
    const float *mine_a = a + query * edge, *mine_b = b + query / ew * edge * edge, *mine_c = c + query / ew * edge * edge;
    float scale = rsqrtf((float)dim);
    Row state = {MINUS_INFINITY, 0.0f, {}};
    if ((ed < edge || eh < edge || ew < edge) && query < queries) {
        // In two passes over kw: the largest logarithm of a weight, then the sum relative to it.
        auto weight = [&](int kw) {
            float top_b = MINUS_INFINITY, top_c = MINUS_INFINITY;
            for (int p = 0; p < edge; p++) top_b = fmaxf(top_b, mine_b[p * edge + kw]), top_c = fmaxf(top_c, mine_c[p * edge + kw]);
            float b_in = 0.0f, b_out = 0.0f, c_in = 0.0f, c_out = 0.0f;
            for (int p = 0; p < edge; p++) {
                float eb = expf(mine_b[p * edge + kw] - top_b), ec = expf(mine_c[p * edge + kw] - top_c);
                if (p < ed) b_in += eb; else b_out += eb;
                if (p < eh) c_in += ec; else c_out += ec;
            }
            float padded = kw < ew ? b_out * (c_in + c_out) + b_in * c_out : (b_in + b_out) * (c_in + c_out);
            return top_b + top_c + logf(padded) + mine_a[kw];
        };
        float top = MINUS_INFINITY, sum = 0.0f;
        for (int kw = 0; kw < edge; kw++) {
            float w = weight(kw), higher = fmaxf(top, w);
            if (w > MINUS_INFINITY) sum = sum * expf(top - higher) + expf(w - higher), top = higher;
        }
        state.top = scale * dot(tiles.q + query * tiles.row, qkv_bias + width + c0) + top + logf(sum);
        state.sum = 1.0f;
#pragma unroll
        for (int i = 0; i < MOST_DIM / 4; i++) {
            int channel = threadIdx.x % 4 + 4 * i;
            if (channel < dim) state.acc[i] = qkv_bias[2 * width + c0 + channel];
        }
    }
    auto bias = [&](int q, int key) {
        if (q >= queries) return 0.0f;
        int kw = key % ew, kh = key / ew % eh, kd = key / ew / eh;
        return mine_a[kw] + mine_b[kd * edge + kw] + mine_c[kh * edge + kw];
    };
    attend<T>(
        tiles, state, ed * eh * ew, dim, scale, [&](int r) { return qkv + row(r) * 3 * width + width + c0; },
        [&](int r) { return qkv + row(r) * 3 * width + 2 * width + c0; }, bias);
    if (query < queries) write(state, y + row(line0 * ew + query) * width + c0, dim);
}

#define ATTENTION(T)                                                                                                                          \
    KERNEL(two_way_attention_##T, THREADS, 4, (const T *q, const T *k, const T *v, T *y, const int *live, int queries, int keys, int width, int dim), \
           two_way(q, k, v, y, live, queries, keys, width, dim))                                                                                    \
    KERNEL(vit_attention_##T, THREADS, 4,                                                                                                        \
           (const T *qkv, const float *qkv_bias, const float *table_d, const float *table_h, const float *table_w, T *y, int s, int edge,     \
            int width, int dim, int lines),                                                                                                   \
           vit(qkv, qkv_bias, table_d, table_h, table_w, y, s, edge, width, dim, lines))
ATTENTION(f32)
ATTENTION(f16)
ATTENTION(bf16)
