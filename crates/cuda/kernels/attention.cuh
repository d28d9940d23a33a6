// Attention of many rows, a tile of queries at a time over tiles of keys, without the scores in memory
// (https://arxiv.org/abs/2307.08691). For the encoder, where all see all, and for prompts.
//
// A row comes out the same however many there are: keys are taken in tiles from the first on.

#pragma once

#include "common.cuh"

struct Attention {
    // Queries of a row, its heads in a row.
    const void* q;
    int q_stride;
    // Of the encoder, with the stride of queries; unless there are sequences, which have a cache.
    const void *k, *v;
    void* out;
    const Sequence* sequences;
    int layer;
    // Rows of a picture.
    int rows;
    int heads, kv_heads, head_size;
    // By which scores are multiplied, 2 being the base of the exponential.
    float scale;
};
static_assert(sizeof(Attention) == 72);

// Where a block's queries, keys and values are.
template <class T> struct Seen {
    const T *q, *k, *v;
    T* out;
    size_t kv_stride;
    int rows, keys, past;
    bool causal;

    __device__ Seen(const Attention& a) {
        const int head = blockIdx.y, kv_head = head / (a.heads / a.kv_heads), size = a.head_size;
        size_t first;
        if (a.sequences) {
            const Sequence& s = a.sequences[blockIdx.z];
            first = s.first_row;
            rows = s.rows;
            past = s.past;
            keys = past + rows;
            k = (const T*)s.cache + cache_place(s, a.layer, 0, a.kv_heads, kv_head, size);
            v = (const T*)s.cache + cache_place(s, a.layer, 1, a.kv_heads, kv_head, size);
            kv_stride = size;
            causal = true;
        } else {
            first = size_t(blockIdx.z) * a.rows;
            rows = keys = a.rows;
            past = 0;
            kv_stride = a.q_stride;
            k = (const T*)a.k + first * kv_stride + size_t(kv_head) * size;
            v = (const T*)a.v + first * kv_stride + size_t(kv_head) * size;
            causal = false;
        }
        q = (const T*)a.q + first * a.q_stride + size_t(head) * size;
        out = (T*)a.out + (first * a.heads + head) * size;
    }
};

constexpr int QUERIES = 64, KEYS = 64;

// A thread's part of tiles of keys, values or queries, of so many rows in all. Rows beyond the last are the last again,
// which are no numbers that could spoil what they are multiplied with; nobody counts them.
template <int SIZE, class T> struct AttentionLoad {
    static constexpr int CHUNKS = SIZE / 8, EACH = KEYS * CHUNKS / (4 * WARP);
    static_assert(KEYS * CHUNKS % (4 * WARP) == 0);
    const T* from;
    size_t stride;
    int rows, size;

    __device__ __forceinline__ void operator()(T* to, int first) const {
        if (4 * WARP % CHUNKS == 0 && size == SIZE && first + KEYS <= rows) {
            constexpr int APART = 4 * WARP / CHUNKS;
            const int row = threadIdx.x / CHUNKS, col = threadIdx.x % CHUNKS * 8;
            const T* source = from + (first + row) * stride + col;
#pragma unroll
            for (int i = 0; i < EACH; i++, source += APART * stride)
                cp_async16(to + (row + i * APART) * (SIZE + 8) + col, source);
            return;
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int chunk = threadIdx.x + i * 4 * WARP, row = chunk / CHUNKS, col = chunk % CHUNKS * 8;
            const T* source = from + min(first + row, rows - 1) * stride + col;
            cp_async16(to + row * (SIZE + 8) + col, col < size ? source : from, col < size);
        }
    }
};

