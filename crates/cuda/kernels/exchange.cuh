// Data that blocks exchange during a launch: words of 32 bits beside a flag, which is the epoch that they belong to.
//
// A reader polls a word until its flag is that of the epoch, as in NCCL's LL protocol. So nobody waits for all blocks
// to arrive, and a word takes one trip to the L2 cache and one back, where a barrier and the data behind it take two
// each.
//
// Each word has two slots, for even and odd epochs. No slot is overwritten while a reader may still want it: every
// epoch has a product that all blocks have a part in and whose whole result all blocks need (see `DecodePlan` in
// `plan.rs`), so no block is a whole epoch ahead.

#pragma once

#include "common.cuh"

typedef uint64_t FlaggedWord;

// Values of type T in a word. Consecutive words are the values as in memory.
template <class T> constexpr int PER_WORD = 4 / sizeof(T);

__device__ __forceinline__ FlaggedWord flagged(uint32_t word, unsigned epoch) { return word | uint64_t(epoch) << 32; }

__device__ __forceinline__ bool has_epoch(FlaggedWord word, unsigned epoch) { return unsigned(word >> 32) == epoch; }

__device__ __forceinline__ void publish(FlaggedWord* to, uint32_t word, unsigned epoch) {
    store_relaxed(to, flagged(word, epoch));
}

__device__ __forceinline__ void publish_two(FlaggedWord* to, uint32_t first, uint32_t second, unsigned epoch) {
    store_relaxed(to, TwoWords{flagged(first, epoch), flagged(second, epoch)});
}

// Four values, which are two words or four.
template <class T> __device__ __forceinline__ void publish_four(FlaggedWord* to, const float (&x)[4], unsigned epoch) {
    publish_two(to, pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), epoch);
}

template <> __device__ __forceinline__ void publish_four<float>(FlaggedWord* to, const float (&x)[4], unsigned epoch) {
    publish_two(to, bits_of(x[0]), bits_of(x[1]), epoch);
    publish_two(to + 2, bits_of(x[2]), bits_of(x[3]), epoch);
}

__device__ __forceinline__ uint32_t await_word(const FlaggedWord* from, unsigned epoch) {
    FlaggedWord word = load_relaxed(from);
    while (!has_epoch(word, epoch)) {
        pause();
        word = load_relaxed(from);
    }
    return uint32_t(word);
}

// Blocks a warp until one word is there, polled by one lane: all lanes of all blocks polling many words would take the
// L2 cache from those who have something to write.
__device__ __forceinline__ void await_first(const FlaggedWord* from, unsigned epoch) {
    if (lane_id() == 0)
        await_word(from, epoch);
    sync_warp();
}

// N pairs of words at `source(i)`, or zeros where it is null. All are loaded before the first is waited for.
template <int N, class P>
__device__ __forceinline__ void await_pairs(uint32_t (&words)[2 * N], unsigned epoch, P source) {
    TwoWords got[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        const FlaggedWord* from = source(i);
        got[i] = {flagged(0, epoch), flagged(0, epoch)};
        if (from)
            got[i] = load_relaxed_two(from);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        while (!has_epoch(got[i].first, epoch) || !has_epoch(got[i].second, epoch)) {
            pause();
            got[i] = load_relaxed_two(source(i));
        }
        words[2 * i] = uint32_t(got[i].first);
        words[2 * i + 1] = uint32_t(got[i].second);
    }
}
