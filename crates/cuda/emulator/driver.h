// Shared parts of the driver. All work is done before a function returns, so streams hold nothing but captured work.
#pragma once

#include "machine.h"
#include "memory.h"

#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;

#define DRIVER extern "C" __attribute__((visibility("default"))) CUresult

namespace driver {

enum Error : CUresult {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700,
    OUT_OF_RESOURCES = 701,
    COOPERATIVE_LAUNCH_TOO_LARGE = 720,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_ISOLATION = 905,
    CAPTURED_EVENT = 907,
    CAPTURE_WRONG_THREAD = 908,
};

constexpr int MULTIPROCESSORS = 2;
constexpr int MAX_THREADS = 1024;
constexpr int MAX_THREADS_PER_MULTIPROCESSOR = 2048;
constexpr int MAX_BLOCKS_PER_MULTIPROCESSOR = 32;
constexpr int SHARED_PER_MULTIPROCESSOR = 228 << 10;
constexpr int RESERVED_SHARED = 1 << 10;
constexpr int MAX_SHARED = 227 << 10;
constexpr int DEFAULT_SHARED = 48 << 10;

using Action = std::function<CUresult()>;

struct Graph {
    std::vector<Action> actions;
};

struct Stream {
    // Null unless the stream is capturing.
    Graph* graph = nullptr;
    int mode = 0;
    std::thread::id thread;
    bool invalid = false;
};

struct Event {
    std::chrono::steady_clock::time_point time;
    bool recorded = false;
    // Not null if recorded during a capture.
    Graph* graph = nullptr;
};

struct Context {
    CUdevice device;
    int users = 0;
};

inline std::recursive_mutex mutex;
inline bool initialized = false;
inline thread_local Context* current = nullptr;
// A kernel's error. All later calls return it.
inline CUresult sticky_error = SUCCESS;

// An integer from the environment, or the default.
long long setting(const char* name, long long otherwise);

// Locks the driver, and returns an error if it can't be called now.
#define ENTER                                                          \
    std::lock_guard<std::recursive_mutex> lock(driver::mutex);         \
    if (CUresult error = driver::check_context(); error != driver::SUCCESS) return error

CUresult check_context();

// Prints why a call fails to stderr and returns the error.
[[gnu::format(printf, 2, 3)]] CUresult report_error(CUresult error, const char* format, ...);

// Null for a handle that doesn't exist.
Stream* find_stream(void* handle);
// Runs an action now, or captures it.
CUresult enqueue(void* stream, Action action);
// An error if a stream is capturing.
CUresult check_not_capturing();

// Blocks of a kernel that fit on a multiprocessor at once.
int occupancy(const emulator::Kernel& kernel, int threads, size_t shared);

}  // namespace driver
