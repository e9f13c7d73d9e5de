// Calls every kernel of the library named by the first argument, on memory of exactly the size that it may touch, and
// compares with the portable kernel. For builds with sanitizers: test_sanitized.py.
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <vector>

#include "abi.h"
#include "numbers.h"

constexpr int kFloat16 = -1; // the kept values where values are bfloat16

template <class Function>
Function* symbol(void* library, const char* name) {
    void* found = dlsym(library, name);
    if (!found) std::printf("no %s\n", name), std::exit(1);
    return reinterpret_cast<Function*>(found);
}

// At the start of a cache line, as torch's tensors are.
template <class T>
struct Lines {
    using value_type = T;
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
    void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
    bool operator==(const Lines&) const { return true; }
    bool operator!=(const Lines&) const { return false; }
};

struct Memory { // of values of one type
    int type;
    std::vector<char, Lines<char>> bytes;
    Memory(int type, int64_t count) : type(type), bytes(static_cast<size_t>(count * (type == kFloat32 ? 4 : 2))) {}
    void set(size_t i, float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        if (type == kFloat32) return void(std::memcpy(&bytes[4 * i], &x, 4));
        const uint16_t upper = static_cast<uint16_t>(bits >> 16);
        std::memcpy(&bytes[2 * i], &upper, 2);
    }
    float get(size_t i) const {
        float x;
        uint32_t bits = 0;
        uint16_t upper;
        if (type == kFloat32) return std::memcpy(&x, &bytes[4 * i], 4), x;
        std::memcpy(&upper, &bytes[2 * i], 2);
        if (type == kFloat16) return to_float(float16{upper});
        bits = static_cast<uint32_t>(upper) << 16;
        return std::memcpy(&x, &bits, 4), x;
    }
    size_t count() const { return bytes.size() / (type == kFloat32 ? 4 : 2); }
    void fill(float scale, unsigned seed) {
        std::mt19937 random(seed);
        for (size_t i = 0; i < count(); ++i) set(i, scale * (static_cast<float>(random() % 2001) / 1000.0f - 1));
    }
};

static int failures = 0;

static void compare(const char* what, const char* kernel, const Memory& ours, const Memory& theirs, float tolerance) {
    for (size_t i = 0; i < ours.count(); ++i) {
        const float a = ours.get(i), b = theirs.get(i);
        if (!(std::fabs(a - b) <= tolerance * (1 + std::fabs(b)))) {
            std::printf("%s of %s: %g instead of %g at %zu\n", what, kernel, a, b, i);
            ++failures;
            return;
        }
    }
}

