// Softmax attention, scores never in global memory: see lib/attention.cuh.
#include "lib/attention.cuh"

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

// The image encoder's attention. Grid (tiles of query lines, heads, windows). A tile is `lines` lines along w, at most 8, of one window.
template <class T> __device__ __forceinline__ void vit(const T *qkv, T *y, const VitShape &v) {
    SHARED_MEMORY(shared);
    Tiles tiles(shared, v.dim);
    VitWindow window(v);
    int line0 = blockIdx.x * v.lines, lines = min(v.lines, window.ed * window.eh - line0);
    if (lines <= 0) return;
    int queries = lines * window.ew, first = line0 * window.ew, query = threadIdx.x / 4;
    bring<T>(tiles.q, tiles.row, queries, v.dim, [&](int r) { return qkv + window.row(first + r) * 3 * v.width + window.c0; });
    __syncthreads();
    Positions positions(tiles.end(), v);
    positions.form(v, window, tiles, line0, lines);
    __syncthreads();
    Row state;
    vit_attend(v, window, tiles, positions, qkv, queries, state);
    if (query < queries) write(state, y + window.row(first + query) * v.width + window.c0, v.dim);
}

#define ATTENTION(T)                                                                                                                          \
    KERNEL(two_way_attention_##T, THREADS, 4, (const T *q, const T *k, const T *v, T *y, const int *live, int queries, int keys, int width, int dim), \
           two_way(q, k, v, y, live, queries, keys, width, dim))                                                                                    \
    KERNEL(vit_attention_##T, THREADS, 4,                                                                                                        \
           (const T *qkv, const float *qkv_bias, const float *table_d, const float *table_h, const float *table_w, T *y, int s, int edge,     \
            int width, int dim, int lines),                                                                                                   \
           vit(qkv, y, {qkv_bias, table_d, table_h, table_w, s, edge, width, dim, lines}))
ATTENTION(f32)
ATTENTION(f16)
ATTENTION(bf16)
