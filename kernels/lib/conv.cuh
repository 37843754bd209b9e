// 3x3x3 convolution and the decoder stage: an implicit matrix product over a halo tile in shared memory.
//
//   block    4 x 8 x 8 output voxels (256) and 32 output channels, of one item and, in a decoder stage, one of the 8 phases
//   loop     over chunks of CH input channels: the tile with its border, 6 x 10 x 10 voxels (a stage: 5 x 9 x 9), is loaded once,
//            normalised, activated, added to and pooled on the way, and read by all taps from shared memory
//   warp     32 voxels: four rows of 8 along w in one plane
//
// TAPS is 27 for the convolution, 8 for a stage, whose phase p (bits d, h, w) reads coarse voxels from -1 + p to p along each axis and writes
// every other fine voxel. With GATHER, a stage's input gradient, the loaded map is the fine one, of which a coarse voxel takes all 8 phases one after the other, each
// from -p to 1 - p. Weights come from global memory in the order in which they are used, so that every warp of every block reads the
// same lines from the caches, and need no shared memory and no barrier.
//
// The result, plus bias or a map to start from, goes through shared memory once more, so that voxels are written whole, and each block leaves
// per-channel sums of values and squares for the instance norm behind it: float over 8 values and 4 lanes, double from there on.
#pragma once
#include "lib/base.cuh"
#include "lib/matrix.cuh"

constexpr int TILE_D = 4, TILE_H = 8, TILE_W = 8, TILE = 256, OUT = 32;
// Floats per voxel of the staged result: a multiple of 4, and rows fall on different banks.
constexpr int STAGE = OUT + 4;

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
};

// Where this block works.
struct ConvBlock {
    int d0, h0, w0, n0, item, phase;

    // `stage`: whether this is a decoder stage, which alone has phases.
    __device__ __forceinline__ ConvBlock(const ConvShape &s, bool stage) {
        int th = (s.h + TILE_H - 1) / TILE_H, tw = (s.w + TILE_W - 1) / TILE_W;
        int tile = blockIdx.x;
        w0 = tile % tw * TILE_W, h0 = tile / tw % th * TILE_H, d0 = tile / tw / th * TILE_D;
        n0 = blockIdx.y * OUT;
        item = stage ? blockIdx.z / s.phases : blockIdx.z, phase = stage ? blockIdx.z % s.phases : 0;
    }

    // Any tile of an item.
    __device__ __forceinline__ ConvBlock(const ConvShape &s, int item, int tile, int n0, int phase) : n0(n0), item(item), phase(phase) {
        int th = (s.h + TILE_H - 1) / TILE_H, tw = (s.w + TILE_W - 1) / TILE_W;
        w0 = tile % tw * TILE_W, h0 = tile / tw % th * TILE_H, d0 = tile / tw / th * TILE_D;
    }

    // The phase's voxel of a map `up` times as fine.
    __device__ __forceinline__ int64 voxel(const ConvShape &s, int up, int d, int h, int w) const {
        return (((int64)item * up * s.d + up * d + (phase >> 2)) * up * s.h + up * h + (phase >> 1 & 1)) * up * s.w + up * w + (phase & 1);
    }
};

// Tiles of an item.
__device__ __forceinline__ int conv_tiles(const ConvShape &s) {
    return ((s.d + TILE_D - 1) / TILE_D) * ((s.h + TILE_H - 1) / TILE_H) * ((s.w + TILE_W - 1) / TILE_W);
}

template <int TAPS> struct Halo {
    static constexpr int R = TAPS == 27 ? 2 : 1;
    static constexpr int D = TILE_D + R, H = TILE_H + R, W = TILE_W + R, VOXELS = D * H * W;

    // The halo voxel that tap `t` adds to a tile voxel's own.
    static __device__ __forceinline__ int tap(int t) {
        return TAPS == 27 ? (t / 9 * H + t / 3 % 3) * W + t % 3 : ((t >> 2) * H + (t >> 1 & 1)) * W + (t & 1);
    }
};

// One voxel's V channels from c0 on, with everything that stands in front of the convolution.
template <int V, class T>
__device__ __forceinline__ void fetch(float (&v)[V], const T *x, const T *add, const float *norm, const float (&coefficients)[V][3], float slope,
                                      int64 at) {
    load(v, x + at);
    if (norm) {
#pragma unroll
        for (int i = 0; i < V; i++) v[i] = normed(v[i], coefficients[i], slope);
    }
    if (add) {
        float a[V];
        load(a, add + at);
#pragma unroll
        for (int i = 0; i < V; i++) v[i] += a[i];
    }
}

