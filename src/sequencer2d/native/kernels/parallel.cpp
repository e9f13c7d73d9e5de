#include "parallel.h"

#include <atomic>

// The two entries of the OpenMP runtime that are needed, declared weak and linked to nothing: at load time they become
// those of the runtime that torch has brought into the process, be it GNU's or LLVM's, so there is never a second one.
extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*body)(void*), void* context, unsigned threads, unsigned flags);
__attribute__((weak)) int omp_get_thread_num();
}

namespace {

struct Loop {
    std::atomic<int64_t> next{0};
    int64_t items;
    void (*body)(void*, int64_t, int);
    void* context;
};

void take_items(void* pointer) {
    Loop& loop = *static_cast<Loop*>(pointer);
    const int thread = omp_get_thread_num();
    for (int64_t item; (item = loop.next.fetch_add(1)) < loop.items;) {
        loop.body(loop.context, item, thread);
    }
}

} // namespace

bool has_threads() { return GOMP_parallel != nullptr && omp_get_thread_num != nullptr; }

void parallel_for(int threads, int64_t items, void (*body)(void*, int64_t, int), void* context) {
    if (threads > items) threads = static_cast<int>(items);
    if (threads > 1 && has_threads()) {
        Loop loop;
        loop.items = items;
        loop.body = body;
        loop.context = context;
        GOMP_parallel(take_items, &loop, static_cast<unsigned>(threads), 0);
    } else {
        for (int64_t item = 0; item < items; ++item) body(context, item, 0);
    }
}
