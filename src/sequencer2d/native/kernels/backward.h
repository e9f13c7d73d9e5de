// The recurrence from the last step to the first: from the gradient of the hidden states to that of the gates.
//
// With i f g o after their activations, dh = grad_y + what the next step hands back, dc likewise:
//   do = dh tanh(c) o (1 - o);  dc += dh o (1 - tanh(c)^2);  di = dc g i (1 - i);  dg = dc i (1 - g^2)
//   df = dc c_previous f (1 - f);  to the previous step: dc f, and W_hh^T (di df dg do)
// The gradients of inputs and matrices are products of whole tensors, which the caller makes.
#pragma once

#include "activations.h"
#include "pack.h"

namespace {

template <class Value, class Dot>
class Backward {
    using Element = typename Dot::Element;
    using KeptValue = typename Kept<Value>::Type;
    static constexpr bool exact = sizeof(Value) == sizeof(float);

  public:
    Backward(const Problem& problem, const BackwardTensors& tensors)
        : problem(problem),
          tiling(problem),
          packing(problem),
          D(problem.hidden),
          R(directions(problem)),
          width(round_up(D, Vec::lanes)),
          packed(static_cast<const Element*>(tensors.packed)),
          gates(static_cast<const KeptValue*>(tensors.gates)),
          cells(static_cast<const KeptValue*>(tensors.cells)),
          y(static_cast<const Value*>(tensors.y)),
          grad_y(static_cast<const Value*>(tensors.grad_y)),
          grad_gates(static_cast<Value*>(tensors.grad_gates)),
          previous_hidden(static_cast<Value*>(tensors.previous_hidden)),
          grad_bias(tensors.grad_bias),
          streams(kStreams && sizeof(Element) == sizeof(Value) && gate_bytes() % 64 == 0 &&
                  reinterpret_cast<uintptr_t>(grad_gates) % 64 == 0) {}

    int run() {
        const int64_t tiles = tiling.count();
        scratch_bytes = State(nullptr, width, D).bytes;
        const int64_t bias_bytes = tiles * 4 * width * static_cast<int64_t>(sizeof(float));
        Scratch scratch(scratch_bytes * problem.threads + bias_bytes);
        if (!scratch) return kOutOfMemory;
        memory = scratch.data();
        tile_bias = reinterpret_cast<float*>(memory + scratch_bytes * problem.threads);
        tiling.run(*this);
        sum_bias();
        return kDone;
    }

  private:
    friend Tiling;
    const Problem& problem;
    Tiling tiling;
    const Packing<Dot> packing;
    const int64_t D, R, width; // width: units with padding
    const Element* packed;
    const KeptValue *gates, *cells;
    const Value *y, *grad_y;
    Value *grad_gates, *previous_hidden;
    float* grad_bias;
    const bool streams; // gradients of gates go to memory a token at a time, past the caches
    int64_t scratch_bytes = 0;
    char* memory = nullptr;
    float* tile_bias = nullptr; // [tiles, 4, width]

    // Of the sequences of a tile.
    struct State {
        float *dc, *dh;    // what the step after hands back
        Element* dgates;   // of this step, [sequences, 4 * D]
        int64_t bytes;
        State(char* memory, int64_t width, int64_t D) {
            Cutter cutter(memory);
            dc = cutter.cut<float>(kTile * width);
            dh = cutter.cut<float>(kTile * width);
            dgates = cutter.cut<Element>(kTile * 4 * D);
            bytes = cutter.used;
        }
    };

    void run_tile(const Tile& tile, int thread) {
        const State state(memory + thread * scratch_bytes, width, D);
        memset(state.dc, 0, sizeof(float) * static_cast<size_t>(kTile * width));
        memset(state.dh, 0, sizeof(float) * static_cast<size_t>(kTile * width));
        float* bias = tile_bias + tile.number * 4 * width;
        memset(bias, 0, sizeof(float) * static_cast<size_t>(4 * width));
        const Element* weights = packed + tile.direction * packing.backward_elements();
        for (int64_t step = tile.steps - 1; step >= 0; --step) {
            copy_previous_hidden(tile, step);
            for (int64_t block = 0; block < packing.blocks; ++block) {
                const int count = smaller(Vec::lanes, D - block * Vec::lanes);
                if (count == Vec::lanes)
                    gate_gradients<Vec>(tile, step, block, state, bias, Vec::lanes);
                else if (count > Tail::lanes)
                    gate_gradients<Vec>(tile, step, block, state, bias, count);
                else
                    gate_gradients<Tail>(tile, step, block, state, bias, count);
            }
            for (int s = 0; streams && s < tile.sequences; ++s)
                stream(grad_gates + place(tile, s, step) * 4 * D, state.dgates + s * 4 * D, gate_bytes());
            if (step == 0) break;
            for (int64_t block = 0; block < packing.blocks; block += kBackwardBlocks) {
                const Element* group = weights + block * packing.backward_steps * packing.row;
                hand_back_blocks<kBackwardBlocks>(tile, block, group, state);
            }
        }
        if (streams) end_of_stream();
    }

    int64_t gate_bytes() const { return 4 * D * static_cast<int64_t>(sizeof(Value)); } // of a token and direction

    int64_t place(const Tile& tile, int s, int64_t step) const { // in units of D values
        return (tile.origin[s] + tile.offset(step)) * R + tile.direction;
    }

