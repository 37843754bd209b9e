// 3x3x3 convolution and the decoder stage: an implicit matrix product over a halo tile in shared
// memory.
//
//   block    4 x 8 x 8 output voxels (256) and 32 output channels, of one item and, in a decoder
//            stage, of one of the 8 phases or, with few input channels and many tiles, of all of
//            them
//   loop     over chunks of CH input channels: the tile with its border, 6 x 10 x 10 voxels (a
//            stage: 5 x 9 x 9), is loaded once, normalised, activated, added to and pooled on the
//            way, and read by all taps from shared memory
//   warp     on tensor cores a plane of 64 voxels, 8 rows of 8 along w. Rows h and h + 4 of the
//            halo form a fragment, which contributes to outputs h and h + 4 by one tap along h, to
//            h - 1 and h + 3 by the next and so on: each fragment is loaded into registers once for
//            all taps along h
//
// A small map has fewer blocks than a GPU has multiprocessors: then several blocks share a tile's
// chunks, each writes its sums in float, and conv3d_splitk_reduce adds them up.
//
// TAPS is 27 for the convolution, 8 for a stage, whose phase p (bits d, h, w) reads coarse voxels
// from -1 + p to p along each axis and writes every other fine voxel. With GATHER, for a stage's
// input gradient, the loaded map is the fine one, from which a coarse voxel takes all 8 phases one
// after the other, each from -p to 1 - p. Weights come from global memory in the order in which
// they are used, so that every warp of every block reads the same lines from the caches, and need
// no shared memory and no barrier.
//
// A bias or an initial map is added to the result. Voxels are written in pieces of 16 bytes: on
// tensor cores the lanes transpose their fragments among each other, otherwise the result goes
// through shared memory once more. Each block also writes per-channel sums of values and squares
// for the instance norm that follows, in float over a lane's values and the lanes of a warp that
// have the same channels, in double from there on. On tensor cores that is 8 values (64 if a block
// computes all phases) times 8 lanes; if a channel's mean is a hundred times its deviation, 512
// squares in float give a tile an error of about 1e-6 of the mean's square, a percent of the
// variance, at random from tile to tile.
#pragma once
#include "lib/base.cuh"
#include "lib/matrix.cuh"

constexpr int TILE_D = 4, TILE_H = 8, TILE_W = 8, TILE = 256, OUT = 32;
// Floats per voxel of the staged result: a multiple of 4, and rows fall on different banks.
constexpr int STAGE = OUT + 8;

// Everything about a convolution but the types of its maps.
struct ConvShape {
    // Grid of the loaded map, after pooling; a stage's output has twice that.
    int d, h, w;
    // Channels in and out.
    int c, outs;
    // 1, or 8 for a stage.
    int phases;
    // Whether the map is pooled by 2 x 2 x 2 on load.
    int pool;
    // Negative slope of the activation after the norm.
    float slope;
    // The number of blocks that share a tile's chunks, and where they write their sums:
    // [split_k][as the output], in float.
    int split_k;
    float *splitk_workspace;
};

// The voxels and channels that this block computes.
struct ConvBlock {
    int d0, h0, w0, n0, item, phase, split;

    // `stage`: whether this is a decoder stage; only those have phases.
    __device__ __forceinline__ ConvBlock(const ConvShape &s, bool stage) {
        int th = (s.h + TILE_H - 1) / TILE_H, tw = (s.w + TILE_W - 1) / TILE_W;
        int tile = blockIdx.x;
        w0 = tile % tw * TILE_W, h0 = tile / tw % th * TILE_H, d0 = tile / tw / th * TILE_D;
        n0 = blockIdx.y * OUT;
        split = blockIdx.z % s.split_k;
        int rest = blockIdx.z / s.split_k;
        item = stage ? rest / s.phases : rest, phase = stage ? rest % s.phases : 0;
    }

    // Any tile of an item.
    __device__ __forceinline__ ConvBlock(const ConvShape &s, int item, int tile, int n0, int phase)
        : n0(n0), item(item), phase(phase), split(0) {
        int th = (s.h + TILE_H - 1) / TILE_H, tw = (s.w + TILE_W - 1) / TILE_W;
        w0 = tile % tw * TILE_W, h0 = tile / tw % th * TILE_H, d0 = tile / tw / th * TILE_D;
    }

    // The phase's voxel in a map `up` times as fine.
    __device__ __forceinline__ int64 voxel(const ConvShape &s, int up, int d, int h, int w) const {
        return (((int64)item * up * s.d + up * d + (phase >> 2)) * up * s.h +
                up * h + (phase >> 1 & 1)) * up * s.w +
               up * w + (phase & 1);
    }
};

// The number of tiles of an item.
__device__ __forceinline__ int conv_tiles(const ConvShape &s) {
    return ((s.d + TILE_D - 1) / TILE_D) * ((s.h + TILE_H - 1) / TILE_H) *
           ((s.w + TILE_W - 1) / TILE_W);
}

template <int TAPS> struct Halo {
    static constexpr int R = TAPS == 27 ? 2 : 1;
    static constexpr int D = TILE_D + R, H = TILE_H + R, W = TILE_W + R, VOXELS = D * H * W;

    // The halo's first voxel on the coarse grid, or that of the loaded map.
    template <bool GATHER>
    static __device__ __forceinline__ void origin(const ConvBlock &b, int &d, int &h, int &w) {
        d = b.d0 - 1, h = b.h0 - 1, w = b.w0 - 1;
        if (GATHER) {
            d += 1 - (b.phase >> 2), h += 1 - (b.phase >> 1 & 1), w += 1 - (b.phase & 1);
        } else if (TAPS == 8) {
            d += b.phase >> 2, h += b.phase >> 1 & 1, w += b.phase & 1;
        }
    }

    // The halo voxel that tap `t` adds to a tile voxel's own.
    static __device__ __forceinline__ int tap(int t) {
        return TAPS == 27 ? (t / 9 * H + t / 3 % 3) * W + t % 3
                          : ((t >> 2) * H + (t >> 1 & 1)) * W + (t & 1);
    }
};

