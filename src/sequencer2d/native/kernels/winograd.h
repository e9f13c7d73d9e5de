// Convolutions 3×3 of stride 1 and padding 1 on channels-last images, by Winograd's algorithm F(2×2, 3×3) of Lavin and
// Gray 2016: a tile of 2×2 outputs takes 16 products for each pair of channels instead of 36.
//
//   y = A^T [(G w G^T) * (B^T x B)] A,  and so  grad_w = G^T [(A grad_y A^T) * (B^T x B)] G
//
// with x a tile of 4×4 inputs, w 3×3 weights, and the products * summed over the channels: a matrix product for each of
// the 16 planes, elements of a transformed tile. Transforms are computed in float and rounded to the type of the images,
// float or bfloat16, products are summed in float. The gradient of x is the convolution of grad_y with the turned weights.
#pragma once

#include "products.h"

namespace {

constexpr int kPlanes = 16;
constexpr int64_t kLine = 64;                    // bytes that planes are apart beside their size: else the same place of
                                                 // all of them would compete for one set of a cache
constexpr int kTileRows = 6;                     // tiles × vectors of outputs that stay in registers
constexpr int64_t kBlockBytes = 384 * 1024;      // of the transformed tiles that a thread works on: they stay in its cache
constexpr int64_t kMostTiles = 96;               // of them
constexpr int64_t kChunkBytes = 4 * 1024 * 1024; // of those that all threads make before they multiply them

template <class Value>
constexpr int64_t bytes_of = sizeof(Value);

// The tiles of 2×2 pixels of all images; at odd sides the last ones reach beyond.
struct TileGrid {
    int64_t height, width, rows, columns, count;

    explicit TileGrid(const Convolution& problem)
        : height(problem.height),
          width(problem.width),
          rows((height + 1) / 2),
          columns((width + 1) / 2),
          count(problem.batch * rows * columns) {}

    // Calls visit(row, column, pixel) for the pixels of the window around a tile, with null for those that are outside.
    template <int Side, class Value, class Visit>
    void window(int64_t tile, Value* image, int64_t channels, const Visit& visit) const {
        const int64_t top = tile / columns % rows * 2 - (Side - 2) / 2, left = tile % columns * 2 - (Side - 2) / 2;
        Value* of_image = image + tile / (rows * columns) * height * width * channels;
        for (int64_t i = 0; i < Side; ++i)
            for (int64_t j = 0; j < Side; ++j) {
                const int64_t y = top + i, x = left + j;
                const bool inside = y >= 0 && y < height && x >= 0 && x < width;
                visit(i, j, inside ? of_image + (y * width + x) * channels : nullptr);
            }
    }
};

// A window's pixels; those outside are zeros.
template <class Value, int Side>
struct Window {
    const Value* pixels[Side][Side];

    Window() = default;

    explicit Window(const Value* zeros) {
        for (auto& row : pixels)
            for (auto& pixel : row) pixel = zeros;
    }

