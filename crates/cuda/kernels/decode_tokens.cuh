// Rows of a pass, greedy choice of their next tokens, and verification of draft tokens.

#pragma once

#include "decoder.cuh"

__device__ __forceinline__ void take_better(float& logit, int& token, float other, int other_token) {
    if (other > logit || (other == logit && other_token < token)) {
        logit = other;
        token = other_token;
    }
}

// A logit that is not finite wins over all others, as no token: comparisons with it would choose by chance.
__device__ __forceinline__ void take_logit(float& logit, int& token, float y, int col) {
    const bool finite = y < INFINITY;
    take_better(logit, token, finite ? y : INFINITY, finite ? col : NOT_FINITE);
}

// Logits of two tokens.
template <class T>
__device__ __forceinline__ void Decoder<T>::update_best(int half, int row, int col, float y0, float y1) {
    if (row >= row_count || col >= a.vocab_size)
        return;
    const bool both = col + 1 < a.vocab_size;
    take_logit(logit[half], token[half], y0, col);
    if (both)
        take_logit(logit[half], token[half], y1, col + 1);
    if (a.logits) {
        a.logits[size_t(row) * a.vocab_size + col] = y0;
        if (both)
            a.logits[size_t(row) * a.vocab_size + col + 1] = y1;
    }
}

// Rows of the next pass: the token of each sequence, and draft tokens as far as there is room.
template <class T>
__device__ void Decoder<T>::schedule_rows() {
    sync_block();
    if (threadIdx.x == 0) {
        int active = 0;
        for (int i = 0; i < a.sequence_count; i++)
            active += !states[i].finish;
        int row = 0;
        for (int i = 0; i < a.sequence_count; i++) {
            SequenceState& state = states[i];
            const Sequence& s = sequences[i];
            state.first_row = row;
            state.rows = 0;
            if (state.finish)
                continue;
            // No draft once the sequence has left it.
            const bool on_draft = state.generated == 0 || (state.generated <= s.draft_len &&
                                                         s.draft_tokens[state.generated - 1] == state.token);
            const int draft = on_draft ? min(s.draft_len - state.generated, s.max_tokens - state.generated - 1) : 0;
            state.rows = 1 + max(0, min(draft, a.max_rows / active - 1));
            for (int j = 0; j < state.rows; j++) {
                rows[row].sequence = i;
                rows[row].position = state.position + j;
                rows[row].token = j == 0 ? state.token : s.draft_tokens[state.generated + j - 1];
                row++;
            }
        }
        *(int*)partial = row;
    }
    sync_block();
    row_count = *(int*)partial;
    for (rows_log2 = 0; (1 << rows_log2) < row_count;)
        rows_log2++;
    const int half = a.head_size / 2;
    for (int i = threadIdx.x; i < row_count * half; i += DECODE_THREADS)
        rotations[i] = rotation(rows[i / half].position, a.inv_freq[i % half]);
    // What other blocks have written to the KV cache.
    fence();
    sync_block();
}

// The best token of each row, to the start of `partial`. All blocks do the same.
template <class T>
__device__ __forceinline__ void Decoder<T>::choose_tokens() {
    constexpr int PER_LANE = 8;
    const int blocks = gridDim.x;
    for (int row = warp_id(); row < row_count; row += DECODE_WARPS) {
        float logit = -INFINITY;
        int token = NO_TOKEN;
        for (int start = lane_id(); start < blocks; start += PER_LANE * WARP) {
            uint32_t words[2 * PER_LANE];
            await_pairs<PER_LANE>(words, epoch, [&](int i) {
                const int block = start + i * WARP;
                return block < blocks ? a.candidates + (block * MAX_ROWS + row) * 2 : nullptr;
            });
#pragma unroll
            for (int i = 0; i < PER_LANE; i++)
                if (start + i * WARP < blocks)
                    take_better(logit, token, float_of(words[2 * i]), int(words[2 * i + 1]));
        }
        for (int mask = 16; mask > 0; mask /= 2) {
            const float other = shuffle_xor(logit, mask);
            const int other_token = shuffle_xor(token, mask);
            take_better(logit, token, other, other_token);
        }
        if (lane_id() == 0)
            ((int*)partial)[row] = logit > -INFINITY ? token : NOT_FINITE;
    }
    sync_block();
}

