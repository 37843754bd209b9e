// Gradients of softmax attention on tensor cores, for elements of 16 bits.
//
//   block    32 rows of its own, of one head, in 4 warps: queries in one launch, keys in the other;
//            the rows of the other side are streamed, 64 per step, through two buffers filled by
//            asynchronous copies
//   warp     16 of its own rows against half of each step's; at the end the two warps of the same
//            rows add up their sums, in order
//
// With P = exp(S - L), L the logarithm of a query's sum, and D = dO.O, the scores' gradient is dS =
// P (dO.V - D). P and dS never leave registers: two fragments of results form one fragment of a
// product's left side. They are rounded to 16 bits for the products that give dQ, dK and dV, whose
// sums are in float.
//
// In the image encoder's windows tokens are placed in slots: a line along w has 8, 16 or 32 slots,
// of which the last may be empty. So every 8 rows or columns of a product belong to one line, and
// the position terms' gradients are sums over fragments.
#pragma once
#include "lib/attention_matrix.cuh"

// Shared memory of a block: its own rows in `q` and `g`, the streamed rows in `k` and `v`, each
// from two tensors. Queries have q and dO, keys have k and v.
template <class T> struct GradientTiles : MatrixTiles<T> {
    T *g;

    __device__ __forceinline__ GradientTiles(unsigned char *shared, int dim)
        : MatrixTiles<T>(shared, dim) {
        g = reinterpret_cast<T *>(MatrixTiles<T>::end());
    }
    __device__ __forceinline__ float *end() const {
        return reinterpret_cast<float *>(g + QUERIES * this->row);
    }
};

// Products of the warp's rows with 32 rows of a step: for the first tensors and for the second.
template <class T>
__device__ __forceinline__ void score_products(const GradientTiles<T> &t, int step,
                                               float (&s)[4][4], float (&dp)[4][4]) {
    int lane = threadIdx.x % 32, row = t.row;
    const T *q = t.q + (own_rows() + lane % 16) * row + lane / 16 * 8, *g = q + (t.g - t.q);
    const T *k = t.buffer(t.k, step) +
                 (half_of_step() * 32 + lane / 16 * 8 + lane % 8) * row + lane / 8 % 2 * 8,
            *v = k + (t.v - t.k);
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) s[j][e] = 0.0f, dp[j][e] = 0.0f;
    }
#pragma unroll
    for (int c = 0; c < MOST_DIM / 16; c++) {
        if (c * 16 >= t.dim) break;
        FragmentA left, second;
        load_matrices(left.r, q + c * 16);
        load_matrices(second.r, g + c * 16);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            unsigned b[4];
            load_matrices(b, k + j * 16 * row + c * 16);
            multiply<T>(s[2 * j], left, FragmentB{{b[0], b[1]}});
            multiply<T>(s[2 * j + 1], left, FragmentB{{b[2], b[3]}});
            load_matrices(b, v + j * 16 * row + c * 16);
            multiply<T>(dp[2 * j], second, FragmentB{{b[0], b[1]}});
            multiply<T>(dp[2 * j + 1], second, FragmentB{{b[2], b[3]}});
        }
    }
}

// Adds the products of weights with 32 rows of a step: `from` is the step's buffer.
template <class T>
__device__ __forceinline__ void add_rows(const GradientTiles<T> &t, const T *from,
                                         const float (&weights)[4][4],
                                         float (&acc)[MOST_DIM / 8][4]) {
    int lane = threadIdx.x % 32;
    from += (half_of_step() * 32 + lane % 16) * t.row + lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        FragmentA a = {{pair<T>(weights[2 * j][0], weights[2 * j][1]),
                        pair<T>(weights[2 * j][2], weights[2 * j][3]),
                        pair<T>(weights[2 * j + 1][0], weights[2 * j + 1][1]),
                        pair<T>(weights[2 * j + 1][2], weights[2 * j + 1][3])}};
#pragma unroll
        for (int c = 0; c < MOST_DIM / 16; c++) {
            if (c * 16 >= t.dim) break;
            unsigned b[4];
            load_matrices_transposed(b, from + j * 16 * t.row + c * 16);
            multiply<T>(acc[2 * c], a, FragmentB{{b[0], b[1]}});
            multiply<T>(acc[2 * c + 1], a, FragmentB{{b[2], b[3]}});
        }
    }
}

// Adds the sums of the second half's warps to those of the first half's; `room` is the buffer of
// the streamed rows, with space for 32 rows of `dim` floats and more. All warps must call this.
template <class T>
__device__ __forceinline__ void join_halves(const GradientTiles<T> &t, float *room,
                                            float (&acc)[MOST_DIM / 8][4]) {
    int width = t.row - 8 + 2;
    __syncthreads();
    if (half_of_step()) {
#pragma unroll
        for (int c = 0; c < MOST_DIM / 8; c++) {
            if (c * 8 >= t.dim) break;
#pragma unroll
            for (int e = 0; e < 4; e++)
                room[(own_rows() + row_of_element(e)) * width + c * 8 + column_of_element(e)] =
                    acc[c][e];
        }
    }
    __syncthreads();
    if (!half_of_step()) {
#pragma unroll
        for (int c = 0; c < MOST_DIM / 8; c++) {
            if (c * 8 >= t.dim) break;
#pragma unroll
            for (int e = 0; e < 4; e++)
                acc[c][e] +=
                    room[(own_rows() + row_of_element(e)) * width + c * 8 + column_of_element(e)];
        }
    }
}

