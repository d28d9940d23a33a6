// Intrinsics for the CPU, with the names of `crates/cuda/kernels/ptx.cuh`.
#pragma once

#include "formats.h"
#include "machine.h"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <unistd.h>

#define __device__
#define __host__
#define __global__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define threadIdx (emulator::self->index)
#define blockIdx (emulator::self->warp->block->index)
#define blockDim (emulator::launch.block)
#define gridDim (emulator::launch.grid)

// Declares and registers an emulated kernel.
#define KERNEL(name, threads, Args, ...)                                                             \
    static void kernel_##name([[maybe_unused]] const Args& args) { __VA_ARGS__; }                    \
    static emulator::Kernel listed_##name(#name, threads, sizeof(Args), [](const void* args) {       \
        kernel_##name(*static_cast<const Args*>(args));                                              \
    });

#define SHARED_MEMORY(name) unsigned char* const name = emulator::self->warp->block->shared

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
inline unsigned max(int a, unsigned b) { return max(unsigned(a), b); }
inline unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
inline unsigned max(unsigned a, int b) { return max(a, unsigned(b)); }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline unsigned long min(unsigned long a, unsigned long b) { return a < b ? a : b; }
inline unsigned long max(unsigned long a, unsigned long b) { return a > b ? a : b; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline int log_2(int x) { return 31 - __builtin_clz(x); }
inline float exp2_fast(float x) { return exp2f(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }

template <class T>
inline uint32_t pack(float low, float high) {
    return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

template <class T>
inline float2 unpack(uint32_t pair) {
    return {to_float(T{static_cast<unsigned short>(pair)}), to_float(T{static_cast<unsigned short>(pair >> 16)})};
}

// The caller's source location, as a last parameter.
#define LINE unsigned line = __builtin_LINE(), const char* file = __builtin_FILE()
#define SITE(operation) (emulator::Site{emulator::Operation::operation, line, file})

__forceinline__ void sync_warp(LINE) {
    if (emulator::arrive(SITE(sync_warp))) emulator::release(*emulator::self->warp);
}

__forceinline__ void sync_block(LINE) {
    if (emulator::arrive(SITE(sync_block))) emulator::finish_barrier();
}

template <class T>
__forceinline__ T shuffle(T value, int lane, LINE) {
    return std::bit_cast<T>(emulator::exchange(std::bit_cast<uint32_t>(value), SITE(shuffle))[lane & 31]);
}

template <class T>
__forceinline__ T shuffle_xor(T value, int mask, LINE) {
    return shuffle(value, emulator::self->number ^ mask, line, file);
}

__forceinline__ bool any(bool vote, LINE) {
    const uint32_t* votes = emulator::exchange(vote, SITE(vote));
    uint32_t result = 0;
    for (int lane = 0; lane < 32; lane++) result |= votes[lane];
    return result != 0;
}

__forceinline__ bool all(bool vote, LINE) {
    const uint32_t* votes = emulator::exchange(vote, SITE(vote));
    uint32_t result = 1;
    for (int lane = 0; lane < 32; lane++) result &= votes[lane];
    return result != 0;
}

template <class T>
__forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], LINE) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
    unsigned lane = emulator::self->number;
    unsigned column = lane / 4, row = lane % 4 * 2;
    emulator::Warp& warp = *emulator::self->warp;
    for (int part = 0; part < 4; part++) warp.a[part][lane] = a[part];
    for (int part = 0; part < 2; part++) {
        warp.b[part * 8 + row][column] = static_cast<uint16_t>(b[part]);
        warp.b[part * 8 + row + 1][column] = static_cast<uint16_t>(b[part] >> 16);
    }
    warp.d[lane] = d;
    if (emulator::arrive(SITE(mma))) {
        if (std::is_same_v<T, bf16>) {
            emulator::multiply_bf16(warp);
        } else {
            emulator::multiply_f16(warp);
        }
        emulator::release(warp);
    }
}

__forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared, LINE) {
    emulator::pass_row(r, shared);
    if (emulator::arrive(SITE(ldmatrix))) {
        emulator::load_matrices(*emulator::self->warp);
        emulator::release(*emulator::self->warp);
    }
}

__forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared, LINE) {
    emulator::pass_row(r, shared);
    if (emulator::arrive(SITE(ldmatrix))) {
        emulator::load_transposed(*emulator::self->warp);
        emulator::release(*emulator::self->warp);
    }
}

// Copies as late as possible, so that a missing wait shows.
inline void cp_async16(void* shared, const void* global, bool valid) {
    emulator::check_shared(shared, "cp_async16");
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
        emulator::fail(emulator::MISALIGNED_ADDRESS, "cp_async16 from %p, not a multiple of 16", global);
    }
    emulator::Copies& copies = *emulator::self->copies;
    if (copies.count == emulator::Copies::MAX_COPIES) {
        emulator::fail(emulator::LAUNCH_FAILED, "cp_async16: %u are under way", copies.count);
    }
    copies.list[copies.count++] = {static_cast<unsigned char*>(shared),
                                   valid ? static_cast<const unsigned char*>(global) : nullptr};
}

inline void cp_async16(void* shared, const void* global) { cp_async16(shared, global, true); }

inline void cp_async_commit() {
    emulator::Copies& copies = *emulator::self->copies;
    if (copies.groups == emulator::Copies::MAX_GROUPS) {
        emulator::fail(emulator::LAUNCH_FAILED, "cp_async_commit: %u groups are under way", copies.groups);
    }
    copies.group_ends[copies.groups++] = copies.count;
}

template <int N>
inline void cp_async_wait() {
    emulator::Copies& copies = *emulator::self->copies;
    if (copies.groups <= N) return;
    unsigned finished = copies.groups - N;
    unsigned end = copies.group_ends[finished - 1];
    for (unsigned i = 0; i < end; i++) {
        const auto& copy = copies.list[i];
        if (copy.from != nullptr) {
            memcpy(copy.to, copy.from, 16);
        } else {
            memset(copy.to, 0, 16);
        }
    }
    for (int group = 0; group < N; group++) copies.group_ends[group] = copies.group_ends[finished + group] - end;
    memmove(copies.list, copies.list + end, (copies.count - end) * sizeof *copies.list);
    copies.count -= end;
    copies.groups = N;
}

inline unsigned atomic_add(unsigned* address, unsigned value) {
    unsigned before = *address;
    *address = before + value;
    return before;
}
inline float atomic_add(float* address, float value) {
    float before = *address;
    *address = before + value;
    return before;
}

inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline void store_relaxed(uint64_t* address, uint64_t value) { __atomic_store_n(address, value, __ATOMIC_RELAXED); }
inline uint64_t load_relaxed(const uint64_t* address) { return __atomic_load_n(address, __ATOMIC_RELAXED); }
struct alignas(16) TwoWords {
    uint64_t first, second;
};
inline void check_two(const void* address) {
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
        emulator::fail(emulator::MISALIGNED_ADDRESS, "two words at %p, not a multiple of 16", address);
    }
}
inline void store_relaxed(uint64_t* address, TwoWords x) {
    check_two(address);
    store_relaxed(address, x.first);
    store_relaxed(address + 1, x.second);
}
inline TwoWords load_relaxed_two(const uint64_t* address) {
    check_two(address);
    // The second first, so that code fails that takes one for a sign of the other.
    uint64_t second = load_relaxed(address + 1);
    return {load_relaxed(address), second};
}
inline unsigned load_acquire(const unsigned* address) { return __atomic_load_n(address, __ATOMIC_ACQUIRE); }
inline int load_volatile(const int* address) { return *static_cast<const volatile int*>(address); }
inline void store_volatile(int* address, int value) { *static_cast<volatile int*>(address) = value; }
inline void prefetch(const void* address) { static_cast<void>(*static_cast<const volatile char*>(address)); }
inline void fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void fence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// A macro, as the C library has another function of that name.
#define pause() emulator::pause_lane()

#undef LINE
#undef SITE
