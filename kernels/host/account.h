// The account: the kernels' memory requests, counted while the emulator runs them. It is built only
// with PRISM_ACCOUNT, the name of a file to which each launch adds a line: kernel, threads and
// bytes of shared memory of a block, shared requests, their conflicts, and for reads and for writes
// the requests, sectors, sectors needed and bytes needed.
//
// A request is the set of accesses that the lanes of a warp make at one place of the machine code,
// each for the n-th time. Lanes run one after another here, and those of a warp come together where
// it exchanges values or waits at a barrier: between two such points the n-th access of a lane at a
// place is grouped with the n-th access of every other lane there. So lanes that go through a loop
// alike make the requests that they make on a GPU, as do lanes that leave it early; if lanes differ
// in an inner loop, or some skip an iteration (beyond a border, say), and do not come together
// after it, its later requests are grouped differently than on a GPU. Nothing depends on the order
// of lanes, on addresses or on the number of host threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace emulator {
namespace account {

// Shared memory, or global memory and the direction of the access.
enum Kind { READ, WRITTEN, SHARED };

struct Request {
    unsigned lanes;
    uint64_t at[32];
};

struct Way {
    // Sectors of 32 bytes that requests touch, and the number that would hold the distinct bytes
    // they ask for; the distinct bytes of the whole launch.
    uint64_t requests, sectors, needed, bytes;
};

struct Counts {
    uint64_t shared, conflicts;
    Way ways[2];
};

// How often a shared memory request has to be repeated. Each of the 32 banks delivers one word of
// four bytes at a time, to all lanes that ask for it. With 8 bytes per lane half a warp is served
// at a time, with 16 a quarter: those repetitions are not conflicts.
inline int conflicts_of(const Request &r, unsigned bytes) {
    int conflicts = 0, together = bytes <= 4 ? 32 : 128 / (int)bytes;
    for (int first = 0; first < 32; first += together) {
        uint64_t words[32][32];
        int count[32] = {}, most = 1;
        for (int lane = first; lane < first + together; lane++) {
            if (!(r.lanes >> lane & 1)) continue;
            for (uint64_t word = r.at[lane] / 4; word <= (r.at[lane] + bytes - 1) / 4; word++) {
                int bank = word % 32, i = 0;
                while (i < count[bank] && words[bank][i] != word) i++;
                if (i < count[bank]) continue;
                words[bank][count[bank]++] = word;
                most = std::max(most, count[bank]);
            }
        }
        conflicts += most - 1;
    }
    return conflicts;
}

struct Run {
    uint64_t start, end;
};

// The distinct bytes that lanes ask for, as runs in the order of addresses. Returns the number of
// runs.
inline int runs_of(const Request &r, unsigned bytes, Run (&runs)[32]) {
    uint64_t at[32];
    int lanes = 0, count = 0;
    for (int lane = 0; lane < 32; lane++)
        if (r.lanes >> lane & 1) at[lanes++] = r.at[lane];
    if (!std::is_sorted(at, at + lanes)) std::sort(at, at + lanes);
    for (int i = 0; i < lanes; i++) {
        if (count && at[i] <= runs[count - 1].end) {
            runs[count - 1].end = std::max(runs[count - 1].end, at[i] + bytes);
        } else {
            runs[count++] = {at[i], at[i] + bytes};
        }
    }
    return count;
}

// What the host threads that work on a launch add up. Launches follow one another.
class Launch {
  public:
    // Called before each part of a launch; `buffers` are pairs of address and bytes, sorted by
    // address.
    void begin(const uint64_t *buffers, size_t count, uint64_t blocks) {
        std::lock_guard<std::mutex> guard(lock);
        if (left) return;
        left = blocks, counts = {}, starts.clear();
        uint64_t words = 0;
        for (size_t i = 0; i < count; i++) {
            starts.push_back({buffers[2 * i], buffers[2 * i + 1], words});
            // In whole pages, so that no page belongs to two buffers.
            words += (buffers[2 * i + 1] + 64 * PAGE - 1) / (64 * PAGE) * PAGE;
        }
        for (int way : {READ, WRITTEN}) {
            if (touched[way].size() < words)
                touched[way].resize(words), pages[way].resize(words / PAGE);
        }
    }

    // Called after each part, with what was counted; `kernel`'s line is written when all blocks are
    // done.
    void end(const char *kernel, unsigned threads, unsigned bytes, const Counts &more,
             uint64_t blocks) {
        std::lock_guard<std::mutex> guard(lock);
        counts.shared += more.shared, counts.conflicts += more.conflicts;
        for (int way : {READ, WRITTEN}) {
            Way &to = counts.ways[way];
            const Way &from = more.ways[way];
            to.requests += from.requests, to.sectors += from.sectors, to.needed += from.needed;
        }
        left -= blocks;
        if (left) return;
        for (int way : {READ, WRITTEN}) counts.ways[way].bytes = take(way);
        last = counts;
        FILE *file = fopen(PRISM_ACCOUNT, "a");
        if (!file) return;
        fprintf(file, "%s %u %u %llu %llu", kernel, threads, bytes,
                (unsigned long long)counts.shared, (unsigned long long)counts.conflicts);
        for (const Way &w : counts.ways) {
            for (uint64_t v : {w.requests, w.sectors, w.needed, w.bytes})
                fprintf(file, " %llu", (unsigned long long)v);
        }
        fprintf(file, "\n");
        fclose(file);
    }

