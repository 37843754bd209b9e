// A decoder stage's first convolution and its input's gradient, of float32 on tensor cores, in one
// pass and in three: see decoder_stage.cu, lib/conv.cuh and lib/matrix.cuh.
#include "lib/conv.cuh"

// With up to 16 input channels, and on maps of many tiles, a block computes all phases; otherwise
// it computes one phase.
#define STAGE_MATRIX(P, BLOCKS)                                                                    \
    KERNEL(decoder_stage_16_##P, 128, BLOCKS, CONV_PARAMETERS(f32, f32),                           \
           CONV_BODY(8, stage_matrix<P, 16>))                                                      \
    KERNEL(decoder_stage_phase_16_##P, 128, BLOCKS, CONV_PARAMETERS(f32, f32),                     \
           CONV_BODY(8, conv_matrix<P, 16, 8, false>))                                             \
    KERNEL(decoder_stage_gradient_16_##P, 128, BLOCKS, CONV_PARAMETERS(f32, f32),                  \
           CONV_BODY(8, conv_matrix<P, 16, 8, true>))
STAGE_MATRIX(tf32, 3)
STAGE_MATRIX(tf32x3, 2)
