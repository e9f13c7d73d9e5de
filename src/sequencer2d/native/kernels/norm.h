// A residual sum and the layer norm of it, in one pass over the tokens, and both gradients in another:
//   sum = x + scale branch;  normed = (sum - mean) / deviation * weight + bias, over the channels of a token
//   grad_x = grad_sum + (g - mean(g) - n mean(g n)) / deviation  with g = grad_normed weight, n = (sum - mean) / deviation
//   grad_branch = scale grad_x;  grad_weight, grad_bias: sums of grad_normed n and grad_normed over the tokens
#pragma once

#include <math.h>

#include "tiles.h"

namespace {

constexpr int64_t kNormTokens = 128; // that a thread takes at a time

// Calls body(first channel, how many) for every vector of channels.
template <class Body>
__attribute__((always_inline)) inline void for_channels(int64_t channels, Body body) {
    int64_t c = 0;
    for (; c + Vec::lanes <= channels; c += Vec::lanes) body(c, Vec::lanes);
    if (c < channels) body(c, static_cast<int>(channels - c));
}

// A number in the first lanes only, so that the others add nothing.
inline Vec broadcast_first(float x, int count) {
    if (count == Vec::lanes) return Vec::broadcast(x);
    float lanes[Vec::lanes] = {};
    for (int i = 0; i < count; ++i) lanes[i] = x;
    return load(lanes, Vec::lanes);
}

template <class Residual, class Value>
struct NormForward {
    const NormProblem& problem;
    const Residual* x;
    const Value* branch;
    const float *scale, *weight, *bias;
    Residual* sum;
    Value* normed;
    float* statistics;

    NormForward(const NormProblem& p, const NormForwardTensors& t)
        : problem(p),
          x(static_cast<const Residual*>(t.x)),
          branch(static_cast<const Value*>(t.branch)),
          scale(t.scale),
          weight(t.weight),
          bias(t.bias),
          sum(static_cast<Residual*>(t.sum)),
          normed(static_cast<Value*>(t.normed)),
          statistics(t.statistics) {}

    int run() {
        parallel_for(
            problem.threads, round_up(problem.tokens, kNormTokens) / kNormTokens,
            [](void* self, int64_t item, int) {
                const NormForward& norm = *static_cast<NormForward*>(self);
                const int64_t begin = item * kNormTokens;
                const int64_t end = begin + smaller(kNormTokens, norm.problem.tokens - begin);
                for (int64_t token = begin; token < end; ++token) norm.run_token(token);
            },
            this);
        return kDone;
    }

    void run_token(int64_t token) const {
        const int64_t C = problem.channels, at = token * C;
        const Residual* row = x + at;
        Vec sums = Vec::broadcast(0);
        if (branch) {
            const Vec factor = Vec::broadcast(scale ? scale[token / problem.tokens_per_scale] : 1);
            for_channels(C, [&](int64_t c, int count) __attribute__((always_inline)) {
                store(sum + at + c, multiply_add(load(branch + at + c, count), factor, load(row + c, count)), count);
                sums = sums + load(sum + at + c, count); // as it is after rounding
            });
            row = sum + at;
        } else {
            for_channels(C, [&](int64_t c, int count)
                             __attribute__((always_inline)) { sums = sums + load(row + c, count); });
        }
        const float mean = total(sums) / static_cast<float>(C);
        Vec squares = Vec::broadcast(0);
        for_channels(C, [&](int64_t c, int count) __attribute__((always_inline)) {
            const Vec difference = load(row + c, count) - broadcast_first(mean, count);
            squares = multiply_add(difference, difference, squares);
        });
        const float inverse = 1 / sqrtf(total(squares) / static_cast<float>(C) + problem.epsilon);
        const Vec shift = Vec::broadcast(mean), factor = Vec::broadcast(inverse);
        for_channels(C, [&](int64_t c, int count) __attribute__((always_inline)) {
            const Vec n = (load(row + c, count) - shift) * factor;
            store(normed + at + c, multiply_add(n, load(weight + c, count), load(bias + c, count)), count);
        });
        if (statistics) {
            statistics[2 * token] = mean;
            statistics[2 * token + 1] = inverse;
        }
    }
};

template <class Residual, class Value>
struct NormBackward {
    const NormProblem& problem;
    const Residual* sum;
    const float *statistics, *weight, *scale;
    const Value* grad_normed;
    const Residual* grad_sum;
    Residual* grad_x;
    Value* grad_branch;
    float *grad_weight, *grad_bias;
    int64_t width; // channels with padding
    float* partial = nullptr; // [items, 2, width]: whatever the threads do, the sums are added in one order

