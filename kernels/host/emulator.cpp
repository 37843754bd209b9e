// The emulator: runs the kernels' own text on host threads.
//
// Each host thread runs one block at a time; a thread of the block is a fibre with its own stack,
// run until it waits (at a barrier, or for the other lanes of its warp) or ends. Then the next lane
// of its warp that can run does, and after the last the scheduler. Whatever a kernel must not rely
// on is made hostile: memory starts as 0xFF bytes (NaN in every float type), asynchronous copies
// happen as late as the waits allow, and the order of threads can be shuffled. Every access of a
// kernel is checked against the allocations of the launch, the block's shared memory and its
// stacks: the compiler inserts the calls (-fsanitize=kernel-address), and their bodies are here. In
// a build with PRISM_ACCOUNT accesses are counted instead (account.h).
#include "emulator.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>
#include <vector>
#ifndef __x86_64__
#include <ucontext.h>
#endif
#ifdef PRISM_ACCOUNT
#include "account.h"
#define ACCOUNT(...) __VA_ARGS__
#else
#define ACCOUNT(...)
#endif

namespace emulator {
namespace {

constexpr int MOST_THREADS = 1024;
// Not a power of two: the tops of all stacks would meet in the same few lines of the cache.
constexpr size_t STACK = (64 << 10) + 5 * 64;
constexpr size_t MOST_SHARED = 232448;
constexpr unsigned ALL = 0xffffffffu;

struct Allocation {
    uint64_t start, bytes;
};

// Those from Group on are for kernels with products of warpgroups.
enum class State { Ready, Warp, Barrier, Done, Group, Phase, Pause };

struct Copy {
    void *to;
    unsigned char bytes[16];
    int group;
};

// One cache line each: a switch of fibres touches little else.
struct alignas(64) Fibre {
    // At the top of its stack, where a kernel may read it.
    Place *place;
#ifdef __x86_64__
    void *stack_pointer;
#else
    ucontext_t context;
#endif
    State state;
    unsigned epoch;
    int group;
    std::vector<Copy> copies;
    // The barrier whose phase it waits for, and in the lowest bit the phase's parity.
    uint64_t phase;
};

// The value that a lane passes to the others of its warp. There are two sets, used alternately: a
// lane can be at most one exchange ahead.
struct alignas(64) Slot {
    // Of products: where the lane has its fragments and its sums.
    const unsigned *a;
    const unsigned *b;
    float (*d)[4];
    uint64_t bits;
    unsigned char row[16];
};

struct Warp {
    int arrived;
    unsigned epoch;
    Slot slots[2][32];
};

constexpr int GROUP_THREADS = 128, MOST_COLUMNS = 256;

// A product that a warpgroup has started: it is computed when the warpgroup waits for it, as late
// as it may be. `time` is when the first thread started it, which is when it may begin to read.
struct Product {
    uint64_t a, b;
    int columns;
    bool bfloat;
    unsigned time;
    float *sums[GROUP_THREADS];
};

struct WarpGroup {
    int arrived;
    unsigned epoch;
    std::vector<Product> products;
};

// What is known of shared memory that products read, of which each byte has the time at which it
// was last stored, 0 if never, and by whom. Times are counted by stores, fences and products.
struct Watch {
    unsigned now;
    std::vector<unsigned> stored;
    std::vector<unsigned short> by;
    // Of each thread: its last fence_async, its products since it last waited for them, those of
    // them that are committed, and whether its sums are fenced.
    struct Thread {
        unsigned fenced;
        int products, committed;
        bool sums_fenced;
    };
    std::vector<Thread> threads;
    std::vector<WarpGroup> groups;
};

// A barrier as it lies in shared memory: 8 bytes, as on a GPU.
struct Phases {
    unsigned short mark, wanted, missing, phase;
    static constexpr unsigned short MARK = 0xb1a5;
};

// The memory and state that a block runs in. One per host thread, kept between blocks.
struct Arena {
    unsigned char *shared = nullptr;
    unsigned char *stacks = nullptr;
    std::vector<Fibre> fibres;
    std::vector<Warp> warps;
#ifdef __x86_64__
    void *scheduler;
#else
    ucontext_t scheduler;
#endif
    Fibre *current = nullptr;
    // The running warp, its first fibre, the order of its lanes, and the running lane's position in
    // that order.
    Warp *warp = nullptr;
    Fibre *lanes = nullptr;
    const int *order = nullptr;
    int turn = 0;
    int threads = 0, live = 0, at_barrier = 0;
    // Threads in a pause, and passes over the warps so far.
    int paused = 0;
    unsigned pass = 0;
    bool watched = false;
    Watch watch;
    const Kernel *kernel = nullptr;
    void *const *arguments = nullptr;
    const Allocation *allocations = nullptr;
    size_t allocation_count = 0, shared_bytes = 0;
    // Allocations found recently, by a few bits of the address.
    Allocation recent[64];
    bool running = false;
    bool failed = false;
    char message[512];
    ACCOUNT(account::Log log;)
};

ACCOUNT(account::Launch launch;)

thread_local Arena *arena __attribute__((tls_model("initial-exec")));
// The arena's shared memory, and the bytes of it that the launch has: none while no block runs on
// this host thread.
thread_local uint64_t shared_start __attribute__((tls_model("initial-exec")));
thread_local uint64_t shared_size __attribute__((tls_model("initial-exec")));

Arena &get_arena() {
    if (!arena) {
        arena = new Arena;
        size_t bytes = MOST_SHARED + MOST_THREADS * STACK;
        void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) {
            fprintf(stderr, "emulator: no memory for the stacks of a block\n");
            abort();
        }
        arena->shared = (unsigned char *)memory;
        arena->stacks = arena->shared + MOST_SHARED;
        arena->fibres.resize(MOST_THREADS);
        arena->warps.resize(MOST_THREADS / 32);
    }
    return *arena;
}

// While blocks run on this host thread, what they run in: what is accessed then, a kernel accesses.
inline Arena *running() { return arena && arena->running ? arena : nullptr; }

#ifdef __x86_64__
// Continues on another stack, and returns when another switch continues on this one. It is inlined
// and uses a jump: processors predict the target of a return from the matching call, and calls on
// the other stack would make that prediction wrong for the switch and for every return after it. A
// function may keep 128 bytes below its stack pointer.
inline __attribute__((always_inline)) void change(void **here, void *there) {
    asm volatile("leaq -128(%%rsp), %%rsp\n\t"
                 "pushq %%rbp\n\t"
                 "pushq %%rbx\n\t"
                 "leaq 1f(%%rip), %%rax\n\t"
                 "pushq %%rax\n\t"
                 "movq %%rsp, (%0)\n\t"
                 "movq %1, %%rsp\n\t"
                 "popq %%rax\n\t"
                 "jmpq *%%rax\n"
                 "1:\n\t"
                 "popq %%rbx\n\t"
                 "popq %%rbp\n\t"
                 "leaq 128(%%rsp), %%rsp"
                 : "+D"(here), "+S"(there)
                 :
                 : "rax", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
                   "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
                   "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "memory", "cc");
}
#endif

// Switches from the scheduler to a fibre; returns when no lane after it in the warp's order can
// run, or one failed.
void resume(Arena &a, Fibre &f) {
    a.current = &f;
#ifdef __x86_64__
    change(&a.scheduler, f.stack_pointer);
#else
    swapcontext(&a.scheduler, &f.context);
#endif
}

// Whether what a fibre waits for has happened: its warpgroup has come, its barrier's phase has
// ended, or its pause is over.
bool goes_on(Arena &a, Fibre &f) {
    if (f.state == State::Group)
        return a.watch.groups[(&f - a.fibres.data()) / GROUP_THREADS].epoch != f.epoch;
    if (f.state == State::Phase) {
        Phases barrier;
        memcpy(&barrier, (const void *)(f.phase & ~7ull), sizeof barrier);
        return (barrier.phase & 1) != (f.phase & 1);
    }
    if (a.pass - f.epoch < 2) return false;
    a.paused--;
    return true;
}

// The next lane in the warp's order that can run, if there is one.
inline Fibre *next(Arena &a) {
    while (++a.turn < 32) {
        Fibre &f = a.lanes[a.order[a.turn]];
        if (f.state == State::Warp && a.warp->epoch != f.epoch) f.state = State::Ready;
        if (f.state >= State::Group && goes_on(a, f)) f.state = State::Ready;
        if (f.state == State::Ready) return &f;
    }
    return nullptr;
}

// Switches to the next lane or back to the scheduler, with the reason in the fibre's state.
__attribute__((noinline)) void leave() {
    Arena &a = *arena;
    Fibre &f = *a.current, *to = a.failed ? nullptr : next(a);
    if (to) a.current = to;
#ifdef __x86_64__
    change(&f.stack_pointer, to ? to->stack_pointer : a.scheduler);
#else
    swapcontext(&f.context, to ? &to->context : &a.scheduler);
#endif
}

// Records the first failure of a block; the fibre never runs again.
[[noreturn]] void fail(const char *what) {
    Arena &a = *arena;
    if (!a.failed) {
        const Place &p = *a.current->place;
        snprintf(a.message, sizeof a.message, "kernel %s, block (%u, %u, %u), thread %u: %s",
                 a.kernel->name, p.block.x, p.block.y, p.block.z, p.thread.x, what);
        a.failed = true;
    }
    a.current->state = State::Done;
    for (;;) leave();
}

// The running thread stores bytes of watched shared memory.
void watch_store(Arena &a, uint64_t at, size_t bytes) {
    size_t offset = at - (uint64_t)a.shared;
    unsigned now = ++a.watch.now;
    for (size_t i = 0; i < bytes; i++)
        a.watch.stored[offset + i] = now, a.watch.by[offset + i] = a.current - a.fibres.data();
}

void copies_of(Fibre &f, int pending) {
    size_t kept = 0;
    for (auto &c : f.copies) {
        if (c.group < f.group - pending) {
            if (arena->watched) watch_store(*arena, (uint64_t)c.to, 16);
            memcpy(c.to, c.bytes, 16);
        } else {
            f.copies[kept++] = c;
        }
    }
    f.copies.resize(kept);
}

void entry() {
    Arena &a = *arena;
    a.kernel->call(a.arguments, a.kernel->function);
    a.current->state = State::Done;
    a.live--;
    for (;;) leave();
}

void prepare(Arena &a, int t) {
    Fibre &f = a.fibres[t];
    f.state = State::Ready;
    f.copies.clear();
    f.group = 0;
    unsigned char *top = a.stacks + (size_t)(t + 1) * STACK - 64;
    static_assert(sizeof(Place) <= 64, "a place fits above the stack");
    f.place = (Place *)top;
#ifdef __x86_64__
    // At entry the stack pointer is 8 less than a multiple of 16, as after a call.
    void **sp = (void **)(top - 64);
    *--sp = nullptr;
    *--sp = (void *)entry;
    f.stack_pointer = sp;
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = a.stacks + (size_t)t * STACK;
    f.context.uc_stack.ss_size = STACK - 64;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
#endif
}

// A permutation determined by the seed: 0 leaves the order as it is.
void shuffle_order(std::vector<int> &order, uint64_t &seed) {
    if (!seed) return;
    for (size_t i = order.size(); i > 1; i--) {
        seed = seed * 6364136223846793005ull + 1442695040888963407ull;
        std::swap(order[i - 1], order[(seed >> 33) % i]);
    }
}

bool run_block(Arena &a, uint3 block, dim3 grid, uint64_t seed) {
    memset(a.shared, 0xff, a.shared_bytes);
    int warps = a.threads / 32;
    for (int t = 0; t < a.threads; t++) {
        prepare(a, t);
        *a.fibres[t].place = Place{{(unsigned)t, 0, 0}, block, {(unsigned)a.threads, 1, 1}, grid};
    }
    for (int w = 0; w < warps; w++) a.warps[w].arrived = 0, a.warps[w].epoch = 0;
    a.live = a.threads, a.at_barrier = 0, a.failed = false;
    a.paused = 0, a.watched = false, shared_size = a.shared_bytes;
    std::vector<int> warp_order(warps), lane_order(32);
    for (int i = 0; i < warps; i++) warp_order[i] = i;
    for (int i = 0; i < 32; i++) lane_order[i] = i;
    while (a.live > 0) {
        bool progress = false;
        a.pass++;
        shuffle_order(warp_order, seed);
        for (int w : warp_order) {
            shuffle_order(lane_order, seed);
            a.warp = &a.warps[w], a.lanes = &a.fibres[w * 32], a.order = lane_order.data();
            // Passes over the lanes, until a pass in which no lane can run.
            for (;;) {
                a.turn = -1;
                Fibre *f = next(a);
                if (!f) break;
                progress = true;
                resume(a, *f);
                if (a.failed) return false;
            }
            ACCOUNT(a.log.close(launch);)
        }
        if (a.live > 0 && a.at_barrier == a.live) {
            for (int t = 0; t < a.threads; t++)
                if (a.fibres[t].state == State::Barrier) a.fibres[t].state = State::Ready;
            a.at_barrier = 0;
        } else if (!progress && !a.paused) {
            for (int t = 0; t < a.threads; t++) {
                Fibre &f = a.fibres[t];
                if (f.state == State::Ready || f.state == State::Done) continue;
                snprintf(a.message, sizeof a.message,
                         "kernel %s, block (%u, %u, %u), thread %d waits %s for ever: "
                         "not every thread arrives",
                         a.kernel->name, block.x, block.y, block.z, t,
                         f.state == State::Warp    ? "for the lanes of its warp"
                         : f.state == State::Group ? "for the warps of its warpgroup"
                         : f.state == State::Phase ? "for a barrier's phase"
                                                   : "at a barrier");
                return false;
            }
        }
    }
    return true;
}

// The running thread's lane in its warp.
inline int lane() { return arena->order[arena->turn]; }

// Waits until every lane of the warp has arrived; the last one runs `all` over the slots.
template <class F, class G> Slot *exchange(F give, G all) {
    Arena &a = *arena;
    Warp &w = *a.warp;
    Slot *slots = w.slots[w.epoch & 1];
    give(slots[lane()]);
    if (++w.arrived == 32) {
        ACCOUNT(a.log.close(launch);)
        all(slots);
        w.arrived = 0;
        w.epoch++;
    } else {
        a.current->epoch = w.epoch;
        a.current->state = State::Warp;
        leave();
    }
    return slots;
}

void whole(unsigned mask) {
    if (mask != ALL) fail("a warp operation of some lanes only, which the emulator does not have");
}

// The instructions that this machine has are chosen when the program is loaded. Products of 16-bit
// numbers are exact in float, so the choice does not change the result.
#if defined(__x86_64__) && defined(__GLIBC__)
#define FOR_THIS_MACHINE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_THIS_MACHINE
#endif

// Computes the matrix products of 32 lanes' fragments, which are on the stacks of the lanes, all of
// them waiting meanwhile.
FOR_THIS_MACHINE void products(Slot *slots, int stride, int count, bool bfloat) {
    unsigned short left_bits[16][16], right_bits[8][16];
    typedef float Row __attribute__((vector_size(32)));
    float left[16][16], right_turned[8][16];
    union {
        Row rows[16];
        float at[16][8];
    } right, sum;
    auto widen = [bfloat](float *to, const unsigned short *from, int count) {
        if (bfloat) {
            for (int i = 0; i < count; i++) {
                unsigned v = (unsigned)from[i] << 16;
                memcpy(&to[i], &v, 4);
            }
        } else {
            for (int i = 0; i < count; i++) to[i] = half_to_float(from[i]);
        }
    };
    for (int l = 0; l < 32; l++) {
        int g = l / 4, t = l % 4 * 2;
        const unsigned *a = slots[l].a;
        memcpy(&left_bits[g][t], &a[0], 4), memcpy(&left_bits[g + 8][t], &a[1], 4);
        memcpy(&left_bits[g][t + 8], &a[2], 4), memcpy(&left_bits[g + 8][t + 8], &a[3], 4);
    }
    widen(left[0], left_bits[0], 256);
    for (int n = 0; n < count; n++) {
        for (int l = 0; l < 32; l++) {
            int g = l / 4, t = l % 4 * 2;
            const unsigned *b = slots[l].b + n * stride;
            const float *d = slots[l].d[n];
            memcpy(&right_bits[g][t], &b[0], 4), memcpy(&right_bits[g][t + 8], &b[1], 4);
            memcpy(&sum.at[g][t], &d[0], 8), memcpy(&sum.at[g + 8][t], &d[2], 8);
        }
        widen(right_turned[0], right_bits[0], 128);
        for (int k = 0; k < 16; k++)
            for (int c = 0; c < 8; c++) right.at[k][c] = right_turned[c][k];
        for (int r = 0; r < 16; r++) {
            Row row = sum.rows[r];
            for (int k = 0; k < 16; k++) row += left[r][k] * right.rows[k];
            sum.rows[r] = row;
        }
        for (int l = 0; l < 32; l++) {
            int g = l / 4, t = l % 4 * 2;
            float *d = slots[l].d[n];
            memcpy(&d[0], &sum.at[g][t], 8), memcpy(&d[2], &sum.at[g + 8][t], 8);
        }
    }
}

// Computes the matrix products of TF32 fragments: the sign, the exponent and 10 bits of mantissa of
// each register count. Their products are exact in float, too.
FOR_THIS_MACHINE void products_tf32(Slot *slots, int stride, int count) {
    typedef float Row __attribute__((vector_size(32)));
    float left[16][8];
    union {
        Row rows[16];
        float at[16][8];
    } right, sum;
    auto seen = [](unsigned bits) {
        float v;
        bits &= 0xffffe000u;
        memcpy(&v, &bits, 4);
        return v;
    };
    for (int l = 0; l < 32; l++) {
        int g = l / 4, t = l % 4;
        const unsigned *a = slots[l].a;
        left[g][t] = seen(a[0]), left[g + 8][t] = seen(a[1]), left[g][t + 4] = seen(a[2]),
            left[g + 8][t + 4] = seen(a[3]);
    }
    for (int n = 0; n < count; n++) {
        for (int l = 0; l < 32; l++) {
            int g = l / 4, t = l % 4;
            const unsigned *b = slots[l].b + n * stride;
            const float *d = slots[l].d[n];
            right.at[t][g] = seen(b[0]), right.at[t + 4][g] = seen(b[1]);
            memcpy(&sum.at[g][2 * t], &d[0], 8), memcpy(&sum.at[g + 8][2 * t], &d[2], 8);
        }
        for (int r = 0; r < 16; r++) {
            Row row = sum.rows[r];
            for (int k = 0; k < 8; k++) row += left[r][k] * right.rows[k];
            sum.rows[r] = row;
        }
        for (int l = 0; l < 32; l++) {
            int g = l / 4, t = l % 4 * 2;
            float *d = slots[l].d[n];
            memcpy(&d[0], &sum.at[g][t], 8), memcpy(&d[2], &sum.at[g + 8][t], 8);
        }
    }
}

Kernel *first;

extern "C" char __executable_start __attribute__((weak));
extern "C" char _end __attribute__((weak));

void check_slowly(Arena &a, uint64_t at, size_t bytes, bool aligned, const char *what);

inline Allocation &recent(Arena &a, uint64_t at) { return a.recent[(at >> 12 ^ at >> 20) % 64]; }

// An access of `bytes` bytes by the running thread.
inline __attribute__((always_inline)) void check(uint64_t at, size_t bytes, bool aligned,
                                                 const char *what) {
    bool misaligned = aligned && (at & (bytes - 1));
    uint64_t offset = at - shared_start;
    // Most accesses are to shared memory. It begins at a page, so an aligned access that begins
    // before it does not reach into it. If it is watched, `shared_size` is 0.
    if (aligned && offset + (bytes - 1) < shared_size && !misaligned) return;
    Arena *a = running();
    if (__builtin_expect(!a, 0)) return; // static constructors
    // Stacks lie behind all that a block can have of shared memory.
    if (offset < MOST_SHARED + MOST_THREADS * STACK) {
        if (offset >= MOST_SHARED) return;
        if (offset + bytes <= a->shared_bytes && !misaligned) {
            if (a->watched && what[0] != 'r') watch_store(*a, at, bytes);
            return;
        }
    } else {
        const Allocation &l = recent(*a, at);
        if (at >= l.start && at + bytes <= l.start + l.bytes && !misaligned) return;
    }
    check_slowly(*a, at, bytes, aligned, what);
}

__attribute__((noinline)) void check_slowly(Arena &a, uint64_t at, size_t bytes, bool aligned,
                                            const char *what) {
    uint64_t shared = (uint64_t)a.shared;
    if (aligned && (at & (bytes - 1))) {
        char text[160];
        snprintf(text, sizeof text,
                 "%s of %zu bytes at address %#lx, which is not a multiple of it", what, bytes,
                 (unsigned long)at);
        fail(text);
    }
    if (at >= shared && at < shared + MOST_SHARED) {
        char text[160];
        snprintf(text, sizeof text,
                 "%s of %zu bytes at offset %lu of shared memory, which has %zu bytes", what, bytes,
                 (unsigned long)(at - shared), a.shared_bytes);
        fail(text);
    }
    const Allocation *end = a.allocations + a.allocation_count;
    const Allocation *above = std::upper_bound(
        a.allocations, end, at, [](uint64_t v, const Allocation &x) { return v < x.start; });
    if (above != a.allocations) {
        const Allocation &l = above[-1];
        if (at + bytes <= l.start + l.bytes) {
            recent(a, at) = l;
            return;
        }
    }
    // Constant tables that the compiler made.
    if (&__executable_start && at >= (uint64_t)&__executable_start &&
        at + bytes <= (uint64_t)&_end && what[0] == 'r')
        return;
    const Allocation *near = nullptr;
    long distance = 0;
    for (const Allocation *x = a.allocations; x != end; x++) {
        long d = at < x->start ? (long)(at - x->start) : (long)(at - (x->start + x->bytes));
        if (!near || labs(d) < labs(distance)) near = x, distance = d;
    }
    char text[240];
    if (near) {
        snprintf(text, sizeof text,
                 "%s of %zu bytes at address %#lx, %ld bytes %s the nearest buffer of %lu bytes",
                 what, bytes, (unsigned long)at, labs(distance),
                 distance < 0 ? "before" : "beyond the end of", (unsigned long)near->bytes);
    } else {
        snprintf(text, sizeof text, "%s of %zu bytes at address %#lx, and there is no buffer", what,
                 bytes, (unsigned long)at);
    }
    fail(text);
}

#ifdef PRISM_ACCOUNT
// Counts an access of the running thread, which is at `from`.
void note(const void *from, unsigned part, const void *address, unsigned bytes, bool written) {
    Arena *a = running();
    if (!a) return; // static constructors
    uint64_t at = (uint64_t)address, offset = at - (uint64_t)a->shared;
    if (offset < MOST_SHARED) {
        if (a->watched && written) watch_store(*a, at, bytes);
        a->log.add(from, part, account::SHARED, lane(), at, bytes);
    } else if (offset >= MOST_SHARED + MOST_THREADS * STACK) {
        a->log.add(from, part, written ? account::WRITTEN : account::READ, lane(), at, bytes);
    }
}

// Counts an access of any size as the widest accesses that its alignment allows, at most words.
void note_apart(const void *from, const void *address, size_t bytes, bool written) {
    unsigned each = ((uint64_t)address | bytes) % 4 ? 1 : 4;
    for (size_t i = 0; i < bytes; i += each)
        note(from, i / each, (const char *)address + i, each, written);
}
#endif

} // namespace

const Place &place() { return *arena->current->place; }

unsigned char *shared_memory() { return arena->shared; }

void barrier() {
    arena->current->state = State::Barrier;
    arena->at_barrier++;
    leave();
}

uint64_t shuffle(unsigned mask, uint64_t value, int from) {
    whole(mask);
    return exchange([&](Slot &s) { s.bits = value; }, [](Slot *) {})[from].bits;
}

unsigned vote(unsigned mask, bool value) {
    whole(mask);
    Slot *slots = exchange([&](Slot &s) { s.bits = value; }, [](Slot *) {});
    unsigned votes = 0;
    for (int l = 0; l < 32; l++) votes |= (unsigned)slots[l].bits << l;
    return votes;
}

void multiply(float (*d)[4], const unsigned (&a)[4], const unsigned *b, int stride, int count,
              bool bfloat) {
    exchange([&](Slot &s) { s.a = a, s.b = b, s.d = d; },
             [=](Slot *slots) { products(slots, stride, count, bfloat); });
}

void multiply_tf32(float (*d)[4], const unsigned (&a)[4], const unsigned *b, int stride,
                   int count) {
    exchange([&](Slot &s) { s.a = a, s.b = b, s.d = d; },
             [=](Slot *slots) { products_tf32(slots, stride, count); });
}

// The rows that a warp's lanes point to.
static Slot *matrix_rows(const void *row) {
    check((uint64_t)row, 16, true, "read by ldmatrix");
    if ((unsigned char *)row < arena->shared || (unsigned char *)row >= arena->shared + MOST_SHARED)
        fail("ldmatrix from memory that is not shared");
    return exchange([&](Slot &s) { memcpy(s.row, row, 16); }, [](Slot *) {});
}

void load_matrices_transposed(unsigned (&r)[4], const void *row) {
    ACCOUNT(note(__builtin_return_address(0), 0, row, 16, false);)
    Slot *slots = matrix_rows(row);
    int l = lane();
    for (int m = 0; m < 4; m++) {
        unsigned short pair[2];
        for (int e = 0; e < 2; e++)
            memcpy(&pair[e], slots[m * 8 + l % 4 * 2 + e].row + l / 4 * 2, 2);
        r[m] = pair[0] | (unsigned)pair[1] << 16;
    }
}

void load_matrices(unsigned (&r)[4], const void *row) {
    ACCOUNT(note(__builtin_return_address(0), 0, row, 16, false);)
    Slot *slots = matrix_rows(row);
    int l = lane();
    for (int m = 0; m < 4; m++) memcpy(&r[m], slots[m * 8 + l / 4].row + l % 4 * 4, 4);
}

void copy_async(void *shared, const void *global, bool present) {
    ACCOUNT(note(__builtin_return_address(0), 0, shared, 16, true);)
    ACCOUNT(if (present) note(__builtin_return_address(0), 1, global, 16, false);)
    check((uint64_t)shared, 16, true, "write by cp.async");
    Copy copy{shared, {}, arena->current->group};
    if (present) {
        check((uint64_t)global, 16, true, "read by cp.async");
        memcpy(copy.bytes, global, 16);
    }
    arena->current->copies.push_back(copy);
}

void copy_commit() { arena->current->group++; }

void copy_wait(int pending) { copies_of(*arena->current, pending); }

unsigned char *watched_shared_memory() {
    Arena &a = *arena;
    if (!a.watched) {
        a.watched = true, shared_size = 0;
        a.watch.now = 0;
        a.watch.stored.assign(a.shared_bytes, 0), a.watch.by.assign(a.shared_bytes, 0);
        a.watch.threads.assign(a.threads, {});
        a.watch.groups.resize((a.threads + GROUP_THREADS - 1) / GROUP_THREADS);
        for (WarpGroup &group : a.watch.groups)
            group.arrived = 0, group.epoch = 0, group.products.clear();
    }
    return a.shared;
}

unsigned shared_address(const void *at) { return (const unsigned char *)at - arena->shared; }

// The running thread's number, and its record, if shared memory is watched.
static int own_number() { return arena->current - arena->fibres.data(); }

static Watch::Thread &own_record() {
    if (!arena->watched)
        fail("a product of a warpgroup, or a fence for it, in a kernel whose shared memory is not "
             "watched");
    return arena->watch.threads[own_number()];
}

static bool in_shared(const void *at) {
    return (uint64_t)at - (uint64_t)arena->shared < MOST_SHARED;
}

static Phases &phases_of(void *barrier) {
    check((uint64_t)barrier, 8, true, "read of a barrier");
    if (!in_shared(barrier) || ((Phases *)barrier)->mark != Phases::MARK)
        fail("a barrier that was not made");
    return *(Phases *)barrier;
}

void make_barrier(void *barrier, int arrivals) {
    check((uint64_t)barrier, 8, true, "write of a barrier");
    if (!in_shared(barrier) || arrivals <= 0 || arrivals > MOST_THREADS)
        fail("a barrier that cannot be made");
    *(Phases *)barrier =
        Phases{Phases::MARK, (unsigned short)arrivals, (unsigned short)arrivals, 0};
}

// Who ends a phase pauses, so that what waits for it goes on before anything that the same thread
// does afterwards, and does too late.
void arrive(void *barrier) {
    Phases &phases = phases_of(barrier);
    if (--phases.missing) return;
    phases.missing = phases.wanted, phases.phase++;
    Arena &a = *arena;
    a.paused++;
    a.current->epoch = a.pass;
    a.current->state = State::Pause;
    leave();
}

void wait(void *barrier, unsigned parity) {
    if ((phases_of(barrier).phase & 1u) != (parity & 1)) return;
    arena->current->phase = (uint64_t)barrier | (parity & 1);
    arena->current->state = State::Phase;
    leave();
}

void fence_async() { own_record().fenced = ++arena->watch.now; }

void fence_sums() { own_record().sums_fenced = true; }

constexpr uint64_t SWIZZLED = 1ull << 62;

// A field of a descriptor that begins at bit `from`, in bytes.
static unsigned field(uint64_t descriptor, int from) {
    return (unsigned)(descriptor >> from & 0x3fff) << 4;
}

// Where a row's 16 bytes of an operand are in shared memory, the first or the second along k. If it
// is swizzled, rows are 128 bytes apart, and bits 7 to 9 of an address go into bits 4 to 6, by
// exclusive or.
static unsigned row_of(uint64_t descriptor, int row, int k) {
    unsigned start = field(descriptor, 0) + row / 8 * field(descriptor, 32);
    if (!(descriptor & SWIZZLED)) return start + k * field(descriptor, 16) + row % 8 * 16;
    unsigned at = start + row % 8 * 128 + k * 16;
    return at ^ (at >> 7 & 7) << 4;
}

// Whether a product that began at `time` may read an operand of so many rows, now.
static void check_operand(uint64_t descriptor, int rows, unsigned time) {
    Arena &a = *arena;
    if (descriptor & ~(0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | SWIZZLED)) {
        fail("a descriptor with an offset, or a swizzle other than that of 128 bytes, which the "
             "emulator does not have");
    }
    if (descriptor & SWIZZLED) {
        unsigned start = field(descriptor, 0);
        if (start & 0x380 || field(descriptor, 32) % 1024)
            fail("a swizzled operand whose rows do not begin at multiples of 1024 bytes");
        if ((start & 0x70) == 0x70)
            fail("a swizzled operand that reaches beyond its rows' 128 bytes");
    }
    for (int row = 0; row < rows; row++) {
        for (int k = 0; k < 2; k++) {
            unsigned from = row_of(descriptor, row, k);
            char text[160];
            if (from + 16 > a.shared_bytes) {
                snprintf(text, sizeof text,
                         "a product reads 16 bytes at offset %u of shared memory, which has "
                         "%zu bytes",
                         from, a.shared_bytes);
                fail(text);
            }
            for (unsigned at = from; at < from + 16; at++) {
                unsigned stored = a.watch.stored[at];
                int by = a.watch.by[at];
                if (stored && stored <= time && stored < a.watch.threads[by].fenced) continue;
                snprintf(text, sizeof text,
                         "a product reads byte %u of shared memory, which %s", at,
                         !stored         ? "nothing has stored"
                         : stored > time ? "has been stored since it began"
                                         : "is not fenced by the thread that stored it");
                fail(text);
            }
        }
    }
}

void start_product(float *d, int columns, uint64_t left, uint64_t right, bool bfloat) {
    Watch::Thread &own = own_record();
    if (!own.sums_fenced) fail("a product whose sums are not fenced");
    Watch &watch = arena->watch;
    WarpGroup &group = watch.groups[own_number() / GROUP_THREADS];
    size_t number = own.products++;
    if (number == group.products.size()) {
        Product p{left, right, columns, bfloat, ++watch.now, {}};
        check_operand(left, 64, p.time), check_operand(right, columns, p.time);
        group.products.push_back(p);
    }
    Product &p = group.products[number];
    if (p.a != left || p.b != right || p.columns != columns || p.bfloat != bfloat)
        fail("the threads of a warpgroup start different products");
    p.sums[own_number() % GROUP_THREADS] = d;
}

void commit_products() { own_record().committed = own_record().products; }

// Adds a row's 16 products to the sums of its columns, in order.
FOR_THIS_MACHINE static void add_row(float *sums, const float *left,
                                     const float (*right)[MOST_COLUMNS], int columns) {
    for (int k = 0; k < 16; k++)
        for (int c = 0; c < columns; c++) sums[c] += left[k] * right[k][c];
}

// Computes a product, whose sums are on the stacks of the warpgroup's threads, all of them waiting.
static void compute(const Product &p) {
    check_operand(p.a, 64, p.time), check_operand(p.b, p.columns, p.time);
    const unsigned char *shared = arena->shared;
    auto element = [&](uint64_t descriptor, int row, int k) {
        unsigned short bits;
        memcpy(&bits, shared + row_of(descriptor, row, k / 8) + k % 8 * 2, 2);
        if (!p.bfloat) return half_to_float(bits);
        unsigned wide = (unsigned)bits << 16;
        float value;
        memcpy(&value, &wide, 4);
        return value;
    };
    float right[16][MOST_COLUMNS], left[16], sums[MOST_COLUMNS];
    for (int c = 0; c < p.columns; c++)
        for (int k = 0; k < 16; k++) right[k][c] = element(p.b, c, k);
    for (int row = 0; row < 64; row++) {
        for (int k = 0; k < 16; k++) left[k] = element(p.a, row, k);
        // Column c's sum: of a lane that has two of every eight columns, of rows 8 apart.
        auto sum_of = [&](int c) -> float & {
            return p.sums[row / 16 * 32 + row % 8 * 4 + c % 8 / 2]
                         [c / 8 * 4 + row / 8 % 2 * 2 + c % 2];
        };
        for (int c = 0; c < p.columns; c++) sums[c] = sum_of(c);
        add_row(sums, left, right, p.columns);
        for (int c = 0; c < p.columns; c++) sum_of(c) = sums[c];
    }
}

void await_products() {
    Watch::Thread &own = own_record();
    if (own.committed != own.products) fail("products are waited for that are not committed");
    Arena &a = *arena;
    int first = own_number() / GROUP_THREADS * GROUP_THREADS;
    WarpGroup &group = a.watch.groups[first / GROUP_THREADS];
    if (++group.arrived < GROUP_THREADS) {
        a.current->epoch = group.epoch;
        a.current->state = State::Group;
        leave();
        return;
    }
    for (int t = first; t < first + GROUP_THREADS; t++) {
        Watch::Thread &thread = a.watch.threads[t];
        if (thread.products != (int)group.products.size())
            fail("the threads of a warpgroup start different products");
        thread.products = thread.committed = 0, thread.sums_fenced = false;
    }
    for (const Product &p : group.products) compute(p);
    group.products.clear(), group.arrived = 0, group.epoch++;
}

float atomic_add(float *to, float value) {
    ACCOUNT(note(__builtin_return_address(0), 0, to, 4, true);)
    check((uint64_t)to, 4, true, "atomic addition");
    unsigned *bits = (unsigned *)to, old = __atomic_load_n(bits, __ATOMIC_RELAXED);
    for (;;) {
        float before, after;
        memcpy(&before, &old, 4);
        after = before + value;
        unsigned next;
        memcpy(&next, &after, 4);
        if (__atomic_compare_exchange_n(bits, &old, next, false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED))
            return before;
    }
}

void add(Kernel *kernel) {
    kernel->next = first;
    first = kernel;
}

} // namespace emulator

