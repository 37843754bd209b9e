// Softmax attention on tensor cores, for elements of 16 bits; scores and weights never leave registers.
//
//   block    32 queries of one head, 4 warps; keys in steps of 64 through two buffers filled by asynchronous copies
//   warp     16 of the queries against half of each step's keys, with a running softmax of its own; at the end the two warps of the same queries join theirs
//   thread   rows lane / 4 and lane / 4 + 8 of its warp's queries: two of every eight scores, two of every eight channels
//
// Heads have at most 64 channels, in memory rounded up to a multiple of 16 with zeros. Sums and softmax are in float; weights are rounded to 16 bits for the product
// with the values. Exponentials are of base 2: scores come multiplied by log2 e.
#pragma once
#include "lib/attention.cuh"
#include "lib/matrix.cuh"

constexpr int STEP = 64;
constexpr float LOG2_E = 1.4426950408889634f;

// Shared memory of a block: queries, two steps of keys and of values, and what `place` says of each key.
template <class T> struct MatrixTiles {
    T *q, *k, *v;
    int *places;
    int dim, row;
    // The row and the 8 channels that this thread brings in first, and how far the next ones are: divisions are dear.
    int first_row, first_chunk, rows_on, chunks_on;

    __device__ __forceinline__ MatrixTiles(unsigned char *shared, int dim) : dim(dim) {
        // Eight more, so that the rows of a matrix lie in different banks.
        row = (dim + 15) / 16 * 16 + 8;
        int chunks = (row - 8) / 8;
        first_row = threadIdx.x / chunks, first_chunk = threadIdx.x % chunks, rows_on = THREADS / chunks, chunks_on = THREADS % chunks;
        q = reinterpret_cast<T *>(shared), k = q + QUERIES * row, v = k + 2 * STEP * row;
        places = reinterpret_cast<int *>(v + 2 * STEP * row);
    }
    __device__ __forceinline__ float *end() const { return reinterpret_cast<float *>(places + 2 * STEP); }

    // Starts bringing in rows `first` to `first + rows`, of which those from `count` on are zero: `row_of(i)` is where row i's values start, a multiple of 16 bytes
    // if `dim` is one of 8. With `also`, brings the values that lie `apart` further there too.
    template <class F> __device__ __forceinline__ void bring(T *to, int rows, int first, int count, F row_of, T *also = nullptr, int64 apart = 0) const {
        int chunks = (row - 8) / 8;
        for (int r = first_row, chunk = first_chunk; r < rows; r += rows_on, chunk += chunks_on) {
            if (chunk >= chunks) {
                chunk -= chunks;
                if (++r >= rows) break;
            }
            int c = chunk * 8;
            T *cell = to + r * row + c;
            const T *from = row_of(first + r < count ? first + r : 0);
            bool inside = first + r < count && c < dim;
            if (dim % 8 == 0) {
                copy_async(cell, inside ? from + c : from, inside);
                if (also) copy_async(also + (cell - to), (inside ? from + c : from) + apart, inside);
            } else {
                for (int j = 0; j < 8; j++) {
                    cell[j] = inside && c + j < dim ? from[c + j] : from_float<T>(0.0f);
                    if (also) also[cell - to + j] = inside && c + j < dim ? from[c + j + apart] : from_float<T>(0.0f);
                }
            }
        }
    }
};

// Of this thread's two queries: the running maximum, the sum of its own scores' weights, and its channels of the result.
struct MatrixRows {
    float top[2], sum[2], acc[MOST_DIM / 8][4];
};

// Where element e of a fragment of results lies: its row in the warp's 16, and its column in the fragment's 8.
__device__ __forceinline__ int row_of_element(int e) { return e / 2 * 8 + threadIdx.x % 32 / 4; }
__device__ __forceinline__ int column_of_element(int e) { return threadIdx.x % 4 * 2 + e % 2; }

// 2 to the power of x: what is smaller than a normal number is zero.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef PRISM_EMULATOR
    return exp2f(x);
#else
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
#endif
}

// What a weight relative to `top` is worth relative to `higher`; nothing where there was none yet.
__device__ __forceinline__ float faded(float top, float higher) { return top == MINUS_INFINITY ? 0.0f : power_of_two(top - higher); }

// A step's keys, and the values that lie `apart` further.
template <class T, class K, class P>
__device__ __forceinline__ void bring_keys(const MatrixTiles<T> &t, int step, int keys, K key_row, int64 apart, P place) {
    int first = step * STEP, at = step % 2 * STEP;
    if (first < keys) {
        t.bring(t.k + at * t.row, STEP, first, keys, key_row, t.v + at * t.row, apart);
        if (threadIdx.x < STEP) t.places[at + threadIdx.x] = place(first + threadIdx.x);
    }
    copy_commit();
}

