// Attention of single queries in the decode kernel.

#pragma once

#include "decoder.cuh"

// Eight adjacent values, in words as memory has them.
template <class T> struct Vector8 {
    static constexpr int WORDS = 8 / PER_WORD<T>;
    uint32_t words[WORDS];

    __device__ __forceinline__ void zero() {
#pragma unroll
        for (int i = 0; i < WORDS; i++)
            words[i] = 0;
    }

    __device__ __forceinline__ void load(const T* from) {
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) {
            const uint4 x = load_fresh((const uint4*)from + i / 4);
            words[i] = x.x;
            words[i + 1] = x.y;
            words[i + 2] = x.z;
            words[i + 3] = x.w;
        }
    }

    __device__ __forceinline__ void store(T* to) const {
#pragma unroll
        for (int i = 0; i < WORDS; i += 4)
            ((uint4*)to)[i / 4] = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }

    // As another block publishes them.
    __device__ __forceinline__ void await(const FlaggedWord* from, unsigned epoch) {
        await_pairs<WORDS / 2>(words, epoch, [&](int i) { return from + 2 * i; });
    }

    __device__ __forceinline__ void widen(float (&to)[8]) const {
#pragma unroll
        for (int i = 0; i < 8; i += PER_WORD<T>)
            if constexpr (PER_WORD<T> == 1) {
                to[i] = float_of(words[i]);
            } else {
                const float2 pair = unpack<T>(words[i / 2]);
                to[i] = pair.x;
                to[i + 1] = pair.y;
            }
    }
};

// A block for each query head of a row. Keys and values of earlier passes come from the KV cache, those of this pass
// from `qkv`. The last blocks, which have the least to multiply, go first.
template <class T>
__device__ __forceinline__ void Decoder<T>::attend(int layer) {
    for (int item = gridDim.x - 1 - blockIdx.x; item < row_count * a.heads; item += gridDim.x) {
        attend(layer, item / a.heads, item % a.heads);
        // Before a warp writes to `attn_partial` again.
        if (item + int(gridDim.x) < row_count * a.heads)
            sync_block();
    }
}

