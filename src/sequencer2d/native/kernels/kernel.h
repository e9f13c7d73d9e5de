// All of one instruction set, behind the table that dispatch.cpp chooses from. Everything else is local to the file
// that includes this: code that was compiled for one processor must never stand in for that of another.
#pragma once

#include "backward.h"
#include "batch_norm.h"
#include "forward.h"
#include "gelu.h"
#include "int8.h"
#include "norm.h"
#ifdef __AVX2__
#include "winograd.h"
#endif
#ifdef __AVX512F__
#include "pooling.h"
#endif
#ifdef __AVX512BF16__
#include "weight_gradient.h"
#endif

namespace {

template <class Value, class Dot>
struct Typed {
    static int64_t packed_bytes(const Problem& problem, bool backward) {
        const Packing<Dot> packing(problem);
        const int64_t elements = backward ? packing.backward_elements() : packing.forward_elements();
        return directions(problem) * elements * static_cast<int64_t>(sizeof(typename Dot::Element));
    }

    static void pack(const Problem& problem, bool backward, const void* w_ih, const void* w_hh, void* packed) {
        const Packing<Dot> packing(problem);
        const Value *of_inputs = static_cast<const Value*>(w_ih), *w = static_cast<const Value*>(w_hh);
        auto* out = static_cast<typename Dot::Element*>(packed);
        for (int direction = 0; direction < directions(problem); ++direction, w += 4 * packing.D * packing.D) {
            if (backward)
                packing.pack_backward(w, out + direction * packing.backward_elements());
            else
                packing.pack_forward(of_inputs + direction * 4 * packing.D * packing.C, w,
                                     out + direction * packing.forward_elements());
        }
    }

    static int forward(const Problem& problem, const ForwardTensors& tensors) {
        return Forward<Value, Dot>(problem, tensors).run();
    }

    static int backward(const Problem& problem, const BackwardTensors& tensors) {
        return Backward<Value, Dot>(problem, tensors).run();
    }
};

using Floats32 = Typed<float, FloatDot>;
using BFloats16 = Typed<bfloat16, BFloat16Dot>;

inline bool is_float(const Problem& problem) { return problem.type == kFloat32; }

constexpr Kernel make_kernel(const char* name, bool (*runs_here)()) {
    return {
        name,
        runs_here,
        [](const Problem& p, bool backward) {
            return is_float(p) ? Floats32::packed_bytes(p, backward) : BFloats16::packed_bytes(p, backward);
        },
        [](const Problem& p, bool backward, const void* w_ih, const void* w_hh, void* packed) {
            is_float(p) ? Floats32::pack(p, backward, w_ih, w_hh, packed)
                        : BFloats16::pack(p, backward, w_ih, w_hh, packed);
        },
        [](const Problem& p, const ForwardTensors& t) {
            return is_float(p) ? Floats32::forward(p, t) : BFloats16::forward(p, t);
        },
        [](const Problem& p, const BackwardTensors& t) {
            return is_float(p) ? Floats32::backward(p, t) : BFloats16::backward(p, t);
        },
        [](const NormProblem& p, const NormForwardTensors& t) {
            if (p.residual_type == kBFloat16) return NormForward<bfloat16, bfloat16>(p, t).run();
            return p.type == kFloat32 ? NormForward<float, float>(p, t).run() : NormForward<float, bfloat16>(p, t).run();
        },
        [](const NormProblem& p, const NormBackwardTensors& t) {
            if (p.residual_type == kBFloat16) return NormBackward<bfloat16, bfloat16>(p, t).run();
            return p.type == kFloat32 ? NormBackward<float, float>(p, t).run()
                                      : NormBackward<float, bfloat16>(p, t).run();
        },
        [](int type, int threads, int64_t count, const void* x, void* y, const void* grad_y, void* grad_x) {
            type == kFloat32 ? Gelu<float>::run(threads, count, x, y, grad_y, grad_x)
                             : Gelu<bfloat16>::run(threads, count, x, y, grad_y, grad_x);
        },
        [](const BatchNormProblem& p, const BatchNormForwardTensors& t) {
            return p.type == kFloat32 ? BatchNorm<float>(p, t.x).forward(t) : BatchNorm<bfloat16>(p, t.x).forward(t);
        },
        [](const BatchNormProblem& p, const BatchNormBackwardTensors& t) {
            return p.type == kFloat32 ? BatchNorm<float>(p, t.x).backward(t) : BatchNorm<bfloat16>(p, t.x).backward(t);
        },
        packed_int8_bytes,
        pack_int8,
        project,
        finish,
#ifdef __AVX512BF16__
        weight_gradient,
#else
        nullptr,
#endif
#ifdef __AVX512F__
        pool,
        pool_gradient,
#else
        nullptr,
        nullptr,
#endif
#ifdef __AVX2__
        pack_convolution,
        convolve,
        convolution_gradient,
#else
        nullptr,
        nullptr,
        nullptr,
#endif
    };
}

} // namespace
