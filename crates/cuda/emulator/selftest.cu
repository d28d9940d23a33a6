// Tests of the emulator: tools/cuda/emulate.sh --selftest.
#include <ptx.cuh>

#include "driver.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

struct MmaArgs {
    // 16x16, 8x16 and 16x8.
    const bf16 *a, *b;
    const f16 *a16, *b16;
    float *d, *d16;
};

template <class T>
void mma_once(const T* a, const T* b, float* d) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    auto pair = [](const T* at) { return at[0].bits | uint32_t(at[1].bits) << 16; };
    uint32_t fa[4], fb[2];
    float fd[4];
    for (int i = 0; i < 4; i++) fa[i] = pair(a + (g + i % 2 * 8) * 16 + i / 2 * 8 + 2 * t);
    for (int i = 0; i < 2; i++) fb[i] = pair(b + g * 16 + i * 8 + 2 * t);
    for (int i = 0; i < 4; i++) fd[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    mma<T>(fd, fa, fb);
    for (int i = 0; i < 4; i++) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fd[i];
}

KERNEL(mma_both, 32, MmaArgs, mma_once<bf16>(args.a, args.b, args.d); mma_once<f16>(args.a16, args.b16, args.d16))

struct WordsArgs {
    const unsigned* in;
    unsigned* out;
};

void matrices(const WordsArgs& args) {
    SHARED_MEMORY(shared);
    unsigned lane = threadIdx.x;
    // Rows in an order of their own.
    unsigned row = lane ^ 5;
    for (int i = 0; i < 4; i++) reinterpret_cast<unsigned*>(shared)[row * 4 + i] = args.in[lane * 4 + i];
    sync_warp();
    uint32_t plain[4], transposed[4];
    ldmatrix_x4(plain, shared + row * 16);
    ldmatrix_x4_trans(transposed, shared + row * 16);
    for (int i = 0; i < 4; i++) args.out[lane * 8 + i] = plain[i];
    for (int i = 0; i < 4; i++) args.out[lane * 8 + 4 + i] = transposed[i];
}
KERNEL(ldmatrix_both, 32, WordsArgs, matrices(args))

void exchanges(unsigned* out) {
    unsigned lane = threadIdx.x % 32;
    float sum = float(threadIdx.x);
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    unsigned next = shuffle(threadIdx.x, (lane + 1) % 32);
    bool one = any(lane == 7), none = any(false), each = all(true), most = all(lane != 7);
    out[threadIdx.x * 3] = unsigned(sum);
    out[threadIdx.x * 3 + 1] = next;
    out[threadIdx.x * 3 + 2] = one | none << 1 | each << 2 | most << 3;
}
KERNEL(shuffles, 64, WordsArgs, exchanges(args.out))

void copies(const WordsArgs& args) {
    SHARED_MEMORY(shared);
    auto* words = reinterpret_cast<volatile unsigned*>(shared) + threadIdx.x * 12;
    auto* to = shared + threadIdx.x * 48;
    unsigned* out = args.out + threadIdx.x * 9;
    cp_async16(to, args.in, true);
    cp_async_commit();
    cp_async16(to + 16, args.in + 4, true);
    cp_async_commit();
    cp_async16(to + 32, nullptr, false);
    cp_async_commit();
    for (int i = 0; i < 3; i++) out[i] = words[4 * i];
    cp_async_wait<1>();
    for (int i = 0; i < 3; i++) out[3 + i] = words[4 * i];
    cp_async_wait<0>();
    for (int i = 0; i < 3; i++) out[6 + i] = words[4 * i];
}
KERNEL(cp_async, 64, WordsArgs, copies(args))

void reverse(const WordsArgs& args) {
    SHARED_MEMORY(shared);
    auto* words = reinterpret_cast<unsigned*>(shared);
    for (int round = 0; round < 5; round++) {
        unsigned value = round == 0 ? args.in[threadIdx.x] : words[threadIdx.x];
        sync_block();
        words[blockDim.x - 1 - threadIdx.x] = value;
        sync_block();
    }
    args.out[threadIdx.x] = words[threadIdx.x];
}
KERNEL(reversed, 256, WordsArgs, reverse(args))

struct GridArgs {
    unsigned *arrived, *values;
    unsigned rounds;
};

