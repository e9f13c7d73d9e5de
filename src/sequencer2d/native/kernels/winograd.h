// Convolutions 3×3 of stride 1 and padding 1 on channels-last bfloat16, by Winograd's algorithm F(2×2, 3×3) of Lavin and
// Gray 2016: a tile of 2×2 outputs takes 16 products for each pair of channels instead of 36.
//
//   y = A^T [(G w G^T) * (B^T x B)] A,  and so  grad_w = G^T [(A grad_y A^T) * (B^T x B)] G
//
// with x a tile of 4×4 inputs, w 3×3 weights, and the products * summed over the channels: a matrix product for each of
// the 16 planes, elements of a transformed tile. Transforms are computed in float and rounded to bfloat16, products are
// summed in float. The gradient of x is the convolution of grad_y with the turned weights.
#pragma once

#include "weight_gradient.h"

namespace {

constexpr int kPlanes = 16;
constexpr int64_t kLine = 64;                    // bytes that planes are apart beside their size: else the same place of
                                                 // all of them would compete for one set of a cache
constexpr int kTileRows = 6;                     // tiles × vectors of outputs that stay in registers
constexpr int64_t kBlockBytes = 384 * 1024;      // of the transformed tiles that a thread works on: they stay in its cache
constexpr int64_t kMostTiles = 96;               // of them
constexpr int64_t kChunkBytes = 4 * 1024 * 1024; // of those that all threads make before they multiply them

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
template <int Side>
struct Window {
    const bfloat16* pixels[Side][Side];

    explicit Window(const bfloat16* zeros) {
        for (auto& row : pixels)
            for (auto& pixel : row) pixel = zeros;
    }

    Window(const TileGrid& grid, int64_t tile, const bfloat16* image, int64_t channels, const bfloat16* zeros) {
        grid.window<Side>(tile, image, channels, [&](int64_t i, int64_t j, const bfloat16* pixel) {
            pixels[i][j] = pixel ? pixel : zeros;
        });
    }
};

// B^T x B of some channels.
inline void transform(const Window<4>& window, int64_t c, Vec* planes) {
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
inline void transform(const Window<2>& window, int64_t c, Vec* planes) {
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

// Weights [outputs, inputs, 3, 3], as G w G^T, in the order [plane][panel of outputs][pair of inputs][output][of pair].
// For the gradient of x, `backward`, inputs and outputs change places and the weights are turned by half a turn.
class WeightTransform {
  public:
    WeightTransform(const Convolution& problem, bool backward, const float* weight, bfloat16* packed)
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
            threads, outputs,
            [](void* self, int64_t output, int) { static_cast<WeightTransform*>(self)->run_output(output); },
            this);
    }

  private:
    const int64_t inputs, outputs, input_stride, output_stride;
    const bool backward;
    const int threads;
    const float* weight;
    bfloat16* packed;

    void run_output(int64_t output) const {
        const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i from = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(input_stride)));
        const __m256i to = _mm256_slli_epi32(_mm512_castsi512_si256(lanes), 6); // kPanel pairs from one to the next
        const Vec half = Vec::broadcast(0.5f);
        const int64_t pairs = inputs / 2, panels = outputs / kPanel;
        for (int64_t input = 0; input < inputs; input += Vec::lanes) {
            const float* taps = weight + output * output_stride + input * input_stride;
            Vec w[3][3], t[4][3], planes[kPlanes];
            UNROLL for (int i = 0; i < 3; ++i) {
                UNROLL for (int j = 0; j < 3; ++j) {
                    const int tap = backward ? 8 - 3 * i - j : 3 * i + j;
                    w[i][j] = Vec{_mm512_i32gather_ps(from, taps + tap, 4)};
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
                planes[4 * i] = t[i][0];
                planes[4 * i + 1] = half * (sum + t[i][1]);
                planes[4 * i + 2] = half * (sum - t[i][1]);
                planes[4 * i + 3] = t[i][2];
            }
            for (int plane = 0; plane < kPlanes; ++plane) {
                const int64_t row = (plane * panels + output / kPanel) * pairs + input / 2;
                bfloat16* place = packed + (row * kPanel + output % kPanel) * 2;
                _mm256_i32scatter_epi32(place, to, to_bfloat16(planes[plane].v), 4);
            }
        }
    }
};

// Each task transforms some tiles and multiplies them, panel by panel of the outputs.
class Convolve {
  public:
    Convolve(const Convolution& problem, const void* packed, const void* x, void* y)
        : grid(problem),
          inputs(problem.inputs),
          outputs(problem.outputs),
          tiles(smaller(kMostTiles, round_up(kBlockBytes / (kPlanes * 2 * inputs), kTileRows))),
          input_plane(tiles * inputs + kLine / static_cast<int64_t>(sizeof(bfloat16))),
          product_plane(tiles * kPanel + kLine / static_cast<int64_t>(sizeof(float))),
          threads(problem.threads),
          weights(static_cast<const bfloat16*>(packed)),
          x(static_cast<const bfloat16*>(x)),
          y(static_cast<bfloat16*>(y)) {}

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
    const bfloat16 *weights, *x;
    bfloat16* y;
    int64_t scratch_bytes = 0;
    char* memory = nullptr;