// Writes the first half's sums: `row_to(row)` is the destination of a row's values, or null to skip
// it.
template <class T, class W>
__device__ __forceinline__ void write_sums(int dim, const float (&acc)[MOST_DIM / 8][4],
                                           float scale, W row_to) {
    if (half_of_step()) return;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        T *to = row_to(own_rows() + row_of_element(2 * i));
        if (!to) continue;
#pragma unroll
        for (int c = 0; c < MOST_DIM / 8; c++) {
            int channel = c * 8 + column_of_element(0);
            float low = scale * acc[c][2 * i], high = scale * acc[c][2 * i + 1];
            if (dim % 2 == 0) {
                if (channel < dim) *reinterpret_cast<unsigned *>(to + channel) = pair<T>(low, high);
            } else {
                if (channel < dim) to[channel] = from_float<T>(low);
                if (channel + 1 < dim) to[channel + 1] = from_float<T>(high);
            }
        }
    }
}

// --- Two-way attention ---

// Grid (queries / 32, heads). sums [heads][tiles][L, D][32], L of base 2. The keys are streamed
// twice: first for L and D, because D is the weighted mean of dO.V. If `live` is given, it is the
// number of valid keys, as in the forward pass.
// tensor cores
template <class T>
__device__ __forceinline__ void two_way_queries_matrix(const T *q, const T *k, const T *v,
                                                       const T *dy, T *dq, float *sums,
                                                       const int *live, int queries, int keys,
                                                       int width, int dim) {
    SHARED_MEMORY(shared);
    if (live) keys = min(keys, *live);
    GradientTiles<T> t(shared, dim);
    float *statistics = t.end(), scale = rsqrtf((float)dim), acc[MOST_DIM / 8][4] = {};
    int q0 = blockIdx.x * QUERIES, c0 = blockIdx.y * dim, half = half_of_step(),
        steps = (keys + STEP - 1) / STEP;
    auto load_step_async = [&](int step) {
        if (step < 2 * steps) {
            int first = step % steps * STEP;
            t.load_tile_async(t.buffer(t.k, step), t.buffer(t.v, step), STEP,
                              [&](int r, const T *&a, const T *&b) {
                                  int64 at = (int64)min(first + r, keys - 1) * width + c0;
                                  a = k + at, b = v + at;
                                  return first + r < keys;
                              });
        }
        copy_commit();
    };
    t.load_tile_async(t.q, t.g, QUERIES, [&](int r, const T *&a, const T *&b) {
        int64 at = (int64)min(q0 + r, queries - 1) * width + c0;
        a = q + at, b = dy + at;
        return q0 + r < queries;
    });
    load_step_async(0);
    float row_max[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum[2] = {}, mean[2] = {};
    for (int step = 0; step < 2 * steps; step++) {
        copy_wait<0>();
        __syncthreads();
        load_step_async(step + 1);
        if (step == steps) {
            // Combines the two halves of a row. From here on `row_max` is L and `mean` is D.
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int query = own_rows() + row_of_element(2 * i);
                const float *own = statistics + (half * QUERIES + query) * 3,
                            *other = statistics + ((1 - half) * QUERIES + query) * 3;
                float higher = fmaxf(own[0], other[0]), rescale = rescale_factor(own[0], higher),
                      rescale_other = rescale_factor(other[0], higher);
                // Both halves add in the same order.
                float first = half ? other[1] * rescale_other : own[1] * rescale,
                      second = half ? own[1] * rescale : other[1] * rescale_other;
                float first_mean = half ? other[2] * rescale_other : own[2] * rescale,
                      second_mean = half ? own[2] * rescale : other[2] * rescale_other;
                bool is_there = q0 + query < queries;
                row_max[i] = is_there ? higher + log2f(first + second) : -MINUS_INFINITY;
                mean[i] = is_there ? (first_mean + second_mean) / (first + second) : 0.0f;
            }
        }
        float s[4][4], dp[4][4];
        score_products(t, step, s, dp);
        int count = keys - step % steps * STEP - half * 32;
        if (step < steps) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float higher = row_max[i];
#pragma unroll
                for (int j = 0; j < 4; j++) {
#pragma unroll
                    for (int e = 2 * i; e < 2 * i + 2; e++) {
                        s[j][e] = j * 8 + column_of_element(e) < count ? LOG2_E * scale * s[j][e]
                                                                       : MINUS_INFINITY;
                        higher = fmaxf(higher, s[j][e]);
                    }
                }
                float rescale = rescale_factor(row_max[i], higher);
                row_max[i] = higher, sum[i] *= rescale, mean[i] *= rescale;
#pragma unroll
                for (int j = 0; j < 4; j++) {
#pragma unroll
                    for (int e = 2 * i; e < 2 * i + 2; e++) {
                        float weight = rescale_factor(s[j][e], higher);
                        sum[i] += weight, mean[i] += weight * dp[j][e];
                    }
                }
            }
            if (step < steps - 1) continue;
            // Combines a row's four threads, each with its own maximum.
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float higher = fmaxf(row_max[i], __shfl_xor_sync(0xffffffffu, row_max[i], 1));
                higher = fmaxf(higher, __shfl_xor_sync(0xffffffffu, higher, 2));
                float rescale = rescale_factor(row_max[i], higher),
                      whole = row_sum(sum[i] * rescale), whole_mean = row_sum(mean[i] * rescale);
                float *to = statistics + (half * QUERIES + own_rows() + row_of_element(2 * i)) * 3;
                if (threadIdx.x % 4 == 0) to[0] = higher, to[1] = whole, to[2] = whole_mean;
            }
            continue;
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float weight = power_of_two(LOG2_E * scale * s[j][e] - row_max[e / 2]);
                s[j][e] =
                    j * 8 + column_of_element(e) < count ? weight * (dp[j][e] - mean[e / 2]) : 0.0f;
            }
        }
        add_rows(t, t.buffer(t.k, step), s, acc);
    }
    sums += ((int64)blockIdx.y * gridDim.x + blockIdx.x) * 2 * QUERIES;
    if (!half && threadIdx.x % 4 == 0) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int query = own_rows() + row_of_element(2 * i);
            sums[query] = row_max[i], sums[QUERIES + query] = mean[i];
        }
    }
    join_halves(t, reinterpret_cast<float *>(t.k), acc);
    write_sums<T>(dim, acc, scale, [&](int r) {
        return q0 + r < queries ? dq + (int64)(q0 + r) * width + c0 : nullptr;
    });
}

