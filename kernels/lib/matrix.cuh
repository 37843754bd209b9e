// Tensor cores and asynchronous copies: thin wrappers, each with a GPU body and the emulator's.
#pragma once
#include "lib/base.cuh"

// Fragments of one warp's product D[16 x 8] += A[16 x 16] B[16 x 8], in the layout of
// mma.sync.m16n8k16: with g = lane / 4 and t = lane % 4, A holds rows g and g + 8, columns 2t, 2t +
// 1, 2t + 8, 2t + 9; B rows 2t, 2t + 1, 2t + 8, 2t + 9 of column g; D rows g and g + 8 of columns
// 2t and 2t + 1. For elements of 32 bits, of which a register holds one, it is mma.sync.m16n8k8,
// D[16 x 8] += A[16 x 8] B[8 x 8]: A holds (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4), B rows t
// and t + 4 of column g. In bytes, both layouts are the same pieces of a row.
struct FragmentA {
    unsigned r[4];
};
struct FragmentB {
    unsigned r[2];
};

template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const FragmentA &a, const FragmentB &b);

template <>
__device__ __forceinline__ void multiply<f16>(float (&d)[4], const FragmentA &a,
                                              const FragmentB &b) {
#ifdef PRISM_EMULATOR
    emulator::multiply(&d, a.r, b.r, 2, 1, false);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
#endif
}

template <>
__device__ __forceinline__ void multiply<bf16>(float (&d)[4], const FragmentA &a,
                                               const FragmentB &b) {
#ifdef PRISM_EMULATOR
    emulator::multiply(&d, a.r, b.r, 2, 1, true);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
#endif
}

// A product of TF32 elements, float32 with 10 bits of mantissa: the remaining bits of a register
// are ignored.
__device__ __forceinline__ void multiply_tf32(float (&d)[4], const FragmentA &a,
                                              const FragmentB &b) {
#ifdef PRISM_EMULATOR
    emulator::multiply_tf32(&d, a.r, b.r, 2, 1);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
#endif
}

// D[n] += A B[n] for N right sides. In the emulator this is one exchange: the lanes of a warp wait
// for each other once.
template <class T, int N>
__device__ __forceinline__ void multiply_each(float (*d)[4], const FragmentA &a,
                                              const FragmentB (&b)[N]) {
#ifdef PRISM_EMULATOR
    emulator::multiply(d, a.r, b[0].r, 2, N, !T::HALF);
#else
#pragma unroll
    for (int n = 0; n < N; n++) multiply<T>(d[n], a, b[n]);
#endif
}

// D[n] += A B[n] in TF32, where B[n] is the member `part` of each right side.
template <int N, class Right>
__device__ __forceinline__ void multiply_each_tf32(float (*d)[4], const FragmentA &a,
                                                   const Right (&b)[N], FragmentB Right::*part) {
#ifdef PRISM_EMULATOR
    emulator::multiply_tf32(d, a.r, (b[0].*part).r, sizeof(Right) / sizeof(unsigned), N);
#else
#pragma unroll
    for (int n = 0; n < N; n++) multiply_tf32(d[n], a, b[n].*part);
#endif
}

// The TF32 nearest to a float; ties are rounded away from zero.
__device__ __forceinline__ unsigned rounded_to_tf32(float v) {
#ifdef PRISM_EMULATOR
    return emulator::float_to_tf32(v);
#else
    unsigned r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
    return r;
#endif
}

// A float as the sum of two TF32: the nearest one, and the first 11 bits of the rest, so that about
// 2^-22 of it is left out. It uses integer arithmetic, because cvt.rna compiles to more
// instructions, some of which check for NaN: here a NaN ends up in the second of the two.
__device__ __forceinline__ void split_to_tf32(unsigned bits, unsigned &high, unsigned &low) {
    high = (bits + 0x1000u) & 0xffffe000u;
    low = __float_as_uint(__uint_as_float(bits) - __uint_as_float(high)) & 0xffffe000u;
}

// Ways to multiply float32 on tensor cores. In one pass: both sides rounded to TF32. In three: each
// side is the sum of two TF32, and three of the four products are added up; the one left out is
// about 2^-22 of a product. Every eight terms have their own sum, which is added to the total in
// float32: tensor cores truncate the sums that they continue, always to the same side.
struct tf32 {};
struct tf32x3 {};

