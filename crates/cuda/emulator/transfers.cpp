// Memory and copies.
#include "driver.h"

#include <cstdio>
#include <cstring>

using namespace driver;

static unsigned char* pointer(CUdeviceptr address) { return reinterpret_cast<unsigned char*>(address); }

// Whether the bytes are accessible to the device.
static bool reaches(CUdeviceptr address, size_t size, const char* what) {
    if (size == 0 || emulator::find_allocation(pointer(address), size) != nullptr) return true;
    const auto* allocation = emulator::find_allocation(pointer(address));
    if (allocation == nullptr) {
        report_error(0, "%s %zu bytes at %#llx, which is no device memory", what, size, address);
    } else {
        report_error(0, "%s %zu bytes at %zu in an allocation of %zu bytes", what, size,
                 size_t(pointer(address) - allocation->start), allocation->size);
    }
    return false;
}

DRIVER cuMemGetInfo_v2(size_t* free, size_t* total);

static CUresult allocate(CUdeviceptr* address, size_t size) {
    size_t free, total;
    cuMemGetInfo_v2(&free, &total);
    unsigned char* start = nullptr;
    if (emulator::round_up(size, 256) <= free) start = emulator::allocate(size, true, current->device);
    *address = reinterpret_cast<CUdeviceptr>(start);
    return start != nullptr ? SUCCESS : OUT_OF_MEMORY;
}

static CUresult release(CUdeviceptr address) {
    if (address == 0 || emulator::release_memory(pointer(address), true)) return SUCCESS;
    return report_error(INVALID_VALUE, "freed %#llx, which is no allocation", address);
}

static CUresult copy(void* to, const void* from, size_t size) {
    if (size > 0) memmove(to, from, size);
    return SUCCESS;
}

DRIVER cuMemAlloc_v2(CUdeviceptr* address, size_t size) {
    ENTER;
    if (CUresult error = check_not_capturing()) return error;
    return size > 0 ? allocate(address, size) : INVALID_VALUE;
}

DRIVER cuMemFree_v2(CUdeviceptr address) {
    ENTER;
    if (CUresult error = check_not_capturing()) return error;
    return release(address);
}

DRIVER cuMemAllocAsync(CUdeviceptr* address, size_t size, void* stream) {
    ENTER;
    Stream* found = find_stream(stream);
    if (found == nullptr) return INVALID_HANDLE;
    if (found->graph != nullptr) return report_error(NOT_SUPPORTED, "cuMemAllocAsync in a stream that captures");
    *address = 0;
    return size > 0 ? allocate(address, size) : SUCCESS;
}

DRIVER cuMemFreeAsync(CUdeviceptr address, void* stream) {
    ENTER;
    Stream* found = find_stream(stream);
    if (found == nullptr) return INVALID_HANDLE;
    if (found->graph != nullptr) return report_error(NOT_SUPPORTED, "cuMemFreeAsync in a stream that captures");
    return release(address);
}

DRIVER cuMemHostAlloc(void** address, size_t size, unsigned) {
    ENTER;
    if (CUresult error = check_not_capturing()) return error;
    if (size == 0) return INVALID_VALUE;
    *address = emulator::allocate(size, false, current->device);
    return *address != nullptr ? SUCCESS : OUT_OF_MEMORY;
}

DRIVER cuMemAllocHost_v2(void** address, size_t size) { return cuMemHostAlloc(address, size, 0); }

DRIVER cuMemFreeHost(void* address) {
    ENTER;
    if (emulator::release_memory(address, false)) return SUCCESS;
    return report_error(INVALID_VALUE, "freed %p, which is no memory of the driver's", address);
}

DRIVER cuMemHostGetDevicePointer_v2(CUdeviceptr* address, void* host, unsigned) {
    ENTER;
    const auto* allocation = emulator::find_allocation(host);
    if (allocation == nullptr || allocation->on_device) return INVALID_VALUE;
    *address = reinterpret_cast<CUdeviceptr>(host);
    return SUCCESS;
}

DRIVER cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t size) {
    ENTER;
    if (CUresult error = check_not_capturing()) return error;
    return reaches(to, size, "copied to") ? copy(pointer(to), from, size) : INVALID_VALUE;
}

