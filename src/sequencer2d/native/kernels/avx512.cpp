#include "vector_avx512.h"

#include "kernel.h"

bool runs_avx512(); // dispatch.cpp, which is compiled for any processor

extern const Kernel kernel_avx512 = make_kernel("avx512", runs_avx512);
