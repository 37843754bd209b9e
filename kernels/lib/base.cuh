// What every kernel uses: element types, conversions, vectors of elements, reductions over a warp.
//
// A kernel is written for an element type T (f32, f16, bf16) and computes in float. Each instance
// is exported under its own name by KERNEL. The same text is compiled by NVRTC for a GPU and by the
// host's C++ compiler for the emulator, which supplies the CUDA built-ins (host/emulator.h).
// Instructions that only a GPU has are used in lib/ alone, each with a body for either.
#pragma once

#ifdef PRISM_EMULATOR
#include "host/emulator.h"
#else
#define KERNEL_REGISTER(name)
// The dynamic shared memory of the block, all that a kernel uses.
#define SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
#endif

// The first thing that every kernel does. A recorded launch may begin before the previous one has
// finished (src/device/cuda/driver.rs): its blocks take the places that become free, and wait here,
// before they have touched any device memory. After the wait they let the next launch begin in the
// same way. So each kernel sees everything that any launch before it wrote: the previous launch,
// which has finished, has itself waited for those before it. Architectures older than 9.0 begin a
// launch when the previous one has finished.
__device__ __forceinline__ void await_turn() {
#ifndef PRISM_EMULATOR
    if constexpr (__CUDA_ARCH__ >= 900) {
        asm volatile("griddepcontrol.wait;" ::: "memory");
        asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    }
#endif
}

// Exports an instance of a kernel template: KERNEL(name, threads, blocks, (parameters), body).
// `blocks` is how many blocks must fit in a multiprocessor's registers.
#define KERNEL(name, threads, blocks, parameters, ...)                                             \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name parameters {                \
        await_turn();                                                                              \
        __VA_ARGS__;                                                                               \
    }                                                                                              \
    KERNEL_REGISTER(name)

// The thread's number within its block, read again: values computed from threadIdx outside a loop
// would be kept in registers throughout it.
__device__ __forceinline__ int own_thread() {
#ifdef PRISM_EMULATOR
    return threadIdx.x;
#else
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
#endif
}

typedef long long int64;
typedef float f32;
struct f16 {
    // Whether it is IEEE's half.
    static constexpr bool HALF = true;
    unsigned short bits;
};
struct bf16 {
    static constexpr bool HALF = false;
    unsigned short bits;
};

__device__ __forceinline__ float to_float(f32 v) { return v; }

__device__ __forceinline__ float to_float(f16 v) {
#ifdef PRISM_EMULATOR
    return emulator::half_to_float(v.bits);
#else
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits));
    return r;
#endif
}

__device__ __forceinline__ float to_float(bf16 v) {
    return __uint_as_float((unsigned)v.bits << 16);
}

// Rounds to nearest even.
template <class T> __device__ __forceinline__ T from_float(float v);

template <> __device__ __forceinline__ f32 from_float<f32>(float v) { return v; }

template <> __device__ __forceinline__ f16 from_float<f16>(float v) {
    f16 r;
#ifdef PRISM_EMULATOR
    r.bits = emulator::float_to_half(v);
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
#endif
    return r;
}

template <> __device__ __forceinline__ bf16 from_float<bf16>(float v) {
    bf16 r;
#ifdef PRISM_EMULATOR
    r.bits = emulator::float_to_bfloat(v);
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
#endif
    return r;
}

// Two values as elements of 16 bits, the first in the lower half.
template <class T> __device__ __forceinline__ unsigned pair(float low, float high);

template <> __device__ __forceinline__ unsigned pair<f16>(float low, float high) {
#ifdef PRISM_EMULATOR
    return emulator::float_to_half(low) | (unsigned)emulator::float_to_half(high) << 16;
#else
    unsigned r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
#endif
}

template <> __device__ __forceinline__ unsigned pair<bf16>(float low, float high) {
#ifdef PRISM_EMULATOR
    return emulator::float_to_bfloat(low) | (unsigned)emulator::float_to_bfloat(high) << 16;
#else
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
#endif
}

