// What blocks give each other while a kernel runs: words that carry the number of the turn that they belong to.
//
// Who needs a word looks at it until it is of the turn. So nobody waits for all to arrive, and a word takes one way to
// the L2 cache and one from it, where a barrier and the data behind it take two each.
//
// There are two places for each word, for even and for odd turns. None is written while somebody may still want what it
// holds: in every turn there is a product that all blocks have a part in and that all blocks need the whole of (see
// `Plan` in `plan.rs`), so nobody is a whole turn ahead.

#pragma once

#include "common.cuh"

typedef uint64_t Tagged;

__device__ __forceinline__ void give(Tagged* to, uint32_t word, unsigned turn) {
    store_relaxed(to, word | uint64_t(turn) << 32);
}

__device__ __forceinline__ void give(Tagged* to, float value, unsigned turn) { give(to, bits_of(value), turn); }

__device__ __forceinline__ bool is_of(Tagged word, unsigned turn) { return unsigned(word >> 32) == turn; }

__device__ __forceinline__ uint32_t await(const Tagged* from, unsigned turn) {
    Tagged word = load_relaxed(from);
    while (!is_of(word, turn)) {
        pause();
        word = load_relaxed(from);
    }
    return uint32_t(word);
}

__device__ __forceinline__ float await_float(const Tagged* from, unsigned turn) {
    return float_of(await(from, turn));
}

// Holds a warp back until one word is there, by one lane: all lanes of all blocks at their words, again and again, would
// take the L2 cache from those who have something to write.
__device__ __forceinline__ void await_first(const Tagged* from, unsigned turn) {
    if (lane_id() == 0)
        await(from, turn);
    sync_warp();
}

// N words, where `place(i)` says, or none if that is null: all are asked for before the first is waited for.
template <int N, class P> __device__ __forceinline__ void await_all(float (&words)[N], unsigned turn, P place) {
    Tagged got[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        const Tagged* from = place(i);
        got[i] = from ? load_relaxed(from) : uint64_t(turn) << 32;
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        while (!is_of(got[i], turn)) {
            pause();
            got[i] = load_relaxed(place(i));
        }
        words[i] = float_of(uint32_t(got[i]));
    }
}
