// Softmax attention on tensor cores; scores and weights never leave registers.
//
//   block    32 queries of one head, 4 warps; keys in steps of 64 through two buffers filled by
//            asynchronous copies
//   warp     16 of the queries against half of each step's keys, with its own running softmax; at
//            the end the two warps of the same queries merge theirs
//   thread   rows lane / 4 and lane / 4 + 8 of its warp's queries: two of every eight scores and
//            two of every eight channels
//
// Heads have at most 64 channels, in shared memory padded with zeros to a multiple of 16. Sums and
// softmax are in float; for the product with the values, weights are rounded to the type of the
// factors (lib/matrix.cuh). Exponentials have base 2: scores come multiplied by log2 e.
#pragma once
#include "lib/attention.cuh"
#include "lib/matrix.cuh"

constexpr int STEP = 64;
constexpr float LOG2_E = 1.4426950408889634f;

// Shared memory of a block: queries, two steps of keys and of values.
template <class T> struct MatrixTiles {
    T *q, *k, *v;
    int dim, row;
    // The row and the 16 bytes of channels that this thread loads first, and the steps to the next
    // ones, kept because divisions are slow.
    int first_row, first_chunk, rows_on, chunks_on;

    __device__ __forceinline__ MatrixTiles(unsigned char *shared, int dim) : dim(dim) {
        // 16 bytes more, so that the rows of a matrix fall on different banks.
        row = (dim + 15) / 16 * 16 + PIECE<T>;
        int chunks = (row - PIECE<T>) / PIECE<T>;
        first_row = threadIdx.x / chunks, first_chunk = threadIdx.x % chunks,
            rows_on = THREADS / chunks, chunks_on = THREADS % chunks;
        q = reinterpret_cast<T *>(shared), k = q + QUERIES * row, v = k + 2 * STEP * row;
    }
    __device__ __forceinline__ float *end() const {
        return reinterpret_cast<float *>(v + 2 * STEP * row);
    }
    // The buffer of a step.
    __device__ __forceinline__ T *buffer(T *of, int step) const {
        return of + step % 2 * STEP * row;
    }

    // Starts loading `rows` rows of a tensor, and those of a second one if `also` is given:
    // `row_at(r, a, b)` gives the address of row r's values in each, aligned to 16 bytes if the
    // size of a head's channels is a multiple of that, and returns whether the row exists;
    // otherwise it is filled with zeros.
    template <class F>
    __device__ __forceinline__ void load_tile_async(T *to, T *also, int rows, F row_at) const {
        int chunks = (row - PIECE<T>) / PIECE<T>;
        for (int r = first_row, chunk = first_chunk; r < rows; r += rows_on, chunk += chunks_on) {
            if (chunk >= chunks) {
                chunk -= chunks;
                if (++r >= rows) break;
            }
            const T *a, *b;
            bool there = row_at(r, a, b);
            int c = chunk * PIECE<T>, at = r * row + c;
            if (dim % PIECE<T> == 0) {
                bool inside = there && c < dim;
                int from = inside ? c : 0;
                copy_async(to + at, a + from, inside);
                if (also) copy_async(also + at, b + from, inside);
            } else {
                for (int j = 0; j < PIECE<T>; j++) {
                    bool inside = there && c + j < dim;
                    to[at + j] = inside ? a[c + j] : from_float<T>(0.0f);
                    if (also) also[at + j] = inside ? b[c + j] : from_float<T>(0.0f);
                }
            }
        }
    }
};

// The state of this thread's two queries: the running maximum, the sum of the weights of its own
// scores, and its channels of the result.
struct MatrixRows {
    float row_max[2], sum[2], acc[MOST_DIM / 8][4];
};

// This warp's half of a step, and its rows of the block's own.
__device__ __forceinline__ int half_of_step() { return threadIdx.x / 64; }
__device__ __forceinline__ int own_rows() { return threadIdx.x / 32 % 2 * 16; }

// The position of element e of a fragment of results: its row in the warp's 16, and its column in
// the fragment's 8.
__device__ __forceinline__ int row_of_element(int e) { return e / 2 * 8 + threadIdx.x % 32 / 4; }
__device__ __forceinline__ int column_of_element(int e) { return threadIdx.x % 4 * 2 + e % 2; }

// 2 to the power of x; results smaller than a normal number are zero.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef PRISM_EMULATOR
    return exp2f(x);
#else
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
#endif
}

