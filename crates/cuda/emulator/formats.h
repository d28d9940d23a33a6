// Conversions of bf16 and f16.
#pragma once

#include <bit>
#include <cstdint>

struct bf16 {
    unsigned short bits;
};
struct f16 {
    unsigned short bits;
};

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return std::bit_cast<float>(uint32_t(value.bits) << 16); }
inline float to_float(f16 value) {
    uint32_t magnitude = (value.bits & 0x7fffu) << 13;
    uint32_t result = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
    if ((value.bits & 0x7c00) == 0x7c00) result |= 0x7f800000;
    return std::bit_cast<float>(result | uint32_t(value.bits & 0x8000) << 16);
}

// Rounds to the nearest, ties to even.
template <class T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
    return value;
}

template <>
inline bf16 from_float<bf16>(float value) {
    uint32_t bits = std::bit_cast<uint32_t>(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
    return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline f16 from_float<f16>(float value) {
    uint32_t bits = std::bit_cast<uint32_t>(value);
    uint32_t sign = bits >> 16 & 0x8000;
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {0x7fff};
    // 65520 and above round to infinity.
    if (magnitude >= 0x477ff000) return {static_cast<unsigned short>(sign | 0x7c00)};
    uint32_t result;
    if (magnitude < 0x38800000) {
        // Subnormal: the sum's last bit is the result's.
        float sum = std::bit_cast<float>(magnitude) + 0.5f;
        result = std::bit_cast<uint32_t>(sum) - std::bit_cast<uint32_t>(0.5f);
    } else {
        result = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    }
    return {static_cast<unsigned short>(sign | result)};
}
