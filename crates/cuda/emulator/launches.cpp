// Modules, functions and launches.
#include "driver.h"

#include <cstring>

using emulator::Dim3;
using emulator::Kernel;

namespace driver {

int occupancy(const Kernel& kernel, int threads, size_t shared) {
    if (threads <= 0 || threads > int(kernel.max_threads) || shared > kernel.max_shared) return 0;
    int by_threads = MAX_THREADS_PER_MULTIPROCESSOR / int(emulator::round_up(threads, 32));
    int by_shared = SHARED_PER_MULTIPROCESSOR / int(shared + RESERVED_SHARED);
    return std::min({by_threads, by_shared, MAX_BLOCKS_PER_MULTIPROCESSOR});
}

static Kernel* find_kernel(const void* handle) {
    for (Kernel* kernel = emulator::kernels; kernel != nullptr; kernel = kernel->next) {
        if (kernel == handle) return kernel;
    }
    return nullptr;
}

struct Configuration {
    Dim3 grid, block;
    unsigned shared;
    bool cooperative;
};

static CUresult check(const Kernel& kernel, const Configuration& at) {
    unsigned long long threads = 1ull * at.block.x * at.block.y * at.block.z;
    unsigned long long blocks = 1ull * at.grid.x * at.grid.y * at.grid.z;
    if (threads == 0 || threads > MAX_THREADS || at.block.z > 64) {
        return report_error(INVALID_VALUE, "kernel %s: blocks of %llu threads", kernel.name, threads);
    }
    if (blocks == 0 || at.grid.x > 2147483647 || at.grid.y > 65535 || at.grid.z > 65535) {
        return report_error(INVALID_VALUE, "kernel %s: a grid of (%u, %u, %u) blocks", kernel.name, at.grid.x, at.grid.y,
                        at.grid.z);
    }
    if (threads > kernel.max_threads) {
        return report_error(OUT_OF_RESOURCES, "kernel %s: blocks of %llu threads, not of up to %u", kernel.name, threads,
                        kernel.max_threads);
    }
    if (at.shared > kernel.max_shared) {
        return report_error(INVALID_VALUE, "kernel %s: %u bytes of shared memory, not up to %u", kernel.name, at.shared,
                        kernel.max_shared);
    }
    if (at.cooperative && blocks > 1ull * MULTIPROCESSORS * occupancy(kernel, threads, at.shared)) {
        return report_error(COOPERATIVE_LAUNCH_TOO_LARGE, "kernel %s: %llu blocks can't run side by side", kernel.name,
                        blocks);
    }
    return SUCCESS;
}

static CUresult execute(Kernel& kernel, const Configuration& at, const void* args) {
    static long long launches = 0;
    long long failing = setting("VLMNARRATE_EMULATED_FAIL_LAUNCH", 0);
    if (failing > 0 && ++launches >= failing) return sticky_error = ILLEGAL_ADDRESS;
    CUresult error = emulator::run(kernel, at.grid, at.block, at.shared, args, at.cooperative);
    if (error != SUCCESS) report_error(error, "%s", emulator::failure);
    // A launch that needs too much is no sticky error.
    if (error != OUT_OF_RESOURCES) sticky_error = error;
    return error;
}

// Arguments from a list that ends with null: 1 precedes the buffer, 2 a pointer to its size.
static CUresult find_args(void** extra, const Kernel& kernel, const void*& args) {
    for (; *extra != nullptr; extra += 2) {
        if (*extra == reinterpret_cast<void*>(1)) args = extra[1];
        if (*extra == reinterpret_cast<void*>(2) && *static_cast<size_t*>(extra[1]) != kernel.args_size) {
            return report_error(INVALID_VALUE, "kernel %s: %zu bytes of arguments, not %u", kernel.name,
                            *static_cast<size_t*>(extra[1]), kernel.args_size);
        }
    }
    return SUCCESS;
}

struct alignas(16) Piece {
    unsigned char bytes[16];
};

static CUresult launch(void* function, const Configuration& at, void* stream, void** params, void** extra) {
    Kernel* kernel = find_kernel(function);
    if (kernel == nullptr) return INVALID_HANDLE;
    if (CUresult error = check(*kernel, at)) return error;
    const void* args = params != nullptr ? params[0] : nullptr;
    if (params == nullptr && extra != nullptr) {
        if (CUresult error = find_args(extra, *kernel, args)) return error;
    }
    if (args == nullptr) return report_error(INVALID_VALUE, "kernel %s: no arguments", kernel->name);
    std::vector<Piece> copy((kernel->args_size + 15) / 16);
    memcpy(copy.data(), args, kernel->args_size);
    return enqueue(stream, [=] { return execute(*kernel, at, copy.data()); });
}

// Attributes of cuLaunchKernelEx.
struct LaunchAttribute {
    int id;
    char pad[4];
    union {
        char bytes[64];
        int cooperative;
    };
};
struct LaunchConfig {
    Dim3 grid, block;
    unsigned shared;
    void* stream;
    LaunchAttribute* attributes;
    unsigned attribute_count;
};

}  // namespace driver

using namespace driver;