// One step's scores, weights and sums of this warp. `bias(i, place)` is added to the scaled score of the thread's query i and the key at `place`.
template <class T, class B>
__device__ __forceinline__ void attend_step(const MatrixTiles<T> &t, const FragmentA (&q)[MOST_DIM / 16], MatrixRows &rows, int step, int keys, float scale, B bias) {
    int lane = threadIdx.x % 32, half = threadIdx.x / 64 * (STEP / 2), at = step % 2 * STEP + half, count = keys - step * STEP - half;
    if (count <= 0) return;
    const T *k = t.k + at * t.row, *v = t.v + at * t.row;
    float s[4][4] = {};
#pragma unroll
    for (int c = 0; c < MOST_DIM / 16; c++) {
        if (c * 16 >= t.dim) break;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            unsigned b[4];
            load_matrices(b, k + (j * 16 + lane / 16 * 8 + lane % 8) * t.row + c * 16 + lane / 8 % 2 * 8);
            multiply<T>(s[2 * j], q[c], FragmentB{{b[0], b[1]}});
            multiply<T>(s[2 * j + 1], q[c], FragmentB{{b[2], b[3]}});
        }
    }
    float top[2] = {rows.top[0], rows.top[1]};
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int key = j * 8 + column_of_element(e);
            s[j][e] = key < count ? scale * s[j][e] + bias(e / 2, t.places[at + key]) : MINUS_INFINITY;
            top[e / 2] = fmaxf(top[e / 2], s[j][e]);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 1));
        top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 2));
        float fade = faded(rows.top[i], top[i]);
        rows.top[i] = top[i], rows.sum[i] *= fade;
#pragma unroll
        for (int c = 0; c < MOST_DIM / 8; c++) rows.acc[c][2 * i] *= fade, rows.acc[c][2 * i + 1] *= fade;
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) s[j][e] = power_of_two(s[j][e] - top[e / 2]), rows.sum[e / 2] += s[j][e];
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
        // Two fragments of scores are one of weights: the layouts agree.
        FragmentA p = {{pair<T>(s[2 * j][0], s[2 * j][1]), pair<T>(s[2 * j][2], s[2 * j][3]), pair<T>(s[2 * j + 1][0], s[2 * j + 1][1]),
                        pair<T>(s[2 * j + 1][2], s[2 * j + 1][3])}};
#pragma unroll
        for (int c = 0; c < MOST_DIM / 16; c++) {
            if (c * 16 >= t.dim) break;
            unsigned b[4];
            load_matrices_turned(b, v + (j * 16 + lane % 16) * t.row + c * 16 + lane / 16 * 8);
            multiply<T>(rows.acc[2 * c], p, FragmentB{{b[0], b[1]}});
            multiply<T>(rows.acc[2 * c + 1], p, FragmentB{{b[2], b[3]}});
        }
    }
}

// Joins the two halves of the keys, and writes: `write_row(query)` is where a query's values go, null for none. `keep(query, log_sum)` is given the logarithm, of base 2,
// of what its keys weigh together.
template <class T, class W, class S> __device__ __forceinline__ void join(const MatrixTiles<T> &t, MatrixRows &rows, W write_row, S keep) {
    int row0 = threadIdx.x / 32 % 2 * 16;
    // Where keys were: a row of sums a query, then its top and its sum.
    float *others = reinterpret_cast<float *>(t.k);
    int width = t.row - 8 + 2;
#pragma unroll
    for (int i = 0; i < 2; i++) rows.sum[i] = row_sum(rows.sum[i]);
    __syncthreads();
    if (threadIdx.x >= 64) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float *to = others + (row0 + row_of_element(e)) * width;
#pragma unroll
            for (int c = 0; c < MOST_DIM / 8; c++)
                if (c * 8 < t.dim) to[c * 8 + column_of_element(e)] = rows.acc[c][e];
            if (threadIdx.x % 4 == 0 && e % 2 == 0) to[width - 2] = rows.top[e / 2], to[width - 1] = rows.sum[e / 2];
        }
    }
    __syncthreads();
    if (threadIdx.x >= 64) return;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        int query = row0 + row_of_element(e);
        const float *other = others + query * width;
        T *to = write_row(query);
        if (!to) continue;
        float top = fmaxf(rows.top[e / 2], other[width - 2]), fade = faded(rows.top[e / 2], top), fade_other = faded(other[width - 2], top);
        float sum = rows.sum[e / 2] * fade + other[width - 1] * fade_other, scale = 1.0f / sum;
        if (threadIdx.x % 4 == 0 && e % 2 == 0) keep(query, top + log2f(sum));