// The convolution's prologue (norm, activation, addition) for one voxel's V channels:
// `norm_of(first, to)` gives the coefficients of a few channels from `first` on.
template <class T, int V, class N>
__device__ __forceinline__ void apply_prologue(float (&v)[V], const RawVector<T, V> &x,
                                               const RawVector<T, V> &more, bool adds, bool norms,
                                               N norm_of, float slope) {
    constexpr int FEW = V < 4 ? V : 4;
#pragma unroll
    for (int first = 0; first < V; first += FEW) {
        float coefficients[FEW * 3];
        if (norms) norm_of(first, coefficients);
#pragma unroll
        for (int i = 0; i < FEW; i++) {
            float y = element(x, first + i);
            if (norms) y = normed(y, coefficients + i * 3, slope);
            if (adds) y += element(more, first + i);
            v[first + i] = y;
        }
    }
}

// Loads channels `c0` to `c0 + CH` of the halo tile, V at a time, to `to` with STRIDE elements per
// voxel. `norm` holds [item][c][3].
template <int TAPS, bool GATHER, int CH, int V, int STRIDE, int THREADS, class T, class S>
__device__ __forceinline__ void load_halo(S *to, const ConvShape &s, const ConvBlock &b, const T *x,
                                          const float *norm, const T *add, int c0) {
    typedef Halo<TAPS> H;
    static_assert(THREADS % (CH / V) == 0, "a thread keeps its channels");
    int channel = c0 + threadIdx.x % (CH / V) * V;
    int od, oh, ow;
    H::template origin<GATHER>(b, od, oh, ow);
    bool there = channel < s.c;
    float kept[V * 3];
    if (norm && there) {
        const float *item_norm = norm + (int64)b.item * s.c * 3;
#pragma unroll
        for (int i = 0; i < V * 3; i++) kept[i] = item_norm[channel * 3 + i];
    }
    constexpr int FEW = (V < 4 ? V : 4) * 3;
    auto norm_of = [&](int first, float (&few)[FEW]) {
#pragma unroll
        for (int i = 0; i < FEW; i++) few[i] = kept[first * 3 + i];
    };
    auto put = [&](int at, const float (&v)[V]) {
        S *row = to + at * STRIDE + threadIdx.x % (CH / V) * V;
        if constexpr (sizeof(S) == 2) {
            store(row, v);
        } else {
#pragma unroll
            for (int i = 0; i < V; i++) row[i] = v[i];
        }
    };
    constexpr int EACH = THREADS / (CH / V);
    // Several loads in flight at a time: of that many voxels, or, if a second map is added, of half
    // as many.
    constexpr int LOADS = 2;
    int voxels = add ? LOADS / 2 : LOADS;
    bool adds = add != nullptr, norms = norm != nullptr;
    int fine = s.pool || GATHER ? 2 : 1;
    int64 origin = (int64)b.item * fine * s.d * fine * s.h * fine * s.w * s.c + channel;
    auto within = [&](int d, int h, int w) {
        return there && (unsigned)d < (unsigned)s.d && (unsigned)h < (unsigned)s.h &&
               (unsigned)w < (unsigned)s.w;
    };
    auto load_at = [&](int slot, int voxel) {
        return load_raw<V>((adds && slot % 2 ? add : x) + (origin + (int64)voxel * s.c));
    };
    if (s.pool) {
#pragma unroll 1
        for (int at = threadIdx.x / (CH / V); at < H::VOXELS; at += EACH) {
            int d = od + at / (H::W * H::H), h = oh + at / H::W % H::H, w = ow + at % H::W;
            float v[V];
#pragma unroll
            for (int i = 0; i < V; i++) v[i] = 0.0f;
            if (within(d, h, w)) {
                int voxel = (2 * d * 2 * s.h + 2 * h) * 2 * s.w + 2 * w;
#pragma unroll 1
                for (int p = 0; p < 8; p += voxels) {
                    RawVector<T, V> values[LOADS];
#pragma unroll
                    for (int a = 0; a < LOADS; a++) {
                        int q = p + (adds ? a / 2 : a);
                        values[a] = load_at(
                            a, voxel + ((q >> 2) * 2 * s.h + (q >> 1 & 1)) * 2 * s.w + (q & 1));
                    }
#pragma unroll
                    for (int a = 0; a < LOADS; a++) {
                        if (adds && a % 2) continue;
                        float u[V];
                        apply_prologue(u, values[a], values[a / 2 * 2 + 1], adds, norms, norm_of,
                                       s.slope);
#pragma unroll
                        for (int i = 0; i < V; i++) v[i] = p || a ? fmaxf(v[i], u[i]) : u[i];
                    }
                }
            }
            put(at, v);
        }
        return;
    }
#pragma unroll 1
    for (int at = threadIdx.x / (CH / V); at < H::VOXELS; at += EACH) {
        int d = od + at / (H::W * H::H), h = oh + at / H::W % H::H, w = ow + at % H::W;
        int voxel =
            GATHER ? ((2 * d + (b.phase >> 2)) * 2 * s.h + 2 * h + (b.phase >> 1 & 1)) * 2 * s.w +
                         2 * w + (b.phase & 1)
                   : (d * s.h + h) * s.w + w;
        float v[V];
#pragma unroll
        for (int i = 0; i < V; i++) v[i] = 0.0f;
        if (within(d, h, w)) {
            RawVector<T, V> value = load_at(0, voxel), more = value;
            if (adds) more = load_at(1, voxel);
            apply_prologue(v, value, more, adds, norms, norm_of, s.slope);
        }
        put(at, v);
    }
}