    struct Block {
        bfloat16* transformed; // [plane, tile, input]
        float* products;       // [plane, tile, output of a panel]
        bfloat16* zeros;       // [input]
        int64_t bytes;
        Block(char* memory, const Convolve& of) {
            Cutter cutter(memory);
            transformed = cutter.cut<bfloat16>(kPlanes * of.input_plane);
            products = cutter.cut<float>(kPlanes * of.product_plane);
            zeros = cutter.cut<bfloat16>(of.inputs);
            bytes = cutter.used;
        }
    };

    void run_block(int64_t item, int thread) const {
        const Block block(memory + thread * scratch_bytes, *this);
        const int64_t begin = item * tiles;
        const int count = smaller(tiles, grid.count - begin);
        memset(block.zeros, 0, static_cast<size_t>(inputs) * sizeof(bfloat16));
        for (int t = 0; t < count; ++t) {
            const Window<4> window(grid, begin + t, x, inputs, block.zeros);
            for (int64_t c = 0; c < inputs; c += Vec::lanes) {
                Vec planes[kPlanes];
                transform(window, c, planes);
                UNROLL for (int plane = 0; plane < kPlanes; ++plane)
                    store(block.transformed + plane * input_plane + t * inputs + c, planes[plane], Vec::lanes);
            }
        }
        for (int64_t panel = 0; panel < outputs / kPanel; ++panel) {
            for (int plane = 0; plane < kPlanes; ++plane) {
                const bfloat16* of_panel = weights + (plane * outputs / kPanel + panel) * inputs * kPanel;
                for (int t = 0; t < count; t += kTileRows)
                    multiply<kTileRows>(block.transformed + plane * input_plane + t * inputs, of_panel,
                                        block.products + plane * product_plane + t * kPanel, count - t);
            }
            for (int t = 0; t < count; ++t) store_tile(block.products + t * kPanel, begin + t, panel * kPanel);
        }
    }

    template <int Rows>
    void multiply(const bfloat16* rows, const bfloat16* panel, float* out, int count) const {
        if constexpr (Rows > 1) {
            if (count < Rows) return multiply<Rows - 1>(rows, panel, out, count);
        }
        Vec sum[Rows][kGradColumns];
        UNROLL for (int r = 0; r < Rows; ++r) {
            UNROLL for (int j = 0; j < kGradColumns; ++j) sum[r][j] = Vec::broadcast(0);
        }
        for (int64_t k = 0; k < inputs; k += 2, panel += 2 * kPanel) {
            __m512bh w[kGradColumns];
            UNROLL for (int j = 0; j < kGradColumns; ++j)
                w[j] = BFloat16Dot::weights<Vec>(panel + 2 * j * Vec::lanes);
            UNROLL for (int r = 0; r < Rows; ++r) {
                const __m512bh from = BFloat16Dot::broadcast<Vec>(rows + r * inputs + k);
                UNROLL for (int j = 0; j < kGradColumns; ++j)
                    sum[r][j] = BFloat16Dot::multiply_add(w[j], from, sum[r][j]);
            }
        }
        UNROLL for (int r = 0; r < Rows; ++r) {
            UNROLL for (int j = 0; j < kGradColumns; ++j)
                store(out + r * kPanel + j * Vec::lanes, sum[r][j], Vec::lanes);
        }
    }

