// Whole captions in one launch: layer after layer, token after token, by blocks that stay and wait for each other.
//
// A pass runs up to 16 rows: tokens of several captions, or tokens of one of which all but the first are guesses. A
// row comes out the same, to the bit, whatever else is in the pass: so guesses change nothing but the time.

#pragma once

#include "exchange.cuh"
#include "pointwise.cuh"
#include "ring.cuh"

constexpr int MOST_STOPS = 8;

struct Decode {
    // Four of each layer, then that of the head.
    const Product* products;
    // Two norms of each layer, then the last.
    const float* norms;
    const float* frequencies;
    const void* table;
    const Sequence* sequences;
    // Between the blocks, each for even and for odd turns: states before and after the second half of a layer
    // `[16, hidden]`, queries, keys and values, attention's and the gated values.
    Tagged* middle;
    Tagged* states;
    Tagged* qkv;
    Tagged* attended;
    Tagged* inner;
    // The best of each block's tokens for each row, scores and tokens, `[2, blocks, 16]`; then which captions shall end.
    Tagged* best;
    // Scores of all tokens, `[16, vocabulary]`, if somebody wants them.
    float* scores;
    // The last turn.
    unsigned* turn;
    int count, layers, hidden, heads, kv_heads, head_size, inner_size, vocabulary;
    // Rows that a pass can have, by the memory that there is for them.
    int most_rows;
    // Shared memory of a row of the longest product's values, in values.
    int row_stride;
    // Shared memory for sums that warps share, in floats.
    int partial;
    // One pass and no more.
    int once;
    int stops[MOST_STOPS];
    float epsilon, scale;
};
static_assert(sizeof(Decode) == 192);

// Where a sequence stands; each block keeps its own account.
struct Standing {
    int token, position, made, done;
    // Its rows in this pass.
    int first, rows;
};

struct PassRow {
    int sequence, position, token;
};

constexpr int NO_TOKEN = 0x7fffffff;

// Four values from `at` on; zeros if that is below zero.
template <class T> __device__ __forceinline__ void load_four(const T* from, int at, float (&to)[4]) {
    uint2 x = make_uint2(0, 0);
    if (at >= 0)
        x = *(const uint2*)(from + at);
    const float2 first = unpack<T>(x.x), second = unpack<T>(x.y);
    to[0] = first.x;
    to[1] = first.y;
    to[2] = second.x;
    to[3] = second.y;
}

template <> __device__ __forceinline__ void load_four<float>(const float* from, int at, float (&to)[4]) {
    float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (at >= 0)
        x = *(const float4*)(from + at);
    to[0] = x.x;
    to[1] = x.y;
    to[2] = x.z;
    to[3] = x.w;
}

// Eight numbers beside each other, as memory has them.
template <class T> struct Eight {
    static constexpr int WORDS = 8 / IN_A_WORD<T>;
    uint32_t words[WORDS];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < WORDS; i++)
            words[i] = 0;
    }

    __device__ __forceinline__ void load(const T* from) {
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) {
            const uint4 x = load_fresh((const uint4*)from + i / 4);
            words[i] = x.x;
            words[i + 1] = x.y;
            words[i + 2] = x.z;
            words[i + 3] = x.w;
        }
    }

    __device__ __forceinline__ void store(T* to) const {
#pragma unroll
        for (int i = 0; i < WORDS; i += 4)
            ((uint4*)to)[i / 4] = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }

    // Value 8 · `at` and seven behind it of those that `from` are.
    __device__ __forceinline__ void await(const Tagged* from, unsigned turn) {
        await_pairs<WORDS / 2>(words, turn, [&](int i) { return from + 2 * i; });
    }

    __device__ __forceinline__ void widen(float (&to)[8]) const {
#pragma unroll
        for (int i = 0; i < 8; i++)
            to[i] = value(words, i, T());
    }

    static __device__ __forceinline__ float value(const uint32_t* words, int i, float) { return float_of(words[i]); }
    template <class H> static __device__ __forceinline__ float value(const uint32_t* words, int i, H) {
        const float2 pair = unpack<H>(words[i / 2]);
        return i % 2 ? pair.y : pair.x;
    }
};