void grid_barrier(unsigned* arrived, unsigned target) {
    sync_block();
    if (threadIdx.x == 0) {
        fence();
        atomic_add(arrived, 1);
        while (load_acquire(arrived) < target) pause();
    }
    sync_block();
}

void rotate(const GridArgs& args) {
    for (unsigned round = 0; round < args.rounds; round++) {
        unsigned value = args.values[(blockIdx.x + 1) % gridDim.x];
        grid_barrier(args.arrived, (2 * round + 1) * gridDim.x);
        if (threadIdx.x == 0) args.values[blockIdx.x] = value;
        grid_barrier(args.arrived, (2 * round + 2) * gridDim.x);
    }
}
KERNEL(rotated, 64, GridArgs, rotate(args))

struct FloatArgs {
    float* values;
    int count;
};

KERNEL(different_operations, 64, WordsArgs, if (threadIdx.x % 2) shuffle(1, 0); else sync_warp())
KERNEL(ends_early, 64, WordsArgs, if (threadIdx.x == 3) return; sync_block())
KERNEL(warp_ends_early, 64, WordsArgs, if (threadIdx.x < 32) return; sync_block())
KERNEL(reads_behind, 32, FloatArgs, args.values[0] = args.values[args.count + threadIdx.x])
KERNEL(reads_before, 32, FloatArgs, args.values[0] = args.values[-1 - int(threadIdx.x)])
KERNEL(writes_behind, 32, FloatArgs, if (threadIdx.x == 0) args.values[args.count] = 1)
KERNEL(shared_overflow, 32, FloatArgs, SHARED_MEMORY(shared); args.values[0] = shared[args.count])
KERNEL(uninitialized, 32, FloatArgs, SHARED_MEMORY(shared); args.values[0] = *reinterpret_cast<float*>(shared))
KERNEL(misaligned, 32, WordsArgs, SHARED_MEMORY(shared); uint32_t r[4]; ldmatrix_x4(r, shared + 8))
KERNEL(waits_for_ever, 32, WordsArgs, while (load_acquire(args.out) != 0) pause())
KERNEL(divides, 32, WordsArgs, args.out[0] = 1000 / args.in[0])

[[gnu::noinline]] unsigned recurse(volatile unsigned* depth) {
    volatile unsigned frame[64];
    frame[*depth % 64] = *depth;
    *depth = *depth + 1;
    return *depth == 0 ? 0 : recurse(depth) + frame[5];
}
KERNEL(recurses, 32, WordsArgs, args.out[0] = recurse(args.out))

void multiply_often(const FloatArgs& args) {
    float d[4][4] = {};
    uint32_t a[4] = {0, 0, 0, 0}, b[2] = {threadIdx.x, 0};
    for (int i = 0; i < args.count; i += 4) {
        for (int j = 0; j < 4; j++) mma<bf16>(d[j], a, b);
    }
    if (d[0][0] != 0) args.values[0] = d[0][0];
}
KERNEL(many_mma, 128, FloatArgs, multiply_often(args))

static int failures = 0;

static void check(bool good, const char* what) {
    if (good) return;
    printf("FAILED: %s\n", what);
    failures++;
}

static emulator::Kernel& find(const char* name) {
    for (auto* kernel = emulator::kernels; kernel != nullptr; kernel = kernel->next) {
        if (strcmp(kernel->name, name) == 0) return *kernel;
    }
    printf("no kernel %s\n", name);
    exit(1);
}

template <class Args>
static emulator::Code launch(const char* name, unsigned blocks, unsigned threads, unsigned shared, const Args& args,
                             bool cooperative = false) {
    return emulator::run(find(name), {blocks, 1, 1}, {threads, 1, 1}, shared, &args, cooperative);
}

template <class T>
static T* device(size_t count) {
    return reinterpret_cast<T*>(emulator::allocate(count * sizeof(T), true, 0));
}

template <class Args>
static void check_error(const char* name, emulator::Code expected, const char* text, const Args& args) {
    emulator::Code code = launch(name, 2, find(name).max_threads, 1024, args);
    check(code == expected && strstr(emulator::failure, text) != nullptr, name);
    printf("%s\n", emulator::failure);
}

