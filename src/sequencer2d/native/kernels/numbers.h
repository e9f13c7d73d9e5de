// Numbers in memory: float, bfloat16 as its upper 16 bits, and float16. Included by the files of one instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

struct bfloat16 {
    uint16_t bits;
};

struct __attribute__((may_alias)) float16 { // may_alias: takes the place of bfloat16 in a tensor
    uint16_t bits;
};

// What is kept for the gradient, of values of one type: float16 has eight times bfloat16's precision in the same memory.
// Gates are within -1 and 1; cell states within the number of steps, and a store may clamp them.
template <class Value>
struct Kept {
    using Type = Value;
};

template <>
struct Kept<bfloat16> {
    using Type = float16;
};

constexpr float kLargestFloat16 = 65504;

inline float to_float(float x) { return x; }

inline float to_float(bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

inline float to_float(float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    const float tiny = static_cast<float>(rest) * 0x1p-24f;
    uint32_t bits = (rest << 13) + (rest < 0x7c00 ? 112u << 23 : 224u << 23); // infinity and NaN have the last exponent
    if (rest < 0x400) memcpy(&bits, &tiny, sizeof bits);
    bits |= sign;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

template <class To>
inline To from_float(float x);

template <>
inline float from_float<float>(float x) {
    return x;
}

template <>
inline bfloat16 from_float<bfloat16>(float x) { // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)}; // a NaN stays one
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline float16 from_float<float16>(float x) { // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    uint32_t half = (rest + 0xfff + (rest >> 13 & 1) - (112u << 23)) >> 13;
    if (rest < 0x38800000) { // less than 2^-14: the last bit is 2^-24, as it is in floats from 0.5 on
        float aligned;
        memcpy(&aligned, &rest, sizeof aligned);
        aligned += 0.5f;
        memcpy(&half, &aligned, sizeof half);
        half -= 0x3f000000;
    }
    if (rest >= 0x477ff000) half = 0x7c00; // infinity is next
    if (x != x) half = 0x7e00;
    return {static_cast<uint16_t>(sign | half)};
}

} // namespace
