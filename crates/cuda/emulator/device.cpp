// Errors, devices and contexts.
#include "driver.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace driver {

constexpr int MAX_DEVICES = 16;
static Context primary[MAX_DEVICES];

long long setting(const char* name, long long otherwise) {
    const char* value = getenv(name);
    return value != nullptr && *value != '\0' ? atoll(value) : otherwise;
}

static int device_count() {
    return std::min(int(setting("VLMNARRATE_EMULATED_DEVICES", 1)), MAX_DEVICES);
}

static bool has(CUdevice device) { return device >= 0 && device < device_count(); }

static size_t total_memory() { return setting("VLMNARRATE_EMULATED_MEMORY", 4ll << 30); }

CUresult report_error(CUresult error, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("CUDA emulator: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    return error;
}

CUresult check_context() {
    if (!initialized) return NOT_INITIALIZED;
    if (current == nullptr) return report_error(INVALID_CONTEXT, "a call in a thread without a context");
    return sticky_error;
}

struct ErrorName {
    CUresult error;
    const char *name, *text;
};

constexpr ErrorName ERROR_NAMES[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {4, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {34, "CUDA_ERROR_STUB_LIBRARY", "CUDA driver is a stub library"},
    {46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {221, "CUDA_ERROR_JIT_COMPILER_NOT_FOUND", "PTX JIT compiler library not found"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."},
    {300, "CUDA_ERROR_INVALID_SOURCE", "device kernel image is invalid"},
    {301, "CUDA_ERROR_FILE_NOT_FOUND", "file not found"},
    {304, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {401, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {716, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {720, "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE", "too many blocks in cooperative launch"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "operation failed due to capture of unmatched stream"},
    {905, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream"},
    {907, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"},
    {908, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", "attempt to terminate a thread-local capture sequence from another thread"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

static const ErrorName* find_name(CUresult error) {
    for (const auto& name : ERROR_NAMES) {
        if (name.error == error) return &name;
    }
    return nullptr;
}

struct Attribute {
    int number, value;
};

constexpr Attribute ATTRIBUTES[] = {
    {1, MAX_THREADS},
    {2, 1024},         // of a block's x
    {3, 1024},         // y
    {4, 64},           // z
    {5, 2147483647},   // of a grid's x
    {6, 65535},        // y
    {7, 65535},        // z
    {8, DEFAULT_SHARED},
    {9, 64 << 10},     // constant memory
    {10, 32},          // threads of a warp
    {12, 64 << 10},    // registers of a block
    {13, 1000000},     // clock in kHz
    {15, 1},           // overlap
    {16, MULTIPROCESSORS},
    {19, 1},           // can map host memory
    {31, 1},           // concurrent kernels
    {36, 1000000},     // clock of the memory in kHz
    {37, 64},          // bits of its bus
    {38, 1 << 20},     // L2 cache
    {39, MAX_THREADS_PER_MULTIPROCESSOR},
    {40, 1},           // copy engines
    {41, 1},           // unified addressing
    {75, 9},           // compute capability
    {76, 0},
    {78, 1},           // stream priorities
    {81, SHARED_PER_MULTIPROCESSOR},
    {82, 64 << 10},    // registers of a multiprocessor
    {95, 1},           // cooperative launch
    {97, MAX_SHARED},
    {106, MAX_BLOCKS_PER_MULTIPROCESSOR},
    {111, RESERVED_SHARED},
    {115, 1},          // memory pools
};

}  // namespace driver

using namespace driver;

DRIVER cuGetErrorName(CUresult error, const char** name) {
    const ErrorName* found = find_name(error);
    *name = found ? found->name : nullptr;
    return found ? SUCCESS : INVALID_VALUE;
}

DRIVER cuGetErrorString(CUresult error, const char** text) {
    const ErrorName* found = find_name(error);
    *text = found ? found->text : nullptr;
    return found ? SUCCESS : INVALID_VALUE;
}

DRIVER cuInit(unsigned) {
    std::lock_guard lock(mutex);
    if (device_count() == 0) return NO_DEVICE;
    initialized = true;
    return SUCCESS;
}

DRIVER cuDriverGetVersion(int* version) {
    *version = setting("VLMNARRATE_EMULATED_DRIVER", 13000);
    return SUCCESS;
}

DRIVER cuDeviceGetCount(int* count) {
    *count = device_count();
    return initialized || *count == 0 ? SUCCESS : NOT_INITIALIZED;
}

DRIVER cuDeviceGet(CUdevice* device, int ordinal) {
    if (!initialized) return NOT_INITIALIZED;
    *device = ordinal;
    return has(ordinal) ? SUCCESS : INVALID_DEVICE;
}

DRIVER cuDeviceGetName(char* name, int size, CUdevice device) {
    if (!has(device)) return INVALID_DEVICE;
    snprintf(name, size, "Emulated GPU");
    return SUCCESS;
}

DRIVER cuDeviceGetUuid_v2(char* uuid, CUdevice device) {
    if (!has(device)) return INVALID_DEVICE;
    memcpy(uuid, "Emulated GPU   ", 15);
    uuid[15] = static_cast<char>('0' + device);
    return SUCCESS;
}

DRIVER cuDeviceGetUuid(char* uuid, CUdevice device) { return cuDeviceGetUuid_v2(uuid, device); }

DRIVER cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
    *bytes = total_memory();
    return has(device) ? SUCCESS : INVALID_DEVICE;
}

DRIVER cuDeviceGetAttribute(int* value, int number, CUdevice device) {
    *value = 0;
    for (const auto& attribute : ATTRIBUTES) {
        if (attribute.number == number) *value = attribute.value;
    }
    return has(device) ? SUCCESS : INVALID_DEVICE;
}

DRIVER cuDevicePrimaryCtxRetain(Context** context, CUdevice device) {
    std::lock_guard lock(mutex);
    if (!initialized) return NOT_INITIALIZED;
    if (!has(device)) return INVALID_DEVICE;
    primary[device].device = device;
    primary[device].users++;
    *context = &primary[device];
    return SUCCESS;
}

DRIVER cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    std::lock_guard lock(mutex);
    if (!has(device)) return INVALID_DEVICE;
    if (primary[device].users == 0) return INVALID_CONTEXT;
    primary[device].users--;
    return SUCCESS;
}

DRIVER cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
    if (!has(device)) return INVALID_DEVICE;
    *flags = 0;
    *active = primary[device].users > 0;
    return SUCCESS;
}

DRIVER cuDevicePrimaryCtxSetFlags_v2(CUdevice device, unsigned) { return has(device) ? SUCCESS : INVALID_DEVICE; }

DRIVER cuCtxSetCurrent(Context* context) {
    if (!initialized) return NOT_INITIALIZED;
    current = context;
    return SUCCESS;
}

DRIVER cuCtxGetCurrent(Context** context) {
    if (!initialized) return NOT_INITIALIZED;
    *context = current;
    return SUCCESS;
}

DRIVER cuCtxGetDevice(CUdevice* device) {
    ENTER;
    *device = current->device;
    return SUCCESS;
}

DRIVER cuCtxSetFlags(unsigned) {
    ENTER;
    return SUCCESS;
}

DRIVER cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    ENTER;
    *least = 0;
    *greatest = -5;
    return SUCCESS;
}

DRIVER cuCtxSynchronize() {
    ENTER;
    if (CUresult error = check_not_capturing()) return error;
    emulator::check_ends();
    return SUCCESS;
}

DRIVER cuMemGetInfo_v2(size_t* free, size_t* total) {
    ENTER;
    *total = total_memory();
    *free = *total - std::min(*total, emulator::allocated(current->device));
    return SUCCESS;
}

DRIVER cuProfilerStart() { return SUCCESS; }
DRIVER cuProfilerStop() { return SUCCESS; }
