// 3x3x3 convolution of 32 to 32 channels by wgmma, for sm_90a: planes roll through shared memory.
//
//   block    16 x 16 columns of voxels along d, of one item, cut into parts: it walks along d, one
//            plane of the input a step. Threads 0 to 255 are two warpgroups that multiply, of 8
//            rows of 16 voxels each; threads 256 to 383 load. Grid (tiles, items)
//   plane    18 x 18 voxels of the input, [4 groups of 8 channels][18][18] of 16 bytes, normed and
//            activated on the way, zeros beyond the map: a row of 8 voxels along w is a piece of an
//            operand of wgmma, and a tap along h and w is an address (kh * 18 + kw) * 16 further.
//            Five planes are a ring
//   step     a plane is read once and added to three planes of the output, those behind, at and
//            before it: the weights of all three taps along d stand side by side, 96 columns. A
//            plane's sums stay in the same registers from its first step to its third; which of the
//            three groups of 32 columns is which tap along d goes round. So weights are stored in
//            columns 2 1 0 2 1 (taps along d), and a step starts at the first, third or second
//
// Sums: an output's are added up in the order of the planes along d, in a plane in the order of the
// taps along h, then w, then of 16 channels; all in the float accumulators of the tensor cores,
// which add 16 products at once and truncate. Then the bias is added and the sum is rounded once.
// The result's sums for the norm that follows are taken in float over a lane's 32 values of 8
// planes and the eight lanes that have the same channels, in double over the planes, then over the
// warps, all in order: partial sums [item][tile][32][2].
//
// It has not run on a GPU. Counted: docs/kernels.md.
#include "lib/conv.cuh"
#include "lib/wgmma.cuh"

// Everything about a launch but the types of its maps.
struct RollingShape {
    int d, h, w;
    // How many blocks share a column.
    int parts;
    float slope;
};

#ifndef WITHOUT_WGMMA

constexpr int EDGE = 16, HALO = EDGE + 2, CELLS = HALO * HALO;
// Bytes of 8 channels of a plane, from a row to the next, and of a plane. The 32 bytes behind a
// group put the four groups of two neighbouring voxels on different banks.
constexpr int GROUP = CELLS * 16 + 32, ROW = HALO * 16, PLANE = 4 * GROUP;
constexpr int PLANES = 5;
// Columns of weights in pieces of 8, and bytes from 8 channels to the next 8.
constexpr int COLUMNS = 5 * OUT / 8, DEEPER = COLUMNS * 128;
constexpr int WEIGHTS = 9 * 4 * DEEPER;
// The most planes whose sums are added up in float.
constexpr int FEW_PLANES = 8;
constexpr int MULTIPLIERS = 256, LOADERS = 128;

// The block's shared memory. The launching side knows its size (src/ops/conv3d/rolling.rs).
struct RollingMemory {
    unsigned char *planes, *weights;
    // [warp][32][2]
    double *bins;
    // A plane is full, or has been multiplied.
    PhaseBarrier *full, *empty;

    __device__ __forceinline__ RollingMemory(unsigned char *shared)
        : planes(shared), weights(shared + PLANES * PLANE),
          bins(reinterpret_cast<double *>(weights + WEIGHTS)),
          full(reinterpret_cast<PhaseBarrier *>(bins + MULTIPLIERS / 32 * OUT * 2)),
          empty(full + PLANES) {}
};

// The voxels that this block computes: planes d0 to d1 of a column.
struct RollingBlock {
    int item, d0, d1, h0, w0;

    __device__ __forceinline__ RollingBlock(const RollingShape &s) : item(blockIdx.y) {
        int part = blockIdx.x % s.parts, column = blockIdx.x / s.parts,
            across = (s.w + EDGE - 1) / EDGE, each = (s.d + s.parts - 1) / s.parts;
        d0 = part * each, d1 = min(d0 + each, s.d), h0 = column / across * EDGE,
            w0 = column % across * EDGE;
    }

    // From the plane before the first to the one behind the last.
    __device__ __forceinline__ int steps() const { return d1 - d0 + 2; }
};

// The place in the ring, and how often it was come by.
struct Turn {
    int slot = 0;
    unsigned phase = 0;

    __device__ __forceinline__ void next() {
        if (++slot == PLANES) slot = 0, phase ^= 1;
    }
};

// Puts the weights, which lie as conv_matrix reads them, in the order of wgmma. A thread has the
// same lane's fragments of the nine taps along d and w.
template <class T>
__device__ __forceinline__ void lay_out_weights(unsigned char *to, const T *weights) {
    int thread = threadIdx.x, lane = thread % 32, pair = thread / 32 % 2, kh = thread / 64 % 3,
        deep = thread / 192;
    const uint4 *from = reinterpret_cast<const uint4 *>(weights) + thread;
#pragma unroll
    for (int side = 0; side < 9; side++) {
        int kd = side / 3, kw = side % 3;
        uint4 four = load_vector(from + side * (MULTIPLIERS + LOADERS));
        unsigned words[4] = {four.x, four.y, four.z, four.w};
        unsigned char *tap = to + (kh * 3 + kw) * 4 * DEEPER + lane * 4;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int tile = i / 2, half = i % 2;
            unsigned char *at = tap + (deep * 2 + half) * DEEPER + (pair * 2 + tile) * 128;
#pragma unroll
            for (int block = 2 - kd; block < 5; block += 3)
                *reinterpret_cast<unsigned *>(at + block * (OUT / 8) * 128) = words[i];
        }
    }
}