template <class T>
static void test_rounding(const char* what) {
    for (unsigned bits = 0; bits < 0x7fff; bits++) {
        T low = {static_cast<unsigned short>(bits)}, high = {static_cast<unsigned short>(bits + 1)};
        float x = to_float(low), y = to_float(high);
        if (!std::isfinite(y)) {
            check(from_float<T>(x).bits == bits, what);
            break;
        }
        float middle = x + (y - x) / 2;
        const T& even = bits % 2 == 0 ? low : high;
        bool good = from_float<T>(x).bits == low.bits && from_float<T>(-x).bits == (low.bits | 0x8000) &&
                    from_float<T>(middle).bits == even.bits &&
                    from_float<T>(std::nextafterf(middle, 0)).bits == low.bits &&
                    from_float<T>(std::nextafterf(middle, INFINITY)).bits == high.bits;
        // The two are neighbours in float at the least.
        if (middle != x && middle != y) check(good, what);
    }
    check(std::isinf(to_float(from_float<T>(INFINITY))) && std::isinf(to_float(from_float<T>(-3.4e38f))), what);
    check(std::isnan(to_float(from_float<T>(NAN))) && std::isnan(to_float(from_float<T>(-NAN))), what);
}

static void test_formats() {
    test_rounding<bf16>("bf16");
    test_rounding<f16>("f16");
    check(to_float(f16{1}) == 0x1p-24f && to_float(f16{0x7bff}) == 65504 && to_float(f16{0xbc00}) == -1, "f16 values");
    check(from_float<f16>(65519.9f).bits == 0x7bff && from_float<f16>(65520.f).bits == 0x7c00, "largest f16");
    check(pack<bf16>(1, -2) == 0xc0003f80 && unpack<f16>(0xc0003c00).y == -2, "pack");
}

static void test_mma() {
    MmaArgs args = {device<bf16>(256), device<bf16>(128), device<f16>(256),
                    device<f16>(128), device<float>(128), device<float>(128)};
    float d[128];
    for (int i = 0; i < 256; i++) {
        float x = (i * 37 % 64 - 32) / 8.f;
        const_cast<bf16*>(args.a)[i] = from_float<bf16>(x);
        const_cast<f16*>(args.a16)[i] = from_float<f16>(x);
    }
    // Among them subnormal numbers of f16.
    for (int i = 0; i < 128; i++) {
        float x = (i * 53 % 64 - 30) / (i % 5 == 0 ? 0x1p23f : 16);
        const_cast<bf16*>(args.b)[i] = from_float<bf16>(x);
        const_cast<f16*>(args.b16)[i] = from_float<f16>(x);
        args.d[i] = args.d16[i] = d[i] = float(i);
    }
    check(launch("mma_both", 1, 32, 0, args) == emulator::SUCCESS, "mma runs");
    for (int row = 0; row < 16; row++) {
        for (int column = 0; column < 8; column++) {
            double sum = d[row * 8 + column], sum16 = sum;
            for (int k = 0; k < 16; k++) {
                sum += double(to_float(args.a[row * 16 + k])) * to_float(args.b[column * 16 + k]);
                sum16 += double(to_float(args.a16[row * 16 + k])) * to_float(args.b16[column * 16 + k]);
            }
            check(std::abs(args.d[row * 8 + column] - sum) < 1e-3, "mma of bf16");
            check(std::abs(args.d16[row * 8 + column] - sum16) < 1e-3, "mma of f16");
        }
    }
}

static void test_ldmatrix() {
    auto* in = device<unsigned>(128);
    auto* out = device<unsigned>(256);
    // Of each element: the matrix, its row and its column.
    auto element = [](int matrix, int row, int column) { return unsigned(matrix * 64 + row * 8 + column); };
    for (int lane = 0; lane < 32; lane++) {
        for (int i = 0; i < 4; i++) {
            in[lane * 4 + i] = element(lane / 8, lane % 8, 2 * i) | element(lane / 8, lane % 8, 2 * i + 1) << 16;
        }
    }
    check(launch("ldmatrix_both", 1, 32, 512, WordsArgs{in, out}) == emulator::SUCCESS, "ldmatrix runs");
    for (int lane = 0; lane < 32; lane++) {
        int g = lane / 4, t = lane % 4 * 2;
        for (int i = 0; i < 4; i++) {
            check(out[lane * 8 + i] == (element(i, g, t) | element(i, g, t + 1) << 16), "ldmatrix");
            check(out[lane * 8 + 4 + i] == (element(i, t, g) | element(i, t + 1, g) << 16), "ldmatrix trans");
        }
    }
}

