#include "vector_avx512.h"

#include "kernel.h"

bool runs_avx512_bf16(); // dispatch.cpp, which is compiled for any processor

extern const Kernel kernel_avx512_bf16 = make_kernel("avx512_bf16", runs_avx512_bf16);