// The sum and the larger of two pairs of 16-bit elements, each result rounded to nearest even.
// Before 9.0 bf16 has no addition of its own, only fma.
#ifdef PRISM_EMULATOR
template <class T, class F> inline unsigned by_pairs(unsigned a, unsigned b, F of) {
    unsigned r = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        T x, y;
        x.bits = (unsigned short)(a >> shift), y.bits = (unsigned short)(b >> shift);
        r |= (unsigned)from_float<T>(of(to_float(x), to_float(y))).bits << shift;
    }
    return r;
}
template <class T> inline unsigned pair_sum(unsigned a, unsigned b) {
    return by_pairs<T>(a, b, [](float x, float y) { return x + y; });
}
template <class T> inline unsigned pair_max(unsigned a, unsigned b) {
    return by_pairs<T>(a, b, [](float x, float y) { return fmaxf(x, y); });
}
#else
template <class T> __device__ __forceinline__ unsigned pair_sum(unsigned a, unsigned b) {
    unsigned r;
    if constexpr (T::HALF) {
        asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    } else {
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x3f803f80u), "r"(b));
    }
    return r;
}
template <class T> __device__ __forceinline__ unsigned pair_max(unsigned a, unsigned b) {
    unsigned r;
    if constexpr (T::HALF) {
        asm("max.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    } else {
        asm("max.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    }
    return r;
}
#endif

// N elements, loaded and stored by one instruction.
template <class T, int N> struct alignas(sizeof(T) * N) AlignedVector {
    T v[N];
};

// Loads them by one instruction in the emulator too, where a compiler would otherwise split the
// load.
template <class P> __device__ __forceinline__ P load_vector(const P *from) {
#ifdef PRISM_EMULATOR
    return emulator::load_vector(from);
#else
    return *from;
#endif
}

// N elements as stored in memory, so that they take no more registers than that while they are
// being loaded.
template <class T, int N> struct RawVector {
    AlignedVector<unsigned, N / 2> words;
};
template <class T> struct RawVector<T, 1> {
    T value;
};
template <int N> struct RawVector<f32, N> {
    AlignedVector<f32, N> values;
};
template <> struct RawVector<f32, 1> {
    f32 value;
};

template <int N, class T> __device__ __forceinline__ RawVector<T, N> load_raw(const T *from) {
    return load_vector(reinterpret_cast<const RawVector<T, N> *>(from));
}

template <class T, int N>
__device__ __forceinline__ float element(const RawVector<T, N> &raw, int i) {
    if constexpr (N == 1) {
        return to_float(raw.value);
    } else if constexpr (sizeof(T) == 4) {
        return raw.values.v[i];
    } else {
        T half;
        half.bits = (unsigned short)(raw.words.v[i / 2] >> (i % 2 * 16));
        return to_float(half);
    }
}

template <int N, class T> __device__ __forceinline__ void load(float (&to)[N], const T *from) {
    constexpr int step = N * (int)sizeof(T) > 16 ? 16 / (int)sizeof(T) : N;
#pragma unroll
    for (int i = 0; i < N; i += step) {
        AlignedVector<T, step> p =
            load_vector(reinterpret_cast<const AlignedVector<T, step> *>(from + i));
#pragma unroll
        for (int j = 0; j < step; j++) to[i + j] = to_float(p.v[j]);
    }
}

// Values rounded to elements.
template <class T, int N> __device__ __forceinline__ RawVector<T, N> to_raw(const float *from) {
    RawVector<T, N> raw;
    if constexpr (N == 1) {
        raw.value = from_float<T>(from[0]);
    } else if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < N; i++) raw.values.v[i] = from[i];
    } else {
#pragma unroll
        for (int i = 0; i < N / 2; i++) raw.words.v[i] = pair<T>(from[2 * i], from[2 * i + 1]);
    }
    return raw;
}

template <int N, class T> __device__ __forceinline__ void store(T *to, const float (&from)[N]) {
    constexpr int step = N * (int)sizeof(T) > 16 ? 16 / (int)sizeof(T) : N;
#pragma unroll
    for (int i = 0; i < N; i += step)
        *reinterpret_cast<RawVector<T, step> *>(to + i) = to_raw<T, step>(from + i);
}

#define MINUS_INFINITY __uint_as_float(0xff800000u)

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}

// The exact-erf GELU.
__device__ __forceinline__ float gelu(float x) {
    return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
}

__device__ __forceinline__ float gelu_slope(float x) {
    return 0.5f * (1.0f + erff(x * 0.70710678118654752f)) +
           x * 0.39894228040143268f * expf(-0.5f * x * x);
}

// What follows a dense layer's sum; the numbers are shared with the launching side.
enum Activation { ACT_NONE = 0, ACT_GELU = 1, ACT_RELU = 2 };

__device__ __forceinline__ float activate(float x, int act) {
    return act == ACT_GELU ? gelu(x) : act == ACT_RELU ? fmaxf(x, 0.0f) : x;
}

// y = act(v + bias) + residual, for V values from column `column` on.
template <int V, class T>
__device__ __forceinline__ void put(T *y, float (&v)[V], int64 at, int column, const float *bias,
                                    const T *residual, int act) {
    float more[V] = {};
    if (bias) {
        load(more, bias + column);
#pragma unroll
        for (int i = 0; i < V; i++) v[i] += more[i];
    }
#pragma unroll
    for (int i = 0; i < V; i++) v[i] = activate(v[i], act);
    if (residual) {
        load(more, residual + at);
#pragma unroll
        for (int i = 0; i < V; i++) v[i] += more[i];
    }
    store(y + at, v);
}

// Instance norm and leaky ReLU of one value, with coefficients [mean, scale, shift] and a slope of
// at most 1.
__device__ __forceinline__ float normed(float x, const float *coefficients, float slope) {
    float y = (x - coefficients[0]) * coefficients[1] + coefficients[2];
    return fmaxf(y, y * slope);
}
