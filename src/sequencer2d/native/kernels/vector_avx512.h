// Sixteen floats in AVX-512 registers; with the bfloat16 instructions where the compiler is told that they are there.
// The names are explained in vector_portable.h.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // GCC's own headers start from an undefined register
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "numbers.h"

namespace {

constexpr int kForwardSequences = 6;
constexpr int kBackwardSequences = 8;
constexpr int kBackwardBlocks = 3;

struct Vec {
    static constexpr int lanes = 16;
    __m512 v;
    static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
};

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

inline Vec absolute(Vec x) { return {_mm512_abs_ps(x.v)}; }

inline float total(Vec x) { return _mm512_reduce_add_ps(x.v); }

inline __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }

inline Vec load(const float* p, int count) { return {_mm512_maskz_loadu_ps(first(count), p)}; }

inline void store(float* p, Vec x, int count) { _mm512_mask_storeu_ps(p, first(count), x.v); }

inline Vec load(const bfloat16* p, int count) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
}

inline __m256i to_bfloat16(__m512 x) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    const __m512i bits = _mm512_castps_si512(x), upper = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __m512i quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40)); // a NaN stays one
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(is_nan, rounded, quiet));
#endif
}

inline void store(bfloat16* p, Vec x, int count) { _mm256_mask_storeu_epi16(p, first(count), to_bfloat16(x.v)); }

inline Vec load(const float16* p, int count) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p))};
}

inline void store(float16* p, Vec x, int count) {
    const __m256i half = _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(p, first(count), half);
}

constexpr bool kStreams = true;

inline void stream(void* to, const void* from, int64_t bytes) {
    auto* line = static_cast<__m512i*>(to);
    for (int64_t i = 0; i < bytes / 64; ++i)
        _mm512_stream_si512(line + i, _mm512_loadu_si512(static_cast<const char*>(from) + 64 * i));
}

inline void end_of_stream() { _mm_sfence(); }

inline Vec clamp(Vec x, float low, float high) { // min and max give their second operand where one is NaN
    return {_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), x.v))};
}

template <bool Exact>
inline Vec reciprocal(Vec x) {
    const __m512 y = _mm512_rcp14_ps(x.v);
    if (!Exact) return {y};
    return {_mm512_fmadd_ps(y, _mm512_fnmadd_ps(x.v, y, _mm512_set1_ps(1)), y)}; // one step of Newton's
}

inline Vec nearest(Vec x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

inline Vec power_of_two(Vec n) { return {_mm512_scalef_ps(_mm512_set1_ps(1), n.v)}; }

struct Tail {
    static constexpr int lanes = 8;
    __m256 v;
    static Tail broadcast(float x) { return {_mm256_set1_ps(x)}; }
};

inline Tail operator+(Tail a, Tail b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Tail operator-(Tail a, Tail b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Tail operator*(Tail a, Tail b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Tail multiply_add(Tail a, Tail b, Tail c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

inline __mmask8 first_of_tail(int count) { return static_cast<__mmask8>((1u << count) - 1); }

inline Tail load_tail(const float* p, int count) { return {_mm256_maskz_loadu_ps(first_of_tail(count), p)}; }

inline Tail load_tail(const bfloat16* p, int count) {
    const __m256i words = _mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(first_of_tail(count), p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))};
}

inline Tail load_tail(const float16* p, int count) {
    const __mmask8 some = first_of_tail(count);
    return {_mm256_maskz_cvtph_ps(some, _mm_maskz_loadu_epi16(some, p))};
}

inline void store(float* p, Tail x, int count) { _mm256_mask_storeu_ps(p, first_of_tail(count), x.v); }

template <class Half>
inline void store(Half* p, Tail x, int count) {
    store(p, Vec{_mm512_castps256_ps512(x.v)}, count);
}

inline Tail clamp(Tail x, float low, float high) {
    return {_mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), x.v))};
}

template <bool Exact>
inline Tail reciprocal(Tail x) {
    const __m256 y = _mm256_rcp14_ps(x.v);
    if (!Exact) return {y};
    return {_mm256_fmadd_ps(y, _mm256_fnmadd_ps(x.v, y, _mm256_set1_ps(1)), y)};
}

inline Tail nearest(Tail x) { return {_mm256_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

inline Tail power_of_two(Tail n) { return {_mm256_scalef_ps(_mm256_set1_ps(1), n.v)}; }

} // namespace

#include "dot.h"

namespace {

#ifdef __AVX512BF16__
// Two neighbouring products at once, summed in float.
struct BFloat16Dot {
    using Element = bfloat16;
    static constexpr int depth = 2;
    template <class V>
    static auto weights(const Element* p) {
        if constexpr (V::lanes == Vec::lanes)
            return (__m512bh)_mm512_loadu_si512(p);
        else
            return (__m256bh)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    template <class V>
    static auto broadcast(const Element* p) {
        int32_t pair;
        memcpy(&pair, p, sizeof pair);
        if constexpr (V::lanes == Vec::lanes)
            return (__m512bh)_mm512_set1_epi32(pair);
        else
            return (__m256bh)_mm256_set1_epi32(pair);
    }
    static Vec multiply_add(__m512bh w, __m512bh h, Vec sum) { return {_mm512_dpbf16_ps(sum.v, w, h)}; }
    static Tail multiply_add(__m256bh w, __m256bh h, Tail sum) { return {_mm256_dpbf16_ps(sum.v, w, h)}; }
};
#else
using BFloat16Dot = FloatDot;
#endif

} // namespace