// Grid (keys / 32, heads). If `live` is given, it is the number of valid keys; the gradients of the
// others are zeros.
// tensor cores
template <class T>
__device__ __forceinline__ void two_way_keys_matrix(const T *q, const T *k, const T *v, const T *dy,
                                                    const float *sums, T *dk, T *dv,
                                                    const int *live, int queries, int keys,
                                                    int width, int dim) {
    SHARED_MEMORY(shared);
    GradientTiles<T> t(shared, dim);
    float scale = rsqrtf((float)dim), k_acc[MOST_DIM / 8][4] = {}, v_acc[MOST_DIM / 8][4] = {};
    int k0 = blockIdx.x * KEYS, c0 = blockIdx.y * dim, half = half_of_step(),
        steps = (queries + STEP - 1) / STEP, tiles = (queries + QUERIES - 1) / QUERIES,
        valid = live ? min(keys, *live) : keys;
    auto key_to = [&](int r) {
        return k0 + r < keys ? dk + (int64)(k0 + r) * width + c0 : nullptr;
    };
    auto value_to = [&](int r) {
        return k0 + r < keys ? dv + (int64)(k0 + r) * width + c0 : nullptr;
    };
    // Nothing but padding: the whole block is done.
    if (k0 >= valid) {
        write_sums<T>(dim, k_acc, scale, key_to);
        write_sums<T>(dim, v_acc, 1.0f, value_to);
        return;
    }
    auto load_step_async = [&](int step) {
        if (step < steps) {
            int first = step * STEP;
            t.load_tile_async(t.buffer(t.k, step), t.buffer(t.v, step), STEP,
                              [&](int r, const T *&a, const T *&b) {
                                  int64 at = (int64)min(first + r, queries - 1) * width + c0;
                                  a = q + at, b = dy + at;
                                  return first + r < queries;
                              });
        }
        copy_commit();
    };
    t.load_tile_async(t.q, t.g, KEYS, [&](int r, const T *&a, const T *&b) {
        int64 at = (int64)min(k0 + r, keys - 1) * width + c0;
        a = k + at, b = v + at;
        return k0 + r < valid;
    });
    load_step_async(0);
    sums += (int64)blockIdx.y * tiles * 2 * QUERIES;
    for (int step = 0; step < steps; step++) {
        copy_wait<0>();
        __syncthreads();
        load_step_async(step + 1);
        int tile = step * 2 + half;
        if (tile >= tiles) continue;
        const float *of_tile = sums + tile * 2 * QUERIES + column_of_element(0);
        float s[4][4], dp[4][4];
        score_products(t, step, s, dp);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float log_sum[2], mean[2];
            load(log_sum, of_tile + j * 8), load(mean, of_tile + QUERIES + j * 8);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[j][e] = power_of_two(LOG2_E * scale * s[j][e] - log_sum[e % 2]);
                dp[j][e] = s[j][e] * (dp[j][e] - mean[e % 2]);
            }
        }
        add_rows(t, t.buffer(t.v, step), s, v_acc);
        add_rows(t, t.buffer(t.k, step), dp, k_acc);
    }
    // The zeros in the place of a padded key had some weight, of any size: it counts for nothing.
#pragma unroll
    for (int c = 0; c < MOST_DIM / 8; c++) {
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (k0 + own_rows() + row_of_element(e) >= valid) k_acc[c][e] = v_acc[c][e] = 0.0f;
    }
    float *room = reinterpret_cast<float *>(t.k);
    join_halves(t, room, k_acc);
    join_halves(t, room + QUERIES * (t.row - 6), v_acc);
    write_sums<T>(dim, k_acc, scale, key_to);
    write_sums<T>(dim, v_acc, 1.0f, value_to);
}

// --- The image encoder's attention ---

