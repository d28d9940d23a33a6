// Attention of single queries, in the decoder.

#pragma once

#include "decoder.cuh"

// Eight numbers beside each other, as memory has them.
template <class T> struct Eight {
    static constexpr int WORDS = 8 / IN_A_WORD<T>;
    uint32_t words[WORDS];

    __device__ __forceinline__ void clear() {
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

    // As others give them, from this word on.
    __device__ __forceinline__ void await(const Tagged* from, unsigned turn) {
        await_pairs<WORDS / 2>(words, turn, [&](int i) { return from + 2 * i; });
    }

    __device__ __forceinline__ void widen(float (&to)[8]) const {
#pragma unroll
        for (int i = 0; i < 8; i += IN_A_WORD<T>)
            if constexpr (IN_A_WORD<T> == 1) {
                to[i] = float_of(words[i]);
            } else {
                const float2 pair = unpack<T>(words[i / 2]);
                to[i] = pair.x;
                to[i + 1] = pair.y;
            }
    }
};

// A query head of a row by a block: keys and values of before from the cache, those of this pass from `qkv`. Blocks
// take part from the last on, which have the least to multiply.
template <class T>
__device__ __forceinline__ void Decoder<T>::attend(int layer) {
    for (int item = gridDim.x - 1 - blockIdx.x; item < count * a.heads; item += gridDim.x) {
        attend(layer, item / a.heads, item % a.heads);
        // Before somebody writes to `seen` again.
        if (item + int(gridDim.x) < count * a.heads)
            sync_block();
    }
}

template <class T>
__device__ __forceinline__ void Decoder<T>::attend(int layer, int row, int head) {
    // Keys that a lane sees at once.
    constexpr int MOST = 4;
    const int size = a.head_size, per_key = size / 8, lane = lane_id(), at = lane % per_key * 8;
    const int queries = a.heads / a.kv_heads, kv_head = head / queries;
    const int words = width() / IN_A_WORD<T>;
    const Tagged* qkv = place(a.qkv, words, turn);
    const Sequence& s = sequences[rows[row].sequence];
    const int first = standing[rows[row].sequence].first, position = rows[row].position;
    const int past = position - (row - first);
    T* keys = (T*)s.cache + cache_place(s, layer, 0, a.kv_heads, kv_head, size) + at;
    T* all_values = (T*)s.cache + cache_place(s, layer, 1, a.kv_heads, kv_head, size) + at;
    // A warp has so many keys beside each other, its lanes `stride` from one to the next.
    const int each = WARP / per_key, stride = DECODE_WARPS * each;
    int key = warp_id() * each + lane / per_key;
    Eight<T> k[MOST], v[MOST];
    auto fetch = [&](Eight<T> (&k)[MOST], Eight<T> (&v)[MOST], int from) {
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            k[i].clear();
            v[i].clear();
            if (from + i * stride < past) {
                k[i].load(keys + size_t(from + i * stride) * size);
                v[i].load(all_values + size_t(from + i * stride) * size);
            }
        }
    };
    // Those that were there before come while this pass' are on their way.
    fetch(k, v, key);
    float q[8];
    Eight<T> query;
    query.await(qkv + row * words + (head * size + at) / IN_A_WORD<T>, turn);
    query.widen(q);
    float highest = -INFINITY, total = 0.0f, out[8] = {};
#pragma unroll 1
    for (int base = 0; base <= position; base += MOST * stride, key += MOST * stride) {
        Eight<T> next_k[MOST], next_v[MOST];
        const bool goes_on = base + MOST * stride <= position;
        if (goes_on)
            fetch(next_k, next_v, key + MOST * stride);
        float scores[MOST];
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            const int now = key + i * stride;
            if (now >= past && now <= position) {
                const int in_row = ((a.heads + kv_head) * size + at) / IN_A_WORD<T>;
                const Tagged* from = qkv + (first + now - past) * words + in_row;
                k[i].await(from, turn);
                v[i].await(from + a.kv_heads * size / IN_A_WORD<T>, turn);
                if (now == position && head % queries == 0) {
                    k[i].store(keys + size_t(now) * size);
                    v[i].store(all_values + size_t(now) * size);
                }
            }
            float wide[8], score = 0.0f;
            k[i].widen(wide);
#pragma unroll
            for (int j = 0; j < 8; j++)
                score = fmaf(q[j], wide[j], score);
            scores[i] = score;
        }
        float most = highest;
        for (int mask = per_key / 2; mask > 0; mask /= 2)
#pragma unroll
            for (int i = 0; i < MOST; i++)
                scores[i] += shuffle_xor(scores[i], mask);
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            if (key + i * stride > position)
                scores[i] = -INFINITY;
            most = fmaxf(most, scores[i]);
        }
        const float from = most == -INFINITY ? 0.0f : most, shrink = exp2_fast(highest - from);
        highest = most;
        total *= shrink;
        for (int j = 0; j < 8; j++)
            out[j] *= shrink;
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            const float weight = exp2_fast(scores[i] - from);
            float wide[8];
            v[i].widen(wide);
            total += weight;
#pragma unroll
            for (int j = 0; j < 8; j++)
                out[j] = fmaf(weight, wide[j], out[j]);
            if (goes_on) {
                k[i] = next_k[i];
                v[i] = next_v[i];
            }
        }
    }
    // What the lanes of a warp have seen, then the warps.
    float most = highest;
    for (int mask = per_key; mask < WARP; mask *= 2)
        most = fmaxf(most, shuffle_xor(most, mask));
    const float by = most == -INFINITY ? 0.0f : exp2_fast(highest - most);
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
    float* to = seen + warp_id() * seen_stride();
    if (lane < per_key) {
        *(float4*)(to + at) = make_float4(out[0], out[1], out[2], out[3]);
        *(float4*)(to + at + 4) = make_float4(out[4], out[5], out[6], out[7]);
        if (lane == 0)
            *(float2*)(to + size) = make_float2(most, total);
    }
    sync_block();
    const int mine = threadIdx.x * 4;
    if (mine < size) {
        float best = -INFINITY, sum = 0.0f, y[4] = {};
#pragma unroll
        for (int warp = 0; warp < DECODE_WARPS; warp++)
            best = fmaxf(best, seen[warp * seen_stride() + size]);
#pragma unroll
        for (int warp = 0; warp < DECODE_WARPS; warp++) {
            const float* from = seen + warp * seen_stride();
            const float weight = exp2_fast(from[size] - best);
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
        const int all = a.heads * size / IN_A_WORD<T>;
        Tagged* attended = place(a.attended, all, turn) + row * all;
        give_four<T>(attended + (head * size + mine) / IN_A_WORD<T>, y, turn);
    }
}