    Window(const TileGrid& grid, int64_t tile, const Value* image, int64_t channels, const Value* zeros) {
        grid.window<Side>(tile, image, channels, [&](int64_t i, int64_t j, const Value* pixel) {
            pixels[i][j] = pixel ? pixel : zeros;
        });
    }
};

// B^T x B of some channels.
template <class Value>
inline void transform(const Window<Value, 4>& window, int64_t c, Vec* planes) {
    Vec x[4][4], t[4][4];
    UNROLL for (int i = 0; i < 4; ++i) {
        UNROLL for (int j = 0; j < 4; ++j) x[i][j] = load(window.pixels[i][j] + c, Vec::lanes);
    }
    UNROLL for (int j = 0; j < 4; ++j) {
        t[0][j] = x[0][j] - x[2][j];
        t[1][j] = x[1][j] + x[2][j];
        t[2][j] = x[2][j] - x[1][j];
        t[3][j] = x[1][j] - x[3][j];
    }
    UNROLL for (int i = 0; i < 4; ++i) {
        planes[4 * i] = t[i][0] - t[i][2];
        planes[4 * i + 1] = t[i][1] + t[i][2];
        planes[4 * i + 2] = t[i][2] - t[i][1];
        planes[4 * i + 3] = t[i][1] - t[i][3];
    }
}

// A grad_y A^T of some channels.
template <class Value>
inline void transform(const Window<Value, 2>& window, int64_t c, Vec* planes) {
    const Vec zero = Vec::broadcast(0);
    Vec t[4][2];
    UNROLL for (int j = 0; j < 2; ++j) {
        const Vec upper = load(window.pixels[0][j] + c, Vec::lanes), lower = load(window.pixels[1][j] + c, Vec::lanes);
        t[0][j] = upper;
        t[1][j] = upper + lower;
        t[2][j] = upper - lower;
        t[3][j] = zero - lower;
    }
    UNROLL for (int i = 0; i < 4; ++i) {
        planes[4 * i] = t[i][0];
        planes[4 * i + 1] = t[i][0] + t[i][1];
        planes[4 * i + 2] = t[i][0] - t[i][1];
        planes[4 * i + 3] = zero - t[i][1];
    }
}

// Weights [outputs, inputs, 3, 3], as G w G^T, in the order [plane][panel of outputs][group of inputs][output][of group].
// For the gradient of x, `backward`, inputs and outputs change places and the weights are turned by half a turn.
template <class Dot>
class WeightTransform {
  public:
    using Value = typename Dot::Element;

    WeightTransform(const Convolution& problem, bool backward, const float* weight, Value* packed)
        : inputs(backward ? problem.outputs : problem.inputs),
          outputs(backward ? problem.inputs : problem.outputs),
          input_stride(backward ? 9 * outputs : 9),
          output_stride(backward ? 9 : 9 * inputs),
          backward(backward),
          threads(problem.threads),
          weight(weight),
          packed(packed) {}

    void run() {
        parallel_for(
            threads, outputs / Vec::lanes,
            [](void* self, int64_t item, int) { static_cast<WeightTransform*>(self)->run_outputs(item * Vec::lanes); },
            this);
    }

  private:
    const int64_t inputs, outputs, input_stride, output_stride;
    const bool backward;
    const int threads;
    const float* weight;
    Value* packed;

    void run_outputs(int64_t output) const {
        const int64_t panels = outputs / kPanel;
        for (int64_t input = 0; input < inputs; input += Dot::depth) {
            Vec planes[kPlanes][Dot::depth];
            UNROLL for (int d = 0; d < Dot::depth; ++d)
                transform_taps(weight + output * output_stride + (input + d) * input_stride, d, planes);
            UNROLL for (int plane = 0; plane < kPlanes; ++plane) {
                const int64_t row = (plane * panels + output / kPanel) * inputs + input;
                store_together(packed + row * kPanel + output % kPanel * Dot::depth, planes[plane]);
            }
        }
    }

    // G w G^T, for as many outputs as a vector has lanes.
    void transform_taps(const float* taps, int d, Vec (*planes)[Dot::depth]) const {
        const Vec half = Vec::broadcast(0.5f);
        Vec w[3][3], t[4][3];
        UNROLL for (int i = 0; i < 3; ++i) {
            UNROLL for (int j = 0; j < 3; ++j) {
                float of_outputs[Vec::lanes];
                const float* tap = taps + (backward ? 8 - 3 * i - j : 3 * i + j);
                for (int lane = 0; lane < Vec::lanes; ++lane) of_outputs[lane] = tap[lane * output_stride];
                w[i][j] = load(of_outputs, Vec::lanes);
            }
        }
        UNROLL for (int j = 0; j < 3; ++j) {
            const Vec sum = w[0][j] + w[2][j];
            t[0][j] = w[0][j];
            t[1][j] = half * (sum + w[1][j]);
            t[2][j] = half * (sum - w[1][j]);
            t[3][j] = w[2][j];
        }
        UNROLL for (int i = 0; i < 4; ++i) {
            const Vec sum = t[i][0] + t[i][2];
            planes[4 * i][d] = t[i][0];
            planes[4 * i + 1][d] = half * (sum + t[i][1]);
            planes[4 * i + 2][d] = half * (sum - t[i][1]);
            planes[4 * i + 3][d] = t[i][2];
        }
    }
};

// Each task transforms some tiles and multiplies them, panel by panel of the outputs.
template <class Dot>
class Convolve {
  public:
    using Value = typename Dot::Element;

