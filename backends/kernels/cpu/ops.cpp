// The ops' schemas. One translation unit: torch's headers take longer to compile than our code.
#include "handles.h"
#include "paged_attention.h"
#include "program.h"
#include "sampler_ops.h"

#include <torch/library.h>

// Found in the file before it is loaded, so it must lie there in one piece: read through a volatile
// pointer, else the compiler also scatters it over the code.
extern "C" __attribute__((used)) const char inlay_cpu_build_stamp[] = INLAY_BUILD_STAMP;

namespace {
std::string build_stamp() {
  const char* volatile stamp = inlay_cpu_build_stamp;
  return stamp;
}
}  // namespace

TORCH_LIBRARY(inlay_cpu, m) {
  m.def(
      "paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor slot_mapping, Tensor block_table, Tensor seq_lens, Tensor query_start_loc, "
      "float scale, int window, float softcap, Tensor? sinks, bool causal=True, int chunk=0, "
      "Tensor? slopes=None) -> Tensor");
  m.def(
      "paged_attention_converted(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, Tensor(c!)? k_scales, Tensor(d!)? v_scales, Tensor slot_mapping, "
      "Tensor block_table, Tensor seq_lens, Tensor query_start_loc, float scale, int window, "
      "float softcap, Tensor? sinks, bool causal=True, int chunk=0, Tensor? slopes=None) "
      "-> Tensor");
  m.def("pack_linear(Tensor weight) -> Tensor");
  m.def("linear(Tensor x, Tensor handle, Tensor? bias, int out_features) -> Tensor");
  m.def("pack_experts(Tensor weight, bool transposed=False, bool interleaved=False) -> Tensor");
  m.def(
      "experts(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor up, Tensor down, "
      "Tensor? up_bias, Tensor? down_bias, Tensor? norm_weight, str activation=\"silu\", "
      "bool gated=True, float alpha=1.0, float gate_limit=0.0, float up_limit=0.0, "
      "bool limit_activated=False, float up_offset=0.0, float gate_softcap=0.0, "
      "float up_softcap=0.0, float norm_eps=0.0) -> Tensor");
  m.def("pack_int8(Tensor weight) -> Tensor");
  m.def(
      "int8_linear(Tensor q, Tensor x_scale, Tensor? x_zero, Tensor handle, Tensor w_scale, "
      "Tensor? bias, int out_features, ScalarType dtype) -> Tensor");
  m.def("pack_weight_only(Tensor weight) -> Tensor");
  m.def(
      "weight_only_linear(Tensor x, Tensor handle, Tensor scale, Tensor? zero, Tensor? bias, "
      "int out_features) -> Tensor");
  m.def(
      "fp8_linear(Tensor q, Tensor x_scale, Tensor handle, Tensor w_scale, Tensor? bias, "
      "int out_features, ScalarType dtype) -> Tensor");
  m.def(
      "pack_quantized_experts(Tensor weight, str activations, bool interleaved=False) -> Tensor");
  m.def(
      "quantized_experts(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor up, "
      "Tensor up_scale, Tensor? up_zero, Tensor down, Tensor down_scale, Tensor? down_zero, "
      "str activations, Tensor? up_bias=None, Tensor? down_bias=None, Tensor? norm_weight=None, "
      "str activation=\"silu\", bool gated=True, float alpha=1.0, float gate_limit=0.0, "
      "float up_limit=0.0, bool limit_activated=False, float up_offset=0.0, "
      "float gate_softcap=0.0, float up_softcap=0.0, float norm_eps=0.0) -> Tensor");
  m.def(
      "draw_tokens(Tensor logits, Tensor slots, Tensor positions, Tensor integers, Tensor floats) "
      "-> (Tensor, Tensor)");
  m.def("fix_rows(Tensor(a!) handle, int rows) -> ()");
  m.def("packed_nbytes(Tensor handle) -> int");
  m.def("packed_format(Tensor handle) -> str");
  m.class_<inlay::Program>("Program")
      .def(torch::init<>())
      .def("add_package", &inlay::Program::add_package)
      .def("run_package", &inlay::Program::run_package)
      .def("clear", &inlay::Program::clear)
      .def("add_segment", &inlay::Program::add_segment)
      .def("add_attention", &inlay::Program::add_attention)
      .def("run", &inlay::Program::run);
  m.def("kept_memory() -> int[]", &inlay::kept_memory);
  m.def("get_isa() -> str", &inlay::get_isa);
  m.def("set_isa(str name) -> ()", &inlay::set_isa);
  m.def("build_stamp() -> str", &build_stamp);
}

TORCH_LIBRARY_IMPL(inlay_cpu, CPU, m) {
  m.impl("paged_attention", &inlay::paged_attention);
  m.impl("paged_attention_converted", &inlay::paged_attention_converted);
  m.impl("pack_linear", &inlay::pack_linear);
  m.impl("linear", &inlay::linear);
  m.impl("pack_experts", &inlay::pack_experts);
  m.impl("experts", &inlay::experts);
  m.impl("pack_int8", &inlay::pack_int8);
  m.impl("int8_linear", &inlay::int8_linear);
  m.impl("pack_weight_only", &inlay::pack_weight_only);
  m.impl("weight_only_linear", &inlay::weight_only_linear);
  m.impl("fp8_linear", &inlay::fp8_linear);
  m.impl("pack_quantized_experts", &inlay::pack_quantized_experts);
  m.impl("quantized_experts", &inlay::quantized_experts);
  m.impl("draw_tokens", &inlay::draw_tokens);
  m.impl("fix_rows", &inlay::fix_rows);
  m.impl("packed_nbytes", static_cast<int64_t (*)(const at::Tensor&)>(&inlay::packed_nbytes));
  m.impl("packed_format", &inlay::packed_format);
}