// SIZE is that of a head or the next larger multiple of 16. Four warps with 16 queries each.
template <class T, int SIZE> __device__ __forceinline__ void attention(const Attention& a) {
    constexpr int STRIDE = SIZE + 8, TILE = KEYS * STRIDE, NT = SIZE / 8;
    SHARED_MEMORY(memory);
    T* qs = (T*)memory;
    T* tiles = qs + TILE;
    const Seen<T> seen(a);
    const int q0 = blockIdx.x * QUERIES;
    if (q0 >= seen.rows)
        return;
    const int lane = lane_id(), row = warp_id() * 16;
    const int last = seen.causal ? min(seen.keys, seen.past + q0 + QUERIES) : seen.keys;
    const int steps = ceil_div(last, KEYS);
    using Load = AttentionLoad<SIZE, T>;
    const Load load_k{seen.k, seen.kv_stride, seen.keys, a.head_size};
    const Load load_v{seen.v, seen.kv_stride, seen.keys, a.head_size};
    auto load = [&](int step) {
        if (step < steps) {
            T* tile = tiles + step % 2 * 2 * TILE;
            load_k(tile, step * KEYS);
            load_v(tile + TILE, step * KEYS);
        }
        cp_async_commit();
    };
    Load{seen.q, size_t(a.q_stride), seen.rows, a.head_size}(qs, q0);
    load(0);

    uint32_t qf[SIZE / 16][4];
    float out[NT][4] = {};
    // Of row lane / 4, and of the eighth behind it; the highest without the scale.
    float highest[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    for (int step = 0; step < steps; step++) {
        cp_async_wait<0>();
        sync_block();
        load(step + 1);
        if (step == 0)
#pragma unroll
            for (int k = 0; k < SIZE / 16; k++)
                ldmatrix_x4(qf[k], qs + (row + lane % 16) * STRIDE + k * 16 + lane / 16 * 8);
        const T* ks = tiles + step % 2 * 2 * TILE;
        const T* vs = ks + TILE;

        float scores[KEYS / 8][4] = {};
#pragma unroll
        for (int k = 0; k < SIZE / 16; k++)
#pragma unroll
            for (int j = 0; j < KEYS / 16; j++) {
                uint32_t kf[4];
                const int key = (2 * j + lane / 16) * 8 + lane % 8;
                ldmatrix_x4(kf, ks + key * STRIDE + k * 16 + lane / 8 % 2 * 8);
                const uint32_t even[2] = {kf[0], kf[1]}, odd[2] = {kf[2], kf[3]};
                mma<T>(scores[2 * j], qf[k], even);
                mma<T>(scores[2 * j + 1], qf[k], odd);
            }

        // Most tiles are seen as a whole.
        if ((step + 1) * KEYS > (seen.causal ? seen.past + q0 + row + 1 : seen.keys)) {
            const int query = seen.past + q0 + row + lane / 4;
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int key = step * KEYS + j * 8 + lane % 4 * 2 + i % 2;
                    if (key >= seen.keys || (seen.causal && key > query + i / 2 * 8))
                        scores[j][i] = -INFINITY;
                }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float h = highest[i];
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
                h = fmaxf(h, fmaxf(scores[j][2 * i], scores[j][2 * i + 1]));
            h = fmaxf(h, shuffle_xor(h, 1));
            h = fmaxf(h, shuffle_xor(h, 2));
            // A row beyond the last has seen nothing.
            const float base = h == -INFINITY ? 0.0f : h * a.scale;
            const float shrink = exp2_fast(fmaf(highest[i], a.scale, -base));
            highest[i] = h;
            total[i] *= shrink;
#pragma unroll
            for (int j = 0; j < NT; j++) {
                out[j][2 * i] *= shrink;
                out[j][2 * i + 1] *= shrink;
            }
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    float& score = scores[j][2 * i + c];
                    score = exp2_fast(fmaf(score, a.scale, -base));
                    total[i] += score;
                }
        }
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
            const float(&left)[4] = scores[2 * k], (&right)[4] = scores[2 * k + 1];
            const uint32_t weights[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]),
                                         pack<T>(right[0], right[1]), pack<T>(right[2], right[3])};
#pragma unroll
            for (int j = 0; j < SIZE / 16; j++) {
                uint32_t vf[4];
                ldmatrix_x4_trans(vf, vs + (k * 16 + lane % 16) * STRIDE + j * 16 + lane / 16 * 8);
                const uint32_t even[2] = {vf[0], vf[1]}, odd[2] = {vf[2], vf[3]};
                mma<T>(out[2 * j], weights, even);
                mma<T>(out[2 * j + 1], weights, odd);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        total[i] += shuffle_xor(total[i], 1);
        total[i] += shuffle_xor(total[i], 2);
        const int query = q0 + row + lane / 4 + i * 8;
        if (query >= seen.rows)
            continue;
        const float by = 1.0f / total[i];
        T* to = seen.out + size_t(query) * a.heads * a.head_size;
#pragma unroll
        for (int j = 0; j < NT; j++) {
            const int col = j * 8 + lane % 4 * 2;
            if (col < a.head_size)
                store_pair(to + col, out[j][2 * i] * by, out[j][2 * i + 1] * by);
        }
    }
}

// In f32: a warp for each query, a lane for each of 32 keys, then for each of 32 values of a head.
__device__ __forceinline__ void attention_f32(const Attention& a) {
    constexpr int MOST = 4;
    const Seen<float> seen(a);
    const int query = blockIdx.x * 4 + warp_id(), lane = lane_id(), size = a.head_size;
    if (query >= seen.rows)
        return;
    const float* q = seen.q + size_t(query) * a.q_stride;
    const int keys = seen.causal ? seen.past + query + 1 : seen.keys;
    float out[MOST] = {}, highest = -INFINITY, total = 0.0f;
    for (int first = 0; first < keys; first += WARP) {
        const int key = first + lane;
        float score = -INFINITY;
        if (key < keys) {
            const float* k = seen.k + key * seen.kv_stride;
            score = 0.0f;
            for (int i = 0; i < size; i++)
                score = fmaf(q[i], k[i], score);
            score *= a.scale;
        }
        float now = fmaxf(highest, score);
        for (int mask = 16; mask > 0; mask /= 2)
            now = fmaxf(now, shuffle_xor(now, mask));
        const float weight = exp2f(score - now), shrink = exp2f(highest - now);
        highest = now;
        total = total * shrink + warp_sum(weight);
        for (int i = 0; i < MOST; i++)
            out[i] *= shrink;
        for (int j = 0; j < min(WARP, keys - first); j++) {
            const float w = shuffle(weight, j);
            const float* v = seen.v + (first + j) * seen.kv_stride;
#pragma unroll
            for (int i = 0; i < MOST; i++)
                if (i * WARP + lane < size)
                    out[i] = fmaf(w, v[i * WARP + lane], out[i]);
        }
    }
    float* to = seen.out + size_t(query) * a.heads * size;
#pragma unroll
    for (int i = 0; i < MOST; i++)
        if (i * WARP + lane < size)
            to[i * WARP + lane] = out[i] / total;
}
