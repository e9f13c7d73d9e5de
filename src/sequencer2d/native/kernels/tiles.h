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
    int sequences;   //
    int64_t steps;   // length of a sequence
    int64_t stride;  // tokens from one step along the axis to the next
    bool reverse;    // from the end to the start
    int64_t origin[kTile];

    // Tokens between the start of a sequence and its step-th step in the order of this direction.
    int64_t offset(int64_t step) const { return (reverse ? steps - 1 - step : step) * stride; }
};

// The division of all sequences of all directions into tiles.
struct Tiling {
    const Problem& problem;
    int size; // sequences of a tile
    int64_t columns, rows; // tiles of one direction

    explicit Tiling(const Problem& p) : problem(p), size(kTile) {
        while (size > 8 && count() < 2 * p.threads) size -= 8;
        count();
    }

    int64_t count() {
        columns = round_up(problem.batch * problem.width, size) / size;
        rows = round_up(problem.batch * problem.height, size) / size;
        return columns * problem.vertical + rows * problem.horizontal;
    }

    // Tiles of one direction stand together; the first of them.
    int64_t begin(int direction) const {
        const int vertical = smaller(direction, problem.vertical);
        return vertical * columns + (direction - vertical) * rows;
    }

    Tile tile(int64_t index) const {
        Tile tile;
        const int64_t H = problem.height, W = problem.width;
        const int64_t vertical_tiles = columns * problem.vertical;
        const bool vertical = index < vertical_tiles;
        const int64_t rest = vertical ? index : index - vertical_tiles;
        const int64_t per_direction = vertical ? columns : rows;
        const int64_t begin = rest % per_direction * size;
        const int64_t in_direction = rest / per_direction;
        tile.direction = static_cast<int>(vertical ? in_direction : problem.vertical + in_direction);
        tile.reverse = in_direction == 1;
        tile.sequences = smaller(size, problem.batch * (vertical ? W : H) - begin);
        tile.steps = vertical ? H : W;
        tile.stride = vertical ? W : 1;
        for (int s = 0; s < tile.sequences; ++s) {
            const int64_t sequence = begin + s;
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
