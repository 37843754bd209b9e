// The optimiser over all parameters at once. A table has a row of five numbers per tensor: the
// addresses of its parameters, gradients, first and second moments, and its number of values (for
// `follow`: average, value, unused, unused, count). A block handles 2^14 values of one tensor:
// `runs` [blocks][tensor, run].
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
    __device__ __forceinline__ float *of(int which) const {
        return reinterpret_cast<float *>(line[which]) + first;
    }
    // The number of values that are loaded four at a time: those of whole groups of four, if the
    // first `arrays` arrays begin at a multiple of 16 bytes.
    __device__ __forceinline__ int wide(int arrays) const {
        int64 all = 0;
        for (int i = 0; i < arrays; i++) all |= line[i];
        return all % 16 == 0 ? count / 4 * 4 : 0;
    }
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

// The thread's part of the sum of squares.
__device__ __forceinline__ double squares(const float *g, int wide, int count) {
    double sum = 0.0;
#pragma unroll 4
    for (int i = threadIdx.x * 4; i < wide; i += 4 * 256) {
        float v[4];
        load(v, g + i);
#pragma unroll
        for (int j = 0; j < 4; j++) sum += (double)v[j] * v[j];
    }
    for (int i = wide + threadIdx.x; i < count; i += 256) sum += (double)g[i] * g[i];
    return sum;
}

KERNEL(adamw_squares, 256, 4, (const int64 *table, const int *runs, double *partial), {
    Part part(table, runs);
    double sum = block_sum(squares(part.of(1), part.wide(2), part.count));
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

// What a step does with each value, in float: differences of numbers near 1 are formed before, in
// double.
struct Update {
    float keep1, keep2, new1, new2, corrected1, corrected2, eps, clip, decay, lr;
};

// Values `from` to `to` of a part, V per thread.
template <int V>
__device__ __forceinline__ void update(float *p, const float *gradient, float *m, float *v,
                                       int from, int to, const Update &u) {
    for (int i = from + (int)threadIdx.x * V; i < to; i += 256 * V) {
        float value[V], g[V], first[V], second[V];
        load(value, p + i), load(g, gradient + i), load(first, m + i), load(second, v + i);
#pragma unroll
        for (int j = 0; j < V; j++) {
            float clipped = g[j] * u.clip;
            first[j] = u.keep1 * first[j] + u.new1 * clipped,
                second[j] = u.keep2 * second[j] + u.new2 * clipped * clipped;
            float step = first[j] * u.corrected1 / (sqrtf(second[j] * u.corrected2) + u.eps);
            value[j] -= u.decay * value[j] + u.lr * step;
        }
        store(m + i, first), store(v + i, second), store(p + i, value);
    }
}

// Gradients come multiplied by `scale`, with the sum of their squares. If their norm is above
// `max_norm` they are scaled down to it; if it is not a finite number nothing changes. `corrected`
// is 1 - beta^step of each moment, `decay` 1 - lr * weight decay.
KERNEL(adamw_step, 256, 4,
       (const int64 *table, const int *runs, const double *total, double beta1, double beta2,
        double corrected1, double corrected2, double eps, double max_norm, double scale,
        double decay, double lr),
       {
           if (!is_number(*total)) return;
           double most = max_norm / (sqrt(*total) / scale + 1e-6),
                  clip = (most < 1.0 ? most : 1.0) / scale;
           Update u{(float)beta1, (float)beta2, (float)(1.0 - beta1), (float)(1.0 - beta2),
                    (float)(1.0 / corrected1), (float)(1.0 / corrected2), (float)eps, (float)clip,
                    (float)(1.0 - decay), (float)lr};
           Part part(table, runs);
           int wide = part.wide(4);
           update<4>(part.of(0), part.of(1), part.of(2), part.of(3), 0, wide, u);
           update<1>(part.of(0), part.of(1), part.of(2), part.of(3), wide, part.count, u);
       })

__device__ __forceinline__ void follow(float *average, const float *value, int wide, int count,
                                       float rate) {
    for (int i = threadIdx.x * 4; i < wide; i += 4 * 256) {
        float a[4], v[4];
        load(a, average + i), load(v, value + i);
#pragma unroll
        for (int j = 0; j < 4; j++) a[j] += rate * (v[j] - a[j]);
        store(average + i, a);
    }
    for (int i = wide + threadIdx.x; i < count; i += 256)
        average[i] += rate * (value[i] - average[i]);
}

// average += rate (value - average), unless `total` is no number.
KERNEL(adamw_follow, 256, 4,
       (const int64 *table, const int *runs, const double *total, float rate),
       {
           if (!is_number(*total)) return;
           Part part(table, runs);
           follow(part.of(0), part.of(1), part.wide(2), part.count, rate);
       })
