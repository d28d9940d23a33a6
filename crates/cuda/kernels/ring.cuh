// Products of few rows with all weights of a model, one matrix after the other, in a persistent kernel.
//
// Reading the weights is what takes the time. A warp knows which of them it will need, for all products to come, and
// prefetches them into a ring buffer of its own in shared memory while it waits for its inputs.

#pragma once

#include "common.cuh"

constexpr int LOG_WARPS = 3, DECODE_WARPS = 1 << LOG_WARPS;
constexpr int DECODE_THREADS = DECODE_WARPS * WARP;
// Rows of a pass.
constexpr int MAX_ROWS = 16;
// Rows of a matrix that a warp multiplies at once, and columns that it fetches at once.
constexpr int TILE = 8, STEP = 32;
// Slots of a warp's ring.
constexpr int RING_SLOTS = 16;

// A row-major matrix `[n, k]`. 2^split_log2 warps of a block share a tile (split-k), but none a tile of the LM head.
struct Matrix {
    const void* w;
    int n, k, split_log2;
    // Tiles of this block.
    int tiles;

    __device__ __forceinline__ int splits() const { return 1 << split_log2; }
    // This warp's split of its tiles, and the number of steps of each.
    __device__ __forceinline__ int split() const { return warp_id() & (splits() - 1); }
    __device__ __forceinline__ int steps() const { return (ceil_div(k, STEP) - split() + splits() - 1) >> split_log2; }
    // This warp's first tile, and the distance from one to the next.
    __device__ __forceinline__ int first_tile() const { return warp_id() >> split_log2; }
    __device__ __forceinline__ int tile_stride() const { return DECODE_WARPS >> split_log2; }
    // First output column of one of this block's tiles.
    __device__ __forceinline__ int column(int tile) const { return (blockIdx.x + tile * gridDim.x) * TILE; }
};
static_assert(sizeof(Matrix) == 24);

// Offset of partial sums `[tile, split, row, column]`, of 8 or 16 rows.
__device__ __forceinline__ int sums_offset(int tile, int split_log2, int split, int count) {
    return ((tile << split_log2) + split) * (count > 8 ? 16 : 8) * TILE;
}

// Stores two words of an input row, from an even word on, in the order that `TileSums` reads.
template <class T> __device__ __forceinline__ void store_two(T* row, int word, uint32_t first, uint32_t second) {
    uint32_t* to = (uint32_t*)row + word / 4 * 4 + word % 4 / 2;
    to[0] = first;
    to[2] = second;
}

template <> __device__ __forceinline__ void store_two<float>(float* row, int word, uint32_t first, uint32_t second) {
    *(uint2*)(row + word) = make_uint2(first, second);
}

// Stores values `at` to `at` + 3 of an input row.
template <class T> __device__ __forceinline__ void store_four(T* row, int at, const float (&x)[4]) {
    store_two(row, at / 2, pack<T>(x[0], x[1]), pack<T>(x[2], x[3]));
}

template <> __device__ __forceinline__ void store_four<float>(float* row, int at, const float (&x)[4]) {
    *(float4*)(row + at) = make_float4(x[0], x[1], x[2], x[3]);
}

// A warp's sums of a tile: columns 2 · (lane % 4) and the next, of row lane / 4 and then of row lane / 4 + 8.
template <class T> struct TileSums {
    float low_first[4] = {}, low_second[4] = {}, high_first[4] = {}, high_second[4] = {};
    const T *low, *high;

    // Of `count` input rows, `stride` apart.
    __device__ __forceinline__ TileSums(const T* rows, int stride, int count) {
        // Rows beyond the last repeat the last, and their sums are dropped.
        const int row = lane_id() / 4;
        low = rows + min(row, count - 1) * stride + lane_id() % 4 * 8;
        high = rows + min(row + 8, count - 1) * stride + lane_id() % 4 * 8;
    }

    // Each lane has eight weights of a column and the inputs that belong to them, four words each. The tensor core is
    // told that they belong to other indices of k, which makes no difference to a sum over k, and that half of the
    // inputs belong to another row, where their sums then come out. So each lane reads adjacent words.
    __device__ __forceinline__ void add(const T* w, int at, int count) {
        const uint4 b = *(const uint4*)w;
        add(low_first, low_second, low + at, b);
        if (count > 8)
            add(high_first, high_second, high + at, b);
    }

    __device__ __forceinline__ static void add(float (&first)[4], float (&second)[4], const T* from, uint4 b) {
        const uint4 x = *(const uint4*)from;
        const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b0[2] = {b.x, b.y}, b1[2] = {b.z, b.w};
        mma<T>(first, a, b0);
        mma<T>(second, a, b1);
    }

    __device__ __forceinline__ void end(float (&y)[4], int) {
        y[0] = low_first[0] + low_second[2];
        y[1] = low_first[1] + low_second[3];
        y[2] = high_first[0] + high_second[2];
        y[3] = high_first[1] + high_second[3];
    }
};