static CUresult load(void** module) {
    if (CUresult error = check_not_capturing()) return error;
    *module = &emulator::kernels;
    return setting("VLMNARRATE_EMULATED_LOAD_ERROR", SUCCESS);
}

DRIVER cuModuleLoadData(void** module, const void* image) {
    ENTER;
    return image != nullptr ? load(module) : INVALID_VALUE;
}

DRIVER cuModuleLoadDataEx(void** module, const void* image, unsigned, int*, void**) {
    return cuModuleLoadData(module, image);
}

DRIVER cuModuleLoad(void** module, const char*) {
    ENTER;
    return load(module);
}

DRIVER cuModuleUnload(void*) {
    ENTER;
    return SUCCESS;
}

DRIVER cuModuleGetLoadingMode(int* mode) {
    *mode = 1;
    return SUCCESS;
}

DRIVER cuModuleGetFunction(void** function, void*, const char* name) {
    ENTER;
    for (Kernel* kernel = emulator::kernels; kernel != nullptr; kernel = kernel->next) {
        if (strcmp(kernel->name, name) != 0) continue;
        *function = kernel;
        return SUCCESS;
    }
    return report_error(NOT_FOUND, "no kernel %s", name);
}

DRIVER cuFuncGetAttribute(int* value, int attribute, void* function) {
    ENTER;
    Kernel* kernel = find_kernel(function);
    if (kernel == nullptr) return INVALID_HANDLE;
    switch (attribute) {
    case 0: *value = kernel->max_threads; break;
    // Registers: the most that are possible.
    case 4: *value = std::min(255u, (64u << 10) / kernel->max_threads); break;
    // Versions.
    case 5: *value = 80; break;
    case 6: *value = 90; break;
    case 8: *value = kernel->max_shared; break;
    case 9: *value = -1; break;
    default: *value = 0;
    }
    return SUCCESS;
}

DRIVER cuFuncSetAttribute(void* function, int attribute, int value) {
    ENTER;
    Kernel* kernel = find_kernel(function);
    if (kernel == nullptr) return INVALID_HANDLE;
    if (attribute != 8) return SUCCESS;
    if (value < 0 || value > MAX_SHARED) {
        return report_error(INVALID_VALUE, "kernel %s: %d bytes of shared memory", kernel->name, value);
    }
    kernel->max_shared = value;
    return SUCCESS;
}

DRIVER cuFuncSetCacheConfig(void* function, int) {
    ENTER;
    return find_kernel(function) != nullptr ? SUCCESS : INVALID_HANDLE;
}

DRIVER cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* size) {
    ENTER;
    Kernel* kernel = find_kernel(function);
    if (kernel == nullptr) return INVALID_HANDLE;
    if (index > 0) return INVALID_VALUE;
    *offset = 0;
    if (size != nullptr) *size = kernel->args_size;
    return SUCCESS;
}

DRIVER cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int threads, size_t shared) {
    ENTER;
    Kernel* kernel = find_kernel(function);
    if (kernel == nullptr) return INVALID_HANDLE;
    *blocks = occupancy(*kernel, threads, shared);
    return SUCCESS;
}

DRIVER cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void* function, int threads, size_t shared,
                                                            unsigned) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}

DRIVER cuOccupancyAvailableDynamicSMemPerBlock(size_t* shared, void* function, int blocks, int) {
    ENTER;
    if (find_kernel(function) == nullptr) return INVALID_HANDLE;
    if (blocks <= 0) return INVALID_VALUE;
    *shared = std::min(SHARED_PER_MULTIPROCESSOR / blocks - RESERVED_SHARED, MAX_SHARED);
    return SUCCESS;
}

DRIVER cuOccupancyMaxPotentialBlockSize(int* blocks, int* threads, void* function, size_t (*shared_of)(int),
                                        size_t shared, int limit) {
    ENTER;
    Kernel* kernel = find_kernel(function);
    if (kernel == nullptr) return INVALID_HANDLE;
    *threads = limit > 0 ? std::min(limit, int(kernel->max_threads)) : kernel->max_threads;
    if (shared_of != nullptr) shared = shared_of(*threads);
    *blocks = MULTIPROCESSORS * occupancy(*kernel, *threads, shared);
    return SUCCESS;
}

DRIVER cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                      unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** params, void** extra) {
    ENTER;
    Configuration at = {{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared, false};
    return launch(function, at, stream, params, extra);
}

DRIVER cuLaunchCooperativeKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                                 unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** params) {
    ENTER;
    Configuration at = {{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared, true};
    return launch(function, at, stream, params, nullptr);
}

DRIVER cuLaunchKernelEx(const LaunchConfig* config, void* function, void** params, void** extra) {
    ENTER;
    Configuration at = {config->grid, config->block, config->shared, false};
    for (unsigned i = 0; i < config->attribute_count; i++) {
        const LaunchAttribute& attribute = config->attributes[i];
        if (attribute.id == 2) at.cooperative = attribute.cooperative != 0;
        // Clusters share memory, which is not emulated.
        if (attribute.id == 4) return report_error(NOT_SUPPORTED, "a launch of clusters");
    }
    return launch(function, at, config->stream, params, extra);
}
