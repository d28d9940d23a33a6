// Operations on rows between products. Sums are f32, and so are the hidden states.

#pragma once

#include "common.cuh"

// Images `[images, side, side, 3]` in bytes to rows of patches `[images · grid², k]`: channel by channel, and zeros up
// to k.
struct Patchify {
    const unsigned char* rgb;
    // The input value of each byte of each channel, `[3, 256]`.
    const float* pixel_table;
    void* out;
    int side, patch_size, grid, k, rows;
};
static_assert(sizeof(Patchify) == 48);

template <class T> __device__ __forceinline__ void patchify(const Patchify& a) {
    const int area = a.patch_size * a.patch_size;
    for (int row = blockIdx.x; row < a.rows; row += gridDim.x) {
        const int image = row / (a.grid * a.grid), patch = row % (a.grid * a.grid);
        const int y0 = patch / a.grid * a.patch_size, x0 = patch % a.grid * a.patch_size;
        const unsigned char* rgb = a.rgb + size_t(image) * a.side * a.side * 3;
        for (int i = threadIdx.x; i < a.k; i += blockDim.x) {
            float value = 0.0f;
            if (i < 3 * area) {
                const int channel = i / area, y = y0 + i % area / a.patch_size, x = x0 + i % a.patch_size;
                value = a.pixel_table[channel * 256 + rgb[(size_t(y) * a.side + x) * 3 + channel]];
            }
            ((T*)a.out)[size_t(row) * a.k + i] = from_float<T>(value);
        }
    }
}

// Layer norm or RMS norm of rows of n values, a warp for each row. Row i of `out` is normed from row i of `x`, or with
// `indices` from row `indices[i % per_image] + i / per_image * stride`.
struct Norm {
    const float* x;
    const float* weight;
    // Null for RMS norm.
    const float* bias;
    void* out;
    const int* indices;
    int per_image, stride;
    int rows, n;
    float epsilon;
};
static_assert(sizeof(Norm) == 64);

template <class T> __device__ __forceinline__ void norm(const Norm& a) {
    // A row of up to 1024 values is kept in registers. Longer rows are read again.
    constexpr int VECTORS = 8, ROUND = VECTORS * 4 * WARP;
    const int row = blockIdx.x * (blockDim.x / WARP) + warp_id(), lane = lane_id() * 4;
    if (row >= a.rows)
        return;
    const int from = a.indices ? a.indices[row % a.per_image] + row / a.per_image * a.stride : row;
    const float4* x = (const float4*)(a.x + size_t(from) * a.n);
    const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float4 values[VECTORS];
    auto at = [&](int start, int i) { return start + i * 4 * WARP + lane; };
    auto load = [&](int start) {
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            values[i] = at(start, i) < a.n ? x[at(start, i) / 4] : zero;
    };
    // Calls `each` with all vectors of the row.
    auto rounds = [&](auto each) {
        for (int start = 0; start < a.n; start += ROUND) {
            if (a.n > ROUND)
                load(start);
#pragma unroll
            for (int i = 0; i < VECTORS; i++)
                if (at(start, i) < a.n)
                    each(at(start, i), values[i]);
        }
    };
    load(0);
    float mean = 0.0f;
    if (a.bias) {
        rounds([&](int, float4 v) { mean += (v.x + v.y) + (v.z + v.w); });
        mean = warp_sum(mean) / a.n;
    }
    float squares = 0.0f;
    rounds([&](int, float4 v) {
        const float x = v.x - mean, y = v.y - mean, z = v.z - mean, w = v.w - mean;
        squares += (x * x + y * y) + (z * z + w * w);
    });
    const float scale = 1.0f / sqrtf(warp_sum(squares) / a.n + a.epsilon);
    T* out = (T*)a.out + size_t(row) * a.n;
    rounds([&](int at, float4 v) {
        const float4 w = *(const float4*)(a.weight + at), b = a.bias ? *(const float4*)(a.bias + at) : zero;
        store_pair(out + at, (v.x - mean) * scale * w.x + b.x, (v.y - mean) * scale * w.y + b.y);
        store_pair(out + at + 2, (v.z - mean) * scale * w.z + b.z, (v.w - mean) * scale * w.w + b.w);
    });
}

// Cosine and sine of a position's angle.
__device__ __forceinline__ float2 rotation(int position, float inv_freq) {
    const float angle = position * inv_freq;
    return make_float2(cosf(angle), sinf(angle));
}

// RoPE of a value of a head's first half and its partner in the second half.
__device__ __forceinline__ float2 rotate(float first, float second, float2 rotation) {
    return make_float2(first * rotation.x - second * rotation.y, second * rotation.x + first * rotation.y);
}

// Rows of prompts to hidden states, and the rotations of their positions, `[rows, half]`.
struct Embed {
    const PromptRow* rows;
    const Sequence* sequences;
    const void* embeddings;
    float* out;
    const float* inv_freq;
    float2* rotations;
    int hidden, half;
};
static_assert(sizeof(Embed) == 56);

template <class T> __device__ __forceinline__ void embed(const Embed& a) {
    const PromptRow row = a.rows[blockIdx.x];
    float* out = a.out + size_t(blockIdx.x) * a.hidden;
    for (int i = threadIdx.x; i < a.hidden; i += blockDim.x)
        if (row.token >= 0)
            out[i] = to_float(((const T*)a.embeddings)[size_t(row.token) * a.hidden + i]);
        else
            out[i] = a.sequences[row.sequence].image_features[size_t(-1 - row.token) * a.hidden + i];
    for (int i = threadIdx.x; i < a.half; i += blockDim.x)
        a.rotations[blockIdx.x * a.half + i] = rotation(row.position, a.inv_freq[i]);
}
