// How a matrix is multiplied: `depth` elements of a row at a time, by `lanes` columns. See vector_portable.h.
#pragma once

namespace {

// In float, whatever the values are in memory.
struct FloatDot {
    using Element = float;
    static constexpr int depth = 1;
    using Weights = Vec;
    using State = Vec;
    static Weights weights(const Element* p) { return load(p, Vec::lanes); }
    static State broadcast(const Element* p) { return Vec::broadcast(*p); }
    static Vec multiply_add(Weights w, State h, Vec sum) { return ::multiply_add(w, h, sum); }
};

} // namespace
