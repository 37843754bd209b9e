// The most that a device can do, as a reference for other kernels: matrix products of values that
// never leave the registers.
#include "lib/base.cuh"
#include "lib/matrix.cuh"

// Each warp multiplies 8 independent 16 x 8 x 16 tiles `rounds` times: 8 * 4096 operations per
// round, half as many with TF32.
// tensor cores
template <class P> __device__ __forceinline__ void multiply_only(float *out, int rounds) {
    float acc[8][4] = {};
    FragmentA a;
    unsigned right[2];
    for (int i = 0; i < 4; i++) a.r[i] = threadIdx.x * 0x00010001u & 0x03ff03ffu;
    for (int i = 0; i < 2; i++) right[i] = blockIdx.x * 0x00010001u & 0x03ff03ffu;
    typename Products<P>::Right b[1] = {Products<P>::right(right[0], right[1])};
    for (int r = 0; r < rounds; r++) {
#pragma unroll
        for (int i = 0; i < 8; i++) Products<P>::add(acc + i, a, b);
    }
    float sum = 0.0f;
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 4; j++) sum += acc[i][j];
    out[(int64)blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

KERNEL(ceiling_multiply_f16, 256, 2, (float *out, int rounds), multiply_only<f16>(out, rounds))
KERNEL(ceiling_multiply_bf16, 256, 2, (float *out, int rounds), multiply_only<bf16>(out, rounds))
KERNEL(ceiling_multiply_tf32, 256, 2, (float *out, int rounds), multiply_only<tf32>(out, rounds))

// Float multiply-adds, 32 independent chains per thread: 64 operations per round.
__device__ __forceinline__ void add_only(float *out, int rounds) {
    float acc[32], factor = 1.0f + threadIdx.x * 1e-7f;
    for (int i = 0; i < 32; i++) acc[i] = i;
    for (int r = 0; r < rounds; r++) {
#pragma unroll
        for (int i = 0; i < 32; i++) acc[i] = acc[i] * factor + 1.0f;
    }
    float sum = 0.0f;
    for (int i = 0; i < 32; i++) sum += acc[i];
    out[(int64)blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

KERNEL(ceiling_multiply_f32, 256, 4, (float *out, int rounds), add_only(out, rounds))