    // Records bytes that a request asks for; false if no buffer has them.
    bool touch(int way, Run run, size_t &recent) {
        if (recent >= starts.size() || !starts[recent].holds(run)) {
            auto above =
                std::upper_bound(starts.begin(), starts.end(), run.start,
                                 [](uint64_t at, const Buffer &b) { return at < b.start; });
            if (above == starts.begin() || !above[-1].holds(run)) return false;
            recent = above - starts.begin() - 1;
        }
        const Buffer &b = starts[recent];
        for (uint64_t at = run.start - b.start, end = run.end - b.start; at < end;) {
            uint64_t word = b.word + at / 64, bits = std::min<uint64_t>(64 - at % 64, end - at);
            uint64_t mask = (bits == 64 ? ~0ull : (1ull << bits) - 1) << at % 64,
                     *here = &touched[way][word];
            // Other host threads do the same.
            if ((__atomic_load_n(here, __ATOMIC_RELAXED) & mask) != mask) {
                __atomic_fetch_or(here, mask, __ATOMIC_RELAXED);
                __atomic_store_n(&pages[way][word / PAGE], 1, __ATOMIC_RELAXED);
            }
            at += bits;
        }
        return true;
    }

    // Those of the last launch that ended.
    Counts last = {};

  private:
    // Words of 64 bits, one bit per byte of device memory, that are read and cleared together.
    static constexpr uint64_t PAGE = 64;

    struct Buffer {
        uint64_t start, bytes, word;
        bool holds(Run run) const { return run.start >= start && run.end <= start + bytes; }
    };

    // Returns the number of bytes that were touched, and clears them.
    uint64_t take(int way) {
        uint64_t bytes = 0;
        for (size_t page = 0; page < pages[way].size(); page++) {
            if (!pages[way][page]) continue;
            pages[way][page] = 0;
            for (uint64_t *word = &touched[way][page * PAGE], *end = word + PAGE; word < end;
                 word++)
                bytes += __builtin_popcountll(*word), *word = 0;
        }
        return bytes;
    }

    std::mutex lock;
    // Blocks that have not finished.
    uint64_t left = 0;
    Counts counts = {};
    std::vector<Buffer> starts;
    std::vector<uint64_t> touched[2];
    std::vector<unsigned char> pages[2];
};

// The accesses of the running warp's lanes since they last came together.
class Log {
  public:
    // An access of a lane. `from` is its place in the machine code, `part` its number if one place
    // has several.
    void add(const void *from, unsigned part, Kind kind, int lane, uint64_t at, unsigned bytes) {
        // The key includes the width, because an access that is split by its alignment is split
        // differently for each lane.
        uint64_t key =
            (uint64_t)from << 15 | (uint64_t)part << 5 | __builtin_ctz(bytes) << 2 | kind;
        Place *&place = recent[(key >> 15 ^ key >> 23 ^ key) % 1024];
        if (!place || place->key != key)
            place = &places.try_emplace(key, Place{key, kind, bytes, 0, {}, {}}).first->second;
        Place &p = *place;
        if (!p.used) open.push_back(&p);
        unsigned n = p.times[lane]++;
        if (n == p.used) {
            if (p.used == p.requests.size()) p.requests.emplace_back();
            p.requests[p.used++].lanes = 0;
        }
        p.requests[n].lanes |= 1u << lane;
        p.requests[n].at[lane] = at;
    }

    // Counts the accesses, when the warp's lanes have come together.
    void close(Launch &launch) {
        for (Place *p : open) {
            for (unsigned i = 0; i < p->used; i++) {
                const Request &r = p->requests[i];
                if (p->kind == SHARED) {
                    counts.shared++, counts.conflicts += conflicts_of(r, p->bytes);
                } else {
                    count(launch, counts.ways[p->kind], *p, r);
                }
            }
            forget(*p);
        }
        open.clear();
    }

    // Called before blocks of a kernel.
    void begin(const void *of) {
        // A block that failed leaves some requests open.
        for (Place *p : open) forget(*p);
        open.clear(), counts = {};
        if (of == kernel) return;
        kernel = of, places.clear();
        memset(recent, 0, sizeof recent);
    }

    Counts counts = {};

  private:
    // A place of the machine code.
    struct Place {
        uint64_t key;
        Kind kind;
        unsigned bytes;
        // Requests so far, and for each lane the number it takes part in.
        unsigned used;
        unsigned times[32];
        std::vector<Request> requests;
    };

    void forget(Place &p) { p.used = 0, memset(p.times, 0, sizeof p.times); }

    void count(Launch &launch, Way &way, const Place &p, const Request &r) {
        Run runs[32];
        uint64_t bytes = 0, sectors = 0, behind = 0;
        for (int i = 0, n = runs_of(r, p.bytes, runs); i < n; i++) {
            // Neither a buffer nor shared memory: a table that the compiler made.
            if (!launch.touch(p.kind, runs[i], buffer)) continue;
            uint64_t first = std::max(runs[i].start / 32, behind);
            behind = (runs[i].end + 31) / 32;
            sectors += behind - first, bytes += runs[i].end - runs[i].start;
        }
        if (!bytes) return;
        way.requests++, way.sectors += sectors, way.needed += (bytes + 31) / 32;
    }

    const void *kernel = nullptr;
    std::unordered_map<uint64_t, Place> places;
    Place *recent[1024] = {};
    std::vector<Place *> open;
    // The buffer most recently touched.
    size_t buffer = 0;
};

} // namespace account
} // namespace emulator