// Loads channels `c0` to `c0 + CH` of the halo tile, V at a time, to `to` with STRIDE elements a voxel. `norm` holds [item][c][3].
template <int TAPS, bool GATHER, int CH, int V, int STRIDE, int THREADS, class T, class S>
__device__ __forceinline__ void load_halo(S *to, const ConvShape &s, const ConvBlock &b, const T *x, const float *norm, const T *add, int c0) {
    typedef Halo<TAPS> H;
    static_assert(THREADS % (CH / V) == 0, "a thread keeps its channels");
    int channel = c0 + threadIdx.x % (CH / V) * V;
    int od = b.d0 - 1, oh = b.h0 - 1, ow = b.w0 - 1;
    if (GATHER) {
        od += 1 - (b.phase >> 2), oh += 1 - (b.phase >> 1 & 1), ow += 1 - (b.phase & 1);
    } else if (TAPS == 8) {
        od += b.phase >> 2, oh += b.phase >> 1 & 1, ow += b.phase & 1;
    }
    float coefficients[V][3];
    // Needed by nobody, but with it a stage fits its registers, and without it a convolution.
    if (TAPS == 8) {
#pragma unroll
        for (int i = 0; i < V * 3; i++) coefficients[i / 3][i % 3] = 0.0f;
    }
    bool there = channel < s.c;
    if (norm && there) {
#pragma unroll
        for (int i = 0; i < V; i++)
            for (int j = 0; j < 3; j++) coefficients[i][j] = norm[((int64)b.item * s.c + channel + i) * 3 + j];
    }
#pragma unroll 1
    for (int at = threadIdx.x / (CH / V); at < H::VOXELS; at += THREADS / (CH / V)) {
        int d = od + at / (H::W * H::H), h = oh + at / H::W % H::H, w = ow + at % H::W;
        float v[V];
#pragma unroll
        for (int i = 0; i < V; i++) v[i] = 0.0f;
        if (there && d >= 0 && d < s.d && h >= 0 && h < s.h && w >= 0 && w < s.w) {
            if (s.pool) {
                for (int p = 0; p < 8; p++) {
                    int64 voxel = (((int64)b.item * 2 * s.d + 2 * d + (p >> 2)) * 2 * s.h + 2 * h + (p >> 1 & 1)) * 2 * s.w + 2 * w + (p & 1);
                    float u[V];
                    fetch(u, x, add, norm, coefficients, s.slope, voxel * s.c + channel);
#pragma unroll
                    for (int i = 0; i < V; i++) v[i] = p ? fmaxf(v[i], u[i]) : u[i];
                }
            } else {
                int64 voxel = GATHER ? b.voxel(s, 2, d, h, w) : (((int64)b.item * s.d + d) * s.h + h) * s.w + w;
                fetch(v, x, add, norm, coefficients, s.slope, voxel * s.c + channel);
            }
        }
        S *row = to + at * STRIDE + threadIdx.x % (CH / V) * V;
        if constexpr (sizeof(S) == 2) {
            store(row, v);
        } else {
#pragma unroll
            for (int i = 0; i < V; i++) row[i] = v[i];
        }
    }
}

