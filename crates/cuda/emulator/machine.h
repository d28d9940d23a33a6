// The emulated multiprocessor. Each thread of a block is a fiber. The lanes of a warp run one after the other, each
// until it arrives at a collective operation. The last lane to arrive performs the operation for all and goes on.
//
// One thread of the host at a time runs everything. It holds the driver's lock.
#pragma once

#include "fibers.h"

#include <bit>
#include <cstdint>

namespace emulator {

// Error codes of the driver.
enum Code : int {
    SUCCESS = 0,
    OUT_OF_MEMORY = 2,
    ILLEGAL_ADDRESS = 700,
    OUT_OF_RESOURCES = 701,
    MISALIGNED_ADDRESS = 716,
    LAUNCH_FAILED = 719,
};

struct Dim3 {
    unsigned x, y, z;
};

struct Kernel {
    const char* name;
    unsigned max_threads;
    unsigned args_size;
    void (*body)(const void* args);
    unsigned max_shared = 48 << 10;
    Kernel* next;

    Kernel(const char* name, unsigned max_threads, unsigned args_size, void (*body)(const void*));
};
inline Kernel* kernels = nullptr;

inline Kernel::Kernel(const char* name, unsigned max_threads, unsigned args_size, void (*body)(const void*))
    : name(name), max_threads(max_threads), args_size(args_size), body(body), next(kernels) {
    kernels = this;
}

enum class Operation : unsigned { sync_warp, sync_block, shuffle, vote, mma, ldmatrix };

// Source location of a collective operation.
struct Site {
    Operation operation;
    unsigned line;
    const char* file;
};

// The pending cp_async copies of a lane.
struct Copies {
    struct Copy {
        unsigned char* to;
        // Null for zeros.
        const unsigned char* from;
    };
    static constexpr unsigned MAX_COPIES = 512, MAX_GROUPS = 32;
    unsigned count, groups;
    unsigned group_ends[MAX_GROUPS];
    Copy list[MAX_COPIES];
};

struct Block {
    Dim3 index;
    unsigned char* shared;
    unsigned shared_size;
    struct Warp* warps;
    unsigned warp_count, warps_waiting, warps_exited;
};

struct Lane {
    Context context;
    Warp* warp;
    // A bit for the order in which lanes run, which may differ from their numbers.
    uint32_t bit;
    unsigned number;
    Dim3 index;
    Copies* copies;
    unsigned char* stack;
};

struct alignas(64) Warp {
    // Masks of lanes.
    uint32_t all, waiting, exited;
    unsigned generation;
    Site site;
    Block* block;
    unsigned position;
    bool at_barrier;

    // Values that lanes exchange. Two buffers, as some lanes still read when others are at the next operation.
    uint32_t words[2][32];
    // Operands of mma: A as four 8x8 matrices, B, and pointers to D.
    alignas(64) uint32_t a[4][32];
    alignas(64) uint16_t b[16][8];
    float* d[32];
    // Operands of ldmatrix.
    const uint32_t* rows[32];
    uint32_t* results[32];

    Lane lanes[32];
};

struct Launch {
    Kernel* kernel;
    const void* args;
    Dim3 grid, block;
    // The concurrent warps: those of one block, or of all blocks of a cooperative launch.
    Warp* warps;
    unsigned warp_count, warps_left;
    // Consecutive pauses without progress.
    unsigned pauses;
};

inline Launch launch;
inline Lane* self;

// Runs a kernel to its end. Describes an error in `failure`.
Code run(Kernel& kernel, Dim3 grid, Dim3 block, unsigned shared, const void* args, bool cooperative);
inline char failure[512];
// How long all threads may only pause.
inline double timeout_seconds = 10;

// Records an error and ends the launch.
[[noreturn, gnu::cold, gnu::format(printf, 2, 3)]] void fail(Code code, const char* format, ...);

[[noreturn, gnu::cold]] void fail_divergence(Site site);
[[gnu::cold]] void check_lanes(Site site);
void finish_barrier();
void pause_lane();

// Returns true in the last lane to arrive, and in the others once all may go on. The former must release them.
[[gnu::always_inline]] inline bool arrive(Site site) {
    Lane& lane = *self;
    Warp& warp = *lane.warp;
    if (warp.waiting == 0) {
        if ((warp.exited | ~warp.all) != 0) [[unlikely]] check_lanes(site);
        warp.site = site;
    } else if (warp.site.line != site.line || warp.site.operation != site.operation) [[unlikely]] {
        fail_divergence(site);
    }
    warp.waiting |= lane.bit;
    uint32_t ready = warp.all & ~warp.waiting;
    if (ready == 0) return true;
    uint32_t later = ready & ~(lane.bit | (lane.bit - 1));
    Lane& next = warp.lanes[std::countr_zero(later != 0 ? later : ready)];
    self = &next;
    switch_context(lane.context, next.context);
    return false;
}

// Releases all waiting lanes.
[[gnu::always_inline]] inline void release(Warp& warp) {
    warp.waiting = 0;
    warp.generation++;
    launch.pauses = 0;
}

// Returns the words of all lanes.
[[gnu::always_inline]] inline const uint32_t* exchange(uint32_t word, Site site) {
    Warp& warp = *self->warp;
    uint32_t* words = warp.words[warp.generation & 1];
    words[self->number] = word;
    if (arrive(site)) release(warp);
    return words;
}

// Checks an access of 16 bytes to the block's shared memory.
inline void check_shared(const void* address, const char* operation) {
    Block& block = *self->warp->block;
    uintptr_t offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(block.shared);
    if (offset % 16 != 0) [[unlikely]] {
        fail(MISALIGNED_ADDRESS, "%s at %#zx of shared memory, not a multiple of 16", operation, size_t(offset));
    }
    if (offset + 16 > block.shared_size) [[unlikely]] {
        fail(ILLEGAL_ADDRESS, "%s at %td of %u bytes of shared memory", operation, ptrdiff_t(offset), block.shared_size);
    }
}

[[gnu::always_inline]] inline void pass_row(uint32_t (&r)[4], const void* row) {
    check_shared(row, "ldmatrix");
    self->warp->rows[self->number] = static_cast<const uint32_t*>(row);
    self->warp->results[self->number] = r;
}

// Collective operations, performed by the last lane to arrive.
void multiply_bf16(Warp& warp);
void multiply_f16(Warp& warp);
void load_matrices(Warp& warp);
void load_transposed(Warp& warp);

}  // namespace emulator
