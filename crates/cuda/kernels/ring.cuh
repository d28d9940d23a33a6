// Products of few rows with all weights of a model, one matrix after the other, by blocks that stay.
//
// What these take is to read the weights once. A warp knows which of them it will need for all products to come, and
// fetches them into a ring of shared memory, of which it has a part for itself, while it waits for what they are
// multiplied with.

#pragma once

#include "common.cuh"

constexpr int LOG_WARPS = 3, DECODE_WARPS = 1 << LOG_WARPS;
constexpr int DECODE_THREADS = DECODE_WARPS * WARP;
constexpr int MOST_ROWS = 16;
// Rows of a matrix that a warp multiplies at once, and columns that it fetches at once.
constexpr int TILE = 8, STEP = 32;
// Places of a warp's ring.
constexpr int RING = 16;

// A matrix `[n, k]` in rows. 2^shift warps of a block share a tile, by its columns; none share one of the last matrix.
struct Product {
    const void* w;
    int n, k, shift;
    // Of a block; each counts its own.
    int tiles;

    __device__ __forceinline__ int parts() const { return 1 << shift; }
    // Of a warp, of each of its tiles.
    __device__ __forceinline__ int part() const { return warp_id() & (parts() - 1); }
    __device__ __forceinline__ int steps() const { return (ceil_div(k, STEP) - part() + parts() - 1) >> shift; }
    // Of a warp, the first of its tiles, and how far it is from one to the next.
    __device__ __forceinline__ int first_tile() const { return warp_id() >> shift; }
    __device__ __forceinline__ int tile_stride() const { return DECODE_WARPS >> shift; }
    // Where columns lie, by the block's tile.
    __device__ __forceinline__ int column(int tile) const { return (blockIdx.x + tile * gridDim.x) * TILE; }
};
static_assert(sizeof(Product) == 24);

// Where sums of a product's parts lie: `[tile, part, row, column]`, of 8 or 16 rows.
__device__ __forceinline__ int sums_place(int tile, int shift, int part, int count) {
    return ((tile << shift) + part) * (count > 8 ? 16 : 8) * TILE;
}

// Two words of a row of values to be multiplied, from an even one on, as `Sums` takes them.
template <class T> __device__ __forceinline__ void put_two(T* row, int word, uint32_t first, uint32_t second) {
    uint32_t* to = (uint32_t*)row + word / 4 * 4 + word % 4 / 2;
    to[0] = first;
    to[2] = second;
}

template <> __device__ __forceinline__ void put_two<float>(float* row, int word, uint32_t first, uint32_t second) {
    *(uint2*)(row + word) = make_uint2(first, second);
}

// Values `at` to `at` + 3.
template <class T> __device__ __forceinline__ void put_four(T* row, int at, const float (&x)[4]) {
    put_two(row, at / 2, pack<T>(x[0], x[1]), pack<T>(x[2], x[3]));
}

template <> __device__ __forceinline__ void put_four<float>(float* row, int at, const float (&x)[4]) {
    *(float4*)(row + at) = make_float4(x[0], x[1], x[2], x[3]);
}

