// Device memory and pinned memory of the host, with pages around that fault.
#pragma once

#include <cstddef>
#include <string>

namespace emulator {

#ifdef __x86_64__
constexpr size_t PAGE = 4 << 10;
#else
// Of the kernel's possible sizes the largest.
constexpr size_t PAGE = 64 << 10;
#endif
constexpr size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

struct Allocation {
    unsigned char* start;
    size_t size;
    bool on_device;
    int device;
};

// As `size` bytes at a multiple of 256, with 0xff in all. Null if there is no memory.
unsigned char* allocate(size_t size, bool on_device, int device);
// False if there is no such allocation.
bool release_memory(void* start, bool on_device);
// The one that has all the bytes, or null.
const Allocation* find_allocation(const void* start, size_t size);
const Allocation* find_allocation(const void* start);
size_t allocated(int device);
// Says which allocations were written past their ends; false if some were.
bool check_ends();
// Where an address is that can't be reached.
std::string describe_address(const void* address);

}  // namespace emulator
