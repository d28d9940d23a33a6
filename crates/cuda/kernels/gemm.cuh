// Products of many rows: y = x · wᵀ of row-major x `[m, k]` and w `[n, k]`, with an epilogue.
//
// An element comes out the same, to the bit, however many rows there are: the order of summation over k is fixed.

#pragma once

#include "pointwise.cuh"

struct Gemm {
    const void* x;
    const void* w;
    const float* bias;
    void* out;
    // AddPositions: the embedding table, and the position of each of an image's patches.
    const float* position_embedding;
    const int* position_ids;
    int patches;
    int m, n, k;
    // RopeStoreKv: rows of prompts, and cosine and sine of each row's position, `[m, head_size / 2]`.
    const PromptRow* rows;
    const Sequence* sequences;
    const float2* rotations;
    int layer, heads, kv_heads, head_size;
};
static_assert(sizeof(Gemm) == 104);

enum class Epilogue {
    Store,        // out[m, n] in the weights' type
    Gelu,         // gelu to out[m, n] in the weights' type
    SwiGlu,       // out[m, n / 2] in the weights' type: columns are pairs of gate and up
    AddF32,       // added to out[m, n], f32
    StoreF32,     // out[m, n], f32
    AddPositions, // out[m, n], f32, with the position embedding added
    RopeStoreKv,  // RoPE of queries to out[m, n] and of keys to the KV caches; values to the KV caches
};

// Two columns of queries, keys or values. The weights' rows are ordered so that the pair that RoPE rotates is adjacent.
template <class T> __device__ __forceinline__ void rope_store_kv(const Gemm& a, int row, int col, float y0, float y1) {
    // A power of two.
    const int size = a.head_size, head = col >> log_2(size), at = col & (size - 1);
    const bool is_value = head >= a.heads + a.kv_heads;
    if (!is_value) {
        const float2 pair = rotate(y0, y1, a.rotations[row * (size / 2) + at / 2]);
        y0 = pair.x;
        y1 = pair.y;
    }
    if (head < a.heads) {
        store_pair((T*)a.out + size_t(row) * a.n + col, y0, y1);
        return;
    }
    const PromptRow& r = a.rows[row];
    const Sequence& s = a.sequences[r.sequence];
    const int kv_head = head - a.heads - (is_value ? a.kv_heads : 0);
    T* cache = (T*)s.kv_cache + kv_offset(s, a.layer, is_value, a.kv_heads, kv_head, size);
    store_pair(cache + size_t(r.position) * size + at, y0, y1);
}

// The epilogue of two adjacent columns.
template <class T, Epilogue EPILOGUE>
__device__ __forceinline__ void run_epilogue(const Gemm& a, int row, int col, float y0, float y1) {
    if (row >= a.m || col >= a.n)
        return;
    if (a.bias) {
        y0 += a.bias[col];
        y1 += a.bias[col + 1];
    }
    const size_t at = size_t(row) * a.n + col;
    if constexpr (EPILOGUE == Epilogue::RopeStoreKv) {
        rope_store_kv<T>(a, row, col, y0, y1);
    } else if constexpr (EPILOGUE == Epilogue::Store) {
        store_pair((T*)a.out + at, y0, y1);
    } else if constexpr (EPILOGUE == Epilogue::Gelu) {
        store_pair((T*)a.out + at, gelu_tanh(y0), gelu_tanh(y1));
    } else if constexpr (EPILOGUE == Epilogue::SwiGlu) {
        ((T*)a.out)[at / 2] = from_float<T>(silu(y0) * y1);
    } else {
        float2* out = (float2*)((float*)a.out + at);
        if constexpr (EPILOGUE == Epilogue::AddF32) {
            const float2 before = *out;
            y0 += before.x;
            y1 += before.y;
        } else if constexpr (EPILOGUE == Epilogue::AddPositions) {
            const float* position = a.position_embedding + size_t(a.position_ids[row % a.patches]) * a.n + col;
            y0 += position[0];
            y1 += position[1];
        }
        *out = make_float2(y0, y1);
    }
}

constexpr int GEMM_K = 64;
// Rows are padded by 16 bytes: eight of them touch all banks.
constexpr int GEMM_STRIDE = GEMM_K + 8;

// A thread's part in loading a tile of ROWS rows: sources and destination of its vectors. Rows beyond the last repeat
// the last, and their results are dropped.
template <int ROWS, int THREADS, class T> struct GemmLoad {
    static constexpr int CHUNKS = GEMM_K / 8, EACH = ROWS * CHUNKS / THREADS, APART = THREADS / CHUNKS;
    static_assert(ROWS * CHUNKS % THREADS == 0);
    const T* from[EACH];
    int to, col;

    __device__ __forceinline__ GemmLoad(const T* x, int first, int rows, int k) {
        col = threadIdx.x % CHUNKS * 8;
        const int row = threadIdx.x / CHUNKS;
        to = row * GEMM_STRIDE + col;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            from[i] = x + size_t(min(first + row + i * APART, rows - 1)) * k + col;
    }

    __device__ __forceinline__ void operator()(T* tile, int at, int k) {
        const bool whole = at + GEMM_K <= k;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            T* place = tile + to + i * APART * GEMM_STRIDE;
            if (whole)
                cp_async16(place, from[i] + at);
            else
                cp_async16(place, at + col < k ? from[i] + at : from[i] - col, at + col < k);
        }
    }
};

