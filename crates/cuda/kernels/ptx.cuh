// Intrinsics: number types, tensor cores, asynchronous copies, and words that threads exchange. `emulator/ptx.cuh`
// defines the same for the CPU.

#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

struct bf16 {
    unsigned short bits;
};

struct f16 {
    unsigned short bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T> __device__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <> __device__ __forceinline__ f16 from_float<f16>(float x) {
    return {__half_as_ushort(__float2half_rn(x))};
}

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }

// Two adjacent values, the first in the low half.
template <class T> __device__ __forceinline__ uint32_t pack(float low, float high) {
    return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

template <class T> __device__ __forceinline__ float2 unpack(uint32_t x) {
    return make_float2(to_float(T{(unsigned short)(x & 0xffff)}), to_float(T{(unsigned short)(x >> 16)}));
}

// d += a · b of a warp: a is 16 × 16 in rows, b 16 × 8 in columns.
template <class T> __device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <> __device__ __forceinline__ void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <> __device__ __forceinline__ void mma<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 2^x by the special function unit, or 0 where the result is subnormal. One instruction instead of exp2f's five.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Logarithm of a power of two.
__device__ __forceinline__ int log_2(int x) { return 31 - __clz(x); }

__device__ __forceinline__ unsigned shared_address(const void* shared) {
    return unsigned(__cvta_generic_to_shared(shared));
}

// Four 8 × 8 matrices; lanes 0 to 7 name the rows of the first, and so on.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared))
                 : "memory");
}

__device__ __forceinline__ void cp_async16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// 16 bytes, or zeros if not valid. Takes several times the instructions.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N groups are under way.
template <int N> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

template <class V> __device__ __forceinline__ V shuffle_xor(V x, int mask) {
    return __shfl_xor_sync(0xffffffff, x, mask);
}
template <class V> __device__ __forceinline__ V shuffle(V x, int lane) { return __shfl_sync(0xffffffff, x, lane); }

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// Words that blocks exchange, past the L1 caches. A word is never torn.
__device__ __forceinline__ void store_relaxed(uint64_t* to, uint64_t value) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}

__device__ __forceinline__ uint64_t load_relaxed(const uint64_t* from) {
    uint64_t value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
    return value;
}

// Two words in 16 bytes. Neither is torn, but one may arrive before the other.
struct alignas(16) TwoWords {
    uint64_t first, second;
};

__device__ __forceinline__ void store_relaxed(uint64_t* to, TwoWords x) {
    asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(x.first), "l"(x.second) : "memory");
}

__device__ __forceinline__ TwoWords load_relaxed_two(const uint64_t* from) {
    TwoWords x;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(x.first), "=l"(x.second)
                 : "l"(from)
                 : "memory");
    return x;
}

// Prefetches into the L2 cache.
__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

__device__ __forceinline__ void fence() { __threadfence(); }
__device__ __forceinline__ void fence_system() { __threadfence_system(); }
// Between two polls of a word. The emulator switches threads here.
__device__ __forceinline__ void pause() {}

__device__ __forceinline__ int load_volatile(const int* x) { return *(const volatile int*)x; }
__device__ __forceinline__ void store_volatile(int* x, int value) { *(volatile int*)x = value; }

#define SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]

// Every kernel takes one struct by value.
#define KERNEL(name, threads, Args, body)                                                                              \
    extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Args args) { body; }
