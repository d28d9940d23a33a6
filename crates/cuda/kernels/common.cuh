// Structs that the host fills, also declared in `src/arguments.rs`, and small helpers.

#pragma once

constexpr int WARP = 32;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ __forceinline__ int lane_id() { return threadIdx.x % WARP; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / WARP; }

// Loads what another block wrote during this launch, past the L1 cache.
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

// A sequence of tokens. `kv_cache` is `[layers, 2, kv_heads, capacity, head_size]`.
struct Sequence {
    void* kv_cache;
    // Of its images, `[tokens, hidden]`.
    const float* image_features;
    int capacity;
    // Rows of the prompt in this prefill, and tokens that are in the cache before them.
    int first_row, rows, past;
    // The last token of the prompt, its position, and how many tokens to generate at most.
    int token, position, max_tokens;
    // Draft tokens, to be verified.
    int draft_len;
    const int* draft_tokens;
    // In mapped memory of the host: whether to stop; how many tokens were generated, and the tokens.
    const int* cancelled;
    int* generated_len;
    int* generated;
};
static_assert(sizeof(Sequence) == 80);

// A token of a prompt, or, below zero, a row of the image features: −1 is the first.
struct PromptRow {
    int token, sequence, position;
};
static_assert(sizeof(PromptRow) == 12);

// Where a head's keys (`which` is 0) or values (1) start in the cache.
__device__ __forceinline__ size_t kv_offset(const Sequence& s, int layer, int which, int kv_heads, int head,
                                              int size) {
    return ((size_t(layer) * 2 + which) * kv_heads + head) * s.capacity * size;
}
