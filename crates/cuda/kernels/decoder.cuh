// What the decoder's kernel is given, and what a block of it has and does: the parts are in `rows.cuh`, `attend.cuh`,
// `words.cuh` and `decode.cuh`.

#pragma once

#include "exchange.cuh"
#include "pointwise.cuh"
#include "ring.cuh"

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
    // The best of each block's tokens for each row, score and token, `[blocks, 16, 2]`; then which captions shall end.
    Tagged* best;
    // Scores of all tokens, `[16, vocabulary]`, if somebody wants them.
    float* scores;
    // The last turn.
    unsigned* turn;
    // A bit for each token of the vocabulary: whether it ends a caption.
    const unsigned* stops;
    int count, layers, hidden, heads, kv_heads, head_size, inner_size, vocabulary;
    // Rows that a pass can have, by the memory that there is for them.
    int most_rows;
    // Shared memory of a row of the longest product's values, in values.
    int row_stride;
    // Shared memory for sums that warps share, in floats.
    int partial;
    // One pass and no more.
    int once;
    float epsilon, scale;
};
static_assert(sizeof(Decode) == 168);

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
// What is chosen where a score is no number, or none is finite.
constexpr int NOT_FINITE = -1;

// How a caption ended: by the number of its tokens, by one that ends it, by who asked, or by scores that are none.
enum End { LENGTH = 1, STOP = 2, CANCELLED = 3, BROKEN = 4 };

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

// What the kernel does for each product: of which there are four of each layer, then the head.
enum Kind { QKV, O, GATE_UP, DOWN, HEAD };

template <class T> struct Decoder {
    const Decode& a;
    // Parts of the shared memory: cosine and sine of each row's position, this block's columns of the states, each
    // thread's sum of squares, what each warp has seen of keys and values, sums that warps share and other small
    // things, rows for the next product.
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
    // Rows of the pass, and the power of two that they fit into.
    int count = 0, row_shift = 0;
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

    // `rows.cuh`: what is multiplied.
    template <int N, class P>
    __device__ __forceinline__ void await_states(float (&x)[N][4], const Tagged* states, unsigned of, int row, P place);
    __device__ __forceinline__ float factor(float squares) const;
    __device__ __forceinline__ void put(int row, int at, const float (&x)[4], float factor, float4 gain);
    __device__ __forceinline__ void clear(T* row, int length);
    __device__ __forceinline__ void norm(const Tagged* states, unsigned of, const float* gains);
    template <int EACH> __device__ __forceinline__ void norm(const Tagged* states, unsigned of, const float* gains);
    __device__ __forceinline__ void take(const Tagged* from, int length);
    template <int MOST>
    __device__ __forceinline__ void take_row(T* to, const Tagged* from, int words, int first, int stride);

    // `attend.cuh`: what is looked back at.
    __device__ __forceinline__ void attend(int layer);
    __device__ __forceinline__ void attend(int layer, int row, int head);

    // `words.cuh`: what is said.
    __device__ __forceinline__ void judge(int half, int row, int col, float y0, float y1);
    __device__ void line_up();
    __device__ __forceinline__ void choose();
    __device__ bool is_stop(int token) const;
    __device__ void advance();
    __device__ bool is_over() const;
    __device__ __forceinline__ void give_best();

    // `decode.cuh`: the products, and all of it.
    __device__ __forceinline__ void multiply(const Product& p, Kind kind);
    __device__ __forceinline__ void give_sums(const Product& p, Kind kind, bool is_first);
    __device__ __forceinline__ void give_qkv(int row, int col, float (&y)[4]);
    __device__ __forceinline__ void give_inner(int row, int at, float first, float second);
    __device__ __forceinline__ void give_states(Tagged* both, int row, int col, int own_col, float (&y)[4],
                                                bool is_first);
    __device__ __forceinline__ void pass();
    __device__ __forceinline__ void run();
};