static void block_kernels(void* library, int kernel, const char* name) {
    auto* norm_forward = symbol<int(int, const NormProblem*, const NormForwardTensors*)>(library, "sequencer2d_norm_forward");
    auto* norm_backward =
        symbol<int(int, const NormProblem*, const NormBackwardTensors*)>(library, "sequencer2d_norm_backward");
    auto* gelu = symbol<int(int, int, int, int64_t, const void*, void*, const void*, void*)>(library, "sequencer2d_gelu");
    auto* weight_gradient = symbol<int(int, const WeightGradient*)>(library, "sequencer2d_weight_gradient");
    const auto floats = [](Memory& memory) { return reinterpret_cast<float*>(memory.bytes.data()); };
    const int64_t shapes[][3] = {{1, 1, 1}, {3, 5, 7}, {2, 150, 16}, {1, 129, 33}, {4, 2, 200}}; // images, tokens, channels
    for (const auto& s : shapes)
        for (const int residual : {kFloat32, kBFloat16})
            for (const int type : {kFloat32, kBFloat16}) {
                if (residual == kBFloat16 && type == kFloat32) continue;
                const int64_t tokens = s[0] * s[1], channels = s[2], count = tokens * channels;
                const NormProblem problem{tokens, channels, s[1], residual, type, 2, 1e-2f};
                const float tolerance = type == kFloat32 ? 1e-4f : 5e-2f;
                std::vector<Memory> first;
                for (const int k : {0, kernel}) {
                    Memory x(residual, count), branch(type, count), scale(kFloat32, s[0]), weight(kFloat32, channels);
                    x.fill(1, 1), branch.fill(1, 2), scale.fill(1, 3), weight.fill(1, 4);
                    Memory sum(residual, count), normed(type, count), only(type, count), statistics(kFloat32, 2 * tokens);
                    const NormForwardTensors in{x.bytes.data(),   branch.bytes.data(), floats(scale),        floats(weight),
                                                floats(weight),   sum.bytes.data(),    normed.bytes.data(), floats(statistics)};
                    const NormForwardTensors alone{sum.bytes.data(), nullptr, nullptr, floats(weight), floats(weight),
                                                   nullptr, only.bytes.data(), nullptr};
                    int status = norm_forward(k, &problem, &in);
                    status |= norm_forward(k, &problem, &alone);
                    Memory grad_x(residual, count), grad_branch(type, count), grad_weight(kFloat32, channels), grad_bias(kFloat32, channels);
                    const NormBackwardTensors back{sum.bytes.data(), floats(statistics), floats(weight), floats(scale),
                                                   branch.bytes.data(), x.bytes.data(), grad_x.bytes.data(),
                                                   grad_branch.bytes.data(), floats(grad_weight), floats(grad_bias)};
                    status |= norm_backward(k, &problem, &back);
                    Memory after(type, count), hidden(type, count), grad_hidden(type, count);
                    status |= gelu(k, type, 2, count, branch.bytes.data(), after.bytes.data(), nullptr, nullptr);
                    status |= gelu(k, type, 2, count, branch.bytes.data(), hidden.bytes.data(), normed.bytes.data(), grad_hidden.bytes.data());
                    if (type == kBFloat16) {
                        Memory product(kFloat32, channels * channels), column(kFloat32, channels);
                        Memory own(kBFloat16, count), of_own(kFloat32, channels); // every output has an input more, and no bias
                        own.fill(1, 5);
                        const WeightGradient gradient{tokens, channels, channels, 1, 0, channels, channels,
                                                      branch.bytes.data(), normed.bytes.data(), nullptr, floats(product),
                                                      nullptr, floats(column), 2};
                        const WeightGradient with_own{tokens, channels, channels, channels, 1, channels, channels,
                                                      branch.bytes.data(), normed.bytes.data(), own.bytes.data(),
                                                      floats(product), floats(of_own), nullptr, 2};
                        weight_gradient(k, &with_own);
                        weight_gradient(k, &gradient); // kernels that have none say so
                    }
                    if (status) std::printf("%s: status %d\n", name, status), ++failures;
                    if (first.empty()) first = {sum, normed, only, grad_x, grad_branch, grad_weight, grad_bias, after, grad_hidden};
                    const Memory* ours[] = {&sum, &normed, &only, &grad_x, &grad_branch, &grad_weight, &grad_bias, &after, &grad_hidden};
                    const char* const what[] = {"sum", "norm", "norm alone", "gradient of x", "gradient of the branch",
                                                "gradient of weights", "gradient of biases", "gelu", "gradient of gelu"};
                    for (size_t i = 0; i < first.size(); ++i) compare(what[i], name, *ours[i], first[i], tolerance);
                    compare("norm without a branch", name, only, normed, tolerance);
                    compare("gelu with its gradient", name, hidden, after, tolerance);
                }
            }
}

