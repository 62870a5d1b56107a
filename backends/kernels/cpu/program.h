// A program's steps as one call: backends/model.py's loop without an interpreter, whose code and data
// have left the caches each time that a segment has read its weights.
#pragma once

#include "linear.h"
#include "paged_attention.h"

#include <ATen/ops/unbind.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>

#include <memory>
#include <string>
#include <vector>

namespace inlay {
namespace {

using Numbers = std::vector<int64_t>;  // of values
using Tensors = std::vector<Tensor>;

// A segment, or attention where package is -1; dead: values that no later step reads.
struct ProgramStep {
  int64_t package;
  Numbers inputs, outputs, dead;
  Tensors tensors;  // a segment's weights; k_cache, v_cache, and their scales where there are any
  std::optional<Tensor> sinks, slopes;
  int64_t group, window, chunk;
  double scale, softcap;
  bool causal;
};

class Program : public torch::CustomClassHolder {
 public:
  ~Program() override { KeptMemory::instance().forget(); }
  int64_t add_package(const std::string& path) {
    packages_.push_back(
        std::make_unique<torch::inductor::AOTIModelPackageLoader>(path, "model", false, 1, -1));
    return static_cast<int64_t>(packages_.size()) - 1;
  }
  Tensors run_package(int64_t package, Tensors inputs) {
    return packages_.at(package)->boxed_run(std::move(inputs));
  }

  void clear() { steps_.clear(); }
  void add_segment(int64_t package, Tensors weights, Numbers inputs, Numbers outputs,
                   Numbers dead) {
    TORCH_CHECK(0 <= package && package < static_cast<int64_t>(packages_.size()),
                "Program: there is no package ", package);
    steps_.push_back({package, std::move(inputs), std::move(outputs), std::move(dead),
                      std::move(weights), {}, {}, 0, 0, 0, 0., 0., true});
  }
  // values: q, k, v and the output.
  void add_attention(const Numbers& values, Numbers dead, Tensors cache, int64_t group,
                     double scale, int64_t window, double softcap, std::optional<Tensor> sinks,
                     bool causal, int64_t chunk, std::optional<Tensor> slopes) {
    TORCH_CHECK(values.size() == 4 && (cache.size() == 2 || cache.size() == 4),
                "Program: attention takes q, k, v and gives one; its cache has 2 or 4 tensors");
    steps_.push_back({-1, {values.begin(), values.end() - 1}, {values.back()}, std::move(dead),
                      std::move(cache), std::move(sinks), std::move(slopes), group, window, chunk,
                      scale, softcap, causal});
  }

  // given: the first values; num_values: all that there are. Returns those that are wanted.
  Tensors run(Tensors given, int64_t num_values, const Tensor& slot_mapping,
              const Tensor& block_tables, const Tensor& seq_lens, const Tensor& starts,
              const Numbers& wanted) {
    const KeepMemory keep_memory;
    const Tensors slots = at::unbind(slot_mapping), tables = at::unbind(block_tables);
    Tensors values = std::move(given);
    values.resize(num_values);
    for (const ProgramStep& step : steps_) {
      if (step.package < 0) {
        Tensor out = attention(step, values, slots.at(step.group), tables.at(step.group), seq_lens,
                               starts);
        repeat_padding(out, starts);
        values.at(step.outputs[0]) = std::move(out);
      } else {
        Tensors inputs;
        inputs.reserve(step.tensors.size() + step.inputs.size());
        inputs = step.tensors;
        for (int64_t value : step.inputs) inputs.push_back(values.at(value));
        Tensors outputs = packages_[step.package]->boxed_run(std::move(inputs));
        TORCH_CHECK(outputs.size() == step.outputs.size(), "Program: a segment gave ",
                    outputs.size(), " values, ", step.outputs.size(), " are named");
        for (size_t i = 0; i < outputs.size(); ++i)
          values.at(step.outputs[i]) = std::move(outputs[i]);
      }
      for (int64_t value : step.dead)
        if (std::find(wanted.begin(), wanted.end(), value) == wanted.end()) values.at(value) = Tensor();
    }
    Tensors found;
    for (int64_t value : wanted) found.push_back(values.at(value));
    return found;
  }

 private:
  // Tokens of padding repeat the last real one (StepInputs), and go on doing so: products compute
  // equal rows once.
  static void repeat_padding(const Tensor& out, const Tensor& starts) {
    const int64_t real = starts.const_data_ptr<int>()[starts.numel() - 1];
    const int64_t row_bytes = out.stride(0) * out.element_size();
    if (real > 0) repeat_last_row(out.mutable_data_ptr(), real, out.size(0), row_bytes);
  }

  static Tensor attention(const ProgramStep& step, const Tensors& values, const Tensor& slots,
                          const Tensor& table, const Tensor& seq_lens, const Tensor& starts) {
    const Tensor &q = values.at(step.inputs[0]), &k = values.at(step.inputs[1]),
                 &v = values.at(step.inputs[2]);
    Tensor k_cache = step.tensors[0], v_cache = step.tensors[1];
    if (k_cache.scalar_type() == q.scalar_type())
      return paged_attention(q, k, v, k_cache, v_cache, slots, table, seq_lens, starts, step.scale,
                             step.window, step.softcap, step.sinks, step.causal, step.chunk,
                             step.slopes);
    std::optional<Tensor> k_scales, v_scales;
    if (step.tensors.size() == 4) k_scales = step.tensors[2], v_scales = step.tensors[3];
    return paged_attention_converted(q, k, v, k_cache, v_cache, k_scales, v_scales, slots, table,
                                     seq_lens, starts, step.scale, step.window, step.softcap,
                                     step.sinks, step.causal, step.chunk, step.slopes);
  }

  std::vector<std::unique_ptr<torch::inductor::AOTIModelPackageLoader>> packages_;
  std::vector<ProgramStep> steps_;
};

}  // namespace
}  // namespace inlay
