// Which instruction set's kernels run: the best that the CPU has, or what set_isa names.
#pragma once

#include "attention.h"
#include "experts.h"
#include "quantized.h"
#include "sampler.h"
#include "small_matmul.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

namespace inlay {
namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  const ExpertsKernels* experts;
  const QuantizedKernels* quantized;
  const ProductKernels* products;  // for what they take, or null
  const MatmulKernel* matmul;      // of bfloat16 weights, or null
  const SamplerKernels* sampler;
  bool supported;
};

// Best first.
const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> found;
#ifdef INLAY_X86
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool widest = wide && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    const bool dots = widest && __builtin_cpu_supports("avx512bf16") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
    const MatmulKernel* pairs =
        widest && __builtin_cpu_supports("avx512bf16") ? &avx512_dot::matmul_kernel : nullptr;
    found.push_back({"avx512_bf16", &avx512_bf16::kernels, &avx512::experts_kernels,
                     &avx512::quantized_kernels, &avx512_dot::product_kernels, pairs,
                     &avx512::sampler_kernels, dots});
    found.push_back({"avx512", &avx512::kernels, &avx512::experts_kernels,
                     &avx512::quantized_kernels, nullptr, pairs, &avx512::sampler_kernels, widest});
    found.push_back({"avx2", &avx2::kernels, &avx2::experts_kernels, &avx2::quantized_kernels,
                     &avx2::product_kernels, &avx2::matmul_kernel, &avx2::sampler_kernels, wide});
#endif
    found.push_back({"portable", &portable::kernels, &portable::experts_kernels,
                     &portable::quantized_kernels, nullptr, nullptr, &portable::sampler_kernels,
                     true});
    return found;
  }();
  return all;
}

const Isa* best_isa() {
  return &*std::find_if(isas().begin(), isas().end(), [](const Isa& i) { return i.supported; });
}

std::atomic<const Isa*> current_isa{nullptr};

const Isa* isa() {
  const Isa* chosen = current_isa.load(std::memory_order_relaxed);
  return chosen ? chosen : best_isa();
}

std::string get_isa() { return isa()->name; }

void set_isa(const std::string& name) {
  std::string allowed = "auto";
  for (const Isa& candidate : isas()) {
    if (!candidate.supported) continue;
    allowed += std::string(", ") + candidate.name;
    if (name == candidate.name) current_isa = &candidate;
  }
  if (name == "auto") current_isa = nullptr;
  TORCH_CHECK(name == "auto" || name == isa()->name, "inlay_cpu::set_isa: this CPU has ", allowed,
              "; got '", name, "'");
}

}  // namespace
}  // namespace inlay