// The factor that turns weights relative to `row_max` into weights relative to `higher`; zero if
// there was no weight yet.
__device__ __forceinline__ float rescale_factor(float row_max, float higher) {
    return row_max == MINUS_INFINITY ? 0.0f : power_of_two(row_max - higher);
}

// One step's scores, weights and sums of this warp. `score(step, j, s)` turns the products of 8
// keys, the half's fragment j, into base-2 scores: minus infinity where there is no key. Of each 32
// keys that begin before `keys`, the first is a real key.
template <class P, class T, class S>
__device__ __forceinline__ void attend_step(const MatrixTiles<T> &t,
                                            const FragmentA (&q)[MOST_DIM / ALONG<T>],
                                            MatrixRows &rows, int step, int keys, S score) {
    int lane = threadIdx.x % 32, half = half_of_step() * (STEP / 2);
    if (step * STEP + half >= keys) return;
    const T *k = t.buffer(t.k, step) + half * t.row, *v = t.buffer(t.v, step) + half * t.row;
    float s[4][4] = {};
#pragma unroll
    for (int c = 0; c < MOST_DIM / ALONG<T>; c++) {
        if (c * ALONG<T> >= t.dim) break;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            unsigned b[4];
            load_matrices(b, k + (j * 16 + lane / 16 * 8 + lane % 8) * t.row + c * ALONG<T> +
                                 lane / 8 % 2 * PIECE<T>);
            typename Products<P>::Right right[2] = {Products<P>::right(b[0], b[1]),
                                                    Products<P>::right(b[2], b[3])};
            Products<P>::add(s + 2 * j, q[c], right);
        }
    }
    float row_max[2] = {rows.row_max[0], rows.row_max[1]};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        score(step, j, s[j]);
#pragma unroll
        for (int e = 0; e < 4; e++) row_max[e / 2] = fmaxf(row_max[e / 2], s[j][e]);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        row_max[i] = fmaxf(row_max[i], __shfl_xor_sync(0xffffffffu, row_max[i], 1));
        row_max[i] = fmaxf(row_max[i], __shfl_xor_sync(0xffffffffu, row_max[i], 2));
        float rescale = rescale_factor(rows.row_max[i], row_max[i]);
        rows.row_max[i] = row_max[i], rows.sum[i] *= rescale;
#pragma unroll
        for (int c = 0; c < MOST_DIM / 8; c++)
            rows.acc[c][2 * i] *= rescale, rows.acc[c][2 * i + 1] *= rescale;
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++)
            s[j][e] = power_of_two(s[j][e] - row_max[e / 2]), rows.sum[e / 2] += s[j][e];
    }
#pragma unroll
    for (int j = 0; j < 32 / ALONG<T>; j++) {
        FragmentA p;
        if constexpr (sizeof(T) == 4) {
            // A fragment of scores is a valid fragment of weights if the first four of its keys are
            // the even ones of the eight. The values use the same order of keys.
            p = {{__float_as_uint(s[j][0]), __float_as_uint(s[j][2]), __float_as_uint(s[j][1]),
                  __float_as_uint(s[j][3])}};
        } else {
            // Two fragments of scores form one fragment of weights: the layouts agree.
            p = {{pair<T>(s[2 * j][0], s[2 * j][1]), pair<T>(s[2 * j][2], s[2 * j][3]),
                  pair<T>(s[2 * j + 1][0], s[2 * j + 1][1]),
                  pair<T>(s[2 * j + 1][2], s[2 * j + 1][3])}};
        }
#pragma unroll
        for (int c = 0; c < MOST_DIM / 16; c++) {
            if (c * 16 >= t.dim) break;
            unsigned b[4];
            if constexpr (sizeof(T) == 4) {
                const T *from = v + (j * 8 + lane % 4 * 2) * t.row + c * 16 + lane / 4;
#pragma unroll
                for (int i = 0; i < 4; i++) b[i] = __float_as_uint(from[i % 2 * t.row + i / 2 * 8]);
            } else {
                load_matrices_transposed(b,
                                         v + (j * 16 + lane % 16) * t.row + c * 16 + lane / 16 * 8);
            }
            typename Products<P>::Right right[2] = {Products<P>::right(b[0], b[1]),
                                                    Products<P>::right(b[2], b[3])};
            Products<P>::add(rows.acc + 2 * c, p, right);
        }
    }
}

