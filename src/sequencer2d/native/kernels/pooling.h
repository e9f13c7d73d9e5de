// Max pooling of 2×2 pixels of channels-last bfloat16. Which pixel was the largest is kept in a byte, so that the gradient
// writes every pixel once; PyTorch's fills with zeros first, which takes longer than all the rest.
#pragma once

#include "tiles.h"

namespace {

class Pool {
  public:
    explicit Pool(const Pooling& problem) : problem(problem), C(problem.channels), columns(problem.width / 2) {}

    void forward(const bfloat16* x, bfloat16* y, uint8_t* chosen) {
        const auto body = [&](int64_t row) {
            const bfloat16* upper = x + 2 * row * problem.width * C;
            const bfloat16* lower = upper + problem.width * C;
            for (int64_t column = 0; column < columns; ++column)
                for (int64_t c = 0; c < C; c += Vec::lanes) {
                    const int64_t from = 2 * column * C + c, to = (row * columns + column) * C + c;
                    const bfloat16* pixels[4] = {upper + from, upper + from + C, lower + from, lower + from + C};
                    __m512 largest = load(pixels[0], Vec::lanes).v;
                    __m512i which = _mm512_setzero_si512();
                    UNROLL for (int i = 1; i < 4; ++i) {
                        const __m512 other = load(pixels[i], Vec::lanes).v;
                        // a NaN wins, as in PyTorch
                        const __mmask16 wins = _mm512_cmp_ps_mask(other, largest, _CMP_GT_OQ) |
                                               _mm512_cmp_ps_mask(other, other, _CMP_UNORD_Q);
                        largest = _mm512_mask_mov_ps(largest, wins, other);
                        which = _mm512_mask_mov_epi32(which, wins, _mm512_set1_epi32(i));
                    }
                    store(y + to, Vec{largest}, Vec::lanes);
                    _mm_storeu_si128(reinterpret_cast<__m128i*>(chosen + to), _mm512_cvtepi32_epi8(which));
                }
        };
        for_each_row(body);
    }

    void backward(const bfloat16* grad_y, const uint8_t* chosen, bfloat16* grad_x) {
        const auto body = [&](int64_t row) {
            bfloat16* upper = grad_x + 2 * row * problem.width * C;
            bfloat16* lower = upper + problem.width * C;
            for (int64_t column = 0; column < columns; ++column)
                for (int64_t c = 0; c < C; c += Vec::lanes) {
                    const int64_t to = 2 * column * C + c, from = (row * columns + column) * C + c;
                    bfloat16* pixels[4] = {upper + to, upper + to + C, lower + to, lower + to + C};
                    const __m256i grad = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(grad_y + from));
                    const __m256i which =
                        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(chosen + from)));
                    UNROLL for (int i = 0; i < 4; ++i) {
                        const __mmask16 its = _mm256_cmpeq_epi16_mask(which, _mm256_set1_epi16(static_cast<short>(i)));
                        _mm256_storeu_si256(reinterpret_cast<__m256i*>(pixels[i]), _mm256_maskz_mov_epi16(its, grad));
                    }
                }
        };
        for_each_row(body);
    }

  private:
    const Pooling& problem;
    const int64_t C, columns;

    // Rows of the smaller images, of all together.
    template <class Body>
    void for_each_row(const Body& body) const {
        parallel_for(
            problem.threads, problem.batch * problem.height / 2,
            [](void* body, int64_t row, int) { (*static_cast<const Body*>(body))(row); }, const_cast<Body*>(&body));
    }
};

inline void pool(const Pooling& problem, const void* x, void* y, uint8_t* chosen) {
    Pool(problem).forward(static_cast<const bfloat16*>(x), static_cast<bfloat16*>(y), chosen);
}

inline void pool_gradient(const Pooling& problem, const void* grad_y, const uint8_t* chosen, void* grad_x) {
    Pool(problem).backward(static_cast<const bfloat16*>(grad_y), chosen, static_cast<bfloat16*>(grad_x));
}

} // namespace
