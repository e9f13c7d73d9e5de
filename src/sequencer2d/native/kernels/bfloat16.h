// Numbers in memory: float, and bfloat16 as its upper 16 bits. Included by the files of one instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

struct bfloat16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
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

} // namespace