// The prologue of a convolution on tensor cores, for the 16 bytes of channels that a thread loads:
// the norm as one multiplication and addition and the activation in float, as in every other kernel
// that reads such a map, then rounded; the second map is added by pairs of elements and the sum is
// rounded once more. Folding the mean into the shift costs one rounding of a value as large as mean
// * scale, far below the rounding of 16-bit elements; with floats the mean is subtracted first.
template <class T> struct Prologue {
    static constexpr int V = PIECE<T>;
    float mean[V], scale[V], shift[V], slope;
    bool norms, adds;

    // `norm` holds [mean, scale, shift] of the channels, from a multiple of 16 bytes on.
    __device__ __forceinline__ Prologue(const float *norm, bool adds, float negative_slope)
        : slope(negative_slope), norms(norm != nullptr), adds(adds) {
        float of[3 * V] = {};
        if (norms) load(of, norm);
#pragma unroll
        for (int i = 0; i < V; i++) {
            mean[i] = of[3 * i], scale[i] = of[3 * i + 1],
                shift[i] =
                    sizeof(T) == 4 ? of[3 * i + 2] : fmaf(-of[3 * i], of[3 * i + 1], of[3 * i + 2]);
        }
    }

    __device__ __forceinline__ RawVector<T, V> of(const RawVector<T, V> &x,
                                                  const RawVector<T, V> &more) const {
        RawVector<T, V> y = x;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (sizeof(T) == 4) {
                float &v = y.values.v[i];
                if (norms) v = (v - mean[i]) * scale[i] + shift[i], v = fmaxf(v, v * slope);
                if (adds) v += more.values.v[i];
            } else {
                unsigned &v = y.words.v[i];
                if (norms) {
                    float low = fmaf(element(x, 2 * i), scale[2 * i], shift[2 * i]),
                          high = fmaf(element(x, 2 * i + 1), scale[2 * i + 1], shift[2 * i + 1]);
                    v = pair<T>(fmaxf(low, low * slope), fmaxf(high, high * slope));
                }
                if (adds) v = pair_sum<T>(v, more.words.v[i]);
            }
        }
        return y;
    }
};

// The larger of each pair of elements of two pieces of 16 bytes.
template <class T>
__device__ __forceinline__ RawVector<T, PIECE<T>> larger(const RawVector<T, PIECE<T>> &a,
                                                         const RawVector<T, PIECE<T>> &b) {
    RawVector<T, PIECE<T>> y;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (sizeof(T) == 4) y.values.v[i] = fmaxf(a.values.v[i], b.values.v[i]);
        else y.words.v[i] = pair_max<T>(a.words.v[i], b.words.v[i]);
    }
    return y;
}

// Loads the halo tile for tensor cores: 16 bytes of channels per thread, in whole pieces of 16
// bytes. A thread keeps its position along w and goes over rows (d, h) of the tile, ROWS of them at
// a time, so that a step is an addition. The whole tile is in flight at once; the prologue is
// computed in place, by the thread that copied the data.
template <int TAPS, bool GATHER, int CH, int STRIDE, int THREADS, class T>
__device__ __forceinline__ void load_halo_async(T *to, const ConvShape &s, const ConvBlock &b,
                                                const T *x, const float *norm, const T *add,
                                                int c0) {
    typedef Halo<TAPS> H;
    int thread = own_thread();
    constexpr int V = PIECE<T>, PACKS = CH / V, ACROSS = H::W * PACKS, ROWS = THREADS / ACROSS,
                  ALL = H::D * H::H, COUNT = (ALL + ROWS - 1) / ROWS;
    static_assert(ROWS < H::H && COUNT <= 32,
                  "a step passes at most one end of a plane, and a bit each");
    int row = thread / ACROSS, place = thread % ACROSS / PACKS, pack = thread % PACKS * V,
        channel = c0 + pack;
    int od, oh, ow;
    H::template origin<GATHER>(b, od, oh, ow);
    int w = ow + place, fine = s.pool || GATHER ? 2 : 1;
    bool there = row < ROWS && channel < s.c && (unsigned)w < (unsigned)s.w;
    int phase = GATHER ? b.phase : 0;
    // Voxels of the loaded map from one row, and from one plane, to the next.
    int along_h = fine * fine * s.w, along_d = fine * s.h * along_h;
    int h = oh + row % H::H, d = od + row / H::H;
    int at = ((phase >> 2) * fine * s.h + (phase >> 1 & 1)) * fine * s.w + (phase & 1) +
             d * along_d + h * along_h + fine * w;
    int64 origin = (int64)b.item * s.d * along_d * s.c + channel;
    auto step = [&]() {
        h += ROWS, at += ROWS * along_h;
        if (h >= oh + H::H) h -= H::H, d++, at += along_d - H::H * along_h;
    };
    auto within = [&]() {
        return there && (unsigned)d < (unsigned)s.d && (unsigned)h < (unsigned)s.h;
    };
    T *cell = to + (row * H::W + place) * STRIDE + pack;
    constexpr int NEXT = ROWS * H::W * STRIDE;
    bool adds = add != nullptr, norms = norm != nullptr;
    const float *coefficients =
        there && norms ? norm + ((int64)b.item * s.c + channel) * 3 : nullptr;
    if (row >= ROWS) return;
    if (s.pool) {
        Prologue<T> prologue(coefficients, adds, s.slope);
#pragma unroll 1
        for (int i = row; i < ALL; i += ROWS, cell += NEXT, step()) {
            RawVector<T, V> most = {};
            if (within()) {
#pragma unroll 1
                for (int p = 0; p < 8; p += 4) {
                    int from = at + p * s.h * s.w;
                    auto place = [&](int a) {
                        return origin + (int64)(from + a / 2 * 2 * s.w + a % 2) * s.c;
                    };
                    RawVector<T, V> values[4];
#pragma unroll
                    for (int a = 0; a < 4; a++) values[a] = load_raw<V>(x + place(a));
#pragma unroll
                    for (int a = 0; a < 4; a++) {
                        RawVector<T, V> value =
                            prologue.of(values[a], adds ? load_raw<V>(add + place(a)) : values[a]);
                        most = p || a ? larger<T>(most, value) : value;
                    }
                }
            }
            *reinterpret_cast<RawVector<T, V> *>(cell) = most;
        }
        return;
    }
    unsigned there_now = 0;
    int first_at = at, first_h = h;
#pragma unroll 2
    for (int i = 0; i < COUNT; i++) {
        if (ALL % ROWS && row + i * ROWS >= ALL) break;
        bool inside = within();
        copy_async(cell + i * NEXT, x + (inside ? origin + (int64)at * s.c : 0), inside);
        there_now |= (unsigned)inside << i;
        step();
    }
    copy_commit();
    Prologue<T> prologue(coefficients, adds, s.slope);
    copy_wait<0>();
    if (!norms && !adds) return;
    at = first_at, h = first_h;
#pragma unroll 1
    for (int first = 0; first < COUNT; first += 2) {
        RawVector<T, V> more[2];
        if (adds) {
#pragma unroll
            for (int a = 0; a < 2; a++) {
                if (there_now >> (first + a) & 1)
                    more[a] = load_raw<V>(add + origin + (int64)at * s.c);
                step();
            }
        }
#pragma unroll
        for (int a = 0; a < 2; a++) {
            T *here = cell + (first + a) * NEXT;
            if (there_now >> (first + a) & 1)
                *reinterpret_cast<RawVector<T, V> *>(here) =
                    prologue.of(load_raw<V>(here), more[a]);
        }
    }
}