#pragma unroll
        for (int c = 0; c < MOST_DIM / 8; c++) {
            int channel = c * 8 + column_of_element(e);
            if (channel < t.dim) to[channel] = from_float<T>((rows.acc[c][e] * fade + other[channel] * fade_other) * scale);
        }
    }
}

// Goes over all keys, the first step of which is on its way, with the queries in shared memory. `rows` is where it starts.
template <class T, class K, class P, class B>
__device__ __forceinline__ void attend(const MatrixTiles<T> &t, MatrixRows &rows, int keys, float scale, K key_row, int64 apart, P place, B bias) {
    int lane = threadIdx.x % 32;
    FragmentA q[MOST_DIM / 16];
#pragma unroll
    for (int c = 0; c < MOST_DIM / 16; c++)
        if (c * 16 < t.dim) load_matrices(q[c].r, t.q + (threadIdx.x / 32 % 2 * 16 + lane % 16) * t.row + c * 16 + lane / 16 * 8);
    for (int step = 0; step * STEP < keys; step++) {
        copy_wait<0>();
        __syncthreads();
        bring_keys(t, step + 1, keys, key_row, apart, place);
        attend_step(t, q, rows, step, keys, scale * LOG2_E, bias);
    }
}

// The position terms from products on tensor cores: queries times a table, whose rows are rounded to 16 bits, then every term from its place among them. `products`
// holds QUERIES + 1 rows, of the queries and of the bias that stands for tokens beyond the grid. Heads of a multiple of 8 channels.
template <class T>
__device__ __forceinline__ void form_positions(const Positions &p, const VitShape &v, const VitWindow &w, const MatrixTiles<T> &t, float *products, int line0,
                                               int lines) {
    int edge = v.edge, dim = v.dim, count = 2 * edge - 1, wide = (count + 7) / 8 * 8 + 2, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int axis = 0; axis < 3; axis++) {
        const float *table = axis == 0 ? v.table_d : axis == 1 ? v.table_h : v.table_w;
        for (int n0 = warp * 8; n0 < count; n0 += THREADS / 4) {
            const float *from = table + min(n0 + lane / 4, count - 1) * dim + lane % 4 * 2;
            FragmentB b[MOST_DIM / 16];
#pragma unroll
            for (int c = 0; c < MOST_DIM / 16; c++) {
                float low[2] = {}, high[2] = {};
                if (c * 16 < dim) load(low, from + c * 16);
                if (c * 16 + 8 < dim) load(high, from + c * 16 + 8);
                b[c] = {{pair<T>(low[0], low[1]), pair<T>(high[0], high[1])}};
            }
#pragma unroll
            for (int m = 0; m < QUERIES / 16; m++) {
                float sums[4] = {};
#pragma unroll
                for (int c = 0; c < MOST_DIM / 16; c++) {
                    if (c * 16 >= dim) break;
                    FragmentA a;
                    load_matrices(a.r, t.q + (m * 16 + lane % 16) * t.row + c * 16 + lane / 16 * 8);
                    multiply<T>(sums, a, b[c]);
                }
#pragma unroll
                for (int e = 0; e < 4; e++) products[(m * 16 + row_of_element(e)) * wide + n0 + column_of_element(e)] = sums[e];
            }
        }
        if (axis && w.ew < edge) {
            for (int n = threadIdx.x; n < count; n += THREADS) products[QUERIES * wide + n] = dot_whole(v.bias + w.c0, table + n * dim, dim);
        }
        __syncthreads();
        if (axis == 0) {
            for (int i = threadIdx.x; i < lines * w.ew * edge; i += THREADS) {
                int query = i / edge, d = (line0 + query / w.ew) / w.eh;
                p.a[i] = products[query * wide + d - (i - query * edge) + edge - 1];
            }
        } else {
            float *to = axis == 1 ? p.b : p.c;
            for (int i = threadIdx.x; i < lines * edge * edge; i += THREADS) {
                int line = i / edge / edge, at = i / edge % edge, kw = i % edge;
                int query = at < w.ew ? line * w.ew + at : QUERIES, place = axis == 1 ? (line0 + line) % w.eh : at;
                to[i] = products[query * wide + place - kw + edge - 1];
            }
        }
        __syncthreads();
    }
}
