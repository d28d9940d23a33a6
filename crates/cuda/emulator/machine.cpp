#include "machine.h"

#include "faults.h"
#include "memory.h"

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <sys/mman.h>
#include <vector>

namespace emulator {

// More than a kernel needs: sanitizers need some too. Untouched pages cost nothing.
constexpr size_t STACK = 256 << 10;
constexpr size_t MAX_SHARED = 227 << 10;

static Context host;
static Code code;

static const char* name(Operation operation) {
    const char* names[] = {"sync_warp", "sync_block", "a shuffle", "any or all", "mma", "ldmatrix"};
    return names[static_cast<unsigned>(operation)];
}

static std::string describe(const Site& site) {
    const char* slash = strrchr(site.file, '/');
    return std::string(name(site.operation)) + " (" + (slash ? slash + 1 : site.file) + ":" + std::to_string(site.line) +
           ")";
}

void record_failure(Code reason, const char* format, va_list arguments) {
    code = reason;
    Dim3 block = self->warp->block->index, thread = self->index;
    int length = snprintf(failure, sizeof failure, "kernel %s, block (%u, %u, %u), thread (%u, %u, %u): ",
                          launch.kernel->name, block.x, block.y, block.z, thread.x, thread.y, thread.z);
    vsnprintf(failure + length, sizeof failure - length, format, arguments);
}

Context& leave() {
    self = nullptr;
    return host;
}

void fail(Code reason, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    record_failure(reason, format, arguments);
    va_end(arguments);
    Context left;
    switch_context(left, leave());
    __builtin_unreachable();
}

void fail_divergence(Site site) {
    fail(LAUNCH_FAILED, "divergence: is at %s, others of its warp wait at %s", describe(site).c_str(),
         describe(self->warp->site).c_str());
}

void check_lanes(Site site) {
    Warp& warp = *self->warp;
    if (warp.exited != 0) {
        fail(LAUNCH_FAILED, "divergence: is at %s, others of its warp have ended", describe(site).c_str());
    }
    bool complete = warp.all == ~0u;
    if (!complete && site.operation != Operation::sync_block && site.operation != Operation::sync_warp) {
        fail(LAUNCH_FAILED, "%s in a warp of %d threads", describe(site).c_str(), std::popcount(warp.all));
    }
}

static Lane& first_ready(Warp& warp) {
    return warp.lanes[std::countr_zero(warp.all & ~warp.waiting & ~warp.exited)];
}

// The next warp that can run, the current one last.
static Warp* next_warp(Warp& warp) {
    unsigned position = warp.position;
    for (unsigned i = 0; i < launch.warp_count; i++) {
        if (++position == launch.warp_count) position = 0;
        Warp& next = launch.warps[position];
        if (!next.at_barrier && next.exited != next.all) return &next;
    }
    return nullptr;
}

static void go_on(Context& left, Lane& next) {
    self = &next;
    switch_context(left, next.context);
}

// Called by the last lane of its warp at a barrier of the block.
void finish_barrier() {
    Lane& lane = *self;
    Warp& warp = *lane.warp;
    Block& block = *warp.block;
    if (block.warps_exited != 0) {
        fail(LAUNCH_FAILED, "divergence: is at %s, other warps have ended", describe(warp.site).c_str());
    }
    if (++block.warps_waiting < block.warp_count) {
        warp.at_barrier = true;
        go_on(lane.context, first_ready(*next_warp(warp)));
        return;
    }
    block.warps_waiting = 0;
    for (unsigned i = 0; i < block.warp_count; i++) {
        block.warps[i].at_barrier = false;
        release(block.warps[i]);
    }
}

static void check_patience() {
    static std::chrono::steady_clock::time_point start;
    constexpr unsigned PAUSES = 1 << 14;
    if (launch.pauses % PAUSES != 0) return;
    auto now = std::chrono::steady_clock::now();
    if (launch.pauses == PAUSES) {
        start = now;
    } else if (std::chrono::duration<double>(now - start).count() > timeout_seconds) {
        fail(LAUNCH_FAILED, "deadlock: for %g seconds threads did nothing but pause", timeout_seconds);
    }
}

void pause_lane() {
    Lane& lane = *self;
    Warp& warp = *lane.warp;
    launch.pauses++;
    check_patience();
    uint32_t later = warp.all & ~warp.waiting & ~warp.exited & ~(lane.bit | (lane.bit - 1));
    Lane& next = later != 0 ? warp.lanes[std::countr_zero(later)] : first_ready(*next_warp(warp));
    if (&next != &lane) go_on(lane.context, next);
}

[[noreturn]] static void run_lane() {
    launch.kernel->body(launch.args);

    Lane& lane = *self;
    Warp& warp = *lane.warp;
    Block& block = *warp.block;
    if (warp.waiting != 0) {
        fail(LAUNCH_FAILED, "divergence: ends, others of its warp wait at %s", describe(warp.site).c_str());
    }
    launch.pauses = 0;
    warp.exited |= lane.bit;
    if (warp.exited != warp.all) {
        go_on(lane.context, first_ready(warp));
    } else {
        if (block.warps_waiting != 0) fail(LAUNCH_FAILED, "divergence: ends, other warps wait at sync_block");
        block.warps_exited++;
        if (--launch.warps_left > 0) {
            go_on(lane.context, first_ready(*next_warp(warp)));
        } else {
            switch_context(lane.context, leave());
        }
    }
    __builtin_unreachable();
}

// Warps and stacks, kept between launches.
struct Places {
    unsigned warp_count = 0;
    Warp* warps = nullptr;
    std::vector<Block> blocks;
    std::vector<unsigned char*> stacks, shared;
    std::vector<Copies*> copies;