template <class T>
__device__ __forceinline__ void Decoder<T>::attend(int layer, int row, int head) {
    // Keys that a lane loads at once.
    constexpr int KEYS_PER_LANE = 4;
    const int size = a.head_size, per_key = size / 8, lane = lane_id(), at = lane % per_key * 8;
    const int queries = a.heads / a.kv_heads, kv_head = head / queries;
    const int words = qkv_length() / PER_WORD<T>;
    const FlaggedWord* qkv = epoch_slot(a.qkv, words, epoch);
    const Sequence& s = sequences[rows[row].sequence];
    const int first = states[rows[row].sequence].first_row, position = rows[row].position;
    const int past = position - (row - first);
    T* keys = (T*)s.kv_cache + kv_offset(s, layer, 0, a.kv_heads, kv_head, size) + at;
    T* values = (T*)s.kv_cache + kv_offset(s, layer, 1, a.kv_heads, kv_head, size) + at;
    // A warp has `each` adjacent keys at once. A lane's keys are `stride` apart.
    const int each = WARP / per_key, stride = DECODE_WARPS * each;
    int key = warp_id() * each + lane / per_key;
    Vector8<T> k[KEYS_PER_LANE], v[KEYS_PER_LANE];
    auto fetch = [&](Vector8<T> (&k)[KEYS_PER_LANE], Vector8<T> (&v)[KEYS_PER_LANE], int from) {
#pragma unroll
        for (int i = 0; i < KEYS_PER_LANE; i++) {
            k[i].zero();
            v[i].zero();
            if (from + i * stride < past) {
                k[i].load(keys + size_t(from + i * stride) * size);
                v[i].load(values + size_t(from + i * stride) * size);
            }
        }
    };
    // Cached keys are loaded while those of this pass are on their way.
    fetch(k, v, key);
    float q[8];
    Vector8<T> query;
    query.await(qkv + row * words + (head * size + at) / PER_WORD<T>, epoch);
    query.widen(q);
    float max_score = -INFINITY, total = 0.0f, out[8] = {};
#pragma unroll 1
    for (int start = 0; start <= position; start += KEYS_PER_LANE * stride, key += KEYS_PER_LANE * stride) {
        Vector8<T> next_k[KEYS_PER_LANE], next_v[KEYS_PER_LANE];
        const bool has_next = start + KEYS_PER_LANE * stride <= position;
        if (has_next)
            fetch(next_k, next_v, key + KEYS_PER_LANE * stride);
        float scores[KEYS_PER_LANE];
#pragma unroll
        for (int i = 0; i < KEYS_PER_LANE; i++) {
            const int token = key + i * stride;
            if (token >= past && token <= position) {
                const int in_row = ((a.heads + kv_head) * size + at) / PER_WORD<T>;
                const FlaggedWord* from = qkv + (first + token - past) * words + in_row;
                k[i].await(from, epoch);
                v[i].await(from + a.kv_heads * size / PER_WORD<T>, epoch);
                if (token == position && head % queries == 0) {
                    k[i].store(keys + size_t(token) * size);
                    v[i].store(values + size_t(token) * size);
                }
            }
            float wide[8], score = 0.0f;
            k[i].widen(wide);
#pragma unroll
            for (int j = 0; j < 8; j++)
                score = fmaf(q[j], wide[j], score);
            scores[i] = score;
        }
        float new_max = max_score;
        for (int mask = per_key / 2; mask > 0; mask /= 2)
#pragma unroll
            for (int i = 0; i < KEYS_PER_LANE; i++)
                scores[i] += shuffle_xor(scores[i], mask);
#pragma unroll
        for (int i = 0; i < KEYS_PER_LANE; i++) {
            if (key + i * stride > position)
                scores[i] = -INFINITY;
            new_max = fmaxf(new_max, scores[i]);
        }
        const float base = new_max == -INFINITY ? 0.0f : new_max, rescale = exp2_fast(max_score - base);
        max_score = new_max;
        total *= rescale;
        for (int j = 0; j < 8; j++)
            out[j] *= rescale;
#pragma unroll
        for (int i = 0; i < KEYS_PER_LANE; i++) {
            const float weight = exp2_fast(scores[i] - base);
            float wide[8];
            v[i].widen(wide);
            total += weight;
#pragma unroll
            for (int j = 0; j < 8; j++)
                out[j] = fmaf(weight, wide[j], out[j]);
            if (has_next) {
                k[i] = next_k[i];
                v[i] = next_v[i];
            }
        }
    }
    // Combines the lanes of a warp, then the warps.
    float warp_max = max_score;
    for (int mask = per_key; mask < WARP; mask *= 2)
        warp_max = fmaxf(warp_max, shuffle_xor(warp_max, mask));
    const float by = warp_max == -INFINITY ? 0.0f : exp2_fast(max_score - warp_max);
    total *= by;
#pragma unroll
    for (int j = 0; j < 8; j++)
        out[j] *= by;
    for (int mask = per_key; mask < WARP; mask *= 2) {
        total += shuffle_xor(total, mask);
#pragma unroll
        for (int j = 0; j < 8; j++)
            out[j] += shuffle_xor(out[j], mask);
    }
    float* to = attn_partial + warp_id() * attn_partial_stride();
    if (lane < per_key) {
        *(float4*)(to + at) = make_float4(out[0], out[1], out[2], out[3]);
        *(float4*)(to + at + 4) = make_float4(out[4], out[5], out[6], out[7]);
        if (lane == 0)
            *(float2*)(to + size) = make_float2(warp_max, total);
    }
    sync_block();
    const int mine = threadIdx.x * 4;
    if (mine < size) {
        float block_max = -INFINITY, sum = 0.0f, y[4] = {};
#pragma unroll
        for (int warp = 0; warp < DECODE_WARPS; warp++)
            block_max = fmaxf(block_max, attn_partial[warp * attn_partial_stride() + size]);
#pragma unroll
        for (int warp = 0; warp < DECODE_WARPS; warp++) {
            const float* from = attn_partial + warp * attn_partial_stride();
            const float weight = exp2_fast(from[size] - block_max);
            const float4 part = *(const float4*)(from + mine);
            sum = fmaf(weight, from[size + 1], sum);
            y[0] = fmaf(weight, part.x, y[0]);
            y[1] = fmaf(weight, part.y, y[1]);
            y[2] = fmaf(weight, part.z, y[2]);
            y[3] = fmaf(weight, part.w, y[3]);
        }
        const float by = 1.0f / sum;
        for (int i = 0; i < 4; i++)
            y[i] *= by;
        const int all = a.heads * size / PER_WORD<T>;
        FlaggedWord* attn_out = epoch_slot(a.attn_out, all, epoch) + row * all;
        publish_four<T>(attn_out + (head * size + mine) / PER_WORD<T>, y, epoch);
    }
}