// A tile's sums of a warp: of row lane / 4 columns 2 · (lane % 4) and the next, then of the eighth row behind it.
template <class T> struct Sums {
    float low_first[4] = {}, low_second[4] = {}, high_first[4] = {}, high_second[4] = {};
    const T *low, *high;

    // Of `count` values beside each other in `rows`, `stride` apart.
    __device__ __forceinline__ Sums(const T* rows, int stride, int count) {
        // Rows beyond the last are the last again, and nobody looks at what becomes of them.
        const int row = lane_id() / 4;
        low = rows + min(row, count - 1) * stride + lane_id() % 4 * 8;
        high = rows + min(row + 8, count - 1) * stride + lane_id() % 4 * 8;
    }

    // Each lane has eight weights of a column and the values that belong to them, four words each. The unit is told
    // that they are of other places than they are, which for a sum over all places is all the same; and that half of
    // the values are of another row, where their sums come out then. So all words come from memory as it wants them.
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

// Without matrix units: a lane sums over its weights for each row.
template <> struct Sums<float> {
    float sums[MOST_ROWS] = {};
    const float* rows;
    int stride;

    __device__ __forceinline__ Sums(const float* rows, int stride, int)
        : rows(rows + lane_id() % 4 * 8), stride(stride) {}

    __device__ __forceinline__ void add(const float* w, int at, int count) {
#pragma unroll
        for (int row = 0; row < MOST_ROWS; row++)
            if (row < count)
                for (int i = 0; i < 8; i++)
                    sums[row] = fmaf(w[i], rows[row * stride + at + i], sums[row]);
    }

    __device__ __forceinline__ void end(float (&y)[4], int count) {
        const int lane = lane_id(), from = lane % 4 * 8;
#pragma unroll
        for (int row = 0; row < MOST_ROWS; row++) {
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

// The matrices of a model, and which of their weights this warp fetches next.
template <class T> struct Ring {
    static constexpr int LANE_BYTES = 8 * sizeof(T);
    static constexpr int PLACE_BYTES = WARP * LANE_BYTES;
    static constexpr int BYTES = RING * DECODE_WARPS * PLACE_BYTES;

    unsigned char* places;
    // In shared memory, each block's own.
    Product* products;
    int count;
    // What is fetched next: from where, how many columns the lane's row has from there, and steps the tile.
    int next_product = 0, next_tile = 0, steps_left = 0, stride = 0, columns_left = 0;
    const T *next = nullptr, *begin = nullptr;
    // Where weights go next and are taken from, in bytes from `places`.
    unsigned to = 0, from = 0;

    // `memory` has BYTES for the places and then room for the products.
    __device__ Ring(unsigned char* memory, const Product* all, int count) : count(count) {
        places = memory + warp_id() * RING * PLACE_BYTES + lane_id() * LANE_BYTES;
        products = (Product*)(memory + BYTES);
        for (int i = threadIdx.x; i < count; i += DECODE_THREADS) {
            products[i] = all[i];
            products[i].tiles = (ceil_div(products[i].n, TILE) - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
        }
        sync_block();
        start(0);
#pragma unroll 1
        for (int i = 0; i < RING - 1; i++)
            fetch();
    }

    __device__ __forceinline__ void start(int product) {
        next_product = product;
        next_tile = products[product].first_tile();
    }

    // The next tile of this warp, of whatever product; none if it has a part in nothing.
    __device__ __forceinline__ bool find_tile() {
#pragma unroll 1
        for (int turns = 0; turns <= count; turns++) {
            const Product& p = products[next_product];
            if (next_tile < p.tiles) {
                steps_left = p.steps();
                // Rows beyond the last are the last again, and nobody looks at what becomes of them.
                const int row = min(p.column(next_tile) + lane_id() / 4, p.n - 1);
                begin = (const T*)p.w + size_t(row) * p.k;
                const int col = p.part() * STEP + lane_id() % 4 * 8;
                next = begin + col;
                columns_left = p.k - col;
                stride = p.parts() * STEP;
                next_tile += p.tile_stride();
                if (steps_left > 0)
                    return true;
            } else {
                start(next_product + 1 == count ? 0 : next_product + 1);
            }
        }
        return false;
    }

    // Fetches the next weights of this warp; behind the last product comes the first again.
    __device__ __forceinline__ void fetch() {
        if (steps_left > 0 || find_tile()) {
            // A row that is no whole number of steps ends in between: the values for it are zero then, and its first
            // weights do as well as others.
            const T* here = columns_left > 0 ? next : begin;
#pragma unroll
            for (int i = 0; i < LANE_BYTES; i += 16)
                cp_async16(places + to + i, here + i / sizeof(T));
            next += stride;
            columns_left -= stride;
            steps_left--;
            to = (to + PLACE_BYTES) % (RING * PLACE_BYTES);
        }
        cp_async_commit();
    }

    // The weights that were fetched the longest time ago, if they are there.
    __device__ __forceinline__ const T* take() {
        const T* weights = (const T*)(places + from);
        from = (from + PLACE_BYTES) % (RING * PLACE_BYTES);
        return weights;
    }

    // Sums of this warp's part of a tile's columns, for so many rows.
    __device__ __forceinline__ void multiply(float (&y)[4], const Product& p, const T* rows, int row_stride,
                                             int count) {
        Sums<T> sums(rows + p.part() * STEP, row_stride, count);
        const int step = p.parts() * STEP;
        int steps = p.steps(), at = 0;
        // What is multiplied is read before its place is fetched into again.
#pragma unroll 1
        for (; steps > 1; steps -= 2) {
            cp_async_wait<RING - 3>();
            sums.add(take(), at, count);
            sums.add(take(), at + step, count);
            at += 2 * step;
            fetch();
            fetch();
        }
        if (steps > 0) {
            cp_async_wait<RING - 2>();
            sums.add(take(), at, count);
            fetch();
        }
        sums.end(y, count);
    }
};
