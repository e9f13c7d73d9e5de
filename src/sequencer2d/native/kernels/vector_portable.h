// Four floats in the vector types of GCC and Clang: any processor.
//
// Every vector_*.h defines the same names:
//   Vec                          `lanes` floats; operators + - * and those below
//   Tail                         as Vec, of half as many lanes where these take less time; with `load_tail`, or Vec itself
//   load, store                  `count` values, float, bfloat16 or float16; lanes beyond are 0, or not written; count == lanes
//                                is what compilers should specialise for
//   multiply_add(a, b, c)        a * b + c
//   absolute(x)                  |x|
//   total(x)                     sum of the lanes
//   clamp(x, low, high)          NaN stays NaN
//   reciprocal<Exact>(x)         1 / x for |x| in [1, 1e38]; not exact: to about bfloat16
//   nearest(x), power_of_two(n)  rounding, and 2^n for a whole n in [-126, 126]
//   stream(to, from, bytes)      copies whole cache lines past the caches; other threads see them after `end_of_stream`.
//                                kStreams: whether it is worth while, and done
//   kForwardSequences, kBackwardSequences, kBackwardBlocks: what fits the registers
//   BFloat16Dot                  how bfloat16 matrices are multiplied (dot.h)
#pragma once

#include "numbers.h"

namespace {

constexpr int kForwardSequences = 2;
constexpr int kBackwardSequences = 4;
constexpr int kBackwardBlocks = 2;

typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
typedef int32_t Flags __attribute__((vector_size(16)));

struct Vec {
    static constexpr int lanes = 4;
    Floats v;
    static Vec broadcast(float x) { return {Floats{x, x, x, x}}; }
};

using Tail = Vec;

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }

inline Vec absolute(Vec x) { return {(Floats)((Bits)x.v & 0x7fffffff)}; }

inline float total(Vec x) { return (x.v[0] + x.v[1]) + (x.v[2] + x.v[3]); }

template <class Value>
inline Vec load(const Value* p, int count) {
    Vec x = Vec::broadcast(0);
    for (int i = 0; i < count; ++i) x.v[i] = to_float(p[i]);
    return x;
}

template <class Value>
inline void store(Value* p, Vec x, int count) {
    for (int i = 0; i < count; ++i) p[i] = from_float<Value>(x.v[i]);
}

constexpr bool kStreams = false;
inline void stream(void*, const void*, int64_t) {}
inline void end_of_stream() {}

inline Floats choose(Flags flags, Floats a, Floats b) {
    return (Floats)(((Bits)flags & (Bits)a) | (~(Bits)flags & (Bits)b));
}

inline Vec clamp(Vec x, float low, float high) {
    const Floats lows = Vec::broadcast(low).v, highs = Vec::broadcast(high).v;
    x.v = choose(x.v < lows, lows, x.v);
    return {choose(x.v > highs, highs, x.v)};
}

template <bool Exact>
inline Vec reciprocal(Vec x) {
    return {Vec::broadcast(1).v / x.v};
}

// Adding 1.5 * 2^23 leaves no room for a fraction; the whole part is then in the lowest bits.
constexpr float kNoFraction = 12582912.0f;

inline Vec nearest(Vec x) { return x + Vec::broadcast(kNoFraction) - Vec::broadcast(kNoFraction); }

inline Vec power_of_two(Vec n) {
    const Bits whole = (Bits)(n + Vec::broadcast(kNoFraction + 127)).v;
    return {(Floats)(whole << 23)};
}

} // namespace

#include "dot.h"

namespace {
using BFloat16Dot = FloatDot;
}
