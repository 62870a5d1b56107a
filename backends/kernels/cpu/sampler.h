// The contract between sampler_ops.h (torch, threads) and sampler.cpp (kernels, no torch).
#pragma once

#include <cstdint>

namespace inlay {

// How one row is sampled; see runtime/draws.py, whose draw_row this is.
struct DrawArgs {
  const void* logits;  // [size] of float32, bfloat16 or float16, by element size and is_half
  int64_t size;
  bool is_wide, is_half, is_greedy;
  int64_t key, top_k;  // top_k: 0 is off
  float temperature, log_min_p;
  double top_p;
};

struct Drawn {
  int64_t token;
  float peak;  // the largest logit; NaN where any of the row is
};

struct SamplerKernels {
  int64_t (*scratch_floats)(int64_t size);
  Drawn (*draw)(const DrawArgs&, float* scratch);
};

namespace portable {
extern const SamplerKernels sampler_kernels;
}
namespace avx2 {
extern const SamplerKernels sampler_kernels;
}
namespace avx512 {
extern const SamplerKernels sampler_kernels;
}

}  // namespace inlay