// What a tile of queries keeps for the launch of the keys, in base 2: A - L of each slot, minus
// infinity where there is no key or no query, B and C, and D.
struct KeptTile {
    int across, b, c, d, size;

    __device__ __forceinline__ KeptTile(const VitShape &v, const Slots &slots) {
        across = 1 << slots.shift, b = QUERIES * across, c = b + v.lines * slots.line * across,
            d = c + v.lines * slots.line * across, size = d + QUERIES;
    }
    __device__ __forceinline__ float *of(float *kept, int tiles, int tile) const {
        return kept + (((int64)blockIdx.z * gridDim.y + blockIdx.y) * tiles + tile) * size;
    }
};

// Gradients of a line's B and C, column kw, through the padded keys: `d.a` holds, for each query,
// the gradient of the padded keys' score.
__device__ __forceinline__ void padded_slots(const VitWindow &w, const Slots &slots,
                                             const SlotPositions &p, const SlotPositions &d,
                                             int edge, int line, int kw) {
    int stride = slots.stride, at = line * edge * stride + kw;
    float through = 0.0f;
    for (int x = 0; x < w.ew; x++) through += d.a[((line << slots.shift) + x) * stride + kw];
    PaddedColumn column(w, p.b + line * edge * stride, p.c + line * edge * stride, edge, kw,
                        stride);
    float weight = column.weight(kw < w.ew), scale = weight > 0.0f ? through / weight : 0.0f;
    for (int i = 0; i < edge; i++) {
        float others_c = kw >= w.ew || i >= w.ed ? column.c_in + column.c_out : column.c_out;
        float others_b = kw >= w.ew || i >= w.eh ? column.b_in + column.b_out : column.b_out;
        d.b[at + i * stride] = scale * expf(p.b[at + i * stride] - column.top_b) * others_c;
        d.c[at + i * stride] = scale * expf(p.c[at + i * stride] - column.top_c) * others_b;
    }
}

// Sums of a fragment of dS over its rows, where each 8 rows are queries of one line, or all rows
// are of one line: every lane gets one sum, for the line `lane / 16` and the column `lane % 4 * 2 +
// lane / 8 % 2`, and so does the lane 4 further on.
__device__ __forceinline__ float line_sums(const float (&ds)[4], bool is_one_line) {
    int lane = threadIdx.x % 32;
    bool second = lane & 16, odd = lane & 8;
    float v[4] = {ds[0], ds[1], ds[2], ds[3]};
    if (is_one_line) v[0] += v[2], v[1] += v[3], v[2] = v[0], v[3] = v[1];
    float even_column =
        (second ? v[2] : v[0]) + __shfl_xor_sync(0xffffffffu, second ? v[0] : v[2], 16);
    float odd_column =
        (second ? v[3] : v[1]) + __shfl_xor_sync(0xffffffffu, second ? v[1] : v[3], 16);
    float sum = (odd ? odd_column : even_column) +
                __shfl_xor_sync(0xffffffffu, odd ? even_column : odd_column, 8);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 4);
}

