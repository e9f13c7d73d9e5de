// The gradient of a linear layer's weights, grad^T x over many tokens, and of its bias: in bfloat16, summed in float.
//
// Libraries are slow at it, because both factors lie across the direction of the sum. Here each task owns some outputs
// and a part of the tokens, and walks over blocks of these: it brings pairs of tokens side by side, as the dot-product
// instruction wants them, and multiplies from there. The sums of the parts are added at the end. How tokens are parted
// depends on their number alone, so every sum is made in one order, however many threads there are.
#pragma once

#include "products.h"

namespace {

constexpr int kPairs = 128;                // of tokens in a block
constexpr int kBlockOutputs = 96;          // that are multiplied at a time; a multiple of kGradRows
constexpr int64_t kPartTokens = 2048;      // at least, of a part
constexpr int64_t kMostParts = 8;          //
constexpr int64_t kTaskBytes = 256 * 1024; // of the sums of a task, about: they stay in the cache

// Pairs of neighbouring values of a column, for 16 columns: those that are missing are 0.
inline __m512i interleave(const bfloat16* row, int64_t stride, bool second, int count) {
    const __m256i zeros = _mm256_setzero_si256();
    return side_by_side(_mm256_maskz_loadu_epi16(first(count), row),
                        second ? _mm256_maskz_loadu_epi16(first(count), row + stride) : zeros);
}

class WeightGradients {
  public:
    explicit WeightGradients(const WeightGradient& problem)
        : problem(problem),
          grad(static_cast<const bfloat16*>(problem.grad)),
          x(static_cast<const bfloat16*>(problem.x)),
          own(static_cast<const bfloat16*>(problem.own)),
          own_column(round_up(problem.inputs, Vec::lanes)),
          width(own_column + round_up(problem.own_inputs, Vec::lanes)),
          group_outputs(problem.outputs / problem.groups),
          group_blocks(round_up(group_outputs, kBlockOutputs) / kBlockOutputs),
          blocks(problem.groups * group_blocks) {
        parts = smaller(kMostParts, problem.tokens / kPartTokens);
        if (parts < 1) parts = 1;
        part_tokens = round_up(round_up(problem.tokens, parts) / parts, 2 * kPairs);
        parts = round_up(problem.tokens, part_tokens) / part_tokens;
        int64_t task_outputs = kTaskBytes / static_cast<int64_t>(sizeof(float)) / width;
        task_blocks = smaller(blocks, round_up(task_outputs, kBlockOutputs) / kBlockOutputs);
        while (task_blocks > 1 && parts * tasks_of_part() < 2 * problem.threads) --task_blocks;
    }

    int run() {
        scratch_bytes = Packed(nullptr, width).bytes;
        const int64_t floats = parts * problem.outputs * (width + 1);
        Scratch scratch(scratch_bytes * problem.threads + floats * static_cast<int64_t>(sizeof(float)));
        if (!scratch) return kOutOfMemory;
        memory = scratch.data();
        sums = reinterpret_cast<float*>(memory + scratch_bytes * problem.threads);
        bias_sums = sums + parts * problem.outputs * width;
        parallel_for(
            problem.threads, parts * tasks_of_part(),
            [](void* self, int64_t item, int thread) { static_cast<WeightGradients*>(self)->run_task(item, thread); },
            this);
        parallel_for(
            problem.threads, blocks,
            [](void* self, int64_t item, int) { static_cast<WeightGradients*>(self)->add_parts(item); }, this);
        return kDone;
    }

  private:
    const WeightGradient& problem;
    const bfloat16 *grad, *x, *own;
    const int64_t own_column, width;           // columns: x with padding, own inputs with padding
    const int64_t group_outputs, group_blocks; //
    const int64_t blocks;                      // of outputs, each within a group
    int64_t parts, part_tokens, task_blocks;
    int64_t scratch_bytes = 0;
    char* memory = nullptr;
    float* sums = nullptr;      // [part, outputs, width]
    float* bias_sums = nullptr; // [part, outputs]

    // A block of tokens, in pairs.
    struct Packed {
        bfloat16* columns; // [panel, pair, columns of a panel, of the pair]
        bfloat16* rows;    // [pair, kBlockOutputs, of the pair]
        int64_t bytes;
        Packed(char* memory, int64_t width) {
            Cutter cutter(memory);
            columns = cutter.cut<bfloat16>(2 * kPairs * round_up(width, kPanel));
            rows = cutter.cut<bfloat16>(2 * kPairs * kBlockOutputs);
            bytes = cutter.used;
        }
    };

    int64_t tasks_of_part() const { return round_up(blocks, task_blocks) / task_blocks; }

    int64_t begin_of_block(int64_t block) const {
        return block / group_blocks * group_outputs + block % group_blocks * kBlockOutputs;
    }

    int outputs_of_block(int64_t block) const {
        return smaller(kBlockOutputs, group_outputs - block % group_blocks * kBlockOutputs);
    }

