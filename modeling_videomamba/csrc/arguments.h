// What the Python side (selective_scan_cpu.py, matrix_product_cpu.py) passes; both must list the same fields.
#pragma once

#include <cstdint>

constexpr int64_t kVersion = 8;  // to be raised with every change of what is passed

extern "C" {

enum VideoMambaDtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A tensor (batch, length, width) in the dtype of the call whose last dimension is contiguous; strides count entries.
// Absent tensors have no data.
struct VideoMambaSequence {
    void* data;
    int64_t batch_stride, row_stride;
};

struct VideoMambaScan {
    int64_t batch, length, channels, state, rank, threads;
    int32_t dtype, reverse;
    VideoMambaSequence x, dt, B, C, z, add;
    const float* dt_proj;          // (channels, rank): dt is what it makes of (batch, length, rank); null without rank
    const float *A, *D, *dt_bias;  // (channels, state), (channels,), (channels,) or null
    float* h;                      // (batch, state, channels) or null: the state before the first step, then after the last
    float* checkpoints;            // (chunks, batch, state, channels) or null: the states before each chunk of kChunk steps
    // Outputs; `ungated` is y before the gate, for the backward pass, which can compute y anew from it.
    VideoMambaSequence y, ungated;
};

struct VideoMambaScanGradients {
    // That of y is an input, that of dt absent if there is a rank. That of `add`, with a gate, may be in the place of y's.
    VideoMambaSequence y, x, dt, z, add;
    float *A, *D, *dt_bias, *dt_proj;     // of their shapes, without gaps
    float* projected;                     // (batch, length, rank + 2 * state): of what `dt_proj` makes dt of, of B and of C
    // Weight (channels, width) and bias of the convolution that makes the x of the scan of what is passed as x, or null. The
    // gradient of x is that of what it makes.
    const float *conv_weight, *conv_bias;
    int64_t conv_width;
};

struct VideoMambaConvolution {
    int64_t batch, length, channels, width, threads;
    int32_t dtype, reverse;
    VideoMambaSequence x, context;  // the `width - 1` steps before x, or after it if `reverse`; zeros where absent
    const float *weight, *bias;     // (channels, width), (channels,) or null
    VideoMambaSequence y;
};

struct VideoMambaConvolutionGradients {
    VideoMambaSequence y, x, add;  // that of y is an input; `add` is added to that of x, and may be in its place
    float *weight, *bias;          // of their shapes, without gaps
    // A linear layer that y goes through too: its weight (outputs, channels), or null, and what is to be its gradient; and
    // that of what it makes, (batch, length, outputs).
    int64_t outputs;
    const float *x_proj, *projected;
    float* x_proj_gradient;
};

// y = x / sqrt(mean(x^2) + eps) * weight, row by row; x is float32, y has the dtype of the call.
struct VideoMambaNorm {
    int64_t batch, length, width, threads;
    int32_t dtype;
    float eps;
    VideoMambaSequence x;
    const float* weight;  // (width,)
    VideoMambaSequence y;
};

// That of `weight` comes in parts (threads, width), zero before the call, which the caller adds up; that of y is an input.
// `add`, float32 or absent, is added to that of x.
struct VideoMambaNormGradients {
    VideoMambaSequence y, x, add;
    float* weight;
};

// y = x + z; x and y are float32, z has the dtype of the call.
struct VideoMambaSum {
    int64_t batch, length, width, threads;
    int32_t dtype;
    VideoMambaSequence x, z, y;
};

struct VideoMambaMatrix {
    const float* data;
    int64_t row_stride, column_stride;  // one of them is 1
};

// c (rows, columns) = a (rows, inner) times b (inner, columns), all float32.
struct VideoMambaMatrixProduct {
    int64_t rows, inner, columns, threads;
    VideoMambaMatrix a, b;
    uint16_t* packed;  // b as the matrix units take it, aligned to 64 bytes, or null
    float* c;
    int64_t c_stride;  // between rows, whose entries have no gaps
};

}  // extern "C"
