// Weights of convolutions in the order in which the kernels of lib/conv.cuh read them: those of one
// convolution, or those of a stage's phases.
//
// The source is floats [out][row][tap]; `mirrored` makes the weights that turn an output's gradient
// into the input's: inputs and outputs exchanged, taps in reverse order. A block has 16 outputs and
// a chunk of inputs with all taps; it reads them in source order into shared memory and writes them
// in the order of the result.
//
//   tensor cores   [phase][chunk][tap along d][along w][chunk / 16][along h][outs / 16]
//                  [lane][tile][register][element]; with a `single` channel the taps take the place
//                  of the channels. With floats a register has one element and a fragment 8
//                  channels: [chunk / 8]
//   floats         [phase][chunk][tap][input][outs]
#include "lib/base.cuh"

constexpr int THREADS = 256, OUTS = 16;

// A block's part of the source weights, in shared memory:
// [output or, mirrored, input][the other][tap].
struct Given {
    float *values;
    int chunk, taps;
    bool mirrored;

    // The distance between rows, an odd number of floats so that they fall on different banks.
    __device__ __forceinline__ int stride() const { return ((mirrored ? OUTS : chunk) * taps) | 1; }
    __device__ __forceinline__ float at(int o, int i, int tap) const {
        return mirrored ? values[i * stride() + o * taps + taps - 1 - tap]
                        : values[o * stride() + i * taps + tap];
    }
    // Zero beyond `ins` and `outs`.
    __device__ __forceinline__ void fill(const float *from, int row, int i0, int ins, int o0,
                                         int outs) const {
        int run = (mirrored ? OUTS : chunk) * taps, lines = mirrored ? chunk : OUTS;
        int line0 = mirrored ? i0 : o0, first = mirrored ? o0 : i0;
        int line_count = mirrored ? ins - i0 : outs - o0,
            valid = (mirrored ? outs - o0 : ins - i0) * taps;
        for (int e = threadIdx.x; e < lines * run; e += THREADS) {
            int line = e / run, place = e % run;
            bool there = line < line_count && place < valid;
            values[line * stride() + place] =
                there ? from[((int64)(line0 + line) * row + first) * taps + place] : 0.0f;
        }
        __syncthreads();
    }
};

// Fragments of 16 outputs, one of 16 bytes per thread. Grid (outs / 16, chunks, phases). `step` is
// a fragment's number within its chunk.
template <class T>
__device__ __forceinline__ void lay_out_fragments(const float *from, T *to, int64 phase, int row,
                                                  int ins, int outs, int taps, int chunk,
                                                  int mirrored, int single) {
    SHARED_MEMORY(shared);
    constexpr int EACH = 4 / (int)sizeof(T), PIECE = 4 * EACH, ALONG = 8 * EACH;
    // The taps of a single channel are laid out as that many inputs with one tap each.
    int edge = single ? 1 : taps == 27 ? 3 : 2, channels = single ? 1 : chunk,
        deep = chunk / ALONG, steps = edge * edge * edge * deep;
    Given given{reinterpret_cast<float *>(shared), channels, taps, mirrored != 0};
    given.fill(from + blockIdx.z * phase, row, blockIdx.y * channels, ins, blockIdx.x * OUTS, outs);
    to += ((int64)blockIdx.z * gridDim.y + blockIdx.y) * steps * gridDim.x * 32 * PIECE;
    for (int at = threadIdx.x; at < steps * 32; at += THREADS) {
        int lane = at % 32, step = at / 32, side = step / edge / deep;
        int tap = (side / edge * edge + step % edge) * edge + side % edge;
        float v[PIECE];
#pragma unroll
        for (int e = 0; e < PIECE; e++) {
            int i = step / edge % deep * ALONG + e / EACH % 2 * (ALONG / 2) +
                    lane % 4 * EACH + e % EACH,
                o = e / (2 * EACH) * 8 + lane / 4;
            v[e] = !single ? given.at(o, i, tap) : i < taps ? given.at(o, 0, i) : 0.0f;
        }
        store(to + (((int64)step * gridDim.x + blockIdx.x) * 32 + lane) * PIECE, v);
    }
}

// Floats for plain arithmetic.
__device__ __forceinline__ void lay_out_plain(const float *from, float *to, int64 phase, int row,
                                              int ins, int outs, int taps, int chunk, int mirrored,
                                              int) {
    SHARED_MEMORY(shared);
    Given given{reinterpret_cast<float *>(shared), chunk, taps, mirrored != 0};
    given.fill(from + blockIdx.z * phase, row, blockIdx.y * chunk, ins, blockIdx.x * OUTS, outs);
    int wide = gridDim.x * OUTS;
    to += ((int64)blockIdx.z * gridDim.y + blockIdx.y) * taps * chunk * wide + blockIdx.x * OUTS;
    for (int at = threadIdx.x; at < taps * chunk * OUTS; at += THREADS) {
        int o = at % OUTS, i = at / OUTS % chunk, tap = at / OUTS / chunk;
        to[(int64)(tap * chunk + i) * wide + o] = given.at(o, i, tap);
    }
}

// `phase` is the distance between the weights of one phase and the next, `row` the number of inputs
// in a row of an output.
#define LAY_OUT(NAME, T, FUNCTION)                                                                 \
    KERNEL(conv3d_lay_out_##NAME, 256, 3,                                                          \
           (const float *from, T *to, int64 phase, int row, int ins, int outs, int taps,           \
            int chunk, int mirrored, int single),                                                  \
           FUNCTION(from, to, phase, row, ins, outs, taps, chunk, mirrored, single))
LAY_OUT(f32, f32, lay_out_plain)
LAY_OUT(f16, f16, lay_out_fragments)
LAY_OUT(bf16, bf16, lay_out_fragments)
// For both ways to multiply floats on tensor cores, which round them as they read them.
LAY_OUT(tf32, f32, lay_out_fragments)
