// Elements: conversion between float32, float16 and bfloat16, and symmetric int8 quantisation in blocks.
//
// Rounding is to nearest, ties to even, on the host and the device. The host uses integer arithmetic without branches,
// which compilers vectorise; the device uses conversion instructions. The two differ only in the bits of a NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "index.h"

namespace fastnabla {

enum class Dtype : int32_t { Float32, Float16, BFloat16, Int8 };

// A tensor's elements in memory. Arithmetic is in float.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

HOST_DEVICE inline int size_of(Dtype dtype) {
    return dtype == Dtype::Float32 ? 4 : dtype == Dtype::Int8 ? 1 : 2;
}

template <typename To, typename From>
HOST_DEVICE inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

HOST_DEVICE inline float to_float(float x) {
    return x;
}

HOST_DEVICE inline float to_float(BFloat16 x) {
    return bit_cast<float>(uint32_t{x.bits} << 16);
}

HOST_DEVICE inline float to_float(Half x) {
#ifdef __CUDA_ARCH__
    return __half2float(bit_cast<__half>(x.bits));
#else
    const uint32_t magnitude = x.bits & 0x7FFFu, sign = (x.bits & 0x8000u) << 16;
    // The exponent's bias is 15 there and 127 here; infinities and NaNs have the largest exponent in both.
    const uint32_t rebias = magnitude >= 0x7C00u ? 224u << 23 : 112u << 23;
    const uint32_t normal = (magnitude << 13) + rebias;
    const uint32_t subnormal = bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    return bit_cast<float>(sign | (magnitude < 0x0400u ? subnormal : normal));
#endif
}

HOST_DEVICE inline void from_float(float x, float* to) {
    *to = x;
}

HOST_DEVICE inline void from_float(float x, BFloat16* to) {
#ifdef __CUDA_ARCH__
    to->bits = bit_cast<uint16_t>(__float2bfloat16_rn(x));
#else
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    to->bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
#endif
}

HOST_DEVICE inline void from_float(float x, Half* to) {
#ifdef __CUDA_ARCH__
    to->bits = bit_cast<uint16_t>(__float2half_rn(x));
#else
    const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7FFFFFFFu, sign = bits >> 16 & 0x8000u;
    const uint32_t rebiased = magnitude - (112u << 23);
    const uint32_t rounded = (rebiased + 0xFFFu + (rebiased >> 13 & 1u)) >> 13;
    const uint32_t normal = rounded < 0x7C00u ? rounded : 0x7C00u;
    // Below the smallest normal number, 2^-14, halves have a spacing of 2^-24, as floats have from 0.5 on.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    to->bits = static_cast<uint16_t>(sign | (magnitude > 0x7F800000u ? 0x7E00u : finite));
#endif
}

// Without a conversion the bits stay as they are, NaNs included.
template <typename Target, typename Source>
HOST_DEVICE inline Target convert(Source x) {
    if constexpr (std::is_same_v<Target, Source>) {
        return x;
    } else {
        Target to;
        from_float(to_float(x), &to);
        return to;
    }
}

// Quantisation of a block: scale = absmax / 127, q = round(x / scale), and x is read as q * scale.
//
// |x - q * scale| <= scale / 2 + 2^-22 absmax, where the last term is float32 rounding of the quotient and the product. If
// absmax < 2^-119, where the scale is subnormal or zero, add 2^-142. A block of zeros has scale 0. A block with an
// infinity or a NaN gets zeros and a scale that is not finite, so that all of it is read as NaN.

// The larger of an absmax and a magnitude; a NaN wins.
HOST_DEVICE inline float larger(float absmax, float magnitude) {
    return magnitude > absmax || magnitude != magnitude ? magnitude : absmax;
}

HOST_DEVICE inline float scale_of(float absmax) {
    return absmax / 127.0f;
}

HOST_DEVICE inline bool is_usable(float scale) {
    return scale > 0.0f && scale <= 3.402823466e38f;
}

// `usable` is is_usable(scale), the same for a whole block.
HOST_DEVICE inline int8_t quantised(float x, float scale, bool usable) {
    const float ratio = usable ? x / scale : 0.0f;
    // The ratio can exceed 127 if the scale is subnormal.
    const float bounded = ratio > 127.0f ? 127.0f : ratio < -127.0f ? -127.0f : ratio;
#ifdef __CUDA_ARCH__
    return static_cast<int8_t>(__float2int_rn(bounded));
#else
    // Floats from 2^23 on are integers, so adding 1.5 * 2^23 rounds. Unlike rintf it vectorises everywhere.
    return static_cast<int8_t>(static_cast<int32_t>((bounded + 0x1.8p23f) - 0x1.8p23f));
#endif
}

HOST_DEVICE inline float dequantised(int8_t q, float scale) {
    return static_cast<float>(q) * scale;
}

}  // namespace fastnabla
