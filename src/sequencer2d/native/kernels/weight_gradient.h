// The gradient of a linear layer's weights, grad^T x over many tokens, and of its bias: in bfloat16, summed in float.
//
// Libraries are slow at it, because both factors lie across the direction of the sum. Here each task owns some outputs
// and walks over blocks of tokens: it brings pairs of tokens side by side, as the dot-product instruction wants them,
// and multiplies from there. Every sum is made by one task in one order, however many threads there are.
#pragma once

#include "tiles.h"

namespace {

constexpr int kPairs = 96;       // of tokens in a block
constexpr int kGradRows = 6;     // outputs × vectors of inputs that stay in registers
constexpr int kGradColumns = 4;  //
constexpr int kMostOutputs = 96; // of a task; a multiple of kGradRows

inline int outputs_of_task(const WeightGradient& problem) {
    int size = kMostOutputs;
    while (size > 24 && problem.outputs < 2 * size * problem.threads) size /= 2;
    return size;
}

// Pairs of neighbouring values of a column, for 16 columns: those that are missing are 0.
inline __m512i interleave(const bfloat16* row, int64_t stride, bool second, int count) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), row));
    if (!second) return low;
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), row + stride));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

class WeightGradientTask {
  public:
    WeightGradientTask(const WeightGradient& problem, char* memory) : problem(problem), inputs(problem.inputs) {
        Cutter cutter(memory);
        x = cutter.cut<int32_t>(kPairs * round_up(inputs, kGradColumns * Vec::lanes));
        grad = cutter.cut<int32_t>(kPairs * (kMostOutputs + Vec::lanes));
        bytes = cutter.used;
    }
    int64_t bytes;

    void run(int64_t begin, int outputs) {
        float* out = problem.weight + begin * inputs;
        memset(out, 0, static_cast<size_t>(outputs * inputs) * sizeof(float));
        if (problem.bias) memset(problem.bias + begin, 0, static_cast<size_t>(outputs) * sizeof(float));
        for (int64_t token = 0; token < problem.tokens; token += 2 * kPairs) {
            const int tokens = smaller(2 * kPairs, problem.tokens - token);
            pack_grad(token, tokens, begin, outputs);
            pack_x(token, tokens);
            for (int64_t c = 0; c < inputs; c += kGradColumns * Vec::lanes)
                multiply_panel<kGradColumns>(out, c, outputs, (tokens + 1) / 2);
        }
    }

  private:
    const WeightGradient& problem;
    const int64_t inputs;
    int32_t* x;    // [panel of columns, pair, columns of a panel]
    int32_t* grad; // [pair, kMostOutputs]

    static constexpr int64_t kPanel = kGradColumns * Vec::lanes;

    void pack_x(int64_t token, int tokens) {
        const auto* from = static_cast<const bfloat16*>(problem.x) + token * problem.x_stride;
        for (int pair = 0; 2 * pair < tokens; ++pair, from += 2 * problem.x_stride)
            for (int64_t c = 0; c < inputs; c += Vec::lanes) {
                int32_t* to = x + (c / kPanel * kPairs + pair) * kPanel + c % kPanel;
                const int count = smaller(Vec::lanes, inputs - c);
                _mm512_storeu_si512(to, interleave(from + c, problem.x_stride, 2 * pair + 1 < tokens, count));
            }
    }

    void pack_grad(int64_t token, int tokens, int64_t begin, int outputs) {
        const auto* from = static_cast<const bfloat16*>(problem.grad) + token * problem.grad_stride + begin;
        for (int64_t o = 0; o < outputs; o += Vec::lanes) {
            const int count = smaller(Vec::lanes, outputs - o);
            __m512 sum = _mm512_setzero_ps();
            for (int pair = 0; 2 * pair < tokens; ++pair) {
                const bfloat16* row = from + 2 * pair * problem.grad_stride + o;
                const __m512i pairs = interleave(row, problem.grad_stride, 2 * pair + 1 < tokens, count);
                _mm512_storeu_si512(grad + pair * kMostOutputs + o, pairs);
                sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
                sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536))));
            }
            if (problem.bias) {
                float* bias = problem.bias + begin + o;
                store(bias, load(bias, count) + Vec{sum}, count);
            }
        }
    }

    template <int Columns>
    void multiply_panel(float* out, int64_t c, int outputs, int pairs) const {
        if constexpr (Columns > 1) {
            if (inputs - c <= (Columns - 1) * Vec::lanes) return multiply_panel<Columns - 1>(out, c, outputs, pairs);
        }
        const int last = smaller(Vec::lanes, inputs - c - (Columns - 1) * Vec::lanes);
        for (int o = 0; o < outputs; o += kGradRows)
            multiply_rows<Columns, kGradRows>(out + o * inputs + c, c, o, outputs - o, pairs, last);
    }

    template <int Columns, int Rows>
    void multiply_rows(float* out, int64_t c, int o, int rows, int pairs, int last) const {
        if constexpr (Rows > 1) {
            if (rows < Rows) return multiply_rows<Columns, Rows - 1>(out, c, o, rows, pairs, last);
        }
        Vec sum[Rows][Columns];
        UNROLL for (int r = 0; r < Rows; ++r) {
            UNROLL for (int j = 0; j < Columns; ++j)
                sum[r][j] = load(out + r * inputs + j * Vec::lanes, j == Columns - 1 ? last : Vec::lanes);
        }
        const int32_t* columns = x + c / kPanel * kPairs * kPanel;
        const int32_t* of_rows = grad + o;
        for (int pair = 0; pair < pairs; ++pair, columns += kPanel, of_rows += kMostOutputs) {
            __m512bh w[Columns];
            UNROLL for (int j = 0; j < Columns; ++j)
                w[j] = (__m512bh)_mm512_loadu_si512(columns + j * Vec::lanes);
            UNROLL for (int r = 0; r < Rows; ++r) {
                const __m512bh g = (__m512bh)_mm512_set1_epi32(of_rows[r]);
                UNROLL for (int j = 0; j < Columns; ++j) sum[r][j] = BFloat16Dot::multiply_add(w[j], g, sum[r][j]);
            }
        }
        UNROLL for (int r = 0; r < Rows; ++r) {
            UNROLL for (int j = 0; j < Columns; ++j)
                store(out + r * inputs + j * Vec::lanes, sum[r][j], j == Columns - 1 ? last : Vec::lanes);
        }
    }
};

inline int weight_gradient(const WeightGradient& problem) {
    struct Work {
        const WeightGradient& problem;
        int size;
        int64_t bytes;
        char* memory;
    };
    const int size = outputs_of_task(problem);
    const int64_t bytes = WeightGradientTask(problem, nullptr).bytes;
    Scratch scratch(bytes * problem.threads);
    if (!scratch) return kOutOfMemory;
    Work work{problem, size, bytes, scratch.data()};
    parallel_for(
        problem.threads, round_up(problem.outputs, size) / size,
        [](void* pointer, int64_t item, int thread) {
            const Work& w = *static_cast<Work*>(pointer);
            WeightGradientTask task(w.problem, w.memory + thread * w.bytes);
            task.run(item * w.size, smaller(w.size, w.problem.outputs - item * w.size));
        },
        &work);
    return kDone;
}

} // namespace
