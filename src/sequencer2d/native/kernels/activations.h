// Sigmoid and tanh by polynomials, in registers. Exact: to a few units in the last place of float, small arguments
// included; else to about a hundredth of bfloat16's. Arguments are clamped, so that nothing overflows; NaN stays NaN.
#pragma once

namespace {

// e^x - 1 is power * fraction + (power - 1), without cancellation where x is small.
template <class V>
struct Exponential {
    V power, fraction; // 2^n, and e^r - 1 for x = n * ln 2 + r
};

// 2^t, less exactly.
template <class V>
inline Exponential<V> power(V t) {
    const V n = nearest(t), f = t - n;
    V q = V::broadcast(0.009618104435503483f); // (2^f - 1) / f, error 1.6e-5
    q = multiply_add(q, f, V::broadcast(0.055843982845544815f));
    q = multiply_add(q, f, V::broadcast(0.24023276567459106f));
    q = multiply_add(q, f, V::broadcast(0.69313645362854f));
    return {power_of_two(n), q * f};
}

template <bool Exact, class V>
inline Exponential<V> exponential(V x) {
    const V t = x * V::broadcast(1.44269504f); // 1 / ln 2
    const V n = nearest(t);
    V fraction;
    if (Exact) {
        V r = multiply_add(n, V::broadcast(-0.693145752f), x); // ln 2 in two parts, the first of few bits
        r = multiply_add(n, V::broadcast(-1.42860677e-6f), r);
        V q = V::broadcast(0.0013882393250241876f); // (e^r - 1 - r) / r^2, error 1.4e-8
        q = multiply_add(q, r, V::broadcast(0.008367180824279785f));
        q = multiply_add(q, r, V::broadcast(0.04166722297668457f));
        q = multiply_add(q, r, V::broadcast(0.16666539013385773f));
        q = multiply_add(q, r, V::broadcast(0.4999999701976776f));
        fraction = multiply_add(q * r, r, r);
    } else {
        return power(t);
    }
    return {power_of_two(n), fraction};
}

template <bool Exact, class V>
inline V sigmoid(V x) {
    const V one = V::broadcast(1);
    const Exponential<V> e = exponential<Exact>(clamp(V::broadcast(0) - x, -87, 87));
    return reciprocal<Exact>(multiply_add(e.power, e.fraction, e.power) + one);
}

template <bool Exact, class V>
inline V tanh(V x) {
    const V one = V::broadcast(1), two = V::broadcast(2);
    const Exponential<V> e = exponential<Exact>(clamp(x, -10, 10) * two);
    const V less_one = multiply_add(e.power, e.fraction, e.power - one);
    return less_one * reciprocal<Exact>(less_one + two);
}

} // namespace
