// All kernels, by the names that `mod.rs` asks for.

#include <ptx.cuh>

#include "attention.cuh"
#include "decode.cuh"
#include "gemm.cuh"
#include "pointwise.cuh"

#define GEMM(T, then, END)                                                                                            \
    KERNEL(gemm_128_##then##_##T, 256, Gemm, (gemm<T, 128, 128, 2, 4, 3, Then::END>(args)))                           \
    KERNEL(gemm_64_##then##_##T, 128, Gemm, (gemm<T, 64, 64, 2, 2, 4, Then::END>(args)))                              \
    KERNEL(gemm_32_##then##_##T, 128, Gemm, (gemm<T, 32, 32, 2, 2, 4, Then::END>(args)))

#define GEMM_F32(then, END) KERNEL(gemm_64_##then##_f32, 256, Gemm, (gemm_f32<Then::END>(args)))

#define POINTWISE(T)                                                                                                   \
    KERNEL(patches_##T, 256, Patches, (patches<T>(args)))                                                              \
    KERNEL(norm_##T, 128, Norm, (norm<T>(args)))                                                                       \
    KERNEL(embed_##T, 128, Embed, (embed<T>(args)))                                                                    \
    KERNEL(decode_##T, DECODE_THREADS, Decode, (decode<T>(args)))

#define ATTENTION(T)                                                                                                   \
    KERNEL(attention_16_##T, 128, Attention, (attention<T, 16>(args)))                                                 \
    KERNEL(attention_32_##T, 128, Attention, (attention<T, 32>(args)))                                                 \
    KERNEL(attention_64_##T, 128, Attention, (attention<T, 64>(args)))                                                 \
    KERNEL(attention_80_##T, 128, Attention, (attention<T, 80>(args)))                                                 \
    KERNEL(attention_128_##T, 128, Attention, (attention<T, 128>(args)))

#define HALF_GEMMS(T)                                                                                                  \
    GEMM(T, store, Store)                                                                                              \
    GEMM(T, gelu, Gelu)                                                                                                \
    GEMM(T, gated_silu, GatedSilu)                                                                                     \
    GEMM(T, add, Add)                                                                                                  \
    GEMM(T, set, Set)                                                                                                  \
    GEMM(T, embed, Embed)                                                                                              \
    GEMM(T, turn, Turn)

using f32 = float;

HALF_GEMMS(bf16)
HALF_GEMMS(f16)
GEMM_F32(store, Store)
GEMM_F32(gelu, Gelu)
GEMM_F32(gated_silu, GatedSilu)
GEMM_F32(add, Add)
GEMM_F32(set, Set)
GEMM_F32(embed, Embed)
GEMM_F32(turn, Turn)

ATTENTION(bf16)
ATTENTION(f16)
KERNEL(attention_all_f32, 128, Attention, (attention_f32(args)))

POINTWISE(bf16)
POINTWISE(f16)
POINTWISE(f32)
