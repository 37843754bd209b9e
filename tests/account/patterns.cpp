// The account of kernels whose requests are known (patterns.cu): in any order of lanes, and
// whichever host threads have the blocks.
#include "host/account.h"

using namespace emulator;

struct Kernel;
extern "C" const Kernel *prism_emulator_find(const char *name);
extern "C" bool prism_emulator_run(const Kernel *kernel, const unsigned *grid, unsigned threads,
                                   unsigned shared, void *const *arguments, uint64_t from,
                                   uint64_t to, const uint64_t *allocations,
                                   size_t allocation_count, uint64_t seed, char *message,
                                   size_t length);
extern "C" const account::Counts *prism_emulator_counts();

#include <initializer_list>
#include <thread>

// Two buffers.
alignas(256) static float memory[2][1024];
static int failures = 0;

static void expect(const char *name, std::initializer_list<uint64_t> arguments,
                   account::Counts want, unsigned blocks = 1) {
    const Kernel *kernel = prism_emulator_find(name);
    unsigned grid[3] = {blocks, 1, 1};
    uint64_t values[4], buffers[4] = {(uint64_t)memory[0], sizeof memory[0], (uint64_t)memory[1],
                                      sizeof memory[1]};
    void *pointers[4];
    std::copy(arguments.begin(), arguments.end(), values);
    for (int i = 0; i < 4; i++) pointers[i] = &values[i];
    for (uint64_t seed : {0, 7}) {
        auto run = [&](uint64_t first, uint64_t behind) {
            char message[512];
            if (first < behind &&
                !prism_emulator_run(kernel, grid, 32, 8192, pointers, first, behind, buffers, 2,
                                    seed, message, sizeof message)) {
                printf("%s\n", message);
                failures++;
            }
        };
        // The last blocks on another thread.
        std::thread other(run, (blocks + 1) / 2, blocks);
        run(0, (blocks + 1) / 2);
        other.join();
        const account::Counts &got = *prism_emulator_counts();
        if (memcmp(&got, &want, sizeof got) == 0) continue;
        failures++;
        printf("%s, seed %d:\n", name, (int)seed);
        for (const account::Counts *c : {&got, (const account::Counts *)&want}) {
            printf("    %s shared %d, conflicts %d;", c == &got ? "got" : "expected",
                   (int)c->shared, (int)c->conflicts);
            for (const account::Way &w : c->ways)
                printf(" requests %d, sectors %d of %d, bytes %d;", (int)w.requests,
                       (int)w.sectors, (int)w.needed, (int)w.bytes);
            printf("\n");
        }
    }
}

int main() {
    const uint64_t x = (uint64_t)memory[0], y = (uint64_t)memory[1];
    const account::Way none = {};
    auto shared = [&](const char *name, uint64_t stride, uint64_t requests, uint64_t conflicts) {
        expect(name, {stride}, {requests, conflicts, {none, none}});
    };
    // All at one word; a word each; every other bank, every fourth; odd strides meet no bank twice;
    // one bank.
    shared("shared_4", 0, 1, 0), shared("shared_4", 1, 1, 0), shared("shared_4", 2, 1, 1),
        shared("shared_4", 4, 1, 3);
    shared("shared_4", 33, 1, 0), shared("shared_4", 32, 1, 31);
    // Two lanes a word; a word each; one bank.
    shared("shared_2", 1, 1, 0), shared("shared_2", 2, 1, 0), shared("shared_2", 64, 1, 31);
    // Half a warp at a time: side by side; 16 lanes over 8 places.
    shared("shared_8", 1, 1, 0), shared("shared_8", 2, 1, 2), shared("shared_8", 0, 1, 0);
    // A quarter at a time: side by side; rows of 32 words, all in the same banks; rows of 36.
    shared("shared_16", 1, 1, 0), shared("shared_16", 8, 1, 28), shared("shared_16", 9, 1, 0);
    shared("matrices", 64, 2, 56), shared("matrices", 72, 2, 0);

    expect("copies", {x, 32}, {1, 0, {{1, 16, 16, 512}, none}});
    expect("copies", {x, 5}, {1, 0, {{1, 3, 3, 80}, none}});

    // What it adds to is read, too: with values side by side, turned round, off by one, a sector
    // each, and the same for all.
    const account::Way row = {1, 4, 4, 128};
    expect("add_to", {x, y, 0, 1}, {0, 0, {{2, 8, 8, 256}, row}});
    expect("add_to", {x, y, 31, ~0ull}, {0, 0, {{2, 8, 8, 256}, row}});
    expect("add_to", {x, y, 1, 1}, {0, 0, {{2, 9, 8, 256}, row}});
    expect("add_to", {x, y, 0, 8}, {0, 0, {{2, 36, 8, 256}, row}});
    expect("add_to", {x, y, 9, 0}, {0, 0, {{2, 5, 5, 132}, row}});
    // Bytes that several blocks read are needed once.
    expect("wide", {x, y}, {0, 0, {{1, 16, 16, 512}, {1, 16, 16, 512}}});
    expect("wide", {x, y}, {0, 0, {{7, 112, 112, 512}, {7, 112, 112, 3584}}}, 7);
    expect("loop", {y, 48}, {0, 0, {none, {2, 6, 6, 192}}});
    expect("loop", {y, 97}, {0, 0, {none, {4, 13, 13, 388}}});
    expect("apart", {y}, {0, 0, {none, {4, 16, 12, 384}}});
    return failures != 0;
}