using namespace emulator;

// The kernel with that name, or null.
extern "C" const Kernel *prism_emulator_find(const char *name) {
    for (Kernel *k = first; k; k = k->next)
        if (strcmp(k->name, name) == 0) return k;
    return nullptr;
}

// The number of arguments of a kernel, and the size of each in bytes.
extern "C" int prism_emulator_arguments(const Kernel *kernel, const unsigned char **sizes) {
    *sizes = kernel->sizes;
    return kernel->count;
}

// Runs blocks `from` to `to` of a launch on the calling thread. Returns whether all of them ended;
// if not, the error's text is in `message`.
extern "C" bool prism_emulator_run(const Kernel *kernel, const unsigned *grid, unsigned threads,
                                   unsigned shared, void *const *arguments, uint64_t from,
                                   uint64_t to, const uint64_t *allocations,
                                   size_t allocation_count, uint64_t seed, char *message,
                                   size_t length) {
    Arena &a = get_arena();
    if (threads == 0 || threads > MOST_THREADS || threads % 32 || shared > MOST_SHARED) {
        snprintf(message, length,
                 "kernel %s: a block of %u threads and %u bytes of shared memory (at most 1024, in "
                 "whole warps, and %zu)",
                 kernel->name, threads, shared, MOST_SHARED);
        return false;
    }
    a.kernel = kernel, a.arguments = arguments, a.threads = threads, a.shared_bytes = shared;
    a.allocations = (const Allocation *)allocations, a.allocation_count = allocation_count;
    memset(a.recent, 0, sizeof a.recent);
    bool good = true;
    ACCOUNT(launch.begin(allocations, allocation_count, (uint64_t)grid[0] * grid[1] * grid[2]);)
    ACCOUNT(a.log.begin(kernel);)
    a.running = true, shared_start = (uint64_t)a.shared, shared_size = shared;
    for (uint64_t b = from; b < to && good; b++) {
        uint3 block{(unsigned)(b % grid[0]), (unsigned)(b / grid[0] % grid[1]),
                    (unsigned)(b / grid[0] / grid[1])};
        uint64_t order = seed ? seed + b * 0x9E3779B97F4A7C15ull : 0;
        good = run_block(a, block, dim3{grid[0], grid[1], grid[2]}, order);
    }
    a.running = false, shared_size = 0;
    ACCOUNT(launch.end(kernel->name, threads, shared, a.log.counts, to - from);)
    if (!good) snprintf(message, length, "%s", a.message);
    return good;
}

