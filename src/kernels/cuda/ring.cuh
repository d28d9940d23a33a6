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

// A tile's sums of a warp: of row lane / 4 columns 2 · (lane % 4) and the next, then of the eighth row behind it.
template <class T> struct Sums {
    // Of even and of odd steps, whose products needn't wait for each other.
    float even[4] = {}, odd[4] = {};
    const T *low, *high;

    // Of `count` values beside each other in `rows`, `stride` apart.
    __device__ __forceinline__ Sums(const T* rows, int stride, int count) {
        // Rows beyond the last are the last again, and nobody looks at what becomes of them.
        const int row = lane_id() / 4;
        low = rows + min(row, count - 1) * stride + lane_id() % 4 * 8;
        high = rows + min(row + 8, count - 1) * stride + lane_id() % 4 * 8;
    }

    // Each lane has eight weights of a column and the values that belong to them. The unit is told that they are of
    // other places than they are, which for a sum over all places is all the same.
    __device__ __forceinline__ void add(float (&y)[4], const T* w, int at) {
        const uint4 b = *(const uint4*)w, x = *(const uint4*)(low + at), z = *(const uint4*)(high + at);
        const uint32_t a0[4] = {x.x, z.x, x.y, z.y}, a1[4] = {x.z, z.z, x.w, z.w};
        const uint32_t b0[2] = {b.x, b.y}, b1[2] = {b.z, b.w};
        mma<T>(y, a0, b0);
        mma<T>(y, a1, b1);
    }
    __device__ __forceinline__ void add_even(const T* w, int at, int) { add(even, w, at); }
    __device__ __forceinline__ void add_odd(const T* w, int at, int) { add(odd, w, at); }

    __device__ __forceinline__ void end(float (&y)[4], int) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            y[i] = even[i] + odd[i];
    }
};

// Without matrix units: a lane sums over its weights for each row.
template <> struct Sums<float> {
    float sums[MOST_ROWS] = {};
    const float* rows;
    int stride;

    __device__ __forceinline__ Sums(const float* rows, int stride, int)
        : rows(rows + lane_id() % 4 * 8), stride(stride) {}

    __device__ __forceinline__ void add_even(const float* w, int at, int count) {
#pragma unroll
        for (int row = 0; row < MOST_ROWS; row++)
            if (row < count)
                for (int i = 0; i < 8; i++)
                    sums[row] = fmaf(w[i], rows[row * stride + at + i], sums[row]);
    }
    __device__ __forceinline__ void add_odd(const float* w, int at, int count) { add_even(w, at, count); }

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
    // What is fetched next: from where, up to where the columns of the lane's row end, and as many steps of the tile.
    int next_product = 0, next_tile = 0, steps_left = 0, stride = 0;
    const T *next = nullptr, *end = nullptr;
    unsigned fetched = 0, used = 0;

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
                const T* from = (const T*)p.w + size_t(row) * p.k;
                next = from + p.part() * STEP + lane_id() % 4 * 8;
                end = from + p.k;
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
            unsigned char* to = places + fetched % RING * PLACE_BYTES;
#pragma unroll
            for (int i = 0; i < LANE_BYTES; i += 16) {
                const T* from = next + i / sizeof(T);
                // Only a row that is no whole number of steps ends in between.
                if (next < end)
                    cp_async16(to + i, from);
                else
                    *(uint4*)(to + i) = make_uint4(0, 0, 0, 0);
            }
            next += stride;
            steps_left--;
            fetched++;
        }
        cp_async_commit();
    }

    // The weights that were fetched the longest time ago, if they are there.
    __device__ __forceinline__ const T* take() { return (const T*)(places + used++ % RING * PLACE_BYTES); }

    // Sums of this warp's part of a tile's columns, for so many rows.
    __device__ __forceinline__ void multiply(float (&y)[4], const Product& p, const T* rows, int row_stride, int count) {
        Sums<T> sums(rows + p.part() * STEP, row_stride, count);
        const int step = p.parts() * STEP;
        int steps = p.steps(), at = 0;
        // What is multiplied is read before its place is fetched into again.
#pragma unroll 1
        for (; steps > 1; steps -= 2) {
            cp_async_wait<RING - 3>();
            sums.add_even(take(), at, count);
            sums.add_odd(take(), at + step, count);
            at += 2 * step;
            fetch();
            fetch();
        }
        if (steps > 0) {
            cp_async_wait<RING - 2>();
            sums.add_even(take(), at, count);
            fetch();
        }
        sums.end(y, count);
    }
};
