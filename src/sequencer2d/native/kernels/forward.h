// The recurrence, step by step over a tile of sequences:
//   i, f, g, o = bias + W_ih x + W_hh h;  c = sigmoid(f) c + sigmoid(i) tanh(g);  h = sigmoid(o) tanh(c)
//
// A block of sequences × 4 gates × one vector of units stays in registers from the input to the new state.
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
          packing(problem),
          C(problem.channels),
          D(problem.hidden),
          R(directions(problem)),
          width(round_up(D, Vec::lanes)),
          inputs(packing.input_steps * Dot::depth),
          packed(static_cast<const Element*>(tensors.packed)),
          x(static_cast<const Value*>(tensors.x)),
          bias(static_cast<const Value*>(tensors.bias)),
          gates(static_cast<Value*>(tensors.gates)),
          y(static_cast<Value*>(tensors.y)),
          cells(static_cast<KeptValue*>(tensors.cells)) {}

    int run() {
        scratch_bytes = State(nullptr, inputs, width).bytes;
        Scratch scratch(scratch_bytes * problem.threads);
        if (!scratch) return kOutOfMemory;
        memory = scratch.data();
        tiling.run(*this);
        return kDone;
    }

  private:
    friend Tiling;
    const Problem& problem;
    Tiling tiling;
    const Packing<Dot> packing;
    const int64_t C, D, R, width, inputs; // width: units with padding; inputs: channels with padding
    const Element* packed;
    const Value *x, *bias;
    Value *gates, *y;
    KeptValue* cells;
    int64_t scratch_bytes = 0;
    char* memory = nullptr;

    // Of the sequences of a tile.
    struct State {
        float* c;
        Element *now, *next; // rows of the input and the hidden state that a step starts from
        int64_t bytes;
        State(char* memory, int64_t inputs, int64_t width) {
            Cutter cutter(memory);
            c = cutter.cut<float>(kTile * width);
            now = cutter.cut<Element>(kTile * (inputs + width));
            next = cutter.cut<Element>(kTile * (inputs + width));
            bytes = cutter.used;
        }
    };

    void run_tile(const Tile& tile, int thread) {
        State state(memory + thread * scratch_bytes, inputs, width);
        memset(state.c, 0, sizeof(float) * static_cast<size_t>(kTile * width));
        const Element* weights = packed + tile.direction * packing.forward_elements();
        for (int64_t step = 0; step < tile.steps; ++step) {
            load_inputs(tile, tile.offset(step), state.now);
            const int64_t depth = step ? packing.forward_steps : packing.input_steps; // the first state is zero
            for (int64_t block = 0; block < packing.blocks; ++block) {
                const Element* block_weights = weights + block * packing.forward_steps * 4 * packing.row;
                for (int s = 0; s < tile.sequences; s += kForwardSequences)
                    run_sequences<kForwardSequences>(tile, tile.offset(step), s, block, depth, block_weights, state);
            }
            Element* old = state.now;
            state.now = state.next;
            state.next = old;
        }
    }

    void load_inputs(const Tile& tile, int64_t offset, Element* to) const {
        for (int s = 0; x && s < tile.sequences; ++s, to += inputs + width) {
            const Value* from = x + (tile.origin[s] + offset) * C;
            int64_t k = 0;
            for (; k + Vec::lanes <= C; k += Vec::lanes) store(to + k, load(from + k, Vec::lanes), Vec::lanes);
            for (; k < inputs; ++k) to[k] = from_float<Element>(k < C ? to_float(from[k]) : 0);
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
            run_block<Vec, Sequences>(tile, offset, s, block, depth, weights, state, Vec::lanes);
        else if (count > Tail::lanes)
            run_block<Vec, Sequences>(tile, offset, s, block, depth, weights, state, count);
        else
            run_block<Tail, Sequences>(tile, offset, s, block, depth, weights, state, count);
    }

    template <class V, int Sequences>
    __attribute__((always_inline)) inline void run_block(const Tile& tile, int64_t offset, int s, int64_t block,
                                                         int64_t depth, const Element* weights, const State& state,
                                                         const int count) {
        const int64_t unit = block * Vec::lanes;
        int64_t place[Sequences]; // in units of D values
        V sum[Sequences][4];
        UNROLL for (int i = 0; i < Sequences; ++i) {
            place[i] = (tile.origin[s + i] + offset) * R + tile.direction;
            const Value* start = (x ? bias + tile.direction * 4 * D : gates + place[i] * 4 * D) + unit;
            UNROLL for (int g = 0; g < 4; ++g)
                sum[i][g] = exact && x ? V::broadcast(0) : load_as<V>(start + g * D, count);
        }
        const int64_t row = inputs + width;
        const Element* now = state.now + s * row;
        const auto add_products = [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
            for (int64_t k = begin; k < end; ++k) {
                decltype(Dot::template weights<V>(weights)) w[4];
                UNROLL for (int g = 0; g < 4; ++g) w[g] = Dot::template weights<V>(weights + (k * 4 + g) * packing.row);
                UNROLL for (int i = 0; i < Sequences; ++i) {
                    const auto from = Dot::template broadcast<V>(now + i * row + k * Dot::depth);
                    UNROLL for (int g = 0; g < 4; ++g) sum[i][g] = Dot::multiply_add(w[g], from, sum[i][g]);
                }
            }
        };
        if (exact && x) { // the bias after what may be large, as libraries add it
            add_products(0, packing.input_steps);
            UNROLL for (int g = 0; g < 4; ++g) {
                const V b = load_as<V>(bias + (tile.direction * 4 + g) * D + unit, count);
                UNROLL for (int i = 0; i < Sequences; ++i) sum[i][g] = sum[i][g] + b;
            }
        }
        add_products(exact ? packing.input_steps : 0, depth);
        UNROLL for (int i = 0; i < Sequences; ++i) {
            const V in = sigmoid<exact>(sum[i][0]), forget = sigmoid<exact>(sum[i][1]);
            const V new_c = tanh<exact>(sum[i][2]), out = sigmoid<exact>(sum[i][3]);
            float* c_place = state.c + (s + i) * width + unit;
            const V c = multiply_add(forget, load_as<V>(c_place, V::lanes), in * new_c);
            const V new_h = out * tanh<exact>(c);
            store(c_place, c, V::lanes);
            store(state.next + (s + i) * row + inputs + unit, new_h, V::lanes);
            store(y + place[i] * D + unit, new_h, count);
            if (cells) {
                auto* kept = reinterpret_cast<KeptValue*>(gates) + place[i] * 4 * D + unit;
                store(kept, in, count);
                store(kept + D, forget, count);
                store(kept + 2 * D, new_c, count);
                store(kept + 3 * D, out, count);
                store(cells + place[i] * D + unit, exact ? c : clamp(c, -kLargestFloat16, kLargestFloat16), count);
            }
        }
    }
};

} // namespace
