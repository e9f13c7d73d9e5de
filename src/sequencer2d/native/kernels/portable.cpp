#include "vector_portable.h"

#include "kernel.h"

extern const Kernel kernel_portable = make_kernel("portable", [] { return true; });
