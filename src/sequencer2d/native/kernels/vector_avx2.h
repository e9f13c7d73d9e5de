// Eight floats in AVX2 registers, with FMA. The names are explained in vector_portable.h.
#pragma once

#include <immintrin.h>

#include "numbers.h"

namespace {

constexpr int kForwardSequences = 3;
constexpr int kBackwardSequences = 4;
constexpr int kBackwardBlocks = 3;

struct Vec {
    static constexpr int lanes = 8;
    __m256 v;
    static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
};

using Tail = Vec;

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

inline Vec absolute(Vec x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v)}; }

inline float total(Vec x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline __m256i first(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec load(const float* p, int count) {
    if (count == Vec::lanes) return {_mm256_loadu_ps(p)};
    return {_mm256_maskload_ps(p, first(count))};
}

inline void store(float* p, Vec x, int count) {
    if (count == Vec::lanes) return _mm256_storeu_ps(p, x.v);
    _mm256_maskstore_ps(p, first(count), x.v);
}

// `count` numbers of 16 bits; those beyond are 0.
template <class Half>
inline __m128i load_halves(const Half* p, int count) {
    if (count == Vec::lanes) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    uint16_t some[8] = {};
    for (int i = 0; i < count; ++i) some[i] = p[i].bits;
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(some));
}

template <class Half>
inline void store_halves(Half* p, __m128i halves, int count) {
    if (count == Vec::lanes) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
    uint16_t some[8];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(some), halves);
    for (int i = 0; i < count; ++i) p[i].bits = some[i];
}

inline Vec load(const bfloat16* p, int count) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(p, count)), 16))};
}

inline Vec load(const float16* p, int count) { return {_mm256_cvtph_ps(load_halves(p, count))}; }

inline void store(bfloat16* p, Vec x, int count) {
    const __m256i bits = _mm256_castps_si256(x.v), upper = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40)); // a NaN stays one
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(rounded, quiet, is_nan);
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    store_halves(p, halves, count);
}

inline void store(float16* p, Vec x, int count) {
    store_halves(p, _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), count);
}

constexpr bool kStreams = false;
inline void stream(void*, const void*, int64_t) {}
inline void end_of_stream() {}

inline Vec clamp(Vec x, float low, float high) { // min and max give their second operand where one is NaN
    return {_mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), x.v))};
}

template <bool Exact>
inline Vec reciprocal(Vec x) {
    return {_mm256_div_ps(_mm256_set1_ps(1), x.v)};
}

inline Vec nearest(Vec x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

inline Vec power_of_two(Vec n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))};
}

} // namespace

#include "dot.h"

namespace {
using BFloat16Dot = FloatDot;
}
