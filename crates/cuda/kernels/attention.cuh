// FlashAttention-2 (https://arxiv.org/abs/2307.08691) of many rows: bidirectional for the encoder, causal for prompts.
//
// A row comes out the same, to the bit, however many there are: tiles of keys are taken from the first on.

#pragma once

#include "common.cuh"

struct Attention {
    // Queries `[rows, heads, head_size]`, rows `q_stride` apart.
    const void* q;
    int q_stride;
    // The encoder's keys and values, with the stride of queries. Sequences have theirs in the KV cache.
    const void *k, *v;
    void* out;
    const Sequence* sequences;
    int layer;
    // Rows of an image.
    int rows;
    int heads, kv_heads, head_size;
    // Factor of the scores, for an exponential of base 2.
    float scale;
};
static_assert(sizeof(Attention) == 72);

// A block's queries, keys and values.
template <class T> struct AttentionView {
    const T *q, *k, *v;
    T* out;
    size_t kv_stride;
    int rows, keys, past;
    bool causal;

    __device__ AttentionView(const Attention& a) {
        const int head = blockIdx.y, kv_head = head / (a.heads / a.kv_heads), size = a.head_size;
        size_t first;
        if (a.sequences) {
            const Sequence& s = a.sequences[blockIdx.z];
            first = s.first_row;
            rows = s.rows;
            past = s.past;
            keys = past + rows;
            k = (const T*)s.kv_cache + kv_offset(s, a.layer, 0, a.kv_heads, kv_head, size);
            v = (const T*)s.kv_cache + kv_offset(s, a.layer, 1, a.kv_heads, kv_head, size);
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

// A thread's part in loading tiles of keys, values or queries, of `rows` rows in all. Rows beyond the last repeat the
// last, which is finite; they are masked.
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
    const AttentionView<T> view(a);
    const int q0 = blockIdx.x * QUERIES;
    if (q0 >= view.rows)
        return;
    const int lane = lane_id(), row = warp_id() * 16;
    const int last = view.causal ? min(view.keys, view.past + q0 + QUERIES) : view.keys;
    const int steps = ceil_div(last, KEYS);
    using Load = AttentionLoad<SIZE, T>;
    const Load load_k{view.k, view.kv_stride, view.keys, a.head_size};
    const Load load_v{view.v, view.kv_stride, view.keys, a.head_size};
    auto load = [&](int step) {
        if (step < steps) {
            T* tile = tiles + step % 2 * 2 * TILE;
            load_k(tile, step * KEYS);
            load_v(tile + TILE, step * KEYS);
        }
        cp_async_commit();
    };
    Load{view.q, size_t(a.q_stride), view.rows, a.head_size}(qs, q0);
    load(0);

    uint32_t qf[SIZE / 16][4];
    float out[NT][4] = {};
    // Of row lane / 4 and of row lane / 4 + 8. The maximum is unscaled.
    float max_score[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
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

        // Most tiles need no mask.
        if ((step + 1) * KEYS > (view.causal ? view.past + q0 + row + 1 : view.keys)) {
            const int query = view.past + q0 + row + lane / 4;
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int key = step * KEYS + j * 8 + lane % 4 * 2 + i % 2;
                    if (key >= view.keys || (view.causal && key > query + i / 2 * 8))
                        scores[j][i] = -INFINITY;
                }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float h = max_score[i];
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
                h = fmaxf(h, fmaxf(scores[j][2 * i], scores[j][2 * i + 1]));
            h = fmaxf(h, shuffle_xor(h, 1));
            h = fmaxf(h, shuffle_xor(h, 2));
            // In a row beyond the last all keys are masked.
            const float base = h == -INFINITY ? 0.0f : h * a.scale;
            const float rescale = exp2_fast(fmaf(max_score[i], a.scale, -base));
            max_score[i] = h;
            total[i] *= rescale;
#pragma unroll
            for (int j = 0; j < NT; j++) {
                out[j][2 * i] *= rescale;
                out[j][2 * i + 1] *= rescale;
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
        if (query >= view.rows)
            continue;
        const float by = 1.0f / total[i];
        T* to = view.out + size_t(query) * a.heads * a.head_size;
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
    constexpr int PER_LANE = 4;
    const AttentionView<float> view(a);
    const int query = blockIdx.x * 4 + warp_id(), lane = lane_id(), size = a.head_size;
    if (query >= view.rows)
        return;
    const float* q = view.q + size_t(query) * a.q_stride;
    const int keys = view.causal ? view.past + query + 1 : view.keys;
    float out[PER_LANE] = {}, max_score = -INFINITY, total = 0.0f;
    for (int first = 0; first < keys; first += WARP) {
        const int key = first + lane;
        float score = -INFINITY;
        if (key < keys) {
            const float* k = view.k + key * view.kv_stride;
            score = 0.0f;
            for (int i = 0; i < size; i++)
                score = fmaf(q[i], k[i], score);
            score *= a.scale;
        }
        float new_max = fmaxf(max_score, score);
        for (int mask = 16; mask > 0; mask /= 2)
            new_max = fmaxf(new_max, shuffle_xor(new_max, mask));
        const float weight = exp2f(score - new_max), rescale = exp2f(max_score - new_max);
        max_score = new_max;
        total = total * rescale + warp_sum(weight);
        for (int i = 0; i < PER_LANE; i++)
            out[i] *= rescale;
        for (int j = 0; j < min(WARP, keys - first); j++) {
            const float w = shuffle(weight, j);
            const float* v = view.v + (first + j) * view.kv_stride;
#pragma unroll
            for (int i = 0; i < PER_LANE; i++)
                if (i * WARP + lane < size)
                    out[i] = fmaf(w, v[i * WARP + lane], out[i]);
        }
    }
    float* to = view.out + size_t(query) * a.heads * size;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        if (i * WARP + lane < size)
            to[i * WARP + lane] = out[i] / total;
}
