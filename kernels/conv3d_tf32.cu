// 3x3x3 convolution of float32 on tensor cores, in one pass and in three: see lib/conv.cuh and lib/matrix.cuh. A file of its own, so that who has maps of 16 bits does not
// wait for its compilation.
#include "lib/conv.cuh"

// 16 channels take the bytes of 32 of 16 bits. Three passes take more registers, and leave less time to be covered by other blocks.
#define MATRIX(P, BLOCKS)                                                                                      \
    KERNEL(conv3d_single_##P, 256, BLOCKS, CONV_PARAMETERS(f32, f32), CONV_BODY(27, conv_single<P>))                     \
    KERNEL(conv3d_16_##P, 128, BLOCKS, CONV_PARAMETERS(f32, f32), CONV_BODY(27, conv_matrix<P, 16, 27, false>))
MATRIX(tf32, 3)
MATRIX(tf32x3, 2)