    bool reserve(unsigned wanted_warps, unsigned wanted_blocks);
};
static Places places;

static unsigned char* map(size_t size) {
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? nullptr : static_cast<unsigned char*>(memory);
}

bool Places::reserve(unsigned wanted_warps, unsigned wanted_blocks) {
    while (stacks.size() < wanted_warps) {
        unsigned char* memory = map(32 * (PAGE + STACK));
        auto* lists = static_cast<Copies*>(calloc(32, sizeof(Copies)));
        if (memory == nullptr || lists == nullptr) return false;
        for (int lane = 0; lane < 32; lane++) mprotect(memory + lane * (PAGE + STACK), PAGE, PROT_NONE);
        stacks.push_back(memory);
        copies.push_back(lists);
    }
    while (shared.size() < wanted_blocks) {
        size_t size = round_up(MAX_SHARED, PAGE);
        unsigned char* memory = map(PAGE + size + PAGE);
        if (memory == nullptr) return false;
        mprotect(memory, PAGE, PROT_NONE);
        mprotect(memory + PAGE + size, PAGE, PROT_NONE);
        // Ends at the guard page.
        shared.push_back(memory + PAGE + size);
    }
    if (warp_count < wanted_warps) {
        delete[] warps;
        warps = new (std::nothrow) Warp[wanted_warps];
        warp_count = warps == nullptr ? 0 : wanted_warps;
        if (warps == nullptr) return false;
    }
    blocks.resize(wanted_blocks);
    return true;
}

static void start_block(Block& block, Dim3 index) {
    block.index = index;
    block.warps_waiting = block.warps_exited = 0;
    // NaN in every format.
    memset(block.shared, 0xff, block.shared_size);
    for (unsigned i = 0; i < block.warp_count; i++) {
        Warp& warp = block.warps[i];
        warp.waiting = warp.exited = 0;
        warp.at_barrier = false;
        for (int place = 0; place < std::popcount(warp.all); place++) {
            Lane& lane = warp.lanes[place];
            lane.copies->count = lane.copies->groups = 0;
            // At different offsets in their pages. Equal offsets would share few cache lines.
            start_context(lane.context, lane.stack, lane.stack + STACK - place * 128, run_lane);
        }
    }
}

// Threads run in a fixed order, and blocks one after the other. The reverse order finds other missing barriers.
static bool reversed;
static unsigned in_order(unsigned place, unsigned count) { return reversed ? count - 1 - place : place; }

static void place_block(Block& block, unsigned number, unsigned warp_count, unsigned shared) {
    block.shared = places.shared[number] - round_up(shared, 128);
    block.shared_size = shared;
    block.warp_count = warp_count;
    block.warps = places.warps + number * warp_count;
    unsigned threads = launch.block.x * launch.block.y * launch.block.z;
    for (unsigned i = 0; i < warp_count; i++) {
        Warp& warp = block.warps[i];
        unsigned first = in_order(i, warp_count) * 32;
        unsigned lanes = std::min(threads - first, 32u);
        warp.all = lanes == 32 ? ~0u : (1u << lanes) - 1;
        warp.generation = 0;
        warp.block = &block;
        warp.position = number * warp_count + i;
        for (unsigned place = 0; place < lanes; place++) {
            unsigned lane = in_order(place, lanes);
            unsigned thread = first + lane;
            Dim3 index = {thread % launch.block.x, thread / launch.block.x % launch.block.y,
                          thread / launch.block.x / launch.block.y};
            unsigned char* stack = places.stacks[warp.position] + place * (PAGE + STACK) + PAGE;
            warp.lanes[place] = {{}, &warp, 1u << place, lane, index, places.copies[warp.position] + place, stack};
        }
    }
}

bool in_stack_guard(const void* address) {
    auto* bytes = static_cast<const unsigned char*>(address);
    return bytes < self->stack && bytes >= self->stack - PAGE;
}

Code run(Kernel& kernel, Dim3 grid, Dim3 block, unsigned shared, const void* args, bool cooperative) {
    unsigned warp_count = (block.x * block.y * block.z + 31) / 32;
    unsigned all_blocks = grid.x * grid.y * grid.z;
    unsigned at_once = cooperative ? all_blocks : 1;
    if (!places.reserve(at_once * warp_count, at_once)) {
        snprintf(failure, sizeof failure, "kernel %s: no memory for its %u threads", kernel.name,
                 at_once * warp_count * 32);
        return OUT_OF_RESOURCES;
    }
    launch = {&kernel, args, grid, block, places.warps, at_once * warp_count, 0, 0};
    const char* order = getenv("VLMNARRATE_EMULATED_ORDER");
    reversed = order != nullptr && strcmp(order, "reversed") == 0;
    for (unsigned number = 0; number < at_once; number++) {
        place_block(places.blocks[number], number, warp_count, shared);
    }
    code = SUCCESS;
    Faults faults;
    for (unsigned place = 0; place < all_blocks && code == SUCCESS; place++) {
        unsigned number = in_order(place, all_blocks);
        Dim3 index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
        start_block(places.blocks[place % at_once], index);
        if ((place + 1) % at_once != 0) continue;
        launch.warps_left = launch.warp_count;
        launch.pauses = 0;
        go_on(host, first_ready(launch.warps[0]));
    }
    return code;
}

}  // namespace emulator
