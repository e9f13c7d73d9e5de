#include "vector_avx2.h"

#include "kernel.h"

bool runs_avx2(); // dispatch.cpp, which is compiled for any processor

extern const Kernel kernel_avx2 = make_kernel("avx2", runs_avx2);
