// 3x3x3 convolution of float32 on tensor cores, in one pass and in three: see lib/conv.cuh and
// lib/matrix.cuh. A separate file, so that programs with 16-bit maps do not wait for it to compile.
#include "lib/conv.cuh"

// 16 channels take as many bytes as 32 channels of 16 bits. Three passes take more registers, and
// leave less latency for other blocks to cover.
#define MATRIX(P, BLOCKS)                                                                          \
    KERNEL(conv3d_single_##P, 256, BLOCKS, CONV_PARAMETERS(f32, f32),                              \
           CONV_BODY(27, conv_single<P>))                                                          \
    KERNEL(conv3d_16_##P, 128, BLOCKS, CONV_PARAMETERS(f32, f32),                                  \
           CONV_BODY(27, conv_matrix<P, 16, 27, false>))
MATRIX(tf32, 3)
MATRIX(tf32x3, 2)