    Convolve(const Convolution& problem, const void* packed, const void* x, void* y)
        : grid(problem),
          inputs(problem.inputs),
          outputs(problem.outputs),
          tiles(smaller(kMostTiles, round_up(kBlockBytes / (kPlanes * bytes_of<Value> * inputs), kTileRows))),
          input_plane(tiles * inputs + kLine / bytes_of<Value>),
          product_plane(tiles * kPanel + kLine / bytes_of<float>),
          threads(problem.threads),
          weights(static_cast<const Value*>(packed)),
          x(static_cast<const Value*>(x)),
          y(static_cast<Value*>(y)) {}

    int run() {
        scratch_bytes = Block(nullptr, *this).bytes;
        Scratch scratch(scratch_bytes * threads);
        if (!scratch) return kOutOfMemory;
        memory = scratch.data();
        parallel_for(
            threads, (grid.count + tiles - 1) / tiles,
            [](void* self, int64_t item, int thread) { static_cast<Convolve*>(self)->run_block(item, thread); }, this);
        return kDone;
    }

  private:
    const TileGrid grid;
    const int64_t inputs, outputs, tiles;     // tiles: of a block
    const int64_t input_plane, product_plane; // values from one plane to the next
    const int threads;
    const Value *weights, *x;
    Value* y;
    int64_t scratch_bytes = 0;
    char* memory = nullptr;

    struct Block {
        Value* transformed; // [plane, tile, input]
        float* products;    // [plane, tile, output of a panel]
        Value* zeros;       // [input]
        int64_t bytes;
        Block(char* memory, const Convolve& of) {
            Cutter cutter(memory);
            transformed = cutter.cut<Value>(kPlanes * of.input_plane);
            products = cutter.cut<float>(kPlanes * of.product_plane);
            zeros = cutter.cut<Value>(of.inputs);
            bytes = cutter.used;
        }
    };

    void run_block(int64_t item, int thread) const {
        const Block block(memory + thread * scratch_bytes, *this);
        const int64_t begin = item * tiles;
        const int count = smaller(tiles, grid.count - begin);
        memset(block.zeros, 0, static_cast<size_t>(inputs) * sizeof(Value));
        for (int t = 0; t < count; ++t) {
            const Window<Value, 4> window(grid, begin + t, x, inputs, block.zeros);
            for (int64_t c = 0; c < inputs; c += Vec::lanes) {
                Vec planes[kPlanes];
                transform(window, c, planes);
                UNROLL for (int plane = 0; plane < kPlanes; ++plane)
                    store(block.transformed + plane * input_plane + t * inputs + c, planes[plane], Vec::lanes);
            }
        }
        for (int64_t panel = 0; panel < outputs / kPanel; ++panel) {
            for (int plane = 0; plane < kPlanes; ++plane) {
                const Value* of_panel = weights + (plane * outputs / kPanel + panel) * inputs * kPanel;
                for (int t = 0; t < count; t += kTileRows)
                    multiply<kTileRows>(block.transformed + plane * input_plane + t * inputs, of_panel,
                                        block.products + plane * product_plane + t * kPanel, count - t);
            }
            for (int t = 0; t < count; ++t) store_tile(block.products + t * kPanel, begin + t, panel * kPanel);
        }
    }

