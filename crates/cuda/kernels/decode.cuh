// Whole sequences in one launch: layer after layer, token after token, in a persistent cooperative kernel.
//
// A pass runs up to 16 rows: tokens of several sequences, or of one sequence a token and its draft tokens. A row comes
// out the same, to the bit, whatever else is in the pass, so draft tokens change nothing but the time.
//
// Few warps run this code from one end to the other for each layer, so the number of instructions is what counts: each
// step exists once, for one row and for many, for the first product and the last.

#pragma once

#include "decode_attention.cuh"
#include "decode_inputs.cuh"
#include "decode_tokens.cuh"

// Products of this block's tiles with the rows, to `partial`, or for the LM head to `logit`.
template <class T>
__device__ __forceinline__ void Decoder<T>::multiply(const Matrix& m, Projection projection) {
    const int row = lane_id() / 4;
#pragma unroll 1
    for (int tile = m.first_tile(); tile < m.tiles; tile += m.tile_stride()) {
        float y[4] = {};
        ring.multiply(y, m, inputs, a.row_stride, row_count);
        const int tile_col = lane_id() % 4 * 2;
        if (projection == LM_HEAD) {
            const int col = m.column(tile) + tile_col;
            update_best(0, row, col, y[0], y[1]);
            if (row_count > 8)
                update_best(1, row + 8, col, y[2], y[3]);
        } else {
            float* to = partial + sums_offset(tile, m.split_log2, m.split(), row_count) + row * TILE + tile_col;
            *(float2*)to = make_float2(y[0], y[1]);
            if (row_count > 8)
                *(float2*)(to + 8 * TILE) = make_float2(y[2], y[3]);
        }
    }
    sync_block();
}

// Adds the partial sums of a product and publishes what follows from them, four columns by a thread.
template <class T>
__device__ __forceinline__ void Decoder<T>::publish_sums(const Matrix& m, Projection projection, bool is_first_layer) {
#pragma unroll 1
    for (int i = threadIdx.x; i < m.tiles << (rows_log2 + 1); i += DECODE_THREADS) {
        const int tile_col = i % 2 * 4, row = (i / 2) & ((1 << rows_log2) - 1), tile = i >> (rows_log2 + 1);
        const int col = m.column(tile) + tile_col;
        if (row >= row_count || col >= m.n)
            continue;
        float y[4] = {};
        const float* from = partial + sums_offset(tile, m.split_log2, 0, row_count) + row * TILE + tile_col;
        const int stride = sums_offset(0, m.split_log2, 1, row_count);
#pragma unroll 4
        for (int split = 0; split < m.splits(); split++, from += stride) {
            const float4 x = *(const float4*)from;
            y[0] += x.x;
            y[1] += x.y;
            y[2] += x.z;
            y[3] += x.w;
        }
        if (projection == QKV)
            publish_qkv(row, col, y);
        else if (projection == GATE_UP)
            publish_mlp_inner(row, col / 2, silu(y[0]) * y[1], silu(y[2]) * y[3]);
        else
            publish_hidden(projection == O ? a.attn_hidden : a.mlp_hidden, row, col, tile * TILE + tile_col, y,
                           is_first_layer && projection == O);
    }
}

// RoPE. The weights' rows are ordered so that the pair that it rotates is adjacent.
template <class T>
__device__ __forceinline__ void Decoder<T>::publish_qkv(int row, int col, float (&y)[4]) {
    if (col < (a.heads + a.kv_heads) * a.head_size) {
        const float2* by = rotations + row * a.head_size / 2 + (col & (a.head_size - 1)) / 2;
        const float scale = col < a.heads * a.head_size ? a.scale : 1.0f;
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const float2 pair = rotate(y[i], y[i + 1], by[i / 2]);
            y[i] = pair.x * scale;
            y[i + 1] = pair.y * scale;
        }
    }
    const int words = qkv_length() / PER_WORD<T>;
    publish_four<T>(epoch_slot(a.qkv, words, epoch) + row * words + col / PER_WORD<T>, y, epoch);
}

template <class T>
__device__ __forceinline__ void Decoder<T>::publish_mlp_inner(int row, int at, float first, float second) {
    const int words = a.intermediate / PER_WORD<T>;
    FlaggedWord* to = epoch_slot(a.mlp_inner, words, epoch) + row * words + at / PER_WORD<T>;
    if constexpr (PER_WORD<T> == 2)
        publish(to, pack<T>(first, second), epoch);
    else
        publish_two(to, bits_of(first), bits_of(second), epoch);
}

// Hidden states with the residual added. The block keeps its own columns of them.
template <class T>
__device__ __forceinline__ void Decoder<T>::publish_hidden(FlaggedWord* both, int row, int col, int own_col,
                                                           float (&y)[4], bool add_embedding) {
    float* mine = own_hidden + row * own_columns + own_col;
    float x[4];
    if (add_embedding)
        load_four(embedding(row), col, x);
    else
        for (int i = 0; i < 4; i++)
            x[i] = mine[i];
    for (int i = 0; i < 4; i++)
        mine[i] = y[i] += x[i];
    publish_four<float>(epoch_slot(both, a.hidden, epoch) + row * a.hidden + col, y, epoch);
}

// All layers, and the LM head. A block without a part in a product needs no inputs for it.
template <class T>
__device__ __forceinline__ void Decoder<T>::pass() {
    for (int i = 0; i < 2; i++) {
        logit[i] = -INFINITY;
        token[i] = NO_TOKEN;
    }
#pragma unroll 1
    for (int i = 0; i <= 4 * a.layers; i++) {
        const Matrix m = ring.matrices[i];
        const Projection projection = i == 4 * a.layers ? LM_HEAD : Projection(i % 4);
        if (projection == QKV || projection == LM_HEAD)
            epoch++;
        else if (projection == O)
            attend(i / 4);
        if (m.tiles == 0)
            continue;
        if (projection == O || projection == DOWN) {
            const int length = projection == O ? a.heads * a.head_size : a.intermediate;
            gather(epoch_slot(projection == O ? a.attn_out : a.mlp_inner, length / PER_WORD<T>, epoch), length);
        } else {
            // The layer before published in the epoch before.
            const unsigned of = projection == GATE_UP ? epoch : epoch - 1;
            const FlaggedWord* hidden = epoch_slot(projection == GATE_UP ? a.attn_hidden : a.mlp_hidden, a.hidden, of);
            norm(i == 0 ? nullptr : hidden, of, a.norms + size_t(i / 2) * a.hidden);
        }
        multiply(m, projection);
        if (projection != LM_HEAD)
            publish_sums(m, projection, i < 4);
    }
}

template <class T>
__device__ __forceinline__ void Decoder<T>::run() {
    do {
        schedule_rows();
        pass();
        publish_candidates();
        choose_tokens();
        accept_tokens();
    } while (!a.single_pass && !all_done());
    cp_async_wait<0>();
    if (blockIdx.x == 0 && threadIdx.x == 0)
        *a.epoch = epoch;
}

template <class T> __device__ __forceinline__ void decode(const Decode& a) {
    SHARED_MEMORY(memory);
    Decoder<T> decoder(a, memory);
    decoder.run();
}
