// Matrix products with bfloat16 weights, summed in float32.
//
// A weight [N, K] lies in blocks of 32 outputs, within a block in pairs of inputs:
// [N / 32][K / 2][32][2]. oneDNN packs like this too: on CPUs with AMX, where it serves all but the
// smallest batches, its memory is read here as it lies.
#pragma once

#include <cstdint>

namespace inlay {

constexpr int64_t kSmallMatmulBlock = 32;  // outputs in a block

struct SmallMatmul {
  const char* x;         // [rows, in_features], as the kernel takes it
  const uint16_t* w;     // packed as above
  const uint16_t* bias;  // [out_features] or null
  uint16_t* y;           // [rows, out_features], contiguous
  int64_t rows, in_features, out_features;
  int64_t x_stride;  // bytes from one row of x to the next
};

struct MatmulKernel {
  // Rows of x are float32, padded with a zero to whole pairs, and weights have any size, padded with
  // zeros to whole blocks and pairs. Else x is bfloat16 and sizes are whole.
  bool widened;
  // Outputs of the blocks [first, last) of these rows; float32 sums in the order of the inputs.
  void (*multiply)(const SmallMatmul&, int64_t first_row, int64_t last_row, int64_t first,
                   int64_t last);
};

namespace avx2 {
extern const MatmulKernel matmul_kernel;
}
namespace avx512_dot {  // of a CPU that has AVX512_BF16
extern const MatmulKernel matmul_kernel;
}

}  // namespace inlay
