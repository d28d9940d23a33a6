// Structs that the host fills (their twins are in `arguments.rs`), and small helpers.

#pragma once

constexpr int WARP = 32;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ __forceinline__ int lane_id() { return threadIdx.x % WARP; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / WARP; }

// What another block wrote during this launch: not from this one's L1, which would not know.
template <class V> __device__ __forceinline__ V load_fresh(const V* x) {
#ifdef __CUDACC__
    return __ldcg(x);
#else
    return *x;
#endif
}

__device__ __forceinline__ float warp_sum(float x) {
    for (int mask = 16; mask > 0; mask /= 2)
        x += shuffle_xor(x, mask);
    return x;
}

__device__ __forceinline__ float gelu_tanh(float x) {
    // (1 + tanh y) / 2 is 1 / (1 + exp(−2 y)).
    const float twice = 2.0f * 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return x / (1.0f + expf(-twice));
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

template <class T> __device__ __forceinline__ void store_pair(T* to, float a, float b) {
    *(uint32_t*)to = pack<T>(a, b);
}
template <> __device__ __forceinline__ void store_pair<float>(float* to, float a, float b) {
    *(float2*)to = make_float2(a, b);
}

// A caption that is being made. `cache` holds keys and values, `[layers, 2, kv_heads, capacity, head_size]`.
struct Sequence {
    void* cache;
    // Of its pictures, `[tokens, hidden]`.
    const float* features;
    int capacity;
    // Rows of the prompt that are run, and tokens that the cache holds before them.
    int first_row, rows, past;
    // Token to go on from, behind `position` others; most tokens to make of it.
    int token, position, most;
    // Tokens that may come next, as the last caption had them.
    int guesses;
    const int* guess;
    // In memory of the host: whether to end; how many tokens there are, and they.
    const int* cancelled;
    int* count;
    int* said;
};
static_assert(sizeof(Sequence) == 80);

// A token of a prompt, or, below zero, a row of the features: −1 is the first.
struct Row {
    int token, sequence, position;
};
static_assert(sizeof(Row) == 12);

__device__ __forceinline__ size_t cache_place(const Sequence& s, int layer, int which, int kv_heads, int head,
                                              int size) {
    return ((size_t(layer) * 2 + which) * kv_heads + head) * s.capacity * size;
}