    template <int Rows>
    void multiply(const Value* rows, const Value* panel, float* out, int count) const {
        if constexpr (Rows > 1) {
            if (count < Rows) return multiply<Rows - 1>(rows, panel, out, count);
        }
        Vec sum[Rows][kGradColumns];
        UNROLL for (int r = 0; r < Rows; ++r) {
            UNROLL for (int j = 0; j < kGradColumns; ++j) sum[r][j] = Vec::broadcast(0);
        }
        for (int64_t k = 0; k < inputs; k += Dot::depth, panel += Dot::depth * kPanel) {
            decltype(Dot::template weights<Vec>(panel)) w[kGradColumns];
            UNROLL for (int j = 0; j < kGradColumns; ++j)
                w[j] = Dot::template weights<Vec>(panel + Dot::depth * j * Vec::lanes);
            UNROLL for (int r = 0; r < Rows; ++r) {
                const auto from = Dot::template broadcast<Vec>(rows + r * inputs + k);
                UNROLL for (int j = 0; j < kGradColumns; ++j) sum[r][j] = Dot::multiply_add(w[j], from, sum[r][j]);
            }
        }
        UNROLL for (int r = 0; r < Rows; ++r) {
            UNROLL for (int j = 0; j < kGradColumns; ++j)
                store(out + r * kPanel + j * Vec::lanes, sum[r][j], Vec::lanes);
        }
    }

    // A^T products A
    void store_tile(const float* products, int64_t tile, int64_t output) const {
        Value* pixels[2][2];
        grid.window<2>(tile, y, outputs, [&](int64_t i, int64_t j, Value* pixel) { pixels[i][j] = pixel; });
        for (int64_t c = 0; c < kPanel; c += Vec::lanes) {
            Vec t[2][4];
            UNROLL for (int j = 0; j < 4; ++j) {
                const float* column = products + j * product_plane + c;
                const Vec second = load(column + 4 * product_plane, Vec::lanes);
                const Vec third = load(column + 8 * product_plane, Vec::lanes);
                t[0][j] = load(column, Vec::lanes) + second + third;
                t[1][j] = second - third - load(column + 12 * product_plane, Vec::lanes);
            }
            UNROLL for (int i = 0; i < 2; ++i) {
                if (pixels[i][0]) store(pixels[i][0] + output + c, t[i][0] + t[i][1] + t[i][2], Vec::lanes);
                if (pixels[i][1]) store(pixels[i][1] + output + c, t[i][1] - t[i][2] - t[i][3], Vec::lanes);
            }
        }
    }
};

// The gradient of the transformed weights. Chunk by chunk of the tiles, all threads transform, then all multiply, each
// task one plane and panel of outputs: every sum is made in one order, however many threads there are.
template <class Dot>
class ConvolutionGradient {
  public:
    using Value = typename Dot::Element;

    ConvolutionGradient(const Convolution& problem, const void* x, const void* grad, float* weight)
        : grid(problem),
          inputs(problem.inputs),
          outputs(problem.outputs),
          chunk(round_up(smaller(grid.count, kChunkBytes / (kPlanes * bytes_of<Value> * wider())), Dot::depth)),
          column_plane(inputs * chunk + kLine / bytes_of<Value>),
          row_plane(outputs * chunk + kLine / bytes_of<Value>),
          threads(problem.threads),
          x(static_cast<const Value*>(x)),
          grad(static_cast<const Value*>(grad)),
          weight(weight) {}

    int run() {
        Cutter sizes(nullptr);
        cut(sizes);
        Scratch scratch(sizes.used);
        if (!scratch) return kOutOfMemory;
        Cutter cutter(scratch.data());
        cut(cutter);
        memset(zeros, 0, static_cast<size_t>(wider()) * sizeof(Value));
        memset(weight, 0, static_cast<size_t>(kPlanes * outputs * inputs) * sizeof(float));
        for (begin = 0; begin < grid.count; begin += chunk) {
            groups = smaller(chunk, grid.count - begin + Dot::depth - 1) / Dot::depth;
            parallel_for(
                threads, (groups + kGroupsOfTask - 1) / kGroupsOfTask,
                [](void* self, int64_t item, int) { static_cast<ConvolutionGradient*>(self)->transform_groups(item); },
                this);
            parallel_for(
                threads, kPlanes * outputs / kPanel,
                [](void* self, int64_t item, int) { static_cast<ConvolutionGradient*>(self)->multiply(item); }, this);
        }
        return kDone;
    }

  private:
    static constexpr int kGroupsOfTask = 32 / Dot::depth; // of neighbouring tiles, which a thread transforms at a time

