// What happens to rows between products. Sums are f32, and so is what goes from layer to layer.

#pragma once

#include "common.cuh"

// Pictures `[pictures, side, side, 3]` in bytes to rows of patches, `[pictures · grid², k]`: channel by channel, and
// zeros up to k.
struct Patches {
    const unsigned char* rgb;
    // Of each channel and byte, `[3, 256]`.
    const float* values;
    void* out;
    int side, patch, grid, k, rows;
};
static_assert(sizeof(Patches) == 48);

template <class T> __device__ __forceinline__ void patches(const Patches& a) {
    const int area = a.patch * a.patch;
    for (int row = blockIdx.x; row < a.rows; row += gridDim.x) {
        const int picture = row / (a.grid * a.grid), place = row % (a.grid * a.grid);
        const int y0 = place / a.grid * a.patch, x0 = place % a.grid * a.patch;
        const unsigned char* rgb = a.rgb + size_t(picture) * a.side * a.side * 3;
        for (int i = threadIdx.x; i < a.k; i += blockDim.x) {
            float value = 0.0f;
            if (i < 3 * area) {
                const int channel = i / area, y = y0 + i % area / a.patch, x = x0 + i % a.patch;
                value = a.values[channel * 256 + rgb[(size_t(y) * a.side + x) * 3 + channel]];
            }
            ((T*)a.out)[size_t(row) * a.k + i] = from_float<T>(value);
        }
    }
}

// Rows of n values, each by a warp: `out[i]` is that of `x[source[i % places] + i / places * stride]`, or of `x[i]`.
struct Norm {
    const float* x;
    const float* weight;
    // Layer norm's; without it is RMS norm.
    const float* bias;
    void* out;
    const int* source;
    int places, stride;
    int rows, n;
    float epsilon;
};
static_assert(sizeof(Norm) == 64);

template <class T> __device__ __forceinline__ void norm(const Norm& a) {
    // Of rows of 1024 values; longer ones are read again.
    constexpr int MOST = 8, ROUND = MOST * 4 * WARP;
    const int row = blockIdx.x * (blockDim.x / WARP) + warp_id(), lane = lane_id() * 4;
    if (row >= a.rows)
        return;
    const int from = a.source ? a.source[row % a.places] + row / a.places * a.stride : row;
    const float4* x = (const float4*)(a.x + size_t(from) * a.n);
    const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float4 values[MOST];
    auto at = [&](int start, int i) { return start + i * 4 * WARP + lane; };
    auto load = [&](int start) {
#pragma unroll
        for (int i = 0; i < MOST; i++)
            values[i] = at(start, i) < a.n ? x[at(start, i) / 4] : zero;
    };
    // Once a round, if there are several.
    auto rounds = [&](auto each) {
        for (int start = 0; start < a.n; start += ROUND) {
            if (a.n > ROUND)
                load(start);
#pragma unroll
            for (int i = 0; i < MOST; i++)
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

// Cosine and sine.
__device__ __forceinline__ float2 turn_of(int position, float frequency) {
    const float angle = position * frequency;
    return make_float2(cosf(angle), sinf(angle));
}

// Rotary position embedding of a value of a head's first half and its partner in the second.
__device__ __forceinline__ float2 turn_pair(float first, float second, float2 turn) {
    return make_float2(first * turn.x - second * turn.y, second * turn.x + first * turn.y);
}

// Rows of a prompt to what the decoder takes, and what they are turned by, `[rows, half]`.
struct Embed {
    const Row* rows;
    const Sequence* sequences;
    const void* table;
    float* out;
    const float* frequencies;
    float2* turns;
    int hidden, half;
};
static_assert(sizeof(Embed) == 56);

template <class T> __device__ __forceinline__ void embed(const Embed& a) {
    const Row row = a.rows[blockIdx.x];
    float* out = a.out + size_t(blockIdx.x) * a.hidden;
    for (int i = threadIdx.x; i < a.hidden; i += blockDim.x)
        if (row.token >= 0)
            out[i] = to_float(((const T*)a.table)[size_t(row.token) * a.hidden + i]);
        else
            out[i] = a.sequences[row.sequence].features[size_t(-1 - row.token) * a.hidden + i];
    for (int i = threadIdx.x; i < a.half; i += blockDim.x)
        a.turns[blockIdx.x * a.half + i] = turn_of(row.position, a.frequencies[i]);
}
