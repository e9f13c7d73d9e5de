// Batch norm in training and GELU of it, forward and backward, each in two passes over the pixels: one sums, one writes.
//   y = gelu(v),  v = n * weight + bias,  n = (x - mean) / deviation, over all pixels of a channel
//   grad_x = (g - mean(g) - n mean(g n)) * weight / deviation  with g = grad_y gelu'(v)
//   grad_weight, grad_bias: sums of g n and g over the pixels
// What lies between norm and GELU is never stored; v is computed once more instead, which takes less time.
#pragma once

#include <math.h>

#include "gelu.h"
#include "norm.h"

namespace {

constexpr int64_t kBatchNormValues = 1 << 15; // that a thread takes at a time: they fit its cache

template <class Value>
struct BatchNorm {
    static constexpr bool exact = sizeof(Value) == sizeof(float);
    const BatchNormProblem& problem;
    const int64_t C, width, together, items; // channels with padding; pixels that a thread takes at a time
    const Value* const x;
    const Value* grad_y = nullptr;
    Value *y = nullptr, *grad_x = nullptr;
    Scratch scratch;
    // [items, 2, width]: sums of each item, added up in one order, whatever the threads do
    float* partial = nullptr;
    // [width] of all channels. v = scale * x + shift; n = inverse * x + centre; grad_x = (g - mean_g - n * mean_gn) * scale
    float *scale = nullptr, *shift = nullptr, *inverse = nullptr, *centre = nullptr, *mean_g = nullptr, *mean_gn = nullptr;

    BatchNorm(const BatchNormProblem& p, const void* x)
        : problem(p),
          C(p.channels),
          width(round_up(C, Vec::lanes)),
          together(kBatchNormValues > C ? kBatchNormValues / C : 1),
          items(round_up(p.pixels, together) / together),
          x(static_cast<const Value*>(x)),
          scratch(cut(nullptr)) {
        if (scratch) cut(scratch.data());
    }

    int forward(const BatchNormForwardTensors& t) {
        if (!scratch) return kOutOfMemory;
        y = static_cast<Value*>(t.y);
        run<&BatchNorm::sum_moments>();
        float *mean = t.statistics, *variance = t.statistics + C;
        for (int64_t c = 0; c < C; ++c) {
            double sum = 0, squares = 0;
            for (int64_t item = 0; item < items; ++item) sum += of_item(item)[c];
            const double centre_of_all = sum / static_cast<double>(problem.pixels);
            for (int64_t item = 0; item < items; ++item) {
                const double pixels = static_cast<double>(end(item) - item * together);
                const double off = of_item(item)[c] / pixels - centre_of_all;
                squares += of_item(item)[width + c] + pixels * off * off;
            }
            mean[c] = static_cast<float>(centre_of_all);
            variance[c] = static_cast<float>(squares / static_cast<double>(problem.pixels));
        }
        prepare(t.weight, t.bias, t.statistics);
        run<&BatchNorm::write_y>();
        return kDone;
    }

    int backward(const BatchNormBackwardTensors& t) {
        if (!scratch) return kOutOfMemory;
        grad_y = static_cast<const Value*>(t.grad_y);
        grad_x = static_cast<Value*>(t.grad_x);
        prepare(t.weight, t.bias, t.statistics);
        run<&BatchNorm::sum_gradients>();
        for (int64_t c = 0; c < C; ++c) {
            double sum = 0, sum_n = 0;
            for (int64_t item = 0; item < items; ++item) sum += of_item(item)[c], sum_n += of_item(item)[width + c];
            t.grad_bias[c] = static_cast<float>(sum);
            t.grad_weight[c] = static_cast<float>(sum_n);
            mean_g[c] = static_cast<float>(sum / static_cast<double>(problem.pixels));
            mean_gn[c] = static_cast<float>(sum_n / static_cast<double>(problem.pixels));
        }
        run<&BatchNorm::write_gradient>();
        return kDone;
    }

