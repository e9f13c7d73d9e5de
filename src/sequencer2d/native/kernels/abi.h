// What Python and the kernels say to each other: plain pointers and numbers, so that no version of torch matters.
//
// Shapes: B batch, H rows, W columns, C channels, D hidden units per direction, N = B*H*W tokens, R directions in all:
// first those that run along columns, then those along rows; forward comes before reverse. Tensors are contiguous;
// "value" is float or bfloat16, by `type`; "kept value" is float or float16.
#pragma once

#include <stdint.h>

#define SEQUENCER2D_ABI 9 // one more with every change of this file

enum ValueType { kFloat32 = 0, kBFloat16 = 1 };

enum Status { kDone = 0, kOutOfMemory = 1, kNoSuchKernel = 2 };

struct Problem {
    int64_t batch, height, width, hidden;
    int64_t channels;             // of the tokens that the forward pass projects; 0: it gets projected ones
    int32_t vertical, horizontal; // directions of each axis: 0, 1 or 2
    int32_t type;                 // of the values
    int32_t threads;              // at most so many
};

struct ForwardTensors {
    const void* packed; // weights, as `pack` for the forward pass left them
    const void* x;      // [N, C] values, and
    const void* bias;   // [R, 4, D] values; or neither
    void* gates;        // [N, R, 4, D], in torch's order i f g o; in, where there is no x: values, projected with bias;
                        // out, where they are kept: kept values, after the activations; may be null with x
    void* cells;        // [N, R, D] kept values, out: cell states; null where they and the gates are not kept
    void* y;            // [N, R, D] values, out: hidden states
};

struct BackwardTensors {
    const void* packed;    // weights, as `pack` for the backward pass left them
    const void* gates;     // [N, R, 4, D] kept values, after the activations
    const void* cells;     // [N, R, D] kept values
    const void* y;         // [N, R, D] values
    const void* grad_y;    // [N, R, D] values
    void* grad_gates;      // [N, R, 4, D] values, out: gradient of the gates before the activations
    void* previous_hidden; // [R, N, D] values, out: the hidden state that each step started from
    float* grad_bias;      // [R, 4, D], out: sum of grad_gates over the tokens
};

// The residual stream of a block and the layer norm that reads it: sum = x + scale * branch, normed = norm(sum).
struct NormProblem {
    int64_t tokens, channels;
    int64_t tokens_per_scale; // tokens of one image
    int32_t residual_type;    // of x and sum; all other values are of
    int32_t type;             //
    int32_t threads;          // at most so many
    float epsilon;
};

struct NormForwardTensors { // [N, C] unless said otherwise
    const void* x;          // residual values
    const void* branch;     // values, or null: then sum is x and not written
    const float* scale;     // [images], or null for 1
    const float* weight;    // [C]
    const float* bias;      // [C]
    void* sum;              // residual values, out
    void* normed;           // values, out
    float* statistics;      // [N, 2], out: mean and 1 / standard deviation; or null
};

struct NormBackwardTensors {
    const void* sum;         // residual values
    const float* statistics; // [N, 2]
    const float* weight;     // [C]
    const float* scale;      // [images], or null for 1
    const void* grad_normed; // values
    const void* grad_sum;    // residual values, or null for 0
    void* grad_x;            // residual values, out
    void* grad_branch;       // values, out; or null
    float* grad_weight;      // [C], out
    float* grad_bias;        // [C], out
};

// Batch norm in training and GELU of it: y = gelu(norm(x)), of N pixels, channels-last.
struct BatchNormProblem {
    int64_t pixels, channels;
    int32_t type;    // of the values
    int32_t threads; // at most so many
    float epsilon;
};

struct BatchNormForwardTensors {
    const void* x;       // [N, C] values
    const float* weight; // [C]
    const float* bias;   // [C]
    void* y;             // [N, C] values, out
    float* statistics;   // [2, C], out: mean and variance
};

struct BatchNormBackwardTensors {
    const void* x;           // [N, C] values
    const float* weight;     // [C]
    const float* bias;       // [C]
    const float* statistics; // [2, C]
    const void* grad_y;      // [N, C] values
    void* grad_x;            // [N, C] values, out
    float* grad_weight;      // [C], out
    float* grad_bias;        // [C], out
};

// A linear layer on bytes: y = scale * (weights * x) + bias, x in 0 ... 255. The zero of x and its scale are in these.
struct Int8Linear {
    const int8_t* weights; // as `pack_int8` left them
    const float* scale;    // [outputs]
    const float* bias;     // [outputs]
    int64_t inputs, outputs;
};

// To bytes, channel by channel: round(scale * x + shift), within 0 and 255.
struct Int8Affine {
    const float *scale, *shift;
};

