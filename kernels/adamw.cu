// The optimiser over all parameters at once. A table has a line of five numbers a tensor: where its parameters, gradients, first and second moments lie, and how many
// values it has (for `follow`: average, value, unused, unused, count). A block has 2^14 values of one tensor: `runs` [blocks][tensor, run].
#include "lib/base.cuh"

constexpr int RUN = 1 << 14, LINE = 5;

// This block's part of a tensor.
struct Part {
    const int64 *line;
    int64 first;
    int count;

    __device__ __forceinline__ Part(const int64 *table, const int *runs) {
        line = table + (int64)runs[2 * blockIdx.x] * LINE;
        first = (int64)runs[2 * blockIdx.x + 1] * RUN;
        count = (int)min((int64)RUN, line[4] - first);
    }
    __device__ __forceinline__ float *of(int which) const { return reinterpret_cast<float *>(line[which]) + first; }
};

// The sum over a block of 256 threads; thread 0 has it.
__device__ __forceinline__ double block_sum(double v) {
    SHARED_MEMORY(shared);
    double *all = reinterpret_cast<double *>(shared);
    all[threadIdx.x] = v;
    for (int half = 128; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) all[threadIdx.x] += all[threadIdx.x + half];
    }
    return all[0];
}

KERNEL(adamw_squares, 256, 4, (const int64 *table, const int *runs, double *partial), {
    Part part(table, runs);
    const float *g = part.of(1);
    double sum = 0.0;
    for (int i = threadIdx.x; i < part.count; i += 256) sum += (double)g[i] * g[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
})

// One block.
KERNEL(adamw_total, 256, 4, (const double *partial, double *total, int parts), {
    double sum = 0.0;
    for (int i = threadIdx.x; i < parts; i += 256) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *total = sum;
})

// Neither infinite nor not a number.
__device__ __forceinline__ bool is_number(double v) { return v - v == 0.0; }

// Gradients come times `scale`, with the sum of their squares: where their norm is above `max_norm` they are scaled down to it, and where it is no number nothing changes.
// `corrected` is 1 - beta^step of each moment, `decay` 1 - lr * weight decay.
KERNEL(adamw_step, 256, 4,
       (const int64 *table, const int *runs, const double *total, double beta1, double beta2, double corrected1, double corrected2, double eps, double max_norm,
        double scale, double decay, double lr), {
           if (!is_number(*total)) return;
           double most = max_norm / (sqrt(*total) / scale + 1e-6), clip = (most < 1.0 ? most : 1.0) / scale;
           Part part(table, runs);
           float *p = part.of(0), *m = part.of(2), *v = part.of(3);
           const float *gradient = part.of(1);
           for (int i = threadIdx.x; i < part.count; i += 256) {
               double g = gradient[i] * clip;
               float first = (float)(beta1 * m[i] + (1.0 - beta1) * g), second = (float)(beta2 * v[i] + (1.0 - beta2) * g * g);
               m[i] = first, v[i] = second;
               p[i] = (float)(p[i] * decay - lr * ((first / corrected1) / (sqrt(second / corrected2) + eps)));
           }
       })

// average += rate (value - average), unless `total` is no number.
KERNEL(adamw_follow, 256, 4, (const int64 *table, const int *runs, const double *total, float rate), {
    if (!is_number(*total)) return;
    Part part(table, runs);
    float *average = part.of(0);
    const float *value = part.of(1);
    for (int i = threadIdx.x; i < part.count; i += 256) average[i] += rate * (value[i] - average[i]);
})
