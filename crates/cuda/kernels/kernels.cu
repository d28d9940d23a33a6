// All kernels, by the names that `src/operations.rs` loads.

#include <ptx.cuh>

#include "attention.cuh"
#include "decode.cuh"
#include "gemm.cuh"
#include "pointwise.cuh"

#define GEMM(T, name, EPILOGUE)                                                                                        \
    KERNEL(gemm_128_##name##_##T, 256, Gemm, (gemm<T, 128, 128, 2, 4, 3, Epilogue::EPILOGUE>(args)))                   \
    KERNEL(gemm_64_##name##_##T, 128, Gemm, (gemm<T, 64, 64, 2, 2, 4, Epilogue::EPILOGUE>(args)))                      \
    KERNEL(gemm_32_##name##_##T, 128, Gemm, (gemm<T, 32, 32, 2, 2, 4, Epilogue::EPILOGUE>(args)))

#define GEMM_F32(name, EPILOGUE) KERNEL(gemm_64_##name##_f32, 256, Gemm, (gemm_f32<Epilogue::EPILOGUE>(args)))

#define POINTWISE(T)                                                                                                   \
    KERNEL(patchify_##T, 256, Patchify, (patchify<T>(args)))                                                           \
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
    GEMM(T, swiglu, SwiGlu)                                                                                            \
    GEMM(T, add_f32, AddF32)                                                                                           \
    GEMM(T, store_f32, StoreF32)                                                                                       \
    GEMM(T, add_positions, AddPositions)                                                                               \
    GEMM(T, rope_store_kv, RopeStoreKv)

using f32 = float;

HALF_GEMMS(bf16)
HALF_GEMMS(f16)
GEMM_F32(store, Store)
GEMM_F32(gelu, Gelu)
GEMM_F32(swiglu, SwiGlu)
GEMM_F32(add_f32, AddF32)
GEMM_F32(store_f32, StoreF32)
GEMM_F32(add_positions, AddPositions)
GEMM_F32(rope_store_kv, RopeStoreKv)

ATTENTION(bf16)
ATTENTION(f16)
KERNEL(attention_128_f32, 128, Attention, (attention_f32(args)))

POINTWISE(bf16)
POINTWISE(f16)
POINTWISE(f32)