    const TileGrid grid;
    const int64_t inputs, outputs, chunk;  // chunk: tiles at a time, whole groups of `depth`
    const int64_t column_plane, row_plane; // values from one plane to the next
    const int threads;
    const Value *x, *grad;
    float* weight;                             // [plane, output, input]
    int64_t begin = 0;                         // of the tiles of this chunk
    int groups = 0;                            // of its tiles
    Value *columns = nullptr, *rows = nullptr; // of x and of grad: [plane, panel, group, channel of the panel, of group]
    Value* zeros = nullptr;

    int64_t wider() const { return inputs > outputs ? inputs : outputs; }

    void cut(Cutter& cutter) {
        columns = cutter.cut<Value>(kPlanes * column_plane);
        rows = cutter.cut<Value>(kPlanes * row_plane);
        zeros = cutter.cut<Value>(wider());
    }

    void transform_groups(int64_t item) const {
        const int end = smaller((item + 1) * kGroupsOfTask, groups);
        for (int group = static_cast<int>(item) * kGroupsOfTask; group < end; ++group) {
            transform_group<4>(group, x, inputs, columns, column_plane);
            transform_group<2>(group, grad, outputs, rows, row_plane);
        }
    }

    template <int Side>
    void transform_group(int group, const Value* image, int64_t channels, Value* out, int64_t plane_size) const {
        const int64_t tile = begin + Dot::depth * group;
        Window<Value, Side> windows[Dot::depth];
        for (int d = 0; d < Dot::depth; ++d) {
            const bool there = tile + d < grid.count;
            windows[d] = there ? Window<Value, Side>(grid, tile + d, image, channels, zeros) : Window<Value, Side>(zeros);
        }
        for (int64_t c = 0; c < channels; c += Vec::lanes) {
            Vec planes[Dot::depth][kPlanes];
            UNROLL for (int d = 0; d < Dot::depth; ++d) transform(windows[d], c, planes[d]);
            Value* to = out + c / kPanel * chunk * kPanel + (group * kPanel + c % kPanel) * Dot::depth;
            UNROLL for (int plane = 0; plane < kPlanes; ++plane) {
                Vec together[Dot::depth];
                UNROLL for (int d = 0; d < Dot::depth; ++d) together[d] = planes[d][plane];
                store_together(to + plane * plane_size, together);
            }
        }
    }

    void multiply(int64_t item) const {
        const int64_t panels = outputs / kPanel, plane = item / panels, panel = item % panels; // neighbours share columns
        const Value* of_rows = rows + plane * row_plane + panel * kPanel * chunk;
        float* out = weight + (plane * outputs + panel * kPanel) * inputs;
        for (int64_t c = 0; c < inputs; c += kPanel) {
            const Value* of_columns = columns + plane * column_plane + c * chunk;
            for (int o = 0; o < kPanel; o += kGradRows)
                add_products<Dot, kGradColumns, kGradRows>(out + o * inputs + c, inputs, kPanel - o, groups, of_columns,
                                                           of_rows + Dot::depth * o, kPanel);
        }
    }
};

// run(dot) for the type of the images; bfloat16 only where there are instructions for it.
template <class Run>
inline int with_dot(const Convolution& problem, const Run& run) {
    if (problem.type == kFloat32) return run(FloatDot());
    if constexpr (BFloat16Dot::depth == 2) return run(BFloat16Dot());
    return kNoSuchKernel;
}

inline int pack_convolution(const Convolution& problem, bool backward, const float* weight, void* packed) {
    return with_dot(problem, [&](auto dot) {
        using Dot = decltype(dot);
        WeightTransform<Dot>(problem, backward, weight, static_cast<typename Dot::Element*>(packed)).run();
        return kDone;
    });
}

inline int convolve(const Convolution& problem, const void* packed, const void* x, void* y) {
    return with_dot(problem, [&](auto dot) { return Convolve<decltype(dot)>(problem, packed, x, y).run(); });
}

inline int convolution_gradient(const Convolution& problem, const void* x, const void* grad, float* weight) {
    return with_dot(problem, [&](auto dot) { return ConvolutionGradient<decltype(dot)>(problem, x, grad, weight).run(); });
}

} // namespace
