// Products of few rows with all weights of a model, one matrix after the other, by blocks that stay.
//
// What these take is to read the weights once. A warp knows which of them it will need for all products to come, and
// fetches them into a ring of shared memory, of which it has a part for itself, while it waits for what they are
// multiplied with.

#pragma once

#include "common.cuh"

constexpr int DECODE_WARPS = 16;
constexpr int DECODE_THREADS = DECODE_WARPS * WARP;
constexpr int MOST_ROWS = 16;
// Rows of a matrix that a warp multiplies at once, and columns that it fetches at once.
constexpr int TILE = 8, STEP = 32;
// Places of the ring.
constexpr int RING = 8;

// A matrix `[n, k]` in rows. So many warps of a block share a tile, by its columns: 1, 2, 4, 8 or 16, and 1 of the last.
struct Product {
    const void* w;
    int n, k, parts;
    // Of a block; each counts its own.
    int tiles;
};
static_assert(sizeof(Product) == 24);

// A tile's sums of a warp: of row lane / 4 columns 2 · (lane % 4) and the next, then of the eighth row behind it.
template <class T> struct Sums {
    float y[4] = {};

    // Each lane has eight weights of a column and the values that belong to them. The unit is told that they are of
    // other places than they are, which for a sum over all places is all the same.
    __device__ __forceinline__ void add(const T* w, const T* x, int stride, int count) {
        const int row = lane_id() / 4;
        const uint4 b = *(const uint4*)w, low = *(const uint4*)(x + min(row, count - 1) * stride);
        uint4 high = make_uint4(0, 0, 0, 0);
        if (count > 8)
            high = *(const uint4*)(x + min(row + 8, count - 1) * stride);
        const uint32_t a0[4] = {low.x, high.x, low.y, high.y}, a1[4] = {low.z, high.z, low.w, high.w};
        const uint32_t b0[2] = {b.x, b.y}, b1[2] = {b.z, b.w};
        mma<T>(y, a0, b0);
        mma<T>(y, a1, b1);
    }

    __device__ __forceinline__ void end() {}
};

// Without matrix units: a lane sums over its weights for each row.
template <> struct Sums<float> {
    float y[4] = {};
    float rows[MOST_ROWS] = {};

    __device__ __forceinline__ void add(const float* w, const float* x, int stride, int count) {
#pragma unroll
        for (int row = 0; row < MOST_ROWS; row++)
            if (row < count)
                for (int i = 0; i < 8; i++)
                    rows[row] = fmaf(w[i], x[row * stride + i], rows[row]);
    }

    __device__ __forceinline__ void end() {
        const int lane = lane_id(), from = lane % 4 * 8;
#pragma unroll
        for (int row = 0; row < MOST_ROWS; row++) {
            float sum = rows[row];
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
    int next_product = 0, next_tile = 0, steps_left = 0;
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
        for (int i = 0; i < RING - 1; i++)
            fetch();
    }

    __device__ void start(int product) {
        next_product = product;
        next_tile = warp_id() / products[product].parts;
    }

    // The next tile of this warp, of whatever product; none if it has a part in nothing.
    __device__ bool find_tile() {
        for (int turns = 0; turns <= count; turns++) {
            const Product& p = products[next_product];
            if (next_tile < p.tiles) {
                const int part = warp_id() & (p.parts - 1), row = (blockIdx.x + next_tile * gridDim.x) * TILE + lane_id() / 4;
                steps_left = (ceil_div(p.k, STEP) - part + p.parts - 1) / p.parts;
                next_tile += DECODE_WARPS / p.parts;
                // Rows beyond the last are the last again, and nobody looks at what becomes of them.
                const T* from = (const T*)p.w + size_t(min(row, p.n - 1)) * p.k;
                next = from + part * STEP + lane_id() % 4 * 8;
                end = from + p.k;
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
            unsigned char* to = places + fetched++ % RING * PLACE_BYTES;
#pragma unroll
            for (int i = 0; i < LANE_BYTES; i += 16) {
                const T* from = next + i / sizeof(T);
                // Only a row that is no whole number of steps ends in between.
                if (next < end)
                    cp_async16(to + i, from);
                else
                    *(uint4*)(to + i) = make_uint4(0, 0, 0, 0);
            }
            next += STEP * products[next_product].parts;
            steps_left--;
        }
        cp_async_commit();
    }

    // The weights that were fetched the longest time ago. They stay until the next but one is taken.
    __device__ const T* take() {
        cp_async_wait<RING - 2>();
        return (const T*)(places + used++ % RING * PLACE_BYTES);
    }

    // Product of this block's tiles with so many `rows`, `stride` apart in shared memory. `then(row, tile, col, y0, y1)`
    // takes what comes out, columns `col` and the next of the block's tile. `partial` is for sums that warps share.
    template <class F>
    __device__ void multiply(int product, const T* rows, int stride, int row_count, float* partial, F then) {
        const Product p = products[product];
        const int steps = ceil_div(p.k, STEP);
        const int group = warp_id() / p.parts, part = warp_id() % p.parts, groups = DECODE_WARPS / p.parts;
        const int lane = lane_id(), row = lane / 4;
        const int sums_of_a_part = (row_count + 7) / 8 * 8 * TILE;
        const T* x = rows + lane % 4 * 8;
        for (int tile = group; tile < p.tiles; tile += groups) {
            Sums<T> sums;
            for (int step = part; step < steps; step += p.parts) {
                const T* w = take();
                sums.add(w, x + step * STEP, stride, row_count);
                fetch();
            }
            sums.end();
            const int col = (blockIdx.x + tile * gridDim.x) * TILE + lane % 4 * 2;
            if (p.parts == 1) {
                if (row < row_count && col < p.n)
                    then(row, tile, col, sums.y[0], sums.y[1]);
                if (row + 8 < row_count && col < p.n)
                    then(row + 8, tile, col, sums.y[2], sums.y[3]);
            } else {
                float* to = partial + size_t(tile * p.parts + part) * sums_of_a_part + row * TILE + lane % 4 * 2;
                store_pair(to, sums.y[0], sums.y[1]);
                if (row_count > 8)
                    store_pair(to + 8 * TILE, sums.y[2], sums.y[3]);
            }
        }
        sync_block();
        if (p.parts == 1)
            return;
        // A pair of sums by as many lanes as there are parts of it.
        const int pairs = row_count * TILE / 2, all = p.tiles * pairs * p.parts;
        for (int i = threadIdx.x; i < ceil_div(all, WARP) * WARP; i += DECODE_THREADS) {
            const int part = i & (p.parts - 1), pair = i / p.parts, tile = pair / pairs, at = pair % pairs * 2;
            float2 y = make_float2(0.0f, 0.0f);
            if (i < all)
                y = *(const float2*)(partial + size_t(tile * p.parts + part) * sums_of_a_part + at);
            for (int mask = 1; mask < p.parts; mask *= 2) {
                y.x += shuffle_xor(y.x, mask);
                y.y += shuffle_xor(y.y, mask);
            }
            const int col = (blockIdx.x + tile * gridDim.x) * TILE + at % TILE;
            if (i < all && part == 0 && col < p.n)
                then(at / TILE, tile, col, y.x, y.y);
        }
        // Whoever is done may write to `partial` again.
        sync_block();
    }
};