// Fills the ring. A thread has 8 channels of every 32nd voxel of a plane.
template <class T>
__device__ __forceinline__ void load_planes(const RollingMemory &memory, const RollingShape &s,
                                            const RollingBlock &b, const T *x, const float *norm,
                                            const T *add) {
    constexpr int COUNT = (CELLS + 31) / 32, AHEAD = 6;
    int thread = threadIdx.x - MULTIPLIERS, pack = thread % 4, first = thread / 4;
    bool adds = add != nullptr;
    Prologue<T> prologue(norm ? norm + ((int64)b.item * OUT + pack * 8) * 3 : nullptr, adds,
                         s.slope);
    // The voxels' places in a plane, and which of them are there.
    int places[COUNT];
    unsigned there = 0;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        int cell = first + i * 32, h = b.h0 - 1 + cell / HALO, w = b.w0 - 1 + cell % HALO;
        bool inside = cell < CELLS && (unsigned)h < (unsigned)s.h && (unsigned)w < (unsigned)s.w;
        places[i] = inside ? h * s.w + w : 0;
        there |= (unsigned)inside << i;
    }
    int64 plane = (int64)s.h * s.w * OUT,
          from = ((int64)b.item * s.d + b.d0 - 1) * plane + pack * 8;
    Turn turn;
#pragma unroll 1
    for (int step = 0; step < b.steps(); step++, from += plane, turn.next()) {
        wait(memory.empty + turn.slot, turn.phase ^ 1);
        unsigned here = (unsigned)(b.d0 - 1 + step) < (unsigned)s.d ? there : 0;
        unsigned char *cell = memory.planes + turn.slot * PLANE + pack * GROUP + first * 16;
#pragma unroll
        for (int begin = 0; begin < COUNT; begin += AHEAD) {
            RawVector<T, 8> values[AHEAD], more[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD && begin + i < COUNT; i++) {
                if (here >> (begin + i) & 1) {
                    int64 at = from + (int64)places[begin + i] * OUT;
                    values[i] = load_raw<8>(x + at);
                    if (adds) more[i] = load_raw<8>(add + at);
                }
            }
#pragma unroll
            for (int i = 0; i < AHEAD && begin + i < COUNT; i++) {
                RawVector<T, 8> value = {};
                if (here >> (begin + i) & 1) value = prologue.of(values[i], more[i]);
                if (first + (begin + i) * 32 < CELLS)
                    *reinterpret_cast<RawVector<T, 8> *>(cell + (begin + i) * 32 * 16) = value;
            }
        }
        fence_async();
        arrive(memory.full + turn.slot);
    }
}

// What a thread of those that multiply keeps.
template <class T> struct RollingSums {
    // Two tiles of 8 rows of 8 voxels, three planes of 32 channels each.
    float acc[2][48] = {};
    // The plane that was finished last, as elements: tile, row, pairs of channels.
    unsigned done[2][2][4];
    float offset[8];
    float sum[8] = {}, squares[8] = {};

    // Takes the finished plane of the group TURN out of its registers.
    template <int TURN> __device__ __forceinline__ void take() {
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int i = 0; i < 16; i += 2) {
                float *pair_of = &acc[m][TURN * 16 + i];
                int n = i / 4, row = i / 2 % 2;
                done[m][row][n] =
                    pair<T>(pair_of[0] + offset[n * 2], pair_of[1] + offset[n * 2 + 1]);
                pair_of[0] = pair_of[1] = 0.0f;
            }
        }
    }

    // Writes it as plane `d`.
    __device__ __forceinline__ void put(const RollingShape &s, const RollingBlock &b, int d,
                                        T *out) {
        int thread = own_thread(), lane = thread % 32, h = b.h0 + thread / 32 * 2,
            w = b.w0 + lane / 4;
        T *to = out + ((((int64)b.item * s.d + d) * s.h + h) * s.w + w) * OUT + lane % 4 * 8;
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int row = 0; row < 2; row++) {
                unsigned(&r)[4] = done[m][row];
                transpose_lanes(r);
                if (h + row < s.h && w + m * 8 < s.w) {
                    RawVector<T, 8> value;
#pragma unroll
                    for (int i = 0; i < 4; i++) value.words.v[i] = r[i];
                    *reinterpret_cast<RawVector<T, 8> *>(to + (row * s.w + m * 8) * OUT) = value;
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        float y = element(value, i);
                        sum[i] += y, squares[i] += y * y;
                    }
                }
            }
        }
    }

    // Adds the sums to the warp's in shared memory.
    __device__ __forceinline__ void collect(double *bins) {
        int lane = threadIdx.x % 32;
        double *bin = bins + (threadIdx.x / 32 * OUT + lane * 8) * 2;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            add_lanes<4>(sum[i], squares[i]);
            if (lane < 4) bin[i * 2] += sum[i], bin[i * 2 + 1] += squares[i];
            sum[i] = squares[i] = 0.0f;
        }
    }
};

