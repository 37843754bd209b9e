// 3x3x3 convolution, stride 1, zero padding 1, channels last: see lib/conv.cuh.
//
// At base, 128^3, 32 to 32 channels, f16: 116 GFLOP and 268 MB of maps, 0.15 ms of arithmetic and
// 0.06 ms of traffic on an H200.
#include "lib/conv.cuh"

#define PLAIN(T)                                                                                   \
    KERNEL(conv3d_plain_##T, 256, 2, CONV_PARAMETERS(T, float),                                    \
           CONV_BODY(27, conv_plain<T, 16, 4, 27, false>))                                         \
    KERNEL(conv3d_few_##T, 256, 2, CONV_PARAMETERS(T, float),                                      \
           CONV_BODY(27, conv_plain<T, 1, 1, 27, false>))
PLAIN(f32)
PLAIN(f16)
PLAIN(bf16)

#define MATRIX(T)                                                                                  \
    KERNEL(conv3d_single_##T, 256, 3, CONV_PARAMETERS(T, T), CONV_BODY(27, conv_single<T>))        \
    KERNEL(conv3d_16_##T, 128, 3, CONV_PARAMETERS(T, T),                                           \
           CONV_BODY(27, conv_matrix<T, 16, 27, false>))                                           \
    KERNEL(conv3d_32_##T, 128, 3, CONV_PARAMETERS(T, T),                                           \
           CONV_BODY(27, conv_matrix<T, 32, 27, false>))
MATRIX(f16)
MATRIX(bf16)

// For tiles that several blocks shared.
#define SPLITK_REDUCE(T)                                                                           \
    KERNEL(conv3d_splitk_reduce_##T, 256, 3,                                                       \
           (const float *splitk_workspace, const float *bias, const T *start, T *out,              \
            double *partial, int64 voxels, int outs, int split_k),                                 \
           conv_splitk_reduce(splitk_workspace, bias, start, out, partial, voxels, outs, split_k))
SPLITK_REDUCE(f32)
SPLITK_REDUCE(f16)
SPLITK_REDUCE(bf16)
