// Device memory and pinned host memory, between guard pages.
#pragma once

#include <cstddef>
#include <string>

namespace emulator {

#ifdef __x86_64__
constexpr size_t PAGE = 4 << 10;
#else
// The largest page size of the operating system.
constexpr size_t PAGE = 64 << 10;
#endif
constexpr size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

struct Allocation {
    unsigned char* start;
    size_t size;
    bool on_device;
    int device;
};

// `size` bytes at a multiple of 256, filled with 0xff. Null if memory is exhausted.
unsigned char* allocate(size_t size, bool on_device, int device);
// False if there is no such allocation.
bool release_memory(void* start, bool on_device);
// The allocation that contains all of the bytes, or null.
const Allocation* find_allocation(const void* start, size_t size);
const Allocation* find_allocation(const void* start);
size_t allocated(int device);
// Reports allocations that were written past their ends, and returns false if there are any.
bool check_ends();
// Describes an address that is not mapped.
std::string describe_address(const void* address);

}  // namespace emulator