  private:
    int64_t cut(char* memory) {
        Cutter cutter(memory);
        partial = cutter.cut<float>(items * 2 * width);
        float** const of_channels[] = {&scale, &shift, &inverse, &centre, &mean_g, &mean_gn};
        for (float** numbers : of_channels) *numbers = cutter.cut<float>(width);
        return cutter.used;
    }

    float* of_item(int64_t item) const { return partial + item * 2 * width; }

    int64_t end(int64_t item) const { return item * together + smaller(together, problem.pixels - item * together); }

    void prepare(const float* weight, const float* bias, const float* statistics) {
        for (int64_t c = 0; c < C; ++c) {
            inverse[c] = 1 / sqrtf(statistics[C + c] + problem.epsilon);
            centre[c] = -statistics[c] * inverse[c];
            scale[c] = weight[c] * inverse[c];
            shift[c] = bias[c] - statistics[c] * scale[c];
        }
    }

    template <void (BatchNorm::*Body)(int64_t) const>
    void run() const {
        parallel_for(
            problem.threads, items,
            [](void* self, int64_t item, int) { (static_cast<const BatchNorm*>(self)->*Body)(item); },
            const_cast<BatchNorm*>(this));
    }

    // Calls body(position of the pixel, channel, how many) for every vector of every pixel of an item.
    template <class Body>
    __attribute__((always_inline)) inline void for_values(int64_t item, Body body) const {
        for (int64_t pixel = item * together; pixel < end(item); ++pixel)
            for_channels(C, [&](int64_t c, int count)
                             __attribute__((always_inline)) { body(pixel * C + c, c, count); });
    }

    void sum_moments(int64_t item) const {
        float *sums = of_item(item), *squares = sums + width;
        memset(sums, 0, static_cast<size_t>(2 * width) * sizeof(float));
        for_values(item, [&](int64_t at, int64_t c, int count) __attribute__((always_inline)) {
            store(sums + c, load(sums + c, Vec::lanes) + load(x + at, count), Vec::lanes);
        });
        const Vec per_pixel = Vec::broadcast(1 / static_cast<float>(end(item) - item * together));
        for_values(item, [&](int64_t at, int64_t c, int count) __attribute__((always_inline)) {
            const Vec off = load(x + at, count) - load(sums + c, Vec::lanes) * per_pixel;
            store(squares + c, multiply_add(off, off, load(squares + c, Vec::lanes)), Vec::lanes);
        });
    }

    void write_y(int64_t item) const {
        for_values(item, [&](int64_t at, int64_t c, int count) __attribute__((always_inline)) {
            const Vec v = multiply_add(load(x + at, count), load(scale + c, count), load(shift + c, count));
            store(y + at, GeluOf<exact>(v).value, count);
        });
    }

    // The gradient of v, and the normed x.
    __attribute__((always_inline)) inline void differentiate(int64_t at, int64_t c, int count, Vec& g, Vec& n) const {
        const Vec v = load(x + at, count);
        n = multiply_add(v, load(inverse + c, count), load(centre + c, count));
        g = load(grad_y + at, count) *
            GeluOf<exact>(multiply_add(v, load(scale + c, count), load(shift + c, count))).slope;
    }

    void sum_gradients(int64_t item) const {
        float *sums = of_item(item), *sums_n = sums + width;
        memset(sums, 0, static_cast<size_t>(2 * width) * sizeof(float));
        for_values(item, [&](int64_t at, int64_t c, int count) __attribute__((always_inline)) {
            Vec g, n;
            differentiate(at, c, count, g, n);
            store(sums + c, load(sums + c, Vec::lanes) + g, Vec::lanes);
            store(sums_n + c, multiply_add(g, n, load(sums_n + c, Vec::lanes)), Vec::lanes);
        });
    }

    void write_gradient(int64_t item) const {
        for_values(item, [&](int64_t at, int64_t c, int count) __attribute__((always_inline)) {
            Vec g, n;
            differentiate(at, c, count, g, n);
            const Vec off = g - load(mean_g + c, count) - n * load(mean_gn + c, count);
            store(grad_x + at, off * load(scale + c, count), count);
        });
    }
};

} // namespace
