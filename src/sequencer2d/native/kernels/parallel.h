// A parallel loop on the threads that torch already has.
#pragma once

#include <stdint.h>

// Calls body(context, item, thread) once for every item in [0, items), on at most `threads` threads,
// each of which takes the next item when it is done with one. `thread` counts from 0. No body may throw.
void parallel_for(int threads, int64_t items, void (*body)(void* context, int64_t item, int thread), void* context);

// Whether an OpenMP runtime is there; without one the loop runs on one thread.
bool has_threads();
