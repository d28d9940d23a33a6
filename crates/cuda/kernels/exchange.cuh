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

// Numbers of the products' type in a word; the words behind each other are the numbers as memory has them.
template <class T> constexpr int IN_A_WORD = 4 / sizeof(T);

__device__ __forceinline__ Tagged tag(uint32_t word, unsigned turn) { return word | uint64_t(turn) << 32; }

__device__ __forceinline__ bool is_of(Tagged word, unsigned turn) { return unsigned(word >> 32) == turn; }

__device__ __forceinline__ void give(Tagged* to, uint32_t word, unsigned turn) { store_relaxed(to, tag(word, turn)); }

__device__ __forceinline__ void give_two(Tagged* to, uint32_t first, uint32_t second, unsigned turn) {
    store_relaxed(to, TwoWords{tag(first, turn), tag(second, turn)});
}

// Four numbers, which are two words or four.
template <class T> __device__ __forceinline__ void give_four(Tagged* to, const float (&x)[4], unsigned turn) {
    give_two(to, pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), turn);
}

template <> __device__ __forceinline__ void give_four<float>(Tagged* to, const float (&x)[4], unsigned turn) {
    give_two(to, bits_of(x[0]), bits_of(x[1]), turn);
    give_two(to + 2, bits_of(x[2]), bits_of(x[3]), turn);
}

__device__ __forceinline__ uint32_t await(const Tagged* from, unsigned turn) {
    Tagged word = load_relaxed(from);
    while (!is_of(word, turn)) {
        pause();
        word = load_relaxed(from);
    }
    return uint32_t(word);
}

// Holds a warp back until one word is there, by one lane: all lanes of all blocks at many words, again and again, would
// take the L2 cache from those who have something to write.
__device__ __forceinline__ void await_first(const Tagged* from, unsigned turn) {
    if (lane_id() == 0)
        await(from, turn);
    sync_warp();
}

// N pairs of words, where `place(i)` says, or zeros if that is null: all are asked for before the first is waited for.
template <int N, class P>
__device__ __forceinline__ void await_pairs(uint32_t (&words)[2 * N], unsigned turn, P place) {
    TwoWords got[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        const Tagged* from = place(i);
        got[i] = {tag(0, turn), tag(0, turn)};
        if (from)
            got[i] = load_relaxed_two(from);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        while (!is_of(got[i].first, turn) || !is_of(got[i].second, turn)) {
            pause();
            got[i] = load_relaxed_two(place(i));
        }
        words[2 * i] = uint32_t(got[i].first);
        words[2 * i + 1] = uint32_t(got[i].second);
    }
}