// How a kernel multiplies: the type of its elements in memory, the passes over them, how the right
// side's fragments are prepared, once for all rows, and D[n] += A B[n] for some columns.
template <class P> struct Products {
    static constexpr int PASSES = 1;
    typedef P Element;
    typedef FragmentB Right;

    static __device__ __forceinline__ Right right(unsigned first, unsigned second) {
        return {{first, second}};
    }
    template <int N>
    static __device__ __forceinline__ void add(float (*d)[4], const FragmentA &a,
                                               const Right (&b)[N]) {
        multiply_each<P>(d, a, b);
    }
};

template <> struct Products<tf32> {
    static constexpr int PASSES = 1;
    typedef f32 Element;
    struct Right {
        FragmentB rounded;
    };

    static __device__ __forceinline__ Right right(unsigned first, unsigned second) {
        return {{{rounded_to_tf32(__uint_as_float(first)),
                  rounded_to_tf32(__uint_as_float(second))}}};
    }
    template <int N>
    static __device__ __forceinline__ void add(float (*d)[4], const FragmentA &a,
                                               const Right (&b)[N]) {
        FragmentA rounded;
#pragma unroll
        for (int i = 0; i < 4; i++) rounded.r[i] = rounded_to_tf32(__uint_as_float(a.r[i]));
        multiply_each_tf32(d, rounded, b, &Right::rounded);
    }
};

template <> struct Products<tf32x3> {
    static constexpr int PASSES = 3;
    typedef f32 Element;
    struct Right {
        FragmentB high, low;
    };

    static __device__ __forceinline__ Right right(unsigned first, unsigned second) {
        Right b;
        split_to_tf32(first, b.high.r[0], b.low.r[0]),
            split_to_tf32(second, b.high.r[1], b.low.r[1]);
        return b;
    }
    template <int N>
    static __device__ __forceinline__ void add(float (*d)[4], const FragmentA &a,
                                               const Right (&b)[N]) {
        FragmentA high, low;
#pragma unroll
        for (int i = 0; i < 4; i++) split_to_tf32(a.r[i], high.r[i], low.r[i]);
        // The small products first.
        float sums[N][4] = {};
        multiply_each_tf32(sums, low, b, &Right::high);
        multiply_each_tf32(sums, high, b, &Right::low);
        multiply_each_tf32(sums, high, b, &Right::high);
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) d[n][e] += sums[n][e];
        }
    }
};

// The number of elements of a row in a fragment along k, and in 16 bytes.
template <class T> constexpr int ALONG = 32 / (int)sizeof(T);
template <class T> constexpr int PIECE = 16 / (int)sizeof(T);

// Loads four 8 x 8 matrices of 16-bit elements: lane i gives the shared address of row i % 8 of
// matrix i / 8, 16 bytes, and receives elements 2 (i % 4) and + 1 of row i / 4 of each. `offset` in
// bytes is added to the address; a constant offset costs nothing.
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const void *row, int offset = 0) {
#ifdef PRISM_EMULATOR
    emulator::load_matrices(r, reinterpret_cast<const char *>(row) + offset);
#else
    unsigned at = (unsigned)__cvta_generic_to_shared(row) + offset;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
#endif
}

// Loads four 8 x 8 matrices as load_matrices does, each transposed on the way: lane i receives
// elements i / 4 of rows 2 (i % 4) and + 1.
__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], const void *row,
                                                         int offset = 0) {
#ifdef PRISM_EMULATOR
    emulator::load_matrices_transposed(r, reinterpret_cast<const char *>(row) + offset);
#else
    unsigned at = (unsigned)__cvta_generic_to_shared(row) + offset;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
#endif
}

// Starts copying 16 bytes from global to shared memory; zeros where `present` is false. Both
// addresses are multiples of 16.
__device__ __forceinline__ void copy_async(void *shared, const void *global, bool present) {
#ifdef PRISM_EMULATOR
    emulator::copy_async(shared, global, present);
#else
    unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(to), "l"(global), "r"(present ? 16 : 0)
                 : "memory");
#endif
}

// Closes the group of copies started so far.
__device__ __forceinline__ void copy_commit() {
#ifdef PRISM_EMULATOR
    emulator::copy_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `Pending` of this thread's groups are unfinished.
template <int Pending> __device__ __forceinline__ void copy_wait() {
#ifdef PRISM_EMULATOR
    emulator::copy_wait(Pending);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}
