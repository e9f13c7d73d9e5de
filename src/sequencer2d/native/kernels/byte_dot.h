// Sums of four neighbouring products of unsigned and signed bytes, exact in 32 bits; and floats rounded to bytes.
// Included after the vectors of an instruction set (vector_portable.h and its like):
//   kByteRows, kByteColumns      what fits the registers: rows, and vectors of columns
//   ByteDot, ByteSum             weights and inputs in registers, and the sum of their products
//   no_bytes(), to_floats(sum)   an empty sum, and a finished one
//   store_bytes(p, x, count)     to nearest, within 0 and 255; NaN becomes 0
#pragma once

namespace {

#if defined(__AVX512BW__)

inline void store_bytes(uint8_t* p, Vec x, int count) {
    const __m512i whole = _mm512_max_epi32(_mm512_cvtps_epi32(_mm512_min_ps(x.v, _mm512_set1_ps(255))),
                                           _mm512_setzero_si512());
    _mm_mask_storeu_epi8(p, first(count), _mm512_cvtusepi32_epi8(whole));
}

constexpr int kByteColumns = 3;

typedef int32_t Sums __attribute__((vector_size(64))); // unlike __m512i, it may not alias: GCC spills what may

struct ByteSum {
    Sums v;
};

inline ByteSum no_bytes() { return {Sums{}}; }

inline Vec to_floats(ByteSum sum) { return {_mm512_cvtepi32_ps((__m512i)sum.v)}; }

#if defined(__AVX512VNNI__)

constexpr int kByteRows = 8;

struct ByteDot {
    using Weights = __m512i;
    using Inputs = __m512i;
    static Weights weights(const int8_t* p) { return _mm512_loadu_si512(p); }
    static Inputs broadcast(const uint8_t* p) {
        int32_t four;
        memcpy(&four, p, sizeof four);
        return _mm512_set1_epi32(four);
    }
    static ByteSum multiply_add(Inputs x, Weights w, ByteSum sum) {
        return {(Sums)_mm512_dpbusd_epi32((__m512i)sum.v, x, w)};
    }
};

#else

constexpr int kByteRows = 6;

struct ByteDot { // even and odd bytes as 16 bits: products of bytes as such would overflow
    struct Pair {
        __m512i even, odd;
    };
    using Weights = Pair;
    using Inputs = Pair;
    static Weights weights(const int8_t* p) {
        const __m512i w = _mm512_loadu_si512(p);
        return {_mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), _mm512_srai_epi16(w, 8)};
    }
    static Inputs broadcast(const uint8_t* p) {
        int32_t four;
        memcpy(&four, p, sizeof four);
        const __m512i x = _mm512_set1_epi32(four);
        return {_mm512_and_si512(x, _mm512_set1_epi16(255)), _mm512_srli_epi16(x, 8)};
    }
    static ByteSum multiply_add(Inputs x, Weights w, ByteSum sum) {
        return {sum.v + (Sums)_mm512_madd_epi16(x.even, w.even) + (Sums)_mm512_madd_epi16(x.odd, w.odd)};
    }
};

#endif

#elif defined(__AVX2__)

inline void store_bytes(uint8_t* p, Vec x, int count) {
    int32_t whole[8];
    const __m256 bounded = _mm256_max_ps(_mm256_min_ps(x.v, _mm256_set1_ps(255)), _mm256_setzero_ps());
    const __m256i number = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_ORD_Q));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(whole), _mm256_and_si256(_mm256_cvtps_epi32(bounded), number));
    for (int i = 0; i < count; ++i) p[i] = static_cast<uint8_t>(whole[i]);
}

constexpr int kByteRows = 4, kByteColumns = 1;

typedef int32_t Sums __attribute__((vector_size(32))); // unlike __m256i, it may not alias: GCC spills what may

struct ByteSum {
    Sums v;
};

inline ByteSum no_bytes() { return {Sums{}}; }

inline Vec to_floats(ByteSum sum) { return {_mm256_cvtepi32_ps((__m256i)sum.v)}; }

struct ByteDot { // even and odd bytes as 16 bits: products of bytes as such would overflow
    struct Pair {
        __m256i even, odd;
    };
    using Weights = Pair;
    using Inputs = Pair;
    static Weights weights(const int8_t* p) {
        const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return {_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)};
    }
    static Inputs broadcast(const uint8_t* p) {
        int32_t four;
        memcpy(&four, p, sizeof four);
        const __m256i x = _mm256_set1_epi32(four);
        return {_mm256_and_si256(x, _mm256_set1_epi16(255)), _mm256_srli_epi16(x, 8)};
    }
    static ByteSum multiply_add(Inputs x, Weights w, ByteSum sum) {
        return {sum.v + (Sums)_mm256_madd_epi16(x.even, w.even) + (Sums)_mm256_madd_epi16(x.odd, w.odd)};
    }
};

#else

inline void store_bytes(uint8_t* p, Vec x, int count) {
    for (int i = 0; i < count; ++i) {
        const float value = x.v[i] > 0 ? (x.v[i] < 255 ? x.v[i] : 255) : 0; // NaN is not above 0
        p[i] = static_cast<uint8_t>(value + kNoFraction - kNoFraction);
    }
}

constexpr int kByteRows = 4, kByteColumns = 1;

using ByteSum = Flags;

inline ByteSum no_bytes() { return Flags{0, 0, 0, 0}; }

inline Vec to_floats(ByteSum sum) {
    Vec x;
    for (int i = 0; i < 4; ++i) x.v[i] = static_cast<float>(sum[i]);
    return x;
}

struct ByteDot {
    using Weights = const int8_t*;
    using Inputs = const uint8_t*;
    static Weights weights(const int8_t* p) { return p; }
    static Inputs broadcast(const uint8_t* p) { return p; }
    static ByteSum multiply_add(Inputs x, Weights w, ByteSum sum) {
        for (int lane = 0; lane < 4; ++lane)
            for (int i = 0; i < 4; ++i) sum[lane] += x[i] * w[4 * lane + i];
        return sum;
    }
};

#endif

} // namespace