// Grid (tiles of query lines, heads, windows). `values` is the result of the attention, in float (D
// is a small difference where padded keys have most of the weight), and `log_sums` [row, head] is L
// in base 2; both come from the forward pass. What blocks write:
//
//   kept     [window, head, tile][KeptTile]
//   tables   [window, tile, head][3 (2 edge - 1) dim]: the tables' gradients, along d, h and w
//   padding  [window, tile][3 width]: the bias' gradients, through the padded positions
// tensor cores
template <class T>
__device__ __forceinline__ void vit_queries_matrix(const T *qkv, const float *values,
                                                   const float *log_sums, const T *dy, T *dqkv,
                                                   float *kept, float *tables, float *padding,
                                                   const VitShape &v) {
    SHARED_MEMORY(shared);
    int dim = v.dim, edge = v.edge, t = threadIdx.x, count = 2 * edge - 1, query = t / 4;
    GradientTiles<T> tile(shared, dim);
    VitWindow w(v);
    Slots slots(v);
    int line0 = blockIdx.x * v.lines, lines = max(0, min(v.lines, w.ed * w.eh - line0)),
        stride = slots.stride, across = 1 << slots.shift, slot0 = line0 << slots.shift;
    int64 block = (int64)blockIdx.z * gridDim.x + blockIdx.x;
    tables += (block * gridDim.y + blockIdx.y) * 3 * count * dim,
        padding += block * 3 * v.width + w.c0;
    if (lines == 0) {
        for (int i = t; i < 3 * count * dim; i += THREADS) tables[i] = 0.0f;
        for (int i = t; i < 3 * dim; i += THREADS) padding[i / dim * v.width + i % dim] = 0.0f;
        return;
    }
    SlotPositions p(tile.end(), v, slots), d(p.end, v, slots);
    // Each warp's sums for B and C of its lines, two or one.
    int own_lines = slots.shift == 3 ? 2 : 1, own_sums = own_lines * slots.line * across;
    float *line_room = d.end, *log_sum = line_room + 4 * 2 * own_sums, *mean = log_sum + QUERIES,
          *weights = mean + QUERIES, *slopes = weights + QUERIES;
    float *columns = slopes + QUERIES, *beyond = columns + v.lines * edge;
    // Table gradients: each query's contribution to each row of a table.
    int count16 = (count + 15) / 16 * 16, spread_row = count16 + 8;
    T *spread = reinterpret_cast<T *>(columns + (v.lines * edge + 2 * count + 3) / 4 * 4);
    // From here on these begin with the window's first token and the head's first channel.
    int wide = 3 * v.width;
    int64 origin = w.origin();
    qkv += origin * wide + w.c0, dqkv += origin * wide + w.c0, values += origin * v.width + w.c0,
        dy += origin * v.width + w.c0, log_sums += origin * gridDim.y + blockIdx.y;
    float scale = rsqrtf((float)dim);
    int steps = ((w.ed * w.eh << slots.shift) + STEP - 1) / STEP;
    auto load_step_async = [&](int step) {
        if (step < steps) {
            tile.load_tile_async(tile.buffer(tile.k, step), tile.buffer(tile.v, step), STEP,
                                 [&](int r, const T *&a, const T *&b) {
                                     int at;
                                     bool is_there = slots.row(w, step * STEP + r, at);
                                     a = qkv + (int64)at * wide + v.width, b = a + v.width;
                                     return is_there;
                                 });
        }
        copy_commit();
    };
    // Tiles end at the end of a line, so a slot of a later tile does not belong to this one.
    tile.load_tile_async(tile.q, tile.g, QUERIES, [&](int r, const T *&a, const T *&b) {
        int at;
        bool is_there = slots.row(w, slot0 + r, at);
        a = qkv + (int64)at * wide, b = dy + (int64)at * v.width;
        return is_there;
    });
    copy_commit();
    load_step_async(0);
    copy_wait<1>();
    __syncthreads();
    form_slots<T>(p, v, w, slots, tile, d.a, line0, lines);

    // L and D = dO.O of each query, and the weight of the padded keys, which count as one key, and
    // the gradient of their score.
    bool padded = w.is_padded(edge);
    for (int i = t; i < QUERIES * stride; i += THREADS) d.a[i] = 0.0f;
    for (int i = t; i < 2 * v.lines * edge * stride; i += THREADS) d.b[i] = 0.0f;
    for (int i = t; i < 4 * 2 * own_sums; i += THREADS) line_room[i] = 0.0f;
    if (padded) {
        for (int i = t; i < lines * edge; i += THREADS) {
            int line = i / edge, kw = i - line * edge;
            columns[i] = PaddedColumn(w, p.b + line * edge * stride, p.c + line * edge * stride,
                                      edge, kw, stride)
                             .log_weight(kw < w.ew);
        }
    }
    __syncthreads();
    {
        int at;
        bool is_there = slots.row(w, slot0 + query, at);
        const T *g = tile.g + query * tile.row, *q = tile.q + query * tile.row;
        const float *o = values + (int64)at * v.width;
        float product = 0.0f, with_key = 0.0f, with_value = 0.0f;
        if (dim % 8 == 0) {
            for (int c = t % 4 * 8; c < dim; c += 32) {
                float x[8], y[8];
                load(x, g + c), load(y, o + c);
#pragma unroll
                for (int j = 0; j < 8; j++) product += x[j] * y[j];
            }
        } else {
            for (int c = t % 4; c < dim; c += 4) product += to_float(g[c]) * o[c];
        }
        if (padded) {
            const float *bias = v.bias + w.c0;
            for (int c = t % 4; c < dim; c += 4)
                with_key += to_float(q[c]) * bias[v.width + c],
                    with_value += to_float(g[c]) * bias[2 * v.width + c];
        }
        // If there is no query, all weights are zero.
        float l = is_there ? log_sums[(int64)at * gridDim.y] : -MINUS_INFINITY,
              m = row_sum(is_there ? product : 0.0f), weight = 0.0f, slope = 0.0f;
        if (padded) {
            const float *a = p.a + query * stride,
                        *column = columns + (query >> slots.shift) * edge;
            bool any = is_there;
            float row_max = MINUS_INFINITY, sum = 0.0f;
            with_key = row_sum(with_key), with_value = row_sum(with_value);
            for (int kw = t % 4; any && kw < edge; kw += 4)
                row_max = fmaxf(row_max, column[kw] + a[kw]);
            row_max = fmaxf(row_max, __shfl_xor_sync(0xffffffffu, row_max, 1));
            row_max = fmaxf(row_max, __shfl_xor_sync(0xffffffffu, row_max, 2));
            for (int kw = t % 4; any && kw < edge; kw += 4)
                sum += expf(column[kw] + a[kw] - row_max);
            float all = row_max + logf(row_sum(sum));
            weight = any ? power_of_two(LOG2_E * (scale * with_key + all) - l) : 0.0f,
                slope = weight * (with_value - m);
            for (int kw = t % 4; any && kw < edge; kw += 4)
                d.a[query * stride + kw] = slope * expf(column[kw] + a[kw] - all);
        }
        if (t % 4 == 0)
            log_sum[query] = l, mean[query] = m, weights[query] = weight, slopes[query] = slope;
    }
    __syncthreads();
    if (padded) {
        for (int i = t; i < lines * edge; i += THREADS)
            padded_slots(w, slots, p, d, edge, i / edge, i % edge);
    }
    KeptTile kept_tile(v, slots);
    {
        float *keep = kept_tile.of(kept, gridDim.x, blockIdx.x);
        for (int i = t; i < QUERIES * across; i += THREADS) {
            int slot = i >> slots.shift, kw = i & (across - 1);
            keep[i] = kw < w.ew ? LOG2_E * p.a[slot * stride + kw] - log_sum[slot] : MINUS_INFINITY;
        }
        for (int i = t; i < v.lines * slots.line * across; i += THREADS) {
            int row = i >> slots.shift, kw = i & (across - 1), line = row / slots.line,
                from = (line * edge + row - line * slots.line) * stride + kw;
            keep[kept_tile.b + i] = LOG2_E * p.b[from], keep[kept_tile.c + i] = LOG2_E * p.c[from];
        }
        if (t < QUERIES) keep[kept_tile.d + t] = mean[t];
    }

    int lane = t % 32, half = half_of_step(), rows0 = own_rows(), parts = slots.parts(),
        key_lines = w.ed * w.eh;
    float acc[MOST_DIM / 8][4] = {}, a_sums[4][4] = {}, a_terms[4][4], own_mean[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int slot = rows0 + row_of_element(2 * i);
        own_mean[i] = mean[slot];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float a[2];
            load(a, p.a + slot * stride + ((half * 4 + j) & ((1 << parts) - 1)) * 8 +
                        column_of_element(0));
            a_terms[j][2 * i] = LOG2_E * a[0] - log_sum[slot],
                a_terms[j][2 * i + 1] = LOG2_E * a[1] - log_sum[slot];
        }
    }
    // The lines of this warp's first and second 8 rows.
    int line_of[2] = {rows0 / 8 >> parts, (rows0 / 8 + 1) >> parts}, in_line = edge * stride;
    const float *b_terms = p.b + line_of[0] * in_line, *c_terms = p.c + line_of[0] * in_line;
    int to_second = (line_of[1] - line_of[0]) * in_line;
    // Of the 8 lanes that hold one sum, half add to B's and half to C's.
    float *sums_to = line_room + (t / 32 * 2 + (lane >> 2 & 1)) * own_sums +
                     (parts ? 0 : lane >> 4) * slots.line * across + lane % 4 * 2 + (lane >> 3 & 1);
    bool adds = !(parts && lane & 16);
    for (int step = 0; step < steps; step++) {
        copy_wait<0>();
        __syncthreads();
        load_step_async(step + 1);
        float s[4][4], dp[4][4];
        score_products(tile, step, s, dp);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int fragment = step * 8 + half * 4 + j, key_line = fragment >> parts,
                first = (fragment & ((1 << parts) - 1)) * 8, kw = first + column_of_element(0);
            bool is_line = key_line < key_lines;
            key_line = min(key_line, key_lines - 1);
            int kd = w.plane(key_line), kh = key_line - kd * w.eh;
            float b[2][2], c[2][2];
            load(b[0], b_terms + kd * stride + kw),
                load(b[1], b_terms + to_second + kd * stride + kw);
            load(c[0], c_terms + kh * stride + kw),
                load(c[1], c_terms + to_second + kh * stride + kw);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float exponent = LOG2_E * scale * s[j][e] + a_terms[j][e] +
                                 LOG2_E * (b[e / 2][e % 2] + c[e / 2][e % 2]);
                s[j][e] = is_line && kw + e % 2 < w.ew
                              ? power_of_two(exponent) * (dp[j][e] - own_mean[e / 2])
                              : 0.0f;
                a_sums[j][e] += s[j][e];
            }
            float sum = line_sums(s[j], parts);
            if (adds) sums_to[(lane & 4 ? kh : kd) * across + first] += sum;
        }
        add_rows(tile, tile.buffer(tile.k, step), s, acc);
    }
    join_halves(tile, reinterpret_cast<float *>(tile.k), acc);
    // A's sums: one half of the step after the other, and within a half the fragments of a column
    // one after the other.
