// The linear layers of a block in bytes, each together with what stands before and after it, tile by tile of tokens:
//   project:  gates = linear(norm(x))
//   finish:   x += fc(h);  x += fc2(gelu(fc1(norm(x))))
// The recurrence between them is forward.h's.
#pragma once

#include "byte_dot.h"
#include "tiles.h"

namespace {

constexpr int kTokens = 96; // of a tile; a multiple of every kByteRows

// x * Phi(x), to 5e-4, as it will be a byte: Phi - 1/2 is an odd polynomial up to where it is 1/2.
inline Vec gelu(Vec x) {
    const Vec t = clamp(x, -3.65f, 3.65f), square = t * t;
    Vec q = Vec::broadcast(-4.98202589e-7f);
    q = multiply_add(q, square, Vec::broadcast(2.71947566e-5f));
    q = multiply_add(q, square, Vec::broadcast(-6.21682369e-4f));
    q = multiply_add(q, square, Vec::broadcast(7.87424311e-3f));
    q = multiply_add(q, square, Vec::broadcast(-6.26545499e-2f));
    q = multiply_add(q, square, Vec::broadcast(0.396530386f));
    return x * multiply_add(q, t, Vec::broadcast(0.5f));
}

// Bytes of one tile, [tokens, columns]; rows and columns beyond are there, and columns are zero.
struct Bytes {
    uint8_t* data;
    int64_t stride;
};

inline int64_t byte_stride(int64_t columns) { return round_up(columns, 64); }

inline int64_t four_groups(int64_t inputs) { return (inputs + 3) / 4; }

// Weights [outputs, inputs] in the order of the product: [vector of outputs, four inputs, output, input].
inline int64_t packed_int8_bytes(int64_t inputs, int64_t outputs) {
    return round_up(outputs, Vec::lanes) * four_groups(inputs) * 4;
}

inline void pack_int8(int64_t inputs, int64_t outputs, const int8_t* w, int8_t* packed) {
    memset(packed, 0, static_cast<size_t>(packed_int8_bytes(inputs, outputs)));
    for (int64_t o = 0; o < outputs; ++o)
        for (int64_t i = 0; i < inputs; ++i) {
            const int64_t group = o / Vec::lanes * four_groups(inputs) + i / 4;
            packed[(group * Vec::lanes + o % Vec::lanes) * 4 + i % 4] = w[o * inputs + i];
        }
}

// A block of rows × columns of the product, whose values go to `out(row, column, values, count)` in floats.
template <int Columns, class Out>
__attribute__((always_inline)) inline void multiply_block(const Bytes& x, int row, const Int8Linear& linear,
                                                          int64_t column, int rows, const int last, const Out& out) {
    const int64_t depth = four_groups(linear.inputs), block = depth * Vec::lanes * 4;
    const int8_t* w = linear.weights + column / Vec::lanes * block;
    const uint8_t* from = x.data + row * x.stride;
    ByteSum sum[kByteRows][Columns];
    UNROLL for (int r = 0; r < kByteRows; ++r) {
        UNROLL for (int c = 0; c < Columns; ++c) sum[r][c] = no_bytes();
    }
    for (int64_t k = 0; k < depth; ++k) {
        typename ByteDot::Weights weights[Columns];
        UNROLL for (int c = 0; c < Columns; ++c)
            weights[c] = ByteDot::weights(w + c * block + k * Vec::lanes * 4);
        UNROLL for (int r = 0; r < kByteRows; ++r) {
            const typename ByteDot::Inputs four = ByteDot::broadcast(from + r * x.stride + k * 4);
            UNROLL for (int c = 0; c < Columns; ++c)
                sum[r][c] = ByteDot::multiply_add(four, weights[c], sum[r][c]);
        }
    }
    UNROLL for (int c = 0; c < Columns; ++c) {
        const int64_t at = column + c * Vec::lanes;
        const int count = c == Columns - 1 ? last : Vec::lanes;
        const Vec scale = load(linear.scale + at, count), bias = load(linear.bias + at, count);
        UNROLL for (int r = 0; r < kByteRows; ++r) {
            if (r < rows) out(row + r, at, multiply_add(to_floats(sum[r][c]), scale, bias), count);
        }
    }
}

template <int Columns, class Out>
inline void multiply_columns(const Bytes& x, int rows, const Int8Linear& linear, int64_t column, const Out& out) {
    const int64_t left = linear.outputs - column - (Columns - 1) * Vec::lanes;
    if (left <= 0) {
        if constexpr (Columns > 1) multiply_columns<Columns - 1>(x, rows, linear, column, out);
        return;
    }
    for (int row = 0; row < rows; row += kByteRows) {
        if (left >= Vec::lanes)
            multiply_block<Columns>(x, row, linear, column, rows - row, Vec::lanes, out);
        else
            multiply_block<Columns>(x, row, linear, column, rows - row, static_cast<int>(left), out);
    }
}

template <class Out>
inline void multiply(const Bytes& x, int rows, const Int8Linear& linear, const Out& out) {
    for (int64_t column = 0; column < linear.outputs; column += kByteColumns * Vec::lanes)
        multiply_columns<kByteColumns>(x, rows, linear, column, out);
}

// (x - mean) / sqrt(variance + eps) of each row, scaled and shifted to bytes.
template <class Value>
inline void normalize(const Value* x, int rows, int64_t C, float eps, const Int8Affine& affine, const Bytes& out) {
    const int64_t whole = C / Vec::lanes * Vec::lanes;
    for (int row = 0; row < rows; ++row, x += C) {
        Vec sums = Vec::broadcast(0);
        for (int64_t c = 0; c < whole; c += Vec::lanes) sums = sums + load(x + c, Vec::lanes);
        float sum = total(sums);
        for (int64_t c = whole; c < C; ++c) sum += to_float(x[c]);
        const float mean = sum / static_cast<float>(C);
        Vec squares = Vec::broadcast(0);
        for (int64_t c = 0; c < whole; c += Vec::lanes) {
            const Vec d = load(x + c, Vec::lanes) - Vec::broadcast(mean);
            squares = multiply_add(d, d, squares);
        }
        float square = total(squares);
        for (int64_t c = whole; c < C; ++c) square += (to_float(x[c]) - mean) * (to_float(x[c]) - mean);
        const float factor = 1 / __builtin_sqrtf(square / static_cast<float>(C) + eps);
        uint8_t* bytes = out.data + row * out.stride;
        for (int64_t c = 0; c < C; c += Vec::lanes) {
            const int count = smaller(Vec::lanes, C - c);
            const Vec normal = (load(x + c, count) - Vec::broadcast(mean)) * Vec::broadcast(factor);
            const Vec y = multiply_add(normal, load(affine.scale + c, count), load(affine.shift + c, count));
            store_bytes(bytes + c, y, count);
        }
    }
}

// Hidden states to bytes.
inline void quantize(const bfloat16* x, int rows, int64_t C, const Int8Affine& affine, const Bytes& out) {
    for (int row = 0; row < rows; ++row)
        for (int64_t c = 0; c < C; c += Vec::lanes) {
            const int count = smaller(Vec::lanes, C - c);
            const Vec y = multiply_add(load(x + row * C + c, count), load(affine.scale + c, count),
                                       load(affine.shift + c, count));
            store_bytes(out.data + row * out.stride + c, y, count);
        }
}

// Runs `body(first token, tokens, bytes)` for every tile, with memory for `columns` bytes a token.
template <class Body>
int for_tiles(int64_t tokens, int threads, int64_t columns, const Body& body) {
    struct Context {
        const Body& body;
        int64_t tokens, bytes;
        char* memory;
    };
    const int64_t bytes = kTokens * columns;
    Scratch scratch(bytes * threads);
    if (!scratch) return kOutOfMemory;
    memset(scratch.data(), 0, static_cast<size_t>(bytes * threads)); // what is beyond the channels is read, too
    Context context{body, tokens, bytes, scratch.data()};
    parallel_for(
        threads, (tokens + kTokens - 1) / kTokens,
        [](void* pointer, int64_t item, int thread) {
            const Context& c = *static_cast<Context*>(pointer);
            const int64_t begin = item * kTokens;
            c.body(begin, smaller(kTokens, c.tokens - begin),
                   reinterpret_cast<uint8_t*>(c.memory + thread * c.bytes));
        },
        &context);
    return kDone;
}

inline int project(const Int8Project& p) {
    const int64_t C = p.linear.inputs, M = p.linear.outputs, stride = byte_stride(C);
    auto* gates = static_cast<bfloat16*>(p.gates);
    return for_tiles(p.tokens, p.threads, stride, [&](int64_t begin, int rows, uint8_t* memory) {
        const Bytes normal{memory, stride};
        normalize(p.x + begin * C, rows, C, p.eps, p.norm, normal);
        multiply(normal, rows, p.linear, [&](int row, int64_t column, Vec y, int count) {
            store(gates + (begin + row) * M + column, y, count);
        });
    });
}

inline int finish(const Int8Finish& p) {
    const int64_t C = p.fc.outputs, mixed = p.fc.inputs, wide = p.fc1.outputs;
    const int64_t stride = byte_stride(mixed > C ? mixed : C), wide_stride = byte_stride(wide);
    const auto* hidden = static_cast<const bfloat16*>(p.hidden);
    return for_tiles(p.tokens, p.threads, stride + wide_stride, [&](int64_t begin, int rows, uint8_t* memory) {
        const Bytes narrow{memory, stride}, expanded{memory + kTokens * stride, wide_stride};
        float* x = p.x + begin * C;
        const auto add = [&](int row, int64_t column, Vec y, int count) {
            float* place = x + row * C + column;
            store(place, load(place, count) + y, count);
        };
        quantize(hidden + begin * mixed, rows, mixed, p.states, narrow);
        multiply(narrow, rows, p.fc, add);
        normalize(x, rows, C, p.eps, p.norm, narrow);
        multiply(narrow, rows, p.fc1, [&](int row, int64_t column, Vec y, int count) {
            const Vec scale = load(p.active.scale + column, count), shift = load(p.active.shift + column, count);
            store_bytes(expanded.data + row * wide_stride + column, multiply_add(gelu(y), scale, shift), count);
        });
        multiply(expanded, rows, p.fc2, add);
    });
}

} // namespace
