// Products of warpgroups and barriers with phases in the emulator (cases.cu): the right ones are
// computed, in any order of threads, and each mistake is an error that says what it is.
#include "host/emulator.h"
#include <algorithm>
#include <cstdio>
#include <utility>
#include <vector>

struct Kernel;
extern "C" const Kernel *prism_emulator_find(const char *name);
extern "C" bool prism_emulator_run(const Kernel *kernel, const unsigned *grid, unsigned threads,
                                   unsigned shared, void *const *arguments, uint64_t from,
                                   uint64_t to, const uint64_t *allocations,
                                   size_t allocation_count, uint64_t seed, char *message,
                                   size_t length);

alignas(256) static unsigned short a[64 * 64], b[96 * 64];
alignas(256) static float d[64 * 96];
alignas(256) static int sums[32];
static int failures = 0;

static void complain(const char *what, const char *said) {
    printf("%s: %s\n", what, said);
    failures++;
}

// Runs one block; `error` is part of what must be said, null if nothing.
static void run(const char *name, unsigned threads, unsigned shared, std::vector<void *> arguments,
                const char *error, const char *what, uint64_t seed) {
    std::vector<std::pair<uint64_t, uint64_t>> buffers = {
        {(uint64_t)a, sizeof a}, {(uint64_t)b, sizeof b},
        {(uint64_t)d, sizeof d}, {(uint64_t)sums, sizeof sums}};
    std::sort(buffers.begin(), buffers.end());
    unsigned grid[3] = {1, 1, 1};
    char message[512] = "nothing";
    bool good = prism_emulator_run(prism_emulator_find(name), grid, threads, shared,
                                   arguments.data(), 0, 1, (const uint64_t *)buffers.data(),
                                   buffers.size(), seed, message, sizeof message);
    if (good != !error || (error && !strstr(message, error))) complain(what, message);
}

int main() {
    // Small whole numbers, exact in either type, and their sums in float.
    auto value = [](int i) { return (float)(i * 7919 % 2039 % 9 - 4); };
    for (bool bfloat : {false, true}) {
        auto of = [bfloat](float v) {
            return bfloat ? emulator::float_to_bfloat(v) : emulator::float_to_half(v);
        };
        for (int i = 0; i < 64 * 64; i++) a[i] = of(value(i));
        for (int i = 0; i < 96 * 64; i++) b[i] = of(value(i + 5000));
        const char *name = bfloat ? "product_bf16" : "product_f16";
        void *pointers[3] = {a, b, d};
        auto product = [&](int at, int along_k, int along_rows, int wrong, const char *error,
                           const char *what, uint64_t seed) {
            run(name, 128, 16384,
                {&pointers[0], &pointers[1], &pointers[2], &at, &along_k, &along_rows, &wrong},
                error, what, seed);
        };
        for (uint64_t seed : {0, 3}) {
            // Pieces one behind the other along k, along the rows, with gaps, and in overlapping
            // rows of an image: 18 voxels of 16 bytes.
            const int layouts[][3] = {
                {0, 128, 256}, {16, 1024, 128}, {48, 2832, 160 + 128}, {5184, 5216, 288}};
            for (auto &layout : layouts) {
                memset(d, 0, sizeof d);
                product(layout[0], layout[1], layout[2], 0, nullptr, "a product", seed);
                for (int row = 0; row < 64; row++)
                    for (int column = 0; column < 96; column++) {
                        float sum = 0;
                        for (int k = 0; k < 16; k++)
                            sum += value(row * 16 + k) * value(column * 16 + k + 5000);
                        if (d[row * 96 + column] != sum)
                            return complain("a product is wrong", name), 1;
                    }
            }
            const char *errors[][2] = {
                {"is not fenced by the thread that stored it", "no fence"},
                {"is not fenced by the thread that stored it", "a fence of other threads"},
                {"is not fenced by the thread that stored it", "a store after the fence"},
                {"has been stored since it began", "a store during the product"},
                {"which nothing has stored", "nothing stored"},
                {"whose sums are not fenced", "no fence of the sums"},
                {"that are not committed", "not committed"},
                {"start different products", "not the same descriptors"},
                {"of shared memory, which has 16384 bytes", "an operand beyond the end"},
                {"a swizzle other than that of 128 bytes", "another swizzle"}};
            for (int wrong = 1; wrong <= 10; wrong++)
                product(0, 128, 256, wrong, errors[wrong - 1][0], errors[wrong - 1][1], seed);
            product(0, 128, 256, 13, "for the warps of its warpgroup for ever", "fewer warps",
                    seed);

            const char *swizzled = bfloat ? "swizzled_product_bf16" : "swizzled_product_f16";
            auto swizzled_product = [&](int at, int wrong, const char *error, const char *what) {
                run(swizzled, 128, 20480, {&pointers[0], &pointers[1], &pointers[2], &at, &wrong},
                    error, what, seed);
            };
            for (int at = 0; at < 4; at++) {
                memset(d, 0, sizeof d);
                swizzled_product(at, 0, nullptr, "a swizzled product");
                for (int row = 0; row < 64; row++)
                    for (int column = 0; column < 96; column++) {
                        float sum = 0;
                        for (int k = at * 16; k < at * 16 + 16; k++)
                            sum += value(row * 64 + k) * value(column * 64 + k + 5000);
                        if (d[row * 96 + column] != sum)
                            return complain("a product is wrong", swizzled), 1;
                    }
            }
            swizzled_product(0, 14, "do not begin at multiples of 1024 bytes", "off its place");
            swizzled_product(0, 15, "beyond its rows' 128 bytes", "beyond its row");
        }
    }
    for (uint64_t seed : {0, 3}) {
        void *pointer = sums;
        int turns = 7, right = 0, not_made = 11, one_missing = 12;
        run("phases", 64, 64, {&pointer, &turns, &right}, nullptr, "phases", seed);
        for (int sum : sums)
            if (sum != 7 + 0 + 1 + 4 + 9 + 16 + 25 + 36)
                return complain("phases", "another sum"), 1;
        run("phases", 64, 64, {&pointer, &turns, &not_made}, "a barrier that was not made",
            "a barrier that was not made", seed);
        run("phases", 64, 64, {&pointer, &turns, &one_missing}, "for a barrier's phase for ever",
            "an arrival that is missing", seed);
    }
    return failures != 0;
}
