#include "memory.h"

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <sys/mman.h>

namespace emulator {

constexpr size_t ALIGNMENT = 256;

// By address. Never destroyed, as threads may still free memory while the program exits.
static auto& allocations = *new std::map<uintptr_t, Allocation>;
static size_t used[16];

static unsigned char* mapping(const Allocation& allocation) {
    auto end = allocation.start + round_up(allocation.size, ALIGNMENT);
    return end - round_up(allocation.size, PAGE) - PAGE;
}

unsigned char* allocate(size_t size, bool on_device, int device) {
    size_t pages = round_up(size, PAGE);
    void* memory = mmap(nullptr, pages + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    auto* bytes = static_cast<unsigned char*>(memory) + PAGE;
    if (mprotect(bytes, pages, PROT_READ | PROT_WRITE) != 0) {
        munmap(memory, pages + 2 * PAGE);
        return nullptr;
    }
    memset(bytes, 0xff, pages);
    // Up to the guard page.
    unsigned char* start = bytes + pages - round_up(size, ALIGNMENT);
    allocations[reinterpret_cast<uintptr_t>(start)] = {start, size, on_device, device};
    if (on_device) used[device] += round_up(size, ALIGNMENT);
    return start;
}

// Alignment may leave a gap between an allocation and its guard page.
static bool check_end(const Allocation& allocation) {
    unsigned char* end = allocation.start + round_up(allocation.size, ALIGNMENT);
    for (unsigned char* byte = allocation.start + allocation.size; byte < end; byte++) {
        if (*byte == 0xff) continue;
        fprintf(stderr, "CUDA emulator: %td bytes after the end of an allocation of %zu bytes were written to\n",
                byte - (allocation.start + allocation.size), allocation.size);
        memset(byte, 0xff, end - byte);
        return false;
    }
    return true;
}

bool check_ends() {
    bool intact = true;
    for (const auto& [start, allocation] : allocations) intact &= check_end(allocation);
    return intact;
}

bool release_memory(void* start, bool on_device) {
    auto found = allocations.find(reinterpret_cast<uintptr_t>(start));
    if (found == allocations.end() || found->second.on_device != on_device) return false;
    const Allocation& allocation = found->second;
    check_end(allocation);
    if (on_device) used[allocation.device] -= round_up(allocation.size, ALIGNMENT);
    munmap(mapping(allocation), round_up(allocation.size, PAGE) + 2 * PAGE);
    allocations.erase(found);
    return true;
}

const Allocation* find_allocation(const void* start) {
    auto after = allocations.upper_bound(reinterpret_cast<uintptr_t>(start));
    if (after == allocations.begin()) return nullptr;
    const Allocation& allocation = std::prev(after)->second;
    size_t offset = static_cast<const unsigned char*>(start) - allocation.start;
    return offset < allocation.size ? &allocation : nullptr;
}

const Allocation* find_allocation(const void* start, size_t size) {
    const Allocation* allocation = find_allocation(start);
    if (allocation == nullptr) return nullptr;
    size_t offset = static_cast<const unsigned char*>(start) - allocation->start;
    return size <= allocation->size - offset ? allocation : nullptr;
}

size_t allocated(int device) { return used[device]; }

std::string describe_address(const void* address) {
    auto* byte = static_cast<const unsigned char*>(address);
    for (const auto& [start, allocation] : allocations) {
        unsigned char* end = allocation.start + allocation.size;
        const unsigned char* first = mapping(allocation);
        std::string of = " an allocation of " + std::to_string(allocation.size) + " bytes";
        if (byte >= end && byte < end + 2 * PAGE) return std::to_string(byte - end) + " bytes after the end of" + of;
        if (byte >= first && byte < allocation.start) {
            return std::to_string(allocation.start - byte) + " bytes before" + of;
        }
    }
    return "where nothing is allocated";
}

}  // namespace emulator