// What the kernel does for each product: of which there are four of each layer, then the head.
enum Kind { QKV, O, GATE_UP, DOWN, HEAD };

// Its code is run by few warps from one end to the other, once for each layer, so that what counts is how many
// instructions there are on the way: each step is there once, for one row and for many, for the first product and the
// last.
template <class T> struct Decoder {
    const Decode& a;
    // Parts of the shared memory: cosine and sine of each row's position, this block's columns of the states, each
    // thread's sum of squares, what each warp has seen of keys and values, sums that warps share and other small things,
    // rows for the next product.
    float2* turned;
    float* own;
    float* squares;
    float* seen;
    Sequence* sequences;
    Standing* standing;
    PassRow* rows;
    float* partial;
    T* values;
    Ring<T> ring;
    int own_columns;
    float of_hidden;
    int count = 0;
    unsigned turn;
    // The best of a lane's columns of the head: of row lane / 4, and the eighth behind it.
    float score[2];
    int token[2];

    __device__ __forceinline__ Decoder(const Decode& a, unsigned char* memory)
        : a(a), ring(memory, a.products, 4 * a.layers + 1) {
        int at = Ring<T>::BYTES + (4 * a.layers + 1) * sizeof(Product);
        // An offset, so that the compiler still knows that it is shared memory.
        auto part = [&](auto*& start, int values, int alignment = 16) {
            at = ceil_div(at, alignment) * alignment;
            start = (decltype(start + 0))(memory + at);
            at += values * sizeof(*start);
        };
        own_columns = ceil_div(ceil_div(a.hidden, TILE), gridDim.x) * TILE;
        part(turned, MOST_ROWS * a.head_size / 2);
        part(own, MOST_ROWS * own_columns);
        part(squares, DECODE_THREADS);
        part(seen, DECODE_WARPS * seen_stride());
        part(sequences, MOST_ROWS);
        part(standing, MOST_ROWS);
        part(rows, MOST_ROWS);
        part(partial, a.partial);
        part(values, 0, 128);
        for (int i = threadIdx.x; i < a.count; i += DECODE_THREADS) {
            const Sequence& s = sequences[i] = a.sequences[i];
            standing[i] = {s.token, s.position, 0, 0, 0, 0};
        }
        turn = *a.turn;
        of_hidden = 1.0f / a.hidden;
        sync_block();
    }

    __device__ int width() const { return (a.heads + 2 * a.kv_heads) * a.head_size; }
    __device__ int seen_stride() const { return a.head_size + 4; }

    // Where the words of a turn are, of rows of so many.
    __device__ __forceinline__ Tagged* place(Tagged* both, int words, unsigned of) const {
        return both + size_t(of % 2) * MOST_ROWS * words;
    }

    __device__ __forceinline__ const T* embedding(int row) const {
        return (const T*)a.table + size_t(rows[row].token) * a.hidden;
    }

    // States of a row of some turn, or its token's embedding: N times four values, where `place(i)` says.
    template <int N, class P>
    __device__ __forceinline__ void await_states(float (&x)[N][4], const Tagged* states, unsigned of, int row, P place) {
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

    static __device__ __forceinline__ float sum_of_squares(float sum, const float (&x)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            sum = fmaf(x[i], x[i], sum);
        return sum;
    }

    __device__ __forceinline__ float factor(float squares) const {
        return rsqrtf(fmaf(warp_sum(squares), of_hidden, a.epsilon));
    }

    // Four values of a row, by the factor of its norm and gains.
    __device__ __forceinline__ void put(int row, int at, const float (&x)[4], float factor, float4 gain) {
        const float y[4] = {x[0] * factor * gain.x, x[1] * factor * gain.y, x[2] * factor * gain.z, x[3] * factor * gain.w};
        put_four(values + row * a.row_stride, at, y);
    }

    // By a warp, up to a whole step: so that it is all the same which weights are there.
    __device__ __forceinline__ void clear(T* row, int length) {
        const int at = length + lane_id();
        if (length % STEP != 0 && at < ceil_div(length, STEP) * STEP)
            row[at] = from_float<T>(0.0f);
    }

    // Rows to the product: RMS norm of the states of some turn, or of the tokens' embeddings.
    __device__ __forceinline__ void norm(const Tagged* states, unsigned of, const float* gains) {
        if (a.hidden <= 4 * DECODE_THREADS)
            norm<1>(states, of, gains);
        else
            norm<2>(states, of, gains);
        sync_block();
    }

    // A lane's sum is that of EACH times four values of the first warp's part of the row, then of the next's. One row is
    // summed by all warps, of many each by one, and it comes out the same.
    template <int EACH> __device__ __forceinline__ void norm(const Tagged* states, unsigned of, const float* gains) {
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
    __device__ __forceinline__ void take(const Tagged* from, int length) {
        const int words = length / IN_A_WORD<T>;
        if (count == 1) {
            take_row<2>(values, from, words, threadIdx.x, DECODE_THREADS);
            if (warp_id() == 0)
                clear(values, length);
        } else {
            // All warps for the rows, or one for each of many: 2^shift for one.
            int shift = LOG_WARPS;
            for (int rows = 1; rows < count && shift > 0; rows *= 2)
                shift--;
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
    template <int MOST>
    __device__ __forceinline__ void take_row(T* to, const Tagged* from, int words, int first, int stride) {
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

    // A query head of a row by a block: keys and values of before from the cache, those of this pass from `qkv`. Blocks
    // take part from the last on, which have the least to multiply.
    __device__ __forceinline__ void attend(int layer) {
        for (int item = gridDim.x - 1 - blockIdx.x; item < count * a.heads; item += gridDim.x) {
            attend(layer, item / a.heads, item % a.heads);
            // Before somebody writes to `seen` again.
            if (item + int(gridDim.x) < count * a.heads)
                sync_block();
        }
    }

    __device__ __forceinline__ void attend(int layer, int row, int head) {
        // Keys that a lane sees at once.
        constexpr int MOST = 4;
        const int size = a.head_size, per_key = size / 8, lane = lane_id(), at = lane % per_key * 8;
        const int queries = a.heads / a.kv_heads, kv_head = head / queries;
        const int words = width() / IN_A_WORD<T>;
        const Tagged* qkv = place(a.qkv, words, turn);
        const Sequence& s = sequences[rows[row].sequence];
        const int first = standing[rows[row].sequence].first, position = rows[row].position;
        const int past = position - (row - first);
        T* keys = (T*)s.cache + cache_place(s, layer, 0, a.kv_heads, kv_head, size) + at;
        T* all_values = (T*)s.cache + cache_place(s, layer, 1, a.kv_heads, kv_head, size) + at;
        // A warp has so many keys beside each other, its lanes `stride` from one to the next.
        const int each = WARP / per_key, stride = DECODE_WARPS * each;
        int key = warp_id() * each + lane / per_key;
        Eight<T> k[MOST], v[MOST];
        auto fetch = [&](Eight<T> (&k)[MOST], Eight<T> (&v)[MOST], int from) {
#pragma unroll
            for (int i = 0; i < MOST; i++) {
                k[i].clear();
                v[i].clear();
                if (from + i * stride < past) {
                    k[i].load(keys + size_t(from + i * stride) * size);
                    v[i].load(all_values + size_t(from + i * stride) * size);
                }
            }
        };
        // Those that were there before come while this pass' are on their way.
        fetch(k, v, key);
        float q[8];
        Eight<T> query;
        query.await(qkv + row * words + (head * size + at) / IN_A_WORD<T>, turn);
        query.widen(q);
        float highest = -INFINITY, total = 0.0f, out[8] = {};
#pragma unroll 1
        for (int base = 0; base <= position; base += MOST * stride, key += MOST * stride) {
            Eight<T> next_k[MOST], next_v[MOST];
            const bool goes_on = base + MOST * stride <= position;
            if (goes_on)
                fetch(next_k, next_v, key + MOST * stride);
            float scores[MOST];
#pragma unroll
            for (int i = 0; i < MOST; i++) {
                const int now = key + i * stride;
                if (now >= past && now <= position) {
                    const Tagged* from = qkv + (first + now - past) * words + ((a.heads + kv_head) * size + at) / IN_A_WORD<T>;
                    k[i].await(from, turn);
                    v[i].await(from + a.kv_heads * size / IN_A_WORD<T>, turn);
                    if (now == position && head % queries == 0) {
                        k[i].store(keys + size_t(now) * size);
                        v[i].store(all_values + size_t(now) * size);
                    }
                }
                float wide[8], score = 0.0f;
                k[i].widen(wide);
#pragma unroll
                for (int j = 0; j < 8; j++)
                    score = fmaf(q[j], wide[j], score);
                scores[i] = score;
            }
            float most = highest;
            for (int mask = per_key / 2; mask > 0; mask /= 2)
#pragma unroll
                for (int i = 0; i < MOST; i++)
                    scores[i] += shuffle_xor(scores[i], mask);
#pragma unroll
            for (int i = 0; i < MOST; i++) {
                if (key + i * stride > position)
                    scores[i] = -INFINITY;
                most = fmaxf(most, scores[i]);
            }
            const float from = most == -INFINITY ? 0.0f : most, shrink = exp2_fast(highest - from);
            highest = most;
            total *= shrink;
            for (int j = 0; j < 8; j++)
                out[j] *= shrink;
#pragma unroll
            for (int i = 0; i < MOST; i++) {
                const float weight = exp2_fast(scores[i] - from);
                float wide[8];
                v[i].widen(wide);
                total += weight;
#pragma unroll
                for (int j = 0; j < 8; j++)
                    out[j] = fmaf(weight, wide[j], out[j]);
                if (goes_on) {
                    k[i] = next_k[i];
                    v[i] = next_v[i];
                }
            }
        }
        // What the lanes of a warp have seen, then the warps.
        float most = highest;
        for (int mask = per_key; mask < WARP; mask *= 2)
            most = fmaxf(most, shuffle_xor(most, mask));
        const float by = most == -INFINITY ? 0.0f : exp2_fast(highest - most);
        total *= by;
#pragma unroll
        for (int j = 0; j < 8; j++)
            out[j] *= by;
        for (int mask = per_key; mask < WARP; mask *= 2) {
            total += shuffle_xor(total, mask);
#pragma unroll
            for (int j = 0; j < 8; j++)
                out[j] += shuffle_xor(out[j], mask);
        }
        float* to = seen + warp_id() * seen_stride();
        if (lane < per_key) {
            *(float4*)(to + at) = make_float4(out[0], out[1], out[2], out[3]);
            *(float4*)(to + at + 4) = make_float4(out[4], out[5], out[6], out[7]);
            if (lane == 0)
                *(float2*)(to + size) = make_float2(most, total);
        }
        sync_block();
        const int mine = threadIdx.x * 4;
        if (mine < size) {
            float best = -INFINITY, sum = 0.0f, y[4] = {};
#pragma unroll
            for (int warp = 0; warp < DECODE_WARPS; warp++)
                best = fmaxf(best, seen[warp * seen_stride() + size]);
#pragma unroll
            for (int warp = 0; warp < DECODE_WARPS; warp++) {
                const float* from = seen + warp * seen_stride();
                const float weight = exp2_fast(from[size] - best);
                const float4 part = *(const float4*)(from + mine);
                sum = fmaf(weight, from[size + 1], sum);
                y[0] = fmaf(weight, part.x, y[0]);
                y[1] = fmaf(weight, part.y, y[1]);
                y[2] = fmaf(weight, part.z, y[2]);
                y[3] = fmaf(weight, part.w, y[3]);
            }
            const float by = 1.0f / sum;
            for (int i = 0; i < 4; i++)
                y[i] *= by;
            const int all = a.heads * size / IN_A_WORD<T>;
            Tagged* attended = place(a.attended, all, turn) + row * all;
            give_four<T>(attended + (head * size + mine) / IN_A_WORD<T>, y, turn);
        }
    }

    // Product of this block's tiles with the rows. What warps have summed goes to `partial`, that of the head to `score`.
    __device__ __forceinline__ void multiply(const Product& p, Kind kind) {
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

    __device__ __forceinline__ static void take_better(float& score, int& token, float other, int other_token) {
        if (other > score || (other == score && other_token < token)) {
            score = other;
            token = other_token;
        }
    }

    // Scores of two tokens.
    __device__ __forceinline__ void judge(int half, int row, int col, float y0, float y1) {
        if (row >= count || col >= a.vocabulary)
            return;
        const bool both = col + 1 < a.vocabulary;
        take_better(score[half], token[half], y0, col);
        if (both)
            take_better(score[half], token[half], y1, col + 1);
        if (a.scores) {
            a.scores[size_t(row) * a.vocabulary + col] = y0;
            if (both)
                a.scores[size_t(row) * a.vocabulary + col + 1] = y1;
        }
    }

    // What comes out of a product to those who wait for it, four columns by a thread.
    __device__ __forceinline__ void give_sums(const Product& p, Kind kind, bool is_first) {
        int shift = 0;
        while ((1 << shift) < count)
            shift++;
#pragma unroll 1
        for (int i = threadIdx.x; i < p.tiles << (shift + 1); i += DECODE_THREADS) {
            const int beside = i % 2 * 4, row = (i / 2) & ((1 << shift) - 1), tile = i >> (shift + 1);
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
    __device__ __forceinline__ void give_qkv(int row, int col, float (&y)[4]) {
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

    __device__ __forceinline__ void give_inner(int row, int at, float first, float second) {
        const int words = a.inner_size / IN_A_WORD<T>;
        Tagged* to = place(a.inner, words, turn) + row * words + at / IN_A_WORD<T>;
        if constexpr (IN_A_WORD<T> == 2)
            give(to, pack<T>(first, second), turn);
        else
            give_two(to, bits_of(first), bits_of(second), turn);
    }

    // The states, of which this block keeps its columns.
    __device__ __forceinline__ void give_states(Tagged* both, int row, int col, int own_col, float (&y)[4], bool is_first) {
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

    // Rows of the next pass: of each sequence its token, and guesses as far as there is room.
    __device__ void line_up() {
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
        const int half = a.head_size / 2;
        for (int i = threadIdx.x; i < count * half; i += DECODE_THREADS)
            turned[i] = turn_of(rows[i / half].position, a.frequencies[i % half]);
        // What other blocks have put into the cache.
        fence();
        sync_block();
    }

    // The best token of each row, by all blocks alike, into the start of `partial`.
    __device__ __forceinline__ void choose() {
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
                ((int*)partial)[row] = token;
        }
        sync_block();
    }

    __device__ bool is_stop(int token) const {
        for (int i = 0; i < MOST_STOPS; i++)
            if (a.stops[i] == token)
                return true;
        return false;
    }

    // Takes the chosen tokens, as far as the guesses came true. Each block does the same; the first tells the host.
    __device__ void advance() {
        if (threadIdx.x == 0) {
            const int* best = (const int*)partial;
            for (int i = 0; i < a.count; i++) {
                Standing& now = standing[i];
                if (now.done)
                    continue;
                const Sequence& s = sequences[i];
                for (int j = 0; j < now.rows; j++) {
                    const int token = best[now.first + j];
                    now.position++;
                    now.token = token;
                    if (is_stop(token)) {
                        now.done = 2;
                        break;
                    }
                    if (blockIdx.x == 0)
                        store_volatile(s.said + now.made, token);
                    now.made++;
                    if (now.made >= s.most) {
                        now.done = 1;
                        break;
                    }
                    if (j + 1 < now.rows && rows[now.first + j + 1].token != token)
                        break;
                }
                if (await(a.best + 2 * gridDim.x * MOST_ROWS + i, turn) != 0 && !now.done)
                    now.done = 3;
                if (blockIdx.x == 0) {
                    // The tokens are there before their number is.
                    fence_system();
                    store_volatile(s.count, now.made + (now.done << 24));
                }
            }
        }
        sync_block();
    }

    __device__ bool is_over() const {
        for (int i = 0; i < a.count; i++)
            if (!standing[i].done)
                return false;
        return true;
    }

    // The best of this block's tokens of each row.
    __device__ __forceinline__ void give_best() {
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

    // All layers, and the head. Who has no part in a product needs nothing for it either.
    __device__ __forceinline__ void pass() {
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

    __device__ __forceinline__ void run() {
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
};

template <class T> __device__ __forceinline__ void decode(const Decode& a) {
    SHARED_MEMORY(memory);
    Decoder<T> decoder(a, memory);
    decoder.run();
}
