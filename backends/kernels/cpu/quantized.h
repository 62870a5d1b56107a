// The contract between quantized_linear.h (torch, packing, threads) and quantized*.cpp (kernels, no
// torch): products with weights of 8 or 4 bits.
//
// A packed weight is blocks of 32 outputs; a block is tiles of 128 bytes, which hold 4 inputs (8
// where they have 4 bits) of its outputs, in the order that the widest kernels want:
//   kIntegers, kInt8  inputs together, [32 outputs][4 inputs]; kInt8 with 128 added: unsigned
//   kInt4             like kInt8, the first 4 inputs in the bytes' lower halves
//   kFloat8           pairs of inputs, as bfloat16 products take them: for each 4 outputs
//                     [2 pairs][4 outputs][2 inputs], so that widening half of 16 bytes gives a pair
#pragma once

#include "attention.h"

namespace inlay {

// kIntegers: int8 that is multiplied with int8 activations; the others are weight-only, and
// kFloat8 (e4m3) also serves e4m3 activations.
enum class Format : int { kIntegers, kInt8, kInt4, kFloat8 };

constexpr int64_t kCodeBlock = 32;
constexpr int64_t kTileBytes = 128;

static constexpr int64_t tile_inputs(Format format) { return format == Format::kInt4 ? 8 : 4; }

static inline int64_t block_bytes(Format format, int64_t in_features) {
  const int64_t tile = tile_inputs(format);
  return (in_features + tile - 1) / tile * kTileBytes;
}

// Where a tile has the number of this input and output: a byte, and how far to shift it.
struct Place {
  uint8_t byte, shift;
};

static constexpr Place place(Format format, int input, int output) {
  const int high = input / 4, k = input % 4, column = output % 16;
  const int pairs = output / 16 * 64 + column / 4 * 16 + k / 2 * 8 + column % 4 * 2 + k % 2;
  const int byte = format == Format::kFloat8 ? pairs : output * 4 + k;
  return {static_cast<uint8_t>(byte), static_cast<uint8_t>(high * 4)};
}

// y = sum over groups g of x_scale[row, g] * scale[g, n] * sum over k in g of x * (w - zero[g, n]),
// plus bias. kIntegers has one group, exact sums, and x - x_zero for x.
struct QuantizedProduct {
  Format format;
  const uint8_t* codes;
  const int32_t* column_sums;  // [out_features] of a kIntegers weight
  int64_t rows, in_features, out_features, group_size;
  const char* x;  // rows that `prepare` wrote, x_stride bytes from one to the next
  int64_t x_stride;
  const float* x_scale;  // or null: 1; strides in elements
  int64_t x_scale_row, x_scale_group;
  const int32_t* x_zero;  // or null: 0
  int64_t x_zero_row;
  DType scale_dtype, bias_dtype, y_dtype;
  const void* scale;   // [groups, out_features]
  const uint8_t* zero; // like scale, int8 for kInt8; or null: 0, and 8 for kInt4
  const void* bias;    // [out_features] or null
  char* y;             // [rows, out_features]
};

constexpr int64_t kMaxPartRows = 192;

// What one call computes: at most kMaxPartRows rows, some blocks.
struct Part {
  int64_t first_row, last_row, first_block, last_block;
};

struct Rows {
  DType dtype;
  const char* from;  // [rows, in_features], contiguous
  char* to;
  int64_t in_features, to_stride;
  int64_t group_size;  // of the weight's
};

struct ProductKernels {
  // Whether x of this dtype is taken, times groups of this size.
  bool (*takes)(Format, DType x, int64_t group_size, int64_t in_features);
  // Bytes of a row of x as multiply wants it.
  int64_t (*row_bytes)(Format, int64_t in_features, int64_t group_size);
  // Rows [first, last) of x into that form.
  void (*prepare)(Format, const Rows&, int64_t first, int64_t last);
  // A row's result depends on nothing but that row and the weight, so not on the part it is in.
  void (*multiply)(const QuantizedProduct&, const Part&);
};

// Rows [first, last) to int8 or e4m3 and a scale each, as passes/quantized_ops.py's quantizers.
using Quantize = void (*)(DType to, const Rows&, float* scales, int64_t first, int64_t last);

struct QuantizedKernels {
  Quantize quantize;
  ProductKernels products;  // take everything
};

namespace portable {
extern const QuantizedKernels quantized_kernels;
}
namespace avx2 {
extern const QuantizedKernels quantized_kernels;
extern const ProductKernels product_kernels;
}
namespace avx512 {
extern const QuantizedKernels quantized_kernels;
}
namespace avx512_dot {  // of a CPU that also has VNNI, BF16 and VBMI
extern const ProductKernels product_kernels;
}

}  // namespace inlay