// Writes the block's staged result [256][STAGE], adds bias or the map to start from, and leaves the sums. `bins` holds 8 * 2 * OUT floats.
template <bool PHASED, class T>
__device__ __forceinline__ void finish(const float *stage, float *bins, const ConvShape &s, const ConvBlock &b, const float *bias, const T *start, T *out,
                                       double *partial) {
    int column = threadIdx.x % 8 * 4, channel = b.n0 + column;
    float sum[4] = {}, squares[4] = {}, offset[4] = {};
    if (bias) {
#pragma unroll
        for (int i = 0; i < 4; i++) offset[i] = channel + i < s.outs ? bias[channel + i] : 0.0f;
    }
    bool vector = s.outs % 4 == 0 && channel < s.outs;
    int phases = PHASED ? s.phases : 1, up = phases == 8 ? 2 : 1;
#pragma unroll 2
    for (int r = 0; r < TILE / 32; r++) {
        int v = threadIdx.x / 8 + r * 32;
        int d = b.d0 + v / 64, h = b.h0 + v / 8 % 8, w = b.w0 + v % 8;
        if (d >= s.d || h >= s.h || w >= s.w) continue;
        int64 at = b.voxel(s, up, d, h, w) * s.outs + channel;
        float y[4], more[4] = {};
        load(y, stage + v * STAGE + column);
        if (vector) {
            if (start) load(more, start + at);
#pragma unroll
            for (int i = 0; i < 4; i++) y[i] = to_float(from_float<T>(y[i] + offset[i] + more[i]));
            store(out + at, y);
        } else {
            for (int i = 0; i < 4; i++) {
                if (channel + i >= s.outs) break;
                if (start) more[i] = to_float(start[at + i]);
                y[i] = to_float(from_float<T>(y[i] + offset[i] + more[i]));
                out[at + i] = from_float<T>(y[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] += y[i], squares[i] += y[i] * y[i];
    }
    if (!partial) return;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int o = 8; o < 32; o *= 2) {
            sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], o);
            squares[i] += __shfl_xor_sync(0xffffffffu, squares[i], o);
        }
        if (threadIdx.x % 32 < 8) {
            float *bin = bins + (threadIdx.x / 32 * OUT + column + i) * 2;
            bin[0] = sum[i], bin[1] = squares[i];
        }
    }
    __syncthreads();
    if (threadIdx.x < 2 * OUT) {
        int c = threadIdx.x / 2;
        double total = 0;
        for (int part = 0; part < 8; part++) total += bins[(part * OUT + c) * 2 + threadIdx.x % 2];
        int64 tile = ((int64)b.item * gridDim.x + blockIdx.x) * phases + b.phase;
        if (b.n0 + c < s.outs) partial[(tile * s.outs + b.n0 + c) * 2 + threadIdx.x % 2] = total;
    }
}

// A warp's sums of 32 voxels and 32 outputs to the staged result, all warps' before anybody goes on.
__device__ __forceinline__ void stage_fragments(float *stage, const float (&acc)[2][4][4]) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int v = warp * 32 + m * 16 + half * 8 + lane / 4;
                float pair[2] = {acc[m][n][half * 2], acc[m][n][half * 2 + 1]};
                store(stage + v * STAGE + n * 8 + lane % 4 * 2, pair);
            }
        }
    }
    __syncthreads();
}

// Tensor cores: T is f16 or bf16, c a multiple of 8. Weights [phase][chunk][tap][CH / 16][outs / 16][lane][8] elements: for two 8-channel
// tiles of outputs, the lane's fragment of each.
template <class T, int CH, int TAPS, bool GATHER>
__device__ __forceinline__ void conv_matrix(unsigned char *shared, const ConvShape &s, const T *x, const float *norm, const T *add, const T *weights,
                                            const float *bias, const T *start, T *out, double *partial) {
    typedef Halo<TAPS> H;
    constexpr int STRIDE = CH + 8;
    T *halo = reinterpret_cast<T *>(shared);
    ConvBlock b(s, TAPS == 8 && !GATHER);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float acc[2][4][4] = {};
    int chunks = (s.c + CH - 1) / CH, pairs = (s.outs + OUT - 1) / OUT * 2;
    // The tile voxel of row lane % 16 of the first of the warp's two row blocks; the second lies two rows of w further.
    int row = (warp / 2 * H::H + warp % 2 * 4 + lane % 16 / 8) * H::W + lane % 8;
    const T *mine = halo + row * STRIDE + lane / 16 * 8;
    // A warp beyond the map's edge has nothing to do but load.
    bool idle = b.d0 + warp / 2 >= s.d || b.h0 + warp % 2 * 4 >= s.h;
    for (int turn = 0; turn < (GATHER ? 8 * chunks : chunks); turn++) {
        int chunk = GATHER ? turn % chunks : turn;
        if (GATHER) b.phase = turn / chunks;
        if (turn) __syncthreads();
        load_halo<TAPS, GATHER, CH, 8, STRIDE, 256>(halo, s, b, x, norm, add, chunk * CH);
        __syncthreads();
        if (idle) continue;
        const uint4 *w = reinterpret_cast<const uint4 *>(weights) + ((int64)(b.phase * chunks + chunk) * TAPS * (CH / 16) * pairs + b.n0 / 16) * 32 + lane;
#pragma unroll (CH == 16 && TAPS == 27 ? 9 : 3)
        for (int tap = 0; tap < TAPS; tap++) {
            const T *from = mine + H::tap(tap) * STRIDE;
#pragma unroll
            for (int k = 0; k < CH / 16; k++) {
                uint4 w0 = whole(w), w1 = whole(w + 32);
                w += (int64)pairs * 32;
                FragmentB right[4] = {{{w0.x, w0.y}}, {{w0.z, w0.w}}, {{w1.x, w1.y}}, {{w1.z, w1.w}}};
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    FragmentA left;
                    load_matrices(left.r, from + m * 2 * H::W * STRIDE + k * 16);
#pragma unroll
                    for (int n = 0; n < 4; n++) multiply<T>(acc[m][n], left, right[n]);
                }
            }
        }
    }
    __syncthreads();
    if (GATHER) b.phase = 0;
    float *stage = reinterpret_cast<float *>(shared);
    stage_fragments(stage, acc);
    finish<TAPS == 8 && !GATHER>(stage, stage + TILE * STAGE, s, b, bias, start, out, partial);
}