// Adds up the sums of a channel over the lanes of a warp that have it: every ACROSS-th.
template <int ACROSS> __device__ __forceinline__ void add_lanes(float &sum, float &squares) {
#pragma unroll
    for (int o = ACROSS; o < 32; o *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, o);
        squares += __shfl_xor_sync(0xffffffffu, squares, o);
    }
}

// Adds up the sums of THREADS threads, of V channels each (OUT / V threads have all 32), and writes
// them to `to`, [outs][2]. `bins` holds THREADS / 32 * 2 * OUT floats.
template <int THREADS, int V>
__device__ __forceinline__ void store_partial_sums(float *bins, float (&sum)[V],
                                                   float (&squares)[V], int channels, double *to) {
    constexpr int ACROSS = OUT / V;
#pragma unroll
    for (int i = 0; i < V; i++) {
        add_lanes<ACROSS>(sum[i], squares[i]);
        if (threadIdx.x % 32 < ACROSS) {
            float *bin = bins + (threadIdx.x / 32 * OUT + threadIdx.x % ACROSS * V + i) * 2;
            bin[0] = sum[i], bin[1] = squares[i];
        }
    }
    __syncthreads();
    if (threadIdx.x < 2 * OUT && (int)threadIdx.x / 2 < channels) {
        double total = 0;
        for (int part = 0; part < THREADS / 32; part++) total += bins[part * OUT * 2 + threadIdx.x];
        to[threadIdx.x] = total;
    }
}

// Adds the bias or the initial map to the block's staged result [256][STAGE], writes it, and writes
// the sums. A thread writes 16 bytes of a voxel. `bins`: see store_partial_sums.
template <bool PHASED, int THREADS, class T>
__device__ __forceinline__ void write_staged(const float *stage, float *bins, const ConvShape &s,
                                             const ConvBlock &b, const float *bias, const T *start,
                                             T *out, double *partial) {
    // ROWS is the number of rows of 8 voxels that the block's threads write in one pass.
    constexpr int V = 16 / (int)sizeof(T), ROWS = THREADS / (OUT / V) / 8;
    int column = threadIdx.x % (OUT / V) * V, channel = b.n0 + column, v0 = threadIdx.x / (OUT / V);
    float sum[V] = {}, squares[V] = {}, offset[V] = {};
    if (bias) {
#pragma unroll
        for (int i = 0; i < V; i++) offset[i] = channel + i < s.outs ? bias[channel + i] : 0.0f;
    }
    bool vector = s.outs % V == 0 && channel < s.outs;
    int phases = PHASED ? s.phases : 1, up = phases == 8 ? 2 : 1;
    int64 origin = b.voxel(s, up, b.d0, b.h0 + v0 / 8, b.w0 + v0 % 8) * s.outs + channel;
    int64 row = (int64)up * up * s.w * s.outs, plane = row * up * s.h;
#pragma unroll 1
    for (int r = 0; r < TILE / 8; r += ROWS) {
        if (b.d0 + r / 8 >= s.d || b.h0 + v0 / 8 + r % 8 >= s.h || b.w0 + v0 % 8 >= s.w) continue;
        int64 at = origin + r / 8 * plane + r % 8 * row;
        float y[V];
        load(y, stage + (v0 + r * 8) * STAGE + column);
        if (vector) {
            RawVector<T, V> more = {};
            if (start) more = load_raw<V>(start + at);
#pragma unroll
            for (int j = 0; j < V; j++) y[j] += offset[j] + (start ? element(more, j) : 0.0f);
            RawVector<T, V> rounded = to_raw<T, V>(y);
            *reinterpret_cast<RawVector<T, V> *>(out + at) = rounded;
#pragma unroll
            for (int j = 0; j < V; j++) y[j] = element(rounded, j);
        } else {
#pragma unroll
            for (int j = 0; j < V; j++) {
                if (channel + j >= s.outs) continue;
                y[j] = to_float(
                    from_float<T>(y[j] + offset[j] + (start ? to_float(start[at + j]) : 0.0f)));
                out[at + j] = from_float<T>(y[j]);
            }
        }
#pragma unroll
        for (int j = 0; j < V; j++) sum[j] += y[j], squares[j] += y[j] * y[j];
    }
    if (!partial) return;
    int64 tile = ((int64)b.item * gridDim.x + blockIdx.x) * phases + b.phase;
    store_partial_sums<THREADS>(bins, sum, squares, s.outs - b.n0,
                                partial + (tile * s.outs + b.n0) * 2);
}