#pragma unroll 1
    for (int turn = 0; turn < 2; turn++) {
        if (half == turn) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int kw = ((half * 4 + j) & ((1 << parts) - 1)) * 8 + column_of_element(e);
                    d.a[(rows0 + row_of_element(e)) * stride + kw] += a_sums[j][e];
                }
            }
        }
        __syncthreads();
    }
    // B's and C's sums, over the warps that have a line.
    for (int i = t; i < 2 * v.lines * slots.line * across; i += THREADS) {
        int n = i >> slots.shift, kw = i & (across - 1), which = n / (v.lines * slots.line),
            line = n / slots.line - which * v.lines, at = n % slots.line;
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < 4; warp++) {
            int first = warp % 2 * 2 >> parts, own = line - first;
            if (own >= 0 && own < own_lines)
                sum += line_room[(warp * 2 + which) * own_sums + (own * slots.line + at) * across +
                                 kw];
        }
        (which ? d.c : d.b)[(line * edge + at) * stride + kw] += sum;
    }
    __syncthreads();

    // The gradient through the position terms, one axis after the other: to the queries (the first
    // half's warps), and to the tables (the second half's).
    if (!half) {
#pragma unroll
        for (int c = 0; c < MOST_DIM / 8; c++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int channel = c * 8 + column_of_element(e), slot = rows0 + row_of_element(e);
                float more = padded && channel < dim
                                 ? slopes[slot] * v.bias[v.width + w.c0 + channel]
                                 : 0.0f;
                acc[c][e] = scale * (acc[c][e] + more);
            }
        }
    }
    // What positions beyond the grid, whose query is the bias, contribute to each row of the tables
    // along h and w.
    for (int i = t; i < 2 * count; i += THREADS) {
        bool is_w = i >= count;
        int n = is_w ? i - count : i;
        float sum = 0.0f;
        for (int line = 0; line < lines; line++) {
            for (int at = w.ew; at < edge; at++) {
                int kw = (is_w ? at : line0 + line - w.plane(line0 + line) * w.eh) + edge - 1 - n;
                if (kw >= 0 && kw < edge)
                    sum += (is_w ? d.c : d.b)[(line * edge + at) * stride + kw];
            }
        }
        beyond[i] = sum;
    }
    T *table16 = tile.k;