// Merges the two halves of the keys and writes the result: `write_row(query)` is the destination of
// a query's values, or null to skip it. `keep(query, log_sum)` receives the base-2 logarithm of the
// sum of the query's weights, and returns the destination of the values in float, or null for none.
template <class T, class W, class S>
__device__ __forceinline__ void join(const MatrixTiles<T> &t, MatrixRows &rows, W write_row,
                                     S keep) {
    int row0 = threadIdx.x / 32 % 2 * 16;
    // In the memory of the keys: a row of sums per query, then its maximum and its sum.
    float *others = reinterpret_cast<float *>(t.k);
    int width = t.row - PIECE<T> + 2;
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
            if (threadIdx.x % 4 == 0 && e % 2 == 0)
                to[width - 2] = rows.row_max[e / 2], to[width - 1] = rows.sum[e / 2];
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
        float row_max = fmaxf(rows.row_max[e / 2], other[width - 2]),
              rescale = rescale_factor(rows.row_max[e / 2], row_max),
              rescale_other = rescale_factor(other[width - 2], row_max);
        float sum = rows.sum[e / 2] * rescale + other[width - 1] * rescale_other,
              scale = 1.0f / sum;
        float *values = keep(query, row_max + log2f(sum));
#pragma unroll
        for (int c = 0; c < MOST_DIM / 8; c++) {
            int channel = c * 8 + column_of_element(e);
            if (channel >= t.dim) continue;
            float value = (rows.acc[c][e] * rescale + other[channel] * rescale_other) * scale;
            to[channel] = from_float<T>(value);
            if (values) values[channel] = value;
        }
    }
}

// Goes over all keys, the first step of which is already being loaded, with the queries in shared
// memory: `load_step_async(step)` starts loading a step. `rows` is the initial state.
template <class P, class T, class B, class S>
__device__ __forceinline__ void attend(const MatrixTiles<T> &t, MatrixRows &rows, int keys,
                                       B load_step_async, S score) {
    int lane = threadIdx.x % 32;
    FragmentA q[MOST_DIM / ALONG<T>];
#pragma unroll
    for (int c = 0; c < MOST_DIM / ALONG<T>; c++)
        if (c * ALONG<T> < t.dim)
            load_matrices(q[c].r, t.q + (threadIdx.x / 32 % 2 * 16 + lane % 16) * t.row +
                                      c * ALONG<T> + lane / 16 * PIECE<T>);
    for (int step = 0; step * STEP < keys; step++) {
        copy_wait<0>();
        __syncthreads();
        load_step_async(step + 1);
        attend_step<P>(t, q, rows, step, keys, score);
    }
}

// How tokens are placed in slots: a line along w has 1 << shift slots, of which a window fills as
// many as it is wide.
struct Slots {
    // `line` is the longest line of all windows. Rows of A, B and C are `stride` values apart, a
    // power of two: at least as many columns as positions, and as slots.
    int shift, line, stride, wide;

    __device__ __forceinline__ Slots(const VitShape &v) {
        line = min(v.edge, v.s), shift = line <= 8 ? 3 : line <= 16 ? 4 : 5;
        for (wide = shift; 1 << wide < v.edge;) wide++;
        stride = 1 << wide;
    }
    // The number of fragments of 8 in a line, as a shift.
    __device__ __forceinline__ int parts() const { return shift - 3; }
    // The distance in rows from the window's first token to the token of a slot, and whether there
    // is one; if not, the distance is that of some other token.
    __device__ __forceinline__ bool row(const VitWindow &w, int slot, int &at) const {
        int lines = w.ed * w.eh, line = slot >> shift, x = slot & ((1 << shift) - 1);
        bool is_there = line < lines && x < w.ew;
        line = min(line, lines - 1), x = min(x, w.ew - 1);
        int d = w.plane(line);
        at = (d * w.s + line - d * w.eh) * w.s + x;
        return is_there;
    }
};

// A tile's position terms, or their gradients: A for each slot, B and C for each line.
struct SlotPositions {
    float *a, *b, *c, *end;

    __device__ __forceinline__ SlotPositions(float *at, const VitShape &v, const Slots &slots) {
        a = at, b = a + QUERIES * slots.stride, c = b + v.lines * v.edge * slots.stride,
            end = c + v.lines * v.edge * slots.stride;
    }
};

