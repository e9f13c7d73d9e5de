// Recurrent weights [R, 4*D, D] in the order in which the kernels read them, padded with zeros to whole vectors.
//
// A packed row is what one step of a product needs: `depth` elements of each of `lanes` columns.
// forward:  [R][block of `lanes` units][k of D by depth][gate][row]              h (1 x D) times W (D x 4*D)
// backward: [R][group of blocks][j of 4*D by depth][block of the group][row]     dg (1 x 4*D) times W (4*D x D)
#pragma once

#include "tiles.h"

namespace {

template <class Dot>
struct Packing {
    using Element = typename Dot::Element;
    static constexpr int row = Vec::lanes * Dot::depth;

    int64_t D, blocks, forward_steps, backward_steps;

    explicit Packing(int64_t hidden)
        : D(hidden),
          blocks(round_up(hidden, Vec::lanes) / Vec::lanes),
          forward_steps(round_up(hidden, Dot::depth) / Dot::depth),
          backward_steps(4 * hidden / Dot::depth) {}

    int64_t forward_elements() const { return blocks * forward_steps * 4 * row; } // of one direction
    int64_t backward_elements() const { return blocks * backward_steps * row; }

    template <class Value>
    void pack_forward(const Value* w, Element* out) const {
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t step = 0; step < forward_steps; ++step)
                for (int gate = 0; gate < 4; ++gate)
                    for (int i = 0; i < row; ++i) {
                        const int64_t unit = block * Vec::lanes + i / Dot::depth;
                        const int64_t k = step * Dot::depth + i % Dot::depth;
                        const bool inside = unit < D && k < D;
                        *out++ = from_float<Element>(inside ? to_float(w[(gate * D + unit) * D + k]) : 0);
                    }
    }

    template <class Value>
    void pack_backward(const Value* w, Element* out) const {
        for (int64_t begin = 0; begin < blocks; begin += kBackwardBlocks)
            for (int64_t step = 0; step < backward_steps; ++step)
                for (int64_t block = begin; block < smaller(begin + kBackwardBlocks, blocks); ++block)
                    for (int i = 0; i < row; ++i) {
                        const int64_t k = block * Vec::lanes + i / Dot::depth;
                        const int64_t j = step * Dot::depth + i % Dot::depth;
                        *out++ = from_float<Element>(k < D ? to_float(w[j * D + k]) : 0);
                    }
    }
};

} // namespace