#pragma unroll 1
    for (int axis = 0; axis < 3; axis++) {
        const float *table = axis == 0 ? v.table_d : axis == 1 ? v.table_h : v.table_w;
        __syncthreads();
        for (int n = t / 32; n < count16; n += THREADS / 32) {
            float low = n < count && 2 * lane < dim ? table[n * dim + 2 * lane] : 0.0f,
                  high = n < count && 2 * lane + 1 < dim ? table[n * dim + 2 * lane + 1] : 0.0f;
            if (2 * lane < tile.row - 8)
                *reinterpret_cast<unsigned *>(table16 + n * tile.row + 2 * lane) =
                    pair<T>(low, high);
        }
        {
            int line = query >> slots.shift, x = query & (across - 1),
                along = axis == 0 ? w.plane(line0 + line)
                                  : axis == 1 ? line0 + line - w.plane(line0 + line) * w.eh : x;
            const float *from = axis == 0 ? d.a + query * stride
                                          : (axis == 1 ? d.b : d.c) + (line * edge + x) * stride;
            bool is_there = line < lines && x < w.ew;
            for (int n = t % 4; n < count16; n += 4) {
                int kw = along + edge - 1 - n;
                spread[query * spread_row + n] =
                    from_float<T>(is_there && kw >= 0 && kw < edge ? from[kw] : 0.0f);
            }
        }
        __syncthreads();
        if (!half) {
            for (int n0 = 0; n0 < count16; n0 += 16) {
                FragmentA a;
                load_matrices(a.r, spread + (rows0 + lane % 16) * spread_row + n0 + lane / 16 * 8);
#pragma unroll
                for (int c = 0; c < MOST_DIM / 16; c++) {
                    if (c * 16 >= dim) break;
                    unsigned b[4];
                    load_matrices_transposed(b, table16 + (n0 + lane % 16) * tile.row + c * 16 +
                                                    lane / 16 * 8);
                    multiply<T>(acc[2 * c], a, FragmentB{{b[0], b[1]}});
                    multiply<T>(acc[2 * c + 1], a, FragmentB{{b[2], b[3]}});
                }
            }
        } else {
            // Rows of the table, 16 at a time, alternating between the two warps.
            for (int n0 = rows0; n0 < count16; n0 += 32) {
                float sums[MOST_DIM / 8][4] = {};
#pragma unroll
                for (int m = 0; m < QUERIES / 16; m++) {
                    FragmentA a;
                    load_matrices_transposed(
                        a.r, spread + (m * 16 + lane / 16 * 8 + lane % 8) * spread_row + n0 +
                                 lane / 8 % 2 * 8);
#pragma unroll
                    for (int c = 0; c < MOST_DIM / 16; c++) {
                        if (c * 16 >= dim) break;
                        unsigned b[4];
                        load_matrices_transposed(b, tile.q + (m * 16 + lane % 16) * tile.row +
                                                        c * 16 + lane / 16 * 8);
                        multiply<T>(sums[2 * c], a, FragmentB{{b[0], b[1]}});
                        multiply<T>(sums[2 * c + 1], a, FragmentB{{b[2], b[3]}});
                    }
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int n = n0 + row_of_element(2 * i);
                    if (n >= count) continue;
                    float of_bias = axis ? beyond[(axis - 1) * count + n] : 0.0f,
                          *to = tables + (axis * count + n) * dim + column_of_element(0);
                    const float *bias = v.bias + w.c0 + column_of_element(0);
#pragma unroll
                    for (int c = 0; c < MOST_DIM / 8; c++) {
                        if (c * 8 >= dim) break;
                        if (dim % 8 == 0) {
                            float b[2];
                            load(b, bias + c * 8);
                            store(to + c * 8, {sums[c][2 * i] + of_bias * b[0],
                                               sums[c][2 * i + 1] + of_bias * b[1]});
                        } else {
                            for (int e = 0; e < 2; e++)
                                if (c * 8 + column_of_element(e) < dim)
                                    to[c * 8 + e] = sums[c][2 * i + e] + of_bias * bias[c * 8 + e];
                        }
                    }
                }
            }
        }
    }
    write_sums<T>(dim, acc, 1.0f, [&](int r) {
        int at;
        return slots.row(w, slot0 + r, at) ? dqkv + (int64)at * wide : nullptr;
    });
    for (int i = t; i < 3 * dim; i += THREADS) {
        int part = i / dim, c = i - part * dim;
        float sum = 0.0f;
        if (part == 0) {
            for (int n = 0; w.ew < edge && n < count; n++)
                sum +=
                    beyond[n] * v.table_h[n * dim + c] + beyond[count + n] * v.table_w[n * dim + c];
        } else if (padded) {
            for (int slot = 0; slot < QUERIES; slot++) {
                sum += part == 1 ? scale * slopes[slot] * to_float(tile.q[slot * tile.row + c])
                                 : weights[slot] * to_float(tile.g[slot * tile.row + c]);
            }
        }
        padding[part * v.width + c] = sum;
    }
}