// Writes a warp's sums of 32 voxels, four rows of 8, and 32 outputs to the staged result, and waits
// for all warps.
__device__ __forceinline__ void stage_fragments(float *stage, const float (&acc)[2][4][4]) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float pair[2] = {acc[m][n][half * 2], acc[m][n][half * 2 + 1]};
                store(stage + ((warp * 4 + 2 * m + half) * 8 + lane / 4) * STAGE + n * 8 +
                          lane % 4 * 2, pair);
            }
        }
    }
    __syncthreads();
}

// Transposes four registers across four consecutive lanes: register i of lane t becomes register t
// of lane i.
__device__ __forceinline__ void transpose_lanes(unsigned (&r)[4]) {
    bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        unsigned got = __shfl_xor_sync(0xffffffffu, odd ? r[i] : r[i + 1], 1);
        if (odd) r[i] = got; else r[i + 1] = got;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        unsigned got = __shfl_xor_sync(0xffffffffu, upper ? r[i] : r[i + 2], 2);
        if (upper) r[i] = got; else r[i + 2] = got;
    }
}

// Writes a warp's results from its fragments: rows of 8 voxels along w of plane b.d0 + warp, where
// fragment m holds rows m and m + 4. A lane has two channels of each 8; after the transposition it
// has all 8 channels of one voxel, 16 bytes, and so loads the initial map and stores. Floats are
// not transposed: two are 8 bytes, and four lanes have 32 contiguous bytes. Adds what it wrote to
// `sum` and `squares`, 8 channels per lane, but not for partial sums of a result.
template <bool PHASED, class T>
__device__ __forceinline__ void write_fragments(const float (&acc)[4][4][4], const ConvShape &s,
                                                const ConvBlock &b, const float *bias,
                                                const T *start, T *out, float (&sum)[8],
                                                float (&squares)[8]) {
    int thread = own_thread(), lane = thread % 32, column = lane % 4 * 2, d = b.d0 + thread / 32,
        w = b.w0 + lane / 4, up = PHASED ? 2 : 1;
    // All lanes go on, because they exchange registers.
    bool within = d < s.d && w < s.w;
    int64 row = (int64)up * up * s.w * s.outs, plane = row * up * s.h,
          origin = b.voxel(s, up, d, b.h0, w) * s.outs + b.n0;
    if (s.split_k > 1) {
        float *share = s.splitk_workspace +
                       b.split * (gridDim.z / ((PHASED ? 8 : 1) * s.split_k)) * plane * s.d +
                       origin + column;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int h = i / 2 + i % 2 * 4;
            if (b.h0 + h >= s.h || !within) continue;
#pragma unroll
            for (int n = 0; n < 4; n++) {
                float two[2] = {acc[i / 2][n][i % 2 * 2], acc[i / 2][n][i % 2 * 2 + 1]};
                int left = s.outs - b.n0 - n * 8 - column;
                float *to = share + h * row + n * 8;
                if (s.outs % 2 == 0) {
                    if (left > 0) store(to, two);
                } else {
                    if (left > 0) to[0] = two[0];
                    if (left > 1) to[1] = two[1];
                }
            }
        }
        return;
    }
    float offset[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int channel = b.n0 + i / 2 * 8 + column + i % 2;
        offset[i] = bias && channel < s.outs ? bias[channel] : 0.0f;
    }
    if (s.outs % 8) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int h = i / 2 + i % 2 * 4;
            if (b.h0 + h >= s.h || !within) continue;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                int channel = j / 2 * 8 + column + j % 2;
                if (b.n0 + channel >= s.outs) continue;
                int64 at = origin + h * row + channel;
                T y = from_float<T>(acc[i / 2][j / 2][i % 2 * 2 + j % 2] +
                                    (offset[j] + (start ? to_float(start[at]) : 0.0f)));
                out[at] = y;
                sum[j] += to_float(y), squares[j] += to_float(y) * to_float(y);
            }
        }
        return;
    }
    if constexpr (sizeof(T) == 4) {
        // One fragment's rows at a time, so that several loads are in flight together.
        origin += column;
#pragma unroll
        for (int m = 0; m < 4; m++) {
            float starts[2][4][2] = {};
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int h = m + i * 4;
                if (!start || !within || b.h0 + h >= s.h) continue;
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    if (b.n0 + n * 8 < s.outs) load(starts[i][n], start + origin + h * row + n * 8);
                }
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int h = m + i * 4;
                if (!within || b.h0 + h >= s.h) continue;
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    if (b.n0 + n * 8 >= s.outs) continue;
                    float y[2];
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        int j = n * 2 + e;
                        y[e] = acc[m][n][i * 2 + e] + (offset[j] + starts[i][n][e]);
                        sum[j] += y[e], squares[j] += y[e] * y[e];
                    }
                    store(out + origin + h * row + n * 8, y);
                }
            }
        }
    } else {
        // Half of the rows at a time, so that several loads are in flight together.
        bool mine = within && b.n0 + lane % 4 * 8 < s.outs;
        origin += lane % 4 * 8;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            RawVector<T, 8> starts[4] = {};
            if (start) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int h = half * 2 + i / 2 + i % 2 * 4;
                    if (mine && b.h0 + h < s.h) starts[i] = load_raw<8>(start + origin + h * row);
                }
#pragma unroll
                for (int i = 0; i < 4; i++) transpose_lanes(starts[i].words.v);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int m = half * 2 + i / 2, h = m + i % 2 * 4;
                bool inside = b.h0 + h < s.h && within;
                float v[8];
