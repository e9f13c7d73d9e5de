// GELU, x Phi(x) with the normal distribution's Phi, and its derivative, Phi(x) + x phi(x), in one pass.
//
// gelu(x) = max(x, 0) - |x| Phi(-|x|), which keeps the digits of small results.
// Float: Phi(-|x|) = (a1 t + ... + a5 t^5) e^(-x^2 / 2), t = 1 / (1 + p |x|): Abramowitz & Stegun 7.1.26, error 1e-7.
// bfloat16: its binary logarithm is nearly a parabola; a polynomial gives it to 2.3e-4 of the result up to |x| = 8.
#pragma once

#include "activations.h"
#include "tiles.h"

namespace {

template <bool Exact>
struct Normal { // at -x, for x >= 0
    Vec area, density;
    __attribute__((always_inline)) inline explicit Normal(Vec x) {
        const Vec one = Vec::broadcast(1);
        if (Exact) {
            const Exponential e = exponential<true>(clamp(x * x * Vec::broadcast(-0.5f), -87, 0));
            const Vec bell = multiply_add(e.power, e.fraction, e.power);
            const Vec t = reciprocal<true>(multiply_add(x, Vec::broadcast(0.23164189f), one)); // p / sqrt(2)
            Vec q = Vec::broadcast(0.5f * 1.061405429f);
            q = multiply_add(q, t, Vec::broadcast(0.5f * -1.453152027f));
            q = multiply_add(q, t, Vec::broadcast(0.5f * 1.421413741f));
            q = multiply_add(q, t, Vec::broadcast(0.5f * -0.284496736f));
            q = multiply_add(q, t, Vec::broadcast(0.5f * 0.254829592f));
            area = q * t * bell;
            density = bell * Vec::broadcast(0.39894228f);
        } else {
            Vec q = Vec::broadcast(1.3207795e-05f);
            q = multiply_add(q, x, Vec::broadcast(-0.00042678335f));
            q = multiply_add(q, x, Vec::broadcast(0.0058977452f));
            q = multiply_add(q, x, Vec::broadcast(-0.0469971553f));
            q = multiply_add(q, x, Vec::broadcast(-0.467330312f));
            q = multiply_add(q, x, Vec::broadcast(-1.14700493f));
            const Exponential a = power(multiply_add(q, x, Vec::broadcast(-1.00033051f)));
            area = multiply_add(a.power, a.fraction, a.power);
            // log2 of e^(-x^2 / 2) / sqrt(2 pi)
            const Exponential d = power(multiply_add(x * x, Vec::broadcast(-0.72134752f), Vec::broadcast(-1.32574806f)));
            density = multiply_add(d.power, d.fraction, d.power);
        }
    }
};

template <bool Exact>
struct GeluOf { // of x, and its derivative there; what is not used is not computed
    Vec value, slope;
    __attribute__((always_inline)) inline explicit GeluOf(Vec x) {
        const Vec size = clamp(absolute(x), 0, Exact ? 20 : 8);
        const Normal<Exact> tail(size);
        value = clamp(x, 0, __builtin_inff()) - size * tail.area;
        const Vec above = clamp(x * Vec::broadcast(1e38f), 0, 1); // 1 where x > 0
        slope = multiply_add(Vec::broadcast(1) - above - above, tail.area - size * tail.density, above);
    }
};

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
        const GeluOf<exact> gelu(load(x + i, lanes));
        if (grad_y) store(grad_x + i, load(grad_y + i, lanes) * gelu.slope, lanes);
        store(y + i, gelu.value, lanes);
    }
};

} // namespace
