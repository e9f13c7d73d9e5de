// Max pooling of 2×2 pixels, channels-last. Which pixel was the largest is kept in a byte, so that the gradient
// writes every pixel once; PyTorch's fills with zeros first, which takes longer than all the rest.
#pragma once

#include "tiles.h"

namespace {

template <class Value>
class Pool {
  public:
    explicit Pool(const Pooling& problem) : problem(problem), C(problem.channels), columns(problem.width / 2) {}

    void forward(const Value* x, Value* y, uint8_t* chosen) {
        const auto body = [&](int64_t row) {
            const Value* upper = x + 2 * row * problem.width * C;
            const Value* lower = upper + problem.width * C;
            for (int64_t column = 0; column < columns; ++column)
                for (int64_t c = 0; c < C; c += Vec::lanes) {
                    const int64_t from = 2 * column * C + c, to = (row * columns + column) * C + c;
                    const Value* pixels[4] = {upper + from, upper + from + C, lower + from, lower + from + C};
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

    void backward(const Value* grad_y, const uint8_t* chosen, Value* grad_x) {
        const auto body = [&](int64_t row) {
            Value* upper = grad_x + 2 * row * problem.width * C;
            Value* lower = upper + problem.width * C;
            for (int64_t column = 0; column < columns; ++column)
                for (int64_t c = 0; c < C; c += Vec::lanes) {
                    const int64_t to = 2 * column * C + c, from = (row * columns + column) * C + c;
                    Value* pixels[4] = {upper + to, upper + to + C, lower + to, lower + to + C};
                    const __m512 grad = load(grad_y + from, Vec::lanes).v;
                    const __m512i which =
                        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(chosen + from)));
                    UNROLL for (int i = 0; i < 4; ++i) {
                        const __mmask16 its = _mm512_cmpeq_epi32_mask(which, _mm512_set1_epi32(i));
                        store(pixels[i], Vec{_mm512_maskz_mov_ps(its, grad)}, Vec::lanes);
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
    if (problem.type == kFloat32)
        Pool<float>(problem).forward(static_cast<const float*>(x), static_cast<float*>(y), chosen);
    else
        Pool<bfloat16>(problem).forward(static_cast<const bfloat16*>(x), static_cast<bfloat16*>(y), chosen);
}

inline void pool_gradient(const Pooling& problem, const void* grad_y, const uint8_t* chosen, void* grad_x) {
    if (problem.type == kFloat32)
        Pool<float>(problem).backward(static_cast<const float*>(grad_y), chosen, static_cast<float*>(grad_x));
    else
        Pool<bfloat16>(problem).backward(static_cast<const bfloat16*>(grad_y), chosen, static_cast<bfloat16*>(grad_x));
}

} // namespace