#pragma unroll
                for (int j = 0; j < 8; j++)
                    v[j] = acc[m][j / 2][i % 2 * 2 + j % 2] + (offset[j] + element(starts[i], j));
                RawVector<T, 8> y = to_raw<T, 8>(v);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    float rounded = inside ? element(y, j) : 0.0f;
                    sum[j] += rounded, squares[j] += rounded * rounded;
                }
                transpose_lanes(y.words.v);
                if (mine && inside)
                    *reinterpret_cast<RawVector<T, 8> *>(out + origin + h * row) = y;
            }
        }
    }
}

// Adds up the sums of 32 channels over the four warps of a block and writes them to `to`,
// [outs][2]. `bins` holds 4 * 2 * OUT floats.
__device__ __forceinline__ void store_fragment_sums(float *bins, float (&sum)[8],
                                                    float (&squares)[8], int channels, double *to) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        add_lanes<4>(sum[i], squares[i]);
        if (lane < 4) {
            float *bin = bins + (warp * OUT + i / 2 * 8 + lane * 2 + i % 2) * 2;
            bin[0] = sum[i], bin[1] = squares[i];
        }
    }
    __syncthreads();
    if (threadIdx.x < 2 * OUT && (int)threadIdx.x / 2 < channels) {
        double total = 0;
        for (int part = 0; part < 4; part++) total += bins[part * OUT * 2 + threadIdx.x];
        to[threadIdx.x] = total;
    }
}

// Adds the products of a chunk of input channels: EDGE taps along each axis, from the warp's halo
// rows at `mine`.
template <class P, class H, int EDGE, int DEEP, int STRIDE, class T>
__device__ __forceinline__ void add_products(float (&acc)[4][4][4], const T *mine, const uint4 *w,
                                             int pairs, bool idle) {
    // A turn is a column of taps along h with all channels or, with floats, with a fragment's
    // channels. If products take several passes, it is a single step that loads its own rows: if
    // steps were unrolled, more of them would be started at a time than registers can hold, and the
    // products take longer than loading the rows.
    constexpr bool WHOLE = Products<P>::PASSES == 1;
    constexpr int STEPS = !WHOLE ? 1 : sizeof(T) == 4 ? EDGE : DEEP * EDGE,
                  ROWS = WHOLE ? EDGE + 3 : 4, PARTS = DEEP * EDGE / STEPS,
                  TURNS = EDGE * EDGE * PARTS;
    uint4 next[2] = {load_vector(w), load_vector(w + 32)};
#pragma unroll 1
    for (int turn = idle ? TURNS : 0; turn < TURNS; turn++) {
        int column = turn / PARTS, part = turn % PARTS;
        const T *from = mine + (column / EDGE * H::H * H::W + column % EDGE) * STRIDE;
        if (WHOLE) from += part * ALONG<T>;
        else from += part % EDGE * H::W * STRIDE + part / EDGE * ALONG<T>;
        FragmentA rows[ROWS];
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            int k = step / EDGE, kh = step % EDGE;
            if (kh == 0) {
#pragma unroll
                for (int i = 0; i < ROWS; i++)
                    load_matrices(rows[i].r, from,
                                  (i * H::W * STRIDE + k * ALONG<T>) * (int)sizeof(T));
            }
            typename Products<P>::Right right[4] = {
                Products<P>::right(next[0].x, next[0].y), Products<P>::right(next[0].z, next[0].w),
                Products<P>::right(next[1].x, next[1].y), Products<P>::right(next[1].z, next[1].w)};
            // The next step's weights are being loaded while this one multiplies.
            if (step + 1 < STEPS || turn + 1 < TURNS) {
                w += pairs * 32;
                next[0] = load_vector(w), next[1] = load_vector(w + 32);
            }
#pragma unroll
            for (int m = 0; m < 4; m++) Products<P>::add(acc[m], rows[m + kh], right);
        }
    }
}

// Tensor cores: P is f16 or bf16 and c a multiple of 8, or a way to multiply floats and c a
// multiple of 4. Weights [phase][chunk][tap along d][along w][CH / ALONG][along h]
// [outs / 16][lane][16 bytes of elements]: for two 8-channel tiles of outputs, the lane's fragment
// of each. 128 threads, one warp per plane of the tile.
// tensor cores
template <class P, int CH, int TAPS, bool GATHER, class T = typename Products<P>::Element>
__device__ __forceinline__ void conv_matrix(unsigned char *shared, const ConvShape &s, const T *x,
                                            const float *norm, const T *add, const T *weights,
                                            const float *bias, const T *start, T *out,
                                            double *partial) {
    typedef Halo<TAPS> H;
    // Taps along an axis, and steps of 16 channels.
    constexpr int STRIDE = CH + PIECE<T>, EDGE = H::R + 1, DEEP = CH / ALONG<T>;
    constexpr bool PHASED = TAPS == 8 && !GATHER;
    T *halo = reinterpret_cast<T *>(shared);
    ConvBlock b(s, PHASED);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float acc[4][4][4] = {};
    int chunks = (s.c + CH - 1) / CH, pairs = (s.outs + OUT - 1) / OUT * 2;
    // This block's share of the chunks, and with GATHER of the phases.
    int all = GATHER ? 8 * chunks : chunks, turn = b.split * all / s.split_k,
        turns = (b.split + 1) * all / s.split_k;
    const T *mine =
        halo + ((warp * H::H + lane / 8 % 2 * 4) * H::W + lane % 8) * STRIDE + lane / 16 * PIECE<T>;
    // A warp beyond the map's edge only loads.
    bool idle = b.d0 + warp >= s.d;
    for (; turn < turns; turn++) {
        int chunk = GATHER ? turn % chunks : turn;
        if (GATHER) b.phase = turn / chunks;
        load_halo_async<TAPS, GATHER, CH, STRIDE, 128>(halo, s, b, x, norm, add, chunk * CH);
        __syncthreads();
        const uint4 *w =
            reinterpret_cast<const uint4 *>(weights) +
            ((int64)(b.phase * chunks + chunk) * TAPS * DEEP * pairs + b.n0 / 16) * 32 + lane;
        add_products<P, H, EDGE, DEEP, STRIDE>(acc, mine, w, pairs, idle);
        __syncthreads();
    }
    if (GATHER) b.phase = 0;
    float sum[8] = {}, squares[8] = {};
    write_fragments<PHASED>(acc, s, b, bias, start, out, sum, squares);
    if (!partial || s.split_k > 1) return;
    int64 tile = ((int64)b.item * gridDim.x + blockIdx.x) * (PHASED ? s.phases : 1) + b.phase;
    store_fragment_sums(reinterpret_cast<float *>(shared), sum, squares, s.outs - b.n0,
                        partial + (tile * s.outs + b.n0) * 2);
}

