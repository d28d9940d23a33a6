// Rows for the decoder's next product: normed, or as others give them.

#pragma once

#include "decoder.cuh"

// States of a row of some turn, or its token's embedding: N times four values, where `place(i)` says.
template <class T>
template <int N, class P>
__device__ __forceinline__ void Decoder<T>::await_states(float (&x)[N][4], const Tagged* states, unsigned of, int row,
                                                         P place) {
    if (states) {
        const Tagged* from = states + row * a.hidden;
        uint32_t words[4 * N];
        await_pairs<2 * N>(words, of, [&](int i) -> const Tagged* {
            const int at = place(i / 2);
            return at < a.hidden ? from + at + i % 2 * 2 : nullptr;
        });
#pragma unroll
        for (int i = 0; i < 4 * N; i++)
            x[i / 4][i % 4] = float_of(words[i]);
    } else {
        const T* from = embedding(row);
#pragma unroll
        for (int i = 0; i < N; i++)
            load_four(from, place(i) < a.hidden ? place(i) : -1, x[i]);
    }
}

__device__ __forceinline__ float sum_of_squares(float sum, const float (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        sum = fmaf(x[i], x[i], sum);
    return sum;
}

template <class T>
__device__ __forceinline__ float Decoder<T>::factor(float squares) const {
    return rsqrtf(fmaf(warp_sum(squares), of_hidden, a.epsilon));
}

// Four values of a row, by the factor of its norm and gains.
template <class T>
__device__ __forceinline__ void Decoder<T>::put(int row, int at, const float (&x)[4], float factor, float4 gain) {
    const float y[4] = {x[0] * factor * gain.x, x[1] * factor * gain.y, x[2] * factor * gain.z, x[3] * factor * gain.w};
    put_four(values + row * a.row_stride, at, y);
}

// By a warp, up to a whole step: so that it is all the same which weights are there.
template <class T>
__device__ __forceinline__ void Decoder<T>::clear(T* row, int length) {
    const int at = length + lane_id();
    if (length % STEP != 0 && at < ceil_div(length, STEP) * STEP)
        row[at] = from_float<T>(0.0f);
}

// Rows to the product: RMS norm of the states of some turn, or of the tokens' embeddings.
template <class T>
__device__ __forceinline__ void Decoder<T>::norm(const Tagged* states, unsigned of, const float* gains) {
    if (a.hidden <= 4 * DECODE_THREADS)
        norm<1>(states, of, gains);
    else
        norm<2>(states, of, gains);
    sync_block();
}

// A lane's sum is that of EACH times four values of the first warp's part of the row, then of the next's. One row is
// summed by all warps, of many each by one, and it comes out the same.
template <class T>
template <int EACH>
__device__ __forceinline__ void Decoder<T>::norm(const Tagged* states, unsigned of, const float* gains) {
    if (count == 1) {
        auto place = [&](int i) { return (i * DECODE_THREADS + int(threadIdx.x)) * 4; };
        float4 gain[EACH] = {};
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (place(i) < a.hidden)
                gain[i] = *(const float4*)(gains + place(i));
        float x[EACH][4], sum = 0.0f;
        await_states<EACH>(x, states, of, 0, place);
#pragma unroll
        for (int i = 0; i < EACH; i++)
            sum = sum_of_squares(sum, x[i]);
        squares[threadIdx.x] = sum;
        sync_block();
        sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < DECODE_WARPS; warp++)
            sum += squares[warp * WARP + lane_id()];
        const float by = factor(sum);
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (place(i) < a.hidden)
                put(0, place(i), x[i], by, gain[i]);
        if (warp_id() == 0)
            clear(values, a.hidden);
        return;
    }
    // So many times four values are waited for at once.
    constexpr int ALL = DECODE_WARPS * EACH, PART = 8;
    auto place = [&](int i) { return (i % EACH * DECODE_THREADS + i / EACH * WARP + lane_id()) * 4; };
    prefetch(gains + min(int(threadIdx.x) * 8, a.hidden - 1));
    for (int row = warp_id(); row < count; row += DECODE_WARPS) {
        float x[ALL / PART][PART][4], sum = 0.0f;
        // Where the first is, others mostly are.
        if (states && row < DECODE_WARPS)
            await_first(states + row * a.hidden, of);
#pragma unroll
        for (int part = 0; part < ALL / PART; part++) {
            await_states<PART>(x[part], states, of, row, [&](int i) { return place(part * PART + i); });
#pragma unroll
            for (int i = 0; i < PART; i += EACH) {
                float one = 0.0f;
#pragma unroll
                for (int j = 0; j < EACH; j++)
                    one = sum_of_squares(one, x[part][i + j]);
                sum += one;
            }
        }
        const float by = factor(sum);
#pragma unroll
        for (int i = 0; i < ALL; i++)
            if (place(i) < a.hidden)
                put(row, place(i), x[i / PART][i % PART], by, *(const float4*)(gains + place(i)));
        clear(values + row * a.row_stride, a.hidden);
    }
}

// Rows to the product as others give them.
template <class T>
__device__ __forceinline__ void Decoder<T>::take(const Tagged* from, int length) {
    const int words = length / IN_A_WORD<T>;
    if (count == 1) {
        take_row<2>(values, from, words, threadIdx.x, DECODE_THREADS);
        if (warp_id() == 0)
            clear(values, length);
    } else {
        // All warps for the rows, or one for each of many: 2^shift for one.
        const int shift = max(LOG_WARPS - row_shift, 0);
        const int first = warp_id() & ((1 << shift) - 1);
        for (int row = warp_id() >> shift; row < count; row += DECODE_WARPS >> shift) {
            T* to = values + row * a.row_stride;
            if (row < DECODE_WARPS)
                await_first(from + row * words, turn);
            take_row<8>(to, from + row * words, words, first * WARP + lane_id(), WARP << shift);
            if (first == 0)
                clear(to, length);
        }
    }
    sync_block();
}

// Two words of every `stride` times two, MOST times two at once.
template <class T>
template <int MOST>
__device__ __forceinline__ void Decoder<T>::take_row(T* to, const Tagged* from, int words, int first, int stride) {
#pragma unroll 1
    for (int start = first; 2 * start < words; start += MOST * stride) {
        uint32_t got[2 * MOST];
        auto place = [&](int i) { return 2 * (start + i * stride); };
        await_pairs<MOST>(got, turn, [&](int i) { return place(i) < words ? from + place(i) : nullptr; });
#pragma unroll
        for (int i = 0; i < MOST; i++)
            if (place(i) < words)
                put_two(to, place(i), got[2 * i], got[2 * i + 1]);
    }
}