static void test_exchanges() {
    auto* out = device<unsigned>(64 * 3);
    check(launch("shuffles", 1, 64, 0, WordsArgs{nullptr, out}) == emulator::SUCCESS, "shuffles run");
    for (unsigned i = 0; i < 64; i++) {
        check(out[i * 3] == (i < 32 ? 496 : 496 + 1024), "shuffle_xor");
        check(out[i * 3 + 1] == i / 32 * 32 + (i + 1) % 32, "shuffle");
        check(out[i * 3 + 2] == 5, "any and all");
    }
}

static void test_copies() {
    auto* in = device<unsigned>(8);
    auto* out = device<unsigned>(64 * 9);
    in[0] = 1;
    in[4] = 2;
    check(launch("cp_async", 1, 64, 64 * 48, WordsArgs{in, out}) == emulator::SUCCESS, "cp_async runs");
    const unsigned none = ~0u, expected[9] = {none, none, none, 1, 2, none, 1, 2, 0};
    for (int i = 0; i < 64; i++) check(memcmp(out + i * 9, expected, sizeof expected) == 0, "cp_async");
}

static void test_barriers() {
    auto* in = device<unsigned>(256);
    auto* out = device<unsigned>(256);
    for (int i = 0; i < 256; i++) in[i] = i;
    check(launch("reversed", 3, 256, 1024, WordsArgs{in, out}) == emulator::SUCCESS, "sync_block runs");
    for (unsigned i = 0; i < 256; i++) check(out[i] == 255 - i, "sync_block");

    constexpr unsigned BLOCKS = 24, ROUNDS = 7;
    auto* arrived = device<unsigned>(1);
    *arrived = 0;
    for (unsigned i = 0; i < BLOCKS; i++) in[i] = i;
    check(launch("rotated", BLOCKS, 64, 0, GridArgs{arrived, in, ROUNDS}, true) == emulator::SUCCESS, "barrier runs");
    for (unsigned i = 0; i < BLOCKS; i++) check(in[i] == (i + ROUNDS) % BLOCKS, "grid barrier");
}

// Threads 0 and 63 write what others read without a barrier.
void read_unsynchronized(float* values) {
    SHARED_MEMORY(shared);
    auto* words = reinterpret_cast<float*>(shared);
    if (threadIdx.x == 0) words[0] = 1;
    if (threadIdx.x == 63) words[1] = 1;
    values[threadIdx.x * 2] = words[0];
    values[threadIdx.x * 2 + 1] = words[1];
}
KERNEL(unsynchronized, 64, FloatArgs, read_unsynchronized(args.values))

static void test_order(const char* order) {
    auto* values = device<float>(128);
    check(launch("unsynchronized", 1, 64, 8, FloatArgs{values, 0}) == emulator::SUCCESS, "unsynchronized runs");
    bool forward = strcmp(order, "forward") == 0;
    check(values[64] == 1 || !forward, "from the first to the last");
    check(values[65] == 1 || forward, "from the last to the first");
    check(std::isnan(values[64 + forward]), "a missing barrier shows");
}