// A decoder stage of at most CH input channels: a block computes all 8 phases of its tile, one
// after the other, from one halo tile. Phase p reads it from p on.
// tensor cores
template <class P, int CH, class T = typename Products<P>::Element>
__device__ __forceinline__ void stage_matrix(unsigned char *shared, const ConvShape &s, const T *x,
                                             const float *norm, const T *add, const T *weights,
                                             const float *bias, const T *start, T *out,
                                             double *partial) {
    typedef Halo<27> H;
    constexpr int STRIDE = CH + PIECE<T>, DEEP = CH / ALONG<T>;
    T *halo = reinterpret_cast<T *>(shared);
    ConvBlock b(s, false);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pairs = (s.outs + OUT - 1) / OUT * 2;
    load_halo_async<27, false, CH, STRIDE, 128>(halo, s, b, x, norm, add, 0);
    __syncthreads();
    const T *mine =
        halo + ((warp * H::H + lane / 8 % 2 * 4) * H::W + lane % 8) * STRIDE + lane / 16 * PIECE<T>;
    const uint4 *w = reinterpret_cast<const uint4 *>(weights) + b.n0 / 16 * 32 + lane;
    bool idle = b.d0 + warp >= s.d;
    float sum[8] = {}, squares[8] = {};
#pragma unroll 1
    for (b.phase = 0; b.phase < 8; b.phase++) {
        float acc[4][4][4] = {};
        const T *from =
            mine + (((b.phase >> 2) * H::H + (b.phase >> 1 & 1)) * H::W + (b.phase & 1)) * STRIDE;
        add_products<P, H, 2, DEEP, STRIDE>(acc, from, w + (int64)b.phase * 8 * DEEP * pairs * 32,
                                            pairs, idle);
        write_fragments<true>(acc, s, b, bias, start, out, sum, squares);
    }
    if (!partial) return;
    __syncthreads();
    int64 tile = (int64)b.item * gridDim.x + blockIdx.x;
    store_fragment_sums(reinterpret_cast<float *>(shared), sum, squares, s.outs - b.n0,
                        partial + (tile * s.outs + b.n0) * 2);
}

// Adds up partial sums [split_k][n][voxels][outs], and the bias or the initial map; writes sums of
// the result by tiles of 64 voxels, as conv_matrix does for its own tiles. Grid (tiles, outs / 32,
// n), 256 threads of 4 channels.
template <class T>
__device__ __forceinline__ void conv_splitk_reduce(const float *splitk_workspace, const float *bias,
                                                   const T *start, T *out, double *partial,
                                                   int64 voxels, int outs, int split_k) {
    SHARED_MEMORY(shared);
    int n0 = blockIdx.y * OUT, channel = n0 + threadIdx.x % 8 * 4;
    int64 all = gridDim.z * voxels * outs;
    float sum[4] = {}, squares[4] = {};
    for (int r = 0; r < 2; r++) {
        int64 voxel = (int64)blockIdx.x * 64 + r * 32 + threadIdx.x / 8;
        if (voxel >= voxels || channel >= outs) continue;
        int64 at = (blockIdx.z * voxels + voxel) * outs + channel;
        float y[4] = {};
        if (outs % 4 == 0) {
#pragma unroll 4
            for (int i = 0; i < split_k; i++) {
                float more[4];
                load(more, splitk_workspace + i * all + at);
#pragma unroll
                for (int j = 0; j < 4; j++) y[j] += more[j];
            }
            float more[4] = {};
            if (start) load(more, start + at);
#pragma unroll
            for (int j = 0; j < 4; j++)
                y[j] = to_float(from_float<T>(y[j] + (bias ? bias[channel + j] : 0.0f) + more[j]));
            store(out + at, y);
        } else {
            for (int j = 0; j < 4 && channel + j < outs; j++) {
                for (int i = 0; i < split_k; i++) y[j] += splitk_workspace[i * all + at + j];
                y[j] = to_float(from_float<T>(y[j] + (bias ? bias[channel + j] : 0.0f) +
                                              (start ? to_float(start[at + j]) : 0.0f)));
                out[at + j] = from_float<T>(y[j]);
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) sum[j] += y[j], squares[j] += y[j] * y[j];
    }
    if (!partial) return;
    int64 tile = (int64)blockIdx.z * gridDim.x + blockIdx.x;
    store_partial_sums<256>(reinterpret_cast<float *>(shared), sum, squares, outs - n0,
                            partial + (tile * outs + n0) * 2);
}

// One input channel on tensor cores: the 27 taps, padded to 32, take the place of the channels.
// Weights [32 / ALONG][outs / 16][lane][16 bytes of elements], zero from tap 27 on.
// tensor cores
template <class P, class T = typename Products<P>::Element>
__device__ __forceinline__ void conv_single(unsigned char *shared, const ConvShape &s, const T *x,
                                            const float *norm, const T *add, const T *weights,
                                            const float *bias, const T *start, T *out,
                                            double *partial) {
    typedef Halo<27> H;
    T *halo = reinterpret_cast<T *>(shared);
    ConvBlock b(s, false);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pairs = (s.outs + OUT - 1) / OUT * 2;
    float acc[2][4][4] = {};
    load_halo<27, false, 1, 1, 1, 256>(halo, s, b, x, norm, add, 0);
    __syncthreads();
    // Voxel lane / 4 of the first of the warp's two row blocks; its other row is one row further
    // on, the second block two rows.
    const T *mine = halo + (warp / 2 * H::H + warp % 2 * 4) * H::W + lane / 4;
    const uint4 *w = reinterpret_cast<const uint4 *>(weights) + b.n0 / 16 * 32 + lane;
    // Two steps at a time, or one if there are several passes: otherwise more would be started than
    // registers can hold.
    [[maybe_unused]] constexpr int UNROLL = Products<P>::PASSES == 1 ? 2 : 1;
#pragma unroll UNROLL
    for (int k = 0; k < 32 / ALONG<T>; k++) {
        uint4 w0 = load_vector(w), w1 = load_vector(w + 32);
        w += pairs * 32;
        typename Products<P>::Right right[4] = {
            Products<P>::right(w0.x, w0.y), Products<P>::right(w0.z, w0.w),
            Products<P>::right(w1.x, w1.y), Products<P>::right(w1.z, w1.w)};
        // Taps after the last are multiplied by zero, so any voxel will do. A register has two taps
        // of 16 bits, or one.
        constexpr int EACH = 4 / (int)sizeof(T);
        int taps[2 * EACH];
#pragma unroll
        for (int i = 0; i < 2 * EACH; i++) {
            int tap = k * ALONG<T> + i / EACH * (ALONG<T> / 2) + lane % 4 * EACH + i % EACH;
            taps[i] = tap < 27 ? H::tap(tap) : 0;
        }
#pragma unroll
        for (int m = 0; m < 2; m++) {
            FragmentA left;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const T *from = mine + (m * 2 + i % 2) * H::W;
                if constexpr (sizeof(T) == 4)
                    left.r[i] = __float_as_uint(from[taps[i / 2]]);
                else
                    left.r[i] =
                        from[taps[i / 2 * 2]].bits | (unsigned)from[taps[i / 2 * 2 + 1]].bits << 16;
            }
            Products<P>::add(acc[m], left, right);
        }
    }
    __syncthreads();
    float *stage = reinterpret_cast<float *>(shared);
    stage_fragments(stage, acc);
    write_staged<false, 256>(stage, stage + TILE * STAGE, s, b, bias, start, out, partial);
}

