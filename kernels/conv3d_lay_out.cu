// Weights of convolutions in the order in which the kernels of lib/conv.cuh read them: of one, or of the phases of a stage.
//
// Given are floats [out][row][tap]; `mirrored` asks for what takes an output's gradient to the input's: inputs and outputs exchanged, taps in reverse order. A block has 16
// outputs and a chunk of inputs, all taps; it reads them in the order of memory into shared memory and writes them in that of the result.
//
//   tensor cores   [phase][chunk][tap along d][along w][chunk / 16][along h][outs / 16][lane][tile][register][element]; of `single` one channel the taps stand where
//                  channels stand. Of floats a register has one element, and a fragment 8 channels: [chunk / 8]
//   floats         [phase][chunk][tap][input][outs]
#include "lib/base.cuh"

constexpr int THREADS = 256, OUTS = 16;

// What a block has of the given weights, in shared memory: [output or, mirrored, input][the other][tap].
struct Given {
    float *values;
    int chunk, taps;
    bool mirrored;

    // An odd number of floats from one to the next.
    __device__ __forceinline__ int stride() const { return ((mirrored ? OUTS : chunk) * taps) | 1; }
    __device__ __forceinline__ float at(int o, int i, int tap) const {
        return mirrored ? values[i * stride() + o * taps + taps - 1 - tap] : values[o * stride() + i * taps + tap];
    }
    // Zero beyond `ins` and `outs`.
    __device__ __forceinline__ void fill(const float *from, int row, int i0, int ins, int o0, int outs) const {
        int run = (mirrored ? OUTS : chunk) * taps, lines = mirrored ? chunk : OUTS;
        int line0 = mirrored ? i0 : o0, first = mirrored ? o0 : i0;
        int line_count = mirrored ? ins - i0 : outs - o0, valid = (mirrored ? outs - o0 : ins - i0) * taps;
        for (int e = threadIdx.x; e < lines * run; e += THREADS) {
            int line = e / run, place = e % run;
            bool there = line < line_count && place < valid;
            values[line * stride() + place] = there ? from[((int64)(line0 + line) * row + first) * taps + place] : 0.0f;
        }
        __syncthreads();
    }
};

// Fragments of 16 outputs, a thread one of 16 bytes. Grid (outs / 16, chunks, phases). `step` counts what stands in front of them.
template <class T>
__device__ __forceinline__ void lay_out_fragments(const float *from, T *to, int64 phase, int row, int ins, int outs, int taps, int chunk, int mirrored, int single) {
    SHARED_MEMORY(shared);
    constexpr int EACH = 4 / (int)sizeof(T), PIECE = 4 * EACH, ALONG = 8 * EACH;
    // A single channel's taps are laid out as so many inputs with one tap.
    int edge = single ? 1 : taps == 27 ? 3 : 2, channels = single ? 1 : chunk, deep = chunk / ALONG, steps = edge * edge * edge * deep;
    Given given{reinterpret_cast<float *>(shared), channels, taps, mirrored != 0};
    given.fill(from + blockIdx.z * phase, row, blockIdx.y * channels, ins, blockIdx.x * OUTS, outs);
    to += ((int64)blockIdx.z * gridDim.y + blockIdx.y) * steps * gridDim.x * 32 * PIECE;
    for (int at = threadIdx.x; at < steps * 32; at += THREADS) {
        int lane = at % 32, step = at / 32, side = step / edge / deep;
        int tap = (side / edge * edge + step % edge) * edge + side % edge;
        float v[PIECE];
#pragma unroll
        for (int e = 0; e < PIECE; e++) {
            int i = step / edge % deep * ALONG + e / EACH % 2 * (ALONG / 2) + lane % 4 * EACH + e % EACH, o = e / (2 * EACH) * 8 + lane / 4;
            v[e] = !single ? given.at(o, i, tap) : i < taps ? given.at(o, 0, i) : 0.0f;
        }
        store(to + (((int64)step * gridDim.x + blockIdx.x) * 32 + lane) * PIECE, v);
    }
}

// Floats for plain arithmetic.
__device__ __forceinline__ void lay_out_plain(const float *from, float *to, int64 phase, int row, int ins, int outs, int taps, int chunk, int mirrored, int) {
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

// `phase` is how far the weights of one phase lie from the next one's, `row` the inputs of a row of outputs.
#define LAY_OUT(NAME, T, FUNCTION)                                                                                                                   \
    KERNEL(conv3d_lay_out_##NAME, 256, 3,                                                                                                            \
           (const float *from, T *to, int64 phase, int row, int ins, int outs, int taps, int chunk, int mirrored, int single),                       \
           FUNCTION(from, to, phase, row, ins, outs, taps, chunk, mirrored, single))
LAY_OUT(f32, f32, lay_out_plain)
LAY_OUT(f16, f16, lay_out_fragments)
LAY_OUT(bf16, bf16, lay_out_fragments)
// For either way to multiply floats on tensor cores, which rounds them as it reads them.
LAY_OUT(tf32, f32, lay_out_fragments)
