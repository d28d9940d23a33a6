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

template <class T> __device__ __forceinline__ void load_8(const T* from, float (&to)[8]) {
    const uint4 x = load_fresh((const uint4*)from);
    const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
    for (int i = 0; i < 4; i++) {
        const float2 pair = unpack<T>(pairs[i]);
        to[2 * i] = pair.x;
        to[2 * i + 1] = pair.y;
    }
}

template <> __device__ __forceinline__ void load_8<float>(const float* from, float (&to)[8]) {
    for (int i = 0; i < 8; i++)
        to[i] = load_fresh(from + i);
}

template <class T> struct Decoder {
    const Decode& a;
    // Parts of the shared memory: gains of the next norm, cosine and sine of each row's position, this block's columns of
    // the states, sums of parts of a row, sums that warps share and other small things, rows for the next product.
    float* gains;
    float2* turned;
    float* own;
    float* squares;
    Sequence* sequences;
    Standing* standing;
    PassRow* rows;
    float* partial;
    T* values;
    Ring<T> ring;
    int own_columns;
    int count = 0;
    unsigned turn;

    __device__ Decoder(const Decode& a, unsigned char* memory) : a(a), ring(memory, a.products, 4 * a.layers + 1) {
        memory += Ring<T>::BYTES + (4 * a.layers + 1) * sizeof(Product);
        auto part = [&](auto*& start, size_t values) {
            start = (decltype(start + 0))memory;
            memory += (values * sizeof(*start) + 15) / 16 * 16;
        };
        own_columns = ceil_div(ceil_div(a.hidden, TILE), gridDim.x) * TILE;
        part(gains, a.hidden);
        part(turned, MOST_ROWS * a.head_size / 2);
        part(own, MOST_ROWS * own_columns);
        part(squares, DECODE_WARPS * DECODE_WARPS);
        part(sequences, MOST_ROWS);
        part(standing, MOST_ROWS);
        part(rows, MOST_ROWS);
        part(partial, a.partial);
        values = (T*)(((size_t)memory + 127) / 128 * 128);
        for (int i = threadIdx.x; i < a.count; i += DECODE_THREADS) {
            const Sequence& s = sequences[i] = a.sequences[i];
            standing[i] = {s.token, s.position, 0, 0, 0, 0};
        }
        turn = *a.turn;
        sync_block();
    }

    __device__ int width() const { return (a.heads + 2 * a.kv_heads) * a.head_size; }

    // Where the words of this turn are, of rows of so many values.
    __device__ Tagged* place(Tagged* both, int length) const { return both + size_t(turn % 2) * MOST_ROWS * length; }

    template <class F> __device__ void multiply(int product, F then) {
        ring.multiply(product, values, a.row_stride, count, partial, then);
    }

    __device__ float embedded(int row, int i) const {
        return to_float(((const T*)a.table)[size_t(rows[row].token) * a.hidden + i]);
    }

    // Gains of a norm, which nobody has to be waited for.
    __device__ void fetch_gains(int norm) {
        for (int i = threadIdx.x; i < a.hidden; i += DECODE_THREADS)
            gains[i] = a.norms[size_t(norm) * a.hidden + i];
    }

    // Rows to the product: RMS norm of the states of some turn, or of the tokens' embeddings.
    __device__ void norm_rows(const Tagged* states, unsigned of) {
        if (a.hidden <= DECODE_THREADS)
            norm_rows<1>(states, of);
        else if (a.hidden <= 2 * DECODE_THREADS)
            norm_rows<2>(states, of);
        else
            norm_rows<4>(states, of);
    }

    // A row is summed in 16 parts, of which a lane has EACH values, whether a warp has one of them or, with many rows,
    // all: it comes out the same.
    template <int EACH> __device__ __forceinline__ void norm_rows(const Tagged* states, unsigned of) {
        constexpr int AT_ONCE = 8 / EACH;
        // Warps are a power of two, and so are the parts that each has.
        int shift = 0;
        while ((1 << shift) < count)
            shift++;
        const int parts = 1 << shift, row = warp_id() >> (4 - shift), first = (warp_id() << shift) % DECODE_WARPS;
        const bool is_row = row < count;
        const Tagged* from = states + size_t(row) * a.hidden;
        const T* embedding = (const T*)a.table + size_t(rows[is_row ? row : 0].token) * a.hidden;
        float x[AT_ONCE][EACH];
        auto place = [&](int part, int i) { return (first + part) * WARP + lane_id() + i * DECODE_THREADS; };
        auto load = [&](int start) {
            float all[AT_ONCE * EACH];
            if (states)
                await_all(all, of, [&](int i) -> const Tagged* {
                    const int at = place(start + i / EACH, i % EACH);
                    return is_row && start + i / EACH < parts && at < a.hidden ? from + at : nullptr;
                });
#pragma unroll
            for (int i = 0; i < AT_ONCE * EACH; i++) {
                const int at = place(start + i / EACH, i % EACH);
                const bool wanted = is_row && start + i / EACH < parts && at < a.hidden;
                x[i / EACH][i % EACH] = !wanted ? 0.0f : states ? all[i] : to_float(embedding[at]);
            }
        };
        if (states && is_row)
            await_first(from + first * WARP % a.hidden, of);
        float* sums = squares + row * DECODE_WARPS;
        for (int start = 0; start < parts; start += AT_ONCE) {
            load(start);
#pragma unroll
            for (int part = 0; part < AT_ONCE; part++) {
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < EACH; i++)
                    sum += x[part][i] * x[part][i];
                if (start + part < parts) {
                    sum = warp_sum(sum);
                    if (lane_id() == 0)
                        sums[first + start + part] = sum;
                }
            }
        }
        sync_block();
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < DECODE_WARPS; i++)
            sum += sums[i];
        const float scale = 1.0f / sqrtf(sum / a.hidden + a.epsilon);
        T* to = values + size_t(row) * a.row_stride;
        for (int start = 0; start < parts; start += AT_ONCE) {
            if (parts > AT_ONCE)
                load(start);
#pragma unroll
            for (int i = 0; i < AT_ONCE * EACH; i++) {
                const int at = place(start + i / EACH, i % EACH);
                if (is_row && start + i / EACH < parts && at < a.hidden)
                    to[at] = from_float<T>(x[i / EACH][i % EACH] * scale * gains[at]);
            }
        }
        if (is_row && first == 0)
            clear(to, a.hidden);
        sync_block();
    }

    // Up to a whole step: weights beyond are zero, what they are multiplied with must be a number.
    __device__ void clear(T* row, int length) {
        const int at = length + lane_id();
        if (at < ceil_div(length, STEP) * STEP)
            row[at] = from_float<T>(0.0f);
    }

    // Rows to the product as others give them.
    __device__ void take_rows(const Tagged* from, int length) {
        constexpr int MOST = 4;
        const int all = count * length;
        await_first(from + warp_id() * WARP % length, turn);
        int row = 0, col = threadIdx.x;
        for (int start = threadIdx.x; start < all; start += MOST * DECODE_THREADS) {
            float got[MOST];
            await_all(got, turn, [&](int i) -> const Tagged* {
                const int at = start + i * DECODE_THREADS;
                return at < all ? from + at : nullptr;
            });
#pragma unroll
            for (int i = 0; i < MOST; i++) {
                for (; col >= length; col -= length)
                    row++;
                if (row < count)
                    values[size_t(row) * a.row_stride + col] = from_float<T>(got[i]);
                col += DECODE_THREADS;
            }
        }
        for (int row = warp_id(); row < count; row += DECODE_WARPS)
            clear(values + size_t(row) * a.row_stride, length);
        sync_block();
    }

    // A query head of a row by a block: keys and values of before from the cache, those of this pass from `qkv`.
    __device__ void attend(int layer) {
        const int size = a.head_size, per_key = size / 8, half = size / 2;
        const int lane = lane_id(), at = lane % per_key * 8;
        const int each = WARP / per_key;
        const Tagged* qkv = place(a.qkv, width());
        Tagged* attended = place(a.attended, a.heads * size);
        float* query = partial;
        float* merged = partial + 128;
        for (int item = blockIdx.x; item < count * a.heads; item += gridDim.x) {
            const int row = item / a.heads, head = item % a.heads, kv_head = head / (a.heads / a.kv_heads);
            const Sequence& s = sequences[rows[row].sequence];
            const int first = standing[rows[row].sequence].first, position = rows[row].position;
            const int past = position - (row - first);
            T* keys = (T*)s.cache + cache_place(s, layer, 0, a.kv_heads, kv_head, size);
            T* all_values = (T*)s.cache + cache_place(s, layer, 1, a.kv_heads, kv_head, size);
            // Those that were there before are fetched while this pass' are on their way.
            const int key = warp_id() * each + lane / per_key;
            float k8[8] = {}, v8[8] = {};
            if (key < past) {
                load_8(keys + size_t(key) * size + at, k8);
                load_8(all_values + size_t(key) * size + at, v8);
            }
            await_first(qkv + size_t(row) * width() + (a.heads + kv_head) * size, turn);
            // Keys and values of this pass, as the cache will have them; before them the query.
            float* fresh = merged + DECODE_WARPS * (size + 2);
            for (int i = threadIdx.x; i < (position - past + 2) * half; i += DECODE_THREADS) {
                const int before = i / half - 1, j = i % half;
                if (before < 0) {
                    const Tagged* q = qkv + size_t(row) * width() + head * size + j;
                    float got[2];
                    await_all(got, turn, [&](int i) { return q + i * half; });
                    const float2 y = turn_pair(got[0], got[1], turned[row * half + j]);
                    query[j] = y.x * a.scale;
                    query[half + j] = y.y * a.scale;
                    continue;
                }
                const Tagged* k = qkv + size_t(first + before) * width() + (a.heads + kv_head) * size + j;
                const Tagged* v = k + a.kv_heads * size;
                float got[4];
                await_all(got, turn, [&](int i) { return (i < 2 ? k : v) + i % 2 * half; });
                const float2 y = turn_pair(got[0], got[1], turned[(first + before) * half + j]);
                const T new_keys[2] = {from_float<T>(y.x), from_float<T>(y.y)};
                float* to = fresh + before * 2 * size + j;
                for (int side = 0; side < 2; side++) {
                    const T value = from_float<T>(got[2 + side]);
                    to[side * half] = to_float(new_keys[side]);
                    to[size + side * half] = to_float(value);
                    if (past + before == position && head % (a.heads / a.kv_heads) == 0) {
                        keys[size_t(position) * size + side * half + j] = new_keys[side];
                        all_values[size_t(position) * size + side * half + j] = value;
                    }
                }
            }
            sync_block();

            float highest = -INFINITY, total = 0.0f, out[8] = {}, q8[8];
            for (int i = 0; i < 8; i++)
                q8[i] = query[at + i];
            for (int base = 0; base <= position; base += DECODE_WARPS * each) {
                const int now = base + key, next = now + DECODE_WARPS * each;
                if (now >= past && now <= position) {
                    const float* from = fresh + (now - past) * 2 * size + at;
                    for (int i = 0; i < 8; i++) {
                        k8[i] = from[i];
                        v8[i] = from[size + i];
                    }
                }
                float next_k8[8] = {}, next_v8[8] = {};
                if (next < past) {
                    load_8(keys + size_t(next) * size + at, next_k8);
                    load_8(all_values + size_t(next) * size + at, next_v8);
                }
                float score = 0.0f;
                for (int i = 0; i < 8; i++)
                    score = fmaf(q8[i], k8[i], score);
                for (int mask = per_key / 2; mask > 0; mask /= 2)
                    score += shuffle_xor(score, mask);
                if (now <= position) {
                    const float most = fmaxf(highest, score), weight = exp2f(score - most), shrink = exp2f(highest - most);
                    highest = most;
                    total = total * shrink + weight;
                    for (int i = 0; i < 8; i++)
                        out[i] = fmaf(weight, v8[i], out[i] * shrink);
                }
                for (int i = 0; i < 8; i++) {
                    k8[i] = next_k8[i];
                    v8[i] = next_v8[i];
                }
            }
            // What the lanes of a warp have seen, then the warps.
            for (int mask = per_key; mask < WARP; mask *= 2) {
                const float other = shuffle_xor(highest, mask), other_total = shuffle_xor(total, mask);
                const float most = fmaxf(highest, other), base = most == -INFINITY ? 0.0f : most;
                const float mine = exp2f(highest - base), theirs = exp2f(other - base);
                highest = most;
                total = total * mine + other_total * theirs;
                for (int i = 0; i < 8; i++) {
                    const float other_out = shuffle_xor(out[i], mask);
                    out[i] = out[i] * mine + other_out * theirs;
                }
            }
            float* to = merged + warp_id() * (size + 2);
            if (lane < per_key) {
                for (int i = 0; i < 8; i++)
                    to[at + i] = out[i];
                if (lane == 0) {
                    to[size] = highest;
                    to[size + 1] = total;
                }
            }
            sync_block();
            for (int i = threadIdx.x; i < size; i += DECODE_THREADS) {
                float best = -INFINITY, sum = 0.0f, y = 0.0f;
                for (int warp = 0; warp < DECODE_WARPS; warp++)
                    best = fmaxf(best, merged[warp * (size + 2) + size]);
                for (int warp = 0; warp < DECODE_WARPS; warp++) {
                    const float* from = merged + warp * (size + 2);
                    const float weight = exp2f(from[size] - best);
                    sum = fmaf(weight, from[size + 1], sum);
                    y = fmaf(weight, from[i], y);
                }
                give(attended + (size_t(row) * a.heads + head) * size + i, y / sum, turn);
            }
            sync_block();
        }
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

    __device__ __forceinline__ static void take_better(float& score, int& token, float other, int other_token) {
        if (other > score || (other == score && other_token < token)) {
            score = other;
            token = other_token;
        }
    }

    // The best token of each row, by all blocks alike, into the start of `partial`.
    __device__ void choose() {
        const int blocks = gridDim.x;
        for (int row = warp_id(); row < count; row += DECODE_WARPS) {
            float score = -INFINITY;
            int token = 0x7fffffff;
            for (int block = lane_id(); block < blocks; block += WARP) {
                const Tagged* from = a.best + block * MOST_ROWS + row;
                const float other = await_float(from, turn);
                take_better(score, token, other, int(await(from + blocks * MOST_ROWS, turn)));
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

    // The states of the turn before, which was the layer before.
    __device__ const Tagged* states_before() const { return a.states + size_t((turn - 1) % 2) * MOST_ROWS * a.hidden; }

    // The first half of a layer: attention. Who has no part in a product needs nothing for it either.
    __device__ void look_back(int layer) {
        const bool first = layer == 0;
        Tagged* qkv = place(a.qkv, width());
        if (ring.products[4 * layer].tiles > 0) {
            norm_rows(first ? nullptr : states_before(), turn - 1);
            multiply(4 * layer, [&](int row, int, int col, float y0, float y1) {
                Tagged* to = qkv + size_t(row) * width() + col;
                give(to, y0, turn);
                give(to + 1, y1, turn);
            });
        }
        fetch_gains(2 * layer + 1);
        attend(layer);
        sync_block();
        if (ring.products[4 * layer + 1].tiles > 0) {
            take_rows(place(a.attended, a.heads * a.head_size), a.heads * a.head_size);
            Tagged* middle = place(a.middle, a.hidden);
            multiply(4 * layer + 1, [&](int row, int tile, int col, float y0, float y1) {
                float* x = own + row * own_columns + tile * TILE + col % TILE;
                x[0] = y0 + (first ? embedded(row, col) : x[0]);
                x[1] = y1 + (first ? embedded(row, col + 1) : x[1]);
                Tagged* to = middle + size_t(row) * a.hidden + col;
                give(to, x[0], turn);
                give(to + 1, x[1], turn);
            });
        }
        sync_block();
    }

    // The second half: what each token makes of it.
    __device__ void think(int layer) {
        norm_rows(place(a.middle, a.hidden), turn);
        Tagged* inner = place(a.inner, a.inner_size);
        multiply(4 * layer + 2, [&](int row, int, int col, float gate, float up) {
            give(inner + size_t(row) * a.inner_size + col / 2, silu(gate) * up, turn);
        });
        sync_block();
        fetch_gains(2 * layer + 2);
        if (ring.products[4 * layer + 3].tiles > 0) {
            take_rows(inner, a.inner_size);
            Tagged* states = place(a.states, a.hidden);
            multiply(4 * layer + 3, [&](int row, int tile, int col, float y0, float y1) {
                float* x = own + row * own_columns + tile * TILE + col % TILE;
                x[0] += y0;
                x[1] += y1;
                Tagged* to = states + size_t(row) * a.hidden + col;
                give(to, x[0], turn);
                give(to + 1, x[1], turn);
            });
        }
        sync_block();
    }

    // Scores of all tokens, and the best of them.
    __device__ void choose_words() {
        norm_rows(states_before(), turn - 1);
        // Of a lane's rows: lane / 4, and the eighth behind it.
        float score[2] = {-INFINITY, -INFINITY};
        int token[2] = {0x7fffffff, 0x7fffffff};
        multiply(4 * a.layers, [&](int row, int, int col, float y0, float y1) {
            const int i = row / 8;
            const bool both = col + 1 < a.vocabulary;
            take_better(score[i], token[i], y0, col);
            if (both)
                take_better(score[i], token[i], y1, col + 1);
            if (a.scores) {
                a.scores[size_t(row) * a.vocabulary + col] = y0;
                if (both)
                    a.scores[size_t(row) * a.vocabulary + col + 1] = y1;
            }
        });
        float* scores = partial;
        int* tokens = (int*)(partial + DECODE_WARPS * MOST_ROWS);
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
            int best_token = 0x7fffffff;
            for (int warp = 0; warp < DECODE_WARPS; warp++)
                take_better(best, best_token, scores[warp * MOST_ROWS + threadIdx.x],
                            tokens[warp * MOST_ROWS + threadIdx.x]);
            Tagged* to = a.best + blockIdx.x * MOST_ROWS + threadIdx.x;
            give(to, best, turn);
            give(to + gridDim.x * MOST_ROWS, uint32_t(best_token), turn);
        }
        sync_block();
        choose();
        advance();
    }

    __device__ void run() {
        do {
            line_up();
            fetch_gains(0);
            sync_block();
            for (int layer = 0; layer < a.layers; layer++) {
                turn++;
                look_back(layer);
                think(layer);
            }
            turn++;
            choose_words();
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