// Plain float arithmetic, one voxel per thread: the oracle, and the kernel for maps of few
// channels. Weights are float [phase][chunk][tap][CH][outs, padded to 32]. Sums run over a chunk,
// then over the chunks, so that no chain of additions is long.
template <class T, int CH, int V, int TAPS, bool GATHER>
__device__ __forceinline__ void conv_plain(unsigned char *shared, const ConvShape &s, const T *x,
                                           const float *norm, const T *add, const float *weights,
                                           const float *bias, const T *start, T *out,
                                           double *partial) {
    typedef Halo<TAPS> H;
    constexpr int STRIDE = CH % 2 ? CH : CH + 1;
    float *halo = reinterpret_cast<float *>(shared);
    ConvBlock b(s, TAPS == 8 && !GATHER);
    int t = threadIdx.x, chunks = (s.c + CH - 1) / CH, wide = (s.outs + OUT - 1) / OUT * OUT;
    const float *mine = halo + ((t / 64 * H::H + t / 8 % 8) * H::W + t % 8) * STRIDE;
    float total[OUT] = {};
    bool idle = b.d0 + t / 64 >= s.d || b.h0 + t / 8 % 8 >= s.h || b.w0 + t % 8 >= s.w;
    for (int turn = 0; turn < (GATHER ? 8 * chunks : chunks); turn++) {
        int chunk = GATHER ? turn % chunks : turn;
        if (GATHER) b.phase = turn / chunks;
        if (turn) __syncthreads();
        load_halo<TAPS, GATHER, CH, V, STRIDE, 256>(halo, s, b, x, norm, add, chunk * CH);
        __syncthreads();
        if (idle) continue;
        float acc[OUT] = {};
        const float *w = weights + (int64)(b.phase * chunks + chunk) * TAPS * CH * wide + b.n0;
#pragma unroll 1
        for (int tap = 0; tap < TAPS; tap++) {
            const float *from = mine + H::tap(tap) * STRIDE;
#pragma unroll 1
            for (int c = 0; c < CH; c++, w += wide) {
                float value = from[c], row[OUT];
                load(row, w);
#pragma unroll
                for (int i = 0; i < OUT; i++) acc[i] += value * row[i];
            }
        }
#pragma unroll
        for (int i = 0; i < OUT; i++) total[i] += acc[i];
    }
    __syncthreads();
    if (GATHER) b.phase = 0;
    float *stage = reinterpret_cast<float *>(shared);
    store(stage + t * STAGE, total);
    __syncthreads();
    write_staged<TAPS == 8 && !GATHER, 256>(stage, stage + TILE * STAGE, s, b, bias, start, out,
                                            partial);
}

#define CONV_PARAMETERS(T, W)                                                                      \
    (const T *x, const float *norm, const T *add, const W *weights, const float *bias,             \
     const T *start, T *out, double *partial, int d, int h, int w, int c, int outs, int phases,    \
     int pool, float slope, int split_k, float *splitk_workspace)
#define CONV_BODY(TAPS, ...)                                                                       \
    SHARED_MEMORY(shared);                                                                         \
    ConvShape s{d, h, w, c, outs, phases, pool, slope, split_k, splitk_workspace};                 \
    __VA_ARGS__(shared, s, x, norm, add, weights, bias, start, out, partial)