// What the compiler calls before each access of a kernel.
#define CHECKED(bytes)                                                                             \
    extern "C" void __asan_load##bytes##_noabort(uint64_t at) { check(at, bytes, true, "read"); }  \
    extern "C" void __asan_store##bytes##_noabort(uint64_t at) { check(at, bytes, true, "write"); }
CHECKED(1)
CHECKED(2)
CHECKED(4)
CHECKED(8)
CHECKED(16)
extern "C" void __asan_loadN_noabort(uint64_t at, size_t bytes) { check(at, bytes, false, "read"); }
extern "C" void __asan_storeN_noabort(uint64_t at, size_t bytes) {
    check(at, bytes, false, "write");
}
extern "C" void __asan_handle_no_return() {}
extern "C" void __asan_before_dynamic_init(const char *) {}
extern "C" void __asan_after_dynamic_init() {}

#ifdef PRISM_ACCOUNT
// What the compiler calls if accesses are counted: then kernels are compiled with
// -fsanitize=thread, which does not leave out repeated accesses to the same place.
#define COUNTED(bytes)                                                                             \
    extern "C" void __tsan_read##bytes(void *at) {                                                 \
        note(__builtin_return_address(0), 0, at, bytes, false);                                    \
    }                                                                                              \
    extern "C" void __tsan_write##bytes(void *at) {                                                \
        note(__builtin_return_address(0), 0, at, bytes, true);                                     \
    }
COUNTED(1)
COUNTED(2)
COUNTED(4)
COUNTED(8)
COUNTED(16)
extern "C" void __tsan_read_range(void *at, size_t bytes) {
    note_apart(__builtin_return_address(0), at, bytes, false);
}
extern "C" void __tsan_write_range(void *at, size_t bytes) {
    note_apart(__builtin_return_address(0), at, bytes, true);
}
extern "C" void __tsan_func_entry(void *) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
// The counts of the last launch that ended.
extern "C" const account::Counts *prism_emulator_counts() { return &launch.last; }
#endif
