// How a matrix is multiplied: `depth` elements of a row at a time, by `lanes` columns. See vector_portable.h.
#pragma once

namespace {

// `load` of either type of vector.
template <class V, class Value>
inline V load_as(const Value* p, int count) {
    if constexpr (V::lanes == Vec::lanes)
        return load(p, count);
    else
        return load_tail(p, count);
}

// In float, whatever the values are in memory.
struct FloatDot {
    using Element = float;
    static constexpr int depth = 1;
    template <class V>
    static V weights(const Element* p) {
        return load_as<V>(p, V::lanes);
    }
    template <class V>
    static V broadcast(const Element* p) {
        return V::broadcast(*p);
    }
    template <class V>
    static V multiply_add(V w, V h, V sum) {
        return ::multiply_add(w, h, sum);
    }
};

} // namespace
