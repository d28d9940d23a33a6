// Arguments of the decode kernel, and the state and functions of one of its blocks, which are defined in
// `decode_inputs.cuh`, `decode_attention.cuh`, `decode_tokens.cuh` and `decode.cuh`.

#pragma once

#include "exchange.cuh"
#include "pointwise.cuh"
#include "ring.cuh"

struct Decode {
    // Four for each layer, then the LM head.
    const Matrix* matrices;
    // Two for each layer, then the last.
    const float* norms;
    const float* inv_freq;
    const void* embeddings;
    const Sequence* sequences;
    // Exchanged between blocks, each for even and odd epochs: hidden states `[16, hidden]` after attention and after
    // the MLP, queries with keys and values, the outputs of attention, and the inner activations of the MLP.
    FlaggedWord* attn_hidden;
    FlaggedWord* mlp_hidden;
    FlaggedWord* qkv;
    FlaggedWord* attn_out;
    FlaggedWord* mlp_inner;
    // Each block's best token of each row, as logit and token `[blocks, 16, 2]`; then which sequences are cancelled.
    FlaggedWord* candidates;
    // All logits `[16, vocab_size]`, or null.
    float* logits;
    // The last epoch of the launch before.
    unsigned* epoch;
    // A bit for each token of the vocabulary: whether it ends a sequence.
    const unsigned* stop_tokens;
    int sequence_count, layers, hidden, heads, kv_heads, head_size, intermediate, vocab_size;
    // Rows of a pass that shared memory has room for.
    int max_rows;
    // Values between input rows in shared memory.
    int row_stride;
    // Floats of shared memory for partial sums.
    int partial_sums;
    // Whether to stop after one pass.
    int single_pass;
    float epsilon, scale;
};
static_assert(sizeof(Decode) == 168);

// State of a sequence. Every block keeps its own copy.
struct SequenceState {
    int token, position, generated, finish;
    // Its rows in this pass.
    int first_row, rows;
};

struct PassRow {
    int sequence, position, token;
};

constexpr int NO_TOKEN = 0x7fffffff;
// Chosen where a logit is not finite.
constexpr int NOT_FINITE = -1;

// Why a sequence ended. The host knows these numbers.
enum FinishReason { LENGTH = 1, STOP = 2, CANCELLED = 3, INVALID_LOGITS = 4 };

// Four values from `at` on, or zeros if `at` is below zero.
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

// The four matrices of a layer, then the LM head.
enum Projection { QKV, O, GATE_UP, DOWN, LM_HEAD };

template <class T> struct Decoder {
    const Decode& a;
    // Shared memory: cosine and sine of each row's position, this block's columns of the hidden states, each thread's
    // sum of squares, each warp's part of an attention, partial sums and other small things, and the input rows of the
    // next product.
    float2* rotations;
    float* own_hidden;
    float* squares;
    float* attn_partial;
    Sequence* sequences;
    SequenceState* states;
    PassRow* rows;
    float* partial;
    T* inputs;
    Ring<T> ring;
    int own_columns;
    float inverse_hidden;
    // Rows of the pass, and the logarithm of the next power of two.
    int row_count = 0, rows_log2 = 0;
    unsigned epoch;
    // The best of a lane's logits, and its token: of row lane / 4 and of row lane / 4 + 8.
    float logit[2];
    int token[2];

    __device__ __forceinline__ Decoder(const Decode& a, unsigned char* memory)
        : a(a), ring(memory, a.matrices, 4 * a.layers + 1) {
        int at = Ring<T>::BYTES + (4 * a.layers + 1) * sizeof(Matrix);
        // An offset, so that the compiler still knows that it is shared memory.
        auto part = [&](auto*& start, int values, int alignment = 16) {
            at = ceil_div(at, alignment) * alignment;
            start = (decltype(start + 0))(memory + at);
            at += values * sizeof(*start);
        };
        own_columns = ceil_div(ceil_div(a.hidden, TILE), gridDim.x) * TILE;
        part(rotations, MAX_ROWS * a.head_size / 2);
        part(own_hidden, MAX_ROWS * own_columns);
        part(squares, DECODE_THREADS);
        part(attn_partial, DECODE_WARPS * attn_partial_stride());
        part(sequences, MAX_ROWS);
        part(states, MAX_ROWS);
        part(rows, MAX_ROWS);
        part(partial, a.partial_sums);
        part(inputs, 0, 128);
        for (int i = threadIdx.x; i < a.sequence_count; i += DECODE_THREADS) {
            const Sequence& s = sequences[i] = a.sequences[i];
            states[i] = {s.token, s.position, 0, 0, 0, 0};
        }
        epoch = *a.epoch;
        inverse_hidden = 1.0f / a.hidden;
        sync_block();
    }

    __device__ int qkv_length() const { return (a.heads + 2 * a.kv_heads) * a.head_size; }

    __device__ int attn_partial_stride() const { return a.head_size + 4; }

    // The words of an epoch, in rows of `words`.
    __device__ __forceinline__ FlaggedWord* epoch_slot(FlaggedWord* both, int words, unsigned of) const {
        return both + size_t(of % 2) * MAX_ROWS * words;
    }

    __device__ __forceinline__ const T* embedding(int row) const {
        return (const T*)a.embeddings + size_t(rows[row].token) * a.hidden;
    }

    // `decode_inputs.cuh`: the inputs of products.
    template <int N, class P>
    __device__ __forceinline__ void await_hidden(float (&x)[N][4], const FlaggedWord* hidden, unsigned of, int row,
                                                 P column);
    __device__ __forceinline__ float rms_scale(float squares) const;
    __device__ __forceinline__ void store_normed(int row, int at, const float (&x)[4], float scale, float4 gain);
    __device__ __forceinline__ void zero_tail(T* row, int length);
    __device__ __forceinline__ void norm(const FlaggedWord* hidden, unsigned of, const float* gains);
    template <int EACH>
    __device__ __forceinline__ void norm(const FlaggedWord* hidden, unsigned of, const float* gains);
    __device__ __forceinline__ void gather(const FlaggedWord* from, int length);
    template <int PAIRS>
    __device__ __forceinline__ void gather_row(T* to, const FlaggedWord* from, int words, int first, int stride);

    // `decode_attention.cuh`: attention of single queries.
    __device__ __forceinline__ void attend(int layer);
    __device__ __forceinline__ void attend(int layer, int row, int head);

    // `decode_tokens.cuh`: rows of a pass, and the tokens that they lead to.
    __device__ __forceinline__ void update_best(int half, int row, int col, float y0, float y1);
    __device__ void schedule_rows();
    __device__ __forceinline__ void choose_tokens();
    __device__ bool is_stop(int token) const;
    __device__ void accept_tokens();
    __device__ bool all_done() const;
    __device__ __forceinline__ void publish_candidates();

    // `decode.cuh`: products, and the loop.
    __device__ __forceinline__ void multiply(const Matrix& m, Projection projection);
    __device__ __forceinline__ void publish_sums(const Matrix& m, Projection projection, bool is_first_layer);
    __device__ __forceinline__ void publish_qkv(int row, int col, float (&y)[4]);
    __device__ __forceinline__ void publish_mlp_inner(int row, int at, float first, float second);
    __device__ __forceinline__ void publish_hidden(FlaggedWord* both, int row, int col, int own_col, float (&y)[4],
                                                   bool add_embedding);
    __device__ __forceinline__ void pass();
    __device__ __forceinline__ void run();
};
