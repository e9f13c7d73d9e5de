// Sums of products over many rows of two matrices, in registers: what gradients of weights are made of.
#pragma once

#include "tiles.h"

namespace {

constexpr int kGradRows = 6;                           // outputs × vectors of inputs that stay in registers
constexpr int kGradColumns = Vec::lanes == 16 ? 4 : 2; //
constexpr int64_t kPanel = kGradColumns * Vec::lanes;

// One vector of each of `depth` rows, side by side as a `Dot` multiplies them: to[lane][row].
inline void store_together(float* to, const Vec (&rows)[1]) { store(to, rows[0], Vec::lanes); }

#ifdef __AVX512BF16__
inline __m512i side_by_side(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

inline void store_together(bfloat16* to, const Vec (&rows)[2]) {
    _mm512_storeu_si512(to, side_by_side(to_bfloat16(rows[0].v), to_bfloat16(rows[1].v)));
}
#endif

// out[o, c] += rows[., o]^T columns[., c], over `groups` of `depth` rows that lie side by side, for up to `Rows` outputs.
template <class Dot, int Columns, int Rows>
inline void add_products(float* out, int64_t stride, int64_t count, int groups, const typename Dot::Element* columns,
                         const typename Dot::Element* rows, int64_t row_stride) {
    if constexpr (Rows > 1) {
        if (count < Rows)
            return add_products<Dot, Columns, Rows - 1>(out, stride, count, groups, columns, rows, row_stride);
    }
    Vec sum[Rows][Columns];
    UNROLL for (int r = 0; r < Rows; ++r) {
        UNROLL for (int j = 0; j < Columns; ++j) sum[r][j] = load(out + r * stride + j * Vec::lanes, Vec::lanes);
    }
    for (int group = 0; group < groups; ++group, columns += Dot::depth * kPanel, rows += Dot::depth * row_stride) {
        decltype(Dot::template weights<Vec>(columns)) w[Columns];
        UNROLL for (int j = 0; j < Columns; ++j) w[j] = Dot::template weights<Vec>(columns + Dot::depth * j * Vec::lanes);
        UNROLL for (int r = 0; r < Rows; ++r) {
            const auto g = Dot::template broadcast<Vec>(rows + Dot::depth * r);
            UNROLL for (int j = 0; j < Columns; ++j) sum[r][j] = Dot::multiply_add(w[j], g, sum[r][j]);
        }
    }
    UNROLL for (int r = 0; r < Rows; ++r) {
        UNROLL for (int j = 0; j < Columns; ++j) store(out + r * stride + j * Vec::lanes, sum[r][j], Vec::lanes);
    }
}

} // namespace