template <class T>
__device__ bool Decoder<T>::is_stop(int token) const {
    return a.stop_tokens[token / 32] >> (token % 32) & 1;
}

// Accepts the chosen tokens as far as the draft agrees. All blocks do the same, and the first one tells the host.
template <class T>
__device__ void Decoder<T>::accept_tokens() {
    if (threadIdx.x == 0) {
        const int* best = (const int*)partial;
        for (int i = 0; i < a.sequence_count; i++) {
            SequenceState& state = states[i];
            if (state.finish)
                continue;
            const Sequence& s = sequences[i];
            for (int j = 0; j < state.rows; j++) {
                const int token = best[state.first_row + j];
                if (token == NOT_FINITE) {
                    state.finish = INVALID_LOGITS;
                    break;
                }
                state.position++;
                state.token = token;
                if (is_stop(token)) {
                    state.finish = STOP;
                    break;
                }
                if (blockIdx.x == 0)
                    store_volatile(s.generated + state.generated, token);
                state.generated++;
                if (state.generated >= s.max_tokens) {
                    state.finish = LENGTH;
                    break;
                }
                if (j + 1 < state.rows && rows[state.first_row + j + 1].token != token)
                    break;
            }
            if (await_word(a.candidates + 2 * gridDim.x * MAX_ROWS + i, epoch) != 0 && !state.finish)
                state.finish = CANCELLED;
            if (blockIdx.x == 0) {
                // The host must see the tokens before their number.
                fence_system();
                store_volatile(s.generated_len, state.generated + (state.finish << 24));
            }
        }
    }
    sync_block();
}

template <class T>
__device__ bool Decoder<T>::all_done() const {
    for (int i = 0; i < a.sequence_count; i++)
        if (!states[i].finish)
            return false;
    return true;
}

// Publishes this block's best token of each row.
template <class T>
__device__ __forceinline__ void Decoder<T>::publish_candidates() {
    float* logits = partial;
    int* tokens = (int*)(partial + DECODE_WARPS * MAX_ROWS);
    // A block without a part in the LM head may still read partial sums.
    sync_block();
    for (int i = 0; i < 2; i++) {
        for (int mask = 1; mask < 4; mask *= 2) {
            const float other = shuffle_xor(logit[i], mask);
            const int other_token = shuffle_xor(token[i], mask);
            take_better(logit[i], token[i], other, other_token);
        }
        if (lane_id() % 4 == 0) {
            logits[warp_id() * MAX_ROWS + lane_id() / 4 + 8 * i] = logit[i];
            tokens[warp_id() * MAX_ROWS + lane_id() / 4 + 8 * i] = token[i];
        }
    }
    // The next pass reads what this one has written to the KV cache.
    fence();
    sync_block();
    // One block reads the host's flags, so that all see the same.
    if (blockIdx.x == 0 && int(threadIdx.x) < a.sequence_count) {
        const int cancelled = load_volatile(sequences[threadIdx.x].cancelled);
        publish(a.candidates + 2 * gridDim.x * MAX_ROWS + threadIdx.x, uint32_t(cancelled), epoch);
    }
    if (int(threadIdx.x) < row_count) {
        float best = -INFINITY;
        int best_token = NO_TOKEN;
        for (int warp = 0; warp < DECODE_WARPS; warp++)
            take_better(best, best_token, logits[warp * MAX_ROWS + threadIdx.x],
                        tokens[warp * MAX_ROWS + threadIdx.x]);
        publish_two(a.candidates + (blockIdx.x * MAX_ROWS + threadIdx.x) * 2, bits_of(best), uint32_t(best_token),
                    epoch);
    }
    // Before `choose_tokens` overwrites the start of `partial`.
    sync_block();
}
