// GELU, x Phi(x) with the normal distribution's Phi, and its derivative, Phi(x) + x phi(x), in one pass.
//
// Phi(-|x|) = (a1 t + ... + a5 t^5) e^(-x^2 / 2) with t = 1 / (1 + p |x|): Abramowitz & Stegun 7.1.26, error 1e-7.
// gelu(x) = max(x, 0) - |x| Phi(-|x|), which keeps the digits of small results.
#pragma once

#include "activations.h"
#include "tiles.h"

namespace {

template <class Value>
struct Gelu {
    static constexpr bool exact = sizeof(Value) == sizeof(float);
    static constexpr int64_t kChunk = 1 << 14; // values that a thread takes at a time

    static void run(int threads, int64_t count, const void* x, void* y, const void* grad_y, void* grad_x) {
        Gelu self{count, static_cast<const Value*>(x), static_cast<Value*>(y), static_cast<const Value*>(grad_y),
                  static_cast<Value*>(grad_x)};
        parallel_for(
            threads, round_up(count, kChunk) / kChunk,
            [](void* pointer, int64_t item, int) { static_cast<const Gelu*>(pointer)->run_chunk(item * kChunk); },
            &self);
    }

    int64_t count;
    const Value* x;
    Value* y;
    const Value* grad_y;
    Value* grad_x;

    void run_chunk(int64_t begin) const {
        const int64_t end = begin + smaller(kChunk, count - begin);
        int64_t i = begin;
        for (; i + Vec::lanes <= end; i += Vec::lanes) run_vector(i, Vec::lanes);
        if (i < end) run_vector(i, static_cast<int>(end - i));
    }

    __attribute__((always_inline)) inline void run_vector(int64_t i, const int lanes) const {
        const Vec zero = Vec::broadcast(0), one = Vec::broadcast(1);
        const Vec v = load(x + i, lanes), positive = clamp(v, 0, __builtin_inff());
        const Vec near = clamp(v, -20, 20), size = clamp(near, 0, 20) + clamp(zero - near, 0, 20);
        const Exponential e = exponential<exact>(clamp(near * near * Vec::broadcast(-0.5f), -87, 0));
        const Vec bell = multiply_add(e.power, e.fraction, e.power); // e^(-x^2 / 2)
        const Vec t = reciprocal<exact>(multiply_add(size, Vec::broadcast(0.23164189f), one)); // p / sqrt(2)
        Vec q = Vec::broadcast(0.5f * 1.061405429f);
        q = multiply_add(q, t, Vec::broadcast(0.5f * -1.453152027f));
        q = multiply_add(q, t, Vec::broadcast(0.5f * 1.421413741f));
        q = multiply_add(q, t, Vec::broadcast(0.5f * -0.284496736f));
        q = multiply_add(q, t, Vec::broadcast(0.5f * 0.254829592f));
        const Vec tail = q * t * bell; // Phi(-|x|)
        store(y + i, positive - size * tail, lanes);
        if (grad_y) {
            const Vec above = clamp(v * Vec::broadcast(1e38f), 0, 1); // 1 where x > 0
            const Vec phi = multiply_add(one - above - above, tail, above);
            const Vec slope = multiply_add(near * Vec::broadcast(0.39894228f), bell, phi);
            store(grad_x + i, load(grad_y + i, lanes) * slope, lanes);
        }
    }
};

} // namespace
