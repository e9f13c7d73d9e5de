// What one thread works on at a time: a few sequences of one direction.
#pragma once

#include <stdlib.h>

#include "abi.h"
#include "parallel.h"

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

constexpr int kTile = 24; // sequences; a multiple of every register block of at most 8

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline int smaller(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

inline int directions(const Problem& problem) { return problem.vertical + problem.horizontal; }

// Sequences of one direction, and where their tokens are: token(s, t) = origin[s] + t * stride.
struct Tile {
    int direction;   // among all
    int64_t number;  // among all, those of a direction together
    int sequences;   //
    int64_t steps;   // length of a sequence
    int64_t stride;  // tokens from one step along the axis to the next
    bool reverse;    // from the end to the start
    int64_t origin[kTile];

    // Tokens between the start of a sequence and its step-th step in the order of this direction.
    int64_t offset(int64_t step) const { return (reverse ? steps - 1 - step : step) * stride; }
};

// The division of all sequences of all directions into tiles. Those of the same images follow each other, whatever their
// direction, and where there are many, one thread takes those of all directions: they share cache lines and pages.
struct Tiling {
    const Problem& problem;
    int size; // sequences of a tile
    int64_t columns, rows; // tiles of one direction
    int64_t together;      // tiles that a thread takes at a time

    explicit Tiling(const Problem& p) : problem(p), size(kTile) {
        while (size > 8 && count() < 2 * p.threads) size -= 8;
        together = count() < 8 * p.threads * directions(p) ? 1 : directions(p);
    }

    // Calls run_tile(tile, thread) of an object for every tile; it must not throw.
    template <class Object>
    void run(Object& object) {
        struct Work {
            const Tiling& tiling;
            Object& object;
            int64_t tiles;
        };
        Work work{*this, object, count()};
        parallel_for(
            problem.threads, round_up(work.tiles, together) / together,
            [](void* pointer, int64_t item, int thread) {
                const Work& w = *static_cast<Work*>(pointer);
                const int64_t begin = item * w.tiling.together, end = smaller(begin + w.tiling.together, w.tiles);
                for (int64_t tile = begin; tile < end; ++tile) w.object.run_tile(w.tiling.tile(tile), thread);
            },
            &work);
    }

    int64_t count() {
        columns = round_up(problem.batch * problem.width, size) / size;
        rows = round_up(problem.batch * problem.height, size) / size;
        return columns * problem.vertical + rows * problem.horizontal;
    }

    // The numbers of tiles of one direction stand together; the first of them.
    int64_t begin(int direction) const {
        const int vertical = smaller(direction, problem.vertical);
        return vertical * columns + (direction - vertical) * rows;
    }

    Tile tile(int64_t index) const {
        Tile tile;
        const int64_t H = problem.height, W = problem.width;
        const int64_t R = directions(problem);
        const int64_t of_all = problem.vertical && problem.horizontal ? smaller(columns, rows) : 0;
        int64_t in_direction = index / R, direction = index % R;
        if (in_direction >= of_all) { // those that one axis has more than the other
            const bool vertical = problem.vertical && (!problem.horizontal || columns > rows);
            const int64_t left = vertical ? problem.vertical : problem.horizontal, rest = index - of_all * R;
            in_direction = of_all + rest / left;
            direction = rest % left + (vertical ? 0 : problem.vertical);
        }
        tile.direction = static_cast<int>(direction);
        tile.number = begin(tile.direction) + in_direction;
        const bool vertical = tile.direction < problem.vertical;
        const int64_t start = in_direction * size;
        tile.reverse = tile.direction == (vertical ? 1 : problem.vertical + 1);
        tile.sequences = smaller(size, problem.batch * (vertical ? W : H) - start);
        tile.steps = vertical ? H : W;
        tile.stride = vertical ? W : 1;
        for (int s = 0; s < tile.sequences; ++s) {
            const int64_t sequence = start + s;
            tile.origin[s] = vertical ? sequence / W * H * W + sequence % W : sequence * W;
        }
        return tile;
    }
};

// Memory of one call, aligned for vectors; nothing where there is not enough.
class Scratch {
  public:
    explicit Scratch(int64_t bytes) : memory(malloc(static_cast<size_t>(bytes) + 64)) {}
    ~Scratch() { free(memory); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    explicit operator bool() const { return memory != nullptr; }
    char* data() const {
        const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
        return static_cast<char*>(memory) + (64 - address % 64) % 64;
    }

  private:
    void* memory;
};

// Cuts parts from a piece of memory, each aligned; from null it only counts.
class Cutter {
  public:
    explicit Cutter(char* p) : start(p) {}
    template <class T>
    T* cut(int64_t count) {
        T* part = start ? reinterpret_cast<T*>(start + used) : nullptr;
        used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return part;
    }
    int64_t used = 0;

  private:
    char* start;
};

} // namespace