// Batch norm with GELU, against loops over the definition in doubles.
static void batch_norm_kernels(void* library, int kernel, const char* name, int type) {
    auto* forward = symbol<int(int, const BatchNormProblem*, const BatchNormForwardTensors*)>(
        library, "sequencer2d_batch_norm_forward");
    auto* backward = symbol<int(int, const BatchNormProblem*, const BatchNormBackwardTensors*)>(
        library, "sequencer2d_batch_norm_backward");
    const int64_t shapes[][2] = {{2, 1}, {3, 5}, {700, 64}, {1500, 33}, {2, 33000}}; // pixels, channels
    for (const auto& s : shapes)
        for (const int threads : {1, 3}) {
            const int64_t N = s[0], C = s[1];
            const BatchNormProblem problem{N, C, type, threads, 1e-2f};
            Memory x(type, N * C), grad_y(type, N * C), y(type, N * C), grad_x(type, N * C), statistics(kFloat32, 2 * C);
            Memory weight(kFloat32, C), bias(kFloat32, C), grad_weight(kFloat32, C), grad_bias(kFloat32, C);
            x.fill(1, 1), grad_y.fill(1, 2), weight.fill(1, 3), bias.fill(1, 4);
            const auto floats = [](Memory& memory) { return reinterpret_cast<float*>(memory.bytes.data()); };
            const BatchNormForwardTensors in{x.bytes.data(), floats(weight), floats(bias), y.bytes.data(), floats(statistics)};
            const BatchNormBackwardTensors back{x.bytes.data(),      floats(weight),      floats(bias),
                                                floats(statistics),  grad_y.bytes.data(), grad_x.bytes.data(),
                                                floats(grad_weight), floats(grad_bias)};
            const int status = forward(kernel, &problem, &in) | backward(kernel, &problem, &back);
            if (status) std::printf("batch norm of %s: status %d\n", name, status), ++failures;
            Memory true_y(kFloat32, N * C), true_x(kFloat32, N * C), true_weight(kFloat32, C), true_bias(kFloat32, C);
            const double pixels = static_cast<double>(N);
            for (int64_t c = 0; c < C; ++c) {
                double mean = 0, variance = 0, sum_g = 0, sum_gn = 0;
                const auto at = [&](int64_t pixel) { return size_t(pixel * C + c); };
                for (int64_t i = 0; i < N; ++i) mean += x.get(at(i)) / pixels;
                for (int64_t i = 0; i < N; ++i) variance += (x.get(at(i)) - mean) * (x.get(at(i)) - mean) / pixels;
                const double w = weight.get(size_t(c)), inverse = 1 / std::sqrt(variance + 1e-2);
                const auto normed = [&](int64_t i) { return (x.get(at(i)) - mean) * inverse; };
                const auto gradient = [&](int64_t i) {
                    const double v = normed(i) * w + bias.get(size_t(c)), area = std::erfc(-v * std::sqrt(0.5)) / 2;
                    true_y.set(at(i), static_cast<float>(v * area));
                    return grad_y.get(at(i)) * (area + v * std::exp(-v * v / 2) * 0.3989422804014327);
                };
                for (int64_t i = 0; i < N; ++i) sum_g += gradient(i), sum_gn += gradient(i) * normed(i);
                for (int64_t i = 0; i < N; ++i)
                    true_x.set(at(i), static_cast<float>((gradient(i) - sum_g / pixels - normed(i) * sum_gn / pixels) * w * inverse));
                true_weight.set(size_t(c), static_cast<float>(sum_gn)), true_bias.set(size_t(c), static_cast<float>(sum_g));
            }
            const float tolerance = type == kFloat32 ? 2e-5f : 2e-2f;
            compare("batch norm", name, y, true_y, tolerance);
            compare("gradient of batch norm", name, grad_x, true_x, tolerance);
            compare("gradient of its weight", name, grad_weight, true_weight, tolerance);
            compare("gradient of its bias", name, grad_bias, true_bias, tolerance);
        }
}