    void run_task(int64_t item, int thread) const {
        const Packed packed(memory + thread * scratch_bytes, width);
        const int64_t part = item / tasks_of_part(), begin = item % tasks_of_part() * task_blocks;
        const int64_t end = smaller(begin + task_blocks, blocks);
        const int64_t end_token = smaller((part + 1) * part_tokens, problem.tokens);
        const int64_t begin_output = part * problem.outputs + begin_of_block(begin);
        const int64_t outputs = begin_of_block(end - 1) + outputs_of_block(end - 1) - begin_of_block(begin);
        memset(sums + begin_output * width, 0, static_cast<size_t>(outputs * width) * sizeof(float));
        memset(bias_sums + begin_output, 0, static_cast<size_t>(outputs) * sizeof(float));
        for (int64_t token = part * part_tokens; token < end_token; token += 2 * kPairs) {
            const int tokens = smaller(2 * kPairs, end_token - token);
            pack_columns(x + token * problem.x_stride, problem.x_stride, tokens, problem.inputs, 0, packed);
            int64_t group = -1;
            for (int64_t block = begin; block < end; ++block) {
                if (group != block / group_blocks) {
                    group = block / group_blocks;
                    const bfloat16* of_group = own + (group * problem.tokens + token) * problem.own_inputs;
                    pack_columns(of_group, problem.own_inputs, tokens, problem.own_inputs, own_column, packed);
                }
                const int64_t output = part * problem.outputs + begin_of_block(block);
                const int count = outputs_of_block(block);
                const bfloat16* from = grad + token * problem.grad_stride + begin_of_block(block);
                pack_rows(from, tokens, count, bias_sums + output, packed);
                for (int64_t c = 0; c < width; c += kPanel)
                    multiply_panel<kGradColumns>(sums + output * width, c, count, (tokens + 1) / 2, packed);
            }
        }
    }

    static void pack_columns(const bfloat16* from, int64_t stride, int tokens, int64_t count, int64_t column,
                             const Packed& packed) {
        for (int pair = 0; 2 * pair < tokens; ++pair, from += 2 * stride)
            for (int64_t c = 0; c < count; c += Vec::lanes) {
                const int64_t at = column + c;
                bfloat16* to = packed.columns + 2 * ((at / kPanel * kPairs + pair) * kPanel + at % kPanel);
                const int some = smaller(Vec::lanes, count - c);
                _mm512_store_si512(to, interleave(from + c, stride, 2 * pair + 1 < tokens, some));
            }
    }

    void pack_rows(const bfloat16* from, int tokens, int outputs, float* bias, const Packed& packed) const {
        for (int64_t o = 0; o < outputs; o += Vec::lanes) {
            const int count = smaller(Vec::lanes, outputs - o);
            __m512 sum = _mm512_setzero_ps();
            for (int pair = 0; 2 * pair < tokens; ++pair) {
                const bfloat16* row = from + 2 * pair * problem.grad_stride + o;
                const __m512i pairs = interleave(row, problem.grad_stride, 2 * pair + 1 < tokens, count);
                _mm512_store_si512(packed.rows + 2 * (pair * kBlockOutputs + o), pairs);
                sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
                sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536))));
            }
            store(bias + o, load(bias + o, count) + Vec{sum}, count);
        }
    }

    template <int Columns>
    void multiply_panel(float* out, int64_t c, int outputs, int pairs, const Packed& packed) const {
        if constexpr (Columns > 1) {
            if (width - c < Columns * Vec::lanes)
                return multiply_panel<Columns - 1>(out, c, outputs, pairs, packed);
        }
        const bfloat16* columns = packed.columns + 2 * c * kPairs;
        for (int o = 0; o < outputs; o += kGradRows)
            add_products<BFloat16Dot, Columns, kGradRows>(out + o * width + c, width, outputs - o, pairs, columns,
                                                          packed.rows + 2 * o, kBlockOutputs);
    }

    void add_parts(int64_t block) const {
        const int64_t begin = begin_of_block(block), end = begin + outputs_of_block(block);
        for (int64_t output = begin; output < end; ++output) {
            const float* sum = sums + output * width;
            add_row(sum, problem.inputs, problem.weight + output * problem.inputs);
            add_row(sum + own_column, problem.own_inputs, problem.own_weight + output * problem.own_inputs);
            if (!problem.bias) continue;
            problem.bias[output] = 0;
            for (int64_t part = 0; part < parts; ++part)
                problem.bias[output] += bias_sums[part * problem.outputs + output];
        }
    }

    void add_row(const float* from, int64_t count, float* to) const {
        for (int64_t c = 0; c < count; c += Vec::lanes) {
            Vec sum = load(from + c, Vec::lanes);
            for (int64_t part = 1; part < parts; ++part)
                sum = sum + load(from + part * problem.outputs * width + c, Vec::lanes);
            store(to + c, sum, smaller(Vec::lanes, count - c));
        }
    }
};

inline int weight_gradient(const WeightGradient& problem) { return WeightGradients(problem).run(); }

} // namespace