    // A^T products A
    void store_tile(const float* products, int64_t tile, int64_t output) const {
        bfloat16* pixels[2][2];
        grid.window<2>(tile, y, outputs, [&](int64_t i, int64_t j, bfloat16* pixel) { pixels[i][j] = pixel; });
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
class ConvolutionGradient {
  public:
    ConvolutionGradient(const Convolution& problem, const void* x, const void* grad, float* weight)
        : grid(problem),
          inputs(problem.inputs),
          outputs(problem.outputs),
          chunk(round_up(smaller(round_up(grid.count, 2), kChunkBytes / (kPlanes * 2 * wider())), 2)),
          column_plane(inputs * chunk / 2 + kLine / static_cast<int64_t>(sizeof(int32_t))),
          row_plane(outputs * chunk / 2 + kLine / static_cast<int64_t>(sizeof(int32_t))),
          threads(problem.threads),
          x(static_cast<const bfloat16*>(x)),
          grad(static_cast<const bfloat16*>(grad)),
          weight(weight) {}

    int run() {
        Cutter sizes(nullptr);
        cut(sizes);
        Scratch scratch(sizes.used);
        if (!scratch) return kOutOfMemory;
        Cutter cutter(scratch.data());
        cut(cutter);
        memset(zeros, 0, static_cast<size_t>(wider()) * sizeof(bfloat16));
        memset(weight, 0, static_cast<size_t>(kPlanes * outputs * inputs) * sizeof(float));
        for (begin = 0; begin < grid.count; begin += chunk) {
            pairs = smaller(chunk, grid.count - begin + 1) / 2;
            parallel_for(
                threads, (pairs + kPairsOfTask - 1) / kPairsOfTask,
                [](void* self, int64_t item, int) { static_cast<ConvolutionGradient*>(self)->transform_pairs(item); },
                this);
            parallel_for(
                threads, kPlanes * outputs / kPanel,
                [](void* self, int64_t item, int) { static_cast<ConvolutionGradient*>(self)->multiply(item); }, this);
        }
        return kDone;
    }

  private:
    static constexpr int kPairsOfTask = 16; // of neighbouring tiles, which a thread transforms at a time

    const TileGrid grid;
    const int64_t inputs, outputs, chunk;  // chunk: tiles at a time, an even number
    const int64_t column_plane, row_plane; // pairs of values from one plane to the next
    const int threads;
    const bfloat16 *x, *grad;
    float* weight;                                     // [plane, output, input]
    int64_t begin = 0;                                 // of the tiles of this chunk
    int pairs = 0;                                     // of its tiles
    int32_t *columns = nullptr, *rows = nullptr;       // of x and of grad: [plane, panel, pair, channel of the panel]
    bfloat16* zeros = nullptr;

    int64_t wider() const { return inputs > outputs ? inputs : outputs; }

    void cut(Cutter& cutter) {
        columns = cutter.cut<int32_t>(kPlanes * column_plane);
        rows = cutter.cut<int32_t>(kPlanes * row_plane);
        zeros = cutter.cut<bfloat16>(wider());
    }

    void transform_pairs(int64_t item) const {
        const int end = smaller((item + 1) * kPairsOfTask, pairs);
        for (int pair = static_cast<int>(item) * kPairsOfTask; pair < end; ++pair) {
            transform_pair<4>(pair, x, inputs, columns, column_plane);
            transform_pair<2>(pair, grad, outputs, rows, row_plane);
        }
    }

    template <int Side>
    void transform_pair(int pair, const bfloat16* image, int64_t channels, int32_t* out, int64_t plane_size) const {
        const int64_t tile = begin + 2 * pair;
        const bool alone = tile + 1 == grid.count;
        const Window<Side> one(grid, tile, image, channels, zeros);
        const Window<Side> other = alone ? Window<Side>(zeros) : Window<Side>(grid, tile + 1, image, channels, zeros);
        for (int64_t c = 0; c < channels; c += Vec::lanes) {
            Vec low[kPlanes], high[kPlanes];
            transform(one, c, low);
            transform(other, c, high);
            int32_t* to = out + (c / kPanel * (chunk / 2) + pair) * kPanel + c % kPanel;
            UNROLL for (int plane = 0; plane < kPlanes; ++plane) {
                const __m512i first = _mm512_cvtepu16_epi32(to_bfloat16(low[plane].v));
                const __m512i second = _mm512_cvtepu16_epi32(to_bfloat16(high[plane].v));
                _mm512_store_si512(to + plane * plane_size,
                                   _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
            }
        }
    }

    void multiply(int64_t item) const {
        const int64_t panels = outputs / kPanel, plane = item / panels, panel = item % panels; // neighbours share columns
        const int32_t* of_rows = rows + plane * row_plane + panel * kPanel * (chunk / 2);
        float* out = weight + (plane * outputs + panel * kPanel) * inputs;
        for (int64_t c = 0; c < inputs; c += kPanel) {
            const int32_t* of_columns = columns + plane * column_plane + c * (chunk / 2);
            for (int o = 0; o < kPanel; o += kGradRows)
                add_products<kGradColumns, kGradRows>(out + o * inputs + c, inputs, kPanel - o, pairs, of_columns,
                                                      of_rows + o, kPanel);
        }
    }
};

inline void pack_convolution(const Convolution& problem, bool backward, const float* weight, void* packed) {
    WeightTransform(problem, backward, weight, static_cast<bfloat16*>(packed)).run();
}

inline int convolve(const Convolution& problem, const void* packed, const void* x, void* y) {
    return Convolve(problem, packed, x, y).run();
}

inline int convolution_gradient(const Convolution& problem, const void* x, const void* grad, float* weight) {
    return ConvolutionGradient(problem, x, grad, weight).run();
}

} // namespace