// Convolutions of 3×3, their gradients, and pooling, against loops over their definitions.
static void convolution_kernels(void* library, int kernel, const char* name, int type) {
    auto* pack = symbol<int(int, const Convolution*, int, const float*, void*)>(library, "sequencer2d_pack_convolution");
    auto* convolve = symbol<int(int, const Convolution*, const void*, const void*, void*)>(library, "sequencer2d_convolve");
    auto* gradient =
        symbol<int(int, const Convolution*, const void*, const void*, float*)>(library, "sequencer2d_convolution_gradient");
    auto* pool = symbol<int(int, const Pooling*, const void*, void*, uint8_t*)>(library, "sequencer2d_pool");
    auto* pool_gradient =
        symbol<int(int, const Pooling*, const void*, const uint8_t*, void*)>(library, "sequencer2d_pool_gradient");
    const int64_t shapes[][5] = {// images, rows, columns, channels in and out
                                 {0, 2, 2, 64, 64}, {1, 1, 1, 64, 64},   {1, 2, 3, 64, 128},
                                 {3, 5, 4, 128, 64}, {2, 8, 14, 192, 64}, {1, 46, 46, 256, 64}};
    for (const auto& s : shapes)
        for (const int threads : {1, 3}) {
            const int64_t B = s[0], H = s[1], W = s[2], C = s[3], K = s[4];
            const Convolution problem{B, H, W, C, K, type, threads}, back{B, H, W, K, C, type, threads};
            Memory x(type, B * H * W * C), y(type, B * H * W * K), grad_y(type, B * H * W * K);
            Memory grad_x(type, B * H * W * C), weight(kFloat32, K * C * 9), transformed(kFloat32, 16 * K * C);
            Memory packed(type, 16 * K * C), packed_back(type, 16 * K * C);
            x.fill(1, 1), grad_y.fill(1, 2), weight.fill(0.1f, 3);
            const auto* w = reinterpret_cast<const float*>(weight.bytes.data());
            int status = pack(kernel, &problem, 0, w, packed.bytes.data());
            if (status == kNoSuchKernel) return; // kernels that have none say so
            status |= pack(kernel, &problem, 1, w, packed_back.bytes.data());
            status |= convolve(kernel, &problem, packed.bytes.data(), x.bytes.data(), y.bytes.data());
            status |= convolve(kernel, &back, packed_back.bytes.data(), grad_y.bytes.data(), grad_x.bytes.data());
            status |= gradient(kernel, &problem, x.bytes.data(), grad_y.bytes.data(),
                               reinterpret_cast<float*>(transformed.bytes.data()));
            if (status) std::printf("convolution of %s: status %d\n", name, status), ++failures;
            double error[3] = {}, size[3] = {};
            const auto count = [&](int what, double ours, double truth) {
                error[what] += (ours - truth) * (ours - truth), size[what] += truth * truth;
            };
            // sum over the neighbours of pixels of an image: from(neighbour, tap)
            const auto around = [&](int64_t pixel, const auto& from) {
                const int64_t row = pixel / W % H, column = pixel % W;
                for (int tap = 0; tap < 9; ++tap) {
                    const int64_t i = row + tap / 3 - 1, j = column + tap % 3 - 1;
                    if (i >= 0 && i < H && j >= 0 && j < W) from(pixel + (tap / 3 - 1) * W + tap % 3 - 1, tap);
                }
            };
            for (int64_t pixel = 0; pixel < B * H * W; pixel += 1 + B * H * W / 40) { // some of them, of some channels
                for (int64_t k = pixel % 5; k < K; k += 17) {
                    double sum = 0;
                    around(pixel, [&](int64_t other, int tap) {
                        for (int64_t c = 0; c < C; ++c) sum += x.get(size_t(other * C + c)) * w[(k * C + c) * 9 + tap];
                    });
                    count(0, y.get(size_t(pixel * K + k)), sum);
                }
                for (int64_t c = pixel % 5; c < C; c += 17) {
                    double sum = 0;
                    around(pixel, [&](int64_t other, int tap) {
                        for (int64_t k = 0; k < K; ++k)
                            sum += grad_y.get(size_t(other * K + k)) * w[(k * C + c) * 9 + 8 - tap];
                    });
                    count(1, grad_x.get(size_t(pixel * C + c)), sum);
                }
            }
            const double G[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
            for (int64_t pair = 3; pair < K * C; pair += 1 + K * C / 50)
                for (const int tap : {0, 4, 5}) {
                    double ours = 0, truth = 0;
                    for (int plane = 0; plane < 16; ++plane)
                        ours += G[plane / 4][tap / 3] * G[plane % 4][tap % 3] * transformed.get(size_t(plane * K * C + pair));
                    for (int64_t pixel = 0; pixel < B * H * W; ++pixel)
                        around(pixel, [&](int64_t other, int of) {
                            if (of == tap)
                                truth += grad_y.get(size_t(pixel * K + pair / C)) * x.get(size_t(other * C + pair % C));
                        });
                    count(2, ours, truth);
                }
            const char* const what[] = {"convolution", "its gradient of x", "its gradient of weights"};
            for (int i = 0; i < 3; ++i)
                if (!(std::sqrt(error[i]) <= (type == kFloat32 ? 1e-5 : 0.01) * std::sqrt(size[i])))
                    std::printf("%s of %s: error %g of %g\n", what[i], name, std::sqrt(error[i]), std::sqrt(size[i])), ++failures;
            if (H % 2 || W % 2) continue;
            const Pooling pooling{B, H, W, C, type, threads};
            Memory pooled(type, B * H * W / 4 * C), spread(type, B * H * W * C);
            std::vector<uint8_t> chosen(size_t(B * H * W / 4 * C));
            status = pool(kernel, &pooling, x.bytes.data(), pooled.bytes.data(), chosen.data());
            status |= pool_gradient(kernel, &pooling, pooled.bytes.data(), chosen.data(), spread.bytes.data());
            if (status == kNoSuchKernel) continue;
            if (status) std::printf("pooling of %s: status %d\n", name, status), ++failures;
            for (int64_t pixel = 0; pixel < B * H * W; ++pixel) // what was chosen is the largest, and all else is 0
                for (int64_t c = 0; c < C; ++c) {
                    const int64_t small = pixel / W / 2 * (W / 2) + pixel % W / 2;
                    const float largest = pooled.get(size_t(small * C + c)), back_there = spread.get(size_t(pixel * C + c));
                    const float here = x.get(size_t(pixel * C + c));
                    if (here > largest || (back_there != 0 && (back_there != largest || here != largest)))
                        return void((std::printf("pooling of %s: %g of %g\n", name, back_there, largest), ++failures));
                }
        }
}

using Bytes = std::vector<int8_t>;
using Floats = std::vector<float>;

static Floats some(int64_t count, float scale, float shift, unsigned seed) {
    std::mt19937 random(seed);
    Floats values(static_cast<size_t>(count));
    for (float& value : values) value = shift + scale * (static_cast<float>(random() % 2001) / 1000.0f - 1);
    return values;
}

// A linear layer for one kernel, in memory of its own.
struct Layer {
    Bytes weights, packed;
    Floats scale, bias;
    int64_t inputs, outputs;
    Layer(int64_t inputs, int64_t outputs, unsigned seed)
        : weights(static_cast<size_t>(inputs * outputs)), scale(some(outputs, 1e-4f, 3e-4f, seed)),
          bias(some(outputs, 1, 0, seed)), inputs(inputs), outputs(outputs) {
        std::mt19937 random(seed);
        for (int8_t& weight : weights) weight = static_cast<int8_t>(random() % 255);
    }
    Int8Linear view() const { return {packed.data(), scale.data(), bias.data(), inputs, outputs}; }
};

static void check_int8(void* library, const char* (*name)(int), int (*runs_here)(int)) {
    auto* bytes = symbol<int64_t(int, int64_t, int64_t)>(library, "sequencer2d_packed_int8_bytes");
    auto* pack = symbol<int(int, int64_t, int64_t, const int8_t*, int8_t*)>(library, "sequencer2d_pack_int8");
    auto* project = symbol<int(int, const Int8Project*)>(library, "sequencer2d_int8_project");
    auto* finish = symbol<int(int, const Int8Finish*)>(library, "sequencer2d_int8_finish");
    const int64_t shapes[][4] = {// tokens, channels, hidden states, width of the MLP
                                 {0, 5, 3, 9},   {1, 1, 1, 1},     {7, 17, 20, 50},
                                 {97, 33, 5, 1}, {200, 64, 48, 96}, {95, 47, 49, 65}};
    for (const auto& s : shapes)
        for (const int threads : {1, 3}) {
            const int64_t N = s[0], C = s[1], D = s[2], wide = s[3];
            const Floats x = some(N * C, 3, 1, 1), scale = some(C + D + wide, 20, 50, 2);
            const Floats shift = some(C + D + wide, 20, 128, 3);
            Memory hidden(kBFloat16, N * D), first(kBFloat16, N * wide);
            hidden.fill(1, 4);
            Floats first_x;
            for (int k = 0; name(k); ++k) {
                if (!runs_here(k)) continue;
                Layer layers[] = {{C, wide, 5}, {D, C, 6}, {C, wide, 7}, {wide, C, 8}};
                int status = 0;
                for (Layer& layer : layers) {
                    layer.packed.resize(static_cast<size_t>(bytes(k, layer.inputs, layer.outputs)));
                    status |= pack(k, layer.inputs, layer.outputs, layer.weights.data(), layer.packed.data());
                }
                Memory gates(kBFloat16, N * wide);
                const Int8Affine norm{scale.data() + D + wide, shift.data() + D + wide}; // ends with its memory
                const Int8Project in{N, threads, 1e-6f, x.data(), norm, layers[0].view(), gates.bytes.data()};
                status |= project(k, &in);
                Floats y = x;
                const Int8Affine states{scale.data() + C + wide, shift.data() + C + wide};
                const Int8Affine active{scale.data() + C + D, shift.data() + C + D};
                const Int8Finish rest{N, threads, 1e-6f, hidden.bytes.data(), y.data(), states, layers[1].view(), norm,
                                      layers[2].view(), active, layers[3].view()};
                status |= finish(k, &rest);
                if (status) std::printf("int8 of %s: status %d\n", name(k), status), ++failures;
                if (first_x.empty()) first = gates, first_x = y;
                compare("int8 gates", name(k), gates, first, 5e-2f); // a level may be rounded the other way
                for (size_t i = 0; i < y.size(); ++i)
                    if (!(std::fabs(y[i] - first_x[i]) <= 0.3f * (1 + std::fabs(y[i])))) {
                        std::printf("int8 tokens of %s: %g instead of %g\n", name(k), y[i], first_x[i]), ++failures;
                        break;
                    }
            }
        }
}

int main(int, char** arguments) {
    void* library = dlopen(arguments[1], RTLD_NOW);
    if (!library) return std::printf("%s\n", dlerror()), 1;
    auto* name = symbol<const char*(int)>(library, "sequencer2d_kernel_name");
    auto* runs_here = symbol<int(int)>(library, "sequencer2d_kernel_runs_here");
    auto* packed_bytes = symbol<int64_t(int, const Problem*, int)>(library, "sequencer2d_packed_bytes");
    auto* pack = symbol<int(int, const Problem*, int, const void*, const void*, void*)>(library, "sequencer2d_pack");
    auto* forward = symbol<int(int, const Problem*, const ForwardTensors*)>(library, "sequencer2d_forward");
    auto* backward = symbol<int(int, const Problem*, const BackwardTensors*)>(library, "sequencer2d_backward");
    const int64_t shapes[][7] = {// B, H, W, D, C or 0 for projected tokens, directions along columns, along rows
                                 {1, 1, 1, 1, 1, 2, 2},   {2, 3, 5, 7, 0, 2, 2},    {3, 7, 4, 16, 32, 1, 1},
                                 {1, 9, 31, 17, 3, 2, 0}, {5, 6, 5, 24, 0, 0, 2},   {2, 4, 26, 49, 21, 2, 2},
                                 {0, 3, 3, 5, 4, 2, 2},   {1, 50, 3, 33, 17, 0, 1}, {1, 1, 1, 1, 0, 2, 2},
                                 {1, 3, 60, 5, 0, 0, 2}};
    for (const auto& s : shapes)
        for (const int type : {kFloat32, kBFloat16})
            for (const float scale : {1.0f, 1e4f})
                for (const int threads : {1, 3}) {
                    const Problem problem{s[0], s[1], s[2], s[3], s[4], int32_t(s[5]), int32_t(s[6]), type, threads};
                    const int64_t N = s[0] * s[1] * s[2], D = s[3], C = s[4], R = s[5] + s[6], values = N * R * D;
                    Memory tokens(type, N * C), start(type, C ? R * 4 * D : 0), w_ih(type, R * 4 * D * C);
                    Memory w(type, R * 4 * D * D), projected(type, 4 * values), grad_y(type, values);
                    tokens.fill(scale, 4), start.fill(1, 5), w_ih.fill(0.3f, 6);
                    const void *x = C ? tokens.bytes.data() : nullptr, *bias_in = C ? start.bytes.data() : nullptr;
                    w.fill(0.3f, 1), projected.fill(scale, 2), grad_y.fill(1, 3);
                    // sums of large inputs are rounded before an activation takes what is left of them
                    const float tolerance = type == kFloat32 ? 1e-4f + scale * 0x1p-23f : 5e-2f;
                    std::vector<Memory> first;
                    for (int k = 0; name(k); ++k) {
                        if (!runs_here(k)) continue;
                        std::vector<char> to_front(static_cast<size_t>(packed_bytes(k, &problem, 0)));
                        std::vector<char> to_back(static_cast<size_t>(packed_bytes(k, &problem, 1)));
                        const int kept_type = type == kFloat32 ? kFloat32 : kFloat16;
                        Memory gates = projected, unkept = projected, cells(kept_type, values), y(type, values);
                        Memory only(type, values), grad_gates(type, 4 * values), previous(type, values);
                        Memory bias(kFloat32, R * 4 * D);
                        int status = pack(k, &problem, 0, w_ih.bytes.data(), w.bytes.data(), to_front.data());
                        status |= pack(k, &problem, 1, nullptr, w.bytes.data(), to_back.data());
                        const ForwardTensors in{to_front.data(), x, bias_in, C ? nullptr : unkept.bytes.data(), nullptr,
                                                only.bytes.data()};
                        status |= forward(k, &problem, &in);
                        const ForwardTensors kept{to_front.data(), x, bias_in, gates.bytes.data(), cells.bytes.data(), y.bytes.data()};
                        status |= forward(k, &problem, &kept);
                        gates.type = kept_type;
                        const BackwardTensors back{to_back.data(),
                                                   gates.bytes.data(),
                                                   cells.bytes.data(),
                                                   y.bytes.data(),
                                                   grad_y.bytes.data(),
                                                   grad_gates.bytes.data(),
                                                   previous.bytes.data(),
                                                   reinterpret_cast<float*>(bias.bytes.data())};
                        status |= backward(k, &problem, &back);
                        if (status) std::printf("%s: status %d\n", name(k), status), ++failures;
                        if (first.empty()) first = {y, only, cells, grad_gates, previous, bias, gates};
                        compare("output", name(k), y, first[0], tolerance);
                        compare("output without gradients", name(k), only, y, tolerance);
                        compare("cells", name(k), cells, first[2], tolerance);
                        compare("gates", name(k), gates, first[6], tolerance);
                        compare("gradient of gates", name(k), grad_gates, first[3], tolerance);
                        compare("previous hidden states", name(k), previous, first[4], tolerance);
                        compare("gradient of the bias", name(k), bias, first[5], tolerance);
                    }
                }
    check_int8(library, name, runs_here);
    for (int k = 0; name(k); ++k)
        if (runs_here(k)) {
            block_kernels(library, k, name(k));
            for (const int type : {kFloat32, kBFloat16}) {
                batch_norm_kernels(library, k, name(k), type);
                convolution_kernels(library, k, name(k), type);
            }
            std::printf("%s ", name(k));
        }
    std::printf("%s\n", failures ? "differ" : "as they should be");
    return failures != 0;
}
