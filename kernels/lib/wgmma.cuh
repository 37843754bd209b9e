// What kernels for sm_90a alone use: matrix products that a warpgroup starts and that read shared
// memory by descriptors, barriers with phases, and the fence between the ways in which either kind
// of access reaches shared memory. Each has a GPU body and the emulator's. On other architectures
// such a kernel ends with a trap: nothing launches it there.
//
// Ordinary stores to shared memory and the reads of wgmma are different proxies: what a thread has
// stored is seen by wgmma only after that thread's fence_async, and after something that orders the
// fence before the product (a barrier).
#pragma once
#include "lib/base.cuh"

#ifdef PRISM_EMULATOR
// The emulator keeps a record of who stored what.
#define WGMMA_SHARED_MEMORY(name) unsigned char *name = emulator::watched_shared_memory()
#else
// Swizzled operands begin at multiples of 1024 bytes.
#define WGMMA_SHARED_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]
#ifndef __CUDA_ARCH_FEAT_SM90_ALL
#define WITHOUT_WGMMA
#endif
// Ends the kernel with an error.
__device__ __forceinline__ void stop() { asm volatile("trap;"); }
#endif

#ifndef WITHOUT_WGMMA

// A barrier in shared memory: a phase ends when as many arrivals as it was made for have come, and
// the next begins. It is made by one thread, before a barrier of the block.
typedef unsigned long long PhaseBarrier;

__device__ __forceinline__ void make_barrier(PhaseBarrier *barrier, int arrivals) {
#ifdef PRISM_EMULATOR
    emulator::make_barrier(barrier, arrivals);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                 ::"r"((unsigned)__cvta_generic_to_shared(barrier)), "r"(arrivals)
                 : "memory");
#endif
}

__device__ __forceinline__ void arrive(PhaseBarrier *barrier) {
#ifdef PRISM_EMULATOR
    emulator::arrive(barrier);
#else
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}"
                 ::"r"((unsigned)__cvta_generic_to_shared(barrier))
                 : "memory");
#endif
}

// Waits until the phase of this parity has ended: 0 for the first, 1 for the second and, of a
// barrier that was just made, for the one before the first. Each try waits a while by itself; after
// 2^26 of them, which is a second at least, an arrival is missing and the kernel is stopped, so
// that a mistake is an error and not a GPU that hangs.
__device__ __forceinline__ void wait(PhaseBarrier *barrier, unsigned parity) {
#ifdef PRISM_EMULATOR
    emulator::wait(barrier, parity);
#else
    unsigned at = (unsigned)__cvta_generic_to_shared(barrier);
#pragma unroll 1
    for (unsigned tries = 0; tries < 1u << 26; tries++) {
        unsigned done;
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(at), "r"(parity)
            : "memory");
        if (done) return;
    }
    stop();
#endif
}

// Makes what this thread has stored in shared memory visible to wgmma.
__device__ __forceinline__ void fence_async() {
#ifdef PRISM_EMULATOR
    emulator::fence_async();
#else
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// How an operand of 16-bit elements lies in shared memory, without swizzle: in pieces of 8 rows x 8
// elements along k, 128 contiguous bytes, 16 a row. `along_k` is from one piece to the next along
// k, in bytes, `along_rows` from one to the next along the rows; both and the address are multiples
// of 16. A multiple of 16 bytes is added to the address by adding its 16th part.
typedef unsigned long long Descriptor;

__device__ __forceinline__ Descriptor describe(const void *operand, int along_k, int along_rows) {
#ifdef PRISM_EMULATOR
    unsigned at = emulator::shared_address(operand);
#else
    unsigned at = (unsigned)__cvta_generic_to_shared(operand);
#endif
    return (Descriptor)(at >> 4) |
           (Descriptor)(along_k >> 4) << 16 | (Descriptor)(along_rows >> 4) << 32;
}

// How an operand lies that is swizzled by 128 bytes: rows of 64 elements along k, one behind the
// other from a multiple of 1024 bytes on, in which piece p of 16 bytes of row r has the place of
// piece p ^ r % 8. So neither the stores of a row nor the reads of a piece of eight rows meet in a
// bank. 16 elements further along k are 32 bytes more of address, as if nothing was swizzled: only
// then do bits 7 to 9 of each address go into bits 4 to 6, by exclusive or.
__device__ __forceinline__ Descriptor describe_swizzled(const void *operand) {
    // The step along k is not used; eight rows are 1024 bytes; the last field says 128 bytes.
    return describe(operand, 16, 1024) | (Descriptor)1 << 62;
}

#ifndef PRISM_EMULATOR
// The compiler keeps accesses to sums on their side of this.
template <int M, int N> __device__ __forceinline__ void pin(float (&d)[M][N]) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) asm volatile("" : "+f"(d[m][n])::"memory");
    }
}
#endif

// Before the first product, and before one that follows other accesses to the registers of its
// sums.
template <int M, int N>
__device__ __forceinline__ void fence_sums([[maybe_unused]] float (&d)[M][N]) {
#ifdef PRISM_EMULATOR
    emulator::fence_sums();
#else
    pin(d);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Closes the group of products started so far.
__device__ __forceinline__ void commit_products() {
#ifdef PRISM_EMULATOR
    emulator::commit_products();
#else
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until all of this warpgroup's groups are finished: their sums are then in `d`.
template <int M, int N>
__device__ __forceinline__ void await_products([[maybe_unused]] float (&d)[M][N]) {
#ifdef PRISM_EMULATOR
    emulator::await_products();
#else
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    pin(d);
#endif
}

#ifndef PRISM_EMULATOR
#define WGMMA_96(TYPES)                                                                            \
    asm volatile(                                                                                  \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %50, 0;\n"                                               \
        "wgmma.mma_async.sync.aligned.m64n96k16.f32." TYPES " "                                    \
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"  \
        "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45," \
        "%46,%47}, %48, %49, p, 1, 1, 0, 0;\n}"                                                    \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),                  \
          "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),                \
          "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),            \
          "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),            \
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),            \
          "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),            \
          "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),            \
          "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])             \
        : "l"(a), "l"(b), "r"(1)                                                                   \
        : "memory")
#endif

// Starts D[64 x 96] += A[64 x 16] B[96 x 16]^T by the 128 threads of a warpgroup, which all give
// the same descriptors. With g = lane / 4 and t = lane % 4, a thread of warp i has rows 16 i + g
// and + 8, of every 8 columns 2t and 2t + 1: d[4 j] and d[4 j + 1] are the first row's of columns 8
// j, the other two the second's.
template <class T>
__device__ __forceinline__ void start_product(float (&d)[48], Descriptor a, Descriptor b) {
#ifdef PRISM_EMULATOR
    emulator::start_product(d, 96, a, b, !T::HALF);
#else
    if constexpr (T::HALF) {
        WGMMA_96("f16.f16");
    } else {
        WGMMA_96("bf16.bf16");
    }
#endif
}

#endif
