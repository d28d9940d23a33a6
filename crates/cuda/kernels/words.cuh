// Which rows a pass of the decoder has, and which words come of it.

#pragma once

#include "decoder.cuh"

__device__ __forceinline__ void take_better(float& score, int& token, float other, int other_token) {
    if (other > score || (other == score && other_token < token)) {
        score = other;
        token = other_token;
    }
}

// A score that is no number wins over all others, as no token: whatever is added to it or compared with it would
// choose by chance, or nothing at all.
__device__ __forceinline__ void take_score(float& score, int& token, float y, int col) {
    const bool finite = y < INFINITY;
    take_better(score, token, finite ? y : INFINITY, finite ? col : NOT_FINITE);
}

// Scores of two tokens.
template <class T>
__device__ __forceinline__ void Decoder<T>::judge(int half, int row, int col, float y0, float y1) {
    if (row >= count || col >= a.vocabulary)
        return;
    const bool both = col + 1 < a.vocabulary;
    take_score(score[half], token[half], y0, col);
    if (both)
        take_score(score[half], token[half], y1, col + 1);
    if (a.scores) {
        a.scores[size_t(row) * a.vocabulary + col] = y0;
        if (both)
            a.scores[size_t(row) * a.vocabulary + col + 1] = y1;
    }
}

// Rows of the next pass: of each sequence its token, and guesses as far as there is room.
template <class T>
__device__ void Decoder<T>::line_up() {
    sync_block();
    if (threadIdx.x == 0) {
        int active = 0;
        for (int i = 0; i < a.count; i++)
            active += !standing[i].done;
        int row = 0;
        for (int i = 0; i < a.count; i++) {
            Standing& now = standing[i];
            const Sequence& s = sequences[i];
            now.first = row;
            now.rows = 0;
            if (now.done)
                continue;
            // None once it has said something else.
            const bool agrees = now.made == 0 || (now.made <= s.guesses && s.guess[now.made - 1] == now.token);
            const int known = agrees ? min(s.guesses - now.made, s.most - now.made - 1) : 0;
            now.rows = 1 + max(0, min(known, a.most_rows / active - 1));
            for (int j = 0; j < now.rows; j++) {
                rows[row].sequence = i;
                rows[row].position = now.position + j;
                rows[row].token = j == 0 ? now.token : s.guess[now.made + j - 1];
                row++;
            }
        }
        *(int*)partial = row;
    }
    sync_block();
    count = *(int*)partial;
    for (row_shift = 0; (1 << row_shift) < count;)
        row_shift++;
    const int half = a.head_size / 2;
    for (int i = threadIdx.x; i < count * half; i += DECODE_THREADS)
        turned[i] = turn_of(rows[i / half].position, a.frequencies[i % half]);
    // What other blocks have put into the cache.
    fence();
    sync_block();
}

// The best token of each row, by all blocks alike, into the start of `partial`.
template <class T>
__device__ __forceinline__ void Decoder<T>::choose() {
    constexpr int MOST = 8;
    const int blocks = gridDim.x;
    for (int row = warp_id(); row < count; row += DECODE_WARPS) {
        float score = -INFINITY;
        int token = NO_TOKEN;
        for (int start = lane_id(); start < blocks; start += MOST * WARP) {
            uint32_t words[2 * MOST];
            await_pairs<MOST>(words, turn, [&](int i) {
                const int block = start + i * WARP;
                return block < blocks ? a.best + (block * MOST_ROWS + row) * 2 : nullptr;
            });
#pragma unroll
            for (int i = 0; i < MOST; i++)
                if (start + i * WARP < blocks)
                    take_better(score, token, float_of(words[2 * i]), int(words[2 * i + 1]));
        }
        for (int mask = 16; mask > 0; mask /= 2) {
            const float other = shuffle_xor(score, mask);
            const int other_token = shuffle_xor(token, mask);
            take_better(score, token, other, other_token);
        }
        if (lane_id() == 0)
            ((int*)partial)[row] = score > -INFINITY ? token : NOT_FINITE;
    }
    sync_block();
}

template <class T>
__device__ bool Decoder<T>::is_stop(int token) const {
    return a.stops[token / 32] >> (token % 32) & 1;
}

// Takes the chosen tokens, as far as the guesses came true. Each block does the same; the first tells the host.
template <class T>
__device__ void Decoder<T>::advance() {
    if (threadIdx.x == 0) {
        const int* best = (const int*)partial;
        for (int i = 0; i < a.count; i++) {
            Standing& now = standing[i];
            if (now.done)
                continue;
            const Sequence& s = sequences[i];
            for (int j = 0; j < now.rows; j++) {
                const int token = best[now.first + j];
                if (token == NOT_FINITE) {
                    now.done = BROKEN;
                    break;
                }
                now.position++;
                now.token = token;
                if (is_stop(token)) {
                    now.done = STOP;
                    break;
                }
                if (blockIdx.x == 0)
                    store_volatile(s.said + now.made, token);
                now.made++;
                if (now.made >= s.most) {
                    now.done = LENGTH;
                    break;
                }
                if (j + 1 < now.rows && rows[now.first + j + 1].token != token)
                    break;
            }
            if (await(a.best + 2 * gridDim.x * MOST_ROWS + i, turn) != 0 && !now.done)
                now.done = CANCELLED;
            if (blockIdx.x == 0) {
                // The tokens are there before their number is.
                fence_system();
                store_volatile(s.count, now.made + (now.done << 24));
            }
        }
    }
    sync_block();
}

template <class T>
__device__ bool Decoder<T>::is_over() const {
    for (int i = 0; i < a.count; i++)
        if (!standing[i].done)
            return false;
    return true;
}

// The best of this block's tokens of each row.
template <class T>
__device__ __forceinline__ void Decoder<T>::give_best() {
    float* scores = partial;
    int* tokens = (int*)(partial + DECODE_WARPS * MOST_ROWS);
    // Where sums were, in a block without a part in the head.
    sync_block();
    for (int i = 0; i < 2; i++) {
        for (int mask = 1; mask < 4; mask *= 2) {
            const float other = shuffle_xor(score[i], mask);
            const int other_token = shuffle_xor(token[i], mask);
            take_better(score[i], token[i], other, other_token);
        }
        if (lane_id() % 4 == 0) {
            scores[warp_id() * MOST_ROWS + lane_id() / 4 + 8 * i] = score[i];
            tokens[warp_id() * MOST_ROWS + lane_id() / 4 + 8 * i] = token[i];
        }
    }
    // The next pass reads what this one has put into the cache.
    fence();
    sync_block();
    // One block asks the host, so that all hear the same.
    if (blockIdx.x == 0 && int(threadIdx.x) < a.count) {
        const int ended = load_volatile(sequences[threadIdx.x].cancelled);
        give(a.best + 2 * gridDim.x * MOST_ROWS + threadIdx.x, uint32_t(ended), turn);
    }
    if (int(threadIdx.x) < count) {
        float best = -INFINITY;
        int best_token = NO_TOKEN;
        for (int warp = 0; warp < DECODE_WARPS; warp++)
            take_better(best, best_token, scores[warp * MOST_ROWS + threadIdx.x],
                        tokens[warp * MOST_ROWS + threadIdx.x]);
        give_two(a.best + (blockIdx.x * MOST_ROWS + threadIdx.x) * 2, bits_of(best), uint32_t(best_token), turn);
    }
    // Before the chosen go to where these were.
    sync_block();
}