    void copy_previous_hidden(const Tile& tile, int64_t step) const {
        const int64_t tokens = problem.batch * problem.height * problem.width;
        const size_t bytes = static_cast<size_t>(D) * sizeof(Value);
        for (int s = 0; s < tile.sequences; ++s) {
            Value* to = previous_hidden + (tile.direction * tokens + tile.origin[s] + tile.offset(step)) * D;
            if (step)
                memcpy(to, y + place(tile, s, step - 1) * D, bytes);
            else
                memset(to, 0, bytes);
        }
    }

    template <class V>
    __attribute__((always_inline)) inline void gate_gradients(const Tile& tile, int64_t step, int64_t block,
                                                              const State& state, float* bias, const int count) const {
        const V one = V::broadcast(1), zero = V::broadcast(0);
        const int64_t unit = block * Vec::lanes;
        V bias_sum[4];
        UNROLL for (int g = 0; g < 4; ++g) bias_sum[g] = load_as<V>(bias + g * width + unit, V::lanes);
        for (int s = 0; s < tile.sequences; ++s) {
            const int64_t here = place(tile, s, step) * D + unit;
            const KeptValue* gate = gates + place(tile, s, step) * 4 * D + unit;
            const V in = load_as<V>(gate, count), forget = load_as<V>(gate + D, count);
            const V new_c = load_as<V>(gate + 2 * D, count), out = load_as<V>(gate + 3 * D, count);
            const V tanh_c = tanh<exact>(load_as<V>(cells + here, count));
            const V previous_c = step ? load_as<V>(cells + place(tile, s, step - 1) * D + unit, count) : zero;
            float *dc_place = state.dc + s * width + unit, *dh_place = state.dh + s * width + unit;
            const V dh = load_as<V>(grad_y + here, count) + load_as<V>(dh_place, V::lanes);
            const V dc = multiply_add(dh * out, one - tanh_c * tanh_c, load_as<V>(dc_place, V::lanes));
            store(dc_place, dc * forget, V::lanes);
            const V gradient[4] = {
                dc * new_c * (in * (one - in)),
                dc * previous_c * (forget * (one - forget)),
                dc * in * (one - new_c * new_c),
                dh * tanh_c * (out * (one - out)),
            };
            Value* to = grad_gates + place(tile, s, step) * 4 * D + unit;
            Element* local = state.dgates + s * 4 * D + unit;
            UNROLL for (int g = 0; g < 4; ++g) {
                if (!streams) store(to + g * D, gradient[g], count);
                store(local + g * D, gradient[g], count);
                bias_sum[g] = bias_sum[g] + gradient[g];
            }
        }
        UNROLL for (int g = 0; g < 4; ++g) store(bias + g * width + unit, bias_sum[g], V::lanes);
    }

    template <int Blocks>
    void hand_back_blocks(const Tile& tile, int64_t block, const Element* weights, const State& state) const {
        if constexpr (Blocks > 1) {
            if (packing.blocks - block < Blocks) return hand_back_blocks<Blocks - 1>(tile, block, weights, state);
        }
        for (int s = 0; s < tile.sequences; s += kBackwardSequences)
            hand_back<Blocks, kBackwardSequences>(tile, s, block, weights, state);
    }

    template <int Blocks, int Sequences>
    void hand_back(const Tile& tile, int s, int64_t block, const Element* weights, const State& state) const {
        if constexpr (Sequences > 1) {
            if (tile.sequences - s < Sequences)
                return hand_back<Blocks, Sequences - 1>(tile, s, block, weights, state);
        }
        Vec sum[Sequences][Blocks];
        UNROLL for (int i = 0; i < Sequences; ++i) {
            UNROLL for (int b = 0; b < Blocks; ++b) sum[i][b] = Vec::broadcast(0);
        }
        const Element* dgates = state.dgates + s * 4 * D;
        for (int64_t j = 0; j < packing.backward_steps; ++j) {
            decltype(Dot::template weights<Vec>(weights)) w[Blocks];
            UNROLL for (int b = 0; b < Blocks; ++b) w[b] = Dot::template weights<Vec>(weights + (j * Blocks + b) * packing.row);
            UNROLL for (int i = 0; i < Sequences; ++i) {
                const auto x = Dot::template broadcast<Vec>(dgates + i * 4 * D + j * Dot::depth);
                UNROLL for (int b = 0; b < Blocks; ++b) sum[i][b] = Dot::multiply_add(w[b], x, sum[i][b]);
            }
        }
        UNROLL for (int i = 0; i < Sequences; ++i) {
            UNROLL for (int b = 0; b < Blocks; ++b)
                store(state.dh + (s + i) * width + (block + b) * Vec::lanes, sum[i][b], Vec::lanes);
        }
    }

    void sum_bias() const {
        for (int direction = 0; direction < R; ++direction)
            for (int gate = 0; gate < 4; ++gate)
                for (int64_t unit = 0; unit < D; ++unit) {
                    float sum = 0;
                    for (int64_t tile = tiling.begin(direction); tile < tiling.begin(direction + 1); ++tile)
                        sum += tile_bias[(tile * 4 + gate) * width + unit];
                    grad_bias[(direction * 4 + gate) * D + unit] = sum;
                }
    }
};

} // namespace
