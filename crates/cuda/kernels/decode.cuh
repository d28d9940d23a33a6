// Whole captions in one launch: layer after layer, token after token, by blocks that stay and wait for each other.
//
// A pass runs up to 16 rows: tokens of several captions, or tokens of one of which all but the first are guesses. A
// row comes out the same, to the bit, whatever else is in the pass: so guesses change nothing but the time.
//
// Its code is run by few warps from one end to the other, once for each layer, so that what counts is how many
// instructions there are on the way: each step is there once, for one row and for many, for the first product and the
// last.

#pragma once

#include "attend.cuh"
#include "rows.cuh"
#include "words.cuh"

// Product of this block's tiles with the rows. What warps have summed goes to `partial`, that of the head to `score`.
template <class T>
__device__ __forceinline__ void Decoder<T>::multiply(const Product& p, Kind kind) {
    const int row = lane_id() / 4;
#pragma unroll 1
    for (int tile = p.first_tile(); tile < p.tiles; tile += p.tile_stride()) {
        float y[4] = {};
        ring.multiply(y, p, values, a.row_stride, count);
        const int beside = lane_id() % 4 * 2;
        if (kind == HEAD) {
            const int col = p.column(tile) + beside;
            judge(0, row, col, y[0], y[1]);
            if (count > 8)
                judge(1, row + 8, col, y[2], y[3]);
        } else {
            float* to = partial + sums_place(tile, p.shift, p.part(), count) + row * TILE + beside;
            *(float2*)to = make_float2(y[0], y[1]);
            if (count > 8)
                *(float2*)(to + 8 * TILE) = make_float2(y[2], y[3]);
        }
    }
    sync_block();
}

// What comes out of a product to those who wait for it, four columns by a thread.
template <class T>
__device__ __forceinline__ void Decoder<T>::give_sums(const Product& p, Kind kind, bool is_first) {
#pragma unroll 1
    for (int i = threadIdx.x; i < p.tiles << (row_shift + 1); i += DECODE_THREADS) {
        const int beside = i % 2 * 4, row = (i / 2) & ((1 << row_shift) - 1), tile = i >> (row_shift + 1);
        const int col = p.column(tile) + beside;
        if (row >= count || col >= p.n)
            continue;
        float y[4] = {};
        const float* from = partial + sums_place(tile, p.shift, 0, count) + row * TILE + beside;
        const int stride = sums_place(0, p.shift, 1, count);
#pragma unroll 4
        for (int part = 0; part < p.parts(); part++, from += stride) {
            const float4 x = *(const float4*)from;
            y[0] += x.x;
            y[1] += x.y;
            y[2] += x.z;
            y[3] += x.w;
        }
        if (kind == QKV)
            give_qkv(row, col, y);
        else if (kind == GATE_UP)
            give_inner(row, col / 2, silu(y[0]) * y[1], silu(y[2]) * y[3]);
        else
            give_states(kind == O ? a.middle : a.states, row, col, tile * TILE + beside, y, is_first && kind == O);
    }
}

// Rows of queries and keys lie so that the halves of a pair are beside each other.
template <class T>
__device__ __forceinline__ void Decoder<T>::give_qkv(int row, int col, float (&y)[4]) {
    if (col < (a.heads + a.kv_heads) * a.head_size) {
        const float2* by = turned + row * a.head_size / 2 + (col & (a.head_size - 1)) / 2;
        const float scale = col < a.heads * a.head_size ? a.scale : 1.0f;
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const float2 pair = turn_pair(y[i], y[i + 1], by[i / 2]);
            y[i] = pair.x * scale;
            y[i + 1] = pair.y * scale;
        }
    }
    const int words = width() / IN_A_WORD<T>;
    give_four<T>(place(a.qkv, words, turn) + row * words + col / IN_A_WORD<T>, y, turn);
}

template <class T>
__device__ __forceinline__ void Decoder<T>::give_inner(int row, int at, float first, float second) {
    const int words = a.inner_size / IN_A_WORD<T>;
    Tagged* to = place(a.inner, words, turn) + row * words + at / IN_A_WORD<T>;
    if constexpr (IN_A_WORD<T> == 2)
        give(to, pack<T>(first, second), turn);
    else
        give_two(to, bits_of(first), bits_of(second), turn);
}

// The states, of which this block keeps its columns.
template <class T>
__device__ __forceinline__ void Decoder<T>::give_states(Tagged* both, int row, int col, int own_col, float (&y)[4],
                                                        bool is_first) {
    float* mine = own + row * own_columns + own_col;
    float x[4];
    if (is_first)
        load_four(embedding(row), col, x);
    else
        for (int i = 0; i < 4; i++)
            x[i] = mine[i];
    for (int i = 0; i < 4; i++)
        mine[i] = y[i] += x[i];
    give_four<float>(place(both, a.hidden, turn) + row * a.hidden + col, y, turn);
}

// All layers, and the head. Who has no part in a product needs nothing for it either.
template <class T>
__device__ __forceinline__ void Decoder<T>::pass() {
    for (int i = 0; i < 2; i++) {
        score[i] = -INFINITY;
        token[i] = NO_TOKEN;
    }
#pragma unroll 1
    for (int product = 0; product <= 4 * a.layers; product++) {
        const Product p = ring.products[product];
        const Kind kind = product == 4 * a.layers ? HEAD : Kind(product % 4);
        if (kind == QKV || kind == HEAD)
            turn++;
        else if (kind == O)
            attend(product / 4);
        if (p.tiles == 0)
            continue;
        if (kind == O || kind == DOWN) {
            const int length = kind == O ? a.heads * a.head_size : a.inner_size;
            take(place(kind == O ? a.attended : a.inner, length / IN_A_WORD<T>, turn), length);
        } else {
            // What came out of the layer before was of the turn before.
            const unsigned of = kind == GATE_UP ? turn : turn - 1;
            const Tagged* states = place(kind == GATE_UP ? a.middle : a.states, a.hidden, of);
            norm(product == 0 ? nullptr : states, of, a.norms + size_t(product / 2) * a.hidden);
        }
        multiply(p, kind);
        if (kind != HEAD)
            give_sums(p, kind, product < 4);
    }
}

template <class T>
__device__ __forceinline__ void Decoder<T>::run() {
    do {
        line_up();
        pass();
        give_best();
        choose();
        advance();
    } while (!a.once && !is_over());
    cp_async_wait<0>();
    if (blockIdx.x == 0 && threadIdx.x == 0)
        *a.turn = turn;
}

template <class T> __device__ __forceinline__ void decode(const Decode& a) {
    SHARED_MEMORY(memory);
    Decoder<T> decoder(a, memory);
    decoder.run();
}
