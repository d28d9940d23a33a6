#include "machine.h"

#include <cstring>

namespace emulator {

typedef uint16_t Halves __attribute__((vector_size(16), may_alias));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef float Row __attribute__((vector_size(32), may_alias));

struct Bf16 {
    static Row convert(Halves halves) { return (Row)(__builtin_convertvector(halves, Words) << 16); }
};

struct F16 {
    static Row convert(Halves halves) {
        Words bits = __builtin_convertvector(halves, Words);
        Words result = (Words)((Row)((bits & 0x7fff) << 13) * 0x1p112f);
        Words special = (Words)((bits & 0x7c00) == 0x7c00);
        return (Row)(result | (special & 0x7f800000) | (bits & 0x8000) << 16);
    }
};

// Unrolled by hand, so that D stays in registers: GCC unrolls at -O3 only.
#define UNROLL _Pragma("GCC unroll 16")

template <class Format>
static void multiply(Warp& warp) {
    // Each part of A is an 8x8 matrix, which the words of consecutive lanes make up.
    alignas(32) float a[16][16];
    UNROLL for (int part = 0; part < 4; part++) {
        const auto* rows = reinterpret_cast<const Halves*>(warp.a[part]);
        UNROLL for (int row = 0; row < 8; row++) {
            *reinterpret_cast<Row*>(&a[part % 2 * 8 + row][part / 2 * 8]) = Format::convert(rows[row]);
        }
    }
    Row b[16];
    UNROLL for (int row = 0; row < 16; row++) {
        b[row] = Format::convert(*reinterpret_cast<const Halves*>(warp.b[row]));
    }
    for (int half = 0; half < 2; half++) {
        alignas(32) float result[8][8];
        for (int lane = 0; lane < 32; lane++) memcpy(&result[lane / 4][lane % 4 * 2], warp.d[lane] + half * 2, 8);
        Row d[8];
        UNROLL for (int row = 0; row < 8; row++) d[row] = *reinterpret_cast<const Row*>(result[row]);
        for (int k = 0; k < 16; k++) {
            UNROLL for (int row = 0; row < 8; row++) d[row] += a[half * 8 + row][k] * b[k];
        }
        UNROLL for (int row = 0; row < 8; row++) *reinterpret_cast<Row*>(result[row]) = d[row];
        for (int lane = 0; lane < 32; lane++) memcpy(warp.d[lane] + half * 2, &result[lane / 4][lane % 4 * 2], 8);
    }
}

void multiply_bf16(Warp& warp) { multiply<Bf16>(warp); }

void multiply_f16(Warp& warp) { multiply<F16>(warp); }

void load_matrices(Warp& warp) {
    for (int matrix = 0; matrix < 4; matrix++) {
        for (int row = 0; row < 8; row++) {
            const uint32_t* pairs = warp.rows[matrix * 8 + row];
            for (int pair = 0; pair < 4; pair++) warp.results[row * 4 + pair][matrix] = pairs[pair];
        }
    }
}

void load_transposed(Warp& warp) {
    for (int matrix = 0; matrix < 4; matrix++) {
        uint16_t elements[8][8];
        for (int row = 0; row < 8; row++) memcpy(elements[row], warp.rows[matrix * 8 + row], 16);
        for (int lane = 0; lane < 32; lane++) {
            int column = lane / 4, row = lane % 4 * 2;
            warp.results[lane][matrix] = elements[row][column] | uint32_t(elements[row + 1][column]) << 16;
        }
    }
}

}  // namespace emulator