    NormBackward(const NormProblem& p, const NormBackwardTensors& t)
        : problem(p),
          sum(static_cast<const Residual*>(t.sum)),
          statistics(t.statistics),
          weight(t.weight),
          scale(t.scale),
          grad_normed(static_cast<const Value*>(t.grad_normed)),
          grad_sum(static_cast<const Residual*>(t.grad_sum)),
          grad_x(static_cast<Residual*>(t.grad_x)),
          grad_branch(static_cast<Value*>(t.grad_branch)),
          grad_weight(t.grad_weight),
          grad_bias(t.grad_bias),
          width(round_up(p.channels, Vec::lanes)) {}

    int run() {
        const int64_t items = round_up(problem.tokens, kNormTokens) / kNormTokens;
        Scratch scratch(items * 2 * width * static_cast<int64_t>(sizeof(float)));
        if (!scratch) return kOutOfMemory;
        partial = reinterpret_cast<float*>(scratch.data());
        memset(partial, 0, static_cast<size_t>(items * 2 * width) * sizeof(float));
        parallel_for(
            problem.threads, items,
            [](void* self, int64_t item, int) {
                const NormBackward& norm = *static_cast<NormBackward*>(self);
                const int64_t begin = item * kNormTokens;
                const int64_t end = begin + smaller(kNormTokens, norm.problem.tokens - begin);
                for (int64_t token = begin; token < end; ++token)
                    norm.run_token(token, norm.partial + item * 2 * norm.width);
            },
            this);
        for (int64_t c = 0; c < problem.channels; ++c) {
            grad_weight[c] = grad_bias[c] = 0;
            for (int64_t item = 0; item < items; ++item) {
                grad_weight[c] += partial[2 * item * width + c];
                grad_bias[c] += partial[(2 * item + 1) * width + c];
            }
        }
        return kDone;
    }

    void run_token(int64_t token, float* sums) const {
        const int64_t C = problem.channels, at = token * C;
        const Vec mean = Vec::broadcast(statistics[2 * token]), inverse = Vec::broadcast(statistics[2 * token + 1]);
        Vec sum_g = Vec::broadcast(0), sum_gn = Vec::broadcast(0);
        for_channels(C, [&](int64_t c, int count) __attribute__((always_inline)) {
            const Vec n = (load(sum + at + c, count) - mean) * inverse, grad = load(grad_normed + at + c, count);
            const Vec g = grad * load(weight + c, count);
            sum_g = sum_g + g;
            sum_gn = multiply_add(g, n, sum_gn);
            store(sums + c, multiply_add(grad, n, load(sums + c, Vec::lanes)), Vec::lanes);
            store(sums + width + c, grad + load(sums + width + c, Vec::lanes), Vec::lanes);
        });
        const Vec mean_g = Vec::broadcast(total(sum_g) / static_cast<float>(C));
        const Vec mean_gn = Vec::broadcast(total(sum_gn) / static_cast<float>(C));
        const Vec factor = Vec::broadcast(scale ? scale[token / problem.tokens_per_scale] : 1);
        for_channels(C, [&](int64_t c, int count) __attribute__((always_inline)) {
            const Vec n = (load(sum + at + c, count) - mean) * inverse;
            const Vec g = load(grad_normed + at + c, count) * load(weight + c, count);
            Vec grad = (g - mean_g - n * mean_gn) * inverse;
            if (grad_sum) grad = grad + load(grad_sum + at + c, count);
            store(grad_x + at + c, grad, count);
            if (grad_branch) store(grad_branch + at + c, grad * factor, count);
        });
    }
};

} // namespace