// One input channel on tensor cores: the 27 taps, rounded up to 32, stand where channels stand otherwise. Weights [2][outs / 16][lane][8] elements, zero from tap 27 on.
template <class T>
__device__ __forceinline__ void conv_single(unsigned char *shared, const ConvShape &s, const T *x, const float *norm, const T *add, const T *weights,
                                            const float *bias, const T *start, T *out, double *partial) {
    typedef Halo<27> H;
    T *halo = reinterpret_cast<T *>(shared);
    ConvBlock b(s, false);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pairs = (s.outs + OUT - 1) / OUT * 2;
    float acc[2][4][4] = {};
    load_halo<27, false, 1, 1, 1, 256>(halo, s, b, x, norm, add, 0);
    __syncthreads();
    // Voxel lane / 4 of the first of the warp's two row blocks; a row of w further its other row, two rows further the second block.
    const T *mine = halo + (warp / 2 * H::H + warp % 2 * 4) * H::W + lane / 4;
    const uint4 *w = reinterpret_cast<const uint4 *>(weights) + b.n0 / 16 * 32 + lane;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        uint4 w0 = whole(w), w1 = whole(w + 32);
        w += pairs * 32;
        FragmentB right[4] = {{{w0.x, w0.y}}, {{w0.z, w0.w}}, {{w1.x, w1.y}}, {{w1.z, w1.w}}};
        // Taps behind the last are multiplied by zero: any voxel will do.
        int taps[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int tap = k * 16 + i / 2 * 8 + lane % 4 * 2 + i % 2;
            taps[i] = tap < 27 ? H::tap(tap) : 0;
        }
#pragma unroll
        for (int m = 0; m < 2; m++) {
            FragmentA left;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const T *from = mine + (m * 2 + i % 2) * H::W;
                left.r[i] = from[taps[i / 2 * 2]].bits | (unsigned)from[taps[i / 2 * 2 + 1]].bits << 16;
            }
#pragma unroll
            for (int n = 0; n < 4; n++) multiply<T>(acc[m][n], left, right[n]);
        }
    }
    __syncthreads();
    float *stage = reinterpret_cast<float *>(shared);
    stage_fragments(stage, acc);
    finish<false>(stage, stage + TILE * STAGE, s, b, bias, start, out, partial);
}

// Plain float arithmetic, a thread a voxel: the oracle, and what maps of few channels use. Weights are float [phase][chunk][tap][CH][outs, padded to
// 32]. Sums run over a chunk, then over the chunks, so that no chain is long.
template <class T, int CH, int V, int TAPS, bool GATHER>
__device__ __forceinline__ void conv_plain(unsigned char *shared, const ConvShape &s, const T *x, const float *norm, const T *add, const float *weights,
                                           const float *bias, const T *start, T *out, double *partial) {
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
    finish<TAPS == 8 && !GATHER>(stage, stage + TILE * STAGE, s, b, bias, start, out, partial);
}

#define CONV_PARAMETERS(T, W)                                                                                                                  \
    (const T *x, const float *norm, const T *add, const W *weights, const float *bias, const T *start, T *out, double *partial, int d, int h,  \
     int w, int c, int outs, int phases, int pool, float slope)
#define CONV_BODY(TAPS, ...)                                                                                                  \
    SHARED_MEMORY(shared);                                                                                                    \
    ConvShape s{d, h, w, c, outs, phases, pool, slope};                                                                       \
    __VA_ARGS__(shared, s, x, norm, add, weights, bias, start, out, partial)
