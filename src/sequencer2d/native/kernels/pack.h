// Weights [R, 4*D, C] and [R, 4*D, D] in the order in which the kernels read them, padded with zeros to whole vectors.
//
// A packed row is what one step of a product needs: `depth` elements of each of `lanes` columns.
// forward:  [R][block of `lanes` units][k of C, then of D, by depth][gate][row]  x, h (1 x C, D) times W (C, D x 4*D)
// backward: [R][group of blocks][j of 4*D by depth][block of the group][row]     dg (1 x 4*D) times W (4*D x D)
#pragma once

#include "tiles.h"

namespace {

template <class Dot>
struct Packing {
    using Element = typename Dot::Element;
    static constexpr int row = Vec::lanes * Dot::depth;

    int64_t C, D, blocks, input_steps, forward_steps, backward_steps; // forward_steps: input_steps and those of h

    explicit Packing(const Problem& problem)
        : C(problem.channels),
          D(problem.hidden),
          blocks(round_up(D, Vec::lanes) / Vec::lanes),
          input_steps(round_up(C, Dot::depth) / Dot::depth),
          forward_steps(input_steps + round_up(D, Dot::depth) / Dot::depth),
          backward_steps(4 * D / Dot::depth) {}

    int64_t forward_elements() const { return blocks * forward_steps * 4 * row; } // of one direction
    int64_t backward_elements() const { return blocks * backward_steps * row; }

    template <class Value>
    void pack_forward(const Value* w_ih, const Value* w_hh, Element* out) const {
        for (int64_t block = 0; block < blocks; ++block, out += forward_steps * 4 * row)
            for (int gate = 0; gate < 4; ++gate)
                for (int lane = 0; lane < Vec::lanes; ++lane) {
                    const int64_t unit = block * Vec::lanes + lane, from = gate * D + unit;
                    Element* to = out + gate * row + lane * Dot::depth;
                    pack_columns(w_ih + from * C, unit < D ? C : 0, input_steps, to);
                    pack_columns(w_hh + from * D, unit < D ? D : 0, forward_steps - input_steps,
                                 to + input_steps * 4 * row);
                }
    }

    // A row of a matrix, `depth` elements of it per step, and zeros after it.
    template <class Value>
    static void pack_columns(const Value* w, int64_t columns, int64_t steps, Element* to) {
        for (int64_t step = 0; step < steps; ++step, to += 4 * row)
            for (int d = 0; d < Dot::depth; ++d) {
                const int64_t k = step * Dot::depth + d;
                to[d] = from_float<Element>(k < columns ? to_float(w[k]) : 0);
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