template <int N> struct Number {
    static constexpr int VALUE = N;
};

// Multiplies the planes of the ring one after the other.
template <class T>
__device__ __forceinline__ void multiply_planes(const RollingMemory &memory, const RollingShape &s,
                                                const RollingBlock &b, const float *bias, T *out,
                                                bool sums) {
    int lane = threadIdx.x % 32, half = threadIdx.x / 128;
    RollingSums<T> of;
#pragma unroll
    for (int i = 0; i < 8; i++) of.offset[i] = bias[i / 2 * 8 + lane % 4 * 2 + i % 2];
    Descriptor left = describe(memory.planes + half * 8 * ROW, GROUP, ROW),
               right = describe(memory.weights, DEEPER, 128);
    Turn turn;
    // Step `step` reads plane d0 - 1 + step. Before it the plane that was finished by the step
    // before is d0 + step - 3.
    auto step_of = [&](auto number, int step) {
        constexpr int TURN = decltype(number)::VALUE;
        wait(memory.full + turn.slot, turn.phase);
        fence_sums(of.acc);
        Descriptor plane = left + turn.slot * (PLANE / 16);
#pragma unroll
        for (int tap = 0; tap < 9; tap++) {
#pragma unroll
            for (int k = 0; k < 2; k++) {
                Descriptor columns =
                    right + ((tap * 4 + k * 2) * DEEPER + (3 - TURN) % 3 * (OUT / 8) * 128) / 16;
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    start_product<T>(
                        of.acc[m],
                        plane + (tap / 3 * ROW + (tap % 3 + m * 8) * 16 + k * 2 * GROUP) / 16,
                        columns);
                }
            }
        }
        commit_products();
        // Meanwhile.
        if (step >= 3) {
            of.put(s, b, b.d0 + step - 3, out);
            if (sums && (step - 2) % FEW_PLANES == 0) of.collect(memory.bins);
        }
        await_products(of.acc);
        if (lane == 0) arrive(memory.empty + turn.slot);
        turn.next();
        of.template take<TURN>();
    };
#pragma unroll 1
    for (int step = 0; step < b.steps(); step += 3) {
        step_of(Number<0>{}, step);
        if (step + 1 < b.steps()) step_of(Number<1>{}, step + 1);
        if (step + 2 < b.steps()) step_of(Number<2>{}, step + 2);
    }
    of.put(s, b, b.d1 - 1, out);
    if (sums) of.collect(memory.bins);
}

#endif

// tensor cores
template <class T>
__device__ __forceinline__ void conv_rolling(unsigned char *shared, const RollingShape &s,
                                             const T *x, const float *norm, const T *add,
                                             const T *weights, const float *bias, T *out,
                                             double *partial) {
#ifdef WITHOUT_WGMMA
    stop();
#else
    RollingMemory memory(shared);
    RollingBlock b(s);
    if (threadIdx.x == 0) {
        for (int i = 0; i < PLANES; i++)
            make_barrier(memory.full + i, LOADERS),
                make_barrier(memory.empty + i, MULTIPLIERS / 32);
    }
    for (int i = threadIdx.x; i < MULTIPLIERS / 32 * OUT * 2; i += MULTIPLIERS + LOADERS)
        memory.bins[i] = 0;
    lay_out_weights(memory.weights, weights);
    fence_async();
    __syncthreads();
    if (threadIdx.x >= MULTIPLIERS) {
        load_planes(memory, s, b, x, norm, add);
    } else {
        multiply_planes(memory, s, b, bias, out, partial != nullptr);
    }
    __syncthreads();
    if (!partial || threadIdx.x >= 2 * OUT) return;
    double total = 0;
    for (int warp = 0; warp < MULTIPLIERS / 32; warp++)
        total += memory.bins[warp * OUT * 2 + threadIdx.x];
    partial[((int64)b.item * gridDim.x + blockIdx.x) * OUT * 2 + threadIdx.x] = total;
#endif
}

#define ROLLING(T)                                                                                 \
    KERNEL(conv3d_rolling_##T, 384, 1,                                                             \
           (const T *x, const float *norm, const T *add, const T *weights, const float *bias,      \
            T *out, double *partial, int d, int h, int w, int parts, float slope),                 \
           WGMMA_SHARED_MEMORY(shared);                                                            \
           conv_rolling(shared, RollingShape{d, h, w, parts, slope}, x, norm, add, weights, bias,  \
                        out, partial))
ROLLING(f16)
ROLLING(bf16)
