// The recurrence, step by step over a tile of sequences:
//   i, f, g, o = gates + W_hh h;  c = sigmoid(f) c + sigmoid(i) tanh(g);  h = sigmoid(o) tanh(c)
//
// A block of sequences × 4 gates × one vector of units stays in registers from the projected input to the new state.
#pragma once

#include "activations.h"
#include "pack.h"

namespace {

template <class Value, class Dot>
class Forward {
    using Element = typename Dot::Element;
    using KeptValue = typename Kept<Value>::Type;
    static constexpr bool exact = sizeof(Value) == sizeof(float);

  public:
    Forward(const Problem& problem, const ForwardTensors& tensors)
        : problem(problem),
          tiling(problem),
          packing(problem.hidden),
          D(problem.hidden),
          R(directions(problem)),
          width(round_up(D, Vec::lanes)),
          packed(static_cast<const Element*>(tensors.packed)),
          gates(static_cast<Value*>(tensors.gates)),
          y(static_cast<Value*>(tensors.y)),
          cells(static_cast<KeptValue*>(tensors.cells)) {}

    int run() {
        scratch_bytes = State(nullptr, width).bytes;
        Scratch scratch(scratch_bytes * problem.threads);
        if (!scratch) return kOutOfMemory;
        memory = scratch.data();
        parallel_for(
            problem.threads, tiling.count(),
            [](void* self, int64_t item, int thread) { static_cast<Forward*>(self)->run_tile(item, thread); }, this);
        return kDone;
    }

  private:
    const Problem& problem;
    Tiling tiling;
    const Packing<Dot> packing;
    const int64_t D, R, width; // width: units with padding
    const Element* packed;
    Value *gates, *y;
    KeptValue* cells;
    int64_t scratch_bytes = 0;
    char* memory = nullptr;

    // Of the sequences of a tile; the padding stays zero.
    struct State {
        float* c;
        Element *h, *new_h;
        int64_t bytes;
        State(char* memory, int64_t width) {
            Cutter cutter(memory);
            c = cutter.cut<float>(kTile * width);
            h = cutter.cut<Element>(kTile * width);
            new_h = cutter.cut<Element>(kTile * width);
            bytes = cutter.used;
        }
    };

    void run_tile(int64_t item, int thread) {
        const Tile tile = tiling.tile(item);
        State state(memory + thread * scratch_bytes, width);
        memset(state.c, 0, sizeof(float) * static_cast<size_t>(kTile * width));
        const Element* weights = packed + tile.direction * packing.forward_elements();
        for (int64_t step = 0; step < tile.steps; ++step) {
            const int64_t depth = step ? packing.forward_steps : 0; // the first state is zero
            for (int64_t block = 0; block < packing.blocks; ++block) {
                const Element* block_weights = weights + block * packing.forward_steps * 4 * packing.row;
                for (int s = 0; s < tile.sequences; s += kForwardSequences)
                    run_sequences<kForwardSequences>(tile, tile.offset(step), s, block, depth, block_weights, state);
            }
            Element* old = state.h;
            state.h = state.new_h;
            state.new_h = old;
        }
    }

    template <int Sequences>
    void run_sequences(const Tile& tile, int64_t offset, int s, int64_t block, int64_t depth, const Element* weights,
                       const State& state) {
        if constexpr (Sequences > 1) {
            if (tile.sequences - s < Sequences)
                return run_sequences<Sequences - 1>(tile, offset, s, block, depth, weights, state);
        }
        const int count = smaller(Vec::lanes, D - block * Vec::lanes);
        if (count == Vec::lanes)
            run_block<Sequences>(tile, offset, s, block, depth, weights, state, Vec::lanes);
        else
            run_block<Sequences>(tile, offset, s, block, depth, weights, state, count);
    }

    template <int Sequences>
    __attribute__((always_inline)) inline void run_block(const Tile& tile, int64_t offset, int s, int64_t block,
                                                         int64_t depth, const Element* weights, const State& state,
                                                         const int count) {
        const int64_t unit = block * Vec::lanes;
        Value* gate[Sequences];
        Vec sum[Sequences][4];
        UNROLL for (int i = 0; i < Sequences; ++i) {
            gate[i] = gates + ((tile.origin[s + i] + offset) * R + tile.direction) * 4 * D + unit;
            UNROLL for (int g = 0; g < 4; ++g) sum[i][g] = load(gate[i] + g * D, count);
        }
        const Element* h = state.h + s * width;
        for (int64_t k = 0; k < depth; ++k) {
            typename Dot::Weights w[4];
            UNROLL for (int g = 0; g < 4; ++g) w[g] = Dot::weights(weights + (k * 4 + g) * packing.row);
            UNROLL for (int i = 0; i < Sequences; ++i) {
                const typename Dot::State x = Dot::broadcast(h + i * width + k * Dot::depth);
                UNROLL for (int g = 0; g < 4; ++g) sum[i][g] = Dot::multiply_add(w[g], x, sum[i][g]);
            }
        }
        UNROLL for (int i = 0; i < Sequences; ++i) {
            const Vec in = sigmoid<exact>(sum[i][0]), forget = sigmoid<exact>(sum[i][1]);
            const Vec new_c = tanh<exact>(sum[i][2]), out = sigmoid<exact>(sum[i][3]);
            float* c_place = state.c + (s + i) * width + unit;
            const Vec c = multiply_add(forget, load(c_place, Vec::lanes), in * new_c);
            const Vec new_h = out * tanh<exact>(c);
            store(c_place, c, Vec::lanes);
            store(state.new_h + (s + i) * width + unit, new_h, Vec::lanes);
            const int64_t place = ((tile.origin[s + i] + offset) * R + tile.direction) * D + unit;
            store(y + place, new_h, count);
            if (cells) {
                auto* kept = reinterpret_cast<KeptValue*>(gate[i]);
                store(kept, in, count);
                store(kept + D, forget, count);
                store(kept + 2 * D, new_c, count);
                store(kept + 3 * D, out, count);
                store(cells + place, exact ? c : clamp(c, -kLargestFloat16, kLargestFloat16), count);
            }
        }
    }
};

} // namespace