static void test_errors() {
    auto* words = device<unsigned>(64);
    auto* values = device<float>(1000);
    words[0] = 1;
    WordsArgs with_words = {words, words};
    emulator::timeout_seconds = 0.1;
    printf("Failures that must be:\n");
    check_error("different_operations", emulator::LAUNCH_FAILED, "divergence", with_words);
    check_error("ends_early", emulator::LAUNCH_FAILED, "divergence", with_words);
    check_error("warp_ends_early", emulator::LAUNCH_FAILED, "divergence", with_words);
    check_error("waits_for_ever", emulator::LAUNCH_FAILED, "deadlock", with_words);
    check_error("misaligned", emulator::MISALIGNED_ADDRESS, "ldmatrix", with_words);
    check_error("reads_behind", emulator::ILLEGAL_ADDRESS, "96 bytes after the end", FloatArgs{values, 1024});
    check_error("reads_before", emulator::ILLEGAL_ADDRESS, "bytes before", FloatArgs{device<float>(emulator::PAGE / 4), 0});
    check_error("reads_behind", emulator::ILLEGAL_ADDRESS, "nothing is allocated", FloatArgs{nullptr, 1 << 20});
    check_error("shared_overflow", emulator::ILLEGAL_ADDRESS, "at 1024 of 1024", FloatArgs{values, 1024});
    check_error("recurses", emulator::LAUNCH_FAILED, "stack overflow", with_words);
    words[0] = 0;
#ifdef __x86_64__
    check_error("divides", emulator::LAUNCH_FAILED, "division", with_words);
#endif
    check(launch("uninitialized", 1, 32, 1024, FloatArgs{values, 0}) == emulator::SUCCESS, "after errors all runs");
    check(std::isnan(values[0]), "fresh shared memory is NaN");
    check(std::isnan(values[1]), "fresh memory is NaN");
    check(launch("writes_behind", 1, 32, 0, FloatArgs{values, 1000}) == emulator::SUCCESS, "a write unnoticed");
    check(!emulator::check_ends(), "is noticed then");
    check(emulator::check_ends(), "and said once");
}

DRIVER cuInit(unsigned);
DRIVER cuDeviceGetCount(int*);
DRIVER cuDevicePrimaryCtxRetain(driver::Context**, CUdevice);
DRIVER cuCtxSetCurrent(driver::Context*);
DRIVER cuCtxSynchronize();
DRIVER cuMemGetInfo_v2(size_t*, size_t*);
DRIVER cuMemAlloc_v2(CUdeviceptr*, size_t);
DRIVER cuMemFree_v2(CUdeviceptr);
DRIVER cuMemcpyHtoDAsync_v2(CUdeviceptr, const void*, size_t, void*);
DRIVER cuMemcpyDtoHAsync_v2(void*, CUdeviceptr, size_t, void*);
DRIVER cuMemsetD32Async(CUdeviceptr, unsigned, size_t, void*);
DRIVER cuModuleLoadData(void**, const void*);
DRIVER cuModuleGetFunction(void**, void*, const char*);
DRIVER cuFuncSetAttribute(void*, int, int);
DRIVER cuStreamCreate(void**, unsigned);
DRIVER cuStreamSynchronize(void*);
DRIVER cuStreamBeginCapture_v2(void*, int);
DRIVER cuStreamEndCapture(void*, void**);
DRIVER cuGraphInstantiateWithFlags(void**, void*, unsigned long long);
DRIVER cuGraphLaunch(void*, void*);
DRIVER cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                      void**);
DRIVER cuLaunchCooperativeKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
                                 void**);

KERNEL(adds, 32, FloatArgs, atomic_add(args.values, float(args.count)))