DRIVER cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t size) {
    ENTER;
    if (CUresult error = check_not_capturing()) return error;
    return reaches(from, size, "copied from") ? copy(to, pointer(from), size) : INVALID_VALUE;
}

DRIVER cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t size) {
    ENTER;
    if (CUresult error = check_not_capturing()) return error;
    if (!reaches(to, size, "copied to") || !reaches(from, size, "copied from")) return INVALID_VALUE;
    return copy(pointer(to), pointer(from), size);
}

DRIVER cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t size, void* stream) {
    ENTER;
    if (!reaches(to, size, "copied to")) return INVALID_VALUE;
    return enqueue(stream, [=] { return copy(pointer(to), from, size); });
}

DRIVER cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t size, void* stream) {
    ENTER;
    if (!reaches(from, size, "copied from")) return INVALID_VALUE;
    return enqueue(stream, [=] { return copy(to, pointer(from), size); });
}

DRIVER cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t size, void* stream) {
    ENTER;
    if (!reaches(to, size, "copied to") || !reaches(from, size, "copied from")) return INVALID_VALUE;
    return enqueue(stream, [=] { return copy(pointer(to), pointer(from), size); });
}

DRIVER cuMemcpyPeerAsync(CUdeviceptr to, Context*, CUdeviceptr from, Context*, size_t size, void* stream) {
    return cuMemcpyDtoDAsync_v2(to, from, size, stream);
}

DRIVER cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t size, void* stream) {
    ENTER;
    return enqueue(stream, [=] { return copy(pointer(to), pointer(from), size); });
}

template <class Element>
static CUresult fill(CUdeviceptr address, Element value, size_t count, void* stream) {
    if (address % sizeof(Element) != 0 || !reaches(address, count * sizeof(Element), "filled")) return INVALID_VALUE;
    return enqueue(stream, [=] {
        auto* elements = reinterpret_cast<Element*>(address);
        for (size_t i = 0; i < count; i++) elements[i] = value;
        return SUCCESS;
    });
}

DRIVER cuMemsetD8Async(CUdeviceptr address, unsigned char value, size_t count, void* stream) {
    ENTER;
    return fill(address, value, count, stream);
}

DRIVER cuMemsetD16Async(CUdeviceptr address, unsigned short value, size_t count, void* stream) {
    ENTER;
    return fill(address, value, count, stream);
}

DRIVER cuMemsetD32Async(CUdeviceptr address, unsigned value, size_t count, void* stream) {
    ENTER;
    return fill(address, value, count, stream);
}

DRIVER cuMemsetD8_v2(CUdeviceptr address, unsigned char value, size_t count) {
    ENTER;
    if (CUresult error = check_not_capturing()) return error;
    return fill(address, value, count, nullptr);
}

DRIVER cuMemsetD32_v2(CUdeviceptr address, unsigned value, size_t count) {
    ENTER;
    if (CUresult error = check_not_capturing()) return error;
    return fill(address, value, count, nullptr);
}

// The only memory pool, which never holds free memory.
DRIVER cuDeviceGetDefaultMemPool(void** pool, CUdevice) {
    *pool = &mutex;
    return SUCCESS;
}

DRIVER cuDeviceGetMemPool(void** pool, CUdevice device) { return cuDeviceGetDefaultMemPool(pool, device); }
DRIVER cuDeviceSetMemPool(CUdevice, void*) { return SUCCESS; }
DRIVER cuMemPoolTrimTo(void*, size_t) { return SUCCESS; }
DRIVER cuMemPoolSetAttribute(void*, int, void*) { return SUCCESS; }

DRIVER cuMemPoolGetAttribute(void*, int attribute, void* value) {
    ENTER;
    // Attributes from the fourth on are sizes: a threshold, then the memory in use.
    if (attribute < 4) {
        *static_cast<int*>(value) = 1;
    } else {
        *static_cast<uint64_t*>(value) = attribute == 4 ? 0 : emulator::allocated(current->device);
    }
    return SUCCESS;
}
