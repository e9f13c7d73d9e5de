// The library's entries. Which instruction sets are in it is the build's choice (SEQUENCER2D_HAS_...); which of them the
// processor has is asked at run time; which one works is the caller's choice.
#ifdef SEQUENCER2D_HAS_AVX2
#include <cpuid.h>
#endif

#include "abi.h"
#include "parallel.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

extern const Kernel kernel_portable, kernel_avx2, kernel_avx512, kernel_avx512_bf16;

#ifdef SEQUENCER2D_HAS_AVX2
bool runs_avx2() { // conversions to float16 are a flag that not every compiler knows the name of
    unsigned a, b, c = 0, d;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
           (c & bit_F16C);
}
#endif

#if defined(SEQUENCER2D_HAS_AVX512) || defined(SEQUENCER2D_HAS_AVX512_BF16)
bool runs_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

#ifdef SEQUENCER2D_HAS_AVX512_BF16
bool runs_avx512_bf16() {
    return runs_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
#endif

static const Kernel* const kernels[] = { // the fastest last
    &kernel_portable,
#ifdef SEQUENCER2D_HAS_AVX2
    &kernel_avx2,
#endif
#ifdef SEQUENCER2D_HAS_AVX512
    &kernel_avx512,
#endif
#ifdef SEQUENCER2D_HAS_AVX512_BF16
    &kernel_avx512_bf16,
#endif
};

static const int count = sizeof kernels / sizeof *kernels;

EXPORT int sequencer2d_abi() { return SEQUENCER2D_ABI; }

EXPORT int sequencer2d_has_threads() { return has_threads(); }

// Name of a kernel, counted from 0; null after the last.
EXPORT const char* sequencer2d_kernel_name(int kernel) {
    return kernel >= 0 && kernel < count ? kernels[kernel]->name : nullptr;
}

EXPORT int sequencer2d_kernel_runs_here(int kernel) {
    return kernel >= 0 && kernel < count && kernels[kernel]->runs_here();
}

EXPORT int64_t sequencer2d_packed_bytes(int kernel, const Problem* problem, int backward) {
    return sequencer2d_kernel_runs_here(kernel) ? kernels[kernel]->packed_bytes(*problem, backward) : -1;
}

EXPORT int sequencer2d_pack(int kernel, const Problem* problem, int backward, const void* w_ih, const void* w_hh,
                            void* packed) {
    if (!sequencer2d_kernel_runs_here(kernel)) return kNoSuchKernel;
    kernels[kernel]->pack(*problem, backward, w_ih, w_hh, packed);
    return kDone;
}

EXPORT int sequencer2d_forward(int kernel, const Problem* problem, const ForwardTensors* tensors) {
    return sequencer2d_kernel_runs_here(kernel) ? kernels[kernel]->forward(*problem, *tensors) : kNoSuchKernel;
}

EXPORT int sequencer2d_backward(int kernel, const Problem* problem, const BackwardTensors* tensors) {
    return sequencer2d_kernel_runs_here(kernel) ? kernels[kernel]->backward(*problem, *tensors) : kNoSuchKernel;
}

EXPORT int sequencer2d_norm_forward(int kernel, const NormProblem* problem, const NormForwardTensors* tensors) {
    return sequencer2d_kernel_runs_here(kernel) ? kernels[kernel]->norm_forward(*problem, *tensors) : kNoSuchKernel;
}

EXPORT int sequencer2d_norm_backward(int kernel, const NormProblem* problem, const NormBackwardTensors* tensors) {
    return sequencer2d_kernel_runs_here(kernel) ? kernels[kernel]->norm_backward(*problem, *tensors) : kNoSuchKernel;
}

EXPORT int sequencer2d_batch_norm_forward(int kernel, const BatchNormProblem* problem,
                                          const BatchNormForwardTensors* tensors) {
    return sequencer2d_kernel_runs_here(kernel) ? kernels[kernel]->batch_norm_forward(*problem, *tensors) : kNoSuchKernel;
}

EXPORT int sequencer2d_batch_norm_backward(int kernel, const BatchNormProblem* problem,
                                           const BatchNormBackwardTensors* tensors) {
    return sequencer2d_kernel_runs_here(kernel) ? kernels[kernel]->batch_norm_backward(*problem, *tensors) : kNoSuchKernel;
}

EXPORT int sequencer2d_gelu(int kernel, int type, int threads, int64_t count, const void* x, void* y,
                            const void* grad_y, void* grad_x) {
    if (!sequencer2d_kernel_runs_here(kernel)) return kNoSuchKernel;
    kernels[kernel]->gelu(type, threads, count, x, y, grad_y, grad_x);
    return kDone;
}

EXPORT int64_t sequencer2d_packed_int8_bytes(int kernel, int64_t inputs, int64_t outputs) {
    return sequencer2d_kernel_runs_here(kernel) ? kernels[kernel]->packed_int8_bytes(inputs, outputs) : -1;
}

EXPORT int sequencer2d_pack_int8(int kernel, int64_t inputs, int64_t outputs, const int8_t* weights, int8_t* packed) {
    if (!sequencer2d_kernel_runs_here(kernel)) return kNoSuchKernel;
    kernels[kernel]->pack_int8(inputs, outputs, weights, packed);
    return kDone;
}

EXPORT int sequencer2d_int8_project(int kernel, const Int8Project* tensors) {
    return sequencer2d_kernel_runs_here(kernel) ? kernels[kernel]->project(*tensors) : kNoSuchKernel;
}

EXPORT int sequencer2d_int8_finish(int kernel, const Int8Finish* tensors) {
    return sequencer2d_kernel_runs_here(kernel) ? kernels[kernel]->finish(*tensors) : kNoSuchKernel;
}

EXPORT int sequencer2d_weight_gradient(int kernel, const WeightGradient* tensors) {
    if (!sequencer2d_kernel_runs_here(kernel) || !kernels[kernel]->weight_gradient) return kNoSuchKernel;
    return kernels[kernel]->weight_gradient(*tensors);
}

EXPORT int sequencer2d_pack_convolution(int kernel, const Convolution* problem, int backward, const float* weight,
                                        void* packed) {
    if (!sequencer2d_kernel_runs_here(kernel) || !kernels[kernel]->pack_convolution) return kNoSuchKernel;
    return kernels[kernel]->pack_convolution(*problem, backward, weight, packed);
}

EXPORT int sequencer2d_convolve(int kernel, const Convolution* problem, const void* packed, const void* x, void* y) {
    if (!sequencer2d_kernel_runs_here(kernel) || !kernels[kernel]->convolve) return kNoSuchKernel;
    return kernels[kernel]->convolve(*problem, packed, x, y);
}

EXPORT int sequencer2d_convolution_gradient(int kernel, const Convolution* problem, const void* x, const void* grad,
                                            float* weight) {
    if (!sequencer2d_kernel_runs_here(kernel) || !kernels[kernel]->convolution_gradient) return kNoSuchKernel;
    return kernels[kernel]->convolution_gradient(*problem, x, grad, weight);
}

EXPORT int sequencer2d_pool(int kernel, const Pooling* problem, const void* x, void* y, uint8_t* chosen) {
    if (!sequencer2d_kernel_runs_here(kernel) || !kernels[kernel]->pool) return kNoSuchKernel;
    kernels[kernel]->pool(*problem, x, y, chosen);
    return kDone;
}

EXPORT int sequencer2d_pool_gradient(int kernel, const Pooling* problem, const void* grad_y, const uint8_t* chosen,
                                     void* grad_x) {
    if (!sequencer2d_kernel_runs_here(kernel) || !kernels[kernel]->pool_gradient) return kNoSuchKernel;
    kernels[kernel]->pool_gradient(*problem, grad_y, chosen, grad_x);
    return kDone;
}