static void test_driver() {
    setenv("VLMNARRATE_EMULATED_DEVICES", "0", 1);
    int count;
    check(cuInit(0) == driver::NO_DEVICE && cuDeviceGetCount(&count) == 0 && count == 0, "no device");
    unsetenv("VLMNARRATE_EMULATED_DEVICES");
    driver::Context* context;
    check(cuInit(0) == 0 && cuDevicePrimaryCtxRetain(&context, 0) == 0, "init");
    check(cuCtxSynchronize() == driver::INVALID_CONTEXT, "no context");
    check(cuCtxSetCurrent(context) == 0 && cuCtxSynchronize() == 0, "context");

    size_t free, total;
    cuMemGetInfo_v2(&free, &total);
    check(total == 4ull << 30 && free < total, "memory");
    setenv("VLMNARRATE_EMULATED_MEMORY", std::to_string(total - free + 1000).c_str(), 1);
    CUdeviceptr memory;
    check(cuMemAlloc_v2(&memory, 1001) == driver::OUT_OF_MEMORY, "out of memory");
    check(cuMemAlloc_v2(&memory, 4) == 0, "alloc");

    void *module, *adds, *stream, *graph, *executable;
    setenv("VLMNARRATE_EMULATED_LOAD_ERROR", "209", 1);
    check(cuModuleLoadData(&module, "") == 209, "load error");
    unsetenv("VLMNARRATE_EMULATED_LOAD_ERROR");
    check(cuModuleLoadData(&module, "") == 0, "load");
    check(cuModuleGetFunction(&adds, module, "missing") == driver::NOT_FOUND, "missing function");
    check(cuModuleGetFunction(&adds, module, "adds") == 0, "function");
    check(cuStreamCreate(&stream, 1) == 0, "stream");

    float value = 1;
    FloatArgs args = {reinterpret_cast<float*>(memory), 2};
    void* params[] = {&args};
    check(cuStreamBeginCapture_v2(stream, 0) == 0, "begin capture");
    check(cuMemcpyHtoDAsync_v2(memory, &value, 4, stream) == 0, "captured copy");
    check(cuLaunchKernel(adds, 1, 1, 1, 32, 1, 1, 0, stream, params, nullptr) == 0, "captured launch");
    args.count = 1000;
    check(cuStreamEndCapture(stream, &graph) == 0 && cuGraphInstantiateWithFlags(&executable, graph, 0) == 0, "graph");
    value = 5;
    float result;
    for (int i = 0; i < 2; i++) {
        check(cuGraphLaunch(executable, stream) == 0, "graph launch");
        check(cuMemcpyDtoHAsync_v2(&result, memory, 4, stream) == 0 && result == 5 + 64, "graph's result");
    }
    check(cuStreamBeginCapture_v2(stream, 0) == 0 && cuCtxSynchronize() == driver::CAPTURE_UNSUPPORTED &&
              cuStreamEndCapture(stream, &graph) == driver::CAPTURE_INVALIDATED,
          "an invalid capture");

    check(cuMemcpyDtoHAsync_v2(&result, memory, 8, stream) == driver::INVALID_VALUE, "a copy of too much");
    check(cuLaunchKernel(adds, 1, 1, 1, 64, 1, 1, 0, stream, params, nullptr) == driver::OUT_OF_RESOURCES, "threads");
    check(cuLaunchKernel(adds, 1, 1, 1, 32, 1, 1, 65536, stream, params, nullptr) == driver::INVALID_VALUE, "shared");
    check(cuFuncSetAttribute(adds, 8, 65536) == 0, "more shared memory");
    check(cuLaunchKernel(adds, 1, 1, 1, 32, 1, 1, 65536, stream, params, nullptr) == 0, "is there");
    check(cuLaunchCooperativeKernel(adds, 7, 1, 1, 32, 1, 1, 65536, stream, params) ==
              driver::COOPERATIVE_LAUNCH_TOO_LARGE,
          "too many blocks");
    check(cuLaunchCooperativeKernel(adds, 6, 1, 1, 32, 1, 1, 65536, stream, params) == 0, "not too many");

    setenv("VLMNARRATE_EMULATED_FAIL_LAUNCH", "2", 1);
    check(cuLaunchKernel(adds, 1, 1, 1, 32, 1, 1, 0, stream, params, nullptr) == 0, "first launch");
    check(cuLaunchKernel(adds, 1, 1, 1, 32, 1, 1, 0, stream, params, nullptr) == driver::ILLEGAL_ADDRESS, "second");
    check(cuStreamSynchronize(stream) == driver::ILLEGAL_ADDRESS && cuMemFree_v2(memory) == driver::ILLEGAL_ADDRESS,
          "poisoned");
}

static void measure() {
    constexpr int COUNT = 20000;
    auto start = std::chrono::steady_clock::now();
    launch("many_mma", 2, 128, 0, FloatArgs{nullptr, COUNT});
    double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    printf("mma: %.1f GFLOP/s, %.0f ns each\n", 2 * 4 * COUNT * 4096 / seconds / 1e9, seconds * 1e9 / (2 * 4 * COUNT));
}

int main() {
    test_formats();
    for (const char* order : {"forward", "reversed"}) {
        setenv("VLMNARRATE_EMULATED_ORDER", order, 1);
        test_mma();
        test_ldmatrix();
        test_exchanges();
        test_copies();
        test_barriers();
        test_order(order);
    }
    unsetenv("VLMNARRATE_EMULATED_ORDER");
    test_errors();
    test_driver();
    measure();
    printf(failures == 0 ? "All is well\n" : "%d checks failed\n", failures);
    return failures != 0;
}