// Grid (tiles of keys, heads, windows); each window has `tiles` tiles of query lines.
// tensor cores
template <class T>
__device__ __forceinline__ void vit_keys_matrix(const T *qkv, const T *dy, T *dqkv, float *kept,
                                                int tiles, const VitShape &v) {
    SHARED_MEMORY(shared);
    int dim = v.dim, t = threadIdx.x, k0 = blockIdx.x * KEYS;
    GradientTiles<T> tile(shared, dim);
    VitWindow w(v);
    Slots slots(v);
    if (k0 >= w.ed * w.eh << slots.shift) return;
    KeptTile kept_tile(v, slots);
    // Two steps of two tiles each.
    float *terms = tile.end(), scale = rsqrtf((float)dim), k_acc[MOST_DIM / 8][4] = {},
          v_acc[MOST_DIM / 8][4] = {};
    // From here on these begin with the window's first token and the head's first channel.
    int wide = 3 * v.width;
    int64 origin = w.origin();
    qkv += origin * wide + w.c0, dqkv += origin * wide + w.c0, dy += origin * v.width + w.c0;
    int used = (w.ed * w.eh + v.lines - 1) / v.lines, steps = (used + 1) / 2, half = half_of_step(),
        across = kept_tile.across, size = kept_tile.size;
    const float *keep = kept_tile.of(kept, tiles, 0);
    auto load_step_async = [&](int step) {
        if (step < steps) {
            tile.load_tile_async(tile.buffer(tile.k, step), tile.buffer(tile.v, step), STEP,
                                 [&](int r, const T *&a, const T *&b) {
                                     int at;
                                     bool is_there = slots.row(w, step * STEP + r, at);
                                     a = qkv + (int64)at * wide, b = dy + (int64)at * v.width;
                                     return is_there;
                                 });
            int first = step * 2 * size, count = min(2, used - step * 2) * size;
            for (int i = t * 4; i < count; i += THREADS * 4)
                copy_async(terms + step % 2 * 2 * size + i, keep + first + i, true);
        }
        copy_commit();
    };
    tile.load_tile_async(tile.q, tile.g, KEYS, [&](int r, const T *&a, const T *&b) {
        int at;
        bool is_there = slots.row(w, k0 + r, at);
        a = qkv + (int64)at * wide + v.width, b = a + v.width;
        return is_there;
    });
    load_step_async(0);
    // The offsets of the terms of this thread's two keys.
    int parts = slots.parts(), at_a[2], at_b[2], at_c[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int slot = k0 + own_rows() + row_of_element(2 * i),
            line = min(slot >> slots.shift, w.ed * w.eh - 1), kd = w.plane(line),
            kw = slot & (across - 1);
        at_a[i] = kw, at_b[i] = kept_tile.b + kd * across + kw,
            at_c[i] = kept_tile.c + (line - kd * w.eh) * across + kw;
    }
    for (int step = 0; step < steps; step++) {
        copy_wait<0>();
        __syncthreads();
        load_step_async(step + 1);
        if (step * 2 + half >= used) continue;
        const float *of_tile = terms + (step % 2 * 2 + half) * size;
        float s[4][4], dp[4][4];
        score_products(tile, step, s, dp);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float *a = of_tile + (j * 8 + column_of_element(0)) * across;
            int line = (j >> parts) * slots.line * across;
            float mean[2];
            load(mean, of_tile + kept_tile.d + j * 8 + column_of_element(0));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float shared_terms = of_tile[at_b[i] + line] + of_tile[at_c[i] + line];
#pragma unroll
                for (int e = 2 * i; e < 2 * i + 2; e++) {
                    s[j][e] = power_of_two(LOG2_E * scale * s[j][e] + a[at_a[i] + e % 2 * across] +
                                           shared_terms);
                    dp[j][e] = s[j][e] * (dp[j][e] - mean[e % 2]);
                }
            }
        }
        add_rows(tile, tile.buffer(tile.v, step), s, v_acc);
        add_rows(tile, tile.buffer(tile.k, step), dp, k_acc);
    }
    float *room = reinterpret_cast<float *>(tile.k);
    join_halves(tile, room, k_acc);
    join_halves(tile, room + QUERIES * (tile.row - 6), v_acc);
    auto to = [&](int r, int part) {
        int at;
        return slots.row(w, k0 + r, at) ? dqkv + (int64)at * wide + part * v.width : nullptr;
    };
    write_sums<T>(dim, k_acc, scale, [&](int r) { return to(r, 1); });
    write_sums<T>(dim, v_acc, 1.0f, [&](int r) { return to(r, 2); });
}
