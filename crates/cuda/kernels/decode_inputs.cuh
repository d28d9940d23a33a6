// Input rows of the decoder's next product: normed hidden states, or activations as other blocks published them.

#pragma once

#include "decoder.cuh"

// Hidden states of a row in epoch `of`, or the embedding of its token if `hidden` is null: N times four values from
// `column(i)` on.
template <class T>
template <int N, class P>
__device__ __forceinline__ void Decoder<T>::await_hidden(float (&x)[N][4], const FlaggedWord* hidden, unsigned of,
                                                         int row, P column) {
    if (hidden) {
        const FlaggedWord* from = hidden + row * a.hidden;
        uint32_t words[4 * N];
        await_pairs<2 * N>(words, of, [&](int i) -> const FlaggedWord* {
            const int at = column(i / 2);
            return at < a.hidden ? from + at + i % 2 * 2 : nullptr;
        });
#pragma unroll
        for (int i = 0; i < 4 * N; i++)
            x[i / 4][i % 4] = float_of(words[i]);
    } else {
        const T* from = embedding(row);
#pragma unroll
        for (int i = 0; i < N; i++)
            load_four(from, column(i) < a.hidden ? column(i) : -1, x[i]);
    }
}

__device__ __forceinline__ float sum_of_squares(float sum, const float (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        sum = fmaf(x[i], x[i], sum);
    return sum;
}

template <class T>
__device__ __forceinline__ float Decoder<T>::rms_scale(float squares) const {
    return rsqrtf(fmaf(warp_sum(squares), inverse_hidden, a.epsilon));
}

// Four values of a row, times the row's scale and the norm's gains.
template <class T>
__device__ __forceinline__ void Decoder<T>::store_normed(int row, int at, const float (&x)[4], float scale,
                                                          float4 gain) {
    const float y[4] = {x[0] * scale * gain.x, x[1] * scale * gain.y, x[2] * scale * gain.z, x[3] * scale * gain.w};
    store_four(inputs + row * a.row_stride, at, y);
}

// Zeros up to a whole step, so that the weights there don't count. By one warp.
template <class T>
__device__ __forceinline__ void Decoder<T>::zero_tail(T* row, int length) {
    const int at = length + lane_id();
    if (length % STEP != 0 && at < ceil_div(length, STEP) * STEP)
        row[at] = from_float<T>(0.0f);
}

// RMS norm of the hidden states in epoch `of`, or of the tokens' embeddings if `hidden` is null.
template <class T>
__device__ __forceinline__ void Decoder<T>::norm(const FlaggedWord* hidden, unsigned of, const float* gains) {
    if (a.hidden <= 4 * DECODE_THREADS)
        norm<1>(hidden, of, gains);
    else
        norm<2>(hidden, of, gains);
    sync_block();
}

// A lane sums EACH times four values of the first warp's part of a row, then of the next's. All warps sum a single row,
// one warp sums each of several rows, and the results are the same.
template <class T>
template <int EACH>
__device__ __forceinline__ void Decoder<T>::norm(const FlaggedWord* hidden, unsigned of, const float* gains) {
    if (row_count == 1) {
        auto column = [&](int i) { return (i * DECODE_THREADS + int(threadIdx.x)) * 4; };
        float4 gain[EACH] = {};
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (column(i) < a.hidden)
                gain[i] = *(const float4*)(gains + column(i));
        float x[EACH][4], sum = 0.0f;
        await_hidden<EACH>(x, hidden, of, 0, column);
#pragma unroll
        for (int i = 0; i < EACH; i++)
            sum = sum_of_squares(sum, x[i]);
        squares[threadIdx.x] = sum;
        sync_block();
        sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < DECODE_WARPS; warp++)
            sum += squares[warp * WARP + lane_id()];
        const float scale = rms_scale(sum);
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (column(i) < a.hidden)
                store_normed(0, column(i), x[i], scale, gain[i]);
        if (warp_id() == 0)
            zero_tail(inputs, a.hidden);
        return;
    }
    // PART times four values are loaded at once.
    constexpr int ALL = DECODE_WARPS * EACH, PART = 8;
    auto column = [&](int i) { return (i % EACH * DECODE_THREADS + i / EACH * WARP + lane_id()) * 4; };
    prefetch(gains + min(int(threadIdx.x) * 8, a.hidden - 1));
    for (int row = warp_id(); row < row_count; row += DECODE_WARPS) {
        float x[ALL / PART][PART][4], sum = 0.0f;
        // When the first word is there, the others mostly are.
        if (hidden && row < DECODE_WARPS)
            await_first(hidden + row * a.hidden, of);
#pragma unroll
        for (int part = 0; part < ALL / PART; part++) {
            await_hidden<PART>(x[part], hidden, of, row, [&](int i) { return column(part * PART + i); });
#pragma unroll
            for (int i = 0; i < PART; i += EACH) {
                float one = 0.0f;
#pragma unroll
                for (int j = 0; j < EACH; j++)
                    one = sum_of_squares(one, x[part][i + j]);
                sum += one;
            }
        }
        const float scale = rms_scale(sum);
#pragma unroll
        for (int i = 0; i < ALL; i++)
            if (column(i) < a.hidden)
                store_normed(row, column(i), x[i / PART][i % PART], scale, *(const float4*)(gains + column(i)));
        zero_tail(inputs + row * a.row_stride, a.hidden);
    }
}

// Rows as other blocks published them.
template <class T>
__device__ __forceinline__ void Decoder<T>::gather(const FlaggedWord* from, int length) {
    const int words = length / PER_WORD<T>;
    if (row_count == 1) {
        gather_row<2>(inputs, from, words, threadIdx.x, DECODE_THREADS);
        if (warp_id() == 0)
            zero_tail(inputs, length);
    } else {
        // 2^shift warps for each row, at least one.
        const int shift = max(LOG_WARPS - rows_log2, 0);
        const int first = warp_id() & ((1 << shift) - 1);
        for (int row = warp_id() >> shift; row < row_count; row += DECODE_WARPS >> shift) {
            T* to = inputs + row * a.row_stride;
            if (row < DECODE_WARPS)
                await_first(from + row * words, epoch);
            gather_row<8>(to, from + row * words, words, first * WARP + lane_id(), WARP << shift);
            if (first == 0)
                zero_tail(to, length);
        }
    }
    sync_block();
}

// Every `stride`-th pair of words from the `first` on, PAIRS of them at once.
template <class T>
template <int PAIRS>
__device__ __forceinline__ void Decoder<T>::gather_row(T* to, const FlaggedWord* from, int words, int first,
                                                        int stride) {
#pragma unroll 1
    for (int start = first; 2 * start < words; start += PAIRS * stride) {
        uint32_t got[2 * PAIRS];
        auto word = [&](int i) { return 2 * (start + i * stride); };
        await_pairs<PAIRS>(got, epoch, [&](int i) { return word(i) < words ? from + word(i) : nullptr; });
#pragma unroll
        for (int i = 0; i < PAIRS; i++)
            if (word(i) < words)
                store_two(to, word(i), got[2 * i], got[2 * i + 1]);
    }
}