// The channels from `first` on of a table's rows, as fragments of a product's right side; zeros
// after the last channel.
template <class P>
__device__ __forceinline__ typename Products<P>::Right table_fragment(const float *row, int first,
                                                                      int dim) {
    typedef typename Products<P>::Element T;
    float low[2] = {}, high[2] = {};
    if constexpr (sizeof(T) == 4) {
        int channel = first + threadIdx.x % 4;
        if (channel < dim) low[0] = row[channel];
        if (channel + 4 < dim) high[0] = row[channel + 4];
        return Products<P>::right(__float_as_uint(low[0]), __float_as_uint(high[0]));
    } else {
        int channel = first + threadIdx.x % 4 * 2;
        if (dim % 8 == 0) {
            if (channel < dim) load(low, row + channel);
            if (channel + 8 < dim) load(high, row + channel + 8);
        } else {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                if (channel + e < dim) low[e] = row[channel + e];
                if (channel + 8 + e < dim) high[e] = row[channel + 8 + e];
            }
        }
        return Products<P>::right(pair<T>(low[0], low[1]), pair<T>(high[0], high[1]));
    }
}

// The position terms of `lines` lines of queries from `line0` on, which `t.q` holds in slots: they
// are taken from the products of queries and tables. `products` has a row for each slot and one for
// the bias, which is the query of positions beyond the grid. Terms are zero for empty slots and for
// lines that do not exist.
template <class P, class T>
__device__ __forceinline__ void form_slots(const SlotPositions &p, const VitShape &v,
                                           const VitWindow &w, const Slots &slots,
                                           const MatrixTiles<T> &t, float *products, int line0,
                                           int lines) {
    int edge = v.edge, dim = v.dim, count = 2 * edge - 1, wide = (count + 7) / 8 * 8 + 2,
        warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // The number of threads is a multiple of a row's columns, so each thread has the same column in
    // every row.
    int kw = threadIdx.x & (slots.stride - 1);
#pragma unroll 1
    for (int axis = 0; axis < 3; axis++) {
        const float *table = axis == 0 ? v.table_d : axis == 1 ? v.table_h : v.table_w;
        for (int n0 = warp * 8; n0 < count; n0 += THREADS / 4) {
            const float *from = table + (int64)min(n0 + lane / 4, count - 1) * dim;
            float sums[QUERIES / 16][4] = {};
#pragma unroll
            for (int c = 0; c < MOST_DIM / ALONG<T>; c++) {
                if (c * ALONG<T> >= dim) break;
                typename Products<P>::Right b[1] = {table_fragment<P>(from, c * ALONG<T>, dim)};
#pragma unroll
                for (int m = 0; m < QUERIES / 16; m++) {
                    FragmentA a;
                    load_matrices(a.r, t.q + (m * 16 + lane % 16) * t.row + c * ALONG<T> +
                                           lane / 16 * PIECE<T>);
                    Products<P>::add(sums + m, a, b);
                }
            }
#pragma unroll
            for (int m = 0; m < QUERIES / 16; m++) {
#pragma unroll
                for (int e = 0; e < 4; e++)
                    products[(m * 16 + row_of_element(e)) * wide + n0 + column_of_element(e)] =
                        sums[m][e];
            }
        }
        if (axis && w.ew < edge) {
            // Four threads per row.
            for (int n0 = 0; n0 < count; n0 += THREADS / 4) {
                int n = n0 + threadIdx.x / 4, part = threadIdx.x % 4;
                const float *bias = v.bias + w.c0, *row = table + (int64)min(n, count - 1) * dim;
                float sum = 0.0f;
                if (dim % 8 == 0) {
                    for (int c = part * 8; c < dim; c += 32) sum += dot_whole(bias + c, row + c, 8);
                } else {
                    for (int c = part; c < dim; c += 4) sum += bias[c] * row[c];
                }
                sum = row_sum(sum);
                if (part == 0 && n < count) products[QUERIES * wide + n] = sum;
            }
        }
        __syncthreads();
        if (axis == 0) {
            for (int i = threadIdx.x; i < QUERIES << slots.wide; i += THREADS) {
                int slot = i >> slots.wide, line = slot >> slots.shift,
                    x = slot & ((1 << slots.shift) - 1);
                p.a[i] = kw < edge && line < lines && x < w.ew
                             ? products[slot * wide + w.plane(line0 + line) - kw + edge - 1]
                             : 0.0f;
            }
        } else {
            for (int line = 0; line < v.lines; line++) {
                int h = line0 + line - w.plane(line0 + line) * w.eh;
                float *to = (axis == 1 ? p.b : p.c) + (line * edge << slots.wide);
                for (int i = threadIdx.x; i < edge << slots.wide; i += THREADS) {
                    int at = i >> slots.wide,
                        slot = at < w.ew ? (line << slots.shift) + at : QUERIES,
                        place = axis == 1 ? h : at;
                    to[i] = kw < edge && line < lines
                                ? products[slot * wide + place - kw + edge - 1]
                                : 0.0f;
                }
            }
        }
        __syncthreads();
    }
}
