// Tensor cores and asynchronous copies: thin wrappers, each with a GPU body and the emulator's.
#pragma once
#include "lib/base.cuh"

// Fragments of one warp's product D[16 x 8] += A[16 x 16] B[16 x 8], in the layout of mma.sync.m16n8k16: with g = lane / 4 and
// t = lane % 4, A holds rows g and g + 8, columns 2t, 2t + 1, 2t + 8, 2t + 9; B rows 2t, 2t + 1, 2t + 8, 2t + 9 of column g; D rows g and
// g + 8 of columns 2t and 2t + 1.
struct FragmentA {
    unsigned r[4];
};
struct FragmentB {
    unsigned r[2];
};

template <class T> __device__ __forceinline__ void multiply(float (&d)[4], const FragmentA &a, const FragmentB &b);

template <> __device__ __forceinline__ void multiply<f16>(float (&d)[4], const FragmentA &a, const FragmentB &b) {
#ifdef PRISM_EMULATOR
    emulator::multiply(d, a.r, b.r, false);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
#endif
}

template <> __device__ __forceinline__ void multiply<bf16>(float (&d)[4], const FragmentA &a, const FragmentB &b) {
#ifdef PRISM_EMULATOR
    emulator::multiply(d, a.r, b.r, true);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
#endif
}

// Loads four 8 x 8 matrices of 16-bit elements: lane i gives the shared address of row i % 8 of matrix i / 8, 16 bytes, and
// receives elements 2 (i % 4) and + 1 of row i / 4 of each. `offset` in bytes is added to the address: one that is known costs nothing.
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

// The same, each matrix transposed on the way: lane i receives elements i / 4 of rows 2 (i % 4) and + 1.
__device__ __forceinline__ void load_matrices_turned(unsigned (&r)[4], const void *row, int offset = 0) {
#ifdef PRISM_EMULATOR
    emulator::load_matrices_turned(r, reinterpret_cast<const char *>(row) + offset);
#else
    unsigned at = (unsigned)__cvta_generic_to_shared(row) + offset;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
#endif
}

// Starts copying 16 bytes from global to shared memory; zeros where `present` is false. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_async(void *shared, const void *global, bool present) {
#ifdef PRISM_EMULATOR
    emulator::copy_async(shared, global, present);
#else
    unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(present ? 16 : 0) : "memory");
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