// gates = linear(norm(x)), of N tokens
struct Int8Project {
    int64_t tokens;
    int32_t threads;
    float eps;       // of the norm
    const float* x;  // [N, linear.inputs]
    Int8Affine norm; // of the normalised tokens
    Int8Linear linear;
    void* gates; // [N, linear.outputs] bfloat16, out
};

// x += fc(hidden);  x += fc2(gelu(fc1(norm(x)))), of N tokens
struct Int8Finish {
    int64_t tokens;
    int32_t threads;
    float eps;          // of the norm
    const void* hidden; // [N, fc.inputs] bfloat16: hidden states
    float* x;           // [N, fc.outputs], in and out
    Int8Affine states;  // of the hidden states
    Int8Linear fc;
    Int8Affine norm; // of the normalised tokens
    Int8Linear fc1;
    Int8Affine active; // of what GELU puts out
    Int8Linear fc2;
};

// Of a linear layer: weight = grad^T x and bias = sum of grad, over the tokens. The outputs are `groups` of equal size,
// each of which may have, beside x, inputs of its own: the directions of an LSTM layer and their hidden states.
struct WeightGradient {
    int64_t tokens, outputs, inputs;
    int64_t groups, own_inputs;    // 1 and 0 where no output has inputs of its own
    int64_t grad_stride, x_stride; // values from one token to the next
    const void* grad;              // [N, outputs] bfloat16
    const void* x;                 // [N, inputs] bfloat16
    const void* own;               // [groups, N, own_inputs] bfloat16
    float* weight;                 // [outputs, inputs], out
    float* own_weight;             // [outputs, own_inputs], out
    float* bias;                   // [outputs], out; or null
    int32_t threads;               // at most so many
};

// Of 3×3 weights, stride 1 and padding 1, without bias; images are channels-last.
struct Convolution {
    int64_t batch, height, width;
    int64_t inputs, outputs; // channels, multiples of 64
    int32_t type;            // of the values; bfloat16 only where the processor multiplies it
    int32_t threads;         // at most so many
};

// The largest of 2×2 pixels; images are channels-last.
struct Pooling {
    int64_t batch, height, width; // of the larger image, even
    int64_t channels;             // a multiple of 16
    int32_t type;                 // of the values
    int32_t threads;              // at most so many
};

// One instruction set's implementation.
struct Kernel {
    const char* name;
    bool (*runs_here)();                                                         // has this CPU the instructions?
    int64_t (*packed_bytes)(const Problem&, bool backward);                      //
    // w_ih: [R, 4*D, C] values, for the forward pass where C is not 0; w_hh: [R, 4*D, D] values
    void (*pack)(const Problem&, bool backward, const void* w_ih, const void* w_hh, void* packed);
    int (*forward)(const Problem&, const ForwardTensors&);
    int (*backward)(const Problem&, const BackwardTensors&);
    int (*norm_forward)(const NormProblem&, const NormForwardTensors&);
    int (*norm_backward)(const NormProblem&, const NormBackwardTensors&);
    // y = gelu(x); with grad_y also grad_x. y may be x; `count` values of one type.
    void (*gelu)(int type, int threads, int64_t count, const void* x, void* y, const void* grad_y, void* grad_x);
    int (*batch_norm_forward)(const BatchNormProblem&, const BatchNormForwardTensors&);
    int (*batch_norm_backward)(const BatchNormProblem&, const BatchNormBackwardTensors&);
    int64_t (*packed_int8_bytes)(int64_t inputs, int64_t outputs);                            //
    void (*pack_int8)(int64_t inputs, int64_t outputs, const int8_t* weights, int8_t* packed); // [outputs, inputs]
    int (*project)(const Int8Project&);
    int (*finish)(const Int8Finish&);
    // Null where a library does it better, as the following are.
    int (*weight_gradient)(const WeightGradient&);
    void (*pool)(const Pooling&, const void* x, void* y, uint8_t* chosen); // chosen, out: which pixel, 0 to 3
    void (*pool_gradient)(const Pooling&, const void* grad_y, const uint8_t* chosen, void* grad_x);
    // weight: [outputs, inputs, 3, 3]; packed: 16 * inputs * outputs values, for `convolve`, where `backward` with the
    // gradient of y in the place of x, and inputs and outputs exchanged
    int (*pack_convolution)(const Convolution&, bool backward, const float* weight, void* packed);
    int (*convolve)(const Convolution&, const void* packed, const void* x, void* y); // values
    // weight: [16, outputs, inputs], out: the gradient of the transformed weights; x and grad are values
    int (*convolution_gradient)(const Convolution&, const void* x, const void* grad, float* weight);
};