// Tiles of BM × BN, by WARPS_M × WARPS_N warps.
template <class T, int BM, int BN, int WARPS_M, int WARPS_N, int STAGES, Epilogue EPILOGUE>
__device__ __forceinline__ void gemm(const Gemm& a) {
    constexpr int THREADS = WARPS_M * WARPS_N * WARP;
    constexpr int MT = BM / WARPS_M / 16, NT = BN / WARPS_N / 8;
    constexpr int STAGE = (BM + BN) * GEMM_STRIDE;
    SHARED_MEMORY(memory);
    T* stages = (T*)memory;
    const T *x = (const T*)a.x, *w = (const T*)a.w;
    const int m0 = blockIdx.x * BM, n0 = blockIdx.y * BN;
    const int lane = lane_id(), warp_m = warp_id() / WARPS_N, warp_n = warp_id() % WARPS_N;

    const int steps = ceil_div(a.k, GEMM_K);
    GemmLoad<BM, THREADS, T> load_x(x, m0, a.m, a.k);
    GemmLoad<BN, THREADS, T> load_w(w, n0, a.n, a.k);
    auto load = [&](int step) {
        if (step < steps) {
            T* stage = stages + step % STAGES * STAGE;
            load_x(stage, step * GEMM_K, a.k);
            load_w(stage + BM * GEMM_STRIDE, step * GEMM_K, a.k);
        }
        cp_async_commit();
    };
    for (int step = 0; step < STAGES - 1; step++)
        load(step);

    float sums[MT][NT][4] = {};
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        sync_block();
        load(step + STAGES - 1);
        const T* xs = stages + step % STAGES * STAGE;
        const T* ws = xs + BM * GEMM_STRIDE;
#pragma unroll
        for (int k = 0; k < GEMM_K; k += 16) {
            uint32_t xf[MT][4], wf[NT / 2][4];
#pragma unroll
            for (int i = 0; i < MT; i++) {
                const int row = (warp_m * MT + i) * 16 + lane % 16;
                ldmatrix_x4(xf[i], xs + row * GEMM_STRIDE + k + lane / 16 * 8);
            }
#pragma unroll
            for (int j = 0; j < NT / 2; j++) {
                const int row = (warp_n * NT + 2 * j + lane / 16) * 8 + lane % 8;
                ldmatrix_x4(wf[j], ws + row * GEMM_STRIDE + k + lane / 8 % 2 * 8);
            }
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int j = 0; j < NT; j++) {
                    const uint32_t b[2] = {wf[j / 2][j % 2 * 2], wf[j / 2][j % 2 * 2 + 1]};
                    mma<T>(sums[i][j], xf[i], b);
                }
        }
    }
    cp_async_wait<0>();
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++) {
            const int row = m0 + (warp_m * MT + i) * 16 + lane / 4, col = n0 + (warp_n * NT + j) * 8 + lane % 4 * 2;
            run_epilogue<T, EPILOGUE>(a, row, col, sums[i][j][0], sums[i][j][1]);
            run_epilogue<T, EPILOGUE>(a, row + 8, col, sums[i][j][2], sums[i][j][3]);
        }
}

// In f32, without tensor cores: for checking, not for speed. Tiles of 64 × 64 by 256 threads.
template <Epilogue EPILOGUE> __device__ __forceinline__ void gemm_f32(const Gemm& a) {
    constexpr int SIDE = 64, K = 16;
    SHARED_MEMORY(memory);
    float(*xs)[K + 1] = (float(*)[K + 1])memory;
    float(*ws)[K + 1] = xs + SIDE;
    const float *x = (const float*)a.x, *w = (const float*)a.w;
    const int m0 = blockIdx.x * SIDE, n0 = blockIdx.y * SIDE;
    const int tx = threadIdx.x % 16 * 4, ty = threadIdx.x / 16 * 4;
    float sums[4][4] = {};
    for (int at = 0; at < a.k; at += K) {
        for (int i = threadIdx.x; i < SIDE * K; i += 256) {
            const int row = i / K, col = i % K;
            const bool inside = at + col < a.k;
            xs[row][col] = inside && m0 + row < a.m ? x[size_t(m0 + row) * a.k + at + col] : 0.0f;
            ws[row][col] = inside && n0 + row < a.n ? w[size_t(n0 + row) * a.k + at + col] : 0.0f;
        }
        sync_block();
        for (int k = 0; k < K; k++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    sums[i][j] = fmaf(xs[ty + i][k], ws[tx + j][k], sums[i][j]);
        sync_block();
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j += 2)
            run_epilogue<float, EPILOGUE>(a, m0 + ty + i, n0 + tx + j, sums[i][j], sums[i][j + 1]);
}
