// The CUDA built-ins on host threads: what kernels see of the emulator.
//
// A host thread runs one block at a time, with a fibre for each of its threads. What accesses
// memory of its own is out of line: the kernels are compiled so that each of their memory accesses
// is checked, and the emulator's own must not be. What works in registers alone is inline: 16-bit
// values are converted one at a time.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#ifdef PRISM_ACCOUNT
// Always inlined, so that accesses of different calls are at different places.
#define __forceinline__ inline __attribute__((always_inline))
#else
#define __forceinline__ inline
#endif
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) alignas(n)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
};
struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace emulator {

// A thread's indices and sizes, as the built-in variables give them.
struct Place {
    uint3 thread, block;
    dim3 block_size, grid_size;
};

// The running thread's. A fibre stays on its host thread, so within a function it is a constant.
const Place &place() __attribute__((const));

unsigned char *shared_memory();
void barrier();
// Each lane passes up to 8 bytes; returns those of lane `from`.
uint64_t shuffle(unsigned mask, uint64_t value, int from);
unsigned vote(unsigned mask, bool value);
// D[n] += A B[n] for `count` right sides, each `stride` registers behind the one before.
void multiply(float (*d)[4], const unsigned (&a)[4], const unsigned *b, int stride, int count,
              bool bfloat);
void multiply_tf32(float (*d)[4], const unsigned (&a)[4], const unsigned *b, int stride, int count);
void load_matrices(unsigned (&r)[4], const void *row);
void load_matrices_transposed(unsigned (&r)[4], const void *row);
void copy_async(void *shared, const void *global, bool present);
void copy_commit();
void copy_wait(int pending);
// Products that a warpgroup starts, and barriers with phases: see lib/wgmma.cuh. A kernel that uses
// them has its shared memory watched, each of its threads from its beginning on.
unsigned char *watched_shared_memory();
unsigned shared_address(const void *at);
void make_barrier(void *barrier, int arrivals);
void arrive(void *barrier);
void wait(void *barrier, unsigned parity);
void fence_async();
void fence_sums();
// D[64 x columns] += A[64 x 16] B[columns x 16]^T.
void start_product(float *d, int columns, uint64_t a, uint64_t b, bool bfloat);
void commit_products();
void await_products();
float atomic_add(float *to, float value);

// Also of subnormal numbers, whose exponent the multiplication mends.
inline float half_to_float(unsigned short bits) {
    unsigned v = (bits & 0x7fffu) << 13;
    float f;
    memcpy(&f, &v, 4);
    f *= 0x1p112f;
    memcpy(&v, &f, 4);
    v |= (bits & 0x8000u) << 16 | ((bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u);
    memcpy(&f, &v, 4);
    return f;
}

inline unsigned short float_to_half(float value) {
    unsigned v;
    memcpy(&v, &value, 4);
    unsigned sign = v >> 16 & 0x8000, magnitude = v & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x47800000 - 0x1000) return sign | 0x7c00;
    if (magnitude < 0x38800000) {
        // Subnormal: multiples of 2^-24, to which adding 0.5 rounds.
        float m;
        memcpy(&m, &magnitude, 4);
        m += 0.5f;
        memcpy(&magnitude, &m, 4);
        return sign | (unsigned short)(magnitude - 0x3f000000);
    }
    magnitude += 0xfff + (magnitude >> 13 & 1);
    return sign | (unsigned short)((magnitude - 0x38000000) >> 13);
}

inline unsigned short float_to_bfloat(float value) {
    unsigned v;
    memcpy(&v, &value, 4);
    if ((v & 0x7fffffff) > 0x7f800000) return v >> 16 | 0x40;
    return (v + 0x7fff + (v >> 16 & 1)) >> 16;
}

// cvt.rna.tf32.f32: to nearest, ties away from zero.
inline unsigned float_to_tf32(float value) {
    unsigned v;
    memcpy(&v, &value, 4);
    if ((v & 0x7fffffff) > 0x7f800000) return 0x7fffffff;
    if ((v & 0x7f800000) != 0x7f800000) v += 0x1000;
    return v & 0xffffe000u;
}

// A load that remains one access.
typedef unsigned Vector4 __attribute__((vector_size(16)));
template <class P> inline P load_vector(const P *from) {
    P p;
    if constexpr (sizeof(P) == 16) {
        Vector4 bits = *(const Vector4 *)from;
        memcpy(&p, &bits, 16);
    } else {
        p = *from;
    }
    return p;
}

// A kernel that the launching side can find by name.
struct Kernel {
    const char *name;
    void (*call)(void *const *arguments, const void *function);
    const void *function;
    int count;
    unsigned char sizes[48];
    Kernel *next;
};
void add(Kernel *kernel);



template <class... A> struct Caller {
    template <int... I> struct List {};
    template <int N, int... I> struct Make : Make<N - 1, N - 1, I...> {};
    template <int... I> struct Make<0, I...> {
        // The arguments are in the launcher's memory, which a kernel may not access.
        __attribute__((no_sanitize("kernel-address")))
        static void call(void *const *a, const void *f) {
            ((void (*)(A...))f)(*(A *)a[I]...);
        }
    };
    static void call(void *const *a, const void *f) { Make<(int)sizeof...(A)>::call(a, f); }
};

struct Registration {
    Kernel kernel;
    template <class... A> Registration(const char *name, void (*f)(A...)) {
        kernel = Kernel{
            name, Caller<A...>::call, (const void *)f, (int)sizeof...(A), {sizeof(A)...}, nullptr};
        add(&kernel);
    }
};

} // namespace emulator

#define KERNEL_REGISTER(name) static emulator::Registration registration_of_##name(#name, name);
#define SHARED_MEMORY(name) unsigned char *name = emulator::shared_memory()

#define threadIdx (emulator::place().thread)
#define blockIdx (emulator::place().block)
#define blockDim (emulator::place().block_size)
#define gridDim (emulator::place().grid_size)

inline void __syncthreads() { emulator::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::vote(mask, false); }
inline float __uint_as_float(unsigned v) {
    float f;
    memcpy(&f, &v, 4);
    return f;
}
inline unsigned __float_as_uint(float f) {
    unsigned v;
    memcpy(&v, &f, 4);
    return v;
}
template <class T> inline T __shfl_sync(unsigned mask, T value, int from) {
    static_assert(sizeof(T) <= 8, "a shuffle moves 8 bytes at most");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = emulator::shuffle(mask, bits, from & 31);
    memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return __shfl_sync(mask, value, (int)(threadIdx.x & 31) ^ lanes);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T value, int lanes) {
    int lane = threadIdx.x & 31;
    return __shfl_sync(mask, value, lane + lanes > 31 ? lane : lane + lanes);
}
inline unsigned __ballot_sync(unsigned mask, bool value) { return emulator::vote(mask, value); }
inline bool __any_sync(unsigned mask, bool value) { return emulator::vote(mask, value) != 0; }
inline bool __all_sync(unsigned mask, bool value) { return emulator::vote(mask, !value) == 0; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline float atomicAdd(float *to, float value) { return emulator::atomic_add(to, value); }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