// Without tensor cores: a lane sums over its weights for each row.
template <> struct TileSums<float> {
    float sums[MAX_ROWS] = {};
    const float* rows;
    int stride;

    __device__ __forceinline__ TileSums(const float* rows, int stride, int)
        : rows(rows + lane_id() % 4 * 8), stride(stride) {}

    __device__ __forceinline__ void add(const float* w, int at, int count) {
#pragma unroll
        for (int row = 0; row < MAX_ROWS; row++)
            if (row < count)
                for (int i = 0; i < 8; i++)
                    sums[row] = fmaf(w[i], rows[row * stride + at + i], sums[row]);
    }

    __device__ __forceinline__ void end(float (&y)[4], int count) {
        const int lane = lane_id(), from = lane % 4 * 8;
#pragma unroll
        for (int row = 0; row < MAX_ROWS; row++) {
            if (row >= count)
                break;
            float sum = sums[row];
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            const float first = shuffle(sum, from), second = shuffle(sum, from + 4);
            if (row % 8 == lane / 4) {
                y[row / 8 * 2] = first;
                y[row / 8 * 2 + 1] = second;
            }
        }
    }
};

// The matrices of a model, and this warp's ring buffer of prefetched weights.
template <class T> struct Ring {
    static constexpr int LANE_BYTES = 8 * sizeof(T);
    static constexpr int SLOT_BYTES = WARP * LANE_BYTES;
    static constexpr int BYTES = RING_SLOTS * DECODE_WARPS * SLOT_BYTES;

    unsigned char* slots;
    // In shared memory, each block's own.
    Matrix* matrices;
    int count;
    // What is fetched next: the address, the columns that are left of the lane's row, and the steps of the tile.
    int next_matrix = 0, next_tile = 0, steps_left = 0, stride = 0, columns_left = 0;
    const T *next = nullptr, *begin = nullptr;
    // Head and tail of the ring, in bytes from `slots`.
    unsigned head = 0, tail = 0;

    // `memory` has BYTES for the slots, then room for the matrices.
    __device__ Ring(unsigned char* memory, const Matrix* all, int count) : count(count) {
        slots = memory + warp_id() * RING_SLOTS * SLOT_BYTES + lane_id() * LANE_BYTES;
        matrices = (Matrix*)(memory + BYTES);
        for (int i = threadIdx.x; i < count; i += DECODE_THREADS) {
            matrices[i] = all[i];
            matrices[i].tiles = (ceil_div(matrices[i].n, TILE) - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
        }
        sync_block();
        start(0);
#pragma unroll 1
        for (int i = 0; i < RING_SLOTS - 1; i++)
            fetch();
    }

    __device__ __forceinline__ void start(int matrix) {
        next_matrix = matrix;
        next_tile = matrices[matrix].first_tile();
    }

    // Moves on to this warp's next tile. False if the warp has a part in no matrix.
    __device__ __forceinline__ bool find_tile() {
#pragma unroll 1
        for (int tries = 0; tries <= count; tries++) {
            const Matrix& m = matrices[next_matrix];
            if (next_tile < m.tiles) {
                steps_left = m.steps();
                // Rows beyond the last repeat the last, and their sums are dropped.
                const int row = min(m.column(next_tile) + lane_id() / 4, m.n - 1);
                begin = (const T*)m.w + size_t(row) * m.k;
                const int col = m.split() * STEP + lane_id() % 4 * 8;
                next = begin + col;
                columns_left = m.k - col;
                stride = m.splits() * STEP;
                next_tile += m.tile_stride();
                if (steps_left > 0)
                    return true;
            } else {
                start(next_matrix + 1 == count ? 0 : next_matrix + 1);
            }
        }
        return false;
    }

    // Prefetches the next weights of this warp. The first matrix follows the last.
    __device__ __forceinline__ void fetch() {
        if (steps_left > 0 || find_tile()) {
            // A row may end within a step. The inputs are zero there, and the row's first weights do as well as others.
            const T* here = columns_left > 0 ? next : begin;
#pragma unroll
            for (int i = 0; i < LANE_BYTES; i += 16)
                cp_async16(slots + head + i, here + i / sizeof(T));
            next += stride;
            columns_left -= stride;
            steps_left--;
            head = (head + SLOT_BYTES) % (RING_SLOTS * SLOT_BYTES);
        }
        cp_async_commit();
    }

    // The oldest weights in the ring, which must have arrived.
    __device__ __forceinline__ const T* pop() {
        const T* weights = (const T*)(slots + tail);
        tail = (tail + SLOT_BYTES) % (RING_SLOTS * SLOT_BYTES);
        return weights;
    }

    // Sums of this warp's split of a tile, for `count` rows.
    __device__ __forceinline__ void multiply(float (&y)[4], const Matrix& m, const T* rows, int row_stride,
                                             int count) {
        TileSums<T> sums(rows + m.split() * STEP, row_stride, count);
        const int step = m.splits() * STEP;
        int steps = m.steps(), at = 0;
        // Weights are read before their slots are fetched into again.
#pragma unroll 1
        for (; steps > 1; steps -= 2) {
            cp_async_wait<RING_SLOTS - 3>();
            sums.add(pop(), at, count);
            sums.add(pop(), at + step, count);
            at += 2 * step;
            fetch();
            fetch();
        }
        if (steps > 0) {
            cp_async_wait<RING_SLOTS - 2>();
            sums.add(pop(), at, count);
            fetch();
        }
        sums.end(y, count);
    }
};
